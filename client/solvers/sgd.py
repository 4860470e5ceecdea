"""Plain SGD on the same objective as `dp_sgd`: no clipping, no noise, no promise. For baselines.

A deployed site declines it unless its own file allows it; its ledger then shows an infinite epsilon.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, final

from pydantic import Field

from common.plugins import Plugin
from common.run import PositiveInt, Privacy, Rates, TrunkRates
from common.tasks import Task
from common.types import BadInput, Delta, Plan, Unit

if TYPE_CHECKING:
    from torch import nn

    from client.data.units import Units
    from common.privacy.noise import NoiseStream


@final
class Sgd(Plugin):
    """Settings of SGD without privacy.

    Attributes:
        sampling_rate: probability with which each unit takes part in a step; 1 is full batch.
        steps: steps in one round.
        learning_rate: learning rate of the step on the mean gradient.
        momentum: momentum of that step.
        weight_decay: weight decay of that step.
        tasks: task -> learning rate and weight decay of its head, in place of those above.
        trunk: learning rate, weight decay and layer decay of the trunks; null for those above.
    """

    kind: Literal["sgd"]
    private: ClassVar[bool] = False
    sampling_rate: Annotated[float, Field(gt=0, le=1)]
    steps: PositiveInt
    learning_rate: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    tasks: Mapping[str, Rates] = Field(default_factory=dict)
    trunk: TrunkRates | None = None

    @classmethod
    def example(cls) -> dict[str, Any]:
        """Returns settings with every required key."""
        return {"kind": "sgd", "sampling_rate": 0.5, "steps": 3, "learning_rate": 0.5}

    def plan(self, privacy: Privacy | None, unit: Unit, rounds: int) -> Plan:
        """Returns a plan without clipping and noise.

        Args:
            privacy: expected to be None.
            unit: the unit that the site's budget protects.
            rounds: not used: every round is alike.

        Raises:
            BadInput: privacy is asked for.
        """
        del rounds
        if privacy is not None:
            raise BadInput("solver.kind: sgd gives no privacy; expected `privacy: non_private`, or a private solver")
        return Plan(self.sampling_rate, self.steps, None, 0.0, unit)

    def without_privacy(self) -> Sgd:
        """Returns this solver: it gives no privacy."""
        return self

    def check_modules(self, modules: Mapping[str, nn.Module]) -> None:
        """Accepts every head and trunk; raises BadInput where a trunk has no layers for rates that differ."""
        if self.trunk is not None and self.trunk.layer_decay < 1.0:
            from client.solvers.parts.objective import check_layers  # Here: a site that only plans needs no torch.

            check_layers(modules, self.trunk)

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

        Args:
            modules: parameter group -> head or trunk at the round's start; not modified.
            tasks: task -> its definition.
            units: training units, on the device to train on.
            plan: what `plan` returned.
            public_sizes: parameter group -> declared number of units.
            stream: the only source of randomness: coins and noise.

        Raises:
            RunFailed: training diverged.
        """
        import torch  # Here: a site that only plans needs no torch.

        from client.solvers.parts import objective

        copies = objective.copy_trainable(modules)
        rates = Rates(learning_rate=self.learning_rate, weight_decay=self.weight_decay)
        groups = objective.make_optimizer_groups(copies, tasks, rates, self.tasks, self.trunk)
        optimizer = torch.optim.SGD(groups, lr=self.learning_rate, momentum=self.momentum)
        divisors = objective.compute_divisors(plan, public_sizes)
        usable = objective.select_usable(units)
        for _ in range(plan.steps):
            optimizer.zero_grad(set_to_none=True)
            batch = objective.select_batch(usable, objective.draw_participants(usable, plan, stream))
            loss = objective.sum_losses(copies, tasks, batch)
            if loss is not None:
                loss.backward()  # type: ignore[no-untyped-call]
            _divide_gradients(copies, divisors)
            optimizer.step()
        return objective.compute_update(copies, modules)


def _divide_gradients(modules: Mapping[str, nn.Module], divisors: Mapping[str, float]) -> None:
    """Divides gradients as `dp_sgd` does.

    The gradient of a task without a record becomes zero instead of None, so that momentum and decay still act.
    """
    for name, module in modules.items():
        for parameter in module.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = parameter.new_zeros(parameter.shape)
                parameter.grad /= divisors[name]
