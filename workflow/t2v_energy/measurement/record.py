"""The raw record: one JSON file a configuration, protocol and pass, from which every energy can be
attributed again without a GPU.

All times in a record are seconds after its ``origin``, on one monotonic clock; energies are as the
counter gave them (cumulative millijoules).
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from t2v_energy.config import Configuration, Protocol, ProtocolSettings
from t2v_energy.errors import UserError
from t2v_energy.metering.series import Samples, Ticks

SCHEMA_VERSION = 1
LOOP_STAGES = ("denoiser", "scheduler")
"""Stages that make up the loop of denoising steps; all others come once a video."""
Status = Literal["ok", "out_of_memory"]
WindowKind = Literal["idle_before", "warmup", "generation", "idle_after"]


class Part(BaseModel):
    """Base of a record and of its parts: immutable and strict."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Filed(Part):
    """Base of what is a file of its own."""

    @property
    def file_name(self) -> str:
        """Name of the record's file in its experiment's folder."""
        raise NotImplementedError


AnyRecord = TypeVar("AnyRecord", bound=Filed)


class Origin(Part):
    """The instant that the record's times count from."""

    utc: str
    monotonic_s: float


class Gpu(Part):
    """The GPU as NVML names it."""

    name: str
    uuid: str
    driver: str
    power_limit_W: float
    memory_total_MiB: float


class Process(Part):
    """A process on the GPU that is not ours."""

    pid: int
    used_MiB: float | None


class Neighbour(Part):
    """Another GPU of the host while the record was made.

    ``mean_power_W`` is by its energy counter from before the first window to after the last; None where it
    has none. ``in_use``: a process was on it, or it was being measured, at the beginning or the end.
    """

    name: str
    uuid: str
    mean_power_W: float | None
    in_use: bool


class Environment(Part):
    """Where and with what the record was made."""

    host: str
    platform: str
    python: str
    cpu: str
    cpu_count: int
    memory_GiB: float
    gpu: Gpu | None
    versions: dict[str, str]
    git_commit: str
    weights: str
    foreign_processes: list[Process] = []
    neighbours: list[Neighbour] = []


def check_lengths(part: BaseModel, optional: str | None = None, scalars: tuple[str, ...] = ()) -> None:
    """Raise unless all columns are as long; ``optional`` may be empty instead, ``scalars`` are no columns."""
    lengths = {name: len(getattr(part, name)) for name in type(part).model_fields if name not in scalars}
    if optional and not lengths[optional]:
        del lengths[optional]
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns differ in length: {lengths}")


class Windows(Part):
    """Idle stretches and generations, in order: kind, denoising steps run, start and end.

    ``repetition`` says which measured repetition a generation belongs to, counted from 0; -1 for windows that
    are not measured.  Empty: every generation is a repetition of its own.
    """

    kind: list[WindowKind] = []
    steps: list[int] = []
    start_s: list[float] = []
    end_s: list[float] = []
    repetition: list[int] = []

    @model_validator(mode="after")
    def _same_length(self) -> Windows:
        check_lengths(self, optional="repetition")
        return self


class Spans(Part):
    """Timed calls: ``window`` indexes :class:`Windows`; ``call`` counts within the stage and step.

    ``step`` is the denoising step, and -1 outside the loop.
    """

    window: list[int] = []
    stage: list[str] = []
    step: list[int] = []
    call: list[int] = []
    start_s: list[float] = []
    end_s: list[float] = []

    @model_validator(mode="after")
    def _same_length(self) -> Spans:
        check_lengths(self)
        return self


class CodeCarbonReading(Part):
    """What CodeCarbon read from the first warm-up to the last generation, and the method behind each part."""

    version: str
    duration_s: float
    gpu_energy_Wh: float
    cpu_energy_Wh: float
    ram_energy_Wh: float
    gpu_method: str
    cpu_method: str
    ram_method: str


class Prompt(Part):
    """How the prompt reached the GPU."""

    id: str
    tokens: int
    padded_tokens: int
    tokenizer: str


class Memory(Part):
    """Peak of torch's allocator by stage, in bytes."""

    allocated_B: dict[str, int] = {}
    reserved_B: dict[str, int] = {}


class Operators(Part):
    """Device time (s) and kernels by stage and operator in one profiled generation of ``steps`` steps.

    It follows those that are measured, and is part of no window.
    """

    steps: int
    stage: list[str] = []
    operator: list[str] = []
    device_s: list[float] = []
    kernels: list[int] = []

    @model_validator(mode="after")
    def _same_length(self) -> Operators:
        check_lengths(self, scalars=("steps",))
        return self


class InterventionRecord(Part):
    """An intervention that was in force: its settings in config/interventions.yaml and what it did.

    ``evidence`` holds numbers that it counted over all generations of the record, warm-ups too.
    """

    name: str
    kind: str
    settings: dict[str, Any] = {}
    evidence: dict[str, float] = {}


class Fidelity(Part):
    """Output against the unchanged pipeline's, after ``steps`` denoising steps (:mod:`.fidelity`).

    With random weights it says nothing of perceptual quality. ``psnr_db`` is None where the frames are the
    same to the bit, ``ms_ssim`` where they are too small for it.
    """

    steps: int
    relative_l2: float
    psnr_db: float | None
    ssim: float
    ms_ssim: float | None
    temporal_flickering: float | None
    reference_temporal_flickering: float | None


