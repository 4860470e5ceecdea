"""A coordinator's metrics: names of sites, counts, times and declared numbers; nothing of a site's records is known.

The labels are bounded: sites are those that are admitted now, all others count as `other`; stages and reasons come from
fixed lists; of runs only the present or newest one is told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from common.process.metrics import Measure, write_metrics
from common.process.pages import Page
from server.monitoring.counts import RunCounts
from server.monitoring.state import CoordinatorState

_STAGES = ("join", "backbone", "prepare", "train", "evaluate", "finish")


def write_coordinator_metrics(seen: CoordinatorState) -> Page:
    """Returns the metrics as Prometheus reads them."""
    return write_metrics([*_list_state(seen), *_list_run(seen), *_list_totals(seen)])


def _list_state(seen: CoordinatorState) -> Iterable[Measure]:
    yield Measure(
        "build_info", "Always 1; the version and the reviewed code's digest.",
        {(seen.version, seen.code_digest): 1}, ("version", "code_digest"),
    )  # fmt: skip
    yield Measure("superlink_up", "Whether the SuperLink answered (1) or not (0).", {(): int(seen.answering)})
    yield Measure(
        "certificate_days_left", "Days until the server's certificate expires.", {(): seen.certificate.days_left}
    )
    yield Measure("disk_free_bytes", "Free bytes where the coordinator's folder lies.", {(): seen.free_bytes})
    online = {(site,): int(node is not None and node.status == "online") for site, node in seen.nodes.items()}
    if seen.answering:
        yield Measure("site_connected", "Whether an admitted site is connected (1) or not (0).", online, ("site",))
    contacts = {(site,): node.last_contact for site, node in seen.nodes.items() if node and node.last_contact}
    yield Measure(
        "site_last_contact_timestamp_seconds", "Last heartbeat of a site, in seconds since 1970.", contacts, ("site",)
    )
    yield Measure(
        "requests_rejected", "Requests from the network that were rejected, each kind counted once a minute.",
        {(): seen.rejections.count}, kind="counter",
    )  # fmt: skip


def _list_run(seen: CoordinatorState) -> Iterable[Measure]:
    """Yields the numbers of the present or newest run."""
    yield Measure("queue_length", "Runs that wait for their turn.", {(): seen.count_queued()})
    newest = seen.get_newest_run()
    if newest is None:
        return
    name, run = newest
    yield Measure("run_info", "Always 1; the present or newest run.", {(name,): 1}, ("run",))
    yield Measure("run_under_way", "Whether that run is worked on (1) or not (0).", {(): int(name == seen.current)})
    yield Measure("run_rounds_done", "Last round of that run that ended.", {(): max(run.rounds, default=0)})
    yield Measure("run_rounds", "Rounds that the run asks for.", {} if run.num_rounds is None else {(): run.num_rounds})
    yield Measure("run_sites", "Sites that joined the run.", {(): len(run.joined)})
    yield Measure(
        "run_round_seconds", "Duration of the run's last round, in seconds.",
        {} if run.last_seconds is None else {(): run.last_seconds},
    )  # fmt: skip
    yield Measure(
        "run_last_event_timestamp_seconds", "Last event of the run, in seconds since 1970.",
        {} if run.last_time is None else {(): run.last_time},
    )  # fmt: skip
    spent = {site: run.compute_epsilon(site) for site in run.joined if site in seen.nodes}
    yield Measure(
        "run_site_epsilon", "Upper bound on epsilon of a site's used updates in the run, as declared.",
        {(site,): value for site, value in spent.items() if value is not None}, ("site",),
    )  # fmt: skip
    yield Measure(
        "run_site_budget_epsilon", "Epsilon of a site's whole budget, as declared when it joined the run.",
        {(site,): run.joined[site].budget_epsilon for site in spent}, ("site",),
    )  # fmt: skip


def _list_totals(seen: CoordinatorState) -> Iterable[Measure]:
    """Yields what grows: sums over all runs that the coordinator keeps or kept since it started."""
    yield Measure("runs", "Runs that were started.", {(): len(seen.ever)}, kind="counter")
    yield Measure("rounds", "Rounds that ended.", {(): sum(len(run.rounds) for run in seen.ever)}, kind="counter")
    yield Measure(
        "round_seconds", "Duration of all rounds, in seconds.", {(): sum(run.seconds for run in seen.ever)},
        kind="counter",
    )  # fmt: skip
    for name, help_, get in (
        ("replies_accepted", "Updates that a round used.", lambda run: run.accepted),
        ("bytes_sent", "Bytes of backbones and requests of rounds to a site.", lambda run: run.bytes_down),
        ("bytes_received", "Bytes of a site's updates that a round used.", lambda run: run.bytes_up),
    ):
        yield Measure(name, help_, _add_up(seen, get), ("site",), "counter")
    rejected: Counter[tuple[str, ...]] = Counter()
    for run in seen.ever:
        for (site, stage, reason), count in run.rejected.items():
            rejected[_limit_site(seen, site), stage if stage in _STAGES else "other", reason] += count
    yield Measure(
        "replies_rejected", "Replies that were not used or did not come, by what was asked and class of the reason.",
        rejected, ("site", "stage", "reason"), "counter",
    )  # fmt: skip


def _add_up(seen: CoordinatorState, get: Callable[[RunCounts], Counter[str]]) -> Counter[tuple[str, ...]]:
    total: Counter[tuple[str, ...]] = Counter()
    for run in seen.ever:
        for site, count in get(run).items():
            total[(_limit_site(seen, site),)] += count
    return total


def _limit_site(seen: CoordinatorState, site: str) -> str:
    return site if site in seen.nodes else "other"
