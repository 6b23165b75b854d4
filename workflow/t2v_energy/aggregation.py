"""Stage 3: raw records become two tidy tables. Needs no GPU: every energy is attributed again from the ticks.

``measurements.parquet`` has one row a span of a measured generation; ``configurations.csv`` one row a
configuration × protocol × attention kernel, its passes merged (``contracts.md``). Energies of single spans
are in joules, of whole videos in watt-hours; every interval is 95 % except where its name says ``ci90``.

Generations of one pass share a board, a host and some minutes: they are no independent sample of a GPU model.
So every mean is the mean of the passes' means, however many generations each pass took, and ``_std`` is the
scatter of a generation about its own pass's mean. What ``_ci95`` holds depends on how many passes there are
(:func:`merged_estimate`): repetition alone with one or two, passes as the units from three on. How far the
passes lie apart is a column of its own, ``_pass_spread_percent``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from math import hypot, inf, isfinite, nan, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike
from scipy.stats import t as student_t

from t2v_energy.config import Accelerator, load_accelerator, load_campaign, load_model
from t2v_energy.errors import UserError
from t2v_energy.interventions.executed_work import executed_flop
from t2v_energy.measurement.composition import (
    CONFIDENCE,
    Array,
    Estimate,
    Generation,
    composed_latency_s,
    estimate,
    generations,
    step_scatter_percent,
    step_weights,
    unspanned_percent,
)
from t2v_energy.measurement.record import InterventionRecord, Record, read_record, write_atomically
from t2v_energy.measurement.validity import check
from t2v_energy.metering.attribution import energies_J
from t2v_energy.metering.codecarbon import cpu_kind
from t2v_energy.parallel import mapped

PORTION = 50
"""Records that are read at once."""
J_PER_WH = 3600.0
B_PER_GIB = 2**30
CI95_PER_CI90 = 1.96 / 1.645  # the instrument's interval is taken as normal
MIN_PASSES_AS_UNITS = 3  # the t-interval over two means is ± 6.35 times their distance: no use to anyone

QUANTITIES = ("latency_s", "gpu_energy_Wh", "cpu_energy_Wh", "ram_energy_Wh")
ENERGIES = QUANTITIES[1:]
SPREAD = ("latency_s", "gpu_energy_Wh")
"""Quantities whose passes are compared."""
Columns = dict[str, Array]
"""A small table by column: a hundred thousand of them as data frames would cost more than what is in them."""
IDLE = ("idle_before", "idle_after")
FIDELITY = {
    "fidelity_steps": "steps",
    "relative_l2": "relative_l2",
    "psnr_db": "psnr_db",
    "ssim": "ssim",
    "ms_ssim": "ms_ssim",
    "temporal_flickering": "temporal_flickering",
    "reference_temporal_flickering": "reference_temporal_flickering",
}
"""Columns of how far the output is from the unchanged pipeline's, and their names in a record."""
CODECARBON = (
    "codecarbon_window_energy_Wh",
    "codecarbon_duration_s",
    "counter_window_energy_Wh",
    "counter_window_s",
)


def aggregate(
    records: Mapping[str, Sequence[Path]], parquet: Path, csv: Path, root: Path, processes: int = 1
) -> None:
    """Write ``measurements.parquet`` and ``configurations.csv`` of one campaign.

    Args:
        records: each experiment's records, those of its seal or its plan: what else lies in the folder,
            such as a size that was taken out of the experiment, is left alone.
        parquet, csv: the files to write; folders are made, older files replaced.
        root: the repository's root, whose ``config/`` has the models and accelerators.
        processes: at most so many work at once. Records are read a few at a time, so memory grows with the
            number of configurations, not with that of spans; the result is the same.

    Raises:
        UserError: a record is corrupt, truncated, foreign (another experiment's or campaign's) or of
            another schema version; an experiment has no record; a record has no energy where it should.
    """
    for experiment, paths in records.items():
        if not paths:
            raise UserError(f"experiment {experiment!r} has no records", remedy="measure it first")
    portions = list(_portions(records))
    campaign = read_record(portions[0][0][1]).campaign if portions else ""
    temporary = parquet.with_name(f".{parquet.name}.{os.getpid()}.tmp")
    rows: list[_KeyedRow] = []
    try:
        with ExitStack() as stack:
            writer: pq.ParquetWriter | None = None
            work = partial(_portion_tables, campaign, root)
            for spans, of_portion in mapped(work, portions, processes, stack):
                rows += of_portion
                table = pa.Table.from_pandas(spans, preserve_index=False)
                if writer is None:
                    parquet.parent.mkdir(parents=True, exist_ok=True)
                    writer = stack.enter_context(pq.ParquetWriter(temporary, table.schema))
                writer.write_table(table.cast(writer.schema))
        os.replace(temporary, parquet)
    finally:
        temporary.unlink(missing_ok=True)
    ordered = pd.DataFrame([row for _, row in sorted(rows, key=lambda keyed: keyed[0])])
    write_atomically(csv, _ordered(ordered).to_csv(index=False, float_format="%.10g"), overwrite=True)


