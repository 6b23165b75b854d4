"""The timesteps that a model's scheduler gives its steps, without the scheduler.  Needs no torch.

As diffusers 0.42 computes them in ``set_timesteps``; tests hold them against it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from t2v_energy.errors import UserError

if TYPE_CHECKING:
    from t2v_energy.config import ModelFile

NEARLY_ONE = 1 - 1e-6
"""UniPC's first noise level, whose logarithm it takes of 1 − σ."""


def timesteps(model: ModelFile, steps: int) -> list[int]:
    """Timestep of each of ``steps`` steps, from the noisiest.

    Raises:
        UserError: a scheduler, or an option of one, that is not known here.
    """
    scheduler = model.components["scheduler"]
    name, config = scheduler.class_.rpartition(".")[2], scheduler.config
    trained = int(config.get("num_train_timesteps", 1000))
    if name == "UniPCMultistepScheduler" and config.get("use_flow_sigmas"):
        shift = float(config.get("flow_shift", 1.0))
        sigma = np.linspace(1, 1 / trained, steps + 1)[:-1]
        sigma = np.minimum(shift * sigma / (1 + (shift - 1) * sigma), NEARLY_ONE)
        return [int(t) for t in sigma * trained]
    if name == "CogVideoXDDIMScheduler" and config.get("timestep_spacing") == "trailing":
        return [int(t) - 1 for t in np.round(np.arange(trained, 0, -trained / steps))]
    raise UserError(
        f"the timesteps of {name} are not known",
        where=f"config/models/{model.key}.yaml, components.scheduler",
        remedy="add it to workflow/t2v_energy/interventions/timesteps.py",
    )
