"""Figure ``exponents``: how latency grows with the tokens, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter

from t2v_energy.analysis import style
from t2v_energy.analysis.scaling import (
    TILE_TOKENS,
    TOKEN_SETS,
    Array,
    Campaign,
    RegimeSet,
    all_regimes,
    find_regimes,
    step_flop,
)

QUANTITY = "latency_s"
CURVE_POINTS = 200
_MARGIN = 1.12
KILOTOKEN_TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
_MARKERS: Mapping[str, tuple[str, str, str]] = {
    "resolution": ("o", style.MEASURED_COLOUR, "Measured, size to size"),
    "frames": ("^", style.SECOND_COLOUR, "Measured, length to length"),
}
_DASHES = (0, (4, 2))
_DOTS = (0, (1, 1.5))
_PANELS = ("a  how latency grows", "b  what it is made of", "c  measured less fitted")
_QUADRATIC = style.OPERATOR_COLOURS["self_attention"]
_PARTS = (
    ("Constant", "#A0A0A0", "black"),
    ("Linear:\nall other layers", "#DDDDDD", "black"),
    ("Quadratic: attention over the video", _QUADRATIC, "white"),
)


def figure_exponents(campaign: Campaign, scaling: pd.DataFrame) -> Figure:
    """The figure: a, the local exponent of latency over tokens; b, parts of latency; c, residuals and tiles.

    a: points are the pairs of ``scaling`` (scaling.csv), about a factor of two apart, whose ends are both
    on the grid of tiles or both off it; each stands at its geometric middle.  The solid line follows from
    the fitted regimes (off the grid), the dashed one from counted FLOP of the denoiser.  b: the parts of the
    same fit.  c: measured latency against the fitted cost of a token count off the grid of
    :data:`TILE_TOKENS`, and by a line what the fit has counts on the grid save.  Curves end with the
    measured token counts.  A campaign without a fit shows its points alone.
    """
    style.apply()
    figure = Figure(figsize=(style.TEXT_WIDTH_INCH, 3.75))
    grid: Any = figure.add_gridspec(2, 2, width_ratios=(1.08, 1), height_ratios=(1.75, 1))
    left = figure.add_subplot(grid[:, 0])
    shares, tiles = figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 1])
    regimes = _regimes(campaign)
    span = _token_span(campaign)
    _exponents(left, campaign, scaling, regimes, span)
    _shares(shares, campaign, regimes, span)
    _tiles(tiles, regimes)
    for axes in (left, shares, tiles):
        axes.set_xscale("log")
        axes.set_xlim(span[0] / 1e3, span[1] / 1e3)
        axes.xaxis.set_major_locator(FixedLocator(KILOTOKEN_TICKS))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.spines[["top", "right"]].set_visible(False)
    for axes, title in zip((left, shares, tiles), _PANELS, strict=True):
        axes.set_title(title, loc="left", fontweight="bold", pad=4)
    for axes in (left, tiles):
        axes.set_xlabel("Tokens that the denoiser sees (thousands)")
    shares.tick_params(labelbottom=False)
    figure.align_ylabels([shares, tiles])
    figure.subplots_adjust(left=0.07, right=0.985, bottom=0.11, top=0.945, wspace=0.2, hspace=0.33)
    return figure


def _regimes(campaign: Campaign) -> RegimeSet | None:
    """Of both sets together, else of the only one."""
    found = all_regimes(campaign)
    for name in ("+".join(TOKEN_SETS), *TOKEN_SETS):
        if (regimes := find_regimes(found, name, QUANTITY)) is not None:
            return regimes
    return None


def _token_span(campaign: Campaign) -> tuple[float, float]:
    tokens = [float(n) for name in TOKEN_SETS for n in campaign.of(name)["tokens"]]
    return (min(tokens) / _MARGIN, max(tokens) * _MARGIN) if tokens else (1e3, 1e6)


def _curve(span: tuple[float, float]) -> Array:
    """Token counts of a curve, to the axis' edges less the margin that :func:`_token_span` adds."""
    return np.geomspace(span[0] * _MARGIN, span[1] / _MARGIN, CURVE_POINTS)


