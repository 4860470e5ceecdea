"""The part of a budget that is held for the runs that a site joined."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.config import NoisedEvaluation
from client.ledger.ledger import Ledger
from common.privacy.accounting import Mechanism
from common.privacy.gaussian import gdp_mu
from common.types import BudgetExhausted, Unit

CAP, DELTA = 8.0, 1e-5
ROUNDS = 10


def opened(folder: Path) -> Ledger:
    return Ledger.open(folder, population="oncology", unit=Unit.PATIENT, epsilon_cap=CAP, delta=DELTA)


def releases(share: float, rounds: int = 1) -> Mechanism:
    """As many rounds of a run which takes this part of the cap in ROUNDS rounds."""
    return Mechanism("gaussian", (ROUNDS / share) ** 0.5 / gdp_mu(CAP, DELTA), 1.0, rounds, 1.0)


def earmark(ledger: Ledger, run: str, share: float) -> None:
    ledger.earmark(releases(share, ROUNDS), run=run, rounds=ROUNDS)


def charge(ledger: Ledger, run: str, share: float, round_: int) -> None:
    ledger.commit(ledger.reserve(releases(share), run=run, round=round_, request=f"{round_:04x}"))


def test_a_second_run_is_not_joined_where_both_do_not_fit(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    earmark(ledger, "first", 0.6)
    with pytest.raises(BudgetExhausted, match="120"):
        earmark(ledger, "second", 0.6)
    earmark(ledger, "second", 0.4)
    assert not ledger.affords([releases(0.01)])


def test_an_earmarked_run_is_paid_to_its_last_round_whatever_else_asks(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    earmark(ledger, "first", 0.6)
    with pytest.raises(BudgetExhausted, match="joined runs"):
        ledger.reserve(releases(0.5, ROUNDS), run="other", round=1, request="00")
    charge(ledger, "other", 0.4, 1)
    for number in range(1, ROUNDS + 1):
        charge(opened(tmp_path), "first", 0.6, number)
    assert opened(tmp_path).history().compute_share() == pytest.approx(0.64)
    assert opened(tmp_path).history().list_earmarked() == []


def test_joining_again_holds_nothing_twice_and_writes_nothing(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    earmark(ledger, "first", 0.9)
    charge(ledger, "first", 0.9, 1)
    before = len(ledger.lines())
    earmark(ledger, "first", 0.9)
    assert len(ledger.lines()) == before
    [rest] = ledger.history().list_earmarked()
    assert rest.steps == ROUNDS - 1


def test_a_round_that_a_crash_charged_twice_shortens_no_other_round(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    earmark(ledger, "first", 0.5)
    for _ in range(2):
        ledger.reserve(releases(0.5), run="first", round=1, request="01")
    [rest] = ledger.history().list_earmarked()
    assert rest.steps == ROUNDS - 1


def test_a_second_charge_of_a_round_is_refused_where_all_else_is_held(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    earmark(ledger, "first", 1.0)
    charge(ledger, "first", 1.0, 1)
    with pytest.raises(BudgetExhausted):
        ledger.reserve(releases(1.0), run="first", round=1, request="02")


def test_what_is_released_is_free_again_and_a_later_join_holds_the_rest(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    earmark(ledger, "first", 0.8)
    charge(ledger, "first", 0.8, 1)
    assert ledger.release("first")
    assert not ledger.release("first")
    assert not ledger.release("unknown")
    earmark(ledger, "second", 0.9)
    with pytest.raises(BudgetExhausted):
        earmark(ledger, "first", 0.8)
    assert ledger.release("second")
    earmark(ledger, "first", 0.8)
    [rest] = ledger.history().list_earmarked()
    assert rest.steps == ROUNDS - 1


def test_a_sampled_run_that_joins_first_fixes_the_filter_beside_held_evaluations(tmp_path: Path) -> None:
    """Priced as full batch it would not fit."""
    sampled = Mechanism("gaussian", 1.0, 0.01, 100, 1.0)
    held = NoisedEvaluation(share=0.1, evaluations=5)
    opened(tmp_path / "a").earmark(sampled, run="first", rounds=10, evaluation_budget=held)
    assert not opened(tmp_path / "b").affords([Mechanism("gaussian", 1.0, 1.0, 100, 1.0)])
