"""What interventions save (figure 7), and what token merging saves by its settings (figure 8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, StrMethodFormatter

from t2v_energy.analysis import style

PANELS = {"energy": "GPU energy, with / without", "latency": "Latency, with / without"}
TICKS = (0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5)
CLOSE_TICKS = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.4, 1.7, 2)
"""Where the ratios of a panel reach from a half to 2 at most."""
ROW_INCH, MARGIN_INCH = 0.138, 0.75
LEAST_HEIGHT_INCH = 1.5
"""So that the margin has room for the longest name of a GPU."""
BEFORE_HEADER, AFTER_HEADER = 0.35, 1.3
"""Rows of space about a group's heading."""
LABEL_CHARACTERS, LABEL_LINES = 36, 3
MOST_COLUMNS = 5
"""Panels of figure 8 beside one another."""
BAND_INCH, BETWEEN_BANDS_INCH = 1.6, 0.9
"""Height of a line of panels; room for the labels of one band and the titles of the next."""
STRIDE_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
METHOD_MARKERS = {"3d": "o", "attnbin": "s"}
MODE_MARKERS = {"kv": "^", "q": "D"}
THROUGHPUT = "throughput"
MERGING_LABELS = {"energy": "GPU energy,\nwith / without", THROUGHPUT: "Videos an hour,\nwith / without"}


def figure_interventions(table: pd.DataFrame, title: str = "") -> Figure:
    """Ratios of GPU energy and latency of every row of interventions.csv, by model and size.

    Points are measured, with 95 % intervals; the bar across a thin line is what was predicted, with its 90 %
    interval. Within a group, rows are sorted by measured energy, or latency where there is no counter. Rows
    that have no baseline are left out; so is a panel that nothing was measured of.

    ``title`` stands for rows that have no data at all.
    """
    style.apply()
    known = table[np.isfinite(table["measured_latency_ratio"].astype(float))]
    if known.empty:
        return _nothing(title or "No intervention was measured beside the unmodified pipeline.")
    shown = [name for name in PANELS if known[f"measured_{name}_ratio"].notna().any()]
    groups = _groups(known, shown[0])
    lines = {name: _label(name) for name in known["intervention"]}
    space = len(groups) * (BEFORE_HEADER + AFTER_HEADER)
    rows = sum(len(lines[name]) for _, group in groups for name in group["intervention"]) + space
    height = max(rows * ROW_INCH + MARGIN_INCH, LEAST_HEIGHT_INCH)
    figure = Figure(figsize=(style.TEXT_WIDTH_INCH, height))
    grid: Any = figure.subplots(1, len(shown), squeeze=False, sharey=True)
    labels: list[tuple[float, str]] = []
    place = 0.0
    for heading, group in groups:
        place += BEFORE_HEADER
        _heading(grid[0], heading, place)
        place += AFTER_HEADER
        for _, row in group.iterrows():
            label = lines[str(row["intervention"])]
            middle = place + (len(label) - 1) / 2
            labels.append((middle, "\n".join(label)))
            for axes, name in zip(grid[0], shown, strict=True):
                _row(axes, row, name, middle)
            place += len(label)
    for axes, name in zip(grid[0], shown, strict=True):
        _ratio_axis(axes, known, name)
    first = grid[0][0]
    first.set_ylim(place - 0.4, -0.7)
    first.set_yticks([at for at, _ in labels], [label for _, label in labels])
    figure.legend(handles=_forest_handles(known), loc="lower center", ncols=2, bbox_to_anchor=(0.5, 0))
    figure.subplots_adjust(left=0.36, right=0.98, bottom=0.56 / height, top=1 - 0.06 / height, wspace=0.06)
    return figure


def _groups(known: pd.DataFrame, sorted_by: str) -> list[tuple[str, pd.DataFrame]]:
    found = []
    size = ["experiment", "model", "height", "width", "num_frames", "baseline_steps"]
    for (_, model, height, width, frames, steps), group in known.groupby(size, sort=True):
        heading = f"{model}, {height}×{width}, {frames} frames, {steps} steps"
        found.append((heading, group.sort_values(f"measured_{sorted_by}_ratio", kind="stable")))
    return found


def _label(name: str) -> list[str]:
    """A stack's names, as many on a line as fit; what does not fit into the last line is cut off."""
    lines: list[str] = []
    for part in name.split("+"):
        if lines and len(lines[-1]) + len(part) + 3 <= LABEL_CHARACTERS:
            lines[-1] += f" + {part}"
        else:
            lines.append(f"+ {part}" if lines else part)
    if len(lines) > LABEL_LINES:
        lines = [*lines[: LABEL_LINES - 1], f"{lines[LABEL_LINES - 1]} + …"]
    return [line if len(line) <= LABEL_CHARACTERS else line[: LABEL_CHARACTERS - 1] + "…" for line in lines]


def _heading(panels: Sequence[Axes], text: str, place: float) -> None:
    for axes in panels:
        axes.axhspan(place - 0.55, place + 0.55, color="#EEEEEE", linewidth=0)
    panels[0].annotate(
        text,
        (0, place),
        xycoords=("axes fraction", "data"),
        xytext=(-158, 0),
        textcoords="offset points",
        va="center",
        fontsize=7,
        fontweight="bold",
        annotation_clip=False,
    )


