"""Attention outputs that are replayed in the middle of the schedule, each branch for itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
from t2v_energy.errors import UserError
from t2v_energy.interventions import Named, applied
from t2v_energy.interventions.base import Target, Work
from t2v_energy.interventions.pyramid_attention_broadcast import PyramidAttentionBroadcast, replays
from t2v_energy.interventions.timesteps import timesteps

KEYS = ("tiny-wan", "tiny-cogvideox")
WIDE = (100.0, 990.0)


def target(key: str, steps: int = 8) -> Target:
    pipeline = tiny.pipeline(key)
    pipeline.set_progress_bar_config(disable=True)
    sizes = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": steps}
    return Target(pipeline, tiny.model(key), tiny.defaults(key, **sizes))


class TestTimesteps:
    @pytest.mark.parametrize("key", KEYS)
    @pytest.mark.parametrize("steps", [1, 4, 10, 33, 50])
    def test_are_the_schedulers(self, key: str, steps: int) -> None:
        pytest.importorskip("torch")
        scheduler = tiny.pipeline(key).scheduler
        scheduler.set_timesteps(steps)
        assert timesteps(tiny.model(key), steps) == scheduler.timesteps.tolist()

    def test_another_scheduler_is_refused(self) -> None:
        with pytest.raises(UserError, match="timesteps of FlowMatchEulerDiscreteScheduler are not known"):
            timesteps(tiny.model("mochi-1-preview"), 4)


class TestRule:
    def test_every_nth_step_is_computed_and_all_outside_the_range(self) -> None:
        assert [replays(step, 500, 3, (100, 800)) for step in range(7)] == [0, 1, 1, 0, 1, 1, 0]
        assert [replays(1, t, 2, (100, 800)) for t in (100, 101, 799, 800)] == [False, True, True, False]

    def test_shares_of_the_published_setting(self) -> None:
        # CogVideoX's timesteps are even, 999 to 19: steps 10 to 44 lie between, 17 of them odd; Wan's shifted
        # ones are above 800 until step 27 and below 100 at the last: 10 odd steps
        broadcast = PyramidAttentionBroadcast()
        shares = {
            key: broadcast._shares(tiny.model(key), 50)["attn1"]
            for key in ("cogvideox-2b", "wan2.1-t2v-1.3b")
        }
        assert shares == {"cogvideox-2b": 0.34, "wan2.1-t2v-1.3b": 0.2}


class TestCheck:
    @pytest.mark.parametrize("key", ["wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "cogvideox-2b", "cogvideox-5b"])
    def test_fits(self, key: str) -> None:
        PyramidAttentionBroadcast().check(tiny.model(key), tiny.defaults(key))

    @pytest.mark.parametrize("key", ["mochi-1-preview", "ltx-video-0.9.7-dev", "animatediff-lightning"])
    def test_others_are_refused(self, key: str) -> None:
        with pytest.raises(UserError, match=f"pyramid-attention-broadcast: it is not made for {key}"):
            PyramidAttentionBroadcast().check(tiny.model(key), tiny.defaults(key))

    def test_cross_attention_where_there_is_none(self) -> None:
        with pytest.raises(UserError, match="cogvideox-2b has no cross-attention"):
            PyramidAttentionBroadcast(cross_range=2).check(
                tiny.model("cogvideox-2b"), tiny.defaults("cogvideox-2b")
            )

    @pytest.mark.parametrize("changes", [{"self_range": 1}, {"timesteps": (100, 101)}])
    def test_nothing_replayed(self, changes: dict[str, Any]) -> None:
        with pytest.raises(UserError, match="nothing is replayed in 50 steps"):
            PyramidAttentionBroadcast(**changes).check(
                tiny.model("wan2.1-t2v-1.3b"), tiny.defaults("wan2.1-t2v-1.3b")
            )


@contextmanager
def plainly_replayed(t: Target, ranges: dict[str, int]) -> Iterator[Any]:
    """Attention modules that replay, by a dictionary; yields what says which step and branch it is."""
    kept: dict[Any, Any] = {}
    now: dict[str, Any] = {}
    times = timesteps(t.model, t.configuration.num_inference_steps)
    blocks = t.denoiser.blocks if hasattr(t.denoiser, "blocks") else t.denoiser.transformer_blocks
    modules = [(getattr(block, name), n) for block in blocks for name, n in ranges.items()]

    def replaying(module: Any, n: int) -> Any:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            place, step = (id(module), now["branch"]), now["step"]
            if step % n and WIDE[0] < times[step] < WIDE[1]:
                return kept[place]
            kept[place] = original(*args, **kwargs)
            return kept[place]

        return forward

    for module, n in modules:
        module.forward = replaying(module, n)

    def run(step: int, branch: str, tokens: Any, all_blocks: Any) -> Any:
        now.update(step=step, branch=branch)
        return all_blocks(tokens)

    try:
        yield run
    finally:
        for module, _ in modules:
            del module.forward


@pytest.mark.parametrize(
    ("key", "settings", "ranges"),
    [
        ("tiny-wan", {"self_range": 2}, {"attn1": 2}),
        ("tiny-wan", {"self_range": 2, "cross_range": 3}, {"attn1": 2, "attn2": 3}),
        ("tiny-wan", {"self_range": 1, "cross_range": 4}, {"attn2": 4}),
        ("tiny-cogvideox", {"self_range": 3}, {"attn1": 3}),
    ],
)
class TestOnATinyPipeline:
    def test_as_the_plain_loop_has_it(
        self, key: str, settings: dict[str, int], ranges: dict[str, int]
    ) -> None:
        torch = pytest.importorskip("torch")
        import plain_denoising as plain

        t = target(key)
        before = plain.made(t.pipeline, t.configuration)
        broadcast = PyramidAttentionBroadcast(timesteps=WIDE, **settings)
        with applied([Named("p", broadcast)], t) as changes:
            first, second = (plain.made(t.pipeline, t.configuration) for _ in range(2))
            changes.check()
            (count,) = changes.evidence()["p"].values()
        with plainly_replayed(t, ranges) as run:
            expected = plain.PLAIN[key](t.pipeline, t.configuration, run)
        assert torch.equal(first, expected)
        assert torch.equal(second, expected)
        assert not torch.equal(first, before)
        assert torch.equal(plain.made(t.pipeline, t.configuration), before)
        shares = broadcast._shares(t.model, 8)
        passes = 2 if key == "tiny-wan" else 1
        assert count == 2 * passes * 2 * 8 * sum(shares.values())  # generations, passes, blocks, steps

    def test_work_against_a_counter(self, key: str, settings: dict[str, int], ranges: dict[str, int]) -> None:
        pytest.importorskip("torch")
        from counted import loop_flop

        t, broadcast = target(key), PyramidAttentionBroadcast(timesteps=WIDE, **settings)
        whole = loop_flop(t)
        change = broadcast.apply(t)
        try:
            less = loop_flop(t)
        finally:
            change.undo()
        ratios = broadcast.work_ratios(Work(t.model, t.configuration, None))  # type: ignore[arg-type]
        assert less.attention / whole.attention == pytest.approx(ratios["attention"], rel=1e-6)
        assert less.dense / whole.dense == pytest.approx(ratios["dense"], rel=1e-6)


class TestMemory:
    def test_a_cut_generation_is_forgotten_and_so_is_a_finished_one(self) -> None:
        torch = pytest.importorskip("torch")
        import plain_denoising as plain

        def cut(pipeline: Any, index: int, *_: Any) -> dict[str, Any]:
            pipeline._interrupt = index >= 4
            return {}

        t = target("tiny-wan")
        with applied([Named("p", PyramidAttentionBroadcast(timesteps=WIDE))], t):
            clean = plain.made(t.pipeline, t.configuration)
            plain.made(t.pipeline, t.configuration, callback_on_step_end=cut)
            assert torch.equal(plain.made(t.pipeline, t.configuration), clean)

    def test_with_a_stack_in_the_blocks_place(self) -> None:
        torch = pytest.importorskip("torch")
        import plain_denoising as plain
        from t2v_energy.interventions.taylorseer import TaylorSeer

        t = target("tiny-wan")
        entries = [
            Named("t", TaylorSeer(interval=2, first_steps=5)),
            Named("p", PyramidAttentionBroadcast(timesteps=WIDE)),
        ]
        before = plain.made(t.pipeline, t.configuration)
        with applied(entries, t) as changes:
            plain.made(t.pipeline, t.configuration)
            changes.check()
        assert torch.equal(plain.made(t.pipeline, t.configuration), before)

    def test_its_module_is_left_out_of_compiled_graphs(self) -> None:
        torch = pytest.importorskip("torch")
        t = target("tiny-wan")
        with applied([Named("p", PyramidAttentionBroadcast(timesteps=WIDE))], t):
            assert torch._dynamo.eval_frame.innermost_fn(t.denoiser.blocks[0].attn1.forward) is not None
            assert t.denoiser.blocks[0].attn1.forward._torchdynamo_disable
