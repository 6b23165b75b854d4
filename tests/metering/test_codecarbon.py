"""CodeCarbon, as the study used it, beside our meter: what it gives, and what kind of number that is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from t2v_energy.measurement.record import CodeCarbonReading
from t2v_energy.metering.codecarbon import CodeCarbon, cpu_kind

codecarbon = pytest.importorskip("codecarbon")


@pytest.fixture(scope="module")
def without_gpu() -> Any:
    """Readings of two windows, each with the longest that it may have lasted."""
    carbon = CodeCarbon(())
    readings = []
    for name in ("one", "two"):
        before_s = time.monotonic()
        carbon.start(name)
        time.sleep(0.5)
        readings.append((carbon.stop(name), time.monotonic() - before_s))
    return readings


def test_each_window_has_its_own_energy(without_gpu: Any) -> None:
    for reading, longest_s in without_gpu:
        assert reading.version == codecarbon.__version__
        assert 0.49 <= reading.duration_s <= longest_s + 0.01
        assert 0 < reading.cpu_energy_Wh * 3600 / reading.duration_s < 1000  # watts, modelled
        assert 1 < reading.ram_energy_Wh * 3600 / reading.duration_s < 1000
    one, two = (reading.ram_energy_Wh / reading.duration_s for reading, _ in without_gpu)
    assert two == pytest.approx(one, rel=0.4)  # of the second window, not of both


def test_without_a_gpu_there_is_no_gpu_energy(without_gpu: Any) -> None:
    for reading, _ in without_gpu:
        assert (reading.gpu_energy_Wh, reading.gpu_method) == (0, "none")
        assert reading.ram_method == "constant_per_module"
        assert cpu_kind(reading.cpu_method) in {"measured", "modelled", "constant"}


SOME_OF_TWO = """
import time
from t2v_energy.metering import fake_nvml
from t2v_energy.metering.fake_nvml import FakeGpu

others = FakeGpu(fake_nvml.constant(2_400), uuid="GPU-0badcafe-0000-0000-0000-000000000000", old_names=True)
with fake_nvml.installed([others, FakeGpu(fake_nvml.constant(600), old_names=True)]):
    from t2v_energy.metering.codecarbon import CodeCarbon  # looks for NVML when it is imported

    carbon = CodeCarbon(INDICES)
    carbon.start("gpu")
    time.sleep(1.0)
    print(carbon.stop("gpu").model_dump_json())
"""


@pytest.mark.parametrize(("indices", "watts"), [((1,), 600), ((0, 1), 3000)])
def test_gpus_are_those_of_the_indices(tmp_path: Path, indices: tuple[int, ...], watts: float) -> None:
    (tmp_path / "nvidia-smi").symlink_to("/bin/true")  # CodeCarbon asks whether it runs
    path = f"{tmp_path}:{os.environ['PATH']}"
    command = [sys.executable, "-W", "ignore", "-c", SOME_OF_TWO.replace("INDICES", repr(indices))]
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reading = CodeCarbonReading.model_validate_json(done.stdout)
    assert reading.gpu_method == "nvml_energy_counter"
    # within two ticks of 100 ms of each and what a busy machine delays
    assert reading.gpu_energy_Wh * 3600 == pytest.approx(watts * reading.duration_s, rel=0.5)


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("intel_rapl", "measured"),
        ("intel_power_gadget", "measured"),
        ("constant", "constant"),
        ("cpu_load", "modelled"),
        ("anything else", "modelled"),
    ],
)
def test_kinds_of_cpu_energy(method: str, kind: str) -> None:
    assert cpu_kind(method) == kind


def test_methods_are_named_for_what_is_there() -> None:
    carbon = CodeCarbon.__new__(CodeCarbon)
    hardware = [type("CPU", (), {"_mode": "intel_rapl"})(), type("Other", (), {})()]
    carbon._tracker = SimpleNamespace(_hardware=hardware)
    assert carbon._methods() == {"GPU": "none", "CPU": "intel_rapl", "RAM": "none"}
    carbon._tracker = SimpleNamespace(_hardware=[type("AppleSiliconChip", (), {})(), type("GPU", (), {})()])
    assert carbon._methods() == {"GPU": "nvml_energy_counter", "CPU": "unknown", "RAM": "none"}
