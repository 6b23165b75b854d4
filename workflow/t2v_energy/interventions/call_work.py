"""The denoiser calls of a schedule, and the work that is left of them.  Needs no torch.

Interventions that depend on the denoising step leave out whole calls, the blocks of a call, or attention in
them.  A call that is not made can have no blocks left out: ratios of each alone do not multiply.  So each
says what becomes of every call (:meth:`t2v_energy.interventions.base.Intervention.changed_calls`), one after
the other, and the work of what is left is added up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from t2v_energy.interventions.stack_work import branches
from t2v_energy.work.blocks import Part, attention_part, outside_blocks, whole_call

if TYPE_CHECKING:
    from t2v_energy.interventions.base import Intervention, Work, WorkClass

NOTHING = Part(0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Call:
    """One call of the denoiser.

    Attributes:
        step: denoising step, from 0.
        branch: context that the pipeline gives it (:class:`t2v_energy.interventions.clock.Clock`).
        samples: share of its batch that is computed.
        blocks: whether its transformer blocks run.
        replayed: attention modules of the blocks whose last output is taken again.
        added: work beside that of the unmodified call, of its whole batch; less work is negative.
    """

    step: int
    branch: str
    samples: float = 1.0
    blocks: bool = True
    replayed: frozenset[str] = frozenset()
    added: Part = NOTHING

    def with_added(self, part: Part) -> Call:
        """The call with further work."""
        return replace(self, added=_sum(self.added, part, 1.0))


def ratios_by_call(work: Work, interventions: Sequence[Intervention]) -> Mapping[WorkClass, float]:
    """Amounts of work with / without all of ``interventions`` (those with a ``call_order``), call by call.

    Exact in FLOP.  Bytes and kernels of a model that was not traced follow the calls whose blocks run.
    """
    model, configuration = work.model, work.configuration
    every = [
        Call(step, branch)
        for step in range(configuration.num_inference_steps)
        for branch in branches(model, configuration)
    ]
    calls: Sequence[Call] = every
    for intervention in sorted(interventions, key=lambda one: one.call_order or 0):
        calls = intervention.changed_calls(work, calls)
    whole, outside = whole_call(model, configuration), outside_blocks(model, configuration)
    modules = {
        name: attention_part(model, configuration, name)
        for name in sorted({n for c in calls for n in c.replayed})
    }
    left = NOTHING
    for call, count in Counter(replace(call, step=0, branch="") for call in calls).items():
        part = whole if call.blocks else outside
        for name in sorted(call.replayed):
            part = _sum(part, modules[name], -1.0)
        part = _sum(part, call.added, 1.0)
        # a smaller batch is as many kernels
        left = _sum(left, replace(part, kernels=part.kernels / call.samples), count * call.samples)
    ratios: dict[WorkClass, float] = {
        "attention": left.attention_flop / (whole.attention_flop * len(every)),
        "dense": left.dense_flop / (whole.dense_flop * len(every)),
    }
    if whole.traffic_bytes:
        ratios["traffic"] = left.traffic_bytes / (whole.traffic_bytes * len(every))
        ratios["call"] = left.kernels / (whole.kernels * len(every))
    else:
        ratios["traffic"] = sum(call.samples * call.blocks for call in calls) / len(every)
        ratios["call"] = sum(call.blocks for call in calls) / len(every)
    return ratios


def _sum(first: Part, second: Part, factor: float) -> Part:
    return Part(
        first.attention_flop + factor * second.attention_flop,
        first.dense_flop + factor * second.dense_flop,
        first.traffic_bytes + factor * second.traffic_bytes,
        first.kernels + factor * second.kernels,
    )
