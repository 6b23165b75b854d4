"""Reading the tables that the study's authors published: the cross-model table and the sweeps of Wan2.1.

Both are CSV files with one row a configuration and prompt.  Energies are in kWh a video, durations in seconds
a video; ``runs`` videos were made in one window of the meter, and the window's energy was divided by them.
LTX-Video has three windows a row (``generate``, ``upsample``, ``denoise``); every other model has the first.
The file's own names are kept here; :mod:`t2v_energy.audit.table` and
:mod:`t2v_energy.published.campaign` give them ours.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from t2v_energy.errors import UserError

J_PER_KWH = 3.6e6
COMPONENTS = ("gpu", "cpu", "ram")
STAGES = ("generate", "upsample", "denoise")
"""Windows of a row in their order; all but the first are LTX-Video's alone, and empty elsewhere."""
SIZES = ("height", "width", "num_frames", "steps")
MEASURES = ("duration_generate", *(f"energy_generate_{part}" for part in COMPONENTS))
CROSS_MODEL_COLUMNS = ("model_name", *MEASURES, *SIZES, "prompt", "gpu_model", "runs", "warmup")
SWEEP_COLUMNS = ("parameter", *CROSS_MODEL_COLUMNS)
SWEEPS = {"res": "resolution", "frames": "frames", "steps": "steps"}
"""Experiment by the value of ``parameter``."""
POWER_W = (5.0, 3000.0)
"""Mean GPU power of the first window between which energies can be in kWh: no single board is outside."""


def read_cross_model(path: Path) -> pd.DataFrame:
    """The cross-model table, with the line of the file that each row is on as ``line``.

    Raises:
        UserError: not such a table; a value is missing, not a number or not positive; energies that cannot
            be in kWh; or a model has a prompt twice.
    """
    table = _checked(path, CROSS_MODEL_COLUMNS)
    refuse_repeated(table, ["model_name", *SIZES, "prompt"], path)
    return table


def read_sweeps(path: Path) -> pd.DataFrame:
    """The sweeps of Wan2.1, with ``line``, and ``experiment`` from ``parameter`` (:data:`SWEEPS`).

    Raises:
        UserError: as :func:`read_cross_model`; or an unknown ``parameter``.
    """
    table = _checked(path, SWEEP_COLUMNS)
    unknown = table[~table["parameter"].isin(list(SWEEPS))]
    if not unknown.empty:
        row = unknown.iloc[0]
        raise UserError(
            f"line {row['line']}: parameter is {row['parameter']!r}",
            where=str(path),
            remedy=f"it must be one of {', '.join(SWEEPS)}",
        )
    refuse_repeated(table, ["model_name", "parameter", *SIZES, "prompt"], path)
    return table.assign(experiment=table["parameter"].map(SWEEPS))


