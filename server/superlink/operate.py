"""Starts the daemon in the background, reads its status, and stops it, from a second terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from common.events import RunStarted, SiteJoined, read_run_journal, select_events
from common.files import check_room
from common.process.health import is_serving
from common.process.lines import read_error
from common.types import BadInput, RunFailed
from server.deployment.admitted_sites import load_admitted_sites
from server.deployment.certificates import check_server, read_validity
from server.deployment.federation import ROOM_BYTES, Federation
from server.reports.live.progress import RunProgress
from server.reports.status import CertificateStatus, ConnectionStatus, DaemonStatus, FederationStatus, RunStatus
from server.reports.summary import count_missed_rounds, select_rounds
from server.superlink.control import Control, DaemonUnreachable
from server.superlink.daemon import find_daemon_pid
from server.superlink.queue import describe_run, find_shown_run
from server.superlink.superlink import build_environment

_START_S = 60.0
_STOP_S = 20.0


def ensure_daemon(federation: Federation) -> bool:
    """Starts the daemon in the background where it does not run yet; returns whether it was started.

    Raises:
        BadInput: it cannot start, with its own reason.
        RunFailed: it did not come up in time.
        OSError: the disk is nearly full.
    """
    if find_daemon_pid(federation) is not None:
        return False
    check_server(federation.tls, federation.config.hosts())
    check_room(federation.state, ROOM_BYTES)
    if federation.log.exists():
        federation.log.replace(federation.log.with_suffix(".log.1"))
    with federation.log.open("wb") as log:
        federation.log.chmod(0o600)
        process = subprocess.Popen(
            [sys.executable, "-m", "server", "serve", str(federation.folder)],
            cwd=Path(__file__).resolve().parents[2],
            env=build_environment(federation),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in this terminal is not for it.
        )
    # Flower's processes take a daemon that was killed and not waited for to be alive.
    threading.Thread(target=process.wait, daemon=True).start()
    until = time.monotonic() + _START_S
    while is_serving(federation.config.health_port, timeout_s=1.0) is not True:
        if process.poll() is not None:
            raise BadInput(_find_last_error(federation.log) or f"the daemon ended at once; see {federation.log}")
        if time.monotonic() > until:
            process.terminate()
            raise RunFailed(f"the daemon did not start within {_START_S:g} s; see {federation.log}")
        time.sleep(0.1)
    return True


def stop_daemon(federation: Federation) -> bool:
    """Ends the daemon and everything it started; returns whether one ran.

    Raises:
        RunFailed: it does not end.
    """
    process = find_daemon_pid(federation)
    if process is None:
        return False
    os.kill(process, signal.SIGTERM)
    until = time.monotonic() + _STOP_S
    while find_daemon_pid(federation) is not None:
        if time.monotonic() > until:
            raise RunFailed(f"the daemon (process {process}) did not end within {_STOP_S:g} s")
        time.sleep(0.1)
    return True


def status(federation: Federation) -> FederationStatus:
    """Returns the state of the federation (docs/deploy.md describes its JSON form)."""
    certificate = read_validity(federation.tls / "server.crt")
    process = find_daemon_pid(federation)
    found = FederationStatus(
        federation=federation.config.name,
        address=str(federation.config.address),
        page=f"http://127.0.0.1:{federation.config.health_port}/",
        daemon=DaemonStatus(running=process is not None, pid=process),
        certificate=CertificateStatus(valid_until=certificate.until.isoformat(), days_left=certificate.days_left),
        sites={site: ConnectionStatus() for site in sorted(load_admitted_sites(federation))},
        run=_describe_shown_run(federation),
    )
    return found if process is None else _ask_daemon(federation, found)


def _ask_daemon(federation: Federation, found: FederationStatus) -> FederationStatus:
    """Returns the state with what only the running daemon knows: its health, connections, and the run under way."""
    healthy = is_serving(federation.config.health_port) is True
    sites, run = {}, found.run
    try:
        with Control(federation) as control:
            nodes = {node.key: node for node in control.list_nodes()}
            for site, entry in load_admitted_sites(federation).items():
                node = nodes.get(entry.pem())
                connected = node is not None and node.status == "online"
                sites[site] = ConnectionStatus(connected=connected, since=(node.since or None) if node else None)
            busy = control.find_current_run()
        if run is not None:
            under_way = busy is not None and Path(busy.folder).name == run.id
            run = run.model_copy(update={"under_way": under_way})
    except DaemonUnreachable:
        healthy = False
    daemon = found.daemon.model_copy(update={"healthy": healthy})
    return found.model_copy(update={"daemon": daemon, "sites": dict(found.sites) | sites, "run": run})


def _describe_shown_run(federation: Federation) -> RunStatus | None:
    folder = find_shown_run(federation)
    if folder is None:
        return None
    run = describe_run(folder)
    events = read_run_journal(folder / "journal.jsonl")
    started = select_events(events, RunStarted)
    done = select_rounds(events)
    replies = {event.site: 0 for event in select_events(events, SiteJoined)}
    for event in done.values():
        for site in event.sites:
            replies[site] = replies.get(site, 0) + 1
    tasks = started[-1].tasks if started else ()
    unchanged = {name: sum(name not in event.updated for event in done.values()) for name in tasks}
    progress = RunProgress()
    if run.state == "running":
        for each in events:
            progress.add(each)
    return RunStatus(
        phase=progress.phase if run.state == "running" else "",
        seconds_per_round=progress.measure_pace(),
        seconds_left=progress.estimate_seconds_left(),
        id=run.id,
        state=run.state,
        round=run.round,
        rounds=run.rounds,
        replies=replies,
        missed=count_missed_rounds(events),
        tasks_missed={name: count for name, count in unchanged.items() if count},
    )


def _find_last_error(log: Path) -> str | None:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [error for line in lines if (error := read_error(line)) is not None]
    return errors[-1] if errors else None
