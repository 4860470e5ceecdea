"""The sections of a run's report on what it brought: results, sites, learning, mistakes, ranking, probabilities."""

from __future__ import annotations

from collections.abc import Mapping

from common.events import (
    FEDERATED,
    BaselineEvaluated,
    Calibration,
    HeadsEvaluated,
    HomeEvaluated,
    HomeMetrics,
    Intervals,
    Metrics,
    MetricsEvaluated,
    NoisedMetrics,
    RoundEvaluated,
    select_events,
)
from common.report.figures import Estimated, Figure, Series, draw_estimates, draw_series
from common.report.judgement import choose_metric, judge_difference, name_heads, name_metric
from common.report.outcome_sections import ShownOutcomes, show_outcomes
from common.report.page import (
    ReportTable,
    Section,
    count_of,
    format_estimate,
    format_interval,
    format_value,
)
from server.reports.answers import BASELINES, find_baselines, find_home, find_metrics
from server.reports.reported_run import ReportedRun

MOST_ROWS = 60
"""Sites in one figure or table of a page."""

_MOST_FIGURES = 12
"""Sites with a figure of their own."""

_EXPLAINED = {
    "baseline_prediction": "No training: the same answer for every record, such as the most frequent one.",
    "local": "A site alone, private: each site trains by itself with the same privacy, and is judged on all sites' "
    "records; mean over the sites.",
    "non_private": "Federated, not private: the same federation without clipping and noise.",
    "central": "All in one place, not private: every record in one place, which no deployed party may have.",
    "random_backbone": "Random backbone, private: the same run on a backbone that was never trained.",
}


def show_results(run: ReportedRun) -> Section:
    """Returns the section with each task's metrics beside those of its baselines, or as sites released them."""
    heading = "Results on held-out records"
    if run.is_deployed:
        return _show_released(run, heading)
    figures, tables = [], []
    for task in run.summary.tasks:
        event = find_metrics(run, task)
        metric = None if event is None else choose_metric(event.pooled)
        if event is None or metric is None:
            continue
        rows = _list_heads(run, event)
        shown = [Estimated(name, own.get(metric), ends.get(metric), not place) for place, (name, own, ends) in rows]
        direction = "smaller is better" if metric in event.errors else "larger is better"
        figures.append(draw_estimates(f"Task {task}: {name_metric(metric)}", shown, direction))
        tables.append(
            ReportTable(
                f"Task {task}: every metric, with its 95 % interval",
                ("heads", *map(name_metric, event.pooled)),
                [
                    (name, *(format_estimate(own[key], ends.get(key)) if key in own else "" for key in event.pooled))
                    for _, (name, own, ends) in rows
                ],
            )
        )
    if not figures:
        return Section(heading, "No head of this run was evaluated, so there is nothing to compare.")
    lead = (
        "The federated heads beside what they are compared with, on the same held-out records of all sites together. "
        "The dot is the value, the bar its 95 % interval over the choice of held-out records; it says nothing of "
        "another run's noise, which a report of several runs shows. Only a simulation can make this comparison: it "
        "stands outside the privacy promise."
    )
    known = {each.name for each in select_events(run.events, BaselineEvaluated)}
    return Section(heading, lead, figures, tables, [text for name, text in _EXPLAINED.items() if name in known])


def _list_heads(run: ReportedRun, event: MetricsEvaluated) -> list[tuple[int, tuple[str, Metrics, Intervals]]]:
    """Returns the name, the metrics and their intervals of the federated head, then of each baseline, numbered."""
    own = "federated, private" if run.is_private else "federated, not private"
    rows: list[tuple[str, Metrics, Intervals]] = [(own, event.pooled, event.pooled_intervals)]
    rows += [
        (BASELINES.get(name, name), each.metrics[event.task], each.intervals.get(event.task, {}))
        for name, each in find_baselines(run, event.task).items()
    ]
    return list(enumerate(rows))


def _show_released(run: ReportedRun, heading: str) -> Section:
    figures, tables = [], []
    for name, task in run.summary.tasks.items():
        found = task.evaluation
        if found is None:
            continue
        rows = [Estimated(name_metric(key), value, found.compute_interval(key)) for key, value in found.metrics.items()]
        figures.append(draw_estimates(f"Task {name}: after round {found.round}", rows, "value"))
        error = "standard error of the noise"
        tables.append(
            ReportTable(
                f"Task {name}: noised metrics after round {found.round}, over {count_of(len(found.sites), 'site')}",
                ("metric", "value", error),
                [
                    (
                        name_metric(key),
                        "not readable" if value is None else format_value(value),
                        format_value(found.standard_errors[key]),
                    )
                    for key, value in found.metrics.items()
                ],
                ("value", error),
            )
        )
    if not figures:
        return Section(
            heading,
            "No site released an evaluation: the run does not ask for one (`evaluation` in the run file), or no site "
            "allows it. Each site evaluates the heads for itself.",
        )
    lead = (
        "Metrics on the sites' held-out records, from sums that the sites released with noise and paid for. The bar is "
        "a 95 % interval for that noise alone; how few records are held out is not known here."
    )
    return Section(heading, lead, figures, tables)


