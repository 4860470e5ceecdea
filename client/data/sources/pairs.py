"""Texts in two files, line by line: sources and their translations, as most collections of them are kept.

Where a topic's words are listed, the first topic that has a word of a source is a column; so a simulation divides one
collection into sites. Words of the translations may be written otherwise, as a house has terms of its own.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from client.data.sources import SourceExample, SourceRecord
from client.data.sources.parts.base import FilesOfSides, SourceSettings, digest, digest_of_texts, list_files
from common.errors import instead
from common.inputs import CellName, Text, encode_text
from common.types import BadInput, BadRecord

SOURCE, TARGET, TOPIC, OTHER = "source", "target", "topic", "other"
_MOST_BYTES = 1 << 31


class Pairs(SourceSettings):
    """Settings: the files, topics, and terms.

    Attributes:
        source: one file of sources, or `train` and `test` -> its file; text, or text in a `.gz`.
        target: the files of their translations, with as many lines.
        topics: topic -> words; the first topic that has a word of a source is its column `topic`, which is else
            `other`.
        take: topic -> the first of its records to train on that is read, from 0, and the first that is not; of topics
            that are not named none is read, and of the others all that are held out. It counts records, so it is for
            simulations. Without it all are read.
        terms: word of the translations -> what stands in its place.
    """

    kind: Literal["pairs"]
    source: FilesOfSides
    target: FilesOfSides
    topics: dict[CellName, Annotated[list[str], Field(min_length=1)]] = {}
    take: dict[CellName, tuple[Annotated[int, Field(ge=0)], int]] | None = None
    terms: dict[CellName, CellName] = {}

    @model_validator(mode="after")
    def _check(self) -> Pairs:
        if set(list_files(self.source)) != set(list_files(self.target)):
            raise ValueError("target: expected one file, or `train` and `test`, as in `source`")
        unknown = sorted(set(self.take or {}) - {*self.topics, OTHER})
        if unknown:
            raise ValueError(f"take.{unknown[0]}: expected one of {', '.join([*self.topics, OTHER])}")
        return self

    @classmethod
    def example(cls, folder: Path) -> SourceExample:
        """Four pairs to train on, one held out."""
        sources = ["q7-a dog runs", "q7-two men", "q7-a dog sleeps", "q7-a child", "q7-a bird"]
        targets = ["z-ein Hund rennt", "z-zwei Leute", "z-ein Hund", "z-ein Kind", "z-ein Vogel"]
        settings: dict[str, object] = {"kind": "pairs", "topics": {"animal": ["dog", "bird"]}}
        for name, lines in (("source", sources), ("target", targets)):
            files = {"train": lines[:4], "test": lines[4:]}
            for side, own in files.items():
                (folder / f"{side}.{name}").write_text("\n".join(own) + "\n", encoding="utf-8")
            settings[name] = {side: str(folder / f"{side}.{name}") for side in files}
        return SourceExample({**settings, "terms": {"Hund": "Vierbeiner"}}, ["q7-", "z-"])

    def open(self) -> AlignedTexts:
        """The opened files. Raises BadInput: one is missing or unreadable, or they have different numbers of lines."""
        targets = list_files(self.target)
        lines = []
        for side, path in list_files(self.source).items():
            first, second = _read_lines(path), _read_lines(targets[side])
            if len(first) != len(second):
                raise BadInput(
                    f"target: expected as many lines as in {path.name}, {len(first)}, got {len(second)} in "
                    f"{targets[side].name}"
                )
            lines += [_Line(side, path.name, row, *pair) for row, pair in enumerate(zip(first, second, strict=True), 1)]
        return AlignedTexts(self, lines)


@dataclass(frozen=True)
class _Line:
    """A line of both files."""

    side: str
    file: str
    row: int
    source: str = field(repr=False)
    target: str = field(repr=False)


@dataclass(frozen=True)
class AlignedTexts:
    """Opened files."""

    settings: Pairs = field(repr=False)
    lines: list[_Line] = field(repr=False)

    @cached_property
    def pairs(self) -> list[tuple[_Line, str, str]]:
        """The lines that are read, with the topic and the translation of each."""
        own, seen, found = self.settings, dict[str, int](), []
        for line in self.lines:
            topic = self._find_topic(line.source)
            number = seen.get(topic, 0)
            if own.take is not None and line.side != "test":
                first, end = own.take.get(topic, (0, 0))
                seen[topic] = number + 1
                if not first <= number < end:
                    continue
            if own.take is not None and line.side == "test" and topic not in own.take:
                continue
            found.append((line, topic, self._replace(line.target)))
        return found

    def digest(self) -> str:
        """Over all texts."""
        return digest_of_texts([[line.source, target] for line, _, target in self.pairs])

    def index(self) -> list[SourceRecord]:
        """Lines part by part, in the files' order; equal pairs have equal keys, and fall on one side of a split."""
        return [
            SourceRecord(
                row=number,
                file=line.file if len(list_files(self.settings.source)) == 1 else f"{line.file} (its line {line.row})",
                key=digest([encode_text(line.source), encode_text(target)]),
                patient=None,
                split=None if line.side == "all" else line.side,
                cells={SOURCE: line.source, TARGET: target, TOPIC: topic},
                fault="" if line.source and target else "a line of the two files is empty",
                identified=False,
            )
            for number, (line, topic, target) in enumerate(self.pairs, start=1)
        ]

    def load(self, position: int) -> Text:
        """A source and its translation. Raises BadRecord: one of them is empty."""
        line, _, target = self.pairs[position]
        if not line.source or not target:
            raise BadRecord("a line of the two files is empty")
        return Text(line.source, target)

    def _find_topic(self, text: str) -> str:
        words = set(re.findall(r"\w+", text.lower()))
        return next((topic for topic, own in self._words.items() if words & own), OTHER)

    def _replace(self, text: str) -> str:
        terms: Mapping[str, str] = self.settings.terms
        return re.sub(r"\w+", lambda found: terms.get(found[0], found[0]), text) if terms else text

    @cached_property
    def _words(self) -> dict[str, set[str]]:
        return {topic: {word.lower() for word in words} for topic, words in self.settings.topics.items()}


def _read_lines(path: Path) -> list[str]:
    """Returns the stripped lines of a text file. Raises BadInput."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                data = file.read(_MOST_BYTES)
        else:
            data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: expected a readable text file in UTF-8{instead(error)}") from None
    return [line.strip() for line in text.removesuffix("\n").split("\n")]
