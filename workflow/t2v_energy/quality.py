"""Quality of saved videos, for those who have weights: temporal flickering by ourselves, the rest by VBench.

``t2v-energy measure --save-videos`` writes videos of published weights alone; of random ones there is nothing
to judge.  VBench (Huang et al. 2024; package vbench 0.1.5) asks for versions of numpy and transformers that
this package cannot have beside its own, so it runs in an environment of its own, in its mode for one's own
videos: that environment's Python runs :mod:`t2v_energy.quality_vbench`, and VBench downloads its models.
"""

from __future__ import annotations

import csv
import io
import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_energy import quality_vbench
from t2v_energy.errors import UserError

DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
"""VBench's dimensions of one's own videos that need no prompt."""
ENDINGS = (".mp4", ".gif")
INSTALL = "make an environment of its own: python3.10 -m venv vbench; vbench/bin/pip install vbench==0.1.5"


def quality_csv(folder: Path, python: Path | None = None, dimensions: Sequence[str] = DIMENSIONS) -> str:
    """One row a video below ``folder``: ``video``, ``temporal_flickering``, and VBench's ``dimensions``.

    Args:
        folder: with videos of published weights, such as results/videos/<campaign>/<experiment>.
        python: the interpreter of an environment that has VBench; None: temporal flickering alone.
        dimensions: of VBench; all are from 0 to 1, and more is better.

    Raises:
        UserError: there are no videos, a video cannot be read, the library that reads videos or VBench is
            missing, or VBench fails.
    """
    videos = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
    if not videos:
        raise UserError(
            "there are no videos here",
            where=str(folder),
            remedy="make them from published weights: t2v-energy measure --save-videos",
        )
    scores: dict[str, dict[Path, float]] = {
        "temporal_flickering": {path: temporal_flickering(_frames(path), str(path)) for path in videos}
    }
    if python is not None:
        scores |= vbench_scores(videos, python, dimensions)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["video", *scores])
    for path in videos:
        cells = (f"{of[path]:.7g}" if path in of else "" for of in scores.values())
        writer.writerow([str(path.relative_to(folder)), *cells])
    return stream.getvalue()


def temporal_flickering(frames: Iterable[NDArray[np.uint8]], where: str) -> float:
    """VBench's: (255 − mean |difference of adjacent frames|) / 255, frames of shape (height, width, 3).

    Raises:
        UserError: there are fewer than two frames.
    """
    differences = [
        float(np.mean(np.abs(second.astype(np.float32) - first))) for first, second in pairwise(frames)
    ]
    if not differences:
        raise UserError("fewer than two frames", where=where, remedy="a single picture does not flicker")
    return (255 - float(np.mean(differences))) / 255


def _frames(path: Path) -> Iterable[NDArray[np.uint8]]:
    try:
        import av
    except ImportError:
        raise UserError(
            "videos cannot be read: the package av is missing",
            where=str(path),
            remedy="install the extra: pip install -e '.[quality]'",
        ) from None
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
    except (av.error.FFmpegError, IndexError) as error:
        raise UserError(
            f"the video cannot be read: {error}", where=str(path), remedy="remove it, or make it again"
        ) from None


# --- VBench -------------------------------------------------------------------------------------------------


def vbench_scores(
    videos: Sequence[Path], python: Path, dimensions: Sequence[str]
) -> dict[str, dict[Path, float]]:
    """Scores of every video by dimension, from VBench in its own environment.

    Raises:
        UserError: an unknown dimension, no such interpreter, one without VBench, or VBench fails.
    """
    for name in dimensions:
        if name not in DIMENSIONS:
            raise UserError(
                f"VBench's {name!r} needs more than a video, or is not known",
                where="--dimensions",
                remedy=f"known: {', '.join(DIMENSIONS)}",
            )
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "videos"
        folder.mkdir()
        by_name = {f"{index:06}{path.suffix}": path for index, path in enumerate(videos)}
        for name, path in by_name.items():
            (folder / name).symlink_to(path.resolve())
        results = Path(scratch) / "results.json"
        _run([str(python), quality_vbench.__file__, str(folder), str(results), *dimensions], python)
        return read_scores(json.loads(results.read_text(encoding="utf-8")), by_name)


def _run(command: Sequence[str], python: Path) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(
            f"cannot be run: {error.strerror}", where=f"--vbench {python}", remedy=INSTALL
        ) from None
    if done.returncode == quality_vbench.MISSING:
        raise UserError("VBench is not installed there", where=f"--vbench {python}", remedy=INSTALL)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "without a word").splitlines()[-1]
        raise UserError(
            f"VBench failed: {last}",
            where=f"--vbench {python}",
            remedy="it downloads its models at the first use; without internet, put them where it looks",
        )


def read_scores(results: Mapping[str, Any], by_name: Mapping[str, Path]) -> dict[str, dict[Path, float]]:
    """VBench's results: of each dimension the mean and a list of ``video_path`` and ``video_results``."""
    return {
        dimension: {
            by_name[Path(entry["video_path"]).name]: float(entry["video_results"]) for entry in of_videos
        }
        for dimension, (_, of_videos) in results.items()
    }
