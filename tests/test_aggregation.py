"""Raw records become tables: every number follows from the known power trace of tests/records.py."""

from __future__ import annotations

import time
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import processor
import pytest
from records import (
    CPU_W,
    IDLE_W,
    LOOP_W,
    ONCE_J,
    ONCE_S,
    RAM_W,
    TEXT_S,
    TEXT_W,
    VAE_S,
    VAE_W,
    Timeline,
    configuration,
    environment,
    make_record,
    out_of_memory,
    write,
)
from t2v_energy.aggregation import aggregate, merged_estimate
from t2v_energy.config import load_accelerator, load_model
from t2v_energy.errors import UserError
from t2v_energy.interventions.base import Work
from t2v_energy.interventions.vae_tiling import VaeTiling
from t2v_energy.measurement.record import (
    InterventionRecord,
    Record,
    Spans,
    Windows,
    record_paths,
    to_json,
)
from t2v_energy.work import true_work

ROOT = Path(__file__).parents[1]
SPAN_COLUMNS = (
    "campaign experiment configuration_id model height width num_frames num_inference_steps protocol "
    "pass_index attention_kernel intervention gpu_name record window generation stage step call start_s "
    "end_s duration_s "
    "gpu_energy_J gpu_energy_J_ci90 gpu_energy_kind mean_power_W"
)
LEADING_COLUMNS = (
    "experiment model height width num_frames num_inference_steps protocol attention_kernel intervention "
    "status latency_s latency_s_std latency_s_ci95 latency_s_n "
    "gpu_energy_Wh gpu_energy_Wh_std gpu_energy_Wh_ci95 gpu_energy_Wh_n gpu_energy_Wh_kind "
    "cpu_energy_Wh cpu_energy_Wh_std cpu_energy_Wh_ci95 cpu_energy_Wh_n cpu_energy_Wh_kind "
    "ram_energy_Wh ram_energy_Wh_std ram_energy_Wh_ci95 ram_energy_Wh_n ram_energy_Wh_kind "
    "denoiser_time_share postprocess_time_share scheduler_time_share text_encoder_time_share "
    "vae_decode_time_share denoiser_energy_share postprocess_energy_share scheduler_energy_share "
    "text_encoder_energy_share vae_decode_energy_share "
)
STEPS = 50
LATENCY_S = ONCE_S + STEPS * 0.5
ENERGY_J = ONCE_J + STEPS * 0.5 * LOOP_W


