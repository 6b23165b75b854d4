"""The numbers that the paper's text takes from the study's theory: keys begin with ``theory.``.

All are modelled (computed by formulas) or constants (printed by the study, or configured), but for the shares
of element-wise work in measured time, which need rows of stage 3 and are left out where there are none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import pandas as pd

from t2v_energy.analysis.numbers import Kind, Number, Source, decimals
from t2v_energy.analysis.rows import read_rows
from t2v_energy.analysis.sweep import row_label
from t2v_energy.analysis.theory import (
    J_PER_WH,
    MISSING_STAGE,
    STUDY_ACCELERATOR,
    STUDY_GPU_ENERGY_WH,
    STUDY_LATENCY_S,
    Theory,
    efficiency,
)
from t2v_energy.analysis.theory_thresholds import OWN_ACCELERATOR, Elementwise, elementwise
from t2v_energy.config import load_campaign
from t2v_energy.errors import UserError
from t2v_energy.work import paper, paper_work, thresholds, true_work, umt5, wan, wan_vae

Numbers = dict[str, Number]
STUDY = "arXiv:2509.19222"
PETA, TERA, BILLION = 1e15, 1e12, 1e9
LTX_LATENCY_S, LTX_GPU_ENERGY_WH = 9.7, 3.16  # table 4, LTX-Video-0.9.7-dev
COMPONENTS: Mapping[str, str] = {
    "text_encoder": "text encoder",
    "vae_convolutions": "VAE decoder convolutions",
    "vae_attention": "VAE middle attention",
    "self_attention": "self-attention",
    "cross_attention": "cross-attention",
    "mlp": "MLP",
    "timestep_mlp": "timestep MLP",
    "embeddings": "embeddings",
    "total": "total",
}
"""Rows of table 1, by what their numbers' keys call them."""


@dataclass(frozen=True)
class MeasuredCall:
    """Mean time of one denoiser call at one size (measured, s), with where it comes from."""

    elementwise: Elementwise
    call_s: float
    source: Source


def theory_numbers(
    theory: Theory, tables: Mapping[str, pd.DataFrame], folder: str, calls: Mapping[str, MeasuredCall]
) -> Numbers:
    """Every number of the part ``theory``.

    Args:
        theory: what the tables were computed from.
        tables: the tables, keys of :data:`t2v_energy.analysis.theory_tables.TABLES`.
        folder: where they are written, as sources name it.
        calls: measured calls by label (:func:`measured_calls`); may be empty.

    Raises:
        UserError: two of them have one key.
    """
    parts = (
        _flop_numbers(tables["table1"], f"{folder}/table1.csv"),
        _shape_numbers(theory),
        _symbol_numbers(tables["table5"], f"{folder}/table5.csv"),
        _vae_numbers(tables["table6"], f"{folder}/table6.csv"),
        _threshold_numbers(tables["table7"], f"{folder}/table7.csv"),
        _limit_numbers(theory),
        _elementwise_numbers(theory),
        _efficiency_numbers(theory),
        *(_call_numbers(label, call) for label, call in calls.items()),
    )
    merged: Numbers = {}
    for part in parts:
        if twice := sorted(merged.keys() & part.keys()):
            raise UserError(f"numbers are given twice: {', '.join(twice)}")
        merged |= part
    return merged


def measured_calls(
    theory: Theory, root: Path, campaign: str, configurations: Path
) -> dict[str, MeasuredCall]:
    """Measured denoiser calls of experiment ``resolution``, ``smallest`` and ``default``, where it has them.

    Empty for a campaign of another model, without spans of steps, or whose accelerator has no published
    values.

    Raises:
        UserError: the table is missing, or the campaign is unknown.
    """
    path, accelerator = root / configurations, load_campaign(root, campaign).accelerator
    rows = read_rows(path)
    if theory.accelerators[accelerator].nominal:
        return {}
    if "step_time_s" not in rows:
        return {}
    rows = rows.query("experiment == 'resolution' and status == 'ok' and model == @theory.model.key")
    calls = {}
    for label, (height, width, frames) in {"smallest": theory.smallest, "default": theory.size[:3]}.items():
        found = rows.query("height == @height and width == @width and num_frames == @frames")
        if not found.empty:
            row = found.iloc[0]
            calls[label] = MeasuredCall(
                elementwise(theory, height, width, frames, accelerator=accelerator),
                float(row["step_time_s"]) / theory.model.passes_per_step,
                Source(str(configurations), row_label(row), "step_time_s over guidance passes"),
            )
    return calls


def _flop_numbers(table: pd.DataFrame, file: str) -> Numbers:
    rows = table.set_index("component").to_dict(orient="index")
    numbers: Numbers = {}
    for key, component in COMPONENTS.items():
        row, prefix = rows[component], f"theory.flop.{key}"
        for count in ("study", "true"):
            column = f"{count}_flop_per_video"
            value = float(row[column]) / PETA
            numbers[f"{prefix}.{count}"] = _modelled(value, "PFLOP", Source(file, component, column))
        numbers[f"{prefix}.ratio"] = _modelled(float(row["ratio"]), "", Source(file, component, "ratio"))
        share = Source(file, component, "true_share_percent")
        numbers[f"{prefix}.share"] = _modelled(float(row["true_share_percent"]), "%", share)
    return numbers


