"""A full disk at the coordinator: one sentence; once there is room, the run goes on by itself or with `resume`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from common.events import RoundEnded, RunEnded, read_run_journal, select_events
from common.yaml import write_yaml
from server.superlink.operate import stop_daemon
from tests import tiny
from tests.federation import ROOT, environment, started, write_site
from tests.invariants import read_charges
from tests.server.deployment.federations import new_federation
from tests.server.deployment.test_deployment import server, wait_until
from tests.small_disk import filled, run_on_small_disk


def check_run_on_full_disk(folder: Path) -> None:
    """In a process of its own, whose disk below `folder` is small."""
    federation, elsewhere = new_federation(folder / "fed"), folder.parent / "elsewhere"
    elsewhere.mkdir()
    cohort = {"min_sites": 1, "timeout_s": 60, "join_timeout_s": 90}
    write_yaml(elsewhere / "run.yaml", tiny.run_config(rounds=3, cohort=cohort))
    key = elsewhere / "north" / "keys" / "north.pub"
    address, authority = str(federation.config.address), federation.tls / "ca.crt"
    site_file = write_site(elsewhere / "north", "north", address, authority, approval="automatic")
    assert server("admit", federation.folder, "north", "--key", key).returncode == 0

    def list_events(kind: type) -> list[object]:
        journals = federation.runs.glob("*/journal.jsonl")
        return [event for path in journals for event in select_events(read_run_journal(path), kind)]

    command = [sys.executable, "-m", "server", "start", str(federation.folder), str(elsewhere / "run.yaml")]
    log = elsewhere / "start.log"
    with started(site_file, elsewhere / "north.log"):
        with log.open("w") as said, subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=said) as watching:
            assert wait_until(lambda: list_events(RoundEnded), 150), log.read_text()
            with filled(folder):
                assert wait_until(lambda: "the disk is full; free some space" in log.read_text(), 60), log.read_text()
                # The same run is prepared already; of another one the preparation finds no room.
                changes: tuple[tuple[str, ...], ...] = ((), ("--set", "seed=5"))
                refused = [server("start", federation.folder, elsewhere / "run.yaml", *change) for change in changes]
            # Where the journal had room for its end, the run was interrupted; else the coordinator goes on with it.
            watching.wait(200)
        for each in refused:
            assert each.returncode in (1, 2) and "the disk is full" in each.stderr.splitlines()[-1], each.stderr
            assert "Traceback" not in each.stderr
        assert "Traceback" not in log.read_text()
        if watching.returncode != 0:
            assert "headwater coordinator resume" in log.read_text().splitlines()[-1], log.read_text()
            again = server("resume", federation.folder, timeout=300)
            assert again.returncode == 0, again.stderr
    assert list_events(RunEnded)[-1].updates == {"colour": 3, "size": 3}
    # A round that was done again came from the stored reply.
    (ledger,) = elsewhere.rglob("ledger.jsonl")
    assert sorted((round_, len(found)) for (_, round_), found in read_charges(ledger.parent).items()) == [
        (1, 1),
        (2, 1),
        (3, 1),
    ]
    assert "Traceback" not in federation.log.read_text(encoding="utf-8", errors="replace")
    assert "Traceback" not in (elsewhere / "north.log").read_text(encoding="utf-8")
    stop_daemon(federation)


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_a_run_whose_disk_fills_up_is_interrupted_in_one_sentence_and_resumed(tmp_path: Path) -> None:
    run_on_small_disk(check_run_on_full_disk, tmp_path / "disk", size="28m", timeout_s=600)
