"""What several interventions leave of the denoiser's calls, against torch's counter on real generations."""

from __future__ import annotations

import shutil
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from generations import work_of
from t2v_energy.config import load_settings
from t2v_energy.interventions import Named, applied, catalogue, stack_effect
from t2v_energy.interventions.base import Intervention, Target, Work
from t2v_energy.interventions.call_work import ratios_by_call
from t2v_energy.interventions.cfg_truncation import CfgTruncation
from t2v_energy.interventions.magcache import MagCache
from t2v_energy.interventions.pyramid_attention_broadcast import PyramidAttentionBroadcast
from t2v_energy.interventions.taylorseer import TaylorSeer
from t2v_energy.interventions.token_merging import TokenMerging
from t2v_energy.prediction.features import Point, features
from t2v_energy.prediction.registered import FOLDER, prediction_file, register

STEPS = 12
TRUNCATED = CfgTruncation(fraction=0.5)
CACHED = TaylorSeer(interval=3, first_steps=2)
REPEATED = MagCache(threshold=0.2, max_skip_steps=3, ratios="wan2.1-t2v-1.3b")
BROADCAST = PyramidAttentionBroadcast(timesteps=(100.0, 990.0), self_range=3)
MERGED = TokenMerging(ratio=0.5, stride=(1, 2, 2), match_every=4)
STACKS: dict[str, tuple[Intervention, ...]] = {
    "cache and truncation": (CACHED, TRUNCATED),
    "magcache and truncation": (REPEATED, TRUNCATED),
    "broadcast and truncation": (BROADCAST, TRUNCATED),
    "cache and broadcast": (CACHED, BROADCAST),
    "merging and truncation": (MERGED, TRUNCATED),
    "merging and cache": (MERGED, CACHED),
    "merging and broadcast": (MERGED, BROADCAST),
    "all": (MERGED, BROADCAST, CACHED, TRUNCATED),
}


def target(key: str) -> Target:
    pipeline = tiny.pipeline(key)
    pipeline.set_progress_bar_config(disable=True)
    sizes = {"height": 64, "width": 48, "num_frames": 13, "num_inference_steps": STEPS}
    return Target(pipeline, tiny.model(key), tiny.defaults(key, **sizes))


def work(t: Target) -> Work:
    c = t.configuration
    return Work(t.model, c, features(tiny.ROOT, [Point(c.model, c.height, c.width, c.num_frames, STEPS)]))


@pytest.mark.parametrize("key", ["tiny-wan", "tiny-cogvideox"])
@pytest.mark.parametrize("stack", STACKS)
def test_flop_of_a_stack_are_those_that_are_counted(key: str, stack: str) -> None:
    pytest.importorskip("torch")
    from counted import loop_flop

    if REPEATED in STACKS[stack] and key != "tiny-wan":
        pytest.skip("published ratios are Wan's")
    t, stacked = target(key), STACKS[stack]
    whole = loop_flop(t)
    with applied([Named(one.kind, one) for one in stacked], t) as changes:
        less = loop_flop(t)
        changes.check()
    amount = stack_effect(stacked, work(t)).amount
    assert less.attention / whole.attention == pytest.approx(amount["attention"], rel=1e-9)
    assert less.dense / whole.dense == pytest.approx(amount["dense"], rel=1e-9)


def test_such_ratios_do_not_multiply() -> None:
    """Calls without a prompt that are left out have no blocks that a cache could leave out."""
    w = work(target("tiny-wan"))
    stacked, guided = (CACHED, CfgTruncation(fraction=0.25)), STEPS // 4
    alone = [one.work_ratios(w)["attention"] for one in stacked]
    together = stack_effect(stacked, w).amount["attention"]
    skipped = CACHED.schedule(STEPS, "cond")
    run = STEPS - len(skipped) + guided - len([step for step in skipped if step < guided])
    assert together == pytest.approx(run / (2 * STEPS), rel=1e-12)
    assert abs(together / (alone[0] * alone[1]) - 1) > 0.01


@pytest.mark.parametrize("stack", STACKS)
def test_the_order_of_the_list_is_no_matter(stack: str) -> None:
    w = work_of("wan2.1-t2v-1.3b", 480, 832, 81)
    amounts = [stack_effect(order, w).amount for order in permutations(STACKS[stack])]
    for name in ("attention", "dense", "traffic", "call"):
        assert {round(amount[name], 12) for amount in amounts} == {round(amounts[0][name], 12)}
    assert all(0 < amounts[0][name] < 1 for name in ("attention", "dense"))


@pytest.mark.parametrize("size", [("wan2.1-t2v-1.3b", 480, 832, 81), ("cogvideox-2b", 480, 720, 45)])
@pytest.mark.parametrize("settings", [{}, {"match_every": 5}, {"mode": "kv", "every": 2}], ids=str)
def test_merging_alone_is_as_its_own_closed_form(
    size: tuple[str, int, int, int], settings: dict[str, Any]
) -> None:
    w, merged = work_of(*size), TokenMerging(ratio=0.5, stride=(2, 3, 3), **settings)
    own = merged.work_ratios(w)
    assert {name: ratios_by_call(w, [merged])[name] for name in own} == pytest.approx(own, rel=1e-9)


def test_no_prediction_that_is_committed_is_of_such_a_stack() -> None:
    """They were written when ratios of all stacks were multiplied, and must stay as they are."""
    known = catalogue(tiny.ROOT)
    ids = [
        line.partition(",")[0]
        for path in sorted((tiny.ROOT / FOLDER).rglob("*.csv"))
        for line in path.read_text(encoding="utf-8").splitlines()[1:]
    ]
    stacks = [[known[name] for name in key.split("__")[-1].split("+") if name in known] for key in ids]
    assert max(len(stack) for stack in stacks) == 5
    assert all(sum(one.call_order is not None for one in stack) <= 1 for stack in stacks)


@pytest.mark.parametrize("experiment", ["interventions", "token-merging"])
def test_committed_predictions_are_made_again_to_the_byte(tmp_path: Path, experiment: str) -> None:
    shutil.copytree(tiny.ROOT / "config", tmp_path / "config")
    path = tmp_path / "config" / "campaigns" / "h200.yaml"
    campaign = yaml.safe_load(path.read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump(campaign | {"experiments": {experiment: {}}}), encoding="utf-8")
    made = register(tmp_path, load_settings(tmp_path, {"campaign": "h200"}), experiment)
    committed = (tiny.ROOT / prediction_file("h200", experiment)).read_text(encoding="utf-8")
    assert set(committed.splitlines()) <= set(made.splitlines())  # what is listed since may be beside them
