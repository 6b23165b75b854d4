"""interventions.csv, figures 7 and 8 and their numbers, from records whose ratios are known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import exp, inf, log, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import papermill
import pytest
import synthetic_interventions as synthetic
import tiny
from figure_checks import assert_legible
from matplotlib.backends.backend_agg import FigureCanvasAgg
from records import LOOP_W, ONCE_J, ONCE_S, configuration, environment, make_record, write
from scipy.stats import t as student_t
from t2v_energy.aggregation import aggregate
from t2v_energy.analysis import interventions, interventions_figure, interventions_numbers, style
from t2v_energy.analysis.numbers import Number
from t2v_energy.errors import UserError
from t2v_energy.measurement.record import Board, Fidelity, Gpu, InterventionRecord, Record, record_paths
from t2v_energy.measurement.sealing import verify

STEPS = 50
pytestmark = pytest.mark.usefixtures("tiling_changes_no_work")
CATALOGUE: dict[str, dict[str, Any]] = {
    "fast": {"quality": {"figure": "PSNR 30 dB", "source": "a test"}},
    "unknown": {"expected": {"rate": {"attention": 2.0}, "source": "another test"}},
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with the shipped config/ and two further entries of the catalogue."""
    root = tiny.make_root(tmp_path / "root")
    tiny.add_interventions(root, CATALOGUE)
    return root


def in_force(*names: str) -> list[InterventionRecord]:
    return [
        InterventionRecord(name=name, kind="vae-tiling", evidence={"tiled_decodes": 3.0}) for name in names
    ]


def passes(step_s: Sequence[Sequence[float]], uuid: str = "GPU-0", **changes: Any) -> list[Record]:
    """Records of one configuration: step times (s) of each pass's generations, multiples of 0.5."""
    names = changes.pop("interventions", ())
    extra = changes.pop("extra", {})
    config = configuration(interventions=names, **changes)
    gpu = Gpu(name="NVIDIA H200", uuid=uuid, driver="x", power_limit_W=700.0, memory_total_MiB=1.0)
    return [
        make_record(
            config=config, experiment="interventions", pass_index=index, step_s=own,
            environment=environment(gpu=None).model_copy(update={"gpu": gpu}),
            interventions=in_force(*names), **extra,
        )
        for index, own in enumerate(step_s, start=1)
    ]  # fmt: skip


def rows(folder: Path, *records: list[Record]) -> pd.DataFrame:
    """configurations.csv of these records."""
    by_experiment: dict[str, list[Path]] = {}
    for record in (record for group in records for record in group):
        by_experiment.setdefault(record.experiment, []).append(write(record, folder / record.experiment))
    csv = folder / "configurations.csv"
    aggregate(
        {key: record_paths(folder / key) for key in by_experiment}, folder / "m.parquet", csv, tiny.ROOT
    )
    return pd.read_csv(csv)


def latency_s(step_s: float, steps: int = STEPS) -> float:
    return ONCE_S + steps * step_s


def energy_Wh(step_s: float, steps: int = STEPS) -> float:
    return (ONCE_J + steps * step_s * LOOP_W) / 3600


def single(root: Path, table: pd.DataFrame, name: str) -> pd.Series:
    found = interventions.interventions_table(root, "h200", table)
    assert list(found.columns) == list(interventions.COLUMNS)
    (row,) = [row for _, row in found.iterrows() if row["intervention"] == name]
    return row


