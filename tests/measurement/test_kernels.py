"""Attention kernels: only the one asked for may run, in the module it is asked for, and what ran is seen."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
from t2v_energy.errors import UserError
from t2v_energy.interventions import InterventionError

torch = pytest.importorskip("torch")
from t2v_energy.measurement.kernels import (  # noqa: E402
    BACKENDS,
    OPERATORS,
    KernelProbe,
    asked_for,
    attention_replaced,
    available,
    sage_attention,
    sage_fits,
)


def attend(mask: bool = False) -> torch.Tensor:
    q = torch.linspace(-1, 1, 2 * 64 * 32).reshape(1, 2, 64, 32)
    bias = torch.zeros(64, 64) if mask else None
    with torch.no_grad():
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=bias)


class Attention(torch.nn.Module):
    """A module whose call attends once; it raises, where asked to, after that."""

    def forward(self, mask: bool = False, *, fails: bool = False) -> torch.Tensor:
        result = attend(mask)
        if fails:
            raise ZeroDivisionError
        return result


@pytest.fixture
def denoiser() -> Attention:
    return Attention()


def ran(call: Any) -> list[str]:
    """What runs in a call, seen by a probe."""
    probe = KernelProbe()
    with probe.during("it"):
        call()
    return probe.found["it"]


def hooks(module: torch.nn.Module) -> int:
    return sum(
        len(found)
        for found in (
            module._forward_pre_hooks,
            module._forward_hooks,
            module._forward_hooks_always_called,
        )
    )


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(("kernel", "found"), [(None, "flash-cpu"), ("flash", "flash-cpu"), ("math", "math")])
def test_what_was_asked_for_runs_and_is_seen(
    denoiser: Attention, kernel: str | None, found: str, mask: bool
) -> None:
    probe = KernelProbe()
    with asked_for(kernel, denoiser), probe.during("denoiser"):
        result = denoiser(mask)
    assert probe.found == {"denoiser": [found]}
    assert torch.allclose(result, attend(mask), atol=1e-6)


def test_a_kernel_that_cannot_run_here_is_not_replaced_in_silence(denoiser: Attention) -> None:
    with (
        pytest.raises(InterventionError, match="'cudnn' cannot run every attention of Attention") as caught,
        asked_for("cudnn", denoiser),
    ):
        denoiser()
    assert caught.value.where == "attention_kernel"
    assert "leave it out for this model" in caught.value.remedy
    assert hooks(denoiser) == 0


def test_other_errors_of_a_call_are_its_own(denoiser: Attention) -> None:
    denoiser.register_forward_pre_hook(lambda *_: torch.zeros(2, 3) @ torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught, asked_for("math", denoiser):
        denoiser()
    assert type(caught.value) is RuntimeError


def test_other_modules_keep_torchs_choice(denoiser: Attention) -> None:
    vae = Attention()
    with asked_for("math", denoiser):
        assert ran(vae) == ["flash-cpu"]
        assert ran(denoiser) == ["math"]
        # before the first call, between calls and after the last one, it makes no difference
        assert ran(vae) == ran(attend) == ["flash-cpu"]
        assert ran(denoiser) == ["math"]
    assert ran(denoiser) == ["flash-cpu"]


def test_nothing_is_left_on_the_module(denoiser: Attention) -> None:
    for _ in range(2):
        with asked_for("math", denoiser):
            denoiser()
            assert hooks(denoiser) > 0
        assert hooks(denoiser) == 0
    with asked_for(None, denoiser):
        assert hooks(denoiser) == 0


def test_nor_after_a_call_that_fails(denoiser: Attention) -> None:
    """Out of memory in the denoiser is a record: what is measured next must not be bound by it."""
    with pytest.raises(ZeroDivisionError), asked_for("math", denoiser):
        denoiser(fails=True)
    assert hooks(denoiser) == 0
    assert ran(attend) == ran(denoiser) == ["flash-cpu"]


def test_a_failed_call_binds_nothing_while_the_context_lasts(denoiser: Attention) -> None:
    with asked_for("math", denoiser):
        with pytest.raises(ZeroDivisionError):
            denoiser(fails=True)
        assert ran(attend) == ["flash-cpu"]
        assert ran(denoiser) == ["math"]


def test_nor_where_a_later_hook_refuses_the_call(denoiser: Attention) -> None:
    def refuse(*_: Any) -> None:
        raise ZeroDivisionError

    with asked_for("math", denoiser):
        refusal = denoiser.register_forward_pre_hook(refuse)
        with pytest.raises(ZeroDivisionError):
            denoiser()
        refusal.remove()
    assert hooks(denoiser) == 0
    assert ran(attend) == ran(denoiser) == ["flash-cpu"]


def test_an_unknown_kernel(denoiser: Attention) -> None:
    with (
        pytest.raises(UserError, match="there is no attention kernel 'sago'") as caught,
        asked_for("sago", denoiser),
    ):
        pass
    assert "cudnn, flash, efficient, math, sage" in caught.value.remedy
    assert hooks(denoiser) == 0


class OnGpu(Attention):
    """Says that its weights are on a GPU."""

    def parameters(self, recurse: bool = True) -> Any:
        return iter([SimpleNamespace(is_cuda=True)])


class TestSage:
    def test_it_is_refused_on_the_cpu(self, denoiser: Attention) -> None:
        with (
            pytest.raises(UserError, match="'sage' runs on a GPU alone") as caught,
            asked_for("sage", denoiser),
        ):
            pass
        assert caught.value.where == "attention_kernel"
        assert hooks(denoiser) == 0

    def test_and_where_it_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
        with (
            pytest.raises(UserError, match="SageAttention is not installed") as caught,
            asked_for("sage", OnGpu()),
        ):
            pass
        assert caught.value.remedy == "pip install 't2v-energy[interventions]'"

    def test_a_call_in_which_nothing_fits_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Heads of 32 in float32 do not: torch's kernel ran, and must not pass for Sage's."""
        monkeypatch.setattr(importlib.util, "find_spec", lambda *_: True)
        module = OnGpu()
        with (
            pytest.raises(UserError, match="no attention of OnGpu fits SageAttention"),
            asked_for("sage", module),
        ):
            assert torch.equal(module(), attend())
        assert hooks(module) == 0
        with asked_for("sage", module):
            pass  # never called: nothing to say

    def test_torchs_function_is_back_afterwards(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda *_: True)
        torchs, module = torch.nn.functional.scaled_dot_product_attention, OnGpu()
        with pytest.raises(ZeroDivisionError), asked_for("sage", module):
            module(fails=True)
        assert torch.nn.functional.scaled_dot_product_attention is torchs

    @pytest.mark.parametrize(
        ("shape", "dtype", "fits"),
        [
            ((1, 2, 64, 128), torch.bfloat16, True),
            ((1, 2, 64, 64), torch.float16, True),
            ((1, 2, 64, 128), torch.float32, False),
            ((1, 2, 64, 48), torch.bfloat16, False),
            ((2, 64, 128), torch.bfloat16, False),
        ],
    )
    def test_what_fits(self, shape: tuple[int, ...], dtype: torch.dtype, fits: bool) -> None:
        q = torch.zeros(shape, dtype=dtype)
        assert sage_fits(q, q, q) == fits
        assert not sage_fits(q, q, torch.zeros(shape, dtype=torch.int8))

    def test_the_operator_stays_whole_and_is_seen(self) -> None:
        """On shapes alone, for its kernels need a GPU: compiling leaves it a node of its own."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            q = torch.zeros(1, 2, 64, 128, dtype=torch.bfloat16).transpose(1, 2).contiguous().transpose(1, 2)
            found = sage_attention(q, q, q, 0.1)
        assert (found.shape, found.dtype, found.is_contiguous()) == (q.shape, q.dtype, True)
        assert OPERATORS[sage_attention._opoverload.overloadpacket.__name__] == "sage"

    def test_a_failure_says_that_it_is_sages(self) -> None:
        """Here its kernels cannot run, as they may not on a GPU with another Triton."""
        q = torch.zeros(1, 2, 64, 128, dtype=torch.bfloat16)
        with pytest.raises(UserError, match="SageAttention fails here: "):
            sage_attention(q, q, q, 0.1)


def test_a_replacement_lasts_as_long_as_its_context() -> None:
    torchs, q = torch.nn.functional.scaled_dot_product_attention, torch.ones(1, 1, 2, 2)
    with attention_replaced(lambda query, *_, **__: query):
        assert torch.nn.functional.scaled_dot_product_attention(q, q, q) is q
    assert torch.nn.functional.scaled_dot_product_attention is torchs


def test_stages_are_kept_apart_and_each_kernel_once(denoiser: Attention) -> None:
    probe = KernelProbe()
    with probe.during("denoiser"):
        attend()
        attend()
    attend()  # outside: not seen
    with probe.during("vae_decode"), asked_for("math", denoiser):
        denoiser()
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
