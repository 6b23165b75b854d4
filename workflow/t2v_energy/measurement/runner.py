"""Measures one batch: configurations that share a model and an experiment, in one process.

Each record is written as soon as its configuration is done. A batch that is killed and started again
keeps what was finished and measures nothing twice; only its index is a declared output of the workflow.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from t2v_energy.config import Campaign, ProtocolSettings, Settings, describe_weights, load_model
from t2v_energy.errors import UserError
from t2v_energy.interventions import InterventionError, Named, applied, named, settings_of
from t2v_energy.interventions.base import Target
from t2v_energy.measurement.gpus import first_free_gpu
from t2v_energy.measurement.lock import attempt, device_lock, first_free_lock
from t2v_energy.measurement.neighbours import NeighbourLoad, NeighbourWatch
from t2v_energy.measurement.progress import Progress
from t2v_energy.measurement.record import (
    Board,
    Fidelity,
    Gpu,
    InterventionRecord,
    Memory,
    Neighbour,
    Origin,
    Process,
    Prompt,
    Record,
    Windows,
    read_record,
    to_json,
    write_atomically,
)
from t2v_energy.measurement.sealing import SEAL, is_sealed
from t2v_energy.measurement.validity import check
from t2v_energy.metering.nvml import NvmlDevice
from t2v_energy.metering.sampler import Sampler
from t2v_energy.plan import Batch, Item, Plan, make_plan, raw_folder
from t2v_energy.prompts import load_prompts

SETTLE_S = 0.3  # the meter runs this long before the first window, so that several ticks precede it
MIN_FREE_B = 200 * 2**20
MAX_OUTPUTS = 4
"""Outputs of unchanged pipelines that are kept to compare with."""


def measure_batch(
    root: Path,
    settings: Settings,
    experiment: str,
    name: str,
    *,
    prompts: Path,
    progress: Progress,
    deadline_s: float | None = None,
    save_videos: bool = False,
) -> Path | None:
    """Measure what is missing of a batch and write its index; returns the index's path.

    ``deadline_s`` is a time of the monotonic clock: what is not expected to end before it is not begun.  If
    anything was left out so, there is no index, and None is returned.  ``save_videos`` writes the last whole
    video of each configuration to results/videos/, for people to look at.  A configuration whose
    interventions fail or change nothing is left out too; the rest is measured before the error is raised.

    Raises :class:`UserError` when the GPU is missing, in use by others or of another model than the
    campaign's, when a record that is there was made otherwise, when an intervention fails, when the disk is
    full, when the experiment is sealed and lacks records, or when there are no prompts.
    """
    failed: list[InterventionError] = []
    plan = make_plan(root, settings, [experiment])
    batch = plan.batch(experiment, name)
    folder = raw_folder(root, plan.campaign.key, experiment)
    pending = _pending(root, folder, batch, plan)
    if pending:
        _refuse_sealed(folder, [item.record for item in pending])
        _need_prompts(root, settings, prompts)
    progress.begin(batch, pending)
    if save_videos:
        _check_videos(plan.campaign)
    for item in batch.items:
        if item not in pending:
            _tell_if_invalid(folder / item.record, plan, progress)
    if pending:
        check_disk(folder)
        with ExitStack() as stack:
            session = _open_session(root, settings, plan, batch, prompts, progress, stack)
            session.save_videos = save_videos
            stack.callback(session.release)
            # Again, now that the device is ours: whoever had it may have measured what was missing.
            pending = _pending(root, folder, batch, plan)
            progress.begin(batch, pending)
            for item in pending:
                if deadline_s is not None and time.monotonic() + progress.expected_s(item) > deadline_s:
                    progress.left_out(item)
                    continue
                try:
                    record = session.measure(item)
                except InterventionError as error:
                    failed.append(error)
                    progress.say(f"  ! {item.record} was not measured: {error.what}")
                    continue
                write_atomically(folder / item.record, to_json(record))
                progress.finished(item, record, check(record, plan.campaign.gpu_name))
                if save_videos:
                    session.save_video(item)
    if failed:
        raise failed[0]
    if not all((folder / item.record).exists() for item in batch.items):
        return None
    return _write_index(folder, batch)


def _pending(root: Path, folder: Path, batch: Batch, plan: Plan) -> list[Item]:
    """What of the batch has no record yet."""
    return [item for item in batch.items if not _is_done(root, folder / item.record, item, plan)]


def _is_done(root: Path, path: Path, item: Item, plan: Plan) -> bool:
    """Whether a record of exactly this measurement is there; one made otherwise is an error."""
    if not path.exists():
        return False
    record = read_record(path)
    model = load_model(root, item.configuration.model)
    compared: dict[str, tuple[Any, Any]] = {
        "configuration": (record.configuration, item.configuration),
        "protocol settings": (record.protocol_settings, item.protocols),
        "weights": (
            record.environment.weights,
            describe_weights(model, plan.campaign.weights, plan.campaign.seed),
        ),
    }
    if record.interventions:  # those of the first campaigns name theirs in the configuration alone
        entries = named(root, item.configuration.interventions, item.record)
        compared["settings of interventions"] = (
            {entry.name: entry.settings for entry in record.interventions},
            {entry.name: settings_of(entry.intervention) for entry in entries},
        )
    for what, (measured, configured) in compared.items():
        if measured != configured:
            raise UserError(
                f"this record was measured with other {what} than configured now",
                where=str(path),
                remedy="restore the configuration, move the record away, or measure under another "
                "campaign's name",
            )
    return True


def _refuse_sealed(folder: Path, missing: Sequence[str]) -> None:
    """A record more would break the seal, and every later step with it."""
    if is_sealed(folder):
        raise UserError(
            f"the experiment is sealed, and it lacks {', '.join(missing)}",
            where=str(folder / SEAL),
            remedy="measure it in another experiment or under another campaign's name; or remove the seal to "
            "add to it, and seal it again afterwards",
        )


def _need_prompts(root: Path, settings: Settings, prompts: Path) -> None:
    """Raise where stage 1 was not run, with the command that runs it with these settings."""
    if not prompts.exists():
        laid_over = {"campaign": settings.campaign, "prompts": settings.prompts.model_dump(mode="json")}
        elsewhere = [] if root.resolve() == Path.cwd() else ["--root", str(root)]
        words = ["prompts", "--settings", json.dumps(laid_over), "--out", str(prompts)]
        raise UserError(
            "there are no prompts yet",
            where=str(prompts),
            remedy=f"make them: {shlex.join(['t2v-energy', *elsewhere, *words])}",
        )


def _tell_if_invalid(path: Path, plan: Plan, progress: Progress) -> None:
    """A record that breaks a rule is kept, as everything measured is, but it must not go unnoticed."""
    for finding in check(read_record(path), plan.campaign.gpu_name):
        if finding.level == "invalid":
            why = f"{finding.rule}: {finding.detail}"
            progress.say(f"  ! {path.name} is invalid ({why}); move it away to measure again")


def _check_videos(campaign: Campaign) -> None:
    """Raise, before anything is measured, where there will be no video to look at."""
    from t2v_energy.measurement.videos import check_available

    if campaign.weights == "random":
        raise UserError(
            "random weights generate noise: there is no video to save",
            where=f"config/campaigns/{campaign.key}.yaml, weights",
            remedy="leave --save-videos out, or set `weights: pretrained`",
        )
    check_available()


def check_disk(folder: Path) -> None:
    """Make ``folder``; raise where the disk has no room for records."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < MIN_FREE_B:
        raise UserError(
            f"only {free / 2**20:.0f} MiB are free",
            where=str(folder),
            remedy=f"free at least {MIN_FREE_B / 2**20:.0f} MiB before measuring: records must not be lost",
        )


