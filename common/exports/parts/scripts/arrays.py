"""Prints what the exported network tells of records that are prepared already: `python predict.py RECORDS.npz`.

The file has one array for each input that preprocessing.json names, records first. Needs onnxruntime and numpy.
"""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

FOLDER = Path(__file__).resolve().parent
STATED = json.loads((FOLDER / "preprocessing.json").read_text(encoding="utf-8"))
USAGE = "usage: python predict.py RECORDS.npz"


def sum_up(stated: dict[str, Any], told: np.ndarray) -> list[float]:
    """Returns the columns of what the network tells of one record for a task; maps are summed up over their places."""
    if "maps" in stated:
        flat = told.reshape(len(told), -1)[: len(stated["columns"])]
        told = flat.mean(axis=1) if stated["column_of_map"] == "mean" else flat.max(axis=1)
    return [float(value) for value in told]


def list_columns(stated: dict[str, Any]) -> list[str]:
    """Returns the names of a task's cells."""
    named = [f"{stated['task']}: {name}" for name in stated["columns"]]
    return [stated["task"], *named] if "text" in stated else named


def tell(stated: dict[str, Any], told: np.ndarray) -> list[str]:
    """Returns a task's cells of one record."""
    if "text" not in stated:
        return [f"{value:.7g}" for value in sum_up(stated, told)]
    from written import read_text

    text, confidence = read_text(told, stated)
    return [text, f"{confidence:.7g}"]


if __name__ == "__main__":
    asked = sys.argv[1:2] in (["-h"], ["--help"])
    if asked or len(sys.argv) != 2:
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    session = onnxruntime.InferenceSession(FOLDER / "model.onnx")
    csv.writer(sys.stdout).writerow(["record", *(name for out in STATED["outputs"] for name in list_columns(out))])
    try:
        with np.load(sys.argv[1]) as arrays:
            inputs = {each["name"]: arrays[each["name"]].astype(each["dtype"]) for each in STATED["inputs"]}
        served = session.run(None, inputs)
    except Exception as error:  # NumPy, zip and the network raise many kinds.
        names = ", ".join(f"{each['name']} ({' x '.join(map(str, each['shape']))})" for each in STATED["inputs"])
        sys.exit(f"{sys.argv[1]}: expected an .npz file with {names}, got {type(error).__name__}")
    for number in range(len(served[0])):
        cells = [str(number + 1)]
        for out, part in zip(STATED["outputs"], served, strict=True):
            cells += tell(out, part[number])
        csv.writer(sys.stdout).writerow(cells)
