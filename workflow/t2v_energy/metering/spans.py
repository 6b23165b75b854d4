"""Spans: when each part of a pipeline ran, on the meter's clock, without slowing the pipeline down.

On a GPU, work is asynchronous: a call returns long before the device has done it. A pair of CUDA events
marks a call on the device's own time line; both ends of every window are synchronised, and the events
between them are mapped linearly onto the host's monotonic clock. Nothing is synchronised inside a window.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import record_function

from t2v_energy.errors import UserError
from t2v_energy.measurement.record import LOOP_STAGES, Spans

ANNOTATION = "stage: "
BEFORE_CALLS = "host.start"
"""Path of the stage that is no call: what the pipeline does on the host before it calls its first timed part.

Checks, the tokenizer and diffusers' search of all modules for offloading hooks take milliseconds, which is a
hundredth of a clip that takes half a second."""


@dataclass
class _Call:
    stage: str
    step: int
    call: int
    start: Any  # host seconds, or a CUDA event
    end: Any = None


@dataclass
class SpanRecorder:
    """Times the calls of a pipeline's parts; ``stages`` maps a stage to ``<part>.<method>``, to several of
    them, or to :data:`BEFORE_CALLS`.

    Use :meth:`attached` around everything and :meth:`window` around each generation.
    """

    pipeline: Any
    stages: Mapping[str, str | Sequence[str]]
    device: str
    spans: Spans = field(default_factory=Spans)
    allocated_B: dict[str, int] = field(default_factory=dict)
    reserved_B: dict[str, int] = field(default_factory=dict)
    _calls: list[_Call] = field(default_factory=list)
    _counts: Counter[tuple[str, int]] = field(default_factory=Counter)
    _probed: set[str] = field(default_factory=set)
    _step: int = 0
    _recording: bool = False
    _track_memory: bool = False
    _probe: Any = None
    _annotating: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @contextmanager
    def attached(self) -> Iterator[SpanRecorder]:
        """Wrap the pipeline's calls, and put the originals back at the end."""
        undo: list[Callable[[], None]] = []
        try:
            for stage, paths in self.stages.items():
                for path in _each(paths):
                    if path != BEFORE_CALLS:
                        undo.append(self._wrap(stage, path))
            yield self
        finally:
            for restore in undo:
                restore()

    def _wrap(self, stage: str, path: str) -> Callable[[], None]:
        part_name, method = path.split(".")
        part = getattr(self.pipeline, part_name, None)
        original = getattr(part, method, None)
        if not callable(original):
            raise UserError(
                f"spans.{stage}: {type(self.pipeline).__name__} has no {path}()",
                where="the model file",
                remedy="name a part of the pipeline and one of its methods",
            )
        had_own = method in vars(part)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self._recording:
                with record_function(ANNOTATION + stage) if self._annotating else nullcontext():
                    return original(*args, **kwargs)
            call = self._begin(stage)
            with self._probing(call, path):
                result = original(*args, **kwargs)
            self._finish(call, on_host=_is_on_host(result))
            return result

        # diffusers and transformers inspect signatures of some calls (`forward`, `step`): keep them.
        timed.__wrapped__ = original  # type: ignore[attr-defined]
        setattr(part, method, timed)

        def restore() -> None:
            if had_own:
                setattr(part, method, original)
            else:
                delattr(part, method)

        return restore

    @contextmanager
    def annotated(self) -> Iterator[str]:
        """Mark calls outside windows for torch's profiler, as the prefix that is yielded and their stage."""
        self._annotating = True
        try:
            yield ANNOTATION
        finally:
            self._annotating = False

    def _probing(self, call: _Call, path: str) -> AbstractContextManager[None]:
        """The probe looks at a part's first call only: it slows the host down, and later calls are timed."""
        if self._probe is None or path in self._probed:
            return nullcontext()
        self._probed.add(path)
        during: AbstractContextManager[None] = self._probe.during(call.stage)
        return during

    def _mark(self) -> Any:
        if not self.on_gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _begin(self, stage: str) -> _Call:
        step = self._step if stage in LOOP_STAGES else -1
        call = _Call(stage, step, self._counts[stage, step], None)
        self._counts[stage, step] += 1
        if self._track_memory and self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        call.start = self._mark()
        self._calls.append(call)
        return call

    def _finish(self, call: _Call, *, on_host: bool) -> None:
        # A call whose result lies on the host ends when the host has it, not when the GPU is done.
        call.end = time.monotonic() if on_host else self._mark()
        if self._track_memory and self.on_gpu:
            for store, peak in (
                (self.allocated_B, torch.cuda.max_memory_allocated()),
                (self.reserved_B, torch.cuda.max_memory_reserved()),
            ):
                store[call.stage] = max(store.get(call.stage, 0), peak)
        if call.stage == "scheduler":
            self._step += 1

    @contextmanager
    def window(
        self, index: int, *, track_memory: bool = False, probe: Any = None
    ) -> Iterator[dict[str, float]]:
        """Record every call until the end as window ``index``; fills ``start_s`` and ``end_s``.

        Reading the allocator's peaks and probing for kernels slow the host down, so they are asked for
        in warm-ups only.
        """
        self._calls, self._counts, self._step, self._probed = [], Counter(), 0, set()
        edges: dict[str, float] = {}
        first, edges["start_s"] = self._anchor()
        self._recording, self._track_memory, self._probe = True, track_memory, probe
        try:
            yield edges
        finally:
            self._recording = False
        last, edges["end_s"] = self._anchor()
        self._append(index, self._on_host_clock(first, edges["start_s"], last, edges["end_s"]))

    def _anchor(self) -> tuple[Any, float]:
        """A synchronised event and the host time at which it had completed."""
        if not self.on_gpu:
            return None, time.monotonic()
        torch.cuda.synchronize()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        return event, time.monotonic()

    def _on_host_clock(
        self, first: Any, start_s: float, last: Any, end_s: float
    ) -> Iterator[tuple[_Call, float, float]]:
        device_ms = first.elapsed_time(last) if self.on_gpu else 1.0
        scale = (end_s - start_s) / device_ms

        def host_s(mark: Any) -> float:
            return mark if isinstance(mark, float) else start_s + first.elapsed_time(mark) * scale

        for stage, path in self.stages.items():
            if path == BEFORE_CALLS and self._calls:
                yield _Call(stage, -1, 0, None), start_s, host_s(self._calls[0].start)
        for call in self._calls:
            yield call, host_s(call.start), host_s(call.end)

    def _append(self, window: int, calls: Iterable[tuple[_Call, float, float]]) -> None:
        for call, start_s, end_s in calls:
            self.spans.window.append(window)
            self.spans.stage.append(call.stage)
            self.spans.step.append(call.step)
            self.spans.call.append(call.call)
            self.spans.start_s.append(start_s)
            self.spans.end_s.append(end_s)


def _each(paths: str | Sequence[str]) -> Sequence[str]:
    return [paths] if isinstance(paths, str) else paths


def _is_on_host(result: Any) -> bool:
    """Whether a call's result is host data (arrays, images) instead of tensors on a device."""
    if isinstance(result, torch.Tensor):
        return result.device.type == "cpu"
    if isinstance(result, (tuple, list)):
        return all(_is_on_host(item) for item in result)
    if isinstance(result, dict):
        return all(_is_on_host(item) for item in result.values())
    return True


def shifted(spans: Spans, origin_s: float) -> Spans:
    """The same spans in seconds after ``origin_s``."""
    return spans.model_copy(
        update={
            "start_s": [t - origin_s for t in spans.start_s],
            "end_s": [t - origin_s for t in spans.end_s],
        }
    )
