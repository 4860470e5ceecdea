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

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from client.solvers import _objective
from client.solvers._closed_form import Gradients, Inputs, check_affine, gradients_of
from client.units import Units
from common.config import PositiveInt, Privacy
from common.plugins import Plugin
from common.privacy.accounting import noise_multiplier
from common.privacy.clipping import clip_factors
from common.privacy.noise import NoiseStream
from common.tasks import Task
from common.types import BadInput, Delta, Plan, Unit

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
        check_affine(heads)
        copies = _objective.trainable_copies(heads)
        parameters = [parameter for head in copies.values() for parameter in head.parameters()]
        expected = _objective.expected_units(plan, public_sizes)
        divisors = [expected[name] for name, head in copies.items() for _ in head.parameters()]
        velocity = [torch.zeros_like(parameter) for parameter in parameters]
        usable = _objective.usable(units)
        inputs = {name: Inputs.of(copies[name], usable.tasks[name]) for name in copies}
        with torch.no_grad():
            for _ in range(plan.steps):
                members = _objective.participants(usable, plan, stream)
                sums = _clipped_sum(copies, tasks, inputs, usable.num_units, members, plan)
                _add_noise(sums, plan, stream)
                for value, total, divisor, speed in zip(parameters, sums, divisors, velocity, strict=True):
                    # The update of torch.optim.SGD. The divisor comes after the noise, so it costs nothing.
                    speed.mul_(self.momentum).add_(total / divisor + self.weight_decay * value)
                    value.sub_(speed, alpha=self.learning_rate)
        return _objective.difference(copies, heads)


def _clipped_sum(
    heads: Mapping[str, nn.Module],
    tasks: Mapping[str, Task],
    inputs: Mapping[str, Inputs],
    num_units: int,
    members: Tensor,
    plan: Plan,
) -> list[Tensor]:
    """Sum over the sample of all parameters' clipped gradients, in the parameters' order."""
    assert plan.clip_norm is not None
    sums = [torch.zeros_like(parameter) for head in heads.values() for parameter in head.parameters()]
    for batch, size in _batches(heads, inputs, num_units, members):
        gradients = {
            name: gradients_of(head, batch[name], _output_derivative(head, tasks[name], batch[name]), size)
            for name, head in heads.items()
            if len(batch[name].records.unit_R)
        }
        if not gradients:
            continue
        norm_U = torch.linalg.vector_norm(torch.stack([part.norm_U for part in gradients.values()]), dim=0)
        factor_U = clip_factors(norm_U, plan.clip_norm)
        sums = [total + part for total, part in zip(sums, _parts(heads, gradients, factor_U), strict=True)]
    return sums


def _parts(heads: Mapping[str, nn.Module], gradients: Mapping[str, Gradients], factor_U: Tensor) -> Iterator[Tensor]:
    for name, head in heads.items():
        if name in gradients:
            parts = gradients[name].weighted_sum(factor_U)
            yield from (part.view_as(p) for part, p in zip(parts, head.parameters(), strict=True))
        else:
            yield from (torch.zeros_like(parameter) for parameter in head.parameters())


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
            most_records = int(torch.bincount(one.records.unit_R).max())
            values += most_records * sum(parameter.numel() for parameter in heads[name].parameters())
    return max(1, _CHUNK_VALUES // max(1, values))


def _output_derivative(head: nn.Module, task: Task, inputs: Inputs) -> Tensor:
    """Derivative of the joint objective by a head's outputs: by autograd, so that any per-example loss will do."""
    records = inputs.records
    outputs = head(records.features_RD).requires_grad_()
    with torch.enable_grad():
        loss = task.scale * (records.weight_R * task.losses(outputs, records.labels)).sum()
        delta: Tensor = torch.autograd.grad(loss, outputs)[0]
    return delta


def _add_noise(sums: list[Tensor], plan: Plan, stream: NoiseStream) -> None:
    """Put the step's noise on the clipped sums, in place. One draw of the stream is one release."""
    assert plan.clip_norm is not None
    sizes = [total.numel() for total in sums]
    noise = torch.from_numpy(stream.gaussian((sum(sizes),))) * (plan.noise_multiplier * plan.clip_norm)
    for total, part in zip(sums, torch.split(noise, sizes), strict=True):
        # In double precision, so that the sum is rounded once.
        total.copy_(total.double() + part.to(total.device).view_as(total))
