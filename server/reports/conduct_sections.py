"""The sections of a run's report on how it went: privacy, participation, replies, records, time, versions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from common.events import BackboneSent, HeadsEvaluated, RoundEnded, RunEnded, SiteRejected, select_events
from common.privacy.accounting import round_up
from common.process.html import format_time
from common.report.figures import MOST_SERIES, Figure, Series, draw_grid, draw_series
from common.report.page import (
    ReportTable,
    Section,
    count_of,
    format_bytes,
    format_seconds,
    format_value,
    join_words,
)
from common.types import DECLINED, explain_rejection
from server.reports.reported_run import ReportedRun, trace_epsilons
from server.reports.result_sections import MOST_ROWS
from server.reports.summary import select_rounds

TOOK_PART, LATE, NOT_USED, SAID_NO, NO_PART = "took part", "late", "not used", "declined", "no part"
"""A site in a round."""

_MOST_REASONS = 200


def show_privacy(run: ReportedRun) -> Section:
    """Returns the section with epsilon over the rounds, each site's budget, and the audit."""
    rows = []
    for name, site in list(run.summary.sites.items())[:MOST_ROWS]:
        spent = "not private" if site.epsilon is None and site.rounds else f"{round_up(site.epsilon or 0.0):.2f}"
        budget = "" if site.budget_epsilon is None else f"{site.budget_epsilon:g}"
        delta = "" if site.delta is None else f"{site.delta:g}"
        rows.append((name, spent, budget, delta, "" if site.unit is None else f"one {site.unit}"))
    columns = ("site", "epsilon spent", "whole budget", "delta", "protects")
    table = ReportTable("Each site's budget, and what this run spent of it", columns, rows, columns[1:4])
    traced = trace_epsilons(run)
    if traced:
        lead = (
            "Epsilon bounds how much anyone may learn about one unit from everything that a site released, all rounds "
            "together, whether or not the unit was there; smaller is more private. Round 0 is what sites release "
            "before the first round. Where all sites have the same budget, a dashed line marks it. A site may have "
            "spent more of its budget in other runs, which is known only there."
        )
    elif run.is_private or not select_rounds(run.events):
        lead = "Nothing was released in this run that could be traced over its rounds."
    else:
        lead = "This run is not private: its updates carried no noise, and nothing bounds what they tell of a unit."
    figures = [_draw_epsilons(run, traced)] if traced else []
    remarks = [_describe_audit(run)]
    if any(
        update.plan.sampling_rate < 1.0
        for ended in select_rounds(run.events).values()
        for update in ended.sites.values()
    ):
        remarks.append(
            "Records are sampled in this run: the line is the bound that is computed at once, and what the table says, "
            "from a slower computation, may be smaller."
        )
    return Section("Privacy spent", lead, figures, [table] if rows else [], remarks)


def _draw_epsilons(run: ReportedRun, traced: Mapping[str, list[tuple[int, float]]]) -> Figure:
    """Returns epsilon over the rounds; sites with the same line share it."""
    groups: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for site, points in traced.items():
        groups.setdefault(tuple(points), []).append(site)
    lines = [
        Series(
            names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more",
            [at for at, _ in points],
            [epsilon for _, epsilon in points],
        )
        for points, names in sorted(groups.items(), key=lambda group: -len(group[1]))
    ]
    budgets = {run.joined[site].budget_epsilon for site in traced}
    left = len(lines) - MOST_SERIES
    caption = "Epsilon spent in this run, after each round" + (
        f" ({left} further lines are not drawn)" if left > 0 else ""
    )
    limit = budgets.pop() if len(budgets) == 1 else None
    return draw_series(caption, lines, ("round", "epsilon"), limit=limit, frame="counts", steps=True)


def _describe_audit(run: ReportedRun) -> str:
    """Returns what is known of the privacy audit."""
    audit = run.summary.audit
    if audit.passed is None or audit.epsilon_claimed is None:
        if audit.required:
            return "Audit: required; each site passed its own before it joined, and the results stay at the sites."
        return "Audit: not required. `audit: required` in the run file has the claim tested before anything is trained."
    verdict = "passed" if audit.passed else f"FAILED: {join_words(audit.reasons or ())}"
    return (
        f"Audit: {verdict}. An attack on made-up records shows that epsilon is at least "
        f"{format_value(audit.epsilon_lower_95)} (95 % confidence); {round_up(audit.epsilon_claimed):.2f} is claimed. "
        f"Noise as measured / as claimed: {format_value(audit.noise_std_ratio)}."
    )


