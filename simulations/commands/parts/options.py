"""Arguments and options that several verbs of the simulator share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SimulationFile = Annotated[
    Path, typer.Argument(metavar="SIMULATION.yaml", help="A simulation file; `headwater example` has some")
]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a key: --set run.rounds=5 (repeatable)")]
Out = Annotated[Path | None, typer.Option(help="Folder for the results, new or empty")]
Anyway = Annotated[bool, typer.Option("--anyway", help="Also a run that cannot be better than guessing")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else")]
TrackerKind = Annotated[
    list[str] | None,
    typer.Option("--tracker", metavar="KIND", help="Show curves elsewhere too: tensorboard, mlflow, wandb (offline)"),
]
TrackerDir = Annotated[
    Path | None, typer.Option("--tracker-dir", help="Folder of the trackers' files; by default in the run's folder")
]
