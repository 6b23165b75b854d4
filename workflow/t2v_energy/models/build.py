"""Builds a diffusers pipeline from a model file: random weights from the published configuration,
or the published weights themselves.

Random weights cost what trained ones cost (dense compute does not look at values; within ±2.5 % of a
denoiser call on an H200), but what they generate is noise: nothing about quality can be read from it.
Every module keeps its library's own initialisation; zeros or constants would change power and speed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from t2v_energy.config import Component, ComponentHub, Hub, ModelFile
from t2v_energy.errors import UserError
from t2v_energy.models.tokenizer import StandInTokenizer

OWN_PIPELINES = {
    "LTXMultiScalePipeline": "t2v_energy.models.ltx",
    "ContentVPipeline": "t2v_energy.models.contentv",
}
"""Module of each pipeline that diffusers does not have; all others are its own."""

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


def pipeline_class(name: str) -> Any:
    """The class of a model file's ``pipeline``; raises :class:`UserError` where there is none."""
    return load_class(f"{OWN_PIPELINES.get(name, 'diffusers')}.{name}")


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
    for name, tokenizer in model.tokenizers.items():
        parts[name] = StandInTokenizer(tokenizer.vocab_size, tokenizer.max_length)
    with torch.device(device):  # AnimateDiff's makes a network of its own, of UNet and motion adapter
        return pipeline_class(model.pipeline)(**parts)


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
    """Cast as ``from_pretrained`` would: modules that the class keeps in float32 stay so, and so do buffers
    that are not saved with the weights.

    ``part.to(dtype)`` would also cast the rotary tables and the time embedding, and so run other kernels
    than the published model.
    """
    kept = _kept_in_float32(part, dtype)
    for name, tensor in part.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not any(module in name.split(".") for module in kept):
            tensor.data = tensor.data.to(dtype)


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
    cls = pipeline_class(model.pipeline)
    dtypes = {name: DTYPES[c.dtype] for name, c in model.components.items() if c.dtype}
    # A part without weights, a scheduler, is the model file's: a repository may hold another one.
    parts = {name: build_component(c, "cpu") for name, c in model.components.items() if not c.dtype}
    common: dict[str, Any] = {"torch_dtype": dtypes, "use_safetensors": True, "trust_remote_code": False}
    if source is not None:
        try:
            return cls.from_pretrained(str(source), local_files_only=True, **parts, **common)
        except OSError as error:
            raise UserError(
                f"the weights cannot be read: {error}",
                where=str(source),
                remedy="give a folder as `save_pretrained` writes it, with safetensors weights",
            ) from error
    where = f"config/models/{model.key}.yaml"
    if model.hub is None:
        raise UserError(
            f"{model.key} has no published weights",
            where=where,
            remedy="use `weights: random` in the campaign",
        )
    for name, component in model.components.items():
        if component.hub:
            own = f"{where}, components.{name}.hub"
            parts[name] = _from_hub(component.hub, own, partial(_published_part, component, component.hub))
    hub_id = model.hub.id
    return _from_hub(
        model.hub, f"{where}, hub", lambda r: cls.from_pretrained(hub_id, revision=r, **parts, **common)
    )


def _from_hub(hub: Hub, where: str, read: Callable[[str], Any]) -> Any:
    """What ``read`` makes of the pinned revision; raises :class:`UserError` where that cannot be had."""
    if hub.revision is None:
        raise UserError(
            f"{hub.id} has no pinned revision, so its weights could change",
            where=where,
            remedy="write the commit to read as `revision`, or use `weights: random` in the campaign",
        )
    try:
        return read(hub.revision)
    except OSError as error:
        raise UserError(
            f"{hub.id} at revision {hub.revision} cannot be read: {error}",
            where=where,
            remedy="connect to the hub or fill its cache first, or use `weights: random` in the campaign",
        ) from error


def _published_part(component: Component, hub: ComponentHub, revision: str) -> Any:
    """A part from its own repository: as the library saves it, or a bare file of weights."""
    cls = load_class(component.class_)
    dtype = DTYPES[component.dtype or "float32"]
    if hub.file is None:
        where = {"subfolder": hub.subfolder} if hub.subfolder else {}
        return cls.from_pretrained(
            hub.id, revision=revision, torch_dtype=dtype, use_safetensors=True, **where
        )
    path = hf_hub_download(hub.id, hub.file, subfolder=hub.subfolder, revision=revision)
    part = cls(**component.config)
    part.load_state_dict(load_file(path))
    _cast(part, dtype)
    return part
