"""The coordinator's side of a run: join, backbones, rounds, evaluations, final heads. One readable loop.

Invariant: after every round the journal and the checkpoint on disk say all that is needed to report or to continue;
a bad reply costs its sender its place in that round and nothing else.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from flwr.serverapp import Grid

from common import messages
from common.events import (
    AcceptedUpdate,
    BackboneFacts,
    FeaturesReady,
    HeadsEvaluated,
    Journal,
    RoundEnded,
    RunEnded,
    RunStarted,
)
from common.model.class_moments import select_class_moments
from common.model.guessing import Totals, explain_hopeless
from common.model.moments import (
    select_offsets,
    serve_heads,
)
from common.model.momentum import adjust_step
from common.offers import SentBackbone, list_digests
from common.privacy.update_norm import bound_update_norms
from common.run import RunConfig
from common.tasks import open_tasks
from common.types import Heads, Params, RunFailed, RunInterrupted, heads_digest, select_trained
from server.rounds.aggregators import Weighted, count_required_updates, open_aggregator
from server.rounds.checkpoint import Checkpoint, save_checkpoint
from server.rounds.evaluation import SiteRelease, check_evaluation, compute_metrics, count_outcomes, select_temperatures
from server.rounds.inquiry import Quorum, Waiting
from server.rounds.join import RollCall, join_sites, prepare_sites
from server.rounds.late import LateRollCall
from server.rounds.messenger import Answers, Messenger, Observe, Participant, Request, map_groups, map_names
from server.rounds.moments import measure_moments
from server.rounds.replies import RoundUpdates, check_delta, check_plan, describe_reasons
from server.rounds.secure_sum import collect_sum
from server.rounds.witnesses import Witnesses

AfterRound = Callable[[int, Heads], None]
"""Receives the number of a round and the heads after it, as they would be sent to sites."""

_START = "start"
"""Name in an aggregator's state of the parameters before the first round, where a run decays towards them."""

_Reply = TypeVar("_Reply")
_Request = TypeVar("_Request", messages.TrainRequest, messages.EvaluateRequest, messages.FinishRequest)


@dataclass(frozen=True)
class Outcome:
    """The end of a run.

    Attributes:
        heads: final heads and trunks.
        updates: how often each was updated.
        moments: what the run released of classes before its first round.
    """

    heads: Heads
    updates: Mapping[str, int]
    moments: Heads


class SitesAtHand(Protocol):
    """Sites that a simulation has beside the coordinator, in one process, and that it need not ask by messages."""

    def join(self, messenger: Messenger) -> list[Participant]:
        """Returns the sites that agree to the run and are prepared, by name.

        Raises:
            RunFailed: they are no quorum.
        """

    def collect(
        self, messenger: Messenger, participants: Sequence[Participant], heads: Heads, round_: int
    ) -> RoundUpdates:
        """Returns the updates of a cohort; see `collect_updates`, whose rules are kept.

        Args:
            messenger: connection to the sites, with the run and its journal.
            participants: sites that joined.
            heads: heads and trunks before the round.
            round_: number of the round, from 1.

        Raises:
            RunInterrupted: the round did not reach its quorum.
        """

    def send(self, messenger: Messenger, request: Request[_Reply]) -> Answers[_Reply]:
        """Returns the answers to a request for statistics, or for sums before the first round; see `Messenger.send`.

        Args:
            messenger: connection to the sites, with the run and its journal.
            request: the request, whose check is made of every answer.
        """

    def finish(self, heads: Heads) -> None:
        """Takes the final heads."""


