"""Closed forms of LTX-Video's diffusion transformer, as diffusers' LTXVideoTransformer3DModel executes it.

L: video tokens, m: text tokens (all of them, for a mask saves no operation), d: width, N: layers.  Counts are
FLOP of one forward pass of one sample; with guidance a call has a batch of two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from t2v_energy.work.layers import (
    complete,
    linear_flop,
    linear_parameters,
    product_flop,
    refuse_other,
    transformer_activation_bytes,
)

# The class's own defaults: a published configuration may leave them out.
DEFAULTS: Mapping[str, Any] = {
    "in_channels": 128,
    "out_channels": 128,
    "patch_size": 1,
    "patch_size_t": 1,
    "num_attention_heads": 32,
    "attention_head_dim": 64,
    "cross_attention_dim": 2048,
    "num_layers": 28,
    "norm_elementwise_affine": False,
    "caption_channels": 4096,
    "attention_bias": True,
    "attention_out_bias": True,
}
MLP_EXPANSION = 4  # FeedForward's own default; the class has no option for it
TIMESTEP_WIDTH = 256  # of AdaLayerNormSingle
MODULATIONS = 6  # shift, scale and gate of attention and of the feed-forward network


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the class's defaults filled in.

    Raises:
        UserError: patches of more than one latent pixel, which no published model has.
    """
    c = complete(DEFAULTS, config)
    refuse_other(c, "components.transformer.config", {"patch_size": 1, "patch_size_t": 1})
    return c


def width(config: Mapping[str, Any]) -> int:
    """Width d of the transformer."""
    c = settings(config)
    return int(c["num_attention_heads"] * c["attention_head_dim"])


def patch_sides(config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of the latent that make one token."""
    side: int = settings(config)["patch_size"]
    return side, side


def token_count(config: Mapping[str, Any], frames: int, rows: int, columns: int) -> int:
    """Tokens L of a latent of ``frames`` × ``rows`` × ``columns``: one a latent pixel."""
    settings(config)  # refuses larger patches
    return frames * rows * columns


def forward_flop(config: Mapping[str, Any], tokens: int, text_tokens: int) -> dict[str, int]:
    """FLOP of one forward pass of one sample by operator.

    N (8 L d² + 4 L² d), N (4 L d² + 4 m d_text d + 4 L m d) and N (16 L d²); all layers share one modulation
    by the timestep.
    """
    c = settings(config)
    d, layers, m = width(c), c["num_layers"], text_tokens
    cross = linear_flop(tokens, d, 2 * d) + linear_flop(m, c["cross_attention_dim"], 2 * d)
    ends = linear_flop(tokens, d, c["in_channels"] + c["out_channels"])
    return {
        "self_attention": layers * (linear_flop(tokens, d, 4 * d) + product_flop(tokens, tokens, d)),
        "cross_attention": layers * (cross + product_flop(tokens, m, d)),
        "mlp": layers * 2 * linear_flop(tokens, d, MLP_EXPANSION * d),
        "timestep_mlp": linear_flop(1, TIMESTEP_WIDTH, d) + linear_flop(1, d, (1 + MODULATIONS) * d),
        "embeddings": ends + linear_flop(m, c["caption_channels"], d) + linear_flop(m, d, d),
    }


def attention_product_flop(config: Mapping[str, Any], tokens: int, text_tokens: int) -> int:
    """FLOP of QKᵀ and PV alone of one forward pass of one sample: N · 4 L (L + m) d."""
    layers = settings(config)["num_layers"]
    return int(layers * product_flop(tokens, tokens + text_tokens, width(config)))


def parameter_count(config: Mapping[str, Any]) -> int:
    """Number of learnt parameters."""
    c = settings(config)
    d, text, bias, inner = width(c), c["cross_attention_dim"], c["attention_bias"], MLP_EXPANSION * width(c)
    norms = 2 * d if c["norm_elementwise_affine"] else 0
    common = 2 * d + linear_parameters(d, d, bias=c["attention_out_bias"])  # norms of q and k, and output
    self_attention = 3 * linear_parameters(d, d, bias=bias) + common
    cross = linear_parameters(d, d, bias=bias) + 2 * linear_parameters(text, d, bias=bias) + common
    mlp = linear_parameters(d, inner) + linear_parameters(inner, d)
    block = self_attention + cross + mlp + norms + MODULATIONS * d
    time = linear_parameters(TIMESTEP_WIDTH, d) + linear_parameters(d, d)
    modulation = linear_parameters(d, MODULATIONS * d) + 2 * d
    caption = linear_parameters(c["caption_channels"], d) + linear_parameters(d, d)
    ends = linear_parameters(c["in_channels"], d) + linear_parameters(d, c["out_channels"])
    return int(c["num_layers"] * block + time + modulation + caption + ends)


def activation_bytes(config: Mapping[str, Any], tokens: int, bytes_per_value: int) -> int:
    """Rough peak of live activations of one sample (bytes)."""
    d = width(config)
    return transformer_activation_bytes(tokens, d, MLP_EXPANSION * d, bytes_per_value)
