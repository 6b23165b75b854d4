"""What interventions save: measured against the unmodified pipeline, beside what was predicted.

Experiments ``interventions``, ``token-merging`` and ``context-parallel`` measure changed pipelines and, on
the same board, the unmodified one: no interventions, torch's own attention kernel, the same model, size and
steps.  Each pass of a changed pipeline is divided by the same pass of its baseline, so that what drifts from
pass to pass cancels.  Passes that ran on another board than their baseline's are left out where any ran on
the same: boards of a model differ by more than many savings (:func:`comparable_passes`).  For the same reason
a baseline of the row's board comes before one of its protocol.  A ratio is the
geometric mean over the passes, with / without.  Where an intervention runs on several boards, its energy is
that of all of them, and the baseline's that of the one which it ran on: what others draw in the meantime is
not in it.

Its 95 % interval (:func:`paired_ratio`) is of the passes' ratios from three passes on (Student's t over their
logarithms); with fewer, of repetition within the passes.  Two or three generations tell little of how they
scatter, and a whole schedule is run once: generations are taken to scatter, in percent, as all those do that
were repeated of the same experiment, model and size (:func:`scatter`; of the whole experiment, where few of
that size were).  Where that knows no more than the two rows alone, it is their own relative intervals in
quadrature; two passes of one generation each have the t-interval over two.  A row that shares no board with
its baseline has a wider interval, as boards differ (:func:`between_boards`).  ``interval_of`` says which.

Predictions are those that were committed before measuring (:mod:`t2v_energy.prediction.registered`); without
any, they are computed from the calibration of :func:`t2v_energy.prediction.savings.savings_basis`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp, hypot, isfinite, log, nan, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student_t

from t2v_energy.analysis.kernels import DEFAULT, asked_kernel
from t2v_energy.analysis.sweep import board_means
from t2v_energy.analysis.validation import half_width
from t2v_energy.config import Configuration, load_campaign, load_model
from t2v_energy.errors import UserError
from t2v_energy.interventions import Named, named
from t2v_energy.prediction.registered import baseline_steps, read_registered
from t2v_energy.prediction.savings import (
    Basis,
    Compared,
    Saving,
    budget,
    predict_savings,
    savings_basis,
    scales_of,
)

EXPERIMENTS = ("interventions", "token-merging", "context-parallel")
FEWER_STEPS = "fewer-steps"
LOSSY_KERNELS = ("sage",)
"""Attention kernels that compute in fewer bits; the others differ by rounding."""
COMPILED = "compile"
"""Kind of the intervention whose own cost is counted, before the first video."""
CONFIDENCE = 0.95
MIN_PASSES_AS_UNITS = 3
QUANTITIES = {"latency_s": "latency", "gpu_energy_Wh": "energy"}
SIZE = ("model", "height", "width", "num_frames")
MIN_DEGREES = 5
"""Degrees of freedom from which on generations of one size tell how they scatter."""

COLUMNS = (
    "intervention", "model", "height", "width", "num_frames", "num_inference_steps",
    "predicted_energy_ratio", "measured_energy_ratio", "measured_energy_ratio_ci95", "measured_latency_ratio",
    "videos_per_hour", "memory_ratio", "denoiser_flop_ratio", "lossless", "relative_l2", "psnr_db", "ssim",
    "cited_quality", "source", "uncited_parts",
    "experiment", "configuration_id", "protocol", "attention_kernel", "baseline_steps", "baseline_protocol",
    "baseline_kernel", "passes", "n", "interval_of", "same_board", "measured_latency_ratio_ci95",
    "predicted_energy_ratio_low", "predicted_energy_ratio_high", "predicted_latency_ratio",
    "predicted_latency_ratio_low", "predicted_latency_ratio_high", "energy_error_percent",
    "latency_error_percent", "predicted", "calibration_sha256", "expected_source", "latency_s",
    "gpu_energy_Wh", "baseline_latency_s", "baseline_gpu_energy_Wh", "ms_ssim", "temporal_flickering",
    "reference_temporal_flickering", "fidelity_steps", "compile_s", "compile_energy_Wh", "break_even_videos",
    "settings", "evidence", "measured_kind", "predicted_kind", "flags", "note",
)  # fmt: skip
"""Columns of interventions.csv; docs/tables.md describes them."""
SIZES = ("model", "height", "width", "num_frames", "num_inference_steps")
COPIED = (
    "experiment", "configuration_id", "protocol", "attention_kernel", "latency_s", "gpu_energy_Wh",
    "fidelity_steps", "relative_l2", "psnr_db", "ssim", "ms_ssim", "temporal_flickering",
    "reference_temporal_flickering", "flags",
)  # fmt: skip
"""Columns that are configurations.csv's own."""


