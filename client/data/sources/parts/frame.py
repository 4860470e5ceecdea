"""Read a table with every cell as text. No message repeats a cell, and none a column name that the file holds: where a
file has no header, its first record would be taken for one.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator

from common.errors import instead
from common.types import BadInput

if TYPE_CHECKING:
    import pandas as pd

WHITESPACE = "whitespace"


def _one_character(value: str) -> str:
    if len(value) != 1 and value != WHITESPACE:
        raise ValueError(f"expected one character or {WHITESPACE!r}, got {value!r}")
    return value


Separator = Annotated[str, AfterValidator(_one_character)]
"""What stands between the cells of a text file: one character, or any amount of white space."""


def read_frame(
    path: Path, separator: str = ",", columns: Sequence[str] | None = None, *, quotes: bool = True
) -> pd.DataFrame:
    """A table of stripped texts; "" where a cell is empty or a row ends early.

    Args:
        path: .parquet, or text in any other case.
        separator: see `Separator`.
        columns: names for a text file without a header.
        quotes: whether a quote may enclose a cell of a text file.

    Returns:
        The table, without columns whose name occurs twice: to ask for one of them is an error.

    Raises:
        BadInput: missing, unreadable, a row longer than the first, or another number of columns than `columns`.
    """
    import pyarrow

    try:
        frame = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_text(path, separator, quotes)
    except (OSError, ValueError, OverflowError, TypeError, pyarrow.ArrowException) as error:
        # From None: a parser's own message may quote the file.
        raise BadInput(f"{path}: expected a readable table{instead(error)}") from None
    if path.suffix.lower() != ".parquet":
        if columns is None:
            columns, frame = [str(name).strip() for name in frame.iloc[0].fillna("")], frame.iloc[1:]
        if len(columns) != frame.shape[1]:
            raise BadInput(f"{path}: expected {len(columns)} columns, as many as `columns` names, got {frame.shape[1]}")
        frame.columns = list(columns)
    frame = frame.loc[:, ~frame.columns.duplicated(keep=False)].reset_index(drop=True)
    return frame.fillna("").map(str.strip)


def _read_parquet(path: Path) -> pd.DataFrame:
    import pyarrow.parquet

    # Not pandas.read_parquet: it follows what pandas once wrote about the table, which hides an index column and, where
    # it is damaged, fails in ways without end. A missing whole number must not turn the others into 1.0 either.
    table = pyarrow.parquet.read_table(path)
    # Text that is no UTF-8 would otherwise fail later, with a message that quotes the cell.
    table.validate(full=True)
    frame = table.to_pandas(ignore_metadata=True, integer_object_nulls=True)
    frame.columns = [str(name) for name in frame.columns]
    return frame.astype("string")


def _read_text(path: Path, separator: str, quotes: bool) -> pd.DataFrame:
    import pandas as pd

    # Always without a header: pandas silently takes leading columns for an index where the first row is longer than
    # the names.
    return pd.read_csv(
        path,
        sep=r"\s+" if separator == WHITESPACE else separator,
        header=None,
        dtype=str,
        keep_default_na=False,
        skipinitialspace=True,
        quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
        encoding="utf-8-sig",
    )


def require_columns(frame: pd.DataFrame, path: Path, names: Iterable[str | None]) -> None:
    """Checks that a table has the named columns.

    Args:
        frame: the table.
        path: path of its file, for messages.
        names: names of columns; None stands for a column that is not asked for.

    Raises:
        BadInput: a name is no column of the table.
    """
    for name in names:
        if name is not None and name not in frame.columns:
            raise BadInput(
                f"{path}: expected exactly one column {name!r} among its {frame.shape[1]}; see the file's first line, "
                "or name the columns of a file without a header"
            )
