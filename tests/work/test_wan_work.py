"""The closed forms of Wan equal what a counter sees of the real modules."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from t2v_energy.config import ModelFile, load_model
from t2v_energy.errors import UserError
from t2v_energy.work import OPERATORS, STAGES, Work, true_work, umt5, wan, wan_latent_shape, wan_vae

ROOT = Path(__file__).parents[2]
KEYS = ("wan2.1-t2v-1.3b", "tiny-wan")
SIZES = (
    (720, 1280, 81),
    (480, 832, 49),
    (256, 272, 1),
)  # height, width, frames; the last is one latent frame
TOLERANCE = 1e-3

every_model = pytest.mark.parametrize("key", KEYS)
every_size = pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))


def model(key: str = KEYS[0]) -> ModelFile:
    return load_model(ROOT, key)


def with_config(base: ModelFile, component: str, **values: Any) -> ModelFile:
    """``base`` with other values in one component's configuration."""
    part = base.components[component]
    changed = part.model_copy(update={"config": {**part.config, **values}})
    return base.model_copy(update={"components": {**base.components, component: changed}})


def without_torch(code: str) -> str:
    """Standard output of ``code`` in a fresh interpreter that finds no torch, diffusers or transformers."""
    block = "import sys; sys.modules.update(dict.fromkeys(('torch', 'diffusers', 'transformers', 'numpy')));"
    path = str(ROOT / "workflow")
    done = subprocess.run(
        [sys.executable, "-c", f"{block} sys.path.insert(0, {path!r}); {code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def denoiser_trace(key: str, size: tuple[int, int, int]) -> Any:
    trace = pytest.importorskip("t2v_energy.work.trace")
    return trace.trace_denoiser(model(key), *size)


@every_model
@every_size
def test_denoiser_equals_the_counter(key: str, size: tuple[int, int, int]) -> None:
    work = true_work(model(key), *size, num_inference_steps=1)
    assert work.flop_per_denoiser_call == pytest.approx(denoiser_trace(key, size).total_flop, rel=TOLERANCE)


@every_model
@every_size
def test_each_operator_of_the_denoiser_equals_the_counter(key: str, size: tuple[int, int, int]) -> None:
    seen = denoiser_trace(key, size)
    expected = {
        "self_attention": seen.ending_with(".attn1"),
        "cross_attention": seen.ending_with(".attn2"),
        "mlp": seen.ending_with(".ffn"),
        "timestep_mlp": seen.ending_with("time_embedder", "time_proj"),
        "embeddings": seen.ending_with("patch_embedding", "proj_out", "text_embedder"),
    }
    projections = seen.ending_with(
        *(f"attn{i}.{p}" for i in (1, 2) for p in ("to_q", "to_k", "to_v", "to_out.0"))
    )
    chosen, steps = model(key), 3
    work = true_work(chosen, *size, num_inference_steps=steps)
    calls = steps * chosen.passes_per_step
    for operator, flop in expected.items():
        assert work.flop[operator] == pytest.approx(calls * flop, rel=TOLERANCE), operator
    both = expected["self_attention"] + expected["cross_attention"]
    assert work.attention_flop == pytest.approx(calls * (both - projections), rel=TOLERANCE)


@every_model
@every_size
def test_vae_decoder_equals_the_counter(key: str, size: tuple[int, int, int]) -> None:
    trace = pytest.importorskip("t2v_energy.work.trace")
    work = true_work(model(key), *size, num_inference_steps=1)
    assert work.flop["vae"] == pytest.approx(
        trace.trace_vae_decode(model(key), *size).total_flop, rel=TOLERANCE
    )


@every_model
def test_text_encoder_equals_the_counter(key: str) -> None:
    trace = pytest.importorskip("t2v_energy.work.trace")
    once = trace.trace_text_encoder(model(key)).total_flop
    # One pass for the prompt and one for the negative prompt, whatever the size and the steps.
    work = true_work(model(key), 64, 64, 9, num_inference_steps=7)
    assert work.flop["text_encoder"] == pytest.approx(model(key).passes_per_step * once, rel=TOLERANCE)


OTHER_CONFIGURATIONS = (
    ("transformer", {"num_layers": 3, "num_attention_heads": 3, "ffn_dim": 100, "in_channels": 20}),
    ("transformer", {"cross_attn_norm": False, "out_channels": 8, "text_dim": 48, "freq_dim": 32}),
    ("vae", {"base_dim": 8, "decoder_base_dim": 12, "num_res_blocks": 2, "z_dim": 6, "out_channels": 4}),
    ("vae", {"dim_mult": [1, 2, 4, 8], "temperal_downsample": [True, False, True]}),
    ("vae", {"dim_mult": [1, 2, 2], "temperal_downsample": [True, True], "scale_factor_spatial": 4}),
    ("text_encoder", {"d_kv": 16, "num_heads": 3, "num_layers": 3, "feed_forward_proj": "gelu"}),
)


@pytest.mark.parametrize(("component", "values"), OTHER_CONFIGURATIONS)
def test_counts_follow_from_the_configuration(component: str, values: dict[str, Any]) -> None:
    trace = pytest.importorskip("t2v_energy.work.trace")
    changed, size = with_config(model("tiny-wan"), component, **values), (64, 96, 9)
    module = trace.build_on_meta(changed.components[component])
    config = changed.components[component].config
    latent = wan_latent_shape(changed, *size)
    if component == "transformer":
        tokens = wan.token_count(config, *latent)
        counted = sum(wan.forward_flop(config, tokens, changed.tokenizer.max_length).values())
        seen, parameters = trace.trace_denoiser(changed, *size), wan.parameter_count(config)
        assert true_work(changed, *size, 1).flop_per_denoiser_call == counted
    elif component == "vae":
        counted, parameters = wan_vae.decode_flop(config, *latent), wan_vae.parameter_count(config)
        seen = trace.trace_vae_decode(changed, *size)
    else:
        counted = umt5.forward_flop(config, changed.tokenizer.max_length)
        seen, parameters = trace.trace_text_encoder(changed), umt5.parameter_count(config)
    assert counted == pytest.approx(seen.total_flop, rel=TOLERANCE)
    assert parameters == sum(p.numel() for p in module.parameters())


@every_model
def test_parameter_counts_are_exact(key: str) -> None:
    trace = pytest.importorskip("t2v_energy.work.trace")
    for name, count in (
        ("transformer", wan.parameter_count),
        ("text_encoder", umt5.parameter_count),
        ("vae", wan_vae.parameter_count),
    ):
        component = model(key).components[name]
        built = sum(p.numel() for p in trace.build_on_meta(component).parameters())
        assert count(component.config) == built, name


def test_defaults_are_those_of_the_classes() -> None:
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    for cls, ours in (
        (diffusers.WanTransformer3DModel, wan.DEFAULTS),
        (diffusers.AutoencoderKLWan, wan_vae.DEFAULTS),
    ):
        signature = inspect.signature(cls.__init__).parameters
        theirs = {key: signature[key].default for key in ours}
        assert json.dumps(theirs) == json.dumps(dict(ours)), cls.__name__  # tuples and lists alike
    config = transformers.UMT5Config()
    assert {key: getattr(config, key) for key in umt5.DEFAULTS} == dict(umt5.DEFAULTS)


@pytest.mark.parametrize(
    ("height", "width", "forward", "vae"),
    [(720, 1280, 1.24984e15, 6.392e14), (480, 832, 2.83002e14, 2.754e14)],
)
def test_known_values_of_wan_1_3b(height: int, width: int, forward: float, vae: float) -> None:
    work = true_work(model(), height, width, 81, 50)
    assert work.flop_per_denoiser_call == pytest.approx(forward, rel=1e-5)
    assert work.flop["vae"] == pytest.approx(vae, rel=2e-4)
    assert work.flop["text_encoder"] == pytest.approx(2 * 4.845e12, rel=2e-4)


def test_full_resolution_blocks_are_a_third_of_the_decoder() -> None:
    stages = wan_vae.decode_flop_by_stage(model().components["vae"].config, 21, 90, 160)
    assert stages["up_blocks.3"] == pytest.approx(2.23e14, rel=2e-3)
    assert sum(stages.values()) == pytest.approx(6.392e14, rel=2e-4)


def test_work_adds_up_and_keeps_its_order() -> None:
    work = true_work(model(), 480, 832, 81, 50)
    assert tuple(work.flop) == OPERATORS
    assert tuple(work.flop_by_stage) == STAGES
    assert sum(work.flop_by_stage.values()) == pytest.approx(work.total_flop)
    assert (work.tokens, work.denoiser_calls) == (32760, 100)
    assert work.flop_per_denoiser_call * 100 == pytest.approx(work.flop_by_stage["denoiser"])
    with pytest.raises(ValueError, match="expected"):
        Work(dict(reversed(list(work.flop.items()))), work.tokens, 100, work.attention_flop)


def test_steps_scale_the_denoiser_only() -> None:
    one, ten = (true_work(model(), 256, 256, 17, steps) for steps in (1, 10))
    assert ten.flop_by_stage["denoiser"] == pytest.approx(10 * one.flop_by_stage["denoiser"])
    assert ten.attention_flop == pytest.approx(10 * one.attention_flop)
    for stage in ("text_encoder", "vae_decode"):
        assert ten.flop_by_stage[stage] == one.flop_by_stage[stage]


@pytest.mark.parametrize(
    ("asked", "executed", "latent"),
    [(1, 1, 1), (3, 1, 1), (4, 5, 2), (80, 81, 21), (81, 81, 21), (84, 85, 22)],
)
def test_frames_are_rounded_as_the_pipeline_does(asked: int, executed: int, latent: int) -> None:
    vae = model().components["vae"].config
    assert wan_vae.executed_frames(vae, asked) == executed
    assert wan_vae.latent_frames(vae, asked) == latent
    assert true_work(model(), 64, 64, asked, 1) == true_work(model(), 64, 64, executed, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((720, 1288, 81, 50), r"width 1288 .* multiple of 16[\s\S]*1280"),
        ((0, 1280, 81, 50), r"height 0 "),
        ((-16, 1280, 81, 50), r"height -16 "),
        ((720, 1280, 0, 50), r"num_frames is 0"),
        ((720, 1280, 81, 0), r"num_inference_steps is 0"),
    ],
)
def test_impossible_requests_are_refused(arguments: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        true_work(model(), *arguments)


def test_what_has_no_closed_form_is_refused() -> None:
    with pytest.raises(UserError, match="architecture 'unet'"):
        true_work(model().model_copy(update={"architecture": "unet"}), 64, 64, 9, 1)
    with pytest.raises(UserError, match="image_dim"):
        true_work(with_config(model(), "transformer", image_dim=1280), 64, 64, 9, 1)
    with pytest.raises(UserError, match=r"Wan 2\.2"):
        true_work(with_config(model(), "vae", is_residual=True), 64, 64, 9, 1)


def test_the_closed_forms_need_no_torch() -> None:
    code = (
        "from pathlib import Path; from t2v_energy.config import load_model; "
        "from t2v_energy.work import true_work; "
        f"print(true_work(load_model(Path({str(ROOT)!r}), {KEYS[0]!r}), 720, 1280, 81, 1).total_flop)"
    )
    assert float(without_torch(code)) == true_work(model(), 720, 1280, 81, 1).total_flop
