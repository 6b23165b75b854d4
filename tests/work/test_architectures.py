"""The closed forms of every model of the study equal what a counter sees of the real modules, exactly."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from t2v_energy.config import ModelFile, load_model
from t2v_energy.errors import UserError
from t2v_energy.work import (
    OPERATORS,
    STAGES,
    Work,
    animatediff,
    clip,
    cogvideox,
    cogvideox_vae,
    contentv,
    image_vae,
    ltx,
    ltx_vae,
    mochi,
    mochi_vae,
    parameter_counts,
    t5,
    true_work,
)
from t2v_energy.work.architectures import (
    DECODERS,
    latent_shape,
    latents,
    refine_calls,
    text_encoder_flop,
)

ROOT = Path(__file__).parents[2]
Size = tuple[int, int, int]  # height, width, frames

OTHER_SIZES: Mapping[str, Size] = {
    "wan2.1-t2v-14b": (256, 272, 5),
    "cogvideox-2b": (256, 336, 13),  # an even number of latent frames
    "cogvideox-5b": (256, 336, 13),
    "ltx-video-0.9.7-dev": (256, 384, 25),
    "mochi-1-preview": (240, 432, 25),
    "animatediff-lightning": (360, 504, 8),  # 45 rows: halving rounds up
    "contentv-8b": (256, 272, 9),
}
"""Every model but Wan 1.3B (see test_wan_work.py), and a size of each beside its default."""

SAME_DECODER = {
    "cogvideox-5b": "cogvideox-2b",
    "wan2.1-t2v-14b": "wan2.1-t2v-1.3b",
    "contentv-8b": "wan2.1-t2v-1.3b",
}

PARAMETERS_BILLION: Mapping[str, Mapping[str, float]] = {
    "wan2.1-t2v-1.3b": {"transformer": 1.419, "text_encoder": 5.681},
    "wan2.1-t2v-14b": {"transformer": 14.29, "text_encoder": 5.681},
    "cogvideox-2b": {"transformer": 1.694, "text_encoder": 4.762},
    "cogvideox-5b": {"transformer": 5.570, "text_encoder": 4.762},
    "ltx-video-0.9.7-dev": {"transformer": 13.04, "vae": 1.247, "text_encoder": 4.762},
    "mochi-1-preview": {"transformer": 10.03, "text_encoder": 4.762},
    "animatediff-lightning": {"unet": 0.8595, "motion_adapter": 0.4532, "text_encoder": 0.1231},
    "contentv-8b": {
        "transformer": 8.057,
        "text_encoder": 0.1237,
        "text_encoder_2": 0.6947,
        "text_encoder_3": 4.762,
    },
}
"""Published sizes; AnimateDiff's network is that of Stable Diffusion 1.5 with the adapter."""

FLOP: Mapping[str, tuple[float, float]] = {
    "cogvideox-2b": (2.400e14, 3.150e14),
    "cogvideox-5b": (6.644e14, 3.150e14),
    "ltx-video-0.9.7-dev": (1.115e14, 8.78e13),
    "animatediff-lightning": (1.775e13, 4.02e13),
}
"""One denoiser call and the decoding at the default size, as counted before these formulas were written."""

every_model = pytest.mark.parametrize("key", OTHER_SIZES)
both_sizes = pytest.mark.parametrize("default", [True, False], ids=["default", "other"])
tiny_models = pytest.mark.parametrize("key", tiny.KEYS)


def model(key: str) -> ModelFile:
    return tiny.model(key) if key in tiny.KEYS else load_model(ROOT, key)


def size_of(key: str, default: bool) -> Size:
    d = model(key).defaults
    return (d.height, d.width, d.num_frames) if default else OTHER_SIZES[key]


