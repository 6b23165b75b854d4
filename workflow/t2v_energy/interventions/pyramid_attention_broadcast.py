"""Pyramid attention broadcast: in the middle of the schedule, attention's outputs are used again.

The rule of Zhao et al. (arXiv 2408.12588), as diffusers has it: within a range of timesteps, attention is
computed at every N-th step, and at the others the module's last output is replayed; norms, gates and the
feed-forward network always run.  diffusers keeps one output a module, whatever the branch, so that on Wan,
whose branches are calls of their own, the conditional branch's attention is replayed in the unconditional
one and no step is skipped.  Ours keeps one a module and branch: with Wan2.1-1.3B at 720p and 81 frames 14
GB for self-attention.  A block that is compiled as one graph cannot have it: the choice is made in Python.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from t2v_energy.interventions.base import Change, Intervention, Target, Work, WorkClass
from t2v_energy.interventions.call_work import Call, ratios_by_call
from t2v_energy.interventions.clock import Clock, replaced
from t2v_energy.interventions.timesteps import timesteps

if TYPE_CHECKING:
    from t2v_energy.config import Configuration, ModelFile

MODULES = {"wan": ("attn1", "attn2"), "cogvideox": ("attn1",)}
"""Attention modules of a block, self-attention first."""
Range = tuple[float, float]


def replays(step: int, timestep: float, skip_range: int, between: Range) -> bool:
    """Whether a module's attention is replayed at this step."""
    return step % skip_range != 0 and between[0] < timestep < between[1]


class PyramidAttentionBroadcast(Intervention):
    """Outputs of attention modules are replayed, each branch of the guidance for itself."""

    kind: ClassVar[str] = "pyramid-attention-broadcast"
    whole_schedule: ClassVar[bool] = True
    call_order: ClassVar[int | None] = 2
    not_after: ClassVar[Mapping[str, str]] = {
        "compile": "a block that is compiled as one graph cannot choose in Python what is replayed"
    }

    self_range: int = Field(2, ge=1, description="self-attention runs once in so many steps; 1: at each")
    cross_range: int = Field(1, ge=1, description="the same of cross-attention")
    timesteps: Range = Field((100, 800), description="replays only between these two (exclusive)")

    def check(self, model: ModelFile, configuration: Configuration) -> None:
        """Raise where no attention would be replayed."""
        if not any(self._shares(model, configuration.num_inference_steps).values()):
            raise self.refused(
                f"nothing is replayed in {configuration.num_inference_steps} steps", "widen `timesteps`"
            )

    def apply(self, target: Target) -> Change:
        """Replay from now on; evidence counts the calls of attention modules that were replayed.

        Raises:
            UserError: a model whose blocks' attention modules are not known.
        """
        from t2v_energy.interventions.block_stack import blocks_of

        ranges = self._ranges(target.model)
        broadcast = _Broadcast(target)
        for name, skip_range in ranges.items():
            rule = functools.partial(replays, skip_range=skip_range, between=self.timesteps)
            for block in blocks_of(target.denoiser):
                broadcast.attach(getattr(block, name), rule)
        return Change(broadcast.undo, lambda: {"replayed_attention_calls": broadcast.replayed})

    def work_ratios(self, work: Work) -> Mapping[WorkClass, float]:
        """What the replayed modules would have done is left out: products, projections, norms, rotation."""
        return ratios_by_call(work, [self])

    def changed_calls(self, work: Work, calls: Sequence[Call]) -> Sequence[Call]:
        """Modules are replayed where blocks run and the last call in which they did kept an output."""
        steps = work.configuration.num_inference_steps
        moments, ranges = timesteps(work.model, steps), self._ranges(work.model)
        kept: dict[str, frozenset[str]] = {}
        found = []
        for call in calls:
            if call.blocks:
                replayed = kept.get(call.branch, frozenset()) & self._replayed_at(ranges, moments, call.step)
                kept[call.branch] = self._replayed_at(ranges, moments, call.step + 1)
                call = replace(call, replayed=call.replayed | replayed)
            found.append(call)
        return found

    def _replayed_at(self, ranges: Mapping[str, int], moments: Sequence[float], step: int) -> frozenset[str]:
        """Modules whose turn it is; none after the last step."""
        if step >= len(moments):
            return frozenset()
        return frozenset(
            n for n, every in ranges.items() if replays(step, moments[step], every, self.timesteps)
        )

    def _ranges(self, model: ModelFile) -> dict[str, int]:
        """Ranges above 1 by module."""
        if model.architecture not in MODULES:
            raise self.refused(f"it is not made for {model.key}", "leave it out for this model")
        modules = MODULES[model.architecture]
        if self.cross_range > 1 and len(modules) < 2:
            raise self.refused(f"{model.key} has no cross-attention", "leave `cross_range` out")
        ranges = dict(zip(modules, (self.self_range, self.cross_range), strict=False))
        return {name: skip_range for name, skip_range in ranges.items() if skip_range > 1}

    def _shares(self, model: ModelFile, steps: int) -> dict[str, float]:
        """Share of the steps at which a module is replayed."""
        ranges, moments = self._ranges(model), list(enumerate(timesteps(model, steps)))
        return {
            name: sum(replays(step, t, skip_range, self.timesteps) for step, t in moments) / steps
            for name, skip_range in ranges.items()
        }


class _Broadcast:
    """Attention modules with a memory of one output a branch."""

    def __init__(self, target: Target) -> None:
        self.replayed = 0
        self._memories: list[dict[str, Any]] = []
        self._restore: list[Callable[[], None]] = []
        self._clock = clock = Clock(
            target, begun=self._forget, stepped=lambda: self._forget() if clock.over else None
        )

    def attach(self, module: Any, replays_at: Callable[[int, float], bool]) -> None:
        """Give ``module`` its memory."""
        import torch

        from t2v_energy.interventions.block_stack import matching

        memory: dict[str, Any] = {}
        clock, original = self._clock, module.forward

        @torch.compiler.disable
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            branch = clock.branch
            stream = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            if branch in memory and replays_at(clock.step, clock.timesteps[clock.step]):
                self.replayed += 1
                output = memory[branch]
            else:
                output = original(*args, **kwargs)
            later = clock.step + 1
            if later < clock.steps and replays_at(later, clock.timesteps[later]):
                memory[branch] = output
            else:
                memory.pop(branch, None)
            if isinstance(output, tuple):
                return tuple(matching(part, stream) for part in output)
            return matching(output, stream)

        self._memories.append(memory)
        self._restore.append(replaced(module, "forward", forward))

    def undo(self) -> None:
        """Modules as before."""
        while self._restore:
            self._restore.pop()()
        self._clock.stop()
        self._forget()

    def _forget(self) -> None:
        for memory in self._memories:
            memory.clear()
