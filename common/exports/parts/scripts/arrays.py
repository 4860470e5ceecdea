"""Prints what the exported network tells of records that are prepared already: `python predict.py RECORDS.npz`.

The file has one array for each input that preprocessing.json names, records first. Needs onnxruntime and numpy.
"""

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


if __name__ == "__main__":
    asked = sys.argv[1:2] in (["-h"], ["--help"])
    if asked or len(sys.argv) != 2:
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    session = onnxruntime.InferenceSession(FOLDER / "model.onnx")
    print(",".join(["record", *(f"{out['task']}: {name}" for out in STATED["outputs"] for name in out["columns"])]))
    try:
        with np.load(sys.argv[1]) as arrays:
            inputs = {each["name"]: arrays[each["name"]].astype(each["dtype"]) for each in STATED["inputs"]}
        served = session.run(None, inputs)
    except Exception as error:  # NumPy, zip and the network raise many kinds.
        names = ", ".join(f"{each['name']} ({' x '.join(map(str, each['shape']))})" for each in STATED["inputs"])
        sys.exit(f"{sys.argv[1]}: expected an .npz file with {names}, got {type(error).__name__}")
    for number in range(len(served[0])):
        values = [
            value for out, part in zip(STATED["outputs"], served, strict=True) for value in sum_up(out, part[number])
        ]
        print(",".join([str(number + 1), *(f"{value:.7g}" for value in values)]))
