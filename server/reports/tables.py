"""The tables that a person reads in a terminal: a run's summary, and the status of a federation."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from common.errors import list_some
from common.events import PERSONAL, AuditSummary, Calibration, Interval, SiteSummary, Summary
from common.privacy.accounting import round_up
from common.process.lines import describe_duration
from common.types import DECLINED, explain_rejection
from server.reports.status import FederationStatus, ListedRun

BASELINES = {
    "baseline_prediction": "baseline\nprediction",
    "local": "site alone\nprivate",
    "non_private": "federated\nnot private",
    "central": "central\nnot private",
    "random_backbone": "federated\nprivate\nrandom\nbackbone",
    "untouched": "pre-trained\nas it is",
    "untouched_restricted": "pre-trained\nsymbols\nalone",
}
"""Name of each baseline -> the heading of its column."""


def render_summary(summary: Summary) -> Group:
    """Returns a run's results and their cost as tables for a terminal."""
    evaluated = any(task.metrics for task in summary.tasks.values())
    results: list[RenderableType] = [_render_results(summary)] if evaluated else []
    if any(task.at_home for task in summary.tasks.values()):
        results.append(_render_at_home(summary))
    if any(task.evaluation for task in summary.tasks.values()):
        results.append(_render_evaluations(summary))
    footnote = Text(_write_footnote(summary, evaluated), no_wrap=True, overflow="ignore")
    return Group(*results, _render_sites(summary), footnote)


_MOST_ROWS = 20
"""Number of sites from which on those that have the same row share it."""


def _new_table(title: str | None, left: Sequence[str], right: Sequence[str] = ()) -> Table:
    """Returns an empty table with columns aligned left, then columns aligned right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in left:
        table.add_column(column)
    for column in right:
        table.add_column(column, justify="right")
    return table


def _render_results(summary: Summary) -> Table:
    shown = [name for name in BASELINES if any(name in task.baselines for task in summary.tasks.values())]
    private = any(site.epsilon is not None for site in summary.sites.values())
    table = _new_table(f"{summary.run}: pooled held-out records", ["task"])
    table.add_column("metric", no_wrap=True)
    table.add_column("federated\nprivate" if private else "federated\nnot private", style="bold", justify="right")
    for name in shown:
        table.add_column(BASELINES[name], justify="right")
    for name, task in summary.tasks.items():
        for position, metric in enumerate(task.metrics):
            values = [task.metrics, *(task.baselines.get(baseline, {}) for baseline in shown)]
            cells = [_format_metric(value.get(metric)) for value in values]
            table.add_row(name if position == 0 else "", metric, *cells)
    return table


def _render_at_home(summary: Summary) -> Table:
    tasks = {name: task for name, task in summary.tasks.items() if task.at_home}
    kinds = list(dict.fromkeys(kind for task in tasks.values() for kind in task.at_home))
    modes = ", ".join(dict.fromkeys(task.personal or "" for task in tasks.values()))
    headings = [f"personal\n({modes})" if kind == PERSONAL else kind.replace(", ", "\n") for kind in kinds]
    title = f"{summary.run}: each site's heads on its own held-out records, mean over sites and all records together"
    table = _new_table(title, ["task"])
    for left in ("metric", "over"):
        table.add_column(left, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, task in tasks.items():
        own = [task.at_home[kind] for kind in kinds if kind in task.at_home]
        for position, metric in enumerate(own[0].mean):
            mean = [_format_estimate(each.mean[metric], each.mean_intervals.get(metric)) for each in own]
            pooled = [_format_estimate(each.pooled[metric], each.pooled_intervals.get(metric)) for each in own]
            table.add_row(name if position == 0 else "", metric, "sites", *mean)
            table.add_row("", "", "records", *pooled)
    taken = [
        f"{site} took for {name}: {text}" for name, task in tasks.items() for site, text in task.alignments.items()
    ]
    table.caption = "\n".join(["below each metric its 95 % interval over the choice of held-out units", *taken])
    table.caption_justify = "left"
    return table


def _render_evaluations(summary: Summary) -> Table:
    title = f"{summary.run}: held-out units as the sites released them: noised, charged to their budgets"
    table = _new_table(title, ["task", "metric"], ["noised", "standard error\nof the noise"])
    table.add_column("after round")
    table.add_column("sites")
    for name, task in summary.tasks.items():
        if task.evaluation is None:
            continue
        for position, (metric, value) in enumerate(task.evaluation.metrics.items()):
            first = position == 0
            table.add_row(
                name if first else "",
                metric,
                "not readable" if value is None else _format_metric(value),
                _format_metric(task.evaluation.standard_errors[metric]),
                str(task.evaluation.round) if first else "",
                str(len(task.evaluation.sites)) if first else "",
            )
        if task.evaluation.calibration is not None:
            _add_calibration(table, task.evaluation.calibration)
    return table


def _add_calibration(table: Table, calibration: Calibration) -> None:
    """Adds the rows of a head's calibration."""
    gap, temperature = calibration.confidence_gap, calibration.temperature
    shown = "not readable" if gap is None else f"{gap:+.3f}"
    table.add_row("", "confidence - accuracy", shown, _format_metric(calibration.standard_error), "", "")
    if temperature is None:
        table.add_row("", "temperature", "not readable", "", "", "")
        return
    low, high = calibration.interval
    table.add_row("", "temperature", f"{temperature:.2f}", f"{low:.2f} to {high:.2f}", "", "")
    table.add_row("", "  gap that it leaves", _format_metric(calibration.gap_left), "", "", "")


