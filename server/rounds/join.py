"""Before the first round: which sites agree to a run, and backbones to those that lack them. Nothing is spent yet.

A run that cannot reach its quorum ends here, with every site's reason.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from common import messages
from common.backbones import Backbone
from common.model.backbones import digests_of
from common.offers import offer_of
from common.run import MAX_PUBLIC_SIZE, RunConfig
from common.types import BackboneBlob, BadInput, RunFailed
from server.rounds.messenger import Desk, Member, name_of
from server.rounds.replies import MAY_CHANGE, SetAside

_LOOK_S = 0.2
_ASK_AGAIN_S = 5.0
"""How long a site that waits for its staff's approval is left alone."""
_PATIENCE_S = 60.0
_LEAST_PATIENCE_S = 2.0
"""How long an answer is waited for before the site is asked again: joining twice is joining once."""
_PART_TRIES = 3


@dataclass
class _Answers:
    """What the nodes have said so far."""

    members: dict[str, Member] = field(default_factory=dict)
    reasons: dict[int, SetAside] = field(default_factory=dict)
    asked_at: dict[int, float] = field(default_factory=dict)

    def open(self, there: set[int]) -> set[int]:
        """Nodes that may still agree: not asked yet, silent so far, or waiting for their staff."""
        joined = {member.node_id for member in self.members.values()}
        final = {node for node, item in self.reasons.items() if item.reason not in MAY_CHANGE}
        return there - joined - final


def roll_call(desk: Desk, backbones: Mapping[str, Backbone], roster: Mapping[int, str] | None) -> list[Member]:
    """The sites that agree to the run, by name, once they are a quorum. Nothing is spent yet.

    Sites that are not there, do not answer, or wait for their staff's approval are asked again until the deadline.
    Where an audit is required, a site may take as long as for a round: it audits before it answers.

    Raises:
        RunFailed: no quorum, and nobody is left to wait for or the deadline has passed; names every site's reason.
    """
    request = messages.JoinRequest(desk.run_id, offer_of(desk.run, backbones), digests_of(backbones))
    deadline = time.monotonic() + desk.run.cohort.join_timeout_s
    expected = len(roster) if roster is not None else desk.run.cohort.min_sites
    answers = _Answers()
    while True:
        now = time.monotonic()
        there = {node for node in desk.grid.get_node_ids() if roster is None or node in roster}
        open_ = answers.open(there)
        due = sorted(node for node in open_ if now - answers.asked_at.get(node, -math.inf) > _ASK_AGAIN_S)
        if due and now <= deadline:
            _offer(desk, request, due, answers, roster, _patience(desk.run, deadline - now))
            answers.asked_at |= dict.fromkeys(due, time.monotonic())
            continue
        problem = _no_quorum(desk.run, answers.members)
        if problem is None:
            return sorted(answers.members.values(), key=lambda member: member.site)
        if now > deadline or not (open_ or len(there) < expected):
            raise RunFailed(f"{problem}: {_why(answers.reasons, roster, there)}")
        time.sleep(_LOOK_S)


def _patience(run: RunConfig, left_s: float) -> float | None:
    return None if run.audit == "required" else max(_LEAST_PATIENCE_S, min(_PATIENCE_S, left_s))


def _offer(
    desk: Desk,
    request: messages.JoinRequest,
    nodes: list[int],
    answers: _Answers,
    roster: Mapping[int, str] | None,
    patience_s: float | None,
) -> None:
    """Offer the run to some nodes: who agrees becomes a member, of the others a reason is kept."""
    good, aside, _ = desk.ask(messages.JOIN, dict.fromkeys(nodes, request), messages.JoinReply, patience_s=patience_s)
    for node in sorted(good):
        reply, _ = good[node]
        problem = _join_problem(desk.run, reply, answers.members, None if roster is None else roster[node])
        if problem:
            aside.append(SetAside(node, problem, reply.site))
            continue
        answers.members[reply.site] = Member(
            node, reply.site, reply.tasks, desk.run.parameter_group_sizes(reply.tasks), reply.backbones
        )
        answers.reasons.pop(node, None)
        desk.journal.write(
            "joined",
            site=reply.site,
            tasks=dict(reply.tasks),
            unit=reply.unit.value,
            delta=reply.delta,
            budget_epsilon=reply.budget_epsilon,
        )
    known = {node: item.reason for node, item in answers.reasons.items()}
    desk.write_aside([item for item in aside if known.get(item.node_id) != item.reason], roster or {}, at="join")
    answers.reasons |= {item.node_id: item for item in aside}


