"""Do cut generations tell what whole ones cost? Protocol ``sampled`` against ``full``, in two ways.

The first compares what experiment ``validation`` measured under both protocols (:func:`validation_table`).
Boards of one GPU model differ by several percent, so a configuration is compared on one board only, or the
row says that it was not.  The second needs no second measurement and so no board and no hour
(:func:`read_whole`, :func:`steps_table`): each whole generation against the total composed from its own first
steps, which is what ``sampled`` would have made of it.  Where the two differ, steps are not alike along a
generation; :func:`drift_table` shows where.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, hypot, isfinite, nan
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from t2v_energy.analysis.conditions import SOFTWARE_POWER_CAP
from t2v_energy.analysis.sweep import board_means
from t2v_energy.errors import UserError
from t2v_energy.measurement.composition import Generation, estimate, generations, step_weights
from t2v_energy.measurement.record import Record, read_record, record_paths
from t2v_energy.metering.attribution import energies_J

Array = NDArray[np.float64]

EXPERIMENT = "validation"
WHOLE_EXPERIMENTS = ("validation", "steps")
"""Experiments whose whole generations are compared with their own first steps."""
ACCEPTED_PERCENT = 0.5
"""``sampled`` is accepted where it is no further from ``full`` than this."""
FIRST_STEPS = (1, 2, 4, 6)
"""How many first steps totals are composed from."""
MIN_STEPS = 10
"""Whole generations of fewer steps say nothing of the steps after the first ones."""
PARTS = 10
"""Parts of equal length that a generation's loop is cut into to show its drift."""
J_PER_WH = 3600.0
NORMAL_95 = 1.96

QUANTITIES = ("latency_s", "gpu_energy_Wh")
_DETAILS = ("step_time_s", "step_energy_J", "once_s", "mean_power_W")
UNITS = {
    "latency_s": "s", "gpu_energy_Wh": "Wh", "step_time_s": "s", "step_energy_J": "J", "once_s": "s",
    "mean_power_W": "W",
}  # fmt: skip

VALIDATION_COLUMNS = (
    "configuration", "quantity", "full", "sampled", "difference_percent", "n_full", "n_sampled", "full_ci95",
    "sampled_ci95", "difference_ci95_percent", "same_board", "gpu_uuid", "attention_kernel", "kind",
    "accepted",
)  # fmt: skip
STEPS_COLUMNS = (
    "experiment", "configuration", "num_inference_steps", "pass_index", "gpu_uuid", "generations",
    "first_steps", "composed_from", "as_sampled", "quantity", "whole", "composed", "difference_percent",
    "difference_least_percent", "difference_most_percent", "difference_ci95_percent", "kind", "accepted",
)  # fmt: skip
DRIFT_COLUMNS = (
    "experiment", "configuration", "num_inference_steps", "pass_index", "gpu_uuid", "generation", "part",
    "first_step", "last_step", "step_time_s", "step_time_percent", "power_W", "power_percent", "sm_clock_MHz",
    "temperature_C", "capped_percent",
)  # fmt: skip


# --- both protocols -----------------------------------------------------------------------------------------


def validation_table(rows: pd.DataFrame) -> pd.DataFrame:
    """``validation.csv``, columns :data:`VALIDATION_COLUMNS`: what was measured under both protocols.

    Args:
        rows: configurations.csv; only experiment ``validation`` with status ``ok`` is read.

    One row a configuration and quantity.  ``difference_percent`` is 100 (sampled / full − 1), its half-width
    the two relative ones in quadrature: NaN where a protocol has one generation.  ``same_board`` is ``yes``
    where both values are of the same boards (latency and energy are then those boards' own means), ``no``
    where no board ran both, and empty where no board is known.  ``accepted`` says whether latency or GPU
    energy is at most :data:`ACCEPTED_PERCENT` off; it is empty for the other quantities.

    Raises:
        UserError: a configuration has several rows of one protocol (several kernels ran in one).
    """
    known = rows[(rows["experiment"] == EXPERIMENT) & (rows["status"] == "ok")]
    found = []
    for configuration, of_both in known.groupby("configuration_id", sort=False):
        by_protocol = {str(protocol): own for protocol, own in of_both.groupby("protocol")}
        if twice := [protocol for protocol, own in by_protocol.items() if len(own) > 1]:
            raise UserError(
                f"{configuration} has several rows of protocol {', '.join(twice)}",
                where="configurations.csv, experiment=validation",
                remedy="measure it on one attention kernel",
            )
        if set(by_protocol) >= {"full", "sampled"}:
            full, sampled = (by_protocol[protocol].iloc[0] for protocol in ("full", "sampled"))
            found += _compared(str(configuration), full, sampled)
    table = pd.DataFrame(found, columns=list(VALIDATION_COLUMNS))
    return table.sort_values(
        "configuration", key=lambda c: c.map(_size(known)), kind="stable", ignore_index=True
    )


