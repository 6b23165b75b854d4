"""Which part of a video is bound by what, on an accelerator: arithmetic, bandwidth or launches.

A part that multiplies matrices has an intensity (FLOP for each byte that it must move at least); above the
accelerator's ridge, its peak over its bandwidth, arithmetic bounds it, below it bandwidth (the roofline of
Williams, Waterman and Patterson, 2009).  A stage whose launches take the host longer than the device needs is
bound by launches.  Norms whose rows or groups are too small to fill the device are bound by neither: by
``occupancy``.  Needs no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from t2v_energy.config import Accelerator, load_accelerator, load_model
from t2v_energy.prediction.calibrated import Calibration, part_times, rounded_frames
from t2v_energy.prediction.features import Features, Point, features
from t2v_energy.prediction.forward import DECODER_PARTS, DENOISER_PARTS, PARTS, TEXT_PARTS, TIME_NAMES
from t2v_energy.work.architectures import made_frames

HALF_BYTES = 2
STAGES = {"denoiser": DENOISER_PARTS, "vae_decode": DECODER_PARTS, "text_encoder": TEXT_PARTS}
KERNELS = {"denoiser": "kernels", "vae_decode": "vae_kernels", "text_encoder": "text_kernels"}
BOUNDS = ("compute", "bandwidth", "occupancy", "launches", "host")
OUTSIDE = {
    "call": "denoiser",
    "launch": "denoiser",
    "vae_launch": "vae_decode",
    "text_launch": "text_encoder",
}


class Part(NamedTuple):
    """One part of a video; all ``modelled``.

    Attributes:
        flop, moved_bytes: its operations and the bytes that it moves at least.
        intensity: their ratio (FLOP/B); None without operations or bytes.
        compute_limit_s, bandwidth_limit_s: at the accelerator's published peak and bandwidth.
        predicted_s, share: as the cost model predicts it, and of the whole video.
        bound: one of :data:`BOUNDS`.
    """

    stage: str
    part: str
    flop: float
    moved_bytes: float
    intensity: float | None
    compute_limit_s: float
    bandwidth_limit_s: float
    predicted_s: float
    share: float
    bound: str


def roofline(root: Path, calibration: Calibration, point: Point) -> list[Part]:
    """Parts of one video that take time, the longest first within stages.

    Raises:
        UserError: as :func:`t2v_energy.prediction.calibrated.predict_points`.
    """
    work, limits = features(root, [point]), load_accelerator(root, calibration.accelerator)
    seconds = dict(zip(PARTS, part_times(root, calibration, [point])[0], strict=True))
    launch_s = float(np.exp(calibration.time.mean[TIME_NAMES.index("launch")]))
    total = sum(seconds.values())
    amounts = _amounts(work)
    found = []
    for stage, parts in STAGES.items():
        launching = launch_s * float(getattr(work, KERNELS[stage])[0])
        waits = launching > sum(seconds[part] for part in parts)
        for part in parts:
            if seconds[part] > 0:
                flop, moved = amounts.get(part, (0.0, 0.0))
                bound = "launches" if waits else _bound(part, flop, moved, limits)
                found.append(_part(stage, part, flop, moved, seconds[part], total, bound, limits))
    for part, predicted in seconds.items():
        if part not in {p for parts in STAGES.values() for p in parts} and predicted > 0:
            bound = "launches" if part in OUTSIDE else "host"
            found.append(_part(OUTSIDE.get(part, "host"), part, 0.0, 0.0, predicted, total, bound, limits))
    return found


def _amounts(work: Features) -> dict[str, tuple[float, float]]:
    """FLOP and least bytes of each part of one configuration."""
    w = {name: float(getattr(work, name)[0]) for name in Features.__dataclass_fields__}
    attention = w["attention_flop"] + w["attention_narrow_flop"]
    # QKᵀ and PV of L tokens: 4 L² d operations on 4 L d values.
    attention_bytes = HALF_BYTES * attention / max(w["tokens"], 1)
    vae = w["vae_float32_flop"] + w["vae_half_flop"]
    return {
        "attention": (attention, attention_bytes),
        "products": (w["dense_flop"], w["product_bytes"]),
        "convolution": (w["convolution_flop"], w["convolution_bytes"]),
        "traffic": (0.0, w["traffic_bytes"]),
        "vae_convolution": (vae, w["vae_convolution_bytes"]),
        "vae_traffic": (0.0, w["vae_traffic_bytes"]),
        "text": (w["text_flop"], 0.0),
    }


def _bound(part: str, flop: float, moved: float, limits: Accelerator) -> str:
    if part.removeprefix("vae_") in ("norm", "group_norm", "group_norm_wait"):
        return "occupancy"
    return (
        "compute" if flop * limits.bandwidth_TB_per_s > moved * limits.peak_bf16_dense_TFLOPs else "bandwidth"
    )


def _part(
    stage: str,
    part: str,
    flop: float,
    moved: float,
    predicted: float,
    total: float,
    bound: str,
    limits: Accelerator,
) -> Part:
    return Part(
        stage,
        part,
        flop,
        moved,
        flop / moved if flop and moved else None,
        flop / (limits.peak_bf16_dense_TFLOPs * 1e12),
        moved / (limits.bandwidth_TB_per_s * 1e12),
        float(predicted),
        float(predicted / total),
        bound,
    )


def report(root: Path, calibration: Calibration, point: Point) -> dict[str, Any]:
    """:func:`roofline` with the accelerator's limits, as data."""
    limits = load_accelerator(root, calibration.accelerator)
    parts = roofline(root, calibration, point)
    bounds = {bound: sum(p.share for p in parts if p.bound == bound) for bound in BOUNDS}
    notes = list(calibration.notes)
    frames = made_frames(load_model(root, point.model), int(point.num_frames))
    if frames != point.num_frames:
        notes.append(rounded_frames(point.num_frames, frames))
        point = point._replace(num_frames=frames)
    return {
        "kind": "modelled",
        "model": point.model,
        **{name: int(getattr(point, name)) for name in Point._fields[1:5]},
        "accelerator": calibration.accelerator,
        "calibration_points": calibration.points,
        "peak_bf16_dense_TFLOPs": limits.peak_bf16_dense_TFLOPs,
        "bandwidth_TB_per_s": limits.bandwidth_TB_per_s,
        "ridge_FLOP_per_byte": limits.peak_bf16_dense_TFLOPs / limits.bandwidth_TB_per_s,
        "latency_s": sum(part.predicted_s for part in parts),
        "share_by_bound": bounds,
        "parts": [part._asdict() for part in parts],
        "notes": notes,
    }


