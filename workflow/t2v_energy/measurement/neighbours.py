"""The host's other GPUs while a record is made: what they draw and, for experiment ``neighbour``, a load."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

from t2v_energy.config import NeighbourCondition
from t2v_energy.errors import UserError
from t2v_energy.measurement.lock import is_locked
from t2v_energy.measurement.record import Neighbour
from t2v_energy.metering.nvml import MeterError, NvmlDevice, list_devices

SETTLE_S = 2.0
"""After the load is switched on or off, so that power and clocks are those of the condition."""
START_S = 120.0


@dataclass(frozen=True)
class _Reading:
    """One look at a GPU: when (s, monotonic), its counter (mJ; None where it has none), and who is on it."""

    time_s: float
    energy_mJ: int | None
    busy: bool


class NeighbourWatch:
    """Looks at every GPU of the host but ours, at the beginning and the end of a record."""

    def __init__(
        self, own_uuid: str, reserved: Collection[str] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``reserved`` are UUIDs of further GPUs whose locks are ours: held for records that run on them.

        Raises :class:`~t2v_energy.metering.nvml.MeterError` where NVML does not answer.
        """
        self._clock, self._stack, self._reserved = clock, ExitStack(), reserved
        others = [found.uuid for found in list_devices() if found.uuid != own_uuid]
        self._devices = [self._stack.enter_context(NvmlDevice.open(uuid)) for uuid in others]
        self._before: list[_Reading] = []

    def close(self) -> None:
        """Give NVML back."""
        self._stack.close()

    def begin(self) -> None:
        """Look for the first time."""
        self._before = [self._look(device) for device in self._devices]

    def end(self, used: Collection[str] = ()) -> list[Neighbour]:
        """Look again; what happened in between, by GPU, in NVML's order.

        Those of UUIDs ``used`` are left out: the record ran on them, they are no neighbours of it.
        """
        return [
            _between(device, before, self._look(device))
            for device, before in zip(self._devices, self._before, strict=True)
            if device.uuid not in used
        ]

    def _look(self, device: NvmlDevice) -> _Reading:
        try:
            energy_mJ: int | None = device.energy_mJ()
        except MeterError:  # no counter, or lost: no concern of ours
            energy_mJ = None
        locked = device.uuid not in self._reserved and is_locked(device.uuid)
        busy = locked or bool(device.processes())
        return _Reading(self._clock(), energy_mJ, busy)


def _between(device: NvmlDevice, before: _Reading, after: _Reading) -> Neighbour:
    lasted_s = after.time_s - before.time_s
    power_W = None
    if before.energy_mJ is not None and after.energy_mJ is not None and lasted_s > 0:
        power_W = (after.energy_mJ - before.energy_mJ) / 1000 / lasted_s
    return Neighbour(
        name=device.name, uuid=device.uuid, mean_power_W=power_W, in_use=before.busy or after.busy
    )


class NeighbourLoad:
    """A child process with a dense load on another GPU (or beside us on the CPU) that is switched on and off.

    The process, and its context on the GPU, is there in both conditions: only the load differs.
    """

    def __init__(self, gpu_uuid: str | None, size: int = 8192) -> None:
        """``gpu_uuid`` None: on the CPU. ``size``: rows of the square matrices that are multiplied.

        Raises :class:`UserError` with the child's own words where it does not come up.
        """
        device = "cpu" if gpu_uuid is None else "cuda"
        command = [sys.executable, "-m", "t2v_energy.measurement.dense_load", device, str(size)]
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu_uuid} if gpu_uuid else {})
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._where = gpu_uuid or "the CPU"
        self._condition: NeighbourCondition = "idle"
        self._expect("ready")

    def __enter__(self) -> NeighbourLoad:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child."""
        self._process.kill()
        self._process.communicate()

    def set(self, condition: NeighbourCondition) -> None:
        """Switch, and wait until it is so; raises :class:`UserError` where the child has ended."""
        if condition == self._condition:
            self._check()
            return
        self._condition = condition
        self._check()
        assert self._process.stdin is not None
        self._process.stdin.write(f"{condition}\n")
        self._process.stdin.flush()
        self._expect(condition)
        time.sleep(SETTLE_S)

    def check(self) -> None:
        """Raise :class:`UserError` where the child has ended, and with it the condition."""
        self._check()

    def _check(self) -> None:
        if self._process.poll() is not None:
            raise UserError(
                f"the neighbour's load ended by itself (exit code {self._process.returncode})",
                where=self._where,
                remedy="see what it said above; then run the same command again: records are kept",
            )

    def _expect(self, word: str) -> None:
        assert self._process.stdout is not None
        said = self._process.stdout.readline().strip()
        if said != word:
            self._process.wait(timeout=START_S)
            self._check()
