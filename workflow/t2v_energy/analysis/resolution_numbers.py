"""The numbers that the paper's text takes from experiment ``resolution``, its records and the study.

Keys begin with what they are about: ``setup``, ``protocol``, ``validity``, ``study`` (printed by the study),
``resolution``.  A number that a campaign cannot give (no counter, a size not measured) is left out; a text
that asks for it does not compile.
"""

from __future__ import annotations

from itertools import pairwise
from math import hypot, isfinite, isnan, log

import pandas as pd

from t2v_energy.analysis.conditions import slow_generations
from t2v_energy.analysis.facts import Facts
from t2v_energy.analysis.numbers import Kind, Number, Source, decimals, with_half_width
from t2v_energy.analysis.sweep import Efficiency, Sweep, board_means, local_exponent, pass_means
from t2v_energy.analysis.tables import mape_percent
from t2v_energy.errors import UserError
from t2v_energy.measurement import validity
from t2v_energy.work import paper

Numbers = dict[str, Number]
STUDY = "arXiv:2509.19222"
NORMAL_95 = 1.96
DESCRIBED_SIZES = ((480, 832), (720, 1280))
EXPONENT_SIZES = ((256, 256), *DESCRIBED_SIZES)
STAGES = ("denoiser", "vae_decode", "text_encoder")
FITTED = ("paper_refitted", "single_mu")
QUANTITIES = {"latency_s": "s", "gpu_energy_Wh": "Wh"}


def resolution_numbers(sweep: Sweep, table: pd.DataFrame, table_file: str, facts: Facts) -> Numbers:
    """Every number of the part ``resolution``.

    Args:
        sweep: the measured rows.
        table: table 3; ``table_file`` is where it is written.
        facts: of the experiment's records.

    Raises:
        UserError: two of them have one key, or the sweep does not hold frames and steps fixed.
    """
    parts = (
        study_numbers(),
        setup_numbers(facts),
        protocol_numbers(facts),
        validity_numbers(),
        _sweep_numbers(sweep),
        *(_size_numbers(sweep, label, row) for label, row in _named_rows(sweep).items()),
        _range_numbers(sweep),
        _exponent_numbers(sweep),
        _spread_numbers(sweep),
        _board_numbers(sweep),
        _condition_numbers(sweep, facts),
        _slow_numbers(facts),
        _efficiency_numbers(sweep),
        _one_board_numbers(sweep),
        _error_numbers(sweep, table, table_file),
        _work_numbers(sweep),
    )
    merged: Numbers = {}
    for part in parts:
        if twice := sorted(merged.keys() & part.keys()):
            raise UserError(f"numbers are given twice: {', '.join(twice)}")
        merged |= part
    return merged


# --- printed by others, set by us ---------------------------------------------------------------------------


def study_numbers() -> Numbers:
    """What the study prints."""
    mape, table4 = "table 3, Resolution scaling", "table 4, WAN2.1-T2V-1.3B"
    return {
        "study.gpu": _printed("NVIDIA H100 SXM", "", "section 4.1", "hardware"),
        "study.efficiency": _printed(paper.EFFICIENCY, "", "table 5", "µ", 3),
        "study.r2": _printed(0.998, "", "section 3.4", "R²", 3),
        "study.peak": _printed(paper.PEAK_FLOP_PER_S / 1e12, "TFLOP/s", "section 3.4", "Θ_peak"),
        "study.power": _printed(paper.MAX_POWER_W, "W", "table 5", "P_max"),
        "study.layers": _printed(paper.LAYERS, "", "table 5", "N"),
        "study.width": _printed(paper.WIDTH, "", "table 5", "d"),
        "study.inner_width": _printed(paper.MLP_EXPANSION * paper.WIDTH, "", "table 5", "f · d"),
        "study.mape_latency": _printed(14.0, "%", mape, "Latency", 1),
        "study.mape_energy": _printed(11.6, "%", mape, "Energy", 1),
        "study.latency": _printed(410, "s", table4, "Latency (s)"),
        "study.gpu_energy": _printed(78.8, "Wh", table4, "GPU (Wh)", 1),
        "study.largest": _printed("1980×3520", "", "section 4.2", "Spatial resolution (height × width)"),
        "study.doubling": _printed(4, "", "section 6", "doubling any of these dimensions in isolation"),
        "study.doubling_both": _printed(16, "", "section 6", "H and W doubled"),
        "study.warmups": _printed(2, "", "section 4.1", "warmup iterations"),
        "study.repetitions": _printed(5, "", "section 4.1", "repeated runs"),
    }


