"""Closed forms of Wan's VAE decoder, as diffusers' AutoencoderKLWan executes it.

The decoder takes one latent frame at a time and keeps the last frames of each causal convolution's input.
The first latent frame skips the temporal upsampling and gives one video frame; each later one gives
2^(temporal stages), four in Wan.  The study's table 6 has the same layers but for the residual blocks at
full resolution (a third of the true total) and treats the whole video as one chunk.

Tiled decoding (``enable_tiling``) repeats the overlaps and is not counted here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

from t2v_energy.errors import UserError
from t2v_energy.work.layers import Convolution as Convolution
from t2v_energy.work.layers import residual_block

# The class's own defaults: a published configuration may leave them out.
DEFAULTS: Mapping[str, Any] = {
    "base_dim": 96,
    "decoder_base_dim": None,
    "z_dim": 16,
    "dim_mult": (1, 2, 4, 4),
    "num_res_blocks": 2,
    "attn_scales": (),
    "temperal_downsample": (False, True, True),  # diffusers' spelling
    "is_residual": False,
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": None,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
}

CUBE = (3, 3, 3)
LIVE_TENSORS = 5  # live at the peak, of the widest layer: the allocated peaks of the shipped records
CACHED_FRAMES = 2  # frames that each causal convolution keeps of its input


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the class's defaults filled in.

    Raises:
        UserError: the VAE of Wan 2.2 (``is_residual``, ``patch_size``), whose layers differ.
    """
    complete = {**DEFAULTS, **config}
    if complete["is_residual"] or complete["patch_size"] is not None:
        raise UserError(
            "is_residual and patch_size belong to the VAE of Wan 2.2, whose layers are not counted",
            where="components.vae.config",
            remedy="use the VAE of Wan 2.1",
        )
    return complete


def spatial_factor(config: Mapping[str, Any]) -> int:
    """Pixels of the video for each latent pixel, on a side."""
    return int(settings(config)["scale_factor_spatial"])


def executed_frames(config: Mapping[str, Any], num_frames: int) -> int:
    """Frames that the pipeline makes of a request: r·k + 1 for a temporal factor r (4 in Wan).

    A request with another remainder becomes ⌊T/r⌋·r + 1, which may be more than was asked: 84 gives 85.
    """
    factor = settings(config)["scale_factor_temporal"]
    if num_frames % factor != 1:
        num_frames = num_frames // factor * factor + 1
    return max(num_frames, 1)


def latent_frames(config: Mapping[str, Any], num_frames: int) -> int:
    """Latent frames of a requested video of ``num_frames``, after the pipeline's rounding."""
    factor: int = settings(config)["scale_factor_temporal"]
    return (executed_frames(config, num_frames) - 1) // factor + 1


def video_frames(config: Mapping[str, Any], latent_frames: int) -> int:
    """Frames that are decoded: r (l − 1) + 1."""
    factor: int = settings(config)["scale_factor_temporal"]
    return factor * (latent_frames - 1) + 1


def decode_flop(config: Mapping[str, Any], frames: int, rows: int, columns: int) -> int:
    """FLOP of decoding a latent of ``frames`` × ``rows`` × ``columns`` (eqs. 11 and 12 as executed)."""
    return sum(decode_flop_by_stage(config, frames, rows, columns).values())


def decode_flop_by_stage(config: Mapping[str, Any], frames: int, rows: int, columns: int) -> dict[str, int]:
    """The same by stage: post_quant_conv, conv_in, mid_block, mid_attention, up_blocks.<i>, conv_out."""
    z = settings(config)["z_dim"]
    pixels = rows * columns
    flop = {"post_quant_conv": Convolution("", z, z, (1, 1, 1), frames, pixels).flop}
    for first, count in ((True, 1), (False, frames - 1)):
        for layer in decoder_convolutions(config, pixels, first=first):
            flop[layer.stage] = flop.get(layer.stage, 0) + count * layer.flop
    # The 1×1 projections of the middle attention are among the convolutions; its two products are not.
    flop["mid_attention"] += frames * 4 * pixels**2 * decoder_channels(config)[0]
    return flop


def decoded_layers(
    config: Mapping[str, Any], frames: int, rows: int, columns: int
) -> list[tuple[Convolution, int]]:
    """The decoder's convolutions over a whole latent of ``frames`` × ``rows`` × ``columns``, in order.

    Each is given once, with how many alike there are in its stage; its ``frames`` are all output positions in
    time of one of them, over all latent frames.  ``post_quant_conv`` is the first.
    """
    z, pixels = settings(config)["z_dim"], rows * columns
    layers = {Convolution("post_quant_conv", z, z, (1, 1, 1), 0, pixels): (1, frames)}
    for first, times in ((True, 1), (False, frames - 1)):
        alike = Counter(decoder_convolutions(config, pixels, first=first) if times else ())
        for layer, count in alike.items():
            timeless = replace(layer, frames=0)
            _, seen = layers.get(timeless, (0, 0))
            layers[timeless] = (count, seen + times * layer.frames)
    once_through = list(enumerate(decoder_convolutions(config, pixels, first=False)))
    order = {replace(layer, frames=0): place for place, layer in reversed(once_through)}  # the first place
    return [
        (replace(layer, frames=total), count)
        for layer, (count, total) in sorted(layers.items(), key=lambda item: order.get(item[0], -1))
    ]


