"""Several campaigns' sealed records become one campaign, in which each record still says where it is from.

Merging loses nothing (every record of the experiments that a source lists is taken, and a folder that it
does not list is named), overwrites nothing (the merged campaign is
new) and refuses mixtures that would lie. Some may be made all the same, each by its name; the tables of
stage 3 then keep apart what differs (:func:`t2v_energy.aggregation.aggregate`).
"""

from __future__ import annotations

import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from t2v_energy.aggregation import energy_kinds
from t2v_energy.config import KEY_PATTERN, Configuration, load_campaign, load_experiment
from t2v_energy.errors import UserError
from t2v_energy.measurement.record import (
    Record,
    Source,
    read_record,
    record_name,
    record_paths,
    to_json,
    write_atomically,
)
from t2v_energy.measurement.sealing import is_sealed, sha256, verify, write_seal

MIXTURES: Mapping[str, str] = {
    "gpu-models": "records of several GPU models, each a row of its own (gpu_name)",
    "protocols": "whole and cut generations in one experiment, each a row of its own (protocol)",
    "protocol-settings": "records measured with other settings, each a row of its own (protocol_settings)",
    "weights": "random and published weights, or several seeds, each a row of its own (weights)",
    "kinds": "energies of several kinds in one mean, which its _kind then names, joined by +",
    "duplicates": "several measurements of one configuration: those of later sources become further passes",
}
"""What merging refuses unless it is allowed by this name, and what it then does."""


@dataclass(frozen=True)
class _Entry:
    """What merging must know of a record, without its measurements.

    ``sha256`` is that of the record as it was first sealed: one that reaches us on two ways is one record.
    """

    path: Path
    origin: str
    experiment: str
    configuration_id: str
    configuration: Configuration
    protocol: str
    pass_index: int
    gpu: str
    settings: str
    weights: str
    kinds: str
    source: Source

    @property
    def name(self) -> tuple[str, str]:
        """Experiment and file name in the merged campaign."""
        return self.experiment, record_name(self.configuration_id, self.protocol, self.pass_index)

    @property
    def measurement(self) -> tuple[str, str, str]:
        """What passes share."""
        return self.experiment, self.configuration_id, self.protocol


