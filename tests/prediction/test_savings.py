"""Savings of interventions: arithmetic by class, intervals, the frozen calibration, and what is committed."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import yaml
from records import configuration, make_record, write
from t2v_energy import cli
from t2v_energy.aggregation import aggregate
from t2v_energy.analysis import kernels
from t2v_energy.analysis.operator_rates import operator_rates
from t2v_energy.config import Configuration, load_settings
from t2v_energy.errors import UserError
from t2v_energy.interventions.base import Work, WorkClass
from t2v_energy.interventions.vae_tiling import VaeTiling
from t2v_energy.measurement.sealing import sealed_records
from t2v_energy.prediction.calibrated import CLASSES, predict_points
from t2v_energy.prediction.features import Point
from t2v_energy.prediction.registered import (
    COLUMNS,
    baseline_steps,
    prediction_file,
    read_registered,
    register,
)
from t2v_energy.prediction.savings import (
    Compared,
    budget,
    load_savings,
    predict_savings,
    savings_basis,
)

ROOT = tiny.ROOT
CALIBRATION = savings_basis(ROOT, "h200").calibration
WAN = configuration()
POINT = Point("wan2.1-t2v-1.3b", 480, 832, 81, 50)
pytestmark = pytest.mark.usefixtures("tiling_changes_no_work")  # unless a test says which


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with the shipped config/ and a GPU campaign ``big`` that lists interventions."""
    root = tiny.make_root(tmp_path / "root")
    cool = {"power": {"attention": 0.9, "vae": 0.5}, "source": "a test"}
    entries = {
        "half-time": {"expected": {"rate": {"attention": 2.0}, "source": "a test"}},
        "cool": {"kind": "vae-channels-last", "expected": cool},  # a kind is listed once
    }
    tiny.add_interventions(root, entries)
    vary: list[dict[str, Any]] = [
        {},
        {"interventions": ["half-time"]},
        {"attention_kernel": "flash"},
        {"num_inference_steps": 25},
        {"num_inference_steps": 25, "interventions": ["cool"]},
    ]
    experiment = {"model": "wan2.1-t2v-1.3b", "fixed": {"height": 480, "width": 832}, "vary": vary}
    campaign = {"key": "big", "title": "x", "accelerator": "h200", "device": "cuda"}
    tiny.write_yaml(root, "campaigns/big", campaign | {"experiments": {"interventions": experiment}})
    return root


