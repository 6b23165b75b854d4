"""Figures look alike and are the same bytes on a rebuild."""

from __future__ import annotations

from pathlib import Path

from matplotlib import pyplot as plt
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


def test_every_operator_has_its_own_colour_and_a_label() -> None:
    assert tuple(style.OPERATOR_COLOURS) == OPERATORS == tuple(style.OPERATOR_LABELS)
    assert len(set(style.OPERATOR_COLOURS.values())) == len(OPERATORS)
