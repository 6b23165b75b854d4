"""Table 3b: how well the calibrated cost model predicts points that it has not seen.

Eight points of the three sweeps calibrate (config/prediction.yaml, ``table3b``), all others are predicted; a
configuration that calibrates is counted in no set.  ``models`` leaves one of the study's models out, in turn.
The study's formula and one efficiency stand beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from t2v_energy.analysis.sweep import SETS, Predictor, Sweep, counted_frames, fit_efficiency, read_sweeps
from t2v_energy.analysis.tables import QUANTITIES, booktabs, mape_percent
from t2v_energy.config import load_accelerator, load_campaign, load_model
from t2v_energy.errors import UserError
from t2v_energy.prediction.calibrated import (
    Calibration,
    Predictions,
    calibrate,
    picked_by_work,
    predict_points,
    presumed_calibration,
)
from t2v_energy.prediction.features import SIZES, Point
from t2v_energy.prediction.presumed import Table3b, load_presumed
from t2v_energy.prediction.rates import rates_of
from t2v_energy.study import load_study
from t2v_energy.work import paper, paper_work, true_work

MODELS = "models"
CROSS_MODEL = "cross-model"
PREDICTORS: Mapping[str, str] = {
    "paper": "formula and constants as printed",
    "single_mu": "true work, µ of the calibrating points",
    "operators": "rates of single operators, no video",
    "calibrated": "rates by operator, fitted to the calibrating points",
}
"""Predictors of table 3b in words, in its order."""
TABLE3B_COLUMNS = (
    "set",
    "predictor",
    "quantity",
    "mape_percent",
    "max_ape_percent",
    "coverage_90",
    "n",
    "held_out",
)
POINT_COLUMNS = (
    "set",
    "model",
    *SIZES,
    "quantity",
    "measured",
    "predictor",
    "predicted",
    "low",
    "high",
)
RANDOM_COLUMNS = ("set", "quantity", "choices", "mape_percent_median", "mape_percent_p95", "coverage_90")


@dataclass(frozen=True)
class Measured:
    """Measured videos of one campaign that the cost model is held against.

    Attributes:
        rows: those of configurations.csv, with column ``set`` (one of the three sweeps, or ``models``).
        accelerator: the campaign's.
        root: the repository's root.
        source: path of configurations.csv, as it was given.
    """

    rows: pd.DataFrame
    accelerator: str
    root: Path
    source: str

    @property
    def points(self) -> list[Point]:
        """The rows as points of the cost model, with the boards that measured them."""
        boards = self.rows["gpu_uuids"].fillna("").astype(str)
        sizes = self.rows[list(SIZES)].astype(int).itertuples(index=False)
        return [
            Point(model, height, width, frames, steps, board)
            for model, (height, width, frames, steps), board in zip(
                self.rows["model"], sizes, boards, strict=True
            )
        ]

    @property
    def keys(self) -> list[tuple[object, ...]]:
        """What makes two rows one configuration."""
        return [point[:5] for point in self.points]

    def fitted(self, which: NDArray[np.intp]) -> Calibration:
        """The cost model, fitted to these rows."""
        rows, points = self.rows.iloc[which], self.points
        values = (rows["latency_s"].to_numpy(), rows["gpu_energy_Wh"].to_numpy())
        return calibrate(self.root, [points[i] for i in which], *values, self.accelerator, where=self.source)


def read_measured(
    root: Path, configurations: Path, sweeps: Mapping[str, Sweep], accelerator: str
) -> Measured:
    """Rows of the three sweeps and of experiment ``cross-model``, with latency and GPU energy.

    Left out are videos whose VAE decoded in tiles and other changed pipelines, which do other work.  A model
    that ``cross-model`` measured with both protocols counts once, as it was sampled; the sweeps' own, if it
    lacks that, is taken from them at its defaults.
    """
    parts = [sweep.rows[~sweep.tiled].assign(set=name) for name, sweep in sweeps.items()]
    table = pd.read_csv(root / configurations)
    found = table[
        (table["experiment"] == CROSS_MODEL) & (table["status"] == "ok") & table["intervention"].isna()
    ]
    found = found.sort_values("protocol", kind="stable").drop_duplicates("model", keep="last")
    if len(found):
        found = pd.concat([found, _at_defaults(sweeps, set(found["model"]))])
    rows = pd.concat([*parts, found.assign(set=MODELS)], ignore_index=True)
    rows = rows.dropna(subset=["latency_s", "gpu_energy_Wh"]).reset_index(drop=True)
    return Measured(rows, accelerator, root, str(configurations))


def campaign_calibration(root: Path, campaign: str) -> Calibration:
    """The cost model, fitted to all rows of a campaign that :func:`read_measured` takes.

    Raises:
        UserError: the campaign is not aggregated yet, or its rows are too few or too alike to calibrate.
    """
    path = Path("results") / "aggregated" / campaign / "configurations.csv"
    accelerator = load_campaign(root, campaign).accelerator
    if not (root / path).is_file():
        raise UserError(
            f"campaign {campaign} is not aggregated yet",
            where=str(path),
            remedy=f"snakemake --cores 2 --config campaign={campaign} -- {path}",
        )
    table = pd.read_csv(root / path)
    swept = table["experiment"].isin(SETS) & (table["status"] == "ok")
    sweeps = read_sweeps(root, campaign, path) if swept.any() else {}
    measured = read_measured(root, path, sweeps, accelerator)
    return measured.fitted(np.arange(len(measured.rows)))


def _at_defaults(sweeps: Mapping[str, Sweep], known: set[str]) -> pd.DataFrame:
    """The first row of a sweep at its model's defaults, where that model is not ``known``."""
    for sweep in sweeps.values():
        d = sweep.model.defaults
        values = [d.height, d.width, d.num_frames, d.num_inference_steps]
        same = (sweep.rows[list(SIZES)] == values).all(axis=1)
        if sweep.model.key not in known and same.any():
            return sweep.rows[same][:1]
    return pd.DataFrame()


