"""Cost against resolution: the study's formula and the true work beside the measurements (figure 2).

Both counts of FLOP depend on height and width only through their product (tokens are H/16 · W/16 a latent
frame, and the VAE works on H·W), so curves over pixels hold for every aspect ratio.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, MaxNLocator, MultipleLocator, NullLocator, StrMethodFormatter

from t2v_energy.analysis import style
from t2v_energy.analysis.sweep import Count, Predictor, Sweep, flop_curve, half_bars
from t2v_energy.work import OPERATORS

ERROR_TICK_PERCENT = 20
MEGAPIXEL_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_DASHES = (0, (4, 2))
COUNT_TITLES: Mapping[Count, str] = {
    "study": "The study's formula, as printed",
    "true": "The true architecture",
}


@dataclass(frozen=True)
class _Column:
    """One column of panels: a quantity, its axis label, and whether theory predicts it."""

    quantity: str
    label: str
    theory: bool


def figure_resolution(sweep: Sweep) -> Figure:
    """Figure 2: latency and GPU energy against pixels, theory stacked by operator, measurements as points.

    The panels are linear, as in the study; the strips of errors have a logarithmic axis of pixels, so that
    the many small sizes are as legible as the few large ones.

    Rows: the study's formula and the true architecture, each at the µ fitted to these measurements (written
    in the panel), with the theory's error in percent of the measurement in a strip below.  The dashed line
    is the study's model with its own constants.  Bars are those of :func:`half_bars`.  Where a campaign has
    no GPU energy, the right column shows the CPU's, without theory.
    """
    style.apply()
    columns = (_Column("latency_s", "Latency of one video (s)", True), _energy_column(sweep))
    figure = Figure(
        figsize=(style.TEXT_WIDTH_INCH, 6.9)
    )  # not pyplot's: nothing to close, nothing shown twice
    grid: Any = figure.subplots(
        5,
        2,
        squeeze=False,
        gridspec_kw={"height_ratios": (3.0, 1.5, 0.01, 3.0, 1.5)},
    )
    for axes in grid[2]:  # only room for the second row's title
        axes.remove()
    grid = grid[[0, 1, 3, 4]]
    predictors = (sweep.predictors["paper_refitted"], sweep.predictors["single_mu"])
    for panels, strips, predictor in zip(grid[::2], grid[1::2], predictors, strict=True):
        panels[0].set_title(COUNT_TITLES[predictor.count], loc="left", fontweight="bold")
        for axes, strip, column in zip(panels, strips, columns, strict=True):
            _panel(axes, sweep, column, predictor)
            _error_strip(strip, sweep, column, predictor)
    _scales(grid, columns, _megapixels(sweep))
    _legend(figure, sweep)
    figure.align_ylabels(grid)
    figure.subplots_adjust(left=0.085, right=0.995, bottom=0.14, top=0.972, wspace=0.21, hspace=0.33)
    return figure


def _energy_column(sweep: Sweep) -> _Column:
    if sweep.has_gpu_energy:
        return _Column("gpu_energy_Wh", "GPU energy of one video (Wh)", True)
    kinds = " + ".join(sorted(set(sweep.rows["cpu_energy_Wh_kind"].dropna()))) or "unknown"
    return _Column("cpu_energy_Wh", f"CPU energy ({kinds}), Wh", False)


def _megapixels(sweep: Sweep) -> pd.Series:
    return sweep.rows["pixels"] / 1e6


def _scales(grid: Any, columns: tuple[_Column, ...], megapixels: pd.Series) -> None:
    """The same scale for every panel of a column, and for every error strip."""
    low = min(axes.get_ylim()[0] for axes in grid[1::2].flat)
    high = max(axes.get_ylim()[1] for axes in grid[1::2].flat)
    for place, column in enumerate(columns):
        top = max(axes.get_ylim()[1] for axes in grid[::2, place])
        for panel, strip in zip(grid[::2, place], grid[1::2, place], strict=True):
            panel.set_ylim(0, 1.06 * top)  # room for the note
            panel.set_ylabel(column.label)
            strip.set_ylim(low, high)
            strip.set_ylabel("Error (%)")
            strip.yaxis.set_major_locator(MultipleLocator(ERROR_TICK_PERCENT))
            panel.set_xlim(0, megapixels.max() * 1.04)
            panel.xaxis.set_major_locator(MaxNLocator(6))
            strip.set_xscale("log")
            strip.set_xlim(megapixels.min() / 1.08, megapixels.max() * 1.08)
            strip.xaxis.set_major_locator(FixedLocator(MEGAPIXEL_TICKS))
            strip.xaxis.set_minor_locator(NullLocator())
            strip.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        grid[-1, place].set_xlabel("Pixels of a frame (megapixels)")
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)


def _panel(axes: Axes, sweep: Sweep, column: _Column, predictor: Predictor) -> None:
    rows, megapixels = sweep.rows, _megapixels(sweep)
    half = half_bars(rows, column.quantity) if column.theory else rows[f"{column.quantity}_ci95"].fillna(0)
    if column.theory:
        _stack(axes, sweep, column, predictor)
    axes.errorbar(
        megapixels,
        rows[column.quantity],
        yerr=half,
        fmt="o",
        color=style.MEASURED_COLOUR,
        markersize=3.2,
        markeredgecolor="white",
        markeredgewidth=0.4,
        elinewidth=0.9,
        zorder=5,
    )
    note = _note(predictor, column) if column.theory else "no theory: the model is of the GPU"
    axes.text(0.03, 0.95, note, transform=axes.transAxes, va="top", ha="left", fontsize=7, linespacing=1.35)


def _note(predictor: Predictor, column: _Column) -> str:
    fit = predictor.fit
    assert fit is not None  # both panels show a fitted µ
    note = f"µ = {fit.value:#.3g}, fitted here\n(95 % CI {fit.low:#.3g} to {fit.high:#.3g})"
    if column.quantity == "gpu_energy_Wh":
        note += f"\nat a constant {predictor.power_W:.0f} W"
    return note


def _stack(axes: Axes, sweep: Sweep, column: _Column, predictor: Predictor) -> None:
    pixels = (sweep.rows["pixels"].min(), sweep.rows["pixels"].max())
    frames, steps = sweep.fixed("num_frames"), sweep.fixed("num_inference_steps")
    curve = flop_curve(predictor.count, sweep.model, pixels, frames, steps)
    cost = getattr(predictor, column.quantity)
    megapixels = curve["pixels"] / 1e6
    axes.stackplot(
        megapixels,
        [cost(curve[operator]) for operator in OPERATORS],
        colors=[style.OPERATOR_COLOURS[operator] for operator in OPERATORS],
        linewidth=0,
    )
    if predictor.count == "study" and not sweep.accelerator.nominal:
        printed = sweep.predictors["paper"]
        axes.plot(
            megapixels,
            getattr(printed, column.quantity)(curve[list(OPERATORS)].sum(axis=1)),
            linestyle=_DASHES,
            color=style.PRINTED_COLOUR,
        )


def _error_strip(axes: Axes, sweep: Sweep, column: _Column, predictor: Predictor) -> None:
    """Signed error of the theory, percent of each measurement; bars as in :func:`half_bars`."""
    axes.axhline(0, color=style.PRINTED_COLOUR, linewidth=0.6)
    if not column.theory:
        return
    measured = sweep.rows[column.quantity]
    error = 100 * (sweep.predicted(predictor.key, column.quantity) / measured - 1)
    axes.errorbar(
        _megapixels(sweep),
        error,
        yerr=100 * half_bars(sweep.rows, column.quantity) / measured,
        fmt="o",
        color=style.MEASURED_COLOUR,
        markersize=2.4,
        markeredgewidth=0,
        elinewidth=0.9,
    )


def _legend(figure: Figure, sweep: Sweep) -> None:
    """One legend below the panels, in the order in which the areas are stacked."""
    handles: list[Line2D | Patch] = [
        Patch(color=style.OPERATOR_COLOURS[o], label=style.OPERATOR_LABELS[o]) for o in OPERATORS
    ]
    measured: dict[str, Any] = {
        "color": style.MEASURED_COLOUR,
        "marker": "o",
        "markersize": 3.5,
        "linestyle": "none",
    }
    handles.append(Line2D([], [], label="Measured (bars: passes or 95 % CI)", **measured))
    if not sweep.accelerator.nominal:
        printed = sweep.predictors["paper"]
        label = f"The study's own µ = {printed.efficiency} (H100, {printed.power_W:.0f} W)"
        handles.append(Line2D([], [], color=style.PRINTED_COLOUR, linestyle=_DASHES, label=label))
    figure.legend(
        handles=handles,
        loc="lower center",
        ncol=4,
        columnspacing=1.6,
        handlelength=1.6,
        bbox_to_anchor=(0.5, 0.0),
    )


assert tuple(COUNT_TITLES) == get_args(Count)
