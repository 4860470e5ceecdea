"""The spending of a population, for ever: the rules on top of the keyed chain of `client/ledger/chain.py`.

A population is the people or records that one budget protects. All models, runs, rounds, tasks and processes that touch
it share one ledger, `<folder>/<population>/`; re-exported, extended or reordered data never reset it.

Rules:

* Open and verify features, reserve, train, store the reply, commit: what must fail costs nothing. A reservation counts
  from the moment it is on disk; there is no refund, so a crash anywhere leaves at least what may have left the site.
  Each `reserve` is a new charge: the caller resends a stored reply without asking here.
* The whole history is composed at once, reservations included; a charge beyond the cap is refused and logged.
* Unit, relation, delta and cap are fixed at creation. `amend` changes them in a logged line and resets nothing. The
  unit can change only while nothing is charged: what was spent per example says nothing about patients, and removing
  one example changes a patient's clipped gradient by up to twice the norm: neither promise follows from the other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from client.config import NoisedEvaluation
from client.ledger import chain
from client.ledger.evaluation_budget import covers_evaluation, list_unspent, make_evaluation_mechanism
from client.ledger.events import (
    EVALUATION,
    TRAINING,
    ChargeCommitted,
    ChargeRefused,
    ChargeReserved,
    EarmarkReleased,
    LedgerCreated,
    LedgerEvent,
    LedgerLine,
    LedgerRecovered,
    RunEarmarked,
    Terms,
    TermsAmended,
    read_lines,
    write_facts,
)
from client.ledger.history import Charge, History
from common.files import write_atomic
from common.privacy.accounting import Mechanism, round_up
from common.recent import Recent
from common.types import BadInput, BudgetExhausted, FilterKind, LedgerDamaged, LedgerWitness, Unit


@dataclass(frozen=True)
class Reservation:
    """A durable charge.

    Attributes:
        number: number of its line.
        witness: of the ledger with this line, for the coordinator.
    """

    number: int
    witness: LedgerWitness


@dataclass(frozen=True)
class Spent:
    """A population's balance. Epsilons do not add up: each is composed from the charges it names.

    Attributes:
        population: id of the population whose balance this is.
        terms: unit, cap, delta and relation.
        spent_epsilon: epsilon of the committed charges.
        reserved_epsilon: epsilon of everything that may have left: committed and reserved charges.
    """

    population: str
    terms: Terms
    spent_epsilon: float
    reserved_epsilon: float

    @property
    def left_epsilon(self) -> float:
        """Cap minus reserved, never below 0; a charge's own epsilon may be larger and still be covered."""
        return max(0.0, self.terms.epsilon_cap - self.reserved_epsilon)


