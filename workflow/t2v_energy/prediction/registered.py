"""Predictions that are written down before an experiment of interventions is measured, and kept in git.

``t2v-energy savings`` writes config/predictions/<campaign>/<experiment>.csv from the experiment's
configurations and the frozen calibration (:func:`t2v_energy.prediction.savings.savings_basis`), and refuses
as soon as there are records: what is written then is no prediction.  Analysis reads the file and writes none.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from t2v_energy.config import Configuration, Settings, load_campaign
from t2v_energy.config import configurations as listed_configurations
from t2v_energy.errors import UserError
from t2v_energy.measurement.record import record_paths
from t2v_energy.plan import raw_folder
from t2v_energy.prediction.savings import Compared, Saving, predict_savings, savings_basis

FOLDER = Path("config") / "predictions"
COLUMNS = (
    "configuration_id", "baseline_steps", "latency_ratio", "latency_ratio_low", "latency_ratio_high",
    "gpu_energy_ratio", "gpu_energy_ratio_low", "gpu_energy_ratio_high", "denoiser_flop_ratio",
    "calibration", "calibration_sha256",
)  # fmt: skip
"""Columns of a file of predictions; intervals are of 90 %."""


@dataclass(frozen=True)
class Registered:
    """One prediction of a file: the saving, and the checksum of the calibration that it is from."""

    baseline_steps: int
    saving: Saving
    calibration_sha256: str


def prediction_file(campaign: str, experiment: str) -> Path:
    """Where the predictions of an experiment are, from the root."""
    return FOLDER / campaign / f"{experiment}.csv"


def baseline_steps(configuration: Configuration, every: Iterable[Configuration]) -> int | None:
    """Steps of the baseline of ``configuration`` among those of its experiment; None where it has none.

    A baseline has no interventions, torch's own kernel, and all else alike.  That of a changed pipeline has
    as many steps, if there is one; else, and for a configuration in which nothing but the steps differs, it
    is the one with the most.
    """
    plain = {"interventions": (), "attention_kernel": None}
    alike = configuration.model_copy(update=plain | {"num_inference_steps": 0})
    steps = {
        other.num_inference_steps
        for other in every
        if other == other.model_copy(update=plain)
        and other.model_copy(update={"num_inference_steps": 0}) == alike
    }
    if not steps:
        return None
    changed = configuration.interventions or configuration.attention_kernel
    own = configuration.num_inference_steps
    return own if changed and own in steps else max(steps)


def register(root: Path, settings: Settings, experiment: str) -> str:
    """The file of an experiment's predictions, as text.

    Raises:
        UserError: the experiment has records, or nothing to predict, or its accelerator has no frozen
            calibration; see also :func:`t2v_energy.prediction.savings.predict_savings`.
    """
    campaign = load_campaign(root, settings.campaign)
    if experiment not in campaign.experiments:
        raise UserError(
            f"campaign {campaign.key} has no experiment {experiment!r}",
            where=f"config/campaigns/{campaign.key}.yaml, experiments",
            remedy=f"it has: {', '.join(campaign.experiments)}",
        )
    folder = raw_folder(root, campaign.key, experiment)
    if records := record_paths(folder):
        raise UserError(
            f"{len(records)} records are there already: what is written now would be no prediction",
            where=str(folder),
            remedy=f"restore {prediction_file(campaign.key, experiment)} from the repository",
        )
    basis = savings_basis(root, campaign.accelerator)
    if not basis.frozen:
        raise UserError(
            f"accelerator {campaign.accelerator!r} has no frozen calibration",
            where="config/savings.yaml, calibrations",
            remedy="add its file and checksum, and commit both before you measure",
        )
    entries = {
        entry.id: entry.configuration for entry in listed_configurations(root, settings, campaign, experiment)
    }
    pairs = _pairs(entries)
    if not pairs:
        raise UserError(
            "nothing differs from a baseline",
            where=f"experiment {experiment}",
            remedy="list the unmodified pipeline, and interventions, attention kernels or fewer steps",
        )
    savings = predict_savings(root, basis.calibration, list(pairs.values()))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for (name, pair), saving in zip(pairs.items(), savings, strict=True):
        numbers = {key: f"{value:.7g}" for key, value in asdict(saving).items()}
        writer.writerow(
            {"configuration_id": name, "baseline_steps": pair.baseline_steps}
            | numbers
            | {"calibration": basis.file, "calibration_sha256": basis.sha256}
        )
    return stream.getvalue()


def _pairs(entries: Mapping[str, Configuration]) -> dict[str, Compared]:
    """All that differ from a baseline of the same experiment."""
    found = {}
    for name, configuration in entries.items():
        steps = baseline_steps(configuration, entries.values())
        changed = configuration.interventions or configuration.attention_kernel
        if steps is not None and (changed or steps != configuration.num_inference_steps):
            found[name] = Compared(configuration, steps)
    return found


def read_registered(
    root: Path, campaign: str, experiments: Sequence[str]
) -> dict[tuple[str, str], Registered]:
    """Predictions by experiment and configuration id, of those experiments that have a file.

    Raises:
        UserError: a file lacks a column, or a cell is no number.
    """
    found = {}
    for experiment in experiments:
        path = root / prediction_file(campaign, experiment)
        if not path.is_file():
            continue
        rows = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))
        if missing := [name for name in COLUMNS if name not in (rows.fieldnames or ())]:
            raise UserError(
                f"there is no column {missing[0]!r}", where=str(path), remedy="restore it from the repository"
            )
        for number, row in enumerate(rows, start=2):
            found[experiment, row["configuration_id"]] = _registered(row, f"{path}, line {number}")
    return found


def _registered(row: Mapping[str, str], where: str) -> Registered:
    try:
        saving = Saving(**{name: float(row[name]) for name in Saving.__dataclass_fields__})
        return Registered(int(row["baseline_steps"]), saving, row["calibration_sha256"])
    except (TypeError, ValueError) as error:
        raise UserError(
            f"not a number: {error}", where=where, remedy="restore it from the repository"
        ) from None
