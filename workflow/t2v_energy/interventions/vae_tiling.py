"""The VAE decodes overlapping tiles one after the other: less memory, and the overlaps' work twice.

With diffusers' own settings (tiles of 256 pixels every 192) the decoder computes up to (256/192)² = 1.78
times as much. It is not lossless: tiles are blended, and convolutions see their borders.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from t2v_energy.errors import UserError


def apply(pipeline: Any) -> Callable[[], None]:
    """Switch tiling on; returns what switches it off again.

    Raises:
        UserError: the pipeline's VAE has no tiling, or tiles already.
    """
    vae = pipeline.vae
    if not hasattr(vae, "use_tiling"):  # the method alone comes with a base class, and raises
        raise UserError(
            f"vae-tiling: {type(vae).__name__} cannot tile",
            where="interventions",
            remedy="leave it out for this model",
        )
    if vae.use_tiling:
        raise UserError(
            "vae-tiling: the VAE tiles already, so nothing would change",
            where="interventions",
            remedy="list it once",
        )
    vae.enable_tiling()
    undo: Callable[[], None] = vae.disable_tiling
    return undo
