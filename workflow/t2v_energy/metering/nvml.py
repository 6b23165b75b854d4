"""A GPU as NVML shows it: energy counter, power, clocks, temperature, memory, processes.

``pynvml`` (PyPI ``nvidia-ml-py``) comes with the extra ``measure`` and is imported on first use, so that this
module can be imported anywhere. GPUs are named by UUID: an index of NVML is not one of CUDA, and picking
by index has metered the neighbour's GPU before.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from t2v_energy.metering.series import MeterError, Sample

__all__ = ["DeviceInfo", "MeterError", "NvmlDevice", "list_devices"]

MIB = 1024 * 1024
# The only GPU of its compute capability; newer ones give the mean of a second where it gives an instant.
GA100_CAPABILITY = (8, 0)
T = TypeVar("T")


class DeviceInfo(NamedTuple):
    """A GPU that NVML lists; ``nvml_index`` is not CUDA's index."""

    nvml_index: int
    uuid: str
    name: str


def _import_pynvml() -> Any:
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        raise MeterError(
            "the Python package nvidia-ml-py is not installed, so the GPU's energy cannot be read",
            where="pynvml",
            remedy="install the extra: pip install 't2v-energy[measure]'",
        ) from None


def _initialised() -> Any:
    """``pynvml`` with NVML initialised; NVML counts, so every call needs one ``nvmlShutdown``."""
    nvml = _import_pynvml()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise _meter_error(nvml, error, "NVML", "initialising NVML") from error
    return nvml


def _meter_error(nvml: Any, error: Any, where: str, doing: str) -> MeterError:
    """What the user should read for an ``NVMLError`` that came up while ``doing`` something at ``where``."""
    known: dict[int, tuple[str, str]] = {
        nvml.NVML_ERROR_LIBRARY_NOT_FOUND: (
            "there is no NVML library (libnvidia-ml.so.1) on this machine: no NVIDIA driver is installed",
            "measure on a machine with an NVIDIA GPU and driver; in a container, start it with --gpus all",
        ),
        nvml.NVML_ERROR_DRIVER_NOT_LOADED: (
            "the NVML library is there but the NVIDIA driver is not loaded",
            "load it (nvidia-smi should list the GPU), or ask for a GPU in the job's request",
        ),
        nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: (
            "the NVML library and the loaded driver are of different versions",
            "reboot, or reload the driver after its update",
        ),
        nvml.NVML_ERROR_GPU_IS_LOST: (
            "the GPU was lost: it fell off the bus or stopped answering",
            "look for Xid messages in `dmesg`, reset the GPU or reboot, then run the same command again: "
            "finished configurations are kept",
        ),
        nvml.NVML_ERROR_RESET_REQUIRED: (
            "the GPU needs a reset before it answers again",
            "run `nvidia-smi --gpu-reset` or reboot, then run the same command again",
        ),
        nvml.NVML_ERROR_NO_PERMISSION: (
            f"no permission for {doing}",
            "ask for access to /dev/nvidia* (in a container: --gpus, NVIDIA_DRIVER_CAPABILITIES=utility)",
        ),
    }
    what, remedy = known.get(
        error.value,
        (
            f"{doing} failed: {error} (NVML error {error.value})",
            "see whether `nvidia-smi -q` shows the value",
        ),
    )
    return MeterError(what, where=where, remedy=remedy)


def _listed(nvml: Any) -> list[DeviceInfo]:
    devices = []
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        devices.append(DeviceInfo(index, nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle)))
    return devices


def list_devices() -> list[DeviceInfo]:
    """Every GPU that NVML lists, in its order. Raises :class:`MeterError` where NVML does not answer."""
    nvml = _initialised()
    try:
        return _listed(nvml)
    except nvml.NVMLError as error:
        raise _meter_error(nvml, error, "NVML", "listing the GPUs") from error
    finally:
        nvml.nvmlShutdown()


def _bare(uuid: str) -> str:
    """A UUID without its prefix: torch says ``1234-…`` where NVML says ``GPU-1234-…``."""
    return uuid.lower().removeprefix("gpu-")


