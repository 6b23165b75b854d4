"""Figures 2 to 4: cost against resolution, frames and steps, measured and by theory stacked by operator.

Both counts of FLOP depend on height and width only through their product (tokens are H/16 · W/16 a latent
frame, and the VAE works on H·W), so curves over pixels hold for every aspect ratio.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter
from numpy.typing import NDArray

from t2v_energy.analysis import style
from t2v_energy.analysis.scaling import TILE_TOKENS
from t2v_energy.analysis.sweep import SETS, Count, Predictor, Sweep, half_bars, pass_means
from t2v_energy.work import OPERATORS

FIGURES: Mapping[str, str] = {"resolution": "fig2", "frames": "fig3", "steps": "fig4"}
"""File name of each set's figure."""

COUNT_TITLES: Mapping[Count, str] = {
    "study": "The study's formula, as printed",
    "true": "The true architecture",
}
LOGARITHMIC_STRIPS: Mapping[str, tuple[float, ...]] = {
    "resolution": (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
    "steps": (1, 2, 5, 10, 20, 50, 100, 200),
}
"""Sets whose error strips have a logarithmic axis, with its ticks: many of their points are small."""

INSET_MEGAPIXELS = 2.0
"""What an inset of figure 2 shows enlarged where the whole goes far beyond."""
INSET_MIN_RANGE = 2.0  # times INSET_MEGAPIXELS
INSET_PLACE = (0.135, 0.44, 0.35, 0.47)  # of the panel: where the study's curve, too, leaves room

_HEIGHT_INCH = 7.2
_FEW = 2  # columns of panels that leave each room for an axis label of its own
_DASHES = (0, (4, 2))
# A dash no wider than a point: two passes are the caps of the bar from one to the other, and hide where they
# agree.
_PASS_MARKER: Mapping[str, Any] = {
    "marker": "_",
    "linestyle": "none",
    "color": style.MEASURED_COLOUR,
    "markeredgewidth": 0.7,
    "markersize": 3.3,
}
_POINT_SIZE, _STRIP_POINT_SIZE = 4.4, 3.3
_EDGE = 0.6  # white, around filled points, for the areas below are dark

_OTHER_MARKER: dict[str, Any] = {
    "linestyle": "none", "marker": "D", "markersize": 3.5, "markerfacecolor": "white",
    "markeredgecolor": style.SECOND_COLOUR, "markeredgewidth": 1.0,
}  # fmt: skip
"""Another campaign's points."""


@dataclass(frozen=True)
class _Column:
    """One column of panels: some rows of a sweep and one quantity of them.

    Attributes:
        sweep: the rows to show.
        quantity: a column of configurations.csv.
        label: of the vertical axis; empty where the column to the left has it.
        theory: whether theory predicts the quantity.
        size: height × width to write into the panel; empty where the figure has one size or all.
    """

    sweep: Sweep
    quantity: str
    label: str
    theory: bool
    size: str = ""

    @property
    def x(self) -> pd.Series:
        """What the sweep varies, in units of the axis."""
        varied = self.sweep.varied
        values: pd.Series = self.sweep.rows[varied.column] / varied.scale
        return values

    @property
    def y(self) -> pd.Series:
        """The measured quantity."""
        return self.sweep.rows[self.quantity]

    @property
    def half(self) -> pd.Series:
        """Half-lengths of its bars."""
        if self.theory:
            return half_bars(self.sweep.rows, self.quantity)
        return self.sweep.rows[f"{self.quantity}_ci95"].fillna(0)

    @property
    def whole_tiles(self) -> pd.Series:
        """Whether each row's tokens are a multiple of :data:`TILE_TOKENS`: its attention is faster."""
        sweep = self.sweep
        whole = [sweep.work("true", row).tokens % TILE_TOKENS == 0 for _, row in sweep.rows.iterrows()]
        return pd.Series(whole, sweep.rows.index)

    def passes(self) -> tuple[list[float], list[float], list[Any]]:
        """Place, mean and row label of each pass, of rows that have several."""
        x, y, labels = [], [], []
        for label, row in self.sweep.rows.iterrows():
            means = pass_means(row, self.quantity) if f"{self.quantity}_pass_means" in row else []
            if len(means) > 1:
                x += [float(self.x[label])] * len(means)  # type: ignore[call-overload]
                y += means
                labels += [label] * len(means)
        return x, y, labels


def figure_sweep(
    sweep: Sweep, predictors: Mapping[str, Predictor], other: pd.DataFrame | None = None
) -> Figure:
    """Figure 2, 3 or 4, by the sweep's experiment: latency and GPU energy against what it varies.

    Rows of panels: the study's formula and the true architecture, each at the µ of ``predictors`` (written
    above the row), stacked by operator, with the measurements as points and bars (:func:`half_bars`) and the
    mean of each pass as a dash; points whose tokens are a multiple of :data:`TILE_TOKENS` are hollow.  Below
    each panel, a strip with the theory's signed error in percent of the measurement.  The panels are linear,
    as in the study; strips over pixels and steps are logarithmic, so that the many small values are as
    legible as the few large ones, and where sizes go far beyond :data:`INSET_MEGAPIXELS` an inset shows what
    is below.  The dashed line is the study's formula with its own constants.  Figure 4 has one column of
    panels a size and quantity.  Where a campaign has no GPU energy, the CPU's is shown, without theory.  Rows
    of ``other``, of another campaign and the same experiment, are diamonds in the panels; no theory is fitted
    to them.

    Raises:
        UserError: the experiment is none of the study's sweeps, or its rows differ in something else than
            what it varies.
    """
    style.apply()
    columns = _columns(sweep)
    # Not pyplot's figure: nothing to close, nothing shown twice.
    figure = Figure(figsize=(style.TEXT_WIDTH_INCH, _HEIGHT_INCH))
    grid = _grid(figure, columns)
    shown = (predictors["paper_refitted"], predictors["single_mu"])
    for panels, strips, predictor in zip(grid[::2], grid[1::2], shown, strict=True):
        panels[0].set_title(
            _title(predictor, any(c.quantity == "gpu_energy_Wh" for c in columns)),
            loc="left",
            fontweight="bold",
        )
        for axes, strip, column in zip(panels, strips, columns, strict=True):
            _panel(axes, column, predictor, predictors["paper"])
            _error_strip(strip, column, predictor)
            if other is not None:
                _other_points(axes, column, other)
    _scales(grid, columns)
    for panels, predictor in zip(grid[::2], shown, strict=True):
        for axes, column in zip(panels, columns, strict=True):
            _inset(axes, column, predictor, predictors["paper"])
    _legend(figure, sweep, predictors["paper"], with_other=other is not None)
    figure.align_ylabels(grid)
    return figure


def _grid(figure: Figure, columns: Sequence[_Column]) -> NDArray[Any]:
    """Axes by row (panel, strip, panel, strip) and column.

    Columns without a label of their own stand close to the one that they share it with.
    """
    narrow = len(columns) > _FEW
    widths: list[float] = []
    places = []
    for place, column in enumerate(columns):
        if narrow and column.label and place:
            widths.append(0.28)
        places.append(len(widths))
        widths.append(1.0)
    bottom = 0.15 if columns[0].sweep.experiment in LOGARITHMIC_STRIPS else 0.135  # a second line of label
    halves: Any = figure.add_gridspec(2, 1, left=0.093, right=0.985, bottom=bottom, top=0.972, hspace=0.165)
    rows = []
    for half in halves:
        cells = half.subgridspec(
            2, len(widths), height_ratios=(2, 1), width_ratios=widths, hspace=0.19,
            wspace=0.14 if narrow else 0.26,
        )  # fmt: skip
        rows += [[figure.add_subplot(cells[row, place]) for place in places] for row in range(2)]
    return np.array(rows, dtype=object)


def _columns(sweep: Sweep) -> list[_Column]:
    energy, energy_label, theory = _energy(sweep)
    quantities = (("latency_s", "Latency of a video (s)", True), (energy, energy_label, theory))
    if sweep.varied.column == "pixels":
        return [_Column(sweep, *quantity) for quantity in quantities]
    sizes = sweep.by_size
    return [
        _Column(part, quantity, label if place == 0 else "", has_theory, f"{height}×{width}")
        for quantity, label, has_theory in quantities
        for place, ((height, width), part) in enumerate(sizes.items())
    ]


def _energy(sweep: Sweep) -> tuple[str, str, bool]:
    if sweep.has_gpu_energy:
        return "gpu_energy_Wh", "GPU energy of a video (Wh)", True
    kinds = " + ".join(sorted(set(sweep.rows["cpu_energy_Wh_kind"].dropna()))) or "unknown"
    return "cpu_energy_Wh", f"CPU energy ({kinds}), Wh", False


def _title(predictor: Predictor, with_energy: bool) -> str:
    fit = predictor.fit
    assert fit is not None  # both rows show a fitted µ
    value, low, high = (f"{number:#.3g}".rstrip(".") for number in (fit.value, fit.low, fit.high))
    power = f" at {predictor.power_W:.0f} W" if with_energy else ""
    return f"{COUNT_TITLES[predictor.count]}: fitted µ = {value} (95 % CI {low} to {high}){power}"


# --- panels -------------------------------------------------------------------------------------------------


def _panel(axes: Axes, column: _Column, predictor: Predictor, printed: Predictor) -> None:
    if column.theory:
        _stack(axes, column, predictor, printed)
    _points(axes, column)
    note = [column.size] if column.size else []
    if not column.theory:
        note.append("no theory:\nit is of the GPU")
    axes.text(0.04, 0.95, "\n".join(note), transform=axes.transAxes, va="top", ha="left", fontsize=7)


def _points(axes: Axes, column: _Column) -> None:
    """The mean of the passes with bars, and each pass as a dash."""
    if column.theory:
        x, y, _ = column.passes()
        axes.plot(x, y, zorder=4, **_PASS_MARKER)
    _bars(axes, column, column.y, column.half, _POINT_SIZE, _EDGE)


def _other_points(axes: Axes, column: _Column, other: pd.DataFrame) -> None:
    """Another campaign's rows; where the sweep has several sizes, those of the panel's."""
    varied, rows = column.sweep.varied, other
    if varied.column != "pixels":
        size = column.sweep.rows.iloc[0]
        rows = rows[(rows["height"] == size["height"]) & (rows["width"] == size["width"])]
    x = rows["height"] * rows["width"] if varied.column == "pixels" else rows[varied.column]
    axes.plot(x / varied.scale, rows[column.quantity], zorder=6, **_OTHER_MARKER)


def _bars(axes: Axes, column: _Column, y: pd.Series, half: pd.Series, size: float, edge: float = 0) -> None:
    """Points with bars: squares where the VAE worked in tiles, hollow where tokens fill whole tiles."""
    tiled, whole = column.sweep.tiled, column.whole_tiles
    for square in (False, True):
        for hollow in (False, True):
            rows = (tiled == square) & (whole == hollow)
            if rows.any():
                axes.errorbar(
                    column.x[rows],
                    y[rows],
                    yerr=half[rows],
                    ecolor=style.MEASURED_COLOUR,
                    markersize=size * (1.2 if square else 1),
                    elinewidth=0.9,
                    zorder=5,
                    **_mark(square, hollow, edge),
                )


def _mark(square: bool, hollow: bool, edge: float = 0) -> dict[str, Any]:
    """How a measured point looks, in panels and in the legend."""
    face, rim = (style.MEASURED_COLOUR, "white") if not hollow else ("white", style.MEASURED_COLOUR)
    return {
        "marker": "s" if square else "o",
        "linestyle": "none",
        "markerfacecolor": face,
        "markeredgecolor": rim,
        "markeredgewidth": edge if not hollow else 0.8,
    }


def _stack(axes: Axes, column: _Column, predictor: Predictor, printed: Predictor) -> None:
    varied, sweep = column.sweep.varied, column.sweep
    curve = sweep.curve(predictor.count)
    x, cost = curve[varied.column] / varied.scale, getattr(predictor, column.quantity)
    axes.stackplot(
        x,
        [cost(curve[operator]) for operator in OPERATORS],
        colors=[style.OPERATOR_COLOURS[operator] for operator in OPERATORS],
        linewidth=0,
    )
    if predictor.count == printed.count and not sweep.accelerator.nominal:
        total = getattr(printed, column.quantity)(curve[list(OPERATORS)].sum(axis=1))
        axes.plot(x, total, linestyle=_DASHES, color=style.PRINTED_COLOUR)


def _inset(axes: Axes, column: _Column, predictor: Predictor, printed: Predictor) -> None:
    """The sizes up to :data:`INSET_MEGAPIXELS` enlarged, where the largest is far beyond."""
    small = column.x <= INSET_MEGAPIXELS
    far = column.x.max() > INSET_MIN_RANGE * INSET_MEGAPIXELS
    if column.sweep.varied.column != "pixels" or not far or small.sum() < 2:
        return
    inset = axes.inset_axes(INSET_PLACE)
    _panel(inset, column, predictor, printed)
    inset.set_xlim(0, INSET_MEGAPIXELS)
    inset.set_ylim(0, 1.25 * column.y[small].max())
    inset.xaxis.set_major_locator(_locator(4))
    inset.yaxis.set_major_locator(_locator(4))
    inset.tick_params(length=2, pad=1.5)
    inset.set_title("The smaller sizes", loc="left", fontsize=7, pad=2)
    inset.spines[["top", "right"]].set_visible(False)


def _error_strip(axes: Axes, column: _Column, predictor: Predictor) -> None:
    """Signed error of the theory, percent of each measurement; dashes: of each pass's mean."""
    axes.axhline(0, color=style.PRINTED_COLOUR, linewidth=0.6)
    if not column.theory:
        return
    predicted, measured = column.sweep.predicted(predictor, column.quantity), column.y
    x, means, labels = column.passes()
    errors = [100 * (predicted[label] / mean - 1) for label, mean in zip(labels, means, strict=True)]
    axes.plot(x, errors, zorder=4, **_PASS_MARKER)
    _bars(axes, column, 100 * (predicted / measured - 1), 100 * column.half / measured, _STRIP_POINT_SIZE)


# --- scales and legend --------------------------------------------------------------------------------------


def _scales(grid: Any, columns: Sequence[_Column]) -> None:
    """The same vertical scale for every panel of a quantity, and for every error strip."""
    low = min(axes.get_ylim()[0] for axes in grid[1::2].flat)
    high = max(axes.get_ylim()[1] for axes in grid[1::2].flat)
    tops = {
        quantity: max(
            axes.get_ylim()[1]
            for place, column in enumerate(columns)
            if column.quantity == quantity
            for axes in grid[::2, place]
        )
        for quantity in {column.quantity for column in columns}
    }
    narrow = len(columns) > _FEW
    for place, column in enumerate(columns):
        for panel, strip in zip(grid[::2, place], grid[1::2, place], strict=True):
            panel.set_ylim(0, tops[column.quantity])
            panel.set_ylabel(column.label)
            panel.set_xlim(0, column.x.max() * 1.04)
            panel.xaxis.set_major_locator(_locator(4 if narrow else 6))
            strip.set_ylim(low, high)
            strip.set_ylabel("Theory error (%)" if column.label else "")
            strip.yaxis.set_major_locator(_locator(5))
            _strip_scale(strip, column, narrow)
            for axes in (panel, strip):
                axes.tick_params(labelleft=bool(column.label))
        grid[-1, place].set_xlabel(_x_label(column.sweep))
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)


