"""Videos as files: what is written, when, and what is said where there is none."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from t2v_energy.errors import UserError
from t2v_energy.measurement.progress import Progress
from t2v_energy.measurement.runner import measure_batch
from t2v_energy.measurement.videos import check_available, write_video
from t2v_energy.plan import make_plan

torch = pytest.importorskip("torch")
VARY = [
    {"height": 32, "width": 48, "protocol": "full", "protocols": {"full": {"warmups": 1, "repetitions": 1}}},
    {"height": 32, "width": 32, "num_inference_steps": 6, "protocols": {"sampled": {"min_window_s": 1e-6}}},
]


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path) -> Iterator[None]:
    with tiny.own_devices_and_locks(tmp_path):
        yield


def moving(frames: int = 9, height: int = 32, width: int = 48) -> np.ndarray:
    """A bright square on dark ground that moves to the right, and beyond both ends of the scale."""
    video = np.full((frames, height, width, 3), -0.2, dtype=np.float32)
    for index, frame in enumerate(video):
        frame[8:24, 4 * index : 4 * index + 12] = 1.2
    return video


def measure(root: Path, log: io.StringIO) -> Any:
    settings = tiny.settings(root)
    (batch,) = make_plan(root, settings).batches
    prompts, progress = tiny.prompts_path(root), Progress(log)
    names = (batch.experiment, batch.name)
    return measure_batch(root, settings, *names, prompts=prompts, progress=progress, save_videos=True)


class TestAFile:
    def test_it_is_h264_of_the_size_and_the_rate_and_shows_what_was_given(self, tmp_path: Path) -> None:
        av = pytest.importorskip("av")
        path, frames = tmp_path / "new" / "video.mp4", moving()
        write_video(path, frames, 15)
        with av.open(str(path)) as container:
            (stream,) = container.streams.video
            decoded = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
            assert stream.codec_context.name == "h264"
            assert (stream.average_rate, stream.codec_context.pix_fmt) == (15, "yuv420p")
        assert decoded.shape == frames.shape
        difference = np.abs(decoded / 255 - frames.clip(0, 1))
        assert difference.mean() < 0.03
        assert [p.name for p in path.parent.iterdir()] == ["video.mp4"]

    def test_an_older_one_is_replaced(self, tmp_path: Path) -> None:
        pytest.importorskip("av")
        path = tmp_path / "video.mp4"
        write_video(path, moving(), 8)
        before = path.read_bytes()
        write_video(path, moving(5), 8)
        assert path.read_bytes() != before

    def test_without_the_library(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "av", None)
        for call in (check_available, lambda: write_video(tmp_path / "video.mp4", moving(), 8)):
            with pytest.raises(UserError, match="the package av is missing") as caught:
                call()
            assert "[videos]" in caught.value.remedy
        assert list(tmp_path.iterdir()) == []


class TestMeasuring:
    def test_the_last_whole_video_of_each_configuration(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        av = pytest.importorskip("av")
        pipeline = tiny.pipeline()
        monkeypatch.setattr("t2v_energy.models.build.build_pipeline", lambda *_: pipeline)
        root = tiny.make_root(tmp_path / "root", weights="pretrained", experiments=tiny.resolution(vary=VARY))
        log = io.StringIO()
        assert measure(root, log) is not None
        folder = root / "results" / "videos" / "tiny" / "resolution"
        (path,) = folder.iterdir()
        assert path.name == "tiny-wan_32x48_5f_2s__full_r1.mp4"
        with av.open(str(path)) as container:
            decoded = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        assert np.stack(decoded).shape == (5, 32, 48, 3)
        assert f"video: {path.relative_to(root)}" in log.getvalue()
        cut = "tiny-wan_32x32_5f_6s__sampled_r1.json"
        assert f"no whole video of {cut} was generated, so none is saved" in log.getvalue()

    def test_random_weights_are_refused_before_anything_is_measured(self, tmp_path: Path) -> None:
        root = tiny.make_root(tmp_path / "root")
        with pytest.raises(UserError, match="random weights generate noise") as caught:
            measure(root, io.StringIO())
        assert caught.value.where == "config/campaigns/tiny.yaml, weights"
        assert not (root / "results" / "raw").exists()
