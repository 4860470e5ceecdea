"""What the three command lines share: progress while work goes on, one clear sentence when it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from common.types import BadInput, HeadwaterError, Interrupted

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


@contextmanager
def reported_errors() -> Iterator[None]:
    """Turn an error a user can act on into one sentence on stderr and an exit code.

    2 for bad input, 130 for a run that Ctrl-C ended, 1 for the rest.
    """
    try:
        yield
    except HeadwaterError as error:
        Console(stderr=True, highlight=False).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(_exit_code(error)) from error


def _exit_code(error: HeadwaterError) -> int:
    if isinstance(error, Interrupted):
        return EXIT_INTERRUPTED
    return EXIT_BAD_INPUT if isinstance(error, BadInput) else EXIT_FAILED


@contextmanager
def shown_progress() -> Iterator[Callable[[str, int, int], None]]:
    """An observer that draws a bar for each phase on stderr; on a pipe it prints a line when a phase ends."""
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def observe(phase: str, done: int, total: int) -> None:
            if phase not in bars:
                bars[phase] = progress.add_task(phase, total=total)
            progress.update(bars[phase], completed=done, total=total)
            if not console.is_terminal and done == total:
                console.print(f"{phase}: {done} of {total}")

        yield observe
