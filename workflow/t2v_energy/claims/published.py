"""Recomputations from the tables that the authors published."""

from __future__ import annotations

import re
from math import floor, log10

import numpy as np
import pandas as pd

from t2v_energy.analysis.efficiency import regression
from t2v_energy.analysis.tables import mape_percent
from t2v_energy.claims.sources import DataAbsent, Recomputed, Sources, recomputes
from t2v_energy.study import ENERGIES
from t2v_energy.work import paper, paper_work

SIGNIFICANT = 4
STANDARD_DEVIATION = "sample standard deviation over prompts (n − 1), each the mean of its runs"


@recomputes("published-h100")
def video_mean(sources: Sources, model: str, quantity: str) -> Recomputed:
    """Mean over prompts of one of ``latency_s``, ``gpu_energy_Wh``, …, over all windows of a video."""
    rows = sources.model_videos(model)
    value = float(rows[quantity].mean())
    note = f"mean of {len(rows)} prompts"
    if quantity == "latency_s" and not np.isclose(first := float(rows["first_latency_s"].mean()), value):
        note += f", all windows; the first window alone takes {shown(first)} s"
    return Recomputed(value, note)


@recomputes("published-h100")
def video_std(sources: Sources, model: str, quantity: str) -> Recomputed:
    """Sample standard deviation over prompts of the same; the note has the population's and a part's."""
    rows = sources.model_videos(model)
    if len(rows) < 2:
        raise DataAbsent(f"the authors' cross-model table that was given has one row of {model}")
    note = f"{STANDARD_DEVIATION}; population: {shown(float(rows[quantity].std(ddof=0)))}"
    if quantity == "latency_s" and not np.allclose(rows["first_latency_s"], rows["latency_s"]):
        note += f"; first window alone: {shown(float(rows['first_latency_s'].std()))}"
    return Recomputed(float(rows[quantity].std()), note)


@recomputes("published-h100")
def labelled_setting(sources: Sources, model: str, setting: str) -> Recomputed:
    """A setting as the table labels a model's rows: ``height``, ``width``, ``num_frames``, …, ``fps``."""
    lines, rows = set(sources.model_videos(model)["line"]), sources.published_rows
    column = {"num_inference_steps": "steps"}.get(setting, setting)
    if column not in rows:
        raise DataAbsent(f"the authors' cross-model table has no column {column!r}")
    cells = pd.to_numeric(rows.loc[rows["line"].isin(lines), column], errors="coerce")
    values = sorted(set(cells.dropna()))
    if len(values) != 1:
        raise DataAbsent(f"the table gives {model} {len(values)} values of {column}")
    return Recomputed(float(values[0]), f"column {column} of the model's {len(lines)} rows")


@recomputes("published-h100")
def protocol_count(sources: Sources, column: str) -> Recomputed:
    """``runs``, ``warmup`` or ``cpu_count``, where all rows have one value."""
    rows = sources.published_rows
    if column not in rows:
        raise DataAbsent(f"the authors' cross-model table has no column {column!r}")
    values = sorted(set(pd.to_numeric(rows[column], errors="coerce").dropna()))
    if len(values) != 1:
        raise DataAbsent(f"column {column} has {len(values)} different values")
    return Recomputed(float(values[0]), f"column {column}, the same in all {len(rows)} rows")


@recomputes("published-h100")
def prompts_per_model(sources: Sources, extreme: str) -> Recomputed:
    """Prompts of the model that has the ``most`` or the ``fewest``."""
    counts = sources.all_videos.groupby("model")["prompt"].nunique()
    value = counts.max() if extreme == "most" else counts.min()
    return Recomputed(
        float(value), f"{counts.max()} prompts for most models, {counts.min()} for {counts.idxmin()}"
    )


@recomputes("published-h100")
def gpu_memory_GB(sources: Sources) -> Recomputed:
    """Memory that the GPU's name says (GB)."""
    rows = sources.published_rows
    names = sorted(set(rows["gpu_model"]))
    found = re.search(r"(\d+)GB", names[0])
    if len(names) != 1 or not found:
        raise DataAbsent("the table names no one GPU with its memory")
    return Recomputed(float(found[1]), f"gpu_model is {names[0]!r} in all rows")


@recomputes("published-h100")
def models_measured(sources: Sources) -> Recomputed:
    """How many models the table has."""
    return Recomputed(float(sources.all_videos["model"].nunique()), "models in the table")


@recomputes("published-h100")
def total_energy_Wh(sources: Sources, model: str) -> Recomputed:
    """GPU, CPU and RAM energy (Wh) of one model together: measured, modelled and constant in one sum."""
    parts = _mean_energies(sources, model)
    return Recomputed(sum(parts.values()), f"{_joined(parts)} Wh: a sum of three kinds of number")


