"""The work of a configuration by class of operator, as the cost model prices it.  Needs no torch."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from t2v_energy.config import load_model
from t2v_energy.errors import UserError
from t2v_energy.work import animatediff, true_work
from t2v_energy.work.architectures import decoder, encoder_passes, latent_shape, latents, refine_calls
from t2v_energy.work.denoisers import Mochi, Transformer, denoiser, padded_tokens
from t2v_energy.work.traffic import (
    COUNTS,
    counted_decoder_traffic,
    counts_decoder,
    decoder_traffic,
    denoiser_traffic,
    has_traffic,
    text_kernels,
)
from t2v_energy.work.wan import elementwise_bytes
from t2v_energy.work.wan_vae import executed_frames

if TYPE_CHECKING:
    from t2v_energy.config import ModelFile

Floats = NDArray[np.float64]
ALIGNMENT = 128
"""Tokens that attention works on at once: lengths that divide by it need no edge."""
WIDE_HEAD = 128
COLOURS = 3
SIZES = ("height", "width", "num_frames", "num_inference_steps")
MOST = 1_000_000
"""No video has more pixels in a row, frames or steps: what is beyond is a slip."""


class Point(NamedTuple):
    """What is predicted: a model and its settings; ``board`` names one GPU, where that is known."""

    model: str
    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    board: str = ""


@dataclass(frozen=True)
class Features:
    """Work of n configurations; arrays of shape (n,).

    Attributes:
        attention_flop, attention_narrow_flop: QKᵀ and PV of the denoiser, heads of 128 and more, and below; a
            U-Net's as its kernels execute them, filled up to whole tiles.
        tokens: length that attention sees.
        aligned: 1 where that length divides by 128, else 0.
        dense_flop: all other matrix products of denoiser and upsampler.
        product_bytes: what these move (bytes).
        convolution_flop, convolution_bytes: convolutions of a U-Net.
        traffic_bytes: element-wise kernels and norms of the denoiser (bytes read and written).
        norm_rows, group_norm_values, group_norm_serial: norms that take longer than their bytes; see
            :data:`t2v_energy.work.traffic.COUNTS`.
        kernels: launched by the denoiser.
        text_flop, text_kernels: matrix products of the text encoders, and kernels.
        vae_float32_flop, vae_half_flop: the VAE's decoder, by its number type.
        vae_convolution_bytes, vae_traffic_bytes, vae_group_norm_values, vae_group_norm_serial,
            vae_kernels: of the decoder, as above.
        output_values: values of a video of ``num_frames``. Where CogVideoX makes three frames more
            (:func:`t2v_energy.work.architectures.made_frames`), theirs are not in it: of 45 frames that makes
            the host's part 6 % too small, 0.03 % of the latency, and predictions that were written down
            before measuring are of this count.
        calls: calls of the denoiser.
        height, width, num_frames, num_inference_steps: as run; frames rounded to whole latent ones.
    """

    attention_flop: Floats
    attention_narrow_flop: Floats
    tokens: Floats
    aligned: Floats
    dense_flop: Floats
    product_bytes: Floats
    convolution_flop: Floats
    convolution_bytes: Floats
    traffic_bytes: Floats
    norm_rows: Floats
    group_norm_values: Floats
    group_norm_serial: Floats
    kernels: Floats
    text_flop: Floats
    text_kernels: Floats
    vae_float32_flop: Floats
    vae_half_flop: Floats
    vae_convolution_bytes: Floats
    vae_traffic_bytes: Floats
    vae_group_norm_values: Floats
    vae_group_norm_serial: Floats
    vae_kernels: Floats
    output_values: Floats
    calls: Floats
    height: Floats
    width: Floats
    num_frames: Floats
    num_inference_steps: Floats

    def __len__(self) -> int:
        return len(self.tokens)

    def picked(self, which: NDArray[np.intp] | NDArray[np.bool_]) -> Features:
        """Those configurations alone."""
        return Features(**{f.name: getattr(self, f.name)[which] for f in fields(self)})


def features(root: Path, points: Sequence[Point], places: Sequence[str] = ()) -> Features:
    """Work of every point.

    Args:
        root: the repository's root.
        points: what is counted.
        places: where each point stands, such as a file and a line, for messages.

    Raises:
        UserError: an unknown model (with the nearest names), or a size that it cannot run.
    """
    counters: dict[str, _Counter] = {}
    known: dict[tuple[str, int, int, int], tuple[Floats, Floats]] = {}
    rows = np.empty((len(points), len(_FIELDS)))
    for index, point in enumerate(points):
        try:
            rows[index] = _counted(root, point, counters, known)
        except UserError as error:
            if not places:
                raise
            raise UserError(error.what, where=places[index], remedy=error.remedy) from None
    for key, counter in counters.items():
        counter.fill(rows, np.array([i for i, point in enumerate(points) if point.model == key]))
    # Coefficients of traffic are of usual sizes: at the smallest they may be a little below nought.
    return Features(*np.maximum(rows.T, 0))


def _counted(
    root: Path,
    point: Point,
    counters: dict[str, _Counter],
    known: dict[tuple[str, int, int, int], tuple[Floats, Floats]],
) -> Floats:
    """Work of one point, in the order of :class:`Features`; fills ``counters`` and ``known``."""
    if point.model not in counters:
        counters[point.model] = _Counter(load_model(root, nearest_model(root, point.model)))
    size, steps = point[:4], point.num_inference_steps
    if size not in known:
        known[size] = counters[point.model].once_and_step(point)
    if not 1 <= steps <= MOST:
        raise UserError(
            f"num_inference_steps: {steps} is not from 1 to {MOST}",
            where=f"model {point.model}",
            remedy="give a whole number of denoising steps",
        )
    once, step = known[size]
    return once + steps * step


def executed(model: ModelFile, num_frames: int) -> int:
    """Frames that are counted when ``num_frames`` are asked for: those of whole latent frames.

    CogVideoX may make more of them (:func:`t2v_energy.work.architectures.made_frames`).
    """
    if model.architecture == "wan":
        return executed_frames(model.components["vae"].config, num_frames)
    step, offset = model.limits.frames_multiple, model.limits.frames_offset
    return max((num_frames - offset) // step * step + offset, max(offset, 1))


def nearest_model(root: Path, key: str) -> str:
    """``key``, if there is such a model file.

    Raises:
        UserError: there is none; the nearest names are suggested.
    """
    known = sorted(path.stem for path in (root / "config" / "models").glob("*.yaml"))
    if key in known:
        return key
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.3)
    raise UserError(
        f"unknown model {key!r}",
        where=str(root / "config" / "models"),
        remedy=(f"did you mean {' or '.join(map(repr, near))}? " if near else "")
        + f"known: {', '.join(known)}",
    )


STAGED = "ltx"
"""Architecture that denoises a smaller size first, which is rounded, and doubles its sides."""
U_NET = "animatediff"
"""Architecture whose denoiser halves sides and rounds, and whose kernels fill up tiles: no polynomial."""
U_NET_FIELDS = ("dense_flop", "convolution_flop", "attention_flop", "attention_narrow_flop")
"""What it makes of :class:`Features`; everything else of :data:`U_NET` is a polynomial."""
DECODED = {
    "vae_convolution_bytes": "convolution_bytes",
    "vae_traffic_bytes": "bytes",
    "vae_group_norm_values": "group_norm_values",
    "vae_group_norm_serial": "group_norm_serial",
    "vae_kernels": "kernels",
}
"""Fields of :class:`Features` that the decoder's traffic makes, and its counts.  Where they are counted
kernel by kernel (:func:`t2v_energy.work.traffic.counts_decoder`) they are no polynomial either."""
POLYNOMIAL = ("wan", "cogvideox", "mochi", "contentv", STAGED, U_NET)
"""Architectures whose work, at a given length, is an exact polynomial of second degree in a frame's area (of
:data:`STAGED`, that of its first latent): tokens are linear in it, attention is of second degree.  Of
:data:`U_NET` that is so but for :data:`U_NET_FIELDS`, which are sums over its levels, also exact, and of some
but for :data:`DECODED`."""


class _Counter:
    """Counts configurations of one model, each length of :data:`POLYNOMIAL` from three sizes alone."""

    def __init__(self, model: ModelFile) -> None:
        self._model = model
        self._differences: dict[int, tuple[Floats, Floats, Floats]] = {}

    def once_and_step(self, point: Point) -> tuple[Floats, Floats]:
        """What comes once a video and what each step adds, in the order of :class:`Features`."""
        frames = _checked(self._model, point)
        if self._model.architecture not in POLYNOMIAL:
            return self._counted((point.height, point.width, frames))
        if frames not in self._differences:
            self._differences[frames] = self._derived(frames)
        x = _area(self._model, (point.height, point.width, frames))
        (first, second, _), *differences = self._differences[frames]
        basis = np.array([1.0, x - first, (x - first) * (x - second)])
        once, step = (basis @ of_each for of_each in differences)
        once[_FIELDS.index("height")], once[_FIELDS.index("width")] = point.height, point.width
        once[_FIELDS.index("aligned")] = once[_FIELDS.index("tokens")] % ALIGNMENT == 0
        return once, step

    def fill(self, rows: Floats, which: NDArray[np.intp]) -> None:
        """Fill what is no polynomial into those rows of features: of each length, all sizes at once."""
        u_net, counted = self._model.architecture == U_NET, counts_decoder(self._model)
        if not (u_net or counted):
            return
        height, width, frames, steps = (rows[which, _FIELDS.index(name)] for name in SIZES)
        factor = decoder(self._model).spatial_factor(self._model.components["vae"].config)
        for length in np.unique(frames):
            same = frames == length
            of_length = which[same]
            latent_frames, _, _ = latent_shape(
                self._model, *map(int, (height[same][0], width[same][0], length))
            )
            sides = height[same] // factor, width[same] // factor
            if u_net:
                step = self._u_net_step(latent_frames, *sides)
                rows[np.ix_(of_length, _U_NET_INDICES)] = steps[same][:, np.newaxis] * step
            if counted:
                decoded = counted_decoder_traffic(self._model, latent_frames, *sides)
                rows[np.ix_(of_length, _DECODED_INDICES)] = np.transpose(
                    [decoded[n] for n in DECODED.values()]
                )

    def _u_net_step(self, frames: int, rows: Floats, columns: Floats) -> Floats:
        """:data:`U_NET_FIELDS` of all calls of one step, of each latent size; shape (n, fields)."""
        model = self._model
        config = model.components[denoiser(model).part].config
        level = animatediff.by_level(config, frames, model.tokenizer.max_length)
        samples = model.passes_per_step * model.batch_per_pass
        dense, convolved, attention = (samples * flop for flop in level.at(rows, columns))
        wide = _head_size(model) >= WIDE_HEAD
        return np.column_stack([dense, convolved, attention * wide, attention * (not wide)])

    def _derived(self, frames: int) -> tuple[Floats, Floats, Floats]:
        """Three areas, and Newton's divided differences over them of what comes once and of a step."""
        sizes = _three_sizes(self._model, frames)
        counted = [self._counted(size) for size in sizes]
        once, step = (np.array([pair[which] for pair in counted]) for which in (0, 1))
        if self._model.architecture == U_NET:
            once[:, _U_NET_INDICES] = step[:, _U_NET_INDICES] = 0
        if counts_decoder(self._model):
            once[:, _DECODED_INDICES] = 0
        areas = np.array([_area(self._model, size) for size in sizes])
        return areas, _differences(areas, once), _differences(areas, step)

    def _counted(self, size: tuple[int, int, int]) -> tuple[Floats, Floats]:
        model = self._model
        first = _row(model, size, 1)
        in_loop = "latent_upsampler" not in model.components
        step = _linear(first) if in_loop else _row(model, size, 2) - first
        return first - step, step