def setup_numbers(facts: Facts) -> Numbers:
    """Machine and software of the records."""
    names = {
        "setup.gpu": (facts.gpu, "environment.gpu.name"),
        "setup.driver": (facts.driver, "environment.gpu.driver"),
        "setup.cpu": (facts.cpu, "environment.cpu"),
        "setup.cpu_method": (facts.cpu_method.replace("_", " "), "codecarbon.cpu_method"),
        "setup.kernel": (facts.kernels, "attention_kernels.denoiser"),
        "setup.torch": (facts.versions.get("torch"), "environment.versions.torch"),
        "setup.diffusers": (facts.versions.get("diffusers"), "environment.versions.diffusers"),
        "setup.codecarbon": (facts.versions.get("codecarbon"), "environment.versions.codecarbon"),
    }
    numbers = {
        key: Number(name, "", "constant", _records(facts, column))
        for key, (name, column) in names.items()
        if name
    }
    numbers["setup.passes"] = Number(facts.passes, "", "constant", _records(facts, "pass_index"))
    numbers["setup.between"] = Number(
        facts.between_min, "min", "measured", _records(facts, "origin.utc: last end − first")
    )
    if facts.boards:
        source = _records(facts, "environment.gpu.uuid: distinct")
        numbers["setup.boards"] = Number(facts.boards, "", "constant", source)
    if facts.power_limit_W is not None:
        source = _records(facts, "environment.gpu.power_limit_W")
        numbers["setup.power_limit"] = Number(facts.power_limit_W, "W", "constant", source)
    if facts.tick_s is not None:
        source = _records(facts, "ticks.time_s: median difference")
        numbers["setup.tick"] = Number(1000 * facts.tick_s, "ms", "measured", source)
    if facts.measuring_Wh is not None:
        costs = {
            "time": (facts.measuring_s / 60, "min", "windows: last end − first start"),
            "energy": (facts.measuring_Wh, "Wh", "ticks.energy_mJ: last − first"),
        }
        for name, (value, unit, column) in costs.items():
            source, digits = _records(facts, column), decimals(value, 3)
            numbers[f"setup.measuring_{name}"] = Number(value, unit, "measured", source, digits=digits)
    return numbers


def protocol_numbers(facts: Facts) -> Numbers:
    """How the protocol ``sampled`` was set, from the records' own copy."""
    sampled = facts.protocol_settings["sampled"]

    def setting(value: float, unit: str, name: str) -> Number:
        source = _records(facts, f"protocol_settings.{name}")
        return Number(value, unit, "constant", source, digits=_shortest(value))

    return {
        "protocol.idle": setting(facts.protocol_settings["idle_s"], "s", "idle_s"),
        "protocol.sample_rate": setting(facts.protocol_settings["sample_hz"], "Hz", "sample_hz"),
        "protocol.poll": setting(1000 * facts.protocol_settings["poll_s"], "ms", "poll_s"),
        "protocol.min_steps": setting(sampled["min_steps"], "", "sampled.min_steps"),
        "protocol.min_window": setting(sampled["min_window_s"], "s", "sampled.min_window_s"),
        "protocol.generations": setting(sampled["generations"], "", "sampled.generations"),
        "protocol.max_generations": setting(sampled["max_generations"], "", "sampled.max_generations"),
        "protocol.step_sem": setting(sampled["max_step_sem_percent"], "%", "sampled.max_step_sem_percent"),
        "protocol.ci95": setting(sampled["max_ci95_percent"], "%", "sampled.max_ci95_percent"),
    }


