"""Populations with patients in common are noticed: each promise holds for itself only, and together they add up.

`<ledgers>/.fingerprints/` holds one random key for all populations and, of each site file's patients, the first 8 bytes
of the HMAC-SHA256 of each id, sorted. All of it is readable by the owner only, and holds no id in clear.

Limit, stated: who reads the key can try ids, and where ids are short numbers all of them; without the key, a file shows
how many patients there are, and how many two files have in common.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.files import lock_file, private_folder, write_atomic
from common.inputs import encode_text

_FOLDER, _KEY, _LOCK = ".fingerprints", ".key", ".lock"
_KEY_BYTES = 32
_BYTES = 8
"""Size of a fingerprint: two sets of a million patients each share one by chance with probability 5e-8."""


def record_patients(ledgers: Path, population: str, state_dir: Path, patients: Iterable[str]) -> dict[str, int]:
    """Keeps the fingerprints of a site file's patients and returns the number that each other population has too.

    Args:
        ledgers: folder of all ledgers.
        population: id of the site's population.
        state_dir: the site's state folder, which tells several site files of one population apart.
        patients: canonical ids of the site's patients.

    Returns:
        Other population -> number of patients in common, where there are any.
    """
    folder = private_folder(ledgers / _FOLDER)
    with lock_file(folder / _LOCK):
        key = _read_or_make_key(folder)
        own = np.unique(np.fromiter((_hash(key, patient) for patient in patients), dtype=np.uint64))
        write_atomic(_locate(folder, population, state_dir), _mark(key) + own.astype(">u8").tobytes())
        others: dict[str, list[NDArray[np.uint64]]] = {}
        for path in sorted(folder.glob("*.*")):
            other, kept = path.name.partition(".")[0], path.read_bytes()
            # Of another key, such as one that was lost: nothing can be told until that site is checked again.
            if other and other != population and kept[:_BYTES] == _mark(key):
                others.setdefault(other, []).append(np.frombuffer(kept[_BYTES:], dtype=">u8"))
    shared = {other: np.intersect1d(own, np.concatenate(parts)).size for other, parts in others.items()}
    return {other: count for other, count in shared.items() if count}


def forget_patients(ledgers: Path, population: str, state_dir: Path) -> None:
    """Removes the fingerprints of a site file's patients, until they are recorded anew.

    Args:
        ledgers: folder of all ledgers.
        population: id of the site's population.
        state_dir: the site's state folder.
    """
    _locate(ledgers / _FOLDER, population, state_dir).unlink(missing_ok=True)


def claim_run(ledger_folder: Path, run: str, site: str) -> bool:
    """Returns true if a site is the one of its population that takes part in a run of secure sums: who asks first is.

    Two sites of one population would bring a unit that both have into one sum twice; their two charges are those of two
    sums, each with noise of its own, and that costs less.

    Args:
        ledger_folder: folder of the population's ledger.
        run: name under which the ledger charges the run.
        site: name of the site.
    """
    folder = private_folder(ledger_folder / "secure_sums")
    path = folder / sha256(run.encode()).hexdigest()
    with lock_file(folder / _LOCK):
        if not path.exists():
            write_atomic(path, site.encode())
        return path.read_bytes() == site.encode()


def _locate(folder: Path, population: str, state_dir: Path) -> Path:
    # A population's own id holds no dot.
    return folder / f"{population}.{sha256(os.fsencode(state_dir)).hexdigest()[:16]}"


def _read_or_make_key(folder: Path) -> bytes:
    path = folder / _KEY
    key = path.read_bytes() if path.exists() else b""
    if len(key) != _KEY_BYTES:
        key = os.urandom(_KEY_BYTES)
        write_atomic(path, key)
    return key


def _hash(key: bytes, patient: str) -> int:
    return int.from_bytes(hmac.digest(key, b"patient " + encode_text(patient), sha256)[:_BYTES])


def _mark(key: bytes) -> bytes:
    """Returns the bytes that begin each file of this key."""
    return hmac.digest(key, b"key", sha256)[:_BYTES]
