"""`audit`: attacks a run's solver on synthetic records."""

from __future__ import annotations

import typer
from rich.console import Console

from client.commands.parts.options import Json, RunFile, Set, SiteFile
from client.config import SiteConfig
from common.process.console import EXIT_FAILED, print_json, reported_errors
from common.run import RunConfig
from common.yaml import load


def audit(site: SiteFile, run: RunFile, set_: Set = None, json_: Json = False) -> None:
    """Attacks a run's solver on synthetic records, with this site's sizes; exit code 1 when a privacy claim fails.

    Example: headwater site audit site.yaml run.yaml --json
    """
    from client.audit.audit import audit_run, make_audit_table  # Here: it loads a third of a second of statistics.

    with reported_errors():
        config, wanted = load(SiteConfig, site, set_ or []), load(RunConfig, run)
        sizes = {name: task.public_size for name, task in config.tasks.items() if name in wanted.tasks}
        result = audit_run(wanted, config.unit, sizes, delta=config.budget.delta)
        if json_:
            print_json(result.model_dump(mode="json"))
        else:
            Console().print(make_audit_table(result))
        for reason in result.reasons:
            typer.echo(f"error: {reason}", err=True)
        if not result.passed:
            raise typer.Exit(EXIT_FAILED)
