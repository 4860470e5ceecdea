"""A site's status page: first what is wrong and what to do, then the budget, the runs and the last events."""

from __future__ import annotations

import math
from collections.abc import Iterable

from client.config import MAIN
from client.ledger.events import EVALUATION
from client.ledger.history import History
from client.monitoring.metrics import compute_held_share
from client.monitoring.state import SiteState, explain_decline
from client.protocol.balance import read_terms
from common.privacy.accounting import round_up
from common.process.html import (
    LOW_BYTES,
    Html,
    Verdict,
    describe_state,
    format_age,
    format_time,
    write_page,
    write_table,
    write_text,
    write_verdicts,
)
from common.process.pages import Page

_SOON_DAYS = 60
_MAX_RUNS = 10
_DAY_S = 86_400.0
_SCARCE = 0.9


def write_site_page(seen: SiteState) -> Page:
    """Returns the page as a browser shows it."""
    name = seen.config.name
    verdicts = list_verdicts(seen)
    contact = seen.presence.last_contact
    heard = f"; the coordinator answered last {format_age(seen.time, contact)} ago" if contact else ""
    good = f"The site is joined since {format_time(seen.presence.since)}."
    parts = [
        write_text(
            f"Coordinator {seen.coordinator.address}{heard}. It is {format_time(seen.time)}; this page loads itself "
            "again every 15 seconds and changes nothing. Nothing of it is sent anywhere."
        ),
        write_verdicts(verdicts or [("good", good, "")]),
        _write_budget(seen),
        _write_runs(seen),
        _write_events(seen),
        write_text(
            f"Version {seen.version}, code digest {seen.code_digest}. Metrics for Prometheus: /metrics. Details of "
            "every release and refusal: headwater site log."
        ),
    ]
    return Page(
        "text/html; charset=utf-8", write_page(f"{describe_state(verdicts)}: site {name}", f"Site {name}", parts)
    )


def list_verdicts(seen: SiteState) -> list[Verdict]:
    """Returns what is wrong, the worst first, each with what to do; an empty list where all is well."""
    found = [*_judge_connection(seen), *_judge_ledger(seen), *_judge_staff(seen)]
    return sorted(found, key=lambda verdict: verdict[0] != "bad")


def _judge_connection(seen: SiteState) -> Iterable[Verdict]:
    if not seen.presence.joined:
        yield (
            "bad",
            f"The site is not joined, since {format_time(seen.presence.since)}; it goes on trying.",
            f"`headwater site check {seen.site_file}` says what is wrong with the connection",
        )
    if seen.authority_days_left is not None and seen.authority_days_left < _SOON_DAYS:
        yield (
            "attention",
            f"The coordinator's authority expires in {seen.authority_days_left} day(s).",
            "ask the coordinator's staff for a new kit",
        )
    if seen.free_bytes < LOW_BYTES:
        yield (
            "bad",
            f"Only {seen.free_bytes / 2**20:,.0f} MiB are free where the site's state lies.",
            f"make room on that disk; never by deleting what lies in `{seen.config.state_dir}`",
        )


def _judge_ledger(seen: SiteState) -> Iterable[Verdict]:
    history = seen.history
    if history is None:
        yield (
            "bad",
            f"The ledger cannot be read, and nothing is answered: {seen.ledger_problem}",
            f"`headwater site budget {seen.site_file}` says what is damaged, `headwater site recover --help` what can "
            "be done; restore no older copy",
        )
        return
    used = history.compute_share()
    if used + _compute_held(seen, history) >= _SCARCE:
        yield (
            "attention",
            f"{_format_percent(used)} of the budget is used and {_format_percent(_compute_held(seen, history))} held.",
            "new runs will be declined soon; whether the cap is raised is the board's decision "
            f"(`headwater site amend {seen.site_file} --reason ...`)",
        )
    if history.terms != read_terms(seen.config):
        yield (
            "attention",
            "The site file states another unit, budget or delta than the ledger, and nothing is answered.",
            f"put the site file back, or `headwater site amend {seen.site_file} --reason ...`",
        )


def _judge_staff(seen: SiteState) -> Iterable[Verdict]:
    for run in seen.waiting:
        yield (
            "attention",
            f"Run {run} waits for a decision.",
            f"read it and decide: `headwater site approve {seen.site_file} {run}{_name_coordinator(seen)}`",
        )
    declined = seen.counts.last_declined
    if declined is not None and seen.time - declined.time < _DAY_S:
        yield (
            "attention",
            f"The last request was declined {format_age(seen.time, declined.time)} ago: {explain_decline(declined)}.",
            f"`headwater site log {seen.site_file}` tells the detail",
        )


def _name_coordinator(seen: SiteState) -> str:
    name = seen.config.coordinator_name
    return "" if name == MAIN else f" --coordinator {name}"


def _compute_held(seen: SiteState, history: History) -> float:
    return 0.0 if math.isinf(history.compute_share()) else compute_held_share(seen, history)


def _write_budget(seen: SiteState) -> Html:
    history, heading = seen.history, f"Budget of population {seen.config.registry}"
    columns = ("what", "value")
    if history is None:
        return write_table(heading, columns, [], empty="The ledger cannot be read.")
    terms, used = history.terms, history.compute_share()
    spent = history.compute_epsilon(quick=True)
    rows = [
        ("budget", f"epsilon {terms.epsilon_cap:g} at delta {terms.delta:g} per {terms.unit.value}"),
        ("spent, at most", f"epsilon {_format_epsilon(spent)}"),
        ("used, as the privacy filter counts", _format_percent(used)),
        ("held for joined runs and evaluations", _format_percent(_compute_held(seen, history))),
    ]
    return write_table(heading, columns, rows, empty="")


def _write_runs(seen: SiteState) -> Html:
    history = seen.history
    if history is None:
        return Html("")
    names = list(dict.fromkeys(charge.run for charge in history.charges.values()))
    names += [name for name in history.earmarks if name not in names]
    rows = []
    for name in names[: -_MAX_RUNS - 1 : -1]:
        own = [charge for charge in history.charges.values() if charge.run == name]
        training = {charge.round for charge in own if charge.purpose != EVALUATION}
        held = history.earmarks.get(name)
        rounds = f"{len(training)}" if held is None else f"{len(training)} of {held.rounds}"
        evaluations = len({charge.round for charge in own if charge.purpose == EVALUATION})
        epsilon = _format_epsilon(history.compute_run_epsilon(name, quick=True))
        state = "joined" if held is not None else "ended"
        rows.append((name, state, rounds, f"{evaluations}", epsilon, f"{sum(not charge.committed for charge in own)}"))
    heading = "Runs" if len(names) <= _MAX_RUNS else f"The last {_MAX_RUNS} of {len(names)} runs"
    columns = ("run", "state", "rounds charged", "evaluations", "epsilon by itself", "charges without a stored reply")
    return write_table(heading, columns, rows, numbers=columns[2:], empty="No run was joined yet.")


def _write_events(seen: SiteState) -> Html:
    rows = [(format_time(moment), line) for moment, line in reversed(seen.counts.recent)]
    return write_table("Last events", ("time", "event"), rows, empty="Nothing has happened yet.")


def _format_epsilon(epsilon: float) -> str:
    return "infinite" if math.isinf(epsilon) else f"{round_up(epsilon):.2f}"


def _format_percent(ratio: float) -> str:
    return "everything" if math.isinf(ratio) else f"{round_up(100.0 * ratio, 1):.1f} %"
