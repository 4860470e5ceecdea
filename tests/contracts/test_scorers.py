"""The law of every scorer in the folder: what one unit changes of a cost, sought by attack; ridge's arithmetic.

# Shapes: R rows, D features, C targets.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mpmath import matrix, mp, mpf

from common.plugins import kinds, plugin_class
from common.scorers import ROUNDING, Array, ScoredRows, Scorer, open_scorer
from common.scorers.ridge import MARGIN, Ridge, _minimise

KINDS = kinds("common.scorers")
PUBLIC_SIZE = 60


def scorer(kind: str) -> Scorer:
    """A kind with the settings of its own example; called inside tests, so that a broken kind fails alone."""
    cls: Any = plugin_class("common.scorers", kind)
    return open_scorer(cls.example(), "scorer")


def limit(rows_RX: Array) -> Array:
    """Rows of length at most 1."""
    return rows_RX / np.maximum(1.0, np.linalg.norm(rows_RX, axis=1, keepdims=True))


def hostile_rows(rng: np.random.Generator) -> ScoredRows:
    """Rows as an attacker would have them: random, aligned, short, of one class, more than declared, or none."""
    count = int(rng.choice([0, 1, 5, PUBLIC_SIZE, 4 * PUBLIC_SIZE, 20 * PUBLIC_SIZE]))
    dim, classes = int(rng.choice([1, 2, 5, 30])), int(rng.choice([2, 3, 10]))
    features_RD = limit(rng.normal(size=(count, dim)) * rng.choice([0.05, 1.0, 10.0]))
    targets_RC = limit(rng.normal(size=(count, classes)) * 10.0)
    match rng.integers(4):
        case 0:  # All weight on one direction that fits the targets: the largest W for its rows.
            sign_R1 = np.sign(rng.normal(size=(count, 1)))
            features_RD = np.zeros((count, dim))
            features_RD[:, :1] = sign_R1 * rng.choice([0.06**0.5, (0.06 / 20) ** 0.5, 0.1, 1.0])
            targets_RC = np.zeros((count, classes))
            targets_RC[:, :1] = sign_R1
        case 1:
            targets_RC[:] = targets_RC[:1]
        case 2:
            features_RD[:] = features_RD[:1]
        case _:
            pass
    return ScoredRows(features_RD, targets_RC)


def search_change(kind: Scorer, rows: ScoredRows, rng: np.random.Generator) -> list[float]:
    """Returns changes of the score by one unit, each as large as a search from an extreme record makes it."""
    dim, classes = rows.features_RD.shape[1], rows.targets_RC.shape[1]
    before = kind.compute_cost(rows, PUBLIC_SIZE)

    def change(unit: tuple[Array, Array]) -> float:
        both = ScoredRows(np.vstack([rows.features_RD, unit[0]]), np.vstack([rows.targets_RC, unit[1]]))
        return kind.compute_cost(both, PUBLIC_SIZE) - before

    first_D, first_C = np.eye(dim)[:1], np.eye(classes)[:1]
    units = [(sign * first_D, other * first_C) for sign in (1, -1) for other in (1, -1)]
    units += [(0.0 * first_D, first_C), (first_D, 0.0 * first_C)]
    units += [(limit(rng.normal(size=(1, dim)) * 9), limit(rng.normal(size=(1, classes)) * 9)) for _ in range(3)]
    changes = [change(unit) for unit in units]
    best = units[int(np.argmax(changes))]
    for _ in range(15):
        step = 10.0 ** rng.uniform(-2, 0)
        trial = (
            limit(best[0] + step * rng.normal(size=best[0].shape)),
            limit(best[1] + step * rng.normal(size=best[1].shape)),
        )
        changes.append(change(trial))
        if changes[-1] > max(changes[:-1]):
            best = trial
    return changes


@pytest.mark.parametrize("kind", KINDS)
def test_no_unit_changes_a_cost_beyond_the_sensitivity(kind: str) -> None:
    found, opened = [], scorer(kind)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        found += search_change(opened, hostile_rows(rng), rng)
    assert max(found) - min(found) <= opened.sensitivity - ROUNDING
    assert np.isfinite(found).all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_patient_of_several_records_changes_more_either(kind: str) -> None:
    opened, found = scorer(kind), []
    for seed in range(60):
        rng = np.random.default_rng(1000 + seed)
        rows = hostile_rows(rng)
        records = int(rng.integers(2, 6))
        # Each record has the root of its weight.
        features_RD = limit(rng.normal(size=(records, rows.features_RD.shape[1])) * 9) / records**0.5
        targets_RC = limit(rng.normal(size=(records, rows.targets_RC.shape[1])) * 9) / records**0.5
        both = ScoredRows(np.vstack([rows.features_RD, features_RD]), np.vstack([rows.targets_RC, targets_RC]))
        found.append(opened.compute_cost(both, PUBLIC_SIZE) - opened.compute_cost(rows, PUBLIC_SIZE))
    assert max(found) - min(found) <= opened.sensitivity - ROUNDING


@pytest.mark.parametrize("kind", KINDS)
def test_a_site_without_rows_has_a_finite_cost(kind: str) -> None:
    assert np.isfinite(scorer(kind).compute_cost(ScoredRows(np.zeros((0, 3)), np.zeros((0, 2))), PUBLIC_SIZE))


# --- ridge -----------------------------------------------------------------------------------------------------------


def make_worst_rows(count: int) -> tuple[ScoredRows, ScoredRows]:
    """The rows with the largest W of so many units, without and with the unit that it fits worst."""
    sign_R1 = np.where(np.arange(count) % 2, 1.0, -1.0)[:, None]
    rows = ScoredRows(sign_R1 * 0.06**0.5, sign_R1)
    return rows, ScoredRows(np.vstack([rows.features_RD, [[1.0]]]), np.vstack([rows.targets_RC, [[-1.0]]]))


def test_the_bound_on_a_change_is_nearly_reached() -> None:
    without, with_it = make_worst_rows(20_000)
    ridge = Ridge(kind="ridge")
    assert ridge.sensitivity == 9.25
    assert 9.2 < ridge.compute_cost(with_it, 20_000) - ridge.compute_cost(without, 20_000) <= 9.25


def test_more_units_than_declared_change_no_more() -> None:
    """Without its bound W would have three times the norm here, and the change would be above 40."""
    without, with_it = make_worst_rows(20_000)
    ridge = Ridge(kind="ridge")
    free = 0.06**0.5 * 20_000 / (0.06 * 20_000 + 0.06 * 500)
    assert free > 1.9 * ridge.bound
    assert ridge.compute_cost(with_it, 500) - ridge.compute_cost(without, 500) <= 9.25


def test_the_bound_changes_nothing_up_to_the_declared_size() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        rows = hostile_rows(rng)
        if 0 < len(rows.features_RD) <= PUBLIC_SIZE:
            gram = rows.features_RD.T @ rows.features_RD + 0.06 * PUBLIC_SIZE * np.eye(rows.features_RD.shape[1])
            cross = rows.features_RD.T @ rows.targets_RC
            free = float(np.square(rows.targets_RC).sum() - (cross * np.linalg.solve(gram, cross)).sum())
            assert Ridge(kind="ridge").compute_cost(rows, PUBLIC_SIZE) == pytest.approx(free, abs=1e-9)


def minimum(rows: ScoredRows, penalty: float, bound: float) -> Any:
    """The least of the objective, with fifty digits."""
    features, targets = matrix(rows.features_RD.tolist()), matrix(rows.targets_RC.tolist())
    gram, cross = features.T * features, features.T * targets

    def solve(multiplier: Any) -> Any:
        return mp.inverse(gram + multiplier * mp.eye(gram.rows)) * cross

    def square(values: Any) -> Any:
        return mp.fsum(value**2 for value in values)

    low = mpf(penalty)
    if square(solve(low)) > mpf(bound) ** 2:
        high = low + mp.sqrt(square(cross)) / bound
        for _ in range(160):
            middle = (low + high) / 2
            low, high = (low, middle) if square(solve(middle)) <= mpf(bound) ** 2 else (middle, high)
    weights = solve(low)
    return square(targets - features * weights) + penalty * square(weights)


@pytest.mark.parametrize("seed", range(12))
def test_a_cost_is_the_minimum_up_to_its_margin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count, dim = int(rng.choice([2, 40, 300])), int(rng.choice([2, 4]))
    # Nearly parallel features: an ill-conditioned system.
    features_RD = limit(rng.normal(size=(1, dim)) + 10.0 ** rng.uniform(-8, 0) * rng.normal(size=(count, dim)))
    rows = ScoredRows(features_RD, limit(5.0 * rng.normal(size=(count, 2)) + 10.0 * rng.normal(size=(1, 2))))
    public_size = int(rng.choice([1, 5, 500]))
    ridge = Ridge(kind="ridge")
    with mp.workdps(50):
        exact = minimum(rows, 0.06 * public_size, ridge.bound)
        assert abs(mpf(ridge.compute_cost(rows, public_size)) - exact) < MARGIN


def test_two_million_parallel_units_stay_within_the_margin() -> None:
    """The most units that a site can have: W must not exceed its bound, and the cost has a closed form."""
    count, public_size = 2**21, 500
    rows = ScoredRows(np.ones((count, 1)), np.ones((count, 1)))
    ridge = Ridge(kind="ridge")
    least = count * 0.06 * public_size / (count + 0.06 * public_size)
    assert abs(ridge.compute_cost(rows, public_size) - least) < MARGIN
    assert float(np.linalg.norm(_minimise(rows.features_RD, -rows.targets_RC, 1e-3, 0.5))) <= 0.5


def test_the_order_of_rows_changes_nothing_beyond_the_margin() -> None:
    rng = np.random.default_rng(3)
    features_RD, targets_RC = limit(rng.normal(size=(200, 30))), limit(rng.normal(size=(200, 4)))
    order = rng.permutation(200)
    first = Ridge(kind="ridge").compute_cost(ScoredRows(features_RD, targets_RC), PUBLIC_SIZE)
    second = Ridge(kind="ridge").compute_cost(ScoredRows(features_RD[order], targets_RC[order]), PUBLIC_SIZE)
    assert abs(first - second) < MARGIN
