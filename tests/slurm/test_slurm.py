"""The workflow on a real SLURM, through ``profiles/slurm``: what it asks for, and what it survives."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from clone import IN_CPU_SMALL, QUICK, Clone, Done, Running
from slurm_cluster import GPUS, PASSING, Cluster
from t2v_energy.dag import Dag, read_dag
from t2v_energy.measurement.record import read_record, record_paths

CAMPAIGN = "quick"
ONE_EACH = "measure={batch_minutes: 0}"
SIZES = [(16, 16), (16, 32), (32, 16), (32, 32)]
NAMES = {f"tiny-wan_{height}x{width}_5f_2s__sampled_r1.json" for height, width in SIZES}
FINISHED = "→ ok"
# A campaign on the CPU asks for no GPU, but there is none here to measure: it is made to ask for one.
WITH_GPU = ("--set-resources", "measure_batch:gpu=1")
LIMIT_S = 600  # for what takes one minute or two on a machine that does nothing else

State = dict[str, tuple[bytes, int]]  # by record: content and time of writing


def _arguments(*more: str, config: Sequence[str] = ()) -> tuple[str, ...]:
    """A run on the cluster; looks come often, for the time of the tests."""
    quick = ("--slurm-init-seconds-before-status-checks", "1", "--seconds-between-status-checks", "1")
    patience = ("--latency-wait", "5", "--slurm-keep-successful-logs")
    settings = ("--config", f"campaign={CAMPAIGN}", *config)
    return ("measure", "--profile", "profiles/slurm", *quick, *patience, *WITH_GPU, *more, *settings)


def _start(clone: Clone, log: Path, *more: str, config: Sequence[str] = ()) -> Running:
    return Running(clone, sys.executable, "-m", "snakemake", *_arguments(*more, config=config), log=log)


def _end(run: Running) -> Done:
    """Wait for a run; its exit code is for the caller to judge."""
    try:
        code = run.process.wait(timeout=LIMIT_S)
    finally:
        run.kill()
    return Done(run.process.args, code, run.output)


def _state(clone: Clone) -> State:
    """Every record; each must be whole and good."""
    state = {}
    for path in record_paths(clone.raw(CAMPAIGN)):
        assert read_record(path).status == "ok"
        state[path.name] = (path.read_bytes(), path.stat().st_mtime_ns)
    return state


def _dag(clone: Clone, monkeypatch: pytest.MonkeyPatch, **config: object) -> Dag:
    monkeypatch.chdir(clone.root)
    return read_dag(clone.root, {"campaign": CAMPAIGN, **config})


def _said(clone: Clone) -> str:
    """What all attempts have said, from SLURM's logs: Snakemake empties a retried job's own."""
    logs = (clone.root / "logs/slurm").rglob("*.log")
    return "".join(path.read_text(errors="replace") for path in sorted(logs))


def _wait(run: Running, what: str, there: Callable[[], object]) -> None:
    until_s = time.monotonic() + LIMIT_S
    while not there():
        assert run.process.poll() is None, f"ended before {what}:\n{run.output}"
        assert time.monotonic() < until_s, f"no {what}:\n{run.output}"
        time.sleep(0.2)


def _assert_complete_and_kept(clone: Clone, before: State, output: str, cut_off: int = 0) -> None:
    """All is measured; what was there before is untouched; nothing was measured twice.

    Of ``cut_off`` attempts that were ended from outside, each may have written a record and not said so.
    """
    after = _state(clone)
    assert set(after) == NAMES, output
    assert {name: after[name] for name in before} == before
    # One log an attempt; that of a failed one has its words twice, as Snakemake shows them once more.
    logs = [path.read_text(errors="replace") for path in (clone.root / "logs/slurm").rglob("*.log")]
    said = {}
    for name in NAMES:
        pattern = rf"{FINISHED}, .*{re.escape(name)}"
        said[name] = sum(bool(re.search(pattern, log)) for log in logs)
    assert max(said.values()) == 1, f"{said}: {logs}"
    assert sum(said.values()) >= len(NAMES) - cut_off, f"{said}: {logs}"


@pytest.fixture
def one_batch(clone: Clone) -> Clone:
    """A clone with a campaign of four configurations in one batch, with some seconds for each."""
    vary = [{"height": height, "width": width} for height, width in SIZES]
    protocols = QUICK | {"idle_s": 3.0}
    clone.write_campaign(
        CAMPAIGN, protocols=protocols, experiments={"resolution": {**IN_CPU_SMALL, "vary": vary}}
    )
    return clone


# --- when nothing goes wrong ---------------------------------------------------------------------


def test_each_batch_has_one_gpu_and_what_was_predicted_for_it(
    clone: Clone, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One GPU a batch and one batch a GPU; all queued at once; requests, and results, as they should be."""
    clone.write_quick_campaign(CAMPAIGN, SIZES)
    run = _start(clone, tmp_path / "log", config=[ONE_EACH])
    done = _end(run)
    assert done.returncode == 0, done.stdout
    _assert_complete_and_kept(clone, {}, done.stdout)

    jobs, allocations = cluster.settled_jobs(), cluster.allocations()
    dag = _dag(clone, monkeypatch, measure={"batch_minutes": 0})
    wanted = [
        (dag.runtime_minutes(b.experiment, b.name), dag.host_memory_MB(b.experiment, b.name))
        for b in dag.plan.batches
    ]
    assert len(jobs) == len(dag.plan.batches) == len(SIZES)
    assert {job.gpus for job in jobs} == {"gres:gpu:1"}
    assert sorted((job.minutes, round(job.memory_MB)) for job in jobs) == sorted(wanted)

    last_submitted = max(job.submitted for job in jobs)
    assert all(job.ended >= last_submitted for job in jobs), "all wait in the queue together"
    assert {allocation.gpu for allocation in allocations} == {str(index) for index in range(GPUS)}
    assert {allocation.job for allocation in allocations} == {job.id for job in jobs}
    for gpu in range(GPUS):
        on_it = sorted((a.start_s, a.end_s) for a in allocations if a.gpu == str(gpu))
        assert all(end_s <= start_s for (_, end_s), (start_s, _) in pairwise(on_it)), on_it

    local = Clone.of_repository(tmp_path / "local")
    local.write_quick_campaign(CAMPAIGN, SIZES)
    here = local.snakemake("measure", "--cores", "1", "--config", f"campaign={CAMPAIGN}")
    assert here.returncode == 0, here.stdout
    assert set(_state(local)) == set(_state(clone))
    for name in NAMES:
        ours, theirs = (read_record(copy.raw(CAMPAIGN) / name) for copy in (clone, local))
        assert ours.configuration == theirs.configuration
        assert ours.environment.weights == theirs.environment.weights
        assert ours.windows.steps == theirs.windows.steps
        assert ours.spans.stage == theirs.spans.stage
    again = clone.snakemake(*_arguments(config=[ONE_EACH]))
    assert "Nothing to be done" in again.stdout