# --- which points calibrate -------------------------------------------------------------------------------


def total_flop(measured: Measured) -> NDArray[np.float64]:
    """True work of every row (FLOP)."""
    return np.array(
        [true_work(load_model(measured.root, p.model), *p[1:5]).total_flop for p in measured.points]
    )


def by_rule(measured: Measured, rule: Table3b) -> NDArray[np.intp]:
    """Rows that calibrate: of each set its ends and evenly spaced between, by work."""
    flop, sets = total_flop(measured), measured.rows["set"].to_numpy()
    picked = []
    for name, count in rule.points.items():
        own = np.flatnonzero(sets == name)
        if len(own):
            picked.append(own[picked_by_work(flop[own], count)])
    if not picked:
        raise UserError(
            "there is no row of the sets that calibrate",
            where=measured.source,
            remedy=f"measure {', '.join(rule.points)}, or change table3b.points of config/prediction.yaml",
        )
    return np.concatenate(picked)


def at_random(measured: Measured, rule: Table3b) -> Iterator[NDArray[np.intp]]:
    """As many rows of each set, drawn; ``rule.random_choices`` times."""
    rng, sets = np.random.default_rng(rule.seed), measured.rows["set"].to_numpy()
    for _ in range(rule.random_choices):
        own = [(np.flatnonzero(sets == name), count) for name, count in rule.points.items()]
        yield np.concatenate(
            [rng.choice(rows, min(count, len(rows)), replace=False) for rows, count in own if len(rows)]
        )


def held_out(measured: Measured, calibrating: NDArray[np.intp]) -> NDArray[np.intp]:
    """Rows of the three sweeps whose configuration calibrates nothing."""
    keys = measured.keys
    used = {keys[i] for i in calibrating}
    sets = measured.rows["set"].to_numpy()
    return np.array([i for i, key in enumerate(keys) if sets[i] != MODELS and key not in used], dtype=np.intp)


# --- predictions ------------------------------------------------------------------------------------------


