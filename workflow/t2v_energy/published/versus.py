"""The study's H100 against our own board, where both ran one configuration; what the kernel explains of it.

The study's software ran FlashAttention-2 (its section 4.1), ours what torch chooses.  Whether that is why the
two differ is tested, not assumed: experiment ``kernels`` has both kernels on one board of ours at one size.
With r the cost on the H100 over ours and k FlashAttention-2 over torch's choice on our board,

    explained = ln k / ln r,    remaining ratio = r / k,

which is 1 where the kernel explains all.  What remains is everything else: memory, software, cooling, boards,
and that our weights are random.  A configuration without both kernels is left untested.  Where a campaign of
ours ran on the study's GPU model too, the same is done against it: the GPU model is then no part of what
remains.
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
    "remaining_ratio", "remaining_ratio_ci95", "explained_percent", "own_h100", "own_h100_ci95",
    "same_gpu_ratio", "same_gpu_ratio_ci95", "same_gpu_remaining_ratio", "same_gpu_remaining_ratio_ci95",
    "same_gpu_explained_percent", "tested", "labelled",
)  # fmt: skip
QUANTITIES: Mapping[str, str] = {"latency_s": "s", "gpu_energy_Wh": "Wh"}
EXPERIMENTS = (models.EXPERIMENT, *SETS)
"""Experiments of ours that can stand for a configuration, after the one of the same name."""
PROTOCOLS = ("full", "sampled")
SIZES = ("height", "width", "num_frames", "num_inference_steps")


def versus_table(
    root: Path, campaign: str, own: Path, theirs: pd.DataFrame, same_gpu: Path | None = None
) -> pd.DataFrame:
    """One row a configuration that both have and quantity, columns :data:`COLUMNS`.

    Args:
        root, campaign: the repository and our campaign.
        own: our configurations.csv, from the root.
        theirs: rows of :func:`t2v_energy.published.campaign.configurations`.
        same_gpu: configurations.csv of a campaign of ours on the study's GPU model, from the root.

    ``ratio`` is theirs over ours, ``_ci95`` half-widths at 95 %: of a mean over prompts (theirs) and of
    repetition (ours), in quadrature; neither holds how boards of one model differ.

    Raises:
        UserError: our table is missing.
    """
    ours = read_configurations(root / own)
    beside = None if same_gpu is None else read_configurations(root / same_gpu)
    kernels = read_kernels(root, campaign, own)
    tested = None if kernels is None else kernels_table(kernels)
    model = "" if kernels is None else kernels.model.key
    rows = []
    for _, their in theirs[theirs["status"] == "ok"].iterrows():
        our = _counterpart(ours, their)
        if our is None:
            continue
        pair = tested if their["model"] == model else None
        twin = None if beside is None else _counterpart(beside, their)
        rows += [_row(their, our, twin, pair, quantity) for quantity in QUANTITIES]
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


def _row(
    their: pd.Series, our: pd.Series, twin: pd.Series | None, kernels: pd.DataFrame | None, quantity: str
) -> dict[str, Any]:
    ratio = _over(their, our, quantity)
    found: dict[str, Any] = {
        "experiment": their["experiment"], "configuration_id": their["configuration_id"],
        "quantity": quantity, "unit": QUANTITIES[quantity], "labelled": their["labelled"], "tested": "no",
        "h100": their[quantity], "h100_std": their[f"{quantity}_std"], "h100_n": their[f"{quantity}_n"],
        "h200": our[quantity], "h200_ci95": our[f"{quantity}_ci95"],
        "h200_protocol": our["protocol"], "h200_kernel": our["attention_kernel"], "h200_boards": our["gpus"],
        "ratio": ratio[0], "ratio_ci95": ratio[1],
    }  # fmt: skip
    same = None
    if twin is not None:
        same = _over(their, twin, quantity)
        found |= {"own_h100": twin[quantity], "own_h100_ci95": twin[f"{quantity}_ci95"]}
        found |= {"same_gpu_ratio": same[0], "same_gpu_ratio_ci95": same[1]}
    kernel = None if kernels is None else _kernel_ratio(kernels, their, quantity)
    if kernel is None:
        return found
    found |= {"kernel_ratio": kernel[0], "kernel_ratio_ci95": kernel[1], "tested": "yes"}
    found |= _explained(ratio, kernel, "")
    return found | (_explained(same, kernel, "same_gpu_") if same else {})


def _over(their: pd.Series, our: pd.Series, quantity: str) -> tuple[float, float]:
    """Theirs over ours, and the half-width of both in quadrature."""
    ratio = float(their[quantity]) / float(our[quantity])
    relative = (float(row[f"{quantity}_ci95"]) / float(row[quantity]) for row in (their, our))
    return ratio, ratio * hypot(*relative)


def _kernel_ratio(kernels: pd.DataFrame, their: pd.Series, quantity: str) -> tuple[float, float] | None:
    """FlashAttention-2 over torch's choice at their size, with its half-width; None without both."""
    sizes = (kernels[list(SIZES)] == their[list(SIZES)].to_numpy()).all(axis=1)
    same = kernels[sizes & (kernels["quantity"] == quantity)]
    return None if same.empty else (float(same.iloc[0]["ratio"]), float(same.iloc[0]["ratio_ci95"]))


def _explained(ratio: tuple[float, float], kernel: tuple[float, float], prefix: str) -> dict[str, float]:
    remaining = ratio[0] / kernel[0]
    return {
        f"{prefix}remaining_ratio": remaining,
        f"{prefix}remaining_ratio_ci95": remaining * hypot(ratio[1] / ratio[0], kernel[1] / kernel[0]),
        f"{prefix}explained_percent": 100 * log(kernel[0]) / log(ratio[0]) if ratio[0] != 1 else nan,
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
