"""One ledger for many sites of a simulation: the same rules for each of them, and one line a round for all.

Each site has a balance of its own, under the same terms. A round's charge is one line of one chain
(`client/ledger/chain.py`): durable and anchored before anything is computed from a record, for a thousand sites as for
one. Which sites a line charges stands in it as bits. What a site may still spend is decided by `History`, as in its own
ledger: sites with equal balances share one, so that a round costs what it has different balances.

Guarantees, with `Ledger` as the reference (tests/client/ledger/test_shared.py):
- A site is refused in the very round in which a ledger of its own would refuse it; the refusal is logged and spends
  nothing.
- A charge counts from the moment its line is on disk; a crash after it keeps it.
- A line of another kind, or a list of other sites, is damage or bad input: nothing is charged.

A ledger of one site cannot be opened as one of many, nor the other way round. It serves one run, for in a simulation
ledgers lie in the run's folder. Deployed sites never share one.

# Shapes: S sites.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray

from client.config import NoisedEvaluation
from client.ledger import chain
from client.ledger.evaluation_budget import make_evaluation_mechanism
from client.ledger.events import (
    EVALUATION,
    TRAINING,
    ChargeCommitted,
    ChargeReserved,
    LedgerLine,
    Purpose,
    RunEarmarked,
    SharedLedgerCreated,
    SharedLedgerEvent,
    SitesEarmarked,
    SitesRefused,
    SitesReleased,
    SitesReserved,
    Terms,
    read_shared_line,
    write_facts,
)
from client.ledger.history import History
from client.ledger.ledger import covers_charge, covers_earmark, covers_one_evaluation
from common.privacy.accounting import Mechanism
from common.types import BadInput, LedgerDamaged, LedgerWitness

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class SharedReservation:
    """The charges of a round, durable.

    Attributes:
        number: number of their line; None where no site is charged.
        granted_S: the sites that are charged.
        refused_S: the sites whose budget does not cover it.
        answered_S: the sites that may not be asked: for a later round, another request of this round or this one too
            often they were charged before.
        witness: of the ledger with this line.
    """

    number: int | None
    granted_S: Mask
    refused_S: Mask
    answered_S: Mask
    witness: LedgerWitness


@final
class SharedLedger:
    """The ledger. Every method reads, verifies and locks its file, as those of `Ledger` do."""

    def __init__(self, place: Path, num_sites: int) -> None:
        """Args: place: folder of the chain; num_sites: S. Use `open`."""
        self._place, self._num_sites = place, num_sites
        self._balances: _Balances | None = None
        self._seen: tuple[int, str] = (-1, "")

    @classmethod
    def open(cls, place: Path, names: Sequence[str], terms: Terms) -> SharedLedger:
        """Returns the ledger of some sites, which is created the first time.

        Args:
            place: folder of the ledger.
            names: names of the sites, in the order of all masks.
            terms: the terms of each site's budget.

        Raises:
            BadInput: the ledger was created for other sites or under other terms.
            LedgerDamaged: the file does not verify.
        """
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
        wanted = SharedLedgerCreated(num_sites=len(names), names=digest, **terms.list_fields())
        chain.create(place, wanted.event, write_facts(wanted))
        ledger = cls(place, len(names))
        with chain.exclusive(place) as opened:
            if read_shared_line(opened.bodies[0]) != wanted:
                raise BadInput(f"{place}: expected the ledger of these {len(names)} sites and terms, got another one")
            ledger._read(opened)
        return ledger

    def earmark(
        self,
        mechanism: Mechanism,
        sites_S: Mask,
        *,
        run: str,
        rounds: int,
        before: Mechanism | None = None,
        evaluation_budget: NoisedEvaluation | None = None,
    ) -> Mask:
        """Holds the run's price at each of some sites that it does not exceed; returns the sites at which it is held.

        Args:
            mechanism: releases of all rounds of the run together.
            sites_S: the sites.
            run: id of the run.
            rounds: number of its rounds.
            before: the release before its first round; None without one.
            evaluation_budget: the part of each site's budget that is held for evaluations.
        """
        with chain.exclusive(self._place) as opened:
            balances = self._read(opened)
            known_S = balances.find_earmarked(run)
            wanted = RunEarmarked(run=run, mechanism=mechanism, rounds=rounds, before=before)
            held_S = balances.select(
                sites_S & ~known_S, lambda history: covers_earmark(history, wanted, evaluation_budget)
            )
            if held_S.any():
                bits = _pack(held_S)
                event = SitesEarmarked(run=run, mechanism=mechanism, rounds=rounds, sites=bits, before=before)
                self._append(opened, event)
            return held_S | (known_S & sites_S)

    def reserve(
        self,
        mechanism: Mechanism,
        sites_S: Mask,
        *,
        run: str,
        round: int,
        request: str,
        most_charges: int,
        allow_infinite: bool = False,
        evaluation_budget: NoisedEvaluation | None = None,
    ) -> SharedReservation:
        """Charges a mechanism to some sites before anything is computed from their records; durable when this returns.

        Args:
            mechanism: the worst that may be released at each of them.
            sites_S: the sites that are asked.
            run: id of the run that is charged.
            round: number of its round.
            request: digest of what the sites are asked.
            most_charges: so often one round may be charged to a site: once, and again after crashes.
            allow_infinite: whether the sites let a mechanism without noise pass.
            evaluation_budget: the part of each site's budget that is held for evaluations.
        """
        charge = ChargeReserved(run=run, round=round, request=request, mechanism=mechanism)

        def covers(history: History, again: bool) -> bool:
            noted = _note_round(history, charge, again)
            return covers_charge(noted, charge, evaluation_budget, allow_infinite=allow_infinite)

        with chain.exclusive(self._place) as opened:
            return self._reserve(opened, charge, sites_S, most_charges, covers)

    def reserve_evaluation(
        self,
        evaluation_budget: NoisedEvaluation,
        num_tasks: int,
        sites_S: Mask,
        *,
        run: str,
        round: int,
        request: str,
        most_charges: int,
        allow_infinite: bool = False,
    ) -> tuple[SharedReservation, Mechanism]:
        """Charges one evaluation to some sites, each to its part of its budget, as `Ledger.reserve_evaluation`.

        Args:
            evaluation_budget: the part of each site's budget that evaluations may spend.
            num_tasks: number of tasks that this one release evaluates.
            sites_S: the sites that are asked.
            run: id of the run that is charged.
            round: number of the round after which the evaluation takes place.
            request: digest of what the sites are asked.
            most_charges: so often the evaluation of one round may be charged to a site.
            allow_infinite: whether evaluations go on after a release without noise.
        """
        with chain.exclusive(self._place) as opened:
            terms = self._read(opened).histories[0].terms
            mechanism = make_evaluation_mechanism(evaluation_budget, terms, num_tasks)
            charge = ChargeReserved(run=run, round=round, request=request, mechanism=mechanism, purpose=EVALUATION)

            def covers(history: History, again: bool) -> bool:
                del again
                return covers_one_evaluation(evaluation_budget, history, mechanism, allow_infinite=allow_infinite)

            return self._reserve(opened, charge, sites_S, most_charges, covers), mechanism

    def _reserve(
        self,
        opened: chain.OpenChain,
        charge: ChargeReserved,
        sites_S: Mask,
        most_charges: int,
        covers: Callable[[History, bool], bool],
    ) -> SharedReservation:
        """Charges the sites whose balance covers it; `covers` is also told whether the round was charged before."""
        balances = self._read(opened)
        answered_S = sites_S & balances.find_answered(charge, most_charges)
        asked_S = sites_S & ~answered_S
        again_S = balances.is_charged_again(charge)
        granted_S = np.zeros_like(asked_S)
        for again in (False, True):
            some_S = asked_S & (again_S == again)
            granted_S |= balances.select(some_S, lambda history, again=again: covers(history, again))  # type: ignore[misc]
        refused_S = asked_S & ~granted_S
        number = None
        facts = charge.model_dump(include={"run", "round", "request"})
        facts |= {"mechanism": charge.mechanism}
        if charge.purpose != TRAINING:
            facts["purpose"] = charge.purpose
        if refused_S.any():
            self._append(opened, SitesRefused(**facts, sites=_pack(refused_S)))
        if granted_S.any():
            number = self._append(opened, SitesReserved(**facts, sites=_pack(granted_S)))
        return SharedReservation(number, granted_S, refused_S, answered_S, opened.make_witness())

    def make_durable(self) -> None:
        """Puts all lines on the disk, where a simulation leaves its other files to the operating system."""
        chain.make_durable(self._place)

    def commit(self, reservation: SharedReservation) -> None:
        """Notes that what a reservation paid for was handed over. A power cut may lose the note, and nothing else."""
        if reservation.number is None:
            return
        with chain.exclusive(self._place) as opened:
            self._read(opened)
            self._append(opened, ChargeCommitted(reserved=reservation.number), durable=False)

    def release(self, run: str) -> None:
        """Holds nothing for a run any more."""
        with chain.exclusive(self._place) as opened:
            if self._read(opened).find_earmarked(run).any():
                self._append(opened, SitesReleased(run=run))

    def compute_epsilons(self) -> list[float]:
        """Returns epsilon of everything that each site was charged; 0 for one that was never charged."""
        with chain.exclusive(self._place) as opened:
            balances = self._read(opened)
        epsilons = [history.compute_epsilon() if history.merged else 0.0 for history in balances.histories]
        return [epsilons[number] for number in balances.history_S.tolist()]

    def _append(self, opened: chain.OpenChain, event: SharedLedgerEvent, *, durable: bool = True) -> int:
        """Adds a line; the balances follow once it is on the disk."""
        number = opened.append(event.event, write_facts(event), durable=durable)
        self._read(opened)
        return number

    def _read(self, opened: chain.OpenChain) -> _Balances:
        """Returns the balances that the chain's lines state; only lines that are new are read."""
        count, (known, mac) = len(opened.bodies), self._seen
        if self._balances is None or known >= count or known < 0 or opened.get_mac(known) != mac:
            first = read_shared_line(opened.bodies[0])
            if not isinstance(first, SharedLedgerCreated) or first.num_sites != self._num_sites:
                raise LedgerDamaged(f"ledger {self._place.name}: expected one of {self._num_sites} sites")
            terms = Terms(first.unit, first.epsilon_cap, first.delta, first.relation, first.filter)
            self._balances, known = _Balances(terms, self._num_sites), 0
        for number in range(known + 1, count):
            self._balances.apply(number, read_shared_line(opened.bodies[number]))
        self._seen = (count - 1, opened.get_mac(count - 1))
        return self._balances