def with_configs(base: ModelFile, changes: Mapping[str, Mapping[str, Any]]) -> ModelFile:
    """``base`` with other values in the configurations of some parts."""
    parts = dict(base.components)
    for name, values in changes.items():
        parts[name] = parts[name].model_copy(update={"config": {**parts[name].config, **values}})
    return base.model_copy(update={"components": parts})


def tracing() -> Any:
    return pytest.importorskip("t2v_energy.work.trace")


@cache
def denoiser_trace(key: str, size: Size) -> Any:
    return tracing().trace_denoiser(model(key), *size)


@cache
def refine_trace(key: str, size: Size) -> Any:
    return tracing().trace_refine(model(key), *size)


# --- every model of the study -------------------------------------------------------------------------------


@every_model
@both_sizes
def test_a_denoiser_call_equals_the_counter(key: str, default: bool) -> None:
    size = size_of(key, default)
    work = true_work(model(key), *size, num_inference_steps=1)
    assert work.flop_per_denoiser_call == denoiser_trace(key, size).total_flop


@every_model
@both_sizes
def test_each_operator_of_the_denoiser_equals_the_counter(key: str, default: bool) -> None:
    size, steps = size_of(key, default), 3
    work, seen = true_work(model(key), *size, num_inference_steps=steps), denoiser_trace(key, size)
    expected, products = operators(model(key), seen)
    loop = {o: work.flop.get(o, 0) for o in expected}
    attention_flop = work.attention_flop
    if work.other_stages:  # LTX: what the refinement adds
        added, added_products = operators(model(key), refine_trace(key, size))
        loop = {o: loop[o] - refine_calls(model(key)) * added[o] for o in loop}
        attention_flop -= refine_calls(model(key)) * added_products
    assert loop == {o: work.denoiser_calls * n for o, n in expected.items()}
    assert attention_flop == work.denoiser_calls * products


def operators(chosen: ModelFile, seen: Any) -> tuple[dict[str, int], int]:
    """FLOP by operator, and those of QKᵀ and PV, from the modules' names in a trace."""
    attention = [name for name in seen.by_module if name.endswith((".attn", ".attn1", ".attn2"))]
    crosses = chosen.architecture in ("wan", "ltx", "animatediff")
    cross = [n for n in attention if n.endswith("attn2") and crosses and "motion_modules" not in n]
    own = [name for name in attention if name not in cross]
    around = (".proj_in", ".proj_out")  # of a motion module: linear; of the other transformers: convolutions
    motion = [n for n in seen.by_module if "motion_modules" in n and n.endswith(around)]
    inner = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    projections = [n for n in seen.by_module if n.rpartition(".attn")[1] and n.endswith(inner)]
    flop = {
        "self_attention": sum(seen.by_module[n] for n in (*own, *motion)),
        "cross_attention": sum(seen.by_module[n] for n in cross),
        "mlp": seen.ending_with(".ff", ".ff_context", ".ffn"),
    }
    if chosen.architecture == "animatediff":
        ends = (*around, "conv_in", "conv_out", ".conv", ".conv1", ".conv2", ".conv_shortcut")
        names = [n for n in seen.by_module if n.endswith(ends) and n not in motion]
        flop["convolution"] = sum(seen.by_module[n] for n in names)
        flop["timestep_mlp"] = seen.ending_with("time_embedding", "time_emb_proj")
    if chosen.architecture == "contentv":
        flop["timestep_mlp"] = seen.ending_with("time_text_embed", "norm1", "norm1_context", "norm_out")
    products = sum(seen.by_module[n] for n in attention) - sum(seen.by_module[n] for n in projections)
    return flop, products


@pytest.mark.parametrize("key", [key for key in OTHER_SIZES if key not in SAME_DECODER])
@both_sizes
def test_the_decoder_equals_the_counter(key: str, default: bool) -> None:
    size = size_of(key, default)
    work = true_work(model(key), *size, num_inference_steps=1)
    assert work.flop["vae"] == tracing().trace_vae_decode(model(key), *size).total_flop


