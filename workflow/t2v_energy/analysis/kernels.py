"""What an attention kernel does to cost: FlashAttention-2 forced against what torch chooses by itself.

The study's software ran FlashAttention-2; torch 2.11 prefers cuDNN's attention on Hopper.  Experiment
``kernels`` measures both at five sizes.  A kernel that is forced binds the denoiser alone: the VAE and the
text encoder keep torch's choice, so all of the difference is in the denoising steps.

A step has parts that are constant, linear and quadratic in the token count ℓ (table 1 of the study), and only
QKᵀ and PV are quadratic.  So one regression, t = c₀ + c₁ ℓ + c₂ ℓ² with c₀ and c₁ shared by the kernels and a
c₂ for each (:func:`fit_jointly`), tells the rate of each kernel, which the difference of two step times alone
does not: that is one equation for two rates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student_t

from t2v_energy.analysis.rows import read_rows
from t2v_energy.analysis.sweep import Count, count_work, fit_efficiency
from t2v_energy.analysis.validation import UNITS, on_one_board
from t2v_energy.config import (
    Accelerator,
    AttentionKernel,
    ModelFile,
    load_accelerator,
    load_campaign,
    load_model,
)
from t2v_energy.errors import UserError

Array = NDArray[np.float64]

EXPERIMENT = "kernels"
DEFAULT, FORCED = "default", "flash"
"""What is compared: torch's own choice, and the kernel that the study's software ran."""
CONFIDENCE = 0.95
COMPARED = ("latency_s", "gpu_energy_Wh", "step_time_s", "step_energy_J", "mean_power_W", "once_s")
EFFICIENCIES: Mapping[str, Count] = {"mu_study": "study", "mu_true": "true"}
"""µ = F / (t Θ) of one size, by count of FLOP: the study's printed formula, and what is executed."""

KERNELS_COLUMNS = (
    "height", "width", "num_frames", "num_inference_steps", "tokens", "quantity", "unit", "default",
    "default_ci95", "flash", "flash_ci95", "ratio", "ratio_ci95", "fitted_ratio", "default_kernel",
    "flash_kernel", "same_board", "gpu_uuid", "kind",
)  # fmt: skip
FIT_COLUMNS = (
    "parameter", "kernel", "value", "ci95_low", "ci95_high", "unit", "r2", "largest_residual_percent", "n",
    "kind",
)  # fmt: skip


# --- the measured rows --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernels:
    """The rows of experiment ``kernels``, by size, each size measured both ways.

    Attributes:
        default, forced: rows with torch's choice and with the forced kernel, of the same sizes in the same
            order, by rising ``tokens`` (added here).
        model, accelerator: the campaign's.
        source: path of the table, as it was given.
    """

    default: pd.DataFrame
    forced: pd.DataFrame
    model: ModelFile
    accelerator: Accelerator
    source: str

    @property
    def tokens(self) -> Array:
        """ℓ of each size."""
        return self.default["tokens"].to_numpy(dtype=np.float64)

    @property
    def peak_FLOP_per_s(self) -> float:
        """Θ_peak, dense bf16."""
        return self.accelerator.peak_bf16_dense_TFLOPs * 1e12

    @property
    def named(self) -> dict[str, str]:
        """The kernels that really ran, by ``default`` and ``flash``."""
        return {
            name: "+".join(sorted(set(rows["attention_kernel"])))
            for name, rows in ((DEFAULT, self.default), (FORCED, self.forced))
        }

    @property
    def attention_flop(self) -> float:
        """FLOP of QKᵀ and PV of all self-attention of one denoising step, for each ℓ²."""
        row = self.default.iloc[0]
        square = []
        for factor in (1, 2):  # cross-attention is linear in ℓ: it falls out of 4 F(ℓ) against F(2ℓ)
            size = (int(row["height"]), factor * int(row["width"]))
            work = count_work("true", self.model, *size, int(row["num_frames"]), 1)
            square.append((work.tokens, work.attention_flop))
        (single, first), (double, second) = square
        return (second - first * double / single) / (double**2 - single * double)

    def flop(self, count: Count) -> Array:
        """FLOP of one whole video of each size, by one of the two counts."""
        return np.array([_work_flop(count, self.model, row) for _, row in self.default.iterrows()])


