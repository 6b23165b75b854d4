"""The calibrated cost model (predictor ``calibrated``): work by class of operator at fitted rates.

Time of a video, with shares of the accelerator's published peak Θ (FLOP/s) and bandwidth B (B/s)::

    t = max(device work of the denoiser, launches · τ) + max(that of the decoder, launches · τ)
        + max(that of the text encoders, launches · τ) + values · host + calls · call + video

    device work = pace · own · (A / (s_A Θ) · (1 + slope · ln(L / L₀)) · (1 − gain · [128 divides L])
                                + D / (s_D Θ) + e · P / (s_M B) + C / (s_C Θ) + c · Q / (s_M B)
                                + M / (s_M B) + rows · ρ + G · γ)

A: FLOP of QKᵀ and PV at length L (heads below 128 have a share of their own), D: all other matrix products, of
whose bytes P a part e is not hidden behind arithmetic; C: FLOP of convolutions (shares by number type), whose
layout is changed before and after them (c times their bytes Q); M: bytes of element-wise kernels; rows of norms
that are too narrow to be bound by bytes; G: values of group norms for each block that works on them at once;
``own``: paces of single boards and models against the others, where points name several.  Launches are
asynchronous, so that the longer of host and device counts; the maximum is smooth (:data:`SHARPNESS`) because
either may be ahead within a call.  Mean power is the mean of the parts' own, weighted with their times; energy
is its product with time.  The power cap is in the parts' powers, which it holds at the board's limit, and in
their rates, those of the clocks that it allows.

Parameters are logarithms (gain and slope are not), presumed normal about config/prediction.yaml, or about what
single operators took on this accelerator (:mod:`t2v_energy.prediction.rates`), fitted to relative errors:
maximum a posteriori by Gauss-Newton, covariance from the curvature there (Laplace's approximation; for example
Bishop, Pattern Recognition and Machine Learning, section 4.4).  What no parameter explains is estimated from
the residuals, presumed beforehand as an inverse χ² worth a few points; hence Student's t.  Few points move
what they inform and leave the rest as presumed, its spread in the interval.

Predicting needs numpy alone: no torch, no scipy.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import hypot, isfinite, sqrt
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from t2v_energy.config import Accelerator, Configuration, Strict, load_accelerator, parse
from t2v_energy.errors import UserError
from t2v_energy.prediction.features import Features, Floats, Point, features
from t2v_energy.prediction.presumed import Outside, PredictionFile, Presumed, load_presumed
from t2v_energy.prediction.single_mu import Prediction
from t2v_energy.work.traffic import BLOCKS

CALIBRATIONS = Path("config") / "calibrations"
"""Shipped calibrations, one an accelerator."""
REFERENCE_TOKENS = 32768.0
SECONDS_PER_HOUR = 3600.0
CONFIDENCE = 0.90
MIN_POINTS = 4
MIN_RANK, RANK_TOLERANCE = 3, 3e-3
ITERATIONS, ROUNDS = 60, 4
CLASSES = ("attention", "dense", "text", "traffic", "vae", "host", "call", "video")
"""Parts of a video's time; the last three are not on the device.  ``dense``: matrix products and a U-Net's
convolutions, ``traffic``: element-wise kernels and norms, ``call``: what calls of the denoiser take beyond the
device's work."""
PARTS: Mapping[str, tuple[str, str]] = {
    "attention": ("attention", "attention"),
    "products": ("dense", "dense"),
    "convolution": ("dense", "convolution"),
    "traffic": ("traffic", "traffic"),
    "norm": ("traffic", "traffic"),
    "group_norm": ("traffic", "traffic"),
    "group_norm_wait": ("traffic", "launch"),
    "vae_convolution": ("vae", "convolution"),
    "vae_traffic": ("vae", "traffic"),
    "vae_group_norm": ("vae", "traffic"),
    "vae_group_norm_wait": ("vae", "launch"),
    "vae_launch": ("vae", "launch"),
    "text": ("text", "dense"),
    "text_launch": ("text", "launch"),
    "launch": ("call", "launch"),
    "call": ("call", "launch"),
    "host": ("host", "wait"),
    "video": ("video", "wait"),
}
"""What is reckoned apart: its class, and whose power it draws.  A group norm of few groups lets most of the
device wait (``_wait``); ``_launch`` is what launching takes beyond the device's work."""
DENOISER_PARTS = (
    "attention",
    "products",
    "convolution",
    "traffic",
    "norm",
    "group_norm",
    "group_norm_wait",
)
DECODER_PARTS = ("vae_convolution", "vae_traffic", "vae_group_norm", "vae_group_norm_wait")
TEXT_PARTS = ("text",)
SHARPNESS = 4.0
"""Exponent n of the smooth maximum (xⁿ + yⁿ)^(1/n)."""
STAGE_OF_CLASS = {
    "attention": "denoiser",
    "dense": "denoiser",
    "traffic": "denoiser",
    "call": "denoiser",
    "text": "text_encoder",
    "vae": "vae_decode",
    "host": "host",
    "video": "host",
}
Forward = Callable[[Floats], tuple[Floats, Floats]]
"""From parameters to predicted logarithms, shape (n,), and their derivatives, shape (n, p)."""
Quantity = Literal["latency_s", "gpu_energy_Wh"]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Parameters(Strict):
    """Fitted parameters: names, means (logarithms, but for :data:`LINEAR`) and their covariance."""

    names: list[str]
    mean: list[Finite]
    covariance: list[list[Finite]]
    misfit: Annotated[float, Field(gt=0)]
    """Relative standard deviation that no parameter explains."""
    t90: Annotated[float, Field(gt=1)]
    """Half-width of a 90 % interval in standard deviations."""


