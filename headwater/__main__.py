"""The command `headwater`: simulate, coordinator, site, schema and example."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

ROOMS = ("common", "client", "server", "simulations")


def main() -> None:
    """Runs the command line; ends with one sentence where another package hides one of Headwater's."""
    problem = find_hidden_room(Path(__file__).resolve().parents[1], [Path.cwd(), *map(Path, sys.path)])
    if problem:
        sys.exit(f"error: {problem}")
    from common.process.console import run_app

    run_app(make_app())


def find_hidden_room(home: Path, folders: list[Path]) -> str | None:
    """Returns a sentence where one of Headwater's packages would be imported from elsewhere; None where none would.

    The working directory counts, because Headwater starts processes of its own there.

    Args:
        home: the folder that holds the `headwater` package and the rooms beside it.
        folders: folders that are searched for packages, in order.
    """
    for room in ROOMS:
        for folder in folders:
            found = [path for path in (folder / room / "__init__.py", folder / f"{room}.py") if path.is_file()]
            if found and folder.resolve() != home:
                return (
                    f"{found[0].resolve()} hides Headwater's own package {room!r} in {home}; work in another folder, "
                    "or install Headwater in an environment of its own"
                )
            if found:
                break
        else:
            # An editable installation finds its packages by other means than the search path.
            if not (home / room / "__init__.py").is_file():
                return f"expected Headwater's package {room!r} in {home}, found none; install Headwater again"
    return None


def make_app() -> typer.Typer:
    """Returns the whole command line; a verb's module is imported when the verb is called."""
    import typer

    from client.__main__ import app as site
    from common.process.console import make_verbs_app
    from server.__main__ import app as coordinator
    from simulations.__main__ import app as simulate

    app = make_verbs_app(
        "headwater.commands",
        "Federated, privacy-preserving transfer learning.\n\n"
        "Start with: headwater example demo, then headwater simulate pretrain demo.yaml and "
        "headwater simulate run demo.yaml",
        completion=True,
    )
    app.add_typer(simulate, name="simulate")
    app.add_typer(coordinator, name="coordinator")
    app.add_typer(site, name="site")

    def show_version(value: bool) -> None:
        if value:
            typer.echo(f"headwater {_find_version()}")
            raise typer.Exit

    @app.callback()
    def start(
        version_: bool = typer.Option(
            False, "--version", callback=show_version, is_eager=True, help="Show the version"
        ),
    ) -> None:
        """Runs before every verb."""

    return app


def _find_version() -> str:
    try:
        return version("headwater")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    main()