# --- sites -----------------------------------------------------------------------------------------------------------


def show_sites(run: ReportedRun) -> Section:
    """Returns the section with the metrics on each site's own records."""
    heading = "Site by site"
    if run.is_deployed:
        return Section(
            heading,
            "A coordinator sees sums over all sites only. Each site sees its own comparison with "
            "`headwater report --site SITE.yaml`, which stays there.",
        )
    figures: list[Figure] = []
    tables: list[ReportTable] = []
    for task in run.summary.tasks:
        event, home = find_metrics(run, task), find_home(run, task)
        if home is not None:
            figures += _draw_home(home)
            tables += _tabulate_home(home, event.errors if event else ())
        elif event is not None and event.per_site and (metric := choose_metric(event.pooled)) is not None:
            figures.append(_draw_per_site(event, metric))
            tables.append(_tabulate_per_site(event))
    if not figures:
        return Section(heading, "No site's own held-out records were evaluated.")
    lead = (
        "The heads on each site's own held-out records. A site has few of them, so intervals are wide: heads of which "
        "the table says `not distinguishable` may differ, but these records do not tell."
    )
    if all(find_home(run, task) is None for task in run.summary.tasks):
        lead += " With `personal` in the simulation file it also shows heads that each site adapted or trained alone."
    return Section(heading, lead, figures, tables)


def _draw_per_site(event: MetricsEvaluated, metric: str) -> Figure:
    rows = [Estimated("all sites", event.pooled[metric], event.pooled_intervals.get(metric), main=True)]
    for site in list(event.per_site)[:MOST_ROWS]:
        ends = event.per_site_intervals.get(site, {})
        rows.append(Estimated(site, event.per_site[site].get(metric), ends.get(metric)))
    title = name_metric(metric)
    return draw_estimates(f"Task {event.task}: {title} of the federated head at each site", rows, title)


def _tabulate_per_site(event: MetricsEvaluated) -> ReportTable:
    rows = []
    for site in list(event.per_site)[:MOST_ROWS]:
        own, ends = event.per_site[site], event.per_site_intervals.get(site, {})
        rows.append((site, *(format_estimate(own.get(key), ends.get(key)) for key in event.pooled)))
    caption = f"Task {event.task}: the federated head on each site's own records, with 95 % intervals"
    return ReportTable(caption, ("site", *map(name_metric, event.pooled)), rows)


def _draw_home(home: HomeEvaluated) -> list[Figure]:
    """Returns the kinds of heads as the mean over the sites, and at each of the first sites."""
    metric = choose_metric(home.heads[FEDERATED].mean)
    if metric is None:
        return []
    title = name_metric(metric)
    rows = [
        Estimated(name_heads(kind), own.mean[metric], own.mean_intervals.get(metric), kind == FEDERATED)
        for kind, own in home.heads.items()
    ]
    figures = [draw_estimates(f"Task {home.task}: {title}, mean over the sites", rows, title)]
    for site in list(home.heads[FEDERATED].per_site)[:_MOST_FIGURES]:
        here = [
            Estimated(
                name_heads(kind),
                own.per_site[site].get(metric),
                own.per_site_intervals[site].get(metric),
                kind == FEDERATED,
            )
            for kind, own in home.heads.items()
            if site in own.per_site
        ]
        figures.append(draw_estimates(f"Task {home.task} at {site}: {title}", here, title))
    return figures


def _tabulate_home(home: HomeEvaluated, errors: tuple[str, ...]) -> list[ReportTable]:
    metric = choose_metric(home.heads[FEDERATED].mean)
    if metric is None:
        return []
    kinds = list(home.heads)
    rows = [
        (site, *(_describe_home(home.heads[kind], kind, site, metric, metric in errors) for kind in kinds))
        for site in list(home.heads[FEDERATED].per_site)[:MOST_ROWS]
    ]
    caption = (
        f"Task {home.task}: {name_metric(metric)} at each site with its 95 % interval, and how each kind of heads "
        "compares with the federated one there"
    )
    return [ReportTable(caption, ("site", *map(name_heads, kinds)), rows)]


def _describe_home(own: HomeMetrics, kind: str, site: str, metric: str, is_error: bool) -> str:
    """Returns a metric at one site with its interval, and how it compares with the federated head's.

    Args:
        own: metrics of the kind of heads.
        kind: the kind.
        site: the site.
        metric: the metric.
        is_error: whether it is the better the smaller it is.
    """
    if site not in own.per_site:
        return ""
    text = format_estimate(own.per_site[site].get(metric), own.per_site_intervals[site].get(metric))
    judged = judge_difference(own.differences.get(site, {}).get(metric), is_error=is_error)
    if kind == FEDERATED or judged == "unknown":
        return text
    # The interval is of the federated head's metric minus this one.
    return f"{text}, {'worse' if judged == 'better' else 'better' if judged == 'worse' else judged}"


