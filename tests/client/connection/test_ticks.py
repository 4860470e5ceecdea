"""Answers leave at whole intervals after their request, whatever became of them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from flwr.app import Message
from hypothesis import given
from hypothesis import strategies as st

from client.config import SiteConfig
from client.connection.node import Node, StopRequest, compute_wait
from common import messages
from common.flower import (
    build_bundle_from_folder,
    fab_pb2,
    fleet_pb2,
    get_all_nested_objects,
    get_object_tree,
    message_pb2,
    message_to_proto,
    remove_content_from_message,
    run_pb2,
    set_metadata,
    set_task_identity,
)
from common.yaml import load
from tests.answering import Answer, Answering, answering
from tests.federation import ROOT, Authority, write_site

EVERY_S = 0.5


@given(elapsed=st.floats(0, 1e6), every=st.floats(1e-3, 3600))
def test_a_wait_ends_at_the_first_whole_interval_from_now_on(elapsed: float, every: float) -> None:
    wait = compute_wait(elapsed, every)
    assert 0.0 < wait <= every
    intervals = (elapsed + wait) / every
    assert intervals == pytest.approx(round(intervals), abs=1e-5)


def test_without_an_interval_nothing_waits() -> None:
    assert compute_wait(3.7, 0.0) == 0.0


@dataclass
class Coordinator:
    """Hands out one message at a time, as Flower's Fleet API does, and notes when the reply to it comes.

    Attributes:
        bundle: the app bundle of its run.
        waiting: a message that nobody has pulled yet.
        objects: name -> bytes of what the last message consists of.
        confirmed: when the site had received all of it.
        replied: when the reply came.
        arrived: set with the reply.
    """

    bundle: bytes
    waiting: Message | None = None
    objects: dict[str, bytes] = field(default_factory=dict)
    confirmed: float = 0.0
    replied: float = 0.0
    arrived: threading.Event = field(default_factory=threading.Event)

    def measure(self, kind: str) -> float:
        """Returns the seconds from the receipt of a message of this kind to its reply."""
        set_task_identity()
        message = Message(messages.encode(messages.Ready()), dst_node_id=7, message_type="query")
        set_metadata(message, message_type=kind, created_at=time.time(), ttl=600.0)
        set_metadata(message, message_id=message.object_id)
        self.objects = {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
        self.arrived.clear()
        self.waiting = message
        assert self.arrived.wait(60.0)
        return self.replied - self.confirmed

    def answer(self, path: str, body: bytes) -> bytes:
        """Returns what a SuperLink answers."""
        now = time.monotonic()
        match path.rsplit("/", 1)[1]:
            case "activate-node":
                return fleet_pb2.ActivateNodeResponse(node_id=7).SerializeToString()
            case "get-run":
                return run_pb2.GetRunResponse(run=run_pb2.Run(fab_hash="0")).SerializeToString()
            case "get-fab":
                return fab_pb2.GetFabResponse(fab=fab_pb2.Fab(content=self.bundle)).SerializeToString()
            case "pull-messages" if self.waiting is not None:
                message, self.waiting = self.waiting, None
                envelope = message_to_proto(remove_content_from_message(message))
                tree = get_object_tree(message)
                return fleet_pb2.PullMessagesResponse(
                    messages_list=[envelope], message_object_trees=[tree]
                ).SerializeToString()
            case "pull-object":
                content = self.objects[message_pb2.PullObjectRequest.FromString(body).object_id]
                return message_pb2.PullObjectResponse(
                    object_found=True, object_available=True, object_content=content
                ).SerializeToString()
            case "confirm-message-received":
                self.confirmed = now
            case "push-messages":
                self.replied = now
                assert not fleet_pb2.PushMessagesRequest.FromString(body).clientapp_runtime_list
                self.arrived.set()
        return b""


@pytest.fixture(scope="module")
def coordinator() -> Coordinator:
    return Coordinator(build_bundle_from_folder(ROOT))


@contextmanager
def serving(folder: Path, coordinator: Coordinator) -> Iterator[Node]:
    """A site's node, joined to a coordinator, in a thread of this process."""
    authority = Authority.new("test authority")
    server: list[Answering] = []
    with answering(
        authority.issue(folder), lambda path: Answer(body=coordinator.answer(path, server[0].bodies[-1]))
    ) as running:
        server.append(running)
        site = write_site(
            folder / "north", "north", running.address, authority.write(folder / "ca.crt"), reply_every_s=EVERY_S
        )
        leaving = StopRequest()
        node = Node(
            load(SiteConfig, site),
            site,
            show=lambda line: None,
            online=lambda joined: None,
            leaving=leaving,
            retry_for_s=5.0,
        )
        thread = threading.Thread(target=node.run)
        thread.start()
        try:
            yield node
        finally:
            leaving.ask(0.0)
            thread.join(timeout=30)


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's own build
def test_what_may_have_read_records_is_answered_at_whole_intervals(tmp_path: Path, coordinator: Coordinator) -> None:
    """Also a word that declines, and one for a process that died; each is ready within a fraction of an interval."""
    with serving(tmp_path, coordinator) as node:
        coordinator.measure("query.part")  # Starts the process that answers.
        assert coordinator.measure("query.part") < EVERY_S
        for kind in ("train", "train.default", "evaluate", "query.prepare", "nonsense"):
            assert EVERY_S <= coordinator.measure(kind) < 2 * EVERY_S
        worker = node._worker
        assert worker is not None
        os.kill(worker.pid, signal.SIGKILL)
        assert EVERY_S <= coordinator.measure("train") < 2 * EVERY_S
