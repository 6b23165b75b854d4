"""Energy by stage: planted shares come back, and the modelled curve is the arithmetic it claims to be."""

from __future__ import annotations

from math import isnan, nan
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import synthetic_campaign as synthetic
from figure_checks import assert_legible
from t2v_energy.analysis import breakdown_figure, stages, style
from t2v_energy.analysis.stages import OnceAndStep
from t2v_energy.errors import UserError


@pytest.fixture
def table() -> pd.DataFrame:
    return synthetic.configurations()


def test_shares_of_a_video_add_up_and_stages_to_the_whole(table: pd.DataFrame) -> None:
    found = stages.stage_table(table)
    by_video = found.groupby(["experiment", "configuration_id", "protocol"])
    assert by_video["energy_share"].sum().to_numpy() == pytest.approx(1)
    row = table[(table["experiment"] == "steps") & (table["height"] == 480)].iloc[0]
    of_row = found[(found["experiment"] == "steps") & (found["configuration_id"] == row["configuration_id"])]
    assert of_row["stage"].tolist() == list(stages.STAGES)
    assert of_row["energy_J"].sum() == pytest.approx(3600 * row["gpu_energy_Wh"])
    assert of_row["time_s"].sum() == pytest.approx(row["latency_s"])
    vae = of_row.set_index("stage").loc["vae_decode"]
    assert vae["energy_share"] == pytest.approx(row["vae_decode_energy_share"])


def test_every_measured_configuration_of_the_figures_has_its_stages(table: pd.DataFrame) -> None:
    found = stages.stage_table(table)
    of_figures = table[table["experiment"].isin(stages.EXPERIMENTS) & (table["status"] == "ok")]
    assert len(found) == len(stages.STAGES) * len(of_figures)
    assert set(found["experiment"]) == set(stages.EXPERIMENTS)


def test_what_no_span_covers_is_in_rest(table: pd.DataFrame) -> None:
    row = table.iloc[0].copy()
    row["denoiser_time_share"] -= 0.1
    before = stages.stage_share(table.iloc[0], "rest", "time")
    assert stages.stage_share(row, "rest", "time") == pytest.approx(before + 0.1)


def test_half_is_not_the_denoisers_where_once_equals_it() -> None:
    model = OnceAndStep(once=100.0, step=11.0, denoiser=10.0)
    assert model.equal_steps == 10
    assert model.other_share([0, 10]) == pytest.approx([1.0, (100 + 10) / (100 + 110)])
    # without any loss in the step it is exactly half
    assert OnceAndStep(100.0, 10.0, 10.0).other_share(10) == pytest.approx(0.5)


def test_the_share_falls_to_what_a_step_itself_loses() -> None:
    model = OnceAndStep(once=100.0, step=11.0, denoiser=10.0)
    assert model.other_share(1e9) == pytest.approx(1 / 11)
    assert np.all(np.diff(model.other_share(np.arange(1, 50))) < 0)
    assert isnan(model.steps_for(0.05))  # a step alone loses 9 %
    steps = model.steps_for(0.2)
    assert model.other_share(steps) == pytest.approx(0.2)


def test_costs_of_a_row_make_up_its_video(table: pd.DataFrame) -> None:
    row = table[(table["experiment"] == "resolution") & (table["height"] == 480)].iloc[0]
    for quantity, total in (("time", row["latency_s"]), ("energy", 3600 * row["gpu_energy_Wh"])):
        model = stages.once_and_step(row, quantity)
        assert model.once + 50 * model.step == pytest.approx(total)
        assert model.other_share(50) == pytest.approx(stages.other_share(row, quantity))


def test_the_modelled_curve_meets_whole_generations_that_are_linear(table: pd.DataFrame) -> None:
    """The planted campaign is linear in S, so the curve from sampled rows must hit every whole video."""
    sampled = stages.measured_rows(table, "resolution")
    for (height, width), counts in synthetic.STEPS.items():
        row = stages.row_at(sampled.assign(intervention=""), height, width, 81)
        assert row is not None
        model = stages.once_and_step(row, "energy")
        for steps in counts:
            whole = stages.measured_rows(table, "steps")
            whole = whole[(whole["height"] == height) & (whole["num_inference_steps"] == steps)].iloc[0]
            assert model.other_share(steps) == pytest.approx(stages.other_share(whole, "energy"))


def test_the_once_table_has_both_quantities_and_shares(table: pd.DataFrame) -> None:
    found = stages.once_table(table)
    assert set(found["quantity"]) == {"time", "energy"}
    assert set(found["experiment"]) == {"resolution", "frames"}
    assert (found["other_share_1s"] > found["other_share_4s"]).all()
    assert found["equal_steps"].to_numpy() == pytest.approx(
        (found["once"] / found["denoiser_step"]).to_numpy()
    )
    assert set(found["kind"]) == {"modelled"}


