"""`simulate choose`: the vote, the public proxy, the table, and one sentence for each bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from client.ledger.ledger import Ledger
from common.plugins import resolve
from common.privacy.exponential import compute_choice_mu
from common.privacy.gaussian import gdp_mu
from common.yaml import load
from server.choice.candidates import CandidateFile
from server.choice.outcome import count_votes
from simulations.__main__ import app
from simulations.choice.choose import choose_backbone
from simulations.config import SimulationConfig

ROOT = Path(__file__).resolve().parents[2]
Choose = Callable[..., Result]
GOOD = {
    "kind": "identity",
    "columns": [{"name": name, "range": [-5, 5], "missing": "refuse"} for name in ("x", "y")],
    "licence": "CC0-1.0",
}
# Of the first column only what lies far to the right, and nothing of the second.
POOR = {"kind": "identity", "columns": [{"name": "x", "range": [4.9, 5], "missing": "refuse"}]}

COVERED = 3.33
"""The largest epsilon of a vote, in hundredths, that a budget of epsilon 10 at delta 1e-5 covers."""


def write(path: Path, values: Any) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def choose(simulation_file: Path, tmp_path: Path) -> Choose:
    """Runs the verb on the small simulation, whose sites declare more than they have, with two candidates."""
    candidates = write(tmp_path / "candidates.yaml", {"candidates": {"poor": POOR, "good": GOOD}})

    def run(*options: str, backbones: Path = candidates) -> Result:
        given = ["choose", str(simulation_file), "--backbones", str(backbones), *options]
        return CliRunner().invoke(app, given)

    return run


def refused(result: Result, exit_code: int, *said: str) -> None:
    assert result.exit_code == exit_code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.output, result.output
    assert all(word in lines[0] for word in said), lines[0]


def test_sites_vote_and_pay_and_the_table_says_so(choose: Choose, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = choose("--epsilon", "6", "--out", str(out), "--set", "budget.epsilon=60", "--json")
    assert result.exit_code == 0, result.output
    choice = json.loads(result.stdout)
    assert (choice["task"], choice["chosen"], choice["by"]) == ("colour", "good", "vote")
    assert choice == json.loads((out / "choice.json").read_text())
    rows = {row["name"]: row for row in choice["rows"]}
    assert rows["good"]["votes"] + rows["poor"]["votes"] == 3 and rows["good"]["votes"] >= 2
    assert (rows["good"]["dimension"], rows["good"]["licence"], rows["poor"]["licence"]) == (2, "CC0-1.0", None)
    assert choice["price"]["epsilon"] == 6.0 and choice["price"]["sensitivity"] == 9.25
    for site, vote in choice["site_votes"].items():
        state = out / "sites" / site / "state"
        assert json.loads((state / "vote.json").read_text()) == {"task": "colour", "vote": vote}
        ledger = Ledger.find(state / "ledgers", f"{site}-registry")
        assert ledger is not None
        (charge,) = ledger.charges()
        assert charge.committed and charge.mechanism.kind == "exponential" and charge.mechanism.choice_epsilon == 6.0
        assert choice["price"]["budget_used"][site] == ledger.history().compute_share() > 0.0


def test_people_read_the_noise_the_price_and_the_licence(choose: Choose) -> None:
    result = choose("--epsilon", "6", "--set", "budget.epsilon=60")
    assert result.exit_code == 0, result.output
    for said in ("votes of 3", "CC0-1.0", "not declared", "pure epsilon 6", "9.25 / 6", "of a site's budget"):
        assert said in result.stdout, result.stdout


def test_too_few_declared_units_are_refused_with_what_is_needed_and_whether_the_budget_covers_it(
    choose: Choose, tmp_path: Path
) -> None:
    """25 x 9.25 / 1 = 231.25; for 48 units 231.25 / 48 = 4.8178 is needed.

    Epsilon 10 at delta 1e-5 is mu 2.0004; 2 log(1 / Phi(-mu / 2) - 1) = 3.337, for which 231.25 / 3.33 = 69.4 units are
    needed; epsilon 60 covers it.
    """
    out = tmp_path / "out"
    mu = gdp_mu(10.0, 1e-5)
    assert compute_choice_mu(COVERED) <= mu < compute_choice_mu(COVERED + 0.01)
    result = choose("--epsilon", "1", "--out", str(out))
    needed = ("at least 232 units", "at most 48", "epsilon 4.82 is needed", "--proxy")
    refused(result, 2, *needed, f"more than the {COVERED} that the budget of epsilon 10 of site-1", "70 units")
    rich = choose("--epsilon", "1", "--out", str(out), "--set", "budget.epsilon=60")
    refused(rich, 2, *needed, "which the budget of epsilon 60 of site-1 covers")
    assert not out.exists()


def test_a_site_that_declares_too_few_is_not_asked(choose: Choose) -> None:
    sizes = "tasks.colour.public_size={site-1: 48, site-2: 48, site-3: 10}"
    result = choose("--epsilon", "6", "--set", sizes, "--set", "budget.epsilon=60", "--json")
    choice = json.loads(result.stdout)
    assert choice["abstained"] == ["site-3"] and set(choice["site_votes"]) == {"site-1", "site-2"}


def test_a_price_above_a_budget_is_refused_before_anything_is_encoded(choose: Choose, tmp_path: Path) -> None:
    """Neither the sites' records nor the public ones are encoded; with the epsilon that fits all goes on."""
    out, proxy = tmp_path / "out", str(write_proxy(tmp_path))
    sizes = ("--set", "tasks.colour.public_size=72")
    result = choose("--epsilon", "6", "--out", str(out), "--proxy", proxy, *sizes)
    refused(result, 1, "--epsilon 6", "the budget of epsilon 10 of site-1", f"largest epsilon that fits is {COVERED}")
    assert "encoding" not in result.stderr and "public proxy" not in result.stderr
    assert not out.exists() and not (tmp_path / "cache").exists()
    held = ("--set", "evaluation={share: 0.5, evaluations: 4}")
    refused(choose("--epsilon", "3", *sizes, *held), 2, "of site-1 covers")
    wide = ("--set", "tasks.colour.public_size=480")
    refused(choose("--epsilon", "3", *wide, *held), 1, "a part is held for evaluations", "fits is 2.3")  # mu / sqrt(2)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
    assert choose("--epsilon", str(COVERED), "--out", str(out), *sizes).exit_code == 0
    assert (out / "choice.json").exists()


