"""The report of several runs: what differs between them, and what came of it.

Runs have their own held-out records and their own noise: two whose intervals overlap are not told apart, and no
difference between runs is called better or worse. Runs that differ in their seeds alone show how far noise moves a
result: their mean and standard deviation stand beside each other.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from common.events import HeadsEvaluated, Interval, Metrics, RoundEvaluated, select_events
from common.privacy.accounting import round_up
from common.report.figures import MOST_SERIES, Estimated, Series, draw_estimates, draw_series
from common.report.judgement import choose_metric, name_metric
from common.report.page import (
    ReportAnswer,
    ReportPage,
    ReportTable,
    Section,
    count_of,
    format_bytes,
    format_estimate,
    format_seconds,
    format_value,
    join_words,
)
from server.reports.answers import BASELINES, find_metrics
from server.reports.reported_run import ReportedRun
from server.reports.run_report import FOOTER, list_notices

_MOST_NAMED = 3
"""Settings in the name of a run."""

_MOST_SETTINGS = 40
"""Settings in the table of what differs."""

_PLACES = ("cache_dir", "runs_dir", "sweep.")
_SEEDS = ("seed", "noise_seed")


def make_comparison_page(runs: Sequence[ReportedRun]) -> ReportPage:
    """Returns the report of several runs."""
    names = name_runs(runs)
    tasks = list(dict.fromkeys(task for run in runs for task in run.summary.tasks))
    notices = [f"{name}: {sentence}" for name, run in zip(names, runs, strict=True) for sentence in list_notices(run)]
    return ReportPage(
        title=f"Comparison of {count_of(len(runs), 'run')}",
        introduction=f"The runs: {join_words(names, 20)}. A report of one run alone shows more of it.",
        question="Which did better?",
        answers=[_answer(runs, names, task) for task in tasks]
        or [ReportAnswer("neutral", "Unknown", "The runs have no task.")],
        sections=[
            _show_differences(runs, names),
            _show_results(runs, names, tasks),
            _show_seeds(runs, tasks),
            _show_learning(runs, names, tasks),
            _show_cost(runs, names),
        ],
        footer=FOOTER,
        notices=notices[:12],
    )


def name_runs(runs: Sequence[ReportedRun]) -> list[str]:
    """Returns a name for each run, no two alike: what sets it apart where that is little, else that of its folder."""
    keys = list_differences(runs)
    if 0 < len(keys) <= _MOST_NAMED:
        names = [
            ", ".join(f"{key.rpartition('.')[2]} {run.settings.get(key, 'not set')}" for key in keys) for run in runs
        ]
    else:
        names = [run.folder.name or run.started.run_id for run in runs]
    seen, counts = Counter[str](), Counter(names)
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(name if counts[name] == 1 else f"{name} ({seen[name]})")
    return unique


def list_differences(runs: Sequence[ReportedRun]) -> list[str]:
    """Returns the settings in which the runs differ, without places on disk; partition and run share their seed."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    different = [
        key for key in keys if not key.startswith(_PLACES) and len({run.settings.get(key) for run in runs}) > 1
    ]
    # A sweep sets both seeds to the same number.
    both = {"run.seed", "partition.seed"} <= set(different)
    same = both and all(run.settings.get("run.seed") == run.settings.get("partition.seed") for run in runs)
    kept = [key for key in different if not (same and key == "partition.seed")]
    return sorted(kept, key=lambda key: key.rpartition(".")[2] in _SEEDS)


def _find_result(run: ReportedRun, task: str) -> tuple[str, float, Interval | None] | None:
    """Returns the main metric of a task, its value and its interval: exact, or for the noise as released."""
    event = find_metrics(run, task)
    metric = choose_metric(event.pooled) if event is not None else None
    if event is not None and metric is not None:
        return metric, event.pooled[metric] or 0.0, event.pooled_intervals.get(metric)
    evaluation = run.summary.tasks[task].evaluation if task in run.summary.tasks else None
    metric = choose_metric(evaluation.metrics) if evaluation is not None else None
    if evaluation is None or metric is None:
        return None
    return metric, evaluation.metrics[metric] or 0.0, evaluation.compute_interval(metric)


