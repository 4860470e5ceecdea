"""Many sites trained at once have the heads that each of them trains by itself, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.solvers import ManySitesSolver, open_solver
from client.solvers.parts.many_sites import ManySites
from client.solvers.parts.many_units import ManyUnits
from client.solvers.parts.site_rows import HEAD, SiteBlock
from common.privacy.compiled import open_library
from common.privacy.noise import NoiseStream
from common.types import Delta, Plan, RunFailed, Unit
from tests.client.solvers.test_exact_sums import PEOPLE, TASKS, Person, draw_heads, site

pytestmark = pytest.mark.skipif(
    open_library() is None, reason="the compiled code is missing: pip install --editable . builds it"
)
CLIP, NOISE = 0.5, 3.0


def divide(people: list[Person], homes: list[int], names: list[str], num_sites: int) -> ManyUnits:
    """The units of one place, of which each belongs to the site that `homes` names."""
    units = site(people, {name: TASKS[name] for name in names})
    return ManyUnits.divide(
        units, [np.array(homes, np.int64)[each.unit_R.numpy()] for each in units.tasks.values()], num_sites
    )


def make_solver(kind: str, rate: float, steps: int, learning_rate: float = 0.5) -> tuple[ManySitesSolver, Plan]:
    settings_ = {"kind": "head_sum", "clip_norm": CLIP}
    if kind == "dp_gd":
        rates = {"grade": {"learning_rate": 2.0, "weight_decay": 0.01}}
        settings_ = {**settings_, "kind": kind, "sampling_rate": rate, "steps": steps, "learning_rate": learning_rate}
        settings_ |= {"momentum": 0.5, "tasks": rates}
    solver = open_solver(settings_, "solver")
    assert isinstance(solver, ManySitesSolver)
    return solver, Plan(rate if kind == "dp_gd" else 1.0, steps if kind == "dp_gd" else 1, CLIP, NOISE, Unit.EXAMPLE)


def assert_same_heads(
    units: ManyUnits, names: list[str], kind: str, *, rate: float = 1.0, steps: int = 3, scale: float = 1.0
) -> int:
    """Compares each site's change with that of `solve`, and returns the number of sites that were trained together."""
    tasks = {name: TASKS[name] for name in names}
    heads, (solver, plan) = draw_heads(tasks, scale), make_solver(kind, rate, steps)
    many = ManySites(heads, tasks, units)
    sizes = [{name: 10 + number for name in names} for number in range(len(units))]
    keys = [number.to_bytes(32, "big") for number in range(len(units))]
    compared = 0
    for block in many.list_blocks(np.flatnonzero(many.fits)):
        trained = solver.solve_each(
            heads,
            tasks,
            many,
            block,
            plan=plan,
            public_sizes=[sizes[number] for number in block],
            streams=[NoiseStream(keys[number]) for number in block],
        )
        changes = many.split(trained.change_SN)
        for place, number in enumerate(block):
            try:
                alone: Delta | None = solver.solve(
                    heads,
                    tasks,
                    units.select_site(int(number)),
                    plan=plan,
                    public_sizes=sizes[number],
                    stream=NoiseStream(keys[number]),
                )
            except RunFailed:
                alone = None
            assert alone is not None or not trained.sound[place]
            if alone is None or not trained.sound[place]:
                continue
            compared += 1
            for name, head in alone.heads.items():
                assert all(np.array_equal(changes[name][key][place], value) for key, value in head.items())
    return compared


@settings(max_examples=25, deadline=None)
@given(
    placed=st.lists(st.tuples(PEOPLE, st.integers(0, 4)), max_size=40),
    names=st.sets(st.sampled_from(sorted(TASKS)), min_size=1),
    kind=st.sampled_from(["dp_gd", "head_sum"]),
    rate=st.sampled_from([1.0, 0.6, 0.1]),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e5]),
)
def test_each_site_has_the_heads_that_it_trains_alone(
    placed: list[tuple[Person, int]], names: set[str], kind: str, rate: float, scale: float
) -> None:
    people, homes = [person for person, _ in placed], [home for _, home in placed]
    assert_same_heads(divide(people, homes, sorted(names), 5), sorted(names), kind, rate=rate, scale=scale)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_sites_of_several_blocks_have_the_heads_that_they_train_alone(rate: float) -> None:
    people = [Person(number, number % 3 + 1) for number in range(6000)]
    units = divide(people, [number % 60 for number in range(6000)], ["grade", "signs"], 60)
    assert assert_same_heads(units, ["grade", "signs"], "dp_gd", rate=rate) == 60