def _work_flop(count: Count, model: ModelFile, row: pd.Series) -> float:
    sizes = (int(row[name]) for name in ("height", "width", "num_frames", "num_inference_steps"))
    return count_work(count, model, *sizes).total_flop


def read_kernels(root: Path, campaign: str, configurations: Path) -> Kernels | None:
    """Experiment ``kernels`` of a campaign; None where no size was measured both ways.

    Raises:
        UserError: the table is missing, or the experiment mixes models.
    """
    path = root / configurations
    table = read_rows(path)
    rows = table[(table["experiment"] == EXPERIMENT) & (table["status"] == "ok")].copy()
    if rows.empty:
        return None
    models = sorted(rows["model"].unique())
    if len(models) != 1:
        raise UserError(
            f"experiment {EXPERIMENT!r} has rows of {len(models)} models",
            where=str(path),
            remedy="measure it with one model",
        )
    model = load_model(root, models[0])
    rows["asked"] = [asked_kernel(name) for name in rows["configuration_id"]]
    rows["tokens"] = [_tokens(model, row) for _, row in rows.iterrows()]
    size = ["tokens", "height", "width", "num_frames", "num_inference_steps"]
    ways = [rows[rows["asked"] == name].set_index(size).sort_index() for name in (DEFAULT, FORCED)]
    both = ways[0].index.intersection(ways[1].index)
    if not len(both):
        return None
    default, forced = (way.loc[both].reset_index() for way in ways)
    accelerator = load_accelerator(root, load_campaign(root, campaign).accelerator)
    return Kernels(default, forced, model, accelerator, str(configurations))


def asked_kernel(configuration_id: str) -> str:
    """The kernel that a configuration id names, or ``default`` where it leaves the choice to torch."""
    known = get_args(AttentionKernel)
    return next((part for part in configuration_id.split("__")[1:] if part in known), DEFAULT)


def _tokens(model: ModelFile, row: pd.Series) -> int:
    return count_work("true", model, int(row["height"]), int(row["width"]), int(row["num_frames"]), 1).tokens


# --- the joint fit ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JointFit:
    """y = c₀ + c₁ ℓ + c₂ ℓ², c₀ and c₁ shared by two series, c₂ their own; residuals in percent of y.

    Attributes:
        constant, linear: c₀ and c₁.
        quadratic: c₂ by series.
        half_widths: of the 95 % intervals of ``constant``, ``linear`` and the series' c₂; NaN where there are
            no more points than parameters.
        covariance: of (c₀, c₁, c₂ of each series).
        r2: of y about its mean.
        largest_residual_percent: of the fitted points.
        n: points.
    """

    constant: float
    linear: float
    quadratic: dict[str, float]
    half_widths: dict[str, float]
    covariance: Array
    r2: float
    largest_residual_percent: float
    n: int

    def predict(self, tokens: ArrayLike, series: str) -> Array:
        """The fitted y of one series at ``tokens``."""
        x = np.asarray(tokens, dtype=np.float64)
        return np.asarray(self.constant + self.linear * x + self.quadratic[series] * x**2, dtype=np.float64)


