"""A measurement on several GPUs: which are taken, what its record holds of each, and that all count."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
from records import GPU, IDLE_W, environment, make_record, write
from t2v_energy.aggregation import aggregate
from t2v_energy.config import load_campaign
from t2v_energy.errors import UserError
from t2v_energy.measurement import runner
from t2v_energy.measurement.lock import device_lock, is_locked
from t2v_energy.measurement.neighbours import NeighbourWatch
from t2v_energy.measurement.progress import Progress
from t2v_energy.measurement.record import Board, Gpu, Process, Record, read_record, record_paths
from t2v_energy.measurement.runner import OpenDevice, Session, measure_batch
from t2v_energy.measurement.validity import Finding, check
from t2v_energy.metering import fake_nvml
from t2v_energy.metering.environment import describe_gpu
from t2v_energy.metering.fake_nvml import FakeDeviceFactory, FakeGpu
from t2v_energy.metering.nvml import NvmlDevice
from t2v_energy.metering.sampler import Sampler
from t2v_energy.plan import make_plan, raw_folder

FIRST, SECOND, THIRD = (f"GPU-fa4e000{n}-0000-0000-0000-000000000000" for n in (1, 2, 3))
WATTS = {FIRST: 600.0, SECOND: 300.0}


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path) -> Iterator[None]:
    with tiny.own_devices_and_locks(tmp_path):
        yield


def fake(uuid: str, **changes: Any) -> FakeGpu:
    return FakeGpu(fake_nvml.constant(WATTS.get(uuid, 100.0)), uuid=uuid, **changes)


def vary(experiment: str = "resolution", **changes: Any) -> dict[str, Any]:
    """A campaign's experiments: a plain pipeline, and one on two GPUs."""
    both: list[dict[str, Any]] = [{}, {"interventions": ["context-parallel-2"]}]
    own = {
        "model": "tiny-wan",
        "fixed": {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2},
        "vary": both,
    }
    return {experiment: own | changes}


class TestReserved:
    def reserved(self, count: int, *gpus: FakeGpu, allow_shared: bool = False) -> list[str]:
        """UUIDs that are taken beside the first one; they are locked meanwhile, and no longer."""
        campaign = load_campaign(tiny.ROOT, "two-gpus")
        with fake_nvml.installed([fake(FIRST), *gpus]), ExitStack() as stack:
            with NvmlDevice.open(FIRST) as device:
                gpu = describe_gpu(device)
            own = OpenDevice(gpu, 0, others=[other.uuid for other in gpus])
            found = runner._reserved(campaign, count, own, allow_shared, lambda _: None, stack)
            uuids = list(runner._uuids(found))
            assert all(is_locked(uuid) for uuid in uuids)
        assert not any(is_locked(uuid) for uuid in uuids)
        return uuids

    def test_those_that_are_needed(self) -> None:
        assert self.reserved(0, fake(SECOND)) == []
        assert self.reserved(1, fake(SECOND), fake(THIRD)) == [SECOND]
        assert self.reserved(2, fake(SECOND), fake(THIRD)) == [SECOND, THIRD]

    def test_another_model_and_one_in_use_are_passed_over(self) -> None:
        assert self.reserved(1, fake(SECOND, name="another"), fake(THIRD)) == [THIRD]
        in_use = fake(SECOND, processes=((1, 500),))
        assert self.reserved(1, in_use, fake(THIRD)) == [THIRD]
        assert self.reserved(1, in_use, fake(THIRD), allow_shared=True) == [SECOND]

    def test_one_that_is_being_measured_is_not_waited_for(self) -> None:
        with device_lock(SECOND):
            assert self.reserved(1, fake(SECOND), fake(THIRD)) == [THIRD]
            with pytest.raises(UserError, match="need 2 GPUs of one model, and 1 of this host are free"):
                self.reserved(1, fake(SECOND))

    def test_a_host_with_one_gpu_is_refused_before_anything_is_built(self, tmp_path: Path) -> None:
        root = tiny.make_root(
            tmp_path / "root", device="cuda", gpu_name=None, experiments=vary(one_process=True)
        )
        settings = tiny.settings(root)
        (batch,) = make_plan(root, settings).batches
        with fake_nvml.installed([fake(FIRST)]), pytest.raises(UserError, match="need 2 GPUs"):
            measure_batch(
                root, settings, "resolution", batch.name, prompts=tiny.prompts_path(root), progress=Progress()
            )

    def test_a_reserved_gpu_is_idle_to_those_that_do_not_run_on_it(self) -> None:
        clock = fake_nvml.VirtualClock()
        with (
            fake_nvml.installed([fake(FIRST), fake(SECOND), fake(THIRD)], clock),
            device_lock(SECOND),
            device_lock(THIRD),
        ):
            watch = NeighbourWatch(FIRST, [SECOND], clock)
            watch.begin()
            clock.sleep(5)
            assert [(n.uuid, n.in_use) for n in watch.end()] == [(SECOND, False), (THIRD, True)]
            assert [n.uuid for n in watch.end(used=[SECOND])] == [THIRD]
            watch.close()