def tables(folder: Path, *records: Record) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Spans and configurations aggregated from ``records`` of experiment ``resolution``."""
    for record in records:
        write(record, folder / "raw")
    parquet, csv = folder / "built" / "measurements.parquet", folder / "built" / "configurations.csv"
    aggregate({"resolution": record_paths(folder / "raw")}, parquet, csv, ROOT)
    return pd.read_parquet(parquet), pd.read_csv(csv, keep_default_na=True)


def one_row(folder: Path, *records: Record) -> Any:
    """The single row of configurations.csv."""
    _, rows = tables(folder, *records)
    assert len(rows) == 1
    return rows.iloc[0]


class TestSpans:
    def test_one_row_a_span_of_measured_generations(self, tmp_path: Path) -> None:
        record = make_record(steps=4, step_s=(0.5, 0.5))
        spans, _ = tables(tmp_path, record)
        assert len(spans) == 2 * (2 + 4 * 3 + 2)
        assert " ".join(spans.columns) == SPAN_COLUMNS
        assert set(spans["generation"]) == {0, 1}
        assert set(spans["window"]) == {2, 3}
        assert set(spans["gpu_energy_kind"]) == {"measured"}
        assert set(spans["attention_kernel"]) == {"cudnn"}

    def test_energies_are_the_traces(self, tmp_path: Path) -> None:
        spans, _ = tables(tmp_path, make_record())
        expected = {"text_encoder": 300.0, "denoiser": 500.0, "scheduler": 500.0, "vae_decode": 400.0}
        for stage, power_W in expected.items():
            of_stage = spans[spans["stage"] == stage]
            np.testing.assert_allclose(of_stage["mean_power_W"], power_W, rtol=1e-3)
            np.testing.assert_allclose(of_stage["gpu_energy_J"], power_W * of_stage["duration_s"], rtol=1e-3)
        assert (spans["gpu_energy_J_ci90"] > 0).all()
        assert (spans["gpu_energy_J_ci90"] < 0.1 * spans["gpu_energy_J"]).all()

    def test_without_a_counter_there_is_time_and_no_energy(self, tmp_path: Path) -> None:
        spans, _ = tables(tmp_path, make_record(gpu=None))
        assert spans["gpu_energy_J"].isna().all()
        assert set(spans["gpu_energy_kind"]) == {""}
        assert (spans["duration_s"] > 0).all()


class TestConfigurations:
    def test_columns_stand_in_the_contracts_order(self, tmp_path: Path) -> None:
        _, rows = tables(tmp_path, make_record())
        assert " ".join(rows.columns).startswith(LEADING_COLUMNS)
        assert {"mfu", "memory_allocated_GiB", "memory_reserved_GiB", "flags"} <= set(rows.columns)

    def test_totals_are_composed_for_all_steps(self, tmp_path: Path) -> None:
        row = one_row(tmp_path, make_record(steps=4))
        assert row["latency_s"] == pytest.approx(LATENCY_S)
        assert row["gpu_energy_Wh"] == pytest.approx(ENERGY_J / 3600, rel=1e-4)
        assert row["latency_s_n"] == row["gpu_energy_Wh_n"] == 3
        assert row["latency_s_std"] == pytest.approx(0, abs=1e-6)
        assert row["step_time_s"] == pytest.approx(0.5)
        assert row["step_energy_J"] == pytest.approx(0.5 * LOOP_W, rel=1e-4)
        assert row["once_s"] == pytest.approx(ONCE_S)
        assert row["mean_power_W"] == pytest.approx(ENERGY_J / LATENCY_S, rel=1e-4)
        assert row["idle_power_W"] == pytest.approx(100, rel=1e-3)
        assert row["unspanned_percent"] == pytest.approx(0, abs=1e-6)
        assert row["gpu_energy_Wh_kind"] == "measured"

    def test_a_whole_generation_is_its_windows_energy(self, tmp_path: Path) -> None:
        whole = make_record(steps=8, config=configuration(num_inference_steps=8), protocol="full")
        row = one_row(tmp_path, whole)
        assert row["latency_s"] == pytest.approx(ONCE_S + 4.0)
        assert row["gpu_energy_Wh"] == pytest.approx((ONCE_J + 4.0 * LOOP_W) / 3600, rel=1e-4)

    def test_settled_steps_stand_for_those_that_were_not_run(self, tmp_path: Path) -> None:
        """Two steps of 1.2 s at 600 W, then settled ones of 1 s at 500 W: 48 of 50 are like the latter."""
        line = Timeline()
        line.pass_time(1.0, IDLE_W)
        line.window("warmup", 1)
        line.close()
        for _ in range(3):
            line.window("generation", 5)
            line.span("text_encoder", -1, 0, TEXT_S, TEXT_W)
            for step in range(5):
                line.span("denoiser", step, 0, *((1.2, 600.0) if step < 2 else (1.0, 500.0)))
            line.span("vae_decode", -1, 0, VAE_S, VAE_W)
            line.close()
            line.pass_time(0.1, IDLE_W)
        line.pass_time(1.0, IDLE_W)
        made = {"windows": Windows(**line.windows), "spans": Spans(**line.spans), "ticks": line.ticks()}
        row = one_row(tmp_path, make_record(**made, samples=line.samples(1.0, 0x4)))
        loop_s, loop_J = 2 * 1.2 + 48, 2 * 1.2 * 600 + 48 * 500
        once_s, once_J = TEXT_S + VAE_S, TEXT_S * TEXT_W + VAE_S * VAE_W
        assert row["latency_s"] == pytest.approx(once_s + loop_s)
        assert row["gpu_energy_Wh"] == pytest.approx((once_J + loop_J) / 3600, rel=1e-3)
        assert row["step_time_s"] == pytest.approx(loop_s / 50)
        assert row["step_energy_J"] == pytest.approx(loop_J / 50, rel=1e-3)
        assert row["denoiser_time_share"] == pytest.approx(loop_s / (once_s + loop_s))
        assert row["denoiser_energy_share"] == pytest.approx(loop_J / (once_J + loop_J), rel=1e-3)

    def test_shares_are_of_the_whole_video(self, tmp_path: Path) -> None:
        row = one_row(tmp_path, make_record(steps=4))
        times = {"denoiser": 20.0, "scheduler": 5.0, "text_encoder": TEXT_S, "vae_decode": VAE_S}
        powers = {"denoiser": LOOP_W, "scheduler": LOOP_W, "text_encoder": TEXT_W, "vae_decode": VAE_W}
        for stage, time_s in times.items():
            assert row[f"{stage}_time_share"] == pytest.approx(time_s / LATENCY_S)
            energy_J = time_s * powers[stage]
            assert row[f"{stage}_energy_share"] == pytest.approx(energy_J / ENERGY_J, rel=2e-3)
        time_shares = [row[column] for column in row.index if column.endswith("_time_share")]
        assert sum(time_shares) == pytest.approx(1)

    def test_what_no_span_covers_is_in_no_share(self, tmp_path: Path) -> None:
        row = one_row(tmp_path, make_record(steps=4, unspanned_s=0.5))
        shares = sum(row[column] for column in row.index if column.endswith("_time_share"))
        assert shares == pytest.approx(LATENCY_S / (LATENCY_S + 0.5))
        assert row["unspanned_percent"] == pytest.approx(100 * 0.5 / 3.6)
        assert row["flags"] == "invalid:unspanned"

    def test_spread_is_over_generations(self, tmp_path: Path) -> None:
        row = one_row(tmp_path, make_record(steps=4, step_s=(0.5, 1.0, 1.5)))
        latencies = ONCE_S + STEPS * np.array([0.5, 1.0, 1.5])
        half_width = 4.302653 * latencies.std(ddof=1) / 3**0.5
        assert row["latency_s"] == pytest.approx(latencies.mean())
        assert row["latency_s_std"] == pytest.approx(latencies.std(ddof=1))
        assert row["latency_s_ci95"] == pytest.approx(half_width, rel=1e-6)
        assert row["gpu_energy_Wh_std"] == pytest.approx(25 * LOOP_W / 3600, rel=1e-4)
        assert row["gpu_energy_Wh_ci95"] == pytest.approx(half_width * LOOP_W / 3600, rel=1e-3)
        assert row["flags"] == "flag:step_sem"

    def test_one_step_alone_has_no_standard_error(self, tmp_path: Path) -> None:
        row = one_row(tmp_path, make_record(steps=1, step_s=(0.5,)))
        assert row["flags"] == "flag:step_sem"
        assert np.isnan(row["step_time_sem_percent"])
        as_text = pd.read_csv(tmp_path / "built" / "configurations.csv", dtype=str, keep_default_na=False)
        assert as_text["step_time_sem_percent"].tolist() == [""]

    def test_several_generations_may_be_one_repetition(self, tmp_path: Path) -> None:
        """As with clips of half a second: means, spread and number are the repetitions'."""
        whole = configuration(num_inference_steps=4)
        record = make_record(steps=4, step_s=(0.5, 1.0, 1.0, 2.5), config=whole)
        numbered = record.windows.model_copy(update={"repetition": [-1, -1, 0, 0, 1, 1, -1]})
        row = one_row(tmp_path, record.model_copy(update={"windows": numbered}))
        means = ONCE_S + 4 * np.array([0.75, 1.75])
        assert row["latency_s_n"] == row["gpu_energy_Wh_n"] == 2
        assert row["latency_s"] == pytest.approx(means.mean())
        assert row["latency_s_std"] == pytest.approx(means.std(ddof=1))
        assert row["gpu_energy_Wh"] == pytest.approx((ONCE_J + 5 * LOOP_W) / 3600, rel=1e-4)
        assert row["gpu_energy_Wh_std"] == pytest.approx(4 * LOOP_W * 0.5**0.5 / 3600, rel=1e-3)

    def test_a_repetition_is_known_better_than_its_generations(self, tmp_path: Path) -> None:
        whole = configuration(num_inference_steps=4)
        record = make_record(steps=4, step_s=(0.5,) * 6, config=whole)
        numbered = record.windows.model_copy(update={"repetition": [-1, -1, 0, 0, 0, 1, 1, 1, -1]})
        alone = one_row(tmp_path / "alone", record)
        grouped = one_row(tmp_path / "grouped", record.model_copy(update={"windows": numbered}))
        assert grouped["gpu_energy_Wh"] == pytest.approx(alone["gpu_energy_Wh"], rel=1e-6)
        # three generations share the error of two edges
        assert 0 < grouped["gpu_energy_Wh_ci95"] < 0.5 * alone["gpu_energy_Wh_ci95"]

    def test_the_interval_holds_the_instruments_error_where_nothing_scatters(self, tmp_path: Path) -> None:
        few, many = (
            one_row(
                tmp_path / str(steps), make_record(steps=steps, config=configuration(num_inference_steps=16))
            )
            for steps in (2, 16)
        )
        # the error of the loop's edges counts S/steps times
        assert few["gpu_energy_Wh_ci95"] > 2 * many["gpu_energy_Wh_ci95"] > 0
        for row in (few, many):
            truth = (ONCE_J + 8 * LOOP_W) / 3600
            assert abs(row["gpu_energy_Wh"] - truth) <= row["gpu_energy_Wh_ci95"]

    def test_modelled_energies_are_a_mean_power_over_the_video(self, tmp_path: Path) -> None:
        row = one_row(tmp_path, make_record())
        # a record rounds CodeCarbon's watt-hours to five places
        assert row["cpu_energy_Wh"] == pytest.approx(CPU_W * LATENCY_S / 3600, rel=2e-4)
        assert row["ram_energy_Wh"] == pytest.approx(RAM_W * LATENCY_S / 3600, rel=2e-4)
        assert (row["cpu_energy_Wh_kind"], row["ram_energy_Wh_kind"]) == ("modelled", "constant")

    def test_rapl_is_measured_and_a_missing_method_is_no_number(self, tmp_path: Path) -> None:
        reading = make_record().codecarbon
        assert reading is not None
        rapl = reading.model_copy(update={"cpu_method": "intel_rapl", "ram_method": "none"})
        row = one_row(tmp_path, make_record(codecarbon=rapl))
        assert row["cpu_energy_Wh_kind"] == "measured"
        assert pd.isna(row["ram_energy_Wh"])
        assert pd.isna(row["ram_energy_Wh_kind"])
        assert row["ram_energy_Wh_n"] == 0

    def test_codecarbon_and_the_counter_stand_side_by_side(self, tmp_path: Path) -> None:
        row = one_row(tmp_path, make_record())
        # a warm-up of one step, three generations of four, and three pauses of 0.1 s
        energy_Wh = (620 + 3 * 1370 + 3 * 10) / 3600
        assert row["counter_window_energy_Wh"] == pytest.approx(energy_Wh, rel=1e-4)
        assert row["codecarbon_window_energy_Wh"] == pytest.approx(energy_Wh, abs=1e-5)
        assert row["codecarbon_duration_s"] == pytest.approx(row["counter_window_s"])

    def test_mfu_is_true_work_over_the_accelerators_peak(self, tmp_path: Path) -> None:
        row = one_row(tmp_path, make_record())
        work = true_work(load_model(ROOT, "wan2.1-t2v-1.3b"), 480, 832, 81, 50)
        assert row["mfu"] == pytest.approx(work.total_flop / LATENCY_S / 989.5e12, rel=1e-3)

    @staticmethod
    def of_interventions(*entries: InterventionRecord) -> Record:
        config = configuration(interventions=tuple(entry.name for entry in entries))
        return make_record(config=config, interventions=list(entries))

    def test_mfu_counts_what_interventions_leave(self, tmp_path: Path) -> None:
        settings = {"interval": 2, "order": 0, "first_steps": 4}
        entries = (
            InterventionRecord(name="t", kind="taylorseer", settings=settings),
            InterventionRecord(name="g", kind="cfg-truncation", settings={"fraction": 0.5}),
        )
        row = one_row(tmp_path, self.of_interventions(*entries))
        work = true_work(load_model(ROOT, "wan2.1-t2v-1.3b"), 480, 832, 81, 50)
        # computed: the first 4 steps, then every second, and the last; after step 24 of one branch alone
        run = [step for step in range(50) if step < 4 or step % 2 or step == 49]
        calls = len(run) + len([step for step in run if step < 25])
        once = work.flop["vae"] + work.flop["text_encoder"]
        left = once + (work.total_flop - once) * calls / 100
        mfu = row["mfu"] * LATENCY_S * 989.5e12
        assert mfu == pytest.approx(left, rel=1e-3), "embeddings of skipped calls are a trifle"
        assert mfu < 0.5 * work.total_flop

    def test_mfu_counts_what_tiles_add_by_their_name_alone(self, tmp_path: Path) -> None:
        """Records of the first campaigns have no settings of their interventions."""
        row = one_row(tmp_path, make_record(config=configuration(interventions=("vae-tiling",))))
        model = load_model(ROOT, "wan2.1-t2v-1.3b")
        work = true_work(model, 480, 832, 81, 50)
        tiled = VaeTiling().work_ratios(Work(model, configuration(), None))["vae"]  # type: ignore[arg-type]
        flop = work.total_flop + (tiled - 1) * work.flop["vae"]
        assert tiled > 1.1
        peak = load_accelerator(ROOT, "h200").peak_bf16_dense_TFLOPs * 1e12
        assert row["mfu"] == pytest.approx(flop / LATENCY_S / peak, rel=1e-6)

    @pytest.mark.parametrize(
        "entries",
        [
            (InterventionRecord(name="x", kind="no-such-kind"),),
            (InterventionRecord(name="x", kind="taylorseer", settings={"intervals": 2}),),
        ],
        ids=["kind", "setting"],
    )
    def test_mfu_of_unknown_interventions_is_empty(
        self, tmp_path: Path, entries: tuple[InterventionRecord, ...]
    ) -> None:
        assert pd.isna(one_row(tmp_path, self.of_interventions(*entries))["mfu"])

    def test_mfu_of_an_unknown_name_without_settings_is_empty(self, tmp_path: Path) -> None:
        row = one_row(tmp_path, make_record(config=configuration(interventions=("forgotten",))))
        assert pd.isna(row["mfu"])
        assert row["latency_s"] > 0

    def test_memory_is_the_highest_stage(self, tmp_path: Path) -> None:
        row = one_row(tmp_path, make_record())
        assert (row["memory_allocated_GiB"], row["memory_reserved_GiB"]) == (16, 20)

    def test_on_a_cpu_there_is_latency_and_no_gpu_energy(self, tmp_path: Path) -> None:
        tiny = configuration(model="tiny-wan", height=64, width=64, num_frames=9)
        row = one_row(tmp_path, make_record(gpu=None, config=tiny, campaign="smoke"))
        assert row["latency_s"] == pytest.approx(LATENCY_S)
        for column in ("gpu_energy_Wh", "mfu", "idle_power_W", "denoiser_energy_share", "mean_power_W"):
            assert pd.isna(row[column]), column
        assert pd.isna(row["gpu_energy_Wh_kind"])
        assert row["gpu_energy_Wh_n"] == 0
        assert row["cpu_energy_Wh"] > 0


