"""`simulate choose --by moments`: a unit pays one Gaussian release, only totals are used, and too few are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import Result
from typer.testing import CliRunner

from client.data.units import TaskRecords, Units
from client.ledger.ledger import Ledger
from client.protocol.site import Site
from common.model.backbones import open_pretrained
from common.privacy.gaussian import gdp_epsilon, gdp_mu
from common.privacy.noise import os_entropy
from common.tasks import LabelPrior, open_task
from simulations.__main__ import app
from simulations.choice.candidates import Candidate
from simulations.choice.moments import plan_question, score_candidates
from tests.simulations.test_choose import GOOD, POOR
from tests.tiny import run_config, site_config

SECURE = [
    "run.trust=secure_sum",
    "run.colluding=1",
    "run.cohort.min_sites=3",
    "run.solver={kind: head_sum, clip_norm: 1}",
]
Choose = Callable[..., Result]


@pytest.fixture
def choose(simulation_file: Path, tmp_path: Path) -> Choose:
    """Runs the verb by moments on the small simulation, with two candidates."""
    candidates = tmp_path / "candidates.yaml"
    candidates.write_text(yaml.safe_dump({"candidates": {"poor": POOR, "good": GOOD}}))

    def run(*options: str, settings: list[str] = SECURE) -> Result:
        set_ = [word for setting in settings for word in ("--set", setting)]
        given = ["choose", str(simulation_file), "--backbones", str(candidates), "--by", "moments", *set_, *options]
        return CliRunner().invoke(app, given)

    return run


def refused(result: Result, exit_code: int, *said: str) -> None:
    assert result.exit_code == exit_code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.output, result.output
    assert all(word in lines[0] for word in said), lines[0]


def test_the_better_candidate_is_chosen_and_each_site_pays_one_release_of_its_share(
    choose: Choose, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = choose("--epsilon", "8", "--out", str(out), "--json")
    assert result.exit_code == 0, result.output
    choice = json.loads(result.stdout)
    assert (choice["chosen"], choice["by"], choice["site_votes"]) == ("good", "moments", {})
    assert choice == json.loads((out / "choice.json").read_text())
    scores = {row["name"]: row["moments"] for row in choice["rows"]}
    assert scores["good"]["accuracy"] > scores["poor"]["accuracy"] + 0.2
    mu = gdp_mu(8.0, 1e-5)
    # 144 units, 3 shares of 1 / sqrt(2), 2 candidates, half of the units.
    noise = (1 / mu) * (3 / 2) ** 0.5 * 2**0.5 / 72
    assert noise < scores["poor"]["error"] < (noise**2 + 0.25 / 72) ** 0.5 * 1.001
    for number in (1, 2, 3):
        ledger = Ledger.find(out / "sites" / f"site-{number}" / "state" / "ledgers", f"site-{number}-registry")
        assert ledger is not None
        (charge,) = ledger.charges()
        mechanism = charge.mechanism
        assert charge.committed and (mechanism.kind, mechanism.steps, mechanism.sensitivity) == ("gaussian", 1, 1.0)
        assert mechanism.noise_multiplier == pytest.approx(1 / mu) and mechanism.noise_share == pytest.approx(2**-0.5)
        assert (mechanism.min_sites, mechanism.colluding) == (3, 1)
        assert ledger.spent().spent_epsilon == pytest.approx(8.0, rel=1e-4)
    shown = " ".join(choose("--epsilon", "8").stdout.split())
    assert "accuracy, noised" in shown and "one Gaussian release of mu" in shown and "±" in shown


def test_what_noise_would_decide_is_refused_and_nobody_is_asked(choose: Choose, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(choose("--epsilon", "0.5", "--out", str(out)), 2, "--epsilon 0.5", "got 144", "--proxy")
    assert not out.exists()


def test_the_epsilon_that_is_needed_is_enough_and_compared_with_the_budget(choose: Choose, tmp_path: Path) -> None:
    """144 units x mu / (2 classes x sqrt(2 candidates x 3 sites / 2)) is 25 at mu = .6014."""
    needed = math.ceil(100 * gdp_epsilon(25 * 2 * 3**0.5 / 144, 1e-5)) / 100
    said = f"for which epsilon {needed} is needed"
    refused(choose("--epsilon", "0.5"), 2, said, "which the budget of epsilon 10 of site-1 covers")
    poor = choose("--epsilon", "0.5", "--set", "budget.epsilon=2")
    refused(poor, 2, said, "more than the 2 that the budget of epsilon 2 of site-1 covers", "units are needed")
    assert choose("--epsilon", str(needed)).exit_code == 0
    refused(choose("--epsilon", str(needed - 0.01)), 2, said)


def test_a_price_above_a_budget_is_refused_before_anything_is_encoded(choose: Choose, tmp_path: Path) -> None:
    out = tmp_path / "out"
    poor = choose("--epsilon", "8", "--set", "budget.epsilon=7.5", "--out", str(out))
    refused(poor, 1, "--epsilon 8", "the budget of epsilon 7.5 of site-1", "largest epsilon that fits is 7.5")
    assert not out.exists() and not (tmp_path / "cache").exists()


def test_a_run_that_does_not_sum_securely_is_refused(choose: Choose) -> None:
    refused(choose("--epsilon", "8", settings=[]), 2, "--by moments", "trust: secure_sum", "--by vote")


def test_units_that_are_counted_are_not_those_of_the_means(tmp_path: Path) -> None:
    """Each unit has a feature of its own: its class is told where it is among the means, and else guessed."""
    num_units, rng = 30, np.random.default_rng(0)
    labels_R = torch.from_numpy(rng.permutation(np.arange(num_units) % 2))
    ones_R = torch.ones(num_units, dtype=torch.bool)
    records = TaskRecords.of(torch.eye(num_units), labels_R, ones_R, torch.arange(num_units), num_units)
    opened = open_task({"kind": "classification", "labels": ["a", "b"]}, "colour")
    assert isinstance(opened, LabelPrior)
    backbone = open_pretrained({"kind": "identity", "dim": num_units}, "backbone")
    candidate = Candidate("only", backbone)
    run = run_config(
        trust="secure_sum",
        colluding=0,
        cohort={"min_sites": 2},
        solver={"kind": "head_sum", "clip_norm": 1.0},
        privacy={"unit": "example", "delta": 1e-5, "target_epsilon": 90.0},
    )
    question = plan_question(run, opened, "colour", [candidate], 90.0)
    site = Site(site_config(tmp_path, "east", budget={"epsilon": 1000.0, "delta": 1e-5}), os_entropy)
    units = Units(num_units, {"only": records})
    scores = [score_candidates(question, [(site, units)], f"run-{draw}")["only"].accuracy for draw in range(8)]
    # Of 15 units in the second half, at 40 declared ones: a half of them by chance, all where they were in the first.
    assert 0.2 < np.mean(scores) < 0.55
