"""Which operators a generation's time on the device goes to: one more generation, after those that count.

A profiler slows the host down, so nothing of it is a time of the protocol; what it tells is how the device's
time divides among operators, by stage.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from t2v_energy.measurement.record import Operators
from t2v_energy.metering.spans import SpanRecorder

STEPS = 1
"""Denoising steps of the profiled generation: steps do not differ in what they run."""
OPERATOR = "::"
"""In the name of each of torch's operators, and of nothing else.

torch gives a kernel to every event of the host that carries the number of the operator that launched it.
Notes of the tracer itself ("Command Buffer Full", "Activity Buffer Request") and CUDA's own calls are
numbered apart, so some share a number with an operator and would count its kernels again, under another."""
OUTSIDE = ""
"""Stage of what no stage's call launched."""


def profile_generation(generate: Any, recorder: SpanRecorder) -> Operators:
    """Profile one generation of :data:`STEPS` steps.

    Args:
        generate: runs a generation of so many steps.
        recorder: attached to the pipeline; it marks which stage a call belongs to.

    An operator is the outermost of torch's operators under its stage's call, such as ``aten::linear``, with
    the time (s) of all kernels that it launched on the device and their number.  Without a GPU the time is
    the processor's own and the number that of the operators below it, itself included.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if recorder.on_gpu else [])]
    with recorder.annotated() as prefix, profile(activities=activities, acc_events=True) as found:
        generate(STEPS)
        if recorder.on_gpu:
            torch.cuda.synchronize()
    return _by_operator(found.events(), prefix, recorder.on_gpu)


def _by_operator(events: Any, prefix: str, on_gpu: bool) -> Operators:
    seconds: Counter[tuple[str, str]] = Counter()
    kernels: Counter[tuple[str, str]] = Counter()
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU or not _is_operator(event.name, prefix):
            continue
        own_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        count = len(event.kernels) if on_gpu else 1
        if own_us > 0:
            key = _whose(event, prefix)
            seconds[key] += own_us / 1e6
            kernels[key] += count
    keys = sorted(seconds, key=lambda key: (key[0], -seconds[key], key[1]))
    return Operators(
        steps=STEPS,
        stage=[stage for stage, _ in keys],
        operator=[operator for _, operator in keys],
        device_s=[seconds[key] for key in keys],
        kernels=[kernels[key] for key in keys],
    )


def _is_operator(name: str, prefix: str) -> bool:
    return OPERATOR in name and not name.startswith(prefix)


def _whose(event: Any, prefix: str) -> tuple[str, str]:
    """Stage and outermost operator that ``event`` ran under."""
    outermost, current = event.name, event
    while current is not None and not current.name.startswith(prefix):
        if current.name.startswith("aten::"):
            outermost = current.name
        current = current.cpu_parent
    return (OUTSIDE if current is None else current.name.removeprefix(prefix)), outermost
