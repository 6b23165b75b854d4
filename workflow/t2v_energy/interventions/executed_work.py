"""What a changed pipeline really computed, from its record.  Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from t2v_energy.config import load_model, parse
from t2v_energy.errors import UserError
from t2v_energy.interventions import KINDS, catalogue, class_of, stack_effect
from t2v_energy.interventions.base import Intervention, Work
from t2v_energy.prediction.features import Point, features
from t2v_energy.work import true_work

if TYPE_CHECKING:
    from t2v_energy.measurement.record import Record


def executed_flop(root: Path, record: Record) -> float:
    """FLOP of one video of a record's configuration with its interventions; modelled.

    Raises:
        UserError: the model has no closed form, or an intervention is not known any more.
    """
    c = record.configuration
    model = load_model(root, c.model)
    size = (c.height, c.width, c.num_frames, c.num_inference_steps)
    whole = true_work(model, *size, prompt_tokens=record.prompt.tokens if record.prompt else None)
    if not c.interventions:
        return whole.total_flop
    unmodified = Work(model, c, features(root, [Point(c.model, *size)]))
    amount = stack_effect(interventions_of(root, record), unmodified).amount
    flop = {
        "attention": whole.attention_flop,
        "vae": whole.flop["vae"],
        "text": whole.flop["text_encoder"],
    }
    flop["dense"] = whole.total_flop - sum(flop.values())
    return sum(flop[name] * amount.get(name, 1.0) for name in ("attention", "dense", "text", "vae"))


def interventions_of(root: Path, record: Record) -> Sequence[Intervention]:
    """The interventions of a record, with the settings that it keeps.

    Records of the first campaigns name them alone; of those the catalogue's settings are taken.

    Raises:
        UserError: a kind, a setting or a name that there is not any more.
    """
    where = record.file_name
    if not record.interventions:
        known = catalogue(root)
        if missing := [name for name in record.configuration.interventions if name not in known]:
            raise UserError(
                f"there is no intervention {missing[0]!r}, and the record has no settings of it",
                where=where,
                remedy="put it back into config/interventions.yaml",
            )
        return [known[name] for name in record.configuration.interventions]
    for entry in record.interventions:
        if entry.kind not in KINDS:
            raise UserError(
                f"there is no kind of intervention {entry.kind!r}",
                where=where,
                remedy="use the version of this repository that measured it",
            )
    return [parse(class_of(entry.kind), entry.settings, where) for entry in record.interventions]
