"""The explicit, logged way out of a damaged ledger. It never makes the registry look less spent than it may be.

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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from client.ledger import chain
from client.ledger.history import History, Terms
from client.ledger.ledger import Ledger, marker
from common.files import private_folder, write_atomic
from common.privacy.accounting import Mechanism, rounded_up
from common.types import BadInput, LedgerDamaged

RECOVERED_RUN = "stated-at-recovery"
"""The run under which a stated mechanism is charged."""

Facts = list[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Recovery:
    """What a recovery did.

    Attributes:
        seen: the damage.
        num_kept: charges that still verified.
        num_damaged: legible lines that did not.
        aside: where the damaged files are; None where the whole folder was gone.
        epsilon: what the registry counts as having spent at the terms' delta.
    """

    seen: str
    num_kept: int
    num_damaged: int
    aside: Path | None
    epsilon: float


def recover(
    folder: Path,
    registry: str,
    terms: Terms,
    *,
    reason: str,
    noiseless_possible: bool,
    was_used: bool,
    assume_epsilon: float | None = None,
    assume_mechanism: Mechanism | None = None,
) -> Recovery:
    """Replace a damaged ledger by one that counts the worst case as spent.

    Args:
        folder: of all ledgers.
        registry: whose ledger.
        terms: as the site file says now.
        reason: why, for the log.
        noiseless_possible: whether the site allows releases without noise, so that the lost part may hold one.
        was_used: whether the site holds replies, so that a ledger which is wholly absent is a lost one.
        assume_epsilon: to count as spent, at least the cap.
        assume_mechanism: to count as released beside what verifies; both together must cost at least the cap.

    Raises:
        BadInput: the ledger is not damaged, there never was one, or less than the worst case is stated.
    """
    place = folder / registry
    seen = _damage(folder, registry, was_used)
    kept, legible = chain.verifiable(place), chain.legible(place)
    worst = _worst_terms(terms, legible)
    noiseless = noiseless_possible or any(_noiseless(entry) for entry in legible)
    facts = _kept(kept)
    facts += _assumption(worst, facts, noiseless, assume_epsilon, assume_mechanism)
    aside = _free_name(place) if place.exists() else None
    about = {"registry": registry, **asdict(terms), "reason": reason, "seen": seen, "kept_aside": aside and aside.name}
    write_atomic(marker(private_folder(folder) / registry), b"")  # From here on a missing folder means damage.
    chain.replace(place, aside or place, [("recovered", about), *facts])
    num_kept = sum(event == "reserved" and "original" in entry for event, entry in facts)
    spent = Ledger(place).spent().reserved_epsilon
    return Recovery(seen, num_kept, len(legible) - len(kept), aside, spent)


def _free_name(place: Path) -> Path:
    """A dated name beside the ledger; a registry's own name holds no dot."""
    dated = place.name + time.strftime(".damaged-%Y%m%d-%H%M%S", time.gmtime())
    names = itertools.chain([dated], (f"{dated}-{number}" for number in itertools.count(2)))
    return next(path for path in map(place.with_name, names) if not path.exists())


def _damage(folder: Path, registry: str, was_used: bool) -> str:
    try:
        ledger = Ledger.find(folder, registry)
        if ledger is not None:
            ledger.entries()
    except LedgerDamaged as error:
        return str(error)
    if ledger is not None:
        raise BadInput(f"registry {registry}: the ledger verifies; there is nothing to recover")
    if not was_used:
        raise BadInput(f"registry {registry}: it never had a ledger; there is nothing to recover")
    return f"ledger {registry}: the folder of all ledgers is missing"


def _worst_terms(terms: Terms, legible: list[dict[str, Any]]) -> Terms:
    """The largest cap and delta that the site file or any legible line names, whether the line verifies or not."""
    caps, deltas = [terms.epsilon_cap], [terms.delta]
    for entry in legible:
        for known, name in ((caps, "epsilon_cap"), (deltas, "delta")):
            value = entry.get(name)
            if isinstance(value, int | float) and 0.0 < value < (math.inf if name == "epsilon_cap" else 1.0):
                known.append(float(value))
        bound = entry.get("epsilon")
        if entry.get("event") == "assumed" and isinstance(bound, int | float) and 0.0 < bound < math.inf:
            caps.append(float(bound))
    return replace(terms, epsilon_cap=max(caps), delta=max(deltas))


def _noiseless(entry: dict[str, Any]) -> bool:
    mechanism = entry.get("mechanism")
    without_noise = entry.get("event") == "reserved" and isinstance(mechanism, dict) and mechanism.get("kind") == "none"
    return without_noise or (entry.get("event") == "assumed" and entry.get("epsilon") is None)


def _kept(entries: list[dict[str, Any]]) -> Facts:
    """What verified, to be written again; numbered anew, because the new chain begins with the recovery."""
    facts: Facts = []
    numbers: dict[int, int] = {}
    for entry in entries:
        if entry["event"] not in {"reserved", "committed", "assumed"}:
            continue
        about = {key: value for key, value in entry.items() if key not in {"n", "time", "event"}}
        about["original"] = {"n": entry["n"], "time": entry["time"]}
        if entry["event"] == "committed":
            about["reserved"] = numbers[entry["reserved"]]
        numbers[entry["n"]] = len(facts) + 1
        facts.append((entry["event"], about))
    return facts


def _assumption(
    worst: Terms, kept: Facts, noiseless: bool, stated_epsilon: float | None, stated: Mechanism | None
) -> Facts:
    """What is written on top of what verified."""
    if stated_epsilon is not None and stated is not None:
        raise BadInput("expected --assume-epsilon or --assume-run, got both")
    if stated is not None and not noiseless:
        entries = [{"event": "created", **asdict(worst)}]
        entries += [{"event": event, "n": n, **about} for n, (event, about) in enumerate(kept, start=1)]
        total = History.of(entries).epsilon([stated])
        if total < worst.epsilon_cap:
            raise BadInput(
                f"--assume-run: expected one that brings what verifies to at least the whole cap of "
                f"{worst.epsilon_cap}, got {rounded_up(total)}"
            )
        return [("reserved", {"run": RECOVERED_RUN, "round": 0, "request": "", "mechanism": stated.to_dict()})]
    bound = worst.epsilon_cap if stated_epsilon is None else stated_epsilon
    if not bound >= worst.epsilon_cap:
        raise BadInput(f"--assume-epsilon: expected at least the whole cap of {worst.epsilon_cap}, got {bound}")
    unbounded = noiseless or bound == math.inf
    return [("assumed", {"epsilon": None if unbounded else bound, "delta": worst.delta})]
