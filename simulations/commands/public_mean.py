"""`public-mean`: measures the mean of public records' features, which a backbone subtracts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.process.console import reported_errors, shown_progress
from common.run import RunConfig
from common.yaml import load, read_yaml
from simulations.commands.parts.options import Set
from simulations.config import RUN_PREFIX, SimulationConfig
from simulations.public.mean import measure_public_mean


def public_mean(
    config: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="A simulation file, or a run file")],
    records: Annotated[
        Path,
        typer.Argument(
            help="PUBLIC records: a folder or zip of pictures or recordings, a folder or file of texts, one a line, or "
            "a YAML file with the settings of a source"
        ),
    ],
    backbone: Annotated[str | None, typer.Option(help="The backbone, where the run has several")] = None,
    shrink: Annotated[
        int | None,
        typer.Option(min=1, help="Shrink larger pictures to so many pixels first, to be as blurred as the sites' are"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write a home file of these records alone, for `distance` and `similarity`, of any backbone"),
    ] = None,
    set_: Set = None,
) -> None:
    """Measures the mean of public records' features and writes it where a backbone says `shift: {public: FILE}`.

    Every site receives the mean, without noise: never make it of private records. The file is the home file of these
    records too, from which distances are measured; --out writes that alone, of records like the pre-training's.

    Example: headwater simulate public-mean chest.yaml ./public-pictures --shrink 64
    """
    with reported_errors():
        run, prefix = _load_run(config, set_ or [])
        with shown_progress() as observe:
            done = measure_public_mean(
                run, records, prefix=prefix, backbone=backbone, shrink=shrink, out=out, observe=observe
            )
        left_out = f", {len(done.reasons)} left out (first: {done.reasons[0]})" if done.reasons else ""
        name = "public mean" if done.is_shift else "home sample"
        typer.echo(
            f"{name}: {done.path} written; {done.num_records} records{left_out}; its sampling error is "
            f"{done.error:.1%} of its length"
        )


def _load_run(path: Path, overrides: list[str]) -> tuple[RunConfig, str]:
    """Returns the run of a simulation or run file, and the beginning of its keys there. Raises BadInput."""
    if "run" in read_yaml(path):
        return load(SimulationConfig, path, overrides).run, RUN_PREFIX
    return load(RunConfig, path, overrides), ""
