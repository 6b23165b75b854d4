"""Which sizes an operator prefers: by what must its tokens or rows divide, and on which side (alignment.csv).

Series of experiment ``operators`` vary one side of an attention, or the rows of a matrix product, about a
length.  For every period the logarithms of the rates are split into those of sizes that it divides and all
others; the period that leaves least unexplained is the one, if its sizes are faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import nan, sqrt

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import t as student_t

Values = NDArray[np.float64]
Sizes = NDArray[np.int_]
CONFIDENCE = 0.95
PERIODS = (8, 16, 32, 64, 128, 256)
SERIES = ("attention-alignment", "attention-alignment-long", "linear-alignment")
LEAST_CASES = 2
COLUMNS = (
    "operator",
    "kernel",
    "heads",
    "head_size",
    "inputs",
    "outputs",
    "length",
    "side",
    "period",
    "gain_percent",
    "gain_percent_ci95_low",
    "gain_percent_ci95_high",
    "aligned_TFLOPs",
    "other_TFLOPs",
    "aligned_n",
    "other_n",
    "scatter_percent",
    "edge_tile_percent",
    "remainder_percent",
    "remainder_percent_ci95",
    "kind",
)
_SHAPE = ["operator", "attention_kernel", "heads", "head_size", "inputs", "outputs", "series"]


def alignment_table(rates: pd.DataFrame) -> pd.DataFrame:
    """One row an operator, shape and side, columns :data:`COLUMNS`.

    ``period`` is empty where no size is preferred: the 95 % interval of the gain is then not above nought,
    and the row shows the split at 128.  ``edge_tile_percent`` is what one more tile of a period's tokens
    would cost of the whole; ``remainder_percent`` is the change of the rate from the least to the greatest
    remainder of sizes that do not divide: a loss by an edge's idle part would depend on the remainder.
    """
    rows = [row for group in groups(rates) for row in _rows(*group)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def groups(rates: pd.DataFrame) -> Iterator[tuple[pd.Series, str, int, pd.DataFrame]]:
    """Shape, side, length about which sizes vary, and its rows with column ``size``."""
    own = rates[rates["series"].isin(SERIES) & (rates["status"] == "ok")]
    for _, found in own.groupby(_SHAPE, sort=False, dropna=False):
        shape = found.iloc[0]
        if shape["operator"] == "linear":
            yield shape, "rows", int(found["rows"].iloc[0]), found.assign(size=found["rows"])
            continue
        length = int(found["queries"].mode().iloc[0])
        fixed = {
            "both": found["queries"] == found["keys"],
            "queries": found["keys"] == length,
            "keys": found["queries"] == length,
        }
        for side, which in fixed.items():
            size = found["keys"] if side == "keys" else found["queries"]
            yield shape, side, length, found.assign(size=size)[which]


def _rows(shape: pd.Series, side: str, length: int, found: pd.DataFrame) -> Iterator[tuple[object, ...]]:
    size = found["size"].to_numpy(dtype=int)
    log_rate = np.log(found["rate_TFLOPs"].to_numpy(dtype=float))
    splits = {period: split(size, log_rate, period) for period in PERIODS}
    known = {period: s for period, s in splits.items() if s is not None}
    if not known:
        return
    best = min(known, key=lambda period: known[period].scatter)
    prefers = known[best].low > 0
    shown = best if prefers else 128 if 128 in known else best
    found_split = known[shown]
    slope, half = _by_remainder(size, log_rate, shown)
    yield (
        shape["operator"],
        shape["attention_kernel"],
        shape["heads"],
        shape["head_size"],
        shape["inputs"],
        shape["outputs"],
        length,
        side,
        shown if prefers else nan,
        *(100 * np.expm1(x) for x in (found_split.gain, found_split.low, found_split.high)),
        float(np.exp(found_split.aligned)),
        float(np.exp(found_split.aligned - found_split.gain)),
        found_split.aligned_n,
        found_split.other_n,
        100 * found_split.scatter,
        100 * shown / length,
        100 * slope,
        100 * half,
        "measured",
    )


class Split:
    """Means of log rates of sizes that a period divides, and of all others.

    Attributes:
        gain, low, high: difference of the two and its 95 % interval (Student's t, one variance).
        aligned: mean of the first.
        scatter: standard deviation about the two means.
    """

    def __init__(self, aligned: Values, other: Values) -> None:
        self.aligned_n, self.other_n = len(aligned), len(other)
        self.aligned = float(aligned.mean())
        self.gain = self.aligned - float(other.mean())
        dof = self.aligned_n + self.other_n - 2
        squares = ((aligned - aligned.mean()) ** 2).sum() + ((other - other.mean()) ** 2).sum()
        self.scatter = sqrt(float(squares) / dof)
        error = self.scatter * sqrt(1 / self.aligned_n + 1 / self.other_n)
        half = float(student_t.ppf((1 + CONFIDENCE) / 2, dof)) * error
        self.low, self.high = self.gain - half, self.gain + half


def split(size: Sizes, log_rate: Values, period: int) -> Split | None:
    """The split at ``period``; None where a part has fewer than two sizes."""
    divides = size % period == 0
    if min(divides.sum(), (~divides).sum()) < LEAST_CASES:
        return None
    return Split(log_rate[divides], log_rate[~divides])


def _by_remainder(size: Sizes, log_rate: Values, period: int) -> tuple[float, float]:
    """Change of the log rate over all remainders of sizes that do not divide, and half its 95 % interval."""
    other = size % period != 0
    part = (size[other] % period) / period
    if len(np.unique(part)) < 3:
        return nan, nan
    design = np.column_stack([np.ones_like(part), part])
    solved, *_ = np.linalg.lstsq(design, log_rate[other], rcond=None)
    dof = len(part) - 2
    squares = float(((log_rate[other] - design @ solved) ** 2).sum())
    spread = sqrt(squares / dof * np.linalg.inv(design.T @ design)[1, 1])
    return float(solved[1]), float(student_t.ppf((1 + CONFIDENCE) / 2, dof)) * spread