def decoder_channels(config: Mapping[str, Any]) -> list[int]:
    """Channels of the decoder: of the middle block, then what each up block gives before its upsampling."""
    c = settings(config)
    base = c["decoder_base_dim"] or c["base_dim"]
    return [base * multiple for multiple in (c["dim_mult"][-1], *reversed(c["dim_mult"]))]


def decoder_convolutions(config: Mapping[str, Any], pixels: int, *, first: bool) -> Iterator[Convolution]:
    """The convolutions that decode one latent frame of ``pixels`` positions, in order.

    ``first`` says whether it is the video's first: then no temporal upsampling runs, and every layer sees
    one frame.  The middle attention's 1×1 projections are among them (stage ``mid_attention``).
    """
    c = settings(config)
    channels = decoder_channels(config)
    middle, upsample_time = channels[0], list(reversed(c["temperal_downsample"]))
    frames = 1
    yield Convolution("conv_in", c["z_dim"], middle, (3, 3, 3), frames, pixels)
    yield from _middle(middle, frames, pixels)
    last = len(channels) - 2
    for i, (before, after) in enumerate(pairwise(channels)):
        stage = f"up_blocks.{i}"
        inputs = before if i == 0 else before // 2  # each spatial upsampling halves the channels
        for _ in range(c["num_res_blocks"] + 1):
            yield from residual_block(stage, inputs, after, CUBE, frames, pixels)
            inputs = after
        if i == last:
            break
        if upsample_time[i] and not first:
            yield Convolution(stage, after, 2 * after, (3, 1, 1), frames, pixels)
            frames *= 2
        pixels *= 4
        yield Convolution(stage, after, after // 2, (1, 3, 3), frames, pixels)
    yield Convolution("conv_out", channels[-1], c["out_channels"], (3, 3, 3), frames, pixels)


def parameter_count(config: Mapping[str, Any]) -> int:
    """Number of learnt parameters of the whole VAE; the encoder is loaded although it never runs."""
    c = settings(config)
    z = c["z_dim"]
    quantisation = sum(Convolution("", n, n, (1, 1, 1), 1, 1).parameters for n in (z, 2 * z))
    decoder = sum(layer.parameters for layer in decoder_convolutions(config, 1, first=False))
    encoder = sum(layer.parameters for layer in _encoder_convolutions(c))
    return quantisation + decoder + encoder + _norm_parameters(c)


def decode_activation_bytes(
    config: Mapping[str, Any], frames: int, rows: int, columns: int, bytes_per_value: int
) -> int:
    """Rough peak of live activations while decoding (bytes).

    The caches of all causal convolutions, the largest layer (input, its padded copy, the output, the
    residual kept beside it and one more: five times the wider side), and two copies of the video, which is
    concatenated after every chunk.  An estimate: cuDNN's workspaces and allocator slack are left out.
    """
    layers = list(decoder_convolutions(config, rows * columns, first=frames == 1))
    cache = sum(CACHED_FRAMES * x.inputs * x.pixels for x in layers if x.kernel[0] > 1)
    residual = [x for x in layers if x.kernel == (3, 3, 3)]
    live = max(
        LIVE_TENSORS * max(x.inputs, x.outputs) * (x.frames + CACHED_FRAMES) * x.pixels for x in residual
    )
    chunk = layers[-1]
    video = chunk.outputs * chunk.pixels * (1 + (frames - 1) * chunk.frames)
    return (cache + live + 2 * video) * bytes_per_value


def _middle(channels: int, frames: int, pixels: int) -> Iterator[Convolution]:
    """Two residual blocks around one single-headed attention within each frame."""
    yield from residual_block("mid_block", channels, channels, CUBE, frames, pixels)
    yield Convolution("mid_attention", channels, 3 * channels, (1, 1, 1), frames, pixels)
    yield Convolution("mid_attention", channels, channels, (1, 1, 1), frames, pixels)
    yield from residual_block("mid_block", channels, channels, CUBE, frames, pixels)


def _encoder_convolutions(c: Mapping[str, Any]) -> Iterator[Convolution]:
    """The encoder's convolutions, for their parameters only (positions are set to one)."""
    channels = [c["base_dim"] * multiple for multiple in (1, *c["dim_mult"])]
    yield Convolution("conv_in", c["in_channels"], channels[0], (3, 3, 3), 1, 1)
    for i, (inputs, outputs) in enumerate(pairwise(channels)):
        for _ in range(c["num_res_blocks"]):
            yield from residual_block("down", inputs, outputs, CUBE, 1, 1)
            inputs = outputs
        if i < len(channels) - 2:
            yield Convolution("down", outputs, outputs, (1, 3, 3), 1, 1)
            if c["temperal_downsample"][i]:
                yield Convolution("down", outputs, outputs, (3, 1, 1), 1, 1)
    yield from _middle(channels[-1], 1, 1)
    yield Convolution("conv_out", channels[-1], 2 * c["z_dim"], (3, 3, 3), 1, 1)


def _norm_parameters(c: Mapping[str, Any]) -> int:
    """One scale a channel for each norm: two in a residual block, one before attention, one at each end."""

    def total(layers: list[Convolution]) -> int:
        before = [x.inputs for x in layers if x.kernel == (3, 3, 3)][
            1:
        ]  # every one but conv_in is normalised
        return sum(before) + sum(x.inputs for x in layers if x.stage == "mid_attention") // 2

    return total(list(decoder_convolutions(c, 1, first=False))) + total(list(_encoder_convolutions(c)))
