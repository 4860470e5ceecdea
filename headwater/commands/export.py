"""`export`: writes a finished model in a format that other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.process.console import reported_errors
from common.types import BadInput


def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model's folder, or a finished run's")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder")],
    format_: Annotated[str, typer.Option("--format", help="huggingface, monai, onnx or torch")],
    task: Annotated[list[str] | None, typer.Option(help="A task; without it, all of the model")] = None,
    without_backbone: Annotated[
        list[str] | None, typer.Option(help="Name or digest of a backbone whose licence forbids to hand it on")
    ] = None,
    backbones: Annotated[Path | None, typer.Option(help="Weights that the model was handed on without")] = None,
) -> None:
    """Exports a finished model for programs that know nothing of Headwater.

    Example: headwater export runs/mine exported --format onnx
    """
    with reported_errors():
        from common.exports import check_folder, open_format

        _refuse_personal(model)
        opened = open_format(format_)
        check_folder(folder)
        from common.exports import write_export
        from common.serving.network import open_model

        exported = write_export(
            open_model(model, backbones=backbones),
            folder,
            opened,
            tasks=task or (),
            without=without_backbone or (),
        )
        for path in sorted(folder.iterdir()):
            typer.echo(f"{path.name:<28}{path.stat().st_size:>12,} bytes")
        if exported.left_out:
            typer.echo(exported.explain_left_out())


def _refuse_personal(path: Path) -> None:
    """Refuses the file of a site's personal heads. Raises BadInput."""
    from client.personal.personal_heads import NEVER_LEAVES
    from client.protocol.site import PERSONAL_HEADS

    if path.is_file() and (path.name == PERSONAL_HEADS or path.read_bytes()[:64].startswith(NEVER_LEAVES.encode())):
        raise BadInput(f"{path}: {NEVER_LEAVES}; name the run's folder to export the federated model instead")
