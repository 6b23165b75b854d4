"""Numbers of the paper's text about stages, CodeCarbon and what measuring cost.

Keys begin with ``stages.``, ``codecarbon.`` or ``cost.``.  What a campaign cannot give (an experiment, a
size, a counter) is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

import pandas as pd

from t2v_energy.analysis.instruments import ExtraWindow, fit_extra_window, worst_percent
from t2v_energy.analysis.numbers import Kind, Number, Source, decimals
from t2v_energy.analysis.stages import (
    FEW_STEPS,
    OnceAndStep,
    measured_rows,
    once_and_step,
    other_share,
    row_at,
    stage_share,
)
from t2v_energy.grids import GRIDS_FILE, Grid

Numbers = dict[str, Number]
STUDY = "arXiv:2509.19222"
DESCRIBED_SIZES = ((480, 832), (720, 1280))
FRAMES, STEPS = 81, 50
QUANTITIES = {"energy": "energy", "time": "time"}

SHORT_VIDEO_S, SHORT_VIDEO_WH = 0.68, 0.115
"""AnimateDiff's latency and GPU energy as the study prints them (table 4)."""
SHORT_RUNS = 5
"""Measured runs in one window of CodeCarbon (section 4.1)."""
BLOCKING_S = 0.5
"""How long CodeCarbon 3.0.2 waits to read the CPU's load before it reads the GPU's counter."""
BLOCKING_SOURCE = "https://github.com/mlco2/codecarbon/issues/878"


def short_window_s() -> float:
    """The study's shortest window (s): five runs of AnimateDiff, a constant from what it prints."""
    return SHORT_RUNS * SHORT_VIDEO_S


@dataclass(frozen=True)
class Files:
    """Where the tables lie that the numbers are said to come from."""

    configurations: str
    codecarbon: str
    cost: str
    carbon: str


def breakdown_numbers(
    configurations: pd.DataFrame,
    codecarbon: pd.DataFrame,
    costs: pd.DataFrame,
    carbon: pd.DataFrame,
    check: pd.DataFrame,
    grids: Mapping[str, Grid],
    files: Files,
    board_power_W: float,
) -> Numbers:
    """Every number of the three parts.

    Args:
        configurations: configurations.csv.
        codecarbon, costs, carbon: the tables of :mod:`instruments` and :mod:`cost`.
        check: :func:`t2v_energy.analysis.cost.protocol_check`.
        grids: config/grids.yaml.
        files: names for the sources.
        board_power_W: of the campaign's accelerator.
    """
    return {
        **stage_numbers(configurations, files.configurations),
        **codecarbon_numbers(codecarbon, files.codecarbon, board_power_W),
        **cost_numbers(costs, files.cost),
        **check_numbers(check, files.configurations),
        **carbon_numbers(carbon, grids, files.carbon),
    }


# --- stages -------------------------------------------------------------------------------------------------


def stage_numbers(configurations: pd.DataFrame, file: str) -> Numbers:
    """Shares that are not the denoiser's: by size, length and steps, and where they equal it."""
    sampled = measured_rows(configurations, "resolution")
    sampled = sampled[(sampled["protocol"] == "sampled") & (sampled["num_frames"] == FRAMES)]
    lengths = measured_rows(configurations, "frames")
    numbers: Numbers = {}
    for rows, label, least in ((sampled, "pixels", "size"), (lengths, "num_frames", "length")):
        if not len(rows):
            continue
        for end, row in ((f"smallest_{least}", rows.iloc[0]), (f"largest_{least}", rows.iloc[-1])):
            numbers |= _share_numbers(row, f"stages.{end}", file)
            value = f"{row['height']}×{row['width']}" if label == "pixels" else int(row["num_frames"])
            numbers[f"stages.{end}.what"] = Number(value, "", "constant", _of(file, row, label))
    for height, width in DESCRIBED_SIZES:
        if (described := row_at(sampled, height, width, FRAMES)) is not None:
            prefix = f"stages.{height}x{width}"
            numbers |= _share_numbers(described, prefix, file) | _once_numbers(described, prefix, file)
    return (
        numbers | _step_numbers(measured_rows(configurations, "steps"), file) | _text_numbers(sampled, file)
    )


