"""Heads that a site adapts to itself after the last round. They are computed from its records without noise.

`prior`: an offset of each output, for tasks with label frequencies (`LabelPrior`): the offsets minimise the summed loss
of the site's training units, plus half a unit of each label whose outputs are the offsets alone. Of a head that tells
nothing they are the logarithms of the site's own counts + 1/2; of one that already knows how frequent the labels are,
or whose outputs are too large because of their noise, they are what is missing. Weights and trunk stay as they are.

`fit`: after that, min over W of the mean loss of the site's units + tie / 2 |W - W_federated|^2, with the offsets as
they are. For a linear head and a convex loss that has one solution, which is found to the tolerance below; other heads
end where the descent from the federated head ends. Either way the result follows from records and heads alone.

The tie's weight, and whether it is to the federated head or, where noise has left nothing of that, to zero, follow from
the site's own units: each fifth of them is predicted by heads fitted to the others.

# Shapes: R records, K outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from client.data.units import TaskRecords, Units
from common.process.threads import one_thread
from common.tasks import LabelPrior, Task

_MAX_STEPS = 500
_TOLERANCE = 1e-8
"""Largest entry of the objective's gradient at which the solver stops; its Hessian is the tie at least."""
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRIAL_TOLERANCE = 1e-4
"""Largest entry of the gradient at which a fit ends whose heads are only compared, to choose the tie."""
_FOLDS = 5


class OwnHead(nn.Module):
    """A head whose outputs are shifted by offsets of the site's own."""

    offset_K: Tensor

    def __init__(self, head: nn.Module, offset_K: Tensor) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("offset_K", offset_K)

    def forward(self, features: Tensor) -> Tensor:
        """Returns the head's outputs plus the offsets."""
        outputs: Tensor = self.head(features) + self.offset_K
        return outputs


def adapt_heads(
    mode: Literal["prior", "fit"], modules: Mapping[str, nn.Module], tasks: Mapping[str, Task], units: Units
) -> dict[str, nn.Module]:
    """Returns each task's head as the site adapted it; the federated one where it has no label.

    Args:
        mode: what is adapted.
        modules: task -> its federated head; not modified.
        tasks: task -> its definition.
        units: the site's training units, with the features that the heads read (`Units.passed`).
    """
    return {name: _adapt(mode, modules[name], task, units.tasks[name].labelled()) for name, task in tasks.items()}


@dataclass(frozen=True)
class Tie:
    """The head that a fit is tied to, and how strongly.

    Attributes:
        scale: factor on the federated weights: 1, or 0 for none of them.
        strength: squares of a logit that stand against twice the units' summed loss.
    """

    scale: float
    strength: float

    def compute_weight(self, head: nn.Module, records: TaskRecords) -> float:
        """Returns the weight of the distance beside the mean loss: strength * mean |x|^2 / units.

        Its effect does not depend on the number of units or on the unit of the features. With x as the head's first
        layer reads it.

        Args:
            head: the head.
            records: the site's labelled training records.
        """
        weight_R = records.weight_R.double()
        square_R = _read_features(head, records.features_RD).flatten(1).double().square().sum(1)
        num_units = len(torch.unique(records.unit_R))
        return self.strength * float((weight_R * square_R).sum() / weight_R.sum()) / num_units


_TIES = tuple(Tie(scale, strength) for scale in (1.0, 0.0) for strength in (0.5, 0.125, 2.0))
"""The first is for sites with too few units to try others; how it was found stands in docs/personal.md."""


def choose_tie(head: nn.Module, task: Task, records: TaskRecords) -> Tie:
    """Returns the tie whose heads predict each fifth of the site's units best, fitted to the other units.

    Args:
        head: the federated head.
        task: the task.
        records: the site's labelled training records, with the features that the head reads.
    """
    return try_ties(head, task, records)[0]


def try_ties(head: nn.Module, task: Task, records: TaskRecords) -> tuple[Tie, Tensor | None]:
    """Returns what `choose_tie` does, and the outputs of its heads for each fifth, fitted to the other units.

    Args:
        head: the federated head.
        task: the task.
        records: the site's labelled training records, with the features that the head reads.

    Returns:
        The tie, and outputs_RK; None in their place where there are too few units to try.
    """
    units, unit_R = torch.unique(records.unit_R, return_inverse=True)
    if len(units) < 2 * _FOLDS:
        return _TIES[0], None
    losses = dict.fromkeys(_TIES, 0.0)
    outputs: dict[Tie, Tensor] = {}
    for fold in range(_FOLDS):
        held_out_R = unit_R % _FOLDS == fold
        known = records.taken((~held_out_R).nonzero().squeeze(1), records.unit_R)
        tried = records.taken(held_out_R.nonzero().squeeze(1), records.unit_R)
        for scale in dict.fromkeys(tie.scale for tie in _TIES):
            own = fit_offsets(scale_head(head, scale), task, known)
            for tie in (tie for tie in _TIES if tie.scale == scale):
                fitted = fit_head(own, task, known, tie.compute_weight(own, known), tolerance=_TRIAL_TOLERANCE)
                with torch.no_grad():
                    tried_RK = fitted(tried.features_RD)
                    losses_R = task.losses(tried_RK, tried.labels)
                losses[tie] += float((tried.weight_R * losses_R).double().sum())
                whole_RK = outputs.setdefault(tie, tried_RK.new_zeros(len(unit_R), *tried_RK.shape[1:]))
                whole_RK[held_out_R] = tried_RK
    chosen = min(losses, key=losses.__getitem__)
    return chosen, outputs[chosen]


