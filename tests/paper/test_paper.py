"""The paper's own checks: (a) to (e) of the plan for numbers and figures in the text.

Those that look at the built paper's numbers need ``make`` to have run; the others build what they need from a
synthetic campaign.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import synthetic_campaign as synthetic
from t2v_energy.analysis.numbers import read
from t2v_energy.analysis.paper import compile_paper, used_numbers
from t2v_energy.analysis.resolution_numbers import row_label
from t2v_energy.errors import UserError

ROOT = synthetic.REPOSITORY
SOURCE = ROOT / "paper" / "paper.typ"
RULES = "\n".join(path.read_text() for path in sorted((ROOT / "workflow" / "rules").glob("*.smk")))
KINDS = {"measured", "modelled", "constant"}

UNUSED_NUMBERS: set[str] = set()
"""Numbers that are kept although the text does not use them."""

LITERALS = {"95~%", "90~%"}
"""Digits with a unit that the text may write out: the confidence of the intervals, and of the meter's own."""

UNITS = (
    r"%|percent|s|ms|min|h|seconds|minutes|hours|W|kW|Wh|kWh|mWh|J|kJ|mJ|watts?|joules?|watt-hours|"
    r"[GTP]?FLOPs?(?:/s)?|[GTPKM]i?B|Hz|[kMG]Hz|GPUs?|times|fold|×|frames|steps|layers|tokens|pixels|megapixels|sizes"
)


@pytest.fixture(scope="module")
def synthetic_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = synthetic.root(tmp_path_factory.mktemp("paper") / "root", synthetic.configurations())
    synthetic.build(base)
    return base


@pytest.fixture(scope="module")
def built() -> dict[str, dict[str, Any]]:
    path = ROOT / "results" / "numbers" / "h200.json"
    if not path.is_file():
        pytest.fail(f"{path.relative_to(ROOT)} is not built: run make first")
    return read(path)


# (a) one rule writes the numbers, and each has all that it must have


def test_one_rule_writes_the_numbers() -> None:
    assert len(re.findall(r'^\s+"<numbers>\.json",?$', RULES, re.MULTILINE)) == 1


def test_every_number_has_value_unit_interval_kind_and_source(built: dict[str, dict[str, Any]]) -> None:
    for key, number in built.items():
        assert set(number) == {"value", "unit", "interval", "kind", "digits", "source"}, key
        assert number["kind"] in KINDS, key
        assert all(number["source"][part] for part in ("file", "row", "column")), key
        if number["interval"]:
            low, high = number["interval"]
            assert low <= number["value"] <= high, key


def test_numbers_lead_back_to_their_cells(built: dict[str, dict[str, Any]]) -> None:
    """A number whose source is one cell of a built table has that cell's value (shares: in percent)."""
    checked = 0
    for key, number in built.items():
        source = number["source"]
        if not source["file"].endswith("configurations.csv") or number["kind"] != "measured":
            continue
        table = pd.read_csv(ROOT / source["file"])
        rows = [
            row for _, row in table[table["status"] == "ok"].iterrows() if row_label(row) == source["row"]
        ]
        if len(rows) == 1 and source["column"] in table.columns:
            factor = 100 if number["unit"] == "%" and not source["column"].endswith("_percent") else 1
            assert number["value"] == pytest.approx(factor * rows[0][source["column"]], rel=1e-5), key
            checked += 1
    assert checked > 40


def test_what_the_prose_says_of_boards_and_power_is_so(built: dict[str, dict[str, Any]]) -> None:
    """Words that no key carries: the statements of "Boards", "One efficiency", "Power" and "Quadratic?"."""
    table = pd.read_csv(ROOT / "results/aggregated/h200/configurations.csv")
    rows = table[(table["experiment"] == "resolution") & (table["status"] == "ok")]
    rows = rows.assign(pixels=rows["height"] * rows["width"]).sort_values("pixels")
    value = {key: number["value"] for key, number in built.items()}
    assert (rows["gpus"] == rows["passes"]).all(), "the passes of a size are always on different boards"
    assert value["resolution.one_board.sizes"] == value["resolution.sizes"], "one board measured all sizes"
    assert value["resolution.boards.a.least"] > max(0, value["resolution.boards.b.most"])
    first, second = (value[f"conditions.720x1280.clock_pass{number}"] for number in (1, 2))
    assert first < second, "the slower board has the lower clock"
    assert rows["mean_power_W"].idxmin() == rows.index[0], "the least power is that of the smallest size"
    assert "256x256" in built["slow.generations"]["source"]["row"]
    assert value["conditions.smallest.clock"] > value["conditions.largest.clock"]
    assert rows["mfu"].iloc[0] == rows["mfu"].min()
    assert rows["mfu"].iloc[-1] == rows["mfu"].max()
    for key in ("paper_refitted", "single_mu"):
        assert value[f"resolution.one_board.{key}.mape_latency"] > 10, "no single µ serves both"
        assert value[f"resolution.{key}.error_smallest"] < -20
    exponents = [
        value[f"resolution.exponent.{pair}.latency"] for pair in ("256x256.480x832", "480x832.720x1280")
    ]
    assert exponents[0] < exponents[1] < 2
    for pair in ("256x256.480x832", "480x832.720x1280"):
        work, latency, lag = (
            value[f"resolution.exponent.{pair}.{name}"] for name in ("work", "latency", "lag")
        )
        assert lag == pytest.approx(work - latency, abs=1e-5)
        assert lag > 0, "measured cost grows more slowly than the count"
    assert value["resolution.spread.latency_median"] > 5 * value["resolution.repetition.latency"]


