"""From a model file to the shapes that its parts see, and to the closed forms that count them.

A part's closed forms are found by its class, so that architectures may share a decoder or a text encoder;
how the denoiser is called, by the file's ``architecture`` (:mod:`t2v_energy.work.denoisers`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from t2v_energy.errors import UserError
from t2v_energy.work import (
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
    t5,
    umt5,
    wan,
    wan_vae,
)
from t2v_energy.work.denoisers import Latent, denoiser, padded_tokens
from t2v_energy.work.video import OPERATORS, OTHER_OPERATORS, Work

if TYPE_CHECKING:  # the formulas do not need the configuration's machinery, only its fields
    from t2v_energy.config import ModelFile

Form = TypeVar("Form")


class Decoder(Protocol):
    """Closed forms of a VAE's decoder; ``config`` is its component's."""

    def spatial_factor(self, config: Mapping[str, Any]) -> int: ...

    def latent_frames(self, config: Mapping[str, Any], num_frames: int) -> int: ...

    def video_frames(self, config: Mapping[str, Any], latent_frames: int) -> int: ...

    def decode_flop(self, config: Mapping[str, Any], frames: int, rows: int, columns: int) -> int: ...

    def decode_activation_bytes(
        self, config: Mapping[str, Any], frames: int, rows: int, columns: int, bytes_per_value: int
    ) -> int: ...


DECODERS: Mapping[str, Decoder] = {
    "AutoencoderKLWan": wan_vae,
    "AutoencoderKLCogVideoX": cogvideox_vae,
    "AutoencoderKLLTXVideo": ltx_vae,
    "AutoencoderKLMochi": mochi_vae,
    "AutoencoderKL": image_vae,
}
ENCODERS: Mapping[str, Callable[[Mapping[str, Any], int], int]] = {
    "UMT5EncoderModel": umt5.forward_flop,
    "T5EncoderModel": t5.forward_flop,
    "CLIPTextModel": clip.forward_flop,
    "CLIPTextModelWithProjection": clip.projected_forward_flop,
}
PARAMETERS: Mapping[str, Callable[[Mapping[str, Any]], int]] = {
    "WanTransformer3DModel": wan.parameter_count,
    "CogVideoXTransformer3DModel": cogvideox.parameter_count,
    "LTXVideoTransformer3DModel": ltx.parameter_count,
    "MochiTransformer3DModel": mochi.parameter_count,
    "ContentVTransformer3DModel": contentv.parameter_count,
    "UNet2DConditionModel": animatediff.parameter_count,
    "MotionAdapter": animatediff.motion_parameter_count,
    "LTXLatentUpsamplerModel": ltx_vae.upsampler_parameter_count,
    "AutoencoderKLWan": wan_vae.parameter_count,
    "AutoencoderKLCogVideoX": cogvideox_vae.parameter_count,
    "AutoencoderKLLTXVideo": ltx_vae.parameter_count,
    "AutoencoderKLMochi": mochi_vae.parameter_count,
    "AutoencoderKL": image_vae.parameter_count,
    "UMT5EncoderModel": umt5.parameter_count,
    "T5EncoderModel": t5.parameter_count,
    "CLIPTextModel": clip.parameter_count,
    "CLIPTextModelWithProjection": clip.projected_parameter_count,
}
UPSCALE = 2  # what LTX's latent upsampler multiplies rows and columns by


def video_work(
    model: ModelFile, height: int, width: int, num_frames: int, steps: int, prompt_tokens: int | None
) -> Work:
    """Operations of one video; see :func:`t2v_energy.work.true_work`."""
    part, calls = denoiser(model), model.passes_per_step * steps
    first, last = latents(model, height, width, num_frames)
    call = part.call(model, first, prompt_tokens)
    loop = call.times(calls)
    flop, attention, stages = dict(loop.flop), loop.attention_flop, {}
    if _has_stages(model):
        refine = part.call(model, last, prompt_tokens).times(refine_calls(model))
        flop = {operator: n + refine.flop[operator] for operator, n in flop.items()}
        flop["upsampler"] = ltx_vae.upsample_flop(model.components["latent_upsampler"].config, *first)
        attention += refine.attention_flop
        stages = {"upsample": float(flop["upsampler"]), "refine": float(sum(refine.flop.values()))}
    flop["vae"] = decoder(model).decode_flop(model.components["vae"].config, *last)
    flop["text_encoder"] = encoder_passes(model) * text_encoder_flop(model)
    present = (*OPERATORS, *(operator for operator in OTHER_OPERATORS if operator in flop))
    ordered = {operator: float(flop.get(operator, 0)) for operator in present}
    return Work(ordered, call.tokens, calls, float(attention), stages)


def latents(model: ModelFile, height: int, width: int, num_frames: int) -> tuple[Latent, Latent]:
    """The latent that the loop of steps denoises, and the one that is decoded.

    They are the same but for LTX-Video's three stages: it denoises ``downscale`` of the size asked for,
    rounded down to whole latent pixels, doubles its rows and columns, refines and decodes that.

    Raises:
        UserError: as :func:`latent_shape`; or the first stage would be smaller than one latent pixel.
    """
    frames, rows, columns = latent_shape(model, height, width, num_frames)
    if not _has_stages(model):
        return (frames, rows, columns), (frames, rows, columns)
    factor, downscale = _spatial_factor(model), _call_value(model, "downscale")
    rows, columns = (int(side * downscale) // factor for side in (height, width))
    if min(rows, columns) < 1:
        raise UserError(
            f"{height}×{width}, made at {downscale:g} of the size first, is less than one latent pixel",
            where=f"model {model.key}",
            remedy=f"ask for more than {factor / downscale:.0f} pixels on each side",
        )
    return (frames, rows, columns), (frames, UPSCALE * rows, UPSCALE * columns)


def latent_shape(model: ModelFile, height: int, width: int, num_frames: int) -> Latent:
    """Latent frames, rows and columns of a video of this size.

    Raises:
        UserError: a side is not a positive multiple of the VAE's downsampling times the patch size.
    """
    factor, patches = _spatial_factor(model), denoiser(model).patch_sides(model)
    for name, side, patch in zip(("height", "width"), (height, width), patches, strict=True):
        multiple = factor * patch
        if side <= 0 or side % multiple:
            nearest = max(multiple, round(side / multiple) * multiple)
            raise UserError(
                f"{name} {side} is not a positive multiple of {multiple}",
                where=f"model {model.key}",
                remedy=f"the nearest {name} that it can run is {nearest}",
            )
    return _latent_frames(model, num_frames), height // factor, width // factor


def made_frames(model: ModelFile, num_frames: int) -> int:
    """Frames of the finished video when ``num_frames`` are asked for.

    Other than those asked for where latent frames are not whole, and in CogVideoX wherever they are even in
    number: of 45 frames, which are 12 in latent space, it makes 48.
    """
    return decoder(model).video_frames(model.components["vae"].config, _latent_frames(model, num_frames))


def _latent_frames(model: ModelFile, num_frames: int) -> int:
    """Latent frames of a requested video; ContentV has Wan's VAE, but not its pipeline's rounding."""
    form, config = decoder(model), model.components["vae"].config
    if model.architecture == "contentv":
        step, offset = model.limits.frames_multiple, model.limits.frames_offset
        num_frames -= (num_frames - offset) % step
    return form.latent_frames(config, num_frames)


def activation_bytes(
    model: ModelFile, height: int, width: int, num_frames: int, bytes_per_value: Callable[[str], int]
) -> int:
    """Rough peak of live activations (bytes): the larger of denoiser and decoder, which follow each other.

    ``bytes_per_value`` says how wide a part's numbers are, by the part's name.
    """
    _, last = latents(model, height, width, num_frames)
    part, config = denoiser(model), model.components["vae"].config
    denoising = model.batch_per_pass * part.sample_bytes(model, last, bytes_per_value(part.part))
    decoding = decoder(model).decode_activation_bytes(config, *last, bytes_per_value("vae"))
    return max(denoising, decoding)


def parameter_counts(model: ModelFile) -> dict[str, int]:
    """Learnt parameters of every part that has some, by its name in the model file.

    Raises:
        UserError: a class without a closed form.
    """
    return {
        name: _form(PARAMETERS, model, name)(part.config)
        for name, part in model.components.items()
        if part.dtype is not None  # a scheduler: no weights
    }


def decoder(model: ModelFile) -> Decoder:
    """Closed forms of the model's VAE decoder; raises :class:`UserError` where its class has none."""
    return _form(DECODERS, model, "vae")


