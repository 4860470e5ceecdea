"""A standing coordinator's trackers follow every run that goes on, and one that is resumed from its beginning."""

from __future__ import annotations

import time
from pathlib import Path

from typer.testing import CliRunner

from common.events import FileJournal, RoundEnded, RunEnded, RunInterruption, RunStarted
from server.__main__ import app
from server.monitoring.tracking import tracked_runs
from server.reports.trackers import open_trackers
from tests.server.deployment.federations import new_federation


def read_rounds(folder: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return sorted({event.step for event in read.Tensors("seconds/round")})


def make_round(number: int) -> RoundEnded:
    return RoundEnded(round=number, sites={}, num_updates={}, updated=(), seconds=1.0)


def test_runs_that_go_on_are_followed_and_finished_ones_are_left(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    old, new = (FileJournal(federation.runs / name / "journal.jsonl") for name in ("old", "new"))
    old.write(RunStarted(run_id="old", rounds=1))
    old.write(make_round(1))
    time.sleep(0.05)
    with tracked_runs(federation, open_trackers(["tensorboard"]), tmp_path / "curves"):
        new.write(RunStarted(run_id="new", rounds=3))
        new.write(make_round(1))
        new.write(RunInterruption(reason="a site is missing"))
        time.sleep(3.0)
        new.write(RunStarted(run_id="new", rounds=3, resumed=True))
        new.write(make_round(2))
        new.write(RunEnded(updates={}, heads="00"))
    assert read_rounds(tmp_path / "curves" / "tensorboard" / "new") == [1, 2]
    assert not (tmp_path / "curves" / "tensorboard" / "old").exists()


def test_a_coordinator_in_the_background_takes_no_tracker(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    words = ["serve", str(federation.folder), "--background", "--tracker", "tensorboard"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "--tracker: expected it without --background" in " ".join(result.stderr.split())
