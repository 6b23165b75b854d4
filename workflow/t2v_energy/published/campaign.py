"""Campaign ``published-h100``: the authors' tables in the form of stage 3.

Nothing pretends to be more than it is.  There are no ticks and no spans, so no stages, steps or intervals of
repetition: ``protocol`` is ``published``, ``_std`` is over prompts, and ``_ci95`` of a mean over prompts is
Student's t over them.  GPU energy is measured (the counter, through CodeCarbon), CPU energy modelled
(CodeCarbon's load model: its release had no RAPL reader for that machine), RAM energy a constant power times
time (:mod:`t2v_energy.audit`).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import nan, sqrt
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from scipy.stats import t as student_t

from t2v_energy.audit.checks import PLAUSIBLE_MFU, groups, made_size
from t2v_energy.config import load_accelerator, load_campaign, load_model
from t2v_energy.errors import UserError
from t2v_energy.published.tables import check_sha256, read_cross_model, read_sweeps
from t2v_energy.published.videos import QUANTITIES, videos
from t2v_energy.work import true_work

CAMPAIGN = "published-h100"
Source = Literal["cross_model", "sweeps"]
CROSS_MODEL = "cross-model"
PROTOCOL = "published"
KERNEL = "flash"  # section 4.1: FlashAttention, which torch then chose by itself
KINDS = {"gpu_energy_Wh": "measured", "cpu_energy_Wh": "modelled", "ram_energy_Wh": "constant"}
SIZES = ("height", "width", "num_frames", "num_inference_steps")
CONFIDENCE = 0.95
REFUSED = "refused_by_pipeline"
"""Status of a row whose labelled size the pipeline does not run, so that the label is wrong."""


def checked_file(root: Path, source: Source, path: Path | None) -> Path | None:
    """``path`` once its checksum is the one that the campaign pins; None stays None.

    Raises:
        UserError: no such file, or another checksum.
    """
    if path is not None:
        pinned = load_campaign(root, CAMPAIGN).sources.get(source)
        check_sha256(path, pinned.sha256 if pinned else None)
    return path


def configurations(root: Path, cross_model: Path | None, sweeps: Path | None) -> pd.DataFrame:
    """configurations.csv of the campaign: one row a configuration, means over its rows in the files.

    Of the cross-model table a row is at the model file's defaults where its label is refuted by its work
    (``labelled`` says what the file has); of the sweeps a row is as labelled, frames as the pipeline makes
    them.

    Raises:
        UserError: neither file is given, or one of them is not what it should be.
    """
    rows = []
    if cross_model is not None:
        table = videos(read_cross_model(cross_model), root, str(cross_model)).assign(experiment=CROSS_MODEL)
        rows += list(_rows(root, table))
    if sweeps is not None:
        rows += list(_rows(root, videos(read_sweeps(sweeps), root, str(sweeps))))
    if not rows:
        raise UserError(
            "neither table is given", where=CAMPAIGN, remedy="--config published_cross_model=FILE"
        )
    return pd.DataFrame(rows)


def _rows(root: Path, table: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """One row a configuration that ran: labels that the pipeline makes alike are one."""
    found: dict[tuple[str, str, tuple[int, ...]], list[tuple[str, str, pd.DataFrame]]] = {}
    for (experiment, key, *labelled), group in groups(table, "experiment", "model", *SIZES):
        sizes, flag = ran(root, key, labelled, float(group["latency_s"].mean()))
        part = (configuration_id(key, labelled).partition("_")[2], flag, group)
        found.setdefault((experiment, key, tuple(sizes)), []).append(part)
    for (experiment, key, sizes_), parts in found.items():
        labels, flags, rows = zip(*parts, strict=True)
        row = _row(root, experiment, key, [*sizes_], pd.concat(rows))
        refused = REFUSED in flags
        yield row | {
            "labelled": ";".join(labels),
            "flags": ";".join(sorted(set(flags) - {""})),
            "status": REFUSED if refused else "ok",
        }


def _row(root: Path, experiment: str, key: str, sizes: list[int], group: pd.DataFrame) -> dict[str, Any]:
    latency_s = float(group["latency_s"].mean())
    row: dict[str, Any] = {
        "experiment": experiment, "model": key, **dict(zip(SIZES, sizes, strict=True)),
        "protocol": PROTOCOL, "attention_kernel": KERNEL, "intervention": "", "status": "ok",
    }  # fmt: skip
    for name in QUANTITIES:
        row |= estimate(group[name], name)
        if name in KINDS:
            row[f"{name}_kind"] = KINDS[name]
    for name in ("latency_s", "gpu_energy_Wh"):
        row |= {f"{name}_pass_means": "", f"{name}_pass_spread_percent": nan}
    return row | {
        "mfu": share_of_peak(root, key, sizes, latency_s),
        "mean_power_W": 3600 * row["gpu_energy_Wh"] / latency_s,
        "first_window_s": float(group["first_latency_s"].mean()),
        "runs": int(group["runs"].iloc[0]),
        "labelled": "",
        "gpus": 1,
        "gpu_uuids": "",
        "flags": "",
        "configuration_id": configuration_id(key, sizes),
        "passes": 1,
    }


def ran(root: Path, key: str, labelled: list[int], latency_s: float) -> tuple[list[int], str]:
    """Height, width, frames and steps that ran, and a flag where they are not the labelled ones.

    Frames are those that the pipeline makes.  A label with which the GPU would have run at an impossible
    share of its peak (:data:`t2v_energy.audit.checks.PLAUSIBLE_MFU`) gives way to the model file's defaults,
    where these are possible.
    """
    low, high = PLAUSIBLE_MFU
    if not low <= share_of_peak(root, key, labelled, latency_s) <= high:
        defaults = [getattr(load_model(root, key).defaults, name) for name in SIZES]
        if low <= share_of_peak(root, key, defaults, latency_s) <= high:
            return defaults, "label_refuted_by_work"
    height, width, frames, steps = labelled
    try:
        made, _ = made_size(load_model(root, key), height, width, frames)
    except UserError:
        return labelled, REFUSED
    return [height, width, made, steps], "" if made == frames else "frames_as_made"


def share_of_peak(root: Path, key: str, sizes: list[int], latency_s: float) -> float:
    """True work over latency and the board's dense bfloat16 peak; NaN where the pipeline refuses the size."""
    card = load_accelerator(root, load_campaign(root, CAMPAIGN).accelerator)
    try:
        flop = true_work(load_model(root, key), *sizes).total_flop
    except UserError:
        return nan
    return flop / latency_s / (card.peak_bf16_dense_TFLOPs * 1e12)


def estimate(values: pd.Series, name: str) -> dict[str, float]:
    """Mean, sample standard deviation, 95 % half-width of the mean (Student's t) and count, over prompts."""
    n = len(values)
    std = float(values.std()) if n > 1 else nan
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, n - 1)) * std / sqrt(n) if n > 1 else nan
    return {name: float(values.mean()), f"{name}_std": std, f"{name}_ci95": half, f"{name}_n": n}


def configuration_id(key: str, sizes: list[int]) -> str:
    """``<model>_<H>x<W>_<T>f_<S>s``."""
    height, width, frames, steps = sizes
    return f"{key}_{height}x{width}_{frames}f_{steps}s"
