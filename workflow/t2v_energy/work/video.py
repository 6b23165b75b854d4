"""The operations of one whole video, by operator and by stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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

OTHER_OPERATORS = ("convolution", "upsampler")
"""Further keys, after those, of models that have them: a U-Net's convolutions, an upsampler of latents."""

STAGES = ("text_encoder", "denoiser", "vae_decode")
OTHER_STAGES = ("upsample", "refine")
"""Further stages, between denoiser and vae_decode, of the models that have them."""

_NOT_DENOISER = ("vae", "text_encoder", "upsampler")


@dataclass(frozen=True)
class Work:
    """Operations of one whole video (all steps and guidance passes, text encoder, VAE decoding).

    Attributes:
        flop: FLOP by operator, keys :data:`OPERATORS`, then those of :data:`OTHER_OPERATORS` that the model
            has.  ``self_attention`` and ``cross_attention`` include their four projections; where text and
            video attend jointly, that is ``self_attention``.  ``embeddings`` is the patch embedding, the
            output projection and the projection of the text embeddings.
        tokens: sequence length that one denoiser call sees of each sample (a U-Net: latent pixels).
        denoiser_calls: calls of the denoiser in the loop of steps (steps × passes); a call may have a batch
            of two samples, for guidance.
        attention_flop: the part of ``self_attention`` + ``cross_attention`` that is QKᵀ and PV (FLOP).  The
            attention inside the VAE and the text encoder is not in it.
        other_stages: FLOP of the stages of :data:`OTHER_STAGES` that the model has.  They are in ``flop``
            too: ``refine`` calls the denoiser again, so its operations are among the denoiser's operators.
    """

    flop: Mapping[str, float]
    tokens: int
    denoiser_calls: int
    attention_flop: float
    other_stages: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        expected = (*OPERATORS, *(o for o in OTHER_OPERATORS if o in self.flop))
        if tuple(self.flop) != expected:
            raise ValueError(f"operators are {', '.join(self.flop)}; expected {', '.join(expected)}")
        if not set(self.other_stages) <= set(OTHER_STAGES):
            raise ValueError(f"stages are {', '.join(self.other_stages)}; expected some of {OTHER_STAGES}")

    @property
    def flop_by_stage(self) -> dict[str, float]:
        """FLOP by stage in the pipeline's order, keys :data:`STAGES` and those of :attr:`other_stages`."""
        denoiser = sum(flop for operator, flop in self.flop.items() if operator not in _NOT_DENOISER)
        return {
            "text_encoder": self.flop["text_encoder"],
            "denoiser": denoiser - self.other_stages.get("refine", 0),
            **self.other_stages,
            "vae_decode": self.flop["vae"],
        }

    @property
    def total_flop(self) -> float:
        """FLOP of the whole video."""
        return sum(self.flop.values())

    @property
    def flop_per_denoiser_call(self) -> float:
        """FLOP of one call of the denoiser in the loop of steps."""
        return self.flop_by_stage["denoiser"] / self.denoiser_calls