@recomputes("published-h100")
def energy_ratio(sources: Sources, of: str, to: str) -> Recomputed:
    """Total energy of one model over another's."""
    first, second = (sum(_mean_energies(sources, model).values()) for model in (of, to))
    return Recomputed(first / second, f"{shown(first)} Wh over {shown(second)} Wh, GPU, CPU and RAM")


@recomputes("published-h100")
def gpu_share_percent(sources: Sources, extreme: str) -> Recomputed:
    """The GPU's part (%) of the total, of the model where it is ``least`` or ``largest``."""
    shares = {}
    for model in sources.all_videos["model"].unique():
        parts = _mean_energies(sources, model)
        shares[model] = 100 * parts["gpu_energy_Wh"] / sum(parts.values())
    pick = min if extreme == "least" else max
    model = pick(shares, key=shares.__getitem__)
    return Recomputed(shares[model], f"{extreme} of the models' shares: {model}")


@recomputes("published-h100")
def mean_power_W(sources: Sources, model: str) -> Recomputed:
    """GPU energy over latency (W), both over all windows."""
    rows = sources.model_videos(model)
    power = 3600 * rows["gpu_energy_Wh"] / rows["latency_s"]
    return Recomputed(
        float(power.mean()), f"from {shown(power.min())} to {shown(power.max())} W over prompts"
    )


@recomputes("published-h100")
def model_latency_s(sources: Sources, extreme: str) -> Recomputed:
    """Latency (s) of the fastest or slowest model."""
    means = sources.all_videos.groupby("model")["latency_s"].mean()
    ordered = means.sort_values(ascending=extreme == "least")
    return Recomputed(float(ordered.iloc[0]), str(ordered.index[0]))


def _mean_energies(sources: Sources, model: str) -> dict[str, float]:
    rows = sources.model_videos(model)
    return {name: float(rows[name].mean()) for name in ENERGIES}


# --- the sweeps ---------------------------------------------------------------------------------------------


@recomputes("published-h100")
def sweep_extreme(sources: Sources, experiment: str, column: str, extreme: str) -> Recomputed:
    """Least or largest value of a setting in one sweep, as labelled."""
    rows = sources.sweep(experiment)
    value = rows[column].min() if extreme == "least" else rows[column].max()
    return Recomputed(float(value), f"of {len(rows)} rows of the sweep")


@recomputes("published-h100")
def sweep_setting(sources: Sources, experiment: str, column: str) -> Recomputed:
    """A setting that a sweep holds fixed, as labelled."""
    values = sorted(set(sources.sweep(experiment)[column]))
    if len(values) != 1:
        raise DataAbsent(f"the sweep over {experiment} has {len(values)} values of {column}")
    return Recomputed(float(values[0]), "the same in all rows of the sweep")


@recomputes("published-h100")
def sweep_mape_percent(sources: Sources, experiment: str, quantity: str) -> Recomputed:
    """Mean absolute error (%) of the study's formulas, as printed, against its own sweep (its table 3)."""
    rows = sources.sweep(experiment)
    predict = paper.latency_s if quantity == "latency_s" else paper.energy_Wh
    predicted = [predict(flop) for flop in _study_flop(rows)]
    return Recomputed(mape_percent(predicted, rows[quantity]), f"{len(rows)} points, µ and P_max as printed")


@recomputes("published-h100")
def regressed_efficiency(sources: Sources, part: str) -> Recomputed:
    """µ, R² or intercept (s) of latency on the study's FLOP over all of its sweeps (section 3.4)."""
    rows = pd.concat([sources.sweep(name) for name in ("resolution", "frames", "steps")])
    fit = regression(_study_flop(rows), rows["latency_s"], through_origin=part != "intercept_s")
    value = {
        "mu": 1 / (fit.slope * paper.PEAK_FLOP_PER_S), "r2": fit.r2, "intercept_s": fit.intercept,
    }[part]  # fmt: skip
    return Recomputed(value, f"least squares over {len(rows)} points")


def _study_flop(rows: pd.DataFrame) -> list[float]:
    sizes = rows[["height", "width", "num_frames", "num_inference_steps"]].itertuples(index=False)
    return [paper_work(*size).total_flop for size in sizes]


# --- words --------------------------------------------------------------------------------------------------


def shown(value: float) -> str:
    """A number for a note."""
    if value == 0:
        return "0"
    return f"{value:.{max(0, SIGNIFICANT - 1 - floor(log10(abs(value))))}f}"


def _joined(parts: dict[str, float]) -> str:
    return " + ".join(shown(value) for value in parts.values())
