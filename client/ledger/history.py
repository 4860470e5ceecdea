"""The sum of a ledger's events: its terms, its charges, and their price together.

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

from client.ledger.events import (
    TRAINING,
    ChargeCommitted,
    ChargeReserved,
    LedgerCreated,
    LedgerLine,
    LedgerRecovered,
    LossAssumed,
    Purpose,
    Terms,
    TermsAmended,
)
from common.privacy.accounting import Mechanism, compute_epsilon, is_covered

_TOLERANCE = 1.0 + 1e-9
"""Rounding of sums, so that a plan calibrated to the cap is not refused for its last bit."""


@dataclass(frozen=True)
class Charge:
    """One reservation, committed or not.

    Attributes:
        run: id of the run.
        round: number of its round.
        request: digest of the request that was answered.
        mechanism: the worst that may have been released.
        committed: True where the reply is known to be stored.
        purpose: training, or evaluation from its own part of the budget.
    """

    run: str
    round: int
    request: str
    mechanism: Mechanism
    committed: bool
    purpose: Purpose = TRAINING


@dataclass(frozen=True)
class Assumed:
    """The price that a recovery counts for everything before it.

    Attributes:
        number: number of its line; charges with smaller numbers are part of it.
        epsilon: the loss at `delta`; infinite where a release without noise cannot be excluded.
        delta: the delta at which the epsilon holds.
    """

    number: int
    epsilon: float
    delta: float


@dataclass(frozen=True)
class History:
    """A population's terms and everything that may have left the site under them.

    Attributes:
        terms: the terms as last created, amended or recovered.
        charges: number of the line -> charge, in order.
        assumed: the last recovery's assumption; None without one.
    """

    terms: Terms
    charges: Mapping[int, Charge]
    assumed: Assumed | None = None

    @classmethod
    def of(cls, lines: Sequence[LedgerLine]) -> History:
        """Returns the history that a ledger's lines state."""
        terms: Terms | None = None
        assumed: Assumed | None = None
        reserved: dict[int, ChargeReserved] = {}
        committed: set[int] = set()
        for line in lines:
            match line.event:
                case LedgerCreated() | TermsAmended() | LedgerRecovered() as event:
                    terms = Terms(event.unit, event.epsilon_cap, event.delta, event.relation)
                case LossAssumed() as event:
                    bound = math.inf if event.epsilon is None else event.epsilon
                    assumed = Assumed(line.number, bound, event.delta)
                case ChargeReserved() as event:
                    reserved[line.number] = event
                case ChargeCommitted() as event:
                    committed.add(event.reserved)
        assert terms is not None, "a ledger begins with its terms"
        charges = {
            number: Charge(event.run, event.round, event.request, event.mechanism, number in committed, event.purpose)
            for number, event in reserved.items()
        }
        return cls(terms, charges, assumed)

    def compute_epsilon(self, further: Iterable[Mechanism] = (), *, committed_only: bool = False) -> float:
        """Returns an upper bound on epsilon, at the terms' delta, of the history and further mechanisms together."""
        mechanisms = [*self._list_mechanisms(committed_only), *further]
        delta = self.terms.delta
        if self.assumed is None:
            return compute_epsilon(mechanisms, delta)
        rest = delta - self.assumed.delta
        if rest < 0.0 or (mechanisms and rest <= 0.0):
            return math.inf
        return self.assumed.epsilon + (compute_epsilon(mechanisms, rest) if mechanisms else 0.0)

    def is_within_cap(self, further: Iterable[Mechanism] = ()) -> bool:
        """Returns True where the history and further mechanisms together stay within the cap."""
        cap = self.terms.epsilon_cap * _TOLERANCE
        if self.assumed is None:
            return is_covered([*self._list_mechanisms(False), *further], self.terms.delta, cap)
        return self.compute_epsilon(further) <= cap

    def compute_run_epsilon(self, run: str) -> float:
        """Returns epsilon of one run's own charges, reserved or committed; 0 for a run that was never charged."""
        return compute_epsilon(
            [charge.mechanism for charge in self.charges.values() if charge.run == run], self.terms.delta
        )

    def _list_mechanisms(self, committed_only: bool) -> list[Mechanism]:
        """Returns the mechanisms that the assumption does not already count."""
        first = -1 if self.assumed is None else self.assumed.number
        return [
            charge.mechanism
            for number, charge in self.charges.items()
            if number > first and (charge.committed or not committed_only)
        ]
