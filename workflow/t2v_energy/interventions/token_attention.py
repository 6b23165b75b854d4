"""Attention processors that merge tokens, for Wan and CogVideoX of diffusers.

Mode ``hidden`` calls the processor that was there, on fewer tokens with their own positions: whatever kernel
or fused projection it has stays in use.  Modes ``kv`` and ``q`` merge between projection and attention, which
diffusers' processors do not let one do, so they project and attend themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from t2v_energy.interventions.base import Change, Target
from t2v_energy.interventions.block_stack import blocks_of
from t2v_energy.interventions.clock import Clock
from t2v_energy.interventions.token_matching import (
    Merge,
    bin_destinations,
    cell_destinations,
    match,
    row_norms,
)

if TYPE_CHECKING:
    from t2v_energy.interventions.token_merging import Grid, TokenMerging

Rotary = tuple[Tensor, Tensor]
OWN_ATTENTION = ("WanAttnProcessor", "CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0")
"""Processors whose attention modes kv and q take over."""


class Generation:
    """Where a generation is: its number, step, branch of guidance, and the grid of video tokens."""

    def __init__(self, target: Target, grid_of: Callable[[Tensor], Grid]) -> None:
        self.number = 0
        self.grid: Grid = (0, 0, 0)
        self._grid_of = grid_of
        self.clock = Clock(target, begun=self._begun)
        self._hook = target.denoiser.register_forward_pre_hook(self._called, with_kwargs=True)

    def stop(self) -> None:
        """Follow no more."""
        self._hook.remove()
        self.clock.stop()

    def _begun(self) -> None:
        self.number += 1

    def _called(self, _module: Any, args: Any, kwargs: Any) -> None:
        self.grid = self._grid_of(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])


class Draws:
    """Numbers from [0, 1) that follow from a seed, a step and a block."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __call__(self, step: int, block: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        seed = (self._seed * 2**16 + step) * 2**10 + block
        return torch.rand(shape, device=device, generator=self._generators[device].manual_seed(seed % 2**63))


class Merging:
    """What the processors of both architectures share: one block's merging."""

    eager = True
    """It counts steps and keeps matchings, which no compiled graph can hold: the compiler breaks there."""

    def __init__(
        self,
        settings: TokenMerging,
        block: int,
        original: Any,
        generation: Generation,
        counts: dict[str, float],
    ) -> None:
        self.settings, self.block, self.original, self.generation = settings, block, original, generation
        self._counts, self._draws = counts, Draws(settings.seed)
        self._matched: dict[str, tuple[int, int, Merge]] = {}
        self._sizes = settings.sizes(generation.grid, 0)

    @property
    def _attention_backend(self) -> Any:  # diffusers' set_attention_backend looks for it, and sets it
        return self.original._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.original._attention_backend = backend

    def merges(self, text: int, attention_mask: Tensor | None) -> bool:
        """Whether tokens of a video of this size are merged; a mask of single tokens would no longer fit.

        ``text``: tokens that attention sees beside them.
        """
        self._sizes = self.settings.sizes(self.generation.grid, text)
        some = self._sizes.merged > 0
        if some and attention_mask is not None:
            raise self.settings.refused(
                "attention has a mask", "use a pipeline whose self-attention has none"
            )
        return some

    def merge_of(self, hidden: Tensor, merged: Tensor | None, heads: int) -> Merge:
        """This call's merge: a new one, or an earlier one that still serves.

        Args:
            hidden: attention's input, video tokens alone; (B, L, d).
            merged: what is merged, for the mean over its heads (B, L, H, head); None: the input.
        """
        merge = self._earlier(hidden)
        if merge is None:
            merge = self._match(hidden, merged, heads)
            self._counts["matchings_made"] += 1
            if self.settings.match_every > 1:
                now = self.generation
                self._matched[now.clock.branch] = (now.number, now.clock.step, merge)
        self._counts["blocks_merged"] += 1
        self._counts["tokens_merged"] += merge.batch * merge.merged
        return merge

    def _earlier(self, hidden: Tensor) -> Merge | None:
        now = self.generation
        number, step, merge = self._matched.get(now.clock.branch, (-1, 0, None))
        serves = number == now.number and now.clock.step - step < self.settings.match_every
        same = merge is not None and (merge.batch, merge.tokens) == hidden.shape[:2]
        return merge if serves and same else None

    def _match(self, hidden: Tensor, merged: Tensor | None, heads: int) -> Merge:
        settings, now = self.settings, self.generation
        batch = hidden.shape[0]
        sizes = self._sizes
        if hidden.shape[1] != sizes.tokens:
            raise RuntimeError(
                f"attention sees {hidden.shape[1]} video tokens, the latent has {sizes.tokens}"
            )
        metric = hidden
        if settings.metric == "head-mean":
            metric = (hidden.unflatten(2, (heads, -1)) if merged is None else merged).mean(2)
        norms = row_norms(metric)

        def draw(*shape: int) -> Tensor:
            return self._draws(now.clock.step, self.block, shape, hidden.device)

        if settings.method == "3d":
            cells = cell_destinations(now.grid, settings.stride, draw(3, sizes.destinations))
            destinations = cells.expand(batch, -1)
        else:
            lengths = norms if metric is hidden else row_norms(hidden)
            destinations = bin_destinations(lengths, prod(settings.stride), draw(sizes.destinations))
        return match(metric, destinations, sizes.merged, norms)


