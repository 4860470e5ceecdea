"""The box at the top of a report: was it worth it, in sentences that follow from intervals.

Nothing is called better or worse whose interval holds zero. Intervals are over the choice of held-out units, of the
difference of two heads on the same units (`client.personal.intervals`): they say nothing of another run's noise.
"""

from __future__ import annotations

from collections.abc import Iterable

from common.events import (
    ALONE,
    ALONE_NOT_PRIVATE,
    FEDERATED,
    BaselineEvaluated,
    HomeEvaluated,
    MetricsEvaluated,
    select_events,
)
from common.report.judgement import Judgement, choose_metric, judge_difference, name_heads, name_metric
from common.report.page import ReportAnswer, Tone, count_of, format_estimate, format_interval, format_value, join_words
from server.reports.reported_run import ReportedRun

BASELINES = {
    "baseline_prediction": "no training",
    "local": "a site alone, private",
    "non_private": "federated, not private",
    "central": "all in one place, not private",
    "random_backbone": "random backbone, private",
    "untouched": "pre-trained model as it is",
    "untouched_restricted": "pre-trained model, symbols alone",
}
"""Name of each baseline -> what it is called on a page."""

_AT_THE_SITE = "Whether a site is better off than alone is known only there: `headwater report --site SITE.yaml`."


def list_answers(run: ReportedRun) -> list[ReportAnswer]:
    """Returns for each task what the federation brought, as far as intervals tell."""
    answers: list[ReportAnswer] = []
    for name in run.summary.tasks:
        answers += _answer_deployed(run, name) if run.is_deployed else _answer_simulated(run, name)
    return answers or [ReportAnswer("neutral", "Unknown", "The run has no task.")]


def find_metrics(run: ReportedRun, task: str) -> MetricsEvaluated | None:
    """Returns the evaluation of a task's final head by a simulator; None where there is none."""
    return next((each for each in select_events(run.events, MetricsEvaluated) if each.task == task), None)


def find_baselines(run: ReportedRun, task: str) -> dict[str, BaselineEvaluated]:
    """Returns the baselines of a task by their name; of one that a resumed run made again, the last."""
    return {each.name: each for each in select_events(run.events, BaselineEvaluated) if task in each.metrics}


def find_home(run: ReportedRun, task: str) -> HomeEvaluated | None:
    """Returns the comparison of heads on each site's own records; None where there is none."""
    return next((each for each in select_events(run.events, HomeEvaluated) if each.task == task), None)


def _answer_deployed(run: ReportedRun, task: str) -> Iterable[ReportAnswer]:
    evaluation = run.summary.tasks[task].evaluation
    if evaluation is None:
        yield ReportAnswer("neutral", "Not known here", f"Task {task}: no site released an evaluation. {_AT_THE_SITE}")
        return
    metric, value = next(iter(evaluation.metrics.items()))
    ends = evaluation.compute_interval(metric)
    if value is None or ends is None:
        said = f"Task {task}: the noise of the evaluation hides the {name_metric(metric)}. {_AT_THE_SITE}"
        yield ReportAnswer("attention", "Not readable", said)
        return
    said = (
        f"Task {task}: {name_metric(metric)} {format_value(value)} after round {evaluation.round} "
        f"({format_interval(ends)}: 95 % for the privacy noise alone), over {count_of(len(evaluation.sites), 'site')}."
    )
    yield ReportAnswer("neutral", "Not known here", f"{said} {_AT_THE_SITE}")


def _answer_simulated(run: ReportedRun, task: str) -> Iterable[ReportAnswer]:
    event = find_metrics(run, task)
    metric = None if event is None else choose_metric(event.pooled)
    if event is None or metric is None:
        yield ReportAnswer("bad", "No result", f"Task {task}: no head of it was evaluated.")
        return
    value = format_estimate(event.pooled[metric], event.pooled_intervals.get(metric))
    begun = f"Task {task}: on all sites' held-out records the federated head has {name_metric(metric)} {value}"
    known = find_baselines(run, task)
    first = next((name for name in ("local", "baseline_prediction") if name in known), None)
    if first is None:
        advice = "The run compared it with nothing; `baselines: [local, central]` in the simulation file does."
        yield ReportAnswer("neutral", "Not compared", f"{begun}. {advice}")
    else:
        yield _compare(begun, known[first], event, metric)
    price = next((name for name in ("non_private", "central") if name in known), None)
    if price is not None and run.is_private:
        yield _tell_price(known[price], event, metric)
    yield from _answer_at_home(run, event)


