"""Measured sweeps with what theory says of them: the rows of one experiment, counts of work, efficiencies.

Theory is latency = F / (µ Θ) and energy = P_max · latency (the study's sections 3.4 and 3.5), with F from one
of two counts of FLOP: ``study``, the formula with its constants as printed, and ``true``, what the
architecture executes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import hypot, log, sqrt
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student_t

from t2v_energy.config import Accelerator, ModelFile, load_accelerator, load_campaign, load_model
from t2v_energy.errors import UserError
from t2v_energy.work import Work, paper, paper_work, true_work

Array = NDArray[np.float64]
Count = Literal["study", "true"]
J_PER_WH = 3600.0
LATENT_PIXELS = 16  # pixels of a token's side: sizes are multiples of it
CURVE_POINTS = 160
CONFIDENCE = 0.95


# --- the two counts -----------------------------------------------------------------------------------------


def count_work(
    count: Count, model: ModelFile, height: int, width: int, num_frames: int, num_inference_steps: int
) -> Work:
    """FLOP of one video, by one of the two counts; ``study`` is always Wan2.1-T2V-1.3B as printed.

    Raises:
        UserError: as :func:`t2v_energy.work.true_work` and :func:`t2v_energy.work.paper_work`.
    """
    if count == "study":
        return paper_work(height, width, num_frames, num_inference_steps)
    return true_work(model, height, width, num_frames, num_inference_steps)


def flop_curve(
    count: Count, model: ModelFile, pixels: tuple[float, float], num_frames: int, num_inference_steps: int
) -> pd.DataFrame:
    """FLOP by operator over a geometric grid of ``pixels`` (from, to): columns ``pixels`` and the operators.

    Each point is a strip 16 pixels high with the wanted area, which has the work of any other shape of that
    area.
    """
    low, high = (round(value / LATENT_PIXELS**2) for value in pixels)
    tokens = np.unique(np.geomspace(max(low, 1), max(high, 1), CURVE_POINTS).round().astype(int))
    rows = []
    for n in tokens.tolist():
        strip = count_work(count, model, LATENT_PIXELS, LATENT_PIXELS * n, num_frames, num_inference_steps)
        rows.append({"pixels": n * LATENT_PIXELS**2, **strip.flop})
    return pd.DataFrame(rows)


# --- one efficiency µ ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Efficiency:
    """µ, the sustained share of peak throughput, from a regression of latency on FLOP.

    Attributes:
        value: µ = 1 / (b Θ), b the slope in seconds a FLOP.
        low, high: 95 % interval, of the slope's t-interval.
        r2: 1 − residual / total sum of squares of latency about its mean.
        n: points.
    """

    value: float
    low: float
    high: float
    r2: float
    n: int


def fit_efficiency(flop: ArrayLike, latency_s: ArrayLike, peak_FLOP_per_s: float) -> Efficiency:
    """µ by least squares of ``latency_s`` on ``flop`` through the origin, as the study calibrated it.

    The study says "linear regression … with negligible overhead": no constant is fitted.  Large
    configurations weigh most, since seconds are fitted, not percentages.

    Raises:
        UserError: fewer than two points, or a value that is not positive.
    """
    x, y = np.asarray(flop, dtype=np.float64), np.asarray(latency_s, dtype=np.float64)
    if x.size < 2 or x.size != y.size or not (np.all(x > 0) and np.all(y > 0)):
        raise UserError(
            f"µ needs at least two points with positive FLOP and latency; there are {x.size} and {y.size}",
            remedy="measure more configurations of the experiment",
        )
    slope = float(x @ y / (x @ x))
    residual = float(np.sum((y - slope * x) ** 2))
    error = sqrt(residual / (x.size - 1) / float(x @ x))
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, x.size - 1)) * error
    total = float(np.sum((y - y.mean()) ** 2))
    return Efficiency(
        value=1 / (slope * peak_FLOP_per_s),
        low=1 / ((slope + half) * peak_FLOP_per_s),
        high=1 / ((slope - half) * peak_FLOP_per_s) if slope > half else float("inf"),
        r2=1 - residual / total if total else 1.0,
        n=x.size,
    )


@dataclass(frozen=True)
class Predictor:
    """A way to predict latency and energy from FLOP.

    Attributes:
        key: ``paper``, ``paper_refitted`` or ``single_mu``.
        count: which count of FLOP it takes.
        efficiency: µ.
        peak_FLOP_per_s: Θ_peak, dense bf16.
        power_W: P_max, the board's power.
        fit: the regression that gave µ; None where µ is as printed.
    """

    key: str
    count: Count
    efficiency: float
    peak_FLOP_per_s: float
    power_W: float
    fit: Efficiency | None = None

    def latency_s(self, flop: ArrayLike) -> Array:
        """F / (µ Θ), in seconds."""
        return np.asarray(flop, dtype=np.float64) / (self.efficiency * self.peak_FLOP_per_s)

    def gpu_energy_Wh(self, flop: ArrayLike) -> Array:
        """P_max · F / (µ Θ), in watt-hours."""
        return self.power_W * self.latency_s(flop) / J_PER_WH


# --- a measured sweep ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """The measured rows of one experiment with what theory needs to know of them.

    Attributes:
        rows: rows of configurations.csv with status ``ok``, by rising ``pixels`` (a frame's, added here).
        model, accelerator: the campaign's.
        source: path of the table, as it was given.
    """

    rows: pd.DataFrame
    model: ModelFile
    accelerator: Accelerator
    source: str

    def flop(self, count: Count) -> pd.DataFrame:
        """FLOP by operator of each row."""
        return pd.DataFrame([self.work(count, row).flop for _, row in self.rows.iterrows()], self.rows.index)

    def work(self, count: Count, row: pd.Series) -> Work:
        """Work of one row."""
        return count_work(
            count,
            self.model,
            int(row["height"]),
            int(row["width"]),
            int(row["num_frames"]),
            int(row["num_inference_steps"]),
        )

    @cached_property
    def predictors(self) -> dict[str, Predictor]:
        """The three predictors of table 3; the last two have µ fitted to these very rows."""
        peak = self.accelerator.peak_bf16_dense_TFLOPs * 1e12
        power = self.accelerator.board_power_W
        found = {
            "paper": Predictor("paper", "study", paper.EFFICIENCY, paper.PEAK_FLOP_PER_S, paper.MAX_POWER_W)
        }
        fitted: tuple[tuple[str, Count], ...] = (("paper_refitted", "study"), ("single_mu", "true"))
        for key, count in fitted:
            fit = fit_efficiency(self.flop(count).sum(axis=1), self.rows["latency_s"], peak)
            found[key] = Predictor(key, count, fit.value, peak, power, fit)
        return found

    def predicted(self, key: str, quantity: str) -> pd.Series:
        """Predictions of ``latency_s`` or ``gpu_energy_Wh`` for every row by one predictor."""
        predictor = self.predictors[key]
        flop = self.flop(predictor.count).sum(axis=1)
        return pd.Series(getattr(predictor, quantity)(flop), self.rows.index)

    @cached_property
    def boards(self) -> dict[str, Sweep]:
        """By GPU UUID, the sweep as that board alone measured it: its sizes, and the mean of its passes.

        Those with more sizes come first.  Only latency and GPU energy are the board's own, and their
        intervals are unknown (NaN).
        """
        rows: dict[str, list[pd.Series]] = {}
        for _, row in self.rows.iterrows():
            values = {quantity: board_means(row, quantity) for quantity in ("latency_s", "gpu_energy_Wh")}
            for uuid in values["latency_s"]:
                own = {q: found.get(uuid, float("nan")) for q, found in values.items()}
                own |= {f"{q}_ci95": float("nan") for q in values}
                rows.setdefault(uuid, []).append(row.drop(list(own)).combine_first(pd.Series(own)))
        ordered = sorted(rows, key=lambda uuid: (-len(rows[uuid]), uuid))
        return {
            uuid: Sweep(pd.DataFrame(rows[uuid]).infer_objects(), self.model, self.accelerator, self.source)
            for uuid in ordered
        }

    @property
    def has_gpu_energy(self) -> bool:
        """Whether any row has a GPU energy (there is none without a counter)."""
        return bool(self.rows["gpu_energy_Wh"].notna().any())

    def fixed(self, column: str) -> int:
        """The one value of a column that the sweep holds fixed.

        Raises:
            UserError: the rows have several.
        """
        values = sorted(self.rows[column].unique())
        if len(values) != 1:
            raise UserError(
                f"the rows differ in {column}: {', '.join(map(str, values))}",
                where=self.source,
                remedy="a sweep over resolution holds it fixed",
            )
        return int(values[0])

    def at(self, height: int, width: int) -> pd.Series | None:
        """The row of one size; None where it was not measured.

        Raises:
            UserError: the size has several rows.
        """
        found = self.rows[(self.rows["height"] == height) & (self.rows["width"] == width)]
        if len(found) > 1:
            raise UserError(
                f"{height}×{width} has {len(found)} rows",
                where=self.source,
                remedy="select one protocol and kernel",
            )
        return found.iloc[0] if len(found) else None


def read_sweep(root: Path, campaign: str, configurations: Path, experiment: str = "resolution") -> Sweep:
    """The rows of ``experiment`` in ``configurations`` (configurations.csv) with status ``ok``.

    Raises:
        UserError: the table is missing, has no such row, or mixes models; the campaign, its model or its
            accelerator is unknown.
    """
    path = root / configurations
    if not path.is_file():
        raise UserError("there is no such file", where=str(path), remedy="build it with snakemake (stage 3)")
    table = pd.read_csv(path)
    rows = table[(table["experiment"] == experiment) & (table["status"] == "ok")].copy()
    models = sorted(rows["model"].unique())
    if len(models) != 1:
        raise UserError(
            f"experiment {experiment!r} has {len(rows)} measured rows of {len(models)} models",
            where=str(path),
            remedy="measure the experiment with one model",
        )
    rows["pixels"] = rows["height"] * rows["width"]
    rows = rows.sort_values(["pixels", "height"], kind="stable").reset_index(drop=True)
    accelerator = load_accelerator(root, load_campaign(root, campaign).accelerator)
    return Sweep(rows, load_model(root, models[0]), accelerator, str(configurations))


def pass_means(row: pd.Series, column: str) -> list[float]:
    """Mean of each pass of a row of configurations.csv, in the passes' order."""
    text = str(row[f"{column}_pass_means"])
    return [float(mean) for mean in text.split(";")] if text not in ("", "nan") else []


def board_means(row: pd.Series, column: str) -> dict[str, float]:
    """Mean of each board's passes of a row, by GPU UUID; empty where passes and UUIDs do not correspond."""
    means, uuids = pass_means(row, column), str(row["gpu_uuids"]).split(";")
    if len(means) != len(uuids) or not all(uuid.strip() for uuid in uuids) or uuids == ["nan"]:
        return {}
    by_board: dict[str, list[float]] = {}
    for uuid, mean in zip(uuids, means, strict=True):
        by_board.setdefault(uuid, []).append(mean)
    return {uuid: sum(values) / len(values) for uuid, values in by_board.items()}


def half_bars(rows: pd.DataFrame, column: str) -> pd.Series:
    """Half-lengths of a figure's bars: the 95 % interval or half the passes' spread, whichever is longer.

    The interval of few passes holds repetition only (:func:`t2v_energy.aggregation.merged_estimate`); bars
    that left the passes' spread out would look surer than the points are.  Unknown ones are 0.
    """
    spread = rows[f"{column}_pass_spread_percent"] / 200 * rows[column]
    return pd.concat([rows[f"{column}_ci95"], spread], axis="columns").max(axis="columns").fillna(0)


def local_exponent(
    first: pd.Series, second: pd.Series, column: str, tokens: tuple[float, float]
) -> tuple[float, float]:
    """Slope of log(``column``) over log(tokens) between two rows, and its 95 % half-width.

    The half-width comes from the two rows' own intervals (NaN where there are none), not from a fit.
    """
    distance = log(tokens[1] / tokens[0])
    slope = log(float(second[column]) / float(first[column])) / distance
    relative = (float(row[f"{column}_ci95"]) / float(row[column]) for row in (first, second))
    return slope, hypot(*relative) / abs(distance)
