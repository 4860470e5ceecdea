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
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from client.solvers import Rates
from client.solvers.sgd import Sgd
from common.plugins import Plugin
from common.privacy.accounting import calibrate_noise_multiplier
from common.run import PositiveInt, Privacy
from common.tasks import LossGradient, Task
from common.types import BadInput, Delta, Plan, Unit

if TYPE_CHECKING:
    from torch import Tensor, nn

    from client.data.units import Units
    from client.solvers.parts.closed_form import Inputs
    from client.solvers.parts.flat import Flat
    from common.privacy.noise import NoiseStream

    OutputGradient = Callable[[Tensor, Inputs], Tensor]
    """A head's outputs and its records -> gradient of the weighted, scaled loss by the outputs, in their shape."""

_LARGE_DRAW = 2**14
"""Number of values from which on a draw is worth a thread of its own."""

_CHUNK_VALUES = 2**24
"""Gradient values of records with several positions held at once (64 MiB); larger samples are summed in parts."""


@final
class DpGd(Plugin):
    """Settings of private gradient descent. Nothing that affects privacy has a default but full batch.

    Attributes:
        sampling_rate: probability with which each unit takes part in a step; 1 is full batch.
        steps: noised steps in one round.
        clip_norm: bound on one unit's gradient over all heads.
        learning_rate: learning rate of the step on the noised mean gradient.
        momentum: momentum of that step; costs no privacy.
        weight_decay: weight decay of that step; costs no privacy.
        tasks: task -> learning rate and weight decay of its head, in place of those above.
    """

    kind: Literal["dp_gd"]
    private: ClassVar[bool] = True
    sampling_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    steps: PositiveInt
    clip_norm: Annotated[float, Field(gt=0)]
    learning_rate: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    tasks: Mapping[str, Rates] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _refuse_trunk_rates(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("trunk") is not None:
            raise ValueError(
                "trunk: expected none, because dp_gd trains no part of a backbone (`trainable`); kind dp_sgd does"
            )
        return values

    @classmethod
    def example(cls) -> dict[str, Any]:
        """Returns settings with every required key."""
        return {"kind": "dp_gd", "sampling_rate": 0.5, "steps": 3, "clip_norm": 1.0, "learning_rate": 0.5}

    def plan(self, privacy: Privacy | None, unit: Unit, rounds: int) -> Plan:
        """Returns the public numbers of one round; the noise follows from the target of the whole run.

        Args:
            privacy: the requested privacy of the whole run.
            unit: the unit that the site's budget protects.
            rounds: the number of equal rounds over which the requested privacy is spent.

        Raises:
            BadInput: no privacy is asked for.
        """
        if privacy is None:
            raise BadInput("solver.kind: dp_gd needs a `privacy` section, got non_private; kind sgd trains without")
        noise = privacy.noise_multiplier
        if noise is None:
            assert privacy.target_epsilon is not None  # Privacy holds exactly one of the two.
            noise = calibrate_noise_multiplier(
                privacy.target_epsilon, privacy.delta, self.sampling_rate, rounds * self.steps
            )
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

    def check_modules(self, modules: Mapping[str, nn.Module]) -> None:
        """Raises BadInput for heads and trunks for which the closed form is not exact."""
        from client.solvers.parts.closed_form import check_affine  # Here: a site that only plans needs no torch.

        check_affine(modules)

    def solve(
        self,
        modules: Mapping[str, nn.Module],
        tasks: Mapping[str, Task],
        units: Units,
        *,
        plan: Plan,
        public_sizes: Mapping[str, int],
        stream: NoiseStream,
    ) -> Delta:
        """Trains copies of the modules and returns the change of their parameters. See `client.solvers.Solver.solve`.

        Raises:
            BadInput: a head is not affine.
            RunFailed: training diverged.
        """
        import torch  # Here: a site that only plans needs no torch.

        from client.solvers.parts import objective
        from client.solvers.parts.closed_form import Inputs, check_affine
        from client.solvers.parts.flat import Flat
        from common.privacy.noise import release

        assert plan.clip_norm is not None  # A private plan has one.
        check_affine(modules)
        flat = Flat.from_heads(modules)
        start = flat.copy_parameters()
        weights = start.clone()
        divisors = flat.expand(objective.compute_divisors(plan, public_sizes))
        default = Rates(learning_rate=self.learning_rate, weight_decay=self.weight_decay)
        rates = {name: self.tasks.get(name, default) for name in flat.heads}
        learning_rate = flat.expand({name: group.learning_rate for name, group in rates.items()})
        weight_decay = flat.expand({name: group.weight_decay for name, group in rates.items()})
        decays = any(group.weight_decay for group in rates.values())
        deviation = plan.noise_multiplier * plan.clip_norm
        velocity = torch.zeros_like(weights) if self.momentum else None
        usable = objective.select_usable(units)
        inputs = {
            name: Inputs.from_records(head, usable.tasks[name], usable.num_units, tasks[name].scale)
            for name, head in flat.heads.items()
        }
        chunk = _count_units_per_batch(flat, inputs)
        output_gradients = {name: _get_output_gradient(tasks[name]) for name in flat.heads}
        total = torch.zeros_like(weights)
        parts, sums = flat.views(weights), flat.views(total)
        with torch.no_grad():
            for members, normals in _draw_steps(usable, plan, stream, len(total)):
                total.zero_()
                for batch, size in _split_sample(inputs, usable.num_units, members, chunk):
                    _add_clipped(sums, parts, output_gradients, batch, size, clip_norm=plan.clip_norm)
                step = release(total, deviation, normals).div_(divisors).to(weights)
                # The update of torch.optim.SGD.
                if decays:
                    step.add_(weights * weight_decay)
                if velocity is not None:
                    step = velocity.mul_(self.momentum).add_(step)
                if isinstance(learning_rate, float):
                    weights.sub_(step, alpha=learning_rate)
                else:
                    weights.sub_(step * learning_rate)
        return objective.check_update(flat.split_by_task(weights - start))


def _draw_steps(
    units: Units, plan: Plan, stream: NoiseStream, size: int
) -> Iterator[tuple[Tensor, NDArray[np.float64]]]:
    """Yields each step's sample and `size` normals, in the stream's order.

    Many normals are drawn while the step before is computed.
    """
    from client.solvers.parts import objective

    def draw() -> tuple[Tensor, NDArray[np.float64]]:
        return objective.draw_participants(units, plan, stream), stream.gaussian((size,))

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
    output_gradients: Mapping[str, OutputGradient],
    batch: Mapping[str, Inputs],
    num_units: int,
    *,
    clip_norm: float,
) -> None:
    """Adds the jointly clipped gradients of a batch's units to the sums.

    Args:
        sums: task -> one sum for each parameter of the head, as `Flat.views` lays them out; added to in place.
        weights: task -> the head's parameters in the same layout.
        output_gradients: task -> gradient of its loss by the head's outputs.
        batch: task -> its records in the batch.
        num_units: number of units in the batch.
        clip_norm: bound on a unit's gradient over all heads.
    """
    import torch

    from client.solvers.parts.closed_form import compute_gradients
    from common.privacy.clipping import compute_clip_factors

    gradients = {
        name: compute_gradients(
            inputs, output_gradients[name](inputs.compute_outputs(weights[name]), inputs), num_units
        )
        for name, inputs in batch.items()
        if len(inputs.records.unit_R)
    }
    if gradients:
        norms_U = [part.norm_U for part in gradients.values()]
        norm_U = norms_U[0] if len(norms_U) == 1 else torch.linalg.vector_norm(torch.stack(norms_U), dim=0)
        factor_U = compute_clip_factors(norm_U, clip_norm)
        for name, part in gradients.items():
            part.add_weighted(factor_U, sums[name])


