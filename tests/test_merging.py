"""Merged campaigns: nothing is lost, nothing overwritten, and nothing is mixed unsaid."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny
from records import GPU, configuration, environment, make_record, out_of_memory, write
from t2v_energy import cli, merging
from t2v_energy.analysis.rows import machine, read_rows
from t2v_energy.config import ProtocolSettings, load_campaign
from t2v_energy.errors import UserError
from t2v_energy.measurement.record import Record, read_record, record_paths
from t2v_energy.measurement.sealing import sha256, verify, write_seal
from t2v_energy.merging import MIXTURES, merge

SMALL, MIDDLE, LARGE = (configuration(height=h, width=w) for h, w in ((240, 320), (480, 832), (720, 1280)))
MARK = ["campaign", "pass_index", "source"]
"""What merging may change of a record."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tiny.make_root(tmp_path / "root")
    for key in ("a", "b"):
        about = {"key": key, "title": key, "accelerator": "h200", "device": "cuda", "gpu_name": GPU}
        tiny.write_yaml(root, f"campaigns/{key}", about | {"experiments": {"resolution": {}}})
    return root


def sealed(root: Path, campaign: str, *records: Record) -> Path:
    """The folder of a campaign with these records, each experiment sealed."""
    folder = root / "results" / "raw" / campaign
    for record in records:
        write(record, folder / record.experiment)
    for experiment in {record.experiment for record in records}:
        write_seal(folder / experiment)
    return folder


def of(campaign: str, host: str = "", **changes: Any) -> Record:
    """A record of a campaign measured on a host of its own."""
    return make_record(campaign=campaign, **{"environment": on(host or campaign), **changes})


def on(host: str, gpu: str | None = GPU, **changes: Any) -> Any:
    made = environment(gpu, host=host, **changes)
    return made.model_copy(update={"gpu": made.gpu and made.gpu.model_copy(update={"uuid": f"GPU-{host}"})})


def tables(root: Path, campaign: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    built = root / "built"
    parquet, csv = built / "measurements.parquet", built / "configurations.csv"
    where = ["--root", str(root), "aggregate", "--campaign", campaign]
    assert cli.main([*where, "--parquet", str(parquet), "--csv", str(csv)]) == 0
    return pd.read_parquet(parquet), pd.read_csv(csv)


def refused(root: Path, sources: Sequence[str] = ("a", "b"), allowed: Sequence[str] = ()) -> str:
    with pytest.raises(UserError) as error:
        merge(root, sources, "c", allowed)
    assert not (root / "results" / "raw" / "c").exists(), "a refused merge leaves nothing behind"
    assert not (root / "config" / "campaigns" / "c.yaml").exists()
    return str(error.value)


def test_every_record_arrives_unchanged_with_its_source(root: Path) -> None:
    ours = sealed(root, "a", of("a", config=SMALL), of("a", config=MIDDLE))
    theirs = sealed(root, "b", of("b", config=LARGE))
    before = {path: sha256(path) for folder in (ours, theirs) for path in folder.rglob("*.*")}
    (folder,) = merge(root, ["a", "b"], "c")
    assert {path: sha256(path) for path in before} == before
    merged = {path.name: read_record(path) for path in verify(folder)}
    originals = {path.name: path for c in (ours, theirs) for path in record_paths(c / "resolution")}
    assert set(merged) == set(originals)
    for name, record in merged.items():
        original = read_record(originals[name])
        assert record.campaign == "c"
        assert record.model_dump(exclude=set(MARK)) == original.model_dump(exclude=set(MARK))
        assert record.source is not None
        assert record.source.model_dump() == {
            "campaign": original.campaign,
            "record": name,
            "sha256": sha256(originals[name]),
        }
    subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=folder, check=True, capture_output=True)


