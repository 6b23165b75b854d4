"""The campaign ``smoke`` from a clean copy: all four stages live, on the CPU."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
from clone import Built, Clone
from t2v_energy.measurement.record import read_record, record_paths

SMOKE = ("--config", "campaign=smoke")
PROMPTS = "results/prompts/smoke.jsonl"
CPU_LIMIT_S = 360  # the budget is 180 s on two cores of one's own; here others may use them, too
RECORDS = {
    "resolution": 4,
    "steps": 4,
    "validation": 2,
    "kernels": 6,
    "interventions": 4,
    "cross-model": 6,
}  # no frames: as sizes
BATCHES = dict.fromkeys(RECORDS, 1) | {"cross-model": RECORDS["cross-model"]}  # a batch is of one model
FIGURES = (
    "fig1",
    "fig2",
    "fig4",
    "fig5",
    "fig5b",
    "exponents",
    "stages",
    "codecarbon",
    "settling",
    "kernels",
    "fig7",
    "fig8",
)
TABLES = (
    "table1", "table3", "table5", "table6", "table7", "table7b", "scaling", "regime_fits", "regimes",
    "doubling", "efficiency", "power", "steps", "stages", "stages_once", "codecarbon", "cost", "cost_carbon",
    "validation", "validation_steps", "validation_drift", "settling", "kernels", "kernels_fit",
    "table2", "table4", "broader", "components", "memory", "signs", "operators", "prompts", "interventions",
    "interventions_budget", "merging", "merging_methods",
)  # fmt: skip
NUMBERS = ("sweeps", "scaling", "breakdown", "comparison", "models", "interventions", "theory")


@pytest.fixture
def copy(built_smoke: Built, tmp_path: Path) -> Clone:
    """A built copy to change."""
    return built_smoke.clone.copy(tmp_path / "clone")


def _records(clone: Clone) -> dict[str, tuple[bytes, int]]:
    """By experiment and name: content and time of writing."""
    return {
        f"{experiment}/{path.name}": (path.read_bytes(), path.stat().st_mtime_ns)
        for experiment in RECORDS
        for path in record_paths(clone.raw("smoke", experiment))
    }


def _index(clone: Clone, experiment: str) -> str:
    """The index of an experiment's only batch, as a target."""
    (path,) = (clone.raw("smoke", experiment) / "batches").glob("*.json")
    return str(path.relative_to(clone.root))


def _rows(clone: Clone, name: str) -> list[dict[str, str]]:
    with (clone.root / name).open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_one_command_runs_all_stages_live(built_smoke: Built) -> None:
    clone, done = built_smoke.clone, built_smoke.done
    assert done.returncode == 0, done.stdout
    print(f"smoke, all stages: {built_smoke.cpu_s:.0f} s of the processor")
    assert built_smoke.cpu_s < CPU_LIMIT_S
    built = [
        PROMPTS,
        "results/aggregated/smoke/measurements.parquet",
        *(f"results/figures/smoke/{name}.{kind}" for name in FIGURES for kind in ("pdf", "png", "svg")),
        *(f"results/tables/smoke/{name}.csv" for name in TABLES),
        *(f"logs/notebooks/smoke/{name}.ipynb" for name in NUMBERS),
    ]
    for name in built:
        assert (clone.root / name).stat().st_size > 0, name
    for name in NUMBERS:
        assert json.loads((clone.root / f"results/numbers/smoke/{name}.json").read_text()), name
    assert len(list((clone.root / "results/numbers/smoke").iterdir())) == len(NUMBERS)
    rows = _rows(clone, "results/aggregated/smoke/configurations.csv")
    assert Counter(row["experiment"] for row in rows) == RECORDS
    assert {row["status"] for row in rows} == {"ok"}
    assert all(float(row["latency_s"]) > 0 and float(row["cpu_energy_Wh"]) > 0 for row in rows)


def test_every_table_has_rows_of_what_was_measured(built_smoke: Built) -> None:
    """Stage 4 is live: no notebook ends well only because it found nothing to do."""
    clone = built_smoke.clone
    needs_a_gpu = {"power", "settling", "memory"}
    not_measured = {"merging", "merging_methods", "prompts"}
    for name in set(TABLES) - needs_a_gpu - not_measured:
        assert _rows(clone, f"results/tables/smoke/{name}.csv"), name
    sets = {row["set"] for row in _rows(clone, "results/tables/smoke/table3.csv")}
    assert sets == {"resolution", "steps"}
    kernels = _rows(clone, "results/tables/smoke/kernels.csv")
    assert {(row["default_kernel"], row["flash_kernel"]) for row in kernels} == {("math", "flash-cpu")}
    changed = _rows(clone, "results/tables/smoke/interventions.csv")
    assert [row["intervention"] for row in changed] == ["fewer-steps", "attention-math", "vae-tiling"]
    assert all(float(row["measured_latency_ratio"]) > 0 for row in changed)
    assert all(row["relative_l2"] for row in changed[1:])
    (compared,) = [
        row for row in _rows(clone, "results/tables/smoke/validation.csv") if row["quantity"] == "latency_s"
    ]
    assert float(compared["full"]) > 0 < float(compared["sampled"])