@pytest.mark.parametrize(("key", "other"), SAME_DECODER.items())
def test_a_decoder_that_is_tested_elsewhere_is_the_same(key: str, other: str) -> None:
    ours, theirs = (model(k).components["vae"] for k in (key, other))
    assert ours.class_ == theirs.class_
    free = {"scaling_factor": None}  # a multiplication of the latent
    assert {**ours.config, **free} == {**theirs.config, **free}


@every_model
def test_the_text_encoder_equals_the_counter(key: str) -> None:
    assert text_encoder_flop(model(key)) == tracing().trace_text_encoder(model(key)).total_flop


@both_sizes
def test_ltx_upsampling_and_refinement_equal_the_counter(default: bool) -> None:
    key = "ltx-video-0.9.7-dev"
    chosen, size = model(key), size_of(key, default)
    work, calls = true_work(chosen, *size, num_inference_steps=30), 4  # ⌊10 · 0.4⌋
    assert work.other_stages["upsample"] == tracing().trace_upsample(chosen, *size).total_flop
    assert work.other_stages["refine"] == calls * refine_trace(key, size).total_flop
    assert tuple(work.flop_by_stage) == ("text_encoder", "denoiser", "upsample", "refine", "vae_decode")
    assert work.flop_by_stage["denoiser"] == 30 * denoiser_trace(key, size).total_flop
    assert sum(work.flop_by_stage.values()) == work.total_flop


@every_model
def test_parameters_equal_those_of_the_modules(key: str) -> None:
    counts = parameter_counts(model(key))
    assert counts == {name: built_parameters(model(key), name) for name in counts}
    assert {n for n, part in model(key).components.items() if part.dtype} == set(counts)


def built_parameters(chosen: ModelFile, name: str) -> int:
    return sum(p.numel() for p in tracing().build_on_meta(chosen.components[name]).parameters())


@pytest.mark.parametrize("key", PARAMETERS_BILLION)
def test_parameters_are_within_a_percent_of_the_published_sizes(key: str) -> None:
    counts = parameter_counts(model(key))
    for name, billion in PARAMETERS_BILLION[key].items():
        assert counts[name] == pytest.approx(billion * 1e9, rel=0.01), name


@pytest.mark.parametrize("key", FLOP)
def test_known_values(key: str) -> None:
    call, decoding = FLOP[key]
    work = true_work(model(key), *size_of(key, True), 50)
    assert work.flop_per_denoiser_call == pytest.approx(call, rel=3e-4)
    assert work.flop["vae"] == pytest.approx(decoding, rel=1e-3)


@every_model
def test_work_adds_up(key: str) -> None:
    chosen = model(key)
    work = true_work(chosen, *size_of(key, True), 7)
    assert sum(work.flop_by_stage.values()) == work.total_flop
    assert tuple(work.flop)[: len(OPERATORS)] == OPERATORS
    assert tuple(s for s in work.flop_by_stage if s not in work.other_stages) == STAGES
    assert work.denoiser_calls == 7 * chosen.passes_per_step
    assert set(work.flop_by_stage) <= set(chosen.spans)  # stages have the names of spans
    assert 0 < work.attention_flop < work.flop["self_attention"] + work.flop["cross_attention"]


# --- whole pipelines, built tiny ----------------------------------------------------------------------------


@tiny_models
def test_a_whole_generation_equals_the_counter(key: str) -> None:
    """Not only the modules: how often the pipeline calls each, on what shapes, and what else multiplies."""
    torch = pytest.importorskip("torch")
    from t2v_energy.measurement.protocols import Subject
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    # torch's counter has no entry for the CPU's own attention
    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    counter, prompt, steps = FlopCounterMode(display=False, custom_mapping=on_cpu), "A red fox.", 2
    c = tiny.defaults(key, num_inference_steps=steps)
    subject = Subject(tiny.pipeline(key), tiny.model(key), c, prompt, "cpu")
    with torch.no_grad(), counter:
        subject.generate(steps)
    tokens = len(subject.pipeline.tokenizer.encode(prompt))
    size = (c.height, c.width, c.num_frames)
    work = true_work(tiny.model(key), *size, steps, prompt_tokens=tokens)
    assert counter.get_total_flops() == work.total_flop


