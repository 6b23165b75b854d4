"""Attribution: what it refuses, what must hold exactly, and how fast it is."""

import numpy as np
import processor
import pytest
from t2v_energy.metering import fake_nvml
from t2v_energy.metering.accuracy import metered
from t2v_energy.metering.attribution import Method, energies_J, energy_J, power_integral_J
from t2v_energy.metering.fake_nvml import FakeGpu
from t2v_energy.metering.series import MeterError, Sample, Samples, Tick, Ticks

METHODS: tuple[Method, ...] = ("nearest_tick", "linear", "change_point")


def exact_ticks(trace: fake_nvml.PowerTrace, count: int = 60, period_s: float = 0.1) -> Ticks:
    """Ticks whose time is known exactly."""
    times = [i * period_s for i in range(count)]
    return Ticks.from_rows([Tick(t, t, round(1000 * trace.energy_J(0, t))) for t in times])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("window", [(-0.1, 1.0), (1.0, 6.0), (7.0, 8.0), (1.0, float("nan"))])
def test_uncovered_windows_are_refused(method: Method, window: tuple[float, float]) -> None:
    with pytest.raises(MeterError, match=r"is not covered|not a number"):
        energy_J(exact_ticks(fake_nvml.constant()), *window, method)


def test_windows_turned_round_and_too_few_ticks_are_refused() -> None:
    with pytest.raises(MeterError, match="ends before it starts"):
        energy_J(exact_ticks(fake_nvml.constant()), 2.0, 1.0)
    for count in (0, 1):
        with pytest.raises(MeterError, match=f"{count} ticks"):
            energy_J(exact_ticks(fake_nvml.constant(), count), 0.0, 0.0)


def test_bad_arguments() -> None:
    ticks = exact_ticks(fake_nvml.constant())
    with pytest.raises(ValueError, match="shapes"):
        energies_J(ticks, [1.0, 2.0], [3.0])
    with pytest.raises(ValueError, match="no method"):
        energies_J(ticks, [1.0], [3.0], "guess")  # type: ignore[arg-type]


def test_steady_power_is_linear() -> None:
    ticks = exact_ticks(fake_nvml.constant(500))
    start = np.linspace(0.5, 4, 50)
    for method in ("linear", "change_point"):
        values_J, _ = energies_J(ticks, start, start + 0.77, method)
        np.testing.assert_allclose(values_J, 385, rtol=1e-6)


def test_a_step_at_a_border_is_recovered_where_linear_fails() -> None:
    trace = fake_nvml.step(2.03, 150, 700)
    ticks = exact_ticks(trace)
    truth_J = trace.energy_J(2.03, 2.43)
    good, plain = energy_J(ticks, 2.03, 2.43), energy_J(ticks, 2.03, 2.43, "linear")
    assert good.value_J == pytest.approx(truth_J, rel=1e-4)
    assert abs(plain.value_J / truth_J - 1) > 0.03
    assert abs(plain.value_J - truth_J) <= plain.ci90_J


def test_short_stages_are_resolved_when_all_borders_are_known() -> None:
    """Stages hardly longer than a tick: what is read off next to an edge is itself cut by edges."""
    trace = fake_nvml.steps("short", [0.0, 2.03, 2.16, 2.31, 6.0], [150, 700, 250, 600])
    ticks = exact_ticks(trace)
    start, end = np.array(trace.borders_s[1:3]), np.array(trace.borders_s[2:4])
    truth_J = [trace.energy_J(a, b) for a, b in zip(start, end, strict=True)]
    values_J, _ = energies_J(ticks, start, end)
    np.testing.assert_allclose(values_J, truth_J, rtol=0.02)
    alone = energy_J(ticks, start[0], end[0], borders_s=trace.borders_s).value_J
    assert alone == pytest.approx(values_J[0])


@pytest.mark.parametrize("method", METHODS)
def test_parts_add_up_to_the_whole(method: Method) -> None:
    trace, _ = fake_nvml.denoising(2, 20)
    ticks, _ = metered(FakeGpu(trace), 20)
    edges = np.sort(np.random.default_rng(0).uniform(1, 19, 300))
    parts_J, _ = energies_J(ticks, edges[:-1], edges[1:], method)
    whole_J = energies_J(ticks, edges[:1], edges[-1:], method, borders_s=edges)[0]
    assert parts_J.sum() == pytest.approx(whole_J[0], rel=1e-9)
    assert (parts_J >= 0).all()


