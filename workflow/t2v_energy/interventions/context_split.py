"""What all ranks of context parallel do alike: split the denoiser, share its weights, exchange arguments.

The splitting itself is diffusers' own: hooks that its model classes plan (``_cp_plan``), and attention that
exchanges tokens for heads.  Its ``enable_parallelism`` sets both up but cannot undo it, and fails without an
accelerator; the steps are therefore taken here one by one.  It imports torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed, nn

from t2v_energy.interventions.block_stack import blocks_of
from t2v_energy.interventions.clock import replaced

TIMEOUT_S = 300.0
"""How long a rank waits for the others in one exchange: longer than any call of a denoiser takes."""
Described = list[tuple[str, list[int], str]]
"""Tensors by name, shape and number type, as JSON can hold them."""


def join(device: str, store: str, rank: int, ranks: int, timeout_s: float) -> None:
    """Become one of ``ranks`` ranks (NCCL's on GPUs, gloo's on the CPU), which meet at file ``store``."""
    backend = "nccl" if device == "cuda" else "gloo"
    distributed.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout_s),
    )


def split(denoiser: Any, device: str, ranks: int) -> Callable[[], None]:
    """Split every call of the denoiser over the group, as its class plans it; returns what undoes that."""
    from diffusers import ContextParallelConfig, ParallelConfig
    from diffusers.hooks.context_parallel import apply_context_parallel, remove_context_parallel
    from torch.distributed.device_mesh import init_device_mesh

    config = ContextParallelConfig(ulysses_degree=ranks)
    mesh = init_device_mesh(device, config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    parallel = ParallelConfig(context_parallel_config=config)
    parallel.setup(distributed.get_rank(), ranks, torch.device(device), mesh=mesh)
    # Of the whole module's arguments it splits timesteps that differ between tokens. Wan2.1 has none, and
    # that hook refuses every answer but a tuple.
    plan = {name: part for name, part in denoiser._cp_plan.items() if name}
    before = [
        (module, {name: vars(module)[name] for name in _HOOKED if name in vars(module)})
        for module in denoiser.modules()
    ]
    processors: list[Any] = [
        m.processor for m in denoiser.modules() if hasattr(getattr(m, "processor", None), _CONFIG)
    ]
    put_back = [replaced(processor, _CONFIG, parallel) for processor in processors]
    apply_context_parallel(denoiser, config, plan)

    def undo() -> None:
        remove_context_parallel(denoiser, plan)
        for restore in put_back:
            restore()
        for module, own in before:
            for name in _HOOKED:
                vars(module).pop(name, None)
            vars(module).update(own)
        if hasattr(denoiser, "_diffusers_hook"):  # it remembers which modules have hooks
            denoiser._diffusers_hook.invalidate_child_registries_cache()

    return undo


_CONFIG = "_parallel_config"
_HOOKED = ("forward", "_diffusers_hook")
"""Attributes that diffusers' hooks set on a module."""


class SharedCalls:
    """Counts calls in which this rank's self-attention saw a given number of tokens."""

    def __init__(self, denoiser: nn.Module) -> None:
        attention: Any = blocks_of(denoiser)[0].attn1
        self._counts: dict[int, int] = {}
        self._hook = attention.register_forward_pre_hook(self._saw)

    def _saw(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        tokens = int(args[0].shape[1])
        self._counts[tokens] = self._counts.get(tokens, 0) + 1

    def of(self, tokens: int) -> int:
        """Calls with so many tokens."""
        return self._counts.get(tokens, 0)

    def detach(self) -> None:
        """Count no more."""
        self._hook.remove()


# --- weights ------------------------------------------------------------------------------------------------


def tensors_of(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer, those that are not saved too, by name."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def layout(module: nn.Module) -> str:
    """Checksum of the names, shapes and number types of :func:`tensors_of`."""
    described = [(name, *_described(tensor)) for name, tensor in tensors_of(module)]
    return hashlib.sha256(repr(described).encode()).hexdigest()


def share_weights(module: nn.Module) -> None:
    """Give every rank the first one's values, bit for bit; all have the same :func:`layout`."""
    with torch.no_grad():
        for _, tensor in tensors_of(module):
            values = tensor.data.contiguous()
            distributed.broadcast(values, 0)
            tensor.data.copy_(values)


def checksum(module: nn.Module) -> str:
    """Of all values: SHA-256 over two sums of each tensor's bytes, the second one of every third byte.

    Sums, so that they are made where the tensors are: gigabytes need not come to the host.
    """
    sums = []
    for _, tensor in tensors_of(module):
        raw = tensor.data.contiguous().reshape(-1).view(torch.uint8)
        sums.append((raw.sum(dtype=torch.int64), raw[::3].sum(dtype=torch.int64)))
    values = [(int(whole), int(part)) for whole, part in sums]
    return hashlib.sha256(repr(values).encode()).hexdigest()


# --- the arguments of a call --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arguments:
    """A call's arguments by name: tensors, and what JSON can hold."""

    tensors: Mapping[str, torch.Tensor]
    plain: Mapping[str, Any]

    @classmethod
    def of(cls, named: Mapping[str, Any]) -> Arguments:
        """Raises TypeError for an argument that is neither a tensor nor a number, a text or nothing."""
        tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
        plain = {name: value for name, value in named.items() if name not in tensors}
        for name, value in plain.items():
            if not (value is None or isinstance(value, (bool, int, float, str))):
                raise TypeError(f"argument {name} of the denoiser is a {type(value).__name__}")
        return cls(tensors, plain)

    def message(self) -> dict[str, Any]:
        """What another rank must know to receive them, as JSON can hold it."""
        described = [(name, *_described(tensor)) for name, tensor in self.tensors.items()]
        return {"tensors": described, "plain": dict(self.plain)}

    def send(self) -> None:
        """Give the tensors to all other ranks."""
        for tensor in self.tensors.values():
            distributed.broadcast(tensor.contiguous(), 0)


def received(message: Mapping[str, Any], device: str) -> dict[str, Any]:
    """The arguments that the first rank sends after :meth:`Arguments.message`."""
    found = dict(message["plain"])
    described: Sequence[tuple[str, list[int], str]] = message["tensors"]
    for name, shape, dtype in described:
        found[name] = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        distributed.broadcast(found[name], 0)
    return found


def _described(tensor: torch.Tensor) -> tuple[list[int], str]:
    """Shape and number type."""
    return list(tensor.shape), str(tensor.dtype).removeprefix("torch.")
