"""Predictions about places of pictures, as files: masks, boxes, and pictures with both drawn on them.

A prediction's cell says what it is (`common.inputs`), whatever the task is. Masks and boxes are those of the picture's
own size. Files are readable by their owner only, and are there whole or not at all; none is ever overwritten.

# Shapes: H and W of a picture.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from client.data.records import RejectedRecord
from client.data.sources import LocatesFiles, LocatesSlices, SlicePlace, SourceRecord
from client.data.sources.coco import encode_runs
from client.data.sources.parts.boundary import try_record
from client.data.sources.parts.scans import count_slices, write_slices
from client.data.sources.parts.tree import make_readable
from client.prediction.files import strip_suffix
from client.prediction.records import Part, PredictedRecord, name_file, resolve
from common.backbones.parts.images import convert_to_grey, convert_to_rgb
from common.errors import explain_os_error
from common.files import private_folder, write_atomic
from common.inputs import Several, is_boxes, is_mask, read_boxes, read_mask, resize_mask
from common.report.overlays import Legend, draw_overlay, is_drawable, write_png
from common.serving.network import Model
from common.types import BadInput, BadRecord

if TYPE_CHECKING:
    from PIL import Image

_VOLUMES = (".nii", ".nii.gz")

_UNSEEN = 255
"""Value of the places of a slice that was not predicted: no label has it."""


@dataclass(frozen=True)
class PlacesOutput:
    """The files for masks, boxes and overlays; None for what is not asked for.

    Attributes:
        masks: a folder with a mask for each record, or a JSON file with the run lengths of all in COCO's format.
        boxes: a JSON file in COCO's format.
        overlays: a folder with a picture for each record.
        shown_from: folder to which the masks' paths in the table are relative; None shows them as they are.
    """

    masks: Path | None = None
    boxes: Path | None = None
    overlays: Path | None = None
    shown_from: Path | None = None


NO_PLACES = PlacesOutput()
"""Nothing of places is asked for."""


def plan_places(output: PlacesOutput, model: Model, tasks: Sequence[str], *, force: bool) -> PlacesOutput:
    """Returns the places of masks, boxes and overlays, checked; nothing is written yet.

    Args:
        output: what is asked for.
        model: the model.
        tasks: names of the tasks that are predicted.
        force: whether an earlier JSON file may be replaced.

    Raises:
        BadInput: no task predicts any, a folder has something in it, a file is there already, or the folder around
            them is missing.
    """
    cells = [model.make_any_cell(task) for task in tasks]
    asked = (
        ("masks", output.masks, is_mask, "masks"),
        ("boxes", output.boxes, is_boxes, "boxes"),
        ("overlays", output.overlays, is_drawable, "masks or boxes"),
    )
    for option, path, is_wanted, what in asked:
        if path is None:
            continue
        if not any(map(is_wanted, cells)):
            raise BadInput(f"--{option}: expected a task that predicts {what}, got {', '.join(tasks)}")
        if not path.parent.is_dir():
            raise BadInput(f"--{option} {path}: expected a folder at {path.parent}, found none")
        if option == "boxes" and not _is_json(path):
            raise BadInput(f"--boxes {path}: expected a name that ends in .json, got {path.suffix or 'none'!r}")
        if option != "overlays" and _is_json(path):
            if path.exists() and not (path.is_file() and force):
                raise BadInput(f"--{option}: expected a new file, but there is {path} already; --force replaces it")
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise BadInput(f"--{option} {path}: expected a new or empty folder, found something there")
    for option, path in (("overlays", output.overlays), ("boxes", output.boxes)):
        if output.masks is not None and path is not None and _is_same(output.masks, path):
            raise BadInput(f"--{option} {path}: expected another place than that of --masks")
    return output


def _is_json(path: Path | None) -> bool:
    return path is not None and path.suffix.lower() == ".json"


def _is_same(first: Path, second: Path) -> bool:
    return first.resolve() == second.resolve()


@contextmanager
def opened_places(output: PlacesOutput, model: Model, parts: Sequence[Part]) -> Iterator[PlacesWriter]:
    """Yields a writer; what it wrote takes its place when the block ends, and not at all where it fails.

    Args:
        output: what is asked for, as `plan_places` returned it.
        model: the model.
        parts: all records that are predicted.

    Raises:
        BadInput: something cannot be written.
    """
    staged: dict[Path, Path] = {}
    try:
        with _explained():
            for path in (output.masks, output.boxes, output.overlays):
                if path is not None and (path is output.overlays or not _is_json(path)):
                    staged[path] = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
                elif path is not None:
                    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
                    os.close(handle)
                    staged[path] = Path(name)
        yield PlacesWriter(output, model, parts, staged)
        with _explained():
            for path, temporary in staged.items():
                # An empty folder gives way; one that is not empty by now does not.
                os.replace(temporary, path)
    finally:
        for temporary in staged.values():
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadInput(
            f"expected masks, boxes and overlays that can be written, got {explain_os_error(error)}"
        ) from error


@dataclass(frozen=True)
class _Drawn:
    """The content of one record's files.

    Attributes:
        size: width and height of its picture.
        overlays: task -> picture as PNG.
        masks: task -> values H x W.
        volumes: task -> the same as NIfTI, where its file is one that can hold them.
        place: where it stands in a volume of several slices; None where it is in none.
    """

    size: tuple[int, int]
    overlays: Mapping[str, bytes] = field(repr=False)
    masks: Mapping[str, NDArray[np.uint8]] = field(repr=False)
    volumes: Mapping[str, bytes] = field(repr=False)
    place: SlicePlace | None = None


@dataclass
class _Volume:
    """The masks of a volume's slices, collected until all are there.

    Attributes:
        path: the file that is written.
        place: where one of the slices stands.
        left: how many slices are missing.
        slices: number of the slice -> its mask; emptied when the file is written.
    """

    path: Path
    place: SlicePlace
    left: int
    slices: dict[int, NDArray[np.uint8]] = field(default_factory=dict, repr=False)

    def write(self) -> None:
        """Writes what is there. Raises BadInput where the volume is no longer what it was."""
        try:
            content = write_slices(self.place.path, self.slices, self.place.plane, _UNSEEN)
        except (BadRecord, OSError, ValueError) as error:
            raise BadInput("--masks: expected volumes that stay as they are while they are predicted") from error
        write_atomic(self.path, content)
        self.slices.clear()


@final
class PlacesWriter:
    """Writes masks, boxes and overlays of predicted records."""

    def __init__(self, output: PlacesOutput, model: Model, parts: Sequence[Part], staged: Mapping[Path, Path]) -> None:
        """Begins with nothing.

        Args:
            output: what is asked for.
            model: the model.
            parts: all records that are predicted.
            staged: folder or file that is asked for -> the one that takes its place later.
        """
        self._output, self._staged = output, staged
        self._cells = {name: model.make_any_cell(name) for part in parts for name in part.tasks}
        self._legends = {name: make_legend(model, name) for name in self._cells}
        self._drawn = [name for name, cell in self._cells.items() if is_drawable(cell)]
        self._several = len(parts) > 1
        self._taken: set[str] = set()
        self._arrays: dict[Path, tuple[list[int], list[NDArray[np.uint8]]]] = {}
        self._volumes: dict[tuple[Path, str], _Volume] = {}
        self._coco, self._runs = _Coco(), _Coco()

    def write(
        self, part: Part, predicted: Sequence[PredictedRecord]
    ) -> tuple[list[PredictedRecord], list[RejectedRecord]]:
        """Writes what is asked for of some records of a part.

        Returns:
            The records, with the path of its mask's file in place of each mask that was written; and those whose
            picture cannot be read, each without the tasks that need it.
        """
        done, rejected = [], []
        for each in predicted:
            own = [name for name in self._drawn if name in each.results]
            # Only what depends on the record: a full disk is not its fault.
            drawn, reason = try_record(lambda each=each, own=own: self._draw(part, each, own))  # type: ignore[misc]
            if drawn is not None:
                with _explained():
                    done.append(replace(each, results=self._save_record(part, each, own, drawn)))
                continue
            rest = {name: result for name, result in each.results.items() if name not in own}
            done += [replace(each, results=rest)] if rest else []
            file, row = name_file(each.record), each.record.row
            rejected += [RejectedRecord(file, row, str(reason), name if rest else "") for name in own]
        return done, list(dict.fromkeys(rejected))

    def finish(self) -> None:
        """Writes what was collected; only names are given after that."""
        with _explained():
            for volume in self._volumes.values():
                if volume.slices:
                    volume.write()
            for path, (rows, masks) in self._arrays.items():
                content = io.BytesIO()
                np.savez_compressed(content, masks=np.stack(masks), rows=np.array(rows))
                write_atomic(path, content.getvalue())
            if self._output.masks is not None and _is_json(self._output.masks):
                names = [
                    name
                    for task in self._drawn
                    if is_mask(self._cells[task])
                    for at, name in enumerate(self._legends[task].names)
                    if at != self._legends[task].background
                ]
                write_atomic(self._staged[self._output.masks], self._runs.write(names))
            elif self._output.masks is not None:
                labels = {name: list(self._legends[name].names) for name in self._drawn if is_mask(self._cells[name])}
                write_atomic(self._staged[self._output.masks] / "labels.json", json.dumps(labels, indent=2).encode())
            if self._output.boxes is not None:
                names = [
                    name for task in self._drawn if is_boxes(self._cells[task]) for name in self._legends[task].names
                ]
                write_atomic(self._staged[self._output.boxes], self._coco.write(names))

    def _draw(self, part: Part, each: PredictedRecord, tasks: Sequence[str]) -> _Drawn:
        """Returns what is written of a record. Raises BadRecord where its picture cannot be read."""
        if not tasks:
            return _Drawn((0, 0), {}, {}, {})
        picture = open_picture(part.source.load(each.position))
        overlays, masks = dict[str, bytes](), dict[str, NDArray[np.uint8]]()
        volumes, place = dict[str, bytes](), _locate_slice(part, each)
        for task in tasks:
            cell, _ = each.results[task]
            if self._output.overlays is not None:
                overlays[task] = write_png(draw_overlay(picture, cell, self._legends[task]))
            if self._output.masks is not None and is_mask(cell):
                masks[task] = resize_mask(read_mask(cell), picture.height, picture.width).astype(np.uint8)
                volume = None if place is not None else _write_volume(part, each, masks[task])
                volumes |= {} if volume is None else {task: volume}
        return _Drawn(picture.size, overlays, masks, volumes, place)

    def _save_record(
        self, part: Part, each: PredictedRecord, tasks: Sequence[str], drawn: _Drawn
    ) -> dict[str, tuple[str, NDArray[np.float32]]]:
        """Returns the results of a record, with paths of masks in place of masks, after their files are written."""
        results = dict(each.results)
        name = self._choose_name(part, each.record) if tasks else ""
        for task in tasks:
            cell, served_C = results[task]
            if task in drawn.overlays:
                assert self._output.overlays is not None  # It was drawn because it is asked for.
                write_atomic(self._locate(self._output.overlays, task, f"{name}.png"), drawn.overlays[task])
            if task in drawn.masks and _is_json(self._output.masks):
                self._runs.add_mask(each.record, drawn.masks[task], self._legends[task])
            elif task in drawn.masks:
                results[task] = (self._save_mask(each.record, task, name, drawn), served_C)
            if self._output.boxes is not None and is_boxes(cell):
                self._coco.add(each.record, drawn.size, cell)
        return results

    def _choose_name(self, part: Part, record: SourceRecord) -> str:
        """Returns a new path of a record's files, without suffix: that of its own file, or else its row."""
        own = PurePath(make_readable(record.path))
        # A path that leaves its folder, or has none, gives a name only.
        inside = own.parts if not own.is_absolute() and ".." not in own.parts else own.parts[-1:]
        shown = strip_suffix("/".join(inside)) if inside else f"{record.row:06}"
        first = [_make_folder_name(part.name)] if self._several else []
        name = "/".join([*first, shown])
        while name.lower() in self._taken:
            name = f"{name}.row{record.row}"
        self._taken.add(name.lower())
        return name

    def _save_mask(self, record: SourceRecord, task: str, name: str, drawn: _Drawn) -> str:
        """Writes a mask in the form of its record's file; returns the path that stands in the table."""
        from PIL import Image

        assert self._output.masks is not None  # It was made because it is asked for.
        values_HW = drawn.masks[task]
        if not record.path and record.file.lower().endswith(".npz"):
            path = self._locate(self._output.masks, task, f"{Path(record.file).stem}.npz")
            rows, masks = self._arrays.setdefault(path, ([], []))
            rows.append(record.row)
            masks.append(values_HW)
        elif drawn.place is not None:
            path = self._add_slice(drawn.place, task, name, values_HW)
        elif task in drawn.volumes:
            path = self._locate(self._output.masks, task, f"{name}.nii.gz")
            write_atomic(path, drawn.volumes[task])
        else:
            path = self._locate(self._output.masks, task, f"{name}.png")
            write_atomic(path, write_png(Image.fromarray(values_HW)))
        shown = self._output.masks / path.relative_to(self._staged[self._output.masks])
        start = self._output.shown_from
        return str(shown) if start is None else os.path.relpath(shown, start)

    def _add_slice(self, place: SlicePlace, task: str, name: str, values_HW: NDArray[np.uint8]) -> Path:
        """Returns the file of a slice's volume, which is written once the masks of all its slices are there."""
        assert self._output.masks is not None  # The mask was made because it is asked for.
        volume = self._volumes.get((place.path, task))
        if volume is None:
            path = self._locate(self._output.masks, task, f"{name}.nii.gz")
            volume = _Volume(path, place, count_slices(place.path, place.plane))
            self._volumes[place.path, task] = volume
        volume.slices[place.at] = values_HW
        volume.left -= 1
        if volume.left == 0:
            volume.write()
        return volume.path

    def _locate(self, folder: Path, task: str, name: str) -> Path:
        """Returns a file's path in the folder that takes its place later; tasks have folders where they are several."""
        path = self._staged[folder] / (task if len(self._drawn) > 1 else "") / name
        private_folder(path.parent)
        return path


