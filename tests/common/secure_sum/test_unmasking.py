"""The sum of masked vectors is the sum of the vectors, bit by bit, whoever leaves at whatever step."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from common.secure_sum.terms import SumRules
from common.types import BadInput
from tests.common.secure_sum.members import Group, add_modulo, draw_values, make_members, make_terms


def run_group(
    num_sites: int,
    *,
    min_sites: int = 3,
    colluding: int = 0,
    gone: dict[str, list[str]] | None = None,
) -> tuple[Group, dict[str, NDArray[np.int64]]]:
    """Runs one attempt; `gone` names the sites that leave before each step."""
    group = Group(make_members(num_sites), make_terms(min_sites, colluding))
    values, gone = draw_values(list(group.members)), gone or {}
    group.advertise(gone.get("keys", []))
    group.share(gone.get("shares", []))
    group.mask(values, gone.get("masked", []))
    group.confirm(gone.get("survivors", []))
    group.reveal(gone.get("reveal", []))
    return group, values


@pytest.mark.parametrize(("num_sites", "colluding"), [(3, 0), (3, 1), (4, 1), (5, 2), (10, 3), (23, 0), (50, 5)])
def test_the_sum_is_exact(num_sites: int, colluding: int) -> None:
    group, values = run_group(num_sites, min_sites=max(3, colluding + 2), colluding=colluding)
    assert group.unmask().tolist() == add_modulo(list(values.values()))


@pytest.mark.parametrize("step", ["keys", "shares", "masked", "survivors", "reveal"])
def test_sites_may_leave_before_any_step(step: str) -> None:
    lost = ["site-01", "site-06"]
    group, values = run_group(7, gone={step: lost})
    counted = [name for name in values if step in ("survivors", "reveal") or name not in lost]
    assert list(group.masked) == counted
    assert group.unmask().tolist() == add_modulo([values[name] for name in counted])


def test_sites_may_leave_before_every_step() -> None:
    gone = {"keys": ["site-00"], "shares": ["site-01"], "masked": ["site-02"], "survivors": ["site-03"]}
    group, values = run_group(13, gone={**gone, "reveal": ["site-04"]})
    counted = [name for name in values if name not in ("site-00", "site-01", "site-02")]
    assert group.unmask().tolist() == add_modulo([values[name] for name in counted])


def test_a_masked_vector_says_nothing_of_its_values() -> None:
    """Not a proof: of zeros, the masked vector has the moments of uniform bytes, and no two sites' are alike."""
    group = Group(make_members(5), make_terms())
    group.advertise()
    group.share()
    group.mask({name: np.zeros(20_000, np.int64) for name in group.members})
    for data in group.masked.values():
        counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
        expected = len(data) / 256
        # 255 degrees of freedom: 400 is eleven deviations above the mean.
        assert ((counts - expected) ** 2 / expected).sum() < 400
    assert len(set(group.masked.values())) == 5


def test_without_one_survivors_vector_the_rest_stays_masked() -> None:
    """A coordinator that names a survivor whose vector it leaves out of the sum gets noise, not the others' sum."""
    group, values = run_group(5)
    others = [name for name in values if name != "site-02"]
    del group.masked["site-02"]
    with pytest.raises(BadInput):
        group.unmask()  # What was revealed of it is no mask key.
    total = np.zeros(17, np.uint64)
    for name in others:
        total += np.frombuffer(group.masked[name], "<u8")
    assert total.view(np.int64).tolist() != add_modulo([values[name] for name in others])


def test_too_few_shares_unmask_nothing() -> None:
    group, _ = run_group(7)
    for name in list(group.revealed)[:4]:
        del group.revealed[name]
    with pytest.raises(BadInput, match="at least 4 shares"):
        group.unmask()


def test_a_wrong_share_of_a_mask_key_is_noticed() -> None:
    group, _ = run_group(7, gone={"masked": ["site-03"]})
    group.revealed["site-00"]["site-03"] = "00" * 33
    with pytest.raises(BadInput, match="site-03|one secret"):
        group.unmask()


def test_two_lists_of_survivors_cannot_both_be_confirmed() -> None:
    """For every number of sites: 2 (T - t) honest confirmations are more than there are honest sites."""
    for num_sites in range(2, 60):
        for colluding in range(num_sites - 1):
            rules = SumRules(max(2, colluding + 2), colluding)
            threshold = rules.compute_threshold(num_sites)
            assert 2 * (threshold - colluding) > num_sites - colluding
            assert threshold <= num_sites or colluding > num_sites - 2


@pytest.mark.parametrize(("min_sites", "colluding"), [(1, 0), (3, 2), (3, -1), (513, 0)])
def test_rules_with_fewer_than_two_honest_sites_are_refused(min_sites: int, colluding: int) -> None:
    with pytest.raises(BadInput, match="do not collude"):
        SumRules(min_sites, colluding)
