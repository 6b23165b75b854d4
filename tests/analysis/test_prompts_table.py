"""prompts.csv from rows whose spread and slope are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from t2v_energy.analysis.prompts import COLUMNS, prompts_numbers, prompts_table
from t2v_energy.config import load_model
from t2v_energy.errors import UserError
from t2v_energy.work import true_work

ROOT = Path(__file__).parents[2]
MOCHI = {
    "model": "mochi-1-preview", "height": 480, "width": 848, "num_frames": 79, "num_inference_steps": 64,
    "protocol": "sampled", "intervention": "", "status": "ok",
}  # fmt: skip
WAN = MOCHI | {"model": "wan2.1-t2v-1.3b", "width": 832, "num_frames": 33, "num_inference_steps": 50}


BOARD = {"gpu_uuids": "GPU-A"}


def row(
    prompt: str,
    latency_s: float,
    *,
    n: int = 1,
    std: float = np.nan,
    pass_means: object = np.nan,
    **changes: Any,
) -> dict[str, Any]:
    """One row of configurations.csv, of board A; energy is a fifth of latency."""
    costs = {"latency_s": latency_s, "latency_s_n": n, "latency_s_std": std}
    costs |= {"gpu_energy_Wh": latency_s / 5, "gpu_energy_Wh_n": n, "gpu_energy_Wh_std": std / 5}
    costs |= {"latency_s_pass_means": pass_means, "gpu_energy_Wh_pass_means": np.nan}
    setting = {"experiment": "prompts"} | BOARD | MOCHI | changes
    return {"configuration_id": f"{setting['model']}_p{prompt}"} | setting | costs


def records(
    rows: Sequence[dict[str, Any]], tokens: Sequence[int], steps: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """One record a row, of two generations of ``steps`` (2 each) after a warm-up of one."""
    return [
        {
            "configuration_id": row["configuration_id"],
            "prompt": {
                "id": row["configuration_id"].rpartition("_p")[2],
                "tokens": count,
                "padded_tokens": 256,
            },
            "windows": {"kind": ["warmup", "generation", "generation", "idle"], "steps": [1, run, run, 0]},
        }
        for row, count, run in zip(rows, tokens, steps or [2] * len(rows), strict=True)
    ]


def test_spread_over_prompts_and_slope_against_tokens() -> None:
    tokens, latency_s = [30, 35, 40, 46], [100.0, 100.4, 101.1, 101.5]
    rows = [row(f"p{i}", value) for i, value in enumerate(latency_s)]
    again = row("0", 100.0, n=3, std=0.5, experiment="cross-model")
    table = prompts_table(pd.DataFrame([*rows, again]), records(rows, tokens), ROOT)
    assert list(table.columns) == list(COLUMNS)
    assert list(table["quantity"]) == ["latency_s", "gpu_energy_Wh"]
    found = table.iloc[0]
    values = np.array(latency_s)
    assert found["configuration"] == "mochi-1-preview_480x848_79f_64s"
    assert (found["prompts"], found["tokens_least"], found["tokens_most"]) == (4, 30, 46)
    assert found["padded_tokens"] == 256
    assert found["mean"] == pytest.approx(values.mean())
    assert found["mean_ci95"] == pytest.approx(3.182446 * values.std(ddof=1) / 2)
    assert found["cv_percent"] == pytest.approx(100 * values.std(ddof=1) / values.mean())
    assert found["raw_cv_percent"] == found["cv_percent"]  # all on one board
    assert (found["boards"], found["left_out"]) == (1, "")
    assert np.isnan(found["board_range_percent"])
    for end, quantile in (("low", 9.348404), ("high", 0.2157953)):  # of chi-squared with 3 degrees of freedom
        assert found[f"cv_ci95_{end}"] == pytest.approx(found["cv_percent"] * np.sqrt(3 / quantile))
    assert found["range_percent"] == pytest.approx(150 / values.mean())
    assert (found["repeat_n"], found["repeat_of"]) == (3, "cross-model")
    assert found["repeat_std_percent"] == pytest.approx(0.5)
    slope, start = np.polyfit(tokens, 100 * values / values.mean(), 1)
    assert found["slope_percent_per_token"] == pytest.approx(slope)
    left = 100 * values / values.mean() - slope * np.array(tokens) - start
    error = np.sqrt((left**2).sum() / 2 / ((np.array(tokens) - np.mean(tokens)) ** 2).sum())
    assert found["slope_ci95_high"] == pytest.approx(slope + 4.302653 * error)
    assert found["slope_ci95_low"] == pytest.approx(slope - 4.302653 * error)
    assert table["cv_percent"].iloc[1] == pytest.approx(found["cv_percent"])  # energy is in proportion


def on_boards(latency_s: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Rows with these latencies on these boards."""
    placed = [(board, value) for board, values in latency_s.items() for value in values]
    return [row(f"p{i}", value, gpu_uuids=board) for i, (board, value) in enumerate(placed)]


