"""benchmarks/two_gpus.py in small: where it says that the time went, and a real run on the CPU."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from statistics import mean
from types import ModuleType

import pytest
from clone import IN_CPU_SMALL, QUICK, Clone

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)  # it imports its neighbour, as a script does
    return importlib.import_module("two_gpus")


def test_time_is_shared_among_batches_waiting_and_the_rest(two_gpus: ModuleType) -> None:
    # 3 s before; two at once for 4 s, one of them for 2 s more; 1 s of neither; one for 5 s; 2 s after.
    run, batches = (10.0, 27.0), [(20.0, 25.0), (13.0, 17.0), (13.0, 19.0)]
    found = two_gpus.shares(run, batches, 2)
    assert found.wall_s == pytest.approx(17)
    assert found.outside_s == pytest.approx(3 + 1 + 2)
    assert found.idle_gpu_s == pytest.approx(2 + 5)
    assert found.batches_s == pytest.approx([4, 6, 5])
    whole_s = found.outside_s + (sum(found.batches_s) + found.idle_gpu_s) / 2
    assert whole_s == pytest.approx(found.wall_s)


def test_on_one_gpu_nothing_waits(two_gpus: ModuleType) -> None:
    found = two_gpus.shares((0.0, 10.0), [(1.0, 4.0), (4.5, 9.0)], 1)
    assert found.idle_gpu_s == pytest.approx(0)
    assert found.outside_s == pytest.approx(2.5)


def test_its_sizes_cost_the_same(two_gpus: ModuleType) -> None:
    assert len(set(two_gpus.SIZES)) == 8
    assert len({height * width for height, width in two_gpus.SIZES}) == 1
    assert all(height % 16 == width % 16 == 0 for height, width in two_gpus.SIZES), "as its model needs"


def test_the_document_says_what_was_measured(two_gpus: ModuleType) -> None:
    """docs/scale.md and README.md, of the two runs beside the script."""
    names = ("two_gpus", "two_gpus_short")
    long, short = (json.loads((BENCHMARKS / f"{name}.json").read_text("utf-8")) for name in names)
    text = " ".join((BENCHMARKS.parent / "docs" / "scale.md").read_text("utf-8").split())
    for run, sentence in (
        (long, "took {:.1f} s on one GPU and {:.1f} s on both, {:.3f} as long; the budget is"),
        (short, "took {:.1f} s on one GPU and {:.1f} s on both, {:.3f} as long, since"),
    ):
        one_s, both_s = (run["by_gpus"][gpus]["wall_s"] for gpus in "12")
        assert run["ratio"] == both_s / one_s
        assert sentence.format(one_s, both_s, run["ratio"]) in text
    assert long["ratio"] < two_gpus.BUDGET < short["ratio"]
    assert [len(run["by_gpus"]["2"]["batches_s"]) for run in (long, short)] == [2, 8]
    assert [run["by_gpus"]["2"]["boards"] for run in (long, short)] == [2, 2]
    for sentence, part in (
        ("{:.1f} and {:.1f} s went until its first record", "start_s"),
        ("{:.1f} and {:.1f} s were measuring", "measuring_s"),
    ):
        means_s = [mean(batch[part] for batch in long["by_gpus"][gpus]["batches"]) for gpus in "12"]
        assert sentence.format(*means_s) in text
    for run, sentence in (
        (long, "took {:.1f} s alone and {:.1f} s beside another, of which"),
        (short, "took {:.1f} s alone and {:.1f} s beside another."),
    ):
        assert sentence.format(*(mean(run["by_gpus"][gpus]["batches_s"]) for gpus in "12")) in text
    outside_s = [long["by_gpus"][gpus]["outside_s"] for gpus in "12"]
    assert "in {:.1f} and {:.1f} s of these".format(*outside_s) in text
    readme = " ".join((BENCHMARKS.parent / "README.md").read_text("utf-8").split())
    assert f"take {long['ratio']:.3f} of the time on two GPUs" in readme


def test_a_real_run_tells_what_its_batches_took(
    two_gpus: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a `t2v-energy` on the PATH, the package being on PYTHONPATH alone."""
    clone = Clone(tmp_path / "a copy")
    two_gpus.copy_of_repository(clone.root)
    vary = [{"height": 16, "width": 16}]
    experiments = {two_gpus.EXPERIMENTS[0]: {**IN_CPU_SMALL, "vary": vary}}
    clone.write_campaign(two_gpus.CAMPAIGN, protocols=QUICK, experiments=experiments)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert shutil.which("t2v-energy") is None
    found, where, boards = two_gpus.measured(clone.root, 1, len(vary), 1, 0)
    assert boards == [], "the CPU is none"
    (batch,) = where
    assert batch.start_s > 1, "starting Python and torch alone takes longer"
    assert 0 < batch.generations_s < batch.measuring_s
    assert 0 < batch.end_s < batch.start_s
    assert batch.start_s + batch.measuring_s + batch.end_s == pytest.approx(found.batches_s[0])
    assert len(found.batches_s) == len(vary)
    assert found.outside_s > 0
    assert found.idle_gpu_s == pytest.approx(0, abs=0.01)
    assert sum(found.batches_s) + found.outside_s == pytest.approx(found.wall_s, abs=0.01)
