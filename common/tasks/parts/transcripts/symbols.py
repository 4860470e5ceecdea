"""Transcripts as lists of symbols, by one stated rule for what people wrote and for what a head says.

The rule, in this order: Unicode's NFC and lower case; each figure as a word, where the task names ten; apostrophes away
and other punctuation and signs as blanks, but for characters that occur in a symbol; blanks between words as one. What
is left must be made of the task's symbols, else the record is a bad one.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from common.types import BadRecord

_APOSTROPHES = frozenset("'’ʼ`")
SPACE = " "


@dataclass(frozen=True)
class Symbols:
    """The symbols of transcripts, words or characters.

    Attributes:
        listed: words, or single characters; in their normal form.
        unit: what they are.
        figures: words of the figures from 0 to 9; none where a figure is no symbol.
    """

    listed: tuple[str, ...]
    unit: Literal["words", "characters"]
    figures: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        """The symbols by their index: those that are listed, and after characters the blank between words."""
        return (*self.listed, SPACE) if self.unit == "characters" else self.listed

    def find_fault(self) -> str | None:
        """Returns what is wrong with the lists; None where nothing is."""
        for symbol in self.listed:
            if self.normalise(symbol) != symbol or SPACE in symbol:
                return f"symbols: expected lower case {self.unit} without blanks, got {symbol!r}"
            if self.unit == "characters" and len(symbol) != 1:
                return f"symbols: expected single characters, got {symbol!r}"
        for word in self.figures:
            unknown = self.find_indices(word) is None
            if unknown:
                return f"figures: expected words that are made of the symbols, got {word!r}"
        return None

    def normalise(self, text: str) -> str:
        """Returns a text in its normal form."""
        lower = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower())
        return SPACE.join("".join(map(self._replace, lower)).split())

    def find_indices(self, text: str) -> list[int] | None:
        """Returns the indices of a text's symbols; None where something in it is none of them."""
        plain = self.normalise(text)
        parts: Sequence[str] = plain.split() if self.unit == "words" else plain
        found = [self._index.get(part) for part in parts]
        known = [index for index in found if index is not None]
        return known if len(known) == len(found) else None

    def read(self, text: str, most: int) -> list[int]:
        """Returns the indices of a transcript's symbols.

        Args:
            text: the transcript.
            most: largest number of symbols.

        Raises:
            BadRecord: it has others, or more; the message does not repeat them.
        """
        indices = self.find_indices(text)
        if indices is None:
            raise BadRecord(f"expected a transcript of the task's symbols, got {self.unit} that are none of them")
        if len(indices) > most:
            raise BadRecord(f"expected a transcript of at most {most} symbols")
        return indices

    def write(self, indices: Sequence[int]) -> str:
        """Returns the text of symbols."""
        parts = [self.all[index] for index in indices]
        # What a head says may begin with a blank or have two in a row.
        return SPACE.join((SPACE if self.unit == "words" else "").join(parts).split())

    @property
    def longest(self) -> int:
        """The number of characters of the longest symbol."""
        return max(map(len, self.listed))

    @cached_property
    def _index(self) -> dict[str, int]:
        return {symbol: index for index, symbol in enumerate(self.all)}

    @cached_property
    def _kept(self) -> frozenset[str]:
        return frozenset("".join(self.listed))

    def _replace(self, char: str) -> str:
        if char in self._kept:
            return char
        figure = unicodedata.decimal(char, None)
        if figure is not None and self.figures:
            return f" {self.figures[int(figure)]} "
        if char in _APOSTROPHES:
            return ""
        return SPACE if unicodedata.category(char)[0] in "PSZC" else char


def count_edits(said: Sequence[object], meant: Sequence[object]) -> int:
    """Returns the least number of insertions, deletions and substitutions between two sequences (Levenshtein 1966)."""
    row = list(range(len(meant) + 1))
    for number, one in enumerate(said, start=1):
        before, row = row, [number]
        for place, other in enumerate(meant, start=1):
            row.append(min(before[place] + 1, row[-1] + 1, before[place - 1] + (one != other)))
    return row[-1]
