"""Numbers about stages, CodeCarbon and cost: planted truths, and campaigns that lack something."""

from __future__ import annotations

import json
from math import nan
from pathlib import Path
from typing import Any

import pandas as pd
import papermill
import pytest
import records as planted
import synthetic_campaign as synthetic
from t2v_energy.aggregation import aggregate
from t2v_energy.analysis import cost, instruments, stages
from t2v_energy.analysis.breakdown_numbers import (
    SHORT_RUNS,
    SHORT_VIDEO_WH,
    Files,
    breakdown_numbers,
    codecarbon_numbers,
    cost_numbers,
    stage_numbers,
)
from t2v_energy.analysis.numbers import Number
from t2v_energy.grids import load_grids
from t2v_energy.measurement.record import to_json

GRIDS = load_grids(synthetic.REPOSITORY)
FILES = Files("configurations.csv", "codecarbon.csv", "cost.csv", "cost_carbon.csv")


def campaign(root: Path, **changes: Any) -> Path:
    """A repository's root with planted records of two experiments and their aggregated table."""
    (root / "config").symlink_to(synthetic.REPOSITORY / "config")
    (root / "Snakefile").touch()
    paths: dict[str, list[Path]] = {}
    for experiment, sizes in (
        ("resolution", ((256, 256), (480, 832), (720, 1280))),
        ("frames", ((720, 1280),)),
    ):
        folder = root / "results" / "raw" / "h200" / experiment
        folder.mkdir(parents=True)
        for height, width in sizes:
            config = planted.configuration(height=height, width=width)
            record = planted.make_record(config=config, experiment=experiment, **changes)
            path = folder / record.file_name
            path.write_text(to_json(record), encoding="utf-8")
            paths.setdefault(experiment, []).append(path)
    out = root / "results" / "aggregated" / "h200"
    aggregate(paths, out / "measurements.parquet", out / "configurations.csv", root)
    return root


def numbers_of(root: Path) -> dict[str, Number]:
    measured = stages.read_configurations(root / "results/aggregated/h200/configurations.csv")
    raw = instruments.read_records("results/raw/h200", root, measured["experiment"].unique())
    costs = cost.cost_table(raw, measured)
    check = cost.protocol_check(raw, measured)
    carbon = cost.carbon_table(costs, GRIDS)
    return breakdown_numbers(
        measured, instruments.codecarbon_table(raw), costs, carbon, check, GRIDS, FILES, 700.0
    )


def test_stage_shares_of_a_planted_trace(tmp_path: Path) -> None:
    found = numbers_of(campaign(tmp_path))
    # one step of 0.5 s at 500 W, four fifths of it in the denoiser; 50 of them
    step_J, video_J = 250.0, planted.ONCE_J + 50 * 250.0
    other = 100 * (1 - 0.8 * 50 * step_J / video_J)
    assert found["stages.480x832.other_energy"].value == pytest.approx(other, rel=2e-3)
    assert found["stages.480x832.once_energy"].value == pytest.approx(planted.ONCE_J, rel=5e-3)
    assert found["stages.480x832.equal_steps_energy"].value == pytest.approx(
        planted.ONCE_J / (0.8 * step_J), rel=5e-3
    )
    assert found["stages.480x832.equal_steps_time"].value == pytest.approx(planted.ONCE_S / 0.4, rel=1e-3)
    assert found["stages.480x832.equal_steps_time"].kind == "modelled"
    assert found["stages.480x832.other_energy"].kind == "measured"


def test_whole_generations_are_numbered_by_steps() -> None:
    table = synthetic.configurations().assign(intervention="")
    found = stage_numbers(table, "c.csv")
    row = table[(table["experiment"] == "steps") & (table["height"] == 720)].set_index("num_inference_steps")
    for steps in synthetic.STEPS[720, 1280]:
        expected = 100 * (1 - row.loc[steps, "denoiser_energy_share"])
        assert found[f"stages.720x1280.{steps}s.other_energy"].value == pytest.approx(expected)
    assert found["stages.smallest_size.what"].value == "256×256"
    assert found["stages.largest_length.what"].value == max(synthetic.FRAMES)


