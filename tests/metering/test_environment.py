"""What a record says of machine, software and others on the GPU."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from t2v_energy.measurement.record import Process
from t2v_energy.metering import environment, fake_nvml
from t2v_energy.metering.environment import (
    cpu_model,
    describe,
    describe_gpu,
    foreign_processes,
    git_commit,
    versions,
)
from t2v_energy.metering.fake_nvml import FakeGpu
from t2v_energy.metering.nvml import NvmlDevice

torch = pytest.importorskip("torch")
pytest.importorskip("pynvml")
CONSTANT = fake_nvml.constant(600)


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "x")
    return tmp_path


class TestCommit:
    def test_clean(self, repository: Path) -> None:
        (repository / "new").write_text("untracked files change nothing that runs")
        assert git_commit(repository) == git(repository, "rev-parse", "HEAD")

    def test_changed(self, repository: Path) -> None:
        (repository / "file").write_text("2")
        assert git_commit(repository) == git(repository, "rev-parse", "HEAD") + "-dirty"

    def test_outside_git(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
        monkeypatch.delenv("T2V_ENERGY_COMMIT", raising=False)
        assert git_commit(tmp_path) == "unknown"
        monkeypatch.setenv("T2V_ENERGY_COMMIT", "abc")
        assert git_commit(tmp_path) == "abc"

    def test_without_git(self, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(repository))
        assert git_commit(repository) == "unknown"


class TestProcesses:
    def test_ours_and_our_childrens_are_not_foreign(self) -> None:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        try:
            processes = ((os.getpid(), 10), (child.pid, 20), (1, 30), (2**22 + 1, 40))
            with fake_nvml.installed([FakeGpu(CONSTANT, processes=processes)]), NvmlDevice.open() as device:
                assert foreign_processes(device) == [
                    Process(pid=1, used_MiB=30),
                    Process(pid=2**22 + 1, used_MiB=40),
                ]
        finally:
            child.communicate(b"\n", timeout=20)

    def test_nobody(self) -> None:
        with fake_nvml.installed([FakeGpu(CONSTANT)]), NvmlDevice.open() as device:
            assert foreign_processes(device) == []


def test_the_gpu() -> None:
    with fake_nvml.installed([FakeGpu(CONSTANT, power_limit_W=350)]), NvmlDevice.open() as device:
        gpu = describe_gpu(device)
    assert gpu.model_dump() == {
        "name": fake_nvml.NAME,
        "uuid": fake_nvml.UUID,
        "driver": "000.00 (fake)",
        "power_limit_W": 350,
        "memory_total_MiB": 140_000,
    }


def test_versions_of_what_decides_the_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    found = versions()
    assert found["torch"] == torch.__version__
    for name in ("diffusers", "transformers", "codecarbon", "t2v-energy"):
        assert found[name] == metadata.version(name)
    assert ("cuda" in found) == (torch.version.cuda is not None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert versions()["cuda"] == "13.0"
    assert "cudnn" in versions()
    monkeypatch.setattr(environment, "PACKAGES", ("no-such-package",))
    assert "no-such-package" not in versions()


def test_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Path("/proc/cpuinfo").read_text()
    if "model name" in lines:
        assert f": {cpu_model()}\n" in lines
    monkeypatch.setattr(Path, "read_text", lambda self: "flags : none\n")
    assert cpu_model() == (platform.processor() or platform.machine())

    def unreadable(self: Path) -> str:
        raise OSError("no /proc")

    monkeypatch.setattr(Path, "read_text", unreadable)
    assert cpu_model() == (platform.processor() or platform.machine())


def test_the_whole(repository: Path) -> None:
    foreign = [Process(pid=1, used_MiB=None)]
    found = describe(repository, None, "random, seed 3", foreign)
    assert found.weights == "random, seed 3"
    assert found.foreign_processes == foreign
    assert found.gpu is None
    assert found.git_commit == git_commit(repository)
    assert found.python == platform.python_version()
    assert found.cpu_count == os.cpu_count()
    assert 0.1 < found.memory_GiB < 1e5
    assert found.host
    assert found.versions == versions()
