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
from typing import TypeVar

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
from common.model.backbones import Backbone
from common.model.parameters import parameters
from common.model.trunks import create_modules
from common.privacy.update_norm import bound_update_norms
from common.run import RunConfig
from common.tasks import open_task
from common.types import BadInput, Heads, heads_digest
from server.rounds.aggregators import State, Weighted, count_required_updates, open_aggregator
from server.rounds.checkpoint import Checkpoint, save_checkpoint
from server.rounds.evaluation import SiteRelease, check_evaluation, compute_metrics
from server.rounds.join import RollCall, join_sites, prepare_sites
from server.rounds.late import LateRollCall
from server.rounds.messenger import Messenger, Observe, Participant
from server.rounds.replies import Rejected, check_delta, check_plan
from server.rounds.witnesses import Witnesses

_Request = TypeVar("_Request", messages.TrainRequest, messages.EvaluateRequest, messages.FinishRequest)


@dataclass(frozen=True)
class Outcome:
    """The end of a run.

    Attributes:
        heads: final heads and trunks.
        updates: how often each was updated.
    """

    heads: Heads
    updates: Mapping[str, int]


def run_federation(
    grid: Grid,
    run: RunConfig,
    backbones: Mapping[str, Backbone],
    *,
    run_id: str,
    folder: Path,
    journal: Journal,
    executor: str,
    observe: Observe = lambda phase, done, total: None,
    resume: Checkpoint | None = None,
    node_ids: Mapping[int, str] | None = None,
    witnesses: Path | None = None,
) -> Outcome:
    """Trains a run's heads with the sites behind a grid.

    Args:
        grid: Flower's connection to the sites.
        run: the run's settings.
        backbones: the run's frozen backbones by name; they are sent to sites that lack them.
        run_id: unique id of the run, a plain name.
        folder: folder that receives a checkpoint after every round.
        journal: journal that receives the run's events.
        executor: name of what carries the messages, for the report.
        observe: called with the progress.
        resume: checkpoint to continue after; None starts from new heads.
        node_ids: node id -> name of every admitted site; None where names are not known beforehand.
        witnesses: file of the witnesses of sites' ledgers, which outlives runs; None keeps none.

    Returns:
        The final heads, and how often each was updated.

    Raises:
        RunFailed: too few sites joined or could be prepared.
    """
    messenger = Messenger(grid, run, run_id, journal, observe, Witnesses(witnesses))
    journal.write(
        RunStarted(
            run_id=run_id,
            name=run.name,
            executor=executor,
            path=str(folder),
            rounds=run.rounds,
            resumed=resume is not None,
            audit_required=run.audit == "required",
            tasks={name: spec.kind for name, spec in run.tasks.items()},
            backbones={name: _describe_backbone(run, name, backbone) for name, backbone in backbones.items()},
        )
    )
    roll_call, next_round = RollCall(), 1 if resume is None else resume.rounds_done + 1
    participants = join_sites(messenger, backbones, node_ids, roll_call=roll_call, first_round=next_round)
    observe("joined", len(participants), len(participants))
    started = time.monotonic()
    participants = prepare_sites(messenger, participants, backbones, roll_call)
    journal.write(FeaturesReady(seconds=round(time.monotonic() - started, 3)))
    state = resume or _initial_state(messenger, backbones)
    late = LateRollCall(messenger, backbones, node_ids, roll_call)
    messenger.while_waiting.append(late.look)
    for round_ in range(state.rounds_done + 1, run.rounds + 1):
        participants = late.admit(participants, round_)
        observe("rounds", round_ - 1, run.rounds)
        state = one_round(messenger, participants, state, round_)
        # Before the checkpoint: a run that dies here does its round again, from stored replies, and evaluates then.
        evaluate_round(messenger, participants, state.heads, round_)
        save_checkpoint(folder / "checkpoint.safetensors", state)
    observe("rounds", run.rounds, run.rounds)
    num_received = send_final_heads(messenger, participants, state.heads)
    journal.write(
        RunEnded(
            updates=dict(state.updates),
            heads=heads_digest(state.heads),
            num_received=num_received,
            num_sites=len(participants),
        )
    )
    return Outcome(state.heads, state.updates)


