"""The reference in config/README.md, from the typed configuration.

``python -m t2v_energy.config_reference`` rewrites it; what stands above the marker is written by hand.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from t2v_energy.config import KEY_PATTERN, Accelerator, Campaign, Experiment, ModelFile, Settings
from t2v_energy.errors import UserError
from t2v_energy.grids import Grid
from t2v_energy.interventions import KINDS, class_of
from t2v_energy.interventions.base import Intervention
from t2v_energy.operator_suite import Suite
from t2v_energy.prediction.presumed import PredictionFile
from t2v_energy.prediction.savings import SavingsFile
from t2v_energy.prompts import SLOTS, Vocabulary
from t2v_energy.study import Study

README = Path("config") / "README.md"
MARKER = "<!-- From here on written by `python -m t2v_energy.config_reference`: edit the models. -->\n"


class Section(NamedTuple):
    """One kind of configuration file."""

    title: str
    about: str
    model: type[BaseModel]
    prefix: str = ""


SECTIONS = (
    Section("config/config.yaml", "What a run builds, and how it measures.", Settings),
    Section(
        "config/campaigns/`<campaign>`.yaml", "Measurements from one GPU model, or from the CPU.", Campaign
    ),
    Section("config/experiments/`<experiment>`.yaml", "One sweep.", Experiment),
    Section("config/models/`<model>`.yaml", "One model: its parts and what of it is timed.", ModelFile),
    Section(
        "config/accelerators.yaml",
        "One entry an accelerator, by its key: published limits, and three constants with which "
        "`t2v-energy plan` predicts costs where there is no calibration.",
        Accelerator,
        "<accelerator>.",
    ),
    Section(
        "config/operators.yaml",
        "Experiment `operators`: single operators, for the rates and powers of the cost model.",
        Suite,
    ),
    Section(
        "config/prediction.yaml",
        "What the cost model presumes before anything is measured, and which points calibrate table 3b.",
        PredictionFile,
    ),
    Section(
        "config/savings.yaml",
        "What savings of interventions are predicted from, written down before they are measured.",
        SavingsFile,
    ),
    Section(
        "config/grids.yaml",
        "One entry a grid, by its key: yearly means of generation, without losses on the way to the plug.",
        Grid,
        "<grid>.",
    ),
    Section(
        "config/study.yaml",
        "What the original study prints of its models: its tables 2 and 4, and its comparisons.",
        Study,
    ),
    Section(
        "config/prompts.yaml",
        "The words of the grammar of prompts. The file's own comments give the form of an entry.",
        Vocabulary,
    ),
)

WORDS = {
    "kinds": "kinds of subject, such as `people`; names are free",
    "kinds.<name>.subject": "who or what is seen",
    "kinds.<name>.action": "what it does; suits every subject of its kind",
    "kinds.<name>.setting": "where it is; suits every subject of its kind",
    "light": "how the scene is lit",
    "camera": "how it is filmed",
    "style": "what the film looks like",
    "templates": "sentences with each of " + ", ".join(f"`{{{slot}}}`" for slot in SLOTS) + " once",
}
"""Meaning of the vocabulary's keys, whose models carry no descriptions."""


class Row(NamedTuple):
    """One key: where it stands, its type, unit and default (None: required), what it means."""

    key: str
    type: str
    unit: str
    default: str | None
    meaning: str


def reference() -> str:
    """The generated part of config/README.md, from the marker on."""
    return MARKER + "".join(map(_section, SECTIONS)) + _interventions()


def written(readme: str) -> str:
    """``readme`` with its generated part as it should be.

    Raises:
        UserError: the marker is not in it.
    """
    head, marker, _ = readme.partition(MARKER)
    if not marker:
        raise UserError(
            "the line that begins the generated part is missing", where=str(README), remedy=f"add: {MARKER}"
        )
    return head + reference()


def rows(model: type[BaseModel], prefix: str = "") -> list[Row]:
    """Every key of ``model``, nested ones with dots; ``<name>`` stands for a name that the user chooses."""
    schema = model.model_json_schema()
    return list(_rows(schema, schema.get("$defs", {}), prefix))