@dataclass(frozen=True)
class Ledger:
    """One population's ledger. Every method reads, verifies and locks the file anew: other processes may write too.
    Only in `hold`, where they cannot, it was verified before.

    Each raises LedgerDamaged if the file does not verify; nothing is then written.
    """

    _folder: Path

    @property
    def folder(self) -> Path:
        """Folder of its files; what is known about it from elsewhere lies beside the folder."""
        return self._folder

    @property
    def population(self) -> str:
        """Id of the population."""
        return self._folder.name

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        population: str,
        unit: Unit,
        epsilon_cap: float,
        delta: float,
        filter: FilterKind | None = None,
    ) -> Ledger:
        """Returns the ledger of a population, which is created the first time.

        Args:
            folder: folder of all ledgers.
            population: id of the population (key `registry` of the site file).
            unit: what the budget protects.
            epsilon_cap: all that may ever be spent.
            delta: the delta of the cap.
            filter: kind of the privacy filter; None: the first charge fixes it.

        Raises:
            BadInput: the ledger was created, or last amended, with another unit, cap or delta.
            LedgerDamaged: the file does not verify.
        """
        wanted = Terms(unit, epsilon_cap, delta, filter=filter)
        place = folder / population
        if cls.find(folder, population) is None:
            created = LedgerCreated(registry=population, **wanted.list_fields())
            chain.create(place, created.event, write_facts(created))
            write_atomic(get_marker(place), b"")
        with chain.exclusive(place) as opened:
            _refuse_differences(_read_history(opened).terms, wanted, population)
        return cls(place)

    @classmethod
    def find(cls, folder: Path, population: str) -> Ledger | None:
        """Returns the ledger of a population as it is, whatever a site file says now; None where there never was one.

        Raises:
            LedgerDamaged: there was one, and its folder is gone.
        """
        place = folder / population
        # The marker first: it is written after the folder, so that one being created is never taken for a lost one.
        marked = get_marker(place).exists()
        if not place.exists():
            if marked:
                raise LedgerDamaged(f"ledger {population}: its folder is missing")
            return None
        if not marked:
            write_atomic(get_marker(place), b"")
        return cls(place)

    def reserve(
        self,
        mechanism: Mechanism,
        *,
        run: str,
        round: int,
        request: str,
        allow_infinite: bool = False,
        evaluation_budget: NoisedEvaluation | None = None,
    ) -> Reservation:
        """Charges a mechanism before anything is computed from records; durable when this returns.

        Args:
            mechanism: the worst that may be released.
            run: id of the run that is charged.
            round: number of its round.
            request: digest of the request, for the log only.
            allow_infinite: whether the site lets a mechanism without noise pass; epsilon is infinite from then on.
            evaluation_budget: the part of the budget that is held for evaluations: what is unspent of it stays
                affordable.

        Returns:
            The reservation, to be committed once the reply is stored.

        Raises:
            BudgetExhausted: history, charge and the unspent part together exceed the cap; the refusal is logged,
                nothing is spent.
        """
        charge = ChargeReserved(run=run, round=round, request=request, mechanism=mechanism, purpose=TRAINING)
        with chain.exclusive(self._folder) as opened:
            history = _read_history(opened)
            if covers_charge(history, charge, evaluation_budget, allow_infinite=allow_infinite):
                return _reserve(opened, charge)
            _append(opened, _refuse(charge))
        held = _list_held(history, charge, evaluation_budget)
        share, terms = history.compute_share([mechanism, *held]), history.terms
        beside = " and what is held for evaluations and joined runs" if held else ""
        raise BudgetExhausted(
            f"registry {self._folder.name}: with this charge{beside} {round_up(100.0 * share, 1)} % of the budget of "
            f"epsilon {terms.epsilon_cap} at delta {terms.delta} would be used{history.explain_filter(mechanism)}"
        )

    def reserve_evaluation(
        self,
        evaluation_budget: NoisedEvaluation,
        num_tasks: int,
        *,
        run: str,
        round: int,
        request: str,
        allow_infinite: bool = False,
    ) -> tuple[Reservation, Mechanism]:
        """Charges one evaluation to its part of the budget before anything is computed from held-out records.

        Args:
            evaluation_budget: the part of the budget that evaluations may spend, from the site's file.
            num_tasks: number of tasks that this one release evaluates.
            run: id of the run that is charged.
            round: number of the round after which the evaluation takes place.
            request: digest of the request, for the log only.
            allow_infinite: whether evaluations go on after a release without noise.

        Returns:
            The reservation, and the mechanism that was charged.

        Raises:
            BudgetExhausted: the part, or the cap, does not cover it; the refusal is logged, nothing is spent.
        """
        with chain.exclusive(self._folder) as opened:
            history = _read_history(opened)
            mechanism = make_evaluation_mechanism(evaluation_budget, history.terms, num_tasks)
            charge = ChargeReserved(run=run, round=round, request=request, mechanism=mechanism, purpose=EVALUATION)
            if covers_one_evaluation(evaluation_budget, history, mechanism, allow_infinite=allow_infinite):
                return _reserve(opened, charge), mechanism
            _append(opened, _refuse(charge))
        raise BudgetExhausted(
            f"registry {self._folder.name}: one more evaluation would exceed its share of {evaluation_budget.share:g} "
            "of the budget"
        )

    def commit(self, reservation: Reservation) -> None:
        """Notes that the reply of a reservation is stored.

        Raises:
            BadInput: there is no such reservation, or it was committed before.
        """
        with chain.exclusive(self._folder) as opened:
            charge = _read_history(opened).charges.get(reservation.number)
            if charge is None or charge.committed:
                raise BadInput(f"reservation {reservation.number}: expected one that is open")
            # Not flushed: if it is lost, the charge counts as reserved, which is the same price.
            _append(opened, ChargeCommitted(reserved=reservation.number), durable=False)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keeps others from it: what this thread asks meanwhile is read and verified once, and is of one moment.

        Not for long: other sites of the population and the site's staff wait.
        """
        with chain.exclusive(self._folder):
            yield

    def identify_files(self) -> tuple[int, ...]:
        """Returns numbers that change where the ledger's folder is replaced or restored; charges do not change them."""
        return chain.identify_files(self._folder)

    def make_witness(self) -> LedgerWitness:
        """Returns a witness of the ledger as it is on disk now."""
        with chain.exclusive(self._folder) as opened:
            return opened.make_witness()

    def compare(self, witness: LedgerWitness) -> chain.Standing:
        """Returns how the ledger stands to a witness; one of a chain that it replaced at a recovery is held."""
        with chain.exclusive(self._folder) as opened:
            [first] = read_lines(opened.bodies[:1])
            replaced = first.event.replaced if isinstance(first.event, LedgerRecovered) else ()
            return "held" if witness.chain in replaced else opened.compare(witness)

    def spent(self) -> Spent:
        """Returns the balance now."""
        history = self.history()
        return Spent(
            population=self._folder.name,
            terms=history.terms,
            spent_epsilon=history.compute_epsilon(committed_only=True),
            reserved_epsilon=history.compute_epsilon(),
        )

    def affords(self, mechanisms: Iterable[Mechanism], evaluation_budget: NoisedEvaluation | None = None) -> bool:
        """Returns True where these, the whole history and everything that is held stay within the cap.

        Nothing is charged or logged.
        """
        history = self.history()
        held = [*list_unspent(evaluation_budget, history), *history.list_earmarked()]
        return history.is_within_cap([*mechanisms, *held])

    def earmark(
        self,
        mechanism: Mechanism,
        *,
        run: str,
        rounds: int,
        before: Mechanism | None = None,
        evaluation_budget: NoisedEvaluation | None = None,
    ) -> None:
        """Holds what is left of a run's price from now on; once, however often the run is joined.

        Args:
            mechanism: releases of all rounds of the run together.
            run: id of the run.
            rounds: number of its rounds.
            before: the release before its first round; None without one.
            evaluation_budget: the part of the budget that is held for evaluations.

        Raises:
            BudgetExhausted: the history, the run and everything else that is held exceed the cap; nothing is held.
        """
        with chain.exclusive(self._folder) as opened:
            history = _read_history(opened)
            wanted = RunEarmarked(run=run, mechanism=mechanism, rounds=rounds, before=before)
            after = history.extend([LedgerLine(len(opened.bodies), 0.0, wanted)])
            if not covers_earmark(history, wanted, evaluation_budget):
                held = _list_held_after(history, wanted, evaluation_budget)
                share = 100.0 * history.compute_share(held)
                raise BudgetExhausted(
                    f"the run's whole price exceeds what the registry has left: {round_up(share, 1)} % of the budget "
                    f"of epsilon {history.terms.epsilon_cap} would be used or held{history.explain_filter(mechanism)}"
                )
            if history.earmarks.get(run) != after.earmarks[run]:
                _append(opened, wanted)

    def release(self, run: str) -> bool:
        """Returns True where something was held for a run; it is not any more."""
        with chain.exclusive(self._folder) as opened:
            held = run in _read_history(opened).earmarks
            if held:
                _append(opened, EarmarkReleased(run=run))
        return held

    def charges(self) -> list[Charge]:
        """Returns all charges in order."""
        return list(self.history().charges.values())

    def find_cut_off(self, mechanism: Mechanism, *, run: str, round: int, request: str) -> Reservation | None:
        """Returns the charge of a request that is not known to be answered; None where there is none.

        Args:
            mechanism: what was charged.
            run: id of the run.
            round: its round.
            request: digest of the request.
        """
        wanted = (mechanism, run, round, request, False)
        with chain.exclusive(self._folder) as opened:
            for number, each in _read_history(opened).charges.items():
                if (each.mechanism, each.run, each.round, each.request, each.committed) == wanted:
                    return Reservation(number, opened.make_witness())
        return None

    def compute_run_epsilon(self, run: str) -> float:
        """Returns epsilon of one run's own charges, reserved or committed; 0 for a run that was never charged."""
        return self.history().compute_run_epsilon(run)

    def history(self) -> History:
        """Returns terms and charges, verified now."""
        with chain.exclusive(self._folder) as opened:
            return _read_history(opened)

    def lines(self) -> list[LedgerLine]:
        """Returns every line in order, verified now: charges, refusals, amendments, removed torn lines."""
        with chain.exclusive(self._folder) as opened:
            bodies = list(opened.bodies)
        return read_lines(bodies)


