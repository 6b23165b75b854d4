"""Spans: each call under its stage, step and number, on the meter's clock; and nothing left behind."""

from __future__ import annotations

import inspect
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
from t2v_energy.errors import UserError

torch = pytest.importorskip("torch")
from t2v_energy.measurement.kernels import KernelProbe  # noqa: E402
from t2v_energy.metering.spans import SpanRecorder, _is_on_host, shifted  # noqa: E402

STAGES = {"text_encoder": "encoder.forward", "denoiser": "denoiser.forward", "scheduler": "plan.step"}


class Scheduler:
    def step(self, sample: Any, *, return_dict: bool = True) -> Any:
        time.sleep(0.002)
        return sample


class Module(torch.nn.Module):
    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(size, size)

    def forward(self, x: Any, scale: float = 1.0) -> Any:
        time.sleep(0.005)
        return self.linear(x) * scale


def parts() -> Any:
    """A pipeline of two modules and a scheduler, with some host work around the loop."""

    class Pipeline(SimpleNamespace):
        def __call__(self, steps: int) -> Any:
            x = self.encoder(torch.zeros(1, 8))
            for _ in range(steps):
                x = self.denoiser(x) - self.denoiser(x, scale=0.5)
                x = self.plan.step(x)
            return x

    return Pipeline(encoder=Module(), denoiser=Module(), plan=Scheduler())


def rows(recorder: SpanRecorder) -> list[tuple[int, str, int, int]]:
    spans = recorder.spans
    return list(zip(spans.window, spans.stage, spans.step, spans.call, strict=True))


def test_calls_are_numbered_within_their_stage_and_step() -> None:
    pipeline = parts()
    recorder = SpanRecorder(pipeline, STAGES, "cpu")
    with recorder.attached(), torch.no_grad():
        for window, steps in ((0, 1), (3, 2)):
            with recorder.window(window):
                pipeline(steps)

    def step(window: int, index: int) -> list[tuple[int, str, int, int]]:
        calls = [("denoiser", 0), ("denoiser", 1), ("scheduler", 0)]
        return [(window, stage, index, call) for stage, call in calls]

    assert rows(recorder) == [
        (0, "text_encoder", -1, 0),
        *step(0, 0),
        (3, "text_encoder", -1, 0),
        *step(3, 0),
        *step(3, 1),
    ]


def test_times_are_the_meters_and_in_order() -> None:
    pipeline = parts()
    recorder = SpanRecorder(pipeline, STAGES, "cpu")
    before_s = time.monotonic()
    with recorder.attached(), torch.no_grad(), recorder.window(0) as edges:
        pipeline(2)
    after_s = time.monotonic()
    spans = recorder.spans
    assert before_s <= edges["start_s"] <= spans.start_s[0]
    assert spans.end_s[-1] <= edges["end_s"] <= after_s
    for start_s, end_s, following_s in zip(
        spans.start_s, spans.end_s, [*spans.start_s[1:], after_s], strict=True
    ):
        assert start_s < end_s <= following_s
    for stage, start_s, end_s in zip(spans.stage, spans.start_s, spans.end_s, strict=True):
        assert end_s - start_s >= (0.002 if stage == "scheduler" else 0.005)


def test_calls_inside_calls_are_spans_of_their_own() -> None:
    pipeline = SimpleNamespace(outer=Module(), inner=None)
    pipeline.inner = pipeline.outer.linear
    recorder = SpanRecorder(pipeline, {"outer": "outer.forward", "inner": "inner.forward"}, "cpu")
    with recorder.attached(), torch.no_grad(), recorder.window(0):
        pipeline.outer(torch.zeros(1, 8))
    spans = recorder.spans
    assert spans.stage == ["outer", "inner"]
    assert spans.start_s[0] <= spans.start_s[1] <= spans.end_s[1] <= spans.end_s[0]


def test_the_time_before_the_first_call_is_a_stage_where_it_is_asked_for() -> None:
    pipeline = parts()
    recorder = SpanRecorder(pipeline, {"prepare": "host.start", **STAGES}, "cpu")
    with recorder.attached(), torch.no_grad():
        for window in (0, 1):
            with recorder.window(window) as edges:
                time.sleep(0.01)
                pipeline(1)
        start_s = edges["start_s"]
        with recorder.window(2):
            pass  # no call: nothing comes before it
    spans = recorder.spans
    assert rows(recorder)[:2] == [(0, "prepare", -1, 0), (0, "text_encoder", -1, 0)]
    assert spans.window.count(1) == spans.window.count(0)
    assert 2 not in spans.window
    first = spans.window.index(1)
    assert (spans.stage[first], spans.start_s[first]) == ("prepare", start_s)
    assert spans.end_s[first] == spans.start_s[first + 1]
    assert spans.end_s[first] - spans.start_s[first] >= 0.01


def test_nothing_is_recorded_outside_windows() -> None:
    pipeline = parts()
    recorder = SpanRecorder(pipeline, STAGES, "cpu")
    with recorder.attached(), torch.no_grad():
        pipeline(1)
        with recorder.window(0):
            pass
        pipeline(1)
    assert rows(recorder) == []


def test_the_originals_come_back_even_after_an_error() -> None:
    pipeline = parts()
    own = pipeline.plan.step
    pipeline.plan.step = own  # an attribute of the instance itself: it must come back as one
    recorder = SpanRecorder(pipeline, STAGES, "cpu")
    pipeline.encoder.linear.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError), recorder.attached(), recorder.window(0):
        pipeline(1)
    del pipeline.encoder.linear.forward
    assert "forward" not in vars(pipeline.denoiser)
    assert "forward" not in vars(pipeline.encoder)
    assert pipeline.plan.step is own
    assert rows(recorder) == []  # the window that broke left no spans without a window
    with recorder.attached(), torch.no_grad(), recorder.window(0):
        pipeline(1)
    assert len(rows(recorder)) == 4