class Calibration(Strict):
    """A cost model fitted to one accelerator; ``points`` is 0 where nothing was measured on it."""

    schema_version: Literal[1] = 1
    kind: Literal["modelled"] = "modelled"
    accelerator: str
    points: int
    models: list[str]
    tokens: tuple[float, float] | None
    """Least and largest length that attention saw in the points."""
    boards: list[str]
    time: Parameters
    power: Parameters
    outside: Outside
    notes: list[str]


@dataclass(frozen=True)
class Predictions:
    """Costs of n configurations; arrays of shape (n,), all ``modelled``.

    Attributes:
        latency_s, gpu_energy_Wh: whole video, with the bounds of its 90 % interval.
        class_s: time of each of :data:`CLASSES`, shape (n, 8).
        notes: what to know of each: rounded frames, extrapolation, an accelerator that nobody measured.
    """

    latency_s: Floats
    latency_s_low: Floats
    latency_s_high: Floats
    gpu_energy_Wh: Floats
    gpu_energy_Wh_low: Floats
    gpu_energy_Wh_high: Floats
    class_s: Floats
    class_Wh: Floats
    work: Features
    notes: list[str]

    def interval(self, quantity: Quantity) -> tuple[Floats, Floats, Floats]:
        """Value, lower and upper bound."""
        return tuple(getattr(self, f"{quantity}{end}") for end in ("", "_low", "_high"))


# --- the forward model ------------------------------------------------------------------------------------

TIME_NAMES = (
    "pace",
    "attention",
    "attention_narrow",
    "attention_gain",
    "attention_slope",
    "dense",
    "exposed",
    "traffic",
    "norm_row",
    "group_norm",
    "convolution_float32",
    "convolution_half",
    "layout",
    "launch",
    "host",
    "call",
    "video",
)
LINEAR = ("attention_gain", "attention_slope")
"""Parameters that are no logarithms: both may be nought or below."""
POWER_NAMES = ("level", "attention", "dense", "convolution", "traffic", "launch", "wait")
BOARD, MODEL = "board:", "model:"


@dataclass(frozen=True)
class Times:
    """Seconds of each of :data:`PARTS`, shape (n, parts), and derivatives of ln t by the parameters, (n, p)."""

    part_s: Floats
    derivatives: Floats

    @property
    def class_s(self) -> Floats:
        """Seconds of each of :data:`CLASSES`, shape (n, 8)."""
        return _by_class(self.part_s)


def _by_class(parts: Floats) -> Floats:
    of = np.array([[cls == own for cls in CLASSES] for own, _ in PARTS.values()], dtype=np.float64)
    summed: Floats = parts @ of
    return summed


