"""Sums that a population paid for once: the mean of its features, how frequent its labels are.

A later run that needs the same sum of the same population is sent the one that left already, with its noise, and pays
nothing. They lie beside the population's ledger, for all coordinators and site files that share it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from common.files import private_folder, write_atomic

_FOLDER = "measured"


@dataclass(frozen=True)
class Measured:
    """A sum that was released.

    Attributes:
        values: float32, with noise.
        deviation: deviation of the noise in each value; 0 without any.
    """

    values: NDArray[np.float32]
    deviation: float


def find_measured(ledger_folder: Path, about: object) -> Measured | None:
    """Returns what was released about something; None where nothing was, or its file is damaged.

    Args:
        ledger_folder: folder of the population's ledger.
        about: plain values that say what the sum is of.
    """
    try:
        with safe_open(_locate(ledger_folder, about), framework="numpy") as file:
            return Measured(file.get_tensor("values"), float(file.metadata()["deviation"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def keep_measured(ledger_folder: Path, about: object, measured: Measured) -> None:
    """Keeps what was released about something.

    Args:
        ledger_folder: folder of the population's ledger.
        about: plain values that say what the sum is of.
        measured: the sum.
    """
    path = _locate(ledger_folder, about)
    private_folder(path.parent)
    write_atomic(path, save({"values": measured.values}, metadata={"deviation": repr(measured.deviation)}))


def _locate(ledger_folder: Path, about: object) -> Path:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return ledger_folder / _FOLDER / f"{digest}.safetensors"
