"""A choice with real processes: one site declines, one is killed and comes back, the coordinator is killed too."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from common.events import VotesCounted, select_events
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


def choose(made: Deployment, *words: object) -> DrillRun:
    file = made.fed / "candidates.yaml"
    file.write_text(yaml.safe_dump({"candidates": CANDIDATES}, sort_keys=False))
    log, out = made.folder / "logs" / "choose.log", ["--json", *words]
    options = ("--backbones", file, "--epsilon", "6", "--task", "outcome", "--set", "cohort.join_timeout_s=90")
    command = ("coordinator", "choose", made.fed, made.run_file, *options, *out)
    return DrillRun(made.spawn(*command, log=log), log)


def list_votes(made: Deployment, name: str) -> list[dict[str, object]]:
    """Releases of a site as `site log` shows them."""
    page = json.loads(made.command("site", "log", made.sites[name].file, "--json").stdout)
    releases: list[dict[str, object]] = page["releases"]
    return releases


def test_sites_vote_once_whoever_is_killed(made: Deployment) -> None:
    run = choose(made)
    beta = made.sites["beta"]
    # It has the request, and no vote has left, or one that the coordinator does not have.
    assert wait_until(lambda: beta.read_log().count("asked: vote"), 120), run.read_log()
    os.killpg(beta.process.pid, signal.SIGKILL)  # type: ignore[union-attr]
    made.stop_site("beta", signal.SIGKILL)
    made.start_site("beta")
    made.wait_for_joined("beta")
    assert run.wait(120) == 0, run.read_log()
    text = run.read_log()
    choice = json.loads(text[text.index("{\n") : text.rindex("}") + 1])
    assert choice["chosen"] == "sex-too" and set(choice["site_votes"]) == {"alpha", "beta"}
    assert "gamma rejected at join: declined: budget" in text
    (folder,) = made.list_run_folders()
    assert json.loads((folder / "choice.json").read_text()) == choice
    for name in ("alpha", "beta"):
        (release,) = list_votes(made, name)
        assert release["mechanism"]["kind"] == "exponential"  # type: ignore[index]
        spent = json.loads(made.command("site", "budget", made.sites[name].file, "--json").stdout)
        assert spent["spent_epsilon"] == 6.0 and not spent["earmarks"]
    assert list_votes(made, "gamma") == []

    # The coordinator loses its result, and asks all the same again: from stored replies.
    before = select_events(made.events(), VotesCounted)[-1].votes
    (folder / "summary.json").unlink()
    again = made.resume(folder.name)
    assert again.wait(120) == 0, again.read_log()
    assert select_events(made.events(), VotesCounted)[-1].votes == before and "sex-too (chosen)" in again.read_log()
    assert [len(list_votes(made, name)) for name in ("alpha", "beta")] == [1, 1]
    assert list_votes(made, "alpha")[0]["resent"] == 1
