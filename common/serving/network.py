"""A finished model as networks: from preprocessed inputs to what a user reads.

# Shapes: B records, D features, O outputs of a head, C columns of what is served.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from common.backbones import Bag, RawInputs, RawTensor, list_items
from common.backbones.parts.projection import ProjectionLayer
from common.model.backbones import Backbone, FrozenBackbone, join_items, load_blob
from common.model.parameters import load_parameters
from common.model.trunks import cut
from common.serving.folder import ModelConfig, read_backbone, read_config, read_heads
from common.tasks import (
    WRITTEN_AT_ONCE,
    Servable,
    ServesMaps,
    ServesTexts,
    Task,
    WritesTexts,
    open_on_backbones,
    open_task,
    predict_outputs,
    reads_places,
)
from common.tasks.parts.adjusted import AdjustedHead
from common.types import BadInput, BadRecord, DigestMismatch, Params

ITEMS = "items"
"""The axis of raw inputs along which a bag's items stand."""

_CHUNK = 64
"""Records that are encoded at once where a caller hands all of them over."""


@final
class ServedHead(nn.Module):
    """A task's head as it is used: features -> calibrated outputs -> what the task serves.

    A temperature divides what the head learnt and leaves the offset of the declared prior as it is.
    """

    temperature: Tensor
    offset_O: Tensor

    def __init__(self, task: Task, head: nn.Module, temperature: float | None) -> None:
        super().__init__()
        self.task = task
        self.head = head
        offset = head.offset_K if isinstance(head, AdjustedHead) else None
        self.register_buffer("temperature", torch.tensor(1.0 if temperature is None else temperature))
        self.register_buffer("offset_O", torch.zeros(()) if offset is None else offset.detach().clone())
        self.requires_grad_(False)
        self.train(False)

    def compute_outputs(self, features_BD: Tensor) -> Tensor:
        """Returns outputs_BO, from which the task's codec decodes a prediction.

        A task of whole records reads the mean of features of places.
        """
        if features_BD.dim() > 2 and not reads_places(self.task):
            features_BD = features_BD.flatten(1, -2).mean(dim=1)
        outputs_BO = predict_outputs(self.task, self.head, features_BD)
        return self.offset_O + (outputs_BO - self.offset_O) / self.temperature

    def forward(self, features_BD: Tensor) -> Tensor:
        """Returns served_BC: probabilities, or what else the task serves (`Servable`)."""
        return self.serve(self.compute_outputs(features_BD))

    def tell(self, features_BD: Tensor) -> Tensor:
        """Returns what an exported network does: maps_BCSS or what texts are read from, else served_BC."""
        outputs_BO = self.compute_outputs(features_BD)
        if isinstance(self.task, ServesTexts):
            return self.task.serve_texts(outputs_BO)
        return self.task.serve_maps(outputs_BO) if isinstance(self.task, ServesMaps) else self.serve(outputs_BO)

    def serve(self, outputs_BO: Tensor) -> Tensor:
        """Returns served_BC of outputs as `compute_outputs` returns them."""
        return self.task.serve(outputs_BO) if isinstance(self.task, Servable) else outputs_BO


@final
class _Told(nn.Module):
    """A head as an exported network has it: features -> what `ServedHead.tell` returns."""

    def __init__(self, head: ServedHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, features_BD: Tensor) -> Tensor:
        return self.head.tell(features_BD)