def _pick(devices: list[DeviceInfo], uuid: str | None, index: int | None) -> DeviceInfo:
    present = "; ".join(f"{d.nvml_index}: {d.uuid} ({d.name})" for d in devices) or "none"
    if uuid is not None and uuid.upper().startswith("MIG-"):
        raise MeterError(
            "a MIG slice has no energy counter of its own",
            where=uuid,
            remedy="measure on a whole GPU (nvidia-smi -mig 0, or another partition of the cluster)",
        )
    if uuid is not None:
        found = [d for d in devices if _bare(d.uuid) == _bare(uuid)]
        asked = f"UUID {uuid}"
    elif index is not None:
        found = [d for d in devices if d.nvml_index == index]
        asked = f"NVML index {index}"
    else:
        found = devices
        asked = "no UUID given"
    if len(found) == 1:
        return found[0]
    what = "no such GPU" if not found else "several GPUs, and none was named"
    raise MeterError(what, where=asked, remedy=f"name one of those that NVML lists: {present}")


class NvmlDevice:
    """One open GPU. Use :meth:`open`; close it, or use it as a context manager.

    Every method raises :class:`MeterError` when NVML refuses; a sensor of :meth:`sample` that the GPU does
    not have is None instead.
    """

    def __init__(self, nvml: Any, handle: Any, info: DeviceInfo) -> None:
        self._nvml, self._handle = nvml, handle
        self.uuid, self.name, self.index = info.uuid, info.name, info.nvml_index
        self._open = True
        self._lacking = {
            nvml.NVML_ERROR_NOT_SUPPORTED,
            nvml.NVML_ERROR_FUNCTION_NOT_FOUND,
            nvml.NVML_ERROR_NO_DATA,
        }
        self._temperature = self._first_supported(self._read_temperature_v, self._read_temperature)
        self._throttle = self._first_supported(self._read_event_reasons, self._read_throttle_reasons)
        self._usage_is_instant = self._power_usage_is_instant()

    @classmethod
    def open(cls, uuid: str | None = None, index: int | None = None) -> NvmlDevice:
        """The GPU with this UUID (with or without ``GPU-``), else with this NVML index, else the only one.

        Raises :class:`MeterError`: pynvml not installed, no NVML or driver, no such GPU (the message lists
        those present), several and none named, or a MIG slice.
        """
        nvml = _initialised()
        try:
            info = _pick(_listed(nvml), uuid, index)
            return cls(nvml, nvml.nvmlDeviceGetHandleByIndex(info.nvml_index), info)
        except nvml.NVMLError as error:
            nvml.nvmlShutdown()
            raise _meter_error(nvml, error, uuid or "NVML", "opening the GPU") from error
        except MeterError:
            nvml.nvmlShutdown()
            raise

    def __enter__(self) -> NvmlDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give NVML back; a second call does nothing."""
        if self._open:
            self._open = False
            # A lost GPU must not hide the error that told so.
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()

    # -- the counter ---------------------------------------------------------------------------------------

    def energy_mJ(self) -> int:
        """The total-energy counter: millijoules since the driver was loaded.

        Raises :class:`MeterError` where there is none (before Volta, vGPU) and when the GPU is lost.
        """
        try:
            return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except self._nvml.NVMLError as error:
            if error.value in self._lacking:
                raise MeterError(
                    "this GPU has no energy counter (it came with Volta, and a vGPU or MIG slice has none)",
                    where=f"{self.name} {self.uuid}",
                    remedy="measure on a whole GPU of the Volta generation or later",
                ) from error
            raise self._error(error, "reading the energy counter") from error

    # -- the sensors ---------------------------------------------------------------------------------------

    def sample(self, clock: Callable[[], float] = time.monotonic) -> Sample:
        """The sensors now, at ``clock()`` seconds; power is read first, right after the time is taken."""
        time_s = clock()
        instant_W, average_W = self._power_W()
        return Sample(
            time_s=time_s,
            power_instant_W=instant_W,
            power_average_W=average_W,
            sm_clock_MHz=self._optional(self._read_sm_clock, "reading the SM clock"),
            temperature_C=self._optional(self._temperature, "reading the temperature"),
            throttle_reasons=self._optional(self._throttle, "reading the throttle reasons"),
            memory_used_MiB=self._optional(self._read_memory_used, "reading the memory in use"),
        )

    def _power_W(self) -> tuple[float | None, float | None]:
        """Instantaneous power and the driver's mean of a second, each None where the GPU lacks it.

        Drivers without the fields have ``nvmlDeviceGetPowerUsage`` alone. It is an instant up to GA100
        (A100) and a mean of one second on everything newer: it fills the column that it truly is.
        """
        fields = self._optional(self._read_power_fields, "reading the power")
        instant_W, average_W = fields if fields is not None else (None, None)
        if instant_W is None and (average_W is None or self._usage_is_instant):
            usage_W = self._optional(self._read_power_usage, "reading the power")
            if self._usage_is_instant:
                return usage_W, average_W
            return None, usage_W
        return instant_W, average_W

    def _read_power_fields(self) -> tuple[float | None, float | None]:
        ids = [self._nvml.NVML_FI_DEV_POWER_INSTANT, self._nvml.NVML_FI_DEV_POWER_AVERAGE]
        instant, average = self._nvml.nvmlDeviceGetFieldValues(self._handle, ids)
        return self._watts(instant), self._watts(average)

    def _watts(self, field: Any) -> float | None:
        # "Invalid argument" is what older drivers answer to a field that they do not know.
        if field.nvmlReturn in self._lacking | {self._nvml.NVML_ERROR_INVALID_ARGUMENT}:
            return None
        if field.nvmlReturn != self._nvml.NVML_SUCCESS:
            raise self._nvml.NVMLError(field.nvmlReturn)
        return float(field.value.uiVal) / 1000

    def _read_power_usage(self) -> float:
        return float(self._nvml.nvmlDeviceGetPowerUsage(self._handle)) / 1000

    def _power_usage_is_instant(self) -> bool:
        capability = self._optional(
            lambda: tuple(self._nvml.nvmlDeviceGetCudaComputeCapability(self._handle)),
            "reading the compute capability",
        )
        return capability is not None and capability <= GA100_CAPABILITY

    def _read_sm_clock(self) -> int:
        return int(self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM))

    def _read_memory_used(self) -> float:
        return float(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used) / MIB

    # Two names each: CUDA 14 removes the old ones, and older drivers lack the new.

    def _read_temperature_v(self) -> int:
        return int(self._nvml.nvmlDeviceGetTemperatureV(self._handle, self._nvml.NVML_TEMPERATURE_GPU))

    def _read_temperature(self) -> int:
        return int(self._nvml.nvmlDeviceGetTemperature(self._handle, self._nvml.NVML_TEMPERATURE_GPU))

    def _read_event_reasons(self) -> int:
        return int(self._nvml.nvmlDeviceGetCurrentClocksEventReasons(self._handle))

    def _read_throttle_reasons(self) -> int:
        return int(self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle))

    # -- what does not change ------------------------------------------------------------------------------

    @property
    def driver(self) -> str:
        """Version of the NVIDIA driver."""
        return str(self._required(self._nvml.nvmlSystemGetDriverVersion, "reading the driver's version"))

    def power_limit_W(self) -> float:
        """The power limit in force, watts."""
        read = self._nvml.nvmlDeviceGetEnforcedPowerLimit
        return float(self._required(lambda: read(self._handle), "reading the power limit")) / 1000

    def memory_total_MiB(self) -> float:
        """The GPU's memory, MiB."""
        read = self._nvml.nvmlDeviceGetMemoryInfo
        return float(self._required(lambda: read(self._handle).total, "reading the memory's size")) / MIB

    def processes(self) -> list[tuple[int, float | None]]:
        """(pid, MiB in use) of every compute and graphics process on the GPU, one row a pid, sorted.

        The MiB are None where the driver does not tell. Inside a container the pids may be the host's, or
        none may be listed.
        """
        found: dict[int, float | None] = {}
        for read in (
            self._nvml.nvmlDeviceGetComputeRunningProcesses,
            self._nvml.nvmlDeviceGetGraphicsRunningProcesses,
        ):
            for process in self._optional(functools.partial(read, self._handle), "listing processes") or []:
                used = process.usedGpuMemory
                found[int(process.pid)] = None if used is None else float(used) / MIB
        return sorted(found.items())

    # -- errors --------------------------------------------------------------------------------------------

    def _error(self, error: Any, doing: str) -> MeterError:
        return _meter_error(self._nvml, error, f"{self.name} {self.uuid}", doing)

    def _required(self, read: Callable[[], T], doing: str) -> T:
        try:
            return read()
        except self._nvml.NVMLError as error:
            raise self._error(error, doing) from error

    def _optional(self, read: Callable[[], T], doing: str) -> T | None:
        """What ``read`` gives, or None where the GPU or the driver lacks it; other errors are loud."""
        try:
            return read()
        except self._nvml.NVMLError as error:
            if error.value in self._lacking:
                return None
            raise self._error(error, doing) from error

    def _first_supported(self, *reads: Callable[[], T]) -> Callable[[], T | None]:
        """The first of ``reads`` that GPU, driver and pynvml all answer, else one that gives None."""
        for read in reads:
            try:
                if self._optional(read, "asking what the GPU offers") is not None:
                    return read
            except AttributeError:
                continue  # this pynvml does not have the name yet, or no longer
        return lambda: None
