"""Sums over all sites that compare backbones: one unit moves a release by at most its bound, whatever it holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from client.choice.moments import (
    COUNTS,
    MeanClassifier,
    add_up_classes,
    add_up_hits,
    check_one_class,
    draw_directions,
    reduce_features,
)
from client.data.units import TaskRecords, Units
from common.privacy.lattice import Lattice
from common.tasks import LabelPrior, open_task
from common.types import BadInput
from simulations.choice.moments import make_classifiers

DIMS = {"small": 3, "large": 50}
DIRECTIONS = {name: draw_directions("ab" * 32, dim) for name, dim in DIMS.items()}
LATTICE = Lattice.of(1.0, 2.0, bound_bits=32)


def open_classes(count: int = 3) -> LabelPrior:
    opened = open_task({"kind": "classification", "labels": [f"c{number}" for number in range(count)]}, "task")
    assert isinstance(opened, LabelPrior)
    return opened


def make_units(rng: np.random.Generator, num_units: int, num_records: int, last: Any = None) -> Units:
    """Units of a random number of records; with `last` one unit more, of records with these features."""
    unit_R = np.sort(rng.integers(0, num_units, num_records))
    labels_R = rng.integers(0, 3, num_records)
    tasks = {}
    extra = 0 if last is None else len(next(iter(last.values())))
    for name, dim in DIMS.items():
        rows_RD = rng.normal(size=(num_records, dim)) + np.eye(dim)[labels_R]
        if last is not None:
            rows_RD = np.concatenate([rows_RD, last[name]])
        units = torch.from_numpy(np.concatenate([unit_R, np.full(extra, num_units)]))
        labels = torch.from_numpy(np.concatenate([labels_R, np.arange(extra) % 3]))
        mask_R = torch.ones(len(units), dtype=torch.bool)
        total = num_units + (last is not None)
        features_RD = torch.from_numpy(rows_RD.astype(np.float32))
        tasks[name] = TaskRecords.of(features_RD, labels, mask_R, units, total)
    return Units(num_units + (last is not None), tasks)


def classify(rng: np.random.Generator) -> dict[str, MeanClassifier]:
    widths = {name: min(dim, 32) for name, dim in DIMS.items()}
    return {name: MeanClassifier(rng.normal(size=(3, width)), rng.random(3)) for name, width in widths.items()}


@pytest.mark.parametrize("seed", range(6))
def test_one_unit_more_moves_either_release_by_at_most_the_bound(seed: int) -> None:
    """The unit's records are hostile: huge, tiny, not finite, or all the same."""
    rng, count = np.random.default_rng(seed), 1 + seed
    hostile = {name: rng.normal(size=(count, dim)) * 10.0 ** rng.integers(-30, 30) for name, dim in DIMS.items()}
    hostile["large"][0] = [np.inf, 1e30, 1.0][seed % 3]
    without = make_units(np.random.default_rng(seed), 300, 700)
    one_more = make_units(np.random.default_rng(seed), 300, 700, hostile)
    classifiers = classify(rng)
    for sums in (
        lambda units, half: add_up_classes(open_classes(), units, DIRECTIONS, half, LATTICE),
        lambda units, half: add_up_hits(open_classes(), units, DIRECTIONS, classifiers, half, LATTICE),
    ):
        half_U = rng.random(301) < 0.5
        for chosen in (True, False):
            half_U[-1] = chosen
            moved = (sums(one_more, half_U) - sums(without, half_U[:-1])).double().norm()
            # In the other half it moves nothing.
            assert moved <= LATTICE.bound if chosen else moved == 0.0
            if chosen and seed == 2:
                assert moved > 0.1 * LATTICE.bound  # The bound is not far off.


def test_a_record_has_the_same_bits_beside_any_others() -> None:
    """A product of matrices rounds otherwise for few rows, and a record beside others would count as another one."""
    rng, directions_DE = np.random.default_rng(3), draw_directions("cd" * 32, 768)
    features_RD = torch.from_numpy(rng.normal(size=(301, 768)).astype(np.float32))
    whole_RE = reduce_features(features_RD, directions_DE)
    for count in (1, 2, 3, 5, 13):
        assert torch.equal(reduce_features(features_RD[:count], directions_DE), whole_RE[:count])
    task, half_U, classifiers = open_classes(), np.ones(40, bool), classify(rng)
    units = make_units(rng, 40, 40)
    for sums in (
        lambda units, half: add_up_classes(task, units, DIRECTIONS, half, LATTICE),
        lambda units, half: add_up_hits(task, units, DIRECTIONS, classifiers, half, LATTICE),
    ):
        alone = [
            sums(Units(40, {name: _select(records, unit) for name, records in units.tasks.items()}), half_U)
            for unit in range(40)
        ]
        assert torch.equal(torch.stack(alone).sum(0), sums(units, half_U))


