"""The numbers of the paper's text about scaling laws, from the tables of ``scaling`` and ``efficiency``.

Keys begin with ``scaling``, ``regimes``, ``doubling``, ``efficiency`` or ``power``.  A number that a campaign
cannot give is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, isfinite

import pandas as pd

from t2v_energy.analysis.numbers import Kind, Number, Source, decimals, with_half_width
from t2v_energy.analysis.scaling import (
    PASS_QUANTITY,
    TILE_TOKENS,
    TOKEN_SETS,
    VIDEO_QUANTITIES,
    Campaign,
    all_regimes,
    find_regimes,
)
from t2v_energy.work import wan, wan_latent_shape

Numbers = dict[str, Number]
TABLES = ("scaling", "regime_fits", "regimes", "doubling", "efficiency", "power", "steps")
NEARLY_QUADRATIC = 1.9
BOTH = "+".join(TOKEN_SETS)


@dataclass(frozen=True)
class _Part:
    """One table with the file that it is written to; makes numbers whose source is a row of it."""

    table: pd.DataFrame
    file: str

    def number(
        self,
        row: pd.Series,
        column: str,
        where: str,
        *,
        unit: str = "",
        kind: Kind = "modelled",
        ends: tuple[str, str] | None = None,
        factor: float = 1.0,
        significant: int = 3,
    ) -> Number | None:
        """The value of a cell; None where it is empty, without an interval where that is."""
        value = factor * float(row[column])
        if not isfinite(value):
            return None
        interval = None
        if ends is not None:
            low, high = (factor * float(row[end]) for end in ends)
            interval = (low, high) if isfinite(low) and isfinite(high) else None
        return Number(
            value, unit, kind, Source(self.file, where, column), interval, decimals(value, significant)
        )


def scaling_numbers(campaign: Campaign, tables: Mapping[str, pd.DataFrame], folder: str) -> Numbers:
    """Every number of the part ``scaling``.

    Args:
        campaign: the measured rows.
        tables: by name, :data:`TABLES`; ``folder`` is where they are written.
    """
    parts = {name: _Part(tables[name], f"{folder}/{name}.csv") for name in TABLES}
    found: dict[str, Number | None] = {}
    found |= _exponents(parts["scaling"])
    found |= _scatter(campaign)
    found |= _steps(parts["steps"])
    found |= _coefficients(parts["regime_fits"])
    found |= _default_size(campaign, parts["regimes"])
    found |= _thresholds(campaign, parts["regime_fits"].file)
    found |= _doublings(parts["doubling"])
    found |= _efficiencies(parts["efficiency"])
    found |= _powers(parts["power"])
    return {key: number for key, number in found.items() if number is not None}


def _short(quantity: str) -> str:
    return quantity.rsplit("_", 1)[0]


def _key(text: str) -> str:
    """A size or range as part of a key: no signs that typst or JSON paths would trip over."""
    for old, new in (("×", "x"), (" = ", ""), (", ", "."), (" to ", "."), (" ", "_")):
        text = text.replace(old, new)
    return text


def _exponents(part: _Part) -> dict[str, Number | None]:
    """Global exponents, with straight line against parabola; those of all pairs, and the extreme ones."""
    found: dict[str, Number | None] = {}
    ends = ("exponent_ci95_low", "exponent_ci95_high")
    table = part.table
    # over tokens resolution's exponents are those over pixels
    wanted = table[(table["x"] != "pixels") & table["quantity"].isin(VIDEO_QUANTITIES)]
    for _, row in wanted[wanted["kind"] != "window"].iterrows():
        where = f"{row['set']}, {row['quantity']}, {row['x']}, {row['range']}"
        over = "over_frames" if row["x"] == "num_frames" else ""
        prefix = ".".join(filter(None, ("scaling", row["set"], _short(row["quantity"]), over)))
        kind: Kind = "measured" if row["kind"] == "pair" else "modelled"
        key = f"{prefix}.{_key(row['range'])}"
        found[key] = part.number(row, "exponent", where, ends=ends, kind=kind)
        if row["kind"] == "global":
            found[f"{key}.points"] = part.number(row, "n", where, kind="constant", significant=1)
            for column in ("r2_linear", "r2_quadratic"):
                found[f"{key}.{column}"] = part.number(row, column, where, significant=4)
            gain = row.copy()
            gain["aic_linear − aic_quadratic"] = row["aic_linear"] - row["aic_quadratic"]
            found[f"{key}.aic_gain"] = part.number(gain, "aic_linear − aic_quadratic", where)
    # between a token count on the grid of tiles and one off it, the grid would show in the exponent
    alike = wanted["same_tiles"].eq(True)
    pairs = wanted[(wanted["kind"] == "pair") & (wanted["x"] == "tokens") & alike]
    for (name, quantity), group in pairs.groupby(["set", "quantity"]):
        ordered = group.sort_values("x_centre")
        for label, place in (("smallest", 0), ("next_largest", -2), ("largest", -1)):
            if len(ordered) < -place:
                continue
            row = ordered.iloc[place]
            where = f"{name}, {quantity}, tokens, {row['range']}"
            prefix = f"scaling.{name}.{_short(str(quantity))}.{label}"
            found[prefix] = part.number(row, "exponent", where, ends=ends, kind="measured")
            source = Source(part.file, where, "range")
            found[f"{prefix}.range"] = Number(str(row["range"]), "", "constant", source)
        prefix = f"scaling.{name}.{_short(str(quantity))}"
        source = Source(part.file, f"{name}, {quantity}, tokens, pairs", "exponent_ci95_high ≥ 2")
        reach = int((ordered["exponent_ci95_high"] >= 2).sum())
        found[f"{prefix}.reach_two"] = Number(reach, "", "measured", source)
        source = Source(part.file, f"{name}, {quantity}, tokens, pairs", "rows")
        found[f"{prefix}.pairs"] = Number(len(ordered), "", "constant", source)
    return found


def _scatter(campaign: Campaign) -> dict[str, Number | None]:
    """What passes and boards add to an interval (standard deviations)."""
    found: dict[str, Number | None] = {}
    for quantity, scatter in campaign.scatter.items():
        values = {"passes": (scatter.rest, scatter.rest_df), "boards": (scatter.board, scatter.board_df)}
        for name, (value, freedom) in values.items():
            if isfinite(value):
                where = f"configurations measured more than once, {freedom} degrees of freedom"
                source = Source(campaign.source, where, f"{quantity}_pass_means: {name}")
                key = f"scaling.scatter.{name}.{_short(quantity)}"
                found[key] = Number(100 * value, "%", "measured", source, digits=decimals(100 * value, 2))
    return found


def _steps(part: _Part) -> dict[str, Number | None]:
    """Cost = once + per step · S, its residuals and its curvature, by size."""
    found: dict[str, Number | None] = {}
    for _, row in part.table.iterrows():
        where = f"{row['height']}×{row['width']}, {row['quantity']}"
        prefix = f"scaling.steps.{row['height']}x{row['width']}.{_short(row['quantity'])}"
        for name, unit in (("once", row["unit"]), ("per_step", row["unit"]), ("curvature_percent", "%")):
            value, half = float(row[name]), float(row[f"{name}_ci95"])
            if isfinite(value):
                source = Source(part.file, where, name)
                found[f"{prefix}.{name}"] = with_half_width(value, half, str(unit), "modelled", source)
        for name in ("once_direct", "per_step_direct"):
            found[f"{prefix}.{name}"] = part.number(
                row, name, where, unit=str(row["unit"]), kind="measured", significant=4
            )
        found[f"{prefix}.largest_residual"] = part.number(
            row, "largest_residual_percent", where, unit="%", significant=2
        )
        found[f"{prefix}.r2"] = part.number(row, "r2", where, significant=6)
    return found


def _coefficients(part: _Part) -> dict[str, Number | None]:
    """Coefficients of a step's time, the rates that they imply, and how well they fit."""
    found: dict[str, Number | None] = {}
    rate_ends = ("rate_ci95_low", "rate_ci95_high")
    for _, row in part.table[part.table["quantity"] == "step_time_s"].iterrows():
        where = f"{row['set']}, {row['attention_kernel']}, step_time_s, {row['model']}, {row['coefficient']}"
        group = f"kernels.{row['attention_kernel']}" if row["set"] == "kernels" else _set_key(row["set"])
        prefix = f"regimes.{group}.{row['model']}"
        name = str(row["coefficient"]).replace("+", "_")
        if name in ("linear", "quadratic", "quadratic_ragged"):
            found[f"{prefix}.{name}_rate"] = part.number(
                row, "rate_TFLOP_per_s", where, unit="TFLOP/s", ends=rate_ends
            )
        if name == "constant":
            ends = ("ci95_low", "ci95_high")
            found[f"{prefix}.constant"] = part.number(
                row, "value", where, unit="ms", factor=1000, ends=ends, significant=2
            )
            for column in ("rms_residual_percent", "largest_residual_percent"):
                key = f"{prefix}.{column.removesuffix('_percent')}"
                found[key] = part.number(row, column, where, unit="%", significant=2)
            found[f"{prefix}.points"] = part.number(row, "n", where, kind="constant", significant=1)
    return found


