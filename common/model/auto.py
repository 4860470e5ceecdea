"""`solver: {kind: auto}`: a run's settings from public numbers alone.

Nothing here reads a record or a result: the choice follows from the kinds of the tasks and heads, from the requested
privacy and from how many rounds are asked for, and is made while the run file is read. Sites are offered, and approve,
what was chosen; none of it is chosen again. Sizes and the number of sites enter later and are public too: by them the
coordinator chooses its steps (`server.rounds.aggregators.heavy_ball`).

Of laboratory runs on training records (docs/results.md): one noised sum a round and momentum at the coordinator, 48
rounds, features centred by a noised mean, labels' frequencies as an offset.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from common.backbones import declares_public_mean
from common.errors import describe
from common.model.momentum import Momentum
from common.plugins import Spec
from common.privacy.filters import choose_noise_multiplier
from common.privacy.shares import keep_for_rounds
from common.run import ONLY_BACKBONE, Adjustment, Moments, Privacy, Rounds
from common.tasks import (
    ChangesWithRounds,
    ConstantCurvature,
    LabelPrior,
    LaterSlope,
    SmoothLoss,
    StaysCurved,
    Task,
    expect_slope,
    open_task,
    pools_items,
)
from common.types import BadInput

ROUNDS = 48
MEANS, COUNTS = 0.05, 0.05
CLIP_SHARE = 0.6
"""Clip norm in parts of the gradient's usual length: at the start, or later where it soon is another."""
STEP = 3.0
"""Largest step in parts of one over the smoothness of a loss by the head's outputs. By its weights the loss is far
smoother: centred features of length 1 lie along no one direction, and gradients shrink as outputs become sure."""
CALM = 8.0
"""Momentum m shrinks an oscillation by m^(T / 2) in T rounds: to exp(-CALM / 2) of it with the largest momentum."""
TRUNK_RATE = 0.05
"""Rate of a trunk beside heads of rate 1, with privacy: what is pre-trained moves little."""
FREE_TRUNK_RATE = 0.001
"""Rate of a trunk beside heads of rate 1, without privacy. Nothing is clipped there and momentum is up to .97: with a
rate of .05 pre-trained convolutions ended no better than guessing (docs/transfer.md)."""


@dataclass(frozen=True)
class Choice:
    """A run file's values with `auto` replaced.

    Attributes:
        settings: the values.
        reasons: one sentence for each choice.
    """

    settings: dict[str, Any]
    reasons: tuple[str, ...]


def choose_settings(values: Mapping[str, Any]) -> Choice:
    """Returns a run file's values with concrete settings in place of `solver: {kind: auto}`.

    Args:
        values: the file's values, not validated yet; what is wrong in them stays as it is.

    Raises:
        ValueError: something is set beside `auto` that it chooses, or a task has no rule.
    """
    extra = sorted(set(_as_mapping(values["solver"])) - {"kind"})
    if extra:
        raise ValueError(f"solver: expected no setting beside `kind: auto`, got {extra[0]}; it chooses them all")
    adjustment = _as_mapping(values.get("aggregation"))
    if values.get("aggregation") is not None and not (adjustment and set(adjustment) <= set(Adjustment.model_fields)):
        raise ValueError(
            "aggregation: expected none beside `solver: {kind: auto}`, which chooses it; schedule, decay_to_start "
            "and balance may stand there"
        )
    asked = _as_mapping(values.get("moments"))
    if set(asked) - {"classes", "scatter"}:
        raise ValueError("moments: expected `classes` and `scatter` alone beside `solver: {kind: auto}`")
    try:
        tasks = {name: _as_mapping(spec) for name, spec in _as_mapping(values.get("tasks")).items()}
        scales = _choose_scales(tasks)
        tasks |= {name: {**tasks[name], "scale": scale} for name, scale in scales.items()}
        opened = {name: _open(name, spec) for name, spec in tasks.items()}
        privacy = _read_privacy(values.get("privacy"))
        rounds = TypeAdapter(Rounds).validate_python(values.get("rounds", ROUNDS))
    except (BadInput, ValidationError, TypeError):
        # What is wrong is named where the file's values are validated.
        opened, tasks, scales, privacy, rounds = {}, {}, {}, None, ROUNDS
    trains_network = bool(values.get("trainable")) or any(_has_hidden_layer(spec) for spec in tasks.values())
    heads = {name: _choose_head(task, tasks[name], values) for name, task in opened.items()}
    chosen = {"rounds": rounds, **values, "tasks": {**_as_mapping(values.get("tasks")), **tasks}}
    for name, head in heads.items():
        if head:
            chosen["tasks"][name] = {**tasks[name], "head": head}
    try:
        moments = _choose_moments(heads.values(), asked)
    except ValidationError as error:
        raise ValueError(describe(error, Moments, "moments")) from error
    if moments is not None:
        chosen["moments"] = moments.model_dump()
    clip_norm = _choose_clip_norm(opened)
    chosen["solver"] = _choose_solver(privacy, clip_norm, trains_network, bool(values.get("trainable")))
    left = keep_for_rounds(privacy, moments)
    chosen["aggregation"] = {**_choose_aggregation(opened, left, clip_norm, rounds), **adjustment}
    return Choice(chosen, _explain(chosen, trains_network, scales))


