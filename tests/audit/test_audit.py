"""Each check on rows that have its fault and on rows that have not; and all of them on the authors' file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from published_rows import clean_rows, published_file, row, write
from t2v_energy import cli
from t2v_energy.audit import checks
from t2v_energy.audit.report import COLUMNS, findings_table, ranges
from t2v_energy.audit.table import EnergyTable, read_energy_table
from t2v_energy.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
Rows = list[dict[str, object]]
Read = Callable[[Rows], EnergyTable]
needs_file = pytest.mark.skipif(published_file() is None, reason="the authors' file is not here")


@pytest.fixture
def read(tmp_path: Path) -> Read:
    return lambda rows: read_energy_table(write(tmp_path / "table.csv", rows), ROOT)


def changed(rows: Rows, **values: object) -> Rows:
    """The rows with these cells in each."""
    return [each | values for each in rows]


def with_energy(rows: Rows, part: str, joules: Callable[[float], float]) -> Rows:
    """The rows with one component's energy as a function of the duration."""
    name = f"energy_generate_{part}"
    return [each | {name: joules(float(str(each["duration_generate"]))) / 3.6e6} for each in rows]


def test_clean_table_has_no_finding(read: Read) -> None:
    assert checks.audit(read(clean_rows())) == []


def test_constant_power_and_its_extra_time_are_recovered(read: Read) -> None:
    rows = with_energy(clean_rows(), "ram", lambda s: 38 * (s + 0.5))
    (finding,) = checks.constant_power_columns(read(rows))
    assert finding.subject == "ram energy"
    assert finding.numbers["power_W"] == pytest.approx(38)
    assert finding.numbers["extra_s"] == pytest.approx(0.5, abs=1e-6)
    assert finding.lines == tuple(range(2, 14))


def test_constant_that_says_so_is_no_finding(tmp_path: Path) -> None:
    rows = [
        {"model": "cogvideox-2b", "height": 480, "width": 720, "num_frames": 49, "num_inference_steps": 50,
         "latency_s": 50.0 * (1 + i), "gpu_energy_Wh": 8.0 * (1 + i) * (1 + 0.02 * (i % 2)),
         "ram_energy_Wh": 0.5 * (1 + i)}
        for i in range(6)
    ]  # fmt: skip
    bare = read_energy_table(write(tmp_path / "bare.csv", rows), ROOT, "h100-sxm")
    assert [f.subject for f in checks.constant_power_columns(bare)] == ["ram energy"]
    said = write(tmp_path / "said.csv", changed(rows, ram_energy_Wh_kind="constant"))
    assert checks.constant_power_columns(read_energy_table(said, ROOT, "h100-sxm")) == []


def test_idle_tail_is_found_in_short_windows_alone(read: Read) -> None:
    short = [
        row("AnimateDiff", f"prompt {i}", duration_s=0.68 + 0.001 * i, size=(512, 512, 16, 4))
        for i in range(6)
    ]
    rows = with_energy(clean_rows() + short, "ram", lambda s: 38 * (s + 0.1))
    (finding,) = checks.idle_tails(read(rows))
    assert finding.lines == tuple(range(14, 20))
    assert finding.numbers["largest_percent"] == pytest.approx(100 * 0.1 / 0.6825, rel=0.01)
    assert checks.idle_tails(read(with_energy(rows, "ram", lambda s: 38 * s))) == []


def ltx(**others: object) -> dict[str, object]:
    """A row of LTX-Video: 9.7 s at 690 W, then 8.1 s at 570 W."""
    first = row("LTX-Video-0.9.7-dev", duration_s=9.7, gpu_W=690, size=(512, 704, 121, 30))
    second = {"duration_denoise": 8.1, "energy_denoise_gpu": 570 * 8.1 / 3.6e6,
              "energy_denoise_cpu": 60 * 8.1 / 3.6e6, "energy_denoise_ram": 30 * 8.1 / 3.6e6}  # fmt: skip
    return first | second | others


def test_power_above_limit_of_a_whole_video_and_of_a_window(read: Read) -> None:
    (finding,) = checks.power_above_limit(read([*clean_rows(), ltx()]))
    assert finding.numbers["power_W"] == pytest.approx((690 * 9.7 + 570 * 8.1) / 9.7)
    assert finding.lines == (14,)
    upsample = {"duration_upsample": 0.006, "energy_upsample_gpu": 17 / 3.6e6,
                "energy_upsample_cpu": 1e-6, "energy_upsample_ram": 1e-6}  # fmt: skip
    window, _ = checks.power_above_limit(read([*clean_rows(), ltx(**upsample)]))
    assert window.numbers["power_W"] == pytest.approx(17 / 0.006)


