"""The list of claims is whole and sound, verdicts follow from values, the authors' file gives table 4."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml
from published_rows import published_file, row, sweep_rows, write
from t2v_energy import cli
from t2v_energy.analysis.numbers import read
from t2v_energy.claims.listing import CLAIMS_FILE, Claim, Recomputation, load_claims
from t2v_energy.claims.sources import Recomputed, bound, functions, read_sources
from t2v_energy.claims.verdicts import (
    COLUMNS,
    VERDICTS,
    Verdict,
    claims_numbers,
    claims_table,
    judged,
    table4_recomputed,
)
from t2v_energy.errors import UserError
from t2v_energy.study import load_study

ROOT = Path(__file__).resolve().parents[2]
CLAIMS = load_claims(ROOT)
STUDY = load_study(ROOT)
needs_file = pytest.mark.skipif(published_file() is None, reason="the authors' file is not here")
Table = Callable[..., pd.DataFrame]


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """claims.csv by id, of these files of the authors and tables of ours."""

    def build(cross_model: Path | None = None, sweeps: Path | None = None) -> pd.DataFrame:
        sources = read_sources(ROOT, CLAIMS, tmp_path / "tables", cross_model, sweeps)
        return claims_table(CLAIMS, sources).set_index("id")

    return build


def printed_rows() -> list[dict[str, object]]:
    """Self-written rows of every model, two prompts each, whose means are those that table 4 prints."""
    rows = []
    for model in STUDY.models.values():
        latency_s = model.latency_s[0]
        defaults = model.defaults
        size = (defaults.height, defaults.width, defaults.num_frames, defaults.num_inference_steps)
        for i, off in enumerate((-1, 1)):
            powers = {
                f"{part}_W": 3600 * (mean + off * std / 2**0.5) / latency_s
                for part, (mean, std) in zip(
                    ("gpu", "cpu", "ram"), (model.gpu_energy_Wh, model.cpu_energy_Wh, model.ram_energy_Wh),
                    strict=True,
                )
            }  # fmt: skip
            each = row(
                model.title, f"prompt {i}", duration_s=latency_s, size=size, fps=defaults.fps, **powers
            )
            each["duration_generate"] = latency_s + off * model.latency_s[1] / 2**0.5
            rows.append(each | {"runs": 5, "cpu_count": 8})
    return rows


# --- the list -----------------------------------------------------------------------------------------------


def test_every_place_of_the_study_has_claims() -> None:
    assert len(CLAIMS) >= 150
    places = {claim.place.partition(".")[0] for claim in CLAIMS}
    assert {
        "abstract",
        *(f"table {n}" for n in range(1, 8)),
        *(f"section {n}" for n in range(1, 7)),
    } <= places
    assert {"appendix A", "appendix B"} <= places


def test_tables_2_and_4_are_taken_from_what_the_study_prints() -> None:
    found = {claim.id: claim for claim in CLAIMS}
    for key, model in STUDY.models.items():
        for quantity in ("latency_s", "gpu_energy_Wh", "cpu_energy_Wh", "ram_energy_Wh"):
            mean, std = getattr(model, quantity)
            assert found[f"table4.{key}.{quantity}"].value == mean
            assert found[f"table4.{key}.{quantity}_std"].value == std
        assert found[f"table2.{key}.height"].value == model.defaults.height
    assert found["table4.animatediff-lightning.ram_energy_Wh_std"].step == pytest.approx(1e-5)
    assert found["table4.wan2.1-t2v-14b.cpu_energy_Wh_std"].step == pytest.approx(0.1), "4.0, not 4"


def test_every_recomputation_is_registered_and_every_function_used() -> None:
    named = set()
    for claim in CLAIMS:
        for step in claim.recompute:
            bound(step, claim.id)
            named.add(step.function)
    assert named == set(functions())
    assert len(named) >= 10


def test_functions_are_described() -> None:
    text = (ROOT / "docs" / "published.md").read_text(encoding="utf-8")
    _, _, rows = text.partition("| function |")
    listed = set(re.findall(r"^\| `(\w+)` \|", rows, re.MULTILINE))
    assert set(functions()) == listed


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"printed": "about 3"}, "must be a number"),
        ({"printed": ["models", "no-such-model"]}, "config/study.yaml has no 'no-such-model'"),
        ({"recompute": []}, "give either recompute or not_obtainable"),
        ({"unknown": 1}, "unknown key"),
    ],
)
def test_a_wrong_list_is_one_message(tmp_path: Path, change: dict[str, object], says: str) -> None:
    entry = {"id": "a", "place": "b", "statement": "c", "printed": "1"}
    entry |= {"recompute": [{"campaign": "study", "function": "printed_models"}]} | change
    (tmp_path / "config").mkdir()
    (tmp_path / "config/study.yaml").write_text((ROOT / "config/study.yaml").read_text())
    (tmp_path / CLAIMS_FILE).write_text(yaml.safe_dump({"claims": [entry]}))
    with pytest.raises(UserError, match=says):
        load_claims(tmp_path)


@pytest.mark.parametrize(
    ("campaign", "function", "arguments", "says"),
    [
        ("study", "no_such", {}, "there is no 'no_such'"),
        ("theory", "printed_models", {}, "computes from 'study'"),
        ("theory", "symbol", {"name": "width", "nom": 1}, "unexpected keyword"),
    ],
)
def test_a_wrong_recomputation_is_one_message(
    campaign: str, function: str, arguments: dict[str, object], says: str
) -> None:
    step = Recomputation.model_validate({"campaign": campaign, "function": function, "with": arguments})
    with pytest.raises(UserError, match=says):
        bound(step, "config/claims.yaml, x")


# --- verdicts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "half", "relation", "campaign", "verdict"),
    [
        (9.74, 0, "equal", "published-h100", "reproduced"),
        (9.76, 0, "equal", "published-h100", "differs"),
        (9.76, 0, "equal", "study", "inconsistent with itself"),
        (9.9, 0.2, "equal", "h200", "reproduced"),
        (12.0, 0, "at least", "theory", "reproduced"),
        (9.6, 0, "at least", "theory", "differs"),
        (9.6, 0, "at most", "theory", "reproduced"),
    ],
)
def test_verdict_follows_from_the_printed_digits(
    value: float, half: float, relation: str, campaign: str, verdict: Verdict
) -> None:
    data = {"id": "a", "place": "b", "statement": "c", "printed": "9.7", "relation": relation}
    step = {"campaign": campaign, "function": "f"}
    claim = Claim.model_validate(data | {"recompute": [step]})
    assert judged(claim, claim.recompute[0], Recomputed(value, "", half)) == verdict


def test_without_the_authors_files_it_is_built_and_says_what_is_absent(table: Table) -> None:
    found = table()
    assert len(found) == len(CLAIMS)
    assert set(found["verdict"]) <= set(VERDICTS)
    assert (found["reason"] != "").all()
    cells = found[found["place"] == "table 4"]
    assert len(cells) == 56
    assert set(cells["verdict"]) == {"data absent"}
    assert cells["reason"].str.contains("published_cross_model=FILE").all()
    assert found["recomputed"].notna().equals(~found["verdict"].isin(["data absent", "not obtainable"]))


def test_table_4_is_reproduced_from_rows_with_its_means_and_deviations(table: Table, tmp_path: Path) -> None:
    found = table(write(tmp_path / "rows.csv", printed_rows()))
    cells = found[found["place"] == "table 4"]
    assert set(cells["verdict"]) == {"reproduced"}
    assert found.loc["table2.wan2.1-t2v-14b.height", "verdict"] == "reproduced"


def test_a_planted_difference_is_found(table: Table, tmp_path: Path) -> None:
    rows = printed_rows()
    for each in rows:
        if each["model_name"] == "CogVideoX-2B":
            each["energy_generate_gpu"] = float(str(each["energy_generate_gpu"])) * 1.1
    found = table(write(tmp_path / "rows.csv", rows)).loc["table4.cogvideox-2b.gpu_energy_Wh"]
    assert found["verdict"] == "differs"
    assert found["difference_percent"] == pytest.approx(10, abs=0.1)


def test_sweeps_give_table_3_and_the_efficiency(table: Table, tmp_path: Path) -> None:
    """Rows that take 1.05 times as long as the printed formula says: µ is 0.456 / 1.05, the error 4.76 %."""
    found = table(sweeps=write(tmp_path / "sweeps.csv", sweep_rows(1.05)))
    assert found.loc["theory.mu_regression", "recomputed"] == pytest.approx(0.456 / 1.05, rel=1e-4)
    assert found.loc["theory.r2", "recomputed"] == pytest.approx(1)
    for name in ("resolution", "frames", "steps"):
        assert found.loc[f"table3.{name}.latency", "recomputed"] == pytest.approx(
            100 * (1 - 1 / 1.05), rel=1e-4
        )
    assert found.loc["method.most_steps", "verdict"] == "reproduced"
    assert found.loc["method.largest_short", "recomputed"] == 1008
    assert found.loc["steps.frames", "verdict"] == "reproduced"


def test_our_own_tables_are_used_by_column(tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    common = {"exponent": 1.5, "exponent_ci95_low": 1.4, "exponent_ci95_high": 1.6, "n": 7, "kind": "global"}
    common |= {"r2_linear": 0.9999, "range": "global, 720x1280"}
    rows = [
        common | {"set": name, "quantity": quantity, "x": x}
        for name, x in (("resolution", "pixels"), ("frames", "num_frames"), ("steps", "num_inference_steps"))
        for quantity in ("latency_s", "gpu_energy_Wh")
    ]
    pd.DataFrame(rows).to_csv(folder / "scaling.csv", index=False)
    doubling = {"dimension": "steps", "ratio_ci95_low": 1.9, "ratio_ci95_high": 2.1}
    pairs = [
        doubling | {"quantity": q, "ratio": r} for q in ("latency_s", "gpu_energy_Wh") for r in (1.6, 2.0)
    ]
    pd.DataFrame(pairs).to_csv(folder / "doubling.csv", index=False)
    found = claims_table(CLAIMS, read_sources(ROOT, CLAIMS, folder)).set_index("id")
    assert found.loc["abstract.exponent_space", ["recomputed", "verdict"]].tolist() == [1.5, "differs"]
    assert found.loc["discussion.halving_steps", ["recomputed", "verdict"]].tolist() == [0.5, "reproduced"]
    assert found.loc["discussion.doubling_frames", "recomputation"].startswith("theory"), (
        "no such pair of ours"
    )


def test_what_needs_no_data_is_known(table: Table) -> None:
    found = table()
    for name, value in {
        "table5.N": 30,
        "table5.d": 1536,
        "table5.ffn": 8960,
        "appendix.B.tokens": 5376,
    }.items():
        assert found.loc[name, ["recomputed", "verdict"]].tolist() == [value, "differs"]
    for name in ("table7.l4.balance", "table5.peak", "appendix.B.mu", "abstract.models"):
        assert found.loc[name, "verdict"] == "inconsistent with itself", name
    assert found.loc["table7.h100-sxm.balance", "verdict"] == "reproduced"


def test_numbers_count_the_table(table: Table) -> None:
    built = table().reset_index()
    numbers = claims_numbers(built, "results/tables/claims.csv")
    verdicts = ("reproduced", "differs", "inconsistent", "not_obtainable", "absent")
    counts = {name: numbers[f"claims.{name}"].value for name in verdicts}
    assert sum(int(value) for value in counts.values()) == numbers["claims.rows"].value == len(CLAIMS)
    assert 30 <= int(numbers["claims.functions"].value) <= len(functions())
    assert counts["not_obtainable"] == (built["verdict"] == "not obtainable").sum()


# --- the command, and the authors' own file -----------------------------------------------------------------


def run(tmp_path: Path, *more: object) -> int:
    names = ["--tables", tmp_path / "tables", "--out", tmp_path / "c.csv", "--numbers", tmp_path / "n.json"]
    return cli.main(["--root", str(ROOT), "claims", *map(str, [*names, *more])])


def test_command_writes_table_and_numbers(tmp_path: Path) -> None:
    assert run(tmp_path) == 0
    assert tuple(pd.read_csv(tmp_path / "c.csv").columns) == COLUMNS
    assert read(tmp_path / "n.json")["claims.rows"]["value"] == len(CLAIMS)


def test_another_file_than_the_pinned_one_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "rows.csv", printed_rows())
    assert run(tmp_path, "--cross-model", path) == 2
    assert "SHA-256" in capsys.readouterr().err
    assert not (tmp_path / "c.csv").exists()


@needs_file
def test_published_table_4_is_reproduced_but_for_what_is_known() -> None:
    path = published_file()
    assert path is not None
    found = table4_recomputed(ROOT, path).set_index(["model", "quantity"])
    assert len(found) == 28
    wrong = found[~(found["mean_matches"] & found["std_matches"])]
    assert set(wrong.index) == {
        ("wan2.1-t2v-14b", "cpu_energy_Wh"), ("wan2.1-t2v-14b", "gpu_energy_Wh"),
        ("ltx-video-0.9.7-dev", "latency_s"),
    }  # fmt: skip
    assert (wrong["reason"] != "").all()
    assert wrong.loc[("ltx-video-0.9.7-dev", "latency_s"), "recomputed"] == pytest.approx(17.8, abs=0.05)
    assert wrong.loc[("wan2.1-t2v-14b", "cpu_energy_Wh"), "recomputed"] == pytest.approx(35.7, abs=0.05)


@needs_file
def test_claims_from_the_published_file(table: Table) -> None:
    found = table(published_file())
    assert found.loc["method.prompts", "recomputed"] == 49
    assert found.loc["method.prompts_every", "recomputed"] == 41
    assert found.loc["models.ratio", "verdict"] == "reproduced"
    assert found.loc["table2.wan2.1-t2v-1.3b.height", "recomputed"] == 480
