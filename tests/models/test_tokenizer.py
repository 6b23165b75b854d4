"""The stand-in tokenizer: a prompt's length, mask and padding reach the model as with the real one."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from t2v_energy.models.tokenizer import END_ID, FIRST_WORD_ID, PAD_ID, StandInTokenizer  # noqa: E402

TEXT = "A red fox, running."  # six words and marks


def test_shapes_mask_and_padding() -> None:
    encoded = StandInTokenizer(1024, 512)([TEXT, ""], max_length=10, padding="max_length", truncation=True)
    assert encoded.input_ids.shape == encoded.attention_mask.shape == (2, 10)
    assert encoded.input_ids.dtype == encoded["attention_mask"].dtype == torch.int64
    ids, mask = encoded.input_ids.tolist(), encoded.attention_mask.tolist()
    assert mask == [[1] * 7 + [0] * 3, [1] + [0] * 9]
    assert ids[0][6:] == [END_ID, PAD_ID, PAD_ID, PAD_ID]
    assert ids[1] == [END_ID] + [PAD_ID] * 9
    assert all(FIRST_WORD_ID <= i < 1024 for i in ids[0][:6])
    assert len(set(ids[0][:6])) == 6


def test_a_long_prompt_is_cut_and_keeps_its_end() -> None:
    tokenizer = StandInTokenizer(1024, 512)
    whole = tokenizer([TEXT], max_length=10).input_ids[0].tolist()
    encoded = tokenizer([TEXT], max_length=4)
    assert encoded.input_ids.tolist() == [[*whole[:3], END_ID]]
    assert encoded.attention_mask.tolist() == [[1, 1, 1, 1]]
    assert tokenizer.encode(TEXT, 7) == [*whole[:6], END_ID]
    assert tokenizer.encode(TEXT, 1) == [END_ID]


@pytest.mark.parametrize("vocab_size", [4, 1024, 256384])
def test_ids_lie_in_the_vocabulary(vocab_size: int) -> None:
    words = " ".join(f"word{i}" for i in range(300))
    ids = StandInTokenizer(vocab_size, 512).encode(words, 512)
    assert len(ids) == 301
    assert min(ids[:-1]) >= FIRST_WORD_ID
    assert max(ids) < vocab_size


def test_the_same_word_is_the_same_id_everywhere() -> None:
    # Fixed here: a record's prompt must be the same prompt in every process and version.
    assert StandInTokenizer(1024, 512).encode("Fox fox FOX cat", 9) == [294, 294, 294, 846, END_ID]
    assert StandInTokenizer(256384, 512).encode("fox cat", 9) == [132279, 199427, END_ID]


def test_pipelines_that_ask_the_tokenizer_for_its_length() -> None:
    tokenizer = StandInTokenizer(1024, 77)
    one = tokenizer(TEXT, padding="max_length", max_length=tokenizer.model_max_length)
    assert one.input_ids.shape == (1, 77)
    assert torch.equal(one.input_ids, tokenizer([TEXT]).input_ids)
    assert tokenizer.tokenize(TEXT) == ["a", "red", "fox", ",", "running", "."]


def test_the_longest_text_decides_and_nothing_is_cut() -> None:
    # so pipelines see whether they cut a prompt, and say what of it
    long = " ".join(f"word{i}" for i in range(100))
    encoded = StandInTokenizer(1024, 8)([TEXT, long], padding="longest")
    assert encoded.input_ids.shape == (2, 101)
    assert encoded.attention_mask.sum(1).tolist() == [7, 101]
    ids = encoded.input_ids[:, 2:4]
    assert StandInTokenizer(1024, 8).batch_decode(ids) == [" ".join(map(str, row)) for row in ids.tolist()]
