"""Recomputations from formulas, published configurations and vendors' values; and from our own records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import pandas as pd

from t2v_energy.claims.published import shown
from t2v_energy.claims.sources import DataAbsent, Recomputed, Sources, recomputes
from t2v_energy.errors import UserError
from t2v_energy.work import paper, paper_work, thresholds, true_work, umt5, wan, wan_vae

# --- the model ----------------------------------------------------------------------------------------------

Value = Callable[[Sources], float]
SYMBOLS: Mapping[str, tuple[str, Value]] = {
    "guidance_passes": ("passes per step of the pipeline", lambda s: s.theory.model.passes_per_step),
    "temporal_factor": ("the VAE's configuration", lambda s: s.theory.vae["scale_factor_temporal"]),
    "spatial_factor": ("the VAE's configuration", lambda s: s.theory.vae["scale_factor_spatial"]),
    "patch_height": ("the transformer's patch_size", lambda s: s.theory.transformer["patch_size"][1]),
    "patch_width": ("the transformer's patch_size", lambda s: s.theory.transformer["patch_size"][2]),
    "token_side": (
        "VAE factor times patch size",
        lambda s: s.theory.vae["scale_factor_spatial"] * s.theory.transformer["patch_size"][1],
    ),
    "size_multiple": ("what the pipeline accepts", lambda s: s.theory.model.limits.size_multiple),
    "frames_multiple": ("what the pipeline makes, plus one", lambda s: s.theory.model.limits.frames_multiple),
    "layers": ("the published checkpoint's num_layers", lambda s: s.theory.transformer["num_layers"]),
    "width": ("the published checkpoint's heads times head size", lambda s: wan.width(s.theory.transformer)),
    "mlp_width": ("the published checkpoint's ffn_dim", lambda s: s.theory.transformer["ffn_dim"]),
    "mlp_expansion": (
        "the published checkpoint's ffn_dim over its width",
        lambda s: s.theory.transformer["ffn_dim"] / wan.width(s.theory.transformer),
    ),
    "timestep_width": (
        "hidden width of the timestep MLP; the printed number is the width of its sinusoidal input",
        lambda s: wan.width(s.theory.transformer),
    ),
    "text_tokens": ("the tokenizer's padded length", lambda s: s.theory.model.tokenizer.max_length),
    "text_width": ("the text encoder's d_model", lambda s: s.theory.text_encoder["d_model"]),
    "text_layers": ("the text encoder's num_layers", lambda s: s.theory.text_encoder["num_layers"]),
    "text_expansion": (
        "d_ff over d_model; the network is gated, so it has three matrices",
        lambda s: s.theory.text_encoder["d_ff"] / s.theory.text_encoder["d_model"],
    ),
    "latent_channels": ("the VAE's z_dim", lambda s: s.theory.vae["z_dim"]),
    "middle_channels": (
        "channels of the decoder's middle block", lambda s: wan_vae.decoder_channels(s.theory.vae)[0]
    ),
    "decoder_convolutions": (
        "convolutions with kernels above 1 that a latent frame passes",
        lambda s: sum(layer.taps > 1 for layer in _decoder(s)),
    ),
    "middle_convolutions": (
        "3×3×3 convolutions of the middle block",
        lambda s: sum(layer.stage == "mid_block" for layer in _decoder(s)),
    ),
    "stage_residual_blocks": (
        "residual blocks of a decoder stage", lambda s: s.theory.vae["num_res_blocks"] + 1
    ),
    "time_upsamplers": (
        "up-samplings of time", lambda s: sum(bool(x) for x in s.theory.vae["temperal_downsample"])
    ),
    "space_only_upsamplers": (
        "up-samplings of space alone", lambda s: sum(not x for x in s.theory.vae["temperal_downsample"])
    ),
    "mlp_coefficient": (
        "the closed form's FLOP over f ℓ d², a layer",
        lambda s: s.theory.true.flop["mlp"] / s.theory.true.denoiser_calls
        / s.theory.transformer["num_layers"] / s.theory.true.tokens
        / (wan.width(s.theory.transformer) * s.theory.transformer["ffn_dim"]),
    ),
    "text_mlp_coefficient": (
        "the closed form's FLOP less attention's over f m d², a layer",
        lambda s: _text_mlp(s.theory.text_encoder, s.theory.model.tokenizer.max_length),
    ),
    "self_projection_coefficient": (
        "closed form at two lengths, over N ℓ d²", lambda s: _self_attention(s)[0]
    ),
    "self_product_coefficient": (
        "closed form at two lengths, over N ℓ² d", lambda s: _self_attention(s)[1]
    ),
    "timestep_coefficient": (
        "closed form less its sinusoidal input's, over d²", lambda s: _timestep(s)[0]
    ),
    "timestep_input_coefficient": (
        "closed form at two widths of the sinusoidal input, over d_τ d", lambda s: _timestep(s)[1]
    ),
    "middle_projection_coefficient": (
        "closed form at two sizes, over T C² L", lambda s: _middle_attention(s)[0]
    ),
    "middle_product_coefficient": (
        "closed form at two sizes, over T C L²", lambda s: _middle_attention(s)[1]
    ),
    "text_product_coefficient": (
        "closed form at two lengths, over m² d, a layer",
        lambda s: _text_products(s.theory.text_encoder, s.theory.model.tokenizer.max_length),
    ),
    "bf16_bytes": ("width of the number type", lambda s: thresholds.BF16_BYTES),
}  # fmt: skip
"""What a symbol really is, with where that is from."""


@recomputes("theory")
def symbol(sources: Sources, name: str) -> Recomputed:
    """A constant of the published Wan2.1-T2V-1.3B (:data:`SYMBOLS`)."""
    if name not in SYMBOLS:
        raise UserError(
            f"with: symbol has no {name!r}", where="config/claims.yaml", remedy=f"known: {', '.join(SYMBOLS)}"
        )
    note, value = SYMBOLS[name]
    return Recomputed(float(value(sources)), note)


def _text_mlp(config: Mapping[str, Any], tokens: int) -> float:
    d, inner, layers = config["d_model"], config["d_ff"], config["num_layers"]
    attention = layers * (8 * tokens * d**2 + 4 * tokens**2 * d)
    return (umt5.forward_flop(config, tokens) - attention) / (layers * tokens * d * inner)


def _text_products(config: Mapping[str, Any], tokens: int) -> float:
    once, twice = (umt5.forward_flop(config, n) for n in (tokens, 2 * tokens))
    return (twice - 2 * once) / (2 * tokens**2 * config["d_model"] * config["num_layers"])


def _linear_and_square(flop: Callable[[int], float], size: int) -> tuple[float, float]:
    """a and b of flop(n) = a n + b n², from n and 2 n."""
    once, twice = flop(size), flop(2 * size)
    square = (twice - 2 * once) / (2 * size**2)
    return once / size - square * size, square


def _self_attention(sources: Sources) -> tuple[float, float]:
    """Coefficients of ℓd² and ℓ²d in a layer's self-attention."""
    config, text = sources.theory.transformer, sources.theory.model.tokenizer.max_length
    d, layers = wan.width(config), config["num_layers"]
    linear, square = _linear_and_square(
        lambda length: wan.forward_flop(config, length, text)["self_attention"], sources.theory.true.tokens
    )
    return linear / (layers * d**2), square / (layers * d)


