"""The calibrated cost model: it finds what is behind exact costs, says how sure it is, refuses nonsense."""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import tiny
from coverage import Coverage
from processor import scaled_s
from scipy.stats import t as student_t
from t2v_energy.config import load_accelerator, load_model
from t2v_energy.errors import UserError
from t2v_energy.prediction.calibrated import (
    CLASSES,
    POWER_NAMES,
    TIME_NAMES,
    Calibration,
    calibrate,
    picked_by_work,
    predict_points,
    presumed_calibration,
    read_calibration,
    to_json,
)
from t2v_energy.prediction.features import Features, Point, _row, executed, features
from t2v_energy.prediction.forward import powers, times
from t2v_energy.prediction.mapfit import student90
from t2v_energy.prediction.presumed import load_presumed
from t2v_energy.work import animatediff, true_work

ROOT = tiny.ROOT
WAN = "wan2.1-t2v-1.3b"
MODELS = tuple(
    sorted(p.stem for p in (ROOT / "config" / "models").glob("*.yaml") if not p.stem.startswith("tiny-"))
)
SIZES = [(256, 256), (320, 576), (480, 832), (720, 1280), (864, 1536)]
POINTS = (
    [Point(WAN, h, w, 81, 50) for h, w in SIZES]
    + [Point(WAN, 720, 1280, f, 50) for f in (5, 33, 61, 101)]
    + [Point(WAN, 480, 832, 81, s) for s in (1, 2, 10, 100)]
)
CALIBRATED_WITH = [0, 2, 4, 5, 7, 8, 9, 12]


