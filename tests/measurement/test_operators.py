"""Experiment ``operators``: the suite, the calls, the runner, its records, their validity and seal."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from t2v_energy.config import load_accelerator, load_campaign
from t2v_energy.errors import UserError
from t2v_energy.measurement.operator_calls import ready
from t2v_energy.measurement.operator_record import OperatorRecord
from t2v_energy.measurement.operators import OpenDevice, _Runner, expected_records, measure_operators
from t2v_energy.measurement.record import Gpu, read_as
from t2v_energy.measurement.sealing import seal, verify
from t2v_energy.measurement.validity import check_operators, validate_folder
from t2v_energy.metering.attribution import energy_J
from t2v_energy.metering.fake_nvml import FakeDeviceFactory, FakeGpu, constant
from t2v_energy.metering.sampler import Sampler
from t2v_energy.operator_suite import Suite, foreseen_series_s, label, load_suite
from torch.utils.flop_counter import FlopCounterMode

POWER = {
    "key": "power",
    "about": "Powers",
    "mode": "power",
    "cases": [
        {"operator": "attention", "heads": 2, "head_size": 16, "length": [32, 64]},
        {"operator": "elementwise", "function": "add", "rows": 4, "columns": 8},
    ],
}
TIMES = {
    "key": "times",
    "about": "Times",
    "cases": [
        {
            "operator": "attention",
            "heads": 2,
            "head_size": 16,
            "around": {"length": 64, "offsets": [0, -1, 1], "sides": ["both", "queries", "keys"]},
        },
        {"operator": "attention", "heads": 2, "head_size": 16, "length": 32, "kernel": ["math", "cudnn"]},
        {
            "operator": "attention",
            "batch": 2,
            "heads": 2,
            "head_size": 16,
            "queries": 64,
            "keys": 8,
            "masked": True,
        },
        {"operator": "linear", "rows": 16, "inputs": 32, "outputs": [8, 16], "dtype": "float32"},
        {
            "operator": "convolution",
            "batch": 2,
            "inputs": 4,
            "outputs": 8,
            "frames": [1, 2],
            "height": 8,
            "width": 6,
            "dtype": "float32",
        },
        {
            "operator": "convolution",
            "inputs": 4,
            "outputs": 8,
            "taps": [1, 3, 3],
            "frames": 1,
            "height": 8,
            "width": 8,
            "dtype": "float32",
        },
        {
            "operator": "elementwise",
            "function": ["copy", "multiply", "add", "layer_norm", "silu", "to_bfloat16"],
            "rows": 16,
            "columns": 8,
            "dtype": "float32",
        },
        {
            "operator": "elementwise",
            "function": ["to_float32", "rms_norm", "gelu"],
            "rows": 16,
            "columns": 8,
        },
    ],
}
SUITE = {"rounds": 2, "visit_s": 0.002, "loop_s": 0.1, "settle_s": 0.02, "series": [POWER, TIMES]}


def make_root(folder: Path, **changes: Any) -> Path:
    root = tiny.make_root(folder / "root")
    tiny.write_yaml(root, "operators", SUITE | changes)
    return root


def measure(root: Path, said: list[str] | None = None, **how: Any) -> list[Path]:
    say = (said if said is not None else []).append
    return measure_operators(root, tiny.settings(root), say=say, **how)


@pytest.fixture
def root(tmp_path: Path) -> Any:
    with tiny.own_devices_and_locks(tmp_path):
        yield make_root(tmp_path)


class TestSuite:
    def test_the_shipped_one_takes_at_most_seven_minutes(self) -> None:
        suite = load_suite(tiny.ROOT)
        for key in ("h200", "h100-sxm"):
            accelerator = load_accelerator(tiny.ROOT, key)
            assert sum(foreseen_series_s(series, suite, accelerator) for series in suite.series) < 7 * 60

    def test_lengths_around_one(self) -> None:
        times = Suite.model_validate(SUITE).series[1]
        sides = [(c.queries, c.keys) for c in times.cases[:7] if c.operator == "attention"]
        assert sides == [(64, 64), (63, 63), (65, 65), (63, 64), (65, 64), (64, 63), (64, 65)]

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"dtype": "float8"}, "dtype"),
            ({"heads": 0}, "heads"),
            ({"hedas": 2}, "hedas"),
            ({"length": [32, 32]}, "listed twice"),
        ],
    )
    def test_what_is_wrong_is_named(self, root: Path, change: dict[str, Any], named: str) -> None:
        case = {"operator": "attention", "heads": 2, "head_size": 16, "length": 32} | change
        tiny.write_yaml(root, "operators", SUITE | {"series": [TIMES | {"cases": [case]}]})
        with pytest.raises(UserError, match=named) as caught:
            load_suite(root)
        assert "config/operators.yaml" in str(caught.value)

    def test_a_conversion_to_its_own_type(self) -> None:
        case = {"operator": "elementwise", "function": "to_bfloat16", "rows": 2, "columns": 2}
        with pytest.raises(ValueError, match="does nothing"):
            Suite.model_validate(SUITE | {"series": [TIMES | {"cases": [case]}]})


@pytest.mark.parametrize(
    "case", [case for case in Suite.model_validate(SUITE).series[1].cases if case.flop], ids=label
)
def test_flop_are_those_of_the_counter(case: Any) -> None:
    # The counter knows attention by its products; the fused kernel of the CPU it does not know.
    math = case.model_copy(update={"kernel": "math"}) if case.operator == "attention" else case
    with ready(math, "cpu", 0) as call, FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == case.flop


def test_operands_are_random_and_repeatable() -> None:
    case = Suite.model_validate(SUITE).series[1].cases[10]
    assert case.operator == "linear"
    results = []
    for seed in (1, 1, 2):
        with ready(case, "cpu", seed) as call:
            results.append(call())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert 0.5 < float(results[0].std()) < 3  # weights are scaled: neither zeros nor overflow


class TestMeasuring:
    def test_from_nothing_to_a_seal(self, root: Path) -> None:
        said: list[str] = []
        written = measure(root, said)
        assert [path.name for path in written] == expected_records(root)
        assert "2 series, 0 already measured; about" in said[0]
        folder = written[0].parent
        assert folder == root / "results/raw/tiny/operators"
        for findings in validate_folder(folder).values():
            assert {f.level for f in findings} == {"ok"}
        seal(folder, expected_records(root))
        assert verify(folder) == sorted(written)
        assert measure(root) == []  # nothing is left, and a sealed experiment is no error then

    def test_what_a_record_holds(self, root: Path) -> None:
        paths = {path.name: path for path in measure(root)}
        record = read_as(OperatorRecord, paths["times__operators_r1.json"])
        statuses = [outcome.status for outcome in record.outcomes]
        labels = [label(case) for case in record.series.cases]
        refused = labels.index("attention 1x2x16 q32 k32 bfloat16 cudnn")  # there is no cuDNN on a CPU
        assert statuses[refused] == "unavailable"
        assert record.outcomes[refused].error
        assert statuses.count("ok") == len(statuses) - 1
        assert record.outcomes[labels.index("attention 1x2x16 q32 k32 bfloat16 math")].attention_kernels == [
            "math"
        ]
        visits = record.visits
        assert sorted(zip(visits.round, visits.case, strict=True)) == [
            (r, c) for r in range(2) for c in range(len(statuses)) if c != refused
        ]
        orders = [[c for c, r in zip(visits.case, visits.round, strict=True) if r == n] for n in (0, 1)]
        assert orders[0] != orders[1]  # each round in an order of its own
        wall_ms = 1000 * (np.array(visits.end_s) - np.array(visits.start_s))
        assert np.all(np.array(visits.device_ms) <= wall_ms + 0.05)
        loops = read_as(OperatorRecord, paths["power__operators_r1.json"]).visits
        assert loops.case == [0, 1, 2]
        assert all(0.1 <= end - start < 5 for start, end in zip(loops.start_s, loops.end_s, strict=True))

    def test_it_goes_on_after_a_stop(self, root: Path) -> None:
        said: list[str] = []
        assert measure(root, said, deadline_s=time.monotonic()) == []
        assert any(line.startswith("power: left out") for line in said)
        (first, second) = measure(root)
        before = first.read_bytes()
        second.unlink()
        assert measure(root) == [second]
        assert first.read_bytes() == before

    def test_records_of_other_cases_are_refused(self, root: Path) -> None:
        measure(root)
        tiny.write_yaml(root, "operators", SUITE | {"rounds": 3})
        with pytest.raises(UserError, match="other cases or settings") as caught:
            measure(root)
        assert "power__operators_r1.json" in str(caught.value)

    def test_a_sealed_experiment_is_not_added_to(self, root: Path) -> None:
        written = measure(root)
        seal(written[0].parent, expected_records(root))
        written[1].unlink()
        with pytest.raises(UserError, match="sealed, and series are missing"):
            measure(root)


class TestMeteredBesideAGpu:
    """The CPU's calls while a (fake) GPU of 600 W is metered: ticks and samples reach the record."""

    GPU = Gpu(name="NVIDIA H200", uuid="GPU-1", driver="1", power_limit_W=700, memory_total_MiB=140_000)

    def record(self, root: Path, key: str = "power") -> OperatorRecord:
        tiny.write_yaml(root, "operators", SUITE | {"loop_s": 3.5})
        suite = load_suite(root)
        series = next(series for series in suite.series if series.key == key)
        with Sampler(FakeDeviceFactory(FakeGpu(constant(600))), 0.002, 20) as sampler:
            device = OpenDevice(self.GPU, 0, (), sampler)
            return _Runner(root, load_campaign(root, "tiny"), suite, device, lambda _: None).measure(series)

    def test_the_energy_of_a_loop(self, root: Path) -> None:
        record = self.record(root)
        assert record.ticks is not None
        for start_s, end_s in zip(record.visits.start_s, record.visits.end_s, strict=True):
            energy = energy_J(record.ticks, start_s, end_s)
            assert energy.value_J == pytest.approx(600 * (end_s - start_s), rel=0.01)
        levels = {f.rule: f.level for f in check_operators(record, "NVIDIA H200")}
        assert levels == dict.fromkeys(
            ["gpu_name", "foreign_process", "visits", "closure", "throttling"], "ok"
        )

    def test_faults_are_found(self, root: Path) -> None:
        record = self.record(root)
        assert record.samples is not None
        count = len(record.samples)
        faults = {
            "gpu_name": (record, "NVIDIA L4"),
            "visits": (
                record.model_copy(update={"visits": record.visits.model_copy(update={"case": [0, 1, 1]})}),
                None,
            ),
            "closure": (
                record.model_copy(
                    update={"samples": record.samples.model_copy(update={"power_instant_W": [500.0] * count})}
                ),
                None,
            ),
            "throttling": (
                record.model_copy(
                    update={"samples": record.samples.model_copy(update={"throttle_reasons": [0x40] * count})}
                ),
                None,
            ),
        }
        for rule, (faulty, gpu) in faults.items():
            invalid = [f.rule for f in check_operators(faulty, gpu) if f.level == "invalid"]
            assert invalid == [rule]
