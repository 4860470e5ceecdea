"""Table cells are text. How a cell is compared with the public names of a settings file, and read as a number.

A column of whole numbers with one empty cell is exported as `1.0`, `0.0` by many tools, and YAML reads an unquoted 1 as
a number: names that both parse as numbers are therefore equal when the numbers are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator


def number(text: str) -> float | None:
    """The finite number a cell holds, or None."""
    # Python also reads "1_000" as a number; no table writes numbers so.
    if "_" in text:
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def position(cell: str, names: Sequence[str]) -> int | None:
    """Index of the name that a cell equals, as text or else as a number; None where there is none."""
    text = cell.strip()
    if text in names:
        return names.index(text)
    value = number(text)
    if value is None:
        return None
    return next((index for index, name in enumerate(names) if number(name) == value), None)


def _text(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("expected a name; put yes, no, true and false in quotes")
    return str(value) if isinstance(value, int | float) else value


def _stripped(value: str) -> str:
    if not value.strip():
        raise ValueError("expected a name, got an empty one")
    return value.strip()


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    for index, name in enumerate(names):
        if position(name, names[:index]) is not None:
            raise ValueError(f"expected distinct names, got {name!r} twice")
    return names


CellName = Annotated[str, BeforeValidator(_text), AfterValidator(_stripped)]
"""A public name that cells are compared with; YAML numbers are taken as their text."""

CellNames = Annotated[tuple[CellName, ...], AfterValidator(_distinct)]
"""Distinct public names in a fixed order."""