def _row(axes: Axes, row: pd.Series, name: str, place: float) -> None:
    measured, half = float(row[f"measured_{name}_ratio"]), float(row[f"measured_{name}_ratio_ci95"])
    if not np.isfinite(measured):
        return
    axes.errorbar(
        [measured],
        [place],
        xerr=[half] if np.isfinite(half) else None,
        fmt="o",
        color=style.MEASURED_COLOUR,
        markersize=3,
        elinewidth=0.9,
        zorder=4,
    )
    predicted = float(row[f"predicted_{name}_ratio"])
    if np.isfinite(predicted):
        ends = [float(row[f"predicted_{name}_ratio{end}"]) for end in ("_low", "_high")]
        axes.plot(ends, [place, place], color=style.FIT_COLOUR, linewidth=1.8, alpha=0.5, zorder=3)
        axes.plot([predicted], [place], "|", color=style.FIT_COLOUR, markersize=7, zorder=3)


def _ratio_axis(axes: Axes, known: pd.DataFrame, name: str) -> None:
    columns = [f"measured_{name}_ratio", f"predicted_{name}_ratio"]
    values = known[columns].astype(float).to_numpy().ravel()
    values = values[np.isfinite(values)]
    axes.axvline(1, color=style.PRINTED_COLOUR, linewidth=0.6)
    axes.set_xscale("log")
    low, high = min(values.min(), 1) / 1.12, max(values.max(), 1) * 1.12
    axes.set_xlim(low, high)
    close = low >= CLOSE_TICKS[0] and high <= CLOSE_TICKS[-1]
    axes.xaxis.set_major_locator(FixedLocator(CLOSE_TICKS if close else TICKS))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(PANELS[name])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _forest_handles(known: pd.DataFrame) -> list[Line2D]:
    handles = [
        Line2D([], [], color=style.MEASURED_COLOUR, marker="o", markersize=3, label="Measured (95 % CI)")
    ]
    if known[["predicted_energy_ratio", "predicted_latency_ratio"]].notna().to_numpy().any():
        colour = style.FIT_COLOUR
        when = " before measuring" if set(known["predicted"]) == {"registered"} else ""
        label = f"Predicted{when} (90 % interval)"
        handles.append(Line2D([], [], color=colour, marker="|", markersize=7, linewidth=1.8, label=label))
    return handles


def _nothing(text: str) -> Figure:
    figure = Figure(figsize=(style.TEXT_WIDTH_INCH, 1.0))
    figure.text(0.5, 0.5, text, ha="center", va="center")
    return figure


# --- token merging ------------------------------------------------------------------------------------------


