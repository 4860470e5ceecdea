"""Closed-form clipping against Opacus from the same stream, and against a loop over units in double precision."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from client.data.units import TaskRecords, Units
from client.solvers import open_solver
from client.solvers.parts import closed_form, descent, objective
from client.solvers.parts.closed_form import round_weights
from common.plugins import Plugin
from common.privacy.lattice import Lattice
from common.privacy.noise import NoiseStream
from common.tasks import Task, open_task
from common.types import BadInput, Delta, Plan, Unit

KEY = bytes(range(32))
FEATURES = 5
VECTORS: dict[str, Task] = {
    "findings": open_task({"kind": "multilabel", "labels": ["x", "y"], "scale": 2.0, "smoothing": 0.3}, "findings"),
    "grade": open_task(
        {"kind": "classification", "labels": ["a", "b", "c"], "smoothing": 0.2, "head": {"bias": False}}, "grade"
    ),
    "size": open_task({"kind": "regression", "range": [-1, 1]}, "size"),
}


class PerPixel(Plugin):
    """A class for each pixel of a feature map: a head of one 1x1 convolution, cross entropy averaged over pixels."""

    kind: Literal["per_pixel"] = "per_pixel"
    classes: int = 3
    scale: float = 1.5
    bias: bool = True

    def head(self, feature_dim: int) -> nn.Module:
        return nn.Conv2d(feature_dim, self.classes, kernel_size=1, bias=self.bias)

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, labels, reduction="none").mean(dim=(1, 2))


class PerStep(PerPixel):
    """A class for each step of a sequence: a linear head on B x T x D."""

    def head(self, feature_dim: int) -> nn.Module:
        return nn.Linear(feature_dim, self.classes, bias=self.bias)

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.mT, labels, reduction="none").mean(dim=1)


DENSE: dict[str, Task] = {"map": PerPixel(), "plain": PerPixel(bias=False), "words": PerStep()}
WEIGHTED: dict[str, Task] = {
    "rare": open_task({"kind": "classification", "labels": ["a", "b", "c"], "weights": {"b": 50, "c": 0.02}}, "rare"),
    "signs": open_task({"kind": "multilabel", "labels": ["x", "y"], "weights": {"y": 20}}, "signs"),
}
ALL = {**VECTORS, **DENSE, **WEIGHTED}


class SilentStream(NoiseStream):
    """Real coins, no noise."""

    def rounded_gaussian(self, count: int, log2_deviation: int) -> np.ndarray:
        return np.zeros(count, np.int64)


def heads(tasks: Mapping[str, Task]) -> dict[str, nn.Module]:
    generator = torch.Generator().manual_seed(2)
    made = {name: task.head(FEATURES) for name, task in sorted(tasks.items())}
    for head in made.values():
        for parameter in head.parameters():
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    return made


def shapes(name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of one record's features and labels."""
    features = {"map": (FEATURES, 4, 3), "plain": (FEATURES, 4, 3), "words": (6, FEATURES)}.get(name, (FEATURES,))
    labels = {"map": (4, 3), "plain": (4, 3), "words": (6,), "findings": (2,), "signs": (2,)}.get(name, ())
    return features, labels


def site(
    tasks: Mapping[str, Task], seed: int, num_units: int, records: int, *, missing: float = 0.3, shared: bool = False
) -> Units:
    """Random records in no order of units; the first unit has many, some units have none."""
    generator = torch.Generator().manual_seed(seed)
    count = num_units * records
    unit_R = torch.randint(0, max(num_units, 1), (count,), generator=generator)
    if records == 1:
        unit_R = torch.arange(num_units)
    # Multiples of 1/256, which 16 bits hold: both solvers then train on the very same numbers.
    common = (512.0 * torch.randn(count, FEATURES, generator=generator)).round() / 256.0
    made = {}
    for name in tasks:
        features, labels = shapes(name)
        own = common if shared else (512.0 * torch.randn(count, *features, generator=generator)).round() / 256.0
        if name in ("findings", "signs", "size"):
            label = torch.randint(0, 2, (count, *labels), generator=generator).float()
        else:
            label = torch.randint(0, 3, (count, *labels), generator=generator)
        mask_R = torch.rand(count, generator=generator) >= missing
        made[name] = TaskRecords.of(own, label, mask_R, unit_R, num_units)
    return Units(num_units, made)


