"""A ledger, or a whole state folder, is put back from an older backup: the site notices and joins nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message
from typer.testing import CliRunner

from client.__main__ import app as site_commands
from client.app import make_app
from client.config import SiteConfig
from client.ledger.ledger import Ledger
from client.ledger.older_copy import read_claims
from client.protocol.site import Site
from common import messages
from common.events import (
    FileJournal,
    RequestDeclined,
    RoundEnded,
    RunEvent,
    SiteRejected,
    read_run_journal,
    read_site_journal,
    select_events,
)
from common.privacy.noise import os_entropy
from common.types import LedgerDamaged, RunFailed, RunInterrupted
from common.yaml import write_yaml
from server.rounds.loop import run_federation
from simulations.executors.in_process import InProcessGrid
from tests.tiny import backbone, run_config, site_config

ROOT = Path(__file__).resolve().parents[3]
SOLVER = {"kind": "dp_gd", "sampling_rate": 1.0, "steps": 2, "clip_norm": 1.0, "learning_rate": 1.0}
BUDGET = {"epsilon": 40.0, "delta": 1e-5}


def site_of(folder: Path, **changes: Any) -> SiteConfig:
    """A site's settings, which stand in its file too."""
    config = site_config(folder / "site", "north", **{"budget": BUDGET, **changes})
    write_yaml(folder / "site.yaml", config)
    return config


def federate(
    folder: Path,
    site: SiteConfig,
    run_id: str,
    before: Callable[[str, int], None] = lambda kind, round_: None,
    *,
    keeps: bool = True,
) -> list[RunEvent]:
    """Runs a federation with one site; `before` is called with each request's kind and round before it gets there."""
    honest = make_app(lambda context: site)

    def app(message: Message, context: Context) -> Message:
        before(message.metadata.message_type, int(message.metadata.group_id))
        return honest(message, context)

    own = folder / "coordinator" / run_id
    own.mkdir(parents=True, exist_ok=True)
    run_federation(
        InProcessGrid(app, 1),
        run_config(solver=SOLVER, privacy={"unit": "example", "delta": 1e-5, "noise_multiplier": 8.0}),
        {"backbone": backbone()},
        run_id=run_id,
        folder=own,
        journal=FileJournal(own / "journal.jsonl"),
        executor="in_process",
        witnesses=folder / "coordinator" / "witnesses.json" if keeps else None,
    )
    return read_run_journal(own / "journal.jsonl")


def restore(backup: Path, place: Path) -> None:
    """As a person does: what is there goes, the copy comes."""
    shutil.rmtree(place)
    shutil.copytree(backup, place)


def save(place: Path, backup: Path) -> Path:
    shutil.copytree(place, backup)
    return backup


def get_last_words(site: SiteConfig) -> str:
    return select_events(read_site_journal(site.state_dir / "site.jsonl"), RequestDeclined)[-1].detail


def run_command(*arguments: object) -> str:
    result = CliRunner().invoke(site_commands, [str(each) for each in arguments])
    return f"{result.exit_code} {result.stdout}{result.stderr}"


def test_only_the_ledgers_are_restored_and_no_run_is_joined_until_recover(tmp_path: Path) -> None:
    site = site_of(tmp_path)
    federate(tmp_path, site, "run-1")
    ledgers = site.state_dir / "ledgers"
    backup = save(ledgers, tmp_path / "backup")
    federate(tmp_path, site, "run-2")
    spent = Site(site, os_entropy).ledger().spent().reserved_epsilon
    restore(backup, ledgers)
    for _ in range(2):
        with pytest.raises(RunFailed, match="budget"):
            federate(tmp_path, site, "run-3")
        assert "a reply of run run-2 was sent and has no charge" in get_last_words(site)
    for command in ("budget", "check"):
        assert "a reply of run run-2 was sent and has no charge" in run_command(command, tmp_path / "site.yaml")
    done = run_command("recover", tmp_path / "site.yaml", "--reason", "restored from a backup")
    assert done.startswith("0 ") and "spent epsilon 40" in done, done
    with pytest.raises(RunFailed, match="budget"):
        federate(tmp_path, site, "run-3")  # Now because the whole cap counts as spent.
    ledger = Site(site, os_entropy).ledger()
    assert ledger.spent().reserved_epsilon == BUDGET["epsilon"] > spent
    assert "nothing to recover" in run_command("recover", tmp_path / "site.yaml", "--reason", "again")


