"""Single operators under their roofline, and what bounds a video on each accelerator (figure roofline)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from t2v_energy.analysis import style
from t2v_energy.analysis.roofline import WAN
from t2v_energy.config import Accelerator
from t2v_energy.prediction.roofline import BOUNDS

OPERATORS = {
    "attention": ("#0072B2", "o", "attention"),
    "linear": ("#E69F00", "s", "matrix products"),
    "float32": ("#D55E00", "^", "convolutions, float32"),
    "half": ("#009E73", "^", "convolutions, 16 bits"),
}
BOUND_COLOURS = {
    "compute": "#0072B2",
    "bandwidth": "#E69F00",
    "occupancy": "#CC79A7",
    "launches": "#D55E00",
    "host": "#999999",
}
SMALL = "animatediff-lightning"
TITLES = {WAN: "Wan2.1-T2V-1.3B, 720×1280", SMALL: "AnimateDiff-Lightning, 512×512"}


def figure_roofline(rates: pd.DataFrame, table: pd.DataFrame, limits: Accelerator) -> Figure:
    """Left: rate of every measured operator over its intensity, under the accelerator's roofline.

    Right: of two models at their defaults, the part of a video's time by what bounds it, on each accelerator.

    Args:
        rates: operator_rates.csv of the accelerator ``limits``.
        table: :func:`t2v_energy.analysis.roofline.roofline_table`.
    """
    style.apply()
    figure = Figure(figsize=(style.TEXT_WIDTH_INCH, 3.8))
    outer: Any = figure.add_gridspec(2, 2, width_ratios=(1.15, 1), hspace=0.55, wspace=0.42)
    roof = figure.add_subplot(outer[:, 0])
    _roof(roof, rates, limits)
    roof.set_title(f"a  single operators, {limits.title}", loc="left", fontweight="bold")
    for letter, row, model in zip("bc", (0, 1), TITLES, strict=True):
        axes = figure.add_subplot(outer[row, 1])
        _bars(axes, table, model, last=row == 1)
        axes.set_title(f"{letter}  {TITLES[model]}", loc="left", fontweight="bold", x=-0.28)
    _legend(figure)
    figure.subplots_adjust(left=0.075, right=0.975, bottom=0.285, top=0.93)
    return figure


def _roof(axes: Axes, rates: pd.DataFrame, limits: Accelerator) -> None:
    own = rates[(rates["status"] == "ok") & (rates["flop"] > 0) & (rates["series"] != "launch")]
    kind = own["operator"].where(
        own["operator"] != "convolution", np.where(own["dtype"] == "float32", "float32", "half")
    )
    for name, (colour, marker, _) in OPERATORS.items():
        rows = own[kind == name]
        axes.plot(
            rows["flop"] / rows["bytes"],
            rows["rate_TFLOPs"],
            marker=marker,
            linestyle="",
            color=colour,
            markersize=2.8,
            markeredgewidth=0.3,
            markeredgecolor="white",
        )
    intensity = np.geomspace(5, 1e5, 200)
    roof = np.minimum(limits.peak_bf16_dense_TFLOPs, intensity * limits.bandwidth_TB_per_s)
    axes.plot(intensity, roof, color=style.PRINTED_COLOUR, linewidth=0.9)
    axes.set(xscale="log", yscale="log", xlim=(5, 1e5), ylim=(1, 2000))
    axes.set_xlabel("Intensity (FLOP/B)")
    axes.set_ylabel("Rate (TFLOP/s)")
    axes.spines[["top", "right"]].set_visible(False)


def _bars(axes: Axes, table: pd.DataFrame, model: str, *, last: bool) -> None:
    rows = table[table["model"] == model]
    first = rows.groupby("accelerator", sort=False)["height"].first()
    rows = rows[rows["height"] == rows["accelerator"].map(first)]
    shares = rows.pivot_table(index="accelerator", columns="bound", values="share", aggfunc="sum", sort=False)
    shares = shares.reindex(columns=list(BOUNDS)).fillna(0.0)
    left = np.zeros(len(shares))
    for bound in BOUNDS:
        part = 100 * shares[bound].to_numpy()
        axes.barh(np.arange(len(shares)), part, left=left, color=BOUND_COLOURS[bound], height=0.75)
        left += part
    measured = rows.groupby("accelerator", sort=False)["measured"].first()
    names = [key if measured[key] else f"{key}*" for key in shares.index]
    axes.set_yticks(np.arange(len(shares)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.grid(axis="y", visible=False)
    if last:
        axes.set_xlabel("Part of the time (%)")
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure) -> None:
    points = [
        Line2D([], [], marker=marker, linestyle="", color=colour, markersize=3.5, label=label)
        for colour, marker, label in OPERATORS.values()
    ]
    points.append(Line2D([], [], color=style.PRINTED_COLOUR, linewidth=0.9, label="peak and bandwidth"))
    bars = [Patch(color=BOUND_COLOURS[bound], label=bound) for bound in BOUNDS]
    figure.legend(handles=points, loc="lower left", ncols=2, bbox_to_anchor=(0.02, 0.0))
    place = {"loc": "lower right", "bbox_to_anchor": (0.99, 0.035)}
    figure.legend(handles=bars, ncols=3, title="bound by", title_fontsize=7, **place)
    figure.text(0.99, 0.012, "* rates presumed, nothing measured", ha="right", fontsize=6.5)
