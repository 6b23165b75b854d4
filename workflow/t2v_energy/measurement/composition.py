"""Totals of whole videos, composed from generations of which some denoising steps were run.

A generation's window has a part that comes once a video (text encoder, VAE, host work around the loop) and
a loop of denoising steps. Steps that were run count as they were; those that were not are taken to cost what
the settled ones did (:func:`step_weights`): total(S) = once + the k steps run + (S − k) · mean settled step.
Totals composed so are linear in S by construction; they are never evidence that cost is linear in S (the
experiment ``validation`` measures whole generations for that). Imported by the measuring runner too: numpy
and scipy's t-quantile, nothing heavier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot, nan, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student_t

from t2v_energy.errors import UserError
from t2v_energy.measurement.record import LOOP_STAGES, Record, Spans, Windows

Array = NDArray[np.float64]
CONFIDENCE = 0.95
SETTLED_S = 2.0
"""A step is settled if it begins this long after its loop (s). The clock of a GPU that runs into its power
limit starts too high and then swings about its mean, once a second and less each time; steps cost more energy
while it swings widely (``settling.csv``, :mod:`t2v_energy.analysis.settling`). Later would be better still
but leave too few steps of a window of four seconds."""


@dataclass(frozen=True)
class Generation:
    """One measured generation; times are the record's (seconds after its origin).

    Attributes:
        index: the generation's window in :class:`~t2v_energy.measurement.record.Windows`.
        start_s, end_s: edges of the window.
        loop_start_s: start of the first denoiser call.
        loop_end_s: end of the last scheduler call, or of the last denoiser call where no scheduler is timed.
        step_starts_s: start of each step's first denoiser call.
        step_durations_s: from each step's start to the next one's; the last step ends with the loop.
        steps: denoising steps that were run.
        repetition: number of the measured repetition that it belongs to, from 0.
    """

    index: int
    start_s: float
    end_s: float
    loop_start_s: float
    loop_end_s: float
    step_starts_s: Array
    step_durations_s: Array
    steps: int
    repetition: int

    @property
    def loop_s(self) -> float:
        """Length of the denoising loop (s)."""
        return self.loop_end_s - self.loop_start_s

    @property
    def once_s(self) -> float:
        """What the window holds besides the loop (s): the part that comes once a video."""
        return (self.end_s - self.start_s) - self.loop_s

    @property
    def mean_step_s(self) -> float:
        """Mean time of the denoising steps that were run (s)."""
        return self.loop_s / self.steps

    @property
    def first_settled(self) -> int:
        """Number of the first settled step, from 0 (:func:`first_settled`)."""
        return first_settled(self.step_starts_s)

    def composed_loop_s(self, num_inference_steps: int) -> float:
        """Time of a whole video's loop of ``num_inference_steps`` steps (s)."""
        return float(step_weights(self.step_starts_s, num_inference_steps) @ self.step_durations_s)


def first_settled(step_starts_s: Array) -> int:
    """Number (from 0) of the first step that begins :data:`SETTLED_S` after the first one or later.

    0 where no step does: of a loop that is over so soon, all steps are alike as far as can be told.
    """
    late = np.flatnonzero(step_starts_s - step_starts_s[0] >= SETTLED_S)
    return int(late[0]) if late.size else 0


def step_weights(step_starts_s: Array, num_inference_steps: int) -> Array:
    """How often each step that was run counts in a video of ``num_inference_steps`` (one value a step).

    Each counts once, and the settled ones (:func:`first_settled`) stand in equal parts for those that were
    not run. The weights sum to ``num_inference_steps``; of a whole generation all are 1.
    """
    run, settled = len(step_starts_s), first_settled(step_starts_s)
    weights = np.ones(run)
    weights[settled:] += (num_inference_steps - run) / (run - settled)
    return weights


def generations(windows: Windows, spans: Spans) -> list[Generation]:
    """The windows of kind ``generation``, in order, each with its denoising loop.

    Raises:
        UserError: a generation has no denoiser span, or its spans show other steps than its window says.
    """
    window = np.asarray(spans.window, dtype=np.int64)
    stage = np.asarray(spans.stage, dtype=object)
    step = np.asarray(spans.step, dtype=np.int64)
    start = np.asarray(spans.start_s, dtype=np.float64)
    end = np.asarray(spans.end_s, dtype=np.float64)
    found: list[Generation] = []
    for index in _of_kind(windows, "generation"):
        calls = (window == index) & (stage == "denoiser")
        closing = (window == index) & (stage == "scheduler")
        loop_end_s = end[closing if closing.any() else calls].max(initial=-np.inf)
        starts = _step_starts(step[calls], start[calls], windows.steps[index], index)
        found.append(
            Generation(
                index=index,
                start_s=windows.start_s[index],
                end_s=windows.end_s[index],
                loop_start_s=float(starts[0]),
                loop_end_s=float(loop_end_s),
                step_starts_s=starts,
                step_durations_s=np.diff(starts, append=loop_end_s),
                steps=windows.steps[index],
                repetition=windows.repetition[index] if windows.repetition else len(found),
            )
        )
    return found


def one_step_stage_s(windows: Windows, spans: Spans) -> dict[str, float]:
    """Time (s) of each stage's spans in a generation of one step: the mean over the measured generations.

    What is in the loop counts with one step's part.
    """
    total: dict[str, float] = {}
    counted = _of_kind(windows, "generation")
    weight = {index: 1 / windows.steps[index] for index in counted if windows.steps[index] > 0}
    for window, stage, start_s, end_s in zip(
        spans.window, spans.stage, spans.start_s, spans.end_s, strict=True
    ):
        if window in weight:
            part = weight[window] if stage in LOOP_STAGES else 1.0
            total[stage] = total.get(stage, 0.0) + part * (end_s - start_s) / len(weight)
    return total


