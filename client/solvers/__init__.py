"""How a site turns features into a contribution. One file is one kind. Only client code may import this folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from client.data.units import Units
from common.plugins import Spec, resolve
from common.privacy.noise import NoiseStream
from common.run import Privacy
from common.tasks import Task
from common.types import Delta, Plan, Unit


class Solver(Protocol):
    """A solver's settings, public, and its computation, private.

    Law (tests/contracts/test_solvers.py): per step with weights fixed and noise off, adding or removing one unit moves
    the released sum by at most the clip norm; the noise has standard deviation noise_multiplier * clip_norm; an empty
    site works and still releases noise; the plan's numbers are the ones used.

    Attributes:
        kind: file name of the plug-in.
        private: whether its contribution is differentially private.
    """

    kind: str
    private: bool

    @classmethod
    def example(cls) -> dict[str, Any]:
        """Settings with every required key, that the contract suite runs."""

    def plan(self, privacy: Privacy | None, unit: Unit, rounds: int) -> Plan:
        """The public numbers of one of `rounds` equal rounds.

        Raises:
            BadInput: the settings and the requested privacy do not go together.
        """

    def without_privacy(self) -> Solver:
        """Returns the solver that trains alike without clipping and noise: the same sampling, steps and all rates.

        Law: with noise off and a clip norm that no gradient reaches, both return the same update. A kind that is not
        private returns itself.
        """

    def check_heads(self, heads: Mapping[str, nn.Module]) -> None:
        """Refuse heads this solver cannot train as it promises; of untrained heads, before anything is spent.

        Raises:
            BadInput: names the task and says which solver trains it.
        """

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
        """Train copies of the heads on the units and return what changed.

        Args:
            heads: task -> head at the round's start; not modified.
            tasks: task -> its definition; same keys as heads and units.tasks.
            units: training units, on the device to train on.
            plan: what `plan` returned.
            public_sizes: task -> declared number of units; expected batch sizes come from it, never from the units.
            stream: the only source of randomness: Poisson coins and noise.
        """


def open_solver(spec: Spec | Mapping[str, Any], key: str) -> Solver:
    """The solver a run asks for. Raises BadInput naming the key."""
    solver: Solver = resolve("client.solvers", spec, key)
    return solver
