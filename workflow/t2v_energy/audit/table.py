"""A table of energies as the checks see it, from either of two schemas.

* The study's (:mod:`t2v_energy.published.tables`): kWh and seconds, one row a prompt, several windows a row.
* Ours (configurations.csv, POINTS.csv): ``model, height, width, num_frames, num_inference_steps, latency_s``
  and ``gpu_energy_Wh``; optional ``cpu_energy_Wh``, ``ram_energy_Wh``, ``prompt``, ``runs``, ``gpu``, and of
  each quantity ``_std``, ``_ci95``, ``_kind``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from t2v_energy.config import Accelerator, ModelFile, load_accelerator, load_model
from t2v_energy.errors import UserError
from t2v_energy.published.names import accelerator_key, model_keys, plain
from t2v_energy.published.tables import (
    COMPONENTS,
    CROSS_MODEL_COLUMNS,
    J_PER_KWH,
    MEASURES,
    STAGES,
    energy_columns,
    read_csv,
    with_numbers,
)

J_PER_WH = 3600.0
OWN_SIZES = ("height", "width", "num_frames", "num_inference_steps")
OWN_COLUMNS = ("model", *OWN_SIZES, "latency_s", "gpu_energy_Wh")
SPREAD = re.compile(r"_(std|sd|sem|var|ci95|iqr)$")
"""Ends of the names of columns that hold a spread."""


@dataclass(frozen=True)
class EnergyTable:
    """What a file says.

    Attributes:
        source: its path, as given.
        columns: its header.
        videos: one row a line of the file: ``line``, ``model`` (as written), ``key`` (of the model file;
            empty where there is none), ``prompt`` (empty where there is no such column), ``height``,
            ``width``, ``num_frames``, ``num_inference_steps``, ``runs`` (videos in the meter's window),
            ``gpu``.
        windows: one row a line and stage: ``line``, ``model``, ``stage``, ``duration_s``, and
            ``gpu_energy_J``, ``cpu_energy_J``, ``ram_energy_J`` (NaN where the file has none), of one video.
        constants: components (``gpu``, ``cpu``, ``ram``) that the file itself calls constant or modelled.
        models: model file by key.
        accelerator: the board that all lines name; None where it is unknown.
    """

    source: str
    columns: tuple[str, ...]
    videos: pd.DataFrame
    windows: pd.DataFrame
    constants: frozenset[str]
    models: Mapping[str, ModelFile]
    accelerator: Accelerator | None

    @property
    def totals(self) -> pd.DataFrame:
        """``videos`` with the sums over a line's windows, and ``first_s``, its first window's duration."""
        values = ["duration_s", *(f"{part}_energy_J" for part in COMPONENTS)]
        by_line = self.windows.groupby("line")
        summed = by_line[values].sum(min_count=1)
        summed["first_s"] = by_line["duration_s"].first()
        summed["stages"] = by_line.size()
        return self.videos.merge(summed, left_on="line", right_index=True)


def read_energy_table(path: Path, root: Path, accelerator: str | None = None) -> EnergyTable:
    """A file of either schema; which one, its columns say.

    Args:
        path: the file.
        root: the repository's root, for models and accelerators.
        accelerator: key of config/accelerators.yaml; None: the one whose name the file gives.

    Raises:
        UserError: not a CSV table, neither schema, or a cell that should be a positive number is not.
    """
    raw = read_csv(path)
    columns = tuple(name for name in raw.columns if name != "line")
    if "model_name" in columns:
        videos, windows = _study_schema(raw, path)
    elif "model" in columns:
        videos, windows = _own_schema(raw, path)
    else:
        raise UserError(
            "neither a column 'model' (ours) nor 'model_name' (the study's) is there",
            where=str(path),
            remedy=f"give {', '.join(OWN_COLUMNS)}; it has: {', '.join(columns[:8])}",
        )
    names = model_keys(root)
    videos["key"] = [names.get(plain(label), "") for label in videos["model"]]
    return EnergyTable(
        source=str(path),
        columns=columns,
        videos=videos,
        windows=windows,
        constants=_declared(raw),
        models={key: load_model(root, key) for key in sorted(set(videos["key"]) - {""})},
        accelerator=load_accelerator(root, accelerator) if accelerator else _board(videos["gpu"], root),
    )


def _study_schema(raw: pd.DataFrame, path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    missing = [n for n in CROSS_MODEL_COLUMNS if n not in raw and n not in ("prompt", "gpu_model", "warmup")]
    if missing:
        raise UserError(
            f"column {missing[0]!r} is missing",
            where=str(path),
            remedy=f"'model_name' is the study's schema: {', '.join(CROSS_MODEL_COLUMNS[:9])}",
        )
    table = with_numbers(raw, [*MEASURES, "height", "width", "num_frames", "steps", "runs"], path)
    parts = []
    for stage in STAGES:
        names = (f"duration_{stage}", *energy_columns(stage))
        if not set(names) <= set(table.columns):
            continue
        table = with_numbers(table, names, path, optional=stage != STAGES[0])
        part = table[["line", "model_name"]].rename(columns={"model_name": "model"}).assign(stage=stage)
        part["duration_s"] = table[names[0]]
        for component, name in zip(COMPONENTS, names[1:], strict=True):
            part[f"{component}_energy_J"] = J_PER_KWH * table[name]
        parts.append(part[part["duration_s"].notna()])
    videos = table.rename(columns={"model_name": "model", "steps": "num_inference_steps", "gpu_model": "gpu"})
    return _videos(videos), pd.concat(parts, ignore_index=True)


def _own_schema(raw: pd.DataFrame, path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    missing = [name for name in OWN_COLUMNS if name not in raw]
    if missing:
        raise UserError(
            f"column {missing[0]!r} is missing", where=str(path), remedy=f"give {', '.join(OWN_COLUMNS)}"
        )
    if "status" in raw:
        raw = raw[raw["status"] == "ok"].reset_index(drop=True)
        if raw.empty:
            raise UserError("no row has status 'ok'", where=str(path), remedy="measure first")
    energies = [f"{part}_energy_Wh" for part in COMPONENTS if f"{part}_energy_Wh" in raw]
    table = with_numbers(raw, [*OWN_SIZES, "latency_s", "gpu_energy_Wh"], path)
    _refuse_fractions(table, path)
    table = with_numbers(table, energies[1:], path, optional=True)
    table = with_numbers(table, ["runs"], path) if "runs" in table else table.assign(runs=1)
    windows = table[["line", "model"]].assign(stage="video", duration_s=table["latency_s"])
    for part in COMPONENTS:
        name = f"{part}_energy_Wh"
        windows[f"{part}_energy_J"] = J_PER_WH * table[name] if name in table else np.nan
    return _videos(table), windows


def _refuse_fractions(table: pd.DataFrame, path: Path) -> None:
    """Raises :class:`UserError` where a size, a number of frames or of steps is no whole number."""
    for name in OWN_SIZES:
        bad = table[table[name] % 1 != 0]
        if not bad.empty:
            row = bad.iloc[0]
            raise UserError(
                f"line {row['line']}, {name}: {row[name]:g} is not a whole number",
                where=str(path),
                remedy="mend or drop the row",
            )


def _videos(table: pd.DataFrame) -> pd.DataFrame:
    found = table.assign(**{name: "" for name in ("prompt", "gpu") if name not in table})
    for name in (*OWN_SIZES, "runs"):
        found[name] = found[name].round().astype(int)
    return found[["line", "model", "prompt", *OWN_SIZES, "runs", "gpu"]].copy()


def _declared(raw: pd.DataFrame) -> frozenset[str]:
    """Components whose ``_kind`` says everywhere that they are not measured."""
    kinds = {part: f"{part}_energy_Wh_kind" for part in COMPONENTS}
    return frozenset(
        part for part, name in kinds.items() if name in raw and not (raw[name].isin(["measured", ""])).any()
    )


def _board(names: pd.Series, root: Path) -> Accelerator | None:
    """The accelerator whose model number every line names; None where they differ or none fits."""
    found = {accelerator_key(str(name), root) for name in names.unique()}
    key = found.pop() if len(found) == 1 else None
    return load_accelerator(root, key) if key else None