def test_order_nesting_and_empty_windows() -> None:
    trace, _ = fake_nvml.denoising(2, 20)
    ticks, _ = metered(FakeGpu(trace), 20)
    start, end = np.array([5.0, 1.0, 5.0, 7.0]), np.array([9.0, 18.0, 6.0, 7.0])
    values_J, ci90_J = energies_J(ticks, start, end)
    again_J, _ = energies_J(ticks, start[::-1], end[::-1])
    np.testing.assert_array_equal(values_J, again_J[::-1])
    assert (values_J[3], ci90_J[3]) == (0, 0)
    empty_J, _ = energies_J(ticks, [], [])
    assert empty_J.shape == (0,)


def test_trimmed_ticks_give_the_same_energy() -> None:
    trace, _ = fake_nvml.denoising(2, 20)
    ticks, _ = metered(FakeGpu(trace), 20)
    whole, trimmed = energy_J(ticks, 5.03, 9.77), energy_J(ticks.between(5.03, 9.77), 5.03, 9.77)
    assert trimmed.value_J == pytest.approx(whole.value_J, rel=1e-3)


@pytest.mark.parametrize("quantum_mJ", [1, 1000])
def test_a_coarse_quantum_widens_the_interval(quantum_mJ: int) -> None:
    trace, _ = fake_nvml.denoising(4, 20, (0.4,), 10)
    ticks, _ = metered(FakeGpu(trace, quantum_mJ=quantum_mJ), 20)
    assert (energy_J(ticks, 5.0, 5.4).ci90_J > 0.6) == (quantum_mJ == 1000)


def test_an_idle_counter_that_stands_still_between_ticks() -> None:
    """A long gap without a tick is zero power there, and no division by zero."""
    ticks = Ticks(time_s=[0, 1, 2, 3, 4], not_before_s=[0, 1, 2, 3, 4], energy_mJ=[0, 0, 0, 5, 5])
    values_J, ci90_J = energies_J(ticks, [0.5, 0.2], [3.5, 0.8])
    assert values_J == pytest.approx([0.005, 0], abs=1e-9)
    assert np.isfinite(ci90_J).all()


def test_jitter_of_the_tick_is_followed() -> None:
    trace, windows = fake_nvml.denoising(5, 40, (1.0,), 20)
    ticks, _ = metered(FakeGpu(trace, jitter_s=0.01), trace.borders_s[-1])
    inside = [w for w in windows[1.0] if w[0] > 1 and w[1] < 39]
    start, end = np.array(inside).T
    values_J, ci90_J = energies_J(ticks, start, end, borders_s=trace.borders_s)
    truth_J = np.array([trace.energy_J(*w) for w in inside])
    assert np.median(np.abs(values_J / truth_J - 1)) < 0.01
    assert np.mean(np.abs(values_J - truth_J) <= ci90_J) >= 0.9


def test_a_hundred_thousand_windows_in_under_a_second() -> None:
    ticks, _ = metered(FakeGpu(fake_nvml.constant()), 60)
    edges = np.sort(np.random.default_rng(0).uniform(1, 58, 100_001))
    assert processor.scaled_s(lambda: energies_J(ticks, edges[:-1], edges[1:]), enough_s=1) < 1


def test_power_integral() -> None:
    rows = [Sample(i * 0.05, 100 + 200 * i * 0.05, 300.0) for i in range(41)]
    samples = Samples.from_rows([*rows, Sample(2.05)])
    assert power_integral_J(samples, 0.512, 1.634) == pytest.approx(
        (1.634 - 0.512) * (100 + 100 * (0.512 + 1.634))
    )
    assert power_integral_J(samples, 0.5, 1.5, power="average") == pytest.approx(300)
    with pytest.raises(MeterError, match="is not covered"):
        power_integral_J(samples, 0.5, 2.04)
    with pytest.raises(MeterError, match="0 samples of instant power"):
        power_integral_J(Samples.from_rows([Sample(0.0), Sample(1.0)]), 0, 1)


def test_counter_and_power_agree() -> None:
    ticks, samples = metered(FakeGpu(fake_nvml.ramp(30)), 30)
    assert energy_J(ticks, 5, 25).value_J == pytest.approx(power_integral_J(samples, 5, 25), rel=1e-3)
