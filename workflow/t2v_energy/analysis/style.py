"""How every figure looks, and how it is saved: one palette, one set of fonts, the same bytes on a rebuild."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import seaborn
from matplotlib.figure import Figure

TEXT_WIDTH_INCH = 16 / 2.54
"""Width of the paper's text: A4 with margins of 2.5 cm, as paper/paper.typ sets it."""

PNG_DPI = 200

# Okabe and Ito's palette, which readers with any common colour blindness can tell apart.  Its sky blue is
# lightened: beside the MLP's orange it would be the same grey.
OPERATOR_COLOURS: Mapping[str, str] = {
    "self_attention": "#0072B2",
    "cross_attention": "#A6DAF7",
    "mlp": "#E69F00",
    "vae": "#009E73",
    "text_encoder": "#D55E00",
    "timestep_mlp": "#CC79A7",
    "embeddings": "#999999",
}
"""The colour of each operator, the same in every figure."""

OPERATOR_LABELS: Mapping[str, str] = {
    "self_attention": "Self-attention",
    "cross_attention": "Cross-attention",
    "mlp": "MLP",
    "vae": "VAE decoder",
    "text_encoder": "Text encoder",
    "timestep_mlp": "Timestep MLP",
    "embeddings": "Embeddings",
}

MEASURED_COLOUR = "#000000"
PRINTED_COLOUR = "#4D4D4D"
FIT_COLOUR = "#332288"
"""Curves fitted to this project's own measurements, and what is counted beside them: no operator has it."""
SECOND_COLOUR = "#AA4466"
"""A second measured set beside the first."""

_SETTINGS: Mapping[str, object] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same glyphs on every machine
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.4,
    "axes.axisbelow": True,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "lines.linewidth": 1.0,
    "pdf.fonttype": 42,  # embeds the fonts whole, so that text stays text
    "svg.fonttype": "path",
    "svg.hashsalt": "t2v-energy",
    "path.simplify": False,
}

# Dates and version strings would make two builds of one figure differ.
_METADATA: Mapping[str, Mapping[str, str | None]] = {
    "pdf": {"CreationDate": None, "Creator": "t2v-energy", "Producer": "matplotlib"},
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
}


def apply() -> None:
    """Set matplotlib and seaborn up for the paper; call it before making a figure."""
    seaborn.set_theme(context="paper", style="ticks", rc=dict(_SETTINGS))


def save(figure: Figure, stem: str | Path, machine: str = "") -> list[Path]:
    """Write ``<stem>.pdf``, ``.png`` (200 dpi) and ``.svg``; the same figure gives the same bytes each time.

    ``machine`` says in the margin what was measured on. Folders are made. Returns the files written.
    """
    if machine:
        figure.text(
            0.998, 0.5, machine, rotation=270, ha="right", va="center", fontsize=5, color=PRINTED_COLOUR
        )
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context({"svg.hashsalt": "t2v-energy", "pdf.fonttype": 42, "svg.fonttype": "path"}):
        for ending, metadata in _METADATA.items():
            # not with_suffix: a stem may have a dot in its name
            path = stem.with_name(f"{stem.name}.{ending}")
            figure.savefig(path, dpi=PNG_DPI, metadata=dict(metadata))
            written.append(path)
    return written
