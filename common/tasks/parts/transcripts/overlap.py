"""Overlap of a translation with its reference: counts of one sentence whose sums over sentences give BLEU and chrF.

The counts are those of sacrebleu's defaults (Post 2018, arXiv 1804.08771), with which tests compare them: BLEU of up to
four words, divided as `mteval-v13a` does (Papineni et al. 2002); chrF2 of up to six characters without white space
(Popovic 2015).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from common.tasks.parts.rates import Array, compute_ratio

WORD_ORDER, CHAR_ORDER = 4, 6
_BETA = 2.0
_ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}
_RULES = (
    (re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),
    (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),
    (re.compile(r"([\.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def split_words(text: str) -> list[str]:
    """Returns a text's words and signs, as `mteval-v13a` divides them."""
    line = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, sign in _ENTITIES.items():
        line = line.replace(entity, sign)
    line = f" {line} "
    for pattern, replacement in _RULES:
        line = pattern.sub(replacement, line)
    return line.split()


def count_matches(said: Sequence[object], meant: Sequence[object], order: int) -> tuple[int, int, int]:
    """Returns the number of n-grams that both have, of those that one has, and of those that the other has.

    Args:
        said: words or characters of the translation.
        meant: those of the reference.
        order: n.
    """
    first, second = (
        Counter(tuple(each[at : at + order]) for at in range(len(each) - order + 1)) for each in (said, meant)
    )
    return sum((first & second).values()), max(0, len(said) - order + 1), max(0, len(meant) - order + 1)


def compute_bleu(matches_N: Array, said_N: Array, meant: float, *, clip: bool) -> float:
    """Returns BLEU from summed counts, from 0 to 1; NaN where nothing was said or meant.

    Args:
        matches_N: number of n-grams of each order that translations share with their references.
        said_N: number of n-grams of the translations.
        meant: number of words of the references.
        clip: whether a rate that noise moved out of its range is moved to its end.
    """
    if not (said_N[0] > 0 and meant > 0):
        return math.nan
    precisions_N, smoothed = np.nan_to_num(compute_ratio(matches_N, said_N, clip=clip)), 1.0
    for order in range(len(precisions_N)):
        if said_N[order] > 0 and matches_N[order] <= 0:
            # sacrebleu's smoothing: one half, one fourth, ... of a match.
            smoothed *= 2.0
            precisions_N[order] = 1.0 / (smoothed * said_N[order])
    if (precisions_N <= 0).any():
        return 0.0
    brevity = min(0.0, 1.0 - meant / said_N[0])
    value = math.exp(brevity + float(np.log(precisions_N).mean()))
    return min(value, 1.0) if clip else value


def compute_chrf(matches_N: Array, said_N: Array, meant_N: Array, *, clip: bool) -> float:
    """Returns chrF2 from summed counts, from 0 to 1; NaN where no order has counts.

    Args:
        matches_N: number of n-grams of each order that translations share with their references.
        said_N: number of n-grams of the translations.
        meant_N: number of n-grams of the references.
        clip: whether a rate that noise moved out of its range is moved to its end.
    """
    known_N = (said_N > 0) & (meant_N > 0)
    if not known_N.any():
        return math.nan
    precision = float(compute_ratio(matches_N, said_N, clip=clip)[known_N].mean())
    recall = float(compute_ratio(matches_N, meant_N, clip=clip)[known_N].mean())
    divisor = _BETA**2 * precision + recall
    return (1.0 + _BETA**2) * precision * recall / divisor if divisor > 0 else 0.0
