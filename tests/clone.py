"""Clean copies of the repository, in which tests run the workflow as a user would."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from processor import Slowness, children_s

REPOSITORY = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent  # not resolved: a virtual environment's own folder
MONTH_S = 30 * 24 * 3600
IN_CPU_SMALL = {"model": "tiny-wan", "fixed": {"num_frames": 5, "num_inference_steps": 2}}
QUICK = {
    "idle_s": 0.2,
    "sampled": {
        "min_steps": 1,
        "min_window_s": 0.05,
        "generations": 2,
        "max_generations": 2,
        "max_step_sem_percent": 90.0,
        "max_ci95_percent": 90.0,
    },
}

Done = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Clone:
    """One copy. ``variables`` are added to the environment of what runs in it."""

    root: Path
    variables: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of_repository(cls, root: Path) -> Clone:
        """A copy of what git tracks, and of what it neither tracks nor ignores."""
        listed = subprocess.run(
            ["git", "ls-files", "-coz", "--exclude-standard"],
            cwd=REPOSITORY, check=True, capture_output=True, text=True,
        ).stdout.split("\0")  # fmt: skip
        for name in filter(None, listed):
            if (REPOSITORY / name).is_file():  # not one deleted since the last commit
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(REPOSITORY / name, root / name)
        return cls(root)

    def copy(self, root: Path) -> Clone:
        """A copy of this copy, with what was built in it."""
        shutil.copytree(self.root, root, dirs_exist_ok=True)
        return Clone(root)

    def having(self, **variables: str) -> Clone:
        """The same copy with more environment variables."""
        return replace(self, variables=(*self.variables, *variables.items()))

    def importing_from(self, folder: Path) -> Clone:
        """The same copy, whose processes import what is in ``folder`` before what is installed."""
        return self.having(PYTHONPATH=os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))

    # --- running ---------------------------------------------------------------------------------

    @property
    def environment(self) -> dict[str, str]:
        """This test's interpreter first on the PATH; temporary files, so locks too, are the copy's own.

        Coverage is not measured in it: it would trace the imports of Snakemake and torch at every start, and
        what is killed never tells. Tests of the package run the same code in their own process.
        """
        temporary = self.root.with_name(f"{self.root.name}-tmp")
        temporary.mkdir(exist_ok=True)
        left_out = ("PYTHONDONTWRITEBYTECODE", "SNAKEMAKE_PROFILE")
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in left_out and not name.startswith("COV")
        }
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        return inherited | {"PATH": path, "TMPDIR": str(temporary)} | dict(self.variables)

    def run(self, *command: str, timeout_s: float = 900) -> Done:
        """Run a command in the copy and wait for it; its exit code is for the caller to judge."""
        return subprocess.run(
            command, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=timeout_s
        )

    def snakemake(self, *arguments: str) -> Done:
        """Snakemake, its output and errors together in ``stdout``."""
        done = self.run(sys.executable, "-m", "snakemake", *arguments)
        return Done(done.args, done.returncode, done.stdout + done.stderr)

    def t2v(self, *arguments: str) -> Done:
        """``t2v-energy``."""
        return self.run("t2v-energy", *arguments)

    def planned(self, *arguments: str) -> dict[str, int]:
        """Jobs by rule that a dry run plans; none if there is nothing to be done."""
        done = self.snakemake("-n", *arguments)
        assert done.returncode == 0, done.stdout
        return jobs_in(done.stdout)

    def outputs(self, *arguments: str) -> list[str]:
        """Every declared output of the DAG."""
        done = self.run(sys.executable, "-m", "snakemake", "--summary", *arguments)
        assert done.returncode == 0, done.stderr
        rows = [line.split("\t") for line in done.stdout.splitlines()]
        assert rows[0][0] == "output_file"
        return [row[0] for row in rows[1:]]

    # --- what is in it ---------------------------------------------------------------------------

    def raw(self, campaign: str, experiment: str = "resolution") -> Path:
        """The folder of an experiment's records."""
        return self.root / "results" / "raw" / campaign / experiment

    def change(self, name: str, old: str, new: str) -> None:
        """Edit one file, which must hold ``old``."""
        path = self.root / name
        text = path.read_text(encoding="utf-8")
        assert old in text, f"{name} has no {old!r}"
        path.write_text(text.replace(old, new, 1), encoding="utf-8")

    def write_campaign(self, key: str, **changes: Any) -> None:
        """config/campaigns/<key>.yaml: of the smoke campaign's kind, with ``changes``."""
        path = self.root / "config" / "campaigns" / f"{key}.yaml"
        data = {"key": key, "title": key, "accelerator": "cpu", "device": "cpu", "seed": 1} | changes
        path.write_text(yaml.safe_dump(data), encoding="utf-8")

    def write_quick_campaign(self, key: str, sizes: Sequence[tuple[int, int]]) -> None:
        """A campaign of small configurations on the CPU that measures each in about a second."""
        vary = [{"height": height, "width": width} for height, width in sizes]
        self.write_campaign(key, protocols=QUICK, experiments={"resolution": {**IN_CPU_SMALL, "vary": vary}})

    def shuffle_mtimes(self, seed: int) -> None:
        """Modification times as git leaves them: in no order. Snakemake's own notes are gone, too."""
        shutil.rmtree(self.root / ".snakemake", ignore_errors=True)
        dice, now_s = random.Random(seed), time.time()
        for path in sorted(self.root.rglob("*")):
            if path.is_file():
                then_s = now_s - dice.uniform(0, MONTH_S)
                os.utime(path, (then_s, then_s))