@pytest.mark.parametrize("experiment", RECORDS)
def test_records_and_index_agree(built_smoke: Built, experiment: str) -> None:
    folder = built_smoke.clone.raw("smoke", experiment)
    records = [read_record(path) for path in record_paths(folder)]
    indices = [json.loads(path.read_text()) for path in (folder / "batches").glob("*.json")]
    assert len(indices) == BATCHES[experiment]
    listed = [entry["record"] for index in indices for entry in index["records"]]
    assert sorted(listed) == sorted(record.file_name for record in records)
    assert {record.order for record in records} == set(range(RECORDS[experiment]))


def test_figures_of_another_campaign_do_not_replace_the_papers(built_smoke: Built) -> None:
    assert not list((built_smoke.clone.root / "figures").glob("fig*"))
    assert not (built_smoke.clone.root / "paper" / "paper.pdf").exists()


def test_the_second_run_does_nothing(built_smoke: Built) -> None:
    done = built_smoke.clone.snakemake(*SMOKE)
    assert done.returncode == 0
    assert "Nothing to be done" in done.stdout


def test_other_prompts_measure_nothing_anew(copy: Clone) -> None:
    """What is measured stays, byte for byte, whatever jobs Snakemake runs again."""
    copy.change("config/config.yaml", "count: 50", "count: 49")
    _assert_prompts_change_and_records_do_not(copy)


def test_nor_do_other_words(copy: Clone) -> None:
    """The same for the vocabulary."""
    prompts = (copy.root / PROMPTS).read_text(encoding="utf-8")
    lines = (copy.root / "config/prompts.yaml").read_text(encoding="utf-8").splitlines()
    words = [line.strip()[2:] for line in lines if line.startswith("      - ")]
    word = next(word for word in words if word in prompts)
    copy.change("config/prompts.yaml", f"- {word}", f"- {word} seen twice")
    _assert_prompts_change_and_records_do_not(copy)


def _assert_prompts_change_and_records_do_not(copy: Clone) -> None:
    before, text = _records(copy), (copy.root / PROMPTS).read_text(encoding="utf-8")
    assert copy.planned(*SMOKE)["measure_batch"] == sum(BATCHES.values()), (
        "each batch has a look at what it has"
    )
    one = _index(copy, "steps")  # one batch shows it: each would take ten seconds to find nothing to do
    done = copy.snakemake(one, *SMOKE)
    assert done.returncode == 0, done.stdout
    assert (copy.root / PROMPTS).read_text(encoding="utf-8") != text
    assert _records(copy) == before
    assert copy.planned(one, *SMOKE) == {}


def test_a_record_that_was_moved_away_is_measured_again_and_no_other(copy: Clone) -> None:
    """What every message advises: move it away, run again."""
    before = _records(copy)
    moved = sorted(before)[0]
    (copy.raw("smoke", moved.partition("/")[0]) / Path(moved).name).rename(copy.root / Path(moved).name)
    assert copy.planned(*SMOKE)["measure_batch"] == 1, "the other experiments' batches are left alone"
    done = copy.snakemake("measure", *SMOKE)
    assert done.returncode == 0, done.stdout
    after = _records(copy)
    assert set(after) == set(before)
    assert {name for name in before if after[name] != before[name]} == {moved}
    again = copy.snakemake("measure", *SMOKE)  # Snakemake notices that the list of what lacks is empty again
    assert again.returncode == 0
    assert copy.planned("measure", *SMOKE) == {}
    assert _records(copy) == after


def test_another_protocol_is_refused_and_loses_no_record(copy: Clone) -> None:
    """Records made otherwise are named; they are neither mixed with new ones nor deleted."""
    before = _records(copy)
    copy.change("config/config.yaml", "sample_hz: 20.0", "sample_hz: 25.0")
    assert "measure_batch" in copy.planned(*SMOKE)
    done = copy.snakemake(*SMOKE)
    assert done.returncode != 0
    assert "this record was measured with other" in done.stdout
    assert any(Path(name).name in done.stdout for name in before), "the record is named"
    assert _records(copy) == before
