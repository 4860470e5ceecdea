"""Vocabularies of texts that a backbone writes: made of public texts alone, kept as a tokenizer's own JSON.

What is written begins with nothing: the token that ends a text stands before its first one too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import tokenizers

from common.types import BadInput, BadRecord

PAD, UNKNOWN, END = "[PAD]", "[UNK]", "[END]"
_MOST_CHARS = 1 << 17
"""Characters of a text: many times the longest that is written, and divided in half a second."""

_MOST_UNKNOWN = 1 / 3
"""Part of a text's tokens that may be unknown; they are left out. Of a text in another script nearly all are."""


def make_vocabulary(texts: Iterable[str], size: int) -> bytes:
    """Returns a tokenizer of pairs of characters that occur together most (byte-pair encoding: Sennrich et al. 2016).

    Args:
        texts: public texts.
        size: number of tokens.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    parts = [tokenizers.pre_tokenizers.Metaspace(), tokenizers.pre_tokenizers.Punctuation()]
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(parts)
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, special_tokens=[PAD, UNKNOWN, END], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    text: str = tokenizer.to_str()
    return text.encode()


@dataclass(frozen=True)
class Vocabulary:
    """An opened tokenizer.

    Attributes:
        data: its JSON.
    """

    data: bytes

    @cached_property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer. Raises BadInput: other bytes, or a token that is needed is missing."""
        try:
            json.loads(self.data)
            opened = tokenizers.Tokenizer.from_buffer(self.data)
        except (ValueError, RecursionError) as error:
            raise BadInput("weights: expected a tokenizer among the weights, got other bytes") from error
        for token, what in ((PAD, "padding"), (END, "the end of a text")):
            if opened.token_to_id(token) is None:
                raise BadInput(f"weights: expected a tokenizer with a token for {what}, {token}, got one without")
        opened.no_padding()
        opened.no_truncation()
        return opened

    @property
    def size(self) -> int:
        """The number of tokens."""
        return int(self.tokenizer.get_vocab_size())

    @property
    def end(self) -> int:
        """The token that ends a text."""
        found = self.tokenizer.token_to_id(END)
        assert found is not None  # Looked at when it was opened.
        return found

    @property
    def unwritten(self) -> list[int]:
        """The tokens that are never written."""
        found = [self.tokenizer.token_to_id(token) for token in (PAD, UNKNOWN)]
        return [token for token in found if token is not None]

    def read(self, text: str) -> list[int]:
        """Returns a text's tokens, unknown ones left out. Raises BadRecord: too many are unknown, or it is too long."""
        if len(text) > _MOST_CHARS:
            raise BadRecord(f"expected a text of at most {_MOST_CHARS} characters")
        tokens = self.tokenizer.encode(text, add_special_tokens=False).ids
        known = [token for token in tokens if token not in (*self.unwritten, self.end)]
        if not known or len(tokens) - len(known) > _MOST_UNKNOWN * len(tokens):
            raise BadRecord("expected a text in the script of the backbone's vocabulary, got one that is mostly not")
        return known

    def write(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text.strip()