def _exponents(
    axes: Axes,
    campaign: Campaign,
    scaling: pd.DataFrame,
    regimes: RegimeSet | None,
    span: tuple[float, float],
) -> None:
    tokens = _curve(span)
    # each label where its line has no points: small videos are nearly linear, large ones nearly quadratic
    labels = ((1, "linear: ×2 a doubling", 0.985, "right"), (2, "quadratic: ×4 a doubling", 0.015, "left"))
    for level, label, place, side in labels:
        axes.axhline(level, color=style.PRINTED_COLOUR, linewidth=0.7, linestyle=_DOTS)
        axes.text(
            place, level + 0.015, label, transform=axes.get_yaxis_transform(), fontsize=7,
            color=style.PRINTED_COLOUR, ha=side,
        )  # fmt: skip
    flop = step_flop(campaign.model)
    axes.plot(
        tokens / 1e3,
        flop.exponent(tokens),
        color=style.FIT_COLOUR,
        linestyle=_DASHES,
        label="Counted FLOP of the denoiser",
    )
    if regimes is not None:
        axes.plot(
            tokens / 1e3,
            regimes.fit.exponent(tokens),
            color=style.FIT_COLOUR,
            label="Fitted to latency (parts: b)",
        )
    chosen = scaling[(scaling["quantity"] == QUANTITY) & (scaling["x"] == "tokens")]
    for name, (marker, colour, label) in _MARKERS.items():
        points = chosen[(chosen["set"] == name) & (chosen["kind"] == "pair")]
        points = points[points["same_tiles"].eq(True)]
        if points.empty:
            continue
        axes.errorbar(
            points["x_centre"] / 1e3,
            points["exponent"],
            yerr=(points["exponent"] - points["exponent_ci95_low"]).fillna(0),
            fmt=marker,
            color=colour,
            label=label,
            markersize=3.6,
            markeredgecolor="white",
            markeredgewidth=0.4,
            elinewidth=0.7,
            zorder=4,
        )
    defaults = campaign.model.defaults
    same = campaign.rows[
        (campaign.rows["height"] == defaults.height)
        & (campaign.rows["width"] == defaults.width)
        & (campaign.rows["num_frames"] == defaults.num_frames)
    ]
    if len(same) and regimes is not None:
        default = float(same["tokens"].iloc[0])
        value = float(regimes.fit.exponent(default))
        axes.annotate(
            f"default setting:\n{value:.2f}",
            (default / 1e3, value),
            xytext=(8, -26),
            textcoords="offset points",
            fontsize=7,
            color=style.FIT_COLOUR,
            va="top",
            ha="center",
            arrowprops={"arrowstyle": "-", "color": style.FIT_COLOUR, "linewidth": 0.7, "shrinkB": 3},
        )
    axes.set_ylim(0.9, 2.1)
    axes.set_ylabel("Local exponent of latency over tokens")
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.0, 0.13), labelspacing=0.3, handlelength=2.0, borderaxespad=0.2
    )


def _shares(axes: Axes, campaign: Campaign, regimes: RegimeSet | None, span: tuple[float, float]) -> None:
    axes.set_ylim(0, 100)
    axes.set_ylabel("Part of latency (%)")
    if regimes is None:
        return
    tokens = _curve(span)
    parts = regimes.fit.parts(tokens, False)
    percent = 100 * parts / parts.sum(axis=0)
    axes.stackplot(tokens / 1e3, percent, colors=[colour for _, colour, _ in _PARTS], linewidth=0)
    axes.plot(
        tokens / 1e3,
        100 * (1 - step_flop(campaign.model).quadratic_share(tokens)),
        color="black",
        linestyle=_DASHES,
        linewidth=0.9,
    )
    axes.grid(False)
    axes.set_axisbelow(False)  # ticks in front of the areas
    places = ((0.05, 0.03, "left", "bottom"), (0.05, 0.24, "left", "center"), (0.955, 0.9, "right", "center"))
    for (label, _, ink), (x, y, side, height) in zip(_PARTS, places, strict=True):
        axes.text(x, y, label, transform=axes.transAxes, color=ink, fontsize=7, ha=side, va=height)
    note = "dashed: the same border of FLOP"
    axes.text(0.955, 0.79, note, transform=axes.transAxes, color="white", fontsize=7, ha="right", va="center")


def _tiles(axes: Axes, regimes: RegimeSet | None) -> None:
    axes.set_ylabel("Residual (%)")
    axes.axhline(0, color=style.PRINTED_COLOUR, linewidth=0.6)
    if regimes is None:
        return
    rows = regimes.rows
    error = 100 * (rows[QUANTITY] / regimes.fit.cost(rows["tokens"], False) - 1)
    whole = rows["whole_tiles"].to_numpy()
    marks: dict[str, Any] = {"marker": "o", "markersize": 3.2, "markeredgewidth": 0.8, "linestyle": "none"}
    for mask, face, label in (
        (whole, "white", f"multiples of {TILE_TOKENS}"),
        (~whole, style.MEASURED_COLOUR, "other token counts"),
    ):
        if mask.any():
            axes.plot(
                rows["tokens"][mask] / 1e3,
                error[mask],
                markerfacecolor=face,
                markeredgecolor=style.MEASURED_COLOUR,
                label=label,
                **marks,
            )
    if regimes.fit.ragged_fitted:
        tokens = np.geomspace(rows["tokens"].min(), rows["tokens"].max(), CURVE_POINTS)
        saved = 100 * (regimes.fit.cost(tokens, True) / regimes.fit.cost(tokens, False) - 1)
        axes.plot(tokens / 1e3, saved, color=style.FIT_COLOUR, zorder=1, label="fitted to multiples")
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.45 * (high - low), high)  # room for the legend below the points
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.legend(
        loc="lower left", ncol=2, handlelength=1.4, handletextpad=0.4, columnspacing=1.0, borderaxespad=0.1,
        labelspacing=0.3,
    )  # fmt: skip
