"""Prints what the exported network tells of records that are prepared already: `python predict.py RECORDS.npz`.

The file has one array for each input that preprocessing.json names, records first. Needs onnxruntime and numpy.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

FOLDER = Path(__file__).resolve().parent
STATED = json.loads((FOLDER / "preprocessing.json").read_text(encoding="utf-8"))

if __name__ == "__main__":
    session = onnxruntime.InferenceSession(FOLDER / "model.onnx")
    print(",".join(["record", *(f"{out['task']}: {name}" for out in STATED["outputs"] for name in out["columns"])]))
    with np.load(sys.argv[1]) as arrays:
        inputs = {each["name"]: arrays[each["name"]].astype(each["dtype"]) for each in STATED["inputs"]}
    served = session.run(None, inputs)
    for number in range(len(served[0])):
        print(",".join([str(number + 1), *(f"{value:.7g}" for part in served for value in part[number])]))
