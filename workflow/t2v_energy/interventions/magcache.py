"""MagCache: steps whose residual is expected to have changed little repeat the last computed one.

The rule of Ma et al. (arXiv 2506.09045): the published ratios of the residual's magnitude from step to step
are multiplied up since the last computed step; the deviations of these products from 1 add up to an
expected error, and while it is below the threshold, the blocks do not run, ``max_skip_steps`` times in a
row at most. The first ``retention_ratio`` of the calls are always computed.  The ratios are the model's and
not the prompt's, so the schedule is the published model's, whatever the weights are.  Ours follows the
published code, each branch of the guidance for itself, on diffusers' pipelines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from t2v_energy.interventions.base import Change, Intervention, Target, Work, WorkClass
from t2v_energy.interventions.call_work import Call, ratios_by_call
from t2v_energy.interventions.stack_work import branches, skipping

if TYPE_CHECKING:
    from t2v_energy.config import Configuration, ModelFile

RATIOS_FILE = "magcache_ratios.json"
BRANCHES = ("cond", "uncond")
"""Order of a step's calls in the published list of ratios."""


@cache
def published() -> Mapping[str, Any]:
    """Published ratios by model and branch, one a step of 50, with their source."""
    path = Path(__file__).with_name(RATIOS_FILE)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def interpolated(ratios: Sequence[float], steps: int) -> list[float]:
    """The nearest published ratio for each of ``steps`` steps, as the published code takes it."""
    if steps == 1:
        return [ratios[-1]]
    scale = (len(ratios) - 1) / (steps - 1)
    return [ratios[round(step * scale)] for step in range(steps)]  # ties go to even, as numpy's do


def skipped_steps(
    ratios: Sequence[float],
    *,
    threshold: float,
    max_skip_steps: int,
    retention_ratio: float,
    branch: str = "cond",
) -> frozenset[int]:
    """Steps (from 0) at which a branch's blocks do not run; ``ratios`` has one of each step.

    The first step is computed whatever the settings: there is nothing to repeat.
    """
    steps, place = len(ratios), BRANCHES.index(branch)
    first_call = int(len(BRANCHES) * steps * retention_ratio)
    skipped = set()
    product, error, in_a_row = 1.0, 0.0, 0
    for step, ratio in enumerate(ratios):
        if step == 0 or len(BRANCHES) * step + place < first_call:
            continue
        product *= ratio
        error += abs(1 - product)
        in_a_row += 1
        if error < threshold and in_a_row <= max_skip_steps:
            skipped.add(step)
        else:
            product, error, in_a_row = 1.0, 0.0, 0
    return frozenset(skipped)


class MagCache(Intervention):
    """The published rule, with the published ratios."""

    kind: ClassVar[str] = "magcache"
    whole_schedule: ClassVar[bool] = True
    call_order: ClassVar[int | None] = 1

    threshold: float = Field(ge=0, description="expected error at which the blocks run again (δ)")
    max_skip_steps: int = Field(ge=1, description="steps that are skipped in a row, at most (K)")
    retention_ratio: float = Field(
        0.2, gt=0, le=1, description="share of the steps that always run, at first"
    )
    exponent: float = Field(
        1.0, gt=0, le=1, description="power of the ratios: 1 as the published code, 0.5 as for its article"
    )
    ratios: str | None = Field(None, description="model whose published ratios are taken; null: its own")

    def check(self, model: ModelFile, configuration: Configuration) -> None:
        """Raise where there are no ratios, or no step would be skipped."""
        self._ratios(model, "cond")
        steps = configuration.num_inference_steps
        if not any(self.schedule(model, steps, branch) for branch in branches(model, configuration)):
            raise self.refused(
                f"no step of {steps} is skipped with threshold {self.threshold:g}, K {self.max_skip_steps}",
                "raise the threshold, or take more steps",
            )

    def apply(self, target: Target) -> Change:
        """Repeat residuals from now on; evidence counts the calls at which the blocks did not run.

        Raises:
            UserError: no ratios for the model; its denoiser has no list of blocks, or one that is cached.
        """
        from t2v_energy.interventions.block_stack import extrapolated

        self._ratios(target.model, "cond")
        return extrapolated(target, lambda steps, branch: self.schedule(target.model, steps, branch), order=0)

    def work_ratios(self, work: Work) -> Mapping[WorkClass, float]:
        """The calls that are left, and the residuals' traffic."""
        return ratios_by_call(work, [self])

    def changed_calls(self, work: Work, calls: Sequence[Call]) -> Sequence[Call]:
        """Blocks run at the schedule's steps alone."""
        return skipping(work, calls, lambda steps, branch: self.schedule(work.model, steps, branch), order=0)

    def schedule(self, model: ModelFile, steps: int, branch: str) -> frozenset[int]:
        """Steps of ``steps`` at which this branch's blocks do not run."""
        return skipped_steps(
            [ratio**self.exponent for ratio in interpolated(self._ratios(model, branch), steps)],
            threshold=self.threshold,
            max_skip_steps=self.max_skip_steps,
            retention_ratio=self.retention_ratio,
            branch=branch,
        )

    def _ratios(self, model: ModelFile, branch: str) -> Sequence[float]:
        if model.architecture != "wan":
            raise self.refused(
                f"there are no published ratios for {model.key}",
                "use taylorseer, or leave it out",
            )
        known = published()["ratios"]
        name = self.ratios or model.key
        if name not in known:
            raise self.refused(
                f"there are no published ratios for {name}",
                f"give `ratios`: {' or '.join(known)}",
            )
        found: Sequence[float] = known[name][branch]
        return found
