"""A small language with known words, whose states follow from what is written so far: nothing is learned of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.backbones import SPEECH
from common.types import BadRecord

END = 0


@dataclass(frozen=True)
class TinyLanguage:
    """Words as tokens; the state behind some tokens is a fixed random map of all of them and of the record's features.

    Attributes:
        words: the words; token 0 ends a text.
        width: features of a state.
        longest: largest number of tokens.
        scale: what a first head multiplies states by.
    """

    words: tuple[str, ...] = ("Klampfe", "Fagott", "Zimbel", "Geige12", "Trommel", "Posaune", "Oboe123", "Harfe12")
    width: int = 6
    longest: int = 8
    scale: float = 3.0
    start: int = END
    end: int = END
    _drawn: dict[str, Tensor] = field(default_factory=dict)

    def _draw(self, name: str, *shape: int) -> Tensor:
        if name not in self._drawn:
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            self._drawn[name] = torch.randn(*shape, generator=generator)
        return self._drawn[name]

    @property
    def embedding_VD(self) -> Tensor:
        rows_VD = self._draw("embedding", len(self.words) + 1, self.width)
        return rows_VD / rows_VD.square().sum(dim=1).mean().sqrt()

    @property
    def bias_V(self) -> Tensor:
        return 0.1 * self._draw("bias", len(self.words) + 1)

    def read(self, text: str) -> list[int]:
        if any(word not in self.words for word in text.split()):
            raise BadRecord("expected a text of the backbone's words")
        return [1 + self.words.index(word) for word in text.split()]

    def write(self, tokens: Sequence[int]) -> str:
        return " ".join(self.words[token - 1] for token in tokens)

    def begin(self, features_BPD: Tensor) -> Tensor:
        # The last place holds what a record is about.
        return features_BPD[:, -1, :-1] @ self._draw("begin", features_BPD.shape[2] - 1, self.width)

    def step(self, known: Tensor, tokens_B: Tensor, place: int) -> tuple[Tensor, Tensor]:
        known = torch.tanh(known + self._draw("tokens", len(self.words) + 1, self.width)[tokens_B] + 0.1 * place)
        states_BD = known / known.norm(dim=1, keepdim=True)
        return torch.cat([states_BD, torch.full((len(known), 1), SPEECH)], dim=1), known

    def select(self, known: Tensor, rows_B: Tensor) -> Tensor:
        return known[rows_B]
