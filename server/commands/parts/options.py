"""Arguments and options that several verbs of the coordinator share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The federation's folder")]
SiteName = Annotated[str, typer.Argument(metavar="NAME", help="The site's name")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a key of the run file: --set rounds=5")]
Anyway = Annotated[bool, typer.Option("--anyway", help="Also a run that cannot be better than guessing")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else")]
RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run's file")]
TrackerKind = Annotated[
    list[str] | None,
    typer.Option("--tracker", metavar="KIND", help="Show curves elsewhere too: tensorboard, mlflow, wandb (offline)"),
]
TrackerDir = Annotated[
    Path | None, typer.Option("--tracker-dir", help="Folder of the trackers' files; by default in the run's folder")
]
