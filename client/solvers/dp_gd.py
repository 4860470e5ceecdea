"""Differentially private gradient descent on linear heads with clipping in closed form: `dp_sgd` without its cost.

Per step: all units, or a Poisson sample of them; outputs and the derivative of the joint objective by them; each unit's
gradient norm over all heads from the two factors of its gradients; one clip; sum; Gaussian noise; divide by a constant;
gradient descent. Full batch is the default: of all sampling rates it has the least noise for its signal at a given
epsilon, and its accounting is exact.

Guarantee: as `dp_sgd`: with weights fixed, adding or removing one unit moves a step's sum over all heads by that unit's
own part, an integer vector on a public lattice of length at most `clip_norm`, whatever its features and labels are and
however many tasks and records it has; each of the plan's `steps` sums, also of an empty sample, is released with noise
of standard deviation noise_multiplier * clip_norm. From the same stream both solvers release the same, to rounding.

Exact for one linear layer or 1x1 convolution and any per-example loss; refuses other heads. Coins and noise come from
the site's stream alone. Opacus is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, final

from pydantic import Field, model_validator

from client.solvers.sgd import Sgd
from common.plugins import Plugin
from common.privacy.filters import choose_noise_multiplier
from common.run import PositiveInt, Privacy, Rates
from common.tasks import Task
from common.types import CLIP_NORMS, SAMPLING_RATES, BadInput, Delta, Plan, Unit

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from client.data.units import Units
    from client.solvers.parts.many_sites import ManySites, Trained
    from common.privacy.noise import NoiseStream


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
    sampling_rate: Annotated[float, Field(ge=SAMPLING_RATES.low, le=1)] = 1.0
    steps: PositiveInt
    clip_norm: Annotated[float, Field(ge=CLIP_NORMS.low, le=CLIP_NORMS.high)]
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

        Args:
            modules: parameter group -> head or trunk at the round's start; not modified.
            tasks: task -> its definition.
            units: training units, on the device to train on.
            plan: what `plan` returned.
            public_sizes: parameter group -> declared number of units.
            stream: the only source of randomness: coins and noise.

        Raises:
            BadInput: a head is not affine.
            RunFailed: training diverged.
        """
        from client.solvers.parts.descent import descend  # Here: a site that only plans needs no torch.

        return descend(
            modules,
            tasks,
            units,
            plan=plan,
            public_sizes=public_sizes,
            stream=stream,
            rates=self._list_rates(modules),
            momentum=self.momentum,
        )

    def solve_each(
        self,
        modules: Mapping[str, nn.Module],
        tasks: Mapping[str, Task],
        many: ManySites,
        sites: NDArray[np.int64],
        *,
        plan: Plan,
        public_sizes: Sequence[Mapping[str, int]],
        streams: Sequence[NoiseStream],
    ) -> Trained:
        """Returns what `solve` returns at each of some sites. See `client.solvers.ManySitesSolver.solve_each`.

        Args:
            modules: parameter group -> head at the round's start.
            tasks: task -> its definition.
            many: the units of many sites.
            sites: a block of them.
            plan: what `plan` returned.
            public_sizes: for each site of the block, parameter group -> declared number of units.
            streams: for each, the only source of its randomness.
        """
        return many.descend_each(
            modules,
            tasks,
            sites,
            plan=plan,
            public_sizes=public_sizes,
            streams=streams,
            rates=self._list_rates(modules),
            momentum=self.momentum,
        )

    def _list_rates(self, modules: Mapping[str, nn.Module]) -> dict[str, Rates]:
        default = Rates(learning_rate=self.learning_rate, weight_decay=self.weight_decay)
        return {name: self.tasks.get(name, default) for name in modules}
