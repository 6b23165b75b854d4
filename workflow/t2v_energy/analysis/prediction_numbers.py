"""Numbers of the paper's text about the calibrated cost model."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from t2v_energy.analysis.number_parts import Numbers, stem
from t2v_energy.analysis.numbers import Number, Source, decimals
from t2v_energy.analysis.prediction import MODELS, ape_percent
from t2v_energy.analysis.prediction_figure import LINEAR_PERCENT
from t2v_energy.analysis.tables import QUANTITIES
from t2v_energy.config import Accelerator
from t2v_energy.prediction.calibrated import Calibration
from t2v_energy.prediction.forward import TIME_NAMES
from t2v_energy.prediction.presumed import PREDICTION_FILE, Table3b


def prediction_numbers(
    points: pd.DataFrame,
    table: pd.DataFrame,
    random: pd.DataFrame,
    calibration: Calibration,
    limits: Accelerator,
    rule: Table3b,
    source: str,
) -> Numbers:
    """Errors by set and predictor, coverage of the intervals, and the fitted rates.

    Args:
        points, table, random: of :mod:`t2v_energy.analysis.prediction`; ``source`` is the table's file.
        calibration: fitted to all points, on the accelerator ``limits``.
    """
    return {
        **_errors(table, source),
        **_random(random, source),
        **_coverage(points, source),
        **_other_models(points, source),
        **_rates(calibration, limits, source),
        "prediction.calibrating": Number(
            sum(rule.points.values()), "", "constant", Source(str(PREDICTION_FILE), "table3b", "points")
        ),
        "prediction.figure_linear": Number(
            LINEAR_PERCENT, "", "constant", Source("figures/fig6.pdf", "axis of the errors", "linear part, %")
        ),
        "prediction.random_choices": Number(
            rule.random_choices, "", "constant", Source(str(PREDICTION_FILE), "table3b", "random_choices")
        ),
    }


def _errors(table: pd.DataFrame, source: str) -> Numbers:
    numbers: Numbers = {}
    for _, row in table.iterrows():
        prefix = f"prediction.{row['set']}.{row['predictor']}.{stem(row['quantity'])}"
        where = f"set={row['set']}, predictor={row['predictor']}, quantity={row['quantity']}"
        for name, column in (("mape", "mape_percent"), ("largest", "max_ape_percent")):
            value = float(row[column])
            digits = decimals(value, 2)
            numbers[f"{prefix}.{name}"] = Number(
                value, "%", "modelled", Source(source, where, column), digits=digits
            )
    held_out = table[(table["predictor"] == "calibrated") & (table["quantity"] == QUANTITIES[0])]
    for _, row in held_out.iterrows():
        numbers[f"prediction.{row['set']}.points"] = Number(
            int(row["n"]), "", "modelled", Source(source, f"set={row['set']}", "n")
        )
    return numbers


def _random(table: pd.DataFrame, source: str) -> Numbers:
    numbers: Numbers = {}
    for _, row in table.iterrows():
        value = float(row["mape_percent_median"])
        where = Source(
            source.replace("table3b", "table3b_random"),
            f"set={row['set']}, quantity={row['quantity']}",
            "mape_percent_median",
        )
        key = f"prediction.{row['set']}.random.{stem(row['quantity'])}.mape"
        numbers[key] = Number(value, "%", "modelled", where, digits=decimals(value, 2))
    return numbers


def _coverage(points: pd.DataFrame, source: str) -> Numbers:
    """Share of measured values in their 90 % interval, all predictions together (Clopper and Pearson)."""
    own = points[points["predictor"] == "calibrated"]
    inside = int(own["measured"].between(own["low"], own["high"]).sum())
    ends = binomtest(inside, len(own)).proportion_ci(0.95)
    where = Source(source.replace("table3b", "table3b_points"), "predictor=calibrated", "low, high")
    interval = (100 * float(ends.low), 100 * float(ends.high))
    return {
        "prediction.coverage": Number(100 * inside / len(own), "%", "modelled", where, interval, 1),
        "prediction.held_out": Number(len(own), "", "modelled", where),
    }


def _other_models(points: pd.DataFrame, source: str) -> Numbers:
    """Median and largest error where the model was left out, and which that is."""
    numbers: Numbers = {}
    own = points[(points["predictor"] == "calibrated") & (points["set"] == MODELS)]
    for quantity, rows in own.groupby("quantity"):
        error = ape_percent(rows)
        place = f"set=models, quantity={quantity}"
        where = Source(source.replace("table3b", "table3b_points"), place, "predicted")
        prefix = f"prediction.models.{stem(str(quantity))}"
        median = float(np.median(error))
        numbers[f"{prefix}.median"] = Number(median, "%", "modelled", where, digits=decimals(median, 2))
        worst = str(rows["model"].to_numpy()[int(error.argmax())])
        numbers[f"{prefix}.worst_model"] = Number(worst, "", "constant", where)
        second = float(error.sort_values().iloc[-2])
        numbers[f"{prefix}.second_largest"] = Number(
            second, "%", "modelled", where, digits=decimals(second, 2)
        )
    return numbers


def _rates(calibration: Calibration, limits: Accelerator, source: str) -> Numbers:
    """Rates of attention and other products, attention's gain with its interval, spread of boards."""
    where = Source(source.replace("tables", "calibrations"), "time", "mean")
    mean = dict(zip(calibration.time.names, calibration.time.mean, strict=True))
    sd = dict(
        zip(calibration.time.names, np.sqrt(np.diag(np.array(calibration.time.covariance))), strict=True)
    )
    boards = [100 * np.expm1(v) for name, v in mean.items() if name.startswith("board:")]
    numbers: Numbers = {}
    gain = 100 * float(mean["attention_gain"])
    half = 100 * calibration.time.t90 * float(sd["attention_gain"])
    numbers["prediction.attention_gain"] = Number(gain, "%", "modelled", where, (gain - half, gain + half), 1)
    pace = mean["pace"]
    for name in ("attention", "dense"):
        rate = float(np.exp(mean[name] - pace)) * limits.peak_bf16_dense_TFLOPs
        numbers[f"prediction.{name}_rate"] = Number(rate, "TFLOP/s", "modelled", where, digits=0)
    if len(boards) > 1:
        spread = float(max(boards) - min(boards))
        numbers["prediction.boards_spread"] = Number(spread, "%", "modelled", where, digits=1)
    numbers["prediction.misfit"] = Number(100 * calibration.time.misfit, "%", "modelled", where, digits=2)
    assert set(TIME_NAMES) <= set(mean)
    return numbers
