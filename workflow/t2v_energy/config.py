"""The typed, strict configuration: files under ``config/`` become frozen objects, or a readable error.

Every unknown key, wrong type, wrong unit or size that the model cannot run raises
:class:`~t2v_energy.errors.UserError`, which names the file, the key, the value and the nearest valid one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from t2v_energy.errors import UserError

T = TypeVar("T", bound=BaseModel)
KEY_PATTERN = r"^[a-z0-9]+([.-][a-z0-9]+)*$"
Protocol = Literal["full", "sampled"]
AttentionKernel = Literal["cudnn", "flash", "efficient", "math", "sage"]
NeighbourCondition = Literal["idle", "busy"]
Key = Annotated[str, Field(pattern=KEY_PATTERN)]
Positive = Annotated[float, Field(gt=0)]
CallPath = Annotated[str, Field(pattern=r"^[a-z_]+[2-9]?\.[a-z_]+$")]
"""``<part>.<method>``; a pipeline's further parts of a kind are numbered, as ``text_encoder_2`` is."""


OWN_CLASSES = ("t2v_energy.models.contentv.ContentVTransformer3DModel",)
"""Parts of a pipeline that the model libraries do not have and this package does."""


def _an_importable_class(value: str) -> str:
    """Only classes of the two model libraries, and those of :data:`OWN_CLASSES`, can be named: a
    configuration file runs no other code."""
    libraries = r"(diffusers(\.pipelines\.[a-z]\w*)?|transformers)\.[A-Z]\w*"
    if value not in OWN_CLASSES and not re.fullmatch(libraries, value):
        raise ValueError(
            "must be diffusers.<Class> or transformers.<Class>, diffusers.pipelines.<pipeline>.<Class>, or "
            f"{' or '.join(OWN_CLASSES)}"
        )
    return value


class Strict(BaseModel):
    """Base of every configuration section: immutable, and unknown keys are errors.

    Descriptions of fields go into config/README.md (t2v_energy.config_reference); a unit comes first, as in
    ``[s] …``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# --- config/models/*.yaml -----------------------------------------------------------------------------


class Hub(Strict):
    """Where the published weights are; the revision is pinned so that they cannot change."""

    id: str = Field(description="`owner/name` on the hub")
    revision: str | None = Field(
        pattern=r"^[0-9a-f]{40}$",
        description="the commit that is read, never a branch; null: nobody has pinned one yet, and "
        "`weights: pretrained` is refused",
    )


class ComponentHub(Hub):
    """Published weights of one part, where they are not in the pipeline's own repository."""

    subfolder: str | None = Field(None, description="folder of the repository; null: its root")
    file: str | None = Field(
        None,
        pattern=r"\.safetensors$",
        description="for weights that are published without a configuration: the file, which is loaded into "
        "the part as `config` describes it",
    )


class Component(Strict):
    """One part of a pipeline: its class, its published configuration and its weights' type."""

    class_: Annotated[
        str,
        Field(
            alias="class",
            description="`diffusers.<Class>`, `diffusers.pipelines.<pipeline>.<Class>`, "
            f"`transformers.<Class>` or {' or '.join(f'`{name}`' for name in OWN_CLASSES)}, nothing else",
        ),
        AfterValidator(_an_importable_class),
    ]
    config: dict[str, Any] = Field({}, description="what that class takes, as published (its own keys)")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None,
        description="number type of the weights; what the class keeps in float32 stays so; "
        "null for a part without weights (a scheduler)",
    )
    hub: ComponentHub | None = Field(
        None, description="the part's own published weights; null: they are in the model's `hub`"
    )


class Tokenizer(Strict):
    """The sizes of a tokenizer, for the stand-in used when no hub is reachable."""

    vocab_size: int = Field(gt=2, description="number of token ids")
    max_length: int = Field(gt=0, description="[tokens] every prompt is padded or cut to this length")


class Defaults(Strict):
    """The settings that the model card recommends."""

    height: int = Field(gt=0, description="[pixels] height of a frame")
    width: int = Field(gt=0, description="[pixels] width of a frame")
    num_frames: int = Field(gt=0, description="frames of the video")
    num_inference_steps: int = Field(gt=0, description="denoising steps")
    guidance_scale: float = Field(ge=1, description="strength of classifier-free guidance")
    fps: Positive = Field(description="[frames/s] of the finished video; costs nothing")