# --- participation ---------------------------------------------------------------------------------------------------


def trace_participation(run: ReportedRun) -> dict[str, list[str]]:
    """Returns for each site that joined or was asked its state in each round that ended, in their order."""
    rounds = [ended for _, ended in sorted(select_rounds(run.events).items())]
    said: dict[tuple[str, int], str] = {}
    for event in select_events(run.events, SiteRejected):
        if event.stage == "train" and event.round is not None:
            said[event.site, event.round] = SAID_NO if event.reason.startswith(DECLINED) else NOT_USED
    rejected = (event.site for event in select_events(run.events, SiteRejected))
    return {
        site: [_find_state(site, ended, said) for ended in rounds] for site in dict.fromkeys([*run.joined, *rejected])
    }


def _find_state(site: str, ended: RoundEnded, said: Mapping[tuple[str, int], str]) -> str:
    """Returns a site's state in a round.

    Args:
        site: the site.
        ended: the round.
        said: site and round -> why its reply was not used, where one was rejected.
    """
    update = ended.sites.get(site)
    if update is not None:
        return TOOK_PART if update.round is None else LATE
    return said.get((site, ended.round), NO_PART)


def show_participation(run: ReportedRun) -> Section:
    """Returns the section with the grid of sites and rounds."""
    heading = "Who took part when"
    states, numbers = trace_participation(run), sorted(select_rounds(run.events))
    if not states or not numbers:
        return Section(heading, "No round of this run was completed, so no site took part in one.")
    order = list(states)
    if len(order) > MOST_ROWS:  # Those that missed most.
        order = sorted(order, key=lambda site: states[site].count(TOOK_PART))[:MOST_ROWS]
    marks = [(TOOK_PART, "", 0), (LATE, "L", 3), (NOT_USED, "X", 5), (SAID_NO, "D", 1)]
    figure = draw_grid("Sites (rows) and rounds (columns)", order, numbers, [states[site] for site in order], marks)
    kinds = (TOOK_PART, LATE, NOT_USED, SAID_NO, NO_PART)
    rows = [
        (
            site,
            str(run.joined[site].first_round) if site in run.joined else "never",
            *(str(states[site].count(kind)) for kind in kinds),
        )
        for site in order
    ]
    lead = (
        "One row for each site, one column for each round; a blue cell means that the round used the site's update. A "
        "grey cell means no part: the site had not joined, was not asked, or no reply came. Late means that an update "
        "answered the round before and was used one round later."
    )
    left = len(states) - len(order)
    remarks = [f"{count_of(left, 'site')} that took part more often: not shown."] if left else []
    table = ReportTable("Number of rounds of each site", ("site", "joined for round", *kinds), rows, kinds)
    return Section(heading, lead, [figure], [table], remarks)


def show_rejections(run: ReportedRun) -> Section:
    """Returns the section with the replies that were not used, and why."""
    heading = "Replies that were not used"
    places: dict[tuple[str, str, str], list[str]] = {}
    for event in select_events(run.events, SiteRejected):
        where = "before the rounds" if event.round is None else str(event.round)
        places.setdefault((event.site, event.stage, explain_rejection(event.reason)), []).append(where)
    for evaluated in select_events(run.events, HeadsEvaluated):
        for site, reason in evaluated.rejected.items():
            places.setdefault((site, "evaluation", explain_rejection(reason)), []).append(str(evaluated.round))
    if not places:
        return Section(heading, "Every reply that was asked for arrived and was used.")
    rows = [
        (site, stage, reason, join_words(list(dict.fromkeys(rounds)), 12))
        for (site, stage, reason), rounds in list(places.items())[:_MOST_REASONS]
    ]
    lead = (
        "What a site was asked, and why its reply was not used. To decline is a site's own decision and no fault; it "
        "tells the coordinator one word of a fixed list, and keeps the detail in its own log."
    )
    return Section(heading, lead, tables=[ReportTable(heading, ("site", "asked for", "reason", "rounds"), rows)])


