"""A batch from beginning to end, on the real tiny pipeline; and what refuses or survives trouble.

The GPU is :mod:`t2v_energy.metering.fake_nvml`, whose readings stay in temporary folders.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
import shutil
import signal
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
from t2v_energy.errors import UserError
from t2v_energy.interventions import InterventionError
from t2v_energy.interventions.base import Change
from t2v_energy.interventions.vae_tiling import VaeTiling
from t2v_energy.measurement import runner
from t2v_energy.measurement.gpus import choose_gpu
from t2v_energy.measurement.progress import Progress
from t2v_energy.measurement.record import (
    Process,
    Record,
    read_record,
    record_paths,
    to_json,
    write_atomically,
)
from t2v_energy.measurement.runner import Session, measure_batch
from t2v_energy.measurement.sealing import SEAL, verify, write_seal
from t2v_energy.measurement.validity import check
from t2v_energy.metering import fake_nvml
from t2v_energy.metering.fake_nvml import FakeDeviceFactory, FakeGpu
from t2v_energy.metering.sampler import Sampler
from t2v_energy.plan import Plan, make_plan, raw_folder

torch = pytest.importorskip("torch")
pytest.importorskip("pynvml")
AutoencoderKLWan = pytest.importorskip("diffusers").AutoencoderKLWan
CONSTANT = fake_nvml.constant(600)
OTHER = "GPU-0badcafe-0000-0000-0000-000000000000"
FULL = {"warmups": 1, "warmup_steps": 1, "repetitions": 2}
ONE_GENERATION = {"warmup_calls": 1, "min_steps": 1, "generations": 1, "max_generations": 1}
TWO = [{"height": 32, "width": 32}, {"height": 32, "width": 48}]


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path) -> Iterator[None]:
    with tiny.own_devices_and_locks(tmp_path):
        yield


def plan_of(root: Path) -> Plan:
    return make_plan(root, tiny.settings(root))


def measure(root: Path, log: io.StringIO | None = None, **overrides: Any) -> Path:
    """Measure the campaign's only batch."""
    settings = tiny.settings(root, **overrides)
    (batch,) = make_plan(root, settings).batches
    progress = Progress(log or io.StringIO())
    prompts = tiny.prompts_path(root)
    return measure_batch(root, settings, batch.experiment, batch.name, prompts=prompts, progress=progress)


def records(root: Path) -> dict[str, Record]:
    """Record by the size in its name."""
    paths = record_paths(raw_folder(root, "tiny", "resolution"))
    return {re.findall(r"_(\d+x\d+)_", path.name)[0]: read_record(path) for path in paths}


def contents(root: Path) -> dict[str, tuple[bytes, int]]:
    folder = raw_folder(root, "tiny", "resolution")
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in record_paths(folder)}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A root whose campaign was measured, the batch's index and what the user saw."""
    root, log = tiny.make_root(tmp_path_factory.mktemp("measured") / "root"), io.StringIO()
    with tiny.own_devices_and_locks(root):
        return root, measure(root, log), log.getvalue()


