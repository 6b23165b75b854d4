"""Notebooks are short, clean and run as they are."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import papermill
import pytest
import synthetic_campaign as synthetic

NOTEBOOKS = sorted((synthetic.REPOSITORY / "workflow" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_short_clean_and_has_parameters(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert len(notebook.cells) < 10
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    assert tagged[0] is code[0]


def run(notebook: str, base: Path, parameters: dict[str, str]) -> None:
    papermill.execute_notebook(
        synthetic.REPOSITORY / "workflow" / "notebooks" / notebook,
        base / "executed.ipynb",
        parameters={"root": str(base)} | parameters,
        kernel_name="python3",
        progress_bar=False,
        cwd=str(base),
    )


def test_the_notebook_of_the_sweeps_builds_its_figures_table_and_numbers(tmp_path: Path) -> None:
    base = synthetic.root(tmp_path / "root", synthetic.configurations())
    run("sweeps.ipynb", base, {})
    built = [f"figures/fig{number}.{ending}" for number in (2, 3, 4) for ending in ("pdf", "png", "svg")]
    for name in (*built, "results/tables/h200/table3.csv", "results/tables/h200/table3.tex"):
        assert (base / name).stat().st_size > 0, name
    found = json.loads((base / "results/numbers/h200/sweeps.json").read_text())
    assert found["sweeps.single_mu.efficiency"]["value"] == pytest.approx(synthetic.MU, rel=1e-6)


def test_the_notebook_of_the_sweeps_makes_what_a_campaign_has_data_for(tmp_path: Path) -> None:
    table = synthetic.configurations()
    base = synthetic.root(tmp_path / "root", table[table["experiment"] == "frames"])
    where = {"records": "results/raw/h200", "figures": "f", "table": "t/three", "numbers": "n.json"}
    run("sweeps.ipynb", base, where)
    assert sorted(path.name for path in (base / "f").iterdir()) == ["fig3.pdf", "fig3.png", "fig3.svg"]
    assert {line.split(",")[0] for line in (base / "t/three.csv").read_text().splitlines()[1:]} == {"frames"}
    assert not [key for key in json.loads((base / "n.json").read_text()) if key.startswith("resolution")]
