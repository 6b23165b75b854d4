"""Derives work/blocks.json from the real modules on torch's meta device, as :mod:`.traffic_trace` does.

``outside`` is a call of the denoiser without layers.  ``attn1`` and ``attn2`` are what a call is short of
when those modules give back a tensor that was there already.  Each is linear in the positions of the
latent: a constant (bytes), bytes a position, and kernels.  Needs the extra ``measure``::

    python -m t2v_energy.work.blocks_trace
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch

from t2v_energy.config import load_model
from t2v_energy.work import trace
from t2v_energy.work.architectures import latents
from t2v_energy.work.blocks import ARCHITECTURES, ATTENTION, BLOCKS_FILE, without_blocks
from t2v_energy.work.traffic import Traffic, has_traffic
from t2v_energy.work.traffic_trace import _sizes, denoiser_traffic

if TYPE_CHECKING:
    from t2v_energy.config import ModelFile


@contextmanager
def replayed(name: str) -> Iterator[None]:
    """Denoisers are built with attention modules of that name which compute nothing."""
    build = trace.build_on_meta

    def without(component: Any) -> Any:
        module = build(component)
        for path, part in module.named_modules():
            if path.endswith(f".{name}"):
                part.forward = _nothing
        return module

    with patch.object(trace, "build_on_meta", without):
        yield


def _nothing(hidden_states: Any, encoder_hidden_states: Any = None, *_: Any, **named: Any) -> Any:
    if "image_rotary_emb" in named:  # CogVideoX: text and video
        return torch.empty_like(hidden_states), torch.empty_like(encoder_hidden_states)
    return torch.empty_like(hidden_states)


def derive(model: ModelFile) -> dict[str, list[float]]:
    """Coefficients of one model's parts."""
    sizes = _sizes(model)[0]
    whole = [denoiser_traffic(model, size) for size in sizes]
    outside = [denoiser_traffic(without_blocks(model), size) for size in sizes]
    parts = {"outside": outside}
    for name in ATTENTION if model.architecture == "wan" else ("attn1",):
        with replayed(name):
            rest = [denoiser_traffic(model, size) for size in sizes]
        parts[name] = [
            Traffic(a.bytes - b.bytes, a.kernels - b.kernels) for a, b in zip(whole, rest, strict=True)
        ]
    positions = np.array([np.prod(latents(model, *size)[0]) for size in sizes], dtype=float)
    return {name: _line(positions, found) for name, found in parts.items()}


def _line(positions: Any, found: Sequence[Traffic]) -> list[float]:
    """Constant and slope of the bytes, and the kernels, which do not depend on the size."""
    values = np.array([t.bytes for t in found], dtype=float)
    design = np.column_stack([np.ones_like(positions), positions]) / values[:, None]
    (constant, each), *_ = np.linalg.lstsq(design, np.ones_like(values), rcond=None)
    return [float(f"{constant:.9g}"), float(f"{each:.9g}"), float(found[-1].kernels)]


def main(say: Callable[[str], Any] = print) -> int:
    """Write the coefficients of all models that are traced, and whose blocks can be told apart."""
    root = Path.cwd()
    found = {}
    for key in sorted(path.stem for path in (root / "config" / "models").glob("*.yaml")):
        model = load_model(root, key)
        if model.architecture in ARCHITECTURES and has_traffic(key):
            found[key] = derive(model)
            say(f"{key} {found[key]}")
    text = json.dumps(found, indent=1) + "\n"
    Path(__file__).with_name(BLOCKS_FILE).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
