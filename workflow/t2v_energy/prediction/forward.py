"""The cost model's forward half: from work and parameters to seconds and watts, with derivatives.

Time of a video, with shares of the accelerator's published peak Θ (FLOP/s) and bandwidth B (B/s)::

    t = max(device work of the denoiser, launches · τ) + max(that of the decoder, launches · τ)
        + max(that of the text encoders, launches · τ) + values · host + calls · call + video

    device work = pace · own · (A / (s_A Θ) · (1 + slope · ln(L / L₀)) · (1 − gain · [128 divides L])
                                + D / (s_D Θ) + e · P / (s_M B) + C / (s_C Θ) + c · Q / (s_M B)
                                + M / (s_M B) + rows · ρ + G · γ)

A: FLOP of QKᵀ and PV at length L (heads below 128 have a share of their own), D: all other matrix products,
of whose bytes P a part e is not hidden behind arithmetic; C: FLOP of convolutions (shares by number type),
whose layout is changed before and after them (c times their bytes Q); M: bytes of element-wise kernels; rows
of norms that are too narrow to be bound by bytes; G: values of group norms for each block that works on them
at once; ``own``: paces of single boards and models against the others, where points name several. Launches
are asynchronous, so that the longer of host and device counts; the maximum is smooth (:data:`SHARPNESS`)
because either may be ahead within a call. Mean power is the mean of the parts' own, weighted with their
times; energy is its product with time. The power cap is in the parts' powers, which it holds at the board's
limit, and in their rates, those of the clocks that it allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from t2v_energy.config import Accelerator
from t2v_energy.prediction.features import Features, Floats
from t2v_energy.work.traffic import BLOCKS

REFERENCE_TOKENS = 32768.0
LEAST_S = 1e-30  # no division by nought where there is no work
CLASSES = ("attention", "dense", "text", "traffic", "vae", "host", "call", "video")
"""Parts of a video's time; the last three are not on the device.  ``dense``: matrix products and a U-Net's
convolutions, ``traffic``: element-wise kernels and norms, ``call``: what calls of the denoiser take beyond
the device's work."""
PARTS: Mapping[str, tuple[str, str]] = {
    "attention": ("attention", "attention"),
    "products": ("dense", "dense"),
    "convolution": ("dense", "convolution"),
    "traffic": ("traffic", "traffic"),
    "norm": ("traffic", "traffic"),
    "group_norm": ("traffic", "traffic"),
    "group_norm_wait": ("traffic", "launch"),
    "vae_convolution": ("vae", "convolution"),
    "vae_traffic": ("vae", "traffic"),
    "vae_group_norm": ("vae", "traffic"),
    "vae_group_norm_wait": ("vae", "launch"),
    "vae_launch": ("vae", "launch"),
    "text": ("text", "dense"),
    "text_launch": ("text", "launch"),
    "launch": ("call", "launch"),
    "call": ("call", "launch"),
    "host": ("host", "wait"),
    "video": ("video", "wait"),
}
"""What is reckoned apart: its class, and whose power it draws.  A group norm of few groups lets most of the
device wait (``_wait``); ``_launch`` is what launching takes beyond the device's work."""
DENOISER_PARTS = (
    "attention",
    "products",
    "convolution",
    "traffic",
    "norm",
    "group_norm",
    "group_norm_wait",
)
DECODER_PARTS = ("vae_convolution", "vae_traffic", "vae_group_norm", "vae_group_norm_wait")
TEXT_PARTS = ("text",)
OPERATOR_PARTS = ("attention", "products", "traffic", "vae_convolution")
"""Parts that single operators are."""
SHARPNESS = 4.0
"""Exponent n of the smooth maximum (xⁿ + yⁿ)^(1/n)."""

TIME_NAMES = (
    "pace",
    "attention",
    "attention_narrow",
    "attention_gain",
    "attention_slope",
    "dense",
    "exposed",
    "traffic",
    "norm_row",
    "group_norm",
    "convolution_float32",
    "convolution_half",
    "layout",
    "launch",
    "host",
    "call",
    "video",
)
LINEAR = ("attention_gain", "attention_slope")
"""Parameters that are no logarithms: both may be nought or below."""
POWER_NAMES = ("level", "attention", "dense", "convolution", "traffic", "launch", "wait")


