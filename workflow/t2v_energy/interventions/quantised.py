"""Matrix products of the denoiser's blocks in eight bits, by torchao: ``fp8`` and ``int8``.

Weights are quantised once, row by row; activations are quantised token by token before every product.  Those
extra passes pay only where :mod:`t2v_energy.interventions.compiled` fuses them.  Weights as they were wait in
the host's memory and are put back afterwards.
"""

from __future__ import annotations

import importlib.util
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from t2v_energy.interventions.base import Change, Intervention, Target, Work, WorkClass

if TYPE_CHECKING:
    from t2v_energy.config import Configuration, ModelFile

ARCHITECTURES = ("wan", "cogvideox")


class Values(NamedTuple):
    """Values of a token in a block's products, in widths: of the stream, and of the feed-forward inside."""

    stream: int
    inner: int


INPUTS: Mapping[str, Values] = {"wan": Values(7, 1), "cogvideox": Values(5, 1)}
"""Inputs of the products, each quantised: queries, keys, values, output projection, feed-forward's two
layers; in Wan cross attention's queries and output projection too (the text's few tokens are left out)."""
SHARED_INPUTS: Mapping[str, Values] = {"wan": Values(5, 1), "cogvideox": Values(3, 1)}
"""The same where compiling quantises the input of queries, keys and values once."""
OUTPUTS = INPUTS
"""Outputs are as many: layers are square, but for the feed-forward's two, which are each other's reverse."""


class Quantised(Intervention):
    """What both kinds share."""

    multiple: ClassVar[int]
    """Both sizes of a layer must divide by it, or the eight-bit product refuses them."""
    products: ClassVar[tuple[str, ...]]
    """Operators that multiply in eight bits."""
    eager_bytes: ClassVar[tuple[float, float]]
    """Traffic of each value that goes into a product and that comes out of it, one kernel after the other."""
    fused_bytes: ClassVar[tuple[float, float]]
    """The same where compiling fuses what lies between two products."""

    def check(self, model: ModelFile, configuration: Configuration) -> None:
        if model.architecture not in ARCHITECTURES:
            raise self.refused(
                f"what {model.architecture} quantises is not counted",
                f"use a model of {', '.join(ARCHITECTURES)}",
            )

    @abstractmethod
    def _config(self) -> Any:
        """torchao's configuration.

        Without its settings for Inductor: they would hold for everything that this process compiles later,
        and tuning by coordinate descent makes each compilation minutes long.
        """

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
        """Traffic grows by quantising every product's input and, for int8, scaling its output; FLOP stay."""
        from t2v_energy.interventions.compiled import is_compiled, with_added_traffic

        model = work.model
        if model.architecture not in ARCHITECTURES:
            return {}
        fused = is_compiled(work)
        taken = (SHARED_INPUTS if fused else INPUTS)[model.architecture]
        of_input, of_output = self.fused_bytes if fused else self.eager_bytes
        config = model.components[model.denoiser_part].config
        width = config["num_attention_heads"] * config["attention_head_dim"]
        inner = config.get("ffn_dim", 4 * width)
        made = OUTPUTS[model.architecture]
        token = of_input * (taken.stream * width + taken.inner * inner)
        token += of_output * (made.stream * width + made.inner * inner)
        tokens = float(work.features.tokens[0]) * model.batch_per_pass
        return with_added_traffic(work, float(work.features.calls[0]) * tokens * config["num_layers"] * token)


class Fp8(Quantised):
    """float8 weights and activations, scaled by rows (Float8DynamicActivationFloat8WeightConfig)."""

    kind: ClassVar[str] = "fp8"
    float8: ClassVar[bool] = True
    multiple: ClassVar[int] = 16
    products: ClassVar[tuple[str, ...]] = ("_scaled_mm", "_scaled_mm_v2", "f8f8bf16_rowwise")
    # absolute value, largest, cast to float32, division by the scale, clamp, cast to eight bits
    eager_bytes: ClassVar[tuple[float, float]] = ((2 + 2) + 2 + (2 + 4) + (4 + 4) + (4 + 4) + (4 + 1), 0)
    fused_bytes: ClassVar[tuple[float, float]] = (2 + 2 + 1, 0)  # read for the largest, read again, write

    def _config(self) -> Any:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

        return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)

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
    """int8 weights and activations (Int8DynamicActivationInt8WeightConfig)."""

    kind: ClassVar[str] = "int8"
    multiple: ClassVar[int] = 16
    products: ClassVar[tuple[str, ...]] = ("_int_mm", "int_scaled_matmul")
    # in: least, largest, division, rounding, zero point, clamp, cast to eight bits; out: times the tokens'
    # scales, cast to bfloat16, times the weights' scales, bias, cast to bfloat16
    eager_bytes: ClassVar[tuple[float, float]] = (
        2 + 2 + (2 + 4) + (4 + 4) + (4 + 4) + (4 + 4) + (4 + 1),
        (4 + 4) + (4 + 2) + (2 + 4) + (4 + 4) + (4 + 2),
    )
    fused_bytes: ClassVar[tuple[float, float]] = (2 + 2 + 1, 4 + 2)  # out: 32 bits read, 16 written

    def _config(self) -> Any:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)

    def _refuse_device(self, target: Target) -> None:
        """Every device multiplies int8."""
