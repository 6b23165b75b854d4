"""What the documents say is so: links, commands, targets, the generated reference, the examples."""

from __future__ import annotations

import difflib
import io
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import chdir, redirect_stdout
from dataclasses import fields
from pathlib import Path

import pandas as pd
import pytest
from clone import Clone
from t2v_energy import cli, config_reference
from t2v_energy.aggregation import aggregate
from t2v_energy.analysis import (
    alignment,
    cost,
    efficiency,
    instruments,
    interventions,
    kernels,
    models,
    models_checks,
    neighbour,
    operator_rates,
    operators,
    prediction,
    prompts,
    roofline,
    scaling,
    settling,
    stages,
    tables,
    theory,
    theory_thresholds,
    validation,
)
from t2v_energy.analysis.numbers import Number
from t2v_energy.audit import report
from t2v_energy.claims import verdicts
from t2v_energy.config import load_campaign
from t2v_energy.dag import CROSS_MODEL
from t2v_energy.measurement.sealing import is_sealed
from t2v_energy.metering.accuracy import accuracy_table
from t2v_energy.published import versus

ROOT = Path(__file__).resolve().parents[1]
TABLES = {
    "table1": theory.TABLE1_COLUMNS,
    "table3": tables.TABLE3_COLUMNS,
    "table3b": prediction.TABLE3B_COLUMNS,
    "table3b_points": prediction.POINT_COLUMNS,
    "table3b_random": prediction.RANDOM_COLUMNS,
    "table5": theory.TABLE5_COLUMNS,
    "table6": theory.TABLE6_COLUMNS,
    "table7": theory_thresholds.TABLE7_COLUMNS,
    "table7b": theory_thresholds.TABLE7B_COLUMNS,
    "scaling": scaling.SCALING_COLUMNS,
    "regime_fits": scaling.REGIME_FIT_COLUMNS,
    "regimes": scaling.REGIME_COLUMNS,
    "doubling": scaling.DOUBLING_COLUMNS,
    "efficiency": efficiency.EFFICIENCY_COLUMNS,
    "power": efficiency.POWER_COLUMNS,
    "steps": efficiency.STEPS_COLUMNS,
    "stages": stages.STAGE_COLUMNS,
    "stages_once": stages.ONCE_COLUMNS,
    "codecarbon": instruments.CODECARBON_COLUMNS,
    "cost": cost.COST_COLUMNS,
    "cost_carbon": cost.CARBON_COLUMNS,
    "validation": validation.VALIDATION_COLUMNS,
    "validation_steps": validation.STEPS_COLUMNS,
    "validation_drift": validation.DRIFT_COLUMNS,
    "settling": settling.COLUMNS,
    "kernels": kernels.KERNELS_COLUMNS,
    "kernels_fit": kernels.FIT_COLUMNS,
}
"""Columns of results/tables/<campaign>/<name>.csv."""
MODEL_TABLES = {
    "table2": models.TABLE2_COLUMNS,
    "table4": models.TABLE4_COLUMNS,
    "broader": models.BROADER_COLUMNS,
    "components": models_checks.COMPONENTS_COLUMNS,
    "memory": models_checks.MEMORY_COLUMNS,
    "signs": models_checks.SIGNS_COLUMNS,
    "operators": operators.COLUMNS,
    "prompts": prompts.COLUMNS,
}
"""The same of those that only a campaign with experiment ``cross-model`` has."""
OPERATOR_TABLES = {"alignment": alignment.COLUMNS, "roofline": roofline.COLUMNS}
"""The same of those that only a campaign with experiment ``operators`` has."""
NEIGHBOUR_TABLES = {"neighbour": neighbour.COLUMNS}
INTERVENTION_TABLES = {
    "interventions": interventions.COLUMNS,
    "interventions_budget": interventions.BUDGET_COLUMNS,
    "merging": interventions.MERGING_COLUMNS,
    "merging_methods": interventions.METHODS_COLUMNS,
}
"""The same of those that only a campaign with experiment ``neighbour`` has."""
DOCUMENTS = sorted(
    path
    for folder in (ROOT, ROOT / "config", ROOT / "profiles", ROOT / "docs")
    for path in folder.glob("*.md")
)
README = ROOT / "README.md"
TUNED = ("int8+compile", "token-alignment+fp8+vae-bfloat16+compile")
"""Of what docs/measuring.md says that its first pass tuned while it compiled."""


