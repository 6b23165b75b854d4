"""What a changed pipeline makes against what the unchanged one makes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from t2v_energy.measurement.fidelity import Output, compare  # noqa: E402

RANDOM = np.random.default_rng(1)
FRAMES = RANDOM.random((3, 32, 48, 3), dtype=np.float32) * 0.8


def output(frames: Any = FRAMES, scale: float = 1.0) -> Output:
    return Output(scale * torch.linspace(-1, 1, 60).reshape(1, 3, 5, 4), frames)


def test_the_same_to_the_bit() -> None:
    found = compare(output(), output(), 4, "cpu")
    assert (found.steps, found.relative_l2, found.psnr_db) == (4, 0.0, None)
    assert found.ssim == pytest.approx(1)
    assert found.temporal_flickering == found.reference_temporal_flickering


def test_psnr_and_relative_l2_are_those_of_their_definitions() -> None:
    found = compare(output(FRAMES + np.float32(0.1), 1.25), output(), 2, "cpu")
    # a mean squared error of 0.01 is 20 dB below a range of 1
    assert found.psnr_db == pytest.approx(20, abs=1e-3)
    assert found.relative_l2 == pytest.approx(0.25, rel=1e-6)
    assert 0.5 < found.ssim < 1


def test_ssim_of_what_has_nothing_in_common_is_near_nought() -> None:
    other = RANDOM.random(FRAMES.shape, dtype=np.float32) * 0.8
    assert abs(compare(output(other), output(), 2, "cpu").ssim) < 0.1


def test_flickering_is_one_of_a_still_and_falls_with_change() -> None:
    still = np.repeat(FRAMES[:1], 3, axis=0)
    jumping = np.stack([np.full((32, 48, 3), value, np.float32) for value in (0.0, 0.3, 0.0)])
    found = compare(output(jumping), output(still), 2, "cpu")
    assert found.reference_temporal_flickering == 1
    assert found.temporal_flickering == pytest.approx(0.7)


def test_a_single_frame_cannot_flicker() -> None:
    assert compare(output(FRAMES[:1]), output(FRAMES[:1]), 2, "cpu").temporal_flickering is None


def test_multiscale_where_the_smallest_scale_has_room_for_the_window() -> None:
    large = RANDOM.random((2, 176, 176, 3), dtype=np.float32)
    assert compare(output(large), output(large), 2, "cpu").ms_ssim == pytest.approx(1)
    assert compare(output(), output(), 2, "cpu").ms_ssim is None
    noise = np.clip(large + 0.3 * RANDOM.standard_normal(large.shape, dtype=np.float32), 0, 1)
    worse = compare(output(noise), output(large), 2, "cpu").ms_ssim
    assert worse is not None
    assert worse < 0.95


def test_latents_are_copied_to_the_host() -> None:
    kept = Output(torch.ones(1, 2, dtype=torch.bfloat16), FRAMES).on_host()
    assert kept.latents.dtype == torch.float32
    assert kept.latents.device.type == "cpu"
