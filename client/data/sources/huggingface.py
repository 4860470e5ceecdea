"""A data set that the Hugging Face library saved to disk (`save_to_disk`): with or without splits."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import model_validator

from client.data.sources import SourceExample, SourceRecord
from client.data.sources.parts.base import SourceSettings, digest
from client.data.sources.parts.pictures import read_picture
from client.data.sources.parts.recordings import read_recording, require_soundfile
from client.data.sources.parts.series import Gaps, checked
from client.data.sources.parts.tree import open_tree
from common.inputs import Text
from common.plugins import LocalPath
from common.types import BadInput, BadRecord

_BROKEN = (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError)
_SINGLE = ("ClassLabel", "Value")
_SIDES: dict[str, Literal["train", "test"]] = {"train": "train", "test": "test"}


class HuggingFace(SourceSettings):
    """Settings: where, and which column is the content. Exactly one of `image`, `audio`, `series` and `text`.

    Other columns that hold single values are label columns; class labels are given by name.

    Attributes:
        path: the folder that `save_to_disk` wrote.
        image: column of images.
        audio: column of recordings.
        series: column of time series.
        gaps: what an empty value within a series means: `refuse`, the default, makes it a bad record, `hold` takes the
            value before it and `interpolate` a straight line, at the ends the nearest value; `keep` leaves it empty for
            a backbone that reads gaps, such as `time_series`.
        text: column of texts.
        text_pair: column of the texts that are read together with `text`.
        patient: column of patient ids.
        splits: split of the data set -> our side, for splits that are not called `train` and `test`; those that are
            not named are left out.
    """

    kind: Literal["huggingface"]
    path: LocalPath
    image: str | None = None
    audio: str | None = None
    series: str | None = None
    gaps: Gaps | None = None
    text: str | None = None
    text_pair: str | None = None
    splits: dict[str, Literal["train", "test"]] = _SIDES
    patient: str | None = None

    @model_validator(mode="after")
    def _one_content(self) -> HuggingFace:
        named = [name for name in ("image", "audio", "series", "text") if getattr(self, name) is not None]
        if len(named) != 1:
            raise ValueError(f"expected exactly one of image, audio, series and text, got {len(named)}")
        if self.gaps is not None and self.series is None:
            raise ValueError("gaps: expected it beside `series`")
        if self.text_pair is not None and self.text is None:
            raise ValueError("text_pair: expected it beside `text`")
        return self

    @classmethod
    def example(cls, folder: Path) -> SourceExample:
        """Three notes to train on and two held out."""
        import datasets

        def part(numbers: Sequence[int]) -> Any:
            columns = {
                "note": [f"q7-note {number}" for number in numbers],
                "patient": [f"q7-pat{number}" for number in numbers],
                "finding": [number % 2 for number in numbers],
            }
            features = datasets.Features(
                {
                    "note": datasets.Value("string"),
                    "patient": datasets.Value("string"),
                    "finding": datasets.ClassLabel(names=["z-benign", "z-malignant"]),
                }
            )
            return datasets.Dataset.from_dict(columns, features=features)

        whole = datasets.DatasetDict({"train": part([1, 2, 3]), "test": part([4, 5])})
        with _no_bars():
            whole.save_to_disk(str(folder / "notes"))
        settings = {"kind": "huggingface", "path": str(folder / "notes"), "text": "note", "patient": "patient"}
        return SourceExample(settings, ["q7-", "z-benign", "z-malignant"])

    def open(self) -> DatasetRows:
        """The opened data set. Raises BadInput: missing, damaged, or without a named column."""
        if self.audio is not None:
            require_soundfile()
        tables = self._tables()
        stamps = open_tree(self.path, "a saved data set").chosen(lambda name: True).digest()
        contents = [self.image, self.audio, self.series]
        parts = [SplitTable(side, table, _columns(table, contents)) for side, table in tables]
        settings = f"{contents} {self.text} {self.text_pair} {sorted(self.splits.items())}"
        # As it was where nothing is said of gaps: encoded series keep their place.
        settings += "" if self.gaps in (None, "refuse") else f" gaps {self.gaps}"
        return DatasetRows(self, parts, digest([stamps.encode(), settings.encode()]))

    def content(self) -> str:
        """The column that is the content."""
        name = self.image or self.audio or self.series or self.text
        assert name is not None
        return name

    def _tables(self) -> list[tuple[str | None, Any]]:
        """Side and table of each split, checked."""
        try:
            import datasets
        except ImportError as error:
            raise BadInput("sources: expected the package datasets; install headwater[huggingface]") from error
        from pyarrow import ArrowException

        parts: list[tuple[str | None, Any]] = []
        try:
            with _no_bars():
                found = datasets.load_from_disk(str(self.path))
            if isinstance(found, datasets.DatasetDict):
                parts += [(self.splits[name], found[name]) for name in sorted(found) if name in self.splits]
            else:
                parts.append((None, found))
            for _, table in parts:
                # A damaged file would otherwise be read beyond its end.
                table.data.table.validate(full=True)
        except (*_BROKEN, ArrowException) as error:
            # From None: the messages quote what the files hold.
            raise BadInput(
                f"{self.path}: expected a data set written by `save_to_disk`, got {type(error).__name__}"
            ) from None
        if not parts:
            raise BadInput(f"{self.path}: expected one of the splits {', '.join(self.splits)}, got none of them")
        for name in (self.content(), self.text_pair, self.patient):
            if name is not None and not all(name in table.column_names for _, table in parts):
                raise BadInput(f"{self.path}: expected a column {name!r} in every split, found none of that name")
        return [(side, self._raw(table, datasets)) for side, table in parts]

    def _raw(self, table: Any, datasets: Any) -> Any:
        """The table with pictures and recordings as bytes: they are decoded here, as those of all sources are."""
        contents = [name for name in (self.content(), self.text_pair) if name is not None]
        labels = [name for name, feature in table.features.items() if type(feature).__name__ in _SINGLE]
        table = table.select_columns(list(dict.fromkeys([*contents, *labels])))
        for kind in (datasets.Image, datasets.Audio):
            for name in contents:
                if isinstance(table.features[name], kind):
                    table = table.cast_column(name, kind(decode=False))
        return table


@dataclass(frozen=True)
class SplitTable:
    """One split: its side, its table, and the columns of single values as text."""

    side: str | None
    table: Any = field(repr=False)
    columns: Mapping[str, list[str]] = field(repr=False)


@dataclass(frozen=True)
class DatasetRows:
    """An opened data set."""

    settings: HuggingFace = field(repr=False)
    parts: Sequence[SplitTable] = field(repr=False)
    stamps: str

    def digest(self) -> str:
        """Over every file's path, size and time of change, and which columns are read."""
        return self.stamps

    def index(self) -> list[SourceRecord]:
        """Returns the rows split by split, in their order; keys are hashes of the content, read once."""
        own = self.settings
        records: list[SourceRecord] = []
        for part in self.parts:
            for at in range(len(part.table)):
                cells = {name: values[at] for name, values in part.columns.items()}
                records.append(
                    SourceRecord(
                        row=len(records) + 1,
                        file=own.path.name,
                        key=_key(self._values(part, at)),
                        patient=cells[own.patient] if own.patient else None,
                        split=part.side,
                        cells=cells,
                        # Two people can say the same; two equal pictures are one.
                        identified=own.text is None,
                    )
                )
        return records

    def load(self, position: int) -> Any:
        """One picture, recording, series or text."""
        own = self.settings
        for part in self.parts:
            if position < len(part.table):
                break
            position -= len(part.table)
        content, pair = self._values(part, position)
        if own.text is not None:
            if not isinstance(content, str) or not (pair is None or isinstance(pair, str)):
                raise BadRecord("expected a text")
            return Text(content, pair)
        if own.series is not None:
            return _series(content, own.gaps or "refuse")
        data = content.get("bytes") if isinstance(content, Mapping) else None
        if not data:
            raise BadRecord("expected the bytes of a file within the data set")
        return read_picture(io.BytesIO(data)) if own.image is not None else read_recording(data)

    def _values(self, part: SplitTable, at: int) -> tuple[Any, Any]:
        row, own = part.table[at], self.settings
        return row[own.content()], row[own.text_pair] if own.text_pair is not None else None


def _key(values: tuple[Any, Any]) -> str:
    content, pair = values
    data = content.get("bytes") or b"" if isinstance(content, Mapping) else repr(content).encode()
    return digest([data, repr(pair).encode()])


def _columns(table: Any, contents: Sequence[str | None]) -> dict[str, list[str]]:
    """Columns of single values as text, "" where a value is missing; class labels by name."""
    found: dict[str, list[str]] = {}
    for name, feature in table.features.items():
        kind = type(feature).__name__
        if name not in contents and kind in _SINGLE:
            names = feature.names if kind == "ClassLabel" else None
            found[name] = [_cell(value, names) for value in table[name]]
    return found


def _cell(value: Any, names: Sequence[str] | None) -> str:
    if value is None:
        return ""
    if names is not None:
        return names[value] if 0 <= value < len(names) else ""
    return str(value).strip()


def _series(values: Any, gaps: Gaps) -> Any:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise BadRecord("expected a series of numbers") from None
    return checked(array, gaps)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    from datasets.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()