def test_the_last_line_names_the_file_of_the_result_and_progress_names_the_candidate(
    choose: Choose, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for options in (("--epsilon", "6", "--set", "budget.epsilon=60"), ("--proxy", str(write_proxy(tmp_path)))):
        shutil.rmtree(out, ignore_errors=True)
        result = choose(*options, "--out", str(out))
        assert result.stdout.splitlines()[-1] == f"results: {out / 'choice.json'}", result.output
        assert (out / "choice.json").exists()
        phase = "public proxy" if "--proxy" in options else "encoding"
        for name in ("poor", "good"):
            assert f"{phase} with {name}: 180 of 180" in result.stderr, result.stderr


@pytest.mark.parametrize("name", ["pictures", "text", "sound"])
def test_the_files_of_candidates_name_at_least_five_kinds_that_exist(name: str) -> None:
    file = load(CandidateFile, ROOT / "configs" / "candidates" / f"{name}.yaml")
    assert len(file.candidates) >= 5
    for key, spec in file.candidates.items():
        resolve("common.backbones", spec, key)


def test_ties_go_to_the_first_of_the_file() -> None:
    assert count_votes(["b", "a", "c", "b", "a"], ["a", "b", "c"]) == "a"
    assert count_votes(["b", "a", "c", "b", "a"], ["c", "b", "a"]) == "b"


def test_the_declared_noise_seed_repeats_a_choice(simulation_file: Path, tmp_path: Path) -> None:
    candidates = write(tmp_path / "candidates.yaml", {"candidates": {"one": GOOD, "other": POOR}})
    config = load(SimulationConfig, simulation_file, ["noise_seed=7", "budget.epsilon=60"])
    twice = [choose_backbone(config, candidates, epsilon=5.0, out=tmp_path / name)[0] for name in ("a", "b")]
    assert twice[0].site_votes == twice[1].site_votes


def write_proxy(tmp_path: Path, **changes: Any) -> Path:
    source = {"kind": "table", "path": str(tmp_path / "rows.csv"), "columns": ["x", "y"]}
    return write(tmp_path / "proxy.yaml", {"source": source, "column": "colour", "labels": ["red", "blue"], **changes})


def test_a_public_proxy_ranks_for_nothing_and_is_named(choose: Choose, tmp_path: Path) -> None:
    result = choose("--proxy", str(write_proxy(tmp_path)), "--json")
    assert result.exit_code == 0, result.output
    choice = json.loads(result.stdout)
    assert (choice["chosen"], choice["by"], choice["price"]) == ("good", "public proxy", None)
    scores = {row["name"]: row["proxy"] for row in choice["rows"]}
    assert scores["good"]["accuracy"] > 0.8 > scores["poor"]["accuracy"] and scores["good"]["error"] < 0.05
    assert "public proxy" in choose("--proxy", str(write_proxy(tmp_path))).stdout
    assert not list(tmp_path.rglob("ledgers"))


def test_a_proxy_reads_only_the_listed_rows(choose: Choose, tmp_path: Path) -> None:
    """A list names 40 of 180 rows: the standard error is that of 40 records. A list that names row 181 is refused."""
    rows = tmp_path / "listed.csv"
    source = {"kind": "table", "path": str(tmp_path / "rows.csv"), "columns": ["x", "y"], "rows": str(rows)}
    proxy = write_proxy(tmp_path, source=source)
    rows.write_text("row,split\n" + "".join(f"{row},train\n" for row in range(1, 41)))
    choice = json.loads(choose("--proxy", str(proxy), "--json").stdout)
    score = choice["rows"][1]["proxy"]
    assert score["error"] == pytest.approx((score["accuracy"] * (1 - score["accuracy"]) / 40) ** 0.5)
    rows.write_text("row,split\n1,train\n181,train\n")
    refused(choose("--proxy", str(proxy)), 2, "source.rows: row 2", "expected a row of the source")


def test_a_proxy_beside_a_vote_does_not_decide(choose: Choose, tmp_path: Path) -> None:
    result = choose("--epsilon", "6", "--set", "budget.epsilon=60", "--proxy", str(write_proxy(tmp_path)), "--json")
    assert json.loads(result.stdout)["by"] == "vote"


def test_bad_input_is_one_sentence(choose: Choose, tmp_path: Path) -> None:
    refused(choose(), 2, "--epsilon", "--proxy")
    refused(choose("--epsilon", "6", "--task", "size"), 2, "--task", "colour", "size")
    refused(choose("--epsilon", "0"), 2, "--epsilon")
    refused(choose("--proxy", str(write_proxy(tmp_path, labels=["red", "green"]))), 2, "labels", "'blue'")
    few = choose("--proxy", str(write_proxy(tmp_path, labels=["red", "blue", "lilac"])))
    refused(few, 2, "at least 5", "'lilac'")
    assert "public proxy with" not in few.stderr
    refused(choose("--proxy", str(write_proxy(tmp_path, column="size"))), 2, "column", "'size'")
    one = write(tmp_path / "one.yaml", {"candidates": {"good": GOOD}})
    refused(choose("--epsilon", "6", backbones=one), 2, "candidates")
    scorer = write(tmp_path / "s.yaml", {"candidates": {"a": GOOD, "b": POOR}, "scorer": {"kind": "rigde"}})
    refused(choose("--epsilon", "6", backbones=scorer), 2, "scorer.kind", "nearest", "ridge")
    refused(choose("--epsilon", "6", backbones=tmp_path / "none.yaml"), 2, "none.yaml")


def test_a_simulation_of_a_vote_as_a_run_is_refused(simulation_file: Path) -> None:
    changes = ("run.choice={}", "run.rounds=1", "run.backbone=null", "run.privacy.noise_multiplier=null")
    more = ("run.backbones={a: {kind: identity, dim: 2}, b: {kind: identity, dim: 2}}", "run.privacy.target_epsilon=6")
    sets = [word for change in (*changes, *more) for word in ("--set", change)]
    refused(CliRunner().invoke(app, ["run", str(simulation_file), *sets]), 2, "run.choice", "simulate choose")


def test_a_candidate_that_does_not_fit_the_modality_is_named(choose: Choose, tmp_path: Path) -> None:
    spectrum = {"kind": "log_mel", "sample_rate": 8000, "bands": 12, "range_hz": [60, 3800]}
    wrong = write(tmp_path / "wrong.yaml", {"candidates": {"good": GOOD, "sound": spectrum}})
    result = choose("--epsilon", "6", "--set", "budget.epsilon=60", backbones=wrong)
    refused(result, 2, "candidates.sound", "none of")
    refused(choose("--proxy", str(write_proxy(tmp_path)), backbones=wrong), 2, "candidates.sound", "none of them")
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
