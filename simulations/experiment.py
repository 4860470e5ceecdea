"""One simulation from its file to its summary: sites, federation, evaluation, baselines, report.

Invariant: everything a report says is in the run's journal; everything the run used is in its folder.
"""

from __future__ import annotations

import csv
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from client.config import SiteConfig
from client.data.prepare import PROBLEMS
from client.personal.evaluate import predict_at_home
from client.personal.intervals import list_differences, list_intervals
from client.protocol.site import FINAL_HEADS, Site
from common.events import (
    BaselineEvaluated,
    EpsilonSpent,
    HomeEvaluated,
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
from common.model.backbones import open_backbones
from common.plugins import Spec, resolve
from common.privacy.noise import Entropy, SeededEntropy, os_entropy
from common.run import resolve_backbone_paths
from common.types import BadInput, DeclineReason, Interrupted, RunFailed
from common.yaml import load, write_yaml
from server.reports.results import new_run_folder, write_environment, write_results
from server.rounds.checkpoint import Checkpoint, load_checkpoint
from server.rounds.loop import Outcome
from server.rounds.messenger import Observe
from simulations.baselines import compute_baseline
from simulations.check import check_simulation
from simulations.config import RUN_PREFIX, SimulationConfig
from simulations.evaluate import HeadEvaluation, evaluate_at_home, locate_prepared_data, predict_left_out
from simulations.executors.gathered import build_for_executor, sum_public_sizes
from simulations.executors.shards import ShardEnded
from simulations.federate import Experiment, evaluate_heads, federate, ignore_progress, list_epsilons, open_on
from simulations.partition import build_sites, read_sites
from simulations.plan import refuse_hopeless

Watch = Callable[[Path], AbstractContextManager[object]]
"""Watches a run from its folder."""


def watch_nothing(folder: Path) -> AbstractContextManager[object]:
    """Watches no run."""
    del folder
    return nullcontext()


def run(
    config: SimulationConfig | Path | str,
    *,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    entropy: Entropy | None = None,
    observe: Observe = ignore_progress,
    anyway: bool = True,
    watch: Watch = watch_nothing,
) -> Summary:
    """Runs a simulation and returns its summary.

    Args:
        config: a simulation, or the path of its file.
        out: folder of the run, new or empty; by default a new one under the simulation's `runs_dir`.
        overrides: settings that replace those of the file, each as "key.path=value".
        entropy: source of the keys of sampling and noise, for tests; by default the operating system, or `noise_seed`.
        observe: receives the progress: phase, number of steps done, number of all steps.
        anyway: whether a run is begun that cannot be better than guessing.
        watch: entered with the run's folder while the run goes on; it reads the journal there.

    Raises:
        BadInput: a setting or a record is wrong, or no task can be better than guessing.
        RunFailed: the run ended without a usable result.
        Interrupted: a person ended the run; it can be resumed.
    """
    if not isinstance(config, SimulationConfig):
        config = load(SimulationConfig, Path(config), overrides)
    tasks = check_simulation(config)
    backbones = open_backbones(config.run, RUN_PREFIX)
    tasks = open_on(config.run, tasks, backbones)
    folder = create_folder(config, out)
    write_yaml(folder / "config.yaml", make_paths_absolute(config))
    write_environment(folder / "environment.json", {"run": config.run.seed, "noise": config.noise_seed})
    sites = build_for_executor(config, folder / "sites", non_private=config.run.requested_privacy is None)
    if not anyway:
        try:
            refuse_hopeless(sum_public_sizes(config, sites), config.run)
        except BadInput:
            shutil.rmtree(folder)
            raise
    experiment = Experiment(config, tasks, backbones, folder, entropy or choose_entropy(config), observe)
    with watch(folder):
        return _complete(experiment, sites, resume=None)


def resume(
    folder: Path,
    *,
    entropy: Entropy | None = None,
    observe: Observe = ignore_progress,
    watch: Watch = watch_nothing,
) -> Summary:
    """Continues a run whose process ended, after its last completed round, and returns its summary.

    Ledgers are kept and never reset.

    Args:
        folder: folder of the run.
        entropy: source of the keys of sampling and noise, for tests; by default the operating system, or `noise_seed`.
        observe: receives the progress: phase, number of steps done, number of all steps.
        watch: entered with the run's folder while the run goes on; it reads the journal there.

    Raises:
        BadInput: the folder is not a run's, or the run has already ended.
        RunFailed: the run ended without a usable result.
        Interrupted: a person ended the run; it can be resumed again.
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
    backbones = open_backbones(config.run, RUN_PREFIX)
    sites = read_sites(folder / "sites")
    tasks = open_on(config.run, check_simulation(config), backbones)
    experiment = Experiment(config, tasks, backbones, folder, entropy or choose_entropy(config), observe)
    with watch(experiment.folder):
        return _complete(experiment, sites, checkpoint)


def write_files(config: SimulationConfig, folder: Path) -> list[SiteConfig]:
    """Writes a simulation as the files of its two owners, `run.yaml` and `sites/<site>/site.yaml`, for `flwr run`.

    Raises:
        BadInput: a setting is wrong, or the folder is not empty.
    """
    check_simulation(config)
    if config.leave_out is not None:
        raise BadInput("leave_out: expected none for `sites`, whose run all sites join; take `run` or `sweep`")
    create_folder(config, folder)
    write_yaml(folder / "run.yaml", make_paths_absolute(config).run)
    return build_sites(config, folder.resolve() / "sites", non_private=config.run.requested_privacy is None)


def make_paths_absolute(config: SimulationConfig) -> SimulationConfig:
    """Returns the same simulation with absolute paths, so that its file may lie in any folder."""

    def resolve_source(spec: Spec) -> Spec:
        return Spec(**resolve("client.data.sources", spec, "").model_dump(mode="json", by_alias=True))

    sources = {name: resolve_source(spec) for name, spec in config.sources.items()}
    sites = {
        site: {name: resolve_source(spec) for name, spec in own.items()}
        for site, own in (config.partition.sites or {}).items()
    }
    partition = config.partition.model_copy(update={"sites": sites or None})
    run_ = resolve_backbone_paths(config.run, RUN_PREFIX)
    # Pre-training is over when a run begins.
    return config.model_copy(update={"run": run_, "sources": sources, "partition": partition, "pretrain": None})


# --- parts -----------------------------------------------------------------------------------------------------------


def _complete(experiment: Experiment, sites: list[SiteConfig], resume: Checkpoint | None) -> Summary:
    """Trains, evaluates, computes the baselines and writes the results. Raises Interrupted on Ctrl-C."""
    try:
        return _train_and_report(experiment, sites, resume)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; `headwater simulate resume {experiment.folder}` continues the run after its last whole round"
        ) from None


def _train_and_report(experiment: Experiment, sites: list[SiteConfig], resume: Checkpoint | None) -> Summary:
    config, run_ = experiment.config, experiment.config.run
    if run_.audit == "required":
        _audit(experiment)
    try:
        observed = replace(experiment, observe=_refuse_unusable_records(experiment, sites))
        outcome = federate(
            observed, run_, sites, backbones=experiment.backbones, folder=experiment.folder, resume=resume
        )
    except BadInput:
        write_results(experiment.folder, run_, experiment.backbones, {})
        raise
    except ShardEnded as error:
        raise ShardEnded(
            f"{error}; what the round was charged stays charged, and nothing of it was used; `headwater simulate "
            f"resume {experiment.folder}` charges it again and continues after the last whole round"
        ) from error
    except RunFailed as error:
        write_results(experiment.folder, run_, experiment.backbones, {})
        _raise_with_detail(error, sites)
        raise
    with without_flushing():  # One line for each site; the next line that is flushed puts them all on the disk.
        _journal_left_out(experiment, sites)
        _journal_epsilon(experiment, sites)
    evaluations = _journal_metrics(experiment, sites, outcome)
    if config.personal != "none":
        _journal_at_home(experiment, sites, outcome)
    for name in config.baselines:
        experiment.observe(f"baseline {name}", 0, 1)
        started = time.monotonic()
        found = compute_baseline(name, experiment, sites)
        event = BaselineEvaluated(
            name=name,
            metrics={task: each.pooled for task, each in found.items()},
            seconds=round(time.monotonic() - started, 3),
            intervals={task: list_intervals(each.estimates) for task, each in found.items()},
            differences={
                task: list_differences(evaluations[task].estimates, each.estimates)
                for task, each in found.items()
                if task in evaluations
            },
        )
        experiment.journal.write(event)
        experiment.observe(f"baseline {name}", 1, 1)
    return write_results(experiment.folder, run_, experiment.backbones, outcome.heads, outcome.moments)


def _audit(experiment: Experiment) -> None:
    """Audits before anything is trained or spent. Raises RunFailed where the audit fails; the summary is written."""
    # Imported here: it loads a third of a second of statistics, and most runs require no audit.
    from simulations.audit import audit_simulation, require_passed

    verdict = audit_simulation(experiment.config, experiment.observe, experiment.entropy)
    experiment.journal.write(SolverAudited(verdict=verdict))
    try:
        require_passed(verdict)
    except RunFailed:
        write_results(experiment.folder, experiment.config.run, experiment.backbones, {})
        raise


def create_folder(config: SimulationConfig, out: Path | None) -> Path:
    """Returns a new folder for a simulation's results, or the given one. Raises BadInput where that is not empty."""
    if out is None:
        return new_run_folder(config.runs_dir, config.run.name)
    if out.exists() and any(out.iterdir()):
        raise BadInput(f"--out {out}: expected a new or empty folder")
    out.mkdir(parents=True, exist_ok=True)
    return out.resolve()


def choose_entropy(config: SimulationConfig) -> Entropy:
    """Returns the operating system as the source of noise keys, or the simulation's `noise_seed`."""
    return os_entropy if config.noise_seed is None else SeededEntropy(config.noise_seed)


# --- what only a simulator sees --------------------------------------------------------------------------------------


def _raise_with_detail(error: RunFailed, sites: Sequence[SiteConfig]) -> None:
    """Raises a run's failure again with the detail of the first site that declined, which no coordinator learns."""
    for site in sites:
        declined = select_events(read_site_journal(site.state_dir / "site.jsonl"), RequestDeclined)
        if not declined:
            continue
        if declined[-1].reason == DeclineReason.BAD_REQUEST:
            raise BadInput(f"{site.name}: {declined[-1].detail}") from error
        raise RunFailed(f"{error}; {site.name}: {declined[-1].detail}") from error


def _refuse_unusable_records(experiment: Experiment, sites: Sequence[SiteConfig]) -> Observe:
    """Returns the experiment's observer, which first looks at what the sites prepared, before the first round.

    It raises BadInput where a site left out more records than the simulation allows.
    """

    def observe(phase: str, done: int, total: int) -> None:
        if phase == "rounds" and not checked:
            checked.append(True)
            for site in sites:
                _check_usable_share(experiment, site)
        experiment.observe(phase, done, total)

    checked: list[bool] = []
    return observe


def _check_usable_share(experiment: Experiment, site: SiteConfig) -> None:
    config = experiment.config
    prepared = select_events(read_site_journal(site.state_dir / "site.jsonl"), RunPrepared)
    if not prepared or prepared[-1].num_records is None or prepared[-1].num_usable is None:
        return
    usable, count = prepared[-1].num_usable, prepared[-1].num_records
    path = locate_prepared_data(site, experiment.run_id).with_name(PROBLEMS)
    with path.open(newline="", encoding="utf-8") as file:
        first = next(csv.DictReader(file), None)
    if first is None:
        return
    where = f"{first['file']} row {first['row']}" if first["row"] else first["file"]
    listed = f"site {site.name}: {usable} of {count} records can be used; the first of the others: {where}: "
    listed += f"{first['reason']}; all are listed in {path}"
    if config.on_bad_record == "stop":
        raise BadInput(f"{listed}; mend them or write `on_bad_record: skip`")
    if usable < config.min_usable_share * count:
        raise BadInput(f"{listed}; mend them or lower `min_usable_share` ({config.min_usable_share:g})")


def _journal_left_out(experiment: Experiment, sites: Sequence[SiteConfig]) -> None:
    for site in sites:
        prepared = select_events(read_site_journal(site.state_dir / "site.jsonl"), RunPrepared)
        if prepared and prepared[-1].num_left_out:
            path = locate_prepared_data(site, experiment.run_id).with_name(PROBLEMS)
            event = RecordsLeftOut(site=site.name, num_records=prepared[-1].num_left_out, path=str(path))
            experiment.journal.write(event)


def _journal_epsilon(experiment: Experiment, sites: Sequence[SiteConfig]) -> None:
    if experiment.config.run.requested_privacy is None:
        return
    for site, epsilon in list_epsilons(experiment, sites).items():
        if epsilon > 0:
            experiment.journal.write(EpsilonSpent(site=site, epsilon=epsilon))


def _journal_metrics(
    experiment: Experiment, sites: Sequence[SiteConfig], outcome: Outcome
) -> dict[str, HeadEvaluation]:
    evaluations = evaluate_heads(
        experiment, outcome.heads, sites, run_id=experiment.run_id, backbones=experiment.backbones, intervals=True
    )
    for task, result in evaluations.items():
        event = MetricsEvaluated(
            task=task,
            pooled=result.pooled,
            per_site=result.per_site,
            pooled_intervals=list_intervals(result.estimates),
            per_site_intervals={site: list_intervals(each) for site, each in result.site_estimates.items()},
            errors=tuple(sorted(result.errors)),
            outcomes=result.outcomes,
        )
        experiment.journal.write(event)
    return evaluations


def _journal_at_home(experiment: Experiment, sites: Sequence[SiteConfig], outcome: Outcome) -> None:
    """Compares the kinds of heads at each site that received the final heads, or at the one that was left out alone.

    Args:
        experiment: the simulation.
        sites: its sites.
        outcome: the end of the run.
    """
    found = {}
    sites = experiment.config.list_judging_sites(sites)
    for position, site in enumerate(sites):
        experiment.observe("personal heads", position, len(sites))
        if experiment.config.leave_out is not None:
            found[site.name] = predict_left_out(experiment.config, experiment.tasks, site, outcome, experiment.run_id)
        elif (locate_prepared_data(site, experiment.run_id).with_name(FINAL_HEADS)).exists():
            found[site.name] = predict_at_home(Site(site, experiment.entropy), experiment.run_id, lenient=True)
    for task, heads in evaluate_at_home(found).items():
        taken = {site: each.alignments[task] for site, each in found.items() if task in each.alignments}
        event = HomeEvaluated(task=task, personal=experiment.config.personal, heads=heads, alignments=taken)
        experiment.journal.write(event)
    experiment.observe("personal heads", len(sites), len(sites))
