"""A head fitted to a few labelled records, tied to a head that others made.

    min over W of (mean loss of the records) + tie / 2 |W - t W_prior|^2

Each class counts the same, whatever the number of its records. `t` tempers a prior whose outputs are too large for the
records' losses to move it. The tie is s squares of a logit against twice the records' summed loss. With fewer than five
records of a class s is 1/8, and 1/2 where the prior is of names, which one record of each class is no match for. From
five on, s and whether the prior is of any use here are chosen by predicting each fifth of the records from the others;
s = 1/2 stays unless another is better by more than the standard error.

The result follows from records and the prior alone: it is computed at home without noise, and never leaves.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from client.data.units import TaskRecords
from client.personal.adapt import Tie, fit_head, scale_head
from common.tasks import Calibratable, LabelPrior, Task
from common.tasks.parts.adjusted import AdjustedHead
from common.types import BadInput

FEW = 5
"""Records of a class below which nothing is chosen by the records."""
STRENGTHS = (0.5, 0.125, 0.03125)
FEW_STRENGTH, USUAL_STRENGTH = 0.125, 0.5
SCALES = (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125)
_FOLDS = 5
_FACTORS = tuple(2.0 ** (exponent / 2.0) for exponent in range(-4, 13))
_TRIAL_TOLERANCE = 1e-4


@dataclass(frozen=True)
class FittedHead:
    """A head after a few records.

    Attributes:
        head: the head.
        tie: the tie that was chosen.
        temperature: number by which its outputs are divided before they become probabilities; None where none is known.
        fewest: number of records of the rarest class; of a task without classes, of all.
    """

    head: nn.Module = field(repr=False)
    tie: Tie
    temperature: float | None
    fewest: int

    def describe(self) -> str:
        """Returns how the head was made, in words."""
        if self.tie.scale == 0.0:
            return "fitted to the records alone: on them the prior was of no use"
        tempered = "" if self.tie.scale == 1.0 else f", its weights times {self.tie.scale:g}"
        return f"tied to the prior with strength {self.tie.strength:g}{tempered}"


def fit_to_shots(
    name: str,
    head: nn.Module,
    task: Task,
    records: TaskRecords,
    root_DD: Tensor | None = None,
    *,
    few_strength: float = FEW_STRENGTH,
) -> FittedHead:
    """Returns a head fitted to a few labelled records.

    Args:
        name: name of the task, for messages.
        head: the prior's head, or that of names; not modified.
        task: the task.
        records: labelled records, with the features that the head reads.
        root_DD: root of the covariance of rows around the prior's, of a linear head (`client.start.pooled`); None for
            the same in all directions.
        few_strength: strength of the tie with fewer than `FEW` records of a class.

    Raises:
        BadInput: the records are all of one class, or some class has none.
    """
    class_R = _list_classes(name, task, records)
    balanced = records if class_R is None else _balance(records, class_R)
    fewest = len(records.unit_R) if class_R is None else int(torch.bincount(class_R).min())
    prior = _open_trainable(head)
    if root_DD is not None:
        prior, balanced = _stretch(prior, balanced, root_DD)
    tie, temperature = Tie(1.0, few_strength), None
    if fewest >= FEW:
        tie, temperature = _choose_tie(prior, task, balanced, _deal_folds(records, class_R))
    start = scale_head(prior, tie.scale)
    fitted = fit_head(start, task, balanced, tie.compute_weight(start, balanced))
    if root_DD is not None:
        fitted = _shrink_back(head, fitted, root_DD)
    if isinstance(head, AdjustedHead) and isinstance(fitted, AdjustedHead) and head.offset_K is not None:
        fitted.fixed.offset.copy_(head.offset_K)
    return FittedHead(fitted, tie, temperature, fewest)


def _open_trainable(head: nn.Module) -> nn.Module:
    """Returns a copy that trains, for classes that are equally frequent."""
    prior = copy.deepcopy(head).requires_grad_(True)
    if isinstance(prior, AdjustedHead) and prior.offset_K is not None:
        prior.fixed.offset.zero_()
    return prior


def _stretch(prior: nn.Module, records: TaskRecords, root_DD: Tensor) -> tuple[nn.Module, TaskRecords]:
    """Returns a linear head and records in coordinates in which the covariance of rows is alike in all directions."""
    linear = prior.layers if isinstance(prior, AdjustedHead) else prior
    assert isinstance(linear, nn.Linear)
    read_RD = prior.adjust(records.features_RD) if isinstance(prior, AdjustedHead) else records.features_RD
    stretched = copy.deepcopy(linear)
    with torch.no_grad():
        stretched.weight.copy_(torch.linalg.solve(root_DD, linear.weight.double().T).T)
    return stretched, replace(records, features_RD=(read_RD.double() @ root_DD).float())


def _shrink_back(head: nn.Module, fitted: nn.Module, root_DD: Tensor) -> nn.Module:
    """Returns the prior's head with the weights of one that was fitted in stretched coordinates."""
    whole = _open_trainable(head)
    linear = whole.layers if isinstance(whole, AdjustedHead) else whole
    assert isinstance(linear, nn.Linear) and isinstance(fitted, nn.Linear)
    with torch.no_grad():
        linear.weight.copy_(fitted.weight.double() @ root_DD)
        if fitted.bias is not None:
            linear.bias.copy_(fitted.bias)
    return whole


