"""Files without a table that lists them, as a source: a folder, a zip, one file, or a list of paths.

A file's suffix says how it is read; the readers are those of the sources that name such files in a table.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from client.data.sources import SourceRecord
from client.data.sources.dicom import Dicom
from client.data.sources.image_folder import SUFFIXES as PICTURES
from client.data.sources.nifti import Nifti
from client.data.sources.parts.base import digest
from client.data.sources.parts.dicom.files import has_frames
from client.data.sources.parts.pictures import read_pictures
from client.data.sources.parts.recordings import SUFFIXES as RECORDINGS
from client.data.sources.parts.recordings import read_recording, require_soundfile
from client.data.sources.parts.series import read_series
from client.data.sources.parts.tree import make_readable, open_tree, read_file
from client.data.sources.volumes import Volumes
from common.inputs import Text, encode_text
from common.types import BadInput, BadRecord

Read = Callable[[bytes, Path], Any]
"""The content and the path of a file -> an item."""


def _read_text(data: bytes, path: Path) -> Text:
    del path
    try:
        return Text(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise BadRecord("expected text in UTF-8") from None


def _read_dicom(data: bytes, path: Path) -> Any:
    del data
    return Dicom(kind="dicom", path=path).read(path)


def _read_nifti(data: bytes, path: Path) -> Any:
    del data
    return Nifti(kind="nifti", path=path).read(path)


def _read_volume(data: bytes, path: Path) -> Any:
    del data
    return Volumes(kind="volumes", path=path).read(path)


def _require_package(package: str, extra: str) -> Callable[[], None]:
    def require() -> None:
        if importlib.util.find_spec(package) is None:
            raise BadInput(f"data: expected the package {package}; install headwater[{extra}]")

    return require


@dataclass(frozen=True)
class FileKind:
    """Files that are read alike.

    Attributes:
        name: what they are called, in the plural.
        suffixes: how their names end, in small letters.
        read: reads one.
        by_path: whether the reader opens the file itself, which then stands in no zip.
        require: raises BadInput where a package is missing.
        as_volumes: the same files, each read as a whole volume; None where they hold none.
    """

    name: str
    suffixes: frozenset[str]
    read: Read = field(repr=False)
    by_path: bool = False
    require: Callable[[], None] = lambda: None
    as_volumes: FileKind | None = None


def _make_scans(name: str, suffixes: frozenset[str], read: Read, require: Callable[[], None]) -> FileKind:
    whole = FileKind(f"{name}, read whole", suffixes, _read_volume, True, _require_package("nibabel", "nifti"))
    return FileKind(name, suffixes, read, True, require, whole)


_DICOM = _make_scans("DICOM files", frozenset({".dcm", ".dicom"}), _read_dicom, _require_package("pydicom", "dicom"))

FILE_KINDS = (
    FileKind("pictures", PICTURES, lambda data, path: read_pictures(io.BytesIO(data))),
    _DICOM,
    _make_scans("NIfTI volumes", frozenset({".nii", ".nii.gz"}), _read_nifti, _require_package("nibabel", "nifti")),
    FileKind("recordings", RECORDINGS, lambda data, path: read_recording(data), require=require_soundfile),
    FileKind("arrays", frozenset({".npy"}), lambda data, path: read_series(data, ".npy", "keep")),
    FileKind("texts", frozenset({".txt"}), _read_text),
)
"""In this order they are tried where a folder holds several."""


def find_kind(name: str, path: Path | None = None) -> FileKind | None:
    """Returns how a file is read; None where no model reads such files.

    Args:
        name: its name.
        path: its path, by whose first bytes a DICOM file without a suffix is known; None where it has none.
    """
    lower = name.lower()
    found = next((kind for kind in FILE_KINDS if lower.endswith(tuple(kind.suffixes))), None)
    if found is None and path is not None and not Path(name).suffix.strip(".0123456789") and _is_dicom(path):
        return _DICOM
    return found


def _is_dicom(path: Path) -> bool:
    """Returns whether a file begins as a DICOM file does; scanners often name them by numbers alone."""
    try:
        if not path.is_file():
            return False  # A pipe would be waited for.
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def strip_suffix(name: str) -> str:
    """Returns a file's name without the end that says how it is read."""
    ends = [suffix for kind in FILE_KINDS for suffix in kind.suffixes if name.lower().endswith(suffix)]
    return (name[: -max(map(len, ends))] if ends else "") or name


def list_suffixes() -> str:
    """Returns the ends of all names that are read, for messages."""
    return ", ".join(sorted(suffix for kind in FILE_KINDS for suffix in kind.suffixes))


