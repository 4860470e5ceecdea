"""The federation of a simulation: the coordinator's and the sites' own code on the executor that its file names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flwr.serverapp import Grid

from client.app import make_app
from client.config import SiteConfig
from client.data.prepare import Encoding, Preparation, prepare
from client.data.units import Units
from client.protocol.site import Site
from client.solvers import open_solver
from common.events import FileJournal, RoundEvaluated, RunPrepared
from common.files import without_flushing
from common.model.backbones import Backbone
from common.model.parameters import load_parameters
from common.model.trunks import freeze_parts, trunks
from common.offers import list_digests
from common.privacy.noise import Entropy, os_entropy
from common.run import RunConfig
from common.tasks import Task, open_on_backbones
from common.types import Heads
from server.rounds.checkpoint import Checkpoint
from server.rounds.loop import AfterRound, Outcome, run_federation
from server.rounds.messenger import Observe
from simulations.config import RUN_PREFIX, SimulationConfig
from simulations.evaluate import (
    HeadEvaluation,
    count_points,
    evaluate,
    evaluate_pooled,
    is_evaluated_after,
    locate_prepared_data,
)
from simulations.executors.alike import Gathering
from simulations.executors.batched import BatchedSites
from simulations.executors.flower import run_on_flower
from simulations.executors.gathered import open_judged, read_gathered
from simulations.executors.in_process import InProcessGrid
from simulations.executors.ray_shards import open_on_ray
from simulations.executors.shards import LocalShards, OpenShards


def ignore_progress(phase: str, done: int, total: int) -> None:
    """Does nothing with the progress of a run.

    Args:
        phase: name of what is under way.
        done: number of steps done.
        total: number of steps in all.
    """
    del phase, done, total


@dataclass(frozen=True)
class Experiment:
    """A simulation that runs.

    Attributes:
        config: the simulation's settings.
        tasks: task name -> opened task.
        backbones: backbone name -> opened backbone.
        folder: folder of the run; its name is the run's id.
        entropy: source of the keys of sampling and noise.
        observe: receives the progress: phase, number of steps done, number of all steps.
    """

    config: SimulationConfig
    tasks: Mapping[str, Task]
    backbones: Mapping[str, Backbone]
    folder: Path
    entropy: Entropy
    observe: Observe

    @property
    def journal(self) -> FileJournal:
        """The run's journal."""
        return FileJournal(self.folder / "journal.jsonl")

    @property
    def digests(self) -> Mapping[str, str]:
        """Digest of each of the run's backbones, by name."""
        return list_digests(self.backbones)

    @property
    def run_id(self) -> str:
        """Id of the run."""
        return self.folder.name


def open_on(run: RunConfig, tasks: Mapping[str, Task], backbones: Mapping[str, Backbone]) -> dict[str, Task]:
    """Returns tasks with what their backbones know of texts (`common.tasks.open_on_backbones`).

    Args:
        run: the run.
        tasks: some of its tasks by name.
        backbones: backbone name -> opened backbone.
    """
    return open_on_backbones(tasks, {name: backbones[run.backbone_of(name)].language for name in tasks})


