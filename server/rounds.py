"""The coordinator's side of a run: roll call, backbone, rounds, evaluations, heads home. One readable loop.

Invariant: after every round the journal and the checkpoint on disk say all that is needed to report or to continue;
a bad reply costs its sender its place in that round and nothing else.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from flwr.app import Message
from flwr.serverapp import Grid

from common import wire
from common.backbones import Backbone
from common.config import MAX_PUBLIC_SIZE, RunConfig
from common.heads import initial_heads, parameters
from common.journal import Journal
from common.offers import offer_of
from common.tasks import open_task
from common.types import BadInput, Heads, RunFailed, heads_digest
from server.aggregators import State, Weighted, open_aggregator
from server.checkpoint import Checkpoint, save_checkpoint
from server.collect import SetAside, check_delta, check_plan, read_replies
from server.evaluation import SiteSums, check_evaluation, evaluated

Observe = Callable[[str, int, int], None]
"""Told what is under way: phase, done, total."""

_Reply = TypeVar("_Reply")
_ENGINE_GRACE_S = 75.0  # A killed site is noticed only when its heartbeat lapses, about a minute later.


@dataclass(frozen=True)
class Member:
    """A site that joined."""

    node_id: int
    site: str
    tasks: Mapping[str, int]
    has_backbone: bool


@dataclass(frozen=True)
class Outcome:
    """How a run ended: final heads and how often each task was updated."""

    heads: Heads
    updates: Mapping[str, int]


@dataclass(frozen=True)
class Desk:
    """What every step of a run needs: the line to the sites, the run, and where facts go."""

    grid: Grid
    run: RunConfig
    run_id: str
    journal: Journal

    def ask(
        self, kind: str, payloads: Mapping[int, wire.Request], expected: type[_Reply], round_: int = 0
    ) -> tuple[dict[int, tuple[_Reply, int]], list[SetAside], dict[int, int]]:
        """Send one request to each node; good replies, those set aside, and bytes sent to each node."""
        messages, sent = [], {}
        # Payloads that are one object (the common case) are encoded once.
        encoded = {id(payload): wire.encode(payload) for payload in payloads.values()}
        sizes = {key: wire.encoded_size(records) for key, records in encoded.items()}
        for node, payload in payloads.items():
            sent[node] = sizes[id(payload)]
            messages.append(Message(encoded[id(payload)], dst_node_id=node, message_type=kind, group_id=str(round_)))
        replies = self.grid.send_and_receive(messages, timeout=self.run.cohort.timeout_s + _ENGINE_GRACE_S)
        asked = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
        good, aside = read_replies(asked, list(replies), expected)
        return good, aside, sent


def run_federation(
    grid: Grid,
    run: RunConfig,
    backbone: Backbone,
    *,
    run_id: str,
    folder: Path,
    journal: Journal,
    executor: str,
    observe: Observe = lambda phase, done, total: None,
    resume: Checkpoint | None = None,
) -> Outcome:
    """Train a run's heads with the sites behind a grid.

    Args:
        grid: Flower's line to the sites.
        run: what to train.
        backbone: the frozen backbone to hand out.
        run_id: unique id of the run, a plain name.
        folder: where checkpoints go.
        journal: where facts go.
        executor: what carries the messages, for the report.
        observe: told the progress.
        resume: continue after this checkpoint instead of from new heads.

    Raises:
        RunFailed: too few sites joined or could be prepared.
    """
    desk = Desk(grid, run, run_id, journal)
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
        backbone={"kind": run.backbone.kind, "model": backbone.public_spec().get("model"), "digest": backbone.digest},
    )
    members = roll_call(desk, backbone)
    observe("joined", len(members), len(members))
    started = time.monotonic()
    members = hand_out(desk, members, backbone)
    journal.write("features_ready", seconds=round(time.monotonic() - started, 3))
    state = resume or _new_state(desk, backbone)
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


def roll_call(desk: Desk, backbone: Backbone) -> list[Member]:
    """The sites that agree to the run, by name. Nothing is spent yet.

    Raises:
        RunFailed: fewer than the cohort's minimum.
    """
    nodes = _wait_for_nodes(desk)
    request = wire.JoinRequest(desk.run_id, offer_of(desk.run, backbone), backbone.digest)
    good, aside, _ = desk.ask(wire.JOIN, {node: request for node in nodes}, wire.JoinReply)
    members: dict[str, Member] = {}
    for node in sorted(good):
        reply, _ = good[node]
        problem = _join_problem(desk.run, reply, members)
        if problem:
            aside.append(SetAside(node, problem))
            continue
        members[reply.site] = Member(node, reply.site, reply.tasks, reply.has_backbone)
        desk.journal.write(
            "joined",
            site=reply.site,
            tasks=dict(reply.tasks),
            unit=reply.unit.value,
            delta=reply.delta,
            budget_epsilon=reply.budget_epsilon,
        )
    _write_aside(desk, aside, {}, at="join")
    return _enough(desk, list(members.values()), "joined", aside)


def hand_out(desk: Desk, members: list[Member], backbone: Backbone) -> list[Member]:
    """Have every member prepare; the backbone travels only to sites that lack it.

    Raises:
        RunFailed: fewer than the cohort's minimum are ready.
    """
    with_weights = wire.PrepareRequest(desk.run_id, backbone.blob())
    without = wire.PrepareRequest(desk.run_id, None)
    payloads: dict[int, wire.Request] = {
        member.node_id: without if member.has_backbone else with_weights for member in members
    }
    good, aside, sent = desk.ask(wire.PREPARE, payloads, wire.Ready)
    names = {member.node_id: member.site for member in members}
    for member in members:
        if not member.has_backbone:
            desk.journal.write("backbone_sent", site=member.site, bytes=sent[member.node_id])
    _write_aside(desk, aside, names, at="prepare")
    return _enough(desk, [member for member in members if member.node_id in good], "ready", aside)


def one_round(desk: Desk, members: list[Member], state: Checkpoint, round_: int) -> Checkpoint:
    """Ask a cohort to train, aggregate task by task; the new state."""
    started = time.monotonic()
    cohort = _sample(desk.run, members, round_)
    sent_heads = {member.node_id: {task: state.heads[task] for task in sorted(member.tasks)} for member in cohort}
    payloads: dict[int, wire.Request] = {
        node: wire.TrainRequest(desk.run_id, round_, heads) for node, heads in sent_heads.items()
    }
    good, aside, down = desk.ask(wire.TRAIN, payloads, wire.TrainReply, round_)
    by_task: dict[str, list[Weighted]] = {task: [] for task in desk.run.tasks}
    names = {member.node_id: member.site for member in cohort}
    accepted = {}
    for member in cohort:
        if member.node_id not in good:
            continue
        reply, size = good[member.node_id]
        try:
            check_delta(reply.delta, sent_heads[member.node_id], desk.run.max_delta_norm)
            check_plan(reply.plan, desk.run)
        except BadInput as error:
            aside.append(SetAside(member.node_id, str(error)))
            continue
        accepted[member.site] = {"down": down[member.node_id], "up": size, "plan": asdict(reply.plan)}
        for task, delta in reply.delta.heads.items():
            by_task[task].append(Weighted(float(member.tasks[task]), delta))
    _write_aside(desk, aside, names, at="train", round=round_)
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
    payloads: dict[int, wire.Request] = {
        member.node_id: wire.EvaluateRequest(desk.run_id, round_, {task: heads[task] for task in sorted(member.tasks)})
        for member in members
    }
    good, aside, _ = desk.ask(wire.EVALUATE, payloads, wire.EvaluateReply, round_)
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
    payloads: dict[int, wire.Request] = {}
    for member in members:
        own = {task: heads[task] for task in sorted(member.tasks)}
        payloads[member.node_id] = wire.FinishRequest(desk.run_id, own, heads_digest(own))
    _, aside, _ = desk.ask(wire.FINISH, payloads, wire.Ready)
    _write_aside(desk, aside, {member.node_id: member.site for member in members}, at="finish")


# --- parts -----------------------------------------------------------------------------------------------------------


def _new_state(desk: Desk, backbone: Backbone) -> Checkpoint:
    tasks = {name: open_task(spec, f"tasks.{name}") for name, spec in desk.run.tasks.items()}
    modules = initial_heads(tasks, {name: backbone.feature_dim for name in tasks}, desk.run.seed)
    heads = {name: parameters(module) for name, module in modules.items()}
    aggregator = open_aggregator(desk.run.aggregation, "aggregation")
    states: dict[str, State] = {name: aggregator.start(params) for name, params in heads.items()}
    return Checkpoint(desk.run_id, 0, heads, states, dict.fromkeys(heads, 0))


def _wait_for_nodes(desk: Desk) -> list[int]:
    deadline = time.monotonic() + desk.run.cohort.join_timeout_s
    while True:
        nodes = sorted(desk.grid.get_node_ids())
        if len(nodes) >= desk.run.cohort.min_sites or time.monotonic() > deadline:
            return nodes
        time.sleep(0.2)


def _join_problem(run: RunConfig, reply: wire.JoinReply, members: Mapping[str, Member]) -> str | None:
    if reply.site in members:
        return "another site joined under the same name"
    if not reply.tasks or not set(reply.tasks) <= set(run.tasks):
        return "joined with tasks that are not the run's"
    if max(reply.tasks.values()) > MAX_PUBLIC_SIZE:
        return f"declared a public size above {MAX_PUBLIC_SIZE}"
    return None


def _enough(desk: Desk, members: list[Member], what: str, aside: list[SetAside]) -> list[Member]:
    if len(members) < desk.run.cohort.min_sites:
        reasons = ", ".join(sorted({item.reason for item in aside})) or "no site was there"
        raise RunFailed(f"expected at least {desk.run.cohort.min_sites} site(s) {what}, got {len(members)}: {reasons}")
    return sorted(members, key=lambda member: member.site)


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


def _write_aside(desk: Desk, aside: list[SetAside], names: Mapping[int, str], **where: Any) -> None:
    for item in aside:
        site = names.get(item.node_id) or item.site or f"node {item.node_id}"
        desk.journal.write("set_aside", site=site, reason=item.reason, **where)
