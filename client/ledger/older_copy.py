"""A ledger that was replaced by an older copy of itself: what tells it.

* What lies beside it. A reply is charged before it is computed, stored before it is sent, and noted in the journal
  after. So each stored reply and each `ReplySent` event has a charge in the ledger, or is older than the ledger's last
  recovery, which counts all that may have left before.
* A witness (`LedgerWitness`), which leaves the site in each charged reply and when it joins, and which the coordinator
  keeps and shows again. A ledger behind a witness of its own declines everybody until `headwater site recover`: the
  witness is kept beside the ledger as a claim. A witness that the ledger's key did not make may be of the chain that
  followed a recovery, or invented: it declines only the request that shows it, and only `recover` reads its claim.

Limit, stated: an older copy of everything at the site is not told where the coordinator has lost its witness too, or
had none yet.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from client.ledger.events import ChargeReserved, LedgerLine, LedgerRecovered
from client.ledger.ledger import Ledger
from common.events import ReplySent, read_site_journal, select_events
from common.files import write_atomic
from common.types import BadInput, LedgerDamaged, LedgerWitness

_MAX_UNKNOWN = 16
"""So many claims of chains that the ledger does not know are kept: who invents some must not fill the disk."""


def check_replies(ledger: Ledger, places: Mapping[str, Path]) -> None:
    """Checks that everything that a site sent is charged; once a process for each ledger and its folders.

    Args:
        ledger: the ledger of the site's population.
        places: folder of each coordinator's runs and journal, by what the names of its charges begin with.

    Raises:
        LedgerDamaged: a reply has no charge.
    """
    _check_replies(ledger, tuple(places.items()), ledger.identify_files())


@lru_cache(maxsize=2**14)
def _check_replies(ledger: Ledger, places: tuple[tuple[str, Path], ...], files: tuple[int, ...]) -> None:
    del files  # Others where the ledger was replaced or restored since.
    lines = ledger.lines()
    charges = [line.event for line in lines if isinstance(line.event, ChargeReserved)]
    recovered = _find_last_recovery(lines)
    requests = {(charge.run, charge.request) for charge in charges}
    left = Counter((charge.run, charge.round, charge.purpose) for charge in charges)
    for prefix, place in places:
        for reply in place.glob("runs/*/replies/*"):
            run = prefix + reply.parents[1].name
            # Those that begin with a dot were being written when a process died: they were not sent.
            uncharged = not reply.name.startswith(".") and (run, reply.name) not in requests
            if uncharged and reply.stat().st_mtime > recovered:
                raise _describe(ledger, run)
        for event in select_events(read_site_journal(place / "site.jsonl"), ReplySent):
            about = (prefix + event.run_id, event.round, event.purpose)
            left[about] -= 1
            if left[about] < 0 and event.time > recovered:
                raise _describe(ledger, about[0])


def check_reply(ledger: Ledger, reply: Path) -> None:
    """Checks that one stored reply is charged: the newest of a run, where older ones were looked at before.

    Args:
        ledger: the ledger of the site's population.
        reply: the reply's file, in its run's folder.

    Raises:
        LedgerDamaged: it has no charge.
    """
    charged = any(charge.request == reply.name for charge in reversed(ledger.charges()))
    if not charged and reply.stat().st_mtime > _find_last_recovery(ledger.lines()):
        raise _describe(ledger, reply.parents[1].name)


def check_witness(ledger: Ledger, witness: LedgerWitness | None) -> None:
    """Checks that the ledger holds what a coordinator's witness says; one that it does not hold is kept as a claim.

    Args:
        ledger: the ledger of the site's population.
        witness: what the coordinator shows; None where it has none.

    Raises:
        LedgerDamaged: the ledger is behind a witness of its own.
        BadInput: the witness is not of this ledger.
    """
    standing = "held" if witness is None else ledger.compare(witness)
    if witness is None or standing == "held":
        return
    claims = read_claims(ledger.folder)
    # A chain's latest only, and of unknown chains the last few.
    others = [claim for claim in claims if claim.chain != witness.chain]
    unknown = [claim for claim in others if ledger.compare(claim) == "unknown"][-_MAX_UNKNOWN + 1 :]
    kept = [claim for claim in others if claim in unknown or ledger.compare(claim) == "behind"]
    _write_claims(ledger.folder, [*kept, witness])
    if standing == "behind":
        raise _describe_behind(ledger)
    raise BadInput(
        f"ledger {ledger.population}: the coordinator shows a witness that is not of it; if the ledger was restored "
        "from a copy older than its last recovery, see `headwater site recover`; else ask the coordinator, and recover "
        "nothing"
    )


def check_claims(ledger: Ledger) -> None:
    """Checks that the ledger is not behind a witness of its own that was shown before.

    Raises:
        LedgerDamaged: it is.
    """
    if any(ledger.compare(claim) == "behind" for claim in read_claims(ledger.folder)):
        raise _describe_behind(ledger)


def describe_unknown_claims(ledger: Ledger) -> str | None:
    """Returns the sentence for witnesses of chains that the ledger does not know; None where nobody showed one."""
    if any(ledger.compare(claim) == "unknown" for claim in read_claims(ledger.folder)):
        return f"ledger {ledger.population}: a coordinator showed a witness of another ledger of this registry"
    return None


def read_claims(place: Path) -> list[LedgerWitness]:
    """Returns the witnesses beside a ledger's folder that it did not hold when they were shown."""
    try:
        claims = [LedgerWitness(**values) for values in json.loads(_locate_claims(place).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, RecursionError):  # One that is lost is shown again.
        return []
    return claims


def remove_claims(place: Path) -> None:
    """Removes the claims of a ledger that was recovered."""
    _locate_claims(place).unlink(missing_ok=True)


def _write_claims(place: Path, claims: list[LedgerWitness]) -> None:
    write_atomic(_locate_claims(place), json.dumps([asdict(claim) for claim in claims]).encode())


def _locate_claims(place: Path) -> Path:
    return place.with_name(f".{place.name}.claims")


def _describe_behind(ledger: Ledger) -> LedgerDamaged:
    return LedgerDamaged(
        f"ledger {ledger.population}: it is an older copy than the one a coordinator has a witness of; put the newest "
        "copy back, or see `headwater site recover`"
    )


def _find_last_recovery(lines: list[LedgerLine]) -> float:
    return max((line.time for line in lines if isinstance(line.event, LedgerRecovered)), default=-math.inf)


def _describe(ledger: Ledger, run_id: str) -> LedgerDamaged:
    return LedgerDamaged(
        f"ledger {ledger.population}: a reply of run {run_id} was sent and has no charge in it; it is an older copy, "
        "or the site file named another registry; put the newest copy back, or see `headwater site recover`"
    )