@final
class Network(nn.Module):
    """Tasks of a model as one module: raw inputs (`common.backbones.RawInputs`) -> what each task tells.

    This is the module that is exported: what it computes of a batch, a graph of torch or ONNX can compute. Inputs of
    bags have an axis of items behind that of records: all bags of a batch have as many.
    """

    def __init__(
        self, start: nn.Module, backbone: nn.Module, heads: Sequence[ServedHead], *, of_bags: bool = False
    ) -> None:
        super().__init__()
        self.of_bags = of_bags
        self.start = start
        self.backbone = backbone
        self.heads = nn.ModuleList(_Told(head) for head in heads)
        self.requires_grad_(False)
        self.train(False)

    def forward(self, *inputs_B: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Returns served_BC or maps_BCSS, or one for each task where there are several.

        Args:
            *inputs_B: one batch for each raw input, in their order.
        """
        if self.of_bags:
            # Each item by itself, and then side by side: B x N x D.
            of_items = self.backbone(self.start(*(each.flatten(0, 1) for each in inputs_B)))
            features_BD = of_items.reshape(inputs_B[0].shape[0], inputs_B[0].shape[1], of_items.shape[1])
        else:
            features_BD = self.backbone(self.start(*inputs_B))
        served = tuple(head(features_BD) for head in self.heads)
        return served[0] if len(served) == 1 else served


@dataclass(frozen=True, eq=False)
class Model:
    """A finished model, ready to use.

    Attributes:
        config: what is known of it.
        tasks: task -> its definition.
        backbones: name -> the backbone that encodes records, with the trained part where there is one.
        heads: task -> its head.
    """

    config: ModelConfig
    tasks: Mapping[str, Task]
    backbones: Mapping[str, Backbone] = field(repr=False)
    heads: Mapping[str, ServedHead] = field(repr=False)

    def __call__(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """Returns what each task serves for records: task -> served_BC (`list_columns` names the columns).

        Args:
            items: pictures, texts, recordings or other items (`common.inputs`).

        Raises:
            BadRecord: one of them cannot be used.
        """
        features = {name: self.encode(name, items) for name in self.backbones}
        served = {}
        with torch.inference_mode():
            for name in self.tasks:
                features_BD = features[self.config.tasks[name].backbone]
                # Outputs of places are refined, which takes much memory: one record after the other.
                at_once = 1 if features_BD.dim() > 2 else max(1, len(features_BD))
                at_once = WRITTEN_AT_ONCE if isinstance(self.tasks[name], WritesTexts) else at_once
                served[name] = torch.cat([self.heads[name](part) for part in torch.split(features_BD, at_once)])
        return served

    def encode(self, backbone: str, items: Sequence[Any]) -> Tensor:
        """Returns features_BD of records, on the CPU.

        Args:
            backbone: name of the backbone.
            items: pictures, texts, recordings or other items (`common.inputs`).

        Raises:
            BadRecord: one of them cannot be used.
        """
        own = self.backbones[backbone]
        parts = [list_items(item, own.bag) for item in items]
        inputs = [own.preprocess(part) for several in parts for part in several]
        if not inputs:
            return torch.zeros(0, *own.grid, own.feature_dim)
        chunks = [inputs[first : first + _CHUNK] for first in range(0, len(inputs), _CHUNK)]
        features = torch.cat([own.encode_items(chunk) for chunk in chunks])
        return join_items(features, [len(several) for several in parts], own.bag)

    def list_columns(self, task: str) -> list[str]:
        """Returns the names of the columns that a task serves."""
        definition, num_outputs = self.tasks[task], self._compute_any(task).shape[-1]
        if isinstance(definition, Servable):
            return definition.name_served(num_outputs)
        return [f"output {number}" for number in range(num_outputs)]

    def make_any_cell(self, task: str) -> str:
        """Returns a prediction of a task as one cell, of features that are zero: it shows whether that is a mask."""
        return "|".join(self.tasks[task].codec.decode(self._compute_any(task))[0])

    def _compute_any(self, task: str) -> Tensor:
        """Returns outputs of one record whose features are zero."""
        own = self.backbones[self.config.tasks[task].backbone]
        with torch.inference_mode():
            return self.heads[task].compute_outputs(torch.zeros(1, *own.grid, own.feature_dim))

    def torch(self, *tasks: str) -> Network:
        """Returns tasks as one module on the CPU, from raw inputs to what they serve.

        Args:
            *tasks: the tasks, which share a backbone; may be left out where the model has one.

        Raises:
            BadInput: there is no such task, or several and none is named; their backbones differ, or have no raw
                inputs.
        """
        names = tasks or (self.choose_task(None),)
        name = self.find_backbone(names)
        backbone = self.backbones[name].to(torch.device("cpu"))
        heads = [self.heads[task] for task in names]
        return Network(self.open_raw(name).module, backbone.module, heads, of_bags=backbone.bag is not None)

    def find_backbone(self, tasks: Sequence[str]) -> str:
        """Returns the name of the backbone that tasks share. Raises BadInput."""
        names = dict.fromkeys(self.config.tasks[self.choose_task(task)].backbone for task in tasks)
        if len(names) != 1:
            raise BadInput(f"task: expected tasks of one backbone, got {', '.join(tasks)}, which stand on several")
        return next(iter(names))

    def open_raw(self, backbone: str) -> RawInputs:
        """Returns the inputs of a backbone as others have them.

        Raises:
            BadInput: its kind says of none.
        """
        own = self.backbones[backbone]
        if own.open_raw is None:
            raise BadInput(
                f"backbone {backbone}: expected one whose records other programs can prepare, got kind "
                f"{own.kind.kind!r}; `headwater predict` and `headwater.load` serve the model as it is, and `headwater "
                f"export --without-backbone {backbone}` writes its heads, which begin at features"
            )
        return own.open_raw() if own.bag is None else _open_bags(own.open_raw(), own.bag)

    def choose_task(self, task: str | None) -> str:
        """Returns the named task, or the only one. Raises BadInput."""
        if task is None and len(self.tasks) == 1:
            return next(iter(self.tasks))
        if task is None or task not in self.tasks:
            got = "none" if task is None else repr(task)
            raise BadInput(f"task: expected one of {', '.join(self.tasks)}, got {got}")
        return task


def _open_bags(of_item: RawInputs, bag: Bag) -> RawInputs:
    """Returns the inputs of bags from those of one item, with the items of each side by side."""

    def prepare(item: Any) -> tuple[Tensor, ...]:
        prepared = [of_item.prepare(each) for each in list_items(item, bag)]
        return tuple(_stack_items(each) for each in zip(*prepared, strict=True))

    def widen(tensor: RawTensor) -> RawTensor:
        return replace(tensor, shape=(ITEMS, *tensor.shape), meaning=f"of each item of a record: {tensor.meaning}")

    step = {"step": ITEMS, "most": bag.max_items, "more": "evenly spread" if bag.cuts else "refused"}
    return replace(of_item, tensors=tuple(map(widen, of_item.tensors)), before=[step, *of_item.before], prepare=prepare)


def _stack_items(items: Sequence[Tensor]) -> Tensor:
    if len({each.shape for each in items}) > 1 and any(each.is_floating_point() for each in items):
        raise BadRecord("expected items of one length in a record, got several")
    # Of tokens a mask says where they end.
    return nn.utils.rnn.pad_sequence(list(items), batch_first=True)


def open_model(path: Path, device: torch.device | None = None, *, backbones: Path | None = None) -> Model:
    """Returns the model of a folder, verified.

    Args:
        path: folder of the model, or of the run that it is the result of.
        device: device that backbones encode on; by default the CPU.
        backbones: weights of backbones that the model was handed on without (`read_backbone`).

    Raises:
        BadInput: there is no model, or a part of it is missing.
        DigestMismatch: a part of it was changed.
    """
    config = read_config(path)
    heads = read_heads(path, config)
    tasks = {name: open_task(own.settings, f"{path}: tasks.{name}") for name, own in config.tasks.items()}
    opened = {name: _open_backbone(path, name, config, heads, backbones) for name in config.backbones}
    if device is not None:
        opened = {name: backbone.to(device) for name, backbone in opened.items()}
    tasks = open_on_backbones(tasks, {name: opened[own.backbone].language for name, own in config.tasks.items()})
    served = {}
    for name, own in config.tasks.items():
        head = tasks[name].head(opened[own.backbone].feature_dim)
        try:
            load_parameters(head, heads[name])
        except BadInput as error:
            raise DigestMismatch(f"{path}: the head of {name} does not fit its backbone: {error}") from error
        served[name] = ServedHead(tasks[name], head, own.temperature)
    return Model(config, tasks, opened, served)


def _open_backbone(
    path: Path, name: str, config: ModelConfig, heads: Mapping[str, Params], elsewhere: Path | None
) -> Backbone:
    """Returns a backbone as the model uses it: the trained part is put in place of the part that was sent."""
    try:
        backbone = load_blob(read_backbone(path, name, config, elsewhere))
    except DigestMismatch as error:
        raise DigestMismatch(
            f"{path}: backbone {name}: its weights, preprocessing or other settings are not those that the heads were "
            "trained on"
        ) from error
    trainable = config.backbones[name].trainable
    trunk = next((own.trunk for own in config.tasks.values() if own.backbone == name and own.trunk is not None), None)
    if trainable is None or trunk is None:
        return backbone
    parts = cut(backbone, trainable, trunk, f"trainable.{name}", config.seed)
    load_parameters(parts.trunk, heads[trunk])
    whole = FrozenBackbone(nn.Sequential(parts.below.module, parts.trunk), ProjectionLayer(None, backbone.feature_dim))
    return replace(backbone, module=whole)
