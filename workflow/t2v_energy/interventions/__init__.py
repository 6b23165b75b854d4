"""What may change the cost of a pipeline: one module an intervention, applied for one measurement and undone.

A module has ``apply(pipeline)``, which changes a built pipeline and returns a function that undoes it; it
raises :class:`~t2v_energy.errors.UserError` for a pipeline that it does not fit. Modules are imported when
they are applied, so that a plan needs no torch.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from t2v_energy.errors import UserError

MODULES: Mapping[str, str] = {"vae-tiling": "t2v_energy.interventions.vae_tiling"}
"""Module of each intervention, by the name that experiments and configuration ids use."""


def check_known(names: Sequence[str], where: str) -> None:
    """Raise :class:`UserError`, with the nearest name, where one of ``names`` is no intervention."""
    for name in names:
        if name not in MODULES:
            near = difflib.get_close_matches(name, list(MODULES), n=1, cutoff=0.4)
            raise UserError(
                f"interventions: there is no {name!r}",
                where=where,
                remedy=(f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(MODULES)}",
            )


@contextmanager
def applied(names: Sequence[str], pipeline: Any) -> Iterator[None]:
    """Apply ``names`` to ``pipeline`` in their order, and undo them in the reverse one at the end."""
    check_known(names, "interventions")
    with ExitStack() as undo:
        for name in names:
            undo.callback(importlib.import_module(MODULES[name]).apply(pipeline))
        yield
