"""What Mochi's decoder moves and launches, kernel by kernel, as the trace of its modules has it.

No polynomial in size and length serves here, as it does for other decoders: diffusers' AutoencoderKLMochi
cuts in time what it convolves as soon as that has more than 2³⁰ values, with two frames of overlap and copies
of all parts, and its norms take eight frames at a time.  Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from t2v_energy.work.mochi_vae import settings
from t2v_energy.work.traffic import BLOCKS, Traffic, added

MOST_CONVOLVED_VALUES = 2**30
"""diffusers (CogVideoXSafeConv3d) takes two bytes for each, whatever the number type: 2 GiB."""
KERNEL = 3
"""Taps of a residual block's convolutions, on each side and in time."""
BORDER = KERNEL - 1
"""Rows, columns and frames that padding adds."""
NORM_FRAMES = 8
GROUPS = 32
FLOAT32_BYTES = 4
Count = NDArray[np.float64]
"""A whole number of each size that is counted at once; no int64, which the largest sizes would overflow."""


class Shape(NamedTuple):
    """Channels, frames, rows and columns of a tensor, the latter two of every size."""

    channels: int
    frames: int
    rows: Count
    columns: Count

    @property
    def positions(self) -> Count:
        """Values of a channel."""
        return self.frames * self.rows * self.columns

    @property
    def values(self) -> Count:
        """All of them."""
        return self.channels * self.positions


def decoder_traffic(
    config: Mapping[str, Any], frames: int, rows: ArrayLike, columns: ArrayLike, value_bytes: int
) -> dict[str, NDArray[np.float64]]:
    """Decoding latents of so many frames by a decoder whose numbers have ``value_bytes``.

    A latent of another number type than float32 is cast from it.

    Args:
        config: the decoder's.
        frames: of every latent.
        rows, columns: of each, of shape (n,).
        value_bytes: of each number.

    Returns:
        every count, of shape (n,).
    """
    sides = np.asarray(rows, float), np.asarray(columns, float)
    first = Shape(settings(config)["latent_channels"], frames, *sides)
    moved = added(_parts(config, first, value_bytes))
    return {
        name: np.broadcast_to(np.asarray(n, float), sides[0].shape) for name, n in moved._asdict().items()
    }


def _parts(config: Mapping[str, Any], first: Shape, value_bytes: int) -> Iterator[Traffic]:
    c = settings(config)
    widths = list(reversed(c["decoder_block_out_channels"]))
    blocks, times, sides = (
        list(reversed(c[key])) for key in ("layers_per_block", "temporal_expansions", "spatial_expansions")
    )
    if value_bytes < FLOAT32_BYTES:
        yield Traffic(bytes=(FLOAT32_BYTES + value_bytes) * first.values, kernels=1)
    shape = first._replace(channels=widths[0])
    yield _convolution(first, shape, first.channels * shape.channels, value_bytes)
    yield _residual_block(shape, value_bytes).times(blocks[0])
    for i, (_, outputs) in enumerate(pairwise(widths)):
        yield _residual_block(shape, value_bytes).times(blocks[i + 1])
        yield _linear(shape, outputs * times[i] * sides[i] ** 2, value_bytes)
        _, frames, rows, columns = shape
        shape = Shape(outputs, frames * times[i], rows * sides[i], columns * sides[i])
        yield _copies(shape.values, value_bytes)  # from channels to frames, rows and columns
    yield _residual_block(shape, value_bytes).times(blocks[-1])
    yield _copies(shape.values, value_bytes)  # the activation
    yield _linear(shape, c["out_channels"], value_bytes)


def _residual_block(shape: Shape, value_bytes: int) -> Traffic:
    """Twice a norm, an activation, padding and a convolution; then the sum."""
    values, frame = shape.values, shape.channels * (shape.rows + BORDER) * (shape.columns + BORDER)
    frames = shape.frames + BORDER
    norm, cut = _norm(shape), _cut(frames, frame)
    weights = shape.channels * (KERNEL**3 * shape.channels + 1)
    moved = norm.bytes + 2 * values + values + frames * frame
    convolved = frames * frame + cut.repeated * frame + cut.parts * weights + values
    # Of several parts all but the first are joined with what they repeat, and all results.
    several = cut.parts > 1
    moved += several * (2 * (frames - cut.first + cut.repeated) * frame + 2 * values)
    return Traffic(
        bytes=value_bytes * (2 * moved + 3 * values),
        convolution_bytes=value_bytes * 2 * convolved,
        group_norm_values=2 * norm.group_norm_values,
        group_norm_serial=2 * norm.group_norm_serial,
        kernels=2 * (norm.kernels + 2 + np.where(several, 2 * cut.parts, 1)) + 1,
    )


def _norm(shape: Shape) -> Traffic:
    """Group norm of frames by themselves, a few at a time; bytes for each byte of a value.

    Each lot is made contiguous, and all are joined. Also read are scale and shift, and written each group's
    mean and deviation.
    """
    values, (whole, rest) = shape.values, divmod(shape.frames, NORM_FRAMES)
    lots = whole + (rest > 0)
    copies = 1 if shape.frames == 1 else 2  # a single frame is contiguous as it is
    serial = whole * NORM_FRAMES / min(GROUPS * NORM_FRAMES, BLOCKS)
    if rest:
        serial += rest / min(GROUPS * rest, BLOCKS)
    return Traffic(
        bytes=2 * values * (copies + 1) + 2 * shape.channels * lots + 2 * GROUPS * shape.frames,
        group_norm_values=values,
        group_norm_serial=serial * values / shape.frames,
        kernels=lots * copies + 1,
    )


class _Cut(NamedTuple):
    """How an input is cut in time: into parts, the first of so many frames, and frames that come again."""

    parts: Count
    first: Count
    repeated: Count


def _cut(frames: int, frame: Count) -> _Cut:
    """Of so many frames, each of ``frame`` values."""
    values = frames * frame
    least = np.where(values > MOST_CONVOLVED_VALUES, values // MOST_CONVOLVED_VALUES + 1, 1)
    first = -(-frames // least)
    parts = -(-frames // first)
    return _Cut(parts, first, (parts - 1) * np.minimum(BORDER, first))


def _convolution(inputs: Shape, output: Shape, weights: int, value_bytes: int) -> Traffic:
    values = inputs.values + weights + output.channels + output.values
    return Traffic(convolution_bytes=value_bytes * values, kernels=1)


def _linear(shape: Shape, outputs: int, value_bytes: int) -> Traffic:
    """A product with the channels, and the biases in a kernel of their own."""
    made = shape.positions * outputs
    return Traffic(
        bytes=value_bytes * (2 * made + outputs),
        product_bytes=value_bytes * (shape.values + shape.channels * outputs + made),
        kernels=2,
    )


def _copies(values: Count, value_bytes: int) -> Traffic:
    """A kernel that reads and writes as many values."""
    return Traffic(bytes=2 * value_bytes * values, kernels=1)