def blocks(path: Path, language: str) -> list[str]:
    """Code blocks of a document."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def commands(path: Path, program: str) -> Iterator[list[str]]:
    """Arguments of every call of ``program`` in a document, in blocks and between back-ticks."""
    text = path.read_text(encoding="utf-8")
    lines = [line for block in blocks(path, "sh") for line in block.splitlines()]
    for line in lines + re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)):
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            if words[:1] == [program] and words[1:] and not any("<" in word for word in words):
                yield words[1:]


def in_documents(program: str, *paths: Path) -> list[tuple[str, ...]]:
    """Calls of ``program`` in these documents, each once."""
    return sorted({tuple(words) for path in paths for words in commands(path, program)})


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone in which the reader of the README has copied the template."""
    clone = Clone.of_repository(tmp_path_factory.mktemp("docs") / "clone")
    campaigns = clone.root / "config" / "campaigns"
    text = (campaigns / "template.yaml").read_text(encoding="utf-8")
    (campaigns / "mine.yaml").write_text(text.replace("key: template", "key: mine"), encoding="utf-8")
    return clone


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("https://", "#")):
            assert (path.parent / target.partition("#")[0]).exists(), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_path_of_somebodys_machine(path: Path) -> None:
    found = re.findall(r"(?<![\w.*])/(?:home|root|work|tmp|mnt|Users)/\S*", path.read_text(encoding="utf-8"))
    assert not found


@pytest.mark.parametrize("words", in_documents("t2v-energy", *DOCUMENTS), ids=shlex.join)
def test_command_parses(words: tuple[str, ...]) -> None:
    options = [*words]
    if words == ("seal",):  # named in a sentence, without its options
        options += ["--experiment", "resolution"]
    assert callable(cli._parser().parse_args(options).run)


