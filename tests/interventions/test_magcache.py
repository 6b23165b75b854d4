"""MagCache: the published schedule, on tiny pipelines as the plain loop has it, and the work that is left."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import tiny
from t2v_energy.config import Configuration, ModelFile
from t2v_energy.errors import UserError
from t2v_energy.interventions import Named, applied, catalogue
from t2v_energy.interventions.base import Target, Work
from t2v_energy.interventions.magcache import MagCache, interpolated, published, skipped_steps

WAN = ("wan2.1-t2v-1.3b", "wan2.1-t2v-14b")
SETTINGS = ((0.06, 2), (0.12, 2), (0.12, 4), (0.24, 6))
NUMBERS = {"wan2.1-t2v-1.3b": (23, 25, 29, 32), "wan2.1-t2v-14b": (22, 25, 29, 32)}


def model(key: str) -> ModelFile:
    return tiny.model(key)


def of(key: str, **changes: Any) -> Configuration:
    return tiny.defaults(key, **changes)


def quick(**changes: Any) -> MagCache:
    """Settings under which a tiny model's ten steps have skips, by the ratios of the 1.3B model."""
    values = {"threshold": 0.12, "max_skip_steps": 2, "ratios": "wan2.1-t2v-1.3b"}
    return MagCache(**{**values, **changes})


class TestSchedule:
    @pytest.mark.parametrize("key", WAN)
    @pytest.mark.parametrize("branch", ["cond", "uncond"])
    def test_numbers_of_skipped_steps(self, key: str, branch: str) -> None:
        found = tuple(
            len(MagCache(threshold=threshold, max_skip_steps=k).schedule(model(key), 50, branch))
            for threshold, k in SETTINGS
        )
        assert found == NUMBERS[key]

    def test_with_the_articles_smoothed_ratios(self) -> None:
        # its table 1: FLOP 3.94 and 3.11 of 8.21, which are 24 and 19 of 50 steps
        for k, left in ((2, 24), (4, 19)):
            skipped = MagCache(threshold=0.12, max_skip_steps=k, exponent=0.5).schedule(
                model(WAN[0]), 50, "cond"
            )
            assert 50 - len(skipped) == left
            assert left / 50 == pytest.approx({24: 3.94, 19: 3.11}[left] / 8.21, abs=0.002)

    def test_the_rule_by_hand(self) -> None:
        # from step 2 on; deviations 0.1; 0.1 + |1 − 0.81| = 0.29; then it is computed, and all starts again
        ratios = [1.0, 1.0, 0.9, 0.9, 0.9, 0.9]
        settings = {"threshold": 0.3, "retention_ratio": 0.34}
        assert skipped_steps(ratios, max_skip_steps=9, **settings) == {2, 3, 5}
        assert skipped_steps(ratios, max_skip_steps=1, **settings) == {2, 4}
        assert skipped_steps(ratios, max_skip_steps=9, threshold=0.05, retention_ratio=0.34) == frozenset()

    def test_retention_counts_calls_of_both_branches(self) -> None:
        ones = [1.0] * 5
        settings = {"threshold": 1.0, "max_skip_steps": 9, "retention_ratio": 0.5}  # 5 of 10 calls
        assert skipped_steps(ones, branch="cond", **settings) == {3, 4}
        assert skipped_steps(ones, branch="uncond", **settings) == {2, 3, 4}

    def test_the_first_step_is_never_skipped(self) -> None:
        assert skipped_steps([1.0] * 3, threshold=1, max_skip_steps=9, retention_ratio=0.01) == {1, 2}

    def test_ratios_of_other_numbers_of_steps_are_the_nearest(self) -> None:
        numpy = pytest.importorskip("numpy")
        for steps in (2, 10, 33, 50, 64):
            places = numpy.round(numpy.arange(steps) * (49 / (steps - 1))).astype(int)
            assert interpolated(list(range(50)), steps) == places.tolist()
        assert interpolated([0.5, 0.7], 1) == [0.7]

    def test_the_data_name_their_source_and_have_each_step_of_each_branch(self) -> None:
        data = published()
        assert len(data["source"]["commit"]) == 40
        for branches in data["ratios"].values():
            assert {name: len(values) for name, values in branches.items()} == {"cond": 50, "uncond": 50}
            assert all(values[0] == 1 and min(values) > 0.8 for values in branches.values())

    def test_entries_of_the_catalogue(self) -> None:
        found = {
            name: tuple(len(cache.schedule(model(key), 50, "cond")) for key in WAN)
            for name, cache in catalogue(tiny.ROOT).items()
            if isinstance(cache, MagCache)
        }
        assert found == {
            "magcache-0.06-k2": (23, 22),
            "magcache-0.12-k2": (25, 25),
            "magcache-0.12-k4": (29, 29),
            "magcache-0.24-k6": (32, 32),
            "magcache-0.12-k4-article": (31, 31),
        }


