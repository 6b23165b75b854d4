"""Limits of time that hold on any machine: seconds of the processor, scaled to how fast this one is."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

REFERENCE_S = 0.13
"""What :func:`_sum` takes on the machine on which the tests' limits were set, a server."""


def scaled_s(
    call: Callable[[], Any], enough_s: float, runs: int = 20, clock_s: Callable[[], float] = time.thread_time
) -> float:
    """The least of some runs' seconds of the processor, each by how slow the core was about then.

    What runs beside it, in this machine or in another on the same host, slows a core to a third for moments
    or for a minute.  Ends with the first run below ``enough_s``.

    Args:
        call: what takes the time.
        enough_s: a run that takes less is the last one.
        runs: the most that are tried.
        clock_s: tells the seconds: of this thread, or :func:`children_s`.
    """
    least, before = float("inf"), slower()
    for _ in range(runs):
        took_s, after = _once_s(call, clock_s), slower()
        least, before = min(least, 2 * took_s / (before + after)), after
        if least < enough_s:
            break
    return least


def children_s() -> float:
    """Seconds of the processor of all children that ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def slower() -> float:
    """How many times slower a core of this machine is than the reference; at least 1."""
    return max(1.0, min(_once_s(_sum, time.thread_time) for _ in range(3)) / REFERENCE_S)


def _once_s(call: Callable[[], Any], clock_s: Callable[[], float]) -> float:
    before_s = clock_s()
    call()
    return clock_s() - before_s


def _sum() -> None:
    """One call in C, so that a tracer of coverage costs it nothing."""
    sum(range(10**7))
