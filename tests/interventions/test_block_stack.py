"""The stack in the blocks' place, the clock that tells it where a generation is, and its series."""

from __future__ import annotations

from typing import Any

import plain_denoising as plain
import pytest
import tiny
from t2v_energy.errors import UserError
from t2v_energy.interventions.base import Target
from t2v_energy.interventions.stack_work import branches, needed

torch = pytest.importorskip("torch")
from t2v_energy.interventions.block_stack import (  # noqa: E402
    BlockStack,
    Series,
    blocks_of,
    extrapolated,
    list_name,
    matching,
)
from t2v_energy.interventions.clock import Clock  # noqa: E402

KEYS = tuple(plain.PLAIN)
SKIPPED = {"cond": {3, 4, 7}, "uncond": {2, 7, 8}, "cond_uncond": {3, 4, 7}}
"""By branch, other steps each: what one branch keeps must not reach the other."""


def small(key: str, **changes: Any) -> Any:
    return tiny.defaults(
        key, **{"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 10, **changes}
    )


def target(key: str, **changes: Any) -> Target:
    pipeline = tiny.pipeline(key)
    pipeline.set_progress_bar_config(disable=True)
    return Target(pipeline, tiny.model(key), small(key, **changes))


def schedule(_steps: int, branch: str) -> frozenset[int]:
    return frozenset(SKIPPED[branch])


@pytest.mark.parametrize("key", KEYS)
def test_the_plain_loop_is_the_pipelines(key: str) -> None:
    t = target(key)
    assert torch.equal(plain.made(t.pipeline, t.configuration), plain.PLAIN[key](t.pipeline, t.configuration))


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("order", [0, 1])
class TestAgainstThePlainLoop:
    def test_the_same_latents_of_each_generation(self, key: str, order: int) -> None:
        t = target(key)
        change = extrapolated(t, schedule, order)
        try:
            first, second = (plain.made(t.pipeline, t.configuration) for _ in range(2))
            evidence = change.evidence()
        finally:
            change.undo()
        skipped = {branch: frozenset(steps) for branch, steps in SKIPPED.items()}
        run = plain.Extrapolating(skipped, order)
        expected = plain.PLAIN[key](t.pipeline, t.configuration, run)
        assert torch.equal(first, expected)
        assert torch.equal(second, expected)
        passes = len(branches(t.model, t.configuration))
        assert evidence["skipped_stack_calls"] == 2 * (10 * passes - run.runs)
        assert evidence["skipped_block_calls"] == 2 * evidence["skipped_stack_calls"]

    def test_undone_bit_for_bit(self, key: str, order: int) -> None:
        t = target(key)
        names, before = list(t.denoiser.state_dict()), plain.made(t.pipeline, t.configuration)
        change = extrapolated(t, schedule, order)
        between = plain.made(t.pipeline, t.configuration)
        change.undo()
        assert not torch.equal(between, before)
        assert torch.equal(plain.made(t.pipeline, t.configuration), before)
        assert list(t.denoiser.state_dict()) == names
        for owner, name in ((t.pipeline.scheduler, "step"), (t.denoiser, "cache_context")):
            assert name not in vars(owner)

    def test_a_generation_that_was_cut_or_given_up_leaves_nothing_behind(self, key: str, order: int) -> None:
        t = target(key)

        def cut(pipeline: Any, index: int, *_: Any) -> dict[str, Any]:
            pipeline._interrupt = index >= 5
            return {}

        def give_up(_pipeline: Any, index: int, *_: Any) -> dict[str, Any]:
            if index == 5:
                raise ZeroDivisionError
            return {}

        change = extrapolated(t, schedule, order)
        try:
            clean = plain.made(t.pipeline, t.configuration)
            plain.made(t.pipeline, t.configuration, callback_on_step_end=cut)
            after_cut = plain.made(t.pipeline, t.configuration)
            with pytest.raises(ZeroDivisionError):
                plain.made(t.pipeline, t.configuration, callback_on_step_end=give_up)
            after_error = plain.made(t.pipeline, t.configuration)
        finally:
            change.undo()
        assert torch.equal(after_cut, clean)
        assert torch.equal(after_error, clean)


class TestBlockStack:
    def test_nothing_is_kept_once_a_generation_is_over(self) -> None:
        t = target("tiny-wan")
        change = extrapolated(t, schedule, 1)
        try:
            (stack,) = t.denoiser.blocks
            seen: list[int] = []

            def look(_pipeline: Any, _index: int, *_: Any) -> dict[str, Any]:
                seen.append(len(stack._branches))
                return {}

            plain.made(t.pipeline, t.configuration, callback_on_step_end=look)
            assert seen == [2] * 9 + [0]
        finally:
            change.undo()

    def test_a_schedule_that_skips_nothing_is_bit_identical_and_its_evidence_zero(self) -> None:
        t = target("tiny-wan")
        before = plain.made(t.pipeline, t.configuration)
        change = extrapolated(t, lambda *_: frozenset(), 0)
        try:
            assert torch.equal(plain.made(t.pipeline, t.configuration), before)
            assert set(change.evidence().values()) == {0}
        finally:
            change.undo()

    def test_a_skip_with_nothing_to_repeat_is_computed(self) -> None:
        t = target("tiny-wan", num_inference_steps=2)
        before = plain.made(t.pipeline, t.configuration)
        change = extrapolated(t, lambda *_: frozenset({0}), 0)
        try:
            assert torch.equal(plain.made(t.pipeline, t.configuration), before)
            assert change.evidence()["skipped_stack_calls"] == 0
        finally:
            change.undo()

    def test_the_blocks_are_the_same_objects_and_compiled_ones_are_called_so(self) -> None:
        t = target("tiny-wan", num_inference_steps=4)
        blocks = list(t.denoiser.blocks)
        calls: list[int] = []
        for block in blocks:
            # what Module.compile sets: the call goes there instead of to forward
            block._compiled_call_impl = lambda *a, block=block, **k: (
                calls.append(1) or block._call_impl(*a, **k)
            )
        try:
            change = extrapolated(t, lambda *_: frozenset({2}), 0)
            assert list(blocks_of(t.denoiser)) == blocks
            plain.made(t.pipeline, t.configuration)
            change.undo()
        finally:
            for block in blocks:
                vars(block).pop("_compiled_call_impl", None)
        assert len(calls) == 2 * 3 * len(blocks)  # two branches, three of four steps
        assert list(t.denoiser.blocks) == blocks

    @pytest.mark.parametrize("key", KEYS)
    def test_blocks_compiled_as_whole_graphs_are_not_compiled_again(self, key: str) -> None:
        t = target(key, num_inference_steps=8)
        counters = torch._dynamo.utils.counters
        change = extrapolated(t, schedule, 1)
        try:
            eager = plain.made(t.pipeline, t.configuration)
            torch._dynamo.reset()
            counters.clear()
            for block in blocks_of(t.denoiser):
                block.compile(backend="aot_eager", fullgraph=True)
            first = plain.made(t.pipeline, t.configuration)
            graphs = counters["stats"]["unique_graphs"]
            second = plain.made(t.pipeline, t.configuration)
        finally:
            for block in blocks_of(t.denoiser):
                vars(block).pop("_compiled_call_impl", None)
            change.undo()
            torch._dynamo.reset()
        assert graphs > 0
        assert counters["stats"]["unique_graphs"] == graphs
        for found in (first, second):
            torch.testing.assert_close(found, eager)

    def test_a_second_one_is_refused_and_the_first_stays(self) -> None:
        t = target("tiny-wan")
        change = extrapolated(t, schedule, 0)
        try:
            with pytest.raises(UserError, match="cached already"):
                extrapolated(t, schedule, 0)
            assert isinstance(t.denoiser.blocks[0], BlockStack)
            assert isinstance(blocks_of(t.denoiser), torch.nn.ModuleList)
        finally:
            change.undo()

    def test_a_denoiser_without_a_list_of_blocks(self) -> None:
        with pytest.raises(UserError, match="Linear has no list of transformer blocks"):
            list_name(torch.nn.Linear(1, 1))

    def test_outside_a_pipeline_it_says_so(self) -> None:
        with pytest.raises(RuntimeError, match="follows no pipeline"):
            BlockStack(torch.nn.ModuleList(), schedule, 0)(1, 2)


class TestSeries:
    @pytest.mark.parametrize("order", [0, 1, 2])
    def test_a_polynomial_of_its_order_goes_on_exactly(self, order: int) -> None:
        # divided differences of a line are exact at any distance; with Σ fᵢ xⁱ / i! a parabola's are not (the
        # published series is no Newton interpolation), so order 2 is held against the formula itself
        def value(step: float) -> Any:
            return torch.tensor([[3.0 + (2.0 * step if order else 0.0)]], dtype=torch.float64)

        series = Series(order)
        for step in (0, 2, 5):
            series.add(step, value(step))
        base = torch.zeros(1, 1, dtype=torch.float64)
        assert float(series.added_to(base, 9)) == pytest.approx(float(value(9)))

    def test_second_order_is_the_published_formula(self) -> None:
        values = {0: 1.0, 1: 4.0, 3: 2.0}
        series = Series(2)
        for step, value in values.items():
            series.add(step, torch.tensor([[value]], dtype=torch.float64))
        first, last = (4.0 - 1.0) / 1, (2.0 - 4.0) / 2
        second = (last - first) / 2
        expected = 10 + 2.0 + last * 2 + second * 2**2 / 2
        assert float(series.added_to(torch.full((1, 1), 10.0, dtype=torch.float64), 5)) == pytest.approx(
            expected
        )

    def test_knows_nothing_at_first(self) -> None:
        assert not Series(1).known

    def test_of_a_batch_of_two_the_second_is_the_conditional_sample(self) -> None:
        kept = torch.tensor([[1.0], [2.0]])
        assert matching(kept, torch.zeros(1, 1)).tolist() == [[2.0]]
        assert matching(kept, torch.zeros(2, 1)) is kept


class TestNeeded:
    def test_the_last_computed_steps_before_each_gap(self) -> None:
        skipped = frozenset({3, 4, 7})
        assert needed(skipped, 10, 0) == {2, 6}
        assert needed(skipped, 10, 1) == {1, 2, 5, 6}
        assert needed(skipped, 10, 9) == {0, 1, 2, 5, 6}
        assert needed(frozenset(), 10, 1) == frozenset()


class TestClock:
    def test_steps_and_branches_as_the_pipeline_runs_them(self) -> None:
        t = target("tiny-wan", num_inference_steps=3)
        seen: list[Any] = []
        clock = Clock(t, begun=lambda: seen.append("begun"), stepped=lambda: seen.append(set(clock.branches)))
        original = t.denoiser.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            seen.append((clock.step, clock.steps, clock.branch, clock.timesteps[clock.step], clock.over))
            return original(*args, **kwargs)

        t.denoiser.forward = forward
        try:
            plain.made(t.pipeline, t.configuration)
        finally:
            del t.denoiser.forward
            clock.stop()
        times = t.pipeline.scheduler.timesteps.tolist()
        both = {"cond", "uncond"}
        assert seen == [
            "begun",
            *(
                entry
                for step in range(3)
                for entry in (
                    (step, 3, "cond", times[step], False),
                    (step, 3, "uncond", times[step], False),
                    both,
                )
            ),
        ]
        assert (clock.over, clock.branch, clock.branches) == (True, "", set())
        assert "set_timesteps" not in vars(t.pipeline.scheduler)
