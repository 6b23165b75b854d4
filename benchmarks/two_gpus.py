"""Wall time of the same batches on one GPU of a host and on two, through the workflow: `profiles/multi-gpu`.

Run by hand on a host with two GPUs or more:  python benchmarks/two_gpus.py [--json FILE]
The same configurations are measured in a temporary copy of the repository, twice: with gpu=1, and with gpu=2.
Each time includes starting every process and building every pipeline. Batches last two minutes, a fifth of
`measure.batch_minutes` as shipped, or with --short a third of a minute. Short ones are the hard case: what
Snakemake takes is not halved, and processes that run at the same time may hinder each other. Both are told
beside the ratio: seconds in which no batch ran; those in which a GPU had none while the other still had one;
and those of each batch, as its start (Python, libraries, pipeline), its measuring, and its end.

One batch is measured before, untimed, so that neither time includes the first reading of libraries from disk
or their compilation to byte code, as after any `pip install`; PYTHONDONTWRITEBYTECODE is not passed on.
`t2v-energy` need not be installed: the package and Snakemake may also lie in folders of PYTHONPATH.
The copies are removed: their records are no campaign's.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import t2v_energy
import yaml
from scale import copy_of_repository
from t2v_energy.measurement.record import Gpu, Record, read_record

CAMPAIGN, EXPERIMENTS = "two-gpus-wall-time", ("resolution", "frames")
SIZES = [(384, 704), (704, 384), (352, 768), (768, 352), (512, 528), (528, 512), (256, 1056), (1056, 256)]
"""Of one number of pixels, so of nearly one cost, and two GPUs can share them evenly."""
BUDGET = 0.55


@dataclass(frozen=True)
class Length:
    """How long batches are."""

    steps: int
    """Of each configuration's generation: as many in both runs, however fast they are."""
    alone: bool
    """A batch for each configuration; else one for each of :data:`EXPERIMENTS`, which share the sizes."""


LONG = Length(steps=100, alone=False)
SHORT = Length(steps=20, alone=True)

LAUNCHER = """\
#!/bin/sh
# t2v-energy, noting when each batch began and ended (seconds since 1970)
begin=$(date +%s.%N)
{python} -m t2v_energy.cli "$@"
code=$?
for argument; do
    [ "$before" = --batch ] && echo "$argument $begin $(date +%s.%N)" >> {times}
    before=$argument
done
exit $code
"""

Interval = tuple[float, float]  # s: begin and end


@dataclass(frozen=True)
class Shares:
    """Where a run's wall time went.

    A run of ``gpus`` GPUs takes outside_s + (sum of batches_s + idle_gpu_s) / gpus.
    """

    wall_s: float
    outside_s: float
    """No batch ran: Snakemake's start and end, prompts, and between batches."""
    idle_gpu_s: float
    """GPU-seconds without a batch while another GPU had one: batches that do not end together."""
    batches_s: list[float]
    """Each batch from the start of its process to its end, in order of start."""


@dataclass(frozen=True)
class Parts:
    """Where a batch's time went: start_s + measuring_s + end_s."""

    start_s: float
    """Until its first record begins: Python, libraries, the pipeline."""
    measuring_s: float
    """From there to the end of its last record."""
    end_s: float
    """Until its process has ended."""
    generations_s: float
    """Of measuring_s what is counted: its configurations' measured generations."""


def shares(run: Interval, batches: Sequence[Interval], gpus: int) -> Shares:
    """Shares of a run's wall time (s), all by one clock; at most ``gpus`` of ``batches`` overlap."""
    covered_s, until_s = 0.0, run[0]
    ordered = sorted(batches)
    for begin_s, end_s in ordered:
        covered_s += max(0.0, end_s - max(begin_s, until_s))
        until_s = max(until_s, end_s)
    lengths_s = [end_s - begin_s for begin_s, end_s in ordered]
    wall_s = run[1] - run[0]
    return Shares(wall_s, wall_s - covered_s, gpus * covered_s - sum(lengths_s), lengths_s)


def parts(batch: Interval, records: Sequence[Record]) -> Parts:
    """Of a batch whose process ran at ``batch`` and made ``records``."""
    begins_s = [datetime.fromisoformat(record.origin.utc).timestamp() for record in records]
    ends_s = [begin_s + record.windows.end_s[-1] for begin_s, record in zip(begins_s, records, strict=True)]
    counted_s = sum(
        end_s - begin_s
        for record in records
        for kind, begin_s, end_s in zip(
            record.windows.kind, record.windows.start_s, record.windows.end_s, strict=True
        )
        if kind == "generation"
    )
    first_s, last_s = min(begins_s), max(ends_s)
    return Parts(first_s - batch[0], last_s - first_s, batch[1] - last_s, counted_s)


def write_campaign(root: Path, sizes: Sequence[tuple[int, int]], steps: int) -> None:
    """Configurations of one generation of so many steps, to be thrown away."""
    sampled = {
        "warmup_calls": 1,
        "generations": 1,
        "max_generations": 1,
        "min_steps": steps,
        "min_window_s": 0.1,
    }
    fixed = {"num_frames": 33, "num_inference_steps": steps}
    listed = [{"height": height, "width": width} for height, width in sizes]
    shared = zip(EXPERIMENTS, (listed[::2], listed[1::2]), strict=True)
    experiments = {key: {"fixed": fixed, "vary": vary} for key, vary in shared if vary}
    campaign = {
        "key": CAMPAIGN, "title": "wall time", "accelerator": "h100-sxm", "device": "cuda", "seed": 1,
        "protocols": {"idle_s": 0.5, "sampled": sampled}, "experiments": experiments,
    }  # fmt: skip
    path = root / "config" / "campaigns" / f"{CAMPAIGN}.yaml"
    path.write_text(yaml.safe_dump(campaign), encoding="utf-8")


