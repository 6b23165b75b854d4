"""Scaling laws of the sweeps: exponents, what they are made of, and what doubling a dimension costs.

The study claims "quadratic growth with spatial and temporal dimensions, and linear scaling with the number of
denoising steps" (abstract), and from it ×4 for a doubled dimension and ×16 for two (section 6).  Here the
claim is put to the measurements, in three ways:

* :func:`scaling_table`: slopes of log cost over log size, over a whole sweep, in windows of it, and from
  point to point; a straight line against a parabola.
* :func:`regime_fits` and :func:`regime_table`: cost = c0 + c1 ℓ + c2 ℓ² in the denoiser's tokens ℓ (eq. 1,
  with whole latent frames), so that an exponent follows from shares of time.
* :func:`doubling_table`: measured ratios where a dimension doubles exactly.

Intervals are of 95 %.  Boards of one model differ by some percent, so an interval from repetition alone would
say too much: see :class:`Scatter` and :func:`ratio_half_width`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import exp, hypot, isfinite, log, nan, sqrt
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import nnls
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.stats import t as student_t

from t2v_energy.analysis.rows import read_rows
from t2v_energy.analysis.sweep import pass_means
from t2v_energy.config import Accelerator, ModelFile, load_accelerator, load_campaign, load_model
from t2v_energy.errors import UserError
from t2v_energy.work import true_work, wan, wan_latent_shape

Array = NDArray[np.float64]
SETS = ("resolution", "frames", "steps")
TOKEN_SETS = ("resolution", "frames")
EXPERIMENTS = (*SETS, "kernels")
VIDEO_QUANTITIES = ("latency_s", "gpu_energy_Wh")
STEP_QUANTITIES = ("step_time_s", "step_energy_J")
PASS_QUANTITY: Mapping[str, str] = {
    "latency_s": "latency_s",
    "gpu_energy_Wh": "gpu_energy_Wh",
    "step_time_s": "latency_s",
    "step_energy_J": "gpu_energy_Wh",
}
"""Whose passes say how far a quantity scatters: steps make up nearly all of a video."""

SAME_DENOISER = ("", "vae-tiling")
"""Interventions that leave the denoising loop as it is: such rows stay in the sweeps."""

CONFIDENCE = 0.95
NORMAL_95 = 1.96
TILE_TOKENS = 128
"""Sequence lengths that are a multiple of it run faster attention here.  Found in these measurements."""

_CONFIGURATION = ("model", "label", "protocol", "attention_kernel", "intervention")
PAIR_RATIOS = (1.6, 2.5)  # a pair of points: as near to a factor of two as the sweep has it
WINDOW = 2.0  # a window reaches from x / 2 to 2 x
MIN_FIT_POINTS = 4
STUDY_RATIO_OF_DIMENSION = 4.0  # section 6: "doubling any of these dimensions in isolation yields ~4×"

SCALING_COLUMNS = (
    "set", "quantity", "x", "exponent", "exponent_ci95_low", "exponent_ci95_high", "range",
    "r2_linear", "r2_quadratic", "aic_linear", "aic_quadratic", "kind", "n", "x_from", "x_to", "x_centre",
    "same_tiles", "interval_of",
)  # fmt: skip
REGIME_FIT_COLUMNS = (
    "set", "attention_kernel", "quantity", "model", "coefficient", "value", "ci95_low", "ci95_high", "unit",
    "rate_TFLOP_per_s", "rate_ci95_low", "rate_ci95_high", "n", "rms_residual_percent",
    "largest_residual_percent", "aic",
)  # fmt: skip
REGIME_COLUMNS = (
    "set", "attention_kernel", "quantity", "height", "width", "num_frames", "tokens", "whole_tiles",
    "measured", "fitted", "residual_percent", "constant_share", "linear_share", "quadratic_share",
    "exponent_fit", "exponent_flop", "quadratic_flop_share",
)  # fmt: skip
DOUBLING_COLUMNS = (
    "set", "dimension", "from", "to", "factor", "tokens_factor", "quantity", "ratio", "ratio_ci95_low",
    "ratio_ci95_high", "interval_of", "ratio_study", "ratio_flop", "whole_tiles_from", "whole_tiles_to",
)  # fmt: skip


# --- the measured points ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Campaign:
    """The rows of a campaign's sweeps.

    Attributes:
        rows: rows of configurations.csv with status ``ok`` of the experiments :data:`EXPERIMENTS`, with the
            columns ``pixels`` (of a frame), ``latent_frames``, ``tokens`` (ℓ), ``whole_tiles`` (ℓ is a
            multiple of :data:`TILE_TOKENS`) and ``label`` (height×width×frames×steps) added.
        model, accelerator: the campaign's.
        source: path of the table, as it was given.
    """

    rows: pd.DataFrame
    model: ModelFile
    accelerator: Accelerator
    source: str

    def of(self, name: str) -> pd.DataFrame:
        """Rows of one experiment, by rising tokens and steps; empty where it was not measured."""
        rows = self.rows[self.rows["experiment"] == name]
        return rows.sort_values(["tokens", "num_inference_steps", "height"], kind="stable")

    def token_sets(self) -> dict[str, pd.DataFrame]:
        """Rows whose tokens vary at one number of steps, by set; both sets together as the last one."""
        found = {name: rows for name in TOKEN_SETS if len(rows := self.of(name))}
        steps = {n for rows in found.values() for n in rows["num_inference_steps"]}
        if len(found) == len(TOKEN_SETS) and len(steps) == 1:
            found["+".join(TOKEN_SETS)] = pd.concat(list(found.values())).sort_values("tokens", kind="stable")
        return found

    @cached_property
    def scatter(self) -> dict[str, Scatter]:
        """How far passes and boards lie apart, by quantity of :data:`VIDEO_QUANTITIES`."""
        return {quantity: pass_scatter(self.rows, quantity) for quantity in VIDEO_QUANTITIES}


def read_campaign(root: Path, campaign: str, configurations: Path) -> Campaign:
    """The rows of ``configurations`` (configurations.csv) that scaling laws are read from.

    Raises:
        UserError: the table is missing or has no such row, or the rows mix models; the campaign, its model
            or its accelerator is unknown.
    """
    path = root / configurations
    table = read_rows(path)
    wanted = table["experiment"].isin(EXPERIMENTS) & (table["status"] == "ok")
    same = table["intervention"].isin(SAME_DENOISER) | table["intervention"].isna()
    rows = table[wanted & same].reset_index(drop=True)
    models = sorted(rows["model"].unique())
    if len(models) != 1:
        raise UserError(
            f"{len(rows)} measured rows of {len(models)} models in {', '.join(EXPERIMENTS)}",
            where=str(path),
            remedy="measure one of these experiments with one model",
        )
    model = load_model(root, models[0])
    accelerator = load_accelerator(root, load_campaign(root, campaign).accelerator)
    return Campaign(_with_tokens(rows, model), model, accelerator, str(configurations))


def _with_tokens(rows: pd.DataFrame, model: ModelFile) -> pd.DataFrame:
    transformer = model.components["transformer"].config
    sizes = zip(rows["height"], rows["width"], rows["num_frames"], strict=True)
    latents = [wan_latent_shape(model, int(h), int(w), int(t)) for h, w, t in sizes]
    tokens = np.array([wan.token_count(transformer, *latent) for latent in latents])
    return rows.assign(
        pixels=rows["height"] * rows["width"],
        latent_frames=[latent[0] for latent in latents],
        tokens=tokens,
        whole_tiles=tokens % TILE_TOKENS == 0,
        label=[configuration_label(row) for _, row in rows.iterrows()],
    )


def configuration_label(row: pd.Series) -> str:
    """Height×width×frames, and the steps."""
    return f"{row['height']}×{row['width']}×{row['num_frames']}, S = {row['num_inference_steps']}"


def point_label(name: str, row: pd.Series) -> str:
    """What tells a row of a set from the others: its size, frames, or steps and size."""
    size = f"{row['height']}×{row['width']}"
    labels = {"frames": f"T = {row['num_frames']}", "steps": f"S = {row['num_inference_steps']}, {size}"}
    return labels.get(name, size)


# --- what passes and boards add to an interval --------------------------------------------------------------


@dataclass(frozen=True)
class Scatter:
    """Relative scatter of pass means: ln(mean of a pass) = configuration + board + rest.

    Attributes:
        rest: standard deviation of the rest, with ``rest_df`` degrees of freedom.  It holds the hour, and
            that boards differ more at some sizes than at others.  NaN where no configuration was measured
            twice.
        board: standard deviation between boards, with ``board_df``; NaN with one board or unknown boards.
    """

    rest: float = nan
    rest_df: int = 0
    board: float = nan
    board_df: int = 0

    def half_width(self, first: pd.Series, second: pd.Series) -> float:
        """95 % half-width that passes and boards give to ln(second / first); NaN where it is unknown.

        The boards' part vanishes where both rows were measured on the same boards equally often.
        """
        if not self.rest_df:
            return nan
        passes = sum(1 / max(int(row["passes"]), 1) for row in (first, second))
        rest = _quantile(self.rest_df) * self.rest * sqrt(passes)
        shares = [_board_shares(row) for row in (first, second)]
        boards = {*shares[0], *shares[1]}
        unlike = sum((shares[0].get(board, 0.0) - shares[1].get(board, 0.0)) ** 2 for board in boards)
        if not unlike:
            return rest
        return hypot(rest, _quantile(self.board_df) * self.board * sqrt(unlike)) if self.board_df else nan


def pass_scatter(rows: pd.DataFrame, quantity: str) -> Scatter:
    """Two-way least squares over the pass means of all configurations that were measured more than once.

    Rows of several experiments are one configuration where they agree in all that was asked for.  Rows that a
    rule of validity flags are left out: a pass in which the host stalled says nothing of the others, and one
    such row would treble the scatter of all.
    """
    passes = pd.DataFrame(
        [
            (*(str(row[key]) for key in _CONFIGURATION), uuid, log(mean))
            for _, row in rows[rows["flags"].isna() | (rows["flags"] == "")].iterrows()
            for uuid, mean in _passes(row, quantity)
        ],
        columns=[*_CONFIGURATION, "board", "log_mean"],
    )
    cell = passes.groupby(list(_CONFIGURATION), sort=False)
    passes = passes.assign(cell=cell.ngroup())[cell["log_mean"].transform("size") > 1]
    if passes.empty:
        return Scatter()
    cells, boards = (pd.factorize(passes[name])[0] for name in ("cell", "board"))
    count = int(cells.max()) + 1
    design = np.zeros((len(passes), count + int(boards.max()) + 1))
    design[np.arange(len(passes)), cells] = design[np.arange(len(passes)), count + boards] = 1
    values = passes["log_mean"].to_numpy()
    solution, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    freedom = len(values) - int(rank)
    residual = float(np.sum((values - design @ solution) ** 2))
    rest = sqrt(residual / freedom) if freedom else nan
    board, board_freedom = _between_boards(design, count, solution[count:])
    return Scatter(rest, freedom, board, board_freedom)


def _passes(row: pd.Series, quantity: str) -> list[tuple[str, float]]:
    """Board and mean of each pass; empty where they do not correspond or a mean is unknown."""
    means, uuids = pass_means(row, quantity), _uuids(row)
    known = len(means) == len(uuids) and all(mean > 0 for mean in means)  # False for NaN
    return list(zip(uuids, means, strict=True)) if known else []


def _between_boards(design: Array, cells: int, effects: Array) -> tuple[float, int]:
    """Standard deviation of the boards' effects, which compare only where shared configurations link them."""
    size = design.shape[1]
    pairs = np.nonzero(design)[1].reshape(len(design), 2)  # every line has one configuration and one board
    graph = coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(size, size))
    groups = connected_components(graph, directed=False)[1][cells:]
    freedom = len(effects) - len(set(groups))
    square = sum(float(np.var(own) * own.size) for own in (effects[groups == g] for g in set(groups)))
    return (sqrt(square / freedom), freedom) if freedom else (nan, 0)


