"""The study's tables 1, 5, 6 and 7: against arithmetic by hand, and with planted values."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from math import isnan
from pathlib import Path
from typing import Any

import pandas as pd
import papermill
import pytest
import synthetic_campaign as synthetic
from t2v_energy.analysis import numbers, theory, theory_numbers, theory_tables, theory_thresholds
from t2v_energy.config import Printed
from t2v_energy.errors import UserError
from t2v_energy.work import paper_work, true_work


@cache
def read() -> theory.Theory:
    return theory.read_theory(synthetic.REPOSITORY)


@cache
def built() -> dict[str, pd.DataFrame]:
    return {name: build(read()) for name, build in theory_tables.TABLES.items()}


def with_config(component: str, **values: Any) -> theory.Theory:
    """The theory of a model with other values in one component's configuration."""
    model = read().model
    part = model.components[component]
    changed = part.model_copy(update={"config": {**part.config, **values}})
    components = {**model.components, component: changed}
    return replace(read(), model=model.model_copy(update={"components": components}))


def with_accelerator(key: str, **values: Any) -> theory.Theory:
    card = read().accelerators[key].model_copy(update=values)
    return replace(read(), accelerators={**read().accelerators, key: card})


# --- table 1 ------------------------------------------------------------------------------------------------


def test_table_1_equals_arithmetic_by_hand() -> None:
    rows = built()["table1"].set_index("component")
    study, true = rows["study_flop_per_video"], rows["true_flop_per_video"]
    calls, length = 100, 75600
    assert true["self-attention"] == calls * 30 * (8 * length * 1536**2 + 4 * length**2 * 1536)
    assert true["MLP"] == calls * 30 * 4 * length * 1536 * 8960
    assert true["timestep MLP"] == calls * (2 * 256 * 1536 + 14 * 1536**2)
    assert true["text encoder"] == 2 * 24 * (8 * 512 * 4096**2 + 4 * 512**2 * 4096 + 6 * 512 * 4096 * 10240)
    length = 76500
    assert study["self-attention"] == calls * 32 * (8 * length * 2048**2 + 4 * length**2 * 2048)
    assert study["MLP"] == calls * 32 * 16 * length * 2048**2
    assert study["embeddings"] == 0 < true["embeddings"]
    assert rows.loc["VAE middle attention", "ratio"] == 1


def test_table_1_adds_up_to_both_counts() -> None:
    table, (height, width, frames, steps) = built()["table1"], read().size
    assert (height, width, frames, steps) == (720, 1280, 81, 50)
    parts, total = table.iloc[:-1], table.iloc[-1]
    for column, work in (
        ("study_flop_per_video", paper_work(height, width, frames, steps)),
        ("true_flop_per_video", true_work(read().model, height, width, frames, steps)),
    ):
        assert parts[column].sum() == pytest.approx(work.total_flop, rel=1e-12)
        assert total[column] == pytest.approx(work.total_flop, rel=1e-12)
    assert parts["true_share_percent"].sum() == pytest.approx(100)
    stepped = parts[parts["per"] == "step"]
    assert (stepped["true_flop_per_step"] * steps).tolist() == pytest.approx(
        stepped["true_flop_per_video"].tolist()
    )
    assert parts.loc[parts["per"] == "video", "true_flop_per_step"].isna().all()
    assert total["ratio"] == pytest.approx(1.46, abs=0.005)


# --- table 5 ------------------------------------------------------------------------------------------------