# --- what is compared with what -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A row of configurations.csv that differs from its baseline, and that baseline.

    Attributes:
        row: with the changed pipeline.
        baseline: without; None where none was measured.
        configuration: what was asked for.
        baseline_steps: the baseline's.
        interventions: entries of the catalogue, in their order.
        scatters: of generations of the same experiment, model and size, by quantity.
        boards: how boards differ, by quantity.
    """

    row: pd.Series
    baseline: pd.Series | None
    configuration: Configuration
    baseline_steps: int
    interventions: tuple[Named, ...]
    scatters: Mapping[str, Scatter] = field(default_factory=dict)
    boards: Mapping[str, Scatter] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """All that differs: ``attention-flash+fewer-steps+magcache``."""
        c = self.configuration
        kernel = [f"attention-{c.attention_kernel}"] if c.attention_kernel else []
        fewer = [FEWER_STEPS] if c.num_inference_steps < self.baseline_steps else []
        return "+".join([*kernel, *fewer, *c.interventions])

    @property
    def compared(self) -> Compared:
        """What is predicted of it."""
        return Compared(self.configuration, self.baseline_steps)

    @property
    def lossless(self) -> bool:
        """Whether the output differs by rounding at most."""
        lossy = (
            self.configuration.attention_kernel in LOSSY_KERNELS
            or self.configuration.num_inference_steps < self.baseline_steps
        )
        return not lossy and all(entry.intervention.lossless for entry in self.interventions)

    @property
    def uncited_parts(self) -> int:
        """Parts that are not lossless and have no cited quality figure."""
        kernel = self.configuration.attention_kernel in LOSSY_KERNELS
        fewer = self.configuration.num_inference_steps < self.baseline_steps
        own = [entry.intervention for entry in self.interventions]
        return kernel + fewer + sum(not part.lossless and part.quality is None for part in own)


def read_entries(root: Path, rows: pd.DataFrame) -> list[Entry]:
    """Every row of the experiments that is no baseline, in the table's order.

    Args:
        rows: configurations.csv; only status ``ok`` is read.

    Raises:
        UserError: a row names an intervention that config/interventions.yaml has not.
    """
    known = rows[rows["experiment"].isin(EXPERIMENTS) & (rows["status"] == "ok")]
    boards = {quantity: between_boards(rows, quantity) for quantity in QUANTITIES}
    found = []
    for _, of_experiment in known.groupby("experiment", sort=False):
        configurations = {index: _configuration(root, row) for index, row in of_experiment.iterrows()}
        scatters = _scatters(of_experiment)
        for index, row in of_experiment.iterrows():
            entry = _entry(root, of_experiment, configurations, index, row)
            if entry:
                found.append(replace(entry, scatters=scatters[_size(row)], boards=boards))
    return found


def _scatters(of_experiment: pd.DataFrame) -> dict[tuple[object, ...], dict[str, Scatter]]:
    """Of each model and size; of all where that size has fewer than :data:`MIN_DEGREES`."""
    every = {quantity: scatter(of_experiment, quantity) for quantity in QUANTITIES}
    found = {}
    for size, rows in of_experiment.groupby(list(SIZE), sort=False):
        own = {quantity: scatter(rows, quantity) for quantity in QUANTITIES}
        found[tuple(size)] = {
            name: own[name] if own[name].degrees >= MIN_DEGREES else every[name] for name in QUANTITIES
        }
    return found


def _size(row: pd.Series) -> tuple[object, ...]:
    return tuple(row[name] for name in SIZE)


def _configuration(root: Path, row: pd.Series) -> Configuration:
    """What a row was asked for, as far as its cost depends on it."""
    model = load_model(root, str(row["model"]))
    asked = asked_kernel(str(row["configuration_id"]))
    values: dict[str, Any] = {
        "model": model.key,
        **{name: int(row[name]) for name in ("height", "width", "num_frames", "num_inference_steps")},
        "guidance_scale": model.defaults.guidance_scale,
        "attention_kernel": None if asked == DEFAULT else asked,
        "interventions": () if pd.isna(row["intervention"]) else tuple(_names(row)),
    }
    return Configuration(**values)


def _names(row: pd.Series) -> list[str]:
    return [name for name in str(row["intervention"]).split("+") if name]


def _entry(
    root: Path,
    rows: pd.DataFrame,
    configurations: Mapping[Any, Configuration],
    index: Any,
    row: pd.Series,
) -> Entry | None:
    """Without scatters; None of a baseline."""
    configuration = configurations[index]
    steps = baseline_steps(configuration, configurations.values())
    changed = configuration.interventions or configuration.attention_kernel
    if not changed and steps == configuration.num_inference_steps:
        return None
    wanted = configuration.model_copy(
        update={"interventions": (), "attention_kernel": None, "num_inference_steps": steps}
    )
    unmodified = rows[[configurations[place] == wanted for place in rows.index]]
    found = _baseline(row, unmodified)
    entries = named(root, configuration.interventions, f"experiment {row['experiment']}")
    own = configuration.num_inference_steps
    return Entry(
        row,
        found,
        configuration,
        own if steps is None else steps,
        tuple(entries),
    )


def _baseline(row: pd.Series, unmodified: pd.DataFrame) -> pd.Series | None:
    """The unmodified row that ``row`` is held against: of its board first, of its protocol second.

    A few steps predict a whole schedule within less than boards of one model differ by.
    """
    found = sorted(
        (baseline for _, baseline in unmodified.iterrows()),
        key=lambda baseline: (same_board(row, baseline) != "yes", baseline["protocol"] != row["protocol"]),
    )
    return found[0] if found else None


# --- ratios -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio:
    """One quantity, with / without.

    Attributes:
        value: geometric mean over the passes.
        ci95: half-width of its 95 % interval; NaN where it cannot be told.
        passes: how many passes both have.
        interval_of: ``passes``, ``repetition``, ``pooled``, ``boards``, or empty.
    """

    value: float
    ci95: float
    passes: int
    interval_of: str


@dataclass(frozen=True)
class Scatter:
    """Relative standard deviation, and its degrees of freedom (0: not known)."""

    relative: float
    degrees: int


def scatter(rows: pd.DataFrame, quantity: str) -> Scatter:
    """Pooled over what was repeated within passes: √(Σ (nᵢ − pᵢ)(sᵢ / xᵢ)² / Σ (nᵢ − pᵢ)), of p passes each.

    Args:
        rows: rows of configurations.csv, of one experiment.
    """
    repeated = rows[rows[f"{quantity}_std"].notna() & (rows["status"] == "ok")]
    degrees = (repeated[f"{quantity}_n"] - repeated["passes"]).to_numpy(dtype=float)
    if not degrees.sum():
        return Scatter(nan, 0)
    relative = (repeated[f"{quantity}_std"] / repeated[quantity]).to_numpy(dtype=float)
    return Scatter(sqrt(float(degrees @ relative**2 / degrees.sum())), int(degrees.sum()))


def between_boards(rows: pd.DataFrame, quantity: str) -> Scatter:
    """How boards of a campaign's GPU model differ: √(Σ (bᵢ − 1)(sᵢ / xᵢ)² / Σ (bᵢ − 1)), of bᵢ boards each.

    Pooled over the rows of configurations.csv whose passes ran on several boards, sᵢ of the boards' means;
    what differs from pass to pass is in it. Many rows are of the same few boards: the degrees of freedom are
    those of the boards, one fewer than there are in each group that rows link.
    """
    groups: list[set[str]] = []
    squares, weights = 0.0, 0
    for _, row in rows[rows["status"] == "ok"].iterrows():
        means = pd.Series(board_means(row, quantity), dtype=float)
        if len(means) > 1:
            own = set(means.index)
            linked = [group for group in groups if group & own]
            groups = [group for group in groups if not group & own] + [own.union(*linked)]
            squares += (len(means) - 1) * float(means.std() / means.mean()) ** 2
            weights += len(means) - 1
    degrees = sum(len(group) - 1 for group in groups)
    return Scatter(sqrt(squares / weights), degrees) if weights else Scatter(nan, 0)


def paired_ratio(
    row: pd.Series,
    baseline: pd.Series,
    quantity: str,
    repeated: Scatter | None = None,
    boards: Scatter | None = None,
) -> Ratio:
    """Ratio of two rows of configurations.csv, pass by pass; see the module's description.

    Where no pass has both, it is the ratio of the rows' means, without an interval.

    Args:
        repeated: how generations of the same experiment and size scatter.
        boards: how boards differ. Without it, rows that share none have no interval.
    """
    own, other = (_by_pass(r, quantity) for r in (row, baseline))
    shared = comparable_passes(row, baseline, own, other)
    if not shared:
        return Ratio(float(row[quantity]) / float(baseline[quantity]), nan, 0, "")
    logs = np.array([log(own[index] / other[partner]) for index, partner in shared])
    ratio = exp(float(logs.mean()))
    relative, interval_of = _within(row, baseline, quantity, logs, repeated)
    if same_board(row, baseline) == "no":
        relative, interval_of = hypot(relative, _between(row, baseline, shared, boards)), "boards"
    return Ratio(ratio, ratio * relative, len(shared), interval_of if isfinite(relative) else "")


def _within(
    row: pd.Series, baseline: pd.Series, quantity: str, logs: Any, repeated: Scatter | None
) -> tuple[float, str]:
    """Relative half-width of what differs from pass to pass and within passes, and what it is of."""
    if len(logs) < MIN_PASSES_AS_UNITS:
        relative, interval_of = _of_repetition(row, baseline, quantity, len(logs), repeated)
        if interval_of or len(logs) < 2:
            return relative, interval_of
    quantile = float(student_t.ppf((1 + CONFIDENCE) / 2, len(logs) - 1))
    return quantile * float(logs.std(ddof=1)) / sqrt(len(logs)), "passes"


def _between(
    row: pd.Series, baseline: pd.Series, shared: Sequence[tuple[int, int]], boards: Scatter | None
) -> float:
    """Relative half-width by which the boards of the ``shared`` passes may differ; NaN: not known."""
    if not (boards and boards.degrees):
        return nan
    ran_on = [{_boards(r)[pair[side]] for pair in shared} for side, r in enumerate((row, baseline))]
    quantile = float(student_t.ppf((1 + CONFIDENCE) / 2, boards.degrees))
    return quantile * boards.relative * hypot(*(1 / sqrt(len(of)) for of in ran_on))


def _of_repetition(
    row: pd.Series, baseline: pd.Series, quantity: str, shared: int, repeated: Scatter | None
) -> tuple[float, str]:
    """Relative half-width that repetition within ``shared`` passes gives a ratio, and what it is of."""
    generations = [float(r[f"{quantity}_n"]) * shared / len(_passes(r)) for r in (row, baseline)]
    if repeated and repeated.degrees > sum(generations) - 2 * shared:
        quantile = float(student_t.ppf((1 + CONFIDENCE) / 2, repeated.degrees))
        return quantile * repeated.relative * hypot(*(1 / sqrt(count) for count in generations)), "pooled"
    relative = hypot(*(half_width(r, quantity) / float(r[quantity]) for r in (row, baseline)))
    return (relative, "repetition") if isfinite(relative) else (nan, "")


def _by_pass(row: pd.Series, quantity: str) -> dict[int, float]:
    """Mean of each pass by its number; nothing where passes cannot be told apart or have no such quantity."""
    means = _numbers(row[f"{quantity}_pass_means"])
    indices = _passes(row)
    return dict(zip(indices, means, strict=True)) if len(means) == len(indices) else {}


def _passes(row: pd.Series) -> list[int]:
    """Number of each pass, in the table's order, from the records' names."""
    return [int(name.rpartition("_r")[2].removesuffix(".json")) for name in str(row["records"]).split(";")]


def _numbers(cell: object) -> list[float]:
    """Numbers of a cell, joined by ``;``; a single one is read as a number."""
    return [] if pd.isna(cell) else [float(part) for part in str(cell).split(";")]  # type: ignore[call-overload]


def comparable_passes(
    row: pd.Series, baseline: pd.Series, own: Iterable[int], other: Iterable[int]
) -> list[tuple[int, int]]:
    """Which of the passes ``own`` of a row is held against which of the baseline's ``other`` ones.

    Passes of one number on one board are.  Where there are none, because a batch went on on another board
    than its baseline's first pass ran on, the baseline's first pass on a pass's own board is; and where no
    board is known to be shared, passes of one number.
    """
    own, other = sorted(own), sorted(other)
    boards, others = _boards(row), _boards(baseline)
    pairs = [(index, partner) for index in own for partner in other if index in boards]
    alike = [(index, partner) for index, partner in pairs if boards[index] == others.get(partner)]
    numbered = [(index, index) for index in own if index in other]
    first = dict(reversed(alike))
    return [pair for pair in numbered if pair in alike] or sorted(first.items()) or numbered


def same_board(row: pd.Series, baseline: pd.Series) -> str:
    """Whether the passes that count ran on their baseline's board: ``yes``, ``no``, or empty: not known."""
    own, other = _boards(row), _boards(baseline)
    if not (own and other):
        return ""
    return "yes" if set(own.values()) & set(other.values()) else "no"


