"""Rooflines: parts add up to the prediction, and the bound is the longer limit."""

from __future__ import annotations

import json

import pytest
import tiny
from matplotlib.figure import Figure
from t2v_energy.analysis.operator_rates import operator_rates
from t2v_energy.analysis.roofline import COLUMNS, points, roofline_table
from t2v_energy.analysis.roofline_figure import figure_roofline
from t2v_energy.cli import main
from t2v_energy.config import load_accelerator
from t2v_energy.prediction.calibrated import predict_points, presumed_calibration, shipped_calibration
from t2v_energy.prediction.features import Point
from t2v_energy.prediction.roofline import BOUNDS, report, roofline

ROOT = tiny.ROOT
WAN = Point("wan2.1-t2v-1.3b", 720, 1280, 81, 50)
SMALL = Point("animatediff-lightning", 512, 512, 16, 4)


@pytest.mark.parametrize("point", [WAN, SMALL, Point("ltx-video-0.9.7-dev", 512, 704, 121, 30)])
def test_parts_add_up_to_the_prediction(point: Point) -> None:
    calibration = shipped_calibration(ROOT, "h200")
    parts = roofline(ROOT, calibration, point)
    latency_s = predict_points(ROOT, calibration, [point]).latency_s[0]
    assert sum(part.predicted_s for part in parts) == pytest.approx(latency_s)
    assert sum(part.share for part in parts) == pytest.approx(1)
    assert {part.bound for part in parts} <= set(BOUNDS)


def test_a_bound_is_the_longer_limit() -> None:
    for part in roofline(ROOT, presumed_calibration(ROOT, "l4"), WAN):
        if part.bound == "compute":
            assert part.compute_limit_s > part.bandwidth_limit_s
        if part.bound == "bandwidth":
            assert part.compute_limit_s <= part.bandwidth_limit_s
        assert max(part.compute_limit_s, part.bandwidth_limit_s) < part.predicted_s or part.flop == 0


def test_intensity_of_attention_is_half_its_length() -> None:
    attention = next(
        p for p in roofline(ROOT, presumed_calibration(ROOT, "h200"), WAN) if p.part == "attention"
    )
    assert attention.intensity == pytest.approx(75_600 / 2)
    assert attention.bound == "compute"


def test_tiny_work_is_bound_by_launches() -> None:
    smallest = Point("wan2.1-t2v-1.3b", 16, 16, 1, 10)
    found = {p.part: p.bound for p in roofline(ROOT, shipped_calibration(ROOT, "h200"), smallest)}
    assert found["attention"] == found["products"] == found["launch"] == "launches"


def test_norms_of_few_groups_do_not_fill_the_device() -> None:
    point = Point("cogvideox-2b", 480, 720, 49, 50)
    found = {p.part: p for p in roofline(ROOT, shipped_calibration(ROOT, "h200"), point)}
    assert found["vae_group_norm"].bound == found["norm"].bound == "occupancy"
    assert found["vae_group_norm_wait"].predicted_s > 2 * found["vae_group_norm"].predicted_s


def test_the_command_says_it_in_words_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--root", str(ROOT), "roofline", "--model", WAN.model, "--accelerator", "rtx-4090"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "ridge at 164 FLOP/B" in said
    assert "no calibration" in said
    assert main([*words, "--height", "480", "--width", "832", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == report(ROOT, shipped_calibration(ROOT, "rtx-4090"), Point(WAN.model, 480, 832, 81, 50))
    assert sum(found["share_by_bound"].values()) == pytest.approx(1)


def test_frames_are_rounded_as_predict_does(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", WAN.model, "--frames", "2"]
    for command in ("predict", "roofline"):
        assert main(["--root", str(ROOT), command, *words]) == 0
        assert "2 frames are rounded to 1, as the pipeline does" in capsys.readouterr().out
    made, asked = (
        report(ROOT, shipped_calibration(ROOT, "h200"), WAN._replace(num_frames=frames)) for frames in (1, 2)
    )
    assert asked["num_frames"] == 1
    assert {**asked, "notes": made["notes"]} == made


def test_nonsense_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(ROOT), "roofline", "--model", "wan2.1"]) != 0
    assert "did you mean" in capsys.readouterr().err


def test_table_and_figure() -> None:
    calibration = shipped_calibration(ROOT, "h200")
    table = roofline_table(ROOT, calibration, points(ROOT))
    assert tuple(table.columns) == COLUMNS
    assert "cpu" not in set(table["accelerator"])
    assert table.loc[table["accelerator"] == "h200", "measured"].all()
    assert not table.loc[table["accelerator"] == "l4", "measured"].any()
    keys = ["accelerator", "model", "height", "num_inference_steps"]
    assert table.groupby(keys)["share"].sum().to_numpy() == pytest.approx(1)
    rates = operator_rates(sorted((ROOT / "results/raw/h200/operators").glob("linear*.json")))
    assert isinstance(figure_roofline(rates, table, load_accelerator(ROOT, "h200")), Figure)
