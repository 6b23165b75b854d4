"""Rates and powers of single operators on an accelerator (experiment ``operators``), for the cost model.

:func:`fit` makes them from the table of operators (:mod:`t2v_energy.analysis.operator_rates`): every case is
work of one class, and the cost model's own parameters are fitted to their times. The file that ships for an
accelerator, ``config/rates/<accelerator>.json``, is what :func:`fit` made of the shipped records. Where there
is one, it takes the place of what is presumed of any accelerator.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from t2v_energy.config import Strict, load_accelerator, parse, read_yaml
from t2v_energy.errors import UserError
from t2v_energy.prediction.features import ALIGNMENT, WIDE_HEAD, Features
from t2v_energy.prediction.forward import LINEAR, OPERATOR_PARTS, POWER_NAMES, TIME_NAMES, times
from t2v_energy.prediction.mapfit import fitted
from t2v_energy.prediction.presumed import PredictionFile, Presumed, load_presumed, prior

RATES = Path("config") / "rates"
"""Shipped rates, one file an accelerator."""
LEAST_CALL_S = 1e-4
"""Shorter calls say more of launching than of a rate."""
FUSED = ("cudnn",)
"""Attention kernels whose rate is fitted: those that torch chooses by itself where it can."""
POWER_OF_OPERATOR = {
    "attention": "attention",
    "linear": "dense",
    "convolution": "convolution",
    "elementwise": "traffic",
}
TILE_HEAD, TILE_TOKENS = 64, 128


class Measured(Strict):
    """One parameter as single operators show it."""

    expected: float
    spread: Annotated[float, Field(gt=0)]


class Rates(Strict):
    """What experiment ``operators`` says of an accelerator; ``misfit`` is what no parameter explains."""

    schema_version: Literal[1] = 1
    kind: Literal["modelled"] = "modelled"
    accelerator: str
    cases: int
    misfit: Annotated[float, Field(gt=0)]
    time: dict[str, Measured]
    power: dict[str, Measured]


@dataclass(frozen=True)
class _Case:
    """An operator as the model's features, and what it took."""

    work: dict[str, float]
    call_s: float


def fit(root: Path, accelerator: str, rows: Iterable[Mapping[str, Any]]) -> Rates:
    """Rates and powers from rows of operator_rates.csv.

    Raises:
        UserError: no row of an operator that ran and took long enough; an unknown accelerator.
    """
    limits, presumed = load_accelerator(root, accelerator), load_presumed(root)
    found = list(rows)
    cases = [case for row in found if (case := _case(row)) is not None]
    if not cases:
        raise UserError(
            "no operator took long enough to tell a rate",
            where="experiment operators",
            remedy="measure it: t2v-energy measure --campaign <campaign> --experiment operators",
        )
    work = _features([case.work for case in cases])
    mean, spread = prior(TIME_NAMES, presumed.time, LINEAR)
    names = _informed(work)
    free = np.array([name in names for name in TIME_NAMES])
    none = np.empty((len(cases), 0))

    def forward(theta: Any) -> tuple[Any, Any]:
        full = mean.copy()
        full[free] = theta
        found = times(full, none, work, limits).of(OPERATOR_PARTS)
        return np.log(found.part_s.sum(axis=1)), found.derivatives[:, free]

    result = fitted(
        list(names), forward, np.log([case.call_s for case in cases]), mean[free], spread[free], 0.05, 4.0
    )
    sd = np.sqrt(np.diag(np.array(result.covariance)))
    time = {
        name: Measured(
            expected=_rounded(value if name in LINEAR else float(np.exp(value))), spread=_rounded(float(s))
        )
        for name, value, s in zip(names, result.mean, sd, strict=True)
    }
    return Rates(
        accelerator=accelerator,
        cases=len(cases),
        misfit=_rounded(result.misfit),
        time=time,
        power=_powers(found, limits.board_power_W),
    )


def _case(row: Mapping[str, Any]) -> _Case | None:
    """The features of a case, or None where it says nothing of a rate."""
    if row["status"] != "ok" or not float(row["call_s"]) >= LEAST_CALL_S:
        return None
    work = _WORK[str(row["operator"])](row)
    return _Case(work, float(row["call_s"])) if work else None


def _attention(row: Mapping[str, Any]) -> dict[str, float]:
    """As kernels execute it: short heads filled up to 64 values, short lengths to 128 tokens.

    None of a cross-attention, whose keys the video's length does not change, and of other kernels.
    """
    if row["attention_kernel"] not in FUSED or row["dtype"] == "float32" or row["masked"]:
        return {}
    queries, keys, head = (int(float(row[name])) for name in ("queries", "keys", "head_size"))
    if queries > 2 * keys:
        return {}
    wide = head >= WIDE_HEAD
    flop = float(row["flop"])
    if not wide:
        flop = 4.0 * float(row["batch"]) * float(row["heads"]) * _filled(head, TILE_HEAD)
        flop *= _filled(queries, TILE_TOKENS) * _filled(keys, TILE_TOKENS)
    name = "attention_flop" if wide else "attention_narrow_flop"
    return {name: flop, "tokens": float(queries), "aligned": float(keys % ALIGNMENT == 0)}


