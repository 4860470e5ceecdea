"""The sites of a simulation gathered in one place: one site file with all records, and which row is whose.

Records are opened, encoded, split and labelled once for all sites. What a site then has is what it would have prepared
by itself: no step of a preparation looks at another record, but for units, which sites divide again among themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from client.config import SiteConfig, SiteTask
from client.data.prepare import list_positions, open_units
from client.data.records import Side
from client.data.units import Units
from client.solvers.parts.many_units import ManyUnits
from common.model.guessing import Totals
from common.run import RunConfig
from common.tasks import Task
from common.types import BadInput
from simulations.config import SimulatedTask, SimulationConfig
from simulations.evaluate import MOST_SITES, locate_prepared_data, open_prepared_units
from simulations.partition import build_sites, check_site_names, lay_out_divided, make_site_source, write_site_file

GATHERED = "all-sites"
"""Name of the one site file."""

_SITES = "sites.npz"
_BASELINES = {"baseline_prediction", "local", "non_private", "central", "random_backbone"}


@dataclass(frozen=True)
class GatheredSites:
    """The gathered sites and the rows of each.

    Attributes:
        names: the sites, in the order of their numbers.
        sizes: for each site, task -> declared number of units.
        site_P: int64, the site of each row of the source; -1 for a row that is nobody's.
    """

    names: list[str]
    sizes: list[Mapping[str, int]]
    site_P: NDArray[np.int64]

    def sum_totals(self, config: SimulationConfig) -> dict[str, Totals]:
        """Returns the public numbers of each of the run's tasks over all sites that have it."""
        pairs = list(zip(self.names, self.sizes, strict=True))
        by_task = {name: {site: own[name] for site, own in pairs if name in own} for name in config.run.tasks}
        return {name: Totals.of(config.run, name, own) for name, own in by_task.items() if own}


def check_gathered(config: SimulationConfig) -> None:
    """Checks that a simulation is one whose sites can be gathered.

    Raises:
        BadInput: it is not; the message names the executor that takes it.
    """
    run, used = config.run, {task.source for task in config.tasks.values()}
    trained, baselines = ", ".join(run.trainable), [name for name in config.baselines if name not in _BASELINES]
    reasons = {
        "partition.kind": ("one source that is divided", "`natural`" if config.partition.kind == "natural" else ""),
        "sources": ("one source for all tasks", ", ".join(sorted(used)) if len(used) > 1 else ""),
        "leave_out": ("no site that is left out", config.leave_out),
        "run.trust": ("no secure sum", run.trust and f"`{run.trust}`"),
        "run.trainable": ("frozen backbones", trained and f"parts of {trained}"),
        "personal": ("`none`", "" if config.personal == "none" else f"`{config.personal}`"),
        "baselines": (f"some of {', '.join(sorted(_BASELINES))}", ", ".join(baselines)),
    }
    for key, (expected, got) in reasons.items():
        if got:
            raise BadInput(
                f"{key}: expected {expected} with `executor.kind: batched`, got {got}; `executor.kind: in_process` "
                "takes it"
            )


def gather_sites(config: SimulationConfig, folder: Path, *, non_private: bool = False) -> SiteConfig:
    """Writes the one site file and which row is whose, and returns the site.

    Args:
        config: the simulation.
        folder: folder that receives `all-sites/`, and later its state with the sites' shared ledger.
        non_private: whether the sites accept a run without privacy.

    Raises:
        BadInput: the partition names unknown sites, or the simulation is none whose sites can be gathered.
    """
    check_gathered(config)
    layout = lay_out_divided(config)
    names, place = sorted(layout.sources), folder / GATHERED
    check_site_names(config, names)
    (source,) = {task.source for task in config.tasks.values()}
    rows = {name: layout.rows[name].get(source, []) for name in names}
    place.mkdir(parents=True)
    number = {name: at for at, name in enumerate(names)}
    owner = {row: number[name] for name, own in rows.items() for row, _ in own}
    site_P = np.full(max(owner, default=0), -1, np.int64)
    for row, home in owner.items():
        site_P[row - 1] = home
    np.savez(place / _SITES, names=np.array(names), site_P=site_P)
    merged = sorted(row for own in rows.values() for row in own)
    sizes = [_list_sizes(config, name) for name in names]
    sources = {source: make_site_source(config.sources[source], source, merged, place)}
    tasks = {name: _gather_task(task, max(own.get(name, 1) for own in sizes)) for name, task in config.tasks.items()}
    return write_site_file(config, GATHERED, place, sources, tasks, non_private=non_private)


