"""Closed forms of AnimateDiff's denoiser, as diffusers' UNetMotionModel executes it.

Stable Diffusion's U-Net sees every frame as an image; after each of its blocks a motion module lets every
pixel attend to itself in the other frames.  f: frames, p: pixels at a level, c: channels at a level, m: text
tokens.  Level i has half the rows and columns of level i − 1, rounded up.  Text reaches every frame: its keys
and values are made f times.  Counts are FLOP of one forward pass of one sample (all its frames).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from t2v_energy.work.layers import (
    Convolution,
    complete,
    linear_flop,
    linear_parameters,
    product_flop,
    refuse_other,
    residual_block,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# The defaults of UNet2DConditionModel and of MotionAdapter: a published configuration may leave them out.
DEFAULTS: Mapping[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "use_linear_projection": False,
    "addition_embed_type": None,
    "encoder_hid_dim_type": None,
    "class_embed_type": None,
    "time_cond_proj_dim": None,
}
MOTION_DEFAULTS: Mapping[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "motion_layers_per_block": 2,
    "motion_transformer_layers_per_block": 1,
    "motion_mid_block_layers_per_block": 1,
    "motion_transformer_layers_per_mid_block": 1,
    "use_motion_mid_block": True,
    "conv_in_channels": None,
}
TIME_EXPANSION = 4  # width of the time embedding over the first block's channels
MLP_EXPANSION = 4
GATED = 3  # matrices of a gated feed-forward network
Count = TypeVar("Count", int, "NDArray[np.float64]")
"""A whole number of one size, or that of each of many sizes."""
TILE_HEAD, TILE_TOKENS = 64, 128
SQUARE, POINT = (1, 3, 3), (1, 1, 1)


@dataclass(frozen=True)
class Block:
    """A residual block at a level of the U-Net, what follows it, and whether the size changes after it.

    Attributes:
        level: how often rows and columns have been halved.
        inputs, outputs: channels; those of the way up include the skipped ones.
        attends: whether a transformer over the frame's pixels and the text follows.
        moves: whether a motion module follows.
        resampled: level of the 3×3 convolution that changes the size afterwards, if one does.
    """

    level: int
    inputs: int
    outputs: int
    attends: bool
    moves: bool = True
    resampled: int | None = None


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` of the U-Net with the class's defaults filled in.

    Raises:
        UserError: several transformer layers in a block, or embeddings beyond Stable Diffusion 1.5's.
    """
    c = complete(DEFAULTS, config)
    additions = ("addition_embed_type", "encoder_hid_dim_type", "class_embed_type", "time_cond_proj_dim")
    counted = {"transformer_layers_per_block": 1, **dict.fromkeys(additions)}
    refuse_other(c, "components.unet.config", counted)
    return c


