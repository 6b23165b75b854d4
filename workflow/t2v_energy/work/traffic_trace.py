"""Derives work/traffic.json from the real modules: bytes of element-wise kernels, and kernels launched.

They run on torch's meta device, in the number types of the model files: every operator that is no matrix
product, convolution, fused attention or view reads its inputs and writes its outputs once.  Needs the extra
``measure``::

    python -m t2v_energy.work.traffic_trace

A denoiser's bytes are linear in the positions of its latent, a decoder's in the pixels of latent frames and
in their number.  Four small sizes give the coefficients; the default size says how well they hold there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from t2v_energy.config import load_model
from t2v_energy.work import trace
from t2v_energy.work.architectures import latents
from t2v_energy.work.denoisers import denoiser
from t2v_energy.work.traffic import TRAFFIC_FILE

if TYPE_CHECKING:
    from t2v_energy.config import ModelFile

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "convolution", "_scaled_mm")
"""Operators that FLOP count, not bytes."""
UNMOVED = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "lift_fresh")
"""Operators that move nothing."""


class Traffic(NamedTuple):
    """Bytes of element-wise kernels, and all kernels (products and attention among them)."""

    bytes: float
    kernels: int


class TrafficMode(TorchDispatchMode):
    """Adds up what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.kernels = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name in UNMOVED or name.startswith("_unsafe_view"):
            return result
        self.kernels += 1
        if name not in PRODUCTS:
            self.add(args, kwargs, result)
        return result

    def add(self, *values: Any) -> None:
        """Count the bytes of all tensors among ``values``."""
        self.bytes += sum(
            leaf.numel() * leaf.element_size()
            for leaf in tree_leaves(values)
            if isinstance(leaf, torch.Tensor)
        )


def counted(call: Callable[[], Any]) -> Traffic:
    """Traffic of ``call``; attention and RMSNorm are single kernels, as on a GPU."""
    mode = TrafficMode()

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        mode.kernels += 1
        return query.new_empty((*query.shape[:-1], value.shape[-1]))

    def rms_norm(values: Any, *_: Any, **__: Any) -> Any:
        mode.kernels += 1
        mode.add(values, values)
        return torch.empty_like(values)

    with (
        patch.object(functional, "scaled_dot_product_attention", attention),
        patch.object(functional, "rms_norm", rms_norm),
        torch.no_grad(),
        mode,
    ):
        call()
    return Traffic(mode.bytes, mode.kernels)


def _cast(module: Any, dtype: torch.dtype) -> Any:
    """``module`` with weights of ``dtype``, but for those that its class keeps in float32."""
    kept = getattr(module, "_keep_in_fp32_modules", None) or ()
    for name, parameter in module.named_parameters():
        if not any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.to(dtype)
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)
    return module


@contextmanager
def _typed(dtype: torch.dtype) -> Iterator[None]:
    """The functions of :mod:`t2v_energy.work.trace`, counting bytes, with weights and inputs of ``dtype``."""
    build, denoiser, numbers = trace.build_on_meta, trace._denoiser_on_meta, trace._numbers
    with (
        patch.object(trace, "build_on_meta", lambda component: _cast(build(component), dtype)),
        patch.object(trace, "_denoiser_on_meta", lambda model: _cast(denoiser(model), dtype)),
        patch.object(trace, "_numbers", lambda *shape: numbers(*shape).to(dtype)),
        patch.object(trace, "count", counted),
    ):
        yield


def _dtype(model: ModelFile, part: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, model.components[part].dtype or "float32")
    return found


def denoiser_traffic(model: ModelFile, size: Sequence[int]) -> Traffic:
    """One call of the denoiser for a video of (height, width, frames)."""
    with _typed(_dtype(model, denoiser(model).part)):
        found: Any = trace.trace_denoiser(model, *size)
    return Traffic(found.bytes, found.kernels)


def decoder_traffic(model: ModelFile, size: Sequence[int]) -> Traffic:
    """Decoding one video of (height, width, frames)."""
    with _typed(_dtype(model, "vae")):
        found: Any = trace.trace_vae_decode(model, *size)
    return Traffic(found.bytes, found.kernels)


def _sizes(model: ModelFile) -> tuple[list[tuple[int, int, int]], tuple[int, int, int]]:
    """Four sizes to derive from, and the default to check with."""
    d = model.defaults
    unit = model.limits.size_multiple
    small, large = (unit * (96 // unit or 1), unit * (160 // unit or 1)), (unit * (192 // unit or 1),) * 2
    step, offset = model.limits.frames_multiple, model.limits.frames_offset
    few, many = (4, 12) if step > 1 else (8, 16)
    short, long = few * step + offset, many * step + offset
    return [(*s, f) for s in (small, large) for f in (short, long)], (d.height, d.width, d.num_frames)


def derive(model: ModelFile) -> dict[str, Any]:
    """Coefficients of one model, and their relative error at its default size."""
    sizes, default = _sizes(model)
    place = [latents(model, *size)[1] for size in (*sizes, default)]
    first = [latents(model, *size)[0] for size in (*sizes, default)]
    positions = np.array([frames * rows * columns for frames, rows, columns in first], dtype=float)
    calls = [denoiser_traffic(model, size) for size in (*sizes, default)]
    decodings = [decoder_traffic(model, size) for size in (*sizes, default)]
    pixels = np.array([rows * columns for _, rows, columns in place], dtype=float)
    frames = np.array([f for f, _, _ in place], dtype=float)
    terms = {
        "denoiser": (np.column_stack([np.ones_like(positions), positions]), calls),
        "decoder": (
            np.column_stack([np.ones_like(pixels), frames, pixels, pixels * frames]),
            decodings,
        ),
    }
    found: dict[str, Any] = {}
    for name, (design, traffic) in terms.items():
        for column in ("bytes", "kernels"):
            values = np.array([getattr(t, column) for t in traffic], dtype=float)
            weights = 1 / np.maximum(values[:-1], 1)
            solved, *_ = np.linalg.lstsq(design[:-1] * weights[:, None], values[:-1] * weights, rcond=None)
            error = float(design[-1] @ solved / values[-1] - 1)
            found[f"{name}_{column}"] = [float(f"{x:.9g}") for x in solved]
            found[f"{name}_{column}_error_at_default_percent"] = round(100 * error, 3)
    return found


def main(keys: Sequence[str]) -> int:
    """Write the coefficients of the models of ``keys``, or of all, into the package."""
    root = Path.cwd()
    path = Path(__file__).with_name(TRAFFIC_FILE)
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for key in keys or sorted(p.stem for p in (root / "config" / "models").glob("*.yaml")):
        data[key] = derive(load_model(root, key))
        print(key, {k: v for k, v in data[key].items() if k.endswith("percent")})
        path.write_text(json.dumps(dict(sorted(data.items())), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
