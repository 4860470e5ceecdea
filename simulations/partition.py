"""From one data set to several sites: each simulated site is a real site file, and a list of rows for each source.

Rows are assigned by unit: all records of a patient go to one site.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from client.config import Allow, SiteConfig, SiteTask, Split
from client.data.sources import Record, SourceKind, open_source
from common.plugins import Spec
from common.types import BadInput, Unit
from common.yaml import load, write_yaml
from simulations.config import Keep, Partition, SimulatedTask, SimulationConfig

Assignment = dict[str, dict[str, list[tuple[int, str]]]]
"""Site -> source -> (1-based position in the source's index, split or "")."""


@dataclass(frozen=True)
class Layout:
    """Sources of every site and, where a data set was divided, the rows each site holds."""

    sources: Mapping[str, Mapping[str, Spec]]
    rows: Assignment


def build_sites(config: SimulationConfig, folder: Path, *, non_private: bool = False) -> list[SiteConfig]:
    """Write a site file for every simulated site and return them in order of their names.

    Args:
        config: the simulation.
        folder: receives `<site>/site.yaml`, the rows and later the site's state (its ledger too: repeating a simulation
            never exhausts a budget).
        non_private: whether these sites accept a run without privacy.

    Raises:
        BadInput: a partition that leaves a site without any of its tasks' sources, or names unknown sites.
    """
    layout = _natural(config) if config.partition.kind == "natural" else _divided(config)
    names = sorted(layout.sources)
    _check_site_names(config, names)
    return [_write_site(config, layout, name, folder / name, non_private) for name in names]


def list_sources(config: SimulationConfig) -> dict[str, Spec]:
    """Returns the settings of every source that a simulation names, by key path."""
    named = {f"sources.{name}": spec for name, spec in config.sources.items()}
    for site, sources in (config.partition.sites or {}).items():
        named |= {f"partition.sites.{site}.{name}": spec for name, spec in sources.items()}
    return named


def _check_site_names(config: SimulationConfig, names: list[str]) -> None:
    for task_name, task in config.tasks.items():
        for key, listed in (("sites", task.sites), ("public_size", task.public_size)):
            unknown = set(listed if isinstance(listed, (list, dict)) else ()) - set(names) - {"all"}
            if unknown:
                raise BadInput(
                    f"tasks.{task_name}.{key}: expected sites among {', '.join(names)}, got {sorted(unknown)[0]!r}"
                )


def _write_site(config: SimulationConfig, layout: Layout, name: str, folder: Path, non_private: bool) -> SiteConfig:
    folder.mkdir(parents=True)
    tasks = {
        task_name: _site_task(task, task_name, name)
        for task_name, task in config.tasks.items()
        if (task.source in layout.sources[name] if task.sites == "all" else name in task.sites)
    }
    if not tasks:
        raise BadInput(f"tasks: site {name!r} has none; list it in at least one task's `sites`")
    for task_name, task in tasks.items():
        if task.source not in layout.sources[name]:
            known = ", ".join(sorted(layout.sources[name]))
            raise BadInput(f"tasks.{task_name}.source: expected a source of site {name} ({known}), got {task.source!r}")
    used = {task.source for task in tasks.values()}
    sources = {}
    for source_name in used:
        rows = layout.rows.get(name, {}).get(source_name)
        sources[source_name] = _site_source(layout.sources[name][source_name], source_name, rows, folder)
    explicit = config.partition.split != "hash"
    site = SiteConfig(
        name=name,
        registry=f"{name}-registry",
        unit=config.unit,
        budget=config.budget,
        allow=Allow(tasks="any", backbones="any", solvers="any", non_private=non_private),
        sources=sources,
        tasks=tasks,
        split=Split(test_fraction=0.0 if explicit else config.partition.test_fraction, salt=str(config.partition.seed)),
        on_bad_record=config.on_bad_record,
        evaluation=config.evaluation,
        approval="automatic",
        state_dir=folder / "state",
        cache_dir=config.cache_dir,
        device=config.device,
        precision=config.precision,
    )
    write_yaml(folder / "site.yaml", site)
    return site


def _site_task(task: SimulatedTask, task_name: str, site: str) -> SiteTask:
    size = task.public_size
    if isinstance(size, dict):
        if site not in size:
            raise BadInput(f"tasks.{task_name}.public_size: expected a number for site {site!r}, got nothing")
        size = size[site]
    values = task.model_dump(exclude={"sites", "public_size"})
    return SiteTask(**values, public_size=size)


def _site_source(spec: Spec, name: str, rows: list[tuple[int, str]] | None, folder: Path) -> Spec:
    # Settings with their paths made absolute: a site file stands alone.
    kind = open_source(spec, f"sources.{name}")
    settings = _plain(kind)
    if rows is not None:
        path = folder / f"rows-{name}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("row", "split"), *rows])
        settings["rows"] = str(path)
    return Spec(**settings)


def _plain(kind: SourceKind) -> dict[str, Any]:
    dumped: dict[str, Any] = kind.model_dump(mode="json", exclude_none=True)  # type: ignore[attr-defined]
    return dumped


# --- who gets which rows ---------------------------------------------------------------------------------------------


def _natural(config: SimulationConfig) -> Layout:
    own = config.partition.sites or {}
    rows: Assignment = {}
    if config.partition.split == "stratified":
        for site, sources in own.items():
            rows[site] = {
                name: _stratified(config, name, _index(spec, f"partition.sites.{site}.{name}"))
                for name, spec in sources.items()
            }
    layout = {site: dict(sources) for site, sources in own.items()}
    for name, sites in config.partition.divide.items():
        index = _index(config.sources[name], f"sources.{name}")
        for site, positions in _evenly(config, index, list(sites)).items():
            kept = _kept(index, positions, sites[site], f"partition.divide.{name}.{site}")
            layout.setdefault(site, {})[name] = config.sources[name]
            rows.setdefault(site, {})[name] = _with_split(config, name, index, kept)
    return Layout(layout, rows)


def _kept(index: list[Record], positions: list[int], keep: Keep, key: str) -> list[int]:
    """Of some positions those whose records have one of the listed cells in each listed column."""
    wanted = {} if keep == "all" else keep
    for column in wanted:
        if positions and column not in index[positions[0]].cells:
            known = ", ".join(sorted(index[positions[0]].cells))
            raise BadInput(f"{key}: expected one of the source's columns {known}, got {column!r}")
    kept = [
        position
        for position in positions
        if all(index[position].cells[column] in cells for column, cells in wanted.items())
    ]
    if not kept:
        raise BadInput(f"{key}: expected a site that keeps at least one record, got none")
    return kept


def _divided(config: SimulationConfig) -> Layout:
    if not config.sources:
        raise BadInput("sources: expected at least one source to divide into sites, got nothing")
    rows: Assignment = {}
    for name, spec in config.sources.items():
        index = _index(spec, f"sources.{name}")
        groups = _groups(index, config.unit)
        for site, positions in _divide(config, name, index, groups).items():
            rows.setdefault(site, {})[name] = _with_split(config, name, index, positions)
    return Layout({site: config.sources for site in rows}, rows)


def _index(spec: Spec, key: str) -> list[Record]:
    return open_source(spec, key).open().index()


def _groups(index: list[Record], unit: Unit) -> list[list[int]]:
    """Positions that must stay together: the records of a patient, or single records."""
    if unit is Unit.EXAMPLE:
        return [[position] for position in range(len(index))]
    by_patient: dict[str, list[int]] = {}
    for position, record in enumerate(index):
        by_patient.setdefault(record.patient or f"\0{position}", []).append(position)
    return list(by_patient.values())


def _divide(
    config: SimulationConfig, source: str, index: list[Record], groups: list[list[int]]
) -> dict[str, list[int]]:
    partition = config.partition
    if partition.kind == "column":
        return _by_column(partition, index, groups)
    assert partition.num_sites is not None
    width = len(str(partition.num_sites))
    names = [f"site-{number:0{width}d}" for number in range(1, partition.num_sites + 1)]
    if partition.kind == "iid":
        return _evenly(config, index, names)
    chosen: dict[str, list[int]] = {name: [] for name in names}
    shares: dict[str, np.ndarray] = {}
    for side, groups_there in _sides(partition, index, groups).items():
        labels = _labels(config, source, index, groups_there)
        rng = np.random.default_rng([partition.seed, len(side)])
        _dirichlet(partition, groups_there, labels, shares, chosen, rng)
    return chosen


def _sides(partition: Partition, index: list[Record], groups: list[list[int]]) -> dict[str, list[list[int]]]:
    """Train and test records separately where the source separates them, so that every site has both."""
    parts: dict[str, list[list[int]]] = {}
    for group in groups:
        side = index[group[0]].split or "" if partition.split == "source" else ""
        parts.setdefault(side, []).append(group)
    return dict(sorted(parts.items()))


def _evenly(config: SimulationConfig, index: list[Record], names: Sequence[str]) -> dict[str, list[int]]:
    """Shuffled and dealt out, unit by unit."""
    chosen: dict[str, list[int]] = {name: [] for name in names}
    for side, groups in _sides(config.partition, index, _groups(index, config.unit)).items():
        rng = np.random.default_rng([config.partition.seed, len(side)])
        order = [groups[i] for i in rng.permutation(len(groups))]
        for number, name in enumerate(names):
            chosen[name] += [position for group in order[number :: len(names)] for position in group]
    return chosen


def _by_column(partition: Partition, index: list[Record], groups: list[list[int]]) -> dict[str, list[int]]:
    assert partition.by is not None
    chosen: dict[str, list[int]] = {}
    for group in groups:
        value = index[group[0]].cells.get(partition.by)
        if value is None:
            known = ", ".join(sorted(index[group[0]].cells))
            raise BadInput(f"partition.by: expected one of the source's columns {known}, got {partition.by!r}")
        name = "".join(char if char.isalnum() else "-" for char in value.lower()).strip("-") or "blank"
        chosen.setdefault(name, []).extend(group)
    return chosen


def _labels(config: SimulationConfig, source: str, index: list[Record], groups: list[list[int]]) -> list[str]:
    task_name = config.partition.by or ""
    task = config.tasks.get(task_name)
    if task is None or task.source != source or not isinstance(task.column, str):
        raise BadInput(f"partition.by: expected a task with one label column in source {source!r}, got {task_name!r}")
    return [index[group[0]].cells[task.column] for group in groups]


def _dirichlet(
    partition: Partition,
    groups: list[list[int]],
    labels: list[str],
    shares: dict[str, np.ndarray],
    chosen: dict[str, list[int]],
    rng: np.random.Generator,
) -> None:
    """Each label is shared out by one draw of Dirichlet(alpha) (Hsu et al. 2019), the same for train and test."""
    names = list(chosen)
    for label in sorted(set(labels)):
        if label not in shares:
            shares[label] = rng.dirichlet([partition.alpha or 1.0] * len(names))
        members = [group for group, own in zip(groups, labels, strict=True) if own == label]
        order = [members[i] for i in rng.permutation(len(members))]
        cuts = np.round(np.cumsum(shares[label])[:-1] * len(order)).astype(int)
        for name, part in zip(names, np.split(np.arange(len(order)), cuts), strict=True):
            chosen[name] += [position for i in part for position in order[i]]


def _with_split(
    config: SimulationConfig, source: str, index: list[Record], positions: Iterable[int]
) -> list[tuple[int, str]]:
    ordered = sorted(positions)
    if config.partition.split == "stratified":
        part = [index[position] for position in ordered]
        sides = _stratified(config, source, part)
        return [(ordered[number - 1] + 1, side) for number, side in sides]
    if config.partition.split == "source":
        return [(position + 1, index[position].split or "") for position in ordered]
    return [(position + 1, "") for position in ordered]


def _stratified(config: SimulationConfig, source: str, index: list[Record]) -> list[tuple[int, str]]:
    """A split of one site's records that keeps the labels' shares (of the first task on the source)."""
    if any(record.patient for record in index):
        raise BadInput("partition.split: stratified divides single records; write hash, which keeps patients whole")
    task = next(task for task in config.tasks.values() if task.source == source)
    columns = [task.column] if isinstance(task.column, str) else task.column
    values = task.values or {}
    labels = [tuple(values.get(record.cells[name], record.cells[name]) for name in columns) for record in index]
    counts = {label: labels.count(label) for label in set(labels)}
    stratify = ["|".join(label) for label in labels] if len(counts) > 1 and min(counts.values()) > 2 else None
    # Here: it takes a third of a second, and few simulations need it.
    from sklearn.model_selection import train_test_split

    train, _ = train_test_split(
        np.arange(len(index)),
        train_size=1.0 - config.partition.test_fraction,
        random_state=config.partition.seed,
        shuffle=True,
        stratify=stratify,
    )
    inside = {int(position) for position in train}
    return [(position + 1, "train" if position in inside else "test") for position in range(len(index))]


def read_sites(folder: Path) -> list[SiteConfig]:
    """The sites that `build_sites` wrote."""
    return [load(SiteConfig, path) for path in sorted(folder.glob("*/site.yaml"))]
