"""From the authors' rows to what one video cost: windows added up, names and units ours.

The published standard deviations are over prompts: each row is the mean of ``runs`` videos in one window of
the meter, so how runs scatter is not in the file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from t2v_energy.errors import UserError
from t2v_energy.published.names import model_keys, plain
from t2v_energy.published.tables import COMPONENTS, SIZES, STAGES

WH_PER_KWH = 1000.0
QUANTITIES = ("latency_s", "gpu_energy_Wh", "cpu_energy_Wh", "ram_energy_Wh")


def videos(table: pd.DataFrame, root: Path, source: str) -> pd.DataFrame:
    """One row a row of the file, of either schema of :mod:`t2v_energy.published.tables`.

    Columns: ``line``, ``model`` (key of the model file), ``experiment`` (of the sweeps), ``prompt``,
    ``runs``, ``height``, ``width``, ``num_frames``, ``num_inference_steps`` (as labelled), :data:`QUANTITIES`
    over all windows, and ``first_latency_s``, the first window's.

    Raises:
        UserError: a model's name is of no model file.
    """
    names = model_keys(root)
    keys = [names.get(plain(str(label)), "") for label in table["model_name"]]
    if "" in keys:
        row = table.iloc[keys.index("")]
        raise UserError(
            f"line {row['line']}, model_name: {row['model_name']!r} is none of ours",
            where=source,
            remedy="name it as its model file's title, or add a file to config/models/",
        )
    kept = [name for name in ("line", "experiment", "prompt", "runs") if name in table]
    found = table[[*kept, *SIZES]].rename(columns={"steps": "num_inference_steps"}).assign(model=keys)
    found["first_latency_s"] = table["duration_generate"]
    found["latency_s"] = _added(table, "duration_{}")
    for part in COMPONENTS:
        found[f"{part}_energy_Wh"] = WH_PER_KWH * _added(table, f"energy_{{}}_{part}")
    for name in ("height", "width", "num_frames", "num_inference_steps", "runs"):
        found[name] = found[name].round().astype(int)
    return found


def _added(table: pd.DataFrame, name: str) -> pd.Series:
    """The sum over the windows that a row has."""
    parts = [table[name.format(stage)] for stage in STAGES if name.format(stage) in table]
    return pd.Series(np.nansum(np.vstack([part.to_numpy(float) for part in parts]), axis=0), table.index)
