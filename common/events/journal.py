"""Journals: append-only files with one JSON object a line; each line is one event.

Invariant: a line is complete and flushed to the disk before `FileJournal.write` returns; a torn last line (a crash
while writing) is skipped by the readers, and so are lines that this version does not know.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, final, get_args

from common.events.daemon import DaemonEvent
from common.events.facts import Event
from common.events.runs import RunEvent
from common.events.sites import ApprovalEvent, SiteEvent
from common.files import flush
from common.types import HeadwaterError

_AnyEvent = TypeVar("_AnyEvent", bound=Event)
_State = TypeVar("_State")


class Journal(Protocol):
    """Anything that keeps events."""

    def write(self, event: Event) -> None:
        """Append an event."""


class FileJournal:
    """A journal in a file. One writer; any number of readers."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def write(self, event: Event) -> None:
        """Append an event and flush it to the disk."""
        values = event.model_dump(mode="json")
        line = json.dumps({"time": values.pop("time"), "event": event.event_name, **values}, allow_nan=False)
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            # Seal a line torn by a crash, so that this one stays readable.
            seal = b"\n" if size and os.pread(descriptor, 1, size - 1) != b"\n" else b""
            data = seal + line.encode() + b"\n"
            while data:
                data = data[os.write(descriptor, data) :]
            flush(descriptor)
        finally:
            os.close(descriptor)


def read_run_journal(path: Path) -> list[RunEvent]:
    """Returns the events of a run's `journal.jsonl` in order; an empty list where there is no file."""
    return _read(path, get_args(RunEvent))


def read_site_journal(path: Path) -> list[SiteEvent]:
    """Returns the events of a site's `site.jsonl` in order; an empty list where there is no file."""
    return _read(path, get_args(SiteEvent))


def read_approval_journal(path: Path) -> list[ApprovalEvent]:
    """Returns the events of a site's `approvals.jsonl` in order; an empty list where there is no file."""
    return _read(path, get_args(ApprovalEvent))


def read_daemon_journal(path: Path) -> list[DaemonEvent]:
    """Returns the events of a federation's `link.jsonl` or `commands.jsonl` in order; an empty list without a file."""
    return _read(path, get_args(DaemonEvent))


@final
class JournalView(Generic[_State]):
    """A value that is computed from a journal's events, and brought up to date from the lines that are new.

    A journal that is another file than before, or shorter, is read from its beginning.
    """

    def __init__(
        self, path: Path, kinds: Any, create: Callable[[], _State], add: Callable[[_State, Any], object]
    ) -> None:
        """Reads nothing yet.

        Args:
            path: the journal; it need not exist.
            kinds: union of the events that count, such as `RunEvent`; other lines are skipped.
            create: returns the value of an empty journal.
            add: adds one event to the value.
        """
        self._path, self._kinds, self._create, self._add = path, get_args(kinds), create, add
        self._file, self._end, self._state = 0, 0, create()

    def read(self) -> _State:
        """Returns the value now."""
        if not self._path.exists():
            return self._state
        with self._path.open("rb") as file:
            found = os.fstat(file.fileno())
            if found.st_ino != self._file or found.st_size < self._end:
                self._file, self._end, self._state = found.st_ino, 0, self._create()
            file.seek(self._end)
            # A line without its end is being written, or was torn by a crash and is sealed by the next.
            lines, newline, _ = file.read().rpartition(b"\n")
        self._end += len(lines) + len(newline)
        for event in _parse(lines.decode("utf-8", errors="replace"), self._kinds):
            self._add(self._state, event)
        return self._state


def select_events(events: Iterable[Event], kind: type[_AnyEvent]) -> list[_AnyEvent]:
    """Returns the events of one class, in order."""
    return [event for event in events if isinstance(event, kind)]


def _read(path: Path, kinds: Iterable[type[Any]]) -> list[Any]:
    """Returns the readable lines of a journal as events of the given classes; others are skipped."""
    return _parse(path.read_text(encoding="utf-8", errors="replace"), kinds) if path.exists() else []


def _parse(text: str, kinds: Iterable[type[Any]]) -> list[Any]:
    by_name = {name: kind for kind in kinds for name in (kind.event_name, *kind.former_event_names)}
    events = []
    for line in text.splitlines():
        try:
            values = json.loads(line)
            if isinstance(values, dict) and values.get("event") in by_name:
                events.append(by_name[values["event"]].model_validate(values))
        except (ValueError, TypeError, RecursionError, HeadwaterError):
            continue  # Torn by a crash while writing, or written by a version that this one does not understand.
    return events