def _timestep(sources: Sources) -> tuple[float, float]:
    """Coefficients of d² and d_τ d in the timestep MLP of one pass."""
    config = sources.theory.transformer
    d, inputs = wan.width(config), config["freq_dim"]
    once, twice = (wan.forward_flop({**config, "freq_dim": n * inputs}, 1, 1)["timestep_mlp"] for n in (1, 2))
    of_inputs = (twice - once) / (inputs * d)
    return (once - of_inputs * inputs * d) / d**2, of_inputs


def _middle_attention(sources: Sources) -> tuple[float, float]:
    """Coefficients of C²L and L²C in a latent frame's middle attention of the VAE's decoder."""
    frames, rows, columns = sources.theory.latent
    channels = wan_vae.decoder_channels(sources.theory.vae)[0]

    def flop(pixels: int) -> float:
        stages = wan_vae.decode_flop_by_stage(sources.theory.vae, frames, rows, pixels // rows)
        return stages["mid_attention"] / frames

    linear, square = _linear_and_square(flop, rows * columns)
    return linear / channels**2, square / channels


def _decoder(sources: Sources) -> list[wan_vae.Convolution]:
    _, rows, columns = sources.theory.latent
    return list(wan_vae.decoder_convolutions(sources.theory.vae, rows * columns, first=False))


@recomputes("theory")
def decoder_layer(sources: Sources, stage: str, part: str, kernel: list[int] | None = None) -> Recomputed:
    """``inputs``, ``outputs`` or ``kernel`` (its taps) of a stage's first convolution with that kernel."""
    layers = [x for x in _decoder(sources) if x.stage == stage]
    if kernel:
        layers = [x for x in layers if [*x.kernel] == kernel]
    if not layers:
        raise DataAbsent(f"the decoder's stage {stage} has no convolution {kernel}")
    layer = layers[0]
    value = prod(layer.kernel) if part == "kernel" else getattr(layer, part)
    size = "×".join(map(str, layer.kernel))
    return Recomputed(float(value), f"{stage}: {size}, {layer.inputs} → {layer.outputs}")


@recomputes("theory")
def decoder_grid(sources: Sources, stage: str, part: str, kernel: list[int] | None = None) -> Recomputed:
    """T over a decoder layer's output ``frames``, or H over its output height (``side``), default size."""
    height, width, frames, _ = sources.theory.size
    layers = wan_vae.decoded_layers(sources.theory.vae, *sources.theory.latent)
    found = [x for x, _ in layers if x.stage == stage and (kernel is None or [*x.kernel] == kernel)]
    if not found:
        raise DataAbsent(f"the decoder's stage {stage} has no convolution {kernel}")
    layer = found[0]
    if part == "frames":
        return Recomputed(frames / layer.frames, f"{layer.frames} output frames of {frames}")
    return Recomputed(
        (height * width / layer.pixels) ** 0.5, f"{layer.pixels} output positions of {height}×{width}"
    )


@recomputes("theory")
def pipeline_side(sources: Sources, side: int) -> Recomputed:
    """The nearest side (pixels) that the pipeline of Wan2.1-T2V-1.3B runs; it refuses all others."""
    multiple = sources.theory.model.limits.size_multiple
    nearest = multiple * round(side / multiple)
    return Recomputed(float(nearest), f"nearest multiple of {multiple}; the pipeline refuses others")


@recomputes("theory")
def made_frames(sources: Sources, frames: int) -> Recomputed:
    """Frames that the pipeline makes where so many are asked."""
    return Recomputed(
        float(wan_vae.executed_frames(sources.theory.vae, frames)), f"made where {frames} are asked"
    )


@recomputes("theory")
def tokens(sources: Sources, height: int, width: int, frames: int) -> Recomputed:
    """Tokens ℓ that the transformer of Wan2.1-T2V-1.3B sees."""
    value = true_work(sources.theory.model, height, width, frames, 1).tokens
    return Recomputed(float(value), f"ℓ of {height}×{width}, {frames} frames")


@recomputes("theory")
def efficiency_of_work(sources: Sources, count: str) -> Recomputed:
    """µ: ``study`` or ``true`` FLOP of the default video over the printed latency (table 4) and peak."""
    work = sources.theory.study if count == "study" else sources.theory.true
    latency_s = sources.study.models[sources.theory.model.key].latency_s[0]
    value = work.total_flop / latency_s / paper.PEAK_FLOP_PER_S
    kind = "the printed formula" if count == "study" else "what the published architecture executes"
    other = sources.theory.true if count == "study" else sources.theory.study
    return Recomputed(
        value, f"{kind} over the printed {latency_s:g} s; the other count gives "
        f"{shown(other.total_flop / latency_s / paper.PEAK_FLOP_PER_S)}",
    )  # fmt: skip


@recomputes("theory")
def growth_of_flop(sources: Sources, factor: dict[str, int]) -> Recomputed:
    """FLOP, by the study's formula, of the default video with dimensions multiplied, over its own."""
    height, width, frames, steps = sources.theory.size
    grown = (
        height * factor.get("height", 1), width * factor.get("width", 1), frames * factor.get("frames", 1),
        steps,
    )  # fmt: skip
    value = paper_work(*grown).total_flop / sources.theory.study.total_flop
    true = _true_ratio(sources, grown)
    return Recomputed(value, f"the printed formula from {height}×{width}×{frames} on; true work: {true}")


def _true_ratio(sources: Sources, size: tuple[int, int, int, int]) -> str:
    return shown(true_work(sources.theory.model, *size).total_flop / sources.theory.true.total_flop)


# --- accelerators -------------------------------------------------------------------------------------------


@recomputes("theory")
def vendor_value(sources: Sources, accelerator: str, value: str) -> Recomputed:
    """A vendor's published value: ``peak_bf16_dense_TFLOPs``, ``bandwidth_TB_per_s``, ``board_power_W``."""
    card = sources.theory.accelerators[accelerator]
    return Recomputed(float(getattr(card, value)), f"{card.source}")


@recomputes("theory")
def derived_threshold(sources: Sources, accelerator: str, operator: str) -> Recomputed:
    """ℓ* of ``attention`` or ``mlp`` derived with every byte that appendix B names, at the study's widths."""
    beta = sources.theory.balance(accelerator)
    if operator == "attention":
        value = thresholds.attention_threshold(beta)
    else:
        value = thresholds.gemm_threshold(beta, paper.WIDTH, paper.MLP_EXPANSION * paper.WIDTH)
    return Recomputed(value, f"derived at the vendor's β = {shown(beta)} FLOP/byte")


@recomputes("study")
def printed_balance(sources: Sources, peak: str, bandwidth: str) -> Recomputed:
    """β = Θ_peak / B of two printed numbers, by their claims' ids, with what their rounding leaves open."""
    (top, top_step), (rate, rate_step) = (sources.claims[name] for name in (peak, bandwidth))
    value = thresholds.balance(top, rate)
    half = value * (top_step / top + rate_step / rate) / 2
    return Recomputed(value, f"{top:g} / {rate:g} as printed", half)


@recomputes("study")
def printed_threshold(sources: Sources, balance: str, operator: str) -> Recomputed:
    """ℓ* of ``attention`` (sβ/2) or ``mlp`` (sβ) by the study's formula, of a printed β."""
    beta, step = sources.claims[balance]
    formula = (
        thresholds.study_attention_threshold if operator == "attention" else thresholds.study_mlp_threshold
    )
    return Recomputed(formula(beta), f"the printed formula at the printed β = {beta:g}", formula(step) / 2)


# --- printed numbers against each other ---------------------------------------------------------------------


@recomputes("study")
def same_as(sources: Sources, claim: str) -> Recomputed:
    """Another printed number that says the same."""
    value, step = sources.claims[claim]
    return Recomputed(value, f"printed elsewhere: claim {claim}", step / 2)


@recomputes("study")
def printed_power_W(sources: Sources, model: str) -> Recomputed:
    """GPU energy over latency (W), both of table 4."""
    printed = sources.study.models[model]
    value = 3600 * printed.gpu_energy_Wh[0] / printed.latency_s[0]
    return Recomputed(value, f"{printed.gpu_energy_Wh[0]:g} Wh in {printed.latency_s[0]:g} s, table 4")


@recomputes("study")
def printed_total_Wh(sources: Sources, model: str) -> Recomputed:
    """GPU, CPU and RAM energy (Wh) of table 4 together."""
    return Recomputed(sources.study.models[model].total_energy_Wh, "GPU, CPU and RAM of table 4 together")


@recomputes("study")
def printed_ratio(sources: Sources, of: str, to: str) -> Recomputed:
    """Energy of one output over another's, as printed: models by table 4, other outputs by section 6."""
    first, second = sources.study.cost_Wh(of), sources.study.cost_Wh(to)
    return Recomputed(first / second, f"{first:g} Wh over {second:g} Wh, both as printed")


@recomputes("study")
def printed_steps(sources: Sources, extreme: str) -> Recomputed:
    """Least or most steps in table 2 of the models other than AnimateDiff."""
    steps = {
        key: model.defaults.num_inference_steps
        for key, model in sources.study.models.items()
        if key != "animatediff-lightning"
    }
    value = min(steps.values()) if extreme == "least" else max(steps.values())
    return Recomputed(float(value), "of the other models' steps in table 2")


@recomputes("study")
def printed_models(sources: Sources) -> Recomputed:
    """Models of its tables 2 and 4."""
    return Recomputed(float(len(sources.study.models)), "rows of tables 2 and 4")


# --- our own records ----------------------------------------------------------------------------------------


@recomputes("h200")
def scaling_exponent(sources: Sources, experiment: str, quantity: str, x: str) -> Recomputed:
    """Exponent of cost over ``x`` for the whole of one of our sweeps, with its interval (scaling.csv)."""
    table = sources.table("scaling")
    rows = table[
        (table["set"] == experiment) & (table["quantity"] == quantity) & (table["x"] == x)
        & (table["kind"] == "global")
    ]  # fmt: skip
    if rows.empty:
        raise DataAbsent(f"scaling.csv has no global exponent of {quantity} over {x} for {experiment}")
    row = rows.iloc[-1]
    half = (row["exponent_ci95_high"] - row["exponent_ci95_low"]) / 2
    return Recomputed(
        float(row["exponent"]), f"power law over {int(row['n'])} points of our {experiment}, random weights",
        float(half) if pd.notna(half) else 0.0,
    )  # fmt: skip


@recomputes("h200")
def straight_line_r2(sources: Sources, quantity: str) -> Recomputed:
    """R² of cost over steps as a straight line with an intercept, the worst of our sizes (scaling.csv)."""
    table = sources.table("scaling")
    rows = table[(table["set"] == "steps") & (table["quantity"] == quantity) & (table["kind"] == "global")]
    rows = rows[rows["r2_linear"].notna()]
    if rows.empty:
        raise DataAbsent(f"scaling.csv has no straight line of {quantity} over steps")
    row = rows.sort_values("r2_linear").iloc[0]
    note = f"whole videos of ours, {row['range']}; what comes once a video makes the exponent"
    return Recomputed(
        float(row["r2_linear"]), f"{note} {shown(float(row['exponent']))}, and the line straight"
    )


@recomputes("h200")
def doubling_ratio(sources: Sources, dimension: str, quantity: str) -> Recomputed:
    """The largest measured ratio of cost where a dimension doubles (doubling.csv): the claim's best case."""
    table = sources.table("doubling")
    rows = table[(table["dimension"] == dimension) & (table["quantity"] == quantity)]
    if rows.empty:
        raise DataAbsent(f"doubling.csv has no pair in which {dimension} doubles")
    row = rows.sort_values("ratio").iloc[-1]
    half = (row["ratio_ci95_high"] - row["ratio_ci95_low"]) / 2
    return Recomputed(
        float(row["ratio"]),
        f"largest of {len(rows)} pairs of ours (least: {shown(rows['ratio'].min())}), random weights",
        float(half) if pd.notna(half) else 0.0,
    )


@recomputes("h200")
def smallest_step_ratio(sources: Sources, quantity: str) -> Recomputed:
    """Cost with half the steps over cost with all, of the largest pair that we measured (doubling.csv)."""
    found = doubling_ratio(sources, "steps", quantity)
    return Recomputed(1 / found.value, found.note, found.half_width / found.value**2)
