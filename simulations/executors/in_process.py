"""The default executor: all sites run in this process, and every message goes through Flower's own encoding.

It is the specification that Ray and deployment agree with: each message is serialized to Flower's bytes and parsed
again before the ClientApp receives it, and so is each reply.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Context, Error, Message, Metadata, RecordDict
from flwr.serverapp import Grid

from common.flower import (
    ErrorCode,
    InflatableObject,
    Run,
    get_all_nested_objects,
    inflate_object_from_contents,
    no_object_id_recompute,
    set_metadata,
    set_task_identity,
)

FIRST_NODE_ID = 100

SiteApp = Callable[[Message, Context], Message]
"""A ClientApp, as a function."""


_MESSAGE = "message"


@dataclass(frozen=True)
class _SerializedMessage:
    """A message as bytes.

    Attributes:
        message: bytes of the message itself.
        content: object id -> bytes of each object of the content.
    """

    message: bytes
    content: Mapping[str, bytes]


class InProcessGrid(Grid):
    """A Grid that calls one ClientApp for each of `num_sites` nodes, one after the other."""

    def __init__(self, app: SiteApp, num_sites: int) -> None:
        set_task_identity()
        self._app = app
        self._run = Run.create_empty(1)
        self._contexts = {
            FIRST_NODE_ID + position: Context(
                run_id=1,
                node_id=FIRST_NODE_ID + position,
                node_config={"partition-id": position, "num-partitions": num_sites},
                state=RecordDict(),
                run_config={},
            )
            for position in range(num_sites)
        }
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        """Sets the run's identity."""
        self._run = run

    @property
    def run(self) -> Run:
        """The identity of the run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Returns a new message to a node.

        Args:
            content: records of the message.
            message_type: Flower's type, such as `train`.
            dst_node_id: node that it is for.
            group_id: number of the round, as text.
            ttl: seconds that it is valid; None for Flower's default.
        """
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Returns the ids of all nodes, in the order of the sites."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Delivers messages at once and returns their ids."""
        sent = list(messages)
        for message in sent:
            _set_id(message)
        records: dict[str, InflatableObject] = {}
        for message, serialized in zip(sent, _serialize(sent), strict=True):
            self._replies[message.metadata.message_id] = self._deliver(message.metadata, serialized, records)
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Returns the replies to these messages, each once."""
        return [self._replies.pop(item) for item in list(message_ids) if item in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Sequence[Message]:
        """Delivers messages and returns the replies, without waiting."""
        del timeout
        return self.pull_messages(self.push_messages(messages))

    def _deliver(
        self, metadata: Metadata, serialized: _SerializedMessage, records: dict[str, InflatableObject]
    ) -> Message:
        context = self._contexts[metadata.dst_node_id]
        received = _parse(serialized, metadata.message_id, records)
        try:
            reply = self._app(received, context)
        except Exception as error:  # noqa: BLE001 - stands in for Flower's engine, which turns any error into a reply
            reason = f"{type(error)}:<'{error}'>"
            reply = Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason), reply_to=received)
        _set_id(reply)
        return _parse(_serialize([reply])[0], reply.metadata.message_id, {})


def _set_id(message: Message) -> None:
    set_metadata(message, message_id=uuid.uuid4().hex)


def _serialize(messages: Sequence[Message]) -> list[_SerializedMessage]:
    """Returns messages as bytes; a record that several messages share is serialized once."""
    contents: dict[int, dict[str, bytes]] = {}
    known: dict[str, bytes] = {}
    serialized = []
    # Nobody changes a message meanwhile: without this, Flower encodes and hashes every part for each part above it.
    with no_object_id_recompute():
        for message in messages:
            content = message.content if message.has_content() else None
            if content is not None and id(content) not in contents:
                nested = get_all_nested_objects(content)
                known |= {key: inner.deflate() for key, inner in nested.items() if key not in known}
                contents[id(content)] = {key: known[key] for key in nested}
            parts = contents[id(content)] if content is not None else {}
            serialized.append(_SerializedMessage(message.deflate(), parts))
    return serialized


def _parse(serialized: _SerializedMessage, message_id: str, records: dict[str, InflatableObject]) -> Message:
    """Returns the message that its receiver gets, made from bytes alone.

    Args:
        serialized: its bytes.
        message_id: its id.
        records: records that were made from the same bytes for another receiver, by their ids; those of this message
            are added. Receivers read records and change none.
    """
    objects = {**serialized.content, _MESSAGE: serialized.message}
    copy = inflate_object_from_contents(_MESSAGE, objects, objects=records)
    del records[_MESSAGE]
    assert isinstance(copy, Message)
    set_metadata(copy, message_id=message_id)
    return copy
