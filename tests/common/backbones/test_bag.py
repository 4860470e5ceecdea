"""Bags: the items of a record side by side, with marks that no rounding makes zero, and heads that fit them alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client.data.feature_store import FeatureStore
from client.data.sources import SourceRecord
from common.backbones import Bag, list_items
from common.inputs import Several
from common.model.backbones import join_items, load_blob, open_pretrained
from common.model.trunks import create_modules
from common.tasks import open_tasks
from common.types import BadInput, BadRecord
from tests.tiny import run_config

DIM = 4
RUN_TASKS = {"colour": {"kind": "classification", "labels": ["red", "blue"], "head": {"pooling": "mean"}}}


def settings(**changes: Any) -> dict[str, Any]:
    return {"kind": "bag", "encoder": {"kind": "identity", "dim": DIM}, "max_items": 3, **changes}


class Rows:
    """A source of given records."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def digest(self) -> str:
        return "00"

    def index(self) -> list[SourceRecord]:
        return [SourceRecord(row + 1, "rows", str(row), None, None, {}) for row in range(len(self.items))]

    def load(self, position: int) -> Any:
        return self.items[position]


def several(count: int, scale: float = 1.0) -> Several:
    return Several([scale * np.arange(at, at + DIM, dtype=np.float32) for at in range(count)])


def test_a_bags_items_stand_side_by_side_behind_them_zeros(tmp_path: Path) -> None:
    backbone = open_pretrained(settings(), "backbone")
    records = [several(2), np.ones(DIM, np.float32), several(3)]
    features = FeatureStore(tmp_path).open_or_encode(Rows(records), backbone, device=torch.device("cpu"))
    expected = np.zeros((3, 3, DIM + 1), np.float32)
    expected[0, :2, :-1] = [[0, 1, 2, 3], [1, 2, 3, 4]]
    expected[1, 0] = 1
    expected[2, :, :-1] = [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]]
    expected[0, :2, -1] = expected[2, :, -1] = 1
    np.testing.assert_allclose(features.features_ND, expected, atol=1e-3)
    assert features.rows_N.dtype == np.int16 and features.rows_N.shape == (3, 3, DIM + 2)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e3, 1e9])
def test_no_rounding_takes_an_item_for_one_that_is_not_there(tmp_path: Path, bits: Any, scale: float) -> None:
    backbone = open_pretrained(settings(), "backbone")
    store = FeatureStore(tmp_path)
    features = store.open_or_encode(Rows([several(2, scale)]), backbone, device=torch.device("cpu"), bits=bits)
    assert (features.features_ND[0, :, -1] > 0).tolist() == [True, True, False]


def test_a_bag_with_too_many_items_is_cut_evenly_or_left_out(tmp_path: Path) -> None:
    rows = Rows([several(7)])
    for over, unusable in (("cut", {}), ("leave_out", {0: "expected between one and 3 items in the record"})):
        backbone = open_pretrained(settings(over=over), "backbone")
        store = FeatureStore(tmp_path / over)
        features = store.open_or_encode(rows, backbone, device=torch.device("cpu"))
        assert features.unusable == unusable
        if not unusable:
            np.testing.assert_allclose(features.features_ND[0, :, 0], [1, 3, 5], atol=1e-3)
    with pytest.raises(BadRecord, match="expected between one and 4096 items"):
        list_items(Several([]), Bag(3, cuts=True))


def test_an_item_that_cannot_be_read_costs_its_own_bag_alone(tmp_path: Path) -> None:
    broken = Several([np.ones(DIM, np.float32), np.ones(DIM + 1, np.float32)])
    features = FeatureStore(tmp_path).open_or_encode(
        Rows([several(2), broken, several(1)]), open_pretrained(settings(), "backbone"), device=torch.device("cpu")
    )
    assert list(features.unusable) == [1]


def test_without_bags_the_items_are_averaged_and_with_them_they_are_kept() -> None:
    features_ID = torch.arange(6.0).view(3, 2)
    assert torch.equal(join_items(features_ID, [2, 1], None), torch.tensor([[1.0, 2.0], [4.0, 5.0]]))
    kept = join_items(features_ID, [2, 1], Bag(2, cuts=True))
    assert torch.equal(kept, torch.tensor([[[0.0, 1.0], [2.0, 3.0]], [[4.0, 5.0], [0.0, 0.0]]]))


def test_the_rule_of_bags_travels_with_the_backbone() -> None:
    sent = open_pretrained(settings(over="leave_out"), "backbone")
    received = load_blob(sent.blob())
    assert received.bag == Bag(3, cuts=False) == sent.bag
    assert open_pretrained(settings(), "backbone").digest != sent.digest


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoder": {"kind": "identity"}}, "expected exactly one of columns and dim"),
        ({"max_items": 0}, "max_items"),
        ({"encoder": settings()}, "encoder: expected a backbone with one vector for each item"),
        (
            {"encoder": {"kind": "identity", "dim": 4, "projection": {"shift": {"public": "x"}, "normalize": True}}},
            "backbone.encoder.projection.shift.public: expected the mean of this backbone's features, found no file",
        ),
        (
            {"encoder": {"kind": "identity", "dim": 4, "projection": {"dim": 2, "normalize": True}}},
            "encoder.projection.dim: expected null",
        ),
    ],
)
def test_what_cannot_be_an_item_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=re.escape(said)):
        open_pretrained(settings(**changes), "backbone")


@pytest.mark.parametrize(
    ("backbone", "tasks", "said"),
    [
        (
            {"kind": "identity", "dim": DIM},
            RUN_TASKS,
            "head.pooling: expected none but on a backbone of kind bag, got one",
        ),
        (
            settings(),
            {"colour": {"kind": "classification", "labels": ["red", "blue"]}},
            "head: expected `pooling`, such as attention, on a backbone of kind bag",
        ),
        (
            settings(),
            {"colour": {"kind": "ctc", "symbols": ["red"], "unit": "words", "max_symbols": 2}},
            "head: expected `pooling`, such as attention, on a backbone of kind bag",
        ),
    ],
)
def test_bags_and_heads_that_do_not_fit_are_refused_in_a_sentence(
    backbone: dict[str, Any], tasks: dict[str, Any], said: str
) -> None:
    run = run_config(backbone=backbone, tasks=tasks)
    with pytest.raises(BadInput, match=re.escape(f"tasks.colour.{said}")):
        create_modules(run, open_tasks(run), {"backbone": open_pretrained(backbone, "backbone")})


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ({"pooling": "mean", "centre": True}, "centre: expected false beside `pooling`"),
        ({"width": 3}, "width: expected it beside `pooling: attention`"),
        ({"pooling": "max", "width": 3}, "width: expected it beside `pooling: attention`"),
        ({"pooling": "median"}, "pooling"),
    ],
)
def test_heads_of_bags_that_mean_nothing_are_refused(head: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=re.escape(said)):
        open_tasks(run_config(tasks={"colour": {**RUN_TASKS["colour"], "head": head}}))


def test_a_solver_in_closed_form_names_the_one_that_trains_pooled_heads() -> None:
    from client.solvers import open_solver

    run = run_config(backbone=settings(), tasks=RUN_TASKS)
    modules = create_modules(run, open_tasks(run), {"backbone": open_pretrained(settings(), "backbone")})
    with pytest.raises(BadInput, match="kind dp_sgd trains it"):
        open_solver({"kind": "head_sum", "clip_norm": 1.0}, "solver").check_modules(modules)
