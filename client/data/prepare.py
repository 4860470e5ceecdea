"""From a site's sources to units: prepared once for a run, written as small arrays, opened each round.

What cannot be used is named by file and row in the site's own `problems.csv`, counted and left out; no record stops a
preparation (see `client.data.snapshot`).

# Shapes: R records, D features.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from client.config import SiteConfig
from client.data.encoding.encode import Progress, choose_type, count_bytes
from client.data.exclusions import Exclusions
from client.data.feature_store import (
    Features,
    FeatureStore,
    check_features,
    decode_rows,
    list_feature_files,
    rows_of,
    thin,
)
from client.data.quantised import QuantisedRows
from client.data.records import (
    SIDES,
    PlacedRecord,
    RejectedRecord,
    Side,
    TaskLabels,
    UsableRecord,
    encode_labels,
    find_usable,
    place_labels,
    place_records,
    select_rows,
)
from client.data.snapshot import open_snapshot
from client.data.sources import open_source
from client.data.units import DecodedFeatures, TaskRecords, Units, list_versions
from common.files import private_folder, stamp_file, write_atomic
from common.recent import Recent
from common.tasks import PlacesLabels, Task, ThinsPlaces, open_on_backbones, reads_places
from common.types import BadInput

if TYPE_CHECKING:
    from common.model.backbones import Backbone

ARRAYS = "arrays.safetensors"
PROBLEMS = "problems.csv"
_ROWS = 1024
"""Records whose features are read at once."""


@dataclass(frozen=True)
class Preparation:
    """The outcome of preparing a run, for local eyes only.

    Attributes:
        problems: records that are not used, or not as their files say.
        num_records: number of records of the run's sources, those that cannot be used included.
        num_units: units on each side.
        precision_error: the largest error of features where they were computed in less than float32, else None.
    """

    problems: tuple[RejectedRecord, ...] = field(repr=False)
    num_records: int = field(repr=False)
    num_units: Mapping[Side, int] = field(repr=False)
    precision_error: float | None = None


class _View(NamedTuple):
    """One source as one backbone sees it, by digest."""

    source: str
    backbone: str

    @property
    def key(self) -> str:
        return f"{self.source}@{self.backbone}"


@dataclass(frozen=True)
class Encoding:
    """The store that keeps features, and how those that it lacks are computed.

    Attributes:
        store: cached features.
        device: device on which backbones run.
        progress: called with (done, total) in records, source by source.
        named: digest of a backbone -> what is called in its place where that backbone encodes.
    """

    store: FeatureStore
    device: torch.device
    progress: Progress | None = None
    named: Mapping[str, Progress] = field(default_factory=dict)


@dataclass(frozen=True)
class _LoadedView:
    features: Features
    usable: list[UsableRecord] = field(repr=False)
    rejected: list[RejectedRecord] = field(repr=False)


@dataclass(frozen=True)
class _UnitNumbers:
    """Number of each unit by its key, from 0 on each side, and the number of units on each side."""

    of_key: Mapping[str, int] = field(repr=False)
    num_units: dict[Side, int] = field(repr=False)


def prepare(
    config: SiteConfig, tasks: Mapping[str, Task], backbones: Mapping[str, Backbone], encoding: Encoding, folder: Path
) -> Preparation:
    """Encodes what is not encoded yet and writes the arrays that `open_units` reads.

    The steps: load every view's records, place them on a side, encode their labels, number their units, write. Units
    that the site's snapshot does not know are left out.

    Args:
        config: the site's file.
        tasks: the run's tasks at this site, by name.
        backbones: backbone of each task, or its frozen part; tasks on one source and one backbone share their features.
        encoding: store of cached features, and the device on which missing ones are computed.
        folder: folder that receives the arrays; `problems.csv` is written beside it.

    Returns:
        Rejected records, numbers of units and the error of the features' precision.

    Raises:
        BadInput: a source cannot be opened, or the site file was changed since the snapshot.
    """
    tasks = open_on_backbones(tasks, {name: backbones[name].language for name in tasks})
    snapshot = open_snapshot(config, [config.tasks[name].source for name in tasks])
    views = {name: _View(config.tasks[name].source, backbones[name].digest) for name in tasks}
    by_view = {views[name]: backbones[name] for name in reversed(list(tasks))}
    loaded = {view: _load_view(config, view, by_view[view], encoding) for view in sorted(by_view)}
    usable = {(each.source, each.position): each for view in loaded.values() for each in view.usable}
    placed, listed = place_records(list(usable.values()), config.split, config.unit)
    placed, new = snapshot.place(placed, config.unit)
    members = {view: _select_view(placed, view, each.features) for view, each in loaded.items()}
    labels = {name: encode_labels(name, task, config.tasks[name], members[views[name]]) for name, task in tasks.items()}
    for name, task in tasks.items():
        # Without marks the run is refused where heads are made for it.
        if isinstance(task, PlacesLabels) and backbones[name].num_marks:
            members_of = members[views[name]]
            marks_RP = _read_marks(loaded[views[name]].features, members_of)
            labels[name] = place_labels(name, task, labels[name], members_of, marks_RP)
    units = _number_units(placed)
    rejected = [record for view in loaded.values() for record in view.rejected] + listed + new
    rejected += [record for each in labels.values() for record in each.rejected]
    if units.num_units["train"] == 0:
        names = sorted({view.source for view in loaded})
        rejected.append(RejectedRecord(", ".join(names), None, "no record to train on"))
    # Once where two backbones cannot use a record for the same reason.
    rejected = list(dict.fromkeys(rejected))
    private_folder(folder.parent)
    _write_rejected(folder.with_name(PROBLEMS), rejected)
    about = {
        "num_units": units.num_units,
        "views": {name: view.key for name, view in views.items()},
        "features": {view.key: str(each.features.path) for view, each in loaded.items()},
        "trunks": {name: backbones[name].trunk for name in tasks},
    }
    reading = {name: task for name, task in tasks.items() if reads_places(task)}
    if reading:
        about["places"] = {name: task.every if isinstance(task, ThinsPlaces) else 1 for name, task in reading.items()}
    # One file, so that a crash leaves the old arrays or the new ones.
    arrays = _build_arrays(labels, members, units)
    metadata = {"about": json.dumps(about), "sha256": _digest(about, arrays)}
    write_atomic(private_folder(folder) / ARRAYS, save(arrays, metadata=metadata))
    errors = [each.features.error for each in loaded.values() if each.features.error is not None]
    error = max(errors) if errors and config.precision != "float32" else None
    left_out = {(each.file, each.row) for each in rejected if each.row and not each.task and not each.is_used}
    num_records = len(placed) + len(left_out)
    return Preparation(tuple(rejected), num_records, units.num_units, error)


def prepare_candidates(
    config: SiteConfig,
    name: str,
    task: Task,
    backbones: Mapping[str, Backbone],
    encoding: Encoding,
    folder: Path,
) -> Preparation:
    """Prepares one task's records with each of several backbones, as tasks of the backbones' names (`prepare`).

    Args:
        config: the site's file.
        name: name of the task there.
        task: the task.
        backbones: the backbones by name.
        encoding: store of cached features, and the device on which missing ones are computed.
        folder: folder that receives the arrays.
    """
    as_tasks = config.model_copy(update={"tasks": dict.fromkeys(backbones, config.tasks[name])})
    return prepare(as_tasks, dict.fromkeys(backbones, task), backbones, encoding, folder)


def open_units(folder: Path, side: Side, tasks: Sequence[str], device: torch.device) -> Units:
    """Returns one side's units of a prepared run; tasks on one source and one backbone share their features.

    Everything that is read is the bytes that were written, by their digests. Units that are not too large are kept in
    memory for the next round, and returned again as long as nobody touches them or the files that they were read from.

    Args:
        folder: what `prepare` wrote.
        side: "train" or "test".
        tasks: which of the prepared tasks.
        device: where the tensors are to be.

    Raises:
        BadInput: not prepared, or the arrays or the cached features are gone or damaged.
    """
    key = "\n".join((str(folder), side, str(device), *tasks))
    known = _OPENED.take(key)
    if known is None or not known.is_current():
        known = _open_units(folder, side, tasks, device)
    if device.type == "cpu" and known.num_bytes <= _MOST_KEPT_BYTES:
        _OPENED.keep(key, known, known.num_bytes)
    return known.units


@dataclass(frozen=True)
class _Opened:
    """Units, the files that they were read from with their stamps of before, and torch's numbers of changes."""

    units: Units
    stamps: Mapping[Path, tuple[int, ...]]
    versions: Sequence[int]

    @property
    def num_bytes(self) -> int:
        """Memory of the units and of what solvers keep with them, as much again and room for slopes."""
        views = {id(each.features_RD): each.features_RD.nbytes for each in self.units.tasks.values()}
        return 4 * sum(views.values())

    def is_current(self) -> bool:
        """Returns true where nobody has touched the files since, nor any of the units' values."""
        try:
            same = all(stamp_file(path) == stamp for path, stamp in self.stamps.items())
        except OSError:
            same = False
        return same and list_versions(self.units) == self.versions