@dataclass(frozen=True)
class LooseFiles:
    """Some files, each of which is one record.

    Attributes:
        kind: how they are read.
        names: what each is called in the output.
        fetch: name -> content; raises BadRecord or OSError.
        find: name -> path.
        stamps: name -> size and time of change.
        folders: name -> name of its folder, whose files may be one volume; None where files were named one by one.
    """

    kind: FileKind
    names: Sequence[str] = field(repr=False)
    fetch: Callable[[str], bytes] = field(repr=False)
    find: Callable[[str], Path] = field(repr=False)
    stamps: Mapping[str, str] = field(repr=False)
    folders: Callable[[str], str] | None = field(default=None, repr=False)

    def as_volumes(self) -> LooseFiles | None:
        """Returns the same files as whole volumes; None where they are none.

        DICOM files of one picture each are a volume together with those in their folder.
        """
        whole = self.kind.as_volumes
        if whole is None:
            return None
        whole.require()
        if self.kind is not _DICOM or self.folders is None:
            return replace(self, kind=whole)
        files: dict[str, list[str]] = {}
        for name in self.names:
            own = name if has_frames(self.find(name)) else self.folders(name)
            files.setdefault(own, []).append(name)
        stamps = {name: " ".join(self.stamps.get(each, "") for each in own) for name, own in files.items()}
        return replace(self, kind=whole, names=list(files), stamps=stamps)

    def digest(self) -> str:
        """Over every file's name, size and time of change."""
        return digest(encode_text(part) for name in self.names for part in (name, self.stamps.get(name, "")))

    def index(self) -> list[SourceRecord]:
        """Returns the files in their order."""
        return [
            SourceRecord(number, make_readable(shown), name, patient=None, split=None, cells={}, path=shown)
            for number, (name, shown) in enumerate(zip(self.names, map(self._show, self.names), strict=True), start=1)
        ]

    def load(self, position: int) -> Any:
        """Returns one file's item."""
        name = self.names[position]
        try:
            return self.kind.read(b"" if self.kind.by_path else self.fetch(name), self.find(name))
        except (OSError, ValueError):
            # From None: these messages name the file, and so perhaps a patient.
            raise BadRecord("missing or unreadable file") from None

    def locate(self, position: int) -> Path:
        """Returns one file's path."""
        return self.find(self.names[position])

    def _show(self, name: str) -> str:
        # The files of the folder itself are one volume, which is called like it.
        return self.find(name).resolve().name if name == "." else name


def open_files(path: Path) -> list[LooseFiles]:
    """Returns the files of a folder or zip that can be read, of each kind; or one file.

    Raises:
        BadInput: there is none, or a package is missing that reads them.
    """
    if path.is_file() and path.suffix.lower() not in (".zip", ".whl"):
        return list_files([str(path)], {str(path): path.name})
    whole = open_tree(path, "files")
    tree = whole.chosen(lambda name: find_kind(name.name, None if whole.archive else path / name) is not None)
    if not tree.stamps:
        raise BadInput(
            f"{path}: expected files that a model can read ({list_suffixes()}), found none; of other records give the "
            ".yaml with their source's settings, or a table that lists them"
        )
    found = _divide(
        list(tree.stamps),
        lambda name: tree.read(name, "file"),
        lambda name: tree.path / name,
        tree.stamps,
    )
    found = [replace(files, folders=lambda name: str(PurePosixPath(name).parent)) for files in found]
    if tree.archive is not None and found[0].kind.by_path:
        raise BadInput(f"{path}: expected a folder with {found[0].kind.name}, got a zip; unpack it")
    return found


def list_files(paths: Sequence[str | Path], shown: Mapping[str, str] | None = None) -> list[LooseFiles]:
    """Returns files by their paths, of each kind.

    Args:
        paths: the files.
        shown: path -> what it is called in the output; by default the path.

    Raises:
        BadInput: there is none, one has a suffix that is not known, or a package is missing.
    """
    names = [(shown or {}).get(str(path), str(path)) for path in paths]
    located = dict(zip(names, map(Path, paths), strict=True))
    unknown = [path.suffix for name, path in located.items() if find_kind(name, path) is None]
    if unknown or not located:
        got = f"a file that ends in {unknown[0]!r}" if unknown else "none"
        raise BadInput(f"data: expected files that a model can read ({list_suffixes()}), got {got}")
    return _divide(names, lambda name: read_file(located[name], "file"), located.__getitem__, {})


def _divide(
    names: Sequence[str],
    fetch: Callable[[str], bytes],
    locate: Callable[[str], Path],
    stamps: Mapping[str, str],
) -> list[LooseFiles]:
    found = []
    for kind in FILE_KINDS:
        own = [name for name in names if find_kind(name, locate(name) if kind is _DICOM else None) is kind]
        if own:
            kind.require()
            found.append(LooseFiles(kind, own, fetch, locate, stamps))
    return found