def _select(records: TaskRecords, unit: int) -> TaskRecords:
    return records.taken((records.unit_R == unit).nonzero().squeeze(1), records.unit_R)


def test_sums_are_those_of_a_loop_over_records() -> None:
    rng, task = np.random.default_rng(7), open_classes()
    units, half_U = make_units(rng, 40, 90), np.arange(40) < 25
    whole = add_up_classes(task, units, DIRECTIONS, half_U, LATTICE).double().numpy() * LATTICE.spacing
    expected, position = [np.zeros(3)], 3
    for name, records in units.tasks.items():
        rows = reduce_features(records.features_RD, DIRECTIONS[name]).numpy()
        sums_CE = np.zeros((3, rows.shape[1]))
        for row, label, unit, weight in zip(rows, records.labels, records.unit_R, records.weight_R, strict=True):
            if half_U[unit]:
                sums_CE[label] += float(weight) * row
                expected[0][label] += float(weight) / 2 if name in DIMS else 0.0
        expected.append(sums_CE.ravel())
    np.testing.assert_allclose(whole[:3], expected[0] * COUNTS**0.5, rtol=1e-3)
    for sums in expected[1:]:
        found = whole[position : position + len(sums)]
        np.testing.assert_allclose(found, sums * ((1 - COUNTS) / 2) ** 0.5, rtol=1e-3, atol=1e-4)
        position += len(sums)
    assert position == len(whole)


def test_hits_are_the_units_that_are_nearest_to_their_class() -> None:
    rng, task = np.random.default_rng(8), open_classes()
    units, half_U = make_units(rng, 60, 60), np.ones(60, bool)
    whole = add_up_classes(task, units, DIRECTIONS, half_U, LATTICE).double().numpy() * LATTICE.spacing
    classifiers = make_classifiers(whole, 0.0, 3, {"small": 3, "large": 32})
    hits_K = add_up_hits(task, units, DIRECTIONS, classifiers, half_U, LATTICE).double().numpy() * LATTICE.spacing
    for name, hits in zip(DIMS, hits_K, strict=True):
        records = units.tasks[name]
        rows = reduce_features(records.features_RD, DIRECTIONS[name]).numpy()
        weights, own = records.weight_R.numpy(), [records.labels.numpy() == label for label in range(3)]
        means = np.stack([np.average(rows[each], axis=0, weights=weights[each]) for each in own])
        nearest = np.square(rows[:, None] - means[None]).sum(2).argmin(1)
        expected = float((weights * (nearest == records.labels.numpy())).sum())
        assert hits * 2**0.5 == pytest.approx(expected, abs=0.5)


def test_squares_of_means_are_without_what_noise_adds() -> None:
    rng, noise = np.random.default_rng(9), 3.0
    means_CE = rng.normal(size=(3, 32)) * 0.3
    exact = np.concatenate([np.full(3, 200.0) * COUNTS**0.5, (200.0 * means_CE).ravel() * (1 - COUNTS) ** 0.5])
    drawn = [
        make_classifiers(exact + noise * rng.normal(size=len(exact)), noise, 3, {"one": 32})["one"].squares_C
        for _ in range(2000)
    ]
    np.testing.assert_allclose(np.mean(drawn, axis=0), np.square(means_CE).sum(1), rtol=0.05)


def test_directions_follow_from_the_digest_and_are_orthonormal() -> None:
    one, other = draw_directions("1" * 64, 50), draw_directions("2" * 64, 50)
    assert one is not None and other is not None and not np.allclose(one, other)
    np.testing.assert_allclose(one.T @ one, np.eye(32), atol=1e-12)
    assert np.array_equal(one, draw_directions("1" * 64, 50)) and draw_directions("1" * 64, 32) is None


def test_a_task_whose_records_have_several_classes_is_refused() -> None:
    check_one_class(open_classes(), "colour")
    several = open_task({"kind": "multilabel", "labels": ["a", "b"]}, "task")
    assert isinstance(several, LabelPrior)
    with pytest.raises(BadInput, match=r"tasks\.findings: expected a task whose records have one class each"):
        check_one_class(several, "findings")
