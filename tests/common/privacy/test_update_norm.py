"""The bound on an honest update's length: torch's own optimizer and simulated noise are the references."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.privacy.update_norm import Response, bound_update_norms, check_descent_plan, compute_noise_range
from common.privacy.update_norm import read_descent as read
from common.run import Rates, RunConfig, TrunkRates
from common.types import BadInput, Heads, Plan, Unit
from tests.tiny import run_config

SOLVER = {"kind": "dp_sgd", "sampling_rate": 0.5, "steps": 4, "clip_norm": 0.5, "learning_rate": 2.0}
SENT: Heads = {"colour": {"w": np.full((3, 4), 0.5, np.float32)}, "size": {"w": np.zeros((2, 4), np.float32)}}
SIZES = {"colour": 40, "size": 10}


def run_torch(rates: Rates, momentum: float, start: float, gradients: list[float]) -> float:
    """Returns the weight after steps of torch's SGD."""
    weight = torch.tensor(start, dtype=torch.double, requires_grad=True)
    sgd = torch.optim.SGD([weight], lr=rates.learning_rate, momentum=momentum, weight_decay=rates.weight_decay)
    for gradient in gradients:
        weight.grad = torch.tensor(gradient, dtype=torch.double)
        sgd.step()
    return float(weight.detach())