def test_an_older_copy_is_told_by_a_new_process_too(tmp_path: Path) -> None:
    site = site_of(tmp_path)
    federate(tmp_path, site, "run-1")
    backup = save(site.state_dir / "ledgers", tmp_path / "backup")
    federate(tmp_path, site, "run-2")
    restore(backup, site.state_dir / "ledgers")
    command = [sys.executable, "-m", "client", "budget", str(tmp_path / "site.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and "was sent and has no charge" in done.stderr, done.stderr


@pytest.mark.parametrize("files", [["ledger.jsonl", "anchor.json"], ["ledger.jsonl", "anchor.json", "ledger.key"]])
def test_the_ledgers_files_are_put_back_between_two_rounds_of_a_run(tmp_path: Path, files: list[str]) -> None:
    """In one process, which has looked at all replies once: the newest is enough; the coordinator keeps no witness."""
    site = site_of(tmp_path)
    place, backup = site.state_dir / "ledgers" / site.registry, tmp_path / "backup"

    def before(kind: str, round_: int) -> None:
        if (kind, round_) == (messages.TRAIN, 1):
            save(place, backup)
        if (kind, round_) == (messages.TRAIN, 2):
            for name in files:
                shutil.copyfile(backup / name, place / name)

    with pytest.raises(RunInterrupted, match="round 2"):
        federate(tmp_path, site, "run-1", before, keeps=False)
    events = read_run_journal(tmp_path / "coordinator" / "run-1" / "journal.jsonl")
    assert [len(event.sites) for event in select_events(events, RoundEnded)] == [1]
    assert {event.reason for event in select_events(events, SiteRejected)} == {"declined: budget"}
    assert "no charge" in get_last_words(site)


def test_the_ledgers_lines_are_put_back_between_two_runs_beside_a_key_that_stays(tmp_path: Path) -> None:
    """As rsync does, while the site's process goes on; the coordinator keeps no witness."""
    site = site_of(tmp_path)
    federate(tmp_path, site, "run-1", keeps=False)
    place = site.state_dir / "ledgers" / site.registry
    backup = save(place, tmp_path / "backup")
    federate(tmp_path, site, "run-2", keeps=False)
    for name in ("ledger.jsonl", "anchor.json"):
        shutil.copyfile(backup / name, place / name)
    for run_id in ("run-3", "run-4"):
        with pytest.raises(RunFailed, match="budget"):
            federate(tmp_path, site, run_id, keeps=False)
        assert "a reply of run run-2 was sent and has no charge" in get_last_words(site)


def test_a_sent_event_alone_tells_an_older_copy(tmp_path: Path) -> None:
    """Stored replies may have been removed; the journal still says what left."""
    site = site_of(tmp_path)
    federate(tmp_path, site, "run-1")
    backup = save(site.state_dir / "ledgers", tmp_path / "backup")
    federate(tmp_path, site, "run-2")
    restore(backup, site.state_dir / "ledgers")
    shutil.rmtree(site.state_dir / "runs" / "run-2")
    with pytest.raises(LedgerDamaged, match="run-2 was sent"):
        Site(site, os_entropy).ledger()


def test_an_older_copy_of_a_recovered_ledger_is_refused_and_the_recovered_one_is_used(tmp_path: Path) -> None:
    site = site_of(tmp_path)
    ledgers = site.state_dir / "ledgers"
    federate(tmp_path, site, "run-1")
    backup = save(ledgers, tmp_path / "before")
    federate(tmp_path, site, "run-2")
    restore(backup, ledgers)
    assert run_command("recover", tmp_path / "site.yaml", "--reason", "restored").startswith("0 ")
    site = site_of(tmp_path, budget={"epsilon": 90.0, "delta": 4e-5})
    assert run_command("amend", tmp_path / "site.yaml", "--reason", "the board agreed").startswith("0 ")
    recovered = save(ledgers, tmp_path / "recovered")
    assert len(select_events(federate(tmp_path, site, "run-3"), RoundEnded)) == 2
    for older in (recovered, backup):
        restore(older, ledgers)
        with pytest.raises(RunFailed, match="budget"):
            federate(tmp_path, site, "run-4")
        assert "has no charge" in get_last_words(site)


def test_the_whole_state_is_restored_and_no_run_is_joined_until_recover(tmp_path: Path) -> None:
    """Ledger, replies and journal are equally old: only the coordinator's witness tells."""
    site = site_of(tmp_path)
    federate(tmp_path, site, "run-1")
    backup = save(site.state_dir, tmp_path / "backup")
    federate(tmp_path, site, "run-2")
    restore(backup, site.state_dir)
    assert run_command("budget", tmp_path / "site.yaml").startswith("0 ")  # Nothing here can know.
    with pytest.raises(RunFailed, match="budget"):
        federate(tmp_path, site, "run-3")
    assert "older copy than the one a coordinator has a witness of" in get_last_words(site)
    # From now on nobody is answered, also not a coordinator that has no witness.
    with pytest.raises(RunFailed, match="budget"):
        federate(tmp_path / "another", site, "run-1")
    assert "older copy" in run_command("budget", tmp_path / "site.yaml")
    done = run_command("recover", tmp_path / "site.yaml", "--reason", "restored from a backup")
    assert done.startswith("0 ") and "spent epsilon 40" in done, done
    site = site_of(tmp_path, budget={"epsilon": 90.0, "delta": 4e-5})
    assert run_command("amend", tmp_path / "site.yaml", "--reason", "the board agreed").startswith("0 ")
    # The witness of the replaced chain is settled: the site joins, and its new one is kept.
    assert [len(event.sites) for event in select_events(federate(tmp_path, site, "run-4"), RoundEnded)] == [1, 1]


def test_the_whole_state_is_restored_between_two_rounds_of_a_run(tmp_path: Path) -> None:
    site = site_of(tmp_path)

    def before(kind: str, round_: int) -> None:
        if (kind, round_) == (messages.TRAIN, 1):
            save(site.state_dir, tmp_path / "backup")
        if (kind, round_) == (messages.TRAIN, 2):
            restore(tmp_path / "backup", site.state_dir)

    with pytest.raises(RunInterrupted, match="round 2"):
        federate(tmp_path, site, "run-1", before)
    assert len(Ledger.find(site.state_dir / "ledgers", site.registry).charges()) == 0  # type: ignore[union-attr]


def test_an_equally_long_ledger_with_other_lines_is_refused(tmp_path: Path) -> None:
    """After the restore another coordinator's run is charged, which brings the ledger to its former length."""
    site = site_of(tmp_path)
    federate(tmp_path, site, "run-1")
    backup = save(site.state_dir, tmp_path / "backup")
    federate(tmp_path, site, "run-2")
    restore(backup, site.state_dir)
    federate(tmp_path / "another", site, "other-1")
    with pytest.raises(RunFailed, match="budget"):
        federate(tmp_path, site, "run-3")
    assert "older copy" in get_last_words(site)


def test_a_state_older_than_a_recovery_is_refused_to_the_coordinator_that_saw_the_recovered_ledger(
    tmp_path: Path,
) -> None:
    site = site_of(tmp_path)
    federate(tmp_path, site, "run-1")
    backup = save(site.state_dir, tmp_path / "backup")
    federate(tmp_path, site, "run-2")
    restore(backup, site.state_dir)
    with pytest.raises(RunFailed):
        federate(tmp_path, site, "run-3")
    run_command("recover", tmp_path / "site.yaml", "--reason", "restored")
    site = site_of(tmp_path, budget={"epsilon": 90.0, "delta": 4e-5})
    run_command("amend", tmp_path / "site.yaml", "--reason", "the board agreed")
    recovered = save(site.state_dir, tmp_path / "recovered")
    federate(tmp_path, site, "run-4")
    # A copy of the recovered ledger is behind its own witness.
    restore(recovered, site.state_dir)
    with pytest.raises(RunFailed, match="budget"):
        federate(tmp_path, site, "run-5")
    # A copy from before cannot know the witness's chain; the coordinator is declined, and recover settles it.
    restore(backup, site.state_dir)
    site = site_of(tmp_path)
    with pytest.raises(RunFailed, match="bad_request"):
        federate(tmp_path, site, "run-5")
    assert "a witness that is not of it" in get_last_words(site)
    assert run_command("recover", tmp_path / "site.yaml", "--reason", "restored again").startswith("0 ")
    site = site_of(tmp_path, budget={"epsilon": 90.0, "delta": 4e-5})
    assert run_command("amend", tmp_path / "site.yaml", "--reason", "the board agreed").startswith("0 ")
    assert len(select_events(federate(tmp_path, site, "run-6"), RoundEnded)) == 2


def test_an_invented_witness_declines_its_coordinator_alone(tmp_path: Path) -> None:
    site = site_of(tmp_path)
    federate(tmp_path, site, "run-1")
    kept = tmp_path / "coordinator" / "witnesses.json"
    own = json.loads(kept.read_text())["north"]
    inventions = [
        own | {"length": own["length"] + 1},
        own | {"mac": "0" * 64},
        own | {"chain": "1" * 64},
        *({"chain": f"{number:064x}", "length": 5, "mac": "2" * 64, "tag": "3" * 64} for number in range(18)),
    ]
    other = tmp_path / "inventor" / "coordinator"
    other.mkdir(parents=True)
    for number, invention in enumerate(inventions):
        (other / "witnesses.json").write_text(json.dumps({"north": invention}))
        with pytest.raises(RunFailed, match="bad_request"):
            federate(tmp_path / "inventor", site, f"run-{number}")
    assert run_command("budget", tmp_path / "site.yaml").startswith("0 ")
    assert [len(event.sites) for event in select_events(federate(tmp_path, site, "run-2"), RoundEnded)] == [1, 1]
    assert len(read_claims(site.state_dir / "ledgers" / site.registry)) <= 16


def test_a_site_that_was_not_restored_is_never_behind_its_witness(tmp_path: Path) -> None:
    """Several coordinators, refusals, a power cut that loses the notes of commits, and a run that is continued."""
    site = site_of(tmp_path)
    ledger = site.state_dir / "ledgers" / site.registry / "ledger.jsonl"

    def lose_note(kind: str, round_: int) -> None:
        if kind != messages.FINISH:
            return
        anchored = json.loads((ledger.parent / "anchor.json").read_text())["length"]
        lines = ledger.read_bytes().splitlines(keepends=True)
        assert len(lines) == anchored + 1 and b"committed" in lines[-1]
        ledger.write_bytes(b"".join(lines[:-1]))

    for number in (1, 2):
        federate(tmp_path, site, f"run-{number}")
        federate(tmp_path / "another", site, f"other-{number}", lose_note)
    federate(tmp_path, site, "run-2")  # The same rounds once more, from stored replies.
    assert len(Site(site, os_entropy).ledger().charges()) == 8
