"""The plan: every configuration of a campaign, cut into batches, with what measuring it should cost."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from t2v_energy.config import (
    Campaign,
    Configuration,
    Listed,
    Protocol,
    ProtocolSettings,
    Settings,
    configurations,
    load_accelerator,
    load_campaign,
    load_experiment,
    load_model,
    protocol_settings,
)
from t2v_energy.errors import UserError
from t2v_energy.measurement.record import record_name
from t2v_energy.prediction import Prediction, calibration_of, predict, predict_measurement_s, refined

UNCOUNTED = Prediction(math.nan, math.nan, math.nan, math.nan, math.nan)
"""What is predicted for a model that no closed forms count: nothing."""
UNCOUNTED_S = 300.0
"""How long measuring such a configuration is taken to last (s): batches must be cut somewhere."""


@dataclass(frozen=True)
class Item:
    """One measurement to take, with its (modelled) cost; ``order`` is its place in the random order."""

    experiment: str
    configuration_id: str
    configuration: Configuration
    protocol: Protocol
    protocols: ProtocolSettings
    pass_index: int
    order: int
    prediction: Prediction
    measure_s: float

    @property
    def record(self) -> str:
        """Name of the record's file."""
        return record_name(self.configuration_id, self.protocol, self.pass_index)


@dataclass(frozen=True)
class Batch:
    """Measurements that one process takes one after the other: one model, one experiment."""

    experiment: str
    name: str
    items: tuple[Item, ...]

    @property
    def measure_s(self) -> float:
        """Predicted seconds of measuring, without building the pipeline."""
        return sum(item.measure_s for item in self.items)

    @property
    def memory_GiB(self) -> float:
        """Predicted peak of the largest configuration; 0 where nothing is predicted."""
        return max(0.0 if item.prediction is UNCOUNTED else item.prediction.memory_GiB for item in self.items)


@dataclass(frozen=True)
class Plan:
    """A campaign's batches, and its protocol settings, which experiments and entries may change."""

    campaign: Campaign
    protocols: ProtocolSettings
    batches: tuple[Batch, ...]

    def batch(self, experiment: str, name: str) -> Batch:
        """The batch of that name; raises :class:`UserError` naming those there are."""
        found = [b for b in self.batches if (b.experiment, b.name) == (experiment, name)]
        if not found:
            names = [f"{b.experiment}/{b.name}" for b in self.batches]
            raise UserError(
                f"campaign {self.campaign.key} has no batch {experiment}/{name}",
                where=f"config/campaigns/{self.campaign.key}.yaml",
                remedy=f"batches: {', '.join(names)}; names change with the configurations in them",
            )
        return found[0]

    def items(self, experiment: str) -> list[Item]:
        """All measurements of one experiment."""
        return [item for b in self.batches if b.experiment == experiment for item in b.items]


def raw_folder(root: Path, campaign: str, experiment: str) -> Path:
    """Where an experiment's records are."""
    return root / "results" / "raw" / campaign / experiment


def make_plan(root: Path, settings: Settings, experiments: Iterable[str] | None = None) -> Plan:
    """The plan of ``settings.campaign``, for all of its experiments or those named.

    Each pass measures an experiment's configurations in an order of its own, drawn from the campaign's
    seed: a sorted order would let the warming of the GPU pass for an effect of size.
    """
    campaign = load_campaign(root, settings.campaign)
    protocols = protocol_settings(settings, campaign)
    keys = list(campaign.experiments if experiments is None else experiments)
    batches: list[Batch] = []
    for key in keys:
        if key not in campaign.experiments:
            raise UserError(
                f"campaign {campaign.key} has no experiment {key!r}",
                where=f"config/campaigns/{campaign.key}.yaml, experiments",
                remedy=f"it has: {', '.join(campaign.experiments)}",
            )
        listed = configurations(root, settings, campaign, key)
        alternating = load_experiment(root, campaign, key).one_process
        passes = [
            _ordered_items(root, campaign, listed, key, pass_index, unchanged_first=alternating)
            for pass_index in range(1, max(entry.passes for entry in listed) + 1)
        ]
        if alternating:
            batches += _batches([item for items in passes for item in items], math.inf, _comparable)
        else:
            for items in passes:
                batches += _batches(items, settings.measure.batch_minutes * 60, _model)
    return Plan(campaign, protocols, tuple(batches))


def _ordered_items(
    root: Path, campaign: Campaign, listed: list[Listed], key: str, pass_index: int, *, unchanged_first: bool
) -> list[Item]:
    """One pass in its random order.

    ``unchanged_first``: pipelines that nothing changes come before the others, which are compared with them:
    a batch that is cut short must not lack its baseline.
    """
    wanted = [entry for entry in listed if entry.passes >= pass_index]
    random.Random(f"{campaign.seed} {key} {pass_index}").shuffle(wanted)
    if unchanged_first:
        wanted.sort(key=lambda entry: _is_changed(entry.configuration))  # stable
    predictions = _predictions(root, campaign.accelerator, [entry.configuration for entry in wanted])
    items = []
    for order, (entry, prediction) in enumerate(zip(wanted, predictions, strict=True)):
        c = entry.configuration
        seconds = UNCOUNTED_S
        if prediction is not UNCOUNTED:
            seconds = predict_measurement_s(
                prediction, entry.protocol, entry.protocols, c.num_inference_steps
            )
        how = (entry.protocol, entry.protocols, pass_index, order)
        items.append(Item(key, entry.id, c, *how, prediction, seconds))
    return items


def _is_changed(c: Configuration) -> bool:
    return bool(c.interventions) or c.attention_kernel is not None


def _predictions(root: Path, accelerator: str, wanted: list[Configuration]) -> list[Prediction]:
    """Cost of each: by the accelerator's shipped calibration, or by constants where it has none."""
    limits, calibration = load_accelerator(root, accelerator), calibration_of(root, accelerator)
    simple = []
    for c in wanted:
        model, sizes = load_model(root, c.model), (c.height, c.width, c.num_frames)
        counted = model.architecture != "other"
        simple.append(predict(model, limits, *sizes, c.num_inference_steps) if counted else UNCOUNTED)
    if calibration is None:
        return simple
    counted_at = [i for i, prediction in enumerate(simple) if prediction is not UNCOUNTED]
    better = refined(root, calibration, [(wanted[i], simple[i]) for i in counted_at])
    for index, prediction in zip(counted_at, better, strict=True):
        simple[index] = prediction
    return simple


def _model(item: Item) -> tuple[str, ...]:
    return (item.configuration.model,)


def _comparable(item: Item) -> tuple[str | int, ...]:
    """What conditions that alternate share: the model, the size and the protocol."""
    c = item.configuration
    return (c.model, c.height, c.width, c.num_frames, item.protocol)


def _batches(
    items: list[Item], limit_s: float, shared: Callable[[Item], tuple[str | int, ...]]
) -> list[Batch]:
    """Cut ``items`` where what a batch shares changes or the predicted time would pass ``limit_s``."""
    groups: list[list[Item]] = []
    for item in sorted(items, key=shared):  # stable: keeps the order within a batch
        group = groups[-1] if groups else []
        alike = bool(group) and shared(group[0]) == shared(item)
        if not alike or sum(i.measure_s for i in group) + item.measure_s > limit_s:
            groups.append([])
        groups[-1].append(item)
    return [Batch(group[0].experiment, _batch_name(group), tuple(group)) for group in groups]


def _batch_name(items: list[Item]) -> str:
    """Ten hexadecimal digits from the names of the batch's records."""
    return hashlib.sha256("\n".join(sorted(item.record for item in items)).encode()).hexdigest()[:10]