def validity_numbers() -> Numbers:
    """The limits that a record must keep."""
    limits = {
        "validity.unspanned": (validity.MAX_UNSPANNED_PERCENT, "%", "MAX_UNSPANNED_PERCENT"),
        "validity.closure": (validity.MAX_CLOSURE_PERCENT, "%", "MAX_CLOSURE_PERCENT"),
        "validity.closure_window": (validity.MIN_CLOSURE_S, "s", "MIN_CLOSURE_S"),
        "validity.step_sem": (validity.MAX_STEP_SEM_PERCENT, "%", "MAX_STEP_SEM_PERCENT"),
    }
    file = "workflow/t2v_energy/measurement/validity.py"
    return {
        key: Number(value, unit, "constant", Source(file, name, "value"), digits=_shortest(value))
        for key, (value, unit, name) in limits.items()
    }


# --- the sweep ----------------------------------------------------------------------------------------------


def _sweep_numbers(sweep: Sweep) -> Numbers:
    source = Source(sweep.source, "experiment=resolution, status=ok", "height, width")
    sizes = len(sweep.rows[["height", "width"]].drop_duplicates())
    numbers = {
        "resolution.sizes": Number(sizes, "", "constant", source),
        "resolution.frames": Number(sweep.fixed("num_frames"), "", "constant", source),
        "resolution.steps": Number(sweep.fixed("num_inference_steps"), "", "constant", source),
        "resolution.generations_least": Number(int(sweep.rows["latency_s_n"].min()), "", "constant", source),
        "resolution.generations_most": Number(int(sweep.rows["latency_s_n"].max()), "", "constant", source),
        "resolution.flagged": Number(int(sweep.rows["flags"].notna().sum()), "", "constant", source),
        "resolution.unspanned": _extreme(sweep, "unspanned_percent", "max", "%"),
    }
    if sweep.has_gpu_energy:
        numbers |= _counter_numbers(sweep)
    for label, row in (("smallest", sweep.rows.iloc[0]), ("largest", sweep.rows.iloc[-1])):
        where = Source(sweep.source, row_label(row), "height, width")
        numbers[f"resolution.{label}"] = Number(f"{row['height']}×{row['width']}", "", "constant", where)
    return numbers


def _counter_numbers(sweep: Sweep) -> Numbers:
    """Range of mean power, and CodeCarbon's GPU energy against the counter's over the same stretch."""
    rows = sweep.rows
    difference = 100 * (rows["codecarbon_window_energy_Wh"] / rows["counter_window_energy_Wh"] - 1).abs()
    numbers = {
        "resolution.power_least": _extreme(sweep, "mean_power_W", "min", "W", significant=3),
        "resolution.power_most": _extreme(sweep, "mean_power_W", "max", "W", significant=3),
    }
    least, most = float(rows["mean_power_W"].min()), float(rows["mean_power_W"].max())
    if most > 0:
        column = "1 − least / largest mean_power_W"
        source = Source(sweep.source, "experiment=resolution, status=ok", column)
        value = 100 * (1 - least / most)
        numbers["resolution.power_range"] = Number(value, "%", "measured", source, digits=1)
    if difference.notna().any():
        row = rows.iloc[int(difference.argmax())]
        source = Source(
            sweep.source, row_label(row), "codecarbon_window_energy_Wh / counter_window_energy_Wh − 1"
        )
        value = float(difference.max())
        numbers["resolution.codecarbon_difference"] = Number(
            value, "%", "measured", source, digits=decimals(value, 2)
        )
    return numbers


def _named_rows(sweep: Sweep) -> dict[str, pd.Series]:
    rows = {"smallest": sweep.rows.iloc[0], "largest": sweep.rows.iloc[-1]}
    for height, width in DESCRIBED_SIZES:
        row = sweep.at(height, width)
        if row is not None:
            rows[f"{height}x{width}"] = row
    return rows


