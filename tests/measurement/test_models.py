"""Every architecture measured by the runner in one experiment, and models that are added by a file alone."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny
import yaml
from t2v_energy import cli
from t2v_energy.aggregation import aggregate
from t2v_energy.measurement.composition import by_repetition, composed_latency_s, generations
from t2v_energy.measurement.progress import Progress
from t2v_energy.measurement.record import Record, read_record
from t2v_energy.measurement.runner import measure_batch
from t2v_energy.measurement.validity import check
from t2v_energy.plan import UNCOUNTED_S, Plan, make_plan, raw_folder

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

SHORT = {"warmups": 1, "repetitions": 3, "min_window_s": 0.5, "max_repetitions": 4, "max_ci95_percent": 1e-6}
"""Repetitions of several generations, and never narrow enough: the most are run."""
CLIP = "tiny-animatediff_32x32_1f_1s"

# What a user writes to add models: a file each, and no Python.
ONE_STAGE = yaml.safe_load((tiny.ROOT / "config/models/tiny-ltx.yaml").read_text()) | {
    "key": "eighth-ltx",
    "title": "LTX-Video in one stage",
    "pipeline": "LTXPipeline",
    "call": {"frame_rate": 24, "decode_timestep": 0.05},
}
del ONE_STAGE["components"]["latent_upsampler"], ONE_STAGE["spans"]["upsample"], ONE_STAGE["spans"]["refine"]
SKYREELS = yaml.safe_load((tiny.ROOT / "config/models/tiny-wan.yaml").read_text()) | {
    "key": "eighth-skyreels",
    "title": "A model of an architecture that nothing here knows",
    "architecture": "other",
    "pipeline": "SkyReelsV2Pipeline",
}
TRANSFORMER = SKYREELS["components"]["transformer"]
TRANSFORMER["class"] = "diffusers.SkyReelsV2Transformer3DModel"
EIGHTH = {"eighth-ltx": ONE_STAGE, "eighth-skyreels": SKYREELS}

ENTRIES: list[dict[str, Any]] = [
    *({"model": key} for key in (*tiny.KEYS, *EIGHTH)),
    *({"model": key, "protocol": "full"} for key in tiny.KEYS),
    {
        **{"model": "tiny-animatediff", "height": 32, "width": 32, "num_frames": 1, "num_inference_steps": 1},
        "protocol": "full",
        "protocols": {"full": SHORT},
    },
    {"model": "tiny-mochi", "prompt": "p001"},
    {"model": "tiny-ltx", "attention_kernel": "math", "num_inference_steps": 3},
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with an experiment of all tiny models and the added ones, measured."""
    root = tiny.make_root(
        tmp_path_factory.mktemp("models") / "root",
        protocols={"idle_s": 0.2, "sampled": tiny.SAMPLED, "full": {"warmups": 1, "repetitions": 2}},
        experiments={"models": {}},
    )
    for key, content in EIGHTH.items():
        tiny.write_yaml(root, f"models/{key}", content)
    experiment = {"key": "models", "title": "All", "protocol": "sampled", "vary": ENTRIES}
    tiny.write_yaml(root, "experiments/models", experiment)
    prompts = [
        tiny.PROMPT,
        tiny.Prompt("p001", "A red fox crosses a frozen lake, and a hare looks on.", 12, 0),
    ]
    tiny.write_prompts(prompts, tiny.prompts_path(root))
    with tiny.own_devices_and_locks(root):
        for batch in plan(root).batches:
            measure_batch(
                root,
                tiny.settings(root),
                batch.experiment,
                batch.name,
                prompts=tiny.prompts_path(root),
                progress=Progress(io.StringIO()),
            )
    return root


def plan(root: Path) -> Plan:
    return make_plan(root, tiny.settings(root))


@pytest.fixture(scope="module")
def found(root: Path) -> dict[str, Record]:
    folder = raw_folder(root, "tiny", "models")
    return {item.record: read_record(folder / item.record) for item in plan(root).items("models")}


