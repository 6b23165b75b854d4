"""Where a video's time and GPU energy go: by stage, and what comes once a video against what each step costs.

The study holds that all but the denoiser (the DiT) is negligible (sections 3.6 and 5.1.1).  Whether it is
depends on the size of the video and, above all, on the number of denoising steps S.  With E_once what comes
once a video, E_step the whole of a step and E_dit the denoiser's part of it,

    share that is not the denoiser = (E_once + S (E_step − E_dit)) / (E_once + S E_step),

and once-a-video costs equal the denoiser's at S = E_once / E_dit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from t2v_energy.analysis.rows import read_rows
from t2v_energy.errors import UserError

Array = NDArray[np.float64]
J_PER_WH = 3600.0
EXPERIMENTS = ("resolution", "frames", "steps")
"""Experiments whose configurations are broken down by stage: those of the study's figures 2 to 4."""
NAMED = ("text_encoder", "denoiser", "vae_decode")
STAGES = (*NAMED, "rest")
"""Stages of the table.  ``rest`` is scheduler, post-processing and what no span covers."""
IDENTITY = (
    "experiment", "configuration_id", "height", "width", "num_frames", "num_inference_steps",
    "protocol", "attention_kernel", "intervention",
)  # fmt: skip
STAGE_COLUMNS = (
    *IDENTITY, "stage", "time_s", "energy_J", "time_share", "energy_share", "kind", "n"
)  # fmt: skip
ONCE_COLUMNS = (
    *IDENTITY, "quantity", "unit", "once", "step", "denoiser_step", "equal_steps", "steps_for_5_percent",
    "other_share_1s", "other_share_4s", "other_share_50s", "kind",
)  # fmt: skip
QUANTITIES: Mapping[str, str] = {"time": "latency_s", "energy": "gpu_energy_Wh"}
"""Column of configurations.csv with the whole video's quantity; shares are ``<stage>_<quantity>_share``."""


def read_configurations(path: Path) -> pd.DataFrame:
    """configurations.csv; a row without an intervention has an empty string there.

    Raises:
        UserError: there is no such file.
    """
    table = read_rows(path)
    return table.assign(intervention=table["intervention"].astype("object").fillna(""))


def measured_rows(configurations: pd.DataFrame, experiment: str) -> pd.DataFrame:
    """Rows of one experiment with status ``ok``, by rising size, length and steps."""
    rows = configurations[
        (configurations["experiment"] == experiment) & (configurations["status"] == "ok")
    ].copy()
    rows["pixels"] = rows["height"] * rows["width"]
    order = ["pixels", "height", "num_frames", "num_inference_steps", "configuration_id", "protocol"]
    return rows.sort_values(order, kind="stable").reset_index(drop=True)


# --- by stage -----------------------------------------------------------------------------------------------


def stage_table(configurations: pd.DataFrame) -> pd.DataFrame:
    """One row a configuration of :data:`EXPERIMENTS` and stage, in the order of :data:`STAGES`.

    Columns: :data:`IDENTITY`, ``stage``, ``time_s``, ``energy_J``, ``time_share``, ``energy_share``, ``kind``
    (``measured``; with protocol ``sampled`` composed from cut generations) and ``n`` (generations).  Energies
    are NaN without a counter.  The four shares of a video add up to 1 by construction of ``rest``.
    """
    found = []
    for experiment in EXPERIMENTS:
        for _, row in measured_rows(configurations, experiment).iterrows():
            found += _stages_of(row)
    return pd.DataFrame(found, columns=list(STAGE_COLUMNS))


def _stages_of(row: pd.Series) -> list[dict[str, object]]:
    shares = {stage: {q: stage_share(row, stage, q) for q in QUANTITIES} for stage in STAGES}
    total_s, total_J = float(row["latency_s"]), float(row["gpu_energy_Wh"]) * J_PER_WH
    return [
        {
            **{name: row[name] for name in IDENTITY},
            "stage": stage,
            "time_s": share["time"] * total_s,
            "energy_J": share["energy"] * total_J,
            "time_share": share["time"],
            "energy_share": share["energy"],
            "kind": "measured",
            "n": int(row["latency_s_n"]),
        }
        for stage, share in shares.items()
    ]


def stage_share(row: pd.Series, stage: str, quantity: str) -> float:
    """Part (0 to 1) of one stage of :data:`STAGES` in a whole video's ``time`` or GPU ``energy``."""
    if stage == "rest":
        return 1 - sum(stage_share(row, name, quantity) for name in NAMED)
    return float(row.get(f"{stage}_{quantity}_share", 0.0))  # no column: no model has such a stage


