"""Given features: columns scaled by public ranges, one-hot levels, missing cells, vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.model.backbones import Backbone, open_pretrained
from common.types import BadInput, BadRecord

AGE = {"name": "age", "range": [20, 60], "missing": "refuse"}
SEX = {"name": "sex", "levels": [0, 1], "missing": 1, "indicator": True}


def table(*columns: dict[str, Any], **changes: Any) -> Backbone:
    return open_pretrained({"kind": "identity", "columns": list(columns), **changes}, "backbone")


def inputs(backbone: Backbone, row: Any) -> list[float]:
    values: list[float] = backbone.preprocess(row).tolist()
    return values


@settings(deadline=None)
@given(value=st.floats(-1000, 1000))
def test_a_number_is_scaled_by_its_range_and_clipped(value: float) -> None:
    (scaled,) = inputs(table(AGE), {"age": repr(value)})
    assert scaled == pytest.approx(float(np.interp(value, [20, 60], [-1, 1])), abs=1e-6)


def test_columns_stand_in_the_declared_order_and_others_are_not_read() -> None:
    row = {"secret": "x", "sex": "0", "age": "40"}
    assert inputs(table(AGE, SEX), row) == [0.0, 1.0, 0.0, 0.0]
    assert inputs(table(SEX, AGE), row) == [1.0, 0.0, 0.0, 0.0]
    assert table(AGE, SEX).feature_dim == 4


@pytest.mark.parametrize("cell", ["1", "1.0", " 1 ", "1e0"])
def test_levels_that_are_numbers_are_compared_as_numbers(cell: str) -> None:
    assert inputs(table(SEX), {"sex": cell}) == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("cell", ["", " ", "?"])
def test_a_missing_cell_is_imputed_by_the_declared_level_and_marked(cell: str) -> None:
    assert inputs(table(SEX, missing_values=["?"]), {"sex": cell}) == [0.0, 1.0, 1.0]


def test_a_missing_cell_is_imputed_by_the_declared_number() -> None:
    assert inputs(table({**AGE, "missing": 50}), {"age": ""}) == [0.5]


@pytest.mark.parametrize(
    "row", [{"age": ""}, {"age": "Jane Doe"}, {"age": "nan"}, {"age": "inf"}, {"age": "4_0"}, {}, "age", [1.0]]
)
def test_an_unusable_cell_is_a_bad_record_that_names_the_column_only(row: Any) -> None:
    with pytest.raises(BadRecord) as caught:
        table(AGE).preprocess(row)
    assert "Jane" not in str(caught.value)


def test_an_undeclared_level_is_a_bad_record() -> None:
    with pytest.raises(BadRecord, match="column 'sex': expected one of the declared levels"):
        table(SEX).preprocess({"sex": "2"})


def test_vectors_are_taken_as_they_are() -> None:
    backbone = open_pretrained({"kind": "identity", "dim": 3}, "backbone")
    item = np.array([1.5, -2.0, 0.0])
    assert backbone.encode(backbone.preprocess(item).unsqueeze(0)).tolist() == [[1.5, -2.0, 0.0]]
    for bad in (np.zeros(2), np.zeros((1, 3)), np.array([1.0, np.nan, 0.0]), "text", {"a": "1"}, None):
        with pytest.raises(BadRecord):
            backbone.preprocess(bad)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "exactly one of columns and dim"),
        ({"dim": 3, "columns": [AGE]}, "exactly one of columns and dim"),
        ({"columns": []}, r"backbone\.columns"),
        ({"columns": [AGE, AGE]}, "'age' twice"),
        ({"columns": [{"name": "age", "missing": "refuse"}]}, "exactly one of range and levels"),
        ({"columns": [{**AGE, "range": [60, 20]}]}, r"expected \[lowest, highest\]"),
        ({"columns": [{"name": "age", "range": [20, 60]}]}, r"missing: expected a value"),
        ({"columns": [{**AGE, "missing": 61}]}, "a value in the range"),
        ({"columns": [{**SEX, "missing": 2}]}, "or a level"),
        ({"columns": [{**SEX, "levels": [1, 1.0]}]}, "distinct"),
        ({"columns": [{**SEX, "levels": [True, False]}]}, "in quotes"),
        ({"columns": [{**AGE, "indicator": True}]}, "indicator: expected false"),
        ({"dim": 3, "projection": {"dim": 2, "normalize": True}}, r"backbone\.projection\.dim: expected null"),
    ],
)
def test_wrong_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        open_pretrained({"kind": "identity", **values}, "backbone")


def test_ranges_levels_and_imputed_values_are_part_of_the_digest() -> None:
    variants = [
        table(AGE),
        table({**AGE, "range": [20, 61]}),
        table({**AGE, "missing": 50}),
        table(AGE, missing_values=["?"]),
        table(SEX),
        table({**SEX, "levels": [1, 0]}),
    ]
    assert len({backbone.digest for backbone in variants}) == len(variants)
