"""The VAE decodes in bfloat16: half the bytes, and products of the tensor cores instead of TF32's.

For pipelines that keep the VAE in float32, as Wan's does.  Its original weights are put back afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from t2v_energy.interventions.base import Change, Intervention, Target, Work, WorkClass

if TYPE_CHECKING:
    from t2v_energy.config import Configuration, ModelFile


class VaeBfloat16(Intervention):
    """Weights and activations of the whole VAE in bfloat16."""

    kind: ClassVar[str] = "vae-bfloat16"

    def check(self, model: ModelFile, configuration: Configuration) -> None:
        dtype = model.components["vae"].dtype
        if dtype != "float32":
            raise self.refused(f"the VAE is in {dtype} already", "leave it out for this model")

    def apply(self, target: Target) -> Change:
        """Cast the VAE.

        Raises:
            UserError: there is nothing in float32 in it.
        """
        import torch

        from t2v_energy.interventions import modules

        vae = target.pipeline.vae
        tensors = [t for t in (*vae.parameters(), *vae.buffers()) if t.dtype == torch.float32]
        if not tensors:
            raise self.refused(f"{type(vae).__name__} has no weights in float32", "list it once")
        kept = modules.Kept(tensors)
        for tensor in tensors:
            tensor.data = tensor.data.to(torch.bfloat16)
        modules.free_unused()
        counted = {"bfloat16_decodes": 0.0}
        original, own = vae.decode, vars(vae).get("decode")

        def decode(latents: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(latents.to(torch.bfloat16), *args, **kwargs)
            counted["bfloat16_decodes"] += result[0].dtype == torch.bfloat16
            return result

        vae.decode = decode

        def undo() -> None:
            del vae.decode
            if own is not None:
                vae.decode = own
            kept.restore()

        return Change(undo, lambda: counted)

    def work_ratios(self, work: Work) -> Mapping[WorkClass, float]:
        """As many FLOP as before; their rate is in ``expected``, with that of half the bytes."""
        return {}
