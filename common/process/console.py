"""Parts of every command line: verbs found by file name, progress while work goes on, one sentence on failure.

A folder of verbs is a plug-in folder: `commands/plan.py` is the verb `plan`, and its function `plan` is what runs; an
underscore in the file's name is a hyphen in the verb's. A verb's module is imported when the verb is called or its own
help is asked for; the list of verbs is read from the files' text, so that it answers at once whatever a verb needs.
"""

from __future__ import annotations

import ast
import gc
import importlib
import importlib.util
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import click
import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup
from typer.models import ArgumentInfo

from common.errors import explain_os_error
from common.process.lines import FAILED, ProgressLines, is_json, write_json
from common.types import BadInput, HeadwaterError, Interrupted

if TYPE_CHECKING:
    from rich.console import Console

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

PIPE_WIDTH = 100
"""Columns of a table on a pipe, which has no width of its own."""


# --- verbs -----------------------------------------------------------------------------------------------------------


class VerbGroup(TyperGroup):
    """A group of commands whose members are the files of one folder; `package` is set by `make_verbs_app`."""

    package = ""

    def __init__(self, *, commands: dict[str, click.Command] | None = None, **settings: Any) -> None:
        """Lists the folder's verbs by their names and first docstring lines; no verb is imported."""
        listed = {name: TyperCommand(name, help=text) for name, text in read_verbs(self.package).items()}
        super().__init__(commands={**(commands or {}), **listed}, **settings)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Returns a verb with its arguments and options: imports its module."""
        if cmd_name in read_verbs(self.package):
            return load_verb(self.package, cmd_name)
        return super().get_command(ctx, cmd_name)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the list of verbs; no verb is imported."""
        self._as_plain_group().format_help(ctx, formatter)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        """Completes a verb's name; no verb is imported."""
        return self._as_plain_group().shell_complete(ctx, incomplete)

    def _as_plain_group(self) -> TyperGroup:
        return TyperGroup(
            name=self.name,
            commands=dict(self.commands),
            params=self.params,
            help=self.help,
            rich_markup_mode=self.rich_markup_mode,
        )


def make_verbs_app(package: str, help_: str, *, completion: bool = False) -> typer.Typer:
    """Returns a command line whose verbs are the files of a folder.

    Args:
        package: dotted name of the folder, such as `client.commands`.
        help_: text above the list of verbs.
        completion: adds the options that install completion for the user's shell.
    """
    group = type("Verbs", (VerbGroup,), {"package": package})
    app = typer.Typer(
        cls=group, no_args_is_help=True, add_completion=completion, pretty_exceptions_enable=False, help=help_
    )

    @app.callback()
    def start() -> None:
        """Keeps the verb's name on the command line also where there is only one verb."""

    return app


@cache
def read_verbs(package: str) -> dict[str, str]:
    """Returns the verbs of a folder with the first lines of their docstrings, sorted by name; nothing is imported.

    Raises:
        ValueError: a file has no function of its own name, or the function has no docstring.
    """
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None
    paths = sorted(path for folder in spec.submodule_search_locations for path in Path(folder).glob("*.py"))
    files = [path for path in paths if not path.stem.startswith("_")]
    return {path.stem.replace("_", "-"): _read_first_line(path) for path in files}


def load_verb(package: str, verb: str) -> click.Command:
    """Returns a verb as a command with its arguments and options: imports its module."""
    name = verb.replace("-", "_")
    module = importlib.import_module(f"{package}.{name}")
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    function = getattr(module, name)
    app.command(verb)(function)
    command = typer.main.get_command(app)
    _restore_argument_help(command, function)
    return command


def _restore_argument_help(command: click.Command, function: Callable[..., None]) -> None:
    """Gives each argument its help text again, which click 8.5 takes away from those that typer makes."""
    hints = get_type_hints(function, include_extras=True)
    for parameter in command.params:
        for note in getattr(hints.get(parameter.name or ""), "__metadata__", ()):
            if isinstance(parameter, TyperArgument) and isinstance(note, ArgumentInfo):
                parameter.help = note.help


def run_app(app: typer.Typer) -> None:
    """Runs a command line as the whole program."""
    logging.basicConfig(level=logging.WARNING)
    # Imports make half a million objects and no garbage: looking for it is a fifth of importing torch and torchvision.
    gc.set_threshold(50_000, 20)
    app()


def _read_first_line(path: Path) -> str:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == path.stem:
            text = ast.get_docstring(node)
            if text:
                return text.splitlines()[0]
    raise ValueError(f"{path}: expected a function {path.stem!r} with a docstring, got none")


# --- errors, progress, tables ----------------------------------------------------------------------------------------


@contextmanager
def reported_errors() -> Iterator[None]:
    """Turns an error a user can act on into one sentence on stderr and an exit code.

    2 for bad input, 130 for a run that Ctrl-C ended, 1 for the rest.
    """
    try:
        yield
    except HeadwaterError as error:
        _print_error(str(error))
        raise typer.Exit(_find_exit_code(error)) from error
    except BrokenPipeError:
        raise  # Who reads the output has seen enough, as with `| head`.
    except OSError as error:
        # The last resort: where a file's part is known, a sentence of its own was raised instead.
        _print_error(explain_os_error(error))
        raise typer.Exit(EXIT_FAILED) from error


def _print_error(sentence: str) -> None:
    # A name in it may be a stranger's: a terminal obeys what does not print.
    sentence = "".join(char if char.isprintable() or char == "\n" else "?" for char in sentence)
    if is_json():
        write_json(sys.stderr, sentence, event=FAILED, level="error")
        return
    from rich.console import Console

    Console(stderr=True, highlight=False).print(f"error: {sentence}", style="red", markup=False, soft_wrap=True)


def _find_exit_code(error: HeadwaterError) -> int:
    if isinstance(error, Interrupted):
        return EXIT_INTERRUPTED
    return EXIT_BAD_INPUT if isinstance(error, BadInput) else EXIT_FAILED


@contextmanager
def shown_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yields an observer that draws a bar for each phase on stderr.

    On a pipe it prints a line when a phase ends, and one now and then while a long one lasts.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False, markup=False)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bars: dict[str, TaskID] = {}
    lines: dict[str, ProgressLines] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def observe(phase: str, done: int, total: int) -> None:
            if phase not in bars:
                bars[phase] = progress.add_task(phase, total=total)
            progress.update(bars[phase], completed=done, total=total)
            if console.is_terminal:
                return
            if done == total:
                console.print(f"{phase}: {done} of {total}")
            else:
                lines.setdefault(phase, ProgressLines(phase, console.print, unit=""))(done, total)

        yield observe


def make_console() -> Console:
    """Returns a console on stdout whose tables are wide enough also on a pipe; a stranger's text is no markup."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False, markup=False)


def print_json(values: Any) -> None:
    """Prints values as JSON on stdout; NaN and infinity are refused because they are no JSON."""
    typer.echo(json.dumps(values, indent=2, allow_nan=False))
