"""Closed forms of LTX-Video's VAE decoder and latent upsampler, as diffusers' AutoencoderKLLTXVideo and
LTXLatentUpsamplerModel execute them.

The decoder takes the whole latent at once.  A block may change the channels in a residual block, then
enlarge (one convolution makes eight values of each, which become 2 × 2 × 2 positions; the first frame of the
doubled ones is dropped), then refine in residual blocks.  Blocks are listed from the video to the latent, as
the encoder runs, so the decoder reads every list backwards.

Tiled decoding (``enable_tiling``) repeats the overlaps and is not counted here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

from t2v_energy.errors import UserError
from t2v_energy.work.layers import (
    Convolution,
    complete,
    convolution_activation_bytes,
    linear_flop,
    linear_parameters,
    refuse_other,
    residual_block,
)

# The class's own defaults: a published configuration may leave them out.
DEFAULTS: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 128,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("LTXVideoDownBlock3D",) * 4,
    "decoder_block_out_channels": (128, 256, 512, 512),
    "layers_per_block": (4, 3, 3, 3, 4),
    "decoder_layers_per_block": (4, 3, 3, 3, 4),
    "spatio_temporal_scaling": (True, True, True, False),
    "decoder_spatio_temporal_scaling": (True, True, True, False),
    "decoder_inject_noise": (False,) * 5,
    "downsample_type": ("conv",) * 4,
    "upsample_residual": (False,) * 4,
    "upsample_factor": (1,) * 4,
    "timestep_conditioning": False,
    "patch_size": 4,
    "patch_size_t": 1,
    "spatial_compression_ratio": None,
    "temporal_compression_ratio": None,
}
LIVE_TENSORS = 6  # live at the peak, of the widest layer: the allocated peaks of the shipped records
# LTXLatentUpsamplerModel's own
UPSAMPLER_DEFAULTS: Mapping[str, Any] = {
    "in_channels": 128,
    "mid_channels": 512,
    "num_blocks_per_stage": 4,
    "dims": 3,
    "spatial_upsample": True,
    "temporal_upsample": False,
}
DOWN_BLOCK = "LTXVideo095DownBlock3D"
STRIDES = {"spatial": (1, 2, 2), "temporal": (2, 1, 1), "spatiotemporal": (2, 2, 2)}
UPSAMPLED = 8  # positions that each becomes: 2 × 2 × 2
TIMESTEP_WIDTH = 256  # of PixArtAlphaCombinedTimestepSizeEmbeddings
MODULATIONS = 4  # of a residual block: shift and scale, twice
CUBE, SQUARE = (3, 3, 3), (1, 3, 3)


@dataclass(frozen=True)
class UpBlock:
    """A block of the decoder: its channels before and after, whether it enlarges, and its residual blocks.

    ``factor``: by how much less the enlarging convolution makes than all its values' channels would need.
    """

    inputs: int
    outputs: int
    layers: int
    enlarges: bool
    factor: int


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the class's defaults filled in.

    Raises:
        UserError: the encoder of releases before 0.9.5, or strided convolutions in it (``downsample_type``).
    """
    c = complete(DEFAULTS, config)
    where = "components.vae.config"
    refuse_other(c, where, {"patch_size_t": 1, "in_channels": 3})
    unknown = [t for t in c["down_block_types"] if t != DOWN_BLOCK]
    unknown += [t for t in c["downsample_type"] if t not in STRIDES]
    if unknown:
        raise UserError(
            f"the encoder's {unknown[0]!r} is not counted",
            where=where,
            remedy=f"use {DOWN_BLOCK} with downsample_type {', '.join(STRIDES)}, as since 0.9.5",
        )
    return c


def spatial_factor(config: Mapping[str, Any]) -> int:
    """Pixels of the video for each latent pixel, on a side."""
    c = settings(config)
    scaled: int = c["patch_size"] * 2 ** sum(c["spatio_temporal_scaling"])
    return int(c["spatial_compression_ratio"] or scaled)


def latent_frames(config: Mapping[str, Any], num_frames: int) -> int:
    """Latent frames of a requested video of ``num_frames``: ⌊(T − 1) / r⌋ + 1, r = 8."""
    return (num_frames - 1) // _temporal_factor(config) + 1


