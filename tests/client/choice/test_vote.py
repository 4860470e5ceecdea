"""A site's vote: rows within their bounds, charged before anything is computed, nothing but the winner released."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client.choice.rows import make_comparable_rows, make_rows
from client.choice.vote import cast_vote
from client.data.units import TaskRecords, Units
from client.ledger.ledger import Ledger
from common.privacy.noise import NoiseStream, os_entropy
from common.scorers import ScoredRows, compute_min_size
from common.scorers.ridge import MARGIN, Ridge
from common.tasks import LabelPrior, open_task
from common.types import BudgetExhausted, Unit

LABELS = ["a", "b", "c"]
SIZE = 400


def task(**settings: Any) -> LabelPrior:
    opened = open_task({"kind": "classification", "labels": LABELS, **settings}, "task")
    assert isinstance(opened, LabelPrior)
    return opened


def records(features_RD: Any, labels_R: Any, unit_R: Any = None) -> TaskRecords:
    count = len(features_RD)
    units = torch.arange(count) if unit_R is None else torch.as_tensor(unit_R)
    return TaskRecords.of(
        torch.as_tensor(np.asarray(features_RD, np.float32)),
        torch.as_tensor(np.asarray(labels_R, np.int64)),
        torch.ones(count, dtype=torch.bool),
        units,
        int(units.max()) + 1 if count else 0,
    )


def make_candidates(seed: int, noises: list[float]) -> Units:
    """Candidates whose features show the class the less, the larger their noise."""
    rng = np.random.default_rng(seed)
    labels_R = rng.integers(0, 3, SIZE)
    clean_RD = np.eye(5)[labels_R]
    return Units(
        SIZE,
        {
            f"c{place}": records(clean_RD + noise * rng.normal(size=clean_RD.shape), labels_R)
            for place, noise in enumerate(noises)
        },
    )


def open_ledger(folder: Path, cap: float = 3.0) -> Ledger:
    return Ledger.open(folder, population="oncology", unit=Unit.EXAMPLE, epsilon_cap=cap, delta=1e-5)


def vote(ledger: Ledger, candidates: Units, scorer: Any = None, epsilon: float = 0.5) -> str:
    name, reservation = cast_vote(
        ledger,
        scorer or Ridge(kind="ridge"),
        task(),
        candidates,
        epsilon=epsilon,
        public_size=SIZE,
        run="choice",
        stream=NoiseStream(os_entropy("vote")),
    )
    ledger.commit(reservation)
    return name


class Failing:
    """A scorer that counts its calls and fails."""

    kind, sensitivity = "failing", 9.25

    def __init__(self) -> None:
        self.calls = 0

    def compute_cost(self, rows: ScoredRows, public_size: int) -> float:
        self.calls += 1
        raise RuntimeError("stop")


def test_a_vote_is_charged_before_anything_is_computed(tmp_path: Path) -> None:
    ledger, scorer = open_ledger(tmp_path), Failing()
    with pytest.raises(RuntimeError):
        vote(ledger, make_candidates(0, [0.1, 0.2]), scorer)
    (charge,) = ledger.charges()
    assert (charge.mechanism.kind, charge.mechanism.choice_epsilon, charge.committed) == ("exponential", 0.5, False)
    assert (charge.mechanism.sensitivity, charge.run, charge.round) == (9.25, "choice", 0)
    assert ledger.spent().reserved_epsilon == 0.5


def test_a_vote_that_the_budget_does_not_cover_computes_nothing(tmp_path: Path) -> None:
    ledger, scorer = open_ledger(tmp_path, cap=1.0), Failing()
    with pytest.raises(BudgetExhausted, match="of the budget of epsilon 1"):
        vote(ledger, make_candidates(0, [0.1, 0.2]), scorer, epsilon=4.0)
    assert scorer.calls == 0 and not ledger.charges()


def test_the_ledger_refuses_votes_once_they_fill_the_budget(tmp_path: Path) -> None:
    """At mu(0.5) = .313 each, a budget of epsilon 3 (mu .719) holds five."""
    ledger, candidates = open_ledger(tmp_path), make_candidates(0, [0.1, 0.2])
    for _ in range(5):
        vote(ledger, candidates)
    with pytest.raises(BudgetExhausted):
        vote(ledger, candidates)
    assert len(Ledger.find(tmp_path, "oncology").charges()) == 5  # type: ignore[union-attr]


def test_the_better_candidate_wins_where_records_are_enough(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path, cap=60.0)
    wins = [vote(ledger, make_candidates(seed, [2.0, 0.1, 2.0]), epsilon=1.0) for seed in range(10)]
    assert wins == ["c1"] * 10


def test_a_candidate_that_reads_fewer_records_does_not_win_by_it(tmp_path: Path) -> None:
    """Of the first, nine units in ten are there; of the second none at all; without their targets both cost less."""
    whole = make_candidates(0, [0.1, 0.1, 0.1])
    few, none = whole.tasks["c0"], whole.tasks["c1"]
    kept = torch.arange(SIZE // 10)
    few, none = few.taken(kept, few.unit_R), none.taken(kept[:0], none.unit_R)
    units = Units(SIZE, {"few": few, "none": none, "all": whole.tasks["c2"]})
    assert vote(open_ledger(tmp_path, cap=60.0), units, epsilon=6.0) == "all"


def test_a_unit_has_the_same_targets_whichever_candidate_reads_it() -> None:
    """Units 0 and 1 have two records: a candidate that reads one of a unit's, or none, is still within the bounds."""
    labels_R, unit_R = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 0, 1, 1])
    first = TaskRecords.of(torch.eye(4)[:2], labels_R[:2], torch.ones(2, dtype=torch.bool), unit_R[:2], 2)
    second = TaskRecords.of(torch.eye(4)[2:], labels_R[2:], torch.ones(2, dtype=torch.bool), unit_R[2:], 2)
    both = TaskRecords.of(torch.eye(4), labels_R, torch.ones(4, dtype=torch.bool), unit_R, 2)
    rows = make_comparable_rows(task(), [first, second, both])
    for own, names in zip(rows, ([0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]), strict=True):
        assert own.features_RD.shape == (4, 4) and own.targets_RC.shape == (4, 3)
        for unit in (0, 1):
            here = np.array(names) == unit
            assert np.square(own.targets_RC[here]).sum() == pytest.approx(2 / 3, abs=1e-3)
    assert not rows[0].features_RD[2:].any() and not rows[1].features_RD[2:].any()


