"""Numbers of frames, steps and of all sweeps together, against planted ones."""

from __future__ import annotations

from math import nan
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import synthetic_campaign as synthetic
from t2v_energy.analysis import number_parts, sweep_numbers
from t2v_energy.analysis.numbers import Number, Source
from t2v_energy.analysis.sweep import read_sweep
from t2v_energy.config import load_model
from t2v_energy.errors import UserError
from t2v_energy.work import true_work

CONFIGURATIONS = Path("results/aggregated/h200/configurations.csv")


def build(folder: Path, table: pd.DataFrame) -> dict[str, Number]:
    return synthetic.sweep_results(synthetic.root(folder / "root", table))


def values(folder: Path, table: pd.DataFrame) -> dict[str, float | int | str]:
    return {key: number.value for key, number in build(folder, table).items()}


def test_the_common_efficiency_is_the_planted_one_and_the_largest_video_weighs_most(tmp_path: Path) -> None:
    found = build(tmp_path, synthetic.configurations())
    number = found["sweeps.single_mu.efficiency"]
    assert number.value == pytest.approx(synthetic.MU)
    assert number.kind == "modelled"
    assert number.interval is not None
    points = len(synthetic.SIZES) + len(synthetic.FRAMES) + sum(map(len, synthetic.STEPS.values()))
    assert found["sweeps.points"].value == points
    assert found["sweeps.boards"].value == 3
    assert found["sweeps.single_mu.r2"].value == pytest.approx(1)
    model = load_model(synthetic.REPOSITORY, "wan2.1-t2v-1.3b")
    at = [(*size, 81, 50) for size in synthetic.SIZES]
    at += [(720, 1280, frames, 50) for frames in synthetic.FRAMES]
    at += [(*size, 81, s) for size, steps in synthetic.STEPS.items() for s in steps]
    flop = np.array([true_work(model, *point).total_flop for point in at])
    assert found["sweeps.single_mu.heaviest"].value == pytest.approx(100 * flop.max() ** 2 / (flop @ flop))
    for name in ("resolution", "frames", "steps"):
        assert found[f"{name}.single_mu.efficiency"].value == pytest.approx(synthetic.MU)


def test_frames_have_their_costs_ratios_passes_and_boards(tmp_path: Path) -> None:
    value = values(tmp_path, synthetic.configurations())
    assert (value["frames.lengths"], value["frames.shortest"], value["frames.longest"]) == (6, 5, 101)
    assert (value["frames.size"], value["frames.steps"], value["frames.passes"]) == ("720×1280", 50, 2)
    model = load_model(synthetic.REPOSITORY, "wan2.1-t2v-1.3b")
    seconds = {
        frames: true_work(model, 720, 1280, frames, 50).total_flop / (synthetic.MU * synthetic.PEAK)
        for frames in (5, 81, 101)
    }
    for label, frames in (("shortest", 5), ("81f", 81), ("longest", 101)):
        assert value[f"frames.{label}.latency"] == pytest.approx(seconds[frames])
        energy = synthetic.POWER_W * seconds[frames] / 3600
        assert value[f"frames.{label}.gpu_energy"] == pytest.approx(energy)
        assert value[f"frames.{label}.power"] == synthetic.POWER_W
    for name in ("latency", "gpu_energy"):
        assert value[f"frames.range.{name}"] == pytest.approx(seconds[101] / seconds[5])
    assert value["frames.range.tokens"] == 26 / 2  # latent frames
    assert value["frames.range.frames"] == pytest.approx(101 / 5)
    spread = 100 * 2 * (synthetic.SLOWER - 1) / (synthetic.SLOWER + 1)
    assert value["frames.spread.latency_median"] == pytest.approx(spread)
    boards = [value[f"frames.boards.a.{name}"] for name in ("sizes", "least", "most")]
    assert boards == pytest.approx([6, 4, 4])
    assert value["frames.single_mu.error_shortest"] == pytest.approx(0, abs=1e-6)
    assert value["frames.codecarbon_difference"] == pytest.approx(1)