def fit_jointly(tokens: ArrayLike, series: Mapping[str, ArrayLike]) -> JointFit:
    """Least squares of relative residuals, every series at the same ``tokens``.

    Relative, because a step of the largest size takes a hundred times one of the smallest, and both are
    measured to some tenths of a percent.

    Raises:
        UserError: fewer than three different ℓ, or a value that is not positive.
    """
    x = np.asarray(tokens, dtype=np.float64)
    y = np.concatenate([np.asarray(values, dtype=np.float64) for values in series.values()])
    if np.unique(x).size < 3 or y.size != len(series) * x.size or not np.all(y > 0):
        raise UserError(
            "a fit of c₀ + c₁ ℓ + c₂ ℓ² needs three sizes, each with positive costs; "
            f"there are {np.unique(x).size}",
            remedy="measure more sizes of experiment kernels",
        )
    scale = float(x.max())
    blocks = []
    for place in range(len(series)):
        own = np.zeros((x.size, len(series)))
        own[:, place] = (x / scale) ** 2
        blocks.append(np.column_stack([np.ones_like(x), x / scale, own]))
    design = np.concatenate(blocks)
    units = np.array([1.0, scale, *[scale**2] * len(series)])
    weighted = design / y[:, None]
    solution = np.linalg.lstsq(weighted, np.ones_like(y), rcond=None)[0]
    residual = 1 - weighted @ solution
    freedom = y.size - solution.size
    inverse = np.linalg.inv(weighted.T @ weighted)
    variance = float(residual @ residual) / freedom if freedom > 0 else nan
    covariance = inverse * variance / np.outer(units, units)
    quantile = float(student_t.ppf((1 + CONFIDENCE) / 2, freedom)) if freedom > 0 else nan
    half = quantile * np.sqrt(np.diag(covariance))
    values = solution / units
    total = float(np.sum((y - y.mean()) ** 2))
    return JointFit(
        constant=float(values[0]),
        linear=float(values[1]),
        quadratic=dict(zip(series, map(float, values[2:]), strict=True)),
        half_widths=dict(zip(("constant", "linear", *series), map(float, half), strict=True)),
        covariance=covariance,
        r2=1 - float(np.sum((y * residual) ** 2)) / total,
        largest_residual_percent=100 * float(np.abs(residual).max()),
        n=y.size,
    )


def fits(kernels: Kernels) -> dict[str, JointFit]:
    """The joint fit of ``step_time_s`` and, where there is a counter, of ``step_energy_J``.

    Empty where there are fewer than three sizes.
    """
    if np.unique(kernels.tokens).size < 3:
        return {}
    found = {}
    for quantity in ("step_time_s", "step_energy_J"):
        series = {DEFAULT: kernels.default[quantity], FORCED: kernels.forced[quantity]}
        if all(values.notna().all() for values in series.values()):
            found[quantity] = fit_jointly(kernels.tokens, series)
    return found


@dataclass(frozen=True)
class Estimated:
    """A value with the ends of its 95 % interval (NaN where unknown)."""

    value: float
    low: float
    high: float


def rates(kernels: Kernels, fit: JointFit) -> dict[str, Estimated]:
    """Rate of each kernel in FLOP/s: FLOP for each ℓ² over c₂; the interval is that of c₂."""
    found = {}
    for name, slope in fit.quadratic.items():
        half = fit.half_widths[name]
        ends = (kernels.attention_flop / (slope + half), kernels.attention_flop / (slope - half))
        found[name] = Estimated(kernels.attention_flop / slope, ends[0], ends[1] if slope > half else nan)
    return found


def rate_ratio(fit: JointFit) -> Estimated:
    """Rate of the forced kernel over the default's, c₂ default / c₂ forced, by the delta method."""
    default, forced = fit.quadratic[DEFAULT], fit.quadratic[FORCED]
    ratio = default / forced
    gradient = np.zeros(fit.covariance.shape[0])
    gradient[2:] = (1 / forced, -ratio / forced)
    freedom = fit.n - gradient.size
    if freedom < 1:
        return Estimated(ratio, nan, nan)
    error = float(np.sqrt(gradient @ fit.covariance @ gradient))
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    return Estimated(ratio, ratio - half, ratio + half)


# --- tables -------------------------------------------------------------------------------------------------


