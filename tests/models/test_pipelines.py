"""Each architecture's pipeline, built tiny and run for real: what it makes, and what its parts are given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import tiny
from t2v_energy.config import ComponentHub, Hub, load_model
from t2v_energy.errors import UserError

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402
from t2v_energy.measurement.protocols import Subject, smallest  # noqa: E402
from t2v_energy.models.build import (  # noqa: E402
    build_component,
    build_pipeline,
    load_class,
    pipeline_class,
)

PUBLISHED = {
    "wan2.1-t2v-1.3b": "tiny-wan",
    "wan2.1-t2v-14b": "tiny-wan",
    "cogvideox-2b": "tiny-cogvideox",
    "cogvideox-5b": "tiny-cogvideox",
    "ltx-video-0.9.7-dev": "tiny-ltx",
    "mochi-1-preview": "tiny-mochi",
    "animatediff-lightning": "tiny-animatediff",
    "contentv-8b": "tiny-contentv",
}
"""The shipped models, and the tiny one of each one's structure."""
PARTS = [(key, name) for key in tiny.KEYS for name, part in tiny.model(key).components.items() if part.dtype]


def subject(key: str, **changes: Any) -> Subject:
    return Subject(tiny.pipeline(key), tiny.model(key), tiny.defaults(key, **changes), "A red fox.", "cpu")


@contextmanager
def watched(key: str, *names: str) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """The tensors that each call of the parts ``names`` gets, by argument; positional ones by number."""
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with ExitStack() as hooks, torch.no_grad():
        for name in names:

            def note(_: Any, given: Any, named: Any, name: str = name) -> None:
                everything = {**{str(i): value for i, value in enumerate(given)}, **named}
                seen[name].append({k: v for k, v in everything.items() if isinstance(v, torch.Tensor)})

            part = getattr(tiny.pipeline(key), name)
            hooks.callback(part.register_forward_pre_hook(note, with_kwargs=True).remove)
        yield seen


def video(pipeline: Any, key: str, steps: int = 2) -> np.ndarray:
    """Frames of a generation of ``pipeline``, as the measured one is called."""
    made: list[Any] = []
    postprocess = pipeline.video_processor.postprocess_video

    def kept(*arguments: Any, **options: Any) -> Any:
        made.append(postprocess(*arguments, **options))
        return made[-1]

    pipeline.video_processor.postprocess_video = kept
    try:
        with torch.no_grad():
            configuration = tiny.defaults(key, num_inference_steps=steps)
            Subject(pipeline, tiny.model(key), configuration, "A red fox.", "cpu").generate(steps)
    finally:
        del pipeline.video_processor.postprocess_video
    (frames,) = made
    return np.asarray(frames)