def test_rows_say_which_machine_and_which_records(root: Path) -> None:
    sealed(root, "a", of("a", config=SMALL))
    sealed(root, "b", of("b", config=LARGE, step_s=(1.0, 1.0)))
    merge(root, ["a", "b"], "c")
    spans, rows = tables(root, "c")
    by_size = rows.set_index("height")
    assert by_size["hosts"].to_dict() == {240: "a", 720: "b"}
    assert by_size["records"].to_dict() == {
        240: f"a/{SMALL.id()}__sampled_r1.json",
        720: f"b/{LARGE.id()}__sampled_r1.json",
    }
    assert set(rows["gpu_name"]) == set(spans["gpu_name"]) == {GPU}
    assert set(spans.loc[spans["height"] == 720, "record"]) == {f"b/{LARGE.id()}__sampled_r1.json"}
    assert machine(rows) == f"{GPU}, 2 boards"
    assert machine(rows, ["no such experiment"]) == "", "boards are those of the rows that are drawn"
    assert machine(rows.assign(gpu_name=None, gpu_uuids=None)) == "no GPU"
    several = rows.assign(further_gpu_uuids=["GPU-8+GPU-9", None])
    assert machine(several) == f"{GPU}, 4 boards"
    assert load_campaign(root, "c").gpu_name == GPU
    pd.testing.assert_frame_equal(read_rows(root / "built" / "configurations.csv"), rows)


