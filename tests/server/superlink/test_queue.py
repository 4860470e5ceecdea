"""The queue: what a run's folder says of it, whose turn it is, and what goes on by itself after a crash."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from common.events import FileJournal, RoundEnded, RunEnded, RunFailure, RunInterruption, RunStarted
from common.files import lock_file
from common.run import RunConfig
from common.types import BadInput, RunFailed
from common.yaml import parse, write_yaml
from server.commands.parts.daemon import report_end_of_run
from server.deployment.federation import Federation
from server.deployment.preparation import Prepared
from server.rounds.checkpoint import Checkpoint
from server.superlink import operate
from server.superlink.control import RunState
from server.superlink.daemon import _run_queue
from server.superlink.queue import (
    MAX_ATTEMPTS,
    Queue,
    describe_run,
    find_interrupted_run,
    find_shown_run,
    is_wanted_anyway,
    list_runs,
    remove_old_runs,
    resume_run,
    submit_run,
    withdraw_run,
)
from server.superlink.watch import watch
from tests import tiny
from tests.server.deployment.federations import new_federation


class Engine:
    """The SuperLink's side of the queue's contract: at most one run at a time, which ends when the test says so."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.stopped: list[int] = []
        self.current: RunState | None = None

    def find_current_run(self) -> RunState | None:
        return self.current

    def submit(self, bundle: object, settings: dict[str, str]) -> int:
        assert self.current is None
        (folder,) = settings.values()
        self.started.append(Path(folder).name)
        self.current = RunState(len(self.started), folder, False, "", "")
        return len(self.started)

    def stop_run(self, run_id: int) -> None:
        self.stopped.append(run_id)
        self.current = None

    def die(self) -> None:
        self.current = None


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return new_federation(tmp_path / "fed")


def submit(federation: Federation, name: str, **how: bool) -> Path:
    prepared = Prepared({}, Checkpoint("", 0, {}, {}, {}))
    folder = submit_run(federation, parse(RunConfig, tiny.run_config(name=name), base=Path.cwd()), prepared, **how)
    time.sleep(0.01)
    return folder


def begin(folder: Path, *rounds: int) -> FileJournal:
    journal = FileJournal(folder / "journal.jsonl")
    journal.write(RunStarted(run_id=folder.name, rounds=4))
    for number in rounds:
        journal.write(RoundEnded(round=number, sites={}, num_updates={}, updated=(), seconds=0.1))
    return journal


def test_a_run_that_is_wanted_anyway_stays_so_when_it_is_resumed(federation: Federation) -> None:
    plain, anyway = submit(federation, "a"), submit(federation, "b", anyway=True)
    for folder in (plain, anyway):
        withdraw_run(folder, "pause")
        resume_run(folder)
    assert not is_wanted_anyway(plain) and is_wanted_anyway(anyway)


def test_runs_start_one_after_the_other_in_the_order_of_their_submission(federation: Federation) -> None:
    first, second, third = (submit(federation, name) for name in ("b", "a", "c"))
    engine, queue = Engine(), Queue(federation)
    queue.start_next(engine)
    queue.start_next(engine)
    assert engine.started == [first.name]
    assert [run.state for run in list_runs(federation)] == ["running", "queued", "queued"]
    begin(first, 1, 2, 3, 4).write(RunEnded(updates={}, heads=""))
    engine.die()
    withdraw_run(second, "cancel")
    queue.start_next(engine)
    assert engine.started == [first.name, third.name]
    begin(third).write(RunFailure(reason="no quorum"))
    engine.die()
    queue.start_next(engine)
    assert [run.state for run in list_runs(federation)] == ["completed", "cancelled", "failed"]
    assert len(engine.started) == 2


def test_a_run_whose_process_died_goes_on_before_any_other_also_in_another_daemon(federation: Federation) -> None:
    first = submit(federation, "a")
    engine = Engine()
    Queue(federation).start_next(engine)
    begin(first, 1, 2)
    engine.die()
    submit(federation, "b")
    Queue(federation).start_next(engine)
    assert engine.started == [first.name, first.name]


