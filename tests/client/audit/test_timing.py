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
from common.privacy.noise import NoiseStream
from common.process.threads import steady_time
from tests.client.audit import bugs
from tests.client.audit.bugs import break_solver, make_run

ANOMALY = {"strange": {"kind": "anomaly", "normal": "n", "anomalous": "a"}}


def measure(run: AuditedRun, seed: int = 0) -> tuple[list[str], list[str]]:
    audited = Audited(run.solver, run.plan, run.tasks, run.trunks, run.public_sizes)
    with steady_time():
        found = measure_times(audited, NoiseStream(bytes([seed]) * 32))
    return list(judge_times(found, gross=False)), list(judge_times(found, gross=True))


def make(**changes: Any) -> AuditedRun:
    return make_run(**{"tasks": ANOMALY, "kind": "dp_gd", **changes})


@pytest.mark.slow
def test_an_early_exit_is_gross() -> None:
    assert any("values are huge and clipped" in each for each in measure(break_solver(make(), bugs.ReturnsEarly))[1])


def test_work_for_one_unit_in_most_pairs_is_a_warning_and_a_coin_is_none() -> None:
    """Ratios as they would be measured: no test here depends on how busy the machine is."""
    slower, coin = [1.3] * timing.NEEDED + [0.9] * 10, [1.3, 0.77] * (timing.MOST_PAIRS // 2)
    found = {"huge and clipped": [slower], "zero": [coin], "denormal": [[1.04] * timing.MOST_PAIRS]}
    [sentence] = judge_times(found, gross=False)
    assert sentence.startswith("a unit whose values are huge and clipped makes a charge take 1.3 times")
    assert list(judge_times(found, gross=True)) == []


def test_a_warning_is_a_row_of_the_table_of_an_audit_that_passed() -> None:
    verdict = audit(replace(make(), num_canaries=50))
    verdict = verdict.model_copy(update={"warnings": ("one unit makes a charge take longer",)})
    assert "warning" in [str(cell) for cell in make_audit_table(verdict).columns[0].cells]


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
