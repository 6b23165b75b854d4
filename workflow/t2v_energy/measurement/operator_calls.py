"""Single calls of torch, as the pipelines make them, on random operands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import sdpa_kernel

from t2v_energy.errors import UserError
from t2v_energy.measurement.kernels import BACKENDS
from t2v_energy.operator_suite import Attention, Convolution, Elementwise, Linear

Call = Callable[[], Any]


@contextmanager
def ready(case: Attention | Linear | Convolution | Elementwise, device: str, seed: int) -> Iterator[Call]:
    """A function that makes the call of ``case`` once; its operands live as long as this context.

    Operands are normal random numbers from ``seed``; weights are scaled so that outputs are of
    order one, as in a trained model: a GPU's power depends on the values.

    Raises:
        UserError: an attention kernel that torch does not ship.
    """
    generator = torch.Generator(device).manual_seed(seed)
    kernel = case.kernel if isinstance(case, Attention) else None
    if kernel is not None and kernel not in BACKENDS:
        raise UserError(
            f"attention kernel {kernel!r} is not one of torch's",
            where="config/operators.yaml, kernel",
            remedy=f"use one of {', '.join(BACKENDS)}, or null",
        )
    chosen = sdpa_kernel([BACKENDS[kernel]]) if kernel else nullcontext()
    with torch.no_grad(), chosen:
        yield _call(case, _Operands(generator, getattr(torch, case.dtype)))


class _Operands:
    """Makes random tensors of one type on one device."""

    def __init__(self, generator: torch.Generator, dtype: torch.dtype) -> None:
        self._generator, self._dtype = generator, dtype

    def __call__(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        device = self._generator.device
        values = torch.randn(shape, generator=self._generator, device=device, dtype=self._dtype)
        return values.mul_(scale) if scale != 1.0 else values


def _call(case: Attention | Linear | Convolution | Elementwise, operands: _Operands) -> Call:
    if isinstance(case, Attention):
        return _attention(case, operands)
    if isinstance(case, Linear):
        return _linear(case, operands)
    if isinstance(case, Convolution):
        return _convolution(case, operands)
    return _elementwise(case, operands)


def _attention(case: Attention, operands: _Operands) -> Call:
    """Heads are a view of (batch, tokens, heads × head size), which projections write."""

    def heads(tokens: int) -> torch.Tensor:
        return operands(case.batch, tokens, case.heads, case.head_size).transpose(1, 2)

    query, key, value = heads(case.queries), heads(case.keys), heads(case.keys)
    mask = None
    if case.masked:  # none is masked away: a mask alone decides which kernels can run
        mask = torch.zeros(case.batch, 1, 1, case.keys, device=query.device, dtype=query.dtype)
        mask = mask.expand(case.batch, case.heads, case.queries, case.keys)
    return lambda: functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _linear(case: Linear, operands: _Operands) -> Call:
    rows = operands(case.rows, case.inputs)
    weight = operands(case.outputs, case.inputs, scale=case.inputs**-0.5)
    bias = operands(case.outputs)
    return lambda: functional.linear(rows, weight, bias)


def _convolution(case: Convolution, operands: _Operands) -> Call:
    time, rows, columns = case.taps
    frames = case.frames + time - 1
    taps = time * rows * columns
    scale, bias = (case.inputs * taps) ** -0.5, operands(case.outputs)
    padding = (rows // 2, columns // 2)
    if time == 1 and case.frames == 1:  # a batch of images: a convolution of two dimensions
        image = operands(case.batch, case.inputs, case.height, case.width)
        kernel = operands(case.outputs, case.inputs, rows, columns, scale=scale)
        return lambda: functional.conv2d(image, kernel, bias, padding=padding)
    video = operands(case.batch, case.inputs, frames, case.height, case.width)
    weight = operands(case.outputs, case.inputs, *case.taps, scale=scale)
    return lambda: functional.conv3d(video, weight, bias, padding=(0, *padding))


def _elementwise(case: Elementwise, operands: _Operands) -> Call:
    values = operands(case.rows, case.columns)
    if case.function in ("add", "multiply"):
        other = operands(case.rows, case.columns)
        operation = torch.add if case.function == "add" else torch.mul
        return lambda: operation(values, other)
    width = (case.columns,)
    weight = operands(case.columns)
    calls: dict[str, Call] = {
        "copy": values.clone,
        "gelu": lambda: functional.gelu(values, approximate="tanh"),
        "silu": lambda: functional.silu(values),
        "layer_norm": lambda: functional.layer_norm(values, width),
        "rms_norm": lambda: functional.rms_norm(values, width, weight),
        "to_float32": values.float,
        "to_bfloat16": values.bfloat16,
    }
    return calls[case.function]