def run_federation(
    grid: Grid,
    run: RunConfig,
    backbones: Mapping[str, SentBackbone],
    *,
    run_id: str,
    folder: Path,
    journal: Journal,
    executor: str,
    observe: Observe = lambda phase, done, total: None,
    resume: Checkpoint | None = None,
    node_ids: Mapping[int, str] | None = None,
    witnesses: Path | None = None,
    anyway: bool = True,
    after_round: AfterRound | None = None,
    at_hand: SitesAtHand | None = None,
) -> Outcome:
    """Trains a run's heads with the sites behind a grid.

    Args:
        grid: Flower's connection to the sites.
        run: the run's settings.
        backbones: the run's frozen backbones by name; they are sent to sites that lack them. Open ones
            (`common.model.backbones.Backbone`) where `resume` is None.
        run_id: unique id of the run, a plain name.
        folder: folder that receives a checkpoint after every round.
        journal: journal that receives the run's events.
        executor: name of what carries the messages, for the report.
        observe: called with the progress.
        resume: checkpoint to continue after, perhaps of no round at all; None draws new heads.
        node_ids: node id -> name of every admitted site; None where names are not known beforehand.
        witnesses: file of the witnesses of sites' ledgers, which outlives runs; None keeps none.
        anyway: whether training is begun also where no task can be better than guessing.
        after_round: called after each round; it changes nothing of the run.
        at_hand: the sites, where they are in this process and asked without messages.

    Returns:
        The final heads, and how often each was updated.

    Raises:
        RunFailed: too few sites joined or could be prepared, or no task can be better than guessing.
        RunInterrupted: a round did not reach its quorum in time; the checkpoint holds the last whole round.
    """
    messenger = Messenger(grid, run, run_id, journal, observe, Witnesses(witnesses))
    journal.write(
        RunStarted(
            run_id=run_id,
            name=run.name,
            executor=executor,
            path=str(folder),
            rounds=run.rounds,
            resumed=resume is not None and resume.rounds_done > 0,
            audit_required=run.audit == "required",
            tasks={name: spec.kind for name, spec in run.tasks.items()},
            backbones={name: _describe_backbone(run, name, backbone) for name, backbone in backbones.items()},
        )
    )
    roll_call, next_round = RollCall(), 1 if resume is None else resume.rounds_done + 1
    started = time.monotonic()
    if at_hand is not None:
        participants = at_hand.join(messenger)
    else:
        participants = join_sites(messenger, backbones, node_ids, roll_call=roll_call, first_round=next_round)
        observe("joined", len(participants), len(participants))
        started = time.monotonic()
        participants = prepare_sites(messenger, participants, backbones, roll_call)
    journal.write(FeaturesReady(seconds=round(time.monotonic() - started, 3)))
    state = resume or _create_initial_state(messenger, backbones)
    if not anyway and state.rounds_done == 0:
        _refuse_hopeless(run, participants)
    if run.moments is not None and state.rounds_done == 0:
        digests = list_digests(backbones)
        state = measure_moments(messenger, participants, state, folder=folder, digests=digests, at_hand=at_hand)
    late = LateRollCall(messenger, backbones, node_ids, roll_call)
    if at_hand is None:
        messenger.while_waiting.append(late.look)
    temperatures: Mapping[str, float] = {}
    if run.evaluation is not None and run.evaluation.calibrate and state.rounds_done == run.rounds:
        # Resumed with nothing left to train: sites answer from stored replies.
        temperatures = evaluate_round(messenger, participants, state.heads, run.rounds, at_hand)
    for round_ in range(state.rounds_done + 1, run.rounds + 1):
        participants = late.admit(participants, round_) if at_hand is None else participants
        observe("rounds", round_ - 1, run.rounds)
        state = one_round(messenger, participants, state, round_, at_hand)
        # Before the checkpoint: a run that dies here does its round again, from stored replies, and evaluates then.
        temperatures = evaluate_round(messenger, participants, state.heads, round_, at_hand)
        if after_round is not None:
            after_round(round_, _serve(messenger.run, state.heads))
        save_checkpoint(folder / "checkpoint.safetensors", state)
    observe("rounds", run.rounds, run.rounds)
    final = _serve(messenger.run, state.heads)
    missing: Mapping[str, str] = {}
    if at_hand is not None:
        at_hand.finish(final)
    else:
        missing = send_final_heads(messenger, participants, final, temperatures, state.moments)
    journal.write(
        RunEnded(
            updates=dict(state.updates),
            heads=heads_digest(final),
            num_received=len(participants) - len(missing),
            num_sites=len(participants),
            missing=missing,
        )
    )
    return Outcome(final, state.updates, state.moments)


def one_round(
    messenger: Messenger,
    participants: list[Participant],
    state: Checkpoint,
    round_: int,
    at_hand: SitesAtHand | None = None,
) -> Checkpoint:
    """Asks a cohort to train and aggregates its updates task by task.

    Args:
        messenger: connection to the sites, with the run and its journal.
        participants: sites that joined; the cohort is drawn from them.
        state: state before the round.
        round_: number of the round, from 1.
        at_hand: the sites, where they are in this process.

    Returns:
        The state after the round; a task that too few of the cohort have keeps its head.

    Raises:
        RunInterrupted: the round did not reach its quorum in time.
    """
    started = time.monotonic()
    collect = _collect_updates if messenger.run.trust is None else collect_sum
    collect = collect if at_hand is None else at_hand.collect
    collected = collect(messenger, participants, state.heads, round_)
    new, updated = _aggregate(messenger.run, state, collected, round_)
    messenger.journal.write(
        RoundEnded(
            round=round_,
            sites=collected.accepted,
            num_updates=collected.counts,
            updated=tuple(sorted(updated)),
            heads=heads_digest(new.heads),
            seconds=round(time.monotonic() - started, 4),
        )
    )
    return new