def _size_numbers(sweep: Sweep, label: str, row: pd.Series) -> Numbers:
    """Costs and shares of one size."""

    def source(column: str) -> Source:
        return Source(sweep.source, row_label(row), column)

    def key(name: str) -> str:
        return f"resolution.{label}.{name}"

    numbers: Numbers = {}
    for quantity, unit in QUANTITIES.items():
        if not isnan(row[quantity]):
            name = quantity.rsplit("_", 1)[0]
            numbers[key(name)] = with_half_width(
                float(row[quantity]), float(row[f"{quantity}_ci95"]), unit, "measured", source(quantity)
            )
    step = float(row["step_time_s"])
    half = step * float(row["step_time_sem_percent"]) / 100 * NORMAL_95
    numbers[key("step_time")] = with_half_width(step, half, "s", "measured", source("step_time_s"))
    others = {
        "step_energy": ("step_energy_J", 1.0, "J", 4),
        "power": ("mean_power_W", 1.0, "W", 3),
        "mfu": ("mfu", 100.0, "%", 3),
        **{f"{stage}_time": (f"{stage}_time_share", 100.0, "%", 3) for stage in STAGES},
        **{f"{stage}_energy": (f"{stage}_energy_share", 100.0, "%", 3) for stage in STAGES},
    }
    for name, (column, factor, unit, significant) in others.items():
        value = float(row.get(column, float("nan"))) * factor
        if not isnan(value):
            digits = min(decimals(value, significant), 2)
            kind: Kind = "modelled" if name == "mfu" else "measured"  # its work is counted, not measured
            numbers[key(name)] = Number(value, unit, kind, source(column), digits=digits)
    return numbers


def _range_numbers(sweep: Sweep) -> Numbers:
    """How many times the dearest size costs what the cheapest does."""
    numbers = {}
    for quantity in QUANTITIES:
        values = sweep.rows[quantity]
        if values.isna().any():
            continue
        cheap, dear = sweep.rows.iloc[int(values.argmin())], sweep.rows.iloc[int(values.argmax())]
        ratio = float(dear[quantity] / cheap[quantity])
        half = ratio * hypot(*(float(row[f"{quantity}_ci95"] / row[quantity]) for row in (cheap, dear)))
        source = Source(sweep.source, f"{row_label(dear)} / {row_label(cheap)}", quantity)
        numbers[f"resolution.range.{quantity.rsplit('_', 1)[0]}"] = with_half_width(
            ratio, half, "", "measured", source, significant=3
        )
    first, last = sweep.rows.iloc[0], sweep.rows.iloc[-1]
    source = Source(sweep.source, f"{row_label(last)} / {row_label(first)}", "height × width")
    pixels = float(last["pixels"] / first["pixels"])
    numbers["resolution.range.pixels"] = Number(pixels, "", "constant", source, digits=decimals(pixels, 3))
    return numbers


def _exponent_numbers(sweep: Sweep) -> Numbers:
    """Local slopes of log cost over log tokens between named sizes: measured, of true work, and their lag.

    Tokens are proportional to H · W at a fixed number of frames.
    """
    numbers: Numbers = {}
    rows = [(size, sweep.at(*size)) for size in EXPONENT_SIZES]
    known = [(f"{h}x{w}", row) for (h, w), row in rows if row is not None]
    for (first, a), (second, b) in pairwise(known):
        works = (sweep.work("true", a), sweep.work("true", b))
        tokens = (float(works[0].tokens), float(works[1].tokens))
        prefix = f"resolution.exponent.{first}.{second}"
        where = f"{row_label(a)} to {row_label(b)}"
        for quantity in QUANTITIES:
            slope, half = local_exponent(a, b, quantity, tokens)
            if isfinite(slope):
                numbers[f"{prefix}.{quantity.rsplit('_', 1)[0]}"] = with_half_width(
                    slope,
                    half,
                    "",
                    "measured",
                    Source(sweep.source, where, f"{quantity} over tokens"),
                    significant=3,
                )
        numbers |= _exponents_of_boards(sweep, a, b, prefix)
        slope = log(works[1].total_flop / works[0].total_flop) / log(tokens[1] / tokens[0])
        source = Source("t2v_energy.work.true_work", where, "total_flop over tokens")
        numbers[f"{prefix}.work"] = Number(slope, "", "modelled", source, digits=2)
        if (latency := numbers.get(f"{prefix}.latency")) is not None:
            lag = slope - float(latency.value)
            source = Source(sweep.source, where, "total_flop over tokens − latency_s over tokens")
            numbers[f"{prefix}.lag"] = Number(lag, "", "modelled", source, digits=2)
    return numbers