def _uuids(row: pd.Series) -> list[str]:
    text = str(row["gpu_uuids"])
    return [] if text in ("", "nan") else text.split(";")


def _board_shares(row: pd.Series) -> dict[str, float]:
    """Part of a row's passes on each board; passes on unknown boards count as boards of their own."""
    passes = max(int(row["passes"]), 1)
    uuids = _uuids(row)
    if len(uuids) != passes:
        uuids = [f"unknown {row['experiment']} {row.name} {number}" for number in range(passes)]
    shares: dict[str, float] = {}
    for uuid in uuids:
        shares[uuid] = shares.get(uuid, 0) + 1 / passes
    return shares


def repetition_half_width(row: pd.Series, quantity: str) -> float:
    """Relative 95 % half-width of a row from repetition within its passes; NaN for a single generation.

    Of a step's time from the scatter of steps, of a step's energy the GPU energy's own.
    """
    if quantity == "step_time_s":
        return NORMAL_95 * float(row["step_time_sem_percent"]) / 100
    column = PASS_QUANTITY[quantity]
    return float(row[f"{column}_ci95"]) / float(row[column])


def ratio_half_width(
    first: pd.Series, second: pd.Series, quantity: str, scatter: Mapping[str, Scatter]
) -> tuple[float, str]:
    """95 % half-width of ln(second / first) and what it is made of.

    Repetition of both rows, passes and boards are added in quadrature.  Where no configuration of the
    campaign was measured twice, passes are unknown and only ``repetition`` remains; a row without
    repetition then has none (NaN).  Rows with three passes or more have their passes in both parts, which
    errs on the wide side.
    """
    own = [repetition_half_width(row, quantity) for row in (first, second)]
    between = scatter[PASS_QUANTITY[quantity]].half_width(first, second)
    if not isfinite(between):
        return hypot(*own), "repetition"
    # the scatter between passes holds that of a single generation
    return hypot(between, *(half for half in own if isfinite(half))), "repetition, passes, boards"


