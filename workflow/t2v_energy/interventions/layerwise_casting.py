"""Weights stored in float8 and cast to bfloat16 for every use: less memory, more work (a negative control).

Each layer's weights are cast before it runs and cast back after it, in every denoiser call; products run in
bfloat16 as before.  It saves memory alone, and costs the casts' bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from t2v_energy.interventions.base import Change, Intervention, Target, Work, WorkClass

QUANTISED = "quantised weights cannot be cast"
CAST_BYTES = 2 * (1 + 2)
"""Each parameter, in each call: read one byte and write two, then read two and write one."""


class LayerwiseCasting(Intervention):
    """diffusers' layerwise casting of the denoiser, stored as float8_e4m3fn."""

    kind: ClassVar[str] = "layerwise-casting"
    not_after: ClassVar[Mapping[str, str]] = {
        "compile": "a compiled graph cannot hold the casts, which replace weights in every call"
    }
    not_with: ClassVar[Mapping[str, str]] = {"fp8": QUANTISED, "int8": QUANTISED}

    def apply(self, target: Target) -> Change:
        """Store the layers that diffusers' patterns do not leave out in float8.

        Raises:
            UserError: the denoiser's layers are hooked already, or their weights are no plain tensors.
        """
        import torch

        from t2v_energy.interventions import modules

        denoiser = target.denoiser
        everything = list(denoiser.modules())
        registries = {id(m): m._diffusers_hook for m in everything if hasattr(m, "_diffusers_hook")}
        if any(registry.hooks for registry in registries.values()):
            raise self.refused("diffusers has hooks on the denoiser already", "list it first, and once")
        if any(type(p.data) is not torch.Tensor for p in denoiser.parameters()):
            raise self.refused(QUANTISED, "leave out what quantises them")
        forwards = [(module, vars(module).get("forward")) for module in everything]
        tensors = (*denoiser.parameters(), *denoiser.buffers())
        kept = modules.Kept([t for t in tensors if t.is_floating_point()])
        denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn)
        modules.free_unused()
        probe = modules.FirstCall(denoiser, _upcast)

        def undo() -> None:
            probe.detach()
            for module, forward in forwards:
                if id(module) not in registries:
                    vars(module).pop("_diffusers_hook", None)
                vars(module).pop("forward", None)
                if forward is not None:
                    module.forward = forward
            kept.restore()

        return Change(undo, lambda: {"casts_in_first_call": float(probe.counts["cast"])})

    def work_ratios(self, work: Work) -> Mapping[WorkClass, float]:
        """Traffic grows by casts of all the denoiser's parameters, the few that stay as they are too."""
        from t2v_energy.interventions.compiled import with_added_traffic
        from t2v_energy.work.architectures import parameter_counts

        parameters = parameter_counts(work.model)[work.model.denoiser_part]
        return with_added_traffic(work, CAST_BYTES * parameters * float(work.features.calls[0]))


def _upcast(name: str, args: tuple[Any, ...]) -> str | None:
    """``cast`` for an operator that turns float8 into something else."""
    import torch

    casts = name in ("_to_copy", "copy_") and any(
        isinstance(a, torch.Tensor) and a.dtype == torch.float8_e4m3fn for a in args[-1:]
    )
    return "cast" if casts else None