class _Parts:
    """Adds up parts of a video's time with their derivatives."""

    def __init__(self, theta: Floats, effects: Floats, count: int) -> None:
        self.value = dict(zip(TIME_NAMES, theta, strict=False))
        self.effects = effects
        self.pace = np.exp(self.value["pace"] + effects @ theta[len(TIME_NAMES) :])
        self.seconds = {name: np.zeros(count) for name in PARTS}
        self.by = {name: np.zeros((count, len(theta))) for name in PARTS}

    def add(self, part: str, seconds: Floats, powers: Mapping[str, int], *, paced: bool) -> None:
        """Add ``seconds``, which go with the parameters' exponentials to the power of ``powers``."""
        if paced:
            seconds = seconds * self.pace
            self.by[part][:, 0] += seconds
            self.by[part][:, len(TIME_NAMES) :] += seconds[:, None] * self.effects
        self.seconds[part] += seconds
        for name, power in powers.items():
            self.by[part][:, TIME_NAMES.index(name)] += power * seconds

    def at_rate(self, part: str, amount: Floats, name: str, limit: float) -> None:
        """``amount`` at a share ``name`` of ``limit`` a second."""
        self.add(part, amount / (np.exp(self.value[name]) * limit), {name: -1}, paced=True)

    def exposed(self, part: str, moved: Floats, name: str, bandwidth: float) -> None:
        """A part (or multiple) ``name`` of bytes ``moved``, at the rate of element-wise kernels."""
        seconds = np.exp(self.value[name] - self.value["traffic"]) * moved / bandwidth
        self.add(part, seconds, {name: 1, "traffic": -1}, paced=True)

    def each(self, part: str, count: Floats, name: str, *, paced: bool = False) -> None:
        """``count`` times the seconds ``name``."""
        self.add(part, np.exp(self.value[name]) * count, {name: 1}, paced=paced)

    def group_norm(self, part: str, values: Floats, serial: Floats) -> None:
        """Its time is that of its longest block; what the other blocks wait is told apart."""
        busy = values / BLOCKS
        self.each(part, busy, "group_norm", paced=True)
        self.each(f"{part}_wait", serial - busy, "group_norm", paced=True)

    def launched(self, part: str, kernels: Floats, device: Sequence[str]) -> None:
        """What launching ``kernels`` takes beyond the time of the parts ``device``."""
        host = np.exp(self.value["launch"]) * kernels
        work = np.sum([self.seconds[name] for name in device], axis=0)
        by_work = np.sum([self.by[name] for name in device], axis=0)
        longer = np.maximum(np.maximum(host, work), 1e-30)
        both = longer * ((host / longer) ** SHARPNESS + (work / longer) ** SHARPNESS) ** (1 / SHARPNESS)
        of_host, of_work = ((x / both) ** (SHARPNESS - 1) for x in (host, work))
        self.seconds[part] += both - work
        self.by[part] += (of_work - 1)[:, None] * by_work
        self.by[part][:, TIME_NAMES.index("launch")] += of_host * host

    def times(self) -> Times:
        """All parts together."""
        part_s = np.column_stack([self.seconds[name] for name in PARTS])
        derivatives: Floats = np.sum([self.by[name] for name in PARTS], axis=0)
        return Times(part_s, derivatives / part_s.sum(axis=1)[:, None])


def _times(theta: Floats, effects: Floats, work: Features, accelerator: Accelerator) -> Times:
    """Times of ``work``.

    ``effects``, shape (n, m), says which of the last m parameters (paces of boards, models) each point has.
    """
    peak = accelerator.peak_bf16_dense_TFLOPs * 1e12
    bandwidth = accelerator.bandwidth_TB_per_s * 1e12
    parts = _Parts(theta, effects, len(work))
    _attention(parts, work, peak)
    parts.at_rate("products", work.dense_flop, "dense", peak)
    parts.exposed("products", work.product_bytes, "exposed", bandwidth)
    parts.at_rate("convolution", work.convolution_flop, "convolution_half", peak)
    parts.exposed("convolution", work.convolution_bytes, "layout", bandwidth)
    parts.at_rate("traffic", work.traffic_bytes, "traffic", bandwidth)
    parts.each("norm", work.norm_rows, "norm_row", paced=True)
    parts.group_norm("group_norm", work.group_norm_values, work.group_norm_serial)
    parts.at_rate("vae_convolution", work.vae_float32_flop, "convolution_float32", peak)
    parts.at_rate("vae_convolution", work.vae_half_flop, "convolution_half", peak)
    parts.exposed("vae_convolution", work.vae_convolution_bytes, "layout", bandwidth)
    parts.at_rate("vae_traffic", work.vae_traffic_bytes, "traffic", bandwidth)
    parts.group_norm("vae_group_norm", work.vae_group_norm_values, work.vae_group_norm_serial)
    parts.at_rate("text", work.text_flop, "dense", peak)
    parts.launched("launch", work.kernels, DENOISER_PARTS)
    parts.launched("vae_launch", work.vae_kernels, DECODER_PARTS)
    parts.launched("text_launch", work.text_kernels, TEXT_PARTS)
    parts.each("call", work.calls, "call")
    parts.each("host", work.output_values, "host")
    parts.each("video", np.ones(len(work)), "video")
    return parts.times()


