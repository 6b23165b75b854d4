"""Context parallel on the CPU: two real processes share a tiny denoiser's calls through gloo."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from generations import attributes, frames, in_force, largest_difference, target, work_of
from t2v_energy.errors import UserError
from t2v_energy.interventions import Applied, InterventionError, catalogue, context_ranks, context_split
from t2v_energy.interventions.base import Target
from t2v_energy.interventions.cfg_truncation import CfgTruncation
from t2v_energy.interventions.context_parallel import ContextParallel, ExpectedLink
from t2v_energy.interventions.vae_bfloat16 import VaeBfloat16
from t2v_energy.prediction.savings import Compared, predict_savings, savings_basis

SIZE = {"height": 32, "width": 48, "num_frames": 5}
TOKENS = 2 * 2 * 3
"""Latent frames, rows and columns in patches."""


def parallel(degree: int = 2) -> ContextParallel:
    return ContextParallel(degree=degree, expected=ExpectedLink(link_GB_per_s=450, source="a test"))


def called(subject: Target) -> torch.Tensor:
    """The denoiser's answer to seeded noise."""
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(1, 16, 2, 4, 6, generator=generator)
    text = torch.randn(1, 7, 32, generator=generator)
    with torch.no_grad():
        (answer,) = subject.denoiser(
            hidden_states=latents,
            timestep=torch.tensor([500]),
            encoder_hidden_states=text,
            return_dict=False,
        )
    found: torch.Tensor = answer
    return found


@pytest.fixture(scope="module")
def subject() -> Target:
    return target(**SIZE)


def looked_up() -> bool | None:
    """Whether something that nobody set is in the store over which the ranks met; None: there is no store."""
    store = torch.distributed.distributed_c10d._get_default_store()
    before = store.timeout
    store.set_timeout(timedelta(seconds=2))
    try:
        return bool(store.check(["nothing that anybody set"]))
    except torch.distributed.DistStoreError:
        return None
    finally:
        store.set_timeout(before)


def workers_of(children: set[int]) -> list[int]:
    """Process ids of further ranks that came since ``children`` were listed."""
    import psutil

    return [
        child.pid
        for child in psutil.Process().children()
        if child.pid not in children and "t2v_energy.interventions.context_worker" in child.cmdline()
    ]


class TestTwoRanks:
    @pytest.fixture(scope="class")
    @classmethod
    def seen(cls, subject: Target) -> dict[str, Any]:
        """Once without, with (before and after a generation) and after."""
        held, hook = attributes(subject.denoiser), sys.excepthook
        seen: dict[str, Any] = {"call": [called(subject)], "frames": [frames(subject)]}
        with in_force(subject, parallel()) as found:
            with pytest.raises(InterventionError, match="context-parallel changed nothing"):
                found.check()
            seen["frames"].append(frames(subject))
            seen["evidence"] = found.evidence()["context-parallel"]
            found.check()
            seen["met"] = looked_up()
            seen["call"].append(called(subject))
            seen["positional"] = subject.denoiser(
                torch.zeros(1, 16, 2, 4, 6), torch.tensor([500]), torch.zeros(1, 7, 32)
            ).sample
        seen["call"].append(called(subject))
        seen["frames"].append(frames(subject))
        seen["same"] = held == attributes(subject.denoiser) and hook is sys.excepthook
        seen["positional after"] = subject.denoiser(
            torch.zeros(1, 16, 2, 4, 6), torch.tensor([500]), torch.zeros(1, 7, 32)
        ).sample
        return seen

    def test_the_denoiser_answers_the_same(self, seen: dict[str, Any]) -> None:
        without, during, _ = seen["call"]
        assert without.std() > 0.1
        torch.testing.assert_close(during, without, rtol=1e-5, atol=1e-6)

    def test_arguments_may_be_positional(self, seen: dict[str, Any]) -> None:
        torch.testing.assert_close(seen["positional"], seen["positional after"], rtol=1e-5, atol=1e-6)

    def test_the_video_is_the_same(self, seen: dict[str, Any]) -> None:
        without, during, _ = seen["frames"]
        assert np.ptp(without) > 0.1
        assert largest_difference(without, during) < 1e-5

    def test_undone_to_the_bit(self, seen: dict[str, Any]) -> None:
        assert torch.equal(seen["call"][0], seen["call"][2])
        assert np.array_equal(seen["frames"][0], seen["frames"][2])
        assert seen["same"]
        assert not torch.distributed.is_initialized()

    def test_where_they_met_is_there_until_the_end(self, seen: dict[str, Any]) -> None:
        """On a GPU, NCCL's monitoring goes on reading it: without it, ranks hung when they were to end."""
        assert seen["met"] is False, "it was looked for, and was not there"

    def test_evidence_is_of_both_ranks(self, seen: dict[str, Any]) -> None:
        """Two steps of two calls, each with half of the tokens."""
        assert seen["evidence"] == {"ranks": 2, "calls_of_each_rank": 4, "tokens_of_each_rank": TOKENS / 2}