def _area(model: ModelFile, size: tuple[int, int, int]) -> float:
    """Area of a frame, in that of the smallest; of :data:`STAGED` that of the latent it denoises first."""
    if model.architecture == STAGED:
        _, rows, columns = latents(model, *size)[0]
        return rows * columns
    return size[0] * size[1] / model.limits.size_multiple**2


def _three_sizes(model: ModelFile, frames: int) -> list[tuple[int, int, int]]:
    """Sizes of one, two and three times the smallest area, in pixels and frames.

    A U-Net's smallest area is a single latent pixel: from there to usual sizes rounding would grow.  So its
    three lie among them.
    """
    side = model.limits.size_multiple
    if model.architecture == U_NET:
        return [(side * factor, side * factor, frames) for factor in (1, 8, 64)]
    sizes: list[tuple[int, int, int]] = []
    height = width = side
    while len(sizes) < 3:
        try:
            area = _area(model, (height, width, frames))
        except UserError:  # its first stage would be less than a latent pixel
            height = width = width + side
            continue
        if area == len(sizes) + 1:
            sizes.append((height, width, frames))
        width += side
    return sizes


def _differences(areas: Floats, values: Floats) -> Floats:
    """Newton's divided differences of three rows of values at three areas; shape (3, features)."""
    slopes = np.diff(values, axis=0) / np.diff(areas)[:, np.newaxis]
    return np.array([values[0], slopes[0], (slopes[1] - slopes[0]) / (areas[2] - areas[0])])


