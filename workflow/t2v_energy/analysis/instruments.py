"""CodeCarbon beside the GPU's own counter, record by record.

Both read the same counter.  It changes about every 100 ms; CodeCarbon takes what it shows when a window
begins and ends, we attribute between the changes (:mod:`t2v_energy.metering.attribution`).  So the two differ
by what had accrued unseen at either edge, and by the little that CodeCarbon's window is longer.  In joules
that does not depend on the window's length; in percent it falls as 1 / length.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite, nan, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import t as student_t

from t2v_energy.errors import UserError
from t2v_energy.measurement.record import record_paths
from t2v_energy.metering.attribution import energies_J
from t2v_energy.metering.codecarbon import cpu_kind
from t2v_energy.metering.series import Ticks

J_PER_WH = 3600.0
IDLE = ("idle_before", "idle_after")
LOOK_S = 0.02
"""How well the instant is known at which CodeCarbon reads the counter."""
CI95_PER_CI90 = 1.96 / 1.645
CONFIDENCE = 0.95
Record = dict[str, Any]
Floats = NDArray[np.float64]

CODECARBON_COLUMNS = (
    "experiment", "configuration_id", "protocol", "pass_index", "height", "width", "num_frames",
    "num_inference_steps", "window_s", "codecarbon_duration_s", "longer_s", "counter_energy_J",
    "counter_energy_J_ci95", "codecarbon_gpu_energy_J", "difference_J", "difference_percent",
    "shown_energy_J", "unexplained_J", "mean_power_W", "idle_power_W", "tick_s", "gpu_kind",
    "cpu_energy_Wh", "cpu_power_W", "cpu_method", "cpu_kind", "cpu_share", "ram_energy_Wh", "ram_power_W",
    "ram_method", "ram_kind", "ram_share", "version",
)  # fmt: skip


def read_records(folder: str, root: Path, experiments: Iterable[str]) -> dict[str, list[Record]]:
    """Raw records by experiment, as plain JSON: stage 3 has checked them.

    Args:
        folder: results/raw/<campaign>, relative to ``root``.
        experiments: those of configurations.csv; what else lies in the folder is left alone.

    Raises:
        UserError: the folder is missing, or a record is not JSON.
    """
    base = root / folder
    if not base.is_dir():
        raise UserError("there is no such folder", where=str(base), remedy="measure the campaign first")
    return {name: [_read(path) for path in record_paths(base / name)] for name in experiments}


def _read(path: Path) -> Record:
    try:
        found: Record = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"the record is truncated or corrupt: {error}",
            where=str(path),
            remedy="restore it from the repository",
        ) from None
    return found


def running(record: Record) -> tuple[float, float] | None:
    """Start of the first warm-up and end of the last generation (s); None where nothing ran."""
    windows = record["windows"]
    edges = [
        (start, end)
        for kind, start, end in zip(windows["kind"], windows["start_s"], windows["end_s"], strict=True)
        if kind not in IDLE
    ]
    return (min(edges)[0], max(end for _, end in edges)) if edges else None


# --- one row a record ---------------------------------------------------------------------------------------


def codecarbon_table(records: Mapping[str, list[Record]]) -> pd.DataFrame:
    """One row a record with CodeCarbon's reading, columns :data:`CODECARBON_COLUMNS`.

    ``window_s`` is the stretch from the first warm-up to the last generation and ``counter_energy_J`` its
    energy from the counter; ``difference_J`` is CodeCarbon's less that.  ``shown_energy_J`` is what the
    counter showed at the stretch's start and at CodeCarbon's end, and ``unexplained_J`` what of CodeCarbon's
    energy is not that.  Shares are of CodeCarbon's own total, which adds a measured, a modelled and a
    constant energy.  GPU columns are NaN without a counter.
    """
    rows = [
        _row(experiment, record, span)
        for experiment, group in records.items()
        for record in group
        if record["status"] == "ok" and record["codecarbon"] and (span := running(record))
    ]
    table = pd.DataFrame(rows, columns=list(CODECARBON_COLUMNS))
    return table.sort_values(
        ["experiment", "configuration_id", "protocol", "pass_index"], kind="stable"
    ).reset_index(drop=True)


def _row(experiment: str, record: Record, span: tuple[float, float]) -> dict[str, object]:
    reading, configuration = record["codecarbon"], record["configuration"]
    window_s = span[1] - span[0]
    gpu = reading["gpu_energy_Wh"] * J_PER_WH if reading["gpu_method"] != "none" else nan
    parts = [reading[f"{part}_energy_Wh"] for part in ("gpu", "cpu", "ram")]
    row: dict[str, object] = {
        "experiment": experiment,
        "configuration_id": record["configuration_id"],
        "protocol": record["protocol"],
        "pass_index": record["pass_index"],
        **{n: configuration[n] for n in ("height", "width", "num_frames", "num_inference_steps")},
        "window_s": window_s,
        "codecarbon_duration_s": reading["duration_s"],
        "longer_s": reading["duration_s"] - window_s,
        "codecarbon_gpu_energy_J": gpu,
        "gpu_kind": "measured" if reading["gpu_method"] != "none" else "",
        "cpu_kind": cpu_kind(reading["cpu_method"]) if reading["cpu_method"] != "none" else "",
        "ram_kind": "constant" if reading["ram_method"] != "none" else "",
        "version": reading["version"],
    }
    for part in ("cpu", "ram"):
        energy_Wh = reading[f"{part}_energy_Wh"]
        row |= {
            f"{part}_energy_Wh": energy_Wh,
            f"{part}_power_W": energy_Wh * J_PER_WH / reading["duration_s"],
            f"{part}_method": reading[f"{part}_method"],
            f"{part}_share": energy_Wh / sum(parts) if sum(parts) > 0 else nan,
        }
    return row | _counter(record, span, gpu, reading["duration_s"])


def _counter(
    record: Record, span: tuple[float, float], codecarbon_J: float, duration_s: float
) -> dict[str, float]:
    """The counter's columns of one row."""
    names = (
        "counter_energy_J", "counter_energy_J_ci95", "difference_J", "difference_percent",
        "shown_energy_J", "unexplained_J", "mean_power_W", "idle_power_W", "tick_s",
    )  # fmt: skip
    if not record["ticks"]:
        return dict.fromkeys(names, nan)
    ticks = Ticks(**record["ticks"])
    idle = _idle(record, ticks)
    stretch = np.array([span])
    groups = (stretch, idle, *_generations(record))
    edges = np.concatenate(groups)
    found, ci90 = energies_J(ticks, edges[:, 0], edges[:, 1], borders_s=_once_borders(record))
    energy_J, window_s = float(found[0]), span[1] - span[0]
    shown_J = shown_energy_J(ticks, span[0], span[0] + max(duration_s, window_s), codecarbon_J)
    idle_s = float(np.diff(idle).sum())
    difference_J = codecarbon_J - energy_J
    values = (
        energy_J, CI95_PER_CI90 * float(ci90[0]), difference_J, 100 * difference_J / energy_J,
        shown_J, codecarbon_J - shown_J, energy_J / window_s,
        float(found[1 : 1 + len(idle)].sum()) / idle_s if idle_s > 0 else nan,
        float(np.median(np.diff(ticks.time_s))),
    )  # fmt: skip
    return dict(zip(names, values, strict=True))