def covers_charge(
    history: History,
    charge: ChargeReserved,
    evaluation_budget: NoisedEvaluation | None = None,
    *,
    allow_infinite: bool = False,
) -> bool:
    """Returns whether a balance covers a charge beside everything that is held.

    Args:
        history: the balance.
        charge: the charge.
        evaluation_budget: the part of the budget that is held for evaluations.
        allow_infinite: whether the site lets a mechanism without noise pass.
    """
    held = _list_held(history, charge, evaluation_budget)
    return history.is_within_cap([charge.mechanism, *held]) or (allow_infinite and charge.mechanism.kind == "none")


def covers_one_evaluation(
    evaluation_budget: NoisedEvaluation, history: History, mechanism: Mechanism, *, allow_infinite: bool = False
) -> bool:
    """Returns whether a balance, and the part of it that evaluations may spend, cover one more evaluation.

    Args:
        evaluation_budget: the part of the budget that evaluations may spend.
        history: the balance.
        mechanism: the evaluation.
        allow_infinite: whether evaluations go on after a release without noise.
    """
    lost = allow_infinite and history.compute_epsilon() == math.inf
    covered = covers_evaluation(evaluation_budget, history, mechanism)
    return covered and (lost or history.is_within_cap([mechanism, *history.list_earmarked()]))


