"""Whether a record may be believed: the rules of docs/record.md, checked from the record alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from t2v_energy.errors import UserError
from t2v_energy.measurement.composition import (
    Generation,
    generations,
    one_step_stage_s,
    step_scatter_percent,
    unspanned_percent,
)
from t2v_energy.measurement.operator_record import OperatorRecord, is_operator_record
from t2v_energy.measurement.record import (
    LOOP_STAGES,
    Board,
    Neighbour,
    Operators,
    Record,
    Spans,
    Windows,
    read_as,
    read_record,
    record_paths,
)
from t2v_energy.metering.attribution import energy_J, power_integral_J
from t2v_energy.metering.series import Samples
from t2v_energy.operator_suite import label

MAX_UNSPANNED_PERCENT = 1.0
MAX_CLOSURE_PERCENT = 2.0
MIN_CLOSURE_S = 5.0
CLOSURE_STANDARD_ERRORS = 4.0
"""The limit is no narrower than so many standard errors of the integral, which no record of a campaign of
hundreds should leave by chance. A board refreshes its reading ten times a second with a snapshot of less than
that: where power swings, as in Mochi's decoding, the sum of eighty snapshots is uncertain by nearly 2 %
(records of 2026-11), whatever the counter does."""
REFRESH_S = 0.1
MAX_STEP_SEM_PERCENT = 0.3
MAX_PROFILE_EXCESS_PERCENT = 5.0
MIN_PROFILED_S = 0.05

# nvml.h, nvmlClocksEventReasons (formerly nvmlClocksThrottleReasons)
CLOCK_REASONS = {
    0x001: "GPU idle",
    0x002: "applications clocks setting",
    0x004: "software power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "hardware power brake",
    0x100: "display clock setting",
}
ALLOWED_REASONS = 0x001 | 0x002 | 0x004

Level = Literal["ok", "flag", "invalid"]
LEVELS: tuple[Level, ...] = ("ok", "flag", "invalid")
"""From good to bad."""


@dataclass(frozen=True)
class Finding:
    """What one rule says of a record; ``detail`` holds the number found and its limit."""

    rule: str
    level: Level
    detail: str


def check(record: Record, expected_gpu: str | None = None) -> list[Finding]:
    """Every rule's finding on ``record``, in a fixed order.

    ``expected_gpu`` is the campaign's ``gpu_name``; None accepts any GPU. A record of status
    ``out_of_memory`` holds no generation: only where it was made is checked.
    """
    findings = [_gpu(record, expected_gpu), _foreign_processes(record), _shared_host(record)]
    if record.status != "ok":
        return [Finding("status", "ok", f"{record.status}: there is no generation to check"), *findings]
    try:
        found = generations(record.windows, record.spans)
    except UserError as error:
        return [*findings, Finding("generations", "invalid", error.what)]
    if not found:
        return [*findings, Finding("generations", "invalid", "0 generations; at least 1 is needed")]
    return [
        *findings,
        Finding("generations", "ok", f"{len(found)} generations; at least 1 is needed"),
        _unspanned(record),
        _closure(record, found),
        _step_sem(record, found),
        _throttling(record, found),
        _profile(record),
    ]


def validate_folder(path: Path, expected_gpu: str | None = None) -> dict[str, list[Finding]]:
    """Findings of every record in an experiment's folder, or in all experiments of a campaign's folder.

    Keys are paths relative to ``path``: file names, for an experiment's folder. A record that cannot be
    read has one invalid finding, ``readable``, with the reason.

    Raises:
        UserError: there is no such folder, or no record in it.
    """
    folders = [path, *sorted(p for p in path.glob("*") if p.is_dir())]
    records = [record for folder in folders for record in record_paths(folder)]
    if not records:
        raise UserError(
            "there are no records" if path.is_dir() else "there is no such folder",
            where=str(path),
            remedy="give results/raw/<campaign>, or the folder of one of its experiments",
        )
    return {str(record.relative_to(path)): _check_file(record, expected_gpu) for record in records}


def check_operators(record: OperatorRecord, expected_gpu: str | None = None) -> list[Finding]:
    """Every rule's finding on a record of single operators, in a fixed order; see :func:`check`."""
    windows = list(zip(record.visits.start_s, record.visits.end_s, strict=True))
    return [
        _gpu(record, expected_gpu),
        _foreign_processes(record),
        _visited(record),
        _loops_closure(record, windows),
        _throttled(record, windows),
    ]


