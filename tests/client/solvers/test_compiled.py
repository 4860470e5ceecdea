"""What is compiled returns what torch's operations return, bit by bit: features, sums, releases and noise.

The laws of exact sums (test_exact_sums.py) are tested with whichever of the two runs.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from benchmarks.dense import PerPixel
from client.data.quantised import QuantisedRows
from client.data.units import TaskRecords, Units
from client.solvers import open_solver
from common.privacy import rounded_gaussian
from common.privacy.compiled import SWITCH, open_library
from common.privacy.noise import NoiseStream
from common.tasks import Task, open_task
from common.tasks.detection import Detection
from common.types import Plan, Unit
from tests.client.solvers.test_exact_sums import PEOPLE, TASKS, Person, draw_heads, site

pytestmark = [
    pytest.mark.skipif(
        open_library() is None, reason="the compiled code is missing: pip install --editable . builds it"
    ),
    pytest.mark.usefixtures("two_threads"),
]


@contextmanager
def without_library() -> Iterator[None]:
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "0"
    open_library.cache_clear()
    try:
        assert open_library() is None
        yield
    finally:
        os.environ.pop(SWITCH) if before is None else os.environ.update({SWITCH: before})
        open_library.cache_clear()


def assert_same_round(
    tasks: Mapping[str, Task], units: Units, heads: Mapping[str, nn.Module], rate: float = 1.0
) -> None:
    solver = open_solver(
        {"kind": "dp_gd", "sampling_rate": rate, "steps": 3, "clip_norm": 0.5, "learning_rate": 0.5, "momentum": 0.5},
        "solver",
    )
    plan = Plan(rate, 3, 0.5, 3.0, Unit.EXAMPLE)

    def train() -> dict[str, dict[str, object]]:
        sizes = dict.fromkeys(tasks, units.num_units + 1)
        stream = NoiseStream(bytes(32))
        delta = solver.solve(heads, tasks, units, plan=plan, public_sizes=sizes, stream=stream)
        return {name: dict(delta.heads[name]) for name in tasks}

    compiled = train()
    with without_library():
        plain = train()
    for name in tasks:
        for key, value in plain[name].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(compiled[name][key]))


@settings(max_examples=40, deadline=None)
@given(
    people=st.lists(PEOPLE, max_size=70),
    names=st.sets(st.sampled_from(sorted(TASKS)), min_size=1),
    features=st.integers(1, 70),
    scale=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    rate=st.sampled_from([1.0, 0.4]),
    hostile=st.lists(st.sampled_from([float("nan"), float("inf"), -float("inf"), 3e38, 1e-44, 0.0]), max_size=5),
)
def test_a_round_is_the_same_with_and_without_it(
    people: list[Person], names: set[str], features: int, scale: float, rate: float, hostile: list[float]
) -> None:
    tasks = {name: TASKS[name] for name in sorted(names)}
    units = site(people, tasks, features)
    for place, value in enumerate(hostile):  # Tasks share their features.
        rows_RD = next(iter(units.tasks.values())).features_RD
        if len(rows_RD):
            rows_RD[(place * 7) % len(rows_RD), (place * 3) % features] = value
    heads = draw_heads(tasks, scale, features)
    assert_same_round(tasks, units, heads, rate)


PLACES = {
    "cells": open_task({"kind": "segmentation", "labels": ["ground", "cell", "wall"], "side": 8}, "cells"),
    "boxes": open_task(dict(Detection.example().settings), "boxes"),
    "per_pixel": PerPixel(classes=3),
}

BOXES = torch.stack([PLACES["boxes"].codec.encode(cells) for cells in Detection.example().cells])


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.sampled_from([1, 1, 1, 2, 5]), max_size=9),
    names=st.sets(st.sampled_from(sorted(PLACES)), min_size=1),
    sides=st.sampled_from([(1, 1), (4, 4), (8, 8)]),
    features=st.integers(1, 30),
    whole=st.booleans(),
    hostile=st.lists(st.sampled_from([float("nan"), float("inf"), 3e38, 1e-44, 0.0]), max_size=4),
)
def test_heads_of_places_are_trained_alike(
    counts: list[int], names: set[str], sides: tuple[int, int], features: int, whole: bool, hostile: list[float]
) -> None:
    """Alone and beside a head of whole records, with patients of several pictures and pictures without labels."""
    generator = torch.Generator().manual_seed(features)
    unit_R = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.long))
    records = len(unit_R)
    maps = torch.randn(records, *sides, features, generator=generator)
    for place, value in enumerate(hostile[:records]):
        maps[place * 5 % records, 0, 0, place % features] = value
    tasks: dict[str, Task] = {name: PLACES[name] for name in sorted(names)} | (
        {"grade": TASKS["grade"]} if whole else {}
    )
    made = {}
    for name in tasks:
        labels = {
            "cells": lambda: torch.tensor([0, 1, 2, 255]).to(torch.uint8)[
                torch.randint(0, 4, (records, 8, 8), generator=generator)
            ],
            "per_pixel": lambda: torch.randint(0, 3, (records, *sides), generator=generator),
            "boxes": lambda: BOXES[torch.randint(0, len(BOXES), (records,), generator=generator)],
            "grade": lambda: torch.randint(0, 3, (records,), generator=generator),
        }[name]()
        own = maps.mean(dim=(1, 2)) if name == "grade" else maps.movedim(-1, 1) if name == "per_pixel" else maps
        mask_R = torch.rand(records, generator=generator) > 0.2
        made[name] = TaskRecords.of(own, labels, mask_R, unit_R, len(counts))
    assert_same_round(tasks, Units(len(counts), made), draw_heads(tasks, 0.5, features))


@pytest.fixture(params=[0, 1, 2])
def code(request: pytest.FixtureRequest) -> Iterator[ctypes.CDLL]:
    """The compiled code with vectors of 128, 256 and 512 bits, where the processor has them."""
    library = open_library()
    assert library is not None
    if request.param > library.code.limit_width(request.param):
        pytest.skip("this processor's family has one width of vectors")
    yield library.code
    library.code.limit_width(2)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(1, 13)),
    many=st.sampled_from([0, 0, 0, 600]),
    seed=st.integers(0, 1000),
    length=st.sampled_from([2.0**-24, 0.1, 1.0, 50.0, 2.0**14]),
    several=st.booleans(),
)
def test_products_of_digits_are_those_of_whole_numbers(
    code: ctypes.CDLL, shape: tuple[int, int, int], many: int, seed: int, length: float, several: bool
) -> None:
    (R, D, K), generator = shape, np.random.default_rng(seed)
    R += many
    rows = generator.normal(size=(R, D)) * 10.0 ** generator.uniform(-3, 0, size=(R, D))
    integers = np.trunc(rows / np.linalg.norm(rows, axis=1, keepdims=True) * 32767.0).astype(np.int16)
    weights = generator.normal(size=(K, D))
    whole = np.trunc(weights / np.linalg.norm(weights, axis=1, keepdims=True) * length * 2.0**24)
    assert_exact(
        code, integers, whole, np.trunc(generator.uniform(-1, 1, (R, K)) * 2.0 ** (32 if several else 28)), several
    )


@pytest.mark.parametrize("several", [False, True])
def test_digits_and_rows_as_large_as_they_can_be_stay_in_32_bits(code: ctypes.CDLL, several: bool) -> None:
    """Every digit half a unit of the next, every row along one feature; rows and weights that are alike everywhere."""
    bits = 12 if several else 10
    half = 2.0 ** (bits - 1) * (1.0 + 2.0**bits + 2.0 ** (2 * bits - 1))
    for sign in (1, -1):
        one = np.zeros((300, 40), np.int16)
        one[:, 3] = one[::2, 37] = sign * 32767
        parts = np.tile([half, -half, 2.0 ** (bits - 1), sign * 2.0 ** (3 * bits - 2)], (300, 1))
        along = np.zeros((4, 40))
        along[:, 3] = np.array([1.0, -1.0, 32000.5 / 2.0**24, 2.0**14]) * 2.0**24 // 1.0
        assert_exact(code, one, along, parts, several)
        for features in (64, 1024):
            alike = np.full((5, features), sign * 32767 // features**0.5, np.int16)
            digits = np.repeat(2.0 ** np.arange(5, 15), features).reshape(10, features)
            assert_exact(code, alike, digits, np.full((5, 10), half), several)


def assert_exact(
    code: ctypes.CDLL, integers: NDArray[np.int16], whole: NDArray[np.double], parts: NDArray[np.double], several: bool
) -> None:
    """Compares both products with NumPy's of 64-bit integers."""
    (R, D), K = integers.shape, len(whole)
    weights, outputs, total = np.ldexp(whole, -24), np.empty((R, K)), np.ones((K, D))
    assert code.multiply_exactly(integers.ctypes.data, R, D, weights.ctypes.data, K, outputs.ctypes.data)
    assert (np.ldexp(outputs, 24) == integers.astype(np.int64) @ whole.astype(np.int64).T).all()
    assert code.add_exactly(integers.ctypes.data, parts.ctypes.data, R, D, K, several, total.ctypes.data)
    assert (total == 1 + parts.astype(np.int64).T @ integers.astype(np.int64)).all()