def test_without_a_counter_there_are_times_alone(table: pd.DataFrame) -> None:
    energies = [name for name in table if "energy" in name and table[name].dtype.kind == "f"]
    table[energies] = nan
    found = stages.stage_table(table)
    assert found["energy_J"].isna().all()
    assert found["time_s"].notna().all()
    assert set(stages.once_table(table)["quantity"]) == {"time"}


def test_an_experiment_that_is_not_there_has_no_rows(table: pd.DataFrame) -> None:
    kernels = table[table["experiment"] == "kernels"]
    assert len(stages.stage_table(kernels)) == 0
    assert list(stages.stage_table(kernels).columns) == list(stages.stage_table(table).columns)
    assert len(stages.once_table(kernels)) == 0


def test_two_rows_of_one_size_are_an_error(table: pd.DataFrame) -> None:
    rows = stages.measured_rows(table, "kernels").assign(intervention="")
    with pytest.raises(UserError, match=r"480×832, 81 frames has 2 rows"):
        stages.row_at(rows, 480, 832, 81)
    assert stages.row_at(rows, 1, 1, 81) is None


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        stages.read_configurations(tmp_path / "configurations.csv")


def test_the_figure_has_every_point_and_the_same_bytes(table: pd.DataFrame, tmp_path: Path) -> None:
    table = table.assign(intervention="")
    drawn = breakdown_figure.figure_stages(table)
    by_steps = drawn.axes[2]
    assert_legible(drawn)
    lengths = sorted(len(line.get_xdata()) for line in by_steps.lines if line.get_marker() in ("o", "s"))
    assert lengths == sorted(len(counts) for counts in synthetic.STEPS.values())
    files = [style.save(breakdown_figure.figure_stages(table), tmp_path / name)[0] for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_figure_says_from_which_steps_on_little_is_not_the_denoisers(table: pd.DataFrame) -> None:
    table = table.assign(intervention="")
    drawn = breakdown_figure.figure_stages(table)
    for axes in drawn.axes:
        assert any(list(line.get_ydata()) == [5, 5] for line in axes.lines)
    once = stages.once_table(table)
    once = once[(once["experiment"] == "resolution") & (once["quantity"] == "energy")]
    swept = breakdown_figure.step_sizes(table)
    assert [size[:2] for size in swept] == list(synthetic.STEPS)
    sizes = [once[(once["height"] == h) & (once["width"] == w)] for h, w, _ in swept]
    numbers = [f"{float(size['steps_for_5_percent'].iloc[0]):.0f}" for size in sizes]
    assert [text.get_text() for text in drawn.axes[2].texts] == numbers


def test_sizes_whose_vae_worked_in_tiles_are_hollow(table: pd.DataFrame) -> None:
    plain = table.assign(intervention="")
    largest = plain["experiment"].eq("resolution") & plain["height"].eq(1008)
    assert largest.sum() == 1
    for found, hollow in ((plain, 0), (plain.assign(intervention=np.where(largest, "vae-tiling", "")), 1)):
        drawn = breakdown_figure.figure_stages(found)
        white = [line for line in drawn.axes[0].lines if line.get_markerfacecolor() == "white"]
        assert {len(line.get_xdata()) for line in white} == {hollow}
        labels = [text.get_text() for legend in drawn.legends for text in legend.get_texts()]
        assert ("VAE in tiles" in labels) == bool(hollow)


@pytest.mark.parametrize("kept", [("resolution",), ("frames",), ("steps",), ("kernels",)])
def test_the_figure_is_drawn_of_what_there_is(
    table: pd.DataFrame, kept: tuple[str, ...], tmp_path: Path
) -> None:
    part = table[table["experiment"].isin(kept)].assign(intervention="")
    assert style.save(breakdown_figure.figure_stages(part), tmp_path / "stages")[1].stat().st_size > 0


def test_labels_name_only_what_the_rows_hold_fixed(table: pd.DataFrame) -> None:
    plain = table.assign(intervention="")
    drawn = breakdown_figure.figure_stages(plain)
    titles = [axes.get_title(loc="left") for axes in drawn.axes]
    assert titles == ["a  by size, 50 steps", "b  by length, 50 steps", "c  by steps"]
    assert [axes.get_xlabel() for axes in drawn.axes[1:]] == [
        "Frames (720×1280)",
        "Denoising steps S (81 frames)",
    ]
    mixed = plain["experiment"].eq("frames") & plain["num_frames"].eq(plain["num_frames"].max())
    other = plain.assign(height=np.where(mixed, 480, plain["height"]))
    assert breakdown_figure.figure_stages(other).axes[1].get_xlabel() == "Frames"