OTHER_CONFIGURATIONS: tuple[tuple[str, dict[str, dict[str, Any]]], ...] = (
    ("tiny-cogvideox", {"transformer": {"attention_bias": False, "num_layers": 3, "time_embed_dim": 24}}),
    ("tiny-cogvideox", {"transformer": {"norm_elementwise_affine": False, "patch_bias": False}}),
    ("tiny-cogvideox", {"transformer": {"out_channels": 8, "in_channels": 12, "text_embed_dim": 40}}),
    ("tiny-cogvideox", {"transformer": {"use_rotary_positional_embeddings": True, "num_attention_heads": 3}}),
    ("tiny-cogvideox", {"vae": {"layers_per_block": 2, "latent_channels": 6, "out_channels": 4}}),
    ("tiny-cogvideox", {"vae": {"block_out_channels": [32, 64, 64, 96], "norm_num_groups": 32}}),
    ("tiny-cogvideox", {"vae": {"temporal_compression_ratio": 8}}),
    ("tiny-ltx", {"transformer": {"norm_elementwise_affine": True, "num_layers": 3, "in_channels": 12}}),
    ("tiny-ltx", {"transformer": {"attention_bias": False, "attention_out_bias": False, "out_channels": 4}}),
    ("tiny-ltx", {"transformer": {"caption_channels": 24}}),
    ("tiny-ltx", {"vae": {"timestep_conditioning": False, "decoder_layers_per_block": [2, 1, 3, 2]}}),
    ("tiny-ltx", {"vae": {"decoder_inject_noise": [True, False, True, True], "patch_size": 2}}),
    ("tiny-ltx", {"vae": {"upsample_factor": [1, 2, 2], "upsample_residual": [False, True, True]}}),
    (  # blocks that change their channels: then the class cannot be conditioned on a timestep
        "tiny-ltx",
        {
            "vae": {
                "upsample_factor": [1, 1, 1],
                "upsample_residual": [False] * 3,
                "decoder_block_out_channels": [8, 12, 16],
                "timestep_conditioning": False,
            }
        },
    ),
    ("tiny-ltx", {"vae": {"block_out_channels": [8, 16, 24, 32, 40], "layers_per_block": [1, 2, 1, 3, 2]}}),
    ("tiny-ltx", {"latent_upsampler": {"mid_channels": 64, "num_blocks_per_stage": 3}}),
    ("tiny-mochi", {"transformer": {"out_channels": 8, "num_layers": 3, "time_embed_dim": 16}}),
    ("tiny-mochi", {"transformer": {"pooled_projection_dim": 24, "num_attention_heads": 3}}),
    ("tiny-mochi", {"vae": {"layers_per_block": [1, 2, 3, 1, 2], "latent_channels": 6, "out_channels": 4}}),
    ("tiny-mochi", {"vae": {"decoder_block_out_channels": [32, 64, 96, 128]}}),
    ("tiny-mochi", {"vae": {"encoder_block_out_channels": [32, 64, 96, 128]}}),
    ("tiny-mochi", {"vae": {"add_attention_block": [True, False, True, False, True]}}),
    ("tiny-mochi", {"vae": {"temporal_expansions": [2, 1, 2], "spatial_expansions": [2, 1, 4]}}),
    ("tiny-animatediff", {"unet": {"use_linear_projection": True, "cross_attention_dim": 24}}),
    ("tiny-animatediff", {"unet": {"layers_per_block": 1}, "motion_adapter": {"motion_layers_per_block": 1}}),
    (
        "tiny-animatediff",
        {
            "unet": {
                "block_out_channels": [32, 64, 96],
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            },
            "motion_adapter": {"block_out_channels": [32, 64, 96]},
        },
    ),
    ("tiny-animatediff", {"vae": {"layers_per_block": 2, "block_out_channels": [8, 16, 32, 64]}}),
    ("tiny-animatediff", {"vae": {"latent_channels": 6, "out_channels": 4}}),
    ("tiny-animatediff", {"text_encoder": {"num_hidden_layers": 3, "intermediate_size": 48}}),
    ("tiny-ltx", {"text_encoder": {"feed_forward_proj": "relu", "num_layers": 3, "num_heads": 3}}),
    ("tiny-contentv", {"transformer": {"num_layers": 1, "joint_attention_dim": 40, "out_channels": None}}),
    ("tiny-contentv", {"transformer": {"num_layers": 4, "in_channels": 12, "pooled_projection_dim": 28}}),
    ("tiny-contentv", {"transformer": {"num_attention_heads": 4, "attention_head_dim": 8, "patch_size": 4}}),
    ("tiny-contentv", {"text_encoder_2": {"num_hidden_layers": 1, "projection_dim": 20}}),
)


