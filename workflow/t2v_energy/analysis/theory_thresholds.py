"""The study's table 7: from how many tokens is an operator bound by arithmetic?  And what appendix B assumes.

Nothing here is measured.  See :mod:`t2v_energy.work.thresholds` for the derivations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isinf
from typing import Any

import pandas as pd

from t2v_energy.analysis.theory import STUDY_ACCELERATOR, STUDY_SMALLEST, Theory
from t2v_energy.config import Accelerator
from t2v_energy.errors import UserError
from t2v_energy.work import paper, thresholds, true_work, wan

OWN_ACCELERATOR = "h200"
ROUNDING = 0.005
"""Relative difference up to which a printed value follows from other printed values: rounding."""

TABLE7_COLUMNS = (
    "accelerator", "title", "printed_peak_TFLOPs", "printed_bandwidth_TB_per_s", "printed_balance",
    "printed_attention_tokens", "printed_mlp_tokens", "recomputed_balance", "recomputed_attention_tokens",
    "recomputed_mlp_tokens", "consistent", "attention_tokens", "mlp_tokens", "true_mlp_tokens",
    "published_peak_TFLOPs", "published_bandwidth_TB_per_s", "published_balance",
    "published_attention_tokens", "published_mlp_tokens", "published_true_mlp_tokens",
    "published_true_cross_attention_tokens", "smallest_tokens", "note",
)  # fmt: skip
TABLE7B_COLUMNS = ("assumption", "study", "corrected", "consequence")


# --- table 7: when is it bound by arithmetic? ---------------------------------------------------------------


def table7(theory: Theory) -> pd.DataFrame:
    """Table 7, columns :data:`TABLE7_COLUMNS`: the seven accelerators of the study, in its order.

    * ``printed_…``: as the study prints them; ``recomputed_…``: β and its thresholds from its own printed
      peak and bandwidth; ``consistent``: whether they agree within rounding (:data:`ROUNDING`).
    * ``attention_tokens``, ``mlp_tokens``: thresholds derived without the study's slips, at the balance of
      its printed peak and bandwidth, for its width; ``true_mlp_tokens``: for the published model's widths.
    * ``published_…``: the same at the vendor's dense peak and bandwidth.  An empty threshold is never
      reached.
    """
    rows = [_accelerator_row(theory, key) for key in thresholds.PRINTED]
    return pd.DataFrame(rows, columns=list(TABLE7_COLUMNS)).replace(inf, float("nan"))


def _accelerator_row(theory: Theory, key: str) -> dict[str, Any]:
    card, says = theory.accelerators[key], thresholds.PRINTED[key]
    if card.printed is None:
        raise UserError(
            f"{key} has no `printed` values", where="config/accelerators.yaml", remedy="add them from table 7"
        )
    d, inner = wan.width(theory.transformer), theory.transformer["ffn_dim"]
    study_inner = paper.MLP_EXPANSION * paper.WIDTH
    printed = thresholds.balance(card.printed.peak_TFLOPs, card.printed.bandwidth_TB_per_s)
    published = theory.balance(key)
    recomputed = {
        "recomputed_balance": printed,
        "recomputed_attention_tokens": thresholds.study_attention_threshold(printed),
        "recomputed_mlp_tokens": thresholds.study_mlp_threshold(printed),
    }
    stated = (says.balance, says.attention_tokens, says.mlp_tokens)
    agree = [abs(a / b - 1) <= ROUNDING for a, b in zip(stated, recomputed.values(), strict=True)]
    return {
        "accelerator": key,
        "title": says.name,
        "printed_peak_TFLOPs": card.printed.peak_TFLOPs,
        "printed_bandwidth_TB_per_s": card.printed.bandwidth_TB_per_s,
        "printed_balance": says.balance,
        "printed_attention_tokens": says.attention_tokens,
        "printed_mlp_tokens": says.mlp_tokens,
        **recomputed,
        "consistent": "yes" if all(agree) else "no",
        "attention_tokens": thresholds.attention_threshold(printed),
        "mlp_tokens": thresholds.gemm_threshold(printed, paper.WIDTH, study_inner),
        "true_mlp_tokens": thresholds.gemm_threshold(printed, d, inner),
        "published_peak_TFLOPs": card.peak_bf16_dense_TFLOPs,
        "published_bandwidth_TB_per_s": card.bandwidth_TB_per_s,
        "published_balance": published,
        "published_attention_tokens": thresholds.attention_threshold(published),
        "published_mlp_tokens": thresholds.gemm_threshold(published, paper.WIDTH, study_inner),
        "published_true_mlp_tokens": thresholds.gemm_threshold(published, d, inner),
        "published_true_cross_attention_tokens": thresholds.attention_threshold(
            published, theory.model.tokenizer.max_length
        ),
        "smallest_tokens": theory.smallest_tokens,
        "note": _accelerator_note(card, says, agree[0]),
    }


def _accelerator_note(card: Accelerator, says: thresholds.PrintedThresholds, balanced: bool) -> str:
    notes = []
    assert card.printed is not None
    if not balanced:
        bandwidth = card.printed.peak_TFLOPs / says.balance
        notes.append(f"the printed β needs B = {bandwidth:.3g} TB/s")
    ratio = card.printed.peak_TFLOPs / card.peak_bf16_dense_TFLOPs
    if abs(ratio - 1) > ROUNDING:
        notes.append(f"the printed peak is {ratio:.2f} times the published dense one")
    return "; ".join(notes)


# --- table 7b: appendix B's assumptions ---------------------------------------------------------------------


def table7b(theory: Theory) -> pd.DataFrame:
    """What appendix B assumes, columns :data:`TABLE7B_COLUMNS`; numbers are the H100's unless they say more.

    β is that of the study's own printed values (989 TFLOP/s, 3.35 TB/s).
    """
    rows = [make(theory) for make in _ASSUMPTIONS]
    return pd.DataFrame(rows, columns=list(TABLE7B_COLUMNS))


Assumption = tuple[str, str, str, str]


def _beta(theory: Theory) -> float:
    return theory.balance(STUDY_ACCELERATOR)


def _attention_bytes(theory: Theory) -> Assumption:
    beta = _beta(theory)
    study, ours = thresholds.study_attention_threshold(beta), thresholds.attention_threshold(beta)
    return (
        "bytes of attention",
        f"2ℓds for Q, K, V and O; ℓ* = sβ/2 = {study:.0f}",
        f"four tensors are 4ℓds; ℓ* = sβ = {ours:.0f}",
        "every printed threshold of attention doubles",
    )


def _mlp_work(theory: Theory) -> Assumption:
    beta, d, inner = _beta(theory), wan.width(theory.transformer), theory.transformer["ffn_dim"]
    study = thresholds.gemm_threshold(beta, paper.WIDTH, paper.MLP_EXPANSION * paper.WIDTH)
    true = thresholds.gemm_threshold(beta, d, inner)
    return (
        "FLOP of the MLP",
        "fℓd² over the bytes of one product",
        f"4fℓd² over both products (table 1), 2fℓd² over one: twice the intensity; ℓ* = {study:.0f} for d = "
        f"{paper.WIDTH}, {true:.0f} for the published d = {d}",
        f"the printed {thresholds.study_mlp_threshold(beta):.0f} is "
        f"{thresholds.study_mlp_threshold(beta) / true:.2f} times the published model's",
    )


def _mlp_solution(theory: Theory) -> Assumption:
    beta, f, d = _beta(theory), paper.MLP_EXPANSION, paper.WIDTH
    solved = thresholds.study_mlp_threshold_solved(beta, d, f)
    limit = thresholds.gemm_limit(d, f * d)
    true = thresholds.gemm_limit(wan.width(theory.transformer), theory.transformer["ffn_dim"])
    return (
        "solution for the MLP's threshold",
        f"ℓ* = sβ = {thresholds.study_mlp_threshold(beta):.0f}",
        f"sβ holds only as d → ∞; the printed intensity equals β at ℓ = {solved:.0f}",
        f"intensity saturates at 2fd/((1 + f)s) = {limit:.0f} FLOP/byte for the printed widths, {true:.0f} "
        "for the true ones; above that no ℓ suffices",
    )


def _projections(theory: Theory) -> Assumption:
    beta, d = _beta(theory), wan.width(theory.transformer)
    limit = thresholds.gemm_limit(d, d)
    highest = max(theory.balance(key) for key in thresholds.PRINTED)
    return (
        "projections of attention",
        "left out",
        f"ℓ* = {thresholds.gemm_threshold(beta, d, d):.0f}; saturates at d/s = {limit:.0f} FLOP/byte",
        f"{limit / highest:.1f} times the highest published balance of table 7",
    )


def _cross_attention(theory: Theory) -> Assumption:
    m, beta = theory.model.tokenizer.max_length, _beta(theory)
    limit = thresholds.attention_limit(m)
    reached = {
        says.name: thresholds.attention_threshold(theory.balance(key), m)
        for key, says in thresholds.PRINTED.items()
    }
    late = [f"{name} {_tokens(at)}" for name, at in reached.items() if at > theory.smallest_tokens]
    return (
        "cross-attention",
        "compute-bound (section 3.1), no threshold",
        f"intensity saturates at 2m/s = {limit:.0f} FLOP/byte; ℓ* = "
        f"{_tokens(thresholds.attention_threshold(beta, m))}",
        f"at most {limit / beta:.1f} times the H100's balance; ℓ* at published peaks where it is above our "
        f"smallest {theory.smallest_tokens}: {', '.join(late) or 'none'}",
    )


def _streamed(theory: Theory) -> Assumption:
    block, beta = thresholds.QUERY_BLOCK, _beta(theory)
    limit = thresholds.attention_limit(query_block=block)
    return (
        "K and V are read once",
        "each tensor moves once",
        f"FlashAttention-2 streams K and V once for each block of {block} queries: without a cache the "
        f"intensity saturates at {limit:.0f} FLOP/byte, whatever ℓ is",
        f"below β = {beta:.0f}: attention is compute-bound only if the cache serves at least "
        f"{beta / limit:.1f} query blocks with one read; a large ℓ does not make it so",
    )


def _exponentials(theory: Theory) -> Assumption:
    head, peak = theory.transformer["attention_head_dim"], paper.PEAK_FLOP_PER_S
    ratio = thresholds.exponential_time_ratio(head, peak)
    return (
        "softmax",
        "omitted as lower order",
        f"one exponential for every {4 * head} FLOP (heads of {head}); on the H100 they take "
        f"{100 * ratio:.0f} % of the products' time",
        f"where they do not overlap, attention ends at {100 / (1 + ratio):.0f} % of the peak, whatever ℓ is",
    )


def _elementwise(theory: Theory) -> Assumption:
    parts = elementwise(theory, *theory.size[:3])
    small = elementwise(theory, *theory.smallest)
    height, width, frames, _ = theory.size
    return (
        "element-wise operators",
        "left out of the thresholds",
        "norms, rotary embedding, modulation, residuals and GELU move "
        f"{parts.bytes_per_token_block / 1e3:.0f} kB for each token and block at "
        f"{parts.intensity:.1f} FLOP/byte: memory-bound at every ℓ",
        f"{parts.bytes / 1e12:.2f} TB a pass at {height}×{width}×{frames}; on the H200 at least "
        f"{parts.memory_s:.2f} s beside {parts.arithmetic_s:.2f} s of ideal arithmetic "
        f"({parts.ideal_share_percent:.0f} % of both; {small.ideal_share_percent:.0f} % at "
        f"{theory.smallest_tokens} tokens)",
    )


def _operating_range(theory: Theory) -> Assumption:
    height, width, frames = STUDY_SMALLEST
    tokens = true_work(theory.model, height, width, frames, 1).tokens
    reached = table7(theory)[["published_attention_tokens", "published_true_mlp_tokens"]]
    return (
        "operating range",
        "ℓ ≫ 10⁴ in all realistic settings",
        f"ℓ = {tokens} at {height}×{width}×{frames}, the study's own smallest size",
        f"the highest threshold of self-attention or MLP in table 7 at published peaks is "
        f"{float(reached.to_numpy().max()):.0f}",
    )


def _peaks(theory: Theory) -> Assumption:
    table = table7(theory)
    wrong = table[(table["printed_peak_TFLOPs"] / table["published_peak_TFLOPs"] - 1).abs() > ROUNDING]
    named = ", ".join(
        f"{thresholds.PRINTED[key].name} {peak:g}"
        for key, peak in zip(wrong["accelerator"], wrong["printed_peak_TFLOPs"], strict=True)
    )
    dense = ", ".join(f"{row['published_peak_TFLOPs']:g}" for _, row in wrong.iterrows())
    odd = table[table["consistent"] == "no"]
    betas = ", ".join(
        f"{row['title']}: β is {row['recomputed_balance']:.0f}, not {row['printed_balance']:.0f}"
        for _, row in odd.iterrows()
    )
    return (
        "peaks and balances of table 7",
        f"{named} TFLOP/s",
        f"published, dense bf16: {dense} TFLOP/s",
        f"{betas}, by its own printed values",
    )


_ASSUMPTIONS: tuple[Callable[[Theory], Assumption], ...] = (
    _attention_bytes,
    _mlp_work,
    _mlp_solution,
    _projections,
    _cross_attention,
    _streamed,
    _exponentials,
    _elementwise,
    _operating_range,
    _peaks,
)


def _tokens(value: float) -> str:
    return "never" if isinf(value) else f"{value:.0f}"


# --- element-wise work --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Elementwise:
    """Element-wise work of one denoiser pass, and the least time that it can take (modelled).

    Attributes:
        tokens: video tokens.
        bytes: read and written (B).
        bytes_per_token_block: for one token in one block (B).
        intensity: arithmetic over bytes (FLOP/byte), generously counted.
        memory_s: at the accelerator's full published bandwidth (s).
        arithmetic_s: the pass's matrix products at the published dense peak (s).
    """

    tokens: int
    bytes: float
    bytes_per_token_block: float
    intensity: float
    memory_s: float
    arithmetic_s: float

    @property
    def ideal_share_percent(self) -> float:
        """Share of element-wise time if memory and arithmetic ran at their peaks, one after the other."""
        return 100 * self.memory_s / (self.memory_s + self.arithmetic_s)


def elementwise(
    theory: Theory, height: int, width: int, num_frames: int, *, accelerator: str = OWN_ACCELERATOR
) -> Elementwise:
    """Element-wise work of one pass at this size, RMSNorm as one kernel (torch from 2.9)."""
    card, config = theory.accelerators[accelerator], theory.transformer
    work = true_work(theory.model, height, width, num_frames, 1)
    moved = wan.elementwise_bytes(config, work.tokens)
    return Elementwise(
        tokens=work.tokens,
        bytes=moved,
        bytes_per_token_block=moved / work.tokens / config["num_layers"],
        intensity=wan.elementwise_operations(config, work.tokens) / moved,
        memory_s=moved / (card.bandwidth_TB_per_s * 1e12),
        arithmetic_s=work.flop_per_denoiser_call / (card.peak_bf16_dense_TFLOPs * 1e12),
    )
