"""Before the first round: sites join, and those that lack a backbone receive it. Nothing is spent yet.

A run that cannot reach its quorum ends here, with every site's reason.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from common import messages
from common.events import BackboneSent, SiteJoined
from common.offers import SentBackbone, list_digests, make_offer
from common.run import MAX_PUBLIC_SIZE, RunConfig
from common.types import BackboneBlob, BadInput, RunFailed
from server.rounds.aggregators import count_required_updates
from server.rounds.messenger import Answers, Messenger, Participant
from server.rounds.replies import MAY_CHANGE, Rejected, describe_reasons

_POLL_S = 0.2
_ASK_AGAIN_S = 5.0
"""Time before a site that waits for its staff's approval is asked again."""
_LONGEST_WAIT_S = 60.0
_SHORTEST_WAIT_S = 2.0
"""Wait for one answer before the site is asked again: joining twice is joining once."""
PART_TRIES = 3


@dataclass
class RollCall:
    """The answers of the nodes to the offer of a run so far.

    Attributes:
        participants: site name -> the site that joined.
        rejected: node id -> its last answer that did not make it join.
        asked_at: node id -> monotonic time at which it was last asked.
    """

    participants: dict[str, Participant] = field(default_factory=dict)
    rejected: dict[int, Rejected] = field(default_factory=dict)
    asked_at: dict[int, float] = field(default_factory=dict)

    def select_open(self, present: set[int]) -> set[int]:
        """Returns the nodes that may still agree: not asked yet, silent so far, or waiting for their staff."""
        joined = {participant.node_id for participant in self.participants.values()}
        final = {node for node, item in self.rejected.items() if item.reason not in MAY_CHANGE}
        return present - joined - final


def join_sites(
    messenger: Messenger,
    backbones: Mapping[str, SentBackbone],
    node_ids: Mapping[int, str] | None,
    *,
    roll_call: RollCall,
    first_round: int = 1,
    waits_for_all: bool = False,
) -> list[Participant]:
    """Returns the sites that agree to the run, by name, once they are a quorum. Nothing is spent yet.

    Sites that are not connected, do not answer, or wait for their staff's approval are asked again until the deadline.
    Where an audit is required, a site may take as long as for a round: it audits before it answers.

    Args:
        messenger: connection to the sites, with the run and its journal.
        backbones: the run's backbones by name.
        node_ids: node id -> name of every admitted site; None where names are not known beforehand.
        roll_call: receives the answers.
        first_round: number of the round that comes next; a site that has not begun plans for the rounds from there on.
        waits_for_all: waits for the others until the deadline also where there is a quorum.

    Raises:
        RunFailed: there is no quorum, and no site is left to wait for or the deadline has passed; the message names
            every site's reason.
    """
    run = messenger.run
    request = messages.JoinRequest(
        messenger.run_id, make_offer(run, backbones), list_digests(backbones), first_round=first_round
    )
    deadline = time.monotonic() + run.cohort.join_timeout_s
    expected = len(node_ids) if node_ids is not None else run.cohort.min_sites
    while True:
        now = time.monotonic()
        present = {node for node in messenger.grid.get_node_ids() if node_ids is None or node in node_ids}
        undecided = roll_call.select_open(present)
        due = sorted(node for node in undecided if now - roll_call.asked_at.get(node, -math.inf) > _ASK_AGAIN_S)
        if due and now <= deadline:
            _offer_run(messenger, request, due, roll_call, node_ids, deadline - now)
            roll_call.asked_at |= dict.fromkeys(due, time.monotonic())
            continue
        problem = describe_missing_quorum(run, roll_call.participants)
        is_over = now > deadline or not (undecided or len(present) < expected)
        if problem is None and (is_over or not waits_for_all):
            return sorted(roll_call.participants.values(), key=lambda participant: participant.site)
        if is_over:
            raise RunFailed(f"{problem}: {_describe_reasons(roll_call.rejected, node_ids, present)}")
        time.sleep(_POLL_S)


