"""What a registry has spent, for ever: the rules on top of the keyed chain of `client/chain.py`.

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
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from client import chain
from common.privacy.accounting import Mechanism, covered, epsilon, rounded_up
from common.types import RELATION, BadInput, BudgetExhausted, Unit


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
class Reservation:
    """A durable charge, by the number of its entry."""

    number: int


@dataclass(frozen=True)
class Charge:
    """One reservation, committed or not.

    Attributes:
        run: the run it was made for.
        round: the round of that run.
        request: digest of the request.
        mechanism: what may have been released.
        committed: whether the reply is known to be stored.
    """

    run: str
    round: int
    request: str
    mechanism: Mechanism
    committed: bool


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
        chain.create(place, "created", {"registry": registry, **asdict(wanted)})
        with chain.exclusive(place) as opened:
            _refuse_differences(_terms(opened.entries), wanted, registry)
        return cls(place)

    def reserve(
        self, mechanism: Mechanism, *, run: str, round: int, request: str, allow_infinite: bool = False
    ) -> Reservation:
        """Charge a mechanism before any record is touched; durable when this returns.

        Args:
            mechanism: the worst that may be released.
            run: for which run.
            round: for which of its rounds.
            request: digest of the request, for the log only.
            allow_infinite: whether the site lets a mechanism without noise pass; epsilon is infinite from then on.

        Raises:
            BudgetExhausted: history and charge together exceed the cap; the refusal is logged, nothing is spent.
        """
        facts = {"run": run, "round": round, "request": request, "mechanism": mechanism.to_dict()}
        with chain.exclusive(self._folder) as opened:
            terms = _terms(opened.entries)
            everything = [*_mechanisms(_charges(opened.entries)), mechanism]
            if _within(everything, terms) or (allow_infinite and mechanism.kind == "none"):
                return Reservation(opened.append("reserved", facts))
            opened.append("refused", facts)
        total = epsilon(everything, terms.delta)
        raise BudgetExhausted(
            f"registry {self._folder.name}: this charge would bring epsilon to {rounded_up(total)}, beyond the budget "
            f"of {terms.epsilon_cap} at delta {terms.delta}"
        )

    def commit(self, reservation: Reservation) -> None:
        """Note that the reply of a reservation is stored.

        Raises:
            BadInput: there is no such reservation, or it was committed before.
        """
        with chain.exclusive(self._folder) as opened:
            charge = _charges(opened.entries).get(reservation.number)
            if charge is None or charge.committed:
                raise BadInput(f"reservation {reservation.number}: expected one that is open")
            opened.append("committed", {"reserved": reservation.number})

    def spent(self) -> Spent:
        """The balance now."""
        entries = self.entries()
        terms, charges = _terms(entries), _charges(entries)
        committed = [charge.mechanism for charge in charges.values() if charge.committed]
        return Spent(
            registry=self._folder.name,
            terms=terms,
            spent_epsilon=epsilon(committed, terms.delta),
            reserved_epsilon=epsilon(_mechanisms(charges), terms.delta),
        )

    def affords(self, mechanisms: Iterable[Mechanism]) -> bool:
        """Whether these, together with the whole history, stay within the cap. Nothing is charged or logged."""
        entries = self.entries()
        terms = _terms(entries)
        return _within([*_mechanisms(_charges(entries)), *mechanisms], terms)

    def charges(self) -> list[Charge]:
        """All charges in order."""
        return list(_charges(self.entries()).values())

    def run_epsilon(self, run: str) -> float:
        """Epsilon of one run's own charges, reserved or committed; 0 for a run that was never charged."""
        entries = self.entries()
        mechanisms = [charge.mechanism for charge in _charges(entries).values() if charge.run == run]
        return epsilon(mechanisms, _terms(entries).delta)

    def entries(self) -> list[dict[str, Any]]:
        """Every verified entry in order: charges, refusals, amendments, sealed crashes."""
        with chain.exclusive(self._folder) as opened:
            return opened.entries


def amend(folder: Path, *, registry: str, unit: Unit, epsilon_cap: float, delta: float) -> None:
    """Change a ledger's unit, cap or delta in a logged entry. What was spent stays spent.

    Raises:
        BadInput: there is no such ledger, nothing would change, or the unit would change after a charge.
        LedgerDamaged: the file does not verify.
    """
    place = folder / registry
    if not place.exists():
        raise BadInput(f"registry {registry}: it has no ledger yet")
    wanted = Terms(unit, epsilon_cap, delta)
    with chain.exclusive(place) as opened:
        before = _terms(opened.entries)
        if before == wanted:
            raise BadInput(f"registry {registry}: the ledger already has these terms")
        if before.unit != wanted.unit and _charges(opened.entries):
            raise BadInput(
                f"registry {registry}: unit: expected {before.unit.value}, got {wanted.unit.value}; it cannot change "
                "after the first charge, because what was spent per one unit does not bound the loss of the other"
            )
        opened.append("amended", {"before": asdict(before), **asdict(wanted)})


# --- reading entries -------------------------------------------------------------------------------------------------

_TOLERANCE = 1.0 + 1e-9
"""Rounding of sums, so that a plan calibrated to the cap is not refused for its last bit."""


def _within(mechanisms: list[Mechanism], terms: Terms) -> bool:
    return covered(mechanisms, terms.delta, terms.epsilon_cap * _TOLERANCE)


def _terms(entries: list[dict[str, Any]]) -> Terms:
    last = [entry for entry in entries if entry["event"] in {"created", "amended"}][-1]
    return Terms(Unit(last["unit"]), float(last["epsilon_cap"]), float(last["delta"]), last["relation"])


def _charges(entries: list[dict[str, Any]]) -> dict[int, Charge]:
    committed = {entry["reserved"] for entry in entries if entry["event"] == "committed"}
    return {
        entry["n"]: Charge(
            run=entry["run"],
            round=entry["round"],
            request=entry["request"],
            mechanism=Mechanism.from_dict(entry["mechanism"]),
            committed=entry["n"] in committed,
        )
        for entry in entries
        if entry["event"] == "reserved"
    }


def _mechanisms(charges: Mapping[int, Charge]) -> list[Mechanism]:
    return [charge.mechanism for charge in charges.values()]


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
