"""A site's metrics, for the hospital's own monitoring: nothing in them is sent to a coordinator.

The labels are bounded: purposes and reasons come from fixed lists; no run, task or file is named.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import get_args

from client.ledger.evaluation_budget import list_unspent
from client.ledger.events import Purpose
from client.ledger.history import History
from client.monitoring.state import SiteState
from common.process.metrics import Measure, write_metrics
from common.process.pages import Page


def write_site_metrics(seen: SiteState) -> Page:
    """Returns the metrics as Prometheus reads them."""
    return write_metrics([*_list_state(seen), *_list_budget(seen), *_list_totals(seen)])


def compute_held_share(seen: SiteState, history: History) -> float:
    """Returns the part of the budget that is held for joined runs and for evaluations."""
    share = None if seen.config.evaluation == "local" else seen.config.evaluation
    held = [*history.list_earmarked(), *list_unspent(share, history)]
    return max(0.0, history.compute_share(held) - history.compute_share()) if held else 0.0


def _list_state(seen: SiteState) -> Iterable[Measure]:
    yield Measure(
        "build_info", "Always 1; the version and the reviewed code's digest.",
        {(seen.version, seen.code_digest): 1}, ("version", "code_digest"),
    )  # fmt: skip
    yield Measure("site_joined", "Whether the site is joined (1) or not (0).", {(): int(seen.presence.joined)})
    yield Measure(
        "site_last_contact_timestamp_seconds", "Last answer of the coordinator, in seconds since 1970.",
        {} if seen.presence.last_contact is None else {(): seen.presence.last_contact},
    )  # fmt: skip
    yield Measure(
        "site_offers_waiting", "Runs that wait for the decision of the site's staff.", {(): len(seen.waiting)}
    )
    yield Measure(
        "site_authority_days_left", "Days until the coordinator's authority expires.",
        {} if seen.authority_days_left is None else {(): seen.authority_days_left},
    )  # fmt: skip
    yield Measure("disk_free_bytes", "Free bytes where the site's state lies.", {(): seen.free_bytes})
    yield Measure(
        "site_ledger_readable", "Whether the ledger verifies (1) or not (0).", {(): int(seen.history is not None)}
    )


def _list_budget(seen: SiteState) -> Iterable[Measure]:
    """Yields the account of the site's population; nothing where its ledger cannot be read."""
    history = seen.history
    if history is None:
        return
    cap, reserved = history.terms.epsilon_cap, history.compute_epsilon(quick=True)
    yield Measure("site_budget_epsilon", "Epsilon that may be spent in total.", {(): cap})
    yield Measure(
        "site_epsilon_spent", "Upper bound on epsilon of all that may have left, over all runs.", {(): reserved}
    )
    yield Measure("site_epsilon_left", "Budget less that bound.", {(): max(0.0, cap - reserved)})
    used = history.compute_share()
    yield Measure("site_budget_used_ratio", "Part of the budget that the privacy filter counts as used.", {(): used})
    yield Measure(
        "site_budget_held_ratio", "Part of the budget that is held for joined runs and evaluations.",
        {(): 0.0 if math.isinf(used) else compute_held_share(seen, history)},
    )  # fmt: skip
    yield Measure("site_runs_charged", "Runs that were ever charged.", {(): len({*_list_runs(history)})})
    yield Measure("site_runs_held", "Joined runs for which budget is held.", {(): len(history.earmarks)})
    yield Measure(
        "site_charges_open", "Charges whose reply is not known to be stored; they count all the same.",
        {(): sum(not charge.committed for charge in history.charges.values())},
    )  # fmt: skip


def _list_runs(history: History) -> Iterable[str]:
    return (charge.run for charge in history.charges.values())


def _list_totals(seen: SiteState) -> Iterable[Measure]:
    """Yields what grows: sums over the site's journal for this coordinator."""
    counts = seen.counts
    yield Measure("site_runs_joined", "Runs that the site joined.", {(): len(counts.joined)}, kind="counter")
    yield Measure(
        "site_replies", "Replies that were computed and charged, by purpose.",
        {(purpose,): counts.answered[purpose] for purpose in get_args(Purpose)}, ("purpose",), "counter",
    )  # fmt: skip
    yield Measure("site_replies_resent", "Stored replies sent again at no cost.", {(): counts.resent}, kind="counter")
    yield Measure(
        "site_requests_declined", "Requests that were declined, by reason.",
        {(reason,): count for reason, count in counts.declined.items()}, ("reason",), "counter",
    )  # fmt: skip
    yield Measure("site_bytes_sent", "Bytes of all replies.", {(): counts.bytes_sent}, kind="counter")
    yield Measure(
        "site_answer_seconds", "Duration of all charged answers, in seconds.", {(): counts.seconds}, kind="counter"
    )
