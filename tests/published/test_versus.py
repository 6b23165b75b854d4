"""The study's H100 against our campaign, both planted: ratios, and what the kernel explains, are known."""

from __future__ import annotations

from math import log
from pathlib import Path

import pandas as pd
import pytest
import synthetic_campaign as synthetic
import synthetic_models
from published_rows import row, sweep_rows, write
from t2v_energy.published.campaign import configurations
from t2v_energy.published.versus import COLUMNS, overlays, versus_table

SIZE = (720, 1280, 81, 50)
SLOWER = 1.5
"""Times the latency of the planted H100 against ours."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    table = pd.concat([synthetic.configurations(), synthetic_models.rows()], ignore_index=True)
    return synthetic.root(tmp_path_factory.mktemp("versus") / "root", table)


def ours(base: Path, experiment: str, model: str = "wan2.1-t2v-1.3b") -> pd.Series:
    table = pd.read_csv(base / synthetic.CONFIGURATIONS)
    rows = table[
        (table["experiment"] == experiment) & (table["model"] == model) & (table["num_frames"] == 81)
    ]
    return rows[(rows["height"] == 720) & (rows["attention_kernel"] != "flash")].iloc[0]


def theirs(base: Path, tmp_path: Path) -> pd.DataFrame:
    """Three prompts of Wan2.1-T2V-1.3B that take 1.5 times as long as ours, within half a percent."""
    latency_s = SLOWER * float(ours(base, "resolution")["latency_s"])
    rows = [
        row("WAN2.1-T2V-1.3B", f"p{i}", duration_s=latency_s * (1 + 0.005 * (i - 1)), size=SIZE)
        for i in range(3)
    ]
    return configurations(base, write(tmp_path / "t.csv", rows), None).assign(experiment="resolution")


def test_ratio_and_what_the_kernel_explains(base: Path, tmp_path: Path) -> None:
    table = versus_table(base, "h200", synthetic.CONFIGURATIONS, theirs(base, tmp_path))
    assert tuple(table.columns) == COLUMNS
    found = table.set_index("quantity").loc["latency_s"]
    assert found["ratio"] == pytest.approx(SLOWER)
    assert found["tested"] == "yes"
    assert found["kernel_ratio"] == pytest.approx(synthetic.FLASH_SLOWER)
    assert found["remaining_ratio"] == pytest.approx(SLOWER / synthetic.FLASH_SLOWER)
    assert found["explained_percent"] == pytest.approx(100 * log(synthetic.FLASH_SLOWER) / log(SLOWER))
    their_half = 4.302653 * 0.005 / 3**0.5
    our_half = float(ours(base, "resolution")["latency_s_ci95"]) / float(
        ours(base, "resolution")["latency_s"]
    )
    assert found["ratio_ci95"] == pytest.approx(SLOWER * (their_half**2 + our_half**2) ** 0.5, rel=1e-4)


def test_a_campaign_on_the_same_gpu_model_is_compared_alike(base: Path, tmp_path: Path) -> None:
    """Ours there is planted a tenth slower than our campaign: the study's takes 1.5 / 1.1 times as long."""
    own = pd.read_csv(base / synthetic.CONFIGURATIONS)
    own["latency_s"] *= 1.1
    path = tmp_path / "same.csv"
    own.to_csv(path, index=False)
    table = versus_table(base, "h200", synthetic.CONFIGURATIONS, theirs(base, tmp_path), same_gpu=path)
    found = table.set_index("quantity").loc["latency_s"]
    assert found["own_h100"] == pytest.approx(1.1 * found["h200"])
    assert found["same_gpu_ratio"] == pytest.approx(SLOWER / 1.1)
    assert found["same_gpu_remaining_ratio"] == pytest.approx(SLOWER / 1.1 / synthetic.FLASH_SLOWER)
    assert found["same_gpu_explained_percent"] == pytest.approx(
        100 * log(synthetic.FLASH_SLOWER) / log(SLOWER / 1.1)
    )


def test_without_both_kernels_nothing_is_tested(base: Path, tmp_path: Path) -> None:
    rows = [
        row("CogVideoX-2b", duration_s=50),
        row("Mochi-1-preview", duration_s=263, size=(480, 848, 84, 64)),
    ]
    found = versus_table(
        base, "h200", synthetic.CONFIGURATIONS, configurations(base, write(tmp_path / "t.csv", rows), None)
    )
    assert set(found["configuration_id"]) == {"cogvideox-2b_480x720_49f_50s"}, (
        "ours ran out of memory with Mochi"
    )
    assert set(found["tested"]) == {"no"}
    assert found["kernel_ratio"].isna().all()


def test_figures_show_the_points_of_both(base: Path, tmp_path: Path) -> None:
    models = [row("CogVideoX-2b", f"p{i}", duration_s=50) for i in range(2)]
    both = configurations(base, write(tmp_path / "t.csv", models), write(tmp_path / "s.csv", sweep_rows()))
    figures = overlays(base, "h200", synthetic.CONFIGURATIONS, both)
    assert set(figures) == {"fig2", "fig3", "fig4", "fig5"}
    expected = both[both["experiment"] == "resolution"].assign(x=lambda t: t["height"] * t["width"] / 1e6)
    lines = [line for line in figures["fig2"].axes[0].lines if line.get_marker() == "D"]
    assert sorted(lines[0].get_xdata()) == pytest.approx(sorted(expected["x"]))
    assert sorted(lines[0].get_ydata()) == pytest.approx(sorted(expected["latency_s"]))
    costs = [line for line in figures["fig5"].axes[0].lines if line.get_marker() == "s"]
    assert [line.get_xdata()[0] for line in costs] == [pytest.approx(600 * 50 / 3600)]
