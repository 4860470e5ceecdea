"""`export`: writes a finished model in a format that other programs read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from common.process.console import reported_errors
from common.types import BadInput, DigestMismatch


def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model's folder, or a finished run's")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder")],
    format_: Annotated[str | None, typer.Option("--format", help="huggingface, monai, onnx or torch")] = None,
    task: Annotated[list[str] | None, typer.Option(help="A task; without it, all of the model")] = None,
    without_backbone: Annotated[
        list[str] | None, typer.Option(help="Name or digest of a backbone whose licence forbids to hand it on")
    ] = None,
    backbones: Annotated[Path | None, typer.Option(help="Weights that the model was handed on without")] = None,
    evidence: Annotated[
        bool, typer.Option("--evidence", help="Write what an output checker reads before the model leaves")
    ] = False,
    site: Annotated[Path | None, typer.Option(help="With --evidence: the site's file, for its ledger")] = None,
    run: Annotated[str | None, typer.Option(help="With --site: id of the run; by default the model's")] = None,
    coordinator: Annotated[
        str | None, typer.Option(help="With --site: name of the coordinator, where the file has several")
    ] = None,
    no_attack: Annotated[
        bool, typer.Option("--no-attack", help="With --evidence: leave out the attack on the records")
    ] = False,
) -> None:
    """Exports a finished model for programs that know nothing of Headwater, or the evidence for letting it leave.

    Example: headwater export runs/mine exported --format onnx
    """
    with reported_errors():
        _refuse_personal(model)
        _check_together(evidence, format_, site, run or coordinator, no_attack)
        try:
            if evidence:
                _write_evidence(model, folder, site, run, coordinator, attack=not no_attack)
            else:
                assert format_ is not None
                _write_format(model, folder, format_, task or (), without_backbone or (), backbones)
        except DigestMismatch as error:
            raise BadInput(str(error)) from error


def _write_format(
    model: Path, folder: Path, name: str, tasks: Sequence[str], without: Sequence[str], backbones: Path | None
) -> None:
    from common.exports import check_folder, open_format

    opened = open_format(name)
    check_folder(folder)
    from common.exports import write_export
    from common.exports.parts.facts import read_run_facts
    from common.serving.network import open_model

    exported = write_export(
        open_model(model, backbones=backbones),
        folder,
        opened,
        tasks=tasks,
        without=without,
        facts=read_run_facts(model),
    )
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        typer.echo(f"{path.relative_to(folder).as_posix():<28}{path.stat().st_size:>12,} bytes")
    if exported.left_out:
        typer.echo(exported.explain_left_out())


def _check_together(
    evidence: bool, format_: str | None, site: Path | None, of_site: str | None, no_attack: bool
) -> None:
    """Checks that the options fit each other. Raises BadInput."""
    if evidence and format_ is not None:
        raise BadInput("--evidence: expected it without --format; export first, then write the evidence to another DIR")
    if not evidence and format_ is None:
        raise BadInput("--format: expected a format, such as onnx, or --evidence, got neither")
    if not evidence and (site is not None or no_attack):
        raise BadInput("--site and --no-attack: expected them with --evidence only")
    if site is None and of_site is not None:
        raise BadInput("--run and --coordinator: expected them with --site only")


def _write_evidence(
    model: Path, folder: Path, site: Path | None, run: str | None, coordinator: str | None, *, attack: bool
) -> None:
    from common.exports.parts.evidence import check_target, write_evidence
    from common.process.console import shown_progress

    check_target(folder)
    with shown_progress() as observe:
        if site is not None:
            from client.config import SiteConfig
            from client.personal.evidence import collect_site_evidence
            from common.yaml import load

            config = load(SiteConfig, site).select(coordinator)
            found = collect_site_evidence(config, model, run_id=run, attack=attack, observe=observe)
        else:
            from simulations.evidence import collect_simulation_evidence, is_simulation

            if is_simulation(model):
                found = collect_simulation_evidence(model, attack=attack, observe=observe)
            else:
                from server.reports.evidence import collect_run_evidence

                found = collect_run_evidence(model)
    for path in write_evidence(found, folder):
        typer.echo(f"{path.name:<28}{path.stat().st_size:>12,} bytes")
    for outcome in found.attacks or ():
        if outcome.contradicts:
            typer.echo(f"{outcome.name} on {outcome.task}: more than the promise allows; see {folder / 'evidence.md'}")


def _refuse_personal(path: Path) -> None:
    """Refuses what never leaves a site: its personal heads, and a model with its records in it. Raises BadInput."""
    from client.protocol.site import PERSONAL_HEADS
    from common.serving.folder import NEVER_LEAVES, read_config, refuse_home_model

    if path.is_file() and (path.name == PERSONAL_HEADS or path.read_bytes()[:64].startswith(NEVER_LEAVES.encode())):
        raise BadInput(f"{path}: {NEVER_LEAVES}; name the run's folder to export the federated model instead")
    if path.is_dir():
        refuse_home_model(path, read_config(path))