class TestRatios:
    def test_passes_are_paired_so_that_a_drift_cancels(self, root: Path, tmp_path: Path) -> None:
        """Passes get slower, with and without alike: their own scatter is no doubt about the ratio."""
        without = [[1.0, 1.0], [1.5, 1.5], [2.0, 2.0]]
        with_it = [[0.5, 0.5], [1.0, 1.0], [1.0, 1.0]]
        table = rows(tmp_path, passes(without), passes(with_it, interventions=("fast",)))
        row = single(root, table, "fast")
        for name, cost in (("latency", latency_s), ("energy", energy_Wh)):
            logs = [log(cost(w[0]) / cost(o[0])) for w, o in zip(with_it, without, strict=True)]
            ratio = exp(np.mean(logs))
            half = float(student_t.ppf(0.975, 2)) * np.std(logs, ddof=1) / sqrt(3)
            assert row[f"measured_{name}_ratio"] == pytest.approx(ratio, rel=1e-4)
            assert row[f"measured_{name}_ratio_ci95"] == pytest.approx(ratio * half, rel=0.01)
        assert (row["passes"], row["n"], row["interval_of"], row["same_board"]) == (3, 6, "passes", "yes")
        assert row["videos_per_hour"] == pytest.approx(3600 / np.mean([latency_s(w[0]) for w in with_it]))
        assert row["measured_kind"] == "measured"

    def test_on_two_boards_energy_is_that_of_both_and_of_the_baseline_that_of_one(
        self, root: Path, tmp_path: Path
    ) -> None:
        """Twins share a video's steps: half the time of each, twice the power, an experiment of its own."""
        own = {"experiment": "context-parallel"}
        alone = [record.model_copy(update=own) for record in passes([[1.0, 1.0]])]
        (both,) = passes([[0.5, 0.5]], interventions=("context-parallel-2",))
        assert both.environment.gpu is not None
        twin = Board(
            gpu=both.environment.gpu.model_copy(update={"uuid": "GPU-1"}),
            ticks=both.ticks,
            samples=both.samples,
        )
        table = rows(tmp_path, alone, [both.model_copy(update=own | {"further_boards": [twin]})])
        row = single(root, table, "context-parallel-2")
        assert (row["experiment"], row["same_board"]) == ("context-parallel", "yes")
        assert row["measured_latency_ratio"] == pytest.approx(latency_s(0.5) / latency_s(1.0), rel=1e-4)
        ratio = 2 * energy_Wh(0.5) / energy_Wh(1.0)
        assert row["measured_energy_ratio"] == pytest.approx(ratio, rel=1e-4)

    def test_the_interval_holds_the_truth_as_often_as_it_says(self) -> None:
        random = np.random.default_rng(1)
        held = 0
        for _ in range(400):
            base = 10 * np.exp(0.05 * random.standard_normal(4))  # drifts that both share
            own = 0.8 * base * np.exp(0.002 * random.standard_normal(4))
            ratio = interventions.paired_ratio(planted(own), planted(base), "latency_s")
            held += abs(ratio.value - 0.8) <= ratio.ci95
        assert 0.92 <= held / 400 <= 0.98

    def test_two_passes_have_the_interval_of_repetition(self, root: Path, tmp_path: Path) -> None:
        table = rows(
            tmp_path,
            passes([[1.0, 1.0, 1.5], [1.0, 1.0, 1.5]]),
            passes([[0.5, 0.5, 1.0], [0.5, 0.5, 1.0]], interventions=("fast",)),
        )
        row = single(root, table, "fast")
        relative = [
            r["latency_s_ci95"] / r["latency_s"] for _, r in table.iterrows()
        ]  # of both: one configuration each
        assert row["interval_of"] == "repetition"
        assert row["measured_latency_ratio_ci95"] == pytest.approx(
            row["measured_latency_ratio"] * np.hypot(*relative), rel=1e-6
        )

    def test_single_generations_in_two_passes_have_the_interval_of_passes(self) -> None:
        ratio = interventions.paired_ratio(planted([8.0, 8.1]), planted([10.0, 10.0]), "latency_s")
        logs = np.log([0.8, 0.81])
        assert ratio.interval_of == "passes"
        assert ratio.ci95 == pytest.approx(exp(logs.mean()) * 12.706 * logs.std(ddof=1) / sqrt(2), rel=1e-3)

    def test_one_generation_tells_no_interval(self) -> None:
        ratio = interventions.paired_ratio(planted([8.0]), planted([10.0]), "latency_s")
        assert (ratio.value, ratio.interval_of) == (pytest.approx(0.8), "")
        assert np.isnan(ratio.ci95)

    def test_but_that_of_generations_that_were_repeated_is_taken_for_it(self) -> None:
        own, baseline = planted([8.0]), planted([10.0])
        ratio = interventions.paired_ratio(own, baseline, "latency_s", interventions.Scatter(0.002, 12))
        assert ratio.interval_of == "pooled"
        assert ratio.ci95 == pytest.approx(0.8 * 2.1788 * 0.002 * sqrt(2), rel=1e-4)
        unknown = interventions.paired_ratio(own, baseline, "latency_s", interventions.Scatter(np.nan, 0))
        assert unknown.interval_of == ""

    def test_the_scatter_is_pooled_over_what_was_repeated_within_passes(self) -> None:
        table = pd.DataFrame(
            {
                "latency_s": [10.0, 20.0, 5.0, 10.0, 9.0],
                "latency_s_std": [0.1, 0.1, np.nan, 0.3, 3.0],
                "latency_s_n": [3, 2, 1, 4, 4],
                "passes": [1, 1, 1, 2, 1],
                "status": ["ok", "ok", "ok", "ok", "out_of_memory"],
            }
        )
        found = interventions.scatter(table, "latency_s")
        assert found.degrees == 5
        assert found.relative == pytest.approx(sqrt((2 * 0.01**2 + 1 * 0.005**2 + 2 * 0.03**2) / 5))
        assert interventions.scatter(table.iloc[2:3], "latency_s").degrees == 0

    def test_few_generations_are_taken_to_scatter_as_others_of_their_size(
        self, root: Path, tmp_path: Path
    ) -> None:
        """Two generations a pass: one degree of freedom each, six of three rows of two passes."""
        table = rows(
            tmp_path,
            passes([[2.0, 2.0], [2.0, 2.5]]),
            passes([[1.0, 1.5], [1.0, 1.0]], interventions=("fast",)),
            passes([[1.5, 1.5], [2.0, 1.5]], interventions=("unknown",)),
        )
        row = single(root, table, "fast")
        pooled = interventions.scatter(table, "latency_s")
        assert (row["interval_of"], pooled.degrees) == ("pooled", 6)
        half = float(student_t.ppf(0.975, 6)) * pooled.relative * sqrt(2 / 4)
        ratio = row["measured_latency_ratio"]
        assert row["measured_latency_ratio_ci95"] == pytest.approx(ratio * half, rel=1e-6)

    def test_another_size_scatters_as_it_likes(self, root: Path, tmp_path: Path) -> None:
        of_width = {
            width: [
                passes([[step_s, step_s + more_s]] * 2, interventions=names, width=width)
                for step_s, names in ((2.0, ()), (1.0, ("fast",)), (1.5, ("unknown",)))
            ]
            for width, more_s in ((832, 0.5), (1280, 1.5))
        }
        alone = interventions.interventions_table(root, "h200", rows(tmp_path / "alone", *of_width[832]))
        both = interventions.interventions_table(
            root, "h200", rows(tmp_path / "both", *of_width[832], *of_width[1280])
        )
        columns = ["measured_latency_ratio_ci95", "measured_energy_ratio_ci95"]
        assert set(alone["interval_of"]) == {"pooled"}
        kept = both[both["width"] == 832][columns].to_numpy()
        assert kept == pytest.approx(alone[columns].to_numpy())
        assert (both[both["width"] == 1280][columns].to_numpy() > 1.5 * kept).all()

    def test_a_size_that_was_hardly_repeated_scatters_as_the_experiment(
        self, root: Path, tmp_path: Path
    ) -> None:
        repeated = [
            passes([[step_s, step_s + 0.5]] * 2, interventions=names)
            for step_s, names in ((2.0, ()), (1.0, ("fast",)))
        ]
        once = [
            passes([[step_s]], interventions=names, width=1280)
            for step_s, names in ((2.0, ()), (1.0, ("fast",)))
        ]
        table = rows(tmp_path, *repeated, *once)
        found = interventions.interventions_table(root, "h200", table)
        large = found[found["width"] == 1280].iloc[0]
        pooled = interventions.scatter(table, "latency_s")
        half = float(student_t.ppf(0.975, pooled.degrees)) * pooled.relative * sqrt(2)
        assert (large["interval_of"], pooled.degrees) == ("pooled", 4)
        assert large["measured_latency_ratio_ci95"] == pytest.approx(
            large["measured_latency_ratio"] * half, rel=1e-6
        )

    def test_only_shared_passes_are_compared(self) -> None:
        """The baseline comes once more at the end: its third pass has no counterpart."""
        ratio = interventions.paired_ratio(planted([8.0, 8.0]), planted([10.0, 10.0, 20.0]), "latency_s")
        assert ratio.value == pytest.approx(0.8)
        assert ratio.passes == 2

    def test_other_boards_are_told(self, root: Path, tmp_path: Path) -> None:
        table = rows(
            tmp_path,
            passes([[1.0, 1.0]], uuid="GPU-A"),
            passes([[0.5, 0.5]], uuid="GPU-B", interventions=("fast",)),
        )
        row = single(root, table, "fast")
        assert (row["same_board"], row["interval_of"]) == ("no", "")  # nothing tells how boards differ
        assert np.isnan(row["measured_latency_ratio_ci95"])

    def test_other_boards_widen_the_interval_by_what_boards_differ(self, root: Path, tmp_path: Path) -> None:
        on_two = [
            replace_board(passes([[1.0, 1.5], [1.5, 2.0]], uuid="GPU-A", width=width), 2, "GPU-B")
            for width in (512, 640)
        ]
        table = rows(
            tmp_path,
            *on_two,
            passes([[1.0, 1.0]], uuid="GPU-A"),
            passes([[0.5, 0.5]], uuid="GPU-B", interventions=("fast",)),
        )
        between = interventions.between_boards(table, "latency_s")
        means = np.array([latency_s(1.25), latency_s(1.75)])
        assert between.relative == pytest.approx(means.std(ddof=1) / means.mean())
        assert between.degrees == 1  # both rows are of the same two boards
        row = single(root, table, "fast")
        assert row["interval_of"] == "boards"
        least = row["measured_latency_ratio"] * 12.706 * between.relative * sqrt(2)
        within = row["measured_latency_ratio"] * 12.706 * interventions.scatter(table, "latency_s").relative
        assert least < row["measured_latency_ratio_ci95"] <= 1.001 * np.hypot(least, within)

    def test_boards_of_passes_that_are_not_compared_narrow_nothing(self) -> None:
        boards = interventions.Scatter(0.01, 9)
        own, alone = planted([8.0], boards=("B",)), planted([10.0], boards=("A",))
        several = planted([10.0, 11.0, 12.0], boards=("A", "C", "D"))
        pooled = interventions.Scatter(0.002, 12)
        found = [interventions.paired_ratio(own, of, "latency_s", pooled, boards) for of in (alone, several)]
        assert found[0] == found[1]
        assert found[0].interval_of == "boards"

    def test_without_a_common_pass_there_is_no_interval(self) -> None:
        own = planted([8.0], boards=("B",))
        later = planted([10.0], boards=("A",))
        later["records"] = "h200/x__full_r2.json"
        ratio = interventions.paired_ratio(own, later, "latency_s", None, interventions.Scatter(0.01, 9))
        assert (ratio.value, ratio.passes, ratio.interval_of) == (0.8, 0, "")
        assert np.isnan(ratio.ci95)

    def test_boards_that_nothing_links_tell_less(self) -> None:
        pairs = [("A", "B"), ("B", "C"), ("D", "E")]
        table = pd.DataFrame([planted([1.0, 1.02], boards=pair) for pair in pairs]).assign(status="ok")
        found = interventions.between_boards(table, "latency_s")
        assert found.degrees == 3  # of five boards in two groups
        assert found.relative == pytest.approx(0.02 / sqrt(2) / 1.01)

    def test_passes_of_one_board_do_not_tell_how_boards_differ(self) -> None:
        table = pd.DataFrame([planted([1.0, 2.0], boards=("A", "A")), planted([1.0, 2.0])])
        assert interventions.between_boards(table.assign(status="ok"), "latency_s").degrees == 0

    def test_passes_on_other_boards_are_left_out_where_some_ran_on_the_same(self) -> None:
        """A first pass that went on on another board would show the boards, not the change."""
        own = planted([8.0, 8.0, 8.1], boards=("A", "B", "B"))
        baseline = planted([10.5, 10.0, 10.0], boards=("C", "B", "B"))
        ratio = interventions.paired_ratio(own, baseline, "latency_s")
        assert ratio.passes == 2
        assert ratio.value == pytest.approx(np.sqrt(0.8 * 0.81))
        assert interventions.same_board(own, baseline) == "yes"
        # its batch went on on the board of the baseline's second pass
        continued = planted([8.2], boards=("B",))
        ratio = interventions.paired_ratio(continued, baseline, "latency_s")
        assert (ratio.passes, ratio.value) == (1, pytest.approx(0.82))
        assert interventions.same_board(continued, baseline) == "yes"
        elsewhere = planted([10.5, 10.0, 10.0], boards=("D", "D", "D"))
        assert interventions.paired_ratio(own, elsewhere, "latency_s").passes == 3
        assert interventions.same_board(own, elsewhere) == "no"