def test_table_5_has_every_symbol_of_the_studys() -> None:
    table = built()["table5"]
    assert table["symbol"].tolist() == [
        "T", "H × W", "S", "g", "v_t, v_s", "p_h, p_w", "N", "d", "f", "ℓ", "m", "p_text", "d_text", "L_text",
        "f_text", "d_τ", "j", "N_dec,conv", "k_t, k_h, k_w", "C_in, C_out", "T_j, H_j, W_j", "C_*",
        "T_*, H_*, W_*", "L_*", "µ", "Θ_peak", "P_max", "D_total",
    ]  # fmt: skip
    wrong = set(table.loc[table["equal"] == "no", "symbol"])
    assert {"N", "d", "f", "ℓ", "d_τ", "N_dec,conv", "Θ_peak", "µ"} <= wrong
    assert not {"g", "m", "d_text", "L_text", "f_text", "C_*", "L_*"} & wrong
    rows = table.set_index("symbol")
    assert (rows.loc["N", "printed"], rows.loc["N", "true"]) == ("32", "30")
    assert rows.loc["f", "true"] == f"{8960 / 1536:.3f}"
    # 5 + 4 + 12 + 11 + 1 + 2: convolutions of three frames or 3×3 pixels, counted in the decoder's source
    assert rows.loc["N_dec,conv", "true"] == "35"


def test_table_5_compares_with_the_model_and_not_with_a_list() -> None:
    agreeing = with_config("transformer", num_layers=32, num_attention_heads=16, ffn_dim=8192)
    rows = theory.table5(agreeing).set_index("symbol")
    assert rows.loc["N", "equal"] == "yes"
    assert rows.loc["d", "equal"] == "yes"
    rows = theory.table5(with_config("text_encoder", d_ff=4096)).set_index("symbol")
    assert rows.loc["f_text", "equal"] == "no"


# --- table 6 ------------------------------------------------------------------------------------------------


def test_table_6_adds_up_to_the_decoder_of_either_count() -> None:
    table, size = built()["table6"], read().size
    parts, total = table.iloc[:-1], table.iloc[-1]
    assert total["true_flop"] == pytest.approx(true_work(read().model, *size).flop["vae"], rel=1e-12)
    assert total["study_flop"] == pytest.approx(paper_work(*size).flop["vae"], rel=1e-12)
    for column in ("true_flop", "study_flop", "true_convolutions", "printed_convolutions"):
        assert parts[column].sum() == pytest.approx(total[column])
    assert parts["true_share_percent"].sum() == pytest.approx(100)


def test_table_6_shows_the_stage_that_the_study_lacks() -> None:
    rows = built()["table6"].set_index("stage")
    missing = rows.loc[theory.MISSING_STAGE]
    assert missing["true_flop"] == 6 * 2 * 27 * 96 * 96 * 81 * 720 * 1280
    assert isnan(missing["study_flop"])
    assert "not in the study" in missing["note"]
    # everywhere else the layers are the study's, but for these
    agreeing = rows["ratio"].dropna().drop("total")
    assert set(agreeing[(agreeing - 1).abs() > 0.01].index) == {"Middle (RBs)", "Up (time) 1", "Up (time) 2"}
    assert rows.loc["Up (time) 1", "ratio"] == pytest.approx(41 / 20)


# --- table 7 ------------------------------------------------------------------------------------------------


def test_table_7_checks_the_printed_values_against_each_other() -> None:
    table = built()["table7"]
    assert len(table) == 7
    assert table.loc[table["consistent"] == "no", "accelerator"].tolist() == ["l4"]
    l4 = table.set_index("accelerator").loc["l4"]
    assert l4["recomputed_balance"] == pytest.approx(121 / 0.3)
    assert l4["note"] == "the printed β needs B = 0.2 TB/s"
    other = table[table["note"].str.contains("printed peak")]["accelerator"].tolist()
    assert other == ["rtx-4090", "mi325x", "gaudi3"]
    mended = with_accelerator("l4", printed=Printed(peak_TFLOPs=121, bandwidth_TB_per_s=0.2))
    assert set(theory_thresholds.table7(mended)["consistent"]) == {"yes"}
    broken = with_accelerator("h100-sxm", printed=Printed(peak_TFLOPs=989, bandwidth_TB_per_s=4.8))
    rows = theory_thresholds.table7(broken).set_index("accelerator")
    assert rows.loc["h100-sxm", "consistent"] == "no"