def _answer(runs: Sequence[ReportedRun], names: Sequence[str], task: str) -> ReportAnswer:
    """Returns which run has the best result of a task, and which cannot be told from it."""
    found = [(name, each) for name, run in zip(names, runs, strict=True) if (each := _find_result(run, task))]
    metric = found[0][1][0] if found else ""
    if not found or any(each[0] != metric for _, each in found):
        return ReportAnswer("neutral", "Not comparable", f"Task {task}: the runs have no common metric of it.")
    is_error = any(event is not None and metric in event.errors for run in runs for event in [find_metrics(run, task)])
    best, (_, value, interval) = (min if is_error else max)(found, key=lambda each: each[1][1])
    others = [(name, each[2]) for name, each in found if name != best]
    begun = f"Task {task}: {name_metric(metric)} is best for {best}, with {format_estimate(value, interval)}"
    if interval is None or any(ends is None for _, ends in others):
        return ReportAnswer("neutral", "Not known", f"{begun}. Some runs have no interval, so nothing is concluded.")
    close = [name for name, ends in others if ends is not None and ends[0] <= interval[1] and interval[0] <= ends[1]]
    if close:
        said = f"Its interval overlaps with that of {join_words(close)}: they cannot be told apart by it."
        return ReportAnswer(
            "attention", "Cannot be told" if len(close) == len(others) else "In part", f"{begun}. {said}"
        )
    return ReportAnswer("good", best, f"{begun}. Its interval overlaps with no other run's.")


def _show_differences(runs: Sequence[ReportedRun], names: Sequence[str]) -> Section:
    keys = list_differences(runs)
    heading = "What differs between the runs"
    if not keys:
        return Section(heading, "Their files hold the same settings, or a run's folder keeps no file.")
    shown = keys[:_MOST_SETTINGS]
    left = len(keys) - len(shown)
    columns, rows = ("setting", *names), [(key, *(run.settings.get(key, "not set") for run in runs)) for key in shown]
    if len(runs) > len(shown):
        columns, *rows = zip(*[("run", *names), *rows], strict=True)
    lead = "The settings of the runs' files that are not the same in all of them; everything else is."
    remarks = [f"{left} further settings differ."] if left else []
    return Section(heading, lead, tables=[ReportTable("Settings", columns, rows)], remarks=remarks)


def _show_results(runs: Sequence[ReportedRun], names: Sequence[str], tasks: Sequence[str]) -> Section:
    figures, tables = [], []
    for task in tasks:
        found = [_find_result(run, task) for run in runs]
        metric = next((each[0] for each in found if each is not None), None)
        if metric is None:
            continue
        title = name_metric(metric)
        rows = [
            Estimated(name, each[1] if each else None, each[2] if each else None)
            for name, each in zip(names, found, strict=True)
        ]
        figures.append(draw_estimates(f"Task {task}: {title}", rows, title))
        tables.append(_tabulate_task(runs, names, task))
    heading = "Results on held-out records"
    if not figures:
        return Section(heading, "No run has a result that could be shown.")
    lead = (
        "The main metric of each run's federated heads. The bar is a 95 % interval over the choice of held-out records "
        "(of a deployed run: for the noise of what sites released). Runs whose bars overlap are not told apart."
    )
    return Section(heading, lead, figures, tables)


def _tabulate_task(runs: Sequence[ReportedRun], names: Sequence[str], task: str) -> ReportTable:
    """Returns every metric of a task, a row for each run and for each of its baselines.

    Args:
        runs: the runs.
        names: their names.
        task: the task.
    """
    rows: list[tuple[str, Metrics, dict[str, Interval | None]]] = []
    for name, run in zip(names, runs, strict=True):
        summary, event = run.summary.tasks.get(task), find_metrics(run, task)
        if summary is None:
            continue
        if event is not None:
            rows.append((name, event.pooled, dict(event.pooled_intervals)))
        elif summary.evaluation is not None:
            rows.append((f"{name}, with noise", summary.evaluation.metrics, {}))
        rows += [(f"{name}: {BASELINES.get(key, key)}", metrics, {}) for key, metrics in summary.baselines.items()]
    keys = list(dict.fromkeys(key for _, metrics, _ in rows for key in metrics))
    cells = [
        (name, *(format_estimate(metrics[key], ends.get(key)) if key in metrics else "" for key in keys))
        for name, metrics, ends in rows
    ]
    return ReportTable(f"Task {task}: every metric", ("run", *map(name_metric, keys)), cells)