def by_repetition(generations: Sequence[Generation], values: ArrayLike) -> Array:
    """Mean of each repetition's ``values``, one a generation, in the order of the repetitions."""
    number = np.array([g.repetition for g in generations], dtype=np.int64)
    array = np.asarray(values, dtype=np.float64)
    return np.array([array[number == n].mean() for n in np.unique(number)], dtype=np.float64)


def _of_kind(windows: Windows, kind: str) -> list[int]:
    return [index for index, found in enumerate(windows.kind) if found == kind]


def _step_starts(step: NDArray[np.int64], start_s: Array, steps: int, index: int) -> Array:
    """First start (s) of each of the ``steps`` steps, which must be numbered 0, 1, 2, …"""
    numbers, of_step = np.unique(step, return_inverse=True)
    if steps < 1 or not np.array_equal(numbers, np.arange(steps)):
        seen = f"steps {numbers[0]} to {numbers[-1]} ({len(numbers)})" if len(numbers) else "no step"
        raise UserError(
            f"window {index} is a generation of {steps} denoising steps, but its denoiser spans show {seen}",
            remedy="measure the configuration again, or check `spans.denoiser` in the model file",
        )
    starts = np.full(steps, np.inf)
    np.minimum.at(starts, of_step, start_s)
    return starts


def composed_latency_s(generations: Sequence[Generation], num_inference_steps: int) -> Array:
    """Time of a whole video of ``num_inference_steps`` steps (s), one total a generation.

    For a whole generation (its steps are S) this is the window's length; for a cut one it is linear in S by
    construction, hence never evidence of linearity.
    """
    return np.array(
        [g.once_s + g.composed_loop_s(num_inference_steps) for g in generations], dtype=np.float64
    )


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` generations: standard deviation (n − 1) and half-width of its 95 % interval.

    All but ``n`` are in the unit of the values; NaN is what so few values cannot tell.
    """

    mean: float
    std: float
    ci95: float
    n: int


def estimate(values: ArrayLike, instrument_ci95: float = 0.0) -> Estimate:
    """Mean of ``values`` with Student's t-interval over them.

    ``instrument_ci95`` is the half-width of the instrument's 95 % interval on the mean (same unit) and is
    combined in quadrature. One value has no spread: its std and interval are NaN, not zero.
    """
    array = np.asarray(values, dtype=np.float64)
    n = array.size
    if n == 0:
        return Estimate(nan, nan, nan, 0)
    if n == 1:
        return Estimate(float(array[0]), nan, nan, 1)
    std = float(array.std(ddof=1))
    scatter = float(student_t.ppf((1 + CONFIDENCE) / 2, n - 1)) * std / sqrt(n)
    return Estimate(float(array.mean()), std, hypot(scatter, instrument_ci95), n)


def step_sem_percent(generations: Sequence[Generation]) -> float:
    """Standard error of the mean step time over all steps of all generations, percent of the mean.

    NaN with fewer than two steps.
    """
    steps = np.concatenate([np.empty(0), *(g.step_durations_s for g in generations)])
    if steps.size < 2:
        return nan
    return float(100 * steps.std(ddof=1) / sqrt(steps.size) / steps.mean())


def step_scatter_percent(record: Record, generations: Sequence[Generation]) -> float:
    """Standard error of the mean step time of a record's ``generations``, percent of the mean.

    With interventions, the steps of whole generations differ on purpose: some are skipped, some are not
    guided.  That is no scatter, so each step is then held against the same one of the other generations
    (:func:`same_step_sem_percent`).
    """
    whole = all(g.steps == record.configuration.num_inference_steps for g in generations)
    if record.configuration.interventions and whole:
        return same_step_sem_percent(generations)
    return step_sem_percent(generations)


def same_step_sem_percent(generations: Sequence[Generation]) -> float:
    """Standard error of the mean step time from the scatter of each step over the generations, percent.

    The variance is pooled over the steps: deviations from each step's own mean, with one degree of freedom
    less a step.  NaN with fewer than two generations; they must have the same steps.
    """
    if len(generations) < 2:
        return nan
    times = np.array([g.step_durations_s for g in generations])
    variance = times.var(axis=0, ddof=1).mean()
    return float(100 * sqrt(variance / times.size) / times.mean())


def unspanned_percent(windows: Windows, spans: Spans) -> float:
    """Share of the generation windows' time that no span covers, percent; overlapping spans count once.

    A window is covered by its own spans alone. NaN without a generation.
    """
    window = np.asarray(spans.window, dtype=np.int64)
    start = np.asarray(spans.start_s, dtype=np.float64)
    end = np.asarray(spans.end_s, dtype=np.float64)
    total_s = covered_s = 0.0
    for index in _of_kind(windows, "generation"):
        own, low, high = window == index, windows.start_s[index], windows.end_s[index]
        total_s += high - low
        covered_s += _union_s(start[own].clip(low, high), end[own].clip(low, high))
    return 100 * (total_s - covered_s) / total_s if total_s > 0 else nan


def _union_s(start_s: Array, end_s: Array) -> float:
    """Length of the union of intervals (s)."""
    if start_s.size == 0:
        return 0.0
    order = np.argsort(start_s, kind="stable")
    start_s, end_s = start_s[order], end_s[order]
    reached = np.concatenate(([start_s[0]], np.maximum.accumulate(end_s)[:-1]))
    return float(np.maximum(end_s - np.maximum(start_s, reached), 0).sum())
