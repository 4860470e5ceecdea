"""Baselines: what the federated private result is compared with.

They exist in simulations only, because each needs what no deployed party may see. A baseline's metrics are those of all
sites' held-out records together.

| baseline | data | privacy | training |
|---|---|---|---|
| baseline_prediction | all records in one place | none | none: majority, distance to the mean normal record, features |
| local | each site's own | the run's | the run's solver and rounds, at one site alone; mean over sites |
| non_private | federated | none | `non_private_solver`, or the run's without clip and noise; same rounds |
| central | all records in one place | none | as non_private |
| random_backbone | federated | the run's | the same run on the same architecture with random weights |
| untouched | none | none | none: what the whole pre-trained model hears in recordings, with its own decoder |
| untouched_restricted | none | none | the same, allowed nothing but pieces of the task's symbols |
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from client.config import SiteConfig
from client.data.units import TaskRecords, Units
from client.personal.local_heads import ApplyUpdate, LocalTraining, adjust_updates, train_alone
from client.solvers import open_solver
from common.model.backbones import Backbone, open_backbones, open_random
from common.model.momentum import Momentum
from common.model.trunks import create_modules
from common.plugins import Plugin
from common.run import AggregationSpec, RunConfig, SolverSpec
from common.tasks import Task
from common.types import Heads, Params
from server.rounds.aggregators import State, Weighted, open_aggregator
from simulations.config import RUN_PREFIX, SimulationConfig
from simulations.evaluate import (
    MOST_SITES,
    HeadEvaluation,
    average_evaluations,
    evaluate_baseline_predictions,
)
from simulations.executors.gathered import build_for_executor, list_declared_sizes, open_judged, open_sides
from simulations.federate import Experiment, evaluate_heads, federate
from simulations.public.untouched import compute_untouched

TaskMetrics = dict[str, HeadEvaluation]
"""Task name -> metrics on the held-out records of all sites together, with their spreads."""


def compute_baseline(name: str, experiment: Experiment, sites: Sequence[SiteConfig]) -> TaskMetrics:
    """Returns the metrics of one baseline.

    Args:
        name: name of the baseline.
        experiment: the simulation, after its own federation has ended.
        sites: sites of the simulation's own federation, whose prepared records are used again.
    """
    return _BASELINES[name](experiment, sites)


def pool_units(units: Mapping[str, Units], tasks: Mapping[str, Task]) -> Units:
    """Returns all sites' units in one place; records of different sites stay different units.

    Args:
        units: site name -> its units.
        tasks: tasks to pool, by name; at least one site has each.
    """
    num_units = sum(own.num_units for own in units.values())
    pooled = {}
    for name in tasks:
        parts, offset = [], 0
        for own in units.values():
            if name in own.tasks:
                parts.append((own.tasks[name], offset))
            offset += own.num_units
        pooled[name] = TaskRecords(
            torch.cat([part.features_RD for part, _ in parts]),
            torch.cat([part.labels for part, _ in parts]),
            torch.cat([part.mask_R for part, _ in parts]),
            torch.cat([part.unit_R + start for part, start in parts]),
            torch.cat([part.weight_R for part, _ in parts]),
            parts[0][0].trunk,
        )
    return Units(num_units, pooled)


def make_aggregation(run: RunConfig, sizes: Mapping[str, int]) -> ApplyUpdate:
    """Returns the run's aggregation of a single update, so that heads trained alone are comparable.

    An aggregator that needs several is given the same update as often as it needs.

    Args:
        run: the run.
        sizes: parameter group -> declared number of units.
    """
    states: dict[str, State] = {}

    def apply_update(group: str, params: Params, change: Params) -> Params:
        aggregator = open_aggregator(run.aggregation_of(group), "aggregation")
        state = states[group] if group in states else aggregator.start(params)
        weighted = [Weighted(sizes[group] / aggregator.min_updates, change)] * aggregator.min_updates
        new, states[group] = aggregator.update(params, state, weighted)
        return new

    return adjust_updates(run, apply_update)


def make_non_private_run(config: SimulationConfig) -> RunConfig:
    """Returns the run that the baselines without privacy train: with `non_private_solver`, or its own without privacy.

    An aggregation whose steps follow from the noise takes those of a run that has none.
    """
    run, solver = config.run, config.non_private_solver
    if solver is None:
        own = open_solver(run.solver, f"{RUN_PREFIX}solver").without_privacy()
        assert isinstance(own, Plugin)  # Every opened kind is one.
        solver = SolverSpec.model_validate(own.model_dump(exclude_unset=True))
    aggregation = run.aggregation
    if isinstance(open_aggregator(run.aggregation_of(None), f"{RUN_PREFIX}aggregation"), Momentum):
        tasks = {name: {**own, **({"noise": 0.0} if "noise" in own else {})} for name, own in aggregation.tasks.items()}
        quiet = {**aggregation.model_dump(), "noise": 0.0, "tasks": tasks}
        aggregation = AggregationSpec.model_validate(quiet)
    changes = {"solver": solver, "privacy": "non_private", "aggregation": aggregation, "evaluation": None}
    return run.model_copy(update=changes)


# --- the baselines ---------------------------------------------------------------------------------------------------


def _compute_baseline_prediction(experiment: Experiment, sites: Sequence[SiteConfig]) -> TaskMetrics:
    train = _open_training_units(experiment, sites)
    judging = experiment.config.list_judging_sites(sites)
    held_out, _ = open_judged(experiment.config, judging, experiment.run_id, experiment.tasks)
    return evaluate_baseline_predictions(_select_tasks(experiment, train), train, held_out)


def _compute_local(experiment: Experiment, sites: Sequence[SiteConfig]) -> TaskMetrics:
    run = experiment.config.run
    train = _open_training_units(experiment, sites)
    declared = list_declared_sizes(experiment.config, sites)
    results: dict[str, list[HeadEvaluation]] = {}
    for site, units in train.items():
        tasks = {name: task for name, task in experiment.tasks.items() if name in declared[site]}
        sizes = {name: declared[site][name] for name in tasks}
        heads = _train_alone(experiment, run, tasks, units, sizes, purpose=f"local/{site}")
        # Of thousands of sites a bootstrap each would take hours.
        metrics = evaluate_heads(
            experiment,
            heads,
            sites,
            run_id=experiment.run_id,
            backbones=experiment.backbones,
            intervals=len(train) <= MOST_SITES,
        )
        for task, values in metrics.items():
            results.setdefault(task, []).append(values)
        experiment.observe("baseline local", len(next(iter(results.values()))), len(train))
    return {task: average_evaluations(each) for task, each in results.items()}


def _compute_central(experiment: Experiment, sites: Sequence[SiteConfig]) -> TaskMetrics:
    train = _open_training_units(experiment, sites)
    tasks, declared = _select_tasks(experiment, train), list_declared_sizes(experiment.config, sites)
    sizes = {name: sum(own[name] for site, own in declared.items() if site in train and name in own) for name in tasks}
    run = make_non_private_run(experiment.config)
    heads = _train_alone(experiment, run, tasks, pool_units(train, tasks), sizes, purpose="central")
    return _evaluate_pooled(experiment, heads, sites, experiment.run_id, experiment.backbones)


def _compute_non_private(experiment: Experiment, sites: Sequence[SiteConfig]) -> TaskMetrics:
    del sites  # Their files do not allow a run without privacy.
    run = make_non_private_run(experiment.config)
    return _federate_again(experiment, run, backbones=experiment.backbones, name="non_private")


def _compute_random_backbone(experiment: Experiment, sites: Sequence[SiteConfig]) -> TaskMetrics:
    del sites  # Their ledgers hold the simulation's own run.
    run = experiment.config.run.model_copy(update={"evaluation": None})
    backbones = open_backbones(run, RUN_PREFIX, opened_by=partial(open_random, seed=run.seed))
    return _federate_again(experiment, run, backbones=backbones, name="random_backbone")


def _compute_untouched(experiment: Experiment, sites: Sequence[SiteConfig], *, restricted: bool) -> TaskMetrics:
    config = experiment.config
    found = compute_untouched(
        config.run,
        experiment.tasks,
        config.list_judging_sites(sites),
        restricted=restricted,
        observe=experiment.observe,
    )
    return {task: HeadEvaluation(metrics, {}) for task, metrics in found.items()}


_BASELINES: Mapping[str, Callable[[Experiment, Sequence[SiteConfig]], TaskMetrics]] = {
    "baseline_prediction": _compute_baseline_prediction,
    "local": _compute_local,
    "non_private": _compute_non_private,
    "central": _compute_central,
    "random_backbone": _compute_random_backbone,
    "untouched": partial(_compute_untouched, restricted=False),
    "untouched_restricted": partial(_compute_untouched, restricted=True),
}


# --- their parts -----------------------------------------------------------------------------------------------------


def _open_training_units(experiment: Experiment, sites: Sequence[SiteConfig]) -> dict[str, Units]:
    """Returns the training units of each site that trains."""
    training = experiment.config.list_training_sites(sites)
    return open_sides(experiment.config, training, experiment.run_id, experiment.tasks, "train")


def _select_tasks(experiment: Experiment, units: Mapping[str, Units]) -> dict[str, Task]:
    """Returns the tasks that at least one site has prepared."""
    return {name: task for name, task in experiment.tasks.items() if any(name in own.tasks for own in units.values())}


def _train_alone(
    experiment: Experiment,
    run: RunConfig,
    tasks: Mapping[str, Task],
    units: Units,
    sizes: Mapping[str, int],
    *,
    purpose: str,
) -> Heads:
    """Returns heads trained on these units alone, with a run's rounds and its aggregation of one update."""
    solver = open_solver(run.solver, f"{RUN_PREFIX}solver")
    training = LocalTraining(
        run=run,
        solver=solver,
        plan=solver.plan(run.training_privacy, experiment.config.unit, run.rounds),
        rounds=run.rounds,
        tasks=tasks,
        units=units,
        public_sizes=run.parameter_group_sizes(sizes),
    )
    return train_alone(
        training,
        create_modules(run, tasks, experiment.backbones),
        entropy=experiment.entropy,
        purpose=purpose,
        apply_update=make_aggregation(run, training.public_sizes),
    )


def _federate_again(
    experiment: Experiment, run: RunConfig, *, backbones: Mapping[str, Backbone], name: str
) -> TaskMetrics:
    """Runs the federation under other conditions, with sites and ledgers of its own, and returns its metrics."""
    folder = experiment.folder / "baselines" / name
    shutil.rmtree(folder, ignore_errors=True)  # Left by an attempt that was interrupted.
    folder.mkdir(parents=True)
    sites = build_for_executor(experiment.config, folder / "sites", non_private=run.requested_privacy is None)
    outcome = federate(experiment, run, sites, backbones=backbones, folder=folder)
    return _evaluate_pooled(experiment, outcome.heads, sites, folder.name, backbones)


def _evaluate_pooled(
    experiment: Experiment,
    heads: Heads,
    sites: Sequence[SiteConfig],
    run_id: str,
    backbones: Mapping[str, Backbone],
) -> TaskMetrics:
    return evaluate_heads(experiment, heads, sites, run_id=run_id, backbones=backbones, intervals=True)
