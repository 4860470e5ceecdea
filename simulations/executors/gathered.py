"""The sites of a simulation gathered in one place: one site file with all records, and which row is whose.

Records are opened, encoded, split and labelled once for all sites. What a site then has is what it would have prepared
by itself: no step of a preparation looks at another record, but for units, which sites divide again among themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.config import SiteConfig, SiteTask
from common.model.guessing import Totals
from common.run import RunConfig
from common.types import BadInput
from simulations.config import SimulatedTask, SimulationConfig
from simulations.partition import build_sites, check_site_names, lay_out_divided, make_site_source, write_site_file

GATHERED = "all-sites"
"""Name of the one site file."""

_SITES = "sites.npz"
_BASELINES = {"baseline_prediction", "non_private", "random_backbone"}


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
        "run.moments": ("nothing that is measured before the first round", run.moments and _explain_moments(run)),
        "run.evaluation": ("no evaluation at the sites", run.evaluation and "one"),
        "evaluation": ("`local`", "" if config.evaluation == "local" else "shares of the sites' budgets"),
        "personal": ("`none`", "" if config.personal == "none" else f"`{config.personal}`"),
        "baselines": (f"some of {', '.join(sorted(_BASELINES))}", ", ".join(baselines)),
    }
    for key, (expected, got) in reasons.items():
        if got:
            raise BadInput(
                f"{key}: expected {expected} with `executor.kind: batched`, got {got}; `executor.kind: in_process` "
                "takes it"
            )


def _explain_moments(run: RunConfig) -> str:
    """Returns what measures something, and how to do without it."""
    if not run.chosen:
        return "`moments`"
    return (
        "`solver: {kind: auto}`, which measures; name the settings, such as `solver: {kind: dp_gd, steps: 2, "
        "clip_norm: 1.0, learning_rate: 1.0}`, `rounds: 20` and `aggregation: {kind: mean}`"
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


# --- whatever the executor ---


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