def _boards(row: pd.Series) -> dict[int, str]:
    """Board of each pass by its number; empty where none is known."""
    if pd.isna(row["gpu_uuids"]):
        return {}
    return dict(zip(_passes(row), str(row["gpu_uuids"]).split(";"), strict=False))


# --- predictions --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Predicted:
    """What was predicted of an entry.

    Attributes:
        saving: None where nothing can be predicted; ``note`` says why.
        origin: ``registered`` (committed before measuring), ``computed``, or empty.
        calibration_sha256: of the calibration's file; empty where rates are presumed or shipped ones.
    """

    saving: Saving | None
    origin: str
    calibration_sha256: str
    note: str = ""


def predictions(root: Path, campaign: str, entries: Sequence[Entry]) -> list[Predicted]:
    """Predictions of all entries, in their order.

    Raises:
        UserError: the frozen calibration is not the one whose checksum is in config/savings.yaml, or a file
            of predictions cannot be read.
    """
    registered = read_registered(root, campaign, EXPERIMENTS)
    basis = savings_basis(root, load_campaign(root, campaign).accelerator)
    found: dict[int, Predicted] = {}
    to_compute: dict[int, Compared] = {}
    for index, entry in enumerate(entries):
        known = registered.get((str(entry.row["experiment"]), str(entry.row["configuration_id"])))
        if known and known.baseline_steps == entry.baseline_steps:
            found[index] = Predicted(known.saving, "registered", known.calibration_sha256)
        elif why_not := _unpredictable(root, basis, entry):
            found[index] = Predicted(None, "", "", why_not)
        else:
            to_compute[index] = entry.compared
    savings = predict_savings(root, basis.calibration, list(to_compute.values()))
    for index, saving in zip(to_compute, savings, strict=True):
        found[index] = Predicted(saving, "computed", basis.sha256)
    return [found[index] for index in range(len(entries))]


