"""Numbers of the text: what they must have, and how parts are merged."""

from __future__ import annotations

import json
from math import inf, nan
from pathlib import Path

import pandas as pd
import pytest
import synthetic_campaign as synthetic
from t2v_energy.analysis import conditions, facts, numbers
from t2v_energy.analysis.numbers import Number, Source
from t2v_energy.analysis.sweep import row_label
from t2v_energy.errors import UserError

HERE = Source("table.csv", "row", "column")


def test_parts_merge_into_one_file_with_the_same_bytes_each_time(tmp_path: Path) -> None:
    first, second, out = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "new" / "all.json"
    numbers.write(first, {"b": Number(2, "", "constant", HERE)})
    numbers.write(second, {"a": Number(1 / 3, "s", "measured", HERE, (0.3, 0.4), 2)})
    numbers.merge([first, second], out)
    again = tmp_path / "again.json"
    numbers.merge([second, first], again)
    assert out.read_bytes() == again.read_bytes()
    merged = json.loads(out.read_text())
    assert merged["a"] == {
        "value": 0.3333333,
        "unit": "s",
        "interval": [0.3, 0.4],
        "kind": "measured",
        "digits": 2,
        "source": {"file": "table.csv", "row": "row", "column": "column"},
    }


def test_a_key_in_two_parts_is_an_error_that_names_both(tmp_path: Path) -> None:
    for name in ("a", "b"):
        numbers.write(tmp_path / f"{name}.json", {"same": Number(1, "", "constant", HERE)})
    with pytest.raises(UserError, match=r"'same' is also in .*a\.json") as error:
        numbers.merge([tmp_path / "a.json", tmp_path / "b.json"], tmp_path / "out.json")
    assert "b.json" in str(error.value)


@pytest.mark.parametrize(
    ("content", "what"), [(None, "no such file"), ("{", "not valid JSON"), ("[]", "not a JSON object")]
)
def test_unreadable_parts_are_named(tmp_path: Path, content: str | None, what: str) -> None:
    path = tmp_path / "part.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=what):
        numbers.read(path)


@pytest.mark.parametrize(("value", "interval"), [(nan, None), (1.0, (0.0, inf)), (1.0, (2.0, 3.0))])
def test_numbers_that_cannot_be_printed_are_refused(
    value: float, interval: tuple[float, float] | None
) -> None:
    with pytest.raises(UserError):
        Number(value, "s", "measured", HERE, interval)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UserError, match="guessed"):
        Number(1, "s", "guessed", HERE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "half", "digits"),
    [(410.23, 0.52, 2), (410.23, 12.0, 0), (0.086821, 0.00017, 5), (12345.6, 0.001, 0)],
)
def test_decimals_follow_the_interval_but_never_run_away(value: float, half: float, digits: int) -> None:
    number = numbers.with_half_width(value, half, "s", "measured", HERE)
    assert number.digits == digits
    assert number.interval == (value - half, value + half)


def test_an_unknown_interval_is_none() -> None:
    assert numbers.with_half_width(41.23, nan, "s", "measured", HERE) == Number(
        41.23, "s", "measured", HERE, None, 1
    )
    assert numbers.decimals(0) == 0


def test_measured_numbers_lead_back_to_their_cell(tmp_path: Path) -> None:
    found = synthetic.sweep_results(synthetic.root(tmp_path / "root", synthetic.configurations()))
    table = pd.read_csv(tmp_path / "root/results/aggregated/h200/configurations.csv")
    table = table[table["status"] == "ok"]
    cells = {row_label(row): row for _, row in table.iterrows()}
    checked = 0
    for key, number in found.items():
        row, column = cells.get(number.source.row), number.source.column
        if number.kind == "measured" and row is not None and column in table.columns:
            factor = 100 if number.unit == "%" and not column.endswith("_percent") else 1
            assert number.value == pytest.approx(factor * row[column], rel=1e-9), key
            checked += 1
    assert checked > 40


