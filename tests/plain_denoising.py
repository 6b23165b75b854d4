"""Denoising loops written out plainly, with every cache a dictionary: what the interventions are held
against.

Nothing here is of t2v_energy: a pipeline's parts are called one by one, in the order of its own loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

PROMPT = "a red fox crosses a frozen lake ."
Run = Callable[[int, str, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]], torch.Tensor]
"""From step, branch, tokens and what all blocks make of them to what the head gets."""


def run_all(_step: int, _branch: str, tokens: torch.Tensor, blocks: Callable[[Any], Any]) -> torch.Tensor:
    """No cache."""
    return blocks(tokens)


@dataclass
class Extrapolating:
    """Steps of ``skipped``, by branch, repeat residuals (order 0) or go on along their last difference."""

    skipped: dict[str, frozenset[int]]
    order: int = 0
    past: dict[str, list[tuple[int, torch.Tensor]]] = field(default_factory=dict)
    runs: int = 0

    def __call__(self, step: int, branch: str, tokens: torch.Tensor, blocks: Any) -> torch.Tensor:
        past = self.past.setdefault(branch, [])
        if step not in self.skipped[branch]:
            self.runs += 1
            after = blocks(tokens)
            past.append((step, after - tokens))
            return after
        then, residual = past[-1]
        after = tokens + residual
        if self.order and len(past) > 1:
            earlier, former = past[-2]
            after = after + (step - then) * ((residual - former) / (then - earlier))
        return after


def wan_pass(transformer: Any, latents: Any, t: Any, prompt: Any, run: Callable[[Any, Any], Any]) -> Any:
    """Wan's prediction; ``run`` gets the tokens and the blocks, one after the other, as a function."""
    tokens = transformer.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()
    temb, modulation, prompt, _ = transformer.condition_embedder(t.expand(1), prompt, None)
    modulation, rotary = modulation.unflatten(1, (6, -1)), transformer.rope(latents)

    def blocks(values: Any) -> Any:
        for block in transformer.blocks:
            values = block(values, prompt, modulation, rotary)
        return values

    tokens = run(tokens, blocks)
    shift, scale = (transformer.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
    patches = transformer.proj_out(transformer.norm_out(tokens.float()) * (1 + scale) + shift)
    _, _, frames, rows, columns = latents.shape
    patches = patches.reshape(1, frames, rows // 2, columns // 2, 1, 2, 2, 16)
    return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def cogvideox_pass(transformer: Any, batch: Any, t: Any, prompts: Any, run: Callable[[Any, Any], Any]) -> Any:
    """CogVideoX's predictions for a batch; ``run`` as in :func:`wan_pass`."""
    emb = transformer.time_embedding(transformer.time_proj(t.expand(len(batch))))
    joint, length = transformer.patch_embed(prompts, batch), prompts.shape[1]

    def blocks(values: Any) -> Any:
        words = joint[:, :length]
        for block in transformer.transformer_blocks:
            values, words = block(values, words, emb)
        return values

    tokens = transformer.norm_final(run(joint[:, length:], blocks))
    patches = transformer.proj_out(transformer.norm_out(tokens, temb=emb))
    _, frames, _, rows, columns = batch.shape
    patches = patches.reshape(len(batch), frames, rows // 2, columns // 2, -1, 2, 2)
    return patches.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)


@torch.no_grad()
def wan(pipeline: Any, c: Any, run: Run = run_all, guided: int | None = None) -> torch.Tensor:
    """Latents of a Wan pipeline after all steps; guidance in the first ``guided`` ones."""
    transformer, scheduler = pipeline.transformer, pipeline.scheduler
    text, negative = pipeline.encode_prompt(PROMPT, "", max_sequence_length=512, device="cpu")
    latents = pipeline.prepare_latents(
        1, 16, c.height, c.width, c.num_frames, torch.float32, "cpu", torch.Generator().manual_seed(c.seed)
    )
    scheduler.set_timesteps(c.num_inference_steps)
    for step, t in enumerate(scheduler.timesteps):
        prediction = wan_pass(transformer, latents, t, text, partial(run, step, "cond"))
        if guided is None or step < guided:
            other = wan_pass(transformer, latents, t, negative, partial(run, step, "uncond"))
            prediction = other + c.guidance_scale * (prediction - other)
        latents = scheduler.step(prediction, t, latents, return_dict=False)[0]
    return latents


@torch.no_grad()
def cogvideox(pipeline: Any, c: Any, run: Run = run_all, guided: int | None = None) -> torch.Tensor:
    """The same of a CogVideoX pipeline, whose two samples are one batch while there is guidance."""
    transformer, scheduler = pipeline.transformer, pipeline.scheduler
    text, negative = pipeline.encode_prompt(PROMPT, "", True, 1, max_sequence_length=226, device="cpu")
    latents = pipeline.prepare_latents(
        1, 16, c.num_frames, c.height, c.width, text.dtype, "cpu", torch.Generator().manual_seed(c.seed)
    )
    scheduler.set_timesteps(c.num_inference_steps)
    for step, t in enumerate(scheduler.timesteps):
        both = guided is None or step < guided
        batch = torch.cat([latents] * 2) if both else latents
        prompts = torch.cat([negative, text]) if both else text
        prediction = cogvideox_pass(transformer, batch, t, prompts, partial(run, step, "cond_uncond"))
        if both:
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + c.guidance_scale * (conditional - unconditional)
        latents = scheduler.step(prediction, t, latents, return_dict=False)[0]
    return latents


def made(pipeline: Any, c: Any, **options: Any) -> torch.Tensor:
    """Latents as the pipeline itself makes them."""
    with torch.no_grad():
        return pipeline(
            prompt=PROMPT,
            negative_prompt="",
            height=c.height,
            width=c.width,
            num_frames=c.num_frames,
            num_inference_steps=c.num_inference_steps,
            guidance_scale=c.guidance_scale,
            generator=torch.Generator().manual_seed(c.seed),
            output_type="latent",
            max_sequence_length=226 if "CogVideoX" in type(pipeline).__name__ else 512,
            **options,
        ).frames


PLAIN = {"tiny-wan": wan, "tiny-cogvideox": cogvideox}
