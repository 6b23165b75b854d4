"""A deterministic stand-in for a model's tokenizer, for hosts that reach no hub.

A prompt's length, its mask and its padding reach the GPU as they would with the real tokenizer (Wan pads
every prompt to 512 tokens); which ids the words get changes no cost. Nothing else is pretended.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import torch
from transformers import BatchEncoding

PAD_ID, END_ID, FIRST_WORD_ID = 0, 1, 3


class StandInTokenizer:
    """Maps words and punctuation to ids by a hash; called as a transformers tokenizer is."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str, max_length: int) -> list[int]:
        """Ids of ``text`` with the end token, cut to ``max_length``."""
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        return [*(self._id(word) for word in words[: max_length - 1]), END_ID]

    def _id(self, word: str) -> int:
        digest = hashlib.sha256(word.encode()).digest()
        return FIRST_WORD_ID + int.from_bytes(digest[:8], "big") % (self.vocab_size - FIRST_WORD_ID)

    def __call__(self, text: list[str], *, max_length: int, **_: Any) -> BatchEncoding:
        """Ids and mask, each of shape (len(text), max_length), padded on the right."""
        rows = [self.encode(one, max_length) for one in text]
        ids = torch.tensor([row + [PAD_ID] * (max_length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (max_length - len(row)) for row in rows])
        return BatchEncoding({"input_ids": ids, "attention_mask": mask})
