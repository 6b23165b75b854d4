"""Closed forms of the T5 text encoder (CogVideoX, LTX-Video, Mochi), as transformers' T5EncoderModel runs it.

Its layers are those of UMT5 (:mod:`t2v_energy.work.umt5`); only the first has a table of relative positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from t2v_energy.work import umt5
from t2v_energy.work.layers import complete

# T5Config's own defaults: a published configuration may leave them out.
DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "feed_forward_proj": "relu",
}


def forward_flop(config: Mapping[str, Any], tokens: int) -> int:
    """FLOP of one pass over ``tokens`` tokens, padding included (a mask saves no operation)."""
    return umt5.forward_flop(complete(DEFAULTS, config), tokens)


def parameter_count(config: Mapping[str, Any]) -> int:
    """Number of learnt parameters, the token embedding included."""
    c = complete(DEFAULTS, config)
    tables = c["relative_attention_num_buckets"] * c["num_heads"]
    return umt5.parameter_count(c) - (c["num_layers"] - 1) * tables