_KeyedRow = tuple[tuple[str, ...], dict[str, Any]]
_Portion = list[tuple[str, Path]]
"""Experiment and path of some records; all passes of a configuration are in one portion."""


def _portions(records: Mapping[str, Sequence[Path]]) -> Iterator[_Portion]:
    """The records in their order, passes of a configuration together, in parts of about ``PORTION``."""
    portion: _Portion = []
    for experiment, paths in records.items():
        by_measurement: dict[str, list[Path]] = {}
        for path in paths:
            by_measurement.setdefault(path.name.rpartition("_r")[0], []).append(path)
        for passes in by_measurement.values():
            portion += [(experiment, path) for path in passes]
            if len(portion) >= PORTION:
                yield portion
                portion = []
    if portion:
        yield portion


def _portion_tables(campaign: str, root: Path, portion: _Portion) -> tuple[pd.DataFrame, list[_KeyedRow]]:
    """The spans of a portion, and its rows of ``configurations.csv``, each with what it is sorted by."""
    measurements = [_measurement(_own(path, campaign, experiment)) for experiment, path in portion]
    rows = [(key, _row(passes, root)) for key, passes in _merged_passes(measurements)]
    return _all_spans(measurements), rows


def _own(path: Path, campaign: str, experiment: str) -> Record:
    """A record, which must be of this campaign and experiment."""
    record = read_record(path)
    if (record.campaign, record.experiment) != (campaign, experiment):
        raise UserError(
            f"foreign record: of campaign {record.campaign!r}, experiment {record.experiment!r}, "
            f"among those of {campaign!r}, {experiment!r}",
            where=str(path),
            remedy="move it to its own folder",
        )
    return record


# --- one record ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Measurement:
    """One record's part of the tables.

    Attributes:
        record: the record.
        generations: its measured generations; none for a record that is not ``ok``.
        spans: columns of its rows of ``measurements.parquet``, without those that say whose they are.
        videos: columns of one row a repetition: every quantity of a whole video, from its generations' mean.
            Short clips apart, a repetition is one generation.
        idle_J, idle_s: energy (J; NaN without a counter) and length (s) of the idle windows.
        stretch_J, stretch_s: the same from the first generation's start, warm-ups included, to the last
            one's end: what CodeCarbon's window holds.
        warmup_J, warmup_s: the same of the first warm-up, in which kernels are compiled; NaN without one.
    """

    record: Record
    generations: list[Generation]
    spans: Columns
    videos: Columns
    idle_J: float
    idle_s: float
    stretch_J: float
    stretch_s: float
    warmup_J: float
    warmup_s: float


def _measurement(record: Record) -> _Measurement:
    try:
        found = generations(record.windows, record.spans) if record.status == "ok" else []
        if record.status == "ok" and not found:
            raise UserError(
                "the record is ok but holds no generation", remedy="move it away and measure again"
            )
        return _attributed(record, found)
    except UserError as error:
        where = f"{record.experiment}/{record.file_name}"
        raise UserError(error.what, where=where, remedy=error.remedy) from error


