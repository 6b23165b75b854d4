"""Wall time of the same batches on one GPU of a host and on two, through the workflow: `profiles/multi-gpu`.

Run by hand on a host with two GPUs or more:  python benchmarks/two_gpus.py [--json FILE]
Four batches of one configuration each are measured in a temporary copy of the repository, twice: with gpu=1,
and with gpu=2. Each time includes starting every process and building every pipeline. Short batches are the
hard case: what Snakemake itself takes is not halved. The copies are removed: their records are no campaign's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from scale import copy_of_repository
from t2v_energy.measurement.record import Gpu, read_record, record_paths
from t2v_energy.plan import raw_folder

CAMPAIGN, EXPERIMENT = "two-gpus-wall-time", "resolution"
SIZES = [(384, 704), (400, 704), (416, 704), (432, 704)]
"""Of nearly one cost, so that two GPUs can share them evenly."""
BUDGET = 0.55


def write_campaign(root: Path) -> None:
    """Four configurations that take about twenty seconds each, to be measured and thrown away."""
    sampled = {"warmup_calls": 1, "generations": 1, "max_generations": 1, "min_window_s": 5.0}
    varied = {"fixed": {"num_frames": 33}, "vary": [{"height": h, "width": w} for h, w in SIZES]}
    campaign = {
        "key": CAMPAIGN, "title": "wall time", "accelerator": "h100-sxm", "device": "cuda", "seed": 1,
        "protocols": {"idle_s": 0.5, "sampled": sampled}, "experiments": {EXPERIMENT: varied},
    }  # fmt: skip
    path = root / "config" / "campaigns" / f"{CAMPAIGN}.yaml"
    path.write_text(yaml.safe_dump(campaign), encoding="utf-8")


def measured(root: Path, gpus: int) -> tuple[float, list[Gpu]]:
    """Seconds of measuring everything with so many GPUs, and the boards that the records name."""
    command = [
        *(sys.executable, "-m", "snakemake", "measure", "--workflow-profile", "profiles/multi-gpu"),
        *("--cores", "8", "--resources", f"gpu={gpus}", f"measuring={gpus}"),
        *("--config", f"campaign={CAMPAIGN}", "measure={batch_minutes: 0}"),
    ]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    took_s = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{done.stdout[-3000:]}{done.stderr[-3000:]}\n{' '.join(command)} failed")
    records = [read_record(path) for path in record_paths(raw_folder(root, CAMPAIGN, EXPERIMENT))]
    assert len(records) == len(SIZES)
    boards = {gpu.uuid: gpu for record in records if (gpu := record.environment.gpu)}
    return took_s, list(boards.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the times there, too")
    options = parser.parse_args()
    found: dict[int, dict[str, float]] = {}
    names: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="t2v-energy-two-gpus-") as name:
        for gpus in (1, 2):
            root = Path(name) / str(gpus)
            copy_of_repository(root)
            write_campaign(root)
            took_s, boards = measured(root, gpus)
            print(f"{gpus} GPU: {took_s:.1f} s", flush=True)
            names |= {board.name for board in boards}
            found[gpus] = {"wall_s": took_s, "boards": len(boards)}
    ratio = found[2]["wall_s"] / found[1]["wall_s"]
    print(f"ratio {ratio:.3f}, budget {BUDGET}")
    if options.json:
        result = {"kind": "measured", "gpus": sorted(names), "batches": len(SIZES)}
        text = json.dumps(result | {"by_gpus": found, "ratio": ratio}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    sys.exit(ratio > BUDGET or found[2]["boards"] != 2)


if __name__ == "__main__":
    main()
