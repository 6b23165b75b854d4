"""The calibrated cost model (predictor ``calibrated``): work by class of operator at fitted rates.

:mod:`t2v_energy.prediction.forward` has the formula. Parameters are logarithms (gain and slope are not),
presumed normal about config/prediction.yaml, or about what single operators took on this accelerator
(:mod:`t2v_energy.prediction.rates`), fitted to relative errors: maximum a posteriori by Gauss-Newton,
covariance from the curvature there (Laplace's approximation; for example Bishop, Pattern Recognition and
Machine Learning, section 4.4). What no parameter explains is estimated from the residuals, presumed
beforehand as an inverse χ² worth a few points; hence Student's t. Few points move what they inform and leave
the rest as presumed, its spread in the interval.

Predicting needs numpy alone: no torch, no scipy.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import hypot, isfinite
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from t2v_energy.config import Accelerator, Configuration, Strict, load_accelerator, load_model, parse
from t2v_energy.errors import UserError
from t2v_energy.prediction.features import Features, Floats, Point, features
from t2v_energy.prediction.forward import (
    CLASSES,
    LINEAR,
    PARTS,
    POWER_NAMES,
    TIME_NAMES,
    by_class,
    powers,
    times,
)
from t2v_energy.prediction.mapfit import Parameters, fitted, student90
from t2v_energy.prediction.presumed import Outside, PredictionFile, load_presumed, prior
from t2v_energy.prediction.rates import presumed_of, rates_of
from t2v_energy.prediction.single_mu import Prediction
from t2v_energy.work.architectures import made_frames

__all__ = [
    "BOARD",
    "CLASSES",
    "MODEL",
    "POWER_NAMES",
    "TIME_NAMES",
    "Calibration",
    "Parameters",
    "Predictions",
    "Quantity",
    "calibrate",
    "calibration_of",
    "part_times",
    "picked_by_work",
    "predict_points",
    "presumed_calibration",
    "read_calibration",
    "refined",
    "shipped_calibration",
    "to_json",
]
CALIBRATIONS = Path("config") / "calibrations"
"""Shipped calibrations, one an accelerator."""
SECONDS_PER_HOUR = 3600.0
CONFIDENCE = 0.90
BLOCK = 2048  # configurations that are predicted at once
UNMEASURED = "no calibration of this accelerator is at hand: rates and powers are presumed"
ALONE = "no video was measured on this accelerator: rates and powers are those of single operators"
BOARD, MODEL = "board:", "model:"
MIN_POINTS = 4
MIN_RANK, RANK_TOLERANCE = 3, 3e-3
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
Quantity = Literal["latency_s", "gpu_energy_Wh"]


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
    places: Sequence[str] = (),
) -> Calibration:
    """Fit the model to measured points of one accelerator (key of config/accelerators.yaml).

    Args:
        root: the repository's root.
        points: configurations; those that name a ``board`` tell boards apart.
        latency_s, gpu_energy_Wh: measured values of each, whole videos.
        where: what the points are called in messages.
        places: where each point stands, such as a file and a line (default: its number).

    Raises:
        UserError: fewer than four distinct configurations; points that cannot tell attention, other work and
            what comes once apart; values that are not positive, or of other units; an unknown accelerator or
            model, or a size that a model cannot run.
    """
    limits, presumed = load_accelerator(root, accelerator), presumed_of(root, accelerator)
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
    places = places or [f"{where}, point {index}" for index in range(1, len(points) + 1)]
    work = features(root, points, places)
    _check_units(points, work, seconds, energy, limits, places)
    boards = sorted({name for point in points for name in _boards(point)})
    models = sorted({point.model for point in points})
    # One model's own pace cannot be told from the accelerator's.
    names = [BOARD + board for board in boards] + [MODEL + model for model in models if len(models) > 1]
    effects = _effects(points, names)
    _check_rank(work, presumed, limits, where)
    time = _fit_time(work, seconds, names, effects, presumed, limits)
    part_s = times(np.array(time.mean), effects, work, limits).part_s
    power = _fit_power(part_s, energy * SECONDS_PER_HOUR / seconds, presumed, limits)
    off = _off_the_others(points, seconds, part_s.sum(axis=1), places)
    return Calibration(
        accelerator=accelerator,
        points=len(points),
        models=models,
        tokens=(float(work.tokens.min()), float(work.tokens.max())),
        boards=boards,
        time=time,
        power=power,
        outside=presumed.outside,
        notes=_told_apart(work) + off,
    )


def presumed_calibration(root: Path, accelerator: str) -> Calibration:
    """What is presumed of an accelerator on which nothing was measured: wide intervals."""
    load_accelerator(root, accelerator)
    presumed = presumed_of(root, accelerator)
    from_prior = {}
    for name, names, section, misfit in (
        ("time", TIME_NAMES, presumed.time, presumed.misfit.time),
        ("power", POWER_NAMES, presumed.power, presumed.misfit.power),
    ):
        mean, spread = prior(names, section, LINEAR)
        from_prior[name] = Parameters(
            names=list(names),
            mean=mean.tolist(),
            covariance=np.diag(spread**2).tolist(),
            misfit=misfit,
            t90=student90(presumed.misfit.weight),
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
        notes=[ALONE if rates_of(root, accelerator) else UNMEASURED],
    )


def _fit_time(
    work: Features,
    seconds: Floats,
    effect_names: list[str],
    effects: Floats,
    presumed: PredictionFile,
    limits: Accelerator,
) -> Parameters:
    mean, spread = prior(TIME_NAMES, presumed.time, LINEAR)
    between = {BOARD: presumed.time.board.spread, MODEL: presumed.outside.other_model}
    spreads = [between[name[: name.index(":") + 1]] for name in effect_names]
    mean, spread = np.concatenate([mean, np.zeros(len(spreads))]), np.concatenate([spread, spreads])

    def forward(theta: Floats) -> tuple[Floats, Floats]:
        found = times(theta, effects, work, limits)
        return np.log(found.part_s.sum(axis=1)), found.derivatives

    names = [*TIME_NAMES, *effect_names]
    misfit = presumed.misfit.time
    if not any(
        name.startswith(BOARD) for name in effect_names
    ):  # the points may be of several: how these differ is then part of what is unexplained
        misfit = hypot(misfit, presumed.time.board.spread)
    return fitted(names, forward, np.log(seconds), mean, spread, misfit, presumed.misfit.weight)


def _fit_power(part_s: Floats, mean_W: Floats, presumed: PredictionFile, limits: Accelerator) -> Parameters:
    mean, spread = prior(POWER_NAMES, presumed.power, LINEAR)
    share = part_s / part_s.sum(axis=1, keepdims=True)

    def forward(theta: Floats) -> tuple[Floats, Floats]:
        watts, derivatives = powers(theta, part_s, limits)
        return np.log((share * watts).sum(axis=1)), derivatives

    return fitted(
        list(POWER_NAMES),
        forward,
        np.log(mean_W),
        mean,
        spread,
        presumed.misfit.power,
        presumed.misfit.weight,
    )


# --- what is refused --------------------------------------------------------------------------------------

MAX_POWER_SHARE, MIN_POWER_SHARE = 1.5, 0.02
MIN_PEAK_SHARE = 2e-4
MOST_OFF = 1.25


def _check_units(
    points: Sequence[Point],
    work: Features,
    seconds: Floats,
    energy: Floats,
    limits: Accelerator,
    places: Sequence[str],
) -> None:
    """Raise where a value is not positive, or where time and energy cannot be those of this board."""
    flop = work.attention_flop + work.attention_narrow_flop + work.dense_flop + work.convolution_flop
    for index, point in enumerate(points):
        at = f"{places[index]} ({label(point)})"
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
    mean, _ = prior(TIME_NAMES, presumed.time, LINEAR)
    classes = times(mean, np.empty((len(work), 0)), work, limits).class_s
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


def _off_the_others(
    points: Sequence[Point], seconds: Floats, fitted_s: Floats, places: Sequence[str]
) -> list[str]:
    """Points whose latency the fit misses by far: more likely a slip than an accelerator's way."""
    return [
        f"{places[index]} ({label(points[index])}): latency_s {seconds[index]:g} s is {ratio:.3g} times what "
        "the points together lead to expect: look for a slip or another unit"
        for index, ratio in enumerate(seconds / fitted_s)
        if not 1 / MOST_OFF < ratio < MOST_OFF
    ]


