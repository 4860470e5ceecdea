"""One unit more adds its own part to a site's sum and changes nothing else: in integers, bit by bit, with no tolerance.

The sum with a unit minus the sum without it is compared with the sum of that unit alone, and its norm with the clip
norm, in Python's integers: wherever the unit stands, however many others there are, and for heads that a coordinator
chose to make others' gradients flip.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from client.data.quantised import QuantisedRows
from client.data.units import TaskRecords, Units
from client.solvers.parts.closed_form import (
    Inputs,
    add_clipped_parts,
    choose_total_type,
    compute_outputs,
    round_weights,
    split_blocks,
)
from client.solvers.parts.descent import get_output_gradient
from client.solvers.parts.private_step import StreamOptimizer, hook_record_gradients, release_step, split_fixed_blocks
from common.backbones import QUIET, SPEECH
from common.model.parameters import MAX_ROW_NORM, load_parameters, parameters
from common.privacy.lattice import Lattice
from common.privacy.noise import NoiseStream
from common.tasks import PlacesLabels, Task, open_task, select_round
from common.tasks.parts.adjusted import AdjustedHead, normalize_rows
from common.tasks.seq2seq import Seq2seq
from common.types import Plan, Unit
from tests.written import TinyLanguage

pytestmark = pytest.mark.usefixtures("two_threads")

FEATURES = 40
LATTICE = Lattice.of(0.5, 3.0)
TASKS: dict[str, Task] = {
    "grade": open_task({"kind": "classification", "labels": ["a", "b", "c"]}, "grade"),
    "only": open_task(
        {"kind": "classification", "labels": ["a", "b"], "smoothing": 0.2, "head": {"bias": False}}, "only"
    ),
    "signs": open_task({"kind": "multilabel", "labels": ["x", "y"], "scale": 3.0}, "signs"),
    "size": open_task({"kind": "regression", "range": [-1, 1]}, "size"),
    "strange": open_task({"kind": "anomaly", "normal": "n", "anomalous": "a"}, "strange"),
    "rare": open_task({"kind": "classification", "labels": ["a", "b"], "weights": {"a": 100, "b": 0.01}}, "rare"),
}
Sums = dict[str, list[Tensor]]


@dataclass(frozen=True)
class Person:
    """A unit that is the same wherever it stands: everything of it follows from its seed."""

    seed: int
    records: int = 1
    scale: float = 1.0


def site(people: Sequence[Person], tasks: Mapping[str, Task] = TASKS, features: int = FEATURES) -> Units:
    rows, unit, seeds = [torch.zeros(0, features)], [], []
    for index, person in enumerate(people):
        generator = torch.Generator().manual_seed(person.seed)
        rows.append(torch.randn(person.records, features, generator=generator) * person.scale)
        unit += [index] * person.records
        seeds += [7 * person.seed + record for record in range(person.records)]
    features_RD = QuantisedRows.of(torch.cat(rows)).decode()  # As a site's arrays hold them.
    unit_R, seed_R = torch.tensor(unit, dtype=torch.long), torch.tensor(seeds).long()
    made = {}
    for name in tasks:
        labels = {
            "signs": torch.stack([seed_R % 2, seed_R % 5 % 2], dim=1).float(),
            "size": (seed_R % 7).float() / 3.5 - 1.0,
            "grade": seed_R % 3,
            "strange": torch.zeros_like(seed_R),
        }.get(name, seed_R % 2)
        made[name] = TaskRecords.of(features_RD, labels, seed_R % 11 > 0, unit_R, len(people))
    return Units(len(people), made)


def draw_heads(tasks: Mapping[str, Task], scale: float = 2.0, features: int = FEATURES) -> dict[str, nn.Module]:
    generator = torch.Generator().manual_seed(5)
    heads = {name: task.head(features) for name, task in tasks.items()}
    for head in heads.values():
        for parameter in head.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return heads


def sum_parts(heads: Mapping[str, nn.Module], tasks: Mapping[str, Task], units: Units) -> Sums:
    """The integer sums of one step in closed form, in steps of the lattice."""
    usable = {name: records.labelled() for name, records in units.tasks.items()}
    weights = {
        name: [
            round_weights(part.detach().flatten(1) if part.dim() > 1 else part.detach()) for part in head.parameters()
        ]
        for name, head in heads.items()
    }
    totals = {name: [torch.zeros_like(part, dtype=torch.int64) for part in parts] for name, parts in weights.items()}
    inputs = {
        name: Inputs.from_records(head, usable[name], units.num_units, tasks[name].scale)
        for name, head in heads.items()
    }
    gradients = {name: get_output_gradient(task) for name, task in tasks.items()}
    with torch.no_grad():
        for block in split_blocks(inputs, units.num_units, {name: len(parts[0]) for name, parts in weights.items()}):
            add_clipped_parts(block, weights, gradients, LATTICE, totals)
    return totals


def square(sums: Sums) -> int:
    return sum(int(value) ** 2 for parts in sums.values() for part in parts for value in part.flatten().tolist())


def subtract(first: Sums, second: Sums) -> Sums:
    return {name: [a - b for a, b in zip(first[name], second[name], strict=True)] for name in first}


def assert_equal(first: Sums, second: Sums) -> None:
    assert all(torch.equal(a, b) for name in first for a, b in zip(first[name], second[name], strict=True))


# --- closed form -----------------------------------------------------------------------------------------------------

PEOPLE = st.builds(
    Person,
    st.integers(0, 10_000),
    st.sampled_from([1, 1, 1, 2, 3, 5, 33, 40]),
    st.sampled_from([1.0, 1.0, 1e-20, 1e-3, 1e3, 1e10, 1e30]),
)


@settings(max_examples=40, deadline=None)
@given(
    others=st.lists(PEOPLE, max_size=12), more=PEOPLE, place=st.integers(0, 12), scale=st.sampled_from([0.0, 0.1, 30.0])
)
def test_one_unit_more_adds_its_own_part_which_is_within_the_bound(
    others: list[Person], more: Person, place: int, scale: float
) -> None:
    heads = draw_heads(TASKS, scale)
    own = sum_parts(heads, TASKS, site([more]))
    with_it = sum_parts(heads, TASKS, site([*others[:place], more, *others[place:]]))
    assert_equal(subtract(with_it, sum_parts(heads, TASKS, site(others))), own)
    assert square(own) <= int(LATTICE.bound**2)


@pytest.mark.parametrize("count", [*range(1, 70), 255, 256, 257, 1003, 2049])
def test_neither_their_number_nor_the_place_changes_what_a_unit_adds(count: int) -> None:
    """Sizes around vector widths and blocks; the prototype of this arithmetic was tried on the same ones."""
    tasks = {name: TASKS[name] for name in ("grade", "signs")}
    heads, more = draw_heads(tasks, 0.5), Person(99_999)
    people = [Person(seed) for seed in range(count)]
    own, without = sum_parts(heads, tasks, site([more], tasks)), sum_parts(heads, tasks, site(people, tasks))
    for place in {0, count // 2, count}:
        with_it = sum_parts(heads, tasks, site([*people[:place], more, *people[place:]], tasks))
        assert_equal(subtract(with_it, without), own)


ADJUSTED = {
    name: open_task({**settings, "head": {"centre": True, "prior": True}}, name)
    for name, settings in {
        "grade": {"kind": "classification", "labels": ["a", "b", "c"]},
        "signs": {"kind": "multilabel", "labels": ["x", "y"], "scale": 3.0},
    }.items()
}
"""Heads with numbers that do not train and that a coordinator chooses."""


def fix_numbers(heads: Mapping[str, nn.Module], centre_D: Tensor, offset: float) -> None:
    """Puts a centre and an offset of the first output into heads, as a request would."""
    for head in heads.values():
        assert isinstance(head, AdjustedHead)
        offset_K = torch.zeros(len(head.fixed.offset))
        offset_K[0] = offset
        load_parameters(head, parameters(head) | {"fixed.centre": centre_D.numpy(), "fixed.offset": offset_K.numpy()})


@settings(max_examples=12, deadline=None)
@given(
    others=st.lists(PEOPLE, max_size=6),
    more=PEOPLE,
    place=st.integers(0, 6),
    centre=st.sampled_from(["its own", "another's", MAX_ROW_NORM, 1e-45, -0.0, 1.0]),
    offset=st.sampled_from([-MAX_ROW_NORM, 0.0, 88.0, 1e-45, MAX_ROW_NORM]),
)
def test_no_centre_and_no_offset_makes_a_unit_add_more_or_change_another(
    others: list[Person], more: Person, place: int, centre: str | float, offset: float
) -> None:
    """A centre that is a record's own direction leaves only what rounding made of it."""
    heads, own_site = draw_heads(ADJUSTED), site([more], ADJUSTED)
    chosen = own_site if centre == "its own" or not others else site(others, ADJUSTED)
    direction_D = normalize_rows(chosen.tasks["grade"].features_RD[:1])[0]
    fix_numbers(heads, direction_D if isinstance(centre, str) else torch.full((FEATURES,), centre), offset)
    own = sum_parts(heads, ADJUSTED, own_site)
    with_it = sum_parts(heads, ADJUSTED, site([*others[:place], more, *others[place:]], ADJUSTED))
    assert_equal(subtract(with_it, sum_parts(heads, ADJUSTED, site(others, ADJUSTED))), own)
    assert square(own) <= int(LATTICE.bound**2)


