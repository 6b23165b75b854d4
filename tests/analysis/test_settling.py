"""How loops begin under a power limit: a planted overshoot must come out again."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
import records
from t2v_energy.analysis.settling import BIN_S, COLUMNS, settling_numbers, settling_table
from t2v_energy.analysis.settling_figure import figure_settling
from t2v_energy.measurement.composition import generations
from t2v_energy.measurement.record import Record, to_json

SETTLED_MHZ, FIRST_MHZ = 1500, 1650


def overshooting(steps: int = 12, **changes: Any) -> Record:
    """A record whose clock is 10 % higher for the first half second of each loop."""
    record = records.make_record(steps=steps, **changes)
    if record.samples is None:
        return record
    time_s = np.asarray(record.samples.time_s)
    clock = np.full(len(time_s), SETTLED_MHZ)
    for generation in generations(record.windows, record.spans):
        since_s = time_s - generation.loop_start_s
        clock[(since_s >= -1e-9) & (since_s < 0.5 - 1e-9)] = FIRST_MHZ
    samples = record.samples.model_copy(update={"sm_clock_MHz": clock.tolist()})
    return record.model_copy(update={"samples": samples})


def table_of(*made: Record) -> pd.DataFrame:
    return settling_table(json.loads(to_json(record)) for record in made)


def test_the_planted_overshoot() -> None:
    found = table_of(overshooting())
    assert tuple(found.columns) == COLUMNS
    assert found["from_s"].to_list() == [number * BIN_S for number in range(20)]
    assert set(found["generations"]) == {3}
    # samples come every 50 ms, so one of a bin may fall on its other side
    assert found["clock_percent"].iloc[:2].to_numpy() == pytest.approx(110, abs=2.1)
    assert found["clock_percent"].iloc[3:].to_numpy() == pytest.approx(100)
    assert found["power_W"].iloc[1:].to_numpy() == pytest.approx(records.LOOP_W)


def test_short_loops_and_those_that_no_limit_holds_are_left_out() -> None:
    assert table_of(overshooting(steps=7)).empty  # 3.5 s
    assert len(table_of(overshooting(steps=9)))  # 4.5 s
    assert table_of(overshooting(reasons=0)).empty
    assert table_of(overshooting(gpu=None)).empty
    assert table_of(records.out_of_memory()).empty


def test_sensors_that_are_missing_are_left_out() -> None:
    record = overshooting()
    assert record.samples is not None
    blind = record.samples.model_copy(update={"sm_clock_MHz": [None] * len(record.samples.time_s)})
    assert table_of(record.model_copy(update={"samples": blind})).empty


def test_numbers_before_and_after_the_limit() -> None:
    table = table_of(overshooting())
    found = settling_numbers(table, "settling.csv")
    value = {key.removeprefix("validation.settling."): float(number.value) for key, number in found.items()}
    assert value["generations"] == 3
    assert value["limit"] == 2
    assert value["before"] == pytest.approx(10, abs=0.1)
    assert value["after"] == pytest.approx(0, abs=0.01)
    assert value["first_second"] == pytest.approx(5, abs=1.1)
    assert value["later_seconds"] == pytest.approx(0, abs=0.01)
    assert settling_numbers(table.iloc[:0], "settling.csv") == {}


def test_the_figure_shows_both_panels_or_says_why_not() -> None:
    table = table_of(overshooting())
    shown = figure_settling(table)
    assert [axes.get_ylabel()[:3] for axes in shown.axes] == ["SM ", "GPU"]
    for axes in shown.axes:
        assert axes.get_xlim() == (0, 5)
    empty = figure_settling(table.iloc[:0])
    assert not empty.axes
    assert "power limit" in empty.texts[0].get_text()
