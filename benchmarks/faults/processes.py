"""Processes that are killed, stopped, or leave."""

from __future__ import annotations

import os
import signal
import time

from benchmarks.faults.parts import (
    LONG,
    expect_all_running,
    expect_end,
    expect_end_or_resume,
    expect_resume,
    kill_daemon,
    kill_site,
    row,
)
from tests.deployment import Deployment, wait_until


@row
def site_processes(made: Deployment) -> str:
    """kill -9 of a site, back after 3 s; of another's process that computes; SIGSTOP of the third for 10 s"""
    run = made.start_run(rounds=7)
    made.wait_for_round(1, run=run)
    kill_site(made, "beta")
    time.sleep(3)
    made.start_site("beta")
    made.wait_for_round(3, run=run)
    alpha = made.sites["alpha"]
    (worker,) = alpha.find_processes()[1:]
    # Held until it has a request: it computes for some hundredths of a second only.
    os.kill(worker, signal.SIGSTOP)
    asked = alpha.read_log().count("asked: train")
    assert wait_until(lambda: alpha.read_log().count("asked: train") > asked, 60), "the site was not asked again"
    os.kill(worker, signal.SIGKILL)
    made.wait_for_round(5, run=run)
    stopped = made.sites["gamma"].find_processes()
    for process in stopped:
        os.kill(process, signal.SIGSTOP)
    time.sleep(10)
    for process in stopped:
        os.kill(process, signal.SIGCONT)
    said = expect_end(run)
    expect_all_running(made)
    assert "the process that answers ended with -9" in alpha.read_log()
    return said


@row
def run_killed(made: Deployment) -> str:
    """kill -9 of the coordinator's process that works on the run"""
    run = made.start_run(rounds=4)
    made.wait_for_round(2, run=run)
    process = made.find_run_process()
    assert process is not None
    os.kill(process, signal.SIGKILL)
    return expect_resume(made, run)


@row
def two_killed(made: Deployment) -> str:
    """kill -9 of the coordinator's daemon and of a site at the same moment"""
    run = made.start_run(rounds=4)
    made.wait_for_round(2, run=run)
    kill_daemon(made)
    kill_site(made, "alpha")
    made.start_site("alpha")
    return expect_resume(made, run)


@row
def site_stopped_long(made: Deployment) -> str:
    """SIGSTOP of a site for 130 s, then SIGCONT"""
    return _stop_site(made, 130)


@row
def late_and_gone(made: Deployment) -> str:
    """a site starts after the roll call, another leaves in the middle and does not come back"""
    made.stop_site("gamma")
    run = made.start_run(rounds=LONG, cohort__join_timeout_s=20)
    made.wait_for_round(1, run=run)
    made.start_site("gamma")
    assert wait_until(lambda: any("gamma" in event.sites for event in made.rounds()), 120), "it is never used"
    assert made.stop_site("beta") == 0
    assert made.sites["beta"].last_line.endswith("left")
    said = expect_end(run)
    used = {name: [event.round for event in made.rounds() if name in event.sites] for name in ("beta", "gamma")}
    return f"{said}; rounds with them: {used}"


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
