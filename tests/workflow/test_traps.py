"""The ten traps of Snakemake that were tried before this workflow was written, each with its test."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from clone import BIN, REPOSITORY, Built, Clone, Running
from t2v_energy.measurement.record import read_record, record_paths
from t2v_energy.measurement.sealing import is_sealed

SMOKE = ("--config", "campaign=smoke")
RULE_FILES = [REPOSITORY / "Snakefile", *sorted((REPOSITORY / "workflow/rules").glob("*.smk"))]
ALL_RULES = "\n".join(path.read_text(encoding="utf-8") for path in RULE_FILES)
RULES = re.findall(r"^ *rule (\w+):\n((?:(?: .*)?\n)+?)(?=^ *rule |^\S|\Z)", ALL_RULES, re.MULTILINE)
ON_GPU = {name for name, body in RULES if re.search(r"^ +gpu=", body, re.MULTILINE)}
ANALYSES = {"sweeps", "scaling", "breakdown", "comparison", "theory"}
PAPER = {"aggregate", *ANALYSES, "numbers", "compile_paper"}
RECORD = re.compile(r"__(full|sampled)_r\d+\.json$")


def test_the_gpu_rules_are_known() -> None:
    """What the tests below look for is there."""
    assert sorted(ON_GPU) == ["measure_batch"]
    assert {name for name, _ in RULES} > PAPER


# --- 1 and 2: what a plain call does -------------------------------------------------------------


def test_trap_1_a_call_without_a_target_plans_everything(clone: Clone) -> None:
    """Trap 1: the default target of an included file is dropped, and nothing is done, with exit code 0."""
    assert set(clone.planned()) > {"all", *PAPER}


def test_trap_2_the_default_profile_is_loaded(clone: Clone, built_paper: Built) -> None:
    """Trap 2: a profile that is not beside the root Snakefile is not loaded, and nothing says so."""
    assert (clone.root / "profiles/default/profile.yaml").is_file()
    assert "Using workflow specific profile profiles/default " in clone.snakemake("-n").stdout
    assert re.search(r"Provided resources: .*gpu=.*1", built_paper.done.stdout)


# --- 3 and 4: one GPU, one measurement -----------------------------------------------------------

HOLD = """
import time
from t2v_energy.measurement.lock import device_lock
with device_lock("GPU-0", lambda text: print(text, flush=True)):
    print("held", flush=True)
    time.sleep(60)
"""


def test_trap_3_the_lock_holds_between_processes_and_dies_with_its_holder(
    clone: Clone, tmp_path: Path
) -> None:
    """Trap 3: Snakemake's resources do not keep two measurements apart; the runner's lock does."""
    first = Running(clone, sys.executable, "-c", HOLD, log=tmp_path / "first")
    first.wait_for("held")
    second = Running(clone, sys.executable, "-c", HOLD, log=tmp_path / "second")
    second.wait_for("waiting for it")
    try:
        assert f"process {first.process.pid};" in second.output
        time.sleep(0.3)
        assert "held" not in second.output
        first.signal_group(signal.SIGKILL)
        second.wait_for("held")
    finally:
        first.kill()
        second.kill()


@pytest.mark.parametrize(
    ("arguments", "lock_was_needed"),
    [((), False), (("--resources", "other=1"), True)],
    ids=["profile", "resources on the command line"],
)
def test_trap_3_measurements_never_overlap(
    clone: Clone, arguments: tuple[str, ...], lock_was_needed: bool
) -> None:
    """Trap 3: jobs run side by side unless a limit is given, and any --resources replaces the profile's."""
    clone.write_quick_campaign("pair", [(32, 32), (32, 48)])
    config = ("--config", "campaign=pair", "measure={batch_minutes: 0}")
    done = clone.snakemake("measure", "--cores", "2", *arguments, *config)
    assert done.returncode == 0, done.stdout
    assert ("waiting for it" in done.stdout) == lock_was_needed
    records = [read_record(path) for path in record_paths(clone.raw("pair"))]
    intervals = sorted(
        (r.origin.monotonic_s + r.windows.start_s[0], r.origin.monotonic_s + r.windows.end_s[-1])
        for r in records
    )
    assert len(intervals) == 2
    assert all(end_s < start_s for (_, end_s), (start_s, _) in pairwise(intervals)), intervals