def _attention(parts: _Parts, work: Features, peak: float) -> None:
    """QKᵀ and PV: by head size, changing with length, less where the length needs no edge."""
    e_folds = np.log(np.maximum(work.tokens, 1) / REFERENCE_TOKENS)
    slope = np.maximum(1 + parts.value["attention_slope"] * e_folds, 0.1)
    edge = 1 - min(float(parts.value["attention_gain"]), 0.9) * work.aligned
    parts.at_rate("attention", work.attention_flop * slope * edge, "attention", peak)
    parts.at_rate("attention", work.attention_narrow_flop * slope * edge, "attention_narrow", peak)
    seconds, by = parts.seconds["attention"], parts.by["attention"]
    by[:, TIME_NAMES.index("attention_gain")] = -seconds * work.aligned / edge
    by[:, TIME_NAMES.index("attention_slope")] = seconds * e_folds / slope


def _powers(theta: Floats, part_s: Floats, accelerator: Accelerator) -> tuple[Floats, Floats]:
    """Watts of each part, shape (n, parts), and derivatives of ln(mean power), shape (n, p)."""
    value = dict(zip(POWER_NAMES, theta, strict=True))
    drawn = [power for _, power in PARTS.values()]
    watts = accelerator.board_power_W * np.exp(value["level"] + np.array([value[name] for name in drawn]))
    energy = part_s * watts
    share = energy / energy.sum(axis=1, keepdims=True)
    columns = [np.ones(len(part_s))]
    for name in POWER_NAMES[1:]:
        columns.append(share[:, [power == name for power in drawn]].sum(axis=1))
    return np.broadcast_to(watts, part_s.shape), np.column_stack(columns)


def _effects(points: Sequence[Point], names: Sequence[str]) -> Floats:
    """Part that each named board and model has in each point, shape (n, names).

    A point of several passes may name several boards, joined by ``;``.
    """
    place = {name: index for index, name in enumerate(names)}
    effects = np.zeros((len(points), len(names)))
    for row, point in enumerate(points):
        boards = _boards(point)
        for board in boards:
            if BOARD + board in place:
                effects[row, place[BOARD + board]] += 1 / len(boards)
        if MODEL + point.model in place:
            effects[row, place[MODEL + point.model]] = 1
    return effects


def _boards(point: Point) -> list[str]:
    return [name for name in point.board.split(";") if name]


# --- fitting ----------------------------------------------------------------------------------------------


