"""The typed, strict configuration: what is shipped is right, and every error tells where and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import yaml
from t2v_energy import config
from t2v_energy.config import (
    Campaign,
    Configuration,
    Listed,
    configurations,
    describe_weights,
    load_accelerator,
    load_accelerators,
    load_campaign,
    load_experiment,
    load_model,
    load_settings,
    merged,
    parse,
    protocol_settings,
)
from t2v_energy.errors import UserError

SHIPPED = {
    folder: sorted(p.stem for p in (tiny.ROOT / "config" / folder).glob("*.yaml"))
    for folder in ("models", "campaigns", "experiments")
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tiny.make_root(tmp_path)


def rewrite(root: Path, name: str, **changes: Any) -> Path:
    """Change top-level keys of config/<name>.yaml."""
    path = root / "config" / f"{name}.yaml"
    return tiny.write_yaml(root, name, yaml.safe_load(path.read_text()) | changes)


def listed(root: Path, campaign: str, experiment: str = "resolution") -> list[Listed]:
    """The experiment's entries as the campaign measures them."""
    return configurations(root, load_settings(root), load_campaign(root, campaign), experiment)


def tiny_entries(root: Path, *vary: dict[str, Any], passes: int = 1, **changes: Any) -> list[Listed]:
    """The entries of the tiny campaign's experiment with these ``vary`` and ``changes``."""
    rewrite(root, "campaigns/tiny", experiments=tiny.resolution(vary=list(vary), **changes), passes=passes)
    return listed(root, "tiny")


