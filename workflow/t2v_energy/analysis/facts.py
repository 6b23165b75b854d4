"""What the records of one experiment say besides their measurements: machine, protocol, their own cost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

from t2v_energy.analysis.conditions import conditions
from t2v_energy.errors import UserError
from t2v_energy.measurement.record import record_paths

J_PER_WH = 3600.0


@dataclass(frozen=True)
class Facts:
    """Facts of an experiment's records.

    Names that differ between records are joined by " and ".  The fields are None where a campaign has no
    GPU or no counter.

    Attributes:
        folder: the experiment's folder, as it was given.
        records: how many record files there are.
        gpu, driver, cpu, weights, cpu_method: as the records name them.
        kernels: the attention kernels that ran in the denoiser.
        power_limit_W: the board's power limit.
        versions: version by package (torch, cuda, cudnn, diffusers, codecarbon, …).
        protocol_settings: the records' own copy of them; what most records have, since single entries of an
            experiment may be measured in another way (larger sizes with fewer generations).
        measuring_s: from the first window's start to the last one's end, summed over the records (s).
        measuring_Wh: what the energy counter rose by from its first kept tick to its last, summed (Wh).
        tick_s: median time between two changes of the counter (s).
        flagged: records that carry a flag.
        boards: GPUs with a UUID of their own.
        passes: randomised passes over the experiment.
        between_min: from the first record's origin to the last one's end, by the hosts' clocks (min).
        generations: one row a measured generation (:func:`t2v_energy.analysis.conditions.conditions`).
    """

    folder: str
    records: int
    gpu: str | None
    driver: str | None
    power_limit_W: float | None
    cpu: str
    cpu_method: str
    weights: str
    kernels: str
    versions: dict[str, str]
    protocol_settings: dict[str, Any]
    measuring_s: float
    measuring_Wh: float | None
    tick_s: float | None
    flagged: int
    boards: int
    passes: int
    between_min: float
    generations: pd.DataFrame


def repository_root(start: Path) -> Path:
    """``start`` or the nearest folder above it that has a Snakefile and a config folder.

    So that a notebook also runs where Jupyter starts it, in its own folder.

    Raises:
        UserError: there is none.
    """
    for folder in (start, *start.resolve().parents):
        if (folder / "Snakefile").is_file() and (folder / "config").is_dir():
            return folder
    raise UserError("not inside the repository", where=str(start.resolve()), remedy="run from its root")


def read_facts(folder: str, root: Path = Path()) -> Facts:
    """Facts of the records in ``folder`` (results/raw/<campaign>/<experiment>), relative to ``root``.

    Reads the JSON without checking it whole again: stage 3 did.

    Raises:
        UserError: there is no record, or the records were made on GPUs with different power limits.
    """
    path = root / folder
    records = [json.loads(file.read_text(encoding="utf-8")) for file in record_paths(path)]
    if not records:
        raise UserError("there are no records here", where=str(path), remedy="measure the experiment first")
    environments = [r["environment"] for r in records]
    gpus = [e["gpu"] for e in environments if e["gpu"]]
    windows = [r["windows"] for r in records if r["windows"]["end_s"]]
    ticks = [r["ticks"] for r in records if r["ticks"] and len(r["ticks"]["time_s"]) > 1]
    return Facts(
        folder=folder,
        records=len(records),
        gpu=_joined(g["name"] for g in gpus) or None,
        driver=_joined(g["driver"] for g in gpus) or None,
        power_limit_W=_single({g["power_limit_W"] for g in gpus}, "power limits", path),
        cpu=_joined(e["cpu"] for e in environments),
        cpu_method=_joined(r["codecarbon"]["cpu_method"] for r in records if r["codecarbon"]),
        weights=_joined(e["weights"] for e in environments),
        kernels=_joined(k for r in records for k in r["attention_kernels"].get("denoiser", [])),
        versions={
            name: _joined(e["versions"].get(name, "") for e in environments)
            for name in sorted({name for e in environments for name in e["versions"]})
        },
        protocol_settings=_settings(records),
        measuring_s=sum(w["end_s"][-1] - w["start_s"][0] for w in windows),
        measuring_Wh=_counted_Wh(ticks),
        # Ticks are kept around windows only; the median ignores the pauses between them.
        tick_s=median(b - a for t in ticks for a, b in pairwise(t["time_s"])) if ticks else None,
        flagged=sum(bool(r["flags"]) for r in records),
        boards=len({g["uuid"] for g in gpus}),
        passes=len({r["pass_index"] for r in records}),
        between_min=_between_min(records),
        generations=conditions(records),
    )


def _joined(names: Iterable[str]) -> str:
    return " and ".join(sorted({name for name in names if name}))


def _single(values: set[float], what: str, folder: Path) -> float | None:
    if len(values) > 1:
        raise UserError(
            f"the records differ in their {what}: {sorted(values)}",
            where=str(folder),
            remedy="keep records of different set-ups in different campaigns",
        )
    return values.pop() if values else None


def _settings(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Those of the most records: an experiment may measure single entries in another way."""
    counted = Counter(json.dumps(r["protocol_settings"], sort_keys=True) for r in records)
    settings: dict[str, Any] = json.loads(counted.most_common(1)[0][0])
    return settings


def _between_min(records: list[dict[str, Any]]) -> float:
    starts = [datetime.fromisoformat(r["origin"]["utc"]) for r in records]
    lengths_s = [max(r["windows"]["end_s"], default=0.0) for r in records]
    ends = [start + timedelta(seconds=s) for start, s in zip(starts, lengths_s, strict=True)]
    return (max(ends) - min(starts)).total_seconds() / 60


def _counted_Wh(ticks: list[dict[str, Any]]) -> float | None:
    if not ticks:
        return None
    return float(sum(t["energy_mJ"][-1] - t["energy_mJ"][0] for t in ticks)) / 1000 / J_PER_WH
