"""What a security officer and a data scientist type at one site, and what they read."""

from __future__ import annotations

import json
import logging
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from flwr.app import Message
from typer.testing import CliRunner, Result

from client.__main__ import app
from client.app import make_app
from client.data.exclusions import Exclusions
from client.data.prepare import open_units
from client.protocol.evaluate import evaluate
from client.protocol.join import join
from client.protocol.requirements import feature_dim
from client.protocol.site import Site, SiteDeclined
from client.protocol.train import train
from common import messages
from common.events import RequestDeclined
from common.model.backbones import Backbone, open_backbones, open_random
from common.model.parameters import create_heads, parameters
from common.plugins import Spec
from common.privacy.accounting import Mechanism, compute_epsilon, round_up
from common.privacy.noise import os_entropy
from common.tasks import open_task
from common.types import MAX_ROUND_STEPS, BadInput, Heads, LedgerDamaged
from common.yaml import write_yaml
from simulations.executors.in_process import InProcessGrid
from tests.tiny import TASKS, backbone, give_backbone, offered, run_config, site_config

DELTA = 1e-5
ROUND = Mechanism("gaussian", 2.0, 1.0, 2, 1.0)


@pytest.fixture(scope="module")
def frozen() -> Backbone:
    return backbone()


def heads(frozen: Backbone) -> Heads:
    tasks = {name: open_task(spec, name) for name, spec in TASKS.items()}
    modules = create_heads(tasks, dict.fromkeys(tasks, frozen.feature_dim), 0)
    return {name: parameters(module) for name, module in modules.items()}


def written(folder: Path, **changes: Any) -> Path:
    """A site's file."""
    path = folder / "site.yaml"
    write_yaml(path, site_config(folder, "north", **changes))
    return path


def run_file(folder: Path, **changes: Any) -> Path:
    path = folder / "run.yaml"
    write_yaml(path, run_config(**changes))
    return path


def site_of(folder: Path, **changes: Any) -> Site:
    return Site(site_config(folder, "north", **changes), os_entropy)


