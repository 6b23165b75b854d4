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


def row(prompt: str, latency_s: float, *, n: int = 1, std: float = np.nan, **changes: Any) -> dict[str, Any]:
    """One row of configurations.csv; energy is a fifth of latency."""
    costs = {"latency_s": latency_s, "latency_s_n": n, "latency_s_std": std}
    costs |= {"gpu_energy_Wh": latency_s / 5, "gpu_energy_Wh_n": n, "gpu_energy_Wh_std": std / 5}
    setting = {"experiment": "prompts"} | MOCHI | changes
    return {"configuration_id": f"{setting['model']}_p{prompt}"} | setting | costs


def records(rows: Sequence[dict[str, Any]], tokens: Sequence[int], padded: int = 256) -> list[dict[str, Any]]:
    return [
        {
            "configuration_id": row["configuration_id"],
            "prompt": {"id": "x", "tokens": count, "padded_tokens": padded},
        }
        for row, count in zip(rows, tokens, strict=True)
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
    assert f"{prefix}_repeat_std" not in numbers
