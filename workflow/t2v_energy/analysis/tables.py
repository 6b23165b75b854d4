"""Table 3: mean absolute percentage error of each predictor on each set of points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from t2v_energy.analysis.sweep import Predictor, Sweep
from t2v_energy.errors import UserError

QUANTITIES = ("latency_s", "gpu_energy_Wh")
TABLE3_COLUMNS = ("set", "predictor", "quantity", "mape_percent", "n")
PREDICTORS: Mapping[str, str] = {
    "paper": "formula and constants as printed",
    "paper_refitted": "printed formula, µ fitted to all sets",
    "single_mu": "true work, µ fitted to all sets",
}
"""Predictors of table 3 in words, in its order."""

_QUANTITY_NAMES = {"latency_s": "latency", "gpu_energy_Wh": "GPU energy"}
_CAPTION = (
    "Mean absolute percentage error (MAPE) of predicted against measured values. "
    "The two fitted predictors each have one efficiency µ, fitted to the latencies of all sets together."
)


def mape_percent(predicted: ArrayLike, measured: ArrayLike) -> float:
    """Mean ABSOLUTE percentage error, 100 · mean(|predicted − measured| / measured).

    The study prints it as "mean percentage error"; signs would cancel in that.

    Raises:
        UserError: no points, different lengths, or a measured value that is not positive.
    """
    p, m = np.asarray(predicted, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    if p.shape != m.shape or p.size == 0 or not np.all(m > 0):
        raise UserError(
            f"percentage errors need as many predictions ({p.size}) as positive measurements ({m.size})"
        )
    return float(100 * np.mean(np.abs(p - m) / m))


def table3(sweeps: Mapping[str, Sweep], predictors: Mapping[str, Predictor]) -> pd.DataFrame:
    """Table 3, columns :data:`TABLE3_COLUMNS`: one row a set, predictor and quantity that was measured.

    ``paper`` is the study's formula with its printed constants (µ = 0.456, 989 TFLOP/s, 700 W);
    ``paper_refitted`` is the same formula and ``single_mu`` the true work, each at its µ of ``predictors``
    (:func:`t2v_energy.analysis.sweep.fit_predictors`: one µ for the rows of every set).  A configuration that
    several sets measured counts once in each.  Quantities without any measurement (no energy counter) have
    no row.
    """
    rows = []
    for name, sweep in sweeps.items():
        for key in PREDICTORS:
            for quantity in QUANTITIES:
                measured = sweep.rows[quantity].dropna()
                if len(measured):
                    error = mape_percent(sweep.predicted(predictors[key], quantity)[measured.index], measured)
                    rows.append((name, key, quantity, error, len(measured)))
    return pd.DataFrame(rows, columns=list(TABLE3_COLUMNS))


def write_table3(table: pd.DataFrame, stem: Path) -> list[Path]:
    """Write ``<stem>.csv`` (the table as it is) and ``<stem>.tex`` (booktabs). Returns the files written."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    csv, tex = (stem.with_name(stem.name + ending) for ending in (".csv", ".tex"))
    csv.write_text(table.to_csv(index=False, float_format="%.4f"), encoding="utf-8")
    tex.write_text(_table3_latex(table), encoding="utf-8")
    return [csv, tex]


def write_csvs(tables: Mapping[str, pd.DataFrame], folder: Path) -> list[Path]:
    """Write ``<folder>/<name>.csv`` of each table, seven significant digits. Returns the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"{name}.csv" for name in tables]
    for path, table in zip(written, tables.values(), strict=True):
        path.write_text(table.to_csv(index=False, float_format="%.7g"), encoding="utf-8")
    return written


def booktabs(header: Sequence[str], rows: Sequence[Sequence[str]], alignment: str, caption: str) -> str:
    """A LaTeX table for the package booktabs; cells are taken as text and escaped."""
    lines = [f"% {caption}", rf"\begin{{tabular}}{{{alignment}}}", r"\toprule", _line(header), r"\midrule"]
    lines += [_line(row) for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _table3_latex(table: pd.DataFrame) -> str:
    rows = [
        (row["set"], PREDICTORS[row["predictor"]], _QUANTITY_NAMES[row["quantity"]],
         f"{row['mape_percent']:.1f}", str(row["n"]))
        for _, row in table.iterrows()
    ]  # fmt: skip
    return booktabs(("Set", "Predictor", "Quantity", "MAPE (%)", "Points"), rows, "lllrr", _CAPTION)


def _line(cells: Sequence[str]) -> str:
    return " & ".join(_escaped(cell) for cell in cells) + r" \\"


def _escaped(text: str) -> str:
    for character in "&%_#":
        text = text.replace(character, "\\" + character)
    return text.replace("µ", r"$\mu$")
