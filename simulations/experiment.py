"""One simulation from its settings to its summary: sites, federation, evaluation, baselines, report.

Invariant: everything a report says is in the run's journal; everything the run used is in its folder.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flwr.serverapp import Grid

from client.app import make_app
from client.config import SiteConfig
from client.data.prepare import PROBLEMS
from client.data.records import check_values
from client.data.sources import open_source
from client.data.units import Units
from client.personal.local_heads import LocalTraining, train_alone
from client.personal.metrics import Metrics
from client.protocol.requirements import untrained_modules
from client.protocol.site import Site
from client.solvers import Solver, open_solver
from common.backbones import Backbone, open_random
from common.events import (
    BaselineEvaluated,
    EpsilonSpent,
    FileJournal,
    MetricsEvaluated,
    RecordsLeftOut,
    RequestDeclined,
    RunPrepared,
    SolverAudited,
    Summary,
    read_site_journal,
    select_events,
)
from common.files import without_flushing
from common.model.backbones import absolute, digests_of, open_backbones
from common.model.parameters import load_parameters
from common.model.trunks import initial_modules, trunks
from common.plugins import Spec, resolve
from common.privacy.noise import Entropy, SeededEntropy, os_entropy
from common.run import Privacy, RunConfig
from common.tasks import Task, open_task
from common.types import BadInput, DeclineReason, Heads, Interrupted, RunFailed
from common.yaml import load, write_yaml
from server.reports.results import new_run_folder, write_environment, write_results
from server.rounds.aggregators import open_aggregator
from server.rounds.checkpoint import Checkpoint, load_checkpoint
from server.rounds.loop import Outcome, run_federation
from server.rounds.messenger import Observe
from simulations.baselines import aggregated_alone, pool
from simulations.config import SimulationConfig
from simulations.evaluate import Evaluation, evaluate, evaluate_baseline_predictions, run_data, units_of
from simulations.flower import run_on_flower
from simulations.in_process import InProcessGrid
from simulations.partition import build_sites, read_sites, source_settings

_IN_FILE = "run."
"""Where the run stands in a simulation's file."""


def _silent(phase: str, done: int, total: int) -> None:
    del phase, done, total


@dataclass(frozen=True)
class Experiment:
    """A simulation on its way: settings, opened parts, its folder, and who is told the progress."""

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
        """Of the run's backbones."""
        return digests_of(self.backbones)

    @property
    def run_id(self) -> str:
        """The run's id: its folder's name."""
        return self.folder.name

    @property
    def privacy(self) -> Privacy | None:
        """Requested privacy; None in a non-private run."""
        return self.config.run.requested_privacy


def check(config: SimulationConfig) -> Mapping[str, Task]:
    """Resolve every plug-in a simulation names, without running anything; its tasks.

    Raises:
        BadInput: the first setting that is wrong.
    """
    run = config.run
    absolute(run, _IN_FILE)  # Resolves every backbone.
    tasks = {name: open_task(spec, f"run.tasks.{name}") for name, spec in run.tasks.items()}
    for key, spec in source_settings(config).items():
        open_source(spec, key)
    solver = open_solver(run.solver, "run.solver")
    open_aggregator(run.aggregation, "run.aggregation")
    privacy = run.requested_privacy
    if privacy is not None and privacy.unit != config.unit:
        raise BadInput(f"run.privacy.unit: expected the sites' unit {config.unit.value!r}, got {privacy.unit.value!r}")
    solver.plan(privacy, config.unit, run.rounds)
    solver.check_modules(untrained_modules(run, tasks))
    for name, task in tasks.items():
        check_values(name, task, config.tasks[name])
    if run.audit == "required" and privacy is None:
        raise BadInput("run.audit: expected a private run where an audit is required, got privacy: non_private")
    if config.non_private_solver is not None:
        other = open_solver(config.non_private_solver, "non_private_solver")
        if other.private:
            raise BadInput(f"non_private_solver.kind: expected a solver without privacy, got {other.kind!r}")
    return tasks