def calibrate(
    root: Path,
    points: Sequence[Point],
    latency_s: Sequence[float] | Floats,
    gpu_energy_Wh: Sequence[float] | Floats,
    accelerator: str,
    *,
    where: str = "the points",
) -> Calibration:
    """Fit the model to measured points of one accelerator (key of config/accelerators.yaml).

    Args:
        root: the repository's root.
        points: configurations; those that name a ``board`` tell boards apart.
        latency_s, gpu_energy_Wh: measured values of each, whole videos.
        where: what the points are called in messages.

    Raises:
        UserError: fewer than four distinct configurations; points that cannot tell attention, other work and
            what comes once apart; values that are not positive, or of other units; an unknown accelerator or
            model, or a size that a model cannot run.
    """
    limits, presumed = load_accelerator(root, accelerator), load_presumed(root)
    seconds, energy = np.asarray(latency_s, dtype=np.float64), np.asarray(gpu_energy_Wh, dtype=np.float64)
    if not len(points) == len(seconds) == len(energy):
        raise UserError(
            f"{len(points)} points, {len(seconds)} latencies and {len(energy)} energies", where=where
        )
    distinct = len({point[:5] for point in points})
    if distinct < MIN_POINTS:
        raise UserError(
            f"{distinct} distinct configurations are too few to calibrate with",
            where=where,
            remedy=f"measure at least {MIN_POINTS}, of several sizes or lengths and several numbers of steps",
        )
    work = features(root, points)
    _check_units(points, work, seconds, energy, limits, where)
    boards = sorted({name for point in points for name in _boards(point)})
    models = sorted({point.model for point in points})
    # One model's own pace cannot be told from the accelerator's.
    names = [BOARD + board for board in boards] + [MODEL + model for model in models if len(models) > 1]
    effects = _effects(points, names)
    _check_rank(work, presumed, limits, where)
    time = _fit_time(work, seconds, names, effects, presumed, limits)
    part_s = _times(np.array(time.mean), effects, work, limits).part_s
    power = _fit_power(part_s, energy * SECONDS_PER_HOUR / seconds, presumed, limits)
    return Calibration(
        accelerator=accelerator,
        points=len(points),
        models=models,
        tokens=(float(work.tokens.min()), float(work.tokens.max())),
        boards=boards,
        time=time,
        power=power,
        outside=presumed.outside,
        notes=_told_apart(work),
    )


def presumed_calibration(root: Path, accelerator: str) -> Calibration:
    """What is presumed of an accelerator on which nothing was measured: wide intervals."""
    load_accelerator(root, accelerator)
    presumed = load_presumed(root)
    from_prior = {}
    for name, names, section, misfit in (
        ("time", TIME_NAMES, presumed.time, presumed.misfit.time),
        ("power", POWER_NAMES, presumed.power, presumed.misfit.power),
    ):
        mean, spread = _prior(names, section)
        from_prior[name] = Parameters(
            names=list(names),
            mean=mean.tolist(),
            covariance=np.diag(spread**2).tolist(),
            misfit=misfit,
            t90=_student90(presumed.misfit.weight),
        )
    return Calibration(
        accelerator=accelerator,
        points=0,
        models=[],
        tokens=None,
        boards=[],
        time=from_prior["time"],
        power=from_prior["power"],
        outside=presumed.outside,
        notes=["nothing was measured on this accelerator: rates and powers are presumed"],
    )


def _prior(names: Sequence[str], section: object) -> tuple[Floats, Floats]:
    entries: list[Presumed] = [getattr(section, name) for name in names]
    mean = [e.expected if n in LINEAR else np.log(e.expected) for n, e in zip(names, entries, strict=True)]
    return np.array(mean, dtype=np.float64), np.array([e.spread for e in entries])


def _fit_time(
    work: Features,
    seconds: Floats,
    effect_names: list[str],
    effects: Floats,
    presumed: PredictionFile,
    limits: Accelerator,
) -> Parameters:
    mean, spread = _prior(TIME_NAMES, presumed.time)
    between = {BOARD: presumed.time.board.spread, MODEL: presumed.outside.other_model}
    spreads = [between[name[: name.index(":") + 1]] for name in effect_names]
    mean, spread = np.concatenate([mean, np.zeros(len(spreads))]), np.concatenate([spread, spreads])

    def forward(theta: Floats) -> tuple[Floats, Floats]:
        times = _times(theta, effects, work, limits)
        return np.log(times.part_s.sum(axis=1)), times.derivatives

    names = [*TIME_NAMES, *effect_names]
    misfit = presumed.misfit.time
    if not any(
        name.startswith(BOARD) for name in effect_names
    ):  # the points may be of several: how these differ is then part of what is unexplained
        misfit = hypot(misfit, presumed.time.board.spread)
    return _fitted(names, forward, np.log(seconds), mean, spread, misfit, presumed.misfit.weight)


def _fit_power(part_s: Floats, mean_W: Floats, presumed: PredictionFile, limits: Accelerator) -> Parameters:
    mean, spread = _prior(POWER_NAMES, presumed.power)
    share = part_s / part_s.sum(axis=1, keepdims=True)

    def forward(theta: Floats) -> tuple[Floats, Floats]:
        watts, derivatives = _powers(theta, part_s, limits)
        return np.log((share * watts).sum(axis=1)), derivatives

    return _fitted(
        list(POWER_NAMES),
        forward,
        np.log(mean_W),
        mean,
        spread,
        presumed.misfit.power,
        presumed.misfit.weight,
    )


