"""Derives work/traffic.json from the real modules: bytes that kernels move, slow norms, and kernels launched.

They run on torch's meta device, in the number types of the model files: every operator reads its inputs and
writes its outputs once; views move nothing.  Needs the extra ``measure``::

    python -m t2v_energy.work.traffic_trace

A denoiser's counts are linear in the positions of its latent, a decoder's in the pixels of latent frames and
in their number; a text encoder has one size.  Small sizes and the default give the coefficients, another size
says how well they hold.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any
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
from t2v_energy.work.traffic import BLOCKS, COUNTS, NARROW_BYTES, TRAFFIC_FILE, Traffic, counts_decoder

if TYPE_CHECKING:
    from t2v_energy.config import ModelFile

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "_scaled_mm")
"""Matrix products: what they move is counted apart."""
CONVOLUTION = "convolution"
MATH_KERNELS = 15
"""Kernels of attention where torch has none that fuses it, as in T5 with its bias."""
DEFAULT_WEIGHT = 10
"""Weight of the default size among those that coefficients are fitted to."""
UNMOVED = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "lift_fresh")
"""Operators that move nothing."""


class TrafficMode(TorchDispatchMode):
    """Adds up what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.found = dict.fromkeys(COUNTS, 0.0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name in UNMOVED or name.startswith("_unsafe_view"):
            return result
        self.found["kernels"] += 1
        if name in PRODUCTS:
            self.add("product_bytes", args, kwargs, result)
        elif name == CONVOLUTION:
            self.add("convolution_bytes", args, kwargs, result)
        else:
            self.add("bytes", args, kwargs, result)
        if name == "native_layer_norm":
            self.norm(args[0], prod(args[1]))
        elif name == "native_group_norm":
            samples, groups = args[3], args[6]
            self.found["group_norm_values"] += args[0].numel()
            self.found["group_norm_serial"] += args[0].numel() / min(samples * groups, BLOCKS)
        return result

    def add(self, count: str, *values: Any) -> None:
        """Add the bytes of all tensors among ``values``."""
        self.found[count] += sum(
            leaf.numel() * leaf.element_size()
            for leaf in tree_leaves(values)
            if isinstance(leaf, torch.Tensor)
        )

    def norm(self, values: torch.Tensor, columns: int) -> None:
        """A norm over the last ``columns`` values: its rows, as far as they are narrow."""
        moved = 2 * columns * values.element_size()
        self.found["norm_rows"] += values.numel() / columns * max(0.0, 1 - moved / NARROW_BYTES)


def counted(call: Callable[[], Any], masked_kernels: int = 1) -> Traffic:
    """Traffic of ``call``; RMSNorm is a single kernel, as on a GPU, and so is attention.

    Attention with a mask or a bias has ``masked_kernels``.
    """
    mode = TrafficMode()

    def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, *_: Any, **__: Any) -> Any:
        mode.found["kernels"] += 1 if attn_mask is None else masked_kernels
        return query.new_empty((*query.shape[:-1], value.shape[-1]))

    def rms_norm(values: Any, shape: Sequence[int], *_: Any, **__: Any) -> Any:
        mode.found["kernels"] += 1
        mode.add("bytes", values, values)
        mode.norm(values, prod(shape))
        return torch.empty_like(values)

    with (
        patch.object(functional, "scaled_dot_product_attention", attention),
        patch.object(functional, "rms_norm", rms_norm),
        torch.no_grad(),
        mode,
    ):
        call()
    return Traffic(**mode.found)


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
    return Traffic(*found)


def decoder_traffic(model: ModelFile, size: Sequence[int]) -> Traffic:
    """Decoding one video of (height, width, frames)."""
    with _typed(_dtype(model, "vae")):
        found: Any = trace.trace_vae_decode(model, *size)
    return Traffic(*found)


def text_encoder_traffic(model: ModelFile) -> Traffic:
    """One pass of each text encoder."""
    with (
        _typed(_dtype(model, "text_encoder")),
        patch.object(trace, "count", partial(counted, masked_kernels=MATH_KERNELS)),
    ):
        found: Any = trace.trace_text_encoder(model)
    return Traffic(*found)


def _sizes(model: ModelFile) -> tuple[list[tuple[int, int, int]], tuple[int, int, int]]:
    """Five sizes to derive from, the default the last, and one to check with."""
    d = model.defaults
    unit = model.limits.size_multiple
    small, large = (unit * (96 // unit or 1), unit * (160 // unit or 1)), (unit * (192 // unit or 1),) * 2
    step, offset = model.limits.frames_multiple, model.limits.frames_offset
    few, many = (4, 12) if step > 1 else (8, 16)
    short, long = few * step + offset, many * step + offset
    default = (d.height, d.width, d.num_frames)
    check = (unit * (320 // unit or 1), unit * (256 // unit or 1), 8 * step + offset)
    return [*((*s, f) for s in (small, large) for f in (short, long)), default], check


def derive(model: ModelFile) -> dict[str, Any]:
    """Coefficients of one model, and their relative errors at another size."""
    sizes, check = _sizes(model)
    places = [latents(model, *size) for size in (*sizes, check)]
    positions = np.array([frames * rows * columns for (frames, rows, columns), _ in places], dtype=float)
    pixels = np.array([rows * columns for _, (_, rows, columns) in places], dtype=float)
    frames = np.array([f for _, (f, _, _) in places], dtype=float)
    one = np.ones_like(pixels)
    parts = {
        "denoiser": (np.column_stack([one, positions]), denoiser_traffic),
        "decoder": (np.column_stack([one, frames, pixels, pixels * frames]), decoder_traffic),
    }
    if counts_decoder(model):
        del parts["decoder"]
    found: dict[str, Any] = {}
    for name, (design, traffic) in parts.items():
        measured = [traffic(model, size) for size in (*sizes, check)]
        found[name], errors = {}, {}
        for count in COUNTS:
            values = np.array([getattr(t, count) for t in measured], dtype=float)
            if not values.any():
                continue
            weights = 1 / np.maximum(values[:-1], 1)
            weights[-1] *= DEFAULT_WEIGHT
            solved, *_ = np.linalg.lstsq(design[:-1] * weights[:, None], values[:-1] * weights, rcond=None)
            terms = np.where(np.abs(solved * design).max(axis=0) < 1e-7 * values.max(), 0.0, solved)
            found[name][count] = [float(f"{x:.9g}") for x in terms]
            errors[count] = round(100 * float(design[-1] @ terms / values[-1] - 1), 3) if values[-1] else 0.0
        found[f"{name}_error_percent"] = errors
    found["text_encoder"] = {"kernels": text_encoder_traffic(model).kernels}
    return found


def main(keys: Sequence[str]) -> int:
    """Write the coefficients of the models of ``keys``, or of all, into the package."""
    root = Path.cwd()
    path = Path(__file__).with_name(TRAFFIC_FILE)
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for key in keys or sorted(p.stem for p in (root / "config" / "models").glob("*.yaml")):
        data[key] = derive(load_model(root, key))
        print(key, {k: v for k, v in data[key].items() if k.endswith("percent")}, flush=True)
        path.write_text(json.dumps(dict(sorted(data.items())), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