def test_spread_and_slope_are_within_boards() -> None:
    tokens, on_a, on_b = [30, 34, 38, 40, 45], [100.0, 100.5, 100.7], [90.0, 90.4]
    rows = on_boards({"GPU-A": on_a, "GPU-B": on_b})
    found = prompts_table(pd.DataFrame(rows), records(rows, tokens), ROOT).iloc[0]
    values = np.array(on_a + on_b)
    left = np.concatenate([np.array(part) - np.mean(part) for part in (on_a, on_b)])
    std = np.sqrt((left**2).sum() / 3)
    assert (found["prompts"], found["boards"]) == (5, 2)
    assert found["mean"] == pytest.approx(values.mean())
    assert found["std"] == pytest.approx(std)
    assert found["cv_percent"] == pytest.approx(100 * std / values.mean())
    assert found["mean_ci95"] == pytest.approx(3.182446 * std / np.sqrt(5))
    assert found["range_percent"] == pytest.approx(100 * np.ptp(left) / values.mean())
    assert found["raw_cv_percent"] == pytest.approx(100 * values.std(ddof=1) / values.mean())
    assert found["raw_cv_percent"] > 10 * found["cv_percent"]
    assert found["board_range_percent"] == pytest.approx(
        100 * (np.mean(on_a) - np.mean(on_b)) / values.mean()
    )
    # the same line by least squares with an intercept for each board
    design = np.array([tokens, [1, 1, 1, 0, 0], [0, 0, 0, 1, 1]], dtype=float).T
    percent = 100 * values / values.mean()
    line, squares, _, _ = np.linalg.lstsq(design, percent, rcond=None)
    error = np.sqrt(squares[0] / 2 * np.linalg.inv(design.T @ design)[0, 0])
    assert found["slope_percent_per_token"] == pytest.approx(line[0])
    assert found["slope_ci95_high"] == pytest.approx(line[0] + 4.302653 * error)
    assert found["slope_ci95_low"] == pytest.approx(line[0] - 4.302653 * error)


def test_a_board_with_one_prompt_contributes_nothing_to_the_spread() -> None:
    tokens, on_a = [30, 34, 38, 40], [100.0, 100.5, 100.7, 100.4]
    alone = on_boards({"GPU-A": on_a})
    more = on_boards({"GPU-A": on_a, "GPU-B": [80.0]})
    before = prompts_table(pd.DataFrame(alone), records(alone, tokens), ROOT).iloc[0]
    after = prompts_table(pd.DataFrame(more), records(more, [*tokens, 60]), ROOT).iloc[0]
    assert (after["prompts"], after["boards"]) == (5, 2)
    assert after["std"] == pytest.approx(before["std"])
    per_token_s = [found["slope_percent_per_token"] * found["mean"] for found in (before, after)]
    assert per_token_s[1] == pytest.approx(per_token_s[0])


