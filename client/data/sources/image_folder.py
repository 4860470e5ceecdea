"""Images of a folder or zip: `<label>/<image>`, `train|test/<label>/<image>`, or as a pattern reads their paths."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from client.data.sources import SourceExample, SourceRecord
from client.data.sources.parts.base import SourceSettings, digest
from client.data.sources.parts.masks import LazyCells, decode_mask, join_masks
from client.data.sources.parts.named import NamedGroups, Naming, OneGroup, find_patient
from client.data.sources.parts.pictures import (
    Background,
    Intensities,
    Look,
    read_picture,
    read_pictures,
    read_size,
    write_example_pictures,
)
from client.data.sources.parts.tree import Tree, make_readable, open_tree
from common.inputs import CellName, Several, encode_text
from common.plugins import LocalPath
from common.types import BadInput

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})


_BRACES = re.compile(r"\{(\w+)\}")


class ImageFolder(SourceSettings):
    """Settings: where, and how an image's path holds the columns.

    Without a pattern images have the one column `label`, the name of their folder.

    Attributes:
        path: a folder or zip.
        splits: whether the first level is the split: `train/<label>/<image>`.
        patient_pattern: regular expression, searched in the file's name; its one group is the patient id.
        pattern: regular expression, searched in a file's relative path; each named group is a column, and images lie
            anywhere below `path`. A file that it does not fit has empty cells.
        patient: the pattern's group that is the patient id.
        test: column of the pattern -> values: an image is held out where any of its cells is listed; all others are to
            train on. Without it the source states no split.
        masks: column -> path of an image's mask, relative to `path`, with the pattern's groups in braces:
            `masks/{frame}.png`. Only images that fit the pattern are then records; one without the file has no label.
            With `*` in the file's name, as in `{frame}/masks/*.png`, an image has one mask for each object, of 0 and
            any other number: together they are a mask of 0 and 1.
        window: lowest and highest intensity of pictures of more than 8 bits per value, or `full`, each one's own;
            without it they are bad records.
        background: what is behind transparent parts, `black` or `white`; without it pictures that have some are bad
            records.
    """

    kind: Literal["image_folder"]
    path: LocalPath
    splits: bool = False
    patient_pattern: OneGroup | None = None
    pattern: NamedGroups | None = None
    patient: str | None = None
    test: dict[str, list[CellName]] | None = None
    masks: dict[str, str] = {}
    window: Intensities | None = None
    background: Background | None = None

    @model_validator(mode="after")
    def _one_layout(self) -> ImageFolder:
        folders = [name for name in ("splits", "patient_pattern") if getattr(self, name)]
        named = [name for name in ("patient", "test") if getattr(self, name) is not None]
        named += ["masks"] if self.masks else []
        if self.pattern is not None and folders:
            raise ValueError(
                f"expected no {' and '.join(folders)} beside pattern: its named groups, patient and test say"
                " labels, patients and sides"
            )
        if self.pattern is None and named:
            raise ValueError(f"expected a pattern beside {' and '.join(named)}, which name its groups; got none")
        naming = self.naming()
        if naming is not None:
            naming.check()
            for column, path in self.masks.items():
                unknown = set(_BRACES.findall(path)) - set(re.compile(naming.pattern).groupindex)
                if unknown:
                    raise ValueError(
                        f"masks.{column}: expected groups of the pattern in braces, got {sorted(unknown)[0]!r}"
                    )
        return self

    @classmethod
    def example(cls, folder: Path) -> SourceExample:
        """Four pictures of three patients."""
        names = ["z-benign/q7-ann-1.png", "z-benign/q7-ann-2.png", "z-malignant/q7-bea-1.png", "z-other/q7-cem-1.png"]
        write_example_pictures(folder / "pictures", names)
        settings = {"kind": "image_folder", "path": str(folder / "pictures"), "patient_pattern": r"^(.*)-\d"}
        return SourceExample(settings, ["q7-", "z-benign", "z-malignant", "z-other"])

    def open(self) -> Pictures:
        """The opened folder. Raises BadInput: missing, or without an image at the right depth."""
        depth = None if self.pattern is not None else 3 if self.splits else 2
        fitting = re.compile(self.pattern) if self.pattern is not None and self.masks else None
        everything = open_tree(self.path, "images")
        tree = everything.chosen(
            lambda name: (
                name.suffix.lower() in SUFFIXES
                and depth in (None, len(name.parts))
                and (fitting is None or fitting.search(name.as_posix()) is not None)
            )
        )
        if not tree.stamps:
            layout = {None: "", 2: " as label/file", 3: " as split/label/file"}[depth]
            raise BadInput(f"{self.path}: expected images{layout}, got none")
        masks: dict[str, dict[str, tuple[str, ...]]] = {}
        if self.masks:
            folders: dict[str, list[str]] = {}
            for name in everything.stamps:
                folders.setdefault(PurePosixPath(name).parent.as_posix(), []).append(name)
            masks = self._locate_masks(tree.stamps, folders)
        used = {*tree.stamps, *(path for each in masks.values() for paths in each.values() for path in paths)}
        visible, chosen = everything.chosen(lambda name: True), everything.chosen(lambda name: name.as_posix() in used)
        return Pictures(self, chosen, tuple(tree.stamps), masks, len(visible.stamps) - len(chosen.stamps))

    def _locate_masks(
        self, names: Iterable[str], folders: Mapping[str, Sequence[str]]
    ) -> dict[str, dict[str, tuple[str, ...]]]:
        """Returns image -> column -> paths of the files of each mask that is there.

        Args:
            names: paths of the images.
            folders: path of each folder -> paths of the files in it.

        Raises:
            BadInput: a file is a mask of two images, by names of which one begins as the other.
        """
        fitting, known = re.compile(f"{self.pattern}"), {each for inside in folders.values() for each in inside}
        located: dict[str, dict[str, tuple[str, ...]]] = {}
        owners: dict[tuple[str, str], str] = {}
        for name in names:
            match, own = fitting.search(name), dict[str, tuple[str, ...]]()
            for column, written in self.masks.items():
                path = _fill(written, match)
                whole = PurePosixPath(path)
                if "*" not in whole.name:
                    exact = _show(whole.as_posix())
                    own |= {column: (exact,)} if exact in known else {}
                    continue
                inside = folders.get(_show(whole.parent.as_posix()), ())
                escaped = re.compile(".*".join(re.escape(_show(part)) for part in whole.name.split("*")))
                paths = tuple(each for each in inside if escaped.fullmatch(PurePosixPath(each).name))
                if any(owners.setdefault((column, each), path) != path for each in paths):
                    raise BadInput(
                        f"masks.{column}: expected a path by which a file is a mask of one image, got one of two, as "
                        "one image's name begins as another's; put more of the name in front of the `*`"
                    )
                own |= {column: paths} if paths else {}
            located[name] = own
        return located

    def naming(self) -> Naming | None:
        """Returns the rule by which an image's path is read where there is a pattern."""
        return None if self.pattern is None else Naming(self.pattern, self.patient, self.test)


