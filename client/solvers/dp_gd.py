"""Differentially private gradient descent on linear heads with clipping in closed form: `dp_sgd` without its cost.

Per step: all units, or a Poisson sample of them; outputs and the derivative of the joint objective by them; each unit's
gradient norm over all heads from the two factors of its gradients; one clip; sum; Gaussian noise; divide by a constant;
gradient descent. Full batch is the default: of all sampling rates it has the least noise for its signal at a given
epsilon, and its accounting is exact.

Guarantee: as `dp_sgd`: with weights fixed, adding or removing one unit moves a step's sum over all heads by at most
`clip_norm` in L2, whatever its features and labels are and however many tasks and records it has; each of the plan's
`steps` sums, also of an empty sample, is released with noise of standard deviation noise_multiplier * clip_norm. From
the same stream both solvers release the same, to rounding.

Exact for one linear layer or 1x1 convolution and any per-example loss; refuses other heads. Coins and noise come from
the site's stream alone. Opacus is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from client.solvers import _objective
from client.solvers._closed_form import Inputs, check_affine, gradients_of
from client.units import Units
from common.config import PositiveInt, Privacy
from common.plugins import Plugin
from common.privacy.accounting import noise_multiplier
from common.privacy.clipping import clip_factors
from common.privacy.noise import NoiseStream
from common.tasks import Sloped, Task
from common.types import BadInput, Delta, Plan, Unit

Slopes = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Outputs, labels and records' weights -> derivative of the weighted, scaled loss by the outputs."""

_CHUNK_VALUES = 2**24
"""Gradient values of records with several positions held at once (64 MiB); larger samples are summed in parts."""


@final
class DpGd(Plugin):
    """Settings of private gradient descent. Nothing that affects privacy has a default but full batch.

    Attributes:
        sampling_rate: probability with which each unit takes part in a step; 1 is full batch.
        steps: noised steps in one round.
        clip_norm: bound on one unit's gradient over all heads.
        learning_rate: of the step on the noised mean gradient.
        momentum: of that step; costs no privacy.
        weight_decay: of that step; costs no privacy.
    """

    kind: Literal["dp_gd"]
    private: ClassVar[bool] = True
    sampling_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    steps: PositiveInt
    clip_norm: Annotated[float, Field(gt=0)]
    learning_rate: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0

    @classmethod
    def example(cls) -> dict[str, Any]:
        """Settings with every required key."""
        return {"kind": "dp_gd", "sampling_rate": 0.5, "steps": 3, "clip_norm": 1.0, "learning_rate": 0.5}

    def plan(self, privacy: Privacy | None, unit: Unit, rounds: int) -> Plan:
        """The public numbers of one of `rounds` equal rounds; the noise follows from the whole run's target.

        Raises:
            BadInput: no privacy is asked for.
        """
        if privacy is None:
            raise BadInput("solver.kind: dp_gd needs a `privacy` section, got non_private; kind sgd trains without")
        noise = privacy.noise_multiplier
        if noise is None:
            assert privacy.target_epsilon is not None  # Privacy holds exactly one of the two.
            noise = noise_multiplier(privacy.target_epsilon, privacy.delta, self.sampling_rate, rounds * self.steps)
        return Plan(self.sampling_rate, self.steps, self.clip_norm, noise, unit)

    def check_heads(self, heads: Mapping[str, nn.Module]) -> None:
        """Refuse heads the closed form is not exact for. Raises BadInput."""
        check_affine(heads)

    def solve(
        self,
        heads: Mapping[str, nn.Module],
        tasks: Mapping[str, Task],
        units: Units,
        *,
        plan: Plan,
        public_sizes: Mapping[str, int],
        stream: NoiseStream,
    ) -> Delta:
        """Train copies of the heads and return what changed. See `client.solvers.Solver.solve`.

        Raises:
            BadInput: a head is not affine.
            RunFailed: training diverged.
        """
        assert plan.clip_norm is not None  # A private plan has one.
        check_affine(heads)
        copies = _objective.trainable_copies(heads)
        weights = _flattened(copies)
        divisors = _divisors(copies, _objective.expected_units(plan, public_sizes))
        velocity = torch.zeros_like(weights) if self.momentum else None
        usable = _objective.usable(units)
        inputs = {name: Inputs.of(copies[name], usable.tasks[name], usable.num_units) for name in copies}
        shapes = {name: [parameter.shape for parameter in head.parameters()] for name, head in copies.items()}
        slopes = {name: _slopes_of(tasks[name]) for name in copies}
        with torch.no_grad():
            for _ in range(plan.steps):
                members = _objective.participants(usable, plan, stream)
                total = torch.zeros_like(weights)
                sums = _views(total, shapes)
                for batch, size in _batches(copies, inputs, usable.num_units, members):
                    _add_clipped(sums, copies, slopes, batch, size, clip_norm=plan.clip_norm)
                step = _noised(total, plan, stream).div_(divisors).to(weights)
                # The update of torch.optim.SGD.
                if self.weight_decay:
                    step.add_(weights, alpha=self.weight_decay)
                if velocity is not None:
                    step = velocity.mul_(self.momentum).add_(step)
                weights.sub_(step, alpha=self.learning_rate)
        return _objective.difference(copies, heads)