@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 40)),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1.0, 1e-38, 1e-44, 1e37]),
    power=st.booleans(),
    hostile=st.lists(st.sampled_from([float("nan"), float("inf"), 3.4e38, 1e-45, 0.0, 1.0]), max_size=4),
)
def test_rows_are_quantised_alike(
    shape: tuple[int, int], seed: int, scale: float, power: bool, hostile: list[float]
) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    values = torch.exp2(torch.frexp(values).exponent.float()) if power else values
    for place, value in enumerate(hostile):
        values[place % len(values)] = value
    compiled = QuantisedRows.of(values)
    with without_library():
        plain = QuantisedRows.of(values)
        norms = plain.bound_norms()
    assert torch.equal(compiled.integers.double(), plain.integers.double())
    for one, other in ((compiled.scale, plain.scale), (compiled.bound_norms(), norms)):
        assert torch.equal(one.nan_to_num(nan=-1.0), other.nan_to_num(nan=-1.0))


@pytest.mark.parametrize("log2_deviation", [20, 33, 42, 48])
@pytest.mark.parametrize("count", [1, 2, 17, 8191, 8193, 200_000])
def test_noise_is_the_same_and_reads_as_much(count: int, log2_deviation: int) -> None:
    """In 200,000 values some need more bits than a value's own: then the Python code decides."""
    stream = NoiseStream(bytes(32))
    compiled, after = stream.rounded_gaussian(count, log2_deviation), stream.uniform(1)
    with without_library():
        stream = NoiseStream(bytes(32))
        assert (stream.rounded_gaussian(count, log2_deviation) == compiled).all() and stream.uniform(1) == after


