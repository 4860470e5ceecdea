"""`predict`: what a finished model says of records, as a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from common.process.console import reported_errors, shown_progress
from common.types import BadInput, DigestMismatch

if TYPE_CHECKING:
    from client.protocol.site import Site
    from common.serving.network import Model


Device = Literal["auto", "cpu", "cuda"]


def predict(
    model: Annotated[
        Path | None, typer.Argument(metavar="[MODEL]", help="A model's folder, or that of the run that it came from")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="A file or folder of records, or a YAML file with the settings of a source"),
    ] = None,
    out: Annotated[Path, typer.Option(help="The file to write: .csv, .jsonl or .parquet")] = Path("predictions.csv"),
    masks: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A new folder or .json file for a model's masks")
    ] = None,
    boxes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A new .json file for predicted boxes, in COCO's format")
    ] = None,
    overlays: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A new folder for pictures with masks or boxes drawn on them")
    ] = None,
    site: Annotated[
        Path | None,
        typer.Option(help="The site's file: its last run where no MODEL is named, and its own records without --data"),
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="Id of the site's run; by default the run whose final heads arrived last")
    ] = None,
    coordinator: Annotated[str | None, typer.Option(help="Whose run, where the site file has several")] = None,
    federated: Annotated[
        bool, typer.Option("--federated", help="Take the shared heads where the site has personal ones")
    ] = False,
    split: Annotated[
        Literal["test", "train", "all"] | None,
        typer.Option(help="Of the site's own records the held-out ones (test, the default), train or all"),
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="A task of the model; by default all (repeatable)")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="The column of texts or of files' paths, or the array of an .npz file; twice for pairs"),
    ] = None,
    source: Annotated[str | None, typer.Option(help="The source to read, where a file names several")] = None,
    device: Annotated[
        Device | None,
        typer.Option(help="Device that encodes records; by default the site file's, or a GPU where there is one"),
    ] = None,
    backbones: Annotated[
        Path | None, typer.Option(help="Weights of a model that was handed on without them: a file or a folder")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier output")] = False,
) -> None:
    """Writes what a finished model says of records: a row for each, with labels and probabilities. Nothing is sent.

    Example: headwater predict runs/mine --data scans --out predictions.csv
    """
    with reported_errors():
        # Inside, as below: who asks for help waits for no torch.
        from client.prediction.output import plan_output

        output = plan_output(out, force=force)
        if site is None and (model is None or data is None):
            raise BadInput("expected a model's folder and --data, or --site")
        for option, given in (("--run", run), ("--coordinator", coordinator)):
            if given and (site is None or model is not None):
                raise BadInput(f"{option}: expected it beside --site and without MODEL, for the site's own run")
        if federated and site is None:
            raise BadInput("--federated: expected it beside --site, where there are personal heads")
        if split is not None and (site is None or data is not None):
            raise BadInput("--split: expected it beside --site and without --data, for the site's own records")
        from client.prediction.data import choose_tasks, describe_clipped, open_records
        from client.prediction.home import StoredFeatures, exclude_records, open_home_records
        from client.prediction.places import PlacesOutput, plan_places
        from client.prediction.predict import write_predictions
        from client.prediction.records import encode_now

        with shown_progress() as observe:
            own = None if site is None else _open_site(site, coordinator, observe)
            opened = _open_model(model, own, run, device, backbones, federated=federated)
            tasks = choose_tasks(opened, task or ())
            places = plan_places(PlacesOutput(masks, boxes, overlays, out.parent), opened, tasks, force=force)
            if data is not None:
                records = open_records(opened, data, tasks=tasks, columns=column or (), source=source)
                records = records if own is None else exclude_records(own, records)
            else:
                assert own is not None
                records = open_home_records(own, opened, tasks, split or "test", source)
            for note in (*records.notes, *describe_clipped(opened, records)):
                typer.echo(note, err=True)
            encode = encode_now if own is None or data is not None else StoredFeatures(own, opened).encode
            written = write_predictions(opened, records, output, places=places, encode=encode, observe=observe)
        typer.echo(f"{output.path}: {written.num_predicted:,} record(s)")
        if written.num_rejected:
            typer.echo(f"{output.rejected}: {written.num_rejected:,} record(s) that could not be used, with reasons")


def _open_site(path: Path, coordinator: str | None, observe: Callable[[str, int, int], None]) -> Site:
    from client.config import SiteConfig
    from client.protocol.site import Site
    from common.privacy.noise import os_entropy
    from common.yaml import load

    config = load(SiteConfig, path)
    # Where the run is not the site's own, none of its coordinators is asked for.
    chosen = config.select(coordinator) if coordinator is not None or len(config.list_coordinators()) < 2 else config
    return Site(chosen, os_entropy, lambda done, total: observe("encoding", done, total))


def _open_model(
    folder: Path | None,
    site: Site | None,
    run: str | None,
    device: Device | None,
    backbones: Path | None,
    *,
    federated: bool,
) -> Model:
    """Returns the model of a folder, or of the site's own run; says which heads it has."""
    from client.prediction.home import find_adopted_heads, open_home_model, refuse_home_files
    from common.model.backbones import choose_device
    from common.serving.network import open_model

    chosen = choose_device(device or ("auto" if site is None else site.config.device))
    try:
        if folder is not None:
            refuse_home_files(folder)
            opened = open_model(folder, chosen, backbones=backbones)
            adopted = None if site is None or federated else find_adopted_heads(site, opened, folder)
            if adopted is None:
                return opened
            typer.echo(adopted.heads, err=True)
            return adopted.model
        assert site is not None
        home = open_home_model(site, run, chosen, federated=federated)
    except DigestMismatch as error:
        raise BadInput(str(error)) from error
    typer.echo(home.heads, err=True)
    return home.model
