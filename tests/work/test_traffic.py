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
    stored = traffic.denoiser_traffic("tiny-wan", first)
    assert stored["bytes"] == pytest.approx(call.bytes, rel=1e-3)
    assert stored["product_bytes"] == pytest.approx(call.product_bytes, rel=1e-3)
    assert stored["kernels"] == pytest.approx(call.kernels, rel=0.01)
    # Padding adds a border, whose part is larger the smaller the frame: no term of the coefficients is of it.
    decoded = traffic.decoder_traffic(model, last)
    assert decoded["bytes"] == pytest.approx(decoding.bytes, rel=0.015)
    assert decoded["convolution_bytes"] == pytest.approx(decoding.convolution_bytes, rel=0.015)
    assert decoded["kernels"] == pytest.approx(decoding.kernels, rel=0.01)


def test_the_decoder_of_wan_at_a_usual_size() -> None:
    model = load_model(ROOT, "wan2.1-t2v-1.3b")
    size = (480, 832, 17)
    decoding = tracing().decoder_traffic(model, size)
    stored = traffic.decoder_traffic(model, latents(model, *size)[1])
    assert stored["bytes"] == pytest.approx(decoding.bytes, rel=2e-3)
    assert stored["convolution_bytes"] == pytest.approx(decoding.convolution_bytes, rel=1e-2)


@pytest.mark.parametrize(
    ("key", "size"),
    [
        ("mochi-1-preview", (480, 848, 79)),  # its large convolutions are cut in time
        ("mochi-1-preview", (720, 1280, 31)),
        ("mochi-1-preview", (256, 320, 49)),  # none is
        ("tiny-mochi", (64, 48, 13)),
        ("tiny-mochi", (48, 96, 1)),
    ],
)
def test_mochis_decoder_is_counted_to_the_byte(key: str, size: tuple[int, int, int]) -> None:
    model = load_model(ROOT, key)
    decoding = tracing().decoder_traffic(model, size)
    counted = traffic.decoder_traffic(model, latents(model, *size)[1])
    assert counted.pop("group_norm_serial") == pytest.approx(decoding.group_norm_serial, rel=1e-12)
    assert counted == {name: n for name, n in decoding._asdict().items() if name in counted}


def test_mochis_decoder_at_some_sizes_is_cut_and_at_others_not() -> None:
    """Else the last test could not fail where it matters."""
    model = load_model(ROOT, "mochi-1-preview")
    kernels = {}
    for size in ((480, 848, 79), (256, 320, 79)):
        kernels[size] = traffic.decoder_traffic(model, latents(model, *size)[1])["kernels"]
    assert len(set(kernels.values())) == 2


def test_wans_agrees_with_the_kernels_that_were_counted_by_hand() -> None:
    model = load_model(ROOT, "wan2.1-t2v-1.3b")
    latent = (21, 90, 160)
    tokens = 75_600
    by_hand = elementwise_bytes(model.components["transformer"].config, tokens)
    assert traffic.denoiser_traffic(model.key, latent)["bytes"] == pytest.approx(by_hand, rel=0.06)


def test_every_count_of_animatediff_at_a_size_that_gave_none() -> None:
    model = load_model(ROOT, "tiny-animatediff")
    size = (96, 128, 12)
    call = tracing().denoiser_traffic(model, size)
    stored = traffic.denoiser_traffic(model.key, latents(model, *size)[0])
    for count in ("bytes", "convolution_bytes", "norm_rows", "group_norm_values", "kernels"):
        assert getattr(call, count) > 0
        assert stored[count] == pytest.approx(getattr(call, count), rel=0.03), count
    encoder = tracing().text_encoder_traffic(model)
    assert traffic.text_kernels(model.key) == encoder.kernels > 0


def test_norms_that_do_not_fill_the_device() -> None:
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    narrow = torch.empty(1000, 64, device="meta", dtype=torch.bfloat16)
    found = tracing().counted(lambda: functional.layer_norm(narrow, (64,)))
    assert found.norm_rows == pytest.approx(1000 * (1 - 2 * 64 * 2 / traffic.NARROW_BYTES))
    wide = torch.empty(1000, 4096, device="meta", dtype=torch.bfloat16)
    assert tracing().counted(lambda: functional.layer_norm(wide, (4096,))).norm_rows == 0
    video = torch.empty(2, 64, 8, 8, device="meta")
    groups = tracing().counted(lambda: functional.group_norm(video, 32))
    assert groups.group_norm_values == video.numel()
    assert groups.group_norm_serial == video.numel() / 64  # two samples of 32 groups
    many = torch.empty(16, 64, 8, 8, device="meta")
    assert tracing().counted(lambda: functional.group_norm(many, 32)).group_norm_serial == (
        many.numel() / traffic.BLOCKS
    )


def test_products_and_attention_are_no_traffic() -> None:
    torch = pytest.importorskip("torch")
    a = torch.empty(8, 16, device="meta", dtype=torch.bfloat16)
    b = torch.empty(16, 4, device="meta", dtype=torch.bfloat16)
    product = tracing().counted(lambda: a @ b)
    assert (product.bytes, product.product_bytes, product.kernels) == (0, 2 * (8 * 16 + 16 * 4 + 8 * 4), 1)
    added = tracing().counted(lambda: (a + a).transpose(0, 1))
    assert (added.bytes, added.kernels) == (3 * 8 * 16 * 2, 1)
    q = torch.empty(1, 2, 8, 4, device="meta")
    attention = tracing().counted(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert (attention.bytes, attention.kernels) == (0, 1)