@pytest.mark.parametrize(("key", "changes"), OTHER_CONFIGURATIONS)
def test_counts_follow_from_the_configuration(key: str, changes: dict[str, dict[str, Any]]) -> None:
    trace, chosen = tracing(), with_configs(tiny.model(key), changes)
    d = chosen.defaults
    size = (d.height, d.width, d.num_frames)
    counts = parameter_counts(chosen)
    assert {n: counts[n] for n in changes} == {n: built_parameters(chosen, n) for n in changes}
    part = next(iter(changes))
    if part in ("transformer", "unet"):
        work = true_work(chosen, *size, num_inference_steps=1)
        assert work.flop_per_denoiser_call == trace.trace_denoiser(chosen, *size).total_flop
    elif part == "vae":
        frames, rows, columns = latents(chosen, *size)[1]
        decoder = DECODERS[chosen.components["vae"].class_.rpartition(".")[2]]
        counted = decoder.decode_flop(chosen.components["vae"].config, frames, rows, columns)
        assert counted == trace.trace_vae_decode(chosen, *size).total_flop
    elif part == "latent_upsampler":
        work = true_work(chosen, *size, num_inference_steps=1)
        assert work.other_stages["upsample"] == trace.trace_upsample(chosen, *size).total_flop
    else:
        assert text_encoder_flop(chosen) == trace.trace_text_encoder(chosen).total_flop


# --- guidance, prompts, sizes -------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["tiny-cogvideox", "tiny-ltx", "tiny-mochi", "tiny-animatediff"])
@pytest.mark.parametrize("batch", [1, 2])
def test_guidance_in_a_batch_and_without(key: str, batch: int) -> None:
    chosen = tiny.model(key).model_copy(update={"batch_per_pass": batch})
    d = chosen.defaults
    size = (d.height, d.width, d.num_frames)
    work = true_work(chosen, *size, num_inference_steps=2)
    assert work.flop_per_denoiser_call == tracing().trace_denoiser(chosen, *size).total_flop
    loops = 2 if key == "tiny-ltx" else 1  # the refinement embeds its prompts anew
    assert work.flop["text_encoder"] == loops * batch * text_encoder_flop(chosen)
    twice = chosen.model_copy(update={"passes_per_step": 2})
    assert true_work(twice, *size, num_inference_steps=2).denoiser_calls == 2 * work.denoiser_calls


