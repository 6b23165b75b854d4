"""Self-attention in two passes, so that the long one has a number of keys that its kernel divides evenly.

cuDNN's attention is faster where the number of keys divides by 128; that of the queries does not matter
(cases ``attention-alignment`` of experiment ``operators``).  Padding keys needs a mask, and masked attention
runs another, slower kernel.  So the keys beyond the last multiple are attended to by themselves, and both
results are joined by their log-sum-exps, which is exact: softmax over a union of keys is the mean of the
parts' results, weighted with the parts' sums (Dao et al., FlashAttention, 2022, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from t2v_energy.interventions.base import Change, Intervention, Target, Work, WorkClass

if TYPE_CHECKING:
    from t2v_energy.config import Configuration, ModelFile

ARCHITECTURES = ("wan", "cogvideox")
"""Whose self-attention sees a single length and no mask."""
JOIN_BYTES = (2 + 2) + (2 + 2 + 2)
"""Of a token's values: the second pass reads queries and writes results; joining reads both, writes one."""


class TokenAlignment(Intervention):
    """Self-attention of a multiple of keys, and of the rest."""

    kind: ClassVar[str] = "token-alignment"
    lossless: ClassVar[bool] = True

    multiple: int = Field(
        128, ge=2, description="the first pass takes the largest multiple of it of the keys"
    )

    def check(self, model: ModelFile, configuration: Configuration) -> None:
        if model.architecture not in ARCHITECTURES:
            raise self.refused(
                f"{model.architecture} attends with a mask or at several lengths",
                f"use a model of {', '.join(ARCHITECTURES)}",
            )
        if configuration.attention_kernel not in (None, "cudnn"):
            raise self.refused(
                f"it splits cuDNN's attention, and attention_kernel is {configuration.attention_kernel!r}",
                "leave attention_kernel out",
            )
        tokens = attended_tokens(model, configuration)
        if tokens % self.multiple == 0:
            raise self.refused(
                f"{tokens} tokens divide by {self.multiple} already", "leave it out for this size"
            )
        if tokens < self.multiple:
            raise self.refused(
                f"{tokens} tokens are fewer than {self.multiple}", "leave it out for this size"
            )

    def apply(self, target: Target) -> Change:
        """Split in every call of the denoiser."""
        from t2v_energy.interventions import modules
        from t2v_energy.measurement.kernels import during_calls

        undo = ExitStack()
        undo.enter_context(during_calls(target.denoiser, lambda: _splitting(self.multiple)))
        probe = modules.FirstCall(target.denoiser, lambda name, args: _aligned(name, args, self.multiple))
        undo.callback(probe.detach)
        return Change(undo.close, lambda: {"split_attentions_in_first_call": float(probe.counts["aligned"])})

    def work_ratios(self, work: Work) -> Mapping[WorkClass, float]:
        """The same FLOP in two passes; traffic grows by the second pass and by joining both."""
        from t2v_energy.interventions.compiled import with_added_traffic

        model = work.model
        config = model.components[model.denoiser_part].config
        width = config["num_attention_heads"] * config["attention_head_dim"]
        tokens = float(work.features.tokens[0]) * model.batch_per_pass
        added = float(work.features.calls[0]) * JOIN_BYTES * config["num_layers"] * width * tokens
        return with_added_traffic(work, added)


def attended_tokens(model: ModelFile, configuration: Configuration) -> int:
    """Length that self-attention sees: text beside video where they attend jointly."""
    from t2v_energy.work.architectures import latents

    frames, rows, columns = latents(
        model, configuration.height, configuration.width, configuration.num_frames
    )[0]
    config = model.components[model.denoiser_part].config
    patch = config["patch_size"]
    time, *sides = patch if isinstance(patch, (list, tuple)) else (1, patch, patch)
    video = frames // time * (rows // sides[0]) * (columns // sides[1])
    return int(video + (model.tokenizer.max_length if model.architecture == "cogvideox" else 0))


def split_keys(attend: Callable[..., Any], multiple: int) -> Callable[..., Any]:
    """``attend`` (torch's scaled_dot_product_attention) in two passes where it is self-attention.

    Queries, keys and values have shape (batch, heads, tokens, width).
    """
    import torch

    def attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = key.shape[-2]
        whole = tokens - tokens % multiple
        mask = args[0] if args else kwargs.get("attn_mask")
        if whole in (0, tokens) or query.shape[-2] != tokens or mask is not None:
            return attend(query, key, value, *args, **kwargs)
        scale = kwargs.get("scale")
        first, first_sum = _with_sums(query, key[:, :, :whole], value[:, :, :whole], scale)
        rest, rest_sum = _with_sums(query, key[:, :, whole:], value[:, :, whole:], scale)
        share = torch.sigmoid(rest_sum - first_sum).unsqueeze(-1).to(first.dtype)
        return torch.lerp(first, rest, share)

    return attention


def _with_sums(query: Any, key: Any, value: Any, scale: float | None) -> tuple[Any, Any]:
    """Attention and the logarithm of each row's sum of exponentials, shape (batch, heads, queries)."""
    import torch

    aten = torch.ops.aten
    if query.is_cuda:
        result, sums, *_ = aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, False, False, scale=scale
        )
    else:
        result, sums = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)
    return result, sums.reshape(query.shape[:3])


@contextmanager
def _splitting(multiple: int) -> Iterator[None]:
    from torch.nn import functional

    from t2v_energy.measurement.kernels import attention_replaced

    with attention_replaced(split_keys(functional.scaled_dot_product_attention, multiple)):
        yield


def _aligned(name: str, args: tuple[Any, ...], multiple: int) -> str | None:
    """``aligned`` for an attention operator that has an even number of keys for an uneven one of queries."""
    if "scaled_dot_product" not in name or len(args) < 2:
        return None
    queries, keys = (int(a.shape[-2]) for a in args[:2])
    return "aligned" if queries % multiple and keys == queries - queries % multiple else None