def kernels_table(kernels: Kernels | None) -> pd.DataFrame:
    """``kernels.csv``, columns :data:`KERNELS_COLUMNS`: one row a size and quantity; empty without any.

    The quantities of configurations.csv, then µ by the study's printed formula (``mu_study``) and by the work
    that is executed (``mu_true``, the model FLOP utilisation), both with the accelerator's peak; their
    intervals are latency's.  ``attention_rate`` is that of each kernel at this size alone: its FLOP over what
    the joint fit leaves of the measured step, t − c₀ − c₁ ℓ; where it changes with ℓ, the fit's one rate is a
    mean.  ``ratio`` is flash over default, its half-width the two relative ones in quadrature.
    ``fitted_ratio`` is what the joint fit says of it, with the measured once-a-video parts.
    """
    found: list[dict[str, object]] = []
    if kernels is None:
        return pd.DataFrame(found, columns=list(KERNELS_COLUMNS))
    predicted = fitted_ratios(kernels)
    step_fit = fits(kernels).get("step_time_s")
    for place, ((_, default), (_, forced)) in enumerate(
        zip(kernels.default.iterrows(), kernels.forced.iterrows(), strict=True)
    ):
        shared = {
            name: int(default[name])
            for name in ("height", "width", "num_frames", "num_inference_steps", "tokens")
        }
        rows = [_measured(default, forced, quantity) for quantity in COMPARED]
        rows += [_efficiency(kernels, default, forced, name) for name in EFFICIENCIES]
        if step_fit is not None:
            rows.append(_rate(kernels, step_fit, default, forced))
        for row in rows:
            if isfinite(float(str(row["ratio"]))):
                fitted = predicted.get(str(row["quantity"]))
                found.append(shared | row | {"fitted_ratio": nan if fitted is None else fitted[place]})
    return pd.DataFrame(found, columns=list(KERNELS_COLUMNS))


def _measured(default: pd.Series, forced: pd.Series, quantity: str) -> dict[str, object]:
    pair = on_one_board(default, forced, quantity)
    return {
        "quantity": quantity,
        "unit": UNITS[quantity],
        "default": pair.first,
        "default_ci95": pair.first_ci95,
        "flash": pair.second,
        "flash_ci95": pair.second_ci95,
        "ratio": pair.ratio,
        "ratio_ci95": pair.ratio_ci95,
        "default_kernel": default["attention_kernel"],
        "flash_kernel": forced["attention_kernel"],
        "same_board": pair.same_board,
        "gpu_uuid": pair.boards,
        "kind": "measured",
    }


def _efficiency(kernels: Kernels, default: pd.Series, forced: pd.Series, name: str) -> dict[str, object]:
    row = _measured(default, forced, "latency_s")
    if kernels.accelerator.nominal:  # its peak is no hardware's
        return row | {"ratio": nan}
    allowed = _work_flop(EFFICIENCIES[name], kernels.model, default) / kernels.peak_FLOP_per_s
    efficiencies: dict[str, object] = {"quantity": name, "unit": "", "kind": "modelled"}
    for way in (DEFAULT, FORCED):
        latency, half = float(str(row[way])), float(str(row[f"{way}_ci95"]))
        efficiencies |= {way: allowed / latency, f"{way}_ci95": allowed / latency * half / latency}
    ratio = float(str(row["default"])) / float(str(row["flash"]))
    relative = float(str(row["ratio_ci95"])) / float(str(row["ratio"]))
    return row | efficiencies | {"ratio": ratio, "ratio_ci95": ratio * relative}


def _rate(kernels: Kernels, fit: JointFit, default: pd.Series, forced: pd.Series) -> dict[str, object]:
    """Rate of QKᵀ and PV of both kernels at one size, TFLOP/s; without intervals."""
    tokens = float(default["tokens"])
    shared_s = fit.constant + fit.linear * tokens
    flop = kernels.attention_flop * tokens**2
    found = [flop / (float(row["step_time_s"]) - shared_s) / 1e12 for row in (default, forced)]
    return _measured(default, forced, "step_time_s") | {
        "quantity": "attention_rate",
        "unit": "TFLOP/s",
        "default": found[0],
        "flash": found[1],
        "ratio": found[1] / found[0],
        "default_ci95": nan,
        "flash_ci95": nan,
        "ratio_ci95": nan,
        "kind": "modelled",
    }


def fitted_ratios(kernels: Kernels) -> dict[str, Array]:
    """flash over default by the joint fits, at the measured sizes, by quantity; see :func:`ratio_curve`."""
    return {
        name: np.interp(kernels.tokens, curve["tokens"], curve[name])
        for curve in [ratio_curve(kernels, kernels.tokens)]
        for name in curve.columns.drop("tokens")
    }


