"""Measured sweeps with what theory says of them: the rows of an experiment, counts of work, efficiencies.

Theory is latency = F / (µ Θ) and energy = P_max · latency (the study's sections 3.4 and 3.5), with F from one
of two counts of FLOP: ``study``, the formula with its constants as printed, and ``true``, what the
architecture executes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import hypot, log, sqrt
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student_t

from t2v_energy.analysis.rows import read_rows
from t2v_energy.config import Accelerator, ModelFile, load_accelerator, load_campaign, load_model
from t2v_energy.errors import UserError
from t2v_energy.work import Work, paper, paper_work, true_work

Array = NDArray[np.float64]
Count = Literal["study", "true"]
J_PER_WH = 3600.0
LATENT_PIXELS = 16  # pixels of a token's side: sizes are multiples of it
CURVE_POINTS = 160
CONFIDENCE = 0.95
FRAME_STRIDE = 4  # a video has 4k + 1 frames
VAE_TILING = "vae-tiling"


@dataclass(frozen=True)
class Varied:
    """What a set of points varies.

    Attributes:
        column: of :attr:`Sweep.rows`.
        label: of a figure's axis.
        scale: how many of the column's units make one of the label's.
    """

    column: str
    label: str
    scale: float = 1.0


SETS: Mapping[str, Varied] = {
    "resolution": Varied("pixels", "Pixels of a frame (megapixels)", 1e6),
    "frames": Varied("num_frames", "Frames of the video"),
    "steps": Varied("num_inference_steps", "Denoising steps"),
}
"""The study's three sweeps (sections 5.1.1 to 5.1.3; figures 2 to 4), by experiment."""


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


def counted_frames(count: Count, experiment: str, num_frames: int) -> int:
    """The T that a count takes for a video of ``num_frames`` in a set of points.

    The study's sweep over frames lists T = 4, 8, …, 100 (section 4.2) and the pipeline makes 4k + 1 of them:
    its formula is given the T that the study would have put in, one less, with which 1 + T/4 is the true
    number of latent frames.  Its other sets are at T = 81 as printed, a quarter of a latent frame too much.
    """
    return num_frames - 1 if count == "study" and experiment == "frames" else num_frames