class Limits(Strict):
    """What the pipeline accepts: sides divisible by ``size_multiple``; frames = multiple·k + offset."""

    size_multiple: int = Field(gt=0, description="[pixels] height and width must be multiples of it")
    frames_multiple: int = Field(gt=0, description="frames must be `frames_multiple`·k + `frames_offset`")
    frames_offset: int = Field(ge=0, description="see `frames_multiple`")
    max_frames: int | None = Field(None, gt=0, description="frames, at most; null: as many as memory holds")


class ModelFile(Strict):
    """One model: what it is built of, how it is run, and which of its calls are timed."""

    key: Key = Field(description="the file's name without `.yaml`")
    title: str = Field(description="the model's name for people")
    architecture: Literal["wan", "cogvideox", "ltx", "mochi", "animatediff", "contentv", "other"] = Field(
        description="which closed forms count its operations; `other`: there are none, so no cost is "
        "predicted and no share of the peak reported",
    )
    hub: Hub | None = Field(None, description="where the published weights are; null: there are none")
    pipeline: str = Field(
        pattern=r"^[A-Z]\w*Pipeline$",
        description="class that generates: diffusers', or for stages of its own one of t2v_energy.models",
    )
    components: dict[str, Component] = Field(description="the pipeline's parts, by the pipeline's own names")
    tokenizer: Tokenizer = Field(description="sizes of the tokenizer, for the stand-in of random weights")
    other_tokenizers: dict[Annotated[str, Field(pattern=r"^tokenizer_[2-9]$")], Tokenizer] = Field(
        {},
        description="those of further tokenizers, by the pipeline's own names: `tokenizer_2` is that of "
        "`text_encoder_2`",
    )
    defaults: Defaults = Field(description="settings that the model card recommends")
    negative_prompt: str = Field("", description="text that guidance steers away from")
    passes_per_step: int = Field(
        ge=1, le=2, description="denoiser calls a step: 2 where guidance calls it twice, else 1"
    )
    batch_per_pass: int = Field(
        1,
        ge=1,
        le=2,
        description="videos in a denoiser call: 2 where guidance makes one call of both, else 1",
    )
    call: dict[str, bool | int | float | str] = Field(
        {}, description="what the pipeline's call takes beyond size, steps, prompts and guidance"
    )
    limits: Limits = Field(description="sizes and lengths that the pipeline accepts")
    spans: dict[str, CallPath | Annotated[tuple[CallPath, ...], Field(min_length=1)]] = Field(
        description="stage: `<part>.<method>`, the calls that are timed; a list where a stage is calls of "
        "several parts. "
        "`denoiser` and `scheduler` make up the loop of steps; the rest comes once a video. `host.start` is "
        "the pipeline's own time before the first of these calls"
    )

    @model_validator(mode="after")
    def _the_denoiser_is_timed(self) -> ModelFile:
        if "denoiser" not in self.spans:
            raise ValueError("spans: `denoiser` is missing, the part whose calls make up the steps")
        if not isinstance(self.spans["denoiser"], str):
            raise ValueError("spans.denoiser: must be the calls of one part, which make up the steps")
        return self

    def stage_parts(self, stage: str) -> tuple[str, ...]:
        """Names of the parts whose calls are ``stage``: one, but for stages of several parts."""
        paths = self.spans[stage]
        return tuple(path.partition(".")[0] for path in ((paths,) if isinstance(paths, str) else paths))

    @property
    def denoiser_part(self) -> str:
        """Name of the part whose calls are stage ``denoiser``."""
        (part,) = self.stage_parts("denoiser")
        return part

    @property
    def tokenizers(self) -> dict[str, Tokenizer]:
        """All tokenizers, by the pipeline's own names."""
        return {"tokenizer": self.tokenizer, **self.other_tokenizers}

    @property
    def longest_prompt(self) -> int:
        """Tokens that the prompt is padded to, by the tokenizer that pads it furthest."""
        return max(tokenizer.max_length for tokenizer in self.tokenizers.values())


# --- config/accelerators.yaml -------------------------------------------------------------------------


class Printed(Strict):
    """The values that the study's table 7 prints, kept beside the vendor's."""

    peak_TFLOPs: Positive = Field(description="[TFLOP/s] peak as printed")
    bandwidth_TB_per_s: Positive = Field(description="[TB/s] memory bandwidth as printed")


