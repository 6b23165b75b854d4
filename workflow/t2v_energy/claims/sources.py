"""What recomputations take their numbers from, and how they are registered."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from t2v_energy.analysis.theory import Theory, read_theory
from t2v_energy.claims.listing import Campaign, Claim, Recomputation
from t2v_energy.errors import UserError
from t2v_energy.published.tables import read_cross_model, read_sweeps
from t2v_energy.published.videos import videos
from t2v_energy.study import Study, load_study

NO_CROSS_MODEL = "needs the authors' cross-model table (--config published_cross_model=FILE)"


class DataAbsent(Exception):
    """The numbers that a recomputation needs are not here; the message says which, and how to give them."""


@dataclass(frozen=True)
class Recomputed:
    """What a recomputation found.

    Attributes:
        value: in the claim's unit.
        note: what it was computed from, in a few words, with the numbers that explain it.
        half_width: how far the value is uncertain either way, from an interval or from the rounding of the
            printed numbers that it was computed from.
    """

    value: float
    note: str
    half_width: float = 0.0


@dataclass(frozen=True)
class Sources:
    """Everything that recomputations read.

    Attributes:
        root: the repository.
        study: what it prints of its models.
        theory: formulas, as printed and true.
        claims: printed value and step by the claim's id, for numbers that are held against each other.
        tables: folder of our campaign's tables.
        cross_model, sweeps: the authors' rows (:func:`t2v_energy.published.videos.videos`); None where their
            files were not given.
        rows: the cross-model file as it is; None as above.
    """

    root: Path
    study: Study
    theory: Theory
    claims: Mapping[str, tuple[float, float]]
    tables: Path
    cross_model: pd.DataFrame | None = None
    sweeps: pd.DataFrame | None = None
    rows: pd.DataFrame | None = None

    def model_videos(self, model: str) -> pd.DataFrame:
        """The authors' rows of one model."""
        found = self.all_videos
        found = found[found["model"] == model]
        if found.empty:
            raise DataAbsent(f"the authors' cross-model table that was given has no row of {model}")
        return found

    @property
    def all_videos(self) -> pd.DataFrame:
        """The authors' rows of every model."""
        if self.cross_model is None:
            raise DataAbsent(NO_CROSS_MODEL)
        return self.cross_model

    @property
    def published_rows(self) -> pd.DataFrame:
        """The authors' cross-model table with its own names."""
        if self.rows is None:
            raise DataAbsent(NO_CROSS_MODEL)
        return self.rows

    def sweep(self, experiment: str) -> pd.DataFrame:
        """The authors' rows of one sweep."""
        if self.sweeps is None:
            raise DataAbsent("needs the authors' table of sweeps (--config published_sweeps=FILE)")
        found = self.sweeps[self.sweeps["experiment"] == experiment]
        if found.empty:
            raise DataAbsent(f"the authors' table of sweeps that was given has no row over {experiment}")
        return found

    def table(self, name: str) -> pd.DataFrame:
        """A table of our campaign."""
        path = self.tables / f"{name}.csv"
        if not path.is_file():
            raise DataAbsent(f"needs {path.name} of our own campaign, which this build does not have")
        return pd.read_csv(path)


def read_sources(
    root: Path,
    claims: tuple[Claim, ...],
    tables: Path,
    cross_model: Path | None = None,
    sweeps: Path | None = None,
) -> Sources:
    """All sources; the authors' files where they are given.

    Raises:
        UserError: a file that is given cannot be read as what it should be.
    """
    rows = read_cross_model(cross_model) if cross_model else None
    swept = read_sweeps(sweeps) if sweeps else None
    return Sources(
        root=root,
        study=load_study(root),
        theory=read_theory(root),
        claims={claim.id: (claim.value, claim.step) for claim in claims},
        tables=tables,
        cross_model=None if rows is None else videos(rows, root, str(cross_model)),
        sweeps=None if swept is None else videos(swept, root, str(sweeps)),
        rows=rows,
    )


# --- the registry -------------------------------------------------------------------------------------------

Function = Callable[..., Recomputed]
_FUNCTIONS: dict[str, tuple[Campaign, Function]] = {}


def recomputes(campaign: Campaign) -> Callable[[Function], Function]:
    """Registers a function (sources, then arguments by name) under its own name."""

    def register(function: Function) -> Function:
        if function.__name__ in _FUNCTIONS:
            raise ValueError(f"{function.__name__} is registered twice")
        _FUNCTIONS[function.__name__] = (campaign, function)
        return function

    return register


def functions() -> dict[str, tuple[Campaign, Function]]:
    """Campaign and function by name."""
    return dict(_FUNCTIONS)


def bound(step: Recomputation, where: str) -> Callable[[Sources], Recomputed]:
    """The function of a recomputation with its arguments.

    Raises:
        UserError: no such function, of another campaign, or arguments that it does not take.
    """
    if step.function not in _FUNCTIONS:
        raise UserError(
            f"function: there is no {step.function!r}", where=where, remedy=f"known: {', '.join(_FUNCTIONS)}"
        )
    campaign, function = _FUNCTIONS[step.function]
    if campaign != step.campaign:
        raise UserError(
            f"campaign: {step.function} computes from {campaign!r}, not {step.campaign!r}",
            where=where,
            remedy=f"write campaign: {campaign}",
        )
    arguments: dict[str, Any] = step.arguments
    try:
        inspect.signature(function).bind(None, **arguments)
    except TypeError as error:
        raise UserError(f"with: {step.function} {error}", where=where, remedy="mend the arguments") from None
    return lambda sources: function(sources, **arguments)
