"""Everything that happens to a deployment in hospitals, done to three real sites and a real coordinator on loopback.

    python -m benchmarks.faults [--keep FOLDER] [ROW ...]

One federation serves all rows; each row does one thing to a run and looks at the end of it. After each: no traceback in
a log, every reply that left is charged, the heads of every run that ended replay from the replies that the sites keep.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.bad_proxy import Mode
from tests.deployment import Deployment, DrillRun, is_alive, make_deployment, wait_until
from tests.invariants import Watcher, find_leftovers, find_lost_heads, find_temporary_files, find_uncharged

Row = Callable[[Deployment], str]
"""Does one thing; returns what happened. Raises AssertionError where something else did."""

ROWS: dict[str, Row] = {}


def row(function: Row) -> Row:
    """Adds a row; its docstring names the event."""
    ROWS[function.__name__] = function
    return function


# --- processes -------------------------------------------------------------------------------------------------------


@row
def site_killed(made: Deployment) -> str:
    """kill -9 of a site between rounds; its service starts it again after 3 s"""
    run = made.start_run(rounds=6)
    made.wait_for_round(2, run=run)
    _kill_site(made, "beta")
    time.sleep(3)
    made.start_site("beta")
    return _ends_well(run)


@row
def worker_killed(made: Deployment) -> str:
    """kill -9 of the process that computes at a site"""
    run = made.start_run(rounds=6)
    made.wait_for_round(2, run=run)
    _, *workers = made.sites["beta"].find_processes()
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    return _ends_well(run)


@row
def daemon_killed(made: Deployment) -> str:
    """kill -9 of the coordinator's daemon"""
    run = made.start_run(rounds=6)
    made.wait_for_round(2, run=run)
    _kill_daemon(made)
    return _is_resumed(made, run)


@row
def run_killed(made: Deployment) -> str:
    """kill -9 of the coordinator's process that works on the run"""
    run = made.start_run(rounds=6)
    made.wait_for_round(2, run=run)
    process = made.find_run_process()
    assert process is not None
    os.kill(process, signal.SIGKILL)
    return _is_resumed(made, run)


@row
def two_killed(made: Deployment) -> str:
    """kill -9 of the daemon and of a site at the same moment"""
    run = made.start_run(rounds=6)
    made.wait_for_round(2, run=run)
    _kill_daemon(made)
    _kill_site(made, "alpha")
    made.start_site("alpha")
    return _is_resumed(made, run)


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
    run = made.start_run(rounds=6)
    made.wait_for_round(2, run=run)
    assert made.stop_site("gamma") == 0
    assert "left" in made.sites["gamma"].read_log().splitlines()[-1]
    return _ends_well(run)


@row
def site_late(made: Deployment) -> str:
    """a site that starts after the roll call"""
    made.stop_site("gamma")
    run = made.start_run(rounds=12, cohort__join_timeout_s=20)
    made.wait_for_round(2, run=run)
    made.start_site("gamma")
    said = _ends_well(run)
    used = [event.round for event in made.rounds() if "gamma" in event.sites]
    return f"{said}; rounds with it: {used or 'none'}"


@row
def all_sites_away(made: Deployment) -> str:
    """SIGTERM of all sites in the middle of a run; they come back after 20 s"""
    run = made.start_run(rounds=8)
    made.wait_for_round(2, run=run)
    for name in made.sites:
        made.stop_site(name)
    time.sleep(20)
    made.start_sites()
    said = _ends_or_resumes(made, run)
    empty = [event.round for event in made.rounds() if not event.sites]
    assert not empty, f"rounds without a site: {empty}"
    return said


# --- the network -----------------------------------------------------------------------------------------------------


@row
def cut_30(made: Deployment) -> str:
    """the network of all sites is cut for 30 s"""
    return _cut(made, 30)


@row
def cut_110(made: Deployment) -> str:
    """the network of all sites is cut for 110 s"""
    return _cut(made, 110)


@row
def cut_one_110(made: Deployment) -> str:
    """the network of one site is cut for 110 s"""
    return _cut(made, 110, ["beta"])


@row
def delayed(made: Deployment) -> str:
    """every chunk of bytes arrives 0.3 s later"""
    return _harm(made, Mode.DELAY, 1.0)


@row
def reordered(made: Deployment) -> str:
    """one chunk in 20 has its halves exchanged"""
    return _harm(made, Mode.REORDER, 0.05)


@row
def truncated(made: Deployment) -> str:
    """one chunk in 20 arrives by half, and the connection ends"""
    return _harm(made, Mode.TRUNCATE, 0.05)


@row
def flipped(made: Deployment) -> str:
    """one bit is wrong in one chunk of 20"""
    return _harm(made, Mode.FLIP, 0.05)


@row
def no_server(made: Deployment) -> str:
    """a proxy without a coordinator behind it, in plain text, for 15 s"""
    return _away(made, Mode.PLAIN)


@row
def refused(made: Deployment) -> str:
    """a balancer that closes every connection, for 15 s"""
    return _away(made, Mode.REFUSE)


# --- parts -----------------------------------------------------------------------------------------------------------


def _ends_well(run: DrillRun, seconds: float = 400) -> str:
    code = run.wait(seconds)
    assert code == 0, f"expected the run to end, it ended with {code}: {run.last_line}"
    return f"run completed{_describe_pauses(run)}"


