"""The part of a model that is exported: one network, its inputs, its outputs, and all that a user must know of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.backbones import RawInputs, RawTensor
from common.errors import nearest
from common.exports.parts.facts import RunFacts
from common.files import write_atomic
from common.inputs import is_boxes, is_mask
from common.serving.folder import ModelBackbone
from common.serving.network import ITEMS, Model, Network
from common.tasks import FindsBoxes, ServesMaps, ServesTexts, Task, WritesTexts
from common.tasks.parts.transcripts import decoding
from common.types import BadInput

SCRIPTS = Path(__file__).parent / "scripts"
"""Files that are written beside a network; they know nothing of Headwater."""
_DECODING = [Path(decoding.__file__)]

_EXAMPLES = 3
_LENGTH = 16
"""Length of tokens and series in examples, where as much is allowed."""
_ITEMS = 5
"""Items of a bag in examples."""


@dataclass(frozen=True, eq=False)
class Exported:
    """Tasks of a model that share a backbone, to be written in some format.

    Attributes:
        model: the whole model.
        tasks: the tasks, in the order of the network's outputs.
        backbone: name of their backbone.
        left_out: whether the backbone is left out: the network then begins at its features.
        raw: the network's inputs.
        network: from those to what the tasks serve.
        facts: what the run's folder says beside the model; None where it was not there.
    """

    model: Model = field(repr=False)
    tasks: tuple[str, ...]
    backbone: str
    left_out: bool
    raw: RawInputs = field(repr=False)
    network: Network = field(repr=False)
    facts: RunFacts | None = field(default=None, repr=False)

    @property
    def origin(self) -> ModelBackbone:
        """The backbone as the model's config names it."""
        return self.model.config.backbones[self.backbone]

    @property
    def files(self) -> Mapping[str, bytes]:
        """Name -> content of the files that preprocessing needs."""
        return self.raw.files

    @property
    def of_bags(self) -> bool:
        """True where a record is a bag of items, each of which the network encodes."""
        return self.network.of_bags

    def list_columns(self) -> dict[str, list[str]]:
        """Returns task -> names of what it serves, in order."""
        return {task: self.model.list_columns(task) for task in self.tasks}

    def list_maps(self) -> dict[str, list[str]]:
        """Returns task -> names of the maps that the network returns of it, for tasks that label places."""
        tasks = {task: self.model.tasks[task] for task in self.tasks}
        return {name: task.name_maps() for name, task in tasks.items() if isinstance(task, ServesMaps)}

    @property
    def has_boxes(self) -> bool:
        """True where a task's predictions are boxes, which `boxes.py` finds in its maps."""
        return any(isinstance(self.model.tasks[task], FindsBoxes) for task in self.tasks)

    def find_shape(self, task: str) -> tuple[int, ...]:
        """Returns the shape of what the network returns of one record for a task."""
        own = self.model.backbones[self.backbone]
        with torch.inference_mode():
            return tuple(self.model.heads[task].tell(torch.zeros(1, *own.grid, own.feature_dim)).shape[1:])

    @property
    def has_texts(self) -> bool:
        """True where a task's predictions are texts, which `written.py` reads from what the network tells."""
        return any(isinstance(self.model.tasks[task], ServesTexts) for task in self.tasks)

    def find_prediction(self, task: str) -> Literal["mask", "boxes", "text", "cell"]:
        """Returns what a prediction of a task is, as its cell shows."""
        if isinstance(self.model.tasks[task], ServesTexts):
            return "text"
        cell = self.model.make_any_cell(task)
        return "mask" if is_mask(cell) else "boxes" if is_boxes(cell) else "cell"

    def make_example(self, count: int = _EXAMPLES) -> tuple[Tensor, ...]:
        """Returns random inputs of so many records, from torch's current generator."""
        return tuple(_draw(tensor, count) for tensor in self.raw.tensors)

    def describe(self) -> dict[str, Any]:
        """Returns all that a program needs to use the network, as plain values."""
        config = self.model.config
        backbone: dict[str, Any] = {"name": self.backbone, "digest": self.origin.digest, "source": self.origin.source}
        if self.left_out:
            backbone["left_out"] = self.explain_left_out()
        return {
            "format": "headwater export",
            "version": 1,
            "run": config.run,
            "created": config.created,
            "inputs": [{**asdict(tensor), "shape": ["batch", *tensor.shape]} for tensor in self.raw.tensors],
            "before": [dict(step) for step in self.raw.before],
            "outputs": [
                {
                    "task": task,
                    "kind": config.tasks[task].settings["kind"],
                    "shape": ["batch", *self.find_shape(task)],
                    **self._describe_prediction(task),
                    "columns": columns,
                    "settings": config.tasks[task].settings,
                }
                for task, columns in self.list_columns().items()
            ],
            "backbone": backbone,
        }

    def _describe_prediction(self, task: str) -> dict[str, Any]:
        """Returns what is said of a task that labels places or writes texts; of another one nothing."""
        own = self.model.tasks[task]
        if isinstance(own, ServesTexts):
            return {"prediction": "text", "text": own.describe_texts()}
        if not isinstance(own, ServesMaps):
            return {}
        return {
            "prediction": self.find_prediction(task),
            "maps": own.name_maps(),
            "column_of_map": own.map_summary,
            **({"boxes": asdict(own.box_rule)} if isinstance(own, FindsBoxes) else {}),
        }

    def explain_left_out(self) -> str:
        """Returns a sentence that says where a backbone that was left out can be got."""
        source = f"its weights are {self.origin.source}, " if self.origin.source else ""
        return (
            f"The backbone {self.backbone} is not part of this folder: {source}digest {self.origin.digest}; "
            "the network begins at its features."
        )

    def write_readers(self, folder: Path) -> None:
        """Writes the files that read boxes and texts from what the network tells, for formats of one program."""
        readers = [SCRIPTS / "boxes.py"] * self.has_boxes + [SCRIPTS / "written.py", *_DECODING] * self.has_texts
        for path in readers:
            write_atomic(folder / path.name, path.read_bytes())

    def write_metadata(self) -> bytes:
        """Returns the content of `preprocessing.json`."""
        return (json.dumps(self.describe(), indent=2) + "\n").encode()


