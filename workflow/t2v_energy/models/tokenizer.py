"""A deterministic stand-in for a model's tokenizer, for hosts that reach no hub.

A prompt's length, its mask and its padding reach the GPU as they would with the real tokenizer (Wan pads
every prompt to 512 tokens); which ids the words get changes no cost. Nothing else is pretended.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any, ClassVar

import torch
from transformers import BatchEncoding

PAD_ID, END_ID, FIRST_WORD_ID = 0, 1, 3


class StandInTokenizer:
    """Maps words and punctuation to ids by a hash; called as a transformers tokenizer is.

    ``model_max_length`` is the padded length (tokens) for pipelines that ask their tokenizer for it.
    """

    added_tokens_encoder: ClassVar[dict[str, int]] = {}
    """Words that textual inversion added: none."""

    def __init__(self, vocab_size: int, model_max_length: int) -> None:
        self.vocab_size = vocab_size
        self.model_max_length = model_max_length

    def tokenize(self, text: str) -> list[str]:
        """Words and punctuation of ``text``, in lower case."""
        return re.findall(r"\w+|[^\w\s]", text.lower())

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """Ids of ``text`` with the end token, cut to ``max_length``; None: not cut."""
        words = self.tokenize(text)
        return [*(self._id(word) for word in words[: max_length and max_length - 1]), END_ID]

    def batch_decode(self, ids: torch.Tensor) -> list[str]:
        """For messages about prompts that were cut: a hash has no way back to the words, so their ids."""
        return [" ".join(map(str, row)) for row in ids.tolist()]

    def _id(self, word: str) -> int:
        digest = hashlib.sha256(word.encode()).digest()
        return FIRST_WORD_ID + int.from_bytes(digest[:8], "big") % (self.vocab_size - FIRST_WORD_ID)

    def __call__(
        self,
        text: str | list[str],
        *,
        padding: str = "max_length",
        max_length: int | None = None,
        **_: Any,
    ) -> BatchEncoding:
        """Ids and mask, each of shape (texts, length), padded on the right.

        The length is ``max_length``, by default the model's; with ``padding="longest"`` that of the longest
        text, and nothing is cut.
        """
        texts = [text] if isinstance(text, str) else text
        if padding == "longest":
            rows = [self.encode(one) for one in texts]
            length = max(map(len, rows))
        else:
            length = max_length or self.model_max_length
            rows = [self.encode(one, length) for one in texts]
        ids = torch.tensor([row + [PAD_ID] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        return BatchEncoding({"input_ids": ids, "attention_mask": mask})