def _collect_updates(
    messenger: Messenger, participants: Sequence[Participant], heads: Heads, round_: int
) -> RoundUpdates:
    """Returns the updates of a cohort, each by itself."""
    sampled = sample_cohort(messenger.run, participants, round_)
    # A site that owes its update of the round before is not asked for this one: it would pay twice and be used once.
    late = [each for each in participants if each.node_id in messenger.late and each not in sampled]
    cohort = [*sampled, *late]
    quorum = Quorum.of(messenger.run, map_groups(sampled), map_groups(late))
    answers = _ask_to_train(messenger, cohort, heads, round_, quorum)
    messenger.write_rejected(answers.rejected, map_names(cohort), "train", round_)
    missing = quorum.describe_missing(answers.accepted)
    if missing is not None:
        raise RunInterrupted(f"round {round_}: {missing}: {describe_reasons(answers.rejected, map_names(cohort))}")
    accepted, deltas = {}, {}
    for participant in cohort:
        if participant.node_id not in answers.accepted:
            continue
        reply, size = answers.accepted[participant.node_id]
        answered = answers.rounds[participant.node_id]
        accepted[participant.site] = AcceptedUpdate(
            bytes_down=answers.bytes_sent[participant.node_id],
            bytes_up=size,
            plan=reply.plan,
            weights=dict(participant.parameter_groups),
            round=None if answered == round_ else answered,
        )
        deltas[participant.site] = participant, reply.delta.heads
    return gather_updates(messenger.run, heads, accepted, deltas)


def gather_updates(
    run: RunConfig,
    heads: Heads,
    accepted: Mapping[str, AcceptedUpdate],
    deltas: Mapping[str, tuple[Participant, Heads]],
) -> RoundUpdates:
    """Returns the updates of a round with their public weights.

    Args:
        run: the run.
        heads: heads and trunks before the round.
        accepted: site -> facts of its update.
        deltas: site -> the site as it joined, and its update.
    """
    changes: dict[str, dict[str, tuple[float, Params]]] = {name: {} for name in heads}
    for site, (participant, delta) in deltas.items():
        for group, change in delta.items():
            changes[group][site] = float(participant.parameter_groups[group]), change
    by_group = {group: _weigh(run, group, own) for group, own in changes.items()}
    return RoundUpdates(accepted, by_group, {group: len(own) for group, own in by_group.items()})


def _weigh(run: RunConfig, group: str, changes: Mapping[str, tuple[float, Params]]) -> list[Weighted]:
    """Returns the updates of a head or trunk with weights from what is public: sites' declared sizes and groups.

    Args:
        run: the run.
        group: name of the head or trunk.
        changes: site -> its declared size, and its change.
    """
    sizes = {site: size for site, (size, _) in changes.items()}
    weights = run.aggregation.select_adjustment(group).weigh_sites(sizes) if sizes else {}
    # A site whose units count twice as much brings twice its noise.
    return [Weighted(weights[site], change, (weights[site] / size) ** 2) for site, (size, change) in changes.items()]


def _ask_to_train(
    messenger: Messenger, cohort: Sequence[Participant], heads: Heads, round_: int, quorum: Quorum
) -> Answers[messages.TrainReply]:
    """Returns the updates of a cohort that can be used, once they are a quorum and the grace of the others is over."""
    run, names = messenger.run, map_names(cohort)
    check = make_update_check(messenger, cohort, heads)
    requests = _build_requests(cohort, lambda groups: build_request(messenger.run_id, heads, groups, round_))
    return messenger.send(
        Request(
            messages.TRAIN,
            messenger.witnesses.show(requests, names),
            messages.TrainReply,
            Waiting.of(run, quorum),
            round=round_,
            names=names,
            check=check,
            # An update is a change along a gradient. That it is one round old changes nothing of its noise and of what
            # it cost: all of it happened at the site. A mean takes it as a step with a delay of one. Aggregators that
            # compare updates with each other need all of them to begin at the same heads.
            takes_late=open_aggregator(run.aggregation_of(None), "aggregation").needs_sum,
        )
    )


def build_request(run_id: str, heads: Heads, groups: Collection[str], round_: int) -> messages.TrainRequest:
    """Returns what sites are asked in a round.

    Args:
        run_id: id of the run.
        heads: all heads and trunks.
        groups: names of those that the sites train.
        round_: number of the round.
    """
    return messages.TrainRequest(run_id, round_, {name: heads[name] for name in sorted(groups)})