def test_the_shipped_experiment_has_a_baseline_in_each_batch(tmp_path: Path) -> None:
    """A campaign that names it measures each size alone and on two GPUs, in one process."""
    root = tiny.make_root(tmp_path / "root", device="cuda", experiments={"context-parallel": {}})
    for batch in make_plan(root, tiny.settings(root)).batches:
        boards: dict[tuple[int, int], set[int]] = {}
        for item in batch.items:
            size = (item.configuration.height, item.pass_index)
            boards.setdefault(size, set()).add(runner.further_boards(root, item))
        assert set(map(frozenset, boards.values())) == {frozenset({0, 1})}


class TestMetered:
    """The tiny pipeline, alone and on two ranks, while two (fake) GPUs are metered."""

    @pytest.fixture(scope="class")
    @classmethod
    def found(cls, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Record]:
        """Records by whether they ran on both."""
        folder = tmp_path_factory.mktemp("boards")
        root = tiny.make_root(folder / "root", experiments=vary(one_process=True))
        settings = tiny.settings(root)
        plan = make_plan(root, settings)
        with tiny.own_devices_and_locks(folder), ExitStack() as stack:
            described = []
            for uuid in (FIRST, SECOND):
                with fake_nvml.installed([fake(uuid)]), NvmlDevice.open(uuid) as device:
                    described.append(describe_gpu(device))
            samplers = [
                stack.enter_context(Sampler(FakeDeviceFactory(fake(uuid)), 0.002, 20)) for uuid in WATTS
            ]
            further = [OpenDevice(described[1], 1, [Process(pid=7, used_MiB=1.0)], samplers[1])]
            texts = {tiny.PROMPT.id: tiny.PROMPT.text}
            progress = Progress(io.StringIO())
            session = Session(root, plan, texts, progress, described[0], None, [], samplers[0])
            session = replace(session, further=further)
            session._codecarbon = {0: _NoCarbon(), 1: _NoCarbon()}  # it asks the real NVML
            progress.begin(plan.batches[0], list(plan.batches[0].items))
            records = [session.measure(item) for item in plan.items("resolution")]
        for record in records:
            write(record, raw_folder(root, "tiny", "resolution"))
        paths = record_paths(raw_folder(root, "tiny", "resolution"))
        aggregate({"resolution": paths}, root / "spans.parquet", root / "rows.csv", root)
        cls.rows = pd.read_csv(root / "rows.csv", keep_default_na=False)
        read = [read_record(path) for path in paths]
        return {bool(record.configuration.interventions): record for record in read}

    rows: pd.DataFrame

    def test_the_record_names_both_with_their_own_counters(self, found: dict[bool, Record]) -> None:
        record = found[True]
        (board,) = record.further_boards
        assert record.environment.gpu is not None
        assert (record.environment.gpu.uuid, board.gpu.uuid) == (FIRST, SECOND)
        for ticks, watts in ((record.ticks, WATTS[FIRST]), (board.ticks, WATTS[SECOND])):
            assert ticks is not None
            assert ticks.time_s[0] < record.windows.start_s[0]
            assert ticks.time_s[-1] > record.windows.end_s[-1]
            joules = (ticks.energy_mJ[-1] - ticks.energy_mJ[0]) / 1000
            assert joules / (ticks.time_s[-1] - ticks.time_s[0]) == pytest.approx(watts, rel=0.05)
        assert board.samples is not None
        assert set(board.samples.power_instant_W) == {WATTS[SECOND]}
        assert record.interventions[0].evidence["calls_of_each_rank"] > 0
        assert record.fidelity is None or record.fidelity.relative_l2 < 1e-4

    def test_the_baseline_is_of_one_board(self, found: dict[bool, Record]) -> None:
        assert found[False].further_boards == []

    def test_starting_the_second_rank_is_in_no_window(self, found: dict[bool, Record]) -> None:
        """It takes seconds: between the idle window and the first warm-up."""
        windows = found[True].windows
        first = windows.kind.index("warmup")
        assert windows.start_s[first] - windows.end_s[first - 1] > 2

    def test_energies_add_up(self, found: dict[bool, Record]) -> None:
        by_name = {bool(row["intervention"]): row for _, row in self.rows.iterrows()}
        for both, watts in ((False, 600.0), (True, 900.0)):
            row = by_name[both]
            power_W = float(row["gpu_energy_Wh"]) * 3600 / float(row["latency_s"])
            assert power_W == pytest.approx(watts, rel=0.03)
            assert float(row["idle_power_W"]) == pytest.approx(watts, rel=0.05)
            assert row["gpu_energy_Wh_kind"] == "measured"

    def test_a_foreign_process_on_the_second_one_is_invalid(self, found: dict[bool, Record]) -> None:
        assert "foreign_process" in {flag.partition(":")[0] for flag in found[True].flags}
        assert "foreign_process" not in {flag.partition(":")[0] for flag in found[False].flags}


