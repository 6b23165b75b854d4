"""The study's formulas, against the numbers that it prints or that follow from them by hand."""

from __future__ import annotations

import pytest
from t2v_energy.errors import UserError
from t2v_energy.work import OPERATORS, paper, paper_work


def test_one_pass_at_the_default_size() -> None:
    work = paper_work(720, 1280, 81, 50)
    assert work.tokens == 76500  # 21.25 · 45 · 80; the checkpoint sees 75 600
    assert work.flop_per_denoiser_call == pytest.approx(1.832e15, rel=3e-4)
    assert tuple(work.flop) == OPERATORS
    assert work.denoiser_calls == 100


def test_each_term_by_hand() -> None:
    work = paper_work(256, 256, 4, 1)  # ℓ = 2 · 16 · 16 = 512 = m, so that the terms are easy
    d, length, passes = 2048, 512, 2
    assert work.tokens == length
    assert work.flop["self_attention"] == passes * 32 * (8 * length * d**2 + 4 * length**2 * d)
    assert work.flop["cross_attention"] == passes * 32 * (8 * length * d**2 + 4 * length**2 * d)
    assert work.flop["mlp"] == passes * 32 * 16 * length * d**2
    assert work.flop["timestep_mlp"] == passes * (2 * 256 * d + 14 * d**2)
    assert work.flop["text_encoder"] == pytest.approx(7.628e12, rel=1e-4)
    assert work.flop["embeddings"] == 0
    assert work.attention_flop == passes * 32 * 8 * length**2 * d


def test_vae_by_hand_for_one_latent_pixel() -> None:
    # 8×8 pixels and 4 frames: one latent frame of one pixel; ⌈T/2⌉ = 2, T = 4.
    rows = [
        27 * 16 * 384,
        8 * 27 * 384 * 384,  # two in the middle, six of D1
        2 * 3 * 384 * 768,
        2 * 4 * 9 * 384 * 192,
        2 * 4 * 27 * (192 * 384 + 5 * 384 * 384),
        4 * 4 * 3 * 384 * 768,
        4 * 16 * 9 * 384 * 192,
        4 * 16 * 6 * 27 * 192 * 192,
        4 * 64 * 9 * 192 * 96,
        4 * 64 * 27 * 96 * 3,
    ]
    assert paper.vae_convolution_flop(8, 8, 4) == 2 * sum(rows)
    assert paper.vae_attention_flop(8, 8, 4) == 8 * 384**2 + 4 * 384


def test_frames_of_the_vae_are_rounded_up() -> None:
    assert paper.vae_attention_flop(64, 64, 81) == pytest.approx(21 * paper.vae_attention_flop(64, 64, 4))
    assert paper.vae_attention_flop(64, 64, 80) == pytest.approx(20 * paper.vae_attention_flop(64, 64, 4))


def test_sizes_need_not_be_multiples_and_the_length_is_not_rounded() -> None:
    length = (1 + 50 / 4) * (250 / 16) * (333 / 16)
    assert length != round(length)
    work = paper_work(250, 333, 50, 1)
    assert work.flop["mlp"] == pytest.approx(2 * 32 * 16 * length * 2048**2, rel=1e-12)
    assert work.tokens == round(length)


def test_latency_and_energy_are_near_the_study_s_own_measurements() -> None:
    """Three runs of this configuration on its H100 took 397.9, 410.0 and 417.3 s."""
    flop = paper_work(720, 1280, 81, 50).total_flop
    assert 397 < paper.latency_s(flop) < 418
    assert paper.energy_Wh(flop) == pytest.approx(700 * paper.latency_s(flop) / 3600)
    assert paper.latency_s(0.456 * 989e12) == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 64, 9, 1), "positive"), ((64, 64, 0, 1), "num_frames"), ((64, 64, 9, 0), "num_inference_steps")],
)
def test_impossible_requests_are_refused(arguments: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        paper_work(*arguments)