def plan(steps: int = 1, rate: float = 1.0, clip_norm: float = 1.0) -> Plan:
    return Plan(rate, steps, clip_norm, 0.8, Unit.PATIENT)


def solve(
    kind: str, tasks: Mapping[str, Task], units: Units, numbers: Plan, stream: NoiseStream, /, **changes: Any
) -> Delta:
    spec = {"kind": kind, "sampling_rate": 1.0, "steps": 1, "clip_norm": 1.0, "learning_rate": 1.0, **changes}
    spec = {key: value for key, value in spec.items() if value is not None}
    sizes = {name: max(1, units.num_units) for name in tasks}
    made = heads(tasks)
    return open_solver(spec, "solver").solve(made, tasks, units, plan=numbers, public_sizes=sizes, stream=stream)


def difference(first: Delta, second: Delta) -> float:
    """The largest difference of two deltas, relative to the largest value."""
    pairs = [(value, second.heads[name][key]) for name, head in first.heads.items() for key, value in head.items()]
    largest = max(np.abs(value).max() for value, _ in pairs)
    return float(max(np.abs(value - other).max() for value, other in pairs) / largest)


CASES = {
    "one task": ["grade"],
    "three tasks": ["findings", "grade", "size"],
    "maps": ["map", "plain"],
    "weighted": ["rare", "signs"],
    "all at once": list(ALL),
}


@pytest.mark.parametrize("names", CASES.values(), ids=CASES)
@pytest.mark.parametrize("records", [1, 3])
@pytest.mark.parametrize("rate", [1.0, 0.4])
@pytest.mark.parametrize("clip_norm", [0.1, 1.0, 1e3], ids=["nearly all clipped", "some clipped", "none clipped"])
def test_it_releases_what_opacus_does_from_the_same_stream(
    names: list[str], records: int, rate: float, clip_norm: float
) -> None:
    tasks = {name: ALL[name] for name in names}
    units = site(tasks, 3, 40, records)
    once = plan(1, rate, clip_norm)
    # The rate undoes the divisor: a delta that is small beside the weights shows their float32 grid, not the sum.
    ours, theirs = (
        solve(kind, tasks, units, once, NoiseStream(KEY), learning_rate=40.0) for kind in ("dp_gd", "dp_sgd")
    )
    assert difference(ours, theirs) < 1e-6


@pytest.mark.parametrize("rate", [1.0, 0.4])
def test_draws_made_ahead_for_a_large_head_are_those_of_opacus(rate: float) -> None:
    """Coins and noise come from one stream: their order is part of what is released."""
    tasks = {"map": PerPixel(classes=3000)}
    assert 3000 * (FEATURES + 1) > descent._LARGE_DRAW
    units = site(tasks, 3, 20, 1)
    ours, theirs = (solve(kind, tasks, units, plan(3, rate), NoiseStream(KEY)) for kind in ("dp_gd", "dp_sgd"))
    assert difference(ours, theirs) < 1e-6


@pytest.mark.parametrize("kind", ["dp_gd", "dp_sgd"])
def test_how_a_feature_map_lies_in_memory_changes_nothing(kind: str) -> None:
    """Opacus 1.6 by itself computes other gradients, from a map stored channels-last."""
    tasks = {"map": ALL["map"]}
    units = site(tasks, 3, 12, 2)
    records = units.tasks["map"]
    last = replace(records, features_RD=records.features_RD.contiguous(memory_format=torch.channels_last))
    lying = (solve(kind, tasks, each, plan(), NoiseStream(KEY)) for each in (units, Units(12, {"map": last})))
    assert difference(*lying) < 1e-6


@pytest.mark.parametrize("shared", [True, False])
def test_a_whole_round_with_momentum_and_decay_is_opacus_own(shared: bool) -> None:
    units = site(VECTORS, 4, 40, 2, shared=shared)
    changes: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.01, "learning_rate": 0.3}
    if not shared:
        changes["tasks"] = {"grade": {"learning_rate": 0.05, "weight_decay": 0.3}}
    several = plan(8, 0.5, 0.7)
    ours, theirs = (solve(kind, VECTORS, units, several, NoiseStream(KEY), **changes) for kind in ("dp_gd", "dp_sgd"))
    assert difference(ours, theirs) < 2e-6


