"""Regional compilation: one graph of all blocks, compiled in the first call, undone without a trace.

Compiling takes tens of seconds, so that one pipeline is compiled once, with what it is stacked on, and each
test looks at another side of it.
"""

from __future__ import annotations

import importlib.util
import logging
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import tiny
from generations import attributes, frames, in_force, largest_difference, target, work_of
from t2v_energy.errors import UserError
from t2v_energy.interventions.base import Intervention
from t2v_energy.interventions.compiled import BYTES, PASSES, Compile, fused_bytes
from t2v_energy.interventions.fused_qkv import FusedQkv
from t2v_energy.interventions.layerwise_casting import LayerwiseCasting
from t2v_energy.interventions.pyramid_attention_broadcast import PyramidAttentionBroadcast
from t2v_energy.interventions.quantised import Int8
from t2v_energy.interventions.token_alignment import TokenAlignment
from t2v_energy.interventions.vae_bfloat16 import VaeBfloat16

torch = pytest.importorskip("torch")
NOISE = 1e-4
"""Of values from 0 to 1, computed in float32."""


class Seen(NamedTuple):
    """What generations before, with and after compilation were."""

    before: Any
    compiled: Any
    after: Any
    with_vae: Any
    vae_alone: Any
    evidence: dict[str, dict[str, float]]
    kernels: dict[str, list[str]]
    kinds: list[str]
    first_call_s: float
    compile_s: float
    attributes: tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def seen() -> Seen:
    from t2v_energy.config import ProtocolSettings
    from t2v_energy.measurement.protocols import Run, Subject, run_sampled
    from t2v_energy.metering.spans import SpanRecorder

    subject = target()
    denoiser = subject.denoiser
    before, held = frames(subject), attributes(denoiser)
    settings = ProtocolSettings.model_validate({"sampled": tiny.SAMPLED | {"generations": 1}})
    made = Subject(subject.pipeline, subject.model, subject.configuration, "a red fox", "cpu")
    recorder = SpanRecorder(subject.pipeline, subject.model.spans, "cpu")
    run = Run(made, recorder, settings)
    with in_force(subject, Compile()) as found:
        with recorder.attached(), torch.no_grad():
            run_sampled(run)
        evidence = found.evidence()
        compiled = frames(subject)
        with in_force(subject, VaeBfloat16()):
            both = frames(subject)
    after = frames(subject)
    with in_force(subject, VaeBfloat16()):
        vae = frames(subject)
    spans = recorder.spans
    calls = [spans.end_s[i] - spans.start_s[i] for i, stage in enumerate(spans.stage) if stage == "denoiser"]
    return Seen(
        before, compiled, after, both, vae, evidence, run.kernels, list(run.windows.kind),
        calls[0], evidence["compile"]["compile_s"], (held, attributes(denoiser)),
    )  # fmt: skip


def test_one_graph_serves_all_blocks(seen: Seen) -> None:
    counted = seen.evidence["compile"]
    assert (counted["compiled_graphs"], counted["graph_breaks"]) == (1, 0)


def test_it_is_lossless_to_rounding(seen: Seen) -> None:
    assert Compile.lossless
    assert 0 < largest_difference(seen.before, seen.compiled) < NOISE


def test_undone_bit_for_bit(seen: Seen) -> None:
    assert largest_difference(seen.before, seen.after) == 0
    held, after = seen.attributes
    assert after == held


def test_compiling_falls_into_the_warm_ups_first_call(seen: Seen) -> None:
    """That call is probed: a probe that kept torch from compiling would move it into a measured one."""
    assert seen.kinds[0] == "warmup"
    assert seen.compile_s > 1
    assert seen.first_call_s > seen.compile_s


def test_the_probe_sees_what_compiled_code_attends_with(seen: Seen) -> None:
    assert seen.kernels["denoiser"] == ["flash-cpu"]


def test_a_stack_with_the_vae_does_what_both_do(seen: Seen) -> None:
    assert largest_difference(seen.with_vae, seen.vae_alone) < 0.02  # a bfloat16 has 8 bits
    assert largest_difference(seen.with_vae, seen.compiled) > NOISE


