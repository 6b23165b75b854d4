"""The record on disk: whole or not there, read back as it was, or refused with the reason."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from records import configuration, make_record, out_of_memory, write
from t2v_energy.errors import UserError
from t2v_energy.measurement.record import (
    Spans,
    Windows,
    read_record,
    record_name,
    record_paths,
    to_json,
    write_atomically,
)


class TestRoundTrip:
    @pytest.mark.parametrize("record", [make_record(), make_record(gpu=None), out_of_memory()])
    def test_what_is_read_is_what_was_written(self, record: Any, tmp_path: Path) -> None:
        path = tmp_path / record.file_name
        write_atomically(path, to_json(record))
        again = read_record(path)
        assert to_json(again) == to_json(record)
        assert (again.windows, again.ticks) == (record.windows, record.ticks)
        assert list(tmp_path.iterdir()) == [path]

    def test_one_top_level_key_a_line_and_columns_to_ten_microseconds(self) -> None:
        origin = {"utc": "2025-11-21T00:00:00Z", "monotonic_s": 1.23456789}
        windows = Windows(kind=["idle_before"], steps=[0], start_s=[0.123456789], end_s=[1.0])
        text = to_json(make_record(origin=origin, windows=windows))
        assert len(text.splitlines()) == len(json.loads(text)) + 2
        assert json.loads(text)["windows"]["start_s"] == [0.12346]
        assert json.loads(text)["origin"]["monotonic_s"] == 1.23456789

    def test_a_number_that_is_none_is_not_written(self) -> None:
        windows = Windows(kind=["idle_before"], steps=[0], start_s=[0.0], end_s=[float("nan")])
        with pytest.raises(ValueError, match="not JSON compliant"):
            to_json(make_record(windows=windows))

    def test_columns_of_different_length_are_refused(self) -> None:
        with pytest.raises(ValidationError, match="columns differ in length"):
            Spans(window=[1])

    def test_records_from_before_repetitions_were_numbered_read_as_they_did(self, tmp_path: Path) -> None:
        path = write(make_record(), tmp_path)
        before = read_record(path)
        data = json.loads(path.read_text())
        del data["windows"]["repetition"]
        for name in ("min_window_s", "max_repetitions", "max_ci95_percent"):
            del data["protocol_settings"]["full"][name]
        path.write_text(json.dumps(data))
        assert read_record(path) == before

    def test_repetitions_are_as_many_as_windows_or_none(self) -> None:
        columns = {"kind": ["generation"], "steps": [1], "start_s": [0.0], "end_s": [1.0]}
        assert Windows(**columns).repetition == []
        assert Windows(**columns, repetition=[0]).repetition == [0]
        with pytest.raises(ValidationError, match="columns differ in length"):
            Windows(**columns, repetition=[0, 1])

    def test_names_and_listing(self, tmp_path: Path) -> None:
        assert record_name("wan_480x832_81f_50s", "full", 2) == "wan_480x832_81f_50s__full_r2.json"
        first, second = write(make_record(pass_index=1), tmp_path), write(make_record(pass_index=2), tmp_path)
        for other in ("index.json", f".{first.name}.12.tmp", "SHA256SUMS", "x__other_r1.json"):
            (tmp_path / other).write_text("{}")
        assert record_paths(tmp_path) == [first, second]


class TestAtomicWrite:
    def test_nothing_is_overwritten_unless_asked(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "a.json"
        write_atomically(path, "one")
        with pytest.raises(UserError, match="never overwritten"):
            write_atomically(path, "two")
        assert path.read_text() == "one"
        write_atomically(path, "two", overwrite=True)
        assert path.read_text() == "two"

    def test_a_full_disk_leaves_no_partial_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        kept = tmp_path / "kept.json"
        kept.write_text("measured before")
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"No space left on device(.|\n)*free some disk space"):
            write_atomically(tmp_path / "a.json", "text")
        with pytest.raises(UserError, match="No space left"):
            write_atomically(kept, "text", overwrite=True)
        assert list(tmp_path.iterdir()) == [kept]
        assert kept.read_text() == "measured before"

    def test_the_file_is_on_disk_before_it_has_its_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[str] = []
        fsync, replace = os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", lambda d: (calls.append("fsync"), fsync(d))[1])
        monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b))[1])
        write_atomically(tmp_path / "a.json", "text")
        assert calls == ["fsync", "replace", "fsync"]

    def test_a_process_that_dies_before_the_rename_leaves_no_record(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def killed(*paths: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(tmp_path / make_record().file_name, "text")
        assert record_paths(tmp_path) == []


class TestRefusal:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"x__full_r1.json: the record is missing"):
            read_record(tmp_path / "x__full_r1.json")

    @pytest.mark.parametrize("keep", [0, 1, 500, -3])
    def test_truncated(self, tmp_path: Path, keep: int) -> None:
        path = write(make_record(), tmp_path)
        path.write_text(path.read_text()[:keep])
        with pytest.raises(UserError, match=rf"{path.name}: the record is truncated or corrupt"):
            read_record(path)

    def test_not_text(self, tmp_path: Path) -> None:
        path = write(make_record(), tmp_path)
        path.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(UserError, match="truncated or corrupt"):
            read_record(path)

    @pytest.mark.parametrize("text", ["[]", "{}", "3"])
    def test_not_a_record(self, tmp_path: Path, text: str) -> None:
        path = write(make_record(), tmp_path)
        path.write_text(text)
        with pytest.raises(UserError, match="not a record of t2v_energy"):
            read_record(path)

    def test_of_a_future_version(self, tmp_path: Path) -> None:
        path = write(make_record(), tmp_path)
        path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
        with pytest.raises(UserError, match=r"schema version 2; this code reads 1(.|\n)*update t2v_energy"):
            read_record(path)

    def test_foreign(self, tmp_path: Path) -> None:
        path = write(make_record(), tmp_path)
        other = path.rename(tmp_path / record_name(configuration(height=720).id(), "sampled", 1))
        with pytest.raises(UserError, match=f"foreign record: its content belongs in {path.name}"):
            read_record(other)

    @pytest.mark.parametrize(
        ("change", "field"),
        [
            ({"novel": 1}, "novel"),
            ({"status": "fine"}, "status"),
            ({"spans": {"window": [1]}}, "spans"),
            ({"pass_index": 0}, "pass_index"),
        ],
    )
    def test_malformed(self, tmp_path: Path, change: dict[str, Any], field: str) -> None:
        path = write(make_record(), tmp_path)
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(UserError, match=f"malformed record: {field}"):
            read_record(path)

    def test_a_counter_that_fell(self, tmp_path: Path) -> None:
        path = write(make_record(), tmp_path)
        data = json.loads(path.read_text())
        data["ticks"]["energy_mJ"][5] = 0
        path.write_text(json.dumps(data))
        with pytest.raises(UserError, match="energy counter fell"):
            read_record(path)
