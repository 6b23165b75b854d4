"""Seals: one file of checksums an experiment, after which its records are data that nothing measures anew.

``SHA256SUMS`` is written as ``sha256sum -c`` reads it. Snakemake imports this module while it parses:
nothing heavy is imported until a seal is made.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from t2v_energy.errors import UserError
from t2v_energy.measurement.record import record_paths, write_atomically

SEAL = "SHA256SUMS"
PORTION = 100
"""Records that one process checks at once."""
RESTORE = "restore the files from the repository, or move the folder away to measure again"


def is_sealed(folder: Path) -> bool:
    """Whether the experiment in ``folder`` is closed."""
    return (folder / SEAL).is_file()


def seal(folder: Path, expected: Iterable[str], expected_gpu: str | None = None, processes: int = 1) -> Path:
    """Close the experiment in ``folder``: write the checksums of its records and return that file.

    ``expected`` are the file names of the experiment's records, ``expected_gpu`` the campaign's
    ``gpu_name``; where it names none, all records must be of the first one's GPU. At most so many
    ``processes`` check them. Sealing what is sealed and unchanged does nothing.

    Raises:
        UserError: a record is missing, unplanned or invalid (each by name, with the rule that it breaks),
            or a seal is there already that disagrees.
    """
    present, planned = record_paths(folder), set(expected)
    _refuse(
        folder,
        "cannot be sealed",
        "measure what is missing, and move away what the plan does not hold",
        missing=planned - {path.name for path in present},
        extra={path.name for path in present} - planned,
    )
    if not present:
        raise UserError(
            "there are no records to seal", where=str(folder), remedy="measure the experiment first"
        )
    if is_sealed(folder):
        verify(folder)
        return folder / SEAL
    _refuse_invalid(folder, present, expected_gpu, processes)
    return write_seal(folder)


def write_seal(folder: Path) -> Path:
    """Write the checksums of the records in ``folder``, whatever they are; returns that file."""
    text = "".join(f"{sha256(path)}  {path.name}\n" for path in record_paths(folder))
    write_atomically(folder / SEAL, text)
    return folder / SEAL


def sealed_records(folder: Path) -> list[Path]:
    """The records of a sealed experiment, by name alone: quick enough for every parse of the Snakefile.

    Raises:
        UserError: there is no readable seal, or records are missing or extra (all named).
    """
    sums, present = _read_seal(folder), {path.name for path in record_paths(folder)}
    _refuse(
        folder, "is not as it was sealed", RESTORE, missing=set(sums) - present, extra=present - set(sums)
    )
    return [folder / name for name in sorted(sums)]


def verify(folder: Path) -> list[Path]:
    """The records of a sealed experiment, each compared with its checksum.

    Raises:
        UserError: there is no readable seal, or records are missing, extra or changed (all named at once).
    """
    sums, present = _read_seal(folder), {path.name for path in record_paths(folder)}
    _refuse(
        folder,
        "is not as it was sealed",
        RESTORE,
        missing=set(sums) - present,
        extra=present - set(sums),
        changed={name for name in set(sums) & present if sha256(folder / name) != sums[name]},
    )
    return [folder / name for name in sorted(sums)]


def _read_seal(folder: Path) -> dict[str, str]:
    """Checksum by record name."""
    path = folder / SEAL
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(
            "the experiment is not sealed",
            where=str(folder),
            remedy="run t2v-energy seal, once it is measured",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the seal cannot be read: {error}", where=str(path), remedy=RESTORE) from None
    sums: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        match = re.fullmatch(r"([0-9a-f]{64}) [ *]([^/\\]+)", line)
        if not match or match[2] in sums:
            why = "a name that was there before" if match else "not `<sha256>  <record>`"
            raise UserError(f"line {number}: {why}", where=str(path), remedy=RESTORE)
        sums[match[2]] = match[1]
    if not sums:
        raise UserError("the seal is empty", where=str(path), remedy=RESTORE)
    return sums


def _refuse(folder: Path, why: str, remedy: str, **faults: set[str]) -> None:
    """Raise one error that names every fault of every kind, unless there is none."""
    named = [f"{kind}: {', '.join(sorted(names))}" for kind, names in faults.items() if names]
    if named:
        raise UserError(f"the experiment {why} ({'; '.join(named)})", where=str(folder), remedy=remedy)


def _refuse_invalid(folder: Path, paths: list[Path], expected_gpu: str | None, processes: int) -> None:
    from t2v_energy.measurement.validity import gpu_name  # scipy: too slow for a parse
    from t2v_energy.parallel import mapped

    if expected_gpu is None:
        expected_gpu = next(filter(None, map(gpu_name, paths)), None)
    portions = [paths[start : start + PORTION] for start in range(0, len(paths), PORTION)]
    with ExitStack() as stack:
        found = mapped(partial(_broken, expected_gpu), portions, processes, stack)
        broken = [fault for of_portion in found for fault in of_portion]
    if broken:
        raise UserError(
            f"invalid records cannot be sealed: {'; '.join(broken)}",
            where=str(folder),
            remedy="move them away and measure them again",
        )


def _broken(expected_gpu: str | None, paths: list[Path]) -> list[str]:
    """The rules that these records break, each with the record's name."""
    from t2v_energy.measurement.validity import read_and_check  # scipy: too slow for a parse

    broken = []
    for path in paths:
        findings = [f for f in read_and_check(path, expected_gpu) if f.level == "invalid"]
        broken += [f"{path.name} breaks {f.rule} ({f.detail})" for f in findings]
    return broken


def sha256(path: Path) -> str:
    """Checksum of a file, as ``sha256sum`` prints it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
