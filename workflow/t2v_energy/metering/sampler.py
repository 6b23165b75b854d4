"""The meter at work: a process of its own that polls one GPU's energy counter and sensors.

Its own process, because the thread that launches a pipeline's kernels must neither wait for the meter's
interpreter lock nor make the meter wait: a poll that comes late widens the interval in which the counter
ticked. Times are ``time.monotonic()`` (CLOCK_MONOTONIC), which all processes of a machine share.

Nothing is sent unasked: the child keeps what it reads and answers ``drain()``, so the parent spends no
thread and no time on it between drains.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Protocol

from t2v_energy.metering.series import MeterError, Sample, Samples, Tick, Ticks

START_TIMEOUT_S = 60.0  # a cold import from a network disk is slow
ANSWER_TIMEOUT_S = 10.0
TICK_TIMEOUT_S = 5.0
# Ticks to wait for after an edge: attribution compares the edge's interval with the ones beyond it.
TICKS_BEYOND = 3
# Near an expected tick the counter is polled this many times as often.
FINE = 8


class Device(Protocol):
    """What the poll needs of a GPU; :class:`t2v_energy.metering.nvml.NvmlDevice` has it."""

    uuid: str
    name: str

    def energy_mJ(self) -> int: ...

    def sample(self, clock: Callable[[], float]) -> Sample: ...

    def close(self) -> None: ...


class TickForecast:
    """When the counter should tick next, so that polls are dense there and cheap elsewhere.

    A forecast that fails costs nothing but the fine resolution: polls then come every ``poll_s`` as before.
    """

    def __init__(self, poll_s: float) -> None:
        self.poll_s, self.fine_s, self.guard_s = poll_s, poll_s / FINE, 1.5 * poll_s
        self._periods: deque[float] = deque(maxlen=5)
        self._last_s: float | None = None
        self._expected_s = float("inf")

    def saw(self, not_before_s: float, time_s: float) -> None:
        """A tick came between these two times."""
        middle_s = (not_before_s + time_s) / 2
        if self._last_s is not None:
            self._periods.append(middle_s - self._last_s)
            self._expected_s = middle_s + statistics.median(self._periods)
        self._last_s = middle_s

    def near(self, now_s: float) -> bool:
        """Whether a tick is due within the guard time."""
        return abs(now_s - self._expected_s) <= self.guard_s

    def pause_s(self, now_s: float) -> float:
        """How long to sleep before the next poll."""
        if self.near(now_s):
            return self.fine_s
        until_guard_s = self._expected_s - self.guard_s - now_s
        # Never end a coarse pause inside the guard: stop at its edge (and at least one fine pause on).
        return max(min(self.poll_s, until_guard_s), self.fine_s) if until_guard_s > 0 else self.poll_s


def poll(
    device: Device,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
    emit: Callable[[Tick | Sample], None],
    stop: Callable[[], bool],
    poll_s: float,
    sample_hz: float,
) -> None:
    """Read ``device`` until ``stop()``: emit a :class:`Tick` each time the counter changes, and samples.

    The counter is read at least every ``poll_s`` seconds, and eight times as often where the next tick is
    expected; sensors are read ``sample_hz`` times a second, but not where a tick is expected. The counter's
    first value is no tick, as nobody saw it change. Raises :class:`MeterError` when the device does, and when
    the counter falls.
    """
    forecast = TickForecast(poll_s)
    next_sample_s = not_before_s = clock()
    energy_mJ = device.energy_mJ()
    while not stop():
        now_s = clock()
        if now_s >= next_sample_s and not forecast.near(now_s):
            emit(device.sample(clock))
            next_sample_s = max(next_sample_s + 1 / sample_hz, now_s)
        sleep(forecast.pause_s(now_s))
        before_s = clock()
        value_mJ = device.energy_mJ()
        after_s = clock()
        if value_mJ < energy_mJ:
            raise MeterError(
                f"the energy counter fell from {energy_mJ} to {value_mJ} mJ: it was reset",
                where=f"{device.name} {device.uuid}",
                remedy="see what reloaded the driver or reset the GPU (dmesg), then measure again",
            )
        if value_mJ > energy_mJ:
            emit(Tick(after_s, not_before_s, value_mJ))
            forecast.saw(not_before_s, after_s)
        energy_mJ, not_before_s = value_mJ, before_s


# -- the child ---------------------------------------------------------------------------------------------

# Doubles that the child writes and the parent reads, without a lock: each is written whole.
TICK_COUNT, LAST_TICK_S, POWER_W, OPENED, FAILED = range(5)
AT_START = [0.0, float("-inf"), float("nan"), 0.0, 0.0]


@dataclass(frozen=True)
class _Failure:
    """A MeterError's parts: exceptions with keyword arguments do not survive pickling."""

    what: str
    where: str = ""
    remedy: str = ""

    @classmethod
    def of(cls, error: BaseException) -> _Failure:
        if isinstance(error, MeterError):
            return cls(error.what, error.where, error.remedy)
        return cls(
            f"the meter failed: {type(error).__name__}: {error}", remedy="report this message as a bug"
        )


