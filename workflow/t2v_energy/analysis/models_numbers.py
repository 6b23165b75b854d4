"""The numbers that the paper's text takes from experiment ``cross-model``.

Keys begin with ``models.``.  A number that the campaign cannot give is left out.  A total of GPU, CPU and RAM
energy, and every share of it, adds three kinds of number; ``modelled`` stands for that here.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import get_args

import pandas as pd

from t2v_energy.analysis.models import EXPERIMENT, Models
from t2v_energy.analysis.models_checks import WHOLE
from t2v_energy.analysis.numbers import Kind, Number, Source, decimals, with_half_width

Numbers = dict[str, Number]
COSTS = {"latency_s": "latency", "gpu_energy_Wh": "gpu_energy", "cpu_energy_Wh": "cpu_energy",
         "ram_energy_Wh": "ram_energy"}  # fmt: skip
UNITS = {"latency_s": "s"}
NARROW_PERCENT = 1.0
"""An interval of GPU energy is narrow whose half-width is no more than this part of it (%)."""
EXTREMES = ("gpu_energy_share", "denoiser_time_share", "utilisation_time", "utilisation_power",
            "utilisation_arithmetic", "step_rate")  # fmt: skip


def models_numbers(models: Models, tables: Mapping[str, pd.DataFrame], folder: str) -> Numbers:
    """Every number of the part ``models``, from the notebook's tables as they lie in ``folder``."""
    table4 = tables["table4"].set_index("model")
    file = f"{folder}/table4.csv"
    every = Source(file, "all rows", "status")
    found: Numbers = {
        "models.listed": Number(len(table4), "", "constant", every),
        "models.measured": Number(len(models.rows), "", "constant", every),
        "models.weights": Number(
            models.weights,
            "",
            "constant",
            Source(f"config/campaigns/{models.campaign}.yaml", "weights", "weights"),
        ),
        "models.study_gpu": Number(models.study.gpu, "", "constant", _study(models, "gpu")),
    }
    found |= _table2_numbers(tables["table2"], f"{folder}/table2.csv")
    for key, row in table4.iterrows():
        found |= _model_numbers(str(key), row, file)
    found |= _ends_numbers(models, table4, file) | _spread_numbers(table4, file)
    found |= _interval_numbers(table4, file) | _whole_numbers(models)
    found |= _broader_numbers(models, tables["broader"], f"{folder}/broader.csv")
    found |= _sign_numbers(tables["signs"], f"{folder}/signs.csv")
    return found | _memory_numbers(models, tables["memory"], f"{folder}/memory.csv")


def _study(models: Models, row: str) -> Source:
    return Source("config/study.yaml", row, models.study.study)


def _table2_numbers(table: pd.DataFrame, file: str) -> Numbers:
    differing = table[table["differs"] != ""]
    where = Source(file, "differs is not empty", "model")
    return {"models.defaults_differ": Number(len(differing), "", "constant", where)}


def _kind(cell: object) -> Kind:
    """A table's kind; passes of different kinds are joined there, and no better than modelled."""
    kinds: dict[object, Kind] = {kind: kind for kind in get_args(Kind)}
    return kinds.get(cell, "modelled")


def _model_numbers(key: str, row: pd.Series, file: str) -> Numbers:
    """``models.<key>.…``: costs with intervals, ratios to the printed ones, rates and shares."""
    numbers: Numbers = {}
    for quantity, name in COSTS.items():
        if isfinite(float(row[quantity])):
            kind = "measured" if quantity == "latency_s" else _kind(row[f"{quantity}_kind"])
            numbers[f"models.{key}.{name}"] = with_half_width(
                float(row[quantity]), float(row[f"{quantity}_ci95"]), UNITS.get(quantity, "Wh"), kind,
                Source(file, key, quantity),
            )  # fmt: skip
        if isfinite(float(row[f"printed_{quantity}"])):
            value = float(row[f"printed_{quantity}"])
            numbers[f"models.{key}.printed_{name}"] = Number(
                value, UNITS.get(quantity, "Wh"), "constant", Source(file, key, f"printed_{quantity}"),
                digits=_shortest(value),
            )  # fmt: skip
    for name in ("latency_ratio", "gpu_energy_ratio"):
        value, half = float(row[name]), float(row[f"{name}_ci95"])
        if isfinite(value):
            numbers[f"models.{key}.{name}"] = with_half_width(
                value, half, "", "measured", Source(file, key, name), significant=3
            )
    plain: dict[str, tuple[str, Kind]] = {
        "mfu": ("", "modelled"), "printed_mfu": ("", "modelled"), "total_energy_Wh": ("Wh", "modelled"),
        "gpu_share_percent": ("%", "modelled"), "times_cheapest": ("", "modelled"),
        "gpu_Wh_per_video_second": ("Wh/s", "measured"),
        "gpu_Wh_per_megapixel_frame": ("Wh/megapixel-frame", "measured"),
    }  # fmt: skip
    for column, (unit, kind) in plain.items():
        value = float(row[column])
        if isfinite(value):
            name = column.removesuffix("_Wh").removesuffix("_percent")
            numbers[f"models.{key}.{name}"] = Number(
                value, unit, kind, Source(file, key, column), digits=decimals(value, 3)
            )
    return numbers


