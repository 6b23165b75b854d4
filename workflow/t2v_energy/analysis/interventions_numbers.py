"""The numbers that the paper's text takes from experiments ``interventions`` and ``token-merging``.

Keys begin with ``interventions.`` or ``merging.``.  A number that a campaign cannot give is left out.
"""

from __future__ import annotations

import json
from itertools import pairwise
from math import isfinite
from typing import Any

import pandas as pd

from t2v_energy.analysis.numbers import Kind, Number, Source, decimals, with_half_width

Numbers = dict[str, Number]
QUANTITIES = {"latency": "latency", "energy": "gpu_energy"}
GUIDANCE_KINDS = ("cfg-truncation",)
"""Kinds that end guidance early: no part of a stack that keeps it."""
BEST_OF = {"model": "wan2.1-t2v-1.3b", "height": 720, "width": 1280, "num_frames": 81}
"""The configuration whose best stack the text names: the study's own model at its default size."""
FLASH = "attention-flash"
"""The study's kernel: the other baseline of the best stack."""


def interventions_numbers(
    table: pd.DataFrame, merging: pd.DataFrame, methods: pd.DataFrame, folder: str
) -> Numbers:
    """Every number of the part ``interventions``, from the tables as they lie in ``folder``."""
    measured = table[table["measured_latency_ratio"].notna()]
    file = f"{folder}/interventions.csv"
    if measured.empty:
        return {}
    return {
        **_counts(measured, file),
        **_errors(measured, file),
        **_rows(measured, file),
        **_best(measured, file),
        **_compiling(measured, file),
        **_fidelity(measured, file),
        **_merging(merging, f"{folder}/merging.csv"),
        **_methods(methods, f"{folder}/merging_methods.csv"),
    }


def _counts(rows: pd.DataFrame, file: str) -> Numbers:
    every = Source(file, "all rows with a baseline", "")
    values = {
        "rows": len(rows),
        "settings": rows["intervention"].nunique(),
        "kinds": len({kind for _, row in rows.iterrows() for kind in _kinds(row)}),
        "models": rows["model"].nunique(),
        "registered": int((rows["predicted"] == "registered").sum()),
        "other_board": int((rows["same_board"] == "no").sum()),
    }
    return {f"interventions.{name}": Number(value, "", "constant", every) for name, value in values.items()}


def _kinds(row: pd.Series) -> list[str]:
    """Kinds of all that differs: of interventions by their settings, and of what needs none by its name."""
    settings = _settings(row)
    kinds = [str(own["kind"]) for own in settings.values()]
    return kinds + [name for name in str(row["intervention"]).split("+") if name not in settings]


def _settings(row: pd.Series) -> dict[str, Any]:
    text = row["settings"]
    found: dict[str, Any] = json.loads(text) if isinstance(text, str) and text else {}
    return found


def _where(row: pd.Series) -> str:
    return f"{row['experiment']}/{row['configuration_id']} {row['protocol']}"


# --- predicted against measured -----------------------------------------------------------------------------


def _errors(rows: pd.DataFrame, file: str) -> Numbers:
    """Median and worst error of the predicted ratios, and how often their 90 % interval holds what came."""
    numbers: Numbers = {}
    for quantity, name in QUANTITIES.items():
        known = rows[rows[f"{quantity}_error_percent"].notna()]
        if known.empty:
            continue
        column, prefix = f"{quantity}_error_percent", f"interventions.{name}"
        size = known[column].abs()
        worst = known.iloc[int(size.argmax())]
        median, most = float(size.median()), float(size.max())
        every = Source(file, "all predicted rows", f"median of |{column}|")
        numbers[f"{prefix}_error_median"] = Number(median, "%", "modelled", every, digits=1)
        at_worst = Source(file, _where(worst), column)
        numbers[f"{prefix}_error_worst"] = Number(most, "%", "modelled", at_worst, digits=1)
        named = Source(file, _where(worst), "intervention")
        numbers[f"{prefix}_error_worst_of"] = Number(_title(worst), "", "constant", named)
        ratio = known[f"measured_{quantity}_ratio"]
        held = (ratio >= known[f"predicted_{quantity}_ratio_low"]) & (
            ratio <= known[f"predicted_{quantity}_ratio_high"]
        )
        source = Source(file, "all predicted rows", f"measured within predicted_{quantity}_ratio_low, _high")
        numbers[f"{prefix}_coverage"] = Number(100 * float(held.mean()), "%", "modelled", source)
        numbers[f"{prefix}_predicted"] = Number(len(known), "", "constant", every)
    return numbers


def _title(row: pd.Series) -> str:
    return f"{row['intervention']} on {row['model']} at {row['height']}×{row['width']}"