def ratio_curve(kernels: Kernels, tokens: ArrayLike) -> pd.DataFrame:
    """flash over default by the joint fits: columns ``tokens`` and each quantity that can be predicted.

    A video is S fitted steps and what comes once, which is the default's measured value, interpolated
    linearly in ℓ between sizes; S is the experiment's.  Empty but for ``tokens`` where there is no fit.

    Raises:
        UserError: the sizes differ in their number of steps.
    """
    x = np.asarray(tokens, dtype=np.float64)
    curve = pd.DataFrame({"tokens": x})
    found = fits(kernels)
    counts = kernels.default["num_inference_steps"].unique()
    if found and len(counts) != 1:
        raise UserError(f"the sizes differ in their steps: {sorted(counts)}", where=kernels.source)
    for quantity, total, once in (
        ("step_time_s", "latency_s", kernels.default["once_s"]),
        ("step_energy_J", "gpu_energy_Wh", _once_J(kernels.default)),
    ):
        if quantity in found:
            steps = {way: found[quantity].predict(x, way) for way in (DEFAULT, FORCED)}
            rest = np.interp(x, kernels.tokens, once)
            curve[quantity] = steps[FORCED] / steps[DEFAULT]
            curve[total] = (rest + counts[0] * steps[FORCED]) / (rest + counts[0] * steps[DEFAULT])
    return curve


def _once_J(rows: pd.DataFrame) -> pd.Series:
    return 3600 * rows["gpu_energy_Wh"] - rows["num_inference_steps"] * rows["step_energy_J"]


def fit_table(kernels: Kernels | None) -> pd.DataFrame:
    """``kernels_fit.csv``, columns :data:`FIT_COLUMNS`: what the joint fits and the regressions of µ say.

    ``c0``, ``c1``, ``c2`` of step time and energy; ``attention_rate`` (TFLOP/s of QKᵀ and PV) and
    ``attention_peak_share`` of each kernel, ``attention_rate_ratio`` (flash over default), and ``mu_study``
    and ``mu_true``: µ by regression of latency on FLOP through the origin over these sizes, as the study
    calibrated its 0.456 (section 3.4), for each kernel.
    """
    rows: list[tuple[object, ...]] = []
    if kernels is None:
        return pd.DataFrame(rows, columns=list(FIT_COLUMNS))
    for quantity, fit in fits(kernels).items():
        unit = UNITS[quantity]
        quality = (fit.r2, fit.largest_residual_percent, fit.n, "modelled")
        values = {
            ("c0", "", unit): (fit.constant, "constant"),
            ("c1", "", f"{unit}/token"): (fit.linear, "linear"),
            **{("c2", way, f"{unit}/token²"): (fit.quadratic[way], way) for way in (DEFAULT, FORCED)},
        }
        for (name, way, own_unit), (value, key) in values.items():
            half = fit.half_widths[key]
            rows.append((f"{quantity}.{name}", way, value, value - half, value + half, own_unit, *quality))
        if quantity == "step_time_s":
            rows += _rate_rows(kernels, fit, quality)
    if not kernels.accelerator.nominal and len(kernels.default) > 1:
        rows += _efficiency_rows(kernels)
    return pd.DataFrame(rows, columns=list(FIT_COLUMNS))


def _rate_rows(kernels: Kernels, fit: JointFit, quality: tuple[object, ...]) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for way, rate in rates(kernels, fit).items():
        scales = {("attention_rate", "TFLOP/s"): 1e12}
        if not kernels.accelerator.nominal:
            scales["attention_peak_share", ""] = kernels.peak_FLOP_per_s
        for (name, unit), by in scales.items():
            rows.append((name, way, rate.value / by, rate.low / by, rate.high / by, unit, *quality))
    ratio = rate_ratio(fit)
    return [*rows, ("attention_rate_ratio", FORCED, ratio.value, ratio.low, ratio.high, "", *quality)]


def _efficiency_rows(kernels: Kernels) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for name, count in EFFICIENCIES.items():
        flop = kernels.flop(count)
        for way, measured in ((DEFAULT, kernels.default), (FORCED, kernels.forced)):
            fit = fit_efficiency(flop, measured["latency_s"], kernels.peak_FLOP_per_s)
            predicted = flop / (fit.value * kernels.peak_FLOP_per_s)
            largest = 100 * float(np.abs(predicted / measured["latency_s"] - 1).max())
            rows.append((name, way, fit.value, fit.low, fit.high, "", fit.r2, largest, fit.n, "modelled"))
    return rows
