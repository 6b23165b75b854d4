"""What FlashAttention-2 costs against torch's own choice, over tokens (figure ``kernels``)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, StrMethodFormatter

from t2v_energy.analysis import style
from t2v_energy.analysis.kernels import DEFAULT, FORCED, Kernels, fits, kernels_table, ratio_curve

PANELS = {
    "latency_s": ("step_time_s", "Latency, flash / {default}"),
    "gpu_energy_Wh": ("step_energy_J", "GPU energy, flash / {default}"),
}
TITLES = {"latency_s": "latency", "gpu_energy_Wh": "GPU energy"}
KILOTOKEN_TICKS = (5, 10, 20, 50, 100, 200, 500)
CURVE_POINTS = 200
_DASHES = (0, (4, 2))


def figure_kernels(kernels: Kernels) -> Figure:
    """Ratio of a video's latency and GPU energy, flash over default, against the token count ℓ.

    Points are measured, with 95 % intervals of repetition; the line is the joint fit c₀ + c₁ ℓ + c₂ ℓ²
    (:func:`t2v_energy.analysis.kernels.fit_jointly`) with the measured once-a-video parts, the dashed one the
    ratio of the two c₂ alone: where all time were attention.  A panel whose quantity was not measured is
    left out; lines are, where there are fewer than three sizes.
    """
    style.apply()
    table = kernels_table(kernels)
    shown = [quantity for quantity in PANELS if (table["quantity"] == quantity).any()]
    figure = Figure(figsize=(style.TEXT_WIDTH_INCH, 2.9))
    grid: Any = figure.subplots(1, len(shown), squeeze=False)
    for axes, quantity in zip(grid[0], shown, strict=True):
        _panel(axes, kernels, table[table["quantity"] == quantity], quantity)
    low = min(axes.get_ylim()[0] for axes in grid[0])
    high = max(axes.get_ylim()[1] for axes in grid[0])
    for letter, axes, quantity in zip("ab", grid[0], shown, strict=False):
        axes.set_title(f"{letter}  {TITLES[quantity]}", loc="left", fontweight="bold")
        axes.set_ylim(low, high)
        axes.spines[["top", "right"]].set_visible(False)
    _legend(figure, kernels)
    figure.subplots_adjust(left=0.085, right=0.99, bottom=0.25, top=0.92, wspace=0.2)
    return figure


def figure_nothing_to_compare() -> Figure:
    """What stands in the figure's place where no size ran both with flash forced and as torch chooses."""
    style.apply()
    figure = Figure(figsize=(style.TEXT_WIDTH_INCH, 1.0))
    text = "No size was measured both with flash forced and with torch's own choice."
    figure.text(0.5, 0.5, text, ha="center", va="center")
    return figure


def _panel(axes: Axes, kernels: Kernels, rows: pd.DataFrame, quantity: str) -> None:
    step, label = PANELS[quantity]
    axes.axhline(1, color=style.PRINTED_COLOUR, linewidth=0.6)
    tokens = kernels.tokens
    grid = np.geomspace(tokens.min(), tokens.max(), CURVE_POINTS)
    curve = ratio_curve(kernels, grid)
    colour = style.FIT_COLOUR
    if quantity in curve:
        axes.plot(grid / 1e3, curve[quantity], color=colour)
        fit = fits(kernels)[step]
        axes.axhline(fit.quadratic[FORCED] / fit.quadratic[DEFAULT], color=colour, linestyle=_DASHES)
    axes.errorbar(
        rows["tokens"] / 1e3,
        rows["ratio"],
        yerr=rows["ratio_ci95"].fillna(0),
        fmt="o",
        color=style.MEASURED_COLOUR,
        markersize=3.5,
        markeredgecolor="white",
        markeredgewidth=0.4,
        elinewidth=0.9,
        zorder=5,
    )
    for place, (_, row) in enumerate(rows.iterrows()):
        below = place % 2 == 0  # ratios rise with ℓ: both sides of the line are free, and labels do not meet
        axes.annotate(
            f"{row['height']}×{row['width']}",
            (row["tokens"] / 1e3, row["ratio"]),
            xytext=(4, -4) if below else (-4, 4),
            textcoords="offset points",
            ha="left" if below else "right",
            va="top" if below else "bottom",
            fontsize=7,
            color=style.PRINTED_COLOUR,
        )
    axes.set_xscale("log")
    axes.set_xlim(tokens.min() / 1.15e3, tokens.max() * 2.7 / 1e3)  # room for the last label
    axes.xaxis.set_major_locator(FixedLocator(KILOTOKEN_TICKS))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("Tokens ℓ that the denoiser sees (thousands)")
    axes.set_ylabel(label.format(default=_name(kernels)))


def _name(kernels: Kernels) -> str:
    return {"cudnn": "cuDNN"}.get(kernels.named[DEFAULT], kernels.named[DEFAULT])


def _legend(figure: Figure, kernels: Kernels) -> None:
    colour = style.FIT_COLOUR
    point: dict[str, Any] = {"color": style.MEASURED_COLOUR, "marker": "o", "markersize": 3.5}
    handles = [Line2D([], [], linestyle="none", label="Measured (95 % CI)", **point)]
    if fits(kernels):
        handles += [
            Line2D([], [], color=colour, label="Joint fit c₀ + c₁ℓ + c₂ℓ², one c₂ a kernel"),
            Line2D([], [], color=colour, linestyle=_DASHES, label="Ratio of the two c₂: attention alone"),
        ]
    figure.legend(handles=handles, loc="lower center", ncol=3, columnspacing=1.6, bbox_to_anchor=(0.5, 0.0))
