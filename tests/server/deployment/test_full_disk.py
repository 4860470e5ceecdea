"""A full disk at the coordinator: one sentence, and after some room was made `resume` completes the run."""

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
    with started(site_file, elsewhere / "north.log"):
        with subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True) as watching:
            assert wait_until(lambda: list_events(RoundEnded), 150)
            with filled(folder):
                _, said = watching.communicate(timeout=60)
                refused = server("resume", federation.folder)
        assert watching.returncode == 1 and "Traceback" not in said, said
        assert "the disk is full; free some space" in said.splitlines()[-1], said
        assert "headwater coordinator resume" in said.splitlines()[-1]
        assert refused.returncode == 1 and refused.stderr.splitlines()[-1].startswith("error: /"), refused.stderr
        assert "the disk is full" in refused.stderr and "Traceback" not in refused.stderr
        again = server("resume", federation.folder, timeout=150)
        assert again.returncode == 0, again.stderr
    assert list_events(RunEnded)[-1].updates == {"colour": 3, "size": 3}
    stop_daemon(federation)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_whose_disk_fills_up_is_interrupted_in_one_sentence_and_resumed(tmp_path: Path) -> None:
    run_on_small_disk(check_run_on_full_disk, tmp_path / "disk", size="28m")
