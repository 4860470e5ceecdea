"""From a site's sources to units: prepared once for a run, written as small arrays, opened each round.

What cannot be used is named by file and row in the site's own `problems.csv`, counted, and skipped or fatal as the
site's file says.

# Shapes: R records, D features.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from client.config import SiteConfig
from client.data.exclusions import Exclusions
from client.data.feature_store import Features, FeatureStore, Progress, rows_of
from client.data.quantised import QuantisedRows
from client.data.records import SIDES, Member, Problem, Side, labels_of, place, usable
from client.data.sources import open_source
from client.data.units import TaskRecords, Units
from common.files import private_folder, write_atomic
from common.tasks import Task
from common.types import BadInput

if TYPE_CHECKING:
    from common.model.backbones import Backbone

ARRAYS = "arrays.safetensors"
PROBLEMS = "problems.csv"
_MAX_HEADER_BYTES = 100_000_000
"""As the format says."""


@dataclass(frozen=True)
class Preparation:
    """What preparing a run found, for local eyes only.

    Attributes:
        problems: records that are not used.
        num_units: units on each side.
        precision_error: the largest error of features where they were computed in less than float32, else None.
    """

    problems: tuple[Problem, ...] = field(repr=False)
    num_units: Mapping[Side, int] = field(repr=False)
    precision_error: float | None = None


class _View(NamedTuple):
    """One source as one backbone sees it, by digest."""

    source: str
    backbone: str

    @property
    def key(self) -> str:
        return f"{self.source}@{self.backbone}"


def prepare(
    config: SiteConfig,
    tasks: Mapping[str, Task],
    backbones: Mapping[str, Backbone],
    store: FeatureStore,
    folder: Path,
    *,
    device: torch.device,
    progress: Progress | None = None,
) -> Preparation:
    """Encode what is not encoded yet and write the arrays that `open_units` reads.

    Args:
        config: the site's file.
        tasks: the run's tasks at this site.
        backbones: task -> backbone, or its frozen part; tasks on one source and one backbone share their features.
        store: cached features.
        folder: receives the arrays; `problems.csv` is written beside it, also where preparing stops because of them.
        device: where to encode.
        progress: told (done, total) in records, source by source.

    Raises:
        BadInput: a source cannot be opened; a bad record, or no record to train on, where `on_bad_record` is `stop`; a
            patient on both sides of a source's own split.
    """
    views = {name: _View(config.tasks[name].source, backbones[name].digest) for name in tasks}
    exclusions = Exclusions.read(config.state_dir)
    found: dict[tuple[str, int], Member] = {}
    problems: list[Problem] = []
    features: dict[_View, Features] = {}
    for view in sorted(set(views.values())):
        kind = open_source(config.sources[view.source], f"sources.{view.source}", config.plugins)
        opened = exclusions.applied(kind.open())
        backbone = next(backbones[task] for task in tasks if views[task] == view)
        features[view] = store.open_or_encode(
            opened, backbone, device=device, precision=config.precision, progress=progress
        )
        index = opened.index()
        left_out = exclusions.positions(index)
        members, bad = usable(view.source, index, features[view].unusable, kind.rows, config.unit, left_out)
        found |= {(member.source, member.position): member for member in members}
        problems += bad
    placed, bad = place(found.values(), config.split, config.unit)
    problems += bad
    arrays: dict[str, Tensor] = {}
    own = {view: _members(placed, view, entry) for view, entry in features.items()}
    for name, task in tasks.items():
        labels, mask, bad = labels_of(name, task, config.tasks[name], own[views[name]])
        arrays |= {f"{name}/labels": labels, f"{name}/mask": mask}
        problems += bad
    num_units = _number_units(placed, arrays, own)
    if num_units["train"] == 0:
        names = sorted({view.source for view in features})
        problems.append(Problem(", ".join(names), None, "no record to train on"))
    # Once where two backbones cannot use a record for the same reason.
    problems = list(dict.fromkeys(problems))
    private_folder(folder.parent)
    _write_problems(folder.with_name(PROBLEMS), problems)
    _stop_or_go_on(config, problems)
    about = {
        "num_units": num_units,
        "views": {name: view.key for name, view in views.items()},
        "features": {view.key: str(entry.path) for view, entry in features.items()},
        "trunks": {name: backbones[name].trunk for name in tasks},
    }
    # One file, so that a crash leaves the old arrays or the new ones.
    write_atomic(private_folder(folder) / ARRAYS, save(arrays, metadata={"about": json.dumps(about)}))
    errors = [entry.error for entry in features.values() if entry.error is not None]
    return Preparation(tuple(problems), num_units, max(errors) if errors and config.precision != "float32" else None)


def check_prepared(folder: Path) -> None:
    """Whether a run's arrays and cached features are there; no record is read.

    Raises:
        BadInput: they are gone.
    """
    try:
        with (folder / ARRAYS).open("rb", buffering=0) as file:
            features = _about(file)["features"]
        gone = not all(Path(path).is_file() for path in features.values())
    except (OSError, ValueError, TypeError, KeyError, SafetensorError):
        gone = True
    if gone:
        raise BadInput("expected the run's prepared data, but they or the cached features are gone; prepare it again")


def open_units(folder: Path, side: Side, tasks: Sequence[str], device: torch.device) -> Units:
    """One side's units of a prepared run; tasks on one source and one backbone share their features.

    Args:
        folder: what `prepare` wrote.
        side: "train" or "test".
        tasks: which of the prepared tasks.
        device: where the tensors are to be.

    Raises:
        BadInput: not prepared, or the cached features are gone.
    """
    try:
        about, arrays = _read(folder / ARRAYS)
        views = {task: about["views"][task] for task in tasks}
        trunks = {view: about["trunks"][task] for task, view in views.items()}
        shared = {
            view: _records(arrays, view, about["features"][view], side, device, exact=trunks[view] is None)
            for view in set(views.values())
        }
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise BadInput(
            f"expected the run's prepared data, got {type(error).__name__}: they or the cached features are gone or "
            "damaged; prepare the run again"
        ) from error
    num_units = about["num_units"][side]
    records = {}
    for task, view in views.items():
        chosen_R, features_RD, unit_R = shared[view]
        labels, mask_R = arrays[f"{task}/labels"][chosen_R].to(device), arrays[f"{task}/mask"][chosen_R].to(device)
        records[task] = TaskRecords.of(features_RD, labels, mask_R, unit_R, num_units, trunk=about["trunks"][task])
    return Units(num_units, records)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    data = path.read_bytes()
    return _about(io.BytesIO(data)), load(data)


def _about(file: IO[bytes]) -> dict[str, Any]:
    """What `prepare` noted with the arrays; reads their file's header alone, which follows its length."""
    length = int.from_bytes(file.read(8), "little")
    if length > _MAX_HEADER_BYTES:
        raise ValueError("expected a safetensors file")
    about: dict[str, Any] = json.loads(json.loads(file.read(length))["__metadata__"]["about"])
    return about


