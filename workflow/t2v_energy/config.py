"""The typed, strict configuration: files under ``config/`` become frozen objects, or a readable error.

Every unknown key, wrong type, wrong unit or size that the model cannot run raises
:class:`~t2v_energy.errors.UserError`, which names the file, the key, the value and the nearest valid one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from t2v_energy.errors import UserError

T = TypeVar("T", bound=BaseModel)
KEY_PATTERN = r"^[a-z0-9]+([.-][a-z0-9]+)*$"
Protocol = Literal["full", "sampled"]
AttentionKernel = Literal["cudnn", "flash", "efficient", "math", "sage"]
Key = Annotated[str, Field(pattern=KEY_PATTERN)]
Positive = Annotated[float, Field(gt=0)]


def _an_importable_class(value: str) -> str:
    """Only classes of the two model libraries can be named: a configuration file runs no other code."""
    if not re.fullmatch(r"(diffusers|transformers)\.[A-Z]\w*", value):
        raise ValueError("must be diffusers.<Class> or transformers.<Class>")
    return value


class Strict(BaseModel):
    """Base of every configuration section: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# --- config/models/*.yaml -----------------------------------------------------------------------------


class Hub(Strict):
    """Where the published weights are; the revision is pinned so that they cannot change."""

    id: str
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]


class Component(Strict):
    """One part of a pipeline: its class, its published configuration and its weights' type."""

    class_: Annotated[str, Field(alias="class"), AfterValidator(_an_importable_class)]
    config: dict[str, Any] = {}
    dtype: Literal["float32", "bfloat16", "float16"] | None = None


class Tokenizer(Strict):
    """The sizes of the model's tokenizer, for the stand-in used when no hub is reachable."""

    vocab_size: Annotated[int, Field(gt=2)]
    max_length: Annotated[int, Field(gt=0)]


class Defaults(Strict):
    """The settings that the model card recommends."""

    height: Annotated[int, Field(gt=0)]
    width: Annotated[int, Field(gt=0)]
    num_frames: Annotated[int, Field(gt=0)]
    num_inference_steps: Annotated[int, Field(gt=0)]
    guidance_scale: Annotated[float, Field(ge=1)]
    fps: Positive


class Limits(Strict):
    """What the pipeline accepts: sides divisible by ``size_multiple``; frames = multiple·k + offset."""

    size_multiple: Annotated[int, Field(gt=0)]
    frames_multiple: Annotated[int, Field(gt=0)]
    frames_offset: Annotated[int, Field(ge=0)]


class ModelFile(Strict):
    """One model: what it is built of, how it is run, and which of its calls are timed."""

    key: Key
    title: str
    architecture: Literal["wan"]
    hub: Hub | None = None
    pipeline: Annotated[str, Field(pattern=r"^[A-Z]\w*Pipeline$")]
    components: dict[str, Component]
    tokenizer: Tokenizer
    defaults: Defaults
    negative_prompt: str = ""
    passes_per_step: Annotated[int, Field(ge=1, le=2)]
    limits: Limits
    spans: dict[str, Annotated[str, Field(pattern=r"^[a-z_]+\.[a-z_]+$")]]


# --- config/accelerators.yaml -------------------------------------------------------------------------


class Printed(Strict):
    """The values that the study's table 7 prints, kept beside the vendor's."""

    peak_TFLOPs: Positive
    bandwidth_TB_per_s: Positive


class Accelerator(Strict):
    """Published limits of one accelerator; ``efficiency`` is a constant of the first, simple prediction."""

    title: str
    peak_bf16_dense_TFLOPs: Positive
    bandwidth_TB_per_s: Positive
    board_power_W: Positive
    memory_GiB: Positive
    efficiency: Annotated[float, Field(gt=0, le=1)]
    vae_TFLOPs: Positive
    sustained_power_fraction: Annotated[float, Field(gt=0, le=1)]
    source: str
    nominal: bool = False
    printed: Printed | None = None


# --- protocols ----------------------------------------------------------------------------------------