class Accelerator(Strict):
    """Published limits of one accelerator; ``efficiency`` is a constant of the first, simple prediction."""

    title: str = Field(description="the product's name")
    peak_bf16_dense_TFLOPs: Positive = Field(
        description="[TFLOP/s] bfloat16 peak without sparsity, float32 accumulation"
    )
    bandwidth_TB_per_s: Positive = Field(description="[TB/s] memory bandwidth")
    board_power_W: Positive = Field(description="[W] power of the whole board")
    memory_GiB: Positive = Field(description="[GiB] memory")
    efficiency: float = Field(gt=0, le=1, description="µ of the plan's prediction: share of the peak")
    vae_TFLOPs: Positive = Field(description="[TFLOP/s] rate of the VAE decoder in the plan's prediction")
    sustained_power_fraction: float = Field(
        gt=0, le=1, description="mean power while generating over `board_power_W`, for the plan's prediction"
    )
    float8: bool = Field(
        True, description="whether it multiplies float8 numbers, as intervention `fp8` needs"
    )
    source: str = Field(description="where the published values are from")
    nominal: bool = Field(False, description="true: no published values, so no share of the peak is reported")
    printed: Printed | None = Field(None, description="what the study's table 7 prints, where it has a row")


# --- protocols ----------------------------------------------------------------------------------------


class FullProtocol(Strict):
    """The study's protocol: whole generations, first to warm up, then measured."""

    warmups: int = Field(2, ge=1, description="generations that are run first and not counted")
    warmup_steps: int | None = Field(
        None, ge=1, description="denoising steps of a warm-up; null: it is whole, as in the study"
    )
    repetitions: int = Field(
        5, ge=1, description="measured repetitions, at least; each is one whole generation"
    )
    min_window_s: Positive | None = Field(
        None,
        description="[s] for short clips: a repetition is as many whole generations, one right after the "
        "other, as fill this time. null: one generation",
    )
    max_repetitions: int | None = Field(
        None, ge=1, description="measured repetitions, at most; null: as many as `repetitions`"
    )
    max_ci95_percent: Positive = Field(
        1.0,
        description="[%] done, between those two numbers, when half the 95 % interval of the mean latency "
        "over the repetitions is no larger",
    )

    @model_validator(mode="after")
    def _limits_agree(self) -> FullProtocol:
        if self.max_repetitions is not None and self.max_repetitions < self.repetitions:
            raise ValueError(f"max_repetitions is below repetitions ({self.repetitions})")
        return self


class SampledProtocol(Strict):
    """Generations cut after some denoising steps; the total for S steps is composed from them."""

    warmup_steps: int = Field(1, ge=1, description="denoising steps of the one warm-up generation")
    warmup_calls: int | None = Field(
        None,
        ge=1,
        description="the warm-up ends after so many denoiser calls, without decoding: for sizes whose one "
        "step takes minutes. null: see `warmup_steps`",
    )
    min_steps: int = Field(2, ge=1, description="denoising steps of a measured generation, at least")
    min_window_s: Positive = Field(4.0, description="[s] … and as many as fill this time")
    generations: int = Field(3, ge=1, description="measured generations, at least; 1 leaves no interval")
    max_generations: int = Field(
        8, ge=1, description="measured generations, at most; the two limits below decide in between"
    )
    max_step_sem_percent: Positive = Field(
        0.3, description="[%] done when the standard error of the mean step time is no larger, and …"
    )
    max_ci95_percent: Positive = Field(
        1.0, description="[%] … half the 95 % interval of the composed latency is no larger"
    )

    @model_validator(mode="after")
    def _limits_agree(self) -> SampledProtocol:
        if self.max_generations < self.generations:
            raise ValueError(f"max_generations is below generations ({self.generations})")
        return self


