"""Writes the study's tables 1, 5, 6 and 7 as CSV and LaTeX."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path

import pandas as pd

from t2v_energy.analysis.tables import write_csvs
from t2v_energy.analysis.theory import Theory, table1, table5, table6
from t2v_energy.analysis.theory_thresholds import table7, table7b

LEAST_SHOWN = 0.01


@dataclass(frozen=True)
class _Layout:
    """What of a table goes into its LaTeX: column, header, alignment; ``maths`` are columns of formulas."""

    caption: str
    columns: tuple[tuple[str, str, str], ...]
    maths: tuple[str, ...] = ()


_LAYOUTS: Mapping[str, _Layout] = {
    "table1": _Layout(
        "FLOP of one video of Wan2.1-T2V-1.3B at its default size, by the study's formulas with its printed "
        "constants and as the architecture executes it.",
        (("component", "Component", "l"), ("study_formula", "Study", "l"), ("true_formula", "Executed", "l"),
         ("study_flop_per_video", "Study (FLOP)", "r"), ("true_flop_per_video", "True (FLOP)", "r"),
         ("ratio", "Ratio", "r")),
        ("study_formula", "true_formula"),
    ),
    "table5": _Layout(
        "Symbols of the study's table 5: printed and true values.",
        (("symbol", "Symbol", "l"), ("meaning", "Meaning", "l"), ("printed", "Printed", "l"),
         ("true", "True", "l"), ("consequence", "Consequence", "p{6cm}")),
        ("symbol",),
    ),
    "table6": _Layout(
        "The VAE's decoder by stage at Wan2.1-T2V-1.3B's default size: the study's table 6 and what runs.",
        (("stage", "Stage", "l"), ("operator", "Operator", "l"), ("kernel", "Kernel", "l"),
         ("channels", "Channels", "l"), ("study_flop", "Study (FLOP)", "r"),
         ("true_flop", "True (FLOP)", "r"),
         ("true_share_percent", "Share (%)", "r")),
    ),
    "table7": _Layout(
        "Balance and thresholds of seven accelerators: as printed, recomputed from the printed peaks, and at "
        "published dense peaks without the slips of appendix B.",
        (("title", "Accelerator", "l"), ("printed_balance", "β printed", "r"),
         ("recomputed_balance", "β recomputed", "r"), ("published_balance", "β published", "r"),
         ("printed_attention_tokens", "ℓ* attention printed", "r"),
         ("published_attention_tokens", "ℓ* attention", "r"),
         ("printed_mlp_tokens", "ℓ* MLP printed", "r"), ("published_true_mlp_tokens", "ℓ* MLP", "r")),
    ),
    "table7b": _Layout(
        "Assumptions of appendix B. Thresholds for the H100's printed peak and bandwidth.",
        (("assumption", "Assumption", "p{2.6cm}"), ("study", "Study", "p{3.4cm}"),
         ("corrected", "Corrected", "p{5cm}"), ("consequence", "Consequence", "p{4.6cm}")),
    ),
}  # fmt: skip

TABLES: Mapping[str, Callable[[Theory], pd.DataFrame]] = {
    "table1": table1,
    "table5": table5,
    "table6": table6,
    "table7": table7,
    "table7b": table7b,
}
"""The tables by the name of their files, without ending."""


def write_tables(tables: Mapping[str, pd.DataFrame], folder: Path) -> list[Path]:
    """Write ``<folder>/<name>.csv`` (everything) and ``.tex`` (booktabs, the main columns) of each table.

    ``tables`` has keys of :data:`TABLES`.  Returns the files written.
    """
    written = write_csvs(tables, folder)
    for name, table in tables.items():
        tex = folder / f"{name}.tex"
        tex.write_text(_latex(table, _LAYOUTS[name]), encoding="utf-8")
        written.append(tex)
    return written


def _latex(table: pd.DataFrame, layout: _Layout) -> str:
    """A booktabs table; unlike :func:`tables.booktabs` its cells may hold mathematics."""
    keys, headers, alignment = zip(*layout.columns, strict=True)
    lines = [
        f"% {layout.caption}",
        rf"\begin{{tabular}}{{{''.join(alignment)}}}",
        r"\toprule",
        _line([latex_text(header) for header in headers]),
        r"\midrule",
    ]
    for _, row in table.iterrows():
        lines.append(_line([_cell(row[key], key in layout.maths) for key in keys]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _cell(value: object, maths: bool) -> str:
    if isinstance(value, str):
        return latex_formula(value) if maths else latex_text(value)
    number = float(value)  # type: ignore[arg-type]
    if isnan(number):
        return "--"
    if 0 < number < LEAST_SHOWN:
        return f"$<{LEAST_SHOWN}$"
    if number >= 1e6:
        mantissa, exponent = f"{number:.2e}".split("e")
        return rf"${mantissa}\times10^{{{int(exponent)}}}$"
    return f"{number:.0f}" if number >= 100 or number.is_integer() else f"{number:.3g}"


_SYMBOLS = {
    "ℓ": r"\ell", "²": "^2", "⁴": "^4", "µ": r"\mu", "τ": r"\tau", "Θ": r"\Theta", "β": r"\beta",
    "×": r"\times",
    "Σ": r"\sum", "⌈": r"\lceil", "⌉": r"\rceil", "→": r"\to", "≫": r"\gg", "∞": r"\infty", "·": r"\cdot",
    "−": "-", "ᵀ": r"^{\mathsf{T}}",
}  # fmt: skip
_PLAIN = {"…": r"\dots{}", "—": "---", "*": r"\textasteriskcentered{}"}
_SUBSCRIPT = re.compile(r"_([A-Za-zτ]+(?:,[a-z]+)?|\*)")
_WORDS = re.compile(r"(?<![A-Za-z_\\{,])([a-z]{4,}|MLP)(?: ([a-z]+))*")
_NAMED = re.compile(r"(?<![A-Za-z_])[A-ZΘµ]_[a-z]+|ℓ\*")


def latex_text(text: str) -> str:
    """``text`` for LaTeX outside mathematics: escaped, its symbols as mathematics."""
    parts, end = [], 0
    for found in _NAMED.finditer(text):
        parts += [_escaped(text[end : found.start()]), _symbol(found.group())]
        end = found.end()
    return "".join([*parts, _escaped(text[end:])])


def latex_formula(text: str) -> str:
    """A formula in the tables' Unicode, as mathematics; words of four letters and more stay upright."""
    if text == "—":
        return "---"
    upright = _WORDS.sub(lambda found: rf"\text{{ {found.group()} }}", text).replace("…", r"\dots")
    return f"${_mathematics(upright)}$"


def _symbol(text: str) -> str:
    return r"\ensuremath{\ell^*}" if text == "ℓ*" else rf"\ensuremath{{{_mathematics(text)}}}"


def _mathematics(text: str) -> str:
    subscripts = _SUBSCRIPT.sub(lambda found: "_{" + _upright(found.group(1)) + "}", text)
    return "".join(
        _SYMBOLS[c] + " " * _SYMBOLS[c].startswith("\\") if c in _SYMBOLS else c for c in subscripts
    )


def _upright(text: str) -> str:
    return rf"\mathrm{{{text}}}" if len(text) > 1 and text.isascii() else text


def _escaped(text: str) -> str:
    for character in "&%_#":
        text = text.replace(character, "\\" + character)
    text = "".join(_PLAIN.get(c, c) for c in text)
    return "".join(rf"\ensuremath{{{_SYMBOLS[c]}}}" if c in _SYMBOLS else c for c in text)
