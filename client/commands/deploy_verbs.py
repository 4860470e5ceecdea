"""The verbs of a site that joins a coordinator: `python -m client init | check | start | digest`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from client.config import SiteConfig
from client.connection.folder import MARK, SITE_FILE, find_marks, make_folder, renew_key, take_kit
from client.connection.keys import compute_fingerprint
from client.connection.kit import read_kit
from common.bundle import compute_code_digest
from common.process.console import EXIT_FAILED, reported_errors
from common.types import BadInput
from common.yaml import load

if TYPE_CHECKING:
    from client.connection.checks import Check

SiteFile = Annotated[Path, typer.Argument(metavar="SITE.yaml", help="The site's file")]
_COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command()(init)
    app.command()(check)
    app.command()(start)
    app.command()(digest)


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the site")],
    kit: Annotated[Path | None, typer.Option(help="The coordinator's startup kit")] = None,
    name: Annotated[str | None, typer.Option(help="The site's name, where no kit says it")] = None,
    new_key: Annotated[bool, typer.Option("--new-key", help="A new key for a site that lost its own")] = False,
) -> None:
    """Make a new site's folder: keys and a site file in which every key is explained.

    The coordinator's staff need the public key to make a kit: run it again with --kit when they have sent one.

    Example: python -m client init hospital-a --name hospital-a
    """
    with reported_errors():
        if new_key:
            public = renew_key(folder)
        elif kit is not None and (folder / SITE_FILE).exists():
            received = read_kit(kit)
            take_kit(folder, received)
            public = folder / "keys" / f"{received.settings.site}.pub"
        else:
            public = make_folder(folder, None if kit is None else read_kit(kit), name)
        site_file = folder / SITE_FILE
        lines = find_marks(site_file.read_text(encoding="utf-8"))
        where = f"replace {MARK} in lines {', '.join(map(str, lines))}" if lines else "complete"
        typer.echo(f"site file   {site_file}: {where}")
        typer.echo(f"private key {public.with_suffix('')}: stays here")
        typer.echo(f"public key  {public}: send it to the coordinator's staff")
        typer.echo(f"fingerprint {compute_fingerprint(public)}: compare it with theirs by telephone")
        if kit is None and not new_key:
            typer.echo(f"kit         when it has come: python -m client init {folder} --kit KIT.zip")
        typer.echo(f"then        python -m client check {site_file}")


def check(
    site: SiteFile,
    offline: Annotated[bool, typer.Option("--offline", help="Leave out what needs the network")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else")] = False,
) -> None:
    """Try everything before joining; exit code 1 when something would keep the site from it. Nothing is sent or spent.

    Example: python -m client check hospital-a/site.yaml --offline
    """
    with reported_errors():
        config = _load(site)
        from client.connection.checks import (  # Here: it needs torch, and `init` does not.
            check_approvals,
            check_backbone_fit,
            check_site,
        )
        from client.data.preview import Preview, write_previews
        from client.protocol.approvals import read_offer

        kept = {path: read_offer(path) for path in sorted((site.parent / "offers").glob("*.json"))}
        offers = {path.stem: offer.config() for path, offer in kept.items()}
        found = [*check_site(config, offers, offline=offline), *check_approvals(site, config, kept)]
        previews: list[Preview] = []
        with contextlib.suppress(BadInput):  # A source that does not open was reported above.
            previews = write_previews(config, offers)
        found += [check_backbone_fit(preview) for preview in previews if preview.refused]
        sheets = [preview.sheet for preview in previews if preview.sheet]
        failed = sum(item.outcome == "fail" for item in found)
        if json_:
            checks = [asdict(item) for item in found]
            _print_json({"passed": not failed, "checks": checks, "previews": [str(path) for path in sheets]})
        else:
            _print_checks(found)
            for path in sheets:
                typer.echo(f"preview: {path} (for your eyes; delete it when seen)")
            typer.echo(_next_step(site, failed, offline=offline))
        if failed:
            raise typer.Exit(EXIT_FAILED)


def start(
    site: SiteFile,
    patience: Annotated[
        float, typer.Option(help="Minutes to go on trying while the coordinator cannot be reached")
    ] = 1440.0,
    grace: Annotated[float, typer.Option(help="Seconds an answer under way may still take after Ctrl-C")] = 60.0,
) -> None:
    """Join the coordinator and answer its requests until Ctrl-C.

    Example: python -m client start hospital-a/site.yaml
    """
    with reported_errors():
        config = _load(site)
        from client.connection import node

        os.environ.update(node.make_private_environment(config.state_dir))
        leaving = node.StopRequest()
        with node.lock_site(config.state_dir), _health(config) as online, _signals(leaving, grace):
            joined = node.Node(config, site, show=_show, online=online, leaving=leaving, retry_for_s=60.0 * patience)
            joined.run()


def digest() -> None:
    """Print the digest of the code installed here: runs of any other code are declined.

    Example: python -m client digest
    """
    typer.echo(compute_code_digest())


# --- input -----------------------------------------------------------------------------------------------------------


def _load(site: Path) -> SiteConfig:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        waiting = find_marks(site.read_text(encoding="utf-8"))
        if waiting:
            lines = ", ".join(map(str, waiting))
            raise BadInput(f"{site}: expected every {MARK} to be replaced, got one in lines {lines}")
    return load(SiteConfig, site)


# --- running ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _health(config: SiteConfig) -> Iterator[Callable[[bool], None]]:
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
def _signals(leaving: Any, grace_s: float) -> Iterator[None]:
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


# --- output ----------------------------------------------------------------------------------------------------------


def _next_step(site: Path, failed: int, *, offline: bool) -> str:
    if failed:
        return f"{failed} failure(s)"
    if offline:
        return f"no failure; the network was left out: python -m client check {site}"
    return f"ready to join: python -m client start {site}"


def _show(line: str) -> None:
    typer.echo(f"{time.strftime('%H:%M:%S')}  {line}")


def _print_json(values: dict[str, Any]) -> None:
    typer.echo(json.dumps(values, indent=2, allow_nan=False))


def _print_checks(found: Sequence[Check]) -> None:
    width = max(len(item.name) for item in found)
    for item in found:
        outcome = typer.style(item.outcome, fg=_COLOURS[item.outcome])
        typer.echo(f"{outcome}  {item.name:<{width}}  {item.detail}")
        if item.remedy:
            typer.echo(f"      {'':<{width}}  -> {item.remedy}")