@pytest.mark.parametrize("tokens", [1, 20])
def test_mochis_work_depends_on_the_prompts_true_length(tokens: int) -> None:
    chosen, size = model("mochi-1-preview"), OTHER_SIZES["mochi-1-preview"]
    work = true_work(chosen, *size, 1, prompt_tokens=tokens)
    assert work.flop_per_denoiser_call == tracing().trace_denoiser(chosen, *size, tokens).total_flop
    d = chosen.defaults
    default = [true_work(chosen, d.height, d.width, d.num_frames, 64, prompt_tokens=n) for n in (tokens, 256)]
    assert 0 <= 1 - default[0].total_flop / default[1].total_flop < 0.007
    assert true_work(chosen, *size, 1).total_flop == true_work(chosen, *size, 1, prompt_tokens=256).total_flop


def test_a_negative_prompt_of_unknown_length_counts_as_a_full_one() -> None:
    empty, size = model("mochi-1-preview"), OTHER_SIZES["mochi-1-preview"]
    filled = empty.model_copy(update={"negative_prompt": "blurry"})
    assert true_work(empty, *size, 1).attention_flop < true_work(filled, *size, 1).attention_flop


@pytest.mark.parametrize("key", ["wan2.1-t2v-14b", "cogvideox-2b", "ltx-video-0.9.7-dev"])
def test_others_do_not_depend_on_the_prompt(key: str) -> None:
    size = OTHER_SIZES[key]
    assert true_work(model(key), *size, 1, prompt_tokens=3) == true_work(model(key), *size, 1)


@pytest.mark.parametrize("tokens", [0, 257])
def test_impossible_prompts_are_refused(tokens: int) -> None:
    with pytest.raises(UserError, match=f"prompt_tokens is {tokens}"):
        true_work(model("mochi-1-preview"), *OTHER_SIZES["mochi-1-preview"], 1, prompt_tokens=tokens)


@pytest.mark.parametrize(
    ("key", "frames", "latent"),
    [
        ("cogvideox-2b", 1, 1),
        ("cogvideox-2b", 48, 12),
        ("cogvideox-2b", 49, 13),
        ("ltx-video-0.9.7-dev", 121, 16),
        ("ltx-video-0.9.7-dev", 120, 15),
        ("mochi-1-preview", 79, 14),
        ("mochi-1-preview", 84, 14),
        ("mochi-1-preview", 85, 15),
        ("animatediff-lightning", 16, 16),
    ],
)
def test_latent_frames_are_those_of_the_pipeline(key: str, frames: int, latent: int) -> None:
    height, width, _ = size_of(key, True)
    assert latent_shape(model(key), height, width, frames)[0] == latent


def test_a_first_stage_has_the_size_that_the_pipeline_gives_it() -> None:
    pytest.importorskip("torch")
    from t2v_energy.models.ltx import UPSCALE, LTXMultiScalePipeline

    chosen = model("ltx-video-0.9.7-dev")
    pipeline: Any = SimpleNamespace(vae_spatial_compression_ratio=32)
    for height, width in ((512, 704), (256, 384), (96, 96), (1024, 1536)):
        rows, columns = (
            side // 32 for side in LTXMultiScalePipeline.first_size(pipeline, height, width, 0.6667)
        )
        first, last = latents(chosen, height, width, 121)
        assert (first, last) == ((16, rows, columns), (16, UPSCALE * rows, UPSCALE * columns))


@pytest.mark.parametrize(
    ("key", "size", "message"),
    [
        ("cogvideox-2b", (488, 720, 49), r"height 488 .* multiple of 16[\s\S]*480"),
        ("mochi-1-preview", (480, 852, 79), r"width 852 .* multiple of 16[\s\S]*848"),
        ("ltx-video-0.9.7-dev", (512, 720, 121), r"width 720 .* multiple of 32"),
        ("ltx-video-0.9.7-dev", (32, 704, 121), r"32×704, made at 0.6667 of the size first"),
        ("animatediff-lightning", (516, 512, 16), r"height 516 .* multiple of 8"),
        ("animatediff-lightning", (512, 512, 0), r"num_frames is 0"),
    ],
)
def test_impossible_sizes_are_refused(key: str, size: Size, message: str) -> None:
    with pytest.raises(UserError, match=message):
        true_work(model(key), *size, 1)


