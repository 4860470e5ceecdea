"""The feature store: a source is encoded once for a backbone, kept on disk, and read by memory map.

Invariant: an entry appears whole, by one rename, or not at all; everything in it is readable by its owner only.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from client.sources import Record, Source
from common.files import flush_folder, private_folder, write_atomic
from common.types import BadRecord

if TYPE_CHECKING:
    from common.backbones import Backbone

Progress = Callable[[int, int], None]
BATCH_SIZE = 100  # Measured best for small images on two cores: 100 to 125; 1000 is several times slower.


@dataclass(frozen=True)
class Problem:
    """A record that cannot be used: where it is and why, never what it holds."""

    file: str
    row: int
    reason: str
    task: str = ""


@dataclass(frozen=True)
class Features:
    """Features of a whole source, in its index's order.

    Attributes:
        features_ND: memory-mapped float32; a row of zeros where the record could not be read.
        valid_N: whether the record could be read.
        problems: those that could not.
    """

    features_ND: NDArray[np.float32] = field(repr=False)
    valid_N: NDArray[np.bool_] = field(repr=False)
    problems: tuple[Problem, ...]
    path: Path


class FeatureStore:
    """A folder of encoded sources, keyed by backbone (weights and preprocessing) and data digests."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open_or_encode(
        self,
        source: Source,
        backbone: Backbone,
        *,
        device: torch.device,
        progress: Progress | None = None,
    ) -> Features:
        """The features of a source, encoded now if they are not there yet.

        Args:
            source: what to encode.
            backbone: with what.
            device: where.
            progress: told (done, total) in records.
        """
        key = hashlib.sha256(f"{backbone.digest} {source.digest()}".encode()).hexdigest()
        entry = private_folder(self._folder) / key
        with _locked(self._folder / f".{key}.lock"):
            found = _open(entry)
            if found is None:
                # A leftover of a dead writer, or a damaged entry.
                shutil.rmtree(entry, ignore_errors=True)
                self._write(entry, source, backbone.to(device), progress)
                found = _open(entry)
        assert found is not None
        return found

    def _write(self, entry: Path, source: Source, backbone: Backbone, progress: Progress | None) -> None:
        index = source.index()
        scratch = Path(tempfile.mkdtemp(dir=self._folder, prefix=f".{entry.name}."))
        try:
            valid, problems = _encode(scratch / "features.npy", source, index, backbone, progress)
            about = {
                "shape": [len(index), backbone.feature_dim],
                "valid": np.packbits(valid).tobytes().hex(),
                "problems": [asdict(problem) for problem in problems],
                "bytes": (scratch / "features.npy").stat().st_size,
            }
            write_atomic(scratch / "about.json", json.dumps(about).encode())
            os.rename(scratch, entry)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        flush_folder(self._folder)


def _encode(
    path: Path, source: Source, index: list[Record], backbone: Backbone, progress: Progress | None
) -> tuple[NDArray[np.bool_], list[Problem]]:
    valid = np.zeros(len(index), dtype=np.bool_)
    problems: list[Problem] = []
    shape = (len(index), backbone.feature_dim)
    features = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    path.chmod(0o600)
    for start in range(0, len(index), BATCH_SIZE):
        positions, items = [], []
        for position in range(start, min(start + BATCH_SIZE, len(index))):
            try:
                items.append(backbone.preprocess(source.load(position)))
                positions.append(position)
            except BadRecord as error:
                problems.append(Problem(index[position].file, index[position].row, str(error)))
        if items:
            encoded = backbone.encode(torch.stack(items)).numpy()
            for position, row in zip(positions, encoded, strict=True):
                valid[position] = bool(np.isfinite(row).all())
                features[position] = np.where(valid[position], row, 0.0)
                if not valid[position]:
                    problems.append(Problem(index[position].file, index[position].row, "features are not finite"))
        if progress is not None:
            progress(min(start + BATCH_SIZE, len(index)), len(index))
    features.flush()
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return valid, problems


def _open(entry: Path) -> Features | None:
    """A complete entry, or None where there is none or it is damaged."""
    path = entry / "features.npy"
    try:
        about = json.loads((entry / "about.json").read_text(encoding="utf-8"))
        if path.stat().st_size != about["bytes"]:
            return None
        features = np.load(path, mmap_mode="r", allow_pickle=False)
        count = about["shape"][0]
        if list(features.shape) != about["shape"]:
            return None
        packed = np.frombuffer(bytes.fromhex(about["valid"]), dtype=np.uint8)
        valid = np.unpackbits(packed, count=count).astype(np.bool_)
        return Features(features, valid, tuple(Problem(**problem) for problem in about["problems"]), path)
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One encoder of an entry at a time; a second process waits and then reads."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
