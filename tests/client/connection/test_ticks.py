"""Answers leave at whole intervals after their request, whatever became of them; overtaken requests are not read.

A run that waits for approval is shown once, however often it is offered.
"""

from __future__ import annotations

import fcntl
import os
import signal
import termios
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from flwr.app import Message
from hypothesis import given
from hypothesis import strategies as st

from client.config import SiteConfig
from client.connection.fleet import Claim
from client.connection.node import JOURNAL, MAX_CLAIMED, Node, StopRequest, compute_wait, is_overtaken, list_repeated
from client.connection.worker import Worker
from common import messages
from common.events import RequestDeclined, read_site_journal, select_events
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
from common.process.lines import Show
from common.yaml import load
from tests.answering import Answer, Answering, answering
from tests.federation import ROOT, Authority, write_site
from tests.tiny import backbone, offered, run_config

EVERY_S = 0.5


@given(elapsed=st.floats(0, 1e6), every=st.floats(1e-3, 3600))
def test_a_wait_ends_at_the_first_whole_interval_from_now_on(elapsed: float, every: float) -> None:
    wait = compute_wait(elapsed, every)
    assert 0.0 < wait <= every
    intervals = (elapsed + wait) / every
    assert intervals == pytest.approx(round(intervals), abs=1e-5)


def test_without_an_interval_nothing_waits() -> None:
    assert compute_wait(3.7, 0.0) == 0.0


def claim(kind: str, group: str, run: int = 1) -> Claim:
    metadata = message_pb2.Metadata(run_id=run, message_type=kind, group_id=group)
    return Claim(message_pb2.Message(metadata=metadata), message_pb2.ObjectTree())


@pytest.mark.parametrize(
    ("kind", "group", "later", "overtaken"),
    [
        ("train", "5", claim("train", "6"), True),
        ("train", "5", claim("train", "10"), True),
        ("train", "6", claim("train", "5"), False),
        ("train", "5", claim("train", "5"), False),
        ("train", "5", claim("train", "6", run=2), False),
        ("train", "5", claim("evaluate", "5"), True),
        ("evaluate", "5", claim("train", "5"), False),
        ("evaluate", "5", claim("train", "6"), True),
        ("evaluate", "5", claim("evaluate", "6"), True),
        ("train", "5", claim("query.finish", "0"), True),
        ("evaluate", "5", claim("query.finish", "0"), True),
        ("query.finish", "0", claim("train", "5"), False),
        ("query.finish", "0", claim("query.finish", "0"), False),
        ("train", "5", claim("query.prepare", "6"), False),
        ("query.prepare", "5", claim("train", "6"), False),
        ("query.join", "0", claim("train", "6"), False),
        ("train", "soon", claim("train", "6"), False),
        ("train", "5", claim("train", "9" * 5000), False),
    ],
)
def test_a_request_is_overtaken_by_a_later_one_of_the_same_run_only(
    kind: str, group: str, later: Claim, overtaken: bool
) -> None:
    asked = claim(kind, group)
    for claims in ([asked, later], [later, asked]):
        assert is_overtaken(asked, claims) == overtaken


def test_of_equal_requests_that_wait_the_last_is_answered_and_of_others_each() -> None:
    def made(kind: str, group: str, content: str, run: int = 1) -> Claim:
        tree = message_pb2.ObjectTree(object_id="own", children=[message_pb2.ObjectTree(object_id=content)])
        return Claim(claim(kind, group, run).envelope, tree)

    first, last = made("train", "5", "a"), made("train", "5", "a")
    others = [made("train", "5", "b"), made("train", "6", "a"), made("evaluate", "5", "a"), made("train", "5", "a", 2)]
    repeated = list_repeated([first, *others, last])
    assert len(repeated) == 1
    assert repeated[0] is first