def test_table_7_derives_thresholds_by_hand() -> None:
    row = built()["table7"].set_index("accelerator").loc["h100-sxm"]
    beta, s, d, inner = 989 / 3.35, 2, 1536, 8960
    assert row["attention_tokens"] == pytest.approx(s * beta)
    by_hand = s * beta * d * inner / (2 * d * inner - s * beta * (d + inner))
    assert row["true_mlp_tokens"] == pytest.approx(by_hand)
    assert row["published_true_mlp_tokens"] == pytest.approx(by_hand)
    assert row["smallest_tokens"] == 21 * 16 * 16


def test_a_threshold_that_is_never_reached_is_empty() -> None:
    fast = with_accelerator("l4", peak_bf16_dense_TFLOPs=1000.0)  # β = 3333, above every limit
    row = theory_thresholds.table7(fast).set_index("accelerator").loc["l4"]
    assert isnan(row["published_true_mlp_tokens"])
    assert isnan(row["published_true_cross_attention_tokens"])
    assert row["published_attention_tokens"] == pytest.approx(2 * 1000 / 0.3)
    found = theory_numbers.theory_numbers(
        fast, {name: build(fast) for name, build in theory_tables.TABLES.items()}, "t", {}
    )
    assert "theory.threshold.l4.mlp.published" not in found
    assert "theory.threshold.l4.attention.published" in found


def test_an_accelerator_without_printed_values_is_refused() -> None:
    with pytest.raises(UserError, match=r"gaudi3[\s\S]*table 7"):
        theory_thresholds.table7(with_accelerator("gaudi3", printed=None))


def test_table_7b_states_each_assumption_with_numbers() -> None:
    rows = built()["table7b"].set_index("assumption")
    assert (rows != "").all(axis=None)
    assert "295" in rows.loc["bytes of attention", "study"]
    assert "590" in rows.loc["bytes of attention", "corrected"]
    assert "512 FLOP/byte" in rows.loc["cross-attention", "corrected"]
    assert "TPU v6 never" in rows.loc["cross-attention", "consequence"]
    assert "5376" in rows.loc["operating range", "corrected"]
    slower = with_accelerator("h200", bandwidth_TB_per_s=2.4)
    half = theory_thresholds.elementwise(slower, 720, 1280, 81)
    assert half.memory_s == pytest.approx(2 * theory_thresholds.elementwise(read(), 720, 1280, 81).memory_s)
    assert half.tokens == 75600


# --- files --------------------------------------------------------------------------------------------------


def test_files_are_whole_plain_and_the_same_each_time(tmp_path: Path) -> None:
    first = theory_tables.write_tables(built(), tmp_path / "a" / "b")
    second = theory_tables.write_tables(built(), tmp_path / "c")
    assert [path.name for path in first] == [
        f"table{n}.{ending}" for ending in ("csv", "tex") for n in ("1", "5", "6", "7", "7b")
    ]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    for path in first:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            back = pd.read_csv(path)
            assert len(back) == len(built()[path.stem])
            continue
        assert text.isascii(), f"{path.name} needs more than plain LaTeX"
        assert text.count("{") == text.count("}")
        bodies = [line for line in text.splitlines() if line.endswith(r"\\")]
        assert len({line.replace(r"\&", "").count("&") for line in bodies}) == 1
        assert r"\toprule" in text


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        ("N(8ℓd² + 4ℓ²d)", r"$N(8\ell d^2 + 4\ell ^2d)$"),
        ("d_text²", r"$d_{\mathrm{text}}^2$"),
        ("d_τ", r"$d_{\tau }$"),
        ("N_dec,conv", r"$N_{\mathrm{dec,conv}}$"),
        ("C_*²", "$C_{*}^2$"),
        ("—", "---"),
    ],
)
def test_formulas_become_mathematics(text: str, latex: str) -> None:
    assert theory_tables.latex_formula(text) == latex


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        ("50 % of a_b", r"50 \% of a\_b"),
        ("ℓ* = 590", r"\ensuremath{\ell^*} = 590"),
        ("µΘ_peak", r"\ensuremath{\mu}\ensuremath{\Theta _{\mathrm{peak}}}"),
        ("post_quant_conv", r"post\_quant\_conv"),
    ],
)
def test_prose_is_escaped(text: str, latex: str) -> None:
    assert theory_tables.latex_text(text) == latex


