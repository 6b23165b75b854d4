"""Closed forms of CogVideoX's VAE decoder, as diffusers' AutoencoderKLCogVideoX executes it.

It decodes two latent frames at a time (the first time three, where their number is odd) and keeps the last
frames of each causal convolution's input.  Where a block stretches time, a frame becomes two, but the first
of an odd number stays alone.  Every norm is modulated by two 1×1×1 convolutions of the latent, which is
enlarged to the norm's own size first.

Tiled decoding (``enable_tiling``) repeats the overlaps and is not counted here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from math import log2
from typing import Any

from t2v_energy.work.layers import (
    Convolution,
    complete,
    convolution_activation_bytes,
    refuse_other,
    residual_block,
)

# The class's own defaults: a published configuration may leave them out.
DEFAULTS: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 256, 512),
    "latent_channels": 16,
    "layers_per_block": 3,
    "temporal_compression_ratio": 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CHUNK = 2  # latent frames that are decoded together
MIDDLE_BLOCKS = 2
LIVE_TENSORS = 8  # live at the peak, of the widest layer: the allocated peaks of the shipped records
CACHED_FRAMES = 2  # frames that each causal convolution keeps of its input
NORMS = "norms"  # stage of the convolutions that modulate norms
CUBE, SQUARE, POINT = (3, 3, 3), (1, 3, 3), (1, 1, 1)


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the class's defaults filled in.

    Raises:
        UserError: 1×1 convolutions of the latent (``use_quant_conv``), which no published model has.
    """
    c = complete(DEFAULTS, config)
    refuse_other(c, "components.vae.config", {"use_quant_conv": False, "use_post_quant_conv": False})
    return c


def spatial_factor(config: Mapping[str, Any]) -> int:
    """Pixels of the video for each latent pixel, on a side."""
    return 2 ** (len(settings(config)["block_out_channels"]) - 1)


def latent_frames(config: Mapping[str, Any], num_frames: int) -> int:
    """Latent frames of a requested video of ``num_frames``: ⌊(T − 1) / r⌋ + 1, r = 4."""
    return (num_frames - 1) // int(settings(config)["temporal_compression_ratio"]) + 1


def video_frames(config: Mapping[str, Any], latent_frames: int) -> int:
    """Frames that are decoded: r (l − 1) + 1 of an odd number of latent frames, r l of an even one.

    The decoder doubles all frames of a chunk, but for the first frame of a chunk of odd length, and latents
    of even length have none such: a video of 4k + 1 frames with odd k comes three frames longer.
    """
    factor = int(settings(config)["temporal_compression_ratio"])
    return factor * latent_frames - latent_frames % 2 * (factor - 1)