class FullProtocol(Strict):
    """The study's protocol: whole generations, first to warm up, then measured."""

    warmups: Annotated[int, Field(ge=1)] = 2
    repetitions: Annotated[int, Field(ge=1)] = 5


class SampledProtocol(Strict):
    """Generations cut after some denoising steps; the total for S steps is composed from them."""

    warmup_steps: Annotated[int, Field(ge=1)] = 1
    min_steps: Annotated[int, Field(ge=1)] = 2
    min_window_s: Positive = 4.0
    generations: Annotated[int, Field(ge=2)] = 3
    max_generations: Annotated[int, Field(ge=2)] = 8
    max_step_sem_percent: Positive = 0.3
    max_ci95_percent: Positive = 1.0


class ProtocolSettings(Strict):
    """How measurements are taken; the record keeps a copy."""

    idle_s: Annotated[float, Field(ge=0.2)] = 2.0
    sample_hz: Annotated[float, Field(ge=10, le=200)] = 20.0
    poll_s: Annotated[float, Field(gt=0, le=0.02)] = 0.002
    full: FullProtocol = FullProtocol()
    sampled: SampledProtocol = SampledProtocol()


# --- experiments and campaigns ------------------------------------------------------------------------


class Variation(Strict):
    """The part of a configuration that a sweep fixes or varies; what is absent is the model's default."""

    height: Annotated[int, Field(gt=0)] | None = None
    width: Annotated[int, Field(gt=0)] | None = None
    num_frames: Annotated[int, Field(gt=0)] | None = None
    num_inference_steps: Annotated[int, Field(gt=0)] | None = None
    guidance_scale: Annotated[float, Field(ge=1)] | None = None
    attention_kernel: AttentionKernel | None = None
    prompt: str | None = None


class Experiment(Strict):
    """One sweep: a model, what it holds fixed, and the list of what it varies."""

    key: Key
    title: str
    protocol: Protocol
    model: Key
    fixed: Variation = Variation()
    vary: Annotated[tuple[Variation, ...], Field(min_length=1)]


class Campaign(Strict):
    """Measurements from one GPU model (or the CPU)."""

    key: Key
    title: str
    accelerator: Key
    device: Literal["cuda", "cpu"]
    gpu_name: str | None = None
    weights: Literal["random", "pretrained"] = "random"
    passes: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=0)] = 0
    protocols: dict[str, Any] = {}
    experiments: dict[Key, dict[str, Any]]


# --- config/config.yaml -------------------------------------------------------------------------------


class PromptSettings(Strict):
    """Stage 1: how many prompts, from which seed, or the user's own file."""

    count: Annotated[int, Field(ge=1)] = 50
    seed: Annotated[int, Field(ge=0)] = 0
    file: str | None = None


class MeasureSettings(Strict):
    """Stage 2: how measuring is cut into jobs, and whether the GPU may be shared."""

    batch_minutes: Annotated[float, Field(ge=0)] = 10
    allow_shared: bool = False


class Settings(Strict):
    """The whole of config/config.yaml."""

    campaign: Key
    paper_campaign: Key
    prompts: PromptSettings = PromptSettings()
    measure: MeasureSettings = MeasureSettings()
    protocols: ProtocolSettings = ProtocolSettings()


# --- one measurable configuration ---------------------------------------------------------------------


class Configuration(Strict):
    """Everything that decides what one generation costs.

    ``attention_kernel`` None lets torch choose; the record says what really ran.
    """

    model: Key
    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    attention_kernel: AttentionKernel | None = None
    interventions: tuple[str, ...] = ()
    prompt: str = "p000"
    seed: int = 0

    def id(self, base: Configuration | None = None) -> str:
        """The readable, stable name of ``contracts.md``; ``base`` is the experiment's default."""
        kernel = base.attention_kernel if base else None
        prompt = base.prompt if base else "p000"
        name = (
            f"{self.model}_{self.height}x{self.width}_{self.num_frames}f_{self.num_inference_steps}s"
            + (f"_p{self.prompt}" if self.prompt != prompt else "")
            + (f"__{self.attention_kernel or 'default'}" if self.attention_kernel != kernel else "")
        )
        return name + (f"__{'+'.join(self.interventions)}" if self.interventions else "")


