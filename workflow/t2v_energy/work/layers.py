"""What the closed forms of all architectures share: single layers' operations, parameters, activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from t2v_energy.errors import UserError


@dataclass(frozen=True)
class Convolution:
    """A convolution over ``frames`` × ``pixels`` output positions.

    ``kernel`` is its (time, height, width).  In a causal decoder a kernel of three frames keeps a cache.
    """

    stage: str
    inputs: int
    outputs: int
    kernel: tuple[int, int, int]
    frames: int
    pixels: int

    @property
    def taps(self) -> int:
        """Weights for each pair of input and output channel."""
        return self.kernel[0] * self.kernel[1] * self.kernel[2]

    @property
    def flop(self) -> int:
        """FLOP (eq. 11)."""
        return 2 * self.taps * self.inputs * self.outputs * self.frames * self.pixels

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return self.taps * self.inputs * self.outputs + self.outputs


def residual_block(
    stage: str, inputs: int, outputs: int, kernel: tuple[int, int, int], frames: int, pixels: int
) -> Iterator[Convolution]:
    """Two convolutions of ``kernel``, and a 1×1×1 one on the residual where the channels change."""
    yield Convolution(stage, inputs, outputs, kernel, frames, pixels)
    yield Convolution(stage, outputs, outputs, kernel, frames, pixels)
    if inputs != outputs:
        yield Convolution(stage, inputs, outputs, (1, 1, 1), frames, pixels)


def linear_flop(rows: int, inputs: int, outputs: int) -> int:
    """FLOP of a linear layer on ``rows`` vectors: 2 · rows · inputs · outputs."""
    return 2 * rows * inputs * outputs


def linear_parameters(inputs: int, outputs: int, *, bias: bool = True) -> int:
    """Weights of a linear layer, and its biases."""
    return inputs * outputs + (outputs if bias else 0)


def product_flop(queries: int, keys: int, width: int) -> int:
    """FLOP of QKᵀ and PV, all heads together (``width`` is theirs): 4 · queries · keys · width."""
    return 4 * queries * keys * width


def complete(defaults: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with a class's own defaults filled in: a published configuration may leave them out."""
    return {**defaults, **config}


def refuse_other(config: Mapping[str, Any], where: str, counted: Mapping[str, Any]) -> None:
    """Raises :class:`UserError` where an option of ``config`` is not the only one that is ``counted``."""
    for key, value in counted.items():
        if config[key] != value:
            raise UserError(
                f"{key}: {config[key]!r} is not counted",
                where=where,
                remedy=f"use {key}: {value!r}, or add its closed form to workflow/t2v_energy/work/",
            )


def transformer_activation_bytes(tokens: int, width: int, inner: int, bytes_per_value: int) -> int:
    """Rough peak of live activations in one block of a transformer (bytes).

    The larger of the feed-forward network (stream, normalised stream, inner values before and after the
    activation) and attention (stream, normalised stream, q, k, v, rotated q and k, output), plus two float32
    copies of the stream that the norms make.  An estimate: allocator slack and workspaces are left out.
    """
    values = max(2 * width + 2 * inner, 8 * width)
    return tokens * (values * bytes_per_value + 2 * width * 4)


def convolution_activation_bytes(
    layers: Iterable[Convolution], bytes_per_value: int, tensors: int = 4
) -> int:
    """Rough peak of live activations of a decoder that sees its frames at once (bytes).

    The largest layer's input, its padded copy, its output and the residual kept beside it: four ``tensors``
    of the wider side.  Decoders whose normalisation keeps more of them pass a number of their own, which the
    peaks of the shipped records set.  An estimate: libraries' workspaces are left out.
    """
    return max(tensors * max(x.inputs, x.outputs) * x.frames * x.pixels for x in layers) * bytes_per_value