def merge(
    root: Path,
    sources: Sequence[str],
    into: str,
    allowed: Collection[str] = (),
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Write campaign ``into`` of the records of ``sources``; returns the merged experiments' folders.

    Args:
        root: the repository's root.
        sources: campaigns by their keys, or folders of a campaign's records, as another laboratory sends
            them.
        into: key of a campaign that has no records yet. Where it has no file in config/campaigns/, one is
            made from the first source's.
        allowed: names of :data:`MIXTURES`.
        say: is told of each folder that is left out, because its campaign's file does not list it.

    Every record keeps its measurements as they are; ``campaign`` and, of allowed duplicates, ``pass_index``
    change, and ``source`` names the campaign, file and checksum that it is from. The experiments are sealed.

    Raises:
        UserError: ``into`` is no key or has records; a source is missing, not sealed or not as it was sealed;
            two records of one id are of different configurations; or records would be mixed that must not be.
    """
    unknown = set(allowed) - set(MIXTURES)
    if unknown:
        raise UserError(
            f"there is no mixture {', '.join(sorted(unknown))}", remedy=f"known: {', '.join(MIXTURES)}"
        )
    if not re.fullmatch(KEY_PATTERN, into):
        raise UserError(
            f"{into!r} is no campaign's key",
            where="--into",
            remedy="use lower-case letters and digits, joined by single dots or hyphens, such as my-lab",
        )
    target = root / "results" / "raw" / into
    if target.exists():
        raise UserError(
            f"campaign {into!r} has records already, and nothing measured is overwritten",
            where=str(target),
            remedy="name another campaign with --into, or move the folder away",
        )
    entries = _without_copies(entry for name in sources for entry in _read_source(root, name, say))
    _refuse_other_configurations(entries)
    _refuse_mixtures(entries, allowed)
    file, text = _campaign_file(root, into, sources, entries)
    folders = _write_records(target, into, _as_further_passes(entries))
    if not file.exists():
        try:
            write_atomically(file, text)
        except BaseException:
            shutil.rmtree(target)  # copies that we have just made: without the file no command reads them
            raise
    return folders


def _read_source(root: Path, name: str, say: Callable[[str], None]) -> Iterator[_Entry]:
    """Every record of a source's experiments, its seals checked."""
    key = root / "results" / "raw" / name
    folder = key if key.is_dir() else Path(name)
    if not folder.is_dir():
        raise UserError(
            f"there is no campaign {name!r} and no such folder",
            where=str(root / "results" / "raw"),
            remedy="name a campaign that has records, or the folder of its experiments' folders",
        )
    experiments = sorted(path for path in folder.iterdir() if path.is_dir() and record_paths(path))
    if not experiments:
        raise UserError("holds no records", where=str(folder), remedy="name the folder of its experiments")
    if folder == key:
        experiments = _listed(root, name, experiments, say)
    for experiment in experiments:
        if not is_sealed(experiment):
            raise UserError(
                "the experiment is not sealed: what is merged must not change any more",
                where=str(experiment),
                remedy=f"t2v-energy seal --campaign {folder.name} --experiment {experiment.name}",
            )
        for path in verify(experiment):
            record = read_record(path)
            if record.experiment != experiment.name:
                raise UserError(
                    f"foreign record: of experiment {record.experiment!r}",
                    where=str(path),
                    remedy="restore the folder",
                )
            yield _entry(record, path)


def _listed(root: Path, campaign: str, experiments: list[Path], say: Callable[[str], None]) -> list[Path]:
    """The folders of experiments that the campaign's file lists; all of them where it has no file here.

    What is not listed was tried beside the campaign: no table has it, and ``seal`` does not know it.
    """
    file = root / "config" / "campaigns" / f"{campaign}.yaml"
    if not file.is_file():
        return experiments
    known = load_campaign(root, campaign).experiments
    listed = [path for path in experiments if path.name in known]
    if not listed:
        raise UserError(
            f"none of the experiments that have records is listed: {', '.join(p.name for p in experiments)}",
            where=f"{file}, experiments",
            remedy="list there what is to be merged",
        )
    for path in experiments:
        if path not in listed:
            say(f"{path}: left out, since {file} does not list it")
    return listed


def _entry(record: Record, path: Path) -> _Entry:
    own = Source(campaign=record.campaign, record=path.name, sha256=sha256(path))
    kinds = energy_kinds(record) if record.status == "ok" else {}
    return _Entry(
        path=path,
        origin=str(path.parent.parent),
        experiment=record.experiment,
        configuration_id=record.configuration_id,
        configuration=record.configuration,
        protocol=record.protocol,
        pass_index=record.pass_index,
        gpu=record.environment.gpu.name if record.environment.gpu else "no GPU",
        settings=record.protocol_settings.model_dump_json(),
        weights=record.environment.weights,
        kinds=", ".join(f"{name} {kind or 'none'}" for name, kind in kinds.items()) if kinds else "",
        source=record.source or own,
    )


def _without_copies(entries: Iterable[_Entry]) -> list[_Entry]:
    """Each record once, the first way that it came; copies have one checksum and are one measurement."""
    found: dict[tuple[str, str], _Entry] = {}
    for entry in entries:
        found.setdefault((entry.experiment, entry.source.sha256), entry)
    return list(found.values())


def _refuse_other_configurations(entries: Iterable[_Entry]) -> None:
    """An id leaves out what is its experiment's default: two campaigns may mean different things by it."""
    first: dict[tuple[str, str], _Entry] = {}
    for entry in entries:
        other = first.setdefault((entry.experiment, entry.configuration_id), entry)
        if other.configuration != entry.configuration:
            ours, theirs = other.configuration.model_dump(), entry.configuration.model_dump()
            differing = [
                f"{key}: {ours[key]!r} and {theirs[key]!r}" for key in ours if ours[key] != theirs[key]
            ]
            raise UserError(
                f"{entry.configuration_id} is another configuration there ({'; '.join(differing)})",
                where=f"{other.path} and {entry.path}",
                remedy="these cannot be one campaign; keep them apart",
            )


@dataclass(frozen=True)
class _Comparison:
    """What must not differ between sources, and among which records of theirs."""

    mixture: str
    value: Callable[[_Entry], str]
    among: Callable[[_Entry], str]


COMPARISONS = (
    _Comparison("gpu-models", lambda e: e.gpu, lambda e: ""),
    _Comparison("protocols", lambda e: e.protocol, lambda e: e.experiment),
    _Comparison("protocol-settings", lambda e: e.settings, lambda e: f"{e.experiment}, {e.protocol}"),
    _Comparison("weights", lambda e: e.weights, lambda e: f"{e.experiment}, {e.configuration.model}"),
    _Comparison("kinds", lambda e: e.kinds, lambda e: e.experiment),
)


def _refuse_mixtures(entries: Sequence[_Entry], allowed: Collection[str]) -> None:
    """Raise one error that names every mixture that is not allowed, with what each source has."""
    found = {c.mixture: _differences(entries, c) for c in COMPARISONS}
    found["duplicates"] = _duplicates(entries)
    refused = {mixture: told for mixture, told in found.items() if told and mixture not in allowed}
    if refused:
        told = [f"{mixture}: {line}" for mixture, lines in refused.items() for line in lines]
        options = [f"--allow {mixture}: {MIXTURES[mixture]}" for mixture in refused]
        raise UserError(
            "these campaigns differ in what is not mixed unless you say so:\n    " + "\n    ".join(told),
            remedy="keep them apart, or mean it:\n    " + "\n    ".join(options),
        )


def _differences(entries: Sequence[_Entry], comparison: _Comparison) -> list[str]:
    """Where sources differ. One may have less than another, since an experiment's entries may differ."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for entry in entries:
        value = comparison.value(entry)
        if value:
            found[comparison.among(entry)][entry.origin].add(value)
    told = []
    for where, by_origin in found.items():
        whole = set().union(*by_origin.values())
        if whole not in by_origin.values():
            common = set.intersection(*by_origin.values())
            each = (f"{origin} has {_shown(values - common)}" for origin, values in by_origin.items())
            told.append(f"{where}: " * bool(where) + "; ".join(each))
    return told


def _shown(values: Collection[str]) -> str:
    return " and ".join(sorted(values)) or "only what the others have"


def _duplicates(entries: Sequence[_Entry]) -> list[str]:
    """Records of one name and different content."""
    by_name: dict[tuple[str, str], list[str]] = defaultdict(list)
    for entry in entries:
        by_name[entry.name].append(entry.origin)
    return [f"{'/'.join(name)} in {' and '.join(o)}" for name, o in by_name.items() if len(o) > 1]


def _as_further_passes(entries: Iterable[_Entry]) -> Iterator[tuple[_Entry, int]]:
    """Each entry with its pass in the merged campaign: its own, or the next one that is free."""
    taken: dict[tuple[str, str, str], set[int]] = defaultdict(set)
    later = []
    for entry in entries:
        passes = taken[entry.measurement]
        if entry.pass_index in passes:
            later.append(entry)
        else:
            passes.add(entry.pass_index)
            yield entry, entry.pass_index
    for entry in later:
        passes = taken[entry.measurement]
        free = max(passes) + 1
        passes.add(free)
        yield entry, free


def _write_records(target: Path, into: str, entries: Iterable[tuple[_Entry, int]]) -> list[Path]:
    """Write and seal the merged records beside their place, then put the whole there at once."""
    temporary = target.with_name(f".{into}.{os.getpid()}.tmp")
    try:
        for entry, pass_index in entries:
            changes = {"campaign": into, "pass_index": pass_index, "source": entry.source}
            record = read_record(entry.path).model_copy(update=changes)
            write_atomically(temporary / entry.experiment / record.file_name, to_json(record))
        for folder in temporary.iterdir():
            write_seal(folder)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sorted(target.iterdir())


def _campaign_file(
    root: Path, into: str, sources: Sequence[str], entries: Sequence[_Entry]
) -> tuple[Path, str]:
    """config/campaigns/<into>.yaml and its text: made of the first source's file, unless it is there.

    Raises :class:`UserError` where the merged records could not be read again by it.
    """
    path = root / "config" / "campaigns" / f"{into}.yaml"
    experiments = sorted({entry.experiment for entry in entries})
    if path.exists():
        campaign = load_campaign(root, into)
    else:
        campaign = load_campaign(root, entries[0].source.campaign)
        gpus = {entry.gpu for entry in entries}
        changes = {
            "key": into,
            "title": f"{campaign.title}; merged of {', '.join(sources)}",
            "gpu_name": gpus.pop() if campaign.device == "cuda" and len(gpus) == 1 else None,
            "experiments": {key: campaign.experiments.get(key, {}) for key in experiments},
        }
        campaign = campaign.model_copy(update=changes)
    lacking = sorted(set(experiments) - set(campaign.experiments))
    if lacking:
        raise UserError(
            f"the campaign has no experiment {', '.join(lacking)}", where=str(path), remedy="add it there"
        )
    for key in experiments:
        load_experiment(root, campaign, key)  # raises where the merged records could not be read again
    text = yaml.safe_dump(campaign.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
    return path, f"# Made by: t2v-energy merge {' '.join(sources)} --into {into}\n{text}"
