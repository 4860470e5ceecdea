"""Prints what the exported network tells of a table's rows: `python predict.py TABLE.csv`.

Needs onnxruntime and numpy.
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

FOLDER = Path(__file__).resolve().parent
STATED = json.loads((FOLDER / "preprocessing.json").read_text(encoding="utf-8"))
USAGE = "usage: python predict.py TABLE.csv"


def number(text: str) -> float:
    """Returns a cell as a number; NaN where it is none."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


def read(row: dict[str, str | None]) -> np.ndarray:
    """Returns a row as the network reads it: numbers, levels by their place, NaN for what is empty."""
    (step,) = STATED["before"]
    cells = []
    for column in step["columns"]:
        name, text = column["name"], row[column["name"]]
        if text is None:
            raise ValueError(f"column {name!r}: expected a value, got a row that ends before it")
        text = text.strip()
        if text == "" or text in step["missing_values"]:
            cells.append(np.nan)
            bad = column["missing"] == "refuse"
        elif column["levels"] is None:
            cells.append(number(text))
            bad = not np.isfinite(cells[-1])
        else:
            equal = [level == text or number(level) == number(text) for level in column["levels"]]
            cells.append(float(equal.index(True)) if any(equal) else np.nan)
            bad = not any(equal)
        if bad:
            raise ValueError(f"column {name!r}: expected another value, got {text!r}")
    return np.array(cells, dtype=np.float64)


if __name__ == "__main__":
    asked = sys.argv[1:2] in (["-h"], ["--help"])
    if asked or len(sys.argv) != 2:
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    failed = 0
    session = onnxruntime.InferenceSession(FOLDER / "model.onnx")
    print(",".join(["record", *(f"{out['task']}: {name}" for out in STATED["outputs"] for name in out["columns"])]))
    try:
        # A byte that is no UTF-8 makes its own cell unfit, not the file.
        with open(sys.argv[1], newline="", encoding="utf-8", errors="replace") as file:
            first = file.readline()
            file.seek(0)
            table = csv.DictReader(file, delimiter=max(",;\t", key=first.count))
            names, rows = set(table.fieldnames or ()), list(table)
    except (OSError, csv.Error) as error:
        sys.exit(f"{sys.argv[1]}: expected a CSV table that can be read, got {type(error).__name__}")
    lacking = {column["name"] for column in STATED["before"][0]["columns"]} - names
    if lacking:
        sys.exit(f"{sys.argv[1]}: expected the columns {', '.join(sorted(lacking))}, which it lacks")
    for count, row in enumerate(rows, start=1):
        try:
            cells = read(row)
        except ValueError as error:  # One row costs itself only.
            print(f"row {count}: {error}", file=sys.stderr)
            failed = 1
            continue
        served = session.run(None, {STATED["inputs"][0]["name"]: cells[None]})
        print(",".join([str(count), *(f"{value:.7g}" for part in served for value in part[0])]))
    sys.exit(failed)
