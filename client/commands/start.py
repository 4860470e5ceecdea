"""`start`: joins the coordinator and answers its requests."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from client.commands.parts.options import SiteFile, load_site
from client.config import SiteConfig
from common.process.console import reported_errors


def start(
    site: SiteFile,
    patience: Annotated[
        float, typer.Option(help="Minutes to go on trying while the coordinator cannot be reached")
    ] = 1440.0,
    grace: Annotated[float, typer.Option(help="Seconds an answer under way may still take after Ctrl-C")] = 60.0,
) -> None:
    """Joins the coordinator and answers its requests until Ctrl-C.

    Example: headwater site start hospital-a/site.yaml
    """
    with reported_errors():
        config = load_site(site)
        from client.connection import node

        os.environ.update(node.make_private_environment(config.state_dir))
        leaving = node.StopRequest()
        with node.lock_site(config.state_dir), _serve_health(config) as online, _leave_on_signals(leaving, grace):
            joined = node.Node(config, site, show=_show, online=online, leaving=leaving, retry_for_s=60.0 * patience)
            joined.run()


@contextlib.contextmanager
def _serve_health(config: SiteConfig) -> Iterator[Callable[[bool], None]]:
    port = None if config.coordinator is None else config.coordinator.health_port
    if port is None:
        yield lambda online: None
        return
    from common.process.health import Health  # Here: grpc is not needed without a port.

    health = Health(port)
    try:
        yield health.serving
    finally:
        health.stop()


@contextlib.contextmanager
def _leave_on_signals(leaving: Any, grace_s: float) -> Iterator[None]:
    def ask(number: int, frame: object) -> None:
        del number, frame
        if leaving.asked == 0:
            _show(f"leaving after the answer under way, or in {grace_s:g} s; Ctrl-C again leaves at once")
        leaving.ask(grace_s)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show(line: str) -> None:
    typer.echo(f"{time.strftime('%H:%M:%S')}  {line}")