def one_round(messenger: Messenger, participants: list[Participant], state: Checkpoint, round_: int) -> Checkpoint:
    """Asks a cohort to train and aggregates its updates task by task.

    Args:
        messenger: connection to the sites, with the run and its journal.
        participants: sites that joined; the cohort is drawn from them.
        state: state before the round.
        round_: number of the round, from 1.

    Returns:
        The state after the round; a task with too few updates keeps its head.
    """
    started = time.monotonic()
    cohort = _sample_cohort(messenger.run, participants, round_)
    requests = _build_requests(
        cohort, lambda groups: messages.TrainRequest(messenger.run_id, round_, _select_groups(state.heads, groups))
    )
    names = _names_of(cohort)
    shown = _show_witnesses(messenger, requests, names)
    answers = messenger.ask_prepared(messages.TRAIN, shown, messages.TrainReply, names, round_)
    messenger.witnesses.keep({names[node]: reply.witness for node, (reply, _) in answers.accepted.items()})
    by_task: dict[str, list[Weighted]] = {name: [] for name in state.heads}
    accepted = {}
    for participant in cohort:
        if participant.node_id not in answers.accepted:
            continue
        reply, size = answers.accepted[participant.node_id]
        try:
            sent = _select_groups(state.heads, participant.parameter_groups)
            norms = bound_update_norms(messenger.run, participant.tasks, sent)
            check_delta(reply.delta, sent, messenger.run.max_delta_norm, norms)
            check_plan(reply.plan, messenger.run)
        except BadInput as error:
            answers.rejected.append(Rejected(participant.node_id, str(error)))
            continue
        accepted[participant.site] = AcceptedUpdate(
            bytes_down=answers.bytes_sent[participant.node_id],
            bytes_up=size,
            plan=reply.plan,
            weights=dict(participant.parameter_groups),
        )
        for task, delta in reply.delta.heads.items():
            by_task[task].append(Weighted(float(participant.parameter_groups[task]), delta))
    messenger.write_rejected(answers.rejected, names, "train", round_)
    new, updated = _aggregate(messenger.run, state, by_task, round_)
    messenger.journal.write(
        RoundEnded(
            round=round_,
            sites=accepted,
            num_updates={task: len(deltas) for task, deltas in by_task.items()},
            updated=tuple(sorted(updated)),
            heads=heads_digest(new.heads),
            seconds=round(time.monotonic() - started, 4),
        )
    )
    return new


def evaluate_round(messenger: Messenger, participants: list[Participant], heads: Heads, round_: int) -> None:
    """Asks every participant for noised statistics of its held-out units, where the run evaluates after this round.

    Args:
        messenger: connection to the sites, with the run and its journal.
        participants: sites that joined.
        heads: heads and trunks after the round.
        round_: number of the round, from 1.
    """
    evaluation = messenger.run.evaluation
    if evaluation is None or not evaluation.due(round_, messenger.run.rounds):
        return
    tasks = {name: open_task(spec, f"tasks.{name}") for name, spec in messenger.run.tasks.items()}
    requests = _build_requests(
        participants, lambda groups: messages.EvaluateRequest(messenger.run_id, round_, _select_groups(heads, groups))
    )
    names = _names_of(participants)
    shown = _show_witnesses(messenger, requests, names)
    answers = messenger.ask_prepared(messages.EVALUATE, shown, messages.EvaluateReply, names, round_)
    messenger.witnesses.keep({names[node]: reply.witness for node, (reply, _) in answers.accepted.items()})
    releases = []
    for participant in participants:
        if participant.node_id not in answers.accepted:
            continue
        reply, _ = answers.accepted[participant.node_id]
        try:
            check_evaluation(reply, {task: tasks[task] for task in participant.tasks})
            releases.append(SiteRelease(participant.site, reply))
        except BadInput as error:
            answers.rejected.append(Rejected(participant.node_id, str(error)))
    messenger.journal.write(
        HeadsEvaluated(
            round=round_,
            tasks=compute_metrics(tasks, releases, messenger.run.seed),
            # A site is charged one release of this noise for all its tasks together.
            noise_multipliers={release.site: release.reply.noise_multiplier for release in releases},
            # Not evaluating is no fault: these sites stay in the run.
            rejected={names[item.node_id]: item.reason for item in answers.rejected if item.node_id in names},
        )
    )