def _submissions(clone: Clone, *arguments: str) -> list[dict[str, object]]:
    """What a cluster is asked for, by a campaign of four batches on a GPU; nothing is run there."""
    vary = [{"height": size, "width": size} for size in (256, 384, 512, 768)]
    experiments = {"resolution": {"vary": vary}}
    clone.write_campaign("mine", accelerator="h200", device="cuda", experiments=experiments)
    notes = clone.root / "submissions.jsonl"
    on_cluster = clone.importing_from(REPOSITORY / "tests/workflow/executor").having(SUBMISSIONS=str(notes))
    on_cluster.snakemake(
        *("measure", "--executor", "recorder", "--jobs", "4", "--seconds-between-status-checks", "1"),
        *("--config", "campaign=mine", "measure={batch_minutes: 0}"),
        *arguments,
    )
    return [json.loads(line) for line in notes.read_text().splitlines()]


@pytest.mark.parametrize(
    "arguments", [(), ("--resources", "other=1")], ids=["profile", "resources on the command line"]
)
def test_trap_4_a_group_of_batches_asks_for_one_gpu(clone: Clone, arguments: tuple[str, ...]) -> None:
    """Trap 4: without ``resource_scopes`` a group of four asks for four GPUs and waits for ever."""
    group = ("--groups", "measure_batch=gpu", "--group-components", "gpu=4")
    (submission,) = _submissions(clone, *group, *arguments)
    assert submission["rules"] == ["measure_batch"] * 4
    resources = submission["resources"]
    assert isinstance(resources, dict)
    assert resources["gpu"] == 1
    assert resources["runtime"] >= 40, "the group's jobs run one after the other"


def test_trap_4_the_profiles_limit_does_not_hold_back_a_cluster(clone: Clone) -> None:
    """Trap 4: with global scope the profile's ``gpu=1`` would let a whole cluster measure one batch."""
    submissions = _submissions(clone)
    assert [s["rules"] for s in submissions] == [["measure_batch"]] * 4


# --- 5 and 6: records are data -------------------------------------------------------------------


def test_trap_5_an_overwritten_record_stops_the_build(built_paper: Built, tmp_path: Path) -> None:
    """Trap 5: ``protected()`` does nothing for root; the seal finds what was overwritten, by name."""
    assert "protected(" not in ALL_RULES
    clone = built_paper.clone.copy(tmp_path / "clone")
    victim = record_paths(clone.raw("h200"))[0]
    clone.change(str(victim.relative_to(clone.root)), '"status": "ok"', '"status":  "ok"')
    done = clone.snakemake("--cores", "all")
    assert done.returncode != 0
    assert f"changed: {victim.name}" in done.stdout


@pytest.mark.parametrize("seed", [1, 2])
def test_trap_6_a_fresh_clone_plans_no_gpu_job(clone: Clone, seed: int) -> None:
    """Trap 6: git sets modification times in no order, which must not set off measuring."""
    assert is_sealed(clone.raw("h200"))
    clone.shuffle_mtimes(seed)
    planned = set(clone.planned())
    assert planned > PAPER
    assert not planned & ON_GPU
    assert not set(clone.planned("measure")) & ON_GPU


def test_trap_6_nor_does_one_that_brings_its_built_files(built_paper: Built, tmp_path: Path) -> None:
    """Trap 6: the same with figures and tables there, and none of Snakemake's notes on how they came."""
    clone = built_paper.clone.copy(tmp_path / "clone")
    clone.shuffle_mtimes(3)
    assert not set(clone.planned()) & ON_GPU


