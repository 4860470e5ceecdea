"""A run's summary, computed from the events of its journal. Nothing else is needed to make it.

The journal of a run that was resumed holds the events of every attempt: the last `RunStarted` counts, a site's last
`SiteJoined`, and the last evaluation after each round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeVar

from common.events import (
    AuditSummary,
    BackboneSent,
    BaselineEvaluated,
    ByteCounts,
    Durations,
    EpsilonSpent,
    EvaluationRound,
    Event,
    FeaturesReady,
    HeadsEvaluated,
    HomeEvaluated,
    LeftOut,
    MetricsEvaluated,
    MomentsMeasured,
    RecordsLeftOut,
    RoundEnded,
    RunEnded,
    RunEvent,
    RunFailure,
    RunInterruption,
    RunStarted,
    SiteJoined,
    SiteRejected,
    SiteSummary,
    SolverAudited,
    Summary,
    TaskEvaluation,
    TaskSummary,
    VotesCounted,
    select_events,
)
from common.privacy.accounting import Mechanism, compute_epsilon
from common.process.apart import run_apart
from common.types import RELATION

_AnyEvent = TypeVar("_AnyEvent", bound=Event)

FLOWER_APP = "flower_app"
"""Executor of `flwr run`: sites may be anywhere, and the coordinator sees nothing of their held-out records."""

DEPLOYMENT = "deployment"
"""Executor of `headwater coordinator start`: likewise."""


def summarize(events: Sequence[RunEvent]) -> Summary:
    """Returns the summary of a run from the events of its journal, in the order in which they were written."""
    started = _last(events, RunStarted)
    tasks = {name: _summarize_task(events, name, kind) for name, kind in (started.tasks if started else {}).items()}
    sites = _summarize_sites(events)
    return Summary(
        run=started.name if started else None,
        path=started.path if started else None,
        executor=started.executor if started else None,
        rounds=len(select_rounds(events)),
        status=find_status(events),
        backbones=started.backbones if started else {},
        tasks=tasks,
        sites=sites,
        audit=_summarize_audit(events),
        bytes=_count_bytes(events),
        seconds=_measure_durations(events),
    )


def find_status(events: Sequence[RunEvent]) -> Literal["completed", "partial", "interrupted", "failed"]:
    """Returns how the last attempt of a run ended; a run that has not ended is `failed`."""
    started = max((at for at, event in enumerate(events) if isinstance(event, RunStarted)), default=0)
    ends = [event for event in events[started:] if isinstance(event, RunEnded | RunInterruption | RunFailure)]
    match ends[:1]:
        case [RunEnded() as ended] if all(ended.updates.values()):
            missed = count_missed_rounds(events)
            short = any(count < len(select_rounds(events)) for count in ended.updates.values())
            return "partial" if short or missed or ended.missing else "completed"
        case [RunInterruption()]:
            return "interrupted"
        case _:
            return "failed"


def select_rounds(events: Sequence[RunEvent]) -> dict[int, RoundEnded]:
    """Returns the last event of each round by its number: a resumed run may repeat a round, from stored replies."""
    return {event.round: event for event in select_events(events, RoundEnded)}


def count_missed_rounds(events: Sequence[RunEvent]) -> dict[str, int]:
    """Returns the number of rounds that each site missed, of those that did: joined, and asked, and not used."""
    rounds, missed = select_rounds(events), dict[str, set[int]]()
    for event in events:
        match event:
            case SiteJoined():
                missed.setdefault(event.site, set())
            case SiteRejected(stage="backbone" | "prepare") if event.site in missed:
                # It takes no part in what follows; where it joins again, rounds that used it do not count.
                missed[event.site] |= rounds.keys()
            case SiteRejected(stage="train") if event.site in missed and event.round in rounds:
                missed[event.site].add(event.round)
    used = {site: {number for number, each in rounds.items() if site in each.sites} for site in missed}
    return {site: len(numbers - used[site]) for site, numbers in missed.items() if numbers - used[site]}


def list_failures(summary: Summary) -> Iterable[str]:
    """Yields one sentence for each task without a usable result; nothing where the run succeeded."""
    for name, task in summary.tasks.items():
        if task.status == "never_updated":
            yield f"task {name} was never updated: no site's contribution was accepted"
        elif not task.metrics and summary.executor not in (FLOWER_APP, DEPLOYMENT):
            yield f"task {name} could not be evaluated: no site holds out a record with its label"


def _last(events: Sequence[RunEvent], kind: type[_AnyEvent]) -> _AnyEvent | None:
    selected = select_events(events, kind)
    return selected[-1] if selected else None


def _summarize_task(events: Sequence[RunEvent], name: str, kind: str) -> TaskSummary:
    ended = _last(events, RunEnded)
    rounds = select_rounds(events).values()
    updates = ended.updates.get(name, 0) if ended else sum(name in event.updated for event in rounds)
    metrics = next((event for event in select_events(events, MetricsEvaluated) if event.task == name), None)
    baselines = [event for event in select_events(events, BaselineEvaluated) if name in event.metrics]
    home = next((event for event in select_events(events, HomeEvaluated) if event.task == name), None)
    return TaskSummary(
        kind=kind,
        status="updated" if updates else "never_updated",
        updates=updates,
        missed=max(0, len(rounds) - updates),
        sites=tuple(sorted(event.site for event in select_events(events, SiteJoined) if name in event.tasks)),
        metrics=metrics.pooled if metrics else {},
        per_site=metrics.per_site if metrics else {},
        evaluation=_summarize_evaluation(events, name),
        baselines={event.name: event.metrics[name] for event in baselines},
        personal=home.personal if home else None,
        at_home=home.heads if home else {},
        alignments=home.alignments if home else {},
    )


def _summarize_evaluation(events: Sequence[RunEvent], name: str) -> TaskEvaluation | None:
    """Returns a task's noised metrics after each round that evaluated it; None where no site released any."""
    rounds = [
        EvaluationRound(round=event.round, **dict(event.tasks[name]))
        for event in _select_evaluations(events)
        if name in event.tasks
    ]
    return TaskEvaluation(**dict(rounds[-1]), rounds=tuple(rounds)) if rounds else None