class ProtocolSettings(Strict):
    """How measurements are taken; the record keeps a copy."""

    idle_s: float = Field(2.0, ge=0.2, description="[s] idle power is read this long before and after")
    sample_hz: float = Field(
        20.0,
        ge=10,
        le=200,
        description="[1/s] how often power, clock, temperature, throttle reasons and memory are read",
    )
    poll_s: float = Field(
        0.002, gt=0, le=0.02, description="[s] how often the energy counter is read; more often near a tick"
    )
    profile: bool = Field(
        False,
        description="true: after the measurement, one more generation of one step under torch's profiler "
        "tells which operators the device's time goes to; no measured time or energy is of it",
    )
    fidelity: bool = Field(
        False,
        description="true: what a changed pipeline (interventions, an attention kernel) makes is compared "
        "with what the unchanged one makes after as many steps; this is generated where none is at hand",
    )
    full: FullProtocol = Field(FullProtocol(), description="protocol `full`: whole generations")
    sampled: SampledProtocol = Field(SampledProtocol(), description="protocol `sampled`: cut generations")


# --- experiments and campaigns ------------------------------------------------------------------------


class Variation(Strict):
    """The part of a configuration that a sweep fixes or varies; what is absent is the model's default."""

    height: Annotated[int, Field(gt=0)] | None = Field(None, description="[pixels] height of a frame")
    width: Annotated[int, Field(gt=0)] | None = Field(None, description="[pixels] width of a frame")
    num_frames: Annotated[int, Field(gt=0)] | None = Field(None, description="frames of the video")
    num_inference_steps: Annotated[int, Field(gt=0)] | None = Field(None, description="denoising steps")
    guidance_scale: Annotated[float, Field(ge=1)] | None = Field(
        None, description="strength of classifier-free guidance"
    )
    attention_kernel: AttentionKernel | None = Field(
        None,
        description="the only attention kernel that torch may use; null: torch chooses, and the record says "
        "what ran. `sage` needs the extra `interventions`",
    )
    interventions: tuple[str, ...] | None = Field(
        None, description="what is changed in the pipeline: names of config/interventions.yaml"
    )
    prompt: str | None = Field(None, description="id of a prompt of stage 1; null: `p000`")
    neighbour: NeighbourCondition | None = Field(
        None,
        description="what another GPU of the host does meanwhile: a dense load (`busy`) or nothing (`idle`), "
        "by a process of ours there; null: it is left as it is",
    )


class Entry(Variation):
    """One configuration of a sweep, and how it alone is measured where that is not the experiment's way."""

    model: Key | None = Field(None, description="a file of config/models/; null: the experiment's")
    protocol: Protocol | None = Field(None, description="null: the experiment's")
    protocols: dict[str, Any] = Field(
        {}, description="keys of config.yaml's `protocols`, laid over the experiment's value by value"
    )
    passes: int | None = Field(None, ge=1, description="null: the experiment's")


class Experiment(Strict):
    """One sweep: its model or models, what it holds fixed, and the list of what it varies."""

    key: Key = Field(description="the file's name without `.yaml`")
    title: str = Field(description="what it asks, for people")
    protocol: Protocol = Field(description="`full`: whole generations; `sampled`: cut ones, composed")
    protocols: dict[str, Any] = Field(
        {}, description="keys of config.yaml's `protocols`, laid over the campaign's value by value"
    )
    passes: int | None = Field(None, ge=1, description="times that it is measured; null: the campaign's")
    one_process: bool = Field(
        False,
        description="true: all passes over one model, size and protocol in one batch, one after the other, "
        "on one build of the pipeline: for conditions that alternate",
    )
    model: Key | None = Field(
        None, description="a file of config/models/; null: each entry of `vary` names its own"
    )
    fixed: Variation = Field(Variation(), description="what all configurations share")
    vary: tuple[Entry, ...] = Field(
        min_length=1, description="the configurations, one entry each; laid over `fixed`"
    )
    without: tuple[str, ...] = Field(
        (),
        description="of these, what a campaign leaves out: names, as `t2v-energy plan` prints them",
    )

    @model_validator(mode="after")
    def _every_entry_has_a_model(self) -> Experiment:
        lacking = [index for index, entry in enumerate(self.vary) if not (entry.model or self.model)]
        if lacking:
            raise ValueError(f"vary[{lacking[0]}] names no model, and neither does the experiment")
        return self

    @property
    def models(self) -> tuple[str, ...]:
        """Models of the entries, each once, in the order of the file."""
        return tuple(dict.fromkeys(entry.model or self.model or "" for entry in self.vary))


class PublishedFile(Strict):
    """A table that others published, from which a campaign is made instead of from measurements."""

    url: str = Field(pattern=r"^https://", description="where it is fetched from")
    revision: str = Field(min_length=1, description="version of it that `url` names")
    sha256: str | None = Field(
        None, pattern=r"^[0-9a-f]{64}$", description="its checksum; null: not pinned, and every use says so"
    )


