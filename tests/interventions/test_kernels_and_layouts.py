"""Interventions on weights and kernels change what they say and no more, and are undone bit for bit."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from generations import attributes, frames, in_force, largest_difference, target, with_and_after, work_of
from t2v_energy.errors import UserError
from t2v_energy.interventions.base import Intervention, Target
from t2v_energy.interventions.compiled import fused_bytes
from t2v_energy.interventions.fused_qkv import FusedQkv
from t2v_energy.interventions.layerwise_casting import LayerwiseCasting
from t2v_energy.interventions.quantised import Fp8, Int8
from t2v_energy.interventions.token_alignment import TokenAlignment, split_keys
from t2v_energy.interventions.vae_bfloat16 import VaeBfloat16
from t2v_energy.interventions.vae_channels_last import VaeChannelsLast

torch = pytest.importorskip("torch")
NOISE = 1e-5
"""Of values from 0 to 1, computed in float32: sums in another order."""
UNEVEN = {"height": 96, "width": 128}
"""A size whose tokens, 144 in Wan and 370 in CogVideoX, do not divide by 128."""
CASES: list[tuple[Intervention, str, dict[str, Any], bool]] = [
    (VaeBfloat16(), "tiny-wan", {}, False),
    (VaeBfloat16(), "tiny-cogvideox", {}, False),
    (VaeChannelsLast(), "tiny-wan", {}, True),
    (VaeChannelsLast(), "tiny-cogvideox", {}, True),
    (FusedQkv(), "tiny-wan", {}, True),
    (FusedQkv(), "tiny-cogvideox", {}, True),
    (LayerwiseCasting(), "tiny-wan", {}, False),
    (LayerwiseCasting(), "tiny-cogvideox", {}, False),
    (TokenAlignment(), "tiny-wan", UNEVEN, True),
    (TokenAlignment(), "tiny-cogvideox", UNEVEN, True),
]
with_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="extra `interventions` is not installed"
)
if importlib.util.find_spec("torchao"):
    CASES += [(Int8(), "tiny-wan", {}, False), (Int8(), "tiny-cogvideox", {}, False)]


def case(*chosen: Any) -> str:
    return "-".join(str(part.kind if isinstance(part, Intervention) else part) for part in chosen[:1])


@pytest.mark.parametrize(("intervention", "key", "size", "lossless"), CASES, ids=case)
def test_it_changes_something_and_is_undone(
    intervention: Intervention, key: str, size: dict[str, Any], lossless: bool
) -> None:
    subject = target(key, **size)
    modules = (subject.denoiser, subject.pipeline.vae)
    held = [attributes(module) for module in modules]
    values = [{k: v.clone() for k, v in module.state_dict().items()} for module in modules]
    before, during, after = with_and_after(subject, intervention)
    assert largest_difference(before, after) == 0
    assert [attributes(module) for module in modules] == held
    for module, was in zip(modules, values, strict=True):
        assert module.state_dict().keys() == was.keys()
        assert all(torch.equal(v, was[k]) and v.dtype == was[k].dtype for k, v in module.state_dict().items())
    assert intervention.lossless == lossless
    difference = largest_difference(before, during)
    assert difference < NOISE if lossless else NOISE < difference < 0.2


@pytest.mark.parametrize(("intervention", "key", "size", "lossless"), CASES, ids=case)
def test_before_any_generation_it_has_changed_nothing(
    intervention: Intervention, key: str, size: dict[str, Any], lossless: bool
) -> None:
    with (
        in_force(target(key, **size), intervention) as found,
        pytest.raises(UserError, match="changed nothing"),
    ):
        found.check()


def test_undone_where_a_generation_fails() -> None:
    subject = target("tiny-wan", **UNEVEN)
    modules = (subject.denoiser, subject.pipeline.vae)
    held = [attributes(module) for module in modules]
    everything = (FusedQkv(), LayerwiseCasting(), TokenAlignment(), VaeBfloat16(), VaeChannelsLast())
    with pytest.raises(ZeroDivisionError), in_force(subject, *everything):
        raise ZeroDivisionError
    assert [attributes(module) for module in modules] == held


def test_a_stack_of_lossless_ones_is_lossless() -> None:
    subject = target("tiny-wan", **UNEVEN)
    before, during, after = with_and_after(subject, FusedQkv(), TokenAlignment(), VaeChannelsLast())
    assert largest_difference(before, during) < NOISE
    assert largest_difference(before, after) == 0


class TestVaeBfloat16:
    def test_every_decoding_is_counted(self) -> None:
        subject = target()
        with in_force(subject, VaeBfloat16()) as found:
            assert subject.pipeline.vae.dtype == torch.bfloat16
            latents = torch.zeros(1, 16, 1, 4, 4)
            with torch.no_grad():
                decoded = [subject.pipeline.vae.decode(latents, return_dict=False)[0] for _ in range(2)]
            assert found.evidence() == {"vae-bfloat16": {"bfloat16_decodes": 2.0}}
        assert {one.dtype for one in decoded} == {torch.bfloat16}
        assert subject.pipeline.vae.dtype == torch.float32

    def test_one_in_16_bits_already_is_refused(self) -> None:
        work = work_of("cogvideox-2b", 480, 720, 49)
        with pytest.raises(UserError, match="the VAE is in bfloat16 already"):
            VaeBfloat16().check(work.model, work.configuration)
        with in_force(target(), VaeBfloat16()), pytest.raises(UserError, match="no weights in float32"):
            VaeBfloat16().apply(target())


class TestVaeChannelsLast:
    def test_convolutions_are_counted_once(self) -> None:
        subject = target()
        with in_force(subject, VaeChannelsLast()) as found:
            latents = torch.zeros(1, 16, 2, 4, 4)
            with torch.no_grad():
                subject.pipeline.vae.decode(latents)
                once = found.evidence()
                subject.pipeline.vae.decode(latents)
            convolutions = sum(
                isinstance(m, (torch.nn.Conv2d, torch.nn.Conv3d))
                for m in subject.pipeline.vae.decoder.modules()
            )
            assert found.evidence() == once
            assert 0 < once["vae-channels-last"]["channels_last_convolutions"] <= convolutions

    def test_a_decoder_without_convolutions(self) -> None:
        plain = SimpleNamespace(vae=SimpleNamespace(decoder=torch.nn.Linear(2, 2)))
        with pytest.raises(UserError, match="SimpleNamespace has no convolutions"):
            VaeChannelsLast().apply(target()._replace(pipeline=plain))


class TestFusedQkv:
    @pytest.mark.parametrize(("key", "products"), [("tiny-wan", 4), ("tiny-cogvideox", 2)])
    def test_the_processors_use_what_is_fused(self, key: str, products: int) -> None:
        """Two blocks; Wan's have a self and a cross attention each."""
        subject = target(key)
        with in_force(subject, FusedQkv()) as found:
            with_and_after(subject, VaeBfloat16())
            assert found.evidence() == {"fused-qkv": {"fused_products_in_first_call": products}}

    @pytest.mark.parametrize("key", ["tiny-wan", "tiny-cogvideox"])
    def test_before_layerwise_casting_both_do_something(self, key: str) -> None:
        """The other order is refused: joined weights cannot be made of stored ones."""
        subject = target(key)
        before, during, after = with_and_after(subject, FusedQkv(), LayerwiseCasting())
        assert largest_difference(before, after) == 0 < largest_difference(before, during)
        with (
            pytest.raises(UserError, match="fused-qkv cannot come after layerwise-casting"),
            in_force(subject, LayerwiseCasting(), FusedQkv()),
        ):
            raise AssertionError("the body must not run")
        assert largest_difference(before, frames(subject)) == 0

    def test_refusals(self) -> None:
        subject = target("tiny-mochi")
        with pytest.raises(UserError, match="diffusers fuses no projections of mochi"):
            FusedQkv().check(subject.model, subject.configuration)
        with in_force(target(), FusedQkv()), pytest.raises(UserError, match="no projections left to fuse"):
            FusedQkv().apply(target())


