"""Rates of single operators about a length, by the side that varies (figure ``alignment``)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from t2v_energy.analysis import style
from t2v_energy.analysis.alignment import groups

PERIOD = 128
SIDE_COLOURS = {"queries": "#E69F00", "keys": "#0072B2", "rows": "#009E73"}
PANELS = (
    ("attention", "cudnn", 128, "cuDNN attention, heads of 128"),
    ("attention", "cudnn", 64, "cuDNN attention, heads of 64"),
    ("attention", "flash", 128, "FlashAttention-2, heads of 128"),
    ("linear", "", None, "matrix products"),
)


def figure_alignment(rates: pd.DataFrame) -> Figure:
    """Rates against what is added to the length; one panel an operator.

    Of attention one side varies and the other keeps the length; of matrix products (three shapes) the rows
    do.  Filled: sizes that 128 divides.  Bars: 95 % intervals over three rounds.
    """
    style.apply()
    figure = Figure(figsize=(style.TEXT_WIDTH_INCH, 4.0))
    grid: Any = figure.subplots(2, 2, sharex=True, sharey=True)
    drawn = list(groups(rates[rates["series"] != "attention-alignment-long"]))
    for letter, axes, (operator, kernel, head, title) in zip("abcd", grid.ravel(), PANELS, strict=True):
        for shape, side, length, rows in drawn:
            same = shape["operator"] == operator and (
                operator == "linear" or shape["attention_kernel"] == kernel
            )
            if same and side in SIDE_COLOURS and (head is None or shape["head_size"] == head):
                _points(axes, rows, length, side)
        axes.axhline(0, color=style.PRINTED_COLOUR, linewidth=0.6)
        axes.set_title(f"{letter}  {title}", loc="left", fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[1]:
        axes.set_xlabel("Size − length (tokens or rows)")
        axes.set_xticks(range(-128, 257, 64))
    figure.supylabel("Rate against the mean of multiples of 128 (%)", fontsize=7.5, x=0.008)
    _legend(figure)
    figure.subplots_adjust(left=0.085, right=0.99, bottom=0.185, top=0.95, wspace=0.07, hspace=0.22)
    return figure


def _points(axes: Axes, rows: pd.DataFrame, length: int, side: str) -> None:
    aligned = (rows["size"] % PERIOD == 0).to_numpy()
    rate = rows["rate_TFLOPs"].to_numpy(dtype=float)
    if not aligned.any():
        return
    reference = np.exp(np.log(rate[aligned]).mean())
    percent = 100 * (rate / reference - 1)
    half = 100 * (rows["call_s_ci95"] / rows["call_s"]).to_numpy(dtype=float) * rate / reference
    offset = rows["size"].to_numpy(dtype=float) - length
    colour = SIDE_COLOURS[side]
    for which, filled in ((aligned, True), (~aligned, False)):
        axes.errorbar(
            offset[which],
            percent[which],
            yerr=half[which],
            fmt="o",
            color=colour,
            markerfacecolor=colour if filled else "white",
            markersize=3.5,
            markeredgewidth=0.7,
            elinewidth=0.4,
            alpha=0.8,
        )
    axes.set_ylim(-25, 25)


def _legend(figure: Figure) -> None:
    marks = [
        Line2D([], [], marker="o", linestyle="", markersize=3.5, color=colour, label=f"{side} vary")
        for side, colour in SIDE_COLOURS.items()
    ]
    for filled, text in ((True, "128 divides the size"), (False, "it does not")):
        marks.append(
            Line2D(
                [],
                [],
                marker="o",
                linestyle="",
                markersize=3.5,
                color=style.PRINTED_COLOUR,
                markerfacecolor=style.PRINTED_COLOUR if filled else "white",
                label=text,
            )
        )
    figure.legend(handles=marks, loc="lower center", ncols=5)
