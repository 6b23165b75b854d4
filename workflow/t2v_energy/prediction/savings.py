"""What an intervention, or a stack of them, should save: predicted before it is measured.

A configuration's time t = Σ t_c and energy E = Σ E_c by class c of work come from a calibration
(:mod:`t2v_energy.prediction.calibrated`).  An intervention multiplies the amount of each class by a_c, its
rate by r_c and the power meanwhile by p_c (:class:`t2v_energy.interventions.base.Effect`), so ::

    latency ratio = Σ t'_c a_c / r_c / Σ t_c        energy ratio = Σ E'_c a_c p_c / r_c / Σ E_c

with / without; t' and E' are those of the number of steps that is left, t and E those of the baseline.  An
attention kernel that is forced is an effect like any other, with rates of config/savings.yaml.

Intervals are of 90 %.  Parameters of the calibration are in numerator and denominator, so their errors mostly
cancel: the ratio's logarithm is derived by each parameter (central differences), and the covariance gives its
variance.  What the calibration leaves unexplained (its misfit) cancels as far as work stays; of the part
that comes or goes, |1 − ratio| of the whole, it is added.  So is the spread that a kernel's rate has in
config/savings.yaml.  Amounts, and rates that an intervention expects, are taken as they are: the interval
says how well the calibration knows the classes' shares, not how well the effect is known.

Needs neither torch nor scipy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import exp, hypot, sqrt
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field

from t2v_energy.config import (
    AttentionKernel,
    Configuration,
    Key,
    Positive,
    Strict,
    load_accelerator,
    load_model,
    parse,
    read_yaml,
)
from t2v_energy.errors import UserError
from t2v_energy.interventions import check_stack, named, stack_effect
from t2v_energy.interventions.base import Effect, Work, WorkClass
from t2v_energy.prediction.calibrated import (
    CLASSES,
    Calibration,
    Parameters,
    predict_points,
    read_calibration,
    shipped_calibration,
)
from t2v_energy.prediction.features import Features, Floats, Point

SAVINGS_FILE = Path("config") / "savings.yaml"
STEP_OF_SPREAD = 0.1
"""Parameters are moved by so much of their standard deviation to derive by them."""
QUANTITIES = ("latency", "energy")
ATTENTION = CLASSES.index("attention")


# --- config/savings.yaml ----------------------------------------------------------------------------------


class Frozen(Strict):
    """A calibration that predictions are held to."""

    file: str = Field(description="path from the root")
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] = Field(description="its checksum")


class KernelRate(Strict):
    """Attention with a forced kernel against that with torch's own choice."""

    kernel: AttentionKernel = Field(description="the kernel that is forced")
    against: AttentionKernel = Field(description="what torch chooses there by itself")
    accelerators: tuple[Key, ...] = Field(min_length=1, description="where this holds")
    heads: Literal["wide", "narrow"] = Field(description="`wide`: of 128 and more; `narrow`: smaller ones")
    rate: Positive = Field(description="FLOP/s with it, divided by those without it")
    rate_sd: float = Field(ge=0, description="standard deviation of the logarithm of `rate`")
    power: Positive = Field(description="mean power while it runs, divided by that without it")
    source: str = Field(min_length=1, description="where the numbers are from: measured, or a constant")


class SavingsFile(Strict):
    """config/savings.yaml."""

    calibrations: dict[str, Frozen] = Field(
        description="accelerator: the calibration that savings of its campaigns are predicted from"
    )
    attention_kernels: tuple[KernelRate, ...] = Field(
        description="what forcing a kernel in the denoiser does"
    )


@cache
def load_savings(root: Path) -> SavingsFile:
    """config/savings.yaml, strictly; raises :class:`UserError` naming the file, the key and the value."""
    path = root / SAVINGS_FILE
    return parse(SavingsFile, read_yaml(path, "restore it from the repository"), str(path))