def prepare_sites(
    messenger: Messenger,
    participants: list[Participant],
    backbones: Mapping[str, SentBackbone],
    roll_call: RollCall,
) -> list[Participant]:
    """Has every participant prepare; a backbone is sent, in parts, only to sites whose tasks need it and that lack it.

    Args:
        messenger: connection to the sites, with the run and its journal.
        participants: sites that joined.
        backbones: the run's backbones by name.
        roll_call: receives the answers of those that are not ready.

    Returns:
        The participants that are ready.

    Raises:
        RunFailed: fewer than a quorum are ready.
    """
    specs: dict[int, dict[str, str]] = {participant.node_id: {} for participant in participants}
    for name, backbone in backbones.items():
        # Two names may mean one backbone: it is sent once.
        lacking = [
            participant
            for participant in participants
            if name in participant.backbones
            and not participant.backbones[name].whole
            and backbone.digest not in specs[participant.node_id]
        ]
        if not lacking:
            continue
        blob = backbone.blob()
        send_backbone_parts(messenger, lacking, name, blob)
        for participant in lacking:
            specs[participant.node_id][blob.digest] = blob.spec
    requests: dict[int, messages.Request] = {
        node: messages.PrepareRequest(messenger.run_id, received) for node, received in specs.items()
    }
    answers = messenger.ask(messages.PREPARE, requests, messages.Ready)
    names = {participant.node_id: participant.site for participant in participants}
    messenger.write_rejected(answers.rejected, names, "prepare")
    roll_call.rejected |= {item.node_id: item for item in answers.rejected}
    roll_call.participants = {
        participant.site: participant for participant in participants if participant.node_id in answers.accepted
    }
    problem = describe_missing_quorum(messenger.run, roll_call.participants)
    if problem is not None:
        rejected = {item.node_id: item for item in answers.rejected}
        raise RunFailed(f"{problem}: {_describe_reasons(rejected, None, set())}")
    return list(roll_call.participants.values())


def send_backbone_parts(messenger: Messenger, participants: list[Participant], name: str, blob: BackboneBlob) -> None:
    """Sends each participant the parts of a backbone that it does not hold; a lost part is sent again, a few times.

    Args:
        messenger: connection to the sites, with the run and its journal.
        participants: sites that lack parts of the backbone.
        name: the backbone's name in the run.
        blob: the backbone as it travels.

    Raises:
        BadInput: the weights are larger than all parts together may be.
    """
    total = count_parts(messenger.run, name, blob)
    names = {participant.node_id: participant.site for participant in participants}
    missing = {
        participant.node_id: [index for index in range(total) if index not in participant.backbones[name].parts]
        for participant in participants
    }
    sent: dict[int, int] = dict.fromkeys(names, 0)
    tries: dict[int, int] = dict.fromkeys(names, 0)
    while any(missing.values()):
        # All sites' next part is one object: encoded once where they are at the same one.
        index = min(parts[0] for parts in missing.values() if parts)
        part = make_part(messenger.run_id, blob, index, total)
        nodes = [node for node, parts in missing.items() if parts and parts[0] == index]
        answers = messenger.ask(messages.PART, dict.fromkeys(nodes, part), messages.Ready)
        for node in nodes:
            sent[node] += answers.bytes_sent[node]
            if node in answers.accepted:
                missing[node].pop(0)
                tries[node] = 0
            else:
                tries[node] += 1
                # A site without the whole backbone says so when it is asked to prepare.
                missing[node] = missing[node] if tries[node] < PART_TRIES else []
        messenger.write_rejected(answers.rejected, names, "backbone")
        messenger.observe("backbone", index + 1, total)
    for node, num_bytes in sent.items():
        messenger.journal.write(BackboneSent(site=names[node], backbone=name, size_bytes=num_bytes))


