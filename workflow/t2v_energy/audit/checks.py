"""The forensic checks: each a function from a table to its findings.

A check says nothing where the table has not what it needs (no prompts, an unknown board, an unknown model).
The limits below are judgements, each with its reason; none is fitted to a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal

import numpy as np
import pandas as pd

from t2v_energy.audit.table import OWN_SIZES, SPREAD, EnergyTable
from t2v_energy.config import ModelFile
from t2v_energy.errors import UserError
from t2v_energy.published.tables import COMPONENTS
from t2v_energy.work import Work, true_work
from t2v_energy.work.architectures import decoder, latents, made_frames

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

FEWEST_WINDOWS = 5
LONGEST_OVER_SHORTEST = 2.0  # below that, a constant power and a constant energy look alike
CONSTANT_PART = 1e-3  # no load of a computer is this steady over windows of different lengths
CONSTANT_WINDOW_S = 0.03  # jitter of the two clocks that a constant power is multiplied by
TAIL_PART = 0.01  # of the timed window: less than what repetitions scatter by
OVER_LIMIT = 1.02  # boards overshoot their limit by a percent or two for a moment
PLAUSIBLE_MFU = (0.12, 0.80)
"""Share of the dense bfloat16 peak.  Large matrix products reach 0.6 to 0.7 of it; published runs of video
models on one GPU lie from 0.3 to 0.66, and models of few, small steps from 0.16 up (docs/audit.md)."""
CPU_SCATTER = (0.03, 5.0)  # at least this part of the mean, and so many times the GPU's
UNIT_FACTORS = (1e3, 1e-3, 3.6e3, 1 / 3.6e3)  # k or m too many; Wh for J
PLAUSIBLE_W: Mapping[str, tuple[float, float]] = {"cpu": (1, 2000), "ram": (0.1, 500)}
PLAUSIBLE_GPU = (0.05, 1.5)  # of the board's power; without a board, of UNKNOWN_BOARD_W
UNKNOWN_BOARD_W = 700.0


@dataclass(frozen=True)
class Finding:
    """One thing that a table's numbers show.

    Attributes:
        check: name of the check.
        severity: ``error`` (a number is not what its label says), ``warning`` (it can mislead), ``note``.
        subject: the model, component or column that it is about.
        lines: lines of the file that show it.
        evidence: one sentence with the numbers.
        numbers: the same numbers by name, units in the names.
        remedy: what to do.
    """

    check: str
    severity: Severity
    subject: str
    lines: tuple[int, ...]
    evidence: str
    remedy: str
    numbers: Mapping[str, float] = field(default_factory=dict)


Check = Callable[[EnergyTable], list[Finding]]


def audit(table: EnergyTable) -> list[Finding]:
    """What all checks of :data:`CHECKS` find, the gravest first."""
    found = [finding for check in CHECKS for finding in check(table)]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


# --- constant power, and the time that it gives away --------------------------------------------------------


@dataclass(frozen=True)
class ConstantPower:
    """A component whose energy is one power times (timed window + one extra time).

    ``extra_s`` is of the whole window of the meter, which holds ``runs`` videos; ``extra_std_s`` is its
    scatter within a model and stage, pooled: between them it holds too what the power is off by over long
    windows.
    """

    component: str
    power_W: float
    extra_s: float
    extra_std_s: float
    lines: tuple[int, ...]


def constant_power(table: EnergyTable, component: str) -> ConstantPower | None:
    """The constant behind a component's column; None where its energies follow none.

    Least squares of energy over time, y/x = P + P t₀/x, which weighs short and long windows alike; it holds
    where 99 % of the windows come back within 0.1 % or the power times 30 ms, over durations that differ
    twofold.
    """
    windows = _meter_windows(table)
    windows = windows[windows[component].notna()]
    if len(windows) < FEWEST_WINDOWS:
        return None
    x, y = windows["timed_s"].to_numpy(float), windows[component].to_numpy(float)
    if x.max() < LONGEST_OVER_SHORTEST * x.min():
        return None
    product, power = np.polyfit(1 / x, y / x, 1)
    if power <= 0:
        return None
    allowed = np.maximum(CONSTANT_PART * y, power * CONSTANT_WINDOW_S)
    if np.mean(np.abs(y - (power * x + product)) <= allowed) < 0.99:
        return None
    extra = windows.assign(extra_s=y / power - x).groupby(["model", "stage"])["extra_s"]
    scatter_s = float(np.sqrt(np.mean((y / power - x - extra.transform("mean")) ** 2)))
    return ConstantPower(component, float(power), float(product / power), scatter_s, _lines(windows))


def _meter_windows(table: EnergyTable) -> pd.DataFrame:
    """Windows of the meter: timed seconds and joules of all their videos, columns by component."""
    runs = table.videos.set_index("line")["runs"]
    windows = table.windows.assign(runs=table.windows["line"].map(runs))
    windows["timed_s"] = windows["duration_s"] * windows["runs"]
    for component in COMPONENTS:
        windows[component] = windows[f"{component}_energy_J"] * windows["runs"]
    return windows


def constant_power_columns(table: EnergyTable) -> list[Finding]:
    """Energies that are a constant times time, and not said to be."""
    found = []
    for component in COMPONENTS:
        fit = None if component in table.constants else constant_power(table, component)
        if fit:
            found.append(
                Finding(
                    "constant_power_columns", "error", f"{component} energy", fit.lines,
                    f"every value is {fit.power_W:.2f} W × (timed window + {fit.extra_s:.2f} s); over "
                    f"{len(fit.lines)} rows the extra time scatters by {1000 * fit.extra_std_s:.0f} ms: this "
                    "is no reading of an instrument",
                    "call it a constant, add it to no measured energy, and say what set the power",
                    {"power_W": fit.power_W, "extra_s": fit.extra_s, "extra_std_s": fit.extra_std_s},
                )
            )  # fmt: skip
    return found


def idle_tails(table: EnergyTable) -> list[Finding]:
    """Seconds that the meter counts and the clock does not, where they weigh on short windows.

    Known only through a component with constant power: its energy is the length of the meter's window.
    """
    fits = [fit for component in COMPONENTS if (fit := constant_power(table, component))]
    if not fits:
        return []
    extra_s = min(fits, key=lambda fit: fit.extra_std_s).extra_s
    windows = _meter_windows(table)
    windows["part"] = extra_s / windows["timed_s"]
    short = windows[windows["part"] > TAIL_PART]
    if short.empty:
        return []
    parts = {" ".join(names): float(group["part"].mean()) for names, group in groups(short, "model", "stage")}
    shown = ", ".join(
        f"{name} {_percent(parts[name])}" for name in sorted(parts, key=parts.__getitem__)[::-1]
    )
    return [
        Finding(
            "idle_tails", "warning", "all energies", _lines(short),
            f"the meter's windows are {extra_s:.2f} s longer than what was timed; of the timed window that "
            f"is {shown}",
            "stop the meter with the clock, or measure many videos in one window; do not divide these "
            "energies by these durations",
            {"extra_s": extra_s, "largest_percent": 100 * max(parts.values())},
        )
    ]  # fmt: skip


# --- power and scope ----------------------------------------------------------------------------------------


def power_above_limit(table: EnergyTable) -> list[Finding]:
    """GPU energy over duration above the board's power: of windows, and of lines over their first one."""
    if table.accelerator is None:
        return []
    limit_W = table.accelerator.board_power_W
    found = []
    windows = table.windows.assign(power_W=table.windows["gpu_energy_J"] / table.windows["duration_s"])
    high = windows[windows["power_W"] > OVER_LIMIT * limit_W]
    for (model, stage), group in groups(high, "model", "stage"):
        mean_W = float(group["power_W"].mean())
        found.append(
            Finding(
                "power_above_limit", "error", f"{model}, window {stage!r}", _lines(group),
                f"{group['gpu_energy_J'].mean():.1f} J in {group['duration_s'].mean():.4g} s is "
                f"{mean_W:.0f} W on a board of {limit_W:.0f} W",
                "energy and duration are not of the same window: find what the meter counted besides",
                {"power_W": mean_W, "limit_W": limit_W},
            )
        )  # fmt: skip
    totals = table.totals
    several = totals[totals["stages"] > 1]
    power_W = several["gpu_energy_J"] / several["first_s"]
    for (model,), group in groups(several[power_W > OVER_LIMIT * limit_W], "model"):
        mean_W = float((group["gpu_energy_J"] / group["first_s"]).mean())
        found.append(
            Finding(
                "power_above_limit", "error", f"{model}, whole video", _lines(group),
                f"the energy of all its windows ({group['gpu_energy_J'].mean() / 3600:.3g} Wh) over its "
                f"first duration ({group['first_s'].mean():.3g} s) is {mean_W:.0f} W on a board of "
                f"{limit_W:.0f} W",
                "divide by the durations of all windows",
                {"power_W": mean_W, "limit_W": limit_W},
            )
        )  # fmt: skip
    return found