def run(
    config: SimulationConfig | Path | str,
    *,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    entropy: Entropy | None = None,
    observe: Observe = _silent,
) -> Summary:
    """Run a simulation and return its summary (its schema is in README).

    Args:
        config: a simulation, or the path of its file.
        out: the run's folder, new or empty; by default a new one under the simulation's `runs_dir`.
        overrides: "key.path=value", for a file.
        entropy: where noise keys come from, for tests; by default the operating system, or `noise_seed`.
        observe: told the progress.

    Raises:
        BadInput: a setting or input that is wrong.
        RunFailed: the run ended without a usable result.
    """
    if not isinstance(config, SimulationConfig):
        config = load(SimulationConfig, Path(config), overrides)
    tasks = check(config)
    backbones = open_backbones(config.run, _IN_FILE)
    folder = _new_folder(config, out)
    write_yaml(folder / "config.yaml", standalone(config))
    write_environment(folder / "environment.json", {"run": config.run.seed, "noise": config.noise_seed})
    sites = build_sites(config, folder / "sites", non_private=config.run.requested_privacy is None)
    experiment = Experiment(config, tasks, backbones, folder, entropy or _entropy(config), observe)
    return _complete(experiment, sites, resume=None)


def resume(folder: Path, *, entropy: Entropy | None = None, observe: Observe = _silent) -> Summary:
    """Continue a run whose process died, from its last whole round; ledgers are kept, never reset.

    Raises:
        BadInput: the folder is not a run's, or the run has already ended.
    """
    if not (folder / "config.yaml").is_file():
        raise BadInput(f"{folder}: there is no run at this path; `resume` takes the folder of an interrupted run")
    config = load(SimulationConfig, folder / "config.yaml")
    if (folder / "summary.json").exists():
        raise BadInput(f"{folder}: expected a run that was interrupted, got one that has ended")
    path = folder / "checkpoint.safetensors"
    checkpoint = load_checkpoint(path) if path.exists() else None
    if checkpoint is not None and checkpoint.run_id != folder.resolve().name:
        raise BadInput(f"{path}: expected a checkpoint of this run, got one of {checkpoint.run_id}")
    backbones = open_backbones(config.run, _IN_FILE)
    sites = read_sites(folder / "sites")
    experiment = Experiment(config, check(config), backbones, folder, entropy or _entropy(config), observe)
    return _complete(experiment, sites, checkpoint)


def write_files(config: SimulationConfig, folder: Path) -> list[SiteConfig]:
    """Write a simulation as the files of its two owners: `run.yaml` and `sites/<site>/site.yaml`, for `flwr run`.

    Raises:
        BadInput: a setting that is wrong, or a folder that is not empty.
    """
    check(config)
    _new_folder(config, folder)
    write_yaml(folder / "run.yaml", standalone(config).run)
    return build_sites(config, folder.resolve() / "sites", non_private=config.run.requested_privacy is None)


def standalone(config: SimulationConfig) -> SimulationConfig:
    """The same simulation with absolute paths: it means the same in whatever folder it is written."""

    def plain(spec: Spec) -> Spec:
        return Spec(**resolve("client.data.sources", spec, "").model_dump(mode="json", by_alias=True))

    sources = {name: plain(spec) for name, spec in config.sources.items()}
    sites = {
        site: {name: plain(spec) for name, spec in own.items()} for site, own in (config.partition.sites or {}).items()
    }
    partition = config.partition.model_copy(update={"sites": sites or None})
    # Pre-training is over when a run begins.
    run_ = absolute(config.run, _IN_FILE)
    return config.model_copy(update={"run": run_, "sources": sources, "partition": partition, "pretrain": None})


