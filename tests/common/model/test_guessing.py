"""Runs in which nothing can be learned, from public numbers: what it follows from, and where nobody can tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.model.guessing import Totals, estimate_kept, explain_hopeless
from common.privacy.gaussian import gdp_mu
from common.run import RunConfig
from common.tasks import Task, open_task
from common.yaml import parse

AUTO: dict[str, Any] = {
    "name": "expected",
    "seed": 1,
    "backbone": {"kind": "identity", "dim": 4},
    "tasks": {"colour": {"kind": "classification", "labels": ["red", "green", "blue"]}},
    "solver": {"kind": "auto"},
    "privacy": {"unit": "example", "delta": 1e-5, "target_epsilon": 1.0},
}


BASE = Totals(600, 4)


def read(**changes: Any) -> tuple[RunConfig, dict[str, Task]]:
    run = parse(RunConfig, {**AUTO, **changes}, base=Path.cwd())
    return run, {name: open_task(spec, name) for name, spec in run.tasks.items()}


def expect(totals: Totals = BASE, **changes: Any) -> dict[str, float | None]:
    run, tasks = read(**changes)
    return estimate_kept(run, tasks, dict.fromkeys(tasks, totals))


def kept(totals: Totals = BASE, name: str = "colour", **changes: Any) -> float:
    found = expect(totals, **changes)[name]
    assert found is not None
    return found


def explain(totals: Totals = BASE, **changes: Any) -> str | None:
    run, tasks = read(**changes)
    return explain_hopeless(run, tasks, dict.fromkeys(tasks, totals))


def test_it_is_the_formula_of_the_module() -> None:
    """What is left for the rounds is 90 % of mu^2; 600 units at 4 sites and 3 classes."""
    clear = gdp_mu(1.0, 1e-5) * 0.9**0.5 * 600 / (2 * 3)
    assert kept() == pytest.approx(clear**2 / (clear**2 + 16.0), rel=1e-3)


def test_more_units_sites_that_share_noise_and_a_larger_epsilon_leave_more() -> None:
    base = kept()
    assert base < kept(Totals(1200, 4)) and base < kept(Totals(600, 1))
    assert base < kept(privacy={**AUTO["privacy"], "target_epsilon": 3.0})
    assert base < kept(trust="secure_sum", cohort={"min_sites": 4}, colluding=0)
    assert kept(trust="secure_sum", cohort={"min_sites": 4}, colluding=0) == pytest.approx(kept(Totals(600, 1)))
    assert base > kept(cohort={"fraction": 0.5})
    assert base == pytest.approx(kept(rounds=12), rel=1e-3)  # At the same epsilon.


def test_more_classes_and_other_tasks_leave_less() -> None:
    many = {"colour": {"kind": "classification", "labels": [f"c{index}" for index in range(9)]}}
    assert kept(tasks=many) < kept()
    assert kept(tasks={**AUTO["tasks"], "size": {"kind": "classification", "labels": ["s", "l"]}}) < kept()


def test_two_labels_are_told_apart_like_two_classes() -> None:
    two = {"t": {"kind": "classification", "labels": ["no", "yes"]}}
    several = kept(name="t", tasks={"t": {"kind": "multilabel", "labels": ["a", "b", "c", "d"]}})
    # Four labels share the clip norm: each has half the gradient that it would have alone.
    assert several < kept(name="t", tasks=two)
    assert several == pytest.approx(kept(Totals(300, 4), name="t", tasks=two), rel=1e-6)


def test_events_and_their_absence_are_told_apart_like_two_classes() -> None:
    death = {"t": {"kind": "survival", "boundaries": [1, 2, 3]}}
    two = {"t": {"kind": "classification", "labels": ["no", "yes"]}}
    assert kept(name="t", tasks=death) == pytest.approx(kept(name="t", tasks=two), rel=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"privacy": "non_private"},
        {"tasks": {"colour": {**AUTO["tasks"]["colour"], "head": {"hidden": 5}}}},
        {"tasks": {"colour": {"kind": "regression", "range": [0, 1]}}},
    ],
)
def test_without_privacy_and_for_other_heads_nobody_can_tell(changes: dict[str, Any]) -> None:
    assert expect(Totals(8, 2), **changes) == {"colour": None} and explain(Totals(8, 2), **changes) is None


def test_settings_by_hand_are_read_too() -> None:
    by_hand = {
        "solver": {"kind": "dp_gd", "steps": 4, "clip_norm": 0.4, "learning_rate": 1.0},
        "aggregation": {"kind": "mean"},
        "rounds": 12,
    }
    assert kept(**by_hand) == pytest.approx(kept(), rel=0.15)
    wide = {**by_hand, "solver": {**by_hand["solver"], "clip_norm": 8.0}}  # Noise for gradients that are not there.
    assert kept(**wide) < 0.5 * kept(**by_hand)


def test_only_a_run_without_any_hope_is_called_hopeless() -> None:
    assert "no better than guessing (colour)" in str(explain(Totals(8, 2)))
    assert explain() is None
    size = {"kind": "classification", "labels": ["s", "l"]}
    run, tasks = read(tasks={**AUTO["tasks"], "size": size})
    assert explain_hopeless(run, tasks, {"colour": Totals(8, 2), "size": Totals(8000, 2)}) is None
    assert "(colour, size)" in str(explain_hopeless(run, tasks, {"colour": Totals(8, 2), "size": Totals(4, 2)}))
    assert explain_hopeless(run, tasks, {}) is None
    # A site or run with one task that has no estimate may be useful for that.
    other = {**AUTO["tasks"], "age": {"kind": "regression", "range": [0, 1]}}
    assert explain(Totals(8, 2), tasks=other) is None