def covers_earmark(history: History, wanted: RunEarmarked, evaluation_budget: NoisedEvaluation | None = None) -> bool:
    """Returns whether a balance covers what is left of a run's price beside everything else that is held.

    Args:
        history: the balance.
        wanted: the run.
        evaluation_budget: the part of the budget that is held for evaluations.
    """
    return history.is_within_cap(_list_held_after(history, wanted, evaluation_budget))


def _list_held(history: History, charge: ChargeReserved, evaluation_budget: NoisedEvaluation | None) -> list[Mechanism]:
    return [*list_unspent(evaluation_budget, history), *history.list_earmarked(charge.run, charge.round)]


def _list_held_after(
    history: History, wanted: RunEarmarked, evaluation_budget: NoisedEvaluation | None
) -> list[Mechanism]:
    after = history.extend([LedgerLine(0, 0.0, wanted)])
    # Runs first: where nothing was charged yet, the first of these fixes the filter.
    return [*after.list_earmarked(), *list_unspent(evaluation_budget, history)]


def amend(
    folder: Path,
    *,
    population: str,
    unit: Unit,
    epsilon_cap: float,
    delta: float,
    filter: FilterKind | None = None,
    reason: str = "",
) -> None:
    """Changes a ledger's unit, cap or delta in a logged line. What was spent stays spent.

    Args:
        folder: folder of all ledgers.
        population: id of the population.
        unit: what the budget protects from now on.
        epsilon_cap: all that may ever be spent from now on.
        delta: the delta of the new cap.
        filter: kind of the privacy filter from now on.
        reason: why the terms change, for the log.

    Raises:
        BadInput: there is no such ledger, nothing would change, or the unit would change after a charge.
        LedgerDamaged: the file does not verify.
    """
    if Ledger.find(folder, population) is None:
        raise BadInput(f"registry {population}: it has no ledger yet")
    wanted = Terms(unit, epsilon_cap, delta, filter=filter)
    with chain.exclusive(folder / population) as opened:
        history = _read_history(opened)
        before = history.terms
        if before == wanted:
            raise BadInput(f"registry {population}: the ledger already has these terms")
        if before.unit != wanted.unit and (history.charges or history.assumed):
            raise BadInput(
                f"registry {population}: unit: expected {before.unit.value}, got {wanted.unit.value}; it cannot change "
                "after the first charge, because what was spent per one unit does not bound the loss of the other"
            )
        _append(opened, TermsAmended(before=before, **wanted.list_fields(), reason=reason))


