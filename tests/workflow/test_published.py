"""Campaign ``published-h100`` through Snakemake, from self-written rows: no network, nothing measured."""

from __future__ import annotations

import pandas as pd
from clone import Clone
from published_rows import clean_rows, sweep_rows, write
from t2v_energy.config import load_campaign

CAMPAIGN = "published-h100"


def test_copies_give_the_figures_and_tables_that_they_allow(clone: Clone) -> None:
    path = clone.root / "config" / "campaigns" / f"{CAMPAIGN}.yaml"
    pinned = str(load_campaign(clone.root, CAMPAIGN).sources["cross_model"].sha256)
    path.write_text(path.read_text().replace(pinned, "null"))
    write(clone.root / "models.csv", clean_rows())
    write(clone.root / "sweeps.csv", sweep_rows())
    config = (f"campaign={CAMPAIGN}", "published_cross_model=models.csv", "published_sweeps=sweeps.csv")
    done = clone.snakemake("--cores", "2", "--config", *config)
    assert done.returncode == 0, done.stdout
    for figure in ("fig2", "fig3", "fig4", "fig5"):
        assert (clone.root / f"results/figures/{CAMPAIGN}/{figure}.pdf").stat().st_size > 1000
    tables = clone.root / "results" / "tables" / CAMPAIGN
    table3 = pd.read_csv(tables / "table3.csv").query("predictor == 'paper' and quantity == 'latency_s'")
    assert set(table3["set"]) == {"resolution", "frames", "steps"}
    table4 = pd.read_csv(tables / "table4_recomputed.csv")
    assert len(table4) == 28
    assert set(pd.read_csv(tables / "audit.csv")["source"]) == {"sweeps"}


def test_another_file_than_the_pinned_one_stops_the_build(clone: Clone) -> None:
    write(clone.root / "models.csv", clean_rows())
    config = (f"campaign={CAMPAIGN}", "published_cross_model=models.csv")
    done = clone.snakemake("--cores", "1", "--config", *config)
    assert done.returncode != 0
    log = clone.root / "logs" / "published" / CAMPAIGN / "adapt.log"
    assert "SHA-256" in log.read_text()
    assert not (clone.root / f"results/aggregated/{CAMPAIGN}/configurations.csv").exists()