@pytest.mark.parametrize("words", in_documents("make", *DOCUMENTS), ids=shlex.join)
def test_make_target_exists(words: tuple[str, ...]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, is_variable, _ = word.partition("=")
        assert re.search(rf"^{name} *\?=" if is_variable else rf"^{name}:", makefile, re.MULTILINE), word


@pytest.mark.parametrize("words", in_documents("snakemake", README), ids=shlex.join)
def test_snakemake_plans_what_the_readme_asks(clone: Clone, words: tuple[str, ...]) -> None:
    if "--unlock" in words:
        pytest.skip("has nothing to plan")
    done = clone.snakemake("-n", *words)
    assert done.returncode == 0, done.stdout
    measures = "measure_batch" in done.stdout
    chosen = [word for word in words if "campaign=" in word and "published" not in word]
    assert measures == bool(chosen), "only an unsealed campaign of our own is measured"


def test_readme_names_files_that_the_workflow_builds(clone: Clone) -> None:
    named = re.search(r"^\| file \| content \|\n(.*?)^$", README.read_text(encoding="utf-8"), re.M | re.S)
    assert named
    built = clone.outputs()
    for name in re.findall(r"`([^`]+/[^`]+)`", named[1]):
        assert name in built, name


def test_reference_of_the_configuration_is_up_to_date() -> None:
    path = ROOT / config_reference.README
    found = path.read_text(encoding="utf-8")
    expected = config_reference.written(found)
    drift = difflib.unified_diff(
        found.splitlines(), expected.splitlines(), "config/README.md", "the models", lineterm=""
    )
    assert found == expected, "run `python -m t2v_energy.config_reference`:\n" + "\n".join(drift)


def test_reference_is_rewritten_below_the_marker_alone(tmp_path: Path) -> None:
    path = tmp_path / config_reference.README
    path.parent.mkdir()
    path.write_text("By hand.\n" + config_reference.MARKER + "old\n", encoding="utf-8")
    assert config_reference.main([str(tmp_path)]) == 0
    assert path.read_text(encoding="utf-8") == "By hand.\n" + config_reference.reference()
    path.write_text("no marker", encoding="utf-8")
    with pytest.raises(config_reference.UserError, match="the generated part is missing"):
        config_reference.main([str(tmp_path)])


def test_every_key_in_use_is_in_the_reference() -> None:
    named = {row.key for section in config_reference.SECTIONS for row in config_reference.rows(section.model)}
    for key in ("prompts.seed", "protocols.sampled.min_window_s", "vary[].height", "components.<name>.class"):
        assert key in named
    assert all(row.meaning for s in config_reference.SECTIONS for row in config_reference.rows(s.model))


def test_example_of_the_record_gives_the_energy_of_the_package(tmp_path: Path) -> None:
    (example,) = blocks(ROOT / "docs" / "record.md", "python")
    printed = io.StringIO()
    with chdir(ROOT), redirect_stdout(printed):
        exec(example, {})
    found_Wh = [float(line.removesuffix(" Wh")) for line in printed.getvalue().splitlines()]
    name = "wan2.1-t2v-1.3b_480x832_81f_50s__sampled_r1.json"
    assert name in example
    folder = tmp_path / "resolution"
    folder.mkdir()
    shutil.copy(ROOT / "results" / "raw" / "h200" / "resolution" / name, folder)
    aggregate({"resolution": [folder / name]}, tmp_path / "m.parquet", tmp_path / "c.csv", ROOT)
    (expected_Wh,) = pd.read_csv(tmp_path / "c.csv")["gpu_energy_Wh"]
    assert len(found_Wh) >= 3
    assert sum(found_Wh) / len(found_Wh) == pytest.approx(expected_Wh, rel=0.003)


def test_every_column_of_the_tables_is_described(tmp_path: Path) -> None:
    sections = re.split(r"^## `(.*)`$", (ROOT / "docs" / "tables.md").read_text(encoding="utf-8"), flags=re.M)
    described = {
        Path(name).name: set(re.findall(r"`(\w+)`", text))
        for name, text in zip(sections[1::2], sections[2::2], strict=True)
    }
    record = ROOT / "results/raw/h200/resolution/wan2.1-t2v-1.3b_480x832_81f_50s__sampled_r1.json"
    parquet, csv = tmp_path / "m.parquet", tmp_path / "c.csv"
    aggregate({"resolution": [record]}, parquet, csv, ROOT)
    every = TABLES | MODEL_TABLES | NEIGHBOUR_TABLES | OPERATOR_TABLES | INTERVENTION_TABLES
    built = {
        "configurations.csv": list(pd.read_csv(csv, nrows=0)),
        "measurements.parquet": list(pd.read_parquet(parquet)),
        **{f"{name}.csv": list(columns) for name, columns in every.items()},
        "operator_rates.csv": list(operator_rates.COLUMNS),
        "claims.csv": list(verdicts.COLUMNS),
        "table4_recomputed.csv": list(verdicts.TABLE4_RECOMPUTED_COLUMNS),
        "h100_vs_h200.csv": list(versus.COLUMNS),
        "audit.csv": [*report.COLUMNS, "source"],
        "meter.csv": list(accuracy_table(ticks_s=(0.1,))[0]),
        "<campaign>.json": [field.name for field in fields(Number)],
    }
    assert described.keys() == built.keys()
    for name, columns in built.items():
        assert not set(columns) - described[name], f"docs/tables.md does not describe these of {name}"


def test_every_table_that_is_built_is_described(clone: Clone) -> None:
    built = {
        Path(name).stem for name in clone.outputs() if re.fullmatch(r"results/tables/h200/.*\.csv", name)
    }
    has_models = CROSS_MODEL in load_campaign(ROOT, "h200").experiments
    has_neighbour = neighbour.EXPERIMENT in load_campaign(ROOT, "h200").experiments
    changed = set(interventions.EXPERIMENTS) & set(load_campaign(ROOT, "h200").experiments)
    has_operators = is_sealed(ROOT / "results/raw/h200/operators")
    wanted = {
        **TABLES,
        **(MODEL_TABLES if has_models else {}),
        **(NEIGHBOUR_TABLES if has_neighbour else {}),
        **(OPERATOR_TABLES if has_operators else {}),
    }
    wanted |= INTERVENTION_TABLES if changed else {}
    assert built == set(wanted)


def test_the_contents_of_the_tables_list_every_heading() -> None:
    text = (ROOT / "docs" / "tables.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## `(.*)`$", text, flags=re.M)
    anchors = {re.sub(r"[^\w-]", "", name.lower()) for name in headings}
    assert len(anchors) == len(headings)
    assert re.findall(r"\]\(#([\w-]+)\)", text.partition("\n## ")[0]) == [
        re.sub(r"[^\w-]", "", name.lower()) for name in headings
    ]


def test_the_meters_errors_are_those_of_its_table() -> None:
    text = (ROOT / "docs" / "measuring.md").read_text(encoding="utf-8")
    head = re.search(r"^\| window \|(.*)\|\n", text, re.MULTILINE)
    assert head
    methods = [name.strip() for name in head[1].split("|")]
    largest = (
        pd.DataFrame(accuracy_table()).groupby(["window_s", "method"])["median_error_percent"].max().unstack()
    )
    printed = re.findall(r"^\| ([\d.]+) s \|(.*)\|$", text, re.MULTILINE)
    assert [float(window) for window, _ in printed] == list(largest.index)
    for window, cells in printed:
        assert [float(cell) for cell in cells.split("|")] == pytest.approx(
            largest.loc[float(window), methods].tolist(), abs=0.006
        )


def test_what_the_readme_says_of_savings_is_measured() -> None:
    """Its table and the statements below it, against interventions.csv."""
    path = ROOT / "results" / "tables" / "h200" / "interventions.csv"
    if not path.is_file():
        pytest.skip("results/tables/h200/ is not built: run make first")
    measured = pd.read_csv(path)
    own = measured[measured["experiment"] == "interventions"]
    rows = own.set_index(["intervention", "model", "height"])
    text = README.read_text(encoding="utf-8")
    head, body = re.findall(r"^\| \|(.*)\| output \|\n\| .*\n((?:\|.*\n)+)", text, re.MULTILINE)[0]
    models = {
        "Wan2.1-1.3B": "wan2.1-t2v-1.3b",
        "Wan2.1-14B": "wan2.1-t2v-14b",
        "CogVideoX-2B": "cogvideox-2b",
    }
    places = [cell.split(",") for cell in head.split("|")]
    columns = [(models[model.strip()], int(size.split("×")[0])) for model, size in places]
    printed = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()]
    for name, *cells, output in printed:
        entry = re.sub(r"[` ]|\(.*\)", "", name)
        for place, cell in zip(columns, cells, strict=True):
            assert ((entry, *place) in rows.index) == (cell != "–"), (entry, place)
            if cell != "–":
                row = rows.loc[(entry, *place)]
                assert float(cell) == pytest.approx(row["measured_energy_ratio"], abs=0.005001)
                assert (row["lossless"] == "yes") == (output == "unchanged")
    assert rows["break_even_videos"].xs("compile").max() < 0.5
    wan = rows.xs(("wan2.1-t2v-1.3b", 480), level=["model", "height"])
    assert wan.loc["vae-tiling", "memory_ratio"] == pytest.approx(0.69, abs=0.006)
    assert wan.loc["layerwise-casting", "memory_ratio"] < 1
    energy = wan["measured_energy_ratio"]
    caches = energy[energy.index.str.match("magcache|taylorseer|pab")]
    assert caches.idxmin() == "magcache-0.24-k6", "the boldest"
    mildest = caches[caches.index.str.startswith("magcache")].idxmax()
    assert mildest == "magcache-0.06-k2"
    assert abs(energy[mildest] - energy["fewer-steps"]) < 0.05, "fewer steps save as much"
    assert energy.idxmin() == "token-alignment+fp8+vae-bfloat16+compile+magcache-0.24-k6"
    large = rows.xs(("wan2.1-t2v-1.3b", 720), level=["model", "height"])["measured_energy_ratio"]
    least = large[energy.idxmin()]
    factors = [1 / least, large["attention-flash"] / least]
    assert [round(factor, 1) for factor in factors] == [3.2, 4.7]
    saved = 1 - measured[measured["experiment"] == "token-merging"]["measured_energy_ratio"]
    assert saved.round(2).agg(["min", "max"]).tolist() == [0.12, 0.43]
    assert measured.loc[saved.index, "intervention"].nunique() == 36
    counted = (len(measured), measured["model"].nunique(), len(saved))
    assert counted == (83, 3, 41)