def video_frames(config: Mapping[str, Any], latent_frames: int) -> int:
    """Frames that are decoded: r (l − 1) + 1."""
    return _temporal_factor(config) * (latent_frames - 1) + 1


def _temporal_factor(config: Mapping[str, Any]) -> int:
    c = settings(config)
    scaled: int = c["patch_size_t"] * 2 ** sum(c["spatio_temporal_scaling"])
    return int(c["temporal_compression_ratio"] or scaled)


def decode_flop(config: Mapping[str, Any], frames: int, rows: int, columns: int) -> int:
    """FLOP of decoding a latent of ``frames`` × ``rows`` × ``columns``."""
    convolutions = sum(x.flop for x in decoder_convolutions(config, frames, rows * columns))
    embeddings = sum(
        linear_flop(1, TIMESTEP_WIDTH, width) + linear_flop(1, width, width) for width in _embeddings(config)
    )
    return convolutions + embeddings


def decoder_convolutions(config: Mapping[str, Any], frames: int, pixels: int) -> Iterator[Convolution]:
    """The convolutions that decode ``frames`` latent frames of ``pixels`` positions, in order."""
    c = settings(config)
    blocks = _up_blocks(c)
    channels = blocks[0].inputs * blocks[0].factor
    yield Convolution("conv_in", c["latent_channels"], channels, CUBE, frames, pixels)
    for _ in range(c["decoder_layers_per_block"][-1]):
        yield from residual_block("mid_block", channels, channels, CUBE, frames, pixels)
    for i, block in enumerate(blocks):
        stage = f"up_blocks.{i}"
        if block.inputs != block.outputs:
            yield from residual_block(stage, block.inputs, block.outputs, CUBE, frames, pixels)
        if block.enlarges:
            inputs = block.outputs * block.factor
            yield Convolution(stage, inputs, UPSAMPLED * inputs // block.factor, CUBE, frames, pixels)
            frames, pixels = 2 * frames - 1, 4 * pixels
        for _ in range(block.layers):
            yield from residual_block(stage, block.outputs, block.outputs, CUBE, frames, pixels)
    outputs = c["out_channels"] * c["patch_size"] ** 2
    yield Convolution("conv_out", blocks[-1].outputs, outputs, CUBE, frames, pixels)


def parameter_count(config: Mapping[str, Any]) -> int:
    """Number of learnt parameters of the whole VAE; the encoder is loaded although it never runs."""
    c = settings(config)
    decoder, encoder = list(decoder_convolutions(c, 1, 1)), list(_encoder_convolutions(c))
    # Norms learn nothing, but for the one before a 1×1×1 convolution (scale and shift).
    norms = sum(2 * x.inputs for x in (*decoder, *encoder) if x.kernel == (1, 1, 1))
    return sum(x.parameters for x in (*decoder, *encoder)) + norms + _conditioning_parameters(c)


def decode_activation_bytes(
    config: Mapping[str, Any], frames: int, rows: int, columns: int, bytes_per_value: int
) -> int:
    """Rough peak of live activations while decoding (bytes)."""
    layers = decoder_convolutions(config, frames, rows * columns)
    return convolution_activation_bytes(layers, bytes_per_value, LIVE_TENSORS)


def upsampler_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the defaults of the latent upsampler filled in.

    Raises:
        UserError: it enlarges in time, or works frame by frame (``dims: 2``).
    """
    c = complete(UPSAMPLER_DEFAULTS, config)
    counted = {"dims": 3, "spatial_upsample": True, "temporal_upsample": False}
    refuse_other(c, "components.latent_upsampler.config", counted)
    return c


def upsample_flop(config: Mapping[str, Any], frames: int, rows: int, columns: int) -> int:
    """FLOP of doubling height and width of a latent of ``frames`` × ``rows`` × ``columns``."""
    return sum(x.flop for x in _upsampler_convolutions(config, frames, rows * columns))


def upsampler_parameter_count(config: Mapping[str, Any]) -> int:
    """Number of learnt parameters of the latent upsampler."""
    c = upsampler_settings(config)
    norms = 1 + 2 * 2 * c["num_blocks_per_stage"]  # each with scale and shift
    convolutions = sum(x.parameters for x in _upsampler_convolutions(c, 1, 1))
    return convolutions + norms * 2 * int(c["mid_channels"])


def _up_blocks(c: Mapping[str, Any]) -> list[UpBlock]:
    """The decoder's blocks, in the order in which it runs them."""
    channels = list(reversed(c["decoder_block_out_channels"]))
    before, blocks = channels[0], []
    lists = (c["decoder_layers_per_block"][:-1], c["decoder_spatio_temporal_scaling"], c["upsample_factor"])
    for outputs, layers, enlarges, factor in zip(channels, *map(reversed, lists), strict=True):
        block = UpBlock(before // factor, outputs // factor, layers, enlarges, factor)
        blocks.append(block)
        before = block.outputs
    return blocks


def _embeddings(config: Mapping[str, Any]) -> list[int]:
    """Widths of the embeddings of the decoding timestep: of the middle, of each block, of the last norm."""
    c = settings(config)
    if not c["timestep_conditioning"]:
        return []
    blocks = _up_blocks(c)
    middle = blocks[0].inputs * blocks[0].factor
    return [MODULATIONS * n for n in (middle, *(block.inputs for block in blocks))] + [2 * blocks[-1].outputs]


def _conditioning_parameters(c: Mapping[str, Any]) -> int:
    """What learns of the decoding timestep and of injected noise."""
    blocks = _up_blocks(c)
    middle = blocks[0].inputs * blocks[0].factor
    noise = list(reversed(c["decoder_inject_noise"]))
    residuals = [(middle, noise[0])] * c["decoder_layers_per_block"][-1]
    for block, noisy in zip(blocks, noise[1:], strict=True):
        residuals += [(block.inputs, noisy)] * (block.inputs != block.outputs)
        residuals += [(block.outputs, noisy)] * block.layers
    count = sum(2 * channels for channels, noisy in residuals if noisy)
    if c["timestep_conditioning"]:
        tables = sum(MODULATIONS * channels for channels, _ in residuals) + 2 * blocks[-1].outputs
        embeddings = (linear_parameters(TIMESTEP_WIDTH, n) + linear_parameters(n, n) for n in _embeddings(c))
        count += tables + sum(embeddings) + 1  # the last one multiplies timesteps
    return count


def _encoder_convolutions(c: Mapping[str, Any]) -> Iterator[Convolution]:
    """The encoder's convolutions, for their parameters only (positions are set to one)."""
    channels, layers = c["block_out_channels"], c["layers_per_block"]
    yield Convolution("conv_in", c["in_channels"] * c["patch_size"] ** 2, channels[0], CUBE, 1, 1)
    kinds = zip(layers[:-1], c["spatio_temporal_scaling"], c["downsample_type"], strict=True)
    for (inputs, outputs), (count, shrinks, kind) in zip(pairwise(channels), kinds, strict=True):
        for _ in range(count):
            yield from residual_block("down", inputs, inputs, CUBE, 1, 1)
        if shrinks:
            yield Convolution("down", inputs, outputs // prod(STRIDES[kind]), CUBE, 1, 1)
    for _ in range(layers[-1]):
        yield from residual_block("mid_block", channels[-1], channels[-1], CUBE, 1, 1)
    yield Convolution("conv_out", channels[-1], c["latent_channels"] + 1, CUBE, 1, 1)


def _upsampler_convolutions(config: Mapping[str, Any], frames: int, pixels: int) -> Iterator[Convolution]:
    c = upsampler_settings(config)
    channels, middle = c["in_channels"], c["mid_channels"]
    yield Convolution("initial_conv", channels, middle, CUBE, frames, pixels)
    for _ in range(c["num_blocks_per_stage"]):
        yield from residual_block("res_blocks", middle, middle, CUBE, frames, pixels)
    yield Convolution("upsampler", middle, 4 * middle, SQUARE, frames, pixels)
    for _ in range(c["num_blocks_per_stage"]):
        yield from residual_block("post_upsample_res_blocks", middle, middle, CUBE, frames, 4 * pixels)
    yield Convolution("final_conv", middle, channels, CUBE, frames, 4 * pixels)