def test_a_campaign_on_gpus_asks_for_them_itself(
    clone: Clone, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No override: the rule and the profile alone. Without a driver here it cannot run, and says why."""
    vary = [{"height": 480, "width": 832}]
    experiments = {"resolution": {"vary": vary}}
    clone.write_campaign(CAMPAIGN, accelerator="h200", device="cuda", experiments=experiments)
    arguments = [part for part in _arguments("--retries", "0") if part not in WITH_GPU]
    run = Running(clone, sys.executable, "-m", "snakemake", *arguments, log=tmp_path / "log")
    done = _end(run)
    (job,) = cluster.jobs()
    dag = _dag(clone, monkeypatch)
    (batch,) = dag.plan.batches
    assert job.gpus == "gres:gpu:1"
    assert job.fields["NumCPUs"] == "8", "not as many as this host has"
    assert job.minutes == dag.runtime_minutes(batch.experiment, batch.name)
    assert job.memory_MB == pytest.approx(dag.host_memory_MB(batch.experiment, batch.name), rel=0.01)
    assert done.returncode != 0
    assert "no NVIDIA driver is installed" in done.stdout, done.stdout


# --- when something does -------------------------------------------------------------------------


def test_a_cancelled_batch_is_submitted_again_and_goes_on(
    one_batch: Clone, cluster: Cluster, tmp_path: Path
) -> None:
    """scancel of a running batch."""
    run = _start(one_batch, tmp_path / "log")
    _wait(run, "a record", lambda: FINISHED in _said(one_batch))
    before = _state(one_batch)
    (first,) = cluster.jobs()
    cluster.ask("scancel", first.id)
    done = _end(run)
    assert done.returncode == 0, done.stdout
    assert f"SLURM-job '{first.id}' failed, SLURM status is: 'CANCELLED'" in done.stdout
    assert [job.state for job in cluster.settled_jobs()] == ["CANCELLED", "COMPLETED"]
    assert 1 <= len(before) < len(NAMES)
    _assert_complete_and_kept(one_batch, before, done.stdout, cut_off=1)


def test_a_drained_node_ends_no_batch_and_takes_none(clone: Clone, cluster: Cluster, tmp_path: Path) -> None:
    """Batches that run go on, those in the queue wait until the node is back."""
    vary = [{"height": height, "width": width} for height, width in SIZES]
    protocols = QUICK | {"idle_s": 2.0}
    experiments = {"resolution": {**IN_CPU_SMALL, "vary": vary}}
    clone.write_campaign(CAMPAIGN, protocols=protocols, experiments=experiments)
    run = _start(clone, tmp_path / "log", config=[ONE_EACH])
    _wait(run, "a running batch", lambda: "RUNNING" in [job.state for job in cluster.jobs()])
    cluster.set_node("drain")
    _wait(run, "the end of what ran", lambda: len(cluster.jobs()) == 4 and not _states(cluster, *PASSING))
    states = [job.state for job in cluster.jobs()]
    assert set(states) == {"COMPLETED", "PENDING"}, states
    before = _state(clone)
    assert len(before) == states.count("COMPLETED")
    cluster.set_node("resume")
    done = _end(run)
    assert done.returncode == 0, done.stdout
    assert len(cluster.jobs()) == len(SIZES), "nothing was submitted twice"
    _assert_complete_and_kept(clone, before, done.stdout)


def _states(cluster: Cluster, *states: str) -> list[str]:
    """The jobs that are in one of the states."""
    return [job.id for job in cluster.jobs() if job.state in states]


def test_a_restarted_controller_is_waited_for(one_batch: Clone, cluster: Cluster, tmp_path: Path) -> None:
    """While it is away nobody can say how the batch is; the batch itself goes on."""
    run = _start(one_batch, tmp_path / "log")
    _wait(run, "a record", lambda: FINISHED in _said(one_batch))
    cluster.stop_controller()
    before = _state(one_batch)
    _wait(run, "another record", lambda: len(_state(one_batch)) > len(before))
    cluster.start_controller()
    done = _end(run)
    assert done.returncode == 0, done.stdout
    assert [job.state for job in cluster.settled_jobs()] == ["COMPLETED"]
    _assert_complete_and_kept(one_batch, before, done.stdout)


def test_a_batch_that_runs_into_its_time_limit_goes_on_with_more_time(
    clone: Clone, cluster: Cluster, tmp_path: Path
) -> None:
    """SLURM looks at limits twice a minute: after the first record the batch must take longer than both.

    The limit is set then, and not before: how long a batch takes to its first record is the machine's affair.
    """
    vary = [{"height": height, "width": width} for height, width in SIZES]
    protocols = QUICK | {"idle_s": 13.0}
    experiments = {"resolution": {**IN_CPU_SMALL, "vary": vary}}
    clone.write_campaign(CAMPAIGN, protocols=protocols, experiments=experiments)
    run = _start(clone, tmp_path / "log")
    _wait(run, "a record", lambda: FINISHED in _said(clone))
    (first,) = cluster.jobs()
    before = _state(clone)
    cluster.ask("scontrol", "update", f"jobid={first.id}", "timelimit=1")

    def over() -> bool:
        nonlocal before
        ended = bool(_states(cluster, "TIMEOUT"))
        before = before if ended else _state(clone)
        return ended

    _wait(run, "the limit", over)
    done = _end(run)
    assert done.returncode == 0, done.stdout
    assert f"SLURM-job '{first.id}' failed, SLURM status is: 'TIMEOUT'" in done.stdout
    states = [(job.state, job.minutes) for job in cluster.settled_jobs()]
    assert states == [("TIMEOUT", 1), ("COMPLETED", 2 * first.minutes)], "twice what was asked for at first"
    assert 1 <= len(before) < len(NAMES)
    _assert_complete_and_kept(clone, before, done.stdout, cut_off=1)


def test_a_batch_whose_node_fails_goes_on_when_it_is_back(
    one_batch: Clone, cluster: Cluster, tmp_path: Path
) -> None:
    """The node is cut off in the middle of a measurement; nobody but Snakemake starts the batch again."""
    run = _start(one_batch, tmp_path / "log")
    _wait(run, "a record", lambda: FINISHED in _said(one_batch))
    cluster.fail_node()
    before = _state(one_batch)
    (first,) = cluster.jobs()
    cluster.start_node()
    done = _end(run)
    assert done.returncode == 0, done.stdout
    assert f"SLURM-job '{first.id}' failed due to a node failure" in done.stdout
    assert [job.state for job in cluster.settled_jobs()] == ["NODE_FAIL", "COMPLETED"]
    assert 1 <= len(before) < len(NAMES)
    _assert_complete_and_kept(one_batch, before, done.stdout, cut_off=1)