def test_a_site_whose_weights_leave_the_range_of_exact_products_is_left_to_its_own_solver() -> None:
    """Its last step leaves the range too, after which nothing is computed: `solve` returns that change."""
    tasks, units = {"only": TASKS["only"]}, divide([Person(1), Person(2)], [0, 1], ["only"], 2)
    heads = draw_heads(tasks)
    for steps in (1, 2):
        solver, plan = make_solver("dp_gd", 1.0, steps, learning_rate=1e6)
        named = {"plan": plan, "public_sizes": [{"only": 10}] * 2}
        many, streams = ManySites(heads, tasks, units), [NoiseStream(bytes(32)) for _ in range(2)]
        assert not solver.solve_each(heads, tasks, many, np.arange(2), streams=streams, **named).sound.any()
    with pytest.raises(RunFailed, match="diverged"):
        solver.solve(
            heads, tasks, units.select_site(0), plan=plan, public_sizes={"only": 10}, stream=NoiseStream(bytes(32))
        )


def test_a_site_has_the_units_that_it_would_have_opened_by_itself() -> None:
    people, homes = [Person(number, number % 4 + 1) for number in range(12)], [number % 3 for number in range(12)]
    units = divide(people, homes, ["grade", "size"], 3)
    for number in range(3):
        own = site(people[number::3], {name: TASKS[name] for name in ("grade", "size")})
        found = units.select_site(number)
        assert found.num_units == own.num_units
        for name, records in own.tasks.items():
            for field in ("features_RD", "labels", "mask_R", "unit_R", "weight_R"):
                assert torch.equal(getattr(found.tasks[name], field), getattr(records, field)), field


def test_a_patient_with_records_at_two_sites_is_a_unit_of_each() -> None:
    units = site([Person(1, 4), Person(2, 1)], {"grade": TASKS["grade"]})
    divided = ManyUnits.divide(units, [np.array([0, 1, 0, 1, 1])], 2)
    assert [divided.select_site(number).num_units for number in range(2)] == [1, 2]
    assert divided.select_site(0).tasks["grade"].weight_R.tolist() == [0.5, 0.5]


def test_sites_that_do_not_add_up_in_double_precision_are_left_to_their_own_solver() -> None:
    few, many, long_ = [Person(1)] * 20, [Person(2)] * 2049, [Person(3, 40)]
    homes = [0] * 20 + [1] * 2049 + [2]
    units = divide([*few, *many, *long_], homes, ["grade"], 3)
    tasks = {"grade": TASKS["grade"]}
    assert ManySites(draw_heads(tasks), tasks, units).fits.tolist() == [True, False, False]


def test_no_slope_depends_on_how_many_threads_share_a_large_sites_records() -> None:
    """Threads that divided the rows within a vector of the processor would change the last bit of an exponential."""
    heads, count = np.zeros(1, HEAD), 70_000
    heads["R"] = count
    outputs_RK = torch.randn(count + -count % 64, 1, dtype=torch.double, generator=torch.Generator().manual_seed(5)) * 3
    block = SiteBlock(torch.zeros(len(outputs_RK), 1), outputs_RK, heads, np.array([count]), [])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        slopes = block.evaluate_slopes(lambda outputs, labels: torch.sigmoid(outputs) - labels)
    finally:
        torch.set_num_threads(threads)
    alone = torch.cat([torch.sigmoid(part.contiguous()) for part in torch.split(outputs_RK, 64)])[:count]
    assert torch.equal(slopes, alone)