_MOST_KEPT_BYTES = 256 << 20
_OPENED = Recent[_Opened](_MOST_KEPT_BYTES)
"""Folder, side, device and tasks -> units that were opened last."""


def _open_units(folder: Path, side: Side, tasks: Sequence[str], device: torch.device) -> _Opened:
    """Reads what `open_units` returns."""
    try:
        stamps = {folder / ARRAYS: stamp_file(folder / ARRAYS)}
        about, arrays = _read(folder / ARRAYS)
        views = {task: about["views"][task] for task in tasks}
        for view in set(views.values()):
            stamps |= {path: stamp_file(path) for path in list_feature_files(Path(about["features"][view]))}
        trunks = {view: about["trunks"][task] for task, view in views.items()}
        read = {task: about.get("places", {}).get(task, 0) for task in tasks}
        every = {task: max(1, places) if side == "train" else 1 for task, places in read.items()}
        shared = {
            (view, step): _records(
                arrays, view, about["features"][view], side, device, exact=trunks[view] is None, every=step
            )
            for view, step in {(views[task], every[task]) for task in tasks}
        }
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise BadInput(
            f"expected the run's prepared data, got {type(error).__name__}: they or the cached features are gone or "
            "damaged; prepare the run again"
        ) from error
    num_units = about["num_units"][side]
    pooled: dict[str, Tensor] = {}
    records = {}
    for task, view in views.items():
        chosen_R, decoded, unit_R = shared[view, every[task]]
        features_RD = decoded.values_RD if isinstance(decoded, DecodedFeatures) else decoded
        if features_RD.dim() > 2 and not read[task]:
            features_RD = pooled.setdefault(view, features_RD.flatten(1, -2).mean(dim=1))
        labels = thin(arrays[f"{task}/labels"][chosen_R], every[task]).contiguous().to(device)
        mask_R = arrays[f"{task}/mask"][chosen_R].to(device)
        records[task] = TaskRecords.of(
            features_RD,
            labels,
            mask_R,
            unit_R,
            num_units,
            trunk=about["trunks"][task],
            decoded=decoded if isinstance(decoded, DecodedFeatures) else None,
        )
    units = Units(num_units, records)
    return _Opened(units, stamps, list_versions(units))