def make_legend(model: Model, task: str) -> Legend:
    """Returns the names that a task's masks or boxes have, as its public settings say."""
    settings = model.config.tasks[task].settings
    names = [str(name) for name in settings.get("labels") or ()]
    background = settings.get("background")
    return Legend(names, names.index(str(background)) if str(background) in names else 0)


def open_picture(item: Any) -> Image.Image:
    """Returns a record's content as an RGB picture of its own size. Raises BadRecord where it is none."""
    from PIL import Image

    if isinstance(item, Several):
        if len(item.items) != 1:
            raise BadRecord("expected one picture in the record, got several")
        item = item.items[0]
    if isinstance(item, np.ndarray) and item.dtype.kind == "f":
        return Image.fromarray((255.0 * convert_to_grey(item)).round().astype(np.uint8)).convert("RGB")
    return convert_to_rgb(item)


def _make_folder_name(name: str) -> str:
    return "".join(char if char.isalnum() or char in "-_" else "-" for char in name)


def _locate_slice(part: Part, each: PredictedRecord) -> SlicePlace | None:
    """Returns where a record stands in a volume; None where it is no slice of one."""
    source, positions = resolve(part.source)
    return source.locate_slice(positions[each.position]) if isinstance(source, LocatesSlices) else None


def _write_volume(part: Part, each: PredictedRecord, values_HW: NDArray[np.uint8]) -> bytes | None:
    """Returns a mask as NIfTI at its place in the body; None where its record's file is no volume of one slice."""
    source, positions = resolve(part.source)
    if not each.record.path.lower().endswith(_VOLUMES) or not isinstance(source, LocatesFiles):
        return None
    import nibabel

    volume = nibabel.as_closest_canonical(nibabel.load(source.locate(positions[each.position])))
    # As `client.data.sources.nifti` slices it: a picture's first row is the top, or the front.
    values = values_HW[::-1].T
    axis = next((axis for axis in (2, 1, 0) if volume.shape[axis] == 1), None)
    if axis is None or np.expand_dims(values, axis).shape != volume.shape:
        return None
    mask = nibabel.Nifti1Image(np.expand_dims(values, axis), volume.affine)
    return gzip.compress(mask.to_bytes(), mtime=0)