def planted(means: Sequence[float], column: str = "latency_s", boards: Sequence[str] = ()) -> pd.Series:
    """A row of configurations.csv with one generation a pass."""
    return pd.Series(
        {
            "gpu_uuids": ";".join(boards) or np.nan,
            column: float(np.mean(means)),
            f"{column}_ci95": np.nan,
            f"{column}_n": len(means),
            f"{column}_pass_means": ";".join(map(str, means)),
            "records": ";".join(f"h200/x__full_r{index}.json" for index in range(1, len(means) + 1)),
        }
    )


def replace_board(records: list[Record], pass_index: int, uuid: str) -> list[Record]:
    """One of the passes ran on another board."""
    found = []
    for record in records:
        gpu = record.environment.gpu
        if record.pass_index == pass_index and gpu is not None:
            moved = gpu.model_copy(update={"uuid": uuid})
            record = record.model_copy(
                update={"environment": record.environment.model_copy(update={"gpu": moved})}
            )
        found.append(record)
    return found


class TestBaselines:
    def test_names_say_all_that_differs(self, root: Path, tmp_path: Path) -> None:
        table = rows(
            tmp_path,
            passes([[1.0, 1.0]]),
            passes([[1.5, 1.5]], attention_kernel="flash"),
            passes([[1.0, 1.0]], num_inference_steps=20),
            passes([[0.5, 0.5]], interventions=("fast", "unknown"), attention_kernel="flash"),
        )
        found = interventions.interventions_table(root, "h200", table).set_index("intervention")
        assert set(found.index) == {"attention-flash", "fewer-steps", "attention-flash+fast+unknown"}
        fewer = found.loc["fewer-steps"]
        assert (fewer["num_inference_steps"], fewer["baseline_steps"]) == (20, 50)
        assert fewer["measured_latency_ratio"] == pytest.approx(latency_s(1.0, 20) / latency_s(1.0))
        assert found["lossless"].to_dict() == {
            "attention-flash": "yes", "fewer-steps": "no", "attention-flash+fast+unknown": "no"
        }  # fmt: skip
        assert found["uncited_parts"].to_dict() == {
            "attention-flash": 0, "fewer-steps": 1, "attention-flash+fast+unknown": 1
        }  # fmt: skip
        stack = found.loc["attention-flash+fast+unknown"]
        assert (stack["cited_quality"], stack["source"]) == ("fast: PSNR 30 dB", "a test")
        assert stack["expected_source"] == "unknown: another test"

    def test_that_of_the_same_steps_and_protocol_comes_first(self, root: Path, tmp_path: Path) -> None:
        ten = {"num_inference_steps": 10}
        table = rows(
            tmp_path,
            passes([[2.0, 2.0]]),
            passes([[1.0, 1.0]], **ten),
            passes([[1.5, 1.5]], **ten, extra={"protocol": "full", "steps": 10}),
            passes([[0.5, 0.5]], **ten, interventions=("fast",), extra={"protocol": "full", "steps": 10}),
            passes([[0.5, 0.5]], interventions=("unknown",), extra={"protocol": "full", "steps": 50}),
        )
        row = single(root, table, "fast")
        assert (row["baseline_steps"], row["baseline_protocol"]) == (10, "full")
        assert row["measured_latency_ratio"] == pytest.approx(latency_s(0.5, 10) / latency_s(1.5, 10))
        other = single(root, table, "unknown")  # no whole baseline of fifty steps: the composed one
        assert (other["protocol"], other["baseline_protocol"]) == ("full", "sampled")

    def test_that_of_its_own_board_comes_before_that_of_its_protocol(
        self, root: Path, tmp_path: Path
    ) -> None:
        whole = {"protocol": "full", "steps": 50}
        table = rows(
            tmp_path,
            passes([[2.0, 2.0]], uuid="GPU-A"),
            passes([[1.5, 1.5]], uuid="GPU-B", extra=whole),
            passes([[0.5, 0.5]], uuid="GPU-A", interventions=("fast",), extra=whole),
            passes([[0.5, 0.5]], uuid="GPU-B", interventions=("unknown",), extra=whole),
        )
        row, other = (single(root, table, name) for name in ("fast", "unknown"))
        assert (row["baseline_protocol"], row["same_board"]) == ("sampled", "yes")
        assert (other["baseline_protocol"], other["same_board"]) == ("full", "yes")

    def test_without_one_the_row_says_so(self, root: Path, tmp_path: Path) -> None:
        row = single(root, rows(tmp_path, passes([[0.5, 0.5]], interventions=("fast",))), "fast")
        assert row["note"] == "no baseline was measured"
        assert pd.isna(row["measured_latency_ratio"])
        assert row["predicted_latency_ratio"] == 1

    def test_other_experiments_and_what_did_not_fit_are_left_alone(self, root: Path, tmp_path: Path) -> None:
        record = make_record(config=configuration(interventions=("vae-tiling",)))
        assert interventions.interventions_table(root, "h200", rows(tmp_path, [record])).empty

    def test_an_unknown_name_is_refused(self, root: Path, tmp_path: Path) -> None:
        table = rows(tmp_path, passes([[1.0, 1.0]], interventions=("gone",)))
        with pytest.raises(UserError, match="there is no 'gone'"):
            interventions.interventions_table(root, "h200", table)