def _idle(record: Record, ticks: Ticks) -> Floats:
    """The idle windows as far as the ticks cover them, shape (n, 2)."""
    windows = record["windows"]
    edges = np.column_stack([windows["start_s"], windows["end_s"]])[[k in IDLE for k in windows["kind"]]]
    edges = edges.clip(ticks.time_s[0], ticks.not_before_s[-1])
    return edges[edges[:, 1] > edges[:, 0]]


def _generations(record: Record) -> tuple[Floats, Floats]:
    """Windows of the measured generations and of their denoising loops, each of shape (n, 2).

    Stage 3 attributes these together with the stretch (:mod:`t2v_energy.aggregation`); doing the same here
    gives the same joules as configurations.csv has.
    """
    windows, spans = record["windows"], record["spans"]
    kept = [i for i, kind in enumerate(windows["kind"]) if kind == "generation"]
    whole = np.array([(windows["start_s"][i], windows["end_s"][i]) for i in kept]).reshape(-1, 2)
    window, stage = np.asarray(spans["window"]), np.asarray(spans["stage"], dtype=object)
    start, end = np.asarray(spans["start_s"], dtype=float), np.asarray(spans["end_s"], dtype=float)
    loops = []
    for i in kept:
        calls, closing = (window == i) & (stage == "denoiser"), (window == i) & (stage == "scheduler")
        if calls.any():
            loops.append((start[calls].min(), end[closing if closing.any() else calls].max()))
    return whole, np.array(loops, dtype=float).reshape(-1, 2)