def test_numbers_that_rest_on_a_count_of_operations_are_modelled(built: dict[str, dict[str, Any]]) -> None:
    found = [key for key in built if key.endswith((".mfu", ".work", ".lag", ".efficiency", "_flop"))]
    assert len(found) > 10
    own = [key for key in found if not key.startswith("study.")]
    assert {built[key]["kind"] for key in own} == {"modelled"}


# (b) every key exists, and every number is used


def test_every_number_of_the_text_exists_and_every_number_is_used(built: dict[str, dict[str, Any]]) -> None:
    used = set(used_numbers(ROOT, SOURCE))
    assert used <= built.keys()
    assert built.keys() - used == UNUSED_NUMBERS


def test_the_text_uses_just_the_numbers_that_the_notebooks_make(synthetic_root: Path) -> None:
    made = json.loads((synthetic_root / "results/numbers/h200.json").read_text())
    assert (
        set(used_numbers(synthetic_root, synthetic_root / "paper/paper.typ")) == made.keys() - UNUSED_NUMBERS
    )


def test_a_number_that_is_not_there_stops_the_build(synthetic_root: Path, tmp_path: Path) -> None:
    text = synthetic_root / "paper" / "broken.typ"
    text.write_text(SOURCE.read_text().replace('#num("setup.tick")', '#num("setup.tock")'))
    with pytest.raises(UserError, match=r"setup\.tock"):
        compile_paper(synthetic_root, text, tmp_path / "paper.pdf")
    text.unlink()


# (c) no number with a unit is written by hand


def hand_written(text: str) -> list[str]:
    """Digits before a unit in Typst markup, outside code lines, strings, comments and the allow-list."""
    prose = "\n".join(line for line in text.splitlines() if not re.match(r"\s*(#set|#show|#let|//)", line))
    prose = re.sub(r'"[^"\n]*"|(width|height): \d+%', '""', prose)
    for literal in LITERALS:
        prose = prose.replace(literal, "")
    found = re.finditer(rf"(?<![\w.#])\d+(?:[.,]\d+)*(?:\s|~|\\ )*(?:{UNITS})(?![\w])", prose)
    return [match.group() for match in found]


def test_the_text_writes_no_number_with_a_unit_by_hand() -> None:
    assert hand_written(SOURCE.read_text()) == []


@pytest.mark.parametrize("bad", ["took 410 s", "14.0~% off", "78.8 Wh", "4 times as much", "about 700W"])
def test_numbers_written_by_hand_are_found(bad: str) -> None:
    assert hand_written(f"A video {bad} here.")


# (d) figures of the text are outputs of rules, and the other way round


def test_every_image_is_an_output_of_a_rule_and_every_figure_is_shown() -> None:
    shown = {Path(path).stem for path in re.findall(r'image\(\s*"(/figures/[^"]+)"', SOURCE.read_text())}
    made = {Path(path).name for path in re.findall(r'multiext\("<figures>/([^"]+)"', RULES)}
    assert shown == made
    assert len(re.findall(r"image\(", SOURCE.read_text())) == len(shown)


# (e) the same bytes each time


def test_the_paper_built_twice_is_the_same_bytes(synthetic_root: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "paper.pdf", tmp_path / "b" / "paper.pdf"
    for out in (first, second):
        compile_paper(synthetic_root, synthetic_root / "paper/paper.typ", out)
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size > 10_000


def test_every_cited_work_is_listed_and_every_listed_work_cited() -> None:
    listed = set(re.findall(r"^@\w+\{(\w+),", (ROOT / "paper/references.bib").read_text(), re.MULTILINE))
    cited = set(re.findall(r"(?<![\w\"])@([a-z]+\d{4}\w*)", SOURCE.read_text()))
    assert listed == cited


def test_the_paper_says_that_weights_are_random_before_any_result() -> None:
    text = SOURCE.read_text()
    assert 0 < text.index("*The weights are random.*") < text.index("= What was claimed")
    assert "random weights" in text.partition("= Cost against resolution")[2]  # in the figure's caption too
