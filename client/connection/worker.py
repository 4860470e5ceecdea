"""The process that answers messages: a crash in it ends no connection and takes nothing from the ledger.

It runs this installation's own `client.app` and nothing that came over the network. One message at a time goes in as
the objects it consists of and comes out as those of the reply; between messages of a run the process stays warm,
so that imports are paid once. It ends when its parent does.

The pipes carry frames: a count, then that many byte strings, each after its length.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, final

from flwr.app import Context, Message, RecordDict
from google.protobuf.message import DecodeError

from client.connection.fleet import Delivery, Outgoing
from common import messages
from common.bundle import find_installation
from common.flower import (
    copy_metadata,
    get_all_nested_objects,
    get_object_tree,
    inflate_object_from_contents,
    message_from_proto,
    message_pb2,
    message_to_proto,
    remove_content_from_message,
    set_metadata,
    set_task_identity,
)
from common.process.parent import end_with_parent
from common.types import DeclineReason

# What Flower's decoder raises on a stranger's bytes.
_UNREADABLE = (
    AssertionError,
    AttributeError,
    DecodeError,
    LookupError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
)
SITE_VARIABLE = "HEADWATER_SITE"
COORDINATOR_VARIABLE = "HEADWATER_COORDINATOR"
_UNKNOWN = "query.unknown"


class WorkerDied(Exception):
    """The process ended before it answered; its exit code, or minus the signal, is the argument."""


class Abandoned(Exception):
    """The site's staff did not want to wait for the answer."""


