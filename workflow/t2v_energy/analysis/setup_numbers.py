"""Numbers of the text beside the costs: what the study prints, machine, protocol, conditions.

Keys begin with what they are about: ``study``, ``setup``, ``protocol``, ``validity``, ``conditions``,
``slow``.  A number that a campaign cannot give is left out; a text that asks for it does not compile.
"""

from __future__ import annotations

from math import isfinite

from t2v_energy.analysis.conditions import slow_generations
from t2v_energy.analysis.facts import Facts
from t2v_energy.analysis.number_parts import Numbers
from t2v_energy.analysis.numbers import Number, Source, decimals
from t2v_energy.analysis.sweep import Sweep
from t2v_energy.config import Accelerator
from t2v_energy.measurement import validity
from t2v_energy.work import paper

STUDY = "arXiv:2509.19222"
STUDY_MAPE = (
    ("", "Resolution scaling", 14.0, 11.6),
    ("frames.", "Temporal length", 10.5, 6.6),
    ("steps.", "Denoising steps", 1.9, 1.9),
)
"""Table 3 as printed: what the keys say of the set, row, error of latency and of energy (%)."""


def study_numbers() -> Numbers:
    """What the study prints."""
    table4 = "table 4, WAN2.1-T2V-1.3B"
    return {
        "study.gpu": _printed("NVIDIA H100 SXM", "", "section 4.1", "hardware"),
        "study.efficiency": _printed(paper.EFFICIENCY, "", "table 5", "µ", 3),
        "study.r2": _printed(0.998, "", "section 3.4", "R²", 3),
        "study.peak": _printed(paper.PEAK_FLOP_PER_S / 1e12, "TFLOP/s", "section 3.4", "Θ_peak"),
        "study.power": _printed(paper.MAX_POWER_W, "W", "table 5", "P_max"),
        "study.layers": _printed(paper.LAYERS, "", "table 5", "N"),
        "study.width": _printed(paper.WIDTH, "", "table 5", "d"),
        "study.inner_width": _printed(paper.MLP_EXPANSION * paper.WIDTH, "", "table 5", "f · d"),
        **{
            f"study.{name}mape_{quantity}": _printed(value, "%", f"table 3, {row}", column, 1)
            for name, row, latency, energy in STUDY_MAPE
            for quantity, column, value in (("latency", "Latency", latency), ("energy", "Energy", energy))
        },
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


def accelerator_numbers(accelerator: Accelerator) -> Numbers:
    """Peak and power that every µ and predicted energy go with."""
    file = "config/accelerators.yaml"
    values = {
        "setup.peak": (accelerator.peak_bf16_dense_TFLOPs, "TFLOP/s", "peak_bf16_dense_TFLOPs"),
        "setup.board_power": (accelerator.board_power_W, "W", "board_power_W"),
    }
    return {
        key: Number(value, unit, "constant", Source(file, accelerator.title, column))
        for key, (value, unit, column) in values.items()
    }


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


def condition_numbers(sweep: Sweep, facts: Facts, described: tuple[int, int]) -> Numbers:
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
    height, width = described
    for pass_index in (1, 2):
        clock(height, width, f"conditions.{height}x{width}.clock_pass{pass_index}", pass_index)
    return numbers


def slow_numbers(facts: Facts) -> Numbers:
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


def _printed(value: float | str, unit: str, row: str, column: str, digits: int = 0) -> Number:
    return Number(value, unit, "constant", Source(STUDY, row, column), digits=digits)


def _records(facts: Facts, column: str) -> Source:
    return Source(facts.folder, f"all {facts.records} records", column)


def _shortest(value: float) -> int:
    """Decimals of a value that was set by hand."""
    return len(f"{value:.6f}".rstrip("0").partition(".")[2])
