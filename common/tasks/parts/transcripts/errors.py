"""Word and character error rates of texts beside references, as bounded statistics.

# Shapes: B texts; 4 sums: wrong words, words, wrong characters, characters, each over its largest number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from common.tasks import SparseRows, Statistic
from common.tasks.parts.rates import RATE, Array, compute_ratio
from common.tasks.parts.transcripts.symbols import count_edits

if TYPE_CHECKING:
    from torch import Tensor

Compare = Callable[["Tensor", "Tensor"], "Sequence[tuple[str, str]]"]
"""Outputs and labels -> each text that is told, beside its reference."""


@dataclass(frozen=True)
class ErrorRates:
    """The largest numbers over which errors are counted.

    Attributes:
        most_words: most words of a text.
        most_chars: most characters of a text.
    """

    most_words: int
    most_chars: int

    def open_statistic(self, compare: Compare) -> Statistic:
        """Returns word and character errors and the numbers of words and characters, each over its largest number."""

        def count_all(outputs: Tensor, labels: Tensor) -> SparseRows:
            import torch

            pairs = compare(outputs, labels)
            values_B4 = torch.tensor(np.array([self._count(*pair) for pair in pairs]).reshape(-1, 4))
            return SparseRows(torch.arange(4).expand(values_B4.shape), values_B4)

        # Each entry is at most 1.
        return Statistic(4, 2.0, count_all, compute_rates, {"wer": RATE, "cer": RATE}, frozenset({"wer", "cer"}))

    def compare_heard(self, pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
        """Returns the rates of texts beside their references."""
        return compute_rates(sum((self._count(*pair) for pair in pairs), np.zeros(4)), True)

    def _count(self, said: str, meant: str) -> Array:
        words, chars = count_edits(said.split(), meant.split()), count_edits(said, meant)
        counts = np.array([words, len(meant.split()), chars, len(meant)], dtype=np.float64)
        return np.minimum(counts / [self.most_words, self.most_words, self.most_chars, self.most_chars], 1.0)


def compute_rates(sums_4: Array, clip: bool) -> dict[str, float]:
    """Returns the rates of sums, clipped into their ranges where that is asked for."""
    wrong_words, words, wrong_chars, chars = (np.asarray(each) for each in sums_4)
    return {
        "wer": float(compute_ratio(wrong_words, words, clip=clip)),
        "cer": float(compute_ratio(wrong_chars, chars, clip=clip)),
    }