def _attributed(record: Record, found: list[Generation]) -> _Measurement:
    rows = _span_rows(record, found)
    rows["gpu_energy_J"], rows["gpu_energy_J_ci90"] = _energies(
        record, _edges(rows["start_s"], rows["end_s"])
    )
    lasting_s = np.where(rows["duration_s"] > 0, rows["duration_s"], nan)
    rows["gpu_energy_kind"] = np.full(len(lasting_s), "measured" if record.counters else "", dtype=object)
    rows["mean_power_W"] = rows["gpu_energy_J"] / lasting_s

    whole = _edges([g.start_s for g in found], [g.end_s for g in found])
    loops = _edges([g.loop_start_s for g in found], [g.loop_end_s for g in found])
    settled = _edges([g.step_starts_s[g.first_settled] for g in found], [g.loop_end_s for g in found])
    idle, stretch = (_idle(record), _stretch(record, found)) if found else (_edges(), _edges())
    # Power steps where the stages around the loop begin and end; inside the loop, calls follow without a
    # pause, and as borders their edges would only hide how steady power is beside the loop's own.
    once = _edges(rows["start_s"], rows["end_s"])[rows["step"] < 0].ravel()
    repeated = _repeated(found)
    groups = (whole, loops, settled, idle, stretch, repeated)
    energy, ci90 = _energies(record, np.concatenate(groups), once)
    of_whole, of_loop, of_settled, of_idle, of_stretch, _ = _split(energy, groups)
    ci90_whole, _, ci90_settled, _, _, ci90_repeated = _split(ci90, groups)
    # By itself: a further window moves the steps of power that are looked for, and the energies beside it.
    warmup = _first_warmup(record) if found else _edges()
    of_warmup, _ = _energies(record, warmup)
    videos = _videos(record, found)
    _add_gpu_energy(videos, record, found, (of_whole, ci90_whole), of_loop, (of_settled, ci90_settled))
    videos |= _stages(rows, _span_weights(record, found, rows))
    if len(repeated):
        videos = _by_repetition(videos, found, ci90_repeated)
    return _Measurement(
        record=record,
        generations=found,
        spans=rows,
        videos=videos,
        idle_J=float(of_idle.sum()),
        idle_s=float(np.diff(idle).sum()),
        stretch_J=float(of_stretch.sum()),
        stretch_s=float(np.diff(stretch).sum()),
        warmup_J=float(of_warmup[0]) if len(warmup) else nan,
        warmup_s=float(np.diff(warmup)[0, 0]) if len(warmup) else nan,
    )


def _edges(start_s: ArrayLike = (), end_s: ArrayLike = ()) -> Array:
    """Windows (s), one row each: start and end."""
    return np.column_stack([np.asarray(start_s, dtype=np.float64), np.asarray(end_s, dtype=np.float64)])


def _idle(record: Record) -> Array:
    """The idle windows, as far as the ticks cover them: their power needs no more."""
    windows = record.windows
    edges = _edges(windows.start_s, windows.end_s)[[kind in IDLE for kind in windows.kind]]
    for ticks in record.counters:
        edges = edges.clip(ticks.time_s[0], ticks.not_before_s[-1])
    return edges[edges[:, 1] > edges[:, 0]]


def _stretch(record: Record, found: list[Generation]) -> Array:
    """From the first warm-up's start to the last generation's end."""
    windows = record.windows
    running = [s for kind, s in zip(windows.kind, windows.start_s, strict=True) if kind not in IDLE]
    return _edges([min(running)], [found[-1].end_s])


def _first_warmup(record: Record) -> Array:
    """Start and end of the first warm-up; nothing without one."""
    windows = record.windows
    index = [place for place, kind in enumerate(windows.kind) if kind == "warmup"][:1]
    return _edges([windows.start_s[i] for i in index], [windows.end_s[i] for i in index])


def _repeated(found: list[Generation]) -> Array:
    """Start and end of each repetition, if any has more than one generation."""
    by_number = groupby(found, key=lambda g: g.repetition)
    repetitions = [list(repetition) for _, repetition in by_number]
    if len(repetitions) == len(found):
        return _edges()
    return _edges([r[0].start_s for r in repetitions], [r[-1].end_s for r in repetitions])


def _energies(record: Record, edges: Array, borders_s: ArrayLike = ()) -> tuple[Array, Array]:
    """Counter energies (J) and half-widths of their 90 % intervals (J), in one call; NaN without a counter.

    Of several boards energies add up, and their intervals, which are of counters of their own, as squares.
    ``borders_s`` are further times at which power may step.
    """
    if not (record.counters and len(edges)):
        return np.full(len(edges), nan), np.full(len(edges), nan)
    of_each = [energies_J(ticks, edges[:, 0], edges[:, 1], borders_s=borders_s) for ticks in record.counters]
    if len(of_each) == 1:
        return of_each[0]
    energy, ci90 = (np.array(values) for values in zip(*of_each, strict=True))
    return energy.sum(axis=0), np.sqrt((ci90**2).sum(axis=0))


def _split(values: Array, groups: Sequence[Array]) -> list[Array]:
    """``values`` of all groups' rows, by group."""
    return np.split(values, np.cumsum([len(group) for group in groups])[:-1])


def _kernel(record: Record) -> str:
    """What ran in the denoiser; of a record in which nothing ran to its end, what was asked for."""
    return (
        "+".join(record.attention_kernels.get("denoiser", [])) or record.configuration.attention_kernel or ""
    )


