"""Numbers of the paper's text: each with its unit, interval and kind, and where it comes from.

A notebook writes its part, ``results/numbers/<campaign>/<part>.json``; :func:`merge` makes
``results/numbers/<campaign>.json`` of all parts, which is the only place that paper/paper.typ takes numbers
from. Files have sorted keys and rounded values, so the same numbers are the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import floor, isfinite, log10
from pathlib import Path
from typing import Any, Literal, get_args

from t2v_energy.errors import UserError

Kind = Literal["measured", "modelled", "constant"]
PARTS = frozenset({"value", "unit", "kind", "source"})
"""What every number has in a file."""
SIGNIFICANT = 7  # of stored values: more than any of our instruments resolves


@dataclass(frozen=True)
class Source:
    """Where a number comes from: a file (or a cited work), the row or rows in it, and the column."""

    file: str
    row: str
    column: str


@dataclass(frozen=True)
class Number:
    """One number (or name) of the text.

    Attributes:
        value: in ``unit``; a string for names such as the GPU's.
        unit: as it is to be printed; empty for counts, ratios and names.
        kind: ``measured``, ``modelled`` (computed by a formula or a fit), or ``constant`` (set, printed
            by others, or a name).
        source: where it comes from.
        interval: low and high end of the 95 % interval in ``unit``; None where there is none.
        digits: decimals to print.

    Raises:
        UserError: the value or an end of its interval is not finite, or the interval misses the value.
    """

    value: float | int | str
    unit: str
    kind: Kind
    source: Source
    interval: tuple[float, float] | None = None
    digits: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(
                f"unknown kind {self.kind!r}", where=str(self.source), remedy=f"use one of {get_args(Kind)}"
            )
        ends = self.interval or ()
        if isinstance(self.value, str):
            return
        if not all(isfinite(x) for x in (self.value, *ends)):
            raise UserError(
                f"the number {self.value!r} with interval {self.interval!r} is not finite",
                where=str(self.source),
                remedy="leave the number out where the campaign cannot give it",
            )
        if ends and not ends[0] <= self.value <= ends[1]:
            raise UserError(
                f"the interval {self.interval!r} misses the value {self.value!r}", where=str(self.source)
            )


def decimals(value: float, significant: int = 3) -> int:
    """Decimals that show ``value`` with ``significant`` significant digits; never negative."""
    if value == 0 or not isfinite(value):
        return 0
    return max(0, significant - 1 - floor(log10(abs(value))))


def with_half_width(
    value: float, half_width: float, unit: str, kind: Kind, source: Source, *, significant: int = 5
) -> Number:
    """A number with a symmetric interval (``half_width`` in ``unit``; NaN where it is unknown).

    Decimals show two digits of the half-width, but never more than ``significant`` digits of the value.
    """
    if not isfinite(half_width):
        return Number(value, unit, kind, source, None, decimals(value))
    digits = min(decimals(half_width, 2), decimals(value, significant)) if half_width else decimals(value)
    return Number(value, unit, kind, source, (value - half_width, value + half_width), digits)


def write(path: Path, numbers: Mapping[str, Number]) -> None:
    """Write one part. Folders are made; the same numbers give the same bytes."""
    data = {key: _plain(number) for key, number in numbers.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_json(data), encoding="utf-8")


def read(path: Path) -> dict[str, dict[str, Any]]:
    """One part, or the merged file: number by key.

    Raises:
        UserError: the file is missing or not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("there is no such file", where=str(path), remedy="run make first") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"not valid JSON: {error}", where=str(path), remedy="delete it and run make"
        ) from None
    if not isinstance(data, dict):
        raise UserError("not a JSON object", where=str(path), remedy="delete it and run make")
    return data


def merge(parts: Sequence[Path], out: Path) -> None:
    """Merge the parts' numbers into ``out``.

    Raises:
        UserError: a part cannot be read or holds what is no number, or two parts give the same key.
    """
    merged: dict[str, dict[str, Any]] = {}
    origin: dict[str, Path] = {}
    for path in parts:
        for key, number in read(path).items():
            if not isinstance(number, dict) or not set(number) >= PARTS:
                raise UserError(
                    f"is no number: it lacks some of {', '.join(sorted(PARTS))}",
                    where=f"{path}, {key}",
                    remedy="name parts that the notebooks wrote, results/numbers/<campaign>/<part>.json",
                )
            if key in merged:
                raise UserError(
                    f"the number {key!r} is also in {origin[key]}",
                    where=str(path),
                    remedy="give it another key in one of the two notebooks",
                )
            merged[key], origin[key] = number, path
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(_json(merged), encoding="utf-8")


def _plain(number: Number) -> dict[str, Any]:
    data = asdict(number)
    data["value"] = _rounded(number.value)
    data["interval"] = [_rounded(end) for end in number.interval] if number.interval else None
    return data


def _rounded(value: float | int | str) -> float | int | str:
    # float(): numpy's scalars are no JSON; bool is left out on purpose
    if isinstance(value, str):
        return value
    if float(value).is_integer():
        return int(value)
    return float(f"{value:.{SIGNIFICANT}g}")


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
