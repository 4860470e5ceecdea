"""Texts and their translations: two files with as many lines each, or a table of two columns of texts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from client.data.sources import open_source
from client.data.sources.pairs import SOURCE, TARGET
from client.data.sources.parts.tree import Tree
from client.inspect.finding import ColumnFacts, Finding
from common.types import BadInput

_FILE = re.compile(r"(?P<side>[^/]+)\.(?P<language>[a-z]{2,3})(\.txt)?(\.gz)?")
_OTHER_ENDS = frozenset({"txt", "csv", "tsv", "md", "npz", "npy", "zip"})
_NOTES = (
    "What is to be written is a guess: exchange the two where it is the other one.",
    "`headwater simulate pretrain` writes the backbone's weights, from public pairs alone; sites only receive them.",
)


def find_pairs(path: Path, tree: Tree) -> Finding | None:
    """Returns what two aligned files hold, or two for each side; None where a folder has none such.

    Args:
        path: the folder.
        tree: its files.
    """
    found: dict[str, dict[str, Path]] = {}
    for name in tree.stamps:
        match = _FILE.fullmatch(name)
        if match is not None and match["language"] not in _OTHER_ENDS:
            found.setdefault(match["language"], {})[match["side"]] = path / name
    if len(found) != 2:
        return None
    (first, sources), (second, targets) = sorted(found.items(), key=lambda item: (item[0] != "en", item[0]))
    if set(sources) != set(targets) or not (len(sources) == 1 or set(sources) == {"train", "test"}):
        return None
    files: list[Any] = [next(iter(each.values())) if len(each) == 1 else each for each in (sources, targets)]
    source = {"kind": "pairs", "source": files[0], "target": files[1]}
    try:
        records = len(open_source(source, "sources.records").open().index())
    except BadInput:
        return None
    columns = (ColumnFacts(SOURCE, "text", records, 0), ColumnFacts(TARGET, "translation", records, 0))
    what = f"lines in {first} and in {second}"
    return Finding(path, what, "text", records, columns, source, TARGET, has_split=len(sources) > 1, notes=_NOTES)


def guess_translation(columns: Sequence[ColumnFacts], task: str | None) -> str | None:
    """Returns the column of translations, of a table of two columns of texts; None for another table.

    Args:
        columns: facts about all columns.
        task: the label column that was asked for; None for a guess.
    """
    if len(columns) != 2 or any(column.kind != "text" for column in columns):
        return None
    return task if task in {column.name for column in columns} else columns[1].name


def mark_translation(finding: Finding) -> Finding:
    """Returns the same with its label as what is to be written, none of which is shown."""
    shown = [
        replace(each, kind="translation", values=(), observed=None) if each.name == finding.label else each
        for each in finding.columns
    ]
    source = {**finding.source, "text_pair": finding.label}
    return replace(finding, source=source, columns=tuple(shown), notes=(*finding.notes, *_NOTES))