def other_share(row: pd.Series, quantity: str) -> float:
    """Part (0 to 1) of a whole video's ``time`` or GPU ``energy`` that is not the denoiser's."""
    return 1 - stage_share(row, "denoiser", quantity)


# --- once a video, and each step ----------------------------------------------------------------------------


@dataclass(frozen=True)
class OnceAndStep:
    """What one configuration costs once a video and in each step, in s or J.

    Attributes:
        once: text encoder, VAE, post-processing and the host's work around the loop.
        step: one denoising step, with the scheduler.
        denoiser: the denoiser's part of a step.
    """

    once: float
    step: float
    denoiser: float

    def other_share(self, steps: ArrayLike) -> Array:
        """Part (0 to 1) of a video of ``steps`` steps that is not the denoiser's: modelled, linear in S."""
        s = np.asarray(steps, dtype=np.float64)
        return (self.once + s * (self.step - self.denoiser)) / (self.once + s * self.step)

    @property
    def equal_steps(self) -> float:
        """S at which once-a-video costs equal the denoiser's; below it the denoiser is the smaller part."""
        return self.once / self.denoiser

    def steps_for(self, share: float) -> float:
        """S from which on no more than ``share`` is not the denoiser's; NaN where no S reaches it."""
        margin = share * self.step - (self.step - self.denoiser)
        return (1 - share) * self.once / margin if margin > 0 else float("nan")


def once_and_step(row: pd.Series, quantity: str) -> OnceAndStep:
    """The three costs of one row of configurations.csv, of ``time`` (s) or GPU ``energy`` (J).

    Once-a-video energy is the video's less its steps'.
    """
    steps = int(row["num_inference_steps"])
    if quantity == "time":
        total, step, once = float(row["latency_s"]), float(row["step_time_s"]), float(row["once_s"])
    else:
        total, step = float(row["gpu_energy_Wh"]) * J_PER_WH, float(row["step_energy_J"])
        once = total - steps * step
    return OnceAndStep(once, step, stage_share(row, "denoiser", quantity) * total / steps)


NEGLIGIBLE = 0.05
"""What may be called negligible for :func:`once_table`: one part in twenty."""
FEW_STEPS = 4
"""Steps of a distilled model, such as the study's AnimateDiff (table 2)."""


def once_table(configurations: pd.DataFrame) -> pd.DataFrame:
    """Once-a-video and per-step costs of every ``sampled`` configuration of resolution and frames.

    Columns: the identity of the configuration, ``quantity`` (``time`` in s, ``energy`` in J), ``unit``,
    ``once``, ``step``, ``denoiser_step``, ``equal_steps`` (S at which once-a-video costs equal the
    denoiser's), ``steps_for_5_percent`` (S from which on at most 5 % is not the denoiser's),
    ``other_share_<S>s`` at the 1, 4 and 50 steps, and ``kind``: ``modelled``, for linearity in S is assumed.
    """
    found = []
    for experiment in ("resolution", "frames"):
        rows = measured_rows(configurations, experiment)
        for _, row in rows[rows["protocol"] == "sampled"].iterrows():
            for quantity, unit in (("time", "s"), ("energy", "J")):
                model = once_and_step(row, quantity)
                if isfinite(model.equal_steps):
                    found.append({name: row[name] for name in IDENTITY} | _once_row(model, quantity, unit))
    return pd.DataFrame(found, columns=list(ONCE_COLUMNS))


def _once_row(model: OnceAndStep, quantity: str, unit: str) -> dict[str, object]:
    shares = {f"other_share_{s}s": float(model.other_share(s)) for s in (1, FEW_STEPS, 50)}
    return {
        "quantity": quantity, "unit": unit, "once": model.once, "step": model.step,
        "denoiser_step": model.denoiser, "equal_steps": model.equal_steps,
        "steps_for_5_percent": model.steps_for(NEGLIGIBLE), **shares, "kind": "modelled",
    }  # fmt: skip


def row_at(
    rows: pd.DataFrame, height: int, width: int, num_frames: int, num_inference_steps: int | None = None
) -> pd.Series | None:
    """The one row of this size and length (and steps), default intervention; None where there is none.

    Raises:
        UserError: there are several.
    """
    wanted = (rows["height"] == height) & (rows["width"] == width) & (rows["num_frames"] == num_frames)
    wanted &= rows["intervention"] == ""
    if num_inference_steps is not None:
        wanted &= rows["num_inference_steps"] == num_inference_steps
    found = rows[wanted]
    if len(found) > 1:
        raise UserError(
            f"{height}×{width}, {num_frames} frames has {len(found)} rows",
            where=", ".join(sorted(found["configuration_id"] + " " + found["protocol"])),
            remedy="select one protocol and kernel",
        )
    return found.iloc[0] if len(found) else None
