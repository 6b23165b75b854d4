"""NvmlDevice over a fake NVML below the real pynvml; what it says when something is missing."""

import importlib
import math
import sys

import pytest
from t2v_energy.errors import UserError
from t2v_energy.metering import fake_nvml, nvml
from t2v_energy.metering.fake_nvml import FakeGpu, VirtualClock, installed
from t2v_energy.metering.nvml import MeterError, NvmlDevice, list_devices

pynvml = pytest.importorskip("pynvml")
CONSTANT = fake_nvml.constant(600)
OTHER = "GPU-0badcafe-0000-0000-0000-000000000000"


def test_every_reading_comes_through_pynvml() -> None:
    gpu = FakeGpu(fake_nvml.step(10, 200, 600), throttle_reasons=4, processes=((7, 100), (3, 50)))
    clock = VirtualClock(10.5)
    with installed([gpu], clock) as fake, NvmlDevice.open() as device:
        sample = device.sample(clock)
        assert sample.time_s == 10.5
        assert sample.power_instant_W == 600
        assert sample.power_average_W == pytest.approx(400)
        assert (sample.sm_clock_MHz, sample.temperature_C, sample.throttle_reasons) == (1980, 55, 4)
        assert sample.memory_used_MiB == 20_000
        assert device.energy_mJ() == gpu.start_mJ + 2_300_000
        assert device.power_limit_W() == 700
        assert device.memory_total_MiB() == 140_000
        assert device.processes() == [(3, 50), (7, 100)]
        assert device.driver == "000.00 (fake)"
        assert device.name == fake_nvml.NAME
        assert fake.initialised == 1
    assert fake.initialised == 0
    device.close()
    assert fake.initialised == 0


def test_no_processes() -> None:
    with installed([FakeGpu(CONSTANT)]), NvmlDevice.open() as device:
        assert device.processes() == []


def test_old_drivers_and_old_names() -> None:
    gpu = FakeGpu(CONSTANT, old_names=True, power_fields=False, throttle_reasons=8)
    with installed([gpu]), NvmlDevice.open() as device:
        sample = device.sample()
    assert (sample.temperature_C, sample.throttle_reasons) == (55, 8)
    # nvmlDeviceGetPowerUsage is the mean of a second on an H100, so it is no instantaneous power.
    assert (sample.power_instant_W, sample.power_average_W) == (None, 600)


def test_power_usage_is_an_instant_up_to_ga100() -> None:
    with installed([FakeGpu(CONSTANT, power_fields=False, capability=(8, 0))]), NvmlDevice.open() as device:
        assert device.sample()[1:3] == (600, None)


def test_opening_by_uuid_with_and_without_prefix_and_by_index() -> None:
    gpus = [FakeGpu(CONSTANT), FakeGpu(CONSTANT, uuid=OTHER)]
    with installed(gpus):
        assert [d.uuid for d in list_devices()] == [fake_nvml.UUID, OTHER]
        for device in (
            NvmlDevice.open(OTHER),
            NvmlDevice.open(OTHER.removeprefix("GPU-").upper()),
            NvmlDevice.open(index=1),
        ):
            assert (device.uuid, device.index) == (OTHER, 1)


def test_unknown_uuid_lists_those_present() -> None:
    with installed([FakeGpu(CONSTANT)]) as fake:
        with pytest.raises(MeterError, match=fake_nvml.UUID) as caught:
            NvmlDevice.open(OTHER)
        assert OTHER in caught.value.where
        assert fake.initialised == 0


def test_several_gpus_and_none_named() -> None:
    gpus = [FakeGpu(CONSTANT), FakeGpu(CONSTANT, uuid=OTHER)]
    with installed(gpus), pytest.raises(MeterError, match="several GPUs"):
        NvmlDevice.open()


def test_mig_slices_are_refused() -> None:
    with installed([FakeGpu(CONSTANT)]), pytest.raises(MeterError, match="MIG slice"):
        NvmlDevice.open("MIG-41b4")


def test_missing_counter() -> None:
    with installed([FakeGpu(CONSTANT, counter=False)]), NvmlDevice.open() as device:
        with pytest.raises(MeterError, match="no energy counter"):
            device.energy_mJ()
        assert device.sample().power_instant_W == 600


def test_no_permission() -> None:
    with (
        installed([FakeGpu(CONSTANT, permitted=False)]),
        NvmlDevice.open() as device,
        pytest.raises(MeterError, match="no permission for reading the energy counter"),
    ):
        device.energy_mJ()


def test_lost_gpu() -> None:
    clock = VirtualClock()
    with installed([FakeGpu(CONSTANT, lost_at_s=1)], clock), NvmlDevice.open() as device:
        device.energy_mJ()
        clock.sleep(2)
        for read in (device.energy_mJ, lambda: device.sample(clock), device.processes, device.power_limit_W):
            with pytest.raises(MeterError, match="the GPU was lost"):
                read()


def test_pynvml_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(UserError, match=r"t2v-energy\[measure\]"):
        NvmlDevice.open()


def test_no_nvml_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(_name: str) -> None:
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    monkeypatch.setattr(pynvml, "CDLL", no_library)
    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    for call in (NvmlDevice.open, list_devices):
        with pytest.raises(MeterError, match="no NVML library") as caught:
            call()
        assert "NVIDIA GPU and driver" in caught.value.remedy


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("DRIVER_NOT_LOADED", "driver is not loaded"),
        ("LIB_RM_VERSION_MISMATCH", "different versions"),
        ("RESET_REQUIRED", "needs a reset"),
        ("TIMEOUT", "NVML error 10"),
    ],
)
def test_other_errors_have_their_own_words(code: str, message: str) -> None:
    error = pynvml.NVMLError(getattr(pynvml, f"NVML_ERROR_{code}"))
    assert message in str(nvml._meter_error(pynvml, error, "here", "reading"))


def test_the_fake_puts_everything_back() -> None:
    module = importlib.import_module("pynvml")
    before = module.nvmlLib, dict(module._nvmlGetFunctionPointer_cache)
    with installed([FakeGpu(CONSTANT)]):
        assert module.nvmlLib is not before[0]
    assert (module.nvmlLib, module._nvmlGetFunctionPointer_cache) == before


def test_traces_integrate_exactly() -> None:
    pattern, windows = fake_nvml.denoising(3, 30, (0.4, 5.0), 10)
    traces = [CONSTANT, fake_nvml.ramp(20), fake_nvml.step(7), pattern, fake_nvml.rippled(pattern, 0.05, 1)]
    for trace in traces:
        fine = [-1 + 34 * i / 200_000 for i in range(200_001)]
        total = math.fsum(trace.power_W(t + 0.5 * 34 / 200_000) for t in fine[:-1]) * 34 / 200_000
        assert trace.energy_J(-1, 33) == pytest.approx(total, rel=1e-4)
    lengths = [b - a for a, b in zip(pattern.borders_s, pattern.borders_s[1:], strict=False)]
    assert 0.1 <= min(lengths) <= max(lengths) <= 5
    assert all(
        end - start == pytest.approx(length) for length, rows in windows.items() for start, end in rows
    )