def federate(
    experiment: Experiment,
    run: RunConfig,
    sites: Sequence[SiteConfig],
    *,
    backbones: Mapping[str, Backbone],
    folder: Path,
    resume: Checkpoint | None = None,
) -> Outcome:
    """Runs a federation of simulated sites and returns its final heads.

    Args:
        experiment: the simulation, for its executor, its entropy and its observer.
        run: the run to train; a baseline's differs from the simulation's own.
        sites: the sites, in the order of their nodes; one that the simulation leaves out only prepares its records.
        backbones: backbone name -> opened backbone.
        folder: folder of the journal and the checkpoint; its name is the run's id.
        resume: checkpoint after which the run continues; None for a new run.

    Raises:
        RunFailed: too few sites joined or could be prepared.
    """
    # All simulated sites run the same code with the same unit: one audit, made before, holds for all of them.
    run = run.model_copy(update={"audit": "on_request"})
    if "patience_s" not in run.cohort.model_fields_set:
        # A simulated site that failed does not come back.
        run = run.model_copy(update={"cohort": run.cohort.model_copy(update={"patience_s": 0.0})})
    if experiment.config.executor.kind == "batched":
        return _federate_batched(experiment, run, sites[0], backbones=backbones, folder=folder, resume=resume)
    by_position = experiment.config.list_training_sites(sites)
    for site in sites:
        if site not in by_position:
            _prepare_unasked(experiment, run, site, backbones, folder.name)
    executor = experiment.config.executor
    # Ray's actors are other processes: they open backbones themselves.
    opened = {one.digest: one for one in backbones.values()} if executor.kind == "in_process" else None
    app = make_app(
        lambda context: by_position[int(context.node_config["partition-id"])],
        experiment.entropy,
        opened,
        None if opened is None else lambda done, total: experiment.observe("encoding", done, total),
    )

    journal = FileJournal(folder / "journal.jsonl")
    evaluate_round = _make_evaluation(experiment, run, sites, journal, backbones, folder.name)

    def coordinate(grid: Grid) -> Outcome:
        return run_federation(
            grid,
            run,
            backbones,
            run_id=folder.name,
            folder=folder,
            journal=journal,
            executor=executor.kind,
            observe=experiment.observe if folder == experiment.folder else ignore_progress,
            resume=resume,
            after_round=evaluate_round,
        )

    if executor.kind == "flower":
        return run_on_flower(app, len(by_position), executor, coordinate)
    # A power cut may cost a simulation its run: its ledgers protect nobody.
    with without_flushing():
        return coordinate(InProcessGrid(app, len(by_position)))


def _make_evaluation(
    experiment: Experiment,
    run: RunConfig,
    sites: Sequence[SiteConfig],
    journal: FileJournal,
    backbones: Mapping[str, Backbone],
    run_id: str,
) -> AfterRound:
    """Returns what evaluates the heads after a round, where that is due, and writes it to the journal."""
    opened: list[tuple[dict[str, Units], bool]] = []

    def evaluate_round(round_: int, heads: Heads) -> None:
        asked = {
            name
            for name, task in experiment.tasks.items()
            if is_evaluated_after(round_, run.rounds, count_points(task))
        }
        if asked:
            tasks, held_out, _ = _open_held_out(experiment, heads, sites, run_id, backbones, opened)
            tasks = {name: task for name, task in tasks.items() if name in asked}
            for task, pooled in evaluate_pooled(heads, tasks, held_out).items():
                journal.write(RoundEvaluated(round=round_, task=task, pooled=pooled))

    return evaluate_round


def _federate_batched(
    experiment: Experiment,
    run: RunConfig,
    site: SiteConfig,
    *,
    backbones: Mapping[str, Backbone],
    folder: Path,
    resume: Checkpoint | None,
) -> Outcome:
    """Runs a federation whose sites are rows of arrays (`simulations.executors.batched`)."""
    sites = open_batched(experiment, run, site, backbones, folder.name)
    journal = FileJournal(folder / "journal.jsonl")
    try:
        # As below, but for the ledger's lines: these are put on the disk before anything is computed from a record.
        with without_flushing():
            return run_federation(
                InProcessGrid(sites.answer, len(sites)),
                run,
                backbones,
                run_id=folder.name,
                folder=folder,
                journal=journal,
                executor=experiment.config.executor.kind,
                observe=experiment.observe if folder == experiment.folder else ignore_progress,
                resume=resume,
                after_round=_make_evaluation(experiment, run, [site], journal, backbones, folder.name),
                at_hand=sites,
            )
    finally:
        sites.close()


def open_batched(
    experiment: Experiment, run: RunConfig, site: SiteConfig, backbones: Mapping[str, Backbone], run_id: str
) -> BatchedSites:
    """Returns the sites of a run as rows of arrays.

    Args:
        experiment: the simulation.
        run: the run.
        site: the one file of all sites.
        backbones: backbone name -> opened backbone.
        run_id: id of the run.
    """

    def prepare_all() -> None:
        preparation = _prepare_unasked(experiment, run, site, backbones, run_id)
        left_out = {(each.file, each.row) for each in preparation.problems if each.row and not each.is_used}
        event = RunPrepared(
            run_id=run_id,
            num_left_out=len(left_out),
            num_records=preparation.num_records,
            num_usable=max(0, preparation.num_records - len(left_out)),
            precision_error=preparation.precision_error,
        )
        FileJournal(site.state_dir / "site.jsonl").write(event)

    gathering = Gathering(
        site,
        read_gathered(experiment.config, site),
        run_id,
        run,
        {name: (backbone.feature_dim, backbone.digest) for name, backbone in backbones.items()},
        experiment.entropy,
        open_on(run, experiment.tasks, backbones),
        experiment.config.executor,
        open_solver(run.solver, f"{RUN_PREFIX}solver"),
    )
    executor = experiment.config.executor
    open_shards: OpenShards = LocalShards if executor.shards == 1 else open_on_ray(executor)
    return BatchedSites(gathering, prepare_all, open_shards, executor.shards)


