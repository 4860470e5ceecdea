"""Files that a crash left in part."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from benchmarks.faults.parts import (
    expect_end_or_resume,
    find_sentence,
    kill_daemon,
    kill_site,
    row,
)
from tests.deployment import Deployment, DrillSite, wait_until


@row
def torn_journal(made: Deployment) -> str:
    """a line of the run's journal that was being written is torn when the coordinator is killed"""
    return _tear_at_coordinator(made, lambda: made.list_run_folders()[-1] / "journal.jsonl", _add_half_a_line)


@row
def torn_checkpoint(made: Deployment) -> str:
    """half of the run's checkpoint is gone when the coordinator was killed"""
    return _tear_at_coordinator(made, lambda: made.list_run_folders()[-1] / "checkpoint.safetensors", _cut_half)


@row
def torn_witnesses(made: Deployment) -> str:
    """half of the coordinator's file of witnesses is gone"""
    return _tear_at_coordinator(made, lambda: made.fed / "state" / "witnesses.json", _cut_half)


@row
def torn_roster(made: Deployment) -> str:
    """half of the coordinator's file of node numbers is gone"""
    return _tear_at_coordinator(made, lambda: made.fed / "state" / "roster.json", _cut_half)


@row
def torn_database(made: Deployment) -> str:
    """half of the SuperLink's database is gone"""
    return _tear_at_coordinator(made, lambda: made.fed / "state" / "superlink.db", _cut_half)


@row
def torn_ledger(made: Deployment) -> str:
    """a line of a site's ledger that was being written is torn when the site is killed"""
    return _tear_at_site(made, lambda site: site.ledger / "ledger.jsonl", _add_half_a_line)


@row
def torn_site_journal(made: Deployment) -> str:
    """the last line of a site's journal is torn when it is killed"""
    return _tear_at_site(made, lambda site: site.state / "site.jsonl", _cut_last_line)


@row
def torn_node_id(made: Deployment) -> str:
    """half of a site's node number is gone when it is killed"""
    return _tear_at_site(made, lambda site: site.state / "node_id", _cut_half)


@row
def torn_reply(made: Deployment) -> str:
    """half of the newest stored reply of a site is gone when it is killed"""

    def find(site: DrillSite) -> Path:
        return max(site.state.glob("runs/*/replies/[!.]*"), key=lambda path: path.stat().st_mtime)

    return _tear_at_site(made, find, _cut_half)


@row
def torn_approvals(made: Deployment) -> str:
    """the last line of a site's approvals is torn when it is killed"""
    return _tear_at_site(made, lambda site: site.state / "approvals.jsonl", _cut_last_line)


@row
def cut_ledger(made: Deployment) -> str:
    """lines that a site's ledger had flushed are gone: it declines until its staff runs `recover`"""
    site = made.sites["beta"]
    run = made.start_run(rounds=4)
    made.wait_for_round(2, run=run)
    kill_site(made, "beta")
    place = site.ledger
    kept = made.folder / "ledger-whole"
    shutil.copytree(place, kept)
    _cut_last_line(place / "ledger.jsonl")
    made.start_site("beta")
    try:
        said = expect_end_or_resume(made, run)
        said += f"; site said {find_sentence(site.read_log(), 'ledger')!r}"
        made.must("site", "recover", site.file, "--reason", "a drill")
        return f"{said}; `recover` counts the worst case"
    finally:
        made.stop_site("beta")
        for path in place.parent.glob(f"{place.name}*"):
            shutil.rmtree(path)
        shutil.move(kept, place)


def _cut_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _cut_last_line(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])


def _add_half_a_line(path: Path) -> None:
    last = path.read_bytes().splitlines()[-1]
    with path.open("ab") as file:
        file.write(last[: len(last) // 2])


def _tear_at_coordinator(made: Deployment, find: Callable[[], Path], tear: Callable[[Path], None]) -> str:
    run = made.start_run(rounds=4)
    made.wait_for_round(2, run=run)
    kill_daemon(made)
    run.wait(200)
    assert wait_until(lambda: made.find_run_process() is None, 60), "the run's process stays"
    path = find()
    tear(path)
    said = ""
    for _ in range(2):
        with suppress(AssertionError):
            if made.find_daemon() is None:
                made.start_coordinator()
        again = made.resume()
        if again.wait(400) == 0:
            return f"{said}resumed and completed"
        said += f"{again.last_line!r}; "
        assert again.last_line.startswith("error: ") and path.name in again.last_line, again.last_line
        path.unlink()  # The sentence has to name the file; its owner moves it away.
        said += "without the file "
    raise AssertionError(said)


def _tear_at_site(made: Deployment, find: Callable[[DrillSite], Path], tear: Callable[[Path], None]) -> str:
    run = made.start_run(rounds=5)
    made.wait_for_round(2, run=run)
    kill_site(made, "beta")
    tear(find(made.sites["beta"]))
    made.start_site("beta")
    said = expect_end_or_resume(made, run)
    assert made.sites["beta"].is_running(), made.sites["beta"].last_line
    last = [event.round for event in made.rounds() if "beta" in event.sites]
    return f"{said}; rounds with the site: {last}"