def motion_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` of the motion adapter with the class's defaults filled in.

    Raises:
        UserError: several transformer layers in a module, no module in the middle, or inputs of its own.
    """
    c = complete(MOTION_DEFAULTS, config)
    counted = {key: MOTION_DEFAULTS[key] for key in MOTION_DEFAULTS if key != "block_out_channels"}
    del counted["motion_layers_per_block"]  # the U-Net refuses one that is not its own
    refuse_other(c, "components.motion_adapter.config", counted)
    return c


def blocks(config: Mapping[str, Any]) -> Iterator[Block]:
    """The U-Net's residual blocks in the order in which they run, with what follows each."""
    c = settings(config)
    channels, layers = c["block_out_channels"], c["layers_per_block"]
    last, skipped = len(channels) - 1, [channels[0]]
    inputs = channels[0]
    for level, (outputs, kind) in enumerate(zip(channels, c["down_block_types"], strict=True)):
        for i in range(layers):
            shrinks = i == layers - 1 and level < last
            yield Block(level, inputs, outputs, _attends(kind), resampled=level + 1 if shrinks else None)
            inputs = outputs
            skipped += [outputs] * (2 if shrinks else 1)
    yield Block(last, inputs, inputs, True)
    yield Block(last, inputs, inputs, False, moves=False)
    ways_up = zip(reversed(range(last + 1)), reversed(channels), c["up_block_types"], strict=True)
    for level, outputs, kind in ways_up:
        for i in range(layers + 1):
            grows = i == layers and level > 0
            yield Block(
                level,
                inputs + skipped.pop(),
                outputs,
                _attends(kind),
                resampled=level - 1 if grows else None,
            )
            inputs = outputs


def forward_flop(
    config: Mapping[str, Any], frames: int, rows: int, columns: int, text_tokens: int
) -> dict[str, int]:
    """FLOP by operator of one forward pass over ``frames`` latent images of ``rows`` × ``columns``.

    ``self_attention`` is that within a frame and that of the motion modules over frames, with the linear
    layers around the latter.  ``timestep_mlp`` includes the projection of the time embedding in every
    residual block, which is made for every frame.
    """
    c = settings(config)
    pixels = _level_pixels(c, rows, columns)
    flop = _products(c, frames, pixels, text_tokens)
    flop["convolution"] = sum(x.flop for x in _convolutions(c, frames, pixels))
    return flop


def _products(c: Mapping[str, Any], frames: int, pixels: Sequence[int], text_tokens: int) -> dict[str, int]:
    """Matrix products by operator, with ``pixels`` at each level."""
    parts = [_block_flop(c, block, frames, pixels[block.level], text_tokens) for block in blocks(c)]
    flop = {operator: sum(part[operator] for part in parts) for operator in parts[0]}
    time = _time_width(c)
    flop["timestep_mlp"] += linear_flop(1, c["block_out_channels"][0], time) + linear_flop(1, time, time)
    return flop


def _dense_flop(c: Mapping[str, Any], frames: int, pixels: Sequence[int], text_tokens: int) -> int:
    """Matrix products but for QKᵀ and PV; linear in ``pixels``."""
    products = _attention_products(c, frames, pixels, text_tokens)
    return sum(_products(c, frames, pixels, text_tokens).values()) - products


def attention_product_flop(
    config: Mapping[str, Any], frames: int, rows: int, columns: int, text_tokens: int
) -> int:
    """FLOP of QKᵀ and PV alone of one forward pass: 4 f p (p + m) c, and 8 p f² c of a motion module."""
    c = settings(config)
    return _attention_products(c, frames, _level_pixels(c, rows, columns), text_tokens)


def _attention_products(c: Mapping[str, Any], frames: int, pixels: Sequence[int], text_tokens: int) -> int:
    total = 0
    for block in blocks(c):
        p, width = pixels[block.level], block.outputs
        total += block.attends * frames * product_flop(p, p + text_tokens, width)
        total += block.moves * p * 2 * product_flop(frames, frames, width)
    return total


def executed_attention_flop(
    config: Mapping[str, Any], frames: int, rows: int, columns: int, text_tokens: int
) -> int:
    """FLOP of QKᵀ and PV that kernels execute: heads filled up to 64 values, lengths to 128 tokens.

    Fused kernels work on tiles: heads of 40 cost what heads of 64 do, and the 16 frames that a pixel attends
    to cost a tile.
    """
    c = settings(config)
    motion, spatial = _executed_attention(c, frames)
    return _tiled(motion, spatial, _filled(text_tokens, TILE_TOKENS), _level_pixels(c, rows, columns))


class ByLevel(NamedTuple):
    """FLOP of one forward pass of a given length, for any size: what multiplies the pixels of each level.

    Attributes:
        constant: dense products that no pixel changes: text's keys and values, and the time embedding.
        dense, convolution, motion: by level, for each pixel; dense products (no QKᵀ and PV), convolutions,
            and attention over frames as executed.
        spatial: by level, for each query and key of attention within frames as executed.
        text: keys that text adds to it, filled up.
    """

    constant: int
    dense: Sequence[int]
    convolution: Sequence[int]
    motion: Sequence[int]
    spatial: Sequence[int]
    text: int

    def dense_flop(self, pixels: Sequence[Count]) -> Count:
        """Dense products at ``pixels`` of each level."""
        return self.constant + _weighted(self.dense, pixels)

    def convolution_flop(self, pixels: Sequence[Count]) -> Count:
        """Convolutions at ``pixels`` of each level."""
        return _weighted(self.convolution, pixels)

    def attention_flop(self, pixels: Sequence[Count]) -> Count:
        """QKᵀ and PV as executed (:func:`executed_attention_flop`) at ``pixels`` of each level."""
        return _tiled(self.motion, self.spatial, self.text, pixels)

    def at(self, rows: Count, columns: Count) -> tuple[Count, Count, Count]:
        """Dense products, convolutions and attention as executed of ``rows`` × ``columns`` latent pixels.

        Those of one size, or of many: arrays of one shape.
        """
        pixels = _halved(len(self.dense), rows, columns)
        return self.dense_flop(pixels), self.convolution_flop(pixels), self.attention_flop(pixels)


def by_level(config: Mapping[str, Any], frames: int, text_tokens: int) -> ByLevel:
    """What the sizes of a length share, so that none has to go through the blocks again."""
    c = settings(config)
    levels = len(c["block_out_channels"])
    motion, spatial = _executed_attention(c, frames)
    constant = _dense_flop(c, frames, [0] * levels, text_tokens)
    one_pixel = [[int(level == other) for other in range(levels)] for level in range(levels)]
    return ByLevel(
        constant=constant,
        dense=[_dense_flop(c, frames, pixels, text_tokens) - constant for pixels in one_pixel],
        convolution=[sum(x.flop for x in _convolutions(c, frames, pixels)) for pixels in one_pixel],
        motion=motion,
        spatial=spatial,
        text=_filled(text_tokens, TILE_TOKENS),
    )


def _executed_attention(c: Mapping[str, Any], frames: int) -> tuple[list[int], list[int]]:
    """``motion`` and ``spatial`` of :class:`ByLevel`."""
    heads, levels = c["attention_head_dim"], len(c["block_out_channels"])  # the former's name misleads
    side, motion, spatial = _filled(frames, TILE_TOKENS), [0] * levels, [0] * levels
    for block in blocks(c):
        width = heads * _filled(block.outputs // heads, TILE_HEAD)
        motion[block.level] += block.moves * 2 * product_flop(side, side, width)
        spatial[block.level] += block.attends * frames * product_flop(1, 1, width)
    return motion, spatial


def _tiled(motion: Sequence[int], spatial: Sequence[int], text: int, pixels: Sequence[Count]) -> Count:
    """QKᵀ and PV as executed at ``pixels`` of each level, with ``text`` keys beside them, filled up."""
    filled = [_filled(p, TILE_TOKENS) for p in pixels]
    return _weighted(motion, pixels) + _weighted(spatial, [p * (p + text) for p in filled])


def _weighted(weights: Sequence[int], values: Sequence[Count]) -> Count:
    return reduce(add, (weight * value for weight, value in zip(weights, values, strict=True)))


def _filled(count: Count, tile: int) -> Count:
    return -(-count // tile) * tile


def convolutions(config: Mapping[str, Any], frames: int, rows: int, columns: int) -> Iterator[Convolution]:
    """Every convolution of one forward pass, in order."""
    c = settings(config)
    yield from _convolutions(c, frames, _level_pixels(c, rows, columns))


def _convolutions(c: Mapping[str, Any], frames: int, pixels: Sequence[int]) -> Iterator[Convolution]:
    """Those with ``pixels`` at each level."""
    first = c["block_out_channels"][0]
    yield Convolution("conv_in", c["in_channels"], first, SQUARE, frames, pixels[0])
    for block in blocks(c):
        p, n = pixels[block.level], block.outputs
        yield from residual_block("resnets", block.inputs, n, SQUARE, frames, p)
        if block.attends and not c["use_linear_projection"]:
            yield Convolution("attentions.proj_in", n, n, POINT, frames, p)
            yield Convolution("attentions.proj_out", n, n, POINT, frames, p)
        if block.resampled is not None:
            yield Convolution("samplers", n, n, SQUARE, frames, pixels[block.resampled])
    yield Convolution("conv_out", first, c["out_channels"], SQUARE, frames, pixels[0])


def parameter_count(config: Mapping[str, Any]) -> int:
    """Number of learnt parameters of the U-Net without motion modules, as it is published."""
    c = settings(config)
    time, first = _time_width(c), c["block_out_channels"][0]
    count = sum(x.parameters for x in convolutions(c, 1, 1, 1))
    count += linear_parameters(first, time) + linear_parameters(time, time) + 2 * first
    for block in blocks(c):
        count += 2 * (block.inputs + block.outputs) + linear_parameters(time, block.outputs)
        count += _transformer_parameters(c, block.outputs) if block.attends else 0
    return int(count)


def motion_parameter_count(config: Mapping[str, Any]) -> int:
    """Number of learnt parameters of the motion adapter."""
    c = motion_settings(config)
    layers = c["motion_layers_per_block"]
    down_and_up = sum((2 * layers + 1) * _motion_parameters(n) for n in c["block_out_channels"])
    return int(down_and_up + _motion_parameters(c["block_out_channels"][-1]))


def activation_bytes(
    config: Mapping[str, Any], frames: int, rows: int, columns: int, bytes_per_value: int
) -> int:
    """Rough peak of live activations of one sample (bytes).

    The largest block's gated feed-forward network (stream, normalised stream, twice the inner values), and
    what is kept to be skipped to the way up.
    """
    c = settings(config)
    pixels = _level_pixels(c, rows, columns)
    widest = max((2 + 2 * MLP_EXPANSION) * x.outputs * pixels[x.level] for x in blocks(c))
    levels = sum(n * p for n, p in zip(c["block_out_channels"], pixels, strict=True))
    skipped = (c["layers_per_block"] + 1) * levels
    return int(frames * (widest + skipped) * bytes_per_value)


def _attends(kind: str) -> bool:
    return kind.startswith("CrossAttn")


def _time_width(c: Mapping[str, Any]) -> int:
    return TIME_EXPANSION * int(c["block_out_channels"][0])


def _level_pixels(c: Mapping[str, Any], rows: int, columns: int) -> list[int]:
    """Pixels of a latent image at each level."""
    return _halved(len(c["block_out_channels"]), rows, columns)


def _halved(levels: int, rows: Count, columns: Count) -> list[Count]:
    pixels = [rows * columns]
    for _ in range(levels - 1):
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
        pixels.append(rows * columns)
    return pixels


def _block_flop(
    c: Mapping[str, Any], block: Block, frames: int, pixels: int, text_tokens: int
) -> dict[str, int]:
    """What a block adds, but for its convolutions."""
    n, rows, m = block.outputs, frames * pixels, text_tokens
    attention = linear_flop(rows, n, 4 * n)
    spatial = attention + frames * product_flop(pixels, pixels, n)
    if c["use_linear_projection"]:
        spatial += linear_flop(rows, n, 2 * n)
    cross = linear_flop(rows, n, 2 * n) + linear_flop(frames * m, c["cross_attention_dim"], 2 * n)
    cross += frames * product_flop(pixels, m, n)
    # Two attentions over frames, and linear layers before and after them.
    motion = 2 * (attention + pixels * product_flop(frames, frames, n)) + linear_flop(rows, n, 2 * n)
    network = GATED * linear_flop(rows, n, MLP_EXPANSION * n)
    return {
        "self_attention": block.attends * spatial + block.moves * motion,
        "cross_attention": block.attends * cross,
        "mlp": (block.attends + block.moves) * network,
        "timestep_mlp": linear_flop(frames, _time_width(c), n),
    }


def _network_parameters(n: int) -> int:
    inner = MLP_EXPANSION * n
    return linear_parameters(n, 2 * inner) + linear_parameters(inner, n)


def _transformer_parameters(c: Mapping[str, Any], n: int) -> int:
    """A transformer over pixels and text, its norms included; 1×1 convolutions around it are not."""
    own = 3 * n * n + linear_parameters(n, n)
    cross = n * n + 2 * c["cross_attention_dim"] * n + linear_parameters(n, n)
    around = 2 * linear_parameters(n, n) if c["use_linear_projection"] else 0
    norms = 4 * 2 * n
    return int(own + cross + _network_parameters(n) + around + norms)


def _motion_parameters(n: int) -> int:
    """A motion module: two attentions, a network, linear layers around them, four norms."""
    attention = 3 * n * n + linear_parameters(n, n)
    return 2 * attention + _network_parameters(n) + 2 * linear_parameters(n, n) + 4 * 2 * n
