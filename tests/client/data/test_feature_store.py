"""The feature store: encoded once, whole or not at all, private, and never trusted blindly."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from client.data.encoding.encode import BATCH_SIZE
from client.data.feature_store import Features, FeatureStore, decode_rows, rows_of
from client.data.quantised import QuantisedRows, pack_small_rows, unpack_small_rows
from client.data.sources import Source, SourceRecord, open_source
from common.inputs import Several
from common.model.backbones import Backbone, open_pretrained
from common.model.fast import WAY
from common.types import BadInput, BadRecord
from tests.counted import Counted
from tests.small_disk import run_on_small_disk

pytestmark = pytest.mark.usefixtures("two_threads")

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
COUNT, DIM = 2 * BATCH_SIZE + 7, 3
RAW = np.random.default_rng(0).normal(size=(COUNT, DIM)).astype(np.float32)
VECTORS = QuantisedRows.of(torch.from_numpy(RAW)).decode().numpy()
"""Vectors that the store holds exactly."""


@dataclass(frozen=True)
class Vectors:
    """A source of vectors in memory that counts how often it is read; None is a record that cannot be."""

    items: list[Any]
    loads: list[int] = field(default_factory=list)
    name: str = "vectors"

    def digest(self) -> str:
        return "00"

    def index(self) -> list[SourceRecord]:
        return [SourceRecord(row + 1, self.name, str(row), None, None, {}) for row in range(len(self.items))]

    def load(self, position: int) -> Any:
        self.loads.append(position)
        if self.items[position] is None:
            raise BadRecord("unreadable vector")
        return self.items[position]


@dataclass(frozen=True)
class Reciprocal:
    """A backbone that divides by its input: zeros give infinity."""

    digest: str = "11"
    feature_dim: int = DIM
    device: torch.device = CPU
    error: float | None = None
    trunk: str | None = None
    grid: tuple[int, ...] = ()
    bag: None = None

    def to(self, device: torch.device) -> Reciprocal:
        del device
        return self

    def preprocess(self, item: Any) -> Tensor:
        return torch.from_numpy(item)

    def encode_items(self, items_B: Tensor) -> Tensor:
        return 1.0 / items_B


def identity(dim: int = DIM) -> Backbone:
    return open_pretrained({"kind": "identity", "dim": dim}, "backbone")


def held(values: Any) -> np.ndarray:
    """Values as 16-bit integers hold them."""
    return QuantisedRows.of(torch.as_tensor(values)).decode().numpy()


def encoded(folder: Path, source: Source, backbone: Any = None) -> Features:
    return FeatureStore(folder).open_or_encode(source, backbone or identity(), device=CPU)


def test_features_stand_in_the_order_of_the_index(tmp_path: Path) -> None:
    features = encoded(tmp_path, Vectors(list(VECTORS)))
    np.testing.assert_array_equal(features.features_ND, VECTORS)
    assert features.valid_N.all()
    assert isinstance(features.rows_N, np.memmap)
    assert not features.rows_N.flags.writeable


def test_what_is_encoded_is_not_read_again(tmp_path: Path) -> None:
    source = Vectors(list(VECTORS))
    first, second = encoded(tmp_path, source), encoded(tmp_path, source)
    assert source.loads == list(range(COUNT))
    np.testing.assert_array_equal(first.features_ND, second.features_ND)


def test_another_backbone_and_other_data_have_entries_of_their_own(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=VECTORS)
    np.savez(tmp_path / "b.npz", x=2 * VECTORS)
    parts = {"all": {"inputs": "x", "labels": {}}}
    backbones = [
        identity(),
        open_pretrained({"kind": "identity", "dim": DIM, "projection": {"normalize": True}}, "backbone"),
    ]
    paths = set()
    for name in ("a", "b"):
        for backbone in backbones:
            source = open_source({"kind": "npz", "path": str(tmp_path / f"{name}.npz"), "parts": parts}, "s").open()
            features = encoded(tmp_path / "store", source, backbone)
            items = torch.stack([backbone.preprocess(source.load(position)) for position in range(COUNT)])
            np.testing.assert_array_equal(features.features_ND, held(backbone.encode(items)))
            paths.add(features.path)
    assert len(paths) == 4


def test_what_an_older_way_of_encoding_made_is_not_read(tmp_path: Path) -> None:
    source, backbone = Vectors(list(VECTORS)), identity()
    older = f"{backbone.digest} {source.digest()} int16"
    newer = f"{older} float32 cpu {WAY}"
    path = encoded(tmp_path, source, backbone).path
    assert path.parent.name == hashlib.sha256(newer.encode()).hexdigest()
    path.parent.rename(path.parent.with_name(hashlib.sha256(older.encode()).hexdigest()))
    source.loads.clear()
    encoded(tmp_path, source, backbone)
    assert source.loads == list(range(COUNT))


@pytest.mark.parametrize("many", [False, True])
def test_features_in_8_bits_take_half_the_disk_and_are_nearly_the_same(tmp_path: Path, many: bool) -> None:
    store, rng = FeatureStore(tmp_path), np.random.default_rng(0)
    values = (rng.standard_normal((400 if many else COUNT, DIM)) * 10.0 ** rng.integers(-9, 9, (1, DIM))).astype("f4")
    values[1], values[2] = 0.0, 1e38
    small = store.open_or_encode(Vectors(list(values)), identity(), device=CPU, bits=8)
    usual = store.open_or_encode(Vectors(list(values)), identity(), device=CPU)
    assert small.rows_N.nbytes == usual.rows_N.nbytes / 2 and small.path != usual.path
    kept = decode_rows(rows_of(small.path, np.arange(len(values)))).numpy()
    assert (np.abs(kept - values) <= np.abs(values).max(axis=1, keepdims=True) / 128).all()
    # Training's integers keep what is read, so that every exact sum stays exact.
    np.testing.assert_array_equal(held(kept), kept)


def test_a_feature_too_small_for_8_bits_is_zero_and_no_largest_one_is_lost() -> None:
    rows = torch.tensor([[2.0**-130, 0.0], [2.0**-120, -(2.0**-126)], [float(np.float32(3.4e38)), 1.0], [-1.0, 0.999]])
    kept = unpack_small_rows(pack_small_rows(rows))
    assert kept.tolist() == [[0.0, 0.0], [2.0**-120, -(2.0**-126)], [127 * 2.0**121, 0.0], [-1.0, 1.0]]


def test_another_precision_has_an_entry_of_its_own(tmp_path: Path) -> None:
    """Features of less precision are never taken for exact ones, whichever were computed first."""
    store, third = FeatureStore(tmp_path), np.full((COUNT, DIM), 1 / 3, np.float32)
    rough = store.open_or_encode(Vectors(list(third)), identity(), device=CPU, precision="bfloat16")
    exact = store.open_or_encode(Vectors(list(third)), identity(), device=CPU)
    np.testing.assert_array_equal(exact.features_ND, held(third))
    assert rough.path != exact.path


def test_a_record_that_cannot_be_read_or_encoded_is_a_row_of_zeros_with_a_reason(tmp_path: Path) -> None:
    items: list[Any] = list(VECTORS)
    items[3] = None
    items[150] = np.array([1.0, 0.0, 2.0], dtype=np.float32)
    items[COUNT - 1] = np.full(DIM, np.nan, dtype=np.float32)
    for _ in range(2):
        features = encoded(tmp_path, Vectors(items), Reciprocal())
        assert features.unusable == {
            3: "unreadable vector",
            150: "features are not finite",
            COUNT - 1: "features are not finite",
        }
        assert np.flatnonzero(~features.valid_N).tolist() == [3, 150, COUNT - 1]
        assert not features.features_ND[~features.valid_N].any()
        np.testing.assert_array_equal(features.features_ND[features.valid_N], held(1.0 / VECTORS)[features.valid_N])


@pytest.mark.parametrize("items", [[], [None, None]], ids=["none", "none readable"])
def test_a_source_without_a_usable_record_has_no_features(tmp_path: Path, items: list[Any]) -> None:
    source = Vectors(items)
    assert encoded(tmp_path, source).features_ND.shape == (len(items), DIM)
    assert not encoded(tmp_path, source).valid_N.any()
    assert source.loads == list(range(len(items)))


def test_progress_counts_records_to_the_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    FeatureStore(tmp_path).open_or_encode(
        Vectors(list(VECTORS)), identity(), device=CPU, progress=lambda done, total: seen.append((done, total))
    )
    done = [number for number, total in seen if total == COUNT]
    assert len(done) == len(seen) >= 3 and done == sorted(set(done)) and done[-1] == COUNT


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_umask")
def test_everything_in_the_store_is_for_its_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    encoded(folder, Vectors(list(VECTORS)))
    for path in [folder, *folder.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path.name


def flipped(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove"])
@pytest.mark.parametrize("name", ["about.json", "features.npy"])
def test_a_damaged_entry_is_encoded_again(tmp_path: Path, name: str, damage: str) -> None:
    source = Vectors([None, *VECTORS])
    path = encoded(tmp_path, source).path.parent / name
    if damage == "flip":
        # In the reason why the first record is unusable; in the header that says how the array is laid out.
        flipped(path, path.read_bytes().index(b"unreadable" if name == "about.json" else b"descr"))
    elif damage == "cut":
        cut(path)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    source.loads.clear()
    features = encoded(tmp_path, source)
    assert len(source.loads) == COUNT + 1
    assert features.unusable == {0: "unreadable vector"}
    np.testing.assert_array_equal(features.features_ND[1:], VECTORS)


class Hostile(NamedTuple):
    """A record at which something fails: `load`, `preprocess` or `encode`."""

    where: str
    error: type[Exception]


@dataclass(frozen=True)
class Failing(Reciprocal):
    """A backbone that fails at hostile records; as an input each is a row of NaN."""

    calls: list[bytes] = field(default_factory=list)
    fails_after: int = 10**9

    def preprocess(self, item: Any) -> Tensor:
        if isinstance(item, Hostile) and item.where == "preprocess":
            raise item.error("q7-secret")
        return torch.full((DIM,), torch.nan) if isinstance(item, Hostile) else torch.from_numpy(item)

    def encode_items(self, items_B: Tensor) -> Tensor:
        self.calls.append(items_B.numpy().tobytes())
        if len(self.calls) > self.fails_after or items_B.isnan().any():
            raise RuntimeError("q7-secret")
        return items_B * 2.0


@dataclass(frozen=True)
class FailingVectors(Vectors):
    """A source whose hostile records fail when they are loaded."""

    def load(self, position: int) -> Any:
        item = self.items[position]
        if isinstance(item, Hostile) and item.where == "load":
            raise item.error("q7-secret")
        return item


ERRORS = [MemoryError, RuntimeError, UnicodeError, RecursionError, KeyError, TimeoutError, OSError, AssertionError]


@pytest.mark.parametrize("at", [0, 5, COUNT])
@pytest.mark.parametrize(
    ("where", "error"),
    [(where, error) for where in ("load", "preprocess") for error in ERRORS] + [("encode", KeyError)],
)
def test_whatever_fails_at_one_record_costs_that_record_alone(
    tmp_path: Path, where: str, error: type[Exception], at: int
) -> None:
    items: list[Any] = list(VECTORS)
    items.insert(at, Hostile(where, error))
    features = encoded(tmp_path, FailingVectors(items), Failing())
    assert list(features.unusable) == [at]
    assert "q7" not in features.unusable[at]
    assert np.array_equal(np.delete(features.features_ND, at, 0), 2 * VECTORS)
    assert not features.features_ND[at].any()


def test_records_beside_a_failing_one_are_encoded_in_batches_of_the_same_shape(tmp_path: Path) -> None:
    backbone = Failing()
    encoded(tmp_path, FailingVectors([Hostile("encode", KeyError), *VECTORS]), backbone)
    assert len({len(call) for call in backbone.calls}) == 1


def test_no_record_decides_how_others_are_encoded(tmp_path: Path) -> None:
    """The batch size and the fast copy of a network were once tried on a source's first records."""
    first = []
    for name, scale in (("a", 1.0), ("b", 1e30)):
        backbone = Failing()
        encoded(tmp_path / name, FailingVectors([scale * VECTORS[0], *VECTORS[1:]]), backbone)
        first.append(backbone.calls[:4])
    assert first[0] == first[1]


