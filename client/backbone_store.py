"""Backbones a site has received: stored once, by digest, verified before every use."""

from __future__ import annotations

from pathlib import Path

from common.backbones import Backbone, from_blob
from common.files import private_folder, write_atomic
from common.types import BackboneBlob, BadInput, DigestMismatch


class BackboneStore:
    """A folder of backbones, one sub-folder for each digest."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has(self, digest: str) -> bool:
        """Whether a backbone was received and verified before."""
        return (self._folder / digest / "weights.safetensors").exists()

    def put(self, blob: BackboneBlob) -> Backbone:
        """Verify a received backbone, keep it, and return it.

        Raises:
            DigestMismatch: the weights or settings are not the ones the digest names; nothing is kept.
        """
        backbone = from_blob(blob)
        folder = private_folder(private_folder(self._folder) / blob.digest)
        write_atomic(folder / "spec.json", blob.spec.encode())
        # The weights come last: their presence marks a complete entry.
        write_atomic(folder / "weights.safetensors", blob.weights)
        return backbone

    def open(self, digest: str) -> Backbone:
        """A stored backbone, verified again.

        Raises:
            BadInput: it was never received.
            DigestMismatch: the files changed since.
        """
        if not self.has(digest):
            raise BadInput("the backbone was not received yet")
        folder = self._folder / digest
        spec = (folder / "spec.json").read_text(encoding="utf-8")
        backbone = from_blob(BackboneBlob(spec, (folder / "weights.safetensors").read_bytes(), digest))
        if backbone.digest != digest:
            raise DigestMismatch("the stored backbone differs from its digest")
        return backbone
