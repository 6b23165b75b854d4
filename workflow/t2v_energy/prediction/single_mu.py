"""The first, simple prediction (predictor ``single_mu``): true work at one efficiency, constant power.

It is the study's latency and energy model (sections 3.4 and 3.5) with true counts in place of its printed
ones, and one correction: the VAE runs in float32 and reaches far fewer FLOP/s than the rest, so its work is
divided by a rate of its own.  It plans batches and gives a first answer; it is not calibrated.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Literal, get_args

from t2v_energy.errors import UserError
from t2v_energy.work import parameter_counts, true_work
from t2v_energy.work.architectures import activation_bytes

if TYPE_CHECKING:
    from t2v_energy.config import Accelerator, ModelFile, ProtocolSettings

ProtocolName = Literal["full", "sampled"]
BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2, "float16": 2}
GIB = 2**30
COPIES = {"motion_adapter": 2}
"""Parts whose weights are on the device more than once: AnimateDiff's pipeline copies the motion adapter's
into a U-Net of its own, and keeps the adapter."""


@dataclass(frozen=True)
class Prediction:
    """What one generation is expected to cost.

    Attributes:
        latency_s: whole generation, ``once_s`` + steps × ``step_s``.
        gpu_energy_Wh: energy of the accelerator's board for it.
        memory_GiB: peak, weights and activations (see :func:`predict`).
        step_s: one denoising step, all guidance passes.
        once_s: all other stages: text encoder, VAE decoding, and LTX-Video's upsampling and refinement.
        kind: always ``modelled``.
    """

    latency_s: float
    gpu_energy_Wh: float
    memory_GiB: float
    step_s: float
    once_s: float
    kind: Literal["modelled"] = "modelled"


def predict(
    model: ModelFile,
    accelerator: Accelerator,
    height: int,
    width: int,
    num_frames: int,
    num_inference_steps: int,
) -> Prediction:
    """Expected cost of one video of ``height`` × ``width`` pixels on ``accelerator``.

    Time is FLOP / ``vae_TFLOPs`` for the decoder and FLOP / (µ · dense bf16 peak) for all else; energy is
    board power × sustained share × time.  Memory is every component's weights in its own type (all stay on
    the device), plus the larger of the activations of the denoiser and of the decoder; the latter are rough
    (:func:`t2v_energy.work.architectures.activation_bytes`) and leave out the allocator's slack and the
    libraries' workspaces.

    Raises:
        UserError: as :func:`t2v_energy.work.true_work`.
    """
    work = true_work(model, height, width, num_frames, num_inference_steps)
    stage = work.flop_by_stage
    rate = accelerator.efficiency * accelerator.peak_bf16_dense_TFLOPs * 1e12
    step_s = stage["denoiser"] / num_inference_steps / rate
    others = stage["text_encoder"] + sum(work.other_stages.values())
    once_s = others / rate + stage["vae_decode"] / (accelerator.vae_TFLOPs * 1e12)
    latency_s = once_s + num_inference_steps * step_s
    power_W = accelerator.board_power_W * accelerator.sustained_power_fraction
    memory = _weight_bytes(model) + activation_bytes(
        model, height, width, num_frames, partial(_bytes_per_value, model)
    )
    return Prediction(latency_s, power_W * latency_s / 3600, memory / GIB, step_s, once_s)


def predict_measurement_s(
    prediction: Prediction, protocol: ProtocolName, settings: ProtocolSettings, num_inference_steps: int
) -> float:
    """Seconds that measuring a configuration takes under ``protocol``, both idle readings included.

    ``full`` runs warm-ups (whole, or of ``warmup_steps``) and repetitions of one whole generation, or of as
    many as fill ``min_window_s``. ``sampled`` runs one short warm-up generation (or ``warmup_calls`` of the
    denoiser, each counted as a step) and then ``generations`` generations of enough steps to fill
    ``min_window_s``, never more than the ``num_inference_steps`` of a whole one. What is added because of a
    wide spread is foreseen in neither. Building the pipeline is not included: a batch does it once.

    Raises:
        UserError: an unknown protocol.
    """
    if protocol == "full":
        full = settings.full
        warmup = min(num_inference_steps, full.warmup_steps or num_inference_steps)
        warmups_s = full.warmups * (prediction.once_s + warmup * prediction.step_s)
        filling = ceil((full.min_window_s or 0) / prediction.latency_s)
        measuring_s = warmups_s + full.repetitions * max(1, filling) * prediction.latency_s
    elif protocol == "sampled":
        sampled = settings.sampled
        filling = ceil(sampled.min_window_s / prediction.step_s)
        steps = min(num_inference_steps, max(sampled.min_steps, filling))
        warmup = min(num_inference_steps, sampled.warmup_calls or sampled.warmup_steps)
        decoded = sampled.generations + (sampled.warmup_calls is None)
        all_steps = warmup + sampled.generations * steps
        measuring_s = decoded * prediction.once_s + all_steps * prediction.step_s
    else:
        raise UserError(
            f"unknown protocol {protocol!r}", remedy=f"known protocols: {', '.join(get_args(ProtocolName))}"
        )
    return measuring_s + 2 * settings.idle_s


def _weight_bytes(model: ModelFile) -> int:
    """Weights of all components (bytes); the few parts that a class keeps in float32 are under 1 %."""
    return sum(
        COPIES.get(part, 1) * count * _bytes_per_value(model, part)
        for part, count in parameter_counts(model).items()
    )


def _bytes_per_value(model: ModelFile, part: str) -> int:
    # A component without a type is left in torch's default.
    return BYTES_PER_VALUE[model.components[part].dtype or "float32"]