class Campaign(Strict):
    """Measurements from one GPU model (or the CPU)."""

    key: Key = Field(description="the file's name without `.yaml`; folders of results are named so")
    title: str = Field(description="the campaign's name for people")
    accelerator: Key = Field(description="an entry of config/accelerators.yaml")
    device: Literal["cuda", "cpu"] = Field(description="`cpu` measures time, and no GPU energy")
    gpu_name: str | None = Field(
        None,
        description="the GPU's name as NVML gives it; another GPU is refused. null accepts any, and sealing "
        "then asks that all records are of one",
    )
    weights: Literal["random", "pretrained"] = Field(
        "random", description="`pretrained`: the model file's `hub`, read from the hub or its cache"
    )
    passes: int = Field(1, ge=1, description="times that each experiment is measured, each in its own order")
    seed: int = Field(0, ge=0, description="of random weights, order of measuring and latents")
    protocols: dict[str, Any] = Field(
        {}, description="keys of config.yaml's `protocols`, laid over them value by value"
    )
    experiments: dict[Key, dict[str, Any]] = Field(
        description="experiment: keys of its file that this campaign sets otherwise (`{}`: none). Each "
        "replaces the whole key: a `fixed` here drops the file's `fixed`"
    )
    sources: dict[Literal["cross_model", "sweeps"], PublishedFile] = Field(
        {}, description="others' tables that the campaign is made of; nothing of it is measured here"
    )


# --- config/config.yaml -------------------------------------------------------------------------------


class PromptSettings(Strict):
    """Stage 1: how many prompts, from which seed, or the user's own file."""

    count: int = Field(50, ge=1, description="prompts that the grammar makes")
    seed: int = Field(0, ge=0, description="of the grammar")
    file: str | None = Field(
        None, description="your own prompts instead: a .txt (one a line) or .jsonl file, from the root"
    )


class MeasureSettings(Strict):
    """Stage 2: how measuring is cut into jobs, and whether the GPU may be shared."""

    batch_minutes: float = Field(
        10, ge=0, description="[min] predicted length of one job, at most; 0: each configuration is a job"
    )
    allow_shared: bool = Field(
        False,
        description="true: measure although other processes use the GPU; such records are marked invalid",
    )


class Settings(Strict):
    """The whole of config/config.yaml."""

    campaign: Key = Field(description="what is built: a file of config/campaigns/")
    paper_campaign: Key = Field(description="the campaign that figures/ and paper/paper.pdf show")
    paper_beside: tuple[Key, ...] = Field(
        (), description="sealed campaigns whose `cross-model` the paper sets beside that one's"
    )
    prompts: PromptSettings = Field(PromptSettings(), description="stage 1")
    measure: MeasureSettings = Field(MeasureSettings(), description="stage 2")
    protocols: ProtocolSettings = Field(ProtocolSettings(), description="how measurements are taken")
    published_cross_model: str | None = Field(
        None, description="your copy of the study's cross-model table, for its claims and `published-h100`"
    )
    published_sweeps: str | None = Field(None, description="the same of its table of sweeps")


# --- one measurable configuration ---------------------------------------------------------------------


class Configuration(Strict):
    """Everything that decides what one generation costs.

    ``attention_kernel`` None lets torch choose; the record says what really ran. ``neighbour`` None takes the
    host's other GPUs as they are.
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
    neighbour: NeighbourCondition | None = None

    def id(self, base: Configuration | None = None) -> str:
        """The readable, stable name of a configuration; ``base`` is the experiment's default."""
        kernel = base.attention_kernel if base else None
        prompt = base.prompt if base else "p000"
        name = (
            f"{self.model}_{self.height}x{self.width}_{self.num_frames}f_{self.num_inference_steps}s"
            + (f"_p{self.prompt}" if self.prompt != prompt else "")
            + (f"__{self.attention_kernel or 'default'}" if self.attention_kernel != kernel else "")
        )
        name += f"__neighbour-{self.neighbour}" if self.neighbour else ""
        return name + (f"__{'+'.join(self.interventions)}" if self.interventions else "")