class TestLayerwiseCasting:
    def test_weights_are_stored_in_eight_bits(self) -> None:
        subject = target()
        block = subject.denoiser.blocks[0]
        with in_force(subject, LayerwiseCasting()):
            assert block.ffn.net[2].weight.dtype == torch.float8_e4m3fn
            assert block.norm2.weight.dtype == torch.float32
        assert block.ffn.net[2].weight.dtype == torch.float32

    def test_twice_is_refused(self) -> None:
        with in_force(target(), LayerwiseCasting()), pytest.raises(UserError, match="hooks on the denoiser"):
            LayerwiseCasting().apply(target())

    def test_it_moves_more_bytes(self) -> None:
        """1.4 billion parameters, six bytes each, in each of 100 calls."""
        work = work_of("wan2.1-t2v-1.3b", 480, 832, 81)
        added = (LayerwiseCasting().work_ratios(work)["traffic"] - 1) * float(work.features.traffic_bytes[0])
        assert added == pytest.approx(100 * 6 * 1.419e9, rel=1e-3)


class TestTokenAlignment:
    @pytest.mark.parametrize("tokens", [129, 200, 255, 300, 384, 100])
    def test_two_passes_are_one_attention(self, tokens: int) -> None:
        torch.manual_seed(1)
        query, key, value = (3 * torch.randn(2, 3, tokens, 16) for _ in range(3))
        attend = torch.nn.functional.scaled_dot_product_attention
        with torch.no_grad():
            found, whole = split_keys(attend, 128)(query, key, value), attend(query, key, value)
        assert torch.allclose(found, whole, atol=1e-5)
        assert torch.equal(found, whole) == (tokens in (100, 384))

    def test_rest_that_outweighs_the_first_pass(self) -> None:
        """Rows whose whole weight is on the last key: the join must not lose them."""
        query = torch.ones(1, 1, 130, 16)
        key = -torch.ones(1, 1, 130, 16)
        key[:, :, -1] = 5
        value = torch.randn(1, 1, 130, 16)
        attend = torch.nn.functional.scaled_dot_product_attention
        with torch.no_grad():
            found, whole = split_keys(attend, 128)(query, key, value), attend(query, key, value)
        assert torch.allclose(found, whole, atol=1e-6)

    def test_cross_attention_and_masks_are_left_alone(self) -> None:
        seen: list[int] = []

        def attend(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(key.shape[-2])
            return query

        long, text = torch.zeros(1, 1, 200, 8), torch.zeros(1, 1, 130, 8)
        split = split_keys(attend, 128)
        split(long, text, text)
        split(long, long, long, attn_mask=torch.zeros(200, 200))
        split(long, long, long, torch.zeros(200, 200))
        assert seen == [130, 200, 200]

    def test_refusals(self) -> None:
        even = target("tiny-wan", height=128, width=128, num_frames=5)
        with pytest.raises(UserError, match="128 tokens divide by 128 already"):
            TokenAlignment().check(even.model, even.configuration)
        few = target("tiny-wan", height=64, width=64, num_frames=9)
        with pytest.raises(UserError, match="48 tokens are fewer than 128"):
            TokenAlignment().check(few.model, few.configuration)
        flash = target("tiny-wan", **UNEVEN, attention_kernel="flash")
        with pytest.raises(UserError, match="attention_kernel is 'flash'"):
            TokenAlignment().check(flash.model, flash.configuration)
        mochi = target("tiny-mochi")
        with pytest.raises(UserError, match="mochi attends with a mask"):
            TokenAlignment().check(mochi.model, mochi.configuration)

    @pytest.mark.parametrize("key", ["tiny-wan", "tiny-cogvideox"])
    def test_tokens_are_those_of_the_cost_model(self, key: str) -> None:
        from t2v_energy.interventions.token_alignment import attended_tokens
        from t2v_energy.prediction.features import Point, features

        subject = target(key, **UNEVEN)
        c = subject.configuration
        found = features(tiny.ROOT, [Point(key, c.height, c.width, c.num_frames, 1)])
        assert attended_tokens(subject.model, c) == found.tokens[0]

    def test_joining_moves_bytes(self) -> None:
        """Ten bytes of each of 1,536 values of 32,760 tokens, in 30 blocks and 100 calls."""
        work = work_of("wan2.1-t2v-1.3b", 480, 832, 81)
        added = (TokenAlignment().work_ratios(work)["traffic"] - 1) * float(work.features.traffic_bytes[0])
        assert added == pytest.approx(100 * 30 * 10 * 1536 * 32760)


class TestQuantised:
    def test_float8_is_refused_on_the_cpu(self) -> None:
        with pytest.raises(UserError, match="fp8: cpu has no float8 products") as caught:
            Fp8().apply(target())
        assert caught.value.remedy == "measure it on a GPU"

    def test_without_torchao(self, monkeypatch: pytest.MonkeyPatch) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name == "torchao" else find(name, *rest)
        )
        with pytest.raises(UserError, match="torchao is not installed") as caught:
            Int8().apply(target())
        assert caught.value.remedy == "pip install 't2v-energy[interventions]'"

    def test_other_architectures(self) -> None:
        subject = target("tiny-mochi")
        with pytest.raises(UserError, match="what mochi quantises is not counted"):
            Int8().check(subject.model, subject.configuration)

    @with_torchao
    def test_layers_whose_sizes_do_not_fit_are_left_out(self) -> None:
        subject = target()
        with in_force(subject, Int8()) as found:
            with_and_after(subject, VaeBfloat16())
            # two blocks of ten layers, all of which divide by 16
            assert found.evidence()["int8"] == {
                "eight_bit_products_in_first_call": 20, "quantised_layers": 20, "layers_left_out": 0
            }  # fmt: skip
        with pytest.raises(UserError, match="no layer's sizes divide by 512"):
            _Coarse().apply(subject)
        assert _left_out(subject) == (16, 4)  # the two feed-forward layers of each block

    @with_torchao
    def test_twice_is_refused(self) -> None:
        with in_force(target(), Int8()), pytest.raises(UserError, match="or all are quantised"):
            Int8().apply(target())

    def test_quantising_moves_bytes(self) -> None:
        """float8 by hand: 33 bytes of each input value; fused 5, and three products share theirs."""
        alone = work_of("wan2.1-t2v-1.3b", 480, 832, 81)
        compiled = work_of("wan2.1-t2v-1.3b", 480, 832, 81, interventions=("compile", "fp8"))
        there = (float(alone.features.traffic_bytes[0]), fused_bytes(compiled))
        added = [
            (Fp8().work_ratios(work)["traffic"] - 1) * traffic / (100 * 30 * 32760)
            for work, traffic in zip((alone, compiled), there, strict=True)
        ]
        assert added == pytest.approx([33 * (7 * 1536 + 8960), 5 * (5 * 1536 + 8960)])

    @with_torchao
    @pytest.mark.parametrize("kind", ["int8", "fp8"])
    def test_the_eager_bytes_are_torchaos(self, kind: str) -> None:
        """Traffic of quantising 4,096 rows as torchao dispatches it; scales and such are under 1 %."""
        from t2v_energy.work.traffic_trace import TrafficMode
        from torchao.quantization import PerRow
        from torchao.quantization.quantize_.workflows.float8.float8_tensor import Float8Tensor
        from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor

        values = torch.randn(4096, 512, dtype=torch.bfloat16)
        tensor, form = (Int8Tensor, Int8) if kind == "int8" else (Float8Tensor, Fp8)
        with torch.no_grad(), TrafficMode() as counted:
            tensor.from_hp(values, granularity=PerRow())
        assert counted.found["bytes"] / values.numel() == pytest.approx(form.eager_bytes[0], rel=0.01)


class _Coarse(Int8):
    """Needs sizes that no tiny layer has."""

    multiple = 512


class _Middling(Int8):
    """Needs sizes that the feed-forward's inner one has, 128, and the stream's, 48, has not."""

    multiple = 48


def _left_out(subject: Target) -> tuple[int, int]:
    with in_force(subject, _Middling()) as found:
        with_and_after(subject, VaeBfloat16())
        counted = found.evidence()["int8"]
    return int(counted["quantised_layers"]), int(counted["layers_left_out"])