# --- exponents ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A straight line: ``slope`` with its t-interval (``low``, ``high``) over ``n`` points."""

    slope: float
    low: float
    high: float
    n: int


def log_slope(x: ArrayLike, y: ArrayLike) -> Line:
    """Exponent of y ∝ x^exponent: least squares of log y on log x, with a t-interval (three points or more).

    Raises:
        UserError: fewer than two different x, or a value that is not positive.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if np.unique(a).size < 2 or a.size != b.size or not (np.all(a > 0) and np.all(b > 0)):
        raise UserError(
            "an exponent needs two different sizes and positive costs",
            where=f"sizes {a.tolist()}",
            remedy="measure more configurations of the experiment",
        )
    u, v = np.log(a), np.log(b)
    centred = u - u.mean()
    slope = float(centred @ v / (centred @ centred))
    if a.size < 3:
        return Line(slope, nan, nan, a.size)
    residual = float(np.sum((v - v.mean() - slope * centred) ** 2))
    half = _quantile(a.size - 2) * sqrt(residual / (a.size - 2) / float(centred @ centred))
    return Line(slope, slope - half, slope + half, a.size)


@dataclass(frozen=True)
class Polynomial:
    """y = Σ coefficients[k] · x^k by least squares of relative errors.

    Attributes:
        coefficients, half_widths: by rising power; 95 % half-widths (t; NaN without degrees of freedom).
        r2: 1 − Σ w (y − ŷ)² / Σ w (y − ȳ)², w = 1/y², ȳ the mean with these weights.
        aic: n ln(Σ w (y − ŷ)² / n) + 2 k + 2 k (k + 1) / (n − k − 1), k the coefficients and the variance: of
            Gaussian relative errors, corrected for small samples.  NaN where n ≤ k + 1.
        residual_percent: 100 · (ŷ / y − 1) of each point.
    """

    coefficients: Array
    half_widths: Array
    r2: float
    aic: float
    residual_percent: Array


def fit_polynomial(x: ArrayLike, y: ArrayLike, degree: int) -> Polynomial:
    """Least squares of y on 1, x, …, x^degree with weights 1/y²: costs span orders of magnitude.

    Raises:
        UserError: fewer different x than coefficients, or a y that is not positive.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if np.unique(a).size <= degree or not np.all(b > 0):
        raise UserError(
            f"a polynomial of degree {degree} needs {degree + 1} sizes and positive costs; "
            f"there are {np.unique(a).size}",
            remedy="measure more configurations of the experiment",
        )
    scale = float(a.max())
    powers = np.arange(degree + 1)
    design = (a[:, None] / scale) ** powers / b[:, None]
    scaled = np.linalg.lstsq(design, np.ones_like(b), rcond=None)[0]
    residual = design @ scaled - 1
    half = _half_widths(design, residual)
    weights = 1 / b**2
    mean = float(weights @ b / weights.sum())
    total = float(weights @ (b - mean) ** 2)
    square = float(residual @ residual)
    unit = scale**powers
    return Polynomial(
        scaled / unit,
        half / unit,
        1 - square / total if total else 1.0,
        aicc(square, a.size, degree + 1),
        100 * residual,
    )


