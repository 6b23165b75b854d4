"""The table of single operators: rates and powers of the records, with their spread."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from t2v_energy.analysis.operator_rates import COLUMNS, operator_rates
from t2v_energy.errors import UserError
from t2v_energy.measurement.operator_record import OperatorRecord, Outcome, Visits
from t2v_energy.measurement.record import Environment, Gpu, Origin, to_json
from t2v_energy.metering.series import Samples, Ticks
from t2v_energy.operator_suite import Series

GPU = Gpu(name="NVIDIA H200", uuid="GPU-1", driver="1", power_limit_W=700, memory_total_MiB=140_000)
ENVIRONMENT = Environment(
    host="h",
    platform="p",
    python="3.12",
    cpu="c",
    cpu_count=2,
    memory_GiB=8,
    gpu=GPU,
    versions={},
    git_commit="0",
    weights="none",
)
CASES = [
    {"operator": "linear", "rows": 1000, "inputs": 1000, "outputs": 500},
    {"operator": "elementwise", "function": "add", "rows": 1000, "columns": 1000, "dtype": "float32"},
    {"operator": "attention", "heads": 2, "head_size": 64, "length": 128, "kernel": "cudnn"},
]


def write(folder: Path, mode: str) -> Path:
    """A record of planted times: a linear call takes 1 ms, 1.1 ms, 1.2 ms; a loop 500 W, then 300 W."""
    power = mode == "power"
    visits = {
        "case": [0, 1] if power else [0, 1, 0, 1, 0, 1],
        "round": [0, 0] if power else [0, 0, 1, 1, 2, 2],
        "iterations": [1000, 1000] if power else [10] * 6,
        "start_s": [1.0, 4.0] if power else [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        "end_s": [3.0, 6.0] if power else [1.05, 1.15, 1.25, 1.35, 1.45, 1.55],
        "device_ms": [2000.0, 2000.0] if power else [10.0, 5.0, 11.0, 5.0, 12.0, 5.0],
    }
    time_s = np.arange(0, 8, 0.1)
    watts = np.where(time_s < 3.5, 500, 300)
    energy_mJ = np.concatenate([[0], np.cumsum(watts[:-1] * 100)])
    record = OperatorRecord(
        campaign="h200",
        series=Series(key="planted", about="x", mode=mode, cases=CASES),  # type: ignore[arg-type]
        rounds=3,
        visit_s=0.03,
        loop_s=2.0,
        settle_s=0.5,
        seed=1,
        origin=Origin(utc="2026-11-26T00:00:00", monotonic_s=0),
        environment=ENVIRONMENT,
        outcomes=[
            Outcome(status="ok"),
            Outcome(status="ok"),
            Outcome(status="unavailable", error="no such kernel"),
        ],
        visits=Visits(**visits),
        ticks=Ticks(
            time_s=list(time_s),
            not_before_s=[t - 0.001 for t in time_s],
            energy_mJ=[int(e) for e in energy_mJ],
        ),
        samples=Samples.from_rows([(t, 500.0, 500.0, 1500 if t < 3.5 else 1980, 50, 0, 1.0) for t in time_s]),
    )
    path = folder / record.file_name
    path.write_text(to_json(record), encoding="utf-8")
    return path


def test_times_and_rates(tmp_path: Path) -> None:
    table = operator_rates([write(tmp_path, "time")]).set_index("operator")
    assert set(table.reset_index().columns) == set(COLUMNS)
    linear = table.loc["linear"]
    assert linear["call_s"] == pytest.approx(1.1e-3)
    assert linear["call_s_ci95"] == pytest.approx(4.303 * 1e-4 / np.sqrt(3), rel=1e-3)
    assert linear["rate_TFLOPs"] == pytest.approx(1e9 / 1.1e-3 / 1e12)
    assert linear["rounds"] == 3
    assert np.isnan(linear["power_W"])
    add = table.loc["elementwise"]
    assert add["traffic_TB_per_s"] == pytest.approx(12e6 / 0.5e-3 / 1e12)
    assert np.isnan(add["rate_TFLOPs"])
    refused = table.loc["attention"]
    assert refused["status"] == "unavailable"
    assert np.isnan(refused["call_s"])


def test_powers_of_steady_loops(tmp_path: Path) -> None:
    table = operator_rates([write(tmp_path, "power")]).set_index("operator")
    assert table.loc["linear", "power_W"] == pytest.approx(500, rel=0.005)
    assert table.loc["elementwise", "power_W"] == pytest.approx(300, rel=0.005)
    assert table.loc["linear", "call_energy_J"] == pytest.approx(500 * 2 / 1000, rel=0.005)
    assert table.loc["linear", "sm_clock_MHz"] == 1500
    assert table.loc["elementwise", "sm_clock_MHz"] == 1980
    assert np.isnan(table.loc["linear", "call_s_ci95"])  # one loop has no scatter


def test_no_records() -> None:
    with pytest.raises(UserError, match="no records of single operators"):
        operator_rates([])
