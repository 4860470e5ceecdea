"""The partition of data sets into simulated sites: each site is a site file, and a list of rows for each source.

Invariant: rows are assigned by unit, so that all records of a patient go to one site.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from client.config import Allow, SecureSum, SiteConfig, SiteTask, Split
from client.data.drawn import is_drawn
from client.data.sources import SourceRecord, open_source
from client.data.sources.parts.boundary import try_record
from common.inputs import normalise_patient_id
from common.plugins import Spec
from common.run import RunConfig
from common.secure_sum.identity import format_public_key, write_identity
from common.types import BadInput, Unit
from common.yaml import load, write_yaml
from simulations.config import Keep, Partition, SimulatedTask, SimulationConfig

Row = tuple[int, str]
"""Position of a record in its source's index, from 1, and its split: "train", "test", or "" where it has none."""

Assignment = dict[str, dict[str, list[Row]]]
"""Site name -> source name -> rows."""


@dataclass(frozen=True)
class Layout:
    """The sources of every site and, where a source is divided, the rows that each site holds.

    Attributes:
        sources: site name -> source name -> settings of the source.
        rows: rows of the divided sources.
    """

    sources: Mapping[str, Mapping[str, Spec]]
    rows: Assignment


def build_sites(config: SimulationConfig, folder: Path, *, non_private: bool = False) -> list[SiteConfig]:
    """Writes a site file for every simulated site and returns the sites in order of their names.

    Args:
        config: the simulation.
        folder: folder that receives `<site>/site.yaml` and the rows, and later the site's state with its ledger: a
            simulation that is repeated never exhausts a budget.
        non_private: whether these sites accept a run without privacy.

    Raises:
        BadInput: the partition leaves a site without any of its tasks' sources, or names unknown sites.
    """
    layout = _lay_out_natural(config) if config.partition.kind == "natural" else lay_out_divided(config)
    names = sorted(layout.sources)
    check_site_names(config, names)
    sums: dict[str, SecureSum] = {}
    if config.run.trust is not None:
        sums = _make_sums(config.run, [name for name in names if name != config.leave_out], folder)
    return [_write_site(config, layout, name, folder / name, sums.get(name), non_private) for name in names]


def _make_sums(run: RunConfig, names: list[str], folder: Path) -> dict[str, SecureSum]:
    """Returns the section `secure_sum` of each site's file, with a new identity key for each."""
    assert run.colluding is not None  # The run file has looked.
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.identity" for name in names}
    roster = {name: format_public_key(write_identity(path)) for name, path in paths.items()}
    try:
        return {
            name: SecureSum(identity=path, roster=roster, min_sites=run.cohort.min_sites, colluding=run.colluding)
            for name, path in paths.items()
        }
    except ValidationError as error:
        raise BadInput(
            f"run.cohort.min_sites: expected at most the {len(names)} sites of the partition in a secure sum, and at "
            f"least 2 sites, got {run.cohort.min_sites}"
        ) from error


def list_sources(config: SimulationConfig) -> dict[str, Spec]:
    """Returns the settings of every source that a simulation names, by key path."""
    named = {f"sources.{name}": spec for name, spec in config.sources.items()}
    for site, sources in (config.partition.sites or {}).items():
        named |= {f"partition.sites.{site}.{name}": spec for name, spec in sources.items()}
    return named


def check_site_names(config: SimulationConfig, names: list[str]) -> None:
    """Raises BadInput where the simulation names a site that is not one of these."""
    if config.leave_out is not None and (config.leave_out not in names or len(names) == 1):
        others = " beside another that trains" if len(names) == 1 else ""
        raise BadInput(f"leave_out: expected one of the sites {', '.join(names)}{others}, got {config.leave_out!r}")
    adjustments = [config.run.aggregation.select_adjustment(name) for name in config.run.tasks]
    grouped = {site for each in adjustments for sites in each.groups.values() for site in sites}
    if not grouped <= set(names):
        strange = sorted(grouped - set(names))[0]
        raise BadInput(f"run.aggregation.balance: expected sites among {', '.join(names)}, got {strange!r}")
    for task_name, task in config.tasks.items():
        for key, listed in (("sites", task.sites), ("public_size", task.public_size)):
            unknown = set(listed if isinstance(listed, (list, dict)) else ()) - set(names) - {"all"}
            if unknown:
                raise BadInput(
                    f"tasks.{task_name}.{key}: expected sites among {', '.join(names)}, got {sorted(unknown)[0]!r}"
                )