class TestStacks:
    @pytest.mark.parametrize("cfg_first", [True, False])
    def test_with_what_leaves_the_denoiser_alone(self, cfg_first: bool) -> None:
        subject = target(**SIZE)
        others = [CfgTruncation(fraction=0.5), VaeBfloat16()]
        stack = [others[0], parallel(), others[1]] if cfg_first else [parallel(), *others]
        with in_force(subject, *others):
            without = frames(subject)
        with in_force(subject, *stack) as found:
            during = frames(subject)
            evidence = found.evidence()
        assert evidence["context-parallel"]["calls_of_each_rank"] == 3, "one pass was not guided"
        assert evidence["cfg-truncation"]["omitted_passes"] == 1
        assert largest_difference(without, during) < 1e-5

    def test_a_forced_kernel(self) -> None:
        subject = target(**SIZE, attention_kernel="math")
        without = frames(subject)
        with in_force(subject, parallel()) as found:
            during = frames(subject)
            found.check()
        assert largest_difference(without, during) < 1e-5


class TestARankThatFails:
    @pytest.fixture
    @staticmethod
    def running(subject: Target, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Applied, int]]:
        """Two ranks that wait a few seconds for each other, and the process id of the second."""
        import psutil

        monkeypatch.setattr(context_split, "TIMEOUT_S", 4.0)
        held, before = attributes(subject.denoiser), frames(subject)
        children = {child.pid for child in psutil.Process().children()}
        with in_force(subject, parallel()) as found:
            frames(subject)
            (worker,) = workers_of(children)
            yield found, worker
        assert not psutil.pid_exists(worker)
        assert attributes(subject.denoiser) == held
        assert np.array_equal(frames(subject), before)
        assert not torch.distributed.is_initialized()

    def test_one_that_was_killed_is_told(self, subject: Target, running: tuple[Applied, int]) -> None:
        found, worker = running
        os.kill(worker, signal.SIGKILL)
        begun_s = time.monotonic()
        with pytest.raises(InterventionError, match=r"rank 1 ended by itself \(exit code -9\)"):
            frames(subject)
        with pytest.raises(InterventionError, match="ended by itself"):
            found.check()
        assert time.monotonic() - begun_s < 60

    def test_one_that_is_killed_in_an_exchange_is_told(
        self, subject: Target, running: tuple[Applied, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is stopped before the call and killed while the first one waits for it."""
        import threading

        monkeypatch.setattr(context_split, "TIMEOUT_S", 60.0)
        _, worker = running
        os.kill(worker, signal.SIGSTOP)
        timer = threading.Timer(1.0, os.kill, (worker, signal.SIGKILL))
        timer.start()
        begun_s = time.monotonic()
        with pytest.raises(InterventionError, match="rank 1 ended by itself"):
            frames(subject)
        assert 0.5 < time.monotonic() - begun_s < 30

    def test_nobody_waits_for_one_that_hangs(self, subject: Target, running: tuple[Applied, int]) -> None:
        _, worker = running
        os.kill(worker, signal.SIGSTOP)
        begun_s = time.monotonic()
        with pytest.raises(RuntimeError, match=r"[Tt]imed? ?out"):
            frames(subject)
        assert time.monotonic() - begun_s < 60


class TestRefused:
    def refused(self, what: str, subject: Target, degree: int = 2) -> None:
        with pytest.raises(UserError, match=what):
            parallel(degree).check(subject.model, subject.configuration)

    def test_heads_that_do_not_divide(self) -> None:
        self.refused("2 heads do not divide by 3", target(**SIZE), degree=3)

    def test_tokens_that_do_not_divide(self) -> None:
        self.refused("9 tokens do not divide by 2", target(height=48, width=48, num_frames=1))

    def test_a_model_that_is_not_split(self) -> None:
        self.refused("how cogvideox is split", target("tiny-cogvideox"))

    def test_a_kernel_that_was_not_tried(self) -> None:
        self.refused("'sage' was not tried", target(**SIZE, attention_kernel="sage"))

    @pytest.mark.parametrize("boards", [(), ("GPU-1",)])
    def test_too_few_gpus(self, boards: tuple[str, ...], subject: Target) -> None:
        on_gpu = subject._replace(device="cuda", further_boards=boards)
        with pytest.raises(UserError, match=f"needs 3 GPUs, and {1 + len(boards)} are at hand"):
            parallel(3).apply(on_gpu)

    def test_a_denoiser_that_is_not_as_built(self, subject: Target) -> None:
        transformer = subject.model.components["transformer"]
        fewer = transformer.model_copy(update={"config": {**transformer.config, "num_layers": 1}})
        parts = {**subject.model.components, "transformer": fewer}
        other = subject._replace(model=subject.model.model_copy(update={"components": parts}))
        before = attributes(subject.denoiser)
        with pytest.raises(UserError, match="not as its model file builds it"):
            parallel().apply(other)
        assert attributes(subject.denoiser) == before

    def test_weights_that_did_not_come(self, subject: Target, monkeypatch: pytest.MonkeyPatch) -> None:
        """The first rank sends one value of one tensor wrong."""

        def wrong(module: Any) -> None:
            tensors = list(context_split.tensors_of(module))
            for index, (_, tensor) in enumerate(tensors):
                values = tensor.data.clone()
                if index == len(tensors) // 2:
                    values.view(-1)[0] += 1
                torch.distributed.broadcast(values, 0)

        monkeypatch.setattr(context_split, "share_weights", wrong)
        with pytest.raises(InterventionError, match="the weights of rank 1 are not those of the first"):
            parallel().apply(subject)
        assert not torch.distributed.is_initialized()

    def test_a_rank_that_does_not_come_up(self, subject: Target, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(context_ranks.sys, "executable", "/bin/false")
        with pytest.raises(InterventionError, match="rank 1"):
            parallel().apply(subject)

    def test_arguments_that_cannot_be_sent(self) -> None:
        with pytest.raises(TypeError, match="argument attention_kwargs of the denoiser is a dict"):
            context_split.Arguments.of({"attention_kwargs": {"scale": 1.0}})


class TestWork:
    """Wan2.1-1.3B, 480 × 832 × 81: 32,760 tokens of 1,536 values, 30 blocks, 100 calls."""

    VALUES = 100 * 30 * 32760 * 1536

    def ratios(self, degree: int) -> tuple[float, float]:
        """Bytes that are added, in the traffic's own, and FLOP of products that are added."""
        work = work_of("wan2.1-t2v-1.3b", 480, 832, 81)
        known = type(work)(work.model, work.configuration, work.features, 4.8)
        found = parallel(degree).work_ratios(known)
        traffic = (found["traffic"] - 1) * float(work.features.traffic_bytes[0])
        return traffic, (found["dense"] - 1) * float(work.features.dense_flop[0])

    @pytest.mark.parametrize("degree", [2, 4])
    def test_bytes_sent_and_rearranged(self, degree: int) -> None:
        """Each of four exchanges sends all but its own part of what a rank holds; two bytes a value."""
        of_a_rank = 4 * (self.VALUES / degree) * 2 * (degree - 1) / degree
        sent_as_memory = degree * of_a_rank * 4800 / 450
        assert self.ratios(degree)[0] == pytest.approx(sent_as_memory + 5 * 4 * self.VALUES)

    def test_every_rank_projects_the_text(self) -> None:
        blocks = 30 * 2 * (2 * 512 * 1536 * 1536)
        text = 2 * 512 * (4096 * 1536 + 1536 * 1536)
        time_ = 2 * (256 * 1536 + 7 * 1536 * 1536)
        patches = 2 * 32760 * 4 * 1536 * (16 + 16)
        assert self.ratios(2)[1] == pytest.approx(100 * (blocks + text + time_ + patches), rel=1e-6)

    def test_two_gpus_take_a_little_more_than_half_the_time_and_more_energy(self) -> None:
        configuration = tiny.defaults("tiny-wan").model_copy(
            update={
                "model": "wan2.1-t2v-1.3b", "height": 720, "width": 1280, "num_frames": 81,
                "num_inference_steps": 50, "interventions": ("context-parallel-2",),
            }
        )  # fmt: skip
        calibration = savings_basis(tiny.ROOT, "h200").calibration
        (saving,) = predict_savings(tiny.ROOT, calibration, [Compared(configuration, 50)])
        assert 0.5 < saving.latency_ratio < 0.6
        assert 1.0 < saving.gpu_energy_ratio < 1.15
        assert saving.denoiser_flop_ratio == pytest.approx(1, abs=0.002)

    def test_the_shipped_powers_are_those_that_they_say(self) -> None:
        """An idle board of 126 W beside one of the calibration's, at the size of this class."""
        from t2v_energy.prediction.calibrated import CLASSES, predict_points
        from t2v_energy.prediction.features import Point

        calibration = savings_basis(tiny.ROOT, "h200").calibration
        found = predict_points(tiny.ROOT, calibration, [Point("wan2.1-t2v-1.3b", 480, 832, 81, 50)])
        powers_W = dict(zip(CLASSES, 3600 * found.class_Wh[0] / found.class_s[0], strict=True))
        expected = catalogue(tiny.ROOT)["context-parallel-2"].expected
        assert expected is not None
        for name in ("text", "vae"):
            assert expected.power[name] == pytest.approx(1 + 126 / powers_W[name], abs=0.01)
