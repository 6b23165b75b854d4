"""Each command on small things; what users may put right ends without a traceback, in exit code 2."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import processor
import pytest
import tiny
from records import GPU, configuration, environment, make_record, out_of_memory, write
from t2v_energy import cli
from t2v_energy.analysis import numbers
from t2v_energy.errors import UserError
from t2v_energy.measurement.record import Process, read_record
from t2v_energy.measurement.sealing import SEAL, is_sealed
from t2v_energy.prompts import load_prompts

SIZES = [(240, 320), (480, 832)]
BIG = {"key": "big", "title": "x", "accelerator": "h200", "device": "cuda", "gpu_name": GPU}


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path) -> Iterator[None]:
    with tiny.own_devices_and_locks(tmp_path):
        yield


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with the campaigns ``tiny`` and ``big``; ``big`` plans two records in ``resolution``."""
    root = tiny.make_root(tmp_path / "root")
    sweep = {"vary": [{"height": h, "width": w} for h, w in SIZES]}
    tiny.write_yaml(root, "campaigns/big", BIG | {"experiments": {"resolution": sweep}})
    return root


@pytest.fixture
def folder(root: Path) -> Path:
    """The folder of ``big``'s records, with both of them in it: one ran out of memory."""
    folder = root / "results" / "raw" / "big" / "resolution"
    for make, (height, width) in zip((make_record, out_of_memory), SIZES, strict=True):
        write(make(campaign="big", config=configuration(height=height, width=width)), folder)
    return folder


def run(root: Path, *arguments: str | Path) -> int:
    return cli.main(["--root", str(root), *map(str, arguments)])


