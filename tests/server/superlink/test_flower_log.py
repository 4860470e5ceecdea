"""What Flower logs in the daemon's process: in the chosen form, without a line for each look at the queue."""

from __future__ import annotations

import json
import logging

import pytest

from server.superlink.superlink import configure_flower_log


def test_flowers_lines_follow_the_chosen_form_and_name_no_polling(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HEADWATER_LOG_FORMAT", "json")
    log = logging.getLogger("flwr")
    before = log.handlers, log.propagate, log.level
    try:
        configure_flower_log()
        log.info("ControlServicer.ListRuns")
        log.info("Created run 7")
        log.error("refused")
    finally:
        log.handlers, log.propagate, _ = before
        log.setLevel(before[2])
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [(line["level"], line["message"]) for line in lines] == [("info", "Created run 7"), ("error", "refused")]
