"""Experiment ``prompts``: how far a video's cost depends on the prompt (``prompts.csv``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite, nan, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import chi2
from scipy.stats import t as student_t

from t2v_energy.analysis.numbers import Number, Source, decimals
from t2v_energy.analysis.sweep import board_means
from t2v_energy.config import load_model
from t2v_energy.errors import UserError
from t2v_energy.measurement.composition import CONFIDENCE
from t2v_energy.work import true_work

Array = NDArray[np.float64]
EXPERIMENT = "prompts"
REPEATED = "cross-model"
"""Where repeats of one prompt are taken from, for a configuration whose own records have none."""
QUANTITIES: Mapping[str, str] = {"latency_s": "latency", "gpu_energy_Wh": "gpu_energy"}
"""Columns of configurations.csv, and what their numbers are called."""
SETTING = ("model", "height", "width", "num_frames", "num_inference_steps", "protocol", "intervention")
COLUMNS = (
    "configuration", "model", "quantity", "prompts", "left_out", "boards", "tokens_least", "tokens_most",
    "padded_tokens", "mean", "mean_ci95", "std", "cv_percent", "cv_ci95_low", "cv_ci95_high", "range_percent",
    "raw_cv_percent", "board_range_percent", "repeat_std_percent", "repeat_n", "repeat_of",
    "slope_percent_per_token", "slope_ci95_low", "slope_ci95_high", "work_percent_per_token", "kind",
)  # fmt: skip


def prompts_table(
    configurations: pd.DataFrame, records: Iterable[Mapping[str, Any]], root: Path
) -> pd.DataFrame:
    """``prompts.csv``: one row a configuration of experiment ``prompts`` and quantity of a whole video.

    There is one value a prompt and board.  Prompts are compared where their generations ran the same
    denoising steps: a total is composed of the steps that were run, and these are not alike, so that another
    number of them gives another total for any prompt.  Those that ran another number than most (of equally
    many, than the more steps) are in no column but ``left_out``, by name.

    Boards differ by more than prompts, so ``std``, its interval (chi-squared, in ``cv_ci95_low`` and
    ``_high``), ``mean_ci95`` (Student), ``range_percent`` and the slope are within boards: each value less
    the mean of its board, with n − boards degrees of freedom.  A board with one prompt thus contributes
    nothing to them.  A prompt whose passes ran on several boards has a value on each, the mean of its passes
    there; where it is not known which pass was where, the boards count together as one of their own, and
    prompts without a known board as on one.  ``raw_cv_percent`` takes all boards as one, and
    ``board_range_percent`` is by how much their means differ, of the mean.

    ``repeat_std_percent`` is how far a value scatters when the same prompt is measured again: the standard
    deviation within prompts, pooled over those that have several generations, over the root of how many those
    are; where none has, that of the same setting's generations in experiment ``cross-model``.
    ``slope_percent_per_token`` is that of the line of least squares against the prompt's tokens with an
    intercept for each board, in percent of the mean, with Student's interval (95 %, n − boards − 1 degrees of
    freedom); ``work_percent_per_token`` is what true work adds from the shortest to the longest prompt.

    Args:
        configurations: configurations.csv (:func:`~t2v_energy.analysis.stages.read_configurations`).
        records: the experiment's raw records as plain JSON: prompts' lengths and the numbers of steps that
            were run are in them alone.
        root: with the model files.

    Raises:
        UserError: a row without a record.
    """
    prompts: dict[str, Mapping[str, Any]] = {}
    steps: dict[str, set[int]] = {}
    for record in records:
        key = str(record["configuration_id"])
        prompts[key] = record["prompt"]
        steps.setdefault(key, set()).update(_steps_run(record))
    ok = configurations[configurations["status"] == "ok"]
    ours = ok[ok["experiment"] == EXPERIMENT].copy()
    unknown = sorted(set(ours["configuration_id"]) - set(prompts))
    if unknown:
        raise UserError(
            f"there is no record of {unknown[0]}",
            where=f"experiment {EXPERIMENT}",
            remedy="restore the experiment's records, or aggregate them again",
        )
    for name in ("id", "tokens", "padded_tokens"):
        ours[f"prompt_{name}"] = [prompts[key][name] for key in ours["configuration_id"]]
    ours["steps_run"] = [tuple(sorted(steps[key])) for key in ours["configuration_id"]]
    ours["board"] = [_board(cell) for cell in ours["gpu_uuids"]]
    table = []
    for _, rows in ours.groupby(list(SETTING), sort=True):
        same = (ok[list(SETTING)] == rows[list(SETTING)].iloc[0]).all(axis=1)
        repeats = ok[same & (ok["experiment"] == REPEATED)]
        counts = rows["steps_run"].value_counts()
        alike = rows["steps_run"] == max(counts.index, key=lambda run: (counts[run], run))
        left_out = ";".join(sorted(rows.loc[~alike, "prompt_id"].astype(str)))
        rows = rows[alike]
        work = _work_percent_per_token(rows, root)
        table += [
            _row(rows, repeats, quantity, work) | {"left_out": left_out}
            for quantity in QUANTITIES
            if rows[quantity].notna().all()
        ]
    return pd.DataFrame(table, columns=list(COLUMNS))


def _steps_run(record: Mapping[str, Any]) -> set[int]:
    """Numbers of denoising steps that the record's generations ran."""
    windows = record["windows"]
    return {
        int(steps)
        for kind, steps in zip(windows["kind"], windows["steps"], strict=True)
        if kind == "generation"
    }


