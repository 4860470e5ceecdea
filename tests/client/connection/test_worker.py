"""The process that answers messages outlives those it cannot answer."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict

from client.connection.fleet import Delivery, Outgoing
from client.connection.worker import SITE_VARIABLE, Worker, WorkerDied, make_declined_reply
from common import messages
from common.flower import (
    get_all_nested_objects,
    message_to_proto,
    remove_content_from_message,
    set_metadata,
    set_task_identity,
)
from common.types import DeclineReason
from common.yaml import write_yaml
from tests.federation import ROOT, environment
from tests.tiny import backbone, offered, run_config, site_config


def delivery(kind: str, content: RecordDict) -> Delivery:
    """A message as the site's connection hands it to the worker."""
    set_task_identity()
    message = Message(content, dst_node_id=7, message_type="query")
    set_metadata(message, message_type=kind)
    set_metadata(message, message_id=message.object_id)
    objects = {name: nested.deflate() for name, nested in get_all_nested_objects(message).items()}
    return Delivery(message_to_proto(remove_content_from_message(message)), message.object_id, objects)


def reply_of(outgoing: Outgoing) -> set[bytes]:
    return set(outgoing.objects.values())


def test_a_message_of_an_unknown_kind_is_declined_and_the_worker_lives_on(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    write_yaml(path, site_config(tmp_path, "north"))
    worker = Worker(path, environment())
    try:
        for kind in ("query.records", "nonsense", "train.all", "system.x", ""):
            answer = reply_of(worker.answer(delivery(kind, messages.encode(messages.Ready())), lambda: False))
            assert any(DeclineReason.BAD_REQUEST.value.encode() in content for content in answer), kind
            assert not any(b"Invalid message type" in content or b"registered" in content for content in answer), kind
        asked = offered("run-1", run_config(), backbone())
        honest = worker.answer(delivery(messages.JOIN, messages.encode(asked)), lambda: False)
        assert any(b"JoinReply" in content for content in reply_of(honest))
    finally:
        worker.close()


def test_a_reply_says_neither_when_it_was_made_nor_how_long_that_took(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    write_yaml(path, site_config(tmp_path, "north"))
    asked = delivery("query.part", messages.encode(messages.Ready()))
    worker = Worker(path, environment())
    try:
        first, again = (worker.answer(asked, lambda: False) for _ in range(2))
        declined = [make_declined_reply(asked.envelope, DeclineReason.INTERNAL, "north") for _ in range(2)]
        assert first == again
        assert declined[0] == declined[1]
    finally:
        worker.close()


def test_a_process_that_died_is_named_as_often_as_it_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    write_yaml(path, site_config(tmp_path, "north"))
    worker = Worker(path, environment())
    os.kill(worker.pid, signal.SIGKILL)
    asked = delivery("query.part", messages.encode(messages.Ready()))
    for _ in range(2):
        with pytest.raises(WorkerDied, match=str(-signal.SIGKILL)):
            worker.answer(asked, lambda: False)
        with pytest.raises(WorkerDied):
            worker.fetch_balance()
        assert worker.has_ended


def test_a_worker_whose_parent_was_killed_ends_without_a_word(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    write_yaml(path, site_config(tmp_path, "north"))
    asks_for_balance = struct.pack(">IQ", 1, 7) + b"balance"
    command = [sys.executable, "-m", "client.connection.worker"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env={**environment(), SITE_VARIABLE: str(path)}, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdout.close()
        process.stdin.write(asks_for_balance)
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 0
