"""When is an operator bound by arithmetic, and when by memory?  The study's appendix B, and what it omits.

An operator's arithmetic intensity is FLOP over bytes moved to and from device memory.  It is bound by
arithmetic where that exceeds the accelerator's balance β = Θ_peak / B (FLOP/byte).  For ℓ tokens the appendix
solves intensity(ℓ) = β for ℓ*.  As there, every tensor moves once, s bytes a value.  Functions named
``study_`` are the appendix as printed; the others are derived here:

* Attention.  QKᵀ and PV take 4ℓ²d FLOP.  Q, K and V are read and O is written: 4ℓds bytes.  The appendix
  names these four tensors and writes 2ℓds.
* Matrix product.  A product of ℓ × i by i × o takes 2ℓio FLOP and moves (io + ℓi + ℓo)s bytes.  The
  appendix has fℓd² FLOP for the MLP (table 1: 4fℓd²) over the bytes of one of its two products, and drops a
  term of its own solution.  Both products of an MLP have the same intensity, so one solution serves both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

from t2v_energy.errors import UserError

BF16_BYTES = 2  # s
QUERY_BLOCK = 128
"""Queries for which FlashAttention-2 streams K and V once, heads of 128 without a causal mask (its
flash_fwd_launch_template.h: 128×64 blocks on A100 and H100, 128×32 on RTX 4090 and L4)."""
HOPPER_EXPONENTIALS_PER_S = 16 * 132 * 1.83e9
"""Exponentials that an H100 SXM makes a second: 16 a clock and multiprocessor (CUDA programming guide), 132
multiprocessors, 1.83 GHz.  FlashAttention-3 (arXiv:2407.08608) has the same, rounded to 3.9e12."""


@dataclass(frozen=True)
class PrintedThresholds:
    """A row of the study's table 7: its name there, β (FLOP/byte), and ℓ* of attention and MLP (tokens)."""

    name: str
    balance: float
    attention_tokens: float
    mlp_tokens: float


PRINTED: Mapping[str, PrintedThresholds] = {
    "h100-sxm": PrintedThresholds("NVIDIA H100 SXM", 295, 295, 590),
    "a100-sxm": PrintedThresholds("NVIDIA A100 SXM", 156, 156, 312),
    "rtx-4090": PrintedThresholds("RTX 4090", 330, 330, 660),
    "l4": PrintedThresholds("NVIDIA L4", 605, 605, 1210),
    "tpu-v6e": PrintedThresholds("TPU v6", 574, 574, 1148),
    "mi325x": PrintedThresholds("AMD M3250X", 417, 417, 834),
    "gaudi3": PrintedThresholds("Intel Gaudi3", 453, 453, 906),
}
"""Table 7 as printed, by key of config/accelerators.yaml; its peaks and bandwidths are in that file."""


def balance(peak_TFLOP_per_s: float, bandwidth_TB_per_s: float) -> float:
    """β = Θ_peak / B (FLOP/byte).

    Raises:
        UserError: a value that is not positive.
    """
    if peak_TFLOP_per_s <= 0 or bandwidth_TB_per_s <= 0:
        raise UserError(
            f"peak {peak_TFLOP_per_s} TFLOP/s and bandwidth {bandwidth_TB_per_s} TB/s must be positive",
            where="config/accelerators.yaml",
            remedy="give the vendor's values",
        )
    return peak_TFLOP_per_s / bandwidth_TB_per_s


# --- as printed ---------------------------------------------------------------------------------------------


def study_attention_threshold(beta: float, value_bytes: int = BF16_BYTES) -> float:
    """ℓ*_attn = sβ/2 as printed (tokens)."""
    return value_bytes * beta / 2


def study_mlp_threshold(beta: float, value_bytes: int = BF16_BYTES) -> float:
    """ℓ*_mlp = sβ as printed (tokens)."""
    return value_bytes * beta