def _whole_numbers(models: Models) -> Numbers:
    """``models.<key>.whole_…``: composed totals over whole generations of a configuration, less one."""
    numbers: Numbers = {}
    rows = models.others[models.others["experiment"] == EXPERIMENT]
    for (key, configuration), group in rows.groupby(["model", "configuration_id"]):
        by = {str(row["protocol"]): row for _, row in group.iterrows()}
        if by.keys() < {"full", "sampled"}:
            continue
        for quantity, name in (("latency_s", "latency"), ("gpu_energy_Wh", "gpu_energy")):
            whole, composed = (float(by[protocol][quantity]) for protocol in ("full", "sampled"))
            source = Source(models.source, f"{configuration}, sampled / full", quantity)
            difference = 100 * (composed / whole - 1)
            if isfinite(difference):
                numbers[f"models.{key}.whole_{name}_difference"] = Number(
                    difference, "%", "measured", source, digits=decimals(difference, 2)
                )
    return numbers


def _ends_numbers(models: Models, table4: pd.DataFrame, file: str) -> Numbers:
    """The dearest model over the cheapest, ours and printed, by total energy and by GPU energy alone."""
    numbers: Numbers = {}
    for prefix in ("", "printed_"):
        for column, name in (("total_energy_Wh", "range"), ("gpu_energy_Wh", "gpu_range")):
            values = table4[f"{prefix}{column}"].dropna()
            if len(values) < 2:
                continue
            dear, cheap = str(values.idxmax()), str(values.idxmin())
            ratio = float(values.max() / values.min())
            source = Source(file, f"{dear} / {cheap}", f"{prefix}{column}")
            measured = name == "gpu_range" and not prefix
            kind: Kind = "constant" if prefix else "measured" if measured else "modelled"
            numbers[f"models.{prefix}{name}"] = Number(ratio, "", kind, source, digits=decimals(ratio, 4))
            if name == "range":
                for end, key in (("dearest", dear), ("cheapest", cheap)):
                    numbers[f"models.{prefix}{end}"] = Number(models.title(key), "", "constant", source)
    return numbers


SPREADS: Mapping[str, tuple[str, Kind]] = {
    "latency_ratio": ("", "measured"),
    "gpu_energy_ratio": ("", "measured"),
    "gpu_Wh_per_video_second": ("Wh/s", "measured"),
    "gpu_Wh_per_megapixel_frame": ("Wh", "measured"),
    "mfu": ("", "modelled"),
    "printed_mfu": ("", "modelled"),
}
"""Columns of table4.csv whose least and largest value over the models are numbers, with unit and kind."""


def _spread_numbers(table4: pd.DataFrame, file: str) -> Numbers:
    """``models.<column>_least`` and ``_most`` of :data:`SPREADS`."""
    numbers: Numbers = {}
    for column, (unit, kind) in SPREADS.items():
        values = table4[column].dropna()
        for end, key in (("least", "idxmin"), ("most", "idxmax")) if len(values) else ():
            where = str(getattr(values, key)())
            value = float(values[where])
            numbers[f"models.{column}_{end}"] = Number(
                value, unit, kind, Source(file, where, column), digits=decimals(value, 3)
            )
    return numbers


def _interval_numbers(table4: pd.DataFrame, file: str) -> Numbers:
    """How wide the intervals of GPU energy are: half-widths in percent, and how many are narrow."""
    percent = (100 * table4["gpu_energy_Wh_ci95"] / table4["gpu_energy_Wh"]).dropna()
    if percent.empty:
        return {}
    limit = Source("t2v_energy.analysis.models_numbers", "NARROW_PERCENT", "")
    source = Source(file, str(percent.idxmax()), "gpu_energy_Wh_ci95 / gpu_energy_Wh")
    widest, narrow = float(percent.max()), int((percent <= NARROW_PERCENT).sum())
    return {
        "models.interval_limit": Number(NARROW_PERCENT, "%", "constant", limit),
        "models.interval_most": Number(widest, "%", "measured", source, digits=decimals(widest, 2)),
        "models.interval_narrow": Number(narrow, "", "constant", Source(file, "all rows", source.column)),
    }