def _unpredictable(root: Path, basis: Basis, entry: Entry) -> str:
    """Why nothing can be predicted, such as a kernel whose rate nobody knows here; empty where it can."""
    if load_model(root, entry.configuration.model).architecture == "other":
        return "no closed forms count this model"
    try:
        scales_of(root, basis.calibration, [entry.compared])
    except UserError as error:
        return error.what
    return ""


# --- the table ----------------------------------------------------------------------------------------------


def interventions_table(root: Path, campaign: str, rows: pd.DataFrame) -> pd.DataFrame:
    """``interventions.csv``, columns :data:`COLUMNS`; empty where nothing of it was measured.

    Raises:
        UserError: see :func:`read_entries` and :func:`predictions`.
    """
    entries = read_entries(root, rows)
    predicted = predictions(root, campaign, entries) if entries else []
    table = [_row(entry, prediction) for entry, prediction in zip(entries, predicted, strict=True)]
    ordered = ["experiment", "model", "height", "width", "num_frames"]
    return pd.DataFrame(table, columns=list(COLUMNS)).sort_values(ordered, kind="stable", ignore_index=True)


def _row(entry: Entry, predicted: Predicted) -> dict[str, Any]:
    row, c = entry.row, entry.configuration
    found: dict[str, Any] = dict.fromkeys(COLUMNS)
    found |= {name: getattr(c, name) for name in SIZES} | {name: row[name] for name in COPIED}
    found |= {
        "intervention": entry.name,
        "baseline_steps": entry.baseline_steps,
        "videos_per_hour": 3600 / float(row["latency_s"]),
        "lossless": "yes" if entry.lossless else "no",
        "uncited_parts": entry.uncited_parts,
        "n": int(row["latency_s_n"]),
        "settings": row["intervention_settings"],
        "evidence": row["intervention_evidence"],
        "measured_kind": "measured",
    }
    found |= _cited(entry.interventions) | _predicted(predicted)
    if entry.baseline is None:
        return found | {"note": "; ".join(filter(None, [predicted.note, "no baseline was measured"]))}
    return found | _measured(entry, entry.baseline, predicted.saving)


