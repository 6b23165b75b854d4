"""One measurement a GPU at a time, whatever Snakemake's resources say."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def device_lock(device: str, say: Callable[[str], None] = print) -> Iterator[Path]:
    """Hold the lock of ``device`` (a GPU's UUID, or ``cpu``); waits, and says so, while another has it.

    The kernel drops the lock when its holder ends, however it ends.
    """
    path = Path(tempfile.gettempdir()) / f"t2v-energy-{device}.lock"
    descriptor = _open(path)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "another process"
            say(f"{device} is being measured by process {holder}; waiting for it ({path})")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with suppress(OSError):  # another user's file: locked all the same
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield path
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    """The lock file's descriptor. A file that another user made can only be read, which locks as well."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        return os.open(path, os.O_RDONLY)