def read_and_check(path: Path, expected_gpu: str | None) -> list[Finding]:
    """Findings of a record of any kind."""
    record = _read(path)
    if isinstance(record, OperatorRecord):
        return check_operators(record, expected_gpu)
    return check(record, expected_gpu)


def gpu_name(path: Path) -> str | None:
    """Name of the GPU that a record of any kind is of; None: of none."""
    gpu = _read(path).environment.gpu
    return gpu.name if gpu else None


def _read(path: Path) -> Record | OperatorRecord:
    return read_as(OperatorRecord, path) if is_operator_record(path) else read_record(path)


def _check_file(path: Path, expected_gpu: str | None) -> list[Finding]:
    try:
        return read_and_check(path, expected_gpu)
    except UserError as error:
        return [Finding("readable", "invalid", error.what)]


def _visited(record: OperatorRecord) -> Finding:
    """Every case that runs here has its visits: all rounds, or one steady loop; each took time."""
    wanted = 1 if record.series.mode == "power" else record.rounds
    counts = Counter(record.visits.case)
    expected = {i: wanted if outcome.status == "ok" else 0 for i, outcome in enumerate(record.outcomes)}
    wrong = [label(record.series.cases[i]) for i, count in expected.items() if counts[i] != count]
    empty = sum(ms <= 0 for ms in record.visits.device_ms)
    ran = sum(outcome.status == "ok" for outcome in record.outcomes)
    level: Level = "invalid" if wrong or empty or not ran else "ok"
    detail = f"{ran} of {len(expected)} cases ran, {wanted} visits each; wrong in {len(wrong)} cases"
    return Finding("visits", level, detail + (f": {', '.join(wrong)}" if wrong else ""))


def _loops_closure(record: OperatorRecord, windows: list[tuple[float, float]]) -> Finding:
    if record.series.mode == "time":  # visits of milliseconds between pauses: nothing samples their power
        return Finding("closure", "ok", "not checked: no energy is read from a series of times")
    if not windows:
        return Finding("closure", "invalid", "there is no loop to check")
    return _counted(record, windows[0][0], windows[-1][1])


def _boards(record: Record | OperatorRecord) -> list[Board]:
    """Every GPU that the record is of, the pipeline's own first; none on a CPU."""
    environment = record.environment
    if environment.gpu is None:
        return []
    own = Board(
        gpu=environment.gpu,
        foreign_processes=environment.foreign_processes,
        ticks=record.ticks,
        samples=record.samples,
    )
    return [own, *(record.further_boards if isinstance(record, Record) else ())]


def _limited(rule: str, worse: Level, what: str, percent: float, limit: float, digits: int = 2) -> Finding:
    """A finding on a percentage that must not exceed ``limit``; one that is not a number exceeds it."""
    level: Level = "ok" if percent <= limit else worse
    found = "cannot be told" if isnan(percent) else f"{percent:.{digits}f} %"
    return Finding(rule, level, f"{what} {found}, limit {limit:g} %")


def _gpu(record: Record | OperatorRecord, expected: str | None) -> Finding:
    names = sorted({board.gpu.name for board in _boards(record)}) or ["no GPU"]
    name = " and ".join(names)
    if expected is None:
        level: Level = "ok" if len(names) == 1 else "invalid"
        return Finding("gpu_name", level, f"{name}; the campaign names none")
    return Finding(
        "gpu_name", "ok" if names == [expected] else "invalid", f"{name}; the campaign is on {expected}"
    )


def _foreign_processes(record: Record | OperatorRecord) -> Finding:
    further = record.further_boards if isinstance(record, Record) else ()
    on_further = [process for board in further for process in board.foreign_processes]
    foreign = [*record.environment.foreign_processes, *on_further]
    listed = ", ".join(
        f"pid {p.pid}" + (f" ({p.used_MiB:.0f} MiB)" if p.used_MiB is not None else "") for p in foreign
    )
    return Finding(
        "foreign_process",
        "invalid" if foreign else "ok",
        f"{len(foreign)} foreign processes on the GPU, limit 0" + (f": {listed}" if listed else ""),
    )


