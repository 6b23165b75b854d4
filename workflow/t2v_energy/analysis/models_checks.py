"""What the study claims of every model, what would be a sign of failure, and the memory that each needs.

Claims: the GPU takes more than 80 % of the energy (section 5.2), the denoiser more than 60 % of the GPU's
time (which the study's project says; the paper does not print it).  Signs of failure: CPU and RAM above 20 %
of the energy, a GPU used below 40 %, step time that does not scale as its work does, throttling.  Records
have no counter of utilisation, so that sign is looked for in three ways, none of which is what a driver calls
utilisation; each line of the table says which it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, log, nan
from typing import Literal

import numpy as np
import pandas as pd

from t2v_energy.analysis.instruments import Record
from t2v_energy.analysis.models import (
    DENOISER_STAGES,
    Models,
    gpu_share_percent,
    networks,
    row_work,
    stage_shares,
    total_energy_Wh,
    total_kind,
)
from t2v_energy.config import Accelerator, ModelFile
from t2v_energy.errors import UserError
from t2v_energy.measurement.validity import ALLOWED_REASONS, CLOCK_REASONS
from t2v_energy.work import parameter_counts

B_PER_GIB = 2**30
BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2, "float16": 2}

# The study's and its project's limits; the last two below are ours, for they give none.
LEAST_GPU_SHARE, LEAST_DENOISER_SHARE = 80.0, 60.0
MOST_HOST_SHARE, LEAST_UTILISATION = 20.0, 40.0
MOST_THROTTLED = 0.0
EXPONENT_WITHIN = 0.15
"""Step time ∝ work^p: |p − 1| at most this.  Our sweeps of Wan2.1-1.3B stay within it."""
LEAST_OF_FASTEST = 50.0
"""Percent of the fastest model's rate of the denoiser (FLOP/s); the study assumes one rate for all."""
LEAST_WORK_RATIO = 2.0
"""An exponent needs two sizes whose steps differ in work by this at least."""

MEMORY_COLUMNS = (
    "model", "title", "stage", "allocated_GiB", "reserved_GiB", "weights_GiB", "smallest_accelerator",
    "smallest_accelerator_GiB", "accelerators", "kind",
)  # fmt: skip
SIGNS_COLUMNS = (
    "model", "check", "type", "place", "measure", "value", "unit", "limit", "asked", "verdict", "reason",
    "kind",
)  # fmt: skip
COMPONENTS_COLUMNS = ("model", "component", "class", "parameters", "dtype", "weights_GiB", "kind")
WHOLE = "whole"
"""The line of memory.csv that holds the largest of all stages."""
Type = Literal["claim", "sign"]


def records_of(models: Models, key: str, records: Iterable[Record]) -> list[Record]:
    """The raw records behind a model's row."""
    row = models.rows[key]
    names = ("experiment", "configuration_id", "protocol")
    wanted = [row[name] for name in names]
    return [r for r in records if r["status"] == "ok" and [r[name] for name in names] == wanted]


# --- components ---------------------------------------------------------------------------------------------


def component_parameters(file: ModelFile) -> dict[str, int] | None:
    """Learnt parameters of each part by its name; None where its architecture has no closed form."""
    try:
        return parameter_counts(file)
    except UserError:
        return None


def components_table(models: Models) -> pd.DataFrame:
    """Every part with weights of every model: class, parameters, number type, size of its weights."""
    rows = []
    for key in models.keys:
        counts = component_parameters(models.files[key]) or {}
        for name, part in models.files[key].components.items():
            if part.dtype:
                count = counts.get(name, nan)
                rows.append(
                    (key, name, part.class_, count, part.dtype,
                     count * BYTES_PER_VALUE[part.dtype] / B_PER_GIB, "modelled")
                )  # fmt: skip
    table = pd.DataFrame(rows, columns=list(COMPONENTS_COLUMNS))
    return table.astype({"parameters": "Int64"})


# --- memory -------------------------------------------------------------------------------------------------


