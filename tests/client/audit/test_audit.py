"""The claim of the privacy audit: an honest solver passes, and every bug below fails with the sentence that names it.

The bugs (`tests/client/audit/bugs.py`) are planted by handing the audit a broken part in place of the real one. Two
bugs of the project's list live outside a solver and have tests of their own: a crash between reserve and commit
(tests/client/ledger/test_crash.py, with a killed process) and a damaged or replaced ledger
(tests/client/ledger/test_chain.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from client.audit.attack import AuditedRun
from client.audit.audit import audit, audit_run, compute_ledger_epsilon
from client.audit.canaries import ADDED, plant
from client.ledger.ledger import Ledger
from client.solvers import open_solver
from common.events import AuditVerdict
from common.plugins import kinds, plugin_class
from common.privacy.accounting import Mechanism, compute_epsilon
from common.privacy.noise import NoiseStream, SeededEntropy
from common.run import Privacy, RunConfig
from common.tasks.parts.adjusted import AdjustedHead, normalize_rows
from common.types import BadInput, Unit
from common.yaml import parse
from tests.client.audit import bugs
from tests.client.audit.bugs import (
    EVERY_KIND,
    LINEAR,
    TASKS,
    TRUNK,
    bend_noise,
    break_solver,
    make_run,
    make_trunk_run,
)

PRIVATE_SOLVERS = [kind for kind in kinds("client.solvers") if plugin_class("client.solvers", kind).private]
SAMPLED = {"sampling_rate": 0.25, "steps": 4}


def join_reasons(result: AuditVerdict) -> str:
    assert result.passed == (not result.reasons)
    return "; ".join(result.reasons)


# --- an honest solver passes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_the_honest_solver_passes(seed: int) -> None:
    result = audit(make_run(seed=seed))
    assert join_reasons(result) == ""
    assert 0.0 < result.epsilon_lower_99_9 <= result.epsilon_lower_95
    assert result.epsilon_claimed == pytest.approx(8.0, rel=1e-3)
    assert result.noise_std_ratio == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    "settings",
    [
        SAMPLED,
        pytest.param({"sampling_rate": 0.02, "steps": 10}, marks=pytest.mark.slow),
        pytest.param({"momentum": 0.9}, marks=pytest.mark.slow),
        pytest.param({"momentum": 0.5, "weight_decay": 0.01, "clip_norm": 40.0}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_kind_of_task_passes_with_patients_and_any_settings(settings: dict[str, Any]) -> None:
    assert join_reasons(audit(make_run(tasks=EVERY_KIND, unit=Unit.PATIENT, num_canaries=200, **settings))) == ""


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param(SAMPLED, marks=pytest.mark.slow),
        pytest.param({"sampling_rate": 0.02, "steps": 10}, marks=pytest.mark.slow),
        pytest.param({"momentum": 0.5, "weight_decay": 0.01, "clip_norm": 40.0}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("unit", list(Unit))
def test_a_run_that_trains_a_trunk_passes(unit: Unit, settings: dict[str, Any]) -> None:
    result = audit(make_trunk_run(("loop",), tasks=EVERY_KIND, unit=unit, num_canaries=200, **settings))
    assert join_reasons(result) == ""
    assert result.noise_std_ratio == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("unit", list(Unit))
@pytest.mark.parametrize("rate", [1.0, pytest.param(0.1, marks=pytest.mark.slow)])
def test_the_closed_form_solver_passes_and_its_planted_bugs_are_caught(unit: Unit, rate: float) -> None:
    run = make_run(tasks=LINEAR, unit=unit, kind="dp_gd", sampling_rate=rate)
    assert join_reasons(audit(run)) == ""
    assert "times" in join_reasons(audit(break_solver(run, stream=bend_noise(lambda noise: noise / 2))))
    assert "not clipped" in join_reasons(audit(break_solver(run, bugs.ClipsNothing)))


@pytest.mark.slow
@pytest.mark.parametrize("solver", PRIVATE_SOLVERS)
@pytest.mark.parametrize("task", kinds("common.tasks"))
def test_a_run_of_one_task_of_any_kind_passes_and_half_of_its_noise_is_caught(task: str, solver: str) -> None:
    tasks = {"only": plugin_class("common.tasks", task).example().settings}
    run = make_run(tasks=tasks, unit=Unit.PATIENT, kind=solver, num_canaries=100)
    assert join_reasons(audit(run)) == ""
    assert "times" in join_reasons(audit(break_solver(run, stream=bend_noise(lambda noise: noise / 2))))


def test_a_task_that_writes_texts_is_audited_without_its_backbone() -> None:
    tasks = {"said": plugin_class("common.tasks", "seq2seq").example().settings}
    run = make_run(tasks=tasks, kind="dp_gd", num_canaries=60)
    assert join_reasons(audit(run)) == ""
    assert "not clipped" in join_reasons(audit(break_solver(run, bugs.ClipsNothing)))
    short = make_run(tasks={"said": {"kind": "seq2seq", "max_tokens": 2}}, kind="dp_gd")
    with pytest.raises(BadInput, match=r"run\.tasks\.said\.max_tokens: .* at least 3 tokens, got 2"):
        audit(short)


def test_a_head_too_large_for_many_canaries_is_audited_with_fewer() -> None:
    tasks = {"faces": {"kind": "embedding", "labels": ["a", "b"], "start": "features", "head": {"bias": False}}}
    result = audit(make_run(tasks=tasks, kind="dp_gd", num_canaries=1000))
    assert join_reasons(result) == "" and 100 < (result.canaries or 0) < 250


def test_a_larger_claim_shows_a_larger_lower_bound() -> None:
    small, large = (audit(make_run(target_epsilon=target)) for target in (1.0, 8.0))
    assert small.epsilon_lower_95 < 1.0 < large.epsilon_lower_95 < 8.0


def test_equal_keys_give_equal_findings_and_the_system_s_do_not() -> None:
    # What was measured in time differs.
    measured = {"seconds": 0.0, "tried": (), "warnings": ()}
    first, again = (audit(make_run(num_canaries=100)).model_copy(update=measured) for _ in range(2))
    assert first == again
    run = parse(RunConfig, RUN, base=Path.cwd())
    one, other = (audit_run(run, Unit.EXAMPLE, {"digit": 100}) for _ in range(2))
    assert one.noise_std_ratio != other.noise_std_ratio


# --- every planted bug is caught -------------------------------------------------------------------------------------

CAUGHT: dict[str, tuple[Callable[[], AuditedRun], str]] = {
    # 1. A unit moves a step's sum by at most the clip norm.
    "no clipping": (lambda: break_solver(make_run(), bugs.ClipsNothing), "not clipped"),
    "each task clipped by itself": (
        lambda: break_solver(make_run(tasks=EVERY_KIND), bugs.TaskByTask),
        "times the standard deviation",
    ),
    "each record of a patient clipped by itself": (
        lambda: break_solver(make_run(unit=Unit.PATIENT), bugs.RecordByRecord),
        "times",
    ),
    # 2. Every step is noised, and the divisor does not depend on the records.
    "no noise": (lambda: break_solver(make_run(), stream=bend_noise(np.zeros_like)), "no noise"),
    "the true number of units as divisor": (
        lambda: break_solver(make_run(), sizes=bugs.use_true_sizes),
        "true number of units",
    ),
    "the true number of units as divisor of a trunk": (
        lambda: break_solver(make_trunk_run(), sizes=bugs.use_true_trunk_size),
        "true number of units",
    ),
    # 3. A round is as many noised steps as the plan says, with noise from the site's stream.
    "more steps than the plan says": (
        lambda: break_solver(make_run(), plan_used=bugs.double_steps),
        "draws noise for 6 steps, and 3 are accounted for",
    ),
    "a tenth too little noise": (
        lambda: break_solver(make_run(), stream=bend_noise(lambda noise: 0.9 * noise)),
        "times",
    ),
    "one seed for every call of the solver": (
        lambda: break_solver(make_run(), stream=bugs.seed_every_call_alike),
        "does not come from the site's stream",
    ),
    "noise drawn once for a round": (
        lambda: break_solver(make_run(), stream=bugs.draw_once_a_round),
        "times what the plan says",
    ),
    # 4. Units take part by independent coins of the plan's rate.
    "shuffled epochs": (
        lambda: break_solver(make_run(**SAMPLED), stream=bugs.shuffle_epochs()),
        "does not vary as with Poisson sampling",
    ),
    "subsets of one size": (
        lambda: break_solver(make_run(**SAMPLED), stream=bugs.take_subsets_of_one_size),
        "does not vary as with Poisson sampling",
    ),
    "a higher rate than is accounted for": (
        lambda: break_solver(make_run(**SAMPLED), stream=bugs.take_more_often),
        "and 0.25 is accounted for",
    ),
    # 5. Noise has the accounted scale everywhere and is drawn anew.
    "half of the noise": (
        lambda: break_solver(make_run(num_canaries=1000), stream=bend_noise(lambda noise: noise / 2)),
        "0.5 times",
    ),
    "one seed for all rounds": (
        lambda: replace(make_run(), entropy=lambda purpose: bytes(32)),
        "occur twice in the same release or in another",
    ),
    "the same noise for all classes": (
        lambda: break_solver(make_run(tasks={"digit": TASKS["digit"]}), stream=bend_noise(bugs.repeat_for_all_classes)),
        "repeats itself from weight to weight",
    ),
    # A sixteenth of the rows with noise of 0.7: all together would still pass.
    "too little noise on a trunk below a large head": (
        lambda: break_solver(
            make_trunk_run(tasks={"c": {"kind": "classification", "labels": [f"c{number}" for number in range(60)]}}),
            stream=bend_noise(bugs.scale_random_trunk_noise),
        ),
        "released noise of backbone.trunk has 0.",
    ),
    # 7. The claimed epsilon covers all steps of the run.
    "an accountant for each round": (
        lambda: replace(make_run(num_canaries=100), accountant=bugs.forget_earlier_rounds),
        "when composed",
    ),
    "an accountant for each round, with sampling": (
        lambda: replace(make_run(num_canaries=100, **SAMPLED), accountant=bugs.forget_earlier_rounds),
        "when composed",
    ),
    "a ledger that is reset": (
        lambda: replace(make_run(num_canaries=100), accountant=bugs.reset_half_way),
        "when composed",
    ),
    "an overwritten hook": (
        lambda: replace(make_run(num_canaries=100), accountant=bugs.overwrite_hook),
        "when composed",
    ),
    "one step accounted for in each round": (
        lambda: replace(make_run(num_canaries=100), accountant=bugs.count_one_step_a_round),
        "when composed",
    ),
    "a crash between reserve and commit that does not count": (
        lambda: replace(make_run(num_canaries=100), accountant=bugs.count_committed_only),
        "when composed",
    ),
}


# One of each kind of bug; the others take as long and are of the same kinds.
QUICK_BUGS = (
    "no clipping",
    "each task clipped by itself",
    "the true number of units as divisor",
    "noise drawn once for a round",
    "subsets of one size",
    "one seed for all rounds",
    "an accountant for each round",
)


@pytest.mark.parametrize(
    "bug", [pytest.param(name, marks=() if name in QUICK_BUGS else pytest.mark.slow) for name in CAUGHT]
)
def test_a_planted_bug_is_caught(bug: str) -> None:
    plant_bug, sentence = CAUGHT[bug]
    assert sentence in join_reasons(audit(plant_bug()))


# 6. Softmax gradients sum to 0 over classes: along them noise that is the same for all classes cancels.
@pytest.mark.parametrize("bug", ["no clipping", "no noise", "half of the noise", "the same noise for all classes"])
def test_canaries_alone_refute_the_claimed_epsilon(bug: str) -> None:
    result = audit(CAUGHT[bug][0]())
    assert result.epsilon_lower_99_9 > result.epsilon_claimed


def test_canaries_alone_refute_an_accountant_for_each_round() -> None:
    result = audit(replace(make_run(num_canaries=1000), accountant=bugs.forget_earlier_rounds))
    assert result.epsilon_lower_99_9 > result.epsilon_claimed


def test_canaries_alone_refute_a_trunk_that_is_not_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    bugs.clip_by(bugs.clip_heads_only, monkeypatch)
    result = audit(make_trunk_run(num_canaries=1000))
    assert result.epsilon_lower_99_9 > result.epsilon_claimed


@pytest.mark.parametrize(("bug", "ratio"), [("no noise", 0.0), ("half of the noise", 0.5)])
def test_the_noise_ratio_is_what_is_released_over_what_is_accounted_for(bug: str, ratio: float) -> None:
    assert audit(CAUGHT[bug][0]()).noise_std_ratio == pytest.approx(ratio, rel=0.1)


def test_noise_that_thins_out_after_the_first_step_of_a_round_is_seen_in_the_round() -> None:
    (first, *others) = audit(break_solver(make_run(), stream=bugs.thin_out_after_the_first_step)).reasons
    assert first == "a round's noise varies less than that of as many independent steps"
    assert all("released noise" in reason for reason in others)


# --- every bug planted in a trunk is caught --------------------------------------------------------------------------


@pytest.mark.parametrize("unit", list(Unit))
def test_canaries_reach_a_trunk_as_much_as_the_heads(unit: Unit) -> None:
    run = make_trunk_run()
    planted = plant(run.tasks, run.trunks, unit=unit, clip_norm=0.5, num_canaries=50, stream=NoiseStream(bytes(32)))
    of_trunk_M = (planted.direction[TRUNK] ** 2).sum(axis=0)
    whole_M = sum((direction**2).sum(axis=0) for direction in planted.direction.values())
    assert np.allclose(whole_M, 1.0)
    assert of_trunk_M.min() > 0.1 and of_trunk_M.max() < 0.9


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.9])
def test_too_little_noise_on_a_trunk_is_caught(factor: float) -> None:
    result = audit(break_solver(make_trunk_run(), stream=bend_noise(bugs.scale_trunk_noise(factor))))
    reasons = join_reasons(result)
    assert "a step's noise, relative to a unit's part" in reasons
    if factor == 0.0:
        assert result.epsilon_lower_99_9 > result.epsilon_claimed
    if factor < 0.9:
        assert "times the standard deviation" in reasons
    rows = np.array([ADDED, 3 + 2])  # Of the trunk's layer; of a head for three labels and one for two.
    assert result.noise_std_ratio == pytest.approx(np.sqrt(rows @ [factor**2, 1.0] / rows.sum()), rel=0.03)


@pytest.mark.parametrize("unit", list(Unit))
def test_a_trunk_that_is_clipped_jointly_passes_with_the_planted_optimizer(
    unit: Unit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next test catches its rules, not the optimizer that they are planted in."""
    bugs.clip_by(bugs.clip_jointly, monkeypatch)
    assert join_reasons(audit(make_trunk_run(unit=unit))) == ""


