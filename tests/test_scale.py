"""benchmarks/scale.py in small: what it generates is fit for use, says what it is, and leaves nothing."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from t2v_energy.measurement.record import read_record, record_paths
from t2v_energy.measurement.validity import check

ROOT = Path(__file__).parents[1]
COUNT, BATCHES = 60, 3


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale", ROOT / "benchmarks" / "scale.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scale"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_small_campaign_costs_less_than_the_large_one_may(scale: ModuleType, tmp_path: Path) -> None:
    before = {path.name for path in (ROOT / "results").iterdir()}
    scale.copy_of_repository(tmp_path)
    costs, sizes = scale.run(tmp_path, COUNT, BATCHES)
    assert {cost.part for cost in costs} == set(scale.BUDGETS)
    assert sizes["configurations"] == COUNT
    assert abs(sizes["batches"] - BATCHES) <= 1
    for cost in costs:
        limit_s, limit_MB = scale.BUDGETS[cost.part]
        assert cost.wall_s < limit_s, cost
        assert 0 <= cost.peak_rss_MB < limit_MB, cost
    records = [read_record(path) for path in record_paths(scale.raw_folder(tmp_path, "scale", "resolution"))]
    assert len({record.configuration_id for record in records}) == COUNT
    assert all("not measured" in record.environment.host for record in records)
    assert {len(record.spans.stage) for record in records} == {sizes["spans"] / COUNT}
    assert not [f for f in check(records[0]) if f.level == "invalid"]
    assert {path.name for path in (ROOT / "results").iterdir()} == before


def test_what_is_over_its_budget_says_so(scale: ModuleType) -> None:
    limit_s, limit_MB = scale.BUDGETS["aggregate"]
    assert not scale.over(scale.Cost("aggregate", limit_s / 2, 1.0, limit_MB / 2))
    assert scale.over(scale.Cost("aggregate", limit_s, 1.0, limit_MB / 2))
    assert scale.over(scale.Cost("aggregate", limit_s / 2, 1.0, limit_MB))
