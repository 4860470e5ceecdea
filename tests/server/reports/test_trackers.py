"""Trackers are fed from the journal alone, beside the run, and cannot hurt it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest

from common.events import (
    AcceptedUpdate,
    FileJournal,
    HeadsEvaluated,
    NoisedMetrics,
    RoundEnded,
    RunEnded,
    RunStarted,
    SiteJoined,
)
from common.privacy.accounting import Mechanism, compute_epsilon
from common.types import Plan, Unit
from server.reports.trackers import TrackedRun, open_trackers
from server.reports.trackers.parts.follow import tracked
from server.reports.trackers.parts.points import PointMaker

PLAN = Plan(1.0, 2, 1.0, 4.0, Unit.PATIENT)


def read_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    read = EventAccumulator(str(folder))
    read.Reload()
    return {
        tag: [(event.step, float(tensor_util.make_ndarray(event.tensor_proto))) for event in read.Tensors(tag)]
        for tag in read.Tags()["tensors"]
    }


def make_round(number: int) -> RoundEnded:
    update = AcceptedUpdate(bytes_down=100, bytes_up=50, plan=PLAN)
    return RoundEnded(round=number, sites={"a": update}, num_updates={"t": 1}, updated=("t",), seconds=2.0)


def write_run(journal: FileJournal) -> None:
    journal.write(RunStarted(run_id="r", name="r", executor="deployment", path="/r", rounds=2, tasks={"t": "x"}))
    journal.write(SiteJoined(site="a", tasks={"t": 10}, unit=Unit.PATIENT, delta=1e-5, budget_epsilon=9.0))
    journal.write(make_round(1))
    journal.write(make_round(2))
    noised = NoisedMetrics(metrics={"auroc": 0.75}, standard_errors={"auroc": 0.0625}, sites=("a",))
    journal.write(HeadsEvaluated(round=2, tasks={"t": noised}, noise_multipliers={"a": 8.0}))
    journal.write(RunEnded(updates={"t": 2}, heads="00"))


def show_nothing(line: str, **_: object) -> None:
    raise AssertionError(line)


def test_every_number_at_a_tracker_follows_from_the_journal(tmp_path: Path) -> None:
    run = tmp_path / "run"
    journal = FileJournal(run / "journal.jsonl")
    with tracked(run, open_trackers(["tensorboard"]), show=show_nothing):
        write_run(journal)
    curves = read_curves(run / "trackers" / "tensorboard" / "run")
    assert curves["seconds/round"] == [(1, 2.0), (2, 2.0)]
    assert curves["bytes/to sites"] == [(1, 100.0), (2, 100.0)]
    assert curves["t/noised/auroc"] == [(2, 0.75)]
    assert curves["t/noised/auroc low"] == [(2, pytest.approx(0.75 - 1.96 * 0.0625))]
    assert curves["t/noised/auroc high"] == [(2, pytest.approx(0.75 + 1.96 * 0.0625))]
    rounds, evaluation = [Mechanism.of(PLAN)] * 2, Mechanism("gaussian", 8.0, 1.0, 1, 1.0)
    expected = [compute_epsilon(released, 1e-5) for released in (rounds[:1], rounds, [*rounds, evaluation])]
    assert [value for _, value in curves["epsilon/largest of all sites"]] == pytest.approx(expected, rel=1e-6)


def test_a_tracker_that_fails_is_named_once_and_the_run_goes_on(tmp_path: Path) -> None:
    run, lines = tmp_path / "run", list[str]()
    (tmp_path / "taken").write_text("a file where the tracker's folder would be")

    def show(line: str, **_: object) -> None:
        lines.append(line)

    journal = FileJournal(run / "journal.jsonl")
    with tracked(run, open_trackers(["tensorboard"]), tmp_path / "taken", show=show):
        write_run(journal)
    (line,) = lines
    assert line.startswith("--tracker tensorboard: given up, the run goes on: ")


def test_an_unreadable_metric_is_no_point() -> None:
    noised = NoisedMetrics(metrics={"auroc": None}, standard_errors={"auroc": 9.0}, sites=("a",))
    made = PointMaker().make(HeadsEvaluated(round=1, tasks={"t": noised}, noise_multipliers={}))
    assert made == []


class Stuck:
    """A tracker that never begins, as one does that waits for a network."""

    kind = "stuck"
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""

    def begin(self, folder: Path, run_id: str, settings: Mapping[str, str]) -> TrackedRun:
        del folder, run_id, settings
        time.sleep(30.0)
        raise AssertionError("it was to be left alone")


def test_a_tracker_that_hangs_is_left_alone_when_the_run_has_ended(tmp_path: Path) -> None:
    lines, began = list[str](), time.monotonic()

    def show(line: str, **_: object) -> None:
        lines.append(line)

    with tracked(tmp_path / "run", [Stuck()], show=show, patience_s=0.5):
        write_run(FileJournal(tmp_path / "run" / "journal.jsonl"))
    assert time.monotonic() - began < 20.0
    assert lines == ["--tracker stuck: given up, the run goes on: it did not end within 0.5 s of the run"]