def list_positions(folder: Path, side: Side, tasks: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """Returns the position in its source of each record that `open_units` returns, by task.

    Args:
        folder: what `prepare` wrote.
        side: "train" or "test".
        tasks: which of the prepared tasks.
    """
    about, arrays = _read(folder / ARRAYS)
    views = {task: about["views"][task] for task in tasks}
    chosen = {view: arrays[f"{view}/side"] == SIDES.index(side) for view in views.values()}
    return {task: arrays[f"{view}/position"][chosen[view]].numpy() for task, view in views.items()}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns what `prepare` noted with the arrays, and the arrays."""
    data = path.read_bytes()
    arrays = load(data)
    # The header follows its length.
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    about: dict[str, Any] = json.loads(metadata["about"])
    if metadata["sha256"] != _digest(about, arrays):
        raise ValueError("expected the arrays that were written")
    return about, arrays


def _digest(about: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(arrays):
        values = arrays[name].numpy()
        digest.update(f"{name} {values.dtype} {values.shape}".encode() + values.tobytes())
    return digest.hexdigest()


def _records(
    arrays: Mapping[str, Tensor],
    view: str,
    features: str,
    side: Side,
    device: torch.device,
    *,
    exact: bool,
    every: int,
) -> tuple[Tensor, DecodedFeatures | Tensor, Tensor]:
    """Returns a view's mask of records on a side, their features and units.

    Args:
        arrays: what `prepare` wrote.
        view: key of the view.
        features: path of its features.
        side: which records.
        device: where the tensors are to be.
        exact: whether features have to be stored as integers.
        every: every so manieth place along each side is read.
    """
    check_features(Path(features))
    chosen_R = arrays[f"{view}/side"] == SIDES.index(side)
    rows_R = rows_of(Path(features), arrays[f"{view}/position"][chosen_R].numpy(), every)
    if exact and rows_R.dtype == np.float32:
        raise ValueError("expected features as integers")
    packed = rows_R.dtype == np.int16
    found = DecodedFeatures.of(QuantisedRows.unpack(rows_R)) if packed else decode_rows(rows_R)
    return chosen_R, found.to(device), arrays[f"{view}/unit"][chosen_R].to(device)


def _load_view(config: SiteConfig, view: _View, backbone: Backbone, encoding: Encoding) -> _LoadedView:
    """Opens a view's source and its features, and finds the records that can be used."""
    exclusions = Exclusions.read(config.state_dir)
    kind = open_source(config.sources[view.source], f"sources.{view.source}", config.plugins)
    opened = exclusions.applied(kind.open())
    type_ = choose_type(backbone, config.cache_bits)
    _refuse_too_many_features(config, len(opened.index()) * count_bytes(backbone.feature_dim, backbone.grid, type_))
    progress = encoding.named.get(view.backbone, encoding.progress)
    features = encoding.store.open_or_encode(
        opened,
        backbone,
        device=encoding.device,
        precision=config.precision,
        bits=config.cache_bits,
        progress=progress,
    )
    index = opened.index()
    sides, unlisted = select_rows(kind.rows, index, exclusions.positions(index))
    usable, rejected = find_usable(view.source, index, sides, features.unusable, config.unit)
    return _LoadedView(features, usable, unlisted + rejected)


def _refuse_too_many_features(config: SiteConfig, num_bytes: int) -> None:
    """Raises BadInput where the features of a source would take more room than the site gives them."""
    if num_bytes > config.cache_limit_gib * 2**30:
        raise BadInput(
            f"cache_limit_gib: expected at least {num_bytes / 2**30:.3g} for the features of the run's backbone, got "
            f"{config.cache_limit_gib:g}; a coarser `grid`, fewer layers or `cache_bits: 8` take less"
        )


def _select_view(placed: Sequence[PlacedRecord], view: _View, features: Features) -> list[PlacedRecord]:
    """Returns the records of a view: those of its source that have features of its backbone."""
    return [each for each in placed if each.source == view.source and each.position not in features.unusable]


def _read_marks(features: Features, members: Sequence[PlacedRecord]) -> Tensor:
    """Returns marks_RP of the records' places: the last feature of each."""
    positions_R = np.array([each.position for each in members], dtype=np.int64)
    parts = np.split(positions_R, range(_ROWS, len(positions_R), _ROWS))
    return torch.cat([decode_rows(rows_of(features.path, part))[..., -1] for part in parts])


def _number_units(placed: Sequence[PlacedRecord]) -> _UnitNumbers:
    """Numbers the units on each side in the order of their first records."""
    numbers: dict[str, int] = {}
    num_units: dict[Side, int] = dict.fromkeys(SIDES, 0)
    for each in placed:
        if each.unit_key not in numbers:
            numbers[each.unit_key] = num_units[SIDES[each.side]]
            num_units[SIDES[each.side]] += 1
    return _UnitNumbers(numbers, num_units)


def _build_arrays(
    labels: Mapping[str, TaskLabels], members: Mapping[_View, Sequence[PlacedRecord]], units: _UnitNumbers
) -> dict[str, Tensor]:
    """Returns the arrays of every task's labels and of every view's positions, sides and units, by name."""
    arrays: dict[str, Tensor] = {}
    for name, each in labels.items():
        arrays |= {f"{name}/labels": each.labels, f"{name}/mask": each.mask_R}
    for view, records in members.items():
        columns = {
            "position": [record.position for record in records],
            "side": [record.side for record in records],
            "unit": [units.of_key[record.unit_key] for record in records],
        }
        arrays |= {f"{view.key}/{name}": torch.tensor(values, dtype=torch.int64) for name, values in columns.items()}
    return arrays


def _write_rejected(path: Path, problems: Sequence[RejectedRecord]) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["file", "row", "task", "reason"])
    writer.writerows([problem.file, problem.row, problem.task, problem.reason] for problem in problems)
    write_atomic(path, text.getvalue().encode("utf-8", "backslashreplace"))
