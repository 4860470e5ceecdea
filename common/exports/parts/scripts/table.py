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


def number(text: str) -> float:
    """Returns a cell as a number; NaN where it is none."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


def read(row: dict[str, str]) -> np.ndarray:
    """Returns a row as the network reads it: numbers, levels by their place, NaN for what is empty."""
    (step,) = STATED["before"]
    cells = []
    for column in step["columns"]:
        name, text = column["name"], row[column["name"]].strip()
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
            sys.exit(f"column {name!r}: expected another value, got {text!r}")
    return np.array(cells, dtype=np.float64)


if __name__ == "__main__":
    session = onnxruntime.InferenceSession(FOLDER / "model.onnx")
    print(",".join(["record", *(f"{out['task']}: {name}" for out in STATED["outputs"] for name in out["columns"])]))
    with open(sys.argv[1], newline="", encoding="utf-8") as file:
        for count, row in enumerate(csv.DictReader(file), start=1):
            served = session.run(None, {STATED["inputs"][0]["name"]: read(row)[None]})
            print(",".join([str(count), *(f"{value:.7g}" for part in served for value in part[0])]))
