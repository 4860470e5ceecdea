"""`inspect`: looks at data that are new, and writes a first file of settings for them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.errors import instead, plain
from common.process.console import make_console, reported_errors
from common.types import BadInput

if TYPE_CHECKING:
    from client.inspect.finding import ColumnFacts, Finding

_SHOWN = ("number", "category", "several", "constant", "mask", "boxes")
"""Kinds of columns whose values are shown."""

_MOST_ROWS = 40
"""Columns that are shown; a wide table has hundreds."""

_MOST_SHOWN = 4000
"""Characters of a note that are shown."""


def inspect(
    data: Annotated[Path, typer.Argument(metavar="FILE_OR_FOLDER", help="CSV, Parquet, npz, zip or folder")],
    task: Annotated[str | None, typer.Option(help="Column of the labels; without it, a guess")] = None,
    site: Annotated[bool, typer.Option("--site", help="Write the parts of a site file, no simulation")] = False,
    out: Annotated[Path | None, typer.Option(help="The file to write; by default NAME.yaml")] = None,
    backbone: Annotated[str | None, typer.Option(help="Name or file of another backbone")] = None,
    sheet: Annotated[str | None, typer.Option(help="Name or number of a spreadsheet's sheet, of several")] = None,
) -> None:
    """Looks at a table or folder that is new, and writes a simulation file for it.

    Example: headwater inspect ./xrays --task finding
    """
    with reported_errors():
        from client.inspect.draft import draft_file
        from client.inspect.folders import inspect as look

        # Four digits are the name of a year's sheet.
        is_number = sheet is not None and sheet.isdigit() and 0 < int(sheet) < 100
        finding = look(data, task, int(sheet) if sheet is not None and is_number else sheet)
        target = out or Path(f"{data.resolve().stem}{'.site' * site}.yaml")
        draft = draft_file(finding, target, site=site, backbone=backbone)
        for path in draft.files:
            if path.exists() or path.is_symlink():
                raise BadInput(f"{path}: it is there already; name another with --out, or remove it")
        _show(finding)
        for path, text in draft.files.items():
            try:
                path.write_text(text, encoding="utf-8")
            except (OSError, UnicodeError) as error:
                raise BadInput(f"{path}: expected a file that can be written{instead(error)}") from error
            typer.echo(f"wrote {path}")
        for blank in draft.blanks:
            typer.echo(f"fill in: {blank}")
        if site:
            typer.echo("next: copy these parts into the site's file, then: headwater site check SITE.yaml")
        else:
            typer.echo(f"next: headwater simulate check {shlex.quote(str(target))}")


def _show(finding: Finding) -> None:
    from rich.table import Table

    console = make_console()
    console.print(f"{finding.path}: {finding.what}")
    table = Table(title=f"{finding.records} records")
    for name in ("column", "kind", "distinct", "missing", "seen (stays here)", "guess"):
        table.add_column(name, justify="right" if name in ("distinct", "missing") else "left")
    for column in finding.columns[:_MOST_ROWS]:
        is_patient = bool(finding.patient) and column.name == finding.patient
        guess = "label" if column.name == finding.label else "patient" if is_patient else ""
        # Ids, dates, paths and notes belong to one record each: the screen shows none.
        seen = _describe(column) if column.kind in _SHOWN and not is_patient else ""
        cells = [column.name, column.kind, str(column.distinct), str(column.missing), seen, guess]
        table.add_row(*(plain(cell) for cell in cells))
    console.print(table)
    if len(finding.columns) > _MOST_ROWS:
        console.print(f"and {len(finding.columns) - _MOST_ROWS} more columns")
    for note in finding.notes:
        console.print(plain(note, _MOST_SHOWN))


def _describe(column: ColumnFacts) -> str:
    if column.values:
        text = ", ".join(column.values)
        return text if len(text) <= 40 else f"{text[:37]}..."
    return "" if column.observed is None else f"{column.observed[0]:g} to {column.observed[1]:g}"
