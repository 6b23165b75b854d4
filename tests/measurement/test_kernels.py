"""Attention kernels: only the one asked for may run, and the one that ran is seen."""

from __future__ import annotations

import pytest
from t2v_energy.errors import UserError

torch = pytest.importorskip("torch")
from t2v_energy.measurement.kernels import BACKENDS, KernelProbe, asked_for, available  # noqa: E402


def attend(mask: bool = False) -> torch.Tensor:
    q = torch.linspace(-1, 1, 2 * 64 * 32).reshape(1, 2, 64, 32)
    bias = torch.zeros(64, 64) if mask else None
    with torch.no_grad():
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=bias)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(("kernel", "ran"), [(None, "flash-cpu"), ("flash", "flash-cpu"), ("math", "math")])
def test_what_was_asked_for_runs_and_is_seen(kernel: str | None, ran: str, mask: bool) -> None:
    probe = KernelProbe()
    with asked_for(kernel), probe.during("denoiser"):
        result = attend(mask)
    assert probe.found == {"denoiser": [ran]}
    assert torch.allclose(result, attend(mask), atol=1e-6)


def test_a_kernel_that_cannot_run_here_is_not_replaced_in_silence() -> None:
    q = torch.zeros(1, 1, 8, 16)
    with asked_for("cudnn"), pytest.raises(RuntimeError):
        torch.nn.functional.scaled_dot_product_attention(q, q, q)


def test_sage_is_not_torchs() -> None:
    with pytest.raises(UserError, match="'sage' is not one of torch's") as caught:
        asked_for("sage")
    assert "cudnn, flash, efficient, math" in caught.value.remedy


def test_stages_are_kept_apart_and_each_kernel_once() -> None:
    probe = KernelProbe()
    with probe.during("denoiser"):
        attend()
        attend()
    attend()  # outside: not seen
    with probe.during("vae_decode"), asked_for("math"):
        attend()
    with probe.during("vae_decode"):
        attend()
    with probe.during("text_encoder"), torch.no_grad():
        torch.softmax(torch.zeros(4, 4), dim=-1)  # attention written out
    with probe.during("scheduler"):
        torch.zeros(2) + 1
    assert probe.found == {
        "denoiser": ["flash-cpu"],
        "vae_decode": ["flash-cpu", "math"],
        "text_encoder": ["math"],
    }


def test_available_tries_each() -> None:
    found = available()
    assert set(found) == set(BACKENDS)
    assert found["math"]
    if not torch.cuda.is_available():
        assert (found["flash"], found["cudnn"]) == (True, False)
