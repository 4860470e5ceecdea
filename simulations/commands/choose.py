"""`choose`: compares candidates for a task's backbone by a vote of the sites, or on public records."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from common.process.console import reported_errors, shown_progress
from common.yaml import load
from server.choice.table import show_choice
from simulations.choice.choose import choose_backbone
from simulations.commands.parts.options import Json, Out, Set, SimulationFile
from simulations.config import SimulationConfig


class ChoiceBy(StrEnum):
    """The question that sites answer."""

    VOTE = "vote"
    MOMENTS = "moments"


def choose(
    config: SimulationFile,
    backbones: Annotated[Path, typer.Option(help="YAML file with `candidates`: name -> settings of a backbone")],
    epsilon: Annotated[
        float | None, typer.Option(help="Each site votes, and pays this pure epsilon whatever the number of candidates")
    ] = None,
    by: Annotated[
        ChoiceBy, typer.Option(help="With --epsilon: votes, or sums over all sites where the run sums securely")
    ] = ChoiceBy.VOTE,
    proxy: Annotated[
        Path | None,
        typer.Option(help="YAML file of a PUBLIC data set to compare on, for nothing: source, column, labels"),
    ] = None,
    task: Annotated[str | None, typer.Option(help="The task, where the run has several")] = None,
    set_: Set = None,
    out: Out = None,
    json_: Json = False,
) -> None:
    """Compares candidates for a task's backbone: each site votes under its budget, or public records stand in.

    A site releases only which candidate fits its training records best. It does not vote where so few units are
    declared that noise would decide. With --by moments all sites are summed: how often the mean of its class is
    nearest, at an epsilon of the run's delta.

    Example: headwater simulate choose cifar10.yaml --backbones candidates.yaml --epsilon 0.5
    """
    with reported_errors():
        loaded = load(SimulationConfig, config, set_ or [])
        with shown_progress() as observe:
            choice, path = choose_backbone(
                loaded, backbones, task=task, epsilon=epsilon, by=by.value, proxy=proxy, out=out, observe=observe
            )
        show_choice(choice, path, as_json=json_)
