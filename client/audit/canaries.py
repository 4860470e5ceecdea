"""Synthetic records that an audit plants, and the streams it listens with. No real record is ever involved.

Features are LIVE ones, then one for each canary, then FREE ones. Background records use the live features only; canary
i is `size` in feature LIVE + i and 0 elsewhere, with a random label for every task; no record touches a free feature.
So canaries' gradients are orthogonal but for a bias, which a large `size` makes negligible, and each is clipped.

Where a part of a backbone trains, a small stand-in trunk lies below the heads. It hands the features on, and beside
them what its own layer makes of them: so a canary has a feature, and a gradient, in the heads and in the trunk too.

# Shapes: B background units, M canaries, W_e rows of the first weight of entry e, a head or a trunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from client.audit.statistics import Bools, Floats
from client.data.units import TaskRecords, Units
from common.model.parameters import initial_heads
from common.model.trunks import stand_in
from common.privacy.noise import KEY_BYTES, NoiseStream
from common.tasks import Task
from common.types import BadInput, Delta, RunFailed, Unit

LIVE, FREE, BACKGROUND = 8, 32, 20

ADDED = 4
"""Outputs of a stand-in trunk's layer, large enough that heads' and trunk's gradients are of one size."""


@final
class ProbeStream(NoiseStream):
    """Every coin says yes and the noise is one known number: what remains is how a solver responds.

    Attributes:
        drawn: how many noise values were asked for.
    """

    def __init__(self, noise: float) -> None:
        NoiseStream.__init__(self, bytes(KEY_BYTES))
        self._noise = noise
        self.drawn = 0

    def coins(self, count: int, probability: float) -> Bools:
        """All true."""
        del probability
        return np.ones(count, dtype=np.bool_)

    def gaussian(self, shape: tuple[int, ...]) -> Floats:
        """The known number everywhere."""
        self.drawn += int(np.prod(shape))
        return np.full(shape, self._noise)


@final
class SilentStream(NoiseStream):
    """Real coins and no noise: shows who took part."""

    def gaussian(self, shape: tuple[int, ...]) -> Floats:
        """Zeros."""
        return np.zeros(shape)


@dataclass(frozen=True)
class Planted:
    """Canaries, background records and heads for one audit.

    Attributes:
        tasks: the run's tasks.
        heads: and trunks, with random weights, zero for all features but the live ones.
        direction: entry -> W_e x M: each canary's gradient in its own feature; over all entries its norm is 1.
        everyone: background units, then canaries.
    """

    tasks: Mapping[str, Task]
    heads: Mapping[str, nn.Module]
    direction: Mapping[str, Floats]
    everyone: Units

    @property
    def num_canaries(self) -> int:
        """M."""
        return self.everyone.num_units - BACKGROUND

    def units(self, canary_M: Bools, *, background: bool, scale: float = 1.0) -> Units:
        """A site that holds some of the canaries, their features multiplied by `scale`."""
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

    def canaries_in(self, delta: Delta, entry: str) -> Floats:
        """W_e x M: what a release did to the weights of the canaries' features."""
        return self._columns(delta, entry)[:, LIVE : LIVE + self.num_canaries]

    def free_in(self, delta: Delta, entry: str) -> Floats:
        """W_e x FREE: what it did where no record reaches."""
        start = LIVE + self.num_canaries
        return self._columns(delta, entry)[:, start : start + FREE]

    def rows(self) -> dict[str, int]:
        """Entry -> W_e."""
        return {name: len(direction) for name, direction in self.direction.items()}

    def num_weights(self) -> int:
        """Trainable parameters of all heads and trunks."""
        return sum(part.numel() for head in self.heads.values() for part in head.parameters() if part.requires_grad)

    def _columns(self, delta: Delta, entry: str) -> Floats:
        return delta.heads[entry][_first_weight(self.heads[entry], entry)].astype(np.float64)


