"""Who ran which command stands in the coordinator's log: through the real commands, in the order of their running."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.events import DaemonStarted, FileJournal, RequestRejected, RunsRemoved
from server.__main__ import app
from server.deployment.federation import open_federation
from server.deployment.log import write_command
from tests.server.deployment.federations import write_key_pair

ROOT = Path(__file__).resolve().parents[3]
READ_ONLY = {"install_service", "log", "runs", "status"}
"""Verbs that change nothing in a federation and give nothing away; the daemon itself writes when it starts and ends."""
NOBODY_LOGGED_IN = 2**32 - 1


def command(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    command("init", tmp_path / "fed", "--name", "hearts", "--address", "fed.example.org:9092")
    return tmp_path / "fed"


def test_each_command_that_changes_something_is_listed_with_its_user_and_machine(folder: Path) -> None:
    key = write_key_pair(folder.parent, "north")
    command("admit", folder, "north", "--key", key)
    command("kit", folder, "north", "--out", folder.parent / "kit.zip")
    command("renew", folder)
    command("remove", folder, "north")
    events = json.loads(command("log", folder, "--json"))
    assert [event["command"] for event in events] == ["init", "admit", "kit", "renew", "remove"]
    assert events[1]["what"].startswith("north, key ")
    user, host = (subprocess.check_output(call, text=True).strip() for call in (["id", "-un"], ["uname", "-n"]))
    assert {(event["user"], event["host"]) for event in events} == {(user, host)}
    assert (folder / "state" / "commands.jsonl").stat().st_mode & 0o777 == 0o600


def test_a_command_that_is_refused_is_not_listed(folder: Path) -> None:
    result = CliRunner().invoke(app, ["remove", str(folder), "north"])
    assert result.exit_code == 2
    assert [event["command"] for event in json.loads(command("log", folder, "--json"))] == ["init"]


def test_who_logged_in_is_named_beside_the_user_that_sudo_made_of_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Path("/proc/self/loginuid")
    number = int(kernel.read_text()) if kernel.exists() else NOBODY_LOGGED_IN
    # The kernel's word counts more than sudo's, which the environment carries.
    known = number != NOBODY_LOGGED_IN
    expected = subprocess.check_output(["id", "-un", str(number)], text=True).strip() if known else "alice?[31m"
    monkeypatch.setenv("SUDO_USER", "alice\x1b[31m")
    write_command(open_federation(folder), "stop", "the coordinator")
    assert json.loads(command("log", folder, "--json"))[-1]["login"] == expected


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, as sudo gives it")
def test_a_log_that_root_begins_belongs_to_the_folders_owner(folder: Path) -> None:
    (folder / "state" / "commands.jsonl").unlink()
    os.chown(folder, 1234, 1235)
    write_command(open_federation(folder), "stop", "the coordinator")
    found = (folder / "state" / "commands.jsonl").stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (1234, 1235, 0o600)


def test_the_daemons_events_stand_beside_the_commands_and_a_strangers_text_is_harmless(folder: Path) -> None:
    federation = open_federation(folder)
    journal = FileJournal(federation.state / "link.jsonl")
    journal.write(DaemonStarted(pid=1, bind="0.0.0.0:9092", time=1.0))
    path = "/\x1b]0;[red]"
    journal.write(RequestRejected(peer="203.0.113.9", site=None, path=path, reason="no such path", time=2.0))
    write_command(federation, "stop", "the coordinator")
    found = [event["event"] for event in json.loads(command("log", folder, "--json"))]
    assert found == ["daemon_started", "rejected", "command", "command"]
    shown = command("log", folder)
    assert "\x1b" not in shown
    assert "/?]0;[red]: no such path" in shown


def test_the_log_names_the_old_runs_that_the_daemon_removed(folder: Path) -> None:
    journal = FileJournal(open_federation(folder).state / "link.jsonl")
    journal.write(RunsRemoved(runs=("chest-1", "chest-2"), days=1))
    assert "chest-1, chest-2: older than 1 day(s)" in command("log", folder)


@pytest.mark.parametrize("path", sorted((ROOT / "server" / "commands").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_every_verb_that_changes_something_writes_to_the_log(path: Path) -> None:
    assert (f'write_command(federation, "{path.stem}"' in path.read_text(encoding="utf-8")) != (path.stem in READ_ONLY)
