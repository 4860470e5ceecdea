"""Solvers: ways to turn features into an update. One file is one kind. Only client code may import this folder.

Importing a kind, reading its settings and `plan` load no torch: `check_modules` and `solve` import what they compute
with, so that commands that only plan start fast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from common.plugins import Spec, resolve
from common.run import Privacy
from common.tasks import Task
from common.types import Delta, Plan, Unit

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from client.data.units import Units
    from client.solvers.parts.many_sites import ManySites, Trained
    from common.privacy.lattice import Lattice
    from common.privacy.noise import NoiseStream
    from common.secure_sum.vectors import WholeHeads


class Solver(Protocol):
    """A solver's public settings and its private computation.

    Law (tests/contracts/test_solvers.py): per step with weights fixed and noise off, adding or removing one unit moves
    the released sum by at most the clip norm; the noise has standard deviation noise_multiplier * clip_norm; an empty
    site works and still releases noise; the plan's numbers are the ones used; all rounds of a plan for a
    target together cost the target.

    A kind with other rates for the heads of some tasks calls that setting `tasks`; one with other rates for trunks
    calls it `trunk`: the run file checks that both refer to what the run trains (`common.run.SolverSpec`). A private
    kind whose settings have all names of `common.privacy.update_norm.DescentSettings` that have no default must keep to
    the update's length that follows there from its numbers: the coordinator rejects longer ones. A kind of other steps
    gives one of these settings another name; then `max_delta_norm` of the run file is the only bound.

    Attributes:
        kind: file name of the plug-in.
        private: whether the update is differentially private.
    """

    kind: str
    private: bool

    @classmethod
    def example(cls) -> dict[str, Any]:
        """Returns settings with every required key, with which the contract tests run."""

    def plan(self, privacy: Privacy | None, unit: Unit, rounds: int) -> Plan:
        """Returns the public numbers of one round.

        Args:
            privacy: the requested privacy of the whole run; None in a run without privacy.
            unit: the unit that the site's budget protects.
            rounds: the number of equal rounds over which the requested privacy is spent.

        Raises:
            BadInput: the settings and the requested privacy do not go together.
        """

    def without_privacy(self) -> Solver:
        """Returns the solver that trains alike without clipping and noise: the same sampling, steps and all rates.

        Law: with noise off and a clip norm that no gradient reaches, both return the same update. A kind that is not
        private returns itself.
        """

    def check_modules(self, modules: Mapping[str, nn.Module]) -> None:
        """Raises BadInput for untrained heads or trunks that this solver cannot train as it promises.

        It is called before anything is spent; the message names the task and a kind that trains it.
        """

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
        """Trains copies of the modules on the units and returns the change of their parameters.

        Args:
            modules: parameter group -> module at the start of the round: the head of each task by the task's name, and
                the trunks; they are not modified.
            tasks: task -> its definition; the keys are those of `units.tasks`.
            units: the site's training units, on the device to train on.
            plan: the plan of one round, as `plan` returned it.
            public_sizes: parameter group -> declared number of units; expected batch sizes come from it, never from
                the units.
            stream: the only source of randomness: Poisson coins and noise.

        Raises:
            BadInput: a module cannot be trained as the solver promises.
            RunFailed: training diverged.
        """


@runtime_checkable
class SummingSolver(Solver, Protocol):
    """A solver whose update is minus one noised sum of whole numbers, divided by the public size.

    Such updates can be added before anybody sees one of them (`trust: secure_sum` of the run file).

    Law (tests/contracts/test_solvers.py): from the same stream, and on the lattice of the plan, `solve` returns minus
    `release_whole` times the lattice's spacing, divided by the public sizes.
    """

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
        """Returns the sum with noise of deviation 2**`lattice.log2_deviation`, in steps of a lattice.

        Args:
            modules: parameter group -> module at the start of the round; they are not modified.
            tasks: task -> its definition.
            units: the site's training units.
            plan: the plan of one round.
            lattice: the lattice, whose noise may be a part of the plan's.
            stream: the only source of randomness: the noise.

        Raises:
            BadInput: a module cannot be trained as the solver promises.
        """


@runtime_checkable
class ManySitesSolver(Solver, Protocol):
    """A solver that trains many sites of a simulation at once.

    Law (tests/client/solvers/test_many_sites.py): each site's change is, to the bit, what `solve` returns for its units
    from the same stream, wherever `Trained.sound` says so.
    """

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
        """Trains copies of the modules at each of some sites.

        Args:
            modules: parameter group -> module at the start of the round, the same at all sites.
            tasks: task -> its definition.
            many: the units of many sites.
            sites: a block of `ManySites.list_blocks`, of sites in `ManySites.fits`.
            plan: the plan of one round.
            public_sizes: for each site of the block, parameter group -> declared number of units.
            streams: for each site, the only source of its randomness.
        """


def open_solver(spec: Spec | Mapping[str, Any], key: str) -> Solver:
    """Returns the solver that a setting describes; raises BadInput naming the key where it is wrong."""
    solver: Solver = resolve("client.solvers", spec, key)
    return solver
