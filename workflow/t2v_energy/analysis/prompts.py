"""Experiment ``prompts``: how far a video's cost depends on the prompt (``prompts.csv``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite, nan, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import linregress
from scipy.stats import t as student_t

from t2v_energy.analysis.numbers import Number, Source, decimals
from t2v_energy.config import load_model
from t2v_energy.errors import UserError
from t2v_energy.measurement.composition import CONFIDENCE, estimate
from t2v_energy.work import true_work

Array = NDArray[np.float64]
EXPERIMENT = "prompts"
REPEATED = "cross-model"
"""Where repeats of one prompt are taken from, for a configuration whose own records have none."""
QUANTITIES: Mapping[str, str] = {"latency_s": "latency", "gpu_energy_Wh": "gpu_energy"}
"""Columns of configurations.csv, and what their numbers are called."""
SETTING = ("model", "height", "width", "num_frames", "num_inference_steps", "protocol", "intervention")
COLUMNS = (
    "configuration", "model", "quantity", "prompts", "tokens_least", "tokens_most", "padded_tokens", "mean",
    "mean_ci95", "std", "cv_percent", "range_percent", "repeat_std_percent", "repeat_n", "repeat_of",
    "slope_percent_per_token", "slope_ci95_low", "slope_ci95_high", "work_percent_per_token", "kind",
)  # fmt: skip


def prompts_table(
    configurations: pd.DataFrame, records: Iterable[Mapping[str, Any]], root: Path
) -> pd.DataFrame:
    """``prompts.csv``: one row a configuration of experiment ``prompts`` and quantity of a whole video.

    ``mean``, ``std`` and the interval are over prompts, one value each.  ``repeat_std_percent`` is how far
    such a value scatters when the same prompt is measured again: the standard deviation within prompts,
    pooled over those that have several generations, over the root of how many those are; where none has,
    that of the same setting's generations in experiment ``cross-model``.  ``slope_percent_per_token`` is that
    of the line of least squares against the prompt's tokens, in percent of the mean, with Student's interval
    (95 %); ``work_percent_per_token`` is what true work adds from the shortest to the longest prompt.

    Args:
        configurations: configurations.csv (:func:`~t2v_energy.analysis.stages.read_configurations`).
        records: the experiment's raw records as plain JSON: prompts' lengths are in them alone.
        root: with the model files.

    Raises:
        UserError: a row without a record.
    """
    prompts = {str(record["configuration_id"]): record["prompt"] for record in records}
    ok = configurations[configurations["status"] == "ok"]
    ours = ok[ok["experiment"] == EXPERIMENT].copy()
    unknown = sorted(set(ours["configuration_id"]) - set(prompts))
    if unknown:
        raise UserError(
            f"there is no record of {unknown[0]}",
            where=f"experiment {EXPERIMENT}",
            remedy="restore the experiment's records, or aggregate them again",
        )
    for name in ("tokens", "padded_tokens"):
        ours[name] = [prompts[key][name] for key in ours["configuration_id"]]
    table = []
    for _, rows in ours.groupby(list(SETTING), sort=True):
        same = (ok[list(SETTING)] == rows[list(SETTING)].iloc[0]).all(axis=1)
        repeats = ok[same & (ok["experiment"] == REPEATED)]
        work = _work_percent_per_token(rows, root)
        table += [
            _row(rows, repeats, quantity, work) for quantity in QUANTITIES if rows[quantity].notna().all()
        ]
    return pd.DataFrame(table, columns=list(COLUMNS))


def _row(rows: pd.DataFrame, repeats: pd.DataFrame, quantity: str, work: float) -> dict[str, object]:
    values, tokens = rows[quantity].to_numpy(float), rows["tokens"].to_numpy(float)
    found, percent = estimate(values), 100 / values.mean()
    scatter = _repeats(rows, repeats, quantity)
    slope, half = _slope(tokens, percent * values)
    first = rows.iloc[0]
    size = f"{first['height']}x{first['width']}_{first['num_frames']}f_{first['num_inference_steps']}s"
    return dict(
        zip(
            COLUMNS,
            (
                f"{first['model']}_{size}", first["model"], quantity, len(rows), int(tokens.min()),
                int(tokens.max()), int(first["padded_tokens"]), found.mean, found.ci95, found.std,
                percent * found.std, percent * float(np.ptp(values)), scatter.percent, scatter.n, scatter.of,
                slope, slope - half, slope + half, work, "measured",
            ),
            strict=True,
        )
    )  # fmt: skip


class _Scatter(NamedTuple):
    """Standard deviation of repeats (%), how many generations it is of, and of which experiment."""

    percent: float
    n: int
    of: str


def _repeats(rows: pd.DataFrame, repeats: pd.DataFrame, quantity: str) -> _Scatter:
    for of, found in ((EXPERIMENT, rows), (REPEATED, repeats)):
        several = found[found[f"{quantity}_n"] > 1]
        if several.empty:
            continue
        n, std = (several[f"{quantity}{end}"].to_numpy(float) for end in ("_n", "_std"))
        relative = 100 * std / several[quantity].to_numpy(float)
        pooled = sqrt(float(((n - 1) * relative**2).sum() / (n - 1).sum()))
        return _Scatter(pooled / sqrt(float(rows[f"{quantity}_n"].mean())), int(n.sum()), of)
    return _Scatter(nan, 0, "")


def _slope(tokens: Array, percent: Array) -> tuple[float, float]:
    """Slope (% a token) and the half-width of its interval; NaN without two lengths, or three prompts."""
    if len(np.unique(tokens)) < 2 or len(tokens) < 3:
        return nan, nan
    line = linregress(tokens, percent)
    quantile = float(student_t.ppf((1 + CONFIDENCE) / 2, len(tokens) - 2))
    return float(line.slope), quantile * float(line.stderr)


def _work_percent_per_token(rows: pd.DataFrame, root: Path) -> float:
    """By how much the true work of the longest prompt exceeds the shortest one's (% a token, modelled)."""
    first, lengths = rows.iloc[0], (int(rows["tokens"].min()), int(rows["tokens"].max()))
    model = load_model(root, str(first["model"]))
    if lengths[0] == lengths[1] or model.architecture == "other":
        return nan
    sizes = [int(first[name]) for name in ("height", "width", "num_frames", "num_inference_steps")]
    short, long = (true_work(model, *sizes, prompt_tokens=length).total_flop for length in lengths)
    return 100 * (long / short - 1) / (lengths[1] - lengths[0])


