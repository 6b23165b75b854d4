"""The list of claims: config/claims.yaml."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from t2v_energy.config import Positive, Strict, parse, read_yaml
from t2v_energy.errors import UserError
from t2v_energy.study import STUDY_FILE

CLAIMS_FILE = Path("config") / "claims.yaml"
Campaign = Literal["published-h100", "h200", "theory", "study"]
"""Where a recomputation takes its numbers from: the authors' tables, our records, formulas and published
configurations, or the study's other printed numbers."""


class Recomputation(Strict):
    """A registered function and its arguments."""

    campaign: Campaign = Field(description="where the numbers are from")
    function: str = Field(min_length=1, description="name of a registered function")
    arguments: dict[str, Any] = Field({}, alias="with", description="its arguments by name")

    @property
    def text(self) -> str:
        """As claims.csv shows it."""
        given = ", ".join(f"{name}={value}" for name, value in self.arguments.items())
        return f"{self.campaign}: {self.function}({given})"


class Claim(Strict):
    """One printed number."""

    id: str = Field(pattern=r"^[a-z0-9][a-zA-Z0-9_.-]*$", description="unique name of ours")
    place: str = Field(min_length=1, description="section, table or figure of the study")
    statement: str = Field(min_length=1, description="what the number is said to be")
    printed: str = Field(description="as printed, or `from` config/study.yaml")
    unit: str = Field("", description="unit as printed; empty for counts and ratios")
    rounding: Positive | None = Field(
        None, description="step that it is rounded to; default: one of its last digit"
    )
    relation: Literal["equal", "at least", "at most"] = Field("equal", description="what is claimed of it")
    recompute: tuple[Recomputation, ...] = Field((), description="the first whose data is there is used")
    why: str = Field("", description="cause, where it is not reproduced")
    not_obtainable: str = Field("", description="why nothing could give the number")

    @field_validator("printed")
    @classmethod
    def _is_a_number(cls, value: str) -> str:
        try:
            finite = Decimal(value).is_finite()
        except InvalidOperation:
            finite = False
        if not finite:
            raise ValueError("must be a number in quotes, as printed")
        return value

    @model_validator(mode="after")
    def _one_way(self) -> Claim:
        if bool(self.recompute) == bool(self.not_obtainable):
            raise ValueError(f"{self.id}: give either recompute or not_obtainable")
        return self

    @property
    def value(self) -> float:
        """The printed number."""
        return float(self.printed)

    @property
    def step(self) -> float:
        """What it is rounded to, in its unit."""
        exponent = Decimal(self.printed).as_tuple().exponent
        assert isinstance(exponent, int)
        return self.rounding or float(Decimal(1).scaleb(exponent))


class Claims(Strict):
    """The whole of config/claims.yaml."""

    claims: tuple[Claim, ...] = Field(min_length=1, description="in the order of the study")

    @model_validator(mode="after")
    def _unique(self) -> Claims:
        if twice := [name for name, n in Counter(claim.id for claim in self.claims).items() if n > 1]:
            raise ValueError(f"id {twice[0]!r} is there twice")
        return self


def load_claims(root: Path) -> tuple[Claim, ...]:
    """config/claims.yaml, with what it takes from config/study.yaml filled in.

    A claim whose ``printed`` is a list names a place in config/study.yaml: keys, then the index in a pair.

    Raises:
        UserError: a file is missing, not YAML, or has an unknown key, place or value.
    """
    path = root / CLAIMS_FILE
    data = read_yaml(path, "restore it from the repository")
    study = read_yaml(root / STUDY_FILE, "restore it from the repository")
    for entry in data.get("claims") or []:
        if isinstance(entry, dict) and isinstance(entry.get("printed"), list):
            entry["printed"] = _looked_up(study, entry["printed"], f"{path}, {entry.get('id')}")
    return parse(Claims, data, str(path)).claims


def _looked_up(study: Any, keys: list[Any], where: str) -> str:
    """The value at ``keys``, written with the digits that YAML has of it."""
    for key in keys:
        try:
            study = study[key]
        except (KeyError, IndexError, TypeError):
            raise UserError(
                f"printed: config/study.yaml has no {key!r} of {keys!r}", where=where, remedy="mend the place"
            ) from None
    return format(Decimal(repr(study)), "f")