_SCALED = (
    "attention_flop",
    "attention_narrow_flop",
    "dense_flop",
    "product_bytes",
    "convolution_flop",
    "convolution_bytes",
    "traffic_bytes",
    "norm_rows",
    "group_norm_values",
    "group_norm_serial",
    "kernels",
    "calls",
)
"""Fields that grow with the steps, where all of the denoiser's work is in the loop."""
_FIELDS = [f.name for f in fields(Features)]
_STEPS_INDEX = _FIELDS.index("num_inference_steps")
_U_NET_INDICES = [_FIELDS.index(name) for name in U_NET_FIELDS]
_DECODED_INDICES = [_FIELDS.index(name) for name in DECODED]


def _linear(first: Floats) -> Floats:
    """What one more step adds, where all of the denoiser's work is in the loop."""
    step = np.where([name in _SCALED for name in _FIELDS], first, 0.0)
    step[_STEPS_INDEX] = 1
    return step


def _row(model: ModelFile, size: tuple[int, int, int], steps: int) -> Floats:
    work = true_work(model, *size, steps)
    once = work.flop["vae"] + work.flop["text_encoder"]
    wide = _head_size(model) >= WIDE_HEAD
    half = model.components["vae"].dtype != "float32"
    tokens = work.tokens + _joint_tokens(model)
    convolved, attention = _u_net(model, size)
    attention_flop = work.denoiser_calls * attention if attention else work.attention_flop
    convolution_flop = work.denoiser_calls * convolved
    moved, decoded = _moved(model, size, tokens, work.denoiser_calls), _decoded(model, size)
    values = {
        "attention_flop": attention_flop * wide,
        "attention_narrow_flop": attention_flop * (not wide),
        "tokens": tokens,
        "aligned": tokens % ALIGNMENT == 0,
        "dense_flop": work.total_flop - once - work.attention_flop - convolution_flop,
        "product_bytes": moved["product_bytes"],
        "convolution_flop": convolution_flop,
        "convolution_bytes": moved["convolution_bytes"],
        "traffic_bytes": moved["bytes"],
        "norm_rows": moved["norm_rows"],
        "group_norm_values": moved["group_norm_values"],
        "group_norm_serial": moved["group_norm_serial"],
        "kernels": moved["kernels"],
        "text_flop": work.flop["text_encoder"],
        "text_kernels": encoder_passes(model) * text_kernels(model.key) if has_traffic(model.key) else 0.0,
        "vae_float32_flop": work.flop["vae"] * (not half),
        "vae_half_flop": work.flop["vae"] * half,
        **{name: decoded[count] for name, count in DECODED.items()},
        "output_values": _output_values(model, size),
        "calls": work.denoiser_calls + _refine_calls(model),
        **dict(zip(SIZES, (*size, steps), strict=True)),
    }
    return np.array([float(values[name]) for name in _FIELDS])