def test_a_campaign_without_a_counter_leaves_its_numbers_out(tmp_path: Path) -> None:
    table = synthetic.configurations().assign(gpu_energy_Wh=nan, gpu_energy_Wh_kind="", mean_power_W=nan)
    table = table.assign(
        gpus=0, gpu_uuids="", gpu_energy_Wh_pass_means="", gpu_energy_Wh_pass_spread_percent=nan
    )
    base = synthetic.root(tmp_path / "root", table)
    raw = base / "results/raw/h200/resolution"
    for path, record in zip(sorted(raw.iterdir()), synthetic.records(gpu=False), strict=True):
        path.write_text(json.dumps(record))
    found = synthetic.sweep_results(base)
    assert {"resolution.480x832.latency", "resolution.480x832.latency_spread"} <= found.keys()
    assert (
        not {"resolution.480x832.gpu_energy", "setup.gpu", "setup.tick", "setup.measuring_energy"}
        & found.keys()
    )
    boards = ("setup.boards", "resolution.boards", "resolution.one_board", "frames.boards", "sweeps.boards")
    boards += ("conditions", "slow.power")
    assert not [key for key in found if key.startswith(boards)]


def test_one_pass_has_no_spread_and_nothing_to_compare(tmp_path: Path) -> None:
    table = synthetic.configurations()
    for name in ("latency_s", "gpu_energy_Wh"):
        table[f"{name}_pass_means"], table[f"{name}_pass_spread_percent"] = table[name], nan
    found = synthetic.sweep_results(
        synthetic.root(tmp_path / "root", table.assign(passes=1, gpus=1, gpu_uuids="GPU-A"))
    )
    assert "resolution.480x832.latency" in found
    assert not [key for key in found if "spread" in key or ".boards." in key or "one_board" in key]


def test_passes_and_boards_equal_the_planted_ones(tmp_path: Path) -> None:
    base = synthetic.root(tmp_path / "root", synthetic.configurations())
    value = {key: number.value for key, number in synthetic.sweep_results(base).items()}
    assert (value["setup.boards"], value["setup.passes"]) == (3, 2)
    # pass 1 begins at one o'clock, pass 2 at two; a record ends 61 s after its origin
    assert value["setup.between"] == pytest.approx(60 + 61 / 60)
    spread = 100 * 2 * (synthetic.SLOWER - 1) / (synthetic.SLOWER + 1)
    for quantity in ("latency", "gpu_energy"):
        assert value[f"resolution.spread.{quantity}_median"] == pytest.approx(spread)
        assert value[f"resolution.spread.{quantity}_most"] == pytest.approx(spread)
        assert value[f"resolution.720x1280.{quantity}_spread"] == pytest.approx(spread)
        assert value[f"resolution.largest.{quantity}_spread"] == pytest.approx(0, abs=1e-9)
        assert value[f"resolution.repetition.{quantity}"] == pytest.approx(0.5)  # std is planted so
        first, second = (value[f"resolution.720x1280.{quantity}_pass{number}"] for number in (1, 2))
        assert first / second == pytest.approx(synthetic.SLOWER)
    assert [value[f"resolution.boards.a.{name}"] for name in ("sizes", "least", "most")] == pytest.approx(
        [3, 4, 4]  # the smallest size is left out
    )
    assert [value[f"resolution.boards.b.{name}"] for name in ("sizes", "least", "most")] == pytest.approx(
        [1, 0, 0], abs=1e-9
    )
    for number in (1, 2):
        assert value[f"resolution.smallest.power_pass{number}"] == pytest.approx(synthetic.POWER_W)
    for prefix in ("resolution.exponent.256x256.480x832", "resolution.exponent.480x832.720x1280"):
        for name in ("latency_least", "latency_most"):  # both boards slow every size alike
            assert value[f"{prefix}.{name}"] == pytest.approx(value[f"{prefix}.latency"], rel=1e-9)


