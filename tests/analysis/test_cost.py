"""What measuring cost: planted seconds, joules and pauses come back; theirs is seven videos each."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from math import isnan, nan, sqrt
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import records as planted
from t2v_energy.analysis import cost
from t2v_energy.analysis.tables import write_csvs
from t2v_energy.grids import Grid

START = datetime(2025, 11, 21, tzinfo=UTC)
WARMUP_S = planted.ONCE_S + 0.5
GENERATION_S = planted.ONCE_S + 4 * 0.5
GPU_S = 2 * planted.IDLE_S + WARMUP_S + 3 * GENERATION_S + 3 * planted.PAUSE_S
LAST_S = planted.MARGIN_S + GPU_S
"""End of a record's last window after its origin."""


def record(after_s: float = 0.0, *, pass_index: int = 1, **changes: Any) -> dict[str, Any]:
    """Three generations of four steps; the origin ``after_s`` seconds after the first."""
    utc = (START + timedelta(seconds=after_s)).isoformat()
    made = planted.make_record(pass_index=pass_index, **changes)
    found: dict[str, Any] = made.model_dump(mode="json")
    found["origin"]["utc"] = utc
    return found


def sized(height: int, width: int) -> Any:
    return planted.configuration(height=height, width=width)


def configurations(*rows: tuple[str, float], ci95: float = 1.0, protocol: str = "sampled") -> pd.DataFrame:
    """Rows with this id and latency (s), at 3600 W: as many Wh as seconds."""
    return pd.DataFrame(
        [
            {"configuration_id": key, "status": "ok", "latency_s": s, "latency_s_ci95": ci95,
             "gpu_energy_Wh": s, "protocol": protocol}
            for key, s in rows
        ]
    )  # fmt: skip


ID = planted.configuration().id()


def test_a_records_seconds_and_joules_are_split_as_they_ran() -> None:
    row = cost.record_costs({"resolution": [record()]}).iloc[0]
    assert row["gpu_s"] == pytest.approx(GPU_S)
    assert row["idle_s"] == pytest.approx(2 * planted.IDLE_S)
    assert row["warmup_s"] == pytest.approx(WARMUP_S)
    assert row["measured_s"] == pytest.approx(3 * GENERATION_S)
    assert row["idle_J"] == pytest.approx(2 * planted.IDLE_S * planted.IDLE_W, rel=1e-3)
    loop_J = planted.LOOP_W * 0.5
    assert row["warmup_J"] == pytest.approx(planted.ONCE_J + loop_J, rel=1e-3)
    assert row["measured_J"] == pytest.approx(3 * (planted.ONCE_J + 4 * loop_J), rel=1e-3)
    pauses_J = 3 * planted.PAUSE_S * planted.IDLE_W
    parts_J = row["idle_J"] + row["warmup_J"] + row["measured_J"]
    assert row["gpu_J"] == pytest.approx(parts_J + pauses_J, rel=1e-3)


def test_a_pause_tells_processes_apart() -> None:
    costs = cost.record_costs(
        {"resolution": [record(0), record(LAST_S + 0.3, pass_index=2)], "frames": [record(200.0)]}
    )
    assert costs["new_process"].tolist() == [True, False, True]
    assert costs["pause_s"].iloc[1] == pytest.approx(0.3)
    assert cost.start_up_s(costs) == pytest.approx(200 - 2 * LAST_S - 0.3)


def test_another_board_is_another_process_and_tells_no_pause() -> None:
    other = record(LAST_S + 0.3)
    other["environment"]["gpu"]["uuid"] = "GPU-1"
    costs = cost.record_costs({"resolution": [record(), other]})
    assert costs["new_process"].all()
    assert isnan(cost.start_up_s(costs))