def test_a_stack_of_everything() -> None:
    """Each leaves its own evidence, and all are undone."""
    subject = target(height=96, width=128)
    quantised = [Int8()] if importlib.util.find_spec("torchao") else []
    stack = [FusedQkv(), TokenAlignment(), *quantised, VaeBfloat16(), Compile()]
    before = frames(subject)
    with in_force(subject, *stack) as found:
        during = frames(subject)
        found.check()
        assert found.evidence()["compile"]["compiled_graphs"] >= 1
    assert NOISE < largest_difference(before, during) < 0.1
    assert largest_difference(before, frames(subject)) == 0


@pytest.mark.parametrize(
    "other", [LayerwiseCasting(), PyramidAttentionBroadcast(timesteps=(0, 1000))], ids=lambda i: i.kind
)
def test_what_it_may_not_come_before(other: Intervention) -> None:
    """After it, it works; before it, Dynamo would raise in the first call."""
    subject = target()
    with (
        pytest.raises(UserError, match=f"{other.kind} cannot come after compile"),
        in_force(subject, Compile(), other),
    ):
        raise AssertionError("the body must not run")
    before = frames(subject)
    with in_force(subject, other, Compile()) as found:
        frames(subject)
        found.check()
    assert largest_difference(before, frames(subject)) == 0


def test_before_any_call_nothing_is_compiled() -> None:
    with in_force(target(), Compile()) as found, pytest.raises(UserError, match="compile changed nothing"):
        found.check()


def test_twice_is_refused() -> None:
    subject = target()
    with in_force(subject, Compile()), pytest.raises(UserError, match="compiled already"):
        Compile().apply(subject)


def test_a_denoiser_without_blocks_is_refused() -> None:
    subject = target("tiny-animatediff")
    with pytest.raises(UserError, match="what fuses in animatediff is not counted"):
        Compile().check(subject.model, subject.configuration)
    plain = SimpleNamespace(transformer=torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="Linear has no repeated blocks"):
        Compile().apply(target()._replace(pipeline=plain))


class TestWork:
    def test_wans_fused_traffic(self) -> None:
        """By hand: of 30 blocks, 19 passes over 1,536 values and 2 over 8,960, for each of 75,600 tokens."""
        work = work_of("wan2.1-t2v-1.3b", 720, 1280, 81)
        blocks = 100 * 75600 * 30 * BYTES * (19 * 1536 + 2 * 8960)
        assert fused_bytes(work) == pytest.approx(blocks, rel=1e-2)
        assert Compile().work_ratios(work)["traffic"] == pytest.approx(0.244, abs=0.002)

    @pytest.mark.parametrize(
        "size",
        [
            ("cogvideox-2b", 480, 720, 49),
            ("wan2.1-t2v-14b", 480, 832, 81),
            ("ltx-video-0.9.7-dev", 480, 640, 25),
        ],
    )
    def test_fusion_leaves_some_and_saves_some(self, size: tuple[str, int, int, int]) -> None:
        assert 0.1 < Compile().work_ratios(work_of(*size))["traffic"] < 0.8

    def test_inductor_itself_moves_as_much(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its own count of the bytes of a block's fused kernels, against the passes counted here."""
        from torch._inductor import compile_fx, metrics
        from torch._inductor.utils import fresh_cache

        monkeypatch.setattr(compile_fx.inductor_metrics_log, "level", logging.INFO)  # counts only if it logs
        compile_fx.inductor_metrics_log.manager._clear_cache()
        config = tiny.model().components["transformer"].config
        width, inner = config["num_attention_heads"] * config["attention_head_dim"], config["ffn_dim"]
        tokens, rotation = 512, config["attention_head_dim"]
        inputs = [torch.randn(1, length, width) for length in (tokens, 16, 6)]
        tables = [torch.randn(1, tokens, 1, rotation) for _ in range(2)]
        metrics.reset()
        torch._dynamo.reset()
        with torch.no_grad(), fresh_cache():
            compiled = torch.compile(tiny.pipeline().transformer.blocks[0], fullgraph=True, dynamic=False)
            compiled(*inputs, tables)
        torch._dynamo.reset()
        kernels = [(type(node).__name__, values) for node, values in metrics.nodes_num_elem]
        fused = sum(values for name, values in kernels if name != "ExternKernelSchedulerNode")
        stream, wide = PASSES["wan"]
        # and the two tables of the rotation, which all heads share: next to nothing in models of usual width
        expected = tokens * (stream * width + wide * inner + 2 * rotation)
        assert fused == pytest.approx(expected, rel=0.02)
