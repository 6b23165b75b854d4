"""What holds for all tests: one thread for each process that computes, and the order of what takes long."""

from __future__ import annotations

import os

import pytest

# Two workers of pytest-xdist fill two cores. With more threads in each, threads wait for each other: tiny
# pipelines take three times as long. Set before torch and NumPy are imported, it holds for them and for every
# process that a test starts: Snakemake's jobs, the notebooks' kernels, `t2v-energy`.
os.environ.setdefault("OMP_NUM_THREADS", "1")

BUILDS = ("built_smoke", "built_paper")
"""Fixtures that take a minute or more. Tests of one go to one worker: another would only wait for it."""
LONG_TESTS = ("test_ten_kills_lose_and_repeat_nothing_finished",)
"""Single tests that take a minute. Begun last, one would leave the other worker idle."""
SHARED = (
    "measurement/test_models.py",
    "measurement/test_runner.py",
    "interventions/test_compiled.py",
    "measurement/test_step_dependent.py",
    "paper/test_paper.py",
    "models/test_build.py",
    "test_scale.py",
    "prediction/test_points.py",
    "test_prompts.py",
)
"""Files with a fixture that takes seconds and is built once a file: two workers would build it twice."""


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in a hook of its own
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep what shares a build on one worker, and begin with what takes longest.

    The order holds under pytest-xdist with ``--no-loadscope-reorder``, as `make test` calls it.
    """
    for item in items:
        if (group := _group(item)) is not None:
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=_place)


@pytest.fixture
def tiling_changes_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries of kind ``vae-tiling`` leave all work as it is: a test alone says what they change."""
    from t2v_energy.interventions.vae_tiling import VaeTiling

    monkeypatch.setattr(VaeTiling, "work_ratios", lambda *_: {})


def _group(item: pytest.Item) -> str | None:
    """The build that a test shares with others."""
    fixtures = getattr(item, "fixturenames", ())
    builds = [name for name in BUILDS if name in fixtures]
    files = [name for name in SHARED if item.path.as_posix().endswith(f"/tests/{name}")]
    return next(iter([*builds, *files]), None)


def _place(item: pytest.Item) -> int:
    """The lower, the earlier; equals stay in the order in which they were collected."""
    order = [*BUILDS, *LONG_TESTS, *SHARED]
    name = _group(item) or getattr(item, "originalname", item.name)
    return order.index(name) if name in order else len(order)
