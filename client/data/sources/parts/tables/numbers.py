"""Numbers as tables write them: a decimal comma, and marks between thousands."""

from __future__ import annotations

import re
from typing import Literal

Decimal = Literal[".", ","]
Thousands = Literal[".", ",", " ", "'", "none"]
"""A mark between groups of three digits; `none` says that there is none, so that a point is a decimal one."""

_SPACES = "[ \u00a0\u2009\u202f]"
_MARKS = {".": r"\.", ",": ",", " ": _SPACES, "'": "['\u2019]"}
_WITH_COMMA = re.compile(r"([+-]?[0-9]*),([0-9]+(?:[eE][+-]?[0-9]+)?)")
_POINTS = re.compile(r"[+-]?[1-9][0-9]{0,2}(?:\.[0-9]{3})+")
"""A number of which nobody knows whether its point is a decimal one, where others have decimal commas."""

_POINT = re.compile(r"[+-]?[0-9]*\.[0-9]+")
UNCLEAR = (
    'a number such as 1.234 among decimal commas; write `thousands: "."` where that is 1234, or `thousands: none` '
    "where it is a fraction"
)
UNGROUPED = "a number whose point does not stand before three digits, among numbers with points between thousands"


def convert_number(cell: str, decimal: Decimal, thousands: Thousands | None) -> str:
    """Returns a number with a decimal point and no other marks; other texts as they are.

    Args:
        cell: the cell.
        decimal: the decimal sign.
        thousands: the mark between thousands. Without one, 1.234.567,8 is read by its comma.
    """
    is_stated = thousands not in (None, "none")
    mark = thousands if is_stated else "." if decimal == "," else None
    if mark is not None:
        fraction = rf"{re.escape(decimal)}[0-9]+"
        # Without a comma, and unless the setting says so, 1.234 may as well have a decimal point.
        fraction = f"(?:{fraction})?" if is_stated else fraction
        if re.fullmatch(rf"[+-]?[0-9]{{1,3}}(?:{_MARKS[mark]}[0-9]{{3}})+{fraction}", cell):
            cell = re.sub(_MARKS[mark], "", cell)
    if decimal == ",":
        found = _WITH_COMMA.fullmatch(cell)
        cell = f"{found[1]}.{found[2]}" if found else cell
    return cell


def find_fault(cell: str, decimal: Decimal, thousands: Thousands | None) -> str:
    """Returns why a number cannot be read for sure, "" where it can, or is none.

    Args:
        cell: the cell.
        decimal: the decimal sign.
        thousands: the mark between thousands.
    """
    if decimal != ",":
        return ""
    if thousands is None and _POINTS.fullmatch(cell):
        return UNCLEAR
    if thousands == "." and _POINT.fullmatch(cell) and not _POINTS.fullmatch(cell):
        return UNGROUPED
    return ""
