"""Interventions are named, checked, applied for one measurement and undone, and what they do is seen."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, get_args

import pytest
import tiny
from generations import folder_with
from t2v_energy import interventions
from t2v_energy.config import configurations, load_accelerator, load_campaign
from t2v_energy.errors import UserError
from t2v_energy.interventions import InterventionError, applied, catalogue, check_fits, check_stack, named
from t2v_energy.interventions.base import Change, Effect, Intervention, Target, Work, WorkClass
from t2v_energy.prediction.forward import CLASSES

H200 = load_accelerator(tiny.ROOT, "h200")
NEVER = SimpleNamespace()  # a pipeline that nothing may touch
LOG: list[str] = []


class Noted(Intervention):
    """Writes down when it is applied and undone; ``marks`` are its evidence."""

    kind: ClassVar[str] = "noted"
    once: ClassVar[bool] = False
    text: str = "it"
    marks: float = 1.0

    def apply(self, target: Target) -> Change:
        if target.pipeline == "unfit" and self.text == "two":
            raise UserError(f"{self.text} does not fit")
        LOG.append(f"{self.text} on {target.pipeline}")
        return Change(lambda: LOG.append(f"{self.text} off"), lambda: {"marks": self.marks})

    def work_ratios(self, work: Work) -> Mapping[WorkClass, float]:
        return {"dense": 0.5, "attention": 0.8}


class Scheduled(Noted):
    """Depends on the step, and fits no video wider than high."""

    kind: ClassVar[str] = "scheduled"
    whole_schedule: ClassVar[bool] = True

    def check(self, model: Any, configuration: Any) -> None:
        if configuration.width > configuration.height:
            raise self.refused("it is too wide", "make it square")


@pytest.fixture(autouse=True)
def kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are kinds, as if their module lay in the package."""
    LOG.clear()
    module = ModuleType("noted")
    module.Noted, module.Scheduled = Noted, Scheduled  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "t2v_energy.interventions.noted", module)
    known = {**interventions.KINDS, "noted": "noted.Noted", "scheduled": "noted.Scheduled"}
    monkeypatch.setattr(interventions, "KINDS", known)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return folder_with(
        tmp_path,
        "one: {kind: noted, text: one}\n"
        "two: {kind: noted, text: two}\n"
        "idle: {kind: noted, text: idle, marks: 0}\n"
        "step-wise: {kind: scheduled}\n",
    )


def target(pipeline: Any = "pipeline") -> Target:
    return Target(pipeline, tiny.model(), tiny.configuration())


class TestApplied:
    def test_in_order_and_undone_in_the_reverse_one(self, root: Path) -> None:
        with applied(named(root, ("two", "one"), "x"), target()):
            assert LOG == ["two on pipeline", "one on pipeline"]
        assert LOG[2:] == ["one off", "two off"]

    def test_undone_after_an_error(self, root: Path) -> None:
        with pytest.raises(ZeroDivisionError), applied(named(root, ("one", "two"), "x"), target()):
            raise ZeroDivisionError
        assert LOG[2:] == ["two off", "one off"]

    def test_what_was_applied_before_one_that_does_not_fit_is_undone(self, root: Path) -> None:
        with (
            pytest.raises(UserError, match="two does not fit"),
            applied(named(root, ("one", "two"), "x"), target("unfit")),
        ):
            raise AssertionError("the body must not run")
        assert LOG == ["one on unfit", "one off"]

    def test_twice_is_refused_before_any_is_applied(self, root: Path) -> None:
        with (
            pytest.raises(UserError, match="one is listed twice") as caught,
            applied(named(root, ("one", "one"), "x"), target()),
        ):
            raise AssertionError("the body must not run")
        assert caught.value.remedy == "list it once"
        assert LOG == []

    def test_none_changes_nothing(self, root: Path) -> None:
        with applied([], target(NEVER)) as found:
            assert found.evidence() == {}
            found.check()
        assert LOG == []


