"""Data without settings: the shape of a file or folder, and the model's backbone, say how it is read.

    a folder or zip        its files of the kind that the backbone takes
    CSV, TSV, Parquet      feature columns, where the backbone names some; else a column of texts or of files' paths
    .npz                   its array of records
    any other file         that file

No message repeats a cell, nor the name of a column that a user did not write: where a file has no header, its first
record would be taken for one.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from client.data.sources import Source, open_source
from client.data.sources.manifest import ListedTexts, Manifest
from client.data.sources.parts.boundary import try_record
from client.data.sources.parts.frame import FAULT, convert_frame, read_frame
from client.data.sources.parts.listing import ListedFiles, Listing, Reader
from client.data.sources.parts.series import read_series
from client.data.sources.parts.tables.sheets import SUFFIXES as SHEETS
from client.data.sources.parts.tree import read_file
from client.data.sources.table import Table, TableRows
from client.inspect.form import sniff, sniff_sheet
from client.prediction.files import FILE_KINDS, LooseFiles, find_kind, list_files, list_suffixes, open_files
from common.backbones import ReadsColumns
from common.errors import instead
from common.inputs import Several, Text
from common.types import BadInput, BadRecord

if TYPE_CHECKING:
    import pandas as pd

    from common.model.backbones import Backbone

TABLES = frozenset({".csv", ".tsv", ".tab", ".parquet", ".data"}) | SHEETS
_TEXTS = ("text", "sentence", "note")
_PATHS = ("path", "file", "filename", "image", "audio", "series")
_SERIES = (".csv", ".tsv")
"""Ends of files that a table lists as series; given by themselves they are tables."""
_ARRAYS = ("x", "images", "inputs", "data")
_TRIED = 8
"""Records with which it is tried whether a backbone takes a source."""


@dataclass(frozen=True)
class PlainData:
    """Data as it was read.

    Attributes:
        source: its records.
        how: in words, for whoever gave it; nothing of its content.
    """

    source: Source = field(repr=False)
    how: str


def open_plain(
    data: Path | pd.DataFrame | Sequence[str | Path], backbone: Backbone, columns: Sequence[str]
) -> PlainData:
    """Returns data without settings as a source for a backbone.

    Args:
        data: a file or folder, a table in memory, or paths of files.
        backbone: what its records are for.
        columns: of a table the column of texts or paths, and of pairs of texts the second one too; of an .npz file the
            array; empty where it is to be found.

    Raises:
        BadInput: there is nothing that can be read, or a column is missing or must be named.
    """
    if isinstance(data, Path):
        return _open_path(data, backbone, columns)
    if isinstance(data, Sequence):
        return _choose(list_files(data), backbone)
    rows = [dict(row) for row in convert_frame(data).to_dict("records")]
    return _open_rows(Path("table"), rows, backbone, columns, root=None)


def takes(backbone: Backbone, source: Source) -> bool:
    """Returns whether a backbone takes some records of a source, of a few that are tried."""
    count = len(source.index())
    tried = sorted({round(at) for at in np.linspace(0, max(count - 1, 0), _TRIED)}) if count else []
    return any(_takes_item(backbone, lambda at=at: source.load(at)) for at in tried)  # type: ignore[misc]


def _open_path(path: Path, backbone: Backbone, columns: Sequence[str]) -> PlainData:
    if not path.exists():
        raise BadInput(f"{path}: expected a file or folder of records, found nothing there")
    suffix = path.suffix.lower()
    if path.is_dir() or suffix in (".zip", ".whl"):
        return _choose(open_files(path), backbone)
    if suffix == ".npz":
        return _open_arrays(path, columns)
    if suffix in TABLES:
        rows = [dict(row) for row in _read_table(path, backbone).to_dict("records")]
        return _open_rows(path, rows, backbone, columns, root=path.parent.resolve())
    if find_kind(path.name, path) is None:
        raise BadInput(
            f"{path}: expected a folder, a table ({', '.join(sorted(TABLES))}), .npz or a file that a model can read "
            f"({list_suffixes()}), got one that ends in {path.suffix!r}"
        )
    return _choose(open_files(path), backbone)


def _choose(found: Sequence[LooseFiles], backbone: Backbone) -> PlainData:
    """Returns the files of the kind that the backbone takes; of the first kind where it takes none of them."""
    at = next((at for at, files in enumerate(found) if takes(backbone, files)), None)
    chosen = found[at or 0]
    if at is None:
        # Scans as slices are no volumes, and those of a network of three dimensions are read whole.
        whole = ((at, files.as_volumes()) for at, files in enumerate(found))
        fits = ((at, files) for at, files in whole if files is not None and takes(backbone, files))
        at, chosen = next(fits, (0, chosen))
    others = sum(len(files.names) for other, files in enumerate(found) if other != at)
    return PlainData(chosen, f"{chosen.kind.name}" + (f"; {others} file(s) of other kinds left out" if others else ""))


# --- tables ----------------------------------------------------------------------------------------------------------


def _read_table(path: Path, backbone: Backbone) -> pd.DataFrame:
    """Returns a table of texts in whatever form it is written, as `headwater inspect` finds it."""
    if path.suffix.lower() == ".parquet":
        return read_frame(path)
    try:
        form = sniff_sheet(path, None) if path.suffix.lower() in SHEETS else sniff(path)
    except BadInput:
        # One column has no separator; of all else the reader says what is wrong.
        return read_frame(path)
    frame = read_frame(path, form.separator, encoding=form.encoding, layout=form.layout)
    return frame.map(form.read_number) if isinstance(backbone.kind, ReadsColumns) else frame


def _open_rows(
    path: Path, rows: list[dict[str, str]], backbone: Backbone, columns: Sequence[str], root: Path | None
) -> PlainData:
    """Returns a table's rows as records.

    Args:
        path: the table's file, for messages.
        rows: its cells.
        backbone: what the records are for.
        columns: the columns of texts or paths that a user named.
        root: folder of the files that it lists; None takes paths as they are written.
    """
    known = [name for name in (rows[0] if rows else {}) if name != FAULT]
    if not rows:
        raise BadInput(f"{path}: expected rows, got a table without any")
    for name in columns:
        if name not in known:
            raise BadInput(f"{path}: expected exactly one column {name!r} among its {len(known)} column(s)")
    needed = backbone.kind.list_columns() if isinstance(backbone.kind, ReadsColumns) else []
    if needed:
        return _open_features(path, rows, needed, known)
    if _takes_item(backbone, lambda: Text("a word or two")):
        chosen = list(columns) or _find_column(path, known, _TEXTS, "texts")
        if len(chosen) > 2:
            raise BadInput(f"--column: expected one column of texts, or two of pairs of texts, got {len(chosen)}")
        pair = chosen[1] if len(chosen) == 2 else None
        manifest = Manifest(kind="manifest", path=path, text=chosen[0], text_pair=pair)
        return PlainData(ListedTexts(manifest, rows), f"texts of column {' and '.join(chosen)}")
    chosen = list(columns) or _find_column(path, known, _PATHS, "paths of files")
    if len(chosen) > 1:
        raise BadInput(f"--column: expected one column of paths, got {len(chosen)}")
    settings = ListedFiles(kind="", path=path)
    reader = Reader(chosen[0], _read_any, "file")
    if root is None:
        rows = [{**row, chosen[0]: str(Path(row[chosen[0]]).absolute()) if row[chosen[0]] else ""} for row in rows]
    listing = Listing(settings, reader, rows, root or Path("/"))
    if not takes(backbone, listing):
        whole = replace(listing, reader=replace(reader, read=partial(_read_any, as_volume=True)))
        listing = whole if takes(backbone, whole) else listing
    return PlainData(listing, f"files of column {chosen[0]}")


def _open_features(path: Path, rows: list[dict[str, str]], needed: Sequence[str], known: Sequence[str]) -> PlainData:
    absent = [name for name in needed if name not in known]
    if absent:
        shown = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
        raise BadInput(
            f"{path}: expected the model's {len(needed)} feature columns, found no column {shown}; name them as the "
            "model does, in the file's first line"
        )
    settings = Table(kind="table", path=path, columns=list(needed))
    return PlainData(TableRows(settings, rows, tuple(range(1, len(rows) + 1))), f"{len(needed)} feature columns")


def _find_column(path: Path, known: Sequence[str], usual: Sequence[str], what: str) -> list[str]:
    found = next((name for name in usual if name in known), None)
    if found is None and len(known) == 1:
        found = known[0]
    if found is None:
        raise BadInput(
            f"{path}: expected a column of {what} called {', '.join(usual)}, or one named with --column; its columns "
            "are in the file's first line; of `steps` or `slides` give the .yaml with their settings"
        )
    return [found]


def _read_any(path: Path, *, as_volume: bool = False) -> Any:
    kind = find_kind(path.name, path)
    if path.is_dir():
        kind = next(kind for kind in FILE_KINDS if kind.name == "DICOM files")
    if kind is not None and as_volume:
        kind = kind.as_volumes or kind
    if kind is None and path.suffix.lower() in _SERIES:
        return read_series(read_file(path, "file"), path.suffix.lower(), "keep")
    if kind is None:
        raise BadRecord(
            f"expected a file that ends in {', '.join(_SERIES)}, {list_suffixes()}, got another; of records that a "
            "source reads by its settings (`waveforms`, `slides`) give the .yaml that holds them"
        )
    return kind.read(b"" if kind.by_path else read_file(path, "file"), path)


# --- arrays ----------------------------------------------------------------------------------------------------------


def _open_arrays(path: Path, columns: Sequence[str]) -> PlainData:
    """Returns an .npz file's array of records: the named one, one with a usual name, or the only one that can be."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path}: expected a readable .npz file{instead(error)}") from None
    if len(columns) > 1:
        raise BadInput(f"--column: expected one array, got {len(columns)}")
    usual = [name for name in _ARRAYS if name in names]
    chosen = [*columns, *usual, *(names if len(names) == 1 else ())]
    if not chosen or chosen[0] not in names:
        raise BadInput(
            f"{path}: expected an array of records called {', '.join(_ARRAYS)}, or one named with --column, among its "
            f"{len(names)} array(s)"
        )
    spec = {"kind": "npz", "path": str(path), "parts": {"all": {"inputs": chosen[0], "labels": {}}}}
    return PlainData(open_source(spec, "data").open(), f"records of array {chosen[0]}")


def _takes_item(backbone: Backbone, load: Callable[[], Any]) -> bool:
    def preprocess() -> bool:
        item = load()
        first = item.items[0] if isinstance(item, Several) and item.items else item
        backbone.preprocess(first)
        return True

    return try_record(preprocess)[0] is True
