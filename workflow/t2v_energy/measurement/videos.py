"""Generated videos as files: H.264 in MP4, which every player shows."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_energy.errors import UserError

CRF = "18"
"""Constant quality of x264; from 18 on, the eye sees no loss."""


def check_available() -> None:
    """Raise :class:`UserError` unless the library that encodes is installed."""
    _library()


def write_video(path: Path, frames: NDArray[np.floating], fps: float) -> None:
    """Write ``frames``, numbers from 0 to 1 of shape (frames, height, width, 3), at ``fps`` frames a second.

    Height and width must be even, as every size is that a model makes. An older file is replaced.

    Raises:
        UserError: the library that encodes is not installed, or the file cannot be written.
    """
    av = _library()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with av.open(str(temporary), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt, stream.options = "yuv420p", {"crf": CRF}
            for frame in np.round(255 * np.clip(frames, 0, 1)).astype(np.uint8):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"the video cannot be written: {error}", where=str(path), remedy="free some disk space"
        ) from error


def _library() -> Any:
    try:
        import av
    except ImportError:
        raise UserError(
            "videos cannot be encoded: the package av is missing",
            where="--save-videos",
            remedy="install the extra: pip install -e '.[videos]'",
        ) from None
    return av