def _share_numbers(row: pd.Series, prefix: str, file: str) -> Numbers:
    """Percent of a whole video that is not the denoiser's, and the VAE's and text encoder's parts."""
    found = {}
    for quantity in QUANTITIES:
        parts = {"other": other_share(row, quantity)}
        parts |= {
            stage: stage_share(row, stage, quantity) for stage in ("vae_decode", "text_encoder", "rest")
        }
        for name, share in parts.items():
            if isfinite(share):
                column = f"1 − denoiser_{quantity}_share" if name == "other" else f"{name}_{quantity}_share"
                found[f"{prefix}.{name}_{quantity}"] = Number(
                    100 * share, "%", "measured", _of(file, row, column), digits=decimals(100 * share, 2)
                )
    return found


def _once_numbers(row: pd.Series, prefix: str, file: str) -> Numbers:
    """Once-a-video costs, S at which they equal the denoiser's, and modelled shares at few and many steps."""
    found = {}
    for quantity, unit in (("energy", "J"), ("time", "s")):
        model = once_and_step(row, quantity)
        if not isfinite(model.equal_steps):
            continue

        def number(value: float, unit: str, column: str, kind: Kind = "modelled") -> Number:
            return Number(value, unit, kind, _of(file, row, column), digits=decimals(value, 2))

        found[f"{prefix}.once_{quantity}"] = number(
            model.once, unit, f"{quantity} of the video less its steps'", "measured"
        )
        found[f"{prefix}.equal_steps_{quantity}"] = number(model.equal_steps, "", "once / denoiser's step")
        negligible = model.steps_for(0.05)
        if isfinite(negligible):
            column = "S from which on 5 % is not the denoiser's"
            found[f"{prefix}.steps_for_5_percent_{quantity}"] = number(negligible, "", column)
        found |= _modelled_shares(model, row, f"{prefix}.modelled", quantity, file)
    return found


def _modelled_shares(model: OnceAndStep, row: pd.Series, prefix: str, quantity: str, file: str) -> Numbers:
    found = {}
    for steps in (1, FEW_STEPS, STEPS):
        value = 100 * float(model.other_share(steps))
        column = f"(once + S (step − denoiser)) / (once + S step), S = {steps}, {quantity}"
        found[f"{prefix}_{steps}s.other_{quantity}"] = Number(
            value, "%", "modelled", _of(file, row, column), digits=decimals(value, 2)
        )
    return found


def _step_numbers(rows: pd.DataFrame, file: str) -> Numbers:
    """Shares of whole generations, by steps: ``stages.<H>x<W>.<S>s.other_energy``."""
    found: Numbers = {}
    for _, row in rows.iterrows():
        prefix = f"stages.{row['height']}x{row['width']}.{row['num_inference_steps']}s"
        for quantity in QUANTITIES:
            value = 100 * other_share(row, quantity)
            if isfinite(value):
                source = _of(file, row, f"1 − denoiser_{quantity}_share")
                found[f"{prefix}.other_{quantity}"] = Number(
                    value, "%", "measured", source, digits=decimals(value, 2)
                )
    return found


def _text_numbers(rows: pd.DataFrame, file: str) -> Numbers:
    """The text encoder's largest part over the sizes."""
    column = "text_encoder_energy_share"
    if not len(rows) or not rows[column].notna().any():
        return {}
    row = rows.iloc[int(rows[column].argmax())]
    value = 100 * float(row[column])
    source = _of(file, row, column)
    return {"stages.text_encoder_most": Number(value, "%", "measured", source, digits=decimals(value, 2))}


# --- CodeCarbon ---------------------------------------------------------------------------------------------


def codecarbon_numbers(table: pd.DataFrame, file: str, board_power_W: float) -> Numbers:
    """How far CodeCarbon's GPU energy is from the counter's, and of what kind its other energies are."""
    numbers = _other_energies(table, file)
    rows = table.dropna(subset=["difference_J"])
    fit = fit_extra_window(table)
    if fit is None:
        return numbers
    every = f"all {len(rows)} records"

    def number(value: float, unit: str, column: str, significant: int = 2, kind: Kind = "measured") -> Number:
        return Number(value, unit, kind, Source(file, every, column), digits=decimals(value, significant))

    absolute = rows["difference_percent"].abs()
    worst = rows.iloc[int(absolute.argmax())]
    numbers |= {
        "codecarbon.records": Number(len(rows), "", "constant", Source(file, every, "rows")),
        "codecarbon.difference_most": Number(
            float(worst["difference_percent"]), "%", "measured", _of(file, worst, "difference_percent"),
            digits=decimals(float(worst["difference_percent"]), 2),
        ),
        "codecarbon.difference_most_window": Number(
            float(worst["window_s"]), "s", "measured", _of(file, worst, "window_s"), digits=1
        ),
        "codecarbon.difference_median": number(float(absolute.median()), "%", "median |difference_percent|"),
        "codecarbon.scatter": number(fit.scatter_J, "J", "standard deviation of difference_J about the fit"),
        "codecarbon.unexplained_most": number(
            float(rows["unexplained_J"].abs().max()), "J", "largest |unexplained_J|", 1
        ),
        "codecarbon.longer_median": number(
            1000 * float(rows["longer_s"].median()), "ms", "median longer_s", 1
        ),
        "codecarbon.longer_most": number(1000 * float(rows["longer_s"].max()), "ms", "largest longer_s"),
        "codecarbon.idle_power": number(fit.idle_power_W, "W", "mean idle_power_W", 3),
        "codecarbon.extra": Number(
            1000 * fit.delta_s, "ms", "modelled",
            Source(file, every, "difference_J over idle_power_W, through the origin"),
            (1000 * fit.low_s, 1000 * fit.high_s), digits=0,
        ),
    }  # fmt: skip
    return numbers | _short_window(fit, float(rows["tick_s"].median()), file, every, board_power_W)