@final
class Worker:
    """A worker process, as its parent uses it."""

    def __init__(self, site_file: Path, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "client.connection.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=find_installation(),
            env={**environment, SITE_VARIABLE: str(site_file.resolve())},
            # Out of the terminal's group: Ctrl-C is the parent's to handle, a round in work is not cut off by it.
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """True once the process has ended, by whatever means."""
        return self._process.poll() is not None

    def answer(self, delivery: Delivery, abandon: Callable[[], bool]) -> Outgoing:
        """Returns the reply to a message.

        Args:
            delivery: The message.
            abandon: A function called twice a second; true ends the wait.

        Raises:
            WorkerDied: The process ended first.
            Abandoned: `abandon` returned true.
        """
        parts = [b"message", delivery.envelope.SerializeToString(), delivery.root.encode()]
        for name, content in delivery.objects.items():
            parts += [name.encode(), content]
        envelope, tree, *objects = self._exchange(parts, abandon)
        named = {objects[at].decode(): objects[at + 1] for at in range(0, len(objects), 2)}
        return Outgoing(message_pb2.Message.FromString(envelope), message_pb2.ObjectTree.FromString(tree), named)

    def fetch_balance(self) -> Mapping[str, Any]:
        """Returns the budget of the site's population, as `headwater site budget --json` prints it."""
        account: Mapping[str, Any] = json.loads(self._exchange([b"balance"], lambda: False)[0])
        return account

    def close(self) -> None:
        """Ends the process; what it was doing is abandoned, as in a crash."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()

    def _exchange(self, parts: Sequence[bytes], abandon: Callable[[], bool]) -> list[bytes]:
        pipes = self._process.stdin, self._process.stdout
        assert pipes[0] is not None and pipes[1] is not None
        try:
            _write_frames(pipes[0], parts)
            while not select.select([pipes[1]], [], [], 0.5)[0]:
                if abandon():
                    raise Abandoned
            return _read_frames(pipes[1])
        except (OSError, EOFError, ValueError, OverflowError, MemoryError) as error:  # ValueError: closed before.
            self.close()
            raise WorkerDied(self._process.returncode) from error


def make_declined_reply(envelope: message_pb2.Message, refusal: DeclineReason, site: str) -> Outgoing:
    """Returns a reply that declines a message, made without a worker and without reading the message's content.

    Args:
        envelope: The message's envelope.
        refusal: The reason, from the fixed list.
        site: The site's declared name.
    """
    message = _read_envelope(envelope)
    set_task_identity(message.metadata.run_id, message.metadata.dst_node_id)
    return _pack_reply(Message(messages.encode(messages.Declined(refusal, site)), reply_to=message), message)


def _read_envelope(envelope: message_pb2.Message) -> Message:
    """Returns a message without its content; a kind that Flower does not know becomes one that no handler takes."""
    try:
        return message_from_proto(envelope)
    except ValueError:
        envelope.metadata.message_type = _UNKNOWN
        return message_from_proto(envelope)


def _pack_reply(reply: Message, request: Message) -> Outgoing:
    # Flower writes the moment at which the reply was made, and what is left of the request's time to live.
    set_metadata(reply, created_at=request.metadata.created_at, ttl=request.metadata.ttl)
    set_metadata(reply, message_id=reply.object_id)
    objects = {name: nested.deflate() for name, nested in get_all_nested_objects(reply).items()}
    tree = get_object_tree(reply)
    return Outgoing(message_to_proto(remove_content_from_message(reply)), tree, objects)


# --- in the process --------------------------------------------------------------------------------------------------


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Answers messages until the parent closes the pipe."""
    while True:
        try:
            kind, *parts = _read_frames(requests)
        except EOFError:
            return
        if kind == b"balance":
            _write_frames(replies, [json.dumps(_compute_balance()).encode()])
            continue
        outgoing = _answer(parts)
        objects = [part for name, content in outgoing.objects.items() for part in (name.encode(), content)]
        _write_frames(replies, [outgoing.envelope.SerializeToString(), outgoing.tree.SerializeToString(), *objects])


def _answer(parts: Sequence[bytes]) -> Outgoing:
    from client.app import app  # Here: the parent imports this module too, and needs no torch.

    envelope, root, *objects = parts
    received = _read_envelope(message_pb2.Message.FromString(envelope))
    set_task_identity(received.metadata.run_id, received.metadata.dst_node_id)
    contents = {objects[at].decode(): objects[at + 1] for at in range(0, len(objects), 2)}
    try:
        message = inflate_object_from_contents(root.decode(), contents)
        if not isinstance(message, Message):
            raise TypeError
    except _UNREADABLE:
        return _decline_invalid(received)
    # The envelope decides where the reply goes; the object's own copy of it is the sender's word.
    copy_metadata(received, message)
    context = Context(
        run_id=received.metadata.run_id,
        node_id=received.metadata.dst_node_id,
        node_config={},
        state=RecordDict(),
        run_config={},
    )
    try:
        return _pack_reply(app(message, context), received)
    except ValueError:  # Flower's own, for a message of a kind that no handler takes; handlers raise nothing.
        return _decline_invalid(received)


def _decline_invalid(request: Message) -> Outgoing:
    declined = messages.Declined(DeclineReason.BAD_REQUEST, "")
    return _pack_reply(Message(messages.encode(declined), reply_to=request), request)


def _compute_balance() -> Mapping[str, Any]:
    from client.config import SiteConfig
    from client.protocol import balance as budget
    from common.yaml import load

    return budget.as_json(budget.balance(load(SiteConfig, Path(os.environ[SITE_VARIABLE]))))


def _read_frames(pipe: IO[bytes]) -> list[bytes]:
    (count,) = struct.unpack(">I", _read_exactly(pipe, 4))
    return [_read_exactly(pipe, *struct.unpack(">Q", _read_exactly(pipe, 8))) for _ in range(count)]


def _read_exactly(pipe: IO[bytes], size: int) -> bytes:
    content = pipe.read(size)
    if len(content) != size:
        raise EOFError
    return content


def _write_frames(pipe: IO[bytes], parts: Sequence[bytes]) -> None:
    pipe.write(struct.pack(">I", len(parts)))
    for part in parts:
        pipe.write(struct.pack(">Q", len(part)))
        pipe.write(part)
    pipe.flush()


if __name__ == "__main__":
    end_with_parent()
    # Whatever a library prints must not land between two frames.
    private = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        serve(sys.stdin.buffer, private)
    except BrokenPipeError:
        # The parent was killed while an answer was made: it is stored, and the next process sends it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), private.fileno())
