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
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, ClassVar, Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from client.data.units import Units
from client.solvers.parts import objective
from client.solvers.parts.closed_form import Inputs, check_affine, gradients_of
from client.solvers.parts.flat import Flat
from client.solvers.sgd import Sgd
from common.plugins import Plugin
from common.privacy.accounting import noise_multiplier
from common.privacy.clipping import clip_factors
from common.privacy.noise import NoiseStream, released
from common.run import PositiveInt, Privacy
from common.tasks import LossGradient, Task
from common.types import BadInput, Delta, Plan, Unit

Slopes = Callable[[Tensor, Inputs], Tensor]
"""A head's outputs and its records -> derivative of the weighted, scaled loss by the outputs."""

_LARGE_DRAW = 2**14
"""Values of a draw that is worth a thread of its own."""

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
        tasks: learning rate and decay of the heads of some tasks instead, by the task's name.
    """

    kind: Literal["dp_gd"]
    private: ClassVar[bool] = True
    sampling_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    steps: PositiveInt
    clip_norm: Annotated[float, Field(gt=0)]
    learning_rate: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    tasks: Mapping[str, objective.Rates] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _trains_no_trunk(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("trunk") is not None:
            raise ValueError(
                "trunk: expected none, because dp_gd trains no part of a backbone (`trainable`); kind dp_sgd does"
            )
        return values

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

    def without_privacy(self) -> Sgd:
        """Returns `sgd` with the same sampling, steps and rates, which neither clips nor adds noise."""
        return Sgd(
            kind="sgd",
            sampling_rate=self.sampling_rate,
            steps=self.steps,
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            tasks=self.tasks,
        )

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
        flat = Flat.of(heads)
        start = flat.vector()
        weights = start.clone()
        divisors = flat.per_value(objective.expected_units(plan, public_sizes))
        default = objective.Rates(learning_rate=self.learning_rate, weight_decay=self.weight_decay)
        rates = {name: self.tasks.get(name, default) for name in flat.heads}
        learning_rate = flat.per_value({name: own.learning_rate for name, own in rates.items()})
        weight_decay = flat.per_value({name: own.weight_decay for name, own in rates.items()})
        decays = any(own.weight_decay for own in rates.values())
        deviation = plan.noise_multiplier * plan.clip_norm
        velocity = torch.zeros_like(weights) if self.momentum else None
        usable = objective.usable(units)
        inputs = {
            name: Inputs.of(head, usable.tasks[name], usable.num_units, tasks[name].scale)
            for name, head in flat.heads.items()
        }
        chunk = _chunk(flat, inputs)
        slopes = {name: _slopes_of(tasks[name]) for name in flat.heads}
        total = torch.zeros_like(weights)
        parts, sums = flat.views(weights), flat.views(total)
        with torch.no_grad():
            for members, normals in _draws(usable, plan, stream, len(total)):
                total.zero_()
                for batch, size in _batches(inputs, usable.num_units, members, chunk):
                    _add_clipped(sums, parts, slopes, batch, size, clip_norm=plan.clip_norm)
                step = released(total, deviation, normals).div_(divisors).to(weights)
                # The update of torch.optim.SGD.
                if decays:
                    step.add_(weights * weight_decay)
                if velocity is not None:
                    step = velocity.mul_(self.momentum).add_(step)
                if isinstance(learning_rate, float):
                    weights.sub_(step, alpha=learning_rate)
                else:
                    weights.sub_(step * learning_rate)
        return objective.checked(flat.by_task(weights - start))


def _draws(units: Units, plan: Plan, stream: NoiseStream, size: int) -> Iterator[tuple[Tensor, NDArray[np.float64]]]:
    """Each step's sample and normals, in the stream's order; large ones are drawn while the step before is computed."""

    def draw() -> tuple[Tensor, NDArray[np.float64]]:
        return objective.participants(units, plan, stream), stream.gaussian((size,))

    if size < _LARGE_DRAW:
        for _ in range(plan.steps):
            yield draw()
        return
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(draw)
        for _ in range(plan.steps - 1):
            drawn, waiting = waiting.result(), thread.submit(draw)
            yield drawn
        yield waiting.result()


def _add_clipped(
    sums: Mapping[str, Sequence[Tensor]],
    weights: Mapping[str, Sequence[Tensor]],
    slopes: Mapping[str, Slopes],
    batch: Mapping[str, Inputs],
    num_units: int,
    *,
    clip_norm: float,
) -> None:
    """Add the jointly clipped gradients of a batch's units to the sums."""
    gradients = {
        name: gradients_of(inputs, slopes[name](inputs.outputs(weights[name]), inputs), num_units)
        for name, inputs in batch.items()
        if len(inputs.records.unit_R)
    }
    if gradients:
        factor_U = clip_factors(_joint([part.norm_U for part in gradients.values()]), clip_norm)
        for name, part in gradients.items():
            part.add_weighted(factor_U, sums[name])


def _joint(norms_U: Sequence[Tensor]) -> Tensor:
    """norm_U over all heads."""
    return norms_U[0] if len(norms_U) == 1 else torch.linalg.vector_norm(torch.stack(list(norms_U)), dim=0)


def _batches(
    inputs: Mapping[str, Inputs], num_units: int, members: Tensor, chunk: int
) -> Iterator[tuple[Mapping[str, Inputs], int]]:
    """The sample's records and number of units, in parts of at most so many."""
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


def _chunk(flat: Flat, inputs: Mapping[str, Inputs]) -> int:
    """Units whose gradients are held at once: formed gradients must fit into memory."""
    values = 0
    for name, one in inputs.items():
        if one.reach_R is None and len(one.records.unit_R):
            values += one.most_records * sum(parameter.numel() for parameter in flat.heads[name].parameters())
    return max(1, _CHUNK_VALUES // max(1, values))


def _slopes_of(task: Task) -> Slopes:
    """How a task's loss is differentiated: as it says itself, or by autograd, which knows any other loss."""

    stated_task = task if isinstance(task, LossGradient) else None

    def stated(outputs: Tensor, inputs: Inputs) -> Tensor:
        assert stated_task is not None
        slopes = stated_task.loss_gradient(outputs, inputs.records.labels)
        if inputs.factor_R is None:
            return slopes
        return slopes.mul_(inputs.factor_R.view(-1, *(1,) * (outputs.dim() - 1)))

    def found(outputs: Tensor, inputs: Inputs) -> Tensor:
        with torch.enable_grad():
            losses_R = task.losses(outputs.requires_grad_(), inputs.records.labels)
        factor_R = torch.ones_like(losses_R) if inputs.factor_R is None else inputs.factor_R
        delta: Tensor = torch.autograd.grad(losses_R, outputs, grad_outputs=factor_R)[0]
        return delta

    return found if stated_task is None else stated