def test_lengths_whose_tokens_fill_tiles_are_held_against_their_neighbours(tmp_path: Path) -> None:
    rows = [synthetic.row("frames", (720, 1280), frames) for frames in (25, 29, 33, 57, 61)]
    for row, mfu in zip(rows, (0.4, 0.5, 0.6, 0.5, 0.9), strict=True):
        row["mfu"] = mfu
    rows[1]["mfu"] = 0.55
    base = synthetic.root(tmp_path / "root", pd.DataFrame(rows))
    found = sweep_numbers.aligned_numbers(read_sweep(base, "h200", CONFIGURATIONS, "frames"))
    # 8 and 16 latent frames of 3600 tokens are multiples of 128; 61 frames lack the length above
    assert found["frames.aligned.lengths"].value == "29"
    assert found["frames.aligned.gain_most"].value == pytest.approx(10)
    assert found["frames.aligned.gain_most"].kind == "modelled"


def test_steps_have_their_costs_at_each_size(tmp_path: Path) -> None:
    found = build(tmp_path, synthetic.configurations())
    model = load_model(synthetic.REPOSITORY, "wan2.1-t2v-1.3b")
    rate = synthetic.MU * synthetic.PEAK
    for size, steps in synthetic.STEPS.items():
        stages = true_work(model, *size, 81, 1).flop_by_stage
        once_s = (stages["vae_decode"] + stages["text_encoder"]) / rate
        prefix = f"steps.{size[0]}x{size[1]}"
        assert found[f"{prefix}.once"].value == pytest.approx(once_s)
        assert (found[f"{prefix}.fewest"].value, found[f"{prefix}.most"].value) == (1, max(steps))
        for s in {1, 50, max(steps)}:
            latency = found[f"{prefix}.{s}s.latency"]
            assert latency.value == pytest.approx(once_s + s * stages["denoiser"] / rate)
            energy = synthetic.POWER_W * float(latency.value) / 3600
            assert found[f"{prefix}.{s}s.gpu_energy"].value == pytest.approx(energy)
            assert (latency.interval is None) == (steps[s] == 1)
        assert f"{prefix}.5s.latency" not in found
    assert (found["steps.points"].value, found["steps.generations_least"].value) == (10, 1)
    assert found["steps.480x832.single_mu.error_fewest"].value == pytest.approx(0, abs=1e-6)


def test_shapes_and_failures_of_resolution_are_counted(tmp_path: Path) -> None:
    rows = [
        synthetic.row("resolution", size, uuids=("GPU-D",), times=times)
        for size, times in (((624, 640), 1.01), ((832, 480), 0.98))
    ]
    rows.append(synthetic.row("resolution", (1088, 1920), uuids=("GPU-D",), n=1))
    found = build(tmp_path, pd.concat([synthetic.configurations(), pd.DataFrame(rows)]))
    value = {key: number.value for key, number in found.items()}
    assert value["resolution.shapes.count"] == 2
    for name in ("latency", "gpu_energy"):
        ends = [value[f"resolution.shapes.{name}_{end}"] for end in ("least", "most")]
        assert ends == pytest.approx([-2, 1])
    assert value["resolution.out_of_memory"] == 1
    assert value["resolution.sizes"] == len(synthetic.SIZES) + 3
    assert value["resolution.largest"] == "1088×1920"
    assert found["resolution.largest.latency"].interval is None  # measured once
    assert value["resolution.generations_least"] == 1


def test_the_studys_errors_are_those_that_it_prints(tmp_path: Path) -> None:
    found = build(tmp_path, synthetic.configurations())
    printed = {
        key: number.value for key, number in found.items() if ".mape_" in key and key.startswith("study")
    }
    assert printed == {
        "study.mape_latency": 14.0,
        "study.mape_energy": 11.6,
        "study.frames.mape_latency": 10.5,
        "study.frames.mape_energy": 6.6,
        "study.steps.mape_latency": 1.9,
        "study.steps.mape_energy": 1.9,
    }
    assert {found[key].kind for key in printed} == {"constant"}
    for name in ("resolution", "frames", "steps"):
        assert found[f"{name}.single_mu.mape_gpu_energy"].value == pytest.approx(100 * 50 / 650)


