"""CodeCarbon beside the counter: planted differences come back, and looks at the counter explain them."""

from __future__ import annotations

import json
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import records as planted
from figure_checks import assert_legible
from t2v_energy.analysis import breakdown_figure, instruments, style
from t2v_energy.errors import UserError
from t2v_energy.measurement.record import CodeCarbonReading, Record
from t2v_energy.metering.series import Ticks


def plain(record: Record) -> dict[str, Any]:
    found: dict[str, Any] = record.model_dump(mode="json")
    return found


def with_reading(record: Record, **changes: Any) -> dict[str, Any]:
    """``record`` with CodeCarbon's reading changed."""
    assert record.codecarbon is not None
    reading = CodeCarbonReading(**(record.codecarbon.model_dump() | changes))
    return plain(record.model_copy(update={"codecarbon": reading}))


def of(*found: dict[str, Any]) -> pd.DataFrame:
    return instruments.codecarbon_table({"resolution": list(found)})


def truth_Wh(record: Record) -> float:
    assert record.codecarbon is not None
    return record.codecarbon.gpu_energy_Wh


def test_a_reading_that_is_the_truth_differs_by_nothing() -> None:
    row = of(plain(planted.make_record())).iloc[0]
    assert row["difference_J"] == pytest.approx(0, abs=0.2)
    assert row["unexplained_J"] == pytest.approx(0, abs=1e-6)
    assert row["idle_power_W"] == pytest.approx(planted.IDLE_W, rel=1e-3)
    assert row["tick_s"] == pytest.approx(planted.TICK_S)
    assert row["longer_s"] == pytest.approx(0, abs=1e-9)


def test_an_excess_is_found_in_joules_and_percent_and_not_explained() -> None:
    record = planted.make_record()
    energy_J = 3600 * truth_Wh(record)
    row = of(with_reading(record, gpu_energy_Wh=truth_Wh(record) + 5 / 3600)).iloc[0]
    assert row["difference_J"] == pytest.approx(5, abs=0.2)
    assert row["difference_percent"] == pytest.approx(500 / energy_J, rel=0.05)
    # ticks about the edges hold 10 J: half of one is nobody's look
    assert abs(row["unexplained_J"]) == pytest.approx(5, abs=1e-6)


def test_the_window_is_from_the_first_warm_up_to_the_last_generation() -> None:
    record = planted.make_record()
    row = of(plain(record)).iloc[0]
    assert row["window_s"] == pytest.approx(record.windows.end_s[-2] - record.windows.start_s[1])
    assert row["mean_power_W"] == pytest.approx(3600 * truth_Wh(record) / row["window_s"], rel=1e-3)


def test_cpu_and_memory_have_power_method_kind_and_share() -> None:
    row = of(plain(planted.make_record())).iloc[0]
    assert row["cpu_power_W"] == pytest.approx(planted.CPU_W)
    assert row["ram_power_W"] == pytest.approx(planted.RAM_W)
    assert (row["cpu_kind"], row["ram_kind"], row["gpu_kind"]) == ("modelled", "constant", "measured")
    gpu = row["codecarbon_gpu_energy_J"] / 3600
    assert row["cpu_share"] == pytest.approx(
        row["cpu_energy_Wh"] / (gpu + row["cpu_energy_Wh"] + row["ram_energy_Wh"])
    )


def test_rapl_is_measured_and_no_method_has_no_kind() -> None:
    record = planted.make_record()
    assert of(with_reading(record, cpu_method="intel_rapl"))["cpu_kind"].tolist() == ["measured"]
    assert of(with_reading(record, ram_method="none"))["ram_kind"].tolist() == [""]


def test_without_a_gpu_its_columns_are_empty() -> None:
    row = of(plain(planted.make_record(gpu=None))).iloc[0]
    assert isnan(row["difference_J"])
    assert isnan(row["codecarbon_gpu_energy_J"])
    assert row["cpu_power_W"] == pytest.approx(planted.CPU_W)


def test_records_without_a_reading_or_a_result_are_left_out() -> None:
    table = of(plain(planted.out_of_memory()), plain(planted.make_record(codecarbon=None)))
    assert len(table) == 0
    assert list(table.columns) == list(instruments.CODECARBON_COLUMNS)
    assert instruments.fit_extra_window(table) is None


# --- looks at the counter -----------------------------------------------------------------------------------

STAIR = Ticks(
    time_s=[0.0, 0.1, 0.2, 0.3, 0.4], not_before_s=[-0.002, 0.098, 0.198, 0.298, 0.398],
    energy_mJ=[0, 10_000, 20_000, 90_000, 160_000],
)  # fmt: skip


