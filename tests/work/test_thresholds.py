"""Thresholds solve their own intensities; element-wise traffic and the VAE's layers equal what runs."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

import pytest
from t2v_energy.config import load_accelerators, load_model
from t2v_energy.errors import UserError
from t2v_energy.work import paper, thresholds, wan, wan_vae

ROOT = Path(__file__).parents[2]
BETAS = (20.0, 153.0, 295.0)
LEFT_OUT = 2  # bytes a value at most for rotary tables and norms' statistics; the least kernel moves four


def config(component: str, key: str = "wan2.1-t2v-1.3b") -> dict[str, Any]:
    return dict(load_model(ROOT, key).components[component].config)


# --- intensities and thresholds -----------------------------------------------------------------------------


def test_intensities_are_flop_over_the_bytes_of_each_tensor() -> None:
    tokens, keys, d, inner, s = 1000, 512, 1536, 8960, 2
    # two products of tokens × d by d × keys; Q and O, K and V
    attention = 2 * 2 * tokens * keys * d / (s * (2 * tokens * d + 2 * keys * d))
    assert thresholds.attention_intensity(tokens, keys) == pytest.approx(attention)
    weights, activations = d * inner, tokens * d + tokens * inner
    one = 2 * tokens * d * inner / (s * (weights + activations))
    both = 4 * tokens * d * inner / (s * (2 * weights + 2 * activations))
    assert thresholds.gemm_intensity(tokens, d, inner) == pytest.approx(one)
    assert both == pytest.approx(one)  # so one threshold serves both products of an MLP


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    ("threshold", "intensity"),
    [
        (lambda b: thresholds.attention_threshold(b), lambda n: thresholds.attention_intensity(n)),
        (lambda b: thresholds.attention_threshold(b, 512), lambda n: thresholds.attention_intensity(n, 512)),
        (
            lambda b: thresholds.gemm_threshold(b, 1536, 8960),
            lambda n: thresholds.gemm_intensity(n, 1536, 8960),
        ),
        (
            lambda b: thresholds.study_mlp_threshold_solved(b, 2048, 4),
            lambda n: thresholds.study_mlp_intensity(n, 2048, 4),
        ),
    ],
)
def test_at_its_threshold_an_intensity_equals_the_balance(
    threshold: Callable[[float], float], intensity: Callable[[float], float], beta: float
) -> None:
    assert intensity(threshold(beta)) == pytest.approx(beta)
    assert intensity(0.9 * threshold(beta)) < beta < intensity(1.1 * threshold(beta))


def test_what_saturates_below_the_balance_never_gets_there() -> None:
    limit = thresholds.gemm_limit(1536, 8960)
    assert thresholds.gemm_intensity(1e12, 1536, 8960) == pytest.approx(limit, rel=1e-6)
    assert thresholds.gemm_threshold(1.001 * limit, 1536, 8960) == inf
    assert thresholds.gemm_threshold(0.999 * limit, 1536, 8960) < inf
    assert thresholds.attention_limit(512) == 512  # 2m/s with two bytes
    assert thresholds.attention_threshold(513, 512) == inf
    assert thresholds.attention_limit() == inf


def test_the_studys_formulas_give_its_numbers_and_hold_for_a_wide_model_only() -> None:
    beta = 295.0
    assert thresholds.study_attention_threshold(beta) == 295
    assert thresholds.study_mlp_threshold(beta) == 590
    wide = thresholds.study_mlp_threshold_solved(beta, 10**9, 4)
    assert wide == pytest.approx(thresholds.study_mlp_threshold(beta), rel=1e-5)
    assert thresholds.study_mlp_threshold_solved(beta, paper.WIDTH, paper.MLP_EXPANSION) > 1.5 * 590
    # the same bytes with twice the FLOP: the product's own intensity
    assert thresholds.gemm_intensity(700, 2048, 8192) == pytest.approx(
        2 * thresholds.study_mlp_intensity(700, 2048, 4)
    )


def test_streaming_keys_for_each_query_block_bounds_the_intensity() -> None:
    block = thresholds.QUERY_BLOCK
    once = thresholds.attention_intensity(block)
    assert thresholds.attention_intensity(block, query_block=block) == pytest.approx(once)
    assert thresholds.attention_limit(query_block=block) == 128
    long = thresholds.attention_intensity(1e9, query_block=block)
    assert long == pytest.approx(128, rel=1e-5)
    assert (
        thresholds.attention_intensity(75600, query_block=block) < 128 < thresholds.attention_intensity(75600)
    )
    # 512 keys: read 512/128 times as often as queries are
    assert thresholds.attention_intensity(1e9, 512, query_block=block) == pytest.approx(
        thresholds.attention_limit(512, query_block=block), rel=1e-5
    )


def test_exponentials_take_as_long_as_their_rate_says() -> None:
    # one exponential for 4 · 128 FLOP; a machine that makes one for every 512 FLOP takes as long for either
    assert thresholds.exponential_time_ratio(128, 512e12, 1e12) == pytest.approx(1)
    assert thresholds.exponential_time_ratio(64, 512e12, 1e12) == pytest.approx(2)


@pytest.mark.parametrize(("peak", "bandwidth"), [(0, 1), (1, 0), (-1, 1)])
def test_a_balance_needs_positive_values(peak: float, bandwidth: float) -> None:
    with pytest.raises(UserError, match="must be positive"):
        thresholds.balance(peak, bandwidth)


def test_every_accelerator_of_table_7_is_configured_as_printed() -> None:
    accelerators = load_accelerators(ROOT)
    assert len(thresholds.PRINTED) == 7
    for key in thresholds.PRINTED:
        assert accelerators[key].printed is not None, key


# --- element-wise traffic -----------------------------------------------------------------------------------


def traced_bytes(key: str, monkeypatch: pytest.MonkeyPatch, *, norms: bool) -> tuple[float, int]:
    """Bytes that one block's element-wise kernels move on the meta device, and the tokens.

    Attention is replaced by an empty result; so are the RMS norms unless ``norms``.
    """
    torch = pytest.importorskip("torch")
    trace = pytest.importorskip("t2v_energy.work.trace")
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_flatten

    module = trace.build_on_meta(load_model(ROOT, key).components["transformer"])
    kept = module._keep_in_fp32_modules
    for name, parameter in module.named_parameters():
        if not set(kept) & set(name.split(".")):
            parameter.data = parameter.data.to(torch.bfloat16)
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda query, *_, **__: torch.empty_like(query)
    )
    if not norms:
        monkeypatch.setattr(torch.nn.RMSNorm, "forward", lambda _, x: torch.empty_like(x))
    # views move nothing; matrix products are counted elsewhere
    free = (
        "view",
        "unsqueeze",
        "transpose",
        "permute",
        "slice",
        "unbind",
        "split",
        "expand",
        "alias",
        "empty",
    )
    free += ("addmm", "mm.", ".t.", "select", "squeeze")
    moved = 0

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal moved
            out = func(*args, **(kwargs or {}))
            if not any(part in str(func) for part in free):
                read = args[1:] if "copy_." in str(func) else (args, kwargs)
                for tensor in (*tree_flatten(read)[0], *tree_flatten(out)[0]):
                    if isinstance(tensor, torch.Tensor):
                        moved += tensor.numel() * tensor.element_size()
            return out

    tokens, d = 4000, wan.width(config("transformer", key))
    head = config("transformer", key)["attention_head_dim"]
    stream = torch.empty(1, tokens, d, dtype=torch.bfloat16, device="meta")
    text = torch.empty(1, 16, d, dtype=torch.bfloat16, device="meta")
    modulation = torch.empty(1, 6, d, dtype=torch.bfloat16, device="meta")
    rotary = (torch.empty(1, tokens, 1, head, device="meta"),) * 2
    with torch.no_grad(), Counter():
        module.blocks[0](stream, text, modulation, rotary)
    return moved, tokens


@pytest.mark.parametrize("key", ["wan2.1-t2v-1.3b"])
def test_elementwise_traffic_equals_a_trace_of_a_block(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moved, tokens = traced_bytes(key, monkeypatch, norms=True)
    c = config("transformer", key)
    expected = wan.elementwise_bytes(c, tokens, fused_norms=False) / c["num_layers"]
    assert 0 < (moved - expected) / (tokens * wan.width(c)) < LEFT_OUT


def test_elementwise_traffic_without_norms_equals_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    moved, tokens = traced_bytes("wan2.1-t2v-1.3b", monkeypatch, norms=False)
    c = config("transformer")
    fused = wan.elementwise_bytes(c, tokens) / c["num_layers"]
    norms = 3 * tokens * wan.width(c) * (2 + 2)  # three fused RMS norms: read bf16, write bf16
    assert 0 < (moved - (fused - norms)) / (tokens * wan.width(c)) < LEFT_OUT


def test_elementwise_traffic_is_proportional_to_tokens_and_layers() -> None:
    c = config("transformer")
    one = wan.elementwise_bytes(c, 100)
    assert wan.elementwise_bytes(c, 300) == pytest.approx(3 * one)
    assert wan.elementwise_bytes(c | {"num_layers": 60}, 100) == pytest.approx(2 * one)
    assert wan.elementwise_bytes(c, 100, fused_norms=False) > one
    wider = wan.elementwise_bytes(c | {"ffn_dim": 2 * c["ffn_dim"]}, 100)
    assert wider - one == 30 * 100 * c["ffn_dim"] * 4  # GELU reads and writes two bytes
    without_norm = wan.elementwise_bytes(c | {"cross_attn_norm": False}, 100)
    assert one - without_norm == 30 * 100 * 1536 * 8  # a layer norm in float32
    # far below any accelerator's balance, at any length
    assert wan.elementwise_operations(c, 100) / one < 1


# --- the VAE's layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 2, 21])
@pytest.mark.parametrize("key", ["wan2.1-t2v-1.3b", "tiny-wan"])
def test_layers_over_a_video_add_up_to_the_decoder(key: str, frames: int) -> None:
    vae = config("vae", key)
    rows, columns = 6, 10
    layers = wan_vae.decoded_layers(vae, frames, rows, columns)
    products = 4 * frames * (rows * columns) ** 2 * wan_vae.decoder_channels(vae)[0]
    total = sum(layer.flop * count for layer, count in layers) + products
    assert total == wan_vae.decode_flop(vae, frames, rows, columns)
    assert layers[0][0].stage == "post_quant_conv"
    assert layers[-1][0].stage == "conv_out"


def test_layers_have_the_frames_of_a_causal_decoder() -> None:
    layers = wan_vae.decoded_layers(config("vae"), 21, 6, 10)
    frames = {layer.stage: layer.frames for layer, _ in layers if layer.kernel == (3, 3, 3)}
    assert frames == {
        "conv_in": 21, "mid_block": 21, "up_blocks.0": 21, "up_blocks.1": 41,
        "up_blocks.2": 81, "up_blocks.3": 81, "conv_out": 81,
    }  # fmt: skip
    # the upsampling in time runs before the frames double, and never for the first frame
    assert [layer.frames for layer, _ in layers if layer.kernel == (3, 1, 1)] == [20, 40]
    one = wan_vae.decoded_layers(config("vae"), 1, 6, 10)
    assert all(layer.kernel != (3, 1, 1) and layer.frames == 1 for layer, _ in one)


def test_printed_rows_are_those_of_table_6() -> None:
    rows = paper.vae_convolutions(720, 1280, 81)
    names = list(dict.fromkeys(row.row for row in rows))
    assert names == [
        "D0", "Middle (RBs)", "D1 (RBs)", "Up (time) 1", "Up (space) 1", "D2 (RBs)", "Up (time) 2",
        "Up (space) 2", "D3 (RBs)", "Up (space) 3", "Head",
    ]  # fmt: skip
    head = rows[-1]
    assert head.flop == 2 * 27 * 96 * 3 * 81 * 720 * 1280
    assert sum(row.count * row.flop for row in rows) == paper.vae_convolution_flop(720, 1280, 81)
    assert [row.frames for row in rows if row.kernel == (3, 1, 1)] == [41, 81]
