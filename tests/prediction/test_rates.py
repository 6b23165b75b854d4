"""Rates of single operators: what is planted is found, what ships is what the records say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
from t2v_energy.analysis.operator_rates import operator_rates
from t2v_energy.config import load_accelerator
from t2v_energy.errors import UserError
from t2v_energy.operator_suite import load_suite
from t2v_energy.prediction import rates
from t2v_energy.prediction.calibrated import predict_points, presumed_calibration
from t2v_energy.prediction.features import Point
from t2v_energy.prediction.presumed import load_presumed

ROOT = tiny.ROOT
PLANTED = {
    "attention": 0.5,
    "attention_narrow": 0.35,
    "dense": 0.8,
    "traffic": 0.7,
    "convolution_float32": 0.15,
    "convolution_half": 0.45,
}
GAIN, EXPOSED, LAYOUT = 0.08, 0.4, 3.0


def row(case: Any) -> dict[str, Any]:
    """A row of operator_rates.csv, without what it took."""
    names = ("batch", "heads", "head_size", "queries", "keys", "dtype", "masked")
    found = {name: getattr(case, name, float("nan")) for name in names}
    kernel = (case.kernel or "cudnn") if case.operator == "attention" else ""
    masked = bool(getattr(case, "masked", False))
    return {
        **found,
        "masked": masked,
        "operator": case.operator,
        "attention_kernel": kernel,
        "flop": case.flop,
        "bytes": case.bytes,
        "status": "ok",
        "power_W": float("nan"),
    }


def planted_s(found: dict[str, Any]) -> float:
    """What a call takes on a machine of the planted rates (s)."""
    limits = load_accelerator(ROOT, "h200")
    peak, bandwidth = limits.peak_bf16_dense_TFLOPs * 1e12, limits.bandwidth_TB_per_s * 1e12
    moved = found["bytes"] / (PLANTED["traffic"] * bandwidth)
    if found["operator"] == "attention":
        name = "attention" if found["head_size"] >= 128 else "attention_narrow"
        edge = 1 - GAIN * (found["keys"] % 128 == 0)
        return float(found["flop"] / (PLANTED[name] * peak) * edge)
    if found["operator"] == "linear":
        return float(found["flop"] / (PLANTED["dense"] * peak) + EXPOSED * moved)
    if found["operator"] == "convolution":
        name = "convolution_float32" if found["dtype"] == "float32" else "convolution_half"
        return float(found["flop"] / (PLANTED[name] * peak) + LAYOUT * moved)
    return float(moved)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    found = []
    for series in load_suite(ROOT).series:
        if series.key in ("attention-length", "linear-size", "linear-models", "convolution", "elementwise"):
            found += [row(case) for case in series.cases]
        if series.key == "attention-head-size":
            whole = [c for c in series.cases if c.head_size % 64 == 0 and c.queries >= 1024]
            found += [row(case) for case in whole]
    for one in found:
        one["call_s"] = planted_s(one)
    return found


def test_planted_rates_are_found(rows: list[dict[str, Any]]) -> None:
    found = rates.fit(ROOT, "h200", rows)
    for name, value in PLANTED.items():
        assert found.time[name].expected == pytest.approx(value, rel=0.03), name
    assert found.time["attention_gain"].expected == pytest.approx(GAIN, abs=0.01)
    assert found.time["exposed"].expected == pytest.approx(EXPOSED, rel=0.2)
    assert found.time["layout"].expected == pytest.approx(LAYOUT, rel=0.2)
    assert found.power == {}


def test_other_kernels_and_short_calls_say_nothing(rows: list[dict[str, Any]]) -> None:
    slow = [{**r, "call_s": 3 * r["call_s"]} for r in rows if r["attention_kernel"] == "flash"]
    short = [{**r, "call_s": 5e-5} for r in rows[:3]]
    assert slow
    rest = [r for r in rows if r["attention_kernel"] != "flash"]
    assert rates.fit(ROOT, "h200", [*rest, *slow, *short]) == rates.fit(ROOT, "h200", rest)


def test_powers_are_shares_of_the_board(rows: list[dict[str, Any]]) -> None:
    loops = [{**r, "power_W": 650.0} for r in rows if r["operator"] == "linear"]
    waiting = {**loops[0], "call_s": 1e-5, "power_W": 140.0}
    long = [r for r in loops if r["call_s"] >= rates.LEAST_CALL_S]
    found = rates.fit(ROOT, "h200", [*rows, *long, waiting]).power
    assert found["dense"].expected == pytest.approx(650 / 700, rel=1e-5)
    assert found["launch"].expected == pytest.approx(0.2, rel=1e-5)
    assert set(found) == {"dense", "launch"}


def test_nothing_to_fit() -> None:
    with pytest.raises(UserError, match="no operator took long enough"):
        rates.fit(ROOT, "h200", [])


def test_what_ships_is_what_the_records_say() -> None:
    records = sorted((ROOT / "results/raw/h200/operators").glob("*__operators_r*.json"))
    table = operator_rates(records)
    built = rates.fit(ROOT, "h200", table.to_dict("records"))
    shipped = rates.rates_of(ROOT, "h200")
    assert shipped is not None
    assert built.cases == shipped.cases
    for section in ("time", "power"):
        old, new = getattr(shipped, section), getattr(built, section)
        assert old.keys() == new.keys()
        for name, value in old.items():
            assert value.expected == pytest.approx(new[name].expected, rel=1e-3)
            assert value.spread == pytest.approx(new[name].spread, rel=1e-2)


def test_they_take_the_place_of_what_is_presumed() -> None:
    presumed, moved = load_presumed(ROOT), rates.presumed_of(ROOT, "h200")
    shipped = rates.rates_of(ROOT, "h200")
    assert shipped is not None
    assert moved.time.dense.expected == shipped.time["dense"].expected != presumed.time.dense.expected
    wider = np.hypot(shipped.time["dense"].spread, presumed.transfer.time["other"])
    assert moved.time.dense.spread == pytest.approx(wider)
    assert moved.time.pace.spread == presumed.transfer.time["pace"] < presumed.time.pace.spread
    assert moved.time.host == presumed.time.host
    assert rates.presumed_of(ROOT, "h100-sxm") == presumed


def test_they_narrow_a_prediction_without_any_video() -> None:
    point = [Point("wan2.1-t2v-1.3b", 720, 1280, 81, 50)]
    known, unknown = (
        predict_points(ROOT, presumed_calibration(ROOT, a), point) for a in ("h200", "h100-sxm")
    )
    width = [float(p.latency_s_high[0] / p.latency_s[0]) for p in (known, unknown)]
    assert width[0] < width[1]
    assert "single operators" in known.notes[0]
