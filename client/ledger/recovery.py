"""The explicit, logged way out of a ledger that is damaged or an older copy of itself.

It never makes the registry look less spent than it may be.

What still verifies is kept for the record; the damaged files are kept aside under a dated name; a new keyed chain
begins with an entry that says so. What may have left before is then one of:

* By default a pair (epsilon, delta): the ledger never let the history exceed its cap, so the whole cap, the largest any
  legible line or the site file names, is spent. Pairs add up with what follows, deltas too (see `History`): more
  can be released only after an amendment raises the cap and delta. The officer may state a larger epsilon only.
* The mechanism of a whole run that the officer states, counted on top of what verified. It is accepted only if both
  together cost at least that cap. It composes exactly: an amendment of the cap alone then allows more.

Where a release without noise may have been among the lost entries, epsilon is infinite for ever.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from client.ledger import chain
from client.ledger.events import (
    ChargeCommitted,
    ChargeReserved,
    LedgerCreated,
    LedgerEvent,
    LedgerLine,
    LedgerRecovered,
    LossAssumed,
    OriginalLine,
    Terms,
    read_lines,
    write_facts,
)
from client.ledger.history import History
from client.ledger.ledger import Ledger, get_marker
from client.ledger.older_copy import read_claims, remove_claims
from common.files import private_folder, write_atomic
from common.privacy.accounting import Mechanism, round_up
from common.types import BadInput, LedgerDamaged, LedgerWitness

RECOVERED_RUN = "stated-at-recovery"
"""The run under which a stated mechanism is charged."""


@dataclass(frozen=True)
class Recovery:
    """The result of a recovery.

    Attributes:
        seen: the damage, in one sentence.
        num_kept: number of charges that still verified.
        num_damaged: number of legible lines that did not.
        aside: folder of the damaged files; None where the whole folder was gone.
        epsilon: what the population counts as having spent, at the terms' delta.
    """

    seen: str
    num_kept: int
    num_damaged: int
    aside: Path | None
    epsilon: float


def recover(
    folder: Path,
    population: str,
    terms: Terms,
    *,
    reason: str,
    noiseless_possible: bool,
    was_used: bool,
    behind: str | None = None,
    assume_epsilon: float | None = None,
    assume_mechanism: Mechanism | None = None,
) -> Recovery:
    """Replaces a damaged ledger by one that counts the worst case as spent.

    Args:
        folder: folder of all ledgers.
        population: id of the population.
        terms: terms that the site file states now.
        reason: why the ledger is replaced, for the log.
        noiseless_possible: True where the site allows releases without noise, so that the lost part may hold one.
        was_used: True where the site holds replies, so that a ledger which is wholly absent is a lost one.
        behind: why a ledger that verifies is an older copy, in one sentence; None where nothing says so.
        assume_epsilon: epsilon to count as spent, at least the cap; None for the cap.
        assume_mechanism: mechanism to count as released beside what verifies; both together must cost at least the cap.

    Returns:
        What was kept and what counts as spent now.

    Raises:
        BadInput: the ledger is not damaged, there never was one, or less than the worst case is stated.
    """
    place = folder / population
    if place.is_symlink() and not place.exists():
        raise BadInput(
            f"{place}: the ledger is a link to {place.readlink()}, which is not there; if its disk is not mounted, "
            "mount it; if it is lost, remove the link and recover again"
        )
    seen = _describe_damage(folder, population, was_used, behind)
    bodies, legible = chain.read_verifiable(place), chain.read_legible(place)
    worst = _find_worst_terms(terms, legible)
    noiseless = noiseless_possible or any(map(_is_noiseless, legible))
    kept = _renumber_kept(read_lines(bodies))
    assumption = _make_assumption(worst, kept, noiseless, assume_epsilon, assume_mechanism)
    aside = _find_free_name(place) if place.exists() else None
    recovered = LedgerRecovered(
        registry=population,
        **terms.list_fields(),
        reason=reason,
        seen=seen,
        kept_aside=None if aside is None else aside.name,
        replaced=_list_replaced(legible, read_claims(place)),
    )
    write_atomic(get_marker(private_folder(folder) / population), b"")  # From here on a missing folder means damage.
    events = [recovered, *kept, assumption]
    chain.replace(place, aside or place, [(event.event, write_facts(event)) for event in events])
    remove_claims(place)
    num_kept = sum(isinstance(event, ChargeReserved) for event in kept)
    spent = Ledger(place).spent().reserved_epsilon
    return Recovery(seen, num_kept, len(legible) - len(bodies), aside, spent)


def _list_replaced(legible: list[dict[str, Any]], claims: list[LedgerWitness]) -> tuple[str, ...]:
    """Returns the names of the damaged chain, of those that it replaced, and of those that coordinators claimed."""
    names = [legible[0].get("mac")] if legible else []
    names += [name for values in legible if values.get("event") == "recovered" for name in values.get("replaced", [])]
    names += [claim.chain for claim in claims]
    return tuple(dict.fromkeys(name for name in names if isinstance(name, str)))


def _find_free_name(place: Path) -> Path:
    """Returns a dated name beside the ledger; a population's own id holds no dot."""
    dated = place.name + time.strftime(".damaged-%Y%m%d-%H%M%S", time.gmtime())
    names = itertools.chain([dated], (f"{dated}-{number}" for number in itertools.count(2)))
    return next(path for path in map(place.with_name, names) if not path.exists())