def _fitted(
    names: list[str],
    forward: Forward,
    measured: Floats,
    mean: Floats,
    spread: Floats,
    misfit: float,
    weight: float,
) -> Parameters:
    """Maximum a posteriori of the parameters, alternating with the misfit that the residuals show."""
    sigma, theta = misfit, mean.copy()
    dof = weight
    precision = np.diag(spread**-2)
    for _ in range(ROUNDS):
        theta = _maximum(forward, measured, theta, mean, precision, sigma)
        predicted, jacobian = forward(theta)
        information = jacobian.T @ jacobian / sigma**2
        covariance = np.linalg.inv(information + precision)
        effective = float(np.trace(information @ covariance))
        left = max(len(measured) - effective, 0.0)
        squares = float(np.sum((measured - predicted) ** 2))
        dof = weight + left
        sigma = sqrt((weight * misfit**2 + squares) / dof)
    return Parameters(
        names=names,
        mean=theta.tolist(),
        covariance=((covariance + covariance.T) / 2).tolist(),
        misfit=sigma,
        t90=_student90(dof),
    )


def _maximum(
    forward: Forward, measured: Floats, theta: Floats, mean: Floats, precision: Floats, sigma: float
) -> Floats:
    """Gauss-Newton with Levenberg's damping."""

    def loss(at: Floats) -> float:
        predicted, _ = forward(at)
        return float(np.sum((measured - predicted) ** 2) / sigma**2 + (at - mean) @ precision @ (at - mean))

    damping, current = 1e-3, loss(theta)
    for _ in range(ITERATIONS):
        predicted, jacobian = forward(theta)
        gradient = jacobian.T @ (measured - predicted) / sigma**2 - precision @ (theta - mean)
        curvature = jacobian.T @ jacobian / sigma**2 + precision
        step = np.linalg.solve(curvature + damping * np.diag(np.diag(curvature)), gradient)
        tried = loss(theta + step)
        if isfinite(tried) and tried <= current:
            done = current - tried < 1e-10 * max(current, 1.0)
            theta, current, damping = theta + step, tried, damping / 5
            if done:
                break
        else:
            damping *= 5
    return theta


@cache
def _student90(dof: float) -> float:
    """Half-width of a 90 % interval of Student's t.

    By Cornish and Fisher's expansion about the normal's quantile (Abramowitz and Stegun, 26.7.5): within
    0.1 % from four degrees of freedom on.
    """
    x = 1.6448536269514722
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return x + sum(term / dof**power for power, term in enumerate(terms, start=1))


# --- what is refused --------------------------------------------------------------------------------------

MAX_POWER_SHARE, MIN_POWER_SHARE = 1.5, 0.02
MIN_PEAK_SHARE = 2e-4


def _check_units(
    points: Sequence[Point], work: Features, seconds: Floats, energy: Floats, limits: Accelerator, where: str
) -> None:
    """Raise where a value is not positive, or where time and energy cannot be those of this board."""
    flop = work.attention_flop + work.attention_narrow_flop + work.dense_flop + work.convolution_flop
    for index, point in enumerate(points):
        at = f"{where}, point {index + 1} ({label(point)})"
        for name, value in (("latency_s", seconds[index]), ("gpu_energy_Wh", energy[index])):
            if not (isfinite(value) and value > 0):
                raise UserError(
                    f"{name}: {value:g} is no positive number", where=at, remedy="give the measured value"
                )
        share = flop[index] / seconds[index] / (limits.peak_bf16_dense_TFLOPs * 1e12)
        if not MIN_PEAK_SHARE < share < 1:
            guess = "minutes, or one step" if share >= 1 else "milliseconds"
            raise UserError(
                f"latency_s: {seconds[index]:g} s would be {100 * share:.3g} % of {limits.title}'s peak",
                where=at,
                remedy=f"give seconds of the whole video ({guess}?), or the right accelerator",
            )
        watts = energy[index] * SECONDS_PER_HOUR / seconds[index]
        if not MIN_POWER_SHARE < watts / limits.board_power_W < MAX_POWER_SHARE:
            guess = "joules" if watts > limits.board_power_W else "kilowatt-hours"
            raise UserError(
                f"gpu_energy_Wh: {energy[index]:g} Wh in {seconds[index]:g} s would be {watts:.4g} W; "
                f"the board has {limits.board_power_W:g} W",
                where=at,
                remedy=f"give watt-hours of the board for the whole video ({guess}?), and latency in seconds",
            )


