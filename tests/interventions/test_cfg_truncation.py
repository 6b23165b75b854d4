"""Guidance that ends after a fraction of the steps."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
from t2v_energy.errors import UserError
from t2v_energy.interventions import Named, applied
from t2v_energy.interventions.base import Target, Work
from t2v_energy.interventions.cfg_truncation import CfgTruncation, guided_steps

KEYS = ("tiny-wan", "tiny-cogvideox")


def target(key: str, **changes: Any) -> Target:
    pipeline = tiny.pipeline(key)
    pipeline.set_progress_bar_config(disable=True)
    sizes = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 8}
    return Target(pipeline, tiny.model(key), tiny.defaults(key, **sizes, **changes))


class TestGuidedSteps:
    @pytest.mark.parametrize(
        ("steps", "fraction", "guided"),
        [(50, 0.5, 25), (50, 0.8, 40), (10, 0.7, 7), (7, 0.5, 4), (50, 0.001, 1)],
    )
    def test_at_least_the_fraction(self, steps: int, fraction: float, guided: int) -> None:
        assert guided_steps(steps, fraction) == guided


class TestCheck:
    @pytest.mark.parametrize("key", ["wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "cogvideox-2b", "cogvideox-5b"])
    def test_fits(self, key: str) -> None:
        CfgTruncation(fraction=0.5).check(tiny.model(key), tiny.defaults(key))

    def test_other_pipelines_are_refused(self) -> None:
        key = "animatediff-lightning"
        with pytest.raises(UserError, match=f"cfg-truncation: it is not made for {key}"):
            CfgTruncation(fraction=0.5).check(tiny.model(key), tiny.defaults(key))
        with pytest.raises(UserError, match="not made for tiny-mochi"):
            CfgTruncation(fraction=0.5).apply(
                Target(None, tiny.model("tiny-mochi"), tiny.defaults("tiny-mochi"))
            )

    def test_no_guidance_to_end(self) -> None:
        with pytest.raises(UserError, match="a guidance scale of 1 guides no step"):
            CfgTruncation(fraction=0.5).check(tiny.model(), tiny.defaults("tiny-wan", guidance_scale=1.0))

    def test_every_step_guided(self) -> None:
        with pytest.raises(UserError, match=r"all of 4 steps are guided with fraction 0\.9"):
            CfgTruncation(fraction=0.9).check(tiny.model(), tiny.defaults("tiny-wan"))


@pytest.mark.parametrize("key", KEYS)
class TestOnATinyPipeline:
    def test_as_the_plain_loop_has_it_in_each_generation(self, key: str) -> None:
        torch = pytest.importorskip("torch")
        import plain_denoising as plain

        t = target(key)
        before = plain.made(t.pipeline, t.configuration)
        with applied([Named("g", CfgTruncation(fraction=0.4))], t) as changes:
            first, second = (plain.made(t.pipeline, t.configuration) for _ in range(2))
            changes.check()
            assert changes.evidence()["g"] == {"omitted_passes": 8.0}  # 4 guided steps of 8, twice
        expected = plain.PLAIN[key](t.pipeline, t.configuration, guided=4)
        assert torch.equal(first, expected)
        assert torch.equal(second, expected)
        assert not torch.equal(first, before)
        assert torch.equal(plain.made(t.pipeline, t.configuration), before)
        assert "forward" not in vars(t.denoiser)

    def test_a_generation_cut_while_unguided_leaves_the_next_one_guided(self, key: str) -> None:
        torch = pytest.importorskip("torch")
        import plain_denoising as plain

        t = target(key)

        def cut(pipeline: Any, index: int, *_: Any) -> dict[str, Any]:
            pipeline._interrupt = index >= 5
            return {}

        with applied([Named("g", CfgTruncation(fraction=0.5))], t):
            plain.made(t.pipeline, t.configuration, callback_on_step_end=cut)
            after = plain.made(t.pipeline, t.configuration)
        assert torch.equal(after, plain.PLAIN[key](t.pipeline, t.configuration, guided=4))

    def test_work_against_a_counter(self, key: str) -> None:
        pytest.importorskip("torch")
        from counted import loop_flop

        t, truncation = target(key), CfgTruncation(fraction=0.5)
        whole = loop_flop(t)
        change = truncation.apply(t)
        try:
            less = loop_flop(t)
        finally:
            change.undo()
        ratios = truncation.work_ratios(Work(t.model, t.configuration, None))  # type: ignore[arg-type]
        assert less.attention / whole.attention == pytest.approx(ratios["attention"], rel=1e-6)
        assert less.dense / whole.dense == pytest.approx(ratios["dense"], rel=1e-6)
        assert ratios["call"] == (0.75 if key == "tiny-wan" else 1)  # a smaller batch is as many calls

    def test_with_a_cache_of_the_stack_in_either_order(self, key: str) -> None:
        torch = pytest.importorskip("torch")
        import plain_denoising as plain
        from t2v_energy.interventions.taylorseer import TaylorSeer, skipped_steps

        # the batch of two becomes one right where step 4 is skipped: what is kept has two samples
        t = target(key)
        entries = [
            Named("t", TaylorSeer(interval=3, first_steps=2)),
            Named("g", CfgTruncation(fraction=0.375)),
        ]
        skipped = skipped_steps(8, 3, 2)
        assert guided_steps(8, 0.375) in skipped
        schedules = dict.fromkeys(("cond", "uncond", "cond_uncond"), skipped)
        found = []
        for order in (entries, entries[::-1]):
            with applied(order, t) as changes:
                found.append(plain.made(t.pipeline, t.configuration))
                changes.check()
        assert torch.equal(*found)
        if key == "tiny-wan":
            run = plain.Extrapolating(schedules, 1)
            assert torch.equal(found[0], plain.wan(t.pipeline, t.configuration, run, guided=3))


def test_a_pipeline_that_guides_nothing_is_seen() -> None:
    pytest.importorskip("torch")
    import plain_denoising as plain

    t = target("tiny-cogvideox", guidance_scale=1.0)
    with applied([Named("g", CfgTruncation(fraction=0.5))], t) as changes:
        plain.made(t.pipeline, t.configuration)
        with pytest.raises(UserError, match="g changed nothing"):
            changes.check()