def _describe_damage(folder: Path, population: str, was_used: bool, behind: str | None) -> str:
    try:
        ledger = Ledger.find(folder, population)
        if ledger is not None:
            ledger.lines()
    except LedgerDamaged as error:
        return str(error)
    if ledger is not None and behind is not None:
        return behind
    if ledger is not None:
        raise BadInput(f"registry {population}: the ledger verifies; there is nothing to recover")
    if not was_used:
        raise BadInput(f"registry {population}: it never had a ledger; there is nothing to recover")
    return f"ledger {population}: it is missing in {folder}, at a site that has answered before"


def _find_worst_terms(terms: Terms, legible: list[dict[str, Any]]) -> Terms:
    """Returns the terms with the largest cap and delta that the site file or a line names, verified or not."""
    caps, deltas = [terms.epsilon_cap], [terms.delta]
    for values in legible:
        for known, name in ((caps, "epsilon_cap"), (deltas, "delta")):
            value = values.get(name)
            if isinstance(value, int | float) and 0.0 < value < (math.inf if name == "epsilon_cap" else 1.0):
                known.append(float(value))
        bound = values.get("epsilon")
        if values.get("event") == "assumed" and isinstance(bound, int | float) and 0.0 < bound < math.inf:
            caps.append(float(bound))
    return replace(terms, epsilon_cap=max(caps), delta=max(deltas))


def _is_noiseless(values: dict[str, Any]) -> bool:
    mechanism = values.get("mechanism")
    without_noise = (
        values.get("event") == "reserved" and isinstance(mechanism, dict) and mechanism.get("kind") == "none"
    )
    return without_noise or (values.get("event") == "assumed" and values.get("epsilon") is None)


def _renumber_kept(lines: list[LedgerLine]) -> list[LedgerEvent]:
    """Returns what verified, to be written again; numbered anew, because the new chain begins with the recovery."""
    kept: list[LedgerEvent] = []
    numbers: dict[int, int] = {}
    for line in lines:
        event = line.event
        if not isinstance(event, ChargeReserved | ChargeCommitted | LossAssumed):
            continue
        changes: dict[str, Any] = {"original": OriginalLine(n=line.number, time=line.time)}
        if isinstance(event, ChargeCommitted):
            changes["reserved"] = numbers[event.reserved]
        numbers[line.number] = len(kept) + 1
        kept.append(event.model_copy(update=changes))
    return kept


def _make_assumption(
    worst: Terms,
    kept: list[LedgerEvent],
    noiseless: bool,
    stated_epsilon: float | None,
    stated: Mechanism | None,
) -> LedgerEvent:
    """Returns the event that is written after what verified, for what may have been lost."""
    if stated_epsilon is not None and stated is not None:
        raise BadInput("expected --assume-epsilon or --assume-run, got both")
    if stated is not None and not noiseless:
        events = [LedgerCreated(registry="", **worst.list_fields()), *kept]
        lines = [LedgerLine(number, 0.0, event) for number, event in enumerate(events)]
        total = History.of(lines).compute_epsilon([stated])
        if total < worst.epsilon_cap:
            raise BadInput(
                f"--assume-run: expected one that brings what verifies to at least the whole cap of "
                f"{worst.epsilon_cap}, got {round_up(total)}"
            )
        return ChargeReserved(run=RECOVERED_RUN, round=0, request="", mechanism=stated)
    bound = worst.epsilon_cap if stated_epsilon is None else stated_epsilon
    if not bound >= worst.epsilon_cap:
        raise BadInput(f"--assume-epsilon: expected at least the whole cap of {worst.epsilon_cap}, got {bound}")
    unbounded = noiseless or bound == math.inf
    return LossAssumed(epsilon=None if unbounded else bound, delta=worst.delta)
