"""Predictions of latency, GPU energy and memory, before anything is measured."""

from t2v_energy.prediction.single_mu import Prediction, predict, predict_measurement_s

__all__ = ["Prediction", "predict", "predict_measurement_s"]