def _set_key(name: str) -> str:
    return "all" if "+" in name else name


def _default_size(campaign: Campaign, part: _Part) -> dict[str, Number | None]:
    """Shares and exponents at the model's default size."""
    found: dict[str, Number | None] = {}
    d, table = campaign.model.defaults, part.table
    chosen = table[
        (table["set"] != "kernels")
        & (table["height"] == d.height)
        & (table["width"] == d.width)
        & (table["num_frames"] == d.num_frames)
    ].drop_duplicates(["set", "quantity"])
    for _, row in chosen.iterrows():
        where = f"{row['set']}, {row['quantity']}, {row['height']}×{row['width']}×{row['num_frames']}"
        prefix = f"regimes.default.{_set_key(row['set'])}.{_short(row['quantity'])}"
        for share in ("constant", "linear", "quadratic"):
            found[f"{prefix}.{share}_share"] = part.number(
                row, f"{share}_share", where, unit="%", factor=100, significant=2
            )
        found[f"{prefix}.exponent"] = part.number(row, "exponent_fit", where)
        found["regimes.default.exponent_flop"] = part.number(row, "exponent_flop", where)
        found["regimes.default.quadratic_flop_share"] = part.number(
            row, "quadratic_flop_share", where, unit="%", factor=100, significant=2
        )
        found["regimes.default.tokens"] = part.number(row, "tokens", where, kind="constant", significant=1)
    return found


