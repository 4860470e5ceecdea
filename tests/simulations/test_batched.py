"""The `batched` executor makes the heads of `in_process`, to the bit, and charges as it does."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from client.solvers.dp_gd import DpGd
from client.solvers.parts.many_sites import Trained
from common.events import (
    BaselineEvaluated,
    EpsilonSpent,
    HeadsEvaluated,
    MetricsEvaluated,
    MomentsMeasured,
    RoundEnded,
    RoundEvaluated,
    SiteRejected,
    Summary,
    read_run_journal,
    select_events,
)
from common.model.backbones import open_backbones
from common.privacy.noise import SeededEntropy
from common.types import BadInput, RunFailed
from common.yaml import load
from server.rounds.loop import run_federation
from server.rounds.messenger import Answers
from simulations.check import check_simulation
from simulations.config import SimulationConfig
from simulations.evidence import collect_simulation_evidence
from simulations.executors import encoded
from simulations.executors.batched import BatchedSites
from simulations.executors.gathered import build_for_executor
from simulations.executors.in_process import InProcessGrid
from simulations.executors.shards import LocalShards
from simulations.experiment import run
from simulations.federate import Experiment, open_batched, open_on

ROOT = Path(__file__).resolve().parents[2]
DP_GD = "{kind: dp_gd, steps: %d, clip_norm: 1.0, learning_rate: 4.0, momentum: 0.5, weight_decay: 0.01}"
ONE_STEP = ["run.rounds=2", f"run.solver={DP_GD % 1}"]
SAMPLED = "{kind: dp_gd, sampling_rate: 0.4, steps: 3, clip_norm: 1.0, learning_rate: 4.0}"
TWO_TASKS = (
    "run.tasks={colour: {kind: classification, labels: [red, blue]}, x: {kind: regression, range: [-5, 5]}}",
    "tasks={colour: {source: rows, label: colour, missing: refuse, public_size: 48}, "
    "x: {source: rows, label: x, missing: refuse, public_size: {site-1: 40, site-3: 50}, sites: [site-1, site-3]}}",
)


RELEASES = (MomentsMeasured, HeadsEvaluated, RoundEvaluated, MetricsEvaluated, BaselineEvaluated, EpsilonSpent)
"""Events that a run has in common whatever executes it, but for times."""


def list_facts(folder: Path) -> list[dict[str, Any]]:
    """Returns what a run's journal says of releases and metrics."""
    events = read_run_journal(folder / "journal.jsonl")
    listed = [each for kind in RELEASES for each in select_events(events, kind)]
    return [each.model_dump(mode="json", exclude={"time", "seconds"}) for each in listed]


def read_heads(folder: Path) -> dict[str, dict[str, bytes]]:
    """Returns the bytes of a run's final heads."""
    heads = (folder / "model" / "heads").iterdir()
    return {path.name: {name: array.tobytes() for name, array in load_file(path).items()} for path in heads}


def open_sites(config: SimulationConfig, folder: Path) -> tuple[Experiment, BatchedSites]:
    """Returns a simulation and its sites as arrays, without running anything."""
    backbones = open_backbones(config.run, "run.")
    tasks = open_on(config.run, check_simulation(config), backbones)
    experiment = Experiment(config, tasks, backbones, folder, SeededEntropy(5), lambda phase, done, total: None)
    (site,) = build_for_executor(config, folder / "sites")
    return experiment, open_batched(experiment, config.run, site, backbones, folder.name)


def federate_sites(experiment: Experiment, sites: BatchedSites) -> dict[str, dict[str, bytes]]:
    """Runs the federation alone and returns the bytes of its final heads."""
    outcome = run_federation(
        InProcessGrid(sites.answer, len(sites)),
        experiment.config.run,
        experiment.backbones,
        run_id=experiment.folder.name,
        folder=experiment.folder,
        journal=experiment.journal,
        executor="batched",
        at_hand=sites,
    )
    return {
        f"{group}.safetensors": {key: each.tobytes() for key, each in own.items()}
        for group, own in outcome.heads.items()
    }


def run_on(file: Path, kind: str, folder: Path, overrides: list[str]) -> dict[str, dict[str, bytes]]:
    """Runs a simulation and returns the bytes of its final heads."""
    places = [f"cache_dir={folder / kind / 'cache'}", f"executor.kind={kind}"]
    summary = run(file, overrides=[*overrides, *places], out=folder / kind / "run", entropy=SeededEntropy(5))
    assert summary.status == "completed" and summary.executor == kind
    return read_heads(folder / kind / "run")