def test_conditions_and_slow_generations_equal_the_planted_ones(tmp_path: Path) -> None:
    base = synthetic.root(tmp_path / "root", synthetic.configurations())
    value = {key: number.value for key, number in synthetic.sweep_results(base).items()}
    assert (value["conditions.clock_least"], value["conditions.clock_most"]) == (1710, 1720)
    assert (value["conditions.temperature_least"], value["conditions.temperature_most"]) == (60, 61)
    assert [value[f"conditions.720x1280.clock_pass{number}"] for number in (1, 2)] == [1710, 1720]
    assert value["conditions.largest.clock"] == 1715
    # 21 generations of two samples; those of the slow one are not held by the power limit
    assert value["conditions.capped"] == pytest.approx(100 * 40 / 42)
    assert (value["slow.generations"], value["slow.of"]) == (1, 3)
    assert value["slow.step_excess"] == pytest.approx(50)
    assert (value["slow.power_slow"], value["slow.power_rest"]) == pytest.approx((400, 600))
    assert value["slow.clock_least"] == 1720


def test_conditions_take_samples_of_the_loops_alone() -> None:
    record = synthetic.record(step_s=(1.0, 1.5))
    record["samples"]["time_s"] += [0.5, 60.0]  # type: ignore[index]
    for name, far in (("power_instant_W", 9999.0), ("sm_clock_MHz", 1), ("temperature_C", 99)):
        record["samples"][name] += [far, far]  # type: ignore[index]
    record["samples"]["throttle_reasons"] += [0, None]  # type: ignore[index]
    found = conditions.conditions([record])
    assert found["samples"].tolist() == [2, 2]
    assert found["step_s"].tolist() == pytest.approx([1.0, 1.5])
    assert found["power_W"].tolist() == pytest.approx([600, 400])
    assert found["clock_most_MHz"].tolist() == [1710, 1710]
    assert found["capped_percent"].tolist() == [100, 0]
    assert conditions.slow_generations(found)["slow"].tolist() == [False, True]


def test_records_without_generations_or_samples_have_no_conditions() -> None:
    assert len(conditions.conditions([synthetic.record() | {"status": "out_of_memory"}])) == 0
    found = conditions.conditions([synthetic.record(gpu=False)])
    assert found["samples"].tolist() == [0, 0]
    assert found["power_W"].isna().all()
    assert len(conditions.slow_generations(found)) == 0


def test_facts_are_summed_and_named_once(tmp_path: Path) -> None:
    synthetic.write_records(tmp_path / "raw", synthetic.record(), synthetic.record())
    found = facts.read_facts("raw", tmp_path)
    assert (found.records, found.gpu, found.kernels) == (2, "NVIDIA H200", "cudnn")
    assert found.measuring_s == pytest.approx(2 * 60)
    assert found.measuring_Wh == pytest.approx(2 * 10)
    assert found.tick_s == pytest.approx(0.1)
    assert found.versions["torch"] == "2.11.0"
    assert (found.boards, found.passes, len(found.generations)) == (1, 1, 4)


def test_the_protocol_is_that_of_the_most_records(tmp_path: Path) -> None:
    other = synthetic.record()
    other["protocol_settings"] = {"sampled": {}}
    synthetic.write_records(tmp_path / "raw", other, synthetic.record(), synthetic.record())
    assert facts.read_facts("raw", tmp_path).protocol_settings["idle_s"] == 2.0


def test_records_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    slower = synthetic.record()
    slower["environment"]["gpu"]["power_limit_W"] = 600.0  # type: ignore[index]
    synthetic.write_records(tmp_path / "limits", synthetic.record(), slower)
    with pytest.raises(UserError, match="power limits"):
        facts.read_facts("limits", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no records"):
        facts.read_facts("empty", tmp_path)


def test_the_root_is_found_from_inside_and_not_from_outside(tmp_path: Path) -> None:
    assert facts.repository_root(synthetic.REPOSITORY / "workflow" / "notebooks") == synthetic.REPOSITORY
    with pytest.raises(UserError, match="not inside the repository"):
        facts.repository_root(tmp_path)
