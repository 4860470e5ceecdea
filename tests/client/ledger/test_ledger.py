"""The ledger's rules: charge first, compose everything, refuse beyond the cap, never forget."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from hypothesis import given, settings
from hypothesis import strategies as st

from client.ledger.events import ChargeRefused, TermsAmended
from client.ledger.history import History
from client.ledger.ledger import Ledger, Reservation, amend
from common.privacy.accounting import Mechanism, compute_epsilon
from common.privacy.filters import calibrate_noise_multiplier
from common.types import BadInput, BudgetExhausted, LedgerDamaged, Unit

ROOT = Path(__file__).resolve().parents[3]
DELTA = 1e-5


def opened(folder: Path, *, cap: float = 3.0, delta: float = DELTA, unit: Unit = Unit.PATIENT) -> Ledger:
    return Ledger.open(folder, population="oncology", unit=unit, epsilon_cap=cap, delta=delta)


def gaussian(sigma: float, rate: float = 1.0, steps: int = 1) -> Mechanism:
    return Mechanism("gaussian", sigma, rate, steps, 1.0)


def charge(ledger: Ledger, mechanism: Mechanism, run: str = "run", round_: int = 1) -> Reservation:
    return ledger.reserve(mechanism, run=run, round=round_, request="00ff")


def test_a_new_ledger_has_spent_nothing(tmp_path: Path) -> None:
    spent = opened(tmp_path).spent()
    assert (spent.spent_epsilon, spent.reserved_epsilon, spent.left_epsilon) == (0.0, 0.0, 3.0)
    assert (spent.population, spent.terms.unit, spent.terms.relation) == ("oncology", Unit.PATIENT, "add_remove")


def test_the_history_that_charges_leave_is_the_one_that_their_lines_state(tmp_path: Path) -> None:
    ledger = opened(tmp_path, cap=9.0)
    ledger.earmark(gaussian(4.0, steps=9), run="run", rounds=3)
    ledger.commit(charge(ledger, gaussian(4.0, steps=3)))
    charge(ledger, gaussian(3.0, 0.5), run="other", round_=2)
    with pytest.raises(BudgetExhausted):
        charge(ledger, gaussian(0.1), run="third")
    ledger.release("run")
    assert ledger.history() == History.of(ledger.lines())


def test_twenty_rounds_cost_the_composed_truth_not_the_last_round(tmp_path: Path) -> None:
    """Each round opens the ledger anew, as a site does; dp_accounting bounds the truth from both sides."""
    round_mechanism = gaussian(1.5, 0.1, 10)
    for number in range(1, 21):
        ledger = opened(tmp_path, cap=6.0)
        ledger.commit(charge(ledger, round_mechanism, round_=number))
    spent = opened(tmp_path, cap=6.0).spent()
    bounds = [
        pld.from_gaussian_mechanism(
            1.5, sampling_prob=0.1, pessimistic_estimate=pessimistic, value_discretization_interval=5e-4
        )
        .self_compose(200)
        .get_epsilon_for_delta(DELTA)
        for pessimistic in (False, True)
    ]
    assert bounds[0] <= spent.spent_epsilon <= 1.005 * bounds[1]
    assert spent.spent_epsilon == spent.reserved_epsilon == opened(tmp_path, cap=6.0).compute_run_epsilon("run")
    assert spent.spent_epsilon > 3 * compute_epsilon([round_mechanism], DELTA)


def test_a_run_calibrated_to_the_cap_fits_to_its_last_round_and_no_further(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    sigma = calibrate_noise_multiplier(3.0, DELTA, 1.0, 12 * 5)
    assert ledger.affords([gaussian(sigma, steps=60)])
    for number in range(12):
        charge(ledger, gaussian(sigma, steps=5), round_=number)
    with pytest.raises(BudgetExhausted):
        charge(ledger, gaussian(sigma, steps=5))


def test_a_refused_charge_spends_nothing_and_is_logged(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    charge(ledger, gaussian(2.0))
    before = ledger.spent()
    assert not ledger.affords([gaussian(1.0)])
    with pytest.raises(BudgetExhausted, match="oncology"):
        charge(ledger, gaussian(1.0), run="greedy")
    assert ledger.spent() == before
    assert ledger.compute_run_epsilon("greedy") == 0.0
    assert [line.event.event for line in ledger.lines()] == ["created", "reserved", "refused"]
    last = ledger.lines()[-1].event
    assert isinstance(last, ChargeRefused) and last.run == "greedy"
    charge(ledger, gaussian(30.0))  # A smaller one still passes.


@settings(max_examples=10, deadline=None)
@given(sigmas=st.lists(st.floats(0.5, 20), min_size=1, max_size=8))
def test_the_composed_total_never_exceeds_the_cap(
    sigmas: list[float], tmp_path_factory: pytest.TempPathFactory
) -> None:
    ledger = opened(tmp_path_factory.mktemp("ledgers"))
    granted = []
    for sigma in sigmas:
        try:
            charge(ledger, gaussian(sigma))
            granted.append(gaussian(sigma))
        except BudgetExhausted:
            assert compute_epsilon([*granted, gaussian(sigma)], DELTA) > 3.0
    assert compute_epsilon(granted, DELTA) == ledger.spent().reserved_epsilon <= 3.0 * (1 + 1e-9)


def test_a_reservation_counts_before_it_is_committed(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    first = charge(ledger, gaussian(4.0), run="a")
    charge(ledger, gaussian(4.0), run="b")
    ledger.commit(first)
    spent = ledger.spent()
    assert spent.spent_epsilon == compute_epsilon([gaussian(4.0)], DELTA)
    assert spent.reserved_epsilon == compute_epsilon([gaussian(4.0)] * 2, DELTA)
    assert spent.left_epsilon == 3.0 - spent.reserved_epsilon
    assert [(each.run, each.committed) for each in ledger.charges()] == [("a", True), ("b", False)]


def test_the_same_request_reserved_again_is_a_new_charge(tmp_path: Path) -> None:
    """After a crash without a stored reply, noise may have been drawn: only a stored reply is free."""
    ledger = opened(tmp_path)
    assert charge(ledger, gaussian(4.0)) != charge(ledger, gaussian(4.0))
    assert len(ledger.charges()) == 2


def test_runs_share_the_registrys_budget(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    for run in ("a", "b"):
        charge(ledger, gaussian(2.0), run=run)
    assert ledger.compute_run_epsilon("a") == ledger.compute_run_epsilon("b") == compute_epsilon([gaussian(2.0)], DELTA)
    with pytest.raises(BudgetExhausted):
        charge(ledger, gaussian(1.5), run="c")


def test_a_reservation_is_committed_once(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    reservation = charge(ledger, gaussian(4.0))
    ledger.commit(reservation)
    for wrong in (reservation, replace(reservation, number=0), replace(reservation, number=99)):
        with pytest.raises(BadInput, match="open"):
            ledger.commit(wrong)


def test_a_release_without_noise_needs_consent_and_leaves_infinity(tmp_path: Path) -> None:
    ledger, noiseless = opened(tmp_path), Mechanism("none", 0.0, 1.0, 1, None)
    with pytest.raises(BudgetExhausted):
        charge(ledger, noiseless)
    ledger.reserve(noiseless, run="run", round=1, request="00ff", allow_infinite=True)
    assert ledger.spent().reserved_epsilon == math.inf
    assert ledger.spent().left_epsilon == 0.0
    with pytest.raises(BudgetExhausted):  # Consent is for releases without noise; it does not lift the cap.
        ledger.reserve(gaussian(50.0), run="run", round=2, request="00ff", allow_infinite=True)


# --- terms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "key"),
    [({"cap": 5.0}, "budget.epsilon"), ({"delta": 1e-6}, "budget.delta"), ({"unit": Unit.EXAMPLE}, "unit")],
    ids=["cap", "delta", "unit"],
)
def test_other_terms_in_the_site_file_are_refused_by_name(tmp_path: Path, change: dict, key: str) -> None:
    opened(tmp_path)
    with pytest.raises(BadInput, match=f"^{key}: .*logged"):
        opened(tmp_path, **change)


def test_a_raised_cap_is_logged_and_resets_nothing(tmp_path: Path) -> None:
    charge(opened(tmp_path), gaussian(2.0))
    amend(tmp_path, population="oncology", unit=Unit.PATIENT, epsilon_cap=5.0, delta=1e-6)
    ledger = opened(tmp_path, cap=5.0, delta=1e-6)
    assert ledger.spent().reserved_epsilon == compute_epsilon([gaussian(2.0)], 1e-6)
    last = ledger.lines()[-1].event
    assert isinstance(last, TermsAmended) and (last.before.epsilon_cap, last.epsilon_cap) == (3.0, 5.0)
    with pytest.raises(BadInput, match="logged"):
        opened(tmp_path)


def test_a_cap_lowered_below_what_is_spent_leaves_nothing(tmp_path: Path) -> None:
    charge(opened(tmp_path), gaussian(2.0))
    amend(tmp_path, population="oncology", unit=Unit.PATIENT, epsilon_cap=1.0, delta=DELTA)
    ledger = opened(tmp_path, cap=1.0)
    assert ledger.spent().left_epsilon == 0.0
    assert not ledger.affords([gaussian(1000.0)])


def test_the_unit_can_change_before_the_first_charge_only(tmp_path: Path) -> None:
    opened(tmp_path)
    amend(tmp_path, population="oncology", unit=Unit.EXAMPLE, epsilon_cap=3.0, delta=DELTA)
    charge(opened(tmp_path, unit=Unit.EXAMPLE), gaussian(4.0))
    with pytest.raises(BadInput, match="first charge"):
        amend(tmp_path, population="oncology", unit=Unit.PATIENT, epsilon_cap=3.0, delta=DELTA)


def test_a_ledger_that_began_with_full_batch_counts_sampling_only_after_an_amendment(tmp_path: Path) -> None:
    """A coordinator must not choose the filter in view of outputs; the staff may."""
    charge(opened(tmp_path), gaussian(20.0))
    sampled = gaussian(1.0, 0.01, 20)
    with pytest.raises(BudgetExhausted, match=r"began with full-batch runs: `budget\.filter: renyi`"):
        charge(opened(tmp_path), sampled)
    with pytest.raises(BadInput, match=r"budget\.filter"):
        Ledger.open(tmp_path, population="oncology", unit=Unit.PATIENT, epsilon_cap=3.0, delta=DELTA, filter="renyi")
    amend(tmp_path, population="oncology", unit=Unit.PATIENT, epsilon_cap=3.0, delta=DELTA, filter="renyi")
    ledger = Ledger.open(
        tmp_path, population="oncology", unit=Unit.PATIENT, epsilon_cap=3.0, delta=DELTA, filter="renyi"
    )
    charge(ledger, sampled)
    assert ledger.history().find_filter().kind == "renyi"


def test_a_sampled_charge_does_not_change_the_filter_of_a_ledger_that_began_with_full_batch(tmp_path: Path) -> None:
    """Else one cheap sampled charge lets a coordinator choose between two filters in view of outputs."""
    charge(opened(tmp_path), gaussian(20.0))
    before = opened(tmp_path).history().find_filter()
    charge(opened(tmp_path), gaussian(100.0, 0.01))
    assert opened(tmp_path).history().find_filter() == before
    with pytest.raises(BudgetExhausted, match=r"began with full-batch runs: `budget\.filter: renyi`"):
        charge(opened(tmp_path), gaussian(1.0, 0.01, 20), round_=2)


def test_the_first_sampled_charge_fixes_the_order_for_all_that_follow(tmp_path: Path) -> None:
    charge(opened(tmp_path), gaussian(1.0, 0.01))
    before = opened(tmp_path).history().find_filter()
    for number in range(3):
        charge(opened(tmp_path), gaussian(40.0, 0.5, 100), round_=number)
        charge(opened(tmp_path), gaussian(60.0), round_=number)
    assert opened(tmp_path).history().find_filter() == before
    assert before.kind == "renyi"


def test_an_amendment_needs_a_ledger_and_a_change(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no ledger"):
        amend(tmp_path, population="oncology", unit=Unit.PATIENT, epsilon_cap=3.0, delta=DELTA)
    opened(tmp_path)
    with pytest.raises(BadInput, match="already"):
        amend(tmp_path, population="oncology", unit=Unit.PATIENT, epsilon_cap=3.0, delta=DELTA)


@pytest.mark.parametrize("change", [{"cap": 0.0}, {"cap": math.inf}, {"delta": 0.0}, {"delta": 1.0}], ids=str)
def test_impossible_terms_are_refused_and_create_nothing(tmp_path: Path, change: dict) -> None:
    with pytest.raises(BadInput):
        opened(tmp_path, **change)
    assert not list(tmp_path.iterdir())


def test_registries_do_not_share_a_ledger(tmp_path: Path) -> None:
    charge(opened(tmp_path), gaussian(2.0))
    other = Ledger.open(tmp_path, population="cardiology", unit=Unit.PATIENT, epsilon_cap=3.0, delta=DELTA)
    assert other.spent().reserved_epsilon == 0.0


# --- damage and crashes ----------------------------------------------------------------------------------------------


def test_a_damaged_ledger_stops_every_use(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    charge(ledger, gaussian(2.0))
    path = tmp_path / "oncology" / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"noise_multiplier":2.0', b'"noise_multiplier":9.0'))
    for use in (lambda: opened(tmp_path), ledger.spent, ledger.lines, lambda: charge(ledger, gaussian(9.0))):
        with pytest.raises(LedgerDamaged, match="oncology"):
            use()


RESERVE_AND_WAIT = """
import sys, time
from pathlib import Path
from client.ledger.events import ChargeRefused, TermsAmended
from client.ledger.ledger import Ledger
from common.privacy.accounting import Mechanism
from common.types import Unit
ledger = Ledger.open(Path(sys.argv[1]), population="oncology", unit=Unit.PATIENT, epsilon_cap=3.0, delta=1e-5)
ledger.reserve(Mechanism("gaussian", 2.0, 1.0, 1, 1.0), run="run", round=1, request="00ff")
print("reserved", flush=True)
time.sleep(60)
ledger.commit(None)
"""

RESERVE_ALL = """
import sys
from pathlib import Path
from client.ledger.events import ChargeRefused, TermsAmended
from client.ledger.ledger import Ledger
from common.privacy.accounting import Mechanism
from common.types import BudgetExhausted, Unit
granted = 0
for number in range(12):
    ledger = Ledger.open(Path(sys.argv[1]), population="oncology", unit=Unit.PATIENT, epsilon_cap=3.0, delta=1e-5)
    try:
        ledger.reserve(Mechanism("gaussian", float(sys.argv[2]), 1.0, 1, 1.0), run="run", round=1, request="00ff")
        granted += 1
    except BudgetExhausted:
        pass
print(granted)
"""


def run(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_process_killed_between_reserve_and_commit_keeps_its_charge(tmp_path: Path) -> None:
    process = run(RESERVE_AND_WAIT, str(tmp_path))
    assert process.stdout is not None
    assert process.stdout.readline() == "reserved\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    spent = opened(tmp_path).spent()
    assert spent.spent_epsilon == 0.0
    assert spent.reserved_epsilon == compute_epsilon([gaussian(2.0)], DELTA)


def test_two_processes_at_once_never_exceed_the_cap(tmp_path: Path) -> None:
    sigma = calibrate_noise_multiplier(3.0, DELTA, 1.0, 9)  # Nine such charges fit, a tenth does not.
    processes = [run(RESERVE_ALL, str(tmp_path), repr(sigma)) for _ in range(2)]
    granted = [int(process.communicate(timeout=60)[0]) for process in processes]
    assert sum(granted) == 9
    ledger = opened(tmp_path)
    assert ledger.spent().reserved_epsilon <= 3.0 * (1 + 1e-9)
    assert [line.event.event for line in ledger.lines()].count("refused") == 2 * 12 - 9


def test_a_history_that_grew_line_by_line_is_the_one_that_is_read_at_once(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, population="p", unit=Unit.EXAMPLE, epsilon_cap=50.0, delta=1e-5)
    other = Mechanism("gaussian", 9.0, 1.0, 3, 1.0)
    for round_ in range(1, 6):
        done = ledger.reserve(
            other if round_ % 2 else replace(other, noise_multiplier=20.0), run="a", round=round_, request="0"
        )
        if round_ != 3:
            ledger.commit(done)
        if round_ == 4:
            amend(tmp_path, population="p", unit=Unit.EXAMPLE, epsilon_cap=60.0, delta=1e-5)
    grown, whole = ledger.history(), History.of(ledger.lines())
    assert grown == whole
    assert [charge.committed for charge in grown.charges.values()] == [True, True, False, True, True]
    one_by_one = History(whole.terms, whole.charges)
    assert grown.compute_share() == pytest.approx(one_by_one.compute_share(), rel=1e-12)
    assert grown.compute_epsilon() == one_by_one.compute_epsilon()
