"""Distances of means: what noise adds is taken off, what is left of it is said; a file is read whole or not at all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from common.serving.means import (
    HOME,
    FeatureMean,
    combine_means,
    compute_distance,
    read_means,
    select_backbone,
    write_means,
)
from common.serving.similarity import compare_means
from common.types import BadInput

DIM = 64
RNG = np.random.default_rng(5)


def make_mean(name: str, scale: float = 0.1, *, deviation: float = 0.0, units: float = 100.0) -> FeatureMean:
    return FeatureMean(name, "a" * 64, scale * RNG.normal(size=DIM), deviation, units, "records")


def add_noise(mean: FeatureMean, deviation: float) -> FeatureMean:
    return replace(mean, mean_D=mean.mean_D + deviation * RNG.normal(size=DIM), deviation=deviation)


@pytest.mark.parametrize("scale", [0.0, 0.1])
def test_the_distance_of_noised_means_is_that_of_the_exact_ones_on_average_with_the_error_it_says(scale: float) -> None:
    one, other = make_mean("east", scale), make_mean("west", scale)
    exact = compute_distance(one, other)
    assert exact.error == 0.0 and exact.value == pytest.approx(np.square(one.mean_D - other.mean_D).sum())
    draws = [compute_distance(add_noise(one, 0.03), add_noise(other, 0.05)) for _ in range(4000)]
    values = np.array([each.value for each in draws])
    assert abs(values.mean() - exact.value) < 4 * values.std() / np.sqrt(len(values))
    said = np.sqrt(np.mean([each.error**2 for each in draws]))
    # A distance of 0 is estimated above 0 half the time, which lengthens what is said of the noise.
    assert values.std() * 0.95 < said < values.std() * (1.15 if scale else 1.4)
    assert all(each.shown >= 0.0 for each in draws)


def test_the_mean_of_several_sites_is_that_over_their_units_with_their_noise() -> None:
    one, other = make_mean("east", deviation=0.03, units=30), make_mean("west", deviation=0.01, units=90)
    both = combine_means([one, other], "both")
    np.testing.assert_allclose(both.mean_D, (30 * one.mean_D + 90 * other.mean_D) / 120)
    assert both.units == 120 and both.deviation == pytest.approx(np.hypot(30 * 0.03, 90 * 0.01) / 120)


def test_a_site_is_compared_with_the_mean_of_all_others_which_lacks_its_own_noise() -> None:
    sites = [make_mean(name, deviation=0.02, units=units) for name, units in (("a", 50), ("b", 20), ("c", 70))]
    home = replace(make_mean(HOME), is_home=True)
    (found,) = compare_means(sites, home)
    assert [each.name for each in found.means] == [HOME, "a", "b", "c"]
    assert found.others["a"] == compute_distance(sites[0], combine_means(sites[1:], "others"))
    assert found.others[HOME] == compute_distance(home, combine_means(sites, "all"))
    assert found.distances["a"]["b"] == found.distances["b"]["a"] == compute_distance(sites[0], sites[1])
    another = replace(make_mean("d"), digest="b" * 64)
    tables = compare_means([*sites, another], home)
    assert [len(each.means) for each in tables] == [4, 1] and not tables[1].others


def test_means_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = [make_mean("east", deviation=0.1), replace(make_mean(HOME), is_home=True)]
    write_means(tmp_path / "means.safetensors", written)
    for path in (tmp_path, tmp_path / "means.safetensors"):
        for before, after in zip(written, read_means(path), strict=True):
            assert np.array_equal(before.mean_D, after.mean_D)
            assert replace(before, mean_D=after.mean_D) == replace(after)


def spoil(path: Path, **changes: object) -> Path:
    about = {"tensor": "t", "name": "a", "backbone": "b", "deviation": 0.0, "units": 1.0, "source": "", "home": False}
    path.write_bytes(save({"t": np.ones(3)}, metadata={"means": json.dumps([{**about, **changes}])}))
    return path


def test_a_file_without_whole_means_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"found no means.safetensors; a run leaves .* `moments.means`"):
        read_means(tmp_path)
    path = tmp_path / "file"
    path.write_bytes(save({"mean": np.ones(3, np.float32)}))
    with pytest.raises(BadInput, match="expected a file with means of features, got another one"):
        read_means(path)
    path.write_bytes(b"{")
    with pytest.raises(BadInput, match="expected a file with means of features, got SafetensorError"):
        read_means(path)
    assert read_means(spoil(path))[0].units == 1.0
    for changes in (
        {"name": "\x1b[2J"},
        {"source": "a" * 500},
        {"units": 1e300},
        {"deviation": 1e300},
        {"units": 0},
        {"units": "nan"},
        {"deviation": -1},
        {"deviation": "inf"},
        {"tensor": "x"},
    ):
        with pytest.raises(BadInput, match="expected a file with means of features, got"):
            read_means(spoil(path, **changes))


@pytest.mark.parametrize("values", [np.full(3, 1e300), np.ones(0), np.ones((2, 2))])
def test_a_mean_that_is_none_is_refused(tmp_path: Path, values: np.ndarray) -> None:
    write_means(tmp_path / "means.safetensors", [replace(make_mean("east"), mean_D=values)])
    with pytest.raises(BadInput, match="expected a file with means of features, got"):
        read_means(tmp_path)


def test_means_of_different_lengths_are_refused() -> None:
    one, other = make_mean("east"), make_mean("west")
    short = replace(other, mean_D=other.mean_D[1:])
    with pytest.raises(BadInput, match="one number of features in all files, got 63 and 64"):
        compute_distance(one, short)
    with pytest.raises(BadInput, match="one number of features in all files, got 63 and 64"):
        combine_means([one, short], "both")


def test_means_of_another_backbone_are_refused(tmp_path: Path) -> None:
    means = [make_mean("east"), replace(make_mean("west"), digest="b" * 64)]
    assert select_backbone(means, {"b" * 64}, tmp_path) == means[1:]
    with pytest.raises(BadInput, match=r"expected means of features of backbone cccccccccccc, got .*aaaaaaaaaaaa"):
        select_backbone(means, {"c" * 64}, tmp_path)
