"""Guidance in the first steps only: afterwards the conditional prediction is taken as it is.

Late steps settle detail, on which the prompt's guidance has little effect; leaving it out saves one of
their two denoiser passes (Castillo et al., arXiv 2312.12487; Zhang et al., arXiv 2506.08351).  Wan decides
at each step by its guidance scale whether it calls the denoiser a second time, so the scale becomes 1.
CogVideoX decides once a generation and then calls with a batch of two: of it only the conditional sample is
computed, and its prediction stands for both, between which the guidance then finds no difference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from t2v_energy.interventions.base import Change, Intervention, Target, Work, WorkClass
from t2v_energy.interventions.call_work import Call, ratios_by_call
from t2v_energy.interventions.clock import Clock, replaced

if TYPE_CHECKING:
    from t2v_energy.config import Configuration, ModelFile

ARCHITECTURES = ("wan", "cogvideox")
BATCHED = ("hidden_states", "encoder_hidden_states", "timestep")
"""Arguments of CogVideoX's denoiser that hold both samples: the unconditional first, then the conditional."""


def guided_steps(steps: int, fraction: float) -> int:
    """Steps with guidance: at least ``fraction`` of them, rounded up; 1 at least."""
    return max(1, ceil(round(fraction * steps, 9)))


class CfgTruncation(Intervention):
    """Classifier-free guidance ends after a fraction of the steps."""

    kind: ClassVar[str] = "cfg-truncation"
    whole_schedule: ClassVar[bool] = True
    call_order: ClassVar[int | None] = 0

    fraction: float = Field(gt=0, lt=1, description="of the steps, from the first, that are guided")

    def check(self, model: ModelFile, configuration: Configuration) -> None:
        """Raise for a model of another kind, without guidance, or where every step would be guided."""
        self._must_know(model)
        if configuration.guidance_scale <= 1:
            raise self.refused(
                f"a guidance scale of {configuration.guidance_scale:g} guides no step", "leave it out"
            )
        steps = configuration.num_inference_steps
        if guided_steps(steps, self.fraction) >= steps:
            raise self.refused(
                f"all of {steps} steps are guided with fraction {self.fraction:g}", "take more steps"
            )

    def apply(self, target: Target) -> Change:
        """Truncate from now on; evidence counts the denoiser passes that were left out.

        Raises:
            UserError: a model whose pipeline is not known.
        """
        self._must_know(target.model)
        if target.model.passes_per_step > 1:
            return self._scale_becomes_one(target)
        return self._batch_becomes_one(target)

    def work_ratios(self, work: Work) -> Mapping[WorkClass, float]:
        """A guided step has two passes, the others one; only separate calls are fewer."""
        return ratios_by_call(work, [self])

    def changed_calls(self, work: Work, calls: Sequence[Call]) -> Sequence[Call]:
        """Late steps are of the conditional sample: one call instead of two, or one sample of a batch."""
        guided = guided_steps(work.configuration.num_inference_steps, self.fraction)
        if work.model.passes_per_step > 1:
            return [call for call in calls if call.step < guided or call.branch != "uncond"]
        share = 1 / work.model.batch_per_pass
        return [call if call.step < guided else replace(call, samples=share) for call in calls]

    def _must_know(self, model: ModelFile) -> None:
        if model.architecture not in ARCHITECTURES:
            raise self.refused(f"it is not made for {model.key}", "leave it out for this model")

    def _scale_becomes_one(self, target: Target) -> Change:
        counted = {"omitted_passes": 0.0}

        def stepped() -> None:
            counted["omitted_passes"] += "uncond" not in clock.branches
            if clock.step >= guided_steps(clock.steps, self.fraction):
                # the pipeline asks for it at each step, and sets it at the start of each generation
                target.pipeline._guidance_scale = 1.0

        clock = Clock(target, stepped=stepped)
        return Change(clock.stop, lambda: counted)

    def _batch_becomes_one(self, target: Target) -> Change:
        counted = {"omitted_passes": 0.0}
        clock = Clock(target)
        original = target.denoiser.forward

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if clock.step < guided_steps(clock.steps, self.fraction) or len(kwargs["hidden_states"]) == 1:
                return original(*args, **kwargs)
            counted["omitted_passes"] += 1
            return _conditional_alone(original, args, kwargs)

        restore = replaced(target.denoiser, "forward", forward)

        def undo() -> None:
            restore()
            clock.stop()

        return Change(undo, lambda: counted)


def _conditional_alone(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The answer to the second half of the batch, given for both halves."""
    half = len(kwargs["hidden_states"]) // 2
    second = {name: value[half:] if name in BATCHED else value for name, value in kwargs.items()}
    (sample,) = original(*args, **{**second, "return_dict": False})
    return (sample.repeat(2, *[1] * (sample.dim() - 1)),)
