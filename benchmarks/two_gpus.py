"""Wall time of the same batches on one GPU of a host and on two, through the workflow: `profiles/multi-gpu`.

Run by hand on a host with two GPUs or more:  python benchmarks/two_gpus.py [--json FILE]
Eight batches of one configuration each are measured in a temporary copy of the repository, twice: with gpu=1,
and with gpu=2. Each time includes starting every process and building every pipeline. Short batches are the
hard case: what Snakemake itself takes is not halved. How much that is, is told beside the ratio: seconds in
which no batch ran, those of each batch, and those in which a GPU had none while the other still had one.

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
from pathlib import Path

import t2v_energy
import yaml
from scale import copy_of_repository
from t2v_energy.measurement.record import Gpu, read_record, record_paths
from t2v_energy.plan import raw_folder

CAMPAIGN, EXPERIMENT = "two-gpus-wall-time", "resolution"
SIZES = [(384, 704), (704, 384), (352, 768), (768, 352), (512, 528), (528, 512), (256, 1056), (1056, 256)]
"""Of one number of pixels, so of nearly one cost, and two GPUs can share them evenly."""
BUDGET = 0.55

LAUNCHER = """\
#!/bin/sh
# t2v-energy, noting when each command began and ended (seconds since 1970)
begin=$(date +%s.%N)
{python} -m t2v_energy.cli "$@"
code=$?
echo "$1 $begin $(date +%s.%N)" >> {times}
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


def write_campaign(root: Path, sizes: Sequence[tuple[int, int]]) -> None:
    """Configurations that take about twenty seconds each, to be measured and thrown away."""
    sampled = {"warmup_calls": 1, "generations": 1, "max_generations": 1, "min_window_s": 5.0}
    varied = {"fixed": {"num_frames": 33}, "vary": [{"height": h, "width": w} for h, w in sizes]}
    campaign = {
        "key": CAMPAIGN, "title": "wall time", "accelerator": "h100-sxm", "device": "cuda", "seed": 1,
        "protocols": {"idle_s": 0.5, "sampled": sampled}, "experiments": {EXPERIMENT: varied},
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


def batches_in(times: Path) -> list[Interval]:
    """When each ``t2v-energy measure`` ran, of what the launcher noted."""
    rows = [line.split() for line in times.read_text(encoding="utf-8").splitlines()]
    return [(float(begin), float(end)) for what, begin, end in rows if what == "measure"]


def measured(root: Path, gpus: int, count: int) -> tuple[Shares, list[Gpu]]:
    """Times of measuring the campaign's ``count`` batches on so many GPUs; the boards that records name."""
    times = root / "times"
    launcher = write_launcher(root / "launcher" / "t2v-energy", times)
    command = [
        *(sys.executable, "-m", "snakemake", "measure", "--workflow-profile", "profiles/multi-gpu"),
        *("--cores", "8", "--resources", f"gpu={gpus}", f"measuring={gpus}"),
        *("--config", f"campaign={CAMPAIGN}", "measure={batch_minutes: 0}"),
    ]
    begin_s = time.time()
    done = subprocess.run(command, cwd=root, env=environment(launcher), capture_output=True, text=True)
    end_s = time.time()
    if done.returncode:
        sys.exit(f"{done.stdout[-3000:]}{done.stderr[-3000:]}\n{' '.join(command)} failed")
    records = [read_record(path) for path in record_paths(raw_folder(root, CAMPAIGN, EXPERIMENT))]
    batches = batches_in(times)
    assert len(records) == len(batches) == count, (len(records), len(batches))
    assert all(record.status == "ok" for record in records)
    boards = {gpu.uuid: gpu for record in records if (gpu := record.environment.gpu)}
    return shares((begin_s, end_s), batches, gpus), list(boards.values())


def on_gpus(root: Path, gpus: int, sizes: Sequence[tuple[int, int]]) -> tuple[Shares, list[Gpu]]:
    """:func:`measured` in a new copy of the repository at ``root``."""
    copy_of_repository(root)
    write_campaign(root, sizes)
    return measured(root, gpus, len(sizes))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the times there, too")
    options = parser.parse_args()
    found: dict[int, Shares] = {}
    boards: dict[int, list[Gpu]] = {}
    with tempfile.TemporaryDirectory(prefix="t2v-energy-two-gpus-") as name:
        first, _ = on_gpus(Path(name) / "first", 1, SIZES[:1])
        print(f"one batch before, untimed in what follows: {first.wall_s:.1f} s", flush=True)
        for gpus in (1, 2):
            run, boards[gpus] = on_gpus(Path(name) / str(gpus), gpus, SIZES)
            found[gpus] = run
            mean_s = sum(run.batches_s) / len(run.batches_s)
            print(
                f"{gpus} GPU: {run.wall_s:.1f} s, of which {run.outside_s:.1f} s without a batch; a batch "
                f"{mean_s:.1f} s ({min(run.batches_s):.1f} to {max(run.batches_s):.1f}); a GPU waited "
                f"{run.idle_gpu_s:.1f} s for the other",
                flush=True,
            )
    ratio = found[2].wall_s / found[1].wall_s
    print(f"ratio {ratio:.3f}, budget {BUDGET}")
    if options.json:
        names = sorted({board.name for used in boards.values() for board in used})
        by_gpus = {gpus: asdict(run) | {"boards": len(boards[gpus])} for gpus, run in found.items()}
        result = {"kind": "measured", "gpus": names, "batches": len(SIZES), "by_gpus": by_gpus}
        text = json.dumps(result | {"ratio": ratio}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    sys.exit(ratio > BUDGET or len(boards[2]) != 2)


if __name__ == "__main__":
    main()
