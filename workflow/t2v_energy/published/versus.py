"""The study's H100 against our own board, where both ran one configuration; what the kernel explains of it.

The study's software ran FlashAttention-2 (its section 4.1), ours what torch chooses.  Whether that is why the
two differ is tested, not assumed: experiment ``kernels`` has both kernels on one board of ours at one size.
With r the cost on the H100 over ours and k FlashAttention-2 over torch's choice on our board,

    explained = ln k / ln r,    remaining ratio = r / k,

which is 1 where the kernel explains all.  What remains is everything else: memory, software, cooling, boards,
and that our weights are random.  A configuration without both kernels is left untested.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import hypot, log, nan
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from t2v_energy.analysis import models, models_figure, style, sweep_figure
from t2v_energy.analysis.kernels import kernels_table, read_kernels
from t2v_energy.analysis.stages import read_configurations
from t2v_energy.analysis.sweep import SETS, fit_predictors, read_sweeps

COLUMNS = (
    "experiment", "configuration_id", "quantity", "unit", "h100", "h100_std", "h100_n", "h200", "h200_ci95",
    "h200_protocol", "h200_kernel", "h200_boards", "ratio", "ratio_ci95", "kernel_ratio", "kernel_ratio_ci95",
    "remaining_ratio", "remaining_ratio_ci95", "explained_percent", "tested", "labelled",
)  # fmt: skip
QUANTITIES: Mapping[str, str] = {"latency_s": "s", "gpu_energy_Wh": "Wh"}
EXPERIMENTS = (models.EXPERIMENT, *SETS)
"""Experiments of ours that can stand for a configuration, after the one of the same name."""
PROTOCOLS = ("full", "sampled")
SIZES = ("height", "width", "num_frames", "num_inference_steps")


def versus_table(root: Path, campaign: str, own: Path, theirs: pd.DataFrame) -> pd.DataFrame:
    """One row a configuration that both have and quantity, columns :data:`COLUMNS`.

    Args:
        root, campaign: the repository and our campaign.
        own: our configurations.csv, from the root.
        theirs: rows of :func:`t2v_energy.published.campaign.configurations`.

    ``ratio`` is theirs over ours, ``_ci95`` half-widths at 95 %: of a mean over prompts (theirs) and of
    repetition (ours), in quadrature; neither holds how boards of one model differ.

    Raises:
        UserError: our table is missing.
    """
    ours = read_configurations(root / own)
    kernels = read_kernels(root, campaign, own)
    tested = None if kernels is None else kernels_table(kernels)
    model = "" if kernels is None else kernels.model.key
    rows = []
    for _, their in theirs[theirs["status"] == "ok"].iterrows():
        our = _counterpart(ours, their)
        if our is None:
            continue
        pair = tested if their["model"] == model else None
        rows += [_row(their, our, pair, quantity) for quantity in QUANTITIES]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _counterpart(ours: pd.DataFrame, their: pd.Series) -> pd.Series | None:
    """Our row of the configuration: of the same experiment first, then one with an interval, then a whole."""
    order = [str(their["experiment"]), *EXPERIMENTS]
    found = ours[
        (ours["configuration_id"] == their["configuration_id"]) & (ours["status"] == "ok")
        & (ours["intervention"] == "") & ours["experiment"].isin(order)
    ]  # fmt: skip
    if found.empty:
        return None
    ranked = found.assign(
        place=[order.index(name) for name in found["experiment"]],
        no_interval=found["latency_s_ci95"].isna(),
        protocol_place=[PROTOCOLS.index(name) for name in found["protocol"]],
    )
    return ranked.sort_values(["place", "no_interval", "protocol_place"], kind="stable").iloc[0]


def _row(their: pd.Series, our: pd.Series, kernels: pd.DataFrame | None, quantity: str) -> dict[str, Any]:
    ratio = float(their[quantity]) / float(our[quantity])
    half = ratio * hypot(*(float(row[f"{quantity}_ci95"]) / float(row[quantity]) for row in (their, our)))
    found: dict[str, Any] = {
        "experiment": their["experiment"], "configuration_id": their["configuration_id"],
        "quantity": quantity, "unit": QUANTITIES[quantity], "labelled": their["labelled"], "tested": "no",
        "h100": their[quantity], "h100_std": their[f"{quantity}_std"], "h100_n": their[f"{quantity}_n"],
        "h200": our[quantity], "h200_ci95": our[f"{quantity}_ci95"],
        "h200_protocol": our["protocol"], "h200_kernel": our["attention_kernel"], "h200_boards": our["gpus"],
        "ratio": ratio, "ratio_ci95": half,
    }  # fmt: skip
    if kernels is None:
        return found
    same = kernels[
        (kernels[list(SIZES)] == their[list(SIZES)].to_numpy()).all(axis=1)
        & (kernels["quantity"] == quantity)
    ]
    if same.empty:
        return found
    kernel, kernel_half = float(same.iloc[0]["ratio"]), float(same.iloc[0]["ratio_ci95"])
    remaining = ratio / kernel
    return found | {
        "kernel_ratio": kernel,
        "kernel_ratio_ci95": kernel_half,
        "remaining_ratio": remaining,
        "remaining_ratio_ci95": remaining * hypot(half / ratio, kernel_half / kernel),
        "explained_percent": 100 * log(kernel) / log(ratio) if ratio != 1 else nan,
        "tested": "yes",
    }


def overlays(root: Path, campaign: str, own: Path, theirs: pd.DataFrame) -> dict[str, Figure]:
    """Figures 2 to 5 of our campaign with the study's points, by name; those for which both have rows."""
    found: dict[str, Figure] = {}
    swept = set(theirs["experiment"]) & set(SETS)
    if swept:
        sweeps = read_sweeps(root, campaign, own)
        predictors = fit_predictors(sweeps.values())
        for name, sweep in sweeps.items():
            if name in swept:
                shown = theirs[(theirs["experiment"] == name) & (theirs["status"] == "ok")]
                figure = sweep_figure.figure_sweep(sweep, predictors, other=shown)
                found[sweep_figure.FIGURES[name]] = figure
    if models.EXPERIMENT in set(theirs["experiment"]):
        measured = models.read_models(root, campaign, own)
        others = theirs[theirs["experiment"] == models.EXPERIMENT].set_index("model")
        found["fig5"] = models_figure.figure_costs(measured, other=others)
    return found


def write_overlays(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Every figure as PDF, PNG and SVG."""
    return [path for name, figure in figures.items() for path in style.save(figure, folder / name)]
