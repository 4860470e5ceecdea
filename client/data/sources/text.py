"""Texts, or pairs of texts, of tables: one file, or one for each side of the split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from client.data.sources import SourceExample, SourceRecord
from client.data.sources.parts.base import (
    FilesOfSides,
    Header,
    SourceSettings,
    digest,
    digest_of_texts,
    list_files,
    list_names,
)
from client.data.sources.parts.frame import (
    FAULT,
    Encoding,
    Separator,
    TableFile,
    check_row,
    read_frame,
    require_columns,
)
from common.inputs import Text, encode_text


class Texts(TableFile):
    """Settings: the files, and which of their columns hold the texts.

    Attributes:
        path: one file without a split, or `train` and `test` -> its file: text, Parquet or spreadsheets (.xlsx, .ods).
        separator: of a text file: one character (a tab by default), or `whitespace`.
        encoding: of a text file, by its usual name: `utf-8`, `utf-16`, `cp1252`, `latin-1` and others.
        quotes: whether a quote may enclose a cell; where it may not, it is a character of the text.
        header: true where the first line names the columns; else their names.
        text: column of texts.
        text_pair: column of the texts that are read together with them.
        patient: column of patient ids.
        split: column of `train`, `test` or nothing, where `path` is one file.
    """

    former_keys: ClassVar[Mapping[str, str]] = {**SourceSettings.former_keys, "parts": "path", "columns": "header"}
    kind: Literal["text"]
    path: FilesOfSides
    separator: Separator = "\t"
    encoding: Encoding = "utf-8"
    quotes: bool = False
    header: Header = True
    text: str
    text_pair: str | None = None
    patient: str | None = None
    split: str | None = None

    @classmethod
    def example(cls, folder: Path) -> SourceExample:
        """Four notes of three patients to train on, one held out."""
        notes = ["q7-dyspnoea since Monday", 'no "q7-complaints', "q7-fever, 39 degrees", "q7-cough", "q7-well"]
        lines = [f"{note}\tq7-pat{number % 3}\tz-{number % 2}" for number, note in enumerate(notes)]
        (folder / "train.tsv").write_text("\n".join(lines[:4]) + "\n", encoding="utf-8")
        (folder / "test.tsv").write_text(lines[4].replace("q7-pat1", "q7-pat9") + "\n", encoding="utf-8")
        settings = {
            "kind": "text",
            "path": {part: str(folder / f"{part}.tsv") for part in ("train", "test")},
            "header": ["note", "patient", "finding"],
            "text": "note",
            "patient": "patient",
        }
        return SourceExample(settings, ["q7-", "z-0", "z-1"])

    def open(self) -> Sentences:
        """The opened files. Raises BadInput: missing, unreadable, or without a named column."""
        rows: list[tuple[str, str, int, dict[str, str]]] = []
        for part, path in list_files(self.path).items():
            names, layout = list_names(self.header), self.layout()
            frame = read_frame(path, self.separator, names, quotes=self.quotes, encoding=self.encoding, layout=layout)
            require_columns(frame, path, [self.text, self.text_pair, self.patient, self.split])
            rows += [(part, path.name, number, row) for number, row in enumerate(frame.to_dict("records"), start=1)]
        return Sentences(self, rows)


@dataclass(frozen=True)
class Sentences:
    """Opened files.

    Attributes:
        rows: part, file, row in that file, cells.
    """

    settings: Texts = field(repr=False)
    rows: list[tuple[str, str, int, dict[str, str]]] = field(repr=False)

    def digest(self) -> str:
        """Over all texts."""
        return digest_of_texts([self._texts(row) for *_, row in self.rows])

    def index(self) -> list[SourceRecord]:
        """Rows part by part, in the files' order; `row` counts on from file to file.

        Equal texts have equal keys: they fall on the same side of a split.
        """
        return [self._record(number, *row) for number, row in enumerate(self.rows, start=1)]

    def load(self, position: int) -> Text:
        """One text or pair; the backbone refuses empty ones."""
        check_row(self.rows[position][3])
        return Text(*self._texts(self.rows[position][3]))

    def _record(self, number: int, part: str, file: str, row: int, cells: dict[str, str]) -> SourceRecord:
        own = self.settings
        stated = cells[own.split] if own.split else ""
        return SourceRecord(
            # Unique over all files; the first file's are its own rows.
            row=number,
            file=file if len(list_files(own.path)) == 1 else f"{file} (its row {row})",
            key=digest(encode_text(text) for text in self._texts(cells)),
            patient=cells[own.patient] if own.patient else None,
            split=(stated or None) if part == "all" else part,
            cells=cells,
            fault=cells[FAULT],
            identified=False,
        )

    def _texts(self, cells: Mapping[str, Any]) -> list[str]:
        own = self.settings
        return [cells[own.text], *([cells[own.text_pair]] if own.text_pair is not None else [])]
