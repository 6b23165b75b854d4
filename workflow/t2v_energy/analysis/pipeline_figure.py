"""Figure 1: a model's pipeline, drawn from its model file, with the share of measured energy of each part.

The study's figure 1 is a drawing of Wan2.1.  This one has a box for each timed stage whose network has
weights, in the model file's order, and works for every model file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from t2v_energy.analysis import style
from t2v_energy.analysis.models import Models, networks, stage_shares
from t2v_energy.analysis.models_checks import component_parameters
from t2v_energy.analysis.models_figure import CM, STAGE_COLOURS, STAGE_LABELS
from t2v_energy.config import ModelFile

WIDTH_CM, HEIGHT_CM = 16.0, 6.4
_BOX_BOTTOM, _BOX_TOP = 1.95, 4.85
_ARC_CM = 0.35
_END_CM, _GAP_CM = 1.65, 0.44  # room for prompt and video at the ends; between boxes
_CHARACTER_CM = 0.155  # of 7 pt, with a little room
_LINE_CM = 0.345
_OTHER_COLOUR = style.OPERATOR_COLOURS["embeddings"]


@dataclass(frozen=True)
class Part:
    """One box of the figure.

    Attributes:
        stage: key of the model file's ``spans``.
        label: its name for people.
        lines: class, parameters and number type, in words.
        share: part (0 to 1) of the video's GPU energy (or time); None where nothing was measured.
    """

    stage: str
    label: str
    lines: tuple[str, ...]
    share: float | None


def pictured(models: Models) -> str:
    """The model that figure 1 shows: the study's, or the first that was measured, or the study's anyway."""
    reference = models.study.reference
    measured = [key for key in models.keys if key in models.rows]
    return reference if reference in measured or not measured else measured[0]


def parts(file: ModelFile, row: pd.Series | None) -> list[Part]:
    """The boxes of a model, in the order of its stages.

    A part with weights but no span of its own (AnimateDiff's motion layers) is within the denoiser.
    """
    shares, _ = _shares(file, row)
    counts = component_parameters(file) or {}
    stages = networks(file)
    spanned = {name for stage in stages for name in file.stage_parts(stage)}
    within = [name for name, part in file.components.items() if part.dtype and name not in spanned]
    found = []
    for stage in stages:
        names = file.stage_parts(stage)
        if set(names) <= set(file.components):
            lines = _described(file, [*names, *(within if stage == "denoiser" else ())], counts)
        else:  # LTX-Video's refinement calls the denoiser's network under a name of its own
            lines = (short_class(file.components[file.denoiser_part].class_), "the same weights, refining")
        label = STAGE_LABELS.get(stage, stage.replace("_", " ").capitalize()).partition(" again")[0]
        found.append(Part(stage, label, lines, shares.get(stage) if shares else None))
    return found


def _shares(file: ModelFile, row: pd.Series | None) -> tuple[dict[str, float], str]:
    """Shares by stage, of GPU energy or, without a counter, of time; and which."""
    if row is None:
        return {}, ""
    energy = stage_shares(file, row, "energy")
    return (energy, "GPU energy") if energy else (stage_shares(file, row, "time"), "time")


def _described(file: ModelFile, names: Sequence[str], counts: Mapping[str, int]) -> tuple[str, ...]:
    """Class, parameters and, once, number type of the components ``names``; those of one class together."""
    by_class: dict[str, list[str]] = {}
    for name in names:
        by_class.setdefault(short_class(file.components[name].class_), []).append(name)
    lines: list[str] = []
    for cls, members in by_class.items():
        of_them = f"{len(members)} × {cls}" if len(members) > 1 else cls
        parameters = sum(counts[name] for name in members) if counts else None
        lines += [f"+ {of_them}" if lines else of_them, size(parameters)]
    return *lines[:2], file.components[names[0]].dtype or "", *lines[2:]


def short_class(name: str) -> str:
    """A class without its module."""
    return name.rpartition(".")[2]


def size(parameters: int | None) -> str:
    """Parameters in words, three significant digits."""
    if parameters is None:
        return "size not counted"
    for factor, unit in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if parameters >= factor:
            return f"{parameters / factor:.3g} {unit}"
    return str(parameters)


def figure_pipeline(models: Models, key: str) -> Figure:
    """Figure 1 of one model."""
    file, row = models.files[key], models.rows.get(key)
    style.apply()
    figure = Figure(figsize=(WIDTH_CM * CM, HEIGHT_CM * CM))
    edge = 0.005  # of the page; one unit of the axes is a centimetre
    axes = figure.add_axes((edge, edge, 1 - 2 * edge, 1 - 2 * edge))
    axes.set_xlim(edge * WIDTH_CM, (1 - edge) * WIDTH_CM)
    axes.set_ylim(edge * HEIGHT_CM, (1 - edge) * HEIGHT_CM)
    axes.axis("off")
    boxes = parts(file, row)
    width = (WIDTH_CM - 2 * _END_CM - (len(boxes) + 1) * _GAP_CM) / len(boxes)
    middle = (_BOX_BOTTOM + _BOX_TOP) / 2
    left = _END_CM + _GAP_CM
    _text(axes, _END_CM / 2 + 0.1, middle, ["Prompt,", f"{file.longest_prompt} tokens"])
    for part in boxes:
        _arrow(axes, (left - _GAP_CM, middle), (left, middle))
        _box(axes, part, left, width)
        if part.stage == "denoiser":
            _loop(axes, file, row, left, width)
        left += width + _GAP_CM
    _arrow(axes, (left - _GAP_CM, middle), (left, middle))
    d = file.defaults if row is None else row
    _text(axes, WIDTH_CM - _END_CM / 2 - 0.05, middle,
          ["Video,", f"{d.height}×{d.width},", f"{d.num_frames} frames"])  # fmt: skip
    _footer(axes, models, key, boxes)
    return figure


def _box(axes: Axes, part: Part, left: float, width: float) -> None:
    colour = STAGE_COLOURS.get(part.stage, _OTHER_COLOUR)
    axes.add_patch(
        FancyBboxPatch(
            (left, _BOX_BOTTOM), width, _BOX_TOP - _BOX_BOTTOM, boxstyle="round,pad=0,rounding_size=0.12",
            facecolor="white", edgecolor=colour, linewidth=1.4, gid=f"box {part.stage}",
        )
    )  # fmt: skip
    lines = [line for text in (part.label, *part.lines) for line in wrapped(text, width)]
    first = len(wrapped(part.label, width))
    _text(axes, left + width / 2, (_BOX_BOTTOM + _BOX_TOP) / 2, lines, bold=first)
    if part.share is not None:
        bar = 0.22
        bottom = _BOX_BOTTOM - 0.45
        axes.add_patch(Rectangle((left, bottom), width, bar, facecolor="#EEEEEE", linewidth=0))
        axes.add_patch(Rectangle((left, bottom), width * part.share, bar, facecolor=colour, linewidth=0))
        _text(axes, left + width / 2, bottom - 0.25, [f"{100 * part.share:.1f} %"])


def _loop(axes: Axes, file: ModelFile, row: pd.Series | None, left: float, width: float) -> None:
    """The loop of steps, above the denoiser: how often it runs, and which scheduler closes a step."""
    steps = file.defaults.num_inference_steps if row is None else int(row["num_inference_steps"])
    passes = file.passes_per_step * file.batch_per_pass
    inside = 0.25 * width
    bend = 2 * _ARC_CM / (width - 2 * inside)  # of a quadratic curve, which rises to half its control point
    axes.add_patch(
        FancyArrowPatch(
            (left + width - inside, _BOX_TOP), (left + inside, _BOX_TOP), connectionstyle=f"arc3,rad={bend}",
            arrowstyle="-|>", mutation_scale=8, color=style.PRINTED_COLOUR, linewidth=0.9,
        )
    )  # fmt: skip
    guidance = "with guidance" if passes > 1 else "without guidance"
    lines = [f"{steps} steps {guidance}"]
    scheduler = file.components.get("scheduler")
    if scheduler:
        lines.insert(0, short_class(scheduler.class_))
    _text(axes, left + width / 2, _BOX_TOP + _ARC_CM + 0.27 + (len(lines) - 1) / 2 * _LINE_CM, lines)


def _footer(axes: Axes, models: Models, key: str, boxes: Sequence[Part]) -> None:
    """What is pictured, and what the percentages are of."""
    lines = [f"{models.title(key)}, {models.weights} weights; sizes are learnt parameters."]
    _, what = _shares(models.files[key], models.rows.get(key))
    if what:
        rest = 100 * (1 - sum(part.share or 0.0 for part in boxes))
        lines.append(
            f"Bars: share of a video's {what}, measured on {models.accelerator.title}; "
            f"scheduler, host and all else: {rest:.1f} %."
        )
    _text(axes, WIDTH_CM / 2, 0.5, lines)


def wrapped(text: str, width_cm: float) -> list[str]:
    """``text`` in lines no wider than a box, broken at spaces and before capital letters."""
    limit = max(int(width_cm / _CHARACTER_CM), 1)
    lines = [""]
    for piece in re.split(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z0-9])(?=[A-Z][a-z])|(?<= )", text):
        if lines[-1] and len((lines[-1] + piece).rstrip()) > limit:
            lines.append("")
        lines[-1] += piece
    return [line.strip() for line in lines]


def _text(axes: Axes, x: float, y: float, lines: Sequence[str], bold: int = 0) -> None:
    """Centred lines about (x, y), cm; the first ``bold`` of them in bold."""
    top = y + (len(lines) - 1) / 2 * _LINE_CM
    for number, line in enumerate(lines):
        weight = "bold" if number < bold else "normal"
        axes.text(x, top - number * _LINE_CM, line, ha="center", va="center", fontsize=7, fontweight=weight)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=8, color=style.PRINTED_COLOUR, linewidth=0.9,
            shrinkA=1, shrinkB=1,
        )
    )  # fmt: skip