# --- numbers ------------------------------------------------------------------------------------------------


def test_numbers_have_their_prefix_and_their_rows(tmp_path: Path) -> None:
    found = theory_numbers.theory_numbers(read(), built(), "results/tables/h200", {})
    assert all(key.startswith("theory.") for key in found)
    numbers.write(tmp_path / "theory.json", found)
    assert found["theory.flop.total.ratio"].value == pytest.approx(built()["table1"].iloc[-1]["ratio"])
    assert found["theory.parameters.transformer"].value == pytest.approx(1.418996800, rel=1e-3)
    assert found["theory.threshold.inconsistent"].value == 1
    assert found["theory.study.power"].value == pytest.approx(78.8 * 3600 / 410)
    assert found["theory.vae.missing"].source.row == theory.MISSING_STAGE
    assert not any("time_share" in key for key in found)
    assert all(number.kind != "measured" for number in found.values())


def test_shares_of_measured_time_follow_from_the_rows(tmp_path: Path) -> None:
    base = synthetic.root(tmp_path / "root", synthetic.configurations().assign(step_time_s=5.0))
    path = Path("results/aggregated/h200/configurations.csv")
    calls = theory_numbers.measured_calls(read(), base, "h200", path)
    assert set(calls) == {"smallest", "default"}
    assert calls["default"].call_s == 2.5  # two passes a step
    found = theory_numbers.theory_numbers(read(), built(), "t", calls)
    moved = theory_thresholds.elementwise(read(), 720, 1280, 81).bytes
    expected = 100 * (moved / 4.8e12) / 2.5
    assert found["theory.elementwise.default.time_share"].value == pytest.approx(expected)


def test_sizes_that_were_not_measured_have_no_share(tmp_path: Path) -> None:
    rows = synthetic.configurations()
    base = synthetic.root(tmp_path / "root", rows[rows["height"] > 300])
    path = Path("results/aggregated/h200/configurations.csv")
    assert set(theory_numbers.measured_calls(read(), base, "h200", path)) == {"default"}


def test_another_model_has_no_measured_calls(tmp_path: Path) -> None:
    base = synthetic.root(tmp_path / "root", synthetic.configurations().assign(model="tiny-wan"))
    path = Path("results/aggregated/h200/configurations.csv")
    assert theory_numbers.measured_calls(read(), base, "h200", path) == {}
    synthetic.configurations().to_csv(base / path)  # the right model, but values of a nominal accelerator
    assert theory_numbers.measured_calls(read(), base, "smoke", path) == {}


def test_a_missing_table_is_said(tmp_path: Path) -> None:
    base = synthetic.root(tmp_path / "root", synthetic.configurations())
    with pytest.raises(UserError, match="no such file"):
        theory_numbers.measured_calls(read(), base, "h200", Path("nowhere.csv"))


def test_the_theory_notebook_builds_tables_and_numbers(tmp_path: Path) -> None:
    base = synthetic.root(tmp_path / "root", synthetic.configurations())
    papermill.execute_notebook(
        synthetic.REPOSITORY / "workflow/notebooks/theory.ipynb",
        tmp_path / "executed.ipynb",
        parameters={"root": str(base)},
        kernel_name="python3",
        progress_bar=False,
        cwd=str(base),
    )
    for name in ("1", "5", "6", "7", "7b"):
        assert (base / f"results/tables/h200/table{name}.csv").stat().st_size > 0, name
    found = json.loads((base / "results/numbers/h200/theory.json").read_text())
    assert found["theory.tokens.true"]["value"] == 75600
    assert "theory.elementwise.default.time_share" in found
