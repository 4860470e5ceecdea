"""From the outputs of frames to symbols: the best path, or a beam of prefixes.

An output of a frame is a blank's logit and one of each symbol. A path has one of them for each frame; equal neighbours
count once, then blanks are left out (Graves et al. 2006). Many paths say the same: `search_prefixes` adds them up.

# Shapes: T frames, K outputs: the blank, then the symbols.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
BLANK = 0
Prior = Sequence[Sequence[float]]
"""Weighted logarithms of probabilities of symbols behind others: [previous][next], 0 before a text and behind it."""
_Beam = dict[tuple[int, ...], tuple[float, float]]
"""Prefix -> logarithms of the probability of its paths that end in a blank, and of those that end in a symbol."""


def find_symbols(outputs_TK: Array, beam: int, prior: Prior | None = None) -> list[int]:
    """Returns the indices of a transcript's symbols.

    Args:
        outputs_TK: logits of the recording's own frames.
        beam: number of prefixes that are kept after each frame; 1 takes the most probable path.
        prior: language of the transcripts, with several prefixes; None for none.
    """
    return take_best_path(outputs_TK) if beam == 1 else search_prefixes(outputs_TK, beam, prior)


def take_best_path(outputs_TK: Array) -> list[int]:
    """Returns the indices of the symbols on the most probable path."""
    best_T = outputs_TK.argmax(axis=1)
    changed_T = np.diff(best_T, prepend=-1) != 0
    found: list[int] = (best_T[changed_T & (best_T != BLANK)] - 1).tolist()
    return found


def search_prefixes(outputs_TK: Array, width: int, prior: Prior | None = None) -> list[int]:
    """Returns the indices of the symbols that are most probable over all their paths, as far as a beam finds them.

    Args:
        outputs_TK: logits.
        width: number of prefixes that are kept after each frame; as many as there are gives the exact answer.
        prior: language of the transcripts, whose logarithm is added to that of the frames; None for none.
    """
    known: dict[tuple[int, ...], float] = {(): 0.0}

    def read_prior(prefix: tuple[int, ...]) -> float:
        if prior is None or prefix in known:
            return known.get(prefix, 0.0)
        before = prefix[:-1]
        known[prefix] = read_prior(before) + prior[before[-1] + 1 if before else 0][prefix[-1] + 1]
        return known[prefix]

    def rank(item: tuple[tuple[int, ...], tuple[float, float]], ended: bool = False) -> tuple[float, tuple[int, ...]]:
        prefix, logs = item
        end = prior[prefix[-1] + 1 if prefix else 0][0] if prior is not None and ended else 0.0
        return -(_add_logs(*logs) + read_prior(prefix) + end), prefix

    shifted_TK = outputs_TK - outputs_TK.max(axis=1, keepdims=True, initial=-math.inf)
    log_TK = shifted_TK - np.log(np.exp(shifted_TK).sum(axis=1, keepdims=True))
    beam: _Beam = {(): (0.0, -math.inf)}
    for log_K in log_TK.tolist():
        grown = _grow(beam, log_K)
        beam = dict(sorted(grown.items(), key=rank)[:width])
    return list(min(beam.items(), key=lambda item: rank(item, ended=True))[0])


def _grow(beam: _Beam, log_K: Sequence[float]) -> _Beam:
    """Returns the prefixes that those of a beam become with one frame more."""
    grown: _Beam = {}

    def add(prefix: tuple[int, ...], blank: float, symbol: float) -> None:
        old_blank, old_symbol = grown.get(prefix, (-math.inf, -math.inf))
        grown[prefix] = (_add_logs(old_blank, blank), _add_logs(old_symbol, symbol))

    for prefix, (blank, symbol) in beam.items():
        either = _add_logs(blank, symbol)
        add(prefix, either + log_K[BLANK], symbol + log_K[prefix[-1] + 1] if prefix else -math.inf)
        for index, log in enumerate(log_K[1:]):
            # The same symbol once more needs a blank between.
            reached = blank if prefix and prefix[-1] == index else either
            add((*prefix, index), -math.inf, reached + log)
    return grown


def _add_logs(first: float, second: float) -> float:
    """Returns log(exp(first) + exp(second))."""
    high, low = max(first, second), min(first, second)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))