def prompts_numbers(table: pd.DataFrame, file: str) -> dict[str, Number]:
    """``models.prompts.<model>.…`` of the paper's text; none where the campaign has no such experiment."""
    numbers: dict[str, Number] = {}
    for _, row in table.iterrows():
        prefix, name = f"models.prompts.{row['model']}", QUANTITIES[str(row["quantity"])]
        where = f"{row['configuration']} {row['quantity']}"
        for key in ("prompts", "tokens_least", "tokens_most", "padded_tokens"):
            numbers[f"{prefix}.{key}"] = Number(int(row[key]), "", "constant", Source(file, where, key))
        for key in ("cv_percent", "repeat_std_percent", "range_percent"):
            value = float(row[key])
            if isfinite(value):
                short = key.removesuffix("_percent")
                numbers[f"{prefix}.{name}_{short}"] = Number(
                    value, "%", "measured", Source(file, where, key), digits=decimals(value, 2)
                )
        numbers |= _slope_numbers(row, f"{prefix}.{name}", Source(file, where, "slope_percent_per_token"))
    return numbers


def _slope_numbers(row: pd.Series, prefix: str, source: Source) -> dict[str, Number]:
    """The slope with its interval, and the one that true work predicts."""
    slope, work = float(row["slope_percent_per_token"]), float(row["work_percent_per_token"])
    ends = (float(row["slope_ci95_low"]), float(row["slope_ci95_high"]))
    if not all(map(isfinite, (slope, *ends, work))):
        return {}
    digits = decimals((ends[1] - ends[0]) / 2, 2)
    predicted = Source(source.file, source.row, "work_percent_per_token")
    return {
        f"{prefix}_slope": Number(slope, "%", "measured", source, ends, digits),
        f"{prefix}_slope_of_work": Number(work, "%", "modelled", predicted, digits=decimals(work, 1)),
    }
