"""Figures 2 to 4 show what they are given, in units, with everything named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import synthetic_campaign as synthetic
from figure_checks import assert_legible
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from t2v_energy.analysis import style, sweep_figure
from t2v_energy.analysis.sweep import SETS, Sweep, fit_predictors, read_sweeps
from t2v_energy.work import OPERATORS, paper

CONFIGURATIONS = Path("results/aggregated/h200/configurations.csv")
LARGE = ((1088, 1920), (1440, 2560))


def read(folder: Path, table: pd.DataFrame) -> dict[str, Sweep]:
    return read_sweeps(synthetic.root(folder / "root", table), "h200", CONFIGURATIONS)


def draw(sweeps: dict[str, Sweep], name: str) -> Figure:
    return sweep_figure.figure_sweep(sweeps[name], fit_predictors(sweeps.values()))


def with_large_sizes() -> pd.DataFrame:
    rows = [synthetic.row("resolution", size, uuids=("GPU-D",)) for size in LARGE]
    rows.append(synthetic.row("resolution", (1984, 3520), uuids=("GPU-D",), n=1, intervention="vae-tiling"))
    return pd.concat([synthetic.configurations(), pd.DataFrame(rows)])


def legend_texts(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def points(axes: Any, marker: str = "o") -> list[tuple[float, float]]:
    """The measured points of a panel, filled and hollow, by rising abscissa."""
    found: list[tuple[float, float]] = []
    for container in axes.containers:
        line = container.lines[0]
        if line.get_marker() == marker:
            found += zip(line.get_xdata().tolist(), line.get_ydata().tolist(), strict=True)
    return sorted(found)


@pytest.fixture
def sweeps(tmp_path: Path) -> dict[str, Sweep]:
    return read(tmp_path, synthetic.configurations())


@pytest.mark.parametrize(("name", "columns"), [("resolution", 2), ("frames", 2), ("steps", 4)])
def test_each_figure_has_panels_with_strips_units_and_a_legend(
    sweeps: dict[str, Sweep], name: str, columns: int
) -> None:
    figure = draw(sweeps, name)
    assert len(figure.axes) == 4 * columns
    labels = {axes.get_ylabel() for axes in figure.axes} - {""}
    assert labels == {"Latency of a video (s)", "GPU energy of a video (Wh)", "Theory error (%)"}
    scale = "" if name == "frames" else "\n(strips: log scale)"
    assert {axes.get_xlabel() for axes in figure.axes} == {"", SETS[name].label + scale}
    scales = {axes.get_xscale() for axes in figure.axes[columns : 2 * columns]}
    assert scales == {"log" if scale else "linear"}
    texts = legend_texts(figure)
    assert [style.OPERATOR_LABELS[o] for o in OPERATORS] == texts[: len(OPERATORS)]
    assert any("95 %" in text for text in texts)
    assert ("One pass" in texts) == (name != "steps")
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    assert [title.split(":")[0] for title in titles] == list(sweep_figure.COUNT_TITLES.values())
    assert "fitted µ = 0.500 (95 % CI 0.500 to 0.500) at 700 W" in titles[1]


def test_points_are_the_measured_values_and_errors_are_of_the_common_efficiency(
    sweeps: dict[str, Sweep],
) -> None:
    figure = draw(sweeps, "frames")
    rows = sweeps["frames"].rows
    first = next(axes for axes in figure.axes if axes.get_ylabel().endswith("(s)"))
    assert points(first) == list(zip(rows["num_frames"], rows["latency_s"], strict=True))
    strips = [axes for axes in figure.axes if axes.get_ylabel() == "Theory error (%)"]
    # rows: the study's formula, then true work; columns: latency, then energy
    assert [y for _, y in points(strips[2])] == pytest.approx([0] * len(rows), abs=1e-6)
    assert [y for _, y in points(strips[3])] == pytest.approx([100 * 50 / 650] * len(rows))


def test_every_pass_is_drawn_at_its_own_mean(sweeps: dict[str, Sweep]) -> None:
    axes = draw(sweeps, "resolution").axes[0]
    passes = [line for line in axes.lines if line.get_marker() == "_"]
    assert len(passes) == 1
    row = sweeps["resolution"].at(720, 1280)
    assert row is not None
    means = [float(mean) for mean in row["latency_s_pass_means"].split(";")]
    drawn = list(zip(passes[0].get_xdata(), passes[0].get_ydata(), strict=True))
    assert len(drawn) == 2 * len(synthetic.SIZES)
    assert [y for x, y in drawn if x == pytest.approx(0.9216)] == pytest.approx(means)


def test_points_on_the_grid_of_attention_tiles_are_hollow(sweeps: dict[str, Sweep]) -> None:
    figure = draw(sweeps, "frames")
    assert "Tokens a multiple of 128" in legend_texts(figure)
    for axes in figure.axes:
        hollow = [c.lines[0] for c in axes.containers if c.lines[0].get_markerfacecolor() == "white"]
        # (T + 3) / 4 latent frames of 3600 tokens each: a multiple of 128 for 8, 16 and 24 of them
        assert [line.get_xdata().tolist() for line in hollow] == [[61]]
    assert "Tokens a multiple of 128" not in legend_texts(draw(sweeps, "steps"))


def test_the_studys_own_model_is_a_dashed_line_beside_the_printed_formula_alone(
    sweeps: dict[str, Sweep],
) -> None:
    figure = draw(sweeps, "resolution")
    panels = [axes for axes in figure.axes if axes.get_xscale() == "linear"]
    dashed = [[line for line in axes.lines if line.is_dashed()] for axes in panels]
    assert [len(lines) for lines in dashed] == [1, 1, 0, 0]
    flop = sweeps["resolution"].curve("study")[list(OPERATORS)].sum(axis=1)
    expected = flop / (paper.EFFICIENCY * paper.PEAK_FLOP_PER_S)
    assert list(dashed[0][0].get_ydata()) == pytest.approx(expected.tolist())
    assert "The study's formula with its own µ = 0.456 and 700 W" in legend_texts(figure)


def test_sizes_of_the_steps_stand_beside_each_other_on_one_scale(sweeps: dict[str, Sweep]) -> None:
    figure = draw(sweeps, "steps")
    sizes = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert sizes == ["480×832", "720×1280"] * 4
    panels = [axes for axes in figure.axes if axes.texts]
    assert panels[0].get_ylim() == panels[1].get_ylim()
    strips = [axes for axes in figure.axes if axes.get_xscale() == "log"]
    assert len(strips) == 8
    assert len({axes.get_ylim() for axes in strips}) == 1


def test_an_inset_keeps_small_sizes_legible_and_tiles_are_marked(
    sweeps: dict[str, Sweep], tmp_path: Path
) -> None:
    assert not any(axes.child_axes for axes in draw(sweeps, "resolution").axes)
    figure = draw(read(tmp_path / "large", with_large_sizes()), "resolution")
    panels = [axes for axes in figure.axes if axes.child_axes]
    assert len(panels) == 4
    inset = panels[0].child_axes[0]
    assert inset.get_xlim() == (0, sweep_figure.INSET_MEGAPIXELS)
    assert inset.get_ylim()[1] < panels[0].get_ylim()[1] / 5
    assert [x for x, _ in points(panels[0], "s")] == pytest.approx([1984 * 3520 / 1e6])
    assert "VAE in tiles" in legend_texts(figure)
    assert "VAE in tiles" not in legend_texts(draw(sweeps, "resolution"))


def test_nothing_in_a_figure_lies_outside_it_or_on_another_label(tmp_path: Path) -> None:
    sweeps = read(tmp_path, with_large_sizes())
    for name in sweeps:
        figure = draw(sweeps, name)
        assert_legible(figure)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        texts = [axes.yaxis.label for axes in figure.axes] + [axes.title for axes in figure.axes]
        texts += [axes.xaxis.label for axes in figure.axes] + [axes._left_title for axes in figure.axes]
        texts += [text for legend in figure.legends for text in legend.get_texts()]
        boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
        for box in boxes:
            assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, (name, box)
            assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, (name, box)
        for index, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[index + 1 :]), name
            assert not any(box.overlaps(axes.bbox) for axes in figure.axes), name


def test_without_a_counter_the_cpus_energy_is_shown_and_called_modelled(tmp_path: Path) -> None:
    table = synthetic.configurations().assign(gpu_energy_Wh=float("nan"), gpu_energy_Wh_kind="")
    sweeps = read(tmp_path, table)
    for name in sweeps:
        figure = draw(sweeps, name)
        assert "CPU energy (modelled), Wh" in {axes.get_ylabel() for axes in figure.axes}
        assert_legible(figure)
        renderer = FigureCanvasAgg(figure).get_renderer()
        for axes in figure.axes:
            boxes = [text.get_window_extent(renderer) for text in axes.texts if text.get_text()]
            assert all(axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 for box in boxes)


def test_a_drawn_figure_is_the_same_bytes_again(sweeps: dict[str, Sweep], tmp_path: Path) -> None:
    first = style.save(draw(sweeps, "steps"), tmp_path / "a" / "fig4")
    second = style.save(draw(sweeps, "steps"), tmp_path / "b" / "fig4")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
