"""What of a denoiser call is the blocks', and what their attention's, against the real modules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from t2v_energy.config import Configuration
from t2v_energy.work import blocks
from t2v_energy.work.blocks import attention_part, outside_blocks, stream_bytes, stream_values, whole_call

KEYS = ("wan2.1-t2v-1.3b", "cogvideox-2b", "cogvideox-5b", "tiny-wan", "tiny-cogvideox")
TRACED = ("tiny-wan", "wan2.1-t2v-1.3b", "cogvideox-5b")
SIZE = (160, 96, 13)


def sized(key: str) -> Configuration:
    height, width, num_frames = SIZE
    return tiny.defaults(key, height=height, width=width, num_frames=num_frames)


def modules(key: str) -> tuple[str, ...]:
    return ("attn1", "attn2") if "wan" in key else ("attn1",)


@pytest.mark.parametrize("key", KEYS)
class TestFlop:
    def test_the_whole_is_what_the_counter_sees(self, key: str) -> None:
        pytest.importorskip("torch")
        from t2v_energy.work.trace import trace_denoiser

        call = whole_call(tiny.model(key), sized(key))
        assert call.attention_flop + call.dense_flop == trace_denoiser(tiny.model(key), *SIZE).total_flop

    def test_so_is_what_is_left_without_blocks(self, key: str) -> None:
        pytest.importorskip("torch")
        from t2v_energy.work.trace import trace_denoiser

        model = tiny.model(key)
        outside = outside_blocks(model, sized(key))
        assert outside.attention_flop == 0
        assert outside.dense_flop == trace_denoiser(blocks.without_blocks(model), *SIZE).total_flop
        assert model.components["transformer"].config["num_layers"] > 0  # the model file is as it was

    def test_and_each_attention_module(self, key: str) -> None:
        pytest.importorskip("torch")
        from t2v_energy.work.trace import trace_denoiser

        trace = trace_denoiser(tiny.model(key), *SIZE)
        products = 0.0
        for name in modules(key):
            part = attention_part(tiny.model(key), sized(key), name)
            assert part.attention_flop + part.dense_flop == trace.ending_with(f".{name}")
            products += part.attention_flop
        assert products == whole_call(tiny.model(key), sized(key)).attention_flop


@pytest.mark.parametrize("key", TRACED)
class TestTraffic:
    """At a size that the coefficients were not derived from."""

    def test_outside(self, key: str) -> None:
        pytest.importorskip("torch")
        from t2v_energy.work.traffic_trace import denoiser_traffic

        model = tiny.model(key)
        found, part = denoiser_traffic(blocks.without_blocks(model), SIZE), outside_blocks(model, sized(key))
        assert (part.traffic_bytes, part.kernels) == (pytest.approx(found.bytes, rel=0.01), found.kernels)

    def test_attention(self, key: str) -> None:
        pytest.importorskip("torch")
        from t2v_energy.work.blocks_trace import replayed
        from t2v_energy.work.traffic_trace import denoiser_traffic

        model = tiny.model(key)
        whole = denoiser_traffic(model, SIZE)
        for name in modules(key):
            with replayed(name):
                rest = denoiser_traffic(model, SIZE)
            part = attention_part(model, sized(key), name)
            assert part.traffic_bytes == pytest.approx(whole.bytes - rest.bytes, rel=0.01)
            assert part.kernels == whole.kernels - rest.kernels > 0


def test_a_model_that_was_not_traced_has_no_bytes_and_says_so() -> None:
    assert outside_blocks(tiny.model("tiny-cogvideox"), sized("tiny-cogvideox")).traffic_bytes == 0


def test_every_traced_model_is_in_the_file() -> None:
    text = Path(blocks.__file__).with_name(blocks.BLOCKS_FILE).read_text(encoding="utf-8")
    assert set(json.loads(text)) == {
        "cogvideox-2b", "cogvideox-5b", "tiny-wan", "wan2.1-t2v-1.3b", "wan2.1-t2v-14b"
    }  # fmt: skip


def test_the_stream_between_blocks() -> None:
    wan = tiny.model("wan2.1-t2v-1.3b")
    c = tiny.defaults("wan2.1-t2v-1.3b")
    assert stream_values(wan, c) == 75600 * 1536
    assert stream_bytes(wan, c) == 2 * 75600 * 1536
    cog = tiny.model("cogvideox-2b")
    assert stream_values(cog, tiny.defaults("cogvideox-2b")) == 2 * 17550 * 1920  # a batch of two
    assert stream_bytes(tiny.model(), sized("tiny-wan")) == 4 * stream_values(tiny.model(), sized("tiny-wan"))
