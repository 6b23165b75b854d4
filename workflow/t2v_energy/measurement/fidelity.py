"""How far a changed pipeline's output is from the unchanged one's, with the same seed and as many steps.

With random weights this is no perceptual quality: it shows whether something that should change nothing
changes nothing, and how large the numerical change of the rest is.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import log10
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from t2v_energy.measurement.record import Fidelity

SMALLEST_MULTISCALE_SIDE = 176
"""MS-SSIM halves a frame four times, and its window of 11 pixels must fit into the last (11 · 2⁴)."""
FRAMES_AT_ONCE = 8


@dataclass(frozen=True)
class Output:
    """What a generation made: the latents that were decoded, and the frames.

    Attributes:
        latents: tensor as the VAE's decoder got it, on any device.
        frames: numbers from 0 to 1 of shape (frames, height, width, 3).
    """

    latents: torch.Tensor
    frames: NDArray[np.float32]

    def on_host(self) -> Output:
        """The same with its latents in host memory, so that no measurement pays for keeping it."""
        return Output(self.latents.detach().float().cpu(), np.asarray(self.frames, dtype=np.float32))


def compare(changed: Output, plain: Output, steps: int, device: str) -> Fidelity:
    """``changed`` against ``plain``, both after ``steps`` denoising steps.

    Relative L2 is that of the latents, ‖changed − plain‖ / ‖plain‖.  PSNR (dB) is over all values of all
    frames, which are from 0 to 1; SSIM (Wang et al. 2004) and MS-SSIM (Wang et al. 2003) are means over
    frames, the latter None where a side is too short for it.  Temporal flickering is VBench's
    (Huang et al. 2024): (255 − mean |difference of adjacent frames| on a scale of 255) / 255.
    """
    similar, multiscale = _structural_similarity(changed.frames, plain.frames, device)
    error = _mean_squared(changed.frames, plain.frames)
    return Fidelity(
        steps=steps,
        relative_l2=_relative_l2(changed.latents, plain.latents),
        psnr_db=-10 * log10(error) if error else None,
        ssim=similar,
        ms_ssim=multiscale,
        temporal_flickering=_temporal_flickering(changed.frames),
        reference_temporal_flickering=_temporal_flickering(plain.frames),
    )


def _relative_l2(changed: torch.Tensor, plain: torch.Tensor) -> float:
    first, second = (tensor.detach().double().cpu() for tensor in (changed, plain))
    return float(torch.linalg.vector_norm(first - second) / torch.linalg.vector_norm(second))


def _mean_squared(changed: NDArray[np.float32], plain: NDArray[np.float32]) -> float:
    """Frame by frame, so that no second copy of a video is made."""
    pairs = zip(changed, plain, strict=True)
    return float(np.mean([np.mean((a.astype(np.float64) - b) ** 2) for a, b in pairs]))


def _temporal_flickering(frames: NDArray[np.float32]) -> float | None:
    """None of a single frame."""
    if len(frames) < 2:
        return None
    mean = np.mean([np.mean(np.abs(b - a)) for a, b in pairwise(frames)])
    return float(1 - mean)


def _structural_similarity(
    changed: NDArray[np.float32], plain: NDArray[np.float32], device: str
) -> tuple[float, float | None]:
    multiscale = min(changed.shape[1:3]) >= SMALLEST_MULTISCALE_SIDE
    single: list[float] = []
    several: list[float] = []
    for start in range(0, len(changed), FRAMES_AT_ONCE):
        first, second = (_on(video[start : start + FRAMES_AT_ONCE], device) for video in (changed, plain))
        value: Any = structural_similarity_index_measure(first, second, data_range=1.0)
        single += [float(value)] * len(first)
        if multiscale:
            value = multiscale_structural_similarity_index_measure(first, second, data_range=1.0)
            several += [float(value)] * len(first)
    return float(np.mean(single)), float(np.mean(several)) if several else None


def _on(frames: NDArray[np.float32], device: str) -> Any:
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).to(device)
