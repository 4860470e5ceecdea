"""The lines of a standing process: text for people, or one JSON object a line."""

from __future__ import annotations

import datetime
import io
import json
import logging
import re
from pathlib import Path

import pytest

from common.process.lines import (
    JsonFormatter,
    LogFormat,
    ProgressLines,
    describe_pace,
    read_error,
    show_line,
    use_log_format,
    write_json,
)
from tests.federation import ROOT, client, free_port, write_site


@pytest.fixture(autouse=True)
def text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_LOG_FORMAT", "text")


def test_text_is_the_time_and_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    show_line("joined", event="connected", level="warning", fields={"node": 3})
    assert re.fullmatch(r"\d\d:\d\d:\d\d  joined\n", capsys.readouterr().out)


def test_json_is_one_object_a_line_whatever_the_texts_hold(capsys: pytest.CaptureFixture[str]) -> None:
    use_log_format(LogFormat.JSON)
    message = 'two\nlines "and\u2028more"'
    show_line(message, event="sent", level="warning", fields={"round": 2, "level": "none", "x": "\n"})
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    values = json.loads(out)
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(values.pop("time"))
    assert abs(age.total_seconds()) < 60
    assert values == {"level": "warning", "event": "sent", "message": message, "round": 2, "x": "\n"}


def test_what_a_library_logs_is_one_line_with_its_traceback() -> None:
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(JsonFormatter())
    logger = logging.Logger("library")
    logger.addHandler(handler)
    try:
        raise ValueError("inside")
    except ValueError:
        logger.exception("it %s", "broke")
    values = json.loads(out.getvalue())
    assert (out.getvalue().count("\n"), values["level"], values["event"]) == (1, "error", "log")
    assert (values["message"], values["logger"]) == ("it broke", "library")
    assert "ValueError: inside" in values["exception"]


def test_an_error_is_found_in_either_form() -> None:
    out = io.StringIO()
    write_json(out, "no room", event="failed", level="error")
    assert read_error(out.getvalue()) == read_error("error: no room") == "no room"
    for line in ("", "an error: no room", "[]", "{}", '{"event": "log", "message": "x"}', "{"):
        assert read_error(line) is None


@pytest.mark.slow
def test_a_site_that_cannot_join_says_all_of_it_in_json(tmp_path: Path) -> None:
    site = write_site(tmp_path, "north", f"localhost:{free_port()}", ROOT / "tests/federation.py")
    refused = client("start", str(site), "--log-format", "json")
    (line,) = refused.stderr.splitlines()
    values = json.loads(line)
    assert (refused.returncode, values["level"], values["event"]) == (2, "error", "failed")
    assert "expected" in values["message"]


def test_a_long_work_is_seen_now_and_then_with_its_rate_and_the_time_left() -> None:
    said: list[str] = []
    now = [0.0]
    show = ProgressLines("encoding", said.append, first_s=10, every_s=60, clock=lambda: now[0])
    for second in range(0, 200, 2):
        now[0] = float(second)
        show(10 * (second + 2), 36_000)
    assert said == [
        "encoding: 120 of 36,000 records (0 %), 10 a second, about 60 min left",
        "encoding: 720 of 36,000 records (2 %), 10 a second, about 59 min left",
        "encoding: 1,320 of 36,000 records (4 %), 10 a second, about 58 min left",
        "encoding: 1,920 of 36,000 records (5 %), 10 a second, about 57 min left",
    ]


def test_a_short_work_and_the_next_one_say_nothing() -> None:
    said: list[str] = []
    now = [0.0]
    show = ProgressLines("encoding", said.append, first_s=10, every_s=60, clock=lambda: now[0])
    for start in (0.0, 1000.0):
        for step in range(5):
            now[0] = start + step
            show(step + 1, 5)
    assert said == []


@pytest.mark.parametrize(
    ("done", "left", "seconds", "said"),
    [
        (50, 100, 10.0, ", 5 a second, about 20 s left"),
        (2, 30, 20.0, ", 10 s each, about 5 min left"),
        (0, 100, 10.0, ""),
        (100, 0, 10.0, ""),
    ],
)
def test_a_pace_is_said_by_what_is_larger_than_one(done: int, left: int, seconds: float, said: str) -> None:
    assert describe_pace(done, left, seconds) == said