def scopes_differ(table: EnergyTable) -> list[Finding]:
    """Lines whose first duration is of a part of what was made, beside models where it is of the whole."""
    totals = table.totals
    if totals["stages"].nunique() < 2:
        return []
    found = []
    for (model,), group in groups(totals[totals["stages"] > 1], "model"):
        ratio = float((group["duration_s"] / group["first_s"]).mean())
        found.append(
            Finding(
                "scopes_differ", "error", model, _lines(group),
                f"its first duration ({group['first_s'].mean():.2f} s) is of one of {group['stages'].max()} "
                f"windows; all of them take {group['duration_s'].mean():.2f} s, {ratio:.2f} times as long",
                "compare models by the sum over all windows, in latency as in energy",
                {"first_s": float(group["first_s"].mean()), "whole_s": float(group["duration_s"].mean()),
                 "ratio": ratio},
            )
        )  # fmt: skip
    return found


def cpu_follows_neighbours(table: EnergyTable) -> list[Finding]:
    """CPU power that scatters between repetitions in which the GPU's does not."""
    totals = table.totals
    powers = pd.DataFrame(
        {name: totals[name] for name in ("model", "line", *OWN_SIZES)}
        | {part: totals[f"{part}_energy_J"] / totals["duration_s"] for part in ("gpu", "cpu")}
    )
    least, times = CPU_SCATTER
    found = []
    for (model, *_), group in groups(powers, "model", *OWN_SIZES):
        scatter = group[["gpu", "cpu"]].std() / group[["gpu", "cpu"]].mean()
        if len(group) < FEWEST_WINDOWS or not scatter["cpu"] > max(least, times * scatter["gpu"]):
            continue
        found.append(
            Finding(
                "cpu_follows_neighbours", "warning", f"{model}, CPU energy", _lines(group),
                f"CPU power runs from {group['cpu'].min():.0f} to {group['cpu'].max():.0f} W (scatter "
                f"{_percent(scatter['cpu'])}) while GPU power scatters by {_percent(scatter['gpu'])}",
                "a load model of the whole machine behaves so: say how the CPU was metered, and who else ran",
                {"cpu_power_min_W": float(group["cpu"].min()), "cpu_power_max_W": float(group["cpu"].max()),
                 "cpu_scatter_percent": 100 * float(scatter["cpu"]),
                 "gpu_scatter_percent": 100 * float(scatter["gpu"])},
            )
        )  # fmt: skip
    return found


