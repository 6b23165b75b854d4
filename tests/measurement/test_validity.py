"""The rules by which a record may be believed: each is met by a sound record and broken by one fault."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from records import GPU, configuration, environment, make_record, out_of_memory, write
from t2v_energy.config import ProtocolSettings, SampledProtocol
from t2v_energy.errors import UserError
from t2v_energy.measurement.record import Operators, Process, Record, Windows
from t2v_energy.measurement.validity import Finding, check, snapshot_error_percent, validate_folder
from t2v_energy.metering.series import Ticks


def levels(record: Record, expected_gpu: str | None = GPU) -> dict[str, str]:
    """Level by rule."""
    return {f.rule: f.level for f in check(record, expected_gpu)}


def finding(record: Record, rule: str, expected_gpu: str | None = GPU) -> Finding:
    """The finding of one rule."""
    (found,) = (f for f in check(record, expected_gpu) if f.rule == rule)
    return found


def test_a_sound_record_is_ok_by_every_rule_and_says_each_number() -> None:
    found = check(make_record(), GPU)
    assert {f.level for f in found} == {"ok"}
    assert [f.rule for f in found] == [
        "gpu_name",
        "foreign_process",
        "shared_host",
        "generations",
        "unspanned",
        "closure",
        "step_sem",
        "throttling",
        "profile",
    ]
    # its record has no profile, and says so
    assert "not checked" not in " ".join(f.detail for f in found if f.rule != "profile")


class TestProfile:
    """Planted stages of one step: denoiser 0.4 s, VAE 0.6 s."""

    @staticmethod
    def of(**changes: float) -> Record:
        seconds = {"text_encoder": 0.3, "denoiser": 0.4, "scheduler": 0.0, "vae_decode": 0.6} | changes
        return make_record(
            operators=Operators(
                steps=1,
                stage=list(seconds),
                operator=["aten::linear"] * len(seconds),
                device_s=list(seconds.values()),
                kernels=[1] * len(seconds),
            )
        )

    @pytest.mark.parametrize(
        ("changes", "level"),
        [({}, "ok"), ({"denoiser": 0.41}, "ok"), ({"denoiser": 0.43}, "flag"), ({"vae_decode": 1.2}, "flag")],
    )
    def test_kernels_cannot_take_longer_than_their_stage(self, changes: dict[str, float], level: str) -> None:
        assert finding(self.of(**changes), "profile").level == level

    def test_it_names_the_stage_and_by_how_much(self) -> None:
        detail = finding(self.of(denoiser=0.6, vae_decode=1.2), "profile").detail
        assert "stage vae_decode" in detail
        assert "100.0 %, limit 5 %" in detail

    def test_without_a_gpu_threads_add_up(self) -> None:
        record = self.of(denoiser=9.0)
        record = make_record(gpu=None, operators=record.operators)
        assert finding(record, "profile").level == "ok"


class TestUnspanned:
    def test_above_one_percent_is_invalid(self) -> None:
        # 0.1 s of 1.1 + 9.0 + 0.1 s is 0.98 %; of 1.1 + 8.5 + 0.1 s it is 1.03 %
        assert levels(make_record(steps=18, unspanned_s=0.1))["unspanned"] == "ok"
        found = finding(make_record(steps=17, unspanned_s=0.1), "unspanned")
        assert found.level == "invalid"
        assert "1.03 %, limit 1 %" in found.detail


class TestClosure:
    @pytest.mark.parametrize(
        ("scale", "level"), [(1.0, "ok"), (1.015, "ok"), (1.025, "invalid"), (0.975, "invalid")]
    )
    def test_counter_and_instantaneous_power_agree_within_two_percent(self, scale: float, level: str) -> None:
        found = finding(make_record(power_scale=scale), "closure")
        assert found.level == level
        assert "limit 2 %" in found.detail

    @pytest.mark.parametrize(("scale", "level"), [(1.04, "ok"), (1.30, "invalid")])
    def test_where_readings_swing_the_limit_is_four_of_their_standard_errors(
        self, scale: float, level: str
    ) -> None:
        record = make_record(power_scale=scale)
        assert record.samples is not None
        watts = record.samples.power_instant_W
        factors = np.random.default_rng(2).uniform(0.7, 1.3, len(watts))
        swinging = [None if w is None else w * f for w, f in zip(watts, factors, strict=True)]
        samples = record.samples.model_copy(update={"power_instant_W": swinging})
        found = finding(record.model_copy(update={"samples": samples}), "closure")
        assert found.level == level
        assert "limit 2 %" not in found.detail

    def test_the_standard_error_is_that_of_scattered_readings(self) -> None:
        watts = np.random.default_rng(1).normal(500, 50, 400)
        times = [0.1 * i for i in range(400)]
        steady = make_record().samples
        assert steady is not None
        of = steady.model_copy(update={"time_s": times, "power_instant_W": watts.tolist()})
        # 50 W of 500 W, of 200 readings
        assert snapshot_error_percent(of, 0, 19.95) == pytest.approx(100 * 50 / 500 / 200**0.5, rel=0.1)
        rising = of.model_copy(update={"power_instant_W": [300 + i for i in range(400)]})
        assert snapshot_error_percent(rising, 0, 19.95) < 0.02
        assert snapshot_error_percent(of, 5, 5.15) == 0

    def test_numbers_are_of_the_stretch_from_first_start_to_last_end(self) -> None:
        # 3 × (120 + 4 × 250 + 240 + 10) J and two pauses of 0.1 s at 100 W
        assert "counter 4130.0 J" in finding(make_record(), "closure").detail

    def test_a_short_stretch_is_not_checked(self) -> None:
        found = finding(make_record(step_s=(0.5,), power_scale=2.0), "closure")
        assert found.level == "ok"
        assert "not checked: 3.10 s" in found.detail

    def test_a_gpu_without_a_counter_is_flagged(self) -> None:
        assert "there is no measured energy" in finding(make_record(ticks=None), "closure").detail
        assert levels(make_record(ticks=Ticks()))["closure"] == "flag"
        assert levels(make_record(samples=None))["closure"] == "flag"

    def test_ticks_that_do_not_reach_are_invalid(self) -> None:
        ticks = make_record().ticks
        assert ticks is not None
        assert levels(make_record(ticks=ticks.between(0, 5, margin=0)))["closure"] == "invalid"

    def test_without_a_gpu_there_is_nothing_to_compare(self) -> None:
        assert finding(make_record(gpu=None), "closure", None).level == "ok"


class TestStepError:
    def test_above_the_contracts_limit_is_flagged_not_refused(self) -> None:
        found = finding(make_record(step_s=(0.5, 1.0)), "step_sem")
        assert found.level == "flag"
        assert "limit 0.3 %" in found.detail

    def test_a_campaign_on_the_cpu_is_held_to_its_own_protocol(self) -> None:
        lax = ProtocolSettings(sampled=SampledProtocol(max_step_sem_percent=50))
        uneven = {"step_s": (0.5, 1.0), "protocol_settings": lax}
        assert levels(make_record(gpu=None, **uneven), None)["step_sem"] == "ok"
        assert levels(make_record(**uneven))["step_sem"] == "flag"

    def test_one_step_cannot_pass(self) -> None:
        assert finding(make_record(steps=1, step_s=(0.5,)), "step_sem") == Finding(
            "step_sem", "flag", "not checked: one step has no standard error of the mean step time"
        )

    def test_no_finding_of_one_step_shows_what_is_not_a_number(self) -> None:
        assert not [f for f in check(make_record(steps=1, step_s=(0.5,))) if "nan" in f.detail]


class TestStepErrorWithInterventions:
    """Steps that are skipped are shorter on purpose: only what differs between generations is scatter."""

    SKIPPING = (1.0, 0.5, 1.0, 0.5)

    @staticmethod
    def of(
        *step_s: tuple[float, ...], names: tuple[str, ...] = ("taylorseer-2",), of_steps: int = 4
    ) -> Finding:
        config = configuration(num_inference_steps=of_steps, interventions=names)
        return finding(make_record(steps=4, step_s=step_s, config=config, protocol="full"), "step_sem")

    def test_whole_generations_with_the_same_skips_are_ok(self) -> None:
        assert self.of(*[self.SKIPPING] * 3).level == "ok"

    def test_without_an_intervention_it_is_scatter(self) -> None:
        assert self.of(*[self.SKIPPING] * 3, names=()).level == "flag"

    def test_so_it_is_in_cut_generations(self) -> None:
        assert self.of(*[self.SKIPPING] * 3, of_steps=50).level == "flag"

    def test_what_differs_between_generations_is_flagged(self) -> None:
        found = self.of(self.SKIPPING, self.SKIPPING, (1.5, 0.5, 1.0, 0.5))
        assert found.level == "flag"
        # one step's variance is (0.5 s)² / 3 of three values; a quarter of it, over 12 steps of 0.79 s
        assert f"{100 * (0.25 / 3 / 4 / 12) ** 0.5 / (9.5 / 12):.3f} %" in found.detail

    def test_one_generation_cannot_tell(self) -> None:
        found = self.of(self.SKIPPING)
        assert found.level == "ok"
        assert "not checked" in found.detail


class TestThrottling:
    @pytest.mark.parametrize("reasons", [0x0, 0x1, 0x2, 0x4, 0x7])
    def test_idle_applications_clocks_and_power_cap_are_allowed(self, reasons: int) -> None:
        assert levels(make_record(reasons=reasons))["throttling"] == "ok"

    @pytest.mark.parametrize(
        ("bit", "name"),
        [
            (0x8, "hardware slowdown"),
            (0x10, "sync boost"),
            (0x20, "software thermal slowdown"),
            (0x40, "hardware thermal slowdown"),
            (0x80, "hardware power brake"),
            (0x100, "display clock setting"),
            (0x4000, "unknown reason 0x4000"),
        ],
    )
    def test_any_other_reason_is_invalid_and_named(self, bit: int, name: str) -> None:
        found = finding(make_record(reasons=0x4 | bit), "throttling")
        assert found.level == "invalid"
        assert found.detail.endswith(f": {name}")

    def test_only_generations_count(self) -> None:
        record = make_record()
        samples = record.samples
        assert samples is not None
        first_s, last_s = record.windows.start_s[2], record.windows.end_s[-2]
        outside = [0x40 if not first_s <= t <= last_s else 0 for t in samples.time_s]
        hot = samples.model_copy(update={"throttle_reasons": outside})
        assert levels(record.model_copy(update={"samples": hot}))["throttling"] == "ok"

    def test_unread_reasons_are_flagged(self) -> None:
        record = make_record()
        assert record.samples is not None
        unread = {"throttle_reasons": [None] * len(record.samples)}
        record = record.model_copy(update={"samples": record.samples.model_copy(update=unread)})
        assert levels(record)["throttling"] == "flag"


class TestWhereItWasMade:
    def test_a_foreign_process_is_invalid_and_named(self) -> None:
        shared = environment(
            foreign_processes=[Process(pid=42, used_MiB=512.0), Process(pid=43, used_MiB=None)]
        )
        found = finding(make_record(environment=shared), "foreign_process")
        assert found.level == "invalid"
        assert "pid 42 (512 MiB), pid 43" in found.detail

    def test_another_gpu_than_the_campaigns_is_invalid(self) -> None:
        found = finding(make_record(gpu="NVIDIA L4"), "gpu_name")
        assert found.level == "invalid"
        assert found.detail == "NVIDIA L4; the campaign is on NVIDIA H200"
        assert levels(make_record(gpu=None))["gpu_name"] == "invalid"
        assert levels(make_record(gpu="NVIDIA L4"), None)["gpu_name"] == "ok"


class TestRecordsWithoutGenerations:
    def test_out_of_memory_passes_and_says_why(self) -> None:
        found = check(out_of_memory(), GPU)
        assert {f.level for f in found} == {"ok"}
        assert found[0].detail == "out_of_memory: there is no generation to check"

    def test_out_of_memory_beside_another_process_proves_nothing(self) -> None:
        shared = environment(foreign_processes=[Process(pid=42, used_MiB=512.0)])
        assert levels(out_of_memory(environment=shared))["foreign_process"] == "invalid"

    def test_ok_without_a_generation_or_with_other_steps_is_invalid(self) -> None:
        assert levels(make_record(windows=Windows()))["generations"] == "invalid"
        record = make_record()
        wrong = record.windows.model_copy(update={"steps": [9] * len(record.windows.steps)})
        assert "9 denoising steps" in finding(make_record(windows=wrong), "generations").detail


class TestFolder:
    def test_of_an_experiment_has_its_file_names(self, tmp_path: Path) -> None:
        good = write(make_record(), tmp_path)
        hot = write(make_record(reasons=0x40, config=configuration(height=720, width=1280)), tmp_path)
        found = validate_folder(tmp_path, GPU)
        assert list(found) == sorted([good.name, hot.name])
        assert {f.level for f in found[good.name]} == {"ok"}
        assert {f.level for f in found[hot.name]} == {"ok", "invalid"}

    def test_of_a_campaign_has_those_of_all_experiments(self, tmp_path: Path) -> None:
        write(make_record(), tmp_path / "resolution")
        write(make_record(experiment="frames"), tmp_path / "frames")
        assert [name.split("/")[0] for name in validate_folder(tmp_path)] == ["frames", "resolution"]

    def test_an_unreadable_record_is_a_finding(self, tmp_path: Path) -> None:
        path = write(make_record(), tmp_path)
        path.write_text(path.read_text()[:1000])
        ((found,),) = validate_folder(tmp_path).values()
        assert (found.rule, found.level) == ("readable", "invalid")
        assert "truncated" in found.detail

    def test_nothing_to_validate_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="there are no records"):
            validate_folder(tmp_path)
        with pytest.raises(UserError, match="no such folder"):
            validate_folder(tmp_path / "absent")


def test_a_cpu_record_with_unspanned_time_is_only_flagged() -> None:
    """Tiny models on a CPU test the chain; the pipeline's own host code weighs more there."""
    on_gpu = make_record(steps=17, unspanned_s=0.1)
    on_cpu = on_gpu.model_copy(update={"environment": on_gpu.environment.model_copy(update={"gpu": None})})
    assert levels(on_gpu)["unspanned"] == "invalid"
    assert levels(on_cpu)["unspanned"] == "flag"
