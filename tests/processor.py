"""Limits of time that hold on any machine: seconds of the processor, scaled to how fast this one is."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

REFERENCE_S = 0.13
"""What :func:`_sum` takes on the machine on which the tests' limits were set, a server."""


def least_s(call: Callable[[], Any], runs: int = 3) -> float:
    """The least of some runs' seconds of the processor, in this thread: what others use does not count."""
    return min(_once_s(call) for _ in range(runs))


def children_s() -> float:
    """Seconds of the processor of all children that ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def slower() -> float:
    """How many times slower a core of this machine is than the reference; at least 1."""
    return max(1.0, least_s(_sum) / REFERENCE_S)


def _once_s(call: Callable[[], Any]) -> float:
    before_s = time.thread_time()
    call()
    return time.thread_time() - before_s


def _sum() -> None:
    """One call in C, so that a tracer of coverage costs it nothing."""
    sum(range(10**7))
