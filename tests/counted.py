"""FLOP of the denoiser calls of one real generation on the CPU, by torch's counter."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import plain_denoising as plain
import torch
from t2v_energy.interventions.base import Target
from torch.utils.flop_counter import FlopCounterMode


@dataclass
class Flop:
    """Of QKᵀ and PV, and of all other matrix products and convolutions."""

    attention: float
    dense: float


def attention_flop(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Two products of (…, queries, keys, width); torch counts none of its CPU kernel."""
    *batch, queries, width = query
    return 2 * prod(batch) * queries * key[-2] * (width + value[-1])


def loop_flop(target: Target) -> Flop:
    """Of the denoiser alone: what else a generation computes is not counted."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counters: list[Any] = []
    denoiser, original = target.denoiser, target.denoiser.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        counter = FlopCounterMode(display=False, custom_mapping={kernel: attention_flop})
        counters.append(counter)
        with counter:
            return original(*args, **kwargs)

    had_own = "forward" in vars(denoiser)
    denoiser.forward = forward
    try:
        plain.made(target.pipeline, target.configuration)
    finally:
        if had_own:
            denoiser.forward = original
        else:
            del denoiser.forward
    totals: dict[Any, float] = {}
    for counter in counters:
        for operator, flop in counter.get_flop_counts()["Global"].items():
            totals[operator] = totals.get(operator, 0) + flop
    attention = totals.get(kernel, 0.0)
    return Flop(attention, sum(totals.values()) - attention)
