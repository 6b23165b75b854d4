"""TaylorSeer on a static interval, applied to the residual of the block stack."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
from t2v_energy.errors import UserError
from t2v_energy.interventions import Named, applied
from t2v_energy.interventions.base import Target, Work
from t2v_energy.interventions.taylorseer import TaylorSeer, skipped_steps

KEYS = ("tiny-wan", "tiny-cogvideox")


def target(key: str, steps: int = 10) -> Target:
    pipeline = tiny.pipeline(key)
    pipeline.set_progress_bar_config(disable=True)
    sizes = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": steps}
    return Target(pipeline, tiny.model(key), tiny.defaults(key, **sizes))


class TestSchedule:
    def test_first_steps_then_one_of_each_interval_and_the_last(self) -> None:
        assert skipped_steps(10, 3, 3) == {3, 4, 6, 7}  # 5 and 8 are computed, and 9 is the last
        assert skipped_steps(10, 2, 1) == {1, 3, 5, 7}
        assert skipped_steps(4, 5, 3) == frozenset()

    @pytest.mark.parametrize(("interval", "number"), [(2, 23), (3, 31), (5, 37)])
    def test_of_fifty_steps(self, interval: int, number: int) -> None:
        assert len(skipped_steps(50, interval, 3)) == number


class TestCheck:
    @pytest.mark.parametrize("key", ["wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "cogvideox-2b", "cogvideox-5b"])
    def test_fits(self, key: str) -> None:
        TaylorSeer(interval=2).check(tiny.model(key), tiny.defaults(key))

    @pytest.mark.parametrize("key", ["mochi-1-preview", "ltx-video-0.9.7-dev", "animatediff-lightning"])
    def test_others_are_refused(self, key: str) -> None:
        with pytest.raises(UserError, match=f"taylorseer: it is not made for {key}"):
            TaylorSeer(interval=2).check(tiny.model(key), tiny.defaults(key))

    def test_so_it_is_when_it_is_applied(self) -> None:
        with pytest.raises(UserError, match="not made for tiny-mochi"):
            TaylorSeer(interval=2).apply(Target(None, tiny.model("tiny-mochi"), tiny.defaults("tiny-mochi")))

    def test_a_schedule_too_short(self) -> None:
        with pytest.raises(UserError, match="no step of 4 is skipped after the first 3"):
            TaylorSeer(interval=2).check(tiny.model(), tiny.defaults("tiny-wan"))


@pytest.mark.parametrize("key", KEYS)
def test_as_the_plain_loop_has_it(key: str) -> None:
    torch = pytest.importorskip("torch")
    import plain_denoising as plain

    t, cache = target(key), TaylorSeer(interval=3)
    schedules = dict.fromkeys(("cond", "uncond", "cond_uncond"), skipped_steps(10, 3, 3))
    before = plain.made(t.pipeline, t.configuration)
    with applied([Named("t", cache)], t) as changes:
        found = plain.made(t.pipeline, t.configuration)
        changes.check()
    assert torch.equal(
        found, plain.PLAIN[key](t.pipeline, t.configuration, plain.Extrapolating(schedules, 1))
    )
    assert torch.equal(plain.made(t.pipeline, t.configuration), before)


@pytest.mark.parametrize("key", KEYS)
def test_work_against_a_counter(key: str) -> None:
    pytest.importorskip("torch")
    from counted import loop_flop

    t, cache = target(key), TaylorSeer(interval=3, order=2)
    whole = loop_flop(t)
    change = cache.apply(t)
    try:
        less = loop_flop(t)
    finally:
        change.undo()
    ratios: Any = cache.work_ratios(Work(t.model, t.configuration, None))  # type: ignore[arg-type]
    assert less.attention / whole.attention == pytest.approx(ratios["attention"], rel=1e-6)
    assert less.dense / whole.dense == pytest.approx(ratios["dense"], rel=1e-6)


def test_traffic_of_keeping_differences_grows_with_the_order() -> None:
    model, c = tiny.model("wan2.1-t2v-1.3b"), tiny.defaults("wan2.1-t2v-1.3b")
    traffic = [
        TaylorSeer(interval=2, order=order).work_ratios(Work(model, c, None))["traffic"]  # type: ignore[arg-type]
        for order in (0, 1, 2)
    ]
    assert 0.54 < traffic[0] < traffic[1] < traffic[2] < 0.55
