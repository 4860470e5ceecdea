"""A reply that is larger than the coordinator takes in: one sentence at once, one charge, nobody waits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from client.config import SiteConfig
from client.connection.node import JOURNAL
from client.protocol.site import Site
from common.events import (
    RequestDeclined,
    RoundEnded,
    SiteRejected,
    read_run_journal,
    read_site_journal,
    select_events,
)
from common.privacy.noise import os_entropy
from common.yaml import load
from server.superlink.daemon import find_daemon_pid
from tests.server.deployment.federations import new_federation
from tests.server.deployment.test_deployment import connected_site, run_file, server
from tests.server.deployment.test_federation import ROOT
from tests.server.deployment.test_run_checks import WIDE

START = """
import pathlib, sys
from server.deployment.federation import open_federation
from server.superlink.operate import ensure_daemon
ensure_daemon(open_federation(pathlib.Path(sys.argv[1])))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_reply_above_the_coordinators_bound_ends_in_one_sentence_and_one_charge(tmp_path: Path) -> None:
    """The bound was lowered behind the run's check, as where a running coordinator was not restarted."""
    federation = new_federation(tmp_path / "fed", max_upload_mib=1)
    subprocess.run([sys.executable, "-c", START, str(federation.folder)], cwd=ROOT, timeout=120, check=True)
    try:
        settings = federation.folder / "federation.yaml"
        settings.write_text(settings.read_text().replace("max_upload_mib: 1 ", "max_upload_mib: 64 "))
        cohort = {"min_sites": 1, "timeout_s": 60, "join_timeout_s": 90}
        run = run_file(tmp_path, tasks=WIDE, rounds=2, cohort=cohort)
        with connected_site(federation, tmp_path, "north", reply_every_s=0.05):
            done = server("start", federation.folder, run, timeout=300)
        assert done.returncode == 1, done.stderr
        assert "declined: too_large (its reply is larger than an upload may be; raise max_upload_mib" in done.stderr
        (folder,) = federation.runs.iterdir()
        events = read_run_journal(folder / "journal.jsonl")
        rejected = [event for event in select_events(events, SiteRejected) if event.stage == "train"]
        assert {event.reason for event in rejected} == {"declined: too_large"}
        assert all(event.seconds < 20.0 for event in select_events(events, RoundEnded))
        declined = select_events(read_site_journal(tmp_path / "north" / "state" / JOURNAL), RequestDeclined)
        # A site that is asked again before its answer came declines once more, for nothing.
        assert {event.reason for event in declined} == {"too_large"} and len(declined) >= len(rejected)
        assert "its staff raises max_upload_mib in federation.yaml" in declined[0].detail
        # One round was paid before the site knew; none after it.
        config = load(SiteConfig, tmp_path / "north" / "site.yaml")
        assert len(Site(config, os_entropy).ledger().charges()) == 1
        assert "Traceback" not in (tmp_path / "north.log").read_text()
    finally:
        server("stop", federation.folder)
        assert find_daemon_pid(federation) is None
