"""Remembered values: their limit is one of size."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from common.recent import Recent

LIMIT = 10


def test_what_was_kept_longest_ago_is_forgotten_first() -> None:
    recent = Recent[str](LIMIT)
    for key in "abc":
        recent.keep(key, key.upper(), 4)
    assert [recent.take(key) for key in "abc"] == [None, "B", "C"]


def test_a_value_is_forgotten_when_it_is_taken() -> None:
    recent = Recent[str](LIMIT)
    recent.keep("a", "A", 4)
    assert (recent.take("a"), recent.take("a")) == ("A", None)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 12), st.booleans())))
def test_values_together_are_no_larger_than_the_limit(steps: list[tuple[str, int, bool]]) -> None:
    recent, order = Recent[int](LIMIT), dict[str, int]()
    for key, size, is_taken in steps:
        order.pop(key, None)
        if is_taken:
            recent.take(key)
        else:
            recent.keep(key, size, size)
            while order and sum(order.values()) + size > LIMIT:
                order.pop(next(iter(order)))
            order[key] = size
    assert {key: recent.take(key) for key in "abcd"} == {key: order.get(key) for key in "abcd"}
