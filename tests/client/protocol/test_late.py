"""A site that joins late plans for the rounds that are left, and pays no more than the run's target."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
from dp_accounting import pld

from client.protocol.balance import balance
from client.protocol.join import join
from client.protocol.prepare import finish
from client.protocol.site import Site, SiteDeclined, read_first_round
from client.protocol.train import train
from common import messages
from common.model.backbones import Backbone
from common.model.parameters import create_heads, parameters
from common.privacy.noise import os_entropy
from common.tasks import open_task
from common.types import DeclineReason, Heads, heads_digest
from tests.tiny import TASKS, backbone, give_backbone, offered, run_config, site_config

ROUNDS, STEPS, DELTA, TARGET = 6, 2, 1e-5, 2.0
FULL = {"kind": "dp_sgd", "sampling_rate": 1.0, "steps": STEPS, "clip_norm": 1.0, "learning_rate": 1.0}
SAMPLED = {**FULL, "sampling_rate": 0.25}
PRIVACY = {"unit": "example", "delta": DELTA, "target_epsilon": TARGET}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    yield Site(site_config(tmp_path, "north"), os_entropy)


@pytest.fixture(scope="module")
def frozen() -> Backbone:
    return backbone()


def offer(frozen: Backbone, first_round: int, **changes: Any) -> messages.JoinRequest:
    run = run_config(**{"rounds": ROUNDS, "privacy": PRIVACY, **changes})
    made = offered("run-1", run, frozen)
    return messages.JoinRequest(made.run_id, made.run, made.backbones, first_round=first_round)


def heads(frozen: Backbone) -> Heads:
    tasks = {name: open_task(TASKS[name], name) for name in TASKS}
    modules = create_heads(tasks, {name: frozen.feature_dim for name in TASKS}, 0)
    return {name: parameters(module) for name, module in modules.items()}


def train_round(site: Site, frozen: Backbone, round_: int) -> float:
    """The noise multiplier of a round."""
    records = train(site, messages.TrainRequest("run-1", round_, heads(frozen)))
    return messages.decode(records, messages.TrainReply).plan.noise_multiplier


def independent_epsilon(noise: float, rate: float, steps: int) -> float:
    """Epsilon by dp_accounting's privacy loss distributions."""
    step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    accountant = pld.PLDAccountant()
    accountant.compose(step, steps)
    return float(accountant.get_epsilon(DELTA))


# The noise of sampled releases is calibrated by a bound that is loose for few steps.
@pytest.mark.parametrize(("solver", "least"), [(FULL, 0.97), (SAMPLED, 0.8)], ids=["full batch", "sampled"])
def test_all_that_a_late_site_pays_is_within_the_target_and_what_its_rounds_cost(
    site: Site, frozen: Backbone, solver: dict[str, Any], least: float
) -> None:
    first = 4
    join(site, offer(frozen, first, solver=solver))
    give_backbone(site, "run-1", frozen)
    [noise] = {train_round(site, frozen, round_) for round_ in range(first, ROUNDS + 1)}
    rate = float(solver["sampling_rate"])
    rest = (ROUNDS - first + 1) * STEPS
    epsilon = independent_epsilon(noise, rate, rest)
    assert least * TARGET <= epsilon <= TARGET * 1.001
    # The noise of the whole run would be too much for what is left, and this one too little for the whole.
    assert independent_epsilon(noise, rate, ROUNDS * STEPS) > TARGET
    [account] = balance(site.config).runs
    assert account.epsilon == pytest.approx(epsilon, rel=0.01)
    assert account.epsilon <= TARGET * 1.001