def _show_seeds(runs: Sequence[ReportedRun], tasks: Sequence[str]) -> Section:
    heading = "How far noise moves the result"
    keys = [key for key in list_differences(runs) if key.rpartition(".")[2] not in _SEEDS]
    groups: dict[tuple[str, ...], list[ReportedRun]] = {}
    for run in runs:
        groups.setdefault(tuple(run.settings.get(key, "not set") for key in keys), []).append(run)
    rows = []
    for values, own in groups.items():
        for task in tasks:
            numbers = [each[1] for run in own if (each := _find_result(run, task)) is not None]
            if len(numbers) > 1:
                mean, deviation = statistics.mean(numbers), statistics.stdev(numbers)
                shown = (format_value(mean), format_value(deviation), str(len(numbers)))
                rows.append((", ".join(values) or "all runs", task, *shown))
    if not rows:
        return Section(
            heading, "No two of these runs differ in their seeds alone; `seeds` in a file's `sweep` makes such runs."
        )
    columns = (", ".join(key.rpartition(".")[2] for key in keys) or "runs", "task", "mean", "deviation", "runs")
    if len(set(columns)) < len(columns):
        columns = ("group", *columns[1:])
    lead = (
        "Runs that differ in their seeds alone: the mean of the main metric, and the standard deviation of a single "
        "run. Settings whose means are closer than about two such deviations are not told apart by one run each."
    )
    table = ReportTable("Mean and standard deviation over seeds", columns, rows, columns[2:])
    return Section(heading, lead, tables=[table])


def _show_learning(runs: Sequence[ReportedRun], names: Sequence[str], tasks: Sequence[str]) -> Section:
    figures = []
    for task in tasks:
        lines = []
        title = ""
        for name, run in zip(names, runs, strict=True):
            points: dict[int, Metrics] = {
                each.round: each.tasks[task].metrics
                for each in select_events(run.events, HeadsEvaluated)
                if task in each.tasks
            }
            exact = {each.round: each.pooled for each in select_events(run.events, RoundEvaluated) if each.task == task}
            points = exact or points
            metric = next((found for own in points.values() if (found := choose_metric(own)) is not None), None)
            if metric is not None:
                title = name_metric(metric)
                seen = [(at, value) for at, own in sorted(points.items()) if (value := own.get(metric)) is not None]
                lines.append(Series(name, [at for at, _ in seen], [value for _, value in seen]))
        if lines:
            caption = f"Task {task}: {title} after each round"
            if len(lines) > MOST_SERIES:
                caption += f" (the first {MOST_SERIES} runs)"
            figures.append(draw_series(caption, lines[:MOST_SERIES], ("round", title)))
    heading = "Learning over the rounds"
    if not figures:
        return Section(heading, "No run evaluated anything between its rounds, or earlier versions wrote the journals.")
    return Section(
        heading,
        "The main metric on held-out records after each round, one line for each run: exact in a simulation, with "
        "noise where sites released it.",
        figures,
    )


def _show_cost(runs: Sequence[ReportedRun], names: Sequence[str]) -> Section:
    rows = []
    for name, run in zip(names, runs, strict=True):
        epsilons = [site.epsilon for site in run.summary.sites.values() if site.epsilon is not None]
        sizes = run.summary.bytes
        rows.append(
            (
                name,
                run.summary.status,
                f"{run.summary.rounds} of {run.started.rounds}",
                str(len(run.joined)),
                f"{round_up(max(epsilons)):.2f}" if epsilons else "not private",
                format_seconds(run.summary.seconds.training),
                format_bytes(sizes.up_per_site_round),
                run.started.run_id,
            )
        )
    columns = ("run", "status", "rounds", "sites", "largest epsilon", "training", "from a site, each round", "id")
    lead = "What each run cost: the largest epsilon that any site spent in it, the time of its rounds, and its traffic."
    return Section("What each run cost", lead, tables=[ReportTable("Cost", columns, rows)])