@pytest.mark.parametrize("unusable", [1, BATCH_SIZE])
def test_records_that_cannot_be_used_decide_nothing_either(tmp_path: Path, unusable: int) -> None:
    """With none left in the first batch, no later record may stand in for the made-up inputs of the check."""
    backbone = Failing()
    encoded(tmp_path, FailingVectors([*[Hostile("load", OSError)] * unusable, VECTORS[0] * 1e30, *VECTORS]), backbone)
    plain = Failing()
    encoded(tmp_path / "plain", FailingVectors(list(VECTORS)), plain)
    assert backbone.calls[:4] == plain.calls[:4]


def test_a_record_of_another_size_is_left_out(tmp_path: Path) -> None:
    features = encoded(tmp_path, Vectors([VECTORS[0], VECTORS[0][:2], VECTORS[1].astype(np.float64)]), Reciprocal())
    assert features.unusable == dict.fromkeys((1, 2), "its size is another than that of the others")


def test_a_machine_that_fails_while_encoding_makes_no_record_bad(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        encoded(tmp_path, FailingVectors(list(VECTORS)), Failing(fails_after=5))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


NPZ = {"kind": "npz", "parts": {"all": {"inputs": "x", "labels": {}}}}
ENCODE = """
import sys, time
from pathlib import Path
import torch
from client.data.encoding import partial
from client.data.feature_store import FeatureStore
from client.data.sources import open_source
from common.model.backbones import open_pretrained

torch.set_num_threads(2)
partial.BLOCK_S = 0.0
parts = {"all": {"inputs": "x", "labels": {}}}
source = open_source({"kind": "npz", "path": sys.argv[1], "parts": parts}, "source").open()
backbone = open_pretrained({"kind": "identity", "dim": 3}, "backbone")

def wait_in_the_middle(done, total):
    if done > 100:
        print(done, flush=True)
        time.sleep(60)

FeatureStore(Path(sys.argv[2])).open_or_encode(
    source, backbone, device=torch.device("cpu"), progress=wait_in_the_middle
)
"""


def kill_while_encoding(path: Path, store: Path) -> int:
    """Ends a process by SIGKILL in the middle of encoding; returns the number of records that it had encoded."""
    with subprocess.Popen(
        [sys.executable, "-c", ENCODE, path, store], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        done = int(process.stdout.readline())
        process.kill()
    assert len(list(store.glob(".*.partial"))) == 1, "the dead process leaves what it has encoded"
    return done


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """A source's file, the store of a process that was killed while it encoded it, and how far it was."""
    folder = tmp_path_factory.mktemp("killed")
    vectors = np.concatenate([VECTORS, np.full((1, DIM), np.nan, np.float32), VECTORS])
    vectors[5] = np.inf  # Two records without features, one on each side of the interruption.
    np.savez(folder / "a.npz", x=vectors)
    return folder / "a.npz", folder / "store", kill_while_encoding(folder / "a.npz", folder / "store")


def open_counted(path: Path) -> Counted:
    return Counted(open_source({**NPZ, "path": str(path)}, "s").open())


def encode_whole(tmp_path: Path, path: Path) -> Features:
    return encoded(tmp_path / "whole", open_counted(path))


def test_an_encoding_that_was_killed_goes_on_where_it_stopped(killed: tuple[Path, Path, int], tmp_path: Path) -> None:
    path, store, done = killed
    store = shutil.copytree(store, tmp_path / "store")
    whole, source = encode_whole(tmp_path, path), open_counted(path)
    told: list[tuple[int, int]] = []
    backbone = open_pretrained({"kind": "identity", "dim": DIM}, "backbone")
    features = FeatureStore(store).open_or_encode(
        source, backbone, device=CPU, progress=lambda done, total: told.append((done, total))
    )
    first = BATCH_SIZE // torch.get_num_threads()
    again = [position for position in source.loads if first <= position < done]
    assert not again, "beyond the first batch, which shows what inputs are like, no record is read twice"
    assert told[0] == (done, 2 * COUNT + 1)
    assert features.unusable == whole.unusable and set(whole.unusable) == {5, COUNT}
    assert features.path.read_bytes() == whole.path.read_bytes()
    assert [entry for entry in store.iterdir() if entry.is_dir()] == [features.path.parent]
    assert sorted(each.name for each in features.path.parent.iterdir()) == ["about.json", "features.npy"]


@pytest.mark.parametrize("damage", ["row", "line", "torn", "after", "conditions", "array"])
def test_what_is_damaged_of_an_interrupted_encoding_is_encoded_again(
    killed: tuple[Path, Path, int], tmp_path: Path, damage: str
) -> None:
    path, store, _ = killed
    store = shutil.copytree(store, tmp_path / "store")
    (partial,) = store.glob(".*.partial")
    rows, lines = partial / "features.npy", partial / "blocks.jsonl"
    if damage == "row":
        flipped(rows, 128 + 8)  # In the first rows, whose digest the second line has.
    elif damage == "line":
        text = lines.read_text()
        lines.write_text(text.replace('"5":"', '"5":"x', 1))
        assert lines.read_text() != text
    elif damage == "torn":
        lines.write_bytes(lines.read_bytes()[:-20])
    elif damage == "after":
        flipped(rows, 128 + 8 * COUNT)  # The row of the second record without features, which no block has yet.
    elif damage == "conditions":
        lines.write_text(lines.read_text().replace("torch ", "torch 0", 1))
    else:
        rows.write_bytes(rows.read_bytes()[:-1])
    source = open_counted(path)
    features, whole = encoded(store, source), encode_whole(tmp_path, path)
    assert features.path.read_bytes() == whole.path.read_bytes()
    assert features.unusable == whole.unusable
    if damage not in ("torn", "after"):
        assert set(source.loads) == set(range(2 * COUNT + 1)), "from the beginning"


def test_a_source_that_changed_meanwhile_is_encoded_from_the_beginning(
    killed: tuple[Path, Path, int], tmp_path: Path
) -> None:
    path, store, _ = killed
    store = shutil.copytree(store, tmp_path / "store")
    other = tmp_path / "a.npz"
    np.savez(other, x=np.load(path)["x"][::-1])
    source = open_counted(other)
    features = encoded(store, source)
    assert set(source.loads) == set(range(2 * COUNT + 1))
    assert features.path.read_bytes() == encode_whole(tmp_path, other).path.read_bytes()


def test_an_encoding_that_nobody_goes_on_with_is_removed(killed: tuple[Path, Path, int], tmp_path: Path) -> None:
    store = shutil.copytree(killed[1], tmp_path / "store")
    (partial,) = store.glob(".*.partial")
    encoded(store, Vectors(list(VECTORS)))
    assert partial.exists(), "another source may be gone on with later"
    week_ago = time.time() - 8 * 86400
    os.utime(partial / "blocks.jsonl", (week_ago, week_ago))
    encoded(store, Vectors(list(VECTORS)), Reciprocal(digest="22"))
    assert not partial.exists()


def test_two_that_ask_at_once_encode_once(tmp_path: Path) -> None:
    # Threads stand for processes: the lock is on an open file, and each call opens its own.
    source, barrier = Vectors(list(VECTORS)), threading.Barrier(4)

    def ask() -> np.ndarray:
        barrier.wait()
        return np.array(encoded(tmp_path, source).features_ND)

    with ThreadPoolExecutor(4) as pool:
        found = [future.result() for future in [pool.submit(ask) for _ in range(4)]]
    assert sorted(source.loads) == list(range(COUNT))
    for features_ND in found:
        np.testing.assert_array_equal(features_ND, VECTORS)


def test_a_file_of_another_name_with_the_same_content_shares_the_entry(tmp_path: Path) -> None:
    items = [*VECTORS[:2], None]
    first, second = encoded(tmp_path, Vectors(items)), encoded(tmp_path, Vectors(items, name="copy"))
    assert first.path == second.path
    assert second.unusable == {2: "unreadable vector"}


def test_a_record_of_several_items_has_the_mean_of_their_features(tmp_path: Path) -> None:
    cuts = [0, 1, 4, 4, COUNT]
    records = [Several(list(VECTORS[a:b])) for a, b in pairwise(cuts)]
    features = encoded(tmp_path, Vectors([*records, VECTORS[0]]))
    expected = [VECTORS[:1].mean(0), VECTORS[1:4].mean(0), np.zeros(DIM), VECTORS[4:].mean(0), VECTORS[0]]
    np.testing.assert_allclose(features.features_ND, held(np.array(expected)), rtol=0, atol=2e-4)
    assert features.unusable == {2: "expected between one and 4096 items in the record"}


def test_a_record_of_absurdly_many_items_is_left_out(tmp_path: Path) -> None:
    features = encoded(tmp_path, Vectors([Several([VECTORS[0]] * 4097), Several([VECTORS[0]] * 4096)]))
    assert list(features.unusable) == [0]


def test_a_record_of_several_items_is_refused_where_a_part_of_the_backbone_trains(tmp_path: Path) -> None:
    """The mean of outputs at a boundary is not the output of a mean; a record of one item is the item."""
    source = Vectors([VECTORS[0], Several([VECTORS[1]]), Several([VECTORS[1], VECTORS[2]])])
    features = encoded(tmp_path, source, Reciprocal(trunk="backbone.trunk"))
    assert list(features.unusable) == [2]
    assert "got several" in features.unusable[2]


def test_records_of_many_items_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    """A hundred volumes in memory would be tens of gigabytes."""
    seen: list[int] = []

    @dataclass(frozen=True)
    class Watching(Reciprocal):
        device: torch.device = CPU
        error: float | None = None

        def encode_items(self, items_B: Tensor) -> Tensor:
            seen.append(len(items_B))
            return items_B

    volume = Several(list(VECTORS[:50]))
    source = Vectors([volume] * 20)
    features = encoded(tmp_path, source, Watching())
    # Four batches tell before the first one whether a record's features depend on the others.
    assert sum(seen[4:]) >= 20 * 50 and max(seen) <= BATCH_SIZE
    assert len(set(seen)) == 1, "all batches have one shape"
    assert sorted(source.loads) == list(range(20))
    np.testing.assert_allclose(features.features_ND, held(np.array([VECTORS[:50].mean(0)] * 20)), rtol=0, atol=1e-4)


def test_large_pictures_are_encoded_a_few_at_a_time(tmp_path: Path) -> None:
    """A network's outputs between its layers take gigabytes for a hundred of them."""
    seen: list[int] = []

    @dataclass(frozen=True)
    class Watching(Reciprocal):
        def preprocess(self, item: Any) -> Tensor:
            return torch.zeros(3, item.width, 512)

        def encode_items(self, items_B: Tensor) -> Tensor:
            seen.append(len(items_B))
            return items_B[:, 0, :DIM, 0]

    pictures: list[Any] = [Image.new("RGB", (256, 8))] * 9
    assert encoded(tmp_path, Vectors(pictures), Watching()).valid_N.all()
    assert set(seen) == {8}


def test_features_that_heads_read_take_half_the_room_and_are_what_training_computes_with(tmp_path: Path) -> None:
    """The stored integers and scales are those of decoding and quantising once more, for any size of values."""
    scale = 10.0 ** np.random.default_rng(1).integers(-44, 38, size=(COUNT, 1))
    values = (np.random.default_rng(2).normal(size=(COUNT, 90)) * scale).astype(np.float32)
    values[0], values[1, 1:], values[2] = 0.0, 0.0, np.finfo(np.float32).max
    features = encoded(tmp_path, Vectors(list(values)), identity(90))
    assert features.path.stat().st_size <= values.nbytes // 2 + 2 * COUNT + 128
    decoded = torch.from_numpy(features.features_ND)
    assert torch.equal(decoded, torch.from_numpy(held(values)))
    again, stored = QuantisedRows.of(decoded), QuantisedRows.unpack(np.array(features.rows_N))
    assert torch.equal(again.integers, stored.integers) and torch.equal(again.scale, stored.scale)


def test_what_a_trunk_reads_is_kept_to_the_bit_in_an_entry_of_its_own(tmp_path: Path) -> None:
    source = Vectors(list(RAW))
    rounded = encoded(tmp_path, source, Reciprocal())
    exact = encoded(tmp_path, source, Reciprocal(trunk="backbone.trunk"))
    assert rounded.path != exact.path
    np.testing.assert_array_equal(exact.features_ND, 1.0 / RAW)
    assert not np.array_equal(rounded.features_ND, exact.features_ND)


@pytest.mark.parametrize("count", [0, 1, 256, 257])
@pytest.mark.parametrize("dtype", [np.float32, np.int16])
@pytest.mark.parametrize("shape", [(300, 5), (300, 2, 3)])
def test_rows_are_those_of_the_array_however_many_are_read(
    tmp_path: Path, shape: tuple[int, ...], dtype: type, count: int
) -> None:
    array = (np.random.default_rng(0).normal(size=shape) * 100).astype(dtype)
    np.save(tmp_path / "features.npy", array)
    positions = np.random.default_rng(1).permutation(len(array))[:count]
    rows = rows_of(tmp_path / "features.npy", positions)
    assert np.array_equal(rows, array[positions])
    rows[:] = 0
    assert np.array_equal(np.load(tmp_path / "features.npy"), array)


def test_a_cut_array_is_refused_not_read_as_zeros(tmp_path: Path) -> None:
    np.save(tmp_path / "features.npy", np.ones((3, 5), np.float32))
    whole = (tmp_path / "features.npy").read_bytes()
    (tmp_path / "features.npy").write_bytes(whole[:-4])
    with pytest.raises(ValueError, match="rows"):
        rows_of(tmp_path / "features.npy", np.array([2]))


def check_full_disk(disk: Path) -> None:
    many = np.zeros((20_000, 100), np.float32)
    with pytest.raises(BadInput, match=r"cache_dir: expected room for 3 MiB of features in .*the disk is full"):
        encoded(disk, Vectors(list(many)), identity(100))
    assert [path.name for path in disk.iterdir() if not path.name.endswith(".lock")] == []
    assert encoded(disk, Vectors(list(VECTORS))).valid_N.all()


@pytest.mark.slow
def test_a_disk_without_room_for_the_features_is_one_sentence_and_no_dead_process(tmp_path: Path) -> None:
    """Without the space reserved, writing to the mapped file ends the process with SIGBUS."""
    run_on_small_disk(check_full_disk, tmp_path / "disk")