def _x_label(sweep: Sweep) -> str:
    """Of panel and strip, which differ where the strip is logarithmic."""
    if sweep.experiment not in LOGARITHMIC_STRIPS:
        return sweep.varied.label
    return f"{sweep.varied.label}\n(strips: log scale)"


def _locator(intervals: int) -> MaxNLocator:
    return MaxNLocator(intervals, steps=[1, 2, 2.5, 5, 10])


def _strip_scale(strip: Axes, column: _Column, narrow: bool) -> None:
    x, ticks = column.x, LOGARITHMIC_STRIPS.get(column.sweep.experiment)
    if ticks is None:
        strip.set_xlim(0, x.max() * 1.04)
        strip.xaxis.set_major_locator(_locator(4 if narrow else 6))
        return
    strip.set_xscale("log")
    margin = float(x.max() / x.min()) ** 0.03
    strip.set_xlim(x.min() / margin, x.max() * margin)
    kept = [tick for tick in ticks if x.min() / margin <= tick <= x.max() * margin]
    strip.xaxis.set_major_locator(FixedLocator(kept[::3] if narrow and len(kept) > 6 else kept))
    strip.xaxis.set_minor_locator(NullLocator())
    strip.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _legend(figure: Figure, sweep: Sweep, printed: Predictor, *, with_other: bool = False) -> None:
    """Lines below the panels: operators as the areas are stacked, measured marks, the study's own model."""
    areas = [Patch(color=style.OPERATOR_COLOURS[o], label=style.OPERATOR_LABELS[o]) for o in OPERATORS]
    column = _Column(sweep, "latency_s", "", True)
    label = "Measured (bars: passes or 95 % CI)"
    marks = [Line2D([], [], label=label, markersize=_STRIP_POINT_SIZE, **_mark(False, False))]
    if sweep.rows["latency_s_pass_spread_percent"].notna().any():
        marks.append(Line2D([], [], label="One pass", **_PASS_MARKER))
    if column.whole_tiles.any():
        label = f"Tokens a multiple of {TILE_TOKENS}"
        marks.append(Line2D([], [], label=label, markersize=_STRIP_POINT_SIZE, **_mark(False, True)))
    if sweep.tiled.any():
        marks.append(
            Line2D([], [], label="VAE in tiles", markersize=1.2 * _STRIP_POINT_SIZE, **_mark(True, False))
        )
    if with_other:
        marks.append(Line2D([], [], label="The study, H100", **_OTHER_MARKER))
    lines: list[tuple[Sequence[Any], float]] = [(areas, 1.4), (marks, 1.4)]
    if not sweep.accelerator.nominal:
        label = f"The study's formula with its own µ = {printed.efficiency} and {printed.power_W:.0f} W"
        own = Line2D([], [], color=style.PRINTED_COLOUR, linestyle=_DASHES, label=label)
        lines.append(([own], 2.4))
    for place, (handles, length) in enumerate(lines, start=1):
        figure.legend(
            handles=handles,
            loc="lower center",
            ncol=len(handles),
            columnspacing=1.1,
            handlelength=length,
            handletextpad=0.5,
            borderpad=0.2,
            bbox_to_anchor=(0.5, 0.0225 * (len(lines) - place)),
        )


assert tuple(COUNT_TITLES) == get_args(Count)
assert tuple(FIGURES) == tuple(SETS)