@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize("count", [103, 1003])
def test_heads_that_balance_three_units_on_an_edge_move_the_sum_by_one_unit(count: int, duplicates: bool) -> None:
    """Heads orthogonal to records that the coordinator knows: rounding alone decided their gradients' signs."""
    tasks = {"strange": TASKS["strange"]}
    people = [Person(7 if duplicates and seed > count - 4 else seed) for seed in range(count)]
    units, more = site(people, tasks), site([*people, Person(123_456)], tasks)
    known = units.tasks["strange"].features_RD[-1 if duplicates else -3 :].double()
    if duplicates:
        known = known[:1]
    projector = torch.eye(FEATURES, dtype=torch.double) - known.mT @ torch.linalg.solve(known @ known.mT, known)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        direction = projector @ torch.randn(FEATURES, generator=generator, dtype=torch.double)
        head = tasks["strange"].head(FEATURES)
        (weight,) = list(head.parameters())
        weight.data = (direction / direction.norm() * 0.9 * MAX_ROW_NORM).float()[None]
        moved = subtract(sum_parts({"strange": head}, tasks, more), sum_parts({"strange": head}, tasks, units))
        assert square(moved) <= int(LATTICE.bound**2)


@pytest.mark.parametrize(
    ("count", "records", "few"), [(2048, 1, True), (2049, 1, False), (128, 2, True), (129, 2, False)]
)
def test_parts_of_few_units_add_in_double_precision_to_the_same_sum(count: int, records: int, few: bool) -> None:
    """Double precision holds 2**53: 2048 parts of at most 2**42, or a 16th as many where a part's terms may cancel."""
    assert 2048 * LATTICE.bound <= 2**53
    tasks = {"grade": TASKS["grade"]}
    head, units = draw_heads(tasks)["grade"], site([Person(seed, records) for seed in range(count)], tasks)
    inputs = {"grade": Inputs.from_records(head, units.tasks["grade"].labelled(), count)}
    assert (choose_total_type(inputs, count) == torch.double) == few
    if few:
        weights = {"grade": [round_weights(part.detach()) for part in head.parameters()]}
        totals = {"grade": [torch.zeros_like(part) for part in weights["grade"]]}
        gradients = {"grade": get_output_gradient(tasks["grade"])}
        for block in split_blocks(inputs, count, {"grade": 3}):
            add_clipped_parts(block, weights, gradients, LATTICE, totals)
        exact = sum_parts({"grade": head}, tasks, units)
        assert_equal({"grade": [total.long() for total in totals["grade"]]}, exact)
        assert all(torch.equal(total, total.round()) for total in totals["grade"])