class TestMerging:
    def test_passes_of_a_configuration_are_one_row(self, tmp_path: Path) -> None:
        first = make_record(step_s=(0.5, 0.5))
        flags = ["step_sem: the runner's words", "shared"]
        second = make_record(step_s=(1.0, 1.0), pass_index=2, flags=flags)
        spans, rows = tables(tmp_path, first, second)
        latencies = ONCE_S + STEPS * np.array([0.5, 0.5, 1.0, 1.0])
        (row,) = (rows.iloc[i] for i in range(len(rows)))
        assert row["latency_s_n"] == 4
        assert row["latency_s"] == pytest.approx(latencies.mean())
        assert row["latency_s_std"] == pytest.approx(0, abs=1e-6)  # nothing scatters within a pass
        assert row["latency_s_ci95"] == pytest.approx(0, abs=1e-6)
        assert row["passes"] == 2
        assert row["flags"] == "shared"
        assert set(spans["pass_index"]) == {1, 2}

    def test_passes_count_alike_however_many_generations_they_have(self, tmp_path: Path) -> None:
        first = make_record(step_s=(0.5, 0.5, 0.5, 0.5))
        second = make_record(step_s=(1.0, 1.0), pass_index=2)
        row = one_row(tmp_path, first, second)
        step_s, latency_s = 0.75, ONCE_S + STEPS * 0.75
        energy_J = ONCE_J + STEPS * step_s * LOOP_W
        assert row["latency_s_n"] == 6
        assert row["latency_s"] == pytest.approx(latency_s)
        assert row["step_time_s"] == pytest.approx(step_s)
        assert row["once_s"] + STEPS * row["step_time_s"] == pytest.approx(row["latency_s"])
        assert row["gpu_energy_Wh"] == pytest.approx(energy_J / 3600, rel=1e-4)
        assert row["step_energy_J"] == pytest.approx(step_s * LOOP_W, rel=1e-4)
        assert row["mean_power_W"] == pytest.approx(energy_J / latency_s, rel=1e-4)
        assert row["vae_decode_time_share"] == pytest.approx(VAE_S / latency_s)

    def test_the_spread_of_passes_and_their_boards_stand_beside_the_interval(self, tmp_path: Path) -> None:
        def on_board(uuid: str, pass_index: int, step_s: float) -> Record:
            there = environment()
            assert there.gpu is not None
            there = there.model_copy(update={"gpu": there.gpu.model_copy(update={"uuid": uuid})})
            return make_record(step_s=(step_s,) * 2, pass_index=pass_index, environment=there)

        row = one_row(
            tmp_path, on_board("GPU-B", 1, 0.5), on_board("GPU-A", 2, 1.0), on_board("GPU-B", 3, 1.5)
        )
        assert (row["gpus"], row["passes"]) == (2, 3)
        assert row["gpu_uuids"] == "GPU-B;GPU-A;GPU-B"
        means = ONCE_S + STEPS * np.array([0.5, 1.0, 1.5])
        assert [float(mean) for mean in row["latency_s_pass_means"].split(";")] == pytest.approx(means)
        assert row["latency_s_pass_spread_percent"] == pytest.approx(100 * STEPS * 1.0 / means[1])
        energies = ONCE_J + STEPS * LOOP_W * np.array([0.5, 1.0, 1.5])
        spread = 100 * (energies[2] - energies[0]) / energies[1]
        assert row["gpu_energy_Wh_pass_spread_percent"] == pytest.approx(spread, rel=1e-4)
        # three passes are the units of the interval: t(2) = 4.302653
        assert row["latency_s_ci95"] == pytest.approx(4.302653 * 25 / sqrt(3), rel=1e-6)

    def test_one_pass_has_no_spread(self, tmp_path: Path) -> None:
        row = one_row(tmp_path, make_record())
        assert pd.isna(row["latency_s_pass_spread_percent"])
        assert pd.isna(row["gpu_energy_Wh_pass_spread_percent"])
        assert (row["gpus"], row["gpu_uuids"]) == (1, "GPU-0")

    def test_without_a_gpu_there_is_no_board_to_name(self, tmp_path: Path) -> None:
        tiny = configuration(model="tiny-wan", height=64, width=64, num_frames=9)
        records = [make_record(gpu=None, config=tiny, campaign="smoke", pass_index=i) for i in (1, 2)]
        row = one_row(tmp_path, *records)
        assert row["gpus"] == 0
        assert pd.isna(row["gpu_uuids"])
        assert pd.isna(row["gpu_energy_Wh_pass_means"])
        assert row["latency_s_pass_spread_percent"] == pytest.approx(0, abs=1e-6)

    def test_kernels_protocols_and_sizes_are_rows_of_their_own(self, tmp_path: Path) -> None:
        _, rows = tables(
            tmp_path,
            make_record(),
            make_record(pass_index=2, attention_kernels={"denoiser": ["flash", "math"]}),
            make_record(protocol="full"),
            make_record(config=configuration(height=720, width=1280)),
        )
        assert len(rows) == 4
        assert set(rows["attention_kernel"]) == {"cudnn", "flash+math"}

    def test_mixed_kinds_say_so(self, tmp_path: Path) -> None:
        reading = make_record().codecarbon
        assert reading is not None
        rapl = reading.model_copy(update={"cpu_method": "intel_rapl"})
        row = one_row(tmp_path, make_record(), make_record(pass_index=2, codecarbon=rapl))
        assert row["cpu_energy_Wh_kind"] == "measured+modelled"

    def test_out_of_memory_is_a_row_without_numbers(self, tmp_path: Path) -> None:
        big = configuration(height=1008, width=1792, attention_kernel="math")
        spans, rows = tables(tmp_path, make_record(), out_of_memory(config=big))
        lost = rows[rows["status"] == "out_of_memory"].iloc[0]
        assert (lost["height"], lost["attention_kernel"]) == (1008, "math")
        for column in ("latency_s", "gpu_energy_Wh", "cpu_energy_Wh", "mfu", "denoiser_time_share", "once_s"):
            assert pd.isna(lost[column]), column
        assert lost["latency_s_n"] == 0
        assert set(spans["height"]) == {480}
        assert rows[rows["status"] == "ok"].iloc[0]["latency_s"] == pytest.approx(LATENCY_S)

    def test_what_ran_before_memory_ran_out_is_no_measurement(self, tmp_path: Path) -> None:
        spans, rows = tables(tmp_path, make_record(status="out_of_memory", error="CUDA out of memory"))
        assert len(spans) == 0
        numbers = rows.iloc[0].drop(
            ["height", "width", "num_frames", "num_inference_steps", "passes", "gpus"]
        )
        numbers = numbers[[not name.endswith("_n") for name in numbers.index]]
        assert pd.to_numeric(numbers, errors="coerce").isna().all()

    def test_nothing_but_out_of_memory(self, tmp_path: Path) -> None:
        spans, rows = tables(tmp_path, out_of_memory())
        assert len(spans) == 0
        assert rows["status"].tolist() == ["out_of_memory"]

    def test_a_rebuild_is_the_same_bytes(self, tmp_path: Path) -> None:
        tables(tmp_path, make_record(), make_record(pass_index=2))
        files = sorted((tmp_path / "built").iterdir())
        before = [path.read_bytes() for path in files]
        tables(tmp_path)
        assert [path.read_bytes() for path in files] == before
        assert sorted((tmp_path / "built").iterdir()) == files