def _exponents_of_boards(sweep: Sweep, first: pd.Series, second: pd.Series, prefix: str) -> Numbers:
    """Least and largest exponent of latency among the boards that measured both sizes."""
    ends = (board_means(first, "latency_s"), board_means(second, "latency_s"))
    distance = log(float(second["pixels"]) / float(first["pixels"]))
    slopes = [log(ends[1][uuid] / ends[0][uuid]) / distance for uuid in ends[0].keys() & ends[1].keys()]
    where = f"{row_label(first)} to {row_label(second)}, {len(slopes)} boards"
    source = Source(sweep.source, where, "latency_s_pass_means over height × width, by gpu_uuids")
    found = {"least": min(slopes), "most": max(slopes)} if len(slopes) > 1 else {}
    return {
        f"{prefix}.latency_{name}": Number(slope, "", "measured", source, digits=2)
        for name, slope in found.items()
    }


# --- passes and boards --------------------------------------------------------------------------------------


def _spread_numbers(sweep: Sweep) -> Numbers:
    """How far the passes lie apart over all sizes and at the named ones, beside the scatter of repetition."""
    numbers: Numbers = {}
    rows, everywhere = sweep.rows, "experiment=resolution, status=ok"
    for quantity in QUANTITIES:
        name, column = quantity.rsplit("_", 1)[0], f"{quantity}_pass_spread_percent"
        if not rows[column].notna().any():
            continue
        source = Source(sweep.source, everywhere, f"median of {column}")
        median = float(rows[column].median())
        numbers[f"resolution.spread.{name}_median"] = Number(median, "%", "measured", source, digits=1)
        most = _extreme(sweep, column, "max", "%")
        numbers[f"resolution.spread.{name}_most"] = most
        source = Source(sweep.source, everywhere, f"median of {quantity}_std / {quantity}")
        scatter = float((100 * rows[f"{quantity}_std"] / rows[quantity]).median())
        if isfinite(scatter):
            digits = decimals(scatter, 2)
            numbers[f"resolution.repetition.{name}"] = Number(scatter, "%", "measured", source, digits=digits)
        for label, named in _named_rows(sweep).items():
            value = float(named[column])
            if isfinite(value):
                where = Source(sweep.source, row_label(named), column)
                numbers[f"resolution.{label}.{name}_spread"] = Number(value, "%", "measured", where, digits=1)
    height, width = DESCRIBED_SIZES[-1]
    if (row := sweep.at(height, width)) is not None:
        for quantity, unit in QUANTITIES.items():
            for number, mean in enumerate(pass_means(row, quantity), 1):
                key = f"resolution.{height}x{width}.{quantity.rsplit('_', 1)[0]}_pass{number}"
                where = Source(sweep.source, row_label(row), f"{quantity}_pass_means, {number}")
                numbers[key] = Number(mean, unit, "measured", where, digits=decimals(mean, 4))
    smallest = sweep.rows.iloc[0]
    pairs = zip(pass_means(smallest, "gpu_energy_Wh"), pass_means(smallest, "latency_s"), strict=False)
    for number, (energy, latency) in enumerate(pairs, 1):
        where = Source(sweep.source, row_label(smallest), f"gpu_energy_Wh / latency_s of pass {number}")
        numbers[f"resolution.smallest.power_pass{number}"] = Number(
            3600 * energy / latency, "W", "measured", where
        )
    return numbers