@pytest.mark.parametrize(
    ("key", "part", "values", "message"),
    [
        ("tiny-cogvideox", "transformer", {"patch_size_t": 2}, "patch_size_t: 2"),
        ("tiny-cogvideox", "vae", {"use_post_quant_conv": True}, "use_post_quant_conv"),
        ("tiny-ltx", "transformer", {"patch_size": 2}, "patch_size: 2"),
        ("tiny-ltx", "vae", {"down_block_types": ["LTXVideoDownBlock3D"] * 4}, "LTXVideoDownBlock3D"),
        ("tiny-ltx", "vae", {"downsample_type": ["conv"] * 4}, "'conv' is not counted"),
        ("tiny-ltx", "latent_upsampler", {"temporal_upsample": True}, "temporal_upsample"),
        ("tiny-mochi", "transformer", {"activation_fn": "geglu"}, "activation_fn: 'geglu'"),
        ("tiny-animatediff", "unet", {"transformer_layers_per_block": 2}, "transformer_layers_per_block"),
        ("tiny-animatediff", "motion_adapter", {"use_motion_mid_block": False}, "use_motion_mid_block"),
        ("tiny-animatediff", "vae", {"mid_block_add_attention": False}, "mid_block_add_attention"),
        ("tiny-contentv", "transformer", {"dual_attention_layers": [0]}, "dual_attention_layers"),
        ("tiny-contentv", "transformer", {"qk_norm": None}, "qk_norm: None"),
        ("tiny-contentv", "transformer", {"caption_projection_dim": 48}, r"48 is not the width[\s\S]*32"),
    ],
)
def test_options_without_a_closed_form_are_refused(
    key: str, part: str, values: dict[str, Any], message: str
) -> None:
    chosen = with_configs(tiny.model(key), {part: values})
    d = chosen.defaults
    with pytest.raises(UserError, match=message):
        true_work(chosen, d.height, d.width, d.num_frames, 1)


def test_classes_and_calls_without_a_closed_form_are_refused() -> None:
    base = tiny.model("tiny-ltx")
    size = (base.defaults.height, base.defaults.width, base.defaults.num_frames)
    part = base.components["vae"].model_copy(update={"class_": "diffusers.AutoencoderKLHunyuanVideo"})
    other = base.model_copy(update={"components": {**base.components, "vae": part}})
    with pytest.raises(UserError, match=r"AutoencoderKLHunyuanVideo[\s\S]*architectures\.py"):
        true_work(other, *size, 1)
    with pytest.raises(UserError, match=r"components\.vae"):
        parameter_counts(other)
    with pytest.raises(UserError, match="needs 'downscale'"):
        true_work(base.model_copy(update={"call": {}}), *size, 1)


def test_a_text_encoder_whose_tokenizer_is_not_described_is_refused() -> None:
    base = tiny.model("tiny-contentv").model_copy(update={"other_tokenizers": {}})
    with pytest.raises(UserError, match=r"other_tokenizers[\s\S]*tokenizer_2 is not given"):
        text_encoder_flop(base)
    with pytest.raises(UserError, match="tokenizer_3 is not given"):
        true_work(base, 64, 64, 9, 1)


def test_contentvs_text_is_333_tokens_and_its_three_encoders_are_counted() -> None:
    chosen = model("contentv-8b")
    config, tokens = chosen.components["transformer"].config, 32 * 27 * 48
    work = true_work(chosen, *size_of("contentv-8b", True), 1)
    assert work.tokens == tokens
    assert work.attention_flop == 2 * contentv.attention_product_flop(config, tokens, 77 + 256)
    t5_alone = t5.forward_flop(chosen.components["text_encoder_3"].config, 256)
    clips = clip.forward_flop(chosen.components["text_encoder"].config, 77)
    clips += clip.forward_flop(chosen.components["text_encoder_2"].config, 77)
    projections = 2 * (768**2 + 1280**2)  # of one vector each
    assert text_encoder_flop(chosen) == t5_alone + clips + projections
    assert work.flop["text_encoder"] == 2 * text_encoder_flop(chosen)  # the negative prompt as well