def _write_index(folder: Path, batch: Batch) -> Path:
    """The batch's index: its configurations, record names, checksums and states."""
    entries = []
    for item in batch.items:
        path = folder / item.record
        entries.append(
            {
                "configuration_id": item.configuration_id,
                "record": item.record,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "status": read_record(path).status,
            }
        )
    index = {"experiment": batch.experiment, "batch": batch.name, "records": entries}
    path = folder / "batches" / f"{batch.name}.json"
    write_atomically(path, json.dumps(index, indent=1) + "\n", overwrite=True)
    return path


# --- the device and what runs on it ---------------------------------------------------------------------


def _open_session(
    root: Path,
    settings: Settings,
    plan: Plan,
    batch: Batch,
    prompts: Path,
    progress: Progress,
    stack: ExitStack,
) -> Session:
    """Lock the device, see that it is ours alone and the right one, start the meter."""
    texts = {prompt.id: prompt.text for prompt in load_prompts(prompts)}
    shared = settings.measure.allow_shared
    device = open_device(plan.campaign, shared, progress.say, stack)
    needed = max(further_boards(root, item) for item in batch.items)
    further = _reserved(plan.campaign, needed, device, shared, progress.say, stack)
    load = _neighbours_load(plan, list(device.others), progress, stack)
    sampler = metered(device, plan.protocols, stack).sampler
    further = [metered(board, plan.protocols, stack) for board in further]
    if sampler:
        progress.watts = lambda: sampler.latest_power_W
    watch: NeighbourWatch | None = None
    if device.gpu:
        watch = NeighbourWatch(device.gpu.uuid, _uuids(further))
        stack.callback(watch.close)
    opened = (device.gpu, device.index, device.foreign, sampler)
    return Session(root, plan, texts, progress, *opened, watch=watch, load=load, further=further)


