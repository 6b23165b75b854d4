"""Predicted against measured costs of held-out points, and how far each is off (figure 6)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from t2v_energy.analysis import style
from t2v_energy.analysis.tables import QUANTITIES

COLOURS = {"resolution": "#0072B2", "frames": "#E69F00", "steps": "#009E73", "models": "#AA4466"}
MARKERS = {"resolution": "o", "frames": "s", "steps": "^", "models": "D"}
LINEAR_PERCENT = 5
"""Errors beyond it are on a logarithmic part of their axis."""
LABELS = {"latency_s": ("latency", "s"), "gpu_energy_Wh": ("GPU energy", "Wh")}


def figure_prediction(points: pd.DataFrame) -> Figure:
    """Above, predictions of ``calibrated`` over measured values; below, the errors with their 90 % intervals.

    ``points`` as :func:`t2v_energy.analysis.prediction.predicted`: one column a quantity that was measured.
    """
    style.apply()
    own = points[points["predictor"] == "calibrated"]
    shown = [quantity for quantity in QUANTITIES if (own["quantity"] == quantity).any()]
    figure = Figure(figsize=(style.TEXT_WIDTH_INCH, 4.6))
    grid: Any = figure.subplots(2, len(shown), squeeze=False, gridspec_kw={"height_ratios": (1.2, 1)})
    for column, quantity in enumerate(shown):
        rows = own[own["quantity"] == quantity]
        _predicted(grid[0][column], rows, quantity)
        _errors(grid[1][column], rows, quantity)
    for letter, axes in zip("abcd", grid.ravel(), strict=False):
        axes.set_title(letter, loc="left", fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
    sets = list(dict.fromkeys(own["set"]))
    handles = [
        Line2D([], [], marker=MARKERS[s], color=COLOURS[s], linestyle="", markersize=4, label=s) for s in sets
    ]
    figure.legend(handles=handles, loc="lower center", ncols=len(sets))
    figure.subplots_adjust(left=0.09, right=0.99, bottom=0.155, top=0.95, wspace=0.24, hspace=0.42)
    return figure


def _predicted(axes: Axes, rows: pd.DataFrame, quantity: str) -> None:
    name, unit = LABELS[quantity]
    ends = np.array([rows["measured"].min() / 1.5, rows["measured"].max() * 1.5])
    axes.plot(ends, ends, color=style.PRINTED_COLOUR, linewidth=0.6)
    for key, own in rows.groupby("set", sort=False):
        axes.plot(
            own["measured"],
            own["predicted"],
            marker=MARKERS[str(key)],
            color=COLOURS[str(key)],
            linestyle="",
            markersize=3.5,
            markeredgecolor="white",
            markeredgewidth=0.3,
        )
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axes.set_xlabel(f"Measured {name} ({unit})")
    axes.set_ylabel(f"Predicted {name} ({unit})")


def _errors(axes: Axes, rows: pd.DataFrame, quantity: str) -> None:
    """Errors in per cent; large ones (of other models) are on the logarithmic part of their axis."""
    name, unit = LABELS[quantity]
    axes.axhline(0, color=style.PRINTED_COLOUR, linewidth=0.6)
    for key, own in rows.groupby("set", sort=False):
        error, low, high = (100 * (own[c] / own["measured"] - 1) for c in ("predicted", "low", "high"))
        axes.errorbar(
            own["measured"],
            error,
            yerr=[error - low, high - error],
            fmt=MARKERS[str(key)],
            color=COLOURS[str(key)],
            markersize=3,
            markeredgecolor="white",
            markeredgewidth=0.3,
            elinewidth=0.6,
        )
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=LINEAR_PERCENT)
    ticks = [-50, -20, -5, -2, 0, 2, 5, 20, 50]
    axes.set_yticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
    axes.set_xlabel(f"Measured {name} ({unit})")
    axes.set_ylabel("Predicted − measured (%)")
