"""Numbers of the text from experiments ``validation`` and ``kernels``, and the notebook that writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import records
import synthetic_campaign as synthetic
from t2v_energy.analysis import comparison_numbers, kernels, settling, validation
from t2v_energy.analysis.comparison_numbers import Numbers
from t2v_energy.measurement.record import to_json

CSV = Path("results/aggregated/h200/configurations.csv")
NOTEBOOK = synthetic.REPOSITORY / "workflow" / "notebooks" / "comparison.ipynb"
FOLDER = "results/tables/h200"
TABLES = ("validation", "validation_steps", "validation_drift", "settling", "kernels", "kernels_fit")


def tables_of(base: Path) -> tuple[dict[str, pd.DataFrame], kernels.Kernels | None]:
    """The notebook's tables and the measured kernels."""
    raw = base / "results" / "raw" / "h200"
    wholes = validation.read_whole(raw / name for name in validation.WHOLE_EXPERIMENTS)
    measured = kernels.read_kernels(base, "h200", CSV)
    return {
        "validation": validation.validation_table(pd.read_csv(base / CSV)),
        "validation_steps": validation.steps_table(wholes),
        "validation_drift": validation.drift_table(wholes),
        "settling": settling.settling_table(json.loads(to_json(whole.record)) for whole in wholes),
        "kernels": kernels.kernels_table(measured),
        "kernels_fit": kernels.fit_table(measured),
    }, measured


def with_whole_records(base: Path) -> Path:
    """Add records of protocol ``full`` of 12 steps that are alike, to ``validation`` and ``steps``."""
    for experiment in validation.WHOLE_EXPERIMENTS:
        config = records.configuration(num_inference_steps=12)
        made = records.make_record(steps=12, experiment=experiment, protocol="full", config=config)
        records.write(made, base / "results" / "raw" / "h200" / experiment)
    return base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return with_whole_records(synthetic.root(tmp_path / "root", synthetic.configurations()))


@pytest.fixture
def numbers(base: Path) -> Numbers:
    return comparison_numbers.comparison_numbers(*tables_of(base), FOLDER)


class TestNumbers:
    def test_keys_begin_with_the_experiments(self, numbers: Numbers) -> None:
        assert {key.split(".")[0] for key in numbers} == {"validation", "kernels"}

    def test_planted_differences(self, numbers: Numbers) -> None:
        percent = 100 * (synthetic.SAMPLED_OVER_FULL - 1)
        for name in ("latency", "gpu_energy"):
            assert numbers[f"validation.{name}_most"].value == pytest.approx(percent)
            for height, width in synthetic.VALIDATION:
                number = numbers[f"validation.{height}x{width}.{name}_difference"]
                assert (number.value, number.unit) == (pytest.approx(percent), "%")
                assert (number.interval is None) == (synthetic.VALIDATION[height, width] == 1)
        assert numbers["validation.sizes"].value == len(synthetic.VALIDATION)
        assert numbers["validation.720x1280.n_full"].value == 1
        assert numbers["validation.accepted"].value == 0.5
        full = numbers["validation.480x832.latency_full"]
        assert (full.unit, full.kind, full.source.column) == ("s", "measured", "full")
        sampled = numbers["validation.480x832.latency_sampled"].value
        assert sampled == pytest.approx(float(full.value) * synthetic.SAMPLED_OVER_FULL)

    def test_the_worst_is_by_size_and_not_by_sign(self, base: Path) -> None:
        tables, measured = tables_of(base)
        table = tables["validation"]
        worst = table.index[table["quantity"] == "latency_s"][1]
        table.loc[worst, "difference_percent"] = -0.45
        found = comparison_numbers.comparison_numbers(tables, measured, FOLDER)
        assert found["validation.latency_most"].value == pytest.approx(0.45)
        assert "480x832" in found["validation.latency_most"].source.row

    def test_what_different_boards_say_is_no_validation(self, base: Path) -> None:
        tables, measured = tables_of(base)
        tables["validation"]["same_board"] = "no"
        tables["kernels"]["same_board"] = "no"
        found = comparison_numbers.comparison_numbers(tables, measured, FOLDER)
        assert not [key for key in found if "difference" in key or key.endswith("_ratio")]

    def test_pairs_on_two_boards_are_counted(self, base: Path) -> None:
        tables, measured = tables_of(base)
        table = tables["validation"]
        assert (
            comparison_numbers.comparison_numbers(tables, measured, FOLDER)["validation.two_boards"].value
            == 0
        )
        table.loc[table["configuration"] == table["configuration"].iloc[0], "same_board"] = "no"
        found = comparison_numbers.comparison_numbers(tables, measured, FOLDER)
        assert found["validation.two_boards"].value == 1
        assert found["validation.sizes"].value == len(synthetic.VALIDATION) - 1

    def test_the_third_step_that_stands_out_most(self) -> None:
        drift = pd.DataFrame(
            {
                "configuration": "c", "generation": [1, 2, 1], "part": "step 3",
                "step_time_s": [1.25, 0.99, 2.0], "step_time_percent": [125.0, 99.0, 100.5],
            }
        )  # fmt: skip
        table = validation.drift_table([])
        drift = pd.concat([table, drift]) if len(table) else drift.reindex(columns=table.columns)
        found = comparison_numbers._drift_numbers(drift, "f")
        assert found["validation.drift.third_step_most"].value == pytest.approx(25)
        assert found["validation.drift.third_step_extra"].value == pytest.approx(250)
        assert found["validation.drift.third_step_others"].value == pytest.approx(1)
        assert comparison_numbers._drift_numbers(drift.iloc[:1], "f") == {}

    def test_first_steps_and_drift(self, numbers: Numbers) -> None:
        assert numbers["validation.steps.records"].value == 2
        assert numbers["validation.steps.generations"].value == 6
        for name in ("latency", "gpu_energy"):
            most, mean = (float(numbers[f"validation.steps.{name}_{end}"].value) for end in ("most", "mean"))
            assert abs(mean) <= most < 0.05
            assert float(numbers[f"validation.steps.{name}_next_of_all"].value) < 0.05
        assert numbers["validation.settling.limit"].value == 2
        assert numbers["validation.settling.generations"].value == 6
        for part in ("first_step", "first_tenth", "last_tenth"):
            for what in ("time", "power"):
                number = numbers[f"validation.drift.{part}_{what}"]
                assert (number.unit, number.kind) == ("%", "measured")
                assert number.value == pytest.approx(0, abs=0.5)

    def test_kernels(self, numbers: Numbers) -> None:
        assert (numbers["kernels.default"].value, numbers["kernels.flash"].value) == ("cudnn", "flash")
        assert numbers["kernels.sizes"].value == len(synthetic.KERNEL_SIZES)
        ratio = numbers["kernels.720x1280.latency_ratio"]
        assert (ratio.value, ratio.unit) == (pytest.approx(synthetic.FLASH_SLOWER), "")
        assert ratio.interval is not None
        for end in ("least", "most"):
            assert numbers[f"kernels.latency_ratio_{end}"].value == pytest.approx(synthetic.FLASH_SLOWER)
            assert numbers[f"kernels.power_ratio_{end}"].value == pytest.approx(1)
        assert numbers["kernels.mu_true_default"].value == pytest.approx(synthetic.MU)
        assert numbers["kernels.mu_true_flash"].value == pytest.approx(synthetic.MU / synthetic.FLASH_SLOWER)
        rate = numbers["kernels.attention_rate_flash"]
        assert (rate.unit, rate.kind) == ("TFLOP/s", "modelled")
        least, most = (
            float(numbers[f"kernels.attention_rate_flash_{end}"].value) for end in ("least", "most")
        )
        assert least < float(rate.value) < most

    def test_sources_lead_to_the_tables(self, base: Path, numbers: Numbers) -> None:
        tables, _ = tables_of(base)
        files = {number.source.file for number in numbers.values() if number.source.file.startswith(FOLDER)}
        assert files == {f"{FOLDER}/{name}.csv" for name in tables}
        size = numbers["kernels.480x832.gpu_energy_flash"]
        assert (size.source.row, size.source.column) == ("480×832 gpu_energy_Wh", "flash")


