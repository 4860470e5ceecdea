"""One request to each of some sites, and the replies that can be used.

Waiting is bounded in time, and so is the number of replies: whatever sites send, a request ends. Replies are fetched
one by one, because the SuperLink's client takes them apart as it fetches them: one that cannot be taken apart costs its
sender its place, and nobody else a reply that was paid for.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError

from common import messages
from common.events import Journal, RepliesAwaited, SitePreparedAgain, SiteRejected
from common.flower import UnexpectedObjectContentError
from common.run import RunConfig
from common.types import RunFailed
from server.rounds.replies import NOT_PREPARED, NOT_REACHED, UNREADABLE, Rejected, read_replies
from server.rounds.witnesses import Witnesses

Observe = Callable[[str, int, int], None]
"""Called with the phase under way, how much of it is done, and its total."""

_Reply = TypeVar("_Reply")
_POLL_S = 0.2
_MALFORMED = (
    ArithmeticError,
    AttributeError,
    DecodeError,
    LookupError,
    RecursionError,
    TypeError,
    UnexpectedObjectContentError,
    ValueError,
)
"""What Flower raises over a reply whose parts are not what they claim to be; a lost connection is none of these."""
_MAX_PREPARED_AGAIN = 3
"""So often a site may prepare again in a run: a failing disk must not hold every round up."""
_HEARTBEAT_GRACE_S = 75.0
"""A killed site is noticed only when its heartbeat lapses, about a minute later."""


@dataclass(frozen=True)
class Participant:
    """A site that joined a run.

    Attributes:
        node_id: Flower's number of the site's node.
        site: the site's name.
        tasks: tasks that it takes part in -> their declared public sizes.
        parameter_groups: heads that it trains, and trunks below them -> their public sizes.
        backbones: backbones that its tasks stand on -> what it holds of them.
    """

    node_id: int
    site: str
    tasks: Mapping[str, int]
    parameter_groups: Mapping[str, int]
    backbones: Mapping[str, messages.Held]


@dataclass(frozen=True)
class Answers(Generic[_Reply]):
    """The answers to one request.

    Attributes:
        accepted: node id -> its reply, and the reply's size in bytes.
        rejected: replies that are not used or did not come; callers add what they reject.
        bytes_sent: node id -> size of what it was sent.
    """

    accepted: Mapping[int, tuple[_Reply, int]]
    rejected: list[Rejected]
    bytes_sent: Mapping[int, int]


@dataclass(frozen=True)
class Messenger:
    """The needs of every step of a run: the connection to the sites, the run, and where facts go.

    Attributes:
        grid: Flower's connection to the sites.
        run: the run's settings.
        run_id: the run's unique id.
        journal: where facts are written.
        observe: called with the progress.
        witnesses: newest witness of each site's ledger.
        num_prepared_again: node id -> how often it was asked to prepare again, so far.
        while_waiting: called again and again while replies are awaited; each returns at once.
    """

    grid: Grid
    run: RunConfig
    run_id: str
    journal: Journal
    observe: Observe
    witnesses: Witnesses = field(default_factory=lambda: Witnesses(None))
    num_prepared_again: Counter[int] = field(default_factory=Counter)
    while_waiting: list[Callable[[], None]] = field(default_factory=list)

    def ask(
        self,
        kind: str,
        payloads: Mapping[int, messages.Request],
        expected: type[_Reply],
        round_: int = 0,
        *,
        timeout_s: float | None = None,
    ) -> Answers[_Reply]:
        """Sends one request to each of some nodes and waits for their replies.

        Args:
            kind: message type, as common.messages names it.
            payloads: node id -> what it is asked; a payload that several nodes share is encoded once.
            expected: type of the reply; another one is rejected.
            round_: number of the round, 0 outside rounds.
            timeout_s: longest wait; by default as long as the run gives a round.

        Returns:
            The replies by node; every node that was asked is among the accepted or the rejected.

        Raises:
            RunFailed: the SuperLink takes no message of this size.
        """
        packed: dict[int, ConfigRecord] = {}  # Requests that differ in their witness share their arrays.
        encoded = {id(payload): messages.encode(payload, packed) for payload in payloads.values()}
        sizes = {key: messages.encoded_size(records) for key, records in encoded.items()}
        outgoing = [
            Message(encoded[id(payload)], dst_node_id=node, message_type=kind, group_id=str(round_))
            for node, payload in payloads.items()
        ]
        asked, not_reached = self._push(outgoing)
        wait_s = self.run.cohort.timeout_s + _HEARTBEAT_GRACE_S if timeout_s is None else timeout_s
        replies, unreadable = self._collect(asked, kind, round_, time.monotonic() + wait_s)
        readable = {message_id: node for message_id, node in asked.items() if message_id not in unreadable}
        accepted, rejected = read_replies(readable, replies, expected)
        rejected += [Rejected(asked[message_id], UNREADABLE) for message_id in sorted(unreadable)]
        rejected += [Rejected(node, NOT_REACHED) for node in not_reached]
        return Answers(accepted, rejected, {node: sizes[id(payload)] for node, payload in payloads.items()})

    def post(self, kind: str, node: int, payload: messages.Request) -> str | None:
        """Sends a request to one node and waits for nothing.

        Args:
            kind: message type, as common.messages names it.
            node: the node.
            payload: what it is asked.

        Returns:
            The message's id for `fetch`; None where the node takes no message because it was removed.
        """
        asked, _ = self._push([Message(messages.encode(payload), dst_node_id=node, message_type=kind, group_id="0")])
        return next(iter(asked), None)

    def fetch(self, message_id: str, node: int, expected: type[_Reply]) -> _Reply | Rejected | None:
        """Returns the reply to a posted message, or why it is not used; None where there is none yet.

        Args:
            message_id: the message's id.
            node: the node that was asked.
            expected: type of the reply.
        """
        try:
            pulled = list(self.grid.pull_messages([message_id]))
        except _MALFORMED:
            return Rejected(node, UNREADABLE)
        if not pulled:
            return None
        accepted, rejected = read_replies({message_id: node}, pulled, expected)
        return accepted[node][0] if node in accepted else rejected[0]

    def ask_prepared(
        self,
        kind: str,
        payloads: Mapping[int, messages.Request],
        expected: type[_Reply],
        names: Mapping[int, str],
        round_: int = 0,
    ) -> Answers[_Reply]:
        """Asks sites that have prepared the run; those that lost what they prepared do it again and are asked again.

        Args:
            kind: message type, as common.messages names it.
            payloads: node id -> what it is asked.
            expected: type of the reply.
            names: node id -> site name.
            round_: number of the round, 0 outside rounds.

        Returns:
            The replies by node, as `ask` returns them.
        """
        answers = self.ask(kind, payloads, expected, round_)
        lost = [item.node_id for item in answers.rejected if item.reason == NOT_PREPARED]
        lost = [node for node in lost if self.num_prepared_again[node] < _MAX_PREPARED_AGAIN]
        if not lost:
            return answers
        self.num_prepared_again.update(lost)
        prepare = messages.PrepareRequest(self.run_id, {})  # What it stands on, the site has had since it joined.
        ready = self.ask(messages.PREPARE, dict.fromkeys(lost, prepare), messages.Ready, round_).accepted
        for node in lost:
            self.journal.write(SitePreparedAgain(site=names[node], ready=node in ready, round=round_ or None))
        again = self.ask(kind, {node: payloads[node] for node in ready}, expected, round_)
        rejected = [item for item in answers.rejected if item.node_id not in ready] + again.rejected
        return Answers({**answers.accepted, **again.accepted}, rejected, answers.bytes_sent)

    def write_rejected(
        self, rejected: Sequence[Rejected], names: Mapping[int, str], stage: str, round_: int | None = None
    ) -> None:
        """Writes to the journal whose replies are not used, and why.

        Args:
            rejected: the replies.
            names: node id -> site name, as far as names are known.
            stage: what was asked: join, backbone, prepare, train or finish.
            round_: number of the round; None outside rounds.
        """
        for item in rejected:
            event = SiteRejected(site=item.name(names), reason=item.reason, stage=stage, round=round_)
            self.journal.write(event)

    def _push(self, outgoing: Sequence[Message]) -> tuple[dict[str, int], list[int]]:
        """Returns message id -> node, and the nodes that take no message because they were removed."""
        pushed = list(self.grid.push_messages(outgoing))
        if len(pushed) != len(outgoing):
            raise RunFailed(
                f"expected the SuperLink to take {len(outgoing)} message(s), it took none: they are too large"
            )
        nodes = [message.metadata.dst_node_id for message in outgoing]
        asked = {message_id: node for message_id, node in zip(pushed, nodes, strict=True) if message_id}
        return asked, [node for message_id, node in zip(pushed, nodes, strict=True) if not message_id]

    def _collect(
        self, asked: Mapping[str, int], kind: str, round_: int, deadline: float
    ) -> tuple[list[Message], set[str]]:
        """Returns the replies that came before the deadline, and the messages whose reply cannot be read.

        Asked for often, because Flower's own call waits 3 s. A flood is bounded: the first reply to each message is
        kept, and of the rest as many as can be named.
        """
        replies: list[Message] = []
        unreadable: set[str] = set()
        waiting = set(asked)
        while waiting:
            before = len(waiting)
            for message_id in sorted(waiting):
                try:
                    pulled = list(self.grid.pull_messages([message_id]))
                except _MALFORMED:
                    unreadable.add(message_id)
                    waiting.discard(message_id)
                    continue
                for message in pulled:
                    answered = message.metadata.reply_to_message_id
                    if answered in waiting or len(replies) < 2 * len(asked):
                        replies.append(message)
                    waiting.discard(answered)
            if not waiting or time.monotonic() > deadline:
                break
            if len(waiting) < before:
                node_ids = tuple(sorted(asked[item] for item in waiting))
                self.journal.write(RepliesAwaited(message_type=kind, round=round_, node_ids=node_ids))
            self.observe(kind, len(asked) - len(waiting), len(asked))
            for look in self.while_waiting:
                look()
            time.sleep(_POLL_S)
        return replies, unreadable