@dataclass(frozen=True)
class Times:
    """Seconds of each of :data:`PARTS`, shape (n, parts), their derivatives by the parameters, (n, parts, p),
    and those of the logarithm of their sum, (n, p)."""

    part_s: Floats
    by_part: Floats
    derivatives: Floats

    def of(self, parts: Sequence[str]) -> Times:
        """Those of some parts alone."""
        which = [list(PARTS).index(name) for name in parts]
        part_s = self.part_s[:, which]
        by_part = self.by_part[:, which]
        return Times(part_s, by_part, by_part.sum(axis=1) / part_s.sum(axis=1)[:, None])

    @property
    def class_s(self) -> Floats:
        """Seconds of each of :data:`CLASSES`, shape (n, 8)."""
        return by_class(self.part_s)


def by_class(parts: Floats) -> Floats:
    of = np.array([[cls == own for cls in CLASSES] for own, _ in PARTS.values()], dtype=np.float64)
    summed: Floats = parts @ of
    return summed


class _Parts:
    """Adds up parts of a video's time with their derivatives."""

    def __init__(self, theta: Floats, effects: Floats, count: int) -> None:
        self.value = dict(zip(TIME_NAMES, theta, strict=False))
        self.effects = effects
        self.pace = np.exp(self.value["pace"] + effects @ theta[len(TIME_NAMES) :])
        self.seconds = {name: np.zeros(count) for name in PARTS}
        self.by = {name: np.zeros((count, len(theta))) for name in PARTS}

    def add(self, part: str, seconds: Floats, powers: Mapping[str, int], *, paced: bool) -> None:
        """Add ``seconds``, which go with the parameters' exponentials to the power of ``powers``."""
        if paced:
            seconds = seconds * self.pace
            self.by[part][:, 0] += seconds
            self.by[part][:, len(TIME_NAMES) :] += seconds[:, None] * self.effects
        self.seconds[part] += seconds
        for name, power in powers.items():
            self.by[part][:, TIME_NAMES.index(name)] += power * seconds

    def at_rate(self, part: str, amount: Floats, name: str, limit: float) -> None:
        """``amount`` at a share ``name`` of ``limit`` a second."""
        self.add(part, amount / (np.exp(self.value[name]) * limit), {name: -1}, paced=True)

    def exposed(self, part: str, moved: Floats, name: str, bandwidth: float) -> None:
        """A part (or multiple) ``name`` of bytes ``moved``, at the rate of element-wise kernels."""
        seconds = np.exp(self.value[name] - self.value["traffic"]) * moved / bandwidth
        self.add(part, seconds, {name: 1, "traffic": -1}, paced=True)

    def each(self, part: str, count: Floats, name: str, *, paced: bool = False) -> None:
        """``count`` times the seconds ``name``."""
        self.add(part, np.exp(self.value[name]) * count, {name: 1}, paced=paced)

    def group_norm(self, part: str, values: Floats, serial: Floats) -> None:
        """Its time is that of its longest block; what the other blocks wait is told apart."""
        busy = values / BLOCKS
        self.each(part, busy, "group_norm", paced=True)
        self.each(f"{part}_wait", serial - busy, "group_norm", paced=True)

    def launched(self, part: str, kernels: Floats, device: Sequence[str]) -> None:
        """What launching ``kernels`` takes beyond the time of the parts ``device``."""
        host = np.exp(self.value["launch"]) * kernels
        work = np.sum([self.seconds[name] for name in device], axis=0)
        by_work = np.sum([self.by[name] for name in device], axis=0)
        longer = np.maximum(np.maximum(host, work), LEAST_S)
        both = longer * ((host / longer) ** SHARPNESS + (work / longer) ** SHARPNESS) ** (1 / SHARPNESS)
        of_host, of_work = ((x / np.maximum(both, LEAST_S)) ** (SHARPNESS - 1) for x in (host, work))
        self.seconds[part] += both - work
        self.by[part] += (of_work - 1)[:, None] * by_work
        self.by[part][:, TIME_NAMES.index("launch")] += of_host * host

    def times(self) -> Times:
        """All parts together."""
        part_s = np.column_stack([self.seconds[name] for name in PARTS])
        by_part = np.stack([self.by[name] for name in PARTS], axis=1)
        return Times(part_s, by_part, by_part.sum(axis=1) / part_s.sum(axis=1)[:, None])


