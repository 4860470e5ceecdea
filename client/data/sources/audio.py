"""Recordings of a folder or zip whose names say what they are, such as `7_jackson_32.wav`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import Field, model_validator

from client.data.sources import SourceExample, SourceRecord
from client.data.sources.parts.base import SourceSettings, digest
from client.data.sources.parts.masks import LazyCells
from client.data.sources.parts.named import NamedGroups, Naming
from client.data.sources.parts.recordings import (
    SUFFIXES,
    TEXT_SUFFIXES,
    Excerpt,
    example_recordings,
    find_text,
    read_recording,
    read_transcript,
    require_soundfile,
)
from client.data.sources.parts.tree import Tree, open_tree
from common.inputs import Audio, CellName
from common.plugins import Frozen, LocalPath
from common.types import BadInput, BadRecord

_MOST_TEXT_BYTES = 1 << 20


class Excerpts(Frozen):
    """Settings that cut long recordings, such as songs, into several records each.

    Attributes:
        count: excerpts of a recording, evenly spread over it; they overlap where it is short.
        seconds: length of each; a shorter recording is taken whole.
    """

    count: Annotated[int, Field(ge=1, le=10_000)]
    seconds: Annotated[float, Field(gt=0, le=86_400)]


class Recordings(SourceSettings):
    """Settings: where, and how a file's path holds the columns.

    Attributes:
        path: a folder or zip; recordings lie anywhere below it.
        pattern: regular expression, searched in a file's relative path; each named group is a column. A file that it
            does not fit has empty cells.
        patient: the group that is the patient id.
        test: column -> values: a recording is held out where any of its cells is listed; all others are to train on.
            Without it the source states no split.
        excerpts: cuts each recording into several records; without it a recording is one.
        transcript: name of a column that holds the text of the .txt or .srt file beside each recording (`a.wav`,
            `a.txt`), of subtitles without their times; a recording without one has no transcript, one with an empty one
            has that of silence.
    """

    kind: Literal["audio"]
    path: LocalPath
    pattern: NamedGroups
    patient: str | None = None
    test: dict[str, list[CellName]] | None = None
    excerpts: Excerpts | None = None
    transcript: str | None = None

    @model_validator(mode="after")
    def _columns_exist(self) -> Recordings:
        self.naming().check()
        if self.transcript is not None and self.excerpts is not None:
            raise ValueError("transcript: expected none beside `excerpts`: nobody says which words are in which part")
        return self

    @classmethod
    def example(cls, folder: Path) -> SourceExample:
        """Five tones of three patients, two of them held out."""
        from scipy.io import wavfile

        (folder / "clips").mkdir()
        names = ["z-cough_q7-ann_1", "z-cough_q7-bea_1", "z-wheeze_q7-ann_2", "z-wheeze_q7-cem_1", "z-wheeze_q7-cem_2"]
        for name, samples in zip(names, example_recordings(len(names)), strict=True):
            wavfile.write(folder / "clips" / f"{name}.wav", 8000, samples)
        settings = {
            "kind": "audio",
            "path": str(folder / "clips"),
            "pattern": r"(?P<sound>z-\w+?)_(?P<patient>q7-\w+?)_(?P<take>\d)",
            "patient": "patient",
            "test": {"patient": ["q7-cem"]},
        }
        return SourceExample(settings, ["q7-", "z-cough", "z-wheeze"])

    def open(self) -> Clips:
        """The opened folder. Raises BadInput: missing, or without a recording."""
        require_soundfile()
        suffixes = SUFFIXES if self.transcript is None else SUFFIXES | set(TEXT_SUFFIXES)
        tree = open_tree(self.path, "recordings").chosen(lambda name: name.suffix.lower() in suffixes)
        names = tuple(name for name in tree.stamps if Path(name).suffix.lower() in SUFFIXES)
        if not names:
            raise BadInput(f"{self.path}: expected recordings ({', '.join(sorted(SUFFIXES))}), got none")
        return Clips(self, tree, names)

    def naming(self) -> Naming:
        """Returns the rule by which a recording's path is read."""
        return Naming(self.pattern, self.patient, self.test)


@dataclass(frozen=True)
class Clips:
    """An opened folder or zip."""

    settings: Recordings = field(repr=False)
    tree: Tree = field(repr=False)
    names: tuple[str, ...] = field(repr=False)

    def digest(self) -> str:
        """Over every file's path and its size and time of change, or its checksum in a zip; and the excerpts."""
        own, cut = self.tree.digest(), self.settings.excerpts
        return own if cut is None else digest([own.encode(), cut.model_dump_json().encode()])

    def index(self) -> list[SourceRecord]:
        """Recordings in the order of their paths, each with its excerpts in turn; `row` counts recordings."""
        own, naming = self.settings, self.settings.naming()
        return [
            record
            for number, name in enumerate(self.names, start=1)
            # Excerpts of one recording have one key: they fall on the same side of a split.
            for record in [self._add_transcript(naming.record(number, own.path.name, name))] * self._count()
        ]

    def load(self, position: int) -> Audio:
        """One recording or excerpt."""
        recording, excerpt = divmod(position, self._count())
        cut = self.settings.excerpts
        part = None if cut is None else Excerpt(excerpt, cut.count, cut.seconds)
        return read_recording(self.tree.read(self.names[recording], "recording"), part)

    def _add_transcript(self, record: SourceRecord) -> SourceRecord:
        column = self.settings.transcript
        if column is None:
            return record
        path = find_text(self.tree, record.path)
        if path is None:
            return replace(record, cells={**record.cells, column: ""})
        return replace(record, cells=LazyCells(record.cells, {column: lambda: self._read_text(path)}))

    def _read_text(self, path: str) -> str:
        data = self.tree.read(path, "transcript")
        if len(data) > _MOST_TEXT_BYTES:
            raise BadRecord(f"expected a transcript of at most {_MOST_TEXT_BYTES} bytes")
        return read_transcript(data, PurePosixPath(path).suffix.lower())

    def _count(self) -> int:
        return 1 if self.settings.excerpts is None else self.settings.excerpts.count