def message(function: Any, *arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    return str(caught.value)


class TestShipped:
    @pytest.mark.parametrize("key", SHIPPED["models"])
    def test_models_load(self, key: str) -> None:
        model = load_model(tiny.ROOT, key)
        assert model.key == key
        denoiser = model.spans["denoiser"].split(".")[0]
        assert {denoiser, "vae", "text_encoder", "scheduler"} <= set(model.components)
        base = config.base_configuration(
            config.Experiment(key="x", title="x", protocol="full", model=key, vary=[{}]), model, 0
        )
        config.check_runnable(base, model, "defaults")

    def test_accelerators_load(self) -> None:
        known = load_accelerators(tiny.ROOT)
        contract = "h200 h100-sxm a100-sxm rtx-4090 l4 tpu-v6e mi325x gaudi3"
        assert set(contract.split()) <= set(known)
        assert load_accelerator(tiny.ROOT, "h200").peak_bf16_dense_TFLOPs == 989

    @pytest.mark.parametrize("key", SHIPPED["campaigns"])
    def test_every_configuration_of_every_campaign_is_runnable(self, key: str) -> None:
        campaign = load_campaign(tiny.ROOT, key)
        load_accelerator(tiny.ROOT, campaign.accelerator)
        protocol_settings(load_settings(tiny.ROOT), campaign)
        for experiment in campaign.experiments:
            entries = listed(tiny.ROOT, key, experiment)
            assert len({(e.id, e.protocol) for e in entries}) == len(entries) > 0
            assert {e.configuration.seed for e in entries} == {campaign.seed}

    @pytest.mark.parametrize("key", SHIPPED["experiments"])
    def test_experiments_load_without_a_campaign_of_their_own(self, key: str) -> None:
        campaign = Campaign(key="x", title="x", accelerator="h200", device="cuda", experiments={key: {}})
        assert load_experiment(tiny.ROOT, campaign, key).key == key
        assert configurations(tiny.ROOT, load_settings(tiny.ROOT), campaign, key)

    def test_the_sizes_of_the_published_sweep(self) -> None:
        entries = listed(tiny.ROOT, "h200")
        by_passes: dict[int, set[tuple[int, int]]] = {1: set(), 2: set(), 3: set()}
        for entry in entries:
            by_passes[entry.passes].add((entry.configuration.width, entry.configuration.height))
        assert by_passes[2] == {
            (320, 240), (384, 384), (448, 256), (512, 512), (576, 320), (704, 384), (768, 432),
            (832, 480), (1024, 576), (1088, 608), (1280, 720), (1536, 864), (1792, 1008),
        }  # fmt: skip
        shapes = {(640, 624), (960, 416), (480, 832)}
        assert by_passes[3] == {(256, 256)}
        assert by_passes[1] == shapes | {(1920, 1088), (2560, 1440), (3520, 1984)}
        assert {width * height for width, height in shapes} == {832 * 480}
        assert {(e.configuration.num_frames, e.configuration.num_inference_steps) for e in entries} == {
            (81, 50)
        }

    def test_validation_measures_each_size_under_both_protocols(self) -> None:
        entries = listed(tiny.ROOT, "h200", "validation")
        protocols: dict[str, set[str]] = {}
        for entry in entries:
            protocols.setdefault(entry.id, set()).add(entry.protocol)
        assert len(protocols) >= 2
        assert set(map(frozenset, protocols.values())) == {frozenset({"full", "sampled"})}
        studys = [e for e in entries if e.protocol == "full" and e.configuration.height < 720]
        assert {(e.protocols.full.warmups, e.protocols.full.repetitions) for e in studys} == {(2, 5)}

    def test_kernels_measures_each_size_with_and_without_flash(self) -> None:
        kernels: dict[tuple[int, int], list[str | None]] = {}
        for entry in listed(tiny.ROOT, "h200", "kernels"):
            c = entry.configuration
            kernels.setdefault((c.height, c.width), []).append(c.attention_kernel)
            assert entry.id.endswith("__flash") == (c.attention_kernel == "flash")
        assert len(kernels) == 5
        assert all(found == [None, "flash"] for found in kernels.values())

    def test_steps_are_measured_whole(self) -> None:
        entries = listed(tiny.ROOT, "h200", "steps")
        assert {e.protocol for e in entries} == {"full"}
        assert all(e.protocols.full.warmup_steps == 1 for e in entries)
        assert {e.configuration.num_inference_steps for e in entries if e.configuration.height == 480} == {
            1, 2, 5, 10, 20, 50, 100, 200,
        }  # fmt: skip

    def test_settings_load(self) -> None:
        settings = load_settings(tiny.ROOT)
        assert settings.campaign == settings.paper_campaign == "h200"
        assert settings.prompts.count == 50
        assert (settings.protocols.full.warmups, settings.protocols.full.repetitions) == (2, 5)


class TestUnknownKeys:
    def test_in_a_nested_section_with_the_nearest(self, root: Path) -> None:
        path = rewrite(root, "config", measure={"batch_minuts": 3})
        text = message(load_settings, root)
        assert str(path) in text
        assert "unknown key 'measure.batch_minuts' (value 3)" in text
        assert "did you mean 'batch_minutes'?" in text

    def test_in_a_list(self, root: Path) -> None:
        rewrite(root, "campaigns/tiny", experiments=tiny.resolution(vary=[{"heigth": 32, "width": 32}]))
        text = message(listed, root, "tiny")
        assert "unknown key 'vary.0.heigth' (value 32)" in text
        assert "did you mean 'height'?" in text
        assert "config/campaigns/tiny.yaml, experiments.resolution" in text

    def test_in_a_component_by_its_alias(self, root: Path) -> None:
        path = root / "config" / "models" / "tiny-wan.yaml"
        path.write_text(path.read_text().replace("class: diffusers.AutoencoderKLWan", "clas: x"))
        text = message(load_model, root, "tiny-wan")
        assert "components.vae.class: Field required" in text

    def test_nothing_near_lists_what_is_known(self, root: Path) -> None:
        rewrite(root, "config", zzz=1)
        text = message(load_settings, root)
        assert "unknown key 'zzz' (value 1)" in text
        assert "known keys here: campaign, paper_campaign, paper_beside, prompts, measure, protocols" in text

    def test_several_are_counted(self, root: Path) -> None:
        rewrite(root, "config", zzz=1, yyy=2)
        assert "; and 1 more" in message(load_settings, root)


class TestWrongValues:
    @pytest.mark.parametrize(
        ("name", "changes", "place", "found"),
        [
            ("config", {"protocols": {"idle_s": "2 min"}}, "protocols.idle_s", "'2 min'"),
            ("config", {"protocols": {"idle_s": float("inf")}}, "protocols.idle_s", "inf"),
            ("config", {"protocols": {"sample_hz": 5}}, "protocols.sample_hz", "5"),
            ("config", {"prompts": {"count": 0}}, "prompts.count", "0"),
            ("config", {"campaign": "Not A Key"}, "campaign", "'Not A Key'"),
            ("campaigns/tiny", {"device": "tpu"}, "device", "'tpu'"),
            ("campaigns/tiny", {"passes": 1.5}, "passes", "1.5"),
        ],
    )
    def test_the_error_names_file_key_and_value(
        self, root: Path, name: str, changes: dict[str, Any], place: str, found: str
    ) -> None:
        path = rewrite(root, name, **changes)
        load = load_settings if name == "config" else lambda r: load_campaign(r, "tiny")
        text = message(load, root)
        assert text.startswith(f"{path}: {place}: ")
        assert f"(found {found})" in text
        assert "config/README.md" in text

    @pytest.mark.parametrize(
        ("size", "what"),
        [
            ({"height": -16}, "vary.0.height"),
            ({"width": "big"}, "vary.0.width"),
            ({"num_frames": 0}, "num_f"),
        ],
    )
    def test_sizes_that_are_none(self, root: Path, size: dict[str, Any], what: str) -> None:
        rewrite(root, "campaigns/tiny", experiments=tiny.resolution(vary=[size]))
        text = message(listed, root, "tiny")
        assert what in text
        assert f"(found {next(iter(size.values()))!r})" in text
        assert "config/campaigns/tiny.yaml" in text

    @pytest.mark.parametrize(
        ("size", "what", "remedy"),
        [
            ({"height": 250}, "height: 250 is not divisible by 16", "use 240 or 256"),
            ({"width": 8}, "width: 8 is not divisible by 16", "use 16"),
            ({"num_frames": 80}, "num_frames: 80 would be rounded", "4k + 1 frames; the nearest is 81"),
            ({"num_frames": 2}, "num_frames: 2 would be rounded", "the nearest is 1"),
            ({"num_frames": 82}, "num_frames: 82 would be rounded", "the nearest is 81"),
        ],
    )
    def test_sizes_that_the_model_cannot_run(
        self, root: Path, size: dict[str, Any], what: str, remedy: str
    ) -> None:
        rewrite(root, "campaigns/tiny", experiments=tiny.resolution(vary=[{}, size]))
        text = message(listed, root, "tiny")
        assert what in text
        assert remedy in text
        assert text.startswith("config/campaigns/tiny.yaml, experiments.resolution.vary[1]: ")

    def test_the_experiment_file_is_named_where_the_size_is_in_it(self, root: Path) -> None:
        path = rewrite(root, "experiments/resolution", vary=[{"height": 250}])
        text = message(listed, root, "h200")
        assert text.startswith(f"config/experiments/{path.name}, vary[0]: height: 250")

    def test_frames_without_an_offset(self) -> None:
        limits = config.Limits(size_multiple=16, frames_multiple=8, frames_offset=0)
        model = tiny.model().model_copy(update={"limits": limits})
        config.check_runnable(tiny.configuration(num_frames=16), model, "x")
        text = message(config.check_runnable, tiny.configuration(num_frames=1), model, "x")
        assert "the nearest is 8" in text

    @pytest.mark.parametrize(
        ("key", "scale", "what", "remedy"),
        [
            (
                "cogvideox-2b",
                1.0,
                "1 switches guidance off; a step then makes one pass",
                "`batch_per_pass: 1`",
            ),
            ("wan2.1-t2v-1.3b", 1.0, "1 switches guidance off", "`passes_per_step: 1`"),
            ("animatediff-lightning", 7.5, "7.5 switches guidance on", "use a scale of 1"),
        ],
    )
    def test_guidance_that_the_model_is_not_counted_with(
        self, key: str, scale: float, what: str, remedy: str
    ) -> None:
        model = load_model(tiny.ROOT, key)
        values = {"model": key, **model.defaults.model_dump(exclude={"fps"})}
        config.check_runnable(Configuration(**values), model, "x")
        text = message(config.check_runnable, Configuration(**values | {"guidance_scale": scale}), model, "x")
        assert what in text
        assert remedy in text

    def test_more_frames_than_there_are_positions(self) -> None:
        model = load_model(tiny.ROOT, "animatediff-lightning")
        asked = Configuration(**{"model": model.key, **model.defaults.model_dump(exclude={"fps"})})
        config.check_runnable(asked.model_copy(update={"num_frames": 32}), model, "x")
        text = message(config.check_runnable, asked.model_copy(update={"num_frames": 33}), model, "x")
        assert "num_frames: 33 are more than animatediff-lightning can make" in text
        assert "use 32 or fewer" in text


class TestModelFiles:
    def test_the_denoiser_must_be_timed(self, root: Path) -> None:
        text = self.rewritten(root, "  denoiser: transformer.forward", "  transformer: transformer.forward")
        assert "`denoiser` is missing" in text

    def rewritten(self, root: Path, old: str, new: str) -> str:
        path = root / "config" / "models" / "wan2.1-t2v-1.3b.yaml"
        before = path.read_text()
        assert old in before
        path.write_text(before.replace(old, new))
        text = message(load_model, root, "wan2.1-t2v-1.3b")
        assert str(path) in text
        return text

    def test_a_revision_that_pins_nothing(self, root: Path) -> None:
        text = self.rewritten(root, "revision: 0fad780a534b6463e45facd96134c9f345acfa5b", "revision: main")
        assert "hub.revision" in text
        assert "(found 'main')" in text

    @pytest.mark.parametrize(
        "name",
        [
            *["os.system", "subprocess.Popen", "diffusers.utils.Run", "diffusers.run"],
            *["t2v_energy.models.contentv.VideoPatchEmbed", "t2v_energy.models.build.Path"],
            "t2v_energy.models.contentv.ContentVTransformer3DModel.load",
        ],
    )
    def test_a_class_of_another_library(self, root: Path, name: str) -> None:
        text = self.rewritten(root, "class: diffusers.WanTransformer3DModel", f"class: {name}")
        assert "components.transformer.class" in text
        assert "must be diffusers.<Class> or transformers.<Class>" in text
        assert f"(found '{name}')" in text

    def test_a_stage_of_several_parts(self, root: Path) -> None:
        model = load_model(root, "contentv-8b")
        assert model.stage_parts("text_encoder") == ("text_encoder", "text_encoder_2", "text_encoder_3")
        assert model.stage_parts("denoiser") == (model.denoiser_part,) == ("transformer",)

    @pytest.mark.parametrize(
        ("path", "problem"),
        [
            ("[transformer.forward, vae.decode]", "spans.denoiser: must be the calls of one part"),
            ("[]", "spans.denoiser"),
        ],
    )
    def test_a_denoiser_of_several_parts(self, root: Path, path: str, problem: str) -> None:
        assert problem in self.rewritten(root, "denoiser: transformer.forward", f"denoiser: {path}")

    def test_a_tokenizer_of_another_name(self, root: Path) -> None:
        other = "other_tokenizers:\n  tokenizer2: {vocab_size: 9, max_length: 9}\ntokenizer: "
        assert "other_tokenizers.tokenizer2" in self.rewritten(root, "tokenizer: ", other)

    def test_a_path_that_is_no_method_of_a_part(self, root: Path) -> None:
        text = self.rewritten(root, "vae_decode: vae.decode", "vae_decode: vae.__class__.decode")
        assert "spans.vae_decode" in text

    def test_what_a_record_says_of_the_weights(self) -> None:
        wan = load_model(tiny.ROOT, "wan2.1-t2v-1.3b")
        assert describe_weights(wan, "random", 7) == "random, seed 7"
        assert describe_weights(wan, "pretrained", 7) == (
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers@0fad780a534b6463e45facd96134c9f345acfa5b"
        )
        ltx = load_model(tiny.ROOT, "ltx-video-0.9.7-dev")
        assert describe_weights(ltx, "pretrained", 7) == (
            "Lightricks/LTX-Video-0.9.7-dev@2101082f5eb5540770a2df43747feadb6f69b889 + "
            "Lightricks/ltxv-spatial-upscaler-0.9.7@c96c168c2bd8bbc82c9fe8259e5f89f8b2ea293f"
        )


class TestFiles:
    def test_a_key_that_differs_from_the_file(self, root: Path) -> None:
        path = rewrite(root, "campaigns/tiny", key="other")
        text = message(load_campaign, root, "tiny")
        assert f"{path}: key: 'other' differs from the file's name" in text
        assert "write `key: tiny`" in text
        rewrite(root, "experiments/resolution", key="frames")
        assert "key: 'frames' differs" in message(
            load_experiment, root, load_campaign(root, "h200"), "resolution"
        )

    @pytest.mark.parametrize(
        ("load", "what", "near"),
        [
            (lambda r: load_model(r, "tiny-wam"), "there is no model 'tiny-wam'", "'tiny-wan'"),
            (lambda r: load_campaign(r, "smok"), "there is no campaign 'smok'", "'smoke'"),
            (
                lambda r: load_experiment(r, load_campaign(r, "tiny"), "resolutoin"),
                "there is no experiment 'resolutoin'",
                "'resolution'",
            ),
            (lambda r: load_accelerator(r, "h20"), "unknown accelerator 'h20'", "'h200' or 'h100-sxm'"),
        ],
    )
    def test_unknown_names_suggest_the_nearest(self, root: Path, load: Any, what: str, near: str) -> None:
        text = message(load, root)
        assert what in text
        assert f"did you mean {near}?" in text
        assert "known: " in text

    def test_nothing_near_and_nothing_there(self, tmp_path: Path) -> None:
        text = message(load_campaign, tmp_path, "x")
        assert "known: none" in text
        assert "did you mean" not in text

    def test_no_settings(self, tmp_path: Path) -> None:
        text = message(load_settings, tmp_path)
        assert str(tmp_path / "config" / "config.yaml") in text
        assert "give --root" in text

    @pytest.mark.parametrize(
        ("content", "what"),
        [(b"campaign: [", "not valid YAML"), (b"\xff\xfe\x00", "not valid YAML"), (b"- a\n", "a mapping")],
    )
    def test_files_that_are_no_configuration(self, root: Path, content: bytes, what: str) -> None:
        path = root / "config" / "config.yaml"
        path.write_bytes(content)
        text = message(load_settings, root)
        assert text.startswith(f"{path}: ")
        assert what in text

    def test_overrides_are_named_in_errors(self, root: Path) -> None:
        assert load_settings(root, {"campaign": "smoke"}).campaign == "smoke"
        assert "config.yaml with --config" in message(load_settings, root, {"campain": "smoke"})


class TestLayers:
    def test_a_campaign_changes_its_experiment(self, root: Path) -> None:
        experiment = load_experiment(root, load_campaign(root, "tiny"), "resolution")
        assert (experiment.model, experiment.protocol) == ("tiny-wan", "sampled")
        assert experiment.fixed.num_frames == 5
        assert experiment.title == load_experiment(root, load_campaign(root, "h200"), "resolution").title

    def test_a_configuration_has_model_defaults_fixed_and_varied_values(self, root: Path) -> None:
        by_id = {entry.id: entry.configuration for entry in listed(root, "tiny")}
        assert by_id["tiny-wan_32x48_5f_2s"] == Configuration(
            model="tiny-wan",
            height=32,
            width=48,
            num_frames=5,
            num_inference_steps=2,
            guidance_scale=5.0,
            seed=3,
        )

    def test_a_campaign_changes_the_protocols_key_by_key(self, root: Path) -> None:
        settings = tiny.settings(root)
        laid = protocol_settings(settings, load_campaign(root, "tiny"))
        assert laid.idle_s == 0.2
        assert laid.sampled.generations == 2
        assert laid.sampled.warmup_steps == settings.protocols.sampled.warmup_steps
        assert laid.full == settings.protocols.full

    def test_a_wrong_protocol_names_the_campaign(self, root: Path) -> None:
        rewrite(root, "campaigns/tiny", protocols={"sampled": {"generation": 3}})
        text = message(protocol_settings, tiny.settings(root), load_campaign(root, "tiny"))
        assert text.startswith("config/campaigns/tiny.yaml, protocols: unknown key 'sampled.generation'")
        assert "did you mean 'generations'?" in text

    def test_merged_goes_section_by_section(self) -> None:
        base = {"a": {"b": 1, "c": 2}, "d": 3}
        assert merged(base, {"a": {"c": 4}, "d": {"e": 5}}) == {"a": {"b": 1, "c": 4}, "d": {"e": 5}}
        assert base == {"a": {"b": 1, "c": 2}, "d": 3}

    def test_a_campaign_leaves_configurations_out(self, root: Path) -> None:
        names = [entry.id for entry in listed(root, "tiny")]
        rewrite(root, "campaigns/tiny", experiments=tiny.resolution(without=names[:2]))
        assert [entry.id for entry in listed(root, "tiny")] == names[2:]
        rewrite(root, "campaigns/tiny", experiments=tiny.resolution(without=["tiny-wan_32x33_5f_2s"]))
        text = message(listed, root, "tiny")
        assert text.startswith("config/campaigns/tiny.yaml, experiments.resolution, without: tiny-wan_32x33")
        assert f"name one of them: {', '.join(sorted(names))}" in text
        rewrite(root, "campaigns/tiny", experiments=tiny.resolution(without=names))
        assert "no configuration is left" in message(listed, root, "tiny")

    def test_a_configuration_that_is_listed_twice(self, root: Path) -> None:
        size = {"height": 32, "width": 32}
        rewrite(root, "campaigns/tiny", experiments=tiny.resolution(vary=[size, {}, size]))
        text = message(listed, root, "tiny")
        assert "tiny-wan_32x32_5f_2s is listed twice" in text
        assert "vary[2]" in text


class TestModelsOfAnExperiment:
    def test_an_entry_has_its_own_models_defaults(self, root: Path) -> None:
        vary = [{}, {"model": "tiny-mochi", "num_frames": 13}]
        rewrite(root, "campaigns/tiny", experiments=tiny.resolution(vary=vary, fixed={"height": 32}))
        wan, mochi = (entry.configuration for entry in listed(root, "tiny"))
        assert (wan.model, wan.height, wan.num_frames, wan.guidance_scale) == ("tiny-wan", 32, 9, 5.0)
        assert (mochi.model, mochi.height, mochi.num_frames) == ("tiny-mochi", 32, 13)
        assert (mochi.guidance_scale, mochi.width) == (4.5, 64)

    def test_it_is_checked_against_its_own_models_limits(self, root: Path) -> None:
        rewrite(root, "campaigns/tiny", experiments=tiny.resolution(vary=[{"model": "tiny-mochi"}]))
        text = message(listed, root, "tiny")  # 5 frames, which Wan makes
        assert "num_frames: 5 would be rounded in silence by MochiPipeline" in text

    def test_models_without_one_of_the_experiments(self, root: Path) -> None:
        vary = [{"model": "tiny-mochi"}, {"model": "tiny-wan"}, {"model": "tiny-mochi", "num_frames": 13}]
        changes = {"model": None, "vary": vary, "fixed": {}}
        rewrite(root, "campaigns/tiny", experiments=tiny.resolution(**changes))
        assert [e.configuration.model for e in listed(root, "tiny")] == [v["model"] for v in vary]
        experiment = load_experiment(root, load_campaign(root, "tiny"), "resolution")
        assert experiment.models == ("tiny-mochi", "tiny-wan")

    def test_an_entry_without_any(self, root: Path) -> None:
        changes = {"model": None, "vary": [{"model": "tiny-wan"}, {}]}
        rewrite(root, "campaigns/tiny", experiments=tiny.resolution(**changes))
        text = message(listed, root, "tiny")
        assert "vary[1] names no model, and neither does the experiment" in text


class TestEntries:
    """How one entry of a sweep is measured where that is not the experiment's way."""

    SIZE: ClassVar = {"height": 32, "width": 32}
    WIDER: ClassVar = {"height": 32, "width": 48}

    def test_an_entry_inherits_protocol_settings_and_passes(self, root: Path) -> None:
        (entry,) = tiny_entries(root, self.SIZE, passes=3)
        assert (entry.protocol, entry.passes) == ("sampled", 3)
        assert entry.protocols == protocol_settings(load_settings(root), load_campaign(root, "tiny"))

    def test_passes_of_the_entry_before_the_experiments_before_the_campaigns(self, root: Path) -> None:
        entries = tiny_entries(root, self.SIZE, self.WIDER | {"passes": 1}, passes=5)
        assert [e.passes for e in entries] == [5, 1]
        rewrite(
            root,
            "campaigns/tiny",
            experiments=tiny.resolution(vary=[self.SIZE, self.WIDER | {"passes": 4}], passes=2),
            passes=5,
        )
        assert [e.passes for e in listed(root, "tiny")] == [2, 4]

    def test_protocols_are_laid_value_by_value(self, root: Path) -> None:
        experiment = {"idle_s": 0.3, "sampled": {"min_steps": 5, "generations": 1}}
        own = {"sampled": {"generations": 2, "warmup_calls": 1}, "full": {"warmup_steps": 1}}
        plain, changed = tiny_entries(root, self.SIZE, self.WIDER | {"protocols": own}, protocols=experiment)
        campaign = protocol_settings(load_settings(root), load_campaign(root, "tiny"))
        assert (plain.protocols.idle_s, changed.protocols.idle_s) == (0.3, 0.3)
        assert (plain.protocols.sampled.min_steps, changed.protocols.sampled.min_steps) == (5, 5)
        assert (plain.protocols.sampled.generations, changed.protocols.sampled.generations) == (1, 2)
        assert (plain.protocols.sampled.warmup_calls, changed.protocols.sampled.warmup_calls) == (None, 1)
        assert (plain.protocols.full, changed.protocols.full.warmup_steps) == (campaign.full, 1)
        # what neither sets is the campaign's
        assert changed.protocols.sampled.min_window_s == campaign.sampled.min_window_s == 0.01
        assert changed.protocols.full.repetitions == 5

    def test_how_it_is_measured_is_no_part_of_the_configuration(self, root: Path) -> None:
        how = {"passes": 2, "protocol": "full", "protocols": {"idle_s": 0.3}}
        plain, changed = tiny_entries(root, self.SIZE, self.SIZE | how)
        assert plain.id == changed.id == "tiny-wan_32x32_5f_2s"
        assert plain.configuration == changed.configuration
        assert (plain.protocol, changed.protocol) == ("sampled", "full")

    def test_both_protocols_but_neither_twice(self, root: Path) -> None:
        with pytest.raises(UserError, match="tiny-wan_32x32_5f_2s is listed twice") as caught:
            tiny_entries(
                root, self.SIZE, self.SIZE | {"protocol": "full"}, self.SIZE | {"protocol": "sampled"}
            )
        assert caught.value.where == "config/campaigns/tiny.yaml, experiments.resolution.vary[2]"

    @pytest.mark.parametrize(
        ("vary", "changes", "where", "what"),
        [
            ({"protocols": {"sampled": {"generation": 2}}}, {}, ".vary[0], protocols", "sampled.generation"),
            ({"protocols": {"idle_s": -1}}, {}, ".vary[0], protocols", "idle_s: "),
            ({"protocols": {"sampled": {"generations": 0}}}, {}, ".vary[0], protocols", "found 0"),
            ({"protocols": {"sampled": {"warmup_calls": 0}}}, {}, ".vary[0], protocols", "found 0"),
            ({"protocols": {"full": {"warmup_steps": 0}}}, {}, ".vary[0], protocols", "found 0"),
            ({}, {"protocols": {"ful": {}}}, ", protocols", "'ful'"),
            ({"passes": 0}, {}, "", "vary.0.passes"),
            ({"protocol": "half"}, {}, "", "vary.0.protocol"),
        ],
    )
    def test_wrong_ones_are_told_where_they_are_written(
        self, root: Path, vary: dict[str, Any], changes: dict[str, Any], where: str, what: str
    ) -> None:
        with pytest.raises(UserError) as caught:
            tiny_entries(root, self.SIZE | vary, **changes)
        assert caught.value.where.endswith(f"experiments.resolution{where}")
        assert what in caught.value.what

    @pytest.mark.parametrize("key", ["sample_hz", "poll_s"])
    def test_the_meter_is_the_campaigns(self, root: Path, key: str) -> None:
        """It runs through a whole batch: a record must not state what its own entry alone asked for."""
        value = {"sample_hz": 50.0, "poll_s": 0.005}[key]
        for vary, changes in (
            (self.SIZE | {"protocols": {key: value}}, {}),
            (self.SIZE, {"protocols": {key: value}}),
        ):
            with pytest.raises(UserError, match=f"{key} cannot differ") as caught:
                tiny_entries(root, vary, **changes)
            assert "config/campaigns/tiny.yaml" in caught.value.remedy

    def test_an_unknown_intervention_with_the_nearest(self, root: Path) -> None:
        with pytest.raises(UserError, match="there is no 'vae-tilling'") as caught:
            tiny_entries(root, {}, self.SIZE | {"interventions": ["vae-tilling"]})
        assert caught.value.where == "config/campaigns/tiny.yaml, experiments.resolution.vary[1]"
        assert caught.value.remedy.startswith("did you mean 'vae-tiling'? known: ")

    def test_interventions_are_part_of_the_configuration(self, root: Path) -> None:
        size = self.SIZE | {"width": 272}
        plain, tiled = tiny_entries(root, size, size | {"interventions": ["vae-tiling"]})
        assert (plain.configuration.interventions, tiled.configuration.interventions) == ((), ("vae-tiling",))
        assert tiled.id == f"{plain.id}__vae-tiling"

    def test_one_that_does_not_fit_is_refused_before_anything_is_measured(self, root: Path) -> None:
        with pytest.raises(UserError, match="fits into one tile, so nothing would change") as caught:
            tiny_entries(root, {}, self.SIZE | {"interventions": ["vae-tiling"]})
        assert caught.value.where == "config/campaigns/tiny.yaml, experiments.resolution.vary[1], vae-tiling"


class TestIds:
    def test_the_contract(self) -> None:
        base = tiny.configuration()
        assert base.id() == base.id(base) == "tiny-wan_32x32_5f_4s"
        other = tiny.configuration(height=16, width=48, num_frames=9, num_inference_steps=50)
        assert other.id(base) == "tiny-wan_16x48_9f_50s"

    def test_prompt_kernel_and_interventions_only_where_they_are_not_the_default(self) -> None:
        base = tiny.configuration(prompt="p001", attention_kernel="flash")
        assert base.id(base) == "tiny-wan_32x32_5f_4s"
        assert base.id() == "tiny-wan_32x32_5f_4s_pp001__flash"
        assert tiny.configuration(prompt="p002").id(base) == "tiny-wan_32x32_5f_4s_pp002__default"
        changed = base.model_copy(update={"interventions": ("token-merging", "cache")})
        assert changed.id(base) == "tiny-wan_32x32_5f_4s__token-merging+cache"
        cudnn = base.model_copy(update={"attention_kernel": "cudnn", "interventions": ("cache",)})
        assert cudnn.id(base) == "tiny-wan_32x32_5f_4s__cudnn__cache"

    def test_objects_are_frozen(self) -> None:
        with pytest.raises(ValueError, match="frozen"):
            tiny.configuration().height = 64  # type: ignore[misc]

    def test_parse_gives_the_object(self) -> None:
        assert parse(config.Hub, {"id": "a/b", "revision": "0" * 40}, "x").id == "a/b"


def test_guidance_that_is_off_is_refused_where_passes_are_counted_with_it(tmp_path: Path) -> None:
    root = tiny.make_root(
        tmp_path / "root", experiments=tiny.resolution(vary=[{"height": 32, "guidance_scale": 1}])
    )
    with pytest.raises(UserError, match="switches guidance off"):
        listed(root, "tiny", "resolution")


def test_the_most_generations_are_no_fewer_than_the_least(tmp_path: Path) -> None:
    protocols = {"sampled": {"generations": 9, "max_generations": 8}}
    root = tiny.make_root(tmp_path / "root", protocols=protocols)
    with pytest.raises(UserError, match="max_generations is below generations"):
        listed(root, "tiny", "resolution")


def test_the_most_repetitions_are_no_fewer_than_the_least(tmp_path: Path) -> None:
    root = tiny.make_root(tmp_path / "root", protocols={"full": {"repetitions": 5, "max_repetitions": 4}})
    with pytest.raises(UserError, match="max_repetitions is below repetitions"):
        listed(root, "tiny", "resolution")
