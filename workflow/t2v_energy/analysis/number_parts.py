"""Parts that the numbers of several sweeps are made of."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from math import hypot, isfinite, isnan

import pandas as pd

from t2v_energy.analysis.numbers import Kind, Number, Source, decimals, with_half_width
from t2v_energy.analysis.sweep import Efficiency, Predictor, Sweep, pass_means, row_label
from t2v_energy.errors import UserError

Numbers = dict[str, Number]
NORMAL_95 = 1.96
FITTED = ("paper_refitted", "single_mu")
QUANTITIES = {"latency_s": "s", "gpu_energy_Wh": "Wh"}


def stem(quantity: str) -> str:
    """A quantity without its unit: ``latency``, ``gpu_energy``."""
    return quantity.rsplit("_", 1)[0]


def merged(*parts: Numbers) -> Numbers:
    """All parts in one.

    Raises:
        UserError: two of them have one key.
    """
    found: Numbers = {}
    for part in parts:
        if twice := sorted(found.keys() & part.keys()):
            raise UserError(f"numbers are given twice: {', '.join(twice)}")
        found |= part
    return found


def everywhere(sweep: Sweep) -> str:
    """The source's name of all rows of a sweep."""
    return f"experiment={sweep.experiment}, status=ok"


def extreme(sweep: Sweep, column: str, how: str, unit: str, significant: int = 2) -> Number:
    """The least (``how="min"``) or largest (``"max"``) measured value of a column."""
    row = sweep.rows.iloc[int(getattr(sweep.rows[column], f"arg{how}")())]
    value = float(row[column])
    source = Source(sweep.source, row_label(row), column)
    return Number(value, unit, "measured", source, digits=decimals(value, significant))


# --- one row ------------------------------------------------------------------------------------------------


def cost_numbers(sweep: Sweep, prefix: str, row: pd.Series) -> Numbers:
    """Latency, GPU energy and time of a step of one row, with intervals where the row has them."""
    numbers: Numbers = {}
    for quantity, unit in QUANTITIES.items():
        if not isnan(row[quantity]):
            source = Source(sweep.source, row_label(row), quantity)
            numbers[f"{prefix}.{stem(quantity)}"] = with_half_width(
                float(row[quantity]), float(row[f"{quantity}_ci95"]), unit, "measured", source
            )
    step = float(row["step_time_s"])
    half = step * float(row["step_time_sem_percent"]) / 100 * NORMAL_95
    source = Source(sweep.source, row_label(row), "step_time_s")
    return numbers | {f"{prefix}.step_time": with_half_width(step, half, "s", "measured", source)}


def cell_numbers(
    sweep: Sweep, prefix: str, row: pd.Series, cells: Mapping[str, tuple[str, float, str, int]]
) -> Numbers:
    """Cells of one row without an interval: column, factor, unit and significant digits, by the key's end.

    ``mfu`` is modelled, since its work is counted; the others are measured.  Empty cells are left out.
    """
    numbers: Numbers = {}
    for name, (column, factor, unit, significant) in cells.items():
        value = float(row.get(column, float("nan"))) * factor
        if not isnan(value):
            kind: Kind = "modelled" if column == "mfu" else "measured"
            source, digits = (
                Source(sweep.source, row_label(row), column),
                min(decimals(value, significant), 2),
            )
            numbers[f"{prefix}.{name}"] = Number(value, unit, kind, source, digits=digits)
    return numbers


# --- all rows -----------------------------------------------------------------------------------------------


def range_numbers(sweep: Sweep) -> Numbers:
    """``<experiment>.range.*``: how many times the dearest row costs what the cheapest does."""
    numbers = {}
    for quantity in QUANTITIES:
        values = sweep.rows[quantity]
        if values.isna().any():
            continue
        cheap, dear = sweep.rows.iloc[int(values.argmin())], sweep.rows.iloc[int(values.argmax())]
        ratio = float(dear[quantity] / cheap[quantity])
        half = ratio * hypot(*(float(row[f"{quantity}_ci95"] / row[quantity]) for row in (cheap, dear)))
        source = Source(sweep.source, f"{row_label(dear)} / {row_label(cheap)}", quantity)
        numbers[f"{sweep.experiment}.range.{stem(quantity)}"] = with_half_width(
            ratio, half, "", "measured", source, significant=3
        )
    return numbers


