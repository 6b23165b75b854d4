"""Regional compilation: torch.compile of every repeated block of the denoiser, one graph for all of them.

Element-wise operations between two matrix products fuse into a kernel that reads and writes once; the
products themselves stay.  Compiling takes time and energy before the first step: it happens in the first
denoiser call, hence in the warm-up window of a record.  A process starts without Inductor's cache on disk, so
that the first record that compiles a graph pays, and its warm-up shows, what compiling costs; later passes of
the same process find it.
"""

from __future__ import annotations

import atexit
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from t2v_energy.interventions.base import Change, Intervention, Target, Work, WorkClass

if TYPE_CHECKING:
    from t2v_energy.config import Configuration, ModelFile

Passes = tuple[int, int]
PASSES: Mapping[str, Passes] = {"wan": (19, 2), "ltx": (19, 2), "cogvideox": (13, 2)}
"""Passes over a token's stream (width d) and over the feed-forward's inner values that a fused block makes.

What stays is what lies between two products: one kernel each, every input read and every output written once.
Wan and LTX-Video: norm and modulation (read, write: 2), norm and rotation of queries and of keys (4), gated
residual with the next norm (read two, write two: 4), norm of the cross attention's queries (2), residual with
the next norm (4), gated residual (read two, write one: 3); and the activation (2, inner).  CogVideoX has no
cross attention: 2 + 4 + 4 + 3; and the activation.
"""
BYTES = 2
"""Of a number: streams are in bfloat16 or float16."""


class Compile(Intervention):
    """torch.compile of the denoiser's repeated blocks."""

    kind: ClassVar[str] = "compile"
    lossless: ClassVar[bool] = True

    mode: Literal["default", "max-autotune-no-cudagraphs"] = Field(
        "default", description="torch.compile's mode; max-autotune also searches for faster matrix products"
    )
    dynamic: bool = Field(False, description="true: compile for any size, not for the one that is measured")

    def check(self, model: ModelFile, configuration: Configuration) -> None:
        if model.architecture not in PASSES:
            raise self.refused(
                f"what fuses in {model.architecture} is not counted",
                f"use a model of {', '.join(PASSES)}",
            )

    def apply(self, target: Target) -> Change:
        """Compile every block at its next call.

        Raises:
            UserError: the denoiser has no repeated blocks, or is compiled already.
        """
        import torch

        from t2v_energy.interventions import modules

        blocks = modules.repeated_blocks(target.denoiser)
        if not blocks:
            raise self.refused(f"{type(target.denoiser).__name__} has no repeated blocks", "leave it out")
        if any(block._compiled_call_impl is not None for block in blocks):
            raise self.refused("the blocks are compiled already", "list it once")
        torch._dynamo.reset()
        undo = ExitStack()
        undo.callback(torch._dynamo.reset)
        _empty_cache()
        for block in blocks:
            mode = None if self.mode == "default" else self.mode
            block.compile(mode=mode, fullgraph=_is_plain(block), dynamic=self.dynamic)
            undo.callback(delattr, block, "_compiled_call_impl")
        before = _counts()

        def evidence() -> Mapping[str, float]:
            done = {name: value - before[name] for name, value in _counts().items()}
            # Without a graph nothing is compiled, whatever the compiler tried.
            return done if done["compiled_graphs"] else dict.fromkeys(done, 0.0)

        return Change(undo.close, evidence)

    def work_ratios(self, work: Work) -> Mapping[WorkClass, float]:
        """Bytes of element-wise kernels after fusion, with / without; products and attention stay.

        Outside of the blocks nothing changes: what the traced traffic has beside the part that grows with
        the tokens.
        """
        fused = fused_bytes(work)
        return {"traffic": fused / float(work.features.traffic_bytes[0])} if fused else {}


def is_compiled(work: Work) -> bool:
    """Whether a compiling intervention is listed: an entry whose name begins with ``compile``."""
    return any(name.startswith(Compile.kind) for name in work.configuration.interventions)


def with_added_traffic(work: Work, added_bytes: float) -> dict[WorkClass, float]:
    """Ratio of traffic for an intervention that adds some, all calls together.

    Ratios of a stack multiply.  So what is added is set against what is there without it: the fused traffic
    where a compiling intervention is listed.
    """
    there = fused_bytes(work) if is_compiled(work) else float(work.features.traffic_bytes[0])
    return {"traffic": 1 + added_bytes / there} if there else {}


def fused_bytes(work: Work) -> float:
    """Traffic of all denoiser calls whose blocks are fused (bytes); 0 where the model's is not counted."""
    from t2v_energy.work.architectures import latents, refine_calls

    model, c = work.model, work.configuration
    if model.architecture not in PASSES:
        return 0.0
    first, last = latents(model, c.height, c.width, c.num_frames)
    tokens, calls = float(work.features.tokens[0]), float(work.features.calls[0])
    loop = calls * _call_bytes(model, first, tokens)
    if "latent_upsampler" not in model.components:
        return loop
    refined = tokens * (last[1] * last[2]) / (first[1] * first[2])
    return loop + refine_calls(model) * _call_bytes(model, last, refined)


def _call_bytes(model: ModelFile, latent: tuple[int, int, int], tokens: float) -> float:
    """Of one call: the fused blocks, and what does not grow with the latent (embeddings of time and text)."""
    from t2v_energy.work.traffic import denoiser_traffic

    config = model.components[model.denoiser_part].config
    width = config["num_attention_heads"] * config["attention_head_dim"]
    stream, inner = PASSES[model.architecture]
    token = BYTES * config["num_layers"] * (stream * width + inner * config.get("ffn_dim", 4 * width))
    constant = denoiser_traffic(model.key, (0, 0, 0))["bytes"]
    plain = denoiser_traffic(model.key, latent)["bytes"]
    return min(constant + model.batch_per_pass * tokens * token, plain)


@cache
def _empty_cache() -> None:
    """Inductor's cache on disk is an empty one from now on, until the process ends."""
    from torch._inductor.utils import fresh_cache

    stack = ExitStack()
    stack.enter_context(fresh_cache())
    atexit.register(stack.close)


def _is_plain(block: Any) -> bool:
    """Whether nothing else has changed the block, so that it compiles as one graph.

    Hooks, another ``forward``, weights that are no plain tensors and a processor of attention that says so
    (``eager``) may need Python between two graphs.
    """
    import torch

    return not any(
        module._forward_pre_hooks
        or module._forward_hooks
        or "forward" in vars(module)
        or getattr(getattr(module, "processor", None), "eager", False)
        for module in block.modules()
    ) and all(type(parameter.data) is torch.Tensor for parameter in block.parameters())


def _counts() -> dict[str, float]:
    """What Dynamo has done in this process: graphs, breaks between them, and the time (s) all that took."""
    from torch._dynamo.utils import compilation_time_metrics, counters

    times = compilation_time_metrics.get("_compile.compile_inner", [])
    return {
        "compiled_graphs": float(counters["stats"]["unique_graphs"]),
        "graph_breaks": float(sum(counters["graph_break"].values())),
        "compile_s": float(sum(times)),
    }