def test_signatures_stay_readable() -> None:
    # diffusers asks which arguments a scheduler's step takes
    pipeline = parts()
    step, forward = inspect.signature(pipeline.plan.step), inspect.signature(pipeline.denoiser.forward)
    with SpanRecorder(pipeline, STAGES, "cpu").attached():
        assert inspect.signature(pipeline.plan.step) == step
        assert inspect.signature(pipeline.denoiser.forward) == forward


@pytest.mark.parametrize("path", ["denoiser.forwards", "unet.forward", "denoiser.linear_2"])
def test_a_path_that_is_not_there_is_named_and_the_rest_unwrapped(path: str) -> None:
    pipeline = parts()
    with (
        pytest.raises(UserError, match=rf"spans\.other: Pipeline has no {path}\(\)"),
        SpanRecorder(pipeline, {**STAGES, "other": path}, "cpu").attached(),
    ):
        pytest.fail("nothing may be measured with a part missing")
    assert "forward" not in vars(pipeline.denoiser)
    assert "step" not in vars(pipeline.plan)


def test_a_stage_of_several_parts() -> None:
    """Their calls are numbered together, and each part's first is probed."""
    pipeline, seen = parts(), []
    probe = SimpleNamespace(during=lambda stage: (seen.append(stage), nullcontext())[1])
    stages = {"both": ["encoder.forward", "denoiser.forward"], "scheduler": "plan.step"}
    recorder = SpanRecorder(pipeline, stages, "cpu")
    with recorder.attached(), torch.no_grad(), recorder.window(0, probe=probe):
        pipeline(1)
    assert rows(recorder) == [*((0, "both", -1, call) for call in range(3)), (0, "scheduler", 0, 0)]
    assert seen == ["both", "both", "scheduler"]
    assert "forward" not in vars(pipeline.encoder) | vars(pipeline.denoiser)


def test_the_probe_sees_first_calls_only() -> None:
    pipeline, probe = parts(), KernelProbe()
    seen: list[str] = []
    during = probe.during
    probe.during = lambda stage: (seen.append(stage), during(stage))[1]  # type: ignore[method-assign]
    recorder = SpanRecorder(pipeline, STAGES, "cpu")
    with recorder.attached(), torch.no_grad():
        with recorder.window(0, probe=probe):
            pipeline(3)
        with recorder.window(1):
            pipeline(1)
    assert seen == ["text_encoder", "denoiser", "scheduler"]


def test_memory_is_a_gpus() -> None:
    pipeline = parts()
    recorder = SpanRecorder(pipeline, STAGES, "cpu")
    with recorder.attached(), torch.no_grad(), recorder.window(0, track_memory=True):
        pipeline(1)
    assert (recorder.allocated_B, recorder.reserved_B) == ({}, {})


HOST, DEVICE = torch.zeros(1), torch.zeros(1, device="meta")


@pytest.mark.parametrize(
    ("result", "on_host"),
    [
        (HOST, True),
        (DEVICE, False),
        ((DEVICE,), False),
        ([HOST, [HOST]], True),
        ((HOST, DEVICE), False),
        ({"sample": DEVICE}, False),
        ({"sample": HOST}, True),
        (np.zeros(2), True),
        (["an image"], True),
        (None, True),
    ],
)
def test_a_result_on_the_host_ends_its_call_there(result: Any, on_host: bool) -> None:
    assert _is_on_host(result) is on_host


def test_outputs_of_the_libraries_are_looked_into() -> None:
    from diffusers.models.autoencoders.vae import DecoderOutput
    from transformers.modeling_outputs import BaseModelOutput

    assert _is_on_host(DecoderOutput(sample=HOST))
    assert not _is_on_host(DecoderOutput(sample=DEVICE))
    assert not _is_on_host(BaseModelOutput(last_hidden_state=DEVICE))


def test_shifted_moves_times_only() -> None:
    pipeline = parts()
    recorder = SpanRecorder(pipeline, STAGES, "cpu")
    with recorder.attached(), torch.no_grad(), recorder.window(0):
        pipeline(1)
    spans, origin_s = recorder.spans, recorder.spans.start_s[0]
    moved = shifted(spans, origin_s)
    assert moved.start_s[0] == 0
    assert [t + origin_s for t in moved.end_s] == pytest.approx(spans.end_s)
    assert (moved.stage, moved.step, moved.call) == (spans.stage, spans.step, spans.call)


def test_the_pipelines_time_is_in_spans() -> None:
    """The tiny pipeline: what no span covers is little, although its calls last a few milliseconds."""
    pipeline, model = tiny.pipeline(), tiny.model()
    recorder = SpanRecorder(pipeline, model.spans, "cpu")
    shares = []
    with recorder.attached(), torch.no_grad():
        for window in range(3):
            with recorder.window(window) as edges:
                pipeline(
                    prompt="a fox",
                    negative_prompt="",
                    height=96,
                    width=96,
                    num_frames=9,
                    num_inference_steps=2,
                )
            spans = recorder.spans
            spanned_s = sum(
                end - start
                for w, start, end in zip(spans.window, spans.start_s, spans.end_s, strict=True)
                if w == window
            )
            shares.append(1 - spanned_s / (edges["end_s"] - edges["start_s"]))
    assert all(share >= 0 for share in shares)
    assert min(shares) < 0.2  # the best of three: other work runs beside
