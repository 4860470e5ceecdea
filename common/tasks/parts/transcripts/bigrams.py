"""A language of pairs of symbols that is counted in public texts and helps to decode transcripts.

Its texts stand in the run's file and travel as part of the task: nothing of a record is ever counted. The probability
of a symbol behind another, or of the end, is its count plus one over all counts plus as many (Laplace 1814).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated

import numpy as np
from pydantic import Field

from common.plugins import Frozen
from common.tasks.parts.transcripts.decoding import Prior
from common.tasks.parts.transcripts.symbols import Symbols

_MOST_SYMBOLS, _MOST_CHARS = 1000, 1 << 20


class Bigrams(Frozen):
    """Settings of a language of public texts.

    Attributes:
        texts: public texts, made of the task's symbols alone.
        weight: factor of the logarithm of a transcript's probability in this language, beside that of its frames.
    """

    texts: Annotated[tuple[str, ...], Field(min_length=1, max_length=100_000)]
    weight: Annotated[float, Field(gt=0, le=10)]

    def find_fault(self, symbols: Symbols) -> str | None:
        """Returns what is wrong with the texts; None where nothing is."""
        if len(symbols.all) > _MOST_SYMBOLS:
            return f"language: expected at most {_MOST_SYMBOLS} symbols beside it, got {len(symbols.all)}"
        if (length := sum(map(len, self.texts))) > _MOST_CHARS:
            return f"language.texts: expected at most {_MOST_CHARS} characters together, got {length}"
        for number, text in enumerate(self.texts, start=1):
            if symbols.find_indices(text) is None:
                return (
                    f"language.texts: expected texts of the task's symbols, got other {symbols.unit} in text {number}"
                )
        return None


@lru_cache(maxsize=8)
def compute_prior(language: Bigrams, symbols: Symbols) -> Prior:
    """Returns weighted logarithms of probabilities: [previous][next], 0 before a text and behind it, then symbols."""
    size = 1 + len(symbols.all)
    counts = np.ones((size, size))
    for text in language.texts:
        indices = [0, *(1 + index for index in symbols.find_indices(text) or ()), 0]
        np.add.at(counts, (indices[:-1], indices[1:]), 1.0)
    prior: Prior = (language.weight * (np.log(counts) - np.log(counts.sum(axis=1, keepdims=True)))).tolist()
    return prior
