"""`similarity`: shows how far the sites of a run are from each other and from their backbone's home sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from common.process.console import make_console, print_json, reported_errors
from common.serving.means import HOME, FeatureMean, MeanDistance, read_means, select_backbone
from common.serving.similarity import ALL, OTHERS, WARNING, Similarity, compare_means
from common.types import BadInput

_MOST_COLUMNS = 8


def similarity(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or the means.safetensors in it")],
    home: Annotated[
        Path | None, typer.Option(help="The backbone's home file, which `headwater simulate public-mean` makes")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else")] = False,
) -> None:
    """Shows how far sites are from each other, by the means that they released before the first round. Costs nothing.

    Each number is the squared distance of two means of features of length 1, without what their noise adds, and beside
    it the deviation that the noise leaves. Two sets of unrelated records are about 1 apart, two halves of one set 0.

    Example: headwater similarity runs/mine --home home.safetensors
    """
    with reported_errors():
        sites = [each for each in read_means(run) if not each.is_home]
        of_home = None if home is None else _read_home(home, sites)
        if len(sites) < 2 and of_home is None:
            raise BadInput(f"{run}: expected the means of two sites, got {len(sites)}; --home FILE compares one")
        found = compare_means(sites, of_home)
        if json_:
            print_json({"backbones": [_describe(each) for each in found], "warning": WARNING})
            return
        for each in found:
            make_console().print(_make_table(each))
        typer.echo(WARNING)


def _read_home(path: Path, sites: Sequence[FeatureMean]) -> FeatureMean:
    homes = [each for each in read_means(path) if each.is_home]
    if not homes:
        raise BadInput(
            f"--home {path}: expected a home file, which `headwater simulate public-mean` makes, got a run's"
        )
    return select_backbone(homes, {each.digest for each in sites}, path)[0]


def _make_table(found: Similarity) -> Table:
    table = Table(
        title=f"distances of sites, backbone {found.digest[:12]}; after ± the deviation of the noise",
        title_justify="left",
    )
    names = [each.name for each in found.means]
    columns = names if len(names) <= _MOST_COLUMNS else [name for name in names if name == HOME]
    for heading in ("", "units", *columns, *([OTHERS] if found.others else [])):
        table.add_column(escape(heading), overflow="fold")
    for each in found.means:
        own = found.distances[each.name]
        cells = [_format(own.get(name)) for name in columns]
        if found.others:
            cells.append(_format(found.others[each.name]) + (f" ({ALL})" if each.is_home else ""))
        table.add_row(escape(each.name), f"{each.units:g}", *cells)
    if columns != names:
        table.caption = f"--json has all {len(names)} x {len(names)}"
    return table


def _format(distance: MeanDistance | None) -> str:
    if distance is None:
        return "-"
    return f"{distance.shown:.3f}" + (f" ± {distance.error:.3f}" if distance.error else "")


def _describe(found: Similarity) -> dict[str, object]:
    return {
        "backbone": found.digest,
        "units": {each.name: each.units for each in found.means},
        "distances": {
            name: {other: _list_values(each) for other, each in own.items()} for name, own in found.distances.items()
        },
        OTHERS.replace(" ", "_"): {name: _list_values(each) for name, each in found.others.items()},
    }


def _list_values(distance: MeanDistance) -> dict[str, float]:
    return {"distance": distance.shown, "debiased": distance.value, "noise": distance.error}
