"""What the meter writes down: the ticks of the energy counter and the samples of the sensors.

Both are columns of equal length on one monotonic clock (CLOCK_MONOTONIC, seconds), as they stand in a raw
record. Any energy can be attributed again from them without a GPU (:mod:`t2v_energy.metering.attribution`).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import islice, pairwise
from operator import gt, le, lt
from typing import Annotated, Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, field_serializer, model_validator

from t2v_energy.errors import UserError

TIME_DECIMALS = 5  # 10 µs: finer than a poll takes
VALUE_DECIMALS = 3  # milliwatts, as NVML gives them
# Ticks kept on either side of a window: attribution looks at the two intervals beyond an edge's own.
MARGIN_TICKS = 3

Seconds = Annotated[float, Field(allow_inf_nan=False)]
Reading = Annotated[float, Field(allow_inf_nan=False)] | None


class MeterError(UserError):
    """The meter cannot read, or what it read does not answer the question.

    ``partial`` holds the ticks and samples of a sampler that failed (see
    :class:`t2v_energy.metering.sampler.Sampler`): nothing read before the failure is lost.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        remedy: str = "",
        partial: tuple[Ticks, Samples] | None = None,
    ) -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.partial = partial

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are pickled by position; ours take keywords.
        keywords = {"where": self.where, "remedy": self.remedy, "partial": self.partial}
        return _meter_error, (self.what, keywords)


def _meter_error(what: str, keywords: dict[str, Any]) -> MeterError:
    return MeterError(what, **keywords)


class Tick(NamedTuple):
    """One change of the counter: it happened after ``not_before_s`` and no later than ``time_s``."""

    time_s: float
    not_before_s: float
    energy_mJ: int


class Sample(NamedTuple):
    """One reading of the sensors; None is what the GPU or its driver does not offer.

    ``power_instant_W`` is the sensor's latest value, ``power_average_W`` the driver's mean of a second.
    """

    time_s: float
    power_instant_W: float | None = None
    power_average_W: float | None = None
    sm_clock_MHz: int | None = None
    temperature_C: int | None = None
    throttle_reasons: int | None = None
    memory_used_MiB: float | None = None


class _Columns(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    time_s: list[Seconds] = []

    def __len__(self) -> int:
        return len(self.time_s)

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        lengths = {name: len(getattr(self, name)) for name in type(self).model_fields}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns differ in length: {lengths}")
        _check_increasing("time_s", self.time_s)
        return self

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[Any]]) -> Self:
        """The columns of ``rows``, whose fields are in the order of the columns."""
        return cls(**{name: [row[i] for row in rows] for i, name in enumerate(cls.model_fields)})

    def _picked(self, first: int, last: int) -> Self:
        picked = {name: getattr(self, name)[first:last] for name in type(self).model_fields}
        return self.model_copy(update=picked)

    def _moved(self, columns: Sequence[str], origin_s: float) -> Self:
        return self.model_copy(update={name: [t - origin_s for t in getattr(self, name)] for name in columns})

    def _window(self, start_s: float, end_s: float, margin: int) -> Self:
        if end_s < start_s:
            raise MeterError(f"the window ends ({end_s} s) before it starts ({start_s} s)")
        first = bisect_left(self.time_s, start_s) - margin
        last = bisect_right(self.time_s, end_s) + margin
        return self._picked(max(first, 0), last)

    def joined(self, later: Self) -> Self:
        """These rows and those of ``later`` that come after them (consecutive drains share a tick)."""
        first = bisect_right(later.time_s, self.time_s[-1]) if self.time_s else 0
        columns = {n: getattr(self, n) + getattr(later, n)[first:] for n in type(self).model_fields}
        return type(self)(**columns)

    @field_serializer("time_s", "not_before_s", check_fields=False)
    def _round_times(self, times: list[float]) -> list[float]:
        return [round(t, TIME_DECIMALS) for t in times]


class Ticks(_Columns):
    """The energy counter, one row each time its value changed.

    ``time_s``: the first poll that saw the new value (when its call had returned);
    ``not_before_s``: the last poll that still saw the old one (before its call began), so that the change
    lies between the two; ``energy_mJ``: the counter, cumulative millijoules.

    Raises ``ValueError`` (pydantic's ``ValidationError``) when the columns differ in length, time does not
    increase, an interval is turned round, or the counter falls (a reset: energies across it are unknown).
    """

    not_before_s: list[Seconds] = []
    energy_mJ: list[Annotated[int, Field(ge=0)]] = []

    @model_validator(mode="after")
    def _check_counter(self) -> Self:
        turned = map(gt, self.not_before_s, self.time_s)
        if any(turned):
            row = list(map(gt, self.not_before_s, self.time_s)).index(True)
            raise ValueError(
                f"row {row}: not_before_s {self.not_before_s[row]} is after time_s {self.time_s[row]}"
            )
        _check_increasing("not_before_s", self.not_before_s)
        if all(map(le, self.energy_mJ, islice(self.energy_mJ, 1, None))):
            return self
        for row, (old, new) in enumerate(pairwise(self.energy_mJ), start=1):
            if new < old:
                raise ValueError(
                    f"row {row}: the energy counter fell from {old} to {new} mJ at {self.time_s[row]} s: "
                    "it was reset (driver reload or GPU reset), and energies across the reset are unknown"
                )
        return self

    def shifted(self, origin_s: float) -> Ticks:
        """The same ticks in seconds after ``origin_s``."""
        return self._moved(("time_s", "not_before_s"), origin_s)

    def between(self, start_s: float, end_s: float, margin: int = MARGIN_TICKS) -> Ticks:
        """The ticks in [start_s, end_s] and ``margin`` more on either side, where there are any.

        With the default margin a window's energy stays what it was, but for its judgement of the ripple,
        which then comes from fewer ticks.
        """
        return self._window(start_s, end_s, margin)


class Samples(_Columns):
    """The sensors, one row a sample; the units are in the names, None where a sensor is missing.

    ``throttle_reasons`` is NVML's bit mask (``nvmlClocksEventReason…``). Raises ``ValueError`` as
    :class:`Ticks` does.
    """

    power_instant_W: list[Reading] = []
    power_average_W: list[Reading] = []
    sm_clock_MHz: list[int | None] = []
    temperature_C: list[int | None] = []
    throttle_reasons: list[int | None] = []
    memory_used_MiB: list[Reading] = []

    @field_serializer("power_instant_W", "power_average_W", "memory_used_MiB")
    def _round_values(self, values: list[float | None]) -> list[float | None]:
        return [None if value is None else round(value, VALUE_DECIMALS) for value in values]

    def shifted(self, origin_s: float) -> Samples:
        """The same samples in seconds after ``origin_s``."""
        return self._moved(("time_s",), origin_s)

    def between(self, start_s: float, end_s: float, margin: int = 1) -> Samples:
        """The samples in [start_s, end_s] and ``margin`` more on either side, where there are any."""
        return self._window(start_s, end_s, margin)


def _check_increasing(name: str, values: Sequence[float]) -> None:
    if all(map(lt, values, islice(values, 1, None))):  # as a whole first: records have thousands of rows
        return
    for row, (earlier, later) in enumerate(pairwise(values), start=1):
        if not later > earlier:
            raise ValueError(f"row {row}: {name} does not increase ({earlier} s, then {later} s)")
