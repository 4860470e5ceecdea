"""Labels and settings of the tasks: what is accepted, what is refused, what a missing label costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.inputs import find_name, parse_number
from common.tasks import Task, open_task
from common.types import BadInput, BadRecord


def classification(**changes: Any) -> Task:
    return open_task({"kind": "classification", "labels": [5, 6, 7], **changes}, "tasks.digit")


def multilabel(**changes: Any) -> Task:
    return open_task({"kind": "multilabel", "labels": ["a", "b", "c"], **changes}, "tasks.findings")


def regression(**changes: Any) -> Task:
    return open_task({"kind": "regression", "range": [10, 20], **changes}, "tasks.age")


@pytest.mark.parametrize("cell", ["6", "6.0", " 6 "])
def test_yaml_numbers_are_labels_and_cells_match_them_as_numbers(cell: str) -> None:
    assert int(classification().codec.encode([cell])) == 1
    assert classification().codec.decode(torch.eye(3)) == [["5"], ["6"], ["7"]]


@settings(deadline=None)
@given(value=st.one_of(st.integers(-(10**6), 10**6), st.floats(allow_nan=False, allow_infinity=False)))
def test_a_number_survives_its_text(value: float) -> None:
    assert parse_number(str(value)) == float(value)
    assert find_name(str(value), ("x", repr(value))) == 1


def test_text_wins_over_number_and_other_spellings_are_no_numbers() -> None:
    assert find_name("01", ("1", "01")) == 1
    for text in ("", "1_0", "nan", "inf", "1,5", "one"):
        assert parse_number(text) is None
        assert find_name(text, ("1", "2")) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "classification", "labels": ["a"]}, r"tasks\.t\.labels"),
        ({"kind": "classification", "labels": ["a", "a"]}, "distinct"),
        ({"kind": "classification", "labels": ["1", 1.0]}, "distinct"),
        ({"kind": "classification", "labels": ["a", " "]}, "empty"),
        ({"kind": "classification", "labels": [True, False]}, "quotes"),
        ({"kind": "classification", "labels": ["a", "b"], "positive": "c"}, "positive: expected one of two labels"),
        ({"kind": "classification", "labels": ["a", "b", "c"], "positive": "c"}, "positive: expected one of two"),
        ({"kind": "classification", "labels": ["a", "b"], "scale": 0}, r"tasks\.t\.scale"),
        ({"kind": "classification", "labels": ["a", "b"], "lables": 0}, "nearest: 'labels'"),
        ({"kind": "classification", "labels": ["a", "b"], "hed": {}}, "nearest: 'head'"),
        ({"kind": "classification", "labels": ["a", "b"], "head": {"hiden": 3}}, "nearest: 'hidden'"),
        ({"kind": "classification", "labels": ["a", "b"], "head": {"hidden": 0}}, r"tasks\.t\.head\.hidden"),
        ({"kind": "classification", "labels": ["a", "b", "c"], "threshold": 0.3}, "threshold: expected a task of two"),
        ({"kind": "classification", "labels": ["a", "b"], "threshold": 1}, r"tasks\.t\.threshold"),
        ({"kind": "classification", "labels": ["a", "b"], "weights": {"c": 2}}, "weights: expected each name"),
        ({"kind": "classification", "labels": ["1", "b"], "weights": {"1": 2, 1.0: 3}}, "weights: expected each name"),
        ({"kind": "classification", "labels": ["a", "b"], "weights": {"a": 0}}, r"tasks\.t\.weights"),
        ({"kind": "classification", "labels": ["a", "b"], "weights": {"a": 101}}, r"tasks\.t\.weights"),
        ({"kind": "classification", "labels": ["a", "b"], "prior": {"a": 0.5}}, "prior: expected a value for every"),
        ({"kind": "classification", "labels": ["a", "b"], "prior": {"a": 0.5, "b": 0.6}}, "add up to 1, got 1.1"),
        ({"kind": "classification", "labels": ["a", "b"], "prior": {"a": 0, "b": 1}}, r"t\.prior\.a: expected"),
        ({"kind": "classification", "labels": ["a", "b"], "prior": "even"}, r"tasks\.t\.prior"),
        ({"kind": "multilabel", "labels": ["a", "b"], "threshold": {"c": 0.5}}, "threshold: expected each name"),
        ({"kind": "multilabel", "labels": ["a", "b"], "threshold": 0}, r"tasks\.t\.threshold: expected"),
        ({"kind": "multilabel", "labels": ["a", "b"], "prior": {"a": 0.5}}, "prior: expected a value for every"),
        ({"kind": "multilabel", "labels": ["a", "b"], "prior": {"a": 1, "b": 0.1}}, r"t\.prior\.a: expected"),
        ({"kind": "multilabel", "labels": ["a|b", "c"]}, "labels: expected names without"),
        ({"kind": "multilabel", "labels": ["a", "b"], "none": "a"}, "none: expected a name that is not"),
        ({"kind": "regression", "range": [1, 1]}, r"expected \[lowest, highest\]"),
        ({"kind": "regression"}, "write it explicitly"),
        ({"kind": "clasification"}, "nearest: 'classification'"),
    ],
)
def test_wrong_settings_are_one_sentence_with_the_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        open_task(values, "tasks.t")
    assert str(caught.value).startswith("tasks.t")


def test_several_cells_or_none_are_no_class() -> None:
    for cells in ([], ["5", "6"], [""]):
        with pytest.raises(BadRecord):
            classification().codec.encode(cells)


def test_a_classes_loss_is_its_negative_log_probability() -> None:
    outputs = torch.tensor([[0.0, 1.0, -2.0]]).expand(3, 3)
    expected = outputs[0].double().exp().sum().log() - outputs[0].double()
    torch.testing.assert_close(classification().losses(outputs, torch.arange(3)).double(), expected)


def test_a_missing_class_costs_nothing() -> None:
    task = classification()
    assert task.losses(torch.randn(1, 3), task.codec.missing().unsqueeze(0)).item() == 0.0


def test_labels_share_a_cell_or_have_one_each() -> None:
    task = multilabel(none="healthy")
    assert task.codec.encode(["c|a"]).tolist() == task.codec.encode(["1", "0", "1.0"]).tolist() == [1, 0, 1]
    assert task.codec.encode(["healthy"]).tolist() == task.codec.encode(["0", "0", "0"]).tolist() == [0, 0, 0]
    assert task.codec.encode(["", "1", ""]).tolist() == [-1, 1, -1]
    for cells in (["a|x"], [""], ["a|"], ["1", "0"], ["1", "0", "2"], ["a", "b", "c"]):
        with pytest.raises(BadRecord):
            task.codec.encode(cells)


def test_an_unknown_label_contributes_nothing_and_changes_no_divisor() -> None:
    task, outputs = multilabel(), torch.tensor([[0.3, -2.0, 1.0]]).requires_grad_()
    whole = task.losses(outputs, torch.tensor([[1, 0, 1]]))
    parts = [task.losses(outputs, torch.tensor([row])) for row in ([1, -1, -1], [-1, 0, -1], [-1, -1, 1])]
    torch.testing.assert_close(whole, torch.stack(parts).sum(0))
    (gradient,) = torch.autograd.grad(parts[1].sum(), outputs)
    assert gradient[0, 0] == gradient[0, 2] == 0.0
    assert task.losses(outputs, task.codec.missing().unsqueeze(0)).item() == 0.0


def test_a_target_outside_the_range_is_refused_or_clipped_as_said() -> None:
    assert float(regression().codec.encode(["20"])) == 20.0
    for cell in ("9.99", "20.01", "nan", "", "young"):
        with pytest.raises(BadRecord):
            regression().codec.encode([cell])
    clipping = regression(outside="clip")
    assert float(clipping.codec.encode(["-1e9"])) == 10.0
    assert float(clipping.codec.encode(["1e9"])) == 20.0


def test_regression_outputs_are_in_halves_of_the_range() -> None:
    task = regression()
    labels = torch.tensor([10.0, 15.0, 20.0])
    outputs = torch.tensor([[-1.0], [0.0], [1.0]])
    assert task.losses(outputs, labels).tolist() == [0.0, 0.0, 0.0]
    assert task.losses(outputs + 1, labels).tolist() == [0.5, 0.5, 0.5]
    assert task.codec.decode(torch.tensor([[0.5], [7.0]])) == [["17.5"], ["20.0"]]


def test_weights_are_factors_on_the_losses_of_records_with_the_label() -> None:
    outputs = torch.tensor([[0.3, -2.0, 1.0]]).expand(3, 3)
    plain = classification().losses(outputs, torch.arange(3))
    weighted = classification(weights={6: 10, "7.0": 0.25}).losses(outputs, torch.arange(3))
    torch.testing.assert_close(weighted, plain * torch.tensor([1.0, 10.0, 0.25]))


def test_weights_of_labels_count_where_they_are_present() -> None:
    weighted, plain, outputs = multilabel(weights={"b": 10}), multilabel(), torch.tensor([[0.3, -2.0, 1.0]])
    for row, factor in ([-1, 1, -1], 10.0), ([-1, 0, -1], 1.0), ([1, -1, 0], 1.0):
        label = torch.tensor([row])
        torch.testing.assert_close(weighted.losses(outputs, label), factor * plain.losses(outputs, label))


def test_a_label_is_predicted_above_its_threshold() -> None:
    probabilities = torch.tensor([0.19, 0.21, 0.69, 0.71])
    outputs = torch.stack([probabilities.log(), (1 - probabilities).log()], dim=1)
    tumour = {"kind": "classification", "labels": ["tumour", "none"], "positive": "tumour"}
    for settings_, positives in ({"threshold": 0.2}, 3), ({"threshold": 0.7}, 1), ({}, 2):
        predicted = open_task({**tumour, **settings_}, "task").codec.decode(outputs)
        assert predicted == [["none"]] * (4 - positives) + [["tumour"]] * positives
    task = multilabel(threshold={"a": 0.2, "c": 0.7})
    found = task.codec.decode(torch.logit(probabilities).unsqueeze(1).expand(4, 3))
    assert found == [["0", "0", "0"], ["1", "0", "0"], ["1", "1", "0"], ["1", "1", "1"]]
    assert multilabel(threshold=0.7).codec.decode(torch.full((1, 3), 0.5)) == [["0", "0", "0"]]


def test_a_hidden_head_learns_from_its_zero_start() -> None:
    torch.manual_seed(0)
    head = classification(head={"hidden": 8}).head(2)
    features = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    labels = torch.tensor([0, 1, 1, 0])
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        classification().losses(head(features), labels).sum().backward()
        optimizer.step()
    assert head(features).argmax(1).tolist() == labels.tolist()
