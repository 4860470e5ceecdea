"""Steps and checks that several rows share."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable

from common.events import RunEnded, select_events
from tests.bad_proxy import Mode
from tests.deployment import Deployment, DrillRun, wait_until
from tests.federation import ROOT
from tests.invariants import (
    Watcher,
    find_uncharged,
)

Row = Callable[[Deployment], str]
"""Does one thing; returns what happened. Raises AssertionError where something else did."""

ROWS: dict[str, Row] = {}

LONG = 60
"""Number of rounds in which a site that was killed surely comes back: it counts as connected for a minute."""


def row(function: Row) -> Row:
    """Adds a row; its docstring names the event."""
    ROWS[function.__name__] = function
    return function


def expect_end(run: DrillRun, seconds: float = 400) -> str:
    """Returns that a run completed; fails where it did not."""
    code = run.wait(seconds)
    assert code == 0, f"expected the run to end, it ended with {code}: {run.last_line}"
    return f"run completed{describe_pauses(run)}"


def expect_end_or_resume(made: Deployment, run: DrillRun, seconds: float = 400) -> str:
    """Returns that a run completed, at once or after `resume`."""
    return f"run completed{describe_pauses(run)}" if run.wait(seconds) == 0 else expect_resume(made, run)


def expect_resume(made: Deployment, run: DrillRun) -> str:
    """Returns the sentence with which a run was interrupted; it goes on by itself, or `resume` completes it."""
    code = run.wait(300)
    if code == 0:
        return f"the run went on by itself and completed{describe_pauses(run)}"
    said = run.last_line
    assert code == 1, f"expected exit code 1, got {code}: {said}"
    assert said.startswith("error: "), said
    if made.find_daemon() is None:
        made.start_coordinator()
    if wait_until(lambda: made.find_run_process() is not None or _has_ended(made), 40):
        assert wait_until(lambda: _has_ended(made), 400), "the run went on and did not end"
        return f"{said.removeprefix('error: ')!r}; it went on by itself and completed"
    again = made.resume()
    assert again.wait(400) == 0, again.last_line
    return f"{said.removeprefix('error: ')!r}; resumed and completed"


def _has_ended(made: Deployment) -> bool:
    return bool(select_events(made.events(), RunEnded))


def describe_pauses(run: DrillRun) -> str:
    """The longest round, where one took long."""
    seconds = [float(found) for found in re.findall(r"round \d+ of .*; ([\d.]+) s$", run.read_log(), re.MULTILINE)]
    return f", longest round {max(seconds):.0f} s" if seconds else ""


def kill_site(made: Deployment, name: str) -> None:
    """Kills a site's process."""
    process = made.sites[name].process
    assert process is not None
    process.kill()
    process.wait(timeout=10)


def kill_daemon(made: Deployment) -> None:
    """Kills the coordinator's daemon."""
    process = made.find_daemon()
    assert process is not None
    os.kill(process, signal.SIGKILL)
    assert wait_until(lambda: process not in made.list_processes(), 10)


def expect_all_running(made: Deployment) -> None:
    """Fails where a site has ended."""
    ended = {name: site.last_line for name, site in made.sites.items() if not site.is_running()}
    assert not ended, f"sites ended: {ended}"


def find_sentence(log: str, *words: str) -> str:
    """The newest line of a log with one of some words, without its time."""
    lines = [line for line in log.splitlines() if any(word in line for word in words)]
    return lines[-1][10:250] if lines else "nothing"


def settle(made: Deployment) -> None:
    """Brings a deployment back to where a row begins: clean proxies, all sites running, no run under way."""
    made.root = ROOT
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
    """Returns the invariants that a deployment breaks after a row; they are the same for all rows."""
    return [*watcher.find_tracebacks(), *find_uncharged(made), *watcher.find_lost_heads()]