def test_with_a_given_noise_a_late_site_pays_and_holds_for_the_rest_alone(site: Site, frozen: Backbone) -> None:
    privacy = {"unit": "example", "delta": DELTA, "noise_multiplier": 8.0}
    join(site, offer(frozen, 4, privacy=privacy))
    give_backbone(site, "run-1", frozen)
    [held] = site.ledger().history().list_earmarked()
    assert (held.steps, held.noise_multiplier) == (3 * STEPS, 8.0)
    for round_ in (4, 5, 6):
        assert train_round(site, frozen, round_) == 8.0
    assert site.ledger().history().list_earmarked() == []
    epsilon = independent_epsilon(8.0, 1.0, 3 * STEPS)
    assert site.ledger().spent().reserved_epsilon == pytest.approx(epsilon, rel=0.01)
    final = heads(frozen)
    finish(site, messages.FinishRequest("run-1", final, heads_digest(final)))


def test_a_round_before_the_site_joined_is_declined_and_spends_nothing(site: Site, frozen: Backbone) -> None:
    """Its noise was planned for fewer rounds: with more of them, the run would cost more than was approved."""
    join(site, offer(frozen, 4))
    give_backbone(site, "run-1", frozen)
    for round_ in (1, 3, ROUNDS + 1):
        with pytest.raises(SiteDeclined, match="before the site joined"):
            train_round(site, frozen, round_)
    assert site.ledger().charges() == []


@pytest.mark.parametrize("first", [1, 3])
def test_a_site_that_has_begun_keeps_its_plan_whatever_is_offered(site: Site, frozen: Backbone, first: int) -> None:
    join(site, offer(frozen, first))
    give_backbone(site, "run-1", frozen)
    noise = train_round(site, frozen, 3)
    for offered_round in (1, 5, ROUNDS, ROUNDS + 1):
        join(site, offer(frozen, offered_round))
        assert read_first_round(site.config.state_dir / "runs" / "run-1") == first
    assert {train_round(site, frozen, round_) for round_ in (4, 5, 6)} == {noise}


def test_a_site_of_the_roll_call_keeps_its_plan_before_its_first_charge_too(site: Site, frozen: Backbone) -> None:
    """A run that is resumed before it was charged goes on as it began."""
    join(site, offer(frozen, 1))
    before = site.ledger().history().list_earmarked()
    join(site, offer(frozen, 4))
    assert read_first_round(site.config.state_dir / "runs" / "run-1") == 1
    assert site.ledger().history().list_earmarked() == before


def test_a_late_site_that_was_not_charged_plans_anew_for_what_is_left(site: Site, frozen: Backbone) -> None:
    join(site, offer(frozen, 3))
    join(site, offer(frozen, 5))
    [held] = site.ledger().history().list_earmarked()
    assert held.steps == 2 * STEPS
    give_backbone(site, "run-1", frozen)
    noise = train_round(site, frozen, 5)
    assert independent_epsilon(noise, 1.0, 2 * STEPS) == pytest.approx(TARGET, rel=0.03)


def test_a_site_for_which_no_round_is_left_is_told_so_and_holds_nothing(site: Site, frozen: Backbone) -> None:
    with pytest.raises(SiteDeclined, match="came too late; nothing was charged") as caught:
        join(site, offer(frozen, ROUNDS + 1))
    assert caught.value.reason == DeclineReason.OVERTAKEN
    assert not (site.config.state_dir / "runs" / "run-1").exists()
    join(site, offer(frozen, ROUNDS))
    with pytest.raises(SiteDeclined, match="came too late"):
        join(site, offer(frozen, ROUNDS + 1))
    assert site.ledger().history().list_earmarked() == []


def test_a_damaged_note_of_the_first_round_charges_nothing(site: Site, frozen: Backbone) -> None:
    join(site, offer(frozen, 4))
    give_backbone(site, "run-1", frozen)
    for damaged in (b"", b"0", b"soon", b"4\n4", b"99999999999"):
        (site.config.state_dir / "runs" / "run-1" / "first_round").write_bytes(damaged)
        with pytest.raises(SiteDeclined, match="first_round"):
            train_round(site, frozen, 4)
    assert site.ledger().charges() == []