class TestMergedEstimate:
    """Against values computed by hand."""

    def test_two_passes_give_the_interval_of_repetition(self) -> None:
        # means 2 and 12, variances 1 and 4, n = 3 and 3: variances of the means 1/3 and 4/3;
        # Welch: (5/3)² / ((1/9 + 16/9) / 2) = 50/17 = 2.941 degrees of freedom, t = 3.2186
        found = merged_estimate([[1.0, 2.0, 3.0], [10.0, 12.0, 14.0]])
        assert (found.mean, found.n) == (7.0, 6)
        assert found.std == pytest.approx(sqrt(2.5))
        assert found.ci95 == pytest.approx(3.2186 * sqrt(5 / 3) / 2, rel=1e-4)

    def test_unequal_passes_count_alike(self) -> None:
        assert merged_estimate([[1.0, 1.0, 1.0, 1.0], [2.0, 2.0]]).mean == 1.5

    def test_from_three_passes_on_they_are_the_units(self) -> None:
        found = merged_estimate([[1.0, 3.0], [3.0, 5.0], [5.0, 7.0]])
        assert (found.mean, found.n) == (4.0, 6)
        assert found.std == pytest.approx(sqrt(2))
        assert found.ci95 == pytest.approx(4.302653 * 2 / sqrt(3), rel=1e-6)

    def test_one_pass_is_the_plain_interval(self) -> None:
        found = merged_estimate([[1.0, 2.0, 3.0], []])
        assert found.ci95 == pytest.approx(4.302653 / sqrt(3), rel=1e-6)
        assert (found.mean, found.std, found.n) == (2.0, 1.0, 3)

    def test_the_instruments_error_is_added_in_quadrature(self) -> None:
        assert merged_estimate([[2.0, 2.0], [4.0, 4.0]], instrument_ci95=0.5).ci95 == 0.5
        assert merged_estimate([[1.0, 2.0, 3.0]], 3.0).ci95 == pytest.approx(
            sqrt(9 + 4.302653**2 / 3), rel=1e-6
        )

    def test_what_cannot_be_told_is_nan(self) -> None:
        assert merged_estimate([[], []]).n == 0
        single = merged_estimate([[1.0], [3.0]])
        assert single.mean == 2
        assert np.isnan([single.std, single.ci95]).all()
        three = merged_estimate([[1.0], [3.0], [5.0]])
        assert np.isnan(three.std)
        assert three.ci95 == pytest.approx(4.302653 * 2 / sqrt(3), rel=1e-6)