def make_update_check(
    messenger: Messenger, cohort: Sequence[Participant], heads: Heads
) -> Callable[[int, messages.TrainReply], None]:
    """Returns the check of an update, called with a node's id and its reply; it raises BadInput for one to reject.

    Args:
        messenger: connection to the sites, with the run.
        cohort: the sites that are asked.
        heads: heads and trunks before the round.
    """
    run, by_node = messenger.run, {participant.node_id: participant for participant in cohort}
    # Sites with equal declarations have equal bounds.
    bounds: dict[tuple[tuple[str, int], ...], dict[str, float]] = {}

    def check(node: int, reply: messages.TrainReply) -> None:
        messenger.witnesses.keep({by_node[node].site: reply.witness})
        sent = select_trained_groups(heads, by_node[node].parameter_groups)
        declared = tuple(by_node[node].tasks.items())
        if declared not in bounds:
            bounds[declared] = bound_update_norms(run, by_node[node].tasks, sent)
        check_delta(reply.delta, sent, run.max_delta_norm, bounds[declared])
        check_plan(reply.plan, run)

    return check


def evaluate_round(
    messenger: Messenger,
    participants: list[Participant],
    heads: Heads,
    round_: int,
    at_hand: SitesAtHand | None = None,
) -> dict[str, float]:
    """Asks every participant for noised statistics of its held-out units, where the run evaluates after this round.

    Args:
        messenger: connection to the sites, with the run and its journal.
        participants: sites that joined.
        heads: heads and trunks after the round.
        round_: number of the round, from 1.
        at_hand: the sites, where they are in this process.

    Returns:
        Task -> temperature of its head, where the run asks for it and the noise leaves it readable.
    """
    evaluation = messenger.run.evaluation
    if evaluation is None or not evaluation.due(round_, messenger.run.rounds):
        return {}
    tasks = open_tasks(messenger.run)
    # Served heads are for the declared prior; how sure they may be is seen with that of the records.
    offsets = select_offsets(heads) if evaluation.calibrate else {}
    heads = _serve(messenger.run, heads)

    def build(groups: Collection[str]) -> messages.EvaluateRequest:
        own = {name: offset for name, offset in offsets.items() if name in groups}
        return messages.EvaluateRequest(messenger.run_id, round_, _select_groups(heads, groups), offsets=own)

    requests = _build_requests(participants, build)
    names = map_names(participants)
    site_tasks = {each.node_id: {task: tasks[task] for task in each.tasks} for each in participants}

    def check(node: int, reply: messages.EvaluateReply) -> None:
        messenger.witnesses.keep({names[node]: reply.witness})
        check_evaluation(reply, site_tasks[node], calibrate=evaluation.calibrate)

    request = Request(
        messages.EVALUATE,
        messenger.witnesses.show(requests, names),
        messages.EvaluateReply,
        Waiting.of(messenger.run),
        round=round_,
        names=names,
        check=check,
    )
    answers = messenger.send(request) if at_hand is None else at_hand.send(messenger, request)
    releases = [
        SiteRelease(participant.site, answers.accepted[participant.node_id][0])
        for participant in participants
        if participant.node_id in answers.accepted
    ]
    results = compute_metrics(tasks, releases, messenger.run.seed, calibrate=evaluation.calibrate)
    messenger.journal.write(
        HeadsEvaluated(
            round=round_,
            tasks=results,
            # A site is charged one release of this noise for all its tasks together.
            noise_multipliers={release.site: release.reply.noise_multiplier for release in releases},
            # Not evaluating is no fault: these sites stay in the run.
            rejected={names[item.node_id]: item.reason for item in answers.rejected if item.node_id in names},
            outcomes=count_outcomes(tasks, releases, calibrate=evaluation.calibrate),
        )
    )
    return select_temperatures(results)


def send_final_heads(
    messenger: Messenger,
    participants: list[Participant],
    heads: Heads,
    temperatures: Mapping[str, float],
    moments: Heads,
) -> dict[str, str]:
    """Sends every participant the final heads of its tasks, with their digest and temperatures, and their moments.

    Args:
        messenger: connection to the sites, with the run and its journal.
        participants: sites that joined.
        heads: final heads and trunks.
        temperatures: task -> temperature of its head, where one is known.
        moments: what was released of classes.

    Returns:
        Name of each site that did not confirm them -> the reason.
    """

    def build(groups: Collection[str]) -> messages.FinishRequest:
        selected = _select_groups(heads, groups)
        known = {task: temperature for task, temperature in temperatures.items() if task in selected}
        measured = select_class_moments(moments, {name: run.backbone_of(name) for name in groups if name in run.tasks})
        return messages.FinishRequest(messenger.run_id, {**selected, **measured}, heads_digest(selected), known)

    run, names = messenger.run, map_names(participants)
    requests: dict[int, messages.Request] = dict(_build_requests(participants, build))
    answers = messenger.send(Request(messages.FINISH, requests, messages.Ready, Waiting.of(messenger.run), names=names))
    messenger.write_rejected(answers.rejected, names, "finish")
    messenger.name_overdue(names)
    return {names[item.node_id]: item.reason for item in answers.rejected if item.node_id in names}