class TestPredicted:
    def test_from_the_frozen_calibration(self, root: Path, tmp_path: Path) -> None:
        table = rows(tmp_path, passes([[1.0, 1.0]]), passes([[0.5, 0.5]], interventions=("unknown",)))
        row = single(root, table, "unknown")
        assert (row["predicted"], row["predicted_kind"]) == ("computed", "modelled")
        assert row["calibration_sha256"] == interventions.savings_basis(root, "h200").sha256
        assert row["predicted_latency_ratio_low"] < row["predicted_latency_ratio"] < 1
        expected = 100 * (row["predicted_energy_ratio"] / row["measured_energy_ratio"] - 1)
        assert row["energy_error_percent"] == pytest.approx(expected)

    def test_what_was_committed_before_stands(self, root: Path, tmp_path: Path) -> None:
        from t2v_energy.prediction.registered import COLUMNS, prediction_file

        name = configuration(interventions=("unknown",)).id()
        path = root / prediction_file("h200", "interventions")
        path.parent.mkdir(parents=True, exist_ok=True)
        cells = [name, "50", *(str(0.1 * n) for n in range(1, 8)), "a.json", "f" * 64]
        path.write_text("\n".join([",".join(COLUMNS), ",".join(cells)]) + "\n")
        table = rows(tmp_path, passes([[1.0, 1.0]]), passes([[0.5, 0.5]], interventions=("unknown",)))
        row = single(root, table, "unknown")
        assert (row["predicted"], row["calibration_sha256"]) == ("registered", "f" * 64)
        assert row["predicted_latency_ratio"] == pytest.approx(0.1)
        assert row["predicted_energy_ratio_high"] == pytest.approx(0.6)

    def test_what_nobody_can_predict_is_measured_all_the_same(self, root: Path, tmp_path: Path) -> None:
        table = rows(tmp_path, passes([[1.0, 1.0]]), passes([[1.5, 1.5]], attention_kernel="math"))
        row = single(root, table, "attention-math")
        assert "'math'" in row["note"]
        assert pd.isna(row["predicted_latency_ratio"])
        assert row["measured_latency_ratio"] > 1
        assert interventions.budget_table(root, "h200", table).empty

    def test_a_budget_for_every_row(self, root: Path, tmp_path: Path) -> None:
        table = rows(tmp_path, passes([[1.0, 1.0]]), passes([[0.5, 0.5]], interventions=("unknown",)))
        budget = interventions.budget_table(root, "h200", table).set_index("class")
        assert budget.loc["attention", "with_s"] == pytest.approx(budget.loc["attention", "without_s"] / 2)
        assert len(budget) == 8


