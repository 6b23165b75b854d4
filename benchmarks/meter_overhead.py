"""Does the meter change what it measures?  Denoising steps with the meter off, slow and fast, in alternation.

Run by hand on a GPU host:  python benchmarks/meter_overhead.py --height 480 --width 832 --rounds 4
Prints the mean step time of each setting relative to the meter being off, with a 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from t2v_energy.config import Configuration, load_model
from t2v_energy.measurement.gpus import choose_gpu
from t2v_energy.measurement.protocols import Subject
from t2v_energy.measurement.record import Windows
from t2v_energy.metering.nvml import NvmlDevice
from t2v_energy.metering.sampler import Sampler
from t2v_energy.metering.spans import SpanRecorder
from t2v_energy.models.build import build_pipeline

SETTINGS = {"off": None, "poll 20 ms, 10 Hz": (0.02, 10.0), "poll 2 ms, 20 Hz": (0.002, 20.0)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="wan2.1-t2v-1.3b")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    with choose_gpu() as device:
        uuid = device.uuid
    model = load_model(Path.cwd(), options.model)
    configuration = Configuration(
        model=model.key, height=options.height, width=options.width, num_frames=81, num_inference_steps=50,
        guidance_scale=model.defaults.guidance_scale,
    )  # fmt: skip
    pipeline = build_pipeline(model, "random", "cuda", 1)
    stages = {k: v for k, v in model.spans.items() if k in ("denoiser", "scheduler")}
    subject = Subject(pipeline, model, configuration, "a red kite over a harbour", "cuda")
    found: dict[str, list[float]] = {name: [] for name in SETTINGS}
    with SpanRecorder(pipeline, stages, "cuda").attached() as recorder, torch.no_grad():
        subject.generate(2)
        for round_ in range(options.rounds):
            for name in np.random.default_rng(round_).permutation(list(SETTINGS)):
                setting = SETTINGS[str(name)]
                meter = Sampler(partial(NvmlDevice.open, uuid), *setting) if setting else nullcontext()
                with meter:
                    found[str(name)].append(step_s(subject, recorder, options.steps))
    print(json.dumps(found))
    off = np.array(found["off"])
    for name, values in found.items():
        percent = (np.array(values) / off - 1) * 100
        half = stats.t.ppf(0.975, len(percent) - 1) * percent.std(ddof=1) / len(percent) ** 0.5
        print(
            f"{name:<20} {np.mean(values):8.4f} s a step  {percent.mean():+6.2f} ± {half:.2f} % against off"
        )
    return 0


def step_s(subject: Subject, recorder: SpanRecorder, steps: int) -> float:
    """Mean step time of one generation."""
    first = len(recorder.spans.start_s)
    with recorder.window(len(Windows().kind)):
        subject.generate(steps)
    return (recorder.spans.end_s[-1] - recorder.spans.start_s[first]) / steps


if __name__ == "__main__":
    sys.exit(main())
