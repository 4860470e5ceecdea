"""Synthetic records and heads that an audit plants. No real record is ever involved.

- A record's features are LIVE ones, then one for each canary, then FREE ones.
- Background units use the live features only, as ordinary records would.
- Canary i is one unit: `size` in feature LIVE + i and 0 elsewhere, with a random label for every task, one that the
  task trains on. So canaries' gradients are orthogonal but for a bias, which a large `size` makes negligible, and each
  is clipped.
- No record touches a free feature: what a release says of its weights is noise and nothing else.
- Heads begin with weights of 0 for all features but the live ones.

Where a part of a backbone trains, a small stand-in trunk lies below the heads. It hands the features on, and beside
them what its own layer makes of them: so a canary has a feature, and a gradient, in the heads and in the trunk too.

# Shapes: R records, U units, D features, M canaries, W rows of the first weight of a parameter group (head or trunk).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from client.audit.stand_ins import open_on_stand_ins
from client.audit.statistics import Bools, Floats
from client.data.units import TaskRecords, Units
from common.model.parameters import create_heads
from common.model.trunks import stand_in
from common.privacy.noise import NoiseStream
from common.tasks import Task, reads_places
from common.types import BadInput, BadRecord, Delta, RunFailed, Unit

LIVE, FREE, BACKGROUND = 8, 32, 20

FEWEST_CANARIES = 50

MOST_VALUES = 2**24
"""Values of all canaries' gradients together: more of them take minutes and gigabytes where each is formed."""

_MOST_DRAWS = 1000

_LEAST_SLOPE = 0.05
"""A canary's label has at least this part of the largest slope that was drawn."""

ADDED = 4
"""Outputs of a stand-in trunk's layer, large enough that heads' and trunk's gradients are of one size."""


PLACES = 2
"""Places along each axis of the synthetic records of a task of places; all have the same features."""


def spread_places(task: Task, rows: Tensor) -> Tensor:
    """Returns rows, features or outputs, as a task's head has them: of a task of places the same at each place."""
    if not reads_places(task):
        return rows
    axes = len(type(task).example().grid)
    return rows.view(len(rows), *(1,) * axes, rows.shape[-1]).expand(-1, *(PLACES,) * axes, -1)


def read_label(task: Task, cells: Sequence[str]) -> Tensor | None:
    """Returns a label that outputs were decoded to; None where it is none: they may say more objects than there are."""
    try:
        return task.codec.encode(cells)
    except BadRecord:
        return None


def draw_normals(stream: NoiseStream, shape: tuple[int, ...]) -> Floats:
    """Returns standard normals for synthetic data."""
    normals: Floats = stream.rounded_gaussian(math.prod(shape), 40).astype(np.float64).reshape(shape) * 2.0**-40
    return normals


@dataclass(frozen=True)
class Planted:
    """Canaries, background units, heads and trunks of one audit.

    Attributes:
        tasks: the run's tasks; those that write texts are opened on a stand-in language.
        modules: parameter group -> head or trunk, with random weights, zero for all features but the live ones.
        direction: parameter group -> [W, M], each canary's gradient by the weights of its own feature; over all
            parameter groups its L2 norm is 1.
        everyone: the background units, then the canaries.
    """

    tasks: Mapping[str, Task]
    modules: Mapping[str, nn.Module]
    direction: Mapping[str, Floats]
    everyone: Units

    @property
    def num_canaries(self) -> int:
        """Number of canaries M."""
        return self.everyone.num_units - BACKGROUND

    def select_units(self, canary_M: Bools, *, background: bool, scale: float = 1.0) -> Units:
        """Returns the units of a site that holds some of the canaries.

        Args:
            canary_M: whether the site holds each canary.
            background: whether it holds the background units too.
            scale: factor on all features.
        """
        keep_U = torch.from_numpy(np.concatenate([np.full(BACKGROUND, background), canary_M]))
        position_U = torch.cumsum(keep_U, dim=0) - 1
        tasks = {}
        for name, records in self.everyone.tasks.items():
            rows = keep_U[records.unit_R]
            features_RD = records.features_RD[rows]
            tasks[name] = TaskRecords(
                features_RD if scale == 1.0 else features_RD * scale,
                records.labels[rows],
                records.mask_R[rows],
                position_U[records.unit_R[rows]],
                records.weight_R[rows],
                records.trunk,
            )
        return Units(int(keep_U.sum()), tasks)

    def read_canary_weights(self, update: Delta, group: str) -> Floats:
        """Returns [W, M], the change of the weights of the canaries' features."""
        return self._read_first_weight(update, group)[:, LIVE : LIVE + self.num_canaries]

    def read_free_weights(self, update: Delta, group: str) -> Floats:
        """Returns [W, FREE], the change of the weights of the features that no record touches."""
        start = LIVE + self.num_canaries
        return self._read_first_weight(update, group)[:, start : start + FREE]

    def count_rows(self) -> dict[str, int]:
        """Returns parameter group -> number of rows W of its first weight."""
        return {name: len(direction) for name, direction in self.direction.items()}

    def count_parameters(self) -> int:
        """Returns the number of trainable parameters of all heads and trunks."""
        return sum(
            part.numel() for module in self.modules.values() for part in module.parameters() if part.requires_grad
        )

    def _read_first_weight(self, update: Delta, group: str) -> Floats:
        return update.heads[group][_name_first_weight(self.modules[group], group)].astype(np.float64)


