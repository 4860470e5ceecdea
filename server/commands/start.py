"""`start`: queues a run and watches it."""

from __future__ import annotations

from common.process.console import reported_errors
from server.commands.parts.daemon import follow_run, start_daemon, warn
from server.commands.parts.options import Anyway, Folder, RunFile, Set, TrackerDir, TrackerKind
from server.deployment.federation import open_federation
from server.deployment.log import write_command
from server.deployment.run_checks import check_run
from server.reports.trackers import open_trackers
from server.reports.trackers.parts.follow import tracked
from server.superlink.queue import submit_run


def start(
    folder: Folder,
    run: RunFile,
    set_: Set = None,
    anyway: Anyway = False,
    tracker: TrackerKind = None,
    tracker_dir: TrackerDir = None,
) -> None:
    """Queues a run, starts the coordinator where it does not run yet, and shows progress and result.

    Exit code 0: every task reached its quorum; 1: the run failed; 2: bad input. Ctrl-C ends
    the display, and its trackers, and the run continues. A run that cannot be better than guessing with the sites
    that joined ends before anything is charged.

    Example: headwater coordinator start fed fed/run.yaml --set rounds=3
    """
    with reported_errors():
        trackers = open_trackers(tracker or [])
        federation = open_federation(folder)
        checked, prepared = check_run(federation, run, set_ or [])
        start_daemon(federation)
        path = submit_run(federation, checked, prepared, anyway=anyway)
        write_command(federation, "start", f"run {path.name}")
        with tracked(path, trackers, tracker_dir, show=warn):
            follow_run(federation, path)