def _measured(entry: Entry, baseline: pd.Series, saving: Saving | None) -> dict[str, Any]:
    row = entry.row
    ratios = {
        name: paired_ratio(row, baseline, quantity, entry.scatters[quantity], entry.boards[quantity])
        for quantity, name in QUANTITIES.items()
    }
    found: dict[str, Any] = {
        "baseline_protocol": baseline["protocol"],
        "baseline_kernel": baseline["attention_kernel"],
        "baseline_latency_s": baseline["latency_s"],
        "baseline_gpu_energy_Wh": baseline["gpu_energy_Wh"],
        "passes": ratios["latency"].passes,
        "interval_of": ratios["latency"].interval_of,
        "same_board": same_board(row, baseline),
        "memory_ratio": float(row["memory_allocated_GiB"]) / float(baseline["memory_allocated_GiB"]),
    }
    for name, ratio in ratios.items():
        found |= {f"measured_{name}_ratio": ratio.value, f"measured_{name}_ratio_ci95": ratio.ci95}
        if saving:
            expected = saving.latency_ratio if name == "latency" else saving.gpu_energy_ratio
            found[f"{name}_error_percent"] = 100 * (expected / ratio.value - 1)
    kinds = [entry.intervention.kind for entry in entry.interventions]
    if COMPILED in kinds and baseline["protocol"] == row["protocol"]:
        found |= compile_costs(row, baseline, ratios["latency"].value, ratios["energy"].value)
    return found