@pytest.fixture(scope="module")
def rows(root: Path, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """configurations.csv of what was measured."""
    out = tmp_path_factory.mktemp("tables")
    paths = [raw_folder(root, "tiny", "models") / item.record for item in plan(root).items("models")]
    aggregate({"models": paths}, out / "m.parquet", out / "c.csv", root)
    return pd.read_csv(out / "c.csv")


def of(found: dict[str, Record], key: str, protocol: str = "sampled") -> Record:
    """The record of a model's defaults."""
    c = tiny.defaults(key)
    return found[f"{c.id()}__{protocol}_r1.json"]


def stages(record: Record, window: int) -> Counter[str]:
    pairs = zip(record.spans.window, record.spans.stage, strict=True)
    return Counter(stage for index, stage in pairs if index == window)


class TestThePlan:
    def test_each_batch_is_of_one_model(self, root: Path) -> None:
        batches = plan(root).batches
        assert [len({item.configuration.model for item in b.items}) for b in batches] == [1] * len(batches)
        assert {item.configuration.model for b in batches for item in b.items} == {*tiny.KEYS, *EIGHTH}

    def test_a_model_that_nothing_counts_has_no_prediction(
        self, root: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (batch,) = (b for b in plan(root).batches if b.items[0].configuration.model == "eighth-skyreels")
        assert batch.measure_s == UNCOUNTED_S
        assert batch.memory_GiB == 0
        assert cli.main(["--root", str(root), "plan", "--campaign", "tiny", "--json"]) == 0
        listed = json.loads(capsys.readouterr().out)["configurations"]
        (row,) = (row for row in listed if row["configuration_id"].startswith("eighth-skyreels"))
        assert row["predicted_latency_s"] is row["predicted_gpu_energy_Wh"] is None
        (counted,) = (row for row in listed if row["configuration_id"].startswith("eighth-ltx"))
        assert counted["predicted_latency_s"] > 0


class TestRecords:
    def test_every_record_is_valid(self, found: dict[str, Record]) -> None:
        assert len(found) == len(ENTRIES)
        for name, record in found.items():
            assert record.status == "ok", name
            assert {f.rule for f in check(record) if f.level == "invalid"} == set(), name

    @pytest.mark.parametrize("key", tiny.KEYS)
    def test_spans_are_those_of_the_model_file(self, found: dict[str, Record], key: str) -> None:
        model, steps = tiny.model(key), tiny.defaults(key).num_inference_steps
        for protocol in ("sampled", "full"):
            record = of(found, key, protocol)
            window = record.windows.kind.index("generation")
            run = record.windows.steps[window]
            assert 1 <= run <= steps
            assert run == steps or protocol == "sampled"
            seen = stages(record, window)
            assert set(seen) == set(model.spans)
            assert seen["denoiser"] == run * model.passes_per_step
            assert seen["scheduler"] == run
            loops = 2 if key == "tiny-ltx" else 1
            prompts = loops * model.passes_per_step * model.batch_per_pass
            assert seen["text_encoder"] == prompts * len(model.stage_parts("text_encoder"))
            assert seen["vae_decode"] == seen["postprocess"] == 1

    def test_ltx_refines_once_however_many_steps_come_before(self, found: dict[str, Record]) -> None:
        for record in (of(found, "tiny-ltx"), of(found, "tiny-ltx", "full")):
            measured = generations(record.windows, record.spans)
            more = composed_latency_s(measured, 104) - composed_latency_s(measured, 4)
            assert more == pytest.approx([100 * g.mean_step_s for g in measured])
            for generation in measured:
                seen = stages(record, generation.index)
                assert (seen["upsample"], seen["refine"]) == (1, 2)
                refined = [
                    start
                    for window, stage, start in zip(
                        record.spans.window, record.spans.stage, record.spans.start_s, strict=True
                    )
                    if window == generation.index and stage == "refine"
                ]
                assert min(refined) > generation.loop_end_s
                assert generation.once_s > generation.end_s - min(refined)

    def test_a_kernel_is_bound_in_the_refinement_too(self, found: dict[str, Record]) -> None:
        (forced,) = (r for name, r in found.items() if "__math__" in name)
        assert forced.attention_kernels["denoiser"] == forced.attention_kernels["refine"] == ["math"]
        plain = of(found, "tiny-ltx").attention_kernels
        assert plain["denoiser"] == plain["refine"] == ["flash-cpu"]
        assert forced.attention_kernels["text_encoder"] == plain["text_encoder"]

    def test_prompts_of_an_experiment(self, found: dict[str, Record]) -> None:
        (other,) = (r for name, r in found.items() if "_pp001__" in name)
        first = of(found, "tiny-mochi")
        assert first.prompt is not None
        assert other.prompt is not None
        assert (first.prompt.tokens, other.prompt.tokens) == (9, 15)
        assert first.prompt.padded_tokens == other.prompt.padded_tokens == 256

    def test_the_hosts_part_before_the_first_call_is_spanned(self, found: dict[str, Record]) -> None:
        record = of(found, "tiny-animatediff")
        for generation in generations(record.windows, record.spans):
            at = {
                stage: (start, end)
                for window, stage, start, end in zip(
                    record.spans.window, record.spans.stage, record.spans.start_s, record.spans.end_s,
                    strict=True,
                )
                if window == generation.index
            }  # fmt: skip
            assert at["prepare"] == (generation.start_s, at["text_encoder"][0])
            assert at["prepare"][1] > at["prepare"][0]


class TestShortClips:
    """A repetition is as many generations as fill a window; the interval is that between repetitions."""

    def test_repetitions_fill_the_window_and_go_on(self, found: dict[str, Record]) -> None:
        record = found[f"{CLIP}__full_r1.json"]
        measured = generations(record.windows, record.spans)
        numbers = [g.repetition for g in measured]
        assert numbers == sorted(numbers)
        assert set(numbers) == {0, 1, 2, 3}
        assert record.windows.repetition[:2] == [-1, -1]  # idle and warm-up
        assert record.windows.repetition[-1] == -1
        for number in set(numbers):
            lengths = [g.end_s - g.start_s for g in measured if g.repetition == number]
            assert sum(lengths) >= SHORT["min_window_s"] - 1e-4
            assert sum(lengths[:-1]) < SHORT["min_window_s"]  # and no more than fill it
        assert len(measured) > 4

    def test_its_row_counts_repetitions(self, found: dict[str, Record], rows: pd.DataFrame) -> None:
        record = found[f"{CLIP}__full_r1.json"]
        measured = generations(record.windows, record.spans)
        means = by_repetition(measured, composed_latency_s(measured, 1))
        (row,) = rows.query("configuration_id == @CLIP and protocol == 'full'").to_dict("records")
        assert row["latency_s_n"] == len(means) == 4
        assert row["latency_s"] == pytest.approx(means.mean())
        assert row["latency_s_std"] == pytest.approx(means.std(ddof=1))
        shares = [value for name, value in row.items() if name.endswith("_time_share") and value == value]
        assert 0.9 < sum(shares) <= 1 + 1e-9

    def test_elsewhere_every_generation_is_a_repetition(self, found: dict[str, Record]) -> None:
        record = of(found, "tiny-cogvideox", "full")
        assert record.windows.repetition == [-1, -1, 0, 1, -1]
        assert [g.repetition for g in generations(record.windows, record.spans)] == [0, 1]


class TestAnEighthModel:
    """Its file in config/models/ is all that it takes."""

    @pytest.mark.parametrize("key", EIGHTH)
    def test_it_is_measured_and_aggregated(
        self, found: dict[str, Record], rows: pd.DataFrame, key: str
    ) -> None:
        (record,) = (r for r in found.values() if r.configuration.model == key)
        assert (record.status, record.windows.kind.count("generation")) == ("ok", 2)
        window = record.windows.kind.index("generation")
        assert set(stages(record, window)) == set(EIGHTH[key]["spans"])
        (row,) = rows.query("model == @key").to_dict("records")
        assert row["latency_s"] > 0
        assert row["denoiser_time_share"] > 0

    def test_one_that_nothing_counts_has_no_share_of_the_peak(self, root: Path, tmp_path: Path) -> None:
        """On an accelerator with a peak, too, where the others have one."""
        accelerators = yaml.safe_load((root / "config/accelerators.yaml").read_text())
        accelerators["cpu"]["nominal"] = False
        other = tmp_path / "root"
        other.mkdir()
        (other / "results").symlink_to(root / "results")
        for path in (root / "config").rglob("*.yaml"):
            copied = other / path.relative_to(root)
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_text(path.read_text())
        (other / "config/accelerators.yaml").write_text(yaml.safe_dump(accelerators))
        paths = [raw_folder(other, "tiny", "models") / i.record for i in plan(other).items("models")]
        aggregate({"models": paths}, tmp_path / "m.parquet", tmp_path / "c.csv", other)
        rows = pd.read_csv(tmp_path / "c.csv")
        mfu = rows.groupby("model")["mfu"].max()
        assert mfu.isna().to_dict() == {key: key == "eighth-skyreels" for key in (*tiny.KEYS, *EIGHTH)}
        # Mochi's work is that of the prompt that was measured
        mochi = rows.query("model == 'tiny-mochi' and protocol == 'sampled'").sort_values("configuration_id")
        short, long = mochi["mfu"] * mochi["latency_s"]
        assert 1 < long / short < 1.1


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path) -> Iterator[None]:
    with tiny.own_devices_and_locks(tmp_path):
        yield