def _linear(row: Mapping[str, Any]) -> dict[str, float]:
    return {"dense_flop": float(row["flop"]), "product_bytes": float(row["bytes"])}


def _convolution(row: Mapping[str, Any]) -> dict[str, float]:
    name = "vae_float32_flop" if row["dtype"] == "float32" else "vae_half_flop"
    return {name: float(row["flop"]), "vae_convolution_bytes": float(row["bytes"])}


def _elementwise(row: Mapping[str, Any]) -> dict[str, float]:
    return {"traffic_bytes": float(row["bytes"])}


_WORK = {
    "attention": _attention,
    "linear": _linear,
    "convolution": _convolution,
    "elementwise": _elementwise,
}


def _features(found: Sequence[Mapping[str, float]]) -> Features:
    return Features(**{f.name: np.array([w.get(f.name, 0.0) for w in found]) for f in fields(Features)})


_PARAMETERS: Mapping[str, Sequence[str]] = {
    "attention_flop": ("attention",),
    "attention_narrow_flop": ("attention_narrow",),
    "aligned": ("attention_gain",),
    "dense_flop": ("dense", "exposed"),
    "traffic_bytes": ("traffic",),
    "vae_float32_flop": ("convolution_float32", "layout"),
    "vae_half_flop": ("convolution_half", "layout"),
}
"""Parameters that work of each kind informs.  How attention changes with length is not taken from short
visits, whose clocks no video keeps: the longer the call, the more of a visit is at the power cap."""


def _informed(work: Features) -> list[str]:
    told = {name for kind, names in _PARAMETERS.items() if getattr(work, kind).any() for name in names}
    return [name for name in TIME_NAMES if name in told]


def _powers(rows: Sequence[Mapping[str, Any]], board_W: float) -> dict[str, Measured]:
    """Shares of the board's power in the steady loops of each class; their spread is that between loops."""
    by_name: dict[str, list[float]] = {}
    for row in rows:
        power = float(row["power_W"])
        if row["status"] != "ok" or not power > 0:
            continue
        name = POWER_OF_OPERATOR[str(row["operator"])] if float(row["call_s"]) >= LEAST_CALL_S else "launch"
        by_name.setdefault(name, []).append(power / board_W)
    return {
        name: Measured(
            expected=_rounded(float(np.exp(np.mean(np.log(by_name[name]))))),
            spread=_rounded(max(float(np.std(np.log(by_name[name]))), LEAST_POWER_SPREAD)),
        )
        for name in POWER_NAMES
        if name in by_name
    }


LEAST_POWER_SPREAD = 0.005


def _filled(count: int, tile: int) -> int:
    return -(-count // tile) * tile


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


# --- files ------------------------------------------------------------------------------------------------


def to_json(rates: Rates) -> str:
    """The rates as JSON, one parameter a line."""
    return json.dumps(rates.model_dump(mode="json"), indent=1) + "\n"


@cache
def rates_of(root: Path, accelerator: str) -> Rates | None:
    """The shipped rates of an accelerator, if there are some."""
    path = root / RATES / f"{accelerator}.json"
    if not path.is_file():
        return None
    return parse(Rates, read_yaml(path, "restore it from the repository"), str(path))


@cache
def presumed_of(root: Path, accelerator: str) -> PredictionFile:
    """config/prediction.yaml, with what single operators say of the accelerator in its place.

    What a pipeline's operators take may differ from what loops of them do, by ``transfer``.
    """
    presumed, rates = load_presumed(root), rates_of(root, accelerator)
    if rates is None:
        return presumed
    updated = {}
    for section, own in (("time", rates.time), ("power", rates.power)):
        transfer: Mapping[str, float] = getattr(presumed.transfer, section)
        moved = {
            name: Presumed(
                expected=value.expected,
                spread=float(np.hypot(value.spread, transfer.get(name, transfer["other"]))),
            )
            for name, value in own.items()
        }
        for name in transfer.keys() - own.keys() - {"other"}:  # of all together, or of what no loop shows
            value = getattr(getattr(presumed, section), name)
            moved[name] = value.model_copy(update={"spread": transfer[name]})
        updated[section] = getattr(presumed, section).model_copy(update=moved)
    return presumed.model_copy(update=updated)
