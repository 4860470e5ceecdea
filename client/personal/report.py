"""A site's own report: results on its own held-out records, its budget over time, what was sent and what was left out.

It is made at the site, of the site's own records and journals without noise, and its first line says that it must not
leave. Nothing is sent, and nothing is charged.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from client.config import SiteConfig
from client.data.prepare import PROBLEMS
from client.ledger.events import EVALUATION, ChargeReserved, LedgerLine
from client.ledger.history import History
from client.ledger.ledger import Ledger
from client.ledger.log import LoggedRelease, Statement, statement
from client.ledger.place import locate_ledgers
from client.personal.evaluate import HomePredictions, predict_at_home
from client.personal.intervals import Estimates, estimate_metrics, list_differences, list_intervals, list_values
from client.protocol.site import FINAL_HEADS, Site, SiteDeclined, joined_run
from common.events import (
    ALONE,
    ALONE_NOT_PRIVATE,
    FEDERATED,
    Outcomes,
    RunAudited,
    RunPrepared,
    SiteEvent,
    read_site_journal,
    select_events,
)
from common.privacy.accounting import round_up
from common.process.html import format_time
from common.report.figures import Estimated, Series, draw_estimates, draw_series
from common.report.judgement import choose_metric, judge_difference, name_heads, name_metric
from common.report.outcome_sections import ShownOutcomes, show_outcomes
from common.report.page import (
    ReportAnswer,
    ReportPage,
    ReportTable,
    Section,
    Tone,
    count_of,
    format_bytes,
    format_estimate,
    format_interval,
    format_value,
    join_words,
)
from common.tasks import EXACT_BUCKETS, CountedOutcomes, Task
from common.tasks.parts.outcomes import join_score_ranges
from common.types import BadInput, explain_rejection

_MOST_POINTS = 200
"""Points of the line of the budget."""

_UNITS = (("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))


@dataclass(frozen=True)
class SiteRun:
    """A run at this site, as far as it can be shown.

    Attributes:
        run_id: id of the run; None where the site has joined none.
        estimates: task -> kind of heads -> metrics on the site's held-out units.
        errors: task -> metrics that are the better the smaller they are.
        outcomes: task -> counts of the federated head's predictions.
        num_held_out: number of held-out units.
        missing: why there are no results; an empty text where there are.
    """

    run_id: str | None
    estimates: Mapping[str, Mapping[str, Estimates]] = field(default_factory=dict)
    errors: Mapping[str, frozenset[str]] = field(default_factory=dict)
    outcomes: Mapping[str, Outcomes] = field(default_factory=dict)
    num_held_out: int = 0
    missing: str = ""


def make_site_page(
    site: Site,
    run_id: str | None,
    observe: Callable[[str, int, int], None],
    examples: Sequence[Section] = (),
) -> ReportPage:
    """Returns a site's report of one run and of its budget.

    Args:
        site: the site.
        run_id: id of the run; by default the one whose final heads arrived last, else the one joined last.
        observe: receives the progress: phase, number of steps done, number of all steps.
        examples: sections with records of the site, as labelled and as predicted; none where its tasks have none.

    Raises:
        BadInput: the site did not join the run.
        LedgerDamaged: its ledger does not verify.
    """
    observe("heads of this site", 0, 1)
    run = evaluate_run(site, run_id)
    observe("heads of this site", 1, 1)
    config, events = site.config, read_site_journal(site.config.coordinator_dir / "site.jsonl")
    page = statement(config)
    ledger = Ledger.find(locate_ledgers(config), config.registry)
    lines = [] if ledger is None else ledger.lines()
    shown = [ShownOutcomes(f"Task {task}", outcomes) for task, outcomes in run.outcomes.items()]
    named = f"run {run.run_id}" if run.run_id else "no run"
    return ReportPage(
        title=f"Site {config.name}: report of {named}",
        introduction=(
            f"What site {config.name} got from the federation, and what it gave. The results are of its own held-out "
            f"records ({count_of(run.num_held_out, 'unit')}) without noise; nothing was sent or spent to make this "
            "page."
        ),
        question="Was it worth it for this site?",
        answers=list_site_answers(run),
        sections=[
            _show_results(run),
            *examples,
            *show_outcomes(shown),
            show_budget(config, lines),
            show_sent(page, config, run.run_id),
            _show_declined(page),
            _show_left_out(config, events, run.run_id),
            _show_audit(events, run.run_id),
        ],
        footer="Made by `headwater report --site` at the site. The page holds no script and loads nothing.",
        notices=[
            "This page must not leave the site: its results follow from the site's own records without any noise."
        ],
    )


def evaluate_run(site: Site, run_id: str | None) -> SiteRun:
    """Returns the results of a run at this site, or why there are none.

    Args:
        site: the site.
        run_id: id of the run; by default the one whose final heads arrived last, else the one joined last.

    Raises:
        BadInput: the site did not join the run.
    """
    chosen = run_id or find_reported_run(site.config)
    if chosen is None:
        return SiteRun(None, missing="This site has joined no run yet.")
    try:
        joined_run(site, chosen)
    except SiteDeclined as declined:
        raise BadInput(f"--run {chosen}: {declined.detail}") from declined
    try:
        found = predict_at_home(site, chosen, lenient=True)
    except BadInput as error:
        return SiteRun(chosen, missing=f"There are no results to show: {error}.")
    return _judge(found)


def _judge(found: HomePredictions) -> SiteRun:
    statistics = {name: task.statistic(EXACT_BUCKETS) for name, task in found.tasks.items()}
    return SiteRun(
        found.run_id,
        {
            name: {kind: estimate_metrics(found.tasks[name], [each]) for kind, each in own.items()}
            for name, own in found.outputs.items()
        },
        {name: statistic.errors for name, statistic in statistics.items()},
        {
            name: outcomes
            for name, own in found.outputs.items()
            if (outcomes := _count(found.tasks[name], own[FEDERATED].outputs, own[FEDERATED].labels)) is not None
        },
        found.num_held_out,
    )


def _count(task: Task, outputs: torch.Tensor, labels: torch.Tensor) -> Outcomes | None:
    if not isinstance(task, CountedOutcomes):
        return None
    sums_S = task.statistic(EXACT_BUCKETS).sums(outputs, labels)
    return join_score_ranges(task.count_outcomes(sums_S.numpy(), 0.0))


def find_reported_run(config: SiteConfig) -> str | None:
    """Returns the run whose final heads arrived last, else the one joined last; None where none was joined."""
    for pattern in (f"runs/*/{FINAL_HEADS}", "runs/*/offer.json"):
        paths = sorted(config.coordinator_dir.glob(pattern), key=lambda path: path.stat().st_mtime)
        if paths:
            return paths[-1].parent.name
    return None


# --- results ---------------------------------------------------------------------------------------------------------


def list_site_answers(run: SiteRun) -> list[ReportAnswer]:
    """Returns for each task how the federated head compares with heads that the site trained alone."""
    if run.missing:
        return [ReportAnswer("neutral", "Not known", run.missing)]
    return [answer for task, heads in run.estimates.items() for answer in _compare(run, task, heads)] or [
        ReportAnswer("neutral", "Not known", "No held-out record of this site has a label of the run's tasks.")
    ]


def _compare(run: SiteRun, task: str, heads: Mapping[str, Estimates]) -> list[ReportAnswer]:
    """Returns the answers on one task.

    Args:
        run: the run.
        task: the task.
        heads: kind of heads -> its metrics.
    """
    federated = heads[FEDERATED]
    metric = choose_metric(list_values(federated))
    if metric is None:
        return [ReportAnswer("neutral", "Not known", f"Task {task}: the metrics are undefined on so few records.")]
    answers = []
    for kind in (ALONE_NOT_PRIVATE, ALONE):  # Of its own records a site may make any use.
        if kind not in heads:
            continue
        interval = list_differences(federated, heads[kind]).get(metric)
        judged = judge_difference(interval, is_error=metric in run.errors[task])
        tone: Tone = {"better": "good", "worse": "bad", "not distinguishable": "attention"}.get(judged, "neutral")  # type: ignore[assignment]
        word = {"better": "Yes", "worse": "No", "not distinguishable": "Cannot be told"}.get(judged, "Not known")
        value = format_estimate(federated[metric].value, federated[metric].interval)
        between = f"; the difference is {format_interval(interval)} (95 %)" if interval is not None else ""
        said = (
            f"Task {task}: the federated head has {name_metric(metric)} {value}, {judged} "
            f"{'than' if judged in ('better', 'worse') else 'from' if interval is not None else 'beside'} "
            f"{kind}, which has {format_value(heads[kind][metric].value)}{between}."
        )
        answers.append(ReportAnswer(tone, word, said))
    return answers


def _show_results(run: SiteRun) -> Section:
    heading = "Results on this site's held-out records"
    if run.missing:
        return Section(heading, run.missing)
    figures, tables = [], []
    for task, heads in run.estimates.items():
        metric = choose_metric(list_values(heads[FEDERATED]))
        if metric is None:
            continue
        title = name_metric(metric)
        rows = [
            Estimated(name_heads(kind), own[metric].value, own[metric].interval, kind == FEDERATED)
            for kind, own in heads.items()
        ]
        figures.append(draw_estimates(f"Task {task}: {title}", rows, title))
        keys = list(heads[FEDERATED])
        cells = [
            (name_heads(kind), *(format_estimate(list_values(own)[key], list_intervals(own)[key]) for key in keys))
            for kind, own in heads.items()
        ]
        caption = f"Task {task}: every metric, with its 95 % interval"
        tables.append(ReportTable(caption, ("heads", *map(name_metric, keys)), cells))
    if not figures:
        return Section(heading, "No held-out record of this site has a label of the run's tasks.")
    lead = (
        "The federated head beside heads that this site adapted to itself or trained alone, on its own held-out "
        "records. The dot is the value, the bar its 95 % interval over the choice of these records: few records make "
        "it wide, and heads whose bars overlap may not differ. Heads that were trained alone with the run's privacy "
        "have noise that is drawn again each time this page is made. It says nothing of another hospital's patients."
    )
    return Section(heading, lead, figures, tables)


# --- budget and releases ---------------------------------------------------------------------------------------------


def show_budget(config: SiteConfig, lines: Sequence[LedgerLine]) -> Section:
    """Returns the section with epsilon over time, from the ledger.

    Args:
        config: the site's settings.
        lines: the ledger's lines, in order; empty where there is no ledger yet.
    """
    heading = "Budget over time"
    places = [place for place, line in enumerate(lines) if isinstance(line.event, ChargeReserved)]
    if not places:
        return Section(heading, f"Nothing was charged to the budget of population {config.registry} yet.")
    chosen = [places[round(step)] for step in _spread(len(places), _MOST_POINTS)]
    times = [lines[place].time for place in chosen]
    epsilons = [History.of(lines[: place + 1]).compute_epsilon(quick=True) for place in chosen]
    terms, whole = History.of(lines).terms, History.of(lines)
    unit, length = next((name, size) for name, size in _UNITS if times[-1] - times[0] >= 2 * size or size == 1.0)
    figures = []
    if math.isfinite(epsilons[-1]):
        line = Series("epsilon spent, at most", [(time - times[0]) / length for time in times], epsilons)
        axes = (f"{unit} since {format_time(times[0])}", "epsilon")
        caption = f"Population {config.registry}: epsilon of everything released"
        figures.append(draw_series(caption, [line], axes, limit=terms.epsilon_cap, frame="counts", steps=True))
    runs = list(dict.fromkeys(charge.run for charge in whole.charges.values()))
    rows = []
    for run in runs:
        own = [charge for charge in whole.charges.values() if charge.run == run]
        evaluations = sum(charge.purpose == EVALUATION for charge in own)
        epsilon = whole.compute_run_epsilon(run, quick=True)
        rows.append((run, str(len(own) - evaluations), str(evaluations), _format_epsilon(epsilon)))
    columns = ("run", "charges for training", "for evaluation", "epsilon by itself, at most")
    table = ReportTable("Charges of each run", columns, rows, columns[1:])
    lead = (
        f"Epsilon bounds what anyone may learn about one {terms.unit} from everything that left this site's "
        f"population, all runs and coordinators together, at delta {terms.delta:g}. The dashed line is the cap, "
        f"{terms.epsilon_cap:g}; what does not fit below it is refused. The epsilons of runs do not add up: the whole "
        "is less than their sum."
    )
    left = f"Spent, at most: epsilon {_format_epsilon(epsilons[-1])} of {terms.epsilon_cap:g}."
    return Section(heading, lead, figures, [table], [left])


def _spread(count: int, most: int) -> list[float]:
    """Returns evenly spread places from the first to the last, all where there are few."""
    if count <= most:
        return [float(place) for place in range(count)]
    return [place * (count - 1) / (most - 1) for place in range(most)]


def _format_epsilon(epsilon: float) -> str:
    return "infinite" if math.isinf(epsilon) else f"{round_up(epsilon):.2f}"


def show_sent(page: Statement, config: SiteConfig, run_id: str | None) -> Section:
    """Returns the section with what left the site for a run.

    Args:
        page: everything that the site released.
        config: the site's settings.
        run_id: id of the run; None where none was joined.
    """
    heading = "What was sent"
    charged = None if run_id is None else config.name_charge(run_id)
    own = [each for each in page.releases if each.run == charged]
    if not own:
        return Section(heading, "Nothing that follows from a record was sent for this run.")
    rows = [
        (
            format_time(each.time),
            str(each.round),
            each.purpose,
            _describe_noise(each),
            "none stored" if each.bytes is None else format_bytes(each.bytes),
            str(each.resent),
        )
        for each in own
    ]
    total = sum(each.bytes or 0 for each in own)
    lead = (
        f"Every reply of this run that follows from records: {count_of(len(own), 'release')}, {format_bytes(total)} "
        "in all. Each was charged before it was computed; one that was asked for again was sent again as stored, for "
        "nothing."
    )
    columns = ("time", "round", "for", "noise", "size", "sent again")
    return Section(heading, lead, tables=[ReportTable("Releases", columns, rows, ("round", "sent again"))])


def _describe_noise(release: LoggedRelease) -> str:
    mechanism = release.mechanism
    if mechanism is None:
        return "not known: the ledger was damaged"
    if mechanism.kind == "none":
        return "none"
    return f"{count_of(mechanism.steps, 'sum')}, {mechanism.noise_multiplier:.3g} times the bound on one unit"


def _show_declined(page: Statement) -> Section:
    heading = "What this site refused"
    if not page.refusals:
        return Section(heading, "This site refused no request.")
    counts = Counter((each.source, explain_rejection(f"declined: {each.reason}")) for each in page.refusals)
    last = {(each.source, explain_rejection(f"declined: {each.reason}")): each for each in page.refusals}
    rows = [
        (reason.removeprefix("declined: "), source, str(count), format_time(last[source, reason].time))
        for (source, reason), count in counts.items()
    ]
    lead = (
        "Requests that were declined, of all runs; the coordinator learns one word of a fixed list. The details stand "
        "in `headwater site log`."
    )
    return Section(heading, lead, tables=[ReportTable(heading, ("reason", "by", "times", "last"), rows, ("times",))])


def _show_left_out(config: SiteConfig, events: Sequence[SiteEvent], run_id: str | None) -> Section:
    """Returns the section with the records of this site that could not be used.

    Args:
        config: the site's settings.
        events: the site's journal.
        run_id: id of the run; None where none was joined.
    """
    heading = "Records that were left out"
    prepared = [each for each in select_events(events, RunPrepared) if each.run_id == run_id]
    if not prepared:
        return Section(heading, "This site has prepared no records for the run.")
    found = prepared[-1]
    whole = "" if found.num_records is None else f" of {count_of(found.num_records, 'record')}"
    if not found.num_left_out:
        return Section(heading, f"Nothing{whole} was left out.")
    path = config.coordinator_dir / "runs" / found.run_id / PROBLEMS
    reasons = _count_reasons(path)
    rows = [(reason, str(count)) for reason, count in reasons.most_common(40)]
    lead = f"{found.num_left_out}{whole} were left out. Each is named, by file and row, in {path}."
    tables = [ReportTable("Reasons", ("reason", "records"), rows, ("records",))] if rows else []
    return Section(heading, lead, tables=tables)


def _count_reasons(path: Path) -> Counter[str]:
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            return Counter(row.get("reason") or "no reason is known" for row in csv.DictReader(file))
    except (OSError, csv.Error):
        return Counter()


def _show_audit(events: Sequence[SiteEvent], run_id: str | None) -> Section:
    heading = "Privacy audit"
    audited = [each for each in select_events(events, RunAudited) if each.run_id == run_id]
    if not audited:
        return Section(heading, "The run required no audit of this site, or none was made.")
    verdict = audited[-1].verdict
    outcome = "passed" if verdict.passed else f"FAILED: {join_words(verdict.reasons)}"
    return Section(
        heading,
        f"The audit {outcome}. An attack on made-up records shows that epsilon is at least "
        f"{verdict.epsilon_lower_95:.2f} (95 % confidence); {round_up(verdict.epsilon_claimed):.2f} is claimed. Noise "
        f"as measured / as claimed: {verdict.noise_std_ratio:.3f}.",
    )
