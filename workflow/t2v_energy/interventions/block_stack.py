"""One module in the place of all transformer blocks, which runs them, or extrapolates what they would add.

The denoiser sees a list of one block.  What the stack adds to the video's tokens, its residual, is kept of
the computed steps, each branch of the guidance for itself, and continued as a Taylor series in the step:
order 0 repeats the last residual, order 1 goes on along the last difference.  The blocks themselves are not
touched: compiled, quantised or otherwise changed ones go on working.  Text that runs through the stack
beside the video is given back as it came, since CogVideoX and its like drop it after the last block.  Needs
torch.
"""

from __future__ import annotations

from collections.abc import Callable
from math import factorial
from typing import Any

import torch

from t2v_energy.errors import UserError
from t2v_energy.interventions.base import Change, Target
from t2v_energy.interventions.clock import Clock
from t2v_energy.interventions.stack_work import needed

Schedule = Callable[[int, str], frozenset[int]]
"""From the number of steps and the branch to the steps (from 0) at which the stack does not run."""
LISTS = ("blocks", "transformer_blocks")
"""What diffusers' transformers call their list of blocks."""
STREAMS = ("hidden_states", "encoder_hidden_states")
"""What blocks take and give back, in this order."""


def list_name(denoiser: Any) -> str:
    """Name of the attribute with the denoiser's blocks.

    Raises:
        UserError: it has no such list.
    """
    for name in LISTS:
        if isinstance(getattr(denoiser, name, None), torch.nn.ModuleList):
            return name
    raise UserError(
        f"{type(denoiser).__name__} has no list of transformer blocks",
        where="interventions",
        remedy="leave it out for this model",
    )


def blocks_of(denoiser: Any) -> torch.nn.ModuleList:
    """The denoiser's transformer blocks, whether or not a :class:`BlockStack` stands in for them."""
    blocks: torch.nn.ModuleList = getattr(denoiser, list_name(denoiser))
    return blocks[0].blocks if len(blocks) == 1 and isinstance(blocks[0], BlockStack) else blocks


def matching(kept: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``kept``, or the part of it for the samples of ``values``.

    A batch of two may have become one of the conditional sample alone, which is the second.
    """
    return kept if len(kept) == len(values) else kept[-len(values) :]


class Series:
    """A tensor's values at past steps, and their continuation.

    Factors are divided differences: the value, then (this − the last one) / steps between them, and so on;
    the series is Σ factorᵢ · (steps since)ⁱ / i!, as in TaylorSeer (arXiv 2503.06923, section 3) but with
    the real distances.  While fewer values than ``order`` + 1 are known, the order is lower.
    """

    def __init__(self, order: int) -> None:
        self._order = order
        self._step = 0
        self._factors: list[torch.Tensor] = []

    @property
    def known(self) -> bool:
        """Whether there is a value to go on from."""
        return bool(self._factors)

    def add(self, step: int, value: torch.Tensor) -> None:
        """The value at ``step``, which is later than all before."""
        factors = [value]
        for former in self._factors[: self._order]:
            factors.append((factors[-1] - matching(former, value)).div_(step - self._step))
        self._step, self._factors = step, factors

    def added_to(self, base: torch.Tensor, step: int) -> torch.Tensor:
        """``base`` plus the series' value at ``step``."""
        for power, factor in enumerate(self._factors):
            weight = (step - self._step) ** power / factorial(power)
            base = torch.add(base, matching(factor, base), alpha=weight)
        return base


class _Branch:
    """What the stack keeps of one branch of the guidance during a generation."""

    def __init__(self, skipped: frozenset[int], steps: int, order: int) -> None:
        self.skipped = skipped
        self.kept = needed(skipped, steps, order)
        self.residual = Series(order)


class BlockStack(torch.nn.Module):
    """All blocks of a denoiser as one; ``skipped`` counts the calls at which they did not run."""

    def __init__(self, blocks: torch.nn.ModuleList, schedule: Schedule, order: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.training = blocks.training
        self.skipped = 0
        self._schedule, self._order = schedule, order
        self._clock: Clock | None = None
        self._branches: dict[str, _Branch] = {}
        self._gives_text = False

    def follow(self, target: Target) -> Clock:
        """Follow the target's generations, and forget each when it is over or another one begins."""
        self._clock = clock = Clock(
            target, begun=self.forget, stepped=lambda: self.forget() if clock.over else None
        )
        return clock

    def forget(self) -> None:
        """Drop what is kept of a generation."""
        self._branches.clear()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the blocks, called one after the other, would answer."""
        step, branch = self._moment()
        before, text = (kwargs[name] if name in kwargs else args[i] for i, name in enumerate(STREAMS))
        if step in branch.skipped and branch.residual.known:
            self.skipped += 1
            after = branch.residual.added_to(before, step)
            return (after, text) if self._gives_text else after
        output = self._run(args, kwargs)
        self._gives_text = isinstance(output, tuple)
        if step in branch.kept:
            branch.residual.add(step, (output[0] if self._gives_text else output) - before)
        return output

    def _moment(self) -> tuple[int, _Branch]:
        clock = self._clock
        if clock is None:
            raise RuntimeError("the stack follows no pipeline")
        if clock.branch not in self._branches:
            skipped = self._schedule(clock.steps, clock.branch)
            self._branches[clock.branch] = _Branch(skipped, clock.steps, self._order)
        return clock.step, self._branches[clock.branch]

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Each block gets the streams of the one before, in the way that the denoiser passes them."""
        output: Any = None
        for block in self.blocks:
            output = block(*args, **kwargs)
            for index, value in enumerate(output if isinstance(output, tuple) else (output,)):
                if STREAMS[index] in kwargs:
                    kwargs = {**kwargs, STREAMS[index]: value}
                else:
                    args = (*args[:index], value, *args[index + 1 :])
        return output


def extrapolated(target: Target, schedule: Schedule, order: int) -> Change:
    """Put a stack in the place of the target's blocks.

    Raises:
        UserError: there is one already, or the denoiser has no list of blocks.
    """
    denoiser = target.denoiser
    name = list_name(denoiser)
    blocks = getattr(denoiser, name)
    if any(isinstance(block, BlockStack) for block in blocks):
        raise UserError(
            "the transformer blocks are cached already",
            where="interventions",
            remedy="list one of magcache and taylorseer",
        )
    stack = BlockStack(blocks, schedule, order)
    clock = stack.follow(target)
    alone = torch.nn.ModuleList([stack])
    alone.training = blocks.training
    setattr(denoiser, name, alone)

    def undo() -> None:
        setattr(denoiser, name, blocks)
        clock.stop()
        stack.forget()

    return Change(
        undo,
        lambda: {"skipped_stack_calls": stack.skipped, "skipped_block_calls": stack.skipped * len(blocks)},
    )
