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
from typing import Annotated, Any, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import nn

from client.data.units import Units
from client.solvers.parts import objective
from client.solvers.sgd import Sgd
from common.plugins import Plugin
from common.privacy.accounting import noise_multiplier
from common.privacy.noise import NoiseStream
from common.run import PositiveInt, Privacy
from common.tasks import Task
from common.types import BadInput, Delta, Plan, Unit


@final
class DpSgd(Plugin):
    """Settings of private SGD. Nothing that affects privacy has a default.

    Attributes:
        sampling_rate: probability with which each unit takes part in a step; 1 is full batch.
        steps: noised steps in one round.
        clip_norm: bound on one unit's gradient over all heads.
        learning_rate: of SGD on the noised mean gradient.
        momentum: of that SGD; costs no privacy.
        weight_decay: of that SGD; costs no privacy.
        tasks: learning rate and decay of the heads of some tasks instead, by the task's name.
        trunk: learning rate and decay of the part of a backbone that trains, where one does; null: the heads'.
    """

    kind: Literal["dp_sgd"]
    private: ClassVar[bool] = True
    sampling_rate: Annotated[float, Field(gt=0, le=1)]
    steps: PositiveInt
    clip_norm: Annotated[float, Field(gt=0)]
    learning_rate: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    tasks: Mapping[str, objective.Rates] = Field(default_factory=dict)
    trunk: objective.Rates | None = None

    @classmethod
    def example(cls) -> dict[str, Any]:
        """Settings with every required key."""
        return {"kind": "dp_sgd", "sampling_rate": 0.5, "steps": 3, "clip_norm": 1.0, "learning_rate": 0.5}

    def plan(self, privacy: Privacy | None, unit: Unit, rounds: int) -> Plan:
        """The public numbers of one of `rounds` equal rounds; the noise follows from the whole run's target.

        Raises:
            BadInput: no privacy is asked for.
        """
        if privacy is None:
            raise BadInput("solver.kind: dp_sgd needs a `privacy` section, got non_private; kind sgd trains without")
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
            trunk=self.trunk,
        )

    def check_heads(self, heads: Mapping[str, nn.Module]) -> None:
        """Refuse heads that mix the examples of a batch. Raises BadInput."""
        from client.solvers.parts.private_step import check_separable

        check_separable(heads)

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
            BadInput: a head mixes the examples of a batch, so that no per-unit gradient exists.
            RunFailed: training diverged.
        """
        # Here: a site that only plans needs no Opacus.
        from client.solvers.parts.private_step import StreamOptimizer, release_step, with_record_gradients

        copies = objective.trainable_copies(heads)
        with_record_gradients(copies)
        rates = objective.Rates(learning_rate=self.learning_rate, weight_decay=self.weight_decay)
        groups = objective.groups(copies, tasks, rates, self.tasks, self.trunk)
        sgd = torch.optim.SGD(groups, lr=self.learning_rate, momentum=self.momentum)
        divisors = objective.expected_units(plan, public_sizes)
        of_parameter = [divisors[name] for name, head in copies.items() for p in head.parameters() if p.requires_grad]
        optimizer = StreamOptimizer(sgd, plan=plan, divisors=of_parameter, stream=stream)
        usable = objective.usable(units)
        for _ in range(plan.steps):
            members = objective.participants(usable, plan, stream)
            release_step(optimizer, copies, tasks, usable, members)
        return objective.difference(copies, heads)