@pytest.mark.parametrize("seed", range(5))
def test_one_unit_more_adds_its_own_rows_to_each_candidate_and_changes_no_other(seed: int) -> None:
    """Whichever candidates read which of the records: costs then move by at most the sensitivity."""
    rng = np.random.default_rng(seed)
    count, scorer = 60, Ridge(kind="ridge")
    labels_R, unit_R = torch.as_tensor(rng.integers(0, 3, count)), torch.as_tensor(np.sort(rng.integers(0, 25, count)))
    features = [torch.as_tensor(rng.normal(size=(count, dim)).astype(np.float32)) for dim in (2, 5, 9)]
    reads = [torch.as_tensor(rng.random(count) < part) for part in (0.3, 0.6, 0.9)]
    extra = int(unit_R[int(rng.integers(count))])

    def make(kept_R: torch.Tensor) -> list[ScoredRows]:
        views = []
        for features_RD, reads_R in zip(features, reads, strict=True):
            here = (reads_R & kept_R).nonzero().squeeze(1)
            mask_R = torch.ones(len(here), dtype=torch.bool)
            views.append(TaskRecords.of(features_RD[here], labels_R[here], mask_R, unit_R[here], 25))
        return make_comparable_rows(task(), views)

    def count_rows(rows: ScoredRows) -> Counter[bytes]:
        return Counter(row.tobytes() for row in np.hstack([rows.features_RD, rows.targets_RC]))

    with_unit, without = make(torch.ones(count, dtype=torch.bool)), make(unit_R != extra)
    for more, fewer in zip(with_unit, without, strict=True):
        assert count_rows(fewer) <= count_rows(more)
        added = count_rows(more) - count_rows(fewer)
        rows_RX = np.array([np.frombuffer(row) for row in added.elements()]).reshape(-1, more.features_RD.shape[1] + 3)
        assert np.square(rows_RX[:, :-3]).sum() <= 1.0 and np.square(rows_RX[:, -3:]).sum() <= 1.0
        change = scorer.compute_cost(more, 25) - scorer.compute_cost(fewer, 25)
        assert -MARGIN <= change <= scorer.sensitivity


def test_the_price_does_not_grow_with_the_number_of_candidates(tmp_path: Path) -> None:
    two, twelve = open_ledger(tmp_path / "a"), open_ledger(tmp_path / "b")
    vote(two, make_candidates(0, [0.1] * 2))
    vote(twelve, make_candidates(0, [0.1] * 12))
    assert [each.mechanism for each in two.charges()] == [each.mechanism for each in twelve.charges()]


def test_rows_keep_their_bounds_whatever_features_are() -> None:
    rng = np.random.default_rng(0)
    features_RD = rng.normal(size=(9, 4)).astype(np.float32) * 10.0 ** rng.integers(-12, 12, (9, 1))
    features_RD[0], features_RD[1, 0], features_RD[2, 0] = 0.0, np.inf, np.nan
    unit_R = [0, 1, 2, 3, 3, 3, 4, 4, 5]
    rows = make_rows(task(), records(features_RD, [0, 1, 2] * 3, unit_R))
    assert len(rows.features_RD) == 7  # Infinite and missing features are left out.
    squares = [np.square(each).sum(1) for each in (rows.features_RD, rows.targets_RC)]
    for unit in ([0], [1, 2, 3], [4, 5], [6]):
        assert all(0.0 <= square[unit].sum() <= 1.0 for square in squares)
    assert squares[0][1:4].sum() > 0.999 and squares[0][0] == 0.0
    assert np.allclose(rows.targets_RC.sum(1), 0.0, atol=1e-4)


def test_a_units_rows_are_the_same_to_the_bit_wherever_it_stands() -> None:
    rng = np.random.default_rng(1)
    features_RD, labels_R = rng.normal(size=(301, 37)), rng.integers(0, 3, 301)
    alone = make_rows(task(), records(features_RD[-1:], labels_R[-1:]))
    among = make_rows(task(), records(features_RD, labels_R))
    assert np.array_equal(alone.features_RD[0], among.features_RD[-1])
    assert np.array_equal(alone.targets_RC[0], among.targets_RC[-1])


def test_the_least_declared_size_follows_from_public_numbers() -> None:
    # 25 x 9.25 / epsilon.
    assert [compute_min_size(Ridge(kind="ridge"), epsilon) for epsilon in (0.5, 1.0, 3.0)] == [463, 232, 78]


def test_rows_of_several_labels_keep_their_bounds() -> None:
    opened = open_task({"kind": "multilabel", "labels": ["cough", "fever", "rash"]}, "task")
    assert isinstance(opened, LabelPrior)
    labels_R = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, -1], [-1, -1, -1]], dtype=torch.float32)
    given = records(np.eye(4), [0] * 4)
    rows = make_rows(opened, replace(given, labels=labels_R))
    squares_R = np.square(rows.targets_RC).sum(1)
    assert (squares_R <= 1.0).all() and (squares_R[:2] > 0.45).all() and squares_R[3] == 0.0
