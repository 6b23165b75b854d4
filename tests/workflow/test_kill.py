"""Measuring that is killed or interrupted loses the configuration in flight, and nothing else."""

from __future__ import annotations

import hashlib
import json
import random
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from clone import Clone, Running
from t2v_energy.measurement.record import read_record, record_paths

CAMPAIGN = "quick"
SIZES = [(16 * i, 16 * j) for i in range(1, 5) for j in range(1, 5)]
NAMES = [f"tiny-wan_{height}x{width}_5f_2s__sampled_r1.json" for height, width in SIZES]
MEASURE = ("t2v-energy", "measure", "--campaign", CAMPAIGN)
WARM, FINISHED = "warmup of", "→ ok"  # what the runner says after a warm-up, and with a record on the disk
KILLS = 10
WHILE_STARTING = (2, 7)  # these kills come while Python is importing or the pipeline is built

State = dict[str, tuple[bytes, int, int]]  # by record: content, time of writing, inode


@pytest.fixture
def quick(clone: Clone) -> Clone:
    """A clone with a campaign of sixteen small configurations, ready to be measured."""
    clone.write_quick_campaign(CAMPAIGN, SIZES)
    out = f"results/prompts/{CAMPAIGN}.jsonl"
    done = clone.t2v("prompts", "--settings", json.dumps({"campaign": CAMPAIGN}), "--out", out)
    assert done.returncode == 0, done.stderr
    return clone


def _state(clone: Clone) -> State:
    """Every record that is there; each must be whole, and nothing else may bear a record's name."""
    state = {}
    for path in record_paths(clone.raw(CAMPAIGN)):
        assert read_record(path).status == "ok"
        state[path.name] = (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino)
    strange = {
        path.name
        for path in clone.raw(CAMPAIGN).glob("*")
        if path.is_file() and path.name not in state and not re.fullmatch(r"\..+\.\d+\.tmp", path.name)
    }
    assert not strange
    return state


def _assert_kept(before: State, after: State) -> None:
    for name, was in before.items():
        assert after.get(name) == was, f"{name} was finished, and was written again or lost"


def _assert_complete(clone: Clone, output: str) -> None:
    """The batch is whole: its index has the checksum of each record, and stage 3 reads them."""
    assert [path.name for path in record_paths(clone.raw(CAMPAIGN))] == sorted(NAMES), output
    (index,) = (clone.raw(CAMPAIGN) / "batches").glob("*.json")
    for entry in json.loads(index.read_text())["records"]:
        content = (clone.raw(CAMPAIGN) / entry["record"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]


def test_ten_kills_lose_and_repeat_nothing_finished(quick: Clone, tmp_path: Path) -> None:
    """kill -9 of the whole process group at ten random moments, then a run to the end."""
    dice = random.Random(20251121)
    state: State = {}
    said = ""
    for kill in range(KILLS):
        run = Running(quick, *MEASURE, log=tmp_path / f"kill{kill}.log")
        if kill in WHILE_STARTING:
            time.sleep(dice.uniform(0.0, 3.0))
        else:
            _wait_for_some_moment(run, dice)
        time.sleep(dice.uniform(0.0, 0.6))
        assert run.process.poll() is None, f"ended before kill {kill}:\n{run.output}"
        run.kill()
        said += run.output
        after = _state(quick)
        _assert_kept(state, after)
        state = after
    assert 2 <= len(state) < len(SIZES), "the kills did not hit the middle"
    print(f"{len(state)} of {len(SIZES)} configurations finished before the tenth kill")

    pending = next(name for name in NAMES if name not in state)
    leftover = quick.raw(CAMPAIGN) / f".{pending}.1.tmp"
    leftover.write_text('{"schema_version": 1, "camp', encoding="utf-8")  # of a writer that was killed
    done = quick.run(*MEASURE)
    assert done.returncode == 0, done.stderr
    assert f"{len(SIZES)} configurations, {len(state)} already measured" in done.stderr
    _assert_kept(state, _state(quick))
    _assert_complete(quick, done.stderr)
    said += done.stderr
    for name in NAMES:
        # 0: killed between the record's rename and the line that tells of it
        assert len(re.findall(rf"{FINISHED}, .*{re.escape(name)}", said)) <= 1

    tables = ("--parquet", "results/a.parquet", "--csv", "results/a.csv")
    done = quick.t2v("aggregate", "--campaign", CAMPAIGN, *tables)
    assert done.returncode == 0, done.stderr
    assert leftover.exists(), "what is not a record is left alone"


def _wait_for_some_moment(run: Running, dice: random.Random) -> None:
    """Until none, one or two of what was left are finished: what time that takes depends on the machine."""
    finished = dice.choice((0, 0, 1, 1, 2))
    if finished:
        run.wait_for(FINISHED, finished)
    else:
        run.wait_for(WARM)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_writer_killed_while_it_writes_leaves_no_half_record(clone: Clone, call: str) -> None:
    """The narrowest moments, which random kills hardly ever hit."""
    name = NAMES[0]
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from t2v_energy.measurement.record import write_atomically\n"
        f"os.{call} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomically(Path(sys.argv[1]), '{' * 1_000_000)\n"
    )
    folder = clone.raw(CAMPAIGN)
    done = clone.run(sys.executable, "-c", code, str(folder / name))
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = folder.iterdir()
    assert re.fullmatch(rf"\.{re.escape(name)}\.\d+\.tmp", left.name)
    assert record_paths(folder) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupt_ends_with_130_and_keeps_what_is_finished(
    quick: Clone, tmp_path: Path, number: signal.Signals
) -> None:
    """Ctrl-C, and SIGTERM as clusters send it: a clear message, finished records kept."""
    run = Running(quick, *MEASURE, log=tmp_path / "log")
    run.wait_for(FINISHED)
    time.sleep(0.5)
    before = _state(quick)
    run.signal_group(number)
    assert run.process.wait(timeout=120) == 130, run.output
    assert "interrupted; finished configurations are kept" in run.output
    assert "Traceback" not in run.output
    _assert_kept(before, _state(quick))
    assert 1 <= len(_state(quick)) < len(SIZES)


def test_ctrl_c_in_the_workflow_keeps_records_and_says_so(quick: Clone, tmp_path: Path) -> None:
    """Snakemake deletes the outputs of the job that it ends: the index, but no record."""
    command = (sys.executable, "-m", "snakemake", "measure", "--config", f"campaign={CAMPAIGN}")
    run = Running(quick, *command, log=tmp_path / "log")
    run.wait_for(FINISHED)
    before = _state(quick)
    run.signal_group(signal.SIGINT)
    assert run.process.wait(timeout=240) != 0
    _assert_kept(before, _state(quick))
    (log,) = (quick.root / "logs/measure" / CAMPAIGN).rglob("*.log")
    assert "interrupted; finished configurations are kept" in log.read_text()

    done = quick.snakemake("measure", "--config", f"campaign={CAMPAIGN}")
    assert done.returncode == 0, done.stdout
    _assert_kept(before, _state(quick))
    _assert_complete(quick, done.stdout)
