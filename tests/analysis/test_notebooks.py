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


def test_the_resolution_notebook_builds_its_three_results(tmp_path: Path) -> None:
    base = synthetic.root(tmp_path / "root", synthetic.configurations())
    papermill.execute_notebook(
        synthetic.REPOSITORY / "workflow/notebooks/resolution.ipynb",
        tmp_path / "executed.ipynb",
        parameters={"root": str(base)},
        kernel_name="python3",
        progress_bar=False,
        cwd=str(base),
    )
    for name in ("figures/fig2.pdf", "results/tables/h200/table3.csv", "results/tables/h200/table3.tex"):
        assert (base / name).stat().st_size > 0, name
    found = json.loads((base / "results/numbers/h200/resolution.json").read_text())
    assert found["resolution.single_mu.efficiency"]["value"] == pytest.approx(synthetic.MU, rel=1e-6)