def memory_table(models: Models, records: Sequence[Record]) -> pd.DataFrame:
    """Peak of torch's allocator by stage of each measured model, and what it fits; :data:`MEMORY_COLUMNS`.

    The line :data:`WHOLE` has the largest of the stages and names the accelerator of least memory (of two
    with the same, the one of least power) that has at least as much as torch *reserved*.  Reserved memory
    holds what the allocator keeps and does not use, so a run that frees it in between may need less, down to
    what was allocated; the driver's own context (under 1 GiB) is in neither.  Nobody ran it there.
    """
    rows: list[dict[str, object]] = []
    for key in models.keys:
        found = records_of(models, key, records) if key in models.rows else []
        peaks = {name: _peaks(found, f"{name}_B") for name in ("allocated", "reserved")}
        stages = list(dict.fromkeys(stage for peak in peaks.values() for stage in peak))
        identity: dict[str, object] = {"model": key, "title": models.title(key), "kind": "measured"}
        for stage in stages:
            sizes = {f"{name}_GiB": peak.get(stage, nan) for name, peak in peaks.items()}
            rows.append(identity | {"stage": stage} | sizes)
        if stages:
            whole = {f"{name}_GiB": max(peak.values(), default=nan) for name, peak in peaks.items()}
            needed = whole["reserved_GiB"] if isfinite(whole["reserved_GiB"]) else whole["allocated_GiB"]
            weights = {"weights_GiB": weights_GiB(models.files[key])}
            rows.append(identity | {"stage": WHOLE} | whole | weights | _fitting(models.accelerators, needed))
    return pd.DataFrame(rows, columns=list(MEMORY_COLUMNS))


def _peaks(records: Iterable[Record], name: str) -> dict[str, float]:
    """Largest peak of each stage over the records (GiB)."""
    found: dict[str, float] = {}
    for record in records:
        for stage, size_B in record["memory"][name].items():
            found[stage] = max(found.get(stage, 0.0), size_B / B_PER_GIB)
    return found


def weights_GiB(file: ModelFile) -> float:
    """All parts' weights in their number types (GiB); NaN where parameters are not counted."""
    counts = component_parameters(file)
    if counts is None:
        return nan
    types = {name: file.components[name].dtype or "float32" for name in counts}
    return sum(n * BYTES_PER_VALUE[types[name]] for name, n in counts.items()) / B_PER_GIB


def _fitting(accelerators: Mapping[str, Accelerator], needed_GiB: float) -> dict[str, object]:
    """The smallest accelerator with so much memory, and all of them, by rising memory."""
    published = {key: a for key, a in accelerators.items() if not a.nominal}
    ordered = sorted(published, key=lambda key: (published[key].memory_GiB, published[key].board_power_W))
    enough = [key for key in ordered if published[key].memory_GiB >= needed_GiB]
    if not enough:
        return {"smallest_accelerator": "none", "accelerators": ""}
    return {
        "smallest_accelerator": enough[0],
        "smallest_accelerator_GiB": published[enough[0]].memory_GiB,
        "accelerators": ";".join(enough),
    }


# --- claims and signs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Finding:
    """One line of signs.csv, without its model and verdict."""

    check: str
    type: Type
    place: str
    measure: str
    value: float
    unit: str
    limit: float
    asked: Literal["above", "at least", "at most", "within"]
    reason: str
    kind: str

    @property
    def met(self) -> bool:
        """Whether the value is what is asked for."""
        if self.asked == "within":
            return abs(self.value - 1) <= self.limit
        return {
            "above": self.value > self.limit,
            "at least": self.value >= self.limit,
            "at most": self.value <= self.limit,
        }[self.asked]

    @property
    def verdict(self) -> str:
        """``holds`` or ``fails`` of a claim, ``absent`` or ``present`` of a sign; ``unknown``."""
        if not isfinite(self.value):
            return "unknown"
        words = ("fails", "holds") if self.type == "claim" else ("present", "absent")
        return words[self.met]


def signs_table(models: Models, records: Sequence[Record]) -> pd.DataFrame:
    """Every claim and sign of every measured model, columns :data:`SIGNS_COLUMNS`."""
    fastest = max(
        (_rate(models, key) for key in models.rows), default=nan, key=lambda r: r if isfinite(r) else -1
    )
    rows = []
    for key in models.keys:
        if key not in models.rows:
            continue
        own = records_of(models, key, records)
        row, file = models.rows[key], models.files[key]
        found = [
            *_energy_findings(row),
            _denoiser_finding(file, row),
            *_utilisation_findings(file, row, own),
            _exponent_finding(models, key),
            _rate_finding(_rate(models, key), fastest),
            _throttling_finding(own),
        ]
        for finding in found:
            fields = {name: getattr(finding, name) for name in SIGNS_COLUMNS if name != "model"}
            rows.append({"model": key} | fields)
    return pd.DataFrame(rows, columns=list(SIGNS_COLUMNS))


