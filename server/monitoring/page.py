"""A coordinator's status page: first what is wrong and what to do, then sites, runs and the last events."""

from __future__ import annotations

from collections.abc import Iterable

from common.events import QuorumAwaited
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
from common.types import explain_rejection
from server.monitoring.counts import RunCounts
from server.monitoring.state import CoordinatorState

_SOON_DAYS = 30
_MAX_RUNS = 20
_WAITING_S = 120.0


def write_coordinator_page(seen: CoordinatorState) -> Page:
    """Returns the page as a browser shows it."""
    config = seen.federation.config
    verdicts = list_verdicts(seen)
    parts = [
        write_text(
            f"Sites reach it at {config.address}. It is {format_time(seen.time)}; this page loads itself again every "
            "15 seconds and changes nothing."
        ),
        write_verdicts(verdicts or [("good", _describe_good(seen), "")]),
        _write_sites(seen),
        _write_runs(seen),
        _write_events(seen),
        write_text(
            f"Version {seen.version}, code digest {seen.code_digest}. Certificate valid until "
            f"{seen.certificate.until:%Y-%m-%d}. Metrics for Prometheus: /metrics."
        ),
    ]
    body = write_page(f"{describe_state(verdicts)}: coordinator {config.name}", f"Coordinator {config.name}", parts)
    return Page("text/html; charset=utf-8", body)


def list_verdicts(seen: CoordinatorState) -> list[Verdict]:
    """Returns what is wrong, the worst first, each with what to do; an empty list where all is well."""
    found = [*_judge_coordinator(seen), *_judge_sites(seen), *_judge_run(seen)]
    return sorted(found, key=lambda verdict: verdict[0] != "bad")


def _describe_good(seen: CoordinatorState) -> str:
    sites = f"{len(seen.nodes)} of {len(seen.nodes)} sites are connected"
    newest = seen.get_newest_run()
    if newest is None:
        return f"{sites}. No run was started yet."
    name, run = newest
    return f"{sites}. Run {name}: {_describe_state(seen, name)}, {_describe_rounds(run)}."


def _judge_coordinator(seen: CoordinatorState) -> Iterable[Verdict]:
    folder = seen.federation.folder
    if not seen.answering:
        yield (
            "bad",
            "The SuperLink inside the coordinator does not answer.",
            f"read the end of `{seen.federation.log}`, then `headwater coordinator stop {folder}` and start it again; "
            "sites reconnect by themselves",
        )
    days = seen.certificate.days_left
    if days < _SOON_DAYS:
        yield (
            "bad" if days < 0 else "attention",
            f"The server's certificate {'has expired' if days < 0 else f'expires in {days} day(s)'}.",
            f"`headwater coordinator renew {folder}`; nothing has to be started again",
        )
    if seen.free_bytes < LOW_BYTES:
        yield (
            "bad",
            f"Only {seen.free_bytes / 2**20:,.0f} MiB are free where the coordinator's folder lies.",
            f"make room; old runs lie under `{seen.federation.runs}`",
        )


def _judge_sites(seen: CoordinatorState) -> Iterable[Verdict]:
    folder = seen.federation.folder
    if not seen.nodes:
        yield "attention", "No site is admitted.", f"`headwater coordinator admit {folder} NAME KEY.pub`"
    if not seen.answering:
        return
    run = seen.runs.get(seen.current or "")
    for site, node in seen.nodes.items():
        if node is not None and node.status == "online":
            continue
        contact = node.last_contact if node is not None else None
        when = f"for {format_age(seen.time, contact)}" if contact else "and never has been"
        needed = run is not None and site in run.joined
        yield (
            "bad" if needed else "attention",
            f"Site {site} is not connected {when}{', and is part of the run under way' if needed else ''}.",
            "ask its staff to run `headwater site check SITE.yaml`, which says what is wrong there",
        )


