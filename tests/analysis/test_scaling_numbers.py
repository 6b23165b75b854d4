"""The text's numbers on scaling laws, and the notebook that builds them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from math import isfinite
from pathlib import Path

import numpy as np
import pandas as pd
import papermill
import pytest
import synthetic_sweeps as synthetic
from t2v_energy.analysis import efficiency, scaling
from t2v_energy.analysis.numbers import Number
from t2v_energy.analysis.scaling_numbers import TABLES, scaling_numbers

FOLDER = "results/tables/h200"


def build(folder: Path, table: pd.DataFrame) -> tuple[dict[str, Number], Mapping[str, pd.DataFrame]]:
    root = synthetic.root(folder / "root", table)
    campaign = scaling.read_campaign(root, "h200", synthetic.CONFIGURATIONS)
    tables = {
        "scaling": scaling.scaling_table(campaign),
        "regime_fits": scaling.regime_fits(campaign),
        "regimes": scaling.regime_table(campaign),
        "doubling": scaling.doubling_table(campaign),
        "efficiency": efficiency.efficiency_table(campaign),
        "power": efficiency.power_table(campaign),
        "steps": efficiency.steps_table(campaign),
    }
    assert tuple(tables) == TABLES
    return scaling_numbers(campaign, tables, FOLDER), tables


def test_every_number_has_a_key_of_the_part_and_names_its_table(tmp_path: Path) -> None:
    numbers, _ = build(tmp_path, synthetic.configurations())
    assert {key.split(".")[0] for key in numbers} == {
        "scaling", "regimes", "doubling", "efficiency", "power",
    }  # fmt: skip
    assert not [key for key in numbers if not key.isascii() or " " in key or "=" in key]
    files = {number.source.file for number in numbers.values()}
    assert {f"{FOLDER}/{name}.csv" for name in TABLES} <= files


def test_planted_laws_arrive_in_the_numbers(tmp_path: Path) -> None:
    numbers, _ = build(tmp_path, synthetic.configurations())
    each = synthetic.step_s(synthetic.tokens(480, 832, 81))
    assert numbers["scaling.steps.480x832.latency.once"].value == pytest.approx(synthetic.ONCE_S)
    assert numbers["scaling.steps.480x832.latency.per_step"].value == pytest.approx(each)
    assert numbers["doubling.steps.480x832x81.S5.latency"].value == pytest.approx(
        (synthetic.ONCE_S + 10 * each) / (synthetic.ONCE_S + 5 * each)
    )
    assert numbers["doubling.height_and_width.256x256x81.S50.study"].value == 16
    assert numbers["regimes.all.step_time.ragged_quadratic_extra"].value == pytest.approx(
        100 * synthetic.RAGGED_S / synthetic.QUADRATIC_S, rel=1e-4
    )
    exponent = 1.9
    tokens = float(numbers["regimes.all.step_time.tokens_nearly_quadratic"].value)
    quadratic = synthetic.QUADRATIC_S + synthetic.RAGGED_S
    parts = (synthetic.CONSTANT_S, synthetic.LINEAR_S * tokens, quadratic * tokens**2)
    assert (parts[1] + 2 * parts[2]) / sum(parts) == pytest.approx(exponent, abs=1e-3)
    frames = float(numbers["regimes.all.step_time.frames_nearly_quadratic"].value)
    each = synthetic.tokens(720, 1280, 1)  # the fewest frames 4k + 1 with so many tokens
    assert (frames - 1) % 4 == 0
    assert (
        each * ((frames - 1) // 4) < tokens + 500 <= each * ((frames - 1) // 4 + 1) + 1000
    )  # rounded to 1000
    assert numbers["power.all.mean"].value == pytest.approx(synthetic.POWER_W)


def test_the_default_sizes_shares_and_exponents(tmp_path: Path) -> None:
    numbers, _ = build(tmp_path, synthetic.configurations())
    prefix = "regimes.default.all.step_time"
    shares = [float(numbers[f"{prefix}.{part}_share"].value) for part in ("constant", "linear", "quadratic")]
    assert sum(shares) == pytest.approx(100)
    exponent = float(numbers[f"{prefix}.exponent"].value)
    assert exponent == pytest.approx((shares[1] + 2 * shares[2]) / 100)
    assert exponent < float(numbers["regimes.default.exponent_flop"].value) < 2
    assert numbers["regimes.default.tokens"].value == synthetic.tokens(720, 1280, 81)


def test_extreme_exponents_are_those_of_the_table(tmp_path: Path) -> None:
    numbers, tables = build(tmp_path, synthetic.configurations())
    table = tables["scaling"]
    pairs = table[(table["kind"] == "pair") & (table["x"] == "tokens") & (table["quantity"] == "latency_s")]
    pairs = pairs[(pairs["set"] == "resolution") & pairs["same_tiles"].eq(True)].sort_values("x_centre")
    assert len(pairs) > 2
    for label, place in (("smallest", 0), ("largest", -1)):
        number = numbers[f"scaling.resolution.latency.{label}"]
        assert number.value == pairs["exponent"].iloc[place]
        assert number.interval is not None
        assert numbers[f"scaling.resolution.latency.{label}.range"].value == pairs["range"].iloc[place]


def test_a_poor_campaign_gives_fewer_numbers_and_no_error(tmp_path: Path) -> None:
    table = synthetic.configurations()
    no_counter = table.assign(gpu_energy_Wh=np.nan, step_energy_J=np.nan, gpu_energy_Wh_pass_means="")
    numbers, _ = build(tmp_path / "counter", no_counter)
    assert not [key for key in numbers if "energy" in key or key.startswith("power")]
    one, _ = build(tmp_path / "one", table[table["experiment"] == "resolution"].head(1))
    assert all(isfinite(number.value) for number in one.values() if not isinstance(number.value, str))
    assert not [key for key in one if key.startswith(("doubling", "efficiency", "power"))]


def test_the_notebook_builds_its_tables_figure_and_numbers(tmp_path: Path) -> None:
    base = synthetic.root(tmp_path / "root", synthetic.configurations())
    papermill.execute_notebook(
        synthetic.REPOSITORY / "workflow/notebooks/scaling.ipynb",
        tmp_path / "executed.ipynb",
        parameters={"root": str(base)},
        kernel_name="python3",
        progress_bar=False,
        cwd=str(base),
    )
    for name in ("figures/exponents.pdf", *(f"{FOLDER}/{table}.csv" for table in TABLES)):
        assert (base / name).stat().st_size > 0, name
    found = json.loads((base / "results/numbers/h200/scaling.json").read_text())
    assert found["power.resolution.mean"]["value"] == pytest.approx(synthetic.POWER_W)


def test_every_column_is_described(tmp_path: Path) -> None:
    _, tables = build(tmp_path, synthetic.configurations())
    text = (synthetic.REPOSITORY / "docs" / "tables.md").read_text(encoding="utf-8")
    for name, table in tables.items():
        heading = re.escape(f"## `results/tables/<campaign>/{name}.csv`")
        section = re.search(rf"^{heading}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        assert section is not None, name
        assert not set(table.columns) - set(re.findall(r"`(\w+)`", section[1])), name
