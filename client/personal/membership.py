"""Membership inference on a run's final heads, at the site that has the records: members trained them, others did not.

Two attacks by somebody who has the model, a unit's records and their labels:

* loss: a unit whose mean loss is below that of the members is taken for one (Yeom et al. 2018);
* LiRA, offline: the same loss compared with that of heads which were trained without the unit, on random halves of the
  site's units, without privacy, by the run's own solver (Carlini et al. 2022, Section VI), with one spread for all.

Nothing is sent and nothing is charged: the results are computed from records without noise, and stay here until an
output checker lets them out.

# Shapes: U units, S shadow heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from client.audit.membership import Scores
from client.audit.statistics import Bools, Floats
from client.data.prepare import open_units
from client.data.units import TaskRecords, Units
from client.personal.evaluate import load_final_heads
from client.personal.local_heads import LocalTraining, make_local_steps, train_alone
from client.protocol.site import Joined, Site, joined_run, load_modules, open_on_stored
from client.solvers import open_solver
from common.model.parameters import load_parameters
from common.model.trunks import create_modules
from common.tasks import Task, force_outputs
from common.types import BadInput

NUM_SHADOWS = 16
LOSS_ATTACK = "Loss threshold attack"
LIRA = "LiRA Attack"
_SMALLEST = 1e-16

Progress = Callable[[str, int, int], None]
"""(phase, steps done, steps in all)."""


@dataclass(frozen=True)
class AttackedUnits:
    """One task's attack scores at one site, NaN where a unit cannot be scored.

    Attributes:
        member_U: whether the unit took part in training.
        confidence_U: logit of the probability that the final head gave the unit's labels.
        shadow_U: the same, less what heads give it that were trained without it, in multiples of their spread; NaN
            where there are no such heads.
    """

    member_U: Bools
    confidence_U: Floats
    shadow_U: Floats


def attack_heads(site: Site, run_id: str, observe: Progress) -> dict[str, AttackedUnits]:
    """Returns the scores of every unit of the site, by task; tasks without labelled units on both sides are left out.

    Args:
        site: the site.
        run_id: id of the run, which has ended.
        observe: receives the progress.

    Raises:
        BadInput: the run's data are gone, or nothing is held out.
        DigestMismatch: the heads on disk are not those that were sent.
    """
    joined = joined_run(site, run_id)
    tasks, final = open_on_stored(site, joined), load_final_heads(joined.folder)
    sides = [open_units(joined.folder / "data", side, list(tasks), torch.device("cpu")) for side in ("train", "test")]
    if sides[1].num_units == 0:
        raise BadInput("split: expected held-out units to compare members with, got none; use --no-attack")
    modules = load_modules(site, joined, tasks, final)
    own = join_units(sides[0], sides[1])
    member_U = np.arange(own.num_units) < sides[0].num_units
    read = own.passed(modules).tasks
    target = {name: rate_units(task, modules[name], read[name], own.num_units) for name, task in tasks.items()}
    shadows = _rate_by_shadows(site, joined, tasks, own, observe)
    found = {name: AttackedUnits(member_U, target[name], _compare(target[name], shadows[name])) for name in tasks}
    return {name: each for name, each in found.items() if _is_scored(each.confidence_U, member_U)}


def make_scores(sites: Mapping[str, AttackedUnits]) -> dict[str, Scores]:
    """Returns attack -> its scores of one task over the units of some sites; none where too few units are scored.

    Args:
        sites: site -> the scores of its units.
    """
    if not sites:
        return {}
    member_U = np.concatenate([each.member_U for each in sites.values()])
    confidence_U = np.concatenate([each.confidence_U for each in sites.values()])
    shadow_U = np.concatenate([each.shadow_U for each in sites.values()])
    members = confidence_U[member_U]
    named = {LOSS_ATTACK: (confidence_U, float(np.nanmean(members))), LIRA: (shadow_U, 0.0)}
    return {
        name: Scores(_keep_known(score_U[member_U]), _keep_known(score_U[~member_U]), threshold)
        for name, (score_U, threshold) in named.items()
        if _is_scored(score_U, member_U)
    }


def _is_scored(score_U: Floats, member_U: Bools) -> bool:
    return all(int(np.isfinite(score_U[side_U]).sum()) >= 2 for side_U in (member_U, ~member_U))


def _keep_known(scores: Floats) -> Floats:
    return scores[np.isfinite(scores)]


def join_units(first: Units, second: Units) -> Units:
    """Returns the units of both sides; those of the second are numbered after the first's.

    Args:
        first: some units.
        second: others, with the same tasks.
    """
    tasks = {}
    for name, one in first.tasks.items():
        two = second.tasks[name]
        tasks[name] = replace(
            one,
            features_RD=torch.cat([one.features_RD, two.features_RD]),
            labels=torch.cat([one.labels, two.labels]),
            mask_R=torch.cat([one.mask_R, two.mask_R]),
            unit_R=torch.cat([one.unit_R, two.unit_R + first.num_units]),
            weight_R=torch.cat([one.weight_R, two.weight_R]),
        )
    return Units(first.num_units + second.num_units, tasks)


def take_units(units: Units, chosen_U: Bools) -> Units:
    """Returns some of the units, numbered anew."""
    chosen = torch.from_numpy(chosen_U)
    number_U = chosen.cumsum(0) - 1
    tasks = {}
    for name, records in units.tasks.items():
        rows = chosen[records.unit_R].nonzero().squeeze(1)
        tasks[name] = records.taken(rows, number_U[records.unit_R])
    return Units(int(chosen.sum()), tasks)


def rate_units(task: Task, head: nn.Module, records: TaskRecords, num_units: int) -> Floats:
    """Returns the logit of exp(-mean loss) of each unit's labelled records; NaN for a unit that has no loss.

    Args:
        task: the task.
        head: the task's head.
        records: the units' records of the task, with the features that the head reads.
        num_units: number of units.
    """
    labelled = records.labelled()
    with torch.inference_mode():
        outputs = force_outputs(task, head, labelled.features_RD, labelled.labels)
        loss_R = task.losses(outputs, labelled.labels).double()
        # Some tasks train on a part of their labels; a record whose loss is zero for any head has no part in it.
        has_loss_R = (loss_R != 0.0) | (task.losses(torch.zeros_like(outputs), labelled.labels) != 0.0)
    unit_R = labelled.unit_R[has_loss_R]
    total_U = torch.zeros(num_units, dtype=torch.float64).index_add_(0, unit_R, loss_R[has_loss_R])
    count_U = torch.bincount(unit_R, minlength=num_units)
    mean_U = (total_U / count_U).numpy()
    # log p - log(1 - p) of p = exp(-loss), without the rounding of a loss near 0 or of a large one.
    return np.asarray(-mean_U - np.log(np.maximum(-np.expm1(-mean_U), _SMALLEST)))


def _rate_by_shadows(
    site: Site, joined: Joined, tasks: Mapping[str, Task], units: Units, observe: Progress
) -> dict[str, Floats]:
    """Returns task -> confidence_SU of heads that were trained without the unit; NaN where it was among their units."""
    found = {name: np.full((NUM_SHADOWS, units.num_units), np.nan) for name in tasks}
    if any(joined.run.trunk_of(name) is not None for name in tasks):
        return found
    run = joined.run.model_copy(update={"privacy": "non_private"})
    solver = open_solver(joined.run.solver, "solver").without_privacy()
    plan = solver.plan(None, site.config.unit, run.rounds)
    backbones = {name: site.backbones().open(digest) for name, digest in joined.digests(tasks).items()}
    # Any key will do: nothing that is drawn here protects anybody.
    draw = np.random.default_rng(list(site.entropy(f"membership/{joined.run_id}")))
    for shadow in range(NUM_SHADOWS):
        observe("attack: heads on random halves", shadow, NUM_SHADOWS)
        inside_U = draw.permutation(units.num_units) < units.num_units // 2
        half = take_units(units, inside_U)
        sizes = run.parameter_group_sizes({name: max(1, half.num_units) for name in tasks})
        training = LocalTraining(run, solver, plan, run.rounds, tasks, half, sizes)
        modules = create_modules(run, tasks, backbones)
        heads = train_alone(
            training,
            modules,
            entropy=site.entropy,
            purpose=f"membership/{joined.run_id}/{shadow}",
            apply_update=make_local_steps(run, sizes),
        )
        for name, task in tasks.items():
            load_parameters(modules[name], heads[name])
            rated_U = rate_units(task, modules[name], units.tasks[name], units.num_units)
            found[name][shadow] = np.where(inside_U, np.nan, rated_U)
    observe("attack: heads on random halves", NUM_SHADOWS, NUM_SHADOWS)
    return found


def _compare(confidence_U: Floats, shadow_SU: Floats) -> Floats:
    """Returns confidences less their mean without the unit, in multiples of the spread around those means."""
    known_U = np.isfinite(shadow_SU).sum(axis=0)
    total_U = np.nansum(shadow_SU, axis=0)
    mean_U = np.where(known_U > 0, total_U / np.maximum(known_U, 1), np.nan)
    spread = np.sqrt(np.nanmean((shadow_SU - mean_U) ** 2)) if known_U.sum() > 0 else np.nan
    return np.asarray((confidence_U - mean_U) / (spread + _SMALLEST))