def describe_weights(model: ModelFile, weights: str, seed: int) -> str:
    """What a record says of the weights: ``random, seed N`` or the hub id and revision."""
    if weights == "random" or model.hub is None:
        return f"random, seed {seed}"
    return f"{model.hub.id}@{model.hub.revision}"


# --- reading ------------------------------------------------------------------------------------------


def _read_yaml(path: Path, remedy: str) -> dict[str, Any]:
    if not path.is_file():
        raise UserError("there is no such file", where=str(path), remedy=remedy)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"not valid YAML: {error}", where=str(path), remedy="mend the file's syntax"
        ) from error
    if not isinstance(data, dict):
        raise UserError(
            "must be a mapping of keys to values", where=str(path), remedy="see config/README.md for its keys"
        )
    return data


def _fields_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Valid keys of the section that a validation error points into, for suggesting the nearest."""
    for part in location:
        field = model.model_fields.get(str(part))
        annotation = getattr(field, "annotation", None)
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        nested = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if nested is not None:
            model = nested
    return [f.alias or name for name, f in model.model_fields.items()]


def parse(model: type[T], data: Mapping[str, Any], where: str) -> T:
    """Validate ``data`` as ``model``; the first problem becomes a :class:`UserError` that names it."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            unknown = str(first["loc"][-1])
            known = _fields_at(model, first["loc"][:-1])
            near = difflib.get_close_matches(unknown, known, n=1, cutoff=0.5)
            what = f"unknown key {location!r} (value {first['input']!r})"
            remedy = f"did you mean {near[0]!r}?" if near else f"known keys here: {', '.join(known)}"
        else:
            what = f"{location}: {first['msg']} (found {first['input']!r})"
            remedy = "config/README.md gives each key's type, unit and default"
        more = len(error.errors()) - 1
        raise UserError(what + (f"; and {more} more" if more else ""), where=where, remedy=remedy) from None


def _named(folder: Path, key: str) -> Path:
    """The file of ``key``, or an error that suggests the nearest one present."""
    path = folder / f"{key}.yaml"
    if path.is_file():
        return path
    present = sorted(p.stem for p in folder.glob("*.yaml"))
    near = difflib.get_close_matches(key, present, n=1, cutoff=0.4)
    raise UserError(
        f"there is no {folder.name.removesuffix('s')} {key!r}",
        where=str(folder),
        remedy=(f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(present) or 'none'}",
    )


def _load_named(model: type[T], folder: Path, key: str) -> T:
    path = _named(folder, key)
    loaded = parse(model, _read_yaml(path, "create it"), str(path))
    if loaded.key != key:  # type: ignore[attr-defined]
        raise UserError(
            f"key: {loaded.key!r} differs from the file's name",  # type: ignore[attr-defined]
            where=str(path),
            remedy=f"write `key: {key}`",
        )
    return loaded


@cache
def load_model(root: Path, key: str) -> ModelFile:
    """config/models/<key>.yaml."""
    return _load_named(ModelFile, root / "config" / "models", key)


@cache
def load_accelerators(root: Path) -> dict[str, Accelerator]:
    """config/accelerators.yaml: accelerator by key."""
    path = root / "config" / "accelerators.yaml"
    return {
        key: parse(Accelerator, value, f"{path}, {key}")
        for key, value in _read_yaml(path, "restore it from the repository").items()
    }


def load_accelerator(root: Path, key: str) -> Accelerator:
    """One accelerator; an unknown key suggests the nearest."""
    known = load_accelerators(root)
    if key not in known:
        near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.3)
        raise UserError(
            f"unknown accelerator {key!r}",
            where="config/accelerators.yaml",
            remedy=(f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(known)}",
        )
    return known[key]


def load_campaign(root: Path, key: str) -> Campaign:
    """config/campaigns/<key>.yaml."""
    return _load_named(Campaign, root / "config" / "campaigns", key)