def read_gathered(config: SimulationConfig, site: SiteConfig) -> GatheredSites:
    """Returns which row is whose, as `gather_sites` wrote it.

    Args:
        config: the simulation.
        site: the one site.
    """
    with np.load(site.state_dir.parent / _SITES) as stored:
        names, site_P = stored["names"].tolist(), stored["site_P"]
    # Sites with equal declarations share them.
    known: dict[tuple[tuple[str, int], ...], Mapping[str, int]] = {}
    sizes = []
    for name in names:
        own = _list_sizes(config, name)
        sizes.append(known.setdefault(tuple(own.items()), own))
    return GatheredSites(names, sizes, site_P)


def _list_sizes(config: SimulationConfig, site: str) -> dict[str, int]:
    """Returns the tasks of a site with its declared numbers of units."""
    sizes = {}
    for name, task in config.tasks.items():
        if task.sites == "all" or site in task.sites:
            size = task.public_size
            if isinstance(size, dict) and site not in size:
                raise BadInput(f"tasks.{name}.public_size: expected a number for site {site!r}, got nothing")
            sizes[name] = size[site] if isinstance(size, dict) else size
    if not sizes:
        raise BadInput(f"tasks: site {site!r} has none; list it in at least one task's `sites`")
    return sizes


def _gather_task(task: SimulatedTask, size: int) -> SiteTask:
    return SiteTask(**task.model_dump(exclude={"sites", "public_size"}), public_size=size)


def list_kinds(sites: GatheredSites) -> tuple[list[frozenset[str]], NDArray[np.int64]]:
    """Returns the different sets of tasks that sites have, and the number of each site's."""
    numbers: dict[frozenset[str], int] = {}
    kind_S = np.array([numbers.setdefault(frozenset(sizes), len(numbers)) for sizes in sites.sizes], np.int64)
    return list(numbers), kind_S


def open_divided(
    site: SiteConfig, sites: GatheredSites, run_id: str, side: Side, names: Sequence[str], place_S: NDArray[np.int64]
) -> ManyUnits:
    """Returns one side of the prepared units, divided among some sites.

    Args:
        site: the one site file.
        sites: which row is whose.
        run_id: id of the run for which they were prepared.
        side: the side.
        names: the sites' tasks.
        place_S: the place of each site among them, -1 for the others; one number more, for rows that are nobody's.
    """
    folder, names = locate_prepared_data(site, run_id), list(names)
    units, positions = open_units(folder, side, names, torch.device("cpu")), list_positions(folder, side, names)
    homes = [place_S[sites.site_P[positions[name]]] for name in names]
    return ManyUnits.divide(units, homes, int(place_S.max()) + 1)


# --- whatever the executor ---


