"""Closed forms of Stable Diffusion's VAE decoder (AnimateDiff), as diffusers' AutoencoderKL executes it.

It knows images only: every frame is decoded for itself, so that convolutions are those of one frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from t2v_energy.work.layers import (
    Convolution,
    complete,
    convolution_activation_bytes,
    linear_flop,
    product_flop,
    refuse_other,
    residual_block,
)

# The class's own defaults: a published configuration may leave them out.
DEFAULTS: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "latent_channels": 4,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
SQUARE, POINT = (1, 3, 3), (1, 1, 1)


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the class's defaults filled in.

    Raises:
        UserError: a decoder without attention, or without the 1×1 convolutions at the latent.
    """
    c = complete(DEFAULTS, config)
    counted = ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")
    refuse_other(c, "components.vae.config", dict.fromkeys(counted, True))
    return c


def spatial_factor(config: Mapping[str, Any]) -> int:
    """Pixels of the video for each latent pixel, on a side."""
    return 2 ** (len(settings(config)["block_out_channels"]) - 1)


def latent_frames(config: Mapping[str, Any], num_frames: int) -> int:
    """Latent frames of a requested video: as many, for time is not compressed."""
    return num_frames


def video_frames(config: Mapping[str, Any], latent_frames: int) -> int:
    """Frames that are decoded: as many."""
    return latent_frames


def decode_flop(config: Mapping[str, Any], frames: int, rows: int, columns: int) -> int:
    """FLOP of decoding ``frames`` latent images of ``rows`` × ``columns``."""
    pixels, middle = rows * columns, settings(config)["block_out_channels"][-1]
    attention = linear_flop(pixels, middle, 4 * middle) + product_flop(pixels, pixels, middle)
    convolutions = sum(layer.flop for layer in decoder_convolutions(config, frames, pixels))
    return convolutions + frames * int(attention)


def decoder_convolutions(config: Mapping[str, Any], frames: int, pixels: int) -> Iterator[Convolution]:
    """The convolutions that decode ``frames`` latent images of ``pixels`` positions, in order."""
    c = settings(config)
    channels, z = list(reversed(c["block_out_channels"])), c["latent_channels"]
    yield Convolution("post_quant_conv", z, z, POINT, frames, pixels)
    yield Convolution("conv_in", z, channels[0], SQUARE, frames, pixels)
    yield from _middle(channels[0], frames, pixels)
    for i, (inputs, outputs) in enumerate(pairwise((channels[0], *channels))):
        stage = f"up_blocks.{i}"
        yield from residual_block(stage, inputs, outputs, SQUARE, frames, pixels)
        for _ in range(c["layers_per_block"]):
            yield from residual_block(stage, outputs, outputs, SQUARE, frames, pixels)
        if i < len(channels) - 1:
            pixels *= 4
            yield Convolution(f"{stage}.upsampler", outputs, outputs, SQUARE, frames, pixels)
    yield Convolution("conv_out", channels[-1], c["out_channels"], SQUARE, frames, pixels)


def parameter_count(config: Mapping[str, Any]) -> int:
    """Number of learnt parameters of the whole VAE; the encoder is loaded although it never runs."""
    c = settings(config)
    layers = [*decoder_convolutions(c, 1, 1), *_encoder_convolutions(c)]
    # Group norms, with scale and shift, before every 3×3 convolution but the first and the resampling ones.
    bare = ("conv_in", "sampler")
    norms = sum(2 * x.inputs for x in layers if x.kernel == SQUARE and not x.stage.endswith(bare))
    middle = c["block_out_channels"][-1]
    attention = 4 * (middle**2 + middle) + 2 * middle
    return int(sum(x.parameters for x in layers) + norms + 2 * attention)


def decode_activation_bytes(
    config: Mapping[str, Any], frames: int, rows: int, columns: int, bytes_per_value: int
) -> int:
    """Rough peak of live activations while decoding ``frames`` images at once (bytes)."""
    layers = decoder_convolutions(config, frames, rows * columns)
    return convolution_activation_bytes(layers, bytes_per_value)


def _middle(channels: int, frames: int, pixels: int) -> Iterator[Convolution]:
    """The two residual blocks around the attention."""
    for _ in range(2):
        yield from residual_block("mid_block", channels, channels, SQUARE, frames, pixels)


def _encoder_convolutions(c: Mapping[str, Any]) -> Iterator[Convolution]:
    """The encoder's convolutions, for their parameters only (positions are set to one)."""
    channels, moments = c["block_out_channels"], 2 * c["latent_channels"]
    yield Convolution("conv_in", c["in_channels"], channels[0], SQUARE, 1, 1)
    for i, (inputs, outputs) in enumerate(pairwise((channels[0], *channels))):
        yield from residual_block("down", inputs, outputs, SQUARE, 1, 1)
        for _ in range(c["layers_per_block"] - 1):
            yield from residual_block("down", outputs, outputs, SQUARE, 1, 1)
        if i < len(channels) - 1:
            yield Convolution("down.downsampler", outputs, outputs, SQUARE, 1, 1)
    yield from _middle(channels[-1], 1, 1)
    yield Convolution("conv_out", channels[-1], moments, SQUARE, 1, 1)
    yield Convolution("quant_conv", moments, moments, POINT, 1, 1)
