"""Generations of tiny pipelines with interventions applied, and what is the same before and after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from t2v_energy.config import Configuration, load_model
from t2v_energy.interventions import Applied, Named, applied
from t2v_energy.interventions.base import Intervention, Target, Work
from t2v_energy.prediction.features import Point, features

STEPS = 2


def target(key: str = "tiny-wan", **changes: Any) -> Target:
    """A tiny pipeline with a configuration of it, of few steps."""
    configuration = tiny.defaults(key, num_inference_steps=STEPS, **changes)
    return Target(tiny.pipeline(key), tiny.model(key), configuration)


def frames(subject: Target) -> Any:
    """Frames of one generation: numbers of shape (frames, height, width, 3)."""
    import torch
    from t2v_energy.measurement.protocols import Subject

    made = Subject(
        subject.pipeline, subject.model, subject.configuration, "a red fox", "cpu", keep_frames=True
    )
    with torch.no_grad():
        made.generate(STEPS)
    return made.frames


@contextmanager
def in_force(subject: Target, *interventions: Intervention) -> Iterator[Applied]:
    """Interventions applied in that order, each under its kind's name.

    They leave the process's settings alone, which would change every later generation and compilation of it.
    """
    entries = [Named(intervention.kind, intervention) for intervention in interventions]
    for entry in entries:
        entry.intervention.check(subject.model, subject.configuration)
    held = process_settings()
    with applied(entries, subject) as found:
        yield found
        assert process_settings() == held


def process_settings() -> dict[str, Any]:
    """torch's settings that hold for a whole process: Inductor's, and those of products and convolutions."""
    import torch
    from torch._inductor import config

    return {name: value for name, value in config.get_config_copy().items() if not callable(value)} | {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "default_dtype": torch.get_default_dtype(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def with_and_after(subject: Target, *interventions: Intervention) -> tuple[Any, Any, Any]:
    """Frames without, with and after the interventions; they have to leave evidence."""
    before = frames(subject)
    with in_force(subject, *interventions) as found:
        during = frames(subject)
        found.check()
    return before, during, frames(subject)


def largest_difference(first: Any, second: Any) -> float:
    """The largest of two videos' values, which are between 0 and 1."""
    return float(np.abs(first - second).max())


def attributes(root: Any) -> dict[str, Any]:
    """What a module and those in it hold: their attributes, parameters by identity and by value."""
    held: dict[str, Any] = {}
    for name, module in root.named_modules():
        plain = {k: id(v) for k, v in vars(module).items() if k not in ("_parameters", "_buffers")}
        held[name] = {k: v for k, v in plain.items() if not k.startswith("_")} | {
            "hooks": [len(v) for k, v in vars(module).items() if k.endswith("_hooks")],
            "children": sorted(module._modules),
            "parameters": {k: id(p) for k, p in module._parameters.items()},
            "compiled": "_compiled_call_impl" in vars(module),
            "forward": "forward" in vars(module),
        }
    return held


def work_of(model: str, height: int, width: int, num_frames: int, **changes: Any) -> Work:
    """What fifty steps of a model of config/models/ cost without interventions."""
    steps = 50
    configuration = Configuration(
        model=model, height=height, width=width, num_frames=num_frames, num_inference_steps=steps,
        guidance_scale=5.0, **changes,
    )  # fmt: skip
    found = features(tiny.ROOT, [Point(model, height, width, num_frames, steps)])
    return Work(load_model(tiny.ROOT, model), configuration, found)


def folder_with(tmp_path: Path, text: str) -> Path:
    """A root whose config/interventions.yaml is ``text``."""
    path = tmp_path / "config" / "interventions.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    return tmp_path
