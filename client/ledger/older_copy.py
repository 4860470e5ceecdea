"""A ledger that was replaced by an older copy of itself is told by what lies beside it: replies without a charge.

A reply is charged before it is computed, stored before it is sent, and noted in the journal after. So each stored reply
and each `ReplySent` event has a charge in the ledger, or is older than the ledger's last recovery, which counts all
that may have left before.

Limit, stated: an older copy of the ledger beside an equally old copy of the replies and the journal is not told here,
but by the witness that a coordinator shows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from client.ledger.events import ChargeReserved, LedgerLine, LedgerRecovered
from client.ledger.ledger import Ledger
from common.events import ReplySent, read_site_journal, select_events
from common.types import LedgerDamaged


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
    lines = ledger.lines()
    charged = any(isinstance(line.event, ChargeReserved) and line.event.request == reply.name for line in lines[::-1])
    if not charged and reply.stat().st_mtime > _find_last_recovery(lines):
        raise _describe(ledger, reply.parents[1].name)


def _find_last_recovery(lines: list[LedgerLine]) -> float:
    return max((line.time for line in lines if isinstance(line.event, LedgerRecovered)), default=-math.inf)


def _describe(ledger: Ledger, run_id: str) -> LedgerDamaged:
    return LedgerDamaged(
        f"ledger {ledger.population}: a reply of run {run_id} was sent and has no charge in it; it is an older copy, "
        "or the site file named another registry; put the newest copy back, or see `headwater site recover`"
    )