def _short_window(fit: ExtraWindow, tick_s: float, file: str, every: str, board_power_W: float) -> Numbers:
    """What the differences would be in a window as short as the study's shortest (AnimateDiff)."""
    window_s = short_window_s()
    power_W = SHORT_VIDEO_WH * 3600 / SHORT_VIDEO_S
    printed = Source(STUDY, "table 4, AnimateDiff", "Latency (s), GPU (Wh); 5 runs a window (section 4.1)")

    def modelled(value: float, column: str) -> Number:
        return Number(value, "%", "modelled", Source(file, every, column), digits=1)

    blocked = 100 * BLOCKING_S * fit.idle_power_W / (power_W * window_s)
    return {
        "codecarbon.short.window": Number(window_s, "s", "constant", printed, digits=1),
        "codecarbon.short.power": Number(power_W, "W", "constant", printed),
        "codecarbon.short.scatter": modelled(
            float(fit.scatter_percent(window_s, power_W)), "1.96 × scatter of difference_J over the energy"
        ),
        "codecarbon.short.worst": modelled(
            float(worst_percent(tick_s, board_power_W, window_s, power_W)),
            "tick_s × board power over the energy",
        ),
        "codecarbon.short.blocking": Number(
            BLOCKING_S, "s", "constant", Source(BLOCKING_SOURCE, "CodeCarbon 3.0.2", "psutil.cpu_percent"),
            digits=1,
        ),
        "codecarbon.short.blocked": modelled(blocked, "0.5 s × mean idle_power_W over the energy"),
    }  # fmt: skip


def _other_energies(table: pd.DataFrame, file: str) -> Numbers:
    """CodeCarbon's CPU and memory powers, and each part's range in a total that adds all three."""
    found: Numbers = {}
    every = f"all {len(table)} records"
    gpu_share = 100 * (1 - table["cpu_share"] - table["ram_share"])
    if table["codecarbon_gpu_energy_J"].notna().any():
        for name, value in (("least", float(gpu_share.min())), ("most", float(gpu_share.max()))):
            source = Source(file, every, f"1 − cpu_share − ram_share: {name}")
            found[f"codecarbon.gpu_share_{name}"] = Number(value, "%", "modelled", source, digits=1)
    for part in ("cpu", "ram"):
        rows = table[table[f"{part}_kind"] != ""]
        kinds = sorted(set(rows[f"{part}_kind"]))
        if len(kinds) != 1:
            continue
        kind: Kind = kinds[0]
        methods = " and ".join(sorted(set(rows[f"{part}_method"]))).replace("_", " ")
        source = Source(file, every, f"{part}_method")
        found[f"codecarbon.{part}_method"] = Number(methods, "", "constant", source)
        power, share = rows[f"{part}_power_W"], 100 * rows[f"{part}_share"]
        values = {
            "power": (float(power.mean()), "W", f"mean {part}_power_W"),
            "power_range": (float(power.max() - power.min()), "W", f"range of {part}_power_W"),
        }
        if table["codecarbon_gpu_energy_J"].notna().any():
            values |= {
                "share_least": (float(share.min()), "%", f"least {part}_share"),
                "share_most": (float(share.max()), "%", f"largest {part}_share"),
            }
        for name, (value, unit, column) in values.items():
            found[f"codecarbon.{part}_{name}"] = Number(
                value, unit, "modelled" if unit == "%" else kind,  # a share is of a total of mixed kinds
                Source(file, every, column), digits=decimals(value, 2),
            )  # fmt: skip
    return found


# --- cost ---------------------------------------------------------------------------------------------------