def _shape_numbers(theory: Theory) -> Numbers:
    """Tokens, parameters, and the share of attention's products in all work."""
    height, width, frames, _ = theory.size
    where = f"{height}×{width}×{frames}"
    config = theory.transformer
    printed = config | {
        "num_layers": paper.LAYERS,
        "num_attention_heads": paper.WIDTH // config["attention_head_dim"],
        "ffn_dim": paper.MLP_EXPANSION * paper.WIDTH,
    }
    parameters = {
        "transformer": wan.parameter_count(config),
        "transformer_as_printed": wan.parameter_count(printed),
        "text_encoder": umt5.parameter_count(theory.text_encoder),
        "vae": wan_vae.parameter_count(theory.vae),
    }
    numbers = {
        f"theory.parameters.{key}": _modelled(
            count / BILLION, "billion", Source("t2v_energy.work", key, "parameter_count")
        )
        for key, count in parameters.items()
    }
    tokens = {
        "study": paper.token_length(height, width, frames),
        "true": theory.true.tokens,
        "smallest": theory.smallest_tokens,
    }
    numbers |= {
        f"theory.tokens.{key}": Number(value, "", "modelled", Source("t2v_energy.work", where, "tokens"))
        for key, value in tokens.items()
    }
    small = true_work(theory.model, *theory.smallest, theory.size[3])
    for key, work in {"default": theory.true, "smallest": small, "study": theory.study}.items():
        source = Source("t2v_energy.work", key, "attention_flop / total_flop")
        value = 100 * work.attention_flop / work.total_flop
        numbers[f"theory.attention_products.{key}"] = _modelled(value, "%", source)
    smallest = "×".join(map(str, theory.smallest[:2]))
    source = Source("config/experiments", "smallest", "height, width")
    return numbers | {"theory.smallest_size": Number(smallest, "", "constant", source)}


def _symbol_numbers(table: pd.DataFrame, file: str) -> Numbers:
    return {
        f"theory.symbols.{key}": Number(
            int((table["equal"] == answer).sum()), "", "constant", Source(file, f"equal={answer}", "rows")
        )
        for key, answer in (("equal", "yes"), ("different", "no"))
    }


def _vae_numbers(table: pd.DataFrame, file: str) -> Numbers:
    rows = table.set_index("stage")[["study_flop", "true_flop", "ratio", "true_share_percent"]]
    by_stage = rows.to_dict(orient="index")
    total, missing = by_stage["total"], by_stage[MISSING_STAGE]

    def of_total(column: str) -> Source:
        return Source(file, "total", column)

    return {
        "theory.vae.study": _modelled(float(total["study_flop"]) / PETA, "PFLOP", of_total("study_flop")),
        "theory.vae.true": _modelled(float(total["true_flop"]) / PETA, "PFLOP", of_total("true_flop")),
        "theory.vae.ratio": _modelled(float(total["ratio"]), "", of_total("ratio")),
        "theory.vae.missing": _modelled(
            float(missing["true_flop"]) / PETA, "PFLOP", Source(file, MISSING_STAGE, "true_flop")
        ),
        "theory.vae.missing_share": _modelled(
            float(missing["true_share_percent"]), "%", Source(file, MISSING_STAGE, "true_share_percent")
        ),
    }


def _threshold_numbers(table: pd.DataFrame, file: str) -> Numbers:
    numbers: Numbers = {}
    columns = {
        "balance.printed": ("printed_balance", "FLOP/byte"),
        "balance.recomputed": ("recomputed_balance", "FLOP/byte"),
        "balance.published": ("published_balance", "FLOP/byte"),
        "attention.printed": ("printed_attention_tokens", ""),
        "attention.published": ("published_attention_tokens", ""),
        "mlp.printed": ("printed_mlp_tokens", ""),
        "mlp.published": ("published_true_mlp_tokens", ""),
        "cross_attention.published": ("published_true_cross_attention_tokens", ""),
    }
    for _, row in table.iterrows():
        for name, (column, unit) in columns.items():
            if isfinite(row[column]):  # a threshold that is never reached has no number
                kind: Kind = "constant" if column.startswith("printed") else "modelled"
                source = Source(file, row["accelerator"], column)
                key = f"theory.threshold.{row['accelerator']}.{name}"
                numbers[key] = Number(float(row[column]), unit, kind, source)
    odd = (table["consistent"] == "no").sum()
    peaks = (table["note"].str.contains("printed peak")).sum()
    numbers["theory.threshold.accelerators"] = Number(len(table), "", "constant", Source(file, "all", "rows"))
    numbers["theory.threshold.inconsistent"] = Number(
        int(odd), "", "modelled", Source(file, "consistent=no", "rows")
    )
    numbers["theory.threshold.other_peak"] = Number(
        int(peaks), "", "modelled", Source(file, "printed peak is not the published one", "rows")
    )
    return numbers


