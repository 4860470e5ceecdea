"""Prints what the exported network tells of texts: `python predict.py TEXT ...`.

Needs onnxruntime, numpy and tokenizers.
"""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

FOLDER = Path(__file__).resolve().parent
STATED = json.loads((FOLDER / "preprocessing.json").read_text(encoding="utf-8"))
USAGE = "usage: python predict.py TEXT ..."


def read(texts: list[str]) -> dict[str, np.ndarray]:
    """Returns the network's inputs by name: tokens of all texts, padded to the longest."""
    (step,) = STATED["before"]
    tokenizer = Tokenizer.from_file(str(FOLDER / step["file"]))
    tokenizer.enable_truncation(step["max_length"])
    tokenizer.enable_padding(pad_id=step["pad_id"])
    encoded = tokenizer.encode_batch(texts)
    rows = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    return {
        each["name"]: np.array([getattr(text, rows[each["name"]]) for text in encoded], dtype=np.int64)
        for each in STATED["inputs"]
    }


def list_columns(stated: dict[str, Any]) -> list[str]:
    """Returns the names of a task's cells."""
    named = [f"{stated['task']}: {name}" for name in stated["columns"]]
    return [stated["task"], *named] if "text" in stated else named


def tell(stated: dict[str, Any], told: np.ndarray) -> list[str]:
    """Returns a task's cells of one text."""
    if "text" not in stated:
        return [f"{value:.7g}" for value in told]
    from written import read_text

    written, confidence = read_text(told, stated)
    return [written, f"{confidence:.7g}"]


if __name__ == "__main__":
    asked = sys.argv[1:2] in (["-h"], ["--help"])
    if asked or not sys.argv[1:]:
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    failed = 0
    session = onnxruntime.InferenceSession(FOLDER / "model.onnx")
    csv.writer(sys.stdout).writerow(["record", *(name for out in STATED["outputs"] for name in list_columns(out))])
    for number, text in enumerate(sys.argv[1:], start=1):
        try:
            served = session.run(None, read([text]))
        except Exception as error:  # One text costs itself only.
            print(f"text {number}: expected words in UTF-8, got {type(error).__name__}", file=sys.stderr)
            failed = 1
            continue
        cells = [str(number)]
        for out, part in zip(STATED["outputs"], served, strict=True):
            cells += tell(out, part[0])
        csv.writer(sys.stdout).writerow(cells)
    sys.exit(failed)
