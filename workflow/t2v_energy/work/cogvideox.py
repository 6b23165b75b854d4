"""Closed forms of CogVideoX's diffusion transformer, as diffusers' CogVideoXTransformer3DModel executes it.

L: video tokens, m: text tokens, n = L + m, d: width, t: width of the time embedding, N: layers.  Text and
video run through the same weights as one sequence of n tokens, in attention and in the feed-forward network.
Counts are FLOP of one forward pass of one sample; with guidance a call has a batch of two.
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
    "num_attention_heads": 30,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "time_embed_dim": 512,
    "ofs_embed_dim": None,
    "text_embed_dim": 4096,
    "num_layers": 30,
    "attention_bias": True,
    "patch_size": 2,
    "patch_size_t": None,
    "norm_elementwise_affine": True,
    "patch_bias": True,
}
MLP_EXPANSION = 4  # FeedForward's own default; the class has no option for it
MODULATIONS = 6  # shift, scale and gate, each for video and text


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the class's defaults filled in.

    Raises:
        UserError: options of CogVideoX 1.5, whose patches span frames (``patch_size_t``, ``ofs_embed_dim``).
    """
    c = complete(DEFAULTS, config)
    counted = {"patch_size_t": None, "ofs_embed_dim": None}
    refuse_other(c, "components.transformer.config", counted)
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
    """Video tokens L of a latent of ``frames`` × ``rows`` × ``columns``."""
    patch: int = settings(config)["patch_size"]
    return frames * (rows // patch) * (columns // patch)


def forward_flop(config: Mapping[str, Any], tokens: int, text_tokens: int) -> dict[str, int]:
    """FLOP of one forward pass of one sample by operator.

    ``self_attention`` is the joint one: N (8 n d² + 4 n² d).  ``timestep_mlp`` includes the modulations of
    all norms, which see one vector a sample.
    """
    c = settings(config)
    d, t, layers, joint = width(c), c["time_embed_dim"], c["num_layers"], tokens + text_tokens
    patch = c["patch_size"] ** 2
    ends = linear_flop(tokens, d, patch * (c["in_channels"] + c["out_channels"]))
    modulations = layers * 2 * linear_flop(1, t, MODULATIONS * d) + linear_flop(1, t, 2 * d)
    return {
        "self_attention": layers * (linear_flop(joint, d, 4 * d) + product_flop(joint, joint, d)),
        "mlp": layers * 2 * linear_flop(joint, d, MLP_EXPANSION * d),
        "timestep_mlp": linear_flop(1, d, t) + linear_flop(1, t, t) + modulations,
        "embeddings": ends + linear_flop(text_tokens, c["text_embed_dim"], d),
    }


def attention_product_flop(config: Mapping[str, Any], tokens: int, text_tokens: int) -> int:
    """FLOP of QKᵀ and PV alone of one forward pass of one sample: N · 4 (L + m)² d."""
    joint, layers = tokens + text_tokens, settings(config)["num_layers"]
    return int(layers * product_flop(joint, joint, width(config)))


def parameter_count(config: Mapping[str, Any]) -> int:
    """Number of learnt parameters; tables of positions are not learnt."""
    c = settings(config)
    d, t, bias = width(c), c["time_embed_dim"], c["attention_bias"]
    patch, inner = c["patch_size"] ** 2, MLP_EXPANSION * d
    norm = 2 * d if c["norm_elementwise_affine"] else 0
    attention = 3 * linear_parameters(d, d, bias=bias) + linear_parameters(d, d)
    attention += 2 * 2 * c["attention_head_dim"]  # layer norms of queries and keys
    modulated_norm = linear_parameters(t, MODULATIONS * d) + norm
    block = attention + 2 * modulated_norm + linear_parameters(d, inner) + linear_parameters(inner, d)
    time = linear_parameters(d, t) + linear_parameters(t, t)
    patches = linear_parameters(patch * c["in_channels"], d, bias=c["patch_bias"])
    text = linear_parameters(c["text_embed_dim"], d)
    out = 2 * norm + linear_parameters(t, 2 * d) + linear_parameters(d, patch * c["out_channels"])
    return int(c["num_layers"] * block + time + patches + text + out)


def activation_bytes(config: Mapping[str, Any], tokens: int, bytes_per_value: int) -> int:
    """Rough peak of live activations of one sample of ``tokens``, text and video (bytes)."""
    d = width(config)
    return transformer_activation_bytes(tokens, d, MLP_EXPANSION * d, bytes_per_value)
