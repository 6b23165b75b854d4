"""How many frames a video really has, against tiny pipelines of diffusers."""

from __future__ import annotations

import pytest
import tiny
from t2v_energy.config import load_model
from t2v_energy.prediction.calibrated import presumed_calibration
from t2v_energy.prediction.features import Point, executed
from t2v_energy.prediction.report import as_text, report
from t2v_energy.work.architectures import made_frames


@pytest.mark.parametrize(
    ("key", "asked"),
    [
        *(("tiny-cogvideox", asked) for asked in (1, 5, 8, 9, 12, 13)),
        *(("tiny-mochi", asked) for asked in (5, 9, 13)),
        *(("tiny-wan", asked) for asked in (7, 8, 9)),
        *(("tiny-ltx", asked) for asked in (9, 13)),
        ("tiny-contentv", 8),
        ("tiny-animatediff", 7),
    ],
)
def test_as_many_as_the_pipeline_returns(key: str, asked: int) -> None:
    torch = pytest.importorskip("torch")
    from t2v_energy.measurement.protocols import Subject

    model = tiny.model(key)
    size = {"height": 64, "width": 64, "num_frames": asked, "num_inference_steps": 2}
    made = Subject(
        tiny.pipeline(key), model, tiny.defaults(key, **size), "a red fox", "cpu", keep_frames=True
    )
    with torch.no_grad():
        made.generate(2)
    assert made.frames is not None
    assert len(made.frames) == made_frames(model, asked)


@pytest.mark.parametrize(("key", "run"), [("contentv-8b", 81), ("wan2.1-t2v-1.3b", 85)])
def test_contentv_has_the_vae_of_wan_and_rounds_down(key: str, run: int) -> None:
    assert made_frames(load_model(tiny.ROOT, key), 84) == executed(load_model(tiny.ROOT, key), 84) == run


@pytest.mark.parametrize(("asked", "made"), [(45, 48), (47, 48), (48, 48), (49, 49), (50, 49)])
def test_cogvideox_makes_three_more_of_an_even_number_of_latent_frames(asked: int, made: int) -> None:
    assert made_frames(load_model(tiny.ROOT, "cogvideox-2b"), asked) == made


def test_a_prediction_says_how_many_are_made() -> None:
    calibration = presumed_calibration(tiny.ROOT, "h200")
    found = report(tiny.ROOT, calibration, Point("cogvideox-2b", 480, 720, 45, 50), "world")
    assert (found["num_frames"], found["video_frames"]) == (45, 48)
    assert "45 frames are rounded to 48, as the pipeline does" in "; ".join(found["notes"])
    assert "480×720, 48 frames" in as_text(found)