class Board(Part):
    """A GPU that a measurement ran on, with its own counter and sensors; ``None``: it has none of these."""

    gpu: Gpu
    foreign_processes: list[Process] = []
    ticks: Ticks | None = None
    samples: Samples | None = None


class Source(Part):
    """Where a merged record is from: campaign, file name and checksum (SHA-256) of what was first sealed."""

    campaign: str
    record: str
    sha256: str


class Record(Filed):
    """One measurement, whole."""

    schema_version: Literal[1] = 1
    campaign: str
    experiment: str
    configuration_id: str
    configuration: Configuration
    protocol: Protocol
    protocol_settings: ProtocolSettings
    pass_index: Annotated[int, Field(ge=1)]
    order: Annotated[int, Field(ge=0)]
    status: Status
    error: str | None = None
    flags: list[str] = []
    origin: Origin
    environment: Environment
    prompt: Prompt | None = None
    attention_kernels: dict[str, list[str]] = {}
    windows: Windows = Windows()
    spans: Spans = Spans()
    ticks: Ticks | None = None
    samples: Samples | None = None
    further_boards: list[Board] = []
    codecarbon: CodeCarbonReading | None = None
    memory: Memory = Memory()
    operators: Operators | None = None
    interventions: list[InterventionRecord] = []
    fidelity: Fidelity | None = None
    source: Source | None = None

    @property
    def counters(self) -> list[Ticks]:
        """Ticks of all GPUs that the measurement ran on; empty unless every one has a counter."""
        found = [self.ticks, *(board.ticks for board in self.further_boards)]
        known = [ticks for ticks in found if ticks]
        return known if len(known) == len(found) else []

    @property
    def file_name(self) -> str:
        """Name of the record's file in its experiment's folder."""
        return record_name(self.configuration_id, self.protocol, self.pass_index)


def record_name(configuration_id: str, protocol: str, pass_index: int) -> str:
    """``<configuration-id>__<protocol>_r<pass>.json``."""
    return f"{configuration_id}__{protocol}_r{pass_index}.json"


def record_paths(folder: Path) -> list[Path]:
    """The record files of one experiment's folder, sorted; temporary files are not among them."""
    return sorted(
        p for p in folder.glob("*.json") if re.search(r"__(full|sampled|operators)_r\d+\.json$", p.name)
    )


def to_json(record: Filed) -> str:
    """Compact JSON, one top-level key a line, so that records stay small and diffs readable."""
    data = record.model_dump(mode="json")
    lines = (
        f" {json.dumps(key)}: {json.dumps(_rounded(value), separators=(',', ':'), allow_nan=False)}"
        for key, value in data.items()
    )
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _rounded(value: Any) -> Any:
    """Columns of times and sensor values to 10 µs and 10 µW, below what our clocks and sensors resolve."""
    if isinstance(value, list):
        return [round(item, 5) if isinstance(item, float) else _rounded(item) for item in value]
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value


def write_atomically(path: Path, text: str, *, overwrite: bool = False) -> None:
    """Write, flush to disk, rename: a reader sees the whole file or none.

    Raises :class:`UserError` when the file is there already (nothing measured is overwritten) or when
    the disk refuses it (full, read-only); a partial file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not overwrite:
        raise UserError(
            "is there already and is never overwritten",
            where=str(path),
            remedy="move it away to measure again",
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"could not be written: {error.strerror}",
            where=str(path),
            remedy="free some disk space or mend the permissions, then run the same command again: "
            "finished configurations are kept and not measured twice",
        ) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_record(path: Path) -> Record:
    """Read and check one record.

    Raises :class:`UserError` naming the file and the reason: missing, truncated, not JSON, of another
    (future) schema version, foreign (name and content disagree), or malformed.
    """
    return read_as(Record, path)


def read_as(kind: type[AnyRecord], path: Path) -> AnyRecord:
    """Read and check one record of ``kind``; see :func:`read_record`."""
    remedy = "restore it from the repository or move it away"
    try:
        text = path.read_bytes()
        # Parsed and checked in one go, twice as fast; what is wrong, if anything, is found out below.
        record = kind.model_validate_json(text)
        if record.file_name == path.name:
            return record
    except (FileNotFoundError, ValidationError):
        pass
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            "the record is missing",
            where=str(path),
            remedy="measure it (t2v-energy measure), or restore it from the repository if it was sealed",
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"the record is truncated or corrupt: {error}", where=str(path), remedy=remedy
        ) from None
    if not isinstance(data, dict) or "schema_version" not in data:
        raise UserError("not a record of t2v_energy (no schema_version)", where=str(path), remedy=remedy)
    if data["schema_version"] != SCHEMA_VERSION:
        raise UserError(
            f"the record has schema version {data['schema_version']!r}; this code reads {SCHEMA_VERSION}",
            where=str(path),
            remedy="update t2v_energy, or use the version that wrote the record",
        )
    try:
        record = kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"malformed record: {location}: {first['msg']}", where=str(path), remedy=remedy
        ) from None
    if record.file_name != path.name:
        raise UserError(
            f"foreign record: its content belongs in {record.file_name}", where=str(path), remedy=remedy
        )
    return record
