"""The meter against the truth: every trace, every tick period, through the real pynvml and polling loop."""

from typing import Any

import pytest
from t2v_energy.metering.accuracy import TICKS_S, WINDOWS_S, accuracy_table

pytest.importorskip("pynvml")
COLUMNS = ["method", "window_s", "trace", "median_error_percent", "p95_error_percent", "coverage_90", "n"]


@pytest.fixture(scope="module")
def table() -> list[dict[str, Any]]:
    return accuracy_table()


def rows(table: list[dict[str, Any]], method: str) -> list[dict[str, Any]]:
    return [row for row in table if row["method"] == method]


def test_the_table_is_whole(table: list[dict[str, Any]]) -> None:
    assert len(table) == 4 * 5 * len(TICKS_S) * len(WINDOWS_S)
    assert all(list(row) == COLUMNS and row["n"] >= 30 for row in table)
    assert {row["trace"] for row in table} >= {
        f"{trace}, {tick} ms" for trace in ("constant", "ramp", "step", "denoising") for tick in (20, 50, 100)
    }


def test_median_error_is_at_most_one_percent(table: list[dict[str, Any]]) -> None:
    assert [row for row in rows(table, "change_point") if row["median_error_percent"] > 1] == []


def test_even_the_95th_percentile_is_small(table: list[dict[str, Any]]) -> None:
    for row in rows(table, "change_point"):
        assert row["p95_error_percent"] <= (1.5 if row["trace"].startswith("rippled") else 0.2), row


def test_intervals_hold_the_truth(table: list[dict[str, Any]]) -> None:
    assert [row for row in rows(table, "change_point") if row["coverage_90"] < 0.9] == []


def test_it_beats_the_plain_ways_where_it_matters(table: list[dict[str, Any]]) -> None:
    def error(method: str) -> float:
        (row,) = [
            r for r in rows(table, method) if r["trace"] == "denoising, 100 ms" and r["window_s"] == 0.4
        ]
        return float(row["median_error_percent"])

    assert error("change_point") < error("linear") / 10 < error("nearest_tick") / 10
