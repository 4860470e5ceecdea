"""Prints what the exported network tells of texts: `python predict.py TEXT ...`.

Needs onnxruntime, numpy and tokenizers.
"""

import json
import sys
from pathlib import Path

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


if __name__ == "__main__":
    asked = sys.argv[1:2] in (["-h"], ["--help"])
    if asked or not sys.argv[1:]:
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    failed = 0
    session = onnxruntime.InferenceSession(FOLDER / "model.onnx")
    print(",".join(["record", *(f"{out['task']}: {name}" for out in STATED["outputs"] for name in out["columns"])]))
    for number, text in enumerate(sys.argv[1:], start=1):
        try:
            served = session.run(None, read([text]))
        except Exception as error:  # One text costs itself only.
            print(f"text {number}: expected words in UTF-8, got {type(error).__name__}", file=sys.stderr)
            failed = 1
            continue
        print(",".join([str(number), *(f"{value:.7g}" for part in served for value in part[0])]))
    sys.exit(failed)
