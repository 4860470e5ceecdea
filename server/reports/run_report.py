"""A run's report: its page, section by section. Every number is of the run's journal.

Each section begins with what is shown, how it is read and what it does not show; one that has nothing to show says why
in a sentence.
"""

from __future__ import annotations

from common.events import RunEnded, RunFailure, RunInterruption, select_events
from common.process.html import format_time
from common.report.page import ReportPage, count_of, join_words
from server.reports.answers import list_answers
from server.reports.conduct_sections import (
    show_cost,
    show_left_out,
    show_participation,
    show_privacy,
    show_rejections,
    show_versions,
)
from server.reports.reported_run import ReportedRun
from server.reports.result_sections import show_final_heads, show_learning, show_results, show_sites

FOOTER = (
    "Made by `headwater report` from what journals hold. The page holds no script and loads nothing from elsewhere."
)


def make_run_page(run: ReportedRun) -> ReportPage:
    """Returns the report of one run."""
    return ReportPage(
        title=f"Report of run {run.summary.run or run.folder.name}",
        introduction=_introduce(run),
        question="Was it worth it?",
        answers=list_answers(run),
        sections=[
            show_results(run),
            show_sites(run),
            show_learning(run),
            *show_final_heads(run),
            show_privacy(run),
            show_participation(run),
            show_rejections(run),
            show_left_out(run),
            show_cost(run),
            show_versions(run),
        ],
        footer=FOOTER,
        notices=list_notices(run),
    )


def list_notices(run: ReportedRun) -> list[str]:
    """Returns what a reader must know first: that a run failed, was interrupted, has not ended, or missed rounds."""
    rest = "The page shows what happened until then."
    failures, stops = select_events(run.events, RunFailure), select_events(run.events, RunInterruption)
    match run.summary.status:
        case "failed" if failures:
            return [f"This run failed: {failures[-1].reason.rstrip('.')}. {rest}"]
        case "failed" if not select_events(run.events, RunEnded):
            return ["This run has not ended: the page shows what its journal holds so far."]
        case "failed":
            never = [name for name, task in run.summary.tasks.items() if task.status == "never_updated"]
            return [f"This run failed: no round changed {join_words(never)}."]
        case "interrupted":
            return [f"This run was interrupted: {stops[-1].reason.rstrip('.')}. {rest}"]
        case "partial":
            return ["This run is complete, but sites or tasks missed rounds of it, or a site the final heads."]
        case _:
            return []


def _introduce(run: ReportedRun) -> str:
    summary = run.summary
    tasks = join_words([f"{name} ({task.kind})" for name, task in summary.tasks.items()])
    where = "in separate places" if run.is_deployed else "simulated on one machine"
    noise = "with noise added" if run.is_private else "without noise"
    return (
        f"{count_of(len(run.joined), 'site')} {where} trained {count_of(len(summary.tasks), 'task')} together: "
        f"{tasks}. "
        f"{summary.rounds} of {count_of(run.started.rounds, 'round')} were completed; the first event is of "
        f"{format_time(run.events[0].time)}. Only small task heads are trained, on the sites' own records; the "
        f"coordinator receives their updates, {noise}, and never a record."
    )