class WanMerging(Merging):
    """Self-attention of a block of Wan."""

    @torch.compiler.disable
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rotary | None = None,
    ) -> Tensor:
        """As diffusers' WanAttnProcessor; (B, L, d) to (B, L, d)."""
        if not self.merges(0, attention_mask):
            found: Tensor = self.original(
                attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb
            )
            return found
        if self.settings.mode == "hidden":
            merge = self.merge_of(hidden_states, None, attn.heads)
            rotary = None if rotary_emb is None else _gathered(rotary_emb, merge)
            return merge.unmerge(self.original(attn, merge.merge(hidden_states), None, None, rotary))
        return self._between(attn, hidden_states, rotary_emb)

    def _between(self, attn: Any, hidden: Tensor, rotary: Rotary | None) -> Tensor:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        query, key, value = _projected(attn, hidden)
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (part.unflatten(2, (attn.heads, -1)) for part in (query, key, value))
        if rotary is not None:
            query, key = rotated(query, *rotary), rotated(key, *rotary)
        bias = None
        if self.settings.mode == "kv":
            merge = self.merge_of(hidden, key, attn.heads)
            key, value = _merged_heads(merge, key), _merged_heads(merge, value)
            bias = _size_bias(merge, query, 0) if self.settings.size_bias else None
        else:
            merge = self.merge_of(hidden, query, attn.heads)
            query = _merged_heads(merge, query)
        out = dispatch_attention_fn(query, key, value, attn_mask=bias, backend=self._attention_backend)
        out = _out(attn, out.flatten(2, 3).type_as(query))
        return out if self.settings.mode == "kv" else merge.unmerge(out)


