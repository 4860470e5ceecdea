"""The journal of a run: an append-only file of facts, one JSON object a line. Every report is a view of it.

Invariant: a line is written whole and flushed to disk before `write` returns; a torn last line (a crash while writing)
is ignored by `read`.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, Protocol

from common.files import flush


class Journal(Protocol):
    """Where facts go."""

    def write(self, event: str, **facts: Any) -> None:
        """Append one fact."""


class FileJournal:
    """A journal in a file. One writer; any number of readers."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def write(self, event: str, **facts: Any) -> None:
        """Append one fact and flush it to disk."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **facts}, allow_nan=False)
        with self.path.open("ab") as file:
            if file.tell() and not _ends_with_newline(self.path):
                file.write(b"\n")  # Seal a line torn by a crash, so that this one stays readable.
            file.write(line.encode() + b"\n")
            file.flush()
            flush(file.fileno())


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read(path: Path) -> list[dict[str, Any]]:
    """All whole facts of a journal in order; an empty list when there is no file."""
    if not path.exists():
        return []
    facts = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            fact = json.loads(line)
        except json.JSONDecodeError:
            continue  # Torn by a crash while writing.
        if isinstance(fact, dict) and "event" in fact:
            facts.append(fact)
    return facts
