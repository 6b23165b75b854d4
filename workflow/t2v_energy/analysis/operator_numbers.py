"""Numbers of the paper's text about single operators: alignment, and predictions from their rates alone."""

from __future__ import annotations

import numpy as np
import pandas as pd

from t2v_energy.analysis.number_parts import Numbers
from t2v_energy.analysis.numbers import Number, Source, decimals
from t2v_energy.config import Accelerator
from t2v_energy.prediction.rates import Rates


def operator_numbers(
    alignment: pd.DataFrame, rates: Rates, limits: Accelerator, cases: int, tables: str, rates_file: str
) -> Numbers:
    """Gains by kernel, head size and side, of matrix products by shape; period; fitted rates and their cases.

    Args:
        alignment: of :func:`t2v_energy.analysis.alignment.alignment_table`; ``tables`` is its folder.
        rates: fitted to the operators, in ``rates_file``; of the accelerator ``limits``.
        cases: operators that ran.
    """
    source = f"{tables}/alignment.csv"
    cases_where = Source(f"{tables.replace('tables', 'aggregated')}/operator_rates.csv", "status=ok", "case")
    numbers: Numbers = {
        "operators.cases": Number(cases, "", "measured", cases_where),
    }
    for _, row in alignment.iterrows():
        length, side = int(row["length"]), row["side"]
        if row["operator"] == "attention":
            shape, what = f"{row['kernel']}{int(row['head_size'])}", f"kernel={row['kernel']}"
        else:
            shape = f"linear{int(row['inputs'])}x{int(row['outputs'])}"
            what = f"inputs={int(row['inputs'])}, outputs={int(row['outputs'])}"
        key, place = f"operators.alignment.{shape}_{length}.{side}", f"{what}, length={length}, side={side}"
        where = Source(source, place, "gain_percent")
        interval = (float(row["gain_percent_ci95_low"]), float(row["gain_percent_ci95_high"]))
        value = float(row["gain_percent"])
        numbers[f"{key}.gain"] = Number(value, "%", "measured", where, interval, 1)
        if np.isfinite(row["period"]):
            numbers[f"{key}.period"] = Number(int(row["period"]), "", "measured", where)
    where = Source(rates_file, "time", "expected")
    peak = limits.peak_bf16_dense_TFLOPs
    for name in ("attention", "attention_narrow", "dense", "convolution_float32", "convolution_half"):
        if name in rates.time:
            value = rates.time[name].expected * peak
            numbers[f"operators.{name}_rate"] = Number(value, "TFLOP/s", "modelled", where, digits=0)
    numbers["operators.fitted_cases"] = Number(rates.cases, "", "measured", Source(rates_file, "cases", ""))
    misfit = 100 * rates.misfit
    numbers["operators.misfit"] = Number(misfit, "%", "modelled", where, digits=decimals(misfit, 2))
    return numbers