class _NoCarbon:
    """CodeCarbon that reads nothing."""

    def start(self, name: str) -> None: ...

    def stop(self, name: str) -> None: ...


def on_two(**changes: Any) -> Record:
    """A planted record with a second board that is its first one's twin, with ``changes``."""
    record = make_record()
    first = record.environment.gpu
    assert first is not None
    twin = Board(gpu=first.model_copy(update={"uuid": "GPU-1"}), ticks=record.ticks, samples=record.samples)
    return record.model_copy(update={"further_boards": [twin.model_copy(update=changes)]})


class TestRules:
    def finding(self, record: Record, rule: str, expected: str | None = None) -> Finding:
        (found,) = (f for f in check(record, expected) if f.rule == rule)
        return found

    def test_two_sound_boards_are_ok_by_every_rule(self) -> None:
        assert {f.level for f in check(on_two(), GPU)} == {"ok"}

    def test_each_counter_is_held_against_its_own_power(self) -> None:
        wrong = make_record(power_scale=1.1).samples
        found = self.finding(on_two(samples=wrong), "closure")
        assert found.level == "invalid"
        assert "GPU-0: counter" in found.detail
        assert "differ by 8.98 %" in found.detail.partition("GPU-1: ")[2]
        assert "differ by 0.12 %" in found.detail.partition("GPU-1: ")[0]

    def test_a_board_without_a_counter_leaves_no_energy(self, tmp_path: Path) -> None:
        record = on_two(ticks=None)
        assert self.finding(record, "closure").level == "flag"
        paths = [write(record, tmp_path / "raw")]
        aggregate({"resolution": paths}, tmp_path / "a.parquet", tmp_path / "a.csv", tiny.ROOT)
        (row,) = pd.read_csv(tmp_path / "a.csv").to_dict("records")
        assert np.isnan(row["gpu_energy_Wh"])
        assert row["latency_s"] > 0

    @pytest.mark.parametrize(("reasons", "level"), [(0x40, "invalid"), (0x4, "ok")])
    def test_throttling_of_either(self, reasons: int, level: str) -> None:
        found = self.finding(on_two(samples=make_record(reasons=reasons).samples), "throttling")
        assert found.level == level

    def test_clock_reasons_of_each_are_wanted(self) -> None:
        assert self.finding(on_two(samples=None), "throttling").level == "flag"

    def test_foreign_processes_of_either(self) -> None:
        record = on_two(foreign_processes=[Process(pid=9, used_MiB=None)])
        assert self.finding(record, "foreign_process").level == "invalid"
        assert "pid 9" in self.finding(record, "foreign_process").detail

    @pytest.mark.parametrize("expected", [None, GPU])
    def test_both_are_of_one_model(self, expected: str | None) -> None:
        other = Gpu(name="another", uuid="GPU-1", driver="1", power_limit_W=1, memory_total_MiB=1)
        found = self.finding(on_two(gpu=other), "gpu_name", expected)
        assert found.level == "invalid"
        assert "NVIDIA H200 and another" in found.detail

    def test_energies_and_intervals_of_twins(self, tmp_path: Path) -> None:
        """Twice the energy, at √2 of the interval; the same time; half the share of the peak."""
        rows, spans = [], []
        for name, record in (("one", make_record()), ("two", on_two())):
            paths = [write(record, tmp_path / name)]
            aggregate({"resolution": paths}, tmp_path / "a.parquet", tmp_path / "a.csv", tiny.ROOT)
            rows += pd.read_csv(tmp_path / "a.csv").to_dict("records")
            spans.append(pd.read_parquet(tmp_path / "a.parquet"))
        one, two = rows
        assert two["gpu_energy_Wh"] == pytest.approx(2 * one["gpu_energy_Wh"], rel=1e-9)
        assert two["idle_power_W"] == pytest.approx(2 * IDLE_W)
        assert two["latency_s"] == one["latency_s"]
        assert two["mfu"] == pytest.approx(one["mfu"] / 2)
        named = [(row["gpus"], row["gpu_uuids"], row["further_gpu_uuids"]) for row in rows]
        assert named[1] == (2, "GPU-0", "GPU-1")
        assert named[0][:2] == (1, "GPU-0")
        assert pd.isna(named[0][2])
        ratio = spans[1]["gpu_energy_J_ci90"] / spans[0]["gpu_energy_J_ci90"]
        assert np.allclose(ratio, np.sqrt(2))


def test_records_of_before_have_one_board() -> None:
    """A record without the key reads as before, and its energy is its own counter's."""
    data = make_record(environment=environment()).model_dump(mode="json")
    del data["further_boards"]
    record = Record.model_validate(data)
    assert record.further_boards == []
    assert record.counters == [record.ticks]