def _size(rows: pd.DataFrame) -> dict[str, int]:
    voxels = rows["height"] * rows["width"] * rows["num_frames"]
    return dict(zip(rows["configuration_id"], voxels, strict=True))


def _compared(configuration: str, full: pd.Series, sampled: pd.Series) -> list[dict[str, object]]:
    """One row a quantity that both have."""
    found: list[dict[str, object]] = []
    for quantity in (*QUANTITIES, *_DETAILS):
        pair = on_one_board(full, sampled, quantity)
        if not all(isfinite(value) and value > 0 for value in (pair.first, pair.second)):
            continue
        difference = 100 * (pair.second / pair.first - 1)
        found.append(
            {
                "configuration": configuration,
                "quantity": quantity,
                "full": pair.first,
                "sampled": pair.second,
                "difference_percent": difference,
                "n_full": int(full["latency_s_n"]),
                "n_sampled": int(sampled["latency_s_n"]),
                "full_ci95": pair.first_ci95,
                "sampled_ci95": pair.second_ci95,
                "difference_ci95_percent": 100 * pair.ratio_ci95,
                "same_board": pair.same_board,
                "gpu_uuid": pair.boards,
                "attention_kernel": full["attention_kernel"],
                "kind": "measured",
                "accepted": _accepted(quantity, difference),
            }
        )
    return found


def _accepted(quantity: str, difference_percent: float) -> str:
    if quantity not in QUANTITIES:
        return ""
    return "yes" if abs(difference_percent) <= ACCEPTED_PERCENT else "no"


@dataclass(frozen=True)
class Pair:
    """One quantity of two rows of configurations.csv, on the same boards where there are such.

    Attributes:
        first, second: values; NaN where a row lacks it.
        first_ci95, second_ci95: half-widths; NaN where they are unknown.
        same_board: ``yes``, ``no``, or empty where boards are unknown.
        boards: the boards' UUIDs, joined by ``;``.
    """

    first: float
    second: float
    first_ci95: float
    second_ci95: float
    same_board: str
    boards: str

    @property
    def ratio(self) -> float:
        """second / first."""
        return self.second / self.first

    @property
    def ratio_ci95(self) -> float:
        """Half-width of the ratio: the relative half-widths in quadrature; NaN where one is unknown."""
        return abs(self.ratio) * hypot(self.first_ci95 / self.first, self.second_ci95 / self.second)


def on_one_board(first: pd.Series, second: pd.Series, quantity: str) -> Pair:
    """``quantity`` of both rows on the boards that ran both.

    Where the rows were measured on the same boards these are the rows' own values.  Where they share some,
    latency and GPU energy are those boards' means over their passes, without an interval; other quantities
    are not known by board, so they are the rows' own and not of the same board.
    """
    of_first, of_second = (_boards(row) for row in (first, second))
    shared = [uuid for uuid in of_first if uuid in of_second]
    if set(of_first) != set(of_second) and shared and quantity in QUANTITIES:
        means = [board_means(row, quantity) for row in (first, second)]
        if all(uuid in found for found in means for uuid in shared):
            values = [sum(found[uuid] for uuid in shared) / len(shared) for found in means]
            return Pair(values[0], values[1], nan, nan, "yes", ";".join(shared))
    known = "" if not (of_first and of_second) else "yes" if set(of_first) == set(of_second) else "no"
    every = ";".join(dict.fromkeys([*of_first, *of_second]))
    return Pair(
        float(first[quantity]),
        float(second[quantity]),
        half_width(first, quantity),
        half_width(second, quantity),
        known,
        every,
    )


def _boards(row: pd.Series) -> list[str]:
    text = str(row["gpu_uuids"])
    return [] if text in ("", "nan") else list(dict.fromkeys(text.split(";")))


def half_width(row: pd.Series, quantity: str) -> float:
    """Half-width of a row's 95 % interval of ``quantity``; NaN where the table has none.

    Step times have a standard error of their own, taken as normal.  Mean power is energy over latency; the
    two relative half-widths in quadrature make it rather too wide, as both scatter together.
    """
    if f"{quantity}_ci95" in row:
        return float(row[f"{quantity}_ci95"])
    if quantity == "step_time_s":
        return NORMAL_95 * float(row["step_time_sem_percent"]) / 100 * float(row["step_time_s"])
    if quantity == "mean_power_W":
        relative = (float(row[f"{name}_ci95"]) / float(row[name]) for name in QUANTITIES)
        return float(row["mean_power_W"]) * hypot(*relative)
    return nan


