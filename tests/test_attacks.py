"""Attacks that once moved a sum by more than a site paid for, or made a site answer by what one record held.

Each is played as its author played it, against today's site: a coordinator that knows every other record and chooses
heads for it; a training record that removes others' held-out records; one record that makes a site decline.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from client.data.prepare import open_units
from client.data.quantised import QuantisedRows
from client.data.units import TaskRecords, Units
from client.protocol.evaluate import sum_statistics
from client.protocol.join import join
from client.protocol.site import Site, joined_run
from client.solvers import open_solver
from common.model.backbones import open_backbones
from common.model.parameters import MAX_ROW_NORM
from common.plugins import Spec
from common.privacy.lattice import Lattice
from common.privacy.noise import NoiseStream, os_entropy
from common.run import ONLY_BACKBONE
from common.tasks import open_task
from common.types import Plan, Unit
from tests.tiny import TASKS, backbone, give_backbone, offered, run_config, site_config

# Shapes: R records, D features.


class Silent(NoiseStream):
    """A stream whose noise is zero."""

    def rounded_gaussian(self, count: int, log2_deviation: int) -> NDArray[np.int64]:
        """Returns zeros."""
        return np.zeros(count, np.int64)


def sum_with(weight: Tensor, features_RD: Tensor) -> Tensor:
    """Returns the clipped sum of one step on normal records, without noise, in clip norms."""
    task = open_task({"kind": "anomaly", "normal": "n", "anomalous": "a"}, "t")
    head, count = task.head(features_RD.shape[1]), len(features_RD)
    head.weight.data = weight[None].clone()
    labels, mask = torch.zeros(count, dtype=torch.long), torch.ones(count, dtype=torch.bool)
    units = Units(count, {"t": TaskRecords.of(features_RD, labels, mask, torch.arange(count), count)})
    rate = float(weight.abs().max())  # Else the step is lost beside weights as large as these.
    solver = open_solver(
        Spec.model_validate({"kind": "dp_gd", "steps": 1, "clip_norm": 1.0, "learning_rate": rate}), "s"
    )
    plan = Plan(1.0, 1, 1.0, 1.0, Unit.EXAMPLE)
    delta = solver.solve({"t": head}, {"t": task}, units, plan=plan, public_sizes={"t": 1}, stream=Silent(bytes(32)))
    return torch.from_numpy(delta.heads["t"]["weight"]).double().flatten() / -rate


@pytest.mark.parametrize("copies", [False, True], ids=["distinct", "copies"])
def test_chosen_heads_do_not_let_one_record_flip_the_gradients_of_others(copies: bool) -> None:
    """Weights orthogonal to three records, so large that rounding decides the sign of these records' gradients.

    Outputs of the last rows of a product used to depend on the number of rows; this moved the sum by six clip norms.
    """
    count, features = 103, 128
    generator = torch.Generator().manual_seed(0)
    others = functional.normalize(torch.randn(count, features, generator=generator).abs(), dim=1)
    if copies:
        others[-3:] = others[-1].clone()
    more = functional.normalize(torch.randn(1, features, generator=generator).abs(), dim=1)
    together = QuantisedRows.of(torch.cat([others, more])).decode()
    known = others[-1:].double() if copies else others[-3:].double()
    projector = torch.eye(features, dtype=torch.double) - torch.linalg.pinv(known) @ known
    for _ in range(20):
        weight = (projector @ torch.randn(features, generator=generator, dtype=torch.double)).float()
        weight *= 0.999 * MAX_ROW_NORM / weight.norm()
        moved = sum_with(weight, together) - sum_with(weight, together[:-1])
        assert float(moved.norm()) <= 1.0 + 1e-5  # Updates are float32.


def test_a_training_record_removes_nobodys_held_out_records(tmp_path: Path) -> None:
    """Sixty held-out records are blank, and so is one record more to train on, which used to remove them all."""
    sums = [blank_statistics(tmp_path / name, more) for name, more in (("a", 0), ("b", 1))]
    assert torch.equal(*sums)


def blank_statistics(folder: Path, more: int) -> Tensor:
    """Returns the evaluation's sums, without noise, of a site with so many blank records more to train on."""
    folder.mkdir()
    parts: dict[str, Any] = {
        "train": np.concatenate([np.arange(80.0).reshape(20, 4), np.zeros((more, 4))]),
        "test": np.concatenate([np.zeros((60, 4)), np.ones((3, 4))]),
    }
    arrays = {f"{part}_x": rows.astype(np.float32) for part, rows in parts.items()}
    arrays |= {f"{part}_colour": np.array(["red"] * len(rows)) for part, rows in parts.items()}
    arrays |= {f"{part}_size": np.array(["small"] * len(rows)) for part, rows in parts.items()}
    np.savez(folder / "north.npz", **arrays)
    site, frozen = Site(site_config(folder, "north", on_bad_record="skip"), os_entropy), backbone()
    join(site, offered("r", run_config(), frozen))
    give_backbone(site, "r", frozen)
    tasks = joined_run(site, "r").tasks(site.config)
    units = open_units(joined_run(site, "r").folder / "data", "test", list(tasks), torch.device("cpu"))
    assert units.num_units == 63
    lattice = Lattice.of(len(TASKS) ** 0.5, 1.0)
    return torch.cat([sum_statistics(task.head(4), task, units.tasks[name], lattice) for name, task in tasks.items()])


