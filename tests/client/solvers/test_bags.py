"""Bags through the private step: a loop over single bags, exact sums, and what stands behind a bag's last item."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from client.data.units import TaskRecords, Units
from client.solvers import open_solver
from common.tasks import Task, open_task
from common.types import Plan, Unit
from tests.client.solvers.test_dp_sgd import SilentStream
from tests.client.solvers.test_exact_sums import LATTICE, draw_heads, sum_by_opacus

FEATURES, ITEMS = 6, 5
CASES: list[tuple[dict[str, Any], list[list[str]]]] = [
    ({"kind": "classification", "labels": ["a", "b", "c"], "head": {"pooling": "mean"}}, [["a"], ["b"], ["c"]]),
    (
        {"kind": "multilabel", "labels": ["x", "y"], "head": {"pooling": "max", "hidden": 4}},
        [["x"], ["x|y"], ["y"]],
    ),
    (
        {"kind": "regression", "range": [0, 1], "head": {"pooling": "attention", "width": 3}},
        [["0"], ["1"], ["0.4"]],
    ),
    (
        {"kind": "survival", "boundaries": [1, 2], "head": {"pooling": "gated_attention", "width": 3, "hidden": 4}},
        [["1.5", "1"], ["3", "0"], ["0.5", "1"]],
    ),
]


def make_bags(task: Task, cells: list[list[str]], count: int) -> TaskRecords:
    """Returns bags of one to five items; patients have one or two of them."""
    generator = torch.Generator().manual_seed(3)
    features_RND = torch.randn(count, ITEMS, FEATURES, generator=generator)
    features_RND[..., -1] = 1.0
    for row in range(count):
        features_RND[row, 1 + row % ITEMS :] = 0.0
    labels = torch.stack([task.codec.encode(cells[row % len(cells)]) for row in range(count)])
    unit_R = torch.arange(count) * 2 // 3
    return TaskRecords.of(features_RND, labels, torch.ones(count, dtype=torch.bool), unit_R, int(unit_R[-1]) + 1)


def pool_slowly(head: Any, bag_ND: Tensor, pooling: str) -> Tensor:
    """Returns a head's outputs of one bag as it is, without an item behind its last: the definition."""
    items_NH = bag_ND if head.items is None else torch.tanh(bag_ND @ head.items.weight.T + head.items.bias)
    if pooling == "max":
        pooled_H = torch.stack([items_NH[:, at].max() for at in range(items_NH.shape[1])])
    elif pooling == "mean":
        pooled_H = sum(items_NH) / len(items_NH)  # type: ignore[assignment]
    else:
        own = head.scores
        units_NL = torch.tanh(items_NH @ own.hidden.weight.T + own.hidden.bias)
        if pooling == "gated_attention":
            units_NL = units_NL / (1.0 + torch.exp(-(items_NH @ own.gate.weight.T + own.gate.bias)))
        powers_N = torch.exp(units_NL @ own.score.weight[0])
        pooled_H = (powers_N[:, None] * items_NH).sum(0) / powers_N.sum()
    outputs_K: Tensor = head.last.weight @ pooled_H + head.last.bias
    return outputs_K


@pytest.mark.parametrize(("settings", "cells"), CASES)
@pytest.mark.parametrize("clip_norm", [0.05, 20.0])
def test_the_released_sum_is_that_of_a_loop_over_single_bags(
    settings: dict[str, Any], cells: list[list[str]], clip_norm: float
) -> None:
    tasks = {"told": open_task(settings, "told")}
    records = make_bags(tasks["told"], cells, 9)
    units, modules = Units(int(records.unit_R[-1]) + 1, {"told": records}), draw_heads(tasks, 0.7, FEATURES)
    spec = {"kind": "dp_sgd", "sampling_rate": 1.0, "steps": 1, "clip_norm": clip_norm, "learning_rate": 1.0}
    update = open_solver(spec, "solver").solve(
        modules,
        tasks,
        units,
        plan=Plan(1.0, 1, clip_norm, 1.0, Unit.PATIENT),
        public_sizes={"told": 20},
        stream=SilentStream(bytes(32)),
    )
    head = modules["told"]
    named = dict(head.named_parameters())
    total = {name: torch.zeros_like(value) for name, value in named.items()}
    for unit in range(units.num_units):
        own = (records.unit_R == unit).nonzero().squeeze(1).tolist()
        losses = []
        for row in own:
            outputs_K = pool_slowly(head, records.features_RD[row, : 1 + row % ITEMS], settings["head"]["pooling"])
            losses.append(tasks["told"].losses(outputs_K[None], records.labels[row : row + 1])[0])
        gradients = torch.autograd.grad(torch.stack(losses).mean(), list(named.values()))
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        for value, gradient in zip(total.values(), gradients, strict=True):
            value += gradient * min(1.0, clip_norm / norm)
    for name, value in total.items():
        assert float(value.abs().max()) > 0.0
        assert -update.heads["told"][name] * 20 == pytest.approx(value.numpy(), abs=2e-5, rel=1e-4)