def _span_rows(record: Record, found: list[Generation]) -> Columns:
    """Times of the measured generations' spans; ``generation`` counts from 0."""
    spans = record.spans
    number = {g.index: count for count, g in enumerate(found)}
    window = np.asarray(spans.window, dtype=np.int64)
    kept = np.isin(window, list(number))
    start_s = np.asarray(spans.start_s, dtype=np.float64)[kept]
    end_s = np.asarray(spans.end_s, dtype=np.float64)[kept]
    return {
        "window": window[kept],
        "generation": np.array([number[w] for w in window[kept].tolist()], dtype=np.int64),
        "stage": np.asarray(spans.stage, dtype=object)[kept],
        "step": np.asarray(spans.step, dtype=np.int64)[kept],
        "call": np.asarray(spans.call, dtype=np.int64)[kept],
        "start_s": start_s,
        "end_s": end_s,
        "duration_s": end_s - start_s,
    }


def _identity(record: Record) -> dict[str, Any]:
    """What every span of a record shares: the first columns of ``measurements.parquet``."""
    configuration = record.configuration
    return {
        "campaign": record.campaign,
        "experiment": record.experiment,
        "configuration_id": record.configuration_id,
        "model": configuration.model,
        "height": configuration.height,
        "width": configuration.width,
        "num_frames": configuration.num_frames,
        "num_inference_steps": configuration.num_inference_steps,
        "protocol": record.protocol,
        "pass_index": record.pass_index,
        "attention_kernel": _kernel(record),
        "intervention": "+".join(configuration.interventions),
        "gpu_name": _set_up(record)["gpu_name"],
        "record": _origin(record),
    }


def _all_spans(measurements: list[_Measurement]) -> pd.DataFrame:
    """The whole of ``measurements.parquet``."""
    identities = pd.DataFrame([_identity(m.record) for m in measurements])
    lengths = [len(m.spans["window"]) for m in measurements]
    repeated = identities.take(np.repeat(np.arange(len(lengths)), lengths)).reset_index(drop=True)
    columns = {name: np.concatenate([m.spans[name] for m in measurements]) for name in measurements[0].spans}
    spans = pd.DataFrame(columns).astype({"stage": "str", "gpu_energy_kind": "str"})
    return pd.concat([repeated, spans], axis="columns")


def _videos(record: Record, found: list[Generation]) -> Columns:
    """One row a generation, scaled to a whole video: latency, and CodeCarbon's CPU and memory energies.

    CodeCarbon gives one energy for all generations together. Its mean power (a load model, a constant, or
    RAPL's mean) is taken to hold for the whole video: energy = mean power × composed latency.
    """
    steps = record.configuration.num_inference_steps
    latency_s = composed_latency_s(found, steps)
    columns: dict[str, Any] = {
        "latency_s": latency_s,
        "once_s": [g.once_s for g in found],
        "step_s": [g.composed_loop_s(steps) / steps for g in found],
    }
    for name in ("cpu", "ram"):
        columns[f"{name}_energy_Wh"] = _codecarbon_power_W(record, name) * latency_s / J_PER_WH
    return {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}


def _codecarbon_power_W(record: Record, part: str) -> float:
    """CodeCarbon's mean power of ``cpu`` or ``ram`` over its window (W); NaN where it has no method."""
    reading = record.codecarbon
    if reading is None or reading.duration_s <= 0 or getattr(reading, f"{part}_method") == "none":
        return nan
    return float(getattr(reading, f"{part}_energy_Wh")) * J_PER_WH / reading.duration_s


def _add_gpu_energy(
    videos: Columns,
    record: Record,
    found: list[Generation],
    whole: tuple[Array, Array],
    loop_J: Array,
    settled: tuple[Array, Array],
) -> None:
    """Energy of a whole video from each generation, composed as its latency is.

    That is E_window + extra · E_settled, where ``extra`` is how often more than once the settled steps count
    (:func:`~t2v_energy.measurement.composition.step_weights`). The two windows share no edge: their
    intervals combine in quadrature. ``whole`` and ``settled`` are energies (J) with half-widths of their 90 %
    intervals, ``loop_J`` the energy of the steps that were run.
    """
    steps = record.configuration.num_inference_steps
    extra = np.array([step_weights(g.step_starts_s, steps)[-1] - 1 for g in found], dtype=np.float64)
    videos["gpu_energy_Wh"] = (whole[0] + extra * settled[0]) / J_PER_WH
    videos["gpu_energy_Wh_instrument_ci95"] = (
        CI95_PER_CI90 * np.hypot(whole[1], extra * settled[1]) / J_PER_WH
    )
    videos["step_energy_J"] = (loop_J + extra * settled[0]) / steps


