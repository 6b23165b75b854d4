"""Closed forms of Wan's diffusion transformer, as diffusers' WanTransformer3DModel executes it.

L: video tokens, m: text tokens, d: width, F: inner width of the feed-forward network, N: layers.  They are
the study's equations 3 to 6 and 10 with the configuration's own values, its inner width F in place of f·d,
and with the embeddings, which the study leaves out.  Counts are FLOP of one forward pass of one sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from t2v_energy.errors import UserError
from t2v_energy.work.layers import linear_parameters, transformer_activation_bytes

# The class's own defaults: a published configuration may leave them out.
DEFAULTS: Mapping[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "cross_attn_norm": True,
    "image_dim": None,
    "added_kv_proj_dim": None,
}


@dataclass(frozen=True)
class ElementwiseKernel:
    """An element-wise kernel of a block: it reads and writes each value of a tensor and multiplies no matrix.

    Attributes:
        part: which part of the block runs it.
        name: what it does.
        read, written: bytes for each value of the stream (L × d), or of the inner values (L × F).
        operations: arithmetic for each value, generously (a conversion has none).
        count: times that a block runs it.
        inner: whether it works on the feed-forward network's inner values.
    """

    part: str
    name: str
    read: float
    written: float
    operations: float
    count: int = 1
    inner: bool = False

    @property
    def bytes(self) -> float:
        """Bytes for each value, all its runs in a block."""
        return self.count * (self.read + self.written)


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the class's defaults filled in.

    Raises:
        UserError: the transformer takes images as well (``image_dim``, ``added_kv_proj_dim``).
    """
    complete = {**DEFAULTS, **config}
    for key in ("image_dim", "added_kv_proj_dim"):
        if complete[key] is not None:
            raise UserError(
                f"{key}: {complete[key]} adds attention to an image, which is not counted",
                where="components.transformer.config",
                remedy="use a text-to-video configuration of Wan",
            )
    return complete


def width(config: Mapping[str, Any]) -> int:
    """Width d of the transformer."""
    complete = settings(config)
    return int(complete["num_attention_heads"] * complete["attention_head_dim"])


