"""Which GPU a batch measures on: one that it may see, that nobody else measures on, named by its UUID."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from t2v_energy.measurement.lock import first_free_lock
from t2v_energy.metering.environment import foreign_processes
from t2v_energy.metering.nvml import NvmlDevice, list_devices


def visible_gpus() -> list[str]:
    """UUIDs of the GPUs that CUDA_VISIBLE_DEVICES shows, in its order; where it is not set, of all.

    Raises:
        MeterError: NVML does not answer, or one that is named is not there.
    """
    # Without this CUDA counts the fastest GPU first, and its indices are not NVML's.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    wanted = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if not wanted:
        return [device.uuid for device in list_devices()]
    found = []
    for name in wanted:
        by_index = name.isdigit()
        with NvmlDevice.open(None if by_index else name, index=int(name) if by_index else None) as device:
            found.append(device.uuid)
    return found


def choose_gpu() -> NvmlDevice:
    """The first GPU that CUDA_VISIBLE_DEVICES shows, or the host's first; CUDA is then pinned to it."""
    visible = visible_gpus()
    return _pinned(visible[0]) if visible else NvmlDevice.open(index=0)  # raises: there is none


@contextmanager
def first_free_gpu(
    expected_name: str | None, allow_shared: bool, say: Callable[[str], None]
) -> Iterator[tuple[NvmlDevice, list[str]]]:
    """The first visible GPU that nobody measures on, locked and with CUDA pinned to it; UUIDs of the others.

    One of another model than ``expected_name``, or that other processes are on (unless ``allow_shared``), is
    passed over while there is a better one. Waits, and says so, while all are being measured on.
    """

    def usable(uuid: str) -> bool:
        with NvmlDevice.open(uuid) as device:
            right = expected_name is None or device.name == expected_name
            return right and (allow_shared or not foreign_processes(device))

    visible = visible_gpus()
    if not visible:
        NvmlDevice.open(index=0)  # raises, and says that there is none
    with first_free_lock(visible, say, usable) as uuid, _pinned(uuid) as device:
        yield device, [other for other in visible if other != uuid]


def _pinned(uuid: str) -> NvmlDevice:
    device = NvmlDevice.open(uuid)
    os.environ["CUDA_VISIBLE_DEVICES"] = device.uuid
    return device
