"""A cluster of its own for every test, and copies of the repository that submit to it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from clone import Clone
from slurm_cluster import Cluster, unavailable


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip where there is no SLURM, saying why; fail there if SLURM_TESTS_MUST_RUN is set, as in CI."""
    reason = unavailable()
    if reason is None and importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        reason = "snakemake-executor-plugin-slurm is missing: pip install -e '.[slurm,test]'"
    if reason is None:
        return
    if os.environ.get("SLURM_TESTS_MUST_RUN"):
        raise pytest.UsageError(f"the SLURM tests cannot run: {reason}")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A SLURM of one node and two GPUs."""
    with Cluster() as running:
        yield running


@pytest.fixture
def clone(cluster: Cluster, tmp_path: Path) -> Clone:
    """A new clone whose processes find the cluster."""
    return Clone.of_repository(tmp_path / "clone").having(**cluster.variables)
