"""Counts the operations of the real modules, on torch's meta device: no weights, no GPU, no arithmetic.

For the tests of the closed forms, and for whoever adds a model.  Needs torch, diffusers and transformers
(the extra ``measure``).  On the meta device attention decomposes into matrix products, so it is counted
exactly; on the CPU the counter would miss it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from t2v_energy.errors import UserError
from t2v_energy.models.build import load_class
from t2v_energy.work import wan_latent_shape

if TYPE_CHECKING:
    from t2v_energy.config import Component, ModelFile


@dataclass(frozen=True)
class FlopTrace:
    """What the counter saw: FLOP in all, and by module (dotted name below the root, children included)."""

    total_flop: int
    by_module: dict[str, int]

    def ending_with(self, *suffixes: str) -> int:
        """FLOP of the modules whose names end with one of ``suffixes`` (they must not contain each other)."""
        return sum(flop for name, flop in self.by_module.items() if name.endswith(suffixes))


def build_on_meta(component: Component) -> nn.Module:
    """The module of a component of a model file, from its class and configuration, without storage.

    Raises:
        UserError: the library has no such class, or the class refuses the configuration.
    """
    cls = load_class(component.class_)
    try:
        with torch.device("meta"):
            if component.class_.startswith("transformers."):
                return cls(cls.config_class(**component.config)).eval()
            return cls(**component.config).eval()
    except TypeError as error:
        raise UserError(
            f"{component.class_} cannot be built: {error}",
            where="components",
            remedy="compare the class and its config with the library's documentation",
        ) from error


def count(call: Callable[[], Any]) -> FlopTrace:
    """FLOP of ``call``, which must only touch tensors of the meta device."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        call()
    by_module: dict[str, int] = {}
    for name, by_operation in counter.get_flop_counts().items():
        _, _, below_root = name.partition(".")
        if below_root:
            by_module[below_root] = by_module.get(below_root, 0) + sum(by_operation.values())
    return FlopTrace(counter.get_total_flops(), by_module)


def trace_denoiser(model: ModelFile, height: int, width: int, num_frames: int) -> FlopTrace:
    """One forward pass of the denoiser for a video of ``num_frames`` × ``height`` × ``width`` pixels."""
    _only_wan(model)
    module = build_on_meta(model.components["transformer"])
    c: Any = module.config
    latent = torch.empty(1, c.in_channels, *wan_latent_shape(model, height, width, num_frames), device="meta")
    timestep = torch.zeros(1, dtype=torch.long, device="meta")
    text = torch.empty(1, model.tokenizer.max_length, c.text_dim, device="meta")
    return count(lambda: module(hidden_states=latent, timestep=timestep, encoder_hidden_states=text))


def trace_text_encoder(model: ModelFile) -> FlopTrace:
    """One pass of the text encoder over a padded prompt."""
    _only_wan(model)
    module = build_on_meta(model.components["text_encoder"])
    # No mask: building it reads values, which meta tensors lack, and a mask saves no operation.
    ids = torch.zeros(1, model.tokenizer.max_length, dtype=torch.long, device="meta")
    return count(lambda: module(input_ids=ids))


def trace_vae_decode(model: ModelFile, height: int, width: int, num_frames: int) -> FlopTrace:
    """Decoding the latent of one video."""
    _only_wan(model)
    module: Any = build_on_meta(model.components["vae"])
    shape = wan_latent_shape(model, height, width, num_frames)
    latent = torch.empty(1, module.config.z_dim, *shape, device="meta")
    return count(lambda: module.decode(latent))


def _only_wan(model: ModelFile) -> None:
    if model.architecture != "wan":
        raise UserError(
            f"the architecture {model.architecture!r} cannot be traced yet",
            where=f"config/models/{model.key}.yaml",
            remedy="add the inputs of its modules to workflow/t2v_energy/work/trace.py",
        )