def _checked(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    table = read_csv(path, columns)
    table = with_numbers(table, [*MEASURES, *SIZES, "runs"], path)
    for stage in STAGES[1:]:
        names = [name for name in (f"duration_{stage}", *energy_columns(stage)) if name in table]
        table = with_numbers(table, names, path, optional=True)
    refuse_wrong_unit(table, path)
    return table


def energy_columns(stage: str) -> tuple[str, ...]:
    """The three energy columns (kWh) of one window."""
    return tuple(f"energy_{stage}_{part}" for part in COMPONENTS)


# --- one file -----------------------------------------------------------------------------------------------


def read_csv(path: Path, columns: Sequence[str] = ()) -> pd.DataFrame:
    """A CSV file as text, with ``line`` (of the file; a row that spans several counts as its last).

    Raises:
        UserError: no such file, empty, HTML or another text that is no CSV, no row below the header, a row
            of another length, or one of ``columns`` is missing.
    """
    where = str(path)
    if not path.is_file():
        raise UserError("there is no such file", where=where, remedy="give the path of a CSV file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError("not UTF-8 text", where=where, remedy="give a CSV file") from error
    if not text.strip():
        raise UserError("the file is empty", where=where, remedy="download it again")
    if text.lstrip()[:1] == "<":
        raise UserError(
            f"this is HTML or XML, not CSV (it begins {text.lstrip()[:20]!r})",
            where=where,
            remedy="download the raw file, not the page that shows it",
        )
    lines = text.splitlines(keepends=True)
    reader = csv.reader(lines)
    header = next(reader)
    if len(header) < 2:
        raise UserError(
            f"the first line is no header of a CSV table: {lines[0].strip()[:60]!r}",
            where=where,
            remedy="columns are separated by commas",
        )
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise UserError(f"column {twice[0]!r} is there twice", where=where, remedy="keep one of them")
    missing = [name for name in columns if name not in header]
    if missing:
        raise UserError(
            f"column {missing[0]!r} is missing" + (f" (and {len(missing) - 1} more)" if missing[1:] else ""),
            where=where,
            remedy=f"it has: {', '.join(header[:8])}{', …' if header[8:] else ''}",
        )
    rows = []
    for cells in reader:
        if not cells:
            continue
        if len(cells) != len(header):
            raise UserError(
                f"line {reader.line_num} has {len(cells)} cells, the header {len(header)}",
                where=where,
                remedy="the file may be cut off: download it again",
            )
        rows.append([*cells, reader.line_num])
    if not rows:
        raise UserError("there is no row below the header", where=where, remedy="download it again")
    return pd.DataFrame(rows, columns=[*header, "line"])


def with_numbers(
    table: pd.DataFrame, names: Sequence[str], path: Path, *, optional: bool = False
) -> pd.DataFrame:
    """``table`` with these columns as positive numbers; with ``optional``, empty cells are NaN.

    Raises:
        UserError: a cell is empty (unless ``optional``), not a finite number, or not above zero.
    """
    found = table.copy()
    for name in names:
        text = table[name].astype(str).str.strip()
        values = pd.to_numeric(text, errors="coerce")
        allowed = np.isfinite(values) & (values > 0)
        if optional:
            allowed |= text == ""
        if not allowed.all():
            bad = table[~allowed].iloc[0]
            raise UserError(
                f"line {bad['line']}, {name}: {str(bad[name])!r} is not a positive number",
                where=str(path),
                remedy="mend or drop the row",
            )
        found[name] = values
    return found


def refuse_repeated(table: pd.DataFrame, names: Sequence[str], path: Path) -> None:
    """Raises :class:`UserError` where two rows agree in all of ``names``."""
    repeated = table[table.duplicated(list(names))]
    if not repeated.empty:
        row = repeated.iloc[0]
        first = table[(table[list(names)] == row[list(names)]).all(axis=1)].iloc[0]
        raise UserError(
            f"line {row['line']} repeats line {first['line']}: same {', '.join(names)}",
            where=str(path),
            remedy="keep one of them: a mean would count it twice",
        )


def refuse_wrong_unit(table: pd.DataFrame, path: Path) -> None:
    """Raises :class:`UserError` where a row's GPU energy, taken as kWh, is no GPU's over its duration."""
    power_W = J_PER_KWH * table["energy_generate_gpu"] / table["duration_generate"]
    wrong = table[~power_W.between(*POWER_W)]
    if not wrong.empty:
        row = wrong.iloc[0]
        raise UserError(
            f"line {row['line']}, energy_generate_gpu: {row['energy_generate_gpu']:g} kWh in "
            f"{row['duration_generate']:g} s would be {power_W[wrong.index[0]]:.4g} W",
            where=str(path),
            remedy="energies must be in kWh and durations in s, both for one video",
        )


def check_sha256(path: Path, expected: str | None) -> str:
    """SHA-256 of a file, in hexadecimal digits; ``expected`` None: nothing is pinned, nothing compared.

    Raises:
        UserError: no such file, or its checksum is not ``expected``.
    """
    if not path.is_file():
        raise UserError("there is no such file", where=str(path), remedy="give the path of the file")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if expected is not None and found != expected:
        raise UserError(
            f"SHA-256 is {found}, pinned is {expected}",
            where=str(path),
            remedy="fetch the pinned revision again; another version is another campaign",
        )
    return found