def write_patients(file: Path) -> None:
    """Gives the simulation's table three records of each patient, and half of them no usable label."""
    path = file.parent / "rows.csv"
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["x", "y", "colour", "patient"])
        writer.writeheader()
        for number, row in enumerate(rows):
            writer.writerow({**row, "patient": f"p{number * 7 % 60}", "colour": row["colour"] if number % 5 else ""})


@pytest.mark.parametrize(
    "overrides",
    [
        ONE_STEP,
        pytest.param([f"run.solver={DP_GD % 3}"], marks=pytest.mark.slow),
        pytest.param([f"run.solver={SAMPLED}", "run.delta_precision=float16"], marks=pytest.mark.slow),
        pytest.param(["run.solver={kind: head_sum, clip_norm: 1.0}"], marks=pytest.mark.slow),
        pytest.param([*TWO_TASKS, f"run.solver={SAMPLED}"], marks=pytest.mark.slow),
        pytest.param([f"run.solver={DP_GD % 2}", "run.cohort.fraction=0.6"], marks=pytest.mark.slow),
        pytest.param(
            ["run.privacy=non_private", "run.solver={kind: sgd, sampling_rate: 0.5, steps: 2, learning_rate: 1.0}"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["one step", "three steps", "samples", "head_sum", "two tasks", "cohorts", "sgd"],
)
def test_the_heads_are_those_of_in_process_to_the_bit(
    simulation_file: Path, tmp_path: Path, overrides: list[str]
) -> None:
    heads = [run_on(simulation_file, kind, tmp_path, overrides) for kind in ("in_process", "batched")]
    assert heads[0] == heads[1]


MEASURED = ["run.solver={kind: auto}", "run.aggregation=null"]
EVALUATED = ["evaluation={evaluations: 4, share: 0.1}", "run.evaluation={every: 2, calibrate: true}"]
THREE_BASELINES = "baselines=[local, central, baseline_prediction]"


@pytest.mark.parametrize(
    "overrides",
    [
        [*MEASURED, *EVALUATED],
        pytest.param([*ONE_STEP, *TWO_TASKS, *EVALUATED, THREE_BASELINES], marks=pytest.mark.slow),
        pytest.param([*MEASURED, "run.moments={classes: 0.1, scatter: 0.05}"], marks=pytest.mark.slow),
    ],
    ids=["auto, evaluated", "two tasks, baselines", "moments of classes"],
)
def test_measures_evaluations_and_metrics_are_those_of_in_process_to_the_bit(
    simulation_file: Path, tmp_path: Path, overrides: list[str]
) -> None:
    heads = [run_on(simulation_file, kind, tmp_path, overrides) for kind in ("in_process", "batched")]
    facts = [list_facts(tmp_path / kind / "run") for kind in ("in_process", "batched")]
    assert heads[0] == heads[1] and facts[0] == facts[1] and len(facts[0]) > 3


@pytest.mark.parametrize("aggregation", ["{kind: mean}", "{kind: median}"])
def test_shards_have_the_heads_of_one_process_to_the_bit(
    simulation_file: Path, tmp_path: Path, aggregation: str
) -> None:
    """Also where an aggregation needs each update, and where the last shard has fewer sites than the others."""
    overrides = [*ONE_STEP, "executor.kind=batched", "partition.num_sites=4", f"run.aggregation={aggregation}"]
    config = load(SimulationConfig, simulation_file, overrides)
    found = []
    for number in (1, 2, 3):
        (tmp_path / f"run-{number}").mkdir()
        experiment, sites = open_sites(config, tmp_path / f"run-{number}")
        found.append(federate_sites(experiment, BatchedSites(sites.gathering, sites.prepare, LocalShards, number)))
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
def test_patients_have_the_heads_of_in_process_to_the_bit(simulation_file: Path, tmp_path: Path) -> None:
    write_patients(simulation_file)
    patients = ["unit=patient", "run.privacy.unit=patient", "sources.rows.patient=patient", f"run.solver={SAMPLED}"]
    overrides = [*patients, "tasks.colour.missing=skip", "tasks.colour.public_size=16"]
    heads = [run_on(simulation_file, kind, tmp_path, overrides) for kind in ("in_process", "batched")]
    assert heads[0] == heads[1]


@pytest.mark.slow
def test_each_site_has_the_epsilon_and_the_facts_that_it_has_in_process(simulation_file: Path, tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    for kind in ("in_process", "batched"):
        run_on(simulation_file, kind, tmp_path, ONE_STEP)
        events = read_run_journal(tmp_path / kind / "run" / "journal.jsonl")
        rounds = select_events(events, RoundEnded)
        found[kind] = [
            {site: (update.plan, dict(update.weights)) for site, update in each.sites.items()} for each in rounds
        ]
        assert len(rounds) == 2 and all(update.bytes_up > 0 for update in rounds[0].sites.values())
    assert found["in_process"] == found["batched"]


@pytest.mark.parametrize("kind", ["in_process", "batched"])
def test_a_budget_below_the_price_refuses_every_site_before_the_first_round(
    simulation_file: Path, tmp_path: Path, kind: str
) -> None:
    overrides = [*ONE_STEP, "budget.epsilon=1.0", f"executor.kind={kind}"]
    with pytest.raises(RunFailed, match="expected at least 1 site"):
        run(simulation_file, overrides=overrides, out=tmp_path / "run")
    rejected = select_events(read_run_journal(tmp_path / "run" / "journal.jsonl"), SiteRejected)
    assert {(each.site, each.reason) for each in rejected} == {
        (f"site-{number}", "declined: budget") for number in (1, 2, 3)
    }


CRASH = """
import os, signal, sys
from pathlib import Path
from common.privacy.noise import SeededEntropy
from simulations.experiment import run
keys = SeededEntropy(5)
def die_in_round_two(purpose):
    if purpose.endswith("/2"):
        os.kill(os.getpid(), signal.SIGKILL)  # Charged, and no key is drawn yet.
    return keys(purpose)
run(Path(sys.argv[1]), overrides=sys.argv[3:], out=Path(sys.argv[2]), entropy=die_in_round_two)
"""


@pytest.mark.slow
@pytest.mark.parametrize("has_room", [True, False], ids=["room for another charge", "none"])
def test_a_crash_between_charge_and_result_spends_and_releases_nothing(
    simulation_file: Path, tmp_path: Path, has_room: bool
) -> None:
    from simulations.experiment import resume

    budget = "budget.epsilon=20.0" if has_room else "budget.epsilon=8.0"
    overrides = ["executor.kind=batched", f"run.solver={DP_GD % 2}", budget, f"cache_dir={tmp_path / 'cache'}"]
    command = [sys.executable, "-c", CRASH, str(simulation_file), str(tmp_path / "run"), *overrides]
    process = subprocess.run(command, cwd=ROOT, check=False, env=dict(os.environ))
    assert process.returncode == -signal.SIGKILL
    rounds = select_events(read_run_journal(tmp_path / "run" / "journal.jsonl"), RoundEnded)
    assert [each.round for each in rounds] == [1]
    if not has_room:
        # The second round was paid for already: paid twice, the run would exceed the budget that it exhausts.
        with pytest.raises(RunFailed, match="budget"):
            resume(tmp_path / "run", entropy=SeededEntropy(5))
        return
    summary = resume(tmp_path / "run", entropy=SeededEntropy(5))
    whole = run_on(simulation_file, "in_process", tmp_path, overrides[1:])
    assert summary.status == "completed" and read_heads(tmp_path / "run") == whole
    assert all((site.epsilon or 0.0) > 8.0 for site in summary.sites.values()), "four charges of a run of three rounds"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("personal=prior", "personal"),
        ("leave_out=site-1", "leave_out"),
        ("baselines=[untouched]", "baselines"),
        ("partition={kind: natural, divide: {rows: {a: all, b: all}}}", "partition.kind"),
    ],
)
def test_what_it_does_not_take_is_refused_in_a_sentence_that_names_in_process(
    simulation_file: Path, tmp_path: Path, override: str, key: str
) -> None:
    with pytest.raises(BadInput, match=rf"{key}: expected .*`executor.kind: in_process` takes it"):
        run(simulation_file, overrides=["executor.kind=batched", *ONE_STEP, override], out=tmp_path / "run")


KILLED = """
import os, signal, sys
from pathlib import Path
from common.privacy.noise import SeededEntropy
from simulations.experiment import resume, run
keys, journal, mark = SeededEntropy(5), Path(sys.argv[2]) / "journal.jsonl", Path(sys.argv[2] + ".killed")
def die_in_round_two(purpose):
    if purpose.endswith("/2") and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)  # A shard draws its keys once its sites are charged.
    return keys(purpose)
if journal.exists():
    resume(journal.parent, entropy=keys)
else:
    run(Path(sys.argv[1]), overrides=sys.argv[3:], out=journal.parent, entropy=die_in_round_two)
"""


@pytest.mark.slow
def test_a_shard_that_is_killed_is_one_sentence_and_a_resumed_run_has_the_same_heads(
    simulation_file: Path, tmp_path: Path
) -> None:
    overrides = [f"run.solver={DP_GD % 2}", "budget.epsilon=20.0", *EVALUATED, f"cache_dir={tmp_path / 'cache'}"]
    sharded = ["executor.kind=batched", "executor.shards=2", "executor.cpus_per_site=0.5"]
    command = [sys.executable, "-c", KILLED, str(simulation_file), str(tmp_path / "run"), *overrides, *sharded]
    # Each in a process of its own: Ray leaves warnings in the one that starts it.
    process = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    said = process.stderr.splitlines()[-1]
    assert re.search(r"ShardEnded: shard [12] of 2 ended: .*`headwater simulate resume \S+/run` charges it again", said)
    rounds = select_events(read_run_journal(tmp_path / "run" / "journal.jsonl"), RoundEnded)
    assert [each.round for each in rounds] == [1]
    subprocess.run(command, cwd=ROOT, check=True)
    summary = Summary.model_validate_json((tmp_path / "run" / "summary.json").read_text())
    assert summary.status == "completed"
    assert read_heads(tmp_path / "run") == run_on(simulation_file, "in_process", tmp_path, overrides)
    assert all((site.epsilon or 0.0) > 8.0 for site in summary.sites.values()), "round 2 was charged twice"


@pytest.mark.slow
def test_evidence_needs_a_ledger_for_each_site(simulation_file: Path, tmp_path: Path) -> None:
    run_on(simulation_file, "batched", tmp_path, ONE_STEP)
    with pytest.raises(BadInput, match="a ledger each"):
        collect_simulation_evidence(tmp_path / "batched" / "run", attack=False, observe=lambda phase, done, total: None)


@pytest.mark.slow
def test_updates_that_are_too_long_are_rejected_at_the_same_sites(simulation_file: Path, tmp_path: Path) -> None:
    rejected: dict[str, set[tuple[str, str, int | None]]] = {}
    for kind in ("in_process", "batched"):
        overrides = [*ONE_STEP, "run.max_delta_norm=0.6", "partition.num_sites=6", f"executor.kind={kind}"]
        run(simulation_file, overrides=overrides, out=tmp_path / kind, entropy=SeededEntropy(5))
        events = select_events(read_run_journal(tmp_path / kind / "journal.jsonl"), SiteRejected)
        rejected[kind] = {(each.site, each.reason, each.round) for each in events}
    assert rejected["in_process"] == rejected["batched"]
    assert 0 < len(rejected["batched"]) < 12, "some are too long and some are not"


class WrongSolver:
    """Trains a site by itself as `dp_gd` does, and many at once a little differently."""

    kind, private = "dp_gd", True

    def __init__(self, honest: DpGd) -> None:
        self.plan, self.solve, self.check_modules = honest.plan, honest.solve, honest.check_modules
        self.without_privacy, self.example, self._honest = honest.without_privacy, honest.example, honest

    def solve_each(self, *arguments: Any, **named: Any) -> Trained:
        trained = self._honest.solve_each(*arguments, **named)
        return replace(trained, change_SN=trained.change_SN + np.float32(1e-6))


def test_a_site_whose_message_says_something_else_ends_the_run(simulation_file: Path, tmp_path: Path) -> None:
    config = load(SimulationConfig, simulation_file, [*ONE_STEP, "executor.kind=batched"])
    experiment, sites = open_sites(config, tmp_path)
    honest = sites.gathering.solver
    assert isinstance(honest, DpGd)
    wrong = BatchedSites(replace(sites.gathering, solver=WrongSolver(honest)), sites.prepare, LocalShards)
    with pytest.raises(RunFailed, match="not what was computed for it"):
        federate_sites(experiment, wrong)


def test_a_round_of_many_sites_encodes_messages_of_a_few(simulation_file: Path, tmp_path: Path) -> None:
    """The journal has sizes of messages for all sites, though only those of a few were encoded."""
    run_on(simulation_file, "batched", tmp_path, [*ONE_STEP, "executor.encoded_sites=1", "partition.num_sites=20"])
    rounds = select_events(read_run_journal(tmp_path / "batched" / "run" / "journal.jsonl"), RoundEnded)
    assert {len(each.sites) for each in rounds} == {20}
    assert np.unique([update.bytes_up for each in rounds for update in each.sites.values()]).size <= 2


@pytest.mark.parametrize("lacks", ["computed", "answered"])
def test_an_answer_with_other_arrays_than_were_computed_is_different(lacks: str) -> None:
    whole = {"digit": {"weight": np.zeros(3, np.float32), "bias": np.zeros(1, np.float32)}}
    part = {"digit": {"weight": whole["digit"]["weight"]}}
    computed, answered = (part, whole) if lacks == "computed" else (whole, part)
    encoded._refuse_differences(1, Answers({}, [], {}), {7: whole}, {7: whole}, {7: "north"})
    with pytest.raises(RunFailed, match="got another bias"):
        encoded._refuse_differences(1, Answers({}, [], {}), {7: answered}, {7: computed}, {7: "north"})
