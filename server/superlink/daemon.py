"""The coordinator's standing process: Flower's SuperLink behind two listeners, and the process that starts runs.

`python -m server link DIR` is this process in the foreground (for systemd); `start` launches it in the background. It
owns the folder's lock for as long as it lives, and everything it starts ends with it.

Invariant: the network is listened to only after the registry was made true in the engine, so that a site that was
removed while nothing ran is not known for a moment.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from common.events import FileJournal
from common.process.health import Health
from common.types import BadInput, RunFailed
from server.deployment.certificates import check_server
from server.deployment.federation import Federation
from server.superlink.admission import create_public_filter
from server.superlink.request_filter import LoopbackFilter
from server.superlink.superlink import build_environment, create_superlink, start_superexec

if TYPE_CHECKING:
    import socket

    from server.superlink.control import Control

_WATCH_S = 1.0


@contextmanager
def hold_lock(federation: Federation) -> Iterator[None]:
    """Hold the folder's lock, with this process's id in it.

    Raises:
        BadInput: another process holds it.
    """
    with (federation.state / "link.lock").open("a+") as lock:
        if not _try_lock(lock):
            raise BadInput(f"{federation.folder}: this coordinator is running already")
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _try_lock(lock: TextIO) -> bool:
    # `owner` holds the lock for a moment in order to ask: that is no running coordinator.
    for _ in range(10):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(0.05)
        else:
            return True
    return False


def find_daemon_pid(federation: Federation) -> int | None:
    """Process id of the running link; None where none runs, whatever a crashed one left behind."""
    path = federation.state / "link.lock"
    if not path.exists():
        return None
    with path.open("r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            text = lock.read().strip()
            return int(text) if text.isdecimal() else None
    return None


def run_daemon(federation: Federation) -> None:
    """Serve until a signal asks to stop.

    Raises:
        BadInput: a port is taken, a certificate is expired, or another link runs.
        RunFailed: a part of the coordinator ended by itself.
    """
    config = federation.config
    os.umask(0o077)
    # A connection without a handshake is counted by nobody yet: the usual 1024 files would be too few.
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    with hold_lock(federation):
        check_server(federation.tls, config.hosts())
        from server.superlink.listeners import bind_socket  # uvicorn and the engine: only this process pays for them.

        sockets = (
            bind_socket(config.bind.host, config.bind.port, "bind"),
            bind_socket("127.0.0.1", config.control_port, "control_port"),
        )
        health = Health(config.health_port)
        os.environ.update(build_environment(federation))
        try:
            asyncio.run(_serve(federation, sockets, health))
        finally:
            health.stop()
            for each in sockets:
                each.close()


async def _serve(federation: Federation, sockets: tuple[socket.socket, socket.socket], health: Health) -> None:
    from server.superlink.control import Control
    from server.superlink.listeners import create_loopback_listener, create_public_listener, serve
    from server.superlink.node_ids import synchronise_nodes
    from server.superlink.retry import RetryingApp

    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    engine = create_superlink(federation)
    async with engine.router.lifespan_context(engine):
        loopback = create_loopback_listener(
            LoopbackFilter(RetryingApp(engine), secret=federation.control_secret(), port=federation.config.control_port)
        )
        gate = create_public_filter(engine, federation)
        public = create_public_listener(
            gate,
            tls=federation.tls,
            max_connections=federation.config.max_connections,
            idle_s=federation.config.idle_timeout_s,
        )
        tasks = [await serve(loopback, sockets[1])]
        executor = start_superexec(federation)
        try:
            with Control(federation) as control:
                await asyncio.to_thread(synchronise_nodes, control, federation)
                await asyncio.to_thread(_stop_orphaned_runs, control)
            tasks.append(await serve(public, sockets[0]))
            journal = FileJournal(federation.state / "link.jsonl")
            journal.write("link_started", pid=os.getpid(), bind=str(federation.config.bind))
            print(f"listening on {federation.config.bind} for {federation.config.address}", flush=True)  # noqa: T201
            await _watch(federation, public.reload_certificate, executor, stopping, health)
            journal.write("link_stopped")
        finally:
            health.serving(False)
            executor.terminate()
            with suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(executor.wait, 5.0)
            public.should_exit = loopback.should_exit = True
            await asyncio.gather(*tasks)


def _stop_orphaned_runs(control: Control) -> None:
    """Runs whose process died with an earlier link: the engine would believe in them until their heartbeat lapses."""
    for run in control.list_runs():
        if not run.finished:
            control.stop_run(run.run_id)


async def _watch(
    federation: Federation,
    reload_certificate: Callable[[Path], None],
    executor: subprocess.Popen[bytes],
    stopping: asyncio.Event,
    health: Health,
) -> None:
    """Until asked to stop: take renewed certificates, say when they expired, and end when a part has ended."""
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