def _judge_run(seen: CoordinatorState) -> Iterable[Verdict]:
    newest, folder = seen.get_newest_run(), seen.federation.folder
    if newest is None:
        return
    name, run = newest
    listed = seen.listed[name]
    if name == seen.current:
        yield from _judge_wait(seen, name, run)
    elif listed.state in ("failed", "interrupted"):
        why = f": {listed.reason}" if listed.reason else f" after {_describe_rounds(run)}."
        yield (
            "bad",
            f"Run {name} {'failed' if listed.state == 'failed' else 'was interrupted'}{why}",
            f"`headwater coordinator resume {folder} {name}`, once what the sentence names is mended; what sites spent "
            "stays spent and is not spent again",
        )
    elif listed.state == "partial":
        yield "attention", f"Run {name} is complete, but sites or tasks missed rounds of it.", ""
    for site, event in sorted(run.last_rejected.items()):
        at = f"round {event.round}" if event.round is not None else event.stage
        yield (
            "attention",
            f"Run {name}: the last reply of {site} that was not used, {at}: {explain_rejection(event.reason)}.",
            "its staff sees the detail with `headwater site log SITE.yaml`",
        )


def _judge_wait(seen: CoordinatorState, name: str, run: RunCounts) -> Iterable[Verdict]:
    if isinstance(run.waiting, QuorumAwaited):
        missing = "; ".join(f"{site}: {reason}" for site, reason in run.waiting.sites.items())
        until = format_time(run.waiting.time + run.waiting.seconds)
        yield (
            "bad",
            f"Run {name} has too few sites in round {run.waiting.round} and waits for them until {until}: {missing}.",
            "look at those sites: `headwater site check SITE.yaml` there",
        )
    elif run.waiting is not None and seen.time - run.waiting.time > _WAITING_S:
        late = ", ".join(seen.name_node(node) for node in run.waiting.node_ids)
        where = f"round {run.waiting.round}" if run.waiting.round else "the beginning of the run"
        yield (
            "attention",
            f"Run {name} has waited for {late} in {where} for {format_age(seen.time, run.waiting.time)}.",
            "look at those sites first: `headwater site check SITE.yaml` there",
        )


def _describe_state(seen: CoordinatorState, name: str) -> str:
    return "under way" if name == seen.current else seen.listed[name].state


def _describe_rounds(run: RunCounts) -> str:
    done = max(run.rounds, default=0)
    return f"round {done} of {run.num_rounds}" if run.num_rounds else "no round"


def _write_sites(seen: CoordinatorState) -> Html:
    newest = seen.get_newest_run()
    run = newest[1] if newest else RunCounts()
    rows = []
    for site, node in seen.nodes.items():
        online = node is not None and node.status == "online"
        connected = "unknown" if not seen.answering else ("yes" if online else "NO")
        contact = "never"
        if node is not None and node.last_contact:
            age = format_age(seen.time, node.last_contact)
            contact = f"{age} ago" if online else f"gone for {age}"
        rejected = sum(count for (name, _, _), count in run.rejected.items() if name == site)
        epsilon, joined = run.compute_epsilon(site), run.joined.get(site)
        spent = f"{round_up(epsilon):.2f} of {joined.budget_epsilon:g}" if joined and epsilon is not None else ""
        up, down = run.bytes_up[site], run.bytes_down[site]
        rows.append((site, connected, contact, f"{run.accepted[site]}", f"{rejected}", spent, f"{down:,}", f"{up:,}"))
    of_run = f" and their part in run {newest[0]}" if newest else ""
    columns = (
        "site",
        "connected",
        "last heard of",
        "updates used",
        "not used",
        "epsilon used",
        "bytes to it",
        "from it",
    )
    return write_table(f"Sites{of_run}", columns, rows, numbers=columns[3:], empty="No site is admitted.")


def _write_runs(seen: CoordinatorState) -> Html:
    rows = []
    for name, run in list(seen.runs.items())[: -_MAX_RUNS - 1 : -1]:
        started = format_time(run.started.time) if run.started else ""
        last = f"{format_age(seen.time, run.last_time)} ago" if run.last_time else ""
        rows.append((name, _describe_state(seen, name), _describe_rounds(run), started, last, f"{run.seconds:,.1f}"))
    heading = "Runs" if len(seen.runs) <= _MAX_RUNS else f"The last {_MAX_RUNS} of {len(seen.runs)} runs"
    columns = ("run", "state", "rounds", "last start", "last event", "seconds in rounds")
    return write_table(heading, columns, rows, numbers=columns[5:], empty="No run was started yet.")


def _write_events(seen: CoordinatorState) -> Html:
    newest = seen.get_newest_run()
    if newest is None:
        return Html("")
    rows = [(format_time(moment), line) for moment, line in reversed(newest[1].recent)]
    return write_table(f"Last events of run {newest[0]}", ("time", "event"), rows, empty="Nothing has happened yet.")
