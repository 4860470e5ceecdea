"""The gathered sites of a run, and those among them that train the same heads, opened side by side.

# Shapes: S sites of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray
from torch import nn

from client.config import SiteConfig
from client.data.records import Side
from client.solvers import ManySitesSolver, Solver
from client.solvers.parts.many_sites import ManySites
from client.solvers.parts.many_units import ManyUnits
from common.model.parameters import load_parameters
from common.privacy.noise import Entropy
from common.run import RunConfig
from common.tasks import Task
from common.types import Heads
from simulations.config import Executor
from simulations.executors.gathered import GatheredSites, open_divided


@dataclass(frozen=True)
class Gathering:
    """The sites of a run, gathered.

    Attributes:
        site: the one site file.
        sites: which row is whose.
        run_id: id of the run.
        run: the run.
        backbones: name -> width of its features, and its digest.
        entropy: source of the keys of sampling and noise.
        tasks: the run's tasks by name.
        executor: the executor's settings.
        solver: the run's solver.
    """

    site: SiteConfig
    sites: GatheredSites
    run_id: str
    run: RunConfig
    backbones: Mapping[str, tuple[int, str]]
    entropy: Entropy
    tasks: Mapping[str, Task]
    executor: Executor
    solver: Solver


@final
class Alike:
    """Some sites that train the same heads.

    Attributes:
        tasks: their tasks.
        sites: int64, their numbers in the run, ascending.
        place_S: int64, the place of each site of the run among them; -1 for the others.
        units: their training units.
    """

    def __init__(self, gathering: Gathering, tasks: Mapping[str, Task], sites: NDArray[np.int64]) -> None:
        """Args: gathering: all sites of the run; tasks, sites: as the attributes, of at least one site."""
        self._gathering, self.tasks, self.sites = gathering, tasks, sites
        self.place_S = np.full(len(gathering.sites.names) + 1, -1)  # The last is of rows that are nobody's.
        self.place_S[sites] = np.arange(len(sites))
        self.units = self._open("train")
        width = {name: gathering.backbones[gathering.run.backbone_of(name)][0] for name in tasks}
        self._modules = {name: task.head(width[name]) for name, task in tasks.items()}
        self._many: ManySites | None = None
        self._held_out: ManyUnits | None = None

    def open_modules(self, heads: Heads) -> Mapping[str, nn.Module]:
        """Returns the heads as modules, as a site opens them; no solver changes them."""
        for name, module in self._modules.items():
            load_parameters(module, heads[name])
        return self._modules

    def open_many(self, heads: Heads) -> ManySites | None:
        """Returns the units opened for training, once; None where the solver trains one site at a time.

        Args:
            heads: the heads; what of them does not train is the same in all rounds, and is fixed before the first.
        """
        if self._many is None and isinstance(self._gathering.solver, ManySitesSolver):
            self._many = ManySites(self.open_modules(heads), self.tasks, self.units)
        return self._many

    def open_held_out(self) -> ManyUnits:
        """Returns the sites' held-out units, opened once."""
        if self._held_out is None:
            self._held_out = self._open("test")
        return self._held_out

    def _open(self, side: Side) -> ManyUnits:
        own = self._gathering
        return open_divided(own.site, own.sites, own.run_id, side, list(self.tasks), self.place_S)
