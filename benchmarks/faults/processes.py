"""Processes that are killed, stopped, or leave."""

from __future__ import annotations

import os
import signal
import time

from benchmarks.faults.parts import (
    expect_end,
    expect_end_or_resume,
    expect_resume,
    kill_daemon,
    kill_site,
    row,
)
from tests.deployment import Deployment


@row
def site_killed(made: Deployment) -> str:
    """kill -9 of a site between rounds; its service starts it again after 3 s"""
    run = made.start_run(rounds=4)
    made.wait_for_round(2, run=run)
    kill_site(made, "beta")
    time.sleep(3)
    made.start_site("beta")
    return expect_end(run)


@row
def worker_killed(made: Deployment) -> str:
    """kill -9 of the process that computes at a site"""
    run = made.start_run(rounds=4)
    made.wait_for_round(2, run=run)
    _, *workers = made.sites["beta"].find_processes()
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    return expect_end(run)


@row
def daemon_killed(made: Deployment) -> str:
    """kill -9 of the coordinator's daemon"""
    run = made.start_run(rounds=4)
    made.wait_for_round(2, run=run)
    kill_daemon(made)
    return expect_resume(made, run)


@row
def run_killed(made: Deployment) -> str:
    """kill -9 of the coordinator's process that works on the run"""
    run = made.start_run(rounds=4)
    made.wait_for_round(2, run=run)
    process = made.find_run_process()
    assert process is not None
    os.kill(process, signal.SIGKILL)
    said = expect_resume(made, run)
    assert "the process that worked on it died" in said
    return said


@row
def two_killed(made: Deployment) -> str:
    """kill -9 of the daemon and of a site at the same moment"""
    run = made.start_run(rounds=4)
    made.wait_for_round(2, run=run)
    kill_daemon(made)
    kill_site(made, "alpha")
    made.start_site("alpha")
    return expect_resume(made, run)


@row
def site_stopped(made: Deployment) -> str:
    """SIGSTOP of a site for 15 s, then SIGCONT"""
    return _stop_site(made, 15)


@row
def site_stopped_long(made: Deployment) -> str:
    """SIGSTOP of a site for 130 s, then SIGCONT"""
    return _stop_site(made, 130)


@row
def site_leaves(made: Deployment) -> str:
    """SIGTERM of a site in the middle of a run; it does not come back"""
    run = made.start_run(rounds=4)
    made.wait_for_round(2, run=run)
    assert made.stop_site("gamma") == 0
    assert "left" in made.sites["gamma"].read_log().splitlines()[-1]
    return expect_end(run)


@row
def site_late(made: Deployment) -> str:
    """a site that starts after the roll call"""
    made.stop_site("gamma")
    run = made.start_run(rounds=12, cohort__join_timeout_s=20)
    made.wait_for_round(2, run=run)
    made.start_site("gamma")
    said = expect_end(run)
    used = [event.round for event in made.rounds() if "gamma" in event.sites]
    return f"{said}; rounds with it: {used or 'none'}"


@row
def all_sites_away(made: Deployment) -> str:
    """SIGTERM of all sites in the middle of a run; they come back after 20 s"""
    run = made.start_run(rounds=5)
    made.wait_for_round(2, run=run)
    for name in made.sites:
        made.stop_site(name)
    time.sleep(20)
    made.start_sites()
    said = expect_end_or_resume(made, run)
    empty = [event.round for event in made.rounds() if not event.sites]
    assert not empty, f"rounds without a site: {empty}"
    return said


def _stop_site(made: Deployment, seconds: float) -> str:
    run = made.start_run(rounds=4)
    made.wait_for_round(2, run=run)
    processes = made.sites["beta"].find_processes()
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    time.sleep(seconds)
    for process in processes:
        os.kill(process, signal.SIGCONT)
    said = expect_end_or_resume(made, run)
    assert made.sites["beta"].is_running(), made.sites["beta"].read_log()[-300:]
    return said
