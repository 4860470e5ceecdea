"""The lattice of a release: bounds that hold in integers, and noise of the claimed size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.privacy.lattice import BOUND_BITS, Lattice, bound_norms, check_unit_count
from common.privacy.noise import NoiseStream
from common.types import BadInput

NOISE = st.floats(1e-3, 1e4)
VALUES = st.lists(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=5, max_size=5), min_size=1, max_size=6
)


def square(integers: torch.Tensor) -> int:
    return sum(int(value) ** 2 for value in integers.flatten().tolist())


@given(clip_norm=st.floats(1e-9, 1e9), noise=NOISE)
def test_the_noise_has_a_power_of_two_steps_and_the_bound_is_the_clip_norm(clip_norm: float, noise: float) -> None:
    lattice = Lattice.of(clip_norm, noise)
    assert lattice.spacing * 2.0**lattice.log2_deviation == pytest.approx(noise * clip_norm, rel=1e-12)
    assert lattice.bound * lattice.spacing == pytest.approx(clip_norm, rel=1e-12)
    assert lattice.bound <= 2**BOUND_BITS


@pytest.mark.parametrize("noise", [0.0, 1e-150, 1e-9, 1e13, 1e200, math.inf, math.nan])
def test_noise_that_is_none_or_absurd_is_refused_in_one_sentence(noise: float) -> None:
    with pytest.raises(BadInput, match="noise_multiplier: expected"):
        Lattice.of(1.0, noise)


@given(values=VALUES, clip_norm=st.sampled_from([1e-9, 0.3, 1e9]), noise=NOISE)
def test_a_part_is_within_the_bound_in_integers_whatever_the_values_are(
    values: list[list[float]], clip_norm: float, noise: float
) -> None:
    lattice = Lattice.of(clip_norm, noise)
    values_UP = torch.tensor(values, dtype=torch.float32)
    parts = lattice.truncate(values_UP, lattice.compute_factors(bound_norms(values_UP)))
    assert torch.equal(parts, parts.trunc())
    for row, part in zip(values_UP, parts, strict=True):
        assert square(part) <= int(lattice.bound**2)
        if not torch.isfinite(row).all():
            assert not part.any(), "a unit that is not finite adds nothing"
    # Nothing of a part depends on the other rows.
    alone = [lattice.truncate(row[None], lattice.compute_factors(bound_norms(row[None]))) for row in values_UP]
    assert torch.equal(parts, torch.cat(alone))


def test_a_short_part_is_kept_and_a_long_one_fills_the_bound() -> None:
    lattice = Lattice.of(1.0, 2.0)
    values_UP = torch.tensor([[0.3, 0.4, 0.0], [3.0, 4.0, 0.0]], dtype=torch.double)
    parts = lattice.truncate(values_UP, lattice.compute_factors(bound_norms(values_UP))) * lattice.spacing
    assert parts[0].tolist() == pytest.approx([0.3, 0.4, 0.0], abs=1e-11)
    assert parts[1].tolist() == pytest.approx([0.6, 0.8, 0.0], rel=1e-5)


def test_what_rounding_may_add_lowers_a_units_own_threshold() -> None:
    lattice = Lattice.of(1.0, 1.0)
    norm_U = torch.tensor([2.0, 2.0, 0.1], dtype=torch.double)
    slack_U = torch.tensor([0.0, lattice.bound / 4, lattice.bound * 2], dtype=torch.double)
    assert lattice.compute_factors(norm_U, slack_U).tolist() == pytest.approx([0.5, 0.375, 0.0], rel=1e-9)


@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=40))
def test_a_bound_is_never_below_the_norm_and_hardly_above(row: list[float]) -> None:
    exact = math.hypot(*row)
    bound = float(bound_norms(torch.tensor([row], dtype=torch.double))[0])
    assert exact * (1 - 1e-15) <= bound <= exact * (1 + 1e-5)


def test_a_released_sum_is_the_sum_plus_noise_on_the_lattice() -> None:
    lattice = Lattice.of(0.5, 3.0)
    total = torch.tensor([7, -9, 2**50], dtype=torch.int64)
    noise = NoiseStream(bytes(32)).rounded_gaussian(3, lattice.log2_deviation)
    released = lattice.release(total.clone(), noise, NoiseStream(bytes(32)))
    assert released.tolist() == [float(int(a) + int(b)) * lattice.spacing for a, b in zip(total, noise, strict=True)]
    noise = NoiseStream(bytes(32)).rounded_gaussian(100_000, lattice.log2_deviation)
    many = lattice.release(torch.zeros(100_000, dtype=torch.int64), noise, NoiseStream(bytes(32)))
    assert float(many.std()) == pytest.approx(1.5, rel=0.02)
    assert np.isfinite(many.numpy()).all()


def test_more_units_than_64_bits_can_sum_are_refused() -> None:
    most = 2 ** (63 - BOUND_BITS) - 1
    assert most * 2**BOUND_BITS < 2**63
    check_unit_count(most)
    with pytest.raises(BadInput, match="units at one site"):
        check_unit_count(most + 1)