def test_boards_with_one_prompt_each_tell_no_spread() -> None:
    rows = on_boards({"GPU-A": [100.0], "GPU-B": [98.0], "GPU-C": [97.0]})
    table = prompts_table(pd.DataFrame(rows), records(rows, [30, 35, 40]), ROOT)
    unknown = ["std", "mean_ci95", "cv_percent", "cv_ci95_low", "range_percent", "slope_percent_per_token"]
    assert table[unknown].isna().all(axis=None)
    assert table["raw_cv_percent"].notna().all()
    numbers = prompts_numbers(table, "prompts.csv")
    assert numbers["models.prompts.mochi-1-preview.boards"].value == 3
    assert "models.prompts.mochi-1-preview.latency_cv" not in numbers


def test_two_passes_on_two_boards_are_a_board_of_their_own_in_either_order() -> None:
    rows = on_boards({"GPU-A;GPU-B": [100.0], "GPU-B;GPU-A": [100.5], "GPU-A;GPU-A": [99.0], "GPU-A": [99.2]})
    found = prompts_table(pd.DataFrame(rows), records(rows, [30, 35, 40, 45]), ROOT).iloc[0]
    assert found["boards"] == 2
    assert found["std"] == pytest.approx(np.sqrt((0.5**2 / 2 + 0.2**2 / 2) / 2))


def test_a_prompt_measured_on_two_boards_has_a_value_on_each() -> None:
    """It links them no more than the others: 30 and 45 tokens on A, 30, 35 and 40 on B."""
    placed = {"GPU-A": [99.2], "GPU-B": [90.5, 90.1]}
    both = row("both", 95.0, n=2, gpu_uuids="GPU-A;GPU-B;GPU-B", pass_means="99.0;90.9;91.1")
    rows = [both, *on_boards(placed)]
    found = prompts_table(pd.DataFrame(rows), records(rows, [30, 45, 35, 40]), ROOT).iloc[0]
    on_a, on_b = np.array([99.0, 99.2]), np.array([91.0, 90.5, 90.1])
    left = np.concatenate([on_a - on_a.mean(), on_b - on_b.mean()])
    assert (found["prompts"], found["boards"]) == (4, 2)
    assert found["std"] == pytest.approx(np.sqrt((left**2).sum() / 3))
    assert found["mean"] == pytest.approx(np.concatenate([on_a, on_b]).mean())


def test_passes_of_one_generation_each_are_no_repeats() -> None:
    rows = [row("p0", 100.0, n=2), row("p1", 101.0), row("p2", 101.0)]
    again = row("0", 100.0, n=3, std=0.5, experiment="cross-model")
    found = prompts_table(pd.DataFrame([*rows, again]), records(rows, [30, 35, 40]), ROOT).iloc[0]
    assert (found["repeat_n"], found["repeat_of"]) == (3, "cross-model")


def test_prompts_without_a_known_board_are_on_one() -> None:
    rows = [row(f"p{i}", value, gpu_uuids=np.nan) for i, value in enumerate([100.0, 100.4, 101.0])]
    found = prompts_table(pd.DataFrame(rows), records(rows, [30, 35, 40]), ROOT).iloc[0]
    assert found["boards"] == 1
    assert found["std"] == pytest.approx(np.std([100.0, 100.4, 101.0], ddof=1))


@pytest.mark.parametrize(
    ("steps", "left_out"),
    [([12, 12, 7, 12], "p2"), ([7, 12, 7, 7], "p1"), ([7, 12, 7, 12], "p0;p2"), ([2, 2, 2, 2], "")],
)
def test_a_prompt_that_ran_another_number_of_steps_is_left_out(steps: list[int], left_out: str) -> None:
    tokens, latency_s = [30, 35, 40, 46], [100.0, 100.4, 98.0, 100.1]
    rows = [row(f"p{i}", value) for i, value in enumerate(latency_s)]
    table = prompts_table(pd.DataFrame(rows), records(rows, tokens, steps), ROOT)
    kept = [i for i in range(4) if f"p{i}" not in left_out.split(";")]
    values = np.array(latency_s)[kept]
    assert list(table["left_out"]) == [left_out] * 2
    found = table.iloc[0]
    assert found["prompts"] == len(kept)
    assert found["mean"] == pytest.approx(values.mean())
    assert found["std"] == pytest.approx(values.std(ddof=1))
    assert found["tokens_most"] == max(tokens[i] for i in kept)
    numbers = prompts_numbers(table, "prompts.csv")
    assert numbers["models.prompts.mochi-1-preview.left_out"].value == 4 - len(kept)


