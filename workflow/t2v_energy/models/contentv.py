"""ContentV: the transformer of Stable Diffusion 3 over a whole video, and its pipeline with the VAE of Wan.

Neither is in diffusers. Both are put together here from diffusers' own blocks, after the description that
their source gives: https://github.com/bytedance/ContentV at ad070325c3552dce26b2e37d6fd8e6a7dd4fab00
(Apache-2.0). One thing differs: there the table of positions is made on the host and copied to the device in
every call (0.8 GB at the default size). Here it is made on the device, as copying is no work of the model.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.embeddings import get_3d_sincos_pos_embed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import nn

# diffusers reads a saved pipeline's parts only where their module also has the base class that reads them.
__all__ = ["ContentVPipeline", "ContentVTransformer3DModel", "ModelMixin"]

SPATIAL_INTERPOLATION = 0.5
"""What rows and columns are divided by before their sines and cosines; frames are taken as they are."""


class VideoPatchEmbed(nn.Module):
    """Tokens of a latent video: patches of each frame, in the order of frames, rows, columns, with their
    positions added."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """(videos, channels, frames, rows, columns) to (videos, tokens, width)."""
        videos, _, frames, _, _ = latents.shape
        patches = self.proj(latents.transpose(1, 2).flatten(0, 1))
        _, width, rows, columns = patches.shape
        tokens = patches.unflatten(0, (videos, frames)).permute(0, 1, 3, 4, 2).flatten(1, 3)
        positions = get_3d_sincos_pos_embed(
            width,
            (columns, rows),
            frames,
            spatial_interpolation_scale=SPATIAL_INTERPOLATION,
            device=latents.device,
        )
        return tokens + positions.flatten(0, 1).to(tokens.dtype)


class ContentVTransformer3DModel(SD3Transformer2DModel):
    """Stable Diffusion 3's transformer, whose image tokens are those of all frames of a video.

    It takes the same configuration; ``sample_size`` and ``pos_embed_max_size`` are without effect.
    """

    # Loading and saving read the options from the signature.
    @wraps(SD3Transformer2DModel.__init__)  # type: ignore[misc]
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.pos_embed = VideoPatchEmbed(self.config.patch_size, self.config.in_channels, self.inner_dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """The velocity at ``hidden_states``, of the same shape.

        Args:
            hidden_states: noisy latents (videos, channels, frames, rows, columns).
            encoder_hidden_states: the text's tokens (videos, tokens, ``joint_attention_dim``).
            pooled_projections: the text's pooled vector (videos, ``pooled_projection_dim``).
            timestep: one a video, of the scheduler.
            return_dict: False for a tuple.
        """
        _, _, frames, height, width = hidden_states.shape
        patch = self.config.patch_size
        video, text = self.pos_embed(hidden_states), self.context_embedder(encoder_hidden_states)
        condition = self.time_text_embed(timestep, pooled_projections)
        for block in self.transformer_blocks:
            text, video = block(hidden_states=video, encoder_hidden_states=text, temb=condition)
        video = self.proj_out(self.norm_out(video, condition))
        # tokens (frames, rows, columns) of (patch, patch, channels): each patch goes back to its pixels
        patches = video.unflatten(2, (patch, patch, -1))
        patches = patches.unflatten(1, (frames, height // patch, width // patch))
        sample = patches.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


class ContentVPipeline(StableDiffusion3Pipeline):
    """Stable Diffusion 3's three text encoders, a loop that calls the transformer once for the prompt and
    once for the negative one, and the decoder of Wan."""

    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        transformer: Any,
        scheduler: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        text_encoder_2: Any,
        tokenizer_2: Any,
        text_encoder_3: Any,
        tokenizer_3: Any,
    ) -> None:
        super(StableDiffusion3Pipeline, self).__init__()  # its own constructor asks for an image VAE
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
        )
        self.vae_scale_factor = vae.config.scale_factor_spatial
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor)
        self.tokenizer_max_length = tokenizer.model_max_length  # CLIP's
        self.patch_size = transformer.config.patch_size

    @torch.no_grad()
    def __call__(
        self,
        *,
        prompt: str,
        negative_prompt: str = "",
        height: int = 432,
        width: int = 768,
        num_frames: int = 125,
        num_inference_steps: int = 50,
        guidance_scale: float = 6.0,
        generator: torch.Generator | None = None,
        output_type: str = "np",
        callback_on_step_end: Any = None,
        max_sequence_length: int = 256,
    ) -> WanPipelineOutput:
        """One video of ``height`` × ``width`` pixels and ``num_frames`` frames.

        ``max_sequence_length`` is T5's; CLIP's is its tokenizer's. The callback may change the latents, and
        may set ``_interrupt``: then the remaining steps are left out and the latents are decoded as they are.

        Raises:
            ValueError: sizes that are no multiples of the VAE's downsampling times the patch size.
        """
        self.check_inputs(prompt, None, None, height, width, negative_prompt=negative_prompt)
        self._guidance_scale, self._interrupt = guidance_scale, False
        device = self._execution_device
        text, negative_text, pooled, negative_pooled = self.encode_prompt(
            prompt,
            None,
            None,
            device=device,
            do_classifier_free_guidance=self.do_classifier_free_guidance,
            negative_prompt=negative_prompt,
            max_sequence_length=max_sequence_length,
        )
        latents = self._noise(height, width, num_frames, text.dtype, device, generator)
        # without the last, noiseless one, which the scheduler adds itself
        sigmas = np.linspace(1.0, 0.0, num_inference_steps + 1)[:-1]
        self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        self._num_timesteps = len(self.scheduler.timesteps)
        with self.progress_bar(total=num_inference_steps) as bar:
            for index, timestep in enumerate(self.scheduler.timesteps):
                if self.interrupt:
                    continue
                velocity = self._velocity(latents, timestep, text, pooled)
                if self.do_classifier_free_guidance:
                    negative = self._velocity(latents, timestep, negative_text, negative_pooled)
                    velocity = negative + guidance_scale * (velocity - negative)
                latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    changed = callback_on_step_end(self, index, timestep, {"latents": latents})
                    latents = changed.pop("latents", latents)
                bar.update()
        video = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return WanPipelineOutput(frames=video)

    def _noise(
        self,
        height: int,
        width: int,
        num_frames: int,
        dtype: torch.dtype,
        device: Any,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        """Latents to begin with: (1, channels, frames, rows, columns)."""
        frames = (num_frames - 1) // self.vae.config.scale_factor_temporal + 1
        rows, columns = height // self.vae_scale_factor, width // self.vae_scale_factor
        shape = (1, self.transformer.config.in_channels, frames, rows, columns)
        return randn_tensor(shape, generator=generator, device=device, dtype=dtype)

    def _velocity(
        self, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, pooled: torch.Tensor
    ) -> torch.Tensor:
        (sample,) = self.transformer(
            hidden_states=latents,
            timestep=timestep.expand(latents.shape[0]),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            return_dict=False,
        )
        return sample

    def _decode(self, latents: torch.Tensor, output_type: str) -> Any:
        """Frames of ``latents``, which the VAE knows unnormalised, channel by channel."""
        config = self.vae.config
        latents = latents.to(self.vae.dtype)
        mean, std = (
            torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        video = self.vae.decode(latents * std + mean, return_dict=False)[0]
        return self.video_processor.postprocess_video(video, output_type=output_type)
