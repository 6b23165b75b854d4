"""LTX-Video's three stages as one pipeline: generate small, double the latents, refine at the larger size.

Each stage is a call of one of diffusers' pipelines; this module only strings them together, as the model
card does. The refinement calls the same transformer through a view of its own, so that its calls, which see
four times the tokens, are timed as a stage that comes once a video and not among the steps of the first loop;
so with its scheduler, whose few calls take no time to speak of and are not timed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import LTXConditionPipeline, LTXLatentUpsamplePipeline

UPSCALE = 2
"""What the latent upsampler multiplies height and width by."""


class LTXMultiScalePipeline(LTXConditionPipeline):
    """Generates at ``downscale`` of the size asked for and refines at twice that.

    Attributes:
        latent_upsampler: doubles the latents' height and width.
        refiner: a view of ``transformer``: the same parameters, submodules and hooks, but another object.
    """

    transformer: Any
    scheduler: Any

    def __init__(
        self,
        scheduler: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        transformer: Any,
        latent_upsampler: Any,
    ) -> None:
        super().__init__(scheduler, vae, text_encoder, tokenizer, transformer)
        self.register_modules(latent_upsampler=latent_upsampler)
        self.refiner = copy.copy(transformer).eval()
        self._upsample = LTXLatentUpsamplePipeline(vae, latent_upsampler)

    @contextmanager
    def _refining(self) -> Iterator[None]:
        """The refiner, and a scheduler of its own, in place of the first stage's."""
        before = self.transformer, self.scheduler
        self.transformer, self.scheduler = (
            self.refiner,
            type(self.scheduler).from_config(self.scheduler.config),
        )
        try:
            yield
        finally:
            self.transformer, self.scheduler = before

    def first_size(self, height: int, width: int, downscale: float) -> tuple[int, int]:
        """Height and width of the first stage (pixels): multiples of what the VAE compresses."""
        multiple = self.vae_spatial_compression_ratio
        first, second = (int(side * downscale) // multiple * multiple for side in (height, width))
        return first, second

    def __call__(
        self,
        *,
        height: int,
        width: int,
        num_inference_steps: int,
        downscale: float,
        refine_steps: int,
        refine_strength: float,
        decode_timestep: float,
        output_type: str,
        callback_on_step_end: Any = None,
        max_sequence_length: int,
        **shared: Any,
    ) -> Any:
        """A video of twice the first stage's size; ``shared`` goes to both loops (prompts, frames, guidance).

        ``num_inference_steps`` and the callback are the first loop's; the second runs the last
        ``refine_strength`` of ``refine_steps`` steps.
        """
        shared["max_sequence_length"] = max_sequence_length
        first_height, first_width = self.first_size(height, width, downscale)
        small = super().__call__(
            height=first_height,
            width=first_width,
            num_inference_steps=num_inference_steps,
            output_type="latent",
            callback_on_step_end=callback_on_step_end,
            **shared,
        )
        large = self._upsample(latents=small.frames, output_type="latent")
        with self._refining():
            return super().__call__(
                height=UPSCALE * first_height,
                width=UPSCALE * first_width,
                latents=large.frames,
                num_inference_steps=refine_steps,
                denoise_strength=refine_strength,
                decode_timestep=decode_timestep,
                output_type=output_type,
                **shared,
            )