def counter_numbers(sweep: Sweep) -> Numbers:
    """Range of mean power, and CodeCarbon's GPU energy against the counter's over the same stretch."""
    if not sweep.has_gpu_energy:
        return {}
    rows, prefix = sweep.rows, sweep.experiment
    numbers = {
        f"{prefix}.power_least": extreme(sweep, "mean_power_W", "min", "W", significant=3),
        f"{prefix}.power_most": extreme(sweep, "mean_power_W", "max", "W", significant=3),
    }
    least, most = float(rows["mean_power_W"].min()), float(rows["mean_power_W"].max())
    if most > 0:
        source = Source(sweep.source, everywhere(sweep), "1 − least / largest mean_power_W")
        value = 100 * (1 - least / most)
        numbers[f"{prefix}.power_range"] = Number(value, "%", "measured", source, digits=1)
    difference = 100 * (rows["codecarbon_window_energy_Wh"] / rows["counter_window_energy_Wh"] - 1).abs()
    if difference.notna().any():
        row, column = (
            rows.iloc[int(difference.argmax())],
            "codecarbon_window_energy_Wh / counter_window_energy_Wh",
        )
        value = float(difference.max())
        numbers[f"{prefix}.codecarbon_difference"] = Number(
            value, "%", "measured", Source(sweep.source, row_label(row), f"{column} − 1"),
            digits=decimals(value, 2),
        )  # fmt: skip
    return numbers


def spread_numbers(sweep: Sweep, named: Mapping[str, pd.Series]) -> Numbers:
    """How far passes lie apart over all rows and at the ``named`` ones, beside the scatter of repetition."""
    numbers: Numbers = {}
    rows, prefix = sweep.rows, sweep.experiment
    for quantity in QUANTITIES:
        name, column = stem(quantity), f"{quantity}_pass_spread_percent"
        if not rows[column].notna().any():
            continue
        source, median = (
            Source(sweep.source, everywhere(sweep), f"median of {column}"),
            float(rows[column].median()),
        )
        numbers[f"{prefix}.spread.{name}_median"] = Number(median, "%", "measured", source, digits=1)
        numbers[f"{prefix}.spread.{name}_most"] = extreme(sweep, column, "max", "%")
        source = Source(sweep.source, everywhere(sweep), f"median of {quantity}_std / {quantity}")
        scatter = float((100 * rows[f"{quantity}_std"] / rows[quantity]).median())
        if isfinite(scatter):
            digits = decimals(scatter, 2)
            numbers[f"{prefix}.repetition.{name}"] = Number(scatter, "%", "measured", source, digits=digits)
        for label, row in named.items():
            if isfinite(value := float(row[column])):
                where = Source(sweep.source, row_label(row), column)
                numbers[f"{prefix}.{label}.{name}_spread"] = Number(value, "%", "measured", where, digits=1)
    return numbers


def board_numbers(sweep: Sweep, rows: pd.DataFrame, which: str) -> Numbers:
    """Latency of the first pass against the second's of ``rows``, by the pair of boards that they ran on.

    Pairs are called a, b, … in the order of how many rows they have; ``which`` names the rows in the source.
    """
    numbers: Numbers = {}
    pairs: dict[str, list[float]] = {}
    for _, row in rows.iterrows():
        means, uuids = pass_means(row, "latency_s"), str(row["gpu_uuids"])
        if len(means) == 2 and len(set(uuids.split(";"))) == 2:
            pairs.setdefault(uuids, []).append(100 * (means[0] / means[1] - 1))
    ordered = sorted(pairs.items(), key=lambda pair: (-len(pair[1]), pair[0]))
    for label, (uuids, differences) in zip("abcdefgh", ordered, strict=False):
        source = Source(sweep.source, f"gpu_uuids={uuids}, {which}", "latency_s_pass_means")
        prefix = f"{sweep.experiment}.boards.{label}"
        numbers[f"{prefix}.sizes"] = Number(len(differences), "", "constant", source)
        for name, value in (("least", min(differences)), ("most", max(differences))):
            numbers[f"{prefix}.{name}"] = Number(value, "%", "measured", source, digits=1)
    return numbers


