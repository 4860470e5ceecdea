"""Real sites that are killed or leave: a round goes on when they are back, and a run without its quorum is resumed."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from common.events import QuorumAwaited, RoundEnded, RunInterruption, SiteRejected, select_events
from server.reports.summary import count_missed_rounds, find_status
from tests.deployment import running_deployment, wait_until
from tests.invariants import read_charges

pytestmark = pytest.mark.slow

ASKED_S = 6.0
"""Bound on the seconds from a site's return to its next request, on a busy machine. Its answer takes its own time."""


def test_a_killed_site_is_asked_again_and_a_run_that_all_sites_left_is_resumed(tmp_path: Path) -> None:
    with running_deployment(tmp_path) as made:
        run = made.start_run(rounds=5, cohort__min_sites=3, cohort__patience_s=8)
        made.wait_for_round(2, run=run)
        # In the middle of a round: the site has its message, and no answer has left.
        os.killpg(made.sites["beta"].process.pid, signal.SIGKILL)  # type: ignore[union-attr]
        made.stop_site("beta", signal.SIGKILL)
        before = len(made.rounds())
        beta = made.sites["beta"]
        num_asked = beta.read_log().count("asked: train")
        made.start_site("beta")
        made.wait_for_joined("beta")
        back = time.monotonic()
        assert wait_until(lambda: beta.read_log().count("asked: train") > num_asked, 60)
        assert time.monotonic() - back < ASKED_S
        assert wait_until(lambda: len(made.rounds()) > before, 60)
        assert all(len(event.sites) == 3 for event in made.rounds())
        assert not [event for event in select_events(made.events(), SiteRejected) if event.stage == "train"]

        for name in made.sites:
            made.stop_site(name)
        assert run.wait(120) == 1
        assert "was interrupted: round" in run.read_log() and "alpha: not connected" in run.last_line
        assert f"`headwater coordinator resume {made.fed}" in run.last_line
        assert select_events(made.events(), QuorumAwaited) and select_events(made.events(), RunInterruption)
        state = json.loads(made.command("coordinator", "status", made.fed, "--json").stdout)["run"]["state"]
        assert state == "interrupted"

        made.start_sites()
        resumed = made.resume()
        assert resumed.wait(120) == 0, resumed.read_log()
        rounds = {event.round: event for event in select_events(made.events(), RoundEnded)}
        assert sorted(rounds) == list(range(1, 6))
        assert all(sorted(event.sites) == ["alpha", "beta", "gamma"] for event in rounds.values())
        run_json = json.loads(made.command("coordinator", "status", made.fed, "--json").stdout)["run"]
        assert (run_json["state"], run_json["missed"], run_json["tasks_missed"]) == ("completed", {}, {})
        charges = read_charges(made.sites["beta"].ledger)
        assert (find_status(made.events()), count_missed_rounds(made.events())) == ("completed", {})
        # A charge that the kill cut off may stand beside the one that was answered.
        assert len(charges) == 5 and sum(map(len, charges.values())) <= 6
