"""Matrix products of the denoiser's blocks in eight bits, by torchao: ``fp8`` and ``int8``.

Weights are quantised once, row by row; activations are quantised token by token before every product.  Those
extra passes pay only where :mod:`t2v_energy.interventions.compiled` fuses them.  Weights as they were wait in the
host's memory and are put back afterwards.
"""

from __future__ import annotations

import importlib.util
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from t2v_energy.interventions.base import Change, Intervention, Target, Work, WorkClass

if TYPE_CHECKING:
    from t2v_energy.config import Configuration, ModelFile

INPUTS: Mapping[str, tuple[int, int, int]] = {"wan": (5, 7, 1), "cogvideox": (3, 5, 1)}
"""Values of a token that are quantised: times the width d fused and unfused, and of the feed-forward's inner ones.

Inputs of the products: queries, keys and values share theirs, which is quantised once where compiling joins equal
work and thrice otherwise; then the output projection and the feed-forward's two.  Wan's cross attention
quantises two more, those of its queries and its output projection."""
FUSED_BYTES = 2 + 2 + 1
"""Of each value, fused: read for the largest of its row, read again, written in eight bits."""
EAGER_BYTES = (2 + 2) + 2 + (2 + 4) + (4 + 4) + (4 + 4) + (4 + 1)
"""Of each value, one kernel after the other: absolute values, their largest, cast to float32, divide by the
scale, clamp, cast to eight bits."""


class Quantised(Intervention):
    """What both kinds share."""

    multiple: ClassVar[int]
    """Both sizes of a layer must divide by it, or the eight-bit product refuses them."""
    products: ClassVar[tuple[str, ...]]
    """Operators that multiply in eight bits."""

    def check(self, model: ModelFile, configuration: Configuration) -> None:
        if model.architecture not in INPUTS:
            raise self.refused(
                f"what {model.architecture} quantises is not counted", f"use a model of {', '.join(INPUTS)}"
            )

    @abstractmethod
    def _config(self) -> Any:
        """torchao's configuration."""

    @abstractmethod
    def _refuse_device(self, target: Target) -> None:
        """Raise :class:`UserError` for a device that has no such products."""

    def apply(self, target: Target) -> Change:
        """Quantise the blocks' linear layers whose sizes fit.

        Raises:
            UserError: torchao is not installed, the device has no such products, or no layer fits.
        """
        self._refuse_device(target)
        if importlib.util.find_spec("torchao") is None:
            raise self.refused("torchao is not installed", "pip install 't2v-energy[interventions]'")
        import torch
        from torchao.quantization import quantize_

        from t2v_energy.interventions import modules

        linears = [m for m in modules.block_linears(target.denoiser) if type(m.weight.data) is torch.Tensor]
        chosen = [m for m in linears if not (m.in_features % self.multiple or m.out_features % self.multiple)]
        if not chosen:
            raise self.refused(
                f"no layer's sizes divide by {self.multiple}, or all are quantised", "leave it out"
            )
        state = [(m, m.weight, vars(m).get("extra_repr")) for m in chosen]
        # Quantised on the device from the originals, which then go to the host.
        ids = {id(m) for m in chosen}
        quantize_(target.denoiser, self._config(), filter_fn=lambda module, _name: id(module) in ids)
        kept = modules.Kept([weight for _, weight, _ in state])
        for _, weight, _ in state:
            weight.data = torch.empty(0, dtype=weight.dtype)
        modules.free_unused()
        probe = modules.FirstCall(
            target.denoiser, lambda name, _args: "product" if name in self.products else None
        )

        def undo() -> None:
            probe.detach()
            for module, weight, text in state:
                module.weight = weight
                vars(module).pop("extra_repr", None)
                if text is not None:
                    module.extra_repr = text
            kept.restore()

        def evidence() -> Mapping[str, float]:
            products = float(probe.counts["product"])
            counted = {"quantised_layers": len(chosen), "layers_left_out": len(linears) - len(chosen)}
            # Layers that were quantised but multiplied nothing are no evidence.
            return {"eight_bit_products_in_first_call": products} | {
                key: value if products else 0.0 for key, value in counted.items()
            }

        return Change(undo, evidence)

    def work_ratios(self, work: Work) -> Mapping[WorkClass, float]:
        """Traffic grows by the quantisation of every product's input; the FLOP are as many.

        Fused where a compiling intervention is listed beside it (an entry whose name begins with ``compile``).
        """
        model = work.model
        traffic = float(work.features.traffic_bytes[0])
        if model.architecture not in INPUTS or not traffic:
            return {}
        config = model.components[model.denoiser_part].config
        width = config["num_attention_heads"] * config["attention_head_dim"]
        inner = config.get("ffn_dim", 4 * width)
        shared, apart, of_inner = INPUTS[model.architecture]
        compiled = any(name.startswith("compile") for name in work.configuration.interventions)
        values = (shared if compiled else apart) * width + of_inner * inner
        each = (FUSED_BYTES if compiled else EAGER_BYTES) * values * config["num_layers"]
        tokens = float(work.features.tokens[0]) * model.batch_per_pass
        return {"traffic": 1 + float(work.features.calls[0]) * tokens * each / traffic}


class Fp8(Quantised):
    """float8 weights and activations, scaled by rows (torchao's Float8DynamicActivationFloat8WeightConfig)."""

    kind: ClassVar[str] = "fp8"
    multiple: ClassVar[int] = 16
    products: ClassVar[tuple[str, ...]] = ("_scaled_mm", "_scaled_mm_v2", "f8f8bf16_rowwise")

    def _config(self) -> Any:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

        return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())

    def _refuse_device(self, target: Target) -> None:
        import torch

        if target.device != "cuda":
            raise self.refused(f"{target.device} has no float8 products", "measure it on a GPU")
        if torch.cuda.get_device_capability() < (8, 9):
            raise self.refused(
                f"{torch.cuda.get_device_name()} has no float8 products",
                "use a GPU of compute capability 8.9",
            )


class Int8(Quantised):
    """int8 weights and activations (torchao's Int8DynamicActivationInt8WeightConfig)."""

    kind: ClassVar[str] = "int8"
    multiple: ClassVar[int] = 16
    products: ClassVar[tuple[str, ...]] = ("_int_mm", "int_scaled_matmul")

    def _config(self) -> Any:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        return Int8DynamicActivationInt8WeightConfig()

    def _refuse_device(self, target: Target) -> None:
        """Every device multiplies int8."""
