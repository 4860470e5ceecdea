"""The public numbers on which advice rests, from a simulation or run file and a backbone on this machine.

No record is read: sizes are declared ones, and a backbone is timed on made-up inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from client.data.encoding.batches import find_modality
from client.protocol.requirements import feature_dim
from client.solvers import SummingSolver, open_solver
from common.backbones import Divisible
from common.files import write_atomic
from common.model.advice import Advice, Situation, advise
from common.model.backbones import open_pretrained
from common.model.forecast import Forecast, forecast_loss
from common.model.guessing import Totals, compute_v
from common.run import AUTO, Name, RunConfig
from common.tasks import Task, open_tasks
from common.types import BadInput
from common.yaml import format_yaml, load, parse, read_yaml
from server.rounds.aggregators import check_trust
from simulations.check import check_simulation
from simulations.choice.candidates import time_record
from simulations.config import RUN_PREFIX, SimulationConfig
from simulations.executors.gathered import sum_totals
from simulations.partition import build_sites

LEAST_SECURE = 3
"""Number of sites from which a secure sum stands one that colludes with the coordinator."""


@dataclass(frozen=True)
class TaskAdvice:
    """The advice on one task, and the numbers that it follows from.

    Attributes:
        situation: the public numbers.
        advice: the advice.
        forecast: accuracy that privacy costs the advised run on synthetic records, as `plan` has it; None without one.
    """

    situation: Situation
    advice: Advice
    forecast: Forecast | None


@dataclass(frozen=True)
class Following:
    """A file's values after the advice.

    Attributes:
        tasks: task -> its advice.
        values: the values of the file that follows it; None where no task is worth training together.
    """

    tasks: Mapping[Name, TaskAdvice]
    values: Mapping[str, Any] | None


def advise_on_file(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    units: int | None = None,
    sites: int | None = None,
    distance: float | None = None,
) -> Following:
    """Returns the advice on every task of a simulation or run file.

    Args:
        path: the file.
        overrides: settings that replace those of the file, each as "key.path=value".
        units: declared number of units of each task at each site, with a run file.
        sites: number of sites, with a run file; by default those that its cohort needs at least.
        distance: distance of the sites' records from the backbone's home, where it is known.

    Raises:
        BadInput: the file or an option is wrong, or a run file comes without sizes.
    """
    values = read_yaml(path, overrides)
    is_simulation = isinstance(values.get("run"), dict)
    if is_simulation and (units is not None or sites is not None):
        raise BadInput("--units, --sites: expected them with a run file only; a simulation file declares its own sizes")
    if distance is not None and not 0.0 <= distance < float("inf"):
        raise BadInput(f"--distance: expected a number of at least 0, got {distance:g}")
    if is_simulation:
        config = load(SimulationConfig, path, overrides)
        check_simulation(config)
        run, totals = config.run, _sum_sizes(config)
    else:
        run = load(RunConfig, path, overrides)
        if units is None:
            raise BadInput(
                "--units: expected the declared number of units at each site, because a run file has no sizes; got none"
            )
        num_sites = run.cohort.min_sites if sites is None else sites
        if units < 1 or num_sites < 1:
            raise BadInput(f"--units, --sites: expected at least 1 of each, got {units} and {num_sites}")
        totals = dict.fromkeys(run.tasks, Totals(units * num_sites, num_sites))
    editor = _Editor(values, path, run, is_simulation)
    return _advise_on_run(editor, totals, distance)


def write_following(path: Path, source: Path, following: Following) -> None:
    """Writes the file that follows the advice beside the one that was advised on.

    Args:
        path: the new file.
        source: the file that was advised on.
        following: the advice and what follows from it.

    Raises:
        BadInput: no task is worth training together, or there is a file, or it would lie in another folder.
    """
    if following.values is None:
        raise BadInput("--out: expected a run that is worth training together, got none; see `together` above")
    if path.resolve().parent != source.resolve().parent:
        raise BadInput(f"--out {path}: expected a file beside {source}, because its paths are relative to that folder")
    if path.exists():
        raise BadInput(f"--out {path}: expected a new file, but there is one")
    head = f"# By `headwater advise {source.name}`; `headwater simulate plan` shows its price.\n"
    write_atomic(path, (head + format_yaml(following.values)).encode("utf-8"))


# --- parts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Editor:
    """A file's values, with other settings of its run.

    Attributes:
        values: the file's values as they are written.
        path: the file.
        run: the run that they are.
        is_simulation: whether the run stands inside a simulation file.
    """

    values: Mapping[str, Any]
    path: Path
    run: RunConfig
    is_simulation: bool

    def edit(self, *, secure: int) -> dict[str, Any]:
        """Returns the values with what was advised, and `solver: {kind: auto}` for the rest.

        Args:
            secure: number of sites of a secure sum; 0 for noise at each site.
        """
        # All that `auto` chooses, and what follows from the advice.
        gone = ("solver", "aggregation", "moments", "rounds", "trainable", "trust", "colluding")
        whole = self.values["run"] if self.is_simulation else self.values
        run = {key: value for key, value in whole.items() if key not in gone}
        run["solver"] = {"kind": AUTO}
        if secure:
            run |= {"trust": "secure_sum", "colluding": 1, "cohort": {**(run.get("cohort") or {}), "min_sites": secure}}
        if not self.is_simulation:
            return run
        # A sweep or another solver may name what is no longer there.
        rest = {key: value for key, value in self.values.items() if key not in ("sweep", "non_private_solver")}
        return {**rest, "run": run}

    def read(self, values: Mapping[str, Any]) -> RunConfig:
        """Returns the run of edited values. Raises BadInput."""
        if self.is_simulation:
            config = parse(SimulationConfig, values, base=self.path.parent)
            check_simulation(config)
            return config.run
        return parse(RunConfig, values, base=self.path.parent)


def _sum_sizes(config: SimulationConfig) -> dict[Name, Totals]:
    with TemporaryDirectory() as folder:
        sites = build_sites(config, Path(folder) / "sites", non_private=config.run.requested_privacy is None)
        return sum_totals(sites, config.run)


def _advise_on_run(editor: _Editor, totals: Mapping[Name, Totals], distance: float | None) -> Following:
    tasks = open_tasks(editor.run)
    num_sites = max(each.num_sites for each in totals.values())
    plain = editor.read(editor.edit(secure=0))
    summed = _find_secure(editor, num_sites)
    facts = {name: _look_at(editor.run, name) for name in editor.run.backbone_specs}
    v = compute_v(plain, tasks, totals)
    v_secure = {} if summed is None else compute_v(summed, tasks, totals)
    situations = {}
    for name, total in totals.items():
        modality, last_block, seconds = facts[editor.run.backbone_of(name)]
        situations[name] = Situation(
            modality=modality,
            num_units=total.num_units,
            num_sites=total.num_sites,
            private=editor.run.requested_privacy is not None,
            v=v[name],
            v_secure=v_secure.get(name),
            last_block=last_block,
            seconds=seconds,
            distance=distance,
        )
    advice = {name: advise(situation) for name, situation in situations.items()}
    secure = num_sites if summed is not None and any(each.secure for each in advice.values()) else 0
    values = editor.edit(secure=secure)
    advised = editor.read(values)
    made = {
        name: TaskAdvice(situations[name], each, _forecast(advised, name, totals[name], tasks))
        for name, each in advice.items()
    }
    return Following(made, values if any(each.together for each in advice.values()) else None)


def _find_secure(editor: _Editor, num_sites: int) -> RunConfig | None:
    """Returns the run with a secure sum; None where it cannot have one."""
    if num_sites < LEAST_SECURE or editor.run.requested_privacy is None:
        return None
    try:
        run = editor.read(editor.edit(secure=num_sites))
        check_trust(run, f"{RUN_PREFIX}aggregation")
        return run if isinstance(open_solver(run.solver, f"{RUN_PREFIX}solver"), SummingSolver) else None
    except BadInput:  # Such as updates in float16, or cohorts of a part of the sites.
        return None


def _look_at(run: RunConfig, backbone: Name) -> tuple[str | None, str | None, float | None]:
    """Returns a backbone's modality, its last block that can train, and its seconds a record; None for each unknown."""
    try:
        opened = open_pretrained(run.backbone_specs[backbone], f"{RUN_PREFIX}{run.backbone_key(backbone)}")
    except BadInput:  # Weights that are not here yet: they are no part of the advice, and a run names what is missing.
        return None, None, None
    kind = opened.kind
    asked = run.trainable.get(backbone)
    blocks = kind.blocks(opened.module.encoder) if isinstance(kind, Divisible) else []
    last = asked.from_ if asked is not None and asked.lora is None else (blocks[-1] if blocks else None)
    return find_modality(opened.preprocess), last, time_record(opened)


def _forecast(run: RunConfig, task: Name, total: Totals, tasks: Mapping[str, Task]) -> Forecast | None:
    if task not in tasks:
        return None
    num_features = feature_dim(run.backbone_specs[run.backbone_of(task)])
    return forecast_loss(run, task, num_features, total.num_units, total.num_sites)