def _select_evaluations(events: Sequence[RunEvent]) -> list[HeadsEvaluated]:
    """Returns the last evaluation after each round: a resumed run repeats a round and gets the stored replies."""
    return list({event.round: event for event in select_events(events, HeadsEvaluated)}.values())


def _summarize_sites(events: Sequence[RunEvent]) -> dict[str, SiteSummary]:
    rounds, evaluations = list(select_rounds(events).values()), _select_evaluations(events)
    missed = count_missed_rounds(events)
    sites: dict[str, SiteSummary] = {}
    joined_at: dict[str, int] = {}
    epsilons = _compose_epsilons(
        {event.site: event for event in select_events(events, SiteJoined)},
        rounds,
        evaluations,
        select_events(events, MomentsMeasured),
        _last(events, VotesCounted),
    )
    for position, event in enumerate(events):
        if isinstance(event, SiteJoined):
            joined_at.setdefault(event.site, position)
            sites[event.site] = SiteSummary(
                status="completed",
                epsilon=epsilons[event.site],
                delta=event.delta,
                unit=event.unit,
                relation=RELATION,
                budget_epsilon=event.budget_epsilon,
                rounds=sum(event.site in each.sites for each in rounds),
                missed=missed.get(event.site, 0),
                evaluations=sum(event.site in each.noise_multipliers for each in evaluations),
            )
    for position, event in enumerate(events):
        match event:
            # A rejection before the site joined is over: it was asked again, and its staff had approved the run.
            case SiteRejected() if position >= joined_at.get(event.site, 0) and not _is_made_good(event, rounds):
                sites[event.site] = _mark_rejected(sites.get(event.site), event.reason)
            # A damaged line of a journal is skipped, and may be the one by which the site joined.
            case EpsilonSpent() if event.site in sites:
                sites[event.site] = sites[event.site].model_copy(update={"epsilon": event.epsilon})
            case RecordsLeftOut() if event.site in sites:
                left_out = LeftOut(num_records=event.num_records, path=event.path)
                sites[event.site] = sites[event.site].model_copy(update={"left_out": left_out})
    return dict(sorted(sites.items()))


def _is_made_good(rejected: SiteRejected, rounds: Sequence[RoundEnded]) -> bool:
    """Returns whether the round used an update of the site all the same: it was repeated after an interruption."""
    return any(event.round == rejected.round and rejected.site in event.sites for event in rounds)


