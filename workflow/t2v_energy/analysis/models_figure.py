"""Figures 5 and 5b: what a video of each model costs, whose share it is, and which stage's."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from t2v_energy.analysis import style
from t2v_energy.analysis.models import Models, stage_shares, total_energy_Wh
from t2v_energy.study import ENERGIES

CM = 1 / 2.54
STAGE_COLOURS: Mapping[str, str] = {
    "text_encoder": style.OPERATOR_COLOURS["text_encoder"],
    "denoiser": style.OPERATOR_COLOURS["self_attention"],
    "upsample": style.OPERATOR_COLOURS["timestep_mlp"],
    "refine": style.OPERATOR_COLOURS["cross_attention"],
    "vae_decode": style.OPERATOR_COLOURS["vae"],
    "rest": style.OPERATOR_COLOURS["embeddings"],
}
"""Colours of stages; every other stage of a model is added to ``rest``."""
STAGE_LABELS: Mapping[str, str] = {
    "text_encoder": "Text encoder",
    "denoiser": "Denoiser",
    "upsample": "Latent upsampler",
    "refine": "Denoiser again (refinement)",
    "vae_decode": "VAE decoder",
    "rest": "Scheduler, host, all else",
}
PARTS: Mapping[str, tuple[str, str]] = {
    "gpu_energy_Wh": ("GPU", style.OPERATOR_COLOURS["self_attention"]),
    "cpu_energy_Wh": ("CPU", style.OPERATOR_COLOURS["mlp"]),
    "ram_energy_Wh": ("RAM", style.OPERATOR_COLOURS["embeddings"]),
}
KIND_HATCHES: Mapping[str, str] = {"measured": "", "modelled": "////", "constant": "...."}
_PRINTED: Mapping[str, Any] = {"color": style.PRINTED_COLOUR, "marker": "D", "markerfacecolor": "white"}
_OTHER: Mapping[str, Any] = {"color": style.SECOND_COLOUR, "marker": "s", "markersize": 3.0}
_LABEL_PERCENT = 6.0  # a narrower part of a bar has no room for its number
_LIMIT_DASHES = (0, (4, 2))


def figure_costs(models: Models, other: pd.DataFrame | None = None) -> Figure:
    """Figure 5: GPU energy and latency of each model (log scale, mean and standard deviation), and shares.

    Top: ours beside the printed values; bottom: GPU, CPU and RAM in percent of their sum, hatched by kind of
    number, the printed shares as the thin bar below each.  Energies are left out without a counter.  Rows of
    ``other`` by the model's key, of another campaign, are drawn on the same lines.
    """
    style.apply()
    figure = Figure(figsize=(style.TEXT_WIDTH_INCH, (4.0 + 1.25 * len(models.keys)) * CM))
    grid = figure.add_gridspec(2, 2, height_ratios=(1, 1.15))
    energy, latency, shares = (figure.add_subplot(place) for place in (grid[0, 0], grid[0, 1], grid[1, :]))
    _cost_panel(energy, models, "gpu_energy_Wh", "GPU energy of a video (Wh)")
    _cost_panel(latency, models, "latency_s", "Latency (s)")
    if other is not None:
        _other_costs(energy, models, other, "gpu_energy_Wh")
        _other_costs(latency, models, other, "latency_s")
    latency.set_yticklabels([])
    _share_panel(shares, models)
    top = [
        Line2D([], [], linestyle="none", color=style.MEASURED_COLOUR, marker="o", markersize=3.5,
               label=f"{models.accelerator.title}, {models.weights} weights (bar: std)"),
        Line2D([], [], linestyle="none", markersize=3.5, label=f"Printed, {models.study.gpu}", **_PRINTED),
    ]  # fmt: skip
    if other is not None:
        top.append(Line2D([], [], linestyle="none", label="The study's rows", **_OTHER))
    figure.legend(handles=top, loc="upper center", ncol=len(top), bbox_to_anchor=(0.56, 1.0))
    bottom = [
        *(Patch(facecolor=colour, label=name, linewidth=0) for name, colour in PARTS.values()),
        *(
            Patch(facecolor="white", edgecolor=style.PRINTED_COLOUR, hatch=hatch, label=kind, linewidth=0.5)
            for kind, hatch in KIND_HATCHES.items()
        ),
    ]
    figure.legend(handles=bottom, loc="lower center", ncol=6, bbox_to_anchor=(0.56, 0.0), columnspacing=1.2)
    height_cm = figure.get_size_inches()[1] / CM
    figure.subplots_adjust(
        left=0.2, right=0.975, top=1 - 0.75 / height_cm, bottom=1.75 / height_cm, hspace=0.32, wspace=0.06
    )
    return figure


def _names(axes: Axes, models: Models) -> dict[str, int]:
    """A line for each model, the first on top; its place by key."""
    places = {key: place for place, key in enumerate(models.keys)}
    axes.set_ylim(len(places) - 0.4, -0.6)
    axes.set_yticks(list(places.values()), [models.title(key) for key in places])
    axes.tick_params(axis="y", length=0)
    return places


def _cost_panel(axes: Axes, models: Models, quantity: str, label: str) -> None:
    places = _names(axes, models)
    axes.set_xscale("log")
    for key, place in places.items():
        if key in models.study.models:
            mean, std = getattr(models.study.models[key], quantity)
            _point(axes, mean, std, place + 0.17, _PRINTED)
        if key in models.rows and isfinite(float(models.rows[key][quantity])):
            row = models.rows[key]
            ours = {"color": style.MEASURED_COLOUR, "marker": "o"}
            _point(axes, float(row[quantity]), float(row[f"{quantity}_std"]), place - 0.17, ours)
        elif key in models.failed:
            axes.annotate(
                models.failed[key].replace("_", " "), (0.03, place - 0.17), va="center", ha="left",
                xycoords=("axes fraction", "data"), fontsize=7, color=style.PRINTED_COLOUR,
            )  # fmt: skip
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(label)


def _other_costs(axes: Axes, models: Models, other: pd.DataFrame, quantity: str) -> None:
    costs = {str(key): float(value) for key, value in other[quantity].items()}
    for place, key in enumerate(models.keys):
        if key in costs:
            axes.plot(costs[key], place, linestyle="none", zorder=4, **_OTHER)


def _point(axes: Axes, mean: float, std: float, place: float, look: Mapping[str, Any]) -> None:
    error = std if isfinite(std) else 0.0
    axes.errorbar(
        mean, place, xerr=error, linestyle="none", markersize=3.5, elinewidth=1, capsize=1.5, **look
    )


def _share_panel(axes: Axes, models: Models) -> None:
    places = _names(axes, models)
    for key, place in places.items():
        if key in models.rows and isfinite(total_energy_Wh(models.rows[key])):
            row = models.rows[key]
            values = {str(name): float(row[name]) for name in ENERGIES}
            kinds = {str(name): str(row[f"{name}_kind"]) for name in ENERGIES}
            _stacked(axes, place - 0.14, 0.44, values, kinds)
        if key in models.study.models:
            printed = {str(name): getattr(models.study.models[key], name)[0] for name in ENERGIES}
            _stacked(axes, place + 0.22, 0.16, printed, {})
    axes.axvline(80, color=style.MEASURED_COLOUR, linewidth=0.8, linestyle=_LIMIT_DASHES)
    axes.set_xlim(0, 100)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("Share of a video's energy (%); dashed: 80 %; thin bars: as the study prints them")


def _stacked(
    axes: Axes, place: float, height: float, values: Mapping[str, float], kinds: Mapping[str, str]
) -> None:
    """One bar of GPU, CPU and RAM (%), hatched by ``kinds``; without kinds pale and without numbers."""
    total, left = sum(values.values()), 0.0
    for name, value in values.items():
        share = 100 * value / total
        hatch = KIND_HATCHES.get(kinds.get(name, "measured"), "xxxx")  # passes of different kinds
        axes.barh(
            place, share, height, left=left, color=PARTS[name][1], hatch=hatch, edgecolor="white",
            linewidth=0.3, alpha=1.0 if kinds else 0.55,
        )  # fmt: skip
        if kinds and share >= _LABEL_PERCENT:
            axes.text(
                left + share / 2, place, f"{share:.1f}", ha="center", va="center", fontsize=7,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
            )  # fmt: skip
        left += share


# --- by stage -----------------------------------------------------------------------------------------------


def stages_of(models: Models, key: str, quantity: str) -> dict[str, float]:
    """Share (0 to 1) of each stage of :data:`STAGE_COLOURS`; what has no colour is in ``rest``."""
    shares = stage_shares(models.files[key], models.rows[key], quantity)
    found = {stage: shares.get(stage, 0.0) for stage in STAGE_COLOURS if stage != "rest"}
    return found | {"rest": 1 - sum(found.values())} if shares else {}


def figure_stages_of_models(models: Models) -> Figure:
    """Figure 5b: GPU energy by stage of each measured model, percent; of time where there is no counter.

    The number at the right is the GPU energy (or time) of a whole video.
    """
    style.apply()
    keys = [key for key in models.keys if key in models.rows]
    has_energy = any(stages_of(models, key, "energy") for key in keys)
    quantity = "energy" if has_energy else "time"
    figure = Figure(figsize=(style.TEXT_WIDTH_INCH, (2.9 + 0.72 * max(len(keys), 1)) * CM))
    axes = figure.add_subplot()
    seen: list[str] = []
    for place, key in enumerate(keys):
        left = 0.0
        for stage, share in stages_of(models, key, quantity).items():
            if share <= 0:
                continue
            seen.append(stage)
            axes.barh(
                place,
                100 * share,
                0.66,
                left=left,
                color=STAGE_COLOURS[stage],
                edgecolor="white",
                linewidth=0.4,
            )
            if 100 * share >= _LABEL_PERCENT:
                axes.text(
                    left + 50 * share, place, f"{100 * share:.1f}", ha="center", va="center", fontsize=7,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
                )  # fmt: skip
            left += 100 * share
        row = models.rows[key]
        total = f"{row['gpu_energy_Wh']:.3g} Wh" if has_energy else f"{row['latency_s']:.3g} s"
        axes.text(101, place, total, va="center", fontsize=7)
    axes.set_ylim(max(len(keys), 1) - 0.5, -0.5)
    axes.set_yticks(range(len(keys)), [models.title(key) for key in keys])
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 100)
    axes.grid(axis="y", visible=False)
    what = "GPU energy, measured" if has_energy else "time, measured"
    axes.set_xlabel(f"Share of a video's {what} (%); {models.weights} weights")
    present = [stage for stage in STAGE_COLOURS if stage in seen]
    handles = [Patch(facecolor=STAGE_COLOURS[stage], label=STAGE_LABELS[stage]) for stage in present]
    figure.legend(handles=handles, loc="lower center", ncol=3, bbox_to_anchor=(0.55, 0.0), columnspacing=1.4)
    height_cm = figure.get_size_inches()[1] / CM
    figure.subplots_adjust(left=0.2, right=0.9, top=1 - 0.2 / height_cm, bottom=1.95 / height_cm)
    return figure
