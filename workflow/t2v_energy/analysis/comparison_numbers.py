"""The numbers that the paper's text takes from experiments ``validation`` and ``kernels``.

Keys begin with ``validation.`` or ``kernels.``.  A number that a campaign cannot give is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

import pandas as pd

from t2v_energy.analysis.kernels import DEFAULT, FORCED, Kernels
from t2v_energy.analysis.numbers import Kind, Number, Source, decimals, with_half_width
from t2v_energy.analysis.settling import settling_numbers
from t2v_energy.analysis.validation import ACCEPTED_PERCENT, QUANTITIES

Numbers = dict[str, Number]
NAMES = {"latency_s": "latency", "gpu_energy_Wh": "gpu_energy"}


def comparison_numbers(tables: Mapping[str, pd.DataFrame], kernels: Kernels | None, folder: str) -> Numbers:
    """Every number of the part ``comparison``, from the notebook's tables as they lie in ``folder``.

    ``kernels`` is None where the campaign has no such experiment.
    """
    found = validation_numbers(
        tables["validation"], tables["validation_steps"], tables["validation_drift"], folder
    ) | settling_numbers(tables["settling"], f"{folder}/settling.csv")
    if kernels is not None:
        found |= kernels_numbers(kernels, tables["kernels"], tables["kernels_fit"], folder)
    return found


# --- validation ---------------------------------------------------------------------------------------------


def validation_numbers(
    validation: pd.DataFrame, steps: pd.DataFrame, drift: pd.DataFrame, folder: str
) -> Numbers:
    """Every number of ``validation.``, from the three tables as they lie in ``folder``.

    Totals are compared where one board ran both protocols.
    """
    return {
        **_protocol_numbers(validation, f"{folder}/validation.csv"),
        **_steps_numbers(steps, f"{folder}/validation_steps.csv"),
        **_drift_numbers(drift, f"{folder}/validation_drift.csv"),
    }


def _protocol_numbers(table: pd.DataFrame, file: str) -> Numbers:
    numbers: Numbers = {}
    comparable = table[(table["same_board"] != "no") & table["quantity"].isin(QUANTITIES)]
    if comparable.empty:
        return numbers
    limit = Source("t2v_energy.analysis.validation", "ACCEPTED_PERCENT", "")
    numbers["validation.accepted"] = Number(ACCEPTED_PERCENT, "%", "constant", limit, digits=1)
    every = Source(file, "all rows", "configuration")
    numbers["validation.sizes"] = Number(comparable["configuration"].nunique(), "", "constant", every)
    apart = table.loc[table["same_board"] == "no", "configuration"].nunique()
    two = Source(file, "same_board=no", "configuration")
    numbers["validation.two_boards"] = Number(apart, "", "constant", two)
    for quantity, rows in comparable.groupby("quantity"):
        worst = rows.iloc[int(rows["difference_percent"].abs().argmax())]
        source = Source(file, f"{worst['configuration']} {quantity}", "difference_percent")
        value = abs(float(worst["difference_percent"]))
        numbers[f"validation.{NAMES[str(quantity)]}_most"] = Number(
            value, "%", "measured", source, digits=decimals(value, 2)
        )
    for _, row in comparable.iterrows():
        key = f"validation.{size_of(str(row['configuration']))}.{NAMES[row['quantity']]}"
        source = Source(file, f"{row['configuration']} {row['quantity']}", "difference_percent")
        numbers[f"{key}_difference"] = with_half_width(
            float(row["difference_percent"]), float(row["difference_ci95_percent"]), "%", "measured", source
        )
        unit = "s" if row["quantity"] == "latency_s" else "Wh"
        for protocol in ("full", "sampled"):
            source = Source(file, f"{row['configuration']} {row['quantity']}", protocol)
            numbers[f"{key}_{protocol}"] = with_half_width(
                float(row[protocol]), float(row[f"{protocol}_ci95"]), unit, "measured", source
            )
        count = Source(file, f"{row['configuration']} {row['quantity']}", "n_full")
        own = f"validation.{size_of(str(row['configuration']))}.n_full"
        numbers[own] = Number(int(row["n_full"]), "", "constant", count)
    return numbers


def size_of(configuration: str) -> str:
    """``480x832`` of ``wan2.1-t2v-1.3b_480x832_81f_50s``: unique within experiment ``validation``."""
    return configuration.split("_")[1]


def _steps_numbers(table: pd.DataFrame, file: str) -> Numbers:
    """How far totals are off that are composed from as many first steps as ``sampled`` runs.

    Composed as ``sampled`` does it, from settled steps; ``…_next_of_all``: had all steps been taken alike.
    """
    numbers: Numbers = {}
    of_all = table[(table["as_sampled"] == "yes") & (table["composed_from"] == "all")]
    for quantity, alike in of_all.groupby("quantity"):
        if len(alike) < 2:
            continue
        where = f"as_sampled=yes, composed_from=all, {quantity}"
        value = float(alike["difference_percent"].abs().nlargest(2).iloc[1])
        numbers[f"validation.steps.{NAMES[str(quantity)]}_next_of_all"] = Number(
            value, "%", "measured", Source(file, where, "second largest |difference_percent|"),
            digits=decimals(value, 2),
        )  # fmt: skip
    rows = table[(table["as_sampled"] == "yes") & (table["composed_from"] == "settled")]
    for quantity in QUANTITIES:
        of_quantity = rows[rows["quantity"] == quantity]
        if of_quantity.empty:
            continue
        if quantity == "latency_s":
            source = Source(file, "as_sampled=yes, composed_from=settled, latency_s", "generations")
            counts = {"records": len(of_quantity), "generations": int(of_quantity["generations"].sum())}
            for name, count in counts.items():
                numbers[f"validation.steps.{name}"] = Number(count, "", "constant", source)
        difference = of_quantity["difference_percent"]
        largest = difference.abs().nlargest(2)
        values = {
            "most": (float(largest.iloc[0]), "largest |difference_percent|"),
            "mean": (float(difference.mean()), "mean of difference_percent"),
        }
        if len(largest) > 1:
            values["next"] = (float(largest.iloc[1]), "second largest |difference_percent|")
        for name, (value, what) in values.items():
            numbers[f"validation.steps.{NAMES[quantity]}_{name}"] = Number(
                value, "%", "measured",
                Source(file, f"as_sampled=yes, composed_from=settled, {quantity}", what),
                digits=decimals(value, 2),
            )  # fmt: skip
    return numbers


def _drift_numbers(table: pd.DataFrame, file: str) -> Numbers:
    """How far the first step, and the first and last tenth of a loop, are from their loop's mean."""
    numbers: Numbers = {}
    parts = {"step 1": "first_step", "1/10": "first_tenth", "10/10": "last_tenth"}
    for part, name in parts.items():
        rows = table[table["part"] == part]
        for column, what in (("step_time_percent", "time"), ("power_percent", "power")):
            values = rows[column].dropna() - 100
            if len(values):
                source = Source(file, f"part={part}, mean over generations", f"{column} − 100")
                value = float(values.mean())
                numbers[f"validation.drift.{name}_{what}"] = Number(
                    value, "%", "measured", source, digits=decimals(value, 2)
                )
    return numbers | _third_step_numbers(table, file)