def _records(
    arrays: Mapping[str, Tensor], view: str, features: str, side: Side, device: torch.device, *, exact: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Which of a view's records are on a side, their features (`exact`: as 16-bit integers hold them), their units."""
    chosen_R = arrays[f"{view}/side"] == SIDES.index(side)
    features_RD = torch.from_numpy(rows_of(Path(features), arrays[f"{view}/position"][chosen_R].numpy()))
    if exact:
        features_RD = QuantisedRows.of(features_RD).decode()
    return chosen_R, features_RD.to(device), arrays[f"{view}/unit"][chosen_R].to(device)


def _members(placed: Sequence[Member], view: _View, features: Features) -> list[Member]:
    """The records of a view: of its source, and with features of its backbone."""
    return [each for each in placed if each.source == view.source and each.position not in features.unusable]


def _number_units(
    placed: Sequence[Member], arrays: dict[str, Tensor], own: Mapping[_View, Sequence[Member]]
) -> dict[Side, int]:
    """Add every view's positions, sides and units to the arrays; units are numbered on each side alone."""
    numbers: dict[str, int] = {}
    num_units: dict[Side, int] = dict.fromkeys(SIDES, 0)
    for member in placed:
        assert member.side is not None
        if member.unit_key not in numbers:
            numbers[member.unit_key] = num_units[SIDES[member.side]]
            num_units[SIDES[member.side]] += 1
    for view, members in own.items():
        arrays[f"{view.key}/position"] = torch.tensor([member.position for member in members], dtype=torch.int64)
        arrays[f"{view.key}/side"] = torch.tensor([member.side for member in members], dtype=torch.int64)
        arrays[f"{view.key}/unit"] = torch.tensor([numbers[member.unit_key] for member in members], dtype=torch.int64)
    return num_units


def _write_problems(path: Path, problems: Sequence[Problem]) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["file", "row", "task", "reason"])
    writer.writerows([problem.file, problem.row, problem.task, problem.reason] for problem in problems)
    write_atomic(path, text.getvalue().encode())


def _stop_or_go_on(config: SiteConfig, problems: Sequence[Problem]) -> None:
    if problems and config.on_bad_record == "stop":
        first = problems[0]
        where = first.file if first.row is None else f"{first.file} row {first.row}"
        raise BadInput(
            f"{where}: {first.reason}; {len(problems)} such record(s), listed in {PROBLEMS}; mend them or write "
            "`on_bad_record: skip`"
        )