def _list_classes(name: str, task: Task, records: TaskRecords) -> Tensor | None:
    """Returns the number of each record's class; None for tasks whose label is not one of several."""
    if not isinstance(task, LabelPrior):
        return None
    counts_RC = task.count_labels(records.labels)
    if not bool(((counts_RC == 0.0) | (counts_RC == 1.0)).all() and (counts_RC.sum(1) == 1.0).all()):
        return None
    absent = [index for index, count in enumerate(counts_RC.sum(0).tolist()) if count == 0.0]
    labels = getattr(task, "labels", [str(index) for index in range(task.num_counts)])
    if len(absent) == task.num_counts - 1:
        raise BadInput(f"task {name}: expected records of every label, got those of one label only")
    if absent:
        raise BadInput(f"task {name}: expected at least one record of every label, got none of {labels[absent[0]]!r}")
    return counts_RC.argmax(1)


def _balance(records: TaskRecords, class_R: Tensor) -> TaskRecords:
    """Returns the records with weights with which each class has the same sum."""
    sums_C = torch.zeros(int(class_R.max()) + 1).index_add_(0, class_R, records.weight_R)
    return replace(records, weight_R=records.weight_R / sums_C[class_R])


def _deal_folds(records: TaskRecords, class_R: Tensor | None) -> Tensor:
    """Returns the fold of each record: units of one class are dealt in turn, and a unit's records stay together."""
    units, unit_R = torch.unique(records.unit_R, return_inverse=True)
    if len(units) < _FOLDS:
        raise BadInput(f"expected records of at least {_FOLDS} patients, got those of {len(units)}")
    first_U = torch.zeros(len(units), dtype=torch.int64)
    if class_R is not None:
        first_U[unit_R] = class_R
    fold_U = torch.empty(len(units), dtype=torch.int64)
    fold_U[torch.sort(first_U, stable=True).indices] = torch.arange(len(units)) % _FOLDS
    return fold_U[unit_R]


def _choose_tie(prior: nn.Module, task: Task, records: TaskRecords, fold_R: Tensor) -> tuple[Tie, float]:
    """Returns the tie that predicts the folds best, and the temperature that its outputs need there.

    Compared are losses after the best factor on all outputs. Without it looser ties win wherever they are only more
    sure of themselves.
    """
    scale = min(SCALES, key=lambda each: float(_compute_losses(scale_head(prior, each), task, records).sum()))
    ties = [Tie(each, strength) for each in (scale, 0.0) for strength in STRENGTHS]
    found = {tie: _predict_folds(prior, task, records, fold_R, tie) for tie in ties}
    usual = Tie(scale, USUAL_STRENGTH)
    best = min(ties, key=lambda tie: float(found[tie][0].sum()))
    gain_R = found[usual][0] - found[best][0]
    error = math.sqrt(len(gain_R)) * float(gain_R.std())
    chosen = best if float(gain_R.sum()) > error else usual
    return chosen, found[chosen][1]


def _predict_folds(
    prior: nn.Module, task: Task, records: TaskRecords, fold_R: Tensor, tie: Tie
) -> tuple[Tensor, float]:
    """Returns the weighted loss of each record by the head that was fitted to the other folds, and its temperature."""
    start = scale_head(prior, tie.scale)
    parts = []
    for fold in range(_FOLDS):
        held_out, known = _select(records, fold_R == fold), _select(records, fold_R != fold)
        fitted = fit_head(start, task, known, tie.compute_weight(start, known), tolerance=_TRIAL_TOLERANCE)
        with torch.no_grad():
            parts.append(fitted(held_out.features_RD))
    outputs = torch.cat(parts)
    order_R = torch.cat([(fold_R == fold).nonzero().squeeze(1) for fold in range(_FOLDS)])
    same = records.taken(order_R, records.unit_R)
    factors = _FACTORS if isinstance(task, Calibratable) else (1.0,)
    losses = {each: (same.weight_R * task.losses(outputs * each, same.labels)).double() for each in factors}
    factor = min(factors, key=lambda each: float(losses[each].sum()))
    losses_R = torch.empty(len(order_R), dtype=torch.float64)
    losses_R[order_R] = losses[factor]
    return losses_R, 1.0 / factor


def _select(records: TaskRecords, chosen_R: Tensor) -> TaskRecords:
    return records.taken(chosen_R.nonzero().squeeze(1), records.unit_R)


def _compute_losses(head: nn.Module, task: Task, records: TaskRecords) -> Tensor:
    with torch.no_grad():
        losses_R: Tensor = task.losses(head(records.features_RD), records.labels)
    return (records.weight_R * losses_R).double()