def test_a_sample_of_units_has_the_sum_of_its_members() -> None:
    people = [Person(seed, records=1 + seed % 4) for seed in range(30)]
    heads, members = draw_heads(TASKS), torch.tensor([0, 3, 4, 11, 28])
    units = site(people)
    inputs = {
        name: Inputs.from_records(head, units.tasks[name].labelled(), 30, TASKS[name].scale)
        for name, head in heads.items()
    }
    chosen = site([people[index] for index in members.tolist()])
    expected = sum_parts(heads, TASKS, chosen)
    weights = {name: [round_weights(part.detach()) for part in head.parameters()] for name, head in heads.items()}
    totals = {name: [torch.zeros_like(part, dtype=torch.int64) for part in parts] for name, parts in weights.items()}
    gradients = {name: get_output_gradient(task) for name, task in TASKS.items()}
    sample = {name: one.select(members) for name, one in inputs.items()}
    for block in split_blocks(sample, len(members), {name: len(parts[0]) for name, parts in weights.items()}):
        add_clipped_parts(block, weights, gradients, LATTICE, totals)
    assert_equal(totals, expected)


def test_the_sum_is_that_of_clipped_gradients_up_to_the_lattice() -> None:
    """Against a loop in double precision over units, whose records disagree."""
    people = [Person(seed, records=1 + 3 * (seed % 3), scale=0.3) for seed in range(12)]
    heads, units = draw_heads(TASKS, 0.5), site(people)
    sums = sum_parts(heads, TASKS, units)
    expected = {name: [torch.zeros(part.shape, dtype=torch.double) for part in sums[name]] for name in heads}
    for unit in range(len(people)):
        gradients = {}
        for name, head in heads.items():
            records = units.tasks[name].labelled()
            rows = records.unit_R == unit
            exact = [part.detach().double().requires_grad_() for part in head.parameters()]
            outputs = nn.functional.linear(
                records.features_RD[rows].double(), exact[0], exact[1] if len(exact) > 1 else None
            )
            loss = (records.weight_R[rows].double() * TASKS[name].losses(outputs, records.labels[rows])).sum()
            gradients[name] = torch.autograd.grad(TASKS[name].scale * loss, exact)
        norm = torch.cat([part.flatten() for parts in gradients.values() for part in parts]).norm()
        for name, parts in gradients.items():
            for total, part in zip(expected[name], parts, strict=True):
                total += part * min(1.0, 0.5 / max(float(norm), 1e-30))
    for name, parts in sums.items():
        for part, total in zip(parts, expected[name], strict=True):
            torch.testing.assert_close(part.double() * LATTICE.spacing, total, rtol=1e-5, atol=2e-6)