def list_epsilons(experiment: Experiment, sites: Sequence[SiteConfig]) -> dict[str, float]:
    """Returns epsilon of the simulation's own run at each site that trains, from its ledger.

    Args:
        experiment: the simulation.
        sites: its sites.
    """
    if experiment.config.executor.kind == "batched":
        run, (site,) = experiment.config.run, sites
        return open_batched(experiment, run, site, experiment.backbones, experiment.run_id).list_epsilons()
    return {
        site.name: Site(site, os_entropy).ledger().compute_run_epsilon(experiment.run_id)
        for site in experiment.config.list_training_sites(sites)
    }


def _prepare_unasked(
    experiment: Experiment, run: RunConfig, site: SiteConfig, backbones: Mapping[str, Backbone], run_id: str
) -> Preparation:
    """Encodes the records of a site that is sent no message, so that heads can be trained or judged on them."""
    tasks = {name: task for name, task in experiment.tasks.items() if name in site.tasks}
    frozen = freeze_parts(run, backbones)
    opened = Site(site, experiment.entropy)
    return prepare(
        site,
        tasks,
        {name: frozen[run.backbone_of(name)] for name in tasks},
        Encoding(opened.features(), opened.device(), lambda done, total: experiment.observe("encoding", done, total)),
        locate_prepared_data(site, run_id),
    )


def evaluate_heads(
    experiment: Experiment,
    heads: Heads,
    sites: Sequence[SiteConfig],
    *,
    run_id: str,
    backbones: Mapping[str, Backbone],
    intervals: bool = False,
) -> dict[str, HeadEvaluation]:
    """Returns the metrics of heads on the held-out records of all sites that judge them, by task.

    Args:
        experiment: the simulation, for its tasks.
        heads: parameters of heads and trunks by name; tasks without a head are left out.
        sites: the sites; those that prepared nothing for the run are left out.
        run_id: id of the run for which the sites prepared their records.
        backbones: backbones that the trunks belong to.
        intervals: whether the spreads of the metrics are computed too.
    """
    tasks, held_out, is_by_site = _open_held_out(experiment, heads, sites, run_id, backbones)
    found = evaluate(heads, tasks, held_out, intervals=intervals)
    if is_by_site:
        return found
    return {name: replace(each, per_site={}, site_estimates={}) for name, each in found.items()}


def _open_held_out(
    experiment: Experiment,
    heads: Heads,
    sites: Sequence[SiteConfig],
    run_id: str,
    backbones: Mapping[str, Backbone],
    opened: list[tuple[dict[str, Units], bool]] | None = None,
) -> tuple[dict[str, Task], dict[str, Units], bool]:
    """Returns the tasks that have a head, and held-out units with the features that these heads read.

    The last value says whether the units are those of each site by itself (`open_judged`).

    Args:
        experiment: the simulation.
        heads: parameters of heads and trunks by name.
        sites: the sites.
        run_id: id of the run for which the sites prepared their records.
        backbones: backbones that the trunks belong to.
        opened: keeps the units of gathered sites from one call to the next; thousands of them take a while to divide.
    """
    run = experiment.config.run
    tasks = open_on(run, {name: task for name, task in experiment.tasks.items() if name in heads}, backbones)
    trained = {name: trunk for name, trunk in trunks(run, backbones).items() if name in heads}
    for name, trunk in trained.items():
        load_parameters(trunk, heads[name])
    judging = experiment.config.list_judging_sites(sites)
    held_out, is_by_site = opened[0] if opened else open_judged(experiment.config, judging, run_id, tasks)
    if opened == [] and experiment.config.executor.kind == "batched":
        opened.append((held_out, is_by_site))
    return tasks, {site: units.passed(trained) for site, units in held_out.items()}, is_by_site