@pytest.mark.parametrize("key", tiny.KEYS)
class TestEveryArchitecture:
    def test_it_makes_a_video_and_the_same_one_again(self, key: str) -> None:
        size = tiny.model(key).defaults
        height, width = (128, 128) if key == "tiny-ltx" else (size.height, size.width)  # 96×128 · ⅔ · 2
        frames = video(tiny.pipeline(key), key)
        assert frames.shape == (1, size.num_frames, height, width, 3)
        assert np.isfinite(frames).all()
        assert frames.std() > 0.01
        assert np.array_equal(frames, video(tiny.pipeline(key), key))

    def test_the_same_seed_gives_the_same_weights(self, key: str) -> None:
        again = build_pipeline(tiny.model(key), "random", "cpu", 0)
        assert np.array_equal(video(again, key), video(tiny.pipeline(key), key))

    def test_another_seed_gives_another_video(self, key: str) -> None:
        other = build_pipeline(tiny.model(key), "random", "cpu", 1)
        assert not np.array_equal(video(other, key), video(tiny.pipeline(key), key))

    def test_parts_are_ready_to_measure_and_no_matrix_is_constant(self, key: str) -> None:
        parts = [p for p in tiny.pipeline(key).components.values() if isinstance(p, torch.nn.Module)]
        assert len(parts) >= 3
        kinds = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv2d, torch.nn.Conv3d)
        for part in parts:
            assert not part.training
            assert not any(p.requires_grad for p in part.parameters())
            for module in part.modules():
                if isinstance(module, kinds):
                    assert module.weight.std() > 0, module

    def test_a_cut_generation_calls_the_denoiser_for_its_steps_and_decodes(self, key: str) -> None:
        one, model = subject(key, num_inference_steps=6), tiny.model(key)
        denoiser, decoded = model.spans["denoiser"].split(".")[0], []
        vae, decode = one.pipeline.vae, one.pipeline.vae.decode
        vae.decode = lambda *given, **named: (decoded.append(1), decode(*given, **named))[1]
        refined = 2 if key == "tiny-ltx" else 0
        try:
            for steps in (2, 6, 1):
                decoded.clear()
                with watched(key, denoiser) as seen:
                    one.generate(steps)
                # the refinement calls the same module, whose hooks its view shares
                assert len(seen[denoiser]) == steps * model.passes_per_step + refined
                assert decoded == [1]
        finally:
            del vae.decode

    def test_guidance_is_a_second_call_or_a_batch_of_two(self, key: str) -> None:
        model = tiny.model(key)
        denoiser = model.spans["denoiser"].split(".")[0]
        with watched(key, denoiser) as seen:
            subject(key).generate(1)
        for call in seen[denoiser]:
            first = call.get("hidden_states", call.get("0"))
            assert first is not None
            assert len(first) == model.batch_per_pass

    def test_the_text_encoder_reads_every_prompt_at_the_padded_length(self, key: str) -> None:
        model = tiny.model(key)
        with watched(key, "text_encoder") as seen:
            subject(key).generate(1)
        shapes = [tuple(call.get("0", call.get("input_ids")).shape) for call in seen["text_encoder"]]
        texts = model.passes_per_step * model.batch_per_pass  # with guidance, the negative prompt as well
        stages = 2 if key == "tiny-ltx" else 1
        assert shapes == [(1, model.tokenizer.max_length)] * texts * stages

    def test_a_warm_up_ends_after_some_calls_and_the_next_generation_is_whole(self, key: str) -> None:
        model, one = tiny.model(key), subject(key, num_inference_steps=3)
        denoiser = model.spans["denoiser"].split(".")[0]
        with watched(key, denoiser, "vae") as seen:
            one.begin(1)
        assert len(seen[denoiser]) in (1, 2)  # our hook notes the call that is given up, too
        assert np.isfinite(video(tiny.pipeline(key), key)).all()

    def test_its_smallest_size_runs(self, key: str) -> None:
        one = subject(key)
        one.configuration = smallest(one.model, one.configuration)
        with torch.no_grad():
            one.generate(one.configuration.num_inference_steps)


class TestPrompts:
    def test_mochi_attends_only_to_the_tokens_that_the_prompt_has(self) -> None:
        masks = []
        for text in ("A fox.", "A red fox crosses a frozen lake at dawn, slowly."):
            one = subject("tiny-mochi")
            one.prompt = text
            with watched("tiny-mochi", "transformer") as seen:
                one.generate(1)
            masks.append(seen["transformer"][0]["encoder_attention_mask"].sum(1).tolist())
        assert masks == [[1, 4], [1, 13]]  # the empty negative prompt, then the prompt; each with its end

    @pytest.mark.parametrize("key", ["tiny-wan", "tiny-cogvideox", "tiny-animatediff", "tiny-contentv"])
    def test_elsewhere_padding_makes_every_prompt_cost_the_same(self, key: str) -> None:
        denoiser = tiny.model(key).spans["denoiser"].split(".")[0]
        shapes = []
        for text in ("A fox.", "A red fox crosses a frozen lake at dawn, slowly."):
            one = subject(key)
            one.prompt = text
            with watched(key, denoiser) as seen:
                one.generate(1)
            call = seen[denoiser][0]
            assert "encoder_attention_mask" not in call
            shapes.append(call["encoder_hidden_states"].shape)
        assert shapes[0] == shapes[1]