# --- outputs ---------------------------------------------------------------------------------------------------------


@given(
    values=st.lists(st.lists(st.floats(width=32), min_size=6, max_size=6), min_size=1, max_size=8),
    scale=st.sampled_from([1.0, 1e20, 1e-30]),
)
def test_a_row_s_integers_follow_from_it_alone_and_hold_it_exactly_the_second_time(
    values: list[list[float]], scale: float
) -> None:
    features = torch.tensor(values, dtype=torch.float32) * scale
    rows = QuantisedRows.of(features)
    assert torch.equal(rows.integers, rows.integers.round())
    assert all(sum(int(value) ** 2 for value in row) < 2**30 for row in rows.integers.tolist())
    for index, row in enumerate(features):
        alone = QuantisedRows.of(row[None])
        assert torch.equal(alone.integers[0], rows.integers[index])
        assert torch.equal(alone.scale[0], rows.scale[index]) or not torch.isfinite(row).all()
    finite = torch.isfinite(features).all(dim=1)
    decoded = rows.decode()
    assert torch.equal(QuantisedRows.of(decoded).decode()[finite], decoded[finite])
    assert torch.isnan(decoded[~finite]).all()
    error = (decoded - features)[finite].double().norm(dim=1)
    assert bool((error <= features[finite].double().norm(dim=1) * 6**0.5 * 2.0**-14 + 1e-44).all())


def test_an_output_does_not_depend_on_the_rows_beside_it() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = QuantisedRows.of(torch.randn(1003, 129, generator=generator))
    weight = round_weights(torch.randn(7, 129, generator=generator) * 1000)
    together = compute_outputs(rows, weight, None)
    for size in (1, 2, 3, 64, 500):
        parts = [compute_outputs(rows[start : start + size], weight, None) for start in range(0, 1003, size)]
        assert torch.equal(torch.cat(parts), together)


# --- Opacus ----------------------------------------------------------------------------------------------------------

DEEP: dict[str, Task] = {
    "grade": open_task({"kind": "classification", "labels": ["a", "b", "c"], "head": {"hidden": 16}}, "grade"),
    "signs": open_task({"kind": "multilabel", "labels": ["x", "y"], "head": {"hidden": 8}}, "signs"),
}


def sum_by_opacus(heads: Mapping[str, nn.Module], units: Units, tasks: Mapping[str, Task] = DEEP) -> list[Tensor]:
    """The integer totals of one step through Opacus' hooks."""
    module = hook_record_gradients(heads)
    plan = Plan(1.0, 1, 0.5, 3.0, Unit.EXAMPLE)
    seen: list[Tensor] = []

    class Reading(StreamOptimizer):
        def add_noise(self) -> None:
            seen.extend(total.clone() for total in self._totals)
            StreamOptimizer.add_noise(self)

    sgd = torch.optim.SGD(module.parameters(), lr=0.0)
    optimizer = Reading(sgd, plan=plan, divisors=[1.0] * len(list(module.parameters())), stream=NoiseStream(bytes(32)))
    usable = replace(units, tasks={name: records.labelled() for name, records in units.tasks.items()})
    release_step(optimizer, heads, tasks, usable, torch.arange(units.num_units))
    return seen


