"""Floating-point operations of one video: what a model really executes, and what the study's formulas say.

One multiply-add is two operations (FLOP), as in the study's appendix A.  Only matrix products and
convolutions are counted; norms, activations, softmax, rotary embeddings and interpolation are not.
Nothing here needs torch; :mod:`t2v_energy.work.trace` does, and checks these closed forms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from t2v_energy.errors import UserError
from t2v_energy.work import paper, umt5, wan, wan_vae

if TYPE_CHECKING:  # the formulas do not need the configuration's machinery, only its fields
    from t2v_energy.config import ModelFile

OPERATORS = (
    "self_attention",
    "cross_attention",
    "mlp",
    "vae",
    "text_encoder",
    "timestep_mlp",
    "embeddings",
)
"""Keys of :attr:`Work.flop`, in the order in which figures stack them."""

DENOISER_OPERATORS = ("self_attention", "cross_attention", "mlp", "timestep_mlp", "embeddings")
STAGES = ("text_encoder", "denoiser", "vae_decode")


@dataclass(frozen=True)
class Work:
    """Operations of one whole video (all steps and guidance passes, text encoder, VAE decoding).

    Attributes:
        flop: FLOP by operator, keys :data:`OPERATORS`.  ``self_attention`` and ``cross_attention`` include
            their four projections; ``embeddings`` is the patch embedding, the output projection and the
            projection of the text embeddings.
        tokens: sequence length that one denoiser call sees.
        denoiser_calls: forward passes of the denoiser (steps × guidance passes).
        attention_flop: the part of ``self_attention`` + ``cross_attention`` that is QKᵀ and PV (FLOP).  The
            attention inside the VAE and the text encoder is not in it.
    """

    flop: Mapping[str, float]
    tokens: int
    denoiser_calls: int
    attention_flop: float

    def __post_init__(self) -> None:
        if tuple(self.flop) != OPERATORS:
            raise ValueError(f"operators are {', '.join(self.flop)}; expected {', '.join(OPERATORS)}")

    @property
    def flop_by_stage(self) -> dict[str, float]:
        """FLOP by stage of the pipeline, keys :data:`STAGES`."""
        denoiser = sum(self.flop[operator] for operator in DENOISER_OPERATORS)
        return dict(zip(STAGES, (self.flop["text_encoder"], denoiser, self.flop["vae"]), strict=True))

    @property
    def total_flop(self) -> float:
        """FLOP of the whole video."""
        return sum(self.flop.values())

    @property
    def flop_per_denoiser_call(self) -> float:
        """FLOP of one forward pass of the denoiser."""
        return self.flop_by_stage["denoiser"] / self.denoiser_calls


def true_work(model: ModelFile, height: int, width: int, num_frames: int, num_inference_steps: int) -> Work:
    """Operations that ``model`` executes for one video of ``height`` × ``width`` pixels.

    Every count follows from the model file's component configurations.  ``num_frames`` is rounded to
    4k + 1 as the pipeline does (k·4 + 1 for other remainders; see :func:`wan_vae.executed_frames`).

    Raises:
        UserError: no closed form for the model's architecture, a side that the pipeline refuses, fewer
            than one frame or step, or a component with options that the closed form does not cover.
    """
    _at_least_one(num_frames=num_frames, num_inference_steps=num_inference_steps)
    if model.architecture == "wan":
        return _wan_work(model, height, width, num_frames, num_inference_steps)
    raise UserError(
        f"there is no count of operations for the architecture {model.architecture!r}",
        where=f"config/models/{model.key}.yaml, architecture",
        remedy="use 'wan', or add its closed form to workflow/t2v_energy/work/",
    )


def parameter_counts(model: ModelFile) -> dict[str, int]:
    """Learnt parameters of every part that has some, by its name in the model file.

    Raises:
        UserError: no closed form for the model's architecture.
    """
    if model.architecture == "wan":
        forms = {"transformer": wan, "vae": wan_vae, "text_encoder": umt5}
        return {name: form.parameter_count(model.components[name].config) for name, form in forms.items()}
    raise UserError(
        f"there is no count of parameters for the architecture {model.architecture!r}",
        where=f"config/models/{model.key}.yaml, architecture",
        remedy="use 'wan', or add its closed form to workflow/t2v_energy/work/",
    )


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


def _wan_work(model: ModelFile, height: int, width: int, num_frames: int, num_inference_steps: int) -> Work:
    transformer, vae = model.components["transformer"].config, model.components["vae"].config
    latent = wan_latent_shape(model, height, width, num_frames)
    text_tokens = model.tokenizer.max_length  # the pipeline pads every prompt to it
    tokens = wan.token_count(transformer, *latent)
    calls = model.passes_per_step * num_inference_steps
    forward = wan.forward_flop(transformer, tokens, text_tokens)
    # Guidance needs the embedding of the negative prompt too: one encoder pass for each denoiser pass.
    encoder = model.passes_per_step * umt5.forward_flop(model.components["text_encoder"].config, text_tokens)
    once = {"vae": wan_vae.decode_flop(vae, *latent), "text_encoder": encoder}
    flop = {o: float(once[o] if o in once else calls * forward[o]) for o in OPERATORS}
    products = wan.attention_product_flop(transformer, tokens, text_tokens)
    return Work(flop, tokens, calls, float(calls * products))


def wan_latent_shape(model: ModelFile, height: int, width: int, num_frames: int) -> tuple[int, int, int]:
    """Latent frames, rows and columns that the Wan pipeline denoises for a video of this size.

    Raises:
        UserError: a side is not a positive multiple of the VAE's downsampling times the patch size.
    """
    vae = wan_vae.settings(model.components["vae"].config)
    _, patch_height, patch_width = wan.settings(model.components["transformer"].config)["patch_size"]
    factor = vae["scale_factor_spatial"]
    for name, side, patch in (("height", height, patch_height), ("width", width, patch_width)):
        multiple = factor * patch
        if side <= 0 or side % multiple:
            nearest = max(multiple, round(side / multiple) * multiple)
            raise UserError(
                f"{name} {side} is not a positive multiple of {multiple}",
                where=f"model {model.key}",
                remedy=f"the nearest {name} that it can run is {nearest}",
            )
    return wan_vae.latent_frames(vae, num_frames), height // factor, width // factor


def _at_least_one(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1", remedy=f"give a positive {name}")