def _split_sample(
    inputs: Mapping[str, Inputs], num_units: int, members: Tensor, chunk: int
) -> Iterator[tuple[Mapping[str, Inputs], int]]:
    """Yields the records of the sampled units and their number, in parts of at most `chunk` units."""
    import torch

    if len(members) == num_units <= chunk:
        yield inputs, num_units
        return
    for part in torch.split(members, chunk):
        position_U = torch.full((num_units,), -1)
        position_U[part] = torch.arange(len(part))
        yield (
            {name: one.select_units(position_U.to(one.records.unit_R.device)) for name, one in inputs.items()},
            len(part),
        )


def _count_units_per_batch(flat: Flat, inputs: Mapping[str, Inputs]) -> int:
    """Returns the number of units whose gradients are held at once: formed gradients must fit into memory."""
    values = 0
    for name, one in inputs.items():
        if one.reach_R is None and len(one.records.unit_R):
            values += one.most_records * sum(parameter.numel() for parameter in flat.heads[name].parameters())
    return max(1, _CHUNK_VALUES // max(1, values))


def _get_output_gradient(task: Task) -> OutputGradient:
    """Returns the gradient that the task states in closed form, or that of autograd, which works for any loss."""
    if not isinstance(task, LossGradient):
        return partial(_differentiate_losses, task)
    loss_gradient = task.loss_gradient

    def compute(outputs: Tensor, inputs: Inputs) -> Tensor:
        gradient = loss_gradient(outputs, inputs.records.labels)
        if inputs.factor_R is None:
            return gradient
        return gradient.mul_(inputs.factor_R.view(-1, *(1,) * (outputs.dim() - 1)))

    return compute


def _differentiate_losses(task: Task, outputs: Tensor, inputs: Inputs) -> Tensor:
    import torch

    with torch.enable_grad():
        losses_R = task.losses(outputs.requires_grad_(), inputs.records.labels)
    factor_R = torch.ones_like(losses_R) if inputs.factor_R is None else inputs.factor_R
    gradient: Tensor = torch.autograd.grad(losses_R, outputs, grad_outputs=factor_R)[0]
    return gradient