SETS = {
    "figures 2-4": "figures", "figures 2-4, published sizes": "figures_published", "campaign": "campaign"
}  # fmt: skip


def cost_numbers(costs: pd.DataFrame, file: str) -> Numbers:
    """Time and energy of each set of records and of the study's protocol: ``cost.<set>.…``."""
    numbers: Numbers = {}
    for _, row in costs.iterrows():
        prefix = f"cost.{SETS.get(row['set'], row['set'])}"
        numbers |= {
            f"{prefix}.{name}": Number(int(row[name]), "", "constant", Source(file, row["set"], name))
            for name in ("configurations", "records", "out_of_memory", "processes")
        }
        numbers |= _amounts(row, prefix, file)
    starts = costs["start_up_s"].dropna()
    if len(starts):
        source = Source(file, "campaign", "start_up_s: shortest pause between two processes")
        numbers["cost.start_up"] = Number(float(starts.iloc[0]), "s", "measured", source)
    return numbers


def _amounts(row: pd.Series, prefix: str, file: str) -> Numbers:
    """Hours, minutes, watt-hours and ratios of one set."""
    ours = str(row["kind"])
    columns: dict[str, tuple[str, float, str, str]] = {
        "time": ("gpu_s", 1 / 60, "min", ours),
        "idle_time": ("idle_s", 1 / 60, "min", ours),
        "warmup_time": ("warmup_s", 1 / 60, "min", ours),
        "measured_time": ("measured_s", 1 / 60, "min", ours),
        "energy": ("gpu_energy_Wh", 1e-3, "kWh", ours),
        "protocol_time": ("protocol_gpu_s", 1 / 3600, "h", "modelled"),
        "protocol_energy": ("protocol_gpu_energy_Wh", 1e-3, "kWh", "modelled"),
        "ratio_time": ("ratio_gpu_s", 1, "", "modelled"),
        "ratio_energy": ("ratio_gpu_energy", 1, "", "modelled"),
        "ratio_time_one_pass": ("ratio_gpu_s_one_pass", 1, "", "modelled"),
        "ratio_time_with_start_up": ("ratio_gpu_s_with_start_up", 1, "", "modelled"),
    }
    found = {}
    for name, (column, factor, unit, kind) in columns.items():
        value = factor * float(row[column])
        if isfinite(value):
            found[f"{prefix}.{name}"] = Number(
                value, unit, kind, Source(file, row["set"], column),  # type: ignore[arg-type]
                _protocol_interval(row, factor) if name == "protocol_time" else None, decimals(value, 2),
            )  # fmt: skip
    return found


def _protocol_interval(row: pd.Series, factor: float) -> tuple[float, float] | None:
    value, half = factor * float(row["protocol_gpu_s"]), factor * float(row["protocol_gpu_s_ci95"])
    return (value - half, value + half) if isfinite(half) else None


def check_numbers(check: pd.DataFrame, file: str) -> Numbers:
    """How far the predicted protocol is from records that ran it."""
    if not len(check):
        return {}
    worst = check.iloc[int(check["difference_percent"].abs().argmax())]
    value = float(worst["difference_percent"])
    source = Source(file, str(worst["configuration_id"]), "predicted / measured − 1, of 2 + 5 whole videos")
    return {
        "cost.check.records": Number(len(check), "", "constant", source),
        "cost.check.difference_most": Number(value, "%", "modelled", source, digits=decimals(value, 2)),
    }


def carbon_numbers(carbon: pd.DataFrame, grids: Mapping[str, Grid], file: str) -> Numbers:
    """Intensities of the grids, and emissions of figures 2–4 and of the campaign on each."""
    numbers = {
        f"cost.grid.{key}.intensity": Number(
            grid.gco2e_per_kWh, "gCO₂e/kWh", "constant",
            Source(f"{GRIDS_FILE.as_posix()} ({grid.url})", key, "gco2e_per_kWh"), digits=0,
        )
        for key, grid in grids.items()
    }  # fmt: skip
    for _, row in carbon[carbon["set"].isin(SETS)].iterrows():
        for name in ("gco2e", "protocol_gco2e"):
            value = float(row[name])
            if isfinite(value):
                key = f"cost.{SETS[row['set']]}.{row['grid']}.{name}"
                source = Source(file, f"{row['set']}, {row['grid']}", name)
                numbers[key] = Number(value, "gCO₂e", "modelled", source, digits=decimals(value, 2))
    return numbers


def _of(file: str, row: pd.Series, column: str) -> Source:
    parts = (row["experiment"], row["configuration_id"], row["protocol"])
    return Source(file, " ".join(str(part) for part in parts), column)