@dataclass(frozen=True)
class Built:
    """A copy in which a campaign was built, with what Snakemake said.

    ``cpu_s`` is how many of the processor's seconds it took, by how slow a core was meanwhile.
    """

    clone: Clone
    done: Done
    cpu_s: float

    @classmethod
    def by_snakemake(cls, clone: Clone, *arguments: str) -> Built:
        """Build all of a campaign."""
        before_s = children_s()
        with Slowness() as slowness:
            done = clone.snakemake("--cores", "all", *arguments)
        return cls(clone, done, (children_s() - before_s) / slowness.mean)


def jobs_in(output: str) -> dict[str, int]:
    """Jobs by rule in Snakemake's first table of ``Job stats``, without the total."""
    table = re.search(r"^Job stats:\njob +count\n[- ]+\n(.*?)^total", output, re.MULTILINE | re.DOTALL)
    if table is None:
        assert "Nothing to be done" in output, output
        return {}
    return {name: int(count) for name, count in (line.split() for line in table[1].strip().splitlines())}


class Running:
    """A command in a process group of its own, whose output goes to a file as it comes."""

    def __init__(self, clone: Clone, *command: str, log: Path) -> None:
        self._log = log
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                command,
                cwd=clone.root,
                env=clone.environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_default_interrupt,
            )

    @property
    def output(self) -> str:
        """What it has said so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, text: str, times: int = 1, timeout_s: float = 300) -> None:
        """Wait until it has said ``text`` so many times; fail if it ends before that."""
        until_s = time.monotonic() + timeout_s
        while self.output.count(text) < times:
            ended = self.process.poll() is not None
            if ended and self.output.count(text) >= times:
                return
            assert not ended, f"ended before saying {text!r}:\n{self.output}"
            assert time.monotonic() < until_s, f"has not said {text!r}:\n{self.output}"
            time.sleep(0.01)

    def signal_group(self, number: int) -> None:
        """Send a signal to the whole group, as Ctrl-C in a terminal or a cluster's kill does."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """kill -9 of the whole group; nothing of it is left afterwards."""
        if self.process.poll() is None:
            self.signal_group(signal.SIGKILL)
        self.process.wait(timeout=30)


def _default_interrupt() -> None:
    """A test started in the background of a shell inherits an ignored SIGINT; a user's command does not."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
