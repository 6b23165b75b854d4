"""Builds a diffusers pipeline from a model file: random weights from the published configuration,
or the published weights themselves.

Random weights cost what trained ones cost (dense compute does not look at values; within ±2.5 % of a
denoiser call on an H200), but what they generate is noise: nothing about quality can be read from it.
Every module keeps its library's own initialisation; zeros or constants would change power and speed.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from t2v_energy.config import Component, ModelFile
from t2v_energy.errors import UserError
from t2v_energy.models.tokenizer import StandInTokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_pipeline(model: ModelFile, weights: str, device: str, seed: int, source: Path | None = None) -> Any:
    """The pipeline of ``model`` on ``device``, in evaluation mode.

    ``weights`` is ``random`` (seeded) or ``pretrained``: the hub id at its pinned revision, or the local
    folder ``source``; only safetensors files are read and no remote code is run.
    Raises :class:`UserError` when published weights do not exist, cannot be reached or are not safetensors.
    """
    if weights == "pretrained":
        pipeline = _pretrained(model, source).to(device)
    else:
        pipeline = _random(model, device, seed)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_class(path: str) -> Any:
    """The class of a model file's ``<module>.<Class>``; raises :class:`UserError` where it is not there."""
    library, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(library), name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"class {path} cannot be imported: {error}",
            where="config/models",
            remedy="install the measure extra: pip install -e '.[measure]'",
        ) from error


def _random(model: ModelFile, device: str, seed: int) -> Any:
    torch.manual_seed(seed)
    parts: dict[str, Any] = {
        name: build_component(component, device) for name, component in model.components.items()
    }
    parts["tokenizer"] = StandInTokenizer(model.tokenizer.vocab_size)
    return load_class(f"diffusers.{model.pipeline}")(**parts)


def build_component(component: Component, device: str) -> Any:
    """One part of a pipeline with its library's own random initialisation, directly on ``device``."""
    cls = load_class(component.class_)
    if component.dtype is None:  # a scheduler: no weights
        return cls(**component.config)
    with torch.device(device):
        if component.class_.startswith("transformers."):
            part = cls(cls.config_class(**component.config))
        else:
            part = cls(**component.config)
    _cast(part, DTYPES[component.dtype])
    return part


def _cast(part: nn.Module, dtype: torch.dtype) -> None:
    """Cast as ``from_pretrained`` would: modules that the class keeps in float32 stay so, and so do buffers.

    ``part.to(dtype)`` would also cast the rotary tables and the time embedding, and so run other kernels
    than the published model.
    """
    kept = _kept_in_float32(part, dtype)
    for name, parameter in part.named_parameters():
        if not any(module in name.split(".") for module in kept):
            parameter.data = parameter.data.to(dtype)


def _kept_in_float32(part: nn.Module, dtype: torch.dtype) -> set[str]:
    """Names of the modules that ``from_pretrained`` keeps in float32 where ``dtype`` is asked for.

    diffusers means its list for every lower precision; transformers means it for float16 alone (its range
    overflows) and has a second, strict list for bfloat16 too.
    """
    if dtype == torch.float32:
        return set()
    kept = set(getattr(part, "_keep_in_fp32_modules", None) or ())
    strict = set(getattr(part, "_keep_in_fp32_modules_strict", None) or ())
    if isinstance(part, PreTrainedModel) and dtype != torch.float16:
        return strict
    return kept | strict


def _pretrained(model: ModelFile, source: Path | None) -> Any:
    cls = load_class(f"diffusers.{model.pipeline}")
    dtypes = {name: DTYPES[c.dtype] for name, c in model.components.items() if c.dtype}
    common: dict[str, Any] = {"torch_dtype": dtypes, "use_safetensors": True, "trust_remote_code": False}
    if source is not None:
        try:
            return cls.from_pretrained(str(source), local_files_only=True, **common)
        except OSError as error:
            raise UserError(
                f"the weights cannot be read: {error}",
                where=str(source),
                remedy="give a folder as `save_pretrained` writes it, with safetensors weights",
            ) from error
    if model.hub is None:
        raise UserError(
            f"{model.key} has no published weights",
            where=f"config/models/{model.key}.yaml",
            remedy="use `weights: random` in the campaign",
        )
    try:
        return cls.from_pretrained(model.hub.id, revision=model.hub.revision, **common)
    except OSError as error:
        raise UserError(
            f"{model.hub.id} at revision {model.hub.revision} cannot be read: {error}",
            where=f"config/models/{model.key}.yaml, hub",
            remedy="connect to the hub or fill its cache first, or use `weights: random` in the campaign",
        ) from error
