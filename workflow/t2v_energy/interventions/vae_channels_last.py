"""Convolutions of the VAE with channels as the innermost dimension, as tensor cores read them.

cuDNN otherwise turns every input around and back.  The numbers are the same; sums may be in another order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from t2v_energy.interventions.base import Change, Intervention, Target, Work, WorkClass


class VaeChannelsLast(Intervention):
    """Weights of the decoder's convolutions in ``channels_last`` or ``channels_last_3d``."""

    kind: ClassVar[str] = "vae-channels-last"
    lossless: ClassVar[bool] = True

    def apply(self, target: Target) -> Change:
        """Lay the weights out anew; activations follow them.

        Raises:
            UserError: the decoder has no convolutions in two or three dimensions.
        """
        import torch
        from torch import nn

        formats = {nn.Conv2d: torch.channels_last, nn.Conv3d: torch.channels_last_3d}
        found = [
            (module, layout)
            for module in target.pipeline.vae.decoder.modules()
            for cls, layout in formats.items()
            if isinstance(module, cls)
        ]
        if not found:
            raise self.refused(
                f"{type(target.pipeline.vae).__name__} has no convolutions to lay out", "leave it out"
            )
        originals = [(module.weight, module.weight.data) for module, _ in found]
        counted = {"channels_last_convolutions": 0.0}
        hooks = [module.register_forward_hook(_first(layout, counted)) for module, layout in found]
        for (weight, values), (_, layout) in zip(originals, found, strict=True):
            weight.data = values.contiguous(memory_format=layout)

        def undo() -> None:
            for hook in hooks:
                hook.remove()
            for weight, values in originals:
                weight.data = values

        return Change(undo, lambda: counted)

    def work_ratios(self, work: Work) -> Mapping[WorkClass, float]:
        """The same work; its rate is in ``expected``."""
        return {}


def _first(layout: Any, counted: dict[str, float]) -> Any:
    """A hook that counts a convolution once, if its first output lies as ``layout`` says."""
    seen = False

    def count(_module: Any, _inputs: Any, output: Any) -> None:
        nonlocal seen
        if not seen:
            seen = True
            counted["channels_last_convolutions"] += output.is_contiguous(memory_format=layout)

    return count