def load_experiment(root: Path, campaign: Campaign, key: str) -> Experiment:
    """config/experiments/<key>.yaml with the campaign's own values laid over it."""
    path = _named(root / "config" / "experiments", key)
    own = campaign.experiments.get(key, {})
    where = str(path) + (f" with config/campaigns/{campaign.key}.yaml, experiments.{key}" if own else "")
    loaded = parse(Experiment, _read_yaml(path, "create it") | own, where)
    if loaded.key != key:
        raise UserError(
            f"key: {loaded.key!r} differs from the file's name", where=where, remedy=f"write `key: {key}`"
        )
    return loaded


def load_settings(root: Path, overrides: Mapping[str, Any] | None = None) -> Settings:
    """config/config.yaml; ``overrides`` replace whole top-level keys, as Snakemake's --config does."""
    path = root / "config" / "config.yaml"
    data = _read_yaml(path, "run from the repository's root, or give --root") | dict(overrides or {})
    return parse(Settings, data, str(path) + (" with --config" if overrides else ""))


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``over`` laid on top, section by section."""
    result = dict(base)
    for key, value in over.items():
        inner = result.get(key)
        result[key] = (
            merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
        )
    return result


def protocol_settings(settings: Settings, campaign: Campaign) -> ProtocolSettings:
    """The protocols of config.yaml with the campaign's own values laid over them."""
    return parse(
        ProtocolSettings,
        merged(settings.protocols.model_dump(), campaign.protocols),
        f"config/campaigns/{campaign.key}.yaml, protocols",
    )


# --- from an experiment to its configurations ---------------------------------------------------------


def check_runnable(configuration: Configuration, model: ModelFile, where: str) -> None:
    """Raise unless the model runs this size and length as asked, without rounding it in silence."""
    limits = model.limits
    for name in ("height", "width"):
        value, multiple = getattr(configuration, name), limits.size_multiple
        if value % multiple:
            below, above = value // multiple * multiple, (value // multiple + 1) * multiple
            valid = f"{below} or {above}" if below else f"{above}"
            raise UserError(
                f"{name}: {value} is not divisible by {multiple}, which {model.key} needs",
                where=where,
                remedy=f"use {valid}",
            )
    frames, step, offset = configuration.num_frames, limits.frames_multiple, limits.frames_offset
    if frames < max(offset, 1) or (frames - offset) % step:
        nearest = max(round((frames - offset) / step) * step + offset, offset or step)
        raise UserError(
            f"num_frames: {frames} would be rounded in silence by {model.pipeline}",
            where=where,
            remedy=f"{model.key} makes {step}k + {offset} frames; the nearest is {nearest}",
        )


def base_configuration(experiment: Experiment, model: ModelFile, seed: int) -> Configuration:
    """The experiment's default: the model's defaults with the experiment's fixed values."""
    defaults = model.defaults.model_dump(exclude={"fps"})
    return Configuration(
        **{"model": model.key, "seed": seed, **defaults, **experiment.fixed.model_dump(exclude_none=True)}
    )


def configurations(root: Path, campaign: Campaign, key: str) -> list[tuple[str, Configuration]]:
    """Every configuration of one experiment with its id, in the order of the file.

    Raises :class:`UserError` for sizes the model cannot run and for configurations listed twice.
    """
    experiment = load_experiment(root, campaign, key)
    model = load_model(root, experiment.model)
    base = base_configuration(experiment, model, campaign.seed)
    found: dict[str, Configuration] = {}
    listing = f"config/experiments/{key}.yaml, vary"
    if "vary" in campaign.experiments[key]:
        listing = f"config/campaigns/{campaign.key}.yaml, experiments.{key}.vary"
    for index, variation in enumerate(experiment.vary):
        where = f"{listing}[{index}]"
        configuration = base.model_copy(update=variation.model_dump(exclude_none=True))
        check_runnable(configuration, model, where)
        name = configuration.id(base)
        if name in found:
            raise UserError(f"{name} is listed twice", where=where, remedy="remove one of the two")
        found[name] = configuration
    return list(found.items())