@final
@dataclass
class _Coco:
    """Objects as COCO's result files hold them, with the pictures and the categories that they refer to."""

    images: list[dict[str, Any]] = field(default_factory=list)
    objects: list[tuple[int, str, dict[str, Any]]] = field(default_factory=list)

    def add(self, record: SourceRecord, size: tuple[int, int], cell: str) -> None:
        """Adds the boxes of a picture, in its pixels; what lies outside of it is cut off.

        Args:
            record: the picture's record.
            size: its width and height.
            cell: its boxes.
        """
        width, height = size
        image = self._add_image(record, width, height)
        for box in read_boxes(cell):
            left, right = (min(max(side, 0.0), 1.0) * width for side in (box.left, box.right))
            top, bottom = (min(max(side, 0.0), 1.0) * height for side in (box.top, box.bottom))
            if right > left and bottom > top:
                sides = [left, top, right - left, bottom - top]
                own = {"bbox": [round(side, 2) for side in sides], "area": round(sides[2] * sides[3], 2)}
                self.objects.append((image, box.name, {**own, "iscrowd": 0, "score": round(box.score, 6)}))

    def add_mask(self, record: SourceRecord, values_HW: NDArray[np.uint8], legend: Legend) -> None:
        """Adds the places of each label but the background, by their run lengths.

        Args:
            record: the picture's record.
            values_HW: indices of labels.
            legend: the labels' names.
        """
        height, width = values_HW.shape
        image = self._add_image(record, width, height)
        for at in np.unique(values_HW).tolist():
            if at == legend.background:
                continue
            inside_HW = values_HW == at
            rows, columns = (np.flatnonzero(inside_HW.any(axis=axis)) for axis in (1, 0))
            left, top = int(columns[0]), int(rows[0])
            bbox = [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]
            own = {"segmentation": encode_runs(inside_HW), "bbox": bbox, "area": int(inside_HW.sum()), "iscrowd": 0}
            self.objects.append((image, legend.names[at], own))

    def _add_image(self, record: SourceRecord, width: int, height: int) -> int:
        """Returns the number of a picture that is added."""
        number = len(self.images) + 1
        name = name_file(record)
        self.images.append({"id": number, "file_name": name, "width": width, "height": height, "row": record.row})
        return number

    def write(self, names: Sequence[str]) -> bytes:
        """Returns the file's content; categories are numbered from 1 in the order of names."""
        known = list(dict.fromkeys([*names, *(name for _, name, _ in self.objects)]))
        values = {
            "images": self.images,
            "categories": [{"id": number, "name": name} for number, name in enumerate(known, start=1)],
            "annotations": [
                {"id": number, "image_id": image, "category_id": known.index(name) + 1, **own}
                for number, (image, name, own) in enumerate(self.objects, start=1)
            ],
        }
        return json.dumps(values, ensure_ascii=False).encode("utf-8", "backslashreplace")