class TestFromRecords:
    def test_fidelity_of_the_pass_that_is_furthest_off(self, root: Path, tmp_path: Path) -> None:
        values = {
            "ssim": 0.9,
            "ms_ssim": None,
            "temporal_flickering": 0.8,
            "reference_temporal_flickering": 0.7,
        }
        near, far = (
            Fidelity(steps=4, relative_l2=l2, psnr_db=psnr, **values)
            for l2, psnr in ((0.0, None), (0.1, 30.0))
        )
        changed = passes([[0.5, 0.5], [0.5, 0.5]], interventions=("fast",))
        changed = [r.model_copy(update={"fidelity": f}) for r, f in zip(changed, (near, far), strict=True)]
        row = single(root, rows(tmp_path / "a", passes([[1.0, 1.0], [1.0, 1.0]]), changed), "fast")
        assert (row["relative_l2"], row["psnr_db"], row["ssim"], row["fidelity_steps"]) == (0.1, 30, 0.9, 4)
        assert pd.isna(row["ms_ssim"])
        changed = [r.model_copy(update={"fidelity": near}) for r in changed]
        row = single(root, rows(tmp_path / "b", passes([[1.0, 1.0], [1.0, 1.0]]), changed), "fast")
        assert row["psnr_db"] == inf

    def test_settings_and_the_mean_of_what_was_counted(self, root: Path, tmp_path: Path) -> None:
        first, second = passes([[0.5, 0.5], [0.5, 0.5]], interventions=("fast",))
        more = [InterventionRecord(name="fast", kind="vae-tiling", evidence={"tiled_decodes": 5.0})]
        changed = [first, second.model_copy(update={"interventions": more})]
        row = single(root, rows(tmp_path, passes([[1.0, 1.0], [1.0, 1.0]]), changed), "fast")
        assert json.loads(row["evidence"]) == {"fast": {"tiled_decodes": 4.0}}
        assert json.loads(row["settings"]) == {"fast": {"kind": "vae-tiling"}}

    def test_warm_ups_of_each_pass(self, tmp_path: Path) -> None:
        """A warm-up of one step: 0.4 s of text encoder, the step, and what follows it."""
        table = rows(tmp_path, passes([[1.0, 1.0], [2.0, 2.0]]))
        seconds = [float(part) for part in table["first_warmup_s_passes"][0].split(";")]
        energy = [float(part) for part in table["first_warmup_energy_Wh_passes"][0].split(";")]
        assert seconds == pytest.approx([ONCE_S + 1.0, ONCE_S + 2.0])
        assert energy == pytest.approx([(ONCE_J + s * LOOP_W) / 3600 for s in (1.0, 2.0)], rel=1e-3)

    def test_compiling_is_what_the_warm_up_has_beyond_the_baselines(self) -> None:
        common = {"records": "h200/x__sampled_r1.json;h200/x__sampled_r2.json", "gpu_uuids": "GPU-A;GPU-A"}
        row = pd.Series(
            common
            | {"gpu_energy_Wh": 40.0, "first_warmup_s_passes": "60;30",
               "first_warmup_energy_Wh_passes": "7.6;3.6"}
        )  # fmt: skip
        baseline = pd.Series(
            common
            | {"gpu_energy_Wh": 50.0, "first_warmup_s_passes": "10;10",
               "first_warmup_energy_Wh_passes": "2;2"}
        )  # fmt: skip
        found = interventions.compile_costs(row, baseline, latency_ratio=0.7, energy_ratio=0.8)
        assert found["compile_s"] == pytest.approx(60 - 7)
        assert found["compile_energy_Wh"] == pytest.approx(7.6 - 1.6)
        assert found["break_even_videos"] == pytest.approx(0.6)
        elsewhere = pd.Series({**row, "gpu_uuids": "GPU-B;GPU-A"})  # the first pass is on another board
        assert interventions.compile_costs(elsewhere, baseline, 0.7, 0.8)["compile_s"] == pytest.approx(
            30 - 7
        )
        free = baseline.copy()
        free["gpu_energy_Wh"] = 39.0
        assert np.isnan(interventions.compile_costs(row, free, 0.7, 1.1)["break_even_videos"])