def text_encoder_flop(model: ModelFile) -> int:
    """FLOP of one pass of each text encoder over a prompt that its own tokenizer has padded."""
    return sum(
        _form(ENCODERS, model, name)(model.components[name].config, padded_tokens(model, tokenizer))
        for name, tokenizer in text_encoders(model).items()
    )


def text_encoders(model: ModelFile) -> dict[str, str]:
    """Names of the text encoders among the components, each with that of its tokenizer."""
    names = (name for name in model.components if name.startswith("text_encoder"))
    return {name: name.replace("text_encoder", "tokenizer") for name in names}


def refine_calls(model: ModelFile) -> int:
    """Calls of LTX-Video's refinement: of its steps, the last share ``refine_strength``, rounded down."""
    steps = int(_call_value(model, "refine_steps") * _call_value(model, "refine_strength"))
    return model.passes_per_step * steps


def _has_stages(model: ModelFile) -> bool:
    return "latent_upsampler" in model.components


def _call_value(model: ModelFile, key: str) -> float:
    """A number that the model file gives to the pipeline's call."""
    if key not in model.call:
        raise UserError(
            f"a pipeline with a latent upsampler needs {key!r}",
            where=f"config/models/{model.key}.yaml, call",
            remedy="give it as config/models/ltx-video-0.9.7-dev.yaml does",
        )
    return float(model.call[key])


def encoder_passes(model: ModelFile) -> int:
    """Passes of each text encoder for one video.

    Guidance needs the embedding of the negative prompt too: one pass for each sample of a step.  LTX-Video
    embeds both anew for its refinement.
    """
    loops = 2 if _has_stages(model) else 1
    return loops * model.passes_per_step * model.batch_per_pass


def _spatial_factor(model: ModelFile) -> int:
    return decoder(model).spatial_factor(model.components["vae"].config)


def _form(forms: Mapping[str, Form], model: ModelFile, name: str) -> Form:
    """The closed form of a part's class."""
    path = model.components[name].class_
    _, _, cls = path.rpartition(".")
    if cls not in forms:
        raise UserError(
            f"there is no count of operations for the class {path}",
            where=f"config/models/{model.key}.yaml, components.{name}",
            remedy="add its closed form to workflow/t2v_energy/work/ and name it in architectures.py",
        )
    return forms[cls]
