"""Symbols of a task and the texts that a pre-trained model writes for them, such as figures for their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from common.tasks.parts.transcripts.symbols import Symbols
from common.types import BadRecord

_FIGURES = tuple("0123456789")


@dataclass(frozen=True)
class Spelling:
    """Words, and what is written for each.

    Attributes:
        written: word in its normal form -> text without blanks, all of them different.
    """

    written: Mapping[str, str]

    @cached_property
    def symbols(self) -> Symbols:
        """The words, and where all ten figures are written, the figures of transcripts."""
        back = self._back
        figures = tuple(back[figure] for figure in _FIGURES) if set(_FIGURES) <= set(back) else ()
        return Symbols(tuple(self.written), "words", figures)

    def find_fault(self) -> str | None:
        """Returns what is wrong with the words or texts; None where nothing is."""
        if len(self._back) < len(self.written):
            return "symbols: expected another text for each word"
        if any(len(text.split()) != 1 for text in self.written.values()):
            return "symbols: expected texts without blanks"
        return self.symbols.find_fault()

    def spell(self, transcript: str) -> str:
        """Returns what is written for a transcript, which may hold it already. Raises BadRecord: it has other words."""
        parts = self.symbols.normalise(transcript).split()
        texts = [self.written.get(part) or (part if part in self._back else None) for part in parts]
        if None in texts:
            raise BadRecord("expected a transcript of the task's symbols, got words that are none of them")
        return " ".join(str(text) for text in texts)

    def read(self, text: str) -> str:
        """Returns the words of what is written; what is no symbol's text stays in its normal form."""
        parts = (self._back.get(part.lower(), part) for part in text.split())
        return self.symbols.normalise(" ".join(parts))

    @cached_property
    def _back(self) -> dict[str, str]:
        return {text.lower(): word for word, text in self.written.items()}
