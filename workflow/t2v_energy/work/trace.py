"""Counts the operations of the real modules, on torch's meta device: no weights, no GPU, no arithmetic.

For the tests of the closed forms, and for whoever adds a model.  Needs torch, diffusers and transformers
(the extra ``measure``).  On the meta device attention decomposes into matrix products, so it is counted
exactly; on the CPU the counter would miss it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from math import prod
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from t2v_energy.errors import UserError
from t2v_energy.models.build import load_class
from t2v_energy.work.architectures import latents, text_encoders
from t2v_energy.work.denoisers import Latent, padded_tokens, valid_tokens

if TYPE_CHECKING:
    from t2v_energy.config import Component, ModelFile


@dataclass(frozen=True)
class FlopTrace:
    """What the counter saw: FLOP in all, and by module (dotted name below the root, children included)."""

    total_flop: int
    by_module: dict[str, int]

    def ending_with(self, *suffixes: str) -> int:
        """FLOP of the modules whose names end with one of ``suffixes`` (they must not contain each other)."""
        return sum(flop for name, flop in self.by_module.items() if name.endswith(suffixes))


def build_on_meta(component: Component) -> nn.Module:
    """The module of a component of a model file, from its class and configuration, without storage.

    Raises:
        UserError: the library has no such class, or the class refuses the configuration.
    """
    cls = load_class(component.class_)
    try:
        with torch.device("meta"):
            if component.class_.startswith("transformers."):
                return cls(cls.config_class(**component.config)).eval()
            return cls(**component.config).eval()
    except TypeError as error:
        raise UserError(
            f"{component.class_} cannot be built: {error}",
            where="components",
            remedy="compare the class and its config with the library's documentation",
        ) from error


def count(call: Callable[[], Any]) -> FlopTrace:
    """FLOP of ``call``, which must only touch tensors of the meta device."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        call()
    by_module: dict[str, int] = {}
    for name, by_operation in counter.get_flop_counts().items():
        _, _, below_root = name.partition(".")
        if below_root:
            by_module[below_root] = by_module.get(below_root, 0) + sum(by_operation.values())
    return FlopTrace(counter.get_total_flops(), by_module)


def trace_denoiser(
    model: ModelFile, height: int, width: int, num_frames: int, prompt_tokens: int | None = None
) -> FlopTrace:
    """One call of the denoiser for a video of ``num_frames`` × ``height`` × ``width`` pixels.

    The batch is the model file's; for ``prompt_tokens`` see :func:`t2v_energy.work.true_work`.
    """
    first, _ = latents(model, height, width, num_frames)
    return _trace_call(model, first, prompt_tokens)


def trace_upsample(model: ModelFile, height: int, width: int, num_frames: int) -> FlopTrace:
    """The doubling of rows and columns between LTX-Video's two loops."""
    first, _ = latents(model, height, width, num_frames)
    module = build_on_meta(model.components["latent_upsampler"])
    return count(lambda: module(_numbers(1, module.config.in_channels, *first)))


def trace_refine(model: ModelFile, height: int, width: int, num_frames: int) -> FlopTrace:
    """One call of the denoiser in LTX-Video's second loop."""
    _, last = latents(model, height, width, num_frames)
    return _trace_call(model, last, None)


def trace_text_encoder(model: ModelFile) -> FlopTrace:
    """One pass of each text encoder over a prompt that its own tokenizer has padded."""
    # No mask: building it reads values, which meta tensors lack, and a mask saves no operation.
    calls = [
        partial(
            build_on_meta(model.components[name]), input_ids=_integers(1, padded_tokens(model, tokenizer))
        )
        for name, tokenizer in text_encoders(model).items()
    ]
    return count(lambda: [call() for call in calls])


def trace_vae_decode(model: ModelFile, height: int, width: int, num_frames: int) -> FlopTrace:
    """Decoding the latent of one video."""
    module: Any = build_on_meta(model.components["vae"])
    c, (_, last) = module.config, latents(model, height, width, num_frames)
    channels = c.z_dim if "z_dim" in c else c.latent_channels
    if model.components["vae"].class_.endswith(".AutoencoderKL"):  # of images: frames are the batch
        frames, rows, columns = last
        return count(lambda: module.decode(_numbers(frames, channels, rows, columns)))
    timestep = {"temb": _numbers(1)} if c.get("timestep_conditioning") else {}
    return count(lambda: module.decode(_numbers(1, channels, *last), **timestep))


