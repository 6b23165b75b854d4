"""LTX-Video's three stages as one pipeline: generate small, double the latents, refine at the larger size.

Each stage is a call of one of diffusers' pipelines; this module only strings them together, as the model
card does. The refinement calls the same transformer through a view of its own, so that its calls, which see
four times the tokens, are timed as a stage that comes once a video and not among the steps of the first loop.
"""

from __future__ import annotations

import copy
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
        self.refiner = copy.copy(transformer)
        self._upsample = LTXLatentUpsamplePipeline(vae, latent_upsampler)
        # A scheduler of its own, too: the steps of the refinement are not among those of the first stage.
        self._refine = LTXConditionPipeline(
            type(scheduler).from_config(scheduler.config), vae, text_encoder, tokenizer, self.refiner
        )
        # The parts' own video processors are one: what is decoded last is timed whoever decodes it.
        self._refine.video_processor = self.video_processor
        self._refine.set_progress_bar_config(disable=True)

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
        return self._refine(
            height=UPSCALE * first_height,
            width=UPSCALE * first_width,
            latents=large.frames,
            num_inference_steps=refine_steps,
            denoise_strength=refine_strength,
            decode_timestep=decode_timestep,
            output_type=output_type,
            **shared,
        )
