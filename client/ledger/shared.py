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

from client.ledger import chain
from client.ledger.events import (
    ChargeCommitted,
    ChargeReserved,
    LedgerLine,
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
from client.ledger.history import Earmark, History
from client.ledger.ledger import covers_charge, covers_earmark
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

    def earmark(self, mechanism: Mechanism, *, run: str, rounds: int, allow_infinite: bool = False) -> Mask:
        """Holds the run's price at each site that it does not exceed; returns the sites at which it is held.

        Args:
            mechanism: releases of all rounds of the run together.
            run: id of the run.
            rounds: number of its rounds.
            allow_infinite: whether sites let a run without noise pass, for which nothing is held.
        """
        everyone = np.ones(self._num_sites, np.bool_)
        if allow_infinite and mechanism.kind == "none":
            return everyone
        with chain.exclusive(self._place) as opened:
            balances = self._read(opened)
            if balances.is_earmarked(run):
                return balances.earmarked_S.copy()
            event = RunEarmarked(run=run, mechanism=mechanism, rounds=rounds)
            held_S = balances.select(everyone, lambda history: covers_earmark(history, event))
            bits = _pack(held_S)
            self._append(opened, SitesEarmarked(run=run, mechanism=mechanism, rounds=rounds, sites=bits))
        return held_S

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
        """
        charge = ChargeReserved(run=run, round=round, request=request, mechanism=mechanism)
        with chain.exclusive(self._place) as opened:
            balances = self._read(opened)
            answered_S = sites_S & balances.find_answered(round, request, most_charges)
            asked_S = sites_S & ~answered_S
            again_S = balances.newest_S == round
            granted_S = np.zeros_like(asked_S)
            for again in (False, True):
                some_S = asked_S & (again_S == again)
                granted_S |= balances.select(
                    some_S,
                    lambda history, again=again: covers_charge(  # type: ignore[misc]
                        _note_round(history, charge, again), charge, allow_infinite=allow_infinite
                    ),
                )
            refused_S = asked_S & ~granted_S
            number = None
            if refused_S.any():
                bits = _pack(refused_S)
                refused = SitesRefused(run=run, round=round, request=request, mechanism=mechanism, sites=bits)
                self._append(opened, refused)
            if granted_S.any():
                bits = _pack(granted_S)
                granted = SitesReserved(run=run, round=round, request=request, mechanism=mechanism, sites=bits)
                number = self._append(opened, granted)
            return SharedReservation(number, granted_S, refused_S, answered_S, opened.make_witness())

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
            if self._read(opened).is_earmarked(run):
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


@final
class _Balances:
    """The spendings of each site, and what is held at it.

    Attributes:
        histories: the different balances.
        history_S: number of each site's.
        newest_S: the newest round that each site was charged; 0 for none.
        earmarked_S: the sites at which the run is held.
    """

    def __init__(self, terms: Terms, num_sites: int) -> None:
        self.histories = [History(terms, {}, None, {})]
        self.history_S = np.zeros(num_sites, np.int64)
        self.newest_S = np.zeros(num_sites, np.int64)
        self.earmarked_S = np.zeros(num_sites, np.bool_)
        self._numbers = {_describe(self.histories[0]): 0}
        self._times_S = np.zeros(num_sites, np.int64)
        self._line_S = np.full(num_sites, -1)
        self._answered_S = np.full(num_sites, -1)
        self._requests: dict[int, str] = {}
        self._runs: set[str] = set()

    def is_earmarked(self, run: str) -> bool:
        """Returns whether the run was joined and has not ended."""
        return run in self._runs

    def select(self, sites_S: Mask, covers: Callable[[History], bool]) -> Mask:
        """Returns those of the sites whose balance passes a test, which is made once for equal balances."""
        passed_H = np.zeros(len(self.histories), np.bool_)
        for number in np.unique(self.history_S[sites_S]).tolist():
            passed_H[number] = covers(self.histories[number])
        selected: Mask = sites_S & passed_H[self.history_S]
        return selected

    def find_answered(self, round_: int, request: str, most_charges: int) -> Mask:
        """Returns the sites that may not be asked a round; see `client.protocol.answer`, whose rules these are.

        Args:
            round_: number of the round.
            request: digest of the request.
            most_charges: so often it may be charged.
        """
        this_S = self.newest_S == round_
        same = np.array([number for number, each in self._requests.items() if each == request], np.int64)
        other_S = (self._answered_S >= 0) & ~np.isin(self._answered_S, same)
        found: Mask = (self.newest_S > round_) | (this_S & (other_S | (self._times_S >= most_charges)))
        return found

    def apply(self, number: int, event: SharedLedgerEvent) -> None:
        """Follows one line.

        Args:
            number: number of the line.
            event: what it says.
        """
        match event:
            case SitesEarmarked():
                sites_S, self._runs = _unpack(event.sites, len(self.history_S)), self._runs | {event.run}
                held = RunEarmarked(run=event.run, mechanism=event.mechanism, rounds=event.rounds)
                self.earmarked_S |= sites_S
                self._move(sites_S, lambda history: history.extend([LedgerLine(number, 0.0, held)]))
            case SitesReserved():
                sites_S = _unpack(event.sites, len(self.history_S))
                charge = ChargeReserved(
                    run=event.run, round=event.round, request=event.request, mechanism=event.mechanism
                )
                again_S = self.newest_S == event.round
                for again in (False, True):
                    self._move(
                        sites_S & (again_S == again),
                        lambda history, again=again: _note_round(history, charge, again).extend(  # type: ignore[misc]
                            [LedgerLine(number, 0.0, charge)]
                        ),
                    )
                self._times_S[sites_S] = np.where(again_S[sites_S], self._times_S[sites_S], 0) + 1
                self._answered_S[sites_S & ~again_S] = -1
                self.newest_S[sites_S], self._line_S[sites_S] = event.round, number
                # Only lines of the newest round are ever compared.
                known = {*np.unique(self._line_S).tolist(), *np.unique(self._answered_S).tolist()}
                self._requests = {line: each for line, each in self._requests.items() if line in known}
                self._requests[number] = event.request
            case ChargeCommitted():
                self._answered_S[self._line_S == event.reserved] = event.reserved
            case SitesReleased():
                self._runs.discard(event.run)
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
    if not again or held is None:
        return history
    charged = frozenset([charge.round, *range(1 - len(held.charged), 0)])
    return replace(history, earmarks={**history.earmarks, charge.run: replace(held, charged=charged)})


def _forget_rounds(history: History) -> History:
    """Returns a balance without the numbers of its rounds, of which only the newest is ever asked for again.

    A price depends on how many there are: so sites that took part in as many rounds have equal balances.
    """
    earmarks = {
        run: Earmark(held.mechanism, held.rounds, frozenset(range(-len(held.charged), 0)))
        for run, held in history.earmarks.items()
    }
    return History(history.terms, {}, None, history.merged, earmarks)


def _describe(history: History) -> object:
    """Returns what is equal for equal balances."""
    return tuple((history.merged or {}).items()), tuple(history.earmarks.items())


def _pack(sites_S: Mask) -> str:
    return np.packbits(sites_S).tobytes().hex()


def _unpack(bits: str, num_sites: int) -> Mask:
    packed = np.frombuffer(bytes.fromhex(bits), np.uint8)
    return np.unpackbits(packed, count=num_sites).astype(np.bool_)