@dataclass
class _Charged:
    """The rounds of one purpose that sites were charged.

    Attributes:
        newest_S: the newest round that each site was charged; -1 for none.
        times_S: number of its charges.
        line_S: line of the newest of them; -1 for none.
        answered_S: line of its charge that was answered; -1 for none.
        requests: line -> what the sites were asked; only lines of newest rounds are ever compared.
    """

    newest_S: NDArray[np.int64]
    times_S: NDArray[np.int64]
    line_S: NDArray[np.int64]
    answered_S: NDArray[np.int64]
    requests: dict[int, str]

    @classmethod
    def of_nobody(cls, num_sites: int) -> _Charged:
        """Returns what is known before the first charge."""
        nothing = [np.full(num_sites, -1) for _ in range(3)]
        return cls(nothing[0], np.zeros(num_sites, np.int64), nothing[1], nothing[2], {})

    def note_charge(self, number: int, sites_S: Mask, round_: int, request: str) -> None:
        """Notes a charge.

        Args:
            number: number of its line.
            sites_S: the sites that are charged.
            round_: number of the round.
            request: digest of what they are asked.
        """
        again_S = self.newest_S == round_
        self.times_S[sites_S] = np.where(again_S[sites_S], self.times_S[sites_S], 0) + 1
        self.answered_S[sites_S & ~again_S] = -1
        self.newest_S[sites_S], self.line_S[sites_S] = round_, number
        known = {*np.unique(self.line_S).tolist(), *np.unique(self.answered_S).tolist()}
        self.requests = {line: each for line, each in self.requests.items() if line in known}
        self.requests[number] = request

    def is_answered(self, round_: int, request: str, most_charges: int) -> Mask:
        """Returns the sites that answered another request of this round, or were charged it too often.

        Args:
            round_: number of the round.
            request: digest of the request.
            most_charges: so often it may be charged.
        """
        same = np.array([number for number, each in self.requests.items() if each == request], np.int64)
        other_S = (self.answered_S >= 0) & ~np.isin(self.answered_S, same)
        found: Mask = (self.newest_S == round_) & (other_S | (self.times_S >= most_charges))
        return found


