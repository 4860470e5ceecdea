"""Reads the text in what the exported network tells of a record; needs numpy, and tokenizers for texts of tokens.

Of a transcript the network tells the outputs of each frame, that of the blank first, and zeros where the recording has
ended; `decoding.py` finds its symbols. Of a text that is written it tells the token at each place and the logarithm of
its probability; -1 stands behind the last.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).resolve().parent


def read_text(told: np.ndarray, stated: dict[str, Any]) -> tuple[str, float]:
    """Returns a text and its confidence.

    Args:
        told: what the network tells of one record, places x numbers.
        stated: what preprocessing.json says of this output.
    """
    rule = stated["text"]
    return _read_frames(told, rule) if rule["rule"] == "ctc" else _read_tokens(told, rule)


def _read_frames(told: np.ndarray, rule: dict[str, Any]) -> tuple[str, float]:
    from decoding import find_symbols

    own = told[(told != 0.0).any(axis=1)].astype(np.float64)
    found = find_symbols(own, rule["beam"], rule["prior"])
    text = rule["join"].join(rule["symbols"][index] for index in found[: rule["most"]])
    best = own.max(axis=1, keepdims=True, initial=-math.inf)
    sure = -np.log(np.exp(own - best).sum(axis=1))
    return " ".join(text.split()), float(np.exp(sure.mean())) if len(own) else 1.0


def _read_tokens(told: np.ndarray, rule: dict[str, Any]) -> tuple[str, float]:
    from tokenizers import Tokenizer

    own = told[told[:, 0] >= 0.0]
    tokens = [token for token in own[:, 0].astype(int).tolist() if token != rule["end"]]
    text = Tokenizer.from_file(str(FOLDER / rule["file"])).decode(tokens, skip_special_tokens=True)
    return text.strip(), float(np.exp(own[:, 1].mean())) if len(own) else 1.0