def _complete(experiment: Experiment, sites: list[SiteConfig], resume: Checkpoint | None) -> Summary:
    """Train, compare, write. Raises Interrupted on Ctrl-C, and says how to go on."""
    try:
        return _completed(experiment, sites, resume)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; `python -m simulations resume {experiment.folder}` continues the run after its last whole "
            "round"
        ) from None


def _completed(experiment: Experiment, sites: list[SiteConfig], resume: Checkpoint | None) -> Summary:
    config, run_ = experiment.config, experiment.config.run
    if config.on_bad_record == "stop":
        # A site that stops at a bad record stops the simulation, before anything is trained.
        cohort = run_.cohort.model_copy(update={"min_sites": len(sites)})
        run_ = run_.model_copy(update={"cohort": cohort})
    if run_.audit == "required":
        _audit(experiment)
    try:
        outcome = _federate(experiment, run_, experiment.backbones, sites, experiment.folder, resume)
    except RunFailed as error:
        write_results(experiment.folder, run_, experiment.digests, {})
        for site in sites:
            declined = _find_refusal(site)
            if declined is not None and declined.reason == DeclineReason.BAD_REQUEST:
                raise BadInput(f"{site.name}: {declined.detail}") from error
            if declined is not None:
                raise RunFailed(f"{error}; {site.name}: {declined.detail}") from error
        raise
    with without_flushing():  # A line for each site; the next one that is flushed puts them all on the disk.
        _write_left_out(experiment, sites)
        _write_epsilon(experiment, sites)
    _write_metrics(experiment, sites, outcome)
    for name in config.baselines:
        experiment.observe(f"baseline {name}", 0, 1)
        started = time.monotonic()
        metrics = _BASELINES[name](experiment, sites)
        seconds = round(time.monotonic() - started, 3)
        experiment.journal.write(BaselineEvaluated(name=name, metrics=metrics, seconds=seconds))
        experiment.observe(f"baseline {name}", 1, 1)
    return write_results(experiment.folder, run_, experiment.digests, outcome.heads)


def _audit(experiment: Experiment) -> None:
    """Pass the audit before anything is trained or spent. Raises RunFailed; the summary then says failed."""
    from simulations.audit import audit_simulation, require_passed  # Here: it loads a third of a second of statistics.

    verdict = audit_simulation(experiment.config, experiment.observe, experiment.entropy)
    experiment.journal.write(SolverAudited(verdict=verdict))
    try:
        require_passed(verdict)
    except RunFailed:
        write_results(experiment.folder, experiment.config.run, experiment.digests, {})
        raise


def _new_folder(config: SimulationConfig, out: Path | None) -> Path:
    if out is None:
        return new_run_folder(config.runs_dir, config.run.name)
    if out.exists() and any(out.iterdir()):
        raise BadInput(f"--out {out}: expected a new or empty folder")
    out.mkdir(parents=True, exist_ok=True)
    return out.resolve()


def _entropy(config: SimulationConfig) -> Entropy:
    return os_entropy if config.noise_seed is None else SeededEntropy(config.noise_seed)


def _federate(
    experiment: Experiment,
    run_: RunConfig,
    backbones: Mapping[str, Backbone],
    sites: Sequence[SiteConfig],
    folder: Path,
    resume: Checkpoint | None = None,
) -> Outcome:
    """The same coordinator and site code on the executor the simulation names."""
    # The simulator's sites run one code with one unit: what is required was audited once, for all of them.
    run_ = run_.model_copy(update={"audit": "on_request"})
    by_position = list(sites)
    executor = experiment.config.executor
    # Ray's actors are other processes.
    opened = {one.digest: one for one in backbones.values()} if executor.kind == "in_process" else None
    app = make_app(lambda context: by_position[int(context.node_config["partition-id"])], experiment.entropy, opened)

    def coordinate(grid: Grid) -> Outcome:
        return run_federation(
            grid,
            run_,
            backbones,
            run_id=folder.name,
            folder=folder,
            journal=FileJournal(folder / "journal.jsonl"),
            executor=executor.kind,
            observe=experiment.observe if folder == experiment.folder else _silent,
            resume=resume,
        )

    if executor.kind == "flower":
        return run_on_flower(app, len(sites), executor, coordinate)
    # A power cut may cost a simulation its run; nobody's budget is kept in it.
    with without_flushing():
        return coordinate(InProcessGrid(app, len(sites)))


