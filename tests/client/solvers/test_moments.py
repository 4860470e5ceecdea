"""The release before the first round: exact sums within their bound, and noise of the planned scale."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.data.units import TaskRecords, Units
from client.solvers.parts.moments import release_moments
from common.model.moments import CENTRE, OFFSET, NoisedSum, compute_centre, fix_heads, list_parts
from common.privacy.noise import NoiseStream
from common.privacy.shares import plan_moments
from common.run import RunConfig
from common.tasks import Task, open_task
from common.types import BadInput, Plan, Unit
from common.yaml import parse

DIM = 6
HEAD = {"bias": False, "centre": True, "prior": True}
SETTINGS: dict[str, Any] = {
    "name": "moments",
    "seed": 1,
    "rounds": 4,
    "backbones": {"one": {"kind": "identity", "dim": DIM}, "two": {"kind": "identity", "dim": DIM}},
    "tasks": {
        "grade": {"kind": "classification", "labels": ["a", "b", "c"], "head": HEAD, "backbone": "one"},
        "signs": {"kind": "multilabel", "labels": ["x", "y"], "head": HEAD, "backbone": "one"},
        "only": {"kind": "classification", "labels": ["n", "y"], "head": {"centre": True}, "backbone": "two"},
    },
    "solver": {"kind": "head_sum", "clip_norm": 1.0},
    "privacy": {"unit": "patient", "delta": 1e-5, "target_epsilon": 3.0},
    "aggregation": {"kind": "heavy_ball", "rounds": 4, "noise": 10.0},
    "moments": {"means": 0.1, "counts": 0.3, "classes": 0.2, "scatter": 0.1},
}


def make_run(**changes: Any) -> RunConfig:
    return parse(RunConfig, {**SETTINGS, **changes}, base=Path.cwd())


def open_tasks(run: RunConfig) -> dict[str, Task]:
    return {name: open_task(spec, name) for name, spec in run.tasks.items()}


RUN = make_run()
TASKS = open_tasks(RUN)
PARTS = list_parts(RUN, TASKS)


class SilentStream(NoiseStream):
    """A stream whose noise is zero."""

    def rounded_gaussian(self, count: int, log2_deviation: int) -> np.ndarray:
        return np.zeros(count, np.int64)


def make_units(people: list[list[tuple[int, float]]]) -> Units:
    """Units with records of (seed, length of the features)."""
    rows, unit, seeds = [torch.zeros(0, DIM)], [], []
    for index, records in enumerate(people):
        for seed, length in records:
            rows.append(length * torch.randn(1, DIM, generator=torch.Generator().manual_seed(seed)))
            unit.append(index)
            seeds.append(seed)
    features_RD, unit_R, seed_R = torch.cat(rows), torch.tensor(unit, dtype=torch.long), torch.tensor(seeds).long()
    labels = {"grade": seed_R % 3, "only": seed_R % 2, "signs": torch.stack([seed_R % 2, seed_R % 3 - 1], 1).float()}
    tasks = {name: TaskRecords.of(features_RD, labels[name], seed_R % 7 > 0, unit_R, len(people)) for name in RUN.tasks}
    return Units(len(people), tasks)


def release(units: Units, plan: Plan, stream: NoiseStream) -> Mapping[str, np.ndarray]:
    sums = release_moments(PARTS, RUN, TASKS, units, plan=plan, stream=stream)
    return {part: sums[part]["sum"].astype(np.float64) for part in PARTS}


def get_plan() -> Plan:
    plan = plan_moments(RUN, Unit.PATIENT)
    assert plan is not None
    return plan


RECORDS = st.lists(
    st.tuples(st.integers(0, 5000), st.sampled_from([1.0, 0.0, 1e-30, 1e8, float("inf")])), min_size=0, max_size=4
)


@settings(max_examples=60, deadline=None)
@given(others=st.lists(RECORDS, max_size=8), more=RECORDS)
def test_one_unit_more_moves_all_sums_together_by_at_most_one(others: list[Any], more: Any) -> None:
    plan = get_plan()
    with_it, without = (
        release(make_units(people), plan, SilentStream(b"k" * 32)) for people in ([*others, more], others)
    )
    square = sum(PARTS[part] ** 2 * float(np.square(with_it[part] - without[part]).sum()) for part in PARTS)
    assert square <= (plan.clip_norm or 0.0) ** 2 + 1e-4  # Float32 of what is shown; the sums are exact in integers.


def test_the_bound_is_reached_so_that_no_noise_is_wasted() -> None:
    """A patient with one record that has every label, whose features have some length."""
    sums = release(make_units([[(1, 3.0)]]), get_plan(), SilentStream(b"k" * 32))
    square = sum(PARTS[part] ** 2 * float(np.square(sums[part]).sum()) for part in PARTS)
    assert square == pytest.approx(1.0, abs=1e-3)


def test_sums_are_those_of_normalised_features_and_of_labels() -> None:
    people = [[(seed, 2.0)] for seed in range(1, 40) if seed % 7]
    sums = release(make_units(people), get_plan(), SilentStream(b"k" * 32))
    seeds = [seed for ((seed, _),) in people]
    rows = [torch.randn(1, DIM, generator=torch.Generator().manual_seed(seed))[0].numpy() for seed in seeds]
    expected = np.sum([row / np.linalg.norm(row) for row in rows], axis=0)
    np.testing.assert_allclose(sums["one.mean"], expected, atol=1e-3)
    np.testing.assert_allclose(sums["two.mean"], expected, atol=1e-3)
    np.testing.assert_allclose(sums["grade"], np.bincount(np.array(seeds) % 3, minlength=3), atol=1e-3)
    unit_ND = np.array([row / np.linalg.norm(row) for row in rows])
    of_class = [unit_ND[np.array(seeds) % 3 == label].sum(axis=0) for label in range(3)]
    np.testing.assert_allclose(sums["grade.classes"].reshape(3, DIM), of_class, atol=1e-3)
    np.testing.assert_allclose(sums["one.scatter"].reshape(DIM, DIM), unit_ND.T @ unit_ND, atol=1e-3)
    assert set(PARTS) == {"one.mean", "two.mean", "grade", "signs", "grade.classes", "one.scatter"}


def test_a_patient_adds_the_mean_of_its_records_to_each_sum() -> None:
    several = release(make_units([[(1, 2.0), (2, 1.0), (3, 5.0)]]), get_plan(), SilentStream(b"k" * 32))
    alone = [release(make_units([[(seed, 1.0)]]), get_plan(), SilentStream(b"k" * 32)) for seed in (1, 2, 3)]
    for part in ("grade.classes", "one.scatter", "one.mean", "grade"):
        np.testing.assert_allclose(several[part], np.mean([each[part] for each in alone], axis=0), atol=1e-3)


def test_noise_has_the_planned_scale() -> None:
    plan = get_plan()
    empty = make_units([[]])
    drawn = [release(empty, plan, NoiseStream(bytes([key]) * 32)) for key in range(200)]
    for part, factor in PARTS.items():
        values = np.concatenate([each[part] for each in drawn])
        expected = plan.noise_multiplier / factor
        assert abs(values.std() / expected - 1.0) < 5.0 / np.sqrt(2 * len(values))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"moments": {"counts": 0.1}}, "moments.means: expected a share above 0"),
        ({"moments": {"means": 0.1, "counts": 0.1, "scatter": 0.1}}, "moments.scatter: expected `classes` beside it"),
        (
            {
                "moments": {"means": 0.1, "counts": 0.1, "classes": 0.1},
                "tasks": {
                    name: {**task, "head": {**HEAD, "prior": name == "signs"}}
                    for name, task in SETTINGS["tasks"].items()
                },
            },
            "moments.classes: expected a task of kind classification whose head has `prior: true`",
        ),
        (
            {"tasks": {name: {**task, "head": {}} for name, task in SETTINGS["tasks"].items()}},
            "expected a share above 0",
        ),
    ],
)
def test_a_share_for_nothing_and_nothing_for_a_head_are_refused(changes: dict[str, Any], said: str) -> None:
    run = make_run(**changes)
    with pytest.raises(BadInput, match=said):
        list_parts(run, open_tasks(run))


def test_a_declared_prior_needs_a_head_that_is_served_for_one() -> None:
    name = next(name for name, task in SETTINGS["tasks"].items() if task["kind"] == "classification")
    labels = SETTINGS["tasks"][name]["labels"]
    prior = {label: (0.5 if label == labels[0] else 0.5 / (len(labels) - 1)) for label in labels}
    declared = {**SETTINGS["tasks"], name: {**SETTINGS["tasks"][name], "prior": prior}}
    run = make_run(tasks=declared)
    list_parts(run, open_tasks(run))
    plain = {key: {**task, "head": {"bias": False, "centre": True}} for key, task in declared.items()}
    run = make_run(tasks=plain, moments={"means": 0.1, "counts": 0.0})
    with pytest.raises(BadInput, match=rf"tasks\.{name}\.prior: expected"):
        list_parts(run, open_tasks(run))


def test_a_mean_that_is_mostly_noise_is_taken_for_zero() -> None:
    rng = np.random.default_rng(0)
    noise = NoisedSum(50.0 * rng.normal(size=256), 50.0, 100.0)
    assert np.linalg.norm(compute_centre(noise)) < 0.35 * np.linalg.norm(noise.values / noise.units)
    clear = NoisedSum(np.r_[80.0, np.zeros(255)] + 0.1 * rng.normal(size=256), 0.1, 100.0)
    assert compute_centre(clear)[0] == pytest.approx(0.8, abs=0.01)


def test_a_head_whose_labels_are_equally_frequent_subtracts_the_mean_and_one_with_a_rare_label_less() -> None:
    run = parse(RunConfig, SETTINGS, base=Path.cwd())
    tasks = {name: open_task(spec, name) for name, spec in run.tasks.items()}
    mean_D = np.linspace(0.1, 0.3, DIM)
    heads = {"grade": {CENTRE: np.zeros(DIM, np.float32), OFFSET: np.zeros(3, np.float32)}}

    def find_centre(*counts: float) -> np.ndarray:
        sums = {"one.mean": NoisedSum(100 * mean_D, 0.0, 100.0), "grade": NoisedSum(np.array(counts), 0.0, 100.0)}
        return fix_heads(heads, run, tasks, sums)["grade"][CENTRE]

    np.testing.assert_allclose(find_centre(30.0, 30.0, 30.0), mean_D, rtol=1e-6)
    parts = [find_centre(45.0, 45.0, rare) / mean_D for rare in (30.0, 10.0, 1.0)]
    for part in parts:
        np.testing.assert_allclose(part, part[0], rtol=1e-6)
    assert 1.0 > parts[0][0] > parts[1][0] > parts[2][0] > 0.5
    alone = fix_heads(heads, run, tasks, {"one.mean": NoisedSum(100 * mean_D, 0.0, 100.0)})
    np.testing.assert_allclose(alone["grade"][CENTRE], mean_D, rtol=1e-6)


def test_with_a_rare_label_a_head_without_a_bias_finds_both_labels() -> None:
    settings = {**SETTINGS, "tasks": {"only": {"kind": "classification", "labels": ["n", "y"], "head": HEAD}}}
    run = parse(RunConfig, {**settings, "backbone": {"kind": "identity", "dim": 8}, "backbones": None}, base=Path.cwd())
    task = open_task(run.tasks["only"], "only")
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(2000) % 10 == 0).long()
    features = 0.25 * torch.randn(2000, 8, generator=generator)
    features[:, 0] += 1.0
    features[:, 1] += 0.8 * labels
    lengths = features / features.norm(dim=1, keepdim=True)
    sums = {
        "backbone.mean": NoisedSum(lengths.double().sum(0).numpy(), 0.0, 2000.0),
        "only": NoisedSum(np.array([1800.0, 200.0]), 0.0, 2000.0),
    }
    head = task.head(8)
    start = {name: value.detach().numpy() for name, value in head.state_dict().items()}
    fixed = fix_heads({"only": start}, run, {"only": task}, sums)["only"]
    found = {}
    for name, centre_D in (("whole", compute_centre(sums["backbone.mean"])), ("part", fixed[CENTRE])):
        values = {**fixed, CENTRE: np.asarray(centre_D, np.float32)}
        head.load_state_dict({key: torch.from_numpy(value.copy()) for key, value in values.items()})
        optimizer = torch.optim.SGD(head.parameters(), lr=2.0, momentum=0.9)
        for _ in range(48):
            optimizer.zero_grad()
            task.losses(head(features), labels).mean().backward()
            optimizer.step()
        predicted = (head(features).detach() - torch.from_numpy(fixed[OFFSET])).argmax(1)
        found[name] = np.mean([(predicted[labels == label] == label).float().mean() for label in (0, 1)])
    assert found["part"] > found["whole"] + 0.03


@pytest.mark.parametrize(
    ("moments", "said"),
    [
        ({"means": 0.5, "counts": 0.4999999999}, "leave the rounds an epsilon of at least 0.0001, got 0"),
        ({"means": 1e-300, "counts": 1e-300}, "noise_multiplier"),
        ({"means": 5e-324, "counts": 5e-324}, "noise_multiplier"),
    ],
)
def test_parts_that_leave_nothing_for_one_side_are_refused(moments: dict[str, float], said: str) -> None:
    run = make_run(moments=moments)
    with pytest.raises(BadInput, match=said):
        assert plan_moments(run, Unit.PATIENT) is None or run.training_privacy is None