class TestCheck:
    def test_fits_the_published_models(self) -> None:
        for key in WAN:
            MagCache(threshold=0.12, max_skip_steps=2).check(model(key), of(key))

    @pytest.mark.parametrize("key", ["cogvideox-2b", "mochi-1-preview", "animatediff-lightning"])
    def test_others_are_refused(self, key: str) -> None:
        with pytest.raises(UserError, match=f"magcache: there are no published ratios for {key}"):
            quick().check(model(key), of(key))

    def test_a_wan_without_ratios_is_told_which_there_are(self) -> None:
        with pytest.raises(UserError, match="no published ratios for tiny-wan") as caught:
            quick(ratios=None).check(model("tiny-wan"), of("tiny-wan"))
        assert caught.value.remedy == "give `ratios`: wan2.1-t2v-1.3b or wan2.1-t2v-14b"

    @pytest.mark.parametrize(("changes", "steps"), [({"threshold": 0.0}, 50), ({}, 2)])
    def test_what_skips_nothing_is_refused_beforehand(self, changes: dict[str, float], steps: int) -> None:
        with pytest.raises(UserError, match=f"no step of {steps} is skipped"):
            quick(**changes).check(model(WAN[0]), of(WAN[0], num_inference_steps=steps))

    def test_needs_no_torch(self) -> None:
        code = (
            "import sys; from pathlib import Path; from t2v_energy.interventions import catalogue;"
            f"catalogue(Path({str(tiny.ROOT)!r})); sys.exit('torch' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestOnATinyPipeline:
    @pytest.fixture
    def target(self) -> Target:
        pytest.importorskip("torch")
        pipeline = tiny.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        sizes = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 12}
        return Target(pipeline, model("tiny-wan"), of("tiny-wan", **sizes))

    def test_as_the_plain_loop_has_it_and_undone(self, target: Target) -> None:
        import plain_denoising as plain
        import torch

        cache = quick(threshold=0.2, max_skip_steps=3)
        schedules = {b: cache.schedule(target.model, 12, b) for b in ("cond", "uncond")}
        assert all(schedules.values())
        before = plain.made(target.pipeline, target.configuration)
        with applied([Named("m", cache)], target) as changes:
            found = plain.made(target.pipeline, target.configuration)
            changes.check()
            evidence = changes.evidence()["m"]
        expected = plain.wan(target.pipeline, target.configuration, plain.Extrapolating(schedules))
        assert torch.equal(found, expected)
        assert evidence["skipped_stack_calls"] == sum(map(len, schedules.values()))
        assert torch.equal(plain.made(target.pipeline, target.configuration), before)

    @pytest.mark.parametrize(("threshold", "steps"), [(0.0, 12), (0.12, 2)])
    def test_where_nothing_is_skipped_the_evidence_is_an_error(
        self, target: Target, threshold: float, steps: int
    ) -> None:
        import plain_denoising as plain
        import torch

        c = target.configuration.model_copy(update={"num_inference_steps": steps})
        before = plain.made(target.pipeline, c)
        with applied([Named("m", quick(threshold=threshold))], target) as changes:
            assert torch.equal(plain.made(target.pipeline, c), before)
            with pytest.raises(UserError, match="m changed nothing"):
                changes.check()

    def test_with_tiles_and_an_end_of_guidance(self, target: Target) -> None:
        import plain_denoising as plain
        import torch
        from t2v_energy.interventions.cfg_truncation import CfgTruncation
        from t2v_energy.interventions.vae_tiling import VaeTiling

        cache, c = quick(threshold=0.2, max_skip_steps=3), target.configuration
        entries = [Named("t", VaeTiling()), Named("m", cache), Named("g", CfgTruncation(fraction=0.5))]
        schedules = {b: cache.schedule(target.model, 12, b) for b in ("cond", "uncond")}
        before = plain.made(target.pipeline, c)
        with applied(entries, target) as changes:
            found = plain.made(target.pipeline, c)
            evidence = changes.evidence()
        expected = plain.wan(target.pipeline, c, plain.Extrapolating(schedules), guided=6)
        assert torch.equal(found, expected)
        skipped = len(schedules["cond"]) + len({s for s in schedules["uncond"] if s < 6})
        assert evidence["m"]["skipped_stack_calls"] == skipped
        assert evidence["g"]["omitted_passes"] == 6
        assert torch.equal(plain.made(target.pipeline, c), before)


class TestWork:
    def test_attention_is_the_share_of_steps_that_run(self) -> None:
        for (threshold, k), number in zip(SETTINGS, NUMBERS[WAN[0]], strict=True):
            cache = MagCache(threshold=threshold, max_skip_steps=k)
            ratios = cache.work_ratios(Work(model(WAN[0]), of(WAN[0]), None))  # type: ignore[arg-type]
            assert ratios["attention"] == pytest.approx(1 - number / 50)
            assert 0 < ratios["dense"] - ratios["attention"] < 1e-3  # embeddings always run
            assert 0 < ratios["traffic"] - ratios["attention"] < 0.01

    def test_against_a_counter_on_a_tiny_pipeline(self) -> None:
        torch = pytest.importorskip("torch")
        from counted import loop_flop

        key = "tiny-wan"
        c = of(key, height=32, width=32, num_frames=5, num_inference_steps=12)
        target = Target(tiny.pipeline(key), model(key), c)
        cache = quick(threshold=0.2, max_skip_steps=3)
        whole = loop_flop(target)
        change = cache.apply(target)
        try:
            less = loop_flop(target)
        finally:
            change.undo()
        ratios = cache.work_ratios(Work(target.model, c, None))  # type: ignore[arg-type]
        assert less.attention / whole.attention == pytest.approx(ratios["attention"], rel=1e-6)
        assert less.dense / whole.dense == pytest.approx(ratios["dense"], rel=1e-6)
        assert torch is not None
