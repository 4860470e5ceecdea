"""Opacus' private step against a loop over single units, and the two gradient solvers against each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from client.data.units import TaskRecords, Units
from client.solvers import Solver, open_solver
from client.solvers.parts import private_step
from common.model.parameters import create_heads, parameters
from common.privacy.accounting import Mechanism, compute_epsilon
from common.privacy.filters import TOLERANCE, choose_filter
from common.privacy.noise import NoiseStream
from common.run import Privacy
from common.tasks import Task, open_task
from common.tasks.segmentation import IGNORED
from common.types import BadInput, Delta, Plan, RunFailed, Unit

KEY = bytes(32)
FEATURES = 5
TASKS: dict[str, Task] = {
    "findings": open_task({"kind": "multilabel", "labels": ["x", "y"], "scale": 2.0}, "findings"),
    "grade": open_task({"kind": "classification", "labels": ["a", "b", "c"], "head": {"hidden": 4}}, "grade"),
}
SIZES = {"findings": 20, "grade": 30}


class SilentStream(NoiseStream):
    """Real coins, no noise."""

    def rounded_gaussian(self, count: int, log2_deviation: int) -> np.ndarray:
        return np.zeros(count, np.int64)


class CountingSilentStream(SilentStream):
    """Also counts how often noise was drawn."""

    def __init__(self, key: bytes) -> None:
        NoiseStream.__init__(self, key)
        self.draws = 0

    def rounded_gaussian(self, count: int, log2_deviation: int) -> np.ndarray:
        self.draws += 1
        return np.zeros(count, np.int64)


def heads(tasks: Mapping[str, Task] = TASKS) -> dict[str, nn.Module]:
    made = create_heads(tasks, {name: FEATURES for name in tasks}, seed=1)
    generator = torch.Generator().manual_seed(2)
    for head in made.values():
        for parameter in head.parameters():
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    return made


def site(seed: int, num_units: int, records_per_unit: int, *, missing: float = 0.3) -> Units:
    """Random records; the two tasks have different inputs, and records in no particular order of units."""
    generator = torch.Generator().manual_seed(seed)
    count = num_units * records_per_unit
    tasks = {}
    for name in TASKS:
        unit_R = torch.arange(num_units).repeat_interleave(records_per_unit)
        if records_per_unit > 1:
            unit_R = unit_R[torch.randperm(count, generator=generator)]
        features_RD = 2.0 * torch.randn(count, FEATURES, generator=generator)
        grades = torch.randint(0, 3, (count,), generator=generator)
        labels = grades if name == "grade" else torch.randint(0, 2, (count, 2), generator=generator).float()
        mask_R = torch.rand(count, generator=generator) >= missing
        tasks[name] = TaskRecords.of(features_RD, labels, mask_R, unit_R, num_units)
    return Units(num_units, tasks)


def part(units: Units, rows: slice) -> Units:
    """Some units of a site with one record each."""
    count = len(range(units.num_units)[rows])
    tasks = {
        name: TaskRecords.of(t.features_RD[rows], t.labels[rows], t.mask_R[rows], torch.arange(count), count)
        for name, t in units.tasks.items()
    }
    return Units(count, tasks)


def solver(kind: str = "dp_sgd", **changes: float) -> Solver:
    spec = {"kind": kind, "sampling_rate": 1.0, "steps": 1, "learning_rate": 1.0, **changes}
    return open_solver({"clip_norm": 1.0, **spec} if kind == "dp_sgd" else spec, "solver")


def plan(steps: int = 1, rate: float = 1.0, clip_norm: float = 1.0) -> Plan:
    return Plan(rate, steps, clip_norm, 1.0, Unit.PATIENT)


def solve(chosen: Solver, units: Units, numbers: Plan, stream: NoiseStream | None = None) -> Delta:
    stream = stream or SilentStream(KEY)
    return chosen.solve(heads(), TASKS, units, plan=numbers, public_sizes=SIZES, stream=stream)


def one_at_a_time(
    units: Units, clip_norm: float, tasks: Mapping[str, Task] = TASKS
) -> dict[str, dict[str, np.ndarray]]:
    """The clipped sum, one unit after the other with plain autograd: the definition, slowly."""
    modules = heads(tasks)
    trainable = [parameter for name in sorted(modules) for parameter in modules[name].parameters()]
    total = [torch.zeros_like(parameter) for parameter in trainable]
    for unit in range(units.num_units):
        loss = torch.zeros(())
        for name, records in units.tasks.items():
            own = (records.unit_R == unit).nonzero().squeeze(1).tolist()
            for row in own:
                if records.mask_R[row]:
                    output = modules[name](records.features_RD[row : row + 1])
                    example = tasks[name].losses(output, records.labels[row : row + 1])[0]
                    loss = loss + tasks[name].scale * example / len(own)
        if not loss.requires_grad:
            continue
        gradients = torch.autograd.grad(loss, trainable, allow_unused=True, materialize_grads=True)
        norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients))
        for part, gradient in zip(total, gradients, strict=True):
            part += gradient * min(1.0, clip_norm / max(norm, 1e-12))
    flat = iter(total)
    return {name: {key: next(flat).numpy() for key in parameters(modules[name])} for name in sorted(modules)}


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), num_units=st.integers(0, 6), records=st.integers(1, 3), clip_norm=st.floats(0.05, 20))
def test_the_released_sum_is_that_of_a_loop_over_units(
    seed: int, num_units: int, records: int, clip_norm: float
) -> None:
    units = site(seed, num_units, records)
    delta = solve(solver(), units, plan(clip_norm=clip_norm))
    for name, expected in one_at_a_time(units, clip_norm).items():
        for key, value in expected.items():
            assert -delta.heads[name][key] * SIZES[name] == pytest.approx(value, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize(
    "shape", [{"hidden": 4}, {"hidden": 4, "kernel": 3}, {"hidden": 3, "kernel": 5, "bias": False}]
)
@pytest.mark.parametrize("clip_norm", [0.05, 20.0])
def test_a_decoder_s_released_sum_is_that_of_a_loop_over_patients(shape: dict[str, Any], clip_norm: float) -> None:
    """Two pictures of each patient, on a grid coarser than their masks; some places and one picture have no label."""
    labels = ["ground", "cell", "edge"]
    tasks = {"mask": open_task({"kind": "segmentation", "labels": labels, "side": 8, "head": shape}, "mask")}
    generator = torch.Generator().manual_seed(3)
    masks_RSS = torch.randint(0, 3, (10, 8, 8), generator=generator, dtype=torch.uint8)
    masks_RSS[:, :2, 5:] = IGNORED
    mask_R = torch.arange(10) != 4
    features_RGGD = torch.randn(10, 4, 4, FEATURES, generator=generator)
    units = Units(5, {"mask": TaskRecords.of(features_RGGD, masks_RSS, mask_R, torch.arange(10) // 2, 5)})
    delta = solver().solve(
        heads(tasks),
        tasks,
        units,
        plan=plan(clip_norm=clip_norm),
        public_sizes={"mask": 20},
        stream=SilentStream(KEY),
    )
    for key, value in one_at_a_time(units, clip_norm, tasks)["mask"].items():
        assert -delta.heads["mask"][key] * 20 == pytest.approx(value, abs=1e-5, rel=1e-5)


def test_a_sample_too_large_for_memory_is_clipped_in_parts_and_noised_once() -> None:
    wide = {
        "grade": open_task({"kind": "classification", "labels": ["a", "b", "c"], "head": {"hidden": 4096}}, "grade")
    }
    modules = create_heads(wide, {"grade": FEATURES}, seed=1)
    count = 2 * private_step._BLOCK_RECORDS + 1
    everyone = site(3, count, 1, missing=0.0).only(["grade"])
    assert private_step._count_block_records(modules, everyone) < count
    stream = CountingSilentStream(KEY)

    def released_sum(units: Units) -> np.ndarray:
        delta = solver().solve(modules, wide, units, plan=plan(), public_sizes={"grade": 1}, stream=stream)
        return np.concatenate([value.ravel() for value in delta.heads["grade"].values()])

    parts = released_sum(part(everyone, slice(9))) + released_sum(part(everyone, slice(9, count)))
    assert released_sum(everyone) == pytest.approx(parts, abs=1e-4)
    assert stream.draws == 3


@pytest.mark.parametrize("rate", [1.0, 0.4])
def test_without_noise_and_clipping_it_is_plain_sgd(rate: float) -> None:
    """Also momentum, decay, divisors and coins are those of the baseline."""
    settings_ = {"momentum": 0.9, "weight_decay": 0.01, "learning_rate": 0.3}
    units = site(4, 15, 2)
    private = solve(solver(**settings_), units, Plan(rate, 6, 64.0, 1.0, Unit.PATIENT))
    plain = solve(solver("sgd", **settings_), units, Plan(rate, 6, None, 0.0, Unit.PATIENT))
    for name in TASKS:
        for key, value in plain.heads[name].items():
            assert private.heads[name][key] == pytest.approx(value, abs=2e-5)


def test_a_site_without_one_tasks_labels_still_noises_that_head() -> None:
    units = site(5, 8, 1)
    grade = replace(units.tasks["grade"], mask_R=torch.zeros(8, dtype=torch.bool))
    delta = solve(solver(), Units(8, {**units.tasks, "grade": grade}), plan(), NoiseStream(KEY))
    assert all(np.abs(value).min() > 0 for value in delta.heads["grade"].values())


@pytest.mark.parametrize("poison", [1e30, math.inf, math.nan])
@pytest.mark.parametrize("where", ["findings", "grade"])
def test_an_absurd_record_changes_no_other_units_part(poison: float, where: str) -> None:
    units = site(6, 7, 1, missing=0.0)
    features_RD = units.tasks[where].features_RD.clone()
    features_RD[6] = poison
    tasks = {**units.tasks, where: replace(units.tasks[where], features_RD=features_RD)}
    spoiled = solve(solver(), Units(7, tasks), plan())
    six = {
        name: TaskRecords.of(t.features_RD[:6], t.labels[:6], t.mask_R[:6], t.unit_R[:6], 6)
        for name, t in units.tasks.items()
    }
    without = solve(solver(), Units(6, six), plan())
    moved = [
        (spoiled.heads[name][key] - without.heads[name][key]) * SIZES[name]
        for name in TASKS
        for key in without.heads[name]
    ]
    assert np.linalg.norm(np.concatenate([part.ravel() for part in moved])) <= 1.0 + 1e-4


@pytest.mark.parametrize("target", [1.0, 8.0])
@pytest.mark.parametrize("rate", [1.0, 0.25])
def test_the_planned_noise_keeps_the_target_over_all_rounds(target: float, rate: float) -> None:
    asked = Privacy(unit=Unit.PATIENT, delta=1e-5, target_epsilon=target)
    numbers = solver(sampling_rate=rate, steps=4).plan(asked, Unit.PATIENT, 20)
    releases = [Mechanism.of(numbers)] * 20
    assert 0.99 < choose_filter(releases[0], None, target, 1e-5).compute_share(releases) <= TOLERANCE
    # Composition of fixed plans costs less than the filter where units are sampled.
    assert (0.99 * target if rate == 1.0 else 0.0) < compute_epsilon(releases, 1e-5) <= target
    assert numbers.unit is Unit.PATIENT


def test_the_number_of_tasks_is_not_in_the_price() -> None:
    """All heads of a unit are clipped jointly, so one and two tasks release under the same mechanism."""
    units = site(7, 6, 1, missing=0.0)
    for names in (["grade"], ["findings", "grade"]):
        modules = {name: heads()[name] for name in names}
        delta = solver().solve(
            modules,
            {name: TASKS[name] for name in names},
            part(units, slice(1)).only(names),
            plan=plan(clip_norm=0.2),
            public_sizes={name: 1 for name in names},
            stream=SilentStream(KEY),
        )
        squares = [float((value**2).sum()) for head in delta.heads.values() for value in head.values()]
        assert math.sqrt(sum(squares)) == pytest.approx(0.2, rel=1e-4)


def test_a_head_that_mixes_examples_is_refused() -> None:
    mixing = {"grade": nn.Sequential(nn.Linear(FEATURES, 3), nn.BatchNorm1d(3))}
    units = site(8, 4, 1).only(["grade"])
    with pytest.raises(BadInput, match="grade"):
        solver().solve(mixing, TASKS, units, plan=plan(), public_sizes=SIZES, stream=NoiseStream(KEY))


@pytest.mark.parametrize("kind", ["dp_sgd", "sgd"])
def test_a_diverged_head_is_an_error_not_a_release(kind: str) -> None:
    units = site(9, 6, 1)
    with pytest.raises(RunFailed, match="learning_rate"):
        solve(solver(kind, learning_rate=1e38, weight_decay=1e9), units, plan(steps=2), NoiseStream(KEY))


@pytest.mark.parametrize("missing", ["sampling_rate", "steps", "clip_norm", "learning_rate"])
def test_nothing_that_shapes_the_release_has_a_default(missing: str) -> None:
    values = {"kind": "dp_sgd", "sampling_rate": 1.0, "steps": 1, "clip_norm": 1.0, "learning_rate": 1.0}
    del values[missing]
    with pytest.raises(BadInput, match=missing):
        open_solver(values, "solver")


# --- the parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dp_sgd", "dp_gd"])
@pytest.mark.parametrize("clip_norm", [1e-9, 1e9])
def test_the_bound_holds_at_the_least_and_largest_clip_norm(kind: str, clip_norm: float) -> None:
    """One unit of 10,000 equal small parts, which all round alike."""
    modules: dict[str, nn.Module] = {"only": nn.Linear(10_000, 1, bias=False)}
    nn.init.zeros_(modules["only"].weight)  # type: ignore[arg-type]
    tasks = {"only": open_task({"kind": "regression", "range": [-1, 1]}, "only")}
    one = torch.ones(1)
    records = TaskRecords.of(torch.ones(1, 10_000) * max(1.0, clip_norm), one, one.bool(), torch.arange(1), 1)
    numbers = plan(clip_norm=clip_norm)
    spec = {"kind": kind, "sampling_rate": 1.0, "steps": 1, "learning_rate": 1 / clip_norm, "clip_norm": clip_norm}
    delta = open_solver(spec, "solver").solve(
        modules, tasks, Units(1, {"only": records}), plan=numbers, public_sizes={"only": 1}, stream=SilentStream(KEY)
    )
    assert np.linalg.norm(delta.heads["only"]["weight"].astype(np.float64)) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("clip_norm", [0.0, 8e-44, 1e10, math.inf])
def test_a_clip_norm_at_which_float32_cannot_keep_the_bound_is_refused(clip_norm: float) -> None:
    """At 8e-44 the unit above moved the sum by 1.75 clip norms: its parts were rounded to the least number there is."""
    with pytest.raises(BadInput, match="clip_norm: expected 1e-09 to 1e\\+09"):
        plan(clip_norm=clip_norm)
