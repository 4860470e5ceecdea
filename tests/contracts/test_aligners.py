"""The law of every aligner in the folder, and the arithmetic of the two that move features.

# Shapes: C classes, D features, R records.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from client.aligners import Aligner, Alignment, Array, SourceMoments, TargetRecords, open_aligner
from client.aligners.coral_em import CoralEm
from client.aligners.mean_std import MeanStd
from common.plugins import kinds, plugin_class

KINDS = kinds("client.aligners")


def aligner(kind: str) -> Aligner:
    """A kind with the settings of its own example; called inside tests, so that a broken kind fails alone."""
    cls: Any = plugin_class("client.aligners", kind)
    return open_aligner(cls.example(), "aligner")


def some_source(
    rng: np.random.Generator, classes: int = 3, dim: int = 5, noise_C: Array | None = None
) -> SourceMoments:
    spread_DD = rng.normal(size=(dim, dim))
    return SourceMoments(
        0.4 * rng.normal(size=(classes, dim)),
        0.02 * spread_DD @ spread_DD.T + 0.01 * np.eye(dim),
        rng.dirichlet(np.full(classes, 5.0)),
        noise_C,
    )


def some_records(rng: np.random.Generator, count: int, dim: int = 5) -> TargetRecords:
    rows_RD = rng.normal(size=(count, dim)) + rng.normal(size=dim)
    rows_RD /= np.maximum(np.linalg.norm(rows_RD, axis=1, keepdims=True), 1e-12)
    return TargetRecords(rows_RD, rng.choice([1.0, 0.5, 1.0 / 3.0], size=count))


def fitting_records(rng: np.random.Generator, source: SourceMoments, mix_C: Array, count: int = 40) -> TargetRecords:
    """Records whose mean and covariance are exactly the released ones at a mix."""
    dim = source.means_CD.shape[1]
    rows_RD = rng.normal(size=(count, dim))
    rows_RD -= rows_RD.mean(axis=0)
    own_DD = np.linalg.cholesky(rows_RD.T @ rows_RD / count)
    asked_DD = np.linalg.cholesky(source.compute_covariance(mix_C))
    return TargetRecords(np.linalg.solve(own_DD, rows_RD.T).T @ asked_DD.T + source.compute_mean(mix_C), np.ones(count))


def list_values(alignment: Alignment) -> list[Array]:
    means = [] if alignment.means_CD is None else [alignment.means_CD]
    return [alignment.scale, alignment.shift_D, *means]


@pytest.mark.parametrize("kind", KINDS)
def test_an_alignment_follows_from_its_arguments_and_not_from_their_order(kind: str) -> None:
    rng = np.random.default_rng(1)
    source, records, mix_C = some_source(rng), some_records(rng, 30), rng.dirichlet(np.ones(3))
    order = rng.permutation(30)
    turned = TargetRecords(records.features_RD[order], records.weight_R[order])
    first, again, other = (aligner(kind).align(source, each, mix_C) for each in (records, records, turned))
    for one, same, close in zip(list_values(first), list_values(again), list_values(other), strict=True):
        np.testing.assert_array_equal(one, same)
        np.testing.assert_allclose(one, close, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 2, 4, 200])
def test_an_alignment_is_finite_for_any_records_and_any_mix(kind: str, count: int) -> None:
    for seed in range(12):
        rng = np.random.default_rng(seed)
        noise_C = np.full(3, 10.0 ** rng.uniform(-2, 2)) if seed % 4 else None
        source, records = some_source(rng, noise_C=noise_C), some_records(rng, count)
        if seed % 3 == 1 and count:  # All records are one and the same.
            records = TargetRecords(np.repeat(records.features_RD[:1], count, axis=0), records.weight_R)
        if seed % 3 == 2:  # Nothing in them.
            records = TargetRecords(0.0 * records.features_RD, records.weight_R)
        mix_C = np.array([1.0 - 2e-4, 1e-4, 1e-4]) if seed % 2 else rng.dirichlet(np.ones(3)) * 0.999 + 0.001 / 3
        found = aligner(kind).align(source, records, mix_C)
        assert all(np.isfinite(values).all() for values in list_values(found))
        assert np.isfinite(found.apply(some_records(rng, 9).features_RD)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_records_that_have_the_released_moments_stay_where_they_are(kind: str) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        source, mix_C = some_source(rng), rng.dirichlet(np.full(3, 3.0))
        records = fitting_records(rng, source, mix_C)
        moved_RD = aligner(kind).align(source, records, mix_C).apply(records.features_RD)
        np.testing.assert_allclose(moved_RD, records.features_RD, atol=1e-6)


# --- mean_std --------------------------------------------------------------------------------------------------------


def test_mean_and_deviation_become_those_of_the_released_moments_at_the_sites_own_mix() -> None:
    rng = np.random.default_rng(2)
    source, mix_C = some_source(rng), np.array([0.6, 0.3, 0.1])
    # Wanted are deviations in reach of the bound.
    wanted = fitting_records(rng, source, mix_C)
    factor_D = rng.uniform(0.6, 1.8, size=5)
    records = TargetRecords(wanted.features_RD * factor_D + rng.normal(size=5), wanted.weight_R)
    moved_RD = MeanStd().align(source, records, mix_C).apply(records.features_RD)
    np.testing.assert_allclose(moved_RD, wanted.features_RD, atol=1e-9)


def test_a_deviation_is_multiplied_by_no_more_than_the_bound() -> None:
    rng = np.random.default_rng(3)
    source, mix_C = some_source(rng), np.full(3, 1 / 3)
    wanted = fitting_records(rng, source, mix_C)
    records = TargetRecords(wanted.features_RD * np.array([0.01, 100.0, 1.0, 1.0, 1.0]), wanted.weight_R)
    scale_D = MeanStd().align(source, records, mix_C).scale
    np.testing.assert_allclose(scale_D, [2.0, 0.5, 1.0, 1.0, 1.0], rtol=1e-9)


# --- coral_em --------------------------------------------------------------------------------------------------------


def test_the_covariance_becomes_the_released_one_as_far_as_the_records_tell() -> None:
    """With D + n records of which n are the site's: against the definition, by Cholesky instead of eigenvectors."""
    rng = np.random.default_rng(4)
    source, mix_C = some_source(rng), np.array([0.2, 0.3, 0.5])
    records = some_records(rng, 60)
    found = CoralEm().align(source, records, mix_C)
    asked_DD, own_DD = source.compute_covariance(mix_C), records.compute_covariance()
    kept = records.num_units / (5 + records.num_units)
    shrunk_DD = kept * own_DD + (1 - kept) * asked_DD
    np.testing.assert_allclose(found.scale.T @ shrunk_DD @ found.scale, asked_DD, atol=1e-9)
    weighted_D = records.weight_R @ found.apply(records.features_RD) / records.num_units
    np.testing.assert_allclose(weighted_D, mix_C @ source.means_CD, atol=1e-9)


