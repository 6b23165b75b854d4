"""What of one denoiser call its transformer blocks, and the attention in them, make.  Needs no torch.

FLOP are the closed forms of :mod:`t2v_energy.work`: with no layers for what is left without the blocks,
their own operators for attention.  Bytes and kernels are from blocks.json, which
:mod:`t2v_energy.work.blocks_trace` derives from the real modules.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2v_energy.work.architectures import latents
from t2v_energy.work.denoisers import Latent, denoiser
from t2v_energy.work.traffic import denoiser_traffic, has_traffic

if TYPE_CHECKING:
    from t2v_energy.config import Configuration, ModelFile

BLOCKS_FILE = "blocks.json"
ATTENTION = {"attn1": "self_attention", "attn2": "cross_attention"}
"""Operator of each attention module of a block."""
ARCHITECTURES = ("wan", "cogvideox")
"""Architectures whose blocks can be told apart from the rest so."""


@dataclass(frozen=True)
class Part:
    """Work of a part of a denoiser call, all samples of its batch.

    Attributes:
        attention_flop: QKᵀ and PV.
        dense_flop: all other matrix products.
        traffic_bytes: element-wise kernels and norms.
        kernels: kernels that are launched.
    """

    attention_flop: float
    dense_flop: float
    traffic_bytes: float
    kernels: float


def whole_call(model: ModelFile, configuration: Configuration) -> Part:
    """One call of the denoiser."""
    latent = _latent(model, configuration)
    call = denoiser(model).call(model, latent, None)
    traced = denoiser_traffic(model.key, latent) if has_traffic(model.key) else {"bytes": 0.0, "kernels": 0.0}
    return Part(
        call.attention_flop,
        sum(call.flop.values()) - call.attention_flop,
        traced["bytes"],
        traced["kernels"],
    )


def outside_blocks(model: ModelFile, configuration: Configuration) -> Part:
    """What a call does without running its blocks: embeddings, final norm and projection."""
    latent = _latent(model, configuration)
    flop = denoiser(model).call(without_blocks(model), latent, None).flop
    return Part(0.0, sum(flop.values()), *_traced(model, "outside", latent))


def attention_part(model: ModelFile, configuration: Configuration, module: str) -> Part:
    """All blocks' attention modules ``attn1`` (self, or joint with the text) or ``attn2`` (cross)."""
    latent = _latent(model, configuration)
    call = denoiser(model).call(model, latent, None)
    products = float(call.attention_flop)
    if model.architecture == "wan":  # L of L + m keys are the video's
        text = model.tokenizer.max_length
        of_module = {"attn1": call.tokens, "attn2": text}[module]
        products *= of_module / (call.tokens + text)
    flop = float(call.flop[ATTENTION[module]])
    return Part(products, flop - products, *_traced(model, module, latent))


def stream_values(model: ModelFile, configuration: Configuration) -> int:
    """Values of the video's tokens between blocks, all samples of the batch."""
    config = model.components[denoiser(model).part].config
    call = denoiser(model).call(model, _latent(model, configuration), None)
    width = int(config["num_attention_heads"] * config["attention_head_dim"])
    return model.batch_per_pass * call.tokens * width


def stream_bytes(model: ModelFile, configuration: Configuration) -> int:
    """The same in bytes."""
    wide = model.components[denoiser(model).part].dtype == "float32"
    return stream_values(model, configuration) * (4 if wide else 2)


def without_blocks(model: ModelFile) -> ModelFile:
    """The model file with no layers in its denoiser."""
    part = denoiser(model).part
    component = model.components[part]
    empty = component.model_copy(update={"config": {**component.config, "num_layers": 0}})
    return model.model_copy(update={"components": {**model.components, part: empty}})


def _latent(model: ModelFile, configuration: Configuration) -> Latent:
    c = configuration
    first, _ = latents(model, c.height, c.width, c.num_frames)
    return first


@cache
def _coefficients() -> dict[str, Any]:
    path = Path(__file__).with_name(BLOCKS_FILE)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _traced(model: ModelFile, part: str, latent: Latent) -> tuple[float, float]:
    """Bytes and kernels of a part; 0 for a model that was not traced."""
    if model.key not in _coefficients():
        return 0.0, 0.0
    frames, rows, columns = latent
    constant, each, kernels = _coefficients()[model.key][part]
    return constant + each * frames * rows * columns, kernels
