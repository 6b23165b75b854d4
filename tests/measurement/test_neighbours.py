"""Several GPUs in one host: which one a batch takes, what it notes of the others, the load on one of them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from records import environment, make_record
from t2v_energy.errors import UserError
from t2v_energy.measurement.gpus import first_free_gpu, visible_gpus
from t2v_energy.measurement.lock import device_lock, first_free_lock, is_locked
from t2v_energy.measurement.neighbours import NeighbourLoad, NeighbourWatch
from t2v_energy.measurement.progress import Progress
from t2v_energy.measurement.record import Neighbour, read_record, record_paths
from t2v_energy.measurement.runner import measure_batch
from t2v_energy.measurement.validity import check
from t2v_energy.metering import fake_nvml
from t2v_energy.metering.fake_nvml import FakeGpu
from t2v_energy.plan import make_plan, raw_folder

FIRST, SECOND = (f"GPU-fa4e000{n}-0000-0000-0000-000000000000" for n in (1, 2))
NEIGHBOUR_W = 300.0


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path) -> Iterator[None]:
    with tiny.own_devices_and_locks(tmp_path):
        yield


@pytest.fixture
def clock() -> Iterator[fake_nvml.VirtualClock]:
    """A host with two GPUs, in time that passes only when someone sleeps."""
    clock = fake_nvml.VirtualClock(late_s=0.0)
    gpus = [
        FakeGpu(fake_nvml.constant(600), uuid=FIRST),
        FakeGpu(fake_nvml.constant(NEIGHBOUR_W), uuid=SECOND),
    ]
    with fake_nvml.installed(gpus, clock):
        yield clock


def free_gpu(said: list[str], allow_shared: bool = False, name: str | None = None) -> tuple[str, list[str]]:
    with first_free_gpu(name, allow_shared, said.append) as (device, others):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == device.uuid
        assert is_locked(device.uuid)
        return device.uuid, others


@pytest.mark.usefixtures("clock")
class TestWhichGpu:
    def test_the_first_that_is_free(self) -> None:
        said: list[str] = []
        assert free_gpu(said) == (FIRST, [SECOND])
        del os.environ["CUDA_VISIBLE_DEVICES"]
        with device_lock(FIRST):
            assert free_gpu(said) == (SECOND, [FIRST])
        assert said == []
        assert not is_locked(FIRST) and not is_locked(SECOND)  # noqa: PT018

    def test_only_those_that_are_visible(self) -> None:
        os.environ["CUDA_VISIBLE_DEVICES"] = "1"
        assert visible_gpus() == [SECOND]
        assert free_gpu([]) == (SECOND, [])

    def test_both_are_had_by_two_at_once_and_a_third_waits(self) -> None:
        said: list[str] = []
        with first_free_lock([FIRST, SECOND]) as one, first_free_lock([FIRST, SECOND]) as other:
            assert {one, other} == {FIRST, SECOND}

            def in_turn(text: str) -> None:
                said.append(text)
                raise InterruptedError

            with pytest.raises(InterruptedError), first_free_lock([FIRST, SECOND], in_turn):
                pass
        assert said == [
            f"all of {FIRST}, {SECOND} are being measured or in use; waiting for the first that is free"
        ]
        with first_free_lock([FIRST, SECOND]) as one:
            assert one == FIRST

    def test_a_gpu_of_another_model_is_passed_over_until_none_is_left(self) -> None:
        assert free_gpu([], name=fake_nvml.NAME)[0] == FIRST
        del os.environ["CUDA_VISIBLE_DEVICES"]
        assert free_gpu([], name="another model")[0] == FIRST, "the claim then says what is wrong with it"


def test_a_gpu_with_others_on_it_is_passed_over() -> None:
    occupied = FakeGpu(fake_nvml.constant(600), uuid=FIRST, processes=((1, 500),))
    with fake_nvml.installed([occupied, FakeGpu(fake_nvml.constant(600), uuid=SECOND)]):
        assert free_gpu([])[0] == SECOND
        del os.environ["CUDA_VISIBLE_DEVICES"]
        assert free_gpu([], allow_shared=True)[0] == FIRST


class TestWatch:
    def watched(self, clock: fake_nvml.VirtualClock, seconds: float = 20.0) -> Neighbour:
        watch = NeighbourWatch(FIRST, clock=clock)
        watch.begin()
        clock.sleep(seconds)
        (found,) = watch.end()
        watch.close()
        return found

    def test_what_the_other_gpu_drew(self, clock: fake_nvml.VirtualClock) -> None:
        found = self.watched(clock)
        assert (found.uuid, found.in_use) == (SECOND, False)
        assert found.mean_power_W == pytest.approx(NEIGHBOUR_W, rel=0.01)  # to a tick of the counter

    def test_one_that_is_being_measured_is_in_use(self, clock: fake_nvml.VirtualClock) -> None:
        with device_lock(SECOND):
            assert self.watched(clock).in_use

    def test_one_with_a_process_and_without_a_counter(self) -> None:
        clock = fake_nvml.VirtualClock()
        other = FakeGpu(fake_nvml.constant(), uuid=SECOND, processes=((1, 500),), counter=False)
        with fake_nvml.installed([FakeGpu(fake_nvml.constant(), uuid=FIRST), other], clock):
            found = self.watched(clock)
        assert (found.mean_power_W, found.in_use) == (None, True)

    @pytest.mark.parametrize("in_use", [True, False])
    def test_a_shared_host_is_marked_in_the_record(self, in_use: bool) -> None:
        other = Neighbour(name="x", uuid=SECOND, mean_power_W=512.3, in_use=in_use)
        record = make_record(environment=environment(neighbours=[other]))
        (finding,) = (f for f in check(record) if f.rule == "shared_host")
        assert finding.level == ("flag" if in_use else "ok")
        assert ("512 W" in finding.detail) == in_use
        assert ("CPU and RAM energies are shared" in finding.detail) == in_use


class TestLoad:
    def cpu_s(self, load: NeighbourLoad, over_s: float = 1.0) -> float:
        import psutil

        child = psutil.Process(load._process.pid)
        before = sum(child.cpu_times()[:2])
        time.sleep(over_s)
        return float(sum(child.cpu_times()[:2]) - before)

    def test_it_works_when_told_and_only_then(self) -> None:
        with NeighbourLoad(None, size=128) as load:
            process = load._process
            assert self.cpu_s(load) < 0.1
            load.set("busy")
            worked_s, until_s = 0.0, time.monotonic() + 60  # others may want the cores of this machine, too
            while worked_s <= 0.5 and time.monotonic() < until_s:
                worked_s += self.cpu_s(load, 0.2)
            assert worked_s > 0.5
            load.set("idle")
            assert self.cpu_s(load) < 0.1
        assert process.poll() is not None, "it ends with us"

    def test_a_load_that_ended_is_no_load(self) -> None:
        with NeighbourLoad(None, size=128) as load:
            load._process.kill()
            load._process.wait()
            with pytest.raises(UserError, match="ended by itself"):
                load.check()


def test_the_experiment_alternates_in_one_process(tmp_path: Path) -> None:
    """On the CPU the neighbour is a process beside ours; records say which condition they are of."""
    quick = {"idle_s": 0.2, "sampled": tiny.SAMPLED | {"warmup_calls": None}}
    own = {
        "model": "tiny-wan",
        "fixed": {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2},
        "passes": 2,
        "protocols": quick,
    }
    root = tiny.make_root(tmp_path / "root", experiments={"neighbour": own})
    settings = tiny.settings(root)
    (batch,) = make_plan(root, settings).batches
    conditions = [(item.pass_index, item.configuration.neighbour) for item in batch.items]
    assert [pass_index for pass_index, _ in conditions] == [1, 1, 2, 2]
    assert sorted(conditions) == [(1, "busy"), (1, "idle"), (2, "busy"), (2, "idle")]
    measure_batch(
        root, settings, "neighbour", batch.name, prompts=tiny.prompts_path(root), progress=Progress()
    )
    found = [read_record(path) for path in record_paths(raw_folder(root, "tiny", "neighbour"))]
    assert sorted((r.pass_index, r.configuration.neighbour) for r in found) == sorted(conditions)
    assert all(f"__neighbour-{r.configuration.neighbour}" in r.configuration_id for r in found)


def test_one_gpu_alone_has_no_neighbour(tmp_path: Path) -> None:
    gpus = {"device": "cuda", "gpu_name": None, "experiments": {"neighbour": {}}}
    root = tiny.make_root(tmp_path / "root", **gpus)
    settings = tiny.settings(root)
    (batch,) = make_plan(root, settings).batches
    both = [FakeGpu(fake_nvml.constant(), uuid=uuid) for uuid in (FIRST, SECOND)]
    os.environ["CUDA_VISIBLE_DEVICES"] = SECOND
    with fake_nvml.installed(both), pytest.raises(UserError) as error:
        measure_batch(
            root, settings, "neighbour", batch.name, prompts=tiny.prompts_path(root), progress=Progress()
        )
    assert "needs a second GPU of this host" in str(error.value)
    assert "CUDA_VISIBLE_DEVICES" in str(error.value)