def _board_numbers(sweep: Sweep) -> Numbers:
    """Latency of the first pass against the second's, by the pair of boards that they ran on.

    Pairs are called a, b, … in the order of how many sizes they have.  The smallest size is left out: what
    it shows is the host (:func:`_slow_numbers`).
    """
    numbers: Numbers = {}
    pairs: dict[str, list[float]] = {}
    for _, row in sweep.rows.iloc[1:].iterrows():
        means, uuids = pass_means(row, "latency_s"), str(row["gpu_uuids"])
        if len(means) == 2 and len(set(uuids.split(";"))) == 2:
            pairs.setdefault(uuids, []).append(100 * (means[0] / means[1] - 1))
    ordered = sorted(pairs.items(), key=lambda pair: (-len(pair[1]), pair[0]))
    for label, (uuids, differences) in zip("abcdefgh", ordered, strict=False):
        source = Source(sweep.source, f"gpu_uuids={uuids}, all but the smallest size", "latency_s_pass_means")
        prefix = f"resolution.boards.{label}"
        numbers[f"{prefix}.sizes"] = Number(len(differences), "", "constant", source)
        for name, value in (("least", min(differences)), ("most", max(differences))):
            numbers[f"{prefix}.{name}"] = Number(value, "%", "measured", source, digits=1)
    return numbers


def _condition_numbers(sweep: Sweep, facts: Facts) -> Numbers:
    """Temperature, clock and power cap during the denoising loops, and the clock at some sizes."""
    rows = facts.generations
    numbers: Numbers = {}
    whole = {
        "temperature_least": (rows["temperature_least_C"].min(), "°C", "temperature_C: least"),
        "temperature_most": (rows["temperature_most_C"].max(), "°C", "temperature_C: largest"),
        "clock_least": (rows["clock_least_MHz"].min(), "MHz", "sm_clock_MHz: least"),
        "clock_most": (rows["clock_most_MHz"].max(), "MHz", "sm_clock_MHz: largest"),
    }
    for name, (value, unit, column) in whole.items():
        if isfinite(value):
            source = _records(facts, f"samples.{column} within the denoising loops")
            numbers[f"conditions.{name}"] = Number(float(value), unit, "measured", source)

    capped, weights = rows["capped_percent"].dropna(), rows["samples"][rows["capped_percent"].notna()]
    if weights.sum() > 0:
        source = _records(facts, "samples.throttle_reasons & 4 within the denoising loops")
        value = float((capped * weights).sum() / weights.sum())
        numbers["conditions.capped"] = Number(value, "%", "measured", source)

    def clock(height: int, width: int, key: str, pass_index: int | None = None) -> None:
        of_size = rows[(rows["height"] == height) & (rows["width"] == width)]
        if pass_index is not None:
            of_size = of_size[of_size["pass_index"] == pass_index]
        value = float(of_size["clock_median_MHz"].mean())
        if isfinite(value):
            where = f"{height}×{width}" + (f", pass {pass_index}" if pass_index is not None else "")
            source = Source(facts.folder, where, "samples.sm_clock_MHz: mean of the loops' medians")
            numbers[key] = Number(value, "MHz", "measured", source)

    for label, row in (("smallest", sweep.rows.iloc[0]), ("largest", sweep.rows.iloc[-1])):
        clock(int(row["height"]), int(row["width"]), f"conditions.{label}.clock")
    height, width = DESCRIBED_SIZES[-1]
    for pass_index in (1, 2):
        clock(height, width, f"conditions.{height}x{width}.clock_pass{pass_index}", pass_index)
    return numbers


