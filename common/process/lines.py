"""The lines that a standing process writes: text for people, or one JSON object a line for a log shipper.

The environment variable HEADWATER_LOG_FORMAT decides, for a process and for all that it starts. In JSON every line has
`time` (ISO 8601, UTC), `level`, `event` and `message`; an event of a journal has its own fields beside them.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, Protocol, TextIO, final

import typer

VARIABLE = "HEADWATER_LOG_FORMAT"
FAILED = "failed"
"""The event of the line by which a command fails."""

Level = Literal["info", "warning", "error"]


class LogFormat(StrEnum):
    """The form of a standing process's lines."""

    TEXT = "text"
    JSON = "json"


LogFormatOption = Annotated[
    LogFormat, typer.Option("--log-format", envvar=VARIABLE, help="Lines for people, or one JSON object a line")
]


class Show(Protocol):
    """Shows one line about something that happened."""

    def __call__(
        self, line: str, *, event: str = "message", level: Level = "info", fields: Mapping[str, Any] | None = None
    ) -> None:
        """Shows the line; as text, nothing but it."""


def is_json() -> bool:
    """Returns whether this process writes JSON."""
    return os.environ.get(VARIABLE) == LogFormat.JSON


def use_log_format(chosen: LogFormat) -> None:
    """Writes lines, and what libraries log, in a form from now on; processes that are started inherit it."""
    os.environ[VARIABLE] = chosen.value
    if chosen is LogFormat.JSON:
        # Also those of libraries that have handlers of their own.
        loggers = [logging.getLogger(), *(logging.getLogger(name) for name in list(logging.root.manager.loggerDict))]
        for handler in {handler for each in loggers for handler in each.handlers}:
            handler.setFormatter(JsonFormatter())


def show_line(
    line: str, *, event: str = "message", level: Level = "info", fields: Mapping[str, Any] | None = None
) -> None:
    """Writes a line on stdout, after the time; a full disk below the log, or a reader that is gone, ends no process.

    Args:
        line: the text for people.
        event: one word for programs.
        level: info, warning or error.
        fields: further keys of the JSON object.
    """
    with contextlib.suppress(OSError):
        if is_json():
            write_json(sys.stdout, line, event=event, level=level, fields=fields)
        else:
            typer.echo(f"{time.strftime('%H:%M:%S')}  {line}")


@final
class ProgressLines:
    """Shows how far a long work is as lines of a log: the first after some seconds, then one now and then.

    Attributes:
        what: name of the work, which begins each line.
    """

    def __init__(
        self,
        what: str,
        show: Callable[[str], None] = show_line,
        *,
        unit: str = " records",
        first_s: float = 10.0,
        every_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what = what
        self._show, self._unit, self._clock = show, unit, clock
        self._first_s, self._every_s = first_s, every_s
        self._started, self._due, self._begun_at, self._last = 0.0, 0.0, 0, 0

    def __call__(self, done: int, total: int) -> None:
        """Notes that so many of all records are done."""
        now = self._clock()
        if done <= self._last or not self._last:  # Another source begins.
            self._started, self._due, self._begun_at = now, now + self._first_s, done
        self._last = 0 if done >= total else done
        if now < self._due:
            return
        self._due = now + self._every_s
        left = describe_pace(done - self._begun_at, total - done, now - self._started)
        self._show(f"{self.what}: {done:,} of {total:,}{self._unit} ({100.0 * done / total:.0f} %){left}")


def describe_pace(done: int, left: int, seconds: float) -> str:
    """Returns the pace of a work and the time that is left, as the end of a line; empty where they are not known.

    Args:
        done: steps that were done in the time.
        left: steps that are left.
        seconds: the time.
    """
    if done <= 0 or left <= 0:
        return ""
    each = max(seconds, 1e-9) / done
    pace = f"{1.0 / each:.3g} a second" if each < 1.0 else f"{each:.3g} s each"
    return f", {pace}, {describe_duration(left * each)} left"


def describe_duration(seconds: float) -> str:
    """Returns a duration in words, as accurate as an estimate."""
    if seconds < 90.0:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60.0:.0f} min" if seconds < 5400.0 else f"about {seconds / 3600.0:.1f} h"


def write_json(
    stream: TextIO,
    line: str,
    *,
    event: str = "message",
    level: str = "info",
    moment: float | None = None,
    fields: Mapping[str, Any] | None = None,
) -> None:
    """Writes one JSON object as a line.

    Args:
        stream: where it is written.
        line: the text for people.
        event: one word for programs.
        level: info, warning or error.
        moment: when it happened, in seconds since 1970; None is now.
        fields: further keys.
    """
    print(_make_json(line, event, level, moment, fields), file=stream, flush=True)


def read_error(line: str) -> str | None:
    """Returns the sentence in a line by which a command failed, in either form; None where it is another line."""
    if line.startswith("error: "):
        return line.removeprefix("error: ")
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return str(values["message"]) if isinstance(values, dict) and values.get("event") == FAILED else None


class JsonFormatter(logging.Formatter):
    """Writes what a library logs as one JSON object; a traceback is one of its values."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line."""
        fields = {"logger": record.name}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return _make_json(record.getMessage(), "log", record.levelname.lower(), record.created, fields)


def _make_json(line: str, event: str, level: str, moment: float | None, fields: Mapping[str, Any] | None) -> str:
    when = datetime.datetime.fromtimestamp(time.time() if moment is None else moment, datetime.UTC)
    # The four keys of every line last: a field of the same name would hide them.
    known = {"time": when.isoformat(timespec="milliseconds"), "level": level, "event": event, "message": line}
    return json.dumps({**known, **(fields or {}), **known}, default=str)
