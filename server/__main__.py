"""Command line of the coordinator: `python -m server init | admit | kit | start | status | stop | resume | ...`."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from common.events import RunEnded, RunFailure, Summary, read_run_journal
from common.process.address import Address
from common.process.console import EXIT_FAILED, EXIT_INTERRUPTED, reported_errors
from common.run import RunConfig
from common.types import BadInput, HeadwaterError, RunFailed
from common.yaml import parse
from server.deployment import admitted_sites, certificates
from server.deployment.federation import Federation, FederationConfig, create_federation, open_federation
from server.reports.summary import list_failures
from server.reports.tables import render_status, render_summary
from server.superlink import operate
from server.superlink.control import Control, RunState
from server.superlink.daemon import find_daemon_pid, run_daemon
from server.superlink.node_ids import synchronise_nodes
from server.superlink.queue import create_run_folder, find_interrupted_run, submit_run
from server.superlink.watch import watch

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Dir = Annotated[Path, typer.Argument(metavar="DIR", help="The federation's folder")]
Site = Annotated[str, typer.Argument(metavar="NAME", help="The site's name")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a key of the run file: --set rounds=5")]


@app.command()
def init(
    folder: Dir,
    name: Annotated[str, typer.Option(help="Name of the federation")],
    address: Annotated[str, typer.Option(help="HOST:PORT under which sites reach the coordinator")],
    also: Annotated[list[str] | None, typer.Option(help="A further public name or address (repeatable)")] = None,
    bind: Annotated[str | None, typer.Option(help="IP:PORT to listen on; by default every address, same port")] = None,
) -> None:
    """Make a federation folder: authority, server certificate, settings, an empty registry of sites.

    Example: python -m server init fed --name hearts --address fed.example.org:9092 --also 203.0.113.7
    """
    with reported_errors():
        federation = _init(folder, name, address, also or [], bind)
        config = federation.config
        typer.echo(f"{folder}: federation {config.name} at {config.address}, listening on {config.bind}")
        typer.echo(
            f"its certificate names {', '.join(config.hosts())}; keep {folder}/tls/ca.key secret, and a copy of it"
        )
        typer.echo(f"next: python -m server admit {folder} SITE --key SITE.pub")


def _init(folder: Path, name: str, address: str, also: list[str], bind: str | None) -> Federation:
    try:
        parsed = Address.parse(address)
    except ValueError as error:
        raise BadInput(f"--address: {error}") from error
    step = 1 if parsed.port <= 65533 else -1
    values = {
        "name": name,
        "address": address,
        "also": also,
        "bind": bind or f"{'127.0.0.1' if parsed.host in ('127.0.0.1', 'localhost') else '0.0.0.0'}:{parsed.port}",
        "control_port": parsed.port + step,
        "health_port": parsed.port + 2 * step,
    }
    federation = create_federation(folder, parse(FederationConfig, values, base=Path.cwd()))
    admitted_sites.write_no_sites(federation)
    certificates.write_authority(federation.tls, name)
    certificates.write_server(federation.tls, federation.config.hosts())
    return federation


@app.command()
def admit(
    folder: Dir, name: Site, key: Annotated[Path, typer.Option(help="The site's public key, a .pub file")]
) -> None:
    """Let a site join, by its public key; a running federation takes it at once.

    Example: python -m server admit fed north --key north.pub
    """
    with reported_errors():
        federation = open_federation(folder)
        entry = admitted_sites.admit_site(federation, name, key)
        _tell_daemon(federation)
        typer.echo(f"{name}: admitted; key {entry.fingerprint()} (compare it with the site's by telephone)")


@app.command()
def remove(folder: Dir, name: Site) -> None:
    """Revoke a site's key, for ever and at once, also in a running federation.

    Example: python -m server remove fed north
    """
    with reported_errors():
        federation = open_federation(folder)
        entry = admitted_sites.remove_site(federation, name)
        _tell_daemon(federation)
        typer.echo(f"{name}: removed; key {entry.fingerprint()} is revoked")


@app.command()
def renew(
    folder: Dir,
    ca: Annotated[bool, typer.Option("--ca", help="A new authority too: every site then needs a new kit")] = False,
) -> None:
    """Make a new server certificate; a running federation uses it for new connections within seconds.

    Example: python -m server renew fed
    """
    with reported_errors():
        federation = open_federation(folder)
        if ca:
            certificates.write_authority(federation.tls, federation.config.name)
        certificates.write_server(federation.tls, federation.config.hosts())
        until = certificates.read_validity(federation.tls / "server.crt").until
        typer.echo(f"server certificate for {', '.join(federation.config.hosts())}, valid until {until:%Y-%m-%d}")
        if ca:
            typer.echo("every site needs the new authority: send each a new kit (`python -m server kit`) now; until "
                       "a site has put its ca.crt in place, it refuses this coordinator")  # fmt: skip
        else:
            typer.echo("sites need nothing: the authority they trust is the same")


@app.command()
def kit(
    folder: Dir,
    name: Site,
    run: Annotated[list[Path] | None, typer.Option(help="A run file to offer (repeatable)")] = None,
    out: Annotated[Path | None, typer.Option(help="The archive; by default NAME-kit.zip here")] = None,
) -> None:
    """Pack what a site needs to join: authority, address, offered runs. Nothing secret.

    Example: python -m server kit fed north --run fed/run.yaml
    """
    with reported_errors():
        from server.deployment.kit import write_kit  # Opens backbones: seconds that `status` and the link need not pay.

        path = out or Path(f"{name}-kit.zip")
        files = write_kit(open_federation(folder), name, run or [], path)
        typer.echo(f"{path}: {path.stat().st_size} bytes: {', '.join(files)}")


@app.command()
def start(folder: Dir, run: Annotated[Path, typer.Argument(metavar="RUN.yaml")], set_: Set = None) -> None:
    """Start the coordinator where it does not run yet, and a run; show its progress and its result.

    Exit code 0: every task reached its quorum; 1: the run failed; 2: bad input. Ctrl-C ends the watching, not the run.

    Example: python -m server start fed fed/run.yaml --set rounds=3
    """
    with reported_errors():
        from server.deployment.run_checks import (
            check_run,  # Opens backbones: seconds that `status` and the link need not pay.
        )

        federation = open_federation(folder)
        checked = check_run(federation, run, set_ or [])
        _start_daemon(federation)
        with Control(federation) as control:
            _follow(federation, control, _submitted(control, federation, checked), skip=0)


@app.command()
def resume(
    folder: Dir,
    run_id: Annotated[
        str | None, typer.Argument(metavar="[RUN_ID]", help="By default the newest that has to be")
    ] = None,
) -> None:
    """Continue a run that was interrupted, after its last whole round; what sites spent stays spent.

    Example: python -m server resume fed
    """
    with reported_errors():
        federation = open_federation(folder)
        path = find_interrupted_run(federation, run_id)
        _start_daemon(federation)
        with Control(federation) as control:
            old = len(read_run_journal(path / "journal.jsonl"))
            _follow(federation, control, (path, submit_run(control, path)), skip=old)


@app.command()
def status(folder: Dir, json_: Annotated[bool, typer.Option("--json", help="As JSON")] = False) -> None:
    """Say which sites are connected, what runs, and how healthy the coordinator is; exit code 1 where it is not.

    Example: python -m server status fed --json
    """
    with reported_errors():
        found = operate.status(open_federation(folder))
        if json_:
            typer.echo(found.to_json())
        else:
            Console(width=None if sys.stdout.isatty() else 100, highlight=False).print(render_status(found))
        if not found.daemon.healthy:
            raise typer.Exit(EXIT_FAILED)


@app.command()
def stop(
    folder: Dir, run: Annotated[bool, typer.Option("--run", help="End the run only; sites stay connected")] = False
) -> None:
    """End the run that is under way and the coordinator; `resume` continues the run later.

    Example: python -m server stop fed
    """
    with reported_errors():
        federation = open_federation(folder)
        if find_daemon_pid(federation) is None:
            typer.echo(f"{folder}: the coordinator is not running")
            return
        with Control(federation) as control:
            busy = control.find_current_run() if control.is_answering() else None
            if busy is not None:
                control.stop_run(busy.run_id)
                typer.echo(f"run {Path(busy.folder).name}: ended; `python -m server resume {folder}` continues it")
            elif run:
                typer.echo("no run is under way")
        if not run:
            operate.stop_daemon(federation)
            typer.echo(f"{folder}: the coordinator has stopped")


def _tell_daemon(federation: Federation) -> None:
    """Make the registry true in a running coordinator; its gate reads the registry's file anyway."""
    if find_daemon_pid(federation) is not None:
        with Control(federation) as control:
            synchronise_nodes(control, federation)