class TestRefusal:
    def damaged(self, folder: Path, old: str, new: str) -> Path:
        path = write(make_record(), folder / "raw")
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        return path

    @pytest.mark.parametrize(
        ("old", "new", "why"),
        [
            ('"schema_version": 1', '"schema_version": 9', "schema version 9"),
            ('"experiment": "resolution"', '"experiment": "frames"', "foreign record"),
            ('"pass_index": 1', '"pass_index": 2', "foreign record"),
            ('"status": "ok"', '"status": "splendid"', "malformed record: status"),
            ('"windows"', "windows", "truncated or corrupt"),
        ],
    )
    def test_a_bad_record_is_named_with_the_reason(
        self, tmp_path: Path, old: str, new: str, why: str
    ) -> None:
        path = self.damaged(tmp_path, old, new)
        with pytest.raises(UserError, match=why) as error:
            tables(tmp_path)
        assert path.name in str(error.value)
        assert not (tmp_path / "built").exists()

    def test_a_record_of_another_campaign(self, tmp_path: Path) -> None:
        other = make_record(campaign="smoke", pass_index=2)
        with pytest.raises(UserError, match="campaign 'smoke'"):
            tables(tmp_path, make_record(), other)

    def test_ok_without_a_generation_and_steps_that_disagree(self, tmp_path: Path) -> None:
        record = make_record()
        empty = record.windows.model_copy(update={"kind": ["warmup"] * len(record.windows.kind)})
        with pytest.raises(UserError, match=rf"resolution/{record.file_name}: .*no generation"):
            tables(tmp_path / "a", make_record(windows=empty))
        wrong = record.windows.model_copy(update={"steps": [9] * len(record.windows.steps)})
        with pytest.raises(UserError, match=rf"resolution/{record.file_name}: .*9 denoising steps"):
            tables(tmp_path / "b", make_record(windows=wrong))

    def test_ticks_that_do_not_reach_are_named(self, tmp_path: Path) -> None:
        record = make_record()
        assert record.ticks is not None
        cut = make_record(ticks=record.ticks.between(0, 5, margin=0))
        with pytest.raises(UserError, match=rf"resolution/{record.file_name}: .*not covered"):
            tables(tmp_path, cut)

    def test_no_records(self, tmp_path: Path) -> None:
        (tmp_path / "raw").mkdir()
        with pytest.raises(UserError, match="experiment 'resolution' has no records"):
            tables(tmp_path)