def _span_weights(record: Record, found: list[Generation], rows: Mapping[str, Array]) -> Array:
    """How often each span of ``rows`` comes in a whole video: once, or as often as its step counts."""
    steps = record.configuration.num_inference_steps
    weights = np.ones(len(rows["step"]))
    for number, generation in enumerate(found):
        inside = (rows["generation"] == number) & (rows["step"] >= 0)
        of_step = step_weights(generation.step_starts_s, steps)
        weights[inside] = of_step[rows["step"][inside]]
    return weights


def _by_repetition(videos: Columns, found: list[Generation], ci90: Array) -> Columns:
    """Mean video of each repetition of several generations.

    Its energy is known as well as that of the whole repetition, ``ci90`` (J, half-widths): what the counter
    gets wrong where one generation ends is made good where the next one begins.
    """
    number = [g.repetition for g in found]
    means = {
        str(name): column.to_numpy() for name, column in pd.DataFrame(videos).groupby(number).mean().items()
    }
    counts = np.unique(number, return_counts=True)[1]
    means["gpu_energy_Wh_instrument_ci95"] = CI95_PER_CI90 * ci90 / counts / J_PER_WH
    return means


def _stages(rows: Mapping[str, Array], weights: Array) -> Columns:
    """Time (s) and GPU energy (J) of each stage in a whole video, one row a generation.

    ``weights`` says how often each row of ``rows`` comes in it. NaN where a generation has no such stage.
    """
    stages, stage = np.unique(rows["stage"].astype(str), return_inverse=True)
    shape = (int(rows["generation"].max(initial=-1)) + 1, len(stages))
    place = rows["generation"] * len(stages) + stage
    calls = np.bincount(place, minlength=shape[0] * shape[1])
    columns: Columns = {}
    for name, quantity in (("time_s", "duration_s"), ("energy_J", "gpu_energy_J")):
        # energies are NaN without a counter, and then count as nothing: the total is NaN and tells
        weighted = np.nan_to_num(rows[quantity]) * weights
        sums = np.bincount(place, weighted, minlength=len(calls))
        table = np.where(calls > 0, sums, nan).reshape(shape)
        columns |= {f"{key}_{name}": table[:, index] for index, key in enumerate(stages.tolist())}
    return columns


# --- one row of configurations.csv --------------------------------------------------------------------------


def _merged_passes(
    measurements: Iterable[_Measurement],
) -> Iterator[tuple[tuple[str, ...], list[_Measurement]]]:
    """The passes of each configuration × protocol × kernel × status, with these as a key, in a fixed order.

    What only a merged campaign may hold several of is never averaged over (:func:`_set_up`).
    """

    def key(m: _Measurement) -> tuple[str, ...]:
        r = m.record
        return (r.experiment, r.configuration_id, r.protocol, _kernel(r), r.status, *_set_up(r).values())

    for found, group in groupby(sorted(measurements, key=key), key=key):
        yield found, list(group)


def _set_up(record: Record) -> dict[str, str]:
    """GPU model, protocol settings (ten digits of their checksum) and weights."""
    gpu, settings = record.environment.gpu, record.protocol_settings.model_dump_json()
    return {
        "gpu_name": gpu.name if gpu else "",
        "protocol_settings": hashlib.sha256(settings.encode()).hexdigest()[:10],
        "weights": record.environment.weights,
    }


def _row(passes: list[_Measurement], root: Path) -> dict[str, Any]:
    """One row; of a configuration that was not measured to its end, every quantity is NaN."""
    record = passes[0].record
    measured = [m for m in passes if m.generations]
    videos = _mean_videos(passes)
    named = ("campaign", "configuration_id", "pass_index", "gpu_name", "record")
    row = {name: value for name, value in _identity(record).items() if name not in named}
    row["status"] = record.status
    row |= _quantities(passes, videos) | _kinds(measured) | _shares(videos) | _steps(measured, videos)
    row["mfu"] = _mfu(record, row["latency_s"], root)
    row |= _memory(measured) | _codecarbon(measured) | _pass_means(passes) | _provenance(passes)
    return row | _changes(passes) | _warmups(measured) | _fidelity(passes)


def _mean_videos(passes: list[_Measurement]) -> Columns:
    """One row a measured pass: the mean of its generations, of every column of ``videos``.

    NaN where a pass has no such stage.
    """
    measured = [m.videos for m in passes if m.generations]
    names = dict.fromkeys(name for videos in measured for name in videos) or passes[0].videos
    return {
        name: np.array(
            [videos[name].mean() if name in videos else nan for videos in measured], dtype=np.float64
        )
        for name in names
    }


def _mean(values: Array) -> float:
    """The mean; NaN of nothing, and where any value is NaN."""
    return float(values.mean()) if values.size else nan


