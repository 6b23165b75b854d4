"""The two protocols on the real tiny pipeline: what runs, how often, and when sampling stops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import tiny
from t2v_energy.config import FullProtocol, ProtocolSettings, SampledProtocol, check_runnable, load_model
from t2v_energy.errors import UserError
from t2v_energy.measurement.composition import composed_latency_s, estimate, generations

torch = pytest.importorskip("torch")
from t2v_energy.measurement.kernels import KernelProbe  # noqa: E402
from t2v_energy.measurement.protocols import (  # noqa: E402
    PROTOCOLS,
    Run,
    Subject,
    run_full,
    run_sampled,
    smallest,
)
from t2v_energy.metering.spans import SpanRecorder  # noqa: E402

EASY = {"min_steps": 2, "min_window_s": 1e-3, "max_step_sem_percent": 1e6, "max_ci95_percent": 1e6}
NEVER = {**EASY, "max_step_sem_percent": 1e-9}


def subject(**changes: Any) -> Subject:
    return Subject(tiny.pipeline(), tiny.model(), tiny.configuration(**changes), tiny.PROMPT.text, "cpu")


@contextmanager
def prepared(
    sampled: dict[str, Any] | None = None, full: dict[str, Any] | None = None, **changes: Any
) -> Iterator[Run]:
    settings = ProtocolSettings(full=FullProtocol(**full or {}), sampled=SampledProtocol(**sampled or EASY))
    one = subject(**changes)
    recorder = SpanRecorder(one.pipeline, one.model.spans, "cpu")
    with recorder.attached(), torch.no_grad():
        yield Run(one, recorder, settings)


@contextmanager
def watched() -> Iterator[dict[str, list[Any]]]:
    """The timesteps that the denoiser sees, the tensors that it gets first, and the latents decoded."""
    pipeline = tiny.pipeline()
    seen: dict[str, list[Any]] = {"timesteps": [], "noise": [], "decoded": []}
    forward, decode = pipeline.transformer.forward, pipeline.vae.decode

    def watched_forward(*arguments: Any, **options: Any) -> Any:
        seen["timesteps"].append(float(options["timestep"][0]))
        seen["noise"].append(options["hidden_states"].clone())
        return forward(*arguments, **options)

    def watched_decode(z: Any, **options: Any) -> Any:
        seen["decoded"].append(z.clone())
        return decode(z, **options)

    watched_forward.__wrapped__ = forward  # type: ignore[attr-defined]
    pipeline.transformer.forward, pipeline.vae.decode = watched_forward, watched_decode
    try:
        with torch.no_grad():
            yield seen
    finally:
        del pipeline.transformer.forward, pipeline.vae.decode


def chosen_by_torch() -> dict[str, list[str]]:
    """What runs by stage where no kernel is asked for."""
    with prepared(full={"warmups": 1, "repetitions": 1}, num_inference_steps=1) as run:
        run_full(run)
    return run.kernels


def hooks() -> int:
    """Hooks on the denoiser."""
    denoiser = tiny.pipeline().transformer
    return len(denoiser._forward_pre_hooks) + len(denoiser._forward_hooks)


class TestGenerate:
    def test_a_cut_generation_runs_the_first_steps_of_the_whole_schedule(self) -> None:
        with watched() as seen:
            subject(num_inference_steps=6).generate(2)
        # two passes a step: with and without the prompt
        schedule = [float(t) for t in tiny.pipeline().scheduler.timesteps]
        assert len(schedule) == 6
        assert seen["timesteps"] == [t for t in schedule[:2] for _ in range(2)]
        assert len(seen["decoded"]) == 1

    def test_a_whole_generation_runs_all_of_it(self) -> None:
        with watched() as seen:
            subject(num_inference_steps=3).generate(3)
        schedule = [float(t) for t in tiny.pipeline().scheduler.timesteps]
        assert seen["timesteps"] == [t for t in schedule for _ in range(2)]
        assert schedule == sorted(schedule, reverse=True)

    def test_a_cut_one_does_not_shorten_the_next(self) -> None:
        with watched() as seen:
            subject(num_inference_steps=3).generate(1)
            subject(num_inference_steps=3).generate(3)
        assert len(seen["timesteps"]) == 2 * (1 + 3)

    def test_the_same_seed_starts_from_the_same_latents_and_ends_in_the_same(self) -> None:
        with watched() as seen:
            subject().generate(2)
            subject().generate(2)
            subject(seed=1).generate(2)
        first, same, other = (seen["noise"][i] for i in (0, 4, 8))
        assert torch.equal(first, same)
        assert not torch.equal(first, other)
        assert first.std() == pytest.approx(1, abs=0.2)
        assert torch.equal(seen["decoded"][0], seen["decoded"][1])
        assert not torch.equal(seen["decoded"][0], seen["decoded"][2])

    def test_guidance_makes_two_different_passes(self) -> None:
        with watched() as seen:
            subject(num_inference_steps=1).generate(1)
            subject(num_inference_steps=1, guidance_scale=1.0).generate(1)
        assert len(seen["timesteps"]) == 2 + 1

    def test_a_kernel_that_torch_does_not_ship(self) -> None:
        with pytest.raises(UserError, match="'sage'"):
            subject(attention_kernel="sage").generate(1)


class TestKernelAskedFor:
    def test_it_binds_the_denoiser_alone(self) -> None:
        """Head width and number type of the VAE's attention fit few kernels: it keeps torch's choice."""
        with prepared(num_inference_steps=2, attention_kernel="math") as run:
            run_sampled(run)
        assert run.kernels["denoiser"] == ["math"]
        assert run.kernels["vae_decode"] == chosen_by_torch()["vae_decode"] == ["flash-cpu"]
        assert run.kernels["text_encoder"] == chosen_by_torch()["text_encoder"]

    def test_it_is_bound_in_every_step_and_every_generation(self) -> None:
        probe = KernelProbe()
        denoiser = tiny.pipeline().transformer
        inner, attended = denoiser.forward, []

        def probed(*arguments: Any, **options: Any) -> Any:
            probe._found.clear()
            with probe.during("call"):
                result = inner(*arguments, **options)
            attended.append(probe.found["call"])
            return result

        probed.__wrapped__ = inner  # type: ignore[attr-defined]
        denoiser.forward = probed
        try:
            with torch.no_grad():
                for _ in range(2):
                    subject(num_inference_steps=3, attention_kernel="math").generate(2)
                subject(num_inference_steps=3).generate(1)
        finally:
            del denoiser.forward
        assert attended == [["math"]] * 8 + [["flash-cpu"]] * 2

    def test_no_hook_is_left(self) -> None:
        with prepared(attention_kernel="math") as run:
            run_sampled(run)
        assert hooks() == 0

    def test_nor_after_a_generation_that_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_room(*_: Any, **__: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        with monkeypatch.context() as patched:
            patched.setattr(type(tiny.pipeline().vae), "decode", no_room)
            with pytest.raises(torch.OutOfMemoryError), torch.no_grad():
                subject(attention_kernel="math").generate(1)
        assert hooks() == 0
        assert chosen_by_torch()["denoiser"] == ["flash-cpu"]


class TestBegin:
    """A warm-up that ends after some denoiser calls."""

    @pytest.mark.parametrize("calls", [1, 2, 3, 5])
    def test_the_denoiser_runs_exactly_so_often_and_nothing_is_decoded(self, calls: int) -> None:
        with watched() as seen:
            subject(num_inference_steps=6).begin(calls)
        schedule = [float(t) for t in tiny.pipeline().scheduler.timesteps]
        assert seen["timesteps"] == [t for t in schedule for _ in range(2)][:calls]
        assert seen["decoded"] == []
        assert hooks() == 0

    def test_it_works_twice_and_whole_generations_after_it(self) -> None:
        with watched() as seen:
            one = subject(num_inference_steps=3)
            one.begin(1)
            one.begin(1)
            one.generate(3)
        assert len(seen["timesteps"]) == 1 + 1 + 6
        assert len(seen["decoded"]) == 1

    def test_more_calls_than_there_are_is_a_whole_generation(self) -> None:
        with watched() as seen:
            subject(num_inference_steps=2).begin(9)
        assert (len(seen["timesteps"]), len(seen["decoded"])) == (4, 1)
        assert hooks() == 0

    def test_with_a_kernel_asked_for(self) -> None:
        with torch.no_grad():
            subject(attention_kernel="math").begin(1)
        assert hooks() == 0
        assert chosen_by_torch()["denoiser"] == ["flash-cpu"]

    def test_an_error_is_not_taken_for_its_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_room(*_: Any, **__: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(type(tiny.pipeline().scheduler), "step", no_room)
        with pytest.raises(torch.OutOfMemoryError), torch.no_grad():
            subject().begin(3)
        assert hooks() == 0


class TestFull:
    def test_whole_warm_ups_then_whole_repetitions(self) -> None:
        with prepared(full={"warmups": 2, "repetitions": 3}, num_inference_steps=3) as run:
            run_full(run)
        assert run.windows.kind == ["warmup"] * 2 + ["generation"] * 3
        assert run.windows.steps == [3] * 5
        assert len(generations(run.windows, run.recorder.spans)) == 3

    @pytest.mark.parametrize(("warmup_steps", "run_steps"), [(1, 1), (2, 2), (9, 3), (None, 3)])
    def test_warm_ups_may_be_cut_and_repetitions_are_not(
        self, warmup_steps: int | None, run_steps: int
    ) -> None:
        full = {"warmups": 2, "warmup_steps": warmup_steps, "repetitions": 2}
        with prepared(full=full, num_inference_steps=3) as run:
            run_full(run)
        assert run.windows.kind == ["warmup"] * 2 + ["generation"] * 2
        assert run.windows.steps == [run_steps] * 2 + [3] * 2
        stages = Counter(zip(run.recorder.spans.window, run.recorder.spans.stage, strict=True))
        # a cut warm-up decodes, too: the decoder is warm before anything is measured
        assert [stages[window, "vae_decode"] for window in range(4)] == [1] * 4
        assert [stages[window, "denoiser"] for window in range(4)] == [2 * run_steps] * 2 + [6] * 2

    def test_a_repetition_of_as_many_generations_as_fill_a_window(self) -> None:
        full = {"warmups": 1, "repetitions": 2, "min_window_s": 0.2}
        heard: list[str] = []
        with prepared(full=full, num_inference_steps=1) as run:
            run.say = heard.append
            run_full(run)
        numbers = run.windows.repetition
        assert numbers[0] == -1
        assert numbers == sorted(numbers)
        assert set(numbers) == {-1, 0, 1}
        for number in (0, 1):
            lengths = [
                end - start
                for n, start, end in zip(numbers, run.windows.start_s, run.windows.end_s, strict=True)
                if n == number
            ]
            assert sum(lengths[:-1]) < 0.2 <= sum(lengths)
        assert len(heard) == 3  # nothing is said between the generations of a repetition

    @pytest.mark.parametrize(
        ("narrow", "repetitions"), [([True], 2), ([False, True], 3), ([False, False, False], 4)]
    )
    def test_repetitions_go_on_until_they_are_narrow_or_the_most(
        self, narrow: list[bool], repetitions: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answers = iter(narrow)
        target = "t2v_energy.measurement.protocols._repeats_narrowly"
        monkeypatch.setattr(target, lambda run, steps: next(answers))
        full = {"warmups": 1, "repetitions": 2, "max_repetitions": 4}
        with prepared(full=full, num_inference_steps=1) as run:
            run_full(run)
        assert run.windows.repetition == [-1, *range(repetitions)]

    @pytest.mark.parametrize(("limit", "repetitions"), [(1e-6, 4), (1e6, 2)])
    def test_narrow_is_the_interval_between_repetitions(self, limit: float, repetitions: int) -> None:
        full = {"warmups": 1, "repetitions": 2, "max_repetitions": 4, "max_ci95_percent": limit}
        with prepared(full=full, num_inference_steps=1) as run:
            run_full(run)
        assert run.windows.kind.count("generation") == repetitions

    def test_the_studys_numbers_are_the_default(self) -> None:
        assert ProtocolSettings().full == FullProtocol(warmups=2, warmup_steps=None, repetitions=5)
        assert {"full": run_full, "sampled": run_sampled} == PROTOCOLS


class TestSampled:
    def test_it_stops_once_the_interval_is_narrow(self) -> None:
        with prepared({**EASY, "generations": 3, "max_generations": 8}, num_inference_steps=6) as run:
            run_sampled(run)
        assert run.windows.kind == ["warmup"] + ["generation"] * 3
        assert run.windows.steps == [1, 2, 2, 2]

    @pytest.mark.parametrize("never", [{"max_step_sem_percent": 1e-9}, {"max_ci95_percent": 1e-9}])
    def test_or_after_the_most_generations(self, never: dict[str, float]) -> None:
        with prepared({**EASY, **never, "generations": 2, "max_generations": 4}) as run:
            run_sampled(run)
        assert run.windows.kind == ["warmup"] + ["generation"] * 4

    def test_it_adds_generations_until_it_is_narrow(self, monkeypatch: pytest.MonkeyPatch) -> None:
        answers = iter([False, False, True])
        monkeypatch.setattr("t2v_energy.measurement.protocols._is_narrow", lambda run, steps: next(answers))
        with prepared({**NEVER, "generations": 2, "max_generations": 8}) as run:
            run_sampled(run)
        assert run.windows.kind == ["warmup"] + ["generation"] * 4

    def test_steps_fill_the_window_and_no_more_than_there_are(self) -> None:
        # a window that no generation fills: all steps; the shortest one: the least
        for min_window_s, steps in ((1e3, 4), (1e-6, 2)):
            with prepared({**EASY, "min_window_s": min_window_s, "generations": 2}) as run:
                run_sampled(run)
            assert run.windows.steps == [1, steps, steps]

    def test_steps_follow_from_the_warm_calls_time(self) -> None:
        with prepared({**EASY, "generations": 2, "min_window_s": 0.1}, num_inference_steps=50) as run:
            run_sampled(run)
        spans = run.recorder.spans
        call_s = [
            end - start
            for window, stage, start, end in zip(
                spans.window, spans.stage, spans.start_s, spans.end_s, strict=True
            )
            if window == 0 and stage == "denoiser"
        ][-1]
        assert run.windows.steps[1] == min(50, max(2, int(np.ceil(0.1 / (2 * call_s)))))

    def test_a_warm_up_of_some_calls_decodes_nothing(self) -> None:
        sampled = {**EASY, "warmup_calls": 1, "generations": 2}
        heard: list[str] = []
        with prepared(sampled, num_inference_steps=6) as run:
            run.say = heard.append
            run_sampled(run)
        assert run.windows.kind == ["warmup", "generation", "generation"]
        assert run.windows.steps == [0, 2, 2]  # a step has two calls: the warm-up ends within its first
        stages = Counter(zip(run.recorder.spans.window, run.recorder.spans.stage, strict=True))
        assert stages[0, "denoiser"] == 1
        assert stages[0, "vae_decode"] == stages[0, "scheduler"] == 0
        assert [stages[window, "vae_decode"] for window in (1, 2)] == [1, 1]
        assert heard[0].startswith("warmup of 1 denoiser calls took ")
        assert run.kernels["denoiser"] == ["flash-cpu"]
        # two generations are measured, and the totals of whole videos follow from them
        assert len(composed_latency_s(generations(run.windows, run.recorder.spans), 6)) == 2

    def test_one_generation_is_enough_where_it_is_asked_for(self) -> None:
        with prepared({**EASY, "min_steps": 1, "generations": 1, "max_generations": 1}) as run:
            run_sampled(run)
        assert run.windows.kind == ["warmup", "generation"]
        found = estimate(composed_latency_s(generations(run.windows, run.recorder.spans), 4))
        assert found.n == 1
        assert np.isnan(found.ci95)

    def test_one_generation_has_no_interval_so_more_are_run_where_they_may(self) -> None:
        with prepared({**EASY, "generations": 1, "max_generations": 8}) as run:
            run_sampled(run)
        assert run.windows.kind == ["warmup", "generation", "generation"]

    def test_peaks_of_a_stage_that_no_warm_up_reached_are_read_in_the_first_generation(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Reading them slows the host down: as seldom as possible, but not never."""
        for sampled, expected in (
            ({**EASY, "generations": 2}, [True, False, False]),
            ({**EASY, "generations": 2, "warmup_calls": 1}, [True, True, False]),
        ):
            with prepared(sampled) as run:
                window, tracked = run.recorder.window, []

                def watched_window(
                    index: int, *, window: Any = window, seen: Any = tracked, **how: Any
                ) -> Any:
                    seen.append(how["track_memory"])
                    return window(index, **how)

                finish = run.recorder._finish

                def read_peaks(call: Any, *, on_host: bool, run: Any = run, finish: Any = finish) -> None:
                    finish(call, on_host=on_host)
                    if run.recorder._track_memory:  # on a GPU the recorder does this itself
                        run.recorder.allocated_B[call.stage] = 1

                monkeypatch.setattr(run.recorder, "window", watched_window)
                monkeypatch.setattr(run.recorder, "_finish", read_peaks)
                run_sampled(run)
            assert tracked == expected

    def test_a_warm_up_is_no_longer_than_the_whole(self) -> None:
        with prepared({**EASY, "warmup_steps": 9, "generations": 2}, num_inference_steps=2) as run:
            run_sampled(run)
        assert run.windows.steps == [2, 2, 2]


