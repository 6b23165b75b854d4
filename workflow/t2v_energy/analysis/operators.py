"""Which operators a video's time on the GPU goes to (``operators.csv``), from profiled generations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from t2v_energy.errors import UserError
from t2v_energy.measurement.record import LOOP_STAGES, Operators, Spans, Windows
from t2v_energy.measurement.validity import MAX_PROFILE_EXCESS_PERCENT, profile_excess

COLUMNS = ("model", "stage", "operator_class", "gpu_time_share", "gpu_s", "kernels", "kind")
OTHER = "elementwise"
CLASSES: Mapping[str, tuple[str, ...]] = {
    "attention": ("attention",),
    "convolution": ("conv", "convolution"),
    "gemm": ("linear", "matmul", "mm", "bmm", "baddbmm", "einsum"),
    "normalisation": ("norm",),
    "data_movement": (
        "to", "copy", "contiguous", "clone", "cat", "stack", "pad", "permute", "reshape", "index", "gather",
        "scatter", "embedding", "repeat", "roll", "chunk", "select", "slice", "type_as",
    ),
}  # fmt: skip
"""Words of an operator's name by class, the first class that fits; whatever fits none is element-wise."""


def operator_class(operator: str) -> str:
    """The class of one of torch's operators, such as ``aten::linear``.

    >>> operator_class("aten::scaled_dot_product_attention"), operator_class("aten::linalg_vector_norm")
    ('attention', 'normalisation')
    """
    words = operator.partition("::")[2].strip("_").split("_")
    for name, keys in CLASSES.items():
        if any(_fits(word, key) for word in words for key in keys):
            return name
    return OTHER


def _fits(word: str, key: str) -> bool:
    """Whole words, and such with a number of dimensions: ``conv3d``, ``addmm``."""
    return word == key or word.rstrip("0123456789d") == key or (key == "mm" and word == "addmm")


def operators_table(records: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """``operators.csv``, columns :data:`COLUMNS`, one row a model, stage and class.

    Args:
        records: records' JSON as it is; those without a profile are left out, and those whose profile holds
            more kernel time of a stage than the stage takes (rule ``profile`` of docs/record.md).

    A profile holds one generation of few steps; what is inside the loop comes S/steps times in a video.
    ``gpu_time_share`` is a class's part of all kernels' time in a video (1), ``gpu_s`` that time (s), and
    ``kernels`` their number.  Rows are in the order of time, within models in the records' order.

    Raises:
        UserError: two profiles of one model.
    """
    found: list[pd.DataFrame] = []
    for record in records:
        if record.get("operators") and _believable(record):
            model = record["configuration"]["model"]
            if any(model == table["model"].iloc[0] for table in found):
                raise UserError(
                    f"{model} was profiled twice",
                    where=f"results/raw/{record['campaign']}/{record['experiment']}",
                    remedy="set `protocols: {profile: true}` for one configuration and pass of each model",
                )
            found.append(_of_record(record))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=list(COLUMNS))


def _believable(record: Mapping[str, Any]) -> bool:
    if record["environment"]["gpu"] is None:
        return True  # tiny models on a processor, whose threads' times add up to more than the clock's
    parts = (
        Windows.model_validate(record["windows"]),
        Spans.model_validate(record["spans"]),
        Operators.model_validate(record["operators"]),
    )
    return profile_excess(*parts)[1] <= MAX_PROFILE_EXCESS_PERCENT


def _of_record(record: Mapping[str, Any]) -> pd.DataFrame:
    profile, configuration = record["operators"], record["configuration"]
    rows = pd.DataFrame({name: profile[name] for name in ("stage", "operator", "device_s", "kernels")})
    scale = configuration["num_inference_steps"] / profile["steps"]
    times = rows["stage"].isin(LOOP_STAGES).map({True: scale, False: 1.0})
    rows["gpu_s"] = rows["device_s"] * times
    rows["kernels"] = (rows["kernels"] * times).round().astype(int)
    rows["operator_class"] = rows["operator"].map(operator_class)
    table = rows.groupby(["stage", "operator_class"], as_index=False)[["gpu_s", "kernels"]].sum()
    table["model"], table["kind"] = configuration["model"], "measured"
    table["gpu_time_share"] = table["gpu_s"] / table["gpu_s"].sum()
    return table.sort_values("gpu_s", ascending=False, kind="stable")[list(COLUMNS)]