@final
class _Balances:
    """The spendings of each site, and what is held at it.

    Attributes:
        histories: the different balances.
        history_S: number of each site's.
    """

    def __init__(self, terms: Terms, num_sites: int) -> None:
        self.histories = [History(terms, {}, None, {})]
        self.history_S = np.zeros(num_sites, np.int64)
        self._asked: dict[Purpose, _Charged] = {
            purpose: _Charged.of_nobody(num_sites) for purpose in (TRAINING, EVALUATION)
        }
        self._earmarked: dict[str, Mask] = {}
        self._numbers = {_describe(self.histories[0]): 0}

    def find_earmarked(self, run: str) -> Mask:
        """Returns the sites at which a run is held that was joined and has not ended."""
        return self._earmarked.get(run, np.zeros(len(self.history_S), np.bool_))

    def select(self, sites_S: Mask, covers: Callable[[History], bool]) -> Mask:
        """Returns those of the sites whose balance passes a test, which is made once for equal balances."""
        passed_H = np.zeros(len(self.histories), np.bool_)
        for number in np.unique(self.history_S[sites_S]).tolist():
            passed_H[number] = covers(self.histories[number])
        selected: Mask = sites_S & passed_H[self.history_S]
        return selected

    def is_charged_again(self, charge: ChargeReserved) -> Mask:
        """Returns the sites that were charged this round for this purpose before."""
        again: Mask = self._asked[charge.purpose].newest_S == charge.round
        return again

    def find_answered(self, charge: ChargeReserved, most_charges: int) -> Mask:
        """Returns the sites that may not be asked a round; see `client.protocol.answer`, whose rules these are."""
        newest_S = np.max([asked.newest_S for asked in self._asked.values()], axis=0)
        own = self._asked[charge.purpose].is_answered(charge.round, charge.request, most_charges)
        found: Mask = (newest_S > charge.round) | own
        return found

    def apply(self, number: int, event: SharedLedgerEvent) -> None:
        """Follows one line.

        Args:
            number: number of the line.
            event: what it says.
        """
        match event:
            case SitesEarmarked():
                sites_S = _unpack(event.sites, len(self.history_S))
                held = RunEarmarked(run=event.run, mechanism=event.mechanism, rounds=event.rounds, before=event.before)
                self._earmarked[event.run] = self.find_earmarked(event.run) | sites_S
                self._move(sites_S, lambda history: history.extend([LedgerLine(number, 0.0, held)]))
            case SitesReserved():
                sites_S = _unpack(event.sites, len(self.history_S))
                charge = ChargeReserved(
                    run=event.run,
                    round=event.round,
                    request=event.request,
                    mechanism=event.mechanism,
                    purpose=event.purpose,
                )
                again_S = self.is_charged_again(charge)
                for again in (False, True):
                    self._move(
                        sites_S & (again_S == again),
                        lambda history, again=again: _note_round(history, charge, again).extend(  # type: ignore[misc]
                            [LedgerLine(number, 0.0, charge)]
                        ),
                    )
                self._asked[event.purpose].note_charge(number, sites_S, event.round, event.request)
            case ChargeCommitted():
                for asked in self._asked.values():
                    asked.answered_S[asked.line_S == event.reserved] = event.reserved
            case SitesReleased():
                self._earmarked.pop(event.run, None)
                self._move(np.ones(len(self.history_S), np.bool_), lambda history: replace(history, earmarks={}))

    def _move(self, sites_S: Mask, change: Callable[[History], History]) -> None:
        """Gives sites the balances that follow from theirs."""
        old_S = self.history_S[sites_S]
        follower_H = np.zeros(len(self.histories), np.int64)
        for number in np.unique(old_S).tolist():
            history = _forget_rounds(change(self.histories[number]))
            follower_H[number] = self._numbers.setdefault(_describe(history), len(self.histories))
            if follower_H[number] == len(self.histories):
                self.histories.append(history)
        self.history_S[sites_S] = follower_H[old_S]