def hand_out(desk: Desk, members: list[Member], backbones: Mapping[str, Backbone]) -> list[Member]:
    """Have every member prepare; a backbone travels, in parts, only to sites whose tasks need it and that lack it.

    Raises:
        RunFailed: fewer than a quorum are ready.
    """
    specs: dict[int, dict[str, str]] = {member.node_id: {} for member in members}
    for name, backbone in backbones.items():
        lacking = [member for member in members if name in member.backbones and not member.backbones[name].whole]
        # Two names may mean one backbone.
        lacking = [member for member in lacking if backbone.digest not in specs[member.node_id]]
        if not lacking:
            continue
        blob = backbone.blob()
        send_parts(desk, lacking, name, blob)
        for member in lacking:
            specs[member.node_id][blob.digest] = blob.spec
    payloads: dict[int, messages.Request] = {
        node: messages.PrepareRequest(desk.run_id, own) for node, own in specs.items()
    }
    good, aside, _ = desk.ask(messages.PREPARE, payloads, messages.Ready)
    desk.write_aside(aside, {member.node_id: member.site for member in members}, at="prepare")
    ready = {member.site: member for member in members if member.node_id in good}
    problem = _no_quorum(desk.run, ready)
    if problem is not None:
        raise RunFailed(f"{problem}: {_why({item.node_id: item for item in aside}, None, set())}")
    return list(ready.values())


def send_parts(desk: Desk, members: list[Member], name: str, blob: BackboneBlob) -> None:
    """Send each member the parts of a backbone that it does not hold; a lost part is sent again, a few times."""
    weights = blob.weights
    total = -(-len(weights) // messages.PART_BYTES)
    if total > messages.MAX_PARTS:
        most = messages.MAX_PARTS * messages.PART_BYTES >> 20
        raise BadInput(f"{desk.run.backbone_key(name)}: expected at most {most} MiB of weights, got more")
    names = {member.node_id: member.site for member in members}
    missing = {member.node_id: [i for i in range(total) if i not in member.backbones[name].parts] for member in members}
    sent: dict[int, int] = dict.fromkeys(names, 0)
    tries: dict[int, int] = dict.fromkeys(names, 0)
    while any(missing.values()):
        # All sites' next part is one object: encoded once where they are at the same one.
        index = min(parts[0] for parts in missing.values() if parts)
        start = index * messages.PART_BYTES
        part = messages.PartRequest(
            desk.run_id, blob.digest, index, total, weights[start : start + messages.PART_BYTES]
        )
        nodes = [node for node, parts in missing.items() if parts and parts[0] == index]
        good, aside, size = desk.ask(messages.PART, dict.fromkeys(nodes, part), messages.Ready)
        for node in nodes:
            sent[node] += size[node]
            if node in good:
                missing[node].pop(0)
                tries[node] = 0
            else:
                tries[node] += 1
                # Whoever gives up has no backbone and says so when asked to prepare.
                missing[node] = missing[node] if tries[node] < _PART_TRIES else []
        desk.write_aside(aside, names, at="backbone")
        desk.observe("backbone", index + 1, total)
    for node, bytes_ in sent.items():
        desk.journal.write("backbone_sent", site=names[node], backbone=name, bytes=bytes_)


# --- parts -----------------------------------------------------------------------------------------------------------


def _join_problem(
    run: RunConfig, reply: messages.JoinReply, members: Mapping[str, Member], admitted_as: str | None
) -> str | None:
    if admitted_as is not None and reply.site != admitted_as:
        return "joined under another name than the one it was admitted with"
    if reply.site in members:
        return "another site joined under the same name"
    if not reply.tasks or not set(reply.tasks) <= set(run.tasks):
        return "joined with tasks that are not the run's"
    if set(reply.backbones) != {run.backbone_of(task) for task in reply.tasks}:
        return "joined with other backbones than its tasks stand on"
    if max(reply.tasks.values()) > MAX_PUBLIC_SIZE:
        return f"declared a public size above {MAX_PUBLIC_SIZE}"
    return None


def _no_quorum(run: RunConfig, members: Mapping[str, Member]) -> str | None:
    """What these members lack to be a quorum, of all and for each task."""
    if len(members) < run.cohort.min_sites:
        return f"expected at least {run.cohort.min_sites} site(s) to join, got {len(members)}"
    for task in run.tasks:
        count = sum(task in member.tasks for member in members.values())
        if count < run.cohort.min_replies_per_task:
            return f"expected at least {run.cohort.min_replies_per_task} site(s) with task {task} to join, got {count}"
    return None


def _why(reasons: Mapping[int, SetAside], roster: Mapping[int, str] | None, there: set[int]) -> str:
    said = [f"{name_of(item, roster or {})}: {item.reason}" for _, item in sorted(reasons.items())]
    said += [f"{name}: not connected" for node, name in sorted((roster or {}).items()) if node not in there]
    return "; ".join(said) or "no other site was there"