class Outcome:
    """Of a command that must fail: exit code 2, and a message without a traceback."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def of(self, root: Path, *arguments: str | Path) -> str:
        assert run(root, *arguments) == 2
        captured = self.capsys.readouterr()
        assert captured.err.startswith("t2v-energy: ")
        assert "Traceback" not in captured.err
        return captured.err


@pytest.fixture
def failure(capsys: pytest.CaptureFixture[str]) -> Outcome:
    return Outcome(capsys)


class TestFrame:
    def test_a_users_error_is_exit_code_2_with_what_where_and_what_to_do(
        self, root: Path, failure: Outcome
    ) -> None:
        text = failure.of(root, "plan", "--campaign", "smok")
        where = root / "config" / "campaigns"
        assert text.startswith(f"t2v-energy: {where}: there is no campaign 'smok'\n  → did you mean 'smoke'?")

    def test_a_folder_in_a_files_place_is_told_with_a_remedy(self, root: Path, failure: Outcome) -> None:
        text = failure.of(root, "prompts", "--out", root)
        assert f"{root}" in text
        text = failure.of(root, "numbers", root, "--out", root / "n.json")
        assert text.startswith(f"t2v-energy: {root}: Is a directory\n  → name a file, not a folder")

    def test_an_interrupt_is_exit_code_130(
        self, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def interrupted(options: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(cli, "_plan", interrupted)
        assert run(root, "plan") == 130
        assert "finished configurations are kept" in capsys.readouterr().err

    def test_an_error_of_ours_is_not_hidden(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(options: Any) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(cli, "_plan", broken)
        with pytest.raises(ZeroDivisionError):
            run(root, "plan")

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ([], "required: COMMAND"),
            (["plam"], "invalid choice: 'plam'"),
            (["plan", "--settings", "[1]"], "must be a JSON object"),
            (["plan", "--settings", "{"], "not JSON"),
            (["measure", "--minutes", "-1"], "must be more than 0 and finite"),
            (["measure", "--minutes", "0"], "must be more than 0 and finite"),
            (["measure", "--minutes", "nan"], "must be more than 0 and finite"),
            (["measure", "--minutes", "inf"], "must be more than 0 and finite"),
            (["plan", "--campaign", ""], "--campaign: is empty"),
            (["paper", "--campaign", "", "--source", "a", "--out", "b"], "--campaign: is empty"),
            (["aggregate", "--parquet", "a", "--csv", "b", "--processes", "0"], "must be at least 1"),
            (["seal"], "--experiment"),
        ],
    )
    def test_wrong_usage(self, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            cli.main(arguments)
        assert text in capsys.readouterr().err

    def test_every_command_has_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        def help_of(*arguments: str) -> str:
            with pytest.raises(SystemExit) as left:
                cli.main([*arguments, "--help"])
            assert left.value.code == 0
            return capsys.readouterr().out

        names = re.findall(r"^    ([a-z-]+)(?: |$)", help_of(), flags=re.MULTILINE)
        assert {"plan", "measure", "audit", "predict", "merge"} <= set(names)
        for name in names:
            assert f"t2v-energy {name}" in help_of(name)

    def test_settings_lie_over_the_file(self, root: Path, failure: Outcome) -> None:
        text = failure.of(root, "plan", "--settings", '{"campain": "smoke"}')
        assert "config.yaml with --config: unknown key 'campain'" in text

    def test_the_campaign_wins_over_the_settings(
        self, root: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(root, "plan", "--settings", '{"campaign": "smoke"}', "--campaign", "tiny") == 0
        assert capsys.readouterr().out.startswith("campaign tiny:")


class TestLightness:
    def test_nothing_heavy_is_imported_to_plan(self) -> None:
        code = (
            "import sys; import t2v_energy.cli as cli\n"
            "heavy = ('torch', 'pandas', 'diffusers', 'transformers', 'scipy', 'codecarbon', 'rich')\n"
            "print([m for m in heavy if m in sys.modules])\n"
            f"cli.main(['--root', {str(tiny.ROOT)!r}, 'plan', '--campaign', 'smoke'])\n"
            "print([m for m in heavy if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        lines = done.stdout.splitlines()
        assert (lines[0], lines[-1]) == ("[]", "[]")
        assert "tiny-wan_64x64_9f_4s" in done.stdout

    def test_planning_takes_less_than_a_second_and_a_half(self) -> None:
        program = Path(sys.executable).with_name("t2v-energy")
        clean = {k: v for k, v in os.environ.items() if not k.startswith("COV")}

        def plan() -> None:
            done = subprocess.run([program, "plan"], cwd=tiny.ROOT, env=clean, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr

        assert processor.scaled_s(plan, enough_s=1.5, runs=5, clock_s=processor.children_s) < 1.5


class TestStages:
    def test_prompts_of_the_grammar(self, root: Path, tmp_path: Path) -> None:
        out = tmp_path / "new" / "prompts.jsonl"
        settings = json.dumps({"prompts": {"count": 3, "seed": 4}})
        assert run(root, "prompts", "--settings", settings, "--out", out) == 0
        assert [(p.id, p.seed) for p in load_prompts(out)] == [("p000", 4), ("p001", 4), ("p002", 4)]

    def test_prompts_of_ones_own(self, root: Path, tmp_path: Path, failure: Outcome) -> None:
        (root / "mine.txt").write_text("A red fox.\nA grey wolf.\n")
        out = tmp_path / "prompts.jsonl"
        settings = json.dumps({"prompts": {"file": "mine.txt"}})
        assert run(root, "prompts", "--settings", settings, "--out", out) == 0
        assert [p.text for p in load_prompts(out)] == ["A red fox.", "A grey wolf."]
        (root / "mine.txt").unlink()
        assert str(root / "mine.txt") in failure.of(root, "prompts", "--settings", settings, "--out", out)

    def test_measure(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("torch")
        vary = [{"height": 32, "width": 32}]
        tiny.write_yaml(root, "campaigns/tiny", tiny.CAMPAIGN | {"experiments": tiny.resolution(vary=vary)})
        assert run(root, "measure", "--campaign", "tiny") == 0
        folder = root / "results" / "raw" / "tiny" / "resolution"
        (path,) = folder.glob("*.json")
        assert read_record(path).status == "ok"
        (index,) = folder.glob("batches/*.json")
        assert "→ ok" in capsys.readouterr().err
        # one batch of it, with prompts from elsewhere, and a setting of the command line: all is there
        prompts = tiny.prompts_path(root).rename(root / "prompts.jsonl")
        chosen = ["--experiment", "resolution", "--batch", index.stem, "--prompts", prompts]
        assert run(root, "measure", "--campaign", "tiny", *chosen, "--allow-shared") == 0
        assert "1 already measured" in capsys.readouterr().err

    def test_measure_refuses_what_is_not_planned(self, root: Path, failure: Outcome) -> None:
        wrong = failure.of(root, "measure", "--campaign", "tiny", "--experiment", "frames")
        assert "campaign tiny has no experiment 'frames'" in wrong
        wrong = failure.of(
            root, "measure", "--campaign", "tiny", "--experiment", "resolution", "--batch", "0"
        )
        assert "has no batch resolution/0" in wrong

    def test_allow_shared_reaches_the_runner(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("torch")
        from t2v_energy.measurement import runner

        calls: list[tuple[Any, ...]] = []
        monkeypatch.setattr(runner, "measure_batch", lambda *given, **more: calls.append((*given, more)))
        for more in ([], ["--allow-shared"]):
            assert run(root, "measure", "--campaign", "tiny", *more) == 0
        assert [settings.measure.allow_shared for _, settings, *_ in calls] == [False, True]
        assert calls[0][4]["prompts"] == tiny.prompts_path(root)

    def test_save_videos_reaches_the_runner(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("torch")
        from t2v_energy.measurement import runner

        asked: list[bool] = []
        monkeypatch.setattr(runner, "measure_batch", lambda *_, **more: asked.append(more["save_videos"]))
        for more in ([], ["--save-videos"]):
            assert run(root, "measure", "--campaign", "tiny", *more) == 0
        assert asked == [False, True]

    def test_minutes_become_a_deadline(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("torch")
        import time

        from t2v_energy.measurement import runner

        deadlines: list[float | None] = []
        monkeypatch.setattr(runner, "measure_batch", lambda *_, **more: deadlines.append(more["deadline_s"]))
        before_s = time.monotonic()
        for more in ([], ["--minutes", "1.5"]):
            assert run(root, "measure", "--campaign", "tiny", *more) == 0
        assert deadlines[0] is None
        assert deadlines[1] is not None
        assert before_s + 90 <= deadlines[1] <= time.monotonic() + 90

    def test_the_deadline_is_that_of_all_batches_together(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("torch")
        from t2v_energy.measurement import runner

        deadlines: list[float | None] = []
        monkeypatch.setattr(runner, "measure_batch", lambda *_, **more: deadlines.append(more["deadline_s"]))
        one_by_one = json.dumps({"measure": {"batch_minutes": 0}})
        arguments = ("measure", "--campaign", "tiny", "--settings", one_by_one, "--minutes", "2")
        assert run(root, *arguments) == 0
        assert len(deadlines) == 3
        assert len(set(deadlines)) == 1

    def test_a_sealed_experiment_that_lacks_records_keeps_no_other_from_being_measured(
        self,
        root: Path,
        failure: Outcome,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        pytest.importorskip("torch")
        from t2v_energy.measurement import runner

        experiments = tiny.resolution() | {"frames": tiny.CAMPAIGN["experiments"]["resolution"]}
        tiny.write_yaml(root, "campaigns/tiny", tiny.CAMPAIGN | {"experiments": experiments})
        folder = root / "results" / "raw" / "tiny" / "resolution"
        folder.mkdir(parents=True)
        (folder / SEAL).write_text("")
        wrong = failure.of(root, "measure", "--campaign", "tiny", "--experiment", "resolution")
        assert "the experiment is sealed, and it lacks tiny-wan_32x32_5f_2s" in wrong
        begun: list[str] = []
        monkeypatch.setattr(runner, "measure_batch", lambda *given, **_: begun.append(given[2]))
        assert run(root, "measure", "--campaign", "tiny") == 0
        assert begun == ["frames"]
        assert "sealed, so left as they are: resolution" in capsys.readouterr().err

    def test_measure_goes_on_where_minutes_ended_it(
        self, root: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("torch")
        vary = [{"height": 32, "width": 32}]
        tiny.write_yaml(root, "campaigns/tiny", tiny.CAMPAIGN | {"experiments": tiny.resolution(vary=vary)})
        folder = root / "results" / "raw" / "tiny" / "resolution"
        assert run(root, "measure", "--campaign", "tiny", "--minutes", "1e-6") == 0
        assert "tiny-wan_32x32_5f_2s (sampled): left for another time" in capsys.readouterr().err
        assert not list(folder.rglob("*.json"))
        assert run(root, "measure", "--campaign", "tiny", "--minutes", "60") == 0
        assert len(list(folder.glob("*.json"))) == len(list(folder.glob("batches/*.json"))) == 1

    def test_measure_without_prompts_says_the_command_that_makes_them(
        self, root: Path, failure: Outcome
    ) -> None:
        pytest.importorskip("torch")
        path = tiny.prompts_path(root)
        path.unlink()
        other = json.dumps({"prompts": {"count": 7, "seed": 3}})
        text = failure.of(root, "measure", "--campaign", "tiny", "--settings", other)
        assert f"{path}: there are no prompts yet" in text
        program, *words = shlex.split(text.partition("make them: ")[2])
        assert program == "t2v-energy"
        assert cli.main(words) == 0
        found = path.read_text()
        assert len(load_prompts(path)) == 7
        assert run(root, "prompts", "--settings", other, "--out", path) == 0
        assert path.read_text() == found

    def test_aggregate(self, root: Path, folder: Path, tmp_path: Path) -> None:
        parquet, csv = tmp_path / "a" / "measurements.parquet", tmp_path / "a" / "configurations.csv"
        assert run(root, "aggregate", "--campaign", "big", "--parquet", parquet, "--csv", csv) == 0
        table = pd.read_csv(csv)
        assert set(table["status"]) == {"ok", "out_of_memory"}
        assert len(pd.read_parquet(parquet)) > 0

    def test_aggregate_writes_no_two_tables_to_one_file(
        self, root: Path, folder: Path, failure: Outcome
    ) -> None:
        one = root / "table"
        text = failure.of(root, "aggregate", "--campaign", "big", "--parquet", one, "--csv", one)
        assert f"{one}: --parquet and --csv name one file" in text
        assert not one.exists()

    def test_aggregate_verifies_what_is_sealed(self, root: Path, folder: Path, failure: Outcome) -> None:
        assert run(root, "seal", "--campaign", "big", "--experiment", "resolution") == 0
        changed = sorted(folder.glob("*.json"))[0]
        changed.write_text(changed.read_text().replace('"host":"test"', '"host":"else"'))
        text = failure.of(
            root, "aggregate", "--campaign", "big", "--parquet", root / "p", "--csv", root / "c"
        )
        assert f"changed: {changed.name}" in text
        assert not (root / "c").exists()

    def test_numbers(self, root: Path, tmp_path: Path, failure: Outcome) -> None:
        source = numbers.Source("a.csv", "1", "b")
        parts = [tmp_path / "one.json", tmp_path / "two.json"]
        for part, key in zip(parts, ("x", "y"), strict=True):
            numbers.write(part, {key: numbers.Number(1.5, "Wh", "measured", source)})
        out = tmp_path / "numbers" / "all.json"
        assert run(root, "numbers", *parts, "--out", out) == 0
        assert set(json.loads(out.read_text())) == {"x", "y"}
        other = tmp_path / "rates.json"
        for content in ({"cases": 297}, {"x": {"value": 1}}, {"x": None}):
            other.write_text(json.dumps(content))
            before = out.read_text()
            text = failure.of(root, "numbers", parts[0], other, "--out", out)
            assert f"{other}, {next(iter(content))}: is no number" in text
            assert out.read_text() == before
        assert "'x' is also in" in failure.of(root, "numbers", parts[0], parts[0], "--out", out)

    def test_paper(self, root: Path, failure: Outcome) -> None:
        source, out = root / "paper.typ", root / "built" / "paper.pdf"
        source.write_text("= Title\n#sys.inputs.campaign\n")
        assert run(root, "paper", "--source", source, "--out", out) == 0
        assert out.read_bytes().startswith(b"%PDF")
        source.write_text("#no_such_thing")
        assert "does not compile" in failure.of(root, "paper", "--source", source, "--out", out)

    def test_meter(self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("pynvml")
        from t2v_energy.metering import accuracy

        scenes = accuracy.scenes
        monkeypatch.setattr(accuracy, "scenes", lambda seed: scenes(seed)[:1])  # one power trace of five
        out = tmp_path / "tables" / "meter.csv"
        assert run(root, "meter", "--out", out) == 0
        table = pd.read_csv(out)
        contract = "method, window_s, trace, median_error_percent, p95_error_percent, coverage_90, n"
        assert list(table.columns) == contract.split(", ")
        assert set(table["window_s"]) == {0.4, 1, 5, 30}
        assert "power_integral" in set(table["method"])


class TestValidate:
    def test_valid_records(self, root: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(root, "validate", root / "results" / "raw") == 0
        out = capsys.readouterr().out
        assert out.count("valid   resolution/") == 2
        assert f"{folder}: not sealed" in out

    def test_a_flag_is_told_and_valid(
        self, root: Path, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        wide = configuration(height=720, width=1280)
        write(make_record(campaign="big", config=wide, step_s=(0.5, 1.0, 0.5)), folder)
        assert run(root, "validate", folder) == 0
        assert "flag: step_sem: " in capsys.readouterr().out

    def test_an_invalid_record_is_exit_code_1(
        self, root: Path, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        foreign = environment(foreign_processes=[Process(pid=7, used_MiB=None)])
        bad = write(
            make_record(campaign="big", config=configuration(height=720, width=1280), environment=foreign),
            folder,
        )
        assert run(root, "validate", folder.parent) == 1
        out = capsys.readouterr().out
        assert f"INVALID resolution/{bad.name}" in out
        assert "invalid: foreign_process: 1 foreign processes" in out
        assert out.count("valid   resolution/") == 2

    def test_the_campaign_says_which_gpu_it_must_be(
        self, root: Path, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tiny.write_yaml(
            root, "campaigns/big", BIG | {"gpu_name": "NVIDIA L4", "experiments": {"resolution": {}}}
        )
        assert run(root, "validate", folder) == 1
        assert "the campaign is on NVIDIA L4" in capsys.readouterr().out
        (root / "config" / "campaigns" / "big.yaml").unlink()  # records of a campaign that is not here
        assert run(root, "validate", folder) == 0

    def test_a_truncated_record_is_invalid(
        self, root: Path, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = sorted(folder.glob("*.json"))[0]
        path.write_text(path.read_text()[:100])
        assert run(root, "validate", folder) == 1
        assert "invalid: readable: the record is truncated" in capsys.readouterr().out

    def test_sealed_records(
        self, root: Path, folder: Path, failure: Outcome, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(root, "seal", "--campaign", "big", "--experiment", "resolution") == 0
        assert run(root, "validate", folder) == 0
        assert f"{folder}: sealed, checksums agree" in capsys.readouterr().out
        sorted(folder.glob("*.json"))[0].unlink()
        assert "missing: " in failure.of(root, "validate", folder)

    def test_no_records(self, root: Path, failure: Outcome) -> None:
        assert "there is no record below" in failure.of(root, "validate", root / "config")


class TestSeal:
    SEAL = ("seal", "--campaign", "big", "--experiment", "resolution")

    def test_complete_records(self, root: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(root, *self.SEAL) == 0
        assert capsys.readouterr().out.strip() == str(folder / SEAL)
        lines = (folder / SEAL).read_text().splitlines()
        assert [line[66:] for line in lines] == sorted(p.name for p in folder.glob("*.json"))

    def test_a_missing_record(self, root: Path, folder: Path, failure: Outcome) -> None:
        path = sorted(folder.glob("*.json"))[0]
        path.unlink()
        assert f"missing: {path.name}" in failure.of(root, *self.SEAL)
        assert not is_sealed(folder)

    def test_a_pass_that_is_missing(self, root: Path, folder: Path, failure: Outcome) -> None:
        path = root / "config" / "campaigns" / "big.yaml"
        path.write_text(path.read_text() + "passes: 2\n")
        assert failure.of(root, *self.SEAL).count("__sampled_r2.json") == 2

    def test_records_of_another_gpu(self, root: Path, folder: Path, failure: Outcome) -> None:
        path = root / "config" / "campaigns" / "big.yaml"
        path.write_text(path.read_text().replace(GPU, "NVIDIA L4"))
        assert "breaks gpu_name" in failure.of(root, *self.SEAL)
        assert not is_sealed(folder)


class TestDoctor:
    @pytest.fixture(autouse=True)
    def _quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("torch")
        pytest.importorskip("pynvml")
        from t2v_energy.measurement import doctor

        monkeypatch.setattr(doctor, "WATCH_S", 0.5)

    def test_as_text(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        from t2v_energy.metering import fake_nvml

        with fake_nvml.installed([]):
            assert run(root, "doctor") == 0
        out = capsys.readouterr().out
        assert "\n lacking  GPU: no such GPU\n" in out
        assert "\n          only CPU campaigns (smoke) can be measured here" in out
        assert "      ok  packages: torch" in out

    def test_as_json_and_what_blocks_is_exit_code_1(
        self, root: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from t2v_energy.metering import fake_nvml

        with fake_nvml.installed([fake_nvml.FakeGpu(fake_nvml.constant(), counter=False)]):
            assert run(root, "doctor", "--json") == 1
        found = {f["subject"]: f for f in json.loads(capsys.readouterr().out)}
        assert found["energy counter"]["state"] == "blocking"
        assert set(found["GPU"]) == {"subject", "state", "found", "meaning"}


def test_errors_keep_their_parts_through_pickling() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(UserError("what", where="there", remedy="do")))
    assert (error.what, error.where, error.remedy) == ("what", "there", "do")
    assert str(error) == "there: what\n  → do"
    assert str(UserError("what")) == "what"
