"""A head between two fixed steps: what travels, what trains, and a row that is the same wherever it stands."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from common.model.parameters import load_parameters, parameters
from common.tasks import open_task
from common.tasks.parts.adjusted import AdjustedHead, normalize_rows
from common.types import BadInput, select_trained

TASK = open_task(
    {"kind": "classification", "labels": ["a", "b", "c"], "head": {"bias": False, "centre": True, "prior": True}}, "t"
)


def make_head(features: int = 20) -> AdjustedHead:
    head = TASK.head(features)
    assert isinstance(head, AdjustedHead)
    generator = torch.Generator().manual_seed(1)
    for values in (*head.parameters(), *head.buffers()):
        values.data = torch.randn(values.shape, generator=generator)
    return head


def test_fixed_numbers_travel_with_the_head_and_are_in_no_update() -> None:
    values = parameters(make_head())
    assert set(values) == {"layers.weight", "fixed.centre", "fixed.offset"}
    assert set(select_trained(values)) == {"layers.weight"}
    other = TASK.head(20)
    load_parameters(other, values)
    assert all(np.array_equal(values[name], each) for name, each in parameters(other).items())
    with pytest.raises(BadInput, match="finite"):
        load_parameters(other, {**values, "fixed.centre": values["fixed.centre"] * np.float32("nan")})


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_a_row_is_adjusted_to_the_same_bits_wherever_and_beside_whatever_it_stands(scale: float) -> None:
    head = make_head(333)
    # In double precision: rounding to float32 would hide a sum whose last bits depend on its place.
    rows = scale * torch.randn(257, 333, generator=torch.Generator().manual_seed(2)).double()
    whole = head.adjust(rows)
    order = torch.randperm(257, generator=torch.Generator().manual_seed(3))
    assert torch.equal(head.adjust(rows[order]), whole[order])
    for row in range(0, 257, 16):
        assert torch.equal(head.adjust(rows[row : row + 1])[0], whole[row])
    assert (whole.norm(dim=1) - 1.0).abs().max() < 1e-5


def test_both_ways_of_computing_agree_and_the_second_has_a_gradient() -> None:
    head = make_head()
    rows = torch.randn(9, 20, generator=torch.Generator().manual_seed(4)).requires_grad_()
    outputs = head(rows)
    assert isinstance(head.layers, nn.Linear) and head.offset_K is not None
    torch.testing.assert_close(outputs, head.layers(head.adjust(rows.detach())) + head.offset_K)
    assert torch.autograd.grad(outputs.sum(), rows)[0].abs().sum() > 0


def test_rows_of_zeros_stay_and_rows_that_are_not_finite_do_not_become_usable() -> None:
    rows = torch.zeros(3, 4)
    rows[1, 0], rows[2, 0] = float("nan"), float("inf")
    found = normalize_rows(rows)
    assert not found[0].any() and not torch.isfinite(found[1:]).all(dim=1).any()
