"""One matrix product makes queries, keys and values (diffusers' ``fuse_qkv_projections``).

Self-attention's three products become one, cross attention's two of the text likewise.  The numbers are the
same up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from t2v_energy.interventions.base import Change, Intervention, Target, Work, WorkClass

if TYPE_CHECKING:
    from t2v_energy.config import Configuration, ModelFile

ARCHITECTURES = ("wan", "cogvideox")
"""Whose attention processors take the fused weights; elsewhere diffusers has none, or raises."""
FUSED = ("to_qkv", "to_kv", "to_added_kv")
QUANTISED = "quantised weights cannot be joined"
PRODUCTS = ("mm", "addmm", "_int_mm", "_scaled_mm")


class FusedQkv(Intervention):
    """diffusers' fused projections."""

    kind: ClassVar[str] = "fused-qkv"
    lossless: ClassVar[bool] = True
    not_after: ClassVar[Mapping[str, str]] = {
        "layerwise-casting": "it stores weights in eight bits, which cannot be joined",
        "fp8": QUANTISED,
        "int8": QUANTISED,
        "token-merging": "on CogVideoX diffusers' fused processors would take the place of those that merge",
    }

    def check(self, model: ModelFile, configuration: Configuration) -> None:
        if model.architecture not in ARCHITECTURES:
            raise self.refused(
                f"diffusers fuses no projections of {model.architecture}",
                f"use a model of {', '.join(ARCHITECTURES)}",
            )

    def apply(self, target: Target) -> Change:
        """Fuse the projections of all attention modules.

        Raises:
            UserError: they are fused already, or their weights are no plain tensors.
        """
        import torch

        from t2v_energy.interventions import modules

        denoiser = target.denoiser
        attentions = [m for m in denoiser.modules() if hasattr(m, "fuse_projections")]
        if not attentions or any(getattr(m, "fused_projections", False) for m in attentions):
            raise self.refused("there are no projections left to fuse", "list it once")
        weights = (p for m in attentions for name, p in m.named_parameters() if name.startswith("to_"))
        if any(type(p.data) is not torch.Tensor for p in weights):
            raise self.refused(QUANTISED, "list it before what quantises them")
        state = [(m, {k: v for k, v in vars(m).items() if k in _OWN}) for m in (denoiser, *attentions)]
        processors = [(m, m.processor) for m in attentions]
        with torch.no_grad():
            denoiser.fuse_qkv_projections()
        made = [getattr(m, name) for m in attentions for name in FUSED if _has_linear(m, name)]
        probe = modules.FirstCall(denoiser, lambda name, args: _fused_product(name, args, made))

        def undo() -> None:
            probe.detach()
            for module, processor in processors:
                module.processor = processor
                for name in FUSED:
                    module._modules.pop(name, None)
            for module, before in state:
                for name in _OWN:
                    vars(module).pop(name, None)
                vars(module).update(before)
            modules.free_unused()

        return Change(undo, lambda: {"fused_products_in_first_call": float(probe.counts["fused"])})

    def work_ratios(self, work: Work) -> Mapping[WorkClass, float]:
        """The same FLOP in fewer products; their rate is in ``expected``."""
        return {}


_OWN = ("fused_projections", "original_attn_processors")
"""Attributes that diffusers sets when it fuses."""


def _has_linear(module: Any, name: str) -> bool:
    """Whether a module has a linear layer of that name."""
    from torch import nn

    return isinstance(module._modules.get(name), nn.Linear)


def _pointers(weight: Any) -> list[int]:
    """Where a weight lies in memory; a quantised one is made of several tensors."""
    import torch

    if type(weight.data) is torch.Tensor:
        return [weight.data_ptr()]
    return [getattr(weight, name).data_ptr() for name in weight.__tensor_flatten__()[0]]


def _fused_product(name: str, args: tuple[Any, ...], made: Sequence[Any]) -> str | None:
    """``fused`` for a product with the weight of one of the layers ``made``, by where it lies in memory.

    Looked up at each product: layerwise casting moves a layer's weight for the time of its call.
    """
    import torch

    if name not in PRODUCTS:
        return None
    pointers = {pointer for layer in made for pointer in _pointers(layer.weight)}
    found = any(isinstance(a, torch.Tensor) and a.data_ptr() in pointers for a in args)
    return "fused" if found else None