def _checked(model: ModelFile, point: Point) -> int:
    """Frames as the pipeline makes them; raises where the model cannot run the size."""
    where = f"model {model.key}"
    for name in ("height", "width", "num_frames"):
        value = getattr(point, name)
        if value < 1:
            raise UserError(
                f"{name}: {value} must be positive", where=where, remedy=f"give a positive {name}"
            )
        if value > MOST:
            what = "frames" if name == "num_frames" else "pixels"
            raise UserError(
                f"{name}: {value} is more than {MOST} {what}", where=where, remedy="look for a slip"
            )
    multiple = model.limits.size_multiple
    for name in ("height", "width"):
        value = getattr(point, name)
        if value % multiple:
            nearest = max(multiple, round(value / multiple) * multiple)
            raise UserError(
                f"{name}: {value} is not divisible by {multiple}, which {model.key} needs",
                where=where,
                remedy=f"the nearest is {nearest}",
            )
    frames, most = executed(model, point.num_frames), model.limits.max_frames
    if most and frames > most:
        raise UserError(
            f"num_frames: {point.num_frames} are more than {model.key} can make",
            where=where,
            remedy=f"use {most} or fewer",
        )
    return frames


def _head_size(model: ModelFile) -> int:
    config = model.components[denoiser(model).part].config
    if model.architecture == U_NET:  # its attention_head_dim is the number of heads
        return int(config["block_out_channels"][0] // config["attention_head_dim"])
    return int(config["attention_head_dim"])


def _joint_tokens(model: ModelFile) -> int:
    """Text tokens that self-attention sees beside the video's."""
    part = denoiser(model)
    if isinstance(part, Mochi):
        return model.tokenizer.max_length
    if not (isinstance(part, Transformer) and part.joint):
        return 0
    return sum(padded_tokens(model, name) for name in part.tokenizers)


def _u_net(model: ModelFile, size: tuple[int, int, int]) -> tuple[float, float]:
    """FLOP of a U-Net's convolutions and of its attention as executed, one call; none of a transformer's."""
    if model.architecture != U_NET:
        return 0.0, 0.0
    config, latent = model.components["unet"].config, latents(model, *size)[0]
    convolved = sum(x.flop for x in animatediff.convolutions(config, *latent))
    attention = animatediff.executed_attention_flop(config, *latent, model.tokenizer.max_length)
    return float(model.batch_per_pass * convolved), float(model.batch_per_pass * attention)


def _refine_calls(model: ModelFile) -> int:
    """Calls of LTX-Video's refinement; none of other models."""
    return refine_calls(model) if "latent_upsampler" in model.components else 0


def _output_values(model: ModelFile, size: tuple[int, int, int]) -> float:
    """Values of the decoded video, which in LTX-Video has another size than was asked for."""
    _, (_, rows, columns) = latents(model, *size)
    factor = decoder(model).spatial_factor(model.components["vae"].config)
    return float(size[2] * rows * columns * factor**2 * COLOURS)


def _moved(model: ModelFile, size: tuple[int, int, int], tokens: int, calls: int) -> dict[str, float]:
    """:data:`COUNTS` of all denoiser calls of the loop and, in LTX-Video, of its refinement.

    From traces of the model's own modules (:mod:`t2v_energy.work.traffic`).  A model without them is taken to
    move as many bytes for each value of its stream as Wan's does, a rough presumption; a U-Net has none.
    """
    if has_traffic(model.key):
        first, last = latents(model, *size)
        loop, refined = (denoiser_traffic(model.key, latent) for latent in (first, last))
        return {name: calls * loop[name] + _refine_calls(model) * refined[name] for name in COUNTS}
    found = dict.fromkeys(COUNTS, 0.0)
    config = model.components[denoiser(model).part].config
    if model.architecture != U_NET:
        names = ("num_layers", "num_attention_heads", "attention_head_dim")
        stream = {name: config[name] for name in names}
        width = stream["num_attention_heads"] * stream["attention_head_dim"]
        stream["ffn_dim"] = config.get("ffn_dim", 4 * width)
        found["bytes"] = calls * model.batch_per_pass * elementwise_bytes(stream, tokens)
    return found


def _decoded(model: ModelFile, size: tuple[int, int, int]) -> dict[str, float]:
    """:data:`COUNTS` of decoding; nought for a model without traces or a count."""
    if not (has_traffic(model.key) or counts_decoder(model)):
        return dict.fromkeys(COUNTS, 0.0)
    return decoder_traffic(model, latents(model, *size)[1])
