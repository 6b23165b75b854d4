"""What the Snakefile is told: sealed experiments are data, the others are measured."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from records import GPU, configuration, make_record, write
from t2v_energy.analysis import sweep_figure
from t2v_energy.dag import INTERVENTIONS, SWEEP_FIGURES, Dag, read_dag
from t2v_energy.errors import UserError
from t2v_energy.measurement.sealing import seal
from t2v_energy.plan import make_plan
from t2v_energy.study import load_study

SIZES = [(240, 320), (480, 832)]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with a GPU campaign ``big`` of two experiments, and the campaign ``tiny`` on the CPU."""
    tiny.make_root(tmp_path)
    sweep = {"vary": [{"height": h, "width": w} for h, w in SIZES]}
    for key in ("frames", "more.steps", "cross-model"):
        text = (tmp_path / "config/experiments/resolution.yaml").read_text()
        (tmp_path / f"config/experiments/{key}.yaml").write_text(
            text.replace("key: resolution", f"key: {key}")
        )
    experiments = {"resolution": sweep, "frames": sweep, "more.steps": sweep}
    campaign = {"key": "big", "title": "x", "accelerator": "h200", "device": "cuda", "gpu_name": GPU}
    tiny.write_yaml(tmp_path, "campaigns/big", campaign | {"experiments": experiments})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def dag(root: Path, campaign: str = "big", **overrides: Any) -> Dag:
    return read_dag(root, {"campaign": campaign, **overrides})


def sealed(root: Path) -> list[str]:
    """Seal ``resolution`` of ``big``, of two synthetic records; the records' names."""
    folder = root / "results/raw/big/resolution"
    records = [make_record(campaign="big", config=configuration(height=h, width=w)) for h, w in SIZES]
    names = [write(record, folder).name for record in records]
    seal(folder, names, GPU)
    return names


def test_nothing_sealed(root: Path) -> None:
    found = dag(root)
    assert (found.campaign, found.sealed, found.on_gpu) == ("big", (), True)
    assert len(found.batch_indices) == 3
    assert found.measurements == found.batch_indices
    for batch, path in zip(found.plan.batches, found.batch_indices, strict=True):
        assert path == f"results/raw/big/{batch.experiment}/batches/{batch.name}.json"


def test_a_sealed_experiment_is_data_and_has_no_batch(root: Path) -> None:
    names = sealed(root)
    found = dag(root)
    assert found.sealed == ("resolution",)
    assert {b.experiment for b in found.plan.batches} == {"frames", "more.steps"}
    folder = "results/raw/big/resolution"
    expected = [f"{folder}/{name}" for name in [*sorted(names), "SHA256SUMS"]]
    assert found.measurements == expected + found.batch_indices
    assert len(found.batch_indices) == 2


def test_what_a_seal_lacks_of_the_configuration_is_known(root: Path) -> None:
    sealed(root)
    assert dag(root).left_out == ()
    path = root / "config/campaigns/big.yaml"
    campaign = yaml.safe_load(path.read_text())
    campaign["experiments"]["resolution"]["vary"].append({"height": 512, "width": 512})
    path.write_text(yaml.safe_dump(campaign, sort_keys=False))
    found = dag(root)
    assert found.left_out == ("resolution/wan2.1-t2v-1.3b_512x512_81f_50s__sampled_r1.json",)
    assert "resolution" in found.sealed  # still data: nothing of it is measured
    assert not any(batch.experiment == "resolution" for batch in found.plan.batches)


def test_a_sealed_experiment_that_is_not_whole_stops_the_build(root: Path) -> None:
    names = sealed(root)
    (root / "results/raw/big/resolution" / names[0]).unlink()
    with pytest.raises(UserError, match=re.escape(f"missing: {names[0]}")):
        _ = dag(root).measurements


def test_a_changed_record_is_left_to_the_rules_that_read_it(root: Path) -> None:
    # every dry run parses the Snakefile: it reads names and hashes nothing
    names = sealed(root)
    (root / "results/raw/big/resolution" / names[0]).write_text("{}")
    assert dag(root).sealed == ("resolution",)


def test_the_pattern_matches_what_may_be_measured(root: Path) -> None:
    pattern = dag(root).unsealed_pattern
    assert all(re.fullmatch(pattern, key) for key in ("resolution", "frames", "more.steps"))
    assert not re.fullmatch(pattern, "moreXsteps")
    sealed(root)
    pattern = dag(root).unsealed_pattern
    assert re.fullmatch(pattern, "frames")
    assert not re.fullmatch(pattern, "resolution")


def test_the_pattern_of_a_sealed_campaign_matches_nothing(root: Path) -> None:
    sealed(root)
    (root / "config/campaigns/big.yaml").write_text(
        (root / "config/campaigns/big.yaml").read_text().split("  frames:")[0]
    )
    found = dag(root)
    assert found.batch_indices == []
    assert not any(re.search(found.unsealed_pattern, text) for text in ("", "resolution", "x"))


