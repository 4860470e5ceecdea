"""The coordinator's side of a run: roll call, backbones, rounds, evaluations, heads home. One readable loop.

Invariant: after every round the journal and the checkpoint on disk say all that is needed to report or to continue;
a bad reply costs its sender its place in that round and nothing else.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from common import messages
from common.backbones import Backbone
from common.events import Journal
from common.model.parameters import parameters
from common.model.trunks import initial_modules
from common.run import RunConfig
from common.tasks import open_task
from common.types import BadInput, Heads, heads_digest
from server.rounds.aggregators import State, Weighted, open_aggregator
from server.rounds.checkpoint import Checkpoint, save_checkpoint
from server.rounds.evaluation import SiteSums, check_evaluation, evaluated
from server.rounds.join import hand_out, roll_call
from server.rounds.messenger import Desk, Member, Observe
from server.rounds.replies import SetAside, check_delta, check_plan


@dataclass(frozen=True)
class Outcome:
    """How a run ended: final heads and how often each task was updated."""

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
    roster: Mapping[int, str] | None = None,
) -> Outcome:
    """Train a run's heads with the sites behind a grid.

    Args:
        grid: Flower's line to the sites.
        run: what to train.
        backbones: the run's frozen backbones, to hand out.
        run_id: unique id of the run, a plain name.
        folder: where checkpoints go.
        journal: where facts go.
        executor: what carries the messages, for the report.
        observe: told the progress.
        resume: continue after this checkpoint instead of from new heads.
        roster: node id -> name of every admitted site; None where names are not known beforehand.

    Raises:
        RunFailed: too few sites joined or could be prepared.
    """
    desk = Desk(grid, run, run_id, journal, observe)
    journal.write(
        "run_started",
        run_id=run_id,
        name=run.name,
        executor=executor,
        path=str(folder),
        rounds=run.rounds,
        resumed=resume is not None,
        audit_required=run.audit == "required",
        tasks={name: spec.kind for name, spec in run.tasks.items()},
        backbones={name: _about(run, name, backbone) for name, backbone in backbones.items()},
    )
    members = roll_call(desk, backbones, roster)
    observe("joined", len(members), len(members))
    started = time.monotonic()
    members = hand_out(desk, members, backbones)
    journal.write("features_ready", seconds=round(time.monotonic() - started, 3))
    state = resume or _new_state(desk, backbones)
    for round_ in range(state.rounds_done + 1, run.rounds + 1):
        observe("rounds", round_ - 1, run.rounds)
        state = one_round(desk, members, state, round_)
        # Before the checkpoint: a run that dies here does its round again, from stored replies, and evaluates then.
        evaluate_round(desk, members, state.heads, round_)
        save_checkpoint(folder / "checkpoint.safetensors", state)
    observe("rounds", run.rounds, run.rounds)
    bring_home(desk, members, state.heads)
    journal.write("run_ended", updates=dict(state.updates), heads=heads_digest(state.heads))
    return Outcome(state.heads, state.updates)


def one_round(desk: Desk, members: list[Member], state: Checkpoint, round_: int) -> Checkpoint:
    """Ask a cohort to train, aggregate task by task; the new state."""
    started = time.monotonic()
    cohort = _sample(desk.run, members, round_)
    payloads = _requests(cohort, lambda own: messages.TrainRequest(desk.run_id, round_, _own(state.heads, own)))
    good, aside, down = desk.ask(messages.TRAIN, payloads, messages.TrainReply, round_)
    by_task: dict[str, list[Weighted]] = {name: [] for name in state.heads}
    names = {member.node_id: member.site for member in cohort}
    accepted = {}
    for member in cohort:
        if member.node_id not in good:
            continue
        reply, size = good[member.node_id]
        try:
            check_delta(reply.delta, _own(state.heads, member.entries), desk.run.max_delta_norm)
            check_plan(reply.plan, desk.run)
        except BadInput as error:
            aside.append(SetAside(member.node_id, str(error)))
            continue
        accepted[member.site] = {"down": down[member.node_id], "up": size, "plan": asdict(reply.plan)}
        for task, delta in reply.delta.heads.items():
            by_task[task].append(Weighted(float(member.entries[task]), delta))
    desk.write_aside(aside, names, at="train", round=round_)
    new, updated = _aggregate(desk.run, state, by_task, round_)
    desk.journal.write(
        "round",
        round=round_,
        sites=accepted,
        tasks={task: len(deltas) for task, deltas in by_task.items()},
        updated=sorted(updated),
        seconds=round(time.monotonic() - started, 4),
    )
    return new


def evaluate_round(desk: Desk, members: list[Member], heads: Heads, round_: int) -> None:
    """Ask every member for noised statistics of its held-out units, where the run evaluates after this round."""
    asked = desk.run.evaluation
    if asked is None or not asked.due(round_, desk.run.rounds):
        return
    tasks = {name: open_task(spec, f"tasks.{name}") for name, spec in desk.run.tasks.items()}
    payloads = _requests(members, lambda own: messages.EvaluateRequest(desk.run_id, round_, _own(heads, own)))
    good, aside, _ = desk.ask(messages.EVALUATE, payloads, messages.EvaluateReply, round_)
    releases = []
    for member in members:
        if member.node_id not in good:
            continue
        reply, _ = good[member.node_id]
        try:
            check_evaluation(reply, {task: tasks[task] for task in member.tasks})
            releases.append(SiteSums(member.site, reply))
        except BadInput as error:
            aside.append(SetAside(member.node_id, str(error)))
    names = {member.node_id: member.site for member in members}
    desk.journal.write(
        "evaluation",
        round=round_,
        tasks={name: asdict(result) for name, result in evaluated(tasks, releases, desk.run.seed).items()},
        # What follows for a site's account: T tasks are one release of this noise.
        noise={release.site: release.reply.noise_multiplier for release in releases},
        # A site that does not evaluate is no worse a member of the run.
        without={names[item.node_id]: item.reason for item in aside if item.node_id in names},
    )


def bring_home(desk: Desk, members: list[Member], heads: Heads) -> None:
    """Send every member the final heads of its tasks, with their digest."""

    def request(entries: Collection[str]) -> messages.FinishRequest:
        own = _own(heads, entries)
        return messages.FinishRequest(desk.run_id, own, heads_digest(own))

    payloads = _requests(members, request)
    _, aside, _ = desk.ask(messages.FINISH, payloads, messages.Ready)
    desk.write_aside(aside, {member.node_id: member.site for member in members}, at="finish")


# --- parts -----------------------------------------------------------------------------------------------------------


def _about(run: RunConfig, name: str, backbone: Backbone) -> dict[str, Any]:
    """What a report says of a backbone."""
    settings = backbone.public_spec()
    tasks = [task for task in run.tasks if run.backbone_of(task) == name]
    return {"kind": settings["kind"], "model": settings.get("model"), "digest": backbone.digest, "tasks": tasks}


def _requests(
    members: Sequence[Member], request: Callable[[Collection[str]], messages.Request]
) -> dict[int, messages.Request]:
    """Node -> what it is asked. Sites with the same entries share one object, which is encoded once."""
    each = {entries: request(entries) for entries in {frozenset(member.entries) for member in members}}
    return {member.node_id: each[frozenset(member.entries)] for member in members}


def _own(heads: Heads, entries: Collection[str]) -> Heads:
    return {name: heads[name] for name in sorted(entries)}


def _new_state(desk: Desk, backbones: Mapping[str, Backbone]) -> Checkpoint:
    tasks = {name: open_task(spec, f"tasks.{name}") for name, spec in desk.run.tasks.items()}
    modules = initial_modules(desk.run, tasks, backbones)
    heads = {name: parameters(module) for name, module in modules.items()}
    aggregator = open_aggregator(desk.run.aggregation, "aggregation")
    states: dict[str, State] = {name: aggregator.start(params) for name, params in heads.items()}
    return Checkpoint(desk.run_id, 0, heads, states, dict.fromkeys(heads, 0))


def _sample(run: RunConfig, members: list[Member], round_: int) -> list[Member]:
    count = max(run.cohort.min_sites, math.ceil(run.cohort.fraction * len(members)))
    if count >= len(members):
        return members
    chosen = random.Random(f"{run.seed}/{round_}").sample(members, count)
    return sorted(chosen, key=lambda member: member.site)


def _aggregate(
    run: RunConfig, state: Checkpoint, by_task: Mapping[str, list[Weighted]], round_: int
) -> tuple[Checkpoint, set[str]]:
    aggregator = open_aggregator(run.aggregation, "aggregation")
    heads, states, updated = dict(state.heads), dict(state.states), set()
    for task, deltas in by_task.items():
        if len(deltas) < max(1, run.cohort.min_replies_per_task):
            continue
        heads[task], states[task] = aggregator.update(heads[task], states[task], deltas)
        updated.add(task)
    updates = {task: count + (task in updated) for task, count in state.updates.items()}
    return Checkpoint(state.run_id, round_, heads, states, updates), updated