def test_the_shortest_window_of_the_study_is_scaled_from_the_scatter() -> None:
    table = pd.DataFrame(
        {
            "difference_J": [-6.0, 0.0, 6.0], "difference_percent": [-0.2, 0.0, 0.1],
            "idle_power_W": 120.0, "counter_energy_J": 6000.0, "window_s": 10.0, "tick_s": 0.1,
            "unexplained_J": 0.01, "longer_s": 0.006, "cpu_kind": "modelled", "ram_kind": "constant",
            "cpu_power_W": 6.0, "ram_power_W": 38.0, "cpu_share": 0.01, "ram_share": 0.06,
            "cpu_method": "cpu_load", "ram_method": "constant_per_module", "codecarbon_gpu_energy_J": 6000.0,
            "experiment": "resolution", "configuration_id": ["a", "b", "c"], "protocol": "sampled",
        }
    )  # fmt: skip
    found = codecarbon_numbers(table, "t.csv", 700.0)
    energy_J = SHORT_RUNS * SHORT_VIDEO_WH * 3600
    assert found["codecarbon.difference_most"].value == pytest.approx(-0.2)
    assert found["codecarbon.difference_most"].source.row == "resolution a sampled"
    assert found["codecarbon.short.window"].value == pytest.approx(3.4)
    assert found["codecarbon.short.scatter"].value == pytest.approx(100 * 1.96 * 6 / energy_J)
    assert found["codecarbon.short.worst"].value == pytest.approx(100 * 70 / energy_J)
    assert found["codecarbon.short.blocked"].value == pytest.approx(100 * 0.5 * 120 / energy_J)
    assert found["codecarbon.extra"].interval is not None
    kinds = {part: found[f"codecarbon.{part}_power"].kind for part in ("cpu", "ram")}
    assert kinds == {"cpu": "modelled", "ram": "constant"}
    assert found["codecarbon.ram_share_most"].kind == "modelled"
    assert found["codecarbon.gpu_share_least"].value == pytest.approx(93)


def test_costs_have_units_and_emissions_follow_the_grids(tmp_path: Path) -> None:
    found = numbers_of(campaign(tmp_path))
    table = pd.read_csv(tmp_path / "results/aggregated/h200/configurations.csv")
    # the same four-digit latency at every size, and 720×1280×81×50 is in both experiments
    videos_s = table["latency_s"].iloc[0] * 3
    assert found["cost.figures.protocol_time"].value == pytest.approx(7 * videos_s / 3600)
    assert found["cost.figures.protocol_time"].unit == "h"
    assert found["cost.figures.records"].value == 4
    assert found["cost.figures.configurations"].value == 3
    ours_kWh = found["cost.figures.energy"].value
    assert isinstance(ours_kWh, float)
    intensity = GRIDS["sweden"].gco2e_per_kWh
    assert found["cost.figures.sweden.gco2e"].value == pytest.approx(ours_kWh * intensity)
    assert found["cost.grid.sweden.intensity"].kind == "constant"
    assert GRIDS["sweden"].url in found["cost.grid.sweden.intensity"].source.file


def test_every_key_has_one_of_the_three_prefixes(tmp_path: Path) -> None:
    assert {key.partition(".")[0] for key in numbers_of(campaign(tmp_path))} == {
        "stages",
        "codecarbon",
        "cost",
    }


def test_a_campaign_without_a_counter_has_times_alone(tmp_path: Path) -> None:
    found = numbers_of(campaign(tmp_path, gpu=None))
    assert "stages.480x832.other_time" in found
    assert "cost.figures.ratio_time" in found
    assert not [key for key in found if key.endswith("other_energy") or key.startswith("codecarbon.short")]
    assert not [key for key in found if key.endswith(".gco2e")]


def test_missing_experiments_leave_their_numbers_out() -> None:
    table = synthetic.configurations().assign(intervention="")
    kernels = table[table["experiment"] == "kernels"]
    assert stage_numbers(kernels, "c.csv") == {}
    assert cost_numbers(pd.DataFrame(columns=list(cost.COST_COLUMNS)), "t.csv") == {}
    empty = instruments.codecarbon_table({})
    assert codecarbon_numbers(empty.assign(difference_J=nan), "t.csv", 700.0) == {}


def test_the_notebook_builds_its_tables_figures_and_numbers(tmp_path: Path) -> None:
    root = campaign(tmp_path)
    papermill.execute_notebook(
        synthetic.REPOSITORY / "workflow/notebooks/breakdown.ipynb",
        tmp_path / "executed.ipynb",
        parameters={"root": str(root)},
        kernel_name="python3",
        progress_bar=False,
        cwd=str(root),
    )
    tables = root / "results" / "tables" / "h200"
    for name in (
        "stages.csv",
        "stages_once.csv",
        "codecarbon.csv",
        "cost.csv",
        "cost_carbon.csv",
        "cost.tex",
    ):
        assert (tables / name).stat().st_size > 0, name
    for name in ("stages", "codecarbon"):
        assert (root / "figures" / f"{name}.pdf").stat().st_size > 0, name
    written = json.loads((root / "results/numbers/h200/breakdown.json").read_text())
    assert written.keys() == numbers_of(root).keys()