def times(theta: Floats, effects: Floats, work: Features, accelerator: Accelerator) -> Times:
    """Times of ``work``.

    ``effects``, shape (n, m), says which of the last m parameters (paces of boards, models) each point has.
    """
    peak = accelerator.peak_bf16_dense_TFLOPs * 1e12
    bandwidth = accelerator.bandwidth_TB_per_s * 1e12
    parts = _Parts(theta, effects, len(work))
    _attention(parts, work, peak)
    parts.at_rate("products", work.dense_flop, "dense", peak)
    parts.exposed("products", work.product_bytes, "exposed", bandwidth)
    parts.at_rate("convolution", work.convolution_flop, "convolution_half", peak)
    parts.exposed("convolution", work.convolution_bytes, "layout", bandwidth)
    parts.at_rate("traffic", work.traffic_bytes, "traffic", bandwidth)
    parts.each("norm", work.norm_rows, "norm_row", paced=True)
    parts.group_norm("group_norm", work.group_norm_values, work.group_norm_serial)
    parts.at_rate("vae_convolution", work.vae_float32_flop, "convolution_float32", peak)
    parts.at_rate("vae_convolution", work.vae_half_flop, "convolution_half", peak)
    parts.exposed("vae_convolution", work.vae_convolution_bytes, "layout", bandwidth)
    parts.at_rate("vae_traffic", work.vae_traffic_bytes, "traffic", bandwidth)
    parts.group_norm("vae_group_norm", work.vae_group_norm_values, work.vae_group_norm_serial)
    parts.at_rate("text", work.text_flop, "dense", peak)
    parts.launched("launch", work.kernels, DENOISER_PARTS)
    parts.launched("vae_launch", work.vae_kernels, DECODER_PARTS)
    parts.launched("text_launch", work.text_kernels, TEXT_PARTS)
    parts.each("call", work.calls, "call")
    parts.each("host", work.output_values, "host")
    parts.each("video", np.ones(len(work)), "video")
    return parts.times()


def _attention(parts: _Parts, work: Features, peak: float) -> None:
    """QKᵀ and PV: by head size, changing with length, less where the length needs no edge."""
    e_folds = np.log(np.maximum(work.tokens, 1) / REFERENCE_TOKENS)
    slope = np.maximum(1 + parts.value["attention_slope"] * e_folds, 0.1)
    edge = 1 - min(float(parts.value["attention_gain"]), 0.9) * work.aligned
    parts.at_rate("attention", work.attention_flop * slope * edge, "attention", peak)
    parts.at_rate("attention", work.attention_narrow_flop * slope * edge, "attention_narrow", peak)
    seconds, by = parts.seconds["attention"], parts.by["attention"]
    by[:, TIME_NAMES.index("attention_gain")] = -seconds * work.aligned / edge
    by[:, TIME_NAMES.index("attention_slope")] = seconds * e_folds / slope


def powers(theta: Floats, part_s: Floats, accelerator: Accelerator) -> tuple[Floats, Floats]:
    """Watts of each part, shape (n, parts), and derivatives of ln(mean power), shape (n, p)."""
    value = dict(zip(POWER_NAMES, theta, strict=True))
    drawn = [power for _, power in PARTS.values()]
    watts = accelerator.board_power_W * np.exp(value["level"] + np.array([value[name] for name in drawn]))
    energy = part_s * watts
    share = energy / energy.sum(axis=1, keepdims=True)
    columns = [np.ones(len(part_s))]
    for name in POWER_NAMES[1:]:
        columns.append(share[:, [power == name for power in drawn]].sum(axis=1))
    return np.broadcast_to(watts, part_s.shape), np.column_stack(columns)