@pytest.mark.parametrize("lots", ["first", "least that is sure", "two below"])
def test_noise_is_the_same_beside_every_boundary(lots: str) -> None:
    """Uniform numbers one above and one below every boundary and every lookup's first number."""
    library, tables = open_library(), rounded_gaussian._tables()
    assert library is not None
    near = np.concatenate([tables.leading.astype(np.int64), np.arange(1, 4096) << 19])
    uniform = np.setdiff1d(np.concatenate([near - 1, near + 1, near]), tables.leading)
    uniform = uniform[(uniform > 0) & (uniform < 2**31)].astype(np.uint32)
    sure = tables.sure[np.searchsorted(tables.leading, uniform, side="right") - 1].astype(np.uint64)
    lot = {"first": np.full_like(sure, 2**22 - 1), "least that is sure": sure, "two below": sure - np.uint64(2)}[lots]
    count, stream = len(uniform), NoiseStream(bytes(32))
    drawn = stream._draw_words((count + 1) // 2 + 4 * count)
    drawn[: (count + 1) // 2].view(np.uint32)[:count] = uniform << np.uint32(1) | drawn.view(np.uint32)[:count] % 2
    # The upper end of a cell is rejected most often.
    drawn[(count + 1) // 2 :][:count] = np.uint64(2**42 - 1) | lot << np.uint64(42)
    compiled, plain = np.empty(count, np.int64), np.empty(count, np.int64)
    assert library.draw_gaussian(drawn, tables, compiled, 42)
    rounded_gaussian._fill(plain, drawn, stream._draw_words, 42)
    assert (compiled == plain).all()
    drawn.view(np.uint32)[0] = tables.leading[750] << np.uint32(1)
    assert not library.draw_gaussian(drawn, tables, compiled, 42)