@pytest.fixture
def copy(measured: tuple[Path, Path, str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(measured[0], tmp_path / "copy"))


class TestABatch:
    def test_every_configuration_has_a_whole_record(self, measured: tuple[Path, Path, str]) -> None:
        root, found = measured[0], records(measured[0])
        items = {i.record: i for i in plan_of(root).items("resolution")}
        assert set(found) == {"32x32", "32x48", "48x48"}
        for record in found.values():
            item = items[record.file_name]
            assert (record.campaign, record.experiment, record.status) == ("tiny", "resolution", "ok")
            assert record.configuration == item.configuration
            assert (record.order, record.pass_index, record.error) == (item.order, 1, None)
            assert record.windows.kind == ["idle_before", "warmup", "generation", "generation", "idle_after"]
            assert record.environment.weights == "random, seed 3"
            assert record.environment.gpu is record.ticks is record.samples is None
            assert record.attention_kernels["denoiser"] == ["flash-cpu"]
            assert record.prompt is not None
            assert (record.prompt.id, record.prompt.padded_tokens) == ("p000", 512)
            assert record.prompt.tokens == 9  # seven words, a full stop, the end
            assert record.prompt.tokenizer == "StandInTokenizer"

    def test_nothing_but_the_unspanned_share_of_a_tiny_model_breaks_a_rule(
        self, measured: tuple[Path, Path, str]
    ) -> None:
        for record in records(measured[0]).values():
            assert {f.rule for f in check(record) if f.level == "invalid"} <= {"unspanned"}
            flagged = [flag.split(":")[0] for flag in record.flags]
            assert flagged == [f.rule for f in check(record) if f.level != "ok"]

    def test_times_count_from_the_origin_in_order(self, measured: tuple[Path, Path, str]) -> None:
        for record in records(measured[0]).values():
            windows = record.windows
            assert 0 <= windows.start_s[0] < 1
            edges = [t for pair in zip(windows.start_s, windows.end_s, strict=True) for t in pair]
            assert edges == sorted(edges)
            assert windows.end_s[0] - windows.start_s[0] == pytest.approx(0.2, abs=0.1)
            for index, start_s, end_s in zip(
                record.spans.window, record.spans.start_s, record.spans.end_s, strict=True
            ):
                assert windows.start_s[index] <= start_s <= end_s <= windows.end_s[index]

    def test_codecarbon_reads_from_the_warm_up_to_the_last_generation(
        self, measured: tuple[Path, Path, str]
    ) -> None:
        for record in records(measured[0]).values():
            reading, windows = record.codecarbon, record.windows
            assert reading is not None
            assert reading.duration_s >= windows.end_s[3] - windows.start_s[1] - 1e-4
            assert reading.cpu_energy_Wh > 0
            assert (reading.gpu_energy_Wh, reading.gpu_method) == (0, "none")

    def test_a_record_survives_writing_and_reading(self, measured: tuple[Path, Path, str]) -> None:
        for path in record_paths(raw_folder(measured[0], "tiny", "resolution")):
            assert to_json(read_record(path)) == path.read_text()

    def test_the_index_holds_names_checksums_and_states(self, measured: tuple[Path, Path, str]) -> None:
        root, path, _ = measured
        (batch,) = plan_of(root).batches
        folder = raw_folder(root, "tiny", "resolution")
        assert path == folder / "batches" / f"{batch.name}.json"
        index = json.loads(path.read_text())
        assert (index["experiment"], index["batch"]) == ("resolution", batch.name)
        assert [row["record"] for row in index["records"]] == [item.record for item in batch.items]
        for row, item in zip(index["records"], batch.items, strict=True):
            content = (folder / row["record"]).read_bytes()
            assert row["sha256"] == hashlib.sha256(content).hexdigest()
            assert (row["configuration_id"], row["status"]) == (item.configuration_id, "ok")
        assert not list(folder.rglob("*.tmp"))

    def test_the_user_sees_what_happens(self, measured: tuple[Path, Path, str]) -> None:
        log = measured[2]
        assert "3 configurations, 0 already measured" in log
        assert "building tiny-wan (random weights)" in log
        assert log.count("→ ok") == 3
        assert log.count("generation of") == 6

    def test_what_is_there_is_not_measured_again(self, copy: Path) -> None:
        before, log = contents(copy), io.StringIO()
        index = raw_folder(copy, "tiny", "resolution") / "batches" / f"{plan_of(copy).batches[0].name}.json"
        text = index.read_text()
        index.unlink()
        tiny.prompts_path(copy).unlink()  # nothing is measured, so nothing is read
        assert measure(copy, log) == index
        assert index.read_text() == text
        assert contents(copy) == before
        assert "3 already measured" in log.getvalue()
        assert "building" not in log.getvalue()

    def test_what_another_measured_while_this_one_waited_is_not_measured_again(
        self, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two measurements of one batch: the second gets the device when the first has finished."""
        folder, before, log = raw_folder(copy, "tiny", "resolution"), contents(copy), io.StringIO()
        elsewhere = tmp_path / "elsewhere"
        shutil.copytree(folder, elsewhere)
        for name in before:
            (folder / name).unlink()

        @contextmanager
        def lock_that_was_held(*_: Any) -> Iterator[None]:
            for name in before:
                shutil.copy2(elsewhere / name, folder / name)
            yield

        monkeypatch.setattr(runner, "device_lock", lock_that_was_held)
        measure(copy, log)
        assert "0 already measured" in log.getvalue()
        assert "3 already measured" in log.getvalue()
        assert "building" not in log.getvalue()
        assert contents(copy) == before

    def test_the_pipeline_is_freed_at_the_end(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Batches that one process measures one after the other must not share the memory."""
        alive: list[weakref.ref[Any]] = []
        build = runner.Session._pipeline_for

        def remembered(session: Session, item: Any) -> Any:
            pipeline = build(session, item)
            alive.append(weakref.ref(pipeline.transformer))
            return pipeline

        monkeypatch.setattr(Session, "_pipeline_for", remembered)
        measure(tiny.make_root(tmp_path / "root"))
        assert alive
        assert all(reference() is None for reference in alive)

    def test_the_first_generation_of_a_process_is_a_small_one_that_solves_a_system(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """UniPC's corrector loads a library where it first solves one: never in what is timed."""
        solve, measure_one = torch.linalg.solve, Session.measure
        solved: list[str] = []

        def watched(*arguments: Any, **options: Any) -> Any:
            solved.append("solved")
            return solve(*arguments, **options)

        def measured(session: Session, item: Any) -> Record:
            record = measure_one(session, item)
            solved.append("measured")
            return record

        monkeypatch.setattr(torch.linalg, "solve", watched)
        monkeypatch.setattr(Session, "measure", measured)
        measure(tiny.make_root(tmp_path / "root"))  # of two steps each: they alone never get that far
        assert solved[0] == "solved"
        assert set(solved[solved.index("measured") :]) == {"measured"}

    def test_one_that_breaks_a_rule_is_kept_and_told(self, copy: Path) -> None:
        path = record_paths(raw_folder(copy, "tiny", "resolution"))[0]
        record = read_record(path)
        shared = {"foreign_processes": [Process(pid=7, used_MiB=None)]}
        environment = record.environment.model_copy(update=shared)
        path.write_text(to_json(record.model_copy(update={"environment": environment})))
        before, log = contents(copy), io.StringIO()
        measure(copy, log)
        assert contents(copy) == before
        assert f"{path.name} is invalid (foreign_process: 1 foreign" in log.getvalue()

    def test_what_is_missing_is_measured(self, copy: Path) -> None:
        before, folder = contents(copy), raw_folder(copy, "tiny", "resolution")
        lost = next(name for name in before if "32x48" in name)
        (folder / lost).unlink()
        (folder / f".{lost}.1.tmp").write_text("{")  # of a process that was killed
        log = io.StringIO()
        measure(copy, log)
        after = contents(copy)
        assert "2 already measured" in log.getvalue()
        assert after[lost] != before[lost]
        assert {n: c for n, c in after.items() if n != lost} == {n: c for n, c in before.items() if n != lost}


class TestASealedExperiment:
    def test_nothing_is_added_to_it(self, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A record more would make every later step refuse the experiment."""
        folder = raw_folder(copy, "tiny", "resolution")
        gone = record_paths(folder)[0]
        gone.rename(copy / gone.name)
        write_seal(folder)
        before = contents(copy)
        monkeypatch.setattr(runner, "_open_session", lambda *_: pytest.fail("a device was opened"))
        with pytest.raises(UserError, match=f"lacks {re.escape(gone.name)}") as error:
            measure(copy)
        assert error.value.where == str(folder / SEAL)
        assert "another campaign's name" in error.value.remedy
        assert contents(copy) == before
        verify(folder)

    def test_with_all_its_records_it_is_done(self, copy: Path) -> None:
        write_seal(raw_folder(copy, "tiny", "resolution"))
        assert measure(copy).is_file()


class TestADeadline:
    """``measure --minutes``: only what should end in time is begun."""

    @staticmethod
    def measured(root: Path, log: io.StringIO, seconds: float) -> Path | None:
        settings = tiny.settings(root)
        (batch,) = make_plan(root, settings).batches
        return measure_batch(
            root,
            settings,
            batch.experiment,
            batch.name,
            prompts=tiny.prompts_path(root),
            progress=Progress(log),
            deadline_s=time.monotonic() + seconds,
        )

    @pytest.fixture
    def expected(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
        """Seconds that an item should take, by its size; the others take none."""
        seconds: dict[str, float] = {}

        def expected_s(_: Progress, item: Any) -> float:
            return seconds.get(f"{item.configuration.height}x{item.configuration.width}", 0.0)

        monkeypatch.setattr(Progress, "expected_s", expected_s)
        return seconds

    def test_what_does_not_fit_is_left_out_without_an_index_and_measured_later(
        self, tmp_path: Path, expected: dict[str, float]
    ) -> None:
        root, log = tiny.make_root(tmp_path / "root"), io.StringIO()
        expected["32x48"] = 1e6
        assert self.measured(root, log, 1000) is None
        assert set(records(root)) == {"32x32", "48x48"}  # what comes after it in the order may still fit
        assert log.getvalue().count("left for another time") == 1
        assert "tiny-wan_32x48_5f_2s (sampled): left for another time" in log.getvalue()
        folder = raw_folder(root, "tiny", "resolution")
        assert not (folder / "batches").exists()
        before = contents(root)

        expected.clear()
        log = io.StringIO()
        index = self.measured(root, log, 1000)
        assert index is not None
        assert len(json.loads(index.read_text())["records"]) == 3
        assert "2 already measured" in log.getvalue()
        after = contents(root)
        assert {name: after[name] for name in before} == before

    def test_without_time_nothing_is_built(self, tmp_path: Path) -> None:
        root, log = tiny.make_root(tmp_path / "root"), io.StringIO()
        assert self.measured(root, log, 0) is None
        assert contents(root) == {}
        assert "building" not in log.getvalue()
        assert log.getvalue().count("left for another time") == 3

    def test_what_is_all_there_has_an_index_at_any_time(self, copy: Path) -> None:
        assert self.measured(copy, io.StringIO(), -1) is not None


@pytest.fixture(scope="module")
def otherwise(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Record], list[tuple[int, ...]]]:
    """Records of :class:`TestEntriesMeasuredOtherwise` by name, and the latents decoded in tiles."""
    tiled: list[tuple[int, ...]] = []
    whole = AutoencoderKLWan.tiled_decode

    @functools.wraps(whole)
    def noted(vae: Any, z: Any, *arguments: Any, **options: Any) -> Any:
        tiled.append(tuple(z.shape))
        return whole(vae, z, *arguments, **options)

    root = tiny.make_root(
        tmp_path_factory.mktemp("entries") / "root",
        experiments=tiny.resolution(vary=list(TestEntriesMeasuredOtherwise.VARY)),
    )
    with tiny.own_devices_and_locks(root), pytest.MonkeyPatch.context() as patched:
        patched.setattr(AutoencoderKLWan, "tiled_decode", noted)
        index = measure(root)
        before = contents(root)
        # asked again, with each entry's own settings compared, nothing is measured
        assert measure(root) == index
        assert contents(root) == before
    return {path.name: read_record(path) for path in record_paths(index.parents[1])}, tiled


class TestEntriesMeasuredOtherwise:
    VARY = (
        {"height": 32, "width": 32, "protocols": {"profile": True}},
        {"height": 32, "width": 32, "protocol": "full", "protocols": {"full": FULL}},
        {"height": 48, "width": 48, "protocols": {"idle_s": 0.4, "sampled": ONE_GENERATION}},
        {"height": 16, "width": 272, "interventions": ["vae-tiling"]},
        {"height": 16, "width": 272, "attention_kernel": "math"},
    )

    @pytest.fixture
    def found(self, otherwise: tuple[dict[str, Record], list[tuple[int, ...]]]) -> dict[str, Record]:
        return otherwise[0]

    def test_both_protocols_of_a_configuration(self, found: dict[str, Record]) -> None:
        full, sampled = (found[f"tiny-wan_32x32_5f_2s__{p}_r1.json"] for p in ("full", "sampled"))
        assert full.configuration == sampled.configuration
        assert (full.protocol, sampled.protocol) == ("full", "sampled")
        assert full.windows.kind == ["idle_before", "warmup", *["generation"] * 2, "idle_after"]
        assert full.windows.steps == [0, 1, 2, 2, 0]

    def test_a_record_keeps_the_settings_that_it_ran_with(self, found: dict[str, Record]) -> None:
        plain = found["tiny-wan_32x32_5f_2s__sampled_r1.json"]
        short = found["tiny-wan_48x48_5f_2s__sampled_r1.json"]
        assert plain.protocol_settings.sampled.warmup_calls is None
        assert short.protocol_settings.sampled.model_dump().items() >= ONE_GENERATION.items()
        assert short.windows.kind == ["idle_before", "warmup", "generation", "idle_after"]
        for record, idle_s in ((plain, 0.2), (short, 0.4)):
            assert record.protocol_settings.idle_s == idle_s
            lengths = [record.windows.end_s[i] - record.windows.start_s[i] for i in (0, -1)]
            assert lengths == pytest.approx([idle_s, idle_s], abs=0.1)

    def test_tiling_is_on_for_its_own_configuration_alone(
        self, otherwise: tuple[dict[str, Record], list[tuple[int, ...]]]
    ) -> None:
        """The other one of that width, and all that came after it, were decoded whole."""
        found, latents = otherwise
        tiled = found["tiny-wan_16x272_5f_2s__vae-tiling__sampled_r1.json"]
        assert tiled.configuration.interventions == ("vae-tiling",)
        generations = [kind for kind in tiled.windows.kind if kind in ("warmup", "generation")]
        assert latents == [(1, 16, 2, 2, 34)] * len(generations)

    def test_a_kernel_that_was_asked_for(self, found: dict[str, Record]) -> None:
        forced = found["tiny-wan_16x272_5f_2s__math__sampled_r1.json"]
        plain = found["tiny-wan_32x32_5f_2s__sampled_r1.json"]
        assert forced.attention_kernels["denoiser"] == ["math"]
        assert (
            forced.attention_kernels["vae_decode"] == plain.attention_kernels["vae_decode"] == ["flash-cpu"]
        )

    def test_a_profile_of_the_configuration_that_asked_for_one(self, found: dict[str, Record]) -> None:
        profiled, other = (found[f"tiny-wan_32x32_5f_2s__{p}_r1.json"] for p in ("sampled", "full"))
        assert other.operators is None
        operators = profiled.operators
        assert operators is not None
        assert operators.steps == 1
        by_stage: dict[str, set[str]] = {}
        for stage, operator in zip(operators.stage, operators.operator, strict=True):
            by_stage.setdefault(stage, set()).add(operator)
        assert set(tiny.model().spans) <= by_stage.keys()
        assert {"aten::linear", "aten::scaled_dot_product_attention"} <= by_stage["denoiser"]
        assert "aten::conv3d" in by_stage["vae_decode"]
        assert not any(operator.startswith("stage") for operator in operators.operator)
        seconds = sum(operators.device_s)
        assert 0 < seconds < 60
        assert min(operators.kernels) >= 1
        assert profiled.windows.kind[-1] == "idle_after"  # nothing of it is in a window

    def test_every_record_is_valid(self, found: dict[str, Record]) -> None:
        assert len(found) == 5
        for record in found.values():
            assert {f.rule for f in check(record) if f.level == "invalid"} == set()


class TestARecordMadeOtherwise:
    @pytest.mark.parametrize(
        ("changes", "what"),
        [
            ({"protocols": tiny.CAMPAIGN["protocols"] | {"idle_s": 0.3}}, "other protocol settings"),
            ({"weights": "pretrained"}, "other weights"),
            (
                {
                    "experiments": tiny.resolution(
                        fixed={"num_frames": 5, "num_inference_steps": 2, "guidance_scale": 6.0}
                    )
                },
                "other configuration",
            ),
        ],
    )
    def test_is_an_error_that_names_it(self, copy: Path, changes: dict[str, Any], what: str) -> None:
        if "weights" in changes:  # of a model that has published weights
            path = copy / "config" / "models" / "tiny-wan.yaml"
            path.write_text(path.read_text() + f"hub: {{id: a/b, revision: {'a' * 40}}}\n")
        tiny.write_yaml(copy, "campaigns/tiny", tiny.CAMPAIGN | changes)
        before = contents(copy)
        with pytest.raises(UserError, match=f"measured with {what}") as caught:
            measure(copy)
        assert caught.value.where in {str(p) for p in record_paths(raw_folder(copy, "tiny", "resolution"))}
        assert "another campaign's name" in caught.value.remedy
        assert contents(copy) == before

    def test_so_is_a_record_that_cannot_be_read(self, copy: Path) -> None:
        path = record_paths(raw_folder(copy, "tiny", "resolution"))[1]
        path.write_text(path.read_text()[:500])
        with pytest.raises(UserError, match="truncated or corrupt") as caught:
            measure(copy)
        assert caught.value.where == str(path)


class TestTrouble:
    def test_a_disk_that_is_nearly_full(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root = tiny.make_root(tmp_path / "root")
        usage = shutil.disk_usage(tmp_path)._replace(free=100 * 2**20)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(UserError, match="only 100 MiB are free") as caught:
            measure(root)
        assert caught.value.where == str(raw_folder(root, "tiny", "resolution"))
        assert contents(root) == {}

    def test_a_disk_that_fills_up_keeps_what_was_measured(self, tmp_path: Path) -> None:
        root = tiny.make_root(tmp_path / "root", experiments=tiny.resolution(vary=TWO))
        first, second = (item.record for item in plan_of(root).batches[0].items)
        folder = raw_folder(root, "tiny", "resolution")
        folder.mkdir(parents=True)
        # The file that the second record is first written to lies on a device that is always full.
        temporary = folder / f".{second}.{os.getpid()}.tmp"
        temporary.symlink_to("/dev/full")
        with pytest.raises(UserError, match="No space left on device") as caught:
            measure(root)
        assert caught.value.where == str(folder / second)
        assert "finished configurations are kept" in caught.value.remedy
        assert list(contents(root)) == [first]
        assert read_record(folder / first).status == "ok"
        assert not list(folder.glob("batches/*"))
        assert not list(folder.glob(".*.tmp"))

    def test_out_of_memory_is_a_record_and_the_batch_goes_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from diffusers import AutoencoderKLWan

        whole = AutoencoderKLWan.decode

        @functools.wraps(whole)
        def decode(self: Any, z: Any, *arguments: Any, **options: Any) -> Any:
            if z.shape[-1] == 6:  # 48 pixels wide
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nSee more")
            return whole(self, z, *arguments, **options)

        monkeypatch.setattr(AutoencoderKLWan, "decode", decode)
        root = tiny.make_root(tmp_path / "root", experiments=tiny.resolution(vary=TWO))
        log = io.StringIO()
        index = json.loads(measure(root, log).read_text())
        found = records(root)
        assert found["32x32"].status == "ok"
        failed = found["32x48"]
        assert (failed.status, failed.error) == (
            "out_of_memory",
            "CUDA out of memory. Tried to allocate 20 GiB.",
        )
        assert failed.windows.kind == ["idle_before", "idle_after"]
        assert failed.spans.window == []
        assert failed.codecarbon is not None
        assert {row["status"] for row in index["records"]} == {"ok", "out_of_memory"}
        assert "→ out_of_memory" in log.getvalue()
        # it is an answer: asked again, nothing is measured
        before = contents(root)
        measure(root)
        assert contents(root) == before

    def test_weights_that_do_not_fit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from diffusers import WanTransformer3DModel

        def no_room(*_: Any, **__: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

        monkeypatch.setattr(WanTransformer3DModel, "__init__", no_room)
        root = tiny.make_root(tmp_path / "root")
        with pytest.raises(UserError, match="the weights of tiny-wan do not fit in memory: CUDA out of"):
            measure(root)

    def test_an_unknown_prompt(self, tmp_path: Path) -> None:
        fixed = {"num_frames": 5, "num_inference_steps": 2, "prompt": "p009"}
        root = tiny.make_root(tmp_path / "root", experiments=tiny.resolution(fixed=fixed))
        with pytest.raises(UserError, match="there is no prompt 'p009'") as caught:
            measure(root)
        assert "p000" in caught.value.remedy
        assert contents(root) == {}

    def test_no_prompts(self, tmp_path: Path) -> None:
        root = tiny.make_root(tmp_path / "root")
        tiny.prompts_path(root).unlink()
        with pytest.raises(UserError) as caught:
            measure(root)
        assert str(tiny.prompts_path(root)) in str(caught.value)

    def test_sigterm_ends_a_run_as_ctrl_c_does(self) -> None:
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt, match="SIGTERM"), runner._interruptible():  # noqa: PT012
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        assert signal.getsignal(signal.SIGTERM) is before


def on_gpu(folder: Path, gpu_name: str | None = fake_nvml.NAME) -> Path:
    """A root whose campaign is on a GPU."""
    return tiny.make_root(folder / "root", device="cuda", gpu_name=gpu_name)


class TestClaimingAGpu:
    def test_there_is_none(self, tmp_path: Path) -> None:
        with fake_nvml.installed([]), pytest.raises(UserError, match="no such GPU"):
            measure(on_gpu(tmp_path))

    def test_another_model_than_the_campaigns(self, tmp_path: Path) -> None:
        root = on_gpu(tmp_path, "NVIDIA H200")
        with fake_nvml.installed([FakeGpu(CONSTANT)]) as fake:
            with pytest.raises(UserError) as caught:
                measure(root)
            assert fake.initialised == 0
        text = str(caught.value)
        assert f"this GPU is {fake_nvml.NAME!r}; the campaign's records are of 'NVIDIA H200'" in text
        assert "config/campaigns/tiny.yaml, gpu_name" in text
        assert contents(root) == {}

    def test_no_energy_counter(self, tmp_path: Path) -> None:
        with (
            fake_nvml.installed([FakeGpu(CONSTANT, counter=False)]),
            pytest.raises(UserError, match="this GPU has no energy counter"),
        ):
            measure(on_gpu(tmp_path))

    def test_others_are_on_it(self, tmp_path: Path) -> None:
        gpu = FakeGpu(CONSTANT, processes=((1, 500), (os.getpid(), 100), (2**22 + 1, 10)))
        with fake_nvml.installed([gpu]), pytest.raises(UserError) as caught:
            measure(on_gpu(tmp_path))
        text = str(caught.value)
        assert f"other processes use this GPU: 1, {2**22 + 1}\n" in text
        assert str(os.getpid()) not in text.split("\n")[0].split(":")[-1]
        assert "--allow-shared" in text

    def test_shared_if_the_user_allows_it(self, tmp_path: Path) -> None:
        root = on_gpu(tmp_path)
        with fake_nvml.installed([FakeGpu(CONSTANT, processes=((1, 500),))]) as fake:
            with choose_gpu() as device:
                gpu, foreign = runner._claim(device, plan_of(root).campaign, allow_shared=True)
            assert foreign == [Process(pid=1, used_MiB=500)]
            assert (gpu.name, gpu.uuid) == (fake_nvml.NAME, fake_nvml.UUID)
            assert (gpu.power_limit_W, gpu.memory_total_MiB) == (700, 140_000)
            # Past the claim, the meter's own process looks for this GPU in the real NVML.
            with pytest.raises(UserError, match=r"NVML library|driver is not loaded|no such GPU"):
                measure(root, measure={"allow_shared": True})
            assert fake.initialised == 0
        assert contents(root) == {}


class TestChoosingAGpu:
    @pytest.fixture(autouse=True)
    def _two(self) -> Iterator[None]:
        with fake_nvml.installed([FakeGpu(CONSTANT), FakeGpu(CONSTANT, uuid=OTHER)]):
            yield

    @pytest.mark.parametrize(
        ("visible", "uuid"),
        [
            (None, fake_nvml.UUID),
            ("", fake_nvml.UUID),
            ("0", fake_nvml.UUID),
            ("1", OTHER),
            ("1,0", OTHER),
            (OTHER, OTHER),
            (f"{OTHER}, {fake_nvml.UUID}", OTHER),
        ],
    )
    def test_as_cuda_visible_devices_says(self, visible: str | None, uuid: str) -> None:
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
        with choose_gpu() as device:
            assert device.uuid == uuid
        # CUDA then sees this one alone, whichever way it counts
        assert os.environ["CUDA_VISIBLE_DEVICES"] == uuid
        assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"

    @pytest.mark.parametrize("visible", ["2", "GPU-1234", "-1"])
    def test_one_that_is_not_there(self, visible: str) -> None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
        with pytest.raises(UserError, match="no such GPU") as caught:
            choose_gpu()
        assert OTHER in caught.value.remedy
        assert os.environ["CUDA_VISIBLE_DEVICES"] == visible


class TestMeteredBesideAGpu:
    """The tiny pipeline on the CPU while a (fake) GPU is metered: ticks and samples reach the record."""

    FOREIGN = (Process(pid=7, used_MiB=1.0),)

    def session(self, root: Path, gpu: FakeGpu, sampler: Sampler, progress: Progress) -> Session:
        plan = plan_of(root)
        with fake_nvml.installed([gpu]), choose_gpu() as device:
            described, _ = runner._claim(device, plan.campaign, allow_shared=True)
        texts = {tiny.PROMPT.id: tiny.PROMPT.text}
        return Session(root, plan, texts, progress, described, None, list(self.FOREIGN), sampler)

    def test_a_record(self, tmp_path: Path) -> None:
        root, log = tiny.make_root(tmp_path / "root"), io.StringIO()
        progress = Progress(log)
        with Sampler(FakeDeviceFactory(FakeGpu(CONSTANT)), 0.002, 20) as sampler:
            session = self.session(root, FakeGpu(CONSTANT), sampler, progress)
            progress.watts = lambda: sampler.latest_power_W
            item = session.plan.items("resolution")[0]
            progress.begin(session.plan.batches[0], list(session.plan.batches[0].items))
            time.sleep(1)
            record = session.measure(item)
            second = session.measure(session.plan.items("resolution")[1])
        assert record.environment.gpu is not None
        assert record.environment.gpu.name == fake_nvml.NAME
        assert record.environment.foreign_processes == list(self.FOREIGN)
        assert any(flag.startswith("foreign_process: 1 foreign") for flag in record.flags)
        for one in (record, second):
            assert one.ticks is not None
            assert one.samples is not None
            assert one.ticks.time_s[0] < one.windows.start_s[0]
            assert one.ticks.time_s[-1] > one.windows.end_s[-1]
            assert one.ticks.time_s[0] > -0.5  # what was read before is not in it
            power_W = (one.ticks.energy_mJ[-1] - one.ticks.energy_mJ[0]) / 1000
            power_W /= one.ticks.time_s[-1] - one.ticks.time_s[0]
            assert power_W == pytest.approx(600, rel=0.05)
            assert set(one.samples.power_instant_W) == {600}
        assert "600 W now" in log.getvalue()

    def test_a_meter_that_fails_stops_the_run_at_once(self, tmp_path: Path) -> None:
        root = tiny.make_root(tmp_path / "root", protocols={"idle_s": 1.0, "sampled": tiny.SAMPLED})
        lost = FakeGpu(CONSTANT, lost_at_s=1.0)
        with Sampler(FakeDeviceFactory(lost), 0.002, 20) as sampler:
            session = self.session(root, FakeGpu(CONSTANT), sampler, Progress(io.StringIO()))
            session.progress.begin(session.plan.batches[0], list(session.plan.batches[0].items))
            with pytest.raises(UserError, match="the GPU was lost"):
                session.measure(session.plan.items("resolution")[0])


class TestInterventions:
    """Three configurations in one process: plain, with a VAE that tiles, and with another kernel."""

    WIDE: ClassVar[dict[str, int]] = {"height": 32, "width": 272}
    VARY: ClassVar[list[dict[str, Any]]] = [
        WIDE,
        WIDE | {"interventions": ["vae-tiling"]},
        WIDE | {"attention_kernel": "math"},
    ]

    PROTOCOLS: ClassVar[dict[str, Any]] = tiny.CAMPAIGN["protocols"] | {
        "fidelity": True,
        "sampled": tiny.SAMPLED | {"min_steps": 2},  # as many for all, however fast
    }

    @pytest.fixture(scope="class")
    @classmethod
    def found(cls, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
        root = cls.root(tmp_path_factory.mktemp("interventions") / "root", cls.VARY)
        with tiny.own_devices_and_locks(root):
            measure(root)
        read = [read_record(path) for path in record_paths(raw_folder(root, "tiny", "resolution"))]
        return {r.file_name.removeprefix("tiny-wan_").split("__", 1)[1]: r for r in read}

    @classmethod
    def root(cls, folder: Path, vary: list[dict[str, Any]]) -> Path:
        experiments = tiny.resolution(vary=vary, one_process=True)
        return tiny.make_root(folder, protocols=cls.PROTOCOLS, experiments=experiments)

    def test_what_changes_nothing_is_told_and_the_rest_is_measured(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        nothing = Change(lambda: None, lambda: {"tiled_decodes": 0.0})
        monkeypatch.setattr(VaeTiling, "apply", lambda _self, _target: nothing)
        log, root = io.StringIO(), self.root(tmp_path / "root", self.VARY[:2])
        with pytest.raises(InterventionError, match="vae-tiling changed nothing"):
            measure(root, log)
        assert [path.name for path in record_paths(raw_folder(root, "tiny", "resolution"))] == [
            "tiny-wan_32x272_5f_2s__sampled_r1.json"
        ]
        assert "tiny-wan_32x272_5f_2s__vae-tiling__sampled_r1.json was not measured" in log.getvalue()

    def test_a_kernel_that_cannot_run_is_told_and_the_rest_is_measured(self, tmp_path: Path) -> None:
        """FlashAttention-2 cannot run Mochi's masked pooling of the text, and cuDNN nothing on the CPU."""
        vary = [
            self.WIDE,
            self.WIDE | {"attention_kernel": "cudnn"},
            self.WIDE | {"attention_kernel": "math"},
        ]
        log, root = io.StringIO(), self.root(tmp_path / "root", vary)
        with pytest.raises(InterventionError, match="'cudnn' cannot run every attention of WanTransformer3D"):
            measure(root, log)
        assert [path.name for path in record_paths(raw_folder(root, "tiny", "resolution"))] == [
            "tiny-wan_32x272_5f_2s__math__sampled_r1.json",
            "tiny-wan_32x272_5f_2s__sampled_r1.json",
        ]
        assert "tiny-wan_32x272_5f_2s__cudnn__sampled_r1.json was not measured" in log.getvalue()

    def test_the_record_says_what_was_in_force_and_what_it_did(self, found: dict[str, Record]) -> None:
        (entry,) = found["vae-tiling__sampled_r1.json"].interventions
        assert (entry.name, entry.kind) == ("vae-tiling", "vae-tiling")
        assert entry.evidence == {"tiled_decodes": 3}  # a warm-up and two generations
        assert found["sampled_r1.json"].interventions == []

    def test_what_was_changed_is_compared_with_what_was_not(self, found: dict[str, Record]) -> None:
        assert found["sampled_r1.json"].fidelity is None
        tiled = found["vae-tiling__sampled_r1.json"].fidelity
        assert tiled is not None
        assert (tiled.steps, tiled.relative_l2) == (2, 0)  # the denoiser is the same
        assert tiled.psnr_db is not None
        assert 30 < tiled.psnr_db < 70
        kernel = found["math__sampled_r1.json"].fidelity
        assert kernel is not None
        assert kernel.relative_l2 < 1e-4

    def test_what_was_measured_stays_where_the_unchanged_pipeline_needs_more_memory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from t2v_energy.measurement.protocols import Subject

        generate = Subject.generate

        def only_in_tiles(subject: Subject, steps: int) -> None:
            if subject.keep_output and not subject.configuration.interventions:
                raise torch.OutOfMemoryError("too little")
            generate(subject, steps)

        monkeypatch.setattr(Subject, "generate", only_in_tiles)
        log, root = io.StringIO(), self.root(tmp_path / "root", [self.VARY[1]])
        measure(root, log)
        (path,) = record_paths(raw_folder(root, "tiny", "resolution"))
        record = read_record(path)
        assert (record.status, record.fidelity) == ("ok", None)
        assert "not compared: out of memory" in log.getvalue()

    def test_records_of_other_settings_are_not_taken_for_these(
        self, found: dict[str, Record], tmp_path: Path
    ) -> None:
        root = self.root(tmp_path / "root", [self.VARY[1]])
        record = found["vae-tiling__sampled_r1.json"]
        entry = record.interventions[0].model_copy(update={"settings": {"size": 3}})
        changed = record.model_copy(update={"interventions": [entry]})
        write_atomically(raw_folder(root, "tiny", "resolution") / changed.file_name, to_json(changed))
        with pytest.raises(UserError, match="other settings of interventions than configured now"):
            measure(root)