def compile_costs(
    row: pd.Series, baseline: pd.Series, latency_ratio: float, energy_ratio: float
) -> dict[str, float]:
    """What compiling takes before the first video, and how many videos pay for its energy.

    Compiling happens in the first warm-up: that of the baseline, in the same pass, with as many steps, times
    the measured ratio is what the warm-up would have been without it.  Of the passes on the baseline's board
    the dearest counts: later ones find what earlier ones compiled.  ``break_even_videos`` is NaN where a
    video saves nothing.
    """
    seconds, energy = (
        _dearest(row, baseline, f"first_warmup_{quantity}_passes", ratio)
        for quantity, ratio in (("s", latency_ratio), ("energy_Wh", energy_ratio))
    )
    saved = float(baseline["gpu_energy_Wh"]) - float(row["gpu_energy_Wh"])
    return {
        "compile_s": seconds,
        "compile_energy_Wh": energy,
        "break_even_videos": energy / saved if saved > 0 else nan,
    }


def _dearest(row: pd.Series, baseline: pd.Series, column: str, ratio: float) -> float:
    by_pass = []
    for of in (row, baseline):
        values, indices = _numbers(of[column]), _passes(of)
        by_pass.append(dict(zip(indices, values, strict=True)) if len(values) == len(indices) else {})
    shared = comparable_passes(row, baseline, *by_pass)
    extra = [by_pass[0][index] - ratio * by_pass[1][partner] for index, partner in shared]
    return max(extra, default=nan)


