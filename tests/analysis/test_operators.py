"""Profiles become shares of a video's GPU time by class of operator."""

from __future__ import annotations

import json
from typing import Any

import pytest
import records
from t2v_energy.analysis.operators import COLUMNS, operator_class, operators_table
from t2v_energy.errors import UserError
from t2v_energy.measurement.record import Operators, to_json


@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        ("aten::scaled_dot_product_attention", "attention"),
        ("aten::_scaled_dot_product_cudnn_attention", "attention"),
        ("aten::linear", "gemm"),
        ("aten::addmm", "gemm"),
        ("aten::matmul", "gemm"),
        ("aten::conv3d", "convolution"),
        ("aten::cudnn_convolution", "convolution"),
        ("aten::layer_norm", "normalisation"),
        ("aten::group_norm", "normalisation"),
        ("aten::rms_norm", "normalisation"),
        ("aten::linalg_vector_norm", "normalisation"),
        ("aten::to", "data_movement"),
        ("aten::copy_", "data_movement"),
        ("aten::cat", "data_movement"),
        ("aten::index_select", "data_movement"),
        ("aten::mul", "elementwise"),
        ("aten::silu", "elementwise"),
        ("aten::tanh", "elementwise"),
        ("aten::_upsample_nearest_exact2d", "elementwise"),
    ],
)
def test_classes(operator: str, expected: str) -> None:
    assert operator_class(operator) == expected


def profiled(**changes: Any) -> dict[str, Any]:
    """A record of 50 steps with a planted profile of one: its JSON."""
    profile = Operators(
        steps=1,
        stage=["denoiser", "denoiser", "denoiser", "scheduler", "vae_decode"],
        operator=[
            "aten::linear",
            "aten::scaled_dot_product_attention",
            "aten::mm",
            "aten::mul",
            "aten::conv3d",
        ],
        device_s=[0.1, 0.2, 0.05, 0.01, 0.6],
        kernels=[10, 2, 1, 3, 7],
    )
    found: dict[str, Any] = json.loads(to_json(records.make_record(operators=profile, **changes)))
    return found


def test_what_is_in_the_loop_comes_as_often_as_steps() -> None:
    table = operators_table([profiled()])
    assert tuple(table.columns) == COLUMNS
    found = table.set_index(["stage", "operator_class"])
    assert found.loc[("denoiser", "attention"), "gpu_s"] == pytest.approx(10)
    assert found.loc[("denoiser", "gemm"), "gpu_s"] == pytest.approx(7.5)
    assert found.loc[("denoiser", "gemm"), "kernels"] == 550
    assert found.loc[("vae_decode", "convolution"), ["gpu_s", "kernels"]].to_list() == [0.6, 7]
    assert found["gpu_time_share"].sum() == pytest.approx(1)
    assert found.loc[("denoiser", "attention"), "gpu_time_share"] == pytest.approx(10 / 18.6)
    assert table["gpu_s"].is_monotonic_decreasing


def test_records_without_a_profile_are_left_out_and_two_of_a_model_refused() -> None:
    plain = json.loads(to_json(records.make_record()))
    assert operators_table([plain]).empty
    assert list(operators_table([]).columns) == list(COLUMNS)
    with pytest.raises(UserError, match="profiled twice"):
        operators_table([profiled(), plain, profiled(pass_index=2)])


def test_a_profile_that_counts_kernels_twice_is_left_out() -> None:
    twice = profiled()
    twice["operators"]["device_s"][-1] = 1.2  # of a stage of 0.6 s
    assert operators_table([twice]).empty
    table = operators_table([twice, profiled(experiment="profiles")])
    assert table["gpu_s"].sum() == pytest.approx(18.6)