def _mark_rejected(site: SiteSummary | None, reason: str) -> SiteSummary:
    """Returns a site's summary with the reason for which its reply was not used."""
    status: Literal["declined", "rejected"] = "declined" if reason.startswith("declined") else "rejected"
    if site is None:
        return SiteSummary(status=status, reason=reason)
    return site.model_copy(update={"status": "partial" if site.rounds else status, "reason": reason})


def _compose_epsilons(
    joined: Mapping[str, SiteJoined],
    rounds: Sequence[RoundEnded],
    evaluations: Sequence[HeadsEvaluated],
    measured: Sequence[MomentsMeasured],
    votes: VotesCounted | None,
) -> dict[str, float | None]:
    """Returns epsilon of what was accepted of each site, from its public numbers; None without privacy.

    A site may have spent more than the coordinator accepted: its own ledger decides, and a simulation replaces this
    number by the ledger's.

    Args:
        joined: each site's last `SiteJoined`, by its name.
        rounds: the run's rounds.
        evaluations: the run's evaluations.
        measured: what was released before the first round; of several the last, where a run was resumed before that.
        votes: the votes of a choice; None in a run that trains.
    """
    releases: dict[str, tuple[list[Mechanism], float]] = {}
    mechanisms: dict[int, Mechanism] = {}  # By the identity of plans, which many sites share.
    for site, event in joined.items():
        plans = [each.sites[site].plan for each in rounds if site in each.sites]
        if plans and all(plan.private for plan in plans):
            others: list[HeadsEvaluated | MomentsMeasured] = [*evaluations, *measured[-1:]]
            noises = [each.noise_multipliers[site] for each in others if site in each.noise_multipliers]
            beside = [Mechanism("gaussian", noise, 1.0, 1, 1.0) for noise in noises]
            for plan in plans:
                if id(plan) not in mechanisms:
                    mechanisms[id(plan)] = Mechanism.of(plan)
            releases[site] = ([*(mechanisms[id(plan)] for plan in plans), *beside], event.delta)
    if votes is not None:
        vote = Mechanism.of_choice(votes.epsilon, votes.sensitivity)
        releases |= {site: ([vote], joined[site].delta) for site in votes.votes if site in joined}
    sampled = any(mechanism.sampling_rate < 1.0 for mechanisms, _ in releases.values() for mechanism in mechanisms)
    # Sampled plans are accounted for by Opacus, which loads torch.
    epsilons = run_apart(_compute_each, releases) if sampled else _compute_each(releases)
    return dict.fromkeys(joined, None) | epsilons


def _compute_each(releases: Mapping[str, tuple[list[Mechanism], float]]) -> dict[str, float | None]:
    return {site: compute_epsilon(mechanisms, delta) for site, (mechanisms, delta) in releases.items()}


def _summarize_audit(events: Sequence[RunEvent]) -> AuditSummary:
    """Returns whether the run required an audit, and the simulator's own result; a site's result stays at the site."""
    started, audited = _last(events, RunStarted), _last(events, SolverAudited)
    if audited is None:
        return AuditSummary(required=started is not None and started.audit_required)
    names = AuditSummary.model_fields.keys() - {"required"}
    return AuditSummary(required=True, **{name: getattr(audited.verdict, name) for name in names})


def _count_bytes(events: Sequence[RunEvent]) -> ByteCounts:
    updates = [update for event in select_events(events, RoundEnded) for update in event.sites.values()]
    received: dict[str, int] = {}
    for event in select_events(events, BackboneSent):
        received[event.site] = received.get(event.site, 0) + event.size_bytes
    return ByteCounts(
        down_per_site_round=_mean([update.bytes_down for update in updates]),
        up_per_site_round=_mean([update.bytes_up for update in updates]),
        backbone_per_site=max(received.values(), default=None),
    )


def _mean(values: Sequence[int]) -> int | None:
    return round(sum(values) / len(values)) if values else None


def _measure_durations(events: Sequence[RunEvent]) -> Durations:
    features = _last(events, FeaturesReady)
    return Durations(
        total=round(events[-1].time - events[0].time, 3) if events else 0.0,
        features=features.seconds if features else 0.0,
        training=round(sum(event.seconds for event in select_events(events, RoundEnded)), 3),
        baselines=round(sum(event.seconds for event in select_events(events, BaselineEvaluated)), 3),
    )