def _third_step_numbers(table: pd.DataFrame, file: str) -> Numbers:
    """``validation.drift.third_step_*``: the third step against its loop's mean, where it stands out most.

    There the scheduler first solves a linear system, and a process that never did so loads a library.
    """
    third = table[table["part"] == "step 3"]
    if len(third) < 2:
        return {}
    percent = third["step_time_percent"]
    worst = third.iloc[int(percent.argmax())]
    where = f"{worst['configuration']}, generation {worst['generation']}, step 3"
    source = Source(file, where, "step_time_percent − 100")
    excess = float(worst["step_time_percent"]) - 100
    extra_ms = 1000 * float(worst["step_time_s"]) * (1 - 100 / float(worst["step_time_percent"]))
    rest = float((percent.drop(worst.name) - 100).abs().max())
    values = {
        "most": (excess, "%", source),
        "extra": (extra_ms, "ms", Source(file, where, "step_time_s (1 − 100 / step_time_percent)")),
        "others": (rest, "%", Source(file, "part=step 3, the others", "largest |step_time_percent − 100|")),
    }
    return {
        f"validation.drift.third_step_{name}": Number(
            value, unit, "measured", found, digits=decimals(value, 2)
        )
        for name, (value, unit, found) in values.items()
    }


# --- kernels ------------------------------------------------------------------------------------------------


