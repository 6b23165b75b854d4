"""Tiny pipelines and repositories around them, for tests that run the real chain on the CPU."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from t2v_energy.config import Configuration, ModelFile, Settings, load_model, load_settings
from t2v_energy.prompts import Prompt, write_prompts

ROOT = Path(__file__).resolve().parents[1]
KEYS = tuple(sorted(path.stem for path in (ROOT / "config" / "models").glob("tiny-*.yaml")))
"""One tiny model of each architecture."""
WORDS = ["a", "red", "fox", "crosses", "frozen", "lake", "."]
PROMPT = Prompt("p000", "A red fox crosses a frozen lake.", 7, 0)
SAMPLED = {
    "min_steps": 1,
    "min_window_s": 0.01,
    "generations": 2,
    "max_generations": 2,
    "max_step_sem_percent": 90.0,
    "max_ci95_percent": 90.0,
}
CAMPAIGN: dict[str, Any] = {
    "key": "tiny",
    "title": "Tests",
    "accelerator": "cpu",
    "device": "cpu",
    "seed": 3,
    "protocols": {"idle_s": 0.2, "sampled": SAMPLED},
    "experiments": {
        "resolution": {
            "model": "tiny-wan",
            "fixed": {"num_frames": 5, "num_inference_steps": 2},
            "vary": [
                {"height": 32, "width": 32},
                {"height": 32, "width": 48},
                {"height": 48, "width": 48},
            ],
        }
    },
}


def make_root(folder: Path, **changes: Any) -> Path:
    """A repository's root with the shipped config/, a campaign ``tiny`` (with ``changes``) and its prompt."""
    shutil.copytree(ROOT / "config", folder / "config")
    write_yaml(folder, "campaigns/tiny", CAMPAIGN | changes)
    write_prompts([PROMPT], prompts_path(folder))
    return folder


def write_yaml(root: Path, name: str, data: Any) -> Path:
    """Write config/<name>.yaml."""
    path = root / "config" / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return path


def add_interventions(root: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Add entries to config/interventions.yaml, of kind ``vae-tiling`` unless they name another."""
    path = root / "config" / "interventions.yaml"
    whole = {name: {"kind": "vae-tiling", **settings} for name, settings in entries.items()}
    path.write_text(path.read_text(encoding="utf-8") + yaml.safe_dump(whole), encoding="utf-8")


def resolution(**changes: Any) -> dict[str, Any]:
    """The campaign's experiments, with ``changes`` to the one of the tests."""
    return {"resolution": CAMPAIGN["experiments"]["resolution"] | changes}


def prompts_path(root: Path) -> Path:
    return root / "results" / "prompts" / "tiny.jsonl"


def settings(root: Path, **overrides: Any) -> Settings:
    return load_settings(root, {"campaign": "tiny", **overrides})


def model(key: str = "tiny-wan") -> ModelFile:
    """The model file of a tiny model."""
    return load_model(ROOT, key)


def defaults(key: str, **changes: Any) -> Configuration:
    """A model's default configuration, with ``changes``."""
    return Configuration(**{"model": key, **model(key).defaults.model_dump(exclude={"fps"}), **changes})


def configuration(**changes: Any) -> Configuration:
    values = {"model": "tiny-wan", "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 4}
    return Configuration(**{**values, "guidance_scale": 5.0, **changes})


def pipeline(key: str = "tiny-wan") -> Any:
    """One built pipeline of each model for the whole session; nobody may change it for good."""
    return _built(key)


@cache
def _built(key: str) -> Any:
    from t2v_energy.models.build import build_pipeline

    return build_pipeline(model(key), "random", "cpu", 0)


def real_tokenizer(max_length: int = 512) -> Any:
    """A tokenizer of transformers that knows a few words, as a hub's pipeline has one."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {word: 3 + i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
    )


@contextmanager
def own_devices_and_locks(folder: Path) -> Iterator[None]:
    """Lock files in ``folder``, and the variables that choose a GPU as nobody had set them."""
    import tempfile

    names = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
    before, before_temp = {name: os.environ.pop(name, None) for name in names}, tempfile.tempdir
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before_temp
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