def _thresholds(campaign: Campaign, file: str) -> dict[str, Number | None]:
    """Tokens (and frames of the default size) at which the exponent reaches 1.9; what ragged tokens cost."""
    found: dict[str, Number | None] = {}
    fitted = all_regimes(campaign)
    d = campaign.model.defaults
    latent = wan_latent_shape(campaign.model, d.height, d.width, d.num_frames)
    each = wan.token_count(campaign.model.components["transformer"].config, 1, *latent[1:])
    found["regimes.tile_tokens"] = Number(
        TILE_TOKENS, "", "constant", Source("t2v_energy.analysis.scaling", "TILE_TOKENS", "value")
    )
    for name in (*TOKEN_SETS, BOTH):
        for quantity in PASS_QUANTITY:
            regimes = find_regimes(fitted, name, quantity)
            if regimes is None:
                continue
            prefix = f"regimes.{_set_key(name)}.{_short(quantity)}"
            where = f"{name}, {regimes.attention_kernel}, {quantity}, {regimes.model}"
            tokens = regimes.fit.tokens_at(NEARLY_QUADRATIC)
            if isfinite(tokens):
                source = Source(file, where, f"exponent = {NEARLY_QUADRATIC}")
                found[f"{prefix}.tokens_nearly_quadratic"] = Number(
                    round(tokens, -3), "tokens", "modelled", source
                )
                frames = 4 * ceil(tokens / each - 1) + 1  # the pipeline makes 4k + 1
                found[f"{prefix}.frames_nearly_quadratic"] = Number(frames, "frames", "modelled", source)
            if regimes.fit.ragged_fitted:
                source = Source(file, where, "ragged over whole at the most tokens")
                most = float(regimes.rows["tokens"].max())
                extra = 100 * float(regimes.fit.cost(most, False) / regimes.fit.cost(most, True) - 1)
                found[f"{prefix}.ragged_extra"] = Number(extra, "%", "modelled", source, digits=1)
                c = regimes.fit.coefficients
                if c[2] > 0:
                    source = Source(file, where, "ragged / quadratic")
                    value = 100 * float(c[3] / c[2])
                    found[f"{prefix}.ragged_quadratic_extra"] = Number(
                        value, "%", "modelled", source, digits=1
                    )
    return found


