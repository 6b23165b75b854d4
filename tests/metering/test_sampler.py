"""The polling loop in virtual time, and the sampler with its real child process."""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from t2v_energy.metering import fake_nvml
from t2v_energy.metering.accuracy import metered
from t2v_energy.metering.attribution import energy_J
from t2v_energy.metering.fake_nvml import FakeDeviceFactory, FakeGpu, VirtualClock
from t2v_energy.metering.nvml import NvmlDevice
from t2v_energy.metering.sampler import Sampler, TickForecast, poll
from t2v_energy.metering.series import MeterError, Sample, Samples, Tick, Ticks

pytest.importorskip("pynvml")
CONSTANT = fake_nvml.constant(600)


# -- poll, in virtual time ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tick_s", [0.02, 0.05, 0.1])
def test_every_tick_is_seen_between_its_two_polls(tick_s: float) -> None:
    gpu = FakeGpu(CONSTANT, tick_s=tick_s, phase_s=0.0071)
    ticks, samples = metered(gpu, 10)
    assert len(ticks) == pytest.approx(10 / tick_s, abs=2)
    for late, early in zip(ticks.time_s, ticks.not_before_s, strict=True):
        true_s = gpu._tick_at_s(gpu.last_tick(late))
        assert early < true_s <= late
    assert len(samples) == pytest.approx(200, abs=2)


def test_polls_are_dense_where_a_tick_is_due() -> None:
    ticks, _ = metered(FakeGpu(CONSTANT), 10)
    widths_s = [late - early for late, early in zip(ticks.time_s, ticks.not_before_s, strict=True)]
    assert max(widths_s[5:]) < 0.0005
    irregular, _ = metered(FakeGpu(CONSTANT, jitter_s=0.03), 10)
    widths_s = [late - early for late, early in zip(irregular.time_s, irregular.not_before_s, strict=True)]
    assert max(widths_s) < 0.0025


def test_forecast_never_sleeps_into_the_guard() -> None:
    forecast = TickForecast(0.002)
    assert forecast.pause_s(0.0) == 0.002
    for tick in range(3):
        forecast.saw(0.1 * tick, 0.1 * tick)
    assert forecast.pause_s(0.25) == 0.002
    assert forecast.pause_s(0.296) == pytest.approx(0.001)
    assert forecast.near(0.298)
    assert forecast.pause_s(0.3) == 0.00025
    assert forecast.pause_s(0.35) == 0.002


def polled(gpu: FakeGpu) -> tuple[list[Tick | Sample], MeterError]:
    clock = VirtualClock()
    rows: list[Tick | Sample] = []
    with (
        fake_nvml.installed([gpu], clock),
        NvmlDevice.open() as device,
        pytest.raises(MeterError) as caught,
    ):
        poll(device, clock, clock.sleep, rows.append, lambda: clock() > 10, 0.002, 20)
    return rows, caught.value


@pytest.mark.parametrize(
    ("gpu", "message", "ticks"),
    [
        (FakeGpu(CONSTANT, reset_at_s=3.0), "it was reset", 30),
        (FakeGpu(CONSTANT, lost_at_s=3.0), "the GPU was lost", 30),
        (FakeGpu(CONSTANT, counter=False), "no energy counter", 0),
    ],
)
def test_trouble_is_loud_and_keeps_what_was_read(gpu: FakeGpu, message: str, ticks: int) -> None:
    rows, error = polled(gpu)
    assert message in str(error)
    assert len([row for row in rows if isinstance(row, Tick)]) == pytest.approx(ticks, abs=1)


# -- the real child, in real time --------------------------------------------------------------------------


def live(gpu_options: dict[str, object] | None = None) -> FakeDeviceFactory:
    return FakeDeviceFactory(FakeGpu(CONSTANT, **(gpu_options or {})))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def sampler() -> Iterator[Sampler]:
    with Sampler(live({"tick_s": 0.05})) as running:
        yield running