@dataclass(frozen=True)
class OpenDevice:
    """The device that is measured on, locked: its description, NVML's index, who else uses it, its meter.

    ``others`` are the UUIDs of the host's other GPUs that are seen.  On a CPU there is none of all this.
    """

    gpu: Gpu | None = None
    index: int | None = None
    foreign: Sequence[Process] = ()
    sampler: Sampler | None = None
    others: Sequence[str] = ()


def open_device(
    campaign: Campaign, allow_shared: bool, say: Callable[[str], None], stack: ExitStack
) -> OpenDevice:
    """Lock the campaign's device until ``stack`` closes, and see that it is the right one.

    Raises :class:`UserError` as :func:`measure_batch`.
    """
    stack.enter_context(_interruptible())
    if campaign.device != "cuda":
        stack.enter_context(device_lock("cpu", say))
        return OpenDevice()
    device, others = stack.enter_context(first_free_gpu(campaign.gpu_name, allow_shared, say))
    gpu, foreign = _claim(device, campaign, allow_shared)
    return OpenDevice(gpu, device.index, foreign, others=others)


def metered(device: OpenDevice, protocols: ProtocolSettings, stack: ExitStack) -> OpenDevice:
    """The open device with its meter, which runs until ``stack`` closes; a CPU has none."""
    if device.gpu is None:
        return device
    opener = partial(NvmlDevice.open, device.gpu.uuid)
    sampler = stack.enter_context(Sampler(opener, protocols.poll_s, protocols.sample_hz))
    return replace(device, sampler=sampler)


def further_boards(root: Path, item: Item) -> int:
    """GPUs that a configuration's interventions need beside the pipeline's own."""
    entries = named(root, item.configuration.interventions, item.record)
    return sum(entry.intervention.further_boards for entry in entries)


def _reserved(
    campaign: Campaign,
    count: int,
    device: OpenDevice,
    allow_shared: bool,
    say: Callable[[str], None],
    stack: ExitStack,
) -> list[OpenDevice]:
    """So many further GPUs of the host, locked until ``stack`` closes; none on a CPU.

    It does not wait for one: two batches that each hold a GPU would wait for each other's.

    Raises:
        UserError: there are not as many that are free and of the same model; or as :func:`_claim`.
    """
    from t2v_energy.metering.environment import foreign_processes

    found: list[OpenDevice] = []
    if device.gpu is None:
        return found
    for uuid in device.others:
        if len(found) == count:
            break
        board = stack.enter_context(NvmlDevice.open(uuid))
        usable = board.name == device.gpu.name and (allow_shared or not foreign_processes(board))
        if usable and stack.enter_context(attempt(uuid)):
            gpu, foreign = _claim(board, campaign, allow_shared)
            found.append(OpenDevice(gpu, board.index, foreign))
            say(f"further GPU: {uuid}")
    if len(found) < count:
        raise UserError(
            f"interventions need {1 + count} GPUs of one model, and {1 + len(found)} of this host are free",
            where="CUDA_VISIBLE_DEVICES",
            remedy="let it see more (unset the variable), wait for the other GPUs, or measure it on a host "
            "with several",
        )
    return found