# --- what only a simulator sees --------------------------------------------------------------------------------------


def _find_refusal(site: SiteConfig) -> RequestDeclined | None:
    """Returns a site's last refusal from its own journal, with the detail that a coordinator never learns."""
    declined = select_events(read_site_journal(site.state_dir / "site.jsonl"), RequestDeclined)
    return declined[-1] if declined else None


def _write_left_out(experiment: Experiment, sites: Sequence[SiteConfig]) -> None:
    for site in sites:
        prepared = select_events(read_site_journal(site.state_dir / "site.jsonl"), RunPrepared)
        if prepared and prepared[-1].num_left_out:
            path = run_data(site, experiment.run_id).with_name(PROBLEMS)
            event = RecordsLeftOut(site=site.name, num_records=prepared[-1].num_left_out, path=str(path))
            experiment.journal.write(event)


def _write_epsilon(experiment: Experiment, sites: Sequence[SiteConfig]) -> None:
    if experiment.privacy is None:
        return
    for site in sites:
        epsilon = Site(site, os_entropy).ledger().run_epsilon(experiment.run_id)
        if epsilon > 0:
            experiment.journal.write(EpsilonSpent(site=site.name, epsilon=epsilon))


def _write_metrics(experiment: Experiment, sites: Sequence[SiteConfig], outcome: Outcome) -> None:
    found = _evaluated(experiment, outcome.heads, sites, experiment.run_id, experiment.backbones)
    for task, result in found.items():
        per_site = {site: dict(values) for site, values in result.per_site.items()}
        experiment.journal.write(MetricsEvaluated(task=task, pooled=dict(result.pooled), per_site=per_site))


def _evaluated(
    experiment: Experiment,
    heads: Heads,
    sites: Sequence[SiteConfig],
    run_id: str,
    backbones: Mapping[str, Backbone],
) -> dict[str, Evaluation]:
    tasks = {name: task for name, task in experiment.tasks.items() if name in heads}
    own = {name: trunk for name, trunk in trunks(experiment.config.run, backbones).items() if name in heads}
    for name, trunk in own.items():
        load_parameters(trunk, heads[name])
    held_out = units_of(sites, run_id, tasks, "test")
    return evaluate(heads, tasks, {site: units.passed(own) for site, units in held_out.items()})


def _pooled(
    experiment: Experiment,
    heads: Heads,
    sites: Sequence[SiteConfig],
    run_id: str,
    backbones: Mapping[str, Backbone],
) -> dict[str, Metrics]:
    found = _evaluated(experiment, heads, sites, run_id, backbones)
    return {task: dict(result.pooled) for task, result in found.items()}


def _local(experiment: Experiment, sites: Sequence[SiteConfig]) -> dict[str, dict[str, float | None]]:
    """Each site alone with the same privacy: per task the mean over its sites, each on the pooled held-out records."""
    solver = open_solver(experiment.config.run.solver, "run.solver")
    train = units_of(sites, experiment.run_id, experiment.tasks, "train")
    results: dict[str, list[Metrics]] = {}
    for site in sites:
        if site.name not in train:
            continue
        tasks = {name: task for name, task in experiment.tasks.items() if name in site.tasks}
        sizes = {name: site.tasks[name].public_size for name in tasks}
        heads = _train_alone(experiment, solver, tasks, train[site.name], sizes, purpose=f"local/{site.name}")
        for task, values in _pooled(experiment, heads, sites, experiment.run_id, experiment.backbones).items():
            results.setdefault(task, []).append(values)
    return {task: _mean(values) for task, values in results.items()}