def _energy_findings(row: pd.Series) -> list[_Finding]:
    share = gpu_share_percent(row)
    parts = [
        f"{name.upper()} {100 * float(row[f'{name}_energy_Wh']) / total_energy_Wh(row):.1f} % "
        f"({row[f'{name}_energy_Wh_kind']})"
        for name in ("gpu", "cpu", "ram")
    ]
    reason = f"{', '.join(parts)}: shares follow from models and constants as much as from the counter"
    if not isfinite(share):
        reason = "an energy is missing (no counter, or no CodeCarbon)"
    kind = total_kind(row)
    return [
        _Finding(
            "gpu_energy_share", "claim", "section 5.2", "GPU / (GPU + CPU + RAM)", share, "%",
            LEAST_GPU_SHARE, "above", reason, kind,
        ),
        _Finding(
            "host_energy_share", "sign", "", "(CPU + RAM) / (GPU + CPU + RAM)", 100 - share, "%",
            MOST_HOST_SHARE, "at most", reason, kind,
        ),
    ]  # fmt: skip


def denoiser_share_percent(file: ModelFile, row: pd.Series) -> float:
    """The denoiser's part of the time that networks run on the GPU (%), LTX-Video's refinement included."""
    shares = stage_shares(file, row, "time")
    on_gpu = sum(shares.get(stage, 0.0) for stage in networks(file))
    return 100 * sum(shares.get(stage, 0.0) for stage in DENOISER_STAGES) / on_gpu if on_gpu > 0 else nan


def _denoiser_finding(file: ModelFile, row: pd.Series) -> _Finding:
    shares = stage_shares(file, row, "time")
    of_latency = 100 * sum(shares.get(stage, 0.0) for stage in DENOISER_STAGES)
    others = ", ".join(
        f"{stage} {100 * shares[stage]:.1f} %" for stage in shares if stage not in DENOISER_STAGES
    )
    return _Finding(
        "denoiser_time_share", "claim", "", "denoiser / time of all networks",
        denoiser_share_percent(file, row), "%", LEAST_DENOISER_SHARE, "above",
        f"of the latency {of_latency:.1f} %; the rest: {others}", "measured",
    )  # fmt: skip


def _utilisation_findings(file: ModelFile, row: pd.Series, records: list[Record]) -> list[_Finding]:
    """The GPU's use by three measures; none is the driver's counter, which records do not have."""
    shares = stage_shares(file, row, "time")
    busy = 100 * sum(shares.get(stage, 0.0) for stage in networks(file)) if shares else nan
    limits = [r["environment"]["gpu"]["power_limit_W"] for r in records if r["environment"]["gpu"]]
    limit_W = min(limits, default=nan)
    power_W, idle_W = float(row["mean_power_W"]), float(row["idle_power_W"])
    power = 100 * (power_W - idle_W) / (limit_W - idle_W)
    used = 100 * float(row["mfu"])

    def finding(check: str, measure: str, value: float, kind: str, reason: str) -> _Finding:
        return _Finding(check, "sign", "", measure, value, "%", LEAST_UTILISATION, "at least", reason, kind)

    powers = f"mean {power_W:.0f} W, idle {idle_W:.0f} W, limit {limit_W:.0f} W"
    arithmetic = (
        "no utilisation but a share of the peak that no model reaches: kernels that are always busy may stay "
        "below 40 %"
    )
    return [
        finding(
            "utilisation_time", "time in networks / latency", busy, "measured",
            "an upper bound: within a network's call the GPU may still wait for its host",
        ),
        finding(
            "utilisation_power", "(mean − idle power) / (power limit − idle power)", power, "measured",
            powers if isfinite(power) else "no counter",
        ),
        finding(
            "utilisation_arithmetic", "MFU: true work / (latency × dense bf16 peak)", used, "modelled",
            arithmetic if isfinite(used) else "no count of operations, or no published peak",
        ),
    ]  # fmt: skip


