"""A ledger that many simulated sites share decides for each of them as a ledger of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.config import NoisedEvaluation
from client.ledger.chain import read_legible
from client.ledger.events import Terms
from client.ledger.ledger import Ledger
from client.ledger.shared import SharedLedger
from common.files import without_flushing
from common.privacy.accounting import Mechanism
from common.types import BadInput, BudgetExhausted, LedgerDamaged, Unit

ROOT = Path(__file__).resolve().parents[3]
NAMES = [f"site-{number}" for number in range(5)]
TERMS = Terms(Unit.EXAMPLE, 3.0, 1e-5)
EVERYONE = np.ones(5, np.bool_)


def gaussian(sigma: float, rate: float = 1.0, steps: int = 1) -> Mechanism:
    return Mechanism("gaussian", sigma, rate, steps, 1.0)


def masked(sites: set[int]) -> np.ndarray:
    return np.isin(np.arange(5), list(sites))


def open_own(folder: Path, name: str, terms: Terms = TERMS) -> Ledger:
    return Ledger.open(folder, population=name, unit=terms.unit, epsilon_cap=terms.epsilon_cap, delta=terms.delta)


@settings(max_examples=25, deadline=None)
@given(
    cohorts=st.lists(st.tuples(st.sets(st.integers(0, 4)), st.booleans()), max_size=9),
    rounds=st.sampled_from([None, 3, 6]),
    sigma=st.sampled_from([1.5, 2.5, 4.0]),
    rate=st.sampled_from([1.0, 0.1]),
)
def test_each_site_is_refused_in_the_round_in_which_its_own_ledger_refuses_it(
    tmp_path_factory: pytest.TempPathFactory,
    cohorts: list[tuple[set[int], bool]],
    rounds: int | None,
    sigma: float,
    rate: float,
) -> None:
    """Cohorts of any sites, rounds that are charged again after a crash, and a process that begins anew."""
    with without_flushing():
        compare_ledgers(tmp_path_factory.mktemp("ledgers"), cohorts, rounds, gaussian(sigma, rate, 2))


def test_a_round_charged_again_is_refused_where_the_rest_of_the_run_would_not_be_covered(tmp_path: Path) -> None:
    """Four rounds of an eighth of a squared mu each, of .517: the first one twice, and three held, are too much."""
    compare_ledgers(tmp_path, [({0, 1}, False), ({0}, True), ({0, 1, 2}, False)], 4, gaussian(4.0, 1.0, 2))


def compare_ledgers(
    folder: Path, cohorts: list[tuple[set[int], bool]], rounds: int | None, mechanism: Mechanism
) -> None:
    own = [open_own(folder / "own", name) for name in NAMES]
    shared = SharedLedger.open(folder / "shared", NAMES, TERMS)
    if rounds is not None:
        whole = replace(mechanism, steps=2 * rounds)
        held = shared.earmark(whole, EVERYONE, run="run", rounds=rounds)
        for number, ledger in enumerate(own):
            try:
                ledger.earmark(whole, run="run", rounds=rounds)
                assert held[number]
            except BudgetExhausted:
                assert not held[number]
    round_ = 0
    for cohort, is_repeated in cohorts:
        round_ += not is_repeated or round_ == 0
        shared = SharedLedger.open(folder / "shared", NAMES, TERMS)
        got = shared.reserve(mechanism, masked(cohort), run="run", round=round_, request="00", most_charges=99)
        assert not got.answered_S.any()
        for number in cohort:
            try:
                own[number].reserve(mechanism, run="run", round=round_, request="00")
                assert got.granted_S[number] and not got.refused_S[number]
            except BudgetExhausted:
                assert got.refused_S[number] and not got.granted_S[number]
    if mechanism.sampling_rate == 1.0:  # The epsilon of samples takes a fifth of a second, and is the same function's.
        assert shared.compute_epsilons() == [ledger.spent().reserved_epsilon for ledger in own]


@settings(max_examples=15, deadline=None)
@given(
    releases=st.lists(
        st.tuples(st.sets(st.integers(0, 4), min_size=1), st.sampled_from(["round", "evaluation"])), max_size=9
    ),
    sigma=st.sampled_from([2.5, 4.0]),
    before=st.sampled_from([None, 3.0, 9.0]),
)
def test_evaluations_and_sums_before_the_first_round_are_refused_as_by_each_sites_own_ledger(
    tmp_path_factory: pytest.TempPathFactory,
    releases: list[tuple[set[int], str]],
    sigma: float,
    before: float | None,
) -> None:
    """A part of the budget is held for evaluations, and pays for two; training leaves it alone."""
    budget, folder = NoisedEvaluation(evaluations=2, share=0.3), tmp_path_factory.mktemp("ledgers")
    named, first = {"run": "run", "request": "00"}, None if before is None else gaussian(before)
    with without_flushing():
        own = [open_own(folder / "own", name) for name in NAMES]
        shared = SharedLedger.open(folder / "shared", NAMES, TERMS)
        held_S = shared.earmark(
            gaussian(sigma, steps=4), EVERYONE, run="run", rounds=4, before=first, evaluation_budget=budget
        )
        for number, ledger in enumerate(own):
            held = {"run": "run", "rounds": 4, "before": first, "evaluation_budget": budget}
            assert held_S[number] == passes(
                lambda ledger=ledger, held=held: ledger.earmark(gaussian(sigma, steps=4), **held)
            )
        if first is not None:
            got = shared.reserve(first, EVERYONE, round=0, most_charges=99, evaluation_budget=budget, **named)
            for number, ledger in enumerate(own):
                charge = {"round": 0, "evaluation_budget": budget, **named}
                assert got.granted_S[number] == passes(
                    lambda ledger=ledger, charge=charge: ledger.reserve(first, **charge)
                )
        for round_, (cohort, what) in enumerate(releases, start=1):
            shared = SharedLedger.open(folder / "shared", NAMES, TERMS)
            asked = {"round": round_, **named}
            if what == "round":
                kept = {"evaluation_budget": budget, **asked}
                got = shared.reserve(gaussian(sigma), masked(cohort), most_charges=99, **kept)
                charges = [lambda each=each, kept=kept: each.reserve(gaussian(sigma), **kept) for each in own]
            else:
                got, _ = shared.reserve_evaluation(budget, 1, masked(cohort), most_charges=99, **asked)
                charges = [lambda each=each, asked=asked: each.reserve_evaluation(budget, 1, **asked) for each in own]
            for number in cohort:
                assert got.granted_S[number] == passes(charges[number])
        assert shared.compute_epsilons() == [ledger.spent().reserved_epsilon for ledger in own]


def passes(charge: Callable[[], object]) -> bool:
    """Returns whether a ledger takes a charge."""
    try:
        charge()
    except BudgetExhausted:
        return False
    return True


def test_an_evaluation_of_a_round_is_asked_for_once_and_not_after_a_later_round(tmp_path: Path) -> None:
    shared, budget = SharedLedger.open(tmp_path / "shared", NAMES, TERMS), NoisedEvaluation(evaluations=9, share=0.3)
    named = {"run": "run", "most_charges": 3}
    shared.reserve(gaussian(9.0), EVERYONE, round=1, request="00", **named)
    got, _ = shared.reserve_evaluation(budget, 1, masked({0, 1}), round=1, request="aa", **named)
    shared.commit(got)
    again, _ = shared.reserve_evaluation(budget, 1, EVERYONE, round=1, request="bb", **named)
    assert again.answered_S.tolist() == [True, True, False, False, False]
    shared.reserve(gaussian(9.0), masked({3}), round=2, request="00", **named)
    late, _ = shared.reserve_evaluation(budget, 1, masked({2, 3}), round=1, request="bb", **named)
    assert late.answered_S.tolist() == [False, False, False, True, False]


def test_a_round_is_one_line_however_many_sites_it_charges(tmp_path: Path) -> None:
    names = [f"site-{number}" for number in range(10_000)]
    shared = SharedLedger.open(tmp_path / "shared", names, TERMS)
    before = len(read_legible(tmp_path / "shared"))
    got = shared.reserve(gaussian(9.0), np.ones(10_000, np.bool_), run="run", round=1, request="00", most_charges=3)
    assert got.granted_S.all() and len(read_legible(tmp_path / "shared")) == before + 1


def test_a_round_that_was_answered_is_not_charged_to_another_request(tmp_path: Path) -> None:
    shared, some = SharedLedger.open(tmp_path / "shared", NAMES, TERMS), masked({0, 1})
    shared.commit(shared.reserve(gaussian(9.0), some, run="run", round=2, request="00", most_charges=3))

    def ask(round_: int, request: str) -> list[bool]:
        got = shared.reserve(gaussian(9.0), EVERYONE, run="run", round=round_, request=request, most_charges=3)
        return got.answered_S.tolist()

    assert ask(1, "00") == [True, True, False, False, False], "an earlier round was overtaken"
    assert ask(2, "01") == [True, True, False, False, False], "it was answered already, to another request"


def test_a_round_that_was_answered_stays_so_where_a_crash_cut_it_off_when_it_was_asked_again(tmp_path: Path) -> None:
    shared = SharedLedger.open(tmp_path / "shared", NAMES, TERMS)
    named = {"run": "run", "round": 1, "most_charges": 9}
    shared.commit(shared.reserve(gaussian(9.0), EVERYONE, request="aa", **named))
    assert shared.reserve(gaussian(9.0), masked({0, 1}), request="aa", **named).granted_S.sum() == 2
    again = SharedLedger.open(tmp_path / "shared", NAMES, TERMS)
    assert again.reserve(gaussian(9.0), EVERYONE, request="bb", **named).answered_S.all()
    assert again.reserve(gaussian(9.0), masked({0}), request="aa", **named).granted_S[0]


def test_a_round_is_charged_again_a_few_times_after_crashes_and_then_no_more(tmp_path: Path) -> None:
    for left in (True, True, True, False):
        shared = SharedLedger.open(tmp_path / "shared", NAMES, TERMS)
        got = shared.reserve(gaussian(9.0), EVERYONE, run="run", round=1, request="00", most_charges=3)
        assert bool(got.granted_S.all()) is left and bool(got.answered_S.any()) is not left


CRASH = """
import os, signal, sys
from pathlib import Path
import numpy as np
from tests.client.ledger.test_shared import EVERYONE, NAMES, TERMS, gaussian
from client.ledger.shared import SharedLedger
shared = SharedLedger.open(Path(sys.argv[1]), NAMES, TERMS)
shared.reserve(gaussian(3.0), EVERYONE, run="run", round=1, request="00", most_charges=3)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_charge_that_a_crash_follows_stays_spent(tmp_path: Path) -> None:
    process = subprocess.run([sys.executable, "-c", CRASH, str(tmp_path / "shared")], cwd=ROOT, check=False)
    assert process.returncode == -signal.SIGKILL
    shared = SharedLedger.open(tmp_path / "shared", NAMES, TERMS)
    own = open_own(tmp_path / "own", "site")
    own.reserve(gaussian(3.0), run="run", round=1, request="00")
    assert shared.compute_epsilons() == [own.spent().reserved_epsilon] * 5 and own.spent().reserved_epsilon > 0.5