def _shared_host(record: Record) -> Finding:
    """CPU and memory energies are the whole host's: with another GPU at work they are not ours alone."""
    in_use = [n for n in record.environment.neighbours if n.in_use]
    drew = ", ".join(f"{n.uuid} ({_power(n)})" for n in in_use)
    return Finding(
        "shared_host",
        "flag" if in_use else "ok",
        f"{len(in_use)} other GPUs of the host in use"
        + (f": {drew}; CPU and RAM energies are shared with their work" if in_use else ""),
    )


def _power(neighbour: Neighbour) -> str:
    power_W = neighbour.mean_power_W
    return "no counter" if power_W is None else f"{power_W:.0f} W"


def _unspanned(record: Record) -> Finding:
    percent = unspanned_percent(record.windows, record.spans)
    what = "time of the generations that no span covers:"
    # On a CPU tiny models test the chain: their generations last a second, and the pipeline's own host code
    # takes more than a hundredth of it. No energy is attributed there that this could spoil.
    level: Level = "invalid" if record.environment.gpu else "flag"
    return _limited("unspanned", level, what, percent, MAX_UNSPANNED_PERCENT)


def _closure(record: Record, found: list[Generation]) -> Finding:
    return _counted(record, found[0].start_s, found[-1].end_s)


def _counted(record: Record | OperatorRecord, start_s: float, end_s: float) -> Finding:
    """Two instruments, one energy: the counter, and the integral of instantaneous power, of every board."""
    boards = _boards(record)
    if not boards:
        return Finding("closure", "ok", "not checked: no GPU, hence no counter")
    found = [_counted_board(board, start_s, end_s) for board in boards]
    if len(found) == 1:
        return found[0]
    worst = max((finding.level for finding in found), key=LEVELS.index)
    details = (f"{board.gpu.uuid}: {f.detail}" for board, f in zip(boards, found, strict=True))
    return Finding("closure", worst, "; ".join(details))


def _counted_board(board: Board, start_s: float, end_s: float) -> Finding:
    rule, ticks, samples = "closure", board.ticks, board.samples
    if not ticks:
        return Finding(
            rule, "flag", "not checked: the energy counter was not read, there is no measured energy"
        )
    try:
        counter_J = energy_J(ticks, start_s, end_s).value_J
        if not samples or not _has_power(samples):
            return Finding(rule, "flag", "not checked: instantaneous power was not read")
        if end_s - start_s < MIN_CLOSURE_S:
            return Finding(rule, "ok", f"not checked: {end_s - start_s:.2f} s, from {MIN_CLOSURE_S:g} s on")
        integral_J = power_integral_J(samples, start_s, end_s, power="instant")
    except UserError as error:
        return Finding(rule, "invalid", error.what)
    percent = 100 * abs(counter_J / integral_J - 1) if integral_J > 0 else np.nan
    what = f"counter {counter_J:.1f} J, integral of power {integral_J:.1f} J: they differ by"
    uncertain = CLOSURE_STANDARD_ERRORS * snapshot_error_percent(samples, start_s, end_s)
    return _limited(rule, "invalid", what, percent, max(MAX_CLOSURE_PERCENT, uncertain))


def snapshot_error_percent(samples: Samples, start_s: float, end_s: float) -> float:
    """Standard error (%) of the mean of instantaneous power's readings between two times.

    From differences of successive readings a refresh (:data:`REFRESH_S`) apart, so that slow changes, which
    the integral follows, do not count, and from their mean absolute value, so that single jumps between
    stages count little: σ = √π / 2 · mean |xᵢ₊₁ − xᵢ| for normal scatter. Nought for fewer than three.
    """
    times = np.asarray(samples.time_s)
    watts = np.array([np.nan if w is None else w for w in samples.power_instant_W])
    inside = (times >= start_s) & (times <= end_s) & ~np.isnan(watts)
    refreshes, first = np.unique(np.floor(times[inside] / REFRESH_S), return_index=True)
    fresh = watts[inside][first]
    if len(refreshes) < 3 or fresh.mean() <= 0:
        return 0.0
    deviation = np.sqrt(np.pi) / 2 * np.abs(np.diff(fresh)).mean()
    return float(100 * deviation / np.sqrt(len(fresh)) / fresh.mean())


