"""Heads as values: reproducible, copied in and out exactly, refused when they do not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.model.parameters import create_heads, load_parameters, parameters
from common.tasks import Task, open_task
from common.types import BadInput, heads_digest


def task(hidden: int | None = 5) -> Task:
    return open_task({"kind": "classification", "labels": ["a", "b", "c"], "head": {"hidden": hidden}}, "task")


def digest_of(names: list[str], seed: int, wanted: str) -> str:
    heads = create_heads({name: task() for name in names}, {name: 4 for name in names}, seed)
    return heads_digest({wanted: parameters(heads[wanted])})


def test_a_heads_start_depends_on_its_name_and_the_seed_alone() -> None:
    alone = digest_of(["x"], 1, "x")
    assert digest_of(["y", "x", "z"], 1, "x") == alone
    assert digest_of(["x"], 2, "x") != alone
    heads = create_heads({"x": task(), "y": task()}, {"x": 4, "y": 4}, 1)
    assert heads_digest({"h": parameters(heads["x"])}) != heads_digest({"h": parameters(heads["y"])})


def test_making_heads_leaves_torchs_generator_as_it_was() -> None:
    before = torch.random.get_rng_state()
    create_heads({"x": task()}, {"x": 4}, 1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_parameters_are_copies_that_load_back_exactly() -> None:
    first, second = create_heads({"x": task(), "y": task()}, {"x": 4, "y": 4}, 1).values()
    taken = parameters(first)
    load_parameters(second, taken)
    assert all(torch.equal(first.state_dict()[name], tensor) for name, tensor in second.state_dict().items())
    assert taken["0.weight"].any()
    taken["0.weight"][:] = 7.0
    assert not np.array_equal(parameters(first)["0.weight"], taken["0.weight"])
    assert not np.array_equal(parameters(second)["0.weight"], taken["0.weight"])
    assert all(array.dtype == np.float32 for array in taken.values())


def test_a_head_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    module = create_heads({"x": task(None)}, {"x": 4}, 1)["x"]
    good = {name: array + 1 for name, array in parameters(module).items()}
    nan, inf = (np.where(np.arange(3) == 1, value, 0).astype(np.float32) for value in (np.nan, np.inf))
    wrong = [
        {"weight": good["weight"]},
        {**good, "extra": good["bias"]},
        {**good, "weight": good["weight"].T},
        {**good, "bias": nan},
        {**good, "bias": inf},
        {**good, "weight": np.full_like(good["weight"], 8193.0)},  # Four of them have a norm of more than 2**14.
    ]
    for params in wrong:
        with pytest.raises(BadInput, match="head: expected"):
            load_parameters(module, params)
    assert all(not array.any() for array in parameters(module).values())