# --- token merging ------------------------------------------------------------------------------------------


@pytest.fixture
def grid() -> pd.DataFrame:
    return synthetic.grid()


class TestMerging:
    def test_settings_become_columns(self, grid: pd.DataFrame) -> None:
        table = interventions.merging_table(grid)
        assert list(table.columns) == list(interventions.MERGING_COLUMNS)
        assert set(table["blocks"]) == {"every second", "0–27"}
        assert set(table["stride"]) == {"1×3×3", "2×3×3", "4×6×9"}
        assert np.allclose(table["throughput_ratio"] * table["measured_latency_ratio"], 1)

    def test_stacks_and_other_kinds_are_no_part_of_it(self, grid: pd.DataFrame) -> None:
        other = synthetic.merging_row() | {"settings": json.dumps({"fast": {"kind": "vae-tiling"}})}
        stack = synthetic.merging_row(intervention="compile+tome")
        unmeasured = synthetic.merging_row() | {"measured_latency_ratio": np.nan}
        empty = synthetic.merging_row() | {"settings": np.nan}
        table = pd.DataFrame([*grid.to_dict("records"), other, stack, unmeasured, empty])
        assert len(interventions.merging_table(table)) == len(grid)

    def test_methods_are_compared_at_the_same_settings(self, grid: pd.DataFrame) -> None:
        lone = synthetic.merging_row(method="attnbin", ratio=0.7)
        merging = interventions.merging_table(pd.DataFrame([*grid.to_dict("records"), lone]))
        methods = interventions.methods_table(merging, synthetic.measured(merging))
        assert len(methods) == 12
        assert methods["attnbin_over_3d"].to_numpy() == pytest.approx(1.05)
        assert set(methods["compared"]) == {"directly"}
        half = 1.05 * float(student_t.ppf(0.975, 25)) * 0.002  # √(1/2 + 1/2) of 25 rows' pooled scatter
        assert methods["attnbin_over_3d_ci95"].to_numpy() == pytest.approx(half)

    def test_methods_on_two_boards_differ_by_what_boards_do(self, grid: pd.DataFrame) -> None:
        merging = interventions.merging_table(grid)
        boards = dict.fromkeys(merging.loc[merging["method"] == "attnbin", "configuration_id"], "GPU-1")
        rows = synthetic.measured(merging, boards)
        unknown = interventions.methods_table(merging, rows)
        assert set(unknown["compared"]) == {"boards"}
        assert unknown["attnbin_over_3d_ci95"].isna().all()
        both = rows.iloc[[0]].assign(
            experiment="prompts", passes=2, latency_s_pass_means="9.9;10.1", gpu_uuids="GPU-0;GPU-1",
            records="h200/x__sampled_r1.json;h200/x__sampled_r2.json",
        )  # fmt: skip
        methods = interventions.methods_table(merging, pd.concat([rows, both]))
        between = 12.706 * (0.02 / sqrt(2)) * sqrt(2)  # one such pair of boards, 2 % apart
        within = float(student_t.ppf(0.975, 24)) * 0.002
        assert methods["attnbin_over_3d_ci95"].to_numpy() == pytest.approx(
            1.05 * np.hypot(between, within), rel=1e-4
        )

    def test_methods_on_two_boards_with_a_baseline_on_each(self, grid: pd.DataFrame) -> None:
        """Their ratios to those are compared: how boards differ is in neither."""
        merging = interventions.merging_table(grid.assign(same_board="yes"))
        boards = dict.fromkeys(merging.loc[merging["method"] == "attnbin", "configuration_id"], "GPU-1")
        rows = synthetic.measured(merging, boards)
        # A faster board: directly, attnbin would seem 4 % faster than it is.
        rows["latency_s"] *= np.where(rows["gpu_uuids"] == "GPU-1", 0.96, 1.0)
        methods = interventions.methods_table(merging, rows)
        assert set(methods["compared"]) == {"baselines"}
        assert methods["attnbin_over_3d"].to_numpy() == pytest.approx(1.05)
        own, other = (methods[f"latency_ratio_{of}"] for of in ("attnbin", "3d"))
        half = 1.05 * np.hypot(0.01 / own, 0.01 / other)
        assert methods["attnbin_over_3d_ci95"].to_numpy() == pytest.approx(half.to_numpy())

    def test_the_projects_findings_as_numbers(self, grid: pd.DataFrame) -> None:
        found = numbers(grid)
        assert found["merging.methods.pairs"].value == 12
        assert found["merging.methods.attnbin_slower_beyond"].value == 12
        assert found["merging.methods.attnbin_slower"].value == 12
        assert found["merging.methods.attnbin_excess_median"].value == pytest.approx(5)
        assert found["merging.cogvideox-2b.rows"].value == found["merging.cogvideox-2b.rise"].value == 24
        assert found["merging.cogvideox-2b.ratio_pairs"].value == 12
        assert found["merging.cogvideox-2b.ratio_pairs_rise"].value == 12
        assert found["merging.cogvideox-2b.throughput_max"].value == pytest.approx(1 / 0.8)

    def test_findings_that_do_not_hold_are_seen(self, grid: pd.DataFrame) -> None:
        turned = grid.assign(measured_latency_ratio=1.5 - grid["measured_latency_ratio"])
        found = numbers(turned)
        assert found["merging.methods.attnbin_slower"].value == 0
        assert found["merging.cogvideox-2b.ratio_pairs_rise"].value == 0

    def test_the_figure(self, grid: pd.DataFrame, tmp_path: Path) -> None:
        wan = synthetic.merging_row(model="wan2.1-t2v-1.3b", mode="kv", match_every=5)
        merging = interventions.merging_table(pd.DataFrame([*grid.to_dict("records"), wan]))
        figure = interventions_figure.figure_merging(merging)
        assert_legible(figure)
        shown = [axes for axes in figure.axes if axes.get_visible()]
        assert len(shown) == 6  # two choices of blocks and Wan, energy and throughput of each
        points = [
            y for axes in shown for line in axes.lines for y in line.get_ydata() if line.get_marker() in "os^"
        ]
        for value in (0.8 * 1.05, 1 / (0.88 * 1.05)):
            assert np.isclose(points, value).any()
        first, again = (style.save(interventions_figure.figure_merging(merging), tmp_path / n) for n in "ab")
        assert [p.read_bytes() for p in first] == [p.read_bytes() for p in again]

    def test_many_panels_go_below_one_another(self, grid: pd.DataFrame) -> None:
        merging = interventions.merging_table(grid)
        several = pd.concat([merging, merging.assign(model="a"), merging.assign(model="b")])
        assert_legible(interventions_figure.figure_merging(several))