def test_power_is_not_judged_without_a_board(read: Read) -> None:
    assert checks.power_above_limit(read(changed([ltx()], gpu_model="GPU of nobody"))) == []


def test_scope_of_the_first_duration(read: Read) -> None:
    (finding,) = checks.scopes_differ(read([*clean_rows(), ltx()]))
    assert finding.subject == "LTX-Video-0.9.7-dev"
    assert finding.numbers["ratio"] == pytest.approx((9.7 + 8.1) / 9.7)
    assert checks.scopes_differ(read(clean_rows())) == []


def test_cpu_that_scatters_alone(read: Read) -> None:
    busy = [row(prompt=f"prompt {i}", cpu_W=60 + 5 * i, gpu_W=600 + 0.1 * i) for i in range(6)]
    (finding,) = checks.cpu_follows_neighbours(read(busy))
    assert (finding.numbers["cpu_power_min_W"], finding.numbers["cpu_power_max_W"]) == pytest.approx((60, 85))
    both = [row(prompt=f"prompt {i}", cpu_W=60 + 5 * i, gpu_W=400 + 40 * i) for i in range(6)]
    assert checks.cpu_follows_neighbours(read(both)) == []


def test_label_that_the_work_contradicts(read: Read) -> None:
    wan = row("WAN2.1-T2V-1.3B", duration_s=410, size=(480, 832, 81, 60))
    (finding,) = checks.labels_against_work(read([wan]))
    assert finding.numbers["mfu"] < checks.PLAUSIBLE_MFU[0] < finding.numbers["default_mfu"]
    right = row("WAN2.1-T2V-1.3B", duration_s=410, size=(720, 1280, 81, 50))
    assert checks.labels_against_work(read([right])) == []
    too_fast = row("WAN2.1-T2V-1.3B", duration_s=41, size=(720, 1280, 81, 50))
    (finding,) = checks.labels_against_work(read([too_fast]))
    assert finding.numbers["mfu"] > checks.PLAUSIBLE_MFU[1]


def test_sizes_that_the_pipeline_refuses_or_changes(read: Read) -> None:
    (refused,) = checks.sizes_not_run(read([row("WAN2.1-T2V-1.3B", size=(1980, 3520, 81, 50))]))
    assert refused.severity == "error"
    assert "1980" in refused.evidence
    (frames,) = checks.sizes_not_run(read([row("Mochi-1-preview", size=(480, 848, 84, 64))]))
    assert frames.numbers == {"asked": 84, "made": 79}
    (longer,) = checks.sizes_not_run(read([row("CogVideoX-2b", size=(480, 720, 45, 50))]))
    assert longer.numbers == {"asked": 45, "made": 48}
    (sides,) = checks.sizes_not_run(read([ltx()]))
    assert sides.numbers == {"height": 640, "width": 896}
    assert checks.sizes_not_run(read([row("WAN2.1-T2V-1.3B", size=(720, 1280, 81, 50))])) == []


def test_runs_without_a_spread(read: Read) -> None:
    (finding,) = checks.no_run_variance(read(changed(clean_rows(), runs=5)))
    assert len(finding.lines) == 12
    assert checks.no_run_variance(read(changed(clean_rows(), runs=5, duration_generate_std=0.1))) == []


def test_prompts_missing_and_repeated(read: Read) -> None:
    (missing,) = checks.prompts_incomplete(read(clean_rows()[:-1]))
    assert missing.numbers == {"prompts": 5, "all_prompts": 6}
    (repeated,) = checks.prompts_incomplete(read([*clean_rows(), clean_rows()[0]]))
    assert repeated.lines == (2, 14)


@pytest.mark.parametrize(("part", "factor"), [("gpu", 1e3), ("cpu", 1e-3)])
def test_unit_of_one_component(read: Read, part: str, factor: float) -> None:
    name = f"energy_generate_{part}"
    rows = [each | {name: float(str(each[name])) * factor} for each in clean_rows()]
    found = checks.units_off(read(rows))
    assert {f.subject for f in found} == {f"CogVideoX-{size}, {part} energy" for size in ("2b", "5b")}
    assert {f.numbers["factor"] for f in found} == {factor}