@pytest.mark.parametrize("count", [0, 1, 7, 255, 256])
def test_through_opacus_one_unit_more_adds_its_own_part_too(count: int) -> None:
    """A search over places, numbers and neighbours of absurd size; what it cannot prove, docs call assumed."""
    people = [Person(seed, records=1 + seed % 2, scale=[1.0, 1e4, 1e-6][seed % 3]) for seed in range(count)]
    for more in (Person(99_999), Person(77_777, records=200)):
        own = sum_by_opacus(draw_heads(DEEP, 0.5), site([more], DEEP))
        assert sum(int(value) ** 2 for total in own for value in total.flatten().tolist()) <= int(LATTICE.bound**2)
        without = sum_by_opacus(draw_heads(DEEP, 0.5), site(people, DEEP))
        for place in {count // 3, count}:
            with_it = sum_by_opacus(draw_heads(DEEP, 0.5), site([*people[:place], more, *people[place:]], DEEP))
            for total, rest, part in zip(with_it, without, own, strict=True):
                assert torch.equal(total - rest, part)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e18])
def test_through_opacus_a_centre_that_is_a_units_own_direction_changes_no_other_unit(scale: float) -> None:
    head = {"hidden": 16, "centre": True, "prior": True}
    tasks = {"grade": open_task({"kind": "classification", "labels": ["a", "b", "c"], "head": head}, "grade")}
    people = [Person(seed, records=1 + seed % 2, scale=[1.0, 1e4, 1e-6][seed % 3]) for seed in range(70)]
    more = Person(99_999, scale=scale)
    own_site = site([more], tasks)

    def add(units: Units) -> list[Tensor]:
        heads = draw_heads(tasks, 0.5)
        fix_numbers(heads, normalize_rows(own_site.tasks["grade"].features_RD)[0], 30.0)
        return sum_by_opacus(heads, units, tasks)

    own, without = add(own_site), add(site(people, tasks))
    assert sum(int(value) ** 2 for total in own for value in total.flatten().tolist()) <= int(LATTICE.bound**2)
    for place in (0, 23, 70):
        with_it = add(site([*people[:place], more, *people[place:]], tasks))
        for total, rest, part in zip(with_it, without, own, strict=True):
            assert torch.equal(total - rest, part)


