"""Gather wheels for a host without internet: `make wheelhouse`.

Starting from what the project needs to measure, interventions too, every requirement is fetched at its
pin in envs/lock.txt for the host's Python, then the requirements of those wheels, and so on. torch and its
CUDA packages are never fetched: such a host has the build that fits its driver. A package published
only as source is built here; that works if its wheel is pure Python, and is an error otherwise.

The analysis is done elsewhere, so what only it needs stays out, unless --whole is given. So, on the host:

    pip install --no-index --no-deps wheelhouse/*.whl                                     # without --whole
    pip install --no-index --find-links wheelhouse 't2v-energy[measure,interventions]'   # with it
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from email.parser import HeaderParser
from pathlib import Path
from zipfile import ZipFile

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
ALWAYS_WITHOUT = re.compile(r"torch|triton|nvidia-(?!ml-py$).*|cuda-.*")
# PuLP is 16 MB of solvers; where it is missing Snakemake says so and schedules greedily, which will do.
NOT_TO_MEASURE = {"ipykernel", "matplotlib", "papermill", "pulp", "pyarrow", "seaborn", "typst"}

# pip matches the platform exactly, so each manylinux the host may run has to be named.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 26, 24, 17, 12, 5)] + [
    "manylinux2014_x86_64",
    "manylinux2010_x86_64",
    "manylinux1_x86_64",
]


def pins(lock: Path) -> dict[str, str]:
    """The version of each package in the lock file, by normalised name."""
    lines = (line.partition("#")[0].strip() for line in lock.read_text().splitlines())
    pairs = (line.split("==") for line in lines if line)
    return {canonicalize_name(name): version for name, version in pairs}


def environment(python: str) -> dict[str, str]:
    """What environment markers such as `python_version < "3.12"` see on the host."""
    return {
        **{key: str(value) for key, value in default_environment().items()},
        "python_version": python,
        "python_full_version": f"{python}.0",
        "platform_machine": "x86_64",
        "sys_platform": "linux",
    }


def needed(
    requirements: Iterable[Requirement], extras: Iterable[str], env: dict[str, str]
) -> Iterator[Requirement]:
    """Those requirements that apply on the host, given the extras asked for."""
    for requirement in requirements:
        marker = requirement.marker
        if marker is None or any(marker.evaluate({**env, "extra": extra}) for extra in ("", *extras)):
            yield requirement


def requirements_of(wheel: Path) -> list[Requirement]:
    """What a wheel's own metadata says that it requires."""
    with ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    return [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]


def pip(*arguments: str | Path) -> str:
    """Run pip quietly and return its complaint, empty if it succeeded."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr.strip() or f"pip ended with {done.returncode}" if done.returncode else ""


def build(what: str | Path, folder: str | Path) -> None:
    """Build one wheel from its source."""
    if complaint := pip("wheel", "--no-deps", "--wheel-dir", folder, what):
        sys.exit(f"{complaint}\n\n{what}: its wheel cannot be built; see above why.")


def fetch(names: list[str], pinned: dict[str, str], python: str, dest: Path) -> list[Path]:
    """Bring the wheels of these packages into dest, and return their paths."""
    wanted = {f"{name}=={pinned[name]}" for name in names}
    options = ["--no-deps", "--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    options += [f"--platform={platform}" for platform in PLATFORMS]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as built:
        while wanted and (complaint := pip("download", *options, "--dest", folder, *sorted(wanted))):
            missing = re.search(r"No matching distribution found for (\S+)", complaint)
            if missing is None or missing[1] not in wanted:
                sys.exit(f"{complaint}\n\nThe wheels could not be fetched; see above why.")
            print(f"  {missing[1]}: no wheel is published, building one")
            build(missing[1], built)
            wanted.remove(missing[1])
        for wheel in Path(built).iterdir():
            if not wheel.name.endswith("-none-any.whl"):
                sys.exit(
                    f"{wheel.name}: published as source only, and built here it fits this machine alone. "
                    f"Build it on a machine like the host, with Python {python}."
                )
        return [
            Path(shutil.move(wheel, dest / wheel.name))
            for wheel in sorted([*Path(folder).iterdir(), *Path(built).iterdir()])
        ]


def gather(
    roots: list[Requirement], pinned: dict[str, str], without: set[str], python: str, dest: Path
) -> None:
    """Fetch the roots and, level by level, all that they need."""
    env = environment(python)
    extras_seen: dict[str, set[str]] = {}
    wheels: dict[str, Path] = {}
    level = list(needed(roots, (), env))
    while level:
        fresh: set[str] = set()
        for requirement in level:
            name = canonicalize_name(requirement.name)
            if name in without or ALWAYS_WITHOUT.fullmatch(name):
                continue
            if name not in pinned:
                sys.exit(f"{name}: needed on Python {python}, but has no pin in envs/lock.txt.")
            if name not in extras_seen or not requirement.extras <= extras_seen[name]:
                extras_seen.setdefault(name, set()).update(requirement.extras)
                fresh.add(name)
        absent = sorted(fresh - wheels.keys())
        if absent:
            print(f"fetching {', '.join(absent)}")
            for wheel in fetch(absent, pinned, python, dest):
                wheels[canonicalize_name(parse_wheel_filename(wheel.name)[0])] = wheel
        level = [r for name in fresh for r in needed(requirements_of(wheels[name]), extras_seen[name], env)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default="3.12", help="the host's Python (default: %(default)s)")
    parser.add_argument("--dest", type=Path, default=ROOT / "wheelhouse", help="default: wheelhouse/")
    parser.add_argument(
        "--without",
        nargs="*",
        default=[],
        metavar="NAME",
        help="packages that the host has already; neither they nor what only they need is fetched",
    )
    parser.add_argument(
        "--whole", action="store_true", help="also what aggregating, plotting and the paper need"
    )
    arguments = parser.parse_args()

    arguments.dest.mkdir(parents=True, exist_ok=True)
    for old in arguments.dest.glob("*.whl"):  # two versions of one package would stop the installation
        old.unlink()

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    roots = [
        Requirement(text) for text in project["dependencies"] + extras["measure"] + extras["interventions"]
    ]
    without = {canonicalize_name(name) for name in arguments.without}
    if not arguments.whole:
        without |= NOT_TO_MEASURE
    gather(roots, pins(ROOT / "envs" / "lock.txt"), without, arguments.python, arguments.dest)
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # setuptools would pack a stale module left in it
    build(ROOT, arguments.dest)
    wheels = list(arguments.dest.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels) / 1e6
    print(f"{len(wheels)} wheels, {size:.0f} MB, for Python {arguments.python}, in {arguments.dest}")


if __name__ == "__main__":
    main()
