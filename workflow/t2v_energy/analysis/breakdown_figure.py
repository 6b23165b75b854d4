"""Figures ``stages`` and ``codecarbon``: where the energy goes, and what CodeCarbon makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from t2v_energy.analysis import style
from t2v_energy.analysis.instruments import ExtraWindow, worst_percent
from t2v_energy.analysis.stages import (
    FEW_STEPS,
    NEGLIGIBLE,
    measured_rows,
    once_and_step,
    other_share,
    row_at,
    stage_share,
)
from t2v_energy.analysis.sweep import VAE_TILING

MAX_STEP_SIZES = 2  # as many as there are marks for
# In greyscale the colours are alike: markers tell the stages apart.
_PARTS = (
    ("vae_decode", style.OPERATOR_COLOURS["vae"], "s", "VAE decoder"),
    ("text_encoder", style.OPERATOR_COLOURS["text_encoder"], "^", "Text encoder"),
    ("rest", style.OPERATOR_COLOURS["embeddings"], "D", "Scheduler, host, all else"),
)
# Operators have the colours; sizes differ by line and marker.
_SIZE_LINES: tuple[Any, ...] = ((0, (5, 1.5)), "solid")
_SIZE_MARKERS = ("o", "s")
_SIZE_FILLS = ("white", style.MEASURED_COLOUR)
_FILLED: Mapping[str, Any] = {"markersize": 2.6, "markeredgewidth": 0}
_TILED: Mapping[str, Any] = {"markersize": 3.4, "markeredgewidth": 0.8, "markerfacecolor": "white"}
_BOUND_FROM_S = 12.0  # length of a window from which on the bound of a tick is within the panel
_BAND_ALPHA, _BEYOND_ALPHA = 0.25, 0.1
_STEP_LOW = 0.5  # percent: lower end of the panel over steps
_PERCENT_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_STEP_TICKS = (1, 2, 5, 10, 20, 50, 200)
_LIMIT_DASHES = (0, (6, 2))
_TIME_DASHES = (0, (2, 1))
_MEGAPIXEL_TICKS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_WINDOW_TICKS = (2, 5, 10, 20, 50, 100, 200, 500, 1000)


# --- stages -------------------------------------------------------------------------------------------------


def figure_stages(configurations: pd.DataFrame) -> Figure:
    """Share that is not the denoiser, percent: against pixels, frames and denoising steps S.

    Left and middle: the GPU energy's share by stage, and of time the sum alone;
    lines join the mean of the points of one size or length, and hollow points had their VAE in tiles.  Right:
    points are whole generations, lines are modelled from the sampled costs of the same size, once a video and
    a step (:class:`t2v_energy.analysis.stages.OnceAndStep`), with the S from which on they are at most
    :data:`t2v_energy.analysis.stages.NEGLIGIBLE`.  A dashed line in all panels is at that share.
    Energy gives way to time where a campaign has no counter.
    """
    style.apply()
    figure = Figure(figsize=(style.TEXT_WIDTH_INCH, 3.5))
    panels: Any = figure.subplots(1, 3, gridspec_kw={"width_ratios": (1, 1, 1.2)})
    quantity = "energy" if configurations["gpu_energy_Wh"].notna().any() else "time"
    sized = measured_rows(configurations, "resolution")
    _components(panels[0], sized["pixels"] / 1e6, sized, quantity)
    lengths = measured_rows(configurations, "frames")
    _components(panels[1], lengths["num_frames"], lengths, quantity)
    _steps(panels[2], configurations, quantity)
    _stage_axes(panels, quantity, sized, lengths, measured_rows(configurations, "steps"))
    _stage_legends(
        figure, quantity, step_sizes(configurations), bool(_tiled(sized).any() or _tiled(lengths).any())
    )
    figure.subplots_adjust(left=0.078, right=0.982, bottom=0.29, top=0.935, wspace=0.22)
    return figure


def step_sizes(configurations: pd.DataFrame) -> list[tuple[int, int, int]]:
    """Height, width and frames of the sizes that experiment ``steps`` ran at: the smallest, by pixels."""
    whole = measured_rows(configurations, "steps")[["height", "width", "num_frames"]].drop_duplicates()
    found = [(int(h), int(w), int(t)) for h, w, t in whole.itertuples(index=False)]
    return sorted(found, key=lambda size: size[0] * size[1] * size[2])[:MAX_STEP_SIZES]


def _components(axes: Axes, x: pd.Series, rows: pd.DataFrame, quantity: str) -> None:
    """Share of each stage but the denoiser, and their sum, of whole videos."""
    if not len(rows):
        return
    tiled = _tiled(rows)
    for stage, colour, marker, _ in _PARTS:
        share = np.array([100 * stage_share(row, stage, quantity) for _, row in rows.iterrows()])
        _joined(axes, x, np.where(share > 0, share, np.nan), tiled, colour, marker)
    total = np.array([100 * other_share(row, quantity) for _, row in rows.iterrows()])
    _joined(axes, x, total, tiled, style.MEASURED_COLOUR, "o")
    if quantity == "energy":
        times = pd.Series([100 * other_share(row, "time") for _, row in rows.iterrows()])
        mean = times.groupby(x.to_numpy()).mean()
        axes.plot(mean.index, mean, color=style.MEASURED_COLOUR, linestyle=_TIME_DASHES, linewidth=0.9)


def _joined(
    axes: Axes, x: pd.Series, share: NDArray[Any], tiled: NDArray[Any], colour: str, marker: str
) -> None:
    """A point for each row, and a line through the mean of those at one place (sizes of one area)."""
    mean = pd.Series(share).groupby(x.to_numpy()).mean()
    axes.plot(mean.index, mean, color=colour, linewidth=0.8)
    for rows, look in ((~tiled, _FILLED), (tiled, _TILED)):
        axes.plot(x[rows], share[rows], color=colour, marker=marker, linestyle="none", **look)


def _tiled(rows: pd.DataFrame) -> NDArray[Any]:
    """Whether the VAE worked in tiles, which overlap and cost more."""
    # without any intervention the column is read as numbers, all NaN
    found = [isinstance(i, str) and VAE_TILING in i.split("+") for i in rows["intervention"]]
    return np.array(found, dtype=bool)


def _steps(axes: Axes, configurations: pd.DataFrame, quantity: str) -> None:
    """Whole generations as points, the modelled curve as a line, for each size."""
    whole, sampled = measured_rows(configurations, "steps"), measured_rows(configurations, "resolution")
    sampled = sampled[sampled["protocol"] == "sampled"]
    curve = np.geomspace(1, 200, 120)
    looks = zip(step_sizes(configurations), _SIZE_LINES, _SIZE_MARKERS, _SIZE_FILLS, strict=False)
    for (height, width, frames), line, marker, fill in looks:
        if (row := row_at(sampled, height, width, frames)) is not None:
            model = once_and_step(row, quantity)
            axes.plot(
                curve,
                100 * model.other_share(curve),
                color=style.MEASURED_COLOUR,
                linestyle=line,
                linewidth=0.9,
            )
            _limit(axes, model.steps_for(NEGLIGIBLE))
            axes.plot(
                [model.equal_steps], [50], marker="x", color=style.PRINTED_COLOUR, markersize=6,
                markeredgewidth=1.2, linestyle="none",
            )  # fmt: skip
        at = (whole["height"] == height) & (whole["width"] == width) & (whole["num_frames"] == frames)
        points = whole[at]
        share = [100 * other_share(point, quantity) for _, point in points.iterrows()]
        axes.plot(
            points["num_inference_steps"], share, marker=marker, color=style.MEASURED_COLOUR,
            markerfacecolor=fill, markersize=3.8, markeredgewidth=0.8, linestyle="none", zorder=4,
        )  # fmt: skip
    axes.axvline(FEW_STEPS, color=style.PRINTED_COLOUR, linewidth=0.9, linestyle=(0, (1, 1.5)))


def _limit(axes: Axes, steps: float) -> None:
    """S from which on the denoiser has all but :data:`NEGLIGIBLE`, from the curve down to its number."""
    if not np.isfinite(steps):
        return
    percent = 100 * NEGLIGIBLE
    axes.plot([steps, steps], [_STEP_LOW, percent], color=style.PRINTED_COLOUR, linewidth=0.7)
    axes.annotate(
        f"{steps:.0f}", (steps, _STEP_LOW), xytext=(-2, 2), textcoords="offset points", ha="right",
        va="bottom", fontsize=7, color=style.PRINTED_COLOUR,
    )  # fmt: skip


def _held(rows: pd.DataFrame, *columns: str) -> str:
    """The one value that ``rows`` have in common, as ``720×1280``; nothing where they differ."""
    values = rows[list(columns)].drop_duplicates()
    return "×".join(str(int(value)) for value in values.iloc[0]) if len(values) == 1 else ""


def _stage_axes(
    panels: Any, quantity: str, sized: pd.DataFrame, lengths: pd.DataFrame, whole: pd.DataFrame
) -> None:
    of = "GPU energy" if quantity == "energy" else "time"
    size, frames = _held(lengths, "height", "width"), _held(whole, "num_frames")
    labels = (
        "Pixels of a frame (megapixels)",
        "Frames" + (f" ({size})" if size else ""),
        "Denoising steps S" + (f" ({frames} frames)" if frames else ""),
    )
    steps = [_held(rows, "num_inference_steps") for rows in (sized, lengths)]
    titles = [
        name + (f", {held} steps" if held else "")
        for name, held in zip(("a  by size", "b  by length", "c  by steps"), (*steps, ""), strict=True)
    ]
    for axes, label, title in zip(panels, labels, titles, strict=True):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator(_PERCENT_TICKS))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel(label)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        limit: dict[str, Any] = {"linewidth": 0.7, "linestyle": _LIMIT_DASHES, "zorder": 1}
        axes.axhline(100 * NEGLIGIBLE, color=style.PRINTED_COLOUR, **limit)
    for axes, ticks in ((panels[0], _MEGAPIXEL_TICKS), (panels[2], _STEP_TICKS)):
        _log_x(axes, ticks)
    panels[0].set_ylabel(f"Share of {of} (%)")
    low = min(axes.get_ylim()[0] for axes in panels[:2])
    for axes in panels[:2]:
        axes.set_ylim(max(low, 0.005), 40)
    panels[2].set_ylim(_STEP_LOW, 100)
    panels[2].set_xlim(0.9, 230)


def _log_x(axes: Axes, ticks: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _stage_legends(figure: Figure, quantity: str, sizes: list[tuple[int, int, int]], tiled: bool) -> None:
    dot: dict[str, Any] = {"markersize": 3.2, "markeredgewidth": 0, "linewidth": 0.8}
    label = "All but the denoiser"
    handles = [Line2D([], [], color=style.MEASURED_COLOUR, label=label, marker="o", **dot)]
    if quantity == "energy":
        dashes: dict[str, Any] = {"linestyle": _TIME_DASHES, "linewidth": 0.9}
        handles.append(Line2D([], [], color=style.MEASURED_COLOUR, label=f"{label}, of time", **dashes))
    for _, colour, marker, label in _PARTS:
        handles.append(Line2D([], [], color=colour, label=label, marker=marker, **dot))
    if tiled:
        handles.append(
            Line2D(
                [],
                [],
                color=style.MEASURED_COLOUR,
                label="VAE in tiles",
                marker="o",
                linestyle="none",
                **_TILED,
            )
        )
    limit = f"{100 * NEGLIGIBLE:g} % (in c with its S)"
    handles.append(
        Line2D([], [], color=style.PRINTED_COLOUR, linewidth=0.7, linestyle=_LIMIT_DASHES, label=limit)
    )
    figure.legend(handles=handles, loc="lower left", ncol=2, bbox_to_anchor=(0.01, 0.0), columnspacing=1.2)
    looks = zip(sizes, _SIZE_LINES, _SIZE_MARKERS, _SIZE_FILLS, strict=False)
    swept = [
        Line2D([], [], color=style.MEASURED_COLOUR, linestyle=line, linewidth=0.9, marker=marker,
               markerfacecolor=fill, markersize=3.8, label=f"{height}×{width}")
        for (height, width, _), line, marker, fill in looks
    ]  # fmt: skip
    notes = [
        Line2D([], [], color=style.PRINTED_COLOUR, marker="x", linestyle="none", label="S of half and half"),
        Line2D([], [], color=style.PRINTED_COLOUR, linestyle=(0, (1, 1.5)), linewidth=0.9,
               label=f"S = {FEW_STEPS}, distilled models"),
    ]  # fmt: skip
    figure.legend(
        handles=swept + notes, loc="lower right", ncol=2, bbox_to_anchor=(1.0, 0.0), columnspacing=1.2,
        handlelength=2.6, title="c: points are whole videos, lines modelled", title_fontsize=7,
    )  # fmt: skip


# --- CodeCarbon ---------------------------------------------------------------------------------------------


def figure_codecarbon(
    table: pd.DataFrame, fit: ExtraWindow | None, board_power_W: float, short_window_s: float
) -> Figure:
    """CodeCarbon's GPU energy less the counter's, against the window's length: joules, and percent.

    Args:
        table: :func:`t2v_energy.analysis.instruments.codecarbon_table`.
        fit: of the same table; without one the figure says that there is no counter.
        board_power_W: for the bound that one unseen tick at the board's full power makes.
        short_window_s: length of a window to mark, the study's shortest.
    """
    style.apply()
    figure = Figure(figsize=(style.TEXT_WIDTH_INCH, 2.75))
    joules, percent = figure.subplots(1, 2)
    rows = table.dropna(subset=["difference_J"])
    if fit is None or not len(rows):
        for axes in (joules, percent):
            axes.text(0.5, 0.5, "no energy counter", ha="center", va="center", transform=axes.transAxes)
        return figure
    span = np.geomspace(min(short_window_s / 1.4, rows["window_s"].min()), rows["window_s"].max() * 1.2, 100)
    _difference_points(joules, rows, "difference_J", rows["counter_energy_J_ci95"])
    joules.axhline(fit.delta_s * fit.idle_power_W, color=style.FIT_COLOUR, linewidth=1.0)
    band = 1.96 * fit.scatter_J
    centre = fit.delta_s * fit.idle_power_W
    joules.axhspan(centre - band, centre + band, color=style.FIT_COLOUR, alpha=_BAND_ALPHA, linewidth=0)
    joules.set_ylabel("CodeCarbon − counter (J)")
    _difference_points(
        percent, rows, "difference_percent", 100 * rows["counter_energy_J_ci95"] / rows["counter_energy_J"]
    )
    expected, scatter = fit.percent(span), fit.scatter_percent(span)
    seen = span >= rows["window_s"].min()
    for part, line, alpha in ((seen, "solid", _BAND_ALPHA), (~seen, (0, (1, 1)), _BEYOND_ALPHA)):
        percent.plot(span[part], expected[part], color=style.FIT_COLOUR, linestyle=line)
        percent.fill_between(
            span[part], (expected - scatter)[part], (expected + scatter)[part], color=style.FIT_COLOUR,
            alpha=alpha, linewidth=0,
        )  # fmt: skip
    bound = worst_percent(float(rows["tick_s"].median()), board_power_W, span, fit.mean_power_W)
    for sign in (-1, 1):
        percent.plot(span, sign * bound, color=style.PRINTED_COLOUR, linestyle=(0, (1, 1.5)), linewidth=0.9)
    percent.axvline(short_window_s, color=style.PRINTED_COLOUR, linewidth=0.7, linestyle=(0, (4, 2)))
    percent.set_ylabel("CodeCarbon − counter (%)")
    tick_s = float(rows["tick_s"].median())
    limit = float(worst_percent(tick_s, board_power_W, _BOUND_FROM_S, fit.mean_power_W))
    percent.set_ylim(-limit, limit)
    percent.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    for axes, title in ((joules, "a  in joules"), (percent, "b  in percent")):
        axes.axhline(0, color=style.PRINTED_COLOUR, linewidth=0.5, zorder=1)
        _log_x(axes, _WINDOW_TICKS)
        axes.set_xlabel("Length of the window (s)")
        axes.set_title(title, loc="left", fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
    percent.set_xlim(span[0], span[-1])
    _codecarbon_legend(figure, fit, board_power_W, short_window_s)
    figure.subplots_adjust(left=0.08, right=0.985, bottom=0.32, top=0.92, wspace=0.25)
    return figure


def _difference_points(axes: Axes, rows: pd.DataFrame, column: str, half: pd.Series) -> None:
    axes.errorbar(
        rows["window_s"], rows[column], yerr=half, fmt="o", color=style.MEASURED_COLOUR, markersize=2.6,
        markeredgewidth=0, elinewidth=0.5, alpha=0.85, zorder=3,
    )  # fmt: skip


def _codecarbon_legend(figure: Figure, fit: ExtraWindow, board_power_W: float, short_window_s: float) -> None:
    milliseconds = (f"{round(1000 * x) + 0}" for x in (fit.delta_s, fit.low_s, fit.high_s))
    delta_ms, low, high = (text.replace("-", "−") for text in milliseconds)
    handles = [
        Line2D([], [], color=style.MEASURED_COLOUR, marker="o", markersize=2.8, linestyle="none",
               label="A record (bar: 95 % CI of the counter at the edges)"),
        Line2D([], [], color=style.FIT_COLOUR,
               label=f"Fit: {delta_ms} ms more at idle power (95 % CI {low} to {high} ms)"),
        Patch(color=style.FIT_COLOUR, alpha=_BAND_ALPHA, linewidth=0,
              label="1.96 standard deviations of scatter (paler: beyond the data)"),
        Line2D([], [], color=style.PRINTED_COLOUR, linestyle=(0, (1, 1.5)), linewidth=0.9,
               label=f"One unseen tick at {board_power_W:.0f} W"),
        Line2D([], [], color=style.PRINTED_COLOUR, linestyle=(0, (4, 2)), linewidth=0.7,
               label=f"{short_window_s:.1f} s: the study's shortest window"),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="lower center", ncol=2, bbox_to_anchor=(0.5, 0.0), columnspacing=1.6)
