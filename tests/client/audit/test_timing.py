"""The time of a charge: real solvers are not reported, and work that one unit's values decide is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from scipy.stats import binom

from client.audit import timing
from client.audit.attack import AuditedRun
from client.audit.audit import audit, make_audit_table
from client.audit.neighbours import Audited
from client.audit.timing import judge_times, measure_times
from common.privacy.lattice import Lattice
from common.privacy.noise import NoiseStream
from common.process.threads import steady_time
from common.types import Unit
from tests.client.audit import bugs
from tests.client.audit.bugs import EVERY_KIND, LINEAR, break_solver, make_run, make_trunk_run

ANOMALY = {"strange": {"kind": "anomaly", "normal": "n", "anomalous": "a"}}
REPETITIONS = 20


def measure(run: AuditedRun, seed: int = 0) -> tuple[list[str], list[str]]:
    audited = Audited(run.solver, run.plan, run.tasks, run.trunks, run.public_sizes)
    with steady_time():
        found = measure_times(audited, NoiseStream(bytes([seed]) * 32))
    return list(judge_times(found, gross=False)), list(judge_times(found, gross=True))


def make(**changes: Any) -> AuditedRun:
    return make_run(**{"tasks": ANOMALY, "kind": "dp_gd", **changes})


@pytest.mark.parametrize(
    "run",
    [
        make(tasks={**LINEAR, **ANOMALY}, unit=Unit.PATIENT),
        make(tasks=LINEAR, sampling_rate=0.25),
        make_run(tasks={**EVERY_KIND, **ANOMALY}, unit=Unit.PATIENT),
        make_trunk_run(("loop",), tasks=EVERY_KIND),
    ],
    ids=["dp_gd", "sampled", "dp_sgd", "trunk"],
)
def test_real_solvers_are_not_reported(run: AuditedRun) -> None:
    for seed in range(REPETITIONS // 4):
        assert measure(run, seed) == ([], [])


def test_ten_products_more_for_a_clipped_unit_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lattice, "compute_factors", bugs.multiply_for_each_clipped_unit(10))
    warnings, failures = measure(make())
    assert any("values are huge and clipped makes a charge take 1." in sentence for sentence in warnings)
    assert failures == []


def test_an_early_exit_is_gross() -> None:
    assert any("values are huge and clipped" in each for each in measure(break_solver(make(), bugs.ReturnsEarly))[1])


def test_the_audit_shows_a_warning_and_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    run = replace(make(), num_canaries=50)
    with monkeypatch.context() as patch:
        patch.setattr(Lattice, "compute_factors", bugs.multiply_for_each_clipped_unit(10))
        warned = audit(run)
    assert warned.passed and warned.warnings
    assert "warning" in [str(cell) for cell in make_audit_table(warned).columns[0].cells]
    assert any("timed in random order" in sentence for sentence in warned.tried)
    assert any("makes a charge take" in reason for reason in audit(break_solver(run, bugs.ReturnsEarly)).reasons)


def test_all_sign_tests_together_keep_the_stated_rate() -> None:
    alarm = 2 * len(timing.VALUES) * float(binom.sf(timing.NEEDED - 1, timing.MOST_PAIRS, 0.5))
    assert 0.1 * timing.ALARM < alarm <= timing.ALARM


@pytest.mark.parametrize(
    ("medians", "gross"), [([3.0, 3.0], True), ([0.3, 0.3], True), ([3.0, 1.5], False), ([3.0, 0.3], False)]
)
def test_only_two_repetitions_that_agree_refute_the_claim(medians: list[float], gross: bool) -> None:
    found = {"clipped": [[ratio] * timing.NEEDED for ratio in medians]}
    assert len(list(judge_times(found, gross=True))) == gross
    assert len(list(judge_times(found, gross=False))) == (not gross)