# --- labels against work ------------------------------------------------------------------------------------


def labels_against_work(table: EnergyTable) -> list[Finding]:
    """Sizes and steps with which the GPU would have run at an impossible share of its peak.

    The work is the true one of the model file's architecture (:func:`t2v_energy.work.true_work`); the latency
    is of all windows of a line.
    """
    card = table.accelerator
    if card is None or card.nominal:
        return []
    peak = card.peak_bf16_dense_TFLOPs * 1e12
    found = []
    for (key, *sizes), group in groups(table.totals, "key", *OWN_SIZES):
        work = _work(table, key, sizes)
        if work is None:
            continue
        latency_s = float(group["duration_s"].mean())
        mfu = work.total_flop / latency_s / peak
        if PLAUSIBLE_MFU[0] <= mfu <= PLAUSIBLE_MFU[1]:
            continue
        defaults = table.models[key].defaults
        usual = [getattr(defaults, name) for name in OWN_SIZES]
        other = _work(table, key, usual)
        numbers = {"mfu": mfu, "latency_s": latency_s, "flop": work.total_flop}
        hint = ""
        if other is not None and usual != sizes:
            numbers["default_mfu"] = other.total_flop / latency_s / peak
            hint = (
                f"; at the model's defaults ({_size(usual)}) it would be {_percent(numbers['default_mfu'])}"
            )
        found.append(
            Finding(
                "labels_against_work", "error", str(group["model"].iloc[0]), _lines(group),
                f"labelled {_size(sizes)}: {work.total_flop:.3g} FLOP in {latency_s:.4g} s is "
                f"{_percent(mfu)} of the board's peak{hint}",
                "size, frames or steps are not those that ran: take them from the script, not from the label",
                numbers,
            )
        )  # fmt: skip
    return found