@pytest.mark.parametrize(("settings", "cells"), CASES)
def test_one_bag_more_adds_its_own_part_wherever_it_stands(settings: dict[str, Any], cells: list[list[str]]) -> None:
    tasks = {"told": open_task(settings, "told")}
    records = make_bags(tasks["told"], cells, 70)
    records.features_RD[1::3, :, :-1] *= 1e6

    def add_up(rows: list[int]) -> list[Tensor]:
        own = torch.arange(len(rows))
        mask_R = torch.ones(len(rows), dtype=torch.bool)
        part = TaskRecords.of(records.features_RD[rows], records.labels[rows], mask_R, own, len(rows))
        return sum_by_opacus(draw_heads(tasks, 0.5, FEATURES), Units(len(rows), {"told": part}), tasks)

    rest = list(range(1, 70))
    own, without = add_up([0]), add_up(rest)
    assert 0 < sum(int(value) ** 2 for total in own for value in total.flatten().tolist()) <= int(LATTICE.bound**2)
    for place in (0, 31, 69):
        with_it = add_up([*rest[:place], 0, *rest[place:]])
        for total, less, part in zip(with_it, without, own, strict=True):
            assert torch.equal(total - less, part)


@pytest.mark.parametrize(("settings", "cells"), CASES)
@pytest.mark.parametrize("behind", [1e30, math.nan, math.inf])
def test_what_stands_behind_a_bags_last_item_moves_no_bit(
    settings: dict[str, Any], cells: list[list[str]], behind: float
) -> None:
    task = open_task(settings, "told")
    head: nn.Module = draw_heads({"told": task}, 0.7, FEATURES)["told"]
    records = make_bags(task, cells, 9)
    filled_RND = records.features_RD.clone()
    filled_RND[..., :-1].masked_fill_(filled_RND[..., -1:] == 0.0, behind)
    found = []
    for features_RND in (records.features_RD, filled_RND):
        outputs_RK = head(features_RND)
        losses_R = task.losses(outputs_RK, records.labels)
        found.append([outputs_RK, *torch.autograd.grad(losses_R.sum(), list(head.parameters()))])
    assert not torch.equal(records.features_RD, filled_RND)
    assert all(torch.equal(plain, filled) for plain, filled in zip(*found, strict=True))
    assert all(bool(values.isfinite().all()) for values in found[0])


@pytest.mark.parametrize(("settings", "cells"), CASES)
def test_a_bag_without_an_item_has_finite_outputs_and_a_row_is_a_bag_of_one(
    settings: dict[str, Any], cells: list[list[str]]
) -> None:
    """Blocks of fixed size are filled with empty bags of weight zero; 0 times NaN would be NaN."""
    del cells
    head = draw_heads({"told": open_task(settings, "told")}, 0.7, FEATURES)["told"]
    assert head(torch.zeros(3, ITEMS, FEATURES)).isfinite().all()
    rows_RD = torch.cat([torch.randn(4, FEATURES - 1, generator=torch.Generator().manual_seed(0)), torch.ones(4, 1)], 1)
    bags_RND = torch.zeros(4, ITEMS, FEATURES)
    bags_RND[:, 0] = rows_RD
    torch.testing.assert_close(head(rows_RD), head(bags_RND))
