"""Formats that a finished model is exported to, for programs that know nothing of Headwater. One file is one format.

An export is a folder of its own: the format's files, `preprocessing.json` (what comes before the network and what its
numbers mean) and `README.md` (a model card). Both are written for every format by `write_export`.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from common.files import write_atomic
from common.plugins import refuse_unknown_kind, resolve
from common.types import BadInput

if TYPE_CHECKING:
    from common.exports.parts.exported import Exported
    from common.exports.parts.facts import RunFacts
    from common.serving.network import Model

PACKAGE = "common.exports"


class Format(Protocol):
    """The members that every plug-in file's class must have.

    Law (tests/contracts/test_exports.py): programs that know nothing of Headwater get `predict`'s numbers from the
    folder, to 1e-5; a refusal is one sentence and leaves no file.

    Attributes:
        kind: file name of the plug-in.
        packages: packages that writing needs besides Headwater's own.
        extra: the extra of Headwater's installation that brings them; null where nothing is needed.
        one_task: whether a folder holds one task only.
        library: library that loads the folder, as Hugging Face names it.
    """

    kind: str
    packages: ClassVar[tuple[str, ...]]
    extra: ClassVar[str | None]
    one_task: ClassVar[bool]
    library: ClassVar[str]

    def write(self, exported: Exported, folder: Path) -> list[str]:
        """Writes the format's own files, and returns sentences that say how each is used, for the model card.

        Raises:
            BadInput: the format cannot hold the model.
        """


def open_format(name: str) -> Format:
    """Returns a format.

    Raises:
        BadInput: there is none of that name, or a package that it needs is not installed.
    """
    refuse_unknown_kind(PACKAGE, name, "--format")
    opened: Format = resolve(PACKAGE, {"kind": name}, "--format")
    check_packages(opened)
    return opened


def check_packages(opened: Format) -> None:
    """Checks that the packages of a format are installed. Raises BadInput."""
    missing = [package for package in opened.packages if importlib.util.find_spec(package) is None]
    if missing:
        raise BadInput(
            f"--format {opened.kind}: expected the package{'s' if len(missing) > 1 else ''} {', '.join(missing)}, "
            f"which `pip install 'headwater[{opened.extra}]'` installs"
        )


def check_folder(folder: Path) -> None:
    """Checks that nothing would be overwritten. Raises BadInput."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder}: expected a new or empty folder, found something there")


def write_export(
    model: Model,
    folder: Path,
    opened: Format,
    *,
    tasks: Sequence[str] = (),
    without: Sequence[str] = (),
    facts: RunFacts | None = None,
) -> Exported:
    """Writes a model in a format, to a new or empty folder; a failure leaves no file.

    Args:
        model: the finished model.
        folder: the new folder.
        opened: the format.
        tasks: the tasks; empty for all of the model.
        without: names or digests of backbones that are left out, because their licence forbids to hand them on.
        facts: what the run's folder says beside the model, for the card.

    Raises:
        BadInput: the folder is not empty, there is no such task or backbone, or the format cannot hold the model.
    """
    from common.exports.parts.card import write_card
    from common.exports.parts.exported import select
    from common.serving.folder import refuse_home_model

    check_folder(folder)
    refuse_home_model(folder, model.config)
    exported = replace(select(model, tasks, without, one_task=opened.one_task, name=opened.kind), facts=facts)
    fresh = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        used = opened.write(exported, folder)
        write_atomic(folder / "preprocessing.json", exported.write_metadata())
        for name, content in exported.files.items():
            write_atomic(folder / name, content)
        for path in folder.rglob("*"):
            if path.is_file():
                # Libraries write with the user's mask.
                path.chmod(0o600)
        # Last: a folder without it is not whole.
        write_atomic(folder / "README.md", write_card(exported, opened.kind, used, opened.library).encode())
    except BaseException:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if fresh:
            folder.rmdir()
        raise
    return exported
