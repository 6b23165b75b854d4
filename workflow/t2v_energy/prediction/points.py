"""POINTS.csv: configurations to calibrate with or to predict, and PREDICTIONS.csv.  Needs no pandas."""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from t2v_energy.errors import UserError
from t2v_energy.prediction.calibrated import Predictions, Quantity
from t2v_energy.prediction.features import MOST, Point

SETTINGS = ("model", "height", "width", "num_frames", "num_inference_steps")
MEASURED: tuple[Quantity, ...] = ("latency_s", "gpu_energy_Wh")
BOARD = "board"
OTHER_UNITS: Mapping[str, str] = {
    "latency_ms": "latency_s",
    "latency_min": "latency_s",
    "latency": "latency_s",
    "time_s": "latency_s",
    "gpu_energy_J": "gpu_energy_Wh",
    "gpu_energy_kJ": "gpu_energy_Wh",
    "gpu_energy_kWh": "gpu_energy_Wh",
    "gpu_energy": "gpu_energy_Wh",
    "energy_Wh": "gpu_energy_Wh",
}
"""Columns that are often given for another: whoever has one must convert it."""

OTHER_NAMES: Mapping[str, str] = {"frames": "num_frames", "steps": "num_inference_steps"}
"""As the options of ``t2v-energy predict`` are called."""


class Table(NamedTuple):
    """Rows of a POINTS.csv: the cells as they stand, the points, where each stands (file and line), and what
    was measured (empty: nothing)."""

    columns: list[str]
    cells: list[list[str]]
    points: list[Point]
    places: list[str]
    latency_s: list[float]
    gpu_energy_Wh: list[float]


def read_points(path: Path, *, measured: bool) -> Table:
    """Read POINTS.csv, with its measured columns if ``measured``; an optional column ``board`` names GPUs.

    Raises:
        UserError: no such file, a missing column (naming the nearest there is), no rows, or a cell that is no
            whole number or no number; with file, line, column and value.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            "there is no such file", where=str(path), remedy=f"columns: {', '.join(SETTINGS)}"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text: {error}", where=str(path), remedy="save it as UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""))
    numbered = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    lines = [row for _, row in numbered]
    if len(lines) < 2:
        raise UserError("there are no points", where=str(path), remedy="give a header and a row for each")
    columns = [name.strip() for name in lines[0]]
    _check_columns(columns, SETTINGS + (MEASURED if measured else ()), path)
    places = [f"{path}, line {number}" for number, _ in numbered[1:]]
    table = Table(columns, lines[1:], [], places, [], [])
    for where, cells in zip(places, table.cells, strict=True):
        if len(cells) != len(columns):
            raise UserError(
                f"{len(cells)} cells in {len(columns)} columns", where=where, remedy="give every cell"
            )
        row = dict(zip(columns, (cell.strip() for cell in cells), strict=True))
        height, width, frames, steps = (_whole(row[name], name, where) for name in SETTINGS[1:])
        table.points.append(Point(row["model"], height, width, frames, steps, row.get(BOARD, "")))
        if measured:
            table.latency_s.append(_number(row["latency_s"], "latency_s", where))
            table.gpu_energy_Wh.append(_number(row["gpu_energy_Wh"], "gpu_energy_Wh", where))
    return table


def predictions_csv(table: Table, predictions: Predictions) -> str:
    """The rows of ``table`` as they stand, with the predictions, their intervals and notes."""
    added = [f"predicted_{quantity}{end}" for quantity in MEASURED for end in ("", "_low", "_high")]
    values = [column for quantity in MEASURED for column in predictions.interval(quantity)]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    kept = [index for index, name in enumerate(table.columns) if name not in (*added, "note")]
    writer.writerow([*(table.columns[index] for index in kept), *added, "note"])
    for row, cells in enumerate(table.cells):
        numbers = [f"{column[row]:.7g}" for column in values]
        writer.writerow([*(cells[index] for index in kept), *numbers, predictions.notes[row]])
    return stream.getvalue()


def _check_columns(columns: Sequence[str], wanted: Sequence[str], path: Path) -> None:
    for name in wanted:
        if name in columns:
            continue
        other = [c for c in columns if OTHER_UNITS.get(c) == name]
        near = other or [c for c in columns if OTHER_NAMES.get(c) == name]
        near = near or difflib.get_close_matches(name, columns, n=1, cutoff=0.6)
        unit = f"; {near[0]!r} is there: {'convert it to' if other else 'rename it'} {name}" if near else ""
        raise UserError(
            f"there is no column {name!r}{unit}",
            where=str(path),
            remedy=("separate columns by commas; " if len(columns) == 1 else "")
            + f"columns: {', '.join(wanted)}",
        )
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise UserError(f"two columns are named {twice[0]!r}", where=str(path), remedy="leave one out")


def _whole(text: str, name: str, where: str) -> int:
    value = _number(text, name, where)
    if not value.is_integer():
        raise UserError(f"{name}: {text!r} is no whole number", where=where, remedy="give a whole number")
    if value < 1:
        raise UserError(f"{name}: {text} must be positive", where=where, remedy=f"give a positive {name}")
    if value > MOST:
        raise UserError(f"{name}: {text} is more than {MOST}", where=where, remedy="look for a slip")
    return int(value)


def _number(text: str, name: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UserError(
            f"{name}: {text!r} is no number", where=where, remedy="give it in the unit of its column"
        ) from None
    if value != value or value in (float("inf"), float("-inf")):
        raise UserError(f"{name}: {text!r} is no number", where=where, remedy="leave the row out")
    return value