def _doublings(part: _Part) -> dict[str, Number | None]:
    """Every measured doubling, and the least and largest of each dimension."""
    found: dict[str, Number | None] = {}
    ends = ("ratio_ci95_low", "ratio_ci95_high")
    for _, row in part.table.iterrows():
        where = f"{row['dimension']}, {row['from']} to {row['to']}, {row['quantity']}"
        prefix = f"doubling.{_key(row['dimension'])}.{_key(row['from'])}"
        found[f"{prefix}.{_short(row['quantity'])}"] = part.number(
            row, "ratio", where, kind="measured", ends=ends
        )
        found[f"{prefix}.flop"] = part.number(row, "ratio_flop", where)
        found[f"{prefix}.study"] = part.number(row, "ratio_study", where, kind="constant", significant=1)
    for (dimension, quantity), group in part.table.groupby(["dimension", "quantity"]):
        prefix = f"doubling.{_key(str(dimension))}"
        for label, place in (("least", group["ratio"].argmin()), ("most", group["ratio"].argmax())):
            row = group.iloc[int(place)]
            where = f"{dimension}, {row['from']} to {row['to']}, {quantity}"
            key = f"{prefix}.{label}.{_short(str(quantity))}"
            found[key] = part.number(row, "ratio", where, kind="measured", ends=ends)
            source = Source(part.file, where, "from, to")
            found[f"{key}.range"] = Number(f"{row['from']} to {row['to']}", "", "constant", source)
        where = f"{dimension}, {quantity}"
        found[f"{prefix}.pairs"] = Number(len(group), "", "constant", Source(part.file, where, "rows"))
    return found


def _efficiencies(part: _Part) -> dict[str, Number | None]:
    found: dict[str, Number | None] = {}
    for _, row in part.table.iterrows():
        where = f"{row['set']}, {row['attention_kernel']}, {row['count']}, {row['regression']}"
        group = f"kernels.{row['attention_kernel']}" if row["set"] == "kernels" else _set_key(row["set"])
        prefix = f"efficiency.{group}.{row['count']}.{row['regression']}"
        ends = ("efficiency_ci95_low", "efficiency_ci95_high")
        found[prefix] = part.number(row, "efficiency", where, ends=ends)
        digits = 4 if float(row["r2"]) > 0.99 else 3
        found[f"{prefix}.r2"] = part.number(row, "r2", where, significant=digits)
        found[f"{prefix}.largest_error"] = part.number(
            row, "largest_error_percent", where, unit="%", significant=2
        )
        if row["regression"] == "intercept":
            source = Source(part.file, where, "intercept_s")
            value, half = float(row["intercept_s"]), float(row["intercept_s_ci95"])
            found[f"{prefix}.seconds"] = with_half_width(value, half, "s", "modelled", source)
    return found


def _powers(part: _Part) -> dict[str, Number | None]:
    found: dict[str, Number | None] = {}
    columns: Mapping[str, tuple[str, str, Kind, int]] = {
        "mean": ("mean_W", "W", "measured", 3),
        "least": ("least_W", "W", "measured", 3),
        "most": ("most_W", "W", "measured", 3),
        "variation": ("variation_percent", "%", "measured", 2),
        "r2": ("r2", "", "modelled", 6),
        "limit": ("max_power_W", "W", "constant", 3),
        "limit_error_mean": ("max_power_error_mean_percent", "%", "modelled", 2),
        "limit_error_least": ("max_power_error_least_percent", "%", "modelled", 2),
        "limit_error_most": ("max_power_error_most_percent", "%", "modelled", 2),
    }
    for _, row in part.table.iterrows():
        where = f"{row['set']}, {row['attention_kernel']}"
        group = f"kernels.{row['attention_kernel']}" if row["set"] == "kernels" else _set_key(row["set"])
        prefix = f"power.{group}"
        for name, (column, unit, kind, significant) in columns.items():
            found[f"{prefix}.{name}"] = part.number(
                row, column, where, unit=unit, kind=kind, significant=significant
            )
        ends = ("regression_W_ci95_low", "regression_W_ci95_high")
        found[f"{prefix}.regression"] = part.number(
            row, "regression_W", where, unit="W", ends=ends, significant=4
        )
        source = Source(part.file, where, "slope_W_per_decade")
        value, half = float(row["slope_W_per_decade"]), float(row["slope_W_per_decade_ci95"])
        found[f"{prefix}.slope"] = with_half_width(value, half, "W", "modelled", source, significant=3)
    return found
