"""The numbers that the paper's text takes from the three sweeps, their records and the study.

Keys begin with what they are about: ``sweeps`` (all three together), ``resolution``, ``frames``, ``steps``,
and those of :mod:`t2v_energy.analysis.setup_numbers`.  A number that a campaign cannot give (no counter, an
experiment or a size not measured) is left out; a text that asks for it does not compile.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

import pandas as pd

from t2v_energy.analysis import setup_numbers
from t2v_energy.analysis.facts import Facts
from t2v_energy.analysis.number_parts import (
    QUANTITIES,
    Numbers,
    board_numbers,
    cell_numbers,
    cost_numbers,
    counter_numbers,
    distinct_boards,
    efficiency_numbers,
    error_numbers,
    everywhere,
    extreme,
    mape_numbers,
    merged,
    own_efficiency_numbers,
    range_numbers,
    spread_numbers,
    stem,
)
from t2v_energy.analysis.numbers import Number, Source, decimals
from t2v_energy.analysis.resolution_numbers import DESCRIBED_SIZES, resolution_numbers
from t2v_energy.analysis.sweep import Predictor, Sweep, board_means, row_label
from t2v_energy.errors import UserError

DESCRIBED_FRAMES = 81
DESCRIBED_STEPS = 50
FRAME_CELLS = {"power": ("mean_power_W", 1.0, "W", 3), "mfu": ("mfu", 100.0, "%", 3)}
ALIGNED_TOKENS = 128  # rows of a tile of the matrix products and attention kernels


def sweep_numbers(
    sweeps: Mapping[str, Sweep],
    predictors: Mapping[str, Predictor],
    table: pd.DataFrame,
    table_file: str,
    facts: Facts,
) -> Numbers:
    """Every number of the part ``sweeps``.

    Args:
        sweeps: the measured rows, by experiment; any of the three may be missing.
        predictors: with one µ for all of them (:func:`t2v_energy.analysis.sweep.fit_predictors`).
        table: table 3; ``table_file`` is where it is written.
        facts: of the records of the first of them, ``resolution`` where it was measured.

    Raises:
        UserError: two numbers have one key, there is no sweep, or a sweep varies what it should hold fixed.
    """
    if not sweeps:
        raise UserError("there is no sweep to take numbers from", remedy="measure one of the experiments")
    parts = [
        setup_numbers.study_numbers(),
        setup_numbers.setup_numbers(facts),
        setup_numbers.accelerator_numbers(next(iter(sweeps.values())).accelerator),
        setup_numbers.protocol_numbers(facts),
        setup_numbers.validity_numbers(),
        setup_numbers.slow_numbers(facts),
        common_numbers(sweeps, predictors),
        described_boards_numbers(sweeps),
        same_board_shape_numbers(sweeps),
    ]
    if (resolution := sweeps.get("resolution")) is not None:
        parts.append(resolution_numbers(resolution, predictors, table, table_file))
        parts.append(setup_numbers.condition_numbers(resolution, facts, DESCRIBED_SIZES[-1]))
    if (frames := sweeps.get("frames")) is not None:
        parts.append(frames_numbers(frames, predictors, table, table_file))
    if (steps := sweeps.get("steps")) is not None:
        parts.append(steps_numbers(steps, predictors, table, table_file))
    return merged(*parts)


def common_numbers(sweeps: Mapping[str, Sweep], predictors: Mapping[str, Predictor]) -> Numbers:
    """``sweeps.*``: the one µ of all points, their number, and the boards that measured them."""
    file = next(iter(sweeps.values())).source
    rows = sum(len(sweep.rows) for sweep in sweeps.values())
    where = f"experiments {', '.join(sweeps)}, status=ok ({rows} rows)"
    numbers = efficiency_numbers(
        "sweeps", predictors, Source(file, where, "latency_s over FLOP"), heaviest=True
    )
    numbers["sweeps.points"] = Number(rows, "", "constant", Source(file, where, "rows"))
    if boards := distinct_boards(sweeps):
        source = Source(file, where, "gpu_uuids: distinct")
        numbers["sweeps.boards"] = Number(len(boards), "", "constant", source)
    return numbers


def described_means(sweeps: Mapping[str, Sweep], size: tuple[int, int], quantity: str) -> dict[str, float]:
    """Mean of ``quantity`` by GPU UUID of one size at 81 frames and 50 steps, over all sweeps with it."""
    means: dict[str, list[float]] = {}
    wanted = {
        "height": size[0],
        "width": size[1],
        "num_frames": DESCRIBED_FRAMES,
        "num_inference_steps": DESCRIBED_STEPS,
    }
    for sweep in sweeps.values():
        rows = sweep.rows[(sweep.rows[list(wanted)] == pd.Series(wanted)).all(axis="columns")]
        for _, row in rows.iterrows():
            for uuid, mean in board_means(row, quantity).items():
                means.setdefault(uuid, []).append(mean)
    return {uuid: sum(values) / len(values) for uuid, values in means.items()}


def described_boards_numbers(sweeps: Mapping[str, Sweep]) -> Numbers:
    """``boards.<size>.*``: least and largest cost of one configuration among the boards that measured it."""
    numbers: Numbers = {}
    file = next(iter(sweeps.values())).source
    for height, width in DESCRIBED_SIZES:
        prefix = f"boards.{height}x{width}"
        where = f"{height}×{width}, {DESCRIBED_FRAMES} frames, {DESCRIBED_STEPS} steps"
        for quantity, unit in QUANTITIES.items():
            means = described_means(sweeps, (height, width), quantity).values()
            if len(means) < 2:
                continue
            source = Source(file, where, f"{quantity}_pass_means, mean by gpu_uuids")
            numbers[f"{prefix}.count"] = Number(len(means), "", "constant", source)
            least, most = min(means), max(means)
            for name, value in (("least", least), ("most", most)):
                key = f"{prefix}.{stem(quantity)}_{name}"
                numbers[key] = Number(value, unit, "measured", source, digits=decimals(value, 4))
            spread = 100 * (most / least - 1)
            key = f"{prefix}.{stem(quantity)}_spread"
            numbers[key] = Number(spread, "%", "measured", source, digits=1)
    return numbers


def same_board_shape_numbers(sweeps: Mapping[str, Sweep]) -> Numbers:
    """``resolution.shapes.same_board_*``: shapes with the pixels of 480×832 against it on their own board.

    Shapes whose board did not measure 480×832 at 81 frames and 50 steps are left out.
    """
    resolution = sweeps.get("resolution")
    if resolution is None:
        return {}
    height, width = DESCRIBED_SIZES[0]
    rows = resolution.rows
    others = rows[(rows["height"] * rows["width"] == height * width) & (rows["height"] != height)]
    numbers: Numbers = {}
    for quantity in QUANTITIES:
        reference = described_means(sweeps, (height, width), quantity)
        differences = [
            100 * (mean / reference[uuid] - 1)
            for _, row in others.iterrows()
            for uuid, mean in board_means(row, quantity).items()
            if uuid in reference
        ]
        where = f"{everywhere(resolution)}, shapes of {height}×{width}'s pixels / {height}×{width}"
        source = Source(resolution.source, where, f"{quantity}_pass_means of one board: ratio − 1")
        for name, pick in (("least", min), ("most", max)) if differences else ():
            key = f"resolution.shapes.same_board_{stem(quantity)}_{name}"
            numbers[key] = Number(pick(differences), "%", "measured", source, digits=1)
    return numbers


# --- frames -------------------------------------------------------------------------------------------------


def frames_numbers(
    sweep: Sweep, predictors: Mapping[str, Predictor], table: pd.DataFrame, table_file: str
) -> Numbers:
    """``frames.*``: costs at the shortest, the usual and the longest video, passes, boards and errors."""
    named = {"shortest": sweep.rows.iloc[0], "longest": sweep.rows.iloc[-1]}
    if (row := sweep.at(num_frames=DESCRIBED_FRAMES)) is not None:
        named[f"{DESCRIBED_FRAMES}f"] = row
    return merged(
        _frames_swept(sweep),
        counter_numbers(sweep),
        *(cost_numbers(sweep, f"frames.{label}", row) for label, row in named.items()),
        *(cell_numbers(sweep, f"frames.{label}", row, FRAME_CELLS) for label, row in named.items()),
        range_numbers(sweep),
        spread_numbers(sweep, named),
        board_numbers(sweep, sweep.rows, "all lengths"),
        same_board_numbers(sweep),
        aligned_numbers(sweep),
        own_efficiency_numbers(sweep),
        mape_numbers("frames", table, table_file),
        error_numbers(sweep, predictors, "frames", ("shortest", "longest")),
    )


def _frames_swept(sweep: Sweep) -> Numbers:
    first, last = sweep.rows.iloc[0], sweep.rows.iloc[-1]
    source = Source(sweep.source, everywhere(sweep), "num_frames")
    size = f"{sweep.fixed('height')}×{sweep.fixed('width')}"
    counts = {
        "lengths": len(sweep.rows["num_frames"].unique()),
        "steps": sweep.fixed("num_inference_steps"),
        "passes": int(sweep.rows["passes"].max()),
        "flagged": int(sweep.rows["flags"].notna().sum()),
        "shortest": int(first["num_frames"]),
        "longest": int(last["num_frames"]),
    }
    numbers = {f"frames.{name}": Number(value, "", "constant", source) for name, value in counts.items()}
    numbers["frames.size"] = Number(
        size, "", "constant", Source(sweep.source, everywhere(sweep), "height, width")
    )
    numbers["frames.unspanned"] = extreme(sweep, "unspanned_percent", "max", "%")
    where = f"{row_label(last)} / {row_label(first)}"
    tokens = sweep.work("true", last).tokens / sweep.work("true", first).tokens
    ratios = {"frames": float(last["num_frames"] / first["num_frames"]), "tokens": tokens}
    for name, value in ratios.items():
        source = Source(sweep.source, where, name)
        numbers[f"frames.range.{name}"] = Number(value, "", "constant", source, digits=decimals(value, 3))
    return numbers


def same_board_numbers(sweep: Sweep) -> Numbers:
    """``frames.same_board.*``: how far two passes on one board lie apart, over the lengths that had such."""
    rows = sweep.rows
    boards = [str(cell).split(";") for cell in rows["gpu_uuids"]]
    same = rows[[len(uuids) > 1 and len(set(uuids)) == 1 for uuids in boards]]
    numbers: Numbers = {}
    for quantity in QUANTITIES:
        spread = same[f"{quantity}_pass_spread_percent"].dropna()
        if not len(spread):
            continue
        where = f"{everywhere(sweep)}, both passes on one board"
        source = Source(sweep.source, where, f"{quantity}_pass_spread_percent")
        numbers["frames.same_board.lengths"] = Number(len(same), "", "constant", source)
        for name, value in (("median", float(spread.median())), ("most", float(spread.max()))):
            key = f"frames.same_board.{stem(quantity)}_{name}"
            numbers[key] = Number(value, "%", "measured", source, digits=2)
    return numbers


def aligned_numbers(sweep: Sweep) -> Numbers:
    """``frames.aligned.*``: gain of lengths whose tokens are a multiple of 128 over their neighbours.

    It is a length's ``mfu`` over the mean of those four frames shorter and longer, −1.  Lengths without
    both neighbours are left out.
    """
    mfu = sweep.rows.set_index("num_frames")["mfu"]
    gains = {}
    for _, row in sweep.rows.iterrows():
        length = int(row["num_frames"])
        beside = [length - 4, length + 4]
        if sweep.work("true", row).tokens % ALIGNED_TOKENS == 0 and set(beside) <= set(mfu.index):
            gains[length] = 100 * (float(mfu[length]) / float(mfu[beside].mean()) - 1)
    if not gains or not all(isfinite(gain) for gain in gains.values()):
        return {}
    where = f"{everywhere(sweep)}, num_frames={', '.join(map(str, gains))}"
    source = Source(sweep.source, where, "mfu / mean mfu of the neighbours − 1")
    return {
        "frames.aligned.lengths": Number(" and ".join(map(str, gains)), "", "constant", source),
        "frames.aligned.tokens": Number(ALIGNED_TOKENS, "", "constant", source),
        "frames.aligned.gain_least": Number(min(gains.values()), "%", "modelled", source, digits=1),
        "frames.aligned.gain_most": Number(max(gains.values()), "%", "modelled", source, digits=1),
    }


# --- steps --------------------------------------------------------------------------------------------------


def steps_numbers(
    sweep: Sweep, predictors: Mapping[str, Predictor], table: pd.DataFrame, table_file: str
) -> Numbers:
    """``steps.*``: what whole videos cost at each size, and errors.

    How straight cost is in the steps, and what a step costs, is in :mod:`t2v_energy.analysis.scaling`.
    """
    source = Source(sweep.source, everywhere(sweep), "num_inference_steps")
    counts = {
        "points": len(sweep.rows),
        "frames": sweep.fixed("num_frames"),
        "generations_least": int(sweep.rows["latency_s_n"].min()),
        "generations_most": int(sweep.rows["latency_s_n"].max()),
    }
    return merged(
        {f"steps.{name}": Number(value, "", "constant", source) for name, value in counts.items()},
        counter_numbers(sweep),
        *(_size_numbers(part) for part in sweep.by_size.values()),
        *(
            error_numbers(part, predictors, f"steps.{h}x{w}", ("fewest", "most"))
            for (h, w), part in sweep.by_size.items()
        ),
        own_efficiency_numbers(sweep),
        mape_numbers("steps", table, table_file),
    )


def _size_numbers(sweep: Sweep) -> Numbers:
    """What whole videos of one size cost at the fewest, the usual and the most steps, and what comes once."""
    prefix = f"steps.{sweep.fixed('height')}x{sweep.fixed('width')}"
    where = f"{everywhere(sweep)}, {sweep.fixed('height')}×{sweep.fixed('width')} ({len(sweep.rows)} rows)"
    counts = sweep.rows["num_inference_steps"].astype(int)
    source = Source(sweep.source, where, "num_inference_steps")
    named = {"fewest": int(counts.min()), "most": int(counts.max())}
    numbers = {f"{prefix}.{name}": Number(value, "", "constant", source) for name, value in named.items()}
    once = float(sweep.rows["once_s"].mean())
    source = Source(sweep.source, where, "mean of once_s")
    numbers[f"{prefix}.once"] = Number(once, "s", "measured", source, digits=decimals(once, 3))
    for steps in sorted({*named.values(), DESCRIBED_STEPS}):
        if (row := sweep.at(num_inference_steps=steps)) is not None:
            numbers |= cost_numbers(sweep, f"{prefix}.{steps}s", row)
    return numbers