# --- learning --------------------------------------------------------------------------------------------------------


def show_learning(run: ReportedRun) -> Section:
    """Returns the section with the main metric after each round."""
    heading = "Learning over the rounds"
    figures, tables = [], []
    for task in run.summary.tasks:
        exact = {each.round: each.pooled for each in select_events(run.events, RoundEvaluated) if each.task == task}
        noised = {
            each.round: each.tasks[task] for each in select_events(run.events, HeadsEvaluated) if task in each.tasks
        }
        found: list[Metrics] = [*exact.values(), *(each.metrics for each in noised.values())]
        metric = next((name for each in found if (name := choose_metric(each)) is not None), None)
        if metric is None:
            continue
        title = name_metric(metric)
        lines = _list_learning(exact, noised, metric)
        figures.append(draw_series(f"Task {task}: {title} after each round", lines, ("round", title)))
        rows = [
            (
                str(number),
                format_value(exact[number].get(metric)) if number in exact else "",
                *([_describe_noised(noised.get(number), metric)] if noised else []),
            )
            for number in sorted({*exact, *noised})
        ]
        columns = ("round", "exact", "with noise (95 %)")[: 3 if noised else 2]
        tables.append(ReportTable(f"Task {task}: {title} after each round", columns, rows, columns[1:]))
    if not figures:
        return Section(heading, _explain_no_learning(run))
    lead = (
        "The main metric on held-out records after each round. A line that still rises at the end asks for more "
        "rounds, one that falls for fewer or smaller steps. A band is a 95 % interval for the privacy noise of a "
        "released evaluation; no line shows how far another choice of held-out records would move it."
    )
    return Section(heading, lead, figures, tables)


def _list_learning(exact: Mapping[int, Metrics], noised: Mapping[int, NoisedMetrics], metric: str) -> list[Series]:
    """Returns the lines of one task: exact values, and those that were released with noise.

    Args:
        exact: round -> metrics as the simulator saw them.
        noised: round -> metrics as sites released them.
        metric: the metric.
    """
    seen = [(at, value) for at, own in sorted(exact.items()) if (value := own.get(metric)) is not None]
    released = [
        (at, own.metrics[metric] or 0.0, ends)
        for at, own in sorted(noised.items())
        if (ends := own.compute_interval(metric)) is not None
    ]
    lines = [
        Series("exact, seen by the simulator", [at for at, _ in seen], [value for _, value in seen]),
        Series(
            "released with noise",
            [at for at, _, _ in released],
            [value for _, value, _ in released],
            [low for _, _, (low, _) in released],
            [high for _, _, (_, high) in released],
        ),
    ]
    return [line for line in lines if line.xs]


def _describe_noised(found: NoisedMetrics | None, metric: str) -> str:
    """Returns a released metric with its interval; an empty text where none was released."""
    if found is None:
        return ""
    ends = found.compute_interval(metric)
    return "not readable" if ends is None else format_estimate(found.metrics[metric], ends)


def _explain_no_learning(run: ReportedRun) -> str:
    if not run.is_deployed:
        return "The journal of this run holds no evaluation between its rounds: an earlier version wrote it."
    return (
        "Nothing readable was evaluated between the rounds of this run: `evaluation: {every: 1}` in the run file lets "
        "sites release noised sums for it, which costs budget."
    )


# --- counts ----------------------------------------------------------------------------------------------------------


def show_final_heads(run: ReportedRun) -> list[Section]:
    """Returns the sections on mistakes, ranking and probabilities of the final heads."""
    shown: list[ShownOutcomes] = []
    remarks = []
    for name, task in run.summary.tasks.items():
        event = find_metrics(run, name)
        if event is not None and event.outcomes is not None:
            shown.append(ShownOutcomes(f"Task {name}", event.outcomes))
        released = [each for each in select_events(run.events, HeadsEvaluated) if name in each.outcomes]
        if released:
            title = f"Task {name}, with noise, after round {released[-1].round}"
            shown.append(ShownOutcomes(title, released[-1].outcomes[name]))
        if task.evaluation is not None and task.evaluation.calibration is not None:
            remarks.append(_describe_temperature(name, task.evaluation.calibration))
    return show_outcomes(shown, remarks)


def _describe_temperature(task: str, calibration: Calibration) -> str:
    """Returns a sentence on the temperature that noised sums tell."""
    gap, temperature = calibration.confidence_gap, calibration.temperature
    if gap is None:
        return f"Task {task}: how far confidence and accuracy are apart cannot be read through the noise."
    error = format_value(calibration.standard_error)
    said = f"Task {task}: mean confidence minus accuracy is {gap:+.3f} (standard error of the noise {error})"
    if temperature is None:
        return f"{said}; no temperature can be told through the noise."
    between = format_interval(calibration.interval)
    return f"{said}; the served model divides outputs by {temperature:.2f} ({between}, one standard error) to mend it."
