"""The share of a budget for evaluations: it pays for so many and no more, and nothing else may spend it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from hypothesis import given, settings
from hypothesis import strategies as st

from client.config import NoisedEvaluation
from client.ledger import chain
from client.ledger.evaluation_budget import (
    compute_evaluation_noise,
    count_evaluations_left,
    list_unspent,
    make_evaluation_mechanism,
)
from client.ledger.events import EVALUATION, TRAINING, ChargeRefused, Terms, read_lines, write_facts
from client.ledger.history import Charge, History
from client.ledger.ledger import Ledger
from common.privacy.accounting import Mechanism, compute_epsilon
from common.privacy.gaussian import gdp_mu
from common.types import BudgetExhausted, Unit

DELTA, CAP = 1e-5, 3.0
SHARE = NoisedEvaluation(share=0.2, evaluations=4)
TERMS = Terms(Unit.PATIENT, CAP, DELTA)


def opened(folder: Path) -> Ledger:
    return Ledger.open(folder, population="oncology", unit=Unit.PATIENT, epsilon_cap=CAP, delta=DELTA)


def gaussian(mu: float) -> Mechanism:
    return Mechanism("gaussian", 1.0 / mu, 1.0, 1, 1.0)


def train(ledger: Ledger, mechanism: Mechanism, share: NoisedEvaluation | None = SHARE) -> None:
    ledger.reserve(mechanism, run="run", round=1, request="00", evaluation_budget=share)


def evaluate(ledger: Ledger, share: NoisedEvaluation = SHARE, num_tasks: int = 2) -> Mechanism:
    return ledger.reserve_evaluation(share, num_tasks, run="run", round=1, request="ff")[1]


def test_all_evaluations_together_cost_their_share_by_dp_accounting(tmp_path: Path) -> None:
    """And with the training that the rest affords, the whole cap: checked with an independent accountant."""
    ledger = opened(tmp_path)
    for _ in range(SHARE.evaluations):
        evaluate(ledger)
    rest = math.sqrt((1.0 - SHARE.share) * gdp_mu(CAP, DELTA) ** 2)
    train(ledger, gaussian(rest))
    oracle = [
        pld.from_gaussian_mechanism(sigma, pessimistic_estimate=True, value_discretization_interval=1e-4)
        for sigma in (compute_evaluation_noise(SHARE, TERMS), 1.0 / rest)
    ]
    evaluations = oracle[0].self_compose(SHARE.evaluations)
    assert evaluations.get_epsilon_for_delta(DELTA) == pytest.approx(
        compute_epsilon([make_evaluation_mechanism(SHARE, TERMS, 2)] * SHARE.evaluations, DELTA), rel=2e-3
    )
    assert evaluations.compose(oracle[1]).get_epsilon_for_delta(DELTA) == pytest.approx(CAP, rel=2e-3)
    assert ledger.spent().reserved_epsilon <= CAP * (1 + 1e-9)


def test_one_evaluation_more_than_the_share_pays_for_is_refused_however_much_is_left(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    for left in range(SHARE.evaluations, 0, -1):
        assert count_evaluations_left(SHARE, ledger.history()) == left
        evaluate(ledger)
    assert count_evaluations_left(SHARE, ledger.history()) == 0
    before = ledger.spent()
    with pytest.raises(BudgetExhausted, match="share of 0.2"):
        evaluate(ledger)
    assert ledger.spent() == before and before.reserved_epsilon < 0.5 * CAP
    assert [line.event.purpose for line in ledger.lines() if isinstance(line.event, ChargeRefused)] == [EVALUATION]


def test_the_noise_of_an_evaluation_does_not_depend_on_how_many_tasks_share_it(tmp_path: Path) -> None:
    one, three = make_evaluation_mechanism(SHARE, TERMS, 1), make_evaluation_mechanism(SHARE, TERMS, 3)
    assert one.noise_multiplier == three.noise_multiplier
    assert (one.sensitivity, three.sensitivity) == (1.0, pytest.approx(math.sqrt(3)))


def test_training_cannot_spend_the_share(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    most = math.sqrt(1.0 - SHARE.share) * gdp_mu(CAP, DELTA)
    with pytest.raises(BudgetExhausted, match="held for evaluations"):
        train(ledger, gaussian(most * 1.001))
    assert not ledger.affords([gaussian(most * 1.001)], SHARE) and ledger.affords([gaussian(most * 1.001)])
    train(ledger, gaussian(most))
    for _ in range(SHARE.evaluations):
        evaluate(ledger)
    with pytest.raises(BudgetExhausted):
        train(ledger, gaussian(0.01))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.just(None), st.floats(0.01, 0.5)), max_size=12))
def test_in_whatever_order_requests_come_the_share_and_the_cap_hold(requests: list[float | None]) -> None:
    """A model of the ledger in one line of arithmetic: None asks for an evaluation, a number trains at that mu."""
    charges: dict[int, Charge] = {}
    for number, mu in enumerate(requests):
        history = History(TERMS, dict(charges))
        mechanism = make_evaluation_mechanism(SHARE, TERMS, 1) if mu is None else gaussian(mu)
        purpose = EVALUATION if mu is None else TRAINING
        allowed = (
            count_evaluations_left(SHARE, history) > 0
            if mu is None
            else history.is_within_cap([mechanism, *list_unspent(SHARE, history)])
        )
        if allowed:
            charges[number] = Charge("run", 1, "", mechanism, True, purpose)
    whole = gdp_mu(CAP, DELTA) ** 2
    trained, evaluated = (
        sum(1 / each.mechanism.noise_multiplier**2 for each in charges.values() if each.purpose == purpose)
        for purpose in (TRAINING, EVALUATION)
    )
    assert trained <= (1 - SHARE.share) * whole * (1 + 1e-6)
    asked = sum(mu is None for mu in requests)
    # Whoever trains first or last: evaluations are answered exactly as long as their own number lasts.
    assert round(evaluated * SHARE.evaluations / (SHARE.share * whole)) == min(asked, SHARE.evaluations)


def test_charges_of_a_ledger_that_knows_no_evaluations_are_of_training(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    train(ledger, gaussian(0.1), share=None)
    with chain.exclusive(tmp_path / "oncology") as held:
        lines = [json.loads(body) for body in held.bodies]
    assert lines[-1].pop("purpose") == TRAINING
    old = read_lines([json.dumps(line) for line in lines])
    # A recovery writes such a line again as it was.
    assert list(write_facts(old[-1].event)) == ["run", "round", "request", "mechanism"]
    history = History.of(old)
    assert [each.purpose for each in history.charges.values()] == [TRAINING]
    assert count_evaluations_left(SHARE, history) == SHARE.evaluations


def test_another_share_later_does_not_forget_what_was_spent(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    for _ in range(SHARE.evaluations):
        evaluate(ledger)
    smaller, larger = NoisedEvaluation(share=0.1, evaluations=4), NoisedEvaluation(share=0.4, evaluations=4)
    assert count_evaluations_left(smaller, ledger.history()) == 0 and list_unspent(smaller, ledger.history()) == []
    assert count_evaluations_left(larger, ledger.history()) == 2  # Half of the larger share is spent.
    # More evaluations on an unspent share are smaller ones; the share stays the share.
    assert list_unspent(larger, ledger.history())[0].noise_multiplier == pytest.approx(
        1 / math.sqrt(0.2 * gdp_mu(CAP, DELTA) ** 2)
    )
