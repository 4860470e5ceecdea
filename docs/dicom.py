"""Writes docs/dicom.md: what is read of every DICOM file of the packages pydicom-data and pydicom, and why not.

`python docs/dicom.py` writes the table; a slow test compares it with what the reader does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from client.data.sources.parts.dicom.files import open_dicom, quiet
from client.data.sources.parts.dicom.pixels import count_frames, read_frames
from common.types import BadRecord

PAGE = ROOT / "docs" / "dicom.md"
_MOST_FRAMES = 4
_BEGIN, _END = "<!-- generated -->", "<!-- end -->"


def list_examples() -> Iterator[tuple[str, Path]]:
    """Returns package and path of every DICOM file of pydicom-data, and of those that pydicom brings itself."""
    import data_store
    import pydicom

    folders = {
        "pydicom-data": Path(data_store.__file__).parent / "data",
        "pydicom": Path(pydicom.__file__).parent / "data" / "test_files",
    }
    for package, folder in folders.items():
        for path in sorted(folder.glob("*.dcm"), key=lambda path: path.name.lower()):
            yield package, path


def make_table() -> str:
    """Returns the table."""
    lines = ["| package | file | stored as | pixels | read as | by |", "|---|---|---|---|---|---|"]
    for package, path in list_examples():
        with quiet():
            stored, pixels, read, how = _describe(path)
        name = path.name.replace("|", "\\|")
        lines.append(f"| {package} | `{name}` | {stored} | {pixels} | {read} | {how} |")
    return "\n".join(lines)


def fill_in(page: str) -> str:
    """Returns the page with the table as it is now."""
    before, _, rest = page.partition(_BEGIN)
    return f"{before}{_BEGIN}\n\n{make_table()}\n\n{_END}{rest.partition(_END)[2]}"


def _describe(path: Path) -> tuple[str, str, str, str]:
    """Returns how a file is stored, what its tags say of its pixels, and what is read of it, by which steps."""
    try:
        found = open_dicom(path, pixels=True)
    except BadRecord as error:
        return "", "", "refused", str(error)
    stored, pixels = found.file_meta.TransferSyntaxUID.name.split(" (")[0], _describe_pixels(found)
    try:
        steps, window = _read(found)
    except BadRecord as error:
        return stored, pixels, "refused", str(error)
    count = count_frames(found)
    colour = "colour" if "palette" in steps or int(found.get("SamplesPerPixel", 1)) > 1 else "grey"
    how = ", ".join(steps) + " (has no window: `window: full`)" * (window == "full")
    return stored, pixels, f"{f'{count} pictures' if count > 1 else 'a picture'}, {colour}", how


def _read(found: Any) -> tuple[tuple[str, ...], str]:
    try:
        return read_frames(found, "file", _MOST_FRAMES).steps, "file"
    except BadRecord as error:
        if "window of its own" not in str(error):
            raise
    return read_frames(found, "full", _MOST_FRAMES).steps, "full"


def _describe_pixels(found: Any) -> str:
    said = f"{found.get('PhotometricInterpretation', '')}, {found.get('SamplesPerPixel', '')} x "
    return said + f"{found.get('BitsStored', '')}/{found.get('BitsAllocated', '')} bits"


if __name__ == "__main__":
    PAGE.write_text(fill_in(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