def _check_rank(work: Features, presumed: PredictionFile, limits: Accelerator, where: str) -> None:
    """Raise where the points cannot tell attention, other work that grows with steps, and the rest apart."""
    mean, _ = _prior(TIME_NAMES, presumed.time)
    classes = _times(mean, np.empty((len(work), 0)), work, limits).class_s
    parts = np.column_stack(
        [classes[:, 0], classes[:, [1, 3, 6]].sum(axis=1), classes[:, [2, 4, 5, 7]].sum(axis=1)]
    )
    shares = parts / classes.sum(axis=1, keepdims=True)
    singular = np.linalg.svd(shares / np.linalg.norm(shares, axis=0), compute_uv=False)
    rank = int(np.sum(singular > RANK_TOLERANCE * singular[0]))
    if rank < MIN_RANK:
        raise UserError(
            "the points are collinear: attention, other work of the steps and what comes once a video cannot "
            f"be told apart ({rank} of {MIN_RANK} are independent)",
            where=where,
            remedy="add points of other sizes or lengths, and of other numbers of steps",
        )


def _told_apart(work: Features) -> list[str]:
    """What the points leave to what is presumed."""
    if len(np.unique(work.num_inference_steps)) > 1:
        return []
    return [
        "all points have one number of steps: what a step and what a video costs are told apart as presumed"
    ]


# --- predicting -------------------------------------------------------------------------------------------


def predict_points(root: Path, calibration: Calibration, points: Sequence[Point]) -> Predictions:
    """Latency and GPU energy of every point, each with a 90 % interval.

    Raises:
        UserError: an unknown model or accelerator, or a size that a model cannot run.
    """
    limits = load_accelerator(root, calibration.accelerator)
    work = features(root, points)
    effects = _effects(points, calibration.time.names[len(TIME_NAMES) :])
    times = _times(np.array(calibration.time.mean), effects, work, limits)
    by_time, class_s = times.derivatives, times.class_s
    watts, by_power = _powers(np.array(calibration.power.mean), times.part_s, limits)
    class_Wh = _by_class(times.part_s * watts) / SECONDS_PER_HOUR
    latency_s, energy_Wh = class_s.sum(axis=1), class_Wh.sum(axis=1)
    outside, notes = _outside(root, calibration, points, work)
    time_sd = np.sqrt(_variance(calibration.time, by_time) + outside**2)
    power_sd = np.sqrt(_variance(calibration.power, by_power))
    half_time = calibration.time.t90 * time_sd
    half_energy = np.hypot(half_time, calibration.power.t90 * power_sd)
    return Predictions(
        latency_s=latency_s,
        latency_s_low=latency_s * np.exp(-half_time),
        latency_s_high=latency_s * np.exp(half_time),
        gpu_energy_Wh=energy_Wh,
        gpu_energy_Wh_low=energy_Wh * np.exp(-half_energy),
        gpu_energy_Wh_high=energy_Wh * np.exp(half_energy),
        class_s=class_s,
        class_Wh=class_Wh,
        work=work,
        notes=notes,
    )


def _variance(fitted: Parameters, derivatives: Floats) -> Floats:
    """Variance of the logarithm: that of the parameters, and the misfit."""
    covariance = np.array(fitted.covariance)
    variance: Floats = np.einsum("np,pq,nq->n", derivatives, covariance, derivatives) + fitted.misfit**2
    return variance


