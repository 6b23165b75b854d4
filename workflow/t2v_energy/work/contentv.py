"""Closed forms of ContentV's diffusion transformer, which executes the blocks of Stable Diffusion 3
(diffusers' SD3Transformer2DModel) on the tokens of a whole video.

L: video tokens, m: text tokens, d: width, N: layers.  Text and video have weights of their own and meet in
attention alone, over the n = L + m tokens of both.  Of the last layer's text only queries, keys and values
are computed: nothing reads what would come of it.  Counts are FLOP of one forward pass of one sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from t2v_energy.errors import UserError
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
    "in_channels": 16,
    "num_layers": 18,
    "attention_head_dim": 64,
    "num_attention_heads": 18,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1152,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "dual_attention_layers": (),
    "qk_norm": None,
}
MLP_EXPANSION = 4  # FeedForward's own default; the class has no option for it
MODULATIONS = 6  # shift, scale and gate, each for attention and feed-forward network
LAST_MODULATIONS = 2  # shift and scale: of the last layer's text, and of the output
TIMESTEP_CHANNELS = 256  # sines and cosines of the timestep; the class has no option for them


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the class's defaults filled in.

    Raises:
        UserError: a second attention in some layers, or other norms of queries and keys than ContentV's; a
            projection of the text to another width than the video's, which the class cannot run.
    """
    c = complete(DEFAULTS, config)
    c["dual_attention_layers"] = tuple(c["dual_attention_layers"])  # a list in a model file
    refuse_other(c, "components.transformer.config", {"dual_attention_layers": (), "qk_norm": "rms_norm"})
    d = c["num_attention_heads"] * c["attention_head_dim"]
    if c["caption_projection_dim"] != d:
        raise UserError(
            f"caption_projection_dim: {c['caption_projection_dim']} is not the width of the blocks",
            where="components.transformer.config",
            remedy=f"use num_attention_heads × attention_head_dim, {d}",
        )
    return c


def width(config: Mapping[str, Any]) -> int:
    """Width d of the transformer, of both streams."""
    return int(settings(config)["caption_projection_dim"])


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

    ``self_attention`` is the joint one: N (8 n d² + 4 n² d) − 2 m d².  ``timestep_mlp`` includes the pooled
    text's embedding, which is added to the timestep's, and the modulations of all norms, which see one vector
    a sample.
    """
    c = settings(config)
    d, layers, joint = width(c), c["num_layers"], tokens + text_tokens
    unread = linear_flop(text_tokens, d, d)  # the output projection of the last layer's text
    projections = layers * linear_flop(joint, d, 4 * d) - unread
    mlp = (layers * tokens + (layers - 1) * text_tokens) * 2 * linear_flop(1, d, MLP_EXPANSION * d)
    embedding = linear_flop(1, TIMESTEP_CHANNELS + c["pooled_projection_dim"], d) + 2 * linear_flop(1, d, d)
    ends = linear_flop(tokens, d, c["patch_size"] ** 2 * (c["in_channels"] + _outputs(c)))
    return {
        "self_attention": projections + attention_product_flop(c, tokens, text_tokens),
        "mlp": mlp,
        "timestep_mlp": embedding + linear_flop(1, d, _modulations(c) * d),
        "embeddings": ends + linear_flop(text_tokens, c["joint_attention_dim"], d),
    }


def attention_product_flop(config: Mapping[str, Any], tokens: int, text_tokens: int) -> int:
    """FLOP of QKᵀ and PV alone of one forward pass of one sample: N · 4 (L + m)² d."""
    joint, layers = tokens + text_tokens, settings(config)["num_layers"]
    return int(layers * product_flop(joint, joint, width(config)))


def parameter_count(config: Mapping[str, Any]) -> int:
    """Number of learnt parameters; the table of positions is not learnt."""
    c = settings(config)
    d, layers, patch = width(c), c["num_layers"], c["patch_size"] ** 2
    norms = 4 * c["attention_head_dim"]  # of queries and keys of both streams
    projections = (8 * layers - 1) * linear_parameters(d, d)
    inner = MLP_EXPANSION * d
    mlp = (2 * layers - 1) * (linear_parameters(d, inner) + linear_parameters(inner, d))
    embedding = linear_parameters(TIMESTEP_CHANNELS, d) + linear_parameters(c["pooled_projection_dim"], d)
    embedding += 2 * linear_parameters(d, d)
    patches = linear_parameters(patch * c["in_channels"], d) + linear_parameters(d, patch * _outputs(c))
    text = linear_parameters(c["joint_attention_dim"], d)
    modulations = linear_parameters(d, _modulations(c) * d)
    return int(layers * norms + projections + mlp + embedding + patches + text + modulations)


def activation_bytes(config: Mapping[str, Any], tokens: int, bytes_per_value: int) -> int:
    """Rough peak of live activations of one sample of ``tokens``, text and video (bytes)."""
    d = width(config)
    return transformer_activation_bytes(tokens, d, MLP_EXPANSION * d, bytes_per_value)


def _modulations(c: Mapping[str, Any]) -> int:
    """Vectors of width d that scale, shift and gate: both streams in every layer, and the output."""
    both: int = (2 * c["num_layers"] - 1) * MODULATIONS
    return both + LAST_MODULATIONS + LAST_MODULATIONS


def _outputs(c: Mapping[str, Any]) -> int:
    return int(c["out_channels"] or c["in_channels"])
