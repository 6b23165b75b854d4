"""Totals composed from generations, and their intervals."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from records import ONCE_S, make_record
from t2v_energy.errors import UserError
from t2v_energy.measurement.composition import (
    SETTLED_S,
    by_repetition,
    composed_latency_s,
    estimate,
    first_settled,
    generations,
    step_sem_percent,
    step_weights,
    unspanned_percent,
)
from t2v_energy.measurement.record import Spans, Windows


def spans_of(*rows: tuple[int, str, int, float, float]) -> Spans:
    """Spans from (window, stage, step, start_s, end_s)."""
    window, stage, step, start_s, end_s = (list(column) for column in zip(*rows, strict=True))
    return Spans(window=window, stage=stage, step=step, call=[0] * len(rows), start_s=start_s, end_s=end_s)


ONE = Windows(kind=["warmup", "generation"], steps=[1, 2], start_s=[0.0, 10.0], end_s=[5.0, 20.0])


class TestGenerations:
    def test_only_measured_generations_with_their_loop(self) -> None:
        record = make_record(steps=4, step_s=(0.5, 1.0))
        first, second = generations(record.windows, record.spans)
        assert [first.index, second.index] == [2, 3]
        assert first.steps == 4
        assert first.loop_start_s - first.start_s == pytest.approx(0.4)
        assert first.loop_s == pytest.approx(2.0)
        assert first.once_s == pytest.approx(ONCE_S)
        np.testing.assert_allclose(first.step_durations_s, 0.5)
        np.testing.assert_allclose(second.step_starts_s, second.loop_start_s + np.arange(4))
        assert second.mean_step_s == pytest.approx(1.0)

    def test_repetitions_are_the_records_or_one_a_generation(self) -> None:
        record = make_record(step_s=(0.5, 1.0, 1.5))
        assert record.windows.repetition == []
        assert [g.repetition for g in generations(record.windows, record.spans)] == [0, 1, 2]
        grouped = record.windows.model_copy(update={"repetition": [-1, -1, 0, 0, 1, -1]})
        found = generations(grouped, record.spans)
        assert [g.repetition for g in found] == [0, 0, 1]
        np.testing.assert_allclose(by_repetition(found, [1.0, 2.0, 5.0]), [1.5, 5.0])

    def test_a_step_lasts_to_the_next_start_and_the_last_one_to_the_loops_end(self) -> None:
        spans = spans_of(
            (1, "text_encoder", -1, 10.0, 11.0),
            (1, "denoiser", 0, 12.0, 13.0),
            (1, "denoiser", 0, 13.0, 14.0),
            (1, "scheduler", 0, 14.0, 14.1),
            (1, "denoiser", 1, 15.0, 16.0),
            (1, "scheduler", 1, 16.0, 16.5),
        )
        (found,) = generations(ONE, spans)
        assert (found.loop_start_s, found.loop_end_s) == (12.0, 16.5)
        np.testing.assert_allclose(found.step_durations_s, [3.0, 1.5])
        assert found.step_durations_s.sum() == pytest.approx(found.loop_s)

    def test_without_a_scheduler_the_loop_ends_with_the_denoiser(self) -> None:
        spans = spans_of((1, "denoiser", 1, 15.0, 16.0), (1, "denoiser", 0, 12.0, 13.0))
        (found,) = generations(ONE, spans)
        assert found.loop_end_s == 16.0
        np.testing.assert_allclose(found.step_starts_s, [12.0, 15.0])

    @pytest.mark.parametrize("steps", [[0], [0, 2], [0, 1, 2], [1, 2]])
    def test_other_steps_than_the_window_says_are_refused(self, steps: list[int]) -> None:
        spans = spans_of(*((1, "denoiser", s, 12.0 + s, 13.0 + s) for s in steps))
        with pytest.raises(UserError, match=r"window 1 is a generation of 2 denoising steps"):
            generations(ONE, spans)

    def test_no_denoiser_span_is_refused(self) -> None:
        with pytest.raises(UserError, match="no step"):
            generations(ONE, spans_of((1, "text_encoder", -1, 10.0, 11.0)))


class TestSettled:
    @pytest.mark.parametrize(
        ("starts_s", "first"),
        [
            ([10.0, 11.0, 12.0, 13.0], 2),  # from the loop's start, not the record's; the limit itself counts
            ([10.0, 11.999, 13.0], 2),
            ([0.0, 5.0], 1),
            ([0.0, 0.5, 1.0, 1.5], 0),  # over before anything settles: all are alike
            ([7.0], 0),
        ],
    )
    def test_the_first_settled_step(self, starts_s: list[float], first: int) -> None:
        assert SETTLED_S == 2.0
        assert first_settled(np.array(starts_s)) == first

    def test_settled_steps_stand_for_those_that_were_not_run(self) -> None:
        weights = step_weights(np.arange(4.0), 50)
        np.testing.assert_allclose(weights, [1, 1, 24, 24])
        np.testing.assert_allclose(step_weights(np.arange(4.0), 4), 1)  # a whole generation
        np.testing.assert_allclose(step_weights(np.array([0.0, 0.5]), 10), 5)

    def test_a_cold_start_is_counted_once(self) -> None:
        """Two steps of 1.5 s, then steps of 1 s: a video has two slow ones, not half of its steps."""
        edges_s = 12.0 + np.array([0.0, 1.5, 3.0, 4.0, 5.0])
        steps = [(1, "denoiser", n, low, high) for n, (low, high) in enumerate(pairwise(edges_s.tolist()))]
        four = Windows(kind=["warmup", "generation"], steps=[1, 4], start_s=[0.0, 11.0], end_s=[5.0, 19.0])
        found = generations(four, spans_of(*steps))
        np.testing.assert_allclose(composed_latency_s(found, 50), 3.0 + 2 * 1.5 + 48)


class TestComposedLatency:
    def test_is_once_plus_steps_times_the_mean_step(self) -> None:
        record = make_record(steps=4, step_s=(0.5, 1.0, 1.5))
        found = generations(record.windows, record.spans)
        np.testing.assert_allclose(composed_latency_s(found, 50), ONCE_S + 50 * np.array([0.5, 1.0, 1.5]))

    def test_of_a_whole_generation_is_its_window(self) -> None:
        record = make_record(steps=4, unspanned_s=0.3)
        found = generations(record.windows, record.spans)
        np.testing.assert_allclose(composed_latency_s(found, 4), [g.end_s - g.start_s for g in found])

    def test_is_linear_in_the_steps_by_construction(self) -> None:
        record = make_record()
        found = generations(record.windows, record.spans)
        ten, twenty, thirty = (composed_latency_s(found, s) for s in (10, 20, 30))
        np.testing.assert_allclose(thirty - twenty, twenty - ten)


class TestEstimate:
    def test_is_students_interval(self) -> None:
        found = estimate([1.0, 2.0, 3.0])
        # t(0.975, 2) = 4.302653, from tables
        assert (found.mean, found.std, found.n) == (2.0, 1.0, 3)
        assert found.ci95 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)

    def test_the_instrument_adds_in_quadrature(self) -> None:
        alone = estimate([1.0, 2.0, 3.0]).ci95
        assert estimate([1.0, 2.0, 3.0], 4.0).ci95 == pytest.approx(math.hypot(alone, 4.0))
        assert estimate([2.0, 2.0], 0.5).ci95 == pytest.approx(0.5)

    def test_one_value_has_no_interval_and_none_no_mean(self) -> None:
        one, none = estimate([7.0], 1.0), estimate([])
        assert (one.mean, one.n) == (7.0, 1)
        assert math.isnan(one.std)
        assert math.isnan(one.ci95)
        assert none.n == 0
        assert math.isnan(none.mean)

    def test_covers_the_truth_as_often_as_it_says(self) -> None:
        rng = np.random.default_rng(1)
        found = [estimate(rng.normal(5.0, 2.0, 4)) for _ in range(2000)]
        assert np.mean([abs(e.mean - 5.0) <= e.ci95 for e in found]) == pytest.approx(0.95, abs=0.015)


class TestStepError:
    def test_is_over_all_steps_of_all_generations(self) -> None:
        record = make_record(steps=2, step_s=(0.5, 1.0))
        steps = [0.5, 0.5, 1.0, 1.0]
        expected = 100 * np.std(steps, ddof=1) / 2 / 0.75
        assert step_sem_percent(generations(record.windows, record.spans)) == pytest.approx(expected)

    def test_one_step_tells_nothing(self) -> None:
        record = make_record(steps=1, step_s=(0.5,))
        assert math.isnan(step_sem_percent(generations(record.windows, record.spans)))
        assert math.isnan(step_sem_percent([]))


class TestUnspanned:
    def test_counts_what_no_span_covers(self) -> None:
        record = make_record(steps=4, unspanned_s=0.5)  # windows of 1.1 + 2.0 + 0.5 s
        assert unspanned_percent(record.windows, record.spans) == pytest.approx(100 * 0.5 / 3.6)
        record = make_record()
        assert unspanned_percent(record.windows, record.spans) == pytest.approx(0, abs=1e-9)

    def test_overlaps_count_once_and_nothing_counts_outside_the_window(self) -> None:
        spans = spans_of(
            (1, "a", -1, 9.0, 12.0),  # 2 s inside
            (1, "b", -1, 14.0, 18.0),
            (1, "c", -1, 15.0, 16.0),  # within b
            (1, "d", -1, 17.0, 18.5),
            (0, "e", -1, 12.0, 14.0),  # another window's
        )
        assert unspanned_percent(ONE, spans) == pytest.approx(100 * (10 - 2 - 4.5) / 10)

    def test_without_a_generation_is_unknown(self) -> None:
        assert math.isnan(unspanned_percent(Windows(), Spans()))
        assert unspanned_percent(ONE, Spans()) == 100
