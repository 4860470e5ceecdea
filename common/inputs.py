"""Values as data sources hand them out: items for backbones, and table cells for labels and columns.

An item is what a source hands to a backbone, where an array or a picture does not say enough:

| item | from sources | to backbones |
|---|---|---|
| PIL image or uint8 array | images | of images |
| float array T, or T x C channels | time series, vectors | of series; given features |
| mapping column -> text | tables | given features |
| `Text` | sentences and pairs of them | of text |
| `Audio` | recordings | of audio |
| `Volume` | scans | of three dimensions |
| `Several` | whatever is one record in several items: slices, frames | any: averaged, or kept (kind `bag`) |

A plain string is no item: a path or a name that got somewhere by mistake must not be taken for a text.

A cell is text. A mask, which labels each place of a picture, is one too: its height, its width and its runs of equal
values, row by row (`write_mask`), and where its file says so, the names of the values; so are the boxes around the
objects on it (`write_boxes`). A column of whole numbers
with one empty cell is exported as `1.0`, `0.0` by many tools, and YAML reads an unquoted 1 as a number: names that both
parse as numbers are therefore equal when the numbers are.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from common.types import BadRecord

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


MAX_CHARS = 1 << 20
"""Characters of a text that are read at most: a tokenizer goes through all of them, however few a model keeps."""


@dataclass(frozen=True)
class Text:
    """A text, or a pair of texts that are read together. Raises BadRecord: it is longer than `MAX_CHARS`."""

    first: str = field(repr=False)
    second: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if max(len(self.first), len(self.second or "")) > MAX_CHARS:
            raise BadRecord(f"expected a text of at most {MAX_CHARS} characters")


@dataclass(frozen=True, eq=False)
class Audio:
    """A recording: mono samples in [-1, 1], float32, and how many there are in a second."""

    samples_T: NDArray[np.float32] = field(repr=False)
    sample_rate: int


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan: float32 values whose axes lead to the patient's right, front and head, and its spacing in mm."""

    values_XYZ: NDArray[np.float32] = field(repr=False)
    spacing_mm: tuple[float, float, float]


MAX_ITEMS = 4096
"""Items, such as slices, of one record."""


def spread(count: int, most: int | None) -> list[int]:
    """Returns positions of at most so many items, evenly spread over all and always the same.

    Args:
        count: number of items.
        most: largest number of positions; None for all.
    """
    if most is None or count <= most:
        return list(range(count))
    return [int((2 * number + 1) * count / (2 * most)) for number in range(most)]


@dataclass(frozen=True, eq=False)
class Several:
    """One record that is several items; its features are the mean of theirs, or theirs side by side (a bag).

    Attributes:
        items: the items.
        passed_over: number of files beside them that hold none, for the site's staff.
    """

    items: Sequence[Any] = field(repr=False)
    passed_over: int = 0


_MASK = re.compile(r"mask ([0-9]{1,6}) ([0-9]{1,6})((?: [0-9]{1,10}\*[0-9]{1,10})+)( \{.*\})?", re.DOTALL)
# A label may be called "mask worn", or "boxes".
_BEGINNING = re.compile(r"mask [0-9]{1,6} [0-9]{1,6} [0-9]{1,10}\*[0-9]")
MAX_PIXELS = 1 << 28
"""Places of a mask that are read at most."""

MAX_RUNS = 1 << 21
"""Runs of equal values of a mask that are read at most: a chequered picture of a few kilobytes may have any number."""


def write_mask(values_HW: NDArray[Any], names: Mapping[int, str] | None = None) -> str:
    """Returns a mask of whole numbers as a cell: `mask H W value*length value*length ...`, row by row.

    Args:
        values_HW: whole numbers from 0.
        names: value -> name of the label that it means, "" for no label; without them a value is a label's position.

    Raises:
        BadRecord: it is no picture of whole numbers from 0, or too large.
    """
    import numpy as np

    if values_HW.ndim != 2 or not values_HW.size or values_HW.dtype.kind not in "bui" or values_HW.min() < 0:
        raise BadRecord("expected a mask with one whole number from 0 for each place of the picture")
    if values_HW.size > MAX_PIXELS:
        raise BadRecord(f"expected a mask of at most {MAX_PIXELS} places")
    flat = values_HW.reshape(-1)
    starts = np.append(0, np.flatnonzero(flat[1:] != flat[:-1]) + 1)
    _check_runs(len(starts))
    lengths, values = np.diff(starts, append=len(flat)).tolist(), flat[starts].astype(np.int64).tolist()
    runs = " ".join(f"{value}*{length}" for value, length in zip(values, lengths, strict=True))
    return f"mask {values_HW.shape[0]} {values_HW.shape[1]} {runs}" + ("" if names is None else _write_names(names))