def test_an_edited_ledger_charges_nothing(tmp_path: Path) -> None:
    shared = SharedLedger.open(tmp_path / "shared", NAMES, TERMS)
    shared.reserve(gaussian(9.0), EVERYONE, run="run", round=1, request="00", most_charges=3)
    path = tmp_path / "shared" / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"sites":"f8"', b'"sites":"00"'))
    with pytest.raises(LedgerDamaged):
        shared.reserve(gaussian(9.0), EVERYONE, run="run", round=2, request="01", most_charges=3)


def test_a_ledger_serves_the_sites_and_terms_that_it_was_made_for(tmp_path: Path) -> None:
    SharedLedger.open(tmp_path / "shared", NAMES, TERMS)
    with pytest.raises(BadInput, match="expected the ledger of these 4 sites"):
        SharedLedger.open(tmp_path / "shared", NAMES[:4], TERMS)
    with pytest.raises(BadInput, match="terms"):
        SharedLedger.open(tmp_path / "shared", NAMES, Terms(Unit.EXAMPLE, 30.0, 1e-5))
    with pytest.raises(LedgerDamaged, match="another version"):
        open_own(tmp_path, "shared")


def test_another_process_sees_a_charge_once_it_is_granted(tmp_path: Path) -> None:
    shared = SharedLedger.open(tmp_path / "shared", NAMES, TERMS)
    got = shared.reserve(gaussian(9.0), EVERYONE, run="run", round=1, request="00", most_charges=3)
    code = f"print(open({str(tmp_path / 'shared' / 'ledger.jsonl')!r}).read().count('sites_reserved'))"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=dict(os.environ))
    assert seen.stdout.strip() == b"1" and got.witness.length == got.number + 1  # type: ignore[operator]
