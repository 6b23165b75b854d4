"""Experiment ``operators`` as a tidy table: what a single call takes, at which rate and at which power."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student_t

from t2v_energy.errors import UserError
from t2v_energy.measurement.operator_record import OperatorRecord
from t2v_energy.measurement.record import read_as
from t2v_energy.metering.attribution import energies_J
from t2v_energy.operator_suite import label

CONFIDENCE = 0.95
SIZES = (
    "batch",
    "heads",
    "head_size",
    "queries",
    "keys",
    "rows",
    "columns",
    "inputs",
    "outputs",
    "frames",
    "height",
    "width",
)
COLUMNS = (
    "series",
    "case",
    "operator",
    "function",
    *SIZES,
    "taps",
    "dtype",
    "masked",
    "kernel",
    "attention_kernel",
    "status",
    "flop",
    "bytes",
    "call_s",
    "call_s_ci95",
    "rounds",
    "rate_TFLOPs",
    "traffic_TB_per_s",
    "power_W",
    "power_W_ci90",
    "call_energy_J",
    "sm_clock_MHz",
    "gpu_uuid",
)
"""Columns of operator_rates.csv; docs/tables.md describes them."""


def operator_rates(paths: Sequence[Path]) -> pd.DataFrame:
    """One row a case of every record of experiment ``operators``, columns :data:`COLUMNS`.

    Times are means over the rounds, of the device's own clock; powers are the counter's, of steady loops.

    Raises:
        UserError: no records, or one that cannot be read.
    """
    if not paths:
        raise UserError(
            "there are no records of single operators",
            where="results/raw/<campaign>/operators",
            remedy="measure them: t2v-energy measure --campaign <campaign> --experiment operators",
        )
    rows = [row for path in paths for row in _rows(read_as(OperatorRecord, path))]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def read_rates(path: Path) -> pd.DataFrame:
    """operator_rates.csv as :func:`operator_rates` made it: empty texts are texts.

    Raises:
        UserError: there is no such file.
    """
    if not path.is_file():
        raise UserError(
            "there is no such table",
            where=str(path),
            remedy="build it: t2v-energy operator-rates --campaign <campaign> --out FILE",
        )
    texts = ("function", "taps", "dtype", "kernel", "attention_kernel", "gpu_uuid")
    table = pd.read_csv(path)
    table[list(texts)] = table[list(texts)].fillna("").astype(str)
    return table.assign(masked=table["masked"].eq(True))


def _rows(record: OperatorRecord) -> list[dict[str, Any]]:
    visits = pd.DataFrame(record.visits.model_dump())
    visits["call_s"] = visits["device_ms"] / 1000 / visits["iterations"]
    visits["sm_clock_MHz"] = _clocks(record, visits)
    if record.series.mode == "power" and record.ticks:
        value_J, ci90_J = energies_J(record.ticks, visits["start_s"], visits["end_s"])
        length_s = visits["end_s"] - visits["start_s"]
        visits["power_W"], visits["power_W_ci90"] = value_J / length_s, ci90_J / length_s
        visits["call_energy_J"] = value_J / visits["iterations"]
    by_case = dict(list(visits.groupby("case")))
    return [_row(record, index, by_case.get(index, visits[:0])) for index in range(len(record.series.cases))]


def _row(record: OperatorRecord, index: int, visits: pd.DataFrame) -> dict[str, Any]:
    case, outcome = record.series.cases[index], record.outcomes[index]
    values: dict[str, Any] = {
        name: getattr(case, name, nan) for name in (*SIZES, "function", "dtype", "masked")
    }
    taps = getattr(case, "taps", None)
    values |= {
        "series": record.series.key,
        "case": label(case),
        "operator": case.operator,
        "taps": "x".join(map(str, taps)) if taps else "",
        "kernel": getattr(case, "kernel", None) or "",
        "attention_kernel": "+".join(outcome.attention_kernels),
        "status": outcome.status,
        "flop": case.flop,
        "bytes": case.bytes,
        "rounds": len(visits),
        "gpu_uuid": record.environment.gpu.uuid if record.environment.gpu else "",
    }
    if not len(visits):
        return values
    call_s = float(visits["call_s"].mean())
    values |= {
        "call_s": call_s,
        "call_s_ci95": _half_width(visits["call_s"].to_numpy()),
        "rate_TFLOPs": case.flop / call_s / 1e12 if case.flop else nan,
        "traffic_TB_per_s": case.bytes / call_s / 1e12,
        "sm_clock_MHz": float(visits["sm_clock_MHz"].mean()),
    }
    for name in ("power_W", "power_W_ci90", "call_energy_J"):
        if name in visits:
            values[name] = float(visits[name].mean())
    return values


def _half_width(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Half the 95 % interval of the mean; NaN of a single value."""
    n = len(values)
    if n < 2:
        return nan
    return float(student_t.ppf((1 + CONFIDENCE) / 2, n - 1) * values.std(ddof=1) / sqrt(n))


def _clocks(record: OperatorRecord, visits: pd.DataFrame) -> list[float]:
    """Mean SM clock of the samples within each visit; NaN where there is none."""
    samples = record.samples
    if samples is None:
        return [nan] * len(visits)
    pairs = zip(samples.time_s, samples.sm_clock_MHz, strict=True)
    read = np.array([(time_s, clock) for time_s, clock in pairs if clock is not None]).reshape(-1, 2)
    found = []
    for start_s, end_s in zip(visits["start_s"], visits["end_s"], strict=True):
        within = read[(read[:, 0] >= start_s) & (read[:, 0] <= end_s), 1]
        found.append(float(within.mean()) if within.size else nan)
    return found
