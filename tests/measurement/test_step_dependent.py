"""Records of interventions that make steps unequal: real generations of a tiny pipeline, whole schedules."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
from t2v_energy.aggregation import aggregate
from t2v_energy.interventions.taylorseer import skipped_steps
from t2v_energy.measurement.composition import generations
from t2v_energy.measurement.record import Record, read_record, record_paths
from t2v_energy.measurement.validity import check
from t2v_energy.plan import make_plan, raw_folder

torch = pytest.importorskip("torch")
STEPS = 8
NAMES = ("cfg-truncation-0.5", "taylorseer-3", "pab-2", "cfg-truncation-0.5+taylorseer-3")
FULL = {"warmups": 1, "warmup_steps": 1, "repetitions": 2}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Record]]:
    """A root, and records by their interventions."""
    from t2v_energy.measurement.progress import Progress
    from t2v_energy.measurement.runner import measure_batch

    vary = [
        {"height": 32, "width": 32, "interventions": names.split("+") if names else []}
        for names in ("", *NAMES)
    ]
    fixed = {"num_frames": 5, "num_inference_steps": STEPS}
    protocols = {**tiny.CAMPAIGN["protocols"], "full": FULL}
    experiments = tiny.resolution(protocol="full", fixed=fixed, vary=vary)
    root = tiny.make_root(
        tmp_path_factory.mktemp("step") / "root", protocols=protocols, experiments=experiments
    )
    with tiny.own_devices_and_locks(root):
        settings = tiny.settings(root)
        for batch in make_plan(root, settings).batches:
            measure_batch(
                root,
                settings,
                batch.experiment,
                batch.name,
                prompts=tiny.prompts_path(root),
                progress=Progress(io.StringIO()),
            )
    found = [read_record(path) for path in record_paths(raw_folder(root, "tiny", "resolution"))]
    return root, {"+".join(record.configuration.interventions): record for record in found}


def calls(record: Record) -> list[list[int]]:
    """Denoiser calls of each step, by generation."""
    windows = [i for i, kind in enumerate(record.windows.kind) if kind == "generation"]
    spans = list(zip(record.spans.window, record.spans.stage, record.spans.step, strict=True))
    return [[spans.count((w, "denoiser", step)) for step in range(STEPS)] for w in windows]


class TestRecords:
    def test_all_were_measured(self, measured: tuple[Path, dict[str, Record]]) -> None:
        assert set(measured[1]) == {"", *NAMES}

    def test_are_valid_however_many_calls_a_step_has(self, measured: tuple[Path, dict[str, Record]]) -> None:
        for name, record in measured[1].items():
            levels = {f.rule: f.level for f in check(record)}
            # on a CPU the pipeline's own host code takes more than a hundredth of a tiny generation
            assert {rule for rule, level in levels.items() if level != "ok"} <= {"unspanned"}, name

    def test_calls_are_those_that_the_pipeline_made(self, measured: tuple[Path, dict[str, Record]]) -> None:
        both, half = [2] * STEPS, [2] * 4 + [1] * 4
        expected = {"": both, "taylorseer-3": both, "pab-2": both}
        for name, record in measured[1].items():
            assert calls(record) == [expected.get(name, half)] * 2, name

    def test_evidence_counts_all_generations(self, measured: tuple[Path, dict[str, Record]]) -> None:
        evidence = {
            name: {i.name: i.evidence for i in record.interventions} for name, record in measured[1].items()
        }
        skipped = skipped_steps(STEPS, 3, 3)
        assert evidence["taylorseer-3"]["taylorseer-3"]["skipped_stack_calls"] == 2 * 2 * len(skipped)
        assert evidence["cfg-truncation-0.5"]["cfg-truncation-0.5"] == {"omitted_passes": 2 * 4}
        stacked = evidence[NAMES[-1]]["taylorseer-3"]["skipped_stack_calls"]
        assert stacked == 2 * (len(skipped) + len([step for step in skipped if step < 4]))


class TestTotals:
    @pytest.fixture(scope="class")
    @classmethod
    def rows(cls, measured: tuple[Path, dict[str, Record]], tmp_path_factory: Any) -> pd.DataFrame:
        root, folder = measured[0], tmp_path_factory.mktemp("built")
        paths = record_paths(raw_folder(root, "tiny", "resolution"))
        aggregate({"resolution": paths}, folder / "m.parquet", folder / "c.csv", root)
        return pd.read_csv(folder / "c.csv", keep_default_na=False).set_index("intervention")

    def test_a_whole_generation_costs_what_its_window_took(
        self, measured: tuple[Path, dict[str, Record]], rows: pd.DataFrame
    ) -> None:
        for name, record in measured[1].items():
            found = generations(record.windows, record.spans)
            lengths = [g.end_s - g.start_s for g in found]
            row = rows.loc[name]
            assert float(row["latency_s"]) == pytest.approx(np.mean(lengths))
            assert float(row["step_time_s"]) == pytest.approx(np.mean([g.loop_s for g in found]) / STEPS)
            once = float(row["latency_s"]) - STEPS * float(row["step_time_s"])
            assert once == pytest.approx(float(row["once_s"]))

    def test_shares_add_up(self, rows: pd.DataFrame) -> None:
        shares = [column for column in rows.columns if column.endswith("_time_share")]
        covered = rows[shares].apply(pd.to_numeric).sum(axis="columns")
        unspanned = pd.to_numeric(rows["unspanned_percent"]) / 100
        assert covered.to_numpy() == pytest.approx(1 - unspanned.to_numpy(), abs=0.02)

    def test_skipped_steps_are_no_scatter(self, rows: pd.DataFrame) -> None:
        assert not rows["flags"].str.contains("step_sem").any()
