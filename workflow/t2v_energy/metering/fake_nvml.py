"""A fake NVML with a known power trace, to prove the meter against the truth.

It exists for tests and for ``results/tables/meter.csv`` (how accurate each way of reading a counter is).
NOTHING IT YIELDS MAY ENTER ``results/raw``: no watt of it was ever drawn. Its devices say so in their name.

The fake sits below pynvml, in the place of ``libnvidia-ml.so.1``: pynvml's cache of function pointers is
filled with ctypes callbacks that write into the pointers that they are given, so that our
:class:`~t2v_energy.metering.nvml.NvmlDevice` and pynvml's own wrappers run unchanged. A function that is not
faked answers "function not found", as an old driver does.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import random
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from t2v_energy.metering.nvml import NvmlDevice

NAME = "FAKE GPU (not a measurement)"
UUID = "GPU-fa4e0000-0000-0000-0000-000000000000"
AVERAGE_WINDOW_S = 1.0


class VirtualClock:
    """Time that passes only when someone sleeps; call it for the seconds.

    A sleep lasts up to ``late_s`` longer than asked (seeded), as on a real machine: without that, polls and
    ticks would stay in step, and errors that really vary would repeat and cancel.
    """

    def __init__(self, start_s: float = 0.0, late_s: float = 100e-6, seed: int = 0) -> None:
        self.now_s, self._late_s, self._random = start_s, late_s, random.Random(seed).random

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s + self._late_s * self._random()


# -- power traces ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PowerTrace:
    """Power, linear between borders: segment i runs from ``borders_s[i]`` to ``borders_s[i + 1]``, from
    ``start_W[i]`` to ``end_W[i]``. Before the first and after the last border power stays as it is there.
    """

    name: str
    borders_s: tuple[float, ...]
    start_W: tuple[float, ...]
    end_W: tuple[float, ...]

    @cached_property
    def _cumulative_J(self) -> list[float]:
        rows = zip(self.borders_s, self.borders_s[1:], self.start_W, self.end_W, strict=False)
        return [0.0, *accumulate((b - a) * (p + q) / 2 for a, b, p, q in rows)]

    def power_W(self, time_s: float) -> float:
        """Power at ``time_s``, watts; at a step, the power after it."""
        segment = bisect_right(self.borders_s, time_s) - 1
        if segment < 0:
            return self.start_W[0]
        if segment >= len(self.start_W):
            return self.end_W[-1]
        start_s, end_s = self.borders_s[segment : segment + 2]
        share = (time_s - start_s) / (end_s - start_s)
        return self.start_W[segment] + share * (self.end_W[segment] - self.start_W[segment])

    def energy_J(self, start_s: float, end_s: float) -> float:
        """Exact energy between two times, joules."""
        return self._since_first_border_J(end_s) - self._since_first_border_J(start_s)

    def _since_first_border_J(self, time_s: float) -> float:
        segment = bisect_right(self.borders_s, time_s) - 1
        if segment < 0:
            return (time_s - self.borders_s[0]) * self.start_W[0]
        before_J, start_s = self._cumulative_J[segment], self.borders_s[segment]
        first_W = self.start_W[segment] if segment < len(self.start_W) else self.end_W[-1]
        return before_J + (time_s - start_s) * (first_W + self.power_W(time_s)) / 2


def constant(power_W: float = 690.0) -> PowerTrace:
    """The same power for ever."""
    return PowerTrace("constant", (0.0, 1.0), (power_W,), (power_W,))


def ramp(duration_s: float = 60.0, low_W: float = 150.0, high_W: float = 700.0) -> PowerTrace:
    """Power that rises evenly over ``duration_s``."""
    return PowerTrace("ramp", (0.0, duration_s), (low_W,), (high_W,))


def step(at_s: float = 10.0, before_W: float = 150.0, after_W: float = 700.0) -> PowerTrace:
    """One step."""
    return PowerTrace("step", (at_s - 1, at_s, at_s + 1), (before_W, after_W), (before_W, after_W))


def steps(name: str, borders_s: Sequence[float], powers_W: Sequence[float]) -> PowerTrace:
    """Constant power between borders."""
    return PowerTrace(name, tuple(borders_s), tuple(powers_W), tuple(powers_W))


def denoising(
    seed: int,
    duration_s: float,
    windows_s: Sequence[float] = (),
    windows_each: int = 0,
    shortest_s: float = 0.1,
    longest_s: float = 5.0,
) -> tuple[PowerTrace, dict[float, list[tuple[float, float]]]]:
    """A pattern like a pipeline's: steps of 0.1 to 5 s (log-uniform) between 150 and 700 W, seeded.

    Also returns, for each length in ``windows_s``, up to ``windows_each`` windows of exactly that length
    whose edges are borders: borders are added for them where the steps stay at least ``shortest_s`` long.
    """
    rng = random.Random(seed)
    borders = [0.0]
    while borders[-1] < duration_s:
        borders.append(borders[-1] + math.exp(rng.uniform(math.log(shortest_s), math.log(longest_s))))
    windows: dict[float, list[tuple[float, float]]] = {length: [] for length in windows_s}
    for length in windows_s:
        for start in rng.sample(borders, len(borders)):
            end = start + length
            if len(windows[length]) == windows_each:
                break
            if end < borders[-1] and min(abs(end - border) for border in borders) >= shortest_s:
                windows[length].append((start, end))
                borders = sorted([*borders, end])
    powers = [rng.uniform(150, 700) for _ in borders[1:]]
    return steps("denoising", borders, powers), windows


def rippled(trace: PowerTrace, share: float, seed: int, period_s: float = 0.03) -> PowerTrace:
    """``trace``, of constant steps, with its power varying by ``share`` (normal, seeded) every ``period_s``.

    Each step is divided into whole periods, so its borders stay.
    """
    rng = random.Random(seed)
    borders, powers = [trace.borders_s[0]], []
    for start, end, power in zip(trace.borders_s, trace.borders_s[1:], trace.start_W, strict=False):
        parts = max(1, round((end - start) / period_s))
        borders += [start + (end - start) * (i + 1) / parts for i in range(parts)]
        powers += [power * (1 + share * rng.gauss(0, 1)) for _ in range(parts)]
    return steps(f"rippled {trace.name}", borders, powers)


# -- the device --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FakeGpu:
    """A GPU with a known trace; picklable. Times are seconds of the trace, which starts at ``origin_s``.

    Its counter holds the trace's exact energy at the ticks, ``phase_s + k * tick_s`` (each off by at most
    ``jitter_s``, seeded), rounded down to ``quantum_mJ``. ``counter=False`` is a GPU without one;
    ``power_fields=False`` an old driver, which has nvmlDeviceGetPowerUsage alone; ``old_names=True`` one
    that knows the temperature and throttle functions by their old names only.
    """

    trace: PowerTrace
    origin_s: float = 0.0
    tick_s: float = 0.1
    phase_s: float = 0.0
    jitter_s: float = 0.0
    quantum_mJ: int = 1
    start_mJ: int = 123_456_789
    counter: bool = True
    power_fields: bool = True
    old_names: bool = False
    permitted: bool = True
    reset_at_s: float = math.inf
    lost_at_s: float = math.inf
    stuck_at_s: float = math.inf
    processes: tuple[tuple[int, int], ...] = ()  # pid, MiB
    throttle_reasons: int = 0
    temperature_C: int = 55
    sm_clock_MHz: int = 1980
    memory_used_MiB: int = 20_000
    power_limit_W: float = 700.0
    capability: tuple[int, int] = (9, 0)
    name: str = NAME
    uuid: str = UUID

    def _tick_at_s(self, index: int) -> float:
        jitter = random.Random(index).uniform(-1, 1) * self.jitter_s if self.jitter_s else 0.0
        return self.phase_s + index * self.tick_s + jitter

    def last_tick(self, time_s: float) -> int:
        """Index of the last tick at or before ``time_s`` of the trace."""
        index = math.floor((time_s - self.phase_s) / self.tick_s)
        if not self.jitter_s:
            return index
        if self._tick_at_s(index) > time_s:
            return index - 1
        return index + 1 if self._tick_at_s(index + 1) <= time_s else index

    def counter_mJ(self, tick: int) -> int:
        """The counter from this tick until the next."""
        tick_s = min(self._tick_at_s(tick), self.stuck_at_s)
        since_s, start_mJ = (0.0, self.start_mJ) if tick_s < self.reset_at_s else (self.reset_at_s, 0)
        exact_mJ = start_mJ + 1000 * self.trace.energy_J(since_s, tick_s)
        return int(exact_mJ // self.quantum_mJ) * self.quantum_mJ


@dataclass
class _State:
    """A device and its counter as last read: polls come far more often than ticks."""

    gpu: FakeGpu
    tick: int | None = None
    energy_mJ: int = 0


class FakeNvml:
    """Stands in for the NVML library under pynvml between :meth:`install` and :meth:`uninstall`."""

    def __init__(self, gpus: Sequence[FakeGpu], clock: Callable[[], float] = time.monotonic) -> None:
        self._nvml: Any = importlib.import_module("pynvml")
        self._states = [_State(gpu) for gpu in gpus]
        self._clock = clock
        self._saved: tuple[Any, dict[str, Any]] | None = None
        self.initialised = 0

    def install(self) -> None:
        """Take the library's place in this process."""
        nvml = self._nvml
        cache = nvml._nvmlGetFunctionPointer_cache
        self._saved = nvml.nvmlLib, dict(cache)
        # Not None, so that nvmlInit loads nothing, and without functions, so that the rest is "not found".
        nvml.nvmlLib = object()
        cache.clear()
        cache.update(self._callbacks())

    def uninstall(self) -> None:
        """Put back what was there."""
        if self._saved is not None:
            self._nvml.nvmlLib, functions = self._saved
            self._nvml._nvmlGetFunctionPointer_cache.clear()
            self._nvml._nvmlGetFunctionPointer_cache.update(functions)
            self._saved = None

    # -- the library's functions ---------------------------------------------------------------------------

    def _callbacks(self) -> dict[str, Any]:
        pointer, number = ctypes.c_void_p, ctypes.c_uint
        device = self._device_function
        functions: dict[str, tuple[tuple[Any, ...], Callable[..., int]]] = {
            "nvmlInitWithFlags": ((number,), self._init),
            "nvmlShutdown": ((), self._shutdown),
            "nvmlSystemGetDriverVersion": ((pointer, number), self._driver),
            "nvmlDeviceGetCount_v2": ((pointer,), self._count),
            "nvmlDeviceGetHandleByIndex_v2": ((number, pointer), self._handle),
            "nvmlDeviceGetUUID": ((pointer, pointer, number), device(self._uuid)),
            "nvmlDeviceGetName": ((pointer, pointer, number), device(self._name)),
            "nvmlDeviceGetTotalEnergyConsumption": ((pointer, pointer), device(self._energy)),
            "nvmlDeviceGetFieldValues": ((pointer, ctypes.c_int32, pointer), device(self._fields)),
            "nvmlDeviceGetPowerUsage": ((pointer, pointer), device(self._power_usage)),
            "nvmlDeviceGetEnforcedPowerLimit": ((pointer, pointer), device(self._power_limit)),
            "nvmlDeviceGetClockInfo": ((pointer, number, pointer), device(self._clock_info)),
            "nvmlDeviceGetMemoryInfo": ((pointer, pointer), device(self._memory)),
            "nvmlDeviceGetCudaComputeCapability": ((pointer, pointer, pointer), device(self._capability)),
            "nvmlDeviceGetComputeRunningProcesses_v3": (
                (pointer, pointer, pointer),
                device(self._compute_processes),
            ),
            "nvmlDeviceGetGraphicsRunningProcesses_v3": (
                (pointer, pointer, pointer),
                device(self._no_processes),
            ),
        }
        if any(state.gpu.old_names for state in self._states):
            functions["nvmlDeviceGetTemperature"] = ((pointer, number, pointer), device(self._temperature))
            functions["nvmlDeviceGetCurrentClocksThrottleReasons"] = (
                (pointer, pointer),
                device(self._reasons),
            )
        else:
            functions["nvmlDeviceGetTemperatureV"] = ((pointer, pointer), device(self._temperature_v))
            functions["nvmlDeviceGetCurrentClocksEventReasons"] = ((pointer, pointer), device(self._reasons))
        return {
            name: ctypes.CFUNCTYPE(ctypes.c_uint, *arguments)(function)
            for name, (arguments, function) in functions.items()
        }

    def _device_function(self, function: Callable[..., int | None]) -> Callable[..., int]:
        """A callback of the C signature (handle, …) for the handle's device, until that is lost."""
        lost, success = self._nvml.NVML_ERROR_GPU_IS_LOST, self._nvml.NVML_SUCCESS

        def called(handle: int, *arguments: Any) -> int:
            state = self._states[handle - 1]
            time_s = self._clock() - state.gpu.origin_s
            if time_s >= state.gpu.lost_at_s:
                return int(lost)
            return function(state, time_s, *arguments) or success

        return called

    def _init(self, _flags: int) -> int:
        self.initialised += 1
        return int(self._nvml.NVML_SUCCESS)

    def _shutdown(self) -> int:
        self.initialised -= 1
        return int(self._nvml.NVML_SUCCESS)

    def _driver(self, buffer: int, size: int) -> int:
        return _write_text("000.00 (fake)", buffer, size)

    def _count(self, count: int) -> int:
        ctypes.c_uint.from_address(count).value = len(self._states)
        return int(self._nvml.NVML_SUCCESS)

    def _handle(self, index: int, handle: int) -> int:
        if index >= len(self._states):
            return int(self._nvml.NVML_ERROR_INVALID_ARGUMENT)
        ctypes.c_void_p.from_address(handle).value = index + 1
        return int(self._nvml.NVML_SUCCESS)

    def _uuid(self, state: _State, _time_s: float, buffer: int, size: int) -> int:
        return _write_text(state.gpu.uuid, buffer, size)

    def _name(self, state: _State, _time_s: float, buffer: int, size: int) -> int:
        return _write_text(state.gpu.name, buffer, size)

    def _energy(self, state: _State, time_s: float, energy: int) -> int | None:
        if not state.gpu.permitted:
            return int(self._nvml.NVML_ERROR_NO_PERMISSION)
        if not state.gpu.counter:
            return int(self._nvml.NVML_ERROR_NOT_SUPPORTED)
        tick = state.gpu.last_tick(time_s)
        if tick != state.tick:
            state.tick, state.energy_mJ = tick, state.gpu.counter_mJ(tick)
        ctypes.c_uint64.from_address(energy).value = state.energy_mJ
        return None

    def _average_W(self, gpu: FakeGpu, time_s: float) -> float:
        return gpu.trace.energy_J(time_s - AVERAGE_WINDOW_S, time_s) / AVERAGE_WINDOW_S

    def _fields(self, state: _State, time_s: float, count: int, address: int) -> None:
        nvml, gpu = self._nvml, state.gpu
        powers = {
            nvml.NVML_FI_DEV_POWER_INSTANT: lambda: gpu.trace.power_W(time_s),
            nvml.NVML_FI_DEV_POWER_AVERAGE: lambda: self._average_W(gpu, time_s),
        }
        for value in (nvml.c_nvmlFieldValue_t * count).from_address(address):
            read = powers.get(value.fieldId) if gpu.power_fields else None
            value.nvmlReturn = nvml.NVML_ERROR_NOT_SUPPORTED if read is None else nvml.NVML_SUCCESS
            if read is not None:
                value.valueType = nvml.NVML_VALUE_TYPE_UNSIGNED_INT
                value.value.uiVal = round(1000 * read())

    def _power_usage(self, state: _State, time_s: float, power: int) -> None:
        gpu = state.gpu
        instant = gpu.capability <= (8, 0)
        power_W = gpu.trace.power_W(time_s) if instant else self._average_W(gpu, time_s)
        ctypes.c_uint.from_address(power).value = round(1000 * power_W)

    def _power_limit(self, state: _State, _time_s: float, limit: int) -> None:
        ctypes.c_uint.from_address(limit).value = round(1000 * state.gpu.power_limit_W)

    def _clock_info(self, state: _State, _time_s: float, _kind: int, clock: int) -> None:
        ctypes.c_uint.from_address(clock).value = state.gpu.sm_clock_MHz

    def _temperature(self, state: _State, _time_s: float, _sensor: int, temperature: int) -> None:
        ctypes.c_uint.from_address(temperature).value = state.gpu.temperature_C

    def _temperature_v(self, state: _State, _time_s: float, temperature: int) -> None:
        self._nvml.c_nvmlTemperature_v1_t.from_address(temperature).temperature = state.gpu.temperature_C

    def _reasons(self, state: _State, _time_s: float, reasons: int) -> None:
        ctypes.c_ulonglong.from_address(reasons).value = state.gpu.throttle_reasons

    def _memory(self, state: _State, _time_s: float, memory: int) -> None:
        written = self._nvml.c_nvmlMemory_t.from_address(memory)
        written.total, written.used = 140_000 * 2**20, state.gpu.memory_used_MiB * 2**20
        written.free = written.total - written.used

    def _capability(self, state: _State, _time_s: float, major: int, minor: int) -> None:
        for address, value in zip((major, minor), state.gpu.capability, strict=True):
            ctypes.c_int.from_address(address).value = value

    def _compute_processes(self, state: _State, _time_s: float, count: int, infos: int | None) -> int | None:
        room, processes = ctypes.c_uint.from_address(count), state.gpu.processes
        if infos is None and processes:
            room.value = len(processes)
            return int(self._nvml.NVML_ERROR_INSUFFICIENT_SIZE)
        room.value = len(processes)
        if infos is not None:
            rows = (self._nvml.c_nvmlProcessInfo_v3_t * len(processes)).from_address(infos)
            for row, (pid, used_MiB) in zip(rows, processes, strict=True):
                row.pid, row.usedGpuMemory = pid, used_MiB * 2**20
        return None

    def _no_processes(self, _state: _State, _time_s: float, count: int, _infos: int | None) -> None:
        ctypes.c_uint.from_address(count).value = 0


def _write_text(text: str, buffer: int, size: int) -> int:
    data = text.encode() + b"\0"
    ctypes.memmove(buffer, data, min(len(data), size))
    return 0


@contextmanager
def installed(gpus: Sequence[FakeGpu], clock: Callable[[], float] = time.monotonic) -> Iterator[FakeNvml]:
    """The fake in place of NVML inside the ``with`` block, in this process."""
    fake = FakeNvml(gpus, clock)
    fake.install()
    try:
        yield fake
    finally:
        fake.uninstall()


@dataclass(frozen=True)
class FakeDeviceFactory:
    """Opens a fake GPU in whatever process calls it, in real time; picklable, for the sampler's child.

    The GPU's trace begins when it is opened, unless its ``origin_s`` says otherwise.
    """

    gpu: FakeGpu = field(default_factory=lambda: FakeGpu(constant()))

    def __call__(self) -> NvmlDevice:
        # Stays installed: the process that calls this is the sampler's child, and ends with it.
        gpu = self.gpu if self.gpu.origin_s else replace(self.gpu, origin_s=time.monotonic())
        FakeNvml((gpu,)).install()
        return NvmlDevice.open(self.gpu.uuid)
