"""Experiment ``cross-model``: tables 2 and 4, comparisons, memory, claims and signs, figures, numbers."""

from __future__ import annotations

import json
import shutil
from math import nan
from pathlib import Path

import pandas as pd
import papermill
import pytest
import records
import synthetic_campaign as synthetic
import synthetic_models as planted
from figure_checks import assert_legible
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import FancyBboxPatch
from t2v_energy.aggregation import aggregate
from t2v_energy.analysis import (
    instruments,
    models,
    models_checks,
    models_figure,
    models_numbers,
    pipeline_figure,
    style,
)
from t2v_energy.analysis.instruments import Record
from t2v_energy.analysis.tables import write_csvs
from t2v_energy.config import load_model
from t2v_energy.dag import CROSS_MODEL
from t2v_energy.errors import UserError
from t2v_energy.measurement.record import to_json
from t2v_energy.work import true_work

CSV = synthetic.CONFIGURATIONS
WAN, LTX, LIGHT = "wan2.1-t2v-1.3b", "ltx-video-0.9.7-dev", planted.LIGHT
FACTOR = planted.FACTOR


def read(base: Path) -> models.Models:
    return models.read_models(base, "h200", CSV)


def raw(base: Path) -> list[Record]:
    return instruments.read_records("results/raw/h200", base, [models.EXPERIMENT])[models.EXPERIMENT]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted.root(tmp_path_factory.mktemp("models") / "root")


@pytest.fixture(scope="module")
def measured(base: Path) -> models.Models:
    return read(base)


@pytest.fixture(scope="module")
def table4(measured: models.Models) -> pd.DataFrame:
    return models.table4(measured).set_index("model")


@pytest.fixture(scope="module")
def signs(measured: models.Models, base: Path) -> pd.DataFrame:
    return models_checks.signs_table(measured, raw(base)).set_index(["model", "check"])


def test_the_workflow_and_the_analysis_call_the_experiment_alike() -> None:
    assert CROSS_MODEL == models.EXPERIMENT


class TestRead:
    def test_one_row_stands_for_each_model(self, measured: models.Models) -> None:
        assert set(measured.rows) == set(planted.STUDY.models) - {planted.FAILED}
        assert dict(measured.failed) == {planted.FAILED: "out_of_memory"}
        assert measured.keys == list(planted.STUDY.models)

    def test_a_row_with_an_interval_comes_before_one_without(self, measured: models.Models) -> None:
        assert measured.rows[WAN]["protocol"] == "sampled"
        assert measured.rows[WAN]["latency_s"] == pytest.approx(410 * FACTOR)

    def test_of_two_with_an_interval_the_whole_generations_count(self, tmp_path: Path) -> None:
        rows = [planted.row(WAN), planted.row(WAN, protocol="full", n=2, times=1.5)]
        found = read(planted.root(tmp_path / "root", pd.DataFrame(rows)))
        assert found.rows[WAN]["protocol"] == "full"

    def test_another_prompts_row_does_not_count(self, measured: models.Models) -> None:
        assert measured.rows["cogvideox-2b"]["latency_s"] == pytest.approx(50.6 * FACTOR)

    def test_another_experiments_default_setting_stands_in(self, tmp_path: Path) -> None:
        elsewhere = planted.row(WAN) | {"experiment": "frames"}
        forced = planted.row(WAN, times=3.0) | {"experiment": "kernels"}
        forced["configuration_id"] = f"{forced['configuration_id']}__flash"
        profile = planted.row(LTX) | {"experiment": "profiles"}
        table = pd.DataFrame([planted.row("cogvideox-2b"), elsewhere, forced, profile])
        found = read(planted.root(tmp_path / "root", table))
        assert set(found.rows) == {"cogvideox-2b", WAN}, "a profile's few steps are no cost"
        assert found.experiments == ["cross-model", "frames", "profiles"]
        rows = models.table4(found).set_index("model")
        assert rows.loc[WAN, "latency_s"] == pytest.approx(410 * FACTOR)
        assert "experiment frames" in rows.loc[WAN, "note"]
        assert "experiment" not in rows.loc["cogvideox-2b", "note"]

    def test_a_video_decoded_in_tiles_stands_in_where_whole_frames_did_not_fit(self, tmp_path: Path) -> None:
        tiled = planted.row(planted.FAILED) | {"intervention": "vae-tiling"}
        tiled["configuration_id"] = f"{tiled['configuration_id']}__vae-tiling"
        table = pd.concat([planted.rows(), pd.DataFrame([tiled])], ignore_index=True)
        found = read(planted.root(tmp_path / "root", table))
        assert found.rows[planted.FAILED]["intervention"] == "vae-tiling"
        assert not found.failed
        assert models.table4(found).set_index("model").loc[planted.FAILED, "note"].endswith("in tiles")
        plain = planted.row(planted.FAILED)
        table = pd.concat([table, pd.DataFrame([plain])], ignore_index=True)
        found = read(planted.root(tmp_path / "other", table))
        assert found.rows[planted.FAILED]["intervention"] == ""

    def test_a_campaign_without_the_experiment(self, tmp_path: Path) -> None:
        other = pd.DataFrame([synthetic.row("resolution", (256, 256))])
        with pytest.raises(UserError, match="no row of experiment 'cross-model'"):
            read(synthetic.root(tmp_path / "root", other))
        with pytest.raises(UserError, match="no such file"):
            models.read_models(tmp_path / "root", "h200", Path("nothing.csv"))