@dataclass(frozen=True)
class Basis:
    """The calibration that savings are predicted from.

    Attributes:
        calibration: as it was read.
        file: its path from the root; empty where there is none and rates are presumed.
        sha256: its checksum; empty likewise.
        frozen: whether config/savings.yaml holds its campaigns to it.
    """

    calibration: Calibration
    file: str
    sha256: str
    frozen: bool


def savings_basis(root: Path, accelerator: str) -> Basis:
    """The frozen calibration of an accelerator; where none is frozen, what is shipped or presumed.

    Raises:
        UserError: the frozen file is missing, or is not the one whose checksum is in config/savings.yaml.
    """
    frozen = load_savings(root).calibrations.get(accelerator)
    if frozen is None:
        return Basis(shipped_calibration(root, accelerator), "", "", frozen=False)
    path = root / frozen.file
    if not path.is_file():
        raise UserError(
            "there is no such calibration",
            where=f"{SAVINGS_FILE}, calibrations.{accelerator}.file: {frozen.file}",
            remedy="restore it from the repository: predictions must come from before measuring",
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != frozen.sha256:
        raise UserError(
            f"SHA-256 {digest} differs from {frozen.sha256} in {SAVINGS_FILE}, calibrations.{accelerator}",
            where=frozen.file,
            remedy="restore the file from the repository: savings are predicted from the calibration as it "
            "was before they were measured",
        )
    calibration = read_calibration(path)
    if calibration.accelerator != accelerator:
        raise UserError(
            f"the calibration is of {calibration.accelerator}, not of {accelerator}",
            where=frozen.file,
            remedy=f"name another file in {SAVINGS_FILE}",
        )
    return Basis(calibration, frozen.file, digest, frozen=True)


# --- what is compared -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """A configuration and the number of steps of its baseline, which has no interventions, torch's own
    attention kernel, and all else alike."""

    configuration: Configuration
    baseline_steps: int


@dataclass(frozen=True)
class Saving:
    """Predicted ratios, with / without; all ``modelled``, intervals of 90 %."""

    latency_ratio: float
    latency_ratio_low: float
    latency_ratio_high: float
    gpu_energy_ratio: float
    gpu_energy_ratio_low: float
    gpu_energy_ratio_high: float
    denoiser_flop_ratio: float
    """Matrix products of the denoiser."""


@dataclass(frozen=True)
class Scales:
    """What the classes' times and energies are multiplied by, in the order of CLASSES, shape (8,)."""

    latency: Floats
    energy: Floats
    flop_ratio: float
    """Matrix products of the denoiser, with / without."""
    attention_rate_sd: float
    """Standard deviation of the logarithm of attention's rate."""


def predict_savings(root: Path, calibration: Calibration, pairs: Sequence[Compared]) -> list[Saving]:
    """Ratios of latency and GPU energy of every configuration to its baseline's.

    Raises:
        UserError: an intervention that there is not or that does not fit, an attention kernel whose rate
            is not known there, an unknown model or a size that it cannot run.
    """
    if not pairs:
        return []
    points, scales = _points(pairs), scales_of(root, calibration, pairs)
    by_class = {name: np.array([getattr(scale, name) for scale in scales]) for name in QUANTITIES}

    def priced(at: Calibration) -> _Priced:
        found = predict_points(root, at, points)
        return _Priced(
            *(
                _ratio(costs[0::2] * by_class[name], costs[1::2])
                for name, costs in zip(QUANTITIES, (found.class_s, found.class_Wh), strict=True)
            )
        )

    ratios = priced(calibration)
    slopes = {section: _derivatives(calibration, section, priced) for section in ("time", "power")}
    return [
        Saving(
            *_interval(calibration, ratios, slopes, "latency", index, scale.attention_rate_sd),
            *_interval(calibration, ratios, slopes, "energy", index, scale.attention_rate_sd),
            denoiser_flop_ratio=scale.flop_ratio,
        )
        for index, scale in enumerate(scales)
    ]


def scales_of(root: Path, calibration: Calibration, pairs: Sequence[Compared]) -> list[Scales]:
    """What the costs of each class are multiplied by, for every configuration; raises as predict_savings."""
    work = predict_points(root, calibration, _points(pairs)).work
    own, baseline = (work.picked(np.arange(first, 2 * len(pairs), 2)) for first in (0, 1))
    one = [np.array([index]) for index in range(len(pairs))]
    accelerator = calibration.accelerator
    return [
        _scales(root, accelerator, pair.configuration, own.picked(index), baseline.picked(index))
        for pair, index in zip(pairs, one, strict=True)
    ]


def _points(pairs: Sequence[Compared]) -> list[Point]:
    """Of each pair its own number of steps, then the baseline's."""
    return [
        _point(pair.configuration, steps)
        for pair in pairs
        for steps in (pair.configuration.num_inference_steps, pair.baseline_steps)
    ]


class Budget(NamedTuple):
    """Seconds and watt-hours of one class of work, without and with; modelled."""

    without_s: float
    with_s: float
    without_Wh: float
    with_Wh: float


def budget(root: Path, calibration: Calibration, pair: Compared) -> dict[str, Budget]:
    """What each class of work costs, by class: where a saving is from, and what is left of it.

    Raises:
        UserError: as :func:`predict_savings`.
    """
    (scale,) = scales_of(root, calibration, [pair])
    found = predict_points(root, calibration, _points([pair]))
    seconds, energy = found.class_s, found.class_Wh
    columns = (seconds[1], seconds[0] * scale.latency, energy[1], energy[0] * scale.energy)
    return {name: Budget(*map(float, costs)) for name, *costs in zip(CLASSES, *columns, strict=True)}


class _Ratio(NamedTuple):
    """Ratio of each pair and attention's share of the numerator, shape (pairs,)."""

    value: Floats
    attention: Floats


class _Priced(NamedTuple):
    latency: _Ratio
    energy: _Ratio


def _ratio(changed: Floats, baseline: Floats) -> _Ratio:
    """Of costs by class, shape (pairs, 8)."""
    total = changed.sum(axis=1)
    return _Ratio(total / baseline.sum(axis=1), changed[:, ATTENTION] / total)


def _point(configuration: Configuration, steps: int) -> Point:
    c = configuration
    return Point(c.model, c.height, c.width, c.num_frames, steps)


def _scales(
    root: Path, accelerator: str, configuration: Configuration, own: Features, baseline: Features
) -> Scales:
    """Effects of one configuration on the unmodified work of its own number of steps."""
    effect, rate_sd = effect_of(root, accelerator, configuration, own)
    amount, rate, power = map(_by_class, (effect.amount, effect.rate, effect.power))
    time = amount / rate
    left = _denoiser_flop(own, effect) / _denoiser_flop(baseline, Effect())
    return Scales(time, time * power, left, rate_sd)


def _by_class(ratios: Mapping[WorkClass, float]) -> Floats:
    """In the order of the classes; 1 where nothing changes."""
    known = {str(name): ratio for name, ratio in ratios.items()}
    return np.array([known.get(name, 1.0) for name in CLASSES])


def _denoiser_flop(work: Features, effect: Effect) -> float:
    attention = float(work.attention_flop[0] + work.attention_narrow_flop[0])
    dense = float(work.dense_flop[0] + work.convolution_flop[0])
    amount = effect.amount
    return attention * amount.get("attention", 1.0) + dense * amount.get("dense", 1.0)


def effect_of(
    root: Path, accelerator: str, configuration: Configuration, features: Features
) -> tuple[Effect, float]:
    """What a configuration's attention kernel and interventions do together, and the spread of the former.

    Args:
        features: work of the same size and steps without them, arrays of shape (1,).

    Returns:
        The effect, and the standard deviation of the logarithm of attention's rate.

    Raises:
        UserError: see :func:`predict_savings`.
    """
    model = load_model(root, configuration.model)
    limits = load_accelerator(root, accelerator)
    work = Work(model, configuration, features, limits.bandwidth_TB_per_s)
    effect, rate_sd = Effect(), 0.0
    if configuration.attention_kernel is not None:
        effect, rate_sd = _kernel_effect(root, accelerator, configuration, features)
    entries = named(root, configuration.interventions, "interventions")
    check_stack(entries, "interventions")
    for entry in entries:
        entry.intervention.check_on(model, configuration, limits)
    return effect.then(stack_effect([entry.intervention for entry in entries], work)), rate_sd


def _kernel_effect(
    root: Path, accelerator: str, configuration: Configuration, work: Features
) -> tuple[Effect, float]:
    """What config/savings.yaml says of the configuration's attention kernel.

    Raises:
        UserError: nothing, for this accelerator or this size of heads.
    """
    heads = "narrow" if work.attention_narrow_flop[0] > work.attention_flop[0] else "wide"
    kernel = configuration.attention_kernel
    there = [
        known
        for known in load_savings(root).attention_kernels
        if accelerator in known.accelerators and known.heads == heads
    ]
    for known in there:
        if known.against == kernel:
            return Effect(), 0.0
        if known.kernel == kernel:
            effect = Effect(rate={"attention": known.rate}, power={"attention": known.power})
            return effect, known.rate_sd
    size = "128 and more" if heads == "wide" else "less than 128"
    raise UserError(
        f"attention_kernel: what {kernel!r} does to heads of {size} on {accelerator} is not known",
        where=f"{SAVINGS_FILE}, attention_kernels",
        remedy=f"add it with its source; known there: {', '.join(k.kernel for k in there) or 'none'}",
    )


# --- intervals --------------------------------------------------------------------------------------------


def _interval(
    calibration: Calibration,
    ratios: _Priced,
    slopes: Mapping[str, _Slopes],
    quantity: str,
    index: int,
    attention_rate_sd: float,
) -> tuple[float, float, float]:
    """One pair's ratio and the bounds of its 90 % interval."""
    of_quantity: _Ratio = getattr(ratios, quantity)
    ratio = float(of_quantity.value[index])
    moved = abs(1 - ratio) / ratio
    kernel = float(of_quantity.attention[index]) * attention_rate_sd
    halves = []
    for section, further in (("time", kernel), ("power", 0.0)):
        fitted: Parameters = getattr(calibration, section)
        slope = getattr(slopes[section], quantity)[index]
        known = float(slope @ np.array(fitted.covariance) @ slope)
        # of latency, power explains nothing and leaves nothing unexplained
        unexplained = moved * fitted.misfit if (section, quantity) != ("power", "latency") else 0.0
        halves.append(fitted.t90 * hypot(sqrt(max(known, 0.0)), unexplained, further))
    half = hypot(*halves)
    return ratio, ratio * exp(-half), ratio * exp(half)


class _Slopes(NamedTuple):
    """Derivatives of the ratios' logarithms by the parameters of a section, shape (pairs, parameters)."""

    latency: Floats
    energy: Floats


def _derivatives(calibration: Calibration, section: str, priced: Callable[[Calibration], _Priced]) -> _Slopes:
    fitted: Parameters = getattr(calibration, section)
    steps = STEP_OF_SPREAD * np.sqrt(np.diag(np.array(fitted.covariance)))
    columns: tuple[list[Floats], list[Floats]] = ([], [])
    for index, step in enumerate(map(float, steps)):
        upper, lower = (priced(_moved(calibration, section, index, by)) for by in (step, -step))
        for column, up, down in zip(columns, upper, lower, strict=True):
            column.append(np.log(up.value / down.value) / (2 * step) if step > 0 else 0 * up.value)
    return _Slopes(*(np.column_stack(column) for column in columns))


def _moved(calibration: Calibration, section: str, index: int, by: float) -> Calibration:
    """The calibration with one parameter moved."""
    fitted: Parameters = getattr(calibration, section)
    mean = [value + by * (place == index) for place, value in enumerate(fitted.mean)]
    return calibration.model_copy(update={section: fitted.model_copy(update={"mean": mean})})
