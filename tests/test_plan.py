"""The plan: batches, their names, the random order of each pass, and what the command prints."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
from t2v_energy import cli
from t2v_energy.config import (
    ProtocolSettings,
    configurations,
    load_campaign,
    load_experiment,
    load_model,
)
from t2v_energy.errors import UserError
from t2v_energy.plan import Item, Plan, make_plan, raw_folder
from t2v_energy.prediction import Point, predict_measurement_s, predict_points, shipped_calibration

SIZES = [{"height": 16 * i, "width": 16 * i} for i in range(2, 10)]
OTHER = tiny.resolution()["resolution"] | {"vary": SIZES[:2]}


def h200(**overrides: Any) -> Plan:
    return make_plan(tiny.ROOT, tiny.settings(tiny.ROOT, campaign="h200", **overrides))


def cut_into_batches(minutes: float) -> Plan:
    """The shipped experiments that are cut so: not those that alternate conditions in one process."""
    settings = tiny.settings(tiny.ROOT, campaign="h200", measure={"batch_minutes": minutes})
    campaign = load_campaign(tiny.ROOT, "h200")
    keys = [key for key in campaign.experiments if not load_experiment(tiny.ROOT, campaign, key).one_process]
    assert "resolution" in keys
    return make_plan(tiny.ROOT, settings, keys)


def planned(tmp_path: Path, batch_minutes: float = 10, **changes: Any) -> Plan:
    root = tiny.make_root(tmp_path, **changes)
    return make_plan(root, tiny.settings(root, measure={"batch_minutes": batch_minutes}))


def all_items(plan: Plan) -> list[Item]:
    return [item for batch in plan.batches for item in batch.items]


def test_an_accelerator_with_a_calibration_is_planned_with_it() -> None:
    default = next(
        item
        for item in h200().items("resolution")
        if (item.configuration.height, item.configuration.width) == (720, 1280)
    )
    c = default.configuration
    calibration = shipped_calibration(tiny.ROOT, "h200")
    points = [Point(c.model, c.height, c.width, c.num_frames, steps) for steps in (50, 51)]
    found = predict_points(tiny.ROOT, calibration, points)
    assert default.prediction.latency_s == pytest.approx(found.latency_s[0])
    assert default.prediction.gpu_energy_Wh == pytest.approx(found.gpu_energy_Wh[0])
    assert default.prediction.step_s == pytest.approx(found.latency_s[1] - found.latency_s[0], rel=1e-6)
    assert default.prediction.once_s + 50 * default.prediction.step_s == pytest.approx(found.latency_s[0])


class TestBatches:
    def test_each_measurement_is_in_one_batch(self) -> None:
        plan = h200()
        records = [(item.experiment, item.record) for item in all_items(plan)]
        wanted = 0
        for experiment in plan.campaign.experiments:
            listed = configurations(tiny.ROOT, tiny.settings(tiny.ROOT), plan.campaign, experiment)
            wanted += sum(entry.passes for entry in listed)
        assert len(records) == len(set(records)) == wanted
        assert ("resolution", "wan2.1-t2v-1.3b_480x832_81f_50s__sampled_r1.json") in records
        assert [i for key in plan.campaign.experiments for i in plan.items(key)] == all_items(plan)
        assert plan.items("no-such-experiment") == []

    def test_a_batch_ends_before_the_limit(self) -> None:
        # 4 minutes hold most configurations and no pass, so that both sides are tried
        limit_s = 240
        plan = cut_into_batches(limit_s / 60)
        assert all(batch.measure_s <= limit_s or len(batch.items) == 1 for batch in plan.batches)
        assert any(batch.measure_s <= limit_s and len(batch.items) > 1 for batch in plan.batches)
        by_pass: dict[tuple[str, str, int], list[Any]] = {}
        for batch in plan.batches:
            ((model, pass_index),) = {(item.configuration.model, item.pass_index) for item in batch.items}
            by_pass.setdefault((batch.experiment, model, pass_index), []).append(batch)
        assert len(by_pass["resolution", "wan2.1-t2v-1.3b", 1]) > 1
        for batches in by_pass.values():
            for batch, following in pairwise(batches):
                models = {b.items[0].configuration.model for b in (batch, following)}
                assert batch.measure_s + following.items[0].measure_s > limit_s or len(models) == 2

    def test_a_configuration_beyond_the_limit_is_a_batch_of_its_own(self) -> None:
        plan = cut_into_batches(1e-3)
        assert {len(batch.items) for batch in plan.batches} == {1}

    def test_zero_minutes_give_each_configuration_its_own(self, tmp_path: Path) -> None:
        plan = planned(tmp_path, 0)
        assert [len(batch.items) for batch in plan.batches] == [1, 1, 1]

    def test_experiments_and_models_do_not_mix(self, tmp_path: Path) -> None:
        root = tiny.make_root(tmp_path)
        experiment = (root / "config/experiments/resolution.yaml").read_text()
        (root / "config/experiments/again.yaml").write_text(
            experiment.replace("key: resolution", "key: again")
        )
        tiny.write_yaml(
            root, "campaigns/tiny", tiny.CAMPAIGN | {"experiments": tiny.resolution() | {"again": OTHER}}
        )
        plan = make_plan(root, tiny.settings(root))
        assert [(b.experiment, len(b.items)) for b in plan.batches] == [("resolution", 3), ("again", 2)]
        assert {i.configuration.model for i in all_items(plan)} == {"tiny-wan"}
        only = make_plan(root, tiny.settings(root), ["again"])
        assert only.batches == plan.batches[1:]

    def test_conditions_that_alternate_share_a_process_with_their_size_and_protocol(
        self, tmp_path: Path
    ) -> None:
        small, large = {"height": 32, "width": 32}, {"height": 48, "width": 48}
        math = {"attention_kernel": "math"}
        vary = [small, large, small | math, large | math, small | {"protocol": "full"}]
        experiments = tiny.resolution(vary=vary, one_process=True, passes=2)
        plan = planned(tmp_path, experiments=experiments)
        shared = [
            ([(i.configuration.height, i.protocol) for i in batch.items], [i.pass_index for i in batch.items])
            for batch in plan.batches
        ]
        assert shared == [
            ([(32, "full")] * 2, [1, 2]),
            ([(32, "sampled")] * 4, [1, 1, 2, 2]),
            ([(48, "sampled")] * 4, [1, 1, 2, 2]),
        ]

    def test_names_are_a_function_of_the_records(self, tmp_path: Path) -> None:
        one = planned(tmp_path / "a")
        # another seed: another order, the same records; another title, other protocols
        same = planned(tmp_path / "b", seed=11, title="x", protocols={"idle_s": 0.5})
        assert [b.name for b in one.batches] == [b.name for b in same.batches]
        assert all(len(b.name) == 10 and int(b.name, 16) >= 0 for b in one.batches)
        fewer = planned(tmp_path / "c", experiments={"resolution": OTHER})
        assert fewer.batches[0].name != one.batches[0].name
        assert len({b.name for b in planned(tmp_path / "d", passes=3).batches}) == 3

    def test_names_stay(self, tmp_path: Path) -> None:
        # Indices of these names lie in results/raw: another way of naming would set off measuring anew.
        (batch,) = planned(tmp_path).batches
        assert batch.name == "89e35ee9c2"

    def test_memory_is_that_of_the_largest(self) -> None:
        plan = h200()
        for batch in plan.batches:
            assert batch.memory_GiB == max(i.prediction.memory_GiB for i in batch.items)
        assert max(b.memory_GiB for b in plan.batches) > min(i.prediction.memory_GiB for i in all_items(plan))

    def test_costs_are_those_of_the_prediction(self, tmp_path: Path) -> None:
        plan = planned(tmp_path)
        for item in all_items(plan):
            assert item.measure_s == predict_measurement_s(item.prediction, "sampled", plan.protocols, 2)
        assert plan.batches[0].measure_s == pytest.approx(sum(i.measure_s for i in all_items(plan)))
        assert plan.protocols.idle_s == 0.2 != ProtocolSettings().idle_s


class TestEntries:
    """Entries that are measured otherwise than the rest of their experiment."""

    VARY = (
        {"height": 32, "width": 32},
        {"height": 32, "width": 32, "protocol": "full", "protocols": {"full": {"repetitions": 2}}},
        {"height": 48, "width": 48, "passes": 3},
        {"height": 64, "width": 64, "protocols": {"idle_s": 1.0, "sampled": {"generations": 1}}},
    )

    @pytest.fixture
    def plan(self, tmp_path: Path) -> Plan:
        return planned(tmp_path, passes=2, experiments=tiny.resolution(vary=list(self.VARY)))

    def test_passes_are_the_entrys_own(self, plan: Plan) -> None:
        passes: dict[str, list[int]] = {}
        for item in all_items(plan):
            size = f"{item.configuration.height} {item.protocol}"
            passes.setdefault(size, []).append(item.pass_index)
        assert passes == {
            "32 sampled": [1, 2],
            "32 full": [1, 2],
            "48 sampled": [1, 2, 3],
            "64 sampled": [1, 2],
        }
        third = [item for item in all_items(plan) if item.pass_index == 3]
        assert [(item.order, item.configuration.height) for item in third] == [(0, 48)]

    def test_both_protocols_of_a_configuration_have_records_of_their_own(self, plan: Plan) -> None:
        of_size = {i.record for i in all_items(plan) if (i.configuration.height, i.pass_index) == (32, 1)}
        assert of_size == {
            "tiny-wan_32x32_5f_2s__sampled_r1.json",
            "tiny-wan_32x32_5f_2s__full_r1.json",
        }

    def test_each_is_predicted_by_its_own_settings(self, plan: Plan) -> None:
        for item in all_items(plan):
            own = predict_measurement_s(item.prediction, item.protocol, item.protocols, 2)
            assert item.measure_s == own
        (plain,) = (
            i
            for i in plan.items("resolution")
            if (i.configuration.height, i.protocol, i.pass_index) == (32, "sampled", 1)
        )
        assert plain.protocols == plan.protocols
        (slow,) = (i for i in plan.items("resolution") if (i.configuration.height, i.pass_index) == (64, 1))
        assert (slow.protocols.idle_s, slow.protocols.sampled.generations) == (1.0, 1)
        (full,) = (i for i in plan.items("resolution") if (i.protocol, i.pass_index) == ("full", 1))
        assert full.protocols.full.repetitions == 2
        assert full.measure_s == pytest.approx(4 * full.prediction.latency_s + 2 * 0.2)


class TestOrder:
    def order(self, plan: Plan, pass_index: int) -> list[str]:
        items = [i for i in all_items(plan) if i.pass_index == pass_index]
        assert [i.order for i in items] == list(range(len(items)))
        return [i.configuration_id for i in items]

    def test_each_pass_has_an_order_of_its_own_that_comes_back(self, tmp_path: Path) -> None:
        changes = {"passes": 3, "experiments": tiny.resolution(vary=SIZES)}
        plan, again = planned(tmp_path / "a", **changes), planned(tmp_path / "b", **changes)
        orders = [self.order(plan, index) for index in (1, 2, 3)]
        assert plan.batches == again.batches
        assert len({tuple(order) for order in orders}) == 3
        assert {frozenset(order) for order in orders} == {frozenset(orders[0])}
        by_size = [f"tiny-wan_{s['height']}x{s['width']}_5f_2s" for s in SIZES]
        assert by_size not in orders

    def test_another_seed_gives_another_order(self, tmp_path: Path) -> None:
        experiments = tiny.resolution(vary=SIZES)
        one = planned(tmp_path / "a", experiments=experiments)
        two = planned(tmp_path / "b", experiments=experiments, seed=4)
        assert self.order(one, 1) != self.order(two, 1)

    def test_where_conditions_alternate_the_unchanged_comes_first_in_each_pass(self, tmp_path: Path) -> None:
        size = {"height": 32, "width": 272}
        vary = [size | {"interventions": ["vae-tiling"]}, size | {"attention_kernel": "math"}, size]
        experiments = tiny.resolution(vary=vary, one_process=True, passes=3)
        (batch,) = planned(tmp_path, experiments=experiments).batches
        names = [item.configuration_id.removeprefix("tiny-wan_32x272_5f_2s") for item in batch.items]
        assert names[::3] == ["", "", ""]
        assert {tuple(names[1:3]), tuple(names[4:6]), tuple(names[7:9])} <= {
            ("__vae-tiling", "__math"),
            ("__math", "__vae-tiling"),
        }


class TestErrors:
    def test_an_unknown_batch_names_those_there_are(self, tmp_path: Path) -> None:
        plan = planned(tmp_path)
        batch = plan.batches[0]
        assert plan.batch("resolution", batch.name) is batch
        for experiment, name in (("resolution", "0123456789"), ("frames", batch.name)):
            with pytest.raises(UserError) as caught:
                plan.batch(experiment, name)
            assert f"campaign tiny has no batch {experiment}/{name}" in str(caught.value)
            assert f"resolution/{batch.name}" in str(caught.value)

    def test_an_experiment_that_the_campaign_does_not_have(self, tmp_path: Path) -> None:
        root = tiny.make_root(tmp_path)
        with pytest.raises(UserError, match="campaign tiny has no experiment 'frames'") as caught:
            make_plan(root, tiny.settings(root), ["frames"])
        assert caught.value.remedy == "it has: resolution"

    def test_the_folder_of_records(self) -> None:
        assert raw_folder(Path("/r"), "c", "e") == Path("/r/results/raw/c/e")


class TestCommand:
    def printed(self, capsys: pytest.CaptureFixture[str], root: Path, *more: str) -> str:
        assert cli.main(["--root", str(root), "plan", "--campaign", "tiny", *more]) == 0
        return capsys.readouterr().out

    def test_json(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        plan = planned(tmp_path)
        data = json.loads(self.printed(capsys, tmp_path, "--json"))
        assert (data["campaign"], data["kind"]) == ("tiny", "modelled")
        item, row = plan.batches[0].items[0], data["configurations"][0]
        assert len(data["configurations"]) == 3
        assert row["configuration_id"] == item.configuration_id
        assert (row["experiment"], row["batch"]) == ("resolution", plan.batches[0].name)
        assert (row["protocol"], row["pass"]) == ("sampled", 1)
        assert row["predicted_latency_s"] == pytest.approx(item.prediction.latency_s, abs=1e-3)
        assert row["predicted_gpu_energy_Wh"] == pytest.approx(item.prediction.gpu_energy_Wh, abs=1e-4)
        assert row["predicted_memory_GiB"] == pytest.approx(item.prediction.memory_GiB, abs=0.01)
        assert row["predicted_measure_s"] == pytest.approx(item.measure_s, abs=0.1)

    def test_table(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        plan = planned(tmp_path)
        lines = self.printed(capsys, tmp_path).splitlines()
        assert lines[0] == "campaign tiny: 3 measurements in 1 batches (modelled costs)"
        assert lines[1].split()[:3] == ["experiment/batch", "configuration", "protocol"]
        for line, item in zip(lines[2:5], plan.batches[0].items, strict=True):
            assert line.split()[:2] == [f"resolution/{plan.batches[0].name}", item.configuration_id]
            assert line.endswith("  to measure")
        assert len({len(line) for line in lines[2:5]}) == 1
        assert lines[5].split() == ["still", "to", "measure", f"{plan.batches[0].measure_s:.0f}"]
        assert lines[6:] == ["3 to measure; none measured"]

    def test_what_is_measured_or_sealed_is_not_counted(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        plan = planned(tmp_path)
        folder = tmp_path / "results" / "raw" / "tiny" / "resolution"
        folder.mkdir(parents=True)
        first, *others = plan.batches[0].items
        for item in others:
            (folder / item.record).touch()
        *_, total, states = self.printed(capsys, tmp_path).splitlines()
        assert total.split()[-1] == f"{first.measure_s:.0f}"
        assert states == "1 to measure; 2 measured"

    def test_a_plan_with_nothing_left_says_so(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        plan = planned(tmp_path)
        folder = tmp_path / "results" / "raw" / "tiny" / "resolution"
        folder.mkdir(parents=True)
        for item in plan.batches[0].items:
            (folder / item.record).touch()
        lines = self.printed(capsys, tmp_path).splitlines()
        assert [line.split()[-1] for line in lines[2:5]] == ["measured"] * 3
        assert lines[5:] == ["nothing left to measure: 3 measured"]
        (folder / "SHA256SUMS").touch()
        lines = self.printed(capsys, tmp_path).splitlines()
        assert lines[2].endswith("  sealed")
        assert lines[5:] == ["nothing left to measure: 3 sealed"]
        (folder / plan.batches[0].items[0].record).unlink()
        state, closed = self.printed(capsys, tmp_path).splitlines()[5:]
        assert state == "nothing left to measure: 2 sealed, 1 sealed without it"
        assert closed.startswith("a seal closes an experiment")

    def test_a_sealed_campaign_that_ships_lists_what_it_has(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["--root", str(tiny.ROOT), "plan", "--campaign", "h100"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len([line for line in lines if line.endswith("  sealed")]) == int(lines[0].split()[2])
        assert lines[-1] == f"nothing left to measure: {lines[0].split()[2]} sealed"

    def test_of_others_tables_it_says_what_builds_them(self, capsys: pytest.CaptureFixture[str]) -> None:
        """They have no experiments: a table of no rows says nothing."""
        assert cli.main(["--root", str(tiny.ROOT), "plan", "--campaign", "published-h100"]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith("campaign published-h100: tables that others published, nothing to measure")
        assert line.endswith(
            "`snakemake --cores all --config campaign=published-h100` fetches and builds them"
        )


class TestCrossModel:
    """The study's seven models and ContentV, in one experiment."""

    MODELS = (
        "wan2.1-t2v-14b wan2.1-t2v-1.3b mochi-1-preview cogvideox-5b cogvideox-2b ltx-video-0.9.7-dev "
        "animatediff-lightning contentv-8b"
    )

    def planned(self, tmp_path: Path) -> Plan:
        changes = {
            "accelerator": "h200",
            "device": "cuda",
            "experiments": {"cross-model": {}},
            "protocols": {},
        }
        root = tiny.make_root(tmp_path, **changes)
        return make_plan(root, tiny.settings(root))

    def test_each_is_at_its_defaults(self, tmp_path: Path) -> None:
        items = self.planned(tmp_path).items("cross-model")
        assert {item.configuration.model for item in items} == set(self.MODELS.split())
        for item in items:
            c = item.configuration
            defaults = load_model(tiny.ROOT, c.model).defaults.model_dump(exclude={"fps"})
            assert c.model_dump(include=set(defaults)) == defaults
            assert (c.attention_kernel, c.interventions) == (None, ())

    def test_it_fits_into_calls_of_ten_minutes_and_a_quarter_of_an_hour(self, tmp_path: Path) -> None:
        items = self.planned(tmp_path).items("cross-model")
        assert max(item.measure_s for item in items) < 300
        assert sum(item.measure_s for item in items) < 900