@pytest.mark.slow
@pytest.mark.parametrize("unit", list(Unit))
@pytest.mark.parametrize("rule", [bugs.leave_trunk_out_of_norm, bugs.clip_trunk_by_itself, bugs.clip_heads_only])
def test_a_trunk_that_is_not_clipped_jointly_is_caught(
    rule: bugs.Clipping, unit: Unit, monkeypatch: pytest.MonkeyPatch
) -> None:
    bugs.clip_by(rule, monkeypatch)
    result = audit(make_trunk_run(unit=unit))
    reasons = join_reasons(result)
    assert "a step's noise, relative to a unit's part" in reasons
    assert "times the standard deviation" in reasons and result.noise_std_ratio < 0.95
    if rule is bugs.clip_heads_only:
        assert "not clipped" in reasons


def test_records_of_a_trunk_that_count_for_another_patient_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a patient's trunk gradient is then clipped with another's heads."""
    bugs.count_for_another_patient(monkeypatch)
    assert "times" in join_reasons(audit(make_trunk_run(unit=Unit.PATIENT)))


# --- a run file ------------------------------------------------------------------------------------------------------


def test_the_claim_is_what_a_real_ledger_composes(tmp_path: Path) -> None:
    plan = make_run().plan
    ledger = Ledger.open(tmp_path, population="r", unit=Unit.EXAMPLE, epsilon_cap=100.0, delta=1e-5)
    for round_ in range(25):
        ledger.commit(ledger.reserve(Mechanism.of(plan), run="run", round=round_, request=""))
    assert compute_ledger_epsilon(plan, 25, 1e-5) == pytest.approx(ledger.spent().spent_epsilon, rel=1e-12)


RUN: dict[str, Any] = {
    "name": "audited",
    "seed": 1,
    "rounds": 2,
    "backbone": {"kind": "identity", "dim": 4},
    "tasks": TASKS,
    "solver": {"kind": "dp_sgd", "sampling_rate": 1.0, "steps": 2, "clip_norm": 1.0, "learning_rate": 1.0},
    "privacy": {"unit": "example", "delta": 1e-5, "noise_multiplier": 2.0},
    "aggregation": {"kind": "mean"},
}


def test_a_run_is_audited_with_the_tasks_and_the_delta_of_the_site() -> None:
    run = parse(RunConfig, RUN, base=Path.cwd())
    result = audit_run(run, Unit.EXAMPLE, {"loop": 80}, delta=1e-6, entropy=SeededEntropy(3))
    assert join_reasons(result) == ""
    plan = open_solver(run.solver, "solver").plan(Privacy(**RUN["privacy"]), Unit.EXAMPLE, 2)
    assert result.epsilon_claimed == pytest.approx(compute_epsilon([Mechanism.of(plan)] * 2, 1e-6))
    assert {"epsilon_claimed", "epsilon_lower_95", "epsilon_lower_99_9", "noise_std_ratio", "passed"} <= set(
        result.model_dump()
    )


@pytest.mark.parametrize(
    ("changes", "sizes", "message"),
    [
        ({"privacy": "non_private"}, {"loop": 80}, "promises nothing"),
        ({}, {"else": 80}, "at least one task"),
    ],
)
def test_a_run_that_cannot_be_audited_is_refused(changes: dict[str, Any], sizes: dict[str, int], message: str) -> None:
    run = parse(RunConfig, {**RUN, **changes}, base=Path.cwd())
    with pytest.raises(BadInput, match=message):
        audit_run(run, Unit.EXAMPLE, sizes)


@pytest.mark.slow
def test_a_run_with_a_part_of_a_backbone_that_trains_is_audited_through_a_trunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = {
        "backbone": {"kind": "small_cnn", "input_size": 12, "channels": [4, 8], "pool": 2},
        "trainable": {"backbone": {"from": "input"}},
        "solver": {**RUN["solver"], "trunk": {"learning_rate": 0.1}},
    }
    run = parse(RunConfig, {**RUN, **changes}, base=Path.cwd())
    sizes = {"loop": 80, "digit": 60}
    assert join_reasons(audit_run(run, Unit.PATIENT, sizes, entropy=SeededEntropy(3))) == ""
    bugs.count_for_another_patient(monkeypatch)
    assert "a step's noise" in join_reasons(audit_run(run, Unit.PATIENT, sizes, entropy=SeededEntropy(3)))


def test_a_run_whose_settings_were_chosen_is_audited_and_a_centre_of_the_records_own_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = {key: value for key, value in RUN.items() if key not in ("rounds", "aggregation")}
    privacy = {"unit": "example", "delta": 1e-5, "target_epsilon": 3.0}
    run = parse(RunConfig, {**chosen, "solver": {"kind": "auto"}, "privacy": privacy}, base=Path.cwd())
    sizes = {"loop": 80, "digit": 60}
    assert join_reasons(audit_run(run, Unit.EXAMPLE, sizes, entropy=SeededEntropy(3))) == ""

    def centre_on_the_batch(head: AdjustedHead, features_RD: Tensor) -> Tensor:
        del head
        return normalize_rows(features_RD, normalize_rows(features_RD).mean(dim=0))

    monkeypatch.setattr(AdjustedHead, "adjust", centre_on_the_batch)
    found = join_reasons(audit_run(run, Unit.EXAMPLE, sizes, entropy=SeededEntropy(3)))
    assert "one unit" in found, found
