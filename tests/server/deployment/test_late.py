"""A site that starts after the first round: real processes over TLS, and what it paid, by its own command."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import dp_accounting
import pytest
from dp_accounting import pld

from common.events import (
    RoundEnded,
    RunEnded,
    RunEvent,
    RunPrepared,
    SiteJoined,
    read_run_journal,
    read_site_journal,
    select_events,
)
from server.deployment.federation import Federation
from server.superlink.daemon import find_daemon_pid
from tests.federation import client, environment, process
from tests.server.deployment.federations import new_federation
from tests.server.deployment.test_deployment import connected_site, run_file, server

ROUNDS, STEPS, TARGET, DELTA = 6, 2, 3.0, 1e-5


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that stands still meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    made = new_federation(tmp_path / "fed")
    yield made
    server("stop", made.folder)
    assert find_daemon_pid(made) is None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_site_that_starts_after_the_first_round_is_used_and_pays_for_the_rest(
    federation: Federation, tmp_path: Path
) -> None:
    def events() -> list[RunEvent]:
        return [event for path in federation.runs.glob("*/journal.jsonl") for event in read_run_journal(path)]

    run = run_file(
        tmp_path,
        rounds=ROUNDS,
        cohort={"min_sites": 2, "timeout_s": 120, "join_timeout_s": 90},
        privacy={"unit": "example", "delta": DELTA, "target_epsilon": TARGET},
    )
    command = [sys.executable, "-m", "server", "start", str(federation.folder), str(run)]
    with (
        connected_site(federation, tmp_path, "east", reply_every_s=1.0),
        connected_site(federation, tmp_path, "north", reply_every_s=1.0) as north,
        process(command, tmp_path / "start.log", environment()) as start,
    ):
        wait_until(lambda: bool(select_events(events(), RoundEnded)), "the first round")
        # The round that waits for north has its other answer: the newcomer has all the time that it needs.
        with stopped(north.pid), connected_site(federation, tmp_path, "west", reply_every_s=0.05):
            own = tmp_path / "west" / "state" / "site.jsonl"
            wait_until(lambda: bool(select_events(read_site_journal(own), RunPrepared)), "west prepared")
            os.kill(north.pid, signal.SIGCONT)
            assert start.wait(200) == 0, (tmp_path / "start.log").read_text()
    rounds = select_events(events(), RoundEnded)
    [joined] = [event for event in select_events(events(), SiteJoined) if event.site == "west"]
    first = joined.first_round
    assert 2 < first < ROUNDS
    assert [event.round for event in rounds if "west" in event.sites] == list(range(first, ROUNDS + 1))
    assert all({"east", "north"} <= event.sites.keys() for event in rounds)
    [ended] = select_events(events(), RunEnded)
    assert (ended.num_received, ended.num_sites) == (3, 3)
    assert f"west joined with colour, size from round {first} of {ROUNDS}" in (tmp_path / "start.log").read_text()
    said = re.search(rf"joined run \S+ from round (\d+) of {ROUNDS}", (tmp_path / "west.log").read_text())
    assert said is not None
    assert 2 <= int(said[1]) <= first

    account = json.loads(client("budget", str(tmp_path / "west" / "site.yaml"), "--json").stdout)
    [paid] = account["runs"]
    assert (paid["rounds"], paid["open"], account["earmarks"]) == (ROUNDS - first + 1, 0, [])
    plan = rounds[-1].sites["west"].plan
    accountant = pld.PLDAccountant()
    accountant.compose(dp_accounting.GaussianDpEvent(plan.noise_multiplier), STEPS * (ROUNDS - first + 1))
    epsilon = accountant.get_epsilon(DELTA)
    assert paid["epsilon"] == pytest.approx(epsilon, rel=0.01)
    assert paid["epsilon"] <= TARGET * 1.001
    assert rounds[-1].sites["east"].plan.noise_multiplier > plan.noise_multiplier
