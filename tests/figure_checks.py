"""What every figure must hold, whatever it shows."""

from __future__ import annotations

from itertools import combinations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

LEAST_POINTS = 7.0


def assert_legible(figure: Figure) -> None:
    """No text is smaller than 7 pt, nothing is cut off at the figure's edge, and no two legends overlap."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_text().strip()]
    assert texts
    assert not [text.get_text() for text in texts if text.get_fontsize() < LEAST_POINTS]
    drawn, page = figure.get_tightbbox(renderer), figure.bbox_inches
    assert page.x0 <= drawn.x0 < drawn.x1 <= page.x1, "cut off at the left or right"
    assert page.y0 <= drawn.y0 < drawn.y1 <= page.y1, "cut off at the top or bottom"
    legends = [*figure.legends, *(axes.legend_ for axes in figure.axes if axes.legend_)]
    boxes = [legend.get_window_extent(renderer) for legend in legends]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
