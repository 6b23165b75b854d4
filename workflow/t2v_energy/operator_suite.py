"""What experiment ``operators`` runs: config/operators.yaml as typed series of single operators.

An operator case is one call of torch with its sizes and number type.  A list in the file stands for one case
each, several lists for all their combinations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from math import ceil, prod
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from t2v_energy.config import Accelerator, AttentionKernel, Key, Positive, Strict, parse, read_yaml
from t2v_energy.errors import UserError
from t2v_energy.work.layers import linear_flop, product_flop

SUITE_FILE = Path("config") / "operators.yaml"
Dtype = Literal["float32", "bfloat16", "float16"]
Count = Annotated[int, Field(ge=1)]
VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Bytes that each function reads and writes, in values of its input's type; a conversion's output differs.
PASSES = {"copy": 2, "add": 3, "multiply": 3, "gelu": 2, "silu": 2, "layer_norm": 2, "rms_norm": 2}
CONVERTED_BYTES = {"to_float32": 2 + 4, "to_bfloat16": 4 + 2}
Function = Literal[
    "copy", "add", "multiply", "gelu", "silu", "layer_norm", "rms_norm", "to_float32", "to_bfloat16"
]


class Attention(Strict):
    """Scaled dot-product attention of ``queries`` × ``keys`` tokens."""

    operator: Literal["attention"]
    batch: Count = 1
    heads: Count
    head_size: Count
    queries: Count
    keys: Count
    dtype: Dtype = "bfloat16"
    kernel: AttentionKernel | None = None
    masked: bool = False

    @property
    def flop(self) -> int:
        """QKᵀ and PV: 4 · batch · heads · queries · keys · head size (FLOP)."""
        return self.batch * product_flop(self.queries, self.keys, self.heads * self.head_size)

    @property
    def bytes(self) -> int:
        """Least traffic: q, k, v and the output, each once (bytes)."""
        rows = 2 * (self.queries + self.keys)
        return self.batch * rows * self.heads * self.head_size * VALUE_BYTES[self.dtype]


class Linear(Strict):
    """A linear layer with bias on ``rows`` vectors."""

    operator: Literal["linear"]
    rows: Count
    inputs: Count
    outputs: Count
    dtype: Dtype = "bfloat16"

    @property
    def flop(self) -> int:
        """2 · rows · inputs · outputs (FLOP)."""
        return linear_flop(self.rows, self.inputs, self.outputs)

    @property
    def bytes(self) -> int:
        """Least traffic: input, weights and output, each once (bytes)."""
        values = self.rows * (self.inputs + self.outputs) + self.inputs * self.outputs
        return values * VALUE_BYTES[self.dtype]


class Convolution(Strict):
    """A convolution with bias; ``frames``, ``height`` and ``width`` are those of the output.

    ``taps`` are the kernel's (time, height, width).  Time is padded beforehand, as causal decoders do, and
    rows and columns by the convolution.
    """

    operator: Literal["convolution"]
    batch: Count = 1
    inputs: Count
    outputs: Count
    taps: tuple[Count, Count, Count] = (3, 3, 3)
    frames: Count
    height: Count
    width: Count
    dtype: Dtype

    @property
    def flop(self) -> int:
        """2 · taps · input channels · output channels · output positions (FLOP)."""
        positions = self.batch * self.frames * self.height * self.width
        return 2 * prod(self.taps) * self.inputs * self.outputs * positions

    @property
    def bytes(self) -> int:
        """Least traffic: input, weights and output, each once (bytes)."""
        area = self.batch * self.height * self.width
        read = (self.frames + self.taps[0] - 1) * self.inputs
        weights = prod(self.taps) * self.inputs * self.outputs
        return (area * (read + self.frames * self.outputs) + weights) * VALUE_BYTES[self.dtype]


class Elementwise(Strict):
    """An element-wise function, or a norm over the last axis, of ``rows`` × ``columns`` values."""

    operator: Literal["elementwise"]
    function: Function
    rows: Count
    columns: Count
    dtype: Dtype = "bfloat16"

    @model_validator(mode="after")
    def _converts_from_another_type(self) -> Elementwise:
        if self.function == f"to_{self.dtype}":
            raise ValueError(f"function: {self.function} of {self.dtype} does nothing")
        return self

    @property
    def flop(self) -> int:
        """None is counted: what such a function costs is its traffic."""
        return 0

    @property
    def bytes(self) -> int:
        """Values read and written (bytes)."""
        values = self.rows * self.columns
        if self.function in CONVERTED_BYTES:
            return values * CONVERTED_BYTES[self.function]
        return values * PASSES[self.function] * VALUE_BYTES[self.dtype]


Case = Annotated[Attention | Linear | Convolution | Elementwise, Field(discriminator="operator")]


def label(case: Attention | Linear | Convolution | Elementwise) -> str:
    """A readable name, such as ``attention 1x12x128 q32768 k512 bfloat16 cudnn``."""
    if isinstance(case, Attention):
        sizes = f"{case.batch}x{case.heads}x{case.head_size} q{case.queries} k{case.keys}"
        masked = " masked" if case.masked else ""
        return f"attention {sizes} {case.dtype} {case.kernel or 'default'}{masked}"
    if isinstance(case, Linear):
        return f"linear {case.rows}x{case.inputs}x{case.outputs} {case.dtype}"
    if isinstance(case, Convolution):
        taps = "x".join(map(str, case.taps))
        sizes = f"{case.batch}x{case.frames}x{case.height}x{case.width}"
        return f"convolution {case.inputs}-{case.outputs} {taps} {sizes} {case.dtype}"
    return f"{case.function} {case.rows}x{case.columns} {case.dtype}"


class Series(Strict):
    """Cases that are measured together, in one record."""

    key: Key = Field(description="name of the series, and of its record")
    about: str = Field(description="what it asks, for people")
    mode: Literal["time", "power"] = Field(
        "time",
        description="`time`: short visits, several rounds in an order of their own; `power`: one steady loop "
        "of each case, long enough for the energy counter",
    )
    cases: tuple[Case, ...] = Field(
        min_length=1,
        description="operators with their sizes; a list stands for one case each, several for all their "
        "combinations. `length`: as many queries as keys. `around` (`length`, `offsets`, `sides`: `both`, "
        "`queries`, `keys`, `rows`): the length, and lengths near it on those sides alone",
    )

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and isinstance(data.get("cases"), list | tuple):
            expanded = [case for entry in data["cases"] for case in _expanded(entry)]
            return {**data, "cases": expanded}
        return data

    @model_validator(mode="after")
    def _no_case_twice(self) -> Series:
        labels = [label(case) for case in self.cases]
        twice = sorted({text for text in labels if labels.count(text) > 1})
        if twice:
            raise ValueError(f"cases: {twice[0]} is listed twice")
        return self


class Suite(Strict):
    """config/operators.yaml."""

    rounds: int = Field(3, ge=2, description="visits of each case of a series of times; their spread is kept")
    visit_s: Positive = Field(0.03, description="[s] a visit repeats its call for about so long")
    loop_s: Positive = Field(2.5, description="[s] a loop of a series of powers, after `settle_s`")
    settle_s: float = Field(0.6, ge=0, description="[s] the loop runs so long before its power counts")
    series: tuple[Series, ...] = Field(min_length=1, description="in this order")

    @model_validator(mode="after")
    def _no_series_twice(self) -> Suite:
        keys = [series.key for series in self.series]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"series: {twice[0]} is listed twice")
        return self


def load_suite(root: Path) -> Suite:
    """config/operators.yaml, strictly; raises :class:`UserError` naming the file, the key and the value."""
    path = root / SUITE_FILE
    return parse(Suite, read_yaml(path, "restore it from the repository"), str(path))


def _expanded(entry: Any) -> Iterator[Any]:
    """Cases of one entry: one for each combination of its lists."""
    if not isinstance(entry, Mapping):
        yield entry
        return
    lists = {k: v for k, v in entry.items() if isinstance(v, list | tuple) and k != "taps"}
    for values in product(*lists.values()):
        yield from _lengths({**entry, **dict(zip(lists, values, strict=True))})


def _lengths(case: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Resolves ``length`` and ``around``."""
    if "length" in case:
        length = case.pop("length")
        case |= {"queries": length, "keys": length}
    if "around" not in case:
        yield case
        return
    around = case.pop("around")
    length = around["length"]
    for index, side in enumerate(around["sides"]):
        for offset in around["offsets"]:
            if offset == 0 and index > 0:
                continue  # the length itself is on every side
            near = length + offset
            if side == "rows":
                yield case | {"rows": near}
            else:
                queries = near if side in ("both", "queries") else length
                yield case | {"queries": queries, "keys": near if side in ("both", "keys") else length}