def describe_weights(model: ModelFile, weights: str, seed: int) -> str:
    """What a record says of the weights: ``random, seed N``, or hub ids and revisions, joined by ``+``."""
    if weights == "random" or model.hub is None:
        return f"random, seed {seed}"
    own = [part.hub for part in model.components.values() if part.hub]
    return " + ".join(f"{hub.id}@{hub.revision}" for hub in (model.hub, *own))


# --- reading ------------------------------------------------------------------------------------------


# libyaml's loader, where PyYAML was built with it, reads ten thousand entries in a second, not in ten.
_SAFE_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(path: Path, remedy: str) -> dict[str, Any]:
    """The mapping in a file of config/; raises :class:`UserError`, with ``remedy`` where it is missing."""
    if not path.is_file():
        raise UserError("there is no such file", where=str(path), remedy=remedy)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_SAFE_LOADER)
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
    loaded = parse(model, read_yaml(path, "create it"), str(path))
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
        for key, value in read_yaml(path, "restore it from the repository").items()
    }


def load_accelerator(root: Path, key: str) -> Accelerator:
    """One accelerator; an unknown key suggests the nearest."""
    known = load_accelerators(root)
    if key not in known:
        near = difflib.get_close_matches(key.lower(), list(known), n=2, cutoff=0.3)
        near.sort(key=lambda name: not name.startswith(key.lower()))
        raise UserError(
            f"unknown accelerator {key!r}",
            where="config/accelerators.yaml",
            remedy=(f"did you mean {' or '.join(map(repr, near))}? " if near else "")
            + f"known: {', '.join(known)}",
        )
    return known[key]


def load_campaign(root: Path, key: str) -> Campaign:
    """config/campaigns/<key>.yaml; read again only when it has changed, since a large one takes seconds."""
    state = _named(root / "config" / "campaigns", key).stat()
    return _load_campaign(root, key, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=16)
def _load_campaign(root: Path, key: str, _changed_ns: int, _size_B: int) -> Campaign:
    return _load_named(Campaign, root / "config" / "campaigns", key)


def load_experiment(root: Path, campaign: Campaign, key: str) -> Experiment:
    """config/experiments/<key>.yaml with the campaign's own values laid over it."""
    path = _named(root / "config" / "experiments", key)
    own = campaign.experiments.get(key, {})
    where = str(path) + (f" with config/campaigns/{campaign.key}.yaml, experiments.{key}" if own else "")
    loaded = parse(Experiment, read_yaml(path, "create it") | own, where)
    if loaded.key != key:
        raise UserError(
            f"key: {loaded.key!r} differs from the file's name", where=where, remedy=f"write `key: {key}`"
        )
    return loaded


def load_settings(root: Path, overrides: Mapping[str, Any] | None = None) -> Settings:
    """config/config.yaml with ``overrides`` laid on top, section by section, as Snakemake's --config does."""
    path = root / "config" / "config.yaml"
    data = read_yaml(path, "run from the repository's root, or give --root")
    data = merged(data, overrides or {})
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
    _check_guidance(configuration.guidance_scale, model, where)
    frames, step, offset = configuration.num_frames, limits.frames_multiple, limits.frames_offset
    if frames < max(offset, 1) or (frames - offset) % step:
        nearest = max(round((frames - offset) / step) * step + offset, offset or step)
        raise UserError(
            f"num_frames: {frames} would be rounded in silence by {model.pipeline}",
            where=where,
            remedy=f"{model.key} makes {step}k + {offset} frames; the nearest is {nearest}",
        )
    if limits.max_frames and frames > limits.max_frames:
        raise UserError(
            f"num_frames: {frames} are more than {model.key} can make",
            where=where,
            remedy=f"use {limits.max_frames} or fewer",
        )


def _check_guidance(scale: float, model: ModelFile, where: str) -> None:
    """Raise where guidance is on or off against what the model file counts a step with."""
    counted = model.passes_per_step * model.batch_per_pass
    if counted > 1 and scale <= 1:
        key = "passes_per_step" if model.passes_per_step > 1 else "batch_per_pass"
        raise UserError(
            f"guidance_scale: {scale:g} switches guidance off; a step then makes one "
            f"pass instead of the {counted} that {model.key} is counted with",
            where=where,
            remedy=f"use a scale above 1, or a model file of its own with `{key}: 1`",
        )
    if counted == 1 and scale > 1:
        raise UserError(
            f"guidance_scale: {scale:g} switches guidance on; a step then makes two passes instead of the "
            f"one that {model.key} is counted with",
            where=where,
            remedy="use a scale of 1, or a model file of its own with 2 as `passes_per_step` or "
            "`batch_per_pass`",
        )


