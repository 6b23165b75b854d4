"""Cost against resolution: the study's formula and the true work beside the measurements (figure 2, table 3).

Theory is latency = F / (µ Θ) and energy = P_max · latency (the study's sections 3.4 and 3.5), with F from one
of two counts of FLOP: ``study``, the formula with its constants as printed, and ``true``, what the
architecture executes.  Both depend on height and width only through their product (tokens are
H/16 · W/16 a latent frame, and the VAE works on H·W), so curves over pixels hold for every aspect ratio.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import hypot, log, sqrt
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, MaxNLocator, MultipleLocator, NullLocator, StrMethodFormatter
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student_t

from t2v_energy.analysis import style
from t2v_energy.config import Accelerator, ModelFile, load_accelerator, load_campaign, load_model
from t2v_energy.errors import UserError
from t2v_energy.work import OPERATORS, Work, paper, paper_work, true_work

Array = NDArray[np.float64]
Count = Literal["study", "true"]
J_PER_WH = 3600.0
LATENT_PIXELS = 16  # pixels of a token's side: sizes are multiples of it
CURVE_POINTS = 160
CONFIDENCE = 0.95
ERROR_TICK_PERCENT = 20
MEGAPIXEL_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_DASHES = (0, (4, 2))
COUNT_TITLES: Mapping[Count, str] = {
    "study": "The study's formula, as printed",
    "true": "The true architecture",
}


# --- the two counts -----------------------------------------------------------------------------------------


def count_work(
    count: Count, model: ModelFile, height: int, width: int, num_frames: int, num_inference_steps: int
) -> Work:
    """FLOP of one video, by one of the two counts; ``study`` is always Wan2.1-T2V-1.3B as printed.

    Raises:
        UserError: as :func:`t2v_energy.work.true_work` and :func:`t2v_energy.work.paper_work`.
    """
    if count == "study":
        return paper_work(height, width, num_frames, num_inference_steps)
    return true_work(model, height, width, num_frames, num_inference_steps)


def flop_curve(
    count: Count, model: ModelFile, pixels: tuple[float, float], num_frames: int, num_inference_steps: int
) -> pd.DataFrame:
    """FLOP by operator over a geometric grid of ``pixels`` (from, to): columns ``pixels`` and the operators.

    Each point is a strip 16 pixels high with the wanted area, which has the work of any other shape of that
    area.
    """
    low, high = (round(value / LATENT_PIXELS**2) for value in pixels)
    tokens = np.unique(np.geomspace(max(low, 1), max(high, 1), CURVE_POINTS).round().astype(int))
    rows = []
    for n in tokens.tolist():
        strip = count_work(count, model, LATENT_PIXELS, LATENT_PIXELS * n, num_frames, num_inference_steps)
        rows.append({"pixels": n * LATENT_PIXELS**2, **strip.flop})
    return pd.DataFrame(rows)


# --- one efficiency µ ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Efficiency:
    """µ, the sustained share of peak throughput, from a regression of latency on FLOP.

    Attributes:
        value: µ = 1 / (b Θ), b the slope in seconds a FLOP.
        low, high: 95 % interval, of the slope's t-interval.
        r2: 1 − residual / total sum of squares of latency about its mean.
        n: points.
    """

    value: float
    low: float
    high: float
    r2: float
    n: int


def fit_efficiency(flop: ArrayLike, latency_s: ArrayLike, peak_FLOP_per_s: float) -> Efficiency:
    """µ by least squares of ``latency_s`` on ``flop`` through the origin, as the study calibrated it.

    The study says "linear regression … with negligible overhead": no constant is fitted.  Large
    configurations weigh most, since seconds are fitted, not percentages.

    Raises:
        UserError: fewer than two points, or a value that is not positive.
    """
    x, y = np.asarray(flop, dtype=np.float64), np.asarray(latency_s, dtype=np.float64)
    if x.size < 2 or x.size != y.size or not (np.all(x > 0) and np.all(y > 0)):
        raise UserError(
            f"µ needs at least two points with positive FLOP and latency; there are {x.size} and {y.size}",
            remedy="measure more configurations of the experiment",
        )
    slope = float(x @ y / (x @ x))
    residual = float(np.sum((y - slope * x) ** 2))
    error = sqrt(residual / (x.size - 1) / float(x @ x))
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, x.size - 1)) * error
    total = float(np.sum((y - y.mean()) ** 2))
    return Efficiency(
        value=1 / (slope * peak_FLOP_per_s),
        low=1 / ((slope + half) * peak_FLOP_per_s),
        high=1 / ((slope - half) * peak_FLOP_per_s) if slope > half else float("inf"),
        r2=1 - residual / total if total else 1.0,
        n=x.size,
    )


@dataclass(frozen=True)
class Predictor:
    """A way to predict latency and energy from FLOP.

    Attributes:
        key: ``paper``, ``paper_refitted`` or ``single_mu``.
        count: which count of FLOP it takes.
        efficiency: µ.
        peak_FLOP_per_s: Θ_peak, dense bf16.
        power_W: P_max, the board's power.
        fit: the regression that gave µ; None where µ is as printed.
    """

    key: str
    count: Count
    efficiency: float
    peak_FLOP_per_s: float
    power_W: float
    fit: Efficiency | None = None

    def latency_s(self, flop: ArrayLike) -> Array:
        """F / (µ Θ), in seconds."""
        return np.asarray(flop, dtype=np.float64) / (self.efficiency * self.peak_FLOP_per_s)

    def gpu_energy_Wh(self, flop: ArrayLike) -> Array:
        """P_max · F / (µ Θ), in watt-hours."""
        return self.power_W * self.latency_s(flop) / J_PER_WH


# --- a measured sweep ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """The measured rows of one experiment with what theory needs to know of them.

    Attributes:
        rows: rows of configurations.csv with status ``ok``, by rising ``pixels`` (a frame's, added here).
        model, accelerator: the campaign's.
        source: path of the table, as it was given.
    """

    rows: pd.DataFrame
    model: ModelFile
    accelerator: Accelerator
    source: str

    def flop(self, count: Count) -> pd.DataFrame:
        """FLOP by operator of each row."""
        return pd.DataFrame([self.work(count, row).flop for _, row in self.rows.iterrows()], self.rows.index)

    def work(self, count: Count, row: pd.Series) -> Work:
        """Work of one row."""
        return count_work(
            count,
            self.model,
            int(row["height"]),
            int(row["width"]),
            int(row["num_frames"]),
            int(row["num_inference_steps"]),
        )

    @cached_property
    def predictors(self) -> dict[str, Predictor]:
        """The three predictors of table 3; the last two have µ fitted to these very rows."""
        peak = self.accelerator.peak_bf16_dense_TFLOPs * 1e12
        power = self.accelerator.board_power_W
        found = {
            "paper": Predictor("paper", "study", paper.EFFICIENCY, paper.PEAK_FLOP_PER_S, paper.MAX_POWER_W)
        }
        fitted: tuple[tuple[str, Count], ...] = (("paper_refitted", "study"), ("single_mu", "true"))
        for key, count in fitted:
            fit = fit_efficiency(self.flop(count).sum(axis=1), self.rows["latency_s"], peak)
            found[key] = Predictor(key, count, fit.value, peak, power, fit)
        return found

    def predicted(self, key: str, quantity: str) -> pd.Series:
        """Predictions of ``latency_s`` or ``gpu_energy_Wh`` for every row by one predictor."""
        predictor = self.predictors[key]
        flop = self.flop(predictor.count).sum(axis=1)
        return pd.Series(getattr(predictor, quantity)(flop), self.rows.index)

    @cached_property
    def boards(self) -> dict[str, Sweep]:
        """By GPU UUID, the sweep as that board alone measured it: its sizes, and the mean of its passes.

        Those with more sizes come first.  Only latency and GPU energy are the board's own, and their
        intervals are unknown (NaN).
        """
        rows: dict[str, list[pd.Series]] = {}
        for _, row in self.rows.iterrows():
            values = {quantity: board_means(row, quantity) for quantity in ("latency_s", "gpu_energy_Wh")}
            for uuid in values["latency_s"]:
                own = {q: found.get(uuid, float("nan")) for q, found in values.items()}
                own |= {f"{q}_ci95": float("nan") for q in values}
                rows.setdefault(uuid, []).append(row.drop(list(own)).combine_first(pd.Series(own)))
        ordered = sorted(rows, key=lambda uuid: (-len(rows[uuid]), uuid))
        return {
            uuid: Sweep(pd.DataFrame(rows[uuid]).infer_objects(), self.model, self.accelerator, self.source)
            for uuid in ordered
        }

    @property
    def has_gpu_energy(self) -> bool:
        """Whether any row has a GPU energy (there is none without a counter)."""
        return bool(self.rows["gpu_energy_Wh"].notna().any())

    def fixed(self, column: str) -> int:
        """The one value of a column that the sweep holds fixed.

        Raises:
            UserError: the rows have several.
        """
        values = sorted(self.rows[column].unique())
        if len(values) != 1:
            raise UserError(
                f"the rows differ in {column}: {', '.join(map(str, values))}",
                where=self.source,
                remedy="a sweep over resolution holds it fixed",
            )
        return int(values[0])

    def at(self, height: int, width: int) -> pd.Series | None:
        """The row of one size; None where it was not measured.

        Raises:
            UserError: the size has several rows.
        """
        found = self.rows[(self.rows["height"] == height) & (self.rows["width"] == width)]
        if len(found) > 1:
            raise UserError(
                f"{height}×{width} has {len(found)} rows",
                where=self.source,
                remedy="select one protocol and kernel",
            )
        return found.iloc[0] if len(found) else None


def read_sweep(root: Path, campaign: str, configurations: Path, experiment: str = "resolution") -> Sweep:
    """The rows of ``experiment`` in ``configurations`` (configurations.csv) with status ``ok``.

    Raises:
        UserError: the table is missing, has no such row, or mixes models; the campaign, its model or its
            accelerator is unknown.
    """
    path = root / configurations
    if not path.is_file():
        raise UserError("there is no such file", where=str(path), remedy="build it with snakemake (stage 3)")
    table = pd.read_csv(path)
    rows = table[(table["experiment"] == experiment) & (table["status"] == "ok")].copy()
    models = sorted(rows["model"].unique())
    if len(models) != 1:
        raise UserError(
            f"experiment {experiment!r} has {len(rows)} measured rows of {len(models)} models",
            where=str(path),
            remedy="measure the experiment with one model",
        )
    rows["pixels"] = rows["height"] * rows["width"]
    rows = rows.sort_values(["pixels", "height"], kind="stable").reset_index(drop=True)
    accelerator = load_accelerator(root, load_campaign(root, campaign).accelerator)
    return Sweep(rows, load_model(root, models[0]), accelerator, str(configurations))


def pass_means(row: pd.Series, column: str) -> list[float]:
    """Mean of each pass of a row of configurations.csv, in the passes' order."""
    text = str(row[f"{column}_pass_means"])
    return [float(mean) for mean in text.split(";")] if text not in ("", "nan") else []


def board_means(row: pd.Series, column: str) -> dict[str, float]:
    """Mean of each board's passes of a row, by GPU UUID; empty where passes and UUIDs do not correspond."""
    means, uuids = pass_means(row, column), str(row["gpu_uuids"]).split(";")
    if len(means) != len(uuids) or not all(uuid.strip() for uuid in uuids) or uuids == ["nan"]:
        return {}
    by_board: dict[str, list[float]] = {}
    for uuid, mean in zip(uuids, means, strict=True):
        by_board.setdefault(uuid, []).append(mean)
    return {uuid: sum(values) / len(values) for uuid, values in by_board.items()}


def half_bars(rows: pd.DataFrame, column: str) -> pd.Series:
    """Half-lengths of a figure's bars: the 95 % interval or half the passes' spread, whichever is longer.

    The interval of few passes holds repetition only (:func:`t2v_energy.aggregation.merged_estimate`); bars
    that left the passes' spread out would look surer than the points are.  Unknown ones are 0.
    """
    spread = rows[f"{column}_pass_spread_percent"] / 200 * rows[column]
    return pd.concat([rows[f"{column}_ci95"], spread], axis="columns").max(axis="columns").fillna(0)


def local_exponent(
    first: pd.Series, second: pd.Series, column: str, tokens: tuple[float, float]
) -> tuple[float, float]:
    """Slope of log(``column``) over log(tokens) between two rows, and its 95 % half-width.

    The half-width comes from the two rows' own intervals (NaN where there are none), not from a fit.
    """
    distance = log(tokens[1] / tokens[0])
    slope = log(float(second[column]) / float(first[column])) / distance
    relative = (float(row[f"{column}_ci95"]) / float(row[column]) for row in (first, second))
    return slope, hypot(*relative) / abs(distance)


# --- figure 2 -----------------------------------------------------------------------------------------------


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
