"""Approvals: no record is touched for a run that nobody at the site approved, and one approval is for one run."""

from __future__ import annotations

import getpass
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from client.__main__ import app
from client.protocol.approvals import MAX_WAITING, Approvals
from client.protocol.join import join
from client.protocol.site import Site, SiteDeclined
from client.protocol.train import train
from common import messages
from common.model.backbones import Backbone
from common.model.parameters import create_heads, parameters
from common.offers import Offer, compute_run_digest, encode_offer, make_offer, parse_offer
from common.privacy.noise import os_entropy
from common.tasks import open_task
from common.types import BadInput, DeclineReason, Heads, LedgerDamaged
from common.yaml import write_yaml
from tests.tiny import TASKS, backbone, give_backbone, offered, run_config, site_config


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(site_config(tmp_path, "north", approval="required"), os_entropy)


@pytest.fixture(scope="module")
def frozen() -> Backbone:
    return backbone()


def request(frozen: Backbone, run_id: str = "run-1", **changes: Any) -> messages.JoinRequest:
    return offered(run_id, run_config(**changes), frozen)


def offer(frozen: Backbone, **changes: Any) -> Offer:
    return Offer(make_offer(run_config(**changes), {"backbone": frozen}), {"backbone": frozen.digest})


def heads(frozen: Backbone) -> Heads:
    tasks = {name: open_task(spec, name) for name, spec in TASKS.items()}
    modules = create_heads(tasks, dict.fromkeys(tasks, frozen.feature_dim), 3)
    return {name: parameters(module) for name, module in modules.items()}


def refusal(site: Site, asked: messages.JoinRequest) -> DeclineReason:
    with pytest.raises(SiteDeclined) as caught:
        join(site, asked)
    return caught.value.reason


def test_a_run_that_nobody_approved_is_declined_and_waits(site: Site, frozen: Backbone) -> None:
    assert refusal(site, request(frozen)) is DeclineReason.NOT_APPROVED
    approvals = Approvals(site.config.state_dir)
    [waiting] = approvals.waiting()
    assert waiting.digest == compute_run_digest(
        make_offer(run_config(), {"backbone": frozen}), {"backbone": frozen.digest}
    )
    assert approvals.all() == []


def test_an_approved_run_is_joined_and_the_approval_names_who(site: Site, frozen: Backbone) -> None:
    approvals = Approvals(site.config.state_dir)
    approvals.approve(offer(frozen))
    assert join(site, request(frozen)).site == "north"
    [approval] = approvals.all()
    assert (approval.run, approval.by) == ("tiny", getpass.getuser())
    assert (site.config.state_dir / "approvals.jsonl").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("changes", [{"rounds": 3}, {"seed": 4}, {"max_delta_norm": 5.0}])
def test_an_approval_covers_one_digest_only(site: Site, frozen: Backbone, changes: dict[str, Any]) -> None:
    Approvals(site.config.state_dir).approve(offer(frozen))
    assert refusal(site, request(frozen, **changes)) is DeclineReason.NOT_APPROVED


def test_whether_the_budget_covers_a_run_is_not_said_before_it_is_approved(tmp_path: Path, frozen: Backbone) -> None:
    poor = Site(site_config(tmp_path, "north", approval="required", budget={"epsilon": 0.1, "delta": 1e-5}), os_entropy)
    assert refusal(poor, request(frozen)) is DeclineReason.NOT_APPROVED
    Approvals(poor.config.state_dir).approve(offer(frozen))
    assert refusal(poor, request(frozen)) is DeclineReason.BUDGET


def test_a_damaged_ledger_is_not_betrayed_by_an_offer_that_nobody_approved(site: Site, frozen: Backbone) -> None:
    site.ledger()
    for path in (site.config.state_dir / "ledgers").rglob("*.jsonl"):
        path.write_bytes(b"damaged\n" + path.read_bytes())
    assert refusal(site, request(frozen)) is DeclineReason.NOT_APPROVED
    Approvals(site.config.state_dir).approve(offer(frozen))
    with pytest.raises(LedgerDamaged):
        join(site, request(frozen))


def test_one_approval_pays_for_one_run_however_many_joined_under_it(site: Site, frozen: Backbone) -> None:
    Approvals(site.config.state_dir).approve(offer(frozen))
    for run_id in ("run-1", "run-2"):
        join(site, request(frozen, run_id))
    give_backbone(site, "run-1", frozen)
    give_backbone(site, "run-2", frozen)
    train(site, messages.TrainRequest("run-1", 1, heads(frozen)))
    with pytest.raises(SiteDeclined, match="not_approved: each approval of run .* was used by an earlier run"):
        train(site, messages.TrainRequest("run-2", 1, heads(frozen)))
    assert [approval.used_by for approval in Approvals(site.config.state_dir).all()] == ["run-1"]
    assert len(site.ledger().charges()) == 1
    train(site, messages.TrainRequest("run-1", 2, heads(frozen)))
    assert refusal(site, request(frozen, "run-3")) is DeclineReason.NOT_APPROVED
    assert join(site, request(frozen, "run-1")).site == "north"  # Resumed.


