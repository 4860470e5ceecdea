"""What the entries of a ledger's chain amount to: its terms, its charges, and their price together.

A pure view: nothing here reads or writes a file. The whole history is composed at once; epsilons are never added, with
one exception that is a bound and not an estimate. After a recovery (`client.ledger.recovery`) only a pair (epsilon,
delta) is known of what may have left before. Such a pair composes with what follows only by basic composition (Dwork
and Roth 2014, Theorem 3.16): epsilons and deltas both add up. No Gaussian is a bound for it: a pair says nothing
about the losses beyond its epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from common.privacy.accounting import Mechanism, covered, epsilon
from common.types import RELATION, BadInput, Unit

Purpose = Literal["training", "evaluation"]
TRAINING: Purpose = "training"
EVALUATION: Purpose = "evaluation"

_TOLERANCE = 1.0 + 1e-9
"""Rounding of sums, so that a plan calibrated to the cap is not refused for its last bit."""


@dataclass(frozen=True)
class Terms:
    """What a ledger promises to keep.

    Attributes:
        unit: what the budget protects.
        epsilon_cap: all the registry may ever spend, at `delta`.
        delta: the site's own.
        relation: which data sets count as neighbours.
    """

    unit: Unit
    epsilon_cap: float
    delta: float
    relation: str = RELATION

    def __post_init__(self) -> None:
        if not 0.0 < self.epsilon_cap < math.inf:
            raise BadInput(f"budget.epsilon: expected a finite number > 0, got {self.epsilon_cap}")
        if not 0.0 < self.delta < 1.0:
            raise BadInput(f"budget.delta: expected a number in (0, 1), got {self.delta}")


@dataclass(frozen=True)
class Charge:
    """One reservation, committed or not.

    Attributes:
        run: the run it was made for.
        round: the round of that run.
        request: digest of the request.
        mechanism: what may have been released.
        committed: whether the reply is known to be stored.
        purpose: training, or evaluation from its own share of the budget.
    """

    run: str
    round: int
    request: str
    mechanism: Mechanism
    committed: bool
    purpose: Purpose = TRAINING


@dataclass(frozen=True)
class Assumed:
    """What a recovery counts everything before it as.

    Attributes:
        number: of its entry; charges with smaller numbers are part of it.
        epsilon: at `delta`; infinite where a release without noise cannot be excluded.
        delta: at which the epsilon holds.
    """

    number: int
    epsilon: float
    delta: float


@dataclass(frozen=True)
class History:
    """A registry's terms and everything that may have left under them.

    Attributes:
        terms: as last created or amended.
        charges: entry number -> charge, in order.
        assumed: the last recovery's assumption, if there was one.
    """

    terms: Terms
    charges: Mapping[int, Charge]
    assumed: Assumed | None = None

    @classmethod
    def of(cls, entries: Sequence[Mapping[str, Any]]) -> History:
        """The history that a chain's entries state."""
        assumed = [entry for entry in entries if entry["event"] == "assumed"]
        last = None
        if assumed:
            bound = assumed[-1]["epsilon"]
            last = Assumed(assumed[-1]["n"], math.inf if bound is None else float(bound), float(assumed[-1]["delta"]))
        return cls(_terms(entries), _charges(entries), last)

    def epsilon(self, further: Iterable[Mechanism] = (), *, committed_only: bool = False) -> float:
        """An upper bound on epsilon, at the terms' delta, of the history and further mechanisms together."""
        mechanisms = [*self._composed(committed_only), *further]
        delta = self.terms.delta
        if self.assumed is None:
            return epsilon(mechanisms, delta)
        rest = delta - self.assumed.delta
        if rest < 0.0 or (mechanisms and rest <= 0.0):
            return math.inf
        return self.assumed.epsilon + (epsilon(mechanisms, rest) if mechanisms else 0.0)

    def within_cap(self, further: Iterable[Mechanism] = ()) -> bool:
        """Whether the history and further mechanisms together stay within the cap."""
        cap = self.terms.epsilon_cap * _TOLERANCE
        if self.assumed is None:
            return covered([*self._composed(False), *further], self.terms.delta, cap)
        return self.epsilon(further) <= cap

    def run_epsilon(self, run: str) -> float:
        """Epsilon of one run's own charges, reserved or committed; 0 for a run that was never charged."""
        return epsilon([charge.mechanism for charge in self.charges.values() if charge.run == run], self.terms.delta)

    def _composed(self, committed_only: bool) -> list[Mechanism]:
        """Mechanisms that the assumption does not already hold."""
        first = -1 if self.assumed is None else self.assumed.number
        return [
            charge.mechanism
            for number, charge in self.charges.items()
            if number > first and (charge.committed or not committed_only)
        ]


def _terms(entries: Sequence[Mapping[str, Any]]) -> Terms:
    last = [entry for entry in entries if entry["event"] in {"created", "amended", "recovered"}][-1]
    return Terms(Unit(last["unit"]), float(last["epsilon_cap"]), float(last["delta"]), last["relation"])


def _charges(entries: Sequence[Mapping[str, Any]]) -> dict[int, Charge]:
    committed = {entry["reserved"] for entry in entries if entry["event"] == "committed"}
    return {
        entry["n"]: Charge(
            run=entry["run"],
            round=entry["round"],
            request=entry["request"],
            mechanism=Mechanism.from_dict(entry["mechanism"]),
            committed=entry["n"] in committed,
            # Entries without it are older than evaluations.
            purpose=EVALUATION if entry.get("purpose") == EVALUATION else TRAINING,
        )
        for entry in entries
        if entry["event"] == "reserved"
    }