def flop_curve(
    count: Count,
    model: ModelFile,
    column: str,
    ends: tuple[int, int],
    fixed: Mapping[str, int],
    experiment: str = "",
) -> pd.DataFrame:
    """FLOP by operator along one axis of a sweep: columns ``column`` and the operators.

    Args:
        count, model: as for :func:`count_work`.
        column: ``pixels``, ``num_frames`` or ``num_inference_steps``.
        ends: least and largest value of it.
        fixed: the others of ``height``, ``width``, ``num_frames`` and ``num_inference_steps``.
        experiment: the set of points (:func:`counted_frames`).

    Pixels are a geometric grid of strips 16 pixels high: a strip has the work of any other shape of its area.
    Frames are all lengths 4k + 1, the only ones that the pipeline makes.
    """
    rows = []
    for value in _grid(column, ends):
        varied = (
            {"height": LATENT_PIXELS, "width": value // LATENT_PIXELS}
            if column == "pixels"
            else {column: value}
        )
        sizes = dict(fixed) | varied
        sizes["num_frames"] = counted_frames(count, experiment, sizes["num_frames"])
        rows.append({column: value, **count_work(count, model, **sizes).flop})
    return pd.DataFrame(rows)


def _grid(column: str, ends: tuple[int, int]) -> list[int]:
    unit = LATENT_PIXELS**2 if column == "pixels" else 1
    low, high = (max(round(value / unit), 1) for value in ends)
    if column == "num_frames":
        return list(range(low, high + 1, FRAME_STRIDE))
    grid = np.unique(np.geomspace(low, high, CURVE_POINTS).round().astype(int))
    return [unit * int(value) for value in grid]


# --- one efficiency µ ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Efficiency:
    """µ, the sustained share of peak throughput, from a regression of latency on FLOP.

    Attributes:
        value: µ = 1 / (b Θ), b the slope in seconds a FLOP.
        low, high: 95 % interval, of the slope's t-interval.
        r2: 1 − residual / total sum of squares of latency about its mean.
        n: points.
        heaviest_percent: the largest point's part of the sum of squared FLOP: its weight in the slope.
    """

    value: float
    low: float
    high: float
    r2: float
    n: int
    heaviest_percent: float


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
        heaviest_percent=100 * float(np.max(x) ** 2 / (x @ x)),
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

    A row with the intervention ``vae-tiling`` counts with the work of the plain decoder, although tiles that
    overlap do up to 1.78 times the decoder's work: :attr:`tiled` marks it.

    Attributes:
        rows: rows of configurations.csv with status ``ok``, by rising ``pixels`` (a frame's, added here),
            height, frames and steps.
        model, accelerator: the campaign's.
        source: path of the table, as it was given.
        experiment: the experiment; one of :data:`SETS` where a figure is made of it.
        failed: rows of the experiment with another status, such as ``out_of_memory``.
    """

    rows: pd.DataFrame
    model: ModelFile
    accelerator: Accelerator
    source: str
    experiment: str = "resolution"
    failed: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def varied(self) -> Varied:
        """What the sweep varies.

        Raises:
            UserError: the experiment is none of :data:`SETS`.
        """
        if self.experiment not in SETS:
            raise UserError(
                f"experiment {self.experiment!r} is no sweep",
                where=self.source,
                remedy=f"use one of {', '.join(SETS)}",
            )
        return SETS[self.experiment]

    @property
    def tiled(self) -> pd.Series:
        """Whether each row's VAE decoded in tiles."""
        # without any intervention the column is read as numbers, all NaN
        return self.rows["intervention"].map(lambda i: isinstance(i, str) and VAE_TILING in i.split("+"))

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
            counted_frames(count, self.experiment, int(row["num_frames"])),
            int(row["num_inference_steps"]),
        )

    def curve(self, count: Count) -> pd.DataFrame:
        """FLOP by operator over the sweep's own range of what it varies (:func:`flop_curve`).

        Raises:
            UserError: the rows differ in something else, too; take one of :attr:`by_size`.
        """
        column = self.varied.column
        held = {"num_frames", "num_inference_steps"} | ({"height", "width"} if column != "pixels" else set())
        values = self.rows[column]
        fixed = {name: self.fixed(name) for name in sorted(held - {column})}
        ends = (int(values.min()), int(values.max()))
        return flop_curve(count, self.model, column, ends, fixed, self.experiment)

    @cached_property
    def predictors(self) -> dict[str, Predictor]:
        """The predictors of :func:`fit_predictors`, µ fitted to these rows alone."""
        return fit_predictors([self])

    def predicted(self, predictor: Predictor, quantity: str) -> pd.Series:
        """Predictions of ``latency_s`` or ``gpu_energy_Wh`` for every row by one predictor."""
        flop = self.flop(predictor.count).sum(axis=1)
        return pd.Series(getattr(predictor, quantity)(flop), self.rows.index)

    @cached_property
    def boards(self) -> dict[str, Sweep]:
        """By GPU UUID, the sweep as that board alone measured it: its rows, and the mean of its passes.

        Those with more rows come first.  Only latency and GPU energy are the board's own, and their
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
        return {uuid: replace(self, rows=pd.DataFrame(rows[uuid]).infer_objects()) for uuid in ordered}

    @cached_property
    def by_size(self) -> dict[tuple[int, int], Sweep]:
        """By height and width, the rows of each size, in the order of the rows."""
        sides = ["height", "width"]
        return {
            (int(height), int(width)): replace(
                self, rows=self.rows[(self.rows["height"] == height) & (self.rows["width"] == width)]
            )
            for height, width in self.rows[sides].drop_duplicates().to_numpy()
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
                remedy=f"take rows of one {column}",
            )
        return int(values[0])

    def at(
        self,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
    ) -> pd.Series | None:
        """The row with the given values (None: any); None where it was not measured.

        Raises:
            UserError: there are several.
        """
        wanted = {"height": height, "width": width, "num_frames": num_frames}
        wanted["num_inference_steps"] = num_inference_steps
        given = {column: value for column, value in wanted.items() if value is not None}
        found = self.rows
        for column, value in given.items():
            found = found[found[column] == value]
        if len(found) > 1:
            values = ", ".join(f"{column} {value}" for column, value in given.items())
            raise UserError(
                f"there are {len(found)} rows with {values or 'any values'}",
                where=self.source,
                remedy="give more of size, frames and steps; select one protocol and kernel",
            )
        return found.iloc[0] if len(found) else None


def fit_predictors(sweeps: Iterable[Sweep]) -> dict[str, Predictor]:
    """The three predictors of table 3; the last two have ONE µ, fitted to all rows of all ``sweeps``.

    As the study did it: "linear regression of measured latencies against theoretical FLOPs across our
    experiments" (section 3.4), through the origin (:func:`fit_efficiency`).  A configuration that several
    sweeps measured (720×1280, 81 frames, 50 steps) is a point of each of them.

    Raises:
        UserError: no sweeps, or sweeps of different accelerators; fewer than two rows.
    """
    found = list(sweeps)
    if not found or any(sweep.accelerator != found[0].accelerator for sweep in found):
        raise UserError("µ needs measured sweeps of one accelerator", remedy="give sweeps of one campaign")
    peak, power = found[0].accelerator.peak_bf16_dense_TFLOPs * 1e12, found[0].accelerator.board_power_W
    predictors = {
        "paper": Predictor("paper", "study", paper.EFFICIENCY, paper.PEAK_FLOP_PER_S, paper.MAX_POWER_W)
    }
    fitted: tuple[tuple[str, Count], ...] = (("paper_refitted", "study"), ("single_mu", "true"))
    latency_s = np.concatenate([sweep.rows["latency_s"].to_numpy(dtype=np.float64) for sweep in found])
    for key, count in fitted:
        flop = np.concatenate([sweep.flop(count).sum(axis=1).to_numpy() for sweep in found])
        fit = fit_efficiency(flop, latency_s, peak)
        predictors[key] = Predictor(key, count, fit.value, peak, power, fit)
    return predictors


def read_sweep(root: Path, campaign: str, configurations: Path, experiment: str = "resolution") -> Sweep:
    """The rows of ``experiment`` in ``configurations`` (configurations.csv) with status ``ok``.

    Raises:
        UserError: the table is missing, has no such row, or mixes models; the campaign, its model or its
            accelerator is unknown.
    """
    path = root / configurations
    rows = read_rows(path)
    rows = rows[rows["experiment"] == experiment]
    good = rows[rows["status"] == "ok"].copy()
    models = sorted(good["model"].unique())
    if len(models) != 1:
        raise UserError(
            f"experiment {experiment!r} has {len(good)} measured rows of {len(models)} models",
            where=str(path),
            remedy="measure the experiment with one model",
        )
    good["pixels"] = good["height"] * good["width"]
    order = ["pixels", "height", "num_frames", "num_inference_steps"]
    good = good.sort_values(order, kind="stable").reset_index(drop=True)
    accelerator = load_accelerator(root, load_campaign(root, campaign).accelerator)
    failed = rows[rows["status"] != "ok"].reset_index(drop=True)
    return Sweep(good, load_model(root, models[0]), accelerator, str(configurations), experiment, failed)


def read_sweeps(root: Path, campaign: str, configurations: Path) -> dict[str, Sweep]:
    """Those of :data:`SETS` of which ``configurations`` has measured rows, in that order.

    Raises:
        UserError: as :func:`read_sweep`; there is none of them.
    """
    path = root / configurations
    table = read_rows(path)
    measured = set(table.loc[table["status"] == "ok", "experiment"])
    found = [experiment for experiment in SETS if experiment in measured]
    if not found:
        raise UserError(
            f"none of the experiments {', '.join(SETS)} has a measured row",
            where=str(path),
            remedy="measure one of them",
        )
    return {experiment: read_sweep(root, campaign, configurations, experiment) for experiment in found}


def row_label(row: pd.Series) -> str:
    """How a row of configurations.csv is named as a source: experiment, configuration, protocol, kernel."""
    parts = (row["experiment"], row["configuration_id"], row["protocol"], row["attention_kernel"])
    return " ".join(str(part) for part in parts)


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
