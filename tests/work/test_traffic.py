"""Element-wise traffic: what is stored is what traces of the real modules give."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
from t2v_energy.config import load_model
from t2v_energy.study import load_study
from t2v_energy.work import traffic
from t2v_energy.work.architectures import latents
from t2v_energy.work.wan import elementwise_bytes

ROOT = tiny.ROOT


def tracing() -> Any:
    return pytest.importorskip("t2v_energy.work.traffic_trace")


def test_every_model_of_the_study_has_it() -> None:
    assert all(traffic.has_traffic(key) for key in load_study(ROOT).models)
    assert not traffic.has_traffic("unheard-of")


@pytest.mark.parametrize("size", [(112, 144, 25), (176, 128, 33)])
def test_a_tiny_model_at_sizes_that_gave_no_coefficients(size: tuple[int, int, int]) -> None:
    model = load_model(ROOT, "tiny-wan")
    first, last = latents(model, *size)
    call, decoding = tracing().denoiser_traffic(model, size), tracing().decoder_traffic(model, size)
    assert traffic.denoiser_bytes("tiny-wan", first) == pytest.approx(call.bytes, rel=1e-3)
    assert traffic.denoiser_kernels("tiny-wan") == pytest.approx(call.kernels, rel=0.01)
    # Padding adds a border, whose part is larger the smaller the frame: no term of the coefficients is of it.
    assert traffic.decoder_bytes("tiny-wan", last) == pytest.approx(decoding.bytes, rel=0.015)


def test_the_decoder_of_wan_at_a_usual_size() -> None:
    model = load_model(ROOT, "wan2.1-t2v-1.3b")
    size = (480, 832, 17)
    decoding = tracing().decoder_traffic(model, size)
    assert traffic.decoder_bytes(model.key, latents(model, *size)[1]) == pytest.approx(
        decoding.bytes, rel=2e-3
    )


def test_wans_agrees_with_the_kernels_that_were_counted_by_hand() -> None:
    model = load_model(ROOT, "wan2.1-t2v-1.3b")
    latent = (21, 90, 160)
    tokens = 75_600
    by_hand = elementwise_bytes(model.components["transformer"].config, tokens)
    assert traffic.denoiser_bytes(model.key, latent) == pytest.approx(by_hand, rel=0.06)


def test_products_and_attention_are_no_traffic() -> None:
    torch = pytest.importorskip("torch")
    a = torch.empty(8, 16, device="meta", dtype=torch.bfloat16)
    b = torch.empty(16, 4, device="meta", dtype=torch.bfloat16)
    product = tracing().counted(lambda: a @ b)
    assert (product.bytes, product.kernels) == (0, 1)
    added = tracing().counted(lambda: (a + a).transpose(0, 1))
    assert (added.bytes, added.kernels) == (3 * 8 * 16 * 2, 1)
    q = torch.empty(1, 2, 8, 4, device="meta")
    attention = tracing().counted(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert (attention.bytes, attention.kernels) == (0, 1)