def aicc(residual_square: float, n: int, coefficients: int) -> float:
    """AIC of a Gaussian fit, corrected for small samples, but for a constant that data alone fix.

    NaN where the correction has no sense (n ≤ coefficients + 2) or the fit is exact.
    """
    k = coefficients + 1  # the variance is fitted too
    if n - k - 1 <= 0 or residual_square <= n * np.finfo(float).eps ** 2:
        return nan
    return n * log(residual_square / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1)


def _half_widths(design: Array, residual: Array) -> Array:
    freedom = len(design) - design.shape[1]
    if freedom < 1:
        return np.full(design.shape[1], nan)
    variance = float(residual @ residual) / freedom
    spread = np.sqrt(variance * np.diag(np.linalg.pinv(design.T @ design)))
    return np.asarray(_quantile(freedom) * spread, dtype=np.float64)


def _quantile(freedom: int) -> float:
    return float(student_t.ppf((1 + CONFIDENCE) / 2, freedom))


def scaling_table(campaign: Campaign) -> pd.DataFrame:
    """scaling.csv, columns :data:`SCALING_COLUMNS`.

    ``kind`` is ``global`` (all points), ``window`` (those from x/2 to 2x about a point) or ``pair`` (two
    points near a factor of two apart, both on the grid of tiles or both off it where there are such).  The
    first two have a t-interval of the regression, so that the scatter of shapes, boards and hours is
    in it; a pair's is :func:`ratio_half_width`.
    """
    lines: list[dict[str, object]] = []
    for name, rows, x, where in _sweeps(campaign):
        quantities = VIDEO_QUANTITIES if name == "steps" else (*VIDEO_QUANTITIES, *STEP_QUANTITIES)
        for quantity in quantities:
            known = rows[rows[quantity].notna()].sort_values([x, "height"], kind="stable")
            if known[x].nunique() < 2:
                continue
            base = {"set": name, "quantity": quantity, "x": x}
            lines.append(base | _global_line(known, x, quantity, where))
            if name != "steps":
                lines += [base | line for line in _window_lines(name, known, x, quantity)]
            lines += [base | line for line in _pair_lines(campaign, name, known, x, quantity)]
    return pd.DataFrame(lines, columns=list(SCALING_COLUMNS))


def _sweeps(campaign: Campaign) -> Iterator[tuple[str, pd.DataFrame, str, str]]:
    """Set, rows, x and a suffix of ``range`` of everything that has an exponent."""
    for name, x in (("resolution", "pixels"), ("frames", "num_frames")):
        if len(rows := campaign.of(name)):
            yield name, rows, x, ""
            yield name, rows, "tokens", ""
    for size, rows in steps_by_size(campaign).items():
        yield "steps", rows, "num_inference_steps", f", {size}"


def steps_by_size(campaign: Campaign) -> dict[str, pd.DataFrame]:
    """Rows of set ``steps`` by height×width, smallest first."""
    rows = campaign.of("steps")
    return {
        f"{group['height'].iloc[0]}×{group['width'].iloc[0]}": group.sort_values("num_inference_steps")
        for _, group in rows.groupby(["pixels", "height"], sort=True)
    }


