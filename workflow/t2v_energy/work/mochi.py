"""Closed forms of Mochi's diffusion transformer, as diffusers' MochiTransformer3DModel executes it.

L: video tokens, m: text tokens with padding, v: those of them that are no padding, d: width of the video
stream, c: width of the text stream, N: layers.  Each stream has weights of its own; they meet in attention,
which drops the padding: all linear layers see m text tokens, attention sees v.  The last layer leaves the
text as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    "patch_size": 2,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "num_layers": 48,
    "pooled_projection_dim": 1536,
    "in_channels": 12,
    "out_channels": None,
    "text_embed_dim": 4096,
    "time_embed_dim": 256,
    "activation_fn": "swiglu",
}
MODULATIONS = 4  # scale and gate, of attention and of the feed-forward network
AXES = 3  # a position's: time, height, width


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the class's defaults filled in.

    Raises:
        UserError: a feed-forward network that is not gated (``activation_fn``).
    """
    c = complete(DEFAULTS, config)
    refuse_other(c, "components.transformer.config", {"activation_fn": "swiglu"})
    return c


def width(config: Mapping[str, Any]) -> int:
    """Width d of the video stream."""
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


def forward_flop(
    config: Mapping[str, Any], tokens: int, text_tokens: int, valid_tokens: Sequence[int]
) -> dict[str, int]:
    """FLOP by operator of one forward pass of as many samples as there are ``valid_tokens``, v of each.

    ``self_attention`` is the joint one.  ``embeddings`` includes the pooling of the prompt into one vector by
    attention, and the rotary angles (a product of positions and learnt frequencies, once a pass).
    """
    c = settings(config)
    d, text, layers, samples = width(c), c["pooled_projection_dim"], c["num_layers"], len(valid_tokens)
    linear = layers * _video_projections(c, tokens) + _text_projections(c, text_tokens)
    mlp = layers * _network(tokens, d) + (layers - 1) * _network(text_tokens, text)
    angles = linear_flop(tokens, AXES, d // 2)
    return {
        "self_attention": samples * linear + attention_product_flop(c, tokens, valid_tokens),
        "mlp": samples * mlp,
        "timestep_mlp": samples * _timestep(c),
        "embeddings": samples * _embeddings(c, tokens, text_tokens) + angles,
    }


def attention_product_flop(config: Mapping[str, Any], tokens: int, valid_tokens: Sequence[int]) -> int:
    """FLOP of QKᵀ and PV alone of one forward pass: N Σ 4 (L + v)² d over the samples."""
    c = settings(config)
    d = width(c)
    return int(c["num_layers"] * sum(product_flop(tokens + v, tokens + v, d) for v in valid_tokens))


def parameter_count(config: Mapping[str, Any]) -> int:
    """Number of learnt parameters."""
    c = settings(config)
    d, text, layers = width(c), c["pooled_projection_dim"], c["num_layers"]
    patch, pooled = c["patch_size"] ** 2, c["text_embed_dim"]
    norms = 4 * c["attention_head_dim"]  # of queries and keys of both streams
    video = 3 * d * d + linear_parameters(d, d) + linear_parameters(d, MODULATIONS * d) + 3 * d * _inner(d)
    context = linear_parameters(d, text) + linear_parameters(d, MODULATIONS * text) + 3 * text * _inner(text)
    last = linear_parameters(d, text)  # of the last layer's text there is only the norm before attention
    blocks = layers * (norms + video + 3 * text * d) + (layers - 1) * context + last
    time = linear_parameters(c["time_embed_dim"], d) + linear_parameters(d, d)
    pool = 3 * linear_parameters(pooled, pooled) + linear_parameters(pooled, d)
    caption = linear_parameters(pooled, text)
    patches = linear_parameters(patch * c["in_channels"], d) + linear_parameters(d, patch * _outputs(c))
    frequencies = AXES * d // 2
    return int(blocks + time + pool + caption + patches + linear_parameters(d, 2 * d) + frequencies)


def activation_bytes(config: Mapping[str, Any], tokens: int, bytes_per_value: int) -> int:
    """Rough peak of live activations of one sample of ``tokens``, text and video (bytes).

    The feed-forward network is gated: it has twice the inner values.
    """
    d = width(config)
    return transformer_activation_bytes(tokens, d, 2 * _inner(d), bytes_per_value)


def _inner(stream: int) -> int:
    """Inner width of a gated feed-forward network: two thirds of four times the stream's."""
    return 4 * stream * 2 // 3


def _network(rows: int, stream: int) -> int:
    """A gated feed-forward network: three matrices."""
    return 3 * linear_flop(rows, stream, _inner(stream))


def _video_projections(c: Mapping[str, Any], tokens: int) -> int:
    """Queries, keys, values and output of one layer."""
    d = width(c)
    return linear_flop(tokens, d, 4 * d)


def _text_projections(c: Mapping[str, Any], text_tokens: int) -> int:
    """The same for the text, all layers; the last has no output."""
    d, text, layers = width(c), c["pooled_projection_dim"], c["num_layers"]
    return int((3 * layers + layers - 1) * linear_flop(text_tokens, text, d))


def _timestep(c: Mapping[str, Any]) -> int:
    """The embedding of the timestep and all modulations; the last layer's text is only scaled."""
    d, text, layers = width(c), c["pooled_projection_dim"], c["num_layers"]
    video = layers * linear_flop(1, d, MODULATIONS * d)
    context = (layers - 1) * linear_flop(1, d, MODULATIONS * text) + linear_flop(1, d, text)
    ends = linear_flop(1, c["time_embed_dim"], d) + linear_flop(1, d, d) + linear_flop(1, d, 2 * d)
    return int(video + context + ends)


def _embeddings(c: Mapping[str, Any], tokens: int, text_tokens: int) -> int:
    """Patches in and out, the pooled prompt (one query, keys and values of the mean and of every token)."""
    d, text, pooled, patch = width(c), c["pooled_projection_dim"], c["text_embed_dim"], c["patch_size"] ** 2
    keys = text_tokens + 1
    ends = linear_flop(tokens, d, patch * (c["in_channels"] + _outputs(c)))
    pool = linear_flop(keys, pooled, 2 * pooled) + product_flop(1, keys, pooled)
    pool += linear_flop(1, pooled, pooled) + linear_flop(1, pooled, d)
    return ends + pool + linear_flop(text_tokens, pooled, text)


def _outputs(c: Mapping[str, Any]) -> int:
    return int(c["out_channels"] or c["in_channels"])