class TestEvidence:
    def test_by_name(self, root: Path) -> None:
        with applied(named(root, ("one", "idle"), "x"), target()) as found:
            assert found.evidence() == {"one": {"marks": 1.0}, "idle": {"marks": 0.0}}

    def test_one_that_did_nothing_is_an_error(self, root: Path) -> None:
        with (
            applied(named(root, ("one", "idle"), "x"), target()) as found,
            pytest.raises(UserError, match=r"idle changed nothing \(marks = 0\)"),
        ):
            found.check()
        with applied(named(root, ("one",), "x"), target()) as found:
            found.check()


class TestNamed:
    def test_the_shipped_catalogue_has_every_kind(self) -> None:
        found = catalogue(tiny.ROOT)
        shipped = set(interventions.KINDS) - {"noted", "scheduled"}
        assert {entry.kind for entry in found.values()} == shipped
        assert [entry.name for entry in named(tiny.ROOT, ("vae-tiling",), "x")] == ["vae-tiling"]

    def test_settings_are_the_entrys(self, root: Path) -> None:
        (entry,) = named(root, ("two",), "x")
        assert entry.intervention == Noted(text="two")

    def test_the_nearest_is_suggested(self) -> None:
        with pytest.raises(UserError, match="there is no 'vae_tiling'") as caught:
            named(tiny.ROOT, ("vae-tiling", "vae_tiling"), "the place")
        assert caught.value.where == "the place"
        assert caught.value.remedy.startswith("did you mean 'vae-tiling'?")

    def test_or_all_are_listed_where_none_is_near(self, root: Path) -> None:
        with pytest.raises(UserError) as caught:
            named(root, ("zzz",), "x")
        assert caught.value.remedy == "known: one, two, idle, step-wise"

    @pytest.mark.parametrize(
        ("text", "what"),
        [
            ("one: {kind: nooted}", "kind: there is no 'nooted'"),
            ("one: {}", "kind: there is no None"),
            ("One: {kind: noted}", "'One' is not a name with settings"),
            ("one: noted", "'one' is not a name with settings"),
            ("one: {kind: noted, txt: a}", "txt"),
        ],
    )
    def test_a_wrong_entry(self, tmp_path: Path, text: str, what: str) -> None:
        with pytest.raises(UserError, match=what):
            named(folder_with(tmp_path, text), ("one",), "x")


class TestCheckFits:
    def test_a_refusal_says_which_entry(self, root: Path) -> None:
        wide = tiny.configuration(width=48, interventions=("step-wise",))
        with pytest.raises(UserError, match="scheduled: it is too wide") as caught:
            check_fits(root, tiny.model(), wide, H200, "full", "the place")
        assert (caught.value.where, caught.value.remedy) == ("the place, step-wise", "make it square")

    def test_what_depends_on_the_step_needs_whole_generations(self, root: Path) -> None:
        square = tiny.configuration(interventions=("step-wise",))
        check_fits(root, tiny.model(), square, H200, "full", "x")
        with pytest.raises(UserError, match="step-wise depends on the denoising step") as caught:
            check_fits(root, tiny.model(), square, H200, "sampled", "x")
        assert "protocol: full" in caught.value.remedy

    def test_what_the_accelerator_cannot_do(self) -> None:
        plain = tiny.configuration(interventions=("fp8",))
        check_fits(tiny.ROOT, tiny.model(), plain, H200, "sampled", "x")
        with pytest.raises(UserError, match="A100 SXM 80 GB does not multiply float8") as caught:
            check_fits(
                tiny.ROOT, tiny.model(), plain, load_accelerator(tiny.ROOT, "a100-sxm"), "sampled", "x"
            )
        assert caught.value.where == "x, fp8"


KV = "tome-3d-kv-r50-s2x3x3-all"
HIDDEN = "tome-3d-r50-s2x3x3-all"
ORDER = [
    ("layerwise-casting", "fused-qkv"),
    ("fp8", "fused-qkv"),
    ("int8", "fused-qkv"),
    (HIDDEN, "fused-qkv"),
    (KV, "fused-qkv"),
    ("compile", "layerwise-casting"),
    ("compile-autotuned", "layerwise-casting"),
    ("compile", "pab-2"),
    ("compile", HIDDEN),
]
"""The second cannot come after the first."""
APART = [
    ("taylorseer-2", "magcache-0.12-k2"),
    ("layerwise-casting", "fp8"),
    ("layerwise-casting", "int8"),
]
"""Refused in either order."""
ONE_KIND = [
    ("compile", "compile-autotuned"),
    ("magcache-0.06-k2", "magcache-0.12-k4"),
    ("taylorseer-2", "taylorseer-3"),
    ("pab-2", "pab-2-middle"),
    ("cfg-truncation-0.5", "cfg-truncation-0.8"),
    (HIDDEN, "tome-3d-r30-s2x3x3-all"),
]


class TestStacks:
    """Of the shipped entries; no pipeline and no torch is needed."""

    def refused(self, *names: str) -> UserError:
        with pytest.raises(UserError) as caught:
            check_stack(named(tiny.ROOT, names, "x"), "the place")
        assert caught.value.where == "the place"
        assert all(name in caught.value.what for name in (names[0], names[-1]))
        return caught.value

    @pytest.mark.parametrize("pair", ORDER, ids="-".join)
    def test_a_wrong_order(self, pair: tuple[str, str]) -> None:
        first, second = pair
        error = self.refused(first, "vae-channels-last", second)
        assert f"{second} cannot come after {first}: " in error.what
        assert error.remedy == f"list {second} before {first}, or leave one of them out"
        check_stack(named(tiny.ROOT, (second, "vae-channels-last", first), "x"), "the place")

    @pytest.mark.parametrize("pair", APART, ids="-".join)
    def test_two_that_do_not_go_together(self, pair: tuple[str, str]) -> None:
        for names in (pair, pair[::-1]):
            error = self.refused(*names)
            assert "do not go together: " in error.what
            assert error.remedy == "leave one of them out"

    @pytest.mark.parametrize("pair", ONE_KIND, ids="-".join)
    def test_two_of_one_kind(self, pair: tuple[str, str]) -> None:
        for names in (pair, pair[::-1]):
            assert "which is applied once" in self.refused(*names).what

    @pytest.mark.parametrize("name", catalogue(tiny.ROOT))
    def test_the_same_entry_twice(self, name: str) -> None:
        assert self.refused(name, name).what == f"{name} is listed twice"

    def test_every_kind_that_a_class_names_is_one(self) -> None:
        for kind in interventions.KINDS:
            found = interventions.class_of(kind)
            assert {*found.not_after, *found.not_with} <= set(interventions.KINDS)

    def test_when_the_plan_is_made(self, tmp_path: Path) -> None:
        root = tiny.make_root(
            tmp_path, experiments=tiny.resolution(fixed={
                "num_frames": 5, "num_inference_steps": 2, "interventions": ["compile", "layerwise-casting"]
            })
        )  # fmt: skip
        settings = tiny.settings(root)
        with pytest.raises(UserError, match="layerwise-casting cannot come after compile") as caught:
            configurations(root, settings, load_campaign(root, "tiny"), "resolution")
        assert "config/campaigns/tiny.yaml" in caught.value.where

    def test_when_they_are_applied(self) -> None:
        """Before the pipeline is touched: here there is none."""
        entries = named(tiny.ROOT, ("compile", "layerwise-casting"), "x")
        with (
            pytest.raises(InterventionError, match="layerwise-casting cannot come after compile"),
            applied(entries, target(NEVER)),
        ):
            raise AssertionError("the body must not run")


class TestEffect:
    def test_counted_amounts_and_expected_rates(self, tmp_path: Path) -> None:
        text = "one: {kind: noted, expected: {rate: {dense: 2}, power: {vae: 0.9}, source: a test}}"
        (entry,) = named(folder_with(tmp_path, text), ("one",), "x")
        effect = entry.intervention.effect(NEVER)  # type: ignore[arg-type]
        assert effect == Effect({"dense": 0.5, "attention": 0.8}, {"dense": 2.0}, {"vae": 0.9})

    def test_ratios_multiply(self) -> None:
        both = Effect({"dense": 0.5}, {"vae": 2.0}).then(Effect({"dense": 0.5, "text": 3.0}, {"vae": 1.5}))
        assert both == Effect({"dense": 0.25, "text": 3.0}, {"vae": 3.0})


def test_classes_of_work_are_the_cost_models() -> None:
    assert get_args(WorkClass) == CLASSES