def costs(steps: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """Seconds and watt-hours by class of the unmodified pipeline."""
    found = predict_points(ROOT, CALIBRATION, [POINT._replace(num_inference_steps=steps)])
    return found.class_s[0], found.class_Wh[0]


def one(root: Path, config: Configuration, steps: int = 50, calibration: Any = CALIBRATION) -> Any:
    (saving,) = predict_savings(root, calibration, [Compared(config, steps)])
    return saving


class TestRatios:
    def test_nothing_changed_is_one_without_any_doubt(self) -> None:
        saving = one(ROOT, WAN)
        assert (saving.latency_ratio, saving.gpu_energy_ratio, saving.denoiser_flop_ratio) == (1, 1, 1)
        assert saving.latency_ratio_low == saving.latency_ratio_high == 1
        assert saving.gpu_energy_ratio_low == saving.gpu_energy_ratio_high == 1

    def test_a_rate_divides_its_class_alone(self, root: Path) -> None:
        saving = one(root, configuration(interventions=("half-time",)))
        for total, own in zip((saving.latency_ratio, saving.gpu_energy_ratio), costs(), strict=True):
            attention = own[CLASSES.index("attention")]
            assert total == pytest.approx(1 - attention / 2 / own.sum(), rel=1e-12)
        assert saving.denoiser_flop_ratio == 1

    def test_power_changes_energy_alone(self, root: Path) -> None:
        saving = one(root, configuration(interventions=("cool",)))
        _, energy = costs()
        by_class = dict(zip(CLASSES, energy, strict=True))
        expected = 1 - (0.1 * by_class["attention"] + 0.5 * by_class["vae"]) / energy.sum()
        assert saving.latency_ratio == 1
        assert saving.gpu_energy_ratio == pytest.approx(expected, rel=1e-12)

    def test_a_stack_multiplies_by_class(self, root: Path) -> None:
        saving = one(root, configuration(interventions=("half-time", "cool"), attention_kernel="flash"))
        seconds, energy = (dict(zip(CLASSES, own, strict=True)) for own in costs())
        rate = flash("wide").rate
        latency = 1 + (1 / (2 * rate) - 1) * seconds["attention"] / sum(seconds.values())
        changed = (0.9 / (2 * rate) - 1) * energy["attention"] - 0.5 * energy["vae"]
        assert saving.latency_ratio == pytest.approx(latency, rel=1e-12)
        assert saving.gpu_energy_ratio == pytest.approx(1 + changed / sum(energy.values()), rel=1e-12)

    def test_amounts_scale_their_class_and_the_denoisers_operations(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Half the attention and a tenth more dense products; and a stage that is no denoiser's."""
        seen: list[Work] = []

        def ratios(_: VaeTiling, work: Work) -> Mapping[WorkClass, float]:
            seen.append(work)
            return {"attention": 0.5, "dense": 1.1, "vae": 3.0}

        monkeypatch.setattr(VaeTiling, "work_ratios", ratios)
        saving = one(root, configuration(interventions=("vae-tiling",)))
        seconds = dict(zip(CLASSES, costs()[0], strict=True))
        changed = -0.5 * seconds["attention"] + 0.1 * seconds["dense"] + 2 * seconds["vae"]
        assert saving.latency_ratio == pytest.approx(1 + changed / sum(seconds.values()), rel=1e-12)
        work = predict_points(ROOT, CALIBRATION, [POINT]).work
        attention = float(work.attention_flop[0] + work.attention_narrow_flop[0])
        dense = float(work.dense_flop[0])
        expected = (0.5 * attention + 1.1 * dense) / (attention + dense)
        assert saving.denoiser_flop_ratio == pytest.approx(expected, rel=1e-12)
        assert seen[0].features.num_inference_steps.tolist() == [50]

    def test_fewer_steps_by_the_model_itself(self) -> None:
        saving = one(ROOT, configuration(num_inference_steps=20))
        for ratio, fewer, every in zip(
            (saving.latency_ratio, saving.gpu_energy_ratio), costs(20), costs(), strict=True
        ):
            assert ratio == pytest.approx(fewer.sum() / every.sum(), rel=1e-12)
        assert saving.denoiser_flop_ratio == pytest.approx(0.4, rel=1e-12)
        assert saving.latency_ratio > 0.4  # what comes once stays

    def test_effects_start_from_the_work_of_their_own_steps(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Work] = []
        monkeypatch.setattr(VaeTiling, "work_ratios", lambda _, work: seen.append(work) or {})
        one(root, configuration(num_inference_steps=20, interventions=("vae-tiling",)))
        assert [float(work.features.num_inference_steps[0]) for work in seen] == [20]

    def test_several_at_once_are_as_each_alone(self, root: Path) -> None:
        configs = [
            configuration(interventions=("half-time",)),
            configuration(attention_kernel="flash"),
            configuration(
                model="cogvideox-2b", height=480, width=720, num_frames=49, attention_kernel="flash"
            ),
        ]
        together = predict_savings(root, CALIBRATION, [Compared(config, 50) for config in configs])
        assert together == [one(root, config) for config in configs]
        assert predict_savings(root, CALIBRATION, []) == []

    def test_the_budget_adds_up_to_the_ratio(self, root: Path) -> None:
        pair = Compared(configuration(interventions=("half-time", "cool")), 50)
        found = budget(root, CALIBRATION, pair)
        saving = one(root, pair.configuration)
        assert tuple(found) == CLASSES
        latency = sum(b.with_s for b in found.values()) / sum(b.without_s for b in found.values())
        energy = sum(b.with_Wh for b in found.values()) / sum(b.without_Wh for b in found.values())
        assert latency == pytest.approx(saving.latency_ratio, rel=1e-12)
        assert energy == pytest.approx(saving.gpu_energy_ratio, rel=1e-12)
        assert found["attention"].with_s == pytest.approx(found["attention"].without_s / 2)

    def test_what_does_not_fit_is_refused(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def check(self: VaeTiling, *_: Any) -> None:
            raise self.refused("it has no VAE", "leave it out")

        monkeypatch.setattr(VaeTiling, "check", check)
        with pytest.raises(UserError, match="it has no VAE"):
            one(root, configuration(interventions=("vae-tiling",)))
        with pytest.raises(UserError, match="there is no 'vae-tilings'"):
            one(root, configuration(interventions=("vae-tilings",)))


# --- intervals ----------------------------------------------------------------------------------------------


SCALE = 0.1


def drawn(config: Configuration, section: str, count: int = 400) -> np.ndarray:
    """Logarithms of both ratios, shape (count, 2), with drawn parameters of a section.

    They lie a tenth as far from the mean as their covariance says, and so do ratios: propagation is linear,
    as in the calibration itself, and the parameters' exponentials are not.
    """
    fitted = getattr(CALIBRATION, section)
    random = np.random.default_rng(3)
    means = random.multivariate_normal(fitted.mean, np.array(fitted.covariance), size=count)
    means = fitted.mean + SCALE * (means - fitted.mean)
    found = []
    points = [POINT._replace(num_inference_steps=config.num_inference_steps), POINT]
    rate = flash("wide").rate if config.attention_kernel else 1.0
    for mean in means:
        moved = CALIBRATION.model_copy(update={section: fitted.model_copy(update={"mean": mean.tolist()})})
        at = predict_points(ROOT, moved, points)
        pair = []
        for costs_of in (at.class_s.copy(), at.class_Wh.copy()):
            costs_of[0, CLASSES.index("attention")] /= rate
            pair.append(np.log(costs_of[0].sum() / costs_of[1].sum()))
        found.append(pair)
    logs = np.array(found)
    return logs.mean(axis=0) + (logs - logs.mean(axis=0)) / SCALE


def certain(section: str) -> Any:
    """The calibration with nothing unexplained, and no doubt about the other section's parameters."""
    other = {"time": "power", "power": "time"}[section]
    fitted, sure = getattr(CALIBRATION, section), getattr(CALIBRATION, other)
    nothing = np.zeros((len(sure.mean), len(sure.mean))).tolist()
    return CALIBRATION.model_copy(
        update={
            section: fitted.model_copy(update={"misfit": 1e-12}),
            other: sure.model_copy(update={"misfit": 1e-12, "covariance": nothing}),
        }
    )


@pytest.mark.parametrize("section", ["time", "power"])
@pytest.mark.parametrize("change", [{"num_inference_steps": 10}, {"attention_kernel": "flash"}])
def test_intervals_are_those_of_drawn_parameters(
    section: str, change: dict[str, Any], tmp_path: Path
) -> None:
    """Linear propagation against 400 draws, whose own error is 4 %."""
    root = tiny.make_root(tmp_path / "root")
    path = root / "config" / "savings.yaml"
    path.write_text(path.read_text().replace("rate_sd: 0.013", "rate_sd: 0"))
    config = configuration(**change)
    saving = one(root, config, calibration=certain(section))
    t90 = getattr(CALIBRATION, section).t90
    spread = drawn(config, section).std(axis=0)
    for index, name in enumerate(("latency_ratio", "gpu_energy_ratio")):
        half = np.log(getattr(saving, f"{name}_high") / getattr(saving, name))
        assert half == pytest.approx(t90 * spread[index], rel=0.15, abs=1e-9), name
    if section == "power":
        assert saving.latency_ratio_low == pytest.approx(saving.latency_ratio, rel=1e-9)


def test_errors_that_both_share_cancel() -> None:
    """A ratio is known far better than either of its parts."""
    saving = one(ROOT, configuration(attention_kernel="flash"))
    predicted = predict_points(ROOT, CALIBRATION, [POINT])
    of_part = float(np.log(predicted.latency_s_high[0] / predicted.latency_s[0]))
    assert 0 < np.log(saving.latency_ratio_high / saving.latency_ratio) < of_part


def test_what_is_unexplained_grows_with_what_changes(root: Path) -> None:
    few, many = (one(root, configuration(num_inference_steps=steps)) for steps in (45, 5))
    width = [np.log(s.latency_ratio_high / s.latency_ratio_low) for s in (few, many)]
    assert width[0] < width[1] / 5


# --- config/savings.yaml ------------------------------------------------------------------------------------


def flash(heads: str) -> Any:
    (found,) = [k for k in load_savings(ROOT).attention_kernels if (k.kernel, k.heads) == ("flash", heads)]
    return found


def test_the_measured_rate_is_that_of_the_sealed_records(tmp_path: Path) -> None:
    csv_path = Path("results/aggregated/h200/configurations.csv")
    (tmp_path / "config").symlink_to(ROOT / "config")
    records = sealed_records(ROOT / "results/raw/h200/kernels")
    aggregate({"kernels": records}, tmp_path / "m.parquet", tmp_path / csv_path, ROOT)
    measured = kernels.read_kernels(tmp_path, "h200", csv_path)
    assert measured is not None
    assert measured.named == {"default": "cudnn", "flash": "flash"}
    fits = kernels.fits(measured)
    ratio = kernels.rate_ratio(fits["step_time_s"])
    known = flash("wide")
    assert known.against == "cudnn"
    assert known.rate == pytest.approx(ratio.value, abs=0.0005)
    t = 2.4469  # of 95 %, six degrees of freedom: ten steps, four parameters
    assert known.rate_sd == pytest.approx((ratio.high - ratio.low) / 2 / t / ratio.value, abs=0.0005)
    watts = {name: fits["step_energy_J"].quadratic[name] / fits["step_time_s"].quadratic[name] for name in
             ("default", "flash")}  # fmt: skip
    assert known.power == pytest.approx(watts["flash"] / watts["default"], abs=0.005)


OPERATORS = {
    ("flash", "narrow"): ("1x24x64 q8192 k8192", "1x30x64 q17776 k17776"),
    ("efficient", "wide"): ("1x12x128 q16384 k16384", "1x12x128 q14400 k14400"),
    ("efficient", "narrow"): ("1x24x64 q8192 k8192", "1x30x64 q17776 k17776"),
}
"""Sizes of the forced kernel's case and of cuDNN's that its rate is divided by."""


def test_other_rates_are_those_of_single_operators() -> None:
    table = operator_rates(sealed_records(ROOT / "results/raw/h200/operators"))
    own = table[table["status"] == "ok"].drop_duplicates(["case", "attention_kernel"], keep="last")
    rates = {
        (row["case"].split(" bfloat16")[0], row["attention_kernel"]): row["rate_TFLOPs"]
        for _, row in own.iterrows()
    }
    known = {(k.kernel, k.heads): k for k in load_savings(ROOT).attention_kernels}
    others = {("flash", "wide"), ("sage", "wide")}  # of whole videos (see above), and cited
    assert known.keys() == {*OPERATORS, *others}
    for (kernel, heads), (forced, default) in OPERATORS.items():
        expected = rates[f"attention {forced}", kernel] / rates[f"attention {default}", "cudnn"]
        assert known[kernel, heads].rate == pytest.approx(expected, abs=0.0006), (kernel, heads)


class TestKernels:
    def test_narrow_heads_have_a_rate_of_their_own(self) -> None:
        config = configuration(
            model="cogvideox-2b", height=480, width=720, num_frames=49, attention_kernel="flash"
        )
        point = Point("cogvideox-2b", 480, 720, 49, 50)
        seconds = predict_points(ROOT, CALIBRATION, [point]).class_s[0]
        share = seconds[CLASSES.index("attention")] / seconds.sum()
        assert one(ROOT, config).latency_ratio == pytest.approx(1 + share * (1 / flash("narrow").rate - 1))

    def test_torchs_own_choice_changes_nothing(self) -> None:
        assert one(ROOT, configuration(attention_kernel="cudnn")).latency_ratio == 1

    def test_a_kernel_that_nobody_measured_is_not_predicted(self) -> None:
        with pytest.raises(UserError, match=r"'math' does to heads of 128 and more on h200 is not known"):
            one(ROOT, configuration(attention_kernel="math"))


class TestFrozen:
    def test_the_shipped_one_is_what_its_checksum_says(self) -> None:
        basis = savings_basis(ROOT, "h200")
        assert basis.frozen
        assert basis.sha256 == load_savings(ROOT).calibrations["h200"].sha256
        assert basis.calibration.points > 0

    def test_a_changed_file_is_refused(self, root: Path) -> None:
        path = root / savings_basis(root, "h200").file
        path.write_text(path.read_text().replace('"points": ', '"points": 1'))
        with pytest.raises(UserError, match="differs from") as error:
            savings_basis(root, "h200")
        assert path.name in error.value.where

    def test_a_missing_file_and_another_accelerators(self, root: Path) -> None:
        path = root / "config" / "savings.yaml"
        path.write_text(path.read_text().replace("  h200:\n", "  a100-sxm:\n"))
        with pytest.raises(UserError, match="is of h200, not of a100-sxm"):
            savings_basis(root, "a100-sxm")
        (root / savings_basis(ROOT, "h200").file).unlink()
        with pytest.raises(UserError, match="there is no such calibration"):
            savings_basis(root, "a100-sxm")

    def test_without_one_what_is_shipped_or_presumed(self, root: Path) -> None:
        basis = savings_basis(root, "l4")
        assert (basis.frozen, basis.sha256, basis.calibration.points) == (False, "", 0)


# --- what is committed before measuring ---------------------------------------------------------------------


def plain(steps: int, **changes: Any) -> Configuration:
    return configuration(num_inference_steps=steps, **changes)


@pytest.mark.parametrize(
    ("config", "others", "expected"),
    [
        (plain(50, attention_kernel="flash"), [plain(50)], 50),
        (plain(20, interventions=("a",)), [plain(50), plain(20)], 20),
        (plain(20, interventions=("a",)), [plain(50)], 50),
        (plain(20), [plain(50), plain(20)], 50),
        (plain(50, interventions=("a",)), [plain(50, height=720, width=1280)], None),
        (plain(50, interventions=("a",)), [plain(50, attention_kernel="flash")], None),
    ],
)
def test_baselines(config: Configuration, others: list[Configuration], expected: int | None) -> None:
    assert baseline_steps(config, [*others, config]) == expected


class TestRegister:
    def test_every_changed_configuration_has_a_line(self, root: Path) -> None:
        text = register(root, load_settings(root, {"campaign": "big"}), "interventions")
        rows = {row["configuration_id"]: row for row in csv.DictReader(io.StringIO(text))}
        name = "wan2.1-t2v-1.3b_480x832_81f_"
        assert list(rows) == [f"{name}{end}" for end in ("50s__half-time", "50s__flash", "25s", "25s__cool")]
        assert [row["baseline_steps"] for row in rows.values()] == ["50", "50", "50", "25"]
        assert {row["calibration_sha256"] for row in rows.values()} == {savings_basis(root, "h200").sha256}
        saving = one(root, configuration(attention_kernel="flash"))
        assert float(rows[f"{name}50s__flash"]["latency_ratio"]) == pytest.approx(
            saving.latency_ratio, rel=1e-6
        )

    def test_it_is_read_as_it_was_written(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["--root", str(root), "savings", "--campaign", "big", "--experiment", "interventions"]
        assert cli.main(arguments) == 0
        assert "4 predictions; commit it" in capsys.readouterr().out
        found = read_registered(root, "big", ["interventions", "token-merging"])
        assert len(found) == 4
        known = found["interventions", "wan2.1-t2v-1.3b_480x832_81f_50s__half-time"]
        saving = one(root, configuration(interventions=("half-time",)))
        assert known.saving.gpu_energy_ratio == pytest.approx(saving.gpu_energy_ratio, rel=1e-6)
        assert known.baseline_steps == 50

    def test_not_once_there_are_records(self, root: Path) -> None:
        write(make_record(campaign="big"), root / "results/raw/big/interventions")
        with pytest.raises(UserError, match="1 records are there already"):
            register(root, load_settings(root, {"campaign": "big"}), "interventions")

    def test_not_without_a_frozen_calibration_or_anything_to_predict(self, root: Path) -> None:
        path = root / "config" / "campaigns" / "big.yaml"
        text = path.read_text()
        path.write_text(text.replace("accelerator: h200", "accelerator: l4"))
        with pytest.raises(UserError, match="'l4' has no frozen calibration"):
            register(root, load_settings(root, {"campaign": "big"}), "interventions")
        campaign = yaml.safe_load(text)
        campaign["experiments"]["interventions"]["vary"] = [{}]
        tiny.write_yaml(root, "campaigns/big", campaign)
        with pytest.raises(UserError, match="nothing differs from a baseline"):
            register(root, load_settings(root, {"campaign": "big"}), "interventions")
        with pytest.raises(UserError, match="has no experiment 'frames'"):
            register(root, load_settings(root, {"campaign": "big"}), "frames")

    def test_a_damaged_file_is_refused(self, root: Path) -> None:
        path = root / prediction_file("big", "interventions")
        path.parent.mkdir(parents=True)
        path.write_text("configuration_id\nx\n")
        with pytest.raises(UserError, match="there is no column 'baseline_steps'"):
            read_registered(root, "big", ["interventions"])
        path.write_text(",".join(COLUMNS) + "\n" + ",".join("x" for _ in COLUMNS) + "\n")
        with pytest.raises(UserError, match="line 2: not a number"):
            read_registered(root, "big", ["interventions"])


# --- t2v-energy predict -------------------------------------------------------------------------------------

PREDICT = ["predict", "--model", "wan2.1-t2v-1.3b", "--height", "480", "--width", "832"]


def test_predict_shows_a_saving(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--root", str(root), *PREDICT, "--interventions", "half-time", "--attention-kernel", "flash"]
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    saving = found["saving"]
    assert saving["latency_s"] == pytest.approx(found["latency_s"] * saving["latency_ratio"])
    assert saving["lossy"] == {"half-time": "no figure known"}
    assert (saving["kind"], saving["attention_kernel"]) == ("modelled", "flash")
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "with attention kernel flash, half-time (modelled)" in text
    assert f"{saving['gpu_energy_ratio']:.3f} of it" in text


def test_predict_refuses_what_it_cannot(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, message in (
        (["--interventions", "half-tim"], "did you mean 'half-time'?"),
        (["--attention-kernel", "flsh"], "attention_kernel"),
    ):
        assert cli.main(["--root", str(root), *PREDICT, *wrong]) == 2
        assert message in capsys.readouterr().err
    points = ["--points", "x.csv", "--out", "y.csv", "--interventions", "half-time"]
    assert cli.main(["--root", str(root), "predict", *points]) == 2
    assert "takes no --interventions" in capsys.readouterr().err