class TestLTX:
    """Three stages: generate small, double the latents, refine."""

    def test_sizes_of_the_stages(self) -> None:
        with watched("tiny-ltx", "transformer", "latent_upsampler") as seen:
            subject("tiny-ltx", num_inference_steps=3).generate(3)
        # 96×128 · ⅔ → 64×64: 2×2 latents in 2 frames; doubled, 4×4
        assert [call["hidden_states"].shape[1] for call in seen["transformer"]] == [8] * 3 + [32] * 2
        assert [tuple(call["0"].shape) for call in seen["latent_upsampler"]] == [(1, 8, 2, 2, 2)]

    def test_the_published_sizes(self) -> None:
        """The study's 512×704 is 320×448 first, and 640×896 in the end."""
        defaults = load_model(tiny.ROOT, "ltx-video-0.9.7-dev").defaults
        call = load_model(tiny.ROOT, "ltx-video-0.9.7-dev").call
        size = tiny.pipeline("tiny-ltx").first_size(defaults.height, defaults.width, call["downscale"])
        assert size == (320, 448)
        assert int(call["refine_steps"] * call["refine_strength"]) == 4

    def test_the_refiner_is_the_transformer(self) -> None:
        pipeline = tiny.pipeline("tiny-ltx")
        assert pipeline.refiner is not pipeline.transformer
        ours, theirs = (
            dict(pipeline.refiner.named_parameters()),
            dict(pipeline.transformer.named_parameters()),
        )
        assert ours.keys() == theirs.keys()
        assert all(ours[name] is theirs[name] for name in ours)
        assert "refiner" not in pipeline.components  # its weights are not saved or moved twice

    def test_the_first_stages_parts_are_back_afterwards(self) -> None:
        pipeline = tiny.pipeline("tiny-ltx")
        before = pipeline.transformer, pipeline.scheduler
        with torch.no_grad():
            subject("tiny-ltx").generate(1)
        assert pipeline.transformer is before[0]
        assert pipeline.scheduler is before[1]
        assert (
            len(pipeline.scheduler.timesteps) == 4
        )  # the first stage's schedule, not the refinement's of 10

    def test_stages_too_short_for_the_vae_are_rounded_down(self) -> None:
        assert tiny.pipeline("tiny-ltx").first_size(128, 160, 2 / 3) == (64, 96)


