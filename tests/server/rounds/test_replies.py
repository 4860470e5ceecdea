"""Each way a reply can be bad is rejected with its reason; a good one beside it stands."""

from __future__ import annotations

import numpy as np
import pytest

from common.types import BadInput, DeclineReason, Delta, Heads, explain_rejection
from server.rounds.replies import check_delta

SENT: Heads = {
    "a": {"w": np.zeros((2, 3), np.float32), "b": np.zeros(2, np.float32)},
    "c": {"w": np.zeros(1, np.float32)},
}


def reply(**changes: object) -> Delta:
    heads = {task: {name: array + 0.5 for name, array in params.items()} for task, params in SENT.items()}
    for key, value in changes.items():
        task, name = key.split("_")
        if value is None:
            del heads[task][name]
        else:
            heads.setdefault(task, {})[name] = value  # type: ignore[assignment]
    return Delta(heads)


def test_a_reply_that_fits_is_accepted() -> None:
    check_delta(reply(), SENT, max_norm=10.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"a_w": np.full((2, 3), np.nan, np.float32)}, r"a\.w: expected finite"),
        ({"a_w": np.full((2, 3), np.inf, np.float32)}, r"a\.w: expected finite"),
        ({"a_b": np.zeros(3, np.float32)}, r"a\.b: expected shape \(2,\), got \(3,\)"),
        ({"a_b": np.zeros((), np.float32)}, r"a\.b: expected shape"),
        ({"a_b": np.zeros((1, 2), np.float32)}, r"a\.b: expected shape"),
        ({"a_b": None}, "a: expected parameters b, w"),
        ({"a_x": np.zeros(2, np.float32)}, "a: expected parameters b, w"),
        ({"d_w": np.zeros(2, np.float32)}, "expected tasks a, c"),
        ({"a_w": np.full((2, 3), 1e6, np.float32)}, "norm at most 10"),
        ({"a_w": np.full((2, 3), 3e38, np.float32)}, "norm at most 10"),
    ],
)
def test_a_reply_that_does_not_fit_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        check_delta(reply(**changes), SENT, max_norm=10.0)


def test_a_missing_task_is_refused() -> None:
    heads = dict(reply().heads)
    del heads["c"]
    with pytest.raises(BadInput, match="expected tasks a, c"):
        check_delta(Delta(heads), SENT, max_norm=10.0)


def test_every_word_by_which_a_site_declines_is_explained_and_other_reasons_stand() -> None:
    for word in DeclineReason:
        assert explain_rejection(f"declined: {word}") == f"declined: {word} ({word.explanation})"
    assert explain_rejection("declined: shut up") == "declined: shut up"
    assert explain_rejection("budget") == "budget"