def plant(
    tasks: Mapping[str, Task],
    trunks: Mapping[str, str],
    *,
    unit: Unit,
    clip_norm: float,
    num_canaries: int,
    stream: NoiseStream,
) -> Planted:
    """Synthetic records and heads, all from the stream.

    Args:
        tasks: task -> its definition.
        trunks: task -> the trunk its records pass, of those that pass one.
        unit: patients have two records each, examples one.
        clip_norm: canaries are made large enough that it binds.
        num_canaries: M.
        stream: where labels, features and weights come from.

    Raises:
        BadInput: a head has no weight for each feature, so that the audit cannot tell canaries apart.
    """
    width = LIVE + num_canaries + FREE
    dims = {name: width + ADDED if name in trunks else width for name in tasks}
    heads = {
        **initial_heads(tasks, dims, seed=0),
        **{name: stand_in(width, ADDED) for name in sorted(set(trunks.values()))},
    }
    for name, head in sorted(heads.items()):
        _randomise(head, name, width, stream)
    size = 1e4 * max(1.0, clip_norm) / min(1.0, *(task.scale for task in tasks.values()))
    features_UD = torch.zeros(BACKGROUND + num_canaries, width)
    features_UD[:BACKGROUND, :LIVE] = torch.from_numpy(stream.gaussian((BACKGROUND, LIVE))).float()
    features_UD[BACKGROUND:, LIVE : LIVE + num_canaries] = size * torch.eye(num_canaries)
    everyone = _units(tasks, trunks, heads, features_UD, 2 if unit is Unit.PATIENT else 1, stream)
    planted = Planted(tasks, heads, {}, everyone)
    return replace(planted, direction=_directions(planted, clip_norm))


def _first_weight(head: nn.Module, task: str) -> str:
    name, weight = next(iter(head.named_parameters()))
    if weight.dim() != 2 or weight.shape[1] < LIVE + FREE:
        raise BadInput(f"tasks.{task}: the audit needs a head that begins with a weight for each feature")
    return name


def _randomise(head: nn.Module, entry: str, width: int, stream: NoiseStream) -> None:
    """Weights that let a gradient through every layer, but 0 for features that background records do not use."""
    first = _first_weight(head, entry)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.copy_(torch.from_numpy(0.1 * stream.gaussian(tuple(parameter.shape))))
            if name == first:
                parameter[:, LIVE:width] = 0.0
                parameter[:, width:] *= 5.0


def _units(
    tasks: Mapping[str, Task],
    trunks: Mapping[str, str],
    heads: Mapping[str, nn.Module],
    features_UD: Tensor,
    records: int,
    stream: NoiseStream,
) -> Units:
    count = len(features_UD)
    unit_R = torch.arange(count).repeat_interleave(records)
    features_RD = features_UD[unit_R]
    made = {}
    for name, task in tasks.items():
        labels_U = torch.stack([_random_label(task, heads[name], stream) for _ in range(count)])
        # Some background units lack a task's label; canaries have all, so that the joint clip is the one under test.
        missing_U = torch.from_numpy(stream.coins(count, 0.2)) & (torch.arange(count) < BACKGROUND)
        made[name] = TaskRecords.of(
            features_RD, labels_U[unit_R], ~missing_U[unit_R], unit_R, count, trunk=trunks.get(name)
        )
    return Units(count, made)


def _random_label(task: Task, head: nn.Module, stream: NoiseStream) -> Tensor:
    """Returns a label of the task: a random prediction."""
    width = next(reversed(list(head.parameters()))).shape[0]
    outputs = torch.from_numpy(stream.gaussian((1, width))).float()
    return task.codec.encode(task.codec.decode(outputs)[0])


def _directions(planted: Planted, clip_norm: float) -> dict[str, Floats]:
    """Each canary's clipped gradient, by autograd on the sum: only canary i reaches the weights of its feature."""
    canaries = planted.units(np.ones(planted.num_canaries, dtype=np.bool_), background=False)
    losses = []
    for name, task in planted.tasks.items():
        records = canaries.tasks[name]
        rows_RD = records.features_RD if records.trunk is None else planted.heads[records.trunk](records.features_RD)
        losses_R = task.losses(planted.heads[name](rows_RD), records.labels)
        losses.append(task.scale * (records.weight_R * losses_R).sum())
    weights = [dict(head.named_parameters())[_first_weight(head, name)] for name, head in planted.heads.items()]
    gradients = torch.autograd.grad(torch.stack(losses).sum(), weights)
    raw = {
        name: gradient[:, LIVE : LIVE + planted.num_canaries].double().numpy()
        for name, gradient in zip(planted.heads, gradients, strict=True)
    }
    norm_M = np.sqrt(sum((gradient**2).sum(axis=0) for gradient in raw.values()))
    if not (norm_M > 10.0 * clip_norm).all():
        raise RunFailed("audit: a canary's gradient is too small to be clipped; nothing can be measured")
    return {name: gradient / norm_M for name, gradient in raw.items()}
