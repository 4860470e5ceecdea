"""A simulation shows personal heads beside federated and local ones, on each site's own held-out records."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from rich.console import Console

from client.personal.adopt import compare_model
from client.personal.evaluate import compare
from client.protocol.site import Site
from common.events import ALONE, ALONE_ADAPTED, ALONE_NOT_PRIVATE, FEDERATED, PERSONAL, PERSONAL_UNIFORM
from common.privacy.noise import os_entropy
from common.types import BadInput
from common.yaml import load
from server.reports.tables import render_summary
from simulations.config import SimulationConfig
from simulations.experiment import run
from simulations.partition import build_sites, read_sites
from simulations.sweep import sweep


def test_each_kind_of_heads_is_judged_at_home_and_averaged(simulation_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = run(simulation_file, overrides=["personal=fit", "noise_seed=1"], out=out)
    task = summary.tasks["colour"]
    assert task.personal == "fit"
    assert list(task.at_home) == [FEDERATED, PERSONAL, ALONE, ALONE_NOT_PRIVATE, ALONE_ADAPTED]
    # The federated head is the same everywhere: pooled over sites it is what the summary says of it.
    assert task.at_home[FEDERATED].pooled == task.metrics
    assert task.at_home[FEDERATED].per_site == task.per_site
    personal = task.at_home[PERSONAL]
    values = [metrics["accuracy"] for metrics in personal.per_site.values()]
    assert personal.mean["accuracy"] == pytest.approx(sum(value or 0.0 for value in values) / 3)
    low, high = personal.mean_intervals["accuracy"] or (1.0, 0.0)
    assert low < (personal.mean["accuracy"] or 0.0) < high
    site = read_sites(out / "sites")[0]
    own = compare(Site(site, os_entropy)).tasks["colour"][PERSONAL]
    assert own["accuracy"].value == personal.per_site[site.name]["accuracy"], "the site's own command says the same"
    console = Console(width=140)
    with console.capture() as shown:
        console.print(render_summary(summary))
    assert "personal" in shown.get() and "95 % interval" in shown.get()


def test_without_the_key_nothing_is_compared(simulation_file: Path, tmp_path: Path) -> None:
    summary = run(simulation_file, out=tmp_path / "out")
    assert summary.tasks["colour"].at_home == {}
    assert not list(tmp_path.rglob("personal_heads.private"))


def test_a_sweep_writes_them_to_its_table(simulation_file: Path, tmp_path: Path) -> None:
    config = load(SimulationConfig, simulation_file)
    assert config.personal == "none"
    path, _ = sweep(simulation_file, ["personal=prior", "sweep={seeds: [1]}"], tmp_path / "sweep", lambda *_: None)
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "accuracy"]
    assert 0.0 < float(rows[0]["at home: personal"]) <= 1.0


AUTO = [
    "run.solver={kind: auto}",
    "run.aggregation=null",
    "run.tasks.colour.head={centre: false}",
    "run.moments={classes: 0.2, scatter: 0.2}",
    "personal=adapt",
    "noise_seed=1",
]


def test_sites_that_adapt_are_shown_with_their_own_mix_and_for_equal_classes(
    simulation_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    task = run(simulation_file, overrides=AUTO, out=out).tasks["colour"]
    assert task.personal == "adapt"
    assert list(task.at_home) == [FEDERATED, PERSONAL, PERSONAL_UNIFORM, ALONE, ALONE_NOT_PRIVATE]
    assert (task.at_home[PERSONAL].mean["balanced_accuracy"] or 0.0) > 0.7
    assert (task.at_home[PERSONAL_UNIFORM].mean["balanced_accuracy"] or 0.0) > 0.7
    assert set(task.alignments) == set(task.at_home[PERSONAL].per_site)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.moments={classes: 0.2}", "run.moments.scatter: expected a share above 0 for `personal: adapt`"),
        ("run.moments=null", "run.moments.classes: expected a share above 0"),
        ("aligners=[{kind: mean_sdt}]", "aligners.0.kind: expected one of .* got 'mean_sdt' .nearest: 'mean_std'"),
    ],
)
def test_an_adaptation_that_the_run_does_not_allow_is_refused_before_it_begins(
    simulation_file: Path, tmp_path: Path, override: str, words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        run(simulation_file, overrides=[*AUTO, override], out=tmp_path / "out")


def test_a_site_that_is_left_out_adapts_by_what_the_others_released(simulation_file: Path, tmp_path: Path) -> None:
    """The simulation says the same as the site's own command with the model of the run."""
    out = tmp_path / "out"
    name = read_sites_of(simulation_file, tmp_path)[-1]
    summary = run(simulation_file, overrides=[*AUTO, f"leave_out={name}"], out=out)
    task = summary.tasks["colour"]
    assert list(task.at_home) == [FEDERATED, PERSONAL, PERSONAL_UNIFORM]
    assert set(task.at_home[PERSONAL].per_site) == {name}
    assert task.at_home[FEDERATED].pooled == task.metrics
    (site,) = (each for each in read_sites(out / "sites") if each.name == name)
    compared = compare_model(Site(site, os_entropy), out)
    own = compared.tasks["colour"]
    assert task.alignments == {name: compared.alignments["colour"]} and compared.alignments["colour"]
    console = Console(width=200, record=True)
    console.print(render_summary(summary))
    assert f"{name} took for colour: {task.alignments[name]}" in " ".join(console.export_text().split())
    for kind in (FEDERATED, PERSONAL, PERSONAL_UNIFORM):
        assert own[kind]["accuracy"].value == task.at_home[kind].per_site[name]["accuracy"]
    with pytest.raises(BadInput, match="personal: expected none, prior, fit or adapt beside `leave_out`"):
        run(simulation_file, overrides=[f"leave_out={name}", "personal=tied"], out=tmp_path / "tied")


def read_sites_of(simulation_file: Path, tmp_path: Path) -> list[str]:
    """Names of a simulation's sites."""
    return [site.name for site in build_sites(load(SimulationConfig, simulation_file), tmp_path / "built")]
