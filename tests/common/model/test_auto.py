"""`solver: {kind: auto}`: concrete settings from public numbers, and no more privacy than was asked for."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant

from common.model.auto import _choose_aggregation
from common.model.guessing import Totals, compute_v
from common.model.momentum import Momentum
from common.offers import make_offer
from common.privacy.accounting import Mechanism, compute_epsilon
from common.privacy.filters import calibrate_noise_multiplier
from common.privacy.shares import plan_moments
from common.run import RunConfig
from common.tasks import SmoothLoss, expect_slope, open_task, open_tasks
from common.types import BadInput, Plan, Unit
from common.yaml import parse
from tests.tiny import TASKS, backbone, run_config

AUTO: dict[str, Any] = {
    "name": "auto",
    "seed": 3,
    "backbone": {"kind": "identity", "dim": 4},
    "tasks": TASKS,
    "solver": {"kind": "auto"},
    "privacy": {"unit": "example", "delta": 1e-5, "target_epsilon": 3.0},
}


def auto(**changes: Any) -> RunConfig:
    return parse(RunConfig, {**AUTO, **changes}, base=Path.cwd())


def read_names(run: RunConfig, task: str) -> set[str]:
    return set(open_task(run.tasks[task].settings(), task).head(4).state_dict())


def price(run: RunConfig) -> list[Mechanism]:
    asked, first = run.training_privacy, plan_moments(run, Unit.EXAMPLE)
    assert asked is not None and asked.target_epsilon is not None and first is not None
    sigma = calibrate_noise_multiplier(asked.target_epsilon, asked.delta, 1.0, run.rounds)
    return [Mechanism.of(Plan(1.0, run.rounds, 1.0, sigma, Unit.EXAMPLE)), Mechanism.of(first)]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("rounds", 0, "rounds: expected a number of at least 1, got 0"),
        ("moments", {"classes": 2}, r"moments\.classes: expected a number below"),
        ("moments", {"classes": 0.9, "scatter": 0.2}, r"moments.*: expected parts that are together"),
    ],
)
def test_a_wrong_value_beside_auto_is_named(key: str, value: Any, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        auto(**{key: value})


@pytest.mark.parametrize("epsilon", [0.3, 1.0, 3.0, 8.0])
def test_rounds_and_the_release_before_them_cost_what_was_asked_for_and_not_less(epsilon: float) -> None:
    run = auto(privacy={**AUTO["privacy"], "target_epsilon": epsilon})
    mechanisms = price(run)
    assert compute_epsilon(mechanisms, 1e-5) == pytest.approx(epsilon, rel=1e-5)
    oracle = PLDAccountant()
    for each in mechanisms:
        event = dp_accounting.GaussianDpEvent(each.noise_multiplier)
        oracle.compose(dp_accounting.SelfComposedDpEvent(event, each.steps))
    assert oracle.get_epsilon(1e-5) == pytest.approx(epsilon, rel=2e-3)


def test_a_noise_multiplier_is_that_of_the_rounds_and_the_first_release_has_its_share_beside_them() -> None:
    run = auto(privacy={"unit": "example", "delta": 1e-5, "noise_multiplier": 20.0})
    first = plan_moments(run, Unit.EXAMPLE)
    assert first is not None and run.moments is not None and run.training_privacy == run.requested_privacy
    rounds = run.rounds / 20.0**2
    assert first.noise_multiplier**-2 == pytest.approx(rounds * run.moments.share / (1.0 - run.moments.share))


def test_what_is_chosen_is_concrete_and_the_same_when_it_is_read_again() -> None:
    run = auto()
    assert run.solver.kind == "head_sum" and run.aggregation.kind == "heavy_ball" and run.rounds == 48
    assert "auto" not in str(run.model_dump(exclude={"name"}))
    assert len(run.chosen) == 4
    again = parse(RunConfig, run.model_dump(mode="json"), base=Path.cwd())
    assert again.model_dump() == run.model_dump() and again.chosen == ()
    assert make_offer(again, {"backbone": backbone()}) == make_offer(run, {"backbone": backbone()})


def test_a_declared_public_mean_is_not_measured_again() -> None:
    public = {**AUTO["backbone"], "projection": {"shift": {"public": "mean.safetensors"}, "normalize": True}}
    run = auto(backbone=public)
    assert run.moments is not None and run.moments.means == 0.0 < run.moments.counts
    assert not any(open_task(spec, name).head_settings.centre for name, spec in run.tasks.items())
    assert "the labels' frequencies" in run.chosen[-1] and "mean" not in run.chosen[-1]
    named = {name: {**task, "backbone": "public"} for name, task in TASKS.items()}
    first = next(iter(named))
    both = auto(
        backbone=None,
        backbones={"public": public, "plain": AUTO["backbone"]},
        tasks={**named, first: {**named[first], "backbone": "plain"}},
    )
    assert both.moments is not None and both.moments.means > 0.0
    centred = {name for name, spec in both.tasks.items() if open_task(spec, name).head_settings.centre}
    assert centred == {first}


def test_the_offer_of_a_run_that_uses_no_new_key_names_none() -> None:
    offer = make_offer(run_config(), {"backbone": backbone()})
    assert "moments" not in offer and set(offer["aggregation"]) == {"kind"}
    assert all("head" not in task and "prior" not in task for task in offer["tasks"].values())


def test_rounds_and_head_settings_of_the_user_are_kept() -> None:
    tasks = {**TASKS, "size": {**TASKS["size"], "head": {"bias": True, "centre": False}}}
    run = auto(rounds=7, tasks=tasks)
    assert run.rounds == 7 and run.aggregation_of("size").settings()["rounds"] == 7
    head = run.tasks["size"].settings()["head"]
    assert (head["bias"], head["centre"], head["prior"]) == (True, False, True)


def test_hidden_layers_and_trunks_train_with_one_step_a_round() -> None:
    tasks = {name: {**task, "head": {"hidden": 8}} for name, task in TASKS.items()}
    hidden = auto(tasks=tasks)
    assert hidden.solver.kind == "dp_sgd"
    assert {name: hidden.solver.settings()[name] for name in ("steps", "sampling_rate", "learning_rate")} == {
        "steps": 1,
        "sampling_rate": 1.0,
        "learning_rate": 1.0,
    }


def test_each_kind_has_what_suits_its_loss() -> None:
    tasks: dict[str, Any] = {
        "class": {"kind": "classification", "labels": ["a", "b"]},
        "number": {"kind": "regression", "range": [0, 1]},
        "odd": {"kind": "anomaly", "normal": "a", "anomalous": "b"},
        "death": {"kind": "survival", "boundaries": [1, 2, 3, 4], "variation": 1.0},
        "who": {"kind": "embedding", "labels": ["a", "b"], "start": "features", "head": {"bias": False}},
    }
    run = auto(tasks=tasks)
    heads = {name: run.tasks[name].settings().get("head", {}) for name in tasks}
    assert {name for name, head in heads.items() if head.get("centre")} == {"class", "number", "death", "who"}
    assert {name for name, head in heads.items() if head.get("prior")} == {"class", "death"}
    rho = {name: run.aggregation_of(name).settings()["rho"] for name in tasks}
    assert rho == {"class": 0.5, "number": 0.1, "odd": 0.1, "death": 0.5, "who": 0.5}
    for name in tasks:
        assert "fixed.centre" in read_names(run, name) or not heads[name].get("centre")


@pytest.mark.parametrize("kind", ["regression", "anomaly"])
def test_only_what_some_head_uses_is_measured_before_the_first_round(kind: str) -> None:
    settings: dict[str, dict[str, Any]] = {
        "regression": {"range": [0, 1]},
        "anomaly": {"normal": "a", "anomalous": "b"},
    }
    moments = auto(tasks={"one": {"kind": kind, **settings[kind]}}).moments
    assert moments is None if kind == "anomaly" else (moments is not None and moments.counts == 0 < moments.means)


def test_a_head_on_a_backbone_that_trains_has_no_centre() -> None:
    run = auto(trainable={"backbone": {"from": "layer4"}})
    assert run.moments is not None and run.moments.means == 0
    assert not any(task.settings()["head"].get("centre") for task in run.tasks.values())


def test_a_trunk_moves_less_where_nothing_is_clipped() -> None:
    trainable = {"backbone": {"from": "layer4"}}
    private, free = auto(trainable=trainable), auto(trainable=trainable, privacy="non_private")
    assert private.solver.settings()["trunk"]["learning_rate"] == 0.05
    assert free.solver.settings()["trunk"]["learning_rate"] == 0.001


def test_a_kind_without_a_rule_needs_settings() -> None:
    class Strange:
        kind = "strange"

    with pytest.raises(ValueError, match="no rule for task one of kind strange"):
        _choose_aggregation({"one": Strange()}, None, 1.0, 8)  # type: ignore[dict-item]


def test_a_run_without_privacy_has_no_noise_to_keep_small() -> None:
    run = auto(privacy="non_private")
    assert run.solver.kind == "sgd" and run.aggregation_of("size").settings()["noise"] == 0.0


PLACES: dict[str, Any] = {"kind": "segmentation", "labels": ["ground", "cell"], "side": 8}
PICTURE: dict[str, Any] = {"kind": "classification", "labels": ["a", "b"]}


def test_a_task_of_places_has_the_scale_with_which_it_shares_a_clip_norm_equally() -> None:
    both = auto(tasks={"places": PLACES, "picture": PICTURE})
    alone = {name: auto(tasks={name: task}) for name, task in (("places", PLACES), ("picture", PICTURE))}
    assert both.tasks["places"].settings()["scale"] == alone["places"].tasks["places"].settings()["scale"] == 4.0
    assert "scale" not in both.tasks["picture"].settings()
    clip = {name: run.solver.settings()["clip_norm"] for name, run in alone.items()}
    assert clip["places"] == clip["picture"]
    assert both.solver.settings()["clip_norm"] == pytest.approx(math.sqrt(2) * clip["places"], abs=1e-4)
    # A step on a loss times four is four times shorter, or the scale would change runs without noise.
    steps = both.aggregation_of("places").settings()["step"], both.aggregation_of("picture").settings()["step"]
    assert 4.0 * steps[0] == pytest.approx(steps[1])
    assert any("scale 4 of places" in reason for reason in both.chosen)
    assert not any("scale" in reason for reason in alone["picture"].chosen)
    mine = auto(tasks={"places": {**PLACES, "scale": 1.0}, "picture": PICTURE})
    assert mine.tasks["places"].settings()["scale"] == 1.0
    assert mine.solver.settings()["clip_norm"] < both.solver.settings()["clip_norm"]


def test_tasks_of_places_share_a_clip_norm_equally_with_each_other() -> None:
    objects = {"kind": "detection", "labels": ["cell"], "sizes": {"cell": [0.1, 0.2]}}
    tasks = {"places": PLACES, "objects": objects, "picture": PICTURE}
    opened = open_tasks(auto(tasks=tasks))
    lengths = {name: task.scale * expect_slope(task) for name, task in opened.items() if isinstance(task, SmoothLoss)}
    assert lengths == pytest.approx(dict.fromkeys(tasks, math.sqrt(0.5)), rel=1e-3)


def test_a_task_of_places_takes_half_of_what_a_task_beside_it_can_learn_and_not_more() -> None:
    both, alone = auto(tasks={"places": PLACES, "picture": PICTURE}), auto(tasks={"picture": PICTURE})
    v = [compute_v(run, open_tasks(run), {"picture": Totals(500, 4)})["picture"] for run in (both, alone)]
    assert v[0] is not None and v[1] is not None and v[0] == pytest.approx(v[1] / math.sqrt(2), rel=1e-3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("true_to_declared", [1.0, 2.5])
@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_a_squared_error_converges_whatever_its_features_are(bias: bool, true_to_declared: float, noise: float) -> None:
    """The worst features of length 1 are all alike; squares make one row of data all that is needed."""
    task = {"kind": "regression", "range": [0, 1], "scale": 2.0, "head": {"bias": bias}}
    settings = auto(tasks={"number": task}).aggregation_of("number").settings()
    rule = Momentum.model_validate({key: value for key, value in settings.items() if key != "kind"} | {"noise": noise})
    step, momentum = rule.choose_step(1000, 3)
    row = np.array([0.6, 0.8, 1.0]) if bias else np.array([0.6, 0.8])
    weights = velocity = np.zeros(len(row))
    for _ in range(rule.rounds):
        velocity = momentum * velocity - true_to_declared * 2.0 * (row @ weights - 0.7) * row
        weights = weights + step * velocity
    assert row @ weights == pytest.approx(0.7, abs=0.05)


def test_losses_that_flatten_keep_their_steps() -> None:
    settings = auto().aggregation_of("size").settings()
    assert settings["step"] == pytest.approx(6.0) and "most_momentum" not in settings


@pytest.mark.parametrize(
    "task",
    [{"kind": "segmentation", "labels": ["ground", "cell"], "side": 8}, {"kind": "detection", "labels": ["cell"]}],
)
def test_places_are_learned_with_a_momentum_that_does_not_swing(task: dict[str, Any]) -> None:
    tasks = {"cell": task}
    settings = auto(tasks=tasks).aggregation_of("cell").settings()
    assert settings["most_momentum"] == pytest.approx(math.exp(-8 / 48), abs=1e-6)


def test_a_smoothed_loss_is_trained_with_a_momentum_that_does_not_swing() -> None:
    tasks = {name: {**spec, "smoothing": 0.1} for name, spec in TASKS.items()}
    settings = auto(tasks=tasks).aggregation_of("size").settings()
    assert settings["step"] == pytest.approx(6.0)
    assert settings["most_momentum"] == pytest.approx(math.exp(-8 / 48), abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"solver": {"kind": "auto", "clip_norm": 1.0}}, "expected no setting beside `kind: auto`, got clip_norm"),
        ({"aggregation": {"kind": "mean"}}, "aggregation: expected none beside"),
        ({"privacy": {"unit": "example"}}, "privacy.delta"),
        ({"tasks": {"size": {"kind": "clasification"}}}, "clasification"),
        ({"rounds": "many"}, "rounds"),
        ({"privacy": {"unit": "example", "delta": 1e-5, "target_epsilon": 1e-4}}, "leave the rounds an epsilon of"),
    ],
)
def test_what_auto_cannot_be_used_with_is_one_sentence(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        run = auto(**changes)
        for name, task in run.tasks.items():  # A kind is looked up where the tasks are opened.
            open_task(task, name)


@pytest.mark.parametrize(("rounds", "units", "sites", "noise"), [(12, 300, 1, 90.0), (48, 5000, 5, 20.0)])
def test_the_noise_of_a_logit_is_that_of_noise_really_drawn(rounds: int, units: int, sites: int, noise: float) -> None:
    rule = Momentum(rounds=rounds, step=2.0, noise=noise)
    step, momentum = rule.choose_step(units, sites)
    rng = np.random.default_rng(0)
    velocity, weights = np.zeros(20_000), np.zeros(20_000)
    for _ in range(rounds):
        velocity = momentum * velocity + noise * rng.normal(size=(sites, 20_000)).sum(axis=0) / units
        weights = weights - step * velocity
    assert rule.compute_logit_noise(units, sites) == pytest.approx(weights.std(), rel=0.03)


def test_the_noise_of_a_logit_does_not_depend_on_rounds_or_size() -> None:
    """The rule's promise, by replaying its steps: V and W of noise alone, per unit of a feature vector of length 1."""
    found = []
    for rounds, units, sites, noise in itertools.product((12, 48, 200), (300, 5000), (1, 5), (20.0, 90.0)):
        step, momentum = Momentum(rounds=rounds, step=2.0, noise=noise).choose_step(units, sites)
        # The response of the last weights to one round's noise, for every round.
        responses = [step * (1 - momentum**left) / (1 - momentum) for left in range(1, rounds + 1)]
        found.append(math.hypot(*responses) * noise * math.sqrt(sites) / units)
    assert max(found) < 0.75
    assert sorted(found)[len(found) // 2] == pytest.approx(0.5, abs=0.1)
