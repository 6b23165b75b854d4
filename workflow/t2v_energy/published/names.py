"""Which model file and which accelerator a name in somebody's table means."""

from __future__ import annotations

import re
from pathlib import Path

from t2v_energy.config import load_accelerators, load_model
from t2v_energy.study import load_study


def plain(name: str) -> str:
    """A name without case, spaces and punctuation."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def model_keys(root: Path) -> dict[str, str]:
    """Key of a model file by its plain key, its plain title, and the study's title of it."""
    study = load_study(root)
    found: dict[str, str] = {}
    for path in sorted((root / "config" / "models").glob("*.yaml")):
        file = load_model(root, path.stem)
        found |= {plain(path.stem): path.stem, plain(file.title): path.stem}
    return found | {plain(printed.title): key for key, printed in study.models.items()}


def accelerator_key(name: str, root: Path) -> str | None:
    """Key of the accelerator whose model number a GPU's name holds; None where none fits."""
    for key, card in load_accelerators(root).items():
        numbers = re.findall(r"\b(?:[A-Z]+\d+[A-Z]*|\d{4})\b", card.title)
        if not card.nominal and any(re.search(rf"\b{number}\b", name) for number in numbers):
            return key
    return None