@settings(deadline=None)
@given(
    rates=st.builds(Rates, learning_rate=st.floats(0.01, 4), weight_decay=st.sampled_from([0.0, 0.01, 0.3])),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    steps=st.integers(1, 9),
)
def test_the_response_is_that_of_torchs_optimizer(rates: Rates, momentum: float, steps: int) -> None:
    response = Response.of(rates, momentum, steps)
    # What a single gradient in each of the steps leaves behind.
    effects = [run_torch(rates, momentum, 0.0, [float(step == only) for step in range(steps)]) for only in range(steps)]
    assert response.absolute == pytest.approx(sum(map(abs, effects)), rel=1e-9)
    assert response.euclidean == pytest.approx(math.sqrt(sum(effect**2 for effect in effects)), rel=1e-9)
    decayed = run_torch(rates, momentum, 1.0, [0.0] * steps) - 1.0
    assert response.decay == pytest.approx(abs(decayed), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_with_a_layer_decay_the_response_bounds_every_block(weight_decay: float) -> None:
    rates = TrunkRates(learning_rate=4.0, weight_decay=weight_decay, layer_decay=0.5)
    own = Response.of(rates, 0.5, 6, most_depth=3)
    blocks = [Response.of(Rates(learning_rate=4.0 * 0.5**d, weight_decay=weight_decay), 0.5, 6) for d in range(4)]
    for name in ("absolute", "euclidean", "decay"):
        assert getattr(own, name) >= max(getattr(block, name) for block in blocks) * (1 - 1e-12)
    if not weight_decay:
        # Then the last block has the longest step each time.
        assert own == blocks[0]


def test_a_layer_decay_is_a_setting_of_the_run_that_is_bounded() -> None:
    trunk = {"backbone.trunk": {"w": np.zeros((2, 4), np.float32), "v": np.zeros(4, np.float32)}}
    deep = {"trainable": {"backbone": {"from": "input"}}}
    plain = bound({**SENT, **trunk}, solver={"trunk": {"learning_rate": 0.2}}, **deep)
    layered = bound({**SENT, **trunk}, solver={"trunk": {"learning_rate": 0.2, "layer_decay": 0.8}}, **deep)
    assert layered == plain
    assert math.isfinite(layered["backbone.trunk"])


def bound(sent: Heads = SENT, sizes: dict[str, int] = SIZES, **changes: Any) -> dict[str, float]:
    return bound_update_norms(run_config(solver={**SOLVER, **changes.pop("solver", {})}, **changes), sizes, sent)


def test_a_hand_computed_bound() -> None:
    """Full batch, one step, no decay: 2 n C / n, and noise of deviation sigma C / n in each of the 8 weights."""
    privacy = {"unit": "example", "delta": 1e-5, "noise_multiplier": 5.0}
    got = bound(solver={"sampling_rate": 1.0, "steps": 1, "learning_rate": 1.0}, privacy=privacy)["size"]
    expected = 2 * 0.5 + 5.0 * 0.5 / 10 * (math.sqrt(8) + math.sqrt(2 * math.log(2e9)))
    assert got == pytest.approx(expected, rel=2e-3) and got >= expected


@pytest.mark.parametrize("width", [1, 100, 100_000])
def test_noise_alone_fills_most_of_the_bound_of_a_wide_group_and_never_leaves_it(width: int) -> None:
    sent: Heads = {"size": {"w": np.zeros(width, np.float32)}}
    privacy = {"unit": "example", "delta": 1e-5, "noise_multiplier": 50.0}
    limit = bound(sent, {"size": 10}, privacy=privacy)["size"]
    rng = np.random.default_rng(0)
    deviation = 2.0 * math.sqrt(SOLVER["steps"]) * 50.0 * 0.5 / (0.5 * 10)  # type: ignore[arg-type]
    norms = [np.linalg.norm(rng.normal(size=width) * deviation) for _ in range(200 if width < 1000 else 20)]
    assert max(norms) <= limit
    if width == 100_000:
        assert min(norms) > 0.9 * limit


def test_each_head_has_its_own_rates_and_a_trunk_the_units_of_all_its_tasks() -> None:
    slow = bound(solver={"tasks": {"size": {"learning_rate": 0.2}}})
    plain = bound()
    assert slow["colour"] == plain["colour"]
    assert slow["size"] == pytest.approx(plain["size"] / 10, rel=1e-2)
    deep = {"solver": {"trunk": {"learning_rate": 0.2}}, "trainable": {"backbone": {"from": "input"}}}
    trunk = {"backbone.trunk": {"w": np.zeros((2, 4), np.float32)}}
    # 50 units of which the divisor counts 40, and less than a fifth of what a head of this size does at this rate.
    got = bound({**SENT, **trunk}, **deep)
    assert set(got) == {"colour", "size", "backbone.trunk"}
    equal = bound({**SENT, **trunk}, {"colour": 40, "size": 40}, **deep)
    assert got["backbone.trunk"] < equal["backbone.trunk"]


def test_weight_decay_is_a_known_part_of_the_change() -> None:
    heavy: Heads = {"colour": {"w": np.full((3, 4), 1000.0, np.float32)}, "size": SENT["size"]}
    decaying = {"solver": {"weight_decay": 0.01}}
    assert bound(heavy)["colour"] == pytest.approx(bound()["colour"], rel=1e-2)
    shrunk = (1 - (1 - 0.02) ** 4) * np.linalg.norm(heavy["colour"]["w"])
    assert bound(heavy, **decaying)["colour"] == pytest.approx(bound()["colour"] + shrunk, rel=1e-2)


@pytest.mark.parametrize(
    "changes",
    [
        {"privacy": "non_private", "solver": {"kind": "sgd"}},
        {"solver": {"learning_rate": None}},
        {"solver": {"clip_norm": 0.0}},
        {"solver": {"steps": 10**8}},
    ],
    ids=["no privacy", "no rate", "no clip", "more steps than a site takes"],
)
def test_without_the_numbers_nothing_bounds_but_the_run_files_own_number(changes: dict[str, Any]) -> None:
    assert bound(**changes) == {"colour": math.inf, "size": math.inf}


def test_rates_that_diverge_bound_nothing_and_raise_nothing() -> None:
    wild = bound(solver={"steps": 1000, "learning_rate": 1e6, "weight_decay": 1e6})
    assert set(wild.values()) == {math.inf}


def target_run() -> RunConfig:
    privacy = {"unit": "example", "delta": 1e-5, "target_epsilon": 3.0}
    return run_config(privacy=privacy, solver=SOLVER, rounds=6)


def plan(**changes: Any) -> Plan:
    descent = read(target_run())
    assert descent is not None
    noise = compute_noise_range(target_run(), descent)
    values = {"sampling_rate": 0.5, "steps": 4, "clip_norm": 0.5, "noise_multiplier": noise.high}
    return Plan(**{**values, **changes}, unit=Unit.EXAMPLE)


def test_a_plan_of_the_whole_run_or_of_the_rounds_that_are_left_is_the_runs() -> None:
    descent = read(target_run())
    assert descent is not None
    noise = compute_noise_range(target_run(), descent)
    assert noise.low < noise.high
    for sigma in (noise.low, (noise.low + noise.high) / 2, noise.high):
        check_descent_plan(plan(noise_multiplier=sigma), target_run())


@pytest.mark.parametrize("name", ["sampling_rate", "steps", "clip_norm", "noise_multiplier"])
@pytest.mark.parametrize("factor", [0.5, 2])
def test_a_plan_of_other_numbers_than_the_runs_is_refused(name: str, factor: float) -> None:
    value = getattr(plan(), name)
    value = (
        int(value * factor)
        if name == "steps"
        else min(0.9, value * factor)
        if name == "sampling_rate"
        else (
            value * factor**3  # Six rounds need less than three times the noise of one.
        )
    )
    with pytest.raises(BadInput, match=f"another {name}"):
        check_descent_plan(plan(**{name: value}), target_run())
