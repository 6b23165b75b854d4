"""What the user sees while a batch is measured."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path

import pytest
import tiny
from records import make_record, out_of_memory
from t2v_energy.measurement import progress as module
from t2v_energy.measurement.progress import Progress
from t2v_energy.measurement.validity import Finding
from t2v_energy.plan import Batch, make_plan


class Clock:
    """A monotonic clock that a test moves."""

    now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    """Three configurations of 10, 20 and 30 predicted seconds."""
    root = tiny.make_root(tmp_path)
    (one,) = make_plan(root, tiny.settings(root)).batches
    items = [dataclasses.replace(item, measure_s=10.0 * (i + 1)) for i, item in enumerate(one.items)]
    return dataclasses.replace(one, items=tuple(items))


def seconds(text: str, before: str) -> int:
    found = re.search(rf"{before} (\d+) s", text)
    assert found, text
    return int(found[1])


def test_the_beginning_tells_what_is_left(batch: Batch) -> None:
    log = io.StringIO()
    Progress(log).begin(batch, list(batch.items[1:]))
    assert log.getvalue() == (
        f"batch resolution/{batch.name}: 3 configurations, 1 already measured; about 50 s to go (modelled)\n"
    )


def test_time_left_follows_the_prediction_then_what_was_measured(batch: Batch, clock: Clock) -> None:
    log = io.StringIO()
    progress = Progress(log)
    first, second, third = batch.items
    progress.begin(batch, list(batch.items))
    progress.started(first)
    assert f"{first.configuration_id} (sampled, about 10 s)" in log.getvalue()
    clock.now_s += 5
    progress.generation(first, "warmup of 1 steps took 5.0 s")
    line = log.getvalue().splitlines()[-1]
    assert line == "  warmup of 1 steps took 5.0 s; 5 s measured, about 55 s left"
    clock.now_s += 15  # twice as long as predicted
    progress.finished(first, make_record(), [])
    progress.started(second)
    assert f"{second.configuration_id} (sampled, about 40 s)" in log.getvalue()
    progress.generation(second, "x")
    assert seconds(log.getvalue().splitlines()[-1], "about") == 100
    clock.now_s += 1000
    progress.generation(second, "x")
    assert seconds(log.getvalue().splitlines()[-1], "about") == 0
    progress.finished(second, make_record(), [])
    progress.started(third)
    # 2 and 50 times what was predicted: the median of two is their mean
    assert seconds(log.getvalue().splitlines()[-1], r"\(sampled, about") == 30 * 26


def test_what_an_item_should_take_follows_what_was_measured(batch: Batch, clock: Clock) -> None:
    """By it the runner decides what still fits into the time that it is given."""
    progress = Progress(io.StringIO())
    first, second, third = batch.items
    progress.begin(batch, list(batch.items))
    assert [progress.expected_s(item) for item in batch.items] == [10, 20, 30]
    for item, took_s, expected_s in ((first, 25, 75), (second, 5, 41.25)):
        progress.started(item)
        clock.now_s += took_s
        progress.finished(item, make_record(), [])
        assert progress.expected_s(third) == pytest.approx(expected_s)


def test_one_that_took_minutes_says_nothing_of_the_others(batch: Batch, clock: Clock) -> None:
    """As a configuration that compiles does."""
    progress = Progress(io.StringIO())
    progress.begin(batch, list(batch.items))
    for item, took_s in zip(batch.items, (11, 20, 600), strict=True):
        progress.started(item)
        clock.now_s += took_s
        progress.finished(item, make_record(), [])
    assert progress.expected_s(batch.items[0]) == pytest.approx(11)


def test_what_was_left_for_another_time_is_not_to_go(batch: Batch, clock: Clock) -> None:
    log = io.StringIO()
    progress = Progress(log)
    first, second, third = batch.items
    progress.begin(batch, list(batch.items))
    progress.left_out(first)
    progress.left_out(third)
    line = f"{third.configuration_id} (sampled): left for another time"
    assert log.getvalue().splitlines()[-1] == line
    progress.started(second)
    clock.now_s += 5
    progress.generation(second, "x")
    assert seconds(log.getvalue().splitlines()[-1], "about") == 15


def test_watts_where_a_gpu_tells_them(batch: Batch) -> None:
    log = io.StringIO()
    progress = Progress(log)
    progress.begin(batch, list(batch.items))
    progress.started(batch.items[0])
    progress.generation(batch.items[0], "x")
    assert "W now" not in log.getvalue()
    progress.watts = lambda: 612.4
    progress.generation(batch.items[0], "x")
    assert log.getvalue().splitlines()[-1].endswith("left, 612 W now")


def test_a_record_and_what_is_wrong_with_it(batch: Batch) -> None:
    log = io.StringIO()
    progress = Progress(log)
    progress.begin(batch, list(batch.items))
    for item, record in zip(batch.items, (make_record(), out_of_memory()), strict=False):
        progress.started(item)
        findings = [Finding("gpu_name", "ok", "x"), Finding("step_sem", "flag", "0.5 %, limit [0.3] %")]
        progress.finished(item, record, findings)
    text = log.getvalue()
    assert f"  → ok, 0 s, {make_record().file_name}\n" in text
    assert "  → out_of_memory, 0 s, " in text
    assert "  ! flag: step_sem: 0.5 %, limit [0.3] %\n" in text  # brackets are no markup
    assert "gpu_name" not in text


def test_on_a_terminal_a_bar_grows(batch: Batch, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")  # without colours only what is done is drawn
    log = Terminal()
    progress = Progress(log)
    progress.begin(batch, list(batch.items))
    progress.started(batch.items[0])
    lengths = []
    for measured_s in (0, 30, 1000):
        clock.now_s = 100.0 + measured_s
        progress.generation(batch.items[0], "x")
        line = log.getvalue().splitlines()[-1]
        assert f"x; {measured_s} s measured, about {max(60 - measured_s, 0)} s left" in line
        lengths.append(line.count("━"))
    assert lengths == [0, 12, 24]


def test_lines_go_to_stderr_by_default(batch: Batch, capsys: pytest.CaptureFixture[str]) -> None:
    Progress().say("one [bold]line[/bold] " + "x" * 300)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "one [bold]line[/bold] " + "x" * 300 + "\n"
