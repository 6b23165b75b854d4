"""The two protocols: whole generations, as in the study, and sampled ones, which cost far less."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from t2v_energy.config import Configuration, ModelFile, ProtocolSettings
from t2v_energy.measurement.composition import (
    by_repetition,
    composed_latency_s,
    estimate,
    generations,
    step_sem_percent,
)
from t2v_energy.measurement.kernels import KernelProbe, asked_for
from t2v_energy.measurement.record import WindowKind, Windows
from t2v_energy.metering.spans import SpanRecorder

Progress = Callable[[str], None]
SMALLEST_SIDES = 4
"""Sides of the smallest generation, in the model's ``size_multiple``."""
FIRST_LIGHT_STEPS = 4
"""Denoising steps of a process's first generation: UniPC's corrector solves a linear system from its third
step on, and the first solution loads a library for tens of milliseconds (seen in the records of 2026-11)."""


@dataclass
class Subject:
    """A built pipeline with one configuration, ready to generate.

    ``frames`` are those of the last whole generation, if ``keep_frames``: numbers from 0 to 1 of shape
    (frames, height, width, 3).  ``latents`` and ``made`` are the decoder's input and the frames of the last
    generation, whole or cut, if ``keep_output``: references, which cost no time and no copy.
    """

    pipeline: Any
    model: ModelFile
    configuration: Configuration
    prompt: str
    device: str
    keep_frames: bool = False
    keep_output: bool = False
    frames: Any = None
    latents: Any = None
    made: Any = None

    @property
    def denoiser(self) -> torch.nn.Module:
        """The module whose calls the model file times as stage ``denoiser``."""
        part: torch.nn.Module = getattr(self.pipeline, self.model.denoiser_part)
        return part

    def generate(self, steps: int) -> None:
        """One generation of this configuration, cut after ``steps`` of its denoising steps.

        The schedule is that of all steps: a cut generation runs the first ones of the real schedule,
        then decodes. Every generation starts from the same seeded latents.
        """
        c = self.configuration

        def after_step(pipeline: Any, index: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
            if index + 1 >= steps:
                pipeline._interrupt = True  # diffusers skips the remaining steps and goes on to decode
            return {}

        arguments = dict(self.model.call)
        if "max_sequence_length" in inspect.signature(type(self.pipeline).__call__).parameters:
            # Of several tokenizers it is the long one's: CLIP's has a fixed length.
            arguments["max_sequence_length"] = self.model.longest_prompt
        with asked_for(c.attention_kernel, self.denoiser), self._latents_kept():
            result = self.pipeline(
                prompt=self.prompt,
                negative_prompt=self.model.negative_prompt,
                height=c.height,
                width=c.width,
                num_frames=c.num_frames,
                num_inference_steps=c.num_inference_steps,
                guidance_scale=c.guidance_scale,
                generator=torch.Generator(self.device).manual_seed(c.seed),
                output_type="np",
                callback_on_step_end=after_step if steps < c.num_inference_steps else None,
                **arguments,
            )
        if self.keep_frames and steps >= c.num_inference_steps:
            self.frames = result.frames[0]
        if self.keep_output:
            self.made = result.frames[0]

    @contextmanager
    def _latents_kept(self) -> Iterator[None]:
        """What the decoder gets is kept, if asked for; its ``decode`` is as it was afterwards."""
        if not self.keep_output:
            yield
            return
        vae = self.pipeline.vae
        had_own, decode = "decode" in vars(vae), vae.decode

        def keeping(latents: Any, *args: Any, **kwargs: Any) -> Any:
            self.latents = latents
            return decode(latents, *args, **kwargs)

        vae.decode = keeping
        try:
            yield
        finally:
            if had_own:
                vae.decode = decode
            else:
                del vae.decode

    def begin(self, calls: int) -> None:
        """The start of a generation, given up before its denoiser is called once more than ``calls`` times.

        Nothing is decoded. It warms the denoiser up where a single step takes minutes.
        """
        left = calls

        def count(*_: Any) -> None:
            nonlocal left
            if left == 0:
                raise _EnoughCalls
            left -= 1

        hook = self.denoiser.register_forward_pre_hook(count)
        try:
            self.generate(self.configuration.num_inference_steps)
        except _EnoughCalls:
            pass
        finally:
            hook.remove()


def smallest(model: ModelFile, configuration: Configuration) -> Configuration:
    """``configuration`` at a few latent pixels and frames and :data:`FIRST_LIGHT_STEPS` steps."""
    limits = model.limits
    side = SMALLEST_SIDES * limits.size_multiple
    frames = limits.frames_multiple + limits.frames_offset
    return configuration.model_copy(
        update={
            "height": side,
            "width": side,
            "num_frames": frames,
            "num_inference_steps": FIRST_LIGHT_STEPS,
        }
    )


class _EnoughCalls(Exception):
    """Ends a generation that only warms up."""


@dataclass
class Run:
    """Generations of one subject as they are timed."""

    subject: Subject
    recorder: SpanRecorder
    settings: ProtocolSettings
    say: Progress = lambda text: None
    windows: Windows = field(default_factory=Windows)
    kernels: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: WindowKind, steps: int, start_s: float, end_s: float, repetition: int = -1) -> None:
        """Append a window; only measured generations belong to a repetition."""
        self.windows.kind.append(kind)
        self.windows.steps.append(steps)
        self.windows.start_s.append(start_s)
        self.windows.end_s.append(end_s)
        self.windows.repetition.append(repetition)

    def warm_up(self, steps: int) -> None:
        """A generation of so many steps that is not counted."""
        seconds = self._timed("warmup", steps, lambda: self.subject.generate(steps))
        self.say(f"warmup of {steps} steps took {seconds:.1f} s")

    def warm_up_calls(self, calls: int) -> None:
        """A warm-up of so many denoiser calls; as it may end within a step, its window counts none."""
        seconds = self._timed("warmup", 0, lambda: self.subject.begin(calls))
        self.say(f"warmup of {calls} denoiser calls took {seconds:.1f} s")

    def repeat(self, steps: int, min_window_s: float | None = None) -> None:
        """One measured repetition: a generation of so many steps, or as many as fill ``min_window_s``.

        They follow each other at once: nothing is said in between, so that the GPU does not cool down.
        """
        repetition = max(self.windows.repetition, default=-1) + 1
        count, total_s = 0, 0.0
        while count == 0 or total_s < (min_window_s or 0):
            total_s += self._timed("generation", steps, lambda: self.subject.generate(steps), repetition)
            count += 1
        several = f"{count} generations" if count > 1 else "generation"
        self.say(f"{several} of {steps} steps took {total_s:.1f} s")

    def _timed(
        self, kind: WindowKind, steps: int, generate: Callable[[], None], repetition: int = -1
    ) -> float:
        """A window around ``generate``; returns its length (s)."""
        probe = KernelProbe() if kind == "warmup" and not self.kernels else None
        # Peaks are read in warm-ups; where those end before they decode, in the first generation as well.
        unread = "vae_decode" in self.subject.model.spans and "vae_decode" not in self.recorder.allocated_B
        with self.recorder.window(
            len(self.windows.kind), track_memory=kind == "warmup" or unread, probe=probe
        ) as edges:
            generate()
        self.add(kind, steps, edges["start_s"], edges["end_s"], repetition)
        if probe is not None:
            self.kernels = probe.found
        return edges["end_s"] - edges["start_s"]

    def last_call_s(self, stage: str) -> float:
        """Duration of the latest call of ``stage``."""
        spans = self.recorder.spans
        last = max(i for i, name in enumerate(spans.stage) if name == stage)
        return spans.end_s[last] - spans.start_s[last]