def environment(launcher: Path) -> dict[str, str]:
    """This process's, in which ``t2v-energy`` is the launcher and imports the package that we do."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    package = Path(t2v_energy.__file__).resolve().parents[1]
    # Relative folders are as seen from here, not from the copy.
    given = [str(Path(part).resolve()) for part in env.get("PYTHONPATH", "").split(os.pathsep) if part]
    env["PYTHONPATH"] = os.pathsep.join([str(package), *given])
    env["PATH"] = os.pathsep.join([str(launcher.parent), str(Path(sys.executable).parent), env["PATH"]])
    return env


def write_launcher(path: Path, times: Path) -> Path:
    """Write :data:`LAUNCHER`, which appends to ``times``."""
    path.parent.mkdir(parents=True)
    filled = LAUNCHER.format(python=shlex.quote(sys.executable), times=shlex.quote(str(times)))
    path.write_text(filled, encoding="utf-8")
    path.chmod(0o755)
    return path


def batches_in(times: Path) -> dict[str, Interval]:
    """When each batch ran, by name, of what the launcher noted."""
    rows = [line.split() for line in times.read_text(encoding="utf-8").splitlines()]
    return {name: (float(begin), float(end)) for name, begin, end in rows}


def measured(
    root: Path, gpus: int, configurations: int, batches: int, batch_minutes: float
) -> tuple[Shares, list[Parts], list[Gpu]]:
    """Times of measuring the campaign's ``configurations``, in so many ``batches``, on so many GPUs.

    Those of the whole, those of each batch, and the boards that records name.
    """
    times = root / "times"
    launcher = write_launcher(root / "launcher" / "t2v-energy", times)
    command = [
        *(sys.executable, "-m", "snakemake", "measure", "--workflow-profile", "profiles/multi-gpu"),
        *("--cores", "8", "--resources", f"gpu={gpus}", f"measuring={gpus}"),
        *("--config", f"campaign={CAMPAIGN}", f"measure={{batch_minutes: {batch_minutes}}}"),
    ]
    begin_s = time.time()
    done = subprocess.run(command, cwd=root, env=environment(launcher), capture_output=True, text=True)
    end_s = time.time()
    if done.returncode:
        sys.exit(f"{done.stdout[-3000:]}{done.stderr[-3000:]}\n{' '.join(command)} failed")
    ran, where, records = batches_in(times), [], []
    for path in sorted((root / "results" / "raw" / CAMPAIGN).glob("*/batches/*.json")):
        index = json.loads(path.read_text(encoding="utf-8"))
        own = [read_record(path.parents[1] / entry["record"]) for entry in index["records"]]
        where.append(parts(ran[index["batch"]], own))
        records += own
    assert (len(records), len(where), len(ran)) == (configurations, batches, batches)
    assert all(record.status == "ok" for record in records)
    boards = {gpu.uuid: gpu for record in records if (gpu := record.environment.gpu)}
    return shares((begin_s, end_s), list(ran.values()), gpus), where, list(boards.values())


def on_gpus(
    root: Path, gpus: int, sizes: Sequence[tuple[int, int]], length: Length
) -> tuple[Shares, list[Parts], list[Gpu]]:
    """:func:`measured` in a new copy of the repository at ``root``; several sizes, if they are not alone."""
    copy_of_repository(root)
    write_campaign(root, sizes, length.steps)
    batches = len(sizes) if length.alone else len(EXPERIMENTS)
    return measured(root, gpus, len(sizes), batches, 0 if length.alone else 60)


def _told(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.1f} s ({min(values):.1f} to {max(values):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a batch for each configuration, of 20 s")
    parser.add_argument("--json", type=Path, help="write the times there, too")
    options = parser.parse_args()
    length = SHORT if options.short else LONG
    by_gpus: dict[int, dict[str, Any]] = {}
    names: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="t2v-energy-two-gpus-") as name:
        first, _, _ = on_gpus(Path(name) / "first", 1, SIZES[:1], SHORT)
        print(f"one batch before, untimed in what follows: {first.wall_s:.1f} s", flush=True)
        for gpus in (1, 2):
            run, batches, boards = on_gpus(Path(name) / str(gpus), gpus, SIZES, length)
            names |= {board.name for board in boards}
            each = [asdict(batch) for batch in batches]
            by_gpus[gpus] = asdict(run) | {"batches": each, "boards": len(boards)}
            print(
                f"{gpus} GPU: {run.wall_s:.1f} s, of which {run.outside_s:.1f} s without a batch; "
                f"a GPU waited {run.idle_gpu_s:.1f} s for the other; a batch {_told(run.batches_s)}",
                flush=True,
            )
            for part in each[0]:
                print(f"  {part:14}{_told([batch[part] for batch in each])}", flush=True)
    ratio = by_gpus[2]["wall_s"] / by_gpus[1]["wall_s"]
    print(f"ratio {ratio:.3f}, budget {BUDGET}")
    if options.json:
        result = {"kind": "measured", "gpus": sorted(names), "by_gpus": by_gpus, "ratio": ratio}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(ratio > BUDGET or by_gpus[2]["boards"] != 2)


if __name__ == "__main__":
    main()
