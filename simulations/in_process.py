"""The default executor: every site in this process, every message through Flower's own encoding.

It is the specification that Ray and deployment agree with: each message is deflated to Flower's bytes and inflated
again before the ClientApp sees it, and so is the reply.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

FIRST_NODE_ID = 100

SiteApp = Callable[[Message, Context], Message]
"""A ClientApp, as the grid sees it."""


class InProcessGrid(Grid):
    """A Grid that calls one ClientApp for `num_sites` nodes, one after the other."""

    def __init__(self, app: SiteApp, num_sites: int) -> None:
        # Flower refuses to build a Message outside a run.
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
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
        """Use this run's identity."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run's identity."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """All nodes, in the order of the sites."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Deliver messages at once; their ids."""
        pushed = []
        for message in messages:
            _set_id(message)
            pushed.append(message.metadata.message_id)
            self._replies[message.metadata.message_id] = self._deliver(message)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies to these messages, each handed out once."""
        return [self._replies.pop(item) for item in list(message_ids) if item in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Sequence[Message]:
        """Deliver messages and return the replies; never waits."""
        del timeout
        return self.pull_messages(self.push_messages(messages))

    def _deliver(self, message: Message) -> Message:
        context = self._contexts[message.metadata.dst_node_id]
        received = _through_wire(message)
        try:
            reply = self._app(received, context)
        except Exception as error:  # noqa: BLE001 - stands in for Flower's engine, which turns any error into a reply
            reason = f"{type(error)}:<'{error}'>"
            reply = Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason), reply_to=received)
        _set_id(reply)
        return _through_wire(reply)


def _set_id(message: Message) -> None:
    message.metadata.__dict__["_message_id"] = uuid.uuid4().hex


def _through_wire(message: Message) -> Message:
    # Nobody changes the message meanwhile: without this, Flower encodes and hashes every part for each part above it.
    with no_object_id_recompute():
        objects = {key: nested.deflate() for key, nested in get_all_nested_objects(message).items()}
        copy = inflate_object_from_contents(message.object_id, objects)
    assert isinstance(copy, Message)
    copy.metadata.__dict__["_message_id"] = message.metadata.message_id
    return copy