def limit_canaries(tasks: Mapping[str, Task], wanted: int) -> int:
    """Returns the number of canaries whose gradients an audit can hold: fewer for very large heads.

    Args:
        tasks: the run's tasks.
        wanted: largest number.
    """
    num_canaries = wanted
    while num_canaries > FEWEST_CANARIES:
        width = LIVE + num_canaries + FREE
        heads = create_heads(tasks, dict.fromkeys(tasks, width), seed=0)
        values = sum(part.numel() for head in heads.values() for part in head.parameters())
        if num_canaries * values <= MOST_VALUES:
            break
        num_canaries = max(FEWEST_CANARIES, num_canaries * 3 // 4)
    return num_canaries


def plant(
    tasks: Mapping[str, Task],
    trunks: Mapping[str, str],
    *,
    unit: Unit,
    clip_norm: float,
    num_canaries: int,
    stream: NoiseStream,
) -> Planted:
    """Returns synthetic records, heads and trunks, all drawn from the stream.

    Args:
        tasks: task -> its definition.
        trunks: task -> name of the trunk that its records pass, for the tasks that have one.
        unit: patients have two records each, examples one.
        clip_norm: the plan's clip norm; canaries are made large enough that it binds.
        num_canaries: number of canaries M.
        stream: source of labels, features and weights.

    Raises:
        BadInput: a head does not begin with a weight for each feature, so that canaries cannot be told apart.
        RunFailed: a canary's gradient is too small to be clipped.
    """
    width = LIVE + num_canaries + FREE
    dims = {name: width + ADDED if name in trunks else width for name in tasks}
    tasks = open_on_stand_ins(tasks, dims)
    modules = {
        **create_heads(tasks, dims, seed=0),
        **{name: stand_in(width, ADDED) for name in sorted(set(trunks.values()))},
    }
    for name, module in sorted(modules.items()):
        _randomise_weights(module, name, width, stream)
    size = 1e4 * max(1.0, clip_norm) / min(1.0, *(task.scale for task in tasks.values()))
    features_UD = torch.zeros(BACKGROUND + num_canaries, width)
    features_UD[:BACKGROUND, :LIVE] = torch.from_numpy(draw_normals(stream, (BACKGROUND, LIVE))).float()
    features_UD[BACKGROUND:, LIVE : LIVE + num_canaries] = size * torch.eye(num_canaries)
    records_per_unit = 2 if unit is Unit.PATIENT else 1
    unit_R = torch.arange(len(features_UD)).repeat_interleave(records_per_unit)
    features_RD = features_UD[unit_R]
    everyone = {
        name: _make_records(task, modules[name], trunks.get(name), features_RD, unit_R, stream=stream)
        for name, task in tasks.items()
    }
    planted = Planted(tasks, modules, {}, Units(len(features_UD), everyone))
    return replace(planted, direction=_compute_directions(planted, clip_norm))


def _name_first_weight(module: nn.Module, group: str) -> str:
    name, weight = next(iter(module.named_parameters()))
    if weight.dim() != 2 or weight.shape[1] < LIVE + FREE:
        raise BadInput(f"tasks.{group}: the audit needs a head that begins with a weight for each feature")
    return name


def _randomise_weights(module: nn.Module, group: str, width: int, stream: NoiseStream) -> None:
    """Draws weights that let a gradient through every layer, but 0 for features that background units do not use."""
    first = _name_first_weight(module, group)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(0.1 * draw_normals(stream, tuple(parameter.shape))))
            if name == first:
                parameter[:, LIVE:width] = 0.0
                parameter[:, width:] *= 5.0


