"""The raw record of one series of single operators (experiment ``operators``).

As in :mod:`t2v_energy.measurement.record`, times are seconds after ``origin`` on one monotonic clock and
energies are as the counter gave them, so that every rate and power can be computed again without a GPU.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, model_validator

from t2v_energy.measurement.record import Environment, Filed, Origin, Part, check_lengths
from t2v_energy.metering.series import Samples, Ticks
from t2v_energy.operator_suite import Series

CaseStatus = Literal["ok", "out_of_memory", "unavailable"]
EXPERIMENT: Final = "operators"


class Outcome(Part):
    """What became of one case: whether it ran, with which attention kernels, and its first call (s).

    The first call of a size includes what is done once for it, such as the choice of an algorithm.
    """

    status: CaseStatus
    error: str | None = None
    attention_kernels: list[str] = Field([])
    first_call_s: float | None = None


class Visits(Part):
    """Runs of one case's call without a pause: which case and round, how many calls, from when to when.

    ``device_ms`` is the time of all its calls on the device's own clock (milliseconds, from the first call's
    start to the last one's end; without a GPU that of the host).
    """

    case: list[int]
    round: list[int]
    iterations: list[int]
    start_s: list[float]
    end_s: list[float]
    device_ms: list[float]

    @model_validator(mode="after")
    def _same_length(self) -> Visits:
        check_lengths(self)
        return self

    def __len__(self) -> int:
        return len(self.case)


class OperatorRecord(Filed):
    """One series, whole. ``outcomes`` are those of ``series.cases``, in the same order."""

    schema_version: Literal[1] = 1
    campaign: str
    experiment: Literal["operators"] = EXPERIMENT
    series: Series
    rounds: int
    visit_s: float
    loop_s: float
    settle_s: float
    seed: int
    pass_index: Annotated[int, Field(ge=1)] = 1
    flags: list[str] = Field([])
    origin: Origin
    environment: Environment
    outcomes: list[Outcome]
    visits: Visits
    ticks: Ticks | None = None
    samples: Samples | None = None

    @model_validator(mode="after")
    def _cases_are_there(self) -> OperatorRecord:
        cases = len(self.series.cases)
        if len(self.outcomes) != cases:
            raise ValueError(f"{len(self.outcomes)} outcomes of {cases} cases")
        if any(not 0 <= case < cases for case in self.visits.case):
            raise ValueError("a visit is of no case")
        return self

    @property
    def file_name(self) -> str:
        """Name of the record's file in its experiment's folder."""
        return operator_record_name(self.series.key, self.pass_index)


def operator_record_name(series: str, pass_index: int = 1) -> str:
    """``<series>__operators_r<pass>.json``."""
    return f"{series}__operators_r{pass_index}.json"


def is_operator_record(path: Path) -> bool:
    """Whether a file is, by its name, a record of a series."""
    return re.search(r"__operators_r\d+\.json$", path.name) is not None
