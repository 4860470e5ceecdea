"""`start-from`: a model for a new site or a new task from a finished model, at no cost in privacy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from common.process.console import reported_errors, shown_progress
from common.types import BadInput, DigestMismatch


def start_from(
    prior: Annotated[Path, typer.Argument(metavar="PRIOR", help="A finished model's folder, or its run's")],
    shots: Annotated[
        Path | None,
        typer.Option(help="YAML file of a few labelled records: `sources`, and under `tasks` where the labels are"),
    ] = None,
    names: Annotated[
        Path | None, typer.Option(help="YAML file of a new task: its name, and its labels as words or phrases")
    ] = None,
    also: Annotated[
        list[Path] | None, typer.Option(help="With --shots: a further model with the same tasks (repeatable)")
    ] = None,
    out: Annotated[Path, typer.Option(help="The new model's folder, new or empty")] = Path("first-model"),
    backbones: Annotated[
        Path | None, typer.Option(help="Weights of a prior that was handed on without them: a file or a folder")
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Device that encodes the records")] = "auto",
) -> None:
    """Starts a model for a new site from a few labelled records, or for a new task from the names of its classes.

    Nothing is sent and nothing is spent. A model with labelled records in it never leaves: `predict` uses it, `export`
    refuses it. One that was made from names alone may leave.

    Example: headwater start-from runs/mine --shots few.yaml --out here
    """
    with reported_errors():
        # Inside: who asks for help waits for no torch.
        from client.start.names import NamesFile
        from client.start.shots import ShotsFile
        from client.start.start import start_from as start
        from common.exports import check_folder
        from common.model.backbones import choose_device
        from common.serving.folder import read_config
        from common.yaml import load

        if shots is None and names is None:
            raise BadInput("expected --shots, --names or both, got neither")
        if also and (shots is None or names is not None):
            raise BadInput("--also: expected it with --shots and without --names")
        check_folder(out)
        try:
            with shown_progress() as observe:
                heads = start(
                    prior,
                    out,
                    shots=None if shots is None else load(ShotsFile, shots),
                    names=None if names is None else load(NamesFile, names),
                    also=also or (),
                    backbones=backbones,
                    device=choose_device(device),
                    progress=lambda done, total: observe("encoding", done, total),
                )
        except DigestMismatch as error:
            raise BadInput(str(error)) from error
        for name, head in heads.items():
            typer.echo(f"{name}: {head.how}")
        # Also where no record was read now: the prior may have been fitted to some.
        typer.echo(f"{out}: {'stays at home: it never leaves' if read_config(out).never_leaves else 'may leave'}")