def as_text(found: dict[str, Any]) -> str:
    """:func:`report` for people."""
    size = f"{found['height']}×{found['width']}, {found['num_frames']} frames"
    lines = [
        f"{found['model']}, {size}, {found['num_inference_steps']} steps, {found['accelerator']} (modelled)",
        f"peak {found['peak_bf16_dense_TFLOPs']:g} TFLOP/s, {found['bandwidth_TB_per_s']:g} TB/s: "
        f"ridge at {found['ridge_FLOP_per_byte']:.0f} FLOP/B",
        f"{'stage':<14}{'part':<22}{'FLOP':>10}{'bytes':>10}{'FLOP/B':>8}{'s':>10}{'share':>8}  bound by",
    ]
    for part in found["parts"]:
        intensity = f"{part['intensity']:.0f}" if part["intensity"] else ""
        lines.append(
            f"{part['stage']:<14}{part['part']:<22}{part['flop']:>10.3g}{part['moved_bytes']:>10.3g}"
            f"{intensity:>8}{part['predicted_s']:>10.4g}{100 * part['share']:>7.1f}%  {part['bound']}"
        )
    shares = ", ".join(f"{bound} {100 * share:.1f} %" for bound, share in found["share_by_bound"].items())
    return "\n".join([*lines, f"time by bound: {shares}", *(f"note: {note}" for note in found["notes"])])