def test_the_notebook_builds_its_figures_tables_and_numbers(root: Path, tmp_path: Path) -> None:
    (root / "Snakefile").touch()
    table = rows(
        tmp_path,
        passes([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]),
        passes([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]], interventions=("fast",)),
    )
    path = root / "results" / "aggregated" / "h200" / "configurations.csv"
    path.parent.mkdir(parents=True)
    table.to_csv(path, index=False)
    papermill.execute_notebook(
        tiny.ROOT / "workflow" / "notebooks" / "interventions.ipynb",
        tmp_path / "executed.ipynb",
        parameters={"root": str(root)},
        kernel_name="python3",
        progress_bar=False,
        cwd=str(root),
    )
    for name in ("fig7", "fig8"):
        assert all((root / f"figures/{name}.{kind}").stat().st_size > 0 for kind in ("pdf", "png", "svg"))
    built = pd.read_csv(root / "results/tables/h200/interventions.csv")
    assert built["intervention"].tolist() == ["fast"]
    assert len(pd.read_csv(root / "results/tables/h200/interventions_budget.csv")) == 8
    found = json.loads((root / "results/numbers/h200/interventions.json").read_text())
    ratio = found["interventions.wan2.1-t2v-1.3b.480x832.fast.gpu_energy_ratio"]["value"]
    assert ratio == pytest.approx(built["measured_energy_ratio"][0], rel=1e-6)


# --- figure 7 and numbers -----------------------------------------------------------------------------------


def numbers(table: pd.DataFrame) -> dict[str, Number]:
    merging = interventions.merging_table(table)
    methods = interventions.methods_table(merging, synthetic.measured(merging))
    return interventions_numbers.interventions_numbers(table, merging, methods, "t")


class TestFigure7:
    def test_of_one_row_the_margin_still_says_which_machine(self, tmp_path: Path) -> None:
        figure = interventions_figure.figure_interventions(synthetic.changes()[:1])
        assert_legible(figure)
        style.save(figure, tmp_path / "fig7", "NVIDIA RTX PRO 6000 Blackwell, 12 boards")
        (margin,) = figure.texts
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        drawn, page = margin.get_window_extent(canvas.get_renderer()), figure.bbox
        assert page.y0 < drawn.y0 < drawn.y1 < page.y1

    def test_it_is_legible_with_as_many_rows_as_a_campaign_has(self) -> None:
        table = synthetic.changes()
        figure = interventions_figure.figure_interventions(table)
        assert len(table) >= 40
        assert_legible(figure)
        assert [axes.get_xlabel() for axes in figure.axes] == list(interventions_figure.PANELS.values())

    def test_it_shows_what_the_table_says(self) -> None:
        table = synthetic.changes()
        figure = interventions_figure.figure_interventions(table)
        for axes, name in zip(figure.axes, ("energy", "latency"), strict=True):
            dots = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
            bars = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "|"]
            assert sorted(dots) == pytest.approx(sorted(table[f"measured_{name}_ratio"]))
            assert sorted(bars) == pytest.approx(sorted(table[f"predicted_{name}_ratio"]))
        labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert len(labels) == len(table)
        assert "compile + magcache-0.12-k2\n+ vae-bfloat16 + fp8-rowwise" in labels

    def test_without_a_counter_there_is_one_panel(self) -> None:
        table = synthetic.changes().assign(measured_energy_ratio=np.nan)
        figure = interventions_figure.figure_interventions(table)
        assert [axes.get_xlabel() for axes in figure.axes] == ["Latency, with / without"]
        assert_legible(figure)

    def test_without_rows_it_says_so(self) -> None:
        for figure in (
            interventions_figure.figure_interventions(synthetic.changes()[:0]),
            interventions_figure.figure_merging(pd.DataFrame(columns=list(interventions.MERGING_COLUMNS))),
        ):
            assert "was measured" in figure.texts[0].get_text()
            assert_legible(figure)