def figure_merging(merging: pd.DataFrame) -> Figure:
    """GPU energy and throughput with token merging over the merged share of the sources.

    One column of panels for each model and size, and each choice of blocks. Colours are strides, markers
    methods (or the mode, where it is not ``hidden``), their filling how tokens are matched. Lines join
    settings that differ in the ratio alone. Bars are 95 % intervals.
    """
    style.apply()
    if merging.empty:
        return _nothing("No token merging was measured beside the unmodified pipeline.")
    columns = _panels(merging)
    shown = ["energy"] if merging["measured_energy_ratio"].notna().any() else []
    shown += [THROUGHPUT]
    strides = {stride: STRIDE_COLOURS[i % len(STRIDE_COLOURS)] for i, stride in enumerate(_strides(merging))}
    across = min(len(columns), MOST_COLUMNS)
    bands = -(-len(columns) // across)
    height = BAND_INCH * bands * len(shown) + BETWEEN_BANDS_INCH * (bands - 1) + 1.35
    figure = Figure(figsize=(style.TEXT_WIDTH_INCH, height))
    grid = _band_grid(figure, bands, len(shown), across)
    ratios = sorted(set(merging["ratio"]))
    for index, (title, rows) in enumerate(columns):
        band, column = divmod(index, across)
        own = grid[band * len(shown) : (band + 1) * len(shown), column]
        for axes, name in zip(own, shown, strict=True):
            _merging_panel(axes, rows, name, strides)
            axes.set_xlim(ratios[0] - 0.08, ratios[-1] + 0.08)
            axes.xaxis.set_major_locator(FixedLocator(ratios))
            if column == 0:
                axes.set_ylabel(MERGING_LABELS[name])
        own[0].set_title(title, loc="left", fontsize=7)
        own[-1].set_xlabel("Merged share ρ")
    for axes in grid.ravel():
        axes.set_visible(bool(axes.lines))
    _share_limits(grid, shown)
    figure.legend(
        handles=_merging_handles(merging, strides), loc="lower center", ncols=5, columnspacing=1.0,
        bbox_to_anchor=(0.5, 0),
    )  # fmt: skip
    return figure


def _band_grid(figure: Figure, bands: int, lines: int, across: int) -> Any:
    """Panels by line and column; between two bands is room for titles and for the labels of an axis."""
    height = figure.get_size_inches()[1]
    outer = figure.add_gridspec(
        bands, 1, left=0.105, right=0.985, bottom=0.88 / height, top=1 - 0.42 / height,
        hspace=BETWEEN_BANDS_INCH / (BAND_INCH * lines),
    )  # fmt: skip
    inner = [outer[band].subgridspec(lines, across, wspace=0.1, hspace=0.14) for band in range(bands)]
    return np.concatenate([own.subplots(squeeze=False) for own in inner])


def _share_limits(grid: Any, shown: Sequence[str]) -> None:
    """One scale for each quantity; numbers at the left, and ratios below, alone."""
    for line, name in enumerate(shown):
        panels = [axes for row in grid[line :: len(shown)] for axes in row if axes.lines]
        ends = [axes.get_ylim() for axes in panels]
        for axes in panels:
            axes.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
            axes.spines[["top", "right"]].set_visible(False)
            if axes not in grid[:, 0]:
                axes.tick_params(labelleft=False)
            if name != shown[-1]:
                axes.tick_params(labelbottom=False)


def _strides(merging: pd.DataFrame) -> list[str]:
    """By rising size of their cells."""
    return sorted(set(merging["stride"]), key=lambda stride: (np.prod(_sides(stride)), stride))


def _sides(stride: str) -> list[int]:
    return [int(side) for side in stride.split("×")]


def _panels(merging: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    keys = ["model", "height", "width", "num_frames", "blocks"]
    return [
        (f"{model}\n{height}×{width}×{frames}\nblocks: {blocks}", rows)
        for (model, height, width, frames, blocks), rows in merging.groupby(keys, sort=True)
    ]


def _merging_panel(axes: Axes, rows: pd.DataFrame, name: str, strides: dict[str, str]) -> None:
    axes.axhline(1, color=style.PRINTED_COLOUR, linewidth=0.6)
    column = "throughput_ratio" if name == THROUGHPUT else "measured_energy_ratio"
    for (stride, method, mode, every, metric), own in rows.groupby(
        ["stride", "method", "mode", "match_every", "metric"], sort=True
    ):
        ordered = own.sort_values("ratio")
        axes.errorbar(
            ordered["ratio"] + _aside(str(method), str(mode)),
            ordered[column],
            yerr=_half_widths(ordered, name),
            marker=_marker(str(method), str(mode)),
            color=strides[str(stride)],
            **_filling(strides[str(stride)], int(str(every)), str(metric)),
            linestyle="--" if method == "attnbin" else "-",
            linewidth=0.8,
            markersize=3.5,
            elinewidth=0.7,
        )


def _aside(method: str, mode: str) -> float:
    """A little to the side, so that points of like settings are seen beside one another."""
    return {"3d": -0.012, "attnbin": 0.012}[method] + {"kv": -0.03, "q": 0.03}.get(mode, 0.0)


def _marker(method: str, mode: str) -> str:
    return MODE_MARKERS.get(mode, METHOD_MARKERS[method])


def _filling(colour: str, match_every: int, metric: str) -> dict[str, Any]:
    """Of a marker: none where a matching serves several steps, the left half where head means are matched."""
    return {
        "markerfacecolor": "white" if match_every > 1 else colour,
        "markerfacecoloralt": "white",
        "fillstyle": "full" if metric == "hidden" else "left",
    }


def _half_widths(rows: pd.DataFrame, name: str) -> Sequence[float]:
    """Of throughput, the reciprocal's: half-width over the square of the latency ratio."""
    if name != THROUGHPUT:
        return list(rows["measured_energy_ratio_ci95"].astype(float).fillna(0))
    half = rows["measured_latency_ratio_ci95"].astype(float) / rows["measured_latency_ratio"] ** 2
    return list(half.fillna(0))


def _merging_handles(merging: pd.DataFrame, strides: dict[str, str]) -> list[Line2D]:
    handles = [Line2D([], [], color=colour, label=f"cells {stride}") for stride, colour in strides.items()]
    grey: dict[str, Any] = {"color": style.PRINTED_COLOUR, "markersize": 3.5, "linewidth": 0.8}
    hidden = merging[merging["mode"] == "hidden"]
    for method in sorted(set(hidden["method"])):
        dashes = "--" if method == "attnbin" else "-"
        handles.append(Line2D([], [], marker=METHOD_MARKERS[method], linestyle=dashes, label=method, **grey))
    for mode in sorted(set(merging["mode"]) - {"hidden"}):
        handles.append(Line2D([], [], marker=MODE_MARKERS[mode], linestyle="", label=f"mode {mode}", **grey))
    several, means = merging["match_every"] > 1, merging["metric"] != "hidden"
    for shown, label, every, metric in (
        (several.any(), "matched once for k steps", 2, "hidden"),
        (means.any(), "matched by head means", 1, "head-mean"),
    ):
        if shown:
            filling = _filling(style.PRINTED_COLOUR, every, metric)
            handles.append(Line2D([], [], marker="o", linestyle="", label=label, **grey, **filling))
    return handles
