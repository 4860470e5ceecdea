"""A ledger, or a whole state folder, is put back from an older backup: the site notices and joins nothing."""

from __future__ import annotations

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
from common.types import LedgerDamaged, RunFailed
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
    folder: Path, site: SiteConfig, run_id: str, before: Callable[[str, int], None] = lambda kind, round_: None
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
    """In one process, which has looked at all replies once: the newest is enough."""
    site = site_of(tmp_path)
    place, backup = site.state_dir / "ledgers" / site.registry, tmp_path / "backup"

    def before(kind: str, round_: int) -> None:
        if (kind, round_) == (messages.TRAIN, 1):
            save(place, backup)
        if (kind, round_) == (messages.TRAIN, 2):
            for name in files:
                shutil.copyfile(backup / name, place / name)

    events = federate(tmp_path, site, "run-1", before)
    assert [len(event.sites) for event in select_events(events, RoundEnded)] == [1, 0]
    assert [event.reason for event in select_events(events, SiteRejected)] == ["declined: budget"]
    assert "no charge" in get_last_words(site)


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
