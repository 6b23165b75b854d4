"""Limits of time that hold on any machine: seconds of the processor, scaled to how fast this one is."""

from __future__ import annotations

import resource
import statistics
import threading
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


class Slowness:
    """How many times slower a core is than the reference while the body runs, by a look every few seconds."""

    def __init__(self, every_s: float = 5) -> None:
        self._every_s, self._ended = every_s, threading.Event()
        self._found: list[float] = []
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Slowness:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def mean(self) -> float:
        """Of all looks so far."""
        return statistics.fmean(self._found)

    def _look(self) -> None:
        while not self._ended.is_set():
            self._found.append(slower())
            self._ended.wait(self._every_s)


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