def step_points(models: Models, key: str) -> tuple[list[float], list[float]]:
    """Work (FLOP) and time (s) of a step at each size that the campaign has of a model, one kernel's."""
    row = models.rows[key]
    rows = models.others
    rows = rows[(rows["model"] == key) & (rows["attention_kernel"] == row["attention_kernel"])]
    found: dict[float, list[float]] = {}
    for _, other in rows.iterrows():
        work = row_work(models, other)
        if work and isfinite(float(other["step_time_s"])):
            flop = work.flop_by_stage["denoiser"] / int(other["num_inference_steps"])
            found.setdefault(flop, []).append(float(other["step_time_s"]))
    flops = sorted(found)
    return flops, [float(np.mean(found[flop])) for flop in flops]


def _exponent_finding(models: Models, key: str) -> _Finding:
    """p of step time ∝ work^p over the model's sizes, by least squares of the logarithms."""
    flops, times = step_points(models, key)
    value, reason = nan, "no count of operations"
    if flops:
        reason = f"{len(flops)} size{'s' if len(flops) > 1 else ''}: an exponent needs two, a factor of "
        reason += f"{LEAST_WORK_RATIO:g} in work apart"
        if flops[-1] >= LEAST_WORK_RATIO * flops[0]:
            value = float(np.polyfit(np.log(flops), np.log(times), 1)[0])
            ends = log(times[-1] / times[0]) / log(flops[-1] / flops[0])
            reason = f"{len(flops)} sizes, work from {flops[0]:.3g} to {flops[-1]:.3g} FLOP; "
            reason += f"between the ends {ends:.3f}"
    return _Finding(
        "step_time_exponent", "sign", "", "p of step time ∝ work^p", value, "", EXPONENT_WITHIN, "within",
        reason, "modelled",
    )  # fmt: skip


def _rate(models: Models, key: str) -> float:
    """FLOP/s of the denoiser in a whole video; NaN where operations are not counted."""
    row = models.rows[key]
    work = row_work(models, row)
    seconds = float(row["latency_s"]) * float(row["denoiser_time_share"])
    return work.flop_by_stage["denoiser"] / seconds if work and seconds > 0 else nan


def _rate_finding(rate: float, fastest: float) -> _Finding:
    reason = f"{rate / 1e12:.4g} of {fastest / 1e12:.4g} TFLOP/s: one rate for all models would give 100 %"
    return _Finding(
        "step_rate", "sign", "", "the denoiser's FLOP/s over the fastest model's", 100 * rate / fastest, "%",
        LEAST_OF_FASTEST, "at least", reason if isfinite(rate) else "no count of operations", "modelled",
    )  # fmt: skip


def _throttling_finding(records: Sequence[Record]) -> _Finding:
    """Samples within measured generations at which the clock was held down, but by the power cap."""
    seen = np.concatenate([np.empty(0, dtype=np.int64), *(_reasons(record) for record in records)])
    refused = seen & ~ALLOWED_REASONS
    if not seen.size:
        value, reason = nan, "no samples (no GPU)"
    else:
        value = 100 * float(np.mean(refused > 0))
        bits = int(np.bitwise_or.reduce(refused))
        names = [name for bit, name in CLOCK_REASONS.items() if bits & bit]
        capped = 100 * float(np.mean(seen & 0x4 > 0))
        reason = f"{seen.size} samples" + (f": {', '.join(names)}" if names else "")
        reason += f"; the power cap, which is allowed, in {capped:.0f} %"
    return _Finding(
        "throttling", "sign", "", "samples with a refused clock reason", value, "%", MOST_THROTTLED,
        "at most", reason, "measured",
    )  # fmt: skip


def _reasons(record: Record) -> np.ndarray:
    """NVML's bit masks that were read within the measured generations."""
    samples, windows = record["samples"], record["windows"]
    if not samples:
        return np.empty(0, dtype=np.int64)
    read = [reasons is not None for reasons in samples["throttle_reasons"]]
    time_s = np.asarray(samples["time_s"], dtype=np.float64)
    during = np.zeros(time_s.size, dtype=bool)
    for kind, start, end in zip(windows["kind"], windows["start_s"], windows["end_s"], strict=True):
        if kind == "generation":
            during |= (time_s >= start) & (time_s <= end)
    masks = [
        m
        for m, known, inside in zip(samples["throttle_reasons"], read, during, strict=True)
        if known and inside
    ]
    return np.asarray(masks, dtype=np.int64)
