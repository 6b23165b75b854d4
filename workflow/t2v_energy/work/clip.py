"""Closed forms of CLIP's text encoder, as transformers' CLIPTextModel (AnimateDiff) and
CLIPTextModelWithProjection (ContentV) execute it.

Its attention is causal, but torch's counter and most kernels do the whole square; so is it counted here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from t2v_energy.work.layers import complete, linear_flop, linear_parameters, product_flop

# CLIPTextConfig's own defaults: a published configuration may leave them out.
DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "max_position_embeddings": 77,
    "projection_dim": 512,
}


def forward_flop(config: Mapping[str, Any], tokens: int) -> int:
    """FLOP of one pass over ``tokens`` tokens, padding included: N (8 m d² + 4 m² d + 4 m d F)."""
    c = complete(DEFAULTS, config)
    d, inner = c["hidden_size"], c["intermediate_size"]
    attention = linear_flop(tokens, d, 4 * d) + product_flop(tokens, tokens, d)
    return int(c["num_hidden_layers"] * (attention + 2 * linear_flop(tokens, d, inner)))


def parameter_count(config: Mapping[str, Any]) -> int:
    """Number of learnt parameters, the embeddings of tokens and positions included."""
    c = complete(DEFAULTS, config)
    d, inner = c["hidden_size"], c["intermediate_size"]
    norms = 2 * 2 * d
    layer = 4 * linear_parameters(d, d) + linear_parameters(d, inner) + linear_parameters(inner, d) + norms
    embeddings = (c["vocab_size"] + c["max_position_embeddings"]) * d
    return int(embeddings + c["num_hidden_layers"] * layer + 2 * d)


def projected_forward_flop(config: Mapping[str, Any], tokens: int) -> int:
    """The same with the projection of the pooled vector, which is that of one token."""
    c = complete(DEFAULTS, config)
    return forward_flop(c, tokens) + linear_flop(1, c["hidden_size"], c["projection_dim"])


def projected_parameter_count(config: Mapping[str, Any]) -> int:
    """The same with that projection, which has no bias."""
    c = complete(DEFAULTS, config)
    return parameter_count(c) + linear_parameters(c["hidden_size"], c["projection_dim"], bias=False)