def test_unit_of_the_durations(read: Read) -> None:
    rows = [
        each | {"duration_generate": 1000 * float(str(each["duration_generate"]))} for each in clean_rows()
    ]
    assert {f.subject.partition(", ")[2] for f in checks.units_off(read(rows))} == {
        "durations (or all energies)"
    }


def test_every_check_is_run() -> None:
    public = {
        value for name, value in vars(checks).items()
        if callable(value) and getattr(value, "__annotations__", {}).get("return") == "list[Finding]"
        and not name.startswith("_")
    }  # fmt: skip
    assert public - {checks.audit} == set(checks.CHECKS)


# --- the command --------------------------------------------------------------------------------------------


def run(*words: object) -> int:
    return cli.main(["--root", str(ROOT), "audit", *map(str, words)])


def test_report_csv_and_json_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "table.csv", changed(clean_rows(), runs=5))
    assert run(path) == 1
    assert "no_run_variance" in capsys.readouterr().out
    assert run(path, "--format", "csv", "--out", tmp_path / "a.csv") == 1
    table = pd.read_csv(tmp_path / "a.csv")
    assert tuple(table.columns) == COLUMNS
    assert run(path, "--format", "json", "--out", tmp_path / "a.json") == 1
    data = json.loads((tmp_path / "a.json").read_text())
    assert [f["check"] for f in data["findings"]] == list(table["check"]) == ["no_run_variance"]
    assert run(write(tmp_path / "clean.csv", clean_rows())) == 0


def test_lines_are_shown_as_ranges() -> None:
    assert ranges((2, 3, 4, 9, 11, 12)) == "2–4, 9, 11–12"


HEADER = ",".join(clean_rows()[0])
CELLS = ",".join(map(str, clean_rows()[0].values()))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("<!DOCTYPE html><html></html>", "HTML"),
        (HEADER, "no row"),
        (f"{HEADER}\n{CELLS[:-4]}", "cells"),
        (HEADER.replace("energy_generate_gpu", "energy") + f"\n{CELLS}", "energy_generate_gpu"),
        (f"{HEADER}\n" + CELLS.replace(",50.0,", ",nan,", 1), "duration_generate: 'nan'"),
        ("a,b\n1,2", "neither a column 'model'"),
    ],
)
def test_bad_file_is_one_message_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    path, out = tmp_path / "bad.csv", tmp_path / "out.csv"
    path.write_text(text)
    assert run(path, "--format", "csv", "--out", out) == 2
    error = capsys.readouterr().err
    assert says in error
    assert str(path) in error
    assert "Traceback" not in error
    assert not out.exists()


def test_a_size_that_is_no_whole_number(tmp_path: Path) -> None:
    row = {"model": "cogvideox-2b", "height": 480.5, "width": 720, "num_frames": 49,
           "num_inference_steps": 50, "latency_s": 50.0, "gpu_energy_Wh": 8.0}  # fmt: skip
    with pytest.raises(UserError, match=r"line 2, height: 480\.5 is not a whole number"):
        read_energy_table(write(tmp_path / "own.csv", [row]), ROOT)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_energy_table(tmp_path / "none.csv", ROOT)


# --- the authors' own file ----------------------------------------------------------------------------------


@needs_file
def test_published_table_has_what_is_known_of_it() -> None:
    path = published_file()
    assert path is not None
    found = checks.audit(read_energy_table(path, ROOT))
    table = findings_table(found)
    assert len(found) >= 7
    assert (table["rows"] > 0).all()
    assert {f.check for f in found} == {check.__name__ for check in checks.CHECKS} - {"units_off"}
    by_subject = {(f.check, f.subject): f.numbers for f in found}
    ram = by_subject["constant_power_columns", "ram energy"]
    assert ram["power_W"] == pytest.approx(38.0, abs=0.01)
    assert ram["extra_s"] == pytest.approx(0.51, abs=0.01)
    assert by_subject["scopes_differ", "LTX-Video-0.9.7-dev"]["whole_s"] == pytest.approx(17.81, abs=0.01)
    assert by_subject["power_above_limit", "LTX-Video-0.9.7-dev, whole video"]["power_W"] > 1150
    labels = {f.subject for f in found if f.check == "labels_against_work"}
    assert labels == {"WAN2.1-T2V-1.3B", "WAN2.1-T2V-14B"}