@dataclass
class _Child:
    """What the child has read since the last drain, and how it answers. It sends nothing unasked."""

    pipe: Connection
    parent_pid: int
    shared: Any
    ticks: list[Tick] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    failure: _Failure | None = None

    def emit(self, row: Tick | Sample) -> None:
        if isinstance(row, Tick):
            self.ticks.append(row)
            self.shared[LAST_TICK_S] = row.time_s
            self.shared[TICK_COUNT] += 1
        else:
            self.samples.append(row)
            power_W = row.power_average_W if row.power_instant_W is None else row.power_instant_W
            if power_W is not None:
                self.shared[POWER_W] = power_W

    def stop(self, timeout_s: float = 0.0) -> bool:
        """Answer what the parent asks; True when it is done or gone."""
        if os.getppid() != self.parent_pid:  # killed: nobody is left to measure for
            return True
        if not self.pipe.poll(timeout_s):
            return False
        if self.pipe.recv() == "stop":
            return True
        self.pipe.send((self.ticks, self.samples, self.failure))
        self.ticks, self.samples = self.ticks[-1:], []
        return False

    def opened(self) -> None:
        self.shared[OPENED] = 1

    def failed(self, error: Exception) -> None:
        """Tell, and stay until the parent has fetched what was read."""
        self.failure = _Failure.of(error)
        self.shared[FAILED] = 1
        while not self.stop(timeout_s=0.1):
            pass


def _child_main(
    open_device: Callable[[], Device],
    pipe: Connection,
    parent_pid: int,
    shared: Any,
    poll_s: float,
    sample_hz: float,
) -> None:
    # Ctrl-C reaches the whole process group; what to do about it is for the parent to decide.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    child = _Child(pipe, parent_pid, shared)
    try:
        try:
            with closing(open_device()) as device:
                child.opened()
                poll(device, time.monotonic, time.sleep, child.emit, child.stop, poll_s, sample_hz)
        except (EOFError, ConnectionError):
            raise
        except Exception as error:
            child.failed(error)
    except (EOFError, ConnectionError):
        pass  # the parent is gone


# -- the parent --------------------------------------------------------------------------------------------


