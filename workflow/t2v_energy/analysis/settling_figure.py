"""How a denoising loop begins under the power limit: figure ``settling``."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from t2v_energy.analysis import style
from t2v_energy.analysis.settling import SHOWN_S
from t2v_energy.measurement.composition import SETTLED_S

PANELS = {
    "clock_percent": "SM clock (% of its settled mean)",
    "power_W": "GPU power (W)",
}
TITLES = {"clock_percent": "clock", "power_W": "power"}


def figure_settling(table: pd.DataFrame) -> Figure:
    """Clock and power against time since the loop's start; one row of ``settling.csv`` a step of the line.

    The band is one standard deviation over generations, the vertical line where steps count as settled.  A
    campaign without rows gets a figure that says so.
    """
    style.apply()
    if table.empty:
        figure = Figure(figsize=(style.TEXT_WIDTH_INCH, 1.0))
        text = "No denoising loop was long enough and held by a power limit."
        figure.text(0.5, 0.5, text, ha="center", va="center")
        return figure
    figure = Figure(figsize=(style.TEXT_WIDTH_INCH, 2.3))
    grid: Any = figure.subplots(1, len(PANELS))
    for letter, axes, (column, label) in zip("ab", grid, PANELS.items(), strict=True):
        _panel(axes, table, column)
        axes.set_ylabel(label)
        axes.set_title(f"{letter}  {TITLES[column]}", loc="left", fontweight="bold")
    figure.subplots_adjust(left=0.085, right=0.99, bottom=0.17, top=0.91, wspace=0.22)
    return figure


def _panel(axes: Axes, table: pd.DataFrame, column: str) -> None:
    edges = [*table["from_s"], table["to_s"].iloc[-1]]
    mean, spread = table[column], table[f"{column}_std"].fillna(0)
    low, high = ([*values, values.iloc[-1]] for values in (mean - spread, mean + spread))
    axes.fill_between(edges, low, high, step="post", color=style.FIT_COLOUR, alpha=0.18, linewidth=0)
    axes.stairs(mean, edges, color=style.FIT_COLOUR, baseline=None, linewidth=1.2)
    axes.axvline(SETTLED_S, color=style.PRINTED_COLOUR, linestyle=(0, (4, 2)), linewidth=0.8)
    axes.annotate(
        "settled",
        (SETTLED_S, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, -3),
        textcoords="offset points",
        va="top",
        fontsize=7,
        color=style.PRINTED_COLOUR,
    )
    axes.set_xlim(0, SHOWN_S)
    axes.set_xlabel("Time since the denoising loop began (s)")
    axes.spines[["top", "right"]].set_visible(False)