@dataclass
class Coordinator:
    """Hands out one message at a time, as Flower's Fleet API does, and notes when the reply to it comes.

    Attributes:
        bundle: the app bundle of its run.
        waiting: messages that nobody has pulled yet.
        objects: name -> bytes of what the messages consist of.
        fetched: names of the objects that were pulled.
        confirmed: when the site had received all of the last message.
        replied: when the last reply came.
        answered: ids of the messages that were replied to, in order.
        awaited: number of replies that are awaited.
        arrived: set with the last of them.
    """

    bundle: bytes
    waiting: list[Message] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    fetched: set[str] = field(default_factory=set)
    confirmed: float = 0.0
    replied: float = 0.0
    answered: list[str] = field(default_factory=list)
    awaited: int = 0
    arrived: threading.Event = field(default_factory=threading.Event)

    def measure(self, kind: str) -> float:
        """Returns the seconds from the receipt of a message of this kind to its reply."""
        self.ask([(kind, "")])
        return self.replied - self.confirmed

    def ask(
        self,
        requests: Sequence[tuple[str, str]],
        content: messages.Request | None = None,
        *,
        answers: int | None = None,
    ) -> list[str]:
        """Sends messages of these kinds and groups and returns their ids, once all, or so many, are replied to."""
        sent = []
        for kind, group in requests:
            set_task_identity()
            records = messages.encode(content or messages.Ready())
            message = Message(records, dst_node_id=7, message_type="query", group_id=group)
            set_metadata(message, message_type=kind, created_at=time.time(), ttl=600.0)
            set_metadata(message, message_id=message.object_id)
            self.objects |= {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
            sent.append(message)
        self.arrived.clear()
        self.answered.clear()
        self.fetched.clear()
        self.awaited = len(sent) if answers is None else answers
        self.waiting += sent
        assert self.arrived.wait(60.0)
        return [message.metadata.message_id for message in sent]

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
            case "pull-messages" if self.waiting:
                message = self.waiting.pop(0)
                envelope = message_to_proto(remove_content_from_message(message))
                tree = get_object_tree(message)
                return fleet_pb2.PullMessagesResponse(
                    messages_list=[envelope], message_object_trees=[tree]
                ).SerializeToString()
            case "pull-object":
                name = message_pb2.PullObjectRequest.FromString(body).object_id
                self.fetched.add(name)
                content = self.objects[name]
                return message_pb2.PullObjectResponse(
                    object_found=True, object_available=True, object_content=content
                ).SerializeToString()
            case "confirm-message-received":
                self.confirmed = now
            case "push-messages":
                self.replied = now
                request = fleet_pb2.PushMessagesRequest.FromString(body)
                assert not request.clientapp_runtime_list
                self.answered += [message.metadata.reply_to_message_id for message in request.messages_list]
                if len(self.answered) == self.awaited:
                    self.arrived.set()
        return b""


@pytest.fixture(scope="module")
def coordinator() -> Coordinator:
    return Coordinator(build_bundle_from_folder(ROOT))


@contextmanager
def serving(
    folder: Path, coordinator: Coordinator, *, show: Show = lambda line, **about: None, approval: str = "automatic"
) -> Iterator[Node]:
    """A site's node, joined to a coordinator, in a thread of this process."""
    authority = Authority.new("test authority")
    server: list[Answering] = []
    with answering(
        authority.issue(folder), lambda path: Answer(body=coordinator.answer(path, server[0].bodies[-1]))
    ) as running:
        server.append(running)
        site = write_site(
            folder / "north",
            "north",
            running.address,
            authority.write(folder / "ca.crt"),
            reply_every_s=EVERY_S,
            approval=approval,
        )
        leaving = StopRequest()
        node = Node(
            load(SiteConfig, site),
            site,
            show=show,
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


def kill_when_asked(worker: Worker) -> None:
    """Kills a process that was stopped, once a message waits in its pipe."""
    assert worker._process.stdin is not None
    until = time.monotonic() + 30.0
    while not any(fcntl.ioctl(worker._process.stdin, termios.FIONREAD, bytes(4))) and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(worker.pid, signal.SIGKILL)


def list_failures(folder: Path) -> list[str]:
    """Reasons "internal" among those for which north declined a request."""
    events = select_events(read_site_journal(folder / "north" / "state" / JOURNAL), RequestDeclined)
    return [event.reason for event in events if event.reason == "internal"]


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
        os.kill(worker.pid, signal.SIGSTOP)  # So that it dies with the message in its hands.
        threading.Thread(target=kill_when_asked, args=(worker,)).start()
        assert EVERY_S <= coordinator.measure("train") < 2 * EVERY_S
        assert list_failures(tmp_path) == ["internal"]


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's own build
def test_a_process_that_died_while_it_was_idle_costs_no_answer(tmp_path: Path, coordinator: Coordinator) -> None:
    shown: list[str] = []
    with serving(tmp_path, coordinator, show=lambda line, **about: shown.append(line)) as node:
        coordinator.measure("query.part")
        worker = node._worker
        assert worker is not None
        os.kill(worker.pid, signal.SIGKILL)
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        coordinator.measure("query.part")
        assert node._worker is not None and node._worker is not worker
        assert list_failures(tmp_path) == []
    assert "the process that answers had ended while it was idle; another one is started" in shown


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's own build
def test_a_site_that_was_away_answers_the_newest_round_only(tmp_path: Path, coordinator: Coordinator) -> None:
    """The others are declined at once and without their content, in whatever order they come."""
    with serving(tmp_path, coordinator):
        asked = [("query.part", ""), ("train", "5"), ("train", "7"), ("evaluate", "6"), ("train", "6"), ("train", "7")]
        part, fifth, newest, evaluation, sixth, again = coordinator.ask(asked, answers=5)
        # The coordinator repeated a request while it heard nothing: it is answered once.
        assert coordinator.answered == [fifth, evaluation, sixth, part, again]
        assert {part, again} <= coordinator.fetched
        assert not {fifth, evaluation, sixth, newest} & coordinator.fetched
    declined = select_events(read_site_journal(tmp_path / "north" / "state" / JOURNAL), RequestDeclined)
    overtaken = [event for event in declined if event.reason == "overtaken"]
    assert [event.message_type for event in overtaken] == ["train", "evaluate", "train"]
    assert overtaken[0].detail == "train of round 5: a later request of the run is here; nothing was read or charged"


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's own build
def test_a_flood_of_messages_is_claimed_in_part_and_answered_whole(tmp_path: Path, coordinator: Coordinator) -> None:
    with serving(tmp_path, coordinator):
        asked = coordinator.ask([("train", str(round_)) for round_ in range(MAX_CLAIMED + 2)])
        assert sorted(coordinator.answered) == sorted(asked)
    declined = select_events(read_site_journal(tmp_path / "north" / "state" / JOURNAL), RequestDeclined)
    # Of those that were claimed at once the last was answered, and of those behind them the last.
    assert [event.reason for event in declined].count("overtaken") == MAX_CLAIMED


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's own build
def test_a_run_that_waits_for_approval_is_shown_once_and_again_after_each_start(
    tmp_path: Path, coordinator: Coordinator
) -> None:
    def offer(name: str) -> None:
        coordinator.ask([("query.join", "")], offered(name, run_config(name=name), backbone()))

    shown: list[str] = []
    with serving(tmp_path, coordinator, show=lambda line, **about: shown.append(line), approval="required"):
        for name in ("first", "first", "first", "second", "second"):
            offer(name)
    lines = [line for line in shown if line.startswith(("asked", "declined"))]
    assert [line.partition(" ")[0] for line in lines] == ["asked:", "declined", "declined"], lines
    assert "2 offer(s) wait" not in "".join(shown)
    shown.clear()
    with serving(tmp_path, coordinator, show=lambda line, **about: shown.append(line), approval="required"):
        offer("first")
        offer("second")
    assert any(line.startswith("2 offer(s) wait for approval: headwater site approve ") for line in shown), shown
    assert [line for line in shown if line.startswith(("asked", "declined"))] == ["asked: join"]
