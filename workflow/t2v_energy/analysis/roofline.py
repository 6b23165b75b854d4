"""Table ``roofline.csv``: what bounds each part of a video, on every accelerator of the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from t2v_energy.config import load_accelerator, load_accelerators, load_model
from t2v_energy.prediction.calibrated import Calibration, shipped_calibration
from t2v_energy.prediction.features import SIZES, Point
from t2v_energy.prediction.roofline import Part, roofline
from t2v_energy.study import load_study

WAN = "wan2.1-t2v-1.3b"
WAN_SIZES = ((240, 320, 81, 50), (480, 832, 81, 50), (1088, 1920, 81, 50))
COLUMNS = ("accelerator", "measured", "model", *SIZES, *Part._fields, "kind")


def points(root: Path) -> list[Point]:
    """The study's models at their defaults, and its own model at a smaller, a usual and a larger size."""
    found = []
    for key in load_study(root).models:
        d = load_model(root, key).defaults
        found.append(Point(key, d.height, d.width, d.num_frames, d.num_inference_steps))
    return [*found, *(Point(WAN, *size) for size in WAN_SIZES)]


def roofline_table(root: Path, own: Calibration, wanted: Sequence[Point]) -> pd.DataFrame:
    """One row a part, columns :data:`COLUMNS`; ``own`` is used for its accelerator.

    ``measured`` says whether the accelerator's rates are calibrated; those of others are presumed.
    """
    tables = []
    for key in load_accelerators(root):
        if load_accelerator(root, key).nominal:
            continue
        calibration = own if key == own.accelerator else shipped_calibration(root, key)
        for point in wanted:
            table = pd.DataFrame([part._asdict() for part in roofline(root, calibration, point)])
            table["accelerator"], table["measured"] = key, calibration.points > 0
            table[["model", *SIZES]] = point[:5]
            tables.append(table)
    return pd.concat(tables, ignore_index=True).assign(kind="modelled")[list(COLUMNS)]