def _outside(
    root: Path, calibration: Calibration, points: Sequence[Point], work: Features
) -> tuple[Floats, list[str]]:
    """What is added beyond what was measured (standard deviation of the logarithm), and what is said."""
    notes: list[list[str]] = [[] for _ in points]
    added = np.zeros(len(points))
    if calibration.tokens is not None:
        low, high = calibration.tokens
        beyond = np.log(np.maximum(np.maximum(work.tokens / high, low / work.tokens), 1))
        added = calibration.outside.per_efold * beyond
        known = set(calibration.models)
        added = np.hypot(added, [0 if p.model in known else calibration.outside.other_model for p in points])
        for index in map(int, np.flatnonzero(beyond > 0)):
            notes[index].append(
                f"extrapolated: {work.tokens[index]:.0f} tokens, calibrated with {low:.0f} to {high:.0f}"
            )
        for index, point in enumerate(points):
            if point.model not in known:
                notes[index].append(f"extrapolated: {point.model} is not among the calibrated models")
    else:
        for own in notes:
            own += calibration.notes
    if calibration.boards:  # of an unknown board the pace is known no better than boards differ
        known_share = np.array(
            [sum(b in calibration.boards for b in _boards(p)) / max(len(_boards(p)), 1) for p in points]
        )
        spread = load_presumed(root).time.board.spread
        added = np.hypot(added, spread * (1 - np.minimum(known_share, 1)))
    for index, point in enumerate(points):
        run = int(work.num_frames[index])
        if run != point.num_frames:
            notes[index].append(f"{point.num_frames} frames are rounded to {run}, as the pipeline does")
    return added, ["; ".join(own) for own in notes]


def label(point: Point) -> str:
    """How a point is called in messages."""
    return f"{point.model} {point.height}x{point.width} {point.num_frames}f {point.num_inference_steps}s"


# --- files ------------------------------------------------------------------------------------------------


def to_json(calibration: Calibration) -> str:
    """The calibration as JSON, one key a line, seven significant digits."""
    data = _rounded(calibration.model_dump(mode="json"))
    lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in data.items())  # type: ignore[attr-defined]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value


def read_calibration(path: Path) -> Calibration:
    """A calibration that :func:`to_json` wrote.

    Raises:
        UserError: there is no such file, or it is no calibration.
    """
    remedy = "make it with: t2v-energy calibrate POINTS.csv --accelerator NAME --out CALIBRATION.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("there is no such calibration", where=str(path), remedy=remedy) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"not JSON: {error}", where=str(path), remedy=remedy) from None
    if not isinstance(data, dict):
        raise UserError("not a calibration", where=str(path), remedy=remedy)
    calibration = parse(Calibration, data, str(path))
    own = (TIME_NAMES, POWER_NAMES)
    for section, names in zip((calibration.time, calibration.power), own, strict=True):
        count = len(section.names)
        shaped = len(section.mean) == len(section.covariance) == count
        if tuple(section.names[: len(names)]) != names or not shaped:
            raise UserError("its parameters are not this version's", where=str(path), remedy=remedy)
    return calibration


def shipped_calibration(root: Path, accelerator: str) -> Calibration:
    """The shipped calibration of an accelerator, or what is presumed of one that has none."""
    return calibration_of(root, accelerator) or presumed_calibration(root, accelerator)


def calibration_of(root: Path, accelerator: str) -> Calibration | None:
    """The shipped calibration of an accelerator, if there is one."""
    path = root / CALIBRATIONS / f"{accelerator}.json"
    return read_calibration(path) if path.is_file() else None


def refined(
    root: Path, calibration: Calibration, simple: Sequence[tuple[Configuration, Prediction]]
) -> list[Prediction]:
    """The first predictions of configurations, with the calibrated model's times and energy.

    A step's time is what one more step adds; memory stays as it was.
    """
    points = []
    for c, _ in simple:
        steps = c.num_inference_steps
        points += [Point(c.model, c.height, c.width, c.num_frames, s) for s in (steps, max(steps - 1, 1), 2)]
    if not points:
        return []
    found = predict_points(root, calibration, points)
    predictions = []
    for (c, first), (latency_s, fewer_s, two_s), (energy_Wh, *_) in zip(
        simple, found.latency_s.reshape(-1, 3), found.gpu_energy_Wh.reshape(-1, 3), strict=True
    ):
        steps = c.num_inference_steps
        step_s = float(latency_s - fewer_s) if steps > 1 else float(two_s - latency_s)
        whole_s = float(latency_s)
        predictions.append(
            replace(
                first,
                latency_s=whole_s,
                gpu_energy_Wh=float(energy_Wh),
                step_s=step_s,
                once_s=whole_s - steps * step_s,
            )
        )
    return predictions


def picked_by_work(work: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """Indices of ``count`` points by rising work: both ends, and evenly spaced between."""
    order = np.argsort(work, kind="stable")
    return np.sort(order[np.unique(np.round(np.linspace(0, len(order) - 1, count)).astype(np.intp))])
