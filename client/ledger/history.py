"""The sum of a ledger's events: its terms, its charges, and their price together.

A pure view: nothing here reads or writes a file. A privacy filter (`common.privacy.filters`) decides whether more fits
under the cap; the epsilon of the whole history, composed at once, is shown beside. Epsilons are never added, with one
exception that is a bound and not an estimate. After a recovery (`client.ledger.recovery`) only a pair (epsilon,
delta) is known of what may have left before. Such a pair composes with what follows only by basic composition (Dwork
and Roth 2014, Theorem 3.16): epsilons and deltas both add up. No Gaussian is a bound for it: a pair says nothing
about the losses beyond its epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from client.ledger.events import (
    TRAINING,
    ChargeCommitted,
    ChargeReserved,
    EarmarkReleased,
    LedgerCreated,
    LedgerLine,
    LedgerRecovered,
    LossAssumed,
    Purpose,
    RunEarmarked,
    Terms,
    TermsAmended,
)
from common.privacy.accounting import MAX_DISTINCT, Mechanism, compute_epsilon
from common.privacy.filters import TOLERANCE, PrivacyFilter, choose_filter


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
class Earmark:
    """The part of the budget that is held for a run that the site joined.

    Attributes:
        mechanism: releases of all its rounds together.
        rounds: number of its rounds.
        charged: its rounds that were charged; 0 is the release before the first.
        before: the release before its first round; None without one.
    """

    mechanism: Mechanism
    rounds: int
    charged: frozenset[int] = frozenset()
    before: Mechanism | None = None

    def list_rest(self, round_: int | None = None) -> list[Mechanism]:
        """Returns the releases that are not charged, without those of a given round."""
        charged = self.charged | ({round_} if round_ is not None else set())
        steps = self.mechanism.steps * (self.rounds - len(charged - {0})) // self.rounds
        rest = [] if self.before is None or 0 in charged else [self.before]
        return [*rest, replace(self.mechanism, steps=steps)] if steps > 0 else rest


@dataclass(frozen=True)
class History:
    """A population's terms and everything that may have left the site under them.

    Attributes:
        terms: the terms as last created, amended or recovered.
        charges: number of the line -> charge, in order.
        assumed: the last recovery's assumption; None without one.
        merged: the charges that the assumption does not count, equal ones as one of all their steps, in order of the
            first of each; None where they are to be taken from the charges, one by one.
        earmarks: run -> what is held for it; runs that ended are not in it.
    """

    terms: Terms
    charges: Mapping[int, Charge]
    assumed: Assumed | None = None
    merged: Mapping[tuple[str, float, float], Mechanism] | None = None
    earmarks: Mapping[str, Earmark] = field(default_factory=dict)

    @classmethod
    def of(cls, lines: Sequence[LedgerLine]) -> History:
        """Returns the history that a ledger's lines state."""
        first = lines[0].event
        assert isinstance(first, LedgerCreated | LedgerRecovered), "a ledger begins with its terms"
        return cls(_read_terms(first), {}, None, {}).extend(lines)

    def extend(self, lines: Sequence[LedgerLine]) -> History:
        """Returns the history after further lines."""
        assert self.merged is not None, "only a history of lines is extended"
        terms, assumed, charges, merged = self.terms, self.assumed, dict(self.charges), dict(self.merged)
        earmarks = dict(self.earmarks)
        for line in lines:
            match line.event:
                case LedgerCreated() | TermsAmended() | LedgerRecovered() as event:
                    terms = _read_terms(event)
                case LossAssumed() as event:
                    bound = math.inf if event.epsilon is None else event.epsilon
                    assumed = Assumed(line.number, bound, event.delta)
                    merged.clear()
                case ChargeReserved() as event:
                    charges[line.number] = Charge(
                        event.run, event.round, event.request, event.mechanism, False, event.purpose
                    )
                    kind = (event.mechanism.kind, event.mechanism.noise_multiplier, event.mechanism.sampling_rate)
                    steps = event.mechanism.steps + (merged[kind].steps if kind in merged else 0)
                    merged[kind] = replace(event.mechanism, steps=steps)
                    held = earmarks.get(event.run)
                    if held is not None and event.purpose == TRAINING:
                        earmarks[event.run] = replace(held, charged=held.charged | {event.round})
                case RunEarmarked() as event:
                    own = (charge for charge in charges.values() if charge.run == event.run)
                    charged = frozenset(charge.round for charge in own if charge.purpose == TRAINING)
                    earmarks[event.run] = Earmark(event.mechanism, event.rounds, charged, event.before)
                case EarmarkReleased() as event:
                    earmarks.pop(event.run, None)
                case ChargeCommitted() as event if event.reserved in charges:
                    charges[event.reserved] = replace(charges[event.reserved], committed=True)
        return History(terms, charges, assumed, merged, earmarks)

    def list_earmarked(self, run: str | None = None, round_: int | None = None) -> list[Mechanism]:
        """Returns what is held for runs that the site joined.

        Args:
            run: id of a run that is about to be charged; None for none.
            round_: its round, which is then no longer held; None: nothing is held for this run.
        """
        rests = []
        for name, earmark in self.earmarks.items():
            if name != run:
                rests += earmark.list_rest()
            elif round_ is not None:
                rests += earmark.list_rest(round_)
        return rests

    def compute_epsilon(
        self, further: Iterable[Mechanism] = (), *, committed_only: bool = False, quick: bool = False
    ) -> float:
        """Returns an upper bound on epsilon, at the terms' delta, of the history and further mechanisms together.

        Args:
            further: mechanisms beside the history.
            committed_only: leaves out charges whose reply is not known to be stored.
            quick: takes the looser bound that needs no torch, where records are sampled.
        """
        mechanisms = [*self._list_mechanisms(committed_only), *further]
        delta = self.terms.delta
        if self.assumed is None:
            return compute_epsilon(mechanisms, delta, quick=quick)
        rest = delta - self.assumed.delta
        if rest < 0.0 or (mechanisms and rest <= 0.0):
            return math.inf
        return self.assumed.epsilon + (compute_epsilon(mechanisms, rest, quick=quick) if mechanisms else 0.0)

    def is_within_cap(self, further: Iterable[Mechanism] = ()) -> bool:
        """Returns True where the filter covers the history and further mechanisms together."""
        return self.compute_share(further) <= TOLERANCE

    def compute_share(self, further: Iterable[Mechanism] = ()) -> float:
        """Returns the part of the cap, as the filter counts it, that the history and further mechanisms cost."""
        further = list(further)
        chosen, mechanisms = self.find_filter(further), [*self._list_mechanisms(False), *further]
        if not mechanisms:
            return 0.0 if chosen is not None else 1.0
        return math.inf if chosen is None else chosen.compute_share(mechanisms)

    def explain_filter(self, mechanism: Mechanism) -> str:
        """Returns the end of a refusal where the filter counts a sampled mechanism as full batch; else nothing."""
        chosen = self.find_filter([mechanism])
        if mechanism.sampling_rate == 1.0 or chosen is None or chosen.kind != "gdp":
            return ""
        return (
            "; sampling lowers no price here, because this ledger began with full-batch runs: `budget.filter: renyi` "
            "in the site file and `headwater site amend` change that"
        )

    def find_filter(self, further: Iterable[Mechanism] = ()) -> PrivacyFilter | None:
        """Returns the filter that decides, where further mechanisms follow; None where the assumed loss leaves nothing.

        The first charge fixes it, or the site file; no later charge changes it.
        """
        cap, delta = self.terms.epsilon_cap, self.terms.delta
        if self.assumed is not None:
            cap, delta = cap - self.assumed.epsilon, delta - self.assumed.delta
            if cap <= 0.0 or delta <= 0.0:
                return None
        first = next(iter([*self._list_mechanisms(False), *further]), None)
        return choose_filter(first, self.terms.filter, cap, delta)

    def compute_run_epsilon(self, run: str, *, quick: bool = False) -> float:
        """Returns epsilon of one run's own charges, reserved or committed; 0 for a run that was never charged."""
        own = [charge.mechanism for charge in self.charges.values() if charge.run == run]
        different = {charge.mechanism for charge in self.charges.values() if charge.mechanism.sampling_rate < 1.0}
        return compute_epsilon(own, self.terms.delta, quick=quick or len(different) > MAX_DISTINCT)

    def _list_mechanisms(self, committed_only: bool) -> list[Mechanism]:
        """Returns mechanisms that cost what the charges do that the assumption does not already count."""
        if self.merged is not None and not committed_only:
            return list(self.merged.values())
        first = -1 if self.assumed is None else self.assumed.number
        return [
            charge.mechanism
            for number, charge in self.charges.items()
            if number > first and (charge.committed or not committed_only)
        ]


def _read_terms(event: LedgerCreated | TermsAmended | LedgerRecovered) -> Terms:
    return Terms(event.unit, event.epsilon_cap, event.delta, event.relation, event.filter)