def _section(section: Section) -> str:
    lines = [f"\n## {section.title}\n", section.about + "\n", *_table(rows(section.model, section.prefix))]
    return "\n".join(lines) + "\n"


def _interventions() -> str:
    """The catalogue: keys that all its entries have, then those of each kind."""
    common = rows(Intervention, "<name>.")
    kind = Row("<name>.kind", ", ".join(f"`{name}`" for name in KINDS), "", None, "what it is")
    lines = [
        "\n## config/interventions.yaml\n",
        "One entry an intervention, by the name that experiments list. All have these keys:\n",
        *_table([kind, *common]),
    ]
    for name in KINDS:
        described = class_of(name)
        own = [row for row in rows(described, "<name>.") if row not in common]
        about = (described.__doc__ or "").partition("\n")[0].removesuffix(".")
        settings = ["", *_table(own)] if own else []
        lines += [f"\n`{name}`: {about}." + ("" if own else " No settings."), *settings]
    return "\n".join(lines) + "\n"


def _table(described: Sequence[Row]) -> Iterator[str]:
    """Markdown lines of a table of keys."""
    yield "| key | type | unit | default | meaning |"
    yield "| --- | --- | --- | --- | --- |"
    for row in described:
        default = "required" if row.default is None else row.default
        cells = (f"`{row.key}`", row.type, row.unit, default, row.meaning)
        yield "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _rows(schema: Mapping[str, Any], shared: Mapping[str, Any], prefix: str) -> Iterator[Row]:
    for name, field in schema["properties"].items():
        key = prefix + name
        unit, meaning = _unit_and_meaning(field.get("description") or WORDS[key])
        required = name in schema.get("required", ())
        nested, ending = _nested(field, shared)
        default = None if required else _value(field["default"], is_section=nested is not None)
        yield Row(key, "section" if nested and not ending else _type(field), unit, default, meaning)
        if nested:
            yield from _rows(nested, shared, f"{key}{ending}.")


def _unit_and_meaning(description: str) -> tuple[str, str]:
    found = re.fullmatch(r"(?:\[(.+?)\] )?(.+)", description, re.DOTALL)
    assert found is not None  # any text matches
    return found[1] or "", found[2]


def _nested(field: Mapping[str, Any], shared: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, str]:
    """The schema of a section inside ``field``, and how its keys continue the field's own."""
    for option in field.get("anyOf", [field]):
        for inner, ending in (
            (option, ""),
            (option.get("items", {}), "[]"),
            (option.get("additionalProperties", {}), ".<name>"),
        ):
            if isinstance(inner, Mapping) and "$ref" in inner:
                return shared[inner["$ref"].rpartition("/")[2]], ending
    return None, ""


def _type(field: Mapping[str, Any]) -> str:
    options = field.get("anyOf", [field])
    named = [_one_type(option) for option in options if option.get("type") != "null"]
    return " or ".join(named + ["null"] * (len(named) < len(options)))


LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
TYPES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false"}


def _one_type(option: Mapping[str, Any]) -> str:
    if "enum" in option or "const" in option:
        return ", ".join(f"`{value}`" for value in option.get("enum", [option.get("const")]))
    if option.get("type") == "array":
        return f"list{', at least one' if option.get('minItems') else ''}"
    if option.get("type") == "object" or "$ref" in option:
        return "mapping"
    if option.get("pattern") == KEY_PATTERN:
        return "key"
    limits = [f"{sign} {option[name]:g}" for name, sign in LIMITS.items() if name in option]
    return " ".join([TYPES[option["type"]], ", ".join(limits)]).strip()


def _value(default: Any, *, is_section: bool) -> str:
    if is_section and default is not None:
        return ""  # its keys have their own
    return {"{}": "none", '""': "empty"}.get(text := json.dumps(default), f"`{text}`")


def main(arguments: Sequence[str] = ()) -> int:
    """Rewrite config/README.md under the folder given, or under this one."""
    path = Path(*arguments[:1]) / README
    path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
