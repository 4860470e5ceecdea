"""Advice from public numbers: what it follows from, and the warnings of a run that goes against it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.model.advice import (
    HOPELESS_V,
    Advice,
    Situation,
    advise,
    estimate_points,
    list_contradictions,
)
from common.model.guessing import Totals, compute_v
from common.privacy.gaussian import gdp_mu
from common.run import RunConfig
from common.tasks import open_tasks
from common.yaml import parse

PICTURES = Situation(
    modality="picture",
    num_units=1000,
    num_sites=5,
    private=True,
    v=33.0,
    v_secure=66.0,
    last_block="layer4",
    seconds=0.01,
    distance=None,
)
OPEN = replace(PICTURES, private=False, v=None, v_secure=None)
AUTO: dict[str, Any] = {
    "name": "advised",
    "seed": 1,
    "backbone": {"kind": "small_cnn"},
    "tasks": {"colour": {"kind": "classification", "labels": ["red", "green", "blue"]}},
    "solver": {"kind": "auto"},
    "privacy": {"unit": "example", "delta": 1e-5, "target_epsilon": 3.0},
}


def read(**changes: Any) -> RunConfig:
    return parse(RunConfig, {**AUTO, **changes}, base=Path.cwd())


def contradict(run: RunConfig, totals: Totals) -> list[str]:
    tasks = open_tasks(run)
    return list_contradictions(run, tasks, dict.fromkeys(tasks, totals))


def choose(advice: Advice, topic: str) -> str:
    return next(line.choice for line in advice.lines if line.topic == topic)


def test_under_privacy_the_head_alone_trains_whatever_else_there_is() -> None:
    for modality in ("picture", "text", "sound", None):
        for size in (10, 1_000_000):
            assert advise(replace(PICTURES, modality=modality, num_units=size)).trains == "head"


def test_a_block_is_named_without_privacy_for_enough_pictures_only() -> None:
    assert "layer4" in advise(OPEN).trains and advise(OPEN).trains.startswith("head")
    for changes in (
        {"num_units": 299},
        {"modality": "text"},
        {"modality": "sound"},
        {"modality": None},
        {"last_block": None},
    ):
        assert advise(replace(OPEN, **changes)).trains == "head", changes


def test_a_low_v_is_advised_against_and_a_secure_sum_where_it_helps() -> None:
    hopeless = advise(replace(PICTURES, v=5.0, v_secure=11.0))
    assert not hopeless.together and "names" in choose(hopeless, "together")
    saved = advise(replace(PICTURES, v=8.0, v_secure=18.0))
    assert saved.together and saved.secure
    assert advise(PICTURES).secure and not advise(replace(PICTURES, v=150.0, v_secure=300.0)).secure
    assert not advise(replace(PICTURES, v_secure=None)).secure
    assert advise(PICTURES).loss == estimate_points(66.0)


def test_kinds_without_classes_have_no_v_and_that_is_said() -> None:
    unknown = advise(replace(PICTURES, v=None, v_secure=None))
    assert unknown.together and unknown.loss is None and choose(unknown, "expected loss") == "not known"


@pytest.mark.parametrize(("distance", "said"), [(0.2, "keep"), (1.05, "compare")])
def test_a_distance_is_named_only_where_it_is_known(distance: float, said: str) -> None:
    assert said in choose(advise(replace(PICTURES, distance=distance)), "distance")
    assert all(line.topic != "distance" for line in advise(PICTURES).lines)


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("modality", ["picture", "text", "sound", None])
def test_every_situation_has_one_line_of_each_topic_without_an_unknown_number(
    private: bool, modality: str | None
) -> None:
    rest = itertools.product(
        (1, 299, 300, 10**8),
        (1, 1000),
        (None, 0.0, 20.0, 1e6),
        (None, 40.0),
        (None, "layer4"),
        (None, 0.1),
        (None, 1.0),
    )
    for num_units, num_sites, v, v_secure, last_block, seconds, distance in rest:
        situation = Situation(
            modality=modality,
            num_units=num_units,
            num_sites=num_sites,
            private=private,
            v=v,
            v_secure=v_secure,
            last_block=last_block,
            seconds=seconds,
            distance=distance,
        )
        check_lines(advise(situation))


def check_lines(advice: Advice) -> None:
    topics = [line.topic for line in advice.lines]
    assert len(topics) == len(set(topics)) and topics[:2] == ["together", "what trains"]
    assert {"noise", "rounds", "expected loss", "time"} <= set(topics)
    words = [word.strip("(),;:") for line in advice.lines for word in f"{line.choice} {line.reason}".split()]
    assert "nan" not in words and "None" not in words


@given(st.floats(0, 1e5), st.floats(0, 1e5))
def test_more_v_never_costs_more_points(first: float, second: float) -> None:
    low, high = sorted((first, second))
    assert estimate_points(low) >= estimate_points(high) >= 0.0


def test_v_is_its_formula_and_grows_with_units_epsilon_and_shared_noise() -> None:
    def compute(totals: Totals, **changes: Any) -> float:
        run = read(**changes)
        v = compute_v(run, open_tasks(run), {"colour": totals})["colour"]
        assert v is not None
        return v

    base = compute(Totals(600, 4))
    # 90 % of mu^2 are left beside the moments; 3 classes.
    assert base == pytest.approx(gdp_mu(3.0, 1e-5) * 0.9**0.5 * 600 / (2 * 3), rel=1e-3)
    assert compute(Totals(900, 4)) == pytest.approx(1.5 * base)
    assert base < compute(Totals(600, 4), privacy={**AUTO["privacy"], "target_epsilon": 8.0})
    assert compute(Totals(600, 4), trust="secure_sum", colluding=0, cohort={"min_sites": 4}) == pytest.approx(2 * base)


def test_a_trunk_under_privacy_and_a_low_v_are_warned_of_and_nothing_else_is() -> None:
    assert contradict(read(), Totals(6000, 4)) == []
    (low,) = contradict(read(), Totals(50, 4))
    assert f"v is below {HOPELESS_V:g}" in low and "colour" in low
    (deep,) = contradict(read(trainable={"backbone": {"from": "input"}}), Totals(6000, 4))
    assert "head alone" in deep
    assert contradict(read(privacy="non_private", trainable={"backbone": {"from": "input"}}), Totals(50, 4)) == []
    regression = {"age": {"kind": "regression", "range": [0, 1]}}
    assert contradict(read(tasks=regression), Totals(50, 4)) == []
