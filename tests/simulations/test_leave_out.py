"""A site that is left out trains nothing and spends nothing, and judges the heads alone."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import yaml

from client.ledger.ledger import Ledger
from client.protocol.site import Site
from common.events import EpsilonSpent, read_run_journal, select_events
from common.privacy.noise import os_entropy
from common.types import BadInput
from common.yaml import load
from simulations.config import SimulationConfig
from simulations.experiment import run, write_files
from simulations.partition import read_sites
from simulations.plan import plan_simulation
from simulations.sweep import sweep

SITES = ("east", "north", "west")


@pytest.fixture
def opposite_file(simulation_file: Path, tmp_path: Path) -> Path:
    """Three sites of 90 rows: at `west` each colour is what the other is elsewhere, and rare ones are frequent."""
    rng = np.random.default_rng(0)
    values = yaml.safe_load(simulation_file.read_text())
    for site in SITES:
        with (tmp_path / f"{site}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["x", "y", "colour"])
            for _ in range(90):
                red = rng.random() < 0.7
                x, y = rng.normal(size=2) * 0.5 + (2.0 if red else -2.0)
                writer.writerow([f"{x:.4f}", f"{y:.4f}", "red" if red == (site != "west") else "blue"])
    table = {"kind": "table", "columns": ["x", "y"]}
    values["partition"] = {
        "kind": "natural",
        "split": "stratified",
        "test_fraction": 0.3,
        "sites": {site: {"rows": {**table, "path": f"{site}.csv"}} for site in SITES},
    }
    del values["sources"]
    values["run"]["privacy"] = "non_private"
    values["run"]["solver"] = {"kind": "sgd", "sampling_rate": 1.0, "steps": 4, "learning_rate": 4.0}
    values["leave_out"] = "west"
    path = tmp_path / "opposite.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def test_heads_and_baselines_are_judged_by_the_unseen_site_alone(opposite_file: Path, tmp_path: Path) -> None:
    names = ["baseline_prediction", "local", "non_private", "central"]
    summary = run(opposite_file, out=tmp_path / "out", overrides=[f"baselines={names}"])
    result = summary.tasks["colour"]
    assert set(result.per_site) == {"west"}
    assert result.metrics == result.per_site["west"]
    # Whoever learned from west would be right there.
    for metrics in (result.metrics, *(result.baselines[name] for name in names)):
        accuracy = metrics["accuracy"]
        assert accuracy is not None and accuracy < 0.4
    every = run(opposite_file, out=tmp_path / "every", overrides=["leave_out=null"]).tasks["colour"]
    assert set(every.per_site) == set(SITES)


def test_an_unseen_site_releases_nothing(simulation_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(simulation_file, out=out, overrides=["leave_out=site-2"])
    charges = {}
    for site in read_sites(out / "sites"):
        ledger: Ledger = Site(site, os_entropy).ledger()
        charges[site.name] = len(ledger.history().charges)
    assert charges["site-2"] == 0 and charges["site-1"] == charges["site-3"] == 3
    spent = select_events(read_run_journal(out / "journal.jsonl"), EpsilonSpent)
    assert {each.site for each in spent} == {"site-1", "site-3"}


def test_heads_do_not_depend_on_the_unseen_sites_records(opposite_file: Path, tmp_path: Path) -> None:
    heads = []
    for name in ("before", "after"):
        run(opposite_file, out=tmp_path / name)
        heads.append((tmp_path / name / "model" / "heads" / "colour.safetensors").read_bytes())
        lines = (tmp_path / "west.csv").read_text().splitlines()
        (tmp_path / "west.csv").write_text("\n".join(lines[:60]) + "\n")
    assert heads[0] == heads[1]


def test_a_sweep_leaves_out_each_in_turn(opposite_file: Path, tmp_path: Path) -> None:
    overrides = ["leave_out=null", f"sweep={{seeds: [1], values: {{leave_out: [{', '.join(SITES)}]}}}}"]
    _, rows = sweep(opposite_file, overrides, tmp_path / "sweep", lambda phase, done, total: None)
    assert [row.values["leave_out"] for row in rows] == list(SITES)
    assert rows[2].mean < 0.4  # The others disagree about west.


def test_a_plan_is_made_for_the_sites_that_train(simulation_file: Path) -> None:
    assert [each.site for each in plan_simulation(load(SimulationConfig, simulation_file, ["leave_out=site-1"]))] == [
        "site-2",
        "site-3",
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["leave_out=site-9"], "leave_out: expected one of the sites site-1, site-2, site-3, got 'site-9'"),
        (["leave_out=site-1", "partition.num_sites=1"], "leave_out: .* beside another that trains, got 'site-1'"),
    ],
)
def test_what_cannot_be_left_out_is_refused(
    simulation_file: Path, tmp_path: Path, overrides: list[str], expected: str
) -> None:
    with pytest.raises(BadInput, match=expected):
        run(simulation_file, out=tmp_path / "out", overrides=overrides)


def test_files_for_a_run_that_all_join_are_refused(simulation_file: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="leave_out"):
        write_files(load(SimulationConfig, simulation_file, ["leave_out=site-1"]), tmp_path / "files")