def _has_power(samples: Samples) -> bool:
    return any(power is not None for power in samples.power_instant_W)


def _step_sem(record: Record, found: list[Generation]) -> Finding:
    """A campaign on the CPU is held to its own protocol: its clock is everybody's."""
    if record.configuration.interventions and record.protocol == "full" and len(found) == 1:
        detail = "not checked: of one whole generation, whose steps may differ by the interventions"
        return Finding("step_sem", "ok", detail)
    on_cpu = record.environment.gpu is None
    limit = record.protocol_settings.sampled.max_step_sem_percent if on_cpu else MAX_STEP_SEM_PERCENT
    what = "standard error of the mean step time"
    if sum(g.steps for g in found) < 2:
        return Finding("step_sem", "flag", f"not checked: one step has no {what}")
    return _limited("step_sem", "flag", what, step_scatter_percent(record, found), limit, digits=3)


def _throttling(record: Record, found: list[Generation]) -> Finding:
    return _throttled(record, [(g.start_s, g.end_s) for g in found])


def _throttled(record: Record | OperatorRecord, windows: list[tuple[float, float]]) -> Finding:
    rule, boards = "throttling", _boards(record)
    if not boards:
        return Finding(rule, "ok", "not checked: no GPU")
    of_each = [_reasons_during(board.samples, windows) for board in boards]
    seen = np.concatenate(of_each)
    refused = seen & ~ALLOWED_REASONS
    names = ", ".join(_named_bits(int(np.bitwise_or.reduce(refused))))
    count = np.count_nonzero(refused)
    if not count and not all(reasons.size for reasons in of_each):
        return Finding(rule, "flag", "not checked: no clock reasons were read during the measurement")
    return Finding(
        rule,
        "invalid" if count else "ok",
        f"{count} of {seen.size} samples with a refused clock reason, limit 0"
        + (f": {names}" if names else ""),
    )


def _profile(record: Record) -> Finding:
    """Kernels of a stage cannot run longer than the stage takes: then some were counted twice."""
    rule = "profile"
    if record.operators is None:
        return Finding(rule, "ok", "none was asked for")
    if record.environment.gpu is None:
        return Finding(rule, "ok", "not checked: no GPU; threads' times add up to more than the clock's")
    stage, percent = profile_excess(record.windows, record.spans, record.operators)
    what = f"kernels of stage {stage} in the profile, beyond the time that it takes:"
    return _limited(rule, "flag", what, percent, MAX_PROFILE_EXCESS_PERCENT, digits=1)


def profile_excess(windows: Windows, spans: Spans, profile: Operators) -> tuple[str, float]:
    """The stage whose kernels exceed its measured time most in a profile, and by how much (%).

    Stages of less than :data:`MIN_PROFILED_S` are left out: launches, not kernels, make their time.
    """
    worst = ("", -100.0)
    for stage, seconds in one_step_stage_s(windows, spans).items():
        if seconds >= MIN_PROFILED_S:
            times = profile.steps if stage in LOOP_STAGES else 1
            kernels_s = sum(
                s for s, name in zip(profile.device_s, profile.stage, strict=True) if name == stage
            )
            worst = max(worst, (stage, 100 * (kernels_s / (seconds * times) - 1)), key=lambda found: found[1])
    return worst


def _reasons_during(samples: Samples | None, windows: list[tuple[float, float]]) -> NDArray[np.int64]:
    """The bit masks that were read during one of the windows (start and end, s)."""
    if samples is None:
        return np.empty(0, dtype=np.int64)
    reasons = np.array([-1 if r is None else r for r in samples.throttle_reasons], dtype=np.int64)
    time_s = np.asarray(samples.time_s, dtype=np.float64)[reasons >= 0]
    reasons = reasons[reasons >= 0]
    during = np.zeros(len(reasons), dtype=bool)
    for start_s, end_s in windows:
        during |= (time_s >= start_s) & (time_s <= end_s)
    return reasons[during]


def _named_bits(bits: int) -> Iterator[str]:
    for place in range(bits.bit_length()):
        if bit := bits & 1 << place:
            yield CLOCK_REASONS.get(bit, f"unknown reason {bit:#x}")