def sizes_not_run(table: EnergyTable) -> list[Finding]:
    """Sizes that a model's pipeline refuses, and frames or sides that it changes."""
    found: list[Finding] = []
    rounded: dict[str, dict[int, tuple[int, pd.DataFrame]]] = {}
    for (key, *sizes), group in groups(table.videos, "key", *OWN_SIZES):
        if not key:
            continue
        height, width, frames = sizes[:3]
        file, subject = table.models[key], str(group["model"].iloc[0])
        try:
            made_frames, made = made_size(file, height, width, frames)
        except UserError as error:
            remedy = "take the size that really ran from the script or from the videos"
            found.append(
                Finding("sizes_not_run", "error", subject, _lines(group),
                        f"{height}×{width}: {error.what}; the pipeline refuses it", remedy)
            )  # fmt: skip
            continue
        if made_frames != frames:
            rounded.setdefault(subject, {})[frames] = (made_frames, group)
        if made != (height, width):
            found.append(
                Finding("sizes_not_run", "note", subject, _lines(group),
                        f"{height}×{width} is asked for and {made[0]}×{made[1]} decoded",
                        f"count pixels at {made[0]}×{made[1]}", {"height": made[0], "width": made[1]})
            )  # fmt: skip
    return found + [_rounded_frames(subject, changes) for subject, changes in rounded.items()]


def _rounded_frames(subject: str, changes: Mapping[int, tuple[int, pd.DataFrame]]) -> Finding:
    lines = _lines(pd.concat([group for _, group in changes.values()]))
    shown = ", ".join(f"{made} for {asked}" for asked, (made, _) in sorted(changes.items()))
    asked, (made, _) = max(changes.items())
    return Finding(
        "sizes_not_run", "warning", subject, lines,
        f"more or fewer frames are made than asked for ({shown}): the pipeline denoises whole latent frames",
        "count the frames that are made", {"asked": asked, "made": made},
    )  # fmt: skip


def made_size(file: ModelFile, height: int, width: int, frames: int) -> tuple[int, tuple[int, int]]:
    """Frames, and height and width, of the video that the pipeline decodes."""
    _, (_, rows, columns) = latents(file, height, width, frames)
    factor = decoder(file).spatial_factor(file.components["vae"].config)
    return made_frames(file, frames), (rows * factor, columns * factor)


def _work(table: EnergyTable, key: str, sizes: list[int]) -> Work | None:
    """True work of one video; None where the model is unknown or refuses the size (:func:`sizes_not_run`)."""
    try:
        return true_work(table.models[key], *sizes) if key else None
    except UserError:
        return None


# --- repetition and prompts ---------------------------------------------------------------------------------


def no_run_variance(table: EnergyTable) -> list[Finding]:
    """Several runs behind each row, and no column that says how they scatter."""
    several = table.videos[table.videos["runs"] > 1]
    if several.empty or any(SPREAD.search(name) for name in table.columns):
        return []
    runs = sorted(set(several["runs"]))
    return [
        Finding(
            "no_run_variance", "warning", "all quantities", _lines(several),
            f"each row is the mean of {' or '.join(map(str, runs))} runs, and no column holds their spread: "
            "a standard deviation over rows is of prompts, not of repetition",
            "keep every run, or a standard deviation and a count beside each mean",
            {"runs": float(max(runs)), "rows": float(len(several))},
        )
    ]  # fmt: skip