# --- how long it should take --------------------------------------------------------------------------

# Shares of the dense bf16 peak and of the bandwidth with which times are foreseen (kind: constant).
FORESEEN_SHARE = {"attention": 0.45, "linear": 0.6, "convolution": 0.15, "elementwise": 0.5}
FORESEEN_BANDWIDTH_SHARE = 0.7
SLOW_KERNELS = {"flash": 0.6, "efficient": 0.35, "math": 0.05}
FIRST_CALL_S = 0.06  # plans, handles, compilation of a new shape
SERIES_S = 1.5  # settling, and the ticks after the last window
START_S = 15.0  # importing torch, opening the GPU and starting the meter


def foreseen_call_s(case: Attention | Linear | Convolution | Elementwise, accelerator: Accelerator) -> float:
    """How long a call should take (s, modelled), to plan with."""
    share = FORESEEN_SHARE[case.operator]
    if isinstance(case, Attention):
        share *= SLOW_KERNELS.get(case.kernel or "", 1.0)
    rate = share * accelerator.peak_bf16_dense_TFLOPs * 1e12
    if isinstance(case, Convolution) and case.dtype == "float32":
        rate = accelerator.vae_TFLOPs * 1e12
    bandwidth = FORESEEN_BANDWIDTH_SHARE * accelerator.bandwidth_TB_per_s * 1e12
    return max(case.flop / rate, case.bytes / bandwidth, 1e-5)


def foreseen_series_s(series: Series, suite: Suite, accelerator: Accelerator) -> float:
    """How long a series should take (s, modelled)."""
    total_s = SERIES_S
    for case in series.cases:
        call_s = foreseen_call_s(case, accelerator)
        if series.mode == "power":
            total_s += FIRST_CALL_S + 3 * call_s + suite.settle_s + suite.loop_s
        else:
            visit_s = ceil(suite.visit_s / call_s) * call_s
            total_s += FIRST_CALL_S + 2 * call_s + suite.rounds * (visit_s + call_s)
    return total_s


def check_series(suite: Suite, key: str) -> Series:
    """The series of that name; raises :class:`UserError` naming those there are."""
    for series in suite.series:
        if series.key == key:
            return series
    raise UserError(
        f"there is no series {key!r}",
        where=str(SUITE_FILE),
        remedy=f"it has: {', '.join(series.key for series in suite.series)}",
    )
