"""Two sites that differ by one hostile unit: everything they send is equal but the noised sums, and these differ by
that unit's part alone.

The noise of both is the same, so that sums differ by what units contribute. A unit's part is the same whatever other
records a site has: it is compared at two sites, of other records each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.worlds import MEDIA, TASKS, Experiment, Replies, Row, honest_rows

pytestmark = pytest.mark.usefixtures("two_threads")

Sums = Mapping[str, np.ndarray[Any, Any]]
LARGEST = {"moments": 1.0, "update": 1.0, "statistics": len(TASKS) ** 0.5}
SIDES = {"moments": "train", "update": "train", "statistics": "test"}
CELLS = {"age": "50", "days": "150", "died": "1", "finding": "edema", "signs": "fever", "voice": "ann"}
FEW, MANY = 6, 9
"""Patients of the two sites beside whose records a hostile unit stands."""


def hostile_units(medium: str, unit: str) -> dict[str, list[Row]]:
    """Returns units by what is wrong with them, each as its records; the first ones are those of the quick tests."""
    own = MEDIA[medium]
    train = Row("pX", "train", CELLS, own.content(np.random.default_rng(99)))
    test = replace(train, split="test")
    others = {count: honest_rows(own.content, count) for count in (FEW, MANY)}
    held_out = {count: [row for row in rows if row.split == "test"] for count, rows in others.items()}
    odd, none = dict.fromkeys(CELLS, "zzz"), dict.fromkeys(CELLS, "")
    units = {f"content: {name}": [replace(train, content=bad)] for name, bad in own.hostile.items()}
    units["good"] = [train]
    units["good, held out"] = [test]
    units["odd labels"] = [replace(train, cells=odd)]
    units["a copy of another's held-out record"] = [replace(train, content=held_out[FEW][0].content)]
    if own.splits:
        units["another split"] = [replace(train, split="validation")]
    if unit == "patient":
        units["both sides"] = [train, test]
        units["many records"] = [train] * 40
    if medium == "manifest":
        units["lists another's file"] = [replace(train, content=held_out[FEW][0].content, file=held_out[FEW][0].file)]
    units |= {f"content, held out: {name}": [replace(test, content=bad)] for name, bad in own.hostile.items()}
    units["a copy of one of many"] = [replace(train, content=held_out[MANY][0].content)]
    units["odd labels, held out"] = [replace(test, cells=odd)]
    units["no labels"] = [replace(train, cells=none)]
    units["an infinite age"] = [replace(train, cells={**CELLS, "age": "1e999"})]
    units["a negative time"] = [replace(train, cells={**CELLS, "days": "-1"})]
    units["a time without an event"] = [replace(train, cells={**CELLS, "died": ""})]
    units["a time that says nothing"] = [replace(train, cells={**CELLS, "days": "0", "died": "0"})]
    units["an age that is no number"] = [replace(train, cells={**CELLS, "age": "nan"})]
    units["blank patient"] = [replace(train, patient="")]
    units["odd patient"] = [replace(train, patient="\u202e\u0301 x" * 20)]
    if own.splits:
        units["no split"] = [replace(train, split="")]
    if unit == "patient":
        units["contradictory"] = [train, replace(train, cells={**CELLS, "finding": "none", "age": "1"})]
        units["good and bad"] = [train, *(replace(train, content=bad) for bad in own.hostile.values())]
        units["copies of all held-out records"] = [replace(train, content=row.content) for row in held_out[FEW]]
        if medium == "manifest":
            units["lists all files"] = [replace(train, content=row.content, file=row.file) for row in others[FEW]]
    return units


def compute_part(before: Replies, after: Replies, hostile: Sequence[Row]) -> Sums:
    """Returns by how much the sums differ; everything else is the same, and so is the side on which the unit is not."""
    assert before.plain == after.plain
    part = {name: getattr(after, name) - getattr(before, name) for name in LARGEST}
    for name, largest in LARGEST.items():
        # Sums travel as float32.
        assert np.linalg.norm(part[name]) <= largest * (1.0 + 1e-5)
        if not any(row.split in (SIDES[name], "") for row in hostile):
            assert not part[name].any()
    return part


@pytest.mark.parametrize(
    "medium", [pytest.param(name, marks=() if name in ("table", "text") else pytest.mark.slow) for name in MEDIA]
)
def test_one_hostile_patient_moves_nothing_but_the_noised_sums(tmp_path: Path, medium: str) -> None:
    experiment = Experiment.of(tmp_path, medium, "patient")
    others = honest_rows(experiment.medium.content, FEW)
    before = experiment.answers("before", others)
    units = hostile_units(medium, "patient")
    for name in list(units)[: list(units).index(f"content, held out: {next(iter(experiment.medium.hostile))}")]:
        part = compute_part(before, experiment.answers(name, [*units[name], *others]), units[name])
        assert name != "good" or (part["update"].any() and part["moments"].any())
        assert name != "good, held out" or part["statistics"].any()


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["example", "patient"])
@pytest.mark.parametrize("medium", MEDIA)
def test_a_hostile_unit_has_the_same_part_beside_whatever_records_it_stands(
    tmp_path: Path, medium: str, unit: str
) -> None:
    experiment = Experiment.of(tmp_path, medium, unit)
    few, many = (honest_rows(experiment.medium.content, count) for count in (FEW, MANY))
    before_few, before_many = experiment.answers("few", few), experiment.answers("many", many)
    for name, hostile in hostile_units(medium, unit).items():
        first = compute_part(before_few, experiment.answers(f"{name}, few", [*hostile, *few]), hostile)
        last = compute_part(before_many, experiment.answers(f"{name}, many", [*many, *hostile]), hostile)
        for what in LARGEST:
            np.testing.assert_allclose(first[what], last[what], atol=2e-5, err_msg=f"{name}: {what}")