def test_what_cannot_be_traced_is_refused() -> None:
    base = tiny.model("tiny-wan").model_copy(update={"architecture": "unet"})
    with pytest.raises(UserError, match="architecture 'unet'"):
        tracing().trace_denoiser(base, 64, 64, 9)


# --- what the closed forms take for granted -----------------------------------------------------------------


def test_defaults_are_those_of_the_classes() -> None:
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    for cls, ours in (
        (diffusers.CogVideoXTransformer3DModel, cogvideox.DEFAULTS),
        (diffusers.AutoencoderKLCogVideoX, cogvideox_vae.DEFAULTS),
        (diffusers.LTXVideoTransformer3DModel, ltx.DEFAULTS),
        (diffusers.AutoencoderKLLTXVideo, ltx_vae.DEFAULTS),
        (diffusers.pipelines.ltx.LTXLatentUpsamplerModel, ltx_vae.UPSAMPLER_DEFAULTS),
        (diffusers.MochiTransformer3DModel, mochi.DEFAULTS),
        (diffusers.AutoencoderKLMochi, mochi_vae.DEFAULTS),
        (diffusers.UNet2DConditionModel, animatediff.DEFAULTS),
        (diffusers.MotionAdapter, animatediff.MOTION_DEFAULTS),
        (diffusers.AutoencoderKL, image_vae.DEFAULTS),
        (diffusers.SD3Transformer2DModel, contentv.DEFAULTS),
    ):
        signature = inspect.signature(cls.__init__).parameters
        theirs = {key: signature[key].default for key in ours}
        assert json.dumps(theirs) == json.dumps(dict(ours)), cls.__name__  # tuples and lists alike
    for config, ours in (
        (transformers.T5Config(), t5.DEFAULTS),
        (transformers.CLIPTextConfig(), clip.DEFAULTS),
    ):
        assert {key: getattr(config, key) for key in ours} == dict(ours)


def test_no_closed_form_needs_torch() -> None:
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'diffusers', 'transformers', 'numpy')))"
    code = f"""{blocked}
sys.path.insert(0, {str(ROOT / "workflow")!r})
from pathlib import Path
from t2v_energy.config import load_model
from t2v_energy.work import parameter_counts, true_work
for key in {list(OTHER_SIZES)}:
    model = load_model(Path({str(ROOT)!r}), key)
    d = model.defaults
    work = true_work(model, d.height, d.width, d.num_frames, 1)
    print(work.total_flop, sum(parameter_counts(model).values()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = (
        (true_work(model(key), *size_of(key, True), 1).total_flop, sum(parameter_counts(model(key)).values()))
        for key in OTHER_SIZES
    )
    assert done.stdout.splitlines() == [f"{flop} {parameters}" for flop, parameters in expected]


def test_chunks_are_those_of_the_decoder() -> None:
    assert [cogvideox_vae.chunks(n) for n in (1, 2, 3, 4, 13)] == [[1], [2], [3], [2, 2], [3, *[2] * 5]]


def test_operators_keep_their_order_and_stages_their_names() -> None:
    flop = dict.fromkeys(OPERATORS, 1.0)
    Work({**flop, "convolution": 1.0, "upsampler": 1.0}, 1, 1, 0.0)
    for wrong in ({**flop, "upsampler": 1.0, "convolution": 1.0}, {**flop, "other": 1.0}):
        with pytest.raises(ValueError, match="expected"):
            Work(wrong, 1, 1, 0.0)
    with pytest.raises(ValueError, match="stages are denoiser"):
        Work(flop, 1, 1, 0.0, {"denoiser": 1.0})