def _quantities(passes: list[_Measurement], videos: Columns) -> dict[str, float]:
    """Each quantity's mean of pass means with ``_std``, ``_ci95`` (half-width), ``_n`` (repetitions).

    ``videos`` has one row a pass.

    Intervals of modelled and constant energies show how far latency scatters, not how good the model is.
    """
    row: dict[str, float] = {}
    for name in QUANTITIES:
        by_pass = [values[~np.isnan(values)] for values in (m.videos[name] for m in passes)]
        instrument_ci95 = 0.0
        if name == "gpu_energy_Wh":
            # What the counter gets wrong at an edge it may get wrong alike each time: not averaged down.
            instrument_ci95 = _mean(videos["gpu_energy_Wh_instrument_ci95"])
        found = merged_estimate(by_pass, instrument_ci95)
        row |= {name: found.mean, f"{name}_std": found.std, f"{name}_ci95": found.ci95, f"{name}_n": found.n}
    return row


def merged_estimate(passes: Sequence[ArrayLike], instrument_ci95: float = 0.0) -> Estimate:
    """Mean of the passes' means; each pass is the values of its generations, and an empty one is left out.

    ``std`` is the root mean square of the passes' standard deviations: the scatter of repetition.  ``ci95``
    is of repetition, too, while there are one or two passes: the standard errors of their means in
    quadrature, with Welch and Satterthwaite's degrees of freedom (one pass: the plain t-interval).  It says
    how well the mean of *these* passes is known and nothing about another board or hour; the passes' spread
    stands beside it.  From three passes on they are the units, and ``ci95`` is the t-interval over their
    means.  ``instrument_ci95`` is combined in quadrature.  What cannot be told is NaN: ``std``, and ``ci95``
    of fewer than three passes, where a pass has but one generation.
    """
    filled = [values for values in passes if np.size(values)]
    if len(filled) < 2:
        return estimate(filled[0] if filled else [], instrument_ci95)
    found = [estimate(values) for values in filled]
    means = np.array([e.mean for e in found])
    std = sqrt(float(np.mean([e.std**2 for e in found])))
    n = sum(e.n for e in found)
    if len(found) >= MIN_PASSES_AS_UNITS:
        return Estimate(float(means.mean()), std, estimate(means, instrument_ci95).ci95, n)
    variances = np.array([e.std**2 / e.n for e in found])  # of the means
    scatter = sqrt(variances.sum()) / len(found)
    if scatter > 0:
        freedom = variances.sum() ** 2 / np.sum(variances**2 / [e.n - 1 for e in found])
        scatter *= float(student_t.ppf((1 + CONFIDENCE) / 2, freedom))
    return Estimate(float(means.mean()), std, hypot(scatter, instrument_ci95), n)


def _kinds(passes: list[_Measurement]) -> dict[str, str]:
    """Kind of each energy; passes of different kinds are joined by ``+``, so that no mean hides a mixture."""
    of_each = [energy_kinds(m.record) for m in passes]
    return {f"{name}_kind": "+".join(sorted({kinds[name] for kinds in of_each} - {""})) for name in ENERGIES}


def energy_kinds(record: Record) -> dict[str, str]:
    """Kind of each energy of a record: measured, modelled or constant; empty for one that it lacks."""
    reading = record.codecarbon
    has_cpu = reading is not None and reading.cpu_method != "none"
    has_ram = reading is not None and reading.ram_method != "none"
    return {
        "gpu_energy_Wh": "measured" if record.counters else "",
        "cpu_energy_Wh": cpu_kind(reading.cpu_method) if reading and has_cpu else "",
        "ram_energy_Wh": "constant" if has_ram else "",
    }


def _shares(videos: Columns) -> dict[str, float]:
    """Each stage's part of the whole video's time and GPU energy; what no span covers is in neither.

    ``videos`` has one row a pass, so that passes count alike.
    """
    sums = {name: float(values.sum()) for name, values in videos.items()}
    totals = {"_time_s": sums["latency_s"], "_energy_J": sums["gpu_energy_Wh"] * J_PER_WH}
    row = {}
    for ending, total in totals.items():
        for column in sums.keys() - {"step_energy_J"}:
            if column.endswith(ending):
                share = column.removesuffix(ending) + ending.rpartition("_")[0] + "_share"
                row[share] = sums[column] / total if total > 0 else nan
    return dict(sorted(row.items()))