def open_sides(
    config: SimulationConfig, sites: Sequence[SiteConfig], run_id: str, tasks: Mapping[str, Task], side: Side
) -> dict[str, Units]:
    """Returns each site's units of one side as it prepared them; sites that prepared none are left out.

    Args:
        config: the simulation.
        sites: some of what `build_for_executor` returned.
        run_id: id of the run for which they were prepared.
        tasks: tasks to open, by name.
        side: the side of the records.
    """
    if config.executor.kind != "batched":
        return open_prepared_units(sites, run_id, tasks, side)
    gathered = read_gathered(config, sites[0])
    kinds, kind_S = list_kinds(gathered)
    found: dict[str, Units] = {}
    for kind, own in enumerate(kinds):
        names, numbers = [name for name in tasks if name in own], np.flatnonzero(kind_S == kind)
        place_S = np.full(len(kind_S) + 1, -1)  # The last is of rows that are nobody's.
        place_S[numbers] = np.arange(len(numbers))
        many = open_divided(sites[0], gathered, run_id, side, names, place_S)
        found |= {gathered.names[number]: many.select_site(place) for place, number in enumerate(numbers.tolist())}
    return {name: found[name] for name in gathered.names}


def open_judged(
    config: SimulationConfig, sites: Sequence[SiteConfig], run_id: str, tasks: Mapping[str, Task]
) -> tuple[dict[str, Units], bool]:
    """Returns the held-out units that judge heads, and whether they are those of each site by itself.

    Above `MOST_SITES` sites with `batched`, the records of all sites that have the same tasks stand together, and are
    judged in one go: the same metrics up to rounding, of thousands of sites in one call instead of as many.

    Args:
        config: the simulation.
        sites: the sites whose records judge.
        run_id: id of the run for which they were prepared.
        tasks: tasks to open, by name.
    """
    if config.executor.kind != "batched":
        return open_prepared_units(sites, run_id, tasks, "test"), True
    gathered = read_gathered(config, sites[0])
    if len(gathered.names) <= MOST_SITES:
        return open_sides(config, sites, run_id, tasks, "test"), True
    kinds, kind_S = list_kinds(gathered)
    found = {}
    for kind, own in enumerate(kinds):
        names, place_S = [name for name in tasks if name in own], np.append(np.where(kind_S == kind, 0, -1), -1)
        found[f"sites of kind {kind}"] = open_divided(sites[0], gathered, run_id, "test", names, place_S).select_site(0)
    return found, False


def list_declared_sizes(config: SimulationConfig, sites: Sequence[SiteConfig]) -> dict[str, Mapping[str, int]]:
    """Returns the declared number of units of each task at each site.

    Args:
        config: the simulation.
        sites: some of what `build_for_executor` returned.
    """
    if config.executor.kind == "batched":
        gathered = read_gathered(config, sites[0])
        return dict(zip(gathered.names, gathered.sizes, strict=True))
    return {site.name: {name: task.public_size for name, task in site.tasks.items()} for site in sites}


def build_for_executor(config: SimulationConfig, folder: Path, *, non_private: bool = False) -> list[SiteConfig]:
    """Returns the site files of a simulation: one for each site, or the one of all sites with `batched`.

    Args:
        config: the simulation.
        folder: folder that receives them.
        non_private: whether the sites accept a run without privacy.

    Raises:
        BadInput: the partition leaves a site without a task, or names unknown sites.
    """
    if config.executor.kind == "batched":
        return [gather_sites(config, folder, non_private=non_private)]
    return build_sites(config, folder, non_private=non_private)


def sum_public_sizes(config: SimulationConfig, sites: Sequence[SiteConfig]) -> dict[str, Totals]:
    """Returns the public numbers of each task over the sites that train and have it.

    Args:
        config: the simulation.
        sites: what `build_for_executor` returned.
    """
    if config.executor.kind == "batched":
        return read_gathered(config, sites[0]).sum_totals(config)
    return sum_totals(config.list_training_sites(sites), config.run)


def sum_totals(sites: Sequence[SiteConfig], run: RunConfig) -> dict[str, Totals]:
    """Returns the public numbers of each of a run's tasks over all sites that have it."""
    sizes = {
        name: {site.name: site.tasks[name].public_size for site in sites if name in site.tasks} for name in run.tasks
    }
    return {name: Totals.of(run, name, own) for name, own in sizes.items() if own}
