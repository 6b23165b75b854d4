"""Copies of the repository to run the workflow in. What takes long is built once a test session."""

from __future__ import annotations

import fcntl
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from clone import Built, Clone


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """The repository as a new clone would have it; not to be changed."""
    return Clone.of_repository(tmp_path_factory.mktemp("pristine") / "clone")


@pytest.fixture
def clone(pristine: Clone, tmp_path: Path) -> Clone:
    """A new clone."""
    return pristine.copy(tmp_path / "clone")


@pytest.fixture(scope="session")
def built_paper(pristine: Clone, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Everything, to the paper, built from the shipped records; not to be changed."""

    def build(folder: Path) -> Built:
        return Built.by_snakemake(pristine.copy(folder / "clone"))

    return _once(tmp_path_factory, "built-paper", build)


@pytest.fixture(scope="session")
def built_smoke(pristine: Clone, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The smoke campaign, all stages live; not to be changed."""

    def build(folder: Path) -> Built:
        return Built.by_snakemake(pristine.copy(folder / "clone"), "--config", "campaign=smoke")

    return _once(tmp_path_factory, "built-smoke", build)


def _once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], Built]) -> Built:
    """Build in a folder that all workers of pytest-xdist share: the first builds, the others wait."""
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    kept = shared / f"{name}.pickle"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            kept.write_bytes(pickle.dumps(build(shared / name)))
        built = pickle.loads(kept.read_bytes())
    assert isinstance(built, Built)
    return built