class Sampler:
    """Meters one GPU from a process of its own, from :meth:`start` to :meth:`stop`; a context manager.

    ``open_device`` is called in the child and must be picklable, such as
    ``functools.partial(NvmlDevice.open, uuid)``. Every ``poll_s`` seconds the energy counter is read,
    ``sample_hz`` times a second the sensors. The child ends when this process does, however it ends, and
    ignores SIGINT.
    """

    def __init__(
        self, open_device: Callable[[], Device], poll_s: float = 0.002, sample_hz: float = 20.0
    ) -> None:
        if not (poll_s > 0 and sample_hz > 0):
            raise ValueError(f"poll_s and sample_hz must be positive, not {poll_s} and {sample_hz}")
        self._arguments = (open_device, poll_s, sample_hz)
        self._process: Any = None
        self._pipe: Connection | None = None
        self._shared: Any = list(AT_START)
        self._asking = threading.Lock()  # a progress bar may check() from its own thread
        self._failure: _Failure | None = None
        self._partial: tuple[Ticks, Samples] | None = None

    def __enter__(self) -> Sampler:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """Process id of the child, None when there is none."""
        return None if self._process is None else self._process.pid

    @property
    def latest_power_W(self) -> float | None:
        """The last power sample (instantaneous where the GPU has it), None before the first.

        Reads shared memory: it costs the child nothing and may be called at any time.
        """
        power_W = float(self._shared[POWER_W])
        return None if power_W != power_W else power_W

    def start(self) -> None:
        """Start the child and wait for the counter's first ticks, so that windows from now on are covered.

        Raises :class:`MeterError`: whatever opening the GPU raises in the child, no answer within a minute,
        or a counter that stands still for five seconds.
        """
        if self._process is not None:
            raise RuntimeError("the sampler is running")
        self._failure = self._partial = None
        self._spawn()
        try:
            self._wait_until(lambda: self._shared[OPENED] > 0, START_TIMEOUT_S, "the GPU was not opened")
            self._wait_for_ticks(TICKS_BEYOND)
        except BaseException:
            self.stop()
            raise

    def _spawn(self) -> None:
        open_device, poll_s, sample_hz = self._arguments
        context = multiprocessing.get_context("spawn")
        self._shared = context.RawArray("d", AT_START)
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_child_main,
            args=(open_device, theirs, os.getpid(), self._shared, poll_s, sample_hz),
            name="t2v-energy-meter",
            daemon=True,
        )
        # Blocked until the child ignores it: Ctrl-C during its imports must not kill the meter.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()

    def stop(self) -> None:
        """End the child; what was not drained is gone. A second call does nothing."""
        process, self._process = self._process, None
        pipe, self._pipe = self._pipe, None
        if process is None or pipe is None:
            return
        with suppress(OSError):  # it may be gone already
            pipe.send("stop")
        pipe.close()
        process.join(ANSWER_TIMEOUT_S)
        if process.is_alive():  # stuck in a driver call
            process.kill()
            process.join(ANSWER_TIMEOUT_S)

    def check(self) -> None:
        """Raise :class:`MeterError` if the child has failed or died; costs microseconds otherwise.

        ``partial`` of the exception holds what was read before the failure and not yet drained; every later
        :meth:`check` or :meth:`drain` raises the same.
        """
        self._running()
        if self._failure is None and self._shared[FAILED]:
            self._ask()
        if self._failure is None and not self._process.is_alive():
            self._died()
        if self._failure is not None:
            raise MeterError(
                self._failure.what,
                where=self._failure.where,
                remedy=self._failure.remedy,
                partial=self._partial,
            )

    def drain(self, past_s: float | None = None) -> tuple[Ticks, Samples]:
        """Everything since the last drain; the last tick is kept, so that consecutive drains share it.

        With ``past_s`` (monotonic seconds) it first waits for the third tick after it (0.3 s on an H200), so
        that a window ending there is covered and its edge well attributed.

        Raises :class:`MeterError` if the child failed, with what was read in ``partial``, or if the counter
        stands still for five seconds.
        """
        if past_s is not None:
            while self._shared[LAST_TICK_S] < past_s:
                self._wait_for_ticks(self._shared[TICK_COUNT] + 1)
            self._wait_for_ticks(self._shared[TICK_COUNT] + TICKS_BEYOND - 1)
        self.check()
        read = self._ask()
        self.check()
        return read

    # -- inside --------------------------------------------------------------------------------------------

    def _running(self) -> Connection:
        if self._pipe is None:
            raise RuntimeError("the sampler is not running: call start() or use it as a context manager")
        return self._pipe

    def _ask(self) -> tuple[Ticks, Samples]:
        """Fetch what the child has; keeps its failure, if any, with the data."""
        pipe, read = self._running(), (Ticks(), Samples())
        with self._asking:
            try:
                pipe.send("drain")
                if not pipe.poll(ANSWER_TIMEOUT_S):
                    self._failure = _Failure(
                        f"the meter's process has not answered for {ANSWER_TIMEOUT_S:g} s",
                        f"process {self.pid}",
                        "the driver may hang: see `nvidia-smi` and `dmesg`",
                    )
                    return read
                ticks, samples, failure = pipe.recv()
            except (EOFError, OSError):
                self._died()
                return read
        read = Ticks.from_rows(ticks), Samples.from_rows(samples)
        if failure is not None:
            self._failure, self._partial = failure, read
        return read

    def _died(self) -> None:
        self._process.join(1)
        self._failure = _Failure(
            "the meter's process died; what it had read since the last drain is lost",
            f"process {self.pid}, exit code {self._process.exitcode}",
            "see whether the system killed it (memory, job limits), then run the same command again",
        )

    def _wait_for_ticks(self, count: float) -> None:
        """Wait until the counter has ticked ``count`` times in all since the start."""
        while (seen := self._shared[TICK_COUNT]) < count:
            self._wait_until(
                partial(self._has_ticked_since, seen),
                TICK_TIMEOUT_S,
                "the GPU's energy counter stands still",
            )

    def _has_ticked_since(self, seen: float) -> bool:
        return bool(self._shared[TICK_COUNT] > seen)

    def _wait_until(self, done: Callable[[], bool], timeout_s: float, otherwise: str) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not done():
            self.check()
            if time.monotonic() > deadline_s:
                raise MeterError(
                    f"{otherwise}: waited {timeout_s:g} s",
                    where=f"the meter's process {self.pid}",
                    remedy="see whether `nvidia-smi -q -d POWER` answers; if not, measure on another GPU",
                )
            time.sleep(0.002)