def _broader_numbers(models: Models, table: pd.DataFrame, file: str) -> Numbers:
    """``models.broader.<comparison>.…``: as printed, recomputed from printed energies, and from ours."""
    numbers: Numbers = {}
    columns: dict[str, tuple[str, Kind]] = {
        "recomputed_times": ("recomputed", "constant"), "times": ("times", "modelled"),
        "gpu_only_times": ("gpu_times", "measured"),
    }  # fmt: skip
    for _, row in table.iterrows():
        prefix = f"models.broader.{row['comparison']}"
        printed = float(row["printed_times"])
        place = Source(models.study.study, str(row["place"]), "times")
        numbers[f"{prefix}.printed"] = Number(printed, "", "constant", place)
        for column, (name, kind) in columns.items():
            value = float(row[column])
            if isfinite(value):
                source = Source(file, str(row["comparison"]), column)
                numbers[f"{prefix}.{name}"] = Number(value, "", kind, source, digits=decimals(value, 3))
    follows = Source(file, "all rows", "follows")
    numbers["models.broader.follow"] = Number(int((table["follows"] == "yes").sum()), "", "constant", follows)
    numbers["models.broader.of"] = Number(len(table), "", "constant", follows)
    holds = Source(file, "all rows", "holds_here")
    known = table["holds_here"] != ""
    numbers["models.broader.hold_here"] = Number(
        int((table["holds_here"] == "yes").sum()), "", "modelled", holds
    )
    numbers["models.broader.known"] = Number(int(known.sum()), "", "constant", holds)
    return numbers


def _sign_numbers(table: pd.DataFrame, file: str) -> Numbers:
    """``models.checks.<check>.…``: for how many models a claim holds or a sign is absent, and extremes."""
    numbers: Numbers = {}
    for check in map(str, table["check"].unique()):
        rows = table[table["check"] == check]
        source = Source(file, f"check={check}", "verdict")
        prefix = f"models.checks.{check}"
        counts = {
            "good": rows["verdict"].isin(["holds", "absent"]),
            "bad": rows["verdict"].isin(["fails", "present"]),
            "unknown": rows["verdict"] == "unknown",
        }
        for name, chosen in counts.items():
            numbers[f"{prefix}.{name}"] = Number(int(chosen.sum()), "", "constant", source)
        limit = float(rows["limit"].iloc[0])
        unit = str(rows["unit"].iloc[0])
        numbers[f"{prefix}.limit"] = Number(
            limit, unit, "constant", Source(file, f"check={check}", "limit"), digits=_shortest(limit)
        )
        known = rows.dropna(subset=["value"])
        if check in EXTREMES and len(known):
            for end, place in (("least", known["value"].argmin()), ("most", known["value"].argmax())):
                row = known.iloc[int(place)]
                value, where = float(row["value"]), Source(file, f"{row['model']} {check}", "value")
                numbers[f"{prefix}.{end}"] = Number(
                    value, unit, _kind(row["kind"]), where, digits=decimals(value, 3)
                )
    return numbers


def _memory_numbers(models: Models, table: pd.DataFrame, file: str) -> Numbers:
    """``models.<key>.reserved``, ``.allocated`` and the accelerator that it fits."""
    numbers: Numbers = {}
    for _, row in table[table["stage"] == WHOLE].iterrows():
        key = str(row["model"])
        source = Source(file, f"{key} {WHOLE}", "smallest_accelerator")
        for name in ("allocated", "reserved"):
            value = float(row[f"{name}_GiB"])
            if isfinite(value):
                where = Source(file, f"{key} {WHOLE}", f"{name}_GiB")
                numbers[f"models.{key}.{name}"] = Number(value, "GiB", "measured", where, digits=1)
        smallest = models.accelerators.get(str(row["smallest_accelerator"]))
        title = smallest.title if smallest else "none"
        numbers[f"models.{key}.smallest_accelerator"] = Number(title, "", "modelled", source)
    return numbers


def _shortest(value: float) -> int:
    """Decimals of a value that was printed or set by hand."""
    return len(f"{value:.6f}".rstrip("0").partition(".")[2])