def _board(uuids: object) -> str:
    """The board or boards of a row's passes; empty where none is known."""
    return "" if pd.isna(uuids) else ";".join(sorted(set(str(uuids).split(";"))))  # type: ignore[call-overload]


def _by_board(rows: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """A row for each prompt and board, with its mean there: ``rows`` where no prompt was on several."""
    parts = []
    for _, row in rows.iterrows():
        means = board_means(row, quantity)
        several = means if len(means) > 1 else {row["board"]: row[quantity]}
        parts += [row.to_dict() | {"board": board, quantity: mean} for board, mean in several.items()]
    return pd.DataFrame(parts)


def _row(rows: pd.DataFrame, repeats: pd.DataFrame, quantity: str, work: float) -> dict[str, object]:
    """All columns but ``left_out``."""
    scatter = _repeats(rows, repeats, quantity)
    rows = _by_board(rows, quantity)
    values, tokens = rows[quantity], rows["prompt_tokens"]
    mean, boards, means = float(values.mean()), rows["board"], values.groupby(rows["board"]).mean()
    found, percent = _within(values, boards), 100 / mean
    slope, half = _slope(tokens, percent * values, boards)
    first = rows.iloc[0]
    size = f"{first['height']}x{first['width']}_{first['num_frames']}f_{first['num_inference_steps']}s"
    return {
        "configuration": f"{first['model']}_{size}",
        "model": first["model"],
        "quantity": quantity,
        "prompts": rows["prompt_id"].nunique(),
        "boards": boards.nunique(),
        "tokens_least": int(tokens.min()),
        "tokens_most": int(tokens.max()),
        "padded_tokens": int(first["prompt_padded_tokens"]),
        "mean": mean,
        "mean_ci95": found.mean_ci95,
        "std": found.std,
        "cv_percent": percent * found.std,
        "cv_ci95_low": percent * found.std_low,
        "cv_ci95_high": percent * found.std_high,
        "range_percent": percent * found.range,
        "raw_cv_percent": percent * float(values.std(ddof=1)),
        "board_range_percent": percent * float(np.ptp(means)) if len(means) > 1 else nan,
        "repeat_std_percent": scatter.percent,
        "repeat_n": scatter.n,
        "repeat_of": scatter.of,
        "slope_percent_per_token": slope,
        "slope_ci95_low": slope - half,
        "slope_ci95_high": slope + half,
        "work_percent_per_token": work,
        "kind": "measured",
    }


class _Within(NamedTuple):
    """Spread within boards, in the values' unit: standard deviation and its 95 % interval, half of the
    mean's interval, and largest less least."""

    std: float
    std_low: float
    std_high: float
    mean_ci95: float
    range: float


def _centred(values: pd.Series, boards: pd.Series) -> Array:
    """Each value less the mean of its board."""
    return (values - values.groupby(boards).transform("mean")).to_numpy(float)


def _within(values: pd.Series, boards: pd.Series) -> _Within:
    """Spread of the values about their boards' means; NaN where no board has two."""
    n, freedom = len(values), len(values) - boards.nunique()
    if freedom < 1:
        return _Within(nan, nan, nan, nan, nan)
    centred = _centred(values, boards)
    squares = float((centred**2).sum())
    std, tail = sqrt(squares / freedom), (1 - CONFIDENCE) / 2
    low, high = (sqrt(squares / float(chi2.ppf(end, freedom))) for end in (1 - tail, tail))
    mean_ci95 = float(student_t.ppf(1 - tail, freedom)) * std / sqrt(n)
    return _Within(std, low, high, mean_ci95, float(np.ptp(centred)))


class _Scatter(NamedTuple):
    """Standard deviation of repeats (%), how many generations it is of, and of which experiment."""

    percent: float
    n: int
    of: str


def _repeats(rows: pd.DataFrame, repeats: pd.DataFrame, quantity: str) -> _Scatter:
    for of, found in ((EXPERIMENT, rows), (REPEATED, repeats)):
        # Two passes of one generation each are two, but no pass has a standard deviation.
        several = found[(found[f"{quantity}_n"] > 1) & found[f"{quantity}_std"].notna()]
        if several.empty:
            continue
        n, std = (several[f"{quantity}{end}"].to_numpy(float) for end in ("_n", "_std"))
        relative = 100 * std / several[quantity].to_numpy(float)
        pooled = sqrt(float(((n - 1) * relative**2).sum() / (n - 1).sum()))
        return _Scatter(pooled / sqrt(float(rows[f"{quantity}_n"].mean())), int(n.sum()), of)
    return _Scatter(nan, 0, "")


def _slope(tokens: pd.Series, percent: pd.Series, boards: pd.Series) -> tuple[float, float]:
    """Slope within boards (% a token) and the half-width of its interval.

    NaN where no board has two lengths, or nothing is left to tell the line's error by.
    """
    x, y = _centred(tokens, boards), _centred(percent, boards)
    squares, freedom = float((x**2).sum()), len(x) - boards.nunique() - 1
    if squares == 0 or freedom < 1:
        return nan, nan
    slope = float((x * y).sum()) / squares
    error = sqrt(float(((y - slope * x) ** 2).sum()) / freedom / squares)
    return slope, float(student_t.ppf((1 + CONFIDENCE) / 2, freedom)) * error


def _work_percent_per_token(rows: pd.DataFrame, root: Path) -> float:
    """By how much the true work of the longest prompt exceeds the shortest one's (% a token, modelled)."""
    first, lengths = rows.iloc[0], (int(rows["prompt_tokens"].min()), int(rows["prompt_tokens"].max()))
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
        for key in ("prompts", "boards", "tokens_least", "tokens_most", "padded_tokens"):
            numbers[f"{prefix}.{key}"] = Number(int(row[key]), "", "constant", Source(file, where, key))
        left_out = len(str(row["left_out"]).split(";")) if row["left_out"] else 0
        numbers[f"{prefix}.left_out"] = Number(left_out, "", "constant", Source(file, where, "left_out"))
        for key in ("cv", "raw_cv", "repeat_std", "range", "board_range"):
            value = float(row[f"{key}_percent"])
            if isfinite(value):
                source = Source(file, where, f"{key}_percent")
                ends = (float(row["cv_ci95_low"]), float(row["cv_ci95_high"])) if key == "cv" else None
                numbers[f"{prefix}.{name}_{key}"] = Number(
                    value, "%", "measured", source, ends, decimals(value, 2)
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