def trained(folder: Path, frozen: Backbone, rounds: int = 1) -> Site:
    """A site that answered some rounds of run-1."""
    site = site_of(folder)
    join(site, offered("run-1", run_config(), frozen))
    give_backbone(site, "run-1", frozen)
    for number in range(1, rounds + 1):
        train(site, messages.TrainRequest("run-1", number, heads(frozen)))
    return site


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def said(*arguments: object, code: int = 0) -> Any:
    """The JSON a command prints, and nothing else on stdout."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == code, result.stderr
    return json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def refused(result: Result, code: int) -> str:
    """The one sentence of a command that failed."""
    assert result.exit_code == code
    assert result.stdout == ""
    (sentence,) = result.stderr.strip().splitlines()
    assert sentence.startswith("error: ")
    return sentence


def damage(site: Site) -> None:
    path = site.config.state_dir / "ledgers" / site.config.registry / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"noise_multiplier":2.0', b'"noise_multiplier":9.0'))


@pytest.mark.parametrize("verb", ["budget", "plan", "log", "amend", "recover", "purge"])
def test_every_command_has_an_example(verb: str) -> None:
    result = invoke(verb, "--help")
    assert result.exit_code == 0
    assert f"Example: headwater site {verb} site.yaml" in " ".join(result.stdout.split())


# --- budget ----------------------------------------------------------------------------------------------------------


def test_an_unused_site_has_its_whole_budget_and_asking_creates_nothing(tmp_path: Path) -> None:
    account = said("budget", written(tmp_path))
    assert (account["spent_epsilon"], account["reserved_epsilon"], account["left_epsilon"]) == (0.0, 0.0, 100.0)
    assert (account["registry"], account["unit"], account["relation"]) == ("north-registry", "example", "add_remove")
    assert (account["delta"], account["budget_epsilon"], account["runs"]) == (DELTA, 100.0, [])
    assert not (tmp_path / "north-state").exists()


def test_the_budget_after_rounds_is_their_composed_price_rounded_up(tmp_path: Path, frozen: Backbone) -> None:
    trained(tmp_path, frozen, rounds=2)
    account = said("budget", written(tmp_path))
    truth = compute_epsilon([ROUND] * 2, DELTA)
    assert truth <= account["spent_epsilon"] == account["reserved_epsilon"] <= truth + 1e-4
    assert account["left_epsilon"] <= 100.0 - truth
    (run,) = account["runs"]
    assert (run["run"], run["rounds"], run["charges"], run["open"]) == ("run-1", 2, 2, 0)
    assert "affords" in invoke("budget", tmp_path / "site.yaml").stdout


def test_affordable_rounds_fit_and_one_more_does_not(tmp_path: Path, frozen: Backbone) -> None:
    trained(tmp_path, frozen)
    rounds = said("budget", written(tmp_path))["affordable"]["rounds"]
    # One round is charged; another of the same run is held.
    assert compute_epsilon([ROUND] * (2 + rounds), DELTA) <= 100.0 < compute_epsilon([ROUND] * (3 + rounds), DELTA)
    louder = run_file(tmp_path, privacy={"unit": "example", "delta": DELTA, "noise_multiplier": 1.0})
    assert said("budget", tmp_path / "site.yaml", "--run", louder)["affordable"]["rounds"] < rounds


def test_a_damaged_ledger_is_named_in_one_sentence_by_every_reader(tmp_path: Path, frozen: Backbone) -> None:
    damage(trained(tmp_path, frozen))
    site, run = written(tmp_path), run_file(tmp_path)
    for command in (("budget", site), ("log", site), ("plan", site, run), ("amend", site, "--reason", "x")):
        assert "line 2 of 3 was edited" in refused(invoke(*command), 1)


def test_infinite_epsilon_is_null_with_a_flag(tmp_path: Path) -> None:
    site = site_of(tmp_path)
    noiseless = Mechanism("none", 0.0, 1.0, 1, None)
    site.ledger().reserve(noiseless, run="open", round=1, request="00", allow_infinite=True)
    account = said("budget", written(tmp_path))
    assert (account["reserved_epsilon"], account["infinite"], account["left_epsilon"]) == (None, True, 0.0)


# --- amend and recover -----------------------------------------------------------------------------------------------


def test_an_amendment_is_logged_with_its_reason(tmp_path: Path, frozen: Backbone) -> None:
    trained(tmp_path, frozen)
    raised = written(tmp_path, budget={"epsilon": 120.0, "delta": DELTA})
    assert said("budget", raised)["amendment_due"]
    assert invoke("amend", raised, "--reason", "the board agreed").exit_code == 0
    assert (said("budget", raised)["budget_epsilon"], said("budget", raised)["amendment_due"]) == (120.0, False)
    (change,) = [each for each in said("log", raised)["changes"] if each["event"] == "amended"]
    assert change["detail"] == "epsilon_cap 100.0 -> 120.0; reason: the board agreed"
    refused(invoke("amend", raised, "--reason", "again"), 2)
    refused(invoke("amend", raised, "--reason", " "), 2)
    assert "--reason: expected a reason" in refused(invoke("amend", raised), 2)


def test_a_damaged_ledger_makes_the_site_decline_with_one_word_until_it_is_recovered(
    tmp_path: Path, frozen: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    site = trained(tmp_path, frozen)
    damage(site)
    grid = InProcessGrid(make_app(lambda context: site.config), 1)
    request = offered("run-2", run_config(), frozen)

    def answered() -> messages.Declined:
        (node,) = grid.get_node_ids()
        (reply,) = grid.send_and_receive(
            [Message(messages.encode(request), dst_node_id=node, message_type=messages.JOIN)]
        )
        return messages.decode(reply.content, messages.Declined)

    with caplog.at_level(logging.DEBUG):
        assert answered() == messages.Declined(refusal=answered().refusal, site="north")
        assert answered().refusal.value == "budget"
    assert "edited" not in caplog.text
    done = invoke("recover", written(tmp_path), "--reason", "disk failure")
    assert done.exit_code == 0
    assert "line 2 of 3 was edited" in done.stdout
    assert said("budget", tmp_path / "site.yaml")["left_epsilon"] == 0.0
    assert answered().refusal.value == "budget"
    page = said("log", tmp_path / "site.yaml")
    assert [each["event"] for each in page["changes"]] == ["recovered", "assumed"]
    assert "edited" in page["refusals"][0]["detail"]
    # What was released stays on the page, although its charge no longer verifies.
    assert [(each["run"], each["round"], each["mechanism"]) for each in page["releases"]] == [("run-1", 1, None)]


def test_stating_less_than_the_cap_is_refused(tmp_path: Path, frozen: Backbone) -> None:
    damage(trained(tmp_path, frozen))
    site = written(tmp_path)
    recover = ("recover", site, "--reason", "x")
    assert "at least the whole cap of 100" in refused(invoke(*recover, "--assume-epsilon", 50), 2)
    assert "at least the whole cap" in refused(invoke(*recover, "--assume-run", run_file(tmp_path)), 2)
    long = run_file(tmp_path, rounds=5000)
    assert invoke(*recover, "--assume-run", long).exit_code == 0
    assert "nothing to recover" in refused(invoke(*recover), 2)


def test_a_site_whose_ledgers_are_all_gone_declines(tmp_path: Path, frozen: Backbone) -> None:
    site = trained(tmp_path, frozen)
    shutil.rmtree(site.config.state_dir / "ledgers")
    with pytest.raises(LedgerDamaged, match="missing"):
        site.ledger()
    assert invoke("recover", written(tmp_path), "--reason", "lost").exit_code == 0
    assert site.ledger().spent().left_epsilon == 0.0


# --- plan ------------------------------------------------------------------------------------------------------------


def test_a_plan_opens_no_record_and_writes_nothing(tmp_path: Path) -> None:
    site, run = written(tmp_path), run_file(tmp_path)
    (tmp_path / "north.npz").unlink()
    before = sorted(tmp_path.rglob("*"))
    outlook = said("plan", site, run)
    assert outlook["round_epsilon"] == round_up(compute_epsilon([ROUND], DELTA), 4)
    assert outlook["run_epsilon"] == outlook["final_epsilon"] == round_up(compute_epsilon([ROUND] * 2, DELTA), 4)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_plan_counts_what_was_spent_before(tmp_path: Path, frozen: Backbone) -> None:
    trained(tmp_path, frozen, rounds=2)
    outlook = said("plan", written(tmp_path), run_file(tmp_path))
    assert outlook["final_epsilon"] == round_up(compute_epsilon([ROUND] * 4, DELTA), 4)


def test_noise_for_a_target_is_solved_for_and_meets_it(tmp_path: Path) -> None:
    privacy = {"unit": "example", "delta": DELTA, "target_epsilon": 3.0}
    outlook = said("plan", written(tmp_path), run_file(tmp_path, privacy=privacy))
    # mu(3) = 0.7191 and 4 steps: sigma = sqrt(4) / mu.
    assert outlook["noise_multiplier"] == pytest.approx(2.0 / 0.7191, rel=1e-3)
    assert outlook["run_epsilon"] <= 3.0001


def test_noise_to_signal_is_that_of_noise_really_drawn(tmp_path: Path) -> None:
    """25 parameters (colour 3 x 5, size 2 x 5), noise 2, 2 steps, 40 units who all agree."""
    outlook = said("plan", written(tmp_path), run_file(tmp_path))
    noise = 2.0 * np.random.default_rng(0).normal(size=(20_000, 2, 25)).sum(axis=1)
    assert outlook["noise_to_signal"] == pytest.approx(np.linalg.norm(noise, axis=1).mean() / (2 * 40), rel=0.02)


def test_a_plan_says_what_auto_chose_and_the_noise_on_a_logit(tmp_path: Path) -> None:
    values = run_config().model_dump(mode="json", by_alias=True)
    del values["aggregation"], values["rounds"]
    values |= {"solver": {"kind": "auto"}, "privacy": {"unit": "example", "delta": DELTA, "target_epsilon": 1.0}}
    (tmp_path / "auto.yaml").write_text(yaml.safe_dump(values))
    site = written(tmp_path)
    shown = invoke("plan", site, tmp_path / "auto.yaml").stdout
    chosen = [line for line in shown.splitlines() if line.startswith("chosen: ")]
    assert any("head_sum" in line for line in chosen) and any("rounds 48" in line for line in chosen)
    outlook = said("plan", site, tmp_path / "auto.yaml")
    # The rule: about 0.5 on a logit, whatever the settings are.
    assert outlook["logit_noise"] == pytest.approx(0.5, abs=0.1)
    assert outlook["run_epsilon"] <= 1.0001
    assert said("plan", site, run_file(tmp_path))["logit_noise"] is None


WIDE = {name: {**task, "head": {"hidden": 5000}} for name, task in TASKS.items()}


def solver(sampling_rate: float) -> dict[str, Any]:
    """The most steps in a round."""
    return {
        "kind": "dp_sgd",
        "sampling_rate": sampling_rate,
        "steps": MAX_ROUND_STEPS,
        "clip_norm": 1.0,
        "learning_rate": 1.0,
    }


FAINT = {"unit": "example", "delta": 1e-9, "noise_multiplier": 2.0}
"""A delta for millions of units."""


def declared(public_size: int) -> dict[str, Any]:
    """A site that declares so many units."""
    values = {"source": "records", "missing": "refuse", "public_size": public_size}
    tasks = {task: {**values, "label": task} for task in TASKS}
    return {"tasks": tasks, "budget": {"epsilon": 100.0, "delta": FAINT["delta"]}}


@pytest.mark.parametrize(
    ("site", "run", "warning"),
    [
        ({}, {"privacy": {"unit": "example", "delta": DELTA, "target_epsilon": 0.01}}, "cannot be useful"),
        ({"budget": {"epsilon": 1.0, "delta": DELTA}}, {}, "% of the budget of epsilon 1"),
        ({}, {"privacy": {"unit": "patient", "delta": DELTA, "noise_multiplier": 2.0}}, "protects patient"),
        ({"allow": {"tasks": "any", "backbones": "any", "solvers": []}}, {}, "solver dp_sgd is not allowed"),
        ({"allow": {"tasks": [], "backbones": "any", "solvers": "any"}}, {}, "none of the run's tasks"),
        # 25 parameters and 10 million units; (4 + 1) 5000 + 3 (5000 + 1) and the same with 2, and a million units.
        (
            declared(10**7),
            {"solver": solver(0.5), "privacy": FAINT},
            "a round draws 10000025000 random numbers, expected at most 8589934592",
        ),
        (
            declared(10**6),
            {"solver": solver(1.0), "tasks": WIDE, "privacy": FAINT},
            "a round takes 75005000000000 products, expected at most",
        ),
    ],
    ids=["noise", "budget", "unit", "solver", "tasks", "draws", "products"],
)
def test_a_plan_warns_where_it_must(tmp_path: Path, site: dict, run: dict, warning: str) -> None:
    declines = warning != "cannot be useful"
    outlook = said("plan", written(tmp_path, **site), run_file(tmp_path, **run), code=int(declines))
    assert outlook["declines"] is declines
    assert any(warning in each for each in outlook["warnings"])


def test_a_useful_affordable_plan_has_no_warning(tmp_path: Path) -> None:
    less_noise = {"unit": "example", "delta": DELTA, "noise_multiplier": 1.0}
    assert said("plan", written(tmp_path), run_file(tmp_path, privacy=less_noise))["warnings"] == []


def test_a_plan_below_the_v_that_is_advised_says_so(tmp_path: Path) -> None:
    outlook = said("plan", written(tmp_path), run_file(tmp_path))
    (warning,) = outlook["warnings"]
    assert "v is below 15" in warning and all(0.0 < v < 15.0 for v in outlook["v"].values())


@pytest.mark.parametrize("projection", [None, {"dim": 3, "normalize": True}, {"normalize": True}])
def test_feature_sizes_follow_from_settings_without_weights(projection: dict | None) -> None:
    net = {"kind": "small_cnn", "input_size": 16, "channels": [4, 8], "pool": 2, "projection": projection}
    settings = {key: value for key, value in net.items() if value is not None}
    built = open_random({**settings, "projection": projection and {**projection, "dim": None}}, "backbone", seed=0)
    wanted = (projection or {}).get("dim") or built.feature_dim
    assert feature_dim(Spec(**{**settings, "weights": "/absent.safetensors"})) == wanted


# --- log -------------------------------------------------------------------------------------------------------------


def test_the_log_holds_every_release_with_its_bytes_and_every_refusal(tmp_path: Path, frozen: Backbone) -> None:
    site = trained(tmp_path, frozen, rounds=2)
    train(site, messages.TrainRequest("run-1", 1, heads(frozen)))  # Sent again, for nothing.
    loud = run_config(privacy={"unit": "example", "delta": DELTA, "noise_multiplier": 0.01})
    with pytest.raises(SiteDeclined):
        join(site, offered("run-2", loud, frozen))
    site.journal.write(RequestDeclined(reason="budget", detail="as the app writes it"))
    page = said("log", written(tmp_path))
    sizes = {path.stat().st_size for path in (site.config.state_dir / "runs" / "run-1" / "replies").iterdir()}
    assert [(each["run"], each["round"], each["resent"]) for each in page["releases"]] == [
        ("run-1", 1, 1),
        ("run-1", 2, 0),
    ]
    assert {each["bytes"] for each in page["releases"]} == sizes
    assert page["releases"][0]["mechanism"]["noise_multiplier"] == 2.0
    assert [(each["source"], each["reason"]) for each in page["refusals"]] == [("request", "budget")]
    assert "releases: 2" in invoke("log", tmp_path / "site.yaml").stdout


def test_a_charge_without_a_stored_reply_is_a_release_too(tmp_path: Path) -> None:
    site_of(tmp_path).ledger().reserve(ROUND, run="run-1", round=1, request="00ff")
    (release,) = said("log", written(tmp_path))["releases"]
    assert release["bytes"] is None


# --- purge -----------------------------------------------------------------------------------------------------------


def with_patients(folder: Path) -> dict[str, Any]:
    """A table of 30 patients with two rows each, patient `canary-7` among them."""
    rows = [
        ["a", "b", "colour", "who"],
        *[[i, j, ["red", "green", "blue"][i % 3], f"canary-{i}"] for i in range(30) for j in (0, 1)],
    ]
    (folder / "rows.csv").write_text("\n".join(",".join(map(str, row)) for row in rows))
    return {
        "unit": "patient",
        "sources": {
            "records": {
                "kind": "table",
                "path": str(folder / "rows.csv"),
                "columns": ["a", "b"],
                "patient": "who",
            }
        },
        "tasks": {"colour": {"source": "records", "label": "colour", "missing": "refuse", "public_size": 30}},
    }


TABLE = {
    "backbone": {
        "kind": "identity",
        "columns": [{"name": name, "range": [0, 40], "missing": "refuse"} for name in ("a", "b")],
    },
    "privacy": {"unit": "patient", "delta": DELTA, "noise_multiplier": 2.0},
    "tasks": {"colour": TASKS["colour"]},
}


def prepared(folder: Path, site: Site) -> Backbone:
    run = run_config(**TABLE)
    own = open_backbones(run)["backbone"]
    join(site, offered("run-1", run, own))
    give_backbone(site, "run-1", own)
    return own


def num_units(site: Site) -> int:

    return open_units(
        site.config.state_dir / "runs" / "run-1" / "data", "train", ["colour"], torch.device("cpu")
    ).num_units


def test_a_purged_patient_is_left_out_from_then_on_and_named_nowhere(tmp_path: Path) -> None:
    changes = with_patients(tmp_path)
    site = site_of(tmp_path, **changes)
    prepared(tmp_path, site)
    site.ledger().reserve(ROUND, run="run-1", round=1, request="00ff")
    before = site.ledger().spent()
    assert num_units(site) == 30
    old = {path.name for path in site.features_folder().iterdir() if path.is_dir()}
    result = invoke("purge", written(tmp_path, **changes), "--patient", " canary-7")
    assert result.exit_code == 0, result.stderr
    assert "canary" not in result.stdout + result.stderr
    assert "left out: 2 record(s)" in result.stdout
    assert not any(path.is_dir() for path in site.features_folder().iterdir())
    assert site.ledger().spent() == before
    prepared(tmp_path, site)
    assert num_units(site) == 29
    assert old.isdisjoint(path.name for path in site.features_folder().iterdir())
    state = [path for path in site.config.state_dir.rglob("*") if path.is_file()]
    assert not any(b"canary" in path.read_bytes() for path in state)
    assert (site.config.state_dir / "runs" / "run-1" / "problems.csv").read_text().count("\n") == 1


def test_a_run_under_way_must_be_prepared_again(tmp_path: Path, frozen: Backbone) -> None:
    site = trained(tmp_path, frozen)
    assert invoke("purge", written(tmp_path), "--patient", "nobody").exit_code == 0
    with pytest.raises(SiteDeclined, match="not_prepared"):
        train(site, messages.TrainRequest("run-1", 2, heads(frozen)))
    stored = list((site.config.state_dir / "runs" / "run-1" / "replies").iterdir())
    assert messages.to_bytes(train(site, messages.TrainRequest("run-1", 1, heads(frozen)))) == stored[0].read_bytes()


def test_a_list_is_read_and_the_exclusions_are_their_owners_only(tmp_path: Path) -> None:
    changes = with_patients(tmp_path)
    (tmp_path / "ids.txt").write_text("canary-1\n\ncanary-2\n")
    result = invoke("purge", written(tmp_path, **changes), "--list", tmp_path / "ids.txt")
    assert "excluded: 2 id(s), 2 of them new" in result.stdout
    for name in ("exclusions.json", "exclusions.key"):
        assert stat.S_IMODE((tmp_path / "north-state" / name).stat().st_mode) == 0o600
    assert "0 of them new" in invoke("purge", tmp_path / "site.yaml", "--patient", "canary-2").stdout


def test_a_lost_key_lets_nobody_in(tmp_path: Path) -> None:
    Exclusions.read(tmp_path).with_ids(["canary"]).write(tmp_path)
    (tmp_path / "exclusions.key").unlink()
    with pytest.raises(BadInput, match="exclusion list"):
        Exclusions.read(tmp_path)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    site = written(tmp_path)
    values = yaml.safe_load(site.read_text())
    (tmp_path / "typo.yaml").write_text(yaml.safe_dump({**values, "registri": "x"}))
    non_private = run_file(tmp_path, privacy="non_private")
    for command, word in (
        (("budget", tmp_path / "absent.yaml"), "absent.yaml"),
        (("budget", tmp_path / "typo.yaml"), "registri"),
        (("budget", site, "--run", tmp_path / "absent.yaml"), "absent.yaml"),
        (("plan", site, site), "expected a run file, got a site file"),
        (("plan", site, non_private), "dp_sgd needs a `privacy`"),
        (("purge", site), "at least one id"),
        (("purge", site, "--list", tmp_path / "absent.txt"), "absent.txt"),
        (("purge", site, "--patient", " "), "blank"),
        (("recover", site, "--reason", "x"), "never had a ledger"),
        (("amend", site, "--reason", "x"), "no ledger"),
    ):
        assert word in refused(invoke(*command), 2)


def test_an_audit_of_the_run_as_it_would_run_here_passes_and_is_json(tmp_path: Path) -> None:
    page = said("audit", written(tmp_path), run_file(tmp_path))
    assert {"epsilon_claimed", "epsilon_lower_95", "epsilon_lower_99_9", "noise_std_ratio", "passed"} <= set(page)
    assert page["passed"] is True
    assert page["epsilon_lower_99_9"] <= page["epsilon_claimed"]


def test_an_audit_of_a_run_without_privacy_is_refused(tmp_path: Path) -> None:
    sgd = {"kind": "sgd", "sampling_rate": 1.0, "steps": 1, "learning_rate": 1.0}
    run = run_file(tmp_path, solver=sgd, privacy="non_private")
    refused(invoke("audit", written(tmp_path), run), 2)


# --- evaluation ------------------------------------------------------------------------------------------------------

HELD = {"share": 0.2, "evaluations": 3}


def evaluated(folder: Path, frozen: Backbone) -> None:
    """A site that trained one round of run-1 and evaluated its heads."""
    site = site_of(folder, evaluation=HELD)
    run = run_config(evaluation={"every": 1})
    join(site, offered("run-1", run, frozen))
    give_backbone(site, "run-1", frozen)
    train(site, messages.TrainRequest("run-1", 1, heads(frozen)))
    for _ in range(2):
        evaluate(site, messages.EvaluateRequest("run-1", 1, heads(frozen)))


def test_budget_shows_the_share_and_what_is_left_of_it(tmp_path: Path, frozen: Backbone) -> None:
    path = written(tmp_path, evaluation=HELD)
    assert said("budget", path)["evaluation"]["left"] == 3
    evaluated(tmp_path, frozen)
    account = said("budget", path)
    held = account["evaluation"]
    assert (held["share"], held["evaluations"], held["left"]) == (0.2, 3, 2)
    mechanism = Mechanism("gaussian", held["noise_multiplier"], 1.0, 1, 1.0)
    assert held["spent_epsilon"] == round_up(compute_epsilon([mechanism], DELTA), 4)
    (run,) = account["runs"]
    assert (run["rounds"], run["evaluations"], run["charges"]) == (1, 1, 2)
    assert account["spent_epsilon"] == round_up(compute_epsilon([ROUND, mechanism], DELTA), 4)
    assert "share 0.2 for evaluations: 2 of 3 left" in invoke("budget", path).stdout
    # Fewer rounds than without a share: what is held back is not theirs.
    assert account["affordable"]["rounds"] < said("budget", written(tmp_path))["affordable"]["rounds"]
    assert said("budget", written(tmp_path))["evaluation"] == "local"


def test_log_tells_evaluations_from_training(tmp_path: Path, frozen: Backbone) -> None:
    evaluated(tmp_path, frozen)
    page = said("log", written(tmp_path, evaluation=HELD))
    assert [(each["purpose"], each["round"], each["resent"]) for each in page["releases"]] == [
        ("training", 1, 0),
        ("evaluation", 1, 1),
    ]
    assert all(each["bytes"] for each in page["releases"])


def test_plan_counts_evaluations_and_says_when_the_share_is_too_small(tmp_path: Path, frozen: Backbone) -> None:
    every = run_file(tmp_path, rounds=5, evaluation={"every": 1})
    outlook = said("plan", written(tmp_path, evaluation=HELD), every)
    noise = said("budget", written(tmp_path, evaluation=HELD))["evaluation"]["noise_multiplier"]
    three = [Mechanism("gaussian", noise, 1.0, 3, 1.0)]
    training = [Mechanism("gaussian", 2.0, 1.0, 10, 1.0)]
    assert outlook["evaluations"] == 3
    assert outlook["evaluation_epsilon"] == round_up(compute_epsilon(three, DELTA), 4)
    assert outlook["run_epsilon"] == round_up(compute_epsilon(training, DELTA), 4)
    assert outlook["final_epsilon"] == round_up(compute_epsilon([*three, *training], DELTA), 4)
    # Two tasks in one release; a unit counts sqrt(2) in each.
    assert outlook["evaluation_noise"] == pytest.approx(noise * 2)
    assert any("asks for 5 evaluation(s), the share pays for 3" in each for each in outlook["warnings"])
    local = said("plan", written(tmp_path), every)
    assert local["evaluations"] == 0 and any("`local`" in each for each in local["warnings"])
    assert not (tmp_path / "north-state").exists()


def test_plan_says_that_a_run_would_eat_the_share(tmp_path: Path) -> None:
    whole = run_file(tmp_path, privacy={"unit": "example", "delta": DELTA, "target_epsilon": 9.0})
    budget_ = {"epsilon": 10.0, "delta": DELTA}
    tight = said("plan", written(tmp_path, budget=budget_, evaluation=HELD), whole, code=1)
    assert any("held for evaluations" in each for each in tight["warnings"])
    assert tight["rounds_affordable"] < 2 <= said("plan", written(tmp_path, budget=budget_), whole)["rounds_affordable"]