def _neighbours_load(
    plan: Plan, others: list[str], progress: Progress, stack: ExitStack
) -> NeighbourLoad | None:
    """The load on a neighbour, whose lock is ours meanwhile; None where no configuration asks for one.

    On the CPU the neighbour is a process beside ours.
    """
    asked = [item for batch in plan.batches for item in batch.items if item.configuration.neighbour]
    if not asked:
        return None
    if plan.campaign.device == "cpu":
        return stack.enter_context(NeighbourLoad(None, size=256))
    if not others:
        raise UserError(
            f"experiment {asked[0].experiment} needs a second GPU of this host, and sees one alone",
            where="CUDA_VISIBLE_DEVICES",
            remedy="let it see two (unset the variable), or measure it on a host with several GPUs",
        )
    uuid = stack.enter_context(first_free_lock(others, progress.say))
    progress.say(f"neighbour: {uuid}")
    return stack.enter_context(NeighbourLoad(uuid))


def _claim(device: NvmlDevice, campaign: Campaign, allow_shared: bool) -> tuple[Gpu, list[Process]]:
    """Describe the GPU; refuse one of another model or one that others are using.

    This is asked before our own process opens the GPU: inside containers NVML's process ids may be the
    host's, and ours could not be told from others.
    """
    from t2v_energy.metering.environment import describe_gpu, foreign_processes

    gpu = describe_gpu(device)
    if campaign.gpu_name and gpu.name != campaign.gpu_name:
        raise UserError(
            f"this GPU is {gpu.name!r}; the campaign's records are of {campaign.gpu_name!r}",
            where=f"config/campaigns/{campaign.key}.yaml, gpu_name",
            remedy="measure it under a campaign of its own (copy config/campaigns/template.yaml)",
        )
    device.energy_mJ()  # raises, with the reason, where the counter is not supported
    foreign = foreign_processes(device)
    if foreign and not allow_shared:
        raise UserError(
            f"other processes use this GPU: {', '.join(str(p.pid) for p in foreign)}",
            where=gpu.uuid,
            remedy="wait for them or stop them; or pass --allow-shared, which marks every record invalid",
        )
    return gpu, foreign


