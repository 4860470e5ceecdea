"""`predict`: what a finished model says of records, as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from common.process.console import reported_errors, shown_progress
from common.types import BadInput, DigestMismatch


def predict(
    model: Annotated[
        Path | None, typer.Argument(metavar="[MODEL]", help="A model's folder, or that of the run that it came from")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="A file or folder of records, or a YAML file with the settings of a source"),
    ] = None,
    out: Annotated[Path, typer.Option(help="The file to write: .csv, .jsonl or .parquet")] = Path("predictions.csv"),
    task: Annotated[list[str] | None, typer.Option(help="A task of the model; by default all (repeatable)")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="The column of texts or of files' paths, or the array of an .npz file; twice for pairs"),
    ] = None,
    source: Annotated[str | None, typer.Option(help="The source to read, where a file names several")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Device that encodes the records")] = "auto",
    backbones: Annotated[
        Path | None, typer.Option(help="Weights of a model that was handed on without them: a file or a folder")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier output")] = False,
) -> None:
    """Writes what a finished model says of records: a row for each, with labels and probabilities. Nothing is sent.

    Example: headwater predict runs/mine --data scans --out predictions.csv
    """
    with reported_errors():
        from client.prediction.output import plan_output

        output = plan_output(out, force=force)
        if model is None or data is None:
            raise BadInput("expected a model's folder and --data")
        from client.prediction.data import choose_tasks, open_records
        from client.prediction.predict import write_predictions
        from common.model.backbones import choose_device
        from common.serving.network import open_model

        try:
            opened = open_model(model, choose_device(device), backbones=backbones)
        except DigestMismatch as error:
            raise BadInput(str(error)) from error
        records = open_records(
            opened, data, tasks=choose_tasks(opened, task or ()), columns=column or (), source=source
        )
        for note in records.notes:
            typer.echo(note, err=True)
        with shown_progress() as observe:
            written = write_predictions(opened, records, output, observe=observe)
        typer.echo(f"{output.path}: {written.num_predicted:,} record(s)")
        if written.num_rejected:
            typer.echo(
                f"{output.rejected}: {written.num_rejected:,} record(s) that could not be used, with the reasons"
            )