def _once_borders(record: Record) -> list[float]:
    """Edges of the stages outside the loops of the measured generations: there power may step."""
    spans, kinds = record["spans"], record["windows"]["kind"]
    columns = (spans[name] for name in ("window", "step", "start_s", "end_s"))
    return [
        edge
        for window, step, start, end in zip(*columns, strict=True)
        if step < 0 and kinds[window] == "generation"
        for edge in (start, end)
    ]


def shown_energy_J(ticks: Ticks, start_s: float, end_s: float, wanted_J: float) -> float:
    """Rise of the counter (J) as a program sees it that looks about ``start_s`` and about ``end_s``.

    A look takes its time, and when exactly it falls is known to :data:`LOOK_S`; the counter changed between
    two of our own polls.  Where it may have changed before or after the look, the value nearest to
    ``wanted_J`` is taken.  Neighbouring values lie joules apart.
    """
    seen, possible = np.asarray(ticks.time_s), np.asarray(ticks.not_before_s)
    energy_J = np.asarray(ticks.energy_mJ, dtype=np.int64) / 1000
    candidates = []
    for look_s in (start_s, end_s):
        first = max(int(np.searchsorted(seen, look_s - LOOK_S, side="right")) - 1, 0)
        last = max(int(np.searchsorted(possible, look_s + LOOK_S, side="right")) - 1, first)
        candidates.append(energy_J[first : last + 1])
    rises = np.subtract.outer(candidates[1], candidates[0]).ravel()
    return float(rises[np.abs(rises - wanted_J).argmin()]) if isfinite(wanted_J) else float(rises[0])


# --- difference against window length -----------------------------------------------------------------------


@dataclass(frozen=True)
class ExtraWindow:
    """CodeCarbon's excess as a further window of ``delta_s`` at idle power, the same in every record.

    Attributes:
        delta_s, low_s, high_s: the fit and its 95 % interval; negative where CodeCarbon reads less.
        idle_power_W: mean over the records.
        scatter_J: standard deviation of the differences about the fit.
        mean_power_W: of the stretches, by energy over time.
        n: records.
    """

    delta_s: float
    low_s: float
    high_s: float
    idle_power_W: float
    scatter_J: float
    mean_power_W: float
    n: int

    def percent(self, window_s: Any, mean_power_W: float | None = None) -> Any:
        """Expected difference, percent of the energy of a window of ``window_s`` at ``mean_power_W``."""
        energy_J = np.asarray(window_s, dtype=np.float64) * (mean_power_W or self.mean_power_W)
        return 100 * self.delta_s * self.idle_power_W / energy_J

    def scatter_percent(self, window_s: Any, mean_power_W: float | None = None) -> Any:
        """1.96 standard deviations of the difference, percent of the energy of such a window."""
        energy_J = np.asarray(window_s, dtype=np.float64) * (mean_power_W or self.mean_power_W)
        return 100 * 1.96 * self.scatter_J / energy_J


def fit_extra_window(table: pd.DataFrame) -> ExtraWindow | None:
    """δ by least squares of ``difference_J`` on ``idle_power_W`` through the origin.

    None where fewer than three records have both.
    """
    rows = table.dropna(subset=["difference_J", "idle_power_W"])
    if len(rows) < 3:
        return None
    power, difference = rows["idle_power_W"].to_numpy(), rows["difference_J"].to_numpy()
    delta = float(power @ difference / (power @ power))
    scatter = sqrt(float(np.sum((difference - delta * power) ** 2)) / (len(rows) - 1))
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, len(rows) - 1)) * scatter / sqrt(float(power @ power))
    mean_power = float(rows["counter_energy_J"].sum() / rows["window_s"].sum())
    return ExtraWindow(delta, delta - half, delta + half, float(power.mean()), scatter, mean_power, len(rows))


def worst_percent(tick_s: float, power_W: float, window_s: Any, mean_power_W: float) -> Any:
    """Largest difference that one unseen tick at ``power_W`` makes, percent of the window's energy."""
    if not all(isfinite(x) and x > 0 for x in (tick_s, power_W, mean_power_W)):
        raise UserError(f"tick ({tick_s} s) and powers ({power_W}, {mean_power_W} W) must be positive")
    return 100 * tick_s * power_W / (np.asarray(window_s, dtype=np.float64) * mean_power_W)