def _global_line(rows: pd.DataFrame, x: str, quantity: str, where: str) -> dict[str, object]:
    return _regression(rows, x, quantity) | {"range": f"global{where}", "kind": "global"}


def _window_lines(name: str, rows: pd.DataFrame, x: str, quantity: str) -> Iterator[dict[str, object]]:
    """Windows with points on either side of their centre and enough of them for an interval."""
    for centre in _one_row_each(rows, x):
        value = float(centre[x])
        inside = rows[rows[x].between(value / WINDOW, value * WINDOW)]
        wide = min(inside[x].max() / value, value / inside[x].min()) >= PAIR_RATIOS[0]
        if wide and inside[x].nunique() >= MIN_FIT_POINTS:
            label = f"x/{WINDOW:g} to {WINDOW:g}x about {point_label(name, centre)}"
            yield _regression(inside, x, quantity) | {"range": label, "kind": "window"}


def _regression(rows: pd.DataFrame, x: str, quantity: str) -> dict[str, object]:
    fit = log_slope(rows[x], rows[quantity])
    line: dict[str, object] = {
        "exponent": fit.slope, "exponent_ci95_low": fit.low, "exponent_ci95_high": fit.high,
        "n": fit.n, "x_from": rows[x].min(), "x_to": rows[x].max(),
        "x_centre": exp(float(np.log(rows[x]).mean())), "interval_of": "scatter about the line",
    }  # fmt: skip
    if rows[x].nunique() >= MIN_FIT_POINTS:
        for name, degree in (("linear", 1), ("quadratic", 2)):
            polynomial = fit_polynomial(rows[x], rows[quantity], degree)
            line |= {f"r2_{name}": polynomial.r2, f"aic_{name}": polynomial.aic}
    return line


def _pair_lines(
    campaign: Campaign, name: str, rows: pd.DataFrame, x: str, quantity: str
) -> Iterator[dict[str, object]]:
    points = _one_row_each(rows, x)
    for place, first in enumerate(points):
        later = [row for row in points[place + 1 :] if _near_two(float(row[x]) / float(first[x]))]
        if not later:
            continue
        second = min(later, key=lambda row: _unlike_pair(first, row, x))
        distance = log(float(second[x]) / float(first[x]))
        slope = log(float(second[quantity]) / float(first[quantity])) / distance
        half, parts = ratio_half_width(first, second, quantity, campaign.scatter)
        yield {
            "exponent": slope, "exponent_ci95_low": slope - half / distance,
            "exponent_ci95_high": slope + half / distance, "kind": "pair", "n": 2,
            "same_tiles": bool(first["whole_tiles"] == second["whole_tiles"]),
            "x_from": first[x], "x_to": second[x], "interval_of": parts,
            "x_centre": sqrt(float(first[x]) * float(second[x])),
            "range": f"{point_label(name, first)} to {point_label(name, second)}",
        }  # fmt: skip


def _unlike_pair(first: pd.Series, second: pd.Series, x: str) -> tuple[bool, float]:
    """How badly two rows make a pair: tiles that differ first, then the distance from a factor of two."""
    distance = abs(log(float(second[x]) / float(first[x]) / 2))
    return bool(first["whole_tiles"] != second["whole_tiles"]), distance


def _near_two(ratio: float) -> bool:
    return PAIR_RATIOS[0] <= ratio <= PAIR_RATIOS[1]


def _one_row_each(rows: pd.DataFrame, x: str) -> list[pd.Series]:
    """One row for each x, by rising x: shapes of equal size count once."""
    return [_best(group) for _, group in rows.groupby(x, sort=True)]


def _best(rows: pd.DataFrame) -> pd.Series:
    """The row with most passes; the first of equals."""
    return rows.iloc[int(np.argmax(rows["passes"].to_numpy()))]


# --- why: constant, linear and quadratic parts --------------------------------------------------------------


@dataclass(frozen=True)
class StepFlop:
    """Counted FLOP of one denoising step, with guidance: ``constant`` + ``linear`` ℓ + ``quadratic`` ℓ².

    The quadratic part is self-attention's QKᵀ and PV (eq. 3, second term); cross-attention's are linear.
    """

    constant: float
    linear: float
    quadratic: float

    def exponent(self, tokens: ArrayLike) -> Array:
        """d log FLOP / d log ℓ."""
        return exponent_of(self.constant, self.linear, self.quadratic, tokens)

    def quadratic_share(self, tokens: ArrayLike) -> Array:
        """Part of the FLOP that is quadratic."""
        n = np.asarray(tokens, dtype=np.float64)
        total = self.constant + self.linear * n + self.quadratic * n**2
        return np.asarray(self.quadratic * n**2 / total, dtype=np.float64)


def step_flop(model: ModelFile) -> StepFlop:
    """FLOP of one denoising step as a polynomial in tokens, from the true work of the model's transformer."""
    transformer, text = model.components["transformer"].config, model.tokenizer.max_length
    values = [sum(wan.forward_flop(transformer, n, text).values()) for n in (0, 1, 2)]
    quadratic = (values[2] - 2 * values[1] + values[0]) / 2
    linear = values[1] - values[0] - quadratic
    calls = model.passes_per_step
    return StepFlop(calls * float(values[0]), calls * float(linear), calls * float(quadratic))


