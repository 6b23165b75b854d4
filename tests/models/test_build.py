"""Pipelines from model files: random weights as the library makes them, published ones as it loads them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from t2v_energy.config import Component, ModelFile, load_model
from t2v_energy.errors import UserError

torch = pytest.importorskip("torch")
from t2v_energy.models.build import build_component, build_pipeline  # noqa: E402

PARTS = ("transformer", "vae", "text_encoder")


def tensors(pipeline: Any) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": value
        for part in PARTS
        for name, value in getattr(pipeline, part).state_dict().items()
    }


def video(pipeline: Any) -> np.ndarray:
    with torch.no_grad():
        return pipeline(
            prompt="a red fox",
            negative_prompt="",
            height=32,
            width=32,
            num_frames=5,
            num_inference_steps=2,
            generator=torch.Generator("cpu").manual_seed(0),
            output_type="np",
        ).frames


def in_bfloat16(component: Component) -> Component:
    return component.model_copy(update={"dtype": "bfloat16"})


class TestRandomWeights:
    def test_the_same_seed_gives_the_same_weights_and_video(self) -> None:
        one, same = tiny.pipeline(), build_pipeline(tiny.model(), "random", "cpu", 0)
        for name, value in tensors(one).items():
            assert torch.equal(value, tensors(same)[name]), name
        assert np.array_equal(video(one), video(same))

    def test_another_seed_gives_other_weights(self) -> None:
        one, other = tensors(tiny.pipeline()), tensors(build_pipeline(tiny.model(), "random", "cpu", 1))
        matrices = [name for name, value in one.items() if value.ndim > 1 and name in other]
        # Norms' weights have one dimension here, or singleton ones (the VAE's): those start at one.
        random = [name for name in matrices if one[name].std() > 0]
        assert len(random) > 60
        assert all(not torch.equal(one[name], other[name]) for name in random)

    def test_no_weight_matrix_is_constant(self) -> None:
        modules = [m for part in PARTS for m in getattr(tiny.pipeline(), part).modules()]
        kinds = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv2d, torch.nn.Conv3d)
        drawn = [module for module in modules if isinstance(module, kinds)]
        assert len(drawn) > 60
        for module in drawn:
            assert module.weight.std() > 0, module
            assert module.weight.isfinite().all(), module

    def test_the_pipeline_is_ready_to_measure(self) -> None:
        pipeline = tiny.pipeline()
        assert type(pipeline).__name__ == "WanPipeline"
        for part in PARTS:
            module = getattr(pipeline, part)
            assert not module.training
            assert not any(p.requires_grad for p in module.parameters())
        assert type(pipeline.tokenizer).__name__ == "StandInTokenizer"
        assert pipeline.scheduler.config.flow_shift == 5.0
        frames = video(pipeline)
        assert frames.shape == (1, 5, 32, 32, 3)
        assert frames.std() > 0

    def test_the_published_configuration_reaches_the_parts(self) -> None:
        config = tiny.pipeline().transformer.config
        for key, value in tiny.model().components["transformer"].config.items():
            assert config[key] == value, key

    def test_a_class_that_is_not_there(self) -> None:
        with pytest.raises(UserError, match=r"class diffusers\.NoSuchModel cannot be imported") as caught:
            build_component(Component(**{"class": "diffusers.NoSuchModel"}), "cpu")
        assert "[measure]" in caught.value.remedy


class TestPrecision:
    """Under bfloat16 every tensor must have the type that ``from_pretrained`` gives it."""

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @pytest.mark.parametrize("name", PARTS)
    def test_types_are_those_of_from_pretrained(self, name: str, dtype: str, tmp_path: Path) -> None:
        component = tiny.model().components[name].model_copy(update={"dtype": dtype})
        ours = build_component(component, "cpu")
        ours.save_pretrained(tmp_path)
        theirs = type(ours).from_pretrained(tmp_path, torch_dtype=getattr(torch, dtype))

        def types(part: Any) -> dict[str, Any]:
            return {n: t.dtype for n, t in [*part.named_parameters(), *part.named_buffers()]}

        assert types(ours) == types(theirs)
        assert getattr(torch, dtype) in types(ours).values()

    def test_the_denoiser_keeps_its_sensitive_modules_in_float32(self) -> None:
        part = build_component(in_bfloat16(tiny.model().components["transformer"]), "cpu")
        types = {name: p.dtype for name, p in part.named_parameters()}
        for name, dtype in types.items():
            sensitive = any(k in name.split(".") for k in ("time_embedder", "scale_shift_table", "norm2"))
            if sensitive:
                assert dtype == torch.float32, name
        assert types["blocks.0.ffn.net.2.weight"] == types["blocks.0.attn1.to_q.weight"] == torch.bfloat16
        assert types["condition_embedder.time_embedder.linear_1.weight"] == torch.float32
        assert types["scale_shift_table"] == torch.float32
        assert {b.dtype for n, b in part.named_buffers() if n.startswith("rope")} <= {
            torch.float32,
            torch.float64,
        }

    def test_the_text_encoder_is_in_bfloat16_throughout(self) -> None:
        # transformers keeps `wo` in float32 under float16 only; in float32 it would cost far more.
        part = build_component(in_bfloat16(tiny.model().components["text_encoder"]), "cpu")
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A tiny pipeline with a real tokenizer on the disk, and the video that it made before."""
    pipeline = build_pipeline(tiny.model(), "random", "cpu", 5)
    pipeline.tokenizer = tiny.real_tokenizer()
    folder = tmp_path_factory.mktemp("saved")
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder, video(pipeline)


