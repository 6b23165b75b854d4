"""Experiment ``operators``: rates and powers of single operators, for the cost model.

A series of times visits its cases in several rounds, each in an order of its own, so that warming and
clocks spread over all of them; a series of powers runs each case in one steady loop.  A series' record is
written as soon as it is done: the same command goes on after a stop and measures nothing twice.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import ceil
from pathlib import Path
from typing import Any

from t2v_energy.config import (
    Accelerator,
    Campaign,
    Settings,
    load_accelerator,
    load_campaign,
    protocol_settings,
)
from t2v_energy.errors import UserError
from t2v_energy.measurement.operator_record import (
    EXPERIMENT,
    OperatorRecord,
    Outcome,
    Visits,
    operator_record_name,
)
from t2v_energy.measurement.record import Origin, read_as, to_json, write_atomically
from t2v_energy.measurement.runner import SETTLE_S, OpenDevice, check_disk, metered, open_device
from t2v_energy.measurement.sealing import is_sealed
from t2v_energy.measurement.validity import check_operators
from t2v_energy.operator_suite import (
    START_S,
    Attention,
    Convolution,
    Elementwise,
    Linear,
    Series,
    Suite,
    foreseen_series_s,
    label,
    load_suite,
)

Say = Callable[[str], None]
MAX_ITERATIONS = 20_000
CHUNK_S = 0.1  # a steady loop queues so much work before it waits for the device
SHORT_CALL_S = 1e-3  # below this, the time of a single call is mostly that of waiting for it
PROBED_CALLS = 20


def expected_records(root: Path) -> list[str]:
    """File names of a whole experiment, by config/operators.yaml."""
    return [operator_record_name(series.key) for series in load_suite(root).series]


def measure_operators(
    root: Path, settings: Settings, *, say: Say, deadline_s: float | None = None
) -> list[Path]:
    """Measure what is missing of the campaign's experiment ``operators``; returns the records written.

    ``deadline_s`` is a time of the monotonic clock: a series that is not expected to end before it is not
    begun.  The expected seconds are said first.

    Raises :class:`UserError` when the experiment is sealed, when a record that is there is of another list of
    cases, or as :func:`t2v_energy.measurement.runner.open_device`.
    """
    campaign, suite = load_campaign(root, settings.campaign), load_suite(root)
    folder = root / "results" / "raw" / campaign.key / EXPERIMENT
    pending = _pending(folder, suite, campaign)
    accelerator = load_accelerator(root, campaign.accelerator)
    expected_s = _foretell(suite, pending, accelerator, campaign.device, say)
    if not pending:
        return []
    _refuse_sealed(folder)
    check_disk(folder)
    written = []
    with ExitStack() as stack:
        protocols = protocol_settings(settings, campaign)
        device = open_device(campaign, settings.measure.allow_shared, say, stack)
        runner = _Runner(root, campaign, suite, metered(device, protocols, stack), say)
        for series in _pending(folder, suite, campaign):  # whoever had the device may have measured it
            if deadline_s is not None and time.monotonic() + expected_s[series.key] > deadline_s:
                say(f"{series.key}: left out, about {expected_s[series.key]:.0f} s do not fit")
                continue
            begun_s = time.monotonic()
            record = runner.measure(series)
            path = folder / record.file_name
            write_atomically(path, to_json(record))
            written.append(path)
            say(f"{series.key}: {time.monotonic() - begun_s:.1f} s, {path.relative_to(root)}")
            for flag in record.flags:
                say(f"  ! {flag}")
    return written


def _pending(folder: Path, suite: Suite, campaign: Campaign) -> list[Series]:
    """What has no record yet; one that was measured with other cases or settings is an error."""
    missing = []
    for series in suite.series:
        path = folder / operator_record_name(series.key)
        if not path.exists():
            missing.append(series)
            continue
        record = read_as(OperatorRecord, path)
        same = record.series == series and record.seed == campaign.seed
        if not same or any(getattr(record, name) != getattr(suite, name) for name in _SETTINGS):
            raise UserError(
                "this record was measured with other cases or settings than configured now",
                where=str(path),
                remedy="restore config/operators.yaml, or move the record away to measure again",
            )
    return missing


_SETTINGS = ("rounds", "visit_s", "loop_s", "settle_s")


def _refuse_sealed(folder: Path) -> None:
    if is_sealed(folder):
        raise UserError(
            "the experiment is sealed, and series are missing from it",
            where=str(folder),
            remedy="remove its SHA256SUMS to add to it, and seal it again afterwards",
        )


def _foretell(
    suite: Suite, pending: list[Series], accelerator: Accelerator, device: str, say: Say
) -> dict[str, float]:
    """Say how long it should take; seconds by series."""
    expected_s = {s.key: foreseen_series_s(s, suite, accelerator) for s in pending}
    total_s = sum(expected_s.values()) + (START_S if pending else 0)
    done = len(suite.series) - len(pending)
    where = "" if device == "cuda" else f"; on a CPU it takes longer than on {accelerator.title}"
    say(
        f"operators: {len(suite.series)} series, {done} already measured; "
        f"about {total_s:.0f} s to go (modelled{where})"
    )
    for key, seconds in expected_s.items():
        say(f"  {key:<28}{seconds:>7.1f} s")
    return expected_s


@dataclass
class _Timed:
    """The columns of :class:`Visits` while they grow."""

    visits: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in Visits.model_fields})

    def add(self, **values: float) -> None:
        for name, column in self.visits.items():
            column.append(values[name])


class _Runner:
    """Measures series on one open device."""

    def __init__(self, root: Path, campaign: Campaign, suite: Suite, device: OpenDevice, say: Say) -> None:
        self._root, self._campaign, self._suite = root, campaign, suite
        self._device, self._say = device, say
        self._on_gpu = campaign.device == "cuda"

    def measure(self, series: Series) -> OperatorRecord:
        """One series, from the meter's settling to its last ticks."""
        origin = Origin(utc=datetime.now(UTC).isoformat(), monotonic_s=time.monotonic())
        sampler = self._device.sampler
        if sampler:
            sampler.drain()
            time.sleep(SETTLE_S)
        outcomes: list[Outcome] = []
        timed = _Timed()
        call_s = self._first_calls(series, outcomes)
        if series.mode == "power":
            for index in call_s:
                self._loop(series, index, call_s[index], timed)
        else:
            order = random.Random(f"{self._campaign.seed} {series.key}")
            for round_index in range(self._suite.rounds):
                indices = list(call_s)
                order.shuffle(indices)
                for index in indices:
                    self._visit(series, index, call_s[index], round_index, timed)
        return self._record(series, origin, outcomes, timed)

    def _first_calls(self, series: Series, outcomes: list[Outcome]) -> dict[int, float]:
        """Run each case once to see whether it can, and some more to see how long it takes.

        Seconds of a call by index, of the cases that run here.
        """
        call_s = {}
        for index, case in enumerate(series.cases):
            outcome, seconds = self._first_call(case)
            outcomes.append(outcome)
            if seconds is not None:
                call_s[index] = seconds
            else:
                self._say(f"  {label(case)}: {outcome.status} ({outcome.error})")
        return call_s

    def _first_call(
        self, case: Attention | Linear | Convolution | Elementwise
    ) -> tuple[Outcome, float | None]:
        import torch

        from t2v_energy.measurement.kernels import KernelProbe
        from t2v_energy.measurement.operator_calls import ready

        probe = KernelProbe()
        try:
            with ready(case, self._campaign.device, self._campaign.seed) as call:
                self._wait()
                begun_s = time.monotonic()
                with probe.during(EXPERIMENT):
                    call()
                self._wait()
                first_s = time.monotonic() - begun_s
                seconds = self._probed_s(call)
        except torch.OutOfMemoryError as error:
            return Outcome(status="out_of_memory", error=str(error).splitlines()[0]), None
        except (RuntimeError, NotImplementedError) as error:  # no such kernel for these sizes and types
            return Outcome(status="unavailable", error=str(error).splitlines()[0]), None
        kernels = probe.found.get(EXPERIMENT, [])
        return Outcome(status="ok", attention_kernels=kernels, first_call_s=first_s), seconds

    def _probed_s(self, call: Callable[[], Any]) -> float:
        """About how long a call takes once everything is set up (s)."""
        calls = 1
        while True:
            begun_s = time.monotonic()
            for _ in range(calls):
                call()
            self._wait()
            seconds = (time.monotonic() - begun_s) / calls
            if seconds >= SHORT_CALL_S or calls > 1:
                return max(seconds, 1e-7)
            calls = PROBED_CALLS

    def _visit(self, series: Series, index: int, call_s: float, round_index: int, timed: _Timed) -> None:
        """One visit of a case: operands, one call that does not count, then those that do."""
        from t2v_energy.measurement.operator_calls import ready

        iterations = min(MAX_ITERATIONS, max(1, ceil(self._suite.visit_s / call_s)))
        with ready(series.cases[index], self._campaign.device, self._campaign.seed) as call:
            call()
            self._wait()
            start_s = time.monotonic()
            device_ms = self._timed_ms(call, iterations)
            end_s = time.monotonic()
        timed.add(
            case=index,
            round=round_index,
            iterations=iterations,
            start_s=start_s,
            end_s=end_s,
            device_ms=device_ms,
        )

    def _loop(self, series: Series, index: int, call_s: float, timed: _Timed) -> None:
        """One steady loop; what runs before ``settle_s`` is over does not count."""
        from t2v_energy.measurement.operator_calls import ready

        chunk = min(MAX_ITERATIONS, max(1, ceil(CHUNK_S / call_s)))
        with ready(series.cases[index], self._campaign.device, self._campaign.seed) as call:
            settled_s = time.monotonic() + self._suite.settle_s
            while time.monotonic() < settled_s:
                self._timed_ms(call, chunk)
            start_s, iterations, device_ms = time.monotonic(), 0, 0.0
            while time.monotonic() < start_s + self._suite.loop_s:
                device_ms += self._timed_ms(call, chunk)
                iterations += chunk
            end_s = time.monotonic()
        timed.add(
            case=index, round=0, iterations=iterations, start_s=start_s, end_s=end_s, device_ms=device_ms
        )
        self._say(f"  {label(series.cases[index])}: {iterations} calls in {end_s - start_s:.1f} s")
        time.sleep(SETTLE_S if self._on_gpu else 0)  # ticks between two loops, so that an edge is one

    def _timed_ms(self, call: Callable[[], Any], iterations: int) -> float:
        """Milliseconds of so many calls on the device's clock; without a GPU on the host's."""
        import torch

        if not self._on_gpu:
            begun_s = time.perf_counter()
            for _ in range(iterations):
                call()
            return 1000 * (time.perf_counter() - begun_s)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(iterations):
            call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def _wait(self) -> None:
        import torch

        if self._on_gpu:
            torch.cuda.synchronize()

    def _record(
        self, series: Series, origin: Origin, outcomes: list[Outcome], timed: _Timed
    ) -> OperatorRecord:
        from t2v_energy.metering.environment import describe

        zero, columns, sampler = origin.monotonic_s, timed.visits, self._device.sampler
        last_s = columns["end_s"][-1] if columns["end_s"] else time.monotonic()
        ticks, samples = sampler.drain(past_s=last_s) if sampler else (None, None)
        moved = {name: [t - zero for t in columns[name]] for name in ("start_s", "end_s")}
        suite, campaign = self._suite, self._campaign
        record = OperatorRecord(
            campaign=campaign.key,
            series=series,
            **{name: getattr(suite, name) for name in _SETTINGS},
            seed=campaign.seed,
            origin=origin,
            environment=describe(self._root, self._device.gpu, "none", list(self._device.foreign)),
            outcomes=outcomes,
            visits=Visits(**{**columns, **moved}),
            ticks=ticks.shifted(zero) if ticks else None,
            samples=samples.shifted(zero) if samples else None,
        )
        flags = [
            f"{f.rule}: {f.detail}" for f in check_operators(record, campaign.gpu_name) if f.level != "ok"
        ]
        return record.model_copy(update={"flags": flags})