def test_a_status_shows_the_run_under_way_and_not_one_that_waits_behind_it(federation: Federation) -> None:
    assert find_shown_run(federation) is None
    first = submit(federation, "a")
    assert find_shown_run(federation) == first
    engine, queue = Engine(), Queue(federation)
    queue.start_next(engine)
    second = submit(federation, "b")
    assert find_shown_run(federation) == first, "it is about to begin"
    journal = begin(first, 1, 2, 3, 4)
    assert find_shown_run(federation) == first
    journal.write(RunEnded(updates={}, heads=""))
    withdraw_run(second, "cancel")
    assert find_shown_run(federation) == first, "the other never began"
    engine.die()
    third = submit(federation, "c")
    queue.start_next(engine)
    assert find_shown_run(federation) == third
    found = operate.status(federation).run
    assert found is not None and found.id == third.name


def test_no_second_process_starts_while_the_earlier_one_is_still_ending(federation: Federation) -> None:
    first = submit(federation, "a")
    engine, queue = Engine(), Queue(federation)
    queue.start_next(engine)
    begin(first, 1)
    engine.die()
    with lock_file(first / "run.lock"):
        queue.start_next(engine)
        assert engine.started == [first.name]
    queue.start_next(engine)
    assert engine.started == [first.name, first.name]


def test_a_run_whose_process_dies_at_once_again_and_again_is_given_up(federation: Federation) -> None:
    first, second = submit(federation, "a"), submit(federation, "b")
    engine, queue = Engine(), Queue(federation)
    for _ in range(MAX_ATTEMPTS):
        queue.start_next(engine)
        begin(first)
        engine.die()
    queue.start_next(engine)
    assert engine.started == [first.name] * MAX_ATTEMPTS + [second.name]
    found = describe_run(first)
    assert (found.state, "without a whole round" in (found.reason or "")) == ("interrupted", True)
    # Each whole round gives it all its attempts again; so does the staff.
    resume_run(first)
    engine.die()
    withdraw_run(second, "cancel")
    for number in range(1, 3 + MAX_ATTEMPTS):
        queue.start_next(engine)
        begin(first, number)
        engine.die()
    assert describe_run(first).state == "running"


def test_what_the_staff_ended_does_not_go_on_by_itself(federation: Federation) -> None:
    first = submit(federation, "a")
    engine, queue = Engine(), Queue(federation)
    queue.start_next(engine)
    begin(first, 1)
    withdraw_run(first, "pause")
    with lock_file(first / "run.lock"):
        queue.start_next(engine)
    assert engine.stopped == [1]
    queue.start_next(engine)
    assert engine.started == [first.name] and describe_run(first).state == "interrupted"
    resume_run(first)
    queue.start_next(engine)
    assert engine.started == [first.name, first.name]


def test_a_run_that_failed_is_wanted_again_only_by_resume(federation: Federation) -> None:
    first = submit(federation, "a")
    begin(first).write(RunFailure(reason="no quorum"))
    engine, queue = Engine(), Queue(federation)
    queue.start_next(engine)
    assert engine.started == []
    resume_run(find_interrupted_run(federation, None))
    assert describe_run(first).state == "queued"
    queue.start_next(engine)
    assert engine.started == [first.name]


def test_a_daemon_that_starts_goes_on_with_the_newest_run_if_sites_were_missing(federation: Federation) -> None:
    first = submit(federation, "a")
    begin(first, 1).write(RunInterruption(reason="north is not connected"))
    engine, queue = Engine(), Queue(federation)
    queue.start_next(engine)
    assert engine.started == [] and describe_run(first).state == "interrupted"
    queue.resume_newest()
    queue.start_next(engine)
    assert engine.started == [first.name]
    begin(first, 2).write(RunInterruption(reason="north is not connected"))
    engine.die()
    withdraw_run(first, "pause")
    Queue(federation).resume_newest()
    assert describe_run(first).state == "interrupted"


def test_a_folder_of_an_earlier_version_and_a_damaged_order_wait_for_the_staff(federation: Federation) -> None:
    for name in ("a", "b"):
        (federation.runs / name).mkdir()
        write_yaml(federation.runs / name / "config.yaml", tiny.run_config())
        begin(federation.runs / name, 1)
        time.sleep(0.02)
    (federation.runs / "b" / "order.json").write_text("{")
    engine = Engine()
    Queue(federation).start_next(engine)
    assert engine.started == []
    assert [(run.id, run.state) for run in list_runs(federation)] == [("a", "interrupted"), ("b", "interrupted")]