def _cited(entries: Iterable[Named]) -> dict[str, str]:
    """Picture quality and expected rates of each part, with where they are from."""
    qualities = {entry.name: entry.intervention.quality for entry in entries}
    expected = {entry.name: entry.intervention.expected for entry in entries}
    several = len(qualities) > 1
    return {
        "cited_quality": "; ".join(
            f"{name}: {q.figure}" if several else q.figure for name, q in qualities.items() if q
        ),
        "source": "; ".join(dict.fromkeys(q.source for q in qualities.values() if q)),
        "expected_source": "; ".join(
            f"{name}: {e.source}" if several else e.source for name, e in expected.items() if e
        ),
    }


def _predicted(predicted: Predicted) -> dict[str, Any]:
    found: dict[str, Any] = {
        "predicted": predicted.origin,
        "calibration_sha256": predicted.calibration_sha256,
        "note": predicted.note,
    }
    saving = predicted.saving
    if saving is None:
        return found
    for name, quantity in (("energy", "gpu_energy"), ("latency", "latency")):
        for end in ("", "_low", "_high"):
            found[f"predicted_{name}_ratio{end}"] = getattr(saving, f"{quantity}_ratio{end}")
    return found | {"denoiser_flop_ratio": saving.denoiser_flop_ratio, "predicted_kind": "modelled"}


BUDGET_COLUMNS = (
    "experiment", "configuration_id", "intervention", "class", "without_s", "with_s", "without_Wh", "with_Wh",
    "kind",
)  # fmt: skip
"""Columns of interventions_budget.csv."""


def budget_table(root: Path, campaign: str, rows: pd.DataFrame) -> pd.DataFrame:
    """``interventions_budget.csv``: predicted costs by class of work, without and with, of every entry.

    Entries that cannot be predicted are left out, as they are in the predictions.
    """
    basis = savings_basis(root, load_campaign(root, campaign).accelerator)
    found = []
    for entry in read_entries(root, rows):
        if _unpredictable(root, basis, entry):
            continue
        own = (str(entry.row["experiment"]), str(entry.row["configuration_id"]), entry.name)
        costs = budget(root, basis.calibration, entry.compared)
        found += [(*own, name, *of_class, "modelled") for name, of_class in costs.items()]
    return pd.DataFrame(found, columns=list(BUDGET_COLUMNS))


# --- token merging ------------------------------------------------------------------------------------------

MERGING = "token-merging"
"""Kind of the intervention."""
MERGING_SETTINGS = ("method", "mode", "ratio", "stride", "blocks", "match_every", "metric")
MERGING_COLUMNS = (
    "experiment", "configuration_id", "model", "height", "width", "num_frames", "intervention",
    *MERGING_SETTINGS, "measured_energy_ratio", "measured_energy_ratio_ci95", "measured_latency_ratio",
    "measured_latency_ratio_ci95", "throughput_ratio", "videos_per_hour", "predicted_energy_ratio",
    "predicted_latency_ratio", "denoiser_flop_ratio", "relative_l2", "psnr_db", "same_board",
)  # fmt: skip
"""Columns of merging.csv."""
METHODS_COLUMNS = (
    "experiment", "model", "height", "width", "num_frames", *MERGING_SETTINGS[1:], "latency_ratio_3d",
    "latency_ratio_attnbin", "attnbin_over_3d", "attnbin_over_3d_ci95", "compared",
)  # fmt: skip
"""Columns of merging_methods.csv."""


