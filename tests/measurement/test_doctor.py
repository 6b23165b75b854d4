"""What the doctor says of machines with this and without that."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import tiny
from t2v_energy.measurement import doctor
from t2v_energy.measurement.doctor import Finding, examine
from t2v_energy.metering import fake_nvml
from t2v_energy.metering.fake_nvml import FakeGpu

pytest.importorskip("torch")
pytest.importorskip("pynvml")
CONSTANT = fake_nvml.constant(600)


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(doctor, "WATCH_S", 0.7)
    with tiny.own_devices_and_locks(tmp_path):
        yield


def on(gpu: FakeGpu) -> dict[str, Finding]:
    """The findings about a GPU, by subject."""
    with fake_nvml.installed([gpu]) as fake:
        found = {f.subject: f for f in doctor._gpu()}
        assert fake.initialised == 0
    return found


def test_a_gpu_with_everything() -> None:
    found = on(FakeGpu(CONSTANT, tick_s=0.05, quantum_mJ=3))
    assert {f.state for f in found.values()} == {"ok"}
    assert found["GPU"].found == f"{fake_nvml.NAME}, {fake_nvml.UUID}, driver 000.00 (fake)"
    assert found["power limit"].found == "700 W"
    assert found["GPU is ours alone"].found == "no other process"
    assert found["sensors"].found == "600 W, 55 °C, 1980 MHz"
    period_ms, quantum_mJ = (int(word) for word in found["energy counter"].found.split() if word.isdigit())
    assert period_ms == pytest.approx(50, abs=10)
    assert quantum_mJ == pytest.approx(0.05 * 600_000, abs=3)
    assert "below about 0.2 s" in found["energy counter"].meaning


def test_no_counter() -> None:
    found = on(FakeGpu(CONSTANT, counter=False))["energy counter"]
    assert found.state == "blocking"
    assert "no energy counter" in found.found
    assert "campaigns on it are refused" in found.meaning


def test_a_counter_that_stands_still() -> None:
    found = on(FakeGpu(CONSTANT, stuck_at_s=0))["energy counter"]
    assert found.state == "blocking"
    assert found.found.startswith("changed 0 times")
    assert "GPU energy cannot be measured" in found.meaning


def test_another_process() -> None:
    found = on(FakeGpu(CONSTANT, processes=((42, 10), (7, 10))))["GPU is ours alone"]
    assert (found.state, found.found) == ("lacking", "processes [7, 42]")
    assert "--allow-shared" in found.meaning


def test_sensors_that_are_missing() -> None:
    found = on(FakeGpu(CONSTANT, power_fields=False))["sensors"]
    assert (found.state, found.found) == ("lacking", "missing: power_instant_W")
    assert "cannot be checked" in found.meaning


def test_no_gpu() -> None:
    with fake_nvml.installed([]):
        (found,) = doctor._gpu()
    assert (found.subject, found.state) == ("GPU", "lacking")
    assert found.meaning.startswith("only CPU campaigns (smoke) can be measured here")


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = examine(tmp_path / "results" / "raw")
    subjects = [f.subject for f in found]
    assert subjects[0] == "packages"
    assert subjects[-3:] == ["attention kernels", "CPU energy (RAPL)", "disk"]
    assert "GPU" in subjects
    assert found[0].state == "ok"
    assert metadata.version("torch") in found[0].found
    assert "math" in found[-3].found
    # nothing is lacking without its meaning being told
    assert all(f.meaning for f in found if f.state != "ok")


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name in ("torch", "codecarbon"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    (found,) = doctor._packages()
    assert (found.state, found.found) == ("blocking", "missing: torch, codecarbon")
    assert "[measure]" in found.meaning


def test_kernels_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from t2v_energy.measurement import kernels

    monkeypatch.setattr(kernels, "available", lambda: {"cudnn": False, "flash": True, "math": True})
    (found,) = doctor._kernels()
    assert (found.state, found.found) == ("lacking", "flash, math")
    assert "that ask for cudnn cannot run" in found.meaning
    monkeypatch.setattr(kernels, "available", lambda: {"flash": True})
    assert doctor._kernels() == [Finding("attention kernels", "ok", "flash")]


def test_kernels_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "t2v_energy.measurement.kernels", None)
    assert doctor._kernels() == []


class TestCpuEnergy:
    @pytest.fixture
    def counter(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        path = tmp_path / "intel-rapl:0" / "energy_uj"
        path.parent.mkdir()
        path.write_text("1")
        monkeypatch.setattr(doctor, "RAPL", tmp_path)
        return path

    def test_measured(self, counter: Path) -> None:
        (found,) = doctor._cpu_energy()
        assert (found.state, found.found) == ("ok", "1 counters")
        assert "CPU energy is measured" in found.meaning

    def test_without_permission(self, counter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("os.access", lambda path, mode: False)
        (found,) = doctor._cpu_energy()
        assert (found.state, found.found) == ("lacking", f"no permission to read {counter}")
        assert "modelled" in found.meaning

    def test_without_counters(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for folder in (tmp_path, tmp_path / "none"):
            monkeypatch.setattr(doctor, "RAPL", folder)
            (found,) = doctor._cpu_energy()
            assert (found.state, found.found) == ("lacking", f"no counter under {folder}")
            assert "RAM energy is always a constant" in found.meaning


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage, asked = shutil.disk_usage(tmp_path), []

    def disk_usage(free: int) -> Any:
        return lambda path: (asked.append(path), usage._replace(free=free))[1]

    folder = tmp_path / "not" / "there"
    monkeypatch.setattr(shutil, "disk_usage", disk_usage(2**29))
    (found,) = doctor._disk(folder)
    assert (found.state, found.found) == ("blocking", f"0.50 GiB free at {folder}")
    monkeypatch.setattr(shutil, "disk_usage", disk_usage(7 * 2**30))
    assert doctor._disk(folder) == [Finding("disk", "ok", "7 GiB free")]
    assert asked == [tmp_path, tmp_path]
