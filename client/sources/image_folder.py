"""Images in folders named after their label: `<label>/<image>`, or `train|test/<label>/<image>`; a folder or a zip."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from PIL import Image
from pydantic import AfterValidator

from client.sources import Example, Record
from client.sources._base import SourceSettings
from client.sources._pictures import read_picture, write_example_pictures
from client.sources._tree import Tree, open_tree
from common.plugins import LocalPath
from common.types import BadInput

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})


def _one_group(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"expected a regular expression, got one with an error: {error}") from error
    if groups != 1:
        raise ValueError(f"expected a regular expression with one group, got {groups}")
    return pattern


class ImageFolder(SourceSettings):
    """Settings: where, whether the first level is the split, and how a file's name holds the patient.

    Images have the one column `label`.

    Attributes:
        patient_pattern: regular expression, searched in the file's name; its one group is the patient id.
    """

    kind: Literal["image_folder"]
    path: LocalPath
    splits: bool = False
    patient_pattern: Annotated[str, AfterValidator(_one_group)] | None = None

    @classmethod
    def example(cls, folder: Path) -> Example:
        """Four pictures of three patients."""
        names = ["z-benign/q7-ann-1.png", "z-benign/q7-ann-2.png", "z-malignant/q7-bea-1.png", "z-other/q7-cem-1.png"]
        write_example_pictures(folder / "pictures", names)
        settings = {"kind": "image_folder", "path": str(folder / "pictures"), "patient_pattern": r"^(.*)-\d"}
        return Example(settings, ["q7-", "z-benign", "z-malignant", "z-other"])

    def open(self) -> Pictures:
        """The opened folder. Raises BadInput: missing, or without an image at the right depth."""
        depth = 3 if self.splits else 2
        tree = open_tree(self.path, "images").chosen(
            lambda name: name.suffix.lower() in SUFFIXES and len(name.parts) == depth
        )
        if not tree.stamps:
            raise BadInput(f"{self.path}: expected images as {'split/' if self.splits else ''}label/file, got none")
        return Pictures(self, tree, tuple(tree.stamps))


@dataclass(frozen=True)
class Pictures:
    """An opened folder or zip."""

    settings: ImageFolder
    tree: Tree = field(repr=False)
    names: tuple[str, ...] = field(repr=False)

    def digest(self) -> str:
        """Over every image's path and its size and time of change, or its checksum in a zip."""
        return self.tree.digest()

    def index(self) -> list[Record]:
        """Images in the order of their paths; `row` counts in this order."""
        return [self._record(number, name) for number, name in enumerate(self.names, start=1)]

    def _record(self, number: int, name: str) -> Record:
        parts = PurePosixPath(name).parts
        patient = None
        if self.settings.patient_pattern is not None:
            match = re.search(self.settings.patient_pattern, parts[-1])
            patient = (match.group(1) or "") if match else ""
        return Record(
            row=number,
            file=self.settings.path.name,
            key=name,
            patient=patient,
            split=parts[0] if self.settings.splits else None,
            cells={"label": parts[-2]},
        )

    def load(self, position: int) -> Image.Image:
        """One image."""
        return read_picture(io.BytesIO(self.tree.read(self.names[position], "image")))