class TestTable2:
    def test_differences_from_the_printed_settings_are_named(self, measured: models.Models) -> None:
        table = models.table2(measured).set_index("model")
        assert tuple(models.table2(measured).columns) == models.TABLE2_COLUMNS
        assert table.loc[LTX, "differs"] == "num_inference_steps"
        assert table.loc[LTX, ["printed_num_inference_steps", "num_inference_steps"]].tolist() == [40, 30]
        assert table.loc["mochi-1-preview", "differs"] == "num_frames"
        assert (table["differs"] != "").sum() == 2

    def test_a_model_that_the_study_has_not_has_no_printed_cells(self, tmp_path: Path) -> None:
        own = planted.row(WAN) | {"model": "tiny-wan", "configuration_id": "tiny-wan_720x1280_81f_50s"}
        found = read(planted.root(tmp_path / "root", pd.DataFrame([own])))
        row = models.table2(found).iloc[-1]
        assert row["model"] == "tiny-wan"
        assert pd.isna(row["printed_height"])
        assert row["differs"] == ""
        assert "(ours)" in models.table2_latex(models.table2(found))
        costs = models.table4(found).set_index("model").loc["tiny-wan"]
        assert costs["latency_s"] == pytest.approx(410 * FACTOR)
        assert pd.isna(costs["latency_ratio"])

    def test_latex_shows_both_where_they_differ(self, measured: models.Models) -> None:
        text = models.table2_latex(models.table2(measured))
        assert "40 (ours: 30)" in text
        assert text.count("ours:") == 2
        assert not set(text) & set("×±–")


