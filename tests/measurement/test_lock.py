"""One measurement a device at a time, between real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from t2v_energy.measurement.lock import device_lock

HOLD = """
import sys, time
from t2v_energy.measurement.lock import device_lock
with device_lock(sys.argv[1], lambda text: print("waits:", text, flush=True)) as path:
    print("holds", path, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def _locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with tiny.own_devices_and_locks(tmp_path):
        yield


def holder(device: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, device], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def release(process: subprocess.Popen[str]) -> None:
    process.communicate("\n", timeout=20)


def test_the_second_process_waits_for_the_first(tmp_path: Path) -> None:
    path = tmp_path / "t2v-energy-GPU-0.lock"
    first = holder("GPU-0")
    assert line(first) == f"holds {path}"
    assert path.read_text() == str(first.pid)
    second = holder("GPU-0")
    assert line(second) == (f"waits: GPU-0 is being measured by process {first.pid}; waiting for it ({path})")
    time.sleep(0.3)
    assert path.read_text() == str(first.pid)  # the holder writes its own there
    release(first)
    assert line(second) == f"holds {path}"
    assert path.read_text() == str(second.pid)
    release(second)
    assert (first.returncode, second.returncode) == (0, 0)


def test_a_killed_holder_leaves_no_lock() -> None:
    process = holder("GPU-0")
    assert line(process).startswith("holds")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=20)
    said: list[str] = []
    with device_lock("GPU-0", said.append) as path:
        assert path.read_text() == str(os.getpid())
    assert said == []


def test_devices_do_not_wait_for_each_other() -> None:
    process = holder("GPU-0")
    assert line(process).startswith("holds")
    said: list[str] = []
    with device_lock("GPU-1", said.append), device_lock("cpu", said.append):
        pass
    assert said == []
    release(process)


def test_an_error_inside_gives_the_lock_back() -> None:
    with pytest.raises(ZeroDivisionError), device_lock("GPU-0"):
        raise ZeroDivisionError
    said: list[str] = []
    with device_lock("GPU-0", said.append):
        pass
    assert said == []


def test_another_users_file_locks_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sticky /tmp refuses to open another user's file for writing, to root too (fs.protected_regular)."""
    path = tmp_path / "t2v-energy-GPU-0.lock"
    path.write_text("1234")
    real = os.open

    def refused(name: Path, flags: int, mode: int = 0o777) -> int:
        if name == path and flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied", str(name))
        return real(name, flags, mode)

    monkeypatch.setattr(os, "open", refused)
    with device_lock("GPU-0"):
        assert path.read_text() == "1234"
        waiting = holder("GPU-0")
        assert line(waiting).startswith("waits: GPU-0 is being measured by process 1234")
    assert line(waiting).startswith("holds")
    release(waiting)