@pytest.mark.parametrize("kind", ["dp_gd", "dp_sgd", "sgd"])
def test_a_task_moves_by_a_rate_of_its_own_where_the_solver_names_one(kind: str) -> None:
    units = site(VECTORS, 3, 30, 1)
    numbers = Plan(1.0, 1, None, 0.0, Unit.PATIENT) if kind == "sgd" else plan()
    changes = {"clip_norm": None} if kind == "sgd" else {}
    same, own = (
        solve(kind, VECTORS, units, numbers, SilentStream(KEY), **changes, **rates)
        for rates in ({}, {"tasks": {"grade": {"learning_rate": 0.25}}})
    )
    for name, head in own.heads.items():
        for key, value in head.items():
            expected = same.heads[name][key] * (0.25 if name == "grade" else 1.0)
            np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)


def one_at_a_time(tasks: Mapping[str, Task], units: Units, clip_norm: float) -> dict[str, list[np.ndarray]]:
    """The clipped sum, one unit after the other by plain autograd in double precision: the definition, slowly."""
    modules = {name: head.double() for name, head in heads(tasks).items()}
    trainable = [parameter for module in modules.values() for parameter in module.parameters()]
    total = [torch.zeros_like(parameter) for parameter in trainable]
    for unit in range(units.num_units):
        loss = torch.zeros((), dtype=torch.double)
        for name, records in units.tasks.items():
            own = (records.unit_R == unit).nonzero().squeeze(1).tolist()
            for row in own:
                if records.mask_R[row]:
                    label = records.labels[row : row + 1]
                    output = modules[name](records.features_RD[row : row + 1].double())
                    example = tasks[name].losses(output, label.double() if label.is_floating_point() else label)[0]
                    loss = loss + tasks[name].scale * example / len(own)
        if not loss.requires_grad:
            continue
        gradients = torch.autograd.grad(loss, trainable, allow_unused=True, materialize_grads=True)
        norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients))
        for part, gradient in zip(total, gradients, strict=True):
            part += gradient * min(1.0, clip_norm / (norm + 1e-6))
    flat = iter(total)
    return {name: [next(flat).numpy() for _ in module.parameters()] for name, module in modules.items()}