class TestTable4:
    def test_ours_stands_beside_the_printed_value(self, table4: pd.DataFrame) -> None:
        row = table4.loc[WAN]
        assert (row["printed_latency_s"], row["printed_latency_s_std"]) == (410, 0.5)
        assert row["latency_s"] == pytest.approx(410 * FACTOR)
        assert row["latency_s_std"] == pytest.approx(row["latency_s"] / 200)
        assert row["latency_ratio"] == pytest.approx(FACTOR)
        assert row["latency_ratio_ci95"] == pytest.approx(FACTOR / 100)
        assert row["gpu_energy_ratio"] == row["ram_energy_ratio"] == pytest.approx(FACTOR)
        kinds = [row[f"{part}_energy_Wh_kind"] for part in ("gpu", "cpu", "ram")]
        assert kinds == ["measured", "modelled", "constant"]
        assert row["total_energy_kind"] == "measured+modelled+constant"
        assert row["total_energy_Wh"] == pytest.approx(FACTOR * 90.5)

    def test_only_the_part_that_was_timed_is_compared(self, table4: pd.DataFrame) -> None:
        """The printed latency of LTX-Video is of its first stage; its energies are of all three."""
        timed = sum(planted.LTX_SHARES[stage] for stage in ("text_encoder", "denoiser", "scheduler"))
        assert table4.loc[LTX, "latency_s"] == pytest.approx(9.7 * FACTOR)
        assert table4.loc[LTX, "compared_latency_s"] == pytest.approx(9.7 * FACTOR * timed)
        assert table4.loc[LTX, "latency_ratio"] == pytest.approx(FACTOR * timed)
        assert table4.loc[LTX, "gpu_energy_ratio"] == pytest.approx(FACTOR)

    def test_mfu_is_true_work_over_latency_and_peak(self, table4: pd.DataFrame) -> None:
        flop = true_work(planted.model(WAN), 720, 1280, 81, 50).total_flop
        assert table4.loc[WAN, "printed_mfu"] == pytest.approx(flop / 410 / 989e12)
        assert table4.loc[WAN, "mfu"] == 0.3, "stage 3 knows the prompt's own length"

    def test_a_model_without_a_count_of_operations_has_no_mfu(
        self, measured: models.Models, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> None:
            raise UserError("there is no count")

        monkeypatch.setattr(models, "true_work", refuse)
        table = models.table4(measured).set_index("model")
        assert table["printed_mfu"].isna().all()
        assert pd.isna(table.loc[LIGHT, "mfu"])
        assert table["latency_ratio"].notna().sum() == 6

    def test_cost_per_second_and_per_megapixel_frame(self, table4: pd.DataFrame) -> None:
        energy = 0.115 * FACTOR
        row = table4.loc[LIGHT]
        assert row["gpu_Wh_per_video_second"] == pytest.approx(energy / 1.6)
        assert row["gpu_Wh_per_megapixel_frame"] == pytest.approx(energy / (16 * 512**2 / 1e6))
        assert row["printed_gpu_Wh_per_video_second"] == pytest.approx(0.115 / 1.6)

    def test_dearest_over_cheapest(self, table4: pd.DataFrame) -> None:
        assert table4.loc["wan2.1-t2v-14b", "printed_times_cheapest"] == pytest.approx(415.1 / 0.139)
        own = planted.total_Wh("wan2.1-t2v-14b") / planted.total_Wh(LIGHT)
        assert table4.loc["wan2.1-t2v-14b", "times_cheapest"] == pytest.approx(own)
        assert table4.loc[LIGHT, "times_cheapest"] == 1

    def test_a_model_that_failed_keeps_its_printed_cells(self, table4: pd.DataFrame) -> None:
        row = table4.loc[planted.FAILED]
        assert row["status"] == "out_of_memory"
        assert row["printed_latency_s"] == 263
        assert pd.isna(row["latency_s"])
        assert pd.isna(row["latency_ratio"])

    def test_without_a_counter_there_are_no_energies(self, tmp_path: Path) -> None:
        table = planted.rows()
        table.loc[:, [c for c in table.columns if "energy" in c]] = nan
        found = read(planted.root(tmp_path / "root", table))
        row = models.table4(found).set_index("model").loc[WAN]
        assert row["latency_ratio"] == pytest.approx(FACTOR)
        assert pd.isna(row["total_energy_Wh"])
        assert row["total_energy_kind"] == ""
        assert models.broader_table(found)["holds_here"].eq("").all()
        assert_legible(models_figure.figure_costs(found))
        by_stage = models_figure.figure_stages_of_models(found)
        assert "time" in by_stage.axes[0].get_xlabel()

    def test_latex_has_mean_and_spread(self, measured: models.Models) -> None:
        text = models.table4_latex(models.table4(measured))
        assert r"1875 $\pm$ 2.1" in text
        assert "e-" not in text
        assert "--" in next(line for line in text.splitlines() if line.startswith("Mochi"))


class TestBroader:
    def test_which_sentences_follow_from_the_printed_energies(self, measured: models.Models) -> None:
        table = models.broader_table(measured).set_index("comparison")
        assert table["recomputed_times"].to_dict() == pytest.approx(
            {"image": 90.5 / 2.9, "text": 90.5 / 0.047, "classification": 45250, "models": 415.1 / 0.139}
        )
        assert set(table["follows"]) == {"yes"}

    def test_ours_are_held_against_the_same_sentences(self, measured: models.Models) -> None:
        table = models.broader_table(measured).set_index("comparison")
        assert table.loc["image", "times"] == pytest.approx(FACTOR * 90.5 / 2.9)
        assert table.loc["image", "gpu_only_times"] == pytest.approx(FACTOR * 78.8 / 2.9)
        assert table.loc["image", "holds_here"] == "no"
        own = planted.total_Wh("wan2.1-t2v-14b") / planted.total_Wh(LIGHT)
        assert table.loc["models", "times"] == pytest.approx(own)
        assert table.loc["image", "of_energy_kind"] == "measured+modelled+constant"

    def test_a_sentence_that_does_not_follow_is_told(self, measured: models.Models) -> None:
        wrong = measured.study.comparisons["image"].model_copy(update={"times": 40.0})
        study = measured.study.model_copy(update={"comparisons": {"image": wrong}})
        changed = models.Models(**{**vars(measured), "study": study})
        row = models.broader_table(changed).iloc[0]
        assert row["follows"] == "no"
        assert row["difference_percent"] == pytest.approx(100 * (90.5 / 2.9 / 40 - 1))

    @pytest.mark.parametrize(
        ("value", "significant", "expected"),
        [(1925.5, 1, 2000), (45250, 2, 45000), (31.2, 1, 30), (0.0347, 2, 0.035), (2986, 1, 3000)],
    )
    def test_significant_digits(self, value: float, significant: int, expected: float) -> None:
        assert models.rounded(value, significant) == expected


class TestMemory:
    def test_peaks_and_what_they_fit(self, measured: models.Models, base: Path) -> None:
        table = models_checks.memory_table(measured, raw(base))
        assert tuple(table.columns) == models_checks.MEMORY_COLUMNS
        own = table[table["model"] == WAN].set_index("stage")
        assert list(own.index) == [*planted.MEMORY_GIB, models_checks.WHOLE]
        assert own["allocated_GiB"].to_dict() == pytest.approx(planted.MEMORY_GIB | {"whole": 30})
        whole = own.loc[models_checks.WHOLE]
        assert whole["reserved_GiB"] == pytest.approx(37.5)
        # 24 and 32 GiB are too little; the A100 and the H100 have 80, and the A100 takes less power
        assert whole["smallest_accelerator"] == "a100-sxm"
        assert whole["smallest_accelerator_GiB"] == 80
        assert whole["accelerators"].split(";")[:2] == ["a100-sxm", "h100-sxm"]
        assert "cpu" not in whole["accelerators"]
        assert planted.FAILED not in set(table["model"])

    def test_of_equal_memory_the_least_power_is_the_smallest(self, measured: models.Models) -> None:
        assert models_checks._fitting(measured.accelerators, 20.0)["smallest_accelerator"] == "l4"
        assert models_checks._fitting(measured.accelerators, 24.0)["smallest_accelerator"] == "l4"
        assert models_checks._fitting(measured.accelerators, 24.1)["smallest_accelerator"] == "tpu-v6e"
        assert models_checks._fitting(measured.accelerators, 999.0)["smallest_accelerator"] == "none"

    def test_weights_are_parameters_in_their_types(self, measured: models.Models) -> None:
        table = models_checks.components_table(measured)
        own = table[table["model"] == WAN].set_index("component")
        assert own.loc["transformer", "parameters"] == 1_418_996_800
        assert own.loc["vae", "weights_GiB"] == pytest.approx(126_892_531 * 4 / 2**30)
        assert own.loc["text_encoder", "dtype"] == "bfloat16"
        assert models_checks.weights_GiB(measured.files[WAN]) == pytest.approx(own["weights_GiB"].sum())
        assert "scheduler" not in own.index

    def test_an_architecture_that_is_not_counted_has_empty_cells(
        self, measured: models.Models, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> None:
            raise UserError("there is no count")

        monkeypatch.setattr(models_checks, "parameter_counts", refuse)
        table = models_checks.components_table(measured)
        assert table["parameters"].isna().all()
        assert table["class"].notna().all()


class TestSigns:
    def test_every_model_has_every_check(self, signs: pd.DataFrame, measured: models.Models) -> None:
        checks = signs.index.get_level_values("check").unique()
        assert len(signs) == len(checks) * len(measured.rows)
        for name in ("limit", "reason", "verdict", "kind", "measure", "asked"):
            assert signs[name].notna().all(), name

    def test_shares_of_energy(self, signs: pd.DataFrame) -> None:
        claim, sign = signs.loc[(WAN, "gpu_energy_share")], signs.loc[(WAN, "host_energy_share")]
        assert claim["value"] == pytest.approx(100 * 78.8 / 90.5)
        assert (claim["verdict"], claim["type"], claim["limit"]) == ("holds", "claim", 80)
        assert sign["value"] == pytest.approx(100 - claim["value"])
        assert (sign["verdict"], sign["kind"]) == ("absent", "measured+modelled+constant")
        assert signs.loc[(LIGHT, "gpu_energy_share"), "verdict"] == "fails"
        assert signs.loc[(LIGHT, "host_energy_share"), "verdict"] == "present"

    def test_share_of_the_denoiser_in_the_time_of_networks(self, signs: pd.DataFrame) -> None:
        assert signs.loc[(WAN, "denoiser_time_share"), "value"] == pytest.approx(100 * 0.7 / 0.87)
        # LTX-Video's refinement is the denoiser's network, and its upsampler is another
        assert signs.loc[(LTX, "denoiser_time_share"), "value"] == pytest.approx(100 * 0.7 / 0.92)
        assert "of the latency 70.0 %" in signs.loc[(LTX, "denoiser_time_share"), "reason"]

    def test_a_denoiser_that_takes_less_fails_the_claim(self, tmp_path: Path) -> None:
        row = planted.row(WAN) | {"denoiser_time_share": 0.3, "vae_decode_time_share": 0.55}
        base = planted.root(tmp_path / "root", pd.DataFrame([row]))
        table = models_checks.signs_table(read(base), raw(base)).set_index("check")
        assert table.loc["denoiser_time_share", "value"] == pytest.approx(100 * 0.3 / 0.87)
        assert table.loc["denoiser_time_share", "verdict"] == "fails"

    def test_utilisation_by_three_measures(self, signs: pd.DataFrame) -> None:
        own = signs.loc[WAN]
        assert own.loc["utilisation_time", "value"] == pytest.approx(87)
        power = 100 * (planted.POWER_W - planted.IDLE_W) / (700 - planted.IDLE_W)
        assert own.loc["utilisation_power", "value"] == pytest.approx(power)
        assert own.loc["utilisation_power", "verdict"] == "absent"
        assert own.loc["utilisation_arithmetic", "value"] == pytest.approx(30)
        assert own.loc["utilisation_arithmetic", "verdict"] == "present"
        assert own.loc["utilisation_arithmetic", "kind"] == "modelled"

    def test_step_rates_are_compared_between_models(self, signs: pd.DataFrame) -> None:
        def rate(key: str) -> float:
            d = planted.model(key).defaults
            work = true_work(planted.model(key), d.height, d.width, d.num_frames, d.num_inference_steps)
            seconds = planted.STUDY.models[key].latency_s[0] * FACTOR * 0.7
            return work.flop_by_stage["denoiser"] / seconds

        slow, fast = sorted(("wan2.1-t2v-14b", WAN), key=rate)
        assert signs.loc[(slow, "step_rate"), "value"] <= 100 * rate(slow) / rate(fast) + 1e-9
        assert signs.loc[slow].loc["step_rate", "value"] / signs.loc[fast].loc[
            "step_rate", "value"
        ] == pytest.approx(rate(slow) / rate(fast))

    @pytest.mark.parametrize(("power", "verdict"), [(1.0, "absent"), (1.1, "absent"), (1.4, "present")])
    def test_exponent_of_step_time_over_work(self, tmp_path: Path, power: float, verdict: str) -> None:
        """Sizes of another experiment of the campaign, with a planted step time ∝ work^p."""
        model = planted.model(WAN)
        rows = [planted.row(WAN)]
        for size in synthetic.SIZES:
            row = synthetic.row("resolution", size)
            flop = true_work(model, *size, 81, 50).flop_by_stage["denoiser"] / 50
            rows.append(row | {"step_time_s": 1e-3 * (flop / 1e14) ** power})
        flop = true_work(model, 720, 1280, 81, 50).flop_by_stage["denoiser"] / 50
        rows[0] |= {"step_time_s": 1e-3 * (flop / 1e14) ** power}
        base = planted.root(tmp_path / "root", pd.DataFrame(rows))
        found = models_checks.signs_table(read(base), raw(base)).set_index("check").loc["step_time_exponent"]
        assert found["value"] == pytest.approx(power)
        assert found["verdict"] == verdict

    def test_one_size_has_no_exponent(self, signs: pd.DataFrame) -> None:
        found = signs.loc[(WAN, "step_time_exponent")]
        assert pd.isna(found["value"])
        assert found["verdict"] == "unknown"

    @pytest.mark.parametrize(
        ("reasons", "percent", "verdict"), [(0x4, 0, "absent"), (0x44, 100, "present"), (0x8, 100, "present")]
    )
    def test_throttling_is_read_from_the_samples(
        self, measured: models.Models, reasons: int, percent: float, verdict: str
    ) -> None:
        records = [json.loads(to_json(planted.record(WAN, reasons=reasons)))]
        table = models_checks.signs_table(measured, records)
        found = table[table["model"] == WAN].set_index("check").loc["throttling"]
        assert found["value"] == percent
        assert found["verdict"] == verdict

    def test_without_a_gpu_what_records_would_say_is_unknown(self, measured: models.Models) -> None:
        records = [json.loads(to_json(planted.record(WAN, gpu=None)))]
        table = models_checks.signs_table(measured, records)
        own = table[table["model"] == WAN].set_index("check")
        assert own.loc["throttling", "verdict"] == own.loc["utilisation_power", "verdict"] == "unknown"


class TestFigures:
    def test_costs_are_those_of_the_table(self, measured: models.Models, table4: pd.DataFrame) -> None:
        figure = models_figure.figure_costs(measured)
        assert_legible(figure)
        energy, latency, shares = figure.axes
        for axes, quantity in ((energy, "gpu_energy_Wh"), (latency, "latency_s")):
            assert axes.get_xscale() == "log"
            drawn = {float(container.lines[0].get_xdata()[0]) for container in axes.containers}
            expected = set(table4[quantity].dropna()) | set(table4[f"printed_{quantity}"])
            assert sorted(drawn) == pytest.approx(sorted(expected))
        widths = sorted(bar.get_width() for bar in shares.patches)
        assert max(widths) == pytest.approx(
            max(table4["gpu_share_percent"].max(), table4["printed_gpu_share_percent"].max())
        )
        hatches = {bar.get_hatch() or "" for bar in shares.patches}
        assert hatches == set(models_figure.KIND_HATCHES.values())

    def test_stages_add_up_and_have_the_planted_shares(self, measured: models.Models) -> None:
        figure = models_figure.figure_stages_of_models(measured)
        assert_legible(figure)
        (axes,) = figure.axes
        assert sum(bar.get_width() for bar in axes.patches) == pytest.approx(100 * len(measured.rows))
        shares = models_figure.stages_of(measured, LTX, "energy")
        assert shares["refine"] == pytest.approx(0.3)
        assert shares["rest"] == pytest.approx(0.08)

    @pytest.mark.parametrize("key", [*planted.STUDY.models, "contentv-8b", "tiny-wan"])
    def test_the_pipeline_of_every_model_file_fits_its_boxes(self, measured: models.Models, key: str) -> None:
        files = {**measured.files, key: planted.model(key)}
        changed = models.Models(**{**vars(measured), "files": files})
        figure = pipeline_figure.figure_pipeline(changed, key)
        assert_legible(figure)
        renderer = FigureCanvasAgg(figure).get_renderer()
        (axes,) = figure.axes
        boxes = [patch for patch in axes.patches if isinstance(patch, FancyBboxPatch)]
        stages = [
            stage for stage in planted.model(key).spans if f"box {stage}" in {b.get_gid() for b in boxes}
        ]
        assert stages == models.networks(planted.model(key))
        extents = [box.get_window_extent(renderer) for box in boxes]
        # Lines are centred, so where too many leave a box above and below, its heading is outside.
        labels = {part.label.split()[0] for part in pipeline_figure.parts(planted.model(key), None)}
        headings = [t.get_window_extent(renderer) for t in axes.texts if t.get_text().split()[0] in labels]
        assert len(headings) >= len(boxes)
        assert all(any(b.y0 <= t.y0 < t.y1 <= b.y1 for b in extents) for t in headings)
        for text in axes.texts:
            extent = text.get_window_extent(renderer)
            middle = ((extent.x0 + extent.x1) / 2, (extent.y0 + extent.y1) / 2)
            for box in extents:
                if box.contains(*middle):
                    assert box.x0 <= extent.x0 < extent.x1 <= box.x1, text.get_text()
                    assert box.y0 <= extent.y0 < extent.y1 <= box.y1, text.get_text()

    def test_the_pipeline_says_what_the_model_file_says(self, measured: models.Models) -> None:
        encoder, denoiser, decoder = pipeline_figure.parts(measured.files[WAN], measured.rows[WAN])
        assert encoder.lines == ("UMT5EncoderModel", "5.68 billion", "bfloat16")
        assert denoiser.lines == ("WanTransformer3DModel", "1.42 billion", "bfloat16")
        assert decoder.lines == ("AutoencoderKLWan", "127 million", "float32")
        assert [p.share for p in (encoder, denoiser, decoder)] == pytest.approx([0.02, 0.7, 0.15])
        stages = [p.stage for p in pipeline_figure.parts(measured.files[LTX], measured.rows[LTX])]
        assert stages == ["text_encoder", "denoiser", "upsample", "refine", "vae_decode"]
        motion = pipeline_figure.parts(measured.files[LIGHT], None)[1]
        assert any("MotionAdapter" in line for line in motion.lines)
        assert motion.share is None

    def test_parts_of_a_stage_are_named_and_those_of_a_class_together(self) -> None:
        contentv = load_model(Path(__file__).parents[2], "contentv-8b")
        encoders, denoiser, _ = pipeline_figure.parts(contentv, None)
        clip = ("2 × CLIPTextModelWithProjection", "818 million", "bfloat16")
        assert encoders.lines == (*clip, "+ T5EncoderModel", "4.76 billion")
        assert denoiser.lines == ("ContentVTransformer3DModel", "8.06 billion", "bfloat16")

    def test_what_is_pictured(self, measured: models.Models) -> None:
        assert pipeline_figure.pictured(measured) == WAN
        others = models.Models(**{**vars(measured), "rows": {LTX: measured.rows[LTX]}})
        assert pipeline_figure.pictured(others) == LTX
        assert pipeline_figure.pictured(models.Models(**{**vars(measured), "rows": {}})) == WAN

    def test_figures_are_the_same_bytes_each_time(self, measured: models.Models, tmp_path: Path) -> None:
        for name, draw in (
            ("costs", models_figure.figure_costs),
            ("pipeline", lambda found: pipeline_figure.figure_pipeline(found, WAN)),
        ):
            first = style.save(draw(measured), tmp_path / f"{name}_a")
            again = style.save(draw(measured), tmp_path / f"{name}_b")
            assert [p.read_bytes() for p in first] == [p.read_bytes() for p in again]


@pytest.mark.parametrize(
    ("text", "width_cm", "lines"),
    [
        ("WanTransformer3DModel", 3.6, ["WanTransformer3DModel"]),
        ("LTXVideoTransformer3DModel", 2.0, ["LTXVideo", "Transformer3D", "Model"]),
        ("AutoencoderKLLTXVideo", 2.0, ["Autoencoder", "KLLTXVideo"]),
        ("size not counted", 1.0, ["size", "not", "counted"]),
    ],
)
def test_names_break_before_words(text: str, width_cm: float, lines: list[str]) -> None:
    assert pipeline_figure.wrapped(text, width_cm) == lines


@pytest.fixture(scope="module")
def found(measured: models.Models, base: Path) -> dict[str, models_numbers.Number]:
    return models_numbers.models_numbers(measured, all_tables(measured, base), "t")


class TestNumbers:
    def test_every_key_begins_with_models(self, found: dict[str, models_numbers.Number]) -> None:
        assert all(key.startswith("models.") for key in found)

    def test_costs_ratios_and_ranges(self, found: dict[str, models_numbers.Number]) -> None:
        latency = found[f"models.{WAN}.latency"]
        assert latency.value == pytest.approx(410 * FACTOR)
        assert latency.interval == pytest.approx((410 * FACTOR * 0.99, 410 * FACTOR * 1.01))
        assert latency.source.file == "t/table4.csv"
        assert found[f"models.{WAN}.printed_gpu_energy"].value == 78.8
        assert found[f"models.{WAN}.printed_gpu_energy"].digits == 1
        assert found["models.printed_range"].value == pytest.approx(415.1 / 0.139)
        assert found["models.gpu_range"].value == pytest.approx(359.7 / 0.115)
        assert (found["models.gpu_range"].kind, found["models.range"].kind) == ("measured", "modelled")
        assert found["models.dearest"].value == "WAN2.1-T2V-14B"
        assert found["models.measured"].value == 6
        assert found["models.listed"].value == 7
        assert f"models.{planted.FAILED}.latency" not in found

    def test_least_and_largest_of_the_models(self, found: dict[str, models_numbers.Number]) -> None:
        assert found["models.latency_ratio_least"].source.row == LTX
        assert found["models.latency_ratio_most"].value == pytest.approx(FACTOR)
        assert found["models.gpu_energy_ratio_least"].value == pytest.approx(FACTOR)
        assert found["models.mfu_most"].kind == "modelled"

    def test_intervals_that_are_narrow_are_counted(self, measured: models.Models, base: Path) -> None:
        tables = all_tables(measured, base)
        table = tables["table4"].copy()
        table["gpu_energy_Wh_ci95"] = table["gpu_energy_Wh"] * [
            0.015 if key == LTX else 0.002 for key in table["model"]
        ]
        found = models_numbers.models_numbers(measured, tables | {"table4": table}, "t")
        assert found["models.interval_most"].value == pytest.approx(1.5)
        assert found["models.interval_most"].source.row == LTX
        assert found["models.interval_narrow"].value == 5

    def test_kinds_of_the_three_energies(self, found: dict[str, models_numbers.Number]) -> None:
        kinds = [found[f"models.{WAN}.{part}_energy"].kind for part in ("gpu", "cpu", "ram")]
        assert kinds == ["measured", "modelled", "constant"]
        assert found[f"models.{WAN}.gpu_share"].kind == "modelled"

    def test_checks_are_counted(self, found: dict[str, models_numbers.Number]) -> None:
        prefix = "models.checks.gpu_energy_share"
        assert [found[f"{prefix}.{name}"].value for name in ("good", "bad", "unknown")] == [5, 1, 0]
        assert found[f"{prefix}.least"].source.row == f"{LIGHT} gpu_energy_share"
        assert found[f"{prefix}.limit"].value == 80

    def test_comparisons_and_memory(self, found: dict[str, models_numbers.Number]) -> None:
        assert found["models.broader.follow"].value == found["models.broader.of"].value == 4
        assert found["models.broader.image.times"].kind == "modelled"
        assert found[f"models.{WAN}.reserved"].value == pytest.approx(37.5)
        assert found[f"models.{WAN}.smallest_accelerator"].value == "NVIDIA A100 SXM 80 GB"


def all_tables(measured: models.Models, base: Path) -> dict[str, pd.DataFrame]:
    """What the notebook builds."""
    return {
        "table2": models.table2(measured),
        "table4": models.table4(measured),
        "broader": models.broader_table(measured),
        "components": models_checks.components_table(measured),
        "memory": models_checks.memory_table(measured, raw(base)),
        "signs": models_checks.signs_table(measured, raw(base)),
    }


def test_the_notebook_builds_everything(tmp_path: Path) -> None:
    base = planted.root(tmp_path / "root")
    papermill.execute_notebook(
        synthetic.REPOSITORY / "workflow" / "notebooks" / "models.ipynb",
        base / "executed.ipynb",
        parameters={"root": str(base)},
        kernel_name="python3",
        progress_bar=False,
        cwd=str(base),
    )
    figures = [f"figures/{name}.{end}" for name in ("fig1", "fig5", "fig5b") for end in ("pdf", "png", "svg")]
    texts = ["results/tables/h200/table2.tex", "results/tables/h200/table4.tex"]
    for name in (*figures, *texts):
        assert (base / name).stat().st_size > 0, name
    measured = read(base)
    expected = all_tables(measured, base)
    write_csvs(expected, base / "again")
    for name in expected:
        built = (base / f"results/tables/h200/{name}.csv").read_bytes()
        assert built == (base / f"again/{name}.csv").read_bytes(), name
    found = json.loads((base / "results/numbers/h200/models.json").read_text())
    assert found[f"models.{WAN}.latency"]["value"] == pytest.approx(410 * FACTOR)


def test_from_the_records_of_two_models_to_every_notebook(tmp_path: Path) -> None:
    """Stage 3 on planted records, energies by arithmetic; the other notebooks bear the rows."""
    base = tmp_path / "root"
    shutil.copytree(synthetic.REPOSITORY / "config", base / "config")
    (base / "Snakefile").touch()
    raw_folder = base / "results" / "raw" / "h200"
    keys = (WAN, "wan2.1-t2v-14b")
    paths = {
        models.EXPERIMENT: [records.write(planted.record(k), raw_folder / models.EXPERIMENT) for k in keys],
        "resolution": [records.write(records.make_record(), raw_folder / "resolution")],
    }
    aggregate(paths, base / "m.parquet", base / CSV, base)
    found = read(base)
    assert set(found.rows) == set(keys)
    table = models.table4(found).set_index("model")
    loop_s = 50 * 0.5
    assert table.loc[WAN, "latency_s"] == pytest.approx(records.ONCE_S + loop_s)
    energy_Wh = (records.ONCE_J + loop_s * records.LOOP_W) / 3600
    assert table.loc[WAN, "gpu_energy_Wh"] == pytest.approx(energy_Wh, rel=0.01)
    assert table.loc[WAN, "gpu_energy_Wh_kind"] == "measured"
    signs = models_checks.signs_table(found, raw(base)).set_index(["model", "check"])
    networks_s = records.TEXT_S + records.VAE_S + 0.8 * loop_s  # a fifth of a step is the scheduler's
    share = 100 * networks_s / (records.ONCE_S + loop_s)
    assert signs.loc[(WAN, "utilisation_time"), "value"] == pytest.approx(share)
    for name in ("models", "breakdown", "comparison"):
        papermill.execute_notebook(
            synthetic.REPOSITORY / "workflow" / "notebooks" / f"{name}.ipynb",
            base / f"{name}.ipynb",
            parameters={"root": str(base)},
            kernel_name="python3",
            progress_bar=False,
            cwd=str(base),
        )
    costs = pd.read_csv(base / "results/tables/h200/cost.csv").set_index("set")
    assert costs.loc[models.EXPERIMENT, "records"] == 2