def test_what_the_campaign_does_not_list_is_left_out_and_named(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the records of h200/interventions, which no seal can close: the campaign has no such experiment."""
    sealed(root, "a", of("a", config=SMALL))
    tried = root / "results" / "raw" / "a" / "interventions"
    write(of("a", config=LARGE, experiment="interventions"), tried)
    assert cli.main(["--root", str(root), "merge", "a", "--into", "c"]) == 0
    said = capsys.readouterr()
    assert f"{tried}: left out" in said.err
    assert said.out.split() == [str(root / "results" / "raw" / "c" / "resolution")]
    assert len(record_paths(tried)) == 1


def test_a_campaign_that_lists_none_of_its_records_is_refused(root: Path) -> None:
    write(of("a", experiment="interventions"), root / "results" / "raw" / "a" / "interventions")
    assert "list there what is to be merged" in refused(root, ["a"])


@pytest.mark.parametrize("into", ["a/b", "../x", "My Lab", "", "x\n"])
def test_what_is_no_key_is_refused_before_anything_is_written(root: Path, into: str) -> None:
    sealed(root, "a", of("a", config=SMALL))
    before = set(root.rglob("*"))
    with pytest.raises(UserError, match="is no campaign's key") as error:
        merge(root, ["a"], into)
    assert error.value.where == "--into"
    assert set(root.rglob("*")) == before


@pytest.mark.parametrize("fails", ["records", "campaign file"])
def test_a_merge_that_fails_in_writing_leaves_nothing(
    root: Path, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as on a full disk."""
    sealed(root, "a", of("a", config=SMALL))
    before = set(root.rglob("*"))
    write_it = merging.write_atomically

    def full(path: Path, text: str) -> None:
        if (path.suffix == ".json") == (fails == "records"):
            raise OSError(28, "No space left on device", str(path))
        write_it(path, text)

    monkeypatch.setattr(merging, "write_atomically", full)
    with pytest.raises(OSError, match="No space"):
        merge(root, ["a"], "c")
    assert set(root.rglob("*")) == before


def test_a_folder_from_elsewhere_is_a_source(root: Path, tmp_path: Path) -> None:
    sealed(root, "a", of("a", config=SMALL))
    elsewhere = sealed(tmp_path / "elsewhere", "b", of("b", config=LARGE))
    (folder,) = merge(root, ["a", str(elsewhere)], "c")
    assert len(verify(folder)) == 2


def test_copies_are_one_record_also_after_a_merge(root: Path) -> None:
    record = of("a", config=SMALL)
    sealed(root, "a", record)
    sealed(root, "b", of("b", config=LARGE), record)  # b once took a's record in
    merge(root, ["a", "b"], "c")
    (folder,) = merge(root, ["c", "a"], "d")
    found = [read_record(path) for path in verify(folder)]
    assert [r.source and r.source.campaign for r in found] == ["a", "b"]


def test_allowed_duplicates_become_further_passes(root: Path) -> None:
    sealed(root, "a", of("a", config=SMALL), of("a", config=SMALL, pass_index=2))
    sealed(root, "b", of("b", config=SMALL, step_s=(0.5, 1.0)))
    assert f"duplicates: resolution/{SMALL.id()}__sampled_r1.json" in refused(root)
    (folder,) = merge(root, ["a", "b"], "c", ["duplicates"])
    found = {r.pass_index: r for r in map(read_record, verify(folder))}
    assert {i: r.source and r.source.campaign for i, r in found.items()} == {1: "a", 2: "a", 3: "b"}
    assert found[3].source is not None
    assert found[3].source.record.endswith("_r1.json")
    _, rows = tables(root, "c")
    assert rows[["passes", "gpus", "hosts"]].to_numpy().tolist() == [[3, 2, "a;a;b"]]


OTHER_GPU = "NVIDIA H100 80GB HBM3"
# What makes the second campaign's record differ, what the refusal says, and what then tells the rows apart.
CASES: dict[str, tuple[Callable[[], Record], str, str]] = {
    "gpu-models": (
        lambda: of("b", config=LARGE, environment=on("b", OTHER_GPU)),
        OTHER_GPU,
        "gpu_name",
    ),
    "protocols": (lambda: of("b", config=LARGE, protocol="full", steps=50), "full", "protocol"),
    "protocol-settings": (
        lambda: of("b", config=LARGE, protocol_settings=ProtocolSettings(poll_s=0.004)),
        '"poll_s":0.004',
        "protocol_settings",
    ),
    "weights": (
        lambda: of("b", config=LARGE, environment=on("b", weights="random, seed 7")),
        "random, seed 7",
        "weights",
    ),
    "kinds": (
        lambda: of("b", config=LARGE, codecarbon=with_rapl(of("b"))),
        "cpu_energy_Wh measured",
        "cpu_energy_Wh_kind",
    ),
}


def with_rapl(record: Record) -> Any:
    assert record.codecarbon is not None
    return record.codecarbon.model_copy(update={"cpu_method": "intel_rapl"})


@pytest.mark.parametrize("mixture", CASES)
def test_a_mixture_is_refused_unless_it_is_named(root: Path, mixture: str) -> None:
    make, said, column = CASES[mixture]
    sealed(root, "a", of("a", config=SMALL))
    sealed(root, "b", make())
    message = refused(root)
    assert f"{mixture}:" in message
    assert said in message
    assert f"--allow {mixture}" in message
    refused(root, allowed=[other for other in MIXTURES if other != mixture])
    merge(root, ["a", "b"], "c", [mixture])
    _, rows = tables(root, "c")
    assert rows[column].nunique() == 2, "the rows say what differs"


def test_machines_are_never_averaged_over(root: Path) -> None:
    sealed(root, "a", of("a", config=SMALL))
    sealed(root, "b", of("b", config=SMALL, environment=on("b", OTHER_GPU), step_s=(1.0, 1.0)))
    message = refused(root)
    assert "gpu-models:" in message and "duplicates:" in message  # noqa: PT018
    merge(root, ["a", "b"], "c", ["gpu-models", "duplicates"])
    _, rows = tables(root, "c")
    assert rows.set_index("gpu_name")["step_time_s"].to_dict() == pytest.approx({GPU: 0.5, OTHER_GPU: 1.0})
    with pytest.raises(UserError, match="rows of 2 GPU models"):
        read_rows(root / "built" / "configurations.csv")


def test_other_settings_are_never_averaged_over_nor_drawn(root: Path) -> None:
    sealed(root, "a", of("a", config=SMALL))
    sealed(root, "b", of("b", config=SMALL, protocol_settings=ProtocolSettings(poll_s=0.004)))
    merge(root, ["a", "b"], "c", ["protocol-settings", "duplicates"])
    _, rows = tables(root, "c")
    assert len(rows) == 2
    with pytest.raises(UserError, match="differ in protocol_settings"):
        read_rows(root / "built" / "configurations.csv")


def test_mfu_of_a_mixture_is_of_the_records_own_accelerator(root: Path) -> None:
    data = {"key": "b", "title": "b", "accelerator": "h100-sxm", "device": "cuda", "gpu_name": OTHER_GPU}
    tiny.write_yaml(root, "campaigns/b", data | {"experiments": {"resolution": {}}})
    sealed(root, "a", of("a", config=SMALL))
    sealed(root, "b", of("b", config=SMALL, environment=on("b", OTHER_GPU)))
    alone = {key: tables(root, key)[1]["mfu"].item() for key in ("a", "b")}
    merge(root, ["a", "b"], "c", ["gpu-models", "duplicates"])
    _, rows = tables(root, "c")
    assert rows.set_index("hosts")["mfu"].to_dict() == pytest.approx(alone)


def test_one_id_of_two_configurations_is_refused_whatever_is_allowed(root: Path) -> None:
    sealed(root, "a", of("a", config=SMALL))
    other = SMALL.model_copy(update={"guidance_scale": 1.0})
    sealed(root, "b", of("b", config=other))
    assert "guidance_scale: 5.0 and 1.0" in refused(root, allowed=list(MIXTURES))


def test_a_part_of_anothers_settings_is_no_mixture(root: Path) -> None:
    """An entry of an experiment may set things otherwise; a campaign that has not measured it is no other."""
    slower = of("a", config=MIDDLE, protocol_settings=ProtocolSettings(poll_s=0.004))
    sealed(root, "a", of("a", config=SMALL), slower)
    sealed(root, "b", of("b", config=LARGE))
    merge(root, ["a", "b"], "c")


def test_what_ran_out_of_memory_has_no_kinds_to_differ_in(root: Path) -> None:
    sealed(root, "a", of("a", config=SMALL))
    sealed(root, "b", out_of_memory(campaign="b", config=LARGE, environment=on("b")))
    merge(root, ["a", "b"], "c")
    assert set(tables(root, "c")[1]["status"]) == {"ok", "out_of_memory"}


class TestSources:
    def test_nothing_is_overwritten(self, root: Path) -> None:
        sealed(root, "a", of("a", config=SMALL))
        sealed(root, "b", of("b", config=LARGE))
        (path,) = merge(root, ["a"], "c")[0].glob("*_r1.json")
        before = path.read_bytes()
        with pytest.raises(UserError, match="has records already"):
            merge(root, ["b"], "c")
        assert path.read_bytes() == before

    def test_an_open_experiment_is_refused(self, root: Path) -> None:
        write(of("a", config=SMALL), root / "results" / "raw" / "a" / "resolution")
        assert "t2v-energy seal --campaign a --experiment resolution" in refused(root, ["a"])

    def test_a_changed_record_is_refused(self, root: Path) -> None:
        (path,) = record_paths(sealed(root, "a", of("a", config=SMALL)) / "resolution")
        path.write_text(path.read_text().replace("H200", "H201"))
        assert f"changed: {path.name}" in refused(root, ["a"])

    def test_another_schema_is_refused(self, root: Path) -> None:
        folder = sealed(root, "a", of("a", config=SMALL)) / "resolution"
        (path,) = record_paths(folder)
        path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
        write_seal_anew(folder)
        assert "schema version 2" in refused(root, ["a"], list(MIXTURES))

    def test_unknown_sources_and_mixtures_are_named(self, root: Path) -> None:
        assert "no campaign 'x'" in refused(root, ["x"])
        assert "no mixture colours" in refused(root, allowed=["colours"])


def write_seal_anew(folder: Path) -> None:
    (folder / "SHA256SUMS").unlink()
    write_seal(folder)


def test_the_command(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sealed(root, "a", of("a", config=SMALL))
    sealed(root, "b", of("b", config=SMALL))
    arguments = ["--root", str(root), "merge", "a", "b", "--into", "c"]
    assert cli.main(arguments) == 2
    assert "--allow duplicates" in capsys.readouterr().err
    assert cli.main([*arguments, "--allow", "duplicates"]) == 0
    assert capsys.readouterr().out.strip() == str(root / "results" / "raw" / "c" / "resolution")
