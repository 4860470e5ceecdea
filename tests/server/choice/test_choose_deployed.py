"""A choice with real processes: one site declines, one is killed in its vote, and so is the coordinator."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from common.events import SiteRejected, select_events
from server.choice.outcome import read_choice
from tests.deployment import Deployment, DrillRun, make_deployment, wait_until

pytestmark = pytest.mark.slow

AGE = {"name": "age", "range": [0, 100], "missing": 50}
CANDIDATES = {
    # The outcome of the drill's records is their sex.
    "age-alone": {"kind": "identity", "columns": [AGE]},
    "sex-too": {
        "kind": "identity",
        "columns": [AGE, {"name": "sex", "levels": ["0", "1"], "missing": "0"}],
        "licence": "CC0-1.0",
    },
}


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Deployment]:
    deployment = make_deployment(tmp_path)
    # Epsilon 6 is more than gamma has.
    site = deployment.sites["gamma"].file
    site.write_text(site.read_text().replace("epsilon: 9000.0", "epsilon: 2.0"))
    try:
        deployment.start_coordinator()
        deployment.start_sites()
        yield deployment
    finally:
        deployment.end()


def choose(made: Deployment) -> DrillRun:
    file = made.fed / "candidates.yaml"
    file.write_text(yaml.safe_dump({"candidates": CANDIDATES}, sort_keys=False))
    log = made.folder / "logs" / "choose.log"
    options = ("--backbones", file, "--epsilon", "6", "--task", "outcome", "--set", "cohort.join_timeout_s=90")
    command = ("coordinator", "choose", made.fed, made.run_file, *options)
    return DrillRun(made.spawn(*command, log=log), log)


def list_votes(made: Deployment, name: str) -> list[dict[str, object]]:
    """Releases of a site as `site log` shows them."""
    page = json.loads(made.command("site", "log", made.sites[name].file, "--json").stdout)
    releases: list[dict[str, object]] = page["releases"]
    return releases


def test_sites_vote_once_whoever_is_killed(made: Deployment) -> None:
    run = choose(made)
    beta, daemon = made.sites["beta"], made.find_daemon()
    assert beta.process is not None and daemon is not None
    # The request is there, and its vote has not left yet, or the coordinator loses it.
    assert wait_until(lambda: beta.read_log().count("asked: vote"), 120), run.read_log()
    os.killpg(beta.process.pid, signal.SIGKILL)
    made.stop_site("beta", signal.SIGKILL)
    os.kill(daemon, signal.SIGKILL)
    assert wait_until(lambda: made.find_run_process() is None, 60)
    assert run.wait(60) == 1 and "the coordinator ended while the run was running" in run.last_line
    made.start_site("beta")
    made.start_coordinator()  # It goes on with what was under way.
    (folder,) = made.list_run_folders()
    assert wait_until((folder / "summary.json").exists, 120), made.events()

    choice = read_choice(folder)
    assert choice.chosen == "sex-too" and set(choice.site_votes) == {"alpha", "beta"}
    assert [row.name for row in choice.rows] == list(CANDIDATES)
    declined = {each.site: each.reason for each in select_events(made.events(), SiteRejected) if each.stage == "join"}
    assert declined["gamma"] == "declined: budget"
    for name in ("alpha", "beta"):
        (release,) = list_votes(made, name)
        assert release["mechanism"]["kind"] == "exponential"  # type: ignore[index]
        spent = json.loads(made.command("site", "budget", made.sites[name].file, "--json").stdout)
        assert spent["spent_epsilon"] == 6.0 and not spent["earmarks"]
    assert list_votes(made, "gamma") == []
