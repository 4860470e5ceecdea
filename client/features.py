"""The feature store: a source is encoded once for a backbone, kept on disk, and read by memory map.

Invariant: an entry appears whole, by one rename, or not at all; everything in it is readable by its owner only.

# Shapes: N records of a source, D features.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from client.sources import Source
from common.files import flush_folder, private_folder, write_atomic
from common.types import BadRecord

if TYPE_CHECKING:
    from common.backbones import Backbone

Progress = Callable[[int, int], None]
BATCH_SIZE = 100  # Measured best for small images on two cores: 100 to 125; 1000 is several times slower.


@dataclass(frozen=True)
class Features:
    """Features of a whole source, in its index's order.

    Attributes:
        features_ND: memory-mapped float32, read-only; a row of zeros where a record has no features.
        unusable: position -> why that record has no features. Positions, not files and rows: another file with the same
            content shares the entry.
        path: the array's file, for later opening.
    """

    features_ND: NDArray[np.float32] = field(repr=False)
    unusable: Mapping[int, str] = field(repr=False)
    path: Path

    @property
    def valid_N(self) -> NDArray[np.bool_]:
        """Whether a record has features."""
        valid_N = np.ones(len(self.features_ND), dtype=np.bool_)
        valid_N[list(self.unusable)] = False
        return valid_N


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

        Two processes may ask at once: one encodes, the other waits and reads.

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
                # Under the lock nobody else writes this entry: what lies there is damaged or a dead writer's.
                for leftover in (entry, *self._folder.glob(f".{key}.*.partial")):
                    shutil.rmtree(leftover, ignore_errors=True)
                self._write(entry, source, backbone.to(device), progress)
                found = _open(entry)
        assert found is not None
        return found

    def _write(self, entry: Path, source: Source, backbone: Backbone, progress: Progress | None) -> None:
        scratch = Path(tempfile.mkdtemp(dir=self._folder, prefix=f".{entry.name}.", suffix=".partial"))
        try:
            path = scratch / "features.npy"
            shape = (len(source.index()), backbone.feature_dim)
            unusable = _encode(path, shape, source, backbone, progress)
            about = {
                "shape": shape,
                "bytes": path.stat().st_size,
                "unusable": {str(position): reason for position, reason in unusable.items()},
            }
            signed = {"about": about, "sha256": _digest(about)}
            write_atomic(scratch / "about.json", json.dumps(signed).encode())
            scratch.rename(entry)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        flush_folder(self._folder)


def _encode(
    path: Path, shape: tuple[int, int], source: Source, backbone: Backbone, progress: Progress | None
) -> dict[int, str]:
    """Write the array and return the records that have no features."""
    count, _ = shape
    unusable: dict[int, str] = {}
    features_ND = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    path.chmod(0o600)
    for start in range(0, count, BATCH_SIZE):
        positions, items = [], []
        end = min(start + BATCH_SIZE, count)
        for position in range(start, end):
            try:
                items.append(backbone.preprocess(source.load(position)))
                positions.append(position)
            except BadRecord as error:
                unusable[position] = str(error)
        if items:
            encoded_BD = backbone.encode(torch.stack(items)).numpy()
            finite_B = np.isfinite(encoded_BD).all(axis=1)
            features_ND[positions] = np.where(finite_B[:, None], encoded_BD, 0.0)
            for index in np.flatnonzero(~finite_B):
                unusable[positions[index]] = "features are not finite"
        if progress is not None:
            progress(end, count)
    features_ND.flush()
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return unusable


def _open(entry: Path) -> Features | None:
    """A complete entry, or None where there is none or it is damaged."""
    path = entry / "features.npy"
    try:
        signed = json.loads((entry / "about.json").read_text(encoding="utf-8"))
        about = signed["about"]
        if signed["sha256"] != _digest(about) or path.stat().st_size != about["bytes"]:
            return None
        features_ND = np.load(path, mmap_mode="r", allow_pickle=False)
        if list(features_ND.shape) != about["shape"] or features_ND.dtype != np.float32:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    unusable = {int(position): reason for position, reason in about["unusable"].items()}
    return Features(features_ND, unusable, path)


def _digest(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One encoder of an entry at a time; the system frees the lock of a process that died."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