def is_mask(cell: str) -> bool:
    """Returns true for a cell that holds a mask."""
    return _BEGINNING.match(cell) is not None


def read_mask(cell: str) -> NDArray[np.int64]:
    """Returns the values H x W of a mask's cell.

    Raises:
        BadRecord: it is none, or its runs do not fill it.
    """
    import numpy as np

    found = _MASK.fullmatch(cell)
    height, width = (int(found[1]), int(found[2])) if found else (0, 0)
    if found is None or not 0 < height * width <= MAX_PIXELS:
        raise BadRecord("expected a mask: a value for each place of the picture")
    _check_runs(found[3].count("*"))
    runs = np.fromstring(found[3].replace("*", " "), dtype=np.int64, sep=" ").reshape(-1, 2)
    if int(runs[:, 1].sum()) != height * width:
        raise BadRecord("expected a mask whose runs fill its height and width")
    return np.repeat(runs[:, 0], runs[:, 1]).reshape(height, width)


def _check_runs(count: int) -> None:
    if count > MAX_RUNS:
        raise BadRecord(f"expected a mask of at most {MAX_RUNS} runs of equal values")


def read_mask_names(cell: str) -> dict[int, str] | None:
    """Returns the names of a mask's values; None where it has none.

    Raises:
        BadRecord: it is no mask, or its names cannot be read.
    """
    found = _MASK.fullmatch(cell)
    try:
        names = json.loads(found[4] or "null") if found else []
        if names is None:
            return None
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ValueError
        return {int(value): name for value, name in names.items()}
    except (ValueError, RecursionError):
        raise BadRecord("expected a mask: a value for each place of the picture") from None


def rename_parts(cell: str, rename: Callable[[str], str | None]) -> str:
    """Returns a cell of boxes or of a mask with other names.

    Args:
        cell: the cell. The values of a mask without names are named by their digits.
        rename: name -> new name; None leaves a box out, and the places of a mask without a label.

    Raises:
        BadRecord: the cell is a damaged one.
    """
    if is_boxes(cell):
        read_boxes(cell)
        width, height, rows = json.loads(cell.removeprefix(_BOXES))
        renamed = [[rename(name), *rest] for name, *rest in rows]
        return _BOXES + json.dumps([width, height, [row for row in renamed if row[0] is not None]], ensure_ascii=False)
    found, names = _MASK.fullmatch(cell), read_mask_names(cell)
    if found is None:
        raise BadRecord("expected boxes or a mask")
    if names is None:
        names = {int(value): value for value in {run.partition("*")[0] for run in found[3].split()}}
    renamed_parts = {value: rename(name) if name else "" for value, name in sorted(names.items())}
    return cell[: found.end(3)] + _write_names({value: name or "" for value, name in renamed_parts.items()})


def _write_names(names: Mapping[int, str]) -> str:
    return " " + json.dumps({str(value): name for value, name in names.items()}, ensure_ascii=False)


