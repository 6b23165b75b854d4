"""Sampled against whole generations: planted differences, boards and drifts must come out again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import records
import synthetic_campaign as synthetic
from t2v_energy.analysis import validation
from t2v_energy.analysis.tables import write_csvs
from t2v_energy.config import ProtocolSettings
from t2v_energy.errors import UserError
from t2v_energy.measurement.record import Spans, Windows

STEPS = 20
FIRST_S, LAST_S = 0.4, 0.6  # times of the first and last step of a planted generation


def table(*rows: dict[str, object]) -> pd.DataFrame:
    return validation.validation_table(pd.DataFrame(list(rows)))


def pair(**sampled: Any) -> list[dict[str, object]]:
    """Both rows of one configuration; ``sampled`` changes the second."""
    size = (480, 832)
    full = synthetic.row("validation", size, protocol="full", uuids=("GPU-B",), n=5)
    return [full, synthetic.row("validation", size, uuids=("GPU-B",), times=1.003) | sampled]


class TestBothProtocols:
    def test_the_planted_difference_of_each_size(self) -> None:
        found = validation.validation_table(synthetic.configurations())
        assert tuple(found.columns) == validation.VALIDATION_COLUMNS
        contract = ["configuration", "quantity", "full", "sampled", "difference_percent", "n_full"]
        assert list(found.columns[:6]) == contract
        totals = found[found["quantity"].isin(validation.QUANTITIES)]
        assert len(totals) == 2 * len(synthetic.VALIDATION)
        percent = 100 * (synthetic.SAMPLED_OVER_FULL - 1)
        assert totals["difference_percent"].to_numpy() == pytest.approx(percent)
        assert set(totals["accepted"]) == {"yes"}
        assert set(found["same_board"]) == {"yes"}
        sizes = [name.split("_")[1] for name in found["configuration"].drop_duplicates()]
        assert sizes == [f"{h}x{w}" for h, w in synthetic.VALIDATION]  # by rising size

    def test_one_whole_generation_has_no_interval(self) -> None:
        found = validation.validation_table(synthetic.configurations())
        one = found[found["configuration"].str.contains("720x1280") & (found["quantity"] == "latency_s")]
        assert (one["n_full"].item(), one["n_sampled"].item()) == (1, 6)
        assert one[["full_ci95", "difference_ci95_percent"]].isna().all(axis=None)
        assert one["sampled_ci95"].notna().all()

    def test_the_difference_has_both_intervals_in_quadrature(self) -> None:
        row = table(*pair(latency_s_ci95=1.0)).set_index("quantity").loc["latency_s"]
        relative = np.hypot(0.01, 1.0 / row["sampled"])
        assert row["difference_ci95_percent"] == pytest.approx(100 * 1.003 * relative)

    @pytest.mark.parametrize(("times", "accepted"), [(1.0049, "yes"), (0.9949, "no"), (1.0051, "no")])
    def test_half_a_percent_is_the_limit_either_way(self, times: float, accepted: str) -> None:
        full = pair()[0]
        sampled = synthetic.row("validation", (480, 832), uuids=("GPU-B",), times=times)
        found = table(full, sampled).set_index("quantity")["accepted"]
        assert found[["latency_s", "gpu_energy_Wh"]].to_list() == [accepted] * 2
        assert found["step_time_s"] == ""

    def test_a_configuration_under_one_protocol_has_no_row(self) -> None:
        assert table(pair()[0]).empty
        assert table(*pair(status="out_of_memory")).empty
        assert list(table(synthetic.row("resolution", (480, 832))).columns) == list(
            validation.VALIDATION_COLUMNS
        )

    def test_energies_that_were_not_measured_have_no_row(self) -> None:
        rows = [row | {"gpu_energy_Wh": np.nan, "step_energy_J": np.nan} for row in pair(mean_power_W=np.nan)]
        found = set(table(*rows)["quantity"])
        assert found == {"latency_s", "step_time_s", "once_s"}

    def test_two_kernels_in_one_protocol_are_refused(self) -> None:
        full, sampled = pair()
        with pytest.raises(UserError, match="several rows of protocol full"):
            table(full, full | {"attention_kernel": "flash"}, sampled)


class TestBoards:
    def test_none_in_common_is_told(self) -> None:
        found = table(*pair(gpu_uuids="GPU-C"))
        assert set(found["same_board"]) == {"no"}
        assert set(found["gpu_uuid"]) == {"GPU-B;GPU-C"}

    def test_none_known_is_told(self) -> None:
        rows = [row | {"gpu_uuids": np.nan} for row in pair()]
        assert set(table(*rows)["same_board"]) == {""}

    def test_of_several_boards_only_those_that_ran_both_count(self) -> None:
        """Board A is 4 % slower than C: without it the planted 0.3 % are left."""
        size = (480, 832)
        full = synthetic.row("validation", size, protocol="full", uuids=("GPU-A", "GPU-C"))
        own = {q: float(str(full[f"{q}_pass_means"]).split(";")[1]) for q in validation.QUANTITIES}
        changes = {q: 1.003 * value for q, value in own.items()}
        changes |= {f"{q}_pass_means": str(value) for q, value in changes.items()}
        sampled = synthetic.row("validation", size, uuids=("GPU-C",)) | changes
        assert sampled["latency_s"] / full["latency_s"] < 0.99  # rows alone would say −1.7 %
        found = table(full, sampled).set_index("quantity")
        for quantity in validation.QUANTITIES:
            assert found.loc[quantity, "difference_percent"] == pytest.approx(0.3)
            assert found.loc[quantity, "full"] == pytest.approx(own[quantity])
            assert (found.loc[quantity, "same_board"], found.loc[quantity, "gpu_uuid"]) == ("yes", "GPU-C")
            assert np.isnan(found.loc[quantity, "difference_ci95_percent"])
        assert found.loc["step_time_s", "same_board"] == "no"  # not known by board


def drifting(line: records.Timeline, steps: int, scale: float) -> None:
    """A generation whose steps take from :data:`FIRST_S` to :data:`LAST_S`, evenly, at falling power."""
    line.window("generation", steps)
    line.span("text_encoder", -1, 0, records.TEXT_S, records.TEXT_W)
    for step, seconds in enumerate(np.linspace(FIRST_S, LAST_S, steps) * scale):
        line.span("denoiser", step, 0, 0.8 * seconds, 700 - 5 * step)
        line.span("scheduler", step, 0, 0.2 * seconds, 700 - 5 * step)
    line.span("vae_decode", -1, 0, records.VAE_S, records.VAE_W)
    line.close()


def whole_record(scales: tuple[float, ...] = (1.0,), steps: int = STEPS, **changes: Any) -> Any:
    """A record of protocol ``full`` whose generations drift, each ``scale`` times as long."""
    line = records.Timeline()
    line.pass_time(1.0, records.IDLE_W)
    for scale in scales:
        drifting(line, steps, scale)
        line.pass_time(0.5, records.IDLE_W)
    config = records.configuration(num_inference_steps=steps)
    values: dict[str, Any] = {"experiment": "validation", "protocol": "full", "config": config}
    values |= {"windows": Windows(**line.windows), "spans": Spans(**line.spans)}
    values |= {"ticks": line.ticks(), "samples": line.samples(1.0, 0x4)}
    return records.make_record(**(values | changes))


Wholes = Callable[..., list[validation.Whole]]


@pytest.fixture
def wholes(tmp_path: Path) -> Wholes:
    """Reads records that it writes into a folder."""

    def read(*made: Any) -> list[validation.Whole]:
        for record in made:
            records.write(record, tmp_path / "raw" / record.experiment)
        return validation.read_whole(tmp_path / "raw" / name for name in validation.WHOLE_EXPERIMENTS)

    return read


class TestReading:
    def test_only_whole_generations_of_enough_steps(self, wholes: Wholes) -> None:
        found = wholes(
            whole_record(),
            whole_record(steps=5, experiment="steps"),  # too few steps
            whole_record(steps=50, experiment="steps", protocol="sampled"),
            records.out_of_memory(experiment="steps", protocol="full"),
            whole_record(steps=30, experiment="steps"),
            whole_record(steps=10, experiment="steps"),
        )
        steps = [(w.record.experiment, w.record.configuration.num_inference_steps) for w in found]
        assert steps == [("validation", 20), ("steps", 10), ("steps", 30)]

    def test_parts_add_up_to_the_generation(self, wholes: Wholes) -> None:
        (whole,) = wholes(whole_record((1.0, 1.1)))
        for number, generation in enumerate(whole.generations):
            length_s = generation.end_s - generation.start_s
            assert whole.step_s[number].sum() + whole.once_s[number] == pytest.approx(length_s)
        assert whole.step_s.shape == whole.step_J.shape == (2, STEPS)
        assert whole.once_J == pytest.approx(
            records.TEXT_S * records.TEXT_W + records.VAE_S * records.VAE_W, rel=0.02
        )

    def test_a_campaign_without_such_records(self, tmp_path: Path) -> None:
        found = validation.read_whole([tmp_path / "nothing"])
        assert found == []
        assert list(validation.steps_table(found).columns) == list(validation.STEPS_COLUMNS)
        assert list(validation.drift_table(found).columns) == list(validation.DRIFT_COLUMNS)


class TestFirstSteps:
    def test_composed_totals_miss_the_planted_drift(self, wholes: Wholes) -> None:
        table = validation.steps_table(wholes(whole_record()))
        found = table[table["composed_from"] == "all"].set_index(["first_steps", "quantity"])
        seconds = np.linspace(FIRST_S, LAST_S, STEPS)
        once_s = records.TEXT_S + records.VAE_S
        once_J = records.TEXT_S * records.TEXT_W + records.VAE_S * records.VAE_W
        joules = seconds * (700 - 5 * np.arange(STEPS))
        # of 20 steps of 0.5 s on the average, sampled would have run those that fill 4 s
        assert found.index.unique("first_steps").to_list() == [1, 2, 4, 6, 8]
        assert found["as_sampled"].to_list() == [""] * 8 + ["yes"] * 2
        for first in (1, 2, 4, 6, 8):
            for quantity, steps, once, unit in (
                ("latency_s", seconds, once_s, 1),
                ("gpu_energy_Wh", joules, once_J, 3600),
            ):
                row = found.loc[first, quantity]
                whole, composed = once + steps.sum(), once + STEPS * steps[:first].mean()
                assert row["whole"] == pytest.approx(whole / unit, rel=2e-3)
                assert row["composed"] == pytest.approx(composed / unit, rel=0.01)
                assert row["difference_percent"] == pytest.approx(100 * (composed / whole - 1), abs=1)
                assert row["accepted"] == "no"
                assert np.isnan(row["difference_ci95_percent"])
        latency = found.xs("latency_s", level="quantity")["difference_percent"]
        # steps begin after 0, 0.4, 0.81, 1.23, 1.66, 2.11, … s: the sixth is the first settled one
        settled = table[(table["composed_from"] == "settled") & (table["quantity"] == "latency_s")]
        whole = once_s + seconds.sum()
        for first, row in settled.set_index("first_steps").iterrows():
            stand_in = seconds[5 if first > 5 else 0 : first].mean()
            composed = once_s + seconds[:first].sum() + (STEPS - first) * stand_in
            assert row["composed"] == pytest.approx(composed, rel=1e-3)
            assert row["difference_percent"] == pytest.approx(100 * (composed / whole - 1), abs=0.1)
        assert latency.is_monotonic_increasing  # more steps, less of the drift is missed
        assert latency.iloc[0] < -15

    def test_generations_are_compared_each_with_its_own_steps(self, wholes: Wholes) -> None:
        """A generation that is slower throughout is no error of composing it."""
        tables = (validation.steps_table(wholes(whole_record(scales))) for scales in ((1.0,), (1.0, 1.5)))
        one, two = (
            table[table["composed_from"] == "all"].set_index(["first_steps", "quantity"]) for table in tables
        )
        row = two.loc[4, "latency_s"]
        assert row["generations"] == 2
        assert row["whole"] > 1.2 * one.loc[4, "latency_s"]["whole"]
        # only the once-a-video part, which does not scale, makes a difference
        assert row["difference_percent"] == pytest.approx(
            one.loc[4, "latency_s"]["difference_percent"], abs=0.5
        )
        assert row["difference_least_percent"] < row["difference_percent"] < row["difference_most_percent"]
        assert row["difference_ci95_percent"] > 0

    @pytest.mark.parametrize(
        ("sampled", "expected"),
        [
            ({"min_window_s": 1.2}, [1, 2, 3, 4, 6]),
            ({"min_window_s": 0.1, "min_steps": 2}, [1, 2, 4, 6]),
            ({"min_window_s": 100.0}, [1, 2, 4, 6]),  # it would have run them all: nothing is composed
        ],
    )
    def test_as_many_steps_as_the_records_own_settings_say(
        self, wholes: Wholes, sampled: dict[str, float], expected: list[int]
    ) -> None:
        settings = ProtocolSettings.model_validate({"sampled": sampled})
        found = validation.steps_table(wholes(whole_record(protocol_settings=settings)))
        assert found["first_steps"].drop_duplicates().to_list() == expected
        assert (found["first_steps"] < STEPS).all()
        assert found["as_sampled"].eq("yes").sum() == (0 if sampled["min_window_s"] > 10 else 4)

    def test_steps_that_are_alike_are_accepted(self, wholes: Wholes) -> None:
        record = records.make_record(
            steps=12,
            experiment="steps",
            protocol="full",
            config=records.configuration(num_inference_steps=12),
        )
        found = validation.steps_table(wholes(record))
        assert found["difference_percent"].abs().max() < 0.05
        assert set(found["accepted"]) == {"yes"}

    def test_without_a_counter_there_are_latencies_alone(self, wholes: Wholes) -> None:
        found = wholes(whole_record(gpu=None, ticks=None, samples=None))
        assert set(validation.steps_table(found)["quantity"]) == {"latency_s"}
        drift = validation.drift_table(found)
        assert drift["step_time_s"].notna().all()
        assert drift[["power_W", "sm_clock_MHz", "temperature_C", "capped_percent"]].isna().all(axis=None)
        assert set(drift["gpu_uuid"]) == {""}


class TestDrift:
    def test_the_planted_drift_from_the_first_step_to_the_last_tenth(self, wholes: Wholes) -> None:
        found = validation.drift_table(wholes(whole_record((1.0, 1.5))))
        parts = ["step 1", "step 2", "step 3", *(f"{n}/10" for n in range(1, 11))]
        assert list(found["part"]) == parts * 2
        first, second = (found[found["generation"] == n].set_index("part") for n in (1, 2))
        seconds = np.linspace(FIRST_S, LAST_S, STEPS)
        assert first.loc["step 1", "step_time_s"] == pytest.approx(FIRST_S, abs=1e-3)
        assert first.loc["10/10", "step_time_s"] == pytest.approx(seconds[-2:].mean(), abs=1e-3)
        assert first.loc["10/10", ["first_step", "last_step"]].to_list() == [19, 20]
        assert first.loc["step 1", "step_time_percent"] == pytest.approx(100 * FIRST_S / 0.5, abs=0.3)
        assert second.loc["step 1", "step_time_s"] == pytest.approx(1.5 * FIRST_S, abs=1e-3)
        assert second["step_time_percent"].to_numpy() == pytest.approx(
            first["step_time_percent"].to_numpy(), abs=0.3
        )
        for name, power_W in (("1/10", 697.5), ("10/10", 607.5)):
            assert first.loc[name, "power_W"] == pytest.approx(power_W, rel=0.01)
        tenths = first.loc[[f"{n}/10" for n in range(1, 11)], "power_percent"]
        assert tenths.is_monotonic_decreasing
        assert (found["sm_clock_MHz"] == 1980).all()
        assert (found["capped_percent"] == 100).all()

    def test_clocks_and_limits_are_those_of_the_part(self, wholes: Wholes) -> None:
        record = whole_record()
        samples = record.samples
        half = len(samples.time_s) // 2
        mixed = samples.model_copy(
            update={
                "sm_clock_MHz": [1980] * half + [1500] * (len(samples.time_s) - half),
                "throttle_reasons": [0] * half + [0x4] * (len(samples.time_s) - half),
                "temperature_C": [None] * len(samples.time_s),
            }
        )
        found = validation.drift_table(wholes(record.model_copy(update={"samples": mixed})))
        by_part = found.set_index("part")
        assert by_part.loc["1/10", ["sm_clock_MHz", "capped_percent"]].to_list() == [1980, 0]
        assert by_part.loc["10/10", ["sm_clock_MHz", "capped_percent"]].to_list() == [1500, 100]
        assert found["temperature_C"].isna().all()


def test_tables_are_written_with_the_same_bytes_each_time(tmp_path: Path) -> None:
    frame = validation.validation_table(synthetic.configurations())
    (first,) = write_csvs({"validation": frame}, tmp_path / "new" / "a")
    (again,) = write_csvs({"validation": frame}, tmp_path / "b")
    assert first.name == "validation.csv"
    assert first.read_bytes() == again.read_bytes()
    assert pd.read_csv(first)["difference_percent"].to_numpy() == pytest.approx(
        frame["difference_percent"].to_numpy(), rel=1e-6
    )