def test_theirs_is_seven_videos_a_configuration() -> None:
    table = cost.cost_table({"resolution": [record()]}, configurations((ID, 100.0)))
    row = table.set_index("set").loc["resolution"]
    assert row["protocol_gpu_s"] == pytest.approx(700)
    assert row["protocol_gpu_s_ci95"] == pytest.approx(7)
    assert row["protocol_gpu_energy_Wh"] == pytest.approx(700)
    assert row["ratio_gpu_s"] == pytest.approx(700 / GPU_S)
    assert (row["kind"], row["protocol_kind"]) == ("measured", "modelled")


def test_all_passes_are_ours_and_one_protocol_run_is_theirs() -> None:
    both = [record(), record(LAST_S + 1, pass_index=2)]
    row = cost.cost_table({"resolution": both}, configurations((ID, 100.0))).iloc[0]
    assert row["gpu_s"] == pytest.approx(2 * GPU_S)
    assert row["records"] == 2
    assert row["protocol_gpu_s"] == pytest.approx(700)
    assert row["gpu_s_one_pass"] == pytest.approx(GPU_S)
    assert row["ratio_gpu_s_one_pass"] == pytest.approx(2 * row["ratio_gpu_s"])
    assert row["between_s"] == pytest.approx(1)


def test_a_configuration_of_two_experiments_counts_once_in_the_union() -> None:
    records = {"resolution": [record()], "frames": [record(100.0)]}
    table = cost.cost_table(records, configurations((ID, 100.0), (ID, 110.0))).set_index("set")
    assert table.loc["resolution", "protocol_gpu_s"] == pytest.approx(735)  # the mean of both
    assert table.loc["figures 2-4", "protocol_gpu_s"] == pytest.approx(735)
    assert table.loc["figures 2-4", "gpu_s"] == pytest.approx(2 * GPU_S)
    assert table.loc["figures 2-4", "configurations"] == 1
    assert table.loc["resolution", "protocol_gpu_s_ci95"] == pytest.approx(7 * sqrt(2) / 2)


def test_only_the_figures_experiments_are_in_the_figures_set() -> None:
    records = {"kernels": [record()], "resolution": [record(100.0)]}
    table = cost.cost_table(records, configurations((ID, 100.0))).set_index("set")
    assert table.loc["figures 2-4", "records"] == 1
    assert table.loc["campaign", "records"] == 2
    assert table.index.tolist()[0] == "resolution"
    alone = cost.cost_table({"kernels": [record()]}, configurations((ID, 100.0)))
    assert alone["set"].tolist() == ["kernels", "campaign"]


def test_sizes_above_the_published_ones_are_left_out_of_their_set() -> None:
    large, largest = sized(1008, 1792), sized(1088, 1920)
    records = {"resolution": [record(config=large), record(100.0, config=largest)]}
    known = configurations((large.id(), 10.0), (largest.id(), 1000.0))
    table = cost.cost_table(records, known).set_index("set")
    assert table.loc["figures 2-4", "protocol_gpu_s"] == pytest.approx(7 * 1010)
    assert table.loc["figures 2-4, published sizes", "protocol_gpu_s"] == pytest.approx(70)
    assert table.loc["figures 2-4, published sizes", "gpu_s"] == pytest.approx(GPU_S)


def test_out_of_memory_costs_us_and_not_them() -> None:
    failed = record(100.0, config=sized(1984, 3520), status="out_of_memory")
    known = configurations((ID, 100.0), (sized(1984, 3520).id(), nan))
    known.loc[1, "status"] = "out_of_memory"
    row = cost.cost_table({"resolution": [record(), failed]}, known).iloc[0]
    assert row["out_of_memory"] == 1
    assert row["gpu_s"] == pytest.approx(2 * GPU_S)
    assert row["protocol_configurations"] == 1
    assert row["protocol_gpu_s"] == pytest.approx(700)


def test_an_empty_record_costs_nothing() -> None:
    empty = planted.out_of_memory().model_dump(mode="json")
    empty["ticks"] = planted.make_record().model_dump(mode="json")["ticks"]
    row = cost.record_costs({"resolution": [empty]}).iloc[0]
    assert row["gpu_s"] == 0
    assert isnan(row["gpu_J"])


