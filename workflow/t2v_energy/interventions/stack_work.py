"""What skipping the block stack at some steps does to the work.  Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from t2v_energy.interventions.base import Work, WorkClass
from t2v_energy.work.blocks import outside_blocks, stream_bytes, whole_call

if TYPE_CHECKING:
    from t2v_energy.config import Configuration, ModelFile

STREAMED = 3
"""Tensors that an element-wise kernel of two operands moves."""


def branches(model: ModelFile, configuration: Configuration) -> Sequence[str]:
    """Contexts that the pipeline gives its denoiser calls of one step."""
    guided = configuration.guidance_scale > 1
    if model.passes_per_step > 1 and guided:
        return ("cond", "uncond")
    return ("cond_uncond",) if model.batch_per_pass > 1 and guided else ("cond",)


def skipping_ratios(
    work: Work, schedule: Callable[[int, str], frozenset[int]], order: int
) -> Mapping[WorkClass, float]:
    """Amounts with / without, when the stack is extrapolated at the schedule's steps.

    A skipped call still embeds its latent and projects it back. Keeping a residual reads and writes three
    tensors as long as the stream, each of its ``order`` differences five more (a difference, a quotient in
    place), and each term of the extrapolation three.
    """
    model, configuration = work.model, work.configuration
    steps, names = configuration.num_inference_steps, branches(model, configuration)
    skipped = sum(len(schedule(steps, name)) for name in names) / (steps * len(names))
    kept = sum(len(needed(schedule(steps, name), steps, order)) for name in names) / (steps * len(names))
    call, outside = whole_call(model, configuration), outside_blocks(model, configuration)
    ratios: dict[WorkClass, float] = {
        "attention": 1 - skipped,
        "dense": 1 - skipped * (1 - outside.dense_flop / call.dense_flop),
    }
    if call.traffic_bytes:
        tensors = skipped * STREAMED * (order + 1) + kept * (STREAMED + (STREAMED + 2) * order)
        added = tensors * stream_bytes(model, configuration) / call.traffic_bytes
        ratios["traffic"] = 1 - skipped * (1 - outside.traffic_bytes / call.traffic_bytes) + added
        ratios["call"] = 1 - skipped * (1 - outside.kernels / call.kernels)
    else:
        ratios["traffic"] = ratios["call"] = 1 - skipped
    return ratios


def needed(skipped: frozenset[int], steps: int, order: int) -> frozenset[int]:
    """The computed steps whose residuals a series of this order is made of: the last ones before each gap."""
    computed = [step for step in range(steps) if step not in skipped]
    return frozenset(
        step for gap in skipped for step in [before for before in computed if before < gap][-(order + 1) :]
    )