def _train_alone(
    experiment: Experiment,
    solver: Solver,
    tasks: Mapping[str, Task],
    units: Units,
    sizes: Mapping[str, int],
    *,
    purpose: str,
) -> Heads:
    """Returns heads trained on these units alone, with the run's own aggregation of one update."""
    run_ = experiment.config.run
    training = LocalTraining(
        solver=solver,
        plan=solver.plan(experiment.privacy if solver.private else None, experiment.config.unit, run_.rounds),
        rounds=run_.rounds,
        tasks=tasks,
        units=units,
        public_sizes=run_.parameter_group_sizes(sizes),
    )
    return train_alone(
        training,
        initial_modules(run_, tasks, experiment.backbones),
        entropy=experiment.entropy,
        purpose=purpose,
        apply_update=aggregated_alone(run_),
    )


def _mean(values: list[Metrics]) -> dict[str, float | None]:
    means: dict[str, float | None] = {}
    for name in values[0]:
        defined = [value for item in values if (value := item[name]) is not None]
        means[name] = sum(defined) / len(defined) if defined else None
    return means


def _central(experiment: Experiment, sites: Sequence[SiteConfig]) -> dict[str, Metrics]:
    train = units_of(sites, experiment.run_id, experiment.tasks, "train")
    tasks = {name: task for name, task in experiment.tasks.items() if any(name in own.tasks for own in train.values())}
    sizes = {
        name: sum(site.tasks[name].public_size for site in sites if site.name in train and name in site.tasks)
        for name in tasks
    }
    assert experiment.config.non_private_solver is not None
    solver = open_solver(experiment.config.non_private_solver, "non_private_solver")
    heads = _train_alone(experiment, solver, tasks, pool(train, tasks), sizes, purpose="central")
    return _pooled(experiment, heads, sites, experiment.run_id, experiment.backbones)


def _non_private(experiment: Experiment, sites: Sequence[SiteConfig]) -> dict[str, Metrics]:
    del sites  # These sites' files forbid it.
    config = experiment.config
    changes = {"solver": config.non_private_solver, "privacy": "non_private", "evaluation": None}
    run_ = config.run.model_copy(update=changes)
    return _again(experiment, run_, experiment.backbones, "non_private")


def _random_backbone(experiment: Experiment, sites: Sequence[SiteConfig]) -> dict[str, Metrics]:
    del sites  # Their ledgers are the real run's.
    run_ = experiment.config.run.model_copy(update={"evaluation": None})
    backbones = open_backbones(run_, _IN_FILE, opened_by=partial(open_random, seed=run_.seed))
    return _again(experiment, run_, backbones, "random_backbone")


def _again(experiment: Experiment, run_: RunConfig, backbones: Mapping[str, Backbone], name: str) -> dict[str, Metrics]:
    """The federation once more under other conditions, with sites and ledgers of its own."""
    folder = experiment.folder / "baselines" / name
    shutil.rmtree(folder, ignore_errors=True)  # Of an attempt that was interrupted.
    folder.mkdir(parents=True)
    sites = build_sites(experiment.config, folder / "sites", non_private=run_.requested_privacy is None)
    outcome = _federate(experiment, run_, backbones, sites, folder)
    return _pooled(experiment, outcome.heads, sites, folder.name, backbones)


def _baseline_prediction(experiment: Experiment, sites: Sequence[SiteConfig]) -> dict[str, Metrics]:
    train, test = (units_of(sites, experiment.run_id, experiment.tasks, split) for split in ("train", "test"))
    tasks = {name: task for name, task in experiment.tasks.items() if any(name in own.tasks for own in train.values())}
    return evaluate_baseline_predictions(tasks, train, test)


_BASELINES = {
    "baseline_prediction": _baseline_prediction,
    "local": _local,
    "non_private": _non_private,
    "central": _central,
    "random_backbone": _random_backbone,
}
