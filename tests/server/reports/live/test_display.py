"""The screen of a run that goes on: all of it from the journal, and never more than one screen."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from common.events import (
    AcceptedUpdate,
    Event,
    FeaturesReady,
    FileJournal,
    HeadsEvaluated,
    NoisedMetrics,
    RepliesAwaited,
    RoundEnded,
    RoundEvaluated,
    RunEnded,
    RunStarted,
    SiteJoined,
    SiteRejected,
)
from common.privacy.accounting import Mechanism, compute_epsilon, round_up
from common.types import Plan, Unit
from server.reports.live.display import LiveRun
from server.reports.live.progress import RunProgress

PLAN = Plan(1.0, 2, 1.0, 4.0, Unit.PATIENT)


def make_round(number: int, time: float, *sites: str) -> RoundEnded:
    updates = {site: AcceptedUpdate(bytes_down=100, bytes_up=50, plan=PLAN) for site in sites}
    return RoundEnded(
        round=number, time=time, sites=updates, num_updates={"t": len(sites)}, updated=("t",), seconds=1.0
    )


def make_joined(site: str) -> SiteJoined:
    return SiteJoined(site=site, tasks={"t": 10}, unit=Unit.PATIENT, delta=1e-5, budget_epsilon=9.0)


BEGUN: tuple[Event, ...] = (
    RunStarted(run_id="chest-1", rounds=10),
    make_joined("a"),
    make_joined("b"),
    FeaturesReady(seconds=1.0, time=100.0),
    make_round(1, 103.0, "a", "b"),
    RoundEvaluated(round=1, task="t", pooled={"auroc": 0.5}),
    SiteRejected(site="b", reason="no reply in time", round=2),
    make_round(2, 106.0, "a"),
    RoundEvaluated(round=2, task="t", pooled={"auroc": 0.8125, "recall": None}),
)


def draw(folder: Path, *events: Event, height: int = 24, live: LiveRun | None = None) -> list[str]:
    journal = FileJournal(folder / "journal.jsonl")
    for event in events:
        journal.write(event)
    shown = live or LiveRun()
    shown.follow(folder)
    out = io.StringIO()
    Console(file=out, width=80, height=height).print(shown.render(height))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_the_screen_says_pace_time_left_metrics_sites_and_epsilon(tmp_path: Path) -> None:
    text = "\n".join(draw(tmp_path / "chest-1", *BEGUN))
    assert "chest-1: training, 3 s a round, about 24 s left" in text
    assert "round 2 of 10" in text
    assert "sites: 2 joined, 1 used in round 2\nmissing: 1: b (no reply in time)" in text
    expected = compute_epsilon([Mechanism.of(PLAN)] * 2, 1e-5)
    assert f"epsilon so far: at most {round_up(expected):.2f} at any site" in text
    assert "0.812" in text and "not readable" in text
    assert "the simulator's own view" in text


def test_noised_metrics_have_their_interval(tmp_path: Path) -> None:
    noised = NoisedMetrics(metrics={"auroc": 0.75}, standard_errors={"auroc": 0.0625}, sites=("a",))
    live = LiveRun()
    before = "\n".join(draw(tmp_path / "r", *BEGUN[:5], live=live))
    evaluated = HeadsEvaluated(round=1, tasks={"t": noised}, noise_multipliers={"a": 8.0})
    text = "\n".join(draw(tmp_path / "r", evaluated, live=live))
    mechanisms = [Mechanism.of(PLAN), Mechanism("gaussian", 8.0, 1.0, 1, 1.0)]
    for shown, released in ((before, mechanisms[:1]), (text, mechanisms)):
        assert f"at most {round_up(compute_epsilon(released, 1e-5)):.2f} at any site" in shown
    assert "0.750  (0.627 to 0.873)" in text and "noised by the sites" in text


@pytest.mark.parametrize("height", [12, 24, 50])
def test_a_run_of_many_tasks_and_sites_fits_on_a_screen(tmp_path: Path, height: int) -> None:
    many = [
        RoundEvaluated(round=2, task=f"task-{number}", pooled={f"m{each}": 0.5 for each in range(8)})
        for number in range(30)
    ]
    gone = [SiteRejected(site=f"hospital-{number}", reason="no reply in time", round=3) for number in range(50)]
    lines = draw(
        tmp_path / "r",
        *BEGUN,
        *many,
        *gone,
        RepliesAwaited(message_type="train", round=3, node_ids=(7, 8)),
        height=height,
    )
    assert len(lines) <= height
    assert any("waiting for 2" in line for line in lines)


def test_a_phase_shows_its_rate_and_the_time_left(tmp_path: Path) -> None:
    now = [0.0]
    live = LiveRun(clock=lambda: now[0])
    live.observe("encoding", 1000, 7000)  # What was encoded before an interruption says nothing of the rate.
    now[0] = 10.0
    live.observe("encoding", 2000, 7000)
    lines = draw(tmp_path / "r", *BEGUN[:3], live=live)
    assert any("encoding: 2,000 of 7,000" in line and "100 a second, about 50 s left" in line for line in lines)
    live.observe("encoding", 7000, 7000)
    assert not any("encoding" in line for line in draw(tmp_path / "r", live=live))


def test_a_resumed_run_counts_its_own_pace(tmp_path: Path) -> None:
    progress = RunProgress()
    for event in (*BEGUN, RunStarted(run_id="chest-1", rounds=10, resumed=True)):
        progress.add(event)  # type: ignore[arg-type]
    assert progress.round == 2 and progress.estimate_seconds_left() is None, "hours may lie between the attempts"
    for event in (FeaturesReady(seconds=1.0, time=9000.0), make_round(3, 9005.0, "a")):
        progress.add(event)
    assert progress.estimate_seconds_left() == 35.0
    progress.add(RunEnded(updates={}, heads="00"))
    assert progress.phase == "training ended" and progress.estimate_seconds_left() is None


def test_nothing_is_known_before_a_run_begins(tmp_path: Path) -> None:
    (line,) = draw(tmp_path / "later")
    assert line.startswith("later: waiting to begin")
