"""What a registry has spent, for ever: the rules on top of the keyed chain of `client/ledger/chain.py`.

A registry is the population that one budget protects. All models, runs, rounds, tasks and processes that touch it share
one ledger, `<folder>/<registry>/`; re-exported, extended or reordered data never reset it.

Rules:

* Reserve, then open features, train, store the reply, commit. A reservation counts from the moment it is on disk; there
  is no refund, so a crash anywhere leaves at least what may have left the site. Each `reserve` is a new charge: the
  caller resends a stored reply without asking here.
* The whole history is composed at once, reservations included; a charge beyond the cap is refused and logged.
* Unit, relation, delta and cap are fixed at creation. `amend` changes them in a logged entry and resets nothing. The
  unit can change only while nothing is charged: what was spent per example says nothing about patients, and removing
  one example changes a patient's clipped gradient by up to twice the norm: neither promise follows from the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from client.config import NoisedEvaluation
from client.ledger import chain
from client.ledger.evaluation_budget import evaluation_mechanism, unspent, within_share
from client.ledger.history import EVALUATION, TRAINING, Charge, History, Purpose, Terms
from common.files import write_atomic
from common.privacy.accounting import Mechanism, rounded_up
from common.types import BadInput, BudgetExhausted, LedgerDamaged, Unit


@dataclass(frozen=True)
class Reservation:
    """A durable charge, by the number of its entry."""

    number: int


@dataclass(frozen=True)
class Spent:
    """A registry's balance. Epsilons do not add up: each is composed from the charges it names.

    Attributes:
        registry: whose balance this is.
        terms: unit, cap, delta, relation.
        spent_epsilon: of what was committed.
        reserved_epsilon: of everything that may have left: committed and reserved.
    """

    registry: str
    terms: Terms
    spent_epsilon: float
    reserved_epsilon: float

    @property
    def left_epsilon(self) -> float:
        """Cap minus reserved, never below 0; a charge's own epsilon may be larger and still be covered."""
        return max(0.0, self.terms.epsilon_cap - self.reserved_epsilon)


class Ledger:
    """One registry's ledger. Every method reads, verifies and locks the file anew: other processes may write too.

    Each raises LedgerDamaged if the file does not verify; nothing is then written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def open(cls, folder: Path, *, registry: str, unit: Unit, epsilon_cap: float, delta: float) -> Ledger:
        """The ledger of a registry, created the first time.

        Raises:
            BadInput: the ledger was created, or last amended, with another unit, cap or delta.
            LedgerDamaged: the file does not verify.
        """
        wanted = Terms(unit, epsilon_cap, delta)
        place = folder / registry
        if cls.find(folder, registry) is None:
            chain.create(place, "created", {"registry": registry, **asdict(wanted)})
            write_atomic(marker(place), b"")
        with chain.exclusive(place) as opened:
            _refuse_differences(History.of(opened.entries).terms, wanted, registry)
        return cls(place)

    @classmethod
    def find(cls, folder: Path, registry: str) -> Ledger | None:
        """The ledger of a registry as it is, whatever a site file says now; None where there never was one.

        Raises:
            LedgerDamaged: there was one, and its folder is gone.
        """
        place = folder / registry
        # The marker first: it is written after the folder, so that one being created is never taken for a lost one.
        marked = marker(place).exists()
        if not place.exists():
            if marked:
                raise LedgerDamaged(f"ledger {registry}: its folder is missing")
            return None
        if not marked:
            write_atomic(marker(place), b"")
        return cls(place)

    def reserve(
        self,
        mechanism: Mechanism,
        *,
        run: str,
        round: int,
        request: str,
        allow_infinite: bool = False,
        share: NoisedEvaluation | None = None,
    ) -> Reservation:
        """Charge a mechanism before any record is touched; durable when this returns.

        Args:
            mechanism: the worst that may be released.
            run: for which run.
            round: for which of its rounds.
            request: digest of the request, for the log only.
            allow_infinite: whether the site lets a mechanism without noise pass; epsilon is infinite from then on.
            share: of evaluations: what is unspent of it stays affordable.

        Raises:
            BudgetExhausted: history, charge and unspent share together exceed the cap; the refusal is logged, nothing
                is spent.
        """
        with chain.exclusive(self._folder) as opened:
            history = History.of(opened.entries)
            held = unspent(share, history)
            facts = _facts(TRAINING, mechanism, run, round, request)
            if history.within_cap([mechanism, *held]) or (allow_infinite and mechanism.kind == "none"):
                return Reservation(opened.append("reserved", facts))
            opened.append("refused", facts)
        total, terms = history.epsilon([mechanism, *held]), history.terms
        beside = " and what is held for evaluations" if held else ""
        raise BudgetExhausted(
            f"registry {self._folder.name}: this charge{beside} would bring epsilon to {rounded_up(total)}, beyond the "
            f"budget of {terms.epsilon_cap} at delta {terms.delta}"
        )

    def reserve_evaluation(
        self,
        share: NoisedEvaluation,
        num_tasks: int,
        *,
        run: str,
        round: int,
        request: str,
        allow_infinite: bool = False,
    ) -> tuple[Reservation, Mechanism]:
        """Charge one evaluation to its share before any held-out record is touched; what was charged.

        Args:
            share: as the site's file says.
            num_tasks: evaluated in this one release.
            run: for which run.
            round: after which of its rounds.
            request: digest of the request, for the log only.
            allow_infinite: whether evaluations go on after a release without noise.

        Raises:
            BudgetExhausted: the share, or the cap, does not cover it; the refusal is logged, nothing is spent.
        """
        with chain.exclusive(self._folder) as opened:
            history = History.of(opened.entries)
            mechanism = evaluation_mechanism(share, history.terms, num_tasks)
            facts = _facts(EVALUATION, mechanism, run, round, request)
            lost = allow_infinite and history.epsilon() == math.inf
            if within_share(share, history, mechanism) and (lost or history.within_cap([mechanism])):
                return Reservation(opened.append("reserved", facts)), mechanism
            opened.append("refused", facts)
        raise BudgetExhausted(
            f"registry {self._folder.name}: one more evaluation would exceed its share of {share.share:g} of the budget"
        )

    def commit(self, reservation: Reservation) -> None:
        """Note that the reply of a reservation is stored.

        Raises:
            BadInput: there is no such reservation, or it was committed before.
        """
        with chain.exclusive(self._folder) as opened:
            charge = History.of(opened.entries).charges.get(reservation.number)
            if charge is None or charge.committed:
                raise BadInput(f"reservation {reservation.number}: expected one that is open")
            # Not flushed: if it is lost, the charge counts as reserved, which is the same price.
            opened.append("committed", {"reserved": reservation.number}, durable=False)

    def spent(self) -> Spent:
        """The balance now."""
        history = self.history()
        return Spent(
            registry=self._folder.name,
            terms=history.terms,
            spent_epsilon=history.epsilon(committed_only=True),
            reserved_epsilon=history.epsilon(),
        )

    def affords(self, mechanisms: Iterable[Mechanism], share: NoisedEvaluation | None = None) -> bool:
        """Whether these, the whole history and an unspent share stay within the cap. Nothing is charged or logged."""
        history = self.history()
        return history.within_cap([*mechanisms, *unspent(share, history)])

    def charges(self) -> list[Charge]:
        """All charges in order."""
        return list(self.history().charges.values())

    def run_epsilon(self, run: str) -> float:
        """Epsilon of one run's own charges, reserved or committed; 0 for a run that was never charged."""
        return self.history().run_epsilon(run)

    def history(self) -> History:
        """Terms and charges, verified now."""
        return History.of(self.entries())

    def entries(self) -> list[dict[str, Any]]:
        """Every verified entry in order: charges, refusals, amendments, sealed crashes."""
        with chain.exclusive(self._folder) as opened:
            return opened.entries