def _render_sites(summary: Summary) -> Table:
    columns = ["site", "tasks", "status", "rounds", "epsilon\nof budget", "delta", "unit\nneighbours"]
    table = _new_table("sites", columns)
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, site in summary.sites.items():
        tasks = [task for task, result in summary.tasks.items() if name in result.sites]
        cells: tuple[str, ...] = (
            ", ".join(tasks),
            _format_status(site),
            str(site.rounds),
            _format_epsilon(site),
            f"{site.delta:g}" if site.delta else "",
            f"{site.unit}\n{site.relation}" if site.unit else "",
        )
        rows.setdefault(cells if len(summary.sites) > _MOST_ROWS else (*cells, name), []).append(name)
    for row, names in rows.items():
        table.add_row(list_some(names, 1), *row[: len(columns) - 1])
    return table


def _format_status(site: SiteSummary) -> str:
    if site.reason is None:
        return site.status
    return f"{site.status}: {explain_rejection(site.reason).removeprefix(DECLINED)}"


def _write_footnote(summary: Summary, evaluated: bool) -> str:
    """Returns the lines below the tables: records left out, audit, bytes and durations."""
    sizes, seconds = summary.bytes, summary.seconds
    missed = _list_missed(
        {name: site.missed for name, site in summary.sites.items() if site.missed},
        {name: task.missed for name, task in summary.tasks.items() if task.missed},
    )
    down, up = _format_bytes(sizes.down_per_site_round), _format_bytes(sizes.up_per_site_round)
    status = "" if summary.status == "completed" else f"{summary.status}{missed}\n"
    times = f"{seconds.features:.1f} features, {seconds.training:.1f} training, {seconds.baselines:.1f} baselines"
    left_out = [
        f"{name}: {site.left_out.num_records} record(s) left out, listed in {site.left_out.path}\n"
        for name, site in summary.sites.items()
        if site.left_out
    ]
    if len(left_out) > _MOST_ROWS:
        left_out[_MOST_ROWS:] = [f"{len(left_out) - _MOST_ROWS} more sites left records out: see summary.json\n"]
    backbone = _format_bytes(sizes.backbone_per_site)
    view = "Baselines and pooled metrics are the simulator's own view, outside the privacy promise."
    return (
        f"{''.join(left_out)}{status}{_describe_audit(summary.audit)}bytes per site and round: {down} down, {up} up; "
        f"backbone once per site: {backbone}\n"
        f"seconds: {seconds.total:.1f} in all; {times}" + (f"\n{view}" if evaluated else "")
    )


