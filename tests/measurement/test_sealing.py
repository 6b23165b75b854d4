"""Seals: what they refuse, what they hold, and what has changed since."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from records import GPU, configuration, environment, make_record, out_of_memory, write
from t2v_energy.errors import UserError
from t2v_energy.measurement.record import Process
from t2v_energy.measurement.sealing import SEAL, is_sealed, seal, sealed_records, verify

SIZES = [(240, 320), (480, 832), (720, 1280)]


@pytest.fixture
def names(tmp_path: Path) -> list[str]:
    """Three sound records in ``tmp_path``; one ran out of memory."""
    makers = [make_record, make_record, out_of_memory]
    records = [m(config=configuration(height=h, width=w)) for m, (h, w) in zip(makers, SIZES, strict=True)]
    return [write(record, tmp_path).name for record in records]


def test_a_seal_is_read_by_sha256sum(tmp_path: Path, names: list[str]) -> None:
    assert not is_sealed(tmp_path)
    path = seal(tmp_path, names, GPU)
    assert path == tmp_path / SEAL
    assert is_sealed(tmp_path)
    lines = path.read_text().splitlines()
    assert [line[66:] for line in lines] == sorted(names)
    assert all(re.match(r"[0-9a-f]{64}  \S", line) for line in lines)
    subprocess.run(["sha256sum", "--strict", "-c", SEAL], cwd=tmp_path, check=True, capture_output=True)


def test_sealed_records_are_listed_and_verified(tmp_path: Path, names: list[str]) -> None:
    seal(tmp_path, reversed(names))
    assert sealed_records(tmp_path) == verify(tmp_path) == [tmp_path / name for name in sorted(names)]


def test_batches_and_temporary_files_are_not_records(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "batches").mkdir()
    (tmp_path / "batches" / "abc.json").write_text("{}")
    (tmp_path / f".{names[0]}.1.tmp").write_text("{")
    seal(tmp_path, names)
    assert len(sealed_records(tmp_path)) == 3


class TestRefusal:
    def test_missing_and_extra_records_are_all_named(self, tmp_path: Path, names: list[str]) -> None:
        absent = ["a__sampled_r1.json", "b__sampled_r1.json"]
        with pytest.raises(UserError) as error:
            seal(tmp_path, [*names[1:], *absent])
        assert "missing: a__sampled_r1.json, b__sampled_r1.json" in str(error.value)
        assert f"extra: {names[0]}" in str(error.value)
        assert not is_sealed(tmp_path)

    @pytest.mark.parametrize(
        ("fault", "rule"),
        [
            ({"reasons": 0x40}, "throttling"),
            ({"power_scale": 1.1}, "closure"),
            ({"unspanned_s": 0.5}, "unspanned"),
            (
                {"environment": environment(foreign_processes=[Process(pid=7, used_MiB=1.0)])},
                "foreign_process",
            ),
            ({"gpu": "NVIDIA L4"}, "gpu_name"),
        ],
    )
    def test_invalid_records_with_their_rule(
        self, tmp_path: Path, names: list[str], fault: dict[str, object], rule: str
    ) -> None:
        bad = write(make_record(config=configuration(height=864, width=1536), **fault), tmp_path)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=rf"{re.escape(bad.name)} breaks {rule} \("):
            seal(tmp_path, [*names, bad.name], GPU)
        assert not is_sealed(tmp_path)

    def test_a_flag_is_no_refusal(self, tmp_path: Path) -> None:
        flagged = write(make_record(step_s=(0.5, 1.0)), tmp_path)
        assert is_sealed(seal(tmp_path, [flagged.name], GPU).parent)

    def test_two_gpu_models_make_no_campaign(self, tmp_path: Path, names: list[str]) -> None:
        other = write(make_record(gpu="NVIDIA L4", config=configuration(height=864, width=1536)), tmp_path)
        with pytest.raises(UserError, match="NVIDIA L4; the campaign is on NVIDIA H200"):
            seal(tmp_path, [*names, other.name])

    def test_a_corrupt_record(self, tmp_path: Path, names: list[str]) -> None:
        (tmp_path / names[0]).write_text("{")
        with pytest.raises(UserError, match="truncated or corrupt"):
            seal(tmp_path, names)

    def test_an_empty_experiment(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no records to seal"):
            seal(tmp_path, [])


class TestResealing:
    def test_the_same_records_leave_the_seal_alone(self, tmp_path: Path, names: list[str]) -> None:
        path = seal(tmp_path, names)
        os.utime(path, (1, 1))
        assert seal(tmp_path, names) == path
        assert path.stat().st_mtime == 1

    def test_changed_records_are_not_resealed(self, tmp_path: Path, names: list[str]) -> None:
        before = seal(tmp_path, names).read_bytes()
        record = tmp_path / names[1]
        record.write_text(record.read_text().replace('"order": 0', '"order": 1'))
        with pytest.raises(UserError, match=f"changed: {re.escape(names[1])}"):
            seal(tmp_path, names)
        assert (tmp_path / SEAL).read_bytes() == before

    def test_neither_are_fewer_or_more(self, tmp_path: Path, names: list[str]) -> None:
        before = seal(tmp_path, names).read_bytes()
        more = write(make_record(pass_index=2), tmp_path)
        with pytest.raises(UserError, match=f"extra: {re.escape(more.name)}"):
            seal(tmp_path, [*names, more.name])
        assert (tmp_path / SEAL).read_bytes() == before


class TestAfterwards:
    def test_every_fault_is_named_in_one_error(self, tmp_path: Path, names: list[str]) -> None:
        seal(tmp_path, names)
        changed, missing, _ = sorted(names)
        (tmp_path / changed).write_text("{}")
        (tmp_path / missing).unlink()
        extra = write(make_record(pass_index=9), tmp_path).name
        with pytest.raises(UserError) as error:
            verify(tmp_path)
        for fault in (f"missing: {missing}", f"extra: {extra}", f"changed: {changed}"):
            assert fault in str(error.value)
        with pytest.raises(UserError) as by_name:
            sealed_records(tmp_path)
        assert f"missing: {missing}; extra: {extra}" in str(by_name.value)
        assert changed not in str(by_name.value)

    def test_no_seal_says_what_to_do(self, tmp_path: Path) -> None:
        for function in (sealed_records, verify):
            with pytest.raises(UserError, match="t2v-energy seal"):
                function(tmp_path)

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("", "empty"),
            ("abc  x__full_r1.json\n", "line 1: not"),
            (f"{'0' * 64}  ../x__full_r1.json\n", "line 1: not"),
            (f"{'0' * 64}  x__full_r1.json\n" * 2, "line 2: a name that was there before"),
        ],
    )
    def test_a_broken_seal_is_an_error(self, tmp_path: Path, text: str, why: str) -> None:
        (tmp_path / SEAL).write_text(text)
        with pytest.raises(UserError, match=why):
            sealed_records(tmp_path)


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, t2v_energy.measurement.sealing\nprint(*(m for m in sys.modules if '.' not in m))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    heavy = {"torch", "scipy", "numpy", "pandas", "diffusers", "codecarbon", "matplotlib"}
    assert not heavy & set(loaded.stdout.split())