def _ends_or_resumes(made: Deployment, run: DrillRun, seconds: float = 400) -> str:
    return f"run completed{_describe_pauses(run)}" if run.wait(seconds) == 0 else _is_resumed(made, run)


def _is_resumed(made: Deployment, run: DrillRun) -> str:
    code = run.wait(200)
    assert code == 1, f"expected exit code 1, got {code}: {run.last_line}"
    assert run.last_line.startswith("error: ") and "resume" in run.last_line, run.last_line
    again = made.resume()
    assert again.wait(400) == 0, again.last_line
    return f"{run.last_line.removeprefix('error: ')!r}; resumed and completed"


def _describe_pauses(run: DrillRun) -> str:
    """The longest round, where one took long."""
    seconds = [float(found) for found in re.findall(r"round \d+ of .*; ([\d.]+) s$", run.read_log(), re.MULTILINE)]
    return f", longest round {max(seconds):.0f} s" if seconds else ""


def _kill_site(made: Deployment, name: str) -> None:
    process = made.sites[name].process
    assert process is not None
    process.kill()
    process.wait(timeout=10)


def _kill_daemon(made: Deployment) -> None:
    process = made.find_daemon()
    assert process is not None
    os.kill(process, signal.SIGKILL)
    assert wait_until(lambda: not is_alive(process), 10)


def _stop_site(made: Deployment, seconds: float) -> str:
    run = made.start_run(rounds=6)
    made.wait_for_round(2, run=run)
    processes = made.sites["beta"].find_processes()
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    time.sleep(seconds)
    for process in processes:
        os.kill(process, signal.SIGCONT)
    said = _ends_or_resumes(made, run)
    assert made.sites["beta"].is_running(), made.sites["beta"].read_log()[-300:]
    return said


def _cut(made: Deployment, seconds: float, names: list[str] | None = None) -> str:
    run = made.start_run(rounds=6)
    made.wait_for_round(2, run=run)
    for name in names or made.sites:
        made.sites[name].proxy.cut_for(seconds)
    time.sleep(seconds)
    said = _ends_or_resumes(made, run)
    _all_running(made)
    return said


def _harm(made: Deployment, mode: Mode, rate: float) -> str:
    for site in made.sites.values():
        site.proxy.rate, site.proxy.delay_s, site.proxy.mode = rate, 0.3, mode
    before = sum(site.proxy.num_harmed for site in made.sites.values())
    run = made.start_run(rounds=6)
    said = _ends_or_resumes(made, run)
    harmed = sum(site.proxy.num_harmed for site in made.sites.values()) - before
    assert harmed
    _all_running(made)
    return f"{said}; {harmed} chunks harmed"


def _away(made: Deployment, mode: Mode) -> str:
    run = made.start_run(rounds=6)
    made.wait_for_round(2, run=run)
    for site in made.sites.values():
        site.proxy.mode = mode
        site.proxy.drop()
    time.sleep(15)
    for site in made.sites.values():
        site.proxy.mode = Mode.PASS
    said = _ends_or_resumes(made, run)
    _all_running(made)
    return said


def _all_running(made: Deployment) -> None:
    ended = {name: site.last_line for name, site in made.sites.items() if not site.is_running()}
    assert not ended, f"sites ended: {ended}"


# --- the driver ------------------------------------------------------------------------------------------------------


def settle(made: Deployment) -> None:
    """Brings a deployment back to where a row begins: clean proxies, all sites running, no run under way."""
    for site in made.sites.values():
        site.proxy.mode, site.proxy.rate = Mode.PASS, 1.0
    if made.find_daemon() is None:
        made.start_coordinator()
    made.command("coordinator", "stop", made.fed, "--run")
    for run in made.runs:
        if run.process.poll() is None:
            run.process.send_signal(signal.SIGINT)
            run.wait(60)
    made.start_sites()


def find_faults(made: Deployment, watcher: Watcher) -> list[str]:
    """What is wrong after a row, whatever the row was."""
    return [*watcher.find_tracebacks(), *find_uncharged(made), *find_lost_heads(made)]


def main() -> None:
    """Runs the rows that are named, or all."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--keep", type=Path, help="folder for the federation, which stays")
    arguments.add_argument("rows", nargs="*", help=", ".join(ROWS))
    chosen = arguments.parse_args()
    unknown = set(chosen.rows) - set(ROWS)
    if unknown:
        arguments.error(f"expected rows of {', '.join(ROWS)}; got {', '.join(sorted(unknown))}")
    folder = chosen.keep or Path(tempfile.mkdtemp(prefix="faults-"))
    made = make_deployment(folder)
    watcher, worst = Watcher(made), 0
    try:
        for name in chosen.rows or ROWS:
            settle(made)
            before = time.monotonic()
            try:
                said = ROWS[name](made)
            except (AssertionError, subprocess.TimeoutExpired) as error:
                said = f"FAULT: {str(error)[-600:]}"
            faults = [f"FAULT: {fault}" for fault in find_faults(made, watcher)]
            verdict = "; ".join([said, *faults])
            worst |= "FAULT" in verdict
            print(f"{name} ({ROWS[name].__doc__}): {verdict}  [{time.monotonic() - before:.0f} s]", flush=True)
    finally:
        made.end()
        for fault in [*find_leftovers(made), *find_temporary_files(made)]:
            worst = 1
            print(f"afterwards: FAULT: {fault}", flush=True)
        if chosen.keep is None:
            shutil.rmtree(folder)
    sys.exit(worst)


if __name__ == "__main__":
    main()