def _rows(rows: pd.DataFrame, file: str) -> Numbers:
    """``interventions.<model>.<height>x<width>.<name>.<quantity>_ratio`` of every row; of two, the first."""
    numbers: Numbers = {}
    for _, row in rows.iterrows():
        prefix = f"interventions.{row['model']}.{row['height']}x{row['width']}.{row['intervention']}"
        for key, number in _ratios(row, prefix, file).items():
            numbers.setdefault(key, number)
    return numbers


def _ratios(row: pd.Series, prefix: str, file: str) -> Numbers:
    numbers: Numbers = {}
    for quantity, name in QUANTITIES.items():
        for kind, column in (
            ("measured", f"measured_{quantity}_ratio"),
            ("modelled", f"predicted_{quantity}_ratio"),
        ):
            value = float(row[column])
            if not isfinite(value):
                continue
            source = Source(file, _where(row), column)
            if kind == "measured":
                half = float(row[f"{column}_ci95"])
                numbers[f"{prefix}.{name}_ratio"] = with_half_width(
                    value, half, "", "measured", source, significant=3
                )
            else:
                numbers[f"{prefix}.{name}_ratio_predicted"] = Number(value, "", "modelled", source, digits=3)
    return numbers


# --- the best stack -----------------------------------------------------------------------------------------


def best_stack(rows: pd.DataFrame) -> pd.Series | None:
    """The row of :data:`BEST_OF` that needs the least energy (without a counter: time) and keeps the video.

    It keeps steps and guidance, and each part that is not lossless has a cited quality figure.
    """
    own = _of_best(rows)
    kept = own[[_keeps(row) for _, row in own.iterrows()]] if len(own) else own
    if kept.empty:
        return None
    by = "measured_energy_ratio" if kept["measured_energy_ratio"].notna().any() else "measured_latency_ratio"
    return kept.iloc[int(kept[by].astype(float).argmin())]