def _start_daemon(federation: Federation) -> None:
    started = operate.ensure_daemon(federation)
    what = "listening" if started else "running already, listening"
    _show(f"{what} on {federation.config.bind} for {federation.config.address}")


def _submitted(control: Control, federation: Federation, run: RunConfig) -> tuple[Path, int]:
    path = create_run_folder(federation, run)
    try:
        return path, submit_run(control, path)
    except HeadwaterError:
        shutil.rmtree(path)  # Nothing ran in it.
        raise


def _follow(federation: Federation, control: Control, run: tuple[Path, int], *, skip: int) -> None:
    path, engine_run = run
    try:
        state = watch(
            control,
            path,
            flower_run_id=engine_run,
            alive=lambda: find_daemon_pid(federation) is not None,
            show=_show,
            skip=skip,
        )
    except KeyboardInterrupt:
        typer.echo(f"the run goes on: `python -m server status {federation.folder}`, or `stop`", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    _finish(path, state)


def _finish(path: Path, state: RunState) -> None:
    journal = read_run_journal(path / "journal.jsonl")
    ends = [event for event in journal if isinstance(event, RunEnded | RunFailure)]
    if not ends:
        # Its process wrote no end: it died, or was stopped.
        raise RunFailed(
            f"run {path.name}: {state.details or state.outcome}; `python -m server resume {path.parent.parent} "
            f"{path.name}` continues it after its last whole round"
        )
    if isinstance(ends[-1], RunFailure):
        raise RunFailed(f"run {path.name}: {ends[-1].reason}")
    summary = Summary.model_validate_json((path / "summary.json").read_bytes())
    Console(width=None if sys.stdout.isatty() else 100).print(render_summary(summary), crop=False)
    typer.echo(f"results: {path}")
    problems = list(list_failures(summary))
    for problem in problems:
        typer.echo(f"error: {problem}", err=True)
    if problems:
        raise typer.Exit(EXIT_FAILED)


def _show(line: str) -> None:
    typer.echo(line, err=True)


@app.command()
def link(folder: Dir) -> None:
    """Serve in the foreground until stopped; `start` launches the same in the background. For systemd and containers.

    Example: python -m server link fed
    """
    with reported_errors():
        run_daemon(open_federation(folder))


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    app()