def test_a_window_is_metered_in_real_time(sampler: Sampler) -> None:
    start_s = time.monotonic()
    time.sleep(0.4)
    end_s = time.monotonic()
    ticks, samples = sampler.drain(past_s=end_s)
    energy = energy_J(ticks, start_s, end_s)
    truth_J = 600 * (end_s - start_s)
    # On a busy machine polls come late; the interval then says so.
    assert abs(energy.value_J - truth_J) <= max(0.01 * truth_J, 2 * energy.ci90_J)
    assert len(samples) >= 5
    assert sampler.latest_power_W == 600
    sampler.check()


def test_consecutive_drains_share_a_tick(sampler: Sampler) -> None:
    first, _ = sampler.drain(past_s=time.monotonic())
    second, _ = sampler.drain(past_s=time.monotonic())
    assert second.time_s[0] == first.time_s[-1]
    assert first.joined(second).time_s == [*first.time_s, *second.time_s[1:]]


def test_ctrl_c_does_not_end_the_child(sampler: Sampler) -> None:
    assert sampler.pid is not None
    os.kill(sampler.pid, signal.SIGINT)
    assert len(sampler.drain(past_s=time.monotonic())[0]) >= 3


def test_it_cannot_be_started_twice(sampler: Sampler) -> None:
    with pytest.raises(RuntimeError, match="is running"):
        sampler.start()


def test_a_gpu_lost_in_mid_run_is_loud_and_nothing_is_lost() -> None:
    with Sampler(live({"tick_s": 0.02, "lost_at_s": 2.0})) as sampler:
        read, _ = sampler.drain()
        with pytest.raises(MeterError, match="the GPU was lost") as caught:
            sampler.drain(past_s=time.monotonic() + 60)
        assert caught.value.partial is not None
        ticks, samples = caught.value.partial
        assert ticks.time_s[0] == read.time_s[-1]
        assert len(ticks) > 1
        assert len(samples) > 1
        for again in (sampler.check, sampler.drain):
            with pytest.raises(MeterError, match="the GPU was lost") as told_again:
                again()
            assert told_again.value.partial == (ticks, samples)


def test_a_missing_counter_is_told_at_the_start() -> None:
    sampler = Sampler(live({"counter": False}))
    with pytest.raises(MeterError, match="no energy counter"):
        sampler.start()
    assert sampler.pid is None
    sampler.stop()
    with pytest.raises(RuntimeError, match="not running"):
        sampler.drain()


def test_a_counter_that_stands_still_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t2v_energy.metering.sampler.TICK_TIMEOUT_S", 0.3)
    with pytest.raises(MeterError, match="stands still"):
        Sampler(live({"stuck_at_s": 0.0})).start()


def test_a_child_that_is_killed_is_told() -> None:
    with Sampler(live({"tick_s": 0.02})) as sampler:
        assert sampler.pid is not None
        os.kill(sampler.pid, signal.SIGKILL)
        with pytest.raises(MeterError, match="process died"):
            sampler.drain(past_s=time.monotonic() + 60)


PARENT = """
import sys, time
from t2v_energy.metering.fake_nvml import FakeDeviceFactory
from t2v_energy.metering.sampler import Sampler
sampler = Sampler(FakeDeviceFactory())
sampler.start()
print(sampler.pid, flush=True)
time.sleep(60)
"""


def test_the_child_ends_when_its_parent_is_killed() -> None:
    root = Path(fake_nvml.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_running(child)
        parent.kill()
        deadline_s = time.monotonic() + 60
        while is_running(child) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert not is_running(child)


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie (whoever adopts it may not collect it)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_meter_errors_and_factories_survive_pickling() -> None:
    error = MeterError("what", where="where", remedy="remedy", partial=(Ticks(), Samples()))
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.partial) == (str(error), error.partial)
    assert pickle.loads(pickle.dumps(FakeDeviceFactory())) == FakeDeviceFactory()


def test_bad_rates_are_refused() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Sampler(FakeDeviceFactory(), poll_s=0)