def merging_table(table: pd.DataFrame) -> pd.DataFrame:
    """``merging.csv``: rows of interventions.csv that merge tokens and change nothing else, with settings.

    ``throughput_ratio`` is videos an hour, with / without.
    """
    found = []
    for _, row in table.iterrows():
        settings = _merging_settings(row)
        if settings and isfinite(row["measured_latency_ratio"]):
            kept = {name: row[name] for name in MERGING_COLUMNS if name in row.index}
            found.append(kept | settings | {"throughput_ratio": 1 / row["measured_latency_ratio"]})
    return pd.DataFrame(found, columns=list(MERGING_COLUMNS))


def _merging_settings(row: pd.Series) -> dict[str, Any]:
    """Settings of the one intervention of a row, if it merges tokens; else nothing."""
    if "+" in str(row["intervention"]) or not isinstance(row["settings"], str) or not row["settings"]:
        return {}
    (settings,) = json.loads(row["settings"]).values()
    if settings["kind"] != MERGING:
        return {}
    return {
        "stride": "×".join(map(str, settings["stride"])),
        "blocks": _blocks(settings["every"], settings["last_block"]),
        **{name: settings[name] for name in ("method", "mode", "ratio", "match_every", "metric")},
    }


def _blocks(every: int, last: int | None) -> str:
    which = "all" if every == 1 else "every second" if every == 2 else f"every {every}th"
    return which if last is None else f"0–{last}" if every == 1 else f"{which} of 0–{last}"


def methods_table(merging: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """``merging_methods.csv``: settings measured with both methods, and attnbin's latency over 3d's.

    Where one board ran both, they are held against one another directly (:func:`paired_ratio`): nothing of
    their baseline is in the ratio or its interval.  Where none did, and each has a baseline on its own board,
    their ratios to those are (``compared`` is "baselines"): how boards differ is in neither.  Else the boards
    are, too (``compared`` is "boards").  ``compared`` is empty where boards are not known.

    Args:
        rows: configurations.csv, which ``merging`` is of.
    """
    measured = rows[rows["status"] == "ok"]
    boards = between_boards(measured, "latency_s")
    alike = [name for name in METHODS_COLUMNS if name in (*SIZE, "experiment", *MERGING_SETTINGS[1:])]
    three, binned = (merging[merging["method"] == m].set_index(alike) for m in ("3d", "attnbin"))
    by_id = {key: of.set_index("configuration_id") for key, of in measured.groupby("experiment")}
    scatters = {key: _scatters(of) for key, of in by_id.items()}
    found = []
    for key in three.index.intersection(binned.index):
        pair = [of.loc[key] for of in (three, binned)]
        other, own = (by_id[key[0]].loc[of["configuration_id"]] for of in pair)
        together = same_board(own, other)
        if together == "no" and all(of["same_board"] == "yes" for of in pair):
            value, ci95, compared = *_over_baselines(*pair), "baselines"
        else:
            direct = paired_ratio(own, other, "latency_s", scatters[key[0]][_size(own)]["latency_s"], boards)
            value, ci95 = direct.value, direct.ci95
            compared = {"yes": "directly", "no": "boards"}.get(together, "")
        against_baseline = [of["measured_latency_ratio"] for of in pair]
        found.append((*key, *against_baseline, value, ci95, compared))
    return pd.DataFrame(found, columns=list(METHODS_COLUMNS))


def _over_baselines(three: pd.Series, binned: pd.Series) -> tuple[float, float]:
    """attnbin's latency over 3d's and its half-width, from rows of merging.csv with different baselines."""
    ratios = [of["measured_latency_ratio"] for of in (three, binned)]
    relative = [of["measured_latency_ratio_ci95"] / of["measured_latency_ratio"] for of in (three, binned)]
    value = ratios[1] / ratios[0]
    return value, value * hypot(*relative)