def test_class_means_are_found_as_one_record_at_a_time_finds_them() -> None:
    rng = np.random.default_rng(5)
    source, mix_C, records = some_source(rng), np.array([0.5, 0.25, 0.25]), some_records(rng, 25)
    found = CoralEm(steps=7, tie=3.0).align(source, records, mix_C)
    inverse_DD = np.linalg.inv(source.within_DD)
    means = [row.copy() for row in source.means_CD]
    for _ in range(7):
        sums, counts = [3.0 * row for row in source.means_CD], [3.0] * 3
        for row_D, weight in zip(found.apply(records.features_RD), records.weight_R, strict=True):
            odds = [
                share * np.exp(-0.5 * (row_D - mean) @ inverse_DD @ (row_D - mean))
                for share, mean in zip(mix_C, means, strict=True)
            ]
            for number, each in enumerate(odds):
                sums[number] += weight * each / sum(odds) * row_D
                counts[number] += weight * each / sum(odds)
        means = [whole / count for whole, count in zip(sums, counts, strict=True)]
    assert found.means_CD is not None
    np.testing.assert_allclose(found.means_CD, means, atol=1e-9)


def test_noise_in_the_released_means_is_cleaned_out_by_the_sites_own_records() -> None:
    """Mean over worlds of the accuracy by the released means and by those that were found."""
    before, after = [], []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        true_CD = np.eye(3, 12)
        labels_R = rng.integers(0, 3, size=900)
        rows_RD = true_CD[labels_R] + 0.25 * rng.normal(size=(900, 12))
        noise_CD = 0.3 * rng.normal(size=(3, 12))
        noisy = SourceMoments(true_CD + noise_CD, 0.15 * np.eye(12), np.full(3, 1 / 3))
        found = CoralEm().align(noisy, TargetRecords(rows_RD, np.ones(900)), np.full(3, 1 / 3))
        assert found.means_CD is not None
        moved_RD = found.apply(rows_RD)
        for means_CD, accuracies in ((noisy.means_CD, before), (found.means_CD, after)):
            distance_RC = ((moved_RD[:, None] - means_CD) ** 2).sum(axis=2)
            accuracies.append(float(np.mean(distance_RC.argmin(axis=1) == labels_R)))
    assert np.mean(after) > np.mean(before) + 0.03
