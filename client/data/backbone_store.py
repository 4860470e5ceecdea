"""Backbones a site has: received in parts or opened by itself, stored once by digest, verified before every use.

A part is on disk before it is confirmed, so that a broken connection or a restart costs the missing parts only. The
weights' file appears last and whole: its presence marks a complete entry.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from common.backbones import Kind, Language, list_weights_paths
from common.errors import instead
from common.files import private_folder, stamp_file, write_atomic
from common.messages import PART_BYTES
from common.model.backbones import MAX_WEIGHT_BYTES, Backbone, load_blob, open_pretrained, verify_blob
from common.plugins import Spec, resolve
from common.types import BackboneBlob, BadInput, DigestMismatch

_PART_NAME = re.compile(r"(\d+)-of-(\d+)")
_SPARE_BYTES = 1 << 30
"""Disk space that a transfer leaves free: a full disk would stop the ledger."""


class BackboneStore:
    """A folder of backbones, one sub-folder for each digest.

    Args:
        folder: where.
        opened: digest -> backbone that is open in this process already: its bytes are verified, and it is not built
            from them once more. Sites of one simulation share theirs.
        max_bytes: larger ones are not received.
    """

    def __init__(
        self, folder: Path, opened: Mapping[str, Backbone] | None = None, *, max_bytes: int = MAX_WEIGHT_BYTES
    ) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._opened = opened or {}

    def has(self, digest: str) -> bool:
        """Returns whether a backbone is stored; it was verified when it was stored."""
        return self.locate_weights(digest).exists()

    def locate_weights(self, digest: str) -> Path:
        """Returns the file of a stored backbone's weights."""
        return self._folder / digest / "weights.safetensors"

    def held_parts(self, digest: str) -> tuple[int, ...]:
        """Returns the indices of the parts that are stored of a transfer that has not ended."""
        return tuple(sorted(index for index, _ in self._whole_parts(digest)))

    def put_part(self, digest: str, index: int, total: int, data: bytes) -> None:
        """Stores one part of a backbone.

        Args:
            digest: digest of the whole backbone.
            index: index of the part, from 0.
            total: number of parts of the whole.
            data: bytes of the part.

        Raises:
            BadInput: the whole would not leave enough of the disk free, or is larger than this site takes.
        """
        if (total - 1) * PART_BYTES > self._max_bytes:
            raise BadInput(
                f"backbone_limit_gib: expected a backbone of at most {self._max_bytes / 2**30:.3g} GiB, got "
                f"{total * PART_BYTES / 2**30:.3g}"
            )
        folder = private_folder(private_folder(self._folder) / f"{digest}.parts")
        whole = set(self._whole_parts(digest).values())
        for other in folder.iterdir():
            # Of a transfer that was cut in another way, or torn by a kill while it was written.
            if other not in whole or not other.name.endswith(f"-of-{total}"):
                other.unlink()
        missing = (total - len(self.held_parts(digest))) * PART_BYTES
        # Twice: the parts, and the whole that is made of them.
        if shutil.disk_usage(folder).free < missing + total * PART_BYTES + _SPARE_BYTES:
            raise BadInput(
                f"state_dir: expected room for a backbone of {total * PART_BYTES >> 20} MiB, got a full disk"
            )
        write_atomic(folder / f"{index}-of-{total}", data)

    def assemble(self, digest: str, spec: str) -> Backbone:
        """The backbone whose parts have all come: verified, kept, and returned.

        Raises:
            DigestMismatch: the weights or settings are not the ones the digest names; nothing is kept.
            BadInput: a part is missing.
        """
        folder = self._parts(digest)
        parts = self._whole_parts(digest)
        paths = [path for _, path in sorted(parts.items())]
        total = next((total for _, total in sorted(parts)), 0)
        if not paths or len(paths) != total:
            raise BadInput(f"backbone: expected all of its parts, got {len(paths)} of {total}")
        try:
            return self.put(BackboneBlob(spec, b"".join(path.read_bytes() for path in paths), digest))
        finally:
            # Kept or refused: wrong parts would only be refused again.
            shutil.rmtree(folder)

    def put(self, blob: BackboneBlob) -> Backbone:
        """Verify a backbone, keep it, and return it.

        Raises:
            DigestMismatch: the weights or settings are not the ones the digest names; nothing is kept.
        """
        backbone = self._verified(blob)
        folder = private_folder(private_folder(self._folder) / blob.digest)
        write_atomic(folder / "spec.json", blob.spec.encode())
        write_atomic(self.locate_weights(blob.digest), bytes(blob.weights))
        return backbone

    def adopt(self, digest: str, own: Sequence[Spec]) -> bool:
        """Keep the one of the site's own backbones that has this digest; whether there is one.

        Each is opened once, and again when its file has changed; its digest is remembered.

        Raises:
            BadInput: none has the digest, and one of them cannot be opened.
        """
        if self.has(digest):
            return True
        unusable: BadInput | None = None
        for position, spec in enumerate(own):
            try:
                if self._adopt_one(digest, spec, f"own_backbones.{position}"):
                    return True
            except BadInput as error:
                unusable = unusable or error
        if unusable is not None:
            raise unusable
        return False

    def _adopt_one(self, digest: str, spec: Spec, key: str) -> bool:
        path = self._known(spec, key)
        if path.exists() and path.read_text(encoding="ascii") != digest:
            return False
        backbone = open_pretrained(spec, key)
        write_atomic(path, backbone.digest.encode())
        if backbone.digest != digest:
            return False
        self.put(backbone.blob())
        return True

    def open(self, digest: str) -> Backbone:
        """A stored backbone, verified again.

        Raises:
            BadInput: it was never received.
            DigestMismatch: the files changed since.
        """
        if not self.has(digest):
            raise BadInput("the backbone was not received yet")
        folder = self._folder / digest
        try:
            spec = (folder / "spec.json").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DigestMismatch(
                f"{folder}: expected the settings of a stored backbone{instead(error)}; remove the folder, and the "
                "backbone is received again by the next run"
            ) from error
        backbone = self._verified(BackboneBlob(spec, self.locate_weights(digest).read_bytes(), digest))
        if backbone.digest != digest:
            raise DigestMismatch("the stored backbone differs from its digest")
        return backbone

    def open_language(self, digest: str) -> Language | None:
        """Returns what a stored backbone knows of the texts that it writes; None of one that writes none.

        It is asked in every round, and remembered while nobody touches the weights.

        Raises:
            BadInput: the backbone was never received.
            DigestMismatch: its files changed since.
        """
        if digest in self._opened:
            return self._opened[digest].language
        if not self.has(digest):
            raise BadInput("the backbone was not received yet")
        return _read_language(self._folder, digest, stamp_file(self.locate_weights(digest)))

    def _verified(self, blob: BackboneBlob) -> Backbone:
        opened = self._opened.get(blob.digest)
        if opened is None:
            return load_blob(blob, self._max_bytes)
        verify_blob(blob, self._max_bytes)
        return opened

    def _parts(self, digest: str) -> Path:
        return self._folder / f"{digest}.parts"

    def _whole_parts(self, digest: str) -> dict[tuple[int, int], Path]:
        """(index, total) -> file of every part that was written to its end; one torn by a kill has another name."""
        found = {path: _PART_NAME.fullmatch(path.name) for path in self._parts(digest).glob("*-of-*")}
        return {(int(match[1]), int(match[2])): path for path, match in found.items() if match}

    def _known(self, spec: Spec, key: str) -> Path:
        """Returns the path where the digest of one of the site's own backbones is kept while its file is unchanged."""
        kind: Kind = resolve("common.backbones", spec, key)
        about: list[object] = [kind.model_dump(mode="json", by_alias=True)]
        about += [_stamp(file) for path in list_weights_paths(kind) or () for file in _list_files(path)]
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        return private_folder(private_folder(self._folder) / "own") / f"{name}.digest"


@lru_cache(maxsize=8)
def _read_language(folder: Path, digest: str, stamp: tuple[int, ...]) -> Language | None:
    del stamp
    return BackboneStore(folder).open(digest).language


def _list_files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _stamp(file: Path) -> list[int] | None:
    status = file.stat() if file.exists() else None
    return status and [status.st_size, status.st_mtime_ns]
