"""Quality of saved videos: flickering against its definition, and VBench as far as it goes without models."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from t2v_energy import cli
from t2v_energy.errors import UserError
from t2v_energy.measurement.videos import write_video
from t2v_energy.quality import DIMENSIONS, quality_csv, read_scores, temporal_flickering, vbench_scores


def video(path: Path, step: float, frames: int = 5) -> Path:
    """A grey video whose frames get lighter by ``step`` of the whole range each."""
    values = 0.2 + step * np.arange(frames)
    write_video(path, np.broadcast_to(values[:, None, None, None], (frames, 32, 48, 3)), fps=8)
    return path


def test_flickering_is_the_mean_difference_of_adjacent_frames() -> None:
    random = np.random.default_rng(1)
    frames = random.integers(0, 256, (4, 6, 8, 3), dtype=np.uint8)
    mean = np.mean([np.abs(frames[i + 1].astype(float) - frames[i]).mean() for i in range(3)])
    assert temporal_flickering(frames, "x") == pytest.approx((255 - mean) / 255)
    assert temporal_flickering(np.stack([frames[0]] * 3), "x") == 1
    with pytest.raises(UserError, match="fewer than two frames"):
        temporal_flickering(frames[:1], "x")


def test_every_video_has_a_row(tmp_path: Path) -> None:
    video(tmp_path / "videos" / "a" / "calm.mp4", 0.0)
    video(tmp_path / "videos" / "wild.mp4", 0.1)
    rows = list(csv.DictReader(quality_csv(tmp_path / "videos").splitlines()))
    assert [row["video"] for row in rows] == ["a/calm.mp4", "wild.mp4"]
    assert float(rows[0]["temporal_flickering"]) == pytest.approx(1, abs=0.002)
    assert float(rows[1]["temporal_flickering"]) == pytest.approx(0.9, abs=0.01)


def test_what_is_no_video_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are no videos here"):
        quality_csv(tmp_path)
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read") as error:
        quality_csv(tmp_path)
    assert "broken.mp4" in error.value.where


class TestVBench:
    def test_an_environment_without_it_is_refused(self, tmp_path: Path) -> None:
        path = video(tmp_path / "a.mp4", 0.1)
        with pytest.raises(UserError, match="VBench is not installed there") as error:
            vbench_scores([path], Path(sys.executable), DIMENSIONS)
        assert "pip install vbench" in (error.value.remedy or "")
        with pytest.raises(UserError, match="cannot be run"):
            vbench_scores([path], tmp_path / "python", DIMENSIONS)

    def test_dimensions_that_need_a_prompt_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="'object_class' needs more than a video"):
            vbench_scores([], Path(sys.executable), ["object_class"])

    def test_its_results_are_read_by_video(self) -> None:
        """The form of vbench 0.1.5's <name>_eval_results.json: mean, then one entry a video."""
        text = (
            '{"motion_smoothness": [0.9, [{"video_path": "/x/000001.mp4", "video_results": 0.8}, '
            '{"video_path": "/x/000000.mp4", "video_results": 1.0}]], '
            '"dynamic_degree": [1.0, [{"video_path": "/x/000000.mp4", "video_results": true}]]}'
        )
        first, second = Path("a.mp4"), Path("b.mp4")
        found = read_scores(json.loads(text), {"000000.mp4": first, "000001.mp4": second})
        assert found == {"motion_smoothness": {first: 1.0, second: 0.8}, "dynamic_degree": {first: 1.0}}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video(tmp_path / "videos" / "a.mp4", 0.1)
    out = tmp_path / "tables" / "quality.csv"
    assert cli.main(["quality", str(tmp_path / "videos"), "--out", str(out)]) == 0
    assert out.read_text().startswith("video,temporal_flickering\na.mp4,0.9")
    assert cli.main(["quality", str(tmp_path / "videos"), "--out", str(out), "--vbench", sys.executable]) == 2
    assert "VBench is not installed there" in capsys.readouterr().err
