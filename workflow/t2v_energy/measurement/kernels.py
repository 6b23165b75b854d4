"""Which attention kernel is asked for, and which one really runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from t2v_energy.errors import UserError

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# The operators that torch dispatches to, by name.
OPERATORS = {
    "_scaled_dot_product_cudnn_attention": "cudnn",
    "_scaled_dot_product_flash_attention_for_cpu": "flash-cpu",
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_efficient_attention": "efficient",
    "_scaled_dot_product_fused_attention_overrideable": "overrideable",
    "_softmax": "math",
    "_safe_softmax": "math",
}


def asked_for(kernel: str | None) -> Any:
    """A context in which torch may use only ``kernel``; None leaves the choice to torch.

    Raises :class:`UserError` for kernels that torch does not ship.
    """
    if kernel is None:
        return nullcontext()
    if kernel not in BACKENDS:
        raise UserError(
            f"attention kernel {kernel!r} is not one of torch's",
            where="attention_kernel",
            remedy=f"use one of {', '.join(BACKENDS)}",
        )
    return sdpa_kernel([BACKENDS[kernel]])


class KernelProbe(TorchDispatchMode):
    """Notes the attention operators that are dispatched, under the stage that is current."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = ""
        self._found: dict[str, set[str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in OPERATORS:
            self._found.setdefault(self.stage, set()).add(OPERATORS[name])
        return func(*args, **(kwargs or {}))

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Probe one call of ``stage``."""
        self.stage = stage
        with self:
            yield

    @property
    def found(self) -> dict[str, list[str]]:
        """Kernels by stage; ``math`` is softmax outside a fused operator."""
        return {stage: sorted(kernels) for stage, kernels in self._found.items()}


def available() -> dict[str, bool]:
    """Which of torch's kernels run here on bfloat16 heads of 128 (for the doctor)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q = torch.randn(1, 2, 256, 128, device=device, dtype=torch.bfloat16)
    found = {}
    for name in BACKENDS:
        try:
            with asked_for(name):
                torch.nn.functional.scaled_dot_product_attention(q, q, q)
            found[name] = True
        except RuntimeError:
            found[name] = False
    return found