class TestContentV:
    """Stable Diffusion 3's parts over a whole video; diffusers has neither class."""

    KEY = "tiny-contentv"

    def given(self, frames: int) -> dict[str, torch.Tensor]:
        """Inputs of the transformer: ``frames`` latent frames of 4×6."""
        draw, c = torch.Generator().manual_seed(0), tiny.model(self.KEY).components["transformer"].config
        sizes = {
            "hidden_states": (1, c["in_channels"], frames, 4, 6),
            "encoder_hidden_states": (1, 7, c["joint_attention_dim"]),
            "pooled_projections": (1, c["pooled_projection_dim"]),
        }
        inputs = {name: torch.randn(size, generator=draw) for name, size in sizes.items()}
        return inputs | {"timestep": torch.tensor([500.0])}

    def called(self, given: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            (sample,) = tiny.pipeline(self.KEY).transformer(**given, return_dict=False)
        return sample

    def test_one_frame_is_stable_diffusion_3s_image(self) -> None:
        """All but the positions is theirs: with them equal, so is the result."""
        ours, given = tiny.pipeline(self.KEY).transformer, self.given(1)
        theirs = load_class("diffusers.SD3Transformer2DModel")(**dict(ours.config)).eval()
        missing = theirs.load_state_dict(ours.state_dict(), strict=False)
        assert (missing.missing_keys, missing.unexpected_keys) == (["pos_embed.pos_embed"], [])

        def embed(image: torch.Tensor) -> torch.Tensor:
            return ours.pos_embed(image.unsqueeze(2))

        theirs.pos_embed.forward = embed
        image = given | {"hidden_states": given["hidden_states"].squeeze(2)}
        with torch.no_grad():
            (expected,) = theirs(**image, return_dict=False)
        assert torch.allclose(self.called(given).squeeze(2), expected, atol=1e-5)

    def test_tokens_are_in_the_order_of_frames_rows_and_columns(self) -> None:
        embed, given = tiny.pipeline(self.KEY).transformer.pos_embed, self.given(3)["hidden_states"]
        with torch.no_grad():
            tokens = embed(given).unflatten(1, (3, 2, 3))
            changed = given.clone()
            changed[:, :, 1, 2:, 4:] += 1  # patch of the second frame, second row, third column
            moved = (embed(changed).unflatten(1, (3, 2, 3)) != tokens).any(-1).nonzero().tolist()
        assert moved == [[0, 1, 1, 2]]

    def test_positions_are_frames_then_rows_and_columns_at_twice_the_pitch(self) -> None:
        embed = tiny.pipeline(self.KEY).transformer.pos_embed
        with torch.no_grad():
            # without an image, tokens are the bias and their positions
            tokens = (embed(torch.zeros(1, 16, 3, 4, 6)) - embed.proj.bias).unflatten(1, (3, 2, 3))[0]
        width = tokens.shape[-1]
        time, across = tokens[..., : width // 4], tokens[..., width // 4 :]
        assert torch.equal(time[:, :1, :1].expand_as(time), time)  # all of a frame alike
        assert torch.equal(across[:1].expand_as(across), across)  # all frames alike
        # the first sine of each half: of the column and of the row, or of the frame
        assert time[:, 0, 0, 0].tolist() == pytest.approx(np.sin([0, 1, 2]), abs=1e-6)
        half = across.shape[-1] // 2
        assert across[0, 0, :, 0].tolist() == pytest.approx(np.sin([0, 2, 4]), abs=1e-6)
        assert across[0, :, 0, half].tolist() == pytest.approx(np.sin([0, 2]), abs=1e-6)

    def test_every_frame_attends_to_every_other(self) -> None:
        given = self.given(3)
        other = given | {"hidden_states": given["hidden_states"].clone()}
        other["hidden_states"][:, :, 2] += 1
        assert self.called(given).shape == given["hidden_states"].shape
        difference = (self.called(other) - self.called(given)).abs().amax(dim=(0, 1, 3, 4))
        assert (difference > 1e-6).all()

    def test_the_transformer_is_given_333_tokens_of_three_encoders(self) -> None:
        encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
        with watched(self.KEY, "transformer", *encoders) as seen:
            subject(self.KEY).generate(1)
        lengths = [[call.get("0").shape[1] for call in seen[name]] for name in encoders]
        assert lengths == [[77, 77], [77, 77], [256, 256]]  # the prompt and the negative one
        prompt, negative = seen["transformer"]
        assert prompt["encoder_hidden_states"].shape == (1, 77 + 256, 48)
        assert prompt["pooled_projections"].shape == (1, 8 + 12)
        assert torch.equal(prompt["hidden_states"], negative["hidden_states"])
        assert not torch.equal(prompt["encoder_hidden_states"], negative["encoder_hidden_states"])
        assert not torch.equal(prompt["pooled_projections"], negative["pooled_projections"])
        assert prompt["hidden_states"].shape == (1, 16, 3, 8, 8)

    def test_the_schedule_is_that_of_the_source(self) -> None:
        """Sigmas from 1 in equal steps, then moved by the shift of 3."""
        with watched(self.KEY, "transformer") as seen:
            subject(self.KEY).generate(4)
        steps = [float(call["timestep"]) for call in seen["transformer"]][::2]
        sigmas = np.array([1, 0.75, 0.5, 0.25])
        assert steps == pytest.approx(1000 * 3 * sigmas / (1 + 2 * sigmas))

    def test_guidance_is_from_the_negative_prompt_towards_the_prompt(self) -> None:
        pipeline, seen = tiny.pipeline(self.KEY), []
        answers, step = iter((1.0, 3.0)), pipeline.scheduler.step

        def answer(latents: torch.Tensor, *_: Any) -> torch.Tensor:
            return torch.full_like(latents, next(answers))

        def noted(velocity: torch.Tensor, *given: Any, **named: Any) -> Any:
            seen.append(velocity.unique().tolist())
            return step(velocity, *given, **named)

        pipeline._velocity, pipeline.scheduler.step = answer, noted
        try:
            subject(self.KEY).generate(1)
        finally:
            del pipeline._velocity, pipeline.scheduler.step
        assert seen == [[3 + 6 * (1 - 3)]]  # guidance of 6

    def test_without_guidance_a_step_is_one_call(self) -> None:
        with watched(self.KEY, "transformer", "text_encoder_3") as seen:
            subject(self.KEY, guidance_scale=1.0).generate(2)
        assert (len(seen["transformer"]), len(seen["text_encoder_3"])) == (2, 1)

    def test_latents_are_scaled_back_for_the_vae(self) -> None:
        pipeline, got = tiny.pipeline(self.KEY), []
        decode, config = pipeline.vae.decode, pipeline.vae.config
        pipeline.vae.decode = lambda z, **named: (got.append(z), decode(z, **named))[1]
        try:
            with torch.no_grad():
                pipeline._decode(torch.ones(1, 16, 1, 4, 4), "np")
        finally:
            del pipeline.vae.decode
        expected = np.array(config.latents_std) + np.array(config.latents_mean)
        assert got[0][0, :, 0, 0, 0].tolist() == pytest.approx(expected)

    def test_latents_of_the_callback_are_taken(self) -> None:
        pipeline, size = tiny.pipeline(self.KEY), {"height": 64, "width": 64, "num_frames": 5}

        def zero(_: Any, __: int, ___: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"latents": torch.zeros_like(tensors["latents"])}

        call = {"num_inference_steps": 1, "output_type": "latent", "callback_on_step_end": zero}
        assert not pipeline(prompt="A fox.", **size, **call).frames.any()

    def test_a_size_that_it_cannot_cut_into_patches(self) -> None:
        with pytest.raises(ValueError, match="divisible by 16"):
            tiny.pipeline(self.KEY)(prompt="A fox.", height=72, width=64)

    def test_published_weights_are_refused_until_a_revision_is_pinned(self) -> None:
        model = load_model(tiny.ROOT, "contentv-8b")
        with pytest.raises(UserError, match="ByteDance/ContentV-8B has no pinned revision") as caught:
            build_pipeline(model, "pretrained", "cpu", 0)
        assert caught.value.where == "config/models/contentv-8b.yaml, hub"


class TestPublished:
    """The shipped model files, without their weights."""

    # Exact numbers were found in public files: sums over safetensors files, a training log, others' code.
    # The others are sizes as reported or as built from the same values, and guard against change alone.
    T5, UMT5, WAN_VAE = 4_762_310_656, 5_680_910_336, 126_892_531
    COUNTS: ClassVar = {
        "wan2.1-t2v-1.3b": {"transformer": 1_418_996_800, "text_encoder": UMT5, "vae": WAN_VAE},
        "wan2.1-t2v-14b": {"transformer": 14_288_491_584, "text_encoder": UMT5, "vae": WAN_VAE},
        "cogvideox-2b": {"transformer": 1.69e9, "text_encoder": T5, "vae": 216e6},
        "cogvideox-5b": {"transformer": 5_570_283_072, "text_encoder": T5, "vae": 216e6},
        "ltx-video-0.9.7-dev": {
            "transformer": 13_042_569_344,
            "text_encoder": T5,
            "vae": 1_246_913_778,
            "latent_upsampler": 126e6,
        },
        "mochi-1-preview": {"transformer": 10_027_677_744, "text_encoder": T5, "vae": 460e6},
        "animatediff-lightning": {
            "unet": 859.5e6,
            "motion_adapter": 453.2e6,
            "text_encoder": 123.1e6,
            "vae": 83.7e6,
        },
        "contentv-8b": {
            "transformer": 8e9,
            "vae": WAN_VAE,
            "text_encoder": 123_650_304,
            "text_encoder_2": 694_659_840,
            "text_encoder_3": T5,
        },
    }

    @pytest.mark.parametrize("key", PUBLISHED)
    def test_parameter_counts_are_within_one_percent(self, key: str) -> None:
        model, counts = load_model(tiny.ROOT, key), self.COUNTS[key]
        assert set(counts) == {name for name, part in model.components.items() if part.dtype}
        for name, published in counts.items():
            part = model.components[name]
            built = parameters(part.class_, repr(part.config))
            assert built == pytest.approx(published, rel=0.01), name

    @pytest.mark.parametrize(("key", "small"), PUBLISHED.items())
    def test_the_tiny_one_has_its_structure(self, key: str, small: str) -> None:
        large, like = load_model(tiny.ROOT, key), tiny.model(small)
        assert (large.pipeline, large.architecture) == (like.pipeline, like.architecture)
        assert {n: c.class_ for n, c in large.components.items()} == {
            n: c.class_ for n, c in like.components.items()
        }
        assert (large.spans, large.limits, large.call.keys()) == (like.spans, like.limits, like.call.keys())
        assert (large.passes_per_step, large.batch_per_pass) == (like.passes_per_step, like.batch_per_pass)
        assert {n: t.max_length for n, t in large.tokenizers.items()} == {
            n: t.max_length for n, t in like.tokenizers.items()
        }

    @pytest.mark.parametrize("key", PUBLISHED)
    def test_schedulers_build(self, key: str) -> None:
        build_component(load_model(tiny.ROOT, key).components["scheduler"], "cpu")


@cache
def parameters(name: str, config: str) -> int:
    """Parameters of a class with a configuration (its ``repr``), built without storage."""
    cls, values = load_class(name), eval(config)
    with torch.device("meta"):
        part = cls(cls.config_class(**values)) if name.startswith("transformers.") else cls(**values)
    return sum(p.numel() for p in part.parameters())


class TestPrecision:
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @pytest.mark.parametrize(("key", "name"), PARTS)
    def test_types_are_those_of_from_pretrained(
        self, key: str, name: str, dtype: str, tmp_path: Path
    ) -> None:
        component = tiny.model(key).components[name].model_copy(update={"dtype": dtype})
        ours = build_component(component, "cpu")
        ours.save_pretrained(tmp_path)
        theirs = type(ours).from_pretrained(tmp_path, torch_dtype=getattr(torch, dtype))

        def types(part: Any) -> dict[str, Any]:
            return {n: t.dtype for n, t in [*part.named_parameters(), *part.named_buffers()]}

        assert types(ours) == types(theirs)
        assert getattr(torch, dtype) in types(ours).values()


class TestPretrained:
    @pytest.mark.parametrize("key", tiny.KEYS)
    def test_what_was_saved_comes_back(self, key: str, tmp_path: Path) -> None:
        model = tiny.model(key)
        pipeline = build_pipeline(model, "random", "cpu", 5)
        for name, tokenizer in model.tokenizers.items():
            setattr(pipeline, name, tiny.real_tokenizer(tokenizer.max_length))
        pipeline.save_pretrained(tmp_path, safe_serialization=True)
        loaded = build_pipeline(model, "pretrained", "cpu", 99, source=tmp_path)
        assert type(loaded) is type(pipeline)
        assert type(loaded.tokenizer).__name__ != "StandInTokenizer"
        # Weights that are mapped from a file lie elsewhere in memory, and sums are taken in another order.
        assert np.allclose(video(loaded, key), video(pipeline, key), rtol=0, atol=1e-4)

    def test_the_schedule_is_the_model_files(self, tmp_path: Path) -> None:
        """AnimateDiff-Lightning's weights are in a repository whose scheduler is another one."""
        model = tiny.model("tiny-animatediff")
        pipeline = build_pipeline(model, "random", "cpu", 5)
        pipeline.tokenizer = tiny.real_tokenizer(77)
        pipeline.scheduler = load_class("diffusers.DDIMScheduler")(beta_schedule="scaled_linear")
        pipeline.save_pretrained(tmp_path)
        loaded = build_pipeline(model, "pretrained", "cpu", 0, source=tmp_path).scheduler
        assert type(loaded).__name__ == "EulerDiscreteScheduler"
        assert (loaded.config.timestep_spacing, loaded.config.beta_schedule) == ("trailing", "linear")


class TestPartsOfOtherRepositories:
    """The upsampler of LTX-Video and the motion adapter of AnimateDiff-Lightning."""

    PIN = "0123456789abcdef0123456789abcdef01234567"

    def asked(self, key: str, part: str, monkeypatch: pytest.MonkeyPatch, **pin: Any) -> dict[str, Any]:
        """What the pipeline's class is asked for, with ``part`` in a repository of its own."""
        model = tiny.model(key)
        own = model.components[part].model_copy(update={"hub": ComponentHub(id="some/part", **pin)})
        given: dict[str, Any] = {}

        def from_pretrained(name: str, **options: Any) -> Any:
            given.update(options, name=name)
            return tiny.pipeline(key)

        monkeypatch.setattr(pipeline_class(model.pipeline), "from_pretrained", from_pretrained)
        changed = {
            "hub": Hub(id="some/model", revision=self.PIN),
            "components": model.components | {part: own},
        }
        build_pipeline(model.model_copy(update=changed), "pretrained", "cpu", 0)
        return given

    def test_a_part_as_the_library_saves_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        upsampler, read = tiny.pipeline("tiny-ltx").latent_upsampler, {}

        def from_pretrained(name: str, **options: Any) -> Any:
            read.update(options, name=name)
            return upsampler

        monkeypatch.setattr(type(upsampler), "from_pretrained", from_pretrained)
        given = self.asked("tiny-ltx", "latent_upsampler", monkeypatch, revision="f" * 40, subfolder="x")
        assert (read["name"], read["revision"], read["subfolder"]) == ("some/part", "f" * 40, "x")
        assert (read["use_safetensors"], read["torch_dtype"]) == (True, torch.float32)
        assert given["latent_upsampler"] is upsampler
        assert (given["name"], given["revision"]) == ("some/model", self.PIN)

    def test_a_bare_file_of_weights(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        adapter, calls = tiny.pipeline("tiny-animatediff").motion_adapter, []
        save_file(adapter.state_dict(), tmp_path / "adapter.safetensors")

        def download(*given: Any, **named: Any) -> str:
            calls.append((given, named))
            return str(tmp_path / "adapter.safetensors")

        monkeypatch.setattr("t2v_energy.models.build.hf_hub_download", download)
        hub = {"revision": "f" * 40, "file": "adapter.safetensors"}
        given = self.asked("tiny-animatediff", "motion_adapter", monkeypatch, **hub)
        assert calls == [(("some/part", "adapter.safetensors"), {"subfolder": None, "revision": "f" * 40})]
        loaded = given["motion_adapter"]
        assert loaded is not adapter
        for name, value in adapter.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value)

    def test_a_revision_that_nobody_pinned(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(UserError, match="some/part has no pinned revision") as caught:
            self.asked("tiny-ltx", "latent_upsampler", monkeypatch, revision=None)
        assert caught.value.where == "config/models/tiny-ltx.yaml, components.latent_upsampler.hub"
        assert "`weights: random`" in caught.value.remedy

    def test_a_file_that_is_no_safetensors(self) -> None:
        with pytest.raises(ValueError, match="file"):
            ComponentHub(id="some/part", revision=None, file="adapter.bin")


def test_a_pipeline_that_nobody_has() -> None:
    model = tiny.model().model_copy(update={"pipeline": "NoSuchPipeline"})
    with pytest.raises(UserError, match=r"class diffusers\.NoSuchPipeline cannot be imported"):
        build_pipeline(model, "random", "cpu", 0)


@pytest.mark.parametrize(("key", "small"), PUBLISHED.items())
def test_it_runs_in_the_published_types(key: str, small: str) -> None:
    """Parts of different types meet in a pipeline, and not every one casts what it is given."""
    published, model = load_model(tiny.ROOT, key), tiny.model(small)
    parts = {
        name: part.model_copy(update={"dtype": published.components[name].dtype})
        for name, part in model.components.items()
    }
    pipeline = build_pipeline(model.model_copy(update={"components": parts}), "random", "cpu", 0)
    denoiser = getattr(pipeline, model.spans["denoiser"].split(".")[0])
    assert denoiser.dtype == getattr(torch, parts[model.spans["denoiser"].split(".")[0]].dtype or "")
    frames = video(pipeline, small)
    assert np.isfinite(frames).all()
    assert frames.std() > 0.01