# --- predicting -------------------------------------------------------------------------------------------


def predict_points(
    root: Path, calibration: Calibration, points: Sequence[Point], places: Sequence[str] = ()
) -> Predictions:
    """Latency and GPU energy of every point, each with a 90 % interval.

    ``places`` says where each point stands, such as a file and a line, for messages.

    Raises:
        UserError: an unknown model or accelerator, or a size that a model cannot run.
    """
    limits = load_accelerator(root, calibration.accelerator)
    work = features(root, points, places)
    effects = _effects(points, calibration.time.names[len(TIME_NAMES) :])
    part_s, time_variance = _time(calibration, effects, work, limits)
    class_s = by_class(part_s)
    watts, by_power = powers(np.array(calibration.power.mean), part_s, limits)
    class_Wh = by_class(part_s * watts) / SECONDS_PER_HOUR
    latency_s, energy_Wh = class_s.sum(axis=1), class_Wh.sum(axis=1)
    outside, notes = _outside(root, calibration, points, work)
    time_sd = np.sqrt(time_variance + outside**2)
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


def part_times(root: Path, calibration: Calibration, points: Sequence[Point]) -> Floats:
    """Seconds of each of :data:`t2v_energy.prediction.forward.PARTS` of every point, shape (n, parts).

    Raises:
        UserError: as :func:`predict_points`.
    """
    limits = load_accelerator(root, calibration.accelerator)
    effects = _effects(points, calibration.time.names[len(TIME_NAMES) :])
    return _time(calibration, effects, features(root, points), limits)[0]


def _time(
    calibration: Calibration, effects: Floats, work: Features, limits: Accelerator
) -> tuple[Floats, Floats]:
    """Seconds of each part, shape (n, parts), and variance of the logarithm of their sum, shape (n,).

    In blocks: derivatives of every part by every parameter are large.
    """
    seconds, variances = [], []
    for start in range(0, len(work), BLOCK):
        block = np.arange(start, min(start + BLOCK, len(work)))
        found = times(np.array(calibration.time.mean), effects[block], work.picked(block), limits)
        seconds.append(found.part_s)
        variances.append(_variance(calibration.time, found.derivatives))
    if not seconds:
        return np.empty((0, len(PARTS))), np.empty(0)
    return np.concatenate(seconds), np.concatenate(variances)


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
    made: dict[tuple[str, int], int] = {}
    for index, point in enumerate(points):
        asked = (point.model, point.num_frames)
        if asked not in made:
            made[asked] = made_frames(load_model(root, point.model), point.num_frames)
        if made[asked] != point.num_frames:
            notes[index].append(rounded_frames(point.num_frames, made[asked]))
    return added, ["; ".join(own) for own in notes]


def rounded_frames(asked: int, made: int) -> str:
    """The note on a number of frames that the pipeline does not make."""
    return f"{asked} frames are rounded to {made}, as the pipeline does"


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