def test_work_of_a_model_that_drops_padding_grows_with_the_prompt_and_of_others_not() -> None:
    mochi, wan = ([row(f"p{i}", 100.0 + i, **setting) for i in range(3)] for setting in (MOCHI, WAN))
    held = records([*mochi, *wan], [30, 40, 50] * 2)
    table = prompts_table(pd.DataFrame([*mochi, *wan]), held, ROOT)
    work = table.groupby("model")["work_percent_per_token"].first()
    sizes = (480, 848, 79, 64)
    short, long = (
        true_work(load_model(ROOT, "mochi-1-preview"), *sizes, prompt_tokens=count).total_flop
        for count in (30, 50)
    )
    assert work["mochi-1-preview"] == pytest.approx(5 * (long / short - 1))
    assert work["mochi-1-preview"] > 0
    assert work["wan2.1-t2v-1.3b"] == 0


def test_repeats_within_the_experiment_come_first_and_are_pooled() -> None:
    rows = [row("a", 100.0, n=2, std=0.3), row("b", 100.0, n=3, std=0.6), row("c", 100.0, n=1)]
    again = row("0", 100.0, n=3, std=9.0, experiment="cross-model")
    found = prompts_table(pd.DataFrame([*rows, again]), records(rows, [30, 31, 33]), ROOT).iloc[0]
    pooled = np.sqrt((1 * 0.3**2 + 2 * 0.6**2) / 3)
    assert found["repeat_std_percent"] == pytest.approx(pooled / np.sqrt(2))
    assert (found["repeat_n"], found["repeat_of"]) == (5, "prompts")


def test_a_single_prompt_has_no_interval_and_gives_no_slope() -> None:
    rows = [row("a", 100.0)]
    table = prompts_table(pd.DataFrame(rows), records(rows, [30]), ROOT)
    assert table[["std", "mean_ci95", "slope_percent_per_token", "repeat_std_percent"]].isna().all(axis=None)
    numbers = prompts_numbers(table, "prompts.csv")
    assert numbers["models.prompts.mochi-1-preview.prompts"].value == 1
    assert not any("slope" in key or "cv" in key for key in numbers)


def test_a_campaign_without_the_experiment_has_no_rows() -> None:
    table = prompts_table(pd.DataFrame([row("a", 1.0, experiment="cross-model")]), [], ROOT)
    assert table.empty
    assert list(table.columns) == list(COLUMNS)
    assert prompts_numbers(table, "prompts.csv") == {}


def test_a_row_without_its_record_is_refused() -> None:
    rows = [row("a", 100.0), row("b", 100.0)]
    with pytest.raises(UserError, match="no record of mochi-1-preview_pb"):
        prompts_table(pd.DataFrame(rows), records(rows[:1], [30]), ROOT)


def test_numbers_have_the_interval_and_what_work_predicts() -> None:
    rows = [row(f"p{i}", value) for i, value in enumerate([100.0, 100.4, 101.1, 101.5])]
    numbers = prompts_numbers(
        prompts_table(pd.DataFrame(rows), records(rows, [30, 35, 40, 46]), ROOT), "f.csv"
    )
    prefix = "models.prompts.mochi-1-preview.latency"
    slope = numbers[f"{prefix}_slope"]
    assert slope.kind == "measured"
    assert slope.interval is not None
    assert 0 < slope.interval[0] < float(slope.value) < slope.interval[1]
    assert numbers[f"{prefix}_slope_of_work"].kind == "modelled"
    spread = numbers[f"{prefix}_cv"]
    assert spread.interval is not None
    assert 0 < spread.interval[0] < float(spread.value) < spread.interval[1]
    assert numbers["models.prompts.mochi-1-preview.boards"].value == 1
    assert f"{prefix}_repeat_std" not in numbers
