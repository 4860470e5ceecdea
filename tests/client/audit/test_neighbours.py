"""Two worlds that differ by one unit: the real solvers pass, and whatever lets a unit move others' parts is named."""

from __future__ import annotations

from typing import Any

import pytest

from client.audit.attack import AuditedRun
from client.audit.neighbours import TRIES, Audited, compare_worlds, describe_worlds, judge_worlds
from client.solvers.parts import closed_form, compiled_step, private_step
from common.privacy.noise import NoiseStream
from common.process.threads import one_thread
from common.types import Unit
from tests.client.audit import bugs
from tests.client.audit.bugs import EVERY_KIND, LINEAR, break_solver, make_run, make_trunk_run

pytestmark = pytest.mark.usefixtures("two_threads")

ANOMALY = {"strange": {"kind": "anomaly", "normal": "n", "anomalous": "a"}}


def find_problems(run: AuditedRun, seed: int = 0) -> str:
    audited = Audited(run.solver, run.plan, run.tasks, run.trunks, run.public_sizes)
    with one_thread():
        comparisons = list(compare_worlds(audited, NoiseStream(bytes([seed]) * 32)))
    assert len(comparisons) == TRIES
    assert f"({TRIES} were answered)" in describe_worlds(run.plan, comparisons)
    return "; ".join(judge_worlds(run.plan, comparisons))


def make(unit: Unit = Unit.PATIENT, **changes: Any) -> AuditedRun:
    return make_run(**{"tasks": {**LINEAR, **ANOMALY}, "unit": unit, "kind": "dp_gd", **changes})


@pytest.mark.parametrize("unit", list(Unit))
@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"sampling_rate": 0.1}, marks=pytest.mark.slow),
        pytest.param({"clip_norm": 40.0, "weight_decay": 0.1}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_closed_form_adds_each_unit_s_own_part_and_nothing_else(unit: Unit, settings: dict[str, Any]) -> None:
    assert find_problems(make(unit, **settings)) == ""


@pytest.mark.parametrize("unit", [Unit.EXAMPLE, pytest.param(Unit.PATIENT, marks=pytest.mark.slow)])
def test_through_opacus_each_unit_adds_its_own_part_and_nothing_else(unit: Unit) -> None:
    assert find_problems(make_run(tasks={**EVERY_KIND, **ANOMALY}, unit=unit)) == ""
    assert find_problems(make_trunk_run(("loop",), tasks=EVERY_KIND, unit=unit)) == ""


def test_a_clip_that_forgets_a_task_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_step, "open_library", lambda: None)
    monkeypatch.setattr(compiled_step, "add_clipped_parts", bugs.forget_a_task_when_clipping)
    assert "times the clip norm" in find_problems(make())
    assert "times the clip norm" in find_problems(break_solver(make(), bugs.TaskByTask))


@pytest.mark.parametrize("tasks", [ANOMALY, LINEAR], ids=["anomaly", "several"])
def test_outputs_whose_last_bits_depend_on_other_records_are_named(
    tasks: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_step, "open_library", lambda: None)
    monkeypatch.setattr(closed_form, "compute_outputs", bugs.compute_outputs_in_float32)
    for seed in range(2):
        assert "more than its own part" in find_problems(make(Unit.EXAMPLE, tasks=tasks), seed)


def test_parts_that_are_rounded_together_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_step, "StreamOptimizer", bugs.RoundsTheWholeSum)
    assert "more than its own part" in find_problems(make_run())


def test_a_part_that_depends_on_the_neighbours_is_named() -> None:
    assert "more than its own part" in find_problems(break_solver(make(), bugs.OtherUnits))


def test_records_of_a_patient_that_are_clipped_one_by_one_are_named() -> None:
    assert "times the clip norm" in find_problems(break_solver(make(), bugs.RecordByRecord))


def test_a_reply_that_tells_more_than_its_sum_is_named() -> None:
    assert "differs in more than its noised sum" in find_problems(break_solver(make(), bugs.TellsTheCount))


def test_an_answer_that_fails_for_one_record_is_named() -> None:
    run = break_solver(make(), bugs.StopsAtAbsurdRecords)
    audited = Audited(run.solver, run.plan, run.tasks, run.trunks, run.public_sizes)
    found = list(judge_worlds(run.plan, list(compare_worlds(audited, NoiseStream(bytes(32))))))
    assert any("whether a request is answered depends on one unit" in sentence for sentence in found)