def resize_mask(values_HW: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Returns a mask of another size, each of whose places has the value of the nearest of the mask's.

    Args:
        values_HW: the mask.
        height: height of the result.
        width: width of the result.
    """
    import numpy as np

    rows, columns = (
        (np.arange(wanted) * 2 + 1) * own // (2 * wanted)
        for own, wanted in zip(values_HW.shape, (height, width), strict=True)
    )
    resized: NDArray[Any] = values_HW[np.ix_(rows, columns)]
    return resized


@dataclass(frozen=True)
class Box:
    """A rectangle around an object, with x to the right and y downwards from the picture's upper left corner.

    Attributes:
        name: what the object is.
        left: smallest x.
        top: smallest y.
        right: largest x.
        bottom: largest y.
        score: probability that it is there; 1 where it was drawn by a person.
        ignored: whether it says nothing: neither that something is there nor that nothing is. So are VOC's difficult
            objects and COCO's crowds.
    """

    name: str
    left: float
    top: float
    right: float
    bottom: float
    score: float = 1.0
    ignored: bool = False


_BOXES = "boxes "
MAX_BOXES = 10_000
"""Boxes of a picture that are read at most."""


def write_boxes(boxes: Sequence[Box], width: float, height: float) -> str:
    """Returns the boxes of a picture as a cell: `boxes` and JSON of its width, its height and a list for each box.

    A list has a name, four sides and a score, and true behind them where the box is ignored.

    Args:
        boxes: boxes, in the unit of the width and the height; none is a picture without objects.
        width: of the picture.
        height: of the picture.
    """
    rows = [
        [box.name, box.left, box.top, box.right, box.bottom, box.score, *([True] if box.ignored else [])]
        for box in boxes
    ]
    return _BOXES + json.dumps([width, height, rows], ensure_ascii=False)


def is_boxes(cell: str) -> bool:
    """Returns true for a cell that holds boxes."""
    return cell.startswith(f"{_BOXES}[")


def read_boxes(cell: str) -> list[Box]:
    """Returns the boxes of a cell as fractions of their picture's width and height; some may lie outside of [0, 1].

    Raises:
        BadRecord: it holds none, or one that is no box of finite numbers.
    """
    try:
        width, height, rows = json.loads(cell.removeprefix(_BOXES)) if is_boxes(cell) else (0, 0, [])
        if not (width > 0 and height > 0) or len(rows) > MAX_BOXES:
            raise ValueError
        boxes = []
        for name, left, top, right, bottom, score, *ignored in rows:
            sides = [left / width, top / height, right / width, bottom / height, float(score)]
            if not isinstance(name, str) or not all(map(math.isfinite, sides)):
                raise ValueError
            boxes.append(Box(name, sides[0], sides[1], sides[2], sides[3], sides[4], ignored == [True]))
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise BadRecord("expected boxes: a name and four sides for each object on the picture") from None
    return boxes


def parse_number(text: str) -> float | None:
    """Returns the finite number that a cell holds, or None."""
    # Python also reads "1_000" as a number; no table writes numbers so.
    if "_" in text:
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def find_name(cell: str, names: Sequence[str]) -> int | None:
    """Returns the index of the name that a cell equals, as text or else as a number; None where there is none."""
    text = cell.strip()
    if text in names:
        return names.index(text)
    value = parse_number(text)
    if value is None:
        return None
    return next((index for index, name in enumerate(names) if parse_number(name) == value), None)


_WHOLE = re.compile(r"([0-9]+)\.0*")
_SCIENTIFIC = re.compile(r"([0-9])(?:\.([0-9]*))?[eE]\+([0-9]{2})")


def normalise_patient_id(text: str) -> str:
    """Returns the one form of a patient id that all sources of a population share; "" where it is blank.

    Tools that take ids for numbers write 1001 as `1001.0`, and as `1.001e+03` where it is large. Spreadsheets and
    devices leave blanks around an id, non-breaking ones too, and characters that nobody sees; some systems store a
    letter and its accent as two characters. None of that makes another patient.

    Leading zeros stay: `007` and `7` are two patients, because many hospitals hand out both. A file that lost its zeros
    has other patients than one that kept them, which `check` shows.
    """
    visible = (char for char in text if char.isspace() or unicodedata.category(char) not in ("Cc", "Cf"))
    plain = " ".join(unicodedata.normalize("NFC", "".join(visible)).split())
    whole = _WHOLE.fullmatch(plain)
    if whole:
        return whole[1]
    scientific = _SCIENTIFIC.fullmatch(plain)
    if scientific:
        first, rest, exponent = scientific[1], (scientific[2] or "").rstrip("0"), int(scientific[3])
        if len(rest) <= exponent:
            return first + rest.ljust(exponent, "0")
    return plain


def encode_text(text: str) -> bytes:
    """Returns the bytes of any text, each text's other than every other's; a file's name need not be UTF-8."""
    return text.encode("utf-8", "surrogatepass")


def _format_number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("expected a name; put yes, no, true and false in quotes")
    return str(value) if isinstance(value, int | float) else value


def _strip(value: str) -> str:
    if not value.strip():
        raise ValueError("expected a name, got an empty one")
    # Names are printed, and written into files that other programs read.
    if any(unicodedata.category(char) == "Cc" for char in value.strip()):
        raise ValueError("expected a name without control characters")
    return value.strip()


def _check_distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    for index, name in enumerate(names):
        if find_name(name, names[:index]) is not None:
            raise ValueError(f"expected distinct names, got {name!r} twice")
    return names


CellText = Annotated[str, BeforeValidator(_format_number, json_schema_input_type=str | int | float)]
"""A cell as it is; YAML numbers are taken as their text."""

CellName = Annotated[
    str, BeforeValidator(_format_number, json_schema_input_type=str | int | float), AfterValidator(_strip)
]
"""A public name that cells are compared with; YAML numbers are taken as their text."""

CellNames = Annotated[tuple[CellName, ...], AfterValidator(_check_distinct)]
"""Distinct public names in a fixed order."""
