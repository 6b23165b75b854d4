"""Closed forms of Wan's diffusion transformer, as diffusers' WanTransformer3DModel executes it.

L: video tokens, m: text tokens, d: width, F: inner width of the feed-forward network, N: layers.  They are
the study's equations 3 to 6 and 10 with the configuration's own values, its inner width F in place of f·d,
and with the embeddings, which the study leaves out.  Counts are FLOP of one forward pass of one sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from t2v_energy.errors import UserError

# The class's own defaults: a published configuration may leave them out.
DEFAULTS: Mapping[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "cross_attn_norm": True,
    "image_dim": None,
    "added_kv_proj_dim": None,
}


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the class's defaults filled in.

    Raises:
        UserError: the transformer takes images as well (``image_dim``, ``added_kv_proj_dim``).
    """
    complete = {**DEFAULTS, **config}
    for key in ("image_dim", "added_kv_proj_dim"):
        if complete[key] is not None:
            raise UserError(
                f"{key}: {complete[key]} adds attention to an image, which is not counted",
                where="components.transformer.config",
                remedy="use a text-to-video configuration of Wan",
            )
    return complete


def width(config: Mapping[str, Any]) -> int:
    """Width d of the transformer."""
    complete = settings(config)
    return int(complete["num_attention_heads"] * complete["attention_head_dim"])


def token_count(config: Mapping[str, Any], frames: int, rows: int, columns: int) -> int:
    """Tokens L of a latent of ``frames`` × ``rows`` × ``columns`` (eq. 1, with whole latent frames)."""
    patch = settings(config)["patch_size"]
    return prod(size // step for size, step in zip((frames, rows, columns), patch, strict=True))


def forward_flop(config: Mapping[str, Any], tokens: int, text_tokens: int) -> dict[str, int]:
    """FLOP of one forward pass by operator: eqs. 3, 5, 6, 10, and the embeddings.

    ``timestep_mlp`` is independent of ``tokens`` and runs once a pass, not once a layer.
    """
    c = settings(config)
    d, layers, m = width(c), c["num_layers"], text_tokens
    patch_volume = prod(c["patch_size"])
    patches = 2 * tokens * patch_volume * d * (c["in_channels"] + c["out_channels"])
    return {
        "self_attention": layers * (8 * tokens * d**2 + 4 * tokens**2 * d),
        "cross_attention": layers * (4 * tokens * d**2 + 4 * m * d**2 + 4 * tokens * m * d),
        "mlp": layers * 4 * tokens * d * c["ffn_dim"],
        "timestep_mlp": 2 * (c["freq_dim"] * d + d**2 + 6 * d**2),
        "embeddings": patches + 2 * m * (c["text_dim"] * d + d**2),
    }


def attention_product_flop(config: Mapping[str, Any], tokens: int, text_tokens: int) -> int:
    """FLOP of QKᵀ and PV alone, self- and cross-attention, of one forward pass (eqs. 3 and 5, parts)."""
    layers: int = settings(config)["num_layers"]
    return layers * 4 * tokens * (tokens + text_tokens) * width(config)


def parameter_count(config: Mapping[str, Any]) -> int:
    """Number of learnt parameters."""
    c = settings(config)
    d, inner, patch_volume = width(c), c["ffn_dim"], prod(c["patch_size"])
    attention = 4 * _linear(d, d) + 2 * d  # projections, and the norms of queries and keys
    norm = 2 * d if c["cross_attn_norm"] else 0
    block = 2 * attention + norm + _linear(d, inner) + _linear(inner, d) + 6 * d
    time = _linear(c["freq_dim"], d) + _linear(d, d) + _linear(d, 6 * d)
    text = _linear(c["text_dim"], d) + _linear(d, d)
    ends = _linear(c["in_channels"] * patch_volume, d) + _linear(d, c["out_channels"] * patch_volume) + 2 * d
    return int(c["num_layers"] * block + time + text + ends)


def activation_bytes(config: Mapping[str, Any], tokens: int, bytes_per_value: int) -> int:
    """Rough peak of live activations in one block (bytes).

    The larger of the feed-forward network (stream, normalised stream, inner values before and after GELU)
    and attention (stream, normalised stream, q, k, v, rotated q and k, output), plus two float32 copies of
    the stream that the norms make.  An estimate: allocator slack and kernel workspaces are left out.
    """
    d, inner = width(config), int(settings(config)["ffn_dim"])
    values = max(2 * d + 2 * inner, 8 * d)
    return tokens * (values * bytes_per_value + 2 * d * 4)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs
