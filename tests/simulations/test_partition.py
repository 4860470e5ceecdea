"""From one data set to sites: every record in exactly one, patients whole, both splits everywhere, reproducible."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.config import SiteConfig
from common.types import BadInput
from common.yaml import parse
from simulations.config import SimulationConfig
from simulations.partition import build_sites, read_sites
from tests.tiny import run_config


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 rows of 60 patients, three colours, a ward and a split column."""
    path = tmp_path_factory.mktemp("data") / "rows.csv"
    rng = np.random.default_rng(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["x", "colour", "patient", "ward", "side"])
        for row in range(240):
            patient = row % 60
            colour = ["red", "green", "blue"][patient % 3]
            side = "test" if patient % 5 == 0 else "train"
            writer.writerow([f"{rng.normal():.6f}", colour, f"p{patient}", f"Ward {patient % 2}", side])
    return path


def simulation(table: Path, partition: dict[str, Any], **changes: Any) -> SimulationConfig:
    unit = changes.get("unit", "example")
    run = run_config(
        tasks={"colour": {"kind": "classification", "labels": ["red", "green", "blue"]}},
        privacy={"unit": unit, "delta": 1e-5, "noise_multiplier": 2.0},
        backbone={"kind": "identity", "columns": [{"name": "x", "range": [-4, 4], "missing": "refuse"}]},
    )
    values: dict[str, Any] = {
        "run": run.model_dump(mode="json", exclude_none=True),
        "sources": {
            "rows": {
                "kind": "table",
                "path": str(table),
                "columns": ["x"],
                "patient": "patient",
                "split": "side",
            }
        },
        "tasks": {"colour": {"source": "rows", "label": "colour", "missing": "refuse", "public_size": 50}},
        "partition": partition,
        "unit": unit,
        "budget": {"epsilon": 10.0, "delta": 1e-5},
        "cache_dir": "cache",
        "runs_dir": "runs",
    }
    return parse(SimulationConfig, {**values, **changes}, base=table.parent)


def rows_of(site: SiteConfig) -> list[tuple[int, str]]:
    path = Path(str(site.sources["rows"].model_dump()["rows"]))
    with path.open() as file:
        return [(int(line["row"]), line["split"]) for line in csv.DictReader(file)]


PARTITIONS: list[dict[str, Any]] = [
    {"kind": "iid", "num_sites": 4, "split": "source"},
    {"kind": "iid", "num_sites": 4, "split": "hash"},
    {"kind": "dirichlet", "num_sites": 4, "alpha": 0.3, "by": "colour", "split": "source"},
]


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("unit", ["example", "patient"])
def test_every_record_is_in_exactly_one_site(tmp_path: Path, table: Path, partition: dict[str, Any], unit: str) -> None:
    sites = build_sites(simulation(table, partition, unit=unit), tmp_path)
    held = [row for site in sites for row, _ in rows_of(site)]
    assert sorted(held) == list(range(1, 241))


@pytest.mark.parametrize("partition", PARTITIONS[:1] + PARTITIONS[2:])
def test_a_patients_records_stay_together(tmp_path: Path, table: Path, partition: dict[str, Any]) -> None:
    sites = build_sites(simulation(table, partition, unit="patient"), tmp_path)
    owners: dict[int, set[str]] = {}
    for site in sites:
        for row, _ in rows_of(site):
            owners.setdefault((row - 1) % 60, set()).add(site.name)
    assert all(len(names) == 1 for names in owners.values())


def test_iid_sites_have_equal_shares_of_train_and_test(tmp_path: Path, table: Path) -> None:
    sites = build_sites(simulation(table, PARTITIONS[0]), tmp_path)
    assert [Counter(side for _, side in rows_of(site)) for site in sites] == [Counter(train=48, test=12)] * 4


def test_dirichlet_skews_labels_and_gives_train_and_test_the_same_skew(tmp_path: Path, table: Path) -> None:
    sites = build_sites(simulation(table, PARTITIONS[2]), tmp_path)
    shares = {}
    for side in ("train", "test"):
        counts = np.array(
            [[sum(r % 3 == c for r, s in rows_of(site) if s == side) for c in (1, 2, 0)] for site in sites]
        )
        shares[side] = counts / counts.sum(axis=0)
    assert shares["train"].max() > 0.5  # Even shares would be 0.25.
    np.testing.assert_allclose(shares["train"], shares["test"], atol=0.07)


def test_a_stratified_split_keeps_the_labels_shares(tmp_path: Path, table: Path) -> None:
    source = {"rows": {"kind": "table", "path": str(table), "columns": ["x"]}}
    partition = {"kind": "iid", "num_sites": 2, "split": "stratified", "test_fraction": 0.25}
    for site in build_sites(simulation(table, partition, sources=source), tmp_path):
        for colour in range(3):
            sides = [side for row, side in rows_of(site) if (row - 1) % 60 % 3 == colour]
            assert sides.count("test") == pytest.approx(0.25 * len(sides), abs=1)


