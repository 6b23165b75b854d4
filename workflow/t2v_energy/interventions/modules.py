"""What several interventions do to torch modules: find blocks, keep weights aside, look into a first call.

It imports torch, so it is imported where an intervention is applied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

Matcher = Callable[[str, tuple[Any, ...]], str | None]
"""From an operator's name and its arguments to the key that it is counted under; None: it is not counted."""


def repeated_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """The blocks that a transformer is made of, in their order; empty for a denoiser without such.

    They are of the classes that diffusers calls ``_repeated_blocks``; where a class names none, all members
    of the lists that the denoiser itself holds.
    """
    names = getattr(denoiser, "_repeated_blocks", None)
    if names:
        return [module for module in denoiser.modules() if type(module).__name__ in names]
    lists = (child for child in denoiser.children() if isinstance(child, nn.ModuleList))
    return [block for each in lists for block in each]


def block_linears(denoiser: nn.Module) -> list[nn.Linear]:
    """Every linear layer within :func:`repeated_blocks`, in their order."""
    return [m for block in repeated_blocks(denoiser) for m in block.modules() if type(m) is nn.Linear]


class Kept:
    """Values of parameters and buffers as they were, to be put back bit for bit.

    They wait in the host's memory, so that what a measured peak of the GPU's memory holds is the
    intervention's own.  On the CPU nothing is copied.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._kept = [(tensor, tensor.data.cpu(), tensor.device) for tensor in tensors]

    def restore(self) -> None:
        """Give every tensor its values back."""
        for tensor, values, device in self._kept:
            tensor.data = values.to(device)
        free_unused()


def free_unused() -> None:
    """Give memory of the GPU that is no longer needed back, so that no later peak holds it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class FirstCall(TorchDispatchMode):
    """Counts operators in the first call of a module after it was attached; later calls run untouched.

    Compiled code runs as compiled, and operators that it calls are seen; kernels that it generates are not.

    Attributes:
        counts: how often each key of the matcher came.
    """

    def __init__(self, module: nn.Module, matcher: Matcher) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._matcher = matcher
        self._entered = False
        self._hooks = [
            module.register_forward_pre_hook(self._begin),
            module.register_forward_hook(self._end, always_call=True),
        ]

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let torch.compile work in a call that is looked into; otherwise it would run uncompiled."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        key = self._matcher(func.overloadpacket.__name__, args)
        if key is not None:
            self.counts[key] += 1
        return func(*args, **(kwargs or {}))

    def _begin(self, *_: Any) -> None:
        self.__enter__()
        self._entered = True

    def _end(self, *_: Any) -> None:
        if self._entered:
            self.__exit__(None, None, None)
            self._entered = False
        self.detach()

    def detach(self) -> None:
        """Look at no further call."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