def _refuse_hopeless(run: RunConfig, participants: Sequence[Participant]) -> None:
    """Raises RunFailed where no task can be better than guessing with these sites; nothing was charged yet."""
    sizes = {name: {each.site: each.tasks[name] for each in participants if name in each.tasks} for name in run.tasks}
    totals = {name: Totals.of(run, name, own) for name, own in sizes.items() if own}
    reason = explain_hopeless(run, open_tasks(run), totals)
    if reason is not None:
        raise RunFailed(f"{reason}; nothing was charged, and `--anyway` of `start` and `submit` runs it")


# --- parts -----------------------------------------------------------------------------------------------------------


def _serve(run: RunConfig, heads: Heads) -> Heads:
    """Returns the heads as sites and reports use them (`common.model.moments.serve_heads`)."""
    return serve_heads(heads, open_tasks(run))


def _describe_backbone(run: RunConfig, name: str, backbone: SentBackbone) -> BackboneFacts:
    """Returns what a report says of a backbone, and of the tasks that stand on it."""
    settings = backbone.public_spec()
    tasks = [task for task in run.tasks if run.backbone_of(task) == name]
    model = settings.get("model")
    return BackboneFacts(kind=settings["kind"], model=model, digest=backbone.digest, tasks=tuple(tasks))


def _build_requests(
    participants: Sequence[Participant], build: Callable[[Collection[str]], _Request]
) -> dict[int, _Request]:
    """Returns node id -> its request. Sites that train the same heads share one object, which is encoded once."""
    shared = {
        groups: build(groups) for groups in {frozenset(participant.parameter_groups) for participant in participants}
    }
    return {participant.node_id: shared[frozenset(participant.parameter_groups)] for participant in participants}


def _select_groups(heads: Heads, groups: Collection[str]) -> Heads:
    return {name: heads[name] for name in sorted(groups)}


def select_trained_groups(heads: Heads, groups: Collection[str]) -> Heads:
    """Returns the parameters that train of some heads and trunks."""
    return {name: select_trained(heads[name]) for name in sorted(groups)}


def _create_initial_state(messenger: Messenger, backbones: Mapping[str, SentBackbone]) -> Checkpoint:
    # Here: they need torch, and a deployed run, whose state was made before it started, does not.
    from common.model.backbones import Backbone
    from server.rounds.initial_state import create_initial_state

    opened = {name: backbone for name, backbone in backbones.items() if isinstance(backbone, Backbone)}
    return create_initial_state(messenger.run, messenger.run_id, opened)


def sample_cohort(run: RunConfig, participants: Sequence[Participant], round_: int) -> list[Participant]:
    """Returns the sites that are asked in a round.

    Args:
        run: the run.
        participants: the sites that joined.
        round_: number of the round.
    """
    count = run.cohort.count_asked(len(participants))
    if count >= len(participants):
        return list(participants)
    cohort = random.Random(f"{run.seed}/{round_}").sample(participants, count)
    return sorted(cohort, key=lambda participant: participant.site)


def _aggregate(run: RunConfig, state: Checkpoint, collected: RoundUpdates, round_: int) -> tuple[Checkpoint, set[str]]:
    heads, states, updated = dict(state.heads), dict(state.states), set()
    required = count_required_updates(run)
    for task, deltas in collected.by_group.items():
        if collected.counts[task] < required:
            continue
        aggregator, old = open_aggregator(run.aggregation_of(task), "aggregation"), select_trained(heads[task])
        new, state_after = aggregator.update(old, states[task], deltas)
        adjustment = run.aggregation.select_adjustment(task)
        if adjustment.decay_to_start:
            # A head that was not updated yet is what it was before the first round.
            state_after = {**state_after, _START: states[task].get(_START, old)}
        new = adjust_step(adjustment, old, new, state_after.get(_START, old), round_=round_, rounds=run.rounds)
        states[task], heads[task] = state_after, {**heads[task], **new}
        updated.add(task)
    updates = {task: count + (task in updated) for task, count in state.updates.items()}
    return replace(state, rounds_done=round_, heads=heads, states=states, updates=updates), updated