@settings(max_examples=40, deadline=None)
@given(
    names=st.sampled_from(list(CASES.values())),
    seed=st.integers(0, 999),
    num_units=st.integers(0, 6),
    records=st.sampled_from([1, 2, 5, 60]),
    clip_norm=st.floats(0.05, 20),
)
def test_the_released_sum_is_that_of_a_loop_over_units(
    names: list[str], seed: int, num_units: int, records: int, clip_norm: float
) -> None:
    """60 records a unit are more than are paired."""
    tasks = {name: ALL[name] for name in names}
    units = site(tasks, seed, num_units, records)
    delta = solve("dp_gd", tasks, units, plan(clip_norm=clip_norm), SilentStream(KEY))
    for name, expected in one_at_a_time(tasks, units, clip_norm).items():
        for value, right in zip(delta.heads[name].values(), expected, strict=True):
            assert -value * max(1, num_units) == pytest.approx(right, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("size", [1.0, 1e3, 1e6, 1e12, 1e18])
def test_records_that_cancel_move_the_sum_by_at_most_the_clip_norm(size: float) -> None:
    """A patient's records of large norms and hardly any sum: rounding must not leak what the clip does not see."""
    tasks = {"grade": VECTORS["grade"]}
    generator = torch.Generator().manual_seed(1)
    others = site(tasks, 5, 50, 1, missing=0.0).tasks["grade"]
    with torch.no_grad():
        head = heads(tasks)["grade"]
        head.weight.zero_()  # Every class is as likely: derivatives of all labels sum to 0.
        row = size * torch.randn(1, FEATURES, generator=generator)
    features_RD = torch.cat([row, others.features_RD, row, row])
    unit_R = torch.cat([torch.tensor([50]), torch.arange(50), torch.tensor([50, 50])])
    labels = torch.cat([torch.tensor([0]), others.labels, torch.tensor([1, 2])])
    mask_R = torch.ones(53, dtype=torch.bool)
    units = Units(51, {"grade": TaskRecords.of(features_RD, labels, mask_R, unit_R, 51)})
    spec = {"kind": "dp_gd", "steps": 1, "clip_norm": 0.5, "learning_rate": 1.0}
    solver = open_solver(spec, "solver")

    def released(some: Units) -> np.ndarray:
        sizes = {"grade": 1}
        numbers = plan(clip_norm=0.5)
        delta = solver.solve({"grade": head}, tasks, some, plan=numbers, public_sizes=sizes, stream=SilentStream(KEY))
        return delta.heads["grade"]["weight"].astype(np.float64)

    without = Units(50, {"grade": others})
    assert np.linalg.norm(released(units) - released(without)) <= 0.5 * (1 + 1e-5) + 1e-5


def test_a_sample_of_which_only_the_members_are_read_has_their_sum() -> None:
    units, numbers = site(ALL, 7, 40, 3), plan(rate=0.5)
    members = objective.draw_participants(units, numbers, SilentStream(KEY))
    assert 0 < len(members) < 40
    sampled = solve("dp_gd", ALL, units, numbers, SilentStream(KEY))
    made = heads(ALL)
    solver = open_solver({"kind": "dp_gd", "steps": 1, "clip_norm": 1.0, "learning_rate": 1.0}, "solver")
    batch, sizes = objective.select_batch(units, members), dict.fromkeys(ALL, 20)
    whole = solver.solve(made, ALL, batch, plan=plan(), public_sizes=sizes, stream=SilentStream(KEY))
    assert difference(sampled, whole) == 0.0


def test_a_sample_of_maps_too_large_for_one_block_is_summed_in_parts() -> None:
    wide: dict[str, Task] = {"map": PerPixel(classes=4096)}
    head = {"map": wide["map"].head(FEATURES)}
    count = 1 + 2 * closed_form.BLOCK_OUTPUTS // (4096 * 2)
    generator = torch.Generator().manual_seed(3)
    maps, labels = torch.randn(count, FEATURES, 1, 2, generator=generator), torch.zeros(count, 1, 2, dtype=torch.long)

    def released_sum(chosen: slice) -> np.ndarray:
        number = len(maps[chosen])
        records = TaskRecords.of(
            maps[chosen], labels[chosen], torch.ones(number, dtype=torch.bool), torch.arange(number), number
        )
        solver = open_solver({"kind": "dp_gd", "steps": 1, "clip_norm": 1.0, "learning_rate": 1.0}, "solver")
        sizes, stream = {"map": 1}, SilentStream(KEY)
        units = Units(number, {"map": records})
        delta = solver.solve(head, wide, units, plan=plan(), public_sizes=sizes, stream=stream)
        return np.concatenate([value.ravel() for value in delta.heads["map"].values()])

    parts = released_sum(slice(5)) + released_sum(slice(5, count))
    assert released_sum(slice(count)) == pytest.approx(parts, abs=1e-4)


class Affine(nn.Linear):
    """Looks like a linear layer and is not one."""


def hooked() -> nn.Module:
    head = nn.Linear(FEATURES, 3)
    head.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    return head


def half_frozen() -> nn.Module:
    head = nn.Linear(FEATURES, 3)
    head.bias.requires_grad_(False)
    return head


REFUSED = {
    "hidden layer": nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, 3)),
    "subclass": Affine(FEATURES, 3),
    "parametrised": nn.utils.parametrizations.weight_norm(nn.Linear(FEATURES, 3)),
    "hooked": hooked(),
    "half frozen": half_frozen(),
    "3x3": nn.Conv2d(FEATURES, 3, kernel_size=3),
    "stride": nn.Conv2d(FEATURES, 3, kernel_size=1, stride=2),
    "padding": nn.Conv2d(FEATURES, 3, kernel_size=1, padding=1),
    "groups": nn.Conv2d(FEATURES, FEATURES, kernel_size=1, groups=FEATURES),
    "transposed": nn.ConvTranspose2d(FEATURES, 3, kernel_size=1),
}


