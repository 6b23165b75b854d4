"""The VAE decodes overlapping tiles one after the other: less memory, and the overlaps' work twice.

With diffusers' own settings (tiles of 256 pixels every 192) the decoder computes up to (256/192)² = 1.78
times as much. It is not lossless: tiles are blended, and convolutions see their borders.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from t2v_energy.interventions.base import Change, Intervention, Target, Work, WorkClass


class VaeTiling(Intervention):
    """diffusers' own tiling, with its own sizes."""

    kind: ClassVar[str] = "vae-tiling"

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
        """The decoder's work grows by the tiles' overlaps: TODO."""
        return {}
