"""`start`: joins the coordinator and answers its requests."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from client.commands.parts.options import Coordinator, SiteFile, locate_offers
from client.config import SiteConfig
from common.bundle import find_installation
from common.process.apart import run_apart
from common.process.console import reported_errors
from common.process.lines import Level, LogFormat, LogFormatOption, Show, show_line, use_log_format
from common.yaml import load

_POLL_S = 0.2


def start(
    site: SiteFile,
    patience: Annotated[
        float, typer.Option(help="Minutes to go on trying while the coordinator cannot be reached")
    ] = 1440.0,
    coordinator: Coordinator = None,
    grace: Annotated[float, typer.Option(help="Seconds an answer under way may still take after Ctrl-C")] = 60.0,
    log_format: LogFormatOption = LogFormat.TEXT,
) -> None:
    """Joins the coordinator and answers its requests until Ctrl-C; of several coordinators, each in its own process.

    Where the site file says `approval: automatic`, records are first tried as `approve` tries them, with the offers in
    the folder `offers`.

    Example: headwater site start hospital-a/site.yaml
    """
    use_log_format(log_format)
    with reported_errors():
        config = load(SiteConfig, site)
        if coordinator is None and len(config.list_coordinators()) > 1:
            _start_each(site, list(config.list_coordinators()), ["--patience", str(patience), "--grace", str(grace)])
            return
        config = config.select(coordinator)
        if config.approval == "automatic":
            # What the trial imports, torch above all, would stay for as long as this process waits.
            for line in run_apart(_freeze_records, config, site):
                show_line(line)
        from client.connection import node

        use_log_format(log_format)  # Again: Flower's logger has a handler of its own, and was imported just now.
        os.environ.update(node.make_private_environment(config.coordinator_dir))
        leaving = node.StopRequest()
        show = show_line if coordinator is None else _name_coordinator(coordinator)
        with (
            node.lock_site(config.coordinator_dir),
            _serve_health(config, site) as online,
            _leave_on_signals(leaving, grace),
        ):
            joined = node.Node(config, site, show=show, online=online, leaving=leaving, retry_for_s=60.0 * patience)
            joined.run()


def _name_coordinator(name: str) -> Show:
    """Returns what shows a line of one of several coordinators."""

    def show(
        line: str, *, event: str = "message", level: Level = "info", fields: Mapping[str, Any] | None = None
    ) -> None:
        show_line(f"{name}: {line}", event=event, level=level, fields={**(fields or {}), "coordinator": name})

    return show


def _start_each(site: Path, names: Sequence[str], options: Sequence[str]) -> None:
    """Runs one process for each coordinator, so that none can hold up or end another; ends when all have ended."""
    running: dict[str, subprocess.Popen[bytes]] = {}

    def pass_on(number: int, frame: object) -> None:
        del frame
        for child in running.values():
            child.send_signal(number)

    # Before the first process, so that none is left behind by a signal.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    command = [sys.executable, "-m", "client", "start", str(site.resolve()), *options, "--coordinator"]
    for name in names:
        # Out of the terminal's group: Ctrl-C comes once, from here.
        running[name] = subprocess.Popen([*command, name], cwd=find_installation(), start_new_session=True)
    worst = 0
    while running:
        for name, child in list(running.items()):
            code = child.poll()
            if code is not None:
                del running[name]
                worst = max(worst, abs(code))
                show_line(f"{name}: ended with {code}")
        time.sleep(_POLL_S)
    if worst:
        raise typer.Exit(worst)


def _freeze_records(config: SiteConfig, site: Path) -> list[str]:
    from client.connection.checks import freeze_records  # Here: it needs torch.
    from client.protocol.approvals import read_offer

    kept = sorted(locate_offers(site, config).glob("*.json"))
    return [f"{found.name}: {found.detail}" for found in freeze_records(config, map(read_offer, kept))]


@contextlib.contextmanager
def _serve_health(config: SiteConfig, site: Path) -> Iterator[Callable[[bool], None]]:
    coordinator = config.list_coordinators().get(config.coordinator_name)
    if coordinator is None or coordinator.health_port is None:
        yield lambda online: None
        return
    from client.monitoring.monitor import SiteMonitor  # Here: neither it nor grpc is needed without a port.
    from client.monitoring.state import Presence
    from common.process.health import Health

    presence = Presence()
    health = Health(coordinator.health_port, SiteMonitor(config, coordinator, site, presence).list_pages())

    def note(online: bool) -> None:
        health.serving(online)
        presence.note(online)

    try:
        yield note
    finally:
        health.stop()


@contextlib.contextmanager
def _leave_on_signals(leaving: Any, grace_s: float) -> Iterator[None]:
    def ask(number: int, frame: object) -> None:
        del number, frame
        if leaving.asked == 0:
            show_line(f"leaving after the answer under way, or in {grace_s:g} s; Ctrl-C again leaves at once")
        leaving.ask(grace_s)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