def _trace_call(model: ModelFile, latent: Latent, prompt_tokens: int | None) -> FlopTrace:
    if model.architecture not in _DENOISER_INPUTS:
        raise UserError(
            f"the architecture {model.architecture!r} cannot be traced",
            where=f"config/models/{model.key}.yaml",
            remedy="add the inputs of its denoiser to workflow/t2v_energy/work/trace.py",
        )
    module = _denoiser_on_meta(model)
    inputs = _DENOISER_INPUTS[model.architecture](model, module.config, latent)
    # Mochi alone asks for them: which tokens are no padding, and an autocast that the meta device lacks.
    lengths = cycle(valid_tokens(model, prompt_tokens))
    with (
        patch.object(torch, "nonzero", lambda *_, **__: _integers(next(lengths), 1)),
        patch.object(torch, "autocast", lambda *_, **__: nullcontext()),
    ):
        return count(lambda: module(**inputs))


def _denoiser_on_meta(model: ModelFile) -> Any:
    if model.architecture != "animatediff":
        return build_on_meta(model.components["transformer"])
    # The pipeline makes one network of the two, and so does this.
    parts = (build_on_meta(model.components[name]) for name in ("unet", "motion_adapter"))
    with torch.device("meta"):
        return load_class("diffusers.UNetMotionModel").from_unet2d(*parts, load_weights=False).eval()


def _wan_inputs(model: ModelFile, c: Any, latent: Latent) -> dict[str, Any]:
    batch, length = model.batch_per_pass, model.tokenizer.max_length
    return {
        "hidden_states": _numbers(batch, c.in_channels, *latent),
        "timestep": _integers(batch),
        "encoder_hidden_states": _numbers(batch, length, c.text_dim),
    }


def _cogvideox_inputs(model: ModelFile, c: Any, latent: Latent) -> dict[str, Any]:
    batch, length = model.batch_per_pass, model.tokenizer.max_length
    frames, rows, columns = latent
    inputs = {
        "hidden_states": _numbers(batch, frames, c.in_channels, rows, columns),
        "timestep": _integers(batch),
        "encoder_hidden_states": _numbers(batch, length, c.text_embed_dim),
    }
    if c.use_rotary_positional_embeddings:
        angles = _numbers(frames * (rows // c.patch_size) * (columns // c.patch_size), c.attention_head_dim)
        inputs["image_rotary_emb"] = (angles, angles)
    return inputs


def _ltx_inputs(model: ModelFile, c: Any, latent: Latent) -> dict[str, Any]:
    batch, length, tokens = model.batch_per_pass, model.tokenizer.max_length, prod(latent)
    return {
        "hidden_states": _numbers(batch, tokens, c.in_channels),
        "timestep": _numbers(batch, 1),
        "encoder_hidden_states": _numbers(batch, length, c.caption_channels),
        "encoder_attention_mask": _numbers(batch, length),
        "video_coords": _numbers(batch, 3, tokens),
    }


def _mochi_inputs(model: ModelFile, c: Any, latent: Latent) -> dict[str, Any]:
    batch, length = model.batch_per_pass, model.tokenizer.max_length
    return {
        "hidden_states": _numbers(batch, c.in_channels, *latent),
        "timestep": _numbers(batch),
        "encoder_hidden_states": _numbers(batch, length, c.text_embed_dim),
        "encoder_attention_mask": _numbers(batch, length),
    }


def _animatediff_inputs(model: ModelFile, c: Any, latent: Latent) -> dict[str, Any]:
    batch, length = model.batch_per_pass, model.tokenizer.max_length
    frames, _, _ = latent
    return {
        "sample": _numbers(batch, c.in_channels, *latent),
        "timestep": _integers(1)[0],
        # the pipeline repeats the prompt for every frame
        "encoder_hidden_states": _numbers(batch * frames, length, c.cross_attention_dim),
    }


def _contentv_inputs(model: ModelFile, c: Any, latent: Latent) -> dict[str, Any]:
    batch = model.batch_per_pass
    length = padded_tokens(model, "tokenizer") + padded_tokens(model, "tokenizer_3")
    return {
        "hidden_states": _numbers(batch, c.in_channels, *latent),
        "timestep": _numbers(batch),
        "encoder_hidden_states": _numbers(batch, length, c.joint_attention_dim),
        "pooled_projections": _numbers(batch, c.pooled_projection_dim),
    }


_DENOISER_INPUTS: Mapping[str, Callable[[ModelFile, Any, Latent], dict[str, Any]]] = {
    "wan": _wan_inputs,
    "cogvideox": _cogvideox_inputs,
    "ltx": _ltx_inputs,
    "mochi": _mochi_inputs,
    "animatediff": _animatediff_inputs,
    "contentv": _contentv_inputs,
}


def _numbers(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


def _integers(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.long, device="meta")