@pytest.mark.parametrize("fault", ["missing", "extra", "changed"])
def test_trap_6_records_that_are_not_as_sealed_stop_the_build_by_name(clone: Clone, fault: str) -> None:
    """Trap 6: what measuring does not remake must not be wrong unseen."""
    victim = record_paths(clone.raw("h200"))[1]
    if fault == "missing":
        victim.unlink()
    elif fault == "extra":
        extra = victim.with_name(re.sub(r"_r\d+[.]json$", "_r99.json", victim.name))
        extra.write_bytes(victim.read_bytes())
        victim = extra
    else:
        clone.change(str(victim.relative_to(clone.root)), '"status": "ok"', '"status":  "ok"')
    done = clone.snakemake("--cores", "all")
    assert done.returncode != 0
    assert f"{fault}: {victim.name}" in done.stdout
    assert "restore the files from the repository" in done.stdout
    assert not (clone.root / "results/aggregated/h200/configurations.csv").exists()


# --- 7: what does not set off measuring ----------------------------------------------------------


def test_trap_7_editing_code_measures_nothing_anew(built_smoke: Built, tmp_path: Path) -> None:
    """Trap 7: a comment in a script, or a notebook that was only opened, sets its rule off again."""
    clone = built_smoke.clone.copy(tmp_path / "clone")
    clone = clone.importing_from(clone.root / "workflow")
    for path in (clone.root / "workflow/t2v_energy").rglob("*.py"):
        path.write_text(path.read_text(encoding="utf-8") + "# a comment\n", encoding="utf-8")
    imported = clone.run(sys.executable, "-c", "import t2v_energy; print(t2v_energy.__file__)")
    assert Path(imported.stdout.strip()).is_relative_to(clone.root)
    planned = set(clone.planned(*SMOKE))
    assert "aggregate" in planned, "stages on the CPU do follow the code"
    assert not planned & {"prompts", *ON_GPU}

    notebook = clone.root / "workflow/notebooks/sweeps.ipynb"
    content = json.loads(notebook.read_text(encoding="utf-8"))
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            cell["execution_count"] = 7
    notebook.write_text(json.dumps(content), encoding="utf-8")
    assert not set(clone.planned(*SMOKE)) & {"prompts", *ON_GPU}


# --- 8: notebooks --------------------------------------------------------------------------------


def test_trap_8_a_notebook_that_fails_stays(built_smoke: Built, tmp_path: Path) -> None:
    """Trap 8: Snakemake deletes a failed job's outputs; the executed notebook is a log, so it stays."""
    clone = built_smoke.clone.copy(tmp_path / "clone")
    executed = clone.root / "logs/notebooks/smoke/sweeps.ipynb"
    executed.unlink()
    clone.change("results/aggregated/smoke/configurations.csv", ",latency_s,", ",latency_hours,")
    done = clone.snakemake("results/figures/smoke/fig2.pdf", *SMOKE)
    assert done.returncode != 0
    cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    (error,) = [output for output in outputs if output["output_type"] == "error"]
    assert "latency_s" in error["evalue"]
    assert not (clone.root / "results/figures/smoke/fig2.pdf").exists()


def test_trap_8_no_notebook_is_an_output_and_each_names_its_kernel(clone: Clone) -> None:
    """Trap 8: papermill refuses a notebook without a kernelspec; as an output it vanishes on failure."""
    outputs = clone.outputs(*SMOKE) + clone.outputs("--config", "campaign=h200")
    assert not [name for name in outputs if name.endswith(".ipynb")]
    for path in (clone.root / "workflow/notebooks").glob("*.ipynb"):
        kernel = json.loads(path.read_text(encoding="utf-8"))["metadata"]["kernelspec"]
        assert kernel["name"] == "python3", path.name


# --- 9: params -----------------------------------------------------------------------------------


