"""One request to each of some sites, and the replies that can be used.

Waiting is bounded in time, and so is the number of replies: whatever sites send, a request ends. Replies are fetched
site by site, because the SuperLink's client takes them apart as it fetches them: one that cannot be taken apart costs
its sender its place, and nobody else a reply that was paid for.

A site is waited for and asked again by the rules of `server/rounds/inquiry.py`. A round's reply that comes late, in the
next round, is an answer there, where the caller says that it can be used.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError

from common import messages
from common.events import Journal, QuorumAwaited, RepliesAwaited, SitePreparedAgain, SiteRejected
from common.flower import ErrorCode, UnexpectedObjectContentError
from common.run import RunConfig
from common.types import BadInput, RunFailed
from server.rounds.inquiry import Inquiry, Waiting
from server.rounds.replies import (
    NOT_ASKED,
    NOT_PREPARED,
    NOT_REACHED,
    UNREADABLE,
    Rejected,
    read_reply,
)
from server.rounds.witnesses import Witnesses

Observe = Callable[[str, int, int], None]
"""Called with the phase under way, how much of it is done, and its total."""

_Reply = TypeVar("_Reply")
_POLL_S = 0.2
_PRESENCE_S = 1.0
"""Time between two questions to the SuperLink for the connected sites."""
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
"""Errors of Flower over a reply whose parts are not what they claim to be; a lost connection is none of these."""
_MAX_PREPARED_AGAIN = 3
"""So often a site may prepare again in a run: a failing disk must not hold every round up."""
_TIMED = (
    messages.TRAIN,
    messages.EVALUATE,
    messages.SUM_KEYS,
    messages.SUM_SHARES,
    messages.MASKED,
    messages.SURVIVORS,
    messages.UNMASK,
)
"""Requests that are repeated round by round: how long a site took tells how long it will take."""


@dataclass(frozen=True)
class Participant:
    """A site that joined a run.

    Attributes:
        node_id: Flower's number of the site's node.
        site: the site's name.
        tasks: tasks that it takes part in -> their declared public sizes.
        parameter_groups: heads that it trains, and trunks below them -> their public sizes.
        backbones: backbones that its tasks stand on -> what it holds of them.
        budget_epsilon: declared epsilon of its whole budget, over all runs.
        delta: delta of that budget.
    """

    node_id: int
    site: str
    tasks: Mapping[str, int]
    parameter_groups: Mapping[str, int]
    backbones: Mapping[str, messages.Held]
    budget_epsilon: float
    delta: float

    @classmethod
    def of(cls, node_id: int, reply: messages.JoinReply, run: RunConfig) -> Participant:
        """Returns the participant that a site is once it agreed to a run.

        Args:
            node_id: Flower's number of the site's node.
            reply: the site's agreement.
            run: the run.
        """
        groups = run.parameter_group_sizes(reply.tasks)
        return cls(node_id, reply.site, reply.tasks, groups, reply.backbones, reply.budget_epsilon, reply.delta)


def map_groups(participants: Sequence[Participant]) -> dict[int, Collection[str]]:
    """Returns node id -> heads and trunks that its site trains."""
    return {participant.node_id: participant.parameter_groups for participant in participants}


def map_names(participants: Sequence[Participant]) -> dict[int, str]:
    """Returns node id -> name of its site."""
    return {participant.node_id: participant.site for participant in participants}


@dataclass(frozen=True)
class Answers(Generic[_Reply]):
    """The answers to one request.

    Attributes:
        accepted: node id -> its reply, and the reply's size in bytes.
        rejected: replies that are not used or did not come; callers add what they reject.
        bytes_sent: node id -> size of what it was sent.
        rounds: node id -> the round that its reply answers.
    """

    accepted: Mapping[int, tuple[_Reply, int]]
    rejected: list[Rejected]
    bytes_sent: Mapping[int, int]
    rounds: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Request(Generic[_Reply]):
    """One request to each of some sites.

    Attributes:
        kind: message type, as common.messages names it.
        payloads: node id -> what it is asked; a payload that several nodes share is encoded once.
        expected: type of the reply; another one is rejected.
        round: number of the round, 0 outside rounds.
        names: node id -> site name, as far as names are known; a site named here is asked to prepare again where it
            says that it has not prepared the run.
        check: called with a node id and its reply; raises BadInput for a reply that is rejected.
        waiting: the rules by which the request ends.
        takes_late: whether an update that answers the round before is used in this one.
    """

    kind: str
    payloads: Mapping[int, messages.Request]
    expected: type[_Reply]
    waiting: Waiting
    round: int = 0
    names: Mapping[int, str] = field(default_factory=dict)
    check: Callable[[int, _Reply], None] = lambda node, reply: None
    takes_late: bool = False


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
        away_since: node id -> monotonic time since which it is not connected.
        longest_s: message type and node id -> longest time between such a request and its reply, in seconds.
        late: node id -> the inquiry of the last round that it has not answered, and whose answer the next round uses.
        while_waiting: called again and again while replies are awaited; each returns at once.
        overdue: inquiries whose answers no round uses any more; what comes of them is named in the journal.
    """

    grid: Grid
    run: RunConfig
    run_id: str
    journal: Journal
    observe: Observe
    witnesses: Witnesses = field(default_factory=lambda: Witnesses(None))
    num_prepared_again: Counter[int] = field(default_factory=Counter)
    away_since: dict[int, float] = field(default_factory=dict)
    longest_s: dict[tuple[str, int], float] = field(default_factory=dict)
    late: dict[int, Inquiry] = field(default_factory=dict)
    overdue: list[Inquiry] = field(default_factory=list)
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
            timeout_s: longest wait for a connected site, which then is asked once; by default as long as the run gives
                a round, and silent sites are asked again.

        Returns:
            The replies by node; every node that was asked is among the accepted or the rejected.

        Raises:
            RunFailed: the SuperLink takes no message of this size.
        """
        waiting = (
            # Who is asked to join may audit its solver first: it is not asked twice.
            Waiting(self.run.cohort.timeout_s if timeout_s is None else timeout_s, asks_again=False)
            if timeout_s is not None or kind == messages.JOIN
            else Waiting.of(self.run)
        )
        return self.send(Request(kind, payloads, expected, waiting, round_))

    def send(self, request: Request[_Reply]) -> Answers[_Reply]:
        """Sends a request, and waits for the replies by its rules; sites are asked again meanwhile.

        Returns:
            The replies by node; every node that was asked is among the accepted or the rejected.

        Raises:
            RunFailed: the SuperLink takes no message of this size.
        """
        return _Exchange(self, request).run()

    def post(self, kind: str, node: int, payload: messages.Request) -> str | None:
        """Sends a request to one node and waits for nothing.

        Args:
            kind: message type, as common.messages names it.
            node: the node.
            payload: what it is asked.

        Returns:
            The message's id for `fetch`; None where the node takes no message because it was removed.
        """
        return self.push([Message(messages.encode(payload), dst_node_id=node, message_type=kind, group_id="0")])[0]

    def fetch(self, message_ids: Sequence[str], node: int, expected: type[_Reply]) -> _Reply | Rejected | None:
        """Returns the first reply to posted messages of one request, or why it is not used; None where none came yet.

        Args:
            message_ids: ids of the messages.
            node: the node that was asked.
            expected: type of the reply.
        """
        try:
            pulled = list(self.grid.pull_messages(message_ids))
        except _MALFORMED:
            return Rejected(node, UNREADABLE)
        answers = [message for message in pulled if message.metadata.reply_to_message_id in message_ids]
        return read_reply(node, answers[0], expected) if answers else None

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

    def find_connected(self, nodes: Collection[int]) -> set[int]:
        """Returns the nodes of these that are connected, and keeps since when the others are not."""
        now, online = time.monotonic(), set(self.grid.get_node_ids())
        for node in nodes:
            if node in online:
                self.away_since.pop(node, None)
            else:
                self.away_since.setdefault(node, now)
        return online & set(nodes)

    def push(self, outgoing: Sequence[Message]) -> list[str | None]:
        """Hands messages to the SuperLink; returns their ids, None for those to nodes that were removed.

        Raises:
            RunFailed: the SuperLink takes no message of this size.
        """
        pushed = list(self.grid.push_messages(outgoing))
        if len(pushed) != len(outgoing):
            raise RunFailed(
                f"expected the SuperLink to take {len(outgoing)} message(s), it took none: they are too large"
            )
        return [message_id or None for message_id in pushed]

    def note_duration(self, inquiry: Inquiry, message: Message) -> None:
        """Notes how long a site needed, since the message that it answers was sent."""
        key, sent_at = (inquiry.kind, inquiry.node_id), inquiry.asked_at[message.metadata.reply_to_message_id]
        self.longest_s[key] = max(self.longest_s.get(key, 0.0), time.monotonic() - sent_at)

    def name_overdue(self, names: Mapping[int, str]) -> None:
        """Names in the journal the updates that came too late for any round, and forgets their inquiries."""
        for inquiry in list(self.overdue):
            if inquiry.node_id in self.away_since:
                continue
            try:
                pulled = list(self.grid.pull_messages(list(inquiry.asked_at)))
            except _MALFORMED:
                self.overdue.remove(inquiry)
                continue
            for message in pulled:
                reply = read_reply(inquiry.node_id, message, messages.TrainReply)
                if isinstance(reply, messages.TrainReply) and inquiry in self.overdue:
                    self.note_duration(inquiry, message)
                    rejected = Rejected(inquiry.node_id, "its update came too late to be used; it was paid for")
                    self.write_rejected([rejected], names, "train", inquiry.round)
                    self.overdue.remove(inquiry)


class _Exchange(Generic[_Reply]):
    """One request while it is under way."""

    def __init__(self, messenger: Messenger, request: Request[_Reply]) -> None:
        self._messenger, self._request = messenger, request
        self._started = time.monotonic()
        packed: dict[int, ConfigRecord] = {}  # Requests that differ in their witness share their arrays.
        payloads = request.payloads
        self._encoded = {id(payload): messages.encode(payload, packed) for payload in payloads.values()}
        self._sizes = {key: messages.encoded_size(records) for key, records in self._encoded.items()}
        self._accepted: dict[int, tuple[_Reply, int]] = {}
        self._strangers: list[Rejected] = []
        self._inquiries = {node: self._open_inquiry(node) for node in payloads}

    def run(self) -> Answers[_Reply]:
        """Returns the answers once the request is over."""
        messenger, request = self._messenger, self._request
        presence_at, num_awaited, is_quorum_awaited = 0.0, len(self._inquiries), False
        while True:
            now = time.monotonic()
            if now >= presence_at:
                self._note_presence(now)
                presence_at = now + _PRESENCE_S
            self._send_due(now)
            for inquiry in list(self._inquiries.values()):
                if not inquiry.is_final and inquiry.away_since is None and inquiry.asked_at:
                    self._fetch_replies(inquiry)
            now = time.monotonic()
            if self._is_over(now):
                break
            awaited = [inquiry.node_id for inquiry in self._inquiries.values() if not inquiry.is_final]
            if len(awaited) < num_awaited:
                num_awaited = len(awaited)
                messenger.journal.write(
                    RepliesAwaited(message_type=request.kind, round=request.round, node_ids=tuple(sorted(awaited)))
                )
            if not is_quorum_awaited and self._is_held_up():
                is_quorum_awaited = True
                self._write_quorum_awaited(now)
            messenger.observe(request.kind, len(self._inquiries) - len(awaited), len(self._inquiries))
            for look in messenger.while_waiting:
                look()
            if not self._list_due(now):
                time.sleep(_POLL_S)
        return self._finish()

    # --- sending ---------------------------------------------------------------------------------------------------

    def _open_inquiry(self, node: int) -> Inquiry:
        late = self._messenger.late.pop(node, None) if self._request.kind == messages.TRAIN else None
        return self._new_inquiry(node) if late is None else late

    def _new_inquiry(self, node: int) -> Inquiry:
        request, key = self._request, id(self._request.payloads[node])
        return Inquiry.new(
            node,
            request.kind,
            request.round,
            records=self._encoded[key],
            size=self._sizes[key],
            now=time.monotonic(),
        )

    def _note_presence(self, now: float) -> None:
        connected = self._messenger.find_connected(self._inquiries)
        for node, inquiry in self._inquiries.items():
            inquiry.note_presence(node in connected, now, self._messenger.away_since.get(node, now))

    def _list_due(self, now: float) -> list[Inquiry]:
        """Returns the inquiries of which a message is due; of a site that failed only where the quorum needs it."""
        lacks_quorum = self._request.waiting.quorum.describe_missing(self._accepted) is not None
        return [
            inquiry
            for inquiry in self._inquiries.values()
            if (inquiry.is_silent or (lacks_quorum and not inquiry.is_final))
            and inquiry.away_since is None
            and now >= inquiry.ask_again_at
            and (self._request.waiting.asks_again or not inquiry.asked_at)
        ]

    def _send_due(self, now: float) -> None:
        """Sends every message that is due, in one call."""
        due = self._list_due(now)
        if not due:
            return
        prepare = messages.encode(messages.PrepareRequest(self._messenger.run_id, {}), {})
        outgoing = [
            Message(
                # What it stands on, a site that prepares again has had since it joined.
                prepare if inquiry.preparing else inquiry.records,
                dst_node_id=inquiry.node_id,
                message_type=messages.PREPARE if inquiry.preparing else inquiry.kind,
                group_id=str(inquiry.round),
                ttl=self._request.waiting.life_s,
            )
            for inquiry in due
        ]
        for inquiry, message_id in zip(due, self._messenger.push(outgoing), strict=True):
            if message_id is None:
                inquiry.reject(Rejected(inquiry.node_id, NOT_REACHED), now)
                inquiry.ask_again_at = now + inquiry.interval_s
            else:
                inquiry.note_sent(message_id, now)

    # --- receiving -------------------------------------------------------------------------------------------------

    def _fetch_replies(self, inquiry: Inquiry) -> None:
        """Takes the replies to an inquiry's messages: the first counts. A flood is bounded, and named as far as it is
        small."""
        try:
            pulled = list(self._messenger.grid.pull_messages(list(inquiry.asked_at)))
        except _MALFORMED:
            self._reject(inquiry, Rejected(inquiry.node_id, UNREADABLE))
            return
        answers = 0
        for message in pulled:
            if message.metadata.reply_to_message_id not in inquiry.asked_at:
                if len(self._strangers) < 2 * len(self._inquiries):
                    self._strangers.append(Rejected(message.metadata.src_node_id, NOT_ASKED))
            elif answers == 0 and not self._note_flower_error(inquiry, message):
                answers += self._take(inquiry, message)

    def _note_flower_error(self, inquiry: Inquiry, message: Message) -> bool:
        """Returns true for an error by which Flower says that no reply will come to a message, and notes it."""
        if not message.has_error():
            return False
        if message.error.code == ErrorCode.NODE_UNAVAILABLE:
            now = time.monotonic()
            self._messenger.away_since.setdefault(inquiry.node_id, now)
            inquiry.note_presence(False, now, now)
            return True
        if message.error.code in (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE):
            del inquiry.asked_at[message.metadata.reply_to_message_id]
            return True
        return False

    def _take(self, inquiry: Inquiry, message: Message) -> bool:
        """Takes the first answer to an inquiry that counts: a usable reply, or a reason; returns false for another."""
        expected = messages.Ready if inquiry.preparing else self._request.expected
        reply = read_reply(inquiry.node_id, message, expected)
        answered = message.metadata.reply_to_message_id
        if isinstance(reply, Rejected) and answered != next(reversed(inquiry.asked_at)):
            # The site has the request once more, and may answer it, and pay, after a round that went on without it.
            del inquiry.asked_at[answered]
            return False
        if inquiry.preparing:
            self._go_on_after_preparing(inquiry, ready=not isinstance(reply, Rejected))
        elif isinstance(reply, Rejected):
            self._reject(inquiry, reply)
        else:
            self._accept(inquiry, message, reply)
        return True

    def _accept(self, inquiry: Inquiry, message: Message, reply: object) -> None:
        """Accepts a reply of the expected type, where its content is what was asked for."""
        if inquiry.kind in _TIMED:
            self._messenger.note_duration(inquiry, message)
        assert isinstance(reply, self._request.expected)
        try:
            self._request.check(inquiry.node_id, reply)
        except BadInput as error:
            self._reject(inquiry, Rejected(inquiry.node_id, str(error)))
            return
        inquiry.accepted, inquiry.rejected = True, None
        self._accepted[inquiry.node_id] = (reply, messages.encoded_size(message.content))

    def _reject(self, inquiry: Inquiry, rejected: Rejected) -> None:
        node = inquiry.node_id
        if inquiry.round != self._request.round:
            # The round before is not answered any more: this one is asked.
            self._inquiries[node] = self._new_inquiry(node)
            return
        names, prepared = self._request.names, self._messenger.num_prepared_again
        if rejected.reason == NOT_PREPARED and node in names and prepared[node] < _MAX_PREPARED_AGAIN:
            prepared[node] += 1
            inquiry.preparing = True
            inquiry.asked_at, inquiry.ask_again_at = {}, time.monotonic()
            return
        inquiry.reject(rejected, time.monotonic())

    def _go_on_after_preparing(self, inquiry: Inquiry, ready: bool) -> None:
        """Repeats the request to a site that has prepared again."""
        round_ = self._request.round or None
        site = self._request.names[inquiry.node_id]
        self._messenger.journal.write(SitePreparedAgain(site=site, ready=ready, round=round_))
        inquiry.preparing = False
        inquiry.asked_at, inquiry.ask_again_at = {}, time.monotonic()
        if not ready:
            inquiry.reject(Rejected(inquiry.node_id, NOT_PREPARED), time.monotonic())

    # --- the end ---------------------------------------------------------------------------------------------------

    def _is_over(self, now: float) -> bool:
        kind, known = self._request.kind, self._messenger.longest_s
        longest_s = {node: known[kind, node] for node in self._inquiries if (kind, node) in known}
        return self._request.waiting.is_over(list(self._inquiries.values()), longest_s, self._started, now)

    def _is_held_up(self) -> bool:
        """Returns true if the quorum is missing, and a site that could complete it is away or has failed."""
        missing = self._request.waiting.quorum.describe_missing(self._accepted)
        return missing is not None and any(
            inquiry.away_since is not None or inquiry.rejected is not None for inquiry in self._inquiries.values()
        )

    def _write_quorum_awaited(self, now: float) -> None:
        waiting = self._request.waiting
        until = max(waiting.hope_until(inquiry, self._started) for inquiry in self._inquiries.values())
        self._messenger.journal.write(
            QuorumAwaited(
                round=self._request.round,
                sites={
                    inquiry.reason.name(self._request.names): inquiry.reason.reason
                    for inquiry in self._inquiries.values()
                    if not inquiry.accepted and not (inquiry.is_silent and inquiry.away_since is None)
                },
                seconds=round(until - now, 1),
            )
        )

    def _finish(self) -> Answers[_Reply]:
        """Returns the answers, and keeps the inquiries of a round whose answers may still come."""
        request, messenger = self._request, self._messenger
        rejected = [inquiry.reason for inquiry in self._inquiries.values() if not inquiry.accepted]
        if request.kind == messages.TRAIN:
            for node, inquiry in self._inquiries.items():
                if inquiry.is_silent and inquiry.asked_at and not inquiry.preparing:
                    if request.takes_late and inquiry.round == request.round:
                        messenger.late[node] = inquiry
                    else:
                        messenger.overdue.append(inquiry)
            messenger.name_overdue(request.names)
        return Answers(
            self._accepted,
            rejected + self._strangers,
            {node: self._sizes[id(payload)] for node, payload in request.payloads.items()},
            {node: self._inquiries[node].round for node in self._accepted},
        )
