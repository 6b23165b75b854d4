"""How accurate each way of reading a counter is, where the truth is known: ``results/tables/meter.csv``.

Everything runs in virtual time, through the real polling loop and the real pynvml, over a fake NVML with a
known power trace (:mod:`t2v_energy.metering.fake_nvml`).
"""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from t2v_energy.metering import fake_nvml
from t2v_energy.metering.attribution import Method, energies_J, power_integral_J
from t2v_energy.metering.fake_nvml import FakeGpu, PowerTrace, VirtualClock
from t2v_energy.metering.nvml import NvmlDevice
from t2v_energy.metering.sampler import poll
from t2v_energy.metering.series import Sample, Samples, Tick, Ticks

WINDOWS_S = (0.4, 1.0, 5.0, 30.0)
TICKS_S = (0.02, 0.05, 0.1)
POLL_S = 0.002
SAMPLE_HZ = 20.0
RUN_S = 50.0
WINDOWS_EACH = 100
BORDER_WINDOWS_EACH = 50  # each adds a border to the pattern, which must stay as it is meant
RIPPLE_SHARE = 0.05
# Clear of both ends, so that every edge has its neighbouring ticks.
MARGIN_S = 1.0
SIGNIFICANT = 6  # of the table's values: more than the few windows of a row resolve
DECIMALS = 9  # what lies below is the floating-point arithmetic's, not the meter's


class Scene(NamedTuple):
    """A power trace, the windows whose energy is asked (length to starts and ends), and its known borders."""

    trace: PowerTrace
    windows_s: dict[float, NDArray[np.float64]]
    borders_s: tuple[float, ...]
    run_s: float


def scenes(seed: int) -> list[Scene]:
    """Constant, ramp and step, with windows anywhere; a denoising-like pattern, plain and rippled, with
    windows from border to border. Its borders are known, as the spans of a record are; its ripple is not.
    """
    rng = np.random.default_rng(seed)

    def anywhere(trace: PowerTrace) -> Scene:
        windows = {}
        for length in WINDOWS_S:
            starts = rng.uniform(MARGIN_S, RUN_S - MARGIN_S - length, WINDOWS_EACH)
            windows[length] = np.stack([starts, starts + length], axis=1)
        return Scene(trace, windows, (), RUN_S)

    pattern, found = fake_nvml.denoising(seed, 1.8 * RUN_S, WINDOWS_S, BORDER_WINDOWS_EACH)
    last_s = pattern.borders_s[-1]
    between = {
        length: np.array([w for w in pairs if w[0] >= MARGIN_S and w[1] <= last_s - MARGIN_S])
        for length, pairs in found.items()
    }
    rippled = fake_nvml.rippled(pattern, RIPPLE_SHARE, seed)
    return [
        anywhere(fake_nvml.constant()),
        anywhere(fake_nvml.ramp(RUN_S)),
        anywhere(fake_nvml.step(RUN_S / 2)),
        Scene(pattern, between, pattern.borders_s, last_s),
        Scene(rippled, between, pattern.borders_s, last_s),
    ]


def metered(
    gpu: FakeGpu, run_s: float, poll_s: float = POLL_S, sample_hz: float = SAMPLE_HZ, seed: int = 0
) -> tuple[Ticks, Samples]:
    """What the meter reads of a fake GPU in ``run_s`` seconds of virtual time."""
    clock = VirtualClock(seed=seed)
    rows: list[Tick | Sample] = []
    with fake_nvml.installed([gpu], clock), NvmlDevice.open(gpu.uuid) as device:
        poll(device, clock, clock.sleep, rows.append, lambda: clock() > run_s, poll_s, sample_hz)
    ticks = Ticks.from_rows([row for row in rows if isinstance(row, Tick)])
    return ticks, Samples.from_rows([row for row in rows if isinstance(row, Sample)])


def accuracy_table(seed: int = 1, ticks_s: tuple[float, ...] = TICKS_S) -> list[dict[str, Any]]:
    """Rows of ``results/tables/meter.csv``: ``method, window_s, trace, median_error_percent,
    p95_error_percent, coverage_90, n``.

    Errors are absolute, in percent of the true energy of the window; ``coverage_90`` is the share of the n
    windows whose stated 90 % interval holds the truth (None for the integral of power, which states none).
    Both are rounded to :data:`SIGNIFICANT` digits.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for scene in scenes(seed):
        for tick_s in ticks_s:
            gpu = FakeGpu(scene.trace, tick_s=tick_s, phase_s=rng.uniform(0, tick_s))
            ticks, samples = metered(gpu, scene.run_s, seed=seed)
            label = f"{scene.trace.name}, {round(1000 * tick_s)} ms"
            for window_s, windows in scene.windows_s.items():
                rows += _rows(scene, windows, ticks, samples, {"window_s": window_s, "trace": label})
    return rows


def _rows(
    scene: Scene, windows: NDArray[np.float64], ticks: Ticks, samples: Samples, common: dict[str, Any]
) -> list[dict[str, Any]]:
    start, end = windows.T
    truth_J = np.array([scene.trace.energy_J(a, b) for a, b in windows])
    rows = []
    for method in get_args(Method):
        values_J, ci90_J = energies_J(ticks, start, end, method, scene.borders_s)
        covered = float(np.mean(np.abs(values_J - truth_J) <= ci90_J))
        rows.append(_row(method, values_J, truth_J, covered, common))
    integral_J = np.array([power_integral_J(samples.between(a, b), a, b) for a, b in windows])
    rows.append(_row("power_integral", integral_J, truth_J, None, common))
    return rows


def _row(
    method: str,
    values_J: NDArray[np.float64],
    truth_J: NDArray[np.float64],
    covered: float | None,
    common: dict[str, Any],
) -> dict[str, Any]:
    errors_percent = 100 * np.abs(values_J / truth_J - 1)
    return {
        "method": method,
        **common,
        "median_error_percent": _rounded(np.median(errors_percent)),
        "p95_error_percent": _rounded(np.percentile(errors_percent, 95)),
        "coverage_90": None if covered is None else _rounded(covered),
        "n": len(truth_J),
    }


def _rounded(value: float | np.floating[Any]) -> float:
    return float(f"{round(float(value), DECIMALS):.{SIGNIFICANT}g}")
