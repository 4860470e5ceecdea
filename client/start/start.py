"""A new model folder from a finished model: heads from names, heads tied to a few records, or both in this order."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from client.start.names import NamesFile, make_rows
from client.start.pooled import pool_heads
from client.start.shots import Progress, Shots, ShotsFile, open_shots
from client.start.tied import FEW_STRENGTH, USUAL_STRENGTH, fit_to_shots
from common.model.moments import serve_heads
from common.model.parameters import load_parameters, parameters
from common.serving.folder import ModelStart, ModelTask, read_backbone, read_heads, write_model
from common.serving.network import Model, open_model
from common.tasks import Task, open_task
from common.tasks.parts.adjusted import AdjustedHead
from common.types import BadInput, Heads, heads_digest


@dataclass(frozen=True)
class StartedHead:
    """A head of the new model.

    Attributes:
        settings: the task's settings.
        task: the task.
        backbone: name of the backbone that the head stands on.
        trunk: name of its trained part; None where there is none.
        head: the head.
        how: how it was made, in words.
        temperature: number by which its outputs are divided before they become probabilities.
        root_DD: root of the covariance of its rows, where several priors told one (`client.start.pooled`).
        named: whether it was made from names alone.
    """

    settings: Mapping[str, Any]
    task: Task
    backbone: str
    trunk: str | None
    head: nn.Module
    how: str
    temperature: float | None = None
    root_DD: Tensor | None = field(default=None, repr=False)
    named: bool = False


def start_from(
    prior: Path,
    out: Path,
    *,
    shots: ShotsFile | None,
    names: NamesFile | None,
    also: Sequence[Path] = (),
    backbones: Path | None = None,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> dict[str, StartedHead]:
    """Writes a model that starts from a prior, and returns its heads.

    Args:
        prior: folder of a finished model, or of its run.
        out: the new model's folder.
        shots: labelled records of the new site; None for none.
        names: a new task by the names of its classes; None for the prior's own tasks.
        also: further models with the same tasks on the same backbones.
        backbones: weights of a prior that was handed on without them.
        device: device that encodes records; by default the CPU.
        progress: told how many records are encoded.

    Raises:
        BadInput: neither records nor names are given, or they do not fit the prior.
        DigestMismatch: the prior was changed.
    """
    if shots is None and names is None:
        raise BadInput("expected --shots, --names or both")
    model = open_model(prior, device, backbones=backbones)
    others = [_open_other(model, path, backbones) for path in also]
    if names is None:
        heads = list_prior_heads(model)
        wanted = list(heads) if shots is None else [name for name in heads if name in shots.tasks]
        heads |= {name: _pool(name, heads[name], others) for name in wanted}
    else:
        heads = {names.task: start_from_names(model, names)}
    if shots is not None:
        heads = _fit_all(model, heads, shots, progress)
    _write(prior, out, model, heads, backbones, names is not None, shots is not None)
    return heads


def list_prior_heads(model: Model) -> dict[str, StartedHead]:
    """Returns the heads of a finished model."""
    return {
        name: StartedHead(
            own.settings, model.tasks[name], own.backbone, own.trunk, model.heads[name].head, "from the prior"
        )
        for name, own in model.config.tasks.items()
    }


def _open_other(model: Model, path: Path, backbones: Path | None) -> Model:
    other = open_model(path, backbones=backbones)
    own, others = (
        {name: (each.digest, each.trainable) for name, each in opened.config.backbones.items()}
        for opened in (model, other)
    )
    if own != others or any(trainable is not None for _, trainable in own.values()):
        raise BadInput(f"--also {path}: expected a model on the prior's frozen backbones, got one on others")
    return other


def _pool(name: str, start: StartedHead, others: Sequence[Model]) -> StartedHead:
    """Returns the head of a task by all models."""
    if not others:
        return start
    for other in others:
        own = other.config.tasks.get(name)
        if own is None or (own.settings, own.backbone) != (start.settings, start.backbone):
            raise BadInput(f"--also: expected models with task {name} and the prior's settings of it, got one without")
    prior = pool_heads([start.head, *(other.heads[name].head for other in others)])
    return replace(start, head=prior.mean, how=prior.how, root_DD=prior.root_DD)


def start_from_names(model: Model, names: NamesFile) -> StartedHead:
    """Returns a head for new classes on the backbone of a finished model.

    The centre that the model's sites released is kept: it tells no class from another. Raises BadInput.
    """
    backbone = _choose_backbone(model, names)
    rows_KD = make_rows(names, model.backbones[backbone])
    centres = [
        head.head.fixed.centre
        for name, head in model.heads.items()
        if model.config.tasks[name].backbone == backbone
        and isinstance(head.head, AdjustedHead)
        and "centre" in head.head.fixed._buffers
    ]
    settings = {
        "kind": "classification",
        "labels": list(names.list_texts()),
        "head": {"bias": False, "centre": bool(centres)},
    }
    task = open_task(settings, f"task {names.task}")
    head = task.head(model.backbones[backbone].feature_dim)
    with torch.no_grad():
        if isinstance(head, AdjustedHead):
            head.fixed.centre.copy_(centres[0])
        (weight_KD,) = head.parameters()
        weight_KD.copy_(rows_KD)
    trunk = next((own.trunk for own in model.config.tasks.values() if own.backbone == backbone), None)
    how = "from names alone: no record had a part in it"
    return StartedHead(settings, task, backbone, trunk, head, how, named=True)


def _choose_backbone(model: Model, names: NamesFile) -> str:
    if len(model.backbones) > 1:
        raise BadInput(f"task {names.task}: expected a prior of one backbone, got one of {', '.join(model.backbones)}")
    (backbone,) = model.backbones
    if model.config.backbones[backbone].trainable is not None and names.text is not None:
        raise BadInput("classifier: expected a prior whose backbone is frozen, got one of which a part was trained")
    return backbone


def _fit_all(
    model: Model, heads: Mapping[str, StartedHead], file: ShotsFile, progress: Progress | None
) -> dict[str, StartedHead]:
    tasks = {name: each.task for name, each in heads.items()}
    opened = open_shots(file, tasks, {name: model.backbones[each.backbone] for name, each in heads.items()}, progress)
    return {name: _fit(name, heads[name], own, file) for name, own in opened.items()}


def _fit(name: str, start: StartedHead, shots: Shots, file: ShotsFile) -> StartedHead:
    few = USUAL_STRENGTH if start.named else FEW_STRENGTH
    fitted = fit_to_shots(name, start.head, start.task, shots.records, start.root_DD, few_strength=few)
    unusable = f", {shots.num_unusable} more cannot be used" if shots.num_unusable else ""
    rarest = f", {fitted.fewest} of the rarest label" if fitted.fewest < len(shots.records.unit_R) else ""
    source = "from names" if start.named else start.how
    how = f"{source}; {fitted.describe()}; {len(shots.records.unit_R)} record(s){rarest}{unusable}"
    settings, head = dict(start.settings), fitted.head
    prior = file.tasks[name].prior
    if prior is not None:
        settings |= {"prior": prior, "head": {**settings.get("head", {}), "prior": True}}
        head = _declare_prior(name, settings, head)
    return StartedHead(
        settings, open_task(settings, f"task {name}"), start.backbone, start.trunk, head, how, fitted.temperature
    )


def _declare_prior(name: str, settings: Mapping[str, Any], head: nn.Module) -> nn.Module:
    """Returns the head served for other label shares; it was fitted for equally frequent labels."""
    served = open_task(settings, f"task {name}")
    params = parameters(head)
    inner = head.layers if isinstance(head, AdjustedHead) else head
    module = served.head(next(iter(inner.parameters())).shape[1])
    given = params if isinstance(head, AdjustedHead) else {f"layers.{key}": value for key, value in params.items()}
    blank = {key: value for key, value in parameters(module).items() if key not in given}
    load_parameters(module, serve_heads({name: {**blank, **given}}, {name: served})[name])
    return module


def _write(
    prior: Path,
    out: Path,
    model: Model,
    heads: Mapping[str, StartedHead],
    backbones: Path | None,
    from_names: bool,
    from_records: bool,
) -> None:
    config = model.config
    known = read_heads(prior, config)
    params: Heads = {name: parameters(each.head) for name, each in heads.items()}
    trunks = dict.fromkeys(each.trunk for each in heads.values() if each.trunk is not None)
    params = {**params, **{name: known[name] for name in trunks}}
    used = dict.fromkeys(each.backbone for each in heads.values())
    before = config.start
    start = ModelStart(
        prior=config.heads,
        names=from_names or (before is not None and before.names),
        records=from_records or config.never_leaves,
    )
    described = config.model_copy(
        update={
            "created": time.strftime("%Y-%m-%d"),
            "tasks": {
                name: ModelTask(
                    settings=dict(each.settings),
                    backbone=each.backbone,
                    trunk=each.trunk,
                    temperature=each.temperature,
                )
                for name, each in heads.items()
            },
            "backbones": {name: config.backbones[name] for name in used},
            "heads": heads_digest(params),
            "start": start,
        }
    )
    write_model(out, described, params, {name: read_backbone(prior, name, config, backbones) for name in used})
