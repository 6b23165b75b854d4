"""Ticks and samples: what they refuse, and that they survive a record."""

import pytest
from pydantic import ValidationError
from t2v_energy.metering.series import MeterError, Sample, Samples, Tick, Ticks


def ticks(count: int = 10, period_s: float = 0.1) -> Ticks:
    return Ticks.from_rows(
        [
            Tick(1000 + i * period_s, 1000 + i * period_s - 0.0003, 1_000_000 + 50_000 * i)
            for i in range(count)
        ]
    )


def samples() -> Samples:
    return Samples.from_rows(
        [
            Sample(1000.0, 500.1234567, 480.0, 1980, 55, 4, 1024.5),
            Sample(1000.05, None, None, None, None, None, None),
        ]
    )


def test_round_trip_through_json() -> None:
    for series in (ticks().shifted(1000), samples().shifted(1000)):
        again = type(series).model_validate_json(series.model_dump_json())
        assert again.model_dump() == series.model_dump()
        assert type(again).model_validate_json(again.model_dump_json()) == again


def test_serialised_numbers_are_short() -> None:
    text = ticks().shifted(999.123456789).model_dump_json() + samples().model_dump_json()
    assert max(len(number.partition(".")[2]) for number in text.replace("]", ",").split(",")) <= 5


def test_columns_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValidationError, match="columns differ in length"):
        Ticks(time_s=[1.0, 2.0], not_before_s=[0.9], energy_mJ=[1, 2])
    with pytest.raises(ValidationError, match="columns differ in length"):
        Samples(time_s=[1.0])


@pytest.mark.parametrize("time_s", [[1.0, 1.0], [2.0, 1.0], [1.0, float("nan")]])
def test_time_must_increase(time_s: list[float]) -> None:
    with pytest.raises(ValidationError):
        Ticks(time_s=time_s, not_before_s=[0.5, 0.9], energy_mJ=[1, 2])


def test_a_change_cannot_end_before_it_began() -> None:
    with pytest.raises(ValidationError, match="is after time_s"):
        Ticks(time_s=[1.0], not_before_s=[1.1], energy_mJ=[1])


def test_a_counter_reset_is_named() -> None:
    with pytest.raises(ValidationError, match=r"fell from 500 to 3 mJ at 2\.0 s: it was reset"):
        Ticks(time_s=[1.0, 2.0], not_before_s=[0.9, 1.9], energy_mJ=[500, 3])


def test_unknown_columns_are_refused() -> None:
    with pytest.raises(ValidationError):
        Ticks.model_validate({"time_s": [], "not_before_s": [], "energy_mJ": [], "volts": []})


def test_between_keeps_a_margin() -> None:
    kept = ticks().between(1000.35, 1000.45, margin=1)
    assert kept.time_s == pytest.approx([1000.3, 1000.4, 1000.5])
    assert len(ticks().between(1000.35, 1000.45)) == 7
    assert len(ticks().between(0, 2000)) == 10
    assert samples().between(1000.01, 1000.02).time_s == [1000.0, 1000.05]
    with pytest.raises(MeterError, match="before it starts"):
        ticks().between(2, 1)


def test_consecutive_drains_join_without_doubling() -> None:
    whole = ticks(10)
    first, second = whole.between(0, 1000.45, margin=0), whole.between(1000.35, 2000, margin=0)
    assert first.time_s[-1] == second.time_s[0]
    assert first.joined(second) == whole
    assert Ticks().joined(whole) == whole
