"""The same work on many records, by several processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

WORTH_A_PROCESS = 3
"""Portions of fifty or a hundred records, which take a second or less each."""
P = TypeVar("P")
R = TypeVar("R")


def mapped(work: Callable[[P], R], portions: Sequence[P], processes: int, stack: ExitStack) -> Iterator[R]:
    """``work`` of each portion, in their order, by at most so many processes, which end with ``stack``.

    Few portions, or one process, are worked on by this one: starting others takes seconds.
    """
    count = min(processes, len(portions) // WORTH_A_PROCESS)
    if count < 2:
        return map(work, portions)
    # Not forked: this process may have threads, such as pyarrow's.
    pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))
    stack.callback(pool.shutdown, cancel_futures=True)
    return pool.map(work, portions)
