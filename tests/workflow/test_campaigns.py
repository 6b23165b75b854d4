"""What is planned for campaigns that measure less than the study, or something else."""

from __future__ import annotations

import pandas as pd
import pytest
from clone import IN_CPU_SMALL, QUICK, Clone

VARY = [{"height": 32, "width": 32}, {"height": 32, "width": 48}]
CONFIG = ("--config", "campaign=some")
SWEEPS = {"sweeps", "scaling", "breakdown"}
ALWAYS = {"prompts", "measure_batch", "aggregate", "theory", "meter", "figures", "tables", "all"}


def _campaign(clone: Clone, *experiments: str) -> None:
    own = {key: {**IN_CPU_SMALL, "vary": VARY} for key in experiments}
    clone.write_campaign("some", protocols=QUICK, experiments=own)


def _experiment(clone: Clone, key: str) -> None:
    """An experiment's file; the campaign sets its model and its sizes."""
    text = (clone.root / "config/experiments/resolution.yaml").read_text(encoding="utf-8")
    path = clone.root / "config" / "experiments" / f"{key}.yaml"
    path.write_text(text.replace("key: resolution", f"key: {key}"), encoding="utf-8")


@pytest.mark.parametrize(
    ("experiments", "analyses", "figures"),
    [
        (("resolution",), SWEEPS, {"fig2", "exponents", "stages", "codecarbon"}),
        (("steps",), SWEEPS | {"comparison"}, {"fig4", "exponents", "stages", "codecarbon", "settling"}),
        (("validation",), {"comparison"}, {"settling"}),
        (("kernels",), {"comparison"}, {"settling", "kernels"}),
        (("cross-model",), {"models"}, {"fig1", "fig5", "fig5b"}),
        (("mine",), set(), set()),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else None,
)
def test_only_what_has_data_is_planned(
    clone: Clone, experiments: tuple[str, ...], analyses: set[str], figures: set[str]
) -> None:
    for key in ("mine", "cross-model"):
        _experiment(clone, key)
    _campaign(clone, *experiments)
    planned = set(clone.planned(*CONFIG))
    assert planned - {"figures", "tables"} == ALWAYS - {"figures", "tables"} | analyses
    assert set(clone.planned("figures", "tables", *CONFIG)) == planned - {"all"} | {"figures", "tables"}
    built = [name for name in clone.outputs(*CONFIG) if name.startswith("results/figures/some/")]
    assert {name for name in built if name.endswith(".pdf")} == {
        f"results/figures/some/{name}.pdf" for name in figures
    }


def test_an_experiment_of_ones_own_is_built_to_its_end(clone: Clone) -> None:
    """None of the study's sweeps: measured, aggregated, and nothing of stage 4 needs more."""
    _experiment(clone, "mine")
    _campaign(clone, "mine")
    done = clone.snakemake("--cores", "2", *CONFIG)
    assert done.returncode == 0, done.stdout
    assert (clone.root / "results/tables/some/table7.csv").stat().st_size > 0
    assert clone.planned(*CONFIG) == {}


def test_a_model_is_compared_with_the_study_without_a_gpu(clone: Clone) -> None:
    """Measured for real: a tiny model that the study has not, on the CPU, without counter or peak."""
    _experiment(clone, "cross-model")
    clone.write_campaign(
        "some",
        protocols=QUICK,
        experiments={"cross-model": {**IN_CPU_SMALL, "vary": VARY[:1]}},
    )
    done = clone.snakemake("--cores", "2", *CONFIG)
    assert done.returncode == 0, done.stdout
    built = clone.root / "results/tables/some"
    table = pd.read_csv(built / "table4.csv").set_index("model")
    assert list(table.index)[-1] == "tiny-wan"
    assert table.loc["tiny-wan", "latency_s"] > 0
    assert table["printed_latency_s"].notna().sum() == 7
    signs = pd.read_csv(built / "signs.csv").set_index("check")
    assert signs.loc["denoiser_time_share", "verdict"] in ("holds", "fails")
    assert signs.loc["throttling", "verdict"] == "unknown"
    assert (clone.root / "results/figures/some/fig1.pdf").stat().st_size > 0
    assert clone.planned(*CONFIG) == {}
