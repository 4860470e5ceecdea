"""The coordinator's daemon: Flower's SuperLink behind two listeners, and the process that starts runs.

`headwater coordinator serve DIR` is this process in the foreground (for systemd); `serve --background` and `start`
launch it in the background. It owns the folder's lock for as long as it lives, and everything it starts ends with it.

Invariant: the daemon listens to the network only after it has registered the admitted sites and removed all others in
the SuperLink, so that a site that was removed while nothing ran is never known.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from common.events import DaemonStarted, DaemonStopped, FileJournal, RunsRemoved
from common.files import lock_file
from common.process.health import Health
from common.process.lines import show_line
from common.process.pages import Pages
from common.types import BadInput, HeadwaterError, RunFailed
from server.deployment.certificates import check_server
from server.deployment.federation import Federation
from server.superlink.admission import create_public_filter
from server.superlink.queue import Queue, remove_old_runs
from server.superlink.request_filter import LoopbackFilter
from server.superlink.superlink import build_environment, check_database, create_superlink, start_superexec

if TYPE_CHECKING:
    import socket

    from server.superlink.control import Control

_LOCK = "link.lock"
_WATCH_S = 1.0
_CLEAN_S = 3600.0
"""Time between two looks for runs that are older than the federation keeps them."""


@contextmanager
def hold_daemon_lock(federation: Federation) -> Iterator[None]:
    """Holds the folder's lock, with this process's id in it.

    Raises:
        BadInput: another process holds it.
    """
    running = BadInput(f"{federation.folder}: this coordinator is running already")
    # A short wait, because `find_daemon_pid` holds the lock for a moment in order to ask.
    with lock_file(federation.state / _LOCK, timeout_s=0.5, held=running) as descriptor:
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield


def find_daemon_pid(federation: Federation) -> int | None:
    """Returns the daemon's process id; None where none runs, whatever a crashed one left behind."""
    path = federation.state / _LOCK
    if not path.exists():
        return None
    try:
        with lock_file(path, timeout_s=0.0):
            return None
    except TimeoutError:
        text = path.read_text(encoding="ascii").strip()
        return int(text) if text.isdecimal() else None


def run_daemon(federation: Federation, pages: Pages | None = None) -> None:
    """Serves until a signal asks to stop.

    Args:
        federation: the federation that is served.
        pages: pages that the health port serves, by path.

    Raises:
        BadInput: a port is taken, a certificate has expired, or another daemon runs.
        RunFailed: a part of the coordinator ended by itself.
    """
    config = federation.config
    os.umask(0o077)
    # A connection without a handshake is counted by nobody yet: the usual 1024 files would be too few.
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    with hold_daemon_lock(federation):
        check_server(federation.tls, config.hosts())
        check_database(federation)
        from server.superlink.listeners import bind_socket  # uvicorn and Flower: only this process pays for them.

        sockets = (
            bind_socket(config.bind.host, config.bind.port, "bind"),
            bind_socket("127.0.0.1", config.control_port, "control_port"),
        )
        health = Health(config.health_port, pages)
        os.environ.update(build_environment(federation))
        try:
            asyncio.run(_serve(federation, sockets, health))
        finally:
            health.stop()
            for each in sockets:
                each.close()


async def _serve(federation: Federation, sockets: tuple[socket.socket, socket.socket], health: Health) -> None:
    from server.superlink.control import Control
    from server.superlink.listeners import create_loopback_listener, create_public_listener, start_listener
    from server.superlink.node_ids import synchronise_nodes
    from server.superlink.retry import RetryingApp

    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    superlink = create_superlink(federation)
    public_filter = create_public_filter(superlink, federation)
    async with superlink.router.lifespan_context(superlink):
        loopback = create_loopback_listener(
            LoopbackFilter(
                RetryingApp(superlink, public_filter.uploads),
                secret=federation.read_control_secret(),
                port=federation.config.control_port,
            )
        )
        public = create_public_listener(
            public_filter,
            tls=federation.tls,
            max_connections=federation.config.max_connections,
            idle_s=federation.config.idle_timeout_s,
        )
        tasks = [await start_listener(loopback, sockets[1])]
        executor = start_superexec(federation)
        try:
            with Control(federation) as control:
                await asyncio.to_thread(synchronise_nodes, control, federation)
                await asyncio.to_thread(_stop_orphaned_runs, control)
            tasks.append(await start_listener(public, sockets[0]))
            journal = FileJournal(federation.state / "link.jsonl")
            journal.write(DaemonStarted(pid=os.getpid(), bind=str(federation.config.bind)))
            show_line(f"listening on {federation.config.bind} for {federation.config.address}", event="daemon_started")
            queue = asyncio.create_task(_run_queue(federation, journal))
            await _supervise(federation, public.reload_certificate, executor, stopping, health)
            queue.cancel()
            journal.write(DaemonStopped())
        finally:
            health.serving(False)
            executor.terminate()
            with suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(executor.wait, 5.0)
            public.should_exit = loopback.should_exit = True
            await asyncio.gather(*tasks)


def _stop_orphaned_runs(control: Control) -> None:
    """Stops runs whose process died with an earlier daemon: they count as running until their heartbeat lapses."""
    for run in control.list_runs():
        if not run.finished:
            control.stop_run(run.run_id)


async def _run_queue(federation: Federation, journal: FileJournal) -> None:
    """Starts the runs of the queue, one after the other, and removes those that are kept no longer."""
    from server.superlink.control import Control

    queue, said, clean_at, resumed = Queue(federation), "", 0.0, False
    loop = asyncio.get_running_loop()
    with Control(federation) as control:
        while True:
            try:
                if not resumed:
                    await asyncio.to_thread(queue.resume_newest)
                    resumed = True
                await asyncio.to_thread(queue.start_next, control)
                if federation.config.keep_runs_days is not None and loop.time() >= clean_at:
                    clean_at = loop.time() + _CLEAN_S
                    removed = await asyncio.to_thread(remove_old_runs, federation, federation.config.keep_runs_days)
                    if removed:
                        journal.write(RunsRemoved(runs=tuple(removed), days=federation.config.keep_runs_days))
                said = ""
            except (HeadwaterError, OSError) as error:
                if str(error) != said:
                    said = str(error)
                    show_line(f"the queue waits: {said}", event="queue_waits")
            await asyncio.sleep(_WATCH_S)


async def _supervise(
    federation: Federation,
    reload_certificate: Callable[[Path], None],
    executor: subprocess.Popen[bytes],
    stopping: asyncio.Event,
    health: Health,
) -> None:
    """Loads renewed certificates and keeps the health service true until asked to stop.

    Raises:
        RunFailed: the process that starts runs ended by itself.
    """
    stamp = (federation.tls / "server.crt").stat().st_mtime_ns
    while not stopping.is_set():
        now = (federation.tls / "server.crt").stat().st_mtime_ns
        if now != stamp:
            reload_certificate(federation.tls)
            stamp = now
        try:
            check_server(federation.tls, federation.config.hosts())
            health.serving(True)
        except BadInput:
            health.serving(False)
        if executor.poll() is not None:
            raise RunFailed(f"the process that starts runs ended by itself (exit code {executor.returncode})")
        with suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), _WATCH_S)
