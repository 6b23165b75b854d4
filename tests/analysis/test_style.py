"""Figures look alike and are the same bytes on a rebuild."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from t2v_energy.analysis import style
from t2v_energy.work import OPERATORS


def draw(stem: Path) -> list[Path]:
    style.apply()
    figure, axes = plt.subplots(figsize=(3, 2))
    axes.stackplot([0, 1, 2], [[1, 2, 3], [1, 1, 1]], colors=list(style.OPERATOR_COLOURS.values()))
    axes.fill_between([0, 1], [0, 1], hatch="//")  # svg names hatches and clips by a hash
    axes.set_xlabel("µ (%)")
    written = style.save(figure, stem)
    plt.close(figure)
    return written


def test_a_figure_saved_twice_is_the_same_bytes(tmp_path: Path) -> None:
    first, second = draw(tmp_path / "a" / "fig9.1"), draw(tmp_path / "b" / "fig9.1")
    assert [path.name for path in first] == ["fig9.1.pdf", "fig9.1.png", "fig9.1.svg"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_files_carry_no_date_and_no_version_and_embed_their_fonts(tmp_path: Path) -> None:
    pdf, png, svg = (path.read_bytes() for path in draw(tmp_path / "fig"))
    assert b"CreationDate" not in pdf
    assert b"/FontFile2" in pdf
    assert b"Software" not in png
    assert b"<dc:date>" not in svg
    assert b"matplotlib v" not in svg.lower()


def lightness(colour: str) -> float:
    """CIE L* of an sRGB colour, 0 (black) to 100 (white): what a greyscale print keeps of it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return float(116 * luminance ** (1 / 3) - 16)


def test_areas_that_meet_in_a_stack_differ_in_greyscale() -> None:
    """The first four alone: the others are too thin to be seen in any figure."""
    assert lightness("white") == pytest.approx(100)
    tones = [lightness(colour) for colour in style.OPERATOR_COLOURS.values()][:4]
    assert min(abs(upper - lower) for lower, upper in pairwise(tones)) > 10


def test_marks_of_measurements_and_fits_have_no_operators_colour() -> None:
    marks = {style.MEASURED_COLOUR, style.PRINTED_COLOUR, style.FIT_COLOUR, style.SECOND_COLOUR}
    assert len(marks) == 4
    assert not marks & set(style.OPERATOR_COLOURS.values())


def test_every_operator_has_its_own_colour_and_a_label() -> None:
    assert tuple(style.OPERATOR_COLOURS) == OPERATORS == tuple(style.OPERATOR_LABELS)
    assert len(set(style.OPERATOR_COLOURS.values())) == len(OPERATORS)
