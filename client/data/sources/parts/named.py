"""Files whose paths say what they are, such as `7_jackson_32.wav`: a regular expression's named groups are columns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator

from client.data.sources import SourceRecord
from client.data.sources.parts.tree import make_readable


def _named_groups(pattern: str) -> str:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"expected a regular expression, got one with an error: {error}") from error
    if not compiled.groupindex:
        raise ValueError("expected a regular expression with a named group for each column: (?P<digit>\\d)")
    return pattern


NamedGroups = Annotated[str, AfterValidator(_named_groups)]
"""A regular expression with at least one named group."""


def _one_group(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"expected a regular expression, got one with an error: {error}") from error
    if groups != 1:
        raise ValueError(f"expected a regular expression with one group, got {groups}")
    return pattern


OneGroup = Annotated[str, AfterValidator(_one_group)]
"""A regular expression with exactly one group."""


def find_patient(pattern: str | None, name: str) -> str | None:
    """Returns the patient id in a file's name, "" where it has none; None without a pattern."""
    if pattern is None:
        return None
    match = re.search(pattern, name)
    return (match.group(1) or "") if match else ""


@dataclass(frozen=True)
class Naming:
    """A rule that reads columns, patient and side from a file's path.

    Attributes:
        pattern: searched in a file's relative path; each named group is a column. A file that it does not fit has
            empty cells.
        patient: the group that is the patient id.
        test: column -> values: a file is held out where any of its cells is listed; all others are to train on.
            Without it no side is stated.
    """

    pattern: str
    patient: str | None
    test: Mapping[str, Sequence[str]] | None

    def check(self) -> None:
        """Raise ValueError where a column is none of the pattern's groups."""
        known = list(re.compile(self.pattern).groupindex)
        for key, name in (("patient", self.patient), *(("test", name) for name in self.test or ())):
            if name is not None and name not in known:
                raise ValueError(f"{key}: expected one of the pattern's groups {', '.join(known)}, got {name!r}")

    def record(self, row: int, file: str, path: str) -> SourceRecord:
        """Returns the index entry of a file.

        Args:
            row: 1-based position of the file, for messages.
            file: name of the folder or zip, for messages.
            path: relative path of the file, which is its key.
        """
        pattern = re.compile(self.pattern)
        match = pattern.search(make_readable(path))
        cells = {column: (match[column] or "") if match else "" for column in pattern.groupindex}
        return SourceRecord(
            row=row,
            file=file,
            key=path,
            path=path,
            patient=cells[self.patient] if self.patient else None,
            split=_side(self.test, cells) if self.test is not None else None,
            cells=cells,
            blank="blank patient id" if match else "the file's name does not fit the source's pattern",
        )


def _side(test: Mapping[str, Sequence[str]], cells: Mapping[str, str]) -> str:
    return "test" if any(cells[column] in values for column, values in test.items()) else "train"
