"""Differentially private SGD (Abadi et al. 2016) on all heads of a site at once, with Opacus.

Per step: Poisson-sample units; per-record gradients of the joint objective (Opacus hooks); sum them per unit; one clip
over all heads of a unit; sum; Gaussian noise; divide by a constant; SGD.

Guarantee: with weights fixed, adding or removing one unit moves a step's sum over all heads by at most `clip_norm` in
L2, whatever its features and labels are and however many tasks and records it has; each of the plan's `steps` sums,
also of an empty sample, is released with noise of standard deviation noise_multiplier * clip_norm. So T tasks cost what
one does.

Coins and noise come from the site's stream alone. Opacus' engine, samplers and accountants are not used: its
accountants forget earlier rounds, and its sampler derives rates from the true number of records.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, final

from pydantic import Field

from client.solvers.sgd import Sgd
from common.plugins import Plugin
from common.privacy.filters import choose_noise_multiplier
from common.run import PositiveInt, Privacy, Rates, TrunkRates
from common.tasks import Task
from common.types import CLIP_NORMS, SAMPLING_RATES, BadInput, Delta, Plan, Unit

if TYPE_CHECKING:
    from torch import nn

    from client.data.units import Units
    from common.privacy.noise import NoiseStream


@final
class DpSgd(Plugin):
    """Settings of private SGD. Nothing that affects privacy has a default.

    Attributes:
        sampling_rate: probability with which each unit takes part in a step; 1 is full batch.
        steps: noised steps in one round.
        clip_norm: bound on one unit's gradient over all heads.
        learning_rate: learning rate of SGD on the noised mean gradient.
        momentum: momentum of that SGD; costs no privacy.
        weight_decay: weight decay of that SGD; costs no privacy.
        tasks: task -> learning rate and weight decay of its head, in place of those above.
        trunk: learning rate, weight decay and layer decay of the trunks; null for those above.
    """

    kind: Literal["dp_sgd"]
    private: ClassVar[bool] = True
    sampling_rate: Annotated[float, Field(ge=SAMPLING_RATES.low, le=1)]
    steps: PositiveInt
    clip_norm: Annotated[float, Field(ge=CLIP_NORMS.low, le=CLIP_NORMS.high)]
    learning_rate: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    tasks: Mapping[str, Rates] = Field(default_factory=dict)
    trunk: TrunkRates | None = None

    @classmethod
    def example(cls) -> dict[str, Any]:
        """Returns settings with every required key."""
        return {"kind": "dp_sgd", "sampling_rate": 0.5, "steps": 3, "clip_norm": 1.0, "learning_rate": 0.5}

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
            raise BadInput("solver.kind: dp_sgd needs a `privacy` section, got non_private; kind sgd trains without")
        noise = choose_noise_multiplier(privacy, self.sampling_rate, rounds * self.steps)
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
            trunk=self.trunk,
        )

    def check_modules(self, modules: Mapping[str, nn.Module]) -> None:
        """Raises BadInput for heads or trunks that mix the examples of a batch, or have no layers to tell apart."""
        from client.solvers.parts.objective import check_layers
        from client.solvers.parts.private_step import check_separable

        check_separable(modules)
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
            BadInput: a module mixes the examples of a batch, so that no per-unit gradient exists.
            RunFailed: training diverged.
        """
        import torch  # Here: a site that only plans needs neither torch nor Opacus.

        from client.solvers.parts import objective
        from client.solvers.parts.private_step import StreamOptimizer, hook_record_gradients, release_step

        copies = objective.copy_trainable(modules)
        hook_record_gradients(copies)
        rates = Rates(learning_rate=self.learning_rate, weight_decay=self.weight_decay)
        groups = objective.make_optimizer_groups(copies, tasks, rates, self.tasks, self.trunk)
        sgd = torch.optim.SGD(groups, lr=self.learning_rate, momentum=self.momentum)
        divisors = objective.compute_divisors(plan, public_sizes)
        of_parameter = [
            divisors[name] for name, module in copies.items() for p in module.parameters() if p.requires_grad
        ]
        optimizer = StreamOptimizer(sgd, plan=plan, divisors=of_parameter, stream=stream)
        usable = objective.select_usable(units)
        for _ in range(plan.steps):
            members = objective.draw_participants(usable, plan, stream)
            release_step(optimizer, copies, tasks, usable, members)
        return objective.compute_update(copies, modules)
