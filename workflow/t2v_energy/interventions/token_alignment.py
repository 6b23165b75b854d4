"""Self-attention's queries are padded to a length that its kernels divide evenly.

cuDNN's attention is faster where the number of tokens divides by 128.  Rows of padding attend and are cut off
afterwards, so that every other row stays what it was.  Keys are not padded: each would have to be masked, and masked
attention runs another, slower kernel.
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


class TokenAlignment(Intervention):
    """Padded queries."""

    kind: ClassVar[str] = "token-alignment"
    lossless: ClassVar[bool] = True

    multiple: int = Field(128, ge=2, description="the padded number of queries divides by it")

    def check(self, model: ModelFile, configuration: Configuration) -> None:
        if model.architecture not in ARCHITECTURES:
            raise self.refused(
                f"{model.architecture} attends with a mask or at several lengths",
                f"use a model of {', '.join(ARCHITECTURES)}",
            )
        if configuration.attention_kernel == "sage":
            raise self.refused("Sage's kernels pad by themselves", "leave attention_kernel out")
        tokens = _tokens(model, configuration)
        if tokens % self.multiple == 0:
            raise self.refused(
                f"{tokens} tokens divide by {self.multiple} already", "leave it out for this size"
            )

    def apply(self, target: Target) -> Change:
        """Pad in every call of the denoiser's self-attention."""
        from t2v_energy.interventions import modules
        from t2v_energy.measurement.kernels import during_calls

        undo = ExitStack()
        undo.enter_context(during_calls(target.denoiser, lambda: _padding(self.multiple)))
        probe = modules.FirstCall(target.denoiser, lambda name, args: _padded(name, args, self.multiple))
        undo.callback(probe.detach)
        return Change(undo.close, lambda: {"padded_attentions_in_first_call": float(probe.counts["padded"])})

    def work_ratios(self, work: Work) -> Mapping[WorkClass, float]:
        """Self-attention grows by the padded rows; cross attention, m text tokens beside L, does not."""
        tokens = int(work.features.tokens[0])
        padded = tokens + -tokens % self.multiple
        text = work.model.tokenizer.max_length if work.model.architecture == "wan" else 0
        return {"attention": (padded + text) / (tokens + text)}


def _tokens(model: ModelFile, configuration: Configuration) -> int:
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


def pad_queries(attend: Callable[..., Any], multiple: int) -> Callable[..., Any]:
    """``attend`` (torch's scaled_dot_product_attention) with padded queries where it is self-attention.

    Queries of shape (batch, heads, tokens, width) keep the order in which they lie in memory, so that neither the
    kernel nor what follows it has to copy them.
    """
    from torch.nn import functional

    def padded(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = query.shape[-2]
        missing = -tokens % multiple
        mask = args[0] if args else kwargs.get("attn_mask")
        if missing == 0 or tokens != key.shape[-2] or mask is not None:
            return attend(query, key, value, *args, **kwargs)
        longer = functional.pad(query.transpose(1, 2), (0, 0, 0, 0, 0, missing)).transpose(1, 2)
        return attend(longer, key, value, *args, **kwargs)[:, :, :tokens]

    return padded


@contextmanager
def _padding(multiple: int) -> Iterator[None]:
    from torch.nn import functional

    from t2v_energy.measurement.kernels import attention_replaced

    with attention_replaced(pad_queries(functional.scaled_dot_product_attention, multiple)):
        yield


def _padded(name: str, args: tuple[Any, ...], multiple: int) -> str | None:
    """``padded`` for an attention operator with more queries than keys, as many as asked for."""
    if "scaled_dot_product" not in name or len(args) < 2:
        return None
    queries, keys = (int(a.shape[-2]) for a in args[:2])
    return "padded" if queries > keys and queries == keys + -keys % multiple else None