def _compare(begun: str, baseline: BaselineEvaluated, event: MetricsEvaluated, metric: str) -> ReportAnswer:
    """Returns the answer on what the federation brought beside a baseline.

    Args:
        begun: beginning of the sentence.
        baseline: the baseline.
        event: the evaluation of the federated head.
        metric: the metric that is compared.
    """
    other = f"{BASELINES[baseline.name]}, which has {format_value(baseline.metrics[event.task].get(metric))}"
    interval = baseline.differences.get(event.task, {}).get(metric)
    known = f"The difference is {format_interval(interval)} (95 %)"
    tone: Tone
    match judge_difference(interval, is_error=metric in event.errors):
        case "better":
            tone, word, said = (
                "good",
                "Yes",
                f"better than {other}. {known}: the choice of records does not explain it.",
            )
        case "worse":
            tone, word, said = "bad", "No", f"worse than {other}. {known}: the choice of records does not explain it."
        case "not distinguishable":
            tone, word = "attention", "Cannot be told"
            said = f"not distinguishable from {other}. {known}, which holds zero: so few held-out records do not tell."
        case _:
            tone, word = "neutral", "Not known"
            said = f"to be seen beside {other}. No interval is known, so nothing is concluded."
    return ReportAnswer(tone, word, f"{begun}. That is {said}")


def _tell_price(baseline: BaselineEvaluated, event: MetricsEvaluated, metric: str) -> ReportAnswer:
    """Returns what privacy cost beside a baseline without any.

    Args:
        baseline: the baseline.
        event: the evaluation of the federated head.
        metric: the metric that is compared.
    """
    interval = baseline.differences.get(event.task, {}).get(metric)
    beside = f"{BASELINES[baseline.name]}, it has {format_value(baseline.metrics[event.task].get(metric))}"
    known = f"the difference is {format_interval(interval)} (95 %)"
    tone: Tone = "neutral"
    match judge_difference(interval, is_error=metric in event.errors):
        case "worse":
            tone, said = "attention", f"privacy cost something: {beside}; {known}."
        case "better":
            said = f"privacy cost nothing: {beside}, which is worse; {known}."
        case "not distinguishable":
            said = f"no price can be seen: {beside}; {known}, which holds zero."
        case _:
            said = f"{beside}; no interval is known."
    return ReportAnswer(tone, "Price of privacy", f"Task {event.task}: {said}")


def _answer_at_home(run: ReportedRun, event: MetricsEvaluated) -> Iterable[ReportAnswer]:
    """Yields how many sites are better off with the federated head than alone, on their own records."""
    home = find_home(run, event.task)
    alone = next((kind for kind in (ALONE_NOT_PRIVATE, ALONE) if home and kind in home.heads), None)
    metric = choose_metric(home.heads[FEDERATED].mean) if home else None
    if home is None or alone is None or metric is None or not home.heads[alone].differences:
        return
    found = [
        judge_difference(own.get(metric), is_error=metric in event.errors)
        for own in home.heads[alone].differences.values()
    ]
    words: tuple[Judgement, ...] = ("better", "not distinguishable", "worse", "unknown")
    counts = [f"{found.count(word)} {word}" for word in words if word in found]
    tone: Tone = "bad" if "worse" in found else "good" if set(found) == {"better"} else "attention"
    said = (
        f"Task {event.task}: on each site's own held-out records, the federated head against {name_heads(alone)} "
        f"({name_metric(metric)}): {join_words(counts)}."
    )
    yield ReportAnswer(tone, "Site by site", said)