def exponent_of(constant: float, linear: float, quadratic: float, tokens: ArrayLike) -> Array:
    """d log(c0 + c1 ℓ + c2 ℓ²) / d log ℓ = (c1 ℓ + 2 c2 ℓ²) / (c0 + c1 ℓ + c2 ℓ²)."""
    n = np.asarray(tokens, dtype=np.float64)
    total = constant + linear * n + quadratic * n**2
    return np.asarray((linear * n + 2 * quadratic * n**2) / total, dtype=np.float64)


COEFFICIENTS = ("constant", "linear", "quadratic", "ragged")


@dataclass(frozen=True)
class Regimes:
    """Cost = c0 + c1 ℓ + (c2 + c3 · ragged) ℓ², ragged where ℓ is no multiple of :data:`TILE_TOKENS`.

    Fitted by least squares of relative errors with c ≥ 0.

    Attributes:
        coefficients: c0, c1, c2, c3, in the quantity's unit a token or token²; c3 is 0 where not fitted.
        low, high: 95 % t-intervals, cut at 0.  NaN for a coefficient that is not fitted or lies at 0.
        ragged_fitted: whether c3 is fitted.
        residual_percent: 100 · (fitted / measured − 1) of each point.
        aic: as in :class:`Polynomial`.
        quadratic_ragged: c2 + c3 with its interval (value, low, high).
    """

    coefficients: Array
    low: Array
    high: Array
    ragged_fitted: bool
    residual_percent: Array
    aic: float
    quadratic_ragged: tuple[float, float, float]

    def parts(self, tokens: ArrayLike, whole_tiles: ArrayLike) -> Array:
        """Constant, linear and quadratic part: shape (3, points)."""
        n = np.asarray(tokens, dtype=np.float64)
        c0, c1, _, _ = self.coefficients
        quadratic = self._quadratic(whole_tiles)
        return np.stack(np.broadcast_arrays(c0 * np.ones_like(n), c1 * n, quadratic * n**2))

    def cost(self, tokens: ArrayLike, whole_tiles: ArrayLike) -> Array:
        """Fitted cost."""
        return np.asarray(self.parts(tokens, whole_tiles).sum(axis=0), dtype=np.float64)

    def exponent(self, tokens: ArrayLike, whole_tiles: ArrayLike = False) -> Array:
        """Local exponent at fixed alignment: between sizes that are all ragged, or all whole."""
        constant, linear, quadratic = self.parts(tokens, whole_tiles)
        return np.asarray((linear + 2 * quadratic) / (constant + linear + quadratic), dtype=np.float64)

    def tokens_at(self, exponent: float, whole_tiles: bool = False) -> float:
        """Tokens at which the local exponent reaches ``exponent`` (1 ≤ exponent < 2); inf if never."""
        c0, c1, _, _ = self.coefficients
        c2 = float(self._quadratic(whole_tiles))
        a, b, c = (2 - exponent) * c2, (1 - exponent) * c1, -exponent * c0
        return float((-b + sqrt(b * b - 4 * a * c)) / (2 * a)) if a > 0 else float("inf")

    def _quadratic(self, whole_tiles: ArrayLike) -> Array:
        _, _, c2, c3 = self.coefficients
        return np.asarray(c2 + c3 * ~np.asarray(whole_tiles, dtype=bool), dtype=np.float64)


def fit_regimes(tokens: ArrayLike, cost: ArrayLike, *, ragged: bool = True) -> Regimes:
    """Non-negative least squares of relative errors: constant, linear and quadratic cost of a denoising step.

    Args:
        tokens, cost: one a point.
        ragged: also fit what token counts off the grid of :data:`TILE_TOKENS` cost more; left out where
            fewer than two points are on it, or off it.

    Raises:
        UserError: fewer than four different token counts, or a cost that is not positive.
    """
    n, y = np.asarray(tokens, dtype=np.float64), np.asarray(cost, dtype=np.float64)
    if np.unique(n).size < MIN_FIT_POINTS or not np.all(y > 0):
        raise UserError(
            f"regimes need {MIN_FIT_POINTS} different token counts with positive cost; "
            f"there are {np.unique(n).size}",
            remedy="measure more configurations of the experiment",
        )
    off = n % TILE_TOKENS != 0
    ragged = ragged and min(int(off.sum()), int((~off).sum())) >= 2 and n.size > MIN_FIT_POINTS
    scale = float(n.max())
    u = n / scale
    columns = [np.ones_like(u), u, u**2, u**2 * off][: 4 if ragged else 3]
    design = np.stack(columns, axis=1) / y[:, None]
    scaled, _ = nnls(design, np.ones_like(y))
    residual = design @ scaled - 1
    low, high, both = _regime_intervals(design, scaled, residual, ragged)
    unit = np.array([1.0, scale, scale**2, scale**2])

    def padded(values: Array, fill: float) -> Array:
        return np.append(values, [fill] * (4 - len(values))) / unit

    return Regimes(
        padded(scaled, 0.0),
        padded(low, nan),
        padded(high, nan),
        ragged,
        100 * residual,
        aicc(float(residual @ residual), n.size, len(scaled)),
        (both[0] / unit[2], both[1] / unit[2], both[2] / unit[2]),
    )