class TestLacking:
    def numbers_without(self, folder: Path, experiments: set[str]) -> Numbers:
        rows = synthetic.configurations()
        base = synthetic.root(folder / "root", rows[~rows["experiment"].isin(experiments)])
        return comparison_numbers.comparison_numbers(*tables_of(base), FOLDER)

    @pytest.mark.parametrize("lacking", ["validation", "kernels"])
    def test_one_experiment(self, tmp_path: Path, lacking: str) -> None:
        prefixes = {key.split(".")[0] for key in self.numbers_without(tmp_path, {lacking})}
        assert prefixes == {"validation", "kernels"} - {lacking}

    def test_both(self, tmp_path: Path) -> None:
        assert self.numbers_without(tmp_path, {"validation", "kernels"}) == {}

    def test_energies(self, tmp_path: Path) -> None:
        rows = synthetic.configurations()
        energies = [name for name in rows if name.startswith(("gpu_energy_Wh", "step_energy", "mean_power"))]
        base = synthetic.root(tmp_path / "root", rows.assign(**dict.fromkeys(energies, np.nan)))
        found = comparison_numbers.comparison_numbers(*tables_of(base), FOLDER)
        assert "kernels.latency_ratio_most" in found
        assert not [key for key in found if "energy" in key or "power" in key]


def executed(base: Path, tmp_path: Path, **parameters: Any) -> dict[str, Any]:
    """The numbers that the notebook writes."""
    papermill.execute_notebook(
        NOTEBOOK,
        tmp_path / "executed.ipynb",
        parameters={"root": str(base), **parameters},
        kernel_name="python3",
        progress_bar=False,
        cwd=str(base),
    )
    found: dict[str, Any] = json.loads((base / "results/numbers/h200/comparison.json").read_text())
    return found


def test_the_notebook_builds_its_tables_figure_and_numbers(base: Path, tmp_path: Path) -> None:
    found = executed(base, tmp_path)
    for name in TABLES:
        assert len(pd.read_csv(base / FOLDER / f"{name}.csv")) > 0, name
    for name in ("settling", "kernels"):
        for ending in ("pdf", "png", "svg"):
            assert (base / "figures" / f"{name}.{ending}").stat().st_size > 0
    assert found["kernels.latency_ratio_most"]["value"] == pytest.approx(synthetic.FLASH_SLOWER)
    assert found["validation.latency_most"]["unit"] == "%"


def test_the_notebook_copes_with_a_campaign_without_both_and_with_other_places(tmp_path: Path) -> None:
    rows = synthetic.configurations()
    base = synthetic.root(tmp_path / "root", rows[rows["experiment"] == "resolution"])
    (base / "results" / "raw").rename(base / "elsewhere")
    assert executed(base, tmp_path, records="elsewhere/h200", tables="out", figures="shown") == {}
    assert pd.read_csv(base / "out" / "validation.csv").empty
    assert {path.stem for path in (base / "shown").iterdir()} == {"settling"}  # which says that it is empty


def test_the_notebook_names_every_file_that_it_writes() -> None:
    (parameters,) = [
        cell
        for cell in nbformat.read(NOTEBOOK, as_version=4).cells
        if "parameters" in cell.metadata.get("tags", [])
    ]
    for name in ("validation(_steps, _drift)", "settling", "kernels", "kernels_fit"):
        assert name in parameters.source