def _steps(passes: list[_Measurement], videos: Columns) -> dict[str, float]:
    """The denoising step, the part that comes once, and powers (W); ``videos`` has one row a pass."""
    steps = videos["step_s"].tolist() if passes else []
    sems = [s * step_scatter_percent(m.record, m.generations) for s, m in zip(steps, passes, strict=True)]
    idle_s = sum(m.idle_s for m in passes)
    energy_J = _mean(videos["gpu_energy_Wh"]) * J_PER_WH
    return {
        "step_time_s": float(np.mean(steps)) if steps else nan,
        "step_time_sem_percent": hypot(*sems) / sum(steps) if steps else nan,
        "step_energy_J": _mean(videos["step_energy_J"]),
        "once_s": _mean(videos["once_s"]),
        "mean_power_W": energy_J / _mean(videos["latency_s"]),
        "idle_power_W": sum(m.idle_J for m in passes) / idle_s if idle_s > 0 else nan,
        "unspanned_percent": max(
            (unspanned_percent(m.record.windows, m.record.spans) for m in passes), default=nan
        ),
    }


def _mfu(record: Record, latency_s: float, root: Path) -> float:
    """Executed work over what the accelerator, or as many as it ran on, could have done in the same time.

    NaN on a nominal or unknown accelerator, of a model that no closed forms count, and of interventions
    whose work is not known.
    """
    accelerator = _accelerator(record, root)
    if accelerator is None:
        return nan
    counted = load_model(root, record.configuration.model).architecture != "other"
    if accelerator.nominal or record.status != "ok" or not counted:
        return nan
    try:
        flop = executed_flop(root, record)
    except UserError:
        if record.configuration.interventions:  # of a kind or with settings that this version does not know
            return nan
        raise
    boards = 1 + len(record.further_boards)
    return flop / latency_s / (boards * accelerator.peak_bf16_dense_TFLOPs * 1e12)


def _accelerator(record: Record, root: Path) -> Accelerator | None:
    """The campaign's; of a merged campaign of several GPU models, the one of the record's own campaign."""
    campaign = load_campaign(root, record.campaign)
    if record.source and campaign.gpu_name is None:
        own = record.source.campaign
        if not (root / "config" / "campaigns" / f"{own}.yaml").is_file():
            return None
        campaign = load_campaign(root, own)
    return load_accelerator(root, campaign.accelerator)


def _memory(passes: list[_Measurement]) -> dict[str, float]:
    """Peak of torch's allocator over stages and passes (GiB)."""
    row = {}
    for name in ("allocated", "reserved"):
        peaks = [b for m in passes for b in getattr(m.record.memory, f"{name}_B").values()]
        row[f"memory_{name}_GiB"] = max(peaks) / B_PER_GIB if peaks else nan
    return row


def _codecarbon(passes: list[_Measurement]) -> dict[str, float]:
    """CodeCarbon's GPU energy and window beside the counter's over the same generations, warm-ups included.

    Summed over the passes. CodeCarbon's window is longer by what its own start and stop take.
    """
    known = [m for m in passes if m.record.codecarbon is not None]
    readings = [m.record.codecarbon for m in known if m.record.codecarbon is not None]
    if not readings:
        return dict.fromkeys(CODECARBON, nan)
    on_gpu = [r.gpu_energy_Wh for r in readings if r.gpu_method != "none"]
    values = (
        sum(on_gpu) if on_gpu else nan,
        sum(r.duration_s for r in readings),
        sum(m.stretch_J for m in known) / J_PER_WH,
        sum(m.stretch_s for m in known),
    )
    return dict(zip(CODECARBON, values, strict=True))


def _pass_means(passes: list[_Measurement]) -> dict[str, Any]:
    """How far the passes lie apart, and on which boards each ran; lists are joined by ``;`` in their order.

    Boards that a pass ran on beside its own are joined by ``+``; no cell where no pass had any.
    ``_pass_spread_percent`` is (largest − smallest pass mean) / mean of pass means × 100, NaN for one pass.
    """
    ordered = sorted(passes, key=lambda m: m.record.pass_index)
    uuids = [m.record.environment.gpu.uuid for m in ordered if m.record.environment.gpu]
    further = [[board.gpu.uuid for board in m.record.further_boards] for m in ordered]
    row: dict[str, Any] = {
        "gpus": len({*uuids, *chain.from_iterable(further)}),
        "gpu_uuids": ";".join(uuids),
        "further_gpu_uuids": ";".join("+".join(names) for names in further) if any(further) else "",
    }
    for name in SPREAD:
        found = (_mean(m.videos[name]) for m in ordered if m.generations)
        means = [mean for mean in found if isfinite(mean)]
        row[f"{name}_pass_means"] = ";".join(f"{mean:.8g}" for mean in means)
        several = len(means) > 1
        row[f"{name}_pass_spread_percent"] = 100 * float(np.ptp(means) / np.mean(means)) if several else nan
    return row


