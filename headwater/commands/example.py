"""`example`: copies the example configurations that come with the installation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from common.errors import nearest
from common.process.console import reported_errors
from common.types import BadInput

FOLDER = Path(__file__).resolve().parents[1] / "examples"
_FOLDERS = ("simulations", "runs", "sites")


def example(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="An example; without it, all are listed")] = None,
    out: Annotated[Path, typer.Option(help="The folder to copy to")] = Path("."),
) -> None:
    """Lists the example configurations, or copies one into a folder.

    Example: headwater example demo
    """
    with reported_errors():
        examples = list_examples()
        if name is None:
            for key, path in examples.items():
                typer.echo(f"{key:<24}{_read_summary(path)}")
            return
        if name not in examples:
            raise BadInput(f"expected an example that `headwater example` lists, got {name!r}{nearest(name, examples)}")
        target = out / examples[name].name
        if target.exists():
            raise BadInput(f"{target}: expected a new file, but there is one; --out names another folder")
        out.mkdir(parents=True, exist_ok=True)
        target.write_text(adapt_paths(examples[name].read_text(encoding="utf-8"), target.name), encoding="utf-8")
        schema = f"{examples[name].parent.name.removesuffix('s')}.json"
        (out / schema.replace(".", ".schema.")).write_bytes((FOLDER.parent / "schema" / schema).read_bytes())
        typer.echo(f"{target}: relative paths in it are relative to {out.resolve()}")


def list_examples() -> dict[str, Path]:
    """Returns the example files: simulations by their name, run and site files as `runs/NAME` and `sites/NAME`."""
    paths = [path for folder in _FOLDERS for path in sorted((FOLDER / folder).glob("*.yaml"))]
    return {
        path.stem if path.parent.name == "simulations" else f"{path.parent.name}/{path.stem}": path for path in paths
    }


def adapt_paths(text: str, file_name: str) -> str:
    """Returns an example's text with the paths of a source checkout replaced by paths beside the copied file."""
    text = text.replace("../../../shared/assets", "assets").replace("../../headwater/schema/", "")
    text = re.sub(r"(\$schema=\w+)\.json", r"\1.schema.json", text)
    return re.sub(r"configs/\w+/" + re.escape(file_name), file_name, text.replace("../../", ""))


def _read_summary(path: Path) -> str:
    comments = [line.removeprefix("#").strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return next((line for line in comments if line and not line.startswith("yaml-language-server")), "")
