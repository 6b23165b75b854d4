"""What skipping the block stack at some steps does to the work.  Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from t2v_energy.work.blocks import Part, stream_bytes

if TYPE_CHECKING:
    from t2v_energy.config import Configuration, ModelFile
    from t2v_energy.interventions.base import Work
    from t2v_energy.interventions.call_work import Call

STREAMED = 3
"""Tensors that an element-wise kernel of two operands moves."""


def branches(model: ModelFile, configuration: Configuration) -> Sequence[str]:
    """Contexts that the pipeline gives its denoiser calls of one step."""
    guided = configuration.guidance_scale > 1
    if model.passes_per_step > 1 and guided:
        return ("cond", "uncond")
    return ("cond_uncond",) if model.batch_per_pass > 1 and guided else ("cond",)


def skipping(
    work: Work, calls: Sequence[Call], schedule: Callable[[int, str], frozenset[int]], order: int
) -> list[Call]:
    """``calls``, when the stack is extrapolated at the schedule's steps.

    A skipped call still embeds its latent and projects it back. Keeping a residual reads and writes three
    tensors as long as the stream, each of its ``order`` differences five more (a difference, a quotient in
    place), and each term of the extrapolation three.
    """
    steps = work.configuration.num_inference_steps
    tensor_bytes = stream_bytes(work.model, work.configuration)
    extrapolating = _moved(STREAMED * (order + 1) * tensor_bytes)
    keeping = _moved((STREAMED + (STREAMED + 2) * order) * tensor_bytes)
    skipped = {branch: schedule(steps, branch) for branch in {call.branch for call in calls}}
    kept = {branch: needed(steps_of, steps, order) for branch, steps_of in skipped.items()}
    found = []
    for call in calls:
        if call.step in skipped[call.branch]:
            call = replace(call, blocks=False).with_added(extrapolating)
        elif call.step in kept[call.branch]:
            call = call.with_added(keeping)
        found.append(call)
    return found


def _moved(traffic_bytes: float) -> Part:
    return Part(0.0, 0.0, traffic_bytes, 0.0)


def needed(skipped: frozenset[int], steps: int, order: int) -> frozenset[int]:
    """The computed steps whose residuals a series of this order is made of: the last ones before each gap."""
    computed = [step for step in range(steps) if step not in skipped]
    return frozenset(
        step for gap in skipped for step in [before for before in computed if before < gap][-(order + 1) :]
    )
