"""Bytes that element-wise kernels and norms move, and kernels that are launched, of every model file.

Coefficients are in traffic.json, derived by :mod:`t2v_energy.work.traffic_trace`; using them needs no torch.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

TRAFFIC_FILE = "traffic.json"
Latent = tuple[int, int, int]


@cache
def _coefficients() -> dict[str, Any]:
    path = Path(__file__).with_name(TRAFFIC_FILE)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def has_traffic(model: str) -> bool:
    """Whether the traffic of this model has been derived."""
    return model in _coefficients()


def denoiser_bytes(model: str, latent: Latent) -> float:
    """Element-wise traffic of one denoiser call, all samples of its batch (bytes)."""
    frames, rows, columns = latent
    constant, each = _coefficients()[model]["denoiser_bytes"]
    return float(constant + each * frames * rows * columns)


def denoiser_kernels(model: str) -> float:
    """Kernels that one denoiser call launches."""
    return float(_coefficients()[model]["denoiser_kernels"][0])


def decoder_bytes(model: str, latent: Latent) -> float:
    """Element-wise traffic of decoding one video (bytes)."""
    frames, rows, columns = latent
    pixels = rows * columns
    constant, by_frame, by_pixel, by_both = _coefficients()[model]["decoder_bytes"]
    return float(constant + by_frame * frames + by_pixel * pixels + by_both * pixels * frames)
