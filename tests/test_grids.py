"""Grids: the shipped file is sourced and right, and a wrong one tells what and where."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from t2v_energy.errors import UserError
from t2v_energy.grids import load_grids

REPOSITORY = Path(__file__).resolve().parents[1]
GRID = {
    "title": "A grid", "gco2e_per_kWh": 100, "year": 2023, "scope": "life_cycle", "source": "somebody",
    "url": "https://example.org/data",
}  # fmt: skip


def root_with(folder: Path, text: str) -> Path:
    (folder / "config").mkdir()
    (folder / "config" / "grids.yaml").write_text(text, encoding="utf-8")
    return folder


def message(root: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_grids(root)
    return str(caught.value)


def test_the_shipped_grids_are_sourced_and_ordered_by_what_they_emit() -> None:
    grids = load_grids(REPOSITORY)
    assert {"world", "eu", "france", "germany", "sweden", "united-states"} <= grids.keys()
    assert grids["sweden"].gco2e_per_kWh < grids["eu"].gco2e_per_kWh < grids["world"].gco2e_per_kWh
    # Direct emissions are part of those of the life cycle.
    assert grids["france-direct"].scope == "direct"
    assert grids["france-direct"].gco2e_per_kWh < grids["france"].gco2e_per_kWh


def test_a_kilowatt_hour_emits_the_intensity(tmp_path: Path) -> None:
    grid = load_grids(root_with(tmp_path, yaml.safe_dump({"here": GRID})))["here"]
    assert grid.gco2e(1000) == pytest.approx(100)
    assert grid.gco2e(250) == pytest.approx(25)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"gco2e_per_kWh": 0}, "gco2e_per_kWh"),
        ({"gco2e_per_kWh": float("nan")}, "gco2e_per_kWh"),
        ({"gco2e_per_kwh": 3}, "did you mean 'gco2e_per_kWh'?"),
        ({"year": 23}, "year"),
        ({"scope": "lifecycle"}, "scope"),
        ({"source": ""}, "source"),
        ({"url": "example.org"}, "url"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, change: dict[str, object], told: str) -> None:
    found = message(root_with(tmp_path, yaml.safe_dump({"here": GRID | change})))
    assert told in found
    assert "grids.yaml, here" in found


def test_a_value_without_a_source_is_refused(tmp_path: Path) -> None:
    unsourced = {key: value for key, value in GRID.items() if key != "source"}
    assert "source: Field required" in message(root_with(tmp_path, yaml.safe_dump({"here": unsourced})))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "must be a mapping"),
        ("- world", "must be a mapping"),
        ("{}", "there is no grid"),
        ("world: 480", "grid 'world' must be a mapping (found 480)"),
        ("world: [", "not valid YAML"),
    ],
)
def test_a_broken_file_says_how(tmp_path: Path, text: str, told: str) -> None:
    assert told in message(root_with(tmp_path, text))


def test_a_key_is_in_small_letters(tmp_path: Path) -> None:
    assert "World" in message(root_with(tmp_path, yaml.safe_dump({"World": GRID})))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    assert "there is no such file" in message(tmp_path)