def _slow_numbers(facts: Facts) -> Numbers:
    """The one record that has slow generations: how slow, and at which power and clock."""
    rows = slow_generations(facts.generations)
    if rows["record"].nunique() != 1:
        return {}
    slow, rest = rows[rows["slow"]], rows[~rows["slow"]]
    record = rows["record"].iloc[0]

    def number(value: float, unit: str, column: str) -> Number:
        source = Source(facts.folder, record, column)
        return Number(float(value), unit, "measured" if unit else "constant", source)

    excess = 100 * (slow["step_s"].mean() / rest["step_s"].mean() - 1)
    found = {
        "slow.generations": number(len(slow), "", "generations with a mean step above 1.1 × the median"),
        "slow.of": number(len(rows), "", "generations"),
        "slow.step_excess": number(excess, "%", "mean step time: slow / other generations − 1"),
    }
    for name, part in (("slow", slow), ("rest", rest)):
        if isfinite(part["power_W"].mean()):
            column = f"samples.power_instant_W: {name} generations"
            found[f"slow.power_{name}"] = number(part["power_W"].mean(), "W", column)
    if isfinite(slow["clock_least_MHz"].min()):
        found["slow.clock_least"] = number(slow["clock_least_MHz"].min(), "MHz", "samples.sm_clock_MHz: slow")
    return found


def _one_board_numbers(sweep: Sweep) -> Numbers:
    """µ and errors of the two fitted predictors on the board that measured most sizes, alone."""
    if len(sweep.boards) < 2:
        return {}
    uuid, board = next(iter(sweep.boards.items()))
    if len(board.rows) < 2:
        return {}
    where = f"experiment=resolution, {uuid}"
    source = Source(sweep.source, where, "latency_s_pass_means over FLOP")
    numbers = {"resolution.one_board.sizes": Number(len(board.rows), "", "constant", source)}
    for key in FITTED:
        fit = board.predictors[key].fit
        assert fit is not None
        numbers[f"resolution.one_board.{key}.efficiency"] = _fitted(fit, source)
        error = mape_percent(board.predicted(key, "latency_s"), board.rows["latency_s"])
        numbers[f"resolution.one_board.{key}.mape_latency"] = Number(error, "%", "modelled", source, digits=1)
    return numbers


# --- predictions --------------------------------------------------------------------------------------------


def _efficiency_numbers(sweep: Sweep) -> Numbers:
    """The two fitted µ with intervals and R², and the peak and power that they go with."""
    accelerator = sweep.accelerator
    where = "config/accelerators.yaml"
    numbers = {
        "setup.peak": Number(
            accelerator.peak_bf16_dense_TFLOPs, "TFLOP/s", "constant",
            Source(where, accelerator.title, "peak_bf16_dense_TFLOPs"),
        ),
        "setup.board_power": Number(
            accelerator.board_power_W, "W", "constant", Source(where, accelerator.title, "board_power_W")
        ),
    }  # fmt: skip
    for key in FITTED:
        fit = sweep.predictors[key].fit
        assert fit is not None
        source = Source(
            sweep.source, f"experiment=resolution, status=ok ({fit.n} rows)", "latency_s over FLOP"
        )
        numbers[f"resolution.{key}.efficiency"] = _fitted(fit, source)
        if fit.r2 > 0:
            digits = 4 if fit.r2 > 0.995 else 3
            numbers[f"resolution.{key}.r2"] = Number(fit.r2, "", "modelled", source, digits=digits)
    return numbers


def _fitted(fit: Efficiency, source: Source) -> Number:
    interval = (fit.low, fit.high) if isfinite(fit.high) else None
    return Number(fit.value, "", "modelled", source, interval, digits=decimals(fit.value, 3))


def _error_numbers(sweep: Sweep, table: pd.DataFrame, table_file: str) -> Numbers:
    """Errors of the two fitted predictors: mean absolute ones, and latency's signed one at either end."""
    numbers = {}
    for _, line in table[(table["set"] == "resolution") & table["predictor"].isin(FITTED)].iterrows():
        source = Source(table_file, f"resolution, {line['predictor']}, {line['quantity']}", "mape_percent")
        key = f"resolution.{line['predictor']}.mape_{line['quantity'].rsplit('_', 1)[0]}"
        numbers[key] = Number(float(line["mape_percent"]), "%", "modelled", source, digits=1)
    for predictor in FITTED:
        error = 100 * (sweep.predicted(predictor, "latency_s") / sweep.rows["latency_s"] - 1)
        for label, place in (("smallest", 0), ("largest", -1)):
            row, column = row_label(sweep.rows.iloc[place]), f"latency_s: {predictor} / measured − 1"
            numbers[f"resolution.{predictor}.error_{label}"] = Number(
                float(error.iloc[place]), "%", "modelled", Source(sweep.source, row, column), digits=1
            )
    return numbers