def show_left_out(run: ReportedRun) -> Section:
    """Returns the section with the number of records that could not be used, where it may be known."""
    heading = "Records that were left out"
    if run.is_deployed:
        return Section(
            heading,
            "A coordinator does not know how many records a site could not use: that number depends on records, and "
            "stays at the site.",
        )
    left = {name: site.left_out for name, site in run.summary.sites.items() if site.left_out is not None}
    if not left:
        return Section(heading, "Every record of every site could be used.")
    rows = [(name, str(each.num_records), each.path) for name, each in left.items()]
    lead = "Records that could not be read or had no usable label; each is named with its reason in the file beside it."
    table = ReportTable("Records left out at each site", ("site", "records", "listed in"), rows, ("records",))
    return Section(heading, lead, tables=[table])


# --- cost and versions -----------------------------------------------------------------------------------------------


def show_cost(run: ReportedRun) -> Section:
    """Returns the section with durations and the sizes of messages."""
    rounds = [event for _, event in sorted(select_rounds(run.events).items())]
    seconds, sizes = run.summary.seconds, run.summary.bytes
    figures = []
    if len(rounds) > 1:
        line = Series("", [event.round for event in rounds], [event.seconds for event in rounds])
        figures.append(draw_series("Seconds of each round", [line], ("round", "seconds"), frame="counts"))
    down, up, backbones = Counter[str](), Counter[str](), Counter[str]()
    for event in rounds:
        for site, update in event.sites.items():
            down[site] += update.bytes_down
            up[site] += update.bytes_up
    for sent in select_events(run.events, BackboneSent):
        backbones[sent.site] += sent.size_bytes
    times = [
        ("whole run", format_seconds(seconds.total)),
        ("sending backbones, computing features", format_seconds(seconds.features)),
        ("rounds of training", format_seconds(seconds.training)),
        ("baselines (in a simulation only)", format_seconds(seconds.baselines)),
    ]
    columns = ("site", "backbone, once", "to it in rounds", "from it in rounds")
    traffic = [
        (site, format_bytes(backbones[site]), format_bytes(down[site]), format_bytes(up[site]))
        for site in list(dict.fromkeys([*backbones, *down]))[:MOST_ROWS]
    ]
    lead = (
        "Wall-clock time, and the sizes of the messages whose replies were used: a backbone once, then small heads "
        f"each round. A round sends {format_bytes(sizes.down_per_site_round)} to a site and takes "
        f"{format_bytes(sizes.up_per_site_round)} back, on average."
    )
    tables = [
        ReportTable("Time", ("what", "duration"), times, ("duration",)),
        ReportTable("Traffic of each site", columns, traffic, columns[1:]),
    ]
    return Section("Time and traffic", lead, figures, tables if traffic else tables[:1])


def show_versions(run: ReportedRun) -> Section:
    """Returns the section with versions and digests."""
    ended, environment = select_events(run.events, RunEnded), run.environment
    rows = [
        ("run", run.started.run_id),
        ("carried by", run.summary.executor or "unknown"),
        ("began", format_time(run.events[0].time)),
        ("last event", format_time(run.events[-1].time)),
        ("final heads, SHA-256", ended[-1].heads if ended else "none: the run has not ended"),
        ("code that sites review, SHA-256", str(environment.get("code_digest", "unknown"))),
        ("Python", str(environment.get("python", "unknown"))),
        ("seeds", _list_values(environment.get("seeds"))),
        ("packages", _list_values(environment.get("packages"))),
    ]
    backbones = [
        (name, each.kind if each.model is None else f"{each.kind} {each.model}", join_words(each.tasks), each.digest)
        for name, each in run.summary.backbones.items()
    ]
    tables = [
        ReportTable("The run", ("what", "value"), rows),
        ReportTable("Backbones", ("name", "architecture", "tasks", "SHA-256"), backbones),
    ]
    lead = (
        "What the run was made with. Whoever has the same files can compare their digests with these; they do not "
        "prove who made this page."
    )
    return Section("Versions and digests", lead, tables=tables if backbones else tables[:1])


def _list_values(values: Any) -> str:
    if not isinstance(values, dict):
        return "unknown"
    return ", ".join(f"{name} {'from the system' if value is None else value}" for name, value in values.items())
