"""Several coordinators of one site share its budget, and nothing of one reaches another, whatever ids they choose."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from client.config import SiteConfig
from client.ledger.log import statement
from client.protocol.approvals import Approvals
from client.protocol.balance import balance
from client.protocol.join import join
from client.protocol.purge import purge
from client.protocol.site import Site, SiteDeclined, joined_run
from client.protocol.train import train
from common import messages
from common.model.backbones import Backbone
from common.model.parameters import create_heads, parameters
from common.offers import Offer
from common.privacy.noise import os_entropy
from common.tasks import open_task
from common.types import BadInput, DeclineReason, Heads, LedgerDamaged
from tests.tiny import TASKS, backbone, give_backbone, offered, run_config, site_config

WHERE = {"address": "federation.example.org:9092", "ca": "ca.crt", "key": "key"}
TWO = {"hearts": WHERE, "lungs": {**WHERE, "address": "other.example.org:9092"}}


@pytest.fixture(scope="module")
def frozen() -> Backbone:
    return backbone()


@pytest.fixture
def config(tmp_path: Path) -> SiteConfig:
    # Four steps at noise 2 are 1-GDP: epsilon 4.4 at delta 1e-5. Twice as many cost 6.6.
    return site_config(tmp_path, "north", coordinators=TWO, budget={"epsilon": 5.5, "delta": 1e-5})


def serve(config: SiteConfig, name: str) -> Site:
    """The site as the process serves it that joined one coordinator."""
    return Site(config.select(name), os_entropy)


def heads(frozen: Backbone) -> Heads:
    tasks = {name: open_task(spec, name) for name, spec in TASKS.items()}
    modules = create_heads(tasks, {name: frozen.feature_dim for name in TASKS}, 0)
    return {name: parameters(module) for name, module in modules.items()}


def run(site: Site, frozen: Backbone, rounds: int = 2) -> list[bytes]:
    """The replies to a run under the id that every coordinator of these tests chooses."""
    join(site, offered("run-1", run_config(), frozen))
    give_backbone(site, "run-1", frozen)
    requests = [messages.TrainRequest("run-1", number, heads(frozen)) for number in range(1, rounds + 1)]
    return [messages.to_bytes(train(site, request)) for request in requests]


def test_two_coordinators_spend_from_one_ledger_and_the_second_is_declined_when_it_is_used_up(
    config: SiteConfig, frozen: Backbone
) -> None:
    run(serve(config, "hearts"), frozen)
    account = balance(config)
    assert 4.3 < account.reserved_epsilon < 4.5
    with pytest.raises(SiteDeclined) as declined:
        run(serve(config, "lungs"), frozen)
    assert declined.value.reason is DeclineReason.BUDGET
    assert balance(config) == account


def test_two_runs_of_one_id_are_two_runs(config: SiteConfig, frozen: Backbone) -> None:
    rich = config.model_copy(update={"budget": config.budget.model_copy(update={"epsilon": 50.0})})
    first, second = serve(rich, "hearts"), serve(rich, "lungs")
    replies = [run(first, frozen), run(second, frozen)]
    # The same request of another coordinator is not answered with a stored reply, nor declined as asked before.
    assert not set(replies[0]) & set(replies[1])
    assert [(each.run, each.rounds) for each in balance(rich).runs] == [("hearts/run-1", 2), ("lungs/run-1", 2)]
    assert joined_run(first, "run-1").folder != joined_run(second, "run-1").folder
    page = statement(rich)
    assert [(each.run, each.round) for each in page.releases] == [
        (f"{name}/run-1", number) for name in ("hearts", "lungs") for number in (1, 2)
    ]
    assert all(each.bytes for each in page.releases)
    assert balance(rich).affordable is not None
    assert purge(Site(rich, os_entropy), ["nobody"]).num_runs == 2


def test_a_coordinator_that_is_added_leaves_the_first_ones_runs_where_they_were(
    tmp_path: Path, frozen: Backbone
) -> None:
    alone = site_config(tmp_path, "north", coordinator=WHERE)
    run(Site(alone, os_entropy), frozen, rounds=1)
    both = site_config(tmp_path, "north", coordinator=WHERE, coordinators={"lungs": WHERE})
    assert list(both.list_coordinators()) == ["main", "lungs"]
    main = serve(both, "main")
    assert main.config.coordinator_dir == alone.coordinator_dir == alone.state_dir
    train(main, messages.TrainRequest("run-1", 2, heads(frozen)))
    assert [(each.run, each.rounds) for each in balance(both).runs] == [("run-1", 2)]


def test_an_approval_for_one_coordinator_covers_no_run_of_another(config: SiteConfig, frozen: Backbone) -> None:
    asking = config.model_copy(update={"approval": "required"})
    offer = offered("run-1", run_config(), frozen)
    for name in TWO:
        with pytest.raises(SiteDeclined, match="nobody approved"):
            join(serve(asking, name), offer)
    Approvals(serve(asking, "hearts").config.coordinator_dir).approve(Offer(offer.run, offer.backbones))
    join(serve(asking, "hearts"), offer)
    with pytest.raises(SiteDeclined, match="nobody approved"):
        join(serve(asking, "lungs"), offer)


def test_a_ledger_that_is_lost_after_a_reply_to_any_coordinator_is_no_fresh_budget(
    config: SiteConfig, frozen: Backbone
) -> None:
    run(serve(config, "hearts"), frozen, rounds=1)
    (config.state_dir / "ledgers").rename(config.state_dir / "lost")
    with pytest.raises(LedgerDamaged):
        serve(config, "lungs").ledger()


def test_a_coordinators_folder_is_its_owners_alone_with_those_above(config: SiteConfig) -> None:
    assert not config.state_dir.exists()
    assert serve(config, "hearts").journal
    for folder in (config.state_dir, config.state_dir / "coordinators", config.state_dir / "coordinators" / "hearts"):
        assert folder.stat().st_mode & 0o077 == 0


def test_a_site_of_several_coordinators_must_say_which(config: SiteConfig, tmp_path: Path) -> None:
    for name in (None, "kidneys", "main", "../hearts"):
        with pytest.raises(BadInput, match="--coordinator: expected one of hearts, lungs"):
            config.select(name)
    with pytest.raises(BadInput, match="--coordinator"):
        assert config.coordinator_dir
    with pytest.raises(BadInput, match="coordinators"):
        site_config(tmp_path, "north", coordinators={"main": WHERE})
    with pytest.raises(BadInput, match="names none"):
        site_config(tmp_path, "north").select("hearts")


def test_a_reply_to_one_coordinator_is_not_covered_by_the_charge_of_anothers_same_request(
    config: SiteConfig, frozen: Backbone
) -> None:
    """Both ask for the same bytes; an older copy of the ledger holds the first one's charge alone."""
    rich = config.model_copy(update={"budget": config.budget.model_copy(update={"epsilon": 50.0})})
    ledgers = config.state_dir / "ledgers"
    run(serve(rich, "hearts"), frozen, rounds=1)
    shutil.copytree(ledgers, config.state_dir / "older")
    lungs = serve(rich, "lungs")
    run(lungs, frozen, rounds=1)
    (lungs.config.coordinator_dir / "site.jsonl").unlink()
    shutil.rmtree(ledgers)
    (config.state_dir / "older").rename(ledgers)
    with pytest.raises(LedgerDamaged, match="a reply of run lungs/run-1 was sent and has no charge"):
        lungs.ledger()