def _regime_intervals(
    design: Array, solution: Array, residual: Array, ragged: bool
) -> tuple[Array, Array, tuple[float, float, float]]:
    """t-intervals of the coefficients away from 0, and c2 + c3 with its own."""
    active = solution > 0
    low, high = np.full(len(solution), nan), np.full(len(solution), nan)
    freedom = len(design) - int(active.sum())
    total = float(solution[2:].sum())
    if freedom < 1:
        return low, high, (total, nan, nan)
    used = design[:, active]
    covariance = np.zeros((len(solution), len(solution)))
    inverse = np.linalg.pinv(used.T @ used) * float(residual @ residual) / freedom
    covariance[np.ix_(active, active)] = inverse
    half = _quantile(freedom) * np.sqrt(np.diag(covariance))
    low[active] = np.maximum(solution - half, 0)[active]
    high[active] = (solution + half)[active]
    sum_half = _quantile(freedom) * sqrt(max(float(covariance[2:, 2:].sum()), 0))
    return low, high, (total, max(total - sum_half, 0), total + sum_half)


@dataclass(frozen=True)
class RegimeSet:
    """Regimes of one set and quantity: ``fit`` over ``rows``; ``model`` names the form that was chosen."""

    set: str
    attention_kernel: str
    quantity: str
    rows: pd.DataFrame
    fit: Regimes

    @property
    def model(self) -> str:
        """``tiles`` where ragged token counts have a coefficient of their own, else ``smooth``."""
        return "tiles" if self.fit.ragged_fitted else "smooth"


def all_regimes(campaign: Campaign, *, ragged: bool = True) -> list[RegimeSet]:
    """Regimes of the sets over tokens and of each kernel, for all quantities that were measured."""
    groups = {(name, _kernels(rows)): rows for name, rows in campaign.token_sets().items()}
    groups |= {("kernels", str(k)): g for k, g in campaign.of("kernels").groupby("attention_kernel")}
    found = []
    for (name, kernel), rows in groups.items():
        for quantity in (*STEP_QUANTITIES, *VIDEO_QUANTITIES):
            known = rows[rows[quantity].notna()]
            if known["tokens"].nunique() >= MIN_FIT_POINTS and known["num_inference_steps"].nunique() == 1:
                fit = fit_regimes(known["tokens"], known[quantity], ragged=ragged)
                found.append(RegimeSet(name, kernel, quantity, known, fit))
    return found


def _kernels(rows: pd.DataFrame) -> str:
    return "+".join(sorted({str(kernel) for kernel in rows["attention_kernel"]}))


def find_regimes(regimes: Sequence[RegimeSet], name: str, quantity: str) -> RegimeSet | None:
    """The fit of one set (not ``kernels``, which has several) and quantity; None where there is none."""
    return next((r for r in regimes if r.set == name and r.quantity == quantity), None)


def regime_fits(campaign: Campaign) -> pd.DataFrame:
    """regime_fits.csv, columns :data:`REGIME_FIT_COLUMNS`: coefficients, with (``tiles``) and without
    (``smooth``) the cost of ragged token counts, and the rates that they imply.

    Rates: counted FLOP a token² (or token) over its time; of ``step_time_s`` only.  The linear one has the
    time of norms, rotary embeddings and other linear operations in it, whose FLOP are not counted.
    """
    lines: list[dict[str, object]] = []
    flop = step_flop(campaign.model)
    for ragged in (True, False):
        for regimes in all_regimes(campaign, ragged=ragged):
            if ragged == regimes.fit.ragged_fitted:
                lines += _fit_lines(regimes, flop)
    table = pd.DataFrame(lines, columns=list(REGIME_FIT_COLUMNS))
    return table.sort_values(["set", "attention_kernel", "quantity", "model"], kind="stable")


def _fit_lines(regimes: RegimeSet, flop: StepFlop) -> Iterator[dict[str, object]]:
    fit = regimes.fit
    unit = regimes.quantity.rsplit("_", 1)[1]
    values = {
        name: (float(fit.coefficients[i]), float(fit.low[i]), float(fit.high[i]))
        for i, name in enumerate(COEFFICIENTS[: 4 if fit.ragged_fitted else 3])
    }
    if fit.ragged_fitted:
        values["quadratic+ragged"] = fit.quadratic_ragged
    counted = {"linear": flop.linear, "quadratic": flop.quadratic, "quadratic+ragged": flop.quadratic}
    units = {"constant": unit, "linear": f"{unit}/token"}
    residual = fit.residual_percent
    for name, (value, low, high) in values.items():
        line = {
            "set": regimes.set, "attention_kernel": regimes.attention_kernel, "quantity": regimes.quantity,
            "model": regimes.model, "coefficient": name, "value": value, "ci95_low": low, "ci95_high": high,
            "unit": units.get(name, f"{unit}/token²"), "n": len(regimes.rows), "aic": fit.aic,
            "rms_residual_percent": float(np.sqrt(np.mean(residual**2))),
            "largest_residual_percent": float(np.abs(residual).max()),
        }  # fmt: skip
        if regimes.quantity == "step_time_s" and name in counted:
            ends = {"rate_TFLOP_per_s": value, "rate_ci95_low": high, "rate_ci95_high": low}
            line |= {column: _rate(counted[name], seconds) for column, seconds in ends.items()}
        yield line