def _make_records(
    task: Task, head: nn.Module, trunk: str | None, features_RD: Tensor, unit_R: Tensor, *, stream: NoiseStream
) -> TaskRecords:
    count = int(unit_R[-1]) + 1
    labels_U = _draw_labels(task, head, count, stream)
    # Some background units lack a task's label; canaries have all, so that the joint clip is the one under test.
    missing_U = torch.from_numpy(stream.coins(count, 0.2)) & (torch.arange(count) < BACKGROUND)
    placed = spread_places(task, features_RD)
    return TaskRecords.of(placed, labels_U[unit_R], ~missing_U[unit_R], unit_R, count, trunk=trunk)


def _draw_labels(task: Task, head: nn.Module, count: int, stream: NoiseStream) -> Tensor:
    """Returns random labels of the task, of one unit each: those that random outputs of its head decode to.

    Canaries' labels have a slope where canaries begin: a kind may train on some labels only, and a number may be the
    one that the untrained head predicts.

    Args:
        task: the task.
        head: its head.
        count: number of units; the first are background units.
        stream: source of the outputs.

    Raises:
        RunFailed: no label has one.
    """
    with torch.no_grad():
        begin = head(spread_places(task, torch.zeros(1, next(iter(head.parameters())).shape[1])))
    labels: list[Tensor] = [task.codec.missing()] * count
    waiting, steepest = list(range(count)), 0.0
    for _ in range(_MOST_DRAWS):
        drawn = torch.from_numpy(draw_normals(stream, (len(waiting), *begin.shape[1:]))).float()
        for index, cells in zip(waiting, task.codec.decode(drawn), strict=True):
            label = read_label(task, cells)
            labels[index] = labels[index] if label is None else label
        outputs = begin.repeat(len(waiting), *(1 for _ in begin.shape[1:])).requires_grad_()
        losses = task.losses(outputs, torch.stack([labels[index] for index in waiting]))
        gradient = torch.autograd.grad(losses.sum(), outputs)[0]
        slopes = gradient.reshape(len(waiting), -1, begin.shape[-1]).sum(dim=1).norm(dim=1).tolist()
        steepest = max(steepest, *slopes)
        flat = [index for index, slope in zip(waiting, slopes, strict=True) if slope <= _LEAST_SLOPE * steepest]
        waiting = [index for index in flat if index >= BACKGROUND]
        if not waiting:
            return torch.stack(labels)
    raise RunFailed(f"audit: tasks of kind {task.kind} train on no label that was drawn; nothing can be measured")


def _compute_directions(planted: Planted, clip_norm: float) -> dict[str, Floats]:
    """Returns each canary's clipped gradient, by autograd on the sum: only canary i reaches its feature's weights."""
    canaries = planted.select_units(np.ones(planted.num_canaries, dtype=np.bool_), background=False)
    losses = []
    for name, task in planted.tasks.items():
        records = canaries.tasks[name]
        rows_RD = records.features_RD if records.trunk is None else planted.modules[records.trunk](records.features_RD)
        losses_R = task.losses(planted.modules[name](rows_RD), records.labels)
        losses.append(task.scale * (records.weight_R * losses_R).sum())
    weights = [
        dict(module.named_parameters())[_name_first_weight(module, name)] for name, module in planted.modules.items()
    ]
    gradients = torch.autograd.grad(torch.stack(losses).sum(), weights)
    raw = {
        name: gradient[:, LIVE : LIVE + planted.num_canaries].double().numpy()
        for name, gradient in zip(planted.modules, gradients, strict=True)
    }
    norm_M = np.sqrt(sum((gradient**2).sum(axis=0) for gradient in raw.values()))
    if not (norm_M > 10.0 * clip_norm).all():
        raise RunFailed("audit: a canary's gradient is too small to be clipped; nothing can be measured")
    return {name: gradient / norm_M for name, gradient in raw.items()}