def _note_round(history: History, charge: ChargeReserved, again: bool) -> History:
    """Returns a balance in which one of its charged rounds is that of a charge, where this was charged before."""
    held = history.earmarks.get(charge.run)
    if not again or held is None or charge.purpose != TRAINING or charge.round == 0:
        return history
    others = held.charged - {0}
    charged = (held.charged & {0}) | {charge.round, *range(1 - len(others), 0)}
    return replace(history, earmarks={**history.earmarks, charge.run: replace(held, charged=charged)})


def _forget_rounds(history: History) -> History:
    """Returns a balance without the numbers of its rounds, of which only the newest is ever asked for again.

    A price depends on how many there are: so sites that took part in as many rounds have equal balances. Whether the
    release before the first round was charged is kept, and so are evaluations, of which a part of the budget pays.
    """
    earmarks = {
        run: replace(held, charged=(held.charged & {0}) | frozenset(range(-len(held.charged - {0}), 0)))
        for run, held in history.earmarks.items()
    }
    evaluated = [charge for charge in history.charges.values() if charge.purpose == EVALUATION]
    charges = {
        -number: replace(charge, run="", round=0, request="", committed=False)
        for number, charge in enumerate(evaluated, start=1)
    }
    return History(history.terms, charges, None, history.merged, earmarks)


def _describe(history: History) -> object:
    """Returns what is equal for equal balances."""
    return tuple((history.merged or {}).items()), tuple(history.earmarks.items()), tuple(history.charges.items())


def _pack(sites_S: Mask) -> str:
    return np.packbits(sites_S).tobytes().hex()


def _unpack(bits: str, num_sites: int) -> Mask:
    packed = np.frombuffer(bytes.fromhex(bits), np.uint8)
    return np.unpackbits(packed, count=num_sites).astype(np.bool_)