def chunks(frames: int) -> list[int]:
    """How many latent frames the decoder takes each time; the first takes the odd one too."""
    count = max(frames // CHUNK, 1)
    first = frames - CHUNK * (count - 1)
    return [first] + [CHUNK] * (count - 1)


def decode_flop(config: Mapping[str, Any], frames: int, rows: int, columns: int) -> int:
    """FLOP of decoding a latent of ``frames`` × ``rows`` × ``columns``."""
    pixels = rows * columns
    return sum(
        times * sum(x.flop for x in decoder_convolutions(config, chunk, pixels))
        for chunk, times in Counter(chunks(frames)).items()
    )


def decoder_convolutions(config: Mapping[str, Any], frames: int, pixels: int) -> Iterator[Convolution]:
    """The convolutions that decode a chunk of ``frames`` latent frames of ``pixels`` positions, in order."""
    c = settings(config)
    channels = list(reversed(c["block_out_channels"]))
    z, stretching = c["latent_channels"], _stretching_blocks(c)
    yield Convolution("conv_in", z, channels[0], CUBE, frames, pixels)
    for _ in range(MIDDLE_BLOCKS):
        yield from _modulated_block("mid_block", z, channels[0], channels[0], frames, pixels)
    inputs = channels[0]
    for i, outputs in enumerate(channels):
        stage = f"up_blocks.{i}"
        for _ in range(c["layers_per_block"] + 1):
            yield from _modulated_block(stage, z, inputs, outputs, frames, pixels)
            inputs = outputs
        if i < len(channels) - 1:
            frames = _stretched(frames) if i < stretching else frames
            pixels *= 4
            yield Convolution(stage, outputs, outputs, SQUARE, frames, pixels)
    yield from _modulation(z, inputs, frames, pixels)
    yield Convolution("conv_out", inputs, c["out_channels"], CUBE, frames, pixels)


def parameter_count(config: Mapping[str, Any]) -> int:
    """Number of learnt parameters of the whole VAE; the encoder is loaded although it never runs."""
    c = settings(config)
    decoder, encoder = list(decoder_convolutions(c, 1, 1)), list(_encoder_convolutions(c))
    # A group norm has a scale and a shift a channel.  The decoder's are those that two convolutions modulate.
    modulated = sum(x.outputs for x in decoder if x.stage == NORMS) // 2
    # The encoder has one before every cube but the first, which is its conv_in.
    plain = sum(x.inputs for x in encoder if x.kernel == CUBE) - c["in_channels"]
    return sum(x.parameters for x in (*decoder, *encoder)) + 2 * (modulated + plain)


def decode_activation_bytes(
    config: Mapping[str, Any], frames: int, rows: int, columns: int, bytes_per_value: int
) -> int:
    """Rough peak of live activations while decoding (bytes): the first chunk, caches and two videos."""
    layers = list(decoder_convolutions(config, chunks(frames)[0], rows * columns))
    cubes = [x for x in layers if x.kernel == CUBE]
    cache = sum(CACHED_FRAMES * x.inputs * x.pixels for x in cubes)
    last = layers[-1]
    stretch = int(settings(config)["temporal_compression_ratio"])
    video = last.outputs * last.pixels * frames * stretch
    return (
        convolution_activation_bytes(cubes, bytes_per_value, LIVE_TENSORS)
        + (cache + 2 * video) * bytes_per_value
    )


def _stretching_blocks(c: Mapping[str, Any]) -> int:
    return int(log2(c["temporal_compression_ratio"]))


def _stretched(frames: int) -> int:
    """Frames after a block that stretches time: the first of an odd number stays alone, and so does one."""
    return 2 * frames - frames % 2


def _modulation(latent: int, channels: int, frames: int, pixels: int) -> Iterator[Convolution]:
    for _ in ("scale", "shift"):
        yield Convolution(NORMS, latent, channels, POINT, frames, pixels)


def _modulated_block(
    stage: str, latent: int, inputs: int, outputs: int, frames: int, pixels: int
) -> Iterator[Convolution]:
    yield from _modulation(latent, inputs, frames, pixels)
    yield from _modulation(latent, outputs, frames, pixels)
    yield from residual_block(stage, inputs, outputs, CUBE, frames, pixels)


def _encoder_convolutions(c: Mapping[str, Any]) -> Iterator[Convolution]:
    """The encoder's convolutions, for their parameters only (positions are set to one)."""
    channels = c["block_out_channels"]
    yield Convolution("conv_in", c["in_channels"], channels[0], CUBE, 1, 1)
    inputs = channels[0]
    for i, outputs in enumerate(channels):
        for _ in range(c["layers_per_block"]):
            yield from residual_block("down", inputs, outputs, CUBE, 1, 1)
            inputs = outputs
        if i < len(channels) - 1:
            yield Convolution("down", outputs, outputs, SQUARE, 1, 1)
    for _ in range(MIDDLE_BLOCKS):
        yield from residual_block("mid_block", inputs, inputs, CUBE, 1, 1)
    yield Convolution("conv_out", inputs, 2 * c["latent_channels"], CUBE, 1, 1)