def prompts_incomplete(table: EnergyTable) -> list[Finding]:
    """Models that lack prompts which others have, and prompts that one configuration has twice."""
    videos = table.videos[table.videos["prompt"] != ""]
    every, found = set(videos["prompt"]), []
    missing = {model: every - set(group["prompt"]) for (model,), group in groups(videos, "model")}
    for model, lacking in missing.items():
        if lacking:
            group = videos[videos["model"] == model]
            found.append(
                Finding(
                    "prompts_incomplete", "warning", model, _lines(group),
                    f"{len(every) - len(lacking)} of {len(every)} prompts are there; missing, for one: "
                    f"{min(lacking)[:60]!r}",
                    "compare models over the prompts that all of them have, and say why some are missing",
                    {"prompts": float(len(every) - len(lacking)), "all_prompts": float(len(every))},
                )
            )  # fmt: skip
    same = ["model", *OWN_SIZES, "prompt"]
    repeated = videos[videos.duplicated(same, keep=False)]
    for (model,), group in groups(repeated, "model"):
        found.append(
            Finding(
                "prompts_incomplete", "warning", model, _lines(group),
                f"{group['prompt'].nunique()} prompts are there more than once with the same configuration",
                "a mean over rows counts them twice: drop or name the repetitions",
                {"prompts": float(group["prompt"].nunique()), "rows": float(len(group))},
            )
        )  # fmt: skip
    return found


# --- units --------------------------------------------------------------------------------------------------


def units_off(table: EnergyTable) -> list[Finding]:
    """Mean powers that no such component has, and that one wrong unit would explain."""
    found = []
    for (model,), group in groups(table.totals, "model"):
        off = {}
        for component in COMPONENTS:
            power_W = float((group[f"{component}_energy_J"] / group["duration_s"]).median())
            factor = _unit_factor(power_W, *_plausible_W(table, component))
            if factor is not None:
                off[component] = (power_W, factor)
        given = [part for part in COMPONENTS if group[f"{part}_energy_J"].notna().any()]
        clock = len(off) == len(given) > 1 and len({factor for _, factor in off.values()}) == 1
        where = "durations (or all energies)" if clock else ", ".join(f"{part} energy" for part in off)
        if off:
            shown = ", ".join(f"{part} {power_W:.4g} W" for part, (power_W, _) in off.items())
            factor = next(iter(off.values()))[1]
            found.append(
                Finding(
                    "units_off", "error", f"{model}, {where}", _lines(group),
                    f"mean power would be {shown}; a unit wrong by a factor of {factor:g} explains it",
                    "energies are read as kWh (the study's columns) or Wh (ours), durations as s",
                    {f"{part}_power_W": power_W for part, (power_W, _) in off.items()} | {"factor": factor},
                )
            )  # fmt: skip
    return found


def _plausible_W(table: EnergyTable, component: str) -> tuple[float, float]:
    if component in PLAUSIBLE_W:
        return PLAUSIBLE_W[component]
    board_W = table.accelerator.board_power_W if table.accelerator else UNKNOWN_BOARD_W
    return PLAUSIBLE_GPU[0] * board_W, PLAUSIBLE_GPU[1] * board_W


def _unit_factor(power_W: float, low: float, high: float) -> float | None:
    """Factor of :data:`UNIT_FACTORS` that a value is off by; None where it is plausible, or none helps."""
    if not isfinite(power_W) or low <= power_W <= high:
        return None
    return next((factor for factor in UNIT_FACTORS if low <= power_W / factor <= high), None)


# --- rows and words -----------------------------------------------------------------------------------------


def groups(rows: pd.DataFrame, *names: str) -> Iterator[tuple[list[Any], pd.DataFrame]]:
    """Rows that agree in these columns, with their values there, in the file's order."""
    for values, group in rows.groupby(list(names), sort=False):
        yield [*values], group


def _lines(rows: pd.DataFrame) -> tuple[int, ...]:
    return tuple(sorted({int(line) for line in rows["line"]}))


def _percent(part: float) -> str:
    return f"{100 * part:.3g} %"


def _size(sizes: Iterable[int]) -> str:
    height, width, frames, steps = sizes
    return f"{height}×{width}, {frames} frames, {steps} steps"


CHECKS: tuple[Check, ...] = (
    units_off,
    constant_power_columns,
    idle_tails,
    power_above_limit,
    scopes_differ,
    cpu_follows_neighbours,
    labels_against_work,
    sizes_not_run,
    no_run_variance,
    prompts_incomplete,
)
"""Every check, in the order of their findings of one severity."""