@pytest.mark.parametrize("head", REFUSED.values(), ids=REFUSED)
def test_a_head_it_is_not_exact_for_is_refused_with_the_kind_that_trains_it(head: nn.Module) -> None:
    units = site({"grade": VECTORS["grade"]}, 8, 4, 1)
    solver = open_solver({"kind": "dp_gd", "steps": 1, "clip_norm": 1.0, "learning_rate": 1.0}, "solver")
    with pytest.raises(BadInput, match=r"tasks\.grade\.head.*dp_sgd"):
        solver.solve({"grade": head}, VECTORS, units, plan=plan(), public_sizes={"grade": 4}, stream=NoiseStream(KEY))


@pytest.mark.parametrize("poison", [1e25, 3e38, math.inf, math.nan])
@pytest.mark.parametrize("name", list(ALL))
def test_an_absurd_record_changes_no_other_units_part(poison: float, name: str) -> None:
    tasks = {name: ALL[name], "other": VECTORS["grade"]}
    units = site(tasks, 6, 7, 1, missing=0.0)
    last = units.tasks[name].features_RD.clone()
    last[6] = poison
    spoiled = Units(7, {**units.tasks, name: replace(units.tasks[name], features_RD=last)})
    six = {key: replace(records, mask_R=torch.arange(7) < 6) for key, records in units.tasks.items()}
    moved = [
        value - other
        for first, second in [
            (
                solve("dp_gd", tasks, spoiled, plan(), SilentStream(KEY)),
                solve("dp_gd", tasks, Units(7, six), plan(), SilentStream(KEY)),
            )
        ]
        for key in tasks
        for value, other in zip(first.heads[key].values(), second.heads[key].values(), strict=True)
    ]
    assert 7 * np.linalg.norm(np.concatenate([part.ravel() for part in moved])) <= 1.0 + 1e-5


def test_full_batch_is_the_default_and_the_other_settings_have_none() -> None:
    values = {"kind": "dp_gd", "steps": 1, "clip_norm": 1.0, "learning_rate": 1.0}
    assert open_solver(values, "solver").sampling_rate == 1.0
    for missing in ("steps", "clip_norm", "learning_rate"):
        with pytest.raises(BadInput, match=missing):
            open_solver({key: value for key, value in values.items() if key != missing}, "solver")


def test_a_full_batch_run_needs_no_opacus() -> None:
    program = """
import sys
from client.solvers import open_solver
from common.run import Privacy
from common.types import Unit
solver = open_solver({"kind": "dp_gd", "steps": 4, "clip_norm": 1.0, "learning_rate": 1.0}, "solver")
print(solver.plan(Privacy(unit=Unit.EXAMPLE, delta=1e-5, target_epsilon=3.0), Unit.EXAMPLE, 10).noise_multiplier)
assert not {"opacus", "ray"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(math.sqrt(40) / 0.7191, rel=1e-3)  # PRIVACY.md: mu(3) = 0.7191


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["size", "map", "words"])
@pytest.mark.parametrize("records", [1, 2, 40])
def test_a_derivative_that_cannot_be_clipped_leaves_its_whole_unit_out(value: float, name: str, records: int) -> None:
    head = heads(ALL)[name]
    chosen = site({name: ALL[name]}, 1, 2, records, missing=0.0).tasks[name]
    inputs = closed_form.Inputs.from_records(head, replace(chosen, unit_R=torch.arange(2 * records) % 2), 2)
    first = int(inputs.start_U[1])

    def sum_parts(others: float, one: float) -> list[Tensor]:
        """The integer sum when unit 1 has these derivatives, one of its records another."""

        def differentiate(outputs: Tensor, labels: Tensor) -> Tensor:
            gradient = torch.ones_like(outputs)
            gradient[first : 2 * records] = others
            gradient[first] = one
            return gradient

        weights = [round_weights(part.detach().flatten(1) if part.dim() > 1 else part) for part in head.parameters()]
        totals = [torch.zeros_like(part, dtype=torch.int64) for part in weights]
        (block,) = closed_form.split_blocks({name: inputs}, 2, {name: len(weights[0])})
        closed_form.add_clipped_parts(
            block, {name: weights}, {name: differentiate}, Lattice.of(1.0, 1.0), {name: totals}
        )
        return totals

    spoiled, without = sum_parts(1.0, value), sum_parts(0.0, 0.0)
    assert without[0].any()
    assert all(torch.equal(*pair) for pair in zip(spoiled, without, strict=True))
