"""Floating-point operations of one video: what a model really executes, and what the study's formulas say.

One multiply-add is two operations (FLOP), as in the study's appendix A.  Only matrix products and
convolutions are counted; norms, activations, softmax, rotary embeddings and interpolation are not.
Nothing here needs torch; :mod:`t2v_energy.work.trace` does, and checks these closed forms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from t2v_energy.errors import UserError
from t2v_energy.work import paper
from t2v_energy.work.architectures import latent_shape, parameter_counts, video_work
from t2v_energy.work.video import OPERATORS, STAGES, Work

if TYPE_CHECKING:  # the formulas do not need the configuration's machinery, only its fields
    from t2v_energy.config import ModelFile

__all__ = ["OPERATORS", "STAGES", "Work", "paper_work", "parameter_counts", "true_work", "wan_latent_shape"]


def true_work(
    model: ModelFile,
    height: int,
    width: int,
    num_frames: int,
    num_inference_steps: int,
    *,
    prompt_tokens: int | None = None,
) -> Work:
    """Operations that ``model`` executes for one video of ``height`` × ``width`` pixels.

    Every count follows from the model file's component configurations.  ``num_frames`` is rounded to whole
    latent frames as the pipeline does (Wan: to 4k + 1, see :func:`wan_vae.executed_frames`; the others make
    ⌊(T − 1) / r⌋ + 1 latent frames of T).  ``prompt_tokens`` are the prompt's without padding, its end token
    included: only Mochi's work depends on them, by about 1 %; None counts a prompt of the padded length.

    Raises:
        UserError: no closed form for the model's architecture, a side that the pipeline refuses, fewer
            than one frame or step, or a component with options that the closed form does not cover.
    """
    _at_least_one(num_frames=num_frames, num_inference_steps=num_inference_steps)
    return video_work(model, height, width, num_frames, num_inference_steps, prompt_tokens)


def paper_work(height: float, width: float, num_frames: int, num_inference_steps: int) -> Work:
    """The study's formulas with its printed constants (table 5), for one video of Wan2.1-T2V-1.3B.

    Whatever model is meant, the constants are the study's.  Sides need not be multiples of 16: the token
    length ℓ of eq. 1 is used unrounded in every formula, and only :attr:`Work.tokens` is rounded.

    Raises:
        UserError: a side that is not positive, or fewer than one frame or step.
    """
    _at_least_one(num_frames=num_frames, num_inference_steps=num_inference_steps)
    if min(height, width) <= 0:
        raise UserError(f"height {height} and width {width} must be positive", remedy="give sizes in pixels")
    length = paper.token_length(height, width, num_frames)
    calls = paper.GUIDANCE_PASSES * num_inference_steps
    flop = {
        "self_attention": calls * paper.self_attention_flop(length),
        "cross_attention": calls * paper.cross_attention_flop(length),
        "mlp": calls * paper.mlp_flop(length),
        "vae": paper.vae_convolution_flop(height, width, num_frames)
        + paper.vae_attention_flop(height, width, num_frames),
        "text_encoder": paper.text_encoder_flop(),
        "timestep_mlp": calls * paper.timestep_flop(),
        "embeddings": 0.0,  # the study leaves them out
    }
    return Work(flop, round(length), calls, calls * paper.attention_product_flop(length))


def wan_latent_shape(model: ModelFile, height: int, width: int, num_frames: int) -> tuple[int, int, int]:
    """Latent frames, rows and columns that the Wan pipeline denoises for a video of this size.

    Raises:
        UserError: a side is not a positive multiple of the VAE's downsampling times the patch size.
    """
    return latent_shape(model, height, width, num_frames)


def _at_least_one(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1", remedy=f"give a positive {name}")