GOOD = [
    [f"p{row}", "train" if row % 3 else "test", "1", "2", "3", str(row), ["small", "large"][row % 2]]
    for row in range(30)
]
ONE_RECORD: dict[str, list[list[str]]] = {
    "one patient on both sides": [["p1", "test", "1", "2", "3", "4", "small"]],
    "a split cell says validation": [["p99", "validation", "1", "2", "3", "4", "small"]],
    "a number is text": [["p99", "train", "1", "2", "x", "4", "small"]],
    "a blank patient": [["", "train", "1", "2", "3", "4", "small"]],
    "an unknown label": [["p99", "train", "1", "2", "3", "4", "huge"]],
    "an infinite number": [["p99", "train", "inf", "2", "3", "4", "small"]],
    "a null byte": [["p9\x009", "train", "1", "2", "3", "4", "small"]],
    "a quote": [['p"9', "train", "1", "2", "3", "4", "small"]],
}


@pytest.mark.parametrize("record", ONE_RECORD)
def test_no_single_record_makes_a_site_decline(tmp_path: Path, record: str) -> None:
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "split", "x0", "x1", "x2", "x3", "size"], *GOOD, *ONE_RECORD[record]])
    columns = [{"name": f"x{column}", "range": [0, 100], "missing": "refuse"} for column in range(4)]
    run = run_config(
        backbone={"kind": "identity", "columns": columns},
        tasks={"size": TASKS["size"]},
        privacy={"unit": "patient", "delta": 1e-5, "noise_multiplier": 2.0},
    )
    source = {
        "kind": "table",
        "path": str(tmp_path / "rows.csv"),
        "columns": [column["name"] for column in columns],
        "patient": "id",
        "split": "split",
    }
    labels = {"source": "rows", "label": "size", "missing": "skip", "unmapped": "refuse", "public_size": 40}
    config = site_config(
        tmp_path,
        "north",
        unit="patient",
        sources={"rows": source},
        tasks={"size": labels},
        split={"test_fraction": 0.2},
        on_bad_record="skip",
    )
    site, frozen = Site(config, os_entropy), open_backbones(run)[ONLY_BACKBONE]
    join(site, offered("r", run, frozen))
    give_backbone(site, "r", frozen)
    assert not (config.state_dir / "stopped.txt").exists()
    join(site, offered("next", run, frozen))
