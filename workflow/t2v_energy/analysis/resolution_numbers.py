"""The numbers that the paper's text takes from experiment ``resolution``: keys ``resolution`` and ``model``.

A number that a campaign cannot give (no counter, a size not measured) is left out; a text that asks for it
does not compile.  Errors are of the µ that all sweeps share; ``resolution.<predictor>.efficiency`` is fitted
to this sweep alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from math import isfinite, log

import pandas as pd

from t2v_energy.analysis.number_parts import (
    FITTED,
    QUANTITIES,
    Numbers,
    board_numbers,
    cell_numbers,
    cost_numbers,
    counter_numbers,
    error_numbers,
    everywhere,
    extreme,
    fitted,
    mape_numbers,
    merged,
    own_efficiency_numbers,
    range_numbers,
    spread_numbers,
    stem,
)
from t2v_energy.analysis.numbers import Number, Source, decimals, with_half_width
from t2v_energy.analysis.sweep import Predictor, Sweep, board_means, local_exponent, pass_means, row_label
from t2v_energy.analysis.tables import mape_percent

DESCRIBED_SIZES = ((480, 832), (720, 1280))
EXPONENT_SIZES = ((256, 256), *DESCRIBED_SIZES)
STAGES = ("denoiser", "vae_decode", "text_encoder")
CELLS = {
    "step_energy": ("step_energy_J", 1.0, "J", 4),
    "power": ("mean_power_W", 1.0, "W", 3),
    "mfu": ("mfu", 100.0, "%", 3),
    **{f"{stage}_time": (f"{stage}_time_share", 100.0, "%", 3) for stage in STAGES},
    **{f"{stage}_energy": (f"{stage}_energy_share", 100.0, "%", 3) for stage in STAGES},
}


def resolution_numbers(
    sweep: Sweep, predictors: Mapping[str, Predictor], table: pd.DataFrame, table_file: str
) -> Numbers:
    """Every number of experiment ``resolution``.

    Args:
        sweep: the measured rows.
        predictors: with the µ that errors are of.
        table: table 3; ``table_file`` is where it is written.

    Raises:
        UserError: the sweep does not hold frames and steps fixed, or has a size twice.
    """
    named = _named_rows(sweep)
    return merged(
        _sweep_numbers(sweep),
        counter_numbers(sweep),
        *(cost_numbers(sweep, f"resolution.{label}", row) for label, row in named.items()),
        *(cell_numbers(sweep, f"resolution.{label}", row, CELLS) for label, row in named.items()),
        range_numbers(sweep),
        _pixel_numbers(sweep),
        _shape_numbers(sweep),
        _exponent_numbers(sweep),
        spread_numbers(sweep, named),
        _pass_numbers(sweep),
        # what the smallest size shows is the host (setup_numbers.slow_numbers), not the boards
        board_numbers(sweep, sweep.rows.iloc[1:], "all but the smallest size"),
        own_efficiency_numbers(sweep),
        _one_board_numbers(sweep),
        mape_numbers("resolution", table, table_file),
        error_numbers(sweep, predictors, "resolution", ("smallest", "largest")),
        _work_numbers(sweep),
    )


def _sweep_numbers(sweep: Sweep) -> Numbers:
    source = Source(sweep.source, everywhere(sweep), "height, width")
    counts = {
        "sizes": len(sweep.rows[["height", "width"]].drop_duplicates()),
        "frames": sweep.fixed("num_frames"),
        "steps": sweep.fixed("num_inference_steps"),
        "generations_least": int(sweep.rows["latency_s_n"].min()),
        "generations_most": int(sweep.rows["latency_s_n"].max()),
        "flagged": int(sweep.rows["flags"].notna().sum()),
    }
    numbers = {f"resolution.{name}": Number(value, "", "constant", source) for name, value in counts.items()}
    numbers["resolution.unspanned"] = extreme(sweep, "unspanned_percent", "max", "%")
    if len(sweep.failed):
        where = Source(sweep.source, "experiment=resolution, status=out_of_memory", "height, width")
        found = int((sweep.failed["status"] == "out_of_memory").sum())
        numbers["resolution.out_of_memory"] = Number(found, "", "constant", where)
    for label, row in (("smallest", sweep.rows.iloc[0]), ("largest", sweep.rows.iloc[-1])):
        where = Source(sweep.source, row_label(row), "height, width")
        numbers[f"resolution.{label}"] = Number(f"{row['height']}×{row['width']}", "", "constant", where)
    return numbers


def _named_rows(sweep: Sweep) -> dict[str, pd.Series]:
    rows = {"smallest": sweep.rows.iloc[0], "largest": sweep.rows.iloc[-1]}
    for height, width in DESCRIBED_SIZES:
        row = sweep.at(height, width)
        if row is not None:
            rows[f"{height}x{width}"] = row
    return rows


def _pixel_numbers(sweep: Sweep) -> Numbers:
    first, last = sweep.rows.iloc[0], sweep.rows.iloc[-1]
    source = Source(sweep.source, f"{row_label(last)} / {row_label(first)}", "height × width")
    pixels = float(last["pixels"] / first["pixels"])
    return {"resolution.range.pixels": Number(pixels, "", "constant", source, digits=decimals(pixels, 3))}


def _shape_numbers(sweep: Sweep) -> Numbers:
    """Latency and GPU energy of other shapes with just the pixels of 480×832, against it.

    Boards may differ between the rows, so a difference is of shape and board together.
    """
    reference = sweep.at(*DESCRIBED_SIZES[0])
    if reference is None:
        return {}
    same = sweep.rows[sweep.rows["pixels"] == reference["pixels"]]
    others = same[same["height"] != reference["height"]]
    if not len(others):
        return {}
    where = f"{', '.join(map(row_label, (row for _, row in others.iterrows())))} / {row_label(reference)}"
    numbers = {
        "resolution.shapes.count": Number(
            len(others), "", "constant", Source(sweep.source, where, "height, width")
        )
    }
    for quantity in QUANTITIES:
        difference = 100 * (others[quantity] / reference[quantity] - 1)
        if difference.notna().all():
            source = Source(sweep.source, where, f"{quantity}: ratio − 1")
            for name, value in (("least", difference.min()), ("most", difference.max())):
                key = f"resolution.shapes.{stem(quantity)}_{name}"
                numbers[key] = Number(float(value), "%", "measured", source, digits=1)
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
                numbers[f"{prefix}.{stem(quantity)}"] = with_half_width(
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


def _pass_numbers(sweep: Sweep) -> Numbers:
    """Each pass's cost at a described size, and its mean power at the smallest."""
    numbers: Numbers = {}
    height, width = DESCRIBED_SIZES[-1]
    if (row := sweep.at(height, width)) is not None:
        for quantity, unit in QUANTITIES.items():
            for number, mean in enumerate(pass_means(row, quantity), 1):
                key = f"resolution.{height}x{width}.{stem(quantity)}_pass{number}"
                where = Source(sweep.source, row_label(row), f"{quantity}_pass_means, {number}")
                numbers[key] = Number(mean, unit, "measured", where, digits=decimals(mean, 4))
    smallest = sweep.rows.iloc[0]
    pairs = zip(pass_means(smallest, "gpu_energy_Wh"), pass_means(smallest, "latency_s"), strict=False)
    for number, (energy, latency) in enumerate(pairs, 1):
        where = Source(sweep.source, row_label(smallest), f"gpu_energy_Wh / latency_s of pass {number}")
        value = 3600 * energy / latency
        numbers[f"resolution.smallest.power_pass{number}"] = Number(value, "W", "measured", where)
    return numbers


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
        numbers[f"resolution.one_board.{key}.efficiency"] = fitted(fit, source)
        error = mape_percent(board.predicted(board.predictors[key], "latency_s"), board.rows["latency_s"])
        numbers[f"resolution.one_board.{key}.mape_latency"] = Number(error, "%", "modelled", source, digits=1)
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
        numbers |= _call_numbers(sweep, row, f"resolution.{height}x{width}")
    return numbers


def _call_numbers(sweep: Sweep, row: pd.Series, prefix: str) -> Numbers:
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
