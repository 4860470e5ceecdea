"""Command line of one site: `python -m client init | check | start | approve | evaluate | budget | log | ...`.

Only the verb's own module is imported: a site that waits for requests holds no torch, its worker does.
"""

from __future__ import annotations

import importlib
import logging
import sys

import typer

from client.commands import deploy_verbs as commands_deploy

OTHERS = ("client.commands.run_verbs", "client.commands.budget_verbs")
_HELP = "Command line of one site: join a coordinator, approve runs, watch the budget."
LIGHT = ("init", "check", "start", "digest")


def command_line(verb: str | None) -> typer.Typer:
    """The verbs; those of other modules than the given verb's may be left out."""
    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=_HELP)
    commands_deploy.register(app)
    for name in () if verb in LIGHT else OTHERS:
        importlib.import_module(name).register(app)
    return app


app = command_line(sys.argv[1] if __name__ == "__main__" and len(sys.argv) > 1 else None)

if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    app()
