"""Which of a profiler's events count: torch's own events, made by hand, since a CPU launches no kernels."""

from __future__ import annotations

import torch
from t2v_energy.measurement.profiling import _by_operator
from torch.autograd.profiler_util import FunctionEvent

STAGE = "stage: "
KERNEL_US = 1000.0


def event(number: int, name: str, parent: FunctionEvent | None = None, kernels: int = 0) -> FunctionEvent:
    """An event of the host under ``parent`` that was given so many kernels of :data:`KERNEL_US`."""
    made = FunctionEvent(
        number, name, 0, 10.0 * number, 10.0 * number + 5, use_device="cuda",
        device_type=torch.autograd.DeviceType.CPU,
    )  # fmt: skip
    for _ in range(kernels):
        made.append_kernel("a kernel", 0, KERNEL_US)
    if parent is not None:
        parent.append_cpu_child(made)
        made.set_cpu_parent(parent)
    return made


def test_kernels_count_once_where_the_tracers_notes_share_an_operators_number() -> None:
    stage = event(1, f"{STAGE}denoiser")
    linear = event(2, "aten::linear", stage)
    product = event(3, "aten::addmm", linear, kernels=1)
    events = [stage, linear, product]
    plain = _by_operator(events, STAGE, on_gpu=True)
    assert (plain.stage, plain.operator, plain.kernels) == (["denoiser"], ["aten::linear"], [1])
    for number, note in enumerate(("Command Buffer Full", "Activity Buffer Request", "cudaLaunchKernel"), 4):
        events.append(event(number, note, product, kernels=2))
    assert _by_operator(events, STAGE, on_gpu=True) == plain


def test_a_stage_is_no_operator_whatever_its_name() -> None:
    stage = event(1, f"{STAGE}a::b", kernels=1)
    assert _by_operator([stage], STAGE, on_gpu=True).operator == []