def test_the_campaign_of_the_paper_has_the_folder_figures(root: Path) -> None:
    assert not dag(root).is_paper_campaign
    assert dag(root).figures == "results/figures/big"
    found = dag(root, paper_campaign="big")
    assert found.is_paper_campaign
    assert found.figures == "figures"


def test_only_sealed_campaigns_with_models_stand_beside_the_papers(root: Path) -> None:
    shutil.copy(tiny.ROOT / "config/experiments/cross-model.yaml", root / "config/experiments")
    assert dag(root, paper_beside=["h100"]).beside == []  # not the paper's campaign
    with pytest.raises(UserError, match="paper_beside: campaign 'h100' is not sealed"):
        _ = dag(root, paper_campaign="big", paper_beside=["h100"]).beside
    shutil.copytree(tiny.ROOT / "results/raw/h100", root / "results/raw/h100")
    (found,) = dag(root, paper_campaign="big", paper_beside=["h100"]).beside
    assert found.campaign == "h100"
    assert any(name.startswith("results/raw/h100/cross-model/wan2.1-t2v-14b") for name in found.measurements)
    assert found.beside == []


def test_a_cpu_campaign_needs_no_gpu(root: Path) -> None:
    assert not dag(root, "tiny").on_gpu


def test_the_settings_travel_as_json(root: Path) -> None:
    found = dag(root, measure={"batch_minutes": 3})
    assert json.loads(found.measuring_json)["measure"] == {"batch_minutes": 3, "allow_shared": False}
    assert make_plan(root, tiny.settings(root, **json.loads(found.measuring_json))) == found.plan


def test_measuring_depends_on_the_settings_of_measuring_alone(root: Path) -> None:
    one = dag(root).measuring_json
    assert set(json.loads(one)) == {"campaign", "measure", "protocols"}
    assert dag(root, paper_campaign="tiny", prompts={"count": 3}).measuring_json == one
    assert dag(root, protocols={"idle_s": 0.7}).measuring_json != one


def test_what_to_ask_a_cluster_for(root: Path) -> None:
    found = dag(root)
    batch = found.plan.batches[0]
    assert found.runtime_minutes(batch.experiment, batch.name) == pytest.approx(
        batch.measure_s * 1.5 / 60 + 10, abs=1
    )
    assert found.host_memory_MB(batch.experiment, batch.name) == pytest.approx(
        batch.memory_GiB * 1024 + 8192, abs=1
    )
    with pytest.raises(UserError, match="has no batch frames/nothing"):
        found.runtime_minutes("frames", "nothing")