def predicted(measured: Measured, calibrating: NDArray[np.intp], wanted: NDArray[np.intp]) -> pd.DataFrame:
    """Predictions of the rows ``wanted`` by every predictor, one row a point, predictor and quantity.

    Columns :data:`POINT_COLUMNS`; only ``calibrated`` and ``operators`` have the ends ``low`` and ``high`` of
    a 90 % interval.  ``operators`` knows of no video: it is there where single operators were measured.
    """
    points = [measured.points[i] for i in wanted]
    by_operator = {"calibrated": predict_points(measured.root, measured.fitted(calibrating), points)}
    if rates_of(measured.root, measured.accelerator):
        alone = presumed_calibration(measured.root, measured.accelerator)
        by_operator["operators"] = predict_points(measured.root, alone, points)
    parts = []
    rows = measured.rows.iloc[wanted]
    single = _single_mu(measured, calibrating)
    simple = {"single_mu": (single, total_flop(measured)[wanted])}
    if (rows["set"] != MODELS).all():  # the formula is of one model's constants
        printed = Predictor("paper", "study", paper.EFFICIENCY, paper.PEAK_FLOP_PER_S, paper.MAX_POWER_W)
        simple = {"paper": (printed, _printed_flop(rows)), **simple}
    for quantity in QUANTITIES:
        base = rows[["set", "model", *SIZES]].assign(quantity=quantity, measured=rows[quantity].to_numpy())
        for key, (predictor, flop) in simple.items():
            parts.append(base.assign(predictor=key, predicted=getattr(predictor, quantity)(flop)))
        for key, found in by_operator.items():
            value, low, high = _interval(found, quantity)
            parts.append(base.assign(predictor=key, predicted=value, low=low, high=high))
    return pd.concat(parts, ignore_index=True)[list(POINT_COLUMNS)]


def _interval(found: Predictions, quantity: str) -> tuple[NDArray[np.float64], ...]:
    return found.interval(quantity)  # type: ignore[arg-type]


def leave_one_model_out(measured: Measured, rule: Table3b) -> pd.DataFrame:
    """Each of the study's models predicted from the points of all others (columns as :func:`predicted`).

    Those of Wan2.1-T2V-1.3B are the eight of the rule; of every other model there is one.
    """
    models = measured.rows["model"].to_numpy()
    sets = measured.rows["set"].to_numpy()
    one_each = np.flatnonzero(sets == MODELS)
    if len(set(models[one_each])) < 3:
        return pd.DataFrame()
    calibrating = np.concatenate([by_rule(measured, rule), one_each])
    parts = []
    for model in load_study(measured.root).models:
        wanted = one_each[models[one_each] == model]
        if len(wanted):
            parts.append(predicted(measured, calibrating[models[calibrating] != model], wanted))
    return pd.concat(parts, ignore_index=True)


def _single_mu(measured: Measured, calibrating: NDArray[np.intp]) -> Predictor:
    """One efficiency, fitted to the same points."""
    limits = load_accelerator(measured.root, measured.accelerator)
    peak = limits.peak_bf16_dense_TFLOPs * 1e12
    seconds = measured.rows["latency_s"].to_numpy()[calibrating]
    fit = fit_efficiency(total_flop(measured)[calibrating], seconds, peak)
    return Predictor("single_mu", "true", fit.value, peak, limits.board_power_W, fit)


def _printed_flop(rows: pd.DataFrame) -> NDArray[np.float64]:
    """The study's formula as printed, with the T that it would have put in (:func:`counted_frames`)."""
    return np.array(
        [
            paper_work(
                row["height"],
                row["width"],
                counted_frames("study", row["set"], int(row["num_frames"])),
                int(row["num_inference_steps"]),
            ).total_flop
            for _, row in rows.iterrows()
        ]
    )


# --- the tables -------------------------------------------------------------------------------------------