def test_a_hundred_thousand_spans_in_under_ten_seconds(tmp_path: Path) -> None:
    """The issue's budget, on records shaped like the study's: 5 generations of 50 steps, 10 ticks a second.

    Seconds of the processor: what a machine takes that does nothing else.
    """
    record = make_record(steps=50, step_s=(0.5,) * 5, protocol="full")
    measured = 5 * (2 + 50 * 3 + 2)
    count = 100_000 // measured + 1
    raw, text = tmp_path / "raw", to_json(record)
    raw.mkdir()
    for height in range(160, 160 + 16 * count, 16):
        name = configuration(height=height).id()
        of_height = text.replace(record.configuration_id, name).replace(
            '"height":480,', f'"height":{height},'
        )
        (raw / f"{name}__full_r1.json").write_text(of_height, encoding="utf-8")
    before_s = time.process_time()
    aggregate({"resolution": record_paths(raw)}, tmp_path / "m.parquet", tmp_path / "c.csv", ROOT)
    elapsed_s = time.process_time() - before_s
    spans = pd.read_parquet(tmp_path / "m.parquet", columns=["gpu_energy_J"])
    assert len(spans) == count * measured >= 100_000
    assert spans["gpu_energy_J"].notna().all()
    assert elapsed_s < 10 * processor.slower(), f"{elapsed_s:.1f} s"
