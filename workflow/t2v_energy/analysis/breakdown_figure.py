"""Figures ``stages`` and ``codecarbon``: where the energy goes, and what CodeCarbon makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from t2v_energy.analysis import style
from t2v_energy.analysis.instruments import ExtraWindow, worst_percent
from t2v_energy.analysis.stages import (
    FEW_STEPS,
    measured_rows,
    once_and_step,
    other_share,
    row_at,
    stage_share,
)

STEP_SIZES = ((480, 832), (720, 1280))
FRAMES = 81
_PARTS = (
    ("vae_decode", style.OPERATOR_COLOURS["vae"], "VAE decoder"),
    ("text_encoder", style.OPERATOR_COLOURS["text_encoder"], "Text encoder"),
    ("rest", style.OPERATOR_COLOURS["embeddings"], "Scheduler, host and post-processing"),
)
# Operators have the colours; sizes differ by line and marker.
_SIZE_LINES: tuple[Any, ...] = ((0, (5, 1.5)), "solid")
_SIZE_MARKERS = ("o", "s")
_SIZE_FILLS = ("white", style.MEASURED_COLOUR)
_FIT_COLOUR = "#332288"
_PERCENT_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_STEP_TICKS = (1, 2, 5, 10, 20, 50, 100, 200)
_MEGAPIXEL_TICKS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_WINDOW_TICKS = (2, 5, 10, 20, 50, 100, 200, 500, 1000)


# --- stages -------------------------------------------------------------------------------------------------


def figure_stages(configurations: pd.DataFrame) -> Figure:
    """Share that is not the denoiser, percent: against pixels, frames and denoising steps S.

    Left and middle: 50 steps (as measured there), the GPU energy's share by stage, and of time the sum alone.
    Right: points are whole generations, lines are modelled from the sampled costs of the same size, once a
    video and a step (:class:`t2v_energy.analysis.stages.OnceAndStep`).  Energy gives way to time where a
    campaign has no counter.
    """
    style.apply()
    figure = Figure(figsize=(style.TEXT_WIDTH_INCH, 3.25))
    panels: Any = figure.subplots(1, 3, gridspec_kw={"width_ratios": (1, 1, 1.15)})
    quantity = "energy" if configurations["gpu_energy_Wh"].notna().any() else "time"
    sized = measured_rows(configurations, "resolution")
    sized = sized[(sized["num_frames"] == FRAMES)]
    _components(panels[0], sized["pixels"] / 1e6, sized, quantity)
    lengths = measured_rows(configurations, "frames")
    _components(panels[1], lengths["num_frames"], lengths, quantity)
    _steps(panels[2], configurations, quantity)
    _stage_axes(panels, quantity)
    _stage_legends(figure, quantity)
    figure.subplots_adjust(left=0.075, right=0.985, bottom=0.31, top=0.93, wspace=0.24)
    return figure


def _components(axes: Axes, x: pd.Series, rows: pd.DataFrame, quantity: str) -> None:
    """Share of each stage but the denoiser, and their sum, of whole videos."""
    if not len(rows):
        return
    marks: dict[str, Any] = {"marker": "o", "markersize": 2.6, "linewidth": 0.8}
    for stage, colour, _ in _PARTS:
        share = [100 * stage_share(row, stage, quantity) for _, row in rows.iterrows()]
        axes.plot(x, np.where(np.asarray(share) > 0, share, np.nan), color=colour, **marks)
    total = [100 * other_share(row, quantity) for _, row in rows.iterrows()]
    axes.plot(x, total, color=style.MEASURED_COLOUR, **(marks | {"markersize": 3.2}))
    if quantity == "energy":
        times = [100 * other_share(row, "time") for _, row in rows.iterrows()]
        hollow = {"marker": "o", "markersize": 3.4, "markerfacecolor": "none", "linestyle": "none"}
        axes.plot(x, times, color=style.MEASURED_COLOUR, markeredgewidth=0.6, **hollow)  # type: ignore[arg-type]


def _steps(axes: Axes, configurations: pd.DataFrame, quantity: str) -> None:
    """Whole generations as points, the modelled curve as a line, for each size."""
    whole, sampled = measured_rows(configurations, "steps"), measured_rows(configurations, "resolution")
    sampled = sampled[sampled["protocol"] == "sampled"]
    curve = np.geomspace(1, 200, 120)
    looks = zip(STEP_SIZES, _SIZE_LINES, _SIZE_MARKERS, _SIZE_FILLS, strict=True)
    for (height, width), line, marker, fill in looks:
        if (row := row_at(sampled, height, width, FRAMES)) is not None:
            model = once_and_step(row, quantity)
            axes.plot(
                curve,
                100 * model.other_share(curve),
                color=style.MEASURED_COLOUR,
                linestyle=line,
                linewidth=0.9,
            )
            axes.plot(
                [model.equal_steps], [50], marker="x", color=style.PRINTED_COLOUR, markersize=6,
                markeredgewidth=1.2, linestyle="none",
            )  # fmt: skip
        points = whole[(whole["height"] == height) & (whole["width"] == width)]
        share = [100 * other_share(point, quantity) for _, point in points.iterrows()]
        axes.plot(
            points["num_inference_steps"], share, marker=marker, color=style.MEASURED_COLOUR,
            markerfacecolor=fill, markersize=3.8, markeredgewidth=0.8, linestyle="none", zorder=4,
        )  # fmt: skip
    axes.axvline(FEW_STEPS, color=style.PRINTED_COLOUR, linewidth=0.9, linestyle=(0, (1, 1.5)))


def _stage_axes(panels: Any, quantity: str) -> None:
    of = "GPU energy" if quantity == "energy" else "Time"
    labels = ("Pixels of a frame (megapixels)", "Frames (720×1280)", "Denoising steps S (81 frames)")
    titles = ("a  by size, 50 steps", "b  by length, 50 steps", "c  by steps")
    for axes, label, title in zip(panels, labels, titles, strict=True):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator(_PERCENT_TICKS))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel(label)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
    for axes, ticks in ((panels[0], _MEGAPIXEL_TICKS), (panels[2], _STEP_TICKS)):
        _log_x(axes, ticks)
    panels[0].set_ylabel(f"{of} that is not the denoiser's (%)")
    low = min(axes.get_ylim()[0] for axes in panels[:2])
    for axes in panels[:2]:
        axes.set_ylim(max(low, 0.005), 40)
    panels[2].set_ylim(0.5, 100)
    panels[2].set_xlim(0.9, 230)


def _log_x(axes: Axes, ticks: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _stage_legends(figure: Figure, quantity: str) -> None:
    dot: dict[str, Any] = {"marker": "o", "markersize": 3.2, "linewidth": 0.8}
    handles = [Line2D([], [], color=style.MEASURED_COLOUR, label="All but the denoiser", **dot)]
    handles += [Line2D([], [], color=colour, label=label, **dot) for _, colour, label in _PARTS]
    if quantity == "energy":
        hollow = dot | {"markerfacecolor": "none", "linestyle": "none"}
        label = "All but the denoiser, of time"
        handles.append(Line2D([], [], color=style.MEASURED_COLOUR, label=label, **hollow))
    figure.legend(handles=handles, loc="lower left", ncol=2, bbox_to_anchor=(0.01, 0.0), columnspacing=1.2)
    looks = zip(STEP_SIZES, _SIZE_LINES, _SIZE_MARKERS, _SIZE_FILLS, strict=True)
    sizes = [
        Line2D([], [], color=style.MEASURED_COLOUR, linestyle=line, linewidth=0.9, marker=marker,
               markerfacecolor=fill, markersize=3.8, label=f"{height}×{width}")
        for (height, width), line, marker, fill in looks
    ]  # fmt: skip
    notes = [
        Line2D([], [], color=style.PRINTED_COLOUR, marker="x", linestyle="none", label="Half and half"),
        Line2D([], [], color=style.PRINTED_COLOUR, linestyle=(0, (1, 1.5)), linewidth=0.9,
               label=f"S = {FEW_STEPS}, distilled models"),
    ]  # fmt: skip
    figure.legend(
        handles=sizes + notes, loc="lower right", ncol=2, bbox_to_anchor=(1.0, 0.0), columnspacing=1.2,
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
    joules.axhline(fit.delta_s * fit.idle_power_W, color=_FIT_COLOUR, linewidth=1.0)
    band = 1.96 * fit.scatter_J
    centre = fit.delta_s * fit.idle_power_W
    joules.axhspan(centre - band, centre + band, color=_FIT_COLOUR, alpha=0.15, linewidth=0)
    joules.set_ylabel("CodeCarbon − counter (J)")
    _difference_points(
        percent, rows, "difference_percent", 100 * rows["counter_energy_J_ci95"] / rows["counter_energy_J"]
    )
    expected, scatter = fit.percent(span), fit.scatter_percent(span)
    percent.plot(span, expected, color=_FIT_COLOUR, linewidth=1.0)
    percent.fill_between(
        span, expected - scatter, expected + scatter, color=_FIT_COLOUR, alpha=0.15, linewidth=0
    )
    bound = worst_percent(float(rows["tick_s"].median()), board_power_W, span, fit.mean_power_W)
    for sign in (-1, 1):
        percent.plot(span, sign * bound, color=style.PRINTED_COLOUR, linestyle=(0, (1, 1.5)), linewidth=0.9)
    percent.axvline(short_window_s, color=style.PRINTED_COLOUR, linewidth=0.7, linestyle=(0, (4, 2)))
    percent.set_ylabel("CodeCarbon − counter (%)")
    limit = float(worst_percent(float(rows["tick_s"].median()), board_power_W, 8.0, fit.mean_power_W))
    percent.set_ylim(-limit, limit)
    for axes, title in ((joules, "a  in joules"), (percent, "b  in percent")):
        axes.axhline(0, color=style.PRINTED_COLOUR, linewidth=0.5, zorder=1)
        _log_x(axes, _WINDOW_TICKS)
        axes.set_xlabel("Length of the window (s)")
        axes.set_title(title, loc="left", fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
    percent.set_xlim(span[0], span[-1])
    _codecarbon_legend(figure, fit, board_power_W, short_window_s)
    figure.subplots_adjust(left=0.08, right=0.985, bottom=0.33, top=0.92, wspace=0.2)
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
        Line2D([], [], color=_FIT_COLOUR,
               label=f"Fit: {delta_ms} ms more at idle power (95 % CI {low} to {high} ms)"),
        Patch(color=_FIT_COLOUR, alpha=0.15, linewidth=0, label="1.96 standard deviations of scatter"),
        Line2D([], [], color=style.PRINTED_COLOUR, linestyle=(0, (1, 1.5)), linewidth=0.9,
               label=f"One unseen tick at {board_power_W:.0f} W"),
        Line2D([], [], color=style.PRINTED_COLOUR, linestyle=(0, (4, 2)), linewidth=0.7,
               label=f"{short_window_s:.1f} s: the study's shortest window"),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="lower center", ncol=2, bbox_to_anchor=(0.5, 0.0), columnspacing=1.6)
