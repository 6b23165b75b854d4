"""What the user sees while a batch is measured.

Lines appear between generations only: a display that refreshed by itself would take the interpreter from
the thread that launches kernels, and small configurations would be measured slower than they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, TextIO

from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table

from t2v_energy.plan import Batch, Item


class Progress:
    """Progress of one batch: done, predicted time left, watts now."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream, stderr=stream is None, soft_wrap=True, markup=False)
        self._pending: list[Item] = []
        self._done_s = 0.0
        self._ratios: list[float] = []  # measured over predicted seconds, of what is done
        self._started_s = time.monotonic()
        self.watts: Callable[[], float | None] = lambda: None

    def say(self, text: str) -> None:
        """One plain line."""
        self._console.print(text, highlight=False)

    def begin(self, batch: Batch, pending: list[Item]) -> None:
        """What the batch holds and what of it is left to measure."""
        self._pending = list(pending)
        kept = len(batch.items) - len(pending)
        self.say(
            f"batch {batch.experiment}/{batch.name}: {len(batch.items)} configurations, "
            f"{kept} already measured; about {self._left_s():.0f} s to go (modelled)"
        )

    def started(self, item: Item) -> None:
        """A configuration begins."""
        self._started_s = time.monotonic()
        self.say(f"{item.configuration_id} ({item.protocol}, about {self.expected_s(item):.0f} s)")

    def generation(self, item: Item, text: str) -> None:
        """A generation is done."""
        measured_s = time.monotonic() - self._started_s
        left_s = max(self._left_s() - measured_s, 0.0)
        watts = self.watts()
        now = f", {watts:.0f} W now" if watts is not None else ""
        self._bar(f"  {text}; {measured_s:.0f} s measured, about {left_s:.0f} s left{now}", measured_s)

    def expected_s(self, item: Item) -> float:
        """How long ``item`` should take, by the prediction and how far it has been off so far.

        The median of that: one configuration that compiles for minutes says nothing of the others.
        """
        return item.measure_s * self._scale

    @property
    def _scale(self) -> float:
        return median(self._ratios) if self._ratios else 1.0

    def left_out(self, item: Item) -> None:
        """A configuration is not begun: it would not end in the time that is given."""
        self._pending.remove(item)
        self.say(f"{item.configuration_id} ({item.protocol}): left for another time")

    def finished(self, item: Item, record: Any, findings: list[Any]) -> None:
        """A record is on the disk."""
        measured_s = time.monotonic() - self._started_s
        self._done_s += measured_s
        self._pending.remove(item)
        self._ratios.append(measured_s / item.measure_s)
        self.say(f"  → {record.status}, {measured_s:.0f} s, {record.file_name}")
        for finding in findings:
            if finding.level != "ok":
                self.say(f"  ! {finding.level}: {finding.rule}: {finding.detail}")

    def _left_s(self) -> float:
        return sum(item.measure_s for item in self._pending) * self._scale

    def _bar(self, text: str, measured_s: float) -> None:
        if not self._console.is_terminal:  # a log file
            self.say(text)
            return
        done_s = self._done_s + measured_s
        row = Table.grid(padding=(0, 1))
        row.add_row(
            ProgressBar(total=max(done_s + self._left_s() - measured_s, 1.0), completed=done_s, width=24),
            text,
        )
        self._console.print(row)