class TestPretrainedWeights:
    def test_what_was_saved_comes_back(self, saved: tuple[Path, np.ndarray]) -> None:
        folder, before = saved
        assert sorted(p.name for p in folder.glob("*/*.safetensors"))
        # another seed: nothing of it may come through
        pipeline = build_pipeline(tiny.model(), "pretrained", "cpu", 99, source=folder)
        assert type(pipeline.tokenizer).__name__ != "StandInTokenizer"
        assert np.array_equal(video(pipeline), before)
        assert not pipeline.transformer.training
        assert not any(p.requires_grad for p in pipeline.vae.parameters())

    def test_each_part_has_the_type_of_the_model_file(self, saved: tuple[Path, np.ndarray]) -> None:
        model = tiny.model()
        parts = dict(model.components)
        parts["transformer"], parts["text_encoder"] = map(
            in_bfloat16, (parts["transformer"], parts["text_encoder"])
        )
        half = model.model_copy(update={"components": parts})
        loaded = build_pipeline(half, "pretrained", "cpu", 0, source=saved[0])
        random = build_pipeline(half, "random", "cpu", 0)
        assert {n: t.dtype for n, t in tensors(loaded).items()} == {
            n: t.dtype for n, t in tensors(random).items()
        }
        assert loaded.vae.dtype == torch.float32
        assert loaded.text_encoder.dtype == torch.bfloat16

    def test_pickled_weights_are_refused(self, saved: tuple[Path, np.ndarray], tmp_path: Path) -> None:
        pipeline = build_pipeline(tiny.model(), "pretrained", "cpu", 0, source=saved[0])
        pipeline.save_pretrained(tmp_path, safe_serialization=False)
        weights = tmp_path / "text_encoder" / "pytorch_model.bin"  # transformers 5 writes no .bin any more
        if not weights.exists():
            torch.save(pipeline.text_encoder.state_dict(), weights)
        for file in tmp_path.glob("*/*.safetensors"):
            file.unlink()
        assert len(list(tmp_path.glob("*/*.bin"))) == 3
        with pytest.raises(UserError, match="cannot be read") as caught:
            build_pipeline(tiny.model(), "pretrained", "cpu", 0, source=tmp_path)
        assert caught.value.where == str(tmp_path)
        assert "safetensors" in caught.value.remedy

    def test_a_model_without_published_weights(self) -> None:
        with pytest.raises(UserError, match="tiny-wan has no published weights") as caught:
            build_pipeline(tiny.model(), "pretrained", "cpu", 0)
        assert caught.value.where == "config/models/tiny-wan.yaml"
        assert "weights: random" in caught.value.remedy


class TestHub:
    @pytest.fixture
    def wan(self) -> ModelFile:
        return load_model(tiny.ROOT, "wan2.1-t2v-1.3b")

    @pytest.fixture(autouse=True)
    def _an_empty_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        from diffusers.utils import logging as theirs
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        theirs.set_verbosity(logging.CRITICAL)
        yield
        theirs.set_verbosity_warning()

    def test_out_of_reach(self, wan: ModelFile) -> None:
        with pytest.raises(UserError) as caught:
            build_pipeline(wan, "pretrained", "cpu", 0)
        text = str(caught.value)
        assert wan.hub is not None
        assert f"{wan.hub.id} at revision {wan.hub.revision} cannot be read" in text
        assert "config/models/wan2.1-t2v-1.3b.yaml, hub" in text
        assert "weights: random" in text

    def test_what_is_asked_of_the_hub(self, wan: ModelFile, monkeypatch: pytest.MonkeyPatch) -> None:
        from diffusers import WanPipeline

        asked: dict[str, Any] = {}

        def from_pretrained(name: str, **options: Any) -> Any:
            asked.update(options, name=name)
            return tiny.pipeline()

        monkeypatch.setattr(WanPipeline, "from_pretrained", from_pretrained)
        build_pipeline(wan, "pretrained", "cpu", 0)
        assert wan.hub is not None
        assert (asked["name"], asked["revision"]) == (wan.hub.id, wan.hub.revision)
        assert (asked["use_safetensors"], asked["trust_remote_code"]) == (True, False)
        assert asked["torch_dtype"] == {
            "transformer": torch.bfloat16,
            "vae": torch.float32,
            "text_encoder": torch.bfloat16,
        }
