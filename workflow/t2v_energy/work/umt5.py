"""Closed forms of the UMT5 text encoder, as transformers' UMT5EncoderModel executes it.

The study's equation 8 has a feed-forward network of two matrices and f_text = 2.5; UMT5-XXL's is gated and
has three (4·d·F becomes 6·d·F), and its heads' joint width need not equal the model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# UMT5Config's own defaults: a published configuration may leave them out.
DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 250112,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "relative_attention_num_buckets": 32,
    "feed_forward_proj": "gated-gelu",
}


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the class's defaults filled in."""
    return {**DEFAULTS, **config}


def forward_flop(config: Mapping[str, Any], tokens: int) -> int:
    """FLOP of one pass over ``tokens`` tokens, padding included (eq. 8 with a gated network)."""
    c = settings(config)
    inner = c["num_heads"] * c["d_kv"]
    attention = 8 * tokens * c["d_model"] * inner + 4 * tokens**2 * inner
    network = 2 * _matrices(c) * tokens * c["d_model"] * c["d_ff"]
    return int(c["num_layers"] * (attention + network))


def parameter_count(config: Mapping[str, Any]) -> int:
    """Number of learnt parameters, the token embedding included."""
    c = settings(config)
    d = c["d_model"]
    inner = c["num_heads"] * c["d_kv"]
    positions = c["relative_attention_num_buckets"] * c["num_heads"]  # UMT5 has a table in every layer
    layer = 4 * d * inner + positions + _matrices(c) * d * c["d_ff"] + 2 * d
    return int(c["vocab_size"] * d + c["num_layers"] * layer + d)


def _matrices(config: Mapping[str, Any]) -> int:
    """Matrices of the feed-forward network: three where it is gated."""
    return 3 if config["feed_forward_proj"].startswith("gated") else 2