def test_offers_that_wait_are_bounded_in_number_and_never_make_room_for_others(site: Site, frozen: Backbone) -> None:
    """Else a coordinator could push out the offer the staff is looking at and put another in its place."""
    approvals = Approvals(site.config.state_dir)
    kept = [approvals.wait(offer(frozen, seed=seed)) for seed in range(MAX_WAITING + 5)]
    assert kept == [True] * MAX_WAITING + [False] * 5
    assert {waiting.digest for waiting in approvals.waiting()} == {
        offer(frozen, seed=seed).digest for seed in range(MAX_WAITING)
    }


def test_an_offer_that_leaves_its_settings_to_this_sites_program_is_declined(site: Site, frozen: Backbone) -> None:
    """`auto` of another version chooses others: what is approved would not be what runs."""
    offer = offered("run-1", run_config(), frozen)
    run = {key: value for key, value in offer.run.items() if key != "aggregation"}
    with pytest.raises(SiteDeclined, match="settings that `auto` chose"):
        join(site, replace(offer, run={**run, "solver": {"kind": "auto"}}))
    assert Approvals(site.config.state_dir).waiting() == []


def test_a_run_that_is_called_like_another_ones_digest_is_not_found_by_it(site: Site, frozen: Backbone) -> None:
    approvals = Approvals(site.config.state_dir)
    wanted = offer(frozen, seed=1).digest
    approvals.wait(offer(frozen, name=wanted))
    with pytest.raises(BadInput, match="which is none of these"):
        approvals.find(wanted)


def test_an_approval_stays_used_when_the_runs_folder_is_removed(site: Site, frozen: Backbone) -> None:
    Approvals(site.config.state_dir).approve(offer(frozen))
    join(site, request(frozen))
    give_backbone(site, "run-1", frozen)
    train(site, messages.TrainRequest("run-1", 1, heads(frozen)))
    shutil.rmtree(site.config.state_dir / "runs" / "run-1")
    assert refusal(site, request(frozen, "run-2")) is DeclineReason.NOT_APPROVED


def test_a_line_of_the_approvals_that_says_too_little_counts_for_nothing(site: Site, frozen: Backbone) -> None:
    approvals = Approvals(site.config.state_dir)
    approvals.approve(offer(frozen))
    with (site.config.state_dir / "approvals.jsonl").open("a") as file:
        file.write('{"event": "approved"}\n{"event": "used"}\n')
    assert len(approvals.all()) == 1
    assert join(site, request(frozen)).site == "north"


def test_an_ambiguous_or_unknown_name_is_refused(site: Site, frozen: Backbone) -> None:
    approvals = Approvals(site.config.state_dir)
    for seed in (1, 2):
        approvals.wait(offer(frozen, seed=seed))
    digest = offer(frozen, seed=1).digest
    assert approvals.find(digest[:12]).digest == digest
    for wanted in ("tiny", digest[:4], "", "other"):
        with pytest.raises(BadInput, match="expected a run file"):
            approvals.find(wanted)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_approves_a_waiting_offer_a_kits_offer_and_a_run_file(
    tmp_path: Path, site: Site, frozen: Backbone
) -> None:
    path = tmp_path / "site.yaml"
    write_yaml(path, site.config)
    refusal(site, request(frozen))
    by_name = CliRunner().invoke(app, ["approve", str(path), "tiny"])
    assert by_name.exit_code == 0, by_name.output
    assert offer(frozen).digest in by_name.stdout
    assert "epsilon" in by_name.stdout

    kit = tmp_path / "kit.json"
    kit.write_bytes(encode_offer(make_offer(run_config(seed=8), {"backbone": frozen}), {"backbone": frozen.digest}))
    assert CliRunner().invoke(app, ["approve", str(path), str(kit)]).exit_code == 0

    run = tmp_path / "run.yaml"
    write_yaml(run, run_config(seed=9))
    assert CliRunner().invoke(app, ["approve", str(path), str(run)]).exit_code == 0

    for number, seed in enumerate((3, 8, 9)):
        assert join(site, request(frozen, f"run-{number}", seed=seed)).site == "north"


def test_a_run_that_the_budget_does_not_cover_is_not_approved(tmp_path: Path, site: Site, frozen: Backbone) -> None:
    path = tmp_path / "site.yaml"
    poor = site.config.budget.model_copy(update={"epsilon": 0.001})
    write_yaml(path, site.config.model_copy(update={"budget": poor}))
    refusal(site, request(frozen))
    result = CliRunner().invoke(app, ["approve", str(path), "tiny"])
    assert result.exit_code == 1 and result.stdout == ""
    assert "the budget does not cover this run" in result.stderr
    approvals = Approvals(site.config.state_dir)
    assert approvals.all() == [] and [each.digest for each in approvals.waiting()] == [offer(frozen).digest]


