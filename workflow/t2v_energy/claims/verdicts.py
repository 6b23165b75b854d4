"""Claims against what was recomputed: claims.csv and the numbers of the paper's section about it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from math import nan
from pathlib import Path
from typing import Literal, get_args

import pandas as pd

from t2v_energy.analysis.numbers import Number, Source
from t2v_energy.claims import published, theory  # they register what recomputes
from t2v_energy.claims.listing import CLAIMS_FILE, Claim, Recomputation, load_claims
from t2v_energy.claims.sources import DataAbsent, Recomputed, Sources, bound, read_sources
from t2v_energy.errors import UserError
from t2v_energy.published.campaign import KINDS

__all__ = ["COLUMNS", "claims_numbers", "claims_table", "published", "table4_recomputed", "theory"]

Verdict = Literal["reproduced", "differs", "inconsistent with itself", "not obtainable", "data absent"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
COLUMNS = (
    "id", "place", "statement", "printed", "unit", "recomputed", "difference_percent", "verdict", "reason",
    "recomputation",
)  # fmt: skip
TABLE4_RECOMPUTED_COLUMNS = (
    "model", "title", "quantity", "kind", "printed", "recomputed", "printed_std", "recomputed_std",
    "mean_matches", "std_matches", "reason",
)  # fmt: skip
TABLE4_KINDS = {"latency_s": "measured"} | KINDS
SIGNIFICANT = 6
TOLERANCE = 1e-9  # of floating-point comparison


def claims_table(claims: tuple[Claim, ...], sources: Sources) -> pd.DataFrame:
    """One row a claim in the list's order, columns :data:`COLUMNS`.

    ``difference_percent`` is 100 (recomputed / printed − 1).  ``reproduced``: the recomputed value, with what
    is uncertain of it, lies within half of the printed one's last digit (or on the claimed side of it).
    Otherwise ``inconsistent with itself`` where it follows from other printed numbers, else ``differs``.
    """
    return pd.DataFrame([_row(claim, sources) for claim in claims], columns=list(COLUMNS))


def table4_recomputed(root: Path, cross_model: Path) -> pd.DataFrame:
    """Every cell of the study's table 4 beside its authors' file, :data:`TABLE4_RECOMPUTED_COLUMNS`.

    One row a model and quantity.  ``…_std`` is the sample standard deviation over prompts; ``…_matches`` says
    whether a value is the printed one at its digits, ``reason`` why not.

    Raises:
        UserError: the file is not the cross-model table, or config/claims.yaml lacks a cell.
    """
    claims = {claim.id: claim for claim in load_claims(root)}
    sources = read_sources(root, tuple(claims.values()), root / "none", cross_model)
    rows = []
    for key, printed in sources.study.models.items():
        for quantity, kind in TABLE4_KINDS.items():
            cells = {}
            for end in ("", "_std"):
                name = f"table4.{key}.{quantity}{end}"
                if name not in claims:
                    raise UserError(
                        f"there is no claim {name!r}",
                        where=str(CLAIMS_FILE),
                        remedy="add the cell of table 4",
                    )
                cells[end] = _row(claims[name], sources)
            reasons = [
                c["reason"] for c in cells.values() if c["verdict"] not in ("reproduced", "data absent")
            ]
            rows.append(
                (
                    key, printed.title, quantity, kind,
                    *(cells[end][column] for end in cells for column in ("printed", "recomputed")),
                    *(cells[end]["verdict"] == "reproduced" for end in cells), "; ".join(map(str, reasons)),
                )
            )  # fmt: skip
    return pd.DataFrame(rows, columns=list(TABLE4_RECOMPUTED_COLUMNS))


def _row(claim: Claim, sources: Sources) -> dict[str, object]:
    row: dict[str, object] = {
        "id": claim.id, "place": claim.place, "statement": claim.statement, "printed": claim.printed,
        "unit": claim.unit, "recomputed": nan, "difference_percent": nan, "recomputation": "",
    }  # fmt: skip
    if claim.not_obtainable:
        return row | {"verdict": "not obtainable", "reason": claim.not_obtainable}
    absent = []
    for step in claim.recompute:
        try:
            found = bound(step, f"config/claims.yaml, {claim.id}")(sources)
        except DataAbsent as error:
            absent.append(str(error))
            continue
        verdict = judged(claim, step, found)
        why = f"; {claim.why}" if claim.why and verdict != "reproduced" else ""
        return row | {
            "recomputed": float(f"{found.value:.{SIGNIFICANT}g}"),
            "difference_percent": round(100 * (found.value / claim.value - 1), 2) if claim.value else nan,
            "verdict": verdict,
            "reason": found.note + why,
            "recomputation": step.text,
        }
    texts = "; ".join(step.text for step in claim.recompute)
    return row | {"verdict": "data absent", "reason": "; ".join(absent), "recomputation": texts}


def judged(claim: Claim, step: Recomputation, found: Recomputed) -> Verdict:
    """Whether a recomputed value is what is printed."""
    allowed = claim.step / 2 + found.half_width + TOLERANCE * abs(claim.value)
    agrees = {
        "equal": abs(found.value - claim.value) <= allowed,
        "at least": found.value >= claim.value - found.half_width,
        "at most": found.value <= claim.value + found.half_width,
    }[claim.relation]
    if agrees:
        return "reproduced"
    return "inconsistent with itself" if step.campaign == "study" else "differs"


def claims_numbers(table: pd.DataFrame, file: str) -> Mapping[str, Number]:
    """Counts by verdict, of claims and of recomputing functions, and of table 4's cells: ``claims.*``."""
    counts = Counter(table["verdict"])
    names = {
        "reproduced": "reproduced", "differs": "differs", "inconsistent": "inconsistent with itself",
        "not_obtainable": "not obtainable", "absent": "data absent",
    }  # fmt: skip
    found = {key: (counts[verdict], f"verdict={verdict}") for key, verdict in names.items()}
    used = {name for text in table["recomputation"] for name in re.findall(r": (\w+)\(", text)}
    cells = table[table["place"] == "table 4"]
    found |= {
        "rows": (len(table), "all rows"),
        "functions": (len(used), "distinct functions of recomputation"),
        "table4.cells": (len(cells), "place=table 4"),
        "table4.reproduced": (
            int((cells["verdict"] == "reproduced").sum()), "place=table 4, verdict=reproduced"
        ),
        "table4.differs": (int((cells["verdict"] == "differs").sum()), "place=table 4, verdict=differs"),
    }  # fmt: skip
    return {
        f"claims.{key}": Number(int(value), "", "modelled", Source(file, row, "verdict"))
        for key, (value, row) in found.items()
    }