def _list_missed(sites: Mapping[str, int], tasks: Mapping[str, int]) -> str:
    """Returns the sites and tasks that missed rounds, as the end of a line; an empty text where none did."""
    missed = [*sites.items(), *((f"task {name}", count) for name, count in tasks.items())]
    return "; missed rounds: " + list_some([f"{name} {count}" for name, count in missed], _MOST_ROWS) if missed else ""


def _describe_audit(audit: AuditSummary) -> str:
    """Returns one line on the audit; an empty text where the run required none."""
    if audit.passed is None or audit.epsilon_claimed is None:
        return "audit: required; each site passed its own before it joined\n" if audit.required else ""
    verdict = "passed" if audit.passed else f"FAILED: {(audit.reasons or ('',))[0]}"
    return (
        f"audit: {verdict}; epsilon {round_up(audit.epsilon_claimed):.2f} claimed, "
        f"at least {audit.epsilon_lower_95:.2f} at 95 % confidence; noise ratio {audit.noise_std_ratio:.3f}\n"
    )


def _format_epsilon(site: SiteSummary) -> str:
    if site.epsilon is None or site.budget_epsilon is None:
        return "not private" if site.rounds else "nothing"
    return f"{round_up(site.epsilon):.2f}\nof {site.budget_epsilon:.2f}"


def _format_bytes(value: int | None) -> str:
    return "none sent" if value is None else f"{value:,}"


def _format_estimate(value: float | None, interval: Interval | None) -> str:
    """Returns a metric with its interval on a second line."""
    return _format_metric(value) + ("" if interval is None else f"\n{interval[0]:.3f}..{interval[1]:.3f}")


def _format_metric(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def render_status(status: FederationStatus) -> Group:
    """Returns the state of a federation as tables for a terminal."""
    daemon, run, certificate = status.daemon, status.run, status.certificate
    state = "not running" if not daemon.running else ("healthy" if daemon.healthy else "running, NOT HEALTHY")
    lines = [
        f"{status.federation} at {status.address}: {state}",
        f"server certificate: {certificate.days_left} days left (until {certificate.valid_until[:10]})",
    ]
    if daemon.running:
        lines.append(f"status page, with the reasons of sites that do not take part: {status.page}")
    replies: Mapping[str, int] = {}
    if run is not None:
        replies = run.replies
        begun = f"round {run.round} of {run.rounds}" if run.rounds else "a vote"
        progress = "waiting to begin" if run.rounds is None else begun
        if run.under_way and run.phase:
            progress += f", {run.phase}"
        if run.under_way and run.seconds_per_round is not None and run.seconds_left:
            progress += f", {run.seconds_per_round:.3g} s a round, {describe_duration(run.seconds_left)} left"
        missed = _list_missed(run.missed, run.tasks_missed)
        lines.append(f"run {run.id}: {progress}, {'under way' if run.under_way else run.state}{missed}")
    table = _new_table(None, ["site", "connected", "since", "replies in the run"])
    for name, site in status.sites.items():
        connected = {None: "unknown", True: "yes", False: "no"}[site.connected]
        table.add_row(name, connected, (site.since or "never")[:19], str(replies.get(name, "")))
    return Group(Text("\n".join(lines), no_wrap=True, overflow="ignore"), table)


def render_runs(runs: Sequence[ListedRun]) -> Group:
    """Returns the list of runs as a table for a terminal, with the reasons below it."""
    table = _new_table(None, ["run", "state", "round", "submitted (UTC)"])
    for run in runs:
        submitted = datetime.datetime.fromtimestamp(run.submitted_at, datetime.UTC)
        progress = f"{run.round} of {run.rounds}" if run.rounds else ""
        table.add_row(run.id, run.state, progress, f"{submitted:%Y-%m-%d %H:%M}")
    reasons = [f"{run.id}: {run.reason}" for run in runs if run.reason]
    return Group(table, Text("\n".join(reasons)))