def select(model: Model, tasks: Sequence[str], without: Sequence[str], *, one_task: bool, name: str) -> Exported:
    """Returns the part of a model that is exported.

    Args:
        model: the whole model.
        tasks: names of the tasks; empty for all.
        without: names or digests of backbones that are left out.
        one_task: whether the format holds one task only.
        name: of the format, for messages.

    Raises:
        BadInput: there is no such task or backbone, or the format cannot hold the tasks together.
    """
    chosen = tuple(model.choose_task(task) for task in tasks) or tuple(model.tasks)
    if one_task and len(chosen) > 1:
        raise BadInput(f"--format {name} holds one task: name it with --task, one of {', '.join(chosen)}")
    if len({model.config.tasks[task].backbone for task in chosen}) > 1:
        raise BadInput(f"--task: expected tasks of one backbone, got {', '.join(chosen)}; export one after the other")
    backbone = model.find_backbone(chosen)
    left_out = backbone in {_find_backbone(model, each) for each in without}
    for task in chosen:
        _check_texts(model.tasks[task], task, left_out)
    if left_out:
        raw, heads = _open_features(model, backbone), [model.heads[task] for task in chosen]
        return Exported(model, chosen, backbone, left_out, raw, Network(nn.Identity(), nn.Identity(), heads))
    raw = model.open_raw(backbone)
    network = model.torch(*chosen)
    return Exported(model, chosen, backbone, left_out, raw, network)


def _check_texts(task: Task, name: str, left_out: bool) -> None:
    if isinstance(task, WritesTexts) and left_out:
        raise BadInput(f"--without-backbone: expected to keep the backbone of {name}, whose decoder writes its texts")
    if isinstance(task, ServesTexts):
        try:
            task.describe_texts()
        except BadInput as error:
            raise BadInput(f"tasks.{name}.{error}") from error


def _find_backbone(model: Model, wanted: str) -> str:
    own = model.config.backbones
    found = [name for name, each in own.items() if wanted == name or each.digest.startswith(wanted.lower())]
    if len(found) != 1 or not wanted:
        known = ", ".join(f"{name} ({each.digest[:12]}...)" for name, each in own.items())
        raise BadInput(f"--without-backbone: expected one of {known}, got {wanted!r}{nearest(wanted, own)}")
    if any(task.backbone == found[0] and task.trunk is not None for task in model.config.tasks.values()):
        raise BadInput(f"--without-backbone: expected a frozen backbone, got {found[0]}, a part of which was trained")
    return found[0]


def _open_features(model: Model, backbone: str) -> RawInputs:
    own, digest = model.backbones[backbone], model.config.backbones[backbone].digest
    meaning = f"features of the backbone with digest {digest}"
    if own.num_marks:
        meaning += "; the last value of a place is above 0, and all values are 0 at places behind a record's last"
    tensor = RawTensor("features", "float32", (*own.grid, own.feature_dim), meaning)

    def prepare(item: Any) -> tuple[Tensor, ...]:
        return (model.encode(backbone, [item])[0],)

    return RawInputs((tensor,), nn.Identity(), [{"step": "encode", "digest": digest}], prepare)


def _draw(tensor: RawTensor, count: int) -> Tensor:
    longest = tensor.longest or _LENGTH
    # Recordings must be long enough for the layers behind them.
    length = longest if tensor.dtype == "float32" else min(_LENGTH, longest)
    lengths = {ITEMS: _ITEMS}
    shape = (count, *(lengths.get(axis, length) if isinstance(axis, str) else axis for axis in tensor.shape))
    if tensor.dtype == "uint8":
        return torch.randint(256, shape, dtype=torch.uint8)
    if tensor.dtype == "int64":
        # Valid as a token, a mask and a type.
        return torch.ones(shape, dtype=torch.int64)
    return torch.rand(shape, dtype=getattr(torch, tensor.dtype))
