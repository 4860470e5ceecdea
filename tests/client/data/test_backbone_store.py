"""The store of backbones: a transfer survives a kill at any moment, and nothing half-written is taken for a part."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save_file

from client.data.backbone_store import BackboneStore
from common.backbones.small_cnn import collect_tensors
from common.messages import PART_BYTES
from common.model.backbones import Backbone, open_pretrained, open_untrained
from common.plugins import Spec
from common.types import BackboneBlob, BadInput, DigestMismatch
from tests.tiny import backbone

DIGEST = "a" * 64


@pytest.fixture
def store(tmp_path: Path) -> BackboneStore:
    return BackboneStore(tmp_path / "backbones")


@pytest.fixture(scope="module")
def frozen() -> Backbone:
    return backbone()


def kill_while_writing(folder: Path, digest: str, index: int, total: int) -> Path:
    """What a process leaves that is killed in the middle of a part: the temporary file of an atomic write."""
    torn = folder / "backbones" / f"{digest}.parts" / f".{index}-of-{total}.k1lled00"
    torn.write_bytes(b"half of a part")
    return torn


def test_a_part_that_was_torn_by_a_kill_is_no_part_and_goes_with_the_next_one(
    tmp_path: Path, store: BackboneStore
) -> None:
    store.put_part(DIGEST, 0, 3, b"0" * PART_BYTES)
    torn = kill_while_writing(tmp_path, DIGEST, 1, 3)
    assert store.held_parts(DIGEST) == (0,)
    store.put_part(DIGEST, 1, 3, b"1" * PART_BYTES)
    assert store.held_parts(DIGEST) == (0, 1)
    assert not torn.exists()


def test_a_torn_part_does_not_stand_in_for_a_missing_one(tmp_path: Path, store: BackboneStore) -> None:
    store.put_part(DIGEST, 0, 2, b"0" * PART_BYTES)
    kill_while_writing(tmp_path, DIGEST, 1, 2)
    with pytest.raises(BadInput, match="expected all of its parts, got 1 of 2"):
        store.assemble(DIGEST, "{}")


def test_parts_of_a_transfer_that_was_cut_in_another_way_are_dropped(store: BackboneStore) -> None:
    store.put_part(DIGEST, 0, 3, b"0" * PART_BYTES)
    store.put_part(DIGEST, 0, 2, b"0" * PART_BYTES)
    store.put_part(DIGEST, 1, 2, b"1")
    assert store.held_parts(DIGEST) == (0, 1)


def test_parts_that_do_not_make_the_backbone_of_their_digest_are_refused_and_gone(
    store: BackboneStore, frozen: Backbone
) -> None:
    blob = frozen.blob()
    store.put_part(DIGEST, 0, 1, blob.weights)
    with pytest.raises(DigestMismatch):
        store.assemble(DIGEST, blob.spec)
    assert not store.has(DIGEST)
    assert store.held_parts(DIGEST) == ()
    with pytest.raises(BadInput, match="not received"):
        store.open(DIGEST)


def test_a_stored_backbone_whose_file_changed_is_refused(
    tmp_path: Path, store: BackboneStore, frozen: Backbone
) -> None:
    blob = frozen.blob()
    store.put(blob)
    place = tmp_path / "backbones" / blob.digest
    (place / "spec.json").write_text(blob.spec.replace('"dim":4', '"dim":5'))
    with pytest.raises(DigestMismatch):
        store.open(blob.digest)
    with pytest.raises(DigestMismatch):
        store.put(BackboneBlob(blob.spec, blob.weights, "0" * 64))


# --- backbones the site opens by itself ------------------------------------------------------------------------------

IDENTITY = Spec(kind="identity", dim=4)
SMALL = {"kind": "small_cnn", "channels": [4, 6], "input_size": 8}


def test_a_backbone_the_site_has_itself_need_not_be_sent(store: BackboneStore, frozen: Backbone) -> None:
    assert store.adopt(frozen.digest, [IDENTITY])
    assert store.open(frozen.digest).digest == frozen.digest


def test_a_backbone_of_another_digest_is_not_taken_for_the_agreed_one(store: BackboneStore, frozen: Backbone) -> None:
    assert not store.adopt(frozen.digest, [Spec(kind="identity", dim=5)])
    assert not store.has(frozen.digest)


def test_an_entry_that_cannot_be_opened_does_not_hide_the_ones_after_it(store: BackboneStore, frozen: Backbone) -> None:
    unusable = Spec(kind="torchvision", model="no_such_model")
    assert store.adopt(frozen.digest, [unusable, IDENTITY])
    with pytest.raises(BadInput, match=r"own_backbones\.0"):
        store.adopt("0" * 64, [unusable, IDENTITY])


@pytest.mark.parametrize("in_a_bag", [False, True])
def test_a_weights_file_that_was_replaced_is_looked_at_again(
    tmp_path: Path, store: BackboneStore, in_a_bag: bool
) -> None:
    path = tmp_path / "weights.safetensors"
    alone = Spec(**SMALL, weights=str(path))
    spec = Spec(kind="bag", encoder=alone.model_dump(), max_items=3) if in_a_bag else alone
    digests = []
    for seed in (0, 1):
        untrained = open_untrained(alone, "backbone", seed=seed)
        save_file(collect_tensors(untrained.module, None), path)
        digests.append(open_pretrained(spec, "backbone").digest)
        assert store.adopt(digests[-1], [spec])
    assert digests[0] != digests[1]


def test_a_backbone_that_is_open_already_is_not_built_again_but_its_bytes_are_verified(
    tmp_path: Path, frozen: Backbone
) -> None:
    blob = frozen.blob()
    store = BackboneStore(tmp_path / "backbones", {frozen.digest: frozen})
    store.put_part(frozen.digest, 0, 1, blob.weights)
    assert store.assemble(frozen.digest, blob.spec) is frozen
    assert store.open(frozen.digest) is frozen
    (tmp_path / "backbones" / frozen.digest / "weights.safetensors").write_bytes(blob.weights[:-1] + b"\x01")
    with pytest.raises(DigestMismatch):
        store.open(frozen.digest)
    other = BackboneStore(tmp_path / "others", {frozen.digest: frozen})
    other.put_part(frozen.digest, 0, 1, blob.weights[:-1] + b"\x01")
    with pytest.raises(DigestMismatch):
        other.assemble(frozen.digest, blob.spec)


def test_a_backbone_beyond_the_sites_limit_is_not_received(tmp_path: Path) -> None:
    small = BackboneStore(tmp_path / "backbones", max_bytes=2 * PART_BYTES)
    small.put_part(DIGEST, 0, 2, b"0" * PART_BYTES)
    with pytest.raises(BadInput, match="backbone_limit_gib: expected a backbone of at most"):
        small.put_part(DIGEST, 0, 4, b"0" * PART_BYTES)