def run_full(run: Run) -> None:
    """The study's protocol (section 4.1): two whole warm-ups, then five measured repetitions.

    ``warmup_steps`` cuts the warm-ups: they compile and warm what a whole one does.  ``min_window_s`` makes
    a repetition of several generations; ``max_repetitions`` lets repetitions go on until their interval is
    as narrow as asked.
    """
    settings = run.settings.full
    steps = run.subject.configuration.num_inference_steps
    for _ in range(settings.warmups):
        run.warm_up(min(steps, settings.warmup_steps or steps))
    for count in range(1, (settings.max_repetitions or settings.repetitions) + 1):
        run.repeat(steps, settings.min_window_s)
        if count >= settings.repetitions and _repeats_narrowly(run, steps):
            return


def _repeats_narrowly(run: Run, steps: int) -> bool:
    measured = generations(run.windows, run.recorder.spans)
    latency = estimate(by_repetition(measured, composed_latency_s(measured, steps)))
    return latency.ci95 <= run.settings.full.max_ci95_percent / 100 * latency.mean


def run_sampled(run: Run) -> None:
    """Short generations until the composed latency's 95 % interval and the spread of step times are
    as narrow as the settings ask, or the most generations allowed have run."""
    settings = run.settings.sampled
    total_steps = run.subject.configuration.num_inference_steps
    if settings.warmup_calls:
        run.warm_up_calls(settings.warmup_calls)
    else:
        run.warm_up(min(settings.warmup_steps, total_steps))
    steps = _steps_to_sample(run, total_steps)
    for count in range(1, settings.max_generations + 1):
        run.repeat(steps)
        if count >= settings.generations and _is_narrow(run, total_steps):
            return


def _steps_to_sample(run: Run, total_steps: int) -> int:
    """Enough steps to fill the shortest window; the last warm-up call is warm and tells their time."""
    settings = run.settings.sampled
    step_s = run.last_call_s("denoiser") * run.subject.model.passes_per_step
    return min(total_steps, max(settings.min_steps, math.ceil(settings.min_window_s / step_s)))


def _is_narrow(run: Run, total_steps: int) -> bool:
    settings = run.settings.sampled
    measured = generations(run.windows, run.recorder.spans)
    latency = estimate(composed_latency_s(measured, total_steps))
    return (
        step_sem_percent(measured) <= settings.max_step_sem_percent
        and latency.ci95 <= settings.max_ci95_percent / 100 * latency.mean
    )


PROTOCOLS: dict[str, Callable[[Run], None]] = {"full": run_full, "sampled": run_sampled}