class TestNumbers:
    def test_errors_and_counts(self) -> None:
        table = synthetic.changes()
        found = numbers(table)
        assert found["interventions.rows"].value == 48
        assert found["interventions.models"].value == 2
        assert found["interventions.registered"].value == 48
        size = table["energy_error_percent"].abs()
        assert found["interventions.gpu_energy_error_median"].value == pytest.approx(size.median())
        assert found["interventions.gpu_energy_error_worst"].value == pytest.approx(size.max())
        assert found["interventions.gpu_energy_coverage"].value == 100

    def test_the_best_stack_against_both_baselines(self) -> None:
        found = numbers(synthetic.changes())
        ratio = 0.95 - 0.04 * 15
        assert (
            found["interventions.best.name"].value
            == "compile + magcache-0.12-k2 + vae-bfloat16 + fp8-rowwise"
        )
        assert found["interventions.best.gpu_energy_factor"].value == pytest.approx(1 / ratio)
        assert found["interventions.best.gpu_energy_factor_flash"].value == pytest.approx(1.4 / ratio)
        assert found["interventions.best.quality"].value == "PSNR 23 dB"

    @pytest.mark.parametrize(
        "change",
        [
            {"uncited_parts": 1},
            {"num_inference_steps": 25},
            {"settings": json.dumps({"compile": {"kind": "cfg-truncation"}})},
        ],
    )
    def test_the_best_keeps_steps_guidance_and_cited_quality(self, change: dict[str, Any]) -> None:
        table = synthetic.changes()
        best = table["intervention"].str.startswith("compile+")
        for column, value in change.items():
            table.loc[best, column] = value
        assert numbers(table)["interventions.best.name"].value == "intervention-13"

    def test_what_compiling_costs(self) -> None:
        table = synthetic.changes()
        table.loc[table["intervention"] == "intervention-0", "settings"] = json.dumps(
            {"intervention-0": {"kind": "compile"}}
        )
        found = numbers(table)
        assert found["interventions.compile.wan2.1-t2v-14b.720x1280.energy"].value == 5
        assert found["interventions.compile.wan2.1-t2v-14b.720x1280.break_even"].value == pytest.approx(0.4)

    def test_lossless_ones_by_how_far_they_are_off(self) -> None:
        table = synthetic.changes().assign(lossless="yes", relative_l2=0.0)
        table.loc[3, "relative_l2"] = 1e-6
        found = numbers(table)
        assert found["interventions.lossless.identical"].value == 47
        assert found["interventions.lossless.relative_l2_most"].value == 1e-6

    def test_nothing_measured_gives_no_numbers(self) -> None:
        assert numbers(synthetic.changes()[:0]) == {}


def test_what_is_said_of_several_gpus_is_what_the_sealed_records_give(tmp_path: Path) -> None:
    """docs/interventions.md and README.md: time and energy of a video on two GPUs over those on one."""
    csv = tmp_path / "configurations.csv"
    sealed = {"context-parallel": verify(tiny.ROOT / "results/raw/two-gpus/context-parallel")}
    aggregate(sealed, tmp_path / "m.parquet", csv, tiny.ROOT)
    table = interventions.interventions_table(tiny.ROOT, "two-gpus", pd.read_csv(csv))
    (row,) = (row for _, row in table.iterrows())
    assert (row["intervention"], row["height"], row["passes"]) == ("context-parallel-2", 480, 1)
    assert (row["relative_l2"], row["predicted"], row["same_board"]) == (0, "computed", "yes")
    assert (row["fidelity_steps"], row["flags"]) == (6, "flag:step_sem")
    assert all(
        row[f"measured_{of}_ratio"] > row[f"predicted_{of}_ratio_high"] for of in ("latency", "energy")
    )
    read = [
        " ".join((tiny.ROOT / name).read_text("utf-8").split())
        for name in ("docs/interventions.md", "README.md")
    ]
    latency, energy = (
        (row[f"measured_{of}_ratio"], row[f"measured_{of}_ratio_ci95"]) for of in ("latency", "energy")
    )
    measured = "took {:.3f} of its time on one (95 % ± {:.3f}) and {:.3f} of its energy (± {:.3f})"
    assert measured.format(*latency, *energy) in read[0]
    predicted = [row[f"predicted_{of}_ratio"] for of in ("latency", "energy")]
    assert "is {:.3f} and {:.3f}".format(*predicted) in read[0]
    assert f"take {latency[0]:.2f} of it for one video, and {energy[0]:.2f} of the energy" in read[1]
