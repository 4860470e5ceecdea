"""Recordings of single words, joined into utterances whose transcripts are known.

They stand in for recorded speech where a data set has words only: each recording is part of one utterance, in an order
that a seed draws, with pauses between. One recording more or less may change how all others are joined: this is for
public recordings in simulations. What a site protects has to be whole utterances, such as a manifest lists.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from client.data.sources import SourceExample, SourceRecord
from client.data.sources.audio import Recordings
from client.data.sources.parts.base import SourceSettings, digest
from client.data.sources.parts.named import NamedGroups, Naming
from client.data.sources.parts.recordings import SUFFIXES, read_recording, require_soundfile
from client.data.sources.parts.tree import Tree, open_tree
from common.inputs import Audio, CellName, encode_text
from common.plugins import LocalPath
from common.types import BadInput, BadRecord

TRANSCRIPT = "transcript"


class Utterances(SourceSettings):
    """Settings: where, how a file's path holds the columns, and how recordings are joined.

    Attributes:
        path: a folder or zip; recordings lie anywhere below it.
        pattern: regular expression, searched in a file's relative path; each named group is a column. A file that it
            does not fit is left out.
        word: the group that is said in a recording; those of an utterance are its column `transcript`, in their order.
        by: groups that are the same in all recordings of an utterance, such as the speaker; they are columns too.
        patient: one of them that is the patient id.
        test: column -> values: a recording is held out where any of its cells is listed; all others are to train on.
            Without it the source states no split.
        words: smallest and largest number of recordings of an utterance.
        pause_s: silence between two recordings, in seconds.
        seed: seed of the order.
    """

    kind: Literal["utterances"]
    path: LocalPath
    pattern: NamedGroups
    word: str
    by: list[str]
    patient: str | None = None
    test: dict[str, list[CellName]] | None = None
    words: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(le=100)]] = (3, 6)
    pause_s: Annotated[float, Field(ge=0, le=10)] = 0.2
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> Utterances:
        self.naming().check()
        for key, name in (("word", self.word), *(("by", name) for name in self.by)):
            Naming(self.pattern, None, {name: []}).check() if key == "by" else Naming(self.pattern, name, None).check()
        if self.patient is not None and self.patient not in self.by:
            raise ValueError(f"patient: expected one of `by`, got {self.patient!r}")
        if self.words[0] > self.words[1]:
            raise ValueError(f"words: expected the smallest number first, got {self.words[0]} and {self.words[1]}")
        return self

    @classmethod
    def example(cls, folder: Path) -> SourceExample:
        """Ten tones of two patients, two of each held out."""
        settings = dict(Recordings.example(folder).settings)
        del settings["patient"]
        more = {"kind": "utterances", "word": "sound", "by": ["patient"], "patient": "patient", "words": [1, 2]}
        return SourceExample({**settings, **more}, ["q7-", "z-cough", "z-wheeze"])

    def open(self) -> JoinedRecordings:
        """The opened folder. Raises BadInput: missing, or without a recording that the pattern fits."""
        require_soundfile()
        tree = open_tree(self.path, "recordings").chosen(lambda name: name.suffix.lower() in SUFFIXES)
        joined = JoinedRecordings(self, tree)
        if not joined.parts:
            raise BadInput(f"{self.path}: expected recordings whose names fit the pattern, got none")
        return joined

    def naming(self) -> Naming:
        """Returns the rule by which a recording's path is read."""
        return Naming(self.pattern, self.patient, self.test)


@dataclass(frozen=True)
class JoinedRecordings:
    """An opened folder or zip."""

    settings: Utterances = field(repr=False)
    tree: Tree = field(repr=False)

    @cached_property
    def parts(self) -> list[list[SourceRecord]]:
        """The recordings of each utterance, in their order."""
        own, naming = self.settings, self.settings.naming()
        groups: dict[tuple[str, ...], list[SourceRecord]] = {}
        for number, name in enumerate(self.tree.stamps, start=1):
            record = naming.record(number, own.path.name, name)
            if record.cells[own.word]:
                groups.setdefault((record.split or "", *(record.cells[each] for each in own.by)), []).append(record)
        rng = np.random.default_rng(own.seed)
        return [part for _, group in sorted(groups.items()) for part in _divide(group, own.words, rng)]

    def digest(self) -> str:
        """Over every recording's path and its size and time of change, or its checksum in a zip; and how they join."""
        rule = self.settings.model_dump_json(exclude={"path", "rows"})
        return digest([self.tree.digest().encode(), encode_text(rule)])

    def index(self) -> list[SourceRecord]:
        """Utterances by what their recordings share, in the order that the seed draws."""
        own = self.settings
        return [
            SourceRecord(
                row=number,
                file=own.path.name,
                key=digest(encode_text(each.key) for each in part),
                patient=part[0].patient,
                split=part[0].split,
                cells={
                    **{name: part[0].cells[name] for name in own.by},
                    TRANSCRIPT: " ".join(each.cells[own.word] for each in part),
                },
                blank=part[0].blank,
            )
            for number, part in enumerate(self.parts, start=1)
        ]

    def load(self, position: int) -> Audio:
        """One utterance. Raises BadRecord: a recording of it is missing or unreadable, or has another sample rate."""
        read = [read_recording(self.tree.read(each.path, "recording")) for each in self.parts[position]]
        rate = read[0].sample_rate
        if any(each.sample_rate != rate for each in read):
            raise BadRecord("expected recordings of one sample rate")
        pause = np.zeros(round(self.settings.pause_s * rate), np.float32)
        pieces = [piece for each in read for piece in (pause, each.samples_T)]
        return Audio(np.concatenate(pieces[1:]), rate)


def _divide(group: list[SourceRecord], words: tuple[int, int], rng: np.random.Generator) -> list[list[SourceRecord]]:
    """Returns recordings in a random order, divided into runs of random lengths; the last ones as they come out."""
    order, runs = rng.permutation(len(group)).tolist(), []
    while order:
        count = int(rng.integers(words[0], words[1], endpoint=True))
        # What would be left is too short for an utterance of its own.
        if 0 < len(order) - count < words[0]:
            count = len(order) if len(order) <= words[1] else len(order) - words[0]
        runs.append([group[at] for at in order[:count]])
        order = order[count:]
    return runs
