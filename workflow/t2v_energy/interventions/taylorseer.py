"""TaylorSeer on a fixed interval: between computed steps, the blocks' residual goes on as a Taylor series.

The published form (Liu et al., arXiv 2503.06923) forecasts the output of every attention and feed-forward
module of every block, each with its own differences in memory, and runs the norms and gates around them.
Ours forecasts what the whole stack adds to the video's tokens, once a call: no module of any block runs at
those steps, and memory grows by ``order`` + 1 tensors a branch and not by that many a module.  (diffusers'
lite mode forecasts the output of the last projection instead.)  So the skipped steps cost less here, and
published figures of quality do not hold for it exactly.  The schedule does not look at activations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from t2v_energy.interventions.base import Change, Intervention, Target, Work, WorkClass
from t2v_energy.interventions.call_work import Call, ratios_by_call
from t2v_energy.interventions.stack_work import skipping
from t2v_energy.work.blocks import ARCHITECTURES

if TYPE_CHECKING:
    from t2v_energy.config import Configuration, ModelFile


def skipped_steps(steps: int, interval: int, first_steps: int) -> frozenset[int]:
    """Steps (from 0) that are forecast: after the first all but every ``interval``-th; never the last."""
    return frozenset(
        step for step in range(max(first_steps, 1), steps - 1) if (step - first_steps + 1) % interval
    )


class TaylorSeer(Intervention):
    """A static interval, applied to the residual of the block stack."""

    kind: ClassVar[str] = "taylorseer"
    whole_schedule: ClassVar[bool] = True
    call_order: ClassVar[int | None] = 1
    not_with: ClassVar[Mapping[str, str]] = {"magcache": "both keep the residual of the block stack"}

    interval: int = Field(ge=2, description="one step of so many is computed (N)")
    order: int = Field(1, ge=0, le=3, description="highest power of the series; 0 repeats the residual")
    first_steps: int = Field(3, ge=1, description="steps that always run, at first; so does the last")

    def check(self, model: ModelFile, configuration: Configuration) -> None:
        """Raise where the blocks cannot be told apart, or no step would be skipped."""
        self._must_know(model)
        steps = configuration.num_inference_steps
        if not skipped_steps(steps, self.interval, self.first_steps):
            raise self.refused(
                f"no step of {steps} is skipped after the first {self.first_steps}", "take more steps"
            )

    def apply(self, target: Target) -> Change:
        """Extrapolate from now on; evidence counts the calls at which the blocks did not run.

        Raises:
            UserError: a denoiser that is not known, or one whose blocks are cached already.
        """
        from t2v_energy.interventions.block_stack import extrapolated

        self._must_know(target.model)
        return extrapolated(target, self.schedule, self.order)

    def work_ratios(self, work: Work) -> Mapping[WorkClass, float]:
        """The calls that are left, and the traffic of the differences and the series."""
        return ratios_by_call(work, [self])

    def changed_calls(self, work: Work, calls: Sequence[Call]) -> Sequence[Call]:
        """Blocks run at the schedule's steps alone."""
        return skipping(work, calls, self.schedule, self.order)

    def _must_know(self, model: ModelFile) -> None:
        if model.architecture not in ARCHITECTURES:
            raise self.refused(f"it is not made for {model.key}", "leave it out for this model")

    def schedule(self, steps: int, _branch: str) -> frozenset[int]:
        """Steps of ``steps`` at which the blocks do not run, the same in all branches."""
        return skipped_steps(steps, self.interval, self.first_steps)
