"""Shared parts of the kinds: the restriction to some rows, and an unambiguous digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from common.inputs import encode_text
from common.plugins import LocalPath, Plugin


class SourceSettings(Plugin):
    """Base of every source's settings.

    Attributes:
        rows: a CSV `row,split` of 1-based positions in the source's index; client/data/records.py applies it, so that
            sites that share a source share its cached features.
    """

    rows: LocalPath | None = None


def digest(parts: Iterable[bytes]) -> str:
    """SHA-256 over parts, unambiguous about where one ends."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(len(part).to_bytes(8, "little"))
        sha.update(part)
    return sha.hexdigest()


def digest_of_texts(rows: Sequence[Sequence[str]]) -> str:
    """SHA-256 over rows of texts, unambiguous about where a row ends."""
    return digest(part for row in rows for part in (len(row).to_bytes(8, "little"), *map(encode_text, row)))