@pytest.mark.parametrize(
    "partition", [{"kind": "iid", "split": "stratified"}, {"kind": "dirichlet", "alpha": 1.0, "by": "m"}]
)
def test_masks_one_of_them_bad_are_divided_as_records_without_a_label(
    tmp_path: Path, partition: dict[str, Any]
) -> None:
    lines = ["image,mask", *(f"a{number}.npy,m{number}.npy" for number in range(12))]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    values = simulation(tmp_path, {"num_sites": 2, "test_fraction": 0.25, **partition}).model_dump(
        mode="json", exclude_none=True
    )
    values["sources"] = {"rows": {"kind": "manifest", "path": str(tmp_path / "list.csv"), "masks": ["mask"]}}
    values["run"]["tasks"] = {"m": {"kind": "segmentation", "labels": ["a", "b"], "side": 2}}
    values["tasks"] = {"m": {"source": "rows", "label": "mask", "missing": "skip", "public_size": 5}}
    sites = build_sites(SimulationConfig.model_validate(values), tmp_path / "sites")
    assert sum(len(read_cells(Path(str(site.sources["rows"].settings()["rows"])))) for site in sites) == 12


def read_cells(table: Path) -> list[dict[str, str]]:
    with table.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("unit", ["example", "patient"])
def test_a_thinned_cell_keeps_its_part_of_the_training_records_and_all_that_are_held_out(
    tmp_path: Path, table: Path, unit: str
) -> None:
    partition = {"kind": "iid", "num_sites": 4, "split": "source", "thin": {"rows": {"colour": {"red": 0.25}}}}
    cells = read_cells(table)
    everything = Counter((row["colour"], row["side"]) for row in cells)
    kept = []
    for seed in (0, 0, 1):
        sites = build_sites(simulation(table, {**partition, "seed": seed}, unit=unit), tmp_path / f"{unit}-{len(kept)}")
        rows = [row for site in sites for row in rows_of(site)]
        assert len(rows) == len(set(rows))
        kept.append(sorted(number for number, _ in rows))
        counted = Counter((cells[number - 1]["colour"], side) for number, side in rows)
        assert counted == {**everything, ("red", "train"): everything["red", "train"] // 4}
    assert kept[0] == kept[1] != kept[2]


def test_thinning_that_leaves_nothing_out_is_refused(tmp_path: Path, table: Path) -> None:
    partition = {"kind": "iid", "num_sites": 4, "split": "source"}
    config = simulation(table, {**partition, "thin": {"rows": {"colour": {"pink": 0.5}}}})
    with pytest.raises(BadInput, match=r"^partition\.thin\.rows\.colour\.pink: expected training records with it"):
        build_sites(config, tmp_path / "sites")
    with pytest.raises(BadInput, match=r"^partition\.thin\.others: expected one of the file's sources \(rows\)"):
        simulation(table, {**partition, "thin": {"others": {"colour": {"red": 0.5}}}})
    with pytest.raises(BadInput, match=r"partition\.thin: expected `split: source`"):
        simulation(table, {**partition, "split": "hash", "thin": {"rows": {"colour": {"red": 0.5}}}})


def test_a_partition_is_reproducible_and_depends_on_its_seed(tmp_path: Path, table: Path) -> None:
    def held(folder: str, seed: int) -> list[list[tuple[int, str]]]:
        config = simulation(table, {**PARTITIONS[0], "seed": seed})
        return [rows_of(site) for site in build_sites(config, tmp_path / folder)]

    assert held("a", 1) == held("b", 1)
    assert held("a2", 1) != held("c", 2)


def test_a_column_makes_one_site_for_each_value(tmp_path: Path, table: Path) -> None:
    values = simulation(table, {"kind": "column", "by": "ward", "split": "hash"})
    config = values.model_copy(
        update={
            "tasks": {
                "colour": values.tasks["colour"],
                "ward": values.tasks["colour"].model_copy(update={"label": "ward"}),
            }
        }
    )
    sites = build_sites(config, tmp_path)
    assert [site.name for site in sites] == ["ward-0", "ward-1"]
    assert [len(rows_of(site)) for site in sites] == [120, 120]


def test_natural_sites_bring_their_own_sources(tmp_path: Path, table: Path) -> None:
    source = simulation(table, PARTITIONS[0]).sources["rows"].model_dump()
    partition = {"kind": "natural", "sites": {"north": {"rows": source}, "south": {"rows": source}}}
    sites = build_sites(simulation(table, partition, sources={}), tmp_path)
    assert [site.name for site in sites] == ["north", "south"]


DIVIDED = {
    "kind": "natural",
    "split": "source",
    "divide": {"rows": {"north": "all", "south": {"colour": ["red", "blue"]}}},
}


def test_a_natural_partition_deals_a_shared_source_out_to_the_sites_that_have_it(tmp_path: Path, table: Path) -> None:
    other = simulation(table, PARTITIONS[0]).sources["rows"].model_dump()
    config = simulation(table, {**DIVIDED, "sites": {"west": {"other": other}}})
    elsewhere = config.tasks["colour"].model_copy(update={"source": "other"})
    run = config.run.model_copy(update={"tasks": {**config.run.tasks, "hue": config.run.tasks["colour"]}})
    sites = build_sites(config.model_copy(update={"run": run, "tasks": {**config.tasks, "hue": elsewhere}}), tmp_path)
    assert {site.name: sorted(site.tasks) for site in sites} == {
        "north": ["colour"],
        "south": ["colour"],
        "west": ["hue"],
    }
    north, south = (dict(rows_of(site)) for site in sites[:2])
    assert Counter(north.values()) == Counter(train=96, test=24)
    assert not set(north) & set(south)
    # Rows 1, 4, 7, ... are red, 2, 5, 8, ... green: two of three of the other half are left to the south.
    assert set(south) == {row for row in set(range(1, 241)) - set(north) if row % 3 != 2}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"divide": {"other": {"north": "all"}}},
            r"partition\.divide\.other: expected one of the file's sources \(rows\)",
        ),
        ({"kind": "iid", "num_sites": 2}, "partition.divide: expected it in kind natural"),
        (
            {"divide": {"rows": {"north": {"nothing": ["red"]}}}},
            "divide.rows.north: expected one of the source's columns",
        ),
        (
            {"divide": {"rows": {"north": {"colour": ["pink"]}}}},
            "divide.rows.north: expected a site that keeps at least",
        ),
        ({"divide": {"rows": {}}}, "partition.divide.rows"),
    ],
)
def test_a_source_that_cannot_be_divided_is_refused(
    tmp_path: Path, table: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        build_sites(simulation(table, {**DIVIDED, **changes}), tmp_path)


def test_a_task_at_a_site_without_its_source_is_refused(tmp_path: Path, table: Path) -> None:
    task = {"source": "other", "label": "colour", "missing": "refuse", "public_size": 50, "sites": ["north"]}
    config = simulation(table, DIVIDED, tasks={"colour": task})
    with pytest.raises(BadInput, match=r"tasks\.colour\.source: expected a source of site north \(rows\), got 'other'"):
        build_sites(config, tmp_path)


def test_written_site_files_are_read_back_equal(tmp_path: Path, table: Path) -> None:
    sites = build_sites(simulation(table, PARTITIONS[0]), tmp_path)
    assert [site.model_dump() for site in read_sites(tmp_path)] == [site.model_dump() for site in sites]


@pytest.mark.parametrize(
    ("partition", "tasks", "said"),
    [
        ({"kind": "iid", "num_sites": 2}, {"sites": ["site-9"]}, "tasks.colour.sites: expected sites among"),
        (
            {"kind": "iid", "num_sites": 2},
            {"public_size": {"site-1": 5}},
            "tasks.colour.public_size: expected a number",
        ),
        ({"kind": "iid", "num_sites": 2}, {"sites": ["site-1"]}, "site 'site-2' has none"),
        ({"kind": "dirichlet", "num_sites": 2, "alpha": 1.0, "by": "nothing"}, {}, "partition.by: expected a task"),
        ({"kind": "column", "by": "nothing"}, {}, "partition.by: expected one of the source's columns"),
    ],
)
def test_a_partition_that_cannot_be_made_says_why(
    tmp_path: Path, table: Path, partition: dict[str, Any], tasks: dict[str, Any], said: str
) -> None:
    task = {"source": "rows", "label": "colour", "missing": "refuse", "public_size": 50, **tasks}
    with pytest.raises(BadInput, match=said):
        build_sites(simulation(table, partition, tasks={"colour": task}), tmp_path)


def test_a_kind_without_its_settings_is_refused(table: Path) -> None:
    with pytest.raises(BadInput, match=r"partition\.alpha: expected a value for kind 'dirichlet'"):
        simulation(table, {"kind": "dirichlet", "num_sites": 2, "by": "colour"})


def test_a_group_of_an_unknown_site_is_refused(tmp_path: Path, table: Path) -> None:
    config = simulation(table, PARTITIONS[0])
    grouped = config.run.aggregation.model_copy(update={"balance": {"coast": ["site-1", "site-9"]}})
    config = config.model_copy(update={"run": config.run.model_copy(update={"aggregation": grouped})})
    with pytest.raises(BadInput, match="aggregation.balance: expected sites among .*'site-9'"):
        build_sites(config, tmp_path)