def _provenance(passes: list[_Measurement]) -> dict[str, Any]:
    """Which records these are, their own flags, and the validity rules that they break (``level:rule``)."""
    flags: set[str] = set()
    ordered = sorted((m.record for m in passes), key=lambda record: record.pass_index)
    for m in passes:
        findings = check(m.record)
        rules = {f.rule for f in findings}
        flags |= {f"{f.level}:{f.rule}" for f in findings if f.level != "ok"}
        # the runner notes its findings as `rule: detail`; they are those above
        flags |= {flag for flag in m.record.flags if flag.partition(":")[0] not in rules}
    return {
        "flags": ";".join(sorted(flags)),
        "configuration_id": passes[0].record.configuration_id,
        "passes": len(passes),
        **_set_up(passes[0].record),
        "hosts": ";".join(record.environment.host for record in ordered),
        "neighbour": passes[0].record.configuration.neighbour or "",
        "neighbours_power_W": _neighbours_power_W(ordered),
        "records": ";".join(_origin(record) for record in ordered),
    }


def _changes(passes: list[_Measurement]) -> dict[str, str]:
    """What was in force, as JSON by intervention: its settings, and what it counted, the mean over passes.

    Records of the first campaigns name their interventions in the configuration alone: nothing of theirs.
    """
    by_name: dict[str, list[InterventionRecord]] = {}
    for m in passes:
        for entry in m.record.interventions:
            by_name.setdefault(entry.name, []).append(entry)
    settings = {name: {"kind": entries[0].kind} | entries[0].settings for name, entries in by_name.items()}
    counted = {
        name: {
            key: float(np.mean([entry.evidence[key] for entry in entries if key in entry.evidence]))
            for key in entries[0].evidence
        }
        for name, entries in by_name.items()
    }
    found = {"intervention_settings": settings, "intervention_evidence": counted}
    return {name: json.dumps(values, sort_keys=True) if values else "" for name, values in found.items()}


def _warmups(passes: list[_Measurement]) -> dict[str, str]:
    """Time (s) and GPU energy (Wh) of each pass's first warm-up, joined by ``;`` in their order."""
    ordered = sorted(passes, key=lambda m: m.record.pass_index)
    columns = {
        "first_warmup_s_passes": [m.warmup_s for m in ordered],
        "first_warmup_energy_Wh_passes": [m.warmup_J / J_PER_WH for m in ordered],
    }
    return {name: ";".join(f"{v:.8g}" for v in values if isfinite(v)) for name, values in columns.items()}


def _fidelity(passes: list[_Measurement]) -> dict[str, float]:
    """Distance from the unchanged pipeline's output, of the pass in which it is largest.

    NaN where nothing was compared; frames that are the same to the bit have an infinite PSNR.
    """
    compared = [m.record.fidelity for m in passes if m.record.fidelity is not None]
    if not compared:
        return dict.fromkeys(FIDELITY, nan)
    worst = max(compared, key=lambda fidelity: fidelity.relative_l2).model_dump()
    values = {name: nan if worst[key] is None else float(worst[key]) for name, key in FIDELITY.items()}
    return values | {"psnr_db": inf if worst["psnr_db"] is None else float(worst["psnr_db"])}


def _neighbours_power_W(records: Sequence[Record]) -> float:
    """Mean power that the host's other GPUs drew together, over the passes; NaN where there are none."""
    drawn = [[n.mean_power_W for n in record.environment.neighbours] for record in records]
    known = [sum(p for p in powers if p is not None) for powers in drawn if powers and None not in powers]
    return float(np.mean(known)) if known else nan


def _origin(record: Record) -> str:
    """Campaign and file of a record where it was sealed, before any merging."""
    source = record.source
    return f"{source.campaign}/{source.record}" if source else f"{record.campaign}/{record.file_name}"


def _ordered(rows: pd.DataFrame) -> pd.DataFrame:
    """Columns in the order of ``contracts.md``, each quantity beside its spread, stage shares together."""
    head = list(rows.columns[: rows.columns.get_loc(QUANTITIES[0])])
    quantities = [
        column
        for name in QUANTITIES
        for column in (name, f"{name}_std", f"{name}_ci95", f"{name}_n", f"{name}_kind")
        if column in rows.columns
    ]
    shares = [c for ending in ("_time_share", "_energy_share") for c in rows.columns if c.endswith(ending)]
    rest = [c for c in rows.columns if c not in {*head, *quantities, *shares}]
    return rows[[*head, *quantities, *shares, *rest]]