def _work_numbers(sweep: Sweep) -> Numbers:
    """FLOP of one denoiser pass by the two counts, attention's part of it, and the true architecture."""
    transformer = sweep.model.components["transformer"].config
    file = f"config/models/{sweep.model.key}.yaml"
    width = int(transformer["num_attention_heads"]) * int(transformer["attention_head_dim"])
    numbers = {
        "model.layers": Number(
            transformer["num_layers"], "", "constant", Source(file, "transformer", "num_layers")
        ),
        "model.width": Number(width, "", "constant", Source(file, "transformer", "heads × head dimension")),
        "model.inner_width": Number(
            transformer["ffn_dim"], "", "constant", Source(file, "transformer", "ffn_dim")
        ),
        "model.text_tokens": Number(
            sweep.model.tokenizer.max_length, "", "constant", Source(file, "tokenizer", "max_length")
        ),
    }
    for height, width in EXPONENT_SIZES:
        if (row := sweep.at(height, width)) is not None:
            work = sweep.work("true", row)
            share = 100 * work.attention_flop / work.total_flop
            source = Source("t2v_energy.work.true_work", row_label(row), "attention_flop / total_flop")
            numbers[f"resolution.{height}x{width}.attention_flop"] = Number(
                share, "%", "modelled", source, digits=decimals(share, 3)
            )
    height, width = DESCRIBED_SIZES[-1]
    if (row := sweep.at(height, width)) is not None:
        numbers |= _pass_numbers(sweep, row, f"resolution.{height}x{width}")
    return numbers


def _pass_numbers(sweep: Sweep, row: pd.Series, prefix: str) -> Numbers:
    """One denoiser pass by the two counts, their excess over a whole video, and the VAE's part of that."""
    true, study = sweep.work("true", row), sweep.work("study", row)
    passes = {
        "flop_true": (true.flop_per_denoiser_call / 1e15, "PFLOP", "t2v_energy.work.true_work"),
        "flop_study": (study.flop_per_denoiser_call / 1e15, "PFLOP", "t2v_energy.work.paper_work"),
        "vae_flop": (100 * true.flop["vae"] / true.total_flop, "%", "t2v_energy.work.true_work"),
        "flop_excess": (100 * (study.total_flop / true.total_flop - 1), "%", "t2v_energy.work"),
    }
    return {
        f"{prefix}.{name}": Number(
            value, unit, "modelled", Source(function, row_label(row), name), digits=decimals(value, 3)
        )
        for name, (value, unit, function) in passes.items()
    }


# --- small helpers ------------------------------------------------------------------------------------------


def row_label(row: pd.Series) -> str:
    """How a row of configurations.csv is named as a source: experiment, configuration, protocol, kernel."""
    parts = (row["experiment"], row["configuration_id"], row["protocol"], row["attention_kernel"])
    return " ".join(str(part) for part in parts)


def _printed(value: float | str, unit: str, row: str, column: str, digits: int = 0) -> Number:
    return Number(value, unit, "constant", Source(STUDY, row, column), digits=digits)


def _records(facts: Facts, column: str) -> Source:
    return Source(facts.folder, f"all {facts.records} records", column)


def _extreme(sweep: Sweep, column: str, how: str, unit: str, significant: int = 2) -> Number:
    """The least (``how="min"``) or largest (``"max"``) measured value of a column."""
    row = sweep.rows.iloc[int(getattr(sweep.rows[column], f"arg{how}")())]
    value = float(row[column])
    source = Source(sweep.source, row_label(row), column)
    return Number(value, unit, "measured", source, digits=decimals(value, significant))


def _shortest(value: float) -> int:
    """Decimals of a value that was set by hand."""
    return len(f"{value:.6f}".rstrip("0").partition(".")[2])