def test_a_look_sees_the_last_tick() -> None:
    assert instruments.shown_energy_J(STAIR, 0.05, 0.25, 20.0) == pytest.approx(20)
    # the truth, 5 J at the start and 55 J at the end, is not what a look sees
    assert instruments.shown_energy_J(STAIR, 0.05, 0.25, 50.0) == pytest.approx(20)


def test_near_a_tick_the_nearer_of_two_values_is_taken() -> None:
    for wanted_J in (20.0, 90.0):
        assert instruments.shown_energy_J(STAIR, 0.05, 0.295, wanted_J) == pytest.approx(wanted_J)


# --- the fit ------------------------------------------------------------------------------------------------


def differences(delta_s: float, scatter_J: float, n: int = 200) -> pd.DataFrame:
    """Differences of a further window of ``delta_s`` at idle power, with noise."""
    noise = np.random.default_rng(0)
    idle = noise.uniform(90, 150, n)
    window = np.geomspace(10, 300, n)
    energy = 600 * window
    difference = delta_s * idle + noise.normal(0, scatter_J, n)
    return pd.DataFrame(
        {
            "difference_J": difference, "difference_percent": 100 * difference / energy,
            "idle_power_W": idle, "counter_energy_J": energy, "window_s": window, "tick_s": 0.1,
            "counter_energy_J_ci95": 1.0,
        }
    )  # fmt: skip


@pytest.mark.parametrize("delta_s", [0.5, 0.0, -0.05])
def test_the_planted_extra_window_is_recovered(delta_s: float) -> None:
    fit = instruments.fit_extra_window(differences(delta_s, 6.0))
    assert fit is not None
    assert fit.low_s <= delta_s <= fit.high_s
    assert fit.high_s - fit.low_s < 0.05
    assert fit.scatter_J == pytest.approx(6.0, rel=0.15)
    assert fit.mean_power_W == pytest.approx(600)


def test_the_share_falls_as_one_over_the_window() -> None:
    fit = instruments.fit_extra_window(differences(0.5, 0.1))
    assert fit is not None
    assert fit.percent(3.4) == pytest.approx(100 * 0.5 * fit.idle_power_W / (600 * 3.4), rel=0.01)
    assert fit.percent(34) == pytest.approx(fit.percent(3.4) / 10)
    assert fit.percent(3.4, 300) == pytest.approx(2 * fit.percent(3.4))
    assert fit.scatter_percent(1.0) == pytest.approx(196 * fit.scatter_J / 600)


def test_two_records_make_no_fit() -> None:
    assert instruments.fit_extra_window(differences(0.5, 1.0, n=2)) is None


def test_one_tick_is_the_worst() -> None:
    assert instruments.worst_percent(0.1, 700, 3.5, 700) == pytest.approx(100 * 0.1 / 3.5)
    with pytest.raises(UserError, match="must be positive"):
        instruments.worst_percent(0.1, 700, 3.5, float("nan"))


# --- files and figure ---------------------------------------------------------------------------------------


def test_records_are_read_by_experiment_and_others_left_alone(tmp_path: Path) -> None:
    record = planted.make_record()
    folder = tmp_path / "raw" / "h200" / "resolution"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / record.file_name).write_text(json.dumps(plain(record)), encoding="utf-8")
    (folder / "notes.json").write_text("{}", encoding="utf-8")
    (folder.parent / "frames").mkdir(exist_ok=True)
    found = instruments.read_records("raw/h200", tmp_path, ["resolution"])
    assert list(found) == ["resolution"]
    assert [r["configuration_id"] for r in found["resolution"]] == [record.configuration_id]


def test_a_missing_folder_and_a_cut_record_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        instruments.read_records("raw/h200", tmp_path, ["resolution"])
    path = tmp_path / "raw" / "h200" / "resolution" / planted.make_record().file_name
    path.parent.mkdir(parents=True)
    path.write_text('{"status": ', encoding="utf-8")
    with pytest.raises(UserError, match="truncated or corrupt") as caught:
        instruments.read_records("raw/h200", tmp_path, ["resolution"])
    assert path.name in str(caught.value)


def test_the_figure_is_drawn_with_and_without_a_counter(tmp_path: Path) -> None:
    table = differences(0.01, 6.0, n=30)
    fit = instruments.fit_extra_window(table)
    for name, some_fit in (("with", fit), ("without", None)):
        drawn = breakdown_figure.figure_codecarbon(table, some_fit, 700.0, 3.4)
        assert_legible(drawn)
        assert style.save(drawn, tmp_path / name)[1].stat().st_size > 0
    texts = [text.get_text() for text in drawn.axes[0].texts]
    assert texts == ["no energy counter"]
