"""Files that a crash left in part."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from benchmarks.faults.parts import (
    LONG,
    expect_end,
    expect_end_or_resume,
    find_sentence,
    kill_daemon,
    kill_site,
    row,
)
from tests.deployment import Deployment, DrillRun, wait_until


@row
def torn_at_coordinator(made: Deployment) -> str:
    """the coordinator is killed; a journal line is torn, half of checkpoint, witnesses and node numbers is gone"""
    run = made.start_run(rounds=5)
    made.wait_for_round(2, run=run)
    kill_daemon(made)
    run.wait(200)
    assert wait_until(lambda: made.find_run_process() is None, 60), "the run's process stays"
    folder = made.list_run_folders()[-1]
    _add_half_a_line(folder / "journal.jsonl")
    torn = [
        folder / "checkpoint.safetensors",
        made.fed / "state" / "witnesses.json",
        made.fed / "state" / "roster.json",
    ]
    for path in torn:
        _cut_half(path)
    said: list[str] = []
    for _ in range(len(torn) + 1):
        if made.find_daemon() is None:
            made.start_coordinator()
        again = made.resume()
        if again.wait(400) == 0:
            return f"{'; '.join(said)}; resumed and completed"
        said.append(repr(again.last_line.removeprefix("error: ")))
        assert again.last_line.startswith("error: "), again.last_line
        named = [path for path in torn if path.exists() and path.name in again.last_line]
        assert named, f"no file is named: {again.last_line}"
        named[0].unlink()  # As the sentence asks for.
    raise AssertionError("; ".join(said))


@row
def torn_database(made: Deployment) -> str:
    """half of the SuperLink's database is gone when the coordinator was stopped"""
    made.stop()
    _cut_half(made.fed / "state" / "superlink.db")
    done = made.command("coordinator", "serve", made.fed, seconds=60)
    said = (done.stdout + done.stderr).strip().splitlines()[-1]
    assert done.returncode in (1, 2) and "superlink.db" in said, said
    (made.fed / "state" / "superlink.db").unlink()
    made.start_coordinator()
    for name in made.sites:
        made.stop_site(name)
    made.start_sites()
    return f"{said!r}; without the file {expect_end(made.start_run(rounds=2))}"


@row
def torn_at_site(made: Deployment) -> str:
    """when a site is killed a line of its ledger and of its journal is torn, and half of its node number is gone"""
    run = made.start_run(rounds=LONG)
    made.wait_for_round(2, run=run)
    site = made.sites["beta"]
    kill_site(made, "beta")
    _add_half_a_line(site.ledger / "ledger.jsonl")
    _cut_last_line(site.state / "site.jsonl")
    _cut_half(site.state / "node_id")
    made.start_site("beta")
    return _expect_site_in(made, run)


@row
def torn_reply(made: Deployment) -> str:
    """half of the newest stored reply of a site is gone when it is killed"""
    run = made.start_run(rounds=LONG)
    made.wait_for_round(2, run=run)
    site = made.sites["beta"]
    kill_site(made, "beta")
    newest = max(site.state.glob("runs/*/replies/[!.]*"), key=lambda path: path.stat().st_mtime)
    whole = newest.read_bytes()
    _cut_half(newest)
    made.start_site("beta")
    try:
        return _expect_site_in(made, run)
    finally:
        newest.write_bytes(whole)  # What left is replayed.


@row
def cut_ledger(made: Deployment) -> str:
    """lines that a site's ledger had flushed are gone: it declines until its staff runs `recover`"""
    site = made.sites["beta"]
    run = made.start_run(rounds=LONG)
    made.wait_for_round(2, run=run)
    kill_site(made, "beta")
    place = site.ledger
    kept = made.folder / "ledger-whole"
    shutil.copytree(place, kept)
    _cut_last_charge(place / "ledger.jsonl")
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


def _cut_last_charge(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    last = max(number for number, line in enumerate(lines) if b'"event":"reserved"' in line)
    path.write_bytes(b"".join(lines[:last]) + lines[last][: len(lines[last]) // 2])


def _add_half_a_line(path: Path) -> None:
    last = path.read_bytes().splitlines()[-1]
    with path.open("ab") as file:
        file.write(last[: len(last) // 2])


def _expect_site_in(made: Deployment, run: DrillRun) -> str:
    said = expect_end_or_resume(made, run)
    assert made.sites["beta"].is_running(), made.sites["beta"].last_line
    missed = [event.round for event in made.rounds() if "beta" not in event.sites]
    assert LONG not in missed, f"rounds without the site: {missed}"
    return f"{said}; rounds without the site: {missed}"