def _rate(flop: float, seconds: float) -> float:
    return flop / seconds / 1e12 if seconds > 0 else nan


def regime_table(campaign: Campaign) -> pd.DataFrame:
    """regimes.csv, columns :data:`REGIME_COLUMNS`: one row a set, quantity and configuration."""
    lines = []
    flop = step_flop(campaign.model)
    for regimes in all_regimes(campaign):
        rows, fit = regimes.rows, regimes.fit
        tokens, whole = rows["tokens"].to_numpy(), rows["whole_tiles"].to_numpy()
        parts = fit.parts(tokens, whole)
        total = parts.sum(axis=0)
        table = rows[["height", "width", "num_frames", "tokens", "whole_tiles"]].assign(
            set=regimes.set, attention_kernel=regimes.attention_kernel, quantity=regimes.quantity,
            measured=rows[regimes.quantity], fitted=total, residual_percent=fit.residual_percent,
            constant_share=parts[0] / total, linear_share=parts[1] / total, quadratic_share=parts[2] / total,
            exponent_fit=fit.exponent(tokens, whole), exponent_flop=flop.exponent(tokens),
            quadratic_flop_share=flop.quadratic_share(tokens),
        )  # fmt: skip
        lines.append(table[list(REGIME_COLUMNS)])
    return pd.concat(lines, ignore_index=True) if lines else pd.DataFrame(columns=list(REGIME_COLUMNS))


# --- doubling -----------------------------------------------------------------------------------------------


def doubling_table(campaign: Campaign) -> pd.DataFrame:
    """doubling.csv, columns :data:`DOUBLING_COLUMNS`: every pair of a sweep in which a dimension doubles.

    ``dimension``: ``height``, ``width``, ``height and width``, ``area`` (tokens double by another shape),
    ``latent frames`` (what the model sees of the frames) or ``steps``.
    """
    lines: list[dict[str, object]] = []
    for name in SETS:
        rows = campaign.of(name)
        for (_, a), (_, b) in combinations(rows.iterrows(), 2):
            for first, second in ((a, b), (b, a)):
                if dimension := doubled_dimension(first, second):
                    lines += _doubling_lines(campaign, name, dimension, first, second)
    return pd.DataFrame(lines, columns=list(DOUBLING_COLUMNS))


def doubled_dimension(first: pd.Series, second: pd.Series) -> str | None:
    """Which dimension doubles from ``first`` to ``second`` while the others stay; None if none does."""
    columns = ("height", "width", "latent_frames", "num_inference_steps")
    ratio = {c: float(second[c]) / float(first[c]) for c in columns}
    named: dict[tuple[float, ...], str] = {
        (2, 1, 1, 1): "height",
        (1, 2, 1, 1): "width",
        (2, 2, 1, 1): "height and width",
        (1, 1, 2, 1): "latent frames",
        (1, 1, 1, 2): "steps",
    }
    found = named.get(tuple(ratio.values()))
    same = ratio["latent_frames"] == ratio["num_inference_steps"] == 1
    return "area" if found is None and same and second["tokens"] == 2 * first["tokens"] else found


def study_ratio(dimension: str) -> float:
    """What the study's section 6 says that doubling costs: ×4 a dimension, ×16 for H and W, ×2 for steps."""
    if dimension == "steps":
        return 2.0
    return STUDY_RATIO_OF_DIMENSION ** (2 if dimension == "height and width" else 1)


def _doubling_lines(
    campaign: Campaign, name: str, dimension: str, first: pd.Series, second: pd.Series
) -> Iterator[dict[str, object]]:
    works = [
        true_work(
            campaign.model,
            *(int(row[c]) for c in ("height", "width", "num_frames", "num_inference_steps")),
        )
        for row in (first, second)
    ]
    for quantity in VIDEO_QUANTITIES:
        ratio = float(second[quantity]) / float(first[quantity])
        if isfinite(ratio):
            half, parts = ratio_half_width(first, second, quantity, campaign.scatter)
            yield {
                "set": name, "dimension": dimension, "from": first["label"], "to": second["label"],
                "factor": 2, "tokens_factor": float(second["tokens"]) / float(first["tokens"]),
                "quantity": quantity, "ratio": ratio, "ratio_ci95_low": ratio * exp(-half),
                "ratio_ci95_high": ratio * exp(half), "interval_of": parts,
                "ratio_study": study_ratio(dimension),
                "ratio_flop": works[1].total_flop / works[0].total_flop,
                "whole_tiles_from": bool(first["whole_tiles"]), "whole_tiles_to": bool(second["whole_tiles"]),
            }  # fmt: skip