class TestWhatIsRecorded:
    def test_spans_of_every_generation(self) -> None:
        with prepared({**EASY, "generations": 2}) as run:
            run_sampled(run)
        spans = run.recorder.spans
        for window, steps in enumerate(run.windows.steps):
            counts = Counter(s for s, w in zip(spans.stage, spans.window, strict=True) if w == window)
            assert counts == {
                "text_encoder": 2,
                "denoiser": 2 * steps,
                "scheduler": steps,
                "vae_decode": 1,
                "postprocess": 1,
            }

    def test_the_kernels_are_those_of_the_first_warm_up(self) -> None:
        with prepared(full={"warmups": 2, "repetitions": 1}, num_inference_steps=1) as run:
            run_full(run)
        assert run.kernels["denoiser"] == ["flash-cpu"]
        assert set(run.kernels) == {"text_encoder", "denoiser", "vae_decode"}

    def test_the_user_hears_of_each_generation(self) -> None:
        heard: list[str] = []
        with prepared({**EASY, "generations": 2}) as run:
            run.say = heard.append
            run_sampled(run)
        assert [text.split(" took ")[0] for text in heard] == ["warmup of 1 steps"] + [
            "generation of 2 steps"
        ] * 2

    def test_the_composed_total_is_like_that_of_whole_generations(self) -> None:
        # Two protocols, one cost: loosely, as the machine has other work to do as well.
        size = {"height": 96, "width": 96, "num_frames": 9, "num_inference_steps": 12}
        totals = {}
        for name, sampled in (("full", EASY), ("sampled", {**EASY, "min_steps": 3, "generations": 4})):
            with prepared(sampled, full={"warmups": 1, "repetitions": 3}, **size) as run:
                PROTOCOLS[name](run)
            measured = generations(run.windows, run.recorder.spans)
            totals[name] = estimate(composed_latency_s(measured, 12)).mean
            if name == "full":
                windows = zip(run.windows.kind, run.windows.start_s, run.windows.end_s, strict=True)
                whole = np.mean([end - start for kind, start, end in windows if kind == "generation"])
                assert totals["full"] == pytest.approx(whole, rel=1e-6)
            else:
                assert run.windows.steps[1:] == [3] * 4
        assert totals["sampled"] == pytest.approx(totals["full"], rel=0.5)


MODELS = sorted(path.stem for path in (tiny.ROOT / "config" / "models").glob("*.yaml"))


@pytest.mark.parametrize("key", MODELS)
def test_every_model_runs_its_smallest_size(key: str) -> None:
    model = load_model(tiny.ROOT, key)
    asked = {"height": 720, "width": 1280, "num_frames": 81, "guidance_scale": model.defaults.guidance_scale}
    found = smallest(model, tiny.configuration(model=model.key, **asked))
    check_runnable(found, model, "here")
    assert found.height * found.width * found.num_frames < 720 * 1280
    assert found.prompt == "p000"
