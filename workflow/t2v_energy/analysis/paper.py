"""Builds the paper with Typst: no TeX, no network, the same bytes each time."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typst

from t2v_energy.errors import UserError

SOURCE_DATE_EPOCH = 0  # a fixed instant: the document shows no date


def compile_paper(
    root: Path, source: Path, out: Path, campaign: str = "h200", beside: Sequence[str] = ()
) -> None:
    """Compile ``source`` (under ``root``) to the PDF ``out``.

    ``campaign`` is whose numbers and tables the text takes, from results/numbers/<campaign>.json and
    results/tables/<campaign>/; tables of models of the campaigns ``beside`` stand beside
    its own.  Only the fonts that come with Typst are used.

    Raises:
        UserError: the text does not compile, for one because it asks for a number that is not there.
    """
    before = os.environ.get("SOURCE_DATE_EPOCH")
    os.environ["SOURCE_DATE_EPOCH"] = str(SOURCE_DATE_EPOCH)
    try:
        pdf = typst.compile(
            str(source),
            root=str(root),
            ignore_system_fonts=True,
            sys_inputs={"campaign": campaign, "beside": ",".join(beside)},
            timestamp=SOURCE_DATE_EPOCH,
            format="pdf",
        )
    except (typst.TypstError, RuntimeError) as error:
        raise _readable(error, source) from error
    finally:
        if before is None:
            del os.environ["SOURCE_DATE_EPOCH"]
        else:
            os.environ["SOURCE_DATE_EPOCH"] = before
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(pdf)


def used_numbers(root: Path, source: Path, campaign: str = "h200") -> list[str]:
    """Key of every number that the text uses, sorted; each once.

    Raises:
        UserError: as :func:`compile_paper`.
    """
    try:
        found = typst.query(
            str(source),
            "<num>",
            field="value",
            root=str(root),
            ignore_system_fonts=True,
            sys_inputs={"campaign": campaign},
        )
    except (typst.TypstError, RuntimeError) as error:
        raise _readable(error, source) from error
    return sorted(set(json.loads(found)))


def _readable(error: Any, source: Path) -> UserError:
    return UserError(
        f"the text does not compile: {error}",
        where=str(source),
        remedy="if a key is missing, see which numbers the file results/numbers/<campaign>.json has; "
        "if a file is missing, run make",
    )