def _as_mapping(value: Any) -> Mapping[str, Any]:
    if isinstance(value, Spec):
        return value.model_dump()
    return value if isinstance(value, Mapping) else {}


def _open(name: str, spec: Mapping[str, Any]) -> Task:
    return open_task({key: value for key, value in spec.items() if key != "backbone"}, f"tasks.{name}")


def _choose_scales(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Returns the scales of tasks whose gradients soon have another length, of which the file sets none.

    A task whose gradients shrink at once drowns in the noise of a clip norm for its first ones, or for those of the
    tasks beside it. With the scale its later gradients are as long as the longest first ones of all tasks of the run.
    """
    smooth = {name: task for name, spec in tasks.items() if isinstance(task := _open(name, spec), SmoothLoss)}
    longest = max((task.first_slope for task in smooth.values()), default=1.0)
    return {
        name: round(longest / task.later_slope, 4)
        for name, task in smooth.items()
        if isinstance(task, LaterSlope) and "scale" not in tasks[name]
    }


def _has_public_mean(values: Mapping[str, Any], task: Mapping[str, Any]) -> bool:
    """Returns true for a task on a backbone whose features are centred by a declared public mean."""
    several = _as_mapping(values.get("backbones"))
    spec = values.get("backbone") or several.get(task.get("backbone") or next(iter(several), ""))
    return declares_public_mean(_as_mapping(spec))


def _read_privacy(value: Any) -> Privacy | None:
    return None if value == "non_private" else Privacy.model_validate(value)


def _has_hidden_layer(spec: Mapping[str, Any]) -> bool:
    head = _as_mapping(spec.get("head"))
    return head.get("hidden") is not None or head.get("pooling") is not None


def _choose_head(task: Task, spec: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a task's head; what the file sets stays."""
    chosen: dict[str, Any] = {}
    # Features of a backbone that trains have no mean that could be measured before.
    backbone = spec.get("backbone") or next(iter(_as_mapping(values.get("backbones"))), ONLY_BACKBONE)
    trained = backbone in _as_mapping(values.get("trainable"))
    of_vectors = not (trained or pools_items(task))
    if isinstance(task, SmoothLoss) and task.centres and of_vectors and not _has_public_mean(values, spec):
        chosen["centre"] = True
    if isinstance(task, LabelPrior):
        chosen |= {"bias": False, "prior": True}
    return {**chosen, **_as_mapping(spec.get("head"))}


def _choose_moments(heads: Iterable[Mapping[str, Any]], asked: Mapping[str, Any]) -> Moments | None:
    """Returns the parts of what some head uses, and what the file asks for beside them; None where there are none.

    Args:
        heads: settings of the heads.
        asked: `classes` and `scatter` as the file has them.
    """
    settings = list(heads)
    means = MEANS if any(head.get("centre") for head in settings) else 0.0
    counts = COUNTS if any(head.get("prior") for head in settings) else 0.0
    return Moments.model_validate({"means": means, "counts": counts, **asked}) if means or counts or asked else None


def _choose_clip_norm(tasks: Mapping[str, Task]) -> float:
    """Returns a clip norm for all tasks of a unit together, whose features have a length of 1."""
    slopes = [task.scale * expect_slope(task) for task in tasks.values() if isinstance(task, SmoothLoss)]
    return round(CLIP_SHARE * math.hypot(*slopes), 4) or 1.0


def _choose_solver(
    privacy: Privacy | None, clip_norm: float, trains_network: bool, trains_trunk: bool
) -> dict[str, Any]:
    rate = FREE_TRUNK_RATE if privacy is None else TRUNK_RATE
    trunk = {"trunk": {"learning_rate": rate}} if trains_trunk else {}
    if privacy is None:
        return {"kind": "sgd", "sampling_rate": 1.0, "steps": 1, "learning_rate": 1.0, **trunk}
    if not trains_network:
        return {"kind": "head_sum", "clip_norm": clip_norm}
    one_step = {"sampling_rate": 1.0, "steps": 1, "clip_norm": clip_norm, "learning_rate": 1.0}
    return {"kind": "dp_sgd", **one_step, **trunk}


def _choose_aggregation(
    tasks: Mapping[str, Task], left: Privacy | None, clip_norm: float, rounds: int
) -> dict[str, Any]:
    steps = {}
    for name, task in tasks.items():
        if not isinstance(task, SmoothLoss):
            raise ValueError(
                f"solver: expected a kind with settings, because `auto` has no rule for task {name} of kind {task.kind}"
            )
        steps[name] = {**_choose_step(task, rounds), "rho": task.tolerated_noise}
    noise = 0.0
    if left is not None:
        noise = round(choose_noise_multiplier(left, 1.0, rounds) * clip_norm, 6)
    return {"kind": "heavy_ball", "rounds": rounds, "noise": noise, "tasks": steps}


def _choose_step(task: Task, rounds: int) -> dict[str, float]:
    """Returns the largest step of a task's head, and its largest momentum where that is not the usual one.

    Gradient descent with momentum m diverges from steps of 2 (1 + m) over the curvature by the weights. Where that
    never falls, the step is one over its bound, which leaves room for declared sizes below the true ones.
    """
    assert isinstance(task, SmoothLoss)  # The caller has refused others.
    smoothness = task.scale * task.smoothness
    calm = {"most_momentum": round(min(Momentum.model_fields["most_momentum"].default, math.exp(-CALM / rounds)), 6)}
    if isinstance(task, ConstantCurvature):
        return {"step": round(1.0 / (smoothness * task.squared_length), 6), **calm}
    # A smoothed loss has its least at outputs of finite length, where its curvature is left; where a loss changes
    # on the way, what was gathered under the first has to be forgotten.
    smoothed = bool(getattr(task, "smoothing", 0.0))
    is_calm = smoothed or isinstance(task, ChangesWithRounds) or (isinstance(task, StaysCurved) and task.stays_curved)
    return {"step": round(STEP / smoothness, 6), **(calm if is_calm else {})}


def _explain(chosen: Mapping[str, Any], trains_network: bool, scales: Mapping[str, float]) -> tuple[str, ...]:
    solver, aggregation, moments = chosen["solver"], chosen["aggregation"], chosen.get("moments")
    what = "a network or hidden layer trains" if trains_network else "all heads are linear"
    reasons = [f"solver {solver['kind']}: {what}, and one noised sum a round leaves the step to the coordinator"]
    reasons.append(
        f"rounds {chosen['rounds']}: more change little, because the step follows from the noise, and fewer stop early"
    )
    tolerated = " or ".join(f"{rho:g}" for rho in sorted({each["rho"] for each in aggregation["tasks"].values()}))
    reasons.append(
        f"aggregation heavy_ball: its step adds noise of about {tolerated} to an output, whatever the sizes and "
        f"epsilon are; one site's sum has noise of deviation {aggregation['noise']:g}"
    )
    reasons += [
        f"scale {scale:g} of {name}: its gradients soon are short, and tasks share one clip norm about equally"
        for name, scale in scales.items()
    ]
    if moments is not None:
        parts = {
            "the mean of features": moments["means"],
            "the labels' frequencies": moments["counts"],
            "the classes' features": moments.get("classes", 0.0),
            "products of features": moments.get("scatter", 0.0),
        }
        measured = " and ".join(f"{part:.0%} of the run's mu^2 measure {what}" for what, part in parts.items() if part)
        reasons.append(f"moments: {measured}, which gradients then need not repeat")
    return tuple(reasons)