def _interruptible() -> ExitStack:
    """SIGTERM, as SLURM and Snakemake send it, ends the run like Ctrl-C: the meter stops, locks drop."""
    stack = ExitStack()

    def interrupt(number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    previous = signal.signal(signal.SIGTERM, interrupt)
    stack.callback(signal.signal, signal.SIGTERM, previous)
    return stack


@dataclass
class Session:
    """What lives as long as the batch: the device, the meter, the built pipeline."""

    root: Path
    plan: Plan
    prompts: dict[str, str]
    progress: Progress
    gpu: Gpu | None
    gpu_index: int | None
    foreign: Sequence[Process]
    sampler: Sampler | None
    save_videos: bool = False
    watch: NeighbourWatch | None = None
    load: NeighbourLoad | None = None
    further: Sequence[OpenDevice] = ()
    _frames: Any = None
    _pipeline: Any = None
    _built: str = ""
    _codecarbon: dict[int, Any] = field(default_factory=dict)
    _outputs: dict[tuple[Any, int], Any] = field(default_factory=dict)

    def release(self) -> None:
        """Free the pipeline's memory, so that a next batch in this process is not measured beside it."""
        self._pipeline, self._built = None, ""
        self._outputs.clear()
        gc.collect()  # pipelines hold themselves in cycles
        if self.gpu:
            import torch

            torch.cuda.empty_cache()

    def measure(self, item: Item) -> Record:
        """One configuration, from idle to idle; running out of memory is an answer, not a failure."""
        import torch

        from t2v_energy.measurement.protocols import PROTOCOLS, Run, Subject
        from t2v_energy.metering.spans import SpanRecorder

        model = load_model(self.root, item.configuration.model)
        device = self.plan.campaign.device
        text = self._prompt(item)
        pipeline = self._pipeline_for(item)
        recorder = SpanRecorder(pipeline, model.spans, device)
        subject = Subject(
            pipeline, model, item.configuration, text, device, self.save_videos, item.protocols.fidelity
        )
        entries = named(self.root, item.configuration.interventions, item.record)
        boards = self._boards(item)
        target = Target(pipeline, model, item.configuration, device, _uuids(boards))
        run = Run(subject, recorder, item.protocols, partial(self._generation_done, item))
        self.progress.started(item)
        if self.load and item.configuration.neighbour:
            self.load.set(item.configuration.neighbour)
        origin = Origin(utc=datetime.now(UTC).isoformat(), monotonic_s=time.monotonic())
        for sampler in self._samplers():
            sampler.drain()
        if self.sampler:
            time.sleep(SETTLE_S)
        if self.watch:
            self.watch.begin()
        error: str | None = None
        evidence: dict[str, dict[str, float]] = {}
        carbon, reading = self._tracker(boards), None
        self._idle(run, "idle_before")
        try:
            with (
                applied(entries, target) as changes,
                recorder.attached(),
                torch.inference_mode(False),
                torch.no_grad(),
            ):
                carbon.start(item.record)  # now: starting further ranks is no part of its window
                try:
                    PROTOCOLS[item.protocol](run)
                finally:
                    reading = carbon.stop(item.record)
                evidence = changes.evidence()
                changes.check()
        except torch.OutOfMemoryError as out_of_memory:
            error = str(out_of_memory).splitlines()[0]
        except UserError:
            raise
        except Exception as failure:
            if not entries:
                raise
            raise _failed(entries, failure) from failure
        if error:
            gc.collect()
            torch.cuda.empty_cache()
        self._idle(run, "idle_after")
        neighbours = self.watch.end(_uuids(boards)) if self.watch else []
        if self.load:
            self.load.check()
        self._frames = subject.frames
        operators = self._profiled(item, run) if item.protocols.profile and not error else None
        fidelity = self._compared(item, run) if item.protocols.fidelity and not error else None
        record = self._record(
            item, origin, run, recorder, reading, error, pipeline, text, operators, neighbours, boards
        )
        done = [_describe_intervention(entry, evidence.get(entry.name, {})) for entry in entries]
        return record.model_copy(update={"interventions": done, "fidelity": fidelity})

    def _profiled(self, item: Item, run: Any) -> Any:
        """Which operators a generation's time goes to; None where that takes more memory than is left."""
        import torch

        from t2v_energy.measurement.profiling import profile_generation

        self.progress.say("  profiling one step")
        subject = run.subject
        entries = named(self.root, item.configuration.interventions, item.record)
        used = _uuids(self._boards(item))
        target = Target(subject.pipeline, subject.model, item.configuration, subject.device, used)
        try:
            with applied(entries, target), run.recorder.attached(), torch.no_grad():
                return profile_generation(run.subject.generate, run.recorder)
        except torch.OutOfMemoryError:
            self.progress.say("  ! not profiled: out of memory")
            return None

    def _compared(self, item: Item, run: Any) -> Fidelity | None:
        """What a changed pipeline made against what the unchanged one makes; None of the unchanged one.

        The unchanged pipeline's output is kept for those that come after it. Where there is none of as many
        steps it is generated, unmeasured; None as well where that takes more memory than is left: what was
        measured must not be lost by it.
        """
        import torch

        from t2v_energy.measurement.fidelity import Output, compare

        subject, steps = run.subject, run.windows.steps[run.windows.kind.index("generation")]
        output = Output(subject.latents, subject.made).on_host()
        subject.latents = None
        plain = item.configuration.model_copy(update={"interventions": (), "attention_kernel": None})
        if item.configuration == plain:
            self._keep_output((plain, steps), output)
            return None
        if (plain, steps) not in self._outputs:
            self.progress.say(f"  {steps} steps of the unchanged pipeline, to compare with")
            unchanged = replace(subject, configuration=plain, keep_frames=False)
            try:
                with torch.no_grad():
                    unchanged.generate(steps)
            except torch.OutOfMemoryError:
                self.progress.say("  ! not compared: out of memory")
                return None
            self._keep_output((plain, steps), Output(unchanged.latents, unchanged.made).on_host())
        return compare(output, self._outputs[plain, steps], steps, subject.device)

    def _keep_output(self, key: tuple[Any, int], output: Any) -> None:
        """Only the latest few: a video is up to a gigabyte."""
        self._outputs.pop(key, None)
        self._outputs[key] = output
        while len(self._outputs) > MAX_OUTPUTS:
            del self._outputs[next(iter(self._outputs))]

    def save_video(self, item: Item) -> None:
        """The last whole video of what was measured last; cut generations leave none."""
        from t2v_energy.measurement.videos import write_video

        frames, self._frames = self._frames, None
        if frames is None:
            self.progress.say(f"  no whole video of {item.record} was generated, so none is saved")
            return
        folder = self.root / "results" / "videos" / self.plan.campaign.key / item.experiment
        path = (folder / item.record).with_suffix(".mp4")
        write_video(path, frames, load_model(self.root, item.configuration.model).defaults.fps)
        self.progress.say(f"  video: {path.relative_to(self.root)}")

    def _generation_done(self, item: Item, text: str) -> None:
        """Tell the user, and stop at once if a meter has failed."""
        for sampler in self._samplers():
            sampler.check()
        self.progress.generation(item, text)

    def _prompt(self, item: Item) -> str:
        try:
            return self.prompts[item.configuration.prompt]
        except KeyError:
            raise UserError(
                f"there is no prompt {item.configuration.prompt!r}",
                where=f"results/prompts/{self.plan.campaign.key}.jsonl",
                remedy=f"prompts there: {', '.join(list(self.prompts)[:5])}, …",
            ) from None

    def _pipeline_for(self, item: Item) -> Any:
        """The pipeline of the item's model, built when first needed."""
        import torch

        from t2v_energy.models.build import build_pipeline

        key = item.configuration.model
        if self._built != key:
            self.progress.say(f"building {key} ({self.plan.campaign.weights} weights)")
            campaign = self.plan.campaign
            try:
                self._pipeline = build_pipeline(
                    load_model(self.root, key), campaign.weights, campaign.device, campaign.seed
                )
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"the weights of {key} do not fit in memory: {str(error).splitlines()[0]}",
                    where=f"config/campaigns/{campaign.key}.yaml",
                    remedy="measure a smaller model, or on a device with more memory",
                ) from error
            self._built = key
            if self.gpu:  # weights are made in float32 and then cast: what that took is no need of the model
                torch.cuda.empty_cache()
            self._first_light(item)
        return self._pipeline

    def _first_light(self, item: Item) -> None:
        """One small, unmeasured generation, so that no measured one waits for a library to load."""
        import torch

        from t2v_energy.measurement.protocols import FIRST_LIGHT_STEPS, Subject, smallest

        model = load_model(self.root, item.configuration.model)
        configuration = smallest(model, item.configuration)
        text = self._prompt(item)
        subject = Subject(self._pipeline, model, configuration, text, self.plan.campaign.device)
        with torch.no_grad():
            subject.generate(FIRST_LIGHT_STEPS)

    def _idle(self, run: Any, kind: str) -> None:
        """Let the device idle and note when."""
        start_s = time.monotonic()
        time.sleep(run.settings.idle_s)
        run.add(kind, 0, start_s, time.monotonic())

    def _boards(self, item: Item) -> Sequence[OpenDevice]:
        """The further GPUs that a configuration runs on."""
        return self.further[: further_boards(self.root, item)]

    def _samplers(self) -> list[Sampler]:
        """The meters of all GPUs that are reserved."""
        found = [self.sampler, *(board.sampler for board in self.further)]
        return [sampler for sampler in found if sampler]

    def _tracker(self, boards: Sequence[OpenDevice]) -> Any:
        """CodeCarbon's tracker of our GPU and of further ``boards``, built when first needed."""
        from t2v_energy.metering.codecarbon import CodeCarbon

        if len(boards) not in self._codecarbon:
            indices = [self.gpu_index, *(board.index for board in boards)]
            self._codecarbon[len(boards)] = CodeCarbon([index for index in indices if index is not None])
        return self._codecarbon[len(boards)]

    def _record(
        self,
        item: Item,
        origin: Origin,
        run: Any,
        recorder: Any,
        reading: Any,
        error: str | None,
        pipeline: Any,
        text: str,
        operators: Any,
        neighbours: list[Neighbour],
        boards: Sequence[OpenDevice],
    ) -> Record:
        from t2v_energy.metering.environment import describe
        from t2v_energy.metering.spans import shifted

        campaign, zero = self.plan.campaign, origin.monotonic_s
        model = load_model(self.root, item.configuration.model)
        last_s = run.windows.end_s[-1]
        ticks, samples = self.sampler.drain(past_s=last_s) if self.sampler else (None, None)
        weights = describe_weights(model, campaign.weights, campaign.seed)
        record = Record(
            campaign=campaign.key,
            experiment=item.experiment,
            configuration_id=item.configuration_id,
            configuration=item.configuration,
            protocol=item.protocol,
            protocol_settings=item.protocols,
            pass_index=item.pass_index,
            order=item.order,
            status="out_of_memory" if error else "ok",
            error=error,
            origin=origin,
            environment=describe(self.root, self.gpu, weights, list(self.foreign), neighbours),
            prompt=_describe_prompt(pipeline, model.tokenizer.max_length, item.configuration.prompt, text),
            attention_kernels=run.kernels,
            windows=Windows(
                kind=run.windows.kind,
                steps=run.windows.steps,
                start_s=[t - zero for t in run.windows.start_s],
                end_s=[t - zero for t in run.windows.end_s],
                repetition=run.windows.repetition,
            ),
            spans=shifted(recorder.spans, zero),
            ticks=ticks.shifted(zero) if ticks else None,
            samples=samples.shifted(zero) if samples else None,
            further_boards=[board for board in (_read(b, last_s, zero) for b in boards) if board],
            codecarbon=reading,
            memory=Memory(allocated_B=recorder.allocated_B, reserved_B=recorder.reserved_B),
            operators=operators,
        )
        flags = [f"{f.rule}: {f.detail}" for f in check(record, campaign.gpu_name) if f.level != "ok"]
        return record.model_copy(update={"flags": flags})


