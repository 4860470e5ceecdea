"""The coordinator's line to its sites: one request to each of some nodes, and the replies that can be used.

Waiting is bounded in time, and so is the number of replies: whatever sites send, a request ends. Replies are fetched
one by one, because the engine takes them apart as it fetches them: one that cannot be taken apart costs its sender its
place, and nobody else a reply that was paid for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from flwr.app import Message
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError

from common import messages
from common.events import Journal
from common.flower import UnexpectedObjectContentError
from common.run import RunConfig
from common.types import RunFailed
from server.rounds.replies import NOT_REACHED, UNREADABLE, SetAside, read_replies

Observe = Callable[[str, int, int], None]
"""Told what is under way: phase, done, total."""

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
"""What the engine raises over a reply whose parts are not what they claim to be; a lost connection is none of these."""
_ENGINE_GRACE_S = 75.0  # A killed site is noticed only when its heartbeat lapses, about a minute later.


@dataclass(frozen=True)
class Member:
    """A site that joined.

    Attributes:
        node_id: of its node.
        site: its name.
        tasks: those it takes part in, with their public sizes.
        entries: of the heads that it trains, with their public sizes: its tasks, and trunks below them.
        backbones: those its tasks stand on, and what it holds of them.
    """

    node_id: int
    site: str
    tasks: Mapping[str, int]
    entries: Mapping[str, int]
    backbones: Mapping[str, messages.Held]


@dataclass(frozen=True)
class Desk:
    """What every step of a run needs: the line to the sites, the run, and where facts go."""

    grid: Grid
    run: RunConfig
    run_id: str
    journal: Journal
    observe: Observe

    def ask(
        self,
        kind: str,
        payloads: Mapping[int, messages.Request],
        expected: type[_Reply],
        round_: int = 0,
        *,
        patience_s: float | None = None,
    ) -> tuple[dict[int, tuple[_Reply, int]], list[SetAside], dict[int, int]]:
        """Send one request to each node; good replies, those set aside, and bytes sent to each node.

        Waits for `patience_s`; by default as long as a round may take.

        Raises:
            RunFailed: the engine takes no message of this size.
        """
        pushed_messages, sent = [], {}
        # Payloads that are one object (the common case) are encoded once.
        encoded = {id(payload): messages.encode(payload) for payload in payloads.values()}
        sizes = {key: messages.encoded_size(records) for key, records in encoded.items()}
        for node, payload in payloads.items():
            sent[node] = sizes[id(payload)]
            pushed_messages.append(
                Message(encoded[id(payload)], dst_node_id=node, message_type=kind, group_id=str(round_))
            )
        asked, not_reached = self._push(pushed_messages)
        wait_s = self.run.cohort.timeout_s + _ENGINE_GRACE_S if patience_s is None else patience_s
        replies, unreadable = self._collect(asked, kind, round_, time.monotonic() + wait_s)
        readable = {message_id: node for message_id, node in asked.items() if message_id not in unreadable}
        good, aside = read_replies(readable, replies, expected)
        aside += [SetAside(asked[message_id], UNREADABLE) for message_id in sorted(unreadable)]
        aside += [SetAside(node, NOT_REACHED) for node in not_reached]
        return good, aside, sent

    def write_aside(self, aside: Sequence[SetAside], names: Mapping[int, str], **where: Any) -> None:
        """Journal who is set aside, where and why."""
        for item in aside:
            self.journal.write("set_aside", site=name_of(item, names), reason=item.reason, **where)

    def _push(self, outgoing: Sequence[Message]) -> tuple[dict[str, int], list[int]]:
        """Message id -> node; and the nodes that the engine has no message for, because they were removed."""
        pushed = list(self.grid.push_messages(outgoing))
        if len(pushed) != len(outgoing):
            raise RunFailed(f"expected the engine to take {len(outgoing)} message(s), it took none: they are too large")
        nodes = [message.metadata.dst_node_id for message in outgoing]
        asked = {message_id: node for message_id, node in zip(pushed, nodes, strict=True) if message_id}
        return asked, [node for message_id, node in zip(pushed, nodes, strict=True) if not message_id]

    def _collect(
        self, asked: Mapping[str, int], kind: str, round_: int, deadline: float
    ) -> tuple[list[Message], set[str]]:
        """Replies until all are there or the time is up, and the messages whose reply cannot be read.

        Asked for often, because the engine's own call waits 3 s. A flood is bounded: the first reply to each message is
        kept, and of the rest as many as can be named.
        """
        replies: list[Message] = []
        unreadable: set[str] = set()
        waiting = set(asked)
        while waiting:
            before = len(waiting)
            for message_id in sorted(waiting):
                try:
                    found = list(self.grid.pull_messages([message_id]))
                except _MALFORMED:
                    unreadable.add(message_id)
                    waiting.discard(message_id)
                    continue
                for message in found:
                    answered = message.metadata.reply_to_message_id
                    if answered in waiting or len(replies) < 2 * len(asked):
                        replies.append(message)
                    waiting.discard(answered)
            if not waiting or time.monotonic() > deadline:
                break
            if len(waiting) < before:
                self.journal.write("replies", at=kind, round=round_, nodes=sorted(asked[item] for item in waiting))
            self.observe(kind, len(asked) - len(waiting), len(asked))
            time.sleep(_POLL_S)
        return replies, unreadable


def name_of(item: SetAside, names: Mapping[int, str]) -> str:
    """A site's name for a report: as it is known, as it called itself, or its node's number."""
    return names.get(item.node_id) or item.site or f"node {item.node_id}"