class CogVideoXMerging(Merging):
    """Joint attention of a block of CogVideoX; text tokens stay as they are."""

    @torch.compiler.disable
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As diffusers' CogVideoXAttnProcessor2_0: video (B, L, d) and text (B, m, d), both back."""
        if not self.merges(encoder_hidden_states.shape[1], attention_mask):
            found: tuple[Tensor, Tensor] = self.original(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
            return found
        if self.settings.mode == "hidden":
            return self._before(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        return self._between(attn, hidden_states, encoder_hidden_states, image_rotary_emb)

    def _before(
        self, attn: Any, hidden: Tensor, text: Tensor, rotary: Rotary | None
    ) -> tuple[Tensor, Tensor]:
        merge = self.merge_of(hidden, None, attn.heads)
        merged = merge.merge(hidden)
        if rotary is None:
            video, text = self.original(attn, merged, text)
            return merge.unmerge(video), text
        # Samples keep different tokens, and the processor takes positions for all of them: one at a time.
        parts = [
            self.original(
                attn,
                merged[sample : sample + 1],
                text[sample : sample + 1],
                None,
                tuple(table.index_select(0, merge.kept_tokens[sample]) for table in rotary),
            )
            for sample in range(merge.batch)
        ]
        video, text = (torch.cat(several) for several in zip(*parts, strict=True))
        return merge.unmerge(video), text

    def _between(
        self, attn: Any, hidden: Tensor, text: Tensor, rotary: Rotary | None
    ) -> tuple[Tensor, Tensor]:
        length = text.shape[1]
        parts = _projected(attn, torch.cat([text, hidden], dim=1))
        query, key, value = (part.unflatten(2, (attn.heads, -1)) for part in parts)
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        if rotary is not None:
            tables = [table[None, :, None] for table in rotary]
            for part in (query, key):
                part[:, length:] = rotated(part[:, length:], *tables)
        bias = None
        if self.settings.mode == "kv":
            merge = self.merge_of(hidden, key[:, length:], attn.heads)
            key, value = (
                torch.cat([part[:, :length], _merged_heads(merge, part[:, length:])], dim=1)
                for part in (key, value)
            )
            bias = _size_bias(merge, query, length) if self.settings.size_bias else None
        else:
            merge = self.merge_of(hidden, query[:, length:], attn.heads)
            query = torch.cat([query[:, :length], _merged_heads(merge, query[:, length:])], dim=1)
        out = functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=bias
        )
        out = _out(attn, out.transpose(1, 2).flatten(2))
        text, video = out[:, :length], out[:, length:]
        return (video if self.settings.mode == "kv" else merge.unmerge(video)), text


def rotated(values: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary embedding of neighbouring pairs, computed in the tables' number type.

    ``values`` (B, L, H, head); the tables (broadcastable) repeat each angle for both members of its pair, as
    diffusers' tables for Wan and CogVideoX do.
    """
    first, second = values.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = cosines[..., 0::2], sines[..., 1::2]
    out = torch.empty_like(values)
    out[..., 0::2] = first * cosine - second * sine
    out[..., 1::2] = first * sine + second * cosine
    return out


def _projected(attn: Any, values: Tensor) -> tuple[Tensor, ...]:
    if getattr(attn, "fused_projections", False):
        return tuple(attn.to_qkv(values).chunk(3, dim=-1))
    return attn.to_q(values), attn.to_k(values), attn.to_v(values)


def _out(attn: Any, values: Tensor) -> Tensor:
    for layer in attn.to_out:  # a projection, and a dropout that does nothing at inference
        values = layer(values)
    return values


def _merged_heads(merge: Merge, values: Tensor) -> Tensor:
    """(B, L, H, head) to (B, L - r, H, head): all heads of a token go together."""
    return merge.merge(values.flatten(2)).unflatten(2, values.shape[2:])


def _gathered(rotary: Rotary, merge: Merge) -> Rotary:
    """Wan's tables (1, L, 1, head) of the kept tokens: (B, L - r, 1, head)."""
    kept = merge.kept_tokens.reshape(-1)
    cosines, sines = (
        table[0, :, 0].index_select(0, kept).view(merge.batch, merge.kept, 1, -1) for table in rotary
    )
    return cosines, sines


def _size_bias(merge: Merge, like: Tensor, text: int) -> Tensor:
    """Logarithm of each row's size, 0 for the text before them; (B, 1, 1, text + L - r)."""
    return functional.pad(merge.sizes().log_(), (text, 0)).to(like.dtype)[:, None, None]


PROCESSORS: dict[str, type[Merging]] = {"wan": WanMerging, "cogvideox": CogVideoXMerging}


def _grid_of(architecture: str, config: Any) -> Callable[[Tensor], Grid]:
    if architecture == "wan":
        deep, down, across = config.patch_size
        return lambda latent: (latent.shape[2] // deep, latent.shape[3] // down, latent.shape[4] // across)
    side = config.patch_size
    return lambda latent: (latent.shape[1], latent.shape[3] // side, latent.shape[4] // side)


def install(settings: TokenMerging, target: Target) -> Change:
    """Put the processors in; see :meth:`TokenMerging.apply`."""
    denoiser, architecture = target.denoiser, target.model.architecture
    blocks = blocks_of(denoiser)
    chosen = {index: blocks[index].attn1 for index in settings.blocks(len(blocks))}
    if any(block._compiled_call_impl is not None for block in blocks):
        raise settings.refused("the blocks are compiled already", "list it before the compilation")
    for attention in chosen.values():
        name = type(attention.processor).__name__
        if isinstance(attention.processor, Merging):
            raise settings.refused("tokens are merged already", "list one setting of it")
        if settings.mode != "hidden" and name not in OWN_ATTENTION:
            raise settings.refused(
                f"mode {settings.mode} replaces {name}, which another intervention has put there",
                "use mode hidden, or list this intervention alone",
            )
    counts = {"tokens_merged": 0.0, "blocks_merged": 0.0, "matchings_made": 0.0}
    generation = Generation(target, _grid_of(architecture, denoiser.config))
    undo = ExitStack()
    undo.callback(generation.stop)
    for index, attention in chosen.items():
        original = attention.processor
        attention.set_processor(PROCESSORS[architecture](settings, index, original, generation, counts))
        undo.callback(attention.set_processor, original)
    return Change(undo.close, lambda: counts)