def kernels_numbers(kernels: Kernels, table: pd.DataFrame, fit: pd.DataFrame, folder: str) -> Numbers:
    """Every number of ``kernels.``, from the two tables as they lie in ``folder``."""
    numbers: Numbers = {}
    where = Source(kernels.source, "experiment=kernels", "attention_kernel")
    for way, name in kernels.named.items():
        numbers[f"kernels.{way}"] = Number(name, "", "constant", where)
    numbers["kernels.sizes"] = Number(len(kernels.default), "", "constant", where)
    comparable = table[table["same_board"] != "no"]
    for _, row in comparable[comparable["quantity"].isin(NAMES)].iterrows():
        numbers |= _size_numbers(row, f"{folder}/kernels.csv")
    numbers |= _ratio_extremes(comparable, f"{folder}/kernels.csv")
    numbers |= _rate_extremes(comparable, f"{folder}/kernels.csv")
    for _, row in fit.iterrows():
        numbers |= _fit_number(row, f"{folder}/kernels_fit.csv")
    return numbers


def _size_numbers(row: pd.Series, file: str) -> Numbers:
    """Ratio at one size, and both values of it."""
    size, quantity = f"{row['height']}x{row['width']}", str(row["quantity"])
    prefix, where = f"kernels.{size}.{NAMES[quantity]}", f"{row['height']}×{row['width']} {quantity}"
    kind: Kind = row["kind"]
    ratio = with_half_width(
        float(row["ratio"]), float(row["ratio_ci95"]), "", kind, Source(file, where, "ratio")
    )
    numbers = {f"{prefix}_ratio": ratio}
    for way in (DEFAULT, FORCED):
        source = Source(file, where, way)
        unit = "" if pd.isna(row["unit"]) else str(row["unit"])
        numbers[f"{prefix}_{way}"] = with_half_width(
            float(row[way]), float(row[f"{way}_ci95"]), unit, kind, source
        )
    return numbers


def _ratio_extremes(table: pd.DataFrame, file: str) -> Numbers:
    """Least and largest ratio of latency, GPU energy and mean power over the sizes."""
    numbers: Numbers = {}
    for quantity, name in (NAMES | {"mean_power_W": "power"}).items():
        rows = table[table["quantity"] == quantity]
        if rows.empty:
            continue
        for end, place in (("least", rows["ratio"].argmin()), ("most", rows["ratio"].argmax())):
            row = rows.iloc[int(place)]
            source = Source(file, f"{row['height']}×{row['width']} {quantity}", "ratio")
            numbers[f"kernels.{name}_ratio_{end}"] = Number(
                float(row["ratio"]), "", "measured", source, digits=2
            )
    return numbers


def _rate_extremes(table: pd.DataFrame, file: str) -> Numbers:
    """Least and largest rate of attention that each kernel shows at one size."""
    rows = table[table["quantity"] == "attention_rate"]
    numbers: Numbers = {}
    for way in (DEFAULT, FORCED) if len(rows) else ():
        for end, place in (("least", rows[way].argmin()), ("most", rows[way].argmax())):
            row = rows.iloc[int(place)]
            source = Source(file, f"{row['height']}×{row['width']} attention_rate", way)
            key = f"kernels.attention_rate_{way}_{end}"
            numbers[key] = Number(float(row[way]), "TFLOP/s", "modelled", source)
    return numbers


def _fit_number(row: pd.Series, file: str) -> Numbers:
    """One line of kernels_fit.csv, and R² of the regressions of µ; c₀, c₁ and c₂ stay in the table."""
    parameter, way = str(row["parameter"]), str(row["kernel"])
    if "." in parameter:
        return {}
    value, low, high = (float(row[name]) for name in ("value", "ci95_low", "ci95_high"))
    key, where = f"kernels.{parameter}_{way}", f"{parameter} {way}"
    unit = "" if pd.isna(row["unit"]) else str(row["unit"])
    interval = (low, high) if isfinite(low) and isfinite(high) else None
    source = Source(file, where, "value")
    numbers = {key: Number(value, unit, "modelled", source, interval, decimals(value, 3))}
    if parameter.startswith("mu_") and isfinite(float(row["r2"])):
        r2 = float(row["r2"])
        numbers[f"{key}_r2"] = Number(r2, "", "modelled", Source(file, where, "r2"), digits=4)
    return numbers
