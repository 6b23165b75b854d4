"""Which attention kernel is asked for, and which one really runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from t2v_energy.errors import UserError

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
NOTHING_RUNS = ("No available kernel", "No viable backend")
"""How torch says, on a GPU and on the CPU, that no kernel which may be used takes an attention."""
SAGE = "sage"
SAGE_HEADS = (64, 96, 128)
"""Widths of a head that SageAttention's kernels are written for."""
# The operators that torch dispatches to, by name.
OPERATORS = {
    "sage_attention": SAGE,
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

    Raises :class:`UserError` for kernels that there are not, for one that cannot run some attention of a call
    (nothing runs in its place), and for ``sage`` where it is not installed, where the module is not on a GPU,
    or where no attention of a call fitted it.
    """
    if kernel is None:
        yield
    elif kernel == SAGE:
        with _sage_in(module):
            yield
    elif kernel in BACKENDS:
        with _refusal_named(kernel, module), during_calls(module, lambda: sdpa_kernel([BACKENDS[kernel]])):
            yield
    else:
        raise UserError(
            f"there is no attention kernel {kernel!r}",
            where="attention_kernel",
            remedy=f"use one of {', '.join((*BACKENDS, SAGE))}",
        )


@contextmanager
def _refusal_named(kernel: str, module: nn.Module) -> Iterator[None]:
    """Where torch finds nothing to run, say what was asked for, and of what: its own error names neither."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in NOTHING_RUNS):
            raise
        raise _refused(
            f"{kernel!r} cannot run every attention of {type(module).__name__} here",
            "leave it out for this model: some attention has a mask, a number type or a width of heads that "
            "this kernel does not take",
        ) from error


@contextmanager
def during_calls(module: nn.Module, opened: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """A context in which every call of ``module`` runs within a context of its own, and nothing else does."""
    with ExitStack() as call, ExitStack() as hooks:

        def begin(*_: Any) -> None:
            call.enter_context(opened())

        enter = module.register_forward_pre_hook(begin)
        hooks.callback(enter.remove)
        leave = module.register_forward_hook(lambda *_: call.close(), always_call=True)
        hooks.callback(leave.remove)
        yield


@contextmanager
def attention_replaced(replacement: Callable[..., Any]) -> Iterator[None]:
    """A context in which torch's ``scaled_dot_product_attention`` is ``replacement``."""
    original = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = replacement
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = original


_sage_calls = 0
"""How often :func:`sage_attention` has run in this process, compiled or not."""


@torch.library.custom_op("t2v_energy::sage_attention", mutates_args=())
def sage_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """SageAttention (8-bit QKᵀ, 16-bit PV) of tensors of shape (batch, heads, tokens, width).

    One operator of its own: torch.compile leaves it whole, and a probe sees that it ran.  The keys' mean is
    taken off here, since the package would take it off in place.
    """
    global _sage_calls
    _sage_calls += 1
    smooth = key - key.mean(dim=2, keepdim=True)
    try:
        from sageattention import sageattn

        found: Tensor = sageattn(
            query, smooth, value, tensor_layout="HND", is_causal=False, sm_scale=scale, smooth_k=False
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # its kernels are compiled for this GPU now, by whatever Triton there is
        lines = str(error).splitlines() or [""]
        raise _refused(
            f"SageAttention fails here: {type(error).__name__}: {lines[0]}",
            "leave `sage` out, or try it with another release of torch",
        ) from error
    return found


@sage_attention.register_fake
def _sage_shape(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return query.new_empty(query.shape)


@contextmanager
def _sage_in(module: nn.Module) -> Iterator[None]:
    """Calls of ``module`` attend with SageAttention wherever it fits; raises as :func:`asked_for`."""
    if not any(parameter.is_cuda for parameter in module.parameters()):
        raise _refused("'sage' runs on a GPU alone", "use another kernel on the CPU")
    if importlib.util.find_spec("sageattention") is None:
        raise _refused("SageAttention is not installed", "pip install 't2v-energy[interventions]'")
    called = False

    @contextmanager
    def opened() -> Iterator[None]:
        nonlocal called
        called = True
        with attention_replaced(_sage_or(nn.functional.scaled_dot_product_attention)):
            yield

    before = _sage_calls
    with during_calls(module, opened):
        yield
    if called and _sage_calls == before:
        raise _refused(
            f"no attention of {type(module).__name__} fits SageAttention",
            f"it takes heads of {', '.join(map(str, SAGE_HEADS))} in 16 bits, without a mask",
        )


def _refused(what: str, remedy: str) -> UserError:
    """An error of one configuration, as an intervention's: the rest of a batch can go on."""
    from t2v_energy.interventions import InterventionError

    return InterventionError(what, where="attention_kernel", remedy=remedy)


def _sage_or(attend: Callable[..., Any]) -> Callable[..., Any]:
    """SageAttention where it fits, else ``attend`` (torch's scaled_dot_product_attention)."""

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **options: Any,
    ) -> Any:
        plain = attn_mask is None and not dropout_p and not is_causal and not any(options.values())
        if plain and sage_fits(query, key, value):
            return sage_attention(query, key, value, scale or query.shape[-1] ** -0.5)
        return attend(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)

    return attention


def sage_fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether SageAttention takes these tensors, by shape, number type and layout (not by device)."""
    alike = query.dtype == key.dtype == value.dtype and query.shape[1] == key.shape[1]
    return (
        query.ndim == 4
        and query.shape[-1] in SAGE_HEADS
        and query.dtype in (torch.float16, torch.bfloat16)
        and alike
        and all(tensor.stride(-1) == 1 for tensor in (query, key, value))
    )


class KernelProbe(TorchDispatchMode):
    """Notes the attention operators that are dispatched, under the stage that is current."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = ""
        self._found: dict[str, set[str]] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let torch.compile work in a probed call: what is compiled then is what runs in later ones.

        Compiled code still dispatches its attention, so that it is seen.
        """
        return True

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