def _fill(written: str, match: re.Match[str] | None) -> str:
    """Returns a path with what its groups hold; a star that one holds is no pattern, and is hidden (`_show`)."""
    return _BRACES.sub(lambda group: ((match and match[group[1]]) or "").replace("*", "\0"), written)


def _show(text: str) -> str:
    """Returns a path with its own stars: none holds a null character."""
    return text.replace("\0", "*")


@dataclass(frozen=True)
class Pictures:
    """An opened folder or zip."""

    settings: ImageFolder = field(repr=False)
    tree: Tree = field(repr=False)
    names: tuple[str, ...] = field(repr=False)
    masks: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict, repr=False)
    passed_over: int = 0

    def digest(self) -> str:
        """Over every image's and mask's path and its size and time of change, or its checksum in a zip."""
        own = self.settings
        # The same files may be the masks of one source and the images of another.
        names = self.names if self.masks else ()
        return digest(map(encode_text, (f"2 {own.window} {own.background}", self.tree.digest(), *names)))

    def index(self) -> list[SourceRecord]:
        """Images in the order of their paths; `row` counts in this order."""
        naming, file = self.settings.naming(), self.settings.path.name
        return [
            self._by_folder(number, name) if naming is None else self._add_masks(naming.record(number, file, name))
            for number, name in enumerate(self.names, start=1)
        ]

    def _by_folder(self, number: int, name: str) -> SourceRecord:
        parts = PurePosixPath(make_readable(name)).parts
        return SourceRecord(
            row=number,
            file=self.settings.path.name,
            key=name,
            path=name,
            patient=find_patient(self.settings.patient_pattern, parts[-1]),
            split=parts[0] if self.settings.splits else None,
            cells={"label": parts[-2]},
        )

    def _add_masks(self, record: SourceRecord) -> SourceRecord:
        if not self.settings.masks:
            return record
        known = self.masks[record.key]
        blank = {column: "" for column in self.settings.masks}
        read = {column: partial(self._read_mask, record.key, column) for column in known}
        return replace(record, cells=LazyCells({**record.cells, **blank}, read))

    def _read_mask(self, name: str, column: str) -> str:
        size, paths = read_size(io.BytesIO(self.tree.read(name, "image"))), self.masks[name][column]
        cells = (decode_mask(self.tree.read(path, "mask"), PurePosixPath(path).suffix, size) for path in paths)
        return next(cells) if "*" not in PurePosixPath(self.settings.masks[column]).name else join_masks(cells)

    def load(self, position: int) -> Image.Image | Several:
        """One image, or the pages of one file."""
        # A mask is of one picture.
        read = read_picture if self.masks else read_pictures
        look = Look(self.settings.window, self.settings.background)
        return read(io.BytesIO(self.tree.read(self.names[position], "image")), look)