@pytest.mark.parametrize("count", [0, 5, 40])
def test_through_convolutions_a_picture_adds_its_own_part_whatever_is_on_others(count: int) -> None:
    settings = {"kind": "segmentation", "labels": ["ground", "cell"], "side": 8, "head": {"hidden": 6, "kernel": 3}}
    tasks = {"cells": open_task(settings, "cells")}
    generator = torch.Generator().manual_seed(4)
    pictures = torch.randn(count + 1, 8, 8, FEATURES, generator=generator)
    pictures[1::3] *= 1e6
    masks = torch.randint(0, 2, (count + 1, 8, 8), generator=generator).to(torch.uint8)
    masks[2::3] = 255

    def add_up(rows: list[int]) -> list[Tensor]:
        own = TaskRecords.of(
            pictures[rows], masks[rows], torch.ones(len(rows), dtype=torch.bool), torch.arange(len(rows)), len(rows)
        )
        return sum_by_opacus(draw_heads(tasks, 0.5), Units(len(rows), {"cells": own}), tasks)

    rest, own = list(range(1, count + 1)), add_up([0])
    assert 0 < sum(int(value) ** 2 for total in own for value in total.flatten().tolist()) <= int(LATTICE.bound**2)
    for place in {0, count // 2, count}:
        for total, without, part in zip(add_up([*rest[:place], 0, *rest[place:]]), add_up(rest), own, strict=True):
            assert torch.equal(total - without, part)


def test_a_clip_factor_over_many_parameters_is_the_same_at_every_place() -> None:
    """Squares of parameters' norms that torch sums over an axis round differently in a vector and behind the last."""
    parameters = [nn.Parameter(torch.zeros(5)) for _ in range(9)]
    plan = Plan(1.0, 1, 0.5, 3.0, Unit.EXAMPLE)
    sgd = torch.optim.SGD(parameters, lr=0.0)
    optimizer = StreamOptimizer(sgd, plan=plan, divisors=[1.0] * 9, stream=NoiseStream(bytes(32)))
    generator = torch.Generator().manual_seed(1)
    own = torch.randn(1000, 9, 5, generator=generator) * 10.0 ** torch.arange(-2, 7)[:, None].remainder(3)

    def total(units: Tensor) -> Tensor:
        optimizer.reset_totals()
        for index, parameter in enumerate(parameters):
            parameter.grad_sample = units[:, index]  # type: ignore[attr-defined]  # As Opacus stores it.
        optimizer.clip_and_accumulate()
        return torch.stack(optimizer._totals)

    alone = torch.stack([total(unit[None]) for unit in own])
    for count in (1, 7, 64, 1000):
        assert torch.equal(total(own[:count]), alone[:count].sum(dim=0))


def test_blocks_have_one_shape_and_hold_every_unit_once() -> None:
    people = [Person(seed, records=[1, 2, 5, 0, 40][seed % 5]) for seed in range(60)]
    units = site(people, DEEP)
    seen = []
    for block in split_fixed_blocks(units, 16):
        sizes = {len(records.unit_R) for records in block.tasks.values()}
        assert len(sizes) == 1 and sizes.pop() % 16 == 0
        for records in block.tasks.values():
            added = records.unit_R == block.num_units - 1
            assert not records.weight_R[added].any() and bool((records.weight_R[~added] > 0).all())
        seen.append(block.tasks["grade"].features_RD[block.tasks["grade"].unit_R < block.num_units - 1])
    whole = units.tasks["grade"].features_RD
    assert torch.equal(torch.cat(seen).sort(dim=0).values, whole.sort(dim=0).values)


@pytest.mark.slow
def test_masks_are_looked_at_few_at_once_and_none_changes_anothers_part() -> None:
    """Of places too: whatever a picture or its mask is, and however many labels its mask has."""
    task = open_task({"kind": "segmentation", "labels": ["ground", "cell"], "side": 256}, "cells")
    generator = torch.Generator().manual_seed(2)
    features_RGGD = torch.randn(70, 2, 2, 3, generator=generator)
    features_RGGD[0], features_RGGD[1], features_RGGD[2] = 1e18, 0.0, 1e-30
    labels = torch.randint(0, 2, (70, 256, 256), generator=generator).to(torch.uint8)
    labels[3], labels[4, 0] = 255, 255
    head, seen = task.head(3), list[int]()
    weights = [round_weights(20.0 * head.weight.detach()), head.bias.detach().double()]

    def note(outputs: Tensor, masks: Tensor) -> Tensor:
        seen.append(masks.numel())
        return task.loss_gradient(outputs, masks)  # type: ignore[attr-defined]

    def add_up(first: int, last: int) -> Tensor:
        count = last - first
        own = torch.arange(count)
        records = TaskRecords.of(
            features_RGGD[first:last], labels[first:last], torch.ones(count, dtype=torch.bool), own, count
        )
        inputs = {"cells": Inputs.from_records(head, records, count)}
        totals = {"cells": [torch.zeros(each.shape, dtype=torch.int64) for each in weights]}
        for block in split_blocks(inputs, count, {"cells": 2}):
            add_clipped_parts(block, {"cells": weights}, {"cells": note}, LATTICE, totals)
        return torch.cat([total.flatten() for total in totals["cells"]])

    whole = add_up(0, 70)
    assert max(seen) <= 2**21
    parts = [add_up(at, at + 1) for at in range(70)]
    assert torch.equal(torch.stack(parts).sum(0), whole)
    assert all(part.double().norm() <= LATTICE.bound * (1.0 + 2.0**-40) for part in parts)


@pytest.mark.parametrize("round_", [1, 2])
def test_an_utterance_adds_its_own_part_whatever_is_said_in_others(round_: int) -> None:
    """Alignments of a block are summed together: none may change a bit of another's."""
    settings = {"kind": "ctc", "symbols": ["yes", "no"], "unit": "words", "max_symbols": 3}
    task = select_round({"said": open_task(settings, "said")}, round_, 2)["said"]
    assert isinstance(task, PlacesLabels)
    generator = torch.Generator().manual_seed(2)
    count, places = 70, 9
    features_RPD = torch.randn(count, places, 4, generator=generator)
    features_RPD[0], features_RPD[1], features_RPD[2] = 1e18, 1e-30, 0.0
    labels = []
    for row in range(count):
        length = 5 + row % 5
        features_RPD[row, length:] = 0.0
        marks_P = torch.where(torch.rand(places, generator=generator) < 0.5, QUIET, SPEECH)
        marks_P[length:] = 0.0
        said = " ".join(["no", "yes", "no"][: row % 4])
        labels.append(task.place_label(task.codec.encode([said]), marks_P))
    head = task.head(4)
    weights = [round_weights(torch.randn(head.weight.shape, generator=generator))]

    def add_up(first: int, last: int) -> Tensor:
        own = torch.arange(last - first)
        mask_R = torch.ones(len(own), dtype=torch.bool)
        records = TaskRecords.of(features_RPD[first:last], torch.stack(labels[first:last]), mask_R, own, len(own))
        inputs = {"said": Inputs.from_records(head, records, len(own))}
        total = torch.zeros(head.weight.shape, dtype=torch.int64)
        gradients = {"said": get_output_gradient(task)}
        for block in split_blocks(inputs, len(own), {"said": 3}):
            add_clipped_parts(block, {"said": weights}, gradients, LATTICE, {"said": [total]})
        return total

    parts = [add_up(at, at + 1) for at in range(count)]
    assert torch.equal(torch.stack(parts).sum(0), add_up(0, count))
    assert torch.equal(torch.stack(parts[:69]).sum(0), add_up(0, 69))
    assert all(part.double().norm() <= LATTICE.bound * (1.0 + 2.0**-40) for part in parts)
    # Against one utterance at a time, by autograd through the head itself, as far as truncation lets them agree.
    with torch.no_grad():
        head.weight.copy_(weights[0])
    for at in range(3, count):
        gradient = torch.autograd.grad(
            task.losses(head(features_RPD[at : at + 1]), labels[at][None]).sum(), head.weight
        )[0]
        expected = gradient * min(1.0, 0.5 / float(gradient.norm()))
        torch.testing.assert_close((parts[at] * LATTICE.spacing).float(), expected, rtol=1e-3, atol=1e-4)


def test_two_texts_of_a_patient_are_clipped_together_and_no_text_moves_another() -> None:
    opened = open_task({"kind": "seq2seq", "max_tokens": 8}, "said")
    assert isinstance(opened, Seq2seq)
    language = TinyLanguage()
    task, generator, count = opened.open_on(language), torch.Generator().manual_seed(3), 66
    features_RPD = torch.randn(count, 10, 7, generator=generator)
    texts = [" ".join(language.words[(row + at) % 8] for at in range(1 + row % 7)) for row in range(count)]
    labels = torch.stack([task.codec.encode([text]) for text in texts])
    head = task.head(7)
    weights = [round_weights(torch.randn(head.weight.shape, generator=generator))]

    def add_up(features_RPD: Tensor, labels: Tensor) -> Tensor:
        unit_R = torch.arange(len(labels)) // 2
        mask_R = torch.ones(len(labels), dtype=torch.bool)
        num_units = len(labels) // 2
        records = TaskRecords.of(features_RPD, labels, mask_R, unit_R, num_units)
        inputs = {"said": Inputs.from_records(head, records, num_units)}
        total = torch.zeros(head.weight.shape, dtype=torch.int64)
        gradients = {"said": get_output_gradient(task)}
        for block in split_blocks(inputs, num_units, {"said": 6}):
            add_clipped_parts(block, {"said": weights}, gradients, LATTICE, {"said": [total]})
        return total

    parts = [add_up(features_RPD[at : at + 2], labels[at : at + 2]) for at in range(0, count, 2)]
    assert torch.equal(torch.stack(parts).sum(0), add_up(features_RPD, labels))
    clipped = 0
    for unit, part in enumerate(parts):
        summed = torch.zeros(head.weight.shape)
        for row in (2 * unit, 2 * unit + 1):
            weight = weights[0].float().requires_grad_()
            loss = task.losses((features_RPD[row] @ weight.T)[None], labels[row : row + 1])[0]
            summed += torch.autograd.grad(loss, weight)[0] / 2
        norm = float(summed.norm())
        clipped += norm > 0.5
        torch.testing.assert_close(
            (part * LATTICE.spacing).float(), summed * min(1.0, 0.5 / norm), rtol=1e-3, atol=1e-4
        )
    assert clipped > 0
