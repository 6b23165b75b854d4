"""config/study.yaml: what the study prints of its models, strict as every other file of config/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from t2v_energy.config import load_accelerators, load_model
from t2v_energy.errors import UserError
from t2v_energy.study import STUDY_FILE, load_study

ROOT = Path(__file__).resolve().parents[1]


def shipped() -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load((ROOT / STUDY_FILE).read_text(encoding="utf-8"))
    return data


def written(folder: Path, data: Any) -> Path:
    path = folder / STUDY_FILE
    path.parent.mkdir(parents=True)
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data), encoding="utf-8")
    return folder


def test_every_model_of_the_study_has_a_model_file_and_its_gpu_an_entry() -> None:
    study = load_study(ROOT)
    assert len(study.models) == 7
    for key, printed in study.models.items():
        assert set(printed.latency_stages) <= set(load_model(ROOT, key).spans), key
    assert study.accelerator in load_accelerators(ROOT)


def test_printed_means_are_those_of_table_4() -> None:
    """Order and sums, so that a slip of a column or a row is found."""
    study = load_study(ROOT)
    totals = [printed.total_energy_Wh for printed in study.models.values()]
    assert totals == sorted(totals, reverse=True), "table 4 goes from the dearest to the cheapest"
    assert totals == pytest.approx([415.1, 90.5, 52.1, 25.3, 9.67, 3.67, 0.139])
    assert sum(printed.latency_s[0] for printed in study.models.values()) == pytest.approx(2732.98)
    for printed in study.models.values():
        for mean, std in (printed.latency_s, printed.gpu_energy_Wh, printed.cpu_energy_Wh):
            assert std < 0.12 * mean


def test_models_that_the_study_has_not_come_last() -> None:
    study = load_study(ROOT)
    order = study.in_order({"tiny-wan", "mochi-1-preview", "a-model"})
    assert order == [*study.models, "a-model", "tiny-wan"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": "sora"}, "'sora' is not in models"),
        ({"comparisons": {"a": {"of": "sora", "to": "text_generation", "times": 2, "significant": 1,
                                "place": "x"}}}, r"comparisons\.a\.of"),
        ({"comparisons": {"a": {"of": "mochi-1-preview", "to": "speech", "times": 2, "significant": 1,
                                "place": "x"}}}, r"comparisons\.a\.to"),
        ({"latency": 3}, "unknown key 'latency'"),
    ],
)  # fmt: skip
def test_names_that_do_not_exist_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_study(written(tmp_path, shipped() | change))


@pytest.mark.parametrize(("text", "message"), [("a: [", "not valid YAML"), ("- 1", "must be a mapping")])
def test_a_file_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_study(written(tmp_path, text))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_study(tmp_path)
