"""The ranges in pyproject.toml, the pins in envs/lock.txt and the conda environments agree."""

import importlib.util
import re
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LOCK_LINES = [
    line for line in (ROOT / "envs" / "lock.txt").read_text().splitlines() if not line.startswith("#")
]
CONDA_NAMES = {"matplotlib-base": "matplotlib", "seaborn-base": "seaborn"}


def lock() -> dict[str, str]:
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in LOCK_LINES)}


def ranges(*groups: list[str]) -> list[Requirement]:
    """The requirements of pyproject.toml, without those of an extra on another extra."""
    requirements = [Requirement(text) for group in groups for text in group]
    return [requirement for requirement in requirements if requirement.name != PROJECT["name"]]


def test_lock_holds_exact_pins_and_nothing_else():
    assert LOCK_LINES
    for line in LOCK_LINES:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line), f"envs/lock.txt: {line!r}"
    assert len(lock()) == len(LOCK_LINES), "envs/lock.txt pins a package twice"
    assert sorted(LOCK_LINES, key=str.lower) == LOCK_LINES
    assert "://" not in (ROOT / "envs" / "lock.txt").read_text()


def test_lock_leaves_cuda_to_torch():
    assert "torch" in lock()
    cuda = [name for name in lock() if re.match(r"nvidia-(?!ml-py)|cuda-|triton", name)]
    assert not cuda


@pytest.mark.parametrize(
    "requirement", ranges(PROJECT["dependencies"], *EXTRAS.values()), ids=lambda requirement: requirement.name
)
def test_range_admits_the_pin(requirement):
    pin = lock().get(canonicalize_name(requirement.name))
    assert pin is not None, f"{requirement.name} is in pyproject.toml, but not in envs/lock.txt"
    assert requirement.specifier.contains(pin), f"{requirement} does not admit {pin} of envs/lock.txt"


@pytest.mark.parametrize(
    ("file", "groups"),
    [("analysis.yaml", ["dependencies"]), ("measure.yaml", ["dependencies", "measure"])],
)
def test_conda_environment_equals_the_lock(file, groups):
    listed = yaml.safe_load((ROOT / "envs" / file).read_text())["dependencies"]
    from_conda = dict(line.split("=", 1) for line in listed if isinstance(line, str) and line != "pip")
    from_pip = dict(line.split("==") for entry in listed if isinstance(entry, dict) for line in entry["pip"])
    python = Version(from_conda.pop("python"))
    from_conda = {CONDA_NAMES.get(name, name): version for name, version in from_conda.items()}

    wanted = ranges(
        *(PROJECT["dependencies"] if group == "dependencies" else EXTRAS[group] for group in groups)
    )
    pins = lock()
    assert not from_conda.keys() & from_pip.keys()
    assert from_conda | from_pip == {
        requirement.name: pins[canonicalize_name(requirement.name)] for requirement in wanted
    }
    assert str(python) in supported_pythons()


def supported_pythons() -> list[str]:
    bounds = Requirement(f"python{PROJECT['requires-python']}").specifier
    return [python for python in (f"3.{minor}" for minor in range(9, 20)) if bounds.contains(python)]


def test_supported_pythons_are_the_same_everywhere():
    pythons = supported_pythons()
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == pythons
    first, last = (python.partition(".")[2] for python in (pythons[0], pythons[-1]))
    assert f"(3, {first}) <= sys.version_info[:2] <= (3, {last})" in (ROOT / "Makefile").read_text()


@pytest.fixture
def wheelhouse():
    """The script envs/make_wheelhouse.py as a module."""
    spec = importlib.util.spec_from_file_location("make_wheelhouse", ROOT / "envs" / "make_wheelhouse.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_wheelhouse_holds_what_is_needed_and_not_torch(wheelhouse, tmp_path, monkeypatch):
    published = {
        "diffusers": ["numpy", "pillow", "requests[socks]", "old-backport; python_version < '3.12'"],
        "accelerate": ["torch>=2", "numpy", "only-of-accelerate"],
        "requests": ["PySocks; extra == 'socks'", "sphinx; extra == 'docs'", "diffusers"],
        "nvidia-ml-py": [],
        "pillow": [],
        "pysocks": [],
    }
    asked_for = []

    def fetch(names, pinned, python, dest):
        asked_for.extend(names)
        return [fake_wheel(dest, name, pinned[name], published[name]) for name in names]

    monkeypatch.setattr(wheelhouse, "fetch", fetch)
    roots = [
        Requirement(name) for name in ("diffusers", "accelerate", "nvidia-ml-py", "torch", "nvidia-cudnn")
    ]
    pins = dict.fromkeys(published, "1.0")
    wheelhouse.gather(roots, pins, {"numpy", "accelerate"}, "3.12", tmp_path)
    assert sorted(asked_for) == ["diffusers", "nvidia-ml-py", "pillow", "pysocks", "requests"]

    with pytest.raises(SystemExit, match=r"old-backport.*no pin"):
        wheelhouse.gather(roots, pins, {"numpy", "accelerate"}, "3.11", tmp_path)


def fake_wheel(folder, name, version, requirements):
    stem = f"{name.replace('-', '_')}-{version}"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", *(f"Requires-Dist: {text}" for text in requirements)]
    path = folder / f"{stem}-py3-none-any.whl"
    with ZipFile(path, "w") as archive:
        archive.writestr(f"{stem}.dist-info/METADATA", "\n".join(lines))
    return path