def test_an_unknown_interval_makes_the_sums_unknown() -> None:
    table = cost.cost_table({"resolution": [record()]}, configurations((ID, 100.0), ci95=nan))
    assert isnan(table["protocol_gpu_s_ci95"].iloc[0])
    assert table["protocol_gpu_s"].iloc[0] == pytest.approx(700)


def test_without_a_counter_there_is_time_alone() -> None:
    table = configurations((ID, 100.0)).assign(gpu_energy_Wh=nan)
    row = cost.cost_table({"resolution": [record(gpu=None)]}, table).iloc[0]
    assert row["ratio_gpu_s"] == pytest.approx(700 / GPU_S)
    assert isnan(row["gpu_energy_Wh"])
    assert isnan(row["ratio_gpu_energy"])


def test_starting_up_counts_once_a_process() -> None:
    records = {"resolution": [record(0), record(50.0, pass_index=2)]}
    row = cost.cost_table(records, configurations((ID, 100.0))).iloc[0]
    start_s = 50 - LAST_S
    assert row["start_up_s"] == pytest.approx(start_s)
    assert row["processes"] == 2
    assert row["ratio_gpu_s_with_start_up"] == pytest.approx(700 / (2 * GPU_S + 2 * start_s))


def test_emissions_are_energy_times_intensity() -> None:
    grid = Grid(title="A", gco2e_per_kWh=400, year=2023, scope="direct", source="s", url="https://x.org")
    costs = cost.cost_table({"resolution": [record()]}, configurations((ID, 100.0)))
    row = cost.carbon_table(costs, {"a": grid}).iloc[0]
    assert row["gco2e"] == pytest.approx(0.4 * costs["gpu_energy_Wh"].iloc[0])
    assert row["protocol_gco2e"] == pytest.approx(0.4 * 700)
    assert row["kind"] == "modelled"


def whole_run(step_s: float) -> dict[str, Any]:
    """A record that ran the study's protocol whole: 2 + 5 generations of 4 of 4 steps."""
    made = record(step_s=(step_s,) * 6, config=planted.configuration(num_inference_steps=4), protocol="full")
    windows = made["windows"]
    # the first generation becomes the second warm-up; the planted warm-up is made whole
    windows["kind"][2] = "warmup"
    windows["steps"][1] = 4
    return made


def test_the_prediction_is_checked_against_a_run_of_the_protocol() -> None:
    made = whole_run(0.5)
    windows = made["windows"]
    ran = [not kind.startswith("idle") for kind in windows["kind"]]
    measured_s = sum(
        end - start
        for start, end, kept in zip(windows["start_s"], windows["end_s"], ran, strict=True)
        if kept
    )
    known = configurations((made["configuration_id"], GENERATION_S * 1.01))
    row = cost.protocol_check({"validation": [made]}, known).iloc[0]
    assert row["measured_s"] == pytest.approx(measured_s)
    assert row["predicted_s"] == pytest.approx(7.07 * GENERATION_S)
    assert row["difference_percent"] == pytest.approx(100 * (7.07 * GENERATION_S / measured_s - 1))


def test_cut_runs_and_their_own_rows_check_nothing() -> None:
    made = whole_run(0.5)
    own = configurations((made["configuration_id"], GENERATION_S), protocol="full")
    assert len(cost.protocol_check({"validation": [made]}, own)) == 0
    cut = whole_run(0.5)
    cut["windows"]["steps"][1] = 1
    known = configurations((made["configuration_id"], GENERATION_S))
    assert len(cost.protocol_check({"validation": [cut]}, known)) == 0


def test_tables_are_written_alike_each_time(tmp_path: Path) -> None:
    table = cost.cost_table({"resolution": [record()]}, configurations((ID, 100.0)))
    files = [write_csvs({"cost": table}, tmp_path / name)[0] for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert list(pd.read_csv(files[0]).columns) == list(cost.COST_COLUMNS)
    assert cost.cost_latex(table).count(r"\\") == 1 + len(table)