def _limit_numbers(theory: Theory) -> Numbers:
    """Balance of our board, limits of intensity, and the printed thresholds solved."""
    d, inner = wan.width(theory.transformer), theory.transformer["ffn_dim"]
    m, head = theory.model.tokenizer.max_length, theory.transformer["attention_head_dim"]
    own, beta = theory.balance(OWN_ACCELERATOR), theory.balance(STUDY_ACCELERATOR)
    uncached = thresholds.attention_limit(query_block=thresholds.QUERY_BLOCK)
    ratio = thresholds.exponential_time_ratio(head, paper.PEAK_FLOP_PER_S)
    solved = thresholds.study_mlp_threshold_solved(beta, paper.WIDTH, paper.MLP_EXPANSION)
    values = {
        "own.balance": (own, "FLOP/byte"),
        "own.attention": (thresholds.attention_threshold(own), ""),
        "own.mlp": (thresholds.gemm_threshold(own, d, inner), ""),
        "own.projection": (thresholds.gemm_threshold(own, d, d), ""),
        "own.cross_attention": (thresholds.attention_threshold(own, m), ""),
        "own.cache_reuse": (own / uncached, ""),
        "mlp_solved": (solved, ""),
        "limit.mlp": (thresholds.gemm_limit(d, inner), "FLOP/byte"),
        "limit.projection": (thresholds.gemm_limit(d, d), "FLOP/byte"),
        "limit.cross_attention": (thresholds.attention_limit(m), "FLOP/byte"),
        "limit.uncached_attention": (uncached, "FLOP/byte"),
        "cache_reuse": (beta / uncached, ""),
        "exponentials": (100 * ratio, "%"),
        "attention_of_peak": (100 / (1 + ratio), "%"),
    }
    return {
        f"theory.{'limit' if key.startswith('limit') else 'threshold'}.{key.removeprefix('limit.')}": Number(
            value, unit, "modelled", Source("t2v_energy.work.thresholds", key, "value"),
            digits=1 if value < 10 else 0,
        )
        for key, (value, unit) in values.items()
    }  # fmt: skip


def _elementwise_numbers(theory: Theory) -> Numbers:
    numbers: Numbers = {}
    for label, size in {"smallest": theory.smallest, "default": theory.size[:3]}.items():
        found, prefix = elementwise(theory, *size), f"theory.elementwise.{label}"
        source = Source("t2v_energy.work.wan.elementwise_bytes", "×".join(map(str, size)), "bytes")
        numbers |= {
            f"{prefix}.traffic": _modelled(found.bytes / TERA, "TB", source),
            f"{prefix}.least_time": _modelled(1000 * found.memory_s, "ms", source),
            f"{prefix}.ideal_share": _modelled(found.ideal_share_percent, "%", source),
        }
    found = elementwise(theory, *theory.size[:3])
    source = Source("t2v_energy.work.wan.elementwise_kernels", "one block", "bytes")
    unfused = wan.elementwise_bytes(theory.transformer, found.tokens, fused_norms=False)
    return numbers | {
        "theory.elementwise.per_token": _modelled(found.bytes_per_token_block / 1000, "kB", source),
        "theory.elementwise.intensity": _modelled(found.intensity, "FLOP/byte", source, significant=1),
        "theory.elementwise.unfused_traffic": _modelled(unfused / TERA, "TB", source),
        "theory.elementwise.kernels": Number(
            sum(kernel.count for kernel in wan.elementwise_kernels(theory.transformer)),
            "",
            "modelled",
            source,
        ),
    }


def _efficiency_numbers(theory: Theory) -> Numbers:
    """What follows from the study's own table 4."""
    table4 = Source(STUDY, "table 4, WAN2.1-T2V-1.3B", "Latency (s)")
    power = Source(STUDY, "table 4, WAN2.1-T2V-1.3B", "GPU (Wh) / Latency (s)")
    ltx = Source(STUDY, "table 4, LTX-Video-0.9.7-dev", "GPU (Wh) / Latency (s)")
    study = paper_work(*theory.size)
    return {
        "theory.efficiency.study": _modelled(efficiency(study), "", table4),
        "theory.efficiency.true": _modelled(efficiency(theory.true), "", table4),
        "theory.study.power": _modelled(STUDY_GPU_ENERGY_WH * J_PER_WH / STUDY_LATENCY_S, "W", power),
        "theory.study.ltx_power": _modelled(LTX_GPU_ENERGY_WH * J_PER_WH / LTX_LATENCY_S, "W", ltx),
    }


def _call_numbers(label: str, call: MeasuredCall) -> Numbers:
    """Least time of the element-wise work over the measured time of a call."""
    value = 100 * call.elementwise.memory_s / call.call_s
    number = Number(value, "%", "modelled", call.source, digits=decimals(value, 2))
    return {f"theory.elementwise.{label}.time_share": number}


def _modelled(value: float, unit: str, source: Source, *, significant: int = 3) -> Number:
    return Number(value, unit, "modelled", source, digits=decimals(value, significant))