def test_a_run_whose_sums_this_site_takes_no_part_in_is_not_approved(tmp_path: Path, site: Site) -> None:
    write_yaml(tmp_path / "site.yaml", site.config)
    summed = {"trust": "secure_sum", "colluding": 0, "cohort": {"min_sites": 3}}
    write_yaml(tmp_path / "run.yaml", run_config(solver={"kind": "head_sum", "clip_norm": 1.0}, **summed))
    result = CliRunner().invoke(app, ["approve", str(tmp_path / "site.yaml"), str(tmp_path / "run.yaml")])
    assert result.exit_code == 2 and "would be declined here" in result.stderr and "`secure_sum`" in result.stderr
    assert Approvals(site.config.state_dir).all() == []


def test_the_command_lists_what_waits_and_what_is_approved(tmp_path: Path, site: Site, frozen: Backbone) -> None:
    path = tmp_path / "site.yaml"
    write_yaml(path, site.config)
    refusal(site, request(frozen, seed=5))
    Approvals(site.config.state_dir).approve(offer(frozen))
    listed = CliRunner().invoke(app, ["approve", str(path), "--json"])
    assert listed.exit_code == 0, listed.output
    assert CliRunner().invoke(app, ["approve", str(path), "--list", "--json"]).stdout == listed.stdout
    both = CliRunner().invoke(app, ["approve", str(path), "tiny", "--list"])
    assert both.exit_code == 2
    assert "expected no run beside it" in both.stderr
    values = json.loads(listed.stdout)
    assert [item["digest"] for item in values["waiting"]] == [offer(frozen, seed=5).digest]
    assert [item["digest"] for item in values["approved"]] == [offer(frozen).digest]
    assert values["approved"][0]["used_by"] is None
    Approvals(site.config.state_dir).use(offer(frozen).digest, "run-1")
    assert f"{offer(frozen).digest}  by " in (shown := CliRunner().invoke(app, ["approve", str(path)]).stdout)
    assert "; used by run-1" in shown and f"next: headwater site approve {path} DIGEST" in shown


def test_an_offer_file_with_text_in_place_of_a_kind_is_refused_before_it_is_shown(
    tmp_path: Path, site: Site, frozen: Backbone
) -> None:
    path, kit = tmp_path / "site.yaml", tmp_path / "kit.json"
    write_yaml(path, site.config)
    values = {
        **make_offer(run_config(), {"backbone": frozen}),
        "tasks": {**TASKS, "other": {"kind": "x\nprice     epsilon 0.01"}},
    }
    kit.write_bytes(encode_offer(values, {"backbone": frozen.digest}))
    result = CliRunner().invoke(app, ["approve", str(path), str(kit)])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert Approvals(site.config.state_dir).all() == []


def test_approving_what_is_not_there_is_one_sentence_and_exit_code_2(tmp_path: Path, site: Site) -> None:
    path = tmp_path / "site.yaml"
    write_yaml(path, site.config)
    result = CliRunner().invoke(app, ["approve", str(path), "no-such-run"])
    assert result.exit_code == 2
    assert "no-such-run" in result.stderr


def test_the_offers_of_a_kit_are_listed_until_they_are_approved(tmp_path: Path, site: Site, frozen: Backbone) -> None:
    path = tmp_path / "site.yaml"
    write_yaml(path, site.config)
    (tmp_path / "offers").mkdir()
    came = tmp_path / "offers" / "tiny.json"
    came.write_bytes(encode_offer(make_offer(run_config(), {"backbone": frozen}), {"backbone": frozen.digest}))
    assert str(came) in CliRunner().invoke(app, ["approve", str(path)]).stdout
    CliRunner().invoke(app, ["approve", str(path), str(came)])
    listed = CliRunner().invoke(app, ["approve", str(path)]).stdout
    assert "approved  tiny" in listed
    assert "in kit" not in listed


def test_a_waiting_offer_that_can_no_longer_be_read_is_listed_with_its_reason(tmp_path: Path, frozen: Backbone) -> None:
    approvals = Approvals(tmp_path)
    kept = offer(frozen)
    assert approvals.wait(kept)
    (tmp_path / "waiting" / f"{'0' * 64}.json").write_text('{"run": {"name": "old"}}')
    assert [each.digest for each in approvals.waiting()] == [kept.digest]
    ((digest, reason),) = approvals.unreadable().items()
    assert digest == "0" * 64 and "expected a run's offer" in reason


def test_an_offer_of_the_first_version_which_names_no_backbones_is_still_read() -> None:
    assert parse_offer(b'{"run": {"name": "old"}}', "offer.json").backbones == {}
    for content in (b"", b"[]", b"3", b'{"backbones": {}}', b'{"run": 1}'):
        with pytest.raises(BadInput, match=r"^offer\.json: expected a run's offer as JSON"):
            parse_offer(content, "offer.json")