def test_the_newest_run_is_the_one_to_resume_and_an_older_one_only_by_its_name(federation: Federation) -> None:
    first, second = submit(federation, "a"), submit(federation, "b")
    with pytest.raises(BadInput, match="which is queued"):
        find_interrupted_run(federation, None)
    for folder in (first, second):
        begin(folder, 1)
        withdraw_run(folder, "pause")
    assert find_interrupted_run(federation, None) == second
    begin(second).write(RunEnded(updates={}, heads=""))
    (second / "summary.json").touch()  # Complete is what has its results.
    with pytest.raises(BadInput, match=f"got {second.name}, which is complete"):
        find_interrupted_run(federation, None)
    assert find_interrupted_run(federation, first.name) == first
    with pytest.raises(BadInput, match="got 'c'"):
        find_interrupted_run(federation, "c")
    withdraw_run(second := submit(federation, "c"), "cancel")
    with pytest.raises(BadInput, match="which is cancelled"):
        find_interrupted_run(federation, second.name)
    withdraw_run(submit(federation, "d"), "pause")
    withdraw_run(submit(federation, "e"), "cancel")
    assert find_interrupted_run(federation, None).name.startswith("d-")


def test_only_runs_that_ended_long_enough_ago_are_removed(federation: Federation) -> None:
    old = time.time() - 10 * 86_400
    done, fresh, paused, queued = (submit(federation, name) for name in ("a", "b", "c", "d"))
    for folder in (done, paused):
        FileJournal(folder / "journal.jsonl").write(RunStarted(run_id=folder.name, rounds=4, time=old))
    FileJournal(done / "journal.jsonl").write(RunEnded(updates={}, heads="", time=old))
    begin(fresh).write(RunEnded(updates={}, heads=""))
    withdraw_run(paused, "pause")
    assert remove_old_runs(federation, 11) == []
    assert remove_old_runs(federation, 9) == [done.name]
    assert [run.folder for run in list_runs(federation)] == [fresh, paused, queued]


def test_a_daemon_that_starts_while_a_disk_fails_goes_on_once_it_works_again(
    federation: Federation, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else nothing would look at the queue any more for as long as the daemon lives."""
    folder = submit(federation, "a")
    begin(folder, 1).write(RunInterruption(reason="sites are missing"))
    journal = folder / "journal.jsonl"
    journal.rename(folder / "kept")
    journal.mkdir()  # Reading it is an error of the operating system, as of a disk that fails.

    async def start_and_mend() -> None:
        queue = asyncio.create_task(_run_queue(federation, FileJournal(federation.state / "link.jsonl")))
        try:
            said = ""
            while "the queue waits" not in said and not queue.done():
                await asyncio.sleep(0.01)
                said += "".join(capsys.readouterr())
            journal.rmdir()
            (folder / "kept").rename(journal)
            while describe_run(folder).state != "queued" and not queue.done():
                await asyncio.sleep(0.01)
            assert describe_run(folder).state == "queued"
        finally:
            queue.cancel()

    asyncio.run(asyncio.wait_for(start_and_mend(), 60))


def test_a_run_that_was_given_up_says_how_to_go_on(federation: Federation) -> None:
    folder = submit(federation, "a")
    begin(folder, 1)
    withdraw_run(folder, "pause")
    command = f"headwater coordinator resume {federation.folder} {folder.name}"
    with pytest.raises(RunFailed, match=f"interrupted; `{command}` continues"):
        report_end_of_run(folder)


def test_the_end_of_an_earlier_attempt_is_not_reported_for_a_later_one(federation: Federation) -> None:
    folder = submit(federation, "a")
    begin(folder, 1).write(RunInterruption(reason="two sites are missing"))
    with pytest.raises(RunFailed, match="two sites are missing"):
        report_end_of_run(folder)
    begin(folder)
    withdraw_run(folder, "pause")
    with pytest.raises(RunFailed, match=": interrupted; .*resume"):
        report_end_of_run(folder)


def test_watching_ends_when_the_coordinator_is_gone_and_says_what_goes_on_with_the_run(federation: Federation) -> None:
    folder = submit(federation, "a")
    lines: list[str] = []
    with pytest.raises(RunFailed, match=f"headwater coordinator serve {federation.folder}"):
        watch(folder, alive=lambda: False, show=lines.append)
    begin(folder, 1).write(RunEnded(updates={"x": 1}, heads=""))
    watch(folder, alive=lambda: False, show=lines.append)
    assert lines[0].startswith(f"run {folder.name}") and lines[1].startswith("round 1 of 4")
