"""`report`: writes what a run brought and cost as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.errors import instead
from common.files import write_atomic
from common.process.console import reported_errors
from common.types import BadInput


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN ...", help="Folders of runs; several are compared")],
    out: Annotated[Path, typer.Option(help="The page to write; an older one is replaced")] = Path("report.html"),
) -> None:
    """Writes a report as one HTML page: results, curves, privacy spent, who took part, cost.

    Example: headwater report runs/demo-20260101-120000-ab12 --out report.html
    """
    with reported_errors():
        page = _write_runs_page(runs)
        try:
            write_atomic(out, page.encode("utf-8", errors="replace"))
        except OSError as error:
            raise BadInput(f"--out {out}: expected a file that can be written{instead(error)}") from error
        typer.echo(f"report: {out}")


def _write_runs_page(folders: list[Path]) -> str:
    from common.report.page import write_report
    from server.reports.comparison import make_comparison_page
    from server.reports.reported_run import read_runs
    from server.reports.run_report import make_run_page

    runs = read_runs(folders)
    return write_report(make_run_page(runs[0]) if len(runs) == 1 else make_comparison_page(runs))
