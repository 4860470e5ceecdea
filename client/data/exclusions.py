"""Patients and records that a site has been told to leave out, for ever, kept as keyed hashes instead of ids.

`exclusions.json` holds HMAC-SHA256 values under the 32 random bytes of `exclusions.key`; both are their owner's only.
A record is left out if its patient id (in the form that all sources share) or its key (such as its relative path) is
listed. It is neither loaded nor encoded, and named nowhere: not in `problems.csv`, not in the journal.

Limit, stated: who reads the key can try ids; and the hospital's own files still hold what they hold.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client.data.sources import PassesOver, Source, SourceRecord
from common.files import private_folder, write_atomic
from common.inputs import encode_text, normalise_patient_id
from common.types import BadInput, BadRecord

_HASHES, _KEY = "exclusions.json", "exclusions.key"
_KEY_BYTES = 32


@dataclass(frozen=True)
class Exclusions:
    """Excluded patients and records as keyed hashes: one can be tested, none can be listed.

    Attributes:
        key: of the hashes.
        hashes: of ids.
    """

    key: bytes = field(repr=False)
    hashes: frozenset[str] = field(repr=False)

    @classmethod
    def read(cls, state_dir: Path) -> Exclusions:
        """A site's exclusions; none where there is no list.

        Raises:
            BadInput: the list or its key is missing or damaged: nobody may then be let in by mistake.
        """
        listed, key = state_dir / _HASHES, state_dir / _KEY
        if not listed.exists() and not key.exists():
            return cls(b"", frozenset())
        try:
            found = cls(key.read_bytes(), frozenset(map(str, json.loads(listed.read_text(encoding="utf-8")))))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise BadInput(
                f"{_HASHES}: expected the exclusion list and its key, got {type(error).__name__}; restore both or "
                "purge again after removing both"
            ) from error
        if len(found.key) != _KEY_BYTES:
            raise BadInput(f"{_KEY}: expected {_KEY_BYTES} bytes, got {len(found.key)}")
        return found

    def with_ids(self, ids: Iterable[str]) -> Exclusions:
        """The same and more.

        Raises:
            BadInput: an id is blank.
        """
        cleaned = [(text.strip(), normalise_patient_id(text)) for text in ids]
        if not all(all(pair) for pair in cleaned):
            raise BadInput("expected patient ids or record keys, got a blank one")
        key = self.key or os.urandom(_KEY_BYTES)
        # An id that is already listed as a record's key or in the shared form stays one hash.
        return Exclusions(key, self.hashes | {_hash(key, text) for pair in cleaned for text in pair})

    def write(self, state_dir: Path) -> None:
        """Keep them; durable when this returns. The list first: without its key, reading it fails closed."""
        private_folder(state_dir)
        write_atomic(state_dir / _HASHES, json.dumps(sorted(self.hashes)).encode())
        write_atomic(state_dir / _KEY, self.key)

    def positions(self, index: Sequence[SourceRecord]) -> frozenset[int]:
        """Returns the positions of the excluded records of a source."""
        if not self.hashes:
            return frozenset()
        return frozenset(position for position, record in enumerate(index) if self._names(record))

    def applied(self, source: Source) -> Source:
        """The source without them; the source itself where it holds none, so that cached features stay shared."""
        left_out = self.positions(source.index())
        return leave_out(source, left_out) if left_out else source

    def _names(self, record: SourceRecord) -> bool:
        patient = record.patient or ""
        # Lists of earlier versions hold ids as they were written.
        known = (record.key, patient.strip(), normalise_patient_id(patient))
        return any(text and _hash(self.key, text) in self.hashes for text in known)


def leave_out(source: Source, positions: frozenset[int]) -> Source:
    """Returns a source whose records at some positions cannot be loaded, and are not encoded; positions stay."""
    return _Without(source, positions)


@dataclass(frozen=True)
class _Without:
    """A source whose left-out records cannot be loaded. Positions stay: row lists count them."""

    source: Source = field(repr=False)
    left_out: frozenset[int] = field(repr=False)

    @property
    def passed_over(self) -> int:
        return self.source.passed_over if isinstance(self.source, PassesOver) else 0

    def digest(self) -> str:
        """Another one than the whole source's: their features are not the same."""
        return hashlib.sha256(f"{self.source.digest()} without {sorted(self.left_out)}".encode()).hexdigest()

    def index(self) -> list[SourceRecord]:
        return self.source.index()

    def load(self, position: int) -> Any:
        if position in self.left_out:
            raise BadRecord("left out")
        return self.source.load(position)


def _hash(key: bytes, text: str) -> str:
    return hmac.new(key, encode_text(text), hashlib.sha256).hexdigest()
