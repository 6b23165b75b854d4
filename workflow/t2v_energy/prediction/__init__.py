"""Predictions of latency, GPU energy and memory, before anything is measured.

:func:`predict` is the first, simple one (``single_mu``); :func:`calibrate` and :func:`predict_points` are the
calibrated model's, with intervals.
"""

from t2v_energy.prediction.calibrated import (
    Calibration,
    Predictions,
    calibrate,
    calibration_of,
    predict_points,
    presumed_calibration,
    read_calibration,
    refined,
    shipped_calibration,
)
from t2v_energy.prediction.features import Point
from t2v_energy.prediction.single_mu import Prediction, predict, predict_measurement_s

__all__ = [
    "Calibration",
    "Point",
    "Prediction",
    "Predictions",
    "calibrate",
    "calibration_of",
    "predict",
    "predict_measurement_s",
    "predict_points",
    "presumed_calibration",
    "read_calibration",
    "refined",
    "shipped_calibration",
]
