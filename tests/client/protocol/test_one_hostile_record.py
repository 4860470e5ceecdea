"""Under `on_bad_record: skip` one record more, whatever it holds, changes no answer of a site and no other unit."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client.config import SiteConfig
from client.data.prepare import open_units
from client.data.units import Units
from client.protocol.evaluate import sum_statistics
from client.protocol.join import join
from client.protocol.site import Site, joined_run
from common.events import RunPrepared, read_site_journal
from common.model.backbones import open_backbones
from common.privacy.lattice import Lattice
from common.privacy.noise import os_entropy
from common.run import ONLY_BACKBONE, RunConfig
from common.types import BadInput
from tests.tiny import TASKS, give_backbone, offered, run_config, site_config

INPUTS = [f"x{number}" for number in range(4)]
HEADER = ["id", "split", *INPUTS, "size"]
GOOD = [[f"p{n}", ["train", "test"][n % 3 == 0], 1, 2, 3, n, ["small", "large"][n % 2]] for n in range(30)]
HOSTILE: dict[str, list[Any]] = {
    "a patient on both sides": ["p1", "test", 1, 2, 3, 4, "small"],
    "a patient on both sides, trained on": ["p0", "train", 1, 2, 3, 4, "small"],
    "another word as the side": ["p99", "validation", 1, 2, 3, 4, "small"],
    "text where a number stands": ["p99", "train", 1, 2, "x", 4, "small"],
    "an infinite number": ["p99", "train", "inf", 2, 3, 4, "small"],
    "a number beyond all bounds": ["p99", "train", "9" * 400, 2, 3, 4, "small"],
    "no patient id": ["", "train", 1, 2, 3, 4, "small"],
    "an unknown label": ["p99", "train", 1, 2, 3, 4, "huge"],
    "a label of a null character": ["p99", "train", 1, 2, 3, 4, "\0"],
    "a copy of a record that is held out": ["p99", "train", 1, 2, 3, 0, "small"],
    "nothing but blanks": [" ", " ", " ", " ", " ", " ", " "],
}


def table_site(folder: Path, rows: list[list[Any]], unit: str) -> SiteConfig:
    """A site whose table holds the rows; the last one may be the hostile one."""
    folder.mkdir()
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([HEADER, *rows])
    source = {"kind": "table", "path": str(folder / "rows.csv"), "columns": INPUTS, "split": "split"}
    task = {"source": "rows", "label": "size", "missing": "skip", "unmapped": "refuse", "public_size": 40}
    return site_config(
        folder,
        "north",
        unit=unit,
        sources={"rows": {**source, "patient": "id"}},
        tasks={"size": task},
        split={"test_fraction": 0.2},
        on_bad_record="skip",
    )


def table_run(unit: str) -> RunConfig:
    columns = [{"name": name, "range": [0, 100], "missing": "refuse"} for name in INPUTS]
    return run_config(
        backbone={"kind": "identity", "columns": columns},
        tasks={"size": TASKS["size"]},
        privacy={"unit": unit, "delta": 1e-5, "noise_multiplier": 2.0},
    )


def prepared_site(config: SiteConfig, run: RunConfig) -> Site:
    """The site after preparing a run, and after it was offered a second one."""
    site, frozen = Site(config, os_entropy), open_backbones(run)[ONLY_BACKBONE]
    join(site, offered("first", run, frozen))
    give_backbone(site, "first", frozen)
    join(site, offered("second", run, frozen))
    return site


def parts_of(site: Site, side: Any) -> list[bytes]:
    """Returns the records of each unit of a side, in any order."""
    units: Units = open_units(joined_run(site, "first").folder / "data", side, ["size"], torch.device("cpu"))
    records = units.tasks["size"]
    assert records.unit_R.unique().tolist() == list(range(units.num_units))
    parts = []
    for unit in range(units.num_units):
        of_unit = records.unit_R == unit
        tensors = (records.features_RD, records.labels, records.mask_R, records.weight_R)
        parts.append(b"".join(tensor[of_unit].numpy().tobytes() for tensor in tensors))
    return sorted(parts)


@pytest.mark.parametrize("unit", ["patient", "example"])
@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_one_record_changes_no_answer_and_no_other_unit(tmp_path: Path, unit: str, hostile: list[Any]) -> None:
    run = table_run(unit)
    # The neighbours differ by a whole unit: what else the patient has goes with the record.
    others = [row for row in GOOD if unit == "example" or row[0] != hostile[0]]
    without = prepared_site(table_site(tmp_path / "a", others, unit), run)
    with_it = prepared_site(table_site(tmp_path / "b", [*GOOD, hostile], unit), run)
    for side in ("train", "test"):
        left, more = parts_of(without, side), parts_of(with_it, side)
        for part in left:
            more.remove(part)
        assert len(more) <= 1


def test_a_record_that_is_used_all_the_same_is_listed_and_not_counted_as_left_out(tmp_path: Path) -> None:
    config = table_site(tmp_path / "a", [*GOOD, HOSTILE["a patient on both sides"]], "patient")
    site = prepared_site(config, table_run("patient"))
    [prepared] = [
        event for event in read_site_journal(config.state_dir / "site.jsonl") if isinstance(event, RunPrepared)
    ]
    assert prepared.num_left_out == 0
    assert len((joined_run(site, "first").folder / "problems.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("on_bad_record", ["skip", "stop"])
def test_a_file_that_is_gone_declines_a_preparation_and_stops_no_later_one(tmp_path: Path, on_bad_record: str) -> None:
    run = table_run("example")
    config = table_site(tmp_path / "a", GOOD, "example").model_copy(update={"on_bad_record": on_bad_record})
    site, frozen = Site(config, os_entropy), open_backbones(run)[ONLY_BACKBONE]
    join(site, offered("first", run, frozen))
    rows = tmp_path / "a" / "rows.csv"
    rows.rename(tmp_path / "elsewhere.csv")
    with pytest.raises(BadInput, match=r"rows\.csv: expected a readable table"):
        give_backbone(site, "first", frozen)
    (tmp_path / "elsewhere.csv").rename(rows)
    join(site, offered("second", run, frozen))
    give_backbone(site, "second", frozen)


def test_one_record_that_is_trained_on_moves_an_evaluation_by_nothing(tmp_path: Path) -> None:
    """60 equal pictures are held out; one training record that equals them once removed them all."""
    sums = []
    for name, more in (("a", 0), ("b", 1)):
        folder = tmp_path / name
        folder.mkdir()
        train = np.concatenate([np.arange(80).reshape(20, 4), np.zeros((more, 4))]).astype(np.float32)
        test = np.concatenate([np.zeros((60, 4)), np.ones((3, 4))]).astype(np.float32)
        arrays = {"train_x": train, "test_x": test}
        for part, array in list(arrays.items()):
            arrays[part.replace("_x", "_colour")] = np.array(["red"] * len(array))
            arrays[part.replace("_x", "_size")] = np.array(["small"] * len(array))
        np.savez(folder / "north.npz", **arrays)
        run = run_config()
        site = prepared_site(site_config(folder, "north", on_bad_record="skip"), run)
        joined = joined_run(site, "first")
        tasks = joined.tasks(site.config)
        units = open_units(joined.folder / "data", "test", list(tasks), torch.device("cpu"))
        assert units.num_units == 63
        lattice = Lattice.of(1.0, 2.0)
        sums.append(torch.cat([sum_statistics(tasks[t].head(4), tasks[t], units.tasks[t], lattice) for t in tasks]))
    assert torch.equal(*sums)