def count_parts(run: RunConfig, name: str, blob: BackboneBlob) -> int:
    """Returns the number of parts in which a backbone's weights travel.

    Args:
        run: the run.
        name: the backbone's name in the run.
        blob: the backbone as it travels.

    Raises:
        BadInput: the weights are larger than all parts together may be.
    """
    total = -(-len(blob.weights) // messages.PART_BYTES)
    if total > messages.MAX_PARTS:
        most = messages.MAX_PARTS * messages.PART_BYTES >> 20
        raise BadInput(f"{run.backbone_key(name)}: expected at most {most} MiB of weights, got more")
    return total


def make_part(run_id: str, blob: BackboneBlob, index: int, total: int) -> messages.PartRequest:
    """Returns the message with one part of a backbone's weights.

    Args:
        run_id: the run's id.
        blob: the backbone as it travels.
        index: position of the part, from 0.
        total: number of parts.
    """
    start = index * messages.PART_BYTES
    return messages.PartRequest(run_id, blob.digest, index, total, blob.weights[start : start + messages.PART_BYTES])


# --- parts -----------------------------------------------------------------------------------------------------------


def _offer_run(
    messenger: Messenger,
    request: messages.JoinRequest,
    nodes: list[int],
    roll_call: RollCall,
    node_ids: Mapping[int, str] | None,
    left_s: float,
) -> None:
    """Offers the run to some nodes: a site that agrees becomes a participant, of the others the reason is kept."""
    run = messenger.run
    timeout_s = None if run.audit == "required" else max(_SHORTEST_WAIT_S, min(_LONGEST_WAIT_S, left_s))
    names = {} if node_ids is None else {node: node_ids[node] for node in nodes}
    requests = {node: show_witness(messenger, request, names.get(node, "")) for node in nodes}
    answers = messenger.ask(messages.JOIN, requests, messages.JoinReply, timeout_s=timeout_s)
    if node_ids is None:
        answers = _show_to_named(messenger, request, answers, timeout_s)
    for node in sorted(answers.accepted):
        reply, _ = answers.accepted[node]
        problem = find_join_problem(run, reply, roll_call.participants, None if node_ids is None else node_ids[node])
        if problem:
            answers.rejected.append(Rejected(node, problem, reply.site))
            continue
        roll_call.participants[reply.site] = Participant.of(node, reply, run)
        roll_call.rejected.pop(node, None)
        messenger.journal.write(
            SiteJoined(
                site=reply.site,
                tasks=dict(reply.tasks),
                unit=reply.unit,
                delta=reply.delta,
                budget_epsilon=reply.budget_epsilon,
            )
        )
    joined = {participant.node_id: participant.site for participant in roll_call.participants.values()}
    messenger.witnesses.keep(
        {joined[node]: reply.witness for node, (reply, _) in answers.accepted.items() if node in joined}
    )
    before = {node: item.reason for node, item in roll_call.rejected.items()}
    changed = [item for item in answers.rejected if before.get(item.node_id) != item.reason]
    messenger.write_rejected(changed, node_ids or {}, "join")
    roll_call.rejected |= {item.node_id: item for item in answers.rejected}


def _show_to_named(
    messenger: Messenger, request: messages.JoinRequest, answers: Answers[messages.JoinReply], timeout_s: float | None
) -> Answers[messages.JoinReply]:
    """Offers the run once more, with a witness, to sites whose name is known only from their reply."""
    named = {node: show_witness(messenger, request, reply.site) for node, (reply, _) in answers.accepted.items()}
    late = {node: offer for node, offer in named.items() if offer != request}
    again = messenger.ask(messages.JOIN, late, messages.JoinReply, timeout_s=timeout_s)
    accepted = {node: reply for node, reply in answers.accepted.items() if node not in late} | dict(again.accepted)
    return Answers(accepted, answers.rejected + again.rejected, answers.bytes_sent)


def show_witness(messenger: Messenger, request: messages.JoinRequest, site: str) -> messages.JoinRequest:
    """Returns the offer with the witness that is kept of a site's ledger, where there is one.

    Args:
        messenger: connection to the sites, with the witnesses.
        request: the offer.
        site: the site's name; "" where it is not known.
    """
    witness = messenger.witnesses.find(site)
    return request if witness is None else replace(request, witness=witness)


def find_join_problem(
    run: RunConfig, reply: messages.JoinReply, participants: Mapping[str, Participant], admitted_as: str | None
) -> str | None:
    """Returns why a site that agreed cannot take part; None where it can.

    Args:
        run: the run.
        reply: the site's declarations.
        participants: the sites that take part already, by name.
        admitted_as: the name with which the site was admitted; None where names are not known beforehand.
    """
    if admitted_as is not None and reply.site != admitted_as:
        return "joined under another name than the one it was admitted with"
    if reply.site in participants:
        return "another site joined under the same name"
    if not reply.tasks or not set(reply.tasks) <= set(run.tasks):
        return "joined with tasks that are not the run's"
    if set(reply.backbones) != {name for task in reply.tasks for name in run.backbones_of(task)}:
        return "joined with other backbones than its tasks stand on"
    if max(reply.tasks.values()) > MAX_PUBLIC_SIZE:
        return f"declared a public size above {MAX_PUBLIC_SIZE}"
    if run.trust is not None and set(reply.tasks) != set(run.tasks):
        return "joined a run of secure sums without all of its tasks"
    return None


def describe_missing_quorum(run: RunConfig, participants: Mapping[str, Participant]) -> str | None:
    """Returns what the participants lack to be a quorum, of all and for each task; None where nothing is missing."""
    if len(participants) < run.cohort.min_sites:
        return f"expected at least {run.cohort.min_sites} site(s) to join, got {len(participants)}"
    least, required = run.cohort.min_replies_per_task, count_required_updates(run)
    for task in run.tasks:
        count = sum(task in participant.tasks for participant in participants.values())
        if count < required:
            why = f" (aggregation {run.aggregation.kind} needs so many updates)" if required > least else ""
            return f"expected at least {required} site(s) with task {task} to join{why}, got {count}"
    return None


def _describe_reasons(rejected: Mapping[int, Rejected], node_ids: Mapping[int, str] | None, present: set[int]) -> str:
    names = node_ids or {}
    absent = [Rejected(node, "not connected") for node in names if node not in present]
    return describe_reasons([*rejected.values(), *absent], names) or "no other site was connected"
