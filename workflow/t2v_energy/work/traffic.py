"""What kernels move and how many are launched, of every model file, beside their operations.

Coefficients are in traffic.json, derived by :mod:`t2v_energy.work.traffic_trace`; using them needs no torch.
Mochi's decoder has a closed form instead (:mod:`t2v_energy.work.mochi_traffic`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from t2v_energy.config import ModelFile

TRAFFIC_FILE = "traffic.json"
Count: TypeAlias = "float | NDArray[np.float64]"
"""Of one size, or of each of many."""


class Traffic(NamedTuple):
    """What a call moves and launches.

    Attributes:
        bytes, product_bytes, convolution_bytes: of element-wise kernels and norms, of matrix products and of
            convolutions.
        norm_rows: of norms that are too narrow to be bound by what they move (:data:`NARROW_BYTES`).
        group_norm_values, group_norm_serial: values that group norms read, and the same over the blocks that
            can work on them at once (:data:`BLOCKS`).
        kernels: launched.
    """

    bytes: Count = 0
    product_bytes: Count = 0
    convolution_bytes: Count = 0
    norm_rows: Count = 0
    group_norm_values: Count = 0
    group_norm_serial: Count = 0
    kernels: Count = 0

    def times(self, count: int) -> Traffic:
        """As many calls."""
        return Traffic(*(count * value for value in self))


COUNTS = Traffic._fields
"""What is counted of a call."""


def added(parts: Iterable[Traffic]) -> Traffic:
    """All of them together."""
    return Traffic(*map(sum, zip(*parts, strict=True)))


NARROW_BYTES = 4096
"""A norm gives each row to a block of its own.  Rows that move less than so many bytes take it as long as
those that do: counted is the missing part."""
BLOCKS = 132
"""Multiprocessors of an H100 or H200.  A group norm gives each group of each sample to one block: the 32 of a
single sample leave most of them idle."""
Latent = tuple[int, int, int]


@cache
def _coefficients() -> dict[str, Any]:
    path = Path(__file__).with_name(TRAFFIC_FILE)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def has_traffic(model: str) -> bool:
    """Whether the traffic of this model has been derived."""
    return model in _coefficients()


def denoiser_traffic(model: str, latent: Latent) -> dict[str, float]:
    """:data:`COUNTS` of one denoiser call, all samples of its batch."""
    frames, rows, columns = latent
    return _at(_coefficients()[model]["denoiser"], (1, frames * rows * columns))


def decoder_traffic(model: ModelFile, latent: Latent) -> dict[str, float]:
    """:data:`COUNTS` of decoding one video."""
    frames, rows, columns = latent
    if counts_decoder(model):
        counted = counted_decoder_traffic(model, frames, [rows], [columns])
        return {name: float(count[0]) for name, count in counted.items()}
    pixels = rows * columns
    return _at(_coefficients()[model.key]["decoder"], (1, frames, pixels, pixels * frames))


def counted_decoder_traffic(
    model: ModelFile, frames: int, rows: ArrayLike, columns: ArrayLike
) -> dict[str, NDArray[np.float64]]:
    """:func:`decoder_traffic` of a model of :func:`counts_decoder`, of many latents of a length at once.

    ``rows`` and ``columns`` and each count are of shape (n,).
    """
    from t2v_energy.work.mochi_traffic import decoder_traffic as counted

    vae = model.components["vae"]
    return counted(vae.config, frames, rows, columns, 4 if vae.dtype == "float32" else 2)


def counts_decoder(model: ModelFile) -> bool:
    """Whether decoding is counted kernel by kernel, since no polynomial gives it."""
    return model.components["vae"].class_.endswith(".AutoencoderKLMochi")


def text_kernels(model: str) -> float:
    """Kernels that one pass of each text encoder launches."""
    return float(_coefficients()[model]["text_encoder"]["kernels"])


def _at(coefficients: dict[str, list[float]], basis: tuple[float, ...]) -> dict[str, float]:
    """Sums of terms; sizes far below those that they were derived from may be a little below nought."""
    none = [0.0] * len(basis)
    return {
        name: float(sum(c * x for c, x in zip(coefficients.get(name, none), basis, strict=True)))
        for name in COUNTS
    }
