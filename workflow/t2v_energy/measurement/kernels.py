"""Which attention kernel is asked for, and which one really runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
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


@contextmanager
def asked_for(kernel: str | None, module: nn.Module) -> Iterator[None]:
    """A context in which calls of ``module`` may use only ``kernel``; None leaves the choice to torch.

    Other modules keep torch's choice: the VAE's attention is in float32 with heads of 384, which no kernel
    but ``efficient`` and ``math`` runs, so a choice for the denoiser must not reach it.

    Raises :class:`UserError` for kernels that torch does not ship.
    """
    if kernel is None:
        yield
        return
    if kernel not in BACKENDS:
        raise UserError(
            f"attention kernel {kernel!r} is not one of torch's",
            where="attention_kernel",
            remedy=f"use one of {', '.join(BACKENDS)}",
        )
    with ExitStack() as call, ExitStack() as hooks:

        def begin(*_: Any) -> None:
            call.enter_context(sdpa_kernel([BACKENDS[kernel]]))

        enter = module.register_forward_pre_hook(begin)
        hooks.callback(enter.remove)
        leave = module.register_forward_hook(lambda *_: call.close(), always_call=True)
        hooks.callback(leave.remove)
        yield


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
            with sdpa_kernel([BACKENDS[name]]):
                torch.nn.functional.scaled_dot_product_attention(q, q, q)
            found[name] = True
        except RuntimeError:
            found[name] = False
    return found