def test_what_the_documents_say_of_predicted_savings_is_so() -> None:
    """docs/interventions.md and docs/measuring.md, against the built tables."""
    tables = ROOT / "results" / "tables"
    if not (tables / "h200" / "interventions.csv").is_file():
        pytest.skip("results/tables/h200/ is not built: run make first")
    rows = pd.read_csv(tables / "h200" / "interventions.csv")
    configurations = pd.read_csv(ROOT / "results" / "aggregated" / "h200" / "configurations.csv")
    error = rows["energy_error_percent"].abs()
    assert (len(rows), round(error.median(), 1), round(error.max(), 1)) == (83, 2.4, 13.0)
    whole = error[rows["protocol"] == "full"]
    assert (len(whole), whole.max() < 2.4) == (13, True)
    assert set(rows["predicted"]) == {"registered"}
    wan = error[rows["model"].str.startswith("wan")].sort_values()
    assert wan.max() < 6.3
    assert set(rows.loc[wan.index[-2:], "intervention"]) == {"attention-sage", "int8+compile"}
    beyond = rows[error > 6.3]
    assert set(beyond["model"]) == {"cogvideox-2b"}
    cheaper = beyond["measured_energy_ratio"] < beyond["predicted_energy_ratio"]
    assert cheaper.all()
    budget = pd.read_csv(tables / "h200" / "interventions_budget.csv")
    one = budget[budget["configuration_id"] == "cogvideox-2b_480x720_49f_50s__compile"]
    assert one.set_index("class")["without_s"][["traffic", "dense"]].round(1).tolist() == [5.9, 8.2]
    operators = pd.read_csv(tables / "h200" / "operators.csv")
    denoiser = operators[(operators["model"] == "cogvideox-2b") & (operators["stage"] == "denoiser")]
    gpu_s = denoiser.set_index("operator_class")["gpu_s"]
    parts = gpu_s[["normalisation", "elementwise", "data_movement"]].sum(), gpu_s["gemm"]
    assert [round(part, 1) for part in parts] == [7.8, 6.0]
    assert set(rows["same_board"]) == {"yes"}
    merged = (rows["experiment"] == "token-merging") & (rows["model"] == "cogvideox-2b")
    assert [round(error[which].median(), 1) for which in (merged, ~merged)] == [5.0, 0.7]
    merging = configurations[
        (configurations["experiment"] == "token-merging") & (configurations["model"] == "cogvideox-2b")
    ].set_index("intervention", drop=False)
    first, *later = merging.loc[merging["intervention"].isna(), "gpu_uuids"].item().split(";")
    assert [first in later, len(later), len(set(later))] == [False, 2, 1], "the baseline: once, then twice"
    boards = merging.loc[merging["intervention"].notna(), "gpu_uuids"].str.split(";")
    beside = [sum(each == [board] for each in boards) for board in (first, later[0])]
    again = [each for each in boards if len(each) == 2]
    assert (len(boards), beside, len(again)) == (32, [7, 17], 8)
    assert all(each[0] not in (first, *later) and each[1] == later[0] for each in again)
    kinds = {own["kind"] for cell in rows["settings"].dropna() for own in json.loads(cell).values()}
    assert len(kinds) == 14
    plain = configurations[
        configurations["experiment"].isin(["interventions", "token-merging"])
        & (configurations["configuration_id"] == "wan2.1-t2v-1.3b_480x832_81f_50s")
        & (configurations["protocol"] == "sampled")
    ]["latency_s"]
    again = configurations[configurations["configuration_id"] == "mochi-1-preview_480x848_79f_64s_pp020"]
    again = again["latency_s_pass_means"].iloc[0].split(";")
    apart = [max(both) / min(both) - 1 for both in (list(plain), [float(value) for value in again])]
    assert [round(100 * part, 1) for part in apart] == [0.4, 0.4]
    stacks = configurations[configurations["intervention"].isin(TUNED)]
    tuned = stacks[(stacks["experiment"] == "interventions") & (stacks["height"] == 480)]
    longer = [
        second / first - 1
        for first, second in (map(float, cell.split(";")) for cell in tuned["latency_s_pass_means"])
    ]
    assert sorted(round(100 * part, 1) for part in longer) == [0.9, 1.4]
    second = rows[rows["intervention"].isin(TUNED) & (rows["height"] == 480)]
    assert sorted(second["compile_s"].round()) == [6, 12]