def test_trap_9_params_are_plain(built_smoke: Built) -> None:
    """Trap 9: a param that is no plain value does not reach the job; here each is a string."""
    assert built_smoke.done.returncode == 0, built_smoke.done.stdout
    assert "PicklingError" not in built_smoke.done.stdout
    notes = list((built_smoke.clone.root / ".snakemake/metadata").iterdir())
    assert notes
    for path in notes:
        for param in json.loads(path.read_text(encoding="utf-8"))["params"]:
            assert re.fullmatch(r"'.*'|\".*\"", param, re.DOTALL), param


def test_trap_9_settings_reach_the_command_whatever_they_hold(clone: Clone) -> None:
    """Trap 9: settings go by a quoted string of JSON, so no character of theirs means anything to a shell."""
    name = 'it\'s $(touch pwned) "mine".txt'
    (clone.root / name).write_text("A red fox in the snow.\nA ship at dawn.\n", encoding="utf-8")
    prompts = "prompts=" + json.dumps({"file": name})
    target = "results/prompts/smoke.jsonl"
    done = clone.snakemake(target, "--config", "campaign=smoke", prompts)
    assert done.returncode == 0, done.stdout
    texts = [json.loads(line)["text"] for line in (clone.root / target).read_text().splitlines()]
    assert texts == ["A red fox in the snow.", "A ship at dawn."]
    assert not (clone.root / "pwned").exists()


# --- 10: the paper -------------------------------------------------------------------------------

TEX = ("pdflatex", "xelatex", "lualatex", "latexmk", "tectonic", "bibtex", "biber", "pandoc", "typst")


def test_trap_10_the_paper_needs_no_tex(built_paper: Built, tmp_path: Path) -> None:
    """Trap 10: typst comes from PyPI as a library; no TeX, nor any other program, makes the PDF."""
    clone = built_paper.clone.copy(tmp_path / "clone")
    before = (clone.root / "paper/paper.pdf").read_bytes()
    (clone.root / "paper/paper.pdf").unlink()
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in TEX:
        (programs / name).write_text(f"#!/bin/sh\ntouch {programs}/called\nexit 1\n", encoding="utf-8")
        (programs / name).chmod(0o755)
    path = os.pathsep.join([str(programs), str(BIN), os.environ["PATH"]])
    done = clone.having(PATH=path).snakemake("paper/paper.pdf")
    assert done.returncode == 0, done.stdout
    assert before.startswith(b"%PDF")
    assert (clone.root / "paper/paper.pdf").read_bytes() == before
    assert not (programs / "called").exists()


def test_trap_10_the_paper_is_planned_from_sealed_records_without_a_gpu(clone: Clone) -> None:
    """Trap 10: what the paper needs, and nothing else."""
    planned = set(clone.planned("paper/paper.pdf"))
    assert planned >= PAPER
    assert not planned & {"prompts", *ON_GPU}


# --- and besides ---------------------------------------------------------------------------------


def test_everything_is_built_once(built_paper: Built) -> None:
    """From sealed records to the paper; a second run finds nothing to do."""
    assert built_paper.done.returncode == 0, built_paper.done.stdout
    start_s = time.monotonic()
    done = built_paper.clone.snakemake("--cores", "all")
    print(f"everything: {built_paper.cpu_s:.1f} s of processor; again: {time.monotonic() - start_s:.1f} s")
    assert done.returncode == 0
    assert "Nothing to be done" in done.stdout


@pytest.mark.parametrize("campaign", ["h200", "smoke"])
def test_lint_finds_nothing(clone: Clone, campaign: str) -> None:
    done = clone.snakemake("--lint", "--config", f"campaign={campaign}")
    assert done.returncode == 0, done.stdout


def test_a_figure_needs_only_its_own_jobs(clone: Clone) -> None:
    assert clone.planned("figures/fig2.pdf") == {"aggregate": 1, "sweeps": 1}


def test_records_are_never_outputs(clone: Clone) -> None:
    """Snakemake deletes outputs of failed jobs and of jobs that it is about to rerun."""
    outputs = clone.outputs(*SMOKE) + clone.outputs()
    assert [name for name in outputs if "/batches/" in name], "the smoke campaign's batches have indices"
    assert not [name for name in outputs if RECORD.search(name)]
