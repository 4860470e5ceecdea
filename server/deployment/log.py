"""The coordinator's log: who ran which command, where and when, beside what happened to the daemon.

Each command that changes something, or gives something away, adds a line to `state/commands.jsonl` once that is done.
The lines are for staff that acts in good faith: who can write the folder can change them, as everything else in it.
"""

from __future__ import annotations

import os
import pwd
import socket
from pathlib import Path

from common.errors import plain
from common.events import CommandRun, DaemonEvent, FileJournal, read_daemon_journal
from server.deployment.federation import Federation

_COMMANDS = "commands.jsonl"
_UNSET = 2**32 - 1
"""The kernel's number for a process that nobody logged in to start."""


def write_command(federation: Federation, command: str, what: str) -> None:
    """Writes who has just run a command.

    Args:
        federation: the federation that the command changed.
        command: name of the command.
        what: the site, run or file that it was for, in words.
    """
    event = CommandRun(
        command=command, what=what, user=_name_user(os.getuid()), login=_find_login(), host=socket.gethostname()
    )
    # Two commands may end at the same moment: each appends its line in one piece.
    journal = FileJournal(federation.state / _COMMANDS)
    if not journal.path.exists():
        journal.path.touch(mode=0o600)
        if os.getuid() == 0:  # Through sudo: the folder's owner has to be able to write the next line.
            owner = federation.folder.stat()
            os.chown(journal.path, owner.st_uid, owner.st_gid)
    journal.write(event)


def read_log(federation: Federation) -> list[DaemonEvent]:
    """Returns every command, every start and end of the daemon and every rejected request, in order of time."""
    events = [event for name in (_COMMANDS, "link.jsonl") for event in read_daemon_journal(federation.state / name)]
    return sorted(events, key=lambda event: event.time)


def _find_login() -> str | None:
    """Returns who logged in: unlike the process's user, it stays the same through `sudo` and `su`."""
    try:
        number = int(Path("/proc/self/loginuid").read_text(encoding="ascii"))
    except (OSError, ValueError):
        number = _UNSET
    if number != _UNSET:
        return _name_user(number)
    return plain(os.environ.get("SUDO_USER", ""), 64) or None


def _name_user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)
