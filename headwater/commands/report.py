"""`report`: writes what a run brought and cost as one page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from common.errors import explain_os_error
from common.files import write_atomic
from common.process.console import reported_errors, shown_progress
from common.types import BadInput


def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RUN ...]", help="Folders of runs; several, or a sweep's, are compared"),
    ] = None,
    out: Annotated[Path, typer.Option(help="The page to write; an older one is replaced")] = Path("report.html"),
    site: Annotated[Path | None, typer.Option(help="A site file: its own report, which must stay there")] = None,
    run: Annotated[str | None, typer.Option(help="With --site: id of the run; by default the last that ended")] = None,
    coordinator: Annotated[
        str | None, typer.Option(help="With --site: name of the coordinator, where the site file has several")
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(
            help="Of one run: public pictures, a file or folder, on which its model's masks or boxes are shown"
        ),
    ] = None,
) -> None:
    """Writes a report as one HTML page: results, curves, privacy spent, who took part, cost.

    Example: headwater report runs/demo-20260101-120000-ab12 --out report.html
    """
    with reported_errors():
        if bool(runs) == (site is not None):
            raise BadInput("expected folders of runs, or --site SITE.yaml for a site's own report")
        if site is None and (run or coordinator):
            raise BadInput("--run, --coordinator: expected --site SITE.yaml with them")
        if pictures is not None and len(runs or []) != 1:
            raise BadInput("--pictures: expected one run with it; a site's report has pictures of its own")
        page = _write_site_page(site, run, coordinator) if site is not None else _write_runs_page(runs or [], pictures)
        try:
            write_atomic(out, page.encode("utf-8", errors="replace"))
        except OSError as error:
            raise BadInput(f"--out: expected a file that can be written, got {explain_os_error(error)}") from error
        typer.echo(f"report: {out}")


def _write_runs_page(folders: list[Path], pictures: Path | None) -> str:
    from common.report.page import write_report
    from server.reports.comparison import make_comparison_page
    from server.reports.reported_run import read_runs
    from server.reports.run_report import make_run_page

    runs = read_runs(folders)
    if pictures is None:
        return write_report(make_run_page(runs[0]) if len(runs) == 1 else make_comparison_page(runs))
    from client.prediction.gallery import show_public_gallery

    page = make_run_page(runs[0])
    return write_report(replace(page, sections=[*page.sections, *show_public_gallery(folders[0], pictures)]))


def _write_site_page(site: Path, run: str | None, coordinator: str | None) -> str:
    from client.config import SiteConfig
    from client.personal.report import make_site_page
    from client.prediction.examples import show_home_examples
    from client.prediction.gallery import show_home_gallery
    from client.protocol.site import Site
    from common.privacy.noise import os_entropy
    from common.report.page import write_report
    from common.yaml import load

    with shown_progress() as observe:
        opened = Site(load(SiteConfig, site).select(coordinator), os_entropy)
        own = [*show_home_gallery(opened, run), *show_home_examples(opened, run)]
        return write_report(make_site_page(opened, run, observe, own))
