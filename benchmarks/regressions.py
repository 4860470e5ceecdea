"""Rows of one table of benchmarks that are worse than in another, by more than either's own ratios spread.

python -m benchmarks.regressions OLD.json NEW.json

Ratios alone are compared: seconds of two days or machines are not comparable. The exit code is 1 where a row is worse.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SINGLE = 0.1
"""Spread of a row that was not timed in several pairs, as a part of its ratio."""


@dataclass(frozen=True)
class Row:
    """One claim as it was seen: its ratio, and how far the ratios of single turns spread."""

    ratio: float
    spread: float


def read_rows(text: str) -> dict[str, Row]:
    """Returns name -> row of a table that `benchmarks.run` wrote.

    Raises:
        ValueError: the text is no such table.
    """
    try:
        rows = [(str(row["name"]), float(row["ratio"]), row.get("low"), row.get("high")) for row in json.loads(text)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError("expected a table that `make bench` wrote, such as benchmarks/results/latest.json") from error
    return {
        name: Row(ratio, float(high - low) if low is not None and high is not None and high > low else SINGLE * ratio)
        for name, ratio, low, high in rows
    }


def list_worse(old: Mapping[str, Row], new: Mapping[str, Row]) -> list[str]:
    """Returns a line for each row that is in both and is worse in the new one by more than the larger spread."""
    pairs = [(name, old[name], row) for name, row in new.items() if name in old]
    return [
        f"{name}: {before.ratio:.3g} -> {after.ratio:.3g} (spread {max(before.spread, after.spread):.2g})"
        for name, before, after in pairs
        if after.ratio - before.ratio > max(before.spread, after.spread)
    ]


def main() -> None:
    """Compares two tables and prints what is worse, and which rows only one of them has."""
    if len(sys.argv) != 3:
        sys.exit("usage: python -m benchmarks.regressions OLD.json NEW.json")
    try:
        old, new = (read_rows(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    worse = list_worse(old, new)
    print("\n".join(worse) if worse else f"none of {len(old.keys() & new.keys())} rows is worse")
    for side, names in (("old", old.keys() - new.keys()), ("new", new.keys() - old.keys())):
        if names:
            print(f"only in the {side} table: {', '.join(sorted(names))}")
    sys.exit(bool(worse))


if __name__ == "__main__":
    main()