def _of_best(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of :data:`BEST_OF`."""
    return rows[(rows[list(BEST_OF)] == pd.Series(BEST_OF)).all(axis="columns")]


def _keeps(row: pd.Series) -> bool:
    if row["num_inference_steps"] != row["baseline_steps"] or row["uncited_parts"] > 0:
        return False
    return not any(kind in GUIDANCE_KINDS for kind in _kinds(row))


def _best(rows: pd.DataFrame, file: str) -> Numbers:
    best = best_stack(rows)
    if best is None:
        return {}
    numbers = _ratios(best, "interventions.best", file)
    at = _where(best)
    numbers["interventions.best.name"] = Number(
        " + ".join(str(best["intervention"]).split("+")), "", "constant", Source(file, at, "intervention")
    )
    numbers["interventions.best.configuration"] = Number(
        f"{best['experiment']}/{best['configuration_id']}",
        "",
        "constant",
        Source(file, at, "configuration_id"),
    )
    if isinstance(best["cited_quality"], str) and best["cited_quality"]:
        for key, column in (("quality", "cited_quality"), ("quality_source", "source")):
            numbers[f"interventions.best.{key}"] = Number(
                str(best[column]), "", "constant", Source(file, at, column)
            )
    numbers["interventions.best.videos_per_hour"] = _plain(best, "videos_per_hour", "", "measured", file)
    flash = _of_best(rows[rows["intervention"] == FLASH])
    for quantity, name in QUANTITIES.items():
        column = f"measured_{quantity}_ratio"
        ratio = float(best[column])
        if not isfinite(ratio):
            continue
        half = float(best[f"{column}_ci95"]) / ratio**2
        numbers[f"interventions.best.{name}_factor"] = with_half_width(
            1 / ratio, half, "", "measured", Source(file, at, f"1 / {column}"), significant=3
        )
        if len(flash):
            other = flash.iloc[0]
            source = Source(file, f"{_where(other)} / {at}", column)
            factor = float(other[column]) / ratio
            relative = sum((float(r[f"{column}_ci95"]) / float(r[column])) ** 2 for r in (best, other)) ** 0.5
            numbers[f"interventions.best.{name}_factor_flash"] = with_half_width(
                factor, factor * relative, "", "measured", source, significant=3
            )
    return numbers


def _plain(row: pd.Series, column: str, unit: str, kind: Kind, file: str) -> Number:
    value = float(row[column])
    return Number(value, unit, kind, Source(file, _where(row), column), digits=decimals(value, 3))


# --- compiling and fidelity ---------------------------------------------------------------------------------


def _compiling(rows: pd.DataFrame, file: str) -> Numbers:
    """Of each configuration that compiles and does nothing else: its own energy, and when that is repaid."""
    numbers: Numbers = {}
    alone = [row for _, row in rows.iterrows() if _kinds(row) == ["compile"]]
    for row in alone:
        prefix = f"interventions.compile.{row['model']}.{row['height']}x{row['width']}"
        for name, column, unit in (
            ("energy", "compile_energy_Wh", "Wh"),
            ("time", "compile_s", "s"),
            ("break_even", "break_even_videos", ""),
        ):
            if isfinite(float(row[column])):
                numbers.setdefault(f"{prefix}.{name}", _plain(row, column, unit, "measured", file))
    return numbers


def _fidelity(rows: pd.DataFrame, file: str) -> Numbers:
    """How many rows change the latents by nothing, and the largest change that a lossless one makes."""
    lossless = rows[(rows["lossless"] == "yes") & rows["relative_l2"].notna()]
    if lossless.empty:
        return {}
    worst = lossless.iloc[int(lossless["relative_l2"].astype(float).argmax())]
    every = Source(file, "lossless=yes", "relative_l2")
    largest = float(worst["relative_l2"])
    return {
        "interventions.lossless.rows": Number(len(lossless), "", "constant", every),
        "interventions.lossless.identical": Number(
            int((lossless["relative_l2"] == 0).sum()), "", "measured", every
        ),
        "interventions.lossless.relative_l2_most": Number(
            largest, "", "measured", Source(file, _where(worst), "relative_l2"), digits=decimals(largest, 2)
        ),
        "interventions.lossless.most_of": Number(
            _title(worst), "", "constant", Source(file, _where(worst), "intervention")
        ),
    }


# --- token merging ------------------------------------------------------------------------------------------


def _merging(merging: pd.DataFrame, file: str) -> Numbers:
    """The seed project's finding that throughput rises with merging, by model: rows, and how many rise."""
    numbers: Numbers = {}
    for model, rows in merging.groupby("model"):
        prefix, every = f"merging.{model}", Source(file, f"model={model}", "throughput_ratio")
        rise = int((rows["throughput_ratio"] > 1).sum())
        numbers[f"{prefix}.rows"] = Number(len(rows), "", "constant", every)
        numbers[f"{prefix}.rise"] = Number(rise, "", "measured", every)
        for end in ("min", "max"):
            row = rows.iloc[int(getattr(rows["throughput_ratio"], f"arg{end}")())]
            source = Source(file, str(row["intervention"]), "throughput_ratio")
            value = float(row["throughput_ratio"])
            numbers[f"{prefix}.throughput_{end}"] = Number(value, "", "measured", source, digits=2)
            numbers[f"{prefix}.throughput_{end}_of"] = Number(
                str(row["intervention"]),
                "",
                "constant",
                Source(file, str(row["intervention"]), "intervention"),
            )
        pairs = _by_ratio(rows)
        if len(pairs):
            source = Source(file, f"model={model}, pairs that differ in the ratio alone", "throughput_ratio")
            numbers[f"{prefix}.ratio_pairs"] = Number(len(pairs), "", "constant", source)
            numbers[f"{prefix}.ratio_pairs_rise"] = Number(sum(pairs), "", "measured", source)
    return numbers


def _by_ratio(rows: pd.DataFrame) -> list[bool]:
    """Of settings that differ in the ratio alone: does more merging bring more videos an hour?"""
    alike = ["height", "width", "num_frames", "method", "mode", "stride", "blocks", "match_every", "metric"]
    found = []
    for _, own in rows.groupby(alike):
        ordered = own.sort_values("ratio")["throughput_ratio"].to_numpy(dtype=float)
        found += [bool(more > less) for less, more in pairwise(ordered)]
    return found


def _methods(methods: pd.DataFrame, file: str) -> Numbers:
    """The seed project's finding that attnbin is slower than 3d."""
    if methods.empty:
        return {}
    ratio = methods["attnbin_over_3d"]
    every = Source(file, "all rows", "attnbin_over_3d")
    beyond = Source(file, "all rows", "attnbin_over_3d − 1 above attnbin_over_3d_ci95")
    most = 100 * (float(ratio.max()) - 1)
    percent = 100 * (float(ratio.median()) - 1)
    return {
        "merging.methods.pairs": Number(len(methods), "", "constant", every),
        "merging.methods.attnbin_slower": Number(int((ratio > 1).sum()), "", "measured", every),
        "merging.methods.attnbin_slower_beyond": Number(
            int((ratio - 1 > methods["attnbin_over_3d_ci95"]).sum()), "", "measured", beyond
        ),
        "merging.methods.attnbin_excess_most": Number(
            most, "%", "measured", Source(file, "all rows", "100 (largest attnbin_over_3d − 1)"),
            digits=decimals(most, 2),
        ),
        "merging.methods.attnbin_excess_median": Number(
            percent, "%", "measured", Source(file, "all rows", "100 (median of attnbin_over_3d − 1)"),
            digits=decimals(percent, 2),
        ),
    }  # fmt: skip
