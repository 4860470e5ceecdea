"""The coordinator's line to its sites: one request to each of some nodes, and the replies that can be used.

Waiting is bounded in time, and so is the number of replies: whatever sites send, a request ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from flwr.app import Message
from flwr.serverapp import Grid

from common import wire
from common.config import RunConfig
from common.journal import Journal
from server.collect import SetAside, read_replies

Observe = Callable[[str, int, int], None]
"""Told what is under way: phase, done, total."""

_Reply = TypeVar("_Reply")
_POLL_S = 0.2
_ENGINE_GRACE_S = 75.0  # A killed site is noticed only when its heartbeat lapses, about a minute later.


@dataclass(frozen=True)
class Member:
    """A site that joined."""

    node_id: int
    site: str
    tasks: Mapping[str, int]
    has_backbone: bool
    held_parts: Sequence[int] = ()


@dataclass(frozen=True)
class Desk:
    """What every step of a run needs: the line to the sites, the run, and where facts go."""

    grid: Grid
    run: RunConfig
    run_id: str
    journal: Journal
    observe: Observe

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
        asked = dict(zip(self.grid.push_messages(messages), payloads, strict=True))
        good, aside = read_replies(asked, self._collect(asked, kind, round_), expected)
        return good, aside, sent

    def write_aside(self, aside: Sequence[SetAside], names: Mapping[int, str], **where: Any) -> None:
        """Journal who is set aside, where and why."""
        for item in aside:
            self.journal.write("set_aside", site=name_of(item, names), reason=item.reason, **where)

    def _collect(self, asked: Mapping[str, int], kind: str, round_: int) -> list[Message]:
        """Replies until all are there or the time is up; asked for often, because the engine's own call waits 3 s.

        A flood is bounded: the first reply to each message is kept, and of the rest as many as can be named.
        """
        deadline = time.monotonic() + self.run.cohort.timeout_s + _ENGINE_GRACE_S
        replies: list[Message] = []
        waiting = set(asked)
        while waiting:
            before = len(waiting)
            for message in self.grid.pull_messages(sorted(waiting)):
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
        return replies


def name_of(item: SetAside, names: Mapping[int, str]) -> str:
    """A site's name for a report: as it is known, as it called itself, or its node's number."""
    return names.get(item.node_id) or item.site or f"node {item.node_id}"