def base_configuration(experiment: Experiment, model: ModelFile, seed: int) -> Configuration:
    """The experiment's default for ``model``: the model's defaults with the experiment's fixed values."""
    defaults = model.defaults.model_dump(exclude={"fps"})
    return Configuration(
        **{"model": model.key, "seed": seed, **defaults, **experiment.fixed.model_dump(exclude_none=True)}
    )


@dataclass(frozen=True)
class Listed:
    """One entry of an experiment: what is measured, under which id, how, and how many times."""

    id: str
    configuration: Configuration
    protocol: Protocol
    protocols: ProtocolSettings
    passes: int


def configurations(root: Path, settings: Settings, campaign: Campaign, key: str) -> list[Listed]:
    """Every configuration of one experiment, in the order of the file.

    One configuration may be listed under both protocols, as experiment ``validation`` does.

    Raises :class:`UserError` for sizes the model cannot run, interventions that are unknown or do not fit,
    what is listed twice, and what is left out but not listed.
    """
    from t2v_energy.interventions import check_fits  # its settings are sections of the configuration too

    experiment = load_experiment(root, campaign, key)
    accelerator = load_accelerator(root, campaign.accelerator)
    common = _laid_protocols(
        protocol_settings(settings, campaign),
        experiment.protocols,
        campaign,
        f"{_place(campaign, key, 'protocols')}, protocols",
    )
    found: dict[tuple[str, Protocol], Listed] = {}
    separator = "." if "vary" in campaign.experiments.get(key, {}) else ", "
    for index, entry in enumerate(experiment.vary):
        where = f"{_place(campaign, key, 'vary')}{separator}vary[{index}]"
        model = load_model(root, entry.model or experiment.model or "")
        base = base_configuration(experiment, model, campaign.seed)
        varied = entry.model_dump(exclude_none=True, include=set(Variation.model_fields))
        configuration = base.model_copy(update=varied)
        check_runnable(configuration, model, where)
        name, protocol = configuration.id(base), entry.protocol or experiment.protocol
        check_fits(root, model, configuration, accelerator, protocol, where)
        if (name, protocol) in found:
            raise UserError(f"{name} is listed twice", where=where, remedy="remove one of the two")
        protocols = _laid_protocols(common, entry.protocols, campaign, f"{where}, protocols")
        passes = entry.passes or experiment.passes or campaign.passes
        found[name, protocol] = Listed(name, configuration, protocol, protocols, passes)
    listed = {name for name, _ in found}
    for name in experiment.without:
        if name not in listed:
            raise UserError(
                f"{name} is not among the configurations",
                where=f"{_place(campaign, key, 'without')}, without",
                remedy=f"name one of them: {', '.join(sorted(listed))}",
            )
    if listed == set(experiment.without):
        raise UserError(
            "no configuration is left",
            where=f"{_place(campaign, key, 'without')}, without",
            remedy="leave the experiment out of the campaign",
        )
    return [entry for (name, _), entry in found.items() if name not in experiment.without]


def _place(campaign: Campaign, experiment: str, key: str) -> str:
    """Where ``key`` of an experiment is written: in the campaign's file or in the experiment's own."""
    if key in campaign.experiments.get(experiment, {}):
        return f"config/campaigns/{campaign.key}.yaml, experiments.{experiment}"
    return f"config/experiments/{experiment}.yaml"


def _laid_protocols(
    base: ProtocolSettings, own: Mapping[str, Any], campaign: Campaign, where: str
) -> ProtocolSettings:
    """``base`` with the values of ``own``; what the meter is started with cannot be among them."""
    laid = parse(ProtocolSettings, merged(base.model_dump(), own), where)
    for name in ("poll_s", "sample_hz"):  # one meter runs through a batch
        if getattr(laid, name) != getattr(base, name):
            raise UserError(
                f"{name} cannot differ within a campaign: one meter runs through a whole batch",
                where=where,
                remedy=f"set it in config/campaigns/{campaign.key}.yaml, protocols",
            )
    return laid
