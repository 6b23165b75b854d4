"""Measure what the project promises a newcomer, in a fresh clone, and print a small table.

Run by hand: `python3 benchmarks/budgets.py` (standard library only; a few minutes). The commit that HEAD
names is cloned, so uncommitted changes are not measured. Installation includes the downloads, unless pip has
them in its cache; --no-cache leaves the cache out.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def timed(command: list[str], folder: Path, env: dict[str, str]) -> float:
    """Run a command in a folder, show its output only if it fails, and return its seconds."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(
            f"{done.stdout[-3000:]}{done.stderr[-3000:]}\n{' '.join(command)} failed ({done.returncode})"
        )
    return seconds


def megabytes_on_disk(folder: Path) -> float:
    """What `du` says: blocks, not the sum of the files' lengths."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*")) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cores", type=int, default=2, help="cores for Snakemake (default: %(default)s)")
    parser.add_argument("--no-cache", action="store_true", help="download everything anew")
    arguments = parser.parse_args()

    env = dict(os.environ)
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # as on an ordinary machine: what is imported stays compiled
    if arguments.no_cache:
        env["PIP_NO_CACHE_DIR"] = "1"

    with tempfile.TemporaryDirectory(prefix="t2v-energy-budgets-") as name:
        clone = Path(name) / "clone"
        timed(["git", "clone", "--quiet", str(ROOT), str(clone)], Path(name), env)
        installing = timed(["make", "install"], clone, env)
        size = megabytes_on_disk(clone / ".venv")
        in_venv = {**env, "PATH": f"{clone / '.venv' / 'bin'}{os.pathsep}{env['PATH']}"}
        snakemake = ["snakemake", "--cores", str(arguments.cores)]
        building = timed(snakemake, clone, in_venv)
        again = timed(snakemake, clone, in_venv)

    rows = [
        ("base install", installing, 90, "s"),
        ("base install, size", size, 700, "MB"),
        ("sealed records to figures, tables, paper", building, 60, "s"),
        ("the same again: nothing to do", again, 3, "s"),
    ]
    print(f"{'':42}{'measured':>12}{'budget':>12}")
    for what, value, budget, unit in rows:
        print(f"{what:42}{value:9.1f} {unit:2}{budget:9} {unit:2}{'' if value < budget else '   OVER'}")
    sys.exit(any(value >= budget for _, value, budget, _ in rows))


if __name__ == "__main__":
    main()
