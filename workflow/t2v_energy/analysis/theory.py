"""The study's theory beside the true one: its tables 1 (formulas), 5 (symbols) and 6 (the VAE's decoder).

Everything here is computed from formulas and configuration; nothing is measured.  The tables are about
Wan2.1-T2V-1.3B whatever campaign is built, because the study's are.  A ratio is the study's count over the
true one.  Table 7 is in :mod:`t2v_energy.analysis.theory_thresholds`, and
:mod:`t2v_energy.analysis.theory_tables` writes them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import pandas as pd

from t2v_energy.config import (
    Accelerator,
    ModelFile,
    load_accelerators,
    load_campaign,
    load_experiment,
    load_model,
)
from t2v_energy.errors import UserError
from t2v_energy.work import (
    Work,
    paper,
    paper_work,
    thresholds,
    true_work,
    umt5,
    wan,
    wan_latent_shape,
    wan_vae,
)

STUDY_MODEL = "wan2.1-t2v-1.3b"
STUDY_CAMPAIGN = "h200"  # whose sweeps the smallest number of tokens is taken from
STUDY_ACCELERATOR = "h100-sxm"
STUDY_LATENCY_S = 410.0  # table 4, WAN2.1-T2V-1.3B
STUDY_GPU_ENERGY_WH = 78.8  # table 4
STUDY_SMALLEST = (256, 256, 81)  # height, width, frames: sections 4.2 and 5.1.1
J_PER_WH = 3600.0

TABLE1_COLUMNS = (
    "component", "per", "study_formula", "true_formula", "study_flop_per_video", "true_flop_per_video",
    "study_flop_per_step", "true_flop_per_step", "ratio", "true_share_percent", "note",
)  # fmt: skip
TABLE5_COLUMNS = ("group", "symbol", "meaning", "printed", "true", "equal", "consequence")
TABLE6_COLUMNS = (
    "stage", "operator", "kernel", "channels", "printed_frames", "printed_convolutions", "study_flop",
    "true_frames", "true_convolutions", "true_flop", "ratio", "true_share_percent", "note",
)  # fmt: skip


@dataclass(frozen=True)
class Theory:
    """What the tables are computed from.

    Attributes:
        model: the study's model, as published.
        accelerators: by key, in the order of config/accelerators.yaml.
        smallest_tokens: least number of tokens of any configuration in the sweeps.
        smallest: that configuration's height, width, frames.
    """

    model: ModelFile
    accelerators: Mapping[str, Accelerator]
    smallest_tokens: int
    smallest: tuple[int, int, int]

    @property
    def size(self) -> tuple[int, int, int, int]:
        """Height, width, frames and steps that the study's table 2 gives the model."""
        d = self.model.defaults
        return d.height, d.width, d.num_frames, d.num_inference_steps

    @property
    def study(self) -> Work:
        """The study's count at :attr:`size`."""
        return paper_work(*self.size)

    @property
    def true(self) -> Work:
        """What the model executes at :attr:`size`."""
        return true_work(self.model, *self.size)

    @property
    def transformer(self) -> dict[str, Any]:
        """Configuration of the transformer, complete."""
        return wan.settings(self.model.components["transformer"].config)

    @property
    def text_encoder(self) -> dict[str, Any]:
        """Configuration of the text encoder, complete."""
        return umt5.settings(self.model.components["text_encoder"].config)

    @property
    def vae(self) -> dict[str, Any]:
        """Configuration of the VAE, complete."""
        return wan_vae.settings(self.model.components["vae"].config)

    @property
    def latent(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns at :attr:`size`."""
        return wan_latent_shape(self.model, *self.size[:3])

    def balance(self, accelerator: str) -> float:
        """β of the vendor's values (FLOP/byte)."""
        card = self.accelerators[accelerator]
        return thresholds.balance(card.peak_bf16_dense_TFLOPs, card.bandwidth_TB_per_s)


def read_theory(root: Path = Path()) -> Theory:
    """Everything from the repository's configuration.

    Raises:
        UserError: a file of it is missing or wrong, or no sweep is of the study's model.
    """
    model = load_model(root, STUDY_MODEL)
    tokens, smallest = _smallest_sweep(root, model)
    return Theory(model, load_accelerators(root), tokens, smallest)


def _smallest_sweep(root: Path, model: ModelFile) -> tuple[int, tuple[int, int, int]]:
    campaign = load_campaign(root, STUDY_CAMPAIGN)
    sizes = set()
    for key in campaign.experiments:
        experiment = load_experiment(root, campaign, key)
        for entry in experiment.vary:
            if (entry.model or experiment.model) != model.key:
                continue
            values = [
                getattr(entry, name) or getattr(experiment.fixed, name) or getattr(model.defaults, name)
                for name in ("height", "width", "num_frames")
            ]
            sizes.add((values[0], values[1], values[2]))
    if not sizes:
        raise UserError(
            f"no experiment of campaign {STUDY_CAMPAIGN!r} is of {model.key}",
            where=f"config/campaigns/{STUDY_CAMPAIGN}.yaml, experiments",
            remedy="restore it from the repository",
        )
    return min((true_work(model, *size, num_inference_steps=1).tokens, size) for size in sizes)


# --- table 1: formulas --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Component:
    name: str
    per: str
    study_formula: str
    true_formula: str
    study_flop: float
    true_flop: float
    note: str


def table1(theory: Theory) -> pd.DataFrame:
    """Table 1, columns :data:`TABLE1_COLUMNS`: one row a component, then the embeddings and the total.

    FLOP at the model's default size and steps, all guidance passes together.  ``per`` is ``video`` or
    ``step``; the columns ``_per_step`` are empty for what runs once a video.
    """
    steps, total = theory.size[3], theory.true.total_flop
    rows = []
    for part in _components(theory):
        each = steps if part.per == "step" else None
        ratio = part.study_flop / part.true_flop
        rows.append(
            (
                part.name, part.per, part.study_formula, part.true_formula, part.study_flop, part.true_flop,
                part.study_flop / each if each else None, part.true_flop / each if each else None,
                ratio, 100 * part.true_flop / total, part.note,
            )
        )  # fmt: skip
    return pd.DataFrame(rows, columns=list(TABLE1_COLUMNS))


def _components(theory: Theory) -> list[_Component]:
    study, true = theory.study, theory.true
    height, width, frames, _ = theory.size
    stages = wan_vae.decode_flop_by_stage(theory.vae, *theory.latent)
    middle = float(stages["mid_attention"])
    parts = [
        _Component("text encoder", "video", *_FORMULAS["text_encoder"],
                   study.flop["text_encoder"], true.flop["text_encoder"],
                   "UMT5-XXL (the study: T5-XXL) has a gated feed-forward network: three matrices, not two"),
        _Component("VAE decoder convolutions", "video", *_FORMULAS["vae_convolutions"],
                   paper.vae_convolution_flop(height, width, frames), true.flop["vae"] - middle,
                   "table 6 lacks the residual blocks at full resolution; its time upsamplings are counted "
                   "at twice their frames"),
        _Component("VAE middle attention", "video", *_FORMULAS["vae_attention"],
                   paper.vae_attention_flop(height, width, frames), middle,
                   "the same wherever the number of frames is 4k + 1"),
        *(_Component(name, "step", *_FORMULAS[key], study.flop[key], true.flop[key], note)
          for key, (name, note) in _DENOISER_NOTES.items()),
        _Component("embeddings", "step", *_FORMULAS["embeddings"], 0.0, true.flop["embeddings"],
                   "patch embedding, output projection and text projection: the study leaves them out"),
        _Component("total", "video", *_FORMULAS["total"], study.total_flop, true.total_flop,
                   "all guidance passes and steps"),
    ]  # fmt: skip
    return parts


_FORMULAS: Mapping[str, tuple[str, str]] = {  # as the study prints it; as the architecture executes it
    "text_encoder": (
        "p_text L_text (8m d_text² + 4m² d_text + 4f_text m d_text²)",
        "p_text L_text (8m d_text² + 4m² d_text + 6m d_text d_ff)",
    ),
    "vae_convolutions": (
        "Σ_j 2k_t k_h k_w C_in C_out T_j H_j W_j over table 6",
        "Σ_j 2k_t k_h k_w C_in C_out T_j H_j W_j over all layers",
    ),
    "vae_attention": ("T_*(8C_*² L_* + 4L_*² C_*)", "T_*(8C_*² L_* + 4L_*² C_*)"),
    "self_attention": ("N(8ℓd² + 4ℓ²d)", "N(8ℓd² + 4ℓ²d)"),
    "cross_attention": ("N(4ℓd² + 4md² + 4ℓmd)", "N(4ℓd² + 4md² + 4ℓmd)"),
    "mlp": ("N · 4fℓd²", "N · 4ℓd d_ff"),
    "timestep_mlp": ("2d_τ d + 14d²", "2d_τ d + 2d² + 12d²"),
    "embeddings": ("—", "2ℓp_t p_h p_w d(C_in + C_out) + 2m(d_text d + d²)"),
    "total": ("once + gS · (self + cross + MLP + τ)", "once + gS · (self + cross + MLP + τ + embeddings)"),
}

_DENOISER_NOTES: Mapping[str, tuple[str, str]] = {
    "self_attention": (
        "self-attention",
        "the form is right; N, d and ℓ are not the published model's (table 5)",
    ),
    "cross_attention": (
        "cross-attention",
        "the form is right: linear in ℓ, although section 3.6 counts it among the terms in ℓ²",
    ),
    "mlp": ("MLP", "appendix B writes fℓd² for the same layers"),
    "timestep_mlp": (
        "timestep MLP",
        "eq. 10 holds the factor gS and section 3.4 multiplies by it again; counted once a pass. "
        "d_τ is the width of the sinusoidal input; the hidden width is d",
    ),
}


# --- table 5: symbols ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Symbol:
    group: str
    symbol: str
    meaning: str
    printed: str
    true: str
    consequence: str = ""

    @property
    def equal(self) -> str:
        if "—" in (self.printed, self.true):
            return ""
        return "yes" if self.printed == self.true else "no"


def table5(theory: Theory) -> pd.DataFrame:
    """Table 5, columns :data:`TABLE5_COLUMNS`: every symbol that the study's table 5 prints, in its order.

    ``equal`` is ``yes`` or ``no``; empty where the study prints no value.  Hardware "true" values follow from
    the study's own table 4 and the vendors' published values, not from measurements of ours.
    """
    symbols = (*_video_symbols(theory), *_transformer_symbols(theory), *_encoder_symbols(theory),
               *_vae_symbols(theory), *_hardware_symbols(theory))  # fmt: skip
    rows = [(s.group, s.symbol, s.meaning, s.printed, s.true, s.equal, s.consequence) for s in symbols]
    return pd.DataFrame(rows, columns=list(TABLE5_COLUMNS))


def _video_symbols(theory: Theory) -> list[_Symbol]:
    group, vae, limits = "video", theory.vae, theory.model.limits
    patch = theory.transformer["patch_size"]
    spatial, multiple = vae["scale_factor_spatial"], limits.size_multiple
    return [
        _Symbol(group, "T", "number of frames", "multiple of 4 (section 4.2)",
                f"{limits.frames_multiple}k + {limits.frames_offset}",
                "the pipeline runs "
                f"{wan_vae.executed_frames(vae, 4)}, {wan_vae.executed_frames(vae, 8)}, …, "
                f"{wan_vae.executed_frames(vae, 100)} frames where 4, 8, …, 100 are asked"),
        _Symbol(group, "H × W", "spatial resolution", "multiples of 8 (section 4.2)",
                f"multiples of {multiple}",
                f"the largest size of the study, 3520×1980, is neither: 1980 is {1980 / 8:g} · 8 and "
                f"{1980 / multiple:g} · {multiple}; the pipeline refuses it"),
        _Symbol(group, "S", "number of denoising steps", "variable", "variable"),
        _Symbol(group, "g", "guidance passes per step", str(paper.GUIDANCE_PASSES),
                str(theory.model.passes_per_step)),
        _Symbol(group, "v_t, v_s", "downsampling factors of the VAE",
                f"{paper.TEMPORAL_FACTOR}, {paper.SPATIAL_FACTOR}",
                f"{vae['scale_factor_temporal']}, {spatial}"),
        _Symbol(group, "p_h, p_w", "spatial patch size", f"{paper.PATCH}, {paper.PATCH}",
                f"{patch[1]}, {patch[2]}"),
    ]  # fmt: skip


def _transformer_symbols(theory: Theory) -> list[_Symbol]:
    group, c = "transformer", theory.transformer
    d, inner = wan.width(c), c["ffn_dim"]
    height, width, frames, _ = theory.size
    printed_tokens, tokens = paper.token_length(height, width, frames), theory.true.tokens
    factor = theory.vae["scale_factor_temporal"]
    side = paper.SPATIAL_FACTOR * paper.PATCH
    defaults = "the default of Wan's model class, not the published checkpoint's"
    return [
        _Symbol(group, "N", "layers", str(paper.LAYERS), str(c["num_layers"]),
                f"{defaults}; work × {paper.LAYERS / c['num_layers']:.3f}"),
        _Symbol(group, "d", "hidden size", str(paper.WIDTH), str(d),
                f"{defaults}; linear layers × {(paper.WIDTH / d) ** 2:.3f}, "
                f"attention products × {paper.WIDTH / d:.3f}"),
        _Symbol(group, "f", "expansion factor of the MLP", str(paper.MLP_EXPANSION), f"{inner / d:.3f}",
                f"{inner}/{d}; with the printed d, "
                f"MLP × {paper.MLP_EXPANSION * paper.WIDTH**2 / (inner * d):.3f}"),
        _Symbol(group, "ℓ", "tokens", f"(1 + T/{factor}) H/{side} W/{side}",
                f"(1 + (T − 1)/{factor}) H/{side} W/{side}",
                f"{printed_tokens:g} instead of {tokens} at {height}×{width}×{frames}: "
                f"{1 + frames / factor:g} latent frames instead of {theory.latent[0]}"),
    ]  # fmt: skip


def _encoder_symbols(theory: Theory) -> list[_Symbol]:
    group, c = "text encoder", theory.text_encoder
    expansion = c["d_ff"] / c["d_model"]
    gated = umt5.forward_flop(c, paper.TEXT_TOKENS) * paper.TEXT_PASSES / paper.text_encoder_flop()
    d = wan.width(theory.transformer)
    return [
        _Symbol(group, "m", "text tokens", str(paper.TEXT_TOKENS), str(theory.model.tokenizer.max_length)),
        _Symbol(group, "p_text", "encoder passes per video", str(paper.TEXT_PASSES),
                str(theory.model.passes_per_step), "one for the prompt, one for the negative prompt"),
        _Symbol(group, "d_text", "hidden size", str(paper.TEXT_WIDTH), str(c["d_model"])),
        _Symbol(group, "L_text", "layers", str(paper.TEXT_LAYERS), str(c["num_layers"])),
        _Symbol(group, "f_text", "expansion factor of the MLP", f"{paper.TEXT_EXPANSION:g}", f"{expansion:g}",
                f"equal, but the network is gated: three matrices, true work × {gated:.3f}"),
        _Symbol("timestep", "d_τ", "hidden width of the timestep MLP", str(paper.TIMESTEP_WIDTH), str(d),
                f"{theory.transformer['freq_dim']} is the width of its sinusoidal input; "
                "the formula uses it as such, so the count is right"),
    ]  # fmt: skip


def _vae_symbols(theory: Theory) -> list[_Symbol]:
    group, (frames, rows, columns) = "VAE", theory.latent
    height, width, video, _ = theory.size
    spatial = [x for x in _later_frame(theory) if x.taps > 1]
    pointwise = len(_later_frame(theory)) - len(spatial) + 1  # and the post-quantisation convolution
    channels = wan_vae.decoder_channels(theory.vae)[0]
    printed = len({row.row for row in paper.vae_convolutions(height, width, video)})
    middle = f"{ceil(video / paper.TEMPORAL_FACTOR)}, {height // 8}, {width // 8}"
    see = "layer by layer in table 6"
    return [
        _Symbol(group, "j", "index of a decoder layer", f"1, …, {printed}", f"1, …, {len(spatial)}"),
        _Symbol(group, "N_dec,conv", "3D convolutions in the decoder", str(printed), str(len(spatial)),
                f"{printed} is the number of rows of table 6, not of layers; "
                f"{pointwise} convolutions of kernel 1 come on top"),
        _Symbol(group, "k_t, k_h, k_w", "kernel sizes", "—", "—", see),
        _Symbol(group, "C_in, C_out", "channels", "—", "—", see),
        _Symbol(group, "T_j, H_j, W_j", "output sizes", "—", "—", see),
        _Symbol(group, "C_*", "channels at the middle attention", str(paper.MIDDLE_CHANNELS), str(channels)),
        _Symbol(group, "T_*, H_*, W_*", f"middle sizes at {height}×{width}×{video}", middle,
                f"{frames}, {rows}, {columns}", "⌈T/4⌉ equals (T − 1)/4 + 1 for T = 4k + 1"),
        _Symbol(group, "L_*", "tokens of one frame in the middle", str(height * width // 64),
                str(rows * columns)),
    ]  # fmt: skip


def _later_frame(theory: Theory) -> list[wan_vae.Convolution]:
    """The decoder's convolutions for a latent frame that is not the first."""
    return list(wan_vae.decoder_convolutions(theory.vae, theory.latent[1] * theory.latent[2], first=False))


def _hardware_symbols(theory: Theory) -> list[_Symbol]:
    group, card = "hardware", theory.accelerators[STUDY_ACCELERATOR]
    power = STUDY_GPU_ENERGY_WH * J_PER_WH / STUDY_LATENCY_S
    return [
        _Symbol(group, "µ", "efficiency", f"{paper.EFFICIENCY}", f"{efficiency(theory.true):.3f}",
                f"true work over the study's own {STUDY_LATENCY_S:g} s (table 4); "
                f"its own count gives {efficiency(theory.study):.3f} there. Appendix B says 0.4"),
        _Symbol(group, "Θ_peak", "peak throughput (FLOP/s)", f"{989e15:.3g}",
                f"{card.peak_bf16_dense_TFLOPs * 1e12:.3g}",
                f"a slip: section 3.4 has {paper.PEAK_FLOP_PER_S / 1e12:g} TFLOP/s and calculates with it"),
        _Symbol(group, "P_max", "sustained GPU power (W)", f"{paper.MAX_POWER_W:g}", f"{power:.0f}",
                f"{card.board_power_W:g} W is the board's limit; table 4 gives "
                f"{STUDY_GPU_ENERGY_WH} Wh in {STUDY_LATENCY_S:g} s"),
        _Symbol(group, "D_total", "latency", "F_total/(µΘ_peak)", "F_total/(µΘ_peak)",
                "a definition of µ, once µ is fitted"),
    ]  # fmt: skip


def efficiency(work: Work) -> float:
    """µ that the study's own latency of its default video (table 4) gives for ``work``, on its H100."""
    return work.total_flop / STUDY_LATENCY_S / paper.PEAK_FLOP_PER_S


# --- table 6: the VAE's decoder -----------------------------------------------------------------------------

_BLOCK, _TIME, _SPACE = "residual blocks", "time upsampling", "space upsampling"
_KINDS = {(3, 1, 1): _TIME, (1, 3, 3): _SPACE}
_STAGES: tuple[tuple[str, str, str, str], ...] = (  # row of table 6, operator, true stage, note
    ("", "convolution", "post_quant_conv", "not in the study's table"),
    ("D0", "convolution", "conv_in", ""),
    ("Middle (RBs)", _BLOCK, "mid_block", "two residual blocks of two convolutions; the study counts two"),
    ("Middle (attn 2D)", "attention", "mid_attention", ""),
    ("D1 (RBs)", _BLOCK, "up_blocks.0", ""),
    ("Up (time) 1", _TIME, "up_blocks.0", "runs before the frames double, and not for the first one"),
    ("Up (space) 1", _SPACE, "up_blocks.0", ""),
    ("D2 (RBs)", _BLOCK, "up_blocks.1", "with the shortcut of kernel 1 that widens 192 to 384"),
    ("Up (time) 2", _TIME, "up_blocks.1", "runs before the frames double, and not for the first one"),
    ("Up (space) 2", _SPACE, "up_blocks.1", ""),
    ("D3 (RBs)", _BLOCK, "up_blocks.2", ""),
    ("Up (space) 3", _SPACE, "up_blocks.2", ""),
    ("", _BLOCK, "up_blocks.3", "at full resolution: not in the study's table"),
    ("Head", "convolution", "conv_out", ""),
)  # fmt: skip
MISSING_STAGE = "up_blocks.3"


def table6(theory: Theory) -> pd.DataFrame:
    """Table 6, columns :data:`TABLE6_COLUMNS`: the study's rows beside the decoder's stages, in their order.

    FLOP at the model's default size.  ``printed_convolutions`` is how many convolutions we take a row of the
    study's table for (:mod:`t2v_energy.work.paper`); ``printed_frames`` and ``true_frames`` are output frames
    of one of them over the video.  Where the study has no row, its columns are empty.  The last row is the
    total.
    """
    rows = [_stage_row(theory, *stage) for stage in _STAGES]
    table = pd.DataFrame(rows, columns=list(TABLE6_COLUMNS))
    printed, true = float(table["study_flop"].sum()), float(table["true_flop"].sum())
    last = {
        "stage": "total", "operator": "", "study_flop": printed, "true_flop": true,
        "printed_convolutions": table["printed_convolutions"].sum(),
        "true_convolutions": table["true_convolutions"].sum(), "ratio": printed / true,
        "note": "the first frame skips both time upsamplings; at 4k + 1 frames the stages' frames agree",
    }  # fmt: skip
    table = pd.concat([table, pd.DataFrame([last])], ignore_index=True)[list(TABLE6_COLUMNS)]
    table["true_share_percent"] = 100 * table["true_flop"] / true
    text = ["stage", "operator", "kernel", "channels", "note"]
    table[text] = table[text].fillna("")
    return table


def _stage_row(theory: Theory, name: str, operator: str, stage: str, note: str) -> dict[str, Any]:
    upsampling = operator if operator in _KINDS.values() else None
    printed = [row for row in paper.vae_convolutions(*theory.size[:3]) if row.row == name]
    layers = [
        (layer, count)
        for layer, count in wan_vae.decoded_layers(theory.vae, *theory.latent)
        if layer.stage == stage and _KINDS.get(layer.kernel) == upsampling
    ]
    first = max(layers, key=lambda item: item[0].taps)[0]
    row: dict[str, Any] = {
        "stage": name or stage, "operator": operator, "kernel": "×".join(map(str, first.kernel)),
        "channels": f"{first.inputs} → {first.outputs}", "true_frames": first.frames, "note": note,
        "true_convolutions": sum(count for _, count in layers),
        "true_flop": float(sum(layer.flop * count for layer, count in layers)),
    }  # fmt: skip
    if printed:
        row |= {
            "printed_frames": printed[0].frames,
            "printed_convolutions": sum(part.count for part in printed),
            "study_flop": sum(part.flop * part.count for part in printed),
        }
    if operator == "attention":
        frames, rows, columns = theory.latent
        products = 4 * frames * (rows * columns) ** 2 * first.inputs
        row |= {
            "kernel": "", "channels": f"{first.inputs} → {first.inputs}",
            "printed_frames": ceil(theory.size[2] / paper.TEMPORAL_FACTOR),
            "study_flop": paper.vae_attention_flop(*theory.size[:3]),
            "true_flop": row["true_flop"] + products,
        }  # fmt: skip
    if "study_flop" in row:
        row["ratio"] = row["study_flop"] / row["true_flop"]
    return row