@pytest.mark.parametrize(
    ("experiments", "figures", "compares", "analyses"),
    [
        (["resolution"], ["fig2"], False, ["sweeps", "scaling", "breakdown", "theory"]),
        (["frames"], ["fig3"], False, ["sweeps", "scaling", "breakdown", "theory"]),
        (["steps"], ["fig4"], True, ["sweeps", "scaling", "breakdown", "comparison", "theory"]),
        (["steps", "resolution"], ["fig2", "fig4"], True,
         ["sweeps", "scaling", "breakdown", "comparison", "theory"]),
        (["validation"], [], True, ["comparison", "theory"]),
        (["kernels"], [], True, ["comparison", "theory"]),
        (["cross-model"], [], False, ["models", "theory"]),
        (["cross-model", "frames"], ["fig3"], False, ["sweeps", "scaling", "breakdown", "models", "theory"]),
        (["more.steps"], [], False, ["theory"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_a_campaign_gets_what_its_experiments_have_data_for(
    root: Path, experiments: list[str], figures: list[str], compares: bool, analyses: list[str]
) -> None:
    campaign = {"key": "some", "title": "x", "accelerator": "cpu", "device": "cpu"}
    sizes = {"vary": [{"height": h, "width": w} for h, w in SIZES]}
    tiny.write_yaml(root, "campaigns/some", campaign | {"experiments": dict.fromkeys(experiments, sizes)})
    found = dag(root, "some")
    assert found.sweep_figures == figures
    assert found.compares is compares
    assert found.analyses == analyses


def test_a_campaign_of_all_sweeps_on_a_gpu_predicts(root: Path) -> None:
    sweeps = {key: {"vary": [{"height": h, "width": w} for h, w in SIZES]} for key in SWEEP_FIGURES}
    (root / "config/experiments/frames.yaml").write_text(
        (tiny.ROOT / "config/experiments/frames.yaml").read_text()
    )
    for device, accelerator in (("cuda", "h200"), ("cpu", "cpu")):
        campaign = {"key": device, "title": "x", "accelerator": accelerator, "device": device}
        tiny.write_yaml(root, f"campaigns/{device}", campaign | {"experiments": sweeps})
        assert dag(root, device).predicts is (device == "cuda")
        assert ("prediction" in dag(root, device).analyses) is (device == "cuda")


def test_records_of_single_operators_count_once_they_are_sealed(root: Path) -> None:
    folder = root / "results" / "raw" / "big" / "operators"
    folder.mkdir(parents=True)
    (folder / "a__operators_r1.json").write_text("{}")
    assert dag(root).operator_records == []
    (folder / "SHA256SUMS").write_text("0" * 64 + "  a__operators_r1.json\n")
    names = ("a__operators_r1.json", "SHA256SUMS")
    assert dag(root).operator_records == [f"results/raw/big/operators/{name}" for name in names]


def test_the_figures_of_the_dag_are_those_that_are_drawn() -> None:
    """The Snakefile imports no pandas, so it has a list of its own."""
    assert dict(sweep_figure.FIGURES) == SWEEP_FIGURES


def test_every_analysis_has_its_notebook(root: Path) -> None:
    keys = ("resolution", "frames", "steps", "validation", "kernels", "cross-model", "interventions")
    every = {key: {} for key in keys}
    campaign = {"key": "some", "title": "x", "accelerator": "h200", "device": "cuda"}
    tiny.write_yaml(root, "campaigns/some", campaign | {"experiments": every})
    (root / "config/experiments/frames.yaml").write_text(
        (tiny.ROOT / "config/experiments/frames.yaml").read_text()
    )
    notebooks = {path.stem for path in (tiny.ROOT / "workflow/notebooks").glob("*.ipynb")}
    assert {*dag(root, "some").analyses, "operators", "published"} == notebooks


def test_what_the_comparison_of_models_is_built_from(root: Path) -> None:
    campaign = {"key": "some", "title": "x", "accelerator": "cpu", "device": "cpu"}
    sizes = {"model": "tiny-wan", "vary": [{"height": 32, "width": 32}]}
    tiny.write_yaml(root, "campaigns/some", campaign | {"experiments": {"cross-model": sizes}})
    files = dag(root, "some").compared_files
    assert files[0] == "config/study.yaml"
    assert "config/accelerators.yaml" in files
    models = {"tiny-wan", *load_study(root).models}
    assert {f"config/models/{key}.yaml" for key in models} < set(files)
    assert all((root / name).is_file() for name in files)


def test_the_workflow_runs_in_its_own_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = root / "results"
    monkeypatch.chdir(elsewhere)
    with pytest.raises(UserError, match="runs in its own folder") as caught:
        dag(root)
    assert caught.value.where == str(elsewhere)
    assert f"cd {root}" in caught.value.remedy
    (root / "link").symlink_to(root)
    monkeypatch.chdir(root)
    assert dag(root / "link").campaign == "big"


# --- campaigns of published tables --------------------------------------------------------------------------


def test_published_tables_are_fetched_unless_copies_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.ROOT)
    campaign = {"campaign": "published-h100"}
    fetched = read_dag(tiny.ROOT, campaign)
    folder = "results/published/published-h100"
    assert fetched.published_files == {name: f"{folder}/{name}.csv" for name in ("cross_model", "sweeps")}
    assert fetched.published_figures == ["fig2", "fig3", "fig4", "fig5"]
    assert (fetched.batch_indices, fetched.measurements, fetched.sealed) == ([], [], ())
    copy = tmp_path / "a copy.csv"
    copy.touch()
    own = read_dag(tiny.ROOT, campaign | {"published_sweeps": str(copy)})
    assert own.published_files == {"sweeps": str(copy)}
    assert (own.published_figures, own.published_tables) == (["fig2", "fig3", "fig4"], ["audit", "table3"])
    assert own.published_options == f"--sweeps '{copy}'"
    with pytest.raises(UserError, match=r"published_cross_model: there is no 'none\.csv'"):
        read_dag(tiny.ROOT, campaign | {"published_cross_model": "none.csv"})


def test_a_campaign_of_our_own_reads_published_tables_for_the_claims_alone(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "copy.csv").touch()
    assert dag(root).published_files == {}
    assert "claims" not in dag(root).analyses
    assert dag(root, paper_campaign="big").analyses[-1] == "claims"
    found = dag(root, paper_campaign="big", published_cross_model="copy.csv")
    assert found.published_files == {"cross_model": "copy.csv"}
    assert found.analyses[-2:] == ["claims", "versus"]
    assert found.overlaid_figures == [], "no cross-model experiment of ours, no sweeps of theirs"


def test_experiments_of_changed_pipelines_bring_their_analysis(root: Path) -> None:
    assert "interventions" not in dag(root).analyses
    campaign = yaml.safe_load((root / "config/campaigns/big.yaml").read_text())
    vary = [{"height": 480, "width": 832}, {"height": 480, "width": 832, "attention_kernel": "flash"}]
    campaign["experiments"]["interventions"] = {"model": "wan2.1-t2v-1.3b", "vary": vary}
    tiny.write_yaml(root, "campaigns/big", campaign)
    found = dag(root)
    assert "interventions" in found.analyses
    frozen = "config/calibrations/h200-before-interventions.json"
    assert found.savings_files == ["config/savings.yaml", "config/prediction.yaml", frozen]
    registered = root / "config/predictions/big/interventions.csv"
    registered.parent.mkdir(parents=True)
    registered.touch()
    assert found.savings_files[3:] == ["config/predictions/big/interventions.csv"]


def test_what_is_analysed_as_interventions_is_what_the_dag_takes_for_them() -> None:
    from t2v_energy.analysis.interventions import EXPERIMENTS

    assert INTERVENTIONS == EXPERIMENTS
