"""Closed forms of Mochi's VAE decoder, as diffusers' AutoencoderKLMochi executes it.

The decoder takes the whole latent at once and enlarges it by linear layers, which stand here as 1×1×1
convolutions (the operations and the parameters are the same).  It makes r frames of every latent frame and
throws the first r − 1 away; they are counted, for they are computed.

Tiled decoding (``enable_tiling``) repeats the overlaps and is not counted here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from math import prod
from typing import Any

from t2v_energy.work.layers import (
    Convolution,
    complete,
    convolution_activation_bytes,
    residual_block,
)

# The class's own defaults: a published configuration may leave them out.
DEFAULTS: Mapping[str, Any] = {
    "in_channels": 15,
    "out_channels": 3,
    "encoder_block_out_channels": (64, 128, 256, 384),
    "decoder_block_out_channels": (128, 256, 512, 768),
    "latent_channels": 12,
    "layers_per_block": (3, 3, 4, 6, 3),
    "temporal_expansions": (1, 2, 3),
    "spatial_expansions": (2, 2, 2),
    "add_attention_block": (False, True, True, True, True),
}
CUBE, POINT = (3, 3, 3), (1, 1, 1)
LIVE_TENSORS = 7  # live at the peak, of the widest layer: the allocated peaks of the shipped records


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the class's defaults filled in."""
    return complete(DEFAULTS, config)


def spatial_factor(config: Mapping[str, Any]) -> int:
    """Pixels of the video for each latent pixel, on a side."""
    return prod(settings(config)["spatial_expansions"])


def latent_frames(config: Mapping[str, Any], num_frames: int) -> int:
    """Latent frames of a requested video of ``num_frames``: ⌊(T − 1) / r⌋ + 1, r = 6."""
    return (num_frames - 1) // prod(settings(config)["temporal_expansions"]) + 1


def video_frames(config: Mapping[str, Any], latent_frames: int) -> int:
    """Frames that are decoded: r (l − 1) + 1; the first r − 1 are dropped."""
    return prod(settings(config)["temporal_expansions"]) * (latent_frames - 1) + 1


def decode_flop(config: Mapping[str, Any], frames: int, rows: int, columns: int) -> int:
    """FLOP of decoding a latent of ``frames`` × ``rows`` × ``columns``."""
    return sum(layer.flop for layer in decoder_convolutions(config, frames, rows * columns))


def decoder_convolutions(config: Mapping[str, Any], frames: int, pixels: int) -> Iterator[Convolution]:
    """The convolutions that decode ``frames`` latent frames of ``pixels`` positions, in order."""
    c = settings(config)
    channels = list(reversed(c["decoder_block_out_channels"]))
    layers, times, sides = (
        list(reversed(c[key])) for key in ("layers_per_block", "temporal_expansions", "spatial_expansions")
    )
    yield Convolution("conv_in", c["latent_channels"], channels[0], POINT, frames, pixels)
    yield from _blocks("block_in", layers[0], channels[0], frames, pixels)
    for i, (inputs, outputs) in enumerate(pairwise(channels)):
        stage, enlarged = f"up_blocks.{i}", times[i] * sides[i] ** 2
        yield from _blocks(stage, layers[i + 1], inputs, frames, pixels)
        yield Convolution(stage, inputs, outputs * enlarged, POINT, frames, pixels)
        frames, pixels = frames * times[i], pixels * sides[i] ** 2
    yield from _blocks("block_out", layers[-1], channels[-1], frames, pixels)
    yield Convolution("proj_out", channels[-1], c["out_channels"], POINT, frames, pixels)


def parameter_count(config: Mapping[str, Any]) -> int:
    """Number of learnt parameters of the whole VAE; the encoder is loaded although it never runs."""
    c = settings(config)
    layers = [*decoder_convolutions(c, 1, 1), *_encoder_convolutions(c)]
    norms = sum(2 * x.inputs for x in layers if x.kernel == CUBE)  # scale and shift, before every cube
    # A norm before the encoder's last layer, which has no biases.
    ends = 2 * c["encoder_block_out_channels"][-1] - 2 * c["latent_channels"]
    return int(sum(x.parameters for x in layers) + norms + _attention_parameters(c) + ends)


def decode_activation_bytes(
    config: Mapping[str, Any], frames: int, rows: int, columns: int, bytes_per_value: int
) -> int:
    """Rough peak of live activations while decoding (bytes)."""
    layers = decoder_convolutions(config, frames, rows * columns)
    return convolution_activation_bytes(layers, bytes_per_value, LIVE_TENSORS)


def _blocks(stage: str, count: int, channels: int, frames: int, pixels: int) -> Iterator[Convolution]:
    for _ in range(count):
        yield from residual_block(stage, channels, channels, CUBE, frames, pixels)


def _encoder_convolutions(c: Mapping[str, Any]) -> Iterator[Convolution]:
    """The encoder's convolutions, for their parameters only (positions are set to one)."""
    channels, layers = c["encoder_block_out_channels"], c["layers_per_block"]
    yield Convolution("proj_in", c["in_channels"], channels[0], POINT, 1, 1)
    yield from _blocks("block_in", layers[0], channels[0], 1, 1)
    for i, (inputs, outputs) in enumerate(pairwise(channels)):
        side = c["spatial_expansions"][i]
        yield Convolution("down", inputs, outputs, (c["temporal_expansions"][i], side, side), 1, 1)
        yield from _blocks("down", layers[i + 1], outputs, 1, 1)
    yield from _blocks("block_out", layers[-1], channels[-1], 1, 1)
    yield Convolution("proj_out", channels[-1], 2 * c["latent_channels"], POINT, 1, 1)


def _attention_parameters(c: Mapping[str, Any]) -> int:
    """Of the encoder's attention after its residual blocks: four matrices, one with biases, and a norm."""
    channels = c["encoder_block_out_channels"]
    widths = (*channels, channels[-1])
    present = zip(widths, c["layers_per_block"], c["add_attention_block"], strict=True)
    return sum(count * (4 * n**2 + n + 2 * n) for n, count, attends in present if attends)