def test_a_campaign_without_frames_and_steps_or_a_counter_lacks_just_those(tmp_path: Path) -> None:
    table = synthetic.configurations()
    found = build(tmp_path / "a", table[table["experiment"] == "resolution"])
    assert not [key for key in found if key.startswith(("frames", "steps"))]
    assert found["sweeps.points"].value == len(synthetic.SIZES)
    energies = [column for column in table if "gpu_energy_Wh" in column]
    bare = table.assign(**dict.fromkeys(energies, nan), mean_power_W=nan, gpu_uuids="", gpus=0)
    found = build(tmp_path / "b", bare)
    assert "steps.480x832.200s.latency" in found
    assert "frames.longest.latency" in found
    assert not [key for key in found if "gpu_energy" in key and not key.startswith("study")]
    assert not [key for key in found if ".power" in key and key.startswith(("frames", "steps"))]
    with pytest.raises(UserError, match="no sweep"):
        sweep_numbers.sweep_numbers({}, {}, pd.DataFrame(), "", None)  # type: ignore[arg-type]


def test_a_key_given_twice_is_refused() -> None:
    part = {"a": Number(1, "", "constant", Source("f", "r", "c"))}
    with pytest.raises(UserError, match="given twice: a"):
        number_parts.merged(part, part)
    assert number_parts.merged(part, {}) == part


def test_one_configuration_is_held_against_itself_on_every_board(tmp_path: Path) -> None:
    found = build(tmp_path, synthetic.configurations())
    model = load_model(synthetic.REPOSITORY, "wan2.1-t2v-1.3b")
    value = true_work(model, 720, 1280, 81, 50).total_flop / (synthetic.MU * synthetic.PEAK)
    slow = synthetic.SLOWER
    # resolution and frames on boards A and C, steps on A, where it is the mean of both
    board_a = value * (2 * 2 * slow / (1 + slow) + 1) / 3
    board_c = value * 2 / (1 + slow)
    assert found["boards.720x1280.count"].value == 2
    assert found["boards.720x1280.latency_most"].value == pytest.approx(board_a)
    assert found["boards.720x1280.latency_least"].value == pytest.approx(board_c)
    assert found["boards.720x1280.latency_spread"].value == pytest.approx(100 * (board_a / board_c - 1))
    assert found["boards.720x1280.gpu_energy_least"].value == pytest.approx(
        board_c * synthetic.POWER_W / 3600
    )


def test_shapes_are_held_against_480x832_on_their_own_board(tmp_path: Path) -> None:
    shapes = [
        synthetic.row("resolution", size, uuids=(board,), times=1.02)
        for size, board in (((624, 640), "GPU-D"), ((832, 480), "GPU-E"))
    ]
    # board D is 5 % faster than the mean: against that the shape is 7.4 % slower, against the mean 2 %
    steps = synthetic.row("steps", (480, 832), protocol="full", uuids=("GPU-D",), n=1, times=0.95)
    table = synthetic.configurations()
    table = table[~((table["experiment"] == "steps") & (table["num_inference_steps"] == 50))]
    value = values(tmp_path, pd.concat([table, pd.DataFrame([*shapes, steps])]))
    for name in ("least", "most"):  # board E never ran 480×832
        found = value[f"resolution.shapes.same_board_latency_{name}"]
        assert found == pytest.approx(100 * (1.02 / 0.95 - 1))
        assert value[f"resolution.shapes.latency_{name}"] == pytest.approx(2)


def test_passes_on_one_board_are_counted_apart(tmp_path: Path) -> None:
    rows = [synthetic.row("frames", (720, 1280), frames) for frames in (25, 29, 33)]
    for row, spread in zip(rows, (1.0, 0.2, 0.1), strict=True):
        row["latency_s_pass_spread_percent"] = spread
    for row in rows[1:]:
        row["gpu_uuids"] = "GPU-A;GPU-A"
    base = synthetic.root(tmp_path / "root", pd.DataFrame(rows))
    found = sweep_numbers.same_board_numbers(read_sweep(base, "h200", CONFIGURATIONS, "frames"))
    assert found["frames.same_board.lengths"].value == 2
    assert found["frames.same_board.latency_most"].value == pytest.approx(0.2)
    assert found["frames.same_board.latency_median"].value == pytest.approx(0.15)
    alone = pd.DataFrame([synthetic.row("frames", (720, 1280), 25)])
    base = synthetic.root(tmp_path / "alone", alone)
    assert sweep_numbers.same_board_numbers(read_sweep(base, "h200", CONFIGURATIONS, "frames")) == {}
