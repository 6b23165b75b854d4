"""Interventions are applied for one measurement and undone, and what they do is seen."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny
from t2v_energy import interventions
from t2v_energy.errors import UserError
from t2v_energy.interventions import applied, check_known, vae_tiling

NEVER = SimpleNamespace()  # a pipeline that nothing may touch


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two interventions, ``one`` and ``two``, that write down when they are applied and undone."""
    written: list[str] = []

    def module(name: str) -> ModuleType:
        made = ModuleType(f"intervention_{name}")

        def apply(pipeline: Any) -> Callable[[], None]:
            if pipeline == "unfit":
                raise UserError(f"{name} does not fit")
            written.append(f"{name} on {pipeline}")
            return lambda: written.append(f"{name} off")

        made.apply = apply  # type: ignore[attr-defined]
        return made

    names = {name: f"intervention_{name}" for name in ("one", "two")}
    for name, path in names.items():
        monkeypatch.setitem(sys.modules, path, module(name))
    monkeypatch.setattr(interventions, "MODULES", names)
    return written


class TestApplied:
    def test_in_order_and_undone_in_the_reverse_one(self, log: list[str]) -> None:
        with applied(("two", "one"), "pipeline"):
            assert log == ["two on pipeline", "one on pipeline"]
        assert log[2:] == ["one off", "two off"]

    def test_undone_after_an_error(self, log: list[str]) -> None:
        with pytest.raises(ZeroDivisionError), applied(("one", "two"), "pipeline"):
            raise ZeroDivisionError
        assert log[2:] == ["two off", "one off"]

    def test_what_was_applied_before_one_that_does_not_fit_is_undone(
        self, log: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unfit(pipeline: Any) -> Callable[[], None]:
            raise UserError("two does not fit")

        monkeypatch.setattr(sys.modules["intervention_two"], "apply", unfit)
        with pytest.raises(UserError, match="two does not fit"), applied(("one", "two"), "pipeline"):
            raise AssertionError("the body must not run")
        assert log == ["one on pipeline", "one off"]

    def test_none_changes_nothing(self, log: list[str]) -> None:
        with applied((), NEVER):
            pass
        assert log == []

    def test_an_unknown_one_before_anything_is_applied(self, log: list[str]) -> None:
        with pytest.raises(UserError, match="there is no 'three'"), applied(("one", "three"), "pipeline"):
            raise AssertionError("the body must not run")
        assert log == []


class TestKnown:
    def test_every_module_is_there(self) -> None:
        import importlib

        for path in interventions.MODULES.values():
            assert callable(importlib.import_module(path).apply)

    def test_the_nearest_is_suggested(self) -> None:
        check_known(("vae-tiling",), "x")
        with pytest.raises(UserError, match="there is no 'vae_tiling'") as caught:
            check_known(("vae-tiling", "vae_tiling"), "the place")
        assert caught.value.where == "the place"
        assert caught.value.remedy.startswith("did you mean 'vae-tiling'?")

    def test_or_all_are_listed_where_none_is_near(self) -> None:
        with pytest.raises(UserError) as caught:
            check_known(("zzz",), "x")
        assert caught.value.remedy == "known: " + ", ".join(interventions.MODULES)


@contextmanager
def tiles_counted() -> Iterator[list[int]]:
    """How many latent tiles the decoder computes in each ``tiled_decode``."""
    vae_class = type(tiny.pipeline().vae)
    whole, counts = vae_class.tiled_decode, []
    decoder = type(tiny.pipeline().vae.decoder)
    forward = decoder.forward

    @functools.wraps(whole)
    def counted(vae: Any, z: Any, *arguments: Any, **options: Any) -> Any:
        counts.append(0)
        return whole(vae, z, *arguments, **options)

    @functools.wraps(forward)
    def counted_forward(self: Any, *arguments: Any, **options: Any) -> Any:
        if counts:
            counts[-1] += 1
        return forward(self, *arguments, **options)

    vae_class.tiled_decode, decoder.forward = counted, counted_forward
    try:
        yield counts
    finally:
        vae_class.tiled_decode, decoder.forward = whole, forward


class TestVaeTiling:
    def decode(self, width: int = 34) -> Any:
        torch = pytest.importorskip("torch")
        latents = torch.linspace(-1, 1, 16 * 4 * width).reshape(1, 16, 1, 4, width)
        with torch.no_grad():
            return tiny.pipeline().vae.decode(latents, return_dict=False)[0]

    def test_tiles_are_decoded_one_after_the_other(self) -> None:
        torch = pytest.importorskip("torch")
        with tiles_counted() as counts:
            whole = self.decode()
            assert counts == []
            with applied(("vae-tiling",), tiny.pipeline()):
                tiled = self.decode()
            # 272 pixels wide, tiles of 256 every 192: two
            assert counts == [2]
            counts.clear()
            again = self.decode()
            assert counts == []
        assert tiled.shape == whole.shape
        assert torch.equal(again, whole)
        # blended borders, and an attention that sees its tile alone: nearly the same, and not lossless
        assert not torch.equal(tiled, whole)
        assert torch.norm(tiled - whole) < 0.05 * torch.norm(whole)

    def test_what_fits_into_one_tile_is_decoded_whole(self) -> None:
        with tiles_counted() as counts, applied(("vae-tiling",), tiny.pipeline()):
            self.decode(width=32)
        assert counts == []

    def test_it_is_off_after_an_error(self) -> None:
        with pytest.raises(ZeroDivisionError), applied(("vae-tiling",), tiny.pipeline()):
            raise ZeroDivisionError
        assert not tiny.pipeline().vae.use_tiling

    def test_twice_is_refused_and_the_first_is_undone(self) -> None:
        with (
            pytest.raises(UserError, match="tiles already") as caught,
            applied(("vae-tiling", "vae-tiling"), tiny.pipeline()),
        ):
            raise AssertionError("the body must not run")
        assert caught.value.remedy == "list it once"
        assert not tiny.pipeline().vae.use_tiling

    def test_a_vae_without_tiling(self) -> None:
        class Plain:
            """Has the base class's method, which raises, as all of diffusers' VAEs have."""

            def enable_tiling(self) -> None:
                raise NotImplementedError

        with pytest.raises(UserError, match="vae-tiling: Plain cannot tile") as caught:
            vae_tiling.apply(SimpleNamespace(vae=Plain()))
        assert caught.value.where == "interventions"