def send_final_heads(messenger: Messenger, participants: list[Participant], heads: Heads) -> int:
    """Sends every participant the final heads of its tasks, with their digest.

    Args:
        messenger: connection to the sites, with the run and its journal.
        participants: sites that joined.
        heads: final heads and trunks.

    Returns:
        The number of sites that confirmed them.
    """

    def build(groups: Collection[str]) -> messages.FinishRequest:
        selected = _select_groups(heads, groups)
        return messages.FinishRequest(messenger.run_id, selected, heads_digest(selected))

    requests, names = _build_requests(participants, build), _names_of(participants)
    answers = messenger.ask_prepared(messages.FINISH, requests, messages.Ready, names)
    messenger.write_rejected(answers.rejected, names, "finish")
    return len(answers.accepted)


# --- parts -----------------------------------------------------------------------------------------------------------


def _describe_backbone(run: RunConfig, name: str, backbone: Backbone) -> BackboneFacts:
    """Returns what a report says of a backbone."""
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


def _show_witnesses(
    messenger: Messenger,
    requests: Mapping[int, messages.TrainRequest | messages.EvaluateRequest],
    names: Mapping[int, str],
) -> dict[int, messages.Request]:
    """Returns the requests, each with the witness that is kept of its site's ledger."""
    kept = {node: messenger.witnesses.find(names[node]) for node in requests}
    return {node: replace(request, witness=kept[node]) if kept[node] else request for node, request in requests.items()}


def _select_groups(heads: Heads, groups: Collection[str]) -> Heads:
    return {name: heads[name] for name in sorted(groups)}


def _names_of(participants: Sequence[Participant]) -> dict[int, str]:
    return {participant.node_id: participant.site for participant in participants}


def _initial_state(messenger: Messenger, backbones: Mapping[str, Backbone]) -> Checkpoint:
    run = messenger.run
    tasks = {name: open_task(spec, f"tasks.{name}") for name, spec in run.tasks.items()}
    modules = create_modules(run, tasks, backbones)
    heads = {name: parameters(module) for name, module in modules.items()}
    aggregator = open_aggregator(run.aggregation, "aggregation")
    states: dict[str, State] = {name: aggregator.start(params) for name, params in heads.items()}
    return Checkpoint(messenger.run_id, 0, heads, states, dict.fromkeys(heads, 0))


def _sample_cohort(run: RunConfig, participants: list[Participant], round_: int) -> list[Participant]:
    count = run.cohort.count_asked(len(participants))
    if count >= len(participants):
        return participants
    cohort = random.Random(f"{run.seed}/{round_}").sample(participants, count)
    return sorted(cohort, key=lambda participant: participant.site)


def _aggregate(
    run: RunConfig, state: Checkpoint, by_task: Mapping[str, list[Weighted]], round_: int
) -> tuple[Checkpoint, set[str]]:
    aggregator = open_aggregator(run.aggregation, "aggregation")
    heads, states, updated = dict(state.heads), dict(state.states), set()
    required = count_required_updates(run)
    for task, deltas in by_task.items():
        if len(deltas) < required:
            continue
        heads[task], states[task] = aggregator.update(heads[task], states[task], deltas)
        updated.add(task)
    updates = {task: count + (task in updated) for task, count in state.updates.items()}
    return Checkpoint(state.run_id, round_, heads, states, updates), updated