def patch_sides(config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of the latent that make one token."""
    _, rows, columns = settings(config)["patch_size"]
    return rows, columns


def token_count(config: Mapping[str, Any], frames: int, rows: int, columns: int) -> int:
    """Tokens L of a latent of ``frames`` × ``rows`` × ``columns`` (eq. 1, with whole latent frames)."""
    patch = settings(config)["patch_size"]
    return prod(size // step for size, step in zip((frames, rows, columns), patch, strict=True))


def forward_flop(config: Mapping[str, Any], tokens: int, text_tokens: int) -> dict[str, int]:
    """FLOP of one forward pass by operator: eqs. 3, 5, 6, 10, and the embeddings.

    ``timestep_mlp`` is independent of ``tokens`` and runs once a pass, not once a layer.
    """
    c = settings(config)
    d, layers, m = width(c), c["num_layers"], text_tokens
    patch_volume = prod(c["patch_size"])
    patches = 2 * tokens * patch_volume * d * (c["in_channels"] + c["out_channels"])
    return {
        "self_attention": layers * (8 * tokens * d**2 + 4 * tokens**2 * d),
        "cross_attention": layers * (4 * tokens * d**2 + 4 * m * d**2 + 4 * tokens * m * d),
        "mlp": layers * 4 * tokens * d * c["ffn_dim"],
        "timestep_mlp": 2 * (c["freq_dim"] * d + d**2 + 6 * d**2),
        "embeddings": patches + 2 * m * (c["text_dim"] * d + d**2),
    }


def attention_product_flop(config: Mapping[str, Any], tokens: int, text_tokens: int) -> int:
    """FLOP of QKᵀ and PV alone, self- and cross-attention, of one forward pass (eqs. 3 and 5, parts)."""
    layers: int = settings(config)["num_layers"]
    return layers * 4 * tokens * (tokens + text_tokens) * width(config)


def elementwise_kernels(
    config: Mapping[str, Any], *, fused_norms: bool = True
) -> tuple[ElementwiseKernel, ...]:
    """Every element-wise kernel of one block of WanTransformerBlock, executed eagerly on a bf16 stream.

    diffusers keeps norms, modulation and gates in float32, so values are converted back and forth; each line
    of Python is a kernel that reads and writes device memory.  ``fused_norms`` says whether RMSNorm is one
    kernel, as in torch from 2.9 on GPUs, or a chain of them.  Broadcast operands (scales, rotary tables), the
    norms' statistics and the text's own norms are left out: below 1 % from some thousand video tokens on.
    """
    modulated = ("modulated norm 1 and 3", 2)
    gate = "gated residual of self-attention"
    gated = "gated residual of the feed-forward network"
    rotary = ("rotary embedding of q and k", 2)
    normed = "norm 2"
    layer_norm = (
        (ElementwiseKernel(normed, "layer norm", 4, 4, 8),) if settings(config)["cross_attn_norm"] else ()
    )
    return (
        ElementwiseKernel(modulated[0], "to float32", 2, 4, 0, modulated[1]),
        ElementwiseKernel(modulated[0], "layer norm", 4, 4, 8, modulated[1]),
        ElementwiseKernel(modulated[0], "times scale", 4, 4, 1, modulated[1]),
        ElementwiseKernel(modulated[0], "plus shift", 4, 4, 1, modulated[1]),
        ElementwiseKernel(modulated[0], "to bfloat16", 4, 2, 0, modulated[1]),
        *_rms_norm(fused_norms),
        # Even and odd halves apart: x1 cos, x2 sin and their like in float32, then stored with a stride.
        ElementwiseKernel(rotary[0], "products of halves", 4 * 1, 4 * 2, 2, rotary[1]),
        ElementwiseKernel(rotary[0], "sums of products", 2 * 4, 2 * 2, 1, rotary[1]),
        ElementwiseKernel(rotary[0], "stores of halves", 2 * 2, 2 * 1, 0, rotary[1]),
        ElementwiseKernel(gate, "times gate", 2, 4, 1),
        ElementwiseKernel(gate, "to float32", 2, 4, 0),
        ElementwiseKernel(gate, "sum", 8, 4, 1),
        ElementwiseKernel(gate, "to bfloat16", 4, 2, 0),
        ElementwiseKernel(normed, "to float32", 2, 4, 0),
        *layer_norm,
        ElementwiseKernel(normed, "to bfloat16", 4, 2, 0),
        ElementwiseKernel("residual of cross-attention", "sum", 4, 2, 1),
        ElementwiseKernel("activation", "GELU", 2, 2, 15, inner=True),
        ElementwiseKernel(gated, "to float32", 2, 4, 0, 2),
        ElementwiseKernel(gated, "times gate", 4, 4, 1),
        ElementwiseKernel(gated, "sum", 8, 4, 1),
        ElementwiseKernel(gated, "to bfloat16", 4, 2, 0),
    )


def elementwise_bytes(config: Mapping[str, Any], tokens: int, *, fused_norms: bool = True) -> float:
    """Bytes that the element-wise kernels of all blocks read and write in one forward pass."""
    return _elementwise_total(config, tokens, lambda kernel: kernel.bytes, fused_norms)


def elementwise_operations(config: Mapping[str, Any], tokens: int) -> float:
    """Their arithmetic in one forward pass (FLOP, generously counted); not in any count of FLOP here."""
    return _elementwise_total(config, tokens, lambda kernel: kernel.count * kernel.operations, True)


def _elementwise_total(
    config: Mapping[str, Any], tokens: int, each: Callable[[ElementwiseKernel], float], fused_norms: bool
) -> float:
    c = settings(config)
    sizes = {False: width(c), True: c["ffn_dim"]}
    kernels = elementwise_kernels(c, fused_norms=fused_norms)
    return float(c["num_layers"] * tokens * sum(sizes[kernel.inner] * each(kernel) for kernel in kernels))


def _rms_norm(fused: bool) -> tuple[ElementwiseKernel, ...]:
    part, count = "RMS norm of q and k, and of the cross-attention's q", 3
    if fused:
        return (ElementwiseKernel(part, "RMS norm", 2, 2, 4, count),)
    return (
        ElementwiseKernel(part, "to float32", 2, 4, 0, count),
        ElementwiseKernel(part, "square", 4, 4, 1, count),
        ElementwiseKernel(part, "mean", 4, 0, 1, count),
        ElementwiseKernel(part, "times inverse root", 4, 4, 1, count),
        ElementwiseKernel(part, "times weight", 4, 4, 1, count),
        ElementwiseKernel(part, "to bfloat16", 4, 2, 0, count),
    )


def parameter_count(config: Mapping[str, Any]) -> int:
    """Number of learnt parameters."""
    c = settings(config)
    d, inner, patch_volume = width(c), c["ffn_dim"], prod(c["patch_size"])
    attention = 4 * linear_parameters(d, d) + 2 * d  # projections, and the norms of queries and keys
    norm = 2 * d if c["cross_attn_norm"] else 0
    block = 2 * attention + norm + linear_parameters(d, inner) + linear_parameters(inner, d) + 6 * d
    time = linear_parameters(c["freq_dim"], d) + linear_parameters(d, d) + linear_parameters(d, 6 * d)
    text = linear_parameters(c["text_dim"], d) + linear_parameters(d, d)
    patches = linear_parameters(c["in_channels"] * patch_volume, d)
    out = linear_parameters(d, c["out_channels"] * patch_volume) + 2 * d
    return int(c["num_layers"] * block + time + text + patches + out)


def activation_bytes(config: Mapping[str, Any], tokens: int, bytes_per_value: int) -> int:
    """Rough peak of live activations in one block (bytes)."""
    inner = int(settings(config)["ffn_dim"])
    return transformer_activation_bytes(tokens, width(config), inner, bytes_per_value)