def _write_site(
    config: SimulationConfig, layout: Layout, name: str, folder: Path, secure_sum: SecureSum | None, non_private: bool
) -> SiteConfig:
    folder.mkdir(parents=True)
    tasks = {
        task_name: _make_site_task(task, task_name, name)
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
        sources[source_name] = make_site_source(layout.sources[name][source_name], source_name, rows, folder)
    return write_site_file(config, name, folder, sources, tasks, secure_sum=secure_sum, non_private=non_private)


def write_site_file(
    config: SimulationConfig,
    name: str,
    folder: Path,
    sources: Mapping[str, Spec],
    tasks: Mapping[str, SiteTask],
    *,
    secure_sum: SecureSum | None = None,
    non_private: bool = False,
) -> SiteConfig:
    """Writes the file of a simulated site, which accepts any run on what it has, and returns it.

    Args:
        config: the simulation.
        name: name of the site.
        folder: existing folder that receives the file, and later the site's state.
        sources: the site's sources by name.
        tasks: the site's tasks by name.
        secure_sum: the site's part in secure sums; None for none.
        non_private: whether the site accepts a run without privacy.
    """
    explicit = config.partition.split != "hash"
    site = SiteConfig(
        name=name,
        registry=f"{name}-registry",
        unit=config.unit,
        budget=config.budget,
        allow=Allow(tasks="any", backbones="any", solvers="any", non_private=non_private),
        sources=dict(sources),
        tasks=dict(tasks),
        split=Split(test_fraction=0.0 if explicit else config.partition.test_fraction, salt=str(config.partition.seed)),
        on_bad_record=config.on_bad_record,
        evaluation=config.evaluation,
        approval="automatic",
        personal=config.personal,
        aligners=config.aligners,
        secure_sum=secure_sum,
        ledger_dir=folder / "state" / "ledgers",
        state_dir=folder / "state",
        cache_dir=config.cache_dir,
        device=config.device,
        precision=config.precision,
        cache_bits=config.cache_bits,
    )
    write_yaml(folder / "site.yaml", site)
    return site


def _make_site_task(task: SimulatedTask, task_name: str, site: str) -> SiteTask:
    size = task.public_size
    if isinstance(size, dict):
        if site not in size:
            raise BadInput(f"tasks.{task_name}.public_size: expected a number for site {site!r}, got nothing")
        size = size[site]
    values = task.model_dump(exclude={"sites", "public_size"})
    return SiteTask(**values, public_size=size)


def make_site_source(spec: Spec, name: str, rows: list[Row] | None, folder: Path) -> Spec:
    """Returns a source as a site's file names it, with the list of the site's rows beside the file.

    Args:
        spec: the source in the simulation file.
        name: name of the source.
        rows: rows of the site; None for all.
        folder: folder that receives the list.
    """
    kind = open_source(spec, f"sources.{name}")
    # Opened settings have absolute paths, so that the site file may lie in any folder.
    settings: dict[str, Any] = kind.model_dump(mode="json", exclude_none=True)  # type: ignore[attr-defined]
    if rows is not None:
        path = folder / f"rows-{name}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("row", "split"), *rows])
        settings["rows"] = str(path)
    return Spec(**settings)


# --- rows of each site -----------------------------------------------------------------------------------------------


def _lay_out_natural(config: SimulationConfig) -> Layout:
    """Returns sites with sources of their own, and their parts of the sources under `divide`."""
    own = config.partition.sites or {}
    rows: Assignment = {}
    if config.partition.split == "stratified":
        for site, sources in own.items():
            rows[site] = {
                name: _split_stratified(config, name, _load_index(spec, f"partition.sites.{site}.{name}"))
                for name, spec in sources.items()
            }
    layout = {site: dict(sources) for site, sources in own.items()}
    for name, sites in config.partition.divide.items():
        index = _load_index(config.sources[name], f"sources.{name}")
        groups = _list_groups(config, name, index)
        for site, positions in _deal_evenly(config.partition, index, groups, list(sites)).items():
            kept = _select_kept(index, positions, sites[site], f"partition.divide.{name}.{site}")
            layout.setdefault(site, {})[name] = config.sources[name]
            rows.setdefault(site, {})[name] = _add_splits(config, name, index, kept)
    return Layout(layout, rows)


def _select_kept(index: list[SourceRecord], positions: list[int], keep: Keep, key: str) -> list[int]:
    """Returns the positions of records that have one of the listed cells in each listed column.

    Args:
        index: all records of the source.
        positions: positions in the index that the site was dealt.
        keep: column -> cells to keep, or "all".
        key: key of `keep` in the simulation file, for messages.
    """
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


def lay_out_divided(config: SimulationConfig) -> Layout:
    """Returns sites that share all sources, each with rows of its own."""
    if not config.sources:
        raise BadInput("sources: expected at least one source to divide into sites, got nothing")
    rows: Assignment = {}
    for name, spec in config.sources.items():
        index = _load_index(spec, f"sources.{name}")
        groups = _list_groups(config, name, index)
        for site, positions in _assign(config, name, index, groups).items():
            rows.setdefault(site, {})[name] = _add_splits(config, name, index, positions)
    return Layout({site: config.sources for site in rows}, rows)


def _load_index(spec: Spec, key: str) -> list[SourceRecord]:
    return open_source(spec, key).open().index()


def _list_groups(config: SimulationConfig, name: str, index: list[SourceRecord]) -> list[list[int]]:
    """Returns groups of positions that stay together, without those of a source that `partition.thin` leaves out."""
    groups = _group_by_unit(index, config.unit)
    left_out: set[int] = set()
    for column, parts in config.partition.thin.get(name, {}).items():
        for cell, part in parts.items():
            rows = [
                at for at, record in enumerate(index) if record.split == "train" and record.cells.get(column) == cell
            ]
            if not rows:
                raise BadInput(f"partition.thin.{name}.{column}.{cell}: expected training records with it, got none")
            rng = np.random.default_rng([config.partition.seed, len(rows)])
            left_out |= {rows[i] for i in rng.permutation(len(rows))[max(1, round(part * len(rows))) :]}
    kept = [[position for position in group if position not in left_out] for group in groups]
    return [group for group in kept if group]


def _group_by_unit(index: list[SourceRecord], unit: Unit) -> list[list[int]]:
    """Returns groups of positions that stay together: the records of a patient, or single records."""
    if unit is Unit.EXAMPLE:
        return [[position] for position in range(len(index))]
    by_patient: dict[str, list[int]] = {}
    for position, record in enumerate(index):
        by_patient.setdefault(normalise_patient_id(record.patient or "") or f"\0{position}", []).append(position)
    return list(by_patient.values())


def _assign(
    config: SimulationConfig, source: str, index: list[SourceRecord], groups: list[list[int]]
) -> dict[str, list[int]]:
    """Returns site name -> positions of its records in one source, by the kind of the partition."""
    partition = config.partition
    if partition.kind == "column":
        return _assign_by_column(partition, index, groups)
    assert partition.num_sites is not None
    width = len(str(partition.num_sites))
    names = [f"site-{number:0{width}d}" for number in range(1, partition.num_sites + 1)]
    if partition.kind == "iid":
        return _deal_evenly(partition, index, groups, names)
    chosen: dict[str, list[int]] = {name: [] for name in names}
    proportions: dict[str, np.ndarray] = {}
    for side, groups_there in _split_groups(partition, index, groups).items():
        labels = _read_labels(config, source, index, groups_there)
        rng = np.random.default_rng([partition.seed, len(side)])
        for label in sorted(set(labels)):
            if label not in proportions:
                proportions[label] = rng.dirichlet([partition.alpha or 1.0] * len(names))
            members = [group for group, own in zip(groups_there, labels, strict=True) if own == label]
            for name, positions in _deal_by_proportion(members, names, proportions[label], rng).items():
                chosen[name] += positions
    return chosen


def _split_groups(
    partition: Partition, index: list[SourceRecord], groups: list[list[int]]
) -> dict[str, list[list[int]]]:
    """Returns the groups of each split where the source names splits, so that every site has records of all."""
    parts: dict[str, list[list[int]]] = {}
    for group in groups:
        side = index[group[0]].split or "" if partition.split == "source" else ""
        parts.setdefault(side, []).append(group)
    return dict(sorted(parts.items()))


def _deal_evenly(
    partition: Partition, index: list[SourceRecord], groups: list[list[int]], names: Sequence[str]
) -> dict[str, list[int]]:
    """Returns site name -> positions, dealt out unit by unit after shuffling."""
    chosen: dict[str, list[int]] = {name: [] for name in names}
    for side, groups_there in _split_groups(partition, index, groups).items():
        rng = np.random.default_rng([partition.seed, len(side)])
        order = [groups_there[i] for i in rng.permutation(len(groups_there))]
        for number, name in enumerate(names):
            chosen[name] += [position for group in order[number :: len(names)] for position in group]
    return chosen


def _assign_by_column(partition: Partition, index: list[SourceRecord], groups: list[list[int]]) -> dict[str, list[int]]:
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


def _read_labels(
    config: SimulationConfig, source: str, index: list[SourceRecord], groups: list[list[int]]
) -> list[str]:
    task_name = config.partition.by or ""
    task = config.tasks.get(task_name)
    if task is None or task.source != source or not isinstance(task.label, str):
        raise BadInput(f"partition.by: expected a task with one label column in source {source!r}, got {task_name!r}")
    return [_read_label(index[group[0]], task.label) for group in groups]


def _read_label(record: SourceRecord, column: str) -> str:
    """Returns a label by which records are divided; masks and boxes are no two alike, and count as a missing one."""
    cell, _ = try_record(lambda: record.cells[column])
    return "" if cell is None or is_drawn(cell) else cell


def _deal_by_proportion(
    groups: list[list[int]], names: Sequence[str], proportions: np.ndarray, rng: np.random.Generator
) -> dict[str, list[int]]:
    """Returns site name -> positions of the groups of one label.

    The proportions are one draw of Dirichlet(alpha) for each label, the same for train and test (Hsu et al. 2019).

    Args:
        groups: groups of positions with the label.
        names: names of the sites.
        proportions: float64 [number of sites], the part of the groups that each site receives; they sum to 1.
        rng: generator that shuffles the groups.
    """
    order = [groups[i] for i in rng.permutation(len(groups))]
    cuts = np.round(np.cumsum(proportions)[:-1] * len(order)).astype(int)
    parts = np.split(np.arange(len(order)), cuts)
    return {name: [position for i in part for position in order[i]] for name, part in zip(names, parts, strict=True)}


def _add_splits(
    config: SimulationConfig, source: str, index: list[SourceRecord], positions: Iterable[int]
) -> list[Row]:
    """Returns the rows of some positions, with the split that each record belongs to."""
    ordered = sorted(positions)
    if config.partition.split == "stratified":
        part = [index[position] for position in ordered]
        sides = _split_stratified(config, source, part)
        return [(ordered[number - 1] + 1, side) for number, side in sides]
    if config.partition.split == "source":
        return [(position + 1, index[position].split or "") for position in ordered]
    return [(position + 1, "") for position in ordered]


def _split_stratified(config: SimulationConfig, source: str, index: list[SourceRecord]) -> list[Row]:
    """Returns rows split so that both parts have the label frequencies of the first task on the source."""
    if any(record.patient for record in index):
        raise BadInput("partition.split: stratified divides single records; write hash, which keeps patients whole")
    task = next(task for task in config.tasks.values() if task.source == source)
    labels = [tuple(task.read_cell(name, _read_label(record, name)) for name in task.columns) for record in index]
    counts = {label: labels.count(label) for label in set(labels)}
    stratify = ["|".join(label) for label in labels] if len(counts) > 1 and min(counts.values()) > 2 else None
    # Imported here: it takes a third of a second, and few simulations need it.
    from sklearn.model_selection import train_test_split

    train, _ = train_test_split(
        np.arange(len(index)),
        train_size=1.0 - config.partition.test_fraction,
        random_state=config.partition.seed,
        shuffle=True,
        stratify=stratify,
    )
    in_train = {int(position) for position in train}
    return [(position + 1, "train" if position in in_train else "test") for position in range(len(index))]


def read_sites(folder: Path) -> list[SiteConfig]:
    """Returns the sites that `build_sites` wrote to a folder, in order of their names."""
    return [load(SiteConfig, path) for path in sorted(folder.glob("*/site.yaml"))]
