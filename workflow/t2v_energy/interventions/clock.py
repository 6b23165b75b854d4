"""Where a generation is: denoising step, of how many, and branch of the guidance.  Needs no torch.

The pipeline's own calls tell: ``scheduler.set_timesteps`` begins a generation, ``scheduler.step`` ends a
step, and ``cache_context`` of the denoiser names the branch.  Nothing is read from the GPU, so nothing
waits for it. A generation that was given up in the middle leaves no trace: the next one begins anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from t2v_energy.interventions.base import Target


def replaced(owner: Any, name: str, new: Any) -> Callable[[], None]:
    """Set attribute ``name`` of an object; returns what puts the former state back."""
    had_own = name in vars(owner)
    former = getattr(owner, name)
    setattr(owner, name, new)

    def restore() -> None:
        if had_own:
            setattr(owner, name, former)
        else:
            delattr(owner, name)

    return restore


class Clock:
    """Follows the generations of one pipeline until :meth:`stop`.

    Attributes:
        step: denoising step that runs, from 0.
        steps: steps of the schedule; 0 before the first generation.
        branch: name of the context that the pipeline gives its denoiser calls: ``cond``, ``uncond``, or
            ``cond_uncond`` where both are one batch; empty between them.
        branches: those of the step so far.
    """

    def __init__(
        self,
        target: Target,
        *,
        begun: Callable[[], None] = lambda: None,
        stepped: Callable[[], None] = lambda: None,
    ) -> None:
        """``begun`` is called when a generation has its schedule, ``stepped`` when a step is over."""
        self.step = self.steps = 0
        self.branch = ""
        self.branches: set[str] = set()
        self._begun, self._stepped = begun, stepped
        self._scheduler = scheduler = target.pipeline.scheduler
        self._timesteps: list[float] | None = None
        self._restore = [
            replaced(scheduler, "set_timesteps", _followed(scheduler.set_timesteps, self._begin)),
            replaced(scheduler, "step", _followed(scheduler.step, self._end_step)),
            replaced(target.denoiser, "cache_context", self._named(target.denoiser.cache_context)),
        ]

    @property
    def timesteps(self) -> list[float]:
        """The scheduler's timesteps, one a step, read from the GPU once a generation."""
        if self._timesteps is None:
            self._timesteps = self._scheduler.timesteps.tolist()
        return self._timesteps

    @property
    def over(self) -> bool:
        """Whether the last step of the schedule has ended."""
        return self.step >= self.steps

    def stop(self) -> None:
        """Follow no more: the pipeline's calls are as before."""
        while self._restore:
            self._restore.pop()()

    def _begin(self) -> None:
        self.step, self.steps = 0, len(self._scheduler.timesteps)
        self._timesteps = None
        self.branches.clear()
        self._begun()

    def _end_step(self) -> None:
        self.step += 1
        self._stepped()
        self.branches.clear()

    def _named(self, original: Any) -> Any:
        @functools.wraps(original)
        @contextmanager
        def cache_context(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
            self.branch = name
            self.branches.add(name)
            try:
                with original(name, *args, **kwargs):
                    yield
            finally:
                self.branch = ""

        return cache_context


def _followed(original: Any, then: Callable[[], None]) -> Any:
    """``original``, with ``then`` after each call; the pipelines look at its signature, which stays."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        then()
        return result

    return call
