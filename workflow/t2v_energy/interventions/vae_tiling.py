"""The VAE decodes overlapping tiles one after the other: less memory, and the overlaps' work twice.

With diffusers' own settings (in Wan tiles of 256 pixels every 192) the decoder computes up to (256/192)² =
1.78 times as much. It is not lossless: tiles are blended, and convolutions see their borders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from t2v_energy.interventions.base import Change, Intervention, Target, Work, WorkClass

if TYPE_CHECKING:
    from t2v_energy.config import Configuration, ModelFile


class Tiles(NamedTuple):
    """Sides of a tile and how far apart tiles begin, in latent pixels."""

    rows: int
    columns: int
    row_stride: int
    column_stride: int

    def sizes(self, rows: int, columns: int) -> Iterator[tuple[int, int]]:
        """Rows and columns of every tile of a latent; those at the lower and right edges are smaller."""
        for top in range(0, rows, self.row_stride):
            for left in range(0, columns, self.column_stride):
                yield min(self.rows, rows - top), min(self.columns, columns - left)

    def hold(self, rows: int, columns: int) -> bool:
        """Whether the whole latent fits into one, so that it is decoded whole."""
        return rows <= self.rows and columns <= self.columns


def _squares(side: int, stride: int) -> Callable[[Mapping[str, Any], int], Tiles]:
    """Tiles of ``side`` pixels every ``stride``."""

    def of(_config: Mapping[str, Any], factor: int) -> Tiles:
        return Tiles(side // factor, side // factor, stride // factor, stride // factor)

    return of


def _halves(config: Mapping[str, Any], factor: int) -> Tiles:
    """CogVideoX: half of the size that the VAE was trained at, overlapping by a sixth and by a fifth."""
    rows = config.get("sample_height", 480) // 2 // factor
    columns = config.get("sample_width", 720) // 2 // factor
    return Tiles(rows, columns, int(rows * (1 - 1 / 6)), int(columns * (1 - 1 / 5)))


TILES: Mapping[str, Callable[[Mapping[str, Any], int], Tiles]] = {
    "AutoencoderKLWan": _squares(256, 192),
    "AutoencoderKLMochi": _squares(256, 192),
    "AutoencoderKLLTXVideo": _squares(512, 448),
    "AutoencoderKLCogVideoX": _halves,
}
"""Tiles that each class of diffusers sets by itself, from its configuration and its spatial factor."""


class VaeTiling(Intervention):
    """diffusers' own tiling, with its own sizes."""

    kind: ClassVar[str] = "vae-tiling"

    def check(self, model: ModelFile, configuration: Configuration) -> None:
        name = _class(model)
        if name not in TILES:
            raise self.refused(f"the tiles of {name} are not counted", f"use a VAE of {', '.join(TILES)}")
        _, rows, columns = _latent(model, configuration)
        if tiles(model).hold(rows, columns):
            c = configuration
            raise self.refused(
                f"a video of {c.height}×{c.width} fits into one tile, so nothing would change",
                "leave it out for this size",
            )

    def apply(self, target: Target) -> Change:
        """Switch tiling on.

        Raises:
            UserError: the pipeline's VAE has no tiling, or tiles already.
        """
        vae = target.pipeline.vae
        if not hasattr(vae, "use_tiling"):  # the method alone comes with a base class, and raises
            raise self.refused(f"{type(vae).__name__} cannot tile", "leave it out for this model")
        if vae.use_tiling:
            raise self.refused("the VAE tiles already, so nothing would change", "list it once")
        counted = {"tiled_decodes": 0.0}
        original = vae.tiled_decode

        def tiled_decode(*args: Any, **kwargs: Any) -> Any:
            counted["tiled_decodes"] += 1
            return original(*args, **kwargs)

        vae.tiled_decode = tiled_decode
        vae.enable_tiling()

        def undo() -> None:
            vae.disable_tiling()
            del vae.tiled_decode

        return Change(undo, lambda: counted)

    def work_ratios(self, work: Work) -> Mapping[WorkClass, float]:
        """FLOP of all tiles over those of the whole latent."""
        from t2v_energy.work.architectures import decoder

        model = work.model
        frames, rows, columns = _latent(model, work.configuration)
        cut = tiles(model)
        if cut.hold(rows, columns):
            return {}
        form, config = decoder(model), model.components["vae"].config
        tiled = sum(form.decode_flop(config, frames, *size) for size in cut.sizes(rows, columns))
        return {"vae": tiled / form.decode_flop(config, frames, rows, columns)}


def tiles(model: ModelFile) -> Tiles:
    """The tiles that the model's VAE decodes; its class must be among :data:`TILES`."""
    from t2v_energy.work.architectures import decoder

    config = model.components["vae"].config
    return TILES[_class(model)](config, decoder(model).spatial_factor(config))


def _class(model: ModelFile) -> str:
    return model.components["vae"].class_.rpartition(".")[2]


def _latent(model: ModelFile, configuration: Configuration) -> tuple[int, int, int]:
    """Frames, rows and columns of the latent that is decoded."""
    from t2v_energy.work.architectures import latents

    c = configuration
    return latents(model, c.height, c.width, c.num_frames)[1]