def _flattened(heads: Mapping[str, nn.Module]) -> Tensor:
    """All parameters side by side; those of the heads become views of it."""
    parameters = [parameter for head in heads.values() for parameter in head.parameters()]
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    for parameter, part in zip(
        parameters, torch.split(flat, [parameter.numel() for parameter in parameters]), strict=True
    ):
        parameter.data = part.view_as(parameter)
    return flat


def _divisors(heads: Mapping[str, nn.Module], expected: Mapping[str, float]) -> Tensor:
    """The declared number of units in a step, for each parameter."""
    sizes = {name: sum(parameter.numel() for parameter in head.parameters()) for name, head in heads.items()}
    device = next(next(iter(heads.values())).parameters()).device
    if len(set(expected.values())) == 1:
        return torch.tensor(next(iter(expected.values())), dtype=torch.double, device=device)
    return torch.cat([torch.full((size,), expected[name], dtype=torch.double) for name, size in sizes.items()]).to(
        device
    )


def _views(total: Tensor, shapes: Mapping[str, Sequence[torch.Size]]) -> dict[str, list[Tensor]]:
    """Head by head the parameters' parts of one vector, weights as matrices."""
    parts = iter(torch.split(total, [shape.numel() for own in shapes.values() for shape in own]))
    return {
        name: [next(parts).view(shape[0], -1) if len(shape) > 1 else next(parts) for shape in own]
        for name, own in shapes.items()
    }


def _add_clipped(
    sums: Mapping[str, Sequence[Tensor]],
    heads: Mapping[str, nn.Module],
    slopes: Mapping[str, Slopes],
    batch: Mapping[str, Inputs],
    num_units: int,
    *,
    clip_norm: float,
) -> None:
    """Add the jointly clipped gradients of a batch's units to the sums."""
    gradients = {
        name: gradients_of(head, batch[name], _output_derivative(head, slopes[name], batch[name]), num_units)
        for name, head in heads.items()
        if len(batch[name].records.unit_R)
    }
    if gradients:
        factor_U = clip_factors(_joint([part.norm_U for part in gradients.values()]), clip_norm)
        for name, part in gradients.items():
            part.add_weighted(factor_U, sums[name])


def _joint(norms_U: Sequence[Tensor]) -> Tensor:
    """norm_U over all heads."""
    return norms_U[0] if len(norms_U) == 1 else torch.linalg.vector_norm(torch.stack(list(norms_U)), dim=0)


def _noised(total: Tensor, plan: Plan, stream: NoiseStream) -> Tensor:
    """The sum with the step's noise, in double precision. One draw of the stream is one release."""
    assert plan.clip_norm is not None
    noise = torch.from_numpy(stream.gaussian((len(total),))).to(total.device)
    return noise.mul_(plan.noise_multiplier * plan.clip_norm).add_(total)


def _batches(
    heads: Mapping[str, nn.Module], inputs: Mapping[str, Inputs], num_units: int, members: Tensor
) -> Iterator[tuple[Mapping[str, Inputs], int]]:
    """The sample's records and number of units, in parts where formed gradients would not fit into memory."""
    chunk = _chunk(heads, inputs)
    if len(members) == num_units <= chunk:
        yield inputs, num_units
        return
    for part in torch.split(members, chunk):
        position_U = torch.full((num_units,), -1)
        position_U[part] = torch.arange(len(part))
        yield (
            {name: one.of_units(position_U.to(one.records.unit_R.device)) for name, one in inputs.items()},
            len(part),
        )


def _chunk(heads: Mapping[str, nn.Module], inputs: Mapping[str, Inputs]) -> int:
    """Units whose gradients are held at once."""
    values = 0
    for name, one in inputs.items():
        if one.square_R is None and len(one.records.unit_R):
            values += one.most_records * sum(parameter.numel() for parameter in heads[name].parameters())
    return max(1, _CHUNK_VALUES // max(1, values))


def _output_derivative(head: nn.Module, slopes: Slopes, inputs: Inputs) -> Tensor:
    """Derivative of the joint objective by a head's outputs."""
    records = inputs.records
    return slopes(head(records.features_RD), records.labels, records.weight_R)


def _slopes_of(task: Task) -> Slopes:
    """How a task's loss is differentiated: as it says itself, or by autograd, which knows any other loss."""

    sloped = task if isinstance(task, Sloped) else None

    def stated(outputs: Tensor, labels: Tensor, weight_R: Tensor) -> Tensor:
        assert sloped is not None
        factor_R = weight_R if task.scale == 1.0 else weight_R * task.scale
        return sloped.slopes(outputs, labels).mul_(factor_R.view(-1, *(1,) * (outputs.dim() - 1)))

    def found(outputs: Tensor, labels: Tensor, weight_R: Tensor) -> Tensor:
        with torch.enable_grad():
            losses_R = task.losses(outputs.requires_grad_(), labels)
        delta: Tensor = torch.autograd.grad(losses_R, outputs, grad_outputs=weight_R * task.scale)[0]
        return delta

    return found if sloped is None else stated
