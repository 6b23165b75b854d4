"""What an intervention is: settings, what it does to a pipeline, and what that should do to the cost.

Modules of this package import no torch before they are applied, so that a plan or a prediction needs none.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from t2v_energy.config import Accelerator, Configuration, ModelFile, Strict
from t2v_energy.errors import UserError

if TYPE_CHECKING:
    from t2v_energy.interventions.call_work import Call
    from t2v_energy.prediction.features import Features

WorkClass = Literal["attention", "dense", "text", "traffic", "vae", "host", "call", "video"]
"""Parts of a video's time in the cost model (t2v_energy.prediction.forward.CLASSES)."""


class Quality(Strict):
    """What others report of an intervention's effect on the picture; with random weights we cannot."""

    figure: str = Field(min_length=1, description="the figure, with its metric and the model it was taken on")
    source: str = Field(min_length=1, description="where it is printed")


class Expected(Strict):
    """Changes of rates that no count of work gives, written down before anything is measured."""

    rate: dict[WorkClass, float] = Field(
        {}, description="rate with the intervention, divided by that without it, by class of work"
    )
    power: dict[WorkClass, float] = Field({}, description="the same of the mean power while it runs")
    source: str = Field(min_length=1, description="where the numbers are from")


class Target(NamedTuple):
    """A built pipeline and what is generated with it.

    ``further_boards`` are UUIDs of GPUs beside the pipeline's own that are reserved for it, and metered.
    """

    pipeline: Any
    model: ModelFile
    configuration: Configuration
    device: str = "cpu"
    further_boards: tuple[str, ...] = ()

    @property
    def denoiser(self) -> Any:
        """The module whose calls are the denoising loop (a torch module)."""
        return getattr(self.pipeline, self.model.denoiser_part)


def _nothing() -> Mapping[str, float]:
    return {}


@dataclass(frozen=True)
class Change:
    """An applied intervention.

    Attributes:
        undo: puts the pipeline back as it was, bit for bit.
        evidence: numbers of what was really done since it was applied, such as skipped calls or tokens
            merged; if all of them are 0 after a generation, the intervention has changed nothing.
    """

    undo: Callable[[], None]
    evidence: Callable[[], Mapping[str, float]] = _nothing


@dataclass(frozen=True)
class Work:
    """What one configuration costs without the intervention: what :meth:`Intervention.effect` starts from.

    Attributes:
        features: work by class, arrays of shape (1,) (:func:`t2v_energy.prediction.features.features`).
        bandwidth_TB_per_s: the accelerator's memory bandwidth (config/accelerators.yaml); NaN: not known.
    """

    model: ModelFile
    configuration: Configuration
    features: Features
    bandwidth_TB_per_s: float = nan


@dataclass(frozen=True)
class Effect:
    """What an intervention does to one video's work; every number is with / without it, absent is 1.

    Attributes:
        amount: FLOP of ``attention``, ``dense``, ``text`` and ``vae``, bytes of ``traffic``, calls of
            ``call``; work that the intervention adds (the matching of tokens) is in it.
        rate: of doing that work; from counts of bytes and the accelerator's limits, or :class:`Expected`.
        power: mean power while a class runs.
    """

    amount: Mapping[WorkClass, float] = field(default_factory=dict)
    rate: Mapping[WorkClass, float] = field(default_factory=dict)
    power: Mapping[WorkClass, float] = field(default_factory=dict)

    def then(self, other: Effect) -> Effect:
        """Both, where neither changes what the other does: ratios multiply."""
        pairs = ((self.amount, other.amount), (self.rate, other.rate), (self.power, other.power))
        return Effect(*(_product(first, second) for first, second in pairs))


def _product(first: Mapping[WorkClass, float], second: Mapping[WorkClass, float]) -> dict[WorkClass, float]:
    return {name: first.get(name, 1.0) * second.get(name, 1.0) for name in (*first, *second)}


class Intervention(Strict):
    """One way to change what a video costs; its fields are its settings in config/interventions.yaml.

    A subclass is one module. ``lossless``: the output differs by rounding at most. ``whole_schedule``: what
    it does depends on the denoising step, so that a cut generation says nothing of a whole one and protocol
    ``full`` is asked for.

    What it cannot be stacked on is said by kind, each with the reason: ``not_after`` where it would have to
    come first, ``not_with`` where either order fails (naming it in one of the two classes is enough).
    ``once``: a second entry of its kind, whatever its settings, makes no sense.
    :func:`t2v_energy.interventions.check_stack` refuses by these.

    ``float8``: the accelerator has to multiply float8 numbers; :meth:`check_on` refuses by it.

    ``call_order``: place among the kinds that change denoiser calls one by one, those first that leave out
    most; None for kinds whose work does not depend on what other kinds leave out.  What several of them do
    together is added up over the calls (:mod:`t2v_energy.interventions.call_work`).
    """

    kind: ClassVar[str]
    lossless: ClassVar[bool] = False
    whole_schedule: ClassVar[bool] = False
    once: ClassVar[bool] = True
    float8: ClassVar[bool] = False
    call_order: ClassVar[int | None] = None
    not_after: ClassVar[Mapping[str, str]] = {}
    not_with: ClassVar[Mapping[str, str]] = {}

    expected: Expected | None = Field(None, description="rates that no count of work gives")
    quality: Quality | None = Field(None, description="cited effect on the picture; null: we know none")

    @property
    def further_boards(self) -> int:
        """GPUs that it needs beside the pipeline's own; their energy is part of the video's."""
        return 0

    def check(self, model: ModelFile, configuration: Configuration) -> None:
        """Raise :class:`UserError` (see :meth:`refused`) for what it does not fit; needs no torch."""

    def check_on(self, model: ModelFile, configuration: Configuration, accelerator: Accelerator) -> None:
        """:meth:`check`, and whether the accelerator can do what it needs."""
        self.check(model, configuration)
        if self.float8 and not accelerator.float8:
            raise self.refused(
                f"{accelerator.title} does not multiply float8 numbers",
                "choose another accelerator, or leave it out",
            )

    @abstractmethod
    def apply(self, target: Target) -> Change:
        """Change the built pipeline; raises :class:`UserError` for one that it does not fit."""

    @abstractmethod
    def work_ratios(self, work: Work) -> Mapping[WorkClass, float]:
        """Amounts of work, with / without, from closed forms; absent is 1.  Needs no torch."""

    def changed_calls(self, work: Work, calls: Sequence[Call]) -> Sequence[Call]:
        """What becomes of the denoiser calls that are left, in their order; for kinds with ``call_order``."""
        raise NotImplementedError(f"{self.kind} has a call_order and does not change calls")

    def effect(self, work: Work) -> Effect:
        """What it should do to the cost of ``work``: counted amounts, and the rates written down before."""
        expected = self.expected
        if expected is None:
            return Effect(self.work_ratios(work))
        return Effect(self.work_ratios(work), expected.rate, expected.power)

    def refused(self, why: str, remedy: str) -> UserError:
        """The error of an intervention that does not fit."""
        return UserError(f"{self.kind}: {why}", where="interventions", remedy=remedy)