def table3b(points: pd.DataFrame) -> pd.DataFrame:
    """Table 3b, columns :data:`TABLE3B_COLUMNS`, of held-out predictions (:func:`predicted`).

    ``coverage_90``: share of measured values within the 90 % interval; empty for predictors that give none.
    """
    rows = []
    for (name, predictor, quantity), own in points.groupby(
        ["set", "predictor", "quantity"], sort=False, observed=True
    ):
        inside = own["measured"].between(own["low"], own["high"])
        coverage = float(inside.mean()) if own["low"].notna().all() else float("nan")
        rows.append(
            (
                name,
                predictor,
                quantity,
                mape_percent(own["predicted"], own["measured"]),
                float(ape_percent(own).max()),
                coverage,
                len(own),
                True,
            )
        )
    found = pd.DataFrame(rows, columns=list(TABLE3B_COLUMNS))
    sets = {key: place for place, key in enumerate(points["set"].unique())}
    predictors = {key: place for place, key in enumerate(PREDICTORS)}
    place = found["set"].map(sets) * len(predictors) + found["predictor"].map(predictors)
    return found.loc[place.sort_values(kind="stable").index].reset_index(drop=True)


def ape_percent(points: pd.DataFrame) -> pd.Series:
    """Absolute percentage error of each prediction."""
    return 100 * (points["predicted"] / points["measured"] - 1).abs()


def random_table(measured: Measured, rule: Table3b) -> pd.DataFrame:
    """The calibrated model with calibrating points drawn at random, columns :data:`RANDOM_COLUMNS`."""
    found = []
    points = measured.points
    for choice, calibrating in enumerate(at_random(measured, rule)):
        wanted = held_out(measured, calibrating)
        predictions = predict_points(measured.root, measured.fitted(calibrating), [points[i] for i in wanted])
        rows = measured.rows.iloc[wanted]
        for quantity in QUANTITIES:
            value, low, high = _interval(predictions, quantity)
            actual = rows[quantity].to_numpy()
            found.append(
                pd.DataFrame(
                    {
                        "choice": choice,
                        "set": rows["set"].to_numpy(),
                        "quantity": quantity,
                        "ape": 100 * np.abs(value / actual - 1),
                        "inside": (low <= actual) & (actual <= high),
                    }
                )
            )
    each = pd.concat(found).groupby(["set", "quantity", "choice"], sort=False)[["ape", "inside"]].mean()
    by_set = each.groupby(level=["set", "quantity"], sort=False)
    table = pd.DataFrame(
        {
            "choices": by_set.size(),
            "mape_percent_median": by_set["ape"].median(),
            "mape_percent_p95": by_set["ape"].quantile(0.95),
            "coverage_90": by_set["inside"].mean(),
        }
    )
    return table.reset_index()[list(RANDOM_COLUMNS)]


def write_table3b(table: pd.DataFrame, stem: Path) -> list[Path]:
    """Write ``<stem>.csv`` and ``<stem>.tex`` (booktabs). Returns the files written."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    csv, tex = (stem.with_name(stem.name + ending) for ending in (".csv", ".tex"))
    csv.write_text(table.to_csv(index=False, float_format="%.4f"), encoding="utf-8")
    names = {"latency_s": "latency", "gpu_energy_Wh": "GPU energy"}
    lines: Sequence[Sequence[str]] = [
        (
            row["set"],
            PREDICTORS[row["predictor"]],
            names[row["quantity"]],
            f"{row['mape_percent']:.2f}",
            f"{row['max_ape_percent']:.1f}",
            "" if np.isnan(row["coverage_90"]) else f"{100 * row['coverage_90']:.0f}",
            str(row["n"]),
        )
        for _, row in table.iterrows()
    ]
    header = ("Set", "Predictor", "Quantity", "MAPE (%)", "Largest (%)", "In 90 % interval (%)", "Points")
    caption = "Errors of predictions on held-out points."
    tex.write_text(booktabs(header, lines, "lllrrrr", caption), encoding="utf-8")
    return [csv, tex]


def rule_of(root: Path) -> Table3b:
    """``table3b`` of config/prediction.yaml."""
    return load_presumed(root).table3b