def _uuids(boards: Sequence[OpenDevice]) -> tuple[str, ...]:
    return tuple(board.gpu.uuid for board in boards if board.gpu)


def _read(board: OpenDevice, last_s: float, zero_s: float) -> Board | None:
    """What the meter of a further GPU has read up to ``last_s``, in seconds after ``zero_s``."""
    if board.gpu is None or board.sampler is None:
        return None
    ticks, samples = board.sampler.drain(past_s=last_s)
    return Board(
        gpu=board.gpu,
        foreign_processes=list(board.foreign),
        ticks=ticks.shifted(zero_s),
        samples=samples.shifted(zero_s),
    )


def _failed(entries: Sequence[Named], failure: Exception) -> InterventionError:
    names = "+".join(entry.name for entry in entries)
    lines = str(failure).splitlines() or [""]
    return InterventionError(
        f"with {names} the generation failed: {type(failure).__name__}: {lines[0]}",
        where="interventions",
        remedy="leave it out for this configuration",
    )


def _describe_intervention(entry: Named, evidence: dict[str, float]) -> InterventionRecord:
    return InterventionRecord(
        name=entry.name,
        kind=entry.intervention.kind,
        settings=settings_of(entry.intervention),
        evidence=evidence,
    )


def _describe_prompt(pipeline: Any, padded: int, prompt_id: str, text: str) -> Prompt:
    """How many tokens the prompt became, before and after padding, and by which tokenizer."""
    tokenizer: Callable[..., Any] = pipeline.tokenizer
    encoded = tokenizer([text], padding="max_length", max_length=padded, truncation=True, return_tensors="pt")
    return Prompt(
        id=prompt_id,
        tokens=int(encoded["attention_mask"].sum()),
        padded_tokens=padded,
        tokenizer=type(tokenizer).__name__,
    )