# --- whole generations against their own first steps --------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """The whole generations of one record of protocol ``full``.

    Attributes:
        record: the record.
        generations: those that were measured, every step run.
        step_s: time of each step (s), generations × steps.
        step_J: GPU energy of each step (J), same shape; NaN without a counter.
        once_s, once_J: what comes once a video, one value a generation.
    """

    record: Record
    generations: list[Generation]
    step_s: Array
    step_J: Array
    once_s: Array
    once_J: Array

    @property
    def identity(self) -> dict[str, object]:
        """The first columns of both tables."""
        gpu = self.record.environment.gpu
        return {
            "experiment": self.record.experiment,
            "configuration": self.record.configuration_id,
            "num_inference_steps": self.record.configuration.num_inference_steps,
            "pass_index": self.record.pass_index,
            "gpu_uuid": gpu.uuid if gpu else "",
        }


def read_whole(folders: Iterable[Path]) -> list[Whole]:
    """Every record of protocol ``full`` in ``folders`` with at least :data:`MIN_STEPS` steps.

    Folders that do not exist are left out, and so are records of another status than ``ok``.  The order is
    that of the folders, then of size and steps.

    Raises:
        UserError: a record cannot be read, or its spans do not fit its windows.
    """
    found = []
    for folder in folders:
        paths = [path for path in record_paths(folder) if "__full_r" in path.name] if folder.is_dir() else []
        records = [record for record in map(read_record, paths) if record.status == "ok"]
        enough = [r for r in records if r.configuration.num_inference_steps >= MIN_STEPS]
        found += [_whole(record) for record in sorted(enough, key=_order)]
    return found


def _order(record: Record) -> tuple[int, int, str, int]:
    c = record.configuration
    return (
        c.height * c.width * c.num_frames,
        c.num_inference_steps,
        record.configuration_id,
        record.pass_index,
    )


def _whole(record: Record) -> Whole:
    found = generations(record.windows, record.spans)
    step_s = np.stack([g.step_durations_s for g in found])
    step_J, once_J = np.full(step_s.shape, nan), np.full(len(found), nan)
    if record.ticks and not record.further_boards:  # steps of several boards are not told apart
        edges = [np.append(g.step_starts_s, g.loop_end_s) for g in found]
        windows = [[g.start_s, g.end_s] for g in found]
        start = np.concatenate([*(e[:-1] for e in edges), [w[0] for w in windows]])
        end = np.concatenate([*(e[1:] for e in edges), [w[1] for w in windows]])
        energy, _ = energies_J(record.ticks, start, end, borders_s=_borders(record, found))
        step_J = energy[: step_s.size].reshape(step_s.shape)
        once_J = energy[step_s.size :] - step_J.sum(axis=1)
    return Whole(record, found, step_s, step_J, np.array([g.once_s for g in found]), once_J)


def _borders(record: Record, found: Sequence[Generation]) -> Array:
    """Edges of the stages around the loop, where power may step."""
    windows = {g.index for g in found}
    spans = record.spans
    rows = zip(spans.window, spans.step, spans.start_s, spans.end_s, strict=True)
    edges = [edge for window, step, *ends in rows if window in windows and step < 0 for edge in ends]
    return np.array(edges, dtype=np.float64)


def steps_table(wholes: Sequence[Whole]) -> pd.DataFrame:
    """``validation_steps.csv``, columns :data:`STEPS_COLUMNS`: totals composed from the first steps.

    One row a record, number of first steps, way of composing and quantity.  The numbers are
    :data:`FIRST_STEPS`, for the drift, and the one that ``sampled`` would have run (``as_sampled``: yes), for
    its error; none that is the whole.  ``composed`` counts the first steps as they are and takes those that
    follow to cost what the mean of ``composed_from`` does: the ``settled`` ones of the first steps, as
    ``sampled`` does, or ``all`` of them.  ``whole`` is what the generation really cost; both are means over
    the record's generations, and ``difference_percent`` is the mean of the generations'
    100 (composed / whole − 1), with its least and largest and the t-interval over them (NaN for one
    generation).
    """
    rows = [
        wholes_row | quantity_row
        for whole in wholes
        for wholes_row in [whole.identity | {"generations": len(whole.generations)}]
        for quantity_row in _composed(whole)
    ]
    return pd.DataFrame(rows, columns=list(STEPS_COLUMNS))


def sampled_steps(whole: Whole) -> int:
    """How many steps protocol ``sampled`` would have run: enough to fill its window, by its own settings."""
    settings = whole.record.protocol_settings.sampled
    filling = ceil(settings.min_window_s / float(whole.step_s.mean()))
    return min(whole.step_s.shape[1], max(settings.min_steps, filling))


def _composed(whole: Whole) -> Iterable[dict[str, object]]:
    costs = {
        "latency_s": (whole.step_s, whole.once_s, 1.0),
        "gpu_energy_Wh": (whole.step_J, whole.once_J, J_PER_WH),
    }
    sampled, all_steps = sampled_steps(whole), whole.step_s.shape[1]
    for first in sorted({*FIRST_STEPS, sampled} - set(range(all_steps, sampled + 1))):
        for way in ("settled", "all"):
            weights = _first_step_weights(whole, first, way)
            for quantity, (steps, once, unit) in costs.items():
                if not np.isfinite(steps).all():
                    continue
                total = (once + steps.sum(axis=1)) / unit
                composed = (once + (weights * steps[:, :first]).sum(axis=1)) / unit
                difference = 100 * (composed / total - 1)
                mean = estimate(difference)
                yield {
                    "first_steps": first,
                    "composed_from": way,
                    "as_sampled": "yes" if first == sampled else "",
                    "quantity": quantity,
                    "whole": total.mean(),
                    "composed": composed.mean(),
                    "difference_percent": mean.mean,
                    "difference_least_percent": difference.min(),
                    "difference_most_percent": difference.max(),
                    "difference_ci95_percent": mean.ci95,
                    "kind": "measured",
                    "accepted": _accepted(quantity, mean.mean),
                }


def _first_step_weights(whole: Whole, first: int, way: str) -> Array:
    """How often each of the first steps counts in the whole generation, generations × ``first``."""
    all_steps = whole.step_s.shape[1]
    if way == "all":
        return np.full((len(whole.generations), first), all_steps / first)
    return np.stack([step_weights(g.step_starts_s[:first], all_steps) for g in whole.generations])


def drift_table(wholes: Sequence[Whole]) -> pd.DataFrame:
    """``validation_drift.csv``, columns :data:`DRIFT_COLUMNS`: how steps change along whole generations.

    For every generation (numbered from 1) its first three steps alone, and the loop cut into :data:`PARTS`
    parts of about as many steps.  ``part`` is ``step 1`` … or ``1/10`` …; steps count from 1.  Times, powers
    (counter) and their percentages of the generation's own loop; clock, temperature and the share of samples
    at which the power limit held the clock down are from the sensors.
    """
    rows = [
        whole.identity | {"generation": number + 1} | _part(whole, number, name, first, last)
        for whole in wholes
        for number in range(len(whole.generations))
        for name, first, last in _parts(whole.step_s.shape[1])
    ]
    return pd.DataFrame(rows, columns=list(DRIFT_COLUMNS))


def _parts(steps: int) -> list[tuple[str, int, int]]:
    """Name, first step and the one after the last (from 0) of each part."""
    edges = np.linspace(0, steps, PARTS + 1).round().astype(int).tolist()
    alone = [(f"step {step + 1}", step, step + 1) for step in range(3)]
    return alone + [(f"{n}/{PARTS}", low, high) for n, (low, high) in enumerate(pairwise(edges), 1)]


def _part(whole: Whole, number: int, name: str, first: int, last: int) -> dict[str, object]:
    seconds, joules = whole.step_s[number], whole.step_J[number]
    mean_s, loop_W = seconds.mean(), joules.sum() / seconds.sum()
    step_s = seconds[first:last].mean()
    power_W = joules[first:last].sum() / seconds[first:last].sum()
    starts_s = whole.generations[number].step_starts_s
    end_s = starts_s[first] + seconds[first:last].sum()
    return {
        "part": name,
        "first_step": first + 1,
        "last_step": last,
        "step_time_s": step_s,
        "step_time_percent": 100 * step_s / mean_s,
        "power_W": power_W,
        "power_percent": 100 * power_W / loop_W,
    } | _sensors(whole.record, float(starts_s[first]), float(end_s))


def _sensors(record: Record, start_s: float, end_s: float) -> dict[str, float]:
    """Means of the samples between two times; NaN where none was read."""
    samples = record.samples
    if samples is None:
        return dict.fromkeys(("sm_clock_MHz", "temperature_C", "capped_percent"), nan)
    time_s = np.asarray(samples.time_s)
    low, high = np.searchsorted(time_s, [start_s, end_s])

    def mean(values: Sequence[float | int | None]) -> float:
        known = [value for value in values[low:high] if value is not None]
        return float(np.mean(known)) if known else nan

    capped = [None if r is None else int(r & SOFTWARE_POWER_CAP > 0) for r in samples.throttle_reasons]
    return {
        "sm_clock_MHz": mean(samples.sm_clock_MHz),
        "temperature_C": mean(samples.temperature_C),
        "capped_percent": 100 * mean(capped),
    }