_HISTORIES = Recent[tuple[int, str, History]](2**17)
"""HMAC of a chain's first line -> number and HMAC of a later line, and the history up to it; up to so many lines."""


def _read_history(opened: chain.OpenChain) -> History:
    """Returns the history that a chain's lines state; only lines that are new to this process are read."""
    start, count = opened.get_mac(0), len(opened.bodies)
    known = _HISTORIES.take(start)
    if known is None or known[0] >= count or opened.get_mac(known[0]) != known[1]:
        history = History.of(read_lines(opened.bodies))
    elif known[0] < count - 1:
        history = known[2].extend(read_lines(opened.bodies[known[0] + 1 :]))
    else:
        history = known[2]
    _keep_history(opened, history)
    return history


def _keep_history(opened: chain.OpenChain, history: History) -> None:
    """Remembers the history of all of a chain's lines."""
    count = len(opened.bodies)
    _HISTORIES.keep(opened.get_mac(0), (count - 1, opened.get_mac(count - 1), history), count)


def _append(opened: chain.OpenChain, event: LedgerEvent, *, durable: bool = True) -> int:
    """Adds a line; the history follows it once it is on the disk."""
    history = _read_history(opened)
    number = opened.append(event.event, write_facts(event), durable=durable)
    _keep_history(opened, history.extend([LedgerLine(number, time.time(), event)]))
    return number


def _reserve(opened: chain.OpenChain, charge: ChargeReserved) -> Reservation:
    return Reservation(_append(opened, charge), opened.make_witness())


def _refuse(charge: ChargeReserved) -> ChargeRefused:
    return ChargeRefused(
        run=charge.run,
        round=charge.round,
        request=charge.request,
        mechanism=charge.mechanism,
        purpose=charge.purpose,
    )


def get_marker(place: Path) -> Path:
    """Returns the file beside a ledger's folder that says there is, or was, one."""
    return place.with_name(f".{place.name}.created")


def _refuse_differences(ledger: Terms, wanted: Terms, population: str) -> None:
    for name, before, now in (
        ("unit", ledger.unit.value, wanted.unit.value),
        ("budget.epsilon", ledger.epsilon_cap, wanted.epsilon_cap),
        ("budget.delta", ledger.delta, wanted.delta),
        ("budget.filter", ledger.filter, wanted.filter),
    ):
        if before != now:
            raise BadInput(
                f"{name}: the ledger of registry {population} says {before}, the site file {now}; changing it must be "
                "a logged amendment of the ledger"
            )