def study_mlp_intensity(tokens: float, width: int, expansion: float, value_bytes: int = BF16_BYTES) -> float:
    """AI_mlp(ℓ) = fℓd / ((fd + ℓ(1 + f))s) as printed (FLOP/byte)."""
    f, d = expansion, width
    return f * tokens * d / ((f * d + tokens * (1 + f)) * value_bytes)


def study_mlp_threshold_solved(
    beta: float, width: int, expansion: float, value_bytes: int = BF16_BYTES
) -> float:
    """Tokens at which the printed AI_mlp really equals β: sβ only as d → ∞; infinite where it never does."""
    f, d = expansion, width
    return _reached(value_bytes * beta * f * d, f * d - value_bytes * beta * (1 + f))


# --- attention ----------------------------------------------------------------------------------------------


def attention_intensity(
    tokens: float,
    keys: float | None = None,
    *,
    query_block: int | None = None,
    value_bytes: int = BF16_BYTES,
) -> float:
    """Intensity of QKᵀ and PV (FLOP/byte); width and heads cancel.

    Args:
        tokens: queries ℓ.
        keys: keys and values; None: self-attention, as many as queries.
        query_block: None: K and V are read from memory once.  Else once for each block of so many queries, as
            FlashAttention asks for them: what happens where no cache serves the repeats.
        value_bytes: bytes of a value.
    """
    m = tokens if keys is None else keys
    reads = 1.0 if query_block is None else max(tokens / query_block, 1.0)
    return 4 * tokens * m / (value_bytes * (2 * tokens + 2 * m * reads))


def attention_threshold(beta: float, keys: float | None = None, value_bytes: int = BF16_BYTES) -> float:
    """Queries ℓ* from which attention is bound by arithmetic, K and V read once (tokens).

    sβ for self-attention.  With a fixed number m of ``keys`` the intensity has the limit 2m/s, and ℓ* is
    infinite where β is above it.
    """
    if keys is None:
        return value_bytes * beta
    return _reached(value_bytes * beta * keys, 2 * keys - value_bytes * beta)


def attention_limit(
    keys: float | None = None, *, query_block: int | None = None, value_bytes: int = BF16_BYTES
) -> float:
    """Intensity of attention as ℓ → ∞ (FLOP/byte): infinite only for self-attention that reads K, V once."""
    if keys is None:
        return inf if query_block is None else 2 * query_block / value_bytes
    reads = 0.0 if query_block is None else keys / query_block
    return 2 * keys / (value_bytes * (1 + reads))


def exponential_time_ratio(
    head_width: int, peak_FLOP_per_s: float, exponentials_per_s: float = HOPPER_EXPONENTIALS_PER_S
) -> float:
    """Time of softmax's exponentials over that of the two matrix products, each at its own peak.

    One exponential comes with 4 · ``head_width`` FLOP, whatever ℓ is.
    """
    return (peak_FLOP_per_s / (4 * head_width)) / exponentials_per_s


# --- matrix products ----------------------------------------------------------------------------------------


def gemm_intensity(tokens: float, inputs: int, outputs: int, value_bytes: int = BF16_BYTES) -> float:
    """Intensity of a product of ``tokens`` × ``inputs`` by ``inputs`` × ``outputs`` (FLOP/byte)."""
    moved = inputs * outputs + tokens * (inputs + outputs)
    return 2 * tokens * inputs * outputs / (value_bytes * moved)


def gemm_limit(inputs: int, outputs: int, value_bytes: int = BF16_BYTES) -> float:
    """Its intensity as ℓ → ∞ (FLOP/byte): activations alone, 2io / (s(i + o))."""
    return 2 * inputs * outputs / (value_bytes * (inputs + outputs))


def gemm_threshold(beta: float, inputs: int, outputs: int, value_bytes: int = BF16_BYTES) -> float:
    """Tokens ℓ* = sβio / (2io − sβ(i + o)) from which it is bound by arithmetic; infinite if never.

    With i = d and o = fd it is the threshold of an MLP, for both of its products.
    """
    product, total = inputs * outputs, inputs + outputs
    return _reached(value_bytes * beta * product, 2 * product - value_bytes * beta * total)


def _reached(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else inf