def amend(folder: Path, *, registry: str, unit: Unit, epsilon_cap: float, delta: float, reason: str = "") -> None:
    """Change a ledger's unit, cap or delta in a logged entry. What was spent stays spent.

    Args:
        folder: of all ledgers.
        registry: whose ledger.
        unit: of the new terms.
        epsilon_cap: of the new terms.
        delta: of the new terms.
        reason: why, for the log.

    Raises:
        BadInput: there is no such ledger, nothing would change, or the unit would change after a charge.
        LedgerDamaged: the file does not verify.
    """
    if Ledger.find(folder, registry) is None:
        raise BadInput(f"registry {registry}: it has no ledger yet")
    wanted = Terms(unit, epsilon_cap, delta)
    with chain.exclusive(folder / registry) as opened:
        history = History.of(opened.entries)
        before = history.terms
        if before == wanted:
            raise BadInput(f"registry {registry}: the ledger already has these terms")
        if before.unit != wanted.unit and (history.charges or history.assumed):
            raise BadInput(
                f"registry {registry}: unit: expected {before.unit.value}, got {wanted.unit.value}; it cannot change "
                "after the first charge, because what was spent per one unit does not bound the loss of the other"
            )
        opened.append("amended", {"before": asdict(before), **asdict(wanted), "reason": reason})


def _facts(purpose: Purpose, mechanism: Mechanism, run: str, round: int, request: str) -> dict[str, Any]:
    return {"run": run, "round": round, "request": request, "mechanism": mechanism.to_dict(), "purpose": purpose}


def marker(place: Path) -> Path:
    """The file beside a ledger's folder that says there is, or was, one."""
    return place.with_name(f".{place.name}.created")


def _refuse_differences(ledger: Terms, wanted: Terms, registry: str) -> None:
    for name, before, now in (
        ("unit", ledger.unit.value, wanted.unit.value),
        ("budget.epsilon", ledger.epsilon_cap, wanted.epsilon_cap),
        ("budget.delta", ledger.delta, wanted.delta),
    ):
        if before != now:
            raise BadInput(
                f"{name}: the ledger of registry {registry} says {before}, the site file {now}; changing it must be a "
                "logged amendment of the ledger"
            )
