"""One measurement a GPU at a time, whatever Snakemake's resources say."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

WAIT_S = 0.5
"""Between two looks at locks that others hold."""


@contextmanager
def device_lock(device: str, say: Callable[[str], None] = print) -> Iterator[Path]:
    """Hold the lock of ``device`` (a GPU's UUID, or ``cpu``); waits, and says so, while another has it.

    The kernel drops the lock when its holder ends, however it ends.
    """
    path = _path(device)
    descriptor = _open(path)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "another process"
            say(f"{device} is being measured by process {holder}; waiting for it ({path})")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        _sign(descriptor)
        yield path
    finally:
        os.close(descriptor)


@contextmanager
def first_free_lock(
    devices: Sequence[str],
    say: Callable[[str], None] = print,
    usable: Callable[[str], bool] = lambda device: True,
) -> Iterator[str]:
    """Hold the lock of the first of ``devices`` that is free and usable, and yield its name.

    Waits, and says so, while others hold the rest. Where nobody does and none is usable, it is the first one:
    whoever looks closer finds out why.
    """
    waiting = len(devices) == 1  # one device: device_lock waits for it, and says for whom
    while not waiting:
        held = [device for device in devices if is_locked(device)]
        for device in devices:
            with attempt(device) as free:
                if free and usable(device):
                    yield device
                    return
        if not held:
            break
        say(f"all of {', '.join(devices)} are being measured or in use; waiting for the first that is free")
        while all(is_locked(device) for device in held):
            time.sleep(WAIT_S)
    with device_lock(devices[0], say):
        yield devices[0]


@contextmanager
def attempt(device: str) -> Iterator[bool]:
    """Hold the lock of ``device`` if nobody has it, without waiting; whether it is held."""
    descriptor = _open(_path(device))
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _sign(descriptor)
        free = True
    except BlockingIOError:
        free = False
    try:
        yield free
    finally:
        os.close(descriptor)


def is_locked(device: str) -> bool:
    """Whether a process, ours included, holds the lock of ``device``."""
    try:
        descriptor = os.open(_path(device), os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        # Shared, so that two who ask at once do not take each other for holders.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _path(device: str) -> Path:
    return Path(tempfile.gettempdir()) / f"t2v-energy-{device}.lock"


def _sign(descriptor: int) -> None:
    """Write our process id into a lock that we hold, for those who wait."""
    with suppress(OSError):  # another user's file: locked all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)


def _open(path: Path) -> int:
    """The lock file's descriptor. A file that another user made can only be read, which locks as well."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        return os.open(path, os.O_RDONLY)