def machine(
    points: list[Point], moved: dict[str, float], noise: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Latency (s) and energy (Wh) on a machine whose parameters are ``moved`` from what is presumed."""
    presumed = presumed_calibration(ROOT, "h200")
    theta = np.array(presumed.time.mean)
    for name, by in moved.items():
        theta[TIME_NAMES.index(name)] += by
    limits, work = load_accelerator(ROOT, "h200"), features(ROOT, points)
    part_s = times(theta, np.empty((len(points), 0)), work, limits).part_s
    watts, _ = powers(np.array(presumed.power.mean), part_s, limits)
    wobble = np.exp(noise * np.random.default_rng(3).standard_normal(len(points)))
    return part_s.sum(axis=1) * wobble, (part_s * watts).sum(axis=1) / 3600 * wobble


def fitted(moved: dict[str, float], noise: float = 0.0, which: list[int] = CALIBRATED_WITH) -> Calibration:
    seconds, energy = machine(POINTS, moved, noise)
    return calibrate(ROOT, [POINTS[i] for i in which], seconds[which], energy[which], "h200")


class TestFeatures:
    @pytest.mark.parametrize(
        "key",
        [WAN, "wan2.1-t2v-14b", "cogvideox-5b", "mochi-1-preview", "contentv-8b", "ltx-video-0.9.7-dev"],
    )
    def test_they_are_the_true_work(self, key: str) -> None:
        model = load_model(ROOT, key)
        d = model.defaults
        found = features(ROOT, [Point(key, d.height, d.width, d.num_frames, 7)])
        work = true_work(model, d.height, d.width, d.num_frames, 7)
        once = found.vae_float32_flop[0] + found.vae_half_flop[0] + found.text_flop[0]
        attention = found.attention_flop[0] + found.attention_narrow_flop[0]
        dense = found.dense_flop[0] + found.convolution_flop[0]
        assert once + attention + dense == pytest.approx(work.total_flop, rel=1e-6)
        assert attention == pytest.approx(work.attention_flop, rel=1e-6)

    @pytest.mark.parametrize(
        ("key", "sizes"),
        [
            (WAN, ((304, 1008, 21), (1088, 1920, 81), (16, 16, 1))),
            ("ltx-video-0.9.7-dev", ((512, 704, 121), (64, 96, 9), (1088, 1920, 161))),
            ("cogvideox-5b", ((480, 720, 49), (64, 48, 9))),
            ("mochi-1-preview", ((480, 848, 79), (64, 48, 7), (720, 1280, 61))),
        ],
    )
    def test_polynomials_hold_where_they_were_not_derived(
        self, key: str, sizes: tuple[tuple[int, int, int], ...]
    ) -> None:
        for size in sizes:
            found = features(ROOT, [Point(key, *size, 9)])
            want = _row(load_model(ROOT, key), size, 9)
            got = np.array([getattr(found, f.name)[0] for f in fields(Features)])
            assert got == pytest.approx(want, rel=1e-6)

    @pytest.mark.parametrize("key", ["animatediff-lightning", "tiny-animatediff"])
    def test_a_u_nets_levels_add_up(self, key: str) -> None:
        """Sides that halve evenly and that do not, from a latent pixel to 4K, one frame and more."""
        sizes = [(8, 8, 1), (512, 512, 16), (8, 1000, 7), (520, 776, 32), (1088, 1928, 16), (2160, 3840, 5)]
        found = features(ROOT, [Point(key, *size, 9) for size in sizes])
        got = np.array([getattr(found, f.name) for f in fields(Features)]).T
        want = [_row(load_model(ROOT, key), size, 9) for size in sizes]
        assert got == pytest.approx(np.array(want), rel=1e-12)

    @pytest.mark.parametrize("size", [(1, 1, 1), (16, 64, 64), (32, 33, 95), (129, 40, 71)])
    def test_a_u_nets_attention_is_filled_up_to_tiles(self, size: tuple[int, int, int]) -> None:
        """Block after block: heads to 64 values, lengths to 128 tokens, text's 77 too."""
        config = load_model(ROOT, "animatediff-lightning").components["unet"].config
        frames, rows, columns = size

        def filled(count: int, tile: int) -> int:
            return math.ceil(count / tile) * tile

        expected = 0
        for block in animatediff.blocks(config):
            pixels = math.ceil(rows / 2**block.level) * math.ceil(columns / 2**block.level)
            width = 8 * filled(block.outputs // 8, 64)
            if block.attends:
                queries = filled(pixels, 128)
                expected += frames * 4 * queries * (queries + 128) * width
            if block.moves:
                expected += pixels * 2 * 4 * filled(frames, 128) ** 2 * width
        assert animatediff.executed_attention_flop(config, *size, 77) == expected

    @pytest.mark.parametrize(("asked", "run"), [(84, 85), (81, 81), (82, 81), (1, 1)])
    def test_frames_are_rounded_as_wan_does(self, asked: int, run: int) -> None:
        assert executed(load_model(ROOT, WAN), asked) == run
        prediction = predict_points(
            ROOT, presumed_calibration(ROOT, "h200"), [Point(WAN, 480, 832, asked, 5)]
        )
        assert ("rounded" in prediction.notes[0]) == (asked != run)
        assert prediction.work.num_frames[0] == run

    def test_frames_of_the_others_are_rounded_down(self) -> None:
        assert executed(load_model(ROOT, "mochi-1-preview"), 84) == 79
        assert executed(load_model(ROOT, "animatediff-lightning"), 13) == 13


class TestFit:
    def test_exact_costs_are_predicted_exactly_however_far_from_the_presumed(self) -> None:
        moved = {"pace": 0.4, "attention": -0.35, "convolution_float32": -0.25, "call": 0.7, "video": 0.5}
        seconds, energy = machine(POINTS, moved)
        held_out = [i for i in range(len(POINTS)) if i not in CALIBRATED_WITH]
        found = predict_points(ROOT, fitted(moved), [POINTS[i] for i in held_out])
        assert found.latency_s == pytest.approx(seconds[held_out], rel=0.012)
        assert found.gpu_energy_Wh == pytest.approx(energy[held_out], rel=0.012)
        assert np.all((found.latency_s_low < seconds[held_out]) & (seconds[held_out] < found.latency_s_high))

    def test_more_noise_widens_the_interval(self) -> None:
        quiet, loud = (predict_points(ROOT, fitted({}, noise), POINTS) for noise in (0.001, 0.06))
        assert np.all(loud.latency_s_high / loud.latency_s > quiet.latency_s_high / quiet.latency_s)

    def test_boards_are_told_apart(self) -> None:
        seconds, energy = machine(POINTS, {})
        pace = np.where(np.arange(len(POINTS)) % 2 == 0, 1.0, 1.03)
        boards = ["a" if i % 2 == 0 else "b" for i in range(len(POINTS))]
        named = [p._replace(board=b) for p, b in zip(POINTS, boards, strict=True)]
        found = calibrate(ROOT, named, seconds * pace, energy * pace, "h200")
        assert found.boards == ["a", "b"]
        difference = found.time.mean[-1] - found.time.mean[-2]
        assert difference == pytest.approx(np.log(1.03), rel=0.25)
        at_default = POINTS[3]
        known, unknown = (predict_points(ROOT, found, [at_default._replace(board=b)]) for b in ("b", ""))
        assert known.latency_s[0] > unknown.latency_s[0]
        assert unknown.latency_s_high[0] / unknown.latency_s[0] > known.latency_s_high[0] / known.latency_s[0]

    def test_derivatives(self) -> None:
        limits = load_accelerator(ROOT, "h200")
        others = [Point("cogvideox-2b", 480, 720, 49, 50), Point("animatediff-lightning", 512, 512, 16, 4)]
        work = features(ROOT, [*POINTS, *others])
        shares = np.random.default_rng(0).random((len(work), 2))
        theta = np.concatenate([presumed_calibration(ROOT, "h200").time.mean, [0.01, -0.02]])
        theta[TIME_NAMES.index("attention_slope")] = 0.02
        found = times(theta, shares, work, limits).derivatives
        for index in range(len(theta)):
            up, down = theta.copy(), theta.copy()
            up[index] += 1e-5
            down[index] -= 1e-5
            ends = [np.log(times(x, shares, work, limits).part_s.sum(axis=1)) for x in (up, down)]
            assert found[:, index] == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-5)

    @pytest.mark.parametrize("dof", [4, 6, 12, 100])
    def test_students_quantile(self, dof: float) -> None:
        assert student90(dof) == pytest.approx(student_t.ppf(0.95, dof), rel=2e-3)

    def test_points_by_work(self) -> None:
        assert picked_by_work(np.array([5.0, 1, 4, 2, 3]), 3).tolist() == [0, 1, 4]
        assert picked_by_work(np.array([5.0, 1]), 4).tolist() == [0, 1]


@contextmanager
def untraced() -> Iterator[None]:
    """As in a process of its own: no coverage is taken meanwhile, and what other tests left is not collected.

    Noting every line takes longer than running it, and so does going through all that torch has made.
    """
    measured = Coverage.current()
    if measured:
        measured.stop()
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if measured:
            measured.start()


class TestPredictions:
    def test_parts_add_up(self) -> None:
        found = predict_points(ROOT, fitted({}), POINTS)
        assert found.class_s.shape == (len(POINTS), len(CLASSES))
        assert found.class_s.sum(axis=1) == pytest.approx(found.latency_s)
        assert found.class_Wh.sum(axis=1) == pytest.approx(found.gpu_energy_Wh)

    def test_an_accelerator_that_nobody_measured_is_said_and_wide(self) -> None:
        for key in ("a100-sxm", "l4", "mi325x"):
            found = predict_points(ROOT, presumed_calibration(ROOT, key), POINTS[:3])
            assert all("no calibration" in note for note in found.notes)
            assert np.all(found.latency_s_high / found.latency_s > 1.5)

    def test_extrapolation_is_said_and_widens(self) -> None:
        calibration = fitted({}, which=[0, 1, 2, 9, 10, 12])
        inside = predict_points(ROOT, calibration, [Point(WAN, 480, 832, 81, 50)])
        outside = predict_points(ROOT, calibration, [Point(WAN, 1088, 1920, 81, 50)])
        other = predict_points(ROOT, calibration, [Point("wan2.1-t2v-14b", 480, 832, 81, 50)])
        assert inside.notes == [""]
        assert "extrapolated: 171360 tokens" in outside.notes[0]
        assert "not among the calibrated models" in other.notes[0]
        width = [p.latency_s_high[0] / p.latency_s[0] for p in (inside, outside, other)]
        assert width[0] < min(width[1:])

    @pytest.mark.parametrize("keys", [*((key,) for key in MODELS), MODELS], ids=",".join)
    def test_ten_thousand_in_two_seconds(self, keys: tuple[str, ...]) -> None:
        """Of one model, and of all at random."""
        rng, points = np.random.default_rng(0), []
        for key in keys:
            limits, count = load_model(ROOT, key).limits, -(-10_000 // len(keys))
            sides = limits.size_multiple * rng.integers(10, 100, (count, 2))
            frames = rng.integers(5, (limits.max_frames or 119) + 1, count)
            points += [
                Point(key, int(h), int(w), int(f), 50) for (h, w), f in zip(sides, frames, strict=True)
            ]
        points = [points[i] for i in rng.permutation(len(points))]
        calibration = fitted({})
        with untraced():
            assert scaled_s(lambda: predict_points(ROOT, calibration, points), enough_s=2) < 2

    def test_it_needs_neither_torch_nor_scipy(self) -> None:
        code = (
            "import sys; from t2v_energy.cli import main; "
            f"main(['--root', {str(ROOT)!r}, 'predict', '--model', {WAN!r}]); "
            "assert not {'torch', 'scipy', 'pandas'} & set(sys.modules), 'slow to import'"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


class TestFiles:
    def test_a_calibration_survives_its_file(self, tmp_path: Path) -> None:
        calibration = fitted({"attention": -0.2}, noise=0.01)
        path = tmp_path / "c.json"
        path.write_text(to_json(calibration), encoding="utf-8")
        read = read_calibration(path)
        before, after = (predict_points(ROOT, c, POINTS) for c in (calibration, read))
        assert after.latency_s == pytest.approx(before.latency_s, rel=1e-5)
        assert after.gpu_energy_Wh_high == pytest.approx(before.gpu_energy_Wh_high, rel=1e-4)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 2}'])
    def test_what_is_no_calibration(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "c.json"
        path.write_text(text)
        with pytest.raises(UserError, match=r"c\.json"):
            read_calibration(path)

    def test_parameters_of_another_version(self, tmp_path: Path) -> None:
        data = json.loads(to_json(fitted({})))
        data["time"]["names"][0] = "speed"
        path = tmp_path / "c.json"
        path.write_text(json.dumps(data))
        with pytest.raises(UserError, match="not this version's"):
            read_calibration(path)

    def test_the_shipped_file_of_what_is_presumed(self) -> None:
        presumed = load_presumed(ROOT)
        assert set(TIME_NAMES) < set(type(presumed.time).model_fields)
        assert tuple(type(presumed.power).model_fields) == POWER_NAMES


class TestRefusals:
    SECONDS, ENERGY = machine(POINTS, {})

    def refused(
        self, which: list[int], seconds: np.ndarray | None = None, energy: np.ndarray | None = None
    ) -> str:
        s, e = (self.SECONDS if seconds is None else seconds), (self.ENERGY if energy is None else energy)
        with pytest.raises(UserError) as caught:
            calibrate(ROOT, [POINTS[i] for i in which], s[which], e[which], "h200")
        return str(caught.value)

    def test_too_few(self) -> None:
        assert "3 distinct configurations are too few" in self.refused([0, 1, 2, 2, 1])

    def test_steps_alone_are_collinear(self) -> None:
        assert "collinear" in self.refused([9, 10, 11, 12])

    def test_joules_and_milliseconds(self) -> None:
        joules = self.ENERGY * 3600
        assert "joules" in self.refused(CALIBRATED_WITH, energy=joules)
        assert "kilowatt-hours" in self.refused(CALIBRATED_WITH, energy=self.ENERGY / 1000)
        assert "milliseconds" in self.refused(CALIBRATED_WITH, self.SECONDS * 1e4, self.ENERGY * 1e4)
        assert "minutes" in self.refused(CALIBRATED_WITH, self.SECONDS / 60)

    @pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
    def test_no_positive_number(self, bad: float) -> None:
        seconds = self.SECONDS.copy()
        seconds[2] = bad
        assert "point 2 (wan2.1-t2v-1.3b 480x832" in self.refused(CALIBRATED_WITH, seconds)

    @pytest.mark.parametrize(
        ("point", "said"),
        [
            (Point("wan2.1-1.3b", 480, 832, 81, 50), "did you mean 'wan2.1-t2v-1.3b'"),
            (Point(WAN, -480, 832, 81, 50), "height: -480 must be positive"),
            (Point(WAN, 481, 832, 81, 50), "the nearest is 480"),
            (Point(WAN, 480, 832, 0, 50), "num_frames: 0 must be positive"),
            (Point(WAN, 480, 832, 81, 0), "num_inference_steps: 0"),
            (Point("animatediff-lightning", 512, 512, 64, 4), "use 32 or fewer"),
        ],
    )
    def test_sizes_that_cannot_be(self, point: Point, said: str) -> None:
        with pytest.raises(UserError) as caught:
            predict_points(ROOT, presumed_calibration(ROOT, "h200"), [point])
        assert said in str(caught.value)

    def test_an_unknown_accelerator(self) -> None:
        with pytest.raises(UserError, match="unknown accelerator"):
            presumed_calibration(ROOT, "h20")
