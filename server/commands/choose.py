"""`choose`: has the sites vote on a backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.process.console import reported_errors
from common.run import RunConfig
from common.yaml import load
from server.choice.candidates import make_choice_run
from server.commands.parts.daemon import follow_run, start_daemon
from server.commands.parts.options import Folder, Json, RunFile, Set
from server.deployment.federation import open_federation
from server.deployment.log import write_command
from server.deployment.run_checks import check_loaded
from server.superlink.queue import submit_run


def choose(
    folder: Folder,
    run: RunFile,
    backbones: Annotated[Path, typer.Option(help="YAML file with `candidates`: name -> settings of a backbone")],
    epsilon: Annotated[
        float, typer.Option(help="Each site's vote costs this pure epsilon, whatever the number of candidates")
    ],
    task: Annotated[str | None, typer.Option(help="The task, where the run has several")] = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Has the sites vote on a backbone for a task of a run, each under its own budget; nothing is trained.

    Each site approves the vote like a run, receives the candidates, and releases only which of them fits its training
    records best. A site that declares so few units that noise would decide is not asked.

    Example: headwater coordinator choose fed fed/run.yaml --backbones candidates.yaml --epsilon 0.5
    """
    with reported_errors():
        federation = open_federation(folder)
        wanted = make_choice_run(load(RunConfig, run, set_ or []), backbones, epsilon, task)
        checked, prepared = check_loaded(federation, wanted)
        start_daemon(federation)
        path = submit_run(federation, checked, prepared)
        write_command(federation, "choose", f"run {path.name}")
        follow_run(federation, path, as_json=json_)