def scale_head(head: nn.Module, scale: float) -> nn.Module:
    """Returns a copy of a head whose trainable weights are multiplied by a factor."""
    scaled = copy.deepcopy(head)
    with torch.no_grad():
        for each in scaled.parameters():
            if each.requires_grad:
                each.mul_(scale)
    return scaled


def _read_features(head: nn.Module, features_RD: Tensor) -> Tensor:
    """Returns what a head's first layer with weights reads: a head may centre and normalise before it."""
    read: list[Tensor] = []
    layer = next((each for each in head.modules() if isinstance(each, _LAYERS)), head)
    hook = layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    try:
        with torch.no_grad():
            head(features_RD)
    finally:
        hook.remove()
    return read[0]


def fit_offsets(head: nn.Module, task: Task, records: TaskRecords) -> nn.Module:
    """Returns the head with the offsets that the site's own label frequencies need; none where the task has none.

    Args:
        head: the federated head; not modified.
        task: the task.
        records: the site's labelled training records, with the features that the head reads.
    """
    with torch.no_grad():
        outputs_RK = copy.deepcopy(head).double()(records.features_RD.double())
    offset_K = outputs_RK.new_zeros(outputs_RK.shape[1:], requires_grad=True)
    if isinstance(task, LabelPrior):
        balanced = task.balanced_labels()
        weight_R = records.weight_R.double()

        def compute_objective() -> Tensor:
            own = (weight_R * task.losses(outputs_RK + offset_K, records.labels)).sum()
            equal = task.losses(offset_K.expand(len(balanced), -1), balanced).sum() / 2
            return (own + equal) / weight_R.sum()

        _minimise(compute_objective, [offset_K], _TOLERANCE)
    return OwnHead(copy.deepcopy(head), offset_K.detach().float())


def fit_head(
    head: nn.Module, task: Task, records: TaskRecords, tie: float, *, tolerance: float = _TOLERANCE
) -> nn.Module:
    """Returns the head that minimises the records' mean loss + tie / 2 times the squared distance from this one.

    Args:
        head: the federated head, with the site's own offsets where it has any; not modified.
        task: the task.
        records: the site's labelled training records, with the features that the head reads.
        tie: weight of the distance.
        tolerance: largest entry of the gradient at which the fit ends.
    """
    fitted = copy.deepcopy(head).double()
    weights = [each for each in fitted.parameters() if each.requires_grad]
    federated = [each.detach().clone() for each in weights]
    features_RD, weight_R = records.features_RD.double(), records.weight_R.double()

    def compute_objective() -> Tensor:
        losses_R = task.losses(fitted(features_RD), records.labels)
        distance = torch.stack([(each - at).square().sum() for each, at in zip(weights, federated, strict=True)]).sum()
        return (weight_R * losses_R).sum() / weight_R.sum() + tie / 2 * distance

    _minimise(compute_objective, weights, tolerance)
    return fitted.float()


def _minimise(compute_objective: Callable[[], Tensor], values: Sequence[Tensor], tolerance: float) -> None:
    """Changes values in place until the objective's gradient is next to nothing."""
    solver = torch.optim.LBFGS(
        values,
        max_iter=_MAX_STEPS,
        max_eval=2 * _MAX_STEPS,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def compute_and_differentiate() -> Tensor:
        solver.zero_grad()
        objective = compute_objective()
        objective.backward()  # type: ignore[no-untyped-call]
        return objective

    # The caller may have switched gradients off.
    with torch.enable_grad(), one_thread():
        solver.step(compute_and_differentiate)  # type: ignore[no-untyped-call]


def _adapt(mode: Literal["prior", "fit"], head: nn.Module, task: Task, records: TaskRecords) -> nn.Module:
    if len(records.unit_R) == 0:
        return head
    if mode == "prior":
        return fit_offsets(head, task, records)
    return fit_tied(head, task, records, choose_tie(head, task, records))


def fit_tied(head: nn.Module, task: Task, records: TaskRecords, tie: Tie) -> nn.Module:
    """Returns the head with offsets of the site's own and weights fitted to its records, under a tie.

    Args:
        head: the federated head; not modified.
        task: the task.
        records: the site's labelled training records, with the features that the head reads.
        tie: the tie.
    """
    own = fit_offsets(scale_head(head, tie.scale), task, records)
    return fit_head(own, task, records, tie.compute_weight(own, records))
