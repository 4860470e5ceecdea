"""The numbers of a secure sum that all of its sites agree on, and the conditions under which it is secure.

Let n sites take part, of which up to t collude with the coordinator. Each secret is shared among all n, and T shares
determine it.

- One list of survivors. An honest site confirms one list and reveals its shares after T sites have confirmed the same
  one. For two lists the coordinator needs T - t honest confirmations each, of n - t honest sites: impossible with
  2 T > n + t. For the same reason it does not learn both secrets of one site. This is the condition of Bonawitz et al.
  (2017, Section 6) against an active server; with t < n / 3 it holds for T = floor(2 n / 3) + 1.
- Enough noise. A list has at least K = `min_sites` sites, so K - t honest ones: each adds noise of variance
  sigma^2 C^2 / (K - t).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from common.types import BadInput

MAX_SITES = 512
"""Most sites of one sum."""
LEAST_HONEST = 2
"""Fewest honest sites of a sum: of one there is nothing to add it to."""


@dataclass(frozen=True)
class SumRules:
    """The rules of a federation's sums, which every site's own file states.

    Attributes:
        min_sites: K, the number of sites without which nothing is unmasked.
        colluding: t, the number of them that may collude with the coordinator or leave out their noise.
    """

    min_sites: int
    colluding: int

    def __post_init__(self) -> None:
        if not 0 <= self.colluding <= self.min_sites - LEAST_HONEST or self.min_sites > MAX_SITES:
            raise BadInput(
                f"expected at most {MAX_SITES} sites, of which at least {LEAST_HONEST} do not collude, got "
                f"{self.min_sites} sites with {self.colluding} that may"
            )

    @property
    def honest(self) -> int:
        """K - t, the number of sites whose noise is sure to be in a sum."""
        return self.min_sites - self.colluding

    @property
    def noise_share(self) -> float:
        """The part of the visible noise's standard deviation that each site adds."""
        return 1.0 / math.sqrt(self.honest)

    def compute_threshold(self, num_sites: int) -> int:
        """Returns T, the number of shares that determine a secret and of sites that confirm a list of survivors."""
        return (num_sites + self.colluding) // 2 + 1

    def count_needed(self, num_sites: int) -> int:
        """Returns the number of sites, of so many that take part, without which nothing is unmasked."""
        return max(self.min_sites, self.compute_threshold(num_sites))


@dataclass(frozen=True)
class SumTerms:
    """One attempt at one sum. Everything in it is bound into signatures, masks and encryption.

    Attributes:
        run_id: id of the run.
        round: number of the round.
        attempt: number of the attempt at the round, from 1.
        rules: the rules of the site's own file.
        log2_deviation: the noise of one site has a standard deviation of 2**log2_deviation steps of the lattice.
    """

    run_id: str
    round: int
    attempt: int
    rules: SumRules
    log2_deviation: int


def hash_values(label: str, *values: Any) -> bytes:
    """Returns 32 bytes that different labels or values do not share; values are what JSON holds."""
    text = json.dumps(["headwater secure sum", label, *values], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()


def hash_terms(terms: SumTerms, label: str, *values: Any) -> bytes:
    """Returns 32 bytes that name an attempt and values.

    Args:
        terms: the attempt.
        label: what the values are.
        values: plain values.
    """
    return hash_values(label, asdict(terms), *values)


def list_sorted(names: Iterable[str]) -> tuple[str, ...]:
    """Returns distinct names in the order in which all sites count them."""
    return tuple(sorted(set(names)))
