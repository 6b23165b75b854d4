"""Tiled decoding: tiles are decoded one after the other, and their work is counted as it is done."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from generations import in_force, target, work_of
from t2v_energy.errors import UserError
from t2v_energy.interventions.base import Target, Work
from t2v_energy.interventions.vae_tiling import Tiles, VaeTiling, tiles
from t2v_energy.prediction.features import Point, features

torch = pytest.importorskip("torch")

SIZES = {
    "tiny-wan": (64, 272, 9),
    "tiny-cogvideox": (64, 80, 9),
    "tiny-mochi": (32, 304, 13),
    "tiny-ltx": (1024, 64, 9),
}
"""A size of each, just beyond one tile."""


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


def wide(width: int = 272) -> Target:
    return target(height=32, width=width, num_frames=1)


def decode(width: int = 34) -> Any:
    latents = torch.linspace(-1, 1, 16 * 4 * width).reshape(1, 16, 1, 4, width)
    with torch.no_grad():
        return tiny.pipeline().vae.decode(latents, return_dict=False)[0]


def test_tiles_are_decoded_one_after_the_other() -> None:
    with tiles_counted() as counts:
        whole = decode()
        assert counts == []
        with in_force(wide(), VaeTiling()) as found:
            assert found.evidence() == {"vae-tiling": {"tiled_decodes": 0.0}}
            tiled = decode()
            assert found.evidence() == {"vae-tiling": {"tiled_decodes": 1.0}}
        # 272 pixels wide, tiles of 256 every 192: two
        assert counts == [2]
        counts.clear()
        again = decode()
        assert counts == []
    assert tiled.shape == whole.shape
    assert torch.equal(again, whole)
    # blended borders, and an attention that sees its tile alone: nearly the same, and not lossless
    assert not torch.equal(tiled, whole)
    assert torch.norm(tiled - whole) < 0.05 * torch.norm(whole)
    assert not VaeTiling.lossless


def test_what_fits_into_one_tile_is_decoded_whole_and_no_evidence() -> None:
    with tiles_counted() as counts, in_force(wide(), VaeTiling()) as found:
        decode(width=32)
        with pytest.raises(UserError, match="vae-tiling changed nothing"):
            found.check()
    assert counts == []


def test_a_size_that_fits_into_one_tile_is_refused() -> None:
    subject = wide(width=256)
    with pytest.raises(UserError, match="32×256 fits into one tile"):
        VaeTiling().check(subject.model, subject.configuration)
    VaeTiling().check(wide().model, wide().configuration)


def test_it_is_off_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), in_force(wide(), VaeTiling()):
        raise ZeroDivisionError
    assert not tiny.pipeline().vae.use_tiling
    assert "tiled_decode" not in vars(tiny.pipeline().vae)


def test_one_that_tiles_already() -> None:
    with in_force(wide(), VaeTiling()), pytest.raises(UserError, match="tiles already") as caught:
        VaeTiling().apply(wide())
    assert caught.value.remedy == "list it once"
    assert not tiny.pipeline().vae.use_tiling


def test_a_vae_without_tiling() -> None:
    class Plain:
        """Has the base class's method, which raises, as all of diffusers' VAEs have."""

        def enable_tiling(self) -> None:
            raise NotImplementedError

    subject = wide()._replace(pipeline=SimpleNamespace(vae=Plain()))
    with pytest.raises(UserError, match="vae-tiling: Plain cannot tile") as caught:
        VaeTiling().apply(subject)
    assert caught.value.where == "interventions"


def test_a_vae_whose_tiles_are_not_counted() -> None:
    subject = target("tiny-animatediff")
    with pytest.raises(UserError, match="the tiles of AutoencoderKL are not counted"):
        VaeTiling().check(subject.model, subject.configuration)


@pytest.mark.parametrize("key", SIZES)
def test_the_tiles_are_those_of_the_class(key: str) -> None:
    vae, found = tiny.pipeline(key).vae, tiles(tiny.model(key))
    if key == "tiny-cogvideox":
        sides = (vae.tile_latent_min_height, vae.tile_latent_min_width)
        strides = (
            int(sides[0] * (1 - vae.tile_overlap_factor_height)),
            int(sides[1] * (1 - vae.tile_overlap_factor_width)),
        )
    else:
        factor = vae.spatial_compression_ratio
        sides = (vae.tile_sample_min_height // factor, vae.tile_sample_min_width // factor)
        strides = (vae.tile_sample_stride_height // factor, vae.tile_sample_stride_width // factor)
    assert found == Tiles(*sides, *strides)


@pytest.mark.parametrize("key", SIZES)
def test_the_counted_work_is_the_executed_one(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLOP of whole and of tiled decoding, by torch's counter, on shapes alone."""
    from t2v_energy.work import trace

    model, size, build = tiny.model(key), SIZES[key], trace.build_on_meta
    whole = trace.trace_vae_decode(model, *size).total_flop

    def tiling(component: Any) -> Any:
        module: Any = build(component)
        module.enable_tiling()
        return module

    monkeypatch.setattr(trace, "build_on_meta", tiling)
    tiled = trace.trace_vae_decode(model, *size).total_flop
    configuration = tiny.defaults(key, height=size[0], width=size[1], num_frames=size[2])
    work = Work(model, configuration, features(tiny.ROOT, [Point(key, *size, 1)]))
    assert tiled > whole
    assert VaeTiling().work_ratios(work)["vae"] == pytest.approx(tiled / whole, rel=1e-6)


@pytest.mark.parametrize(
    ("size", "printed"),
    [
        (("cogvideox-2b", 480, 720, 49), 4.410e14 / 3.150e14),
        (("mochi-1-preview", 480, 848, 84), 8.91e14 / 5.40e14),
    ],
)
def test_default_sizes(size: tuple[str, int, int, int], printed: float) -> None:
    """Totals of an earlier count with torch's counter, of the published models."""
    assert VaeTiling().work_ratios(work_of(*size))["vae"] == pytest.approx(printed, rel=0.01)


def test_a_latent_within_one_tile_costs_what_it_did() -> None:
    assert VaeTiling().work_ratios(work_of("wan2.1-t2v-1.3b", 256, 256, 5)) == {}
