"""`advise`: says what to train, how, and whether, before anything is spent."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.process.console import print_json, reported_errors

if TYPE_CHECKING:
    from simulations.choice.advise import TaskAdvice


def advise(
    file: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="A simulation file or a run file")],
    units: Annotated[
        int | None, typer.Option(help="With a run file: declared number of units of each task at each site")
    ] = None,
    sites: Annotated[
        int | None, typer.Option(help="With a run file: number of sites; by default its `cohort.min_sites`")
    ] = None,
    distance: Annotated[
        float | None, typer.Option(help="Distance of the sites' records from the backbone's home, where it is known")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the file that follows the advice, a new one beside FILE.yaml")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key (repeatable)")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else")] = False,
) -> None:
    """Says what to train, with noise where, what privacy will cost, and why; no record is read, nothing is spent.

    Example: headwater advise chest.yaml --out advised.yaml
    """
    with reported_errors():
        # Inside: who asks for help waits for no torch.
        from simulations.choice.advise import advise_on_file, write_following

        following = advise_on_file(file, set_ or [], units=units, sites=sites, distance=distance)
        if json_:
            print_json({"tasks": {name: _as_json(each) for name, each in following.tasks.items()}})
        else:
            for name, each in following.tasks.items():
                _print_advice(name, each)
        if out is not None:
            write_following(out, file, following)
            typer.echo(f"written: {out}; see `headwater simulate plan` for its price", err=json_)


def _as_json(each: TaskAdvice) -> dict[str, object]:
    situation, advice, forecast = each.situation, each.advice, each.forecast
    return {
        **asdict(situation),
        **asdict(advice),
        "forecast": None if forecast is None else {"least": forecast.least, "most": forecast.most},
    }


def _print_advice(task: str, each: TaskAdvice) -> None:
    typer.echo(f"{task}: {each.situation.num_units:,} declared unit(s) at {each.situation.num_sites} site(s)")
    for line in each.advice.lines:
        typer.echo(f"  {line.topic}: {line.choice}")
        typer.echo(f"    because: {line.reason}")
        typer.echo(f"    seen: {line.evidence}")
    if each.forecast is not None:
        least, most = 100.0 * each.forecast.least, 100.0 * each.forecast.most
        typer.echo(f"  rehearsal on synthetic records, as `plan` has it: {least:.0f} to {most:.0f} points")