def distinct_boards(sweeps: Mapping[str, Sweep]) -> set[str]:
    """UUID of every board that measured a row of the sweeps."""
    cells = chain.from_iterable(sweep.rows["gpu_uuids"].dropna().astype(str) for sweep in sweeps.values())
    return {uuid for cell in cells for uuid in cell.split(";") if uuid}


# --- predictions --------------------------------------------------------------------------------------------


def efficiency_numbers(
    prefix: str, predictors: Mapping[str, Predictor], source: Source, *, heaviest: bool = False
) -> Numbers:
    """The two fitted µ with intervals and R²; with ``heaviest``, the largest point's weight in each."""
    numbers: Numbers = {}
    for key in FITTED:
        fit = predictors[key].fit
        assert fit is not None
        numbers[f"{prefix}.{key}.efficiency"] = fitted(fit, source)
        if fit.r2 > 0:
            digits = 4 if fit.r2 > 0.995 else 3
            numbers[f"{prefix}.{key}.r2"] = Number(fit.r2, "", "modelled", source, digits=digits)
        if heaviest:
            where = Source(source.file, source.row, "largest FLOP² / sum of FLOP²")
            numbers[f"{prefix}.{key}.heaviest"] = Number(
                fit.heaviest_percent, "%", "modelled", where, digits=1
            )
    return numbers


def fitted(fit: Efficiency, source: Source) -> Number:
    """µ with its interval."""
    interval = (fit.low, fit.high) if isfinite(fit.high) else None
    return Number(fit.value, "", "modelled", source, interval, digits=decimals(fit.value, 3))


def own_efficiency_numbers(sweep: Sweep) -> Numbers:
    """µ fitted to one sweep alone, to see how far the sweeps agree on it."""
    if len(sweep.rows) < 2:
        return {}
    where = f"{everywhere(sweep)} ({len(sweep.rows)} rows)"
    return efficiency_numbers(
        sweep.experiment, sweep.predictors, Source(sweep.source, where, "latency_s over FLOP")
    )


def mape_numbers(experiment: str, table: pd.DataFrame, table_file: str) -> Numbers:
    """Mean absolute percentage errors of every predictor, from the rows of table 3 of one set."""
    numbers = {}
    for _, line in table[table["set"] == experiment].iterrows():
        source = Source(table_file, f"{experiment}, {line['predictor']}, {line['quantity']}", "mape_percent")
        key = f"{experiment}.{line['predictor']}.mape_{stem(line['quantity'])}"
        numbers[key] = Number(float(line["mape_percent"]), "%", "modelled", source, digits=1)
    return numbers


def error_numbers(
    sweep: Sweep, predictors: Mapping[str, Predictor], prefix: str, ends: tuple[str, str]
) -> Numbers:
    """Signed error of latency at the first and last row, which the keys call by ``ends``."""
    numbers = {}
    for key in FITTED:
        error = 100 * (sweep.predicted(predictors[key], "latency_s") / sweep.rows["latency_s"] - 1)
        for label, place in zip(ends, (0, -1), strict=True):
            where = Source(
                sweep.source, row_label(sweep.rows.iloc[place]), f"latency_s: {key} / measured − 1"
            )
            value = float(error.iloc[place])
            numbers[f"{prefix}.{key}.error_{label}"] = Number(value, "%", "modelled", where, digits=1)
    return numbers
