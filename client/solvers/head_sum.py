"""One noised sum a round for linear heads: each unit's clipped gradient at the heads that were sent, added up.

A site takes no step of its own. Steps at sites cost privacy as rounds do, and each site's own direction is dearer than
all sites' together: with one sum a round the coordinator's step (aggregator `heavy_ball`) follows all of them.

Guarantee: as `dp_gd` with one full-batch step: adding or removing one unit moves the sum over all heads by that unit's
own part, an integer vector on a public lattice of length at most `clip_norm`; the sum is released with noise of
standard deviation noise_multiplier * clip_norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, final

from pydantic import Field

from client.solvers.sgd import Sgd
from common.plugins import Plugin
from common.privacy.filters import choose_noise_multiplier
from common.run import Privacy, Rates
from common.tasks import Task
from common.types import CLIP_NORMS, BadInput, Delta, Plan, Unit

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from client.data.units import Units
    from client.solvers.parts.many_sites import ManySites, Trained
    from common.privacy.lattice import Lattice
    from common.privacy.noise import NoiseStream
    from common.secure_sum.vectors import WholeHeads


@final
class HeadSum(Plugin):
    """Settings of one noised sum a round.

    Attributes:
        clip_norm: bound on one unit's gradient over all heads.
    """

    kind: Literal["head_sum"]
    private: ClassVar[bool] = True
    clip_norm: Annotated[float, Field(ge=CLIP_NORMS.low, le=CLIP_NORMS.high)]

    @classmethod
    def example(cls) -> dict[str, Any]:
        """Returns settings with every required key."""
        return {"kind": "head_sum", "clip_norm": 1.0}

    def plan(self, privacy: Privacy | None, unit: Unit, rounds: int) -> Plan:
        """Returns the public numbers of one round; the noise follows from the target of the whole run.

        Args:
            privacy: the requested privacy of all rounds.
            unit: the unit that the site's budget protects.
            rounds: the number of equal rounds over which the requested privacy is spent.

        Raises:
            BadInput: no privacy is asked for.
        """
        if privacy is None:
            raise BadInput("solver.kind: head_sum needs a `privacy` section, got non_private; kind sgd trains without")
        noise = choose_noise_multiplier(privacy, 1.0, rounds)
        return Plan(1.0, 1, self.clip_norm, noise, unit)

    def without_privacy(self) -> Sgd:
        """Returns `sgd` with one full-batch step a round, which neither clips nor adds noise."""
        return Sgd(kind="sgd", sampling_rate=1.0, steps=1, learning_rate=1.0)

    def check_modules(self, modules: Mapping[str, nn.Module]) -> None:
        """Raises BadInput for heads and trunks for which the closed form is not exact."""
        from client.solvers.parts.closed_form import check_affine  # Here: a site that only plans needs no torch.

        check_affine(modules, self.kind)

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
        """Returns minus the noised sum of clipped gradients, divided by the public size: a step of rate 1.

        Args:
            modules: parameter group -> head at the round's start; not modified.
            tasks: task -> its definition.
            units: training units, on the device to compute on.
            plan: what `plan` returned.
            public_sizes: parameter group -> declared number of units.
            stream: the only source of randomness: the noise.

        Raises:
            BadInput: a head is not affine.
            RunFailed: a value is not finite.
        """
        from client.solvers.parts.descent import descend  # Here: a site that only plans needs no torch.

        return descend(
            modules,
            tasks,
            units,
            plan=plan,
            public_sizes=public_sizes,
            stream=stream,
            rates=dict.fromkeys(modules, Rates(learning_rate=1.0)),
            solver=self.kind,
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
            streams: for each, the only source of its noise.
        """
        return many.descend_each(
            modules,
            tasks,
            sites,
            plan=plan,
            public_sizes=public_sizes,
            streams=streams,
            rates=dict.fromkeys(modules, Rates(learning_rate=1.0)),
            solver=self.kind,
        )

    def release_whole(
        self,
        modules: Mapping[str, nn.Module],
        tasks: Mapping[str, Task],
        units: Units,
        *,
        plan: Plan,
        lattice: Lattice,
        stream: NoiseStream,
    ) -> WholeHeads:
        """Returns the noised sum in steps of a lattice. See `client.solvers.SummingSolver.release_whole`.

        Args:
            modules: parameter group -> head at the round's start; not modified.
            tasks: task -> its definition.
            units: training units.
            plan: what `plan` returned.
            lattice: the lattice, whose noise may be a part of the plan's.
            stream: the only source of randomness: the noise.

        Raises:
            BadInput: a head is not affine.
        """
        from client.solvers.parts.descent import release_sum  # Here: a site that only plans needs no torch.

        del plan  # Its clip norm is the lattice's bound.
        return release_sum(modules, tasks, units, lattice=lattice, stream=stream, solver=self.kind)
